# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk inside an archive is an image: vma:ARCHIVE#NAME."""
import json
import os
import random

import pytest
import vmagen
from vmarun import MIB, v  # noqa: F401  pylint: disable=unused-import

GOOD = dict(vmagen.good())
BAD = {case.name: case for case in vmagen.bad()}


def raw_of(v, image, *more):
    v.ok("drover", "convert", *more, "-O", "raw", image, "out.raw")
    return v.get("out.raw")


def padded(data):
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize("name", [n for n in GOOD if GOOD[n].contents])
def test_every_disk_of_every_good_archive(v, name):
    archive = GOOD[name]
    archive.write(v.dir / "a.vma")
    for disk, data in archive.disks.items():
        image = f"vma:a.vma#{disk}"
        assert padded(raw_of(v, image)) == padded(data)
        v.ok("drover", "compare", image, "out.raw")
        info = json.loads(v.ok("drover", "info", "--output=json", image).out)
        assert info["virtual-size"] in (len(data), len(padded(data))) and info["format"] == "vma"
    if len(archive.contents) == 1:
        assert padded(raw_of(v, "vma:a.vma")) == padded(data)
        assert padded(raw_of(v, "a.vma", "-f", "vma")) == padded(data)


def test_names(v):
    a, b = (vmagen.random_disk(random.Random(n), 3 * 65536) for n in (1, 2))
    vmagen.simple({1: a, 2: b}).write(v.dir / "two.vma")
    text = v.fails("drover", "map", "vma:two.vma")
    assert "drive-scsi0" in text and "drive-scsi1" in text  # which one?
    assert "nope" in v.fails("drover", "info", "vma:two.vma#nope")
    assert v.fails("drover", "info", "vma:nope.vma#drive-scsi0")
    os.rename(v.dir / "two.vma", v.dir / "with#hash and blank.vma")
    assert raw_of(v, "vma:with#hash and blank.vma#drive-scsi1") == b
    assert raw_of(v, f"vma:{v.dir}/with#hash and blank.vma#drive-scsi0") == a
    (v.dir / "not.vma").write_bytes(b"not an archive" * 5000)
    assert v.fails("drover", "info", "vma:not.vma#x")


def test_info_of_a_whole_archive(v):
    GOOD["two-disks"].write(v.dir / "a.vma")
    text = v.ok("drover", "info", "a.vma").text
    assert "drive-scsi0" in text and "drive-scsi1" in text
    sizes = [len(padded(data)) for data in GOOD["two-disks"].disks.values()]
    info = json.loads(v.ok("drover", "info", "--output=json", "a.vma").out)
    data = info["format-specific"]["data"]
    assert [disk["name"] for disk in data["disks"]] == ["drive-scsi0", "drive-scsi1"]
    assert info["virtual-size"] == sum(disk["size"] for disk in data["disks"]) and "disk-id" not in data
    assert info["virtual-size"] in (sum(sizes), sum(len(d) for d in GOOD["two-disks"].disks.values()))
    assert json.loads(v.ok("drover", "info", "--backing-chain", "--output=json", "a.vma").out) == [info]
    for command in (["map"], ["convert", "-O", "raw"], ["compare"], ["io", "-r", "-c", "read 0 1"]):
        more = ["out"] if command[0] in ("convert", "compare") else []
        errors = v.fails("drover", *command, "a.vma", *more)
        assert "name one of them: vma:a.vma#drive-scsi0, vma:a.vma#drive-scsi1" in errors


def test_a_parent_is_one_disk_for_info_too(v):
    GOOD["two-disks"].write(v.dir / "a.vma")
    v.ok("drover", "create", "-f", "add-cow", "-o", "backing_file=vma:a.vma#drive-scsi0", "-F", "vma", "t.add-cow")
    assert v.ok("drover", "info", "--backing-chain", "t.add-cow")
    v.ok("drover", "rebase", "-u", "--force", "-F", "vma", "-b", "a.vma", "t.add-cow")
    assert "name one of them" in v.fails("drover", "info", "--backing-chain", "t.add-cow")
    assert "backing file: a.vma" in v.ok("drover", "info", "t.add-cow").text


def test_map_tells_zeros_and_data(v):
    data = bytes(65536) + b"x" * 8192 + bytes(65536 * 3 - 8192)
    vmagen.simple({1: data}).write(v.dir / "a.vma")
    entries = json.loads(v.ok("drover", "map", "--output=json", "vma:a.vma").out)
    shape = [(e["start"], e["length"], e["zero"]) for e in entries]
    assert shape == [(0, 65536, True), (65536, 8192, False), (73728, len(data) - 73728, True)]


