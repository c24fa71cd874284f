# SPDX-License-Identifier: LGPL-2.1-or-later
"""amend of VMDKs: settings of the descriptor, and another kind of flat disk without a copy."""
import re

import pytest


def text(t, name):
    return (t.dir / name).read_bytes()[:20 * 512].decode(errors="replace")


def ddb(t, name):
    return dict(re.findall(r'^ddb\.(\S+) = "(.*)"$', text(t, name), re.M))


def make(t, *options, size="10G"):
    t.ok("create", "-q", "-f", "vmdk", *(["-o", ",".join(options)] if options else []), "a.vmdk", size)
    t.io("a.vmdk", "write -P 1 1M 64k")


def test_the_adapter_gets_its_geometry(t):
    make(t)
    cid = re.search("^CID=(.*)$", text(t, "a.vmdk"), re.M).group(1)
    assert ddb(t, "a.vmdk")["geometry.heads"] == "16"
    t.ok("amend", "-o", "adapter_type=LSILOGIC,hwversion=13,toolsversion=10309", "a.vmdk")
    now = ddb(t, "a.vmdk")
    assert now["adapterType"] == "lsilogic" and now["virtualHWVersion"] == "13" and now["toolsVersion"] == "10309"
    assert (now["geometry.cylinders"], now["geometry.heads"], now["geometry.sectors"]) == ("1305", "255", "63")
    assert f"CID={cid}\n" in text(t, "a.vmdk"), "no byte of the disk has changed"
    t.io("a.vmdk", "read -P 1 1M 64k")
    assert "No errors" in t.ok("check", "a.vmdk")
    t.ok("amend", "-o", "adapter_type=ide", "a.vmdk")
    assert ddb(t, "a.vmdk")["geometry.cylinders"] == "16383"


def test_entries_that_are_missing_go_to_their_places(t):
    (t.dir / "f.raw").write_bytes(bytes(1 << 20))
    (t.dir / "a.vmdk").write_text('# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n'
                                  'createType="monolithicFlat"\n\nRW 2048 FLAT "f.raw" 0\n\n#DDB\nddb.deletable = "true"\n'
                                  'ddb.uuid = "60 00"')
    t.ok("amend", "-o", "hwversion=9,adapter_type=buslogic", "a.vmdk")
    keys = [line.split()[0] for line in text(t, "a.vmdk").splitlines() if line.startswith("ddb")]
    assert keys == sorted(keys) and len(keys) == 7, keys


@pytest.mark.parametrize("old, new, line", [
    ("monolithicFlat", "vmfs", 'RW 20480 VMFS "a-flat.vmdk"'),
    ("vmfs", "monolithicFlat", 'RW 20480 FLAT "a-flat.vmdk" 0'),
    ("vmfs", "twoGbMaxExtentFlat", 'RW 20480 FLAT "a-flat.vmdk" 0'),
    ("twoGbMaxExtentFlat", "vmfs", 'RW 20480 VMFS "a-f001.vmdk"'),
])
def test_a_flat_disk_becomes_another_kind_in_its_place(t, old, new, line):
    make(t, f"subformat={old}", size="10M")
    t.ok("amend", "-o", f"subformat={new}", "a.vmdk")
    assert f'createType="{new}"\n' in text(t, "a.vmdk") and line + "\n" in text(t, "a.vmdk")
    t.io("a.vmdk", "read -P 1 1M 64k", "write -P 2 2M 64k", "read -P 2 2M 64k")
    assert "No errors" in t.ok("check", "a.vmdk")


@pytest.mark.parametrize("options, size, new, why", [
    ([], "10M", "twoGbMaxExtentSparse", "another layout"),
    ([], "10M", "monolithicFlat", "is not flat"),
    (["subformat=monolithicFlat"], "3G", "twoGbMaxExtentFlat", "more than 2047 MiB"),
    (["subformat=twoGbMaxExtentFlat"], "3G", "monolithicFlat", "several extents"),
    (["subformat=monolithicFlat"], "1M", "streamOptimized", "convert"),
])
def test_a_kind_that_needs_a_copy_is_refused(t, options, size, new, why):
    t.ok("create", "-q", "-f", "vmdk", *(["-o", ",".join(options)] if options else []), "a.vmdk", size)
    before = (t.dir / "a.vmdk").read_bytes()
    r = t.drover("amend", "-o", f"hwversion=9,subformat={new}", "a.vmdk")
    assert r.code == 1 and why in r.err and f"subformat={new}" in r.err, r
    assert (t.dir / "a.vmdk").read_bytes() == before


def test_a_disk_that_stands_on_a_device_does_not_become_one_of_files(t):
    (t.dir / "f.raw").write_bytes(bytes(1 << 20))
    (t.dir / "a.vmdk").write_text('# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n'
                                  'createType="vmfsRaw"\n\nRW 2048 VMFSRAW "f.raw" 0\n')
    before = text(t, "a.vmdk")
    r = t.drover("amend", "-o", "subformat=vmfs", "a.vmdk")
    assert r.code == 1 and "stands on a device" in r.err and text(t, "a.vmdk") == before


def test_what_cannot_be_is_refused(t):
    make(t)
    before = (t.dir / "a.vmdk").read_bytes()
    for option, why in (("adapter_type=odd", "Unknown adapter type"), ('hwversion=9"', "cannot be the value"),
                        ("zeroed_grain=on", "only supported for image creation"), ("color=red", "Invalid parameter")):
        r = t.drover("amend", "-o", option, "a.vmdk")
        assert r.code == 1 and why in r.err, r
    assert (t.dir / "a.vmdk").read_bytes() == before
    assert "adapter_type=<str>" in t.ok("amend", "-f", "vmdk", "-o", "help")
