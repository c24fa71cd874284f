# SPDX-License-Identifier: LGPL-2.1-or-later
"""`drover vma create` and `verify`: checksums, comparing with live disks, what is written beside an archive, and that the
same input makes the same bytes."""
import json
import os
import random
import shutil
import subprocess

import pytest
import vmagen
from stopping import stopped
from vmarun import MIB, SANITIZED, v  # noqa: F401  pylint: disable=unused-import

CLUSTER = 65536


def disk(v, name="a.raw", size=20 * CLUSTER + 5000, seed=1, density=0.5):
    data = vmagen.random_disk(random.Random(seed), size, density)
    v.put(name, data)
    return data


def create(v, name, *args, disks=("x=a.raw",), **kw):
    return v.ok("drover", "vma", "create", "-q", name, *args, *[x for d in disks for x in ("-d", "format=raw:" + d)], **kw)


def flip(v, name, at):
    data = bytearray(v.get(name))
    data[at] ^= 4
    v.put(name, bytes(data))


def data_places(v, name):
    """Archive offset -> (disk id, guest offset of its cluster), for one stored byte of each cluster."""
    parsed = vmagen.parse(v.get(name))
    out = {}
    for at, _, slots in parsed.extents:
        pos = at + 512
        for i, cluster, mask in slots:
            if mask:
                out[pos + 99] = (i, cluster * CLUSTER)
            pos += bin(mask).count("1") * 4096
    return out


def damage(v, *args):
    r = v.run("drover", "vma", "verify", "--json", *args, raw=True)
    return r.code, [(d["kind"], d.get("disk"), d.get("offset"), d.get("length")) for d in json.loads(r.out)["damage"]]


def test_every_flipped_data_byte_is_found_and_placed(v):
    disk(v)
    disk(v, "b.raw", 3 * CLUSTER, 2)
    create(v, "a.vma", disks=("x=a.raw", "y=b.raw"))
    assert "a.vma.sums" in v.names()
    assert damage(v, "a.vma") == (0, [])
    names, sizes = {1: "x", 2: "y"}, {1: 20 * CLUSTER + 5120, 2: 3 * CLUSTER}
    for at, (i, guest) in list(data_places(v, "a.vma").items())[::3]:
        flip(v, "a.vma", at)
        code, found = damage(v, "a.vma")
        length = min(CLUSTER, sizes[i] - guest)
        assert code == 2 and found == [("checksum", names[i], guest, length)], (at, found)
        flip(v, "a.vma", at)
    at = next(iter(data_places(v, "a.vma")))
    flip(v, "a.vma", at)
    assert v.run("vma", "verify", "a.vma").code != 0  # the tool of that name looks at them too
    assert damage(v, "--no-sums", "a.vma")[0] == 0
    assert damage(v, "--headers-only", "a.vma")[0] == 0
    assert v.run("vma", "extract", "a.vma", "out").code != 0
    assert not [n for n in os.listdir(v.dir) if n == "out" and os.listdir(v.dir / "out")]


def test_checksums_from_a_pipe_and_of_a_compressed_archive(v):
    data = disk(v)
    create(v, "a.vma.zst")
    plain = vmagen.plain_bytes(v.dir / "a.vma.zst")
    v.put("b.vma", plain)
    os.rename(v.dir / "a.vma.zst.sums", v.dir / "b.vma.sums")  # of the plain data: they do for both
    assert damage(v, "b.vma") == (0, [])
    assert damage(v, "--sums", "b.vma.sums", "a.vma.zst") == (0, [])
    r = v.ok("drover", "vma", "verify", "--json", "--sums", "b.vma.sums", "-", stdin=plain)
    assert json.loads(r.out)["sums-used"] is True
    at = next(iter(data_places(v, "b.vma")))
    bad = bytearray(plain)
    bad[at] ^= 1
    r = v.run("drover", "vma", "verify", "--sums", "b.vma.sums", "-", stdin=bytes(bad))
    assert r.code == 2, r
    assert vmagen.parse(plain).content("x") == data + bytes(-len(data) % 512)


