# SPDX-License-Identifier: LGPL-2.1-or-later
"""What VMDKs that we make look like to other programs; descriptors for data that is there; locks and change tracking of
VMware's."""
import os
import re
import struct

import pytest

ALL = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs", "streamOptimized"]


def text(t, name):
    raw = (t.dir / name).read_bytes()[:22 * 512]
    return (raw[512:21 * 512] if raw[:4] == b"KDMV" else raw).split(b"\0")[0].decode()


def ddb(t, name):
    return dict(re.findall(r'^ddb\.(\S+) = "(.*)"$', text(t, name), re.M))


def make(t, *options, name="a.vmdk", size="5G"):
    t.ok("create", "-q", "-f", "vmdk", "-o", ",".join(options), name, size)


# ------------------------------------------------------------------ the rules of VMware's and VirtualBox's readers

@pytest.mark.parametrize("kind", ALL)
def test_a_descriptor_keeps_to_what_other_readers_want(t, kind):
    make(t, f"subformat={kind}", "adapter_type=lsilogic")
    lines = text(t, "a.vmdk").split("\n")
    assert lines[0] == "# Disk DescriptorFile" and lines[1] == "version=1"
    keys = [line.split("=")[0] for line in lines if re.match(r"[A-Za-z]+=", line)]
    assert keys == ["version", "CID", "parentCID", "createType"]
    order = [lines.index(mark) for mark in ("# Extent description", "# The Disk Data Base ", "#DDB")]
    assert order == sorted(order) and lines.index(f'createType="{kind}"') < order[0]
    assert re.search(r"^CID=[0-9a-f]{8}$", text(t, "a.vmdk"), re.M)
    entries = ddb(t, "a.vmdk")
    assert list(entries) == sorted(entries), "sorted, as VMware has them"
    assert entries["adapterType"] == "lsilogic"
    assert (entries["geometry.cylinders"], entries["geometry.heads"], entries["geometry.sectors"]) == ("652", "255", "63")
    assert re.fullmatch(r"60 00 C2 9[0-9a-f]( [0-9a-f]{2}){4}-[0-9a-f]{2}( [0-9a-f]{2}){7}", entries["uuid"])
    cid = re.search("^CID=(.*)$", text(t, "a.vmdk"), re.M).group(1)
    assert re.fullmatch("[0-9a-f]{24}" + cid, entries["longContentID"])
    access = "RDONLY" if kind == "streamOptimized" else "RW"
    sizes = [int(s) for s in re.findall(rf'^{access} (\d+) \w+ "a', text(t, "a.vmdk"), re.M)]
    assert sum(sizes) == 5 << 21 and (sizes[:-1] == [4192256, 4192256] if "twoGb" in kind else len(sizes) == 1)


@pytest.mark.parametrize("options, version, flags", [
    ([], 1, 3), (["zeroed_grain=on"], 2, 7), (["subformat=streamOptimized"], 3, 0x30001)])
def test_header_versions(t, options, version, flags):
    make(t, *options, "compat6=off")
    head = (t.dir / "a.vmdk").read_bytes()[:512]
    assert struct.unpack_from("<II", head, 4) == (version, flags)
    assert struct.unpack_from("<QQ", head, 28) == (1, 20), "20 sectors for the descriptor"
    assert head[73:77] == b"\n \r\n"


def test_ide_has_at_most_16383_cylinders_and_no_disk_has_none(t):
    make(t, "compat6=off", size="100G")
    assert ddb(t, "a.vmdk")["geometry.cylinders"] == "16383"
    make(t, "adapter_type=buslogic", name="b.vmdk", size="1M")
    assert ddb(t, "b.vmdk")["geometry.cylinders"] == "1"


def test_names_with_other_letters_say_their_encoding(t):
    make(t, "subformat=monolithicFlat", name="Müller.vmdk", size="1M")
    lines = text(t, "Müller.vmdk").split("\n")
    assert lines[1:3] == ["version=1", 'encoding="UTF-8"']
    t.io("Müller.vmdk", "write -P 1 0 1M", "read -P 1 0 1M")


