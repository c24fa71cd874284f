# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disks of a machine in an OVA, or beside an OVF descriptor, are images: ova:ARCHIVE#NAME."""
import hashlib
import json
import os
import shutil
import subprocess
import tarfile

import ovagen
import pytest

LONG = "disk " + "x" * 150 + "ü.vmdk"


class Ova:
    def __init__(self, tools):
        self.tools = tools
        self.dir = tools.dir
        self.raw = {}

    def disk(self, name, seed=1):
        """A new streamOptimized disk; its bytes. self.raw has what it shows."""
        self.raw[name] = ovagen.raw_disk(seed)
        (self.dir / "raw").write_bytes(self.raw[name])
        self.tools.ok("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "new.vmdk")
        data = (self.dir / "new.vmdk").read_bytes()
        os.unlink(self.dir / "new.vmdk")
        return data

    def read(self, image, *more):
        self.tools.ok("convert", *more, "-O", "raw", image, "out.raw")
        return (self.dir / "out.raw").read_bytes()

    def fails(self, *args, code=1):
        r = self.tools.drover(*args)
        assert r.code == code and r.err.strip().count("\n") == 0, r
        return r.err

    def info(self, image):
        return json.loads(self.tools.ok("info", "--output=json", image))


@pytest.fixture
def o(t):
    return Ova(t)


@pytest.mark.parametrize("dialect", ovagen.DIALECTS)
def test_one_disk_in_every_dialect(o, dialect):
    disks = {"disk1.vmdk": o.disk("disk1.vmdk")}
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks(disks), **disks}, dialect)
    info = o.info("m.ova")
    assert info["format"] == "ova" and info["virtual-size"] == 5 * ovagen.MIB
    data = info["format-specific"]["data"]
    assert data["machine"] == "my machine" and data["descriptor"] == "m.ovf"
    [disk] = data["disks"]
    assert disk == {"id": "vmdisk0", "name": "disk1.vmdk", "image": "ova:m.ova#disk1.vmdk", "capacity": 5 * ovagen.MIB,
                    "stored": len(disks["disk1.vmdk"])}
    for image in "m.ova", "ova:m.ova", "ova:m.ova#disk1.vmdk", "ova:m.ova#vmdisk0", f"ova:{o.dir}/m.ova#disk1.vmdk":
        assert o.read(image) == o.raw["disk1.vmdk"]
    assert o.read("m.ova", "-f", "ova") == o.read("ova:m.ova", "-f", "vmdk") == o.raw["disk1.vmdk"]
    member = o.info("ova:m.ova#disk1.vmdk")
    assert member["format"] == "vmdk"
    assert member["format-specific"]["data"]["create-type"] == "streamOptimized"
    assert os.listdir(o.dir).count("m.ova") == 1 and not [n for n in os.listdir(o.dir) if "drover" in n]


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_several_disks_and_long_names(o, dialect, locale):
    disks = {LONG: o.disk(LONG, 1), "b.vmdk": o.disk("b.vmdk", 2)}
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks(disks), **disks}, dialect)
    shown = o.tools.ok("info", "m.ova", env={"LC_ALL": locale})
    assert "ova:m.ova#b.vmdk" in shown
    for name in disks:
        o.tools.ok("convert", f"ova:m.ova#{name}", "out.raw", env={"LC_ALL": locale})
        assert (o.dir / "out.raw").read_bytes() == o.raw[name]
    text = o.fails("convert", "m.ova", "x.raw")
    assert "2 disks" in text and "ova:m.ova#b.vmdk" in text and not (o.dir / "x.raw").exists()
    assert "b.vmdk" in o.fails("convert", "ova:m.ova#nope", "x.raw")


