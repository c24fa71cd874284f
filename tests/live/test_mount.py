# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk as a file: what is written to a mount is the disk, whole and at once, and ends with it."""
import concurrent.futures
import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from mounting import (DROVER, KEEP_SIZE, KIB, MIB, PUNCH_HOLE, ZERO_RANGE, Mount, close, content, create, drover, extents, fallocate, holes_by_lseek, needs_fuse, needs_root, opened, run)

pytestmark = needs_fuse

SIZE = 24 * MIB
KINDS = ["raw", "qcow2", "vmdk", "chain"]


def check(path):
    r = drover("check", path, check=False)
    assert r.returncode in (0, 63), r  # 63: a format without anything to check


def together(*functions):
    """Run each in a thread."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(f) for f in functions]:
            future.result()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
def test_what_is_written_anywhere_in_any_length_is_the_disk(tmp_path, kind, cache):
    disk, shadow = create(tmp_path, kind, SIZE)
    rnd = random.Random(kind)
    with Mount(disk, tmp_path / "mnt", "-t", cache) as m:
        with opened(m.file) as fd:
            for _ in range(60):
                off = rnd.randrange(SIZE)
                data = rnd.randbytes(min(rnd.choice((1, 511, 4096, 70000, 3 * MIB)), SIZE - off))
                assert os.pwrite(fd, data, off) == len(data)
                shadow[off:off + len(data)] = data
                off = rnd.randrange(SIZE)
                length = rnd.choice((1, 5000, MIB + 3))
                assert os.pread(fd, length, off) == shadow[off:off + length]
        assert m.file.read_bytes() == shadow
    assert content(disk, tmp_path) == shadow
    check(disk)


@pytest.mark.parametrize("kind", KINDS)
def test_holes_are_those_of_the_map(tmp_path, kind):
    disk, shadow = create(tmp_path, kind, SIZE)
    with Mount(disk, tmp_path / "mnt", "-r") as m, opened(m.file, os.O_RDONLY) as fd:
        assert holes_by_lseek(fd) == extents(disk) != []
        for off, whence in ((SIZE, os.SEEK_DATA), (SIZE, os.SEEK_HOLE), (SIZE - 1, os.SEEK_DATA)):
            with pytest.raises(OSError) as e:
                os.lseek(fd, off, whence)
            assert e.value.errno == errno.ENXIO
        run("cp", "--sparse=auto", m.file, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == shadow
    holes = sum(end - start for start, end in extents(disk))
    assert os.stat(tmp_path / "copy").st_blocks * 512 <= SIZE - holes + 64 * KIB


@pytest.mark.parametrize("kind", KINDS)
def test_a_seek_finds_what_a_map_of_the_file_has_changed(tmp_path, kind):
    """The kernel has not written these pages yet: they must not be taken for holes."""
    disk, shadow = create(tmp_path, kind, SIZE)
    with Mount(disk, tmp_path / "mnt") as m, opened(m.file) as fd, mmap.mmap(fd, SIZE) as memory:
        def change(off):
            memory[off:off + 3] = shadow[off:off + 3] = b"new"

        for off in (14 * MIB + 8192, 16 * MIB, SIZE - 4096):
            change(off)
            assert os.lseek(fd, off - MIB, os.SEEK_DATA) in range(off - 64 * KIB, off + 1)
        for off in (18 * MIB, 20 * MIB):
            os.pwrite(fd, b"x" * (64 * KIB), off)
            shadow[off:off + 64 * KIB] = b"x" * (64 * KIB)
            change(off + 64 * KIB)  # two hidden ones, one right behind the other
            change(off + 68 * KIB)
            assert os.lseek(fd, off, os.SEEK_HOLE) > off + 68 * KIB
        change(22 * MIB)
        run("cp", "--sparse=auto", m.file, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == shadow
    assert content(disk, tmp_path) == shadow


def test_changes_by_mmap_reach_the_disk_and_other_openers(tmp_path):
    disk, shadow = create(tmp_path, "qcow2", SIZE)
    rnd = random.Random(1)
    with Mount(disk, tmp_path / "mnt") as m:
        with opened(m.file) as fd, opened(m.file, os.O_RDONLY | os.O_DIRECT) as direct, mmap.mmap(fd, SIZE) as memory, \
                mmap.mmap(-1, 64 * KIB) as buffer:
            for _ in range(100):
                off = rnd.randrange(SIZE - 1000)
                data = rnd.randbytes(rnd.randrange(1, 1000))
                memory[off:off + len(data)] = data
                shadow[off:off + len(data)] = data
                start = min(off // 4096 * 4096, SIZE - len(buffer))
                assert os.preadv(direct, [buffer], start) == len(buffer)
                assert buffer[:] == shadow[start:start + len(buffer)]
                assert os.pread(fd, 2000, off) == shadow[off:off + 2000]
            os.pwrite(fd, b"by write", 4 * MIB)
            shadow[4 * MIB:4 * MIB + 8] = b"by write"
            assert memory[4 * MIB:4 * MIB + 8] == b"by write"
    assert content(disk, tmp_path) == shadow
    check(disk)


@pytest.mark.parametrize("kind", KINDS)
def test_o_direct_writes_what_others_read(tmp_path, kind):
    disk, shadow = create(tmp_path, kind, SIZE)
    rnd = random.Random(2)
    with Mount(disk, tmp_path / "mnt") as m:
        with opened(m.file, os.O_RDWR | os.O_DIRECT) as direct, opened(m.file) as fd, mmap.mmap(-1, 256 * KIB) as buffer:
            for _ in range(40):
                length = rnd.choice((512, 4096, 256 * KIB))
                off = rnd.randrange((SIZE - length) // 512) * 512
                assert os.pread(fd, length, off) == shadow[off:off + length]  # now the page cache has it
                buffer[:length] = rnd.randbytes(length)
                with memoryview(buffer) as view, view[:length] as part:
                    assert os.pwritev(direct, [part], off) == length
                shadow[off:off + length] = buffer[:length]
                assert os.pread(fd, length, off) == shadow[off:off + length]
    assert content(disk, tmp_path) == shadow


@pytest.mark.parametrize("kind", KINDS)
def test_punched_and_zeroed_ranges_read_as_zeros_and_punching_gives_space_back(tmp_path, kind):
    disk, shadow = create(tmp_path, kind, SIZE)
    with Mount(disk, tmp_path / "mnt") as m, opened(m.file) as fd:
        os.pwrite(fd, b"x" * (8 * MIB), 8 * MIB)
        shadow[8 * MIB:16 * MIB] = b"x" * (8 * MIB)
        for mode, off, length in ((PUNCH_HOLE | KEEP_SIZE, 9 * MIB, 3 * MIB), (PUNCH_HOLE | KEEP_SIZE, 100, 70000),
                                  (ZERO_RANGE | KEEP_SIZE, 14 * MIB + 1, 5000), (ZERO_RANGE, 15 * MIB, 100 * KIB),
                                  (PUNCH_HOLE | KEEP_SIZE, SIZE - MIB, 5 * MIB)):
            fallocate(fd, mode, off, length)
            length = min(length, SIZE - off)
            shadow[off:off + length] = bytes(length)
            assert os.pread(fd, length + 2000, off - 50) == shadow[off - 50:off + length + 1950]
        os.fsync(fd)
        assert os.stat(disk).st_blocks * 512 < 8 * MIB
        holes = [(a, b) for a, b in holes_by_lseek(fd) if a <= 9 * MIB and b >= 12 * MIB]
        assert holes, holes_by_lseek(fd)
        for mode, off, length, code in ((0, 0, MIB, errno.EOPNOTSUPP), (KEEP_SIZE, 0, MIB, errno.EOPNOTSUPP),
                                        (ZERO_RANGE, SIZE - 10, 20, errno.ENOSPC)):
            with pytest.raises(OSError) as e:
                fallocate(fd, mode, off, length)
            assert e.value.errno == code
        assert os.fstat(fd).st_size == SIZE
    assert content(disk, tmp_path) == shadow
    check(disk)


def test_the_size_is_fixed(tmp_path):
    disk, shadow = create(tmp_path, "qcow2", SIZE)
    with Mount(disk, tmp_path / "mnt") as m, opened(m.file) as fd:
        assert os.pwrite(fd, b"1234567890", SIZE - 4) == 4  # as a block device does it
        shadow[-4:] = b"1234"
        for off in (SIZE, SIZE + 1, 100 * SIZE):
            with pytest.raises(OSError) as e:
                os.pwrite(fd, b"x", off)
            assert e.value.errno == errno.ENOSPC
        assert os.pread(fd, 10, SIZE - 4) == b"1234" and os.pread(fd, 10, SIZE) == b""
        for size in (0, SIZE - 1, SIZE + 1):
            with pytest.raises(OSError) as e:
                os.truncate(m.file, size)
            assert e.value.errno == errno.EPERM
        with pytest.raises(OSError):
            os.open(m.file, os.O_RDWR | os.O_TRUNC)
        os.ftruncate(fd, SIZE)
        assert os.fstat(fd).st_size == SIZE
    assert content(disk, tmp_path) == shadow


def test_a_size_that_is_no_multiple_of_a_page_is_right_to_its_last_byte(tmp_path):
    disk = tmp_path / "odd.raw"
    data = random.Random(3).randbytes(MIB + 777)
    disk.write_bytes(data)
    with Mount(disk, tmp_path / "mnt") as m:
        assert m.file.read_bytes() == data
        with opened(m.file) as fd, mmap.mmap(fd, len(data)) as memory:
            memory[-1] = 65
    assert disk.read_bytes() == data[:-1] + b"A"


def test_the_directory_has_only_the_disk(tmp_path):
    disk, _ = create(tmp_path, "qcow2", SIZE)
    with Mount(disk, tmp_path / "mnt", "--name", "a, b") as m:
        assert os.listdir(m.dir) == ["a, b"]
        st = os.stat(m.file)
        assert (st.st_mode & 0o7777, st.st_uid, st.st_size) == (0o600, os.geteuid(), SIZE)
        for refused in (lambda: (m.dir / "new").write_bytes(b""), lambda: os.unlink(m.file), lambda: os.mkdir(m.dir / "d"),
                        lambda: os.rename(m.file, m.dir / "new"), lambda: os.symlink("x", m.dir / "l"),
                        lambda: os.link(m.file, m.dir / "l")):
            with pytest.raises(OSError):
                refused()
        os.chmod(m.file, 0o640)
        os.utime(m.file, (5, 5))
        st = os.stat(m.file)
        assert st.st_mode & 0o777 == 0o640 and st.st_mtime == 5
        with opened(m.file) as fd:
            os.pwrite(fd, b"x", 0)
        assert os.stat(m.file).st_mtime > 5


def test_read_only_refuses_writes(tmp_path):
    disk, shadow = create(tmp_path, "qcow2", SIZE)
    before = disk.read_bytes()
    with Mount(disk, tmp_path / "mnt", "--read-only") as m:
        with pytest.raises(OSError) as e:
            os.open(m.file, os.O_RDWR)
        assert e.value.errno == errno.EROFS
        assert m.file.read_bytes() == shadow and os.stat(m.file).st_mode & 0o777 == 0o400
        with Mount(disk, tmp_path / "another", "-r") as other:  # readers share
            assert other.file.read_bytes() == shadow
    assert disk.read_bytes() == before


def test_the_middle_of_a_chain_a_snapshot_and_a_member_of_an_archive_are_mounted_read_only(tmp_path):
    disk, shadow = create(tmp_path, "chain", SIZE)
    base = content(tmp_path / "base.vmdk", tmp_path)
    drover("snapshot", "-i", "-c", "then", disk)
    drover("io", "-c", "write -P 1 0 1M", disk)
    drover("vma", "create", "-d", f"drive-scsi0={disk}", tmp_path / "b.vma.zst")
    now = content(disk, tmp_path)
    for options, name, file, expected in (
            (["-r"], tmp_path / "base.vmdk", "base.vmdk", base), (["-l", "then"], disk, "top.qcow2", shadow),
            (["-r"], f"vma:{tmp_path / 'b.vma.zst'}#drive-scsi0", "drive-scsi0", now)):
        with Mount(name, tmp_path / "mnt", *options) as m:
            assert os.listdir(m.dir) == [file] and m.file.read_bytes() == expected
    r = drover("mount", f"vma:{tmp_path / 'b.vma.zst'}#drive-scsi0", tmp_path / "mnt", check=False)
    assert r.returncode == 1 and r.stderr.count("\n") == 1 and not os.path.ismount(tmp_path / "mnt"), r


# ------------------------------------------------------------------ beginning and end


def test_the_image_is_closed_when_unmount_returns(tmp_path):
    disk, shadow = create(tmp_path, "vmdk", SIZE)
    for i in range(20):
        with Mount(disk, tmp_path / "mnt") as m, opened(m.file) as fd:
            os.pwrite(fd, bytes([i + 1]) * 1000, 1000 * i)
            shadow[1000 * i:1000 * i + 1000] = bytes([i + 1]) * 1000
        drover("io", "-c", f"read -v -P {i + 1} {1000 * i} 1000", "-c", "write -P 77 20M 512", disk)
    shadow[20 * MIB:20 * MIB + 512] = b"M" * 512
    assert content(disk, tmp_path) == shadow


def test_unmount_refuses_while_the_file_is_open(tmp_path):
    disk, _ = create(tmp_path, "qcow2", SIZE)
    with Mount(disk, tmp_path / "mnt") as m:
        with opened(m.file):
            r = drover("unmount", m.dir, check=False)
            assert r.returncode == 1 and str(m.dir) in r.stderr and "busy" in r.stderr, r
            assert os.path.ismount(m.dir)
        drover("unmount", m.dir)
        assert os.listdir(m.dir) == []
        r = drover("unmount", m.dir, check=False)
        assert r.returncode == 1 and "no disk of drover is mounted here" in r.stderr, r


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("used", [False, True])
def test_a_signal_unmounts_and_closes_the_image_whoever_uses_it(tmp_path, sig, used):
    disk, shadow = create(tmp_path, "vmdk", SIZE)
    with Mount(disk, tmp_path / "mnt") as m:
        fd = os.open(m.file, os.O_RDWR)
        with mmap.mmap(fd, SIZE) as memory:
            memory[12 * MIB:12 * MIB + 6] = b"mapped"
            os.pwrite(fd, b"written", 13 * MIB)
            shadow[12 * MIB:12 * MIB + 6], shadow[13 * MIB:13 * MIB + 7] = b"mapped", b"written"
            if used:
                m.kill(sig)
        if used:
            with pytest.raises(OSError) as e:
                os.pread(fd, 10, 0)
            assert e.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        close(fd)
        if not used:
            m.kill(sig)
        assert not os.path.ismount(m.dir) and os.listdir(m.dir) == []
    assert content(disk, tmp_path) == shadow
    assert "No errors" in drover("check", disk).stdout


def test_the_process_in_the_background_keeps_nothing_that_its_caller_had_open(tmp_path):
    disk, _ = create(tmp_path, "qcow2", SIZE)
    reads, writes = os.pipe()
    with Mount(disk, tmp_path / "mnt", pass_fds=[writes]):
        os.close(writes)
        os.set_blocking(reads, False)
        assert os.read(reads, 1) == b""  # the end; it would not be there yet if somebody could write
    os.close(reads)


def test_a_signal_ends_it_although_its_caller_had_blocked_signals(tmp_path):
    disk, _ = create(tmp_path, "qcow2", SIZE)
    with Mount(disk, tmp_path / "mnt",
               preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})) as m:
        fd = os.open(m.file, os.O_RDWR)
        m.kill(signal.SIGTERM)
        close(fd)
        assert not os.path.ismount(m.dir)


def test_in_the_foreground_it_stays_until_it_is_unmounted(tmp_path):
    disk, shadow = create(tmp_path, "qcow2", SIZE)
    where = tmp_path / "mnt"
    where.mkdir()
    with subprocess.Popen([DROVER, "mount", "--foreground", disk, where], stderr=subprocess.PIPE) as p:
        while not os.path.ismount(where) and p.poll() is None:
            os.sched_yield()
        assert (where / "disk.qcow2").read_bytes() == shadow
        run("fusermount3", "-u", where)
        assert p.wait(30) == 0 and p.stderr.read() == b""


@needs_root
def test_killed_it_leaves_what_was_flushed(tmp_path):
    disk, shadow = create(tmp_path, "vmdk", SIZE)
    rnd = random.Random(4)
    with Mount(disk, tmp_path / "mnt") as m:
        fd = os.open(m.file, os.O_RDWR)
        for _ in range(30):
            off, data = rnd.randrange(SIZE - 70000), rnd.randbytes(70000)
            os.pwrite(fd, data, off)
            shadow[off:off + len(data)] = data
        os.fsync(fd)
        os.pwrite(fd, b"lost or not", 0)
        m.kill()
        close(fd)
        r = drover("mount", "-r", disk, m.dir, check=False)
        assert r.returncode == 1 and f"fusermount3 -u '{m.dir}'" in r.stderr, r
        r = drover("unmount", m.dir, check=False)
        assert r.returncode == 1 and f"fusermount3 -u '{m.dir}'" in r.stderr, r
    now = content(disk, tmp_path)
    assert now[512:] == shadow[512:]
    with Mount(disk, tmp_path / "mnt") as m:
        assert m.file.read_bytes() == now
    check(disk)


def sleeps(pid):
    """Each thread waits in read(2) for a request, for the end of the others, or for a signal, and none for a time."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/syscall", encoding="ascii") as f:
            words = f.read().split()
        # futex(2) and rt_sigtimedwait(2) have their timeout in the fourth and third argument
        timeout = {"0": "0x0", "202": words[4], "128": words[3]}.get(words[0]) if len(words) > 4 else None
        if timeout != "0x0":
            return False
    return True


