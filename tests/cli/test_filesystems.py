# SPDX-License-Identifier: LGPL-2.1-or-later
"""On real file systems, and on one without hard links, without the flags of rename and without the fsync of directories."""
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest

SERVER = pathlib.Path(__file__).parent.parent / "lib" / "nolinkfs.py"
MIB = 1 << 20


@pytest.fixture
def poor(t):
    """Its mount point. What lies below it is in t.dir/below."""
    pytest.importorskip("fusepy", reason="python3-fusepy is not installed")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened")
    mount = t.dir / "mount"
    for directory in (mount, t.dir / "below"):
        directory.mkdir()
    with subprocess.Popen([sys.executable, SERVER, t.dir / "below", mount], stderr=subprocess.PIPE) as server:
        while not os.path.ismount(mount):
            if server.poll() is not None:
                pytest.skip(f"cannot mount by FUSE: {server.stderr.read().decode(errors='replace')}")
            time.sleep(0.01)
        yield mount
        subprocess.run(["fusermount", "-u", mount], check=True)
        server.wait()


def source(t):
    (t.dir / "s.raw").write_bytes(b"\x07" * MIB)
    return "s.raw"


def test_the_file_system_lacks_what_it_should(poor):
    (poor / "a").write_bytes(b"a")
    with pytest.raises(PermissionError):
        os.link(poor / "a", poor / "b")
    directory = os.open(poor, os.O_RDONLY)
    with pytest.raises(OSError):
        os.fsync(directory)
    os.close(directory)


@pytest.mark.parametrize("fmt", ["raw", "vmdk", "add-cow"])
def test_images_are_created_there(t, poor, fmt):
    for _ in range(2):  # the second replaces the first
        t.ok("create", "-q", "-f", fmt, poor / "disk", MIB)
    t.ok("info", poor / "disk")
    assert not [name for name in os.listdir(poor) if name.startswith(".")]


@pytest.mark.parametrize("fmt", ["raw", "vmdk"])
def test_images_are_converted_there(t, poor, fmt):
    for _ in range(2):
        t.ok("convert", "-O", fmt, source(t), poor / "disk")
    t.ok("compare", "-F", fmt, "s.raw", poor / "disk")


def test_snapshots_are_made_there(t, poor):
    t.ok("create", "-q", "-f", "vmdk", poor / "disk.vmdk", MIB)
    t.ok("snapshot", "-c", poor / "disk.vmdk")
    assert sorted(os.listdir(poor)) == ["disk-000001.vmdk", "disk.vmdk"]


def test_archives_are_made_and_extracted_there(t, poor):
    t.ok("vma", "create", "-q", "-d", f"a={source(t)}", poor / "x.vma")
    t.ok("vma", "verify", "-q", poor / "x.vma")
    t.ok("vma", "extract", "-q", poor / "x.vma", poor / "out")
    assert (poor / "out" / "a.raw").read_bytes() == (t.dir / "s.raw").read_bytes()
    assert sorted(os.listdir(poor)) == ["out", "x.vma", "x.vma.sums"] and os.listdir(poor / "out") == ["a.raw"]


def test_what_exists_is_not_replaced_there(t, poor):
    (poor / "out").mkdir()
    for name in ("x.vma", "out/a.raw", "child.vmdk"):
        (poor / name).write_bytes(b"mine")
    t.ok("vma", "create", "-q", "--no-sums", "-d", f"a={source(t)}", "x.vma")
    t.ok("create", "-q", "-f", "vmdk", poor / "disk.vmdk", MIB)
    for args in (["vma", "create", "-q", "-d", "a=s.raw", poor / "x.vma"],
                 ["vma", "extract", "-q", "x.vma", poor / "out"],
                 ["snapshot", "-c", poor / "disk.vmdk", poor / "child.vmdk"]):
        r = t.drover(*args)
        assert r.code == 1 and "exists" in r.err, r
    for name in ("x.vma", "out/a.raw", "child.vmdk"):
        assert (poor / name).read_bytes() == b"mine"