def test_a_disk_is_read_only_and_can_be_a_parent(o):
    disks = {"d.vmdk": o.disk("d.vmdk")}
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks(disks), **disks})
    before = (o.dir / "m.ova").read_bytes()
    for format in "vmdk", "ova":
        o.tools.ok("create", "-f", "qcow2", "-b", "ova:m.ova#d.vmdk", "-F", format, "o.qcow2")
        assert o.read("o.qcow2") == o.raw["d.vmdk"]
        o.tools.ok("io", "-c", "write -P 7 100k 1M", "o.qcow2")
        o.tools.ok("compare", "o.qcow2", "o.qcow2")
        assert "read" in o.fails("commit", "o.qcow2")
        os.unlink(o.dir / "o.qcow2")
    assert "only be read" in o.fails("resize", "ova:m.ova#d.vmdk", "8M")
    for name in "m.ova", "ova:m.ova#d.vmdk":  # it has no bitmaps, neither inside nor beside it
        assert "lacks bitmap support" in o.fails("convert", "--bitmaps", "-O", "qcow2", name, "b.qcow2")
    assert "is read from" in o.fails("convert", "ova:m.ova#d.vmdk", "m.ova")
    assert (o.dir / "m.ova").read_bytes() == before


def test_files_beside_a_descriptor(o):
    disks = {"d 1.vmdk": o.disk("d 1.vmdk", 1), "sub/e.vmdk": o.disk("sub/e.vmdk", 2)}
    os.mkdir(o.dir / "sub")
    for name, data in disks.items():
        (o.dir / name).write_bytes(data)
    (o.dir / "m.ovf").write_bytes(ovagen.of_disks(disks).replace(b"d 1.vmdk", b"d%201.vmdk"))
    os.mkdir(o.dir / "elsewhere")
    for name in "m.ovf", "ovf:m.ovf", "ova:m.ovf":
        assert [d["name"] for d in o.info(name)["format-specific"]["data"]["disks"]] == ["d%201.vmdk", "sub/e.vmdk"]
    assert o.read("ova:m.ovf#d%201.vmdk") == o.raw["d 1.vmdk"]
    assert o.read(f"ovf:{o.dir}/m.ovf#sub/e.vmdk") == o.raw["sub/e.vmdk"]
    r = o.tools.drover("convert", "ovf:../m.ovf#sub/e.vmdk", "out.raw", cwd=o.dir / "elsewhere")
    assert r.code == 0 and (o.dir / "elsewhere/out.raw").read_bytes() == o.raw["sub/e.vmdk"]


@pytest.mark.parametrize("href", ["../secret", "{dir}/secret", "link", "sub/../../secret", "%2e%2e/secret"])
def test_no_name_leaves_the_directory(o, href, tmp_path):
    os.mkdir(o.dir / "in")
    os.mkdir(o.dir / "in/sub")
    (o.dir / "secret").write_bytes(b"secret" * 1000)
    os.symlink(o.dir / "secret", o.dir / "in/link")
    href = href.format(dir=o.dir)
    text = ovagen.descriptor({"f": {"href": href}}, {"d": {"fileRef": "f", "capacity": 6000}})
    (o.dir / "in/m.ovf").write_bytes(text)
    assert "outside the image's directory" in o.fails("convert", "-O", "raw", "ovf:in/m.ovf#d", "x")
    assert not (o.dir / "x").exists()
    ovagen.pack(o.dir / "in/m.ova", {"m.ovf": text})  # in an archive a name is that of a member, and nothing else
    assert "has no member" in o.fails("convert", "-O", "raw", "ova:in/m.ova#d", "x")
    ovagen.pack(o.dir / "in/m.ova", {"m.ovf": text, href: b"inside" * 1000})
    assert o.read("ova:in/m.ova#d", "-f", "raw")[:6000] == b"inside" * 1000