def test_it_is_read_only(v):
    data = GOOD["plain"].build()
    v.put("a.vma", data)
    r = v.run("drover", "io", "-c", "write -P 1 0 512", "vma:a.vma")
    assert r.code != 0 and v.get("a.vma") == data
    for args in (["rebase", "-u", "-b", "", "vma:a.vma"], ["commit", "vma:a.vma"], ["resize", "vma:a.vma", "100M"],
                 ["create", "-f", "vma", "new.vma", "1M"]):
        assert v.run("drover", *args).code != 0, args
    assert v.get("a.vma") == data and v.names() == ["a.vma"]


def test_as_the_parent_of_a_disk(v):
    """A backup in use without being unpacked."""
    archive = GOOD["two-disks"]
    data = archive.build()
    v.put("a.vma", data)
    made = v.run("drover", "create", "-q", "-f", "add-cow", "-b", "vma:a.vma#drive-scsi0", "-F", "vma", "top.add-cow")
    if made.code != 0 and ("add-cow" in made.errors and "nknown" in made.errors):
        pytest.skip("no add-cow here")
    assert made.code == 0, made
    disk = bytearray(archive.disks["drive-scsi0"])
    assert raw_of(v, "top.add-cow", "-f", "add-cow") == disk
    v.ok("drover", "io", "-f", "add-cow", "-c", "write -P 0x5a 100000 3000", "top.add-cow")
    disk[100000:103000] = b"\x5a" * 3000
    assert raw_of(v, "top.add-cow", "-f", "add-cow") == disk
    assert v.get("a.vma") == data
    assert v.ok("drover", "chain", "check", "top.add-cow").code == 0


def test_vmdk_parents_stay_vmdk(v):
    GOOD["plain"].write(v.dir / "a.vma")
    r = v.run("drover", "create", "-q", "-f", "vmdk", "-b", "vma:a.vma", "-F", "vma", "top.vmdk")
    assert r.code != 0 and "top.vmdk" not in v.names()


def test_converting_into_other_formats_and_archives(v):
    archive = GOOD["interleaved"]
    archive.write(v.dir / "a.vma")
    v.ok("drover", "convert", "-O", "vmdk", "vma:a.vma#drive-scsi1", "out.vmdk")
    v.ok("drover", "compare", "vma:a.vma#drive-scsi1", "out.vmdk")
    v.ok("drover", "vma", "create", "-q", "b.vma", "-d", "x=vma:a.vma#drive-scsi2", "-d", "y=out.vmdk")
    parsed = vmagen.check(v.dir / "b.vma")
    assert parsed.content("x") == archive.disks["drive-scsi2"] and parsed.content("y") == archive.disks["drive-scsi1"]
    v.ok("drover", "compare", "vma:a.vma#drive-scsi2", "vma:b.vma#x")
    r = v.run("drover", "compare", "vma:a.vma#drive-scsi0", "vma:b.vma#x")
    assert r.code == 1


def test_many_at_once(v):
    archive = GOOD["two-disks"]
    archive.write(v.dir / "a.vma")
    running = [v.start("drover", "convert", "-O", "raw", f"vma:a.vma#drive-scsi{n % 2}", f"{n}.raw") for n in range(6)]
    for n, p in enumerate(running):
        out, err = p.communicate(timeout=30)
        assert p.returncode == 0, (out, err)
        assert v.get(f"{n}.raw") == archive.disks[f"drive-scsi{n % 2}"]


