# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every operation on add-cow disks, alone and in chains with other formats."""
import json
import os

import pytest

MIB = 1 << 20


def content(t, image, *args):
    t.ok("convert", *args, "-O", "raw", image, "view.tmp")
    data = (t.dir / "view.tmp").read_bytes()
    (t.dir / "view.tmp").unlink()
    size = json.loads(t.ok("info", *(args[:2] if args else []), "--output=json", image))["virtual-size"]
    assert data[size:] == bytes(-size % 512)  # a new raw disk ends with a sector
    return data[:size]


def data_of(t, image):
    return json.loads(t.ok("info", "--output=json", image))["format-specific"]["data"]


def add(t, name, parent=None, fmt="raw", size=None):
    args = ["-b", parent, "-F", fmt] if parent else []
    t.ok("create", "-q", "-f", "add-cow", *args, name, *([size] if size else []))


def refused(t, *args, word):
    before = {n: (t.dir / n).read_bytes() for n in t.names()}
    r = t.drover(*args)
    assert r.code == 1 and r.err.startswith("drover: ") and word in r.err, r
    assert {n: (t.dir / n).read_bytes() for n in t.names()} == before
    return r.err


def chain(t):
    """add-cow over add-cow over vmdk over vmdk, and a raw disk that is alike in part."""
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "4M")
    t.io("base.vmdk", "write -P 1 0 1M", "write -P 2 3M 300k")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "mid.vmdk")
    t.io("mid.vmdk", "write -P 3 512k 100k", "write -z 3M 64k")
    add(t, "low.add-cow", "mid.vmdk", "vmdk")
    t.io("low.add-cow", "write -P 4 700k 700k", "write -P 5 1 1")
    add(t, "top.add-cow", "low.add-cow", "add-cow")
    t.io("top.add-cow", "write -P 6 1M 512", "write -z 2M 128k", "write -P 7 4194303 1", "write -P 8 100 1000")
    t.ok("create", "-q", "other.raw", "4M")
    t.io("other.raw", "write -P 1 0 512k", "write -P 9 2M 1M", fmt="raw")
    return content(t, "top.add-cow")


def test_what_the_chain_shows_is_what_was_written(t):
    want = bytearray(4 * MIB)
    def put(byte, off, length):
        want[off:off + length] = bytes([byte]) * length
    K = 1024
    for w in ((1, 0, MIB), (2, 3 * MIB, 300 * K), (3, 512 * K, 100 * K), (0, 3 * MIB, 64 * K), (4, 700 * K, 700 * K), (5, 1, 1),
              (6, MIB, 512), (0, 2 * MIB, 128 * K), (7, 4 * MIB - 1, 1), (8, 100, 1000)):
        put(*w)
    assert chain(t) == want
    listed = t.ok("chain", "top.add-cow")
    assert all(n in listed for n in ("top.add-cow", "low.add-cow", "mid.vmdk", "base.vmdk"))
    assert t.ok("chain", "check", "top.add-cow") == "4 images, no problem.\n"
    for image in ("top.add-cow", "low.add-cow"):
        assert t.drover("check", image).code == 0


def test_map_names_the_file_that_has_it(t):
    chain(t)
    extents = json.loads(t.ok("map", "--output=json", "top.add-cow"))
    assert {e["depth"] for e in extents} == {0, 1, 2, 3}
    assert all(e["offset"] == e["start"] for e in extents if e["depth"] < 2 and "offset" in e)
    human = t.ok("map", "top.add-cow")
    assert "top.raw" in human and "low.raw" in human and "base.vmdk" in human


@pytest.mark.parametrize("args", [["-b", "other.raw", "-F", "raw"], ["-b", "other.raw"], ["-b", ""], ["-b", "mid.vmdk", "-F", "vmdk"],
                                  ["-b", "base.vmdk", "-F", "vmdk"], ["-b", "other.raw", "--drop-equal"],
                                  ["-b", "mid.vmdk", "-F", "vmdk", "--drop-equal"]], ids=" ".join)