# ------------------------------------------------------------------ real ones, in files

PLACES = os.environ["PATH"] + ":/usr/sbin:/sbin"
# name: how they are made and mounted; the first way that works. exFAT has neither links nor holes.
REAL = {
    "ext4": [("mkfs.ext4 -q -F", "mount -o loop -t ext4")],
    "xfs": [("mkfs.xfs -q -f", "mount -o loop -t xfs")],
    "btrfs": [("mkfs.btrfs -q -f", "mount -o loop -t btrfs")],
    "btrfs-nocow": [("mkfs.btrfs -q -f", "mount -o loop,nodatacow -t btrfs")],
    "exfat": [("mkfs.exfat", "mount -o loop -t exfat"), ("mkfs.exfat", "mount -o loop -t exfat-fuse"), ("mkfs.vfat", "mount -o loop -t vfat")],
}


def mounted(image, where, make, mount):
    for command in (f"{make} {image}", f"{mount} {image} {where}"):
        words = command.split()
        words[0] = shutil.which(words[0], path=PLACES)
        if not words[0] or subprocess.run(words, capture_output=True, check=False).returncode != 0:
            return False
    return True


@pytest.fixture(params=[*REAL, "poor"])
def volume(request, tmp_path):
    """An empty directory where one of them begins."""
    if request.param == "poor":
        yield request.getfixturevalue("poor")
        return
    image, where = tmp_path / "volume", tmp_path / "mnt"
    where.mkdir()
    image.touch()
    os.truncate(image, 400 * MIB)
    if not any(mounted(image, where, *way) for way in REAL[request.param]):
        pytest.skip(f"{request.param} cannot be made and mounted here")
    lost = where / "lost+found"
    if lost.exists():
        lost.rmdir()
    yield where
    subprocess.run(["umount", where], check=True)


def images_go_through(t, where):
    """Made, replaced, converted, written, frozen, committed, rebased, resized and compacted, with every byte right."""
    for fmt in ("raw", "qcow2", "vmdk"):
        disk, top = where / f"disk.{fmt}", where / f"top.{fmt}"
        t.ok("create", "-q", "-f", fmt, disk, 4 * MIB)
        t.ok("convert", "-q", "-O", fmt, "s.raw", disk)  # takes its place
        assert "identical" in t.ok("compare", "-F", fmt, "s.raw", disk)
        if fmt != "raw":
            t.ok("snapshot", "-q", "-c", top.name, disk)
            t.io(top, "write -P 3 1M 100k", "write -z 2M 1M", "flush")
            t.ok("convert", "-O", "raw", top, f"{fmt}.raw")
            t.ok("create", "-q", "-f", fmt, "-F", fmt, "-b", disk.name, where / f"other.{fmt}")
            t.ok("rebase", "-b", f"other.{fmt}", "-F", fmt, top)
            t.ok("rebase", "-b", disk.name, "-F", fmt, top)
            (where / f"other.{fmt}").unlink()
            t.ok("commit", "-q", "-d", top)
            top.unlink(missing_ok=True)
            assert "identical" in t.ok("compare", "-f", "raw", f"{fmt}.raw", disk)
            t.ok("compact", "-q", disk)
            assert "identical" in t.ok("compare", "-f", "raw", f"{fmt}.raw", disk)
            t.ok("check", "-q", disk)
        t.ok("resize", "-q", "-f", fmt, disk, "5M")


def test_every_file_system_gets_whole_images(t, volume):
    data = random.Random(1).randbytes(3 * MIB) + bytes(MIB)
    (t.dir / "s.raw").write_bytes(data)
    images_go_through(t, volume)
    t.ok("vma", "create", "-q", "-d", "a=s.raw", volume / "x.vma")
    t.ok("vma", "extract", "-q", volume / "x.vma", volume / "out")
    assert (volume / "out" / "a.raw").read_bytes() == data
    assert sorted(os.listdir(volume)) == ["disk.qcow2", "disk.raw", "disk.vmdk", "out", "x.vma", "x.vma.sums"]
