# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mounted disk with a control socket: jobs on it, another size, a state that outlives it; and temporary disks."""
import contextlib
import errno
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import threading

import pytest
from mounting import (KIB, MIB, Mount, close, content, create, drover, loop_device, mounted, needs_fuse, needs_root, opened, run,
                      wait_for_end)
import programs
from qmp import Control
from test_mount_load import Worker

pytestmark = needs_fuse

SIZE = 24 * MIB
CONTROL = ("--control", "control", "--allow-path", "/")


def controlled(disk, work, *more, **kw):
    """A mount and a client; the disk is called d."""
    m = Mount(disk, work / "mnt", *CONTROL, "--name", "d", *more, **kw)
    return m, Control(str(work / "control"))


@pytest.fixture(name="small")
def small_file_system(tmp_path):
    """A directory whose file system has room for less than the disk."""
    where = tmp_path / "small"
    where.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", where], check=False).returncode:
        pytest.skip("cannot mount a small file system")
    yield where
    run("umount", "-l", where)


# ------------------------------------------------------------------ jobs


@pytest.mark.parametrize("kind, then", [("raw", "add-cow"), ("qcow2", "qcow2"), ("vmdk", "vmdk")])
def test_a_snapshot_has_what_was_written_before_it_even_in_mapped_pages(work, kind, then):
    disk, shadow = create(work, kind, SIZE)
    m, control = controlled(disk, work)
    inode = os.stat(m.file).st_ino
    with m, opened(m.file) as fd, mmap.mmap(fd, SIZE) as memory:
        for off in range(0, SIZE, 2 * MIB):
            memory[off:off + 4] = shadow[off:off + 4] = b"page"
        os.pwrite(fd, b"write", MIB)
        shadow[MIB:MIB + 5] = b"write"
        control.ask("blockdev-snapshot-sync", device="d", snapshot_file=str(work / "new"), format=then)
        memory[0:5] = b"later"
        os.pwrite(fd, b"later", MIB)
        memory.flush()
        assert content(disk, work, "-U", "-f", kind) == shadow
        shadow[0:5] = shadow[MIB:MIB + 5] = b"later"
        assert os.fstat(fd).st_ino == os.stat(m.file).st_ino == inode
        assert m.file.read_bytes() == shadow
        control.close()
    assert content(work / "new", work, "-f", then) == shadow


def test_a_backup_has_what_was_written_before_it_even_in_mapped_pages(work):
    disk, shadow = create(work, "qcow2", SIZE)
    m, control = controlled(disk, work)
    with m, opened(m.file) as fd, mmap.mmap(fd, SIZE) as memory:
        for off in range(0, SIZE, 2 * MIB):
            memory[off:off + 4] = shadow[off:off + 4] = b"page"
        control.ask("drive-backup", device="d", job_id="job", target=str(work / "new"), sync="full", format="raw")
        for state in control.states("job"):
            assert state != "aborting"
        control.close()
        assert (work / "new").read_bytes() == shadow


@pytest.mark.parametrize("kind, then", [("vmdk", "qcow2"), ("qcow2", "qcow2"), ("raw", "add-cow")])
def test_random_jobs_below_random_programs_change_no_byte(work, kind, then):
    seed = programs.new_seed()
    disk, shadow = create(work, kind, SIZE)
    m, control = controlled(disk, work)
    jobs = programs.Jobs(control, seed, then, SIZE, can_grow=kind != "vmdk")
    with m:
        workers = [Worker(m.file, shadow, i, 2, 1000000) for i in range(2)]
        for w in workers:
            w.start()
        for _ in range(200 if os.environ.get("DROVER_TEST_LONG") else 12):
            jobs.run_one()
        for w in workers:
            w.steps = 0
            w.join()
        assert not any(w.error for w in workers), [w.error for w in workers]
        (path, fmt), *_ = control.chain()
        control.close()
        assert os.stat(m.file).st_size == jobs.size
        assert m.file.read_bytes() == shadow + bytes(jobs.size - SIZE)
    assert content(path, work, "-f", fmt) == shadow + bytes(jobs.size - SIZE)
    assert drover("check", "-f", fmt, path, check=False).returncode in (0, 63)


@needs_root
@pytest.mark.parametrize("kind, then", [("vmdk", "vmdk"), ("qcow2", "qcow2"), ("raw", "add-cow")])
def test_a_file_system_on_a_loop_device_is_whole_after_jobs_and_grows_with_the_disk(work, kind, then):
    size, step = 64 * MIB, 8 * MIB
    disk, _ = create(work, kind, size)
    m, control = controlled(disk, work)
    jobs = programs.Jobs(control, programs.new_seed(), then, size, can_grow=False)
    data = random.Random(kind).randbytes(step)
    with m:
        with loop_device(m.file) as loop:
            run("mkfs.ext4", "-q", "-F", loop)
            with mounted(loop, work / "fs") as where:
                for i in range(4):
                    (where / f"kept{i}").write_bytes(data)
                    (where / "lost").write_bytes(data)
                    os.sync()
                    (where / "lost").unlink()
                    jobs.run_one(between=lambda: run("fstrim", where))  # pylint: disable=cell-var-from-loop
            run("e2fsck", "-fp", loop)
            if kind != "vmdk":
                control.ask("block_resize", device="d", size=size + 32 * MIB)
                run("losetup", "-c", loop)
                run("resize2fs", loop)
                run("e2fsck", "-fn", loop)
            with mounted(loop, work / "fs") as where:
                for i in range(4):
                    assert (where / f"kept{i}").read_bytes() == data
        (path, fmt), *_ = control.chain()
        control.close()
    assert drover("check", "-f", fmt, path, check=False).returncode in (0, 63)


