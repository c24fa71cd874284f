# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots, trees, rebase, stream, commit and recover as a person uses them."""
import json
import os
import re

import pytest


def family(t):
    """base <- mid <- top, each with data of its own; what top shows is in flat.raw."""
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "8M")
    t.io("base.vmdk", "write -P 1 0 4M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "mid.vmdk")
    t.io("mid.vmdk", "write -P 2 2M 4M", "write -z 1M 64k")
    t.ok("create", "-q", "-f", "vmdk", "-b", "mid.vmdk", "-F", "vmdk", "top.vmdk")
    t.io("top.vmdk", "write -P 3 3M 64k")
    t.ok("convert", "top.vmdk", "flat.raw")


def parent(t, name):
    return json.loads(t.ok("info", "--output=json", name)).get("backing-filename")


def unchanged(t, name="top.vmdk"):
    assert t.ok("compare", "-F", "raw", name, "flat.raw") == "Images are identical.\n"
    r = t.real("qemu-img", "compare", "-F", "raw", name, "flat.raw")
    assert r.out == "Images are identical.\n", r


def test_a_snapshot_prints_the_new_active_disk_and_freezes_the_old(t):
    family(t)
    assert t.ok("snapshot", "-c", "top.vmdk") == "top-000001.vmdk\n"
    assert t.ok("snapshot", "-c", "top-000001.vmdk") == "top-000002.vmdk\n"
    assert t.ok("snapshot", "-c", "named.vmdk", "top.vmdk") == "named.vmdk\n"
    assert t.ok("snapshot", "-q", "-c", "top.vmdk") == ""
    before = (t.dir / "top.vmdk").read_bytes()
    t.io("top-000002.vmdk", "write -P 9 0 64k", "read -P 3 3M 64k")
    assert (t.dir / "top.vmdk").read_bytes() == before
    assert parent(t, "top-000002.vmdk") == "top-000001.vmdk"
    unchanged(t)
    unchanged(t, "top-000001.vmdk")


def test_the_tree_shows_the_family_and_marks_the_asked_one(t):
    family(t)
    t.ok("snapshot", "-q", "-c", "other.vmdk", "mid.vmdk")
    lines = t.ok("snapshot", "-l", "mid.vmdk", env={"LC_ALL": "C.UTF-8"}).splitlines()
    assert re.match(r"NAME +FORMAT +VIRTUAL SIZE +DISK SIZE  NOTE$", lines[0])
    text = "\n".join(lines)
    assert "└── mid.vmdk" in text and "    └── top.vmdk" in text and "    ├── other.vmdk" in text
    assert [line for line in lines if line.endswith(" *")] == [lines[2]]
    assert sum(line.endswith("active") for line in lines) == 2
    for out in (t.ok("snapshot", "-l", "mid.vmdk"), t.ok("chain", "tree", "--ascii", "mid.vmdk")):
        assert "`-- mid.vmdk" in out and "    |-- other.vmdk" in out and out.isascii()


def test_the_tree_as_json(t):
    family(t)
    nodes = json.loads(t.ok("snapshot", "-l", "--output=json", "top.vmdk"))
    assert [(n["filename"], n.get("parent"), n["asked"]) for n in nodes] == [
        ("base.vmdk", None, False), ("mid.vmdk", "base.vmdk", False), ("top.vmdk", "mid.vmdk", True)]
    assert all(n["virtual-size"] == 8 << 20 and n["format"] == "vmdk" for n in nodes)
    more = ("allocated-bytes", "exclusive-bytes", "content-id", "parent-content-id")
    tree = json.loads(t.ok("chain", "tree", "--output=json", "top.vmdk"))
    assert [{k: v for k, v in n.items() if k not in more} for n in tree] == nodes


def test_the_chain_from_the_disk_down(t):
    family(t)
    for args in (["chain", "top.vmdk"], ["chain", "show", "top.vmdk"]):
        lines = t.ok(*args).splitlines()[1:]
        assert [line.split()[0] for line in lines] == ["top.vmdk", "mid.vmdk", "base.vmdk"]
    names = [n["filename"] for n in json.loads(t.ok("chain", "--output=json", "top.vmdk"))]
    assert names == ["top.vmdk", "mid.vmdk", "base.vmdk"]
    assert t.ok("chain", "check", "top.vmdk") == "3 images, no problem.\n"


def test_a_broken_chain_is_shown_with_the_trouble_where_it_is(t):
    family(t)
    t.io("base.vmdk", "write -P 7 7M 64k")
    r = t.drover("chain", "check", "top.vmdk")
    assert r.code == 2 and r.out.startswith("mid.vmdk: ") and r.out.count("\n") == 1 and "CID" in r.out
    lines = t.ok("chain", "top.vmdk").splitlines()
    assert lines[2].startswith("mid.vmdk") and lines[2].endswith("does not open") and not lines[1].endswith("open")
    out = t.ok("snapshot", "-l", "top.vmdk")
    assert re.search(r"mid.vmdk .*does not open\n", out) and re.search(r"top.vmdk .*\* parent does not open\n", out)
    os.remove(t.dir / "base.vmdk")
    assert t.drover("chain", "check", "top.vmdk").code == 2
    assert t.drover("chain", "top.vmdk").code == 0


def test_trouble_with_names_that_are_no_utf_8_is_told(t):
    (t.dir / "bad.vmdk").write_bytes(b'# Disk DescriptorFile\nversion=1\nCID=12345678\nRW 1 FLAT "f\xff" 0\n')
    for args in (["show"], ["show", "--output=json"]):
        r = t.drover("chain", *args, "bad.vmdk")
        assert r.code == 1 and "cannot open its extent" in r.out
    assert "cannot open its extent" in t.ok("snapshot", "-l", "--output=json", "bad.vmdk")


def test_what_is_no_disk_has_no_chain(t):
    (t.dir / "bad.vmdk").write_bytes(b"KDMV" + bytes(508))
    for args in (["bad.vmdk"], ["show", "bad.vmdk"], ["show", "--output=json", "bad.vmdk"]):
        r = t.drover("chain", *args)
        assert r.code == 1 and "bad.vmdk" in r.out
    assert t.drover("chain", "check", "bad.vmdk").code == 2


@pytest.mark.parametrize("target", ["base.vmdk", "other.vmdk", "short.vmdk", ""])
def test_rebase_changes_the_parent_and_nothing_else(t, target):
    family(t)
    t.ok("create", "-q", "-f", "vmdk", "other.vmdk", "8M")
    t.io("other.vmdk", "write -P 8 0 8M")
    t.ok("create", "-q", "-f", "vmdk", "short.vmdk", "2M")
    t.io("short.vmdk", "write -P 8 0 2M")
    fmt = ["-F", "vmdk"] if target else []
    size = (t.dir / "top.vmdk").stat().st_size
    assert "would work" in t.ok("rebase", "--dry-run", "-b", target, *fmt, "top.vmdk")
    assert parent(t, "top.vmdk") == "mid.vmdk" and (t.dir / "top.vmdk").stat().st_size == size
    assert t.ok("rebase", "-b", target, *fmt, "top.vmdk") == ""
    assert parent(t, "top.vmdk") == (target or None)
    unchanged(t)


def test_drop_equal_gives_up_what_the_new_parent_has(t):
    family(t)
    t.ok("convert", "-O", "vmdk", "top.vmdk", "new.vmdk")
    t.io("top.vmdk", "write -P 3 3M 64k", "write -P 2 4M 1M")
    t.ok("rebase", "--drop-equal", "-b", "new.vmdk", "-F", "vmdk", "top.vmdk")
    unchanged(t)
    assert "not allocated at offset 0 bytes" in t.io("top.vmdk", "map")
    assert t.io("top.vmdk", "map").count("\n") == 1


def test_unsafe_rebase_only_rewrites_the_name(t):
    family(t)
    t.ok("convert", "-O", "raw", "mid.vmdk", "copy.raw")
    t.ok("convert", "-O", "vmdk", "mid.vmdk", "copy.vmdk")
    size = (t.dir / "top.vmdk").stat().st_size
    t.ok("rebase", "-u", "-b", "copy.vmdk", "-F", "vmdk", "top.vmdk")
    assert (t.dir / "top.vmdk").stat().st_size == size and parent(t, "top.vmdk") == "copy.vmdk"
    unchanged(t)


@pytest.mark.parametrize("args", [["-u"], []])
def test_a_rebase_says_when_the_sizes_differ(t, args):
    family(t)
    t.ok("create", "-q", "-f", "vmdk", "big.vmdk", "12M")
    for name, words in (("big.vmdk", ["8388608", "big.vmdk 12582912"]), ("base.vmdk", [])):
        r = t.drover("rebase", *args, "-b", name, "-F", "vmdk", "top.vmdk")
        assert r.code == 0 and all(w in r.err for w in words) and bool(words) == bool(r.err), r


def test_stream_pulls_the_parents_in(t):
    family(t)
    t.ok("stream", "--base", "base.vmdk", "top.vmdk")
    assert parent(t, "top.vmdk") == "base.vmdk"
    unchanged(t)
    t.ok("stream", "top.vmdk")
    assert parent(t, "top.vmdk") is None
    unchanged(t)


def test_commit_into_the_parent_keeps_the_chain_open(t):
    family(t)
    assert t.ok("commit", "top.vmdk") == "Image committed.\n"
    unchanged(t)
    unchanged(t, "mid.vmdk")
    assert "not allocated at offset 0 bytes" in t.io("top.vmdk", "map").splitlines()[0]


def test_commit_into_the_base_and_keep(t):
    family(t)
    assert t.ok("commit", "-q", "-b", "base.vmdk", "top.vmdk") == ""
    unchanged(t, "base.vmdk")
    unchanged(t)


def test_commit_that_would_break_a_sibling_lists_it_and_refuses(t):
    family(t)
    t.ok("snapshot", "-q", "-c", "sibling.vmdk", "mid.vmdk")
    before = (t.dir / "mid.vmdk").read_bytes()
    r = t.drover("commit", "top.vmdk")
    assert r.code == 1 and "sibling.vmdk" in r.err and (t.dir / "mid.vmdk").read_bytes() == before
    t.ok("commit", "--force", "top.vmdk")
    unchanged(t)
    assert t.drover("chain", "check", "sibling.vmdk").code == 2


def test_recover_has_nothing_to_do_on_a_sound_disk(t):
    family(t)
    assert "Nothing was interrupted" in t.ok("recover", "top.vmdk")
    assert "Nothing was interrupted" in t.ok("recover", "--dry-run", "top.vmdk")
    assert t.ok("recover", "-q", "top.vmdk") == ""


def test_recover_finishes_what_a_killed_writer_left(t):
    family(t)
    r = t.drover("io", "-c", "write -P 5 0 1M", "-c", "sigraise 9", "top.vmdk")
    assert r.code == -9
    said = t.ok("recover", "--dry-run", "top.vmdk")
    assert "nothing was changed" in said
    assert t.ok("recover", "top.vmdk").endswith("settled.\n")
    assert "Nothing was interrupted" in t.ok("recover", "top.vmdk")
    assert t.drover("check", "top.vmdk").code in (0, 3)  # a grain whose table was not written yet is only space
    assert t.drover("check", "-r", "leaks", "top.vmdk").code in (0, 3)
    t.ok("chain", "check", "top.vmdk")


def test_convert_to_a_child_holds_only_the_difference(t):
    family(t)
    t.ok("convert", "-O", "vmdk", "-B", "base.vmdk", "-F", "vmdk", "top.vmdk", "child.vmdk")
    unchanged(t, "child.vmdk")
    assert parent(t, "child.vmdk") == "base.vmdk"
    assert "not allocated at offset 0 bytes" in t.io("child.vmdk", "map").splitlines()[0]


def test_convert_over_an_existing_target(t):
    family(t)
    t.ok("create", "-q", "out.raw", "8M")
    t.io("out.raw", "write -P 9 0 8M", fmt="raw")
    inode = (t.dir / "out.raw").stat().st_ino
    t.ok("convert", "-n", "-O", "raw", "top.vmdk", "out.raw")
    assert (t.dir / "out.raw").stat().st_ino == inode
    assert (t.dir / "out.raw").read_bytes() == (t.dir / "flat.raw").read_bytes()


def test_a_replaced_target_keeps_its_mode(t):
    family(t)
    (t.dir / "out.raw").write_bytes(b"old")
    os.chmod(t.dir / "out.raw", 0o640)
    t.ok("convert", "top.vmdk", "out.raw")
    assert (t.dir / "out.raw").stat().st_mode & 0o777 == 0o640
    assert (t.dir / "out.raw").read_bytes() == (t.dir / "flat.raw").read_bytes()


def test_every_byte_is_written_when_asked(t):
    t.ok("create", "-q", "zero.raw", "4M")
    t.ok("convert", "-f", "raw", "-S", "0", "zero.raw", "full.raw")
    t.ok("convert", "-f", "raw", "zero.raw", "sparse.raw")
    assert (t.dir / "full.raw").stat().st_blocks * 512 >= 4 << 20
    assert (t.dir / "sparse.raw").stat().st_blocks * 512 <= 64 << 10