def test_checksums_of_another_archive_are_not_used(v):
    disk(v)
    create(v, "a.vma")
    disk(v, seed=9)
    create(v, "b.vma")
    os.replace(v.dir / "a.vma.sums", v.dir / "b.vma.sums")
    r = v.run("drover", "vma", "verify", "--json", "b.vma")
    assert r.code == 0 and json.loads(r.out)["sums-used"] is False, r
    assert "b.vma.sums" in r.errors
    assert v.run("drover", "vma", "verify", "--sums", "b.vma.sums", "b.vma").code != 0  # asked for by name


@pytest.mark.parametrize("change", ["cut", "empty", "magic", "table", "rubbish", "count"])
def test_damaged_checksums_do_no_harm(v, change):
    disk(v)
    create(v, "a.vma")
    data = v.get("a.vma.sums")
    v.put("a.vma.sums", {"cut": data[:100], "empty": b"", "magic": b"X" + data[1:], "table": data[:4200] + b"?" * 32 + data[4232:],
                         "rubbish": random.Random(1).randbytes(len(data)), "count": data[:12] + b"\xff" * 4 + data[16:]}[change])
    r = v.run("drover", "vma", "verify", "a.vma", memory=256 * MIB)
    assert r.errors or r.code == 2, r
    r = v.run("drover", "vma", "verify", "--no-sums", "a.vma")
    assert r.code == 0, r


def test_against_live_disks(v):
    data = disk(v)
    disk(v, "b.raw", 3 * CLUSTER, 2)
    create(v, "a.vma", "--no-sums", disks=("x=a.raw", "y=b.raw"))
    assert "a.vma.sums" not in v.names()
    assert len(data) % 512 and damage(v, "--against", "x=a.raw", "--against", "y=b.raw", "a.vma") == (0, [])
    v.put("a.raw", data + bytes(-len(data) % 512))
    assert damage(v, "--against", "x=a.raw", "--against", "y=b.raw", "a.vma") == (0, [])
    v.put("a.raw", data + b"\1" * (-len(data) % 512))
    code, found = damage(v, "--against", "x=a.raw", "a.vma")
    assert code == 2 and found[0][:2] == ("differs", "x")
    v.put("a.raw", data[:-512])
    assert "holds" in v.fails("drover", "vma", "verify", "--against", "x=a.raw", "a.vma")
    v.put("a.raw", data + bytes(-len(data) % 512))
    v.ok("drover", "convert", "-f", "raw", "-O", "vmdk", "a.raw", "a.vmdk")
    assert damage(v, "--against", "x=a.vmdk", "a.vma") == (0, [])
    v.ok("drover", "io", "-c", "write -P 0x77 200000 512", "a.vmdk")
    code, found = damage(v, "--against", "x=a.vmdk", "--against", "y=b.raw", "a.vma")
    assert code == 2 and len(found) == 1 and found[0][:2] == ("differs", "x"), found
    assert found[0][2] <= 200000 < found[0][2] + found[0][3]
    v.ok("drover", "io", "-f", "raw", "-c", "write -P 1 10k 512", "b.raw")
    assert len(damage(v, "--against", "x=a.vmdk", "--against", "y=b.raw", "a.vma")[1]) == 2
    for wrong in ("z=a.raw", "x=nope.raw", "x=b.raw", "x"):
        assert v.run("drover", "vma", "verify", "--against", wrong, "a.vma").code == 1, wrong


def test_which_disk_is_compared(v):
    one, two = b"1" * CLUSTER, b"2" * CLUSTER
    v.put("one", one)
    v.put("two", two)
    vmagen.simple({1: one}).write(v.dir / "a.vma")
    assert damage(v, "--against", "one", "a.vma") == (0, []) and damage(v, "--against", "two", "a.vma")[0] == 2
    vmagen.simple({1: one, 2: two}, names={1: "x", 2: "x"}).write(v.dir / "b.vma")
    assert "disk-ID" in v.fails("drover", "vma", "verify", "--against", "x=one", "b.vma").splitlines()[-1]
    code, found = damage(v, "--against", "disk-1=one", "--against", "disk-2=two", "b.vma")
    assert code == 2 and [f[0] for f in found] == ["header"], "the name that two have, and nothing else"


def test_zeros_of_the_archive_against_data_of_the_disk(v):
    v.put("a.raw", bytes(5 * CLUSTER))
    create(v, "a.vma", "--no-sums")
    v.put("a.raw", bytes(3 * CLUSTER + 70) + b"!" + bytes(2 * CLUSTER - 71))
    code, found = damage(v, "--against", "x=a.raw", "a.vma")
    assert code == 2 and found[0][:2] == ("differs", "x") and found[0][2] <= 3 * CLUSTER + 70 < found[0][2] + found[0][3]