def test_rebase_keeps_the_view(t, args):
    want = chain(t)
    others = {n: (t.dir / n).read_bytes() for n in t.names() if not n.startswith("top")}
    t.ok("rebase", *args, "top.add-cow")
    assert content(t, "top.add-cow") == want
    assert {n: (t.dir / n).read_bytes() for n in t.names() if not n.startswith("top")} == others
    told = json.loads(t.ok("info", "--output=json", "top.add-cow"))
    assert told.get("backing-filename", "") == args[1]
    if args[1] == "":
        assert data_of(t, "top.add-cow")["copied-in"] == 4 * MIB
    t.ok("rebase", *args, "top.add-cow")  # again: nothing changes
    assert content(t, "top.add-cow") == want


def test_drop_equal_gives_space_back(t):
    t.ok("create", "-q", "base.raw", "8M")
    t.io("base.raw", "write -P 1 0 8M", fmt="raw")
    add(t, "disk.add-cow", "base.raw")
    t.io("disk.add-cow", "write -P 1 0 4M", "write -P 2 1M 512")
    assert data_of(t, "disk.add-cow")["copied-in"] == 4 * MIB
    t.ok("create", "-q", "new.raw", "8M")
    t.io("new.raw", "write -P 1 0 8M", fmt="raw")
    want = content(t, "disk.add-cow")
    t.ok("rebase", "-b", "new.raw", "--drop-equal", "disk.add-cow")
    assert content(t, "disk.add-cow") == want
    assert data_of(t, "disk.add-cow")["copied-in"] == 512
    assert os.stat(t.dir / "disk.raw").st_blocks * 512 <= 65536


def test_rebase_without_copying(t):
    chain(t)
    t.ok("rebase", "-u", "-b", "mid.vmdk", "-F", "vmdk", "low.add-cow")
    refused(t, "rebase", "-u", "-b", "nope", "-F", "raw", "top.add-cow", word="nope")
    refused(t, "rebase", "-u", "-b", "top.add-cow", "-F", "add-cow", "top.add-cow", word="its own")
    refused(t, "rebase", "-u", "-b", "top.add-cow", "-F", "add-cow", "low.add-cow", word="loop")
    for way in ([], ["-u"]):
        refused(t, "rebase", *way, "-b", "top.raw", "-F", "raw", "top.add-cow", word="holds its own data")
    refused(t, "rebase", "-b", "mid.vmdk", "low.add-cow", word="-F")
    t.ok("rebase", "-u", "-b", "", "top.add-cow")
    assert "backing file" not in t.ok("info", "top.add-cow")


def test_a_forced_parent_is_not_probed_either(t):
    chain(t)
    t.ok("rebase", "-u", "--force", "-b", "base.vmdk", "top.add-cow")
    assert json.loads(t.ok("info", "--output=json", "top.add-cow"))["backing-filename-format"] == "raw"


@pytest.mark.parametrize("base,want_parent", [("mid.vmdk", "mid.vmdk"), ("low.add-cow", "low.add-cow"), (None, None)])
def test_stream_keeps_the_view(t, base, want_parent):
    want = chain(t)
    t.ok("stream", *(["--base", base] if base else []), "top.add-cow")
    assert content(t, "top.add-cow") == want
    assert json.loads(t.ok("info", "--output=json", "top.add-cow")).get("backing-filename") == want_parent
    if not base:
        assert "nothing to do" in t.ok("stream", "top.add-cow")


@pytest.mark.parametrize("base", [None, "mid.vmdk", "base.vmdk"])
def test_commit_into_every_kind_of_parent(t, base):
    want = chain(t)
    if base == "base.vmdk":  # mid.vmdk is between: it is committed too
        t.ok("commit", "-b", base, "top.add-cow")
    else:
        t.ok("commit", *(["-b", base] if base else []), "top.add-cow")
    assert content(t, "top.add-cow") == want
    assert content(t, base or "low.add-cow") == want
    for image in ("base.vmdk", "mid.vmdk", "low.add-cow", "top.add-cow"):
        assert t.drover("check", image).code == 0, image
    if not base:
        assert data_of(t, "top.add-cow")["copied-in"] == 0
        assert os.stat(t.dir / "top.raw").st_blocks * 512 <= 32768  # blocks written in part are zeroed, not freed