def test_a_disk_in_pieces(o):
    data = o.disk("d.vmdk")
    chunk = 65536 * 2
    pieces = {f"d.vmdk.{n:09}": data[n * chunk:(n + 1) * chunk] for n in range((len(data) + chunk - 1) // chunk)}
    files = {"f": {"href": "d.vmdk", "size": len(data), "chunkSize": chunk}}
    text = ovagen.descriptor(files, {"d": {"fileRef": "f", "capacity": 5 * ovagen.MIB}})
    ovagen.pack(o.dir / "m.ova", {"m.ovf": text, **pieces})
    assert o.read("ova:m.ova#d.vmdk") == o.raw["d.vmdk"]
    for name, piece in pieces.items():
        (o.dir / name).write_bytes(piece)
    (o.dir / "m.ovf").write_bytes(text)
    assert o.read("m.ovf") == o.raw["d.vmdk"]
    del files["f"]["size"]  # then there are as many as there are
    text = ovagen.descriptor(files, {"d": {"fileRef": "f"}})
    ovagen.pack(o.dir / "m.ova", {"m.ovf": text, **pieces})
    assert o.read("m.ova") == o.raw["d.vmdk"]
    pieces.pop("d.vmdk.000000001")
    files["f"]["size"] = len(data)
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.descriptor(files, {"d": {"fileRef": "f"}}), **pieces})
    assert "d.vmdk.000000001" in o.fails("convert", "m.ova", "x")


def test_other_formats_inside(o):
    raw = ovagen.raw_disk(3)
    (o.dir / "r").write_bytes(raw)
    o.tools.ok("convert", "-f", "raw", "-O", "qcow2", "r", "q.qcow2")
    disks = {"d.img": raw, "q.qcow2": (o.dir / "q.qcow2").read_bytes()}
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks(disks), **disks, "boot.iso": b"iso" * 999})
    assert o.read("ova:m.ova#d.img", "-f", "raw") == o.read("ova:m.ova#q.qcow2") == raw
    assert o.read("ova:m.ova#boot.iso")[:2997] == b"iso" * 999
    inner = (o.dir / "m.ova").read_bytes()
    ovagen.pack(o.dir / "n.ova", {"m.ovf": ovagen.of_disks({"m.ova": inner}), "m.ova": inner})
    assert "inside an archive" in o.fails("convert", "n.ova", "x")


def test_what_needs_other_files_is_refused(o):
    """A descriptor in an archive must not lead to files beside the archive."""
    (o.dir / "x-flat.vmdk").write_bytes(b"secret".ljust(1 << 20))
    text = (b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            b'RW 2048 FLAT "x-flat.vmdk" 0\n')
    child = text.replace(b"parentCID=ffffffff", b'parentCID=12345678\nparentFileNameHint="p.vmdk"')
    (o.dir / "p.vmdk").write_bytes(text)
    for data in text, child:
        ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks({"d.vmdk": data}), "d.vmdk": data})
        assert "extract" in o.fails("convert", "m.ova", "x")
    assert not (o.dir / "x").exists()


def test_a_truncated_archive_at_every_block(o):
    disks = {"d.vmdk": o.disk("d.vmdk")}
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks(disks), **disks})
    whole = (o.dir / "m.ova").read_bytes()
    with tarfile.open(o.dir / "m.ova") as tar:
        member = tar.getmember("d.vmdk")
    end = member.offset_data + member.size
    for size in [*range(0, 4096, 512), *range(4096, end, 512 * 97), end - 512]:
        (o.dir / "cut.ova").write_bytes(whole[:size])
        r = o.tools.drover("convert", "ova:cut.ova", "x.raw")
        assert r.code == 1 and r.err.strip().count("\n") == 0 and not (o.dir / "x.raw").exists(), (size, r)
    (o.dir / "cut.ova").write_bytes(whole[:end - 100000])
    assert "cut.ova" in o.tools.ok("info", "cut.ova")
    r = o.tools.drover("convert", "--salvage", "ova:cut.ova#d.vmdk", "x.raw")
    assert r.code == 3 and (o.dir / "x.raw").stat().st_size == 5 * ovagen.MIB, r