# ------------------------------------------------------------------ size


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_disk_that_grows_is_seen_by_those_who_have_it_open(work, kind):
    disk, shadow = create(work, kind, SIZE)
    m, control = controlled(disk, work)
    with m, opened(m.file) as fd, mmap.mmap(fd, SIZE) as memory:
        memory[SIZE - 4:] = shadow[SIZE - 4:] = b"last"
        assert os.pread(fd, 10, SIZE) == b""
        with pytest.raises(OSError) as e:
            os.pwrite(fd, b"x", SIZE)
        assert e.value.errno == errno.ENOSPC
        control.ask("block_resize", device="d", size=SIZE + MIB)
        assert os.fstat(fd).st_size == os.stat(m.file).st_size == os.lseek(fd, 0, os.SEEK_END) == SIZE + MIB
        assert os.pread(fd, MIB + 10, SIZE - 4) == b"last" + bytes(MIB)
        os.pwrite(fd, b"end", SIZE + MIB - 3)
        assert os.pread(fd, 10, SIZE + MIB - 3) == b"end"
        control.close()
    assert content(disk, work, "-f", kind) == shadow + bytes(MIB - 3) + b"end"


# ------------------------------------------------------------------ beginning and end


def test_a_client_ends_the_mount_and_the_image_is_closed_then(work):
    disk, shadow = create(work, "qcow2", SIZE)
    m, control = controlled(disk, work)
    with m:
        fd = os.open(m.file, os.O_RDWR)
        memory = mmap.mmap(fd, SIZE)
        memory[100:104] = shadow[100:104] = b"last"
        end = os.pidfd_open(m.pid())
        control.ask("quit")
        assert wait_for_end(end)
        os.close(end)
        assert not os.path.ismount(m.dir)
        memory.close()
        close(fd)
    assert not (work / "control").exists()
    assert content(disk, work) == shadow
    assert "No errors" in drover("check", disk).stdout


@pytest.mark.parametrize("option, text", [("busy", "control"), ("name", "1st disk"), ("directory", "nowhere")])
def test_a_control_socket_that_cannot_be_is_told_before_anything_is_mounted(work, option, text):
    disk, _ = create(work, "qcow2", SIZE)
    with socket.socket(socket.AF_UNIX) as other:
        if option == "busy":
            other.bind("control")
            other.listen()
        (work / "mnt").mkdir()
        r = drover("mount", "--control", "nowhere/control" if option == "directory" else "control", "--name",
                   "1st disk" if option == "name" else "d", disk, work / "mnt", check=False)
    assert r.returncode == 1 and text in r.stderr and r.stderr.count("\n") == 1, r
    assert not os.path.ismount(work / "mnt")
    assert drover("check", disk).returncode == 0  # nobody has it open


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_mount_goes_on_with_the_image_and_the_job(work, sig):
    disk, shadow = create(work, "qcow2", SIZE)
    state = ("--state", "state")
    m, control = controlled(disk, work, *state)
    with m:
        control.ask("blockdev-snapshot-sync", device="d", snapshot_file=str(work / "new"))
        with opened(m.file) as fd:
            os.pwrite(fd, b"newer" * MIB, 3)
            os.fsync(fd)
        shadow[3:3 + 5 * MIB] = b"newer" * MIB
        control.ask("block-stream", device="d", job_id="j", speed=512 * KIB)
        control.close()
        m.kill(sig)
        if sig == signal.SIGKILL:
            run("fusermount3", "-u", m.dir)
    m, control = controlled(disk, work, *state)
    with m:
        assert control.chain()[0][0] == str(work / "new")
        while len(control.chain()) > 1:
            control.read()  # an event of the job
        assert m.file.read_bytes() == shadow
        control.close()
    other, _ = create(work, "vmdk", SIZE)
    r = drover("mount", *state, "--name", "d", other, work / "mnt", check=False)
    assert r.returncode == 1 and "state" in r.stderr, r


# ------------------------------------------------------------------ no space


