# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are reached by symbolic links: what stands beside the link and what stands beside the file."""
import os

import pytest


@pytest.fixture
def d(t):
    (t.dir / "real").mkdir()
    (t.dir / "via").mkdir()
    return t


def link(t, name):
    (t.dir / "via" / name).symlink_to("../real/" + name)


def test_commit_sees_the_siblings_beside_the_linked_parent(d):
    t = d
    t.ok("create", "-q", "-f", "vmdk", "real/base.vmdk", "1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "real/sibling.vmdk")
    link(t, "base.vmdk")
    t.ok("create", "-q", "-f", "vmdk", "--allow-path", t.dir, "-b", "base.vmdk", "via/child.vmdk")
    t.io("via/child.vmdk", "write -P 0x22 0 64k", options=("--allow-path", str(t.dir)))
    r = t.drover("commit", "--allow-path", t.dir, "via/child.vmdk")
    assert r.code == 1 and "sibling.vmdk" in r.err, r
    assert "read 65536/65536" in t.io("real/sibling.vmdk", "read -P 0 0 64k", options=("-r",))
    assert "sibling.vmdk" in t.ok("snapshot", "-l", "via/base.vmdk")


def test_retire_sees_the_children_beside_the_linked_image(d):
    t = d
    t.ok("create", "-q", "-f", "add-cow", "real/a.add-cow", "1M")
    t.ok("create", "-q", "-f", "add-cow", "-b", "a.add-cow", "-F", "add-cow", "real/child.add-cow")
    t.ok("stream", "real/a.add-cow")
    link(t, "a.add-cow")
    link(t, "a.raw")
    args = ("addcow", "retire", "--allow-path", t.dir, "via/a.add-cow")
    r = t.drover(*args)
    assert r.code == 1 and "child.add-cow" in r.err, r
    assert (t.dir / "real" / "a.add-cow").exists()
    t.ok("rebase", "-u", "-b", "a.raw", "-F", "raw", "real/child.add-cow")
    t.ok(*args)
    assert not (t.dir / "real" / "a.add-cow").exists()
    assert (t.dir / "real" / "a.raw").exists()


def test_snapshot_makes_no_child_that_cannot_open_its_parent(d):
    t = d
    t.ok("create", "-q", "-f", "vmdk", "real/disk.vmdk", "1M")
    link(t, "disk.vmdk")
    r = t.drover("snapshot", "-c", "via/disk.vmdk")
    assert r.code == 1 and "outside" in r.err and "--allow-path" in r.err, r
    assert os.listdir(t.dir / "via") == ["disk.vmdk"]
    assert os.listdir(t.dir / "real") == ["disk.vmdk"]
    t.ok("snapshot", "-c", "--allow-path", t.dir, "via/disk.vmdk")
    t.io("via/disk-000001.vmdk", "write 0 4k", options=("--allow-path", str(t.dir)))
    (t.dir / "real" / "beside.vmdk").symlink_to("disk.vmdk")
    t.ok("snapshot", "-c", "real/beside.vmdk")
    t.io("real/beside-000001.vmdk", "write 0 4k")


def test_a_link_from_elsewhere_says_why_the_other_files_are_not_there(d):
    t = d
    t.ok("create", "-q", "-f", "vmdk", "real/base.vmdk", "1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "real/child.vmdk")
    t.ok("create", "-q", "-f", "add-cow", "real/a.add-cow", "1M")
    for name in ("child.vmdk", "a.add-cow"):
        link(t, name)
        r = t.drover("map", f"via/{name}")
        assert r.code == 1 and f"use the name {t.dir}/real/{name}" in r.err, r
    (t.dir / "real" / "base.vmdk").unlink()
    r = t.drover("map", "real/child.vmdk")
    assert r.code == 1 and "link" not in r.err, r
