# SPDX-License-Identifier: LGPL-2.1-or-later
"""One number for all that a disk holds, computed here a second time, from docs/formats/backup.md."""
import hashlib
import json
import os
import subprocess

import pytest

GRAIN = 65536


def make_disk(t, size=5 * GRAIN + 1536):
    """A raw disk of data, a hole, written zeros, and a last grain in part."""
    data = bytearray(size)
    data[100:200] = b"x" * 100
    data[3 * GRAIN - 512:3 * GRAIN + 700] = bytes(i % 251 for i in range(1212))
    data[-1] = 7
    (t.dir / "disk.raw").write_bytes(data)
    return bytes(data)


def grains(data):
    for off in range(0, len(data), GRAIN):
        yield data[off:off + GRAIN].ljust(GRAIN, b"\0")


def sha256_tree(data):
    table = b"".join(hashlib.sha256(g).digest() if any(g) else bytes(32) for g in grains(data))
    return hashlib.sha256(table).hexdigest()


def digest(t, *args):
    return t.ok("checksum", *args).split()[0]


def xxh128(data):
    return subprocess.run(["xxh128sum"], input=data, capture_output=True, check=True).stdout.decode().split()[0]


def test_sha256_is_the_tree_that_is_documented(t):
    data = make_disk(t)
    assert t.ok("checksum", "-a", "sha256", "-f", "raw", "disk.raw") == f"{sha256_tree(data)}  disk.raw\n"


def test_xxh3_is_what_xxh128sum_prints_of_the_table(t):
    data = make_disk(t)
    assert t.ok("checksum", "-f", "raw", "--save", "sums", "disk.raw") == \
        f"{xxh128((t.dir / 'sums').read_bytes()[4096:])}  disk.raw\n"
    table = (t.dir / "sums").read_bytes()[4096:]
    for i, g in enumerate(grains(data)):
        entry = table[16 * i:16 * i + 16]
        assert entry[::-1].hex() == (xxh128(g) if any(g) else "0" * 32)


@pytest.mark.parametrize("algorithm", ["xxh3", "sha256"])
def test_formats_chains_compression_and_holes_make_no_difference(t, algorithm):
    make_disk(t)
    want = digest(t, "-a", algorithm, "-f", "raw", "disk.raw")
    t.ok("convert", "-f", "raw", "-S", "0", "disk.raw", "full.raw")
    t.ok("convert", "-f", "raw", "-O", "vmdk", "disk.raw", "d.vmdk")
    t.ok("convert", "-f", "raw", "-c", "-O", "qcow2", "disk.raw", "d.qcow2")
    t.ok("create", "-q", "-f", "qcow2", "-b", "d.qcow2", "-F", "qcow2", "child.qcow2")
    t.io("child.qcow2", "write -P 120 100 100", "write -z 64k 64k")
    for image in (["-f", "raw", "full.raw"], ["d.vmdk"], ["d.qcow2"], ["child.qcow2"]):
        assert digest(t, "-a", algorithm, *image) == want


@pytest.mark.parametrize("algorithm", ["xxh3", "sha256"])
def test_what_differs_from_saved_ones_is_told_in_ranges(t, algorithm):
    make_disk(t)
    t.ok("checksum", "-f", "raw", "-a", algorithm, "--save", "sums", "disk.raw")
    r = t.drover("checksum", "-f", "raw", "--against", "sums", "disk.raw")
    assert r.code == 0 and r.out.endswith("Images are identical.\n")
    t.io("disk.raw", "write -P 1 0 512", "write -P 1 65535 2", "write -P 2 320k 1", fmt="raw")
    r = t.drover("checksum", "-f", "raw", "--against", "sums", "disk.raw")
    assert r.code == 1
    assert r.out.splitlines()[:-1] == ["differs: 0..131072", "differs: 327680..329216"]
    r = t.drover("checksum", "-f", "raw", "--against", "sums", "--output", "json", "disk.raw")
    assert r.code == 1
    assert json.loads(r.out) == [{
        "filename": "disk.raw", "algorithm": algorithm, "digest": digest(t, "-f", "raw", "-a", algorithm, "disk.raw"),
        "virtual-size": 329216, "identical": False,
        "differs": [{"start": 0, "length": 131072}, {"start": 327680, "length": 1536}]}]