def test_sparse_members_are_refused(o):
    if not shutil.which("tar"):
        pytest.skip("no tar")
    (o.dir / "m.ovf").write_bytes(ovagen.descriptor({"f": {"href": "d.img"}}, {"d": {"fileRef": "f"}}))
    for fill in b"data", b"":
        with open(o.dir / "d.img", "wb") as f:
            f.truncate(8 * ovagen.MIB)
            f.seek(4 * ovagen.MIB)
            f.write(fill)
        for options in ["--format=gnu"], ["--format=pax", "--sparse-version=0.1"], ["--format=pax",
                                                                                   "--sparse-version=1.0"]:
            subprocess.run(["tar", "-S", *options, "-cf", "m.ova", "m.ovf", "d.img"], cwd=o.dir, check=True)
            assert "sparse" in o.fails("convert", "-f", "raw", "ova:m.ova#d", "x")
    subprocess.run(["tar", "-cf", "m.ova", "m.ovf", "d.img"], cwd=o.dir, check=True)
    assert o.read("ova:m.ova#d", "-f", "raw") == bytes(8 * ovagen.MIB)


def test_sizes_beyond_8_gib(o):
    """A member behind one whose size needs base-256 (GNU) or a pax record."""
    disks = {"d.vmdk": o.disk("d.vmdk")}
    text = ovagen.descriptor({"f": {"href": "d.vmdk"}}, {"d": {"fileRef": "f"}})
    big = 9 << 30
    for dialect in "gnu", "pax":
        head = tarfile.TarInfo("big.iso")
        head.size = big
        with open(o.dir / "m.ova", "wb") as f:
            f.write(head.tobuf(ovagen.DIALECTS[dialect]))
            f.seek(big, os.SEEK_CUR)
            ovagen.pack(o.dir / "rest", {"m.ovf": text, **disks})
            f.write((o.dir / "rest").read_bytes())
        assert o.read("ova:m.ova#d.vmdk") == o.raw["d.vmdk"]


def test_descriptors_that_are_none(o):
    entity = (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "' + b"b" * 1000 + b'">]><Envelope>&a;</Envelope>')
    cases = {
        b"": "XML", b"<Envelope>": "XML", b"<Other/>": "<Envelope>", entity: "document type",
        entity.decode().encode("utf-16"): "document type", b"<Envelope>&a;</Envelope>": "",
        ovagen.descriptor({"f": {"href": "d"}}, {"d": {"fileRef": "f", "capacity": "many"}}): "capacity",
        ovagen.descriptor({"f": {"href": "d"}}, {"d": {"capacity": 1, "capacityAllocationUnits": "parsec"}}): "parsec",
        b"<Envelope>" + b"<a>" * 2000: "XML", b"x" * (5 << 20): "at most",
    }
    for text, why in cases.items():
        ovagen.pack(o.dir / "m.ova", {"m.ovf": text, "d": b"x" * 1000})
        assert why in o.fails("info", "m.ova"), text[:100]
    ovagen.pack(o.dir / "m.ova", {"d.img": b"x" * 1024})
    assert "no OVF descriptor" in o.fails("convert", "ova:m.ova", "x")
    assert o.read("ova:m.ova#d.img") == b"x" * 1024


@pytest.mark.parametrize("kind", ["vmdk", "raw"])
def test_a_compressed_disk_is_unpacked_on_the_way(o, kind):
    o.raw["d.vmdk"] = ovagen.raw_disk(5)
    data = ovagen.zipped(o.disk("d.vmdk", 5) if kind == "vmdk" else o.raw["d.vmdk"])
    text = ovagen.descriptor({"f": {"href": "d.vmdk.gz", "size": len(data), "compression": "gzip"}},
                             {"d": {"fileRef": "f", "capacity": 5 * ovagen.MIB}})
    ovagen.pack(o.dir / "m.ova", {"m.ovf": text, "d.vmdk.gz": data})
    assert o.read("m.ova") == o.read("ova:m.ova#d.vmdk.gz") == o.raw["d.vmdk"]
    assert "ERROR" not in o.tools.ok("check", "m.ova")
    for name in "m.ovf", "d.vmdk.gz":
        (o.dir / name).write_bytes(text if name == "m.ovf" else data)
    assert o.read("m.ovf") == o.raw["d.vmdk"]


