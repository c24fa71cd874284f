# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that a packer made smaller as a whole, and files that are no images at all."""
import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import zipfile
import zlib

import pytest

from conftest import same

MIB = 1 << 20
TOOLS = {
    "gz": ["gzip", "-c"],
    "xz": ["xz", "-0c"],
    "zst": ["zstd", "-qc"],
    "bz2": ["bzip2", "-c"],
    "lzo": ["lzop", "-c"],
    "lz4": ["lz4", "-qc"],
}
NAMES = {"gz": "gzip", "xz": "xz", "zst": "zstd", "bz2": "bzip2", "lzo": "lzop", "lz4": "lz4"}
KINDS = [pytest.param(k, marks=pytest.mark.skipif(not shutil.which(TOOLS[k][0]), reason=f"no {TOOLS[k][0]}")) for k in TOOLS]


def pack(t, name, kind):
    packed = f"{name}.{kind}"
    with open(t.dir / name, "rb") as plain, open(t.dir / packed, "wb") as out:
        subprocess.run(TOOLS[kind], stdin=plain, stdout=out, check=True)
    return packed


@pytest.fixture
def disk(t):
    """The bytes of d.raw and d.qcow2, which are the same disk."""
    data = bytearray(6 * MIB + 1536)
    data[MIB:MIB + 200000] = random.Random(1).randbytes(200000)
    data[-512:] = b"e" * 512
    (t.dir / "d.raw").write_bytes(data)
    t.ok("convert", "-O", "qcow2", "d.raw", "d.qcow2")
    return bytes(data)


@pytest.mark.skipif(not shutil.which("gzip"), reason="no gzip")
def test_a_disk_on_a_packed_raw_one_is_told_what_that_is(t, disk):  # pylint: disable=unused-argument
    for name in ("d.raw", "d.qcow2"):
        pack(t, name, "gz")
    assert "Detected format of raw, compressed by gzip: unpack it first." in t.drover("create", "-f", "qcow2", "-b", "d.raw.gz", "o").err
    assert "Detected format of qcow2, compressed by gzip." in t.drover("create", "-f", "qcow2", "-b", "d.qcow2.gz", "o").err
    got = t.drover("create", "-f", "qcow2", "-F", "raw", "-b", "d.raw.gz", "o")
    assert got.code == 0 and "warning: d.raw.gz is compressed by gzip" in got.err
    got = t.drover("create", "-f", "qcow2", "-F", "qcow2", "-b", "d.qcow2.gz", "o")
    assert got.code == 0 and got.err == ""