def test_compare_takes_saved_ones(t):
    make_disk(t)
    t.ok("checksum", "-f", "raw", "--save", "sums", "disk.raw")
    t.ok("convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
    for pair in (("sums", "disk.qcow2"), ("disk.qcow2", "sums")):
        assert t.ok("compare", *pair) == "Images are identical.\n"
        assert t.drover("compare", "-s", *pair).code == 2
    assert t.drover("compare", "sums", "sums").code == 2
    assert t.drover("compare", "-f", "raw", "sums", "disk.qcow2").code == 1  # the file's own bytes
    t.io("disk.qcow2", f"write -P 7 {GRAIN + 512} 512")
    r = t.drover("compare", "sums", "disk.qcow2")
    assert (r.code, r.out) == (1, f"Content mismatch within {GRAIN}..{2 * GRAIN}!\n"), r
    t.ok("resize", "disk.qcow2", "+1M")
    assert "Image size mismatch" in t.drover("compare", "sums", "disk.qcow2").out
    with open(t.dir / "sums", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"x")
    r = t.drover("compare", "sums", "disk.qcow2")
    assert r.code == 4 and "the table has another digest" in r.err and "-f raw" in r.err, r
    assert "-F raw" in t.drover("compare", "disk.qcow2", "sums").err


def test_a_disk_that_begins_like_saved_checksums_is_a_disk(t):
    make_disk(t)
    t.ok("checksum", "-f", "raw", "--save", "sums", "disk.raw")
    saved = (t.dir / "sums").read_bytes()
    for head in (b"DRDSKSUM", saved[:40], saved[:32] + b"x" + saved[33:64]):
        (t.dir / "guest").write_bytes(head + bytes(65536 - len(head)))
        (t.dir / "same").write_bytes((t.dir / "guest").read_bytes())
        assert t.ok("compare", "guest", "same") == "Images are identical.\n"
    for rest in (bytes(65536), saved[64:-16]):  # the header is right, and nothing else
        (t.dir / "guest").write_bytes(saved[:64] + rest)
        r = t.drover("compare", "guest", "same")
        assert r.code == 4 and "length" in r.err and "-f raw" in r.err and len(r.err.splitlines()) == 1, r


def test_a_name_that_is_no_text_is_told_in_json(t):
    (t.dir / os.fsdecode(b"a\xff")).write_bytes(bytes(512))
    assert json.loads(t.ok("checksum", "-f", "raw", "--output", "json", os.fsdecode(b"a\xff")))[0]["virtual-size"] == 512


def test_a_longer_disk_is_the_same_when_its_rest_is_zeros(t):
    make_disk(t)
    t.ok("checksum", "-f", "raw", "--save", "sums", "disk.raw")
    t.ok("resize", "-f", "raw", "disk.raw", "1M")
    r = t.drover("checksum", "-f", "raw", "--against", "sums", "disk.raw")
    assert r.code == 0 and "Image size mismatch! 1048576 bytes, not 329216" in r.out
    t.io("disk.raw", "write -P 1 1000k 1", fmt="raw")
    r = t.drover("checksum", "-f", "raw", "--against", "sums", "disk.raw")
    assert r.code == 1 and "differs: 983040..1048576" in r.out


def test_several_disks_and_one_that_is_missing(t):
    make_disk(t)
    r = t.drover("checksum", "-f", "raw", "disk.raw", "nope", "disk.raw")
    assert r.code == 2 and "nope" in r.err
    assert [line.split()[1] for line in r.out.splitlines()] == ["disk.raw", "disk.raw"]


def test_saving_takes_no_other_file_s_place(t):
    make_disk(t)
    (t.dir / "mine").write_text("something else")
    r = t.drover("checksum", "-f", "raw", "--save", "mine", "disk.raw")
    assert r.code == 4 and "mine: exists already" in r.err
    assert (t.dir / "mine").read_text() == "something else"
    t.ok("checksum", "-f", "raw", "--save", "sums", "disk.raw")
    t.ok("checksum", "-f", "raw", "-a", "sha256", "--save", "sums", "disk.raw")
    t.ok("checksum", "-f", "raw", "--against", "sums", "disk.raw")


@pytest.mark.parametrize("at", [0, 8, 12, 16, 24, 32, 48, 4096, 4100])
def test_damaged_ones_are_refused(t, at):
    make_disk(t)
    t.ok("checksum", "-f", "raw", "--save", "sums", "disk.raw")
    bytes_ = bytearray((t.dir / "sums").read_bytes())
    bytes_[at] ^= 0x40
    (t.dir / "sums").write_bytes(bytes_)
    r = t.drover("checksum", "-f", "raw", "--against", "sums", "disk.raw")
    assert r.code == 4 and "sums: no checksums of a disk, or damaged" in r.err and r.out == ""


def test_a_hole_costs_nothing(t):
    t.ok("create", "-q", "-f", "qcow2", "big.qcow2", "1T")
    t.io("big.qcow2", "write -P 1 512G 64k")
    one = digest(t, "big.qcow2")
    t.ok("checksum", "--save", "sums", "big.qcow2")
    assert (t.dir / "sums").stat().st_blocks * 512 < 1 << 20
    t.io("big.qcow2", "write -P 2 600G 1")
    assert one != digest(t, "big.qcow2")


@pytest.mark.parametrize("args", [
    [], ["--save", "s", "disk.raw", "disk.raw"], ["--against", "s", "-a", "xxh3", "disk.raw"], ["-a", "md5", "disk.raw"]])
def test_what_cannot_be_meant_is_refused(t, args):
    make_disk(t)
    r = t.drover("checksum", "-f", "raw", *args)
    assert r.code in (1, 2) and r.out == "" and not (t.dir / "s").exists()


@pytest.mark.parametrize("args", [
    ["-O", "raw"], ["-O", "qcow2"], ["-O", "vmdk"], ["-O", "raw", "-S", "0"], ["-O", "qcow2", "-c"], ["-C"],
    ["-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"], ["-n"]], ids=" ".join)
def test_convert_computes_it(t, args):
    make_disk(t)
    t.ok("create", "-q", "-f", "qcow2", "base.qcow2", "329216")
    t.ok("create", "-q", "-f", "raw", "out", "1M")
    t.io("out", "write -P 9 0 329216", fmt="raw")
    value, name = t.ok("convert", "-f", "raw", "--checksum", *args, "disk.raw", "out").split()
    assert name == "out"
    fmt = args[args.index("-O") + 1] if "-O" in args else "raw"
    assert value == digest(t, "-f", fmt, "out")
    if args != ["-n"]:
        assert value == digest(t, "-f", "raw", "disk.raw")


def test_convert_computes_it_of_several_sources(t):
    make_disk(t)
    value = t.ok("convert", "-f", "raw", "--checksum", "disk.raw", "disk.raw", "out").split()[0]
    assert value == digest(t, "-f", "raw", "out")


def test_grains_that_are_data_in_part(t):
    """Every mixture of data, holes and written zeros at the edges of grains."""
    t.ok("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "d.qcow2", "1M")
    at = 0
    for n, step in enumerate([4, 60, 64, 68, 128, 12, 52, 200, 300, 100]):
        t.io("d.qcow2", f"write {'-z' if n % 3 == 1 else '-P 5'} {at}k {step // 2}k")
        at += step
    for fmt in ("raw", "qcow2"):
        assert t.ok("convert", "--checksum", "-O", fmt, "d.qcow2", "out").split()[0] == digest(t, "d.qcow2")
        t.ok("compare", "-F", fmt, "d.qcow2", "out")
