# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of disks of a server into one archive, while a client writes to both; and where slow ones spill."""
import os
import struct
import threading

import pytest

from qmp import Control, Refused
from serving import DROVER, KiB, MiB, drover, run

nbd = pytest.importorskip("nbd")

SIZE = 8 * MiB
BLOCKS, STEP = 50, 160 * KiB


class Counter:
    """Writes k = 1, 2, 3... to place k % BLOCKS of the first disk, and then to the same place of the second one."""

    def __init__(self, server, names):
        self.handles = [server.connect(name) for name in names]
        self.k, self.stop, self.trouble = 0, False, None
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        try:
            while not self.stop:
                for h in self.handles:
                    h.pwrite(struct.pack("<Q", self.k + 1), (self.k + 1) % BLOCKS * STEP)
                self.k += 1
        except nbd.Error as e:
            self.trouble = e

    def end(self):
        self.stop = True
        self.thread.join()
        assert self.trouble is None
        for h in self.handles:
            h.shutdown()


def steps_of(archive, name):
    """How many had been done when the archive's disk was as it is; all places must have numbers that fit."""
    drover("convert", "-O", "raw", f"vma:{archive}#{name}", f"{archive}-{name}.raw")
    with open(f"{archive}-{name}.raw", "rb") as f:
        data = f.read()
    numbers = [struct.unpack_from("<Q", data, i * STEP)[0] for i in range(BLOCKS)]
    last = max(numbers)
    for i, n in enumerate(numbers):
        assert n == max((k for k in range(max(1, last - BLOCKS + 1), last + 1) if k % BLOCKS == i), default=0)
    return last


def ctl(*args):
    return run(DROVER, "ctl", "control", *args)


def names_of():
    return [line.split(":")[0] for line in ctl("status").stdout.splitlines()]


@pytest.fixture
def server(serve):
    drover("create", "-q", "-f", "qcow2", "d1", str(SIZE))
    drover("create", "-q", "-f", "qcow2", "d2", str(SIZE))
    server = serve("d1", "d2", "control=control")
    yield server
    server.stop()


@pytest.mark.parametrize("more", [[], ["--spill", "."], ["--spill", "spill", "--spill-size", "64K"]])
def test_an_archive_has_both_disks_of_one_instant(server, more):
    names = names_of()
    counter = Counter(server, names)
    with open("qemu-server.conf", "w", encoding="utf-8") as f:
        f.write("cores: 2\n")
    while counter.k < 2 * BLOCKS and not counter.trouble:
        pass
    r = ctl("backup", "--all", "-c", "qemu-server.conf", *more, "b.vma.zst")
    assert r.returncode == 0, r.stdout
    r = ctl("backup", *more, *names, "c.vma")
    assert r.returncode == 0, r.stdout
    counter.end()
    assert drover("vma", "config", "b.vma.zst", "-c", "qemu-server.conf") == "cores: 2\n"
    seen = 2 * BLOCKS
    for archive in "b.vma.zst", "c.vma":
        assert "checked with checksums" in drover("vma", "verify", archive)
        first, second = (steps_of(archive, name) for name in names)
        assert first in (second, second + 1) and first >= seen
        seen = first
    assert not [n for n in os.listdir(".") if "spill" in n]


def test_an_image_is_backed_up_with_a_spill(server):
    name = names_of()[0]
    handle = server.connect(name)
    handle.pwrite(b"before" * 1000, MiB)
    before = handle.pread(SIZE, 0)
    r = ctl("backup", "--spill", ".", "--when-full", "backup-fails", "-f", "raw", name, "copy")
    assert r.returncode == 0, r.stdout
    handle.shutdown()
    with open("copy", "rb") as f:
        assert f.read() == before


def test_an_archive_job_is_listed_paused_slowed_and_goes_on(server):
    names = names_of()
    handle = server.connect(names[0])
    for i in range(8):
        handle.pwrite(bytes([i + 1]) * MiB, i * MiB)
    handle.flush()
    control = Control()
    control.ask("x-drover-archive", job_id="j", target=os.path.abspath("a.vma"), x_set=os.path.abspath("s.json"),
                speed=65536, on_target_error="stop")
    control.ask("job-pause", id="j")
    assert [(j["id"], j["status"]) for j in control.ask("query-jobs")] == [("j", "paused")]
    with pytest.raises(Refused):
        control.ask("job-pause", id="j")
    control.ask("block-job-set-speed", device="j", speed=0)
    assert control.ask("query-block-jobs")[0]["speed"] == 0
    assert not os.path.exists("a.vma")
    control.ask("job-resume", id="j")
    assert "BLOCK_JOB_COMPLETED" in list(control.states("j"))
    control.close()
    handle.shutdown()
    assert "a.vma#" + names[0] in drover("backup", "list", "s.json")
    drover("backup", "verify", "s.json")
    r = ctl("backup", "--all", "--state", "s.json", "--on-error", "stop", "b.vma")
    assert r.returncode == 0, r.stdout
    drover("backup", "verify", "s.json", "b.vma")


def test_what_is_refused(server):
    name = names_of()[0]
    with open("binary.conf", "wb") as f:
        f.write(b"\xff\xfe")
    names = sorted(os.listdir("."))
    for args, text in [(["nothing", "b.vma"], "Cannot find device='nothing'"),
                       ([name, name, "b.vma"], "is named twice"),
                       (["b.vma"], "names of disks, or --all"),
                       (["--all", name, "b.vma"], "exclude each other"),
                       (["--all", "-c", "binary.conf", "b.vma"], "no text in UTF-8"),
                       (["--all", "/dev/shm/drover-outside.vma"], "outside the image's directory"),
                       (["--all", "-f", "vma", "d1"], "is read from"),
                       (["--all", "--compress", "lzop", "b.vma"], "--compress must be"),
                       (["--all", "--bitmap", "s", "b.vma"], "--bitmap is for backups into images"),
                       (["--all", "--spill-size", "1M", "b.vma"], "go with --spill"),
                       (["--all", "--spill", ".", "--when-full", "never", "b.vma"], "'x-when-full' does not accept"),
                       (["--all", "--spill", "/dev/shm", "b.vma"], "outside the image's directory"),
                       (["--all", "--spill", "d1", "b.vma"], "d1"),
                       (["--spill", ".", "--spill-size", "1", name, "copy"], "it takes pieces of")]:
        r = ctl("backup", *args)
        assert r.returncode == 1 and text in r.stdout, (args, r.stdout)
    assert sorted(os.listdir(".")) == names