def test_commit_into_a_raw_disk(t):
    t.ok("create", "-q", "base.raw", "4M")
    t.io("base.raw", "write -P 1 0 4M", fmt="raw")
    add(t, "disk.add-cow", "base.raw")
    t.io("disk.add-cow", "write -P 2 1000 3000", "write -z 1M 1M", "discard 3M 64k")
    want = content(t, "disk.add-cow")
    t.ok("commit", "disk.add-cow")
    assert (t.dir / "base.raw").read_bytes() == want
    assert content(t, "disk.add-cow") == want and data_of(t, "disk.add-cow")["copied-in"] == 0


@pytest.mark.parametrize("size", ["1M", "1000001"])
@pytest.mark.parametrize("fmt", ["raw", "add-cow"])
def test_commit_makes_a_shorter_parent_longer(t, fmt, size):
    t.ok("create", "-q", "deep.raw", "4M")
    t.io("deep.raw", "write -P 9 0 4M", fmt="raw")
    if fmt == "raw":
        t.ok("create", "-q", "base", size)
    else:
        add(t, "base", "deep.raw", size=size)
    t.io("base", "write -P 1 0 512k", fmt=fmt)
    add(t, "disk.add-cow", "base", fmt, size="3M")
    t.io("disk.add-cow", "write -P 2 2500k 100k")
    want = content(t, "disk.add-cow")
    t.ok("commit", "disk.add-cow")
    assert content(t, "disk.add-cow") == want
    assert content(t, "base", "-f", fmt) == want


def test_commit_is_refused_under_siblings(t):
    t.ok("create", "-q", "base.raw", "1M")
    for name in ("one.add-cow", "two.add-cow"):
        add(t, name, "base.raw")
        t.io(name, "write -P 2 0 64k")
    assert "two.add-cow" in refused(t, "commit", "one.add-cow", word="unusable")
    t.ok("commit", "-q", "--force", "one.add-cow")


def test_a_parent_with_a_content_id_gets_a_new_one(t):
    chain(t)
    t.ok("commit", "top.add-cow")
    before = json.loads(t.ok("info", "--output=json", "mid.vmdk"))["format-specific"]["data"]["cid"]
    t.ok("commit", "low.add-cow", "--force")
    assert json.loads(t.ok("info", "--output=json", "mid.vmdk"))["format-specific"]["data"]["cid"] != before


# ---------------------------------------------------------------------- convert, compare, measure

@pytest.mark.parametrize("fmt", ["raw", "vmdk", "add-cow"])
def test_convert_to_and_from(t, fmt):
    want = chain(t)
    t.ok("convert", "-O", fmt, "top.add-cow", "out")
    assert content(t, "out", "-f", fmt) == want
    t.ok("convert", "-f", fmt, "-O", "add-cow", "out", "again.add-cow")
    assert content(t, "again.add-cow") == want
    assert t.drover("compare", "top.add-cow", "again.add-cow").code == 0
    assert {"again.add-cow", "again.raw"} <= set(t.names())
    assert t.drover("check", "again.add-cow").code == 0
    holes = os.stat(t.dir / "again.raw").st_blocks * 512
    assert holes < 3 * MIB


def test_convert_over_an_old_one(t):
    want = chain(t)
    t.ok("convert", "-O", "add-cow", "other.raw", "out.add-cow")
    t.ok("convert", "-O", "add-cow", "top.add-cow", "out.add-cow")
    assert content(t, "out.add-cow") == want
    (t.dir / "mine.raw").write_text("mine")
    refused(t, "convert", "-O", "add-cow", "top.add-cow", "mine.add-cow", word="exists already")


