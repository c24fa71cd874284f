# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Linux guest that writes and syncs on a served disk while jobs change what lies below it."""
import hashlib
import os
import re
import subprocess
import threading

import pytest

import guest
from serving import DROVER, MiB, drover, run

LONG = bool(os.environ.get("DROVER_TEST_LONG"))
pytestmark = pytest.mark.usefixtures("initramfs")


def ctl(*args):
    return drover("ctl", "control", *args, timeout=240)


def raw_copy(name, fmt):
    """A copy of a disk, which may be a parent of one that is in use."""
    drover("convert", "-f", fmt, "-O", "raw", name, "copy.raw", timeout=240)
    return "copy.raw"


class Frozen:
    """An image that a snapshot has frozen: it holds what the guest had told before, and stands still."""

    def __init__(self, machine, name, fmt, *command):
        self.machine, self.name, self.fmt = machine, name, fmt
        self.before = machine.now()
        ctl(*command)

    def judge(self):
        copied = raw_copy(self.name, self.fmt)
        guest.judge(copied, self.before, self.machine.now())


class Hasher(threading.Thread):
    """Another reader, who hashes an image again and again while jobs read it."""

    def __init__(self, name, fmt):
        super().__init__()
        self.args = [DROVER, "convert", "-f", fmt, "-O", "raw", name]
        self.stop, self.seen = False, []
        self.start()

    def run(self):
        while not self.stop or not self.seen:
            r = subprocess.run([*self.args, "hashed.raw"], capture_output=True, check=False)
            with open("hashed.raw", "rb") as f:
                self.seen.append(hashlib.sha256(f.read()).digest() if r.returncode == 0 else r.stderr)
            os.unlink("hashed.raw")

    def end(self):
        self.stop = True
        self.join()
        assert len(set(self.seen)) == 1 and len(self.seen[0]) == 32, set(self.seen)


def finish(machine, server, name, fmt):
    """The power of the guest fails; what it had told is in the disk."""
    told = machine.kill()
    assert not machine.trouble
    server.stop()
    r = run(DROVER, "check", name)
    assert r.returncode in (0, 63), r.stdout  # 63: raw has no check
    guest.judge(raw_copy(name, fmt), told, told)


def there_and_back(machine, fmt, n):
    """Three snapshots on "disk"; a stream and two commits later it is the only image again."""
    a, b, c = (f"{name}{n}" for name in "abc")
    frozen = Frozen(machine, "disk", fmt, "snapshot", "d", a)
    frozen.judge()
    ctl("snapshot", "d", b)
    machine.go_on()
    hasher = Hasher("disk", fmt)
    ctl("stream", "--base", "disk", "d")
    hasher.end()
    os.unlink(a)  # while it is there, nothing may go down into its parent
    frozen = Frozen(machine, b, fmt, "snapshot", "d", c)
    machine.go_on()
    frozen.judge()
    ctl("commit", "--top", b, "--base", "disk", "d")
    os.unlink(b)
    machine.go_on()
    ctl("commit", "d")
    os.unlink(c)
    machine.go_on()


@pytest.mark.parametrize("fmt", ["vmdk", "qcow2"])
def test_a_guest_keeps_all_its_files_through_every_job(serve, boot, fmt):
    drover("convert", "-O", fmt, guest.make_file_system("fs.raw"), "disk")
    server = serve("disk", f"format={fmt}", "control=control", "export=d")
    machine = boot(server)
    machine.go_on(100)
    for n in range(20 if LONG else 1):
        there_and_back(machine, fmt, n)
    size = guest.SIZE
    if fmt != "vmdk":  # those cannot
        size *= 2
        ctl("resize", "d", size)
        machine.go_on()
    ctl("mirror", "-f", fmt, "d", "moved")
    machine.go_on()
    assert server.connect("d").get_size() == size
    finish(machine, server, "moved", fmt)


def test_a_guest_keeps_all_its_files_on_add_cow_over_raw(serve, boot):
    guest.make_file_system("base.raw")
    drover("create", "-q", "-f", "add-cow", "-b", "base.raw", "-F", "raw", "disk")
    server = serve("disk", "control=control", "export=d")
    machine = boot(server)
    machine.go_on(100)
    frozen = Frozen(machine, "disk", "add-cow", "snapshot", "d", "s1")
    frozen.judge()
    machine.go_on()
    with pytest.raises(AssertionError, match="is missing|version"):  # it can tell a copy that is too old
        guest.judge("copy.raw", machine.now(), machine.now())
    ctl("stream", "--base", "disk", "d")
    ctl("snapshot", "d", "s2")
    machine.go_on()
    ctl("commit", "--top", "s1", "--base", "disk", "d")
    os.unlink("s1")
    machine.go_on()
    ctl("commit", "--base", "disk", "d")
    machine.go_on()
    ctl("mirror", "-f", "add-cow", "--top-only", "d", "moved")
    machine.go_on()
    finish(machine, server, "moved", "add-cow")


@pytest.mark.parametrize("job", ["commit", "stream"])
def test_a_guest_keeps_all_its_files_when_a_raw_disk_gets_an_add_cow_and_loses_it_again(serve, boot, job):
    guest.make_file_system("disk")
    server = serve("disk", "format=raw", "control=control", "export=d")
    machine = boot(server)
    machine.go_on(100)
    frozen = Frozen(machine, "disk", "raw", "snapshot", "-f", "add-cow", "d", "overlay")
    frozen.judge()
    ctl(job, "d")
    machine.go_on()
    path, fmt = re.match(r"d: (.*) \((.*?), .* 0 below it", ctl("status")).groups()
    assert fmt == "raw" or job == "stream"
    finish(machine, server, path, fmt)


def test_a_guest_boots_from_a_disk_in_an_archive_and_the_archive_stays_as_it_is(serve, boot):
    drover("vma", "create", "a.vma", "-d", f"drive-a={guest.make_file_system('fs.raw')}")
    with open("a.vma", "rb") as f:
        before = f.read()
    server = serve("vma:a.vma#drive-a", "temporary=true", "export=d")
    machine = boot(server, mode="boot")
    machine.go_on(100)
    told = machine.end()
    with open("copy.raw", "wb") as f:
        h = server.connect("d")
        for at in range(0, guest.SIZE, 32 * MiB):
            f.write(h.pread(32 * MiB, at))
    guest.judge("copy.raw", told, told, at_least=10)
    server.stop()
    with open("a.vma", "rb") as f:
        assert f.read() == before
