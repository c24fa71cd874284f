# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mounted disk under load: file systems on it, several writers at once, no space, unmounting meanwhile."""
import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading

import pytest
from mounting import (KEEP_SIZE, KIB, MIB, PUNCH_HOLE, ZERO_RANGE, Mount, close, content, create, drover, fallocate, loop_device, mounted, needs_fuse, needs_root,
                      opened, run)

pytestmark = needs_fuse

SIZE = 24 * MIB


def space(disk):
    return os.stat(disk).st_blocks * 512


@needs_root
@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "chain"])
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_file_system_on_a_loop_device_is_sound_and_fstrim_gives_space_back(tmp_path, kind, fs):
    with open("/proc/filesystems", encoding="ascii") as f:
        if not shutil.which(f"mkfs.{fs}") or fs not in f.read():
            pytest.skip(f"no {fs} here")
    size = 320 * MIB
    disk, _ = create(tmp_path, kind, size)
    data = random.Random(fs).randbytes(40 * MIB)
    with Mount(disk, tmp_path / "mnt") as m:
        with loop_device(m.file) as loop:
            run(f"mkfs.{fs}", "-q", *(["-f"] if fs == "xfs" else ["-F"]), loop)
            with mounted(loop, tmp_path / "fs") as where:
                (where / "kept").write_bytes(data[:5 * MIB])
                (where / "lost").write_bytes(data)
                os.sync()
                full = space(disk)
                assert full > 40 * MIB
                (where / "lost").unlink()
            with mounted(loop, tmp_path / "fs") as where:  # XFS frees what an unlinked file had in its own time
                run("fstrim", where)
                run("dd", "if=/dev/null", f"of={m.file}", "conv=notrunc,fsync", "status=none")
                assert space(disk) < full - 30 * MIB
            run(*(["e2fsck", "-fn"] if fs == "ext4" else ["xfs_repair", "-n"]), loop)
    r = drover("check", disk, check=False)
    assert r.returncode == 0, r
    out = tmp_path / "out.raw"
    drover("convert", "-O", "raw", disk, out)
    with loop_device(out) as loop, mounted(loop, tmp_path / "fs", "-o", "ro" + (",norecovery" if fs == "xfs" else "")) as where:
        assert (where / "kept").read_bytes() == data[:5 * MIB] and not (where / "lost").exists()