# ---------------------------------------------------------------------------------------- create


def test_the_same_input_makes_the_same_bytes(v):
    a, b = disk(v, size=300 * CLUSTER, density=0.1), disk(v, "b.raw", 70 * CLUSTER, 2)
    v.put("qemu-server.conf", vmagen.CONF)
    made = []
    for jobs in (1, 2, 7, 16):
        create(v, f"{jobs}.vma", "--reproducible", "-m", jobs, "-c", "qemu-server.conf", disks=("x=a.raw", "y=b.raw"))
        made.append((v.get(f"{jobs}.vma"), v.get(f"{jobs}.vma.sums")))
    assert all(m == made[0] for m in made)
    parsed = vmagen.check(v.dir / "1.vma")
    assert parsed.ctime == 0 and parsed.content("x") == a and parsed.content("y") == b
    order = [(i, n) for _, _, slots in parsed.extents for i, n, _ in slots]
    assert order == sorted(order)
    create(v, "t.vma", "--reproducible", "--ctime", "1234567890", disks=("x=a.raw",))
    assert vmagen.check(v.dir / "t.vma").ctime == 1234567890
    for jobs in (1, 4):
        create(v, f"{jobs}.vma.zst", "--reproducible", "-m", jobs, "-c", "qemu-server.conf", disks=("x=a.raw", "y=b.raw"))
    assert v.get("1.vma.zst") == v.get("4.vma.zst")
    assert vmagen.plain_bytes(v.dir / "1.vma.zst") == made[0][0]
    v.put("qemu-server.conf", b"other")
    create(v, "other.vma", "--reproducible", "-c", "qemu-server.conf", disks=("x=a.raw", "y=b.raw"))
    assert vmagen.check(v.dir / "other.vma").uuid != parsed.uuid


def test_uuid_and_time(v):
    disk(v)
    create(v, "a.vma")
    create(v, "b.vma")
    a, b = vmagen.check(v.dir / "a.vma"), vmagen.check(v.dir / "b.vma")
    assert a.uuid != b.uuid and a.uuid[6] >> 4 == 4
    assert abs(a.ctime - os.stat(v.dir / "a.vma").st_mtime) < 60
    create(v, "c.vma", "--uuid", "00112233-4455-6677-8899-aabbccddeeff", "--ctime=-5")
    c = vmagen.check(v.dir / "c.vma")
    assert c.uuid.hex() == "00112233445566778899aabbccddeeff" and c.ctime == -5
    for wrong in (["--uuid", "x"], ["--ctime", "soon"], ["--ctime", ""], ["--compress", "lz4"], ["--compress", "zstd:99"], ["-m", "0"]):
        assert v.run("drover", "vma", "create", *wrong, "d.vma", "-d", "x=a.raw").code == 1
    assert "d.vma" not in v.names()


@pytest.mark.parametrize("jobs", [1, 2, 16])
@pytest.mark.parametrize("rnd", range(3))
def test_several_workers_make_good_archives(v, jobs, rnd):
    rng = random.Random(rnd)
    disks = {}
    for n in range(rng.randrange(1, 6)):
        size = rng.randrange(1, 4000) * 512
        disks[f"d{n}"] = disk(v, f"{n}.raw", size, rng.random(), rng.choice((0, 0.1, 0.9)))
    create(v, "a.vma", "-m", jobs, disks=[f"d{n}={n}.raw" for n in range(len(disks))])
    parsed = vmagen.check(v.dir / "a.vma")
    for name, data in disks.items():
        assert parsed.content(name) == data
    assert damage(v, "a.vma") == (0, [])


def test_to_standard_output(v):
    data = disk(v)
    for name in ("-", "/dev/stdout", "/proc/self/fd/1"):
        v.put("a.vma", v.run("drover", "vma", "create", name, "-d", "format=raw:x=a.raw", raw=True).out)
        assert vmagen.check(v.dir / "a.vma").content("x") == data + bytes(-len(data) % 512)
    out = v.run("drover", "vma", "create", "--zstd", "-", "-d", "format=raw:x=a.raw", raw=True).out
    assert subprocess.run(["zstd", "-q", "-d", "-c"], input=out, capture_output=True, check=True).stdout[:4] == b"VMA\0"
    assert v.names() == ["a.raw", "a.vma"]