@pytest.mark.parametrize("depth", [1, 4])
def test_an_idle_mount_sleeps_without_a_timeout(tmp_path, depth):
    """Also when many requests, one after another or several at a time, have made its threads look for more."""
    disk, _ = create(tmp_path, "qcow2", SIZE)
    with Mount(disk, tmp_path / "mnt") as m:
        def ask():
            with opened(m.file, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
                for _ in range(1000):
                    os.preadv(fd, [page], 0)
        together(*[ask] * depth)
        pid, deadline = m.pid(), time.monotonic() + 10
        while not sleeps(pid):
            assert time.monotonic() < deadline
        assert sleeps(pid)


QUICK = """
import mmap, os, sys, time
fd, page, longest = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096), 0
for i in range(1 << 30):
    before = time.monotonic()
    assert os.preadv(fd, [page], i % 256 * 4096) == 4096 and page[0] == 5
    longest = max(longest, time.monotonic() - before) if i >= 2000 else 0
    if i == 2000:
        print("goes on", flush=True)
    if i % 256 == 0 and os.path.exists(sys.argv[2]):
        break
print(longest)
"""


def test_quick_requests_do_not_wait_for_slow_ones(tmp_path):
    """The slow ones come while the threads look for quick ones."""
    if not shutil.which("nbdkit"):
        pytest.skip("nbdkit is not installed")
    slow = ["nbdkit", "-f", "-r", "-U", tmp_path / "s", "--filter=delay", "memory", "16M", "rdelay=600ms"]
    uri, top = f"nbd+unix:///?socket={tmp_path / 's'}", tmp_path / "top.qcow2"
    with subprocess.Popen(list(map(str, slow))) as server:
        try:
            while not (tmp_path / "s").exists():
                assert server.poll() is None
            allow = ("--allow-path", uri)
            drover("create", "-f", "qcow2", "-b", uri, "-F", "raw", *allow, top, 16 * MIB)
            drover("io", *allow, "-c", "write -P 5 0 1M", top)
            with Mount(top, tmp_path / "mnt", *allow) as m, opened(m.file, os.O_RDONLY | os.O_DIRECT) as fd, \
                 subprocess.Popen([sys.executable, "-c", QUICK, m.file, tmp_path / "end"], stdout=subprocess.PIPE) as quick:
                assert quick.stdout.readline()

                def ask(number):
                    with mmap.mmap(-1, 4096) as page:
                        os.preadv(fd, [page], (number + 2) * MIB)
                for number in range(2):
                    ask(number)
                together(*[lambda n=n: ask(n) for n in range(2, 10)])
                (tmp_path / "end").touch()
                assert float(quick.stdout.read()) < 0.5
        finally:
            server.terminate()


@pytest.mark.parametrize("make,text", [
    (lambda d: (d / "x").write_bytes(b""), "not empty"),
    (lambda d: d.rmdir(), "No such file or directory"),
    (lambda d: (d.rmdir(), d.write_bytes(b"")), "Not a directory"),
], ids=["full", "missing", "a file"])
def test_a_mount_point_that_cannot_be_one_is_refused(tmp_path, make, text):
    disk, _ = create(tmp_path, "qcow2", SIZE)
    where = tmp_path / "mnt"
    where.mkdir()
    make(where)
    for options in ([], ["--foreground"]):
        r = drover("mount", *options, disk, where, check=False)
        assert r.returncode == 1 and text in r.stderr and str(where) in r.stderr and r.stderr.count("\n") == 1, r
    drover("io", "-c", "write 0 512", disk)  # nobody has it open


@needs_root
def test_without_fuse_one_line_says_what_to_do(tmp_path):
    disk, _ = create(tmp_path, "qcow2", SIZE)
    (tmp_path / "mnt").mkdir()
    r = subprocess.run(["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh", DROVER, "mount", disk,
                        tmp_path / "mnt"], capture_output=True, text=True, check=False, timeout=60)
    if "unshare" in r.stderr or "mount:" in r.stderr.split("drover:")[0]:
        pytest.skip("no name spaces of our own")
    assert r.returncode == 1 and "/dev/fuse" in r.stderr and "modprobe fuse" in r.stderr, r
    assert r.stderr.count("\n") == 1, r


@needs_root
def test_a_user_who_is_not_root_mounts_and_unmounts(tmp_path):
    """In a name space where /dev/fuse is for everybody, as udev makes it."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy2(DROVER, home / "drover")
    drover("create", "-f", "qcow2", home / "disk.qcow2", SIZE)
    script = """
        mknod -m 666 ../fuse c 10 229 && mount --bind ../fuse /dev/fuse && mount --bind . /mnt && cd /mnt || exit 77
        chown -R 65534:65534 .
        setpriv --reuid 65534 --regid 65534 --clear-groups sh -ec '
            mkdir dir
            ./drover mount disk.qcow2 dir
            printf 0123456789 | dd of=dir/disk.qcow2 conv=notrunc status=none
            head -c 10 dir/disk.qcow2
            ls dir
            ./drover unmount dir
            ls dir
            ./drover io -c "read -v 0 10" disk.qcow2 | grep 01234'
        """
    r = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=home, capture_output=True, text=True, check=False, timeout=60)
    if r.returncode == 77 or "unshare:" in r.stderr:
        pytest.skip("no name spaces or devices of our own")
    assert (r.returncode, r.stderr) == (0, ""), r
    assert r.stdout.startswith("0123456789disk.qcow2\n00000000:  30 31 32"), r