def test_two_members_of_one_name_are_refused(o):
    text = ovagen.of_disks({"d.img": b"1" * 512})
    ovagen.pack(o.dir / "m.ova", [("m.ovf", text), ("d.img", b"1" * 512), ("./d.img", b"2" * 512)])
    assert "two members" in o.fails("convert", "m.ova", "x")


def test_a_compressed_archive_is_named_for_that(o):
    disks = {"d.vmdk": o.disk("d.vmdk")}
    ovagen.pack(o.dir / "m.ova", {"m.ovf": ovagen.of_disks(disks), **disks})
    (o.dir / "m.ova.gz").write_bytes(ovagen.zipped((o.dir / "m.ova").read_bytes()))
    for args in ["info", "m.ova.gz"], ["ova", "list", "m.ova.gz"], ["convert", "-O", "raw", "ova:m.ova.gz#d.vmdk", "x"]:
        assert "m.ova.gz: is compressed by gzip" in o.fails(*args), args


def test_endless_headers_are_bounded(o):
    ovagen.pack(o.dir / "m.ova", [("m.ovf", ovagen.of_disks({"d": b""}))] + [(f"{n}", b"") for n in range(5000)])
    assert "more than 4096 members" in o.fails("info", "m.ova")


# ---------------------------------------------------------------------- check


def machine(o, kind="SHA256"):
    disks = {"d.vmdk": o.disk("d.vmdk")}
    members = {"m.ovf": ovagen.of_disks(disks), **disks}
    return {**members, "m.mf": ovagen.manifest(members, kind)}


def check(o, members, code, name="m.ova"):
    ovagen.pack(o.dir / name, members)
    r = o.tools.drover("check", name)
    assert r.code == code, r
    return r.out


@pytest.mark.parametrize("kind", ["SHA1", "SHA256", "SHA512"])
def test_check_compares_digests(o, kind):
    good = machine(o, kind)
    assert "No errors" in check(o, good, 0)
    for name in "m.ovf", "d.vmdk":
        changed = bytearray(good[name])
        changed[changed.find(b"my machine") if name == "m.ovf" else 2000] ^= 0x20
        out = check(o, {**good, name: bytes(changed)}, 2)
        [line] = [line for line in out.split("\n") if line.startswith("ERROR")]
        assert f"m.ova#{name}: its {kind} is" in line, out
    report = json.loads(o.tools.drover("check", "--output=json", "m.ova").out)
    assert report["corruptions"] == 1 and report["format"] == "ova"


def test_convert_compares_the_digest_of_the_disk_when_asked(o):
    good = machine(o)
    changed = bytearray(good["d.vmdk"])
    changed[400] ^= 0x40  # behind the header, where nothing looks
    name = "ova:m.ova#d.vmdk"
    for members, words in (({**good, "d.vmdk": bytes(changed)}, "its SHA256 is"), ({**good, "m.mf": b""}, "no digest of 'd.vmdk'"),
                           ({n: d for n, d in good.items() if n != "m.mf"}, "no manifest"), (good, None)):
        ovagen.pack(o.dir / "m.ova", members)
        r = o.tools.drover("convert", "--verify", "-O", "raw", name, "x.raw")
        assert (r.code == 1 and words in r.err) if words else r.code == 0, r
        assert (o.dir / "x.raw").exists() == (words is None)
        name = "m.ova" if not words else name
    r = o.tools.drover("convert", "--verify", "-O", "raw", "x.raw", "y.raw")
    assert r.code == 1 and "nothing has digests of it" in r.err, r