class Worker(threading.Thread):
    """A random program on every fourth piece of 96 KiB, which is no multiple of a cluster: neighbours write to the
    same clusters."""

    PIECE = 96 * KIB

    def __init__(self, file, shadow, number, workers, steps):
        super().__init__()
        self.file, self.shadow, self.number, self.workers, self.steps = file, shadow, number, workers, steps
        self.error = None

    def range(self, rnd, align=1):
        piece = rnd.randrange(SIZE // self.PIECE // self.workers) * self.workers + self.number
        start = rnd.randrange(0, self.PIECE, align)
        length = min(self.PIECE - start, rnd.choice((align, 512, 4096, self.PIECE)))
        return piece * self.PIECE + start, length

    def check(self, got, off):
        assert got == self.shadow[off:off + len(got)], f"thread {self.number}, {len(got)} bytes from {off}"

    def step(self, rnd, fd, direct, memory, buffer):
        what = rnd.choice(("write", "write", "write", "read", "read", "direct", "mmap", "punch", "zero", "sync", "seek"))
        off, length = self.range(rnd, 4096 if what == "direct" else 1)
        data = rnd.randbytes(length)
        if what == "write":
            assert os.pwrite(fd, data, off) == length
        elif what == "direct":
            buffer[:length] = data
            with memoryview(buffer) as view, view[:length] as part:
                assert os.pwritev(direct, [part], off) == length
        elif what == "mmap":
            memory[off:off + length] = data
        elif what in ("punch", "zero"):
            data = bytes(length)
            fallocate(fd, (PUNCH_HOLE if what == "punch" else ZERO_RANGE) | KEEP_SIZE, off, length)
        elif what == "sync":
            os.fsync(fd)
            return
        elif what == "seek":
            self.seek(fd, off, length)
            return
        if what != "read":
            self.shadow[off:off + length] = data
        self.check(os.pread(fd, length, off), off)

    def seek(self, fd, off, length):
        """What is called a hole is zeros."""
        try:
            data = os.lseek(fd, off, os.SEEK_DATA)
        except OSError as e:
            assert e.errno == errno.ENXIO
            data = SIZE
        length = min(length, data - off)
        assert not any(self.shadow[off:off + length]), f"thread {self.number}: a hole of {length} at {off}"

    def run(self):
        rnd = random.Random(self.number)
        try:
            with opened(self.file) as fd, opened(self.file, os.O_RDWR | os.O_DIRECT) as direct, \
                    mmap.mmap(fd, SIZE) as memory, mmap.mmap(-1, self.PIECE) as buffer:
                done = 0
                while done < self.steps:
                    done += 1
                    self.step(rnd, fd, direct, memory, buffer)
        except (AssertionError, OSError) as e:
            self.error = e


@pytest.mark.parametrize("kind,cache", [("raw", "writeback"), ("qcow2", "writeback"), ("qcow2", "none"), ("vmdk", "writeback"),
                                        ("chain", "writeback"), ("addcow", "writeback")])
def test_random_programs_of_several_threads_leave_what_they_wrote(tmp_path, kind, cache):
    disk, shadow = create(tmp_path, kind, SIZE)
    steps = 4000 if os.environ.get("DROVER_TEST_LONG") else 250
    with Mount(disk, tmp_path / "mnt", "-t", cache) as m:
        workers = [Worker(m.file, shadow, i, 4, steps) for i in range(4)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        assert not any(w.error for w in workers), [w.error for w in workers]
        assert m.file.read_bytes() == shadow
    assert content(disk, tmp_path) == shadow
    assert drover("check", disk, check=False).returncode in (0, 63)


@pytest.mark.parametrize("kind", ["qcow2", "vmdk"])
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_ended_under_load_it_leaves_what_was_acknowledged_and_flushed(tmp_path, kind, sig):
    disk, shadow = create(tmp_path, kind, SIZE)
    first = bytes(shadow)
    writers, ready = 4, threading.Barrier(5)
    synced = [[] for _ in range(writers)]

    def write(number):
        rnd = random.Random(number)
        fd = os.open(m.file, os.O_RDWR)
        try:
            for i in range(100000):
                off, data = number * 5 * MIB + i % 60 * 70000, rnd.randbytes(70000)
                os.pwrite(fd, data, off)
                os.fsync(fd)
                synced[number] = [*synced[number][-20:], (off, data)]  # none of these has been written over
                if i == 10:
                    ready.wait()
        except OSError as e:
            assert e.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        close(fd)

    with Mount(disk, tmp_path / "mnt") as m:
        threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
        for thread in threads:
            thread.start()
        ready.wait()
        m.kill(sig)
        for thread in threads:
            thread.join()
        if sig == signal.SIGTERM:
            assert not os.path.ismount(m.dir)
            assert "No errors" in drover("check", disk).stdout
        else:
            run("fusermount3", "-u", m.dir)
    with Mount(disk, tmp_path / "mnt") as m:
        data = m.file.read_bytes()
    for number in range(writers):
        assert len(synced[number]) > 10
        for off, expected in synced[number]:
            assert data[off:off + len(expected)] == expected
    assert data[writers * 5 * MIB:] == first[writers * 5 * MIB:]
    allowed = (0, 3) if sig == signal.SIGKILL else (0,)  # 3: leaks
    assert drover("check", disk, check=False).returncode in allowed


@needs_root
@pytest.mark.parametrize("kind", ["raw", "qcow2", "vmdk"])
def test_a_full_file_system_below_is_told_to_the_writer_and_does_no_harm(tmp_path, kind):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        disk, shadow = create(small, kind, SIZE)
        with Mount(disk, tmp_path / "mnt") as m, opened(m.file) as fd:
            written = 0
            with pytest.raises(OSError) as e:
                for off in range(MIB, SIZE, 64 * KIB):
                    os.pwrite(fd, b"x" * (64 * KIB), off)
                    shadow[off:off + 64 * KIB] = b"x" * (64 * KIB)
                    written += 1
            assert e.value.errno == errno.ENOSPC and written > 50
            failed = MIB + written * 64 * KIB
            now = os.pread(fd, SIZE, 0)
            assert now[:failed] == shadow[:failed] and now[failed + 64 * KIB:] == shadow[failed + 64 * KIB:]
            # Space given back can be used.
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * MIB, MIB)
            os.fsync(fd)
            os.pwrite(fd, b"y" * (64 * KIB), failed)
            shadow[2 * MIB:3 * MIB] = bytes(MIB)
            shadow[failed:failed + 64 * KIB] = b"y" * (64 * KIB)
            os.fsync(fd)
        assert content(disk, tmp_path) == shadow
        assert drover("check", disk, check=False).returncode in (0, 63)
    finally:
        run("umount", small)