def test_convert_into_an_existing_one(t):
    want = chain(t)
    add(t, "out.add-cow", "other.raw")
    t.ok("convert", "-n", "-O", "add-cow", "top.add-cow", "out.add-cow")
    assert content(t, "out.add-cow") == want
    add(t, "small.add-cow", size="1M")
    refused(t, "convert", "-n", "-O", "add-cow", "top.add-cow", "small.add-cow", word="holds 1048576 bytes")


@pytest.mark.parametrize("fmt", [["-F", "raw"], []])
def test_convert_with_a_parent_keeps_the_difference(t, fmt):
    want = chain(t)
    t.ok("convert", "-O", "add-cow", "-B", "other.raw", *fmt, "top.add-cow", "out.add-cow")
    assert content(t, "out.add-cow") == want
    assert 0 < data_of(t, "out.add-cow")["copied-in"] < 4 * MIB
    t.ok("convert", "-O", "add-cow", "-B", "low.add-cow", "-F", "add-cow", "top.add-cow", "thin.add-cow")
    assert content(t, "thin.add-cow") == want
    assert data_of(t, "thin.add-cow")["copied-in"] <= data_of(t, "top.add-cow")["copied-in"]


def test_convert_takes_settings(t):
    chain(t)
    t.ok("convert", "-O", "add-cow", "-o", "image_file=own.raw", "top.add-cow", "out.add-cow")
    assert data_of(t, "out.add-cow")["image-file"] == "own.raw" and "out.raw" not in t.names()


def test_convert_puts_the_raw_file_next_to_the_metadata(t):
    t.ok("create", "-q", "other.raw", "1M")
    (t.dir / "sub").mkdir()
    r = t.drover("convert", "-O", "add-cow", "-o", "image_file=sub/own.raw", "other.raw", "out.add-cow")
    assert r.code == 1 and "next to it" in r.err and ".drover." not in r.err
    assert t.names() == ["other.raw", "sub"] and os.listdir(t.dir / "sub") == []
    t.ok("convert", "-O", "add-cow", "-o", f"image_file={t.dir}/own.raw", "other.raw", "out.add-cow")
    assert data_of(t, "out.add-cow")["image-file"] == "own.raw"


def test_compare_sees_a_difference(t):
    chain(t)
    t.ok("convert", "top.add-cow", "copy.raw")
    t.io("copy.raw", "write -P 99 2500000 1", fmt="raw")
    r = t.drover("compare", "top.add-cow", "copy.raw")
    assert (r.code, r.out) == (1, "Content mismatch at offset 2500000!\n") or r.code == 1 and "mismatch at offset" in r.out


def test_measure_tells_the_length_of_both_files(t):
    for size in ("1M", "5G", "1000", "513"):
        said = json.loads(t.ok("measure", "-O", "add-cow", "--output=json", "--size", size))
        add(t, "disk.add-cow", size=size)
        made = sum(os.path.getsize(t.dir / n) for n in t.names())
        assert said["required"] == said["fully-allocated"] == made
        for n in t.names():
            (t.dir / n).unlink()


# ---------------------------------------------------------------------- resize

@pytest.mark.parametrize("size", ["4M", "4M+", "1500k", "8M", "1000001"])
def test_growing_shows_zeros(t, size):
    t.ok("create", "-q", "base.raw", "6M")
    t.io("base.raw", "write -P 9 0 6M", fmt="raw")
    add(t, "disk.add-cow", "base.raw", size="1000000")
    t.io("disk.add-cow", "write -P 1 0 64k")
    want = content(t, "disk.add-cow")
    size = size.replace("4M+", "4194305")
    t.ok("resize", "disk.add-cow", size)
    have = content(t, "disk.add-cow")
    assert have == want + bytes(len(have) - len(want)) and len(have) > len(want)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_growing_can_take_the_space(t, mode):
    add(t, "disk.add-cow", size="1M")
    t.ok("resize", f"--preallocation={mode}", "disk.add-cow", "3M")
    assert os.stat(t.dir / "disk.raw").st_blocks * 512 >= 2 * MIB
    assert content(t, "disk.add-cow") == bytes(3 * MIB)


