# SPDX-License-Identifier: LGPL-2.1-or-later
"""On a file system without hard links, without the flags of rename and without the fsync of directories."""
import os
import pathlib
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
