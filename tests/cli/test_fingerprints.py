# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parent of an image was is recorded beside it, and another one is refused."""
import json
import os
import shutil

import pytest

KINDS = {"qcow2-on-raw": ("raw", "qcow2"), "qcow2": ("qcow2", "qcow2"), "vmdk": ("vmdk", "vmdk"), "add-cow": ("raw", "add-cow"),
         "add-cow-on-vmdk": ("vmdk", "add-cow")}


def pair(t, kind):
    base, top = KINDS[kind]
    t.ok("create", "-q", "-f", base, "base", "4M")
    t.io("base", "write -P 1 0 1M", fmt=base)
    t.ok("create", "-q", "--fingerprint", "-f", top, "-b", "base", "-F", base, "top")
    t.io("top", "write -P 2 512k 64k", fmt=top)
    assert (t.dir / "top.drover-parent").stat().st_size < 400
    return base, top


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_parent_opens_and_one_of_another_size_or_format_does_not(t, kind):
    base, top = pair(t, kind)
    t.ok("chain", "check", "top")
    os.rename(t.dir / "base", t.dir / "right")
    t.ok("create", "-q", "-f", base, "base", "8M")
    r = t.drover("map", "top")
    assert r.code == 1 and ("CID" in r.err if top == "vmdk" else "4194304 bytes" in r.err and "chain fingerprint top" in r.err)
    assert t.drover("chain", "check", "top").code == 2
    os.rename(t.dir / "right", t.dir / "base")
    t.ok("map", "--output=json", "top")


@pytest.mark.parametrize("kind", ["qcow2-on-raw", "qcow2", "add-cow"])
def test_a_parent_that_was_written_to_is_refused(t, kind):
    base, _ = pair(t, kind)
    t.ok("convert", "-f", base, "-O", base, "base", "copy")
    t.io("base", "write -P 9 0 64k", fmt=base)
    for verb in (["map"], ["convert", "-O", "raw"], ["resize"], ["commit"]):
        r = t.drover(*verb, "top", *{"convert": ["x"], "resize": ["5M"]}.get(verb[0], []))
        assert r.code == 1 and "some blocks were compared" in r.err and "chain fingerprint top" in r.err, r
    assert t.drover("info", "top").code == 0 and not (t.dir / "x").exists()
    t.ok("map", "--fingerprints", "off", "top")
    t.io("top", "read -P 9 0 64k", options=["--fingerprints", "off"])
    assert t.drover("map", "--fingerprints", "maybe", "top").code == 1
    r = t.drover("chain", "check", "top")
    assert r.code == 2 and "some blocks were compared" in r.out
    shutil.copy(t.dir / "copy", t.dir / "base")
    t.ok("chain", "check", "top")
    t.ok("map", "top")


def test_a_parent_that_was_written_to_behind_its_content_id_is_refused(t):
    pair(t, "vmdk")
    with open(t.dir / "base", "r+b") as f:
        f.seek(64 << 10)
        assert f.read(1) == b"\1"
        f.seek(64 << 10)
        f.write(b"\7" * 512)
    r = t.drover("map", "top")
    assert r.code == 1 and "some blocks were compared" in r.err, r
    t.ok("chain", "fingerprint", "top")
    t.ok("map", "top")


def test_a_grandparent_that_was_written_to_is_refused_for_the_image_that_recorded_it(t):
    pair(t, "qcow2")
    t.ok("create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "above")
    t.io("base", "write -P 9 1M 64k")
    r = t.drover("map", "above")
    assert r.code == 1 and "top: base does not hold" in r.err, r


def test_what_cannot_be_read_of_a_parent_is_no_other_parent(t):
    t.ok("create", "-q", "-f", "vmdk", "vm", "4M")
    t.io("vm", "write -P 1 0 4M", fmt="vmdk")
    t.ok("create", "-q", "--fingerprint", "-f", "qcow2", "-b", "vm", "-F", "vmdk", "over")
    os.truncate(t.dir / "vm", 2 << 20)  # grains are lost: that is an error of who reads them
    t.io("over", "read -P 1 0 1M")
    r = t.drover("convert", "-O", "raw", "over", "x")
    assert r.code == 1 and "end of the file" in r.err, r


def test_the_full_hash_finds_what_the_sampled_one_cannot(t):
    t.ok("create", "-q", "-f", "raw", "base", "64M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
    t.ok("chain", "fingerprint", "top")
    t.io("base", "write -P 9 2M 64k", fmt="raw")
    t.ok("map", "top")
    t.ok("chain", "check", "top")
    t.ok("chain", "fingerprint", "--full-hash", "top")
    t.ok("chain", "check", "top")
    t.io("base", "write -P 8 2M 64k", fmt="raw")
    t.ok("map", "top")
    r = t.drover("chain", "check", "top")
    assert r.code == 2 and "all was compared" in r.out
    t.ok("chain", "fingerprint", "--remove", "top")
    t.ok("chain", "check", "top")
    assert not (t.dir / "top.drover-parent").exists()


def test_rebase_without_copying_refuses_another_disk_but_not_a_copy(t):
    pair(t, "qcow2")
    t.ok("convert", "-f", "qcow2", "-O", "qcow2", "base", "copy")
    t.ok("convert", "-f", "qcow2", "-O", "qcow2", "base", "other")
    t.io("other", "write -P 9 0 64k")
    before = (t.dir / "top").read_bytes()
    r = t.drover("rebase", "-u", "-b", "other", "-F", "qcow2", "top")
    assert r.code == 1 and "would show something else" in r.err and "--force" in r.err
    assert (t.dir / "top").read_bytes() == before
    t.ok("rebase", "-u", "-b", "copy", "-F", "qcow2", "top")
    os.remove(t.dir / "base")
    t.ok("chain", "check", "top")
    t.ok("rebase", "-u", "--force", "-b", "other", "-F", "qcow2", "top")
    t.ok("chain", "check", "top")  # and records that one


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "add-cow"])
def test_operations_on_the_chain_keep_the_record_true(t, kind):
    base, top = pair(t, kind)
    record = t.dir / "top.drover-parent"
    t.ok("create", "-q", "-f", base, "new", "6M")
    first = record.read_bytes()
    t.ok("rebase", "-b", "new", "-F", base, "top")
    assert record.read_bytes() != first
    assert t.drover("chain", "check", "top").code in (0, 3)
    t.io("top", "write -P 5 1M 64k", fmt=top)
    t.ok("commit", "-f", top, "top")
    assert t.drover("chain", "check", "top").code in (0, 3)
    t.ok("rebase", "-b", "", "top")
    assert not record.exists()


