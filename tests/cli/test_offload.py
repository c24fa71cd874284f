# SPDX-License-Identifier: LGPL-2.1-or-later
"""convert -C: the kernel copies; on a file system with reflinks nothing is copied at all."""
import os
import subprocess

import pytest


@pytest.fixture
def reflinks(tmp_path):
    """A directory on a file system that shares blocks."""
    image, where = tmp_path / "btrfs.img", tmp_path / "mnt"
    where.mkdir()
    image.touch()
    os.truncate(image, 512 << 20)
    made = subprocess.run(["mkfs.btrfs", "-q", image], capture_output=True, check=False) if _have("mkfs.btrfs") else None
    if not made or made.returncode != 0:
        pytest.skip("no mkfs.btrfs")
    if subprocess.run(["mount", "-o", "loop", image, where], capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield where
    subprocess.run(["umount", where], check=False)


def _have(name):
    return any(os.access(os.path.join(d, name), os.X_OK) for d in (*os.environ["PATH"].split(":"), "/usr/sbin", "/sbin"))


def used(where):
    os.sync()
    s = os.statvfs(where)
    return (s.f_blocks - s.f_bfree) * s.f_frsize


def test_reflinks_take_no_space(t, reflinks):
    data = os.urandom(64 << 20)
    (reflinks / "a.raw").write_bytes(data)
    before = used(reflinks)
    t.ok("convert", "-C", "-f", "raw", "-O", "raw", reflinks / "a.raw", reflinks / "b.raw")
    assert (reflinks / "b.raw").read_bytes() == data
    assert used(reflinks) - before < 8 << 20
    t.ok("convert", "-f", "raw", "-O", "raw", reflinks / "a.raw", reflinks / "c.raw")
    assert used(reflinks) - before > 56 << 20


@pytest.mark.parametrize("out", ["raw", "vmdk"])
def test_offloaded_copies_are_the_same_disk(t, out):
    t.ok("create", "-f", "vmdk", "a.vmdk", "5M")
    t.io("a.vmdk", "write -P 1 100k 300k", "write -P 2 3M 1M", "write -z 3200k 64k")
    t.ok("convert", "-C", "-O", out, "a.vmdk", "b")
    t.ok("compare", "a.vmdk", "b")


def test_offload_and_sparse_exclude_each_other(t):
    t.ok("create", "a.raw", "1M")
    r = t.ours("qemu-img", "convert", "-C", "-S", "4k", "a.raw", "b.raw")
    assert r.code == 1
    assert "Cannot enable copy offloading when -S is used" in r.err
