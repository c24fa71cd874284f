# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Linux guest with one file system on a volume of LVM, in stripes over two served disks: what is backed up of both at
one instant is a volume that was there at that instant. Archives are restored as Proxmox does."""
import os
import re
import shutil
import sys

import pytest

import guest
from serving import DROVER, MiB, drover

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli"))

import vmarestore  # noqa: E402  pylint: disable=wrong-import-position

NAMES = ("drive-scsi0", "drive-scsi1")
CONF = "memory: 160\n" + "".join(f"#qmdump#map:scsi{n}:{name}:local:raw:\n" for n, name in enumerate(NAMES))
SIZE = 40 * MiB


@pytest.fixture(scope="module")
def with_lvm(tmp_path_factory):
    guest.skip_without()
    for tool in ("lvm", "ldd"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is missing")
    return guest.make_initramfs(tmp_path_factory.mktemp("lvm") / "initramfs.gz", ["dm-mod"], ["lvm", "mke2fs"])


def read(path, at, n):
    with open(path, "rb") as f:
        f.seek(at)
        return f.read(n)


def field(text, name, pattern=r"(\d+)"):
    return re.search(rf"\b{name} = {pattern}", text).group(1)


def assemble(disks, path):
    """The volume in two raw disks, as their metadata lays it out. Both have the same, latest metadata."""
    texts = []
    for disk in disks:
        found = re.findall(r"vg \{\n[^\0]*", read(disk, 0, MiB).decode("latin-1"))
        texts.append(max(found, key=lambda t: int(field(t, "seqno"))))
    assert texts[0] == texts[1]
    text = texts[0]
    extent = int(field(text, "extent_size")) * 512
    stripe = int(field(text, "stripe_size")) * 512
    starts = [int(field(text[text.index(f"pv{n} {{"):], "pe_start")) * 512 for n in (0, 1)]
    stripes = re.findall(r'"(pv[01])", (\d+)', text[text.index("stripes = ["):])
    length = int(field(text, "extent_count")) * extent // 2
    parts = [read(disks[int(pv[2])], starts[int(pv[2])] + int(first) * extent, length) for pv, first in stripes]
    with open(path, "wb") as f:
        for at in range(0, length, stripe):
            for part in parts:
                f.write(part[at:at + stripe])


def step_of(disks, log):
    assemble(disks, "volume.raw")
    guest.read_files("volume.raw")
    return guest.steps_of(log)


def archive_of(machine, path):
    """An archive of both disks, and what they must at least have in it."""
    machine.go_on()
    log = machine.now().log
    with open("qemu-server.conf", "w", encoding="utf-8") as f:
        f.write(CONF)
    drover("ctl", "control", "backup", "--all", "-c", "qemu-server.conf", "-r", "4M", path, timeout=240)
    assert len(machine.now().log) > len(log), "the guest was hardly at work meanwhile"
    return guest.step_told(log)


def restore(archive, where):
    """By the protocol of Proxmox's restore. The paths of the raw disks."""
    where = os.path.abspath(where)
    os.mkdir(where)
    os.symlink(DROVER, f"{where}/vma")
    r = vmarestore.Restore(where, vmarestore.raw_volume, source=os.path.abspath(archive))
    assert r.watch(240) == 0, r.errors
    return [f"{where}/vm-100-{name}.raw" for name in NAMES]


def restored_together():
    """The raw disks of a backup of both at rest."""
    os.mkdir("to")
    drover("backup", "--consistent", "--state", "set.json", "d0", "d1", "to", timeout=240)
    disks = ["back0", "back1"]
    for disk, made in zip(disks, sorted(name for name in os.listdir("to") if not name.endswith(".sums"))):
        drover("create", "-q", "-f", "raw", disk, SIZE)
        drover("restore", f"to/{made}", disk, timeout=240)
    return disks


def test_two_disks_of_a_running_machine_are_restored_as_they_were_at_one_instant(serve, boot, with_lvm):
    drover("create", "-q", "-f", "qcow2", "d0", SIZE)
    drover("create", "-q", "-f", "raw", "d1", SIZE)
    server = serve("d0", f"export={NAMES[0]}", "d1", f"export={NAMES[1]}", "control=control")
    machine = boot(server, "new-volume", NAMES, with_lvm)
    leasts = [archive_of(machine, "a.vma"), archive_of(machine, "b.vma.zst")]
    machine.go_on()
    told = machine.kill()
    assert not machine.trouble
    server.stop()
    drover("vma", "extract", "b.vma.zst", "b", timeout=240)
    first, second = restore("a.vma", "a"), [f"b/{name}.raw" for name in NAMES]
    steps = [step_of(first, told.log), step_of(second, told.log)]
    assert leasts[0] <= steps[0] < leasts[1] <= steps[1]
    if steps[1] - steps[0] > 20:  # disks of two instants are told from others, unless hardly anything was done between
        with pytest.raises((AssertionError, StopIteration)):
            step_of([first[0], second[1]], told.log)
    assert step_of(restored_together(), told.log) >= guest.step_told(told.log)

    # The machine goes on with what was restored.
    server = serve(first[0], f"export={NAMES[0]}", first[1], f"export={NAMES[1]}", "format=raw")
    boot(server, "volume", NAMES, with_lvm).end()
    server.stop()
