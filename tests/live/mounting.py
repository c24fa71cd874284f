# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks under `drover mount`, and what they hold."""
import contextlib
import ctypes
import errno
import json
import os
import random
import select
import signal
import subprocess

import pytest

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DROVER = os.path.abspath(os.environ.get("DROVER", os.path.join(TOP, "build", "drover")))
KIB, MIB = 1 << 10, 1 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
libc = ctypes.CDLL(None, use_errno=True)

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="FUSE is not there")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may")


def drover(*args, check=True, **kw):
    r = subprocess.run([DROVER, *map(str, args)], capture_output=True, text=True, timeout=60, check=False,
                       stdin=subprocess.DEVNULL, **kw)
    if check:
        assert r.returncode == 0, (args, r.stdout, r.stderr)
    return r


def run(*args, **kw):
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=60, check=True, **kw).stdout


def extents(disk, *options):
    """[start, end) of what reads as zeros, of an image that may be in use."""
    holes = []
    for e in json.loads(drover("map", "-U", "--output=json", *options, disk).stdout):
        if e["zero"]:
            if holes and holes[-1][1] == e["start"]:
                holes[-1] = (holes[-1][0], e["start"] + e["length"])
            else:
                holes.append((e["start"], e["start"] + e["length"]))
    return holes


def holes_by_lseek(fd):
    holes, at, end = [], 0, os.fstat(fd).st_size
    while at < end:
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        if hole >= end:
            break
        try:
            at = os.lseek(fd, hole, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind it
            at = end
        holes.append((hole, at))
    return holes


def content(disk, tmp_path, *options):
    out = tmp_path / "content.raw"
    drover("convert", *options, "-O", "raw", disk, out)
    data = out.read_bytes()
    out.unlink()
    return data


def fallocate(fd, mode, off, length):
    if libc.fallocate(fd, mode, ctypes.c_long(off), ctypes.c_long(length)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def close(fd):
    """Close what may have lost its server, so that nobody is left to flush."""
    try:
        os.close(fd)
    except OSError as e:
        assert e.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def create(where, kind, size):
    """A disk of 16 MiB or more: its path, and the bytes it has."""
    if kind == "chain":
        base, top = where / "base.vmdk", where / "top.qcow2"
        drover("create", "-f", "vmdk", base, size)
        drover("io", "-c", f"write -P 7 0 {5 * MIB + 512}", "-c", f"write -P 9 {11 * MIB} 70k", base)
        drover("create", "-f", "qcow2", "-b", base.name, "-F", "vmdk", top)
        drover("io", "-c", f"write -P 8 {MIB + 1024} 100k", top)
        return top, bytearray(content(top, where))
    if kind == "addcow":
        base, top = where / "base.raw", where / "top.add-cow"
        base.write_bytes(random.Random(kind).randbytes(3 * MIB))
        os.truncate(base, size)
        drover("create", "-f", "add-cow", "-b", base.name, "-F", "raw", "-o", "image_file=top.raw", top)
        return top, bytearray(content(top, where))
    path = where / f"disk.{kind}"
    drover("create", "-f", kind, path, size)
    first = random.Random(kind).randbytes(300000)
    with Mount(path, where / "first") as m, opened(m.file) as fd:
        os.pwrite(fd, first, 100)
    return path, bytearray(bytes(100) + first + bytes(size - 100 - len(first)))


class Mount:
    """A disk that is mounted; `file` is the disk as a file."""

    def __init__(self, disk, where, *options, **kw):
        self.disk, self.dir = disk, where
        where.mkdir(exist_ok=True)
        drover("mount", *options, disk, where, **kw)
        self.file = where / os.listdir(where)[0]

    def pid(self):
        """The process that serves it."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    words = f.read().split(b"\0")
                if words[1:2] == [b"mount"] and os.fsencode(self.dir) in words:
                    return int(pid)
        raise AssertionError("nobody serves the mount")

    def kill(self, sig=signal.SIGKILL):
        """Send a signal and wait for the end."""
        fd = os.pidfd_open(self.pid())
        try:
            signal.pidfd_send_signal(fd, sig)
            assert wait_for_end(fd)
        finally:
            os.close(fd)

    def unmount(self):
        drover("unmount", self.dir)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None and os.path.ismount(self.dir):
            self.unmount()
        else:
            subprocess.run(["fusermount3", "-u", "-q", "-z", str(self.dir)], check=False)


def wait_for_end(pidfd, seconds=30):
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return poll.poll(seconds * 1000)


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def loop_device(file):
    r = subprocess.run(["losetup", "-f", "--show", str(file)], capture_output=True, text=True, check=False)
    if r.returncode:
        pytest.skip("no loop devices")
    try:
        yield r.stdout.strip()
    finally:
        subprocess.run(["losetup", "-d", r.stdout.strip()], check=True)


@contextlib.contextmanager
def mounted(device, where, *options):
    where.mkdir(exist_ok=True)
    run("mount", *options, device, where)
    try:
        yield where
    finally:
        run("umount", where)