def test_shrinking_and_growing_again_shows_zeros(t):
    t.ok("create", "-q", "base.raw", "4M")
    t.io("base.raw", "write -P 9 0 4M", fmt="raw")
    add(t, "disk.add-cow", "base.raw")
    t.io("disk.add-cow", "write -P 1 0 4M")
    refused(t, "resize", "disk.add-cow", "1M", word="--shrink")
    t.ok("resize", "--shrink", "disk.add-cow", "1000100")
    assert content(t, "disk.add-cow") == b"\x01" * 1000100
    t.ok("resize", "disk.add-cow", "4M")
    assert content(t, "disk.add-cow") == b"\x01" * 1000100 + bytes(4 * MIB - 1000100)
    assert t.drover("check", "disk.add-cow").code == 0


# ---------------------------------------------------------------------- info

def test_info_tells_how_much_is_copied_in(t):
    t.ok("create", "-q", "base.raw", "4M")
    add(t, "disk.add-cow", "base.raw")
    t.io("disk.add-cow", "write -P 1 0 1M")
    text = t.ok("info", "disk.add-cow")
    for line in ("file format: add-cow", "backing file: base.raw", "layout: v7", "image file: disk.raw", "copied in: 1048576",
                 "copied in percent: 25"):
        assert line in text, text
    told = data_of(t, "disk.add-cow")
    assert (told["copied-in"], told["copied-in-percent"]) == (MIB, 25)


def test_check_finds_bits_behind_the_end(t):
    add(t, "disk.add-cow", size="1M")
    t.io("disk.add-cow", "write -P 1 0 1M")
    os.truncate(t.dir / "disk.raw", 700000)
    r = t.drover("check", "disk.add-cow")
    assert r.code == 2 and "behind the end" in r.out + r.err, r
    assert t.drover("check", "-r", "leaks", "disk.add-cow").code == 2
    r = t.drover("check", "-r", "all", "disk.add-cow")
    assert r.code == 0 and "repaired" in r.out, r
    assert t.drover("check", "disk.add-cow").code == 0
    assert content(t, "disk.add-cow") == b"\x01" * 700000


def test_recover_removes_what_a_killed_create_left(t):
    private = t.dir / ".disk.add-cow.drover.new-abcdef"
    private.mkdir()
    (private / "disk.raw").write_bytes(bytes(MIB))
    (private / "disk.add-cow").write_bytes(bytes(2560))  # the header comes last
    out = t.ok("recover", "disk.add-cow")
    assert "removed" in out and t.names() == []


def test_recover_finishes_what_was_half_moved(t):
    add(t, "disk.add-cow", size="1M")
    t.io("disk.add-cow", "write -P 3 0 1M")
    private = t.dir / ".disk.add-cow.drover.new-abcdef"
    private.mkdir()
    os.rename(t.dir / "disk.add-cow", private / "disk.add-cow")
    out = t.ok("recover", "disk.add-cow")
    assert "finished" in out and t.names() == ["disk.add-cow", "disk.raw"]
    assert content(t, "disk.add-cow") == b"\x03" * MIB


def test_a_long_name_of_the_parent_keeps_a_long_run_of_bits(t):
    """The file is copied in steps, of which the last one is shorter."""
    t.ok("create", "-q", "base.raw", "1M")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", "-F", "raw", "disk.add-cow", "13000M")
    meta = t.dir / "disk.add-cow"
    before = meta.read_bytes()
    before = before[:8192] + b"\xff" * (len(before) - 8192)
    meta.write_bytes(before)
    t.ok("rebase", "-q", "-u", "-b", "./" * 300 + "base.raw", "-F", "raw", "disk.add-cow")
    after = meta.read_bytes()
    assert len(after) == len(before) and after[4096:] == before[4096:]