def test_a_commit_renews_what_stands_above(t):
    t.ok("create", "-q", "-f", "qcow2", "base", "4M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid", "8M")
    t.io("mid", "write -P 3 5M 64k")
    t.ok("create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top")
    for name in ("mid", "top"):
        t.ok("chain", "fingerprint", name)
    t.ok("snapshot", "--down", "-d", "mid", "top")
    assert t.ok("chain", "check", "top") == "2 images, no problem.\n"
    assert not (t.dir / "mid.drover-parent").exists() and b"size 8388608" in (t.dir / "top.drover-parent").read_bytes()


def test_a_commit_of_several_renews_each_that_stays(t):
    t.ok("create", "-q", "-f", "qcow2", "base", "4M")
    for below, name in (("base", "low"), ("low", "mid"), ("mid", "top")):
        t.ok("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name)
    t.io("low", "write -P 1 0 64k")
    for name in ("low", "mid", "top"):
        t.ok("chain", "fingerprint", name)
    t.io("top", "write -P 3 1M 64k")
    t.ok("commit", "-b", "base", "top")
    for name in ("low", "mid", "top"):
        t.ok("map", name)
        t.io(name, "read -P 3 1M 64k")
        assert (t.dir / f"{name}.drover-parent").exists()


def test_what_another_program_recorded_since_is_not_judged_by_it(t):
    pair(t, "qcow2")
    t.ok("create", "-q", "-f", "qcow2", "new", "8M")
    r = t.real("qemu-img", "rebase", "-u", "-b", "new", "-F", "qcow2", "top")
    assert r.code == 0
    t.ok("map", "--output=json", "top")
    assert t.real("qemu-img", "check", "top").code == 0


def test_a_new_image_does_not_inherit_the_record(t):
    pair(t, "qcow2")
    t.ok("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    assert not (t.dir / "top.drover-parent").exists()


def test_a_damaged_record_is_told_with_the_way_out(t):
    pair(t, "qcow2")
    good = (t.dir / "top.drover-parent").read_bytes()
    for bad in (b"", good[:-3], good.replace(b"size 4", b"size 5"), b"\0" * 5000, good + b"x" * 100000):
        (t.dir / "top.drover-parent").write_bytes(bad)
        r = t.drover("map", "top")
        assert (r.code == 1 and "chain fingerprint top" in r.err) or bad.startswith(good), (bad[:80], r)
    t.ok("chain", "fingerprint", "top")
    t.ok("map", "--output=json", "top")


def test_a_snapshot_with_a_fingerprint(t):
    t.ok("create", "-q", "-f", "vmdk", "disk.vmdk", "4M")
    t.ok("snapshot", "-q", "-c", "--fingerprint", "disk.vmdk")
    assert (t.dir / "disk-000001.vmdk.drover-parent").exists()
    assert len(json.loads(t.ok("chain", "--output=json", "disk-000001.vmdk"))) == 2
    assert t.ok("chain", "check", ".") == "2 images, no problem.\n"


def test_the_record_stands_beside_the_image_whatever_link_leads_to_it(t):
    pair(t, "qcow2")
    (t.dir / "links").mkdir()
    for link in ("links/a", "b"):
        os.symlink(t.dir / "top", t.dir / link)
    os.rename(t.dir / "base", t.dir / "right")
    t.ok("create", "-q", "-f", "qcow2", "base", "8M")
    assert "chain fingerprint b" in t.drover("map", "b").err
    os.rename(t.dir / "right", t.dir / "base")
    t.ok("chain", "fingerprint", "--remove", "b")
    assert not (t.dir / "top.drover-parent").exists()
    t.ok("chain", "fingerprint", "b")
    assert [n for n in t.names() if "parent" in n] == ["top.drover-parent"]


def test_the_recorded_parent_counts_whatever_other_one_the_name_gives_the_image(t):
    pair(t, "qcow2")
    good = (t.dir / "top.drover-parent").read_bytes()
    t.ok("create", "-q", "-f", "qcow2", "other", "4M")
    t.ok("io", "-c", "write -P 9 0 4M", "other")
    name = {"driver": "qcow2", "file.filename": "top", "backing.driver": "qcow2", "backing.file.filename": "other"}
    t.ok("chain", "fingerprint", "json:" + json.dumps(name))
    assert (t.dir / "top.drover-parent").read_bytes() == good


def test_an_image_without_a_parent_has_nothing_to_record(t):
    t.ok("create", "-q", "-f", "qcow2", "disk", "1M")
    assert "has no parent" in t.drover("chain", "fingerprint", "disk").err
