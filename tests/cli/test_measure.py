# SPDX-License-Identifier: LGPL-2.1-or-later
"""measure: what qemu-img says for raw, and for the other formats what a new image then really takes."""
import json
import os

import pytest

from conftest import same

SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs"]


@pytest.mark.parametrize("args", [
    ["a.raw"], ["-O", "raw", "a.raw"], ["--size", "1G"], ["--size", "1000"], ["--size", "0"], ["-U", "a.raw"],
    ["--output=json", "a.raw"], ["--output", "json", "--size", "5M"], ["-o", "size=2G", "a.raw"],
    ["-o", "preallocation=full", "a.raw"], ["--image-opts", "driver=raw,file.filename=a.raw"],
    # wrong use
    [], ["a.raw", "b"], ["--size", "1G", "a.raw"], ["--size", "1T", "-f", "raw"], ["--size", "1G", "--image-opts"],
    ["--output=xx", "a.raw"], ["-f", "nope", "a.raw"], ["-O", "nope", "a.raw"], ["-o", "bla=1", "a.raw"],
    ["--size", "abc"], ["--size", "-1"], ["--size", "16E"], ["missing"],
])
def test_says_what_qemu_img_says(t, args):
    (t.dir / "a.raw").write_bytes(b"x" * 700 + bytes(300))
    os.truncate(t.dir / "a.raw", 3 << 20)
    same(t.ours("qemu-img", "measure", *args), t.real("qemu-img", "measure", *args))


def lengths(t, names):
    return sum(os.path.getsize(t.dir / n) for n in names)


def names_room(subformat, pieces):
    """How much shorter a descriptor of its own may be than with names as long as they can get."""
    return 0 if subformat == "monolithicSparse" else 260 * pieces


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_a_new_vmdk_is_as_long(t, subformat):
    said = json.loads(t.ok("measure", "--output=json", "-O", "vmdk", "-o", f"subformat={subformat}", "--size", "5G"))
    t.ok("create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", "d.vmdk", "5G")
    made = lengths(t, t.names())
    assert made <= said["required"] <= made + names_room(subformat, 3)
    assert said["fully-allocated"] == said["required"] + ((5 << 30) if "Sparse" in subformat else 0)


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_a_converted_vmdk_is_as_long(t, subformat):
    t.ok("create", "-q", "src.raw", "2100M")
    t.io("src.raw", "write -P 1 0 1", "write -P 2 65530 10", "write -P 3 2047M 4k", "write -P 4 2096M 4M", fmt="raw")
    said = json.loads(t.ok("measure", "--output=json", "-O", "vmdk", "-o", f"subformat={subformat}", "src.raw"))
    t.ok("convert", "-O", "vmdk", "-o", f"subformat={subformat}", "src.raw", "d.vmdk")
    made = lengths(t, [n for n in t.names() if n != "src.raw"])
    # every grain with data has some that is not zero: the bound is reached
    assert made <= said["required"] <= made + names_room(subformat, 2)


def test_counts_the_data_of_the_whole_chain(t):
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "64M")
    t.io("base.vmdk", "write -P 1 0 64k", "write -P 1 1M 64k")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk")
    t.io("top.vmdk", "write -P 2 1M 64k", "write -P 2 2M 100k")
    empty = json.loads(t.ok("measure", "--output=json", "-O", "vmdk", "--size", "64M"))
    full = json.loads(t.ok("measure", "--output=json", "-O", "vmdk", "top.vmdk"))
    assert full["required"] - empty["required"] == 4 * 65536
    assert full["fully-allocated"] == empty["required"] + (64 << 20)


def test_with_a_parent_it_assumes_that_the_parent_has_nothing(t):
    t.ok("create", "-q", "a.raw", "8M")
    said = json.loads(t.ok("measure", "--output=json", "-O", "vmdk", "-o", "backing_file=x.vmdk", "a.raw"))
    assert said["required"] == said["fully-allocated"] > 8 << 20


def test_refuses_what_the_format_refuses(t):
    r = t.drover("measure", "-O", "vmdk", "-o", "subformat=nope", "--size", "1G")
    assert r.code == 1 and "nope" in r.err
    t.ok("create", "-q", "a.raw", "1M")
    r = t.drover("measure", "-O", "vma", "a.raw")
    assert (r.code, r.err) == (1, "drover: Block driver 'vma' does not support size measurement\n")
    (t.dir / "a.raw").unlink()
    r = t.drover("measure", "-l", "snap", "--size", "1G")
    assert r.code == 1 and "require a filename" in r.err
    assert not t.names()