def test_a_child_has_no_uuid_of_its_own(t):
    make(t, "compat6=off", size="1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "a.vmdk", "c.vmdk")
    assert "uuid" not in ddb(t, "c.vmdk") and "longContentID" in ddb(t, "c.vmdk")
    assert "No errors" in t.ok("check", "c.vmdk")
    t.io("c.vmdk", "write -P 1 0 64k")
    assert t.ok("check", "c.vmdk") == "No errors were found on the image.\n", "the long id goes with the CID"


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_more_than_2_tib_must_be_meant(t, kind):
    args = ["-f", "vmdk", "-o", f"subformat={kind}"]
    r = t.drover("create", *args, "a.vmdk", str((2 << 40) + 512))
    assert r.code == 1 and "2 TiB" in r.err and "--force" in r.err, r
    (t.dir / "big").write_bytes(b"")
    os.truncate(t.dir / "big", (2 << 40) + 512)
    r = t.drover("convert", "-O", "vmdk", "-o", f"subformat={kind}", "big", "b.vmdk")
    assert r.code == 1 and "--force" in r.err, r
    assert t.names() == ["big"]
    if kind == "twoGbMaxExtentSparse":  # thousands of files
        return
    t.ok("create", "-q", *args, "a.vmdk", "2T")
    t.ok("create", "-q", "--force", *args, "a.vmdk", str((2 << 40) + 512))
    assert t.ours("qemu-img", "create", "-q", *args, "q.vmdk", "3T").code == 0
    t.ok("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "f.vmdk", "3T")
    t.ok("snapshot", "-q", "-c", "a.vmdk")


# ------------------------------------------------------------------ data that is there

@pytest.mark.parametrize("kind, like, sectors", [
    ("monolithicFlat", "a-flat.vmdk", ['2048 VMFS "a-flat.vmdk"']),
    ("twoGbMaxExtentFlat", "a-f002.vmdk", ['4192256 FLAT "a-f001.vmdk" 0', '4192256 FLAT "a-f002.vmdk" 0',
                                           '2101248 FLAT "a-f003.vmdk" 0']),
    ("twoGbMaxExtentSparse", "a-s001.vmdk", ['4192256 SPARSE "a-s001.vmdk"', '4192256 SPARSE "a-s002.vmdk"',
                                             '2101248 SPARSE "a-s003.vmdk"']),
])
def test_a_lost_descriptor_is_made_anew(t, kind, like, sectors):
    size = 1 << 20 if kind == "monolithicFlat" else 5 << 30
    make(t, f"subformat={kind}", size=str(size))
    t.io("a.vmdk", "write -P 1 0 64k", f"write -P 2 {size - 65536} 64k")
    os.rename(t.dir / "a.vmdk", t.dir / "lost")
    data = [name for name in t.names() if name.startswith("a-")]
    stamps = [os.stat(t.dir / name).st_mtime_ns for name in data]
    t.ok("create", "--adopt", like)
    assert re.findall(r"^RW (.*)$", text(t, "a.vmdk"), re.M) == sectors
    t.io("a.vmdk", "read -P 1 0 64k", f"read -P 2 {size - 65536} 64k")
    assert "No errors" in t.ok("check", "a.vmdk")
    assert [os.stat(t.dir / name).st_mtime_ns for name in data] == stamps
    r = t.drover("create", "--adopt", like)
    assert r.code == 1 and "exists already" in r.err, r
    t.ok("create", "-q", "-o", "adapter_type=buslogic", "--adopt", *data, "other.vmdk")
    assert ddb(t, "other.vmdk")["adapterType"] == "buslogic"
    t.io("other.vmdk", f"read -P 2 {size - 65536} 64k")
    if len(data) > 1:
        os.rename(t.dir / data[1], t.dir / "away")
        r = t.drover("create", "--adopt", data[0], "third.vmdk")
        assert r.code == 1 and "piece 2 of 3" in r.err and not (t.dir / "third.vmdk").exists(), r


def test_numbers_of_another_width_are_of_another_disk(t):
    def lines():
        found = re.findall(r'^RW \d+ FLAT "(.*)"', text(t, "d.vmdk"), re.M)
        (t.dir / "d.vmdk").unlink()
        return found
    for name in ("x-f001", "x-f002", "x-f0001", "x-f0002", "x-f0003", "y-f0001", "y-f0002",
                 "z-f001", "z-f0001", "z-f1000", "w-f001", "w-f1000", "v-f0001", "v-f100", "v-f1000"):
        (t.dir / f"{name}.vmdk").write_bytes(bytes(65536))
    for like, want in (("x-f002", ["x-f001.vmdk", "x-f002.vmdk"]),
                       ("x-f0002", ["x-f0001.vmdk", "x-f0002.vmdk", "x-f0003.vmdk"]),
                       ("y-f0002", ["y-f0001.vmdk", "y-f0002.vmdk"])):
        t.ok("create", "-q", "--adopt", f"{like}.vmdk", "d.vmdk")
        assert lines() == want
    for args, why in ((["z-f1000.vmdk"], "two disks by the widths of their numbers"),
                      (["w-f1000.vmdk"], "piece 2 of 1000 of the disk w-f... is missing"),
                      (["v-f100.vmdk"], "piece 1 of 1000 of the disk v-f... is missing"),
                      (["x-f001.vmdk", "x-f0002.vmdk"], "is no piece of the disk")):
        r = t.drover("create", "--adopt", *args, "d.vmdk")
        assert r.code == 1 and why in r.err and not (t.dir / "d.vmdk").exists(), r


def test_a_disk_of_any_name_and_of_esxi_is_adopted(t):
    (t.dir / "disk.raw").write_bytes(bytes(1 << 20))
    t.ok("create", "-q", "--adopt", "disk.raw", "d.vmdk")
    assert 'createType="monolithicFlat"' in text(t, "d.vmdk")
    (t.dir / "e-flat.vmdk").write_bytes(bytes(1 << 20))
    t.ok("create", "-q", "--adopt", "e-flat.vmdk")
    assert 'createType="vmfs"' in text(t, "e.vmdk") and ddb(t, "e.vmdk")["adapterType"] == "lsilogic"
    t.ok("create", "-q", "-o", "subformat=monolithicFlat", "--adopt", "e-flat.vmdk", "w.vmdk")
    assert 'RW 2048 FLAT "e-flat.vmdk" 0' in text(t, "w.vmdk")


def test_what_cannot_be_adopted_is_refused(t):
    make(t, "compat6=off", size="1M")
    (t.dir / "odd-flat.vmdk").write_bytes(bytes(1000))
    (t.dir / "sub").mkdir()
    (t.dir / "sub" / "x-flat.vmdk").write_bytes(bytes(1024))
    (t.dir / "x-flat.vmdk").write_bytes(bytes(1024))
    (t.dir / "y-flat.vmdk").write_bytes(bytes(1024))
    before = t.names()
    for args, why in ((["odd-flat.vmdk"], "whole sectors"), (["none-flat.vmdk"], "No such file"),
                      (["a.vmdk", "b.vmdk"], "descriptor inside"), (["disk.raw"], "name of the descriptor"),
                      (["sub/x-flat.vmdk", "y.vmdk"], "not in the directory"),
                      (["x-flat.vmdk", "-o", "subformat=streamOptimized"], "not with streamOptimized"),
                      (["x-flat.vmdk", "-o", "subformat=twoGbMaxExtentSparse"], "not with twoGbMaxExtentSparse"),
                      (["x-flat.vmdk", "--adopt", "y-flat.vmdk", "-o", "subformat=monolithicFlat", "z.vmdk"],
                       "not with monolithicFlat"),
                      (["x-flat.vmdk", "--adopt", "x-flat.vmdk", "z.vmdk"], "is given twice"),
                      (["x-flat.vmdk", "-f", "qcow2"], "does not support --adopt")):
        r = t.drover("create", "--adopt", *args)
        assert r.code == 1 and why in r.err, (args, r)
    assert t.names() == before


# ------------------------------------------------------------------ what VMware has beside a disk

def test_a_lock_of_vmwares_warns_readers_and_refuses_writers(t):
    make(t, "compat6=off", size="1M")
    (t.dir / "a.vmdk.lck").mkdir()
    assert not t.drover("info", "a.vmdk").err, "a directory without a lock is nobody's"
    (t.dir / "a.vmdk.lck" / "M12345.lck").write_bytes(b"x")
    r = t.drover("info", "a.vmdk")
    assert r.code == 0 and r.err.count("a.vmdk.lck") == 1 and "warning" in r.err, r
    assert not t.drover("info", "-U", "a.vmdk").err
    before = (t.dir / "a.vmdk").read_bytes()
    for args in (["io", "-c", "write 0 1k"], ["resize"], ["amend", "-o", "hwversion=9"], ["check", "-r", "all"]):
        r = t.drover(*args, "a.vmdk", *(["2M"] if args == ["resize"] else []))
        assert r.code == 1 and "a.vmdk.lck" in r.err and "--locking off" in r.err, (args, r)
    t.ok("create", "-q", "-f", "vmdk", "-b", "a.vmdk", "c.vmdk")
    t.io("c.vmdk", "write -P 1 0 1k")
    r = t.drover("commit", "c.vmdk")
    assert r.code == 1 and "--locking off" in r.err, r
    t.ok("create", "-q", "-f", "raw", "other", "1M")
    for args in (["create", "-f", "vmdk", "a.vmdk", "1M"], ["convert", "-O", "vmdk", "other", "a.vmdk"],
                 ["convert", "-n", "-O", "vmdk", "other", "a.vmdk"]):
        r = t.drover(*args)
        assert r.code == 1 and "--locking off" in r.err, (args, r)
    assert (t.dir / "a.vmdk").read_bytes() == before
    t.io("a.vmdk", "write -P 2 0 1k", options=["--locking", "off"])
    t.ok("create", "-q", "--locking", "off", "-f", "vmdk", "a.vmdk", "1M")


def test_change_tracking_ends_with_a_warning_when_something_is_written(t):
    make(t, "subformat=monolithicFlat", size="1M")
    old = text(t, "a.vmdk").replace("version=1", "version=3").replace(
        "# The Disk", '# Change Tracking File\nchangeTrackPath="a-ctk.vmdk"\n\n# The Disk')
    (t.dir / "a.vmdk").write_text(old)
    assert not t.drover("io", "-c", "read 0 1k", "a.vmdk").err
    r = t.drover("io", "-c", "write -P 1 0 1k", "a.vmdk")
    assert r.code == 0 and r.err.count("a-ctk.vmdk") == 1 and "full" in r.err, r
    assert "\nchangeTrackPath" not in text(t, "a.vmdk") and "\nversion=1\n" in text(t, "a.vmdk")
    assert not t.drover("io", "-c", "write -P 1 0 1k", "a.vmdk").err