class Writer(threading.Thread):
    """Writes all of the disk in the background."""

    def __init__(self, file):
        super().__init__()
        self.file, self.failed = file, None
        self.start()

    def run(self):
        fd = os.open(self.file, os.O_RDWR)
        try:
            for at in range(0, SIZE, 256 * KIB):
                os.pwrite(fd, bytes([at // MIB + 1]) * (256 * KIB), at)
        except OSError as e:
            self.failed = e
        close(fd)

    def wait(self):
        self.join(60)
        assert not self.is_alive()


WANTED = b"".join(bytes([n + 1]) * MIB for n in range(SIZE // MIB))


def await_event(control, name):
    while True:
        event = control.events.pop(0) if control.events else control.read()
        if event.get("event") == name:
            return event["data"]


@needs_root
@pytest.mark.parametrize("way", ["space", "snapshot", "end"])
def test_writes_that_are_to_wait_for_space_go_on_with_it(work, small, way):
    drover("create", "-f", "raw", small / "disk", SIZE)
    m, control = controlled(small / "disk", work, "--on-error", "enospc")
    with m, killed_on_failure(m):
        writer = Writer(m.file)
        assert await_event(control, "BLOCK_IO_ERROR")["action"] == "stop"
        with opened(m.file, os.O_RDONLY) as fd:
            assert os.pread(fd, KIB, SIZE - KIB) == bytes(KIB)  # reads go on
        if way == "space":
            run("mount", "-o", "remount,size=64m", small)
        elif way == "snapshot":
            control.ask("blockdev-snapshot-sync", device="d", snapshot_file=str(work / "new"), format="qcow2")
        else:
            m.kill(signal.SIGTERM)
            writer.wait()
            assert writer.failed and not os.path.ismount(m.dir)
            return
        control.ask("cont")
        writer.wait()
        assert writer.failed is None
        assert m.file.read_bytes() == WANTED
        control.close()


def await_threads(pid, n):
    """Until the process has that many."""
    for _ in range(600):
        if len(os.listdir(f"/proc/{pid}/task")) >= n:
            return
        select.select([], [], [], 0.1)
    raise AssertionError("no threads")


@contextlib.contextmanager
def killed_on_failure(m):
    """What waits for a server that waits itself would wait for ever."""
    try:
        yield
    except BaseException:
        m.kill()
        raise


@needs_root
def test_many_pages_that_wait_keep_neither_readers_nor_clients_waiting(work, small):
    """The kernel writes them by more requests than the server usually has threads for, but fewer than it sends at once."""
    pages = range(8 * MIB, SIZE, 256 * KIB)
    drover("create", "-f", "raw", small / "disk", SIZE)
    m, control = controlled(small / "disk", work, "--on-error", "enospc")
    with m, opened(m.file) as fd, opened(m.file, os.O_RDONLY | os.O_DIRECT) as direct, mmap.mmap(fd, SIZE) as memory, \
            mmap.mmap(-1, 4096) as buffer, killed_on_failure(m):
        with pytest.raises(OSError):
            (small / "filler").write_bytes(bytes(9 * MIB))
        for off in pages:
            memory[off:off + 4] = b"page"
        flusher = threading.Thread(target=os.fsync, args=(fd,))
        flusher.start()
        assert await_event(control, "BLOCK_IO_ERROR")["action"] == "stop"
        await_threads(m.pid(), 32)
        reader = threading.Thread(target=os.preadv, args=(direct, [buffer], 0))
        reader.start()
        reader.join(60)
        assert not reader.is_alive()
        # It does not wait for the pages: they stand in a line that perhaps only "cont" lets move.
        control.ask("blockdev-snapshot-sync", device="d", snapshot_file=str(work / "new"), format="qcow2")
        control.ask("cont")
        flusher.join()
        control.close()
    data = content(work / "new", work, "-f", "qcow2", "--allow-path", "/")
    assert all(data[off:off + 4] == b"page" for off in pages)


# ------------------------------------------------------------------ temporary disks


@pytest.mark.parametrize("what", ["chain", "raw", "archive"])
def test_what_is_written_to_a_temporary_disk_is_gone_at_its_end(work, what):
    disk, shadow = create(work, "raw" if what == "raw" else "chain", SIZE)
    name = disk
    if what == "archive":
        drover("vma", "create", "-d", f"drive-scsi0={disk}", work / "b.vma")
        name = f"vma:{work / 'b.vma'}#drive-scsi0"
    before = {f: f.read_bytes() for f in work.iterdir() if f.is_file()}
    with Mount(name, work / "mnt", "--temporary") as m, opened(m.file) as fd:
        assert m.file.name == ("drive-scsi0" if what == "archive" else disk.name)
        assert os.pread(fd, SIZE, 0) == shadow
        os.pwrite(fd, b"gone" * MIB, MIB - 1)
        shadow[MIB - 1:5 * MIB - 1] = b"gone" * MIB
        os.fsync(fd)
        assert m.file.read_bytes() == shadow
        assert os.listdir(os.environ["TMPDIR"]) == []
    assert {f: f.read_bytes() for f in work.iterdir() if f.is_file()} == before
    r = drover("mount", "--temporary", "-r", name, work / "mnt", check=False)
    assert r.returncode == 1 and "--temporary" in r.stderr, r
