# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of a disk in use onto file systems that are full: the guest notices nothing, what is not complete is nowhere, and
a backup that waits for room ends well when there is some."""
import os
import subprocess
import threading

import pytest

from qmp import Control
from serving import DROVER, KiB, MiB, drover, io, run

nbd = pytest.importorskip("nbd")

SIZE = 16 * MiB
BACKUP = ("ctl", "control", "backup", "--state", "set.json", "--bitmap", "daily", "--allow-path", "small")


@pytest.fixture(name="small")
def small_file_system(work):
    """A directory whose file system has room for less than the disk, in the server's directory."""
    where = work / "small"
    where.mkdir()
    if os.geteuid() != 0 or run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", where).returncode != 0:
        pytest.skip("cannot mount a small file system")
    yield where
    run("umount", "-l", where)


class Guest(threading.Thread):
    """Writes everywhere until it is told to stop; what it has written is in `data`."""

    def __init__(self, server):
        super().__init__()
        self.handle = server.connect("d")
        self.data = bytearray(self.handle.pread(SIZE, 0))
        self.trouble, self.stop, self.n = None, False, 0
        self.start()

    def run(self):
        try:
            while not self.stop:
                at = self.n * 7 % (SIZE // (64 * KiB)) * 64 * KiB
                piece = bytes([self.n % 250 + 1]) * 4096
                self.handle.pwrite(piece, at)
                self.data[at:at + 4096] = piece
                self.n += 1
        except nbd.Error as e:
            self.trouble = e

    def end(self):
        self.stop = True
        self.join()
        assert self.trouble is None
        assert self.handle.pread(SIZE, 0) == self.data
        self.handle.shutdown()


@pytest.fixture(name="server", params=["raw", "qcow2"])
def served_disk(request, serve):
    drover("create", "-q", "-f", request.param, "disk", SIZE)
    io("disk", "write -P 0x11 0 16M", fmt=request.param)
    server = serve("disk", f"format={request.param}", "control=control", "export=d")
    yield server
    server.stop()


def test_a_target_without_room_fails_the_backup_and_not_the_guest(server, small):
    guest = Guest(server)
    r = run(DROVER, *BACKUP, "d", "small/b0")
    assert r.returncode == 1 and "No space left" in r.stdout, r.stdout
    assert os.listdir(small) == [] and not os.path.exists("set.json")
    drover(*BACKUP, "d", "b0")
    drover(*BACKUP, "d", "b1")
    guest.end()
    assert r.returncode == 1
    drover("backup", "verify", "set.json")


def test_a_backup_that_waits_for_room_goes_on_when_there_is_some(server, small):
    before = server.connect("d").pread(SIZE, 0)
    control = Control()
    with subprocess.Popen([DROVER, *BACKUP, "--on-error", "enospc", "--spill", ".", "d", "small/b0"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as waiting:
        while not any(job["status"] == "paused" for job in control.ask("query-jobs")):
            assert waiting.poll() is None, waiting.stdout.read()
        guest = Guest(server)
        while guest.n < 3 and not guest.trouble:
            pass
        run("mount", "-o", "remount,size=64m", small)
        job, = control.ask("query-jobs")
        control.ask("job-resume", id=job["id"])
        assert waiting.wait(60) == 0, waiting.stdout.read()
    control.close()
    guest.end()
    drover("convert", "-O", "raw", "small/b0", "copy")
    with open("copy", "rb") as f:
        assert f.read() == before
    drover("backup", "verify", "set.json")


@pytest.mark.parametrize("when,code", [("guest-waits", 0), ("backup-fails", 1)])
def test_a_spill_without_room_makes_the_one_yield_that_was_to(server, small, when, code):
    guest = Guest(server)
    r = run(DROVER, "ctl", "control", "backup", "-f", "raw", "--spill", "small", "--when-full", when, "--allow-path", "small",
            "-r", "2M", "d", "copy")
    guest.end()
    assert r.returncode == code, r.stdout
    assert os.path.exists("copy") == (code == 0) and os.listdir(small) == []