def test_all_pieces_of_a_disk_must_have_digests_when_those_are_compared(o):
    data = o.disk("d.vmdk")
    chunk = len(data) // 2 + 1
    pieces = {f"d.vmdk.{n:09}": data[n * chunk:(n + 1) * chunk] for n in range(2)}
    text = ovagen.descriptor({"f": {"href": "d.vmdk", "size": len(data), "chunkSize": chunk}}, {"d": {"fileRef": "f"}})
    lines = [f"SHA256({name})= {hashlib.sha256(piece).hexdigest()}\n" for name, piece in pieces.items()]
    for n, words in ((1, "digests of 1 of the 2 pieces"), (2, None)):
        ovagen.pack(o.dir / "m.ova", {"m.ovf": text, "m.mf": "".join(lines[:n]).encode(), **pieces})
        r = o.tools.drover("convert", "--verify", "-O", "raw", "m.ova", "x.raw")
        assert (r.code == 1 and words in r.err) if words else r.code == 0, r


def test_the_digests_of_other_files_do_not_stand_for_those_of_a_disks_pieces(o):
    """As many lines that look like its own, of a piece that is not the disk's; and of a disk whose size is not known."""
    data = o.disk("d.vmdk")
    chunk = len(data) // 2 + 1
    pieces = {f"d.vmdk.{n:09}": data[n * chunk:(n + 1) * chunk] for n in range(2)}
    for size in ({"size": len(data)}, {}):
        text = ovagen.descriptor({"f": {"href": "d.vmdk", **size, "chunkSize": chunk}}, {"d": {"fileRef": "f"}})
        listed = {"d.vmdk.000000000": pieces["d.vmdk.000000000"], "d.vmdk.000000007": b"another", "d.vmdk": b"third"}
        sums = "".join(f"SHA256({name})= {hashlib.sha256(piece).hexdigest()}\n" for name, piece in listed.items())
        ovagen.pack(o.dir / "m.ova", {"m.ovf": text, "m.mf": sums.encode(), **pieces, **listed})
        r = o.tools.drover("convert", "--verify", "-O", "raw", "m.ova", "x.raw")
        assert r.code == 1 and "digests of 1 of the 2 pieces of 'd.vmdk'" in r.err, r
        assert "no digest of 'd.vmdk.000000001'" in o.tools.drover("check", "m.ova").out


def test_a_disk_without_its_archives_format_in_front_is_told_its_name(o):
    ovagen.pack(o.dir / "m.ova", machine(o))
    r = o.tools.drover("convert", "-O", "raw", "m.ova#d.vmdk", "x.raw")
    assert r.code == 1 and "is called ova:m.ova#d.vmdk" in r.err, r
    r = o.tools.drover("info", "m.ovo#d.vmdk")
    assert r.code == 1 and "archive" not in r.err, r


def test_check_tells_what_else_is_wrong(o):
    good = machine(o)
    out = check(o, {n: d for n, d in good.items() if n != "m.mf"}, 0)
    assert "has no manifest" in out
    out = check(o, {n: d for n, d in good.items() if n != "d.vmdk"}, 2)
    assert out.count("ERROR") == 1 and "has no member 'd.vmdk'" in out
    out = check(o, {**good, "m.mf": good["m.mf"].split(b"\n")[0]}, 0)
    assert "no digest of 'd.vmdk'" in out
    out = check(o, {**good, "m.mf": b"MD5(x)= 12"}, 2)
    assert "m.ova#m.mf: line 1" in out
    out = check(o, {**good, "m.cert": b"..."}, 0)
    assert "certificate, which was not checked" in out
    text = good["m.ovf"].replace(b'capacity="5"', b'capacity="6"')
    out = check(o, {"m.ovf": text, "d.vmdk": good["d.vmdk"]}, 2)
    assert out.count("ERROR") == 1 and "the descriptor says 6291456" in out
    text = good["m.ovf"].replace(b'size="', b'size="1')
    assert "bytes, the descriptor says" in check(o, {"m.ovf": text, "d.vmdk": good["d.vmdk"]}, 2)
    text = good["m.ovf"].replace(b'fileRef="file0"', b'fileRef="file9"')
    assert "does not list" in check(o, {"m.ovf": text, "d.vmdk": good["d.vmdk"]}, 2)
    assert "only be read" in o.fails("check", "-r", "all", "m.ova")