@pytest.mark.parametrize("compressed", [False, True])
def test_random_reads_through_the_index(v, compressed):
    rng = random.Random(3)
    data = vmagen.random_disk(rng, 300 * 65536, 0.1)
    v.put("a.raw", data)
    name = "a.vma.zst" if compressed else "a.vma"
    v.ok("drover", "vma", "create", "-q", name, "-d", "format=raw:x=a.raw")
    for index in (False, True):
        if index:
            v.ok("drover", "vma", "index", name)
            assert name + ".idx" in v.names()
        reads = []
        for _ in range(40):
            at = rng.randrange(len(data) // 512) * 512
            length = min(rng.choice((512, 4096, 65536, 300000)) // 512 * 512, len(data) - at)
            at, length = at, max(512, length)
            same = data[at:at + length]
            if len(set(same)) == 1:
                reads += ["-c", f"read -P {same[0]} {at} {length}"]
        assert reads
        text = v.ok("drover", "io", "-r", *reads, f"vma:{name}#x").text
        assert "failed" not in text.lower(), text
        assert raw_of(v, f"vma:{name}#x") == data


def test_what_can_only_be_read_from_the_start(v):
    import subprocess  # pylint: disable=import-outside-toplevel
    GOOD["plain"].write(v.dir / "a.vma")
    with open(v.dir / "a.vma", "rb") as plain, open(v.dir / "a.vma.zst", "wb") as packed:  # its length is not in it
        subprocess.run(["zstd", "-q"], stdin=plain, stdout=packed, check=True)
    subprocess.run(["gzip", "-k", "a.vma"], cwd=v.dir, check=True)
    for name in ("a.vma.zst", "a.vma.gz"):
        text = v.fails("drover", "info", f"vma:{name}#drive-scsi0")
        assert name in text
        v.fails("drover", "vma", "index", name)
    assert v.names() == ["a.vma", "a.vma.gz", "a.vma.zst"]


# ---------------------------------------------------------------------------------------- the index


def test_an_index_of_another_archive_is_not_used(v):
    a, b = (vmagen.random_disk(random.Random(n), 30 * 65536) for n in (1, 2))
    vmagen.simple({1: a}, order="shuffled", seed=1).write(v.dir / "a.vma")
    vmagen.simple({1: b}, order="shuffled", seed=2).write(v.dir / "b.vma")
    v.ok("drover", "vma", "index", "a.vma")
    os.replace(v.dir / "a.vma.idx", v.dir / "b.vma.idx")
    assert raw_of(v, "vma:b.vma") == b
    v.ok("drover", "vma", "index", "b.vma")  # it is replaced
    assert raw_of(v, "vma:b.vma") == b
    vmagen.simple({1: a}, order="shuffled", seed=3).write(v.dir / "b.vma")  # the archive is
    assert raw_of(v, "vma:b.vma") == a


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_index_does_no_harm(v, seed):
    rng = random.Random(seed)
    data = vmagen.random_disk(rng, 30 * 65536)
    vmagen.simple({1: data}, order="shuffled").write(v.dir / "a.vma")
    v.ok("drover", "vma", "index", "a.vma")
    index = bytearray(v.get("a.vma.idx"))
    if seed == 0:
        index = index[:len(index) // 2]
    elif seed == 1:
        index = bytearray()
    else:
        for _ in range(seed):
            index[rng.randrange(len(index))] ^= 1 << rng.randrange(8)
    v.put("a.vma.idx", bytes(index))
    assert raw_of(v, "vma:a.vma") == data


def test_a_bad_archive_gets_no_index(v):
    for case in vmagen.bad_extents():
        if case.verified is False and case.name in ("extent-md5", "extent-cluster-missing-middle", "extent-cluster-repeated",
                                                    "extent-cut-by-1", "extent-disk-254", "junk-behind-512", "extent-cluster-far"):
            v.put("bad.vma", case.data)
            text = v.fails("drover", "vma", "index", "bad.vma")
            assert "bad.vma" in text
            assert v.fails("drover", "map", "vma:bad.vma#drive-scsi0")
            assert v.names() == ["bad.vma"], case.name


def rchar():
    """What this process has read, and those children that have ended."""
    with open("/proc/self/io", encoding="ascii") as f:
        return int(f.readline().split()[1])


def bytes_read(v, *argv):
    before = rchar()
    out, err = (p := v.start("drover", *argv)).communicate()
    assert p.returncode == 0 and b"failed" not in out, (out, err)
    return rchar() - before


def test_opening_reads_only_headers(v):
    """100 GB in a sparse file: what is opened must not depend on it."""
    vmagen.write_huge(v.dir / "huge.vma", 20 * 10**9 // 65536 * 65536, disks=2)
    for image in ("vma:huge.vma#drive-scsi0", "vma:huge.vma#drive-scsi1"):
        read = bytes_read(v, "io", "-r", "-c", "read -P 0 10G 4k", image)
        assert read < 40 * 10**9 // 3800000 * 600 + 20 * MIB, read


def test_opening_what_we_compressed_unpacks_no_data(v):
    v.put("d", random.Random(7).randbytes(64 * MIB))
    v.ok("drover", "vma", "create", "--no-sums", "-d", "d=d", "a.vma.zst")
    assert os.path.getsize(v.dir / "a.vma.zst") > 60 * MIB
    program = bytes_read(v, "--help")
    assert bytes_read(v, "map", "vma:a.vma.zst#d") < program + 65536
    assert bytes_read(v, "io", "-r", "-c", "read 30M 4k", "vma:a.vma.zst#d") < program + 65536 + 8 * MIB
    assert bytes_read(v, "compare", "vma:a.vma.zst#d", "d") > 60 * MIB


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_no_images(v, name):
    case = BAD[name]
    v.put("bad.vma", case.data)
    r = v.run("drover", "map", "vma:bad.vma#drive-scsi0", memory=256 * MIB, timeout=20)
    if case.verified is False and not name.startswith(("junk-", "zeros-", "vmstate-")):
        assert r.code == 1 and "bad.vma" in r.errors, r
    v.run("drover", "info", "bad.vma", memory=256 * MIB, timeout=20)
    assert v.names() == ["bad.vma"]