def test_existing_archives(v):
    disk(v)
    create(v, "a.vma")
    before = v.get("a.vma"), v.get("a.vma.sums")
    assert v.run("drover", "vma", "create", "a.vma", "-d", "x=a.raw").code == 1
    assert (v.get("a.vma"), v.get("a.vma.sums")) == before
    new = disk(v, seed=5)
    create(v, "a.vma", "--force")
    assert vmagen.check(v.dir / "a.vma").content("x") == new + bytes(-len(new) % 512)
    assert damage(v, "a.vma") == (0, [])
    v.run("drover", "vma", "create", "--force", "a.vma", "-d", "x=nope")
    assert damage(v, "a.vma") == (0, [])


def test_two_at_once_under_one_name(v):
    disk(v, size=40 * CLUSTER)
    for force in ([], ["--force"]):
        running = [v.start("drover", "vma", "create", *force, "a.vma", "-d", "format=raw:x=a.raw") for _ in range(5)]
        codes = [p.wait(60) for p in running]
        errors = [p.communicate()[1] for p in running]
        assert all(c in (0, 1) for c in codes) and codes.count(0) >= 1 and (force or codes.count(0) == 1), (codes, errors)
        vmagen.check(v.dir / "a.vma")
        assert damage(v, "a.vma") == (0, [])
        assert set(v.names()) <= {"a.raw", "a.vma", "a.vma.sums"}, v.names()


def test_a_source_that_fails_half_way_leaves_nothing(v):
    """A vmdk whose last grain is gone: reading it is an error, not zeros."""
    disk(v, size=64 * CLUSTER, density=1)
    v.ok("drover", "convert", "-f", "raw", "-O", "vmdk", "a.raw", "a.vmdk")
    os.truncate(v.dir / "a.vmdk", os.path.getsize(v.dir / "a.vmdk") - 200000)
    r = v.run("drover", "vma", "create", "a.vma", "-d", "format=vmdk:x=a.vmdk")
    assert r.code == 1 and "a.vmdk" in r.errors
    assert v.names() == ["a.raw", "a.vmdk"]


def test_a_reader_that_goes_away(v):
    disk(v, size=200 * CLUSTER, density=1)
    p = v.start("drover", "vma", "create", "-", "-d", "format=raw:x=a.raw")
    p.stdout.read(1000)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(30) == 1 and err.startswith(b"drover: "), err


# ---------------------------------------------------------------------------------------- zstd


def test_compressed_archives(v):
    data = disk(v, size=200 * CLUSTER, density=0.2)
    create(v, "a.vma.zst")
    create(v, "b.vma", "--compress", "zstd:9")
    for name in ("a.vma.zst", "b.vma"):
        assert vmagen.check(v.dir / name).content("x") == data
        assert v.ok("vma", "verify", name)
        raw = v.get(name)
        assert raw[-4:] == b"\xb1\xea\x92\x8f", "no seek table"
        assert raw[:4] == b"\x28\xb5\x2f\xfd"
        subprocess.run(["zstd", "-q", "-t", str(v.dir / name)], check=True)
    assert len(v.get("a.vma.zst")) < len(data)