def test_check_goes_on_behind_two_members_of_one_name(o):
    text = ovagen.descriptor({}, {})
    sums = ovagen.manifest({"a": b"1"}) + ovagen.manifest({"b": b"2"})
    out = check(o, [("m.ovf", text), ("m.mf", sums), ("a", b"1"), ("a", b"1"), ("b", b"3")], 2)
    assert "two members named 'a'" in out and "m.ova#b: its SHA256 is" in out


def test_check_looks_into_the_disks(o):
    good = machine(o)
    broken = bytearray(good["d.vmdk"])
    at = broken.rfind(b"KDMV")
    broken[at + 56:at + 64] = (1 << 40).to_bytes(8, "little")  # the footer's directory
    members = {"m.ovf": good["m.ovf"], "d.vmdk": bytes(broken)}
    assert "ERROR" in check(o, {**members, "m.mf": ovagen.manifest(members)}, 2)


def test_check_of_files_beside_a_descriptor(o):
    for name, data in machine(o).items():
        (o.dir / name).write_bytes(data)
    assert "No errors" in o.tools.ok("check", "m.ovf")
    with open(o.dir / "d.vmdk", "r+b") as f:
        f.seek(2000)
        f.write(b"?")
    r = o.tools.drover("check", "m.ovf")
    assert r.code == 2 and "d.vmdk: its SHA256 is" in r.out


# ---------------------------------------------------------------------- create