@pytest.mark.parametrize("image", ["d.raw", "d.qcow2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_inside_a_packed_file_is_the_disk(t, disk, kind, image):
    packed = pack(t, image, kind)
    info = json.loads(t.ok("info", "--output=json", packed))
    assert (info["format"], info["virtual-size"], info["packed-by"]) == (image[2:], len(disk), NAMES[kind])
    for out in ["raw", "vmdk", "qcow2"]:
        t.ok("convert", "-O", out, packed, f"o.{out}")
        t.ok("compare", f"o.{out}", "d.raw")
    t.ok("compare", packed, "d.raw")
    assert t.ok("checksum", packed).split()[0] == t.ok("checksum", "d.raw").split()[0]
    t.ok("dd", f"if={packed}", "of=part", "bs=512", "skip=2000", "count=100")
    assert (t.dir / "part").read_bytes() == disk[2000 * 512:2100 * 512]
    t.ok("map", packed)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_be_raw_is_taken_as_it_is(t, disk, kind):
    packed = pack(t, "d.raw", kind)
    t.ok("convert", "-f", "raw", "-O", "raw", packed, "o.raw")
    plain, copy = (t.dir / packed).read_bytes(), (t.dir / "o.raw").read_bytes()
    assert copy == plain + bytes(-len(plain) % 512)


def test_the_format_inside_may_be_said(t, disk):
    t.ok("convert", "-f", "qcow2", "-O", "raw", pack(t, "d.qcow2", "gz"), "o.raw")
    assert (t.dir / "o.raw").read_bytes() == disk


def test_a_packed_image_may_be_a_parent_whose_format_is_said(t, disk):
    packed = pack(t, "d.qcow2", "gz")
    t.ok("create", "-f", "qcow2", "-b", packed, "-F", "qcow2", "c.qcow2")
    t.ok("compare", "c.qcow2", "d.raw")
    t.ok("io", "-c", "write -P 7 0 4k", "c.qcow2")
    before = (t.dir / packed).read_bytes()
    assert t.drover("compare", "c.qcow2", "d.raw").code == 1
    assert (t.dir / packed).read_bytes() == before


def test_a_packed_image_is_not_written_to(t, disk):
    packed = pack(t, "d.qcow2", "gz")
    before = (t.dir / packed).read_bytes()
    for args in [["io", "-c", "write 0 4k", packed], ["resize", packed, "+1M"]]:
        got = t.drover(*args)
        assert got.code != 0 and "compressed by gzip, so it can only be read: unpack it first" in got.err
    assert (t.dir / packed).read_bytes() == before


def test_a_target_that_is_the_packed_source_is_refused(t, disk):
    packed = pack(t, "d.raw", "gz")
    before = (t.dir / packed).read_bytes()
    assert t.drover("convert", "-O", "raw", packed, packed).code != 0
    assert (t.dir / packed).read_bytes() == before


def test_what_is_packed_twice_is_named(t, disk):
    twice = pack(t, pack(t, "d.raw", "gz"), "gz")
    got = t.drover("convert", "-O", "raw", twice, "o.raw")
    assert got.code != 0 and "compressed by gzip and then by gzip" in got.err
    assert not (t.dir / "o.raw").exists()


def test_the_temporary_file_goes_where_tmpdir_says_and_leaves_nothing(t, disk):
    packed = pack(t, "d.qcow2", "gz")
    room = t.dir / "room"
    room.mkdir()
    assert t.drover("info", packed, env={"TMPDIR": str(room)}).code == 0
    assert os.listdir(room) == []
    got = t.drover("info", packed, env={"TMPDIR": str(t.dir / "none")})
    assert got.code != 0 and "none" in got.err and "temporary" in got.err


FOREIGN = {
    "zip": (None, "a zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(1000), "a 7-Zip archive"),
    "rar": (b"Rar!\x1a\7\1\0" + bytes(1000), "a RAR archive"),
    "tar": (bytes(257) + b"ustar\00000" + bytes(1000), "a tar archive"),
    "html": (b"\n <!DOCTYPE HTML><title>404</title>", "a web page"),
    "htm": (b"\xef\xbb\xbf<html>", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error/>", "an XML document"),
    "pdf": (b"%PDF-1.7\n" + bytes(1000), "a PDF document"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "lz": (b"LZIP\1" + bytes(600), "compressed by lzip"),
    "Z": (b"\x1f\x9d\x90" + bytes(600), "compressed by compress"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_image_is_named_for_what_it_is(t, kind):
    content, name = FOREIGN[kind]
    path = t.dir / f"d.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("d.raw", bytes(1000))
    else:
        path.write_bytes(content)
    for args in [["info", path.name], ["convert", "-O", "qcow2", path.name, "o.qcow2"], ["create", "-f", "add-cow", "-b", path.name,
                                                                                       "o.add-cow"]]:
        got = t.drover(*args)
        assert got.code != 0 and name in got.err and "not a disk image" in got.err, got.err
    piped = subprocess.run([t.bin / "drover", "convert", "-O", "raw", "-", "o.raw"], cwd=t.dir, input=path.read_bytes(),
                           capture_output=True, timeout=60, check=False)
    assert piped.returncode != 0 and name.encode() in piped.stderr
    packed = gzip.compress(path.read_bytes())
    (t.dir / "p.gz").write_bytes(packed)
    got = t.drover("info", "p.gz")
    assert got.code != 0 and name in got.err
    t.ok("convert", "-f", "raw", "-O", "raw", path.name, "bytes.raw")
    assert (t.dir / "bytes.raw").read_bytes().startswith(path.read_bytes())


# ---------------------------------------------------------------- damage

PACKERS = {
    "gz": gzip.compress,
    "xz": lambda b: lzma.compress(b, preset=0),
    "bz2": bz2.compress,
    "zst": lambda b: subprocess.run(["zstd", "-qc", "--check"], input=b, stdout=subprocess.PIPE, check=True).stdout,
    "lzo": lambda b: subprocess.run(["lzop", "-c"], input=b, stdout=subprocess.PIPE, check=True).stdout,
    "lz4": lambda b: subprocess.run(["lz4", "-qc"], input=b, stdout=subprocess.PIPE, check=True).stdout,
}


def tell(t, packed, content):
    """None: refused. Else the disk that came out."""
    (t.dir / packed).write_bytes(content)
    (t.dir / "o.raw").unlink(missing_ok=True)
    got = t.drover("convert", "-O", "raw", packed, "o.raw")
    if got.code != 0:
        assert got.err.count("\n") == 1 and packed in got.err, got.err
        assert not (t.dir / "o.raw").exists()
        return None
    return (t.dir / "o.raw").read_bytes()


@pytest.mark.parametrize("inner", ["raw", "qcow2"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_gives_the_right_bytes_or_a_refusal(t, kind, inner):
    disk = random.Random(3).randbytes(700) * 2 + bytes(66000) + b"z" * 696  # whole sectors
    (t.dir / "d.raw").write_bytes(disk)
    t.ok("convert", "-O", "qcow2", "-c", "d.raw", "d.qcow2")
    whole = PACKERS[kind]((t.dir / f"d.{inner}").read_bytes())
    stride = 1 if os.environ.get("DROVER_TEST_LONG") else max(1, len(whole) // 25)
    refused = 0
    for at in range(random.Random(kind).randrange(stride), len(whole), stride):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        came = tell(t, "x." + kind, damaged)
        refused += came is None
        # damage of the magic number makes it another file: its bytes, as they are
        assert came in (None, disk) or (at < 9 and came.startswith(damaged)), at
        cut = tell(t, "x." + kind, whole[:at])
        assert cut in (None, disk) or (at < 9 and cut.startswith(whole[:at])), at
    assert refused > 0


def right_beside(told, came, disk):
    """Is every byte that is in none of these ranges what it should be?"""
    right = bytearray(disk)
    for r in told:
        right[r.start:r.stop] = came[r.start:r.stop]
    return right == came


@pytest.mark.parametrize("kind", KINDS)
def test_salvage_keeps_what_was_unpacked_and_tells_what_may_be_wrong(t, kind):
    disk = random.Random(5).randbytes(3 * MIB)
    whole = bytearray(PACKERS[kind](disk))
    whole[len(whole) // 2] ^= 0x40
    (t.dir / "x").write_bytes(whole)
    assert t.drover("convert", "-O", "raw", "x", "o.raw").code == 1
    got = t.drover("convert", "--salvage", "-O", "raw", "x", "o.raw")
    assert got.code == 3, got
    came = (t.dir / "o.raw").read_bytes()
    told = re.findall(r"(\d+)\.\.(\d+): taken, but may be wrong anywhere", got.err)
    told += re.findall(r"bytes (\d+) to (\d+) cannot be read, zeros instead", got.err)
    told = [range(int(a), int(b)) for a, b in told]
    end = re.search(r"behind the first (\d+) bytes is lost", got.err)
    kept = int(end[1]) if end else len(disk)
    assert kept >= MIB and len(came) == kept + -kept % 512
    assert right_beside(told, came[:kept], disk[:kept])


PIECE = 64 << 10


def bgzip(b):
    """Members that tell their sizes, as bgzip makes them."""
    out = bytearray()
    for at in [*range(0, len(b), 65280), None]:
        plain = b"" if at is None else b[at:at + 65280]
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        data = packer.compress(plain) + packer.flush()
        out += b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff\x06\x00BC\x02\x00" + struct.pack("<H", len(data) + 25)
        out += data + struct.pack("<II", zlib.crc32(plain), len(plain))
    return bytes(out)


IN_PIECES = {
    "bgzip": bgzip,
    "xz": lambda b: subprocess.run(["xz", "-0c", f"--block-size={PIECE}"], input=b, stdout=subprocess.PIPE, check=True).stdout,
    "zst": lambda b: b"".join(zstd_frame(b[at:at + PIECE]) for at in range(0, len(b), PIECE)),
    "lzo": PACKERS["lzo"],
}


def xz_blocks(b, size=PIECE):
    """Blocks whose headers tell sizes, in one stream."""
    return subprocess.run(["xz", "-0c", "-T2", f"--block-size={size}"], input=b, stdout=subprocess.PIPE, check=True).stdout


def zstd_frame(b):
    return subprocess.run(["zstd", "-qc", "--check", f"--stream-size={len(b)}"], input=b, stdout=subprocess.PIPE, check=True).stdout


def told_ranges(damage):
    return [range(d["start"], d["start"] + d["length"]) for d in damage if d["kind"] in ("lost", "doubtful")]


@pytest.mark.parametrize("kind", IN_PIECES)
def test_salvage_of_what_is_packed_in_pieces_loses_the_damaged_one(t, kind):
    disk = b"".join(random.Random(at).randbytes(2048) + bytes(2048) for at in range(MIB // 4096))
    whole = IN_PIECES[kind](disk)
    most = 2 * (256 << 10 if kind == "lzo" else PIECE)
    (t.dir / "x").write_bytes(whole)
    (t.dir / "d.raw").write_bytes(disk)
    t.ok("compare", "x", "d.raw")
    for at in (len(whole) // 3 + 7, len(whole) // 2 + 999):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        (t.dir / "x").write_bytes(damaged)
        got = t.drover("convert", "--salvage", "--output=json", "-O", "raw", "x", "o.raw")
        assert got.code == 3, got
        result, came = json.loads(got.out), (t.dir / "o.raw").read_bytes()
        told = told_ranges(result["damage"])
        assert not result["complete"] and all(d["filename"] == "x" for d in result["damage"])
        assert len(came) == len(disk) and told and sum(map(len, told)) <= most
        assert right_beside(told, came, disk)


def test_salvage_of_xz_blocks_needs_no_index(t):
    """The index is damaged or was cut off, and a block is damaged, too, or nothing else is."""
    disk = b"".join(random.Random(at).randbytes(2048) + bytes(2048) for at in range(MIB // 4096))
    one = xz_blocks(disk)
    spoilt = one[:-20] + bytes([one[-20] ^ 1]) + one[-19:]
    at = len(one) // 2
    hurt = spoilt[:at] + bytes([spoilt[at] ^ 1]) + spoilt[at + 1:]
    for packed, length, most in ((spoilt, MIB, 0), (hurt, MIB, PIECE), (one + hurt, 2 * MIB, PIECE), (hurt[:-2000], MIB, 2 * PIECE)):
        (t.dir / "x").write_bytes(packed)
        got = t.drover("convert", "--salvage", "--output=json", "-O", "raw", "x", "o.raw")
        assert got.code == 3, got
        damage, came = json.loads(got.out)["damage"], (t.dir / "o.raw").read_bytes()
        told = told_ranges(damage)
        assert [d["start"] for d in damage if d["kind"] == "end"] == [length] == [len(came)]
        assert sum(map(len, told)) <= most + 1024 and (told or not most)  # a sector may be in both kinds
        assert right_beside(told, came, (2 * disk)[:length])


def test_salvage_reads_on_where_a_part_does_not_tell_its_size(t):
    disk = random.Random(8).randbytes(PIECE) * 2
    (t.dir / "d.raw").write_bytes(disk)
    for kind, first in (("zst", zstd_frame), ("gz", bgzip)):
        (t.dir / "x").write_bytes(first(disk[:PIECE]) + PACKERS[kind](disk[PIECE:]))
        t.ok("convert", "--salvage", "-O", "raw", "x", "o.raw")
        t.ok("compare", "o.raw", "d.raw")


def test_salvage_says_that_nothing_was_lost(t):
    (t.dir / "d.raw").write_bytes(b"x" * 4096)
    got = t.drover("convert", "--salvage", "--output=json", "d.raw", "o.raw")
    assert got.code == 0 and json.loads(got.out) == {"filename": "o.raw", "complete": True, "damage": []}
    for args in (["d.raw", "p.raw"], ["--salvage", "--checksum", "d.raw", "p.raw"], ["--salvage", "d.raw", "-"]):
        got = t.drover("convert", "--output=json", *args)
        assert got.code == 1 and "--output=json" in got.err and not (t.dir / "p.raw").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_salvage_of_what_was_cut_off_keeps_what_is_there(t, kind):
    disk = random.Random(6).randbytes(3 * MIB)
    whole = PACKERS[kind](disk)
    (t.dir / "x").write_bytes(whole[:len(whole) * 2 // 3])
    got = t.drover("convert", "--salvage", "-O", "raw", "x", "o.raw")
    assert got.code == 3 and "cut off" in got.err, got
    came = (t.dir / "o.raw").read_bytes().rstrip(b"\0")
    assert len(came) > MIB and disk.startswith(came)


@pytest.mark.parametrize("kind", KINDS)
def test_salvage_of_a_packed_archive_tells_which_ranges_may_be_wrong(t, kind):
    disk = random.Random(7).randbytes(3 * MIB)
    (t.dir / "d.raw").write_bytes(disk)
    t.ok("vma", "create", "-q", "--no-sums", "-d", "drive-scsi0=d.raw", "a.vma")
    whole = bytearray(PACKERS[kind]((t.dir / "a.vma").read_bytes()))
    whole[len(whole) // 2] ^= 0x40
    (t.dir / "x").write_bytes(whole)
    got = t.drover("vma", "extract", "--salvage", "--json", "x", "o")
    assert got.code == 3, got
    damage = json.loads(got.out)["damage"]
    came = (t.dir / "o" / "drive-scsi0.raw").read_bytes()
    told = [range(d["offset"], d["offset"] + d["length"]) for d in damage if d.get("disk")]
    assert right_beside(told, came, disk)
    if kind in ("gz", "zst", "xz", "lz4"):  # one flipped byte of what was stored as it is
        assert "doubtful" in [d["kind"] for d in damage] and not [d for d in damage if d["kind"] == "missing"]
    text = t.drover("vma", "verify", "x")
    assert text.code == 2 and "No problems" not in text.out


EXTENT = 58 << 16  # of a disk, bytes


def joined(kind):
    """A packer that makes a member or frame of each piece."""
    return lambda b: b"".join(PACKERS[kind](b[at:at + (256 << 10)]) for at in range(0, len(b), 256 << 10))


READ_ON = {"bz2": lambda b: bz2.compress(b, 1), "gz": joined("gz"), "zst": joined("zst"), "lz4": joined("lz4"),
           "lzo": PACKERS["lzo"], "xz": lambda b: xz_blocks(b, 256 << 10)}


def salvage_six_extents(t, packer, where, stdin):
    """One byte is wrong, and two extents at most are lost."""
    n = 6
    with open(t.dir / "d.raw", "wb") as f:
        for at in range(0, n * EXTENT, 1 << 16):
            f.seek(at)
            f.write(random.Random(at).randbytes(4096) + bytes(61440))
    t.ok("vma", "create", "-q", "--no-sums", "-d", "drive-scsi0=d.raw", "a.vma")
    whole = bytearray(packer((t.dir / "a.vma").read_bytes()))
    whole[where(whole)] ^= 0x11
    (t.dir / "x").write_bytes(whole)
    command = 'cat x | "$0" vma extract --salvage --json - o' if stdin else '"$0" vma extract --salvage --json x o'
    got = t.start("sh", "-c", command, t.bin / "drover")
    assert got.code == 3, got
    damage = [d for d in json.loads(got.out)["damage"] if d.get("disk")]
    told = [range(d["offset"], d["offset"] + d["length"]) for d in damage]
    assert told and sum(d["length"] for d in damage if d["kind"] != "doubtful") <= 2 * EXTENT
    came, disk = (t.dir / "o" / "drive-scsi0.raw").read_bytes(), (t.dir / "d.raw").read_bytes()
    wrong = [at for at in range(0, len(disk), 4096) if came[at:at + 4096] != disk[at:at + 4096]]
    assert wrong and all(any(at in r for r in told) for at in wrong)


@pytest.mark.parametrize("kind, stdin", [("bz2", False), ("bz2", True), ("gz", True), ("zst", False), ("lz4", False),
                                         ("lzo", True), ("xz", True)])
def test_salvage_of_a_packed_archive_goes_on_behind_a_damaged_part(t, kind, stdin):
    salvage_six_extents(t, READ_ON[kind], lambda whole: len(whole) // 2, stdin)


HEADS = {"bgzip": (b"\x1f\x8b\x08\x04", 16), "zst": (b"\x28\xb5\x2f\xfd", 0), "lzo": (b"\0\4\0\0", 5)}


@pytest.mark.parametrize("kind", HEADS)
def test_salvage_of_a_packed_archive_goes_on_behind_a_part_whose_header_is_damaged(t, kind):
    begin, at = HEADS[kind]
    salvage_six_extents(t, IN_PIECES[kind], lambda whole: whole.index(begin, len(whole) // 2) + at, False)