def test_a_compressed_archive_that_is_damaged(v):
    disk(v, size=100 * CLUSTER, density=1)
    create(v, "a.vma.zst", "--no-sums")
    data = v.get("a.vma.zst")
    for cut in (0, 3, 10, 100, len(data) // 2, len(data) - 1, len(data) - 9, len(data) - 100):
        v.put("cut", data[:cut])
        r = v.run("vma", "verify", "cut")
        assert r.code != 0 or cut >= len(data) - 9 and r.errors, (cut, r)
    for at in range(5, len(data) - 200, len(data) // 12):
        v.put("bad", data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:])
        assert v.run("vma", "verify", "bad", memory=1024 * MIB).code != 0, at


TOOLS = {"zst": ["zstd", "-q", "-c"], "gz": ["gzip", "-c"], "bz2": ["bzip2", "-c"], "lzo": ["lzop", "-c"]}


def packed(kind, data):
    if not shutil.which(TOOLS[kind][0]):
        pytest.skip(f"{TOOLS[kind][0]} is not installed")
    return subprocess.run(TOOLS[kind], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("kind", TOOLS)
def test_archives_in_several_compressed_pieces(v, kind):
    """As parallel compressors make them, and who appends to a file."""
    archive = vmagen.simple({1: vmagen.random_disk(random.Random(2), 9 * CLUSTER)})
    data = archive.build()
    cuts = [0, 1, 5000, 12800, 20000, len(data)]
    v.put("a", b"".join(packed(kind, data[a:b]) for a, b in zip(cuts, cuts[1:])))
    v.ok("vma", "verify", "a")
    v.ok("vma", "extract", "a", "out")
    assert v.get("out/disk-drive-scsi0.raw") == archive.contents[1]
    assert v.ok("vma", "config", "-", stdin=v.get("a")).out == vmagen.CONF
    assert json.loads(v.ok("drover", "vma", "list", "--json", "a").out)["compression"] == \
        {"zst": "zstd", "gz": "gzip", "bz2": "bzip2", "lzo": "lzop"}[kind]


@pytest.mark.parametrize("kind", TOOLS)
def test_damaged_compressed_archives(v, kind):
    rng = random.Random(3)
    good = packed(kind, vmagen.simple({1: vmagen.random_disk(rng, 12 * CLUSTER)}).build())
    cases = [good[:n] for n in (1, 2, 3, 5, 9, 12, 20, 40, 100, len(good) // 3, len(good) - 1, len(good) - 4)]
    cases += [good + b"junk", good + good[:30], good + packed(kind, b"more than an archive")]
    for n, data in enumerate(cases):
        v.put("bad", data)
        r = v.run("vma", "verify", "bad", timeout=20)
        assert r.code != 0 or n == len(cases) - 3 and r.err, (n, r)  # gzip and others take rubbish behind with a warning
        r = v.run("vma", "verify", "-", stdin=data, timeout=20)
        assert r.code != 0 or n == len(cases) - 3 and r.err, (n, r)
    for _ in range(12):
        at = rng.randrange(len(good))
        v.put("bad", good[:at] + rng.randbytes(3) + good[at + 3:])
        r = v.run("vma", "extract", "bad", "out", timeout=20, memory=1024 * MIB)
        if r.code == 0:  # a byte that does not matter: a name, a time, the same bytes
            assert vmagen.parse(vmagen.plain_bytes(v.dir / "bad")).content(1) == v.get("out/disk-drive-scsi0.raw")
        shutil.rmtree(v.dir / "out", ignore_errors=True)


@pytest.mark.parametrize("seed", range(10))
def test_a_seek_table_that_lies_gives_no_wrong_bytes(v, seed):
    rng = random.Random(seed)
    data = disk(v, size=150 * CLUSTER, density=0.3)
    create(v, "a.vma.zst", "--no-sums")
    raw = bytearray(v.get("a.vma.zst"))
    frames = int.from_bytes(raw[-9:-5], "little")
    assert frames > 2
    start = len(raw) - 9 - 8 * frames
    for _ in range(1 + seed % 3):
        at = rng.randrange(start - 8, len(raw))
        raw[at] ^= 1 << rng.randrange(8)
    v.put("a.vma.zst", bytes(raw))
    r = v.run("drover", "convert", "-O", "raw", "vma:a.vma.zst#x", "out.raw", memory=1024 * MIB, timeout=30)
    assert r.code != 0 and "a.vma.zst" in r.errors or v.get("out.raw") == data, r


@pytest.mark.parametrize("what", ["bomb", "huge-window", "table-lies"])
def test_hostile_compressed_archives(v, what):
    if what == "bomb":  # a header's worth of something, then zeros without end
        data = subprocess.run(["zstd", "-q", "-c"], input=vmagen.base().head + bytes(300 * MIB), capture_output=True, check=True).stdout
    elif what == "huge-window":
        data = subprocess.run(["zstd", "-q", "-c", "--ultra", "--long=31", "-1"], input=vmagen.base().build(), capture_output=True,
                              check=True).stdout
        data = data[:4] + bytes([data[4] & ~0x20]) + b"\xf8" + data[5:]  # not a single segment: a window descriptor
    else:
        disk(v)
        create(v, "good.zst")
        data = bytearray(v.get("good.zst"))
        at = len(data) - 9
        data[at:at + 4] = b"\xff\xff\xff\x7f"  # number of frames
        data = bytes(data)
    v.put("bad", data)
    for args in (["vma", "verify", "bad"], ["drover", "info", "vma:bad"], ["drover", "vma", "index", "bad"]):
        r = v.run(*args, memory=512 * MIB, timeout=30)
        assert r.code != 0 or what == "table-lies" and args[0] == "vma", (args, r)


@pytest.mark.parametrize("sums", ["a.vma", "./a.vma", "../work/a.vma"])
def test_checksums_do_not_take_the_place_of_the_archive(v, sums):
    data = disk(v)
    assert "a.vma" in v.fails("drover", "vma", "create", "--sums", sums, "-d", "x=a.raw", "a.vma")
    if "a.vma" in v.names():
        assert vmagen.check(v.dir / "a.vma").content("x")[:len(data)] == data
    assert not [n for n in v.names() if n.startswith(".")]


# ------------------------------------------------------------------------------- links, and others


def test_checksums_stand_beside_the_archive_that_a_link_leads_to(v):
    (v.dir / "real").mkdir()
    disk(v)
    create(v, "real/a.vma", "--reproducible")
    os.symlink("real/a.vma", v.dir / "l.vma")
    disk(v, seed=9)  # another day, the same header
    create(v, "l.vma", "--reproducible", "--force")
    assert sorted(os.listdir(v.dir / "real")) == ["a.vma", "a.vma.sums"] and "l.vma.sums" not in v.names()
    for name in "l.vma", "real/a.vma":
        r = v.run("drover", "vma", "verify", name)
        assert r.code == 0 and "no checksums" not in r.text, r
    flip(v, "real/a.vma", next(iter(data_places(v, "real/a.vma"))))
    assert damage(v, "l.vma")[0] == 2
    create(v, "l.vma", "--reproducible", "--force", "--no-sums")
    assert os.listdir(v.dir / "real") == ["a.vma"]


def test_checksums_of_whoever_was_faster_stay(v):
    data = disk(v)
    os.mkfifo(v.dir / "state")
    with v.start("drover", "vma", "create", "--vmstate", "state", "--vmstate-size", "4096", "-d", "format=raw:x=a.raw",
                 "s.vma") as slow:
        with open(v.dir / "state", "wb") as pipe:
            pipe.write(bytes(100))
            pipe.flush()
            while not any(n.startswith(".s.vma.drover-") for n in os.listdir(v.dir)):
                assert slow.poll() is None
            create(v, "s.vma")
        err = slow.communicate()[1]
    assert slow.returncode == 1 and b"was made by somebody else meanwhile" in err
    assert [n for n in v.names() if "s.vma" in n] == ["s.vma", "s.vma.sums"]
    assert damage(v, "s.vma") == (0, []) and vmagen.parse(v.get("s.vma")).content("x")[: len(data)] == data


def test_checksums_are_no_more_public_than_their_archive(v):
    disk(v)
    create(v, "a.vma")
    os.chmod(v.dir / "a.vma", 0o600)
    create(v, "a.vma", "--force")
    assert os.stat(v.dir / "a.vma").st_mode & 0o777 == 0o600
    assert os.stat(v.dir / "a.vma.sums").st_mode & 0o777 == 0o600


def test_checksums_that_came_meanwhile_are_not_replaced(v):
    disk(v)
    create(v, "other.vma")
    made = [v.bin / "drover", "vma", "create", "-q", "-d", "format=raw:x=a.raw", "--sums", "side.sums", "s.vma"]
    with stopped(v.dir, "fsync", *made, sanitized=SANITIZED) as p:
        shutil.copy(v.dir / "other.vma.sums", v.dir / "side.sums")
    assert p.returncode == 1 and "side.sums: exists by now" in p.err
    assert v.get("side.sums") == v.get("other.vma.sums")


def test_nobody_replaces_an_archive_before_its_checksums_are_there(v):
    disk(v)
    create(v, "s.vma")
    again = ["drover", "vma", "create", "-q", "--force", "-d", "format=raw:x=a.raw", "s.vma"]
    with stopped(v.dir, "renameat2", v.bin / "drover", *again[1:], sanitized=SANITIZED) as p:
        r = v.run(*again)
        assert r.code == 1 and "lock" in r.errors
    assert p.returncode == 0 and damage(v, "s.vma") == (0, [])