def members_of(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


@pytest.fixture
def two(o):
    """Two disks, one of them a qcow2 with a size that is no whole MiB."""
    o.raw = {"a": ovagen.raw_disk(1), "b": ovagen.raw_disk(2)[:-512]}
    for name, data in o.raw.items():
        (o.dir / f"{name}.raw").write_bytes(data)
    o.tools.ok("convert", "-f", "raw", "-O", "qcow2", "b.raw", "b.qcow2")
    return o


DISKS = ["-d", "format=raw:a.raw", "-d", "b.qcow2"]


@pytest.mark.parametrize("pipe", [False, True])
def test_a_machine_that_was_made_is_whole(two, pipe):
    o = two
    if pipe:
        with open(o.dir / "web.ova", "wb") as out:
            subprocess.run(f"{o.tools.bin}/drover ova create {' '.join(DISKS)} -n web - | cat", shell=True, check=True,
                           cwd=o.dir, stdout=out)
    else:
        o.tools.ok("ova", "create", *DISKS, "--memory", "512", "--cpus", "2", "web.ova")
    members = members_of(o.dir / "web.ova")
    assert list(members) == ["web.ovf", "web-disk1.vmdk", "web-disk2.vmdk", "web.mf"]
    assert "No errors" in o.tools.ok("check", "web.ova")
    assert members["web.mf"] == ovagen.manifest({n: d for n, d in members.items() if n != "web.mf"})
    for disk, raw in ("web-disk1.vmdk", o.raw["a"]), ("web-disk2.vmdk", o.raw["b"]):
        assert o.read(f"ova:web.ova#{disk}") == raw
        (o.dir / disk).write_bytes(members[disk])
    listed = o.tools.ok("ova", "list", "web.ova").split("\n")
    assert [line.split()[0] for line in listed if line] == ["web-disk1.vmdk", "web-disk2.vmdk"]
    assert json.loads(o.tools.ok("ova", "list", "--output=json", "web.ova"))["machine"] == "web"
    for tool in ["qemu-img", "compare", "-f", "raw", "-F", "vmdk", "a.raw", "web-disk1.vmdk"], ["tar", "tf", "web.ova"], \
            ["7z", "t", "web.ova"], ["xmllint", "--noout", "web.ovf"]:
        (o.dir / "web.ovf").write_bytes(members["web.ovf"])
        if shutil.which(tool[0]):
            subprocess.run(tool, cwd=o.dir, check=True, stdout=subprocess.DEVNULL)


def test_a_descriptor_that_importers_read(two):
    import xml.etree.ElementTree as ET
    o = two
    o.tools.ok("ova", "create", *DISKS, "--memory", "2G", "--cpus", "3", "web.ova")
    members = members_of(o.dir / "web.ova")
    root = ET.fromstring(members["web.ovf"])
    ovf = "{" + ovagen.NAMESPACE + "}"
    files = {f.get(ovf + "id"): f for f in root.iter(ovf + "File")}
    assert {f.get(ovf + "href"): int(f.get(ovf + "size")) for f in files.values()} == {
        n: len(d) for n, d in members.items() if n.endswith(".vmdk")}
    disks = {d.get(ovf + "diskId"): d for d in root.iter(ovf + "Disk")}
    sizes = []
    for d in disks.values():
        unit = d.get(ovf + "capacityAllocationUnits").replace("byte", "1").replace("^", "**")
        sizes.append(int(d.get(ovf + "capacity")) * eval(unit))  # pylint: disable=eval-used
        assert d.get(ovf + "fileRef") in files and int(d.get(ovf + "populatedSize")) <= sizes[-1]
    assert sizes == [len(o.raw["a"]), len(o.raw["b"])]
    items = []
    for item in root.iter(ovf + "Item"):
        tags = [child.tag.split("}")[1] for child in item]
        assert tags == sorted(tags)
        items.append({child.tag.split("}")[1]: child.text for child in item})
    by_type = {}
    for item in items:
        by_type.setdefault(item["ResourceType"], []).append(item)
    assert by_type["3"][0]["VirtualQuantity"] == "3" and by_type["4"][0]["VirtualQuantity"] == "2048"
    [controller] = by_type["6"]
    assert controller["ResourceSubType"] == "lsilogic"
    assert [d["HostResource"] for d in by_type["17"]] == [f"ovf:/disk/{i}" for i in disks]
    assert all(d["Parent"] == controller["InstanceID"] for d in by_type["17"])
    assert len({i["InstanceID"] for i in items}) == len(items)


def test_the_same_disks_make_the_same_archive_but_for_ids(two):
    o = two
    for name in "1.ova", "2.ova":
        o.tools.ok("ova", "create", *DISKS, "-n", "web", "--ctime", "0", name)
    first, second = members_of(o.dir / "1.ova"), members_of(o.dir / "2.ova")
    assert first["web.ovf"] == second["web.ovf"]
    for name in "web-disk1.vmdk", "web-disk2.vmdk":
        a, b = first[name], second[name]
        assert len(a) == len(b) and a[21 * 512:] == b[21 * 512:] and a[:512] == b[:512]


def test_what_create_refuses(two):
    o = two
    o.tools.ok("ova", "create", *DISKS, "web.ova")
    before = (o.dir / "web.ova").read_bytes()
    names = sorted(os.listdir(o.dir))
    for args, why in {
            ("web.ova", *DISKS): "exists already", ("--force", "-d", "ova:web.ova#web-disk1.vmdk", "web.ova"): "is read from",
            ("x.ova",): "-d", ("-d", "nope", "x.ova"): "nope", ("-n", "../x", *DISKS, "x.ova"): "no name of a machine",
            ("--memory", "x", *DISKS, "x.ova"): "", ("--cpus", "0x", *DISKS, "x.ova"): "--cpus",
            ("--controller", "scsi", *DISKS, "x.ova"): "lsilogic or ide", ("-o", "nonsense=1", *DISKS, "x.ova"): "nonsense",
            ("-o", "subformat=monolithicFlat", *DISKS, "x.ova"): "subformat", (*DISKS, "none/x.ova"): "none",
            ("--controller", "ide", *DISKS, *DISKS, "-d", "b.qcow2", "x.ova"): "1 to 4"}.items():
        r = o.tools.drover("ova", "create", *args)
        assert r.code == 1 and why in r.err, (args, r)
        assert sorted(os.listdir(o.dir)) == names
    assert (o.dir / "web.ova").read_bytes() == before
    o.tools.ok("ova", "create", "--force", "--controller", "ide", *DISKS, *DISKS, "web.ova")
    assert "No errors" in o.tools.ok("check", "web.ova")
