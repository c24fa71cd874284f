# SPDX-License-Identifier: LGPL-2.1-or-later
"""A partition of a disk and a disk inside a tar are read and written where they stand (the driver raw's offset and size)."""
import json
import re
import shutil
import subprocess
import tarfile

import pytest
from conftest import same, without_times

OFFSET, SIZE = 65536, 131072
PART = f"driver=raw,offset={OFFSET},size={SIZE},file.filename=disk"


def name(path="disk", offset=OFFSET, size=SIZE, driver=None):
    raw = {"driver": "raw", "offset": offset, "file": {"driver": "file", "filename": str(path)}}
    if size is not None:
        raw["size"] = size
    return "json:" + json.dumps({"driver": driver, "file": raw} if driver else raw)


def disk(t, path="disk"):
    (t.dir / path).write_bytes(b"".join(bytes([i]) * 65536 for i in range(1, 6)))


def in_tar(t):
    """A qcow2 image of 1M in all.tar, and how to name it there."""
    t.ok("create", "-f", "qcow2", "inner", "1M")
    t.io("inner", "write -P 7 0 64k", "write -P 8 512k 64k")
    with open(t.dir / "inner", "r+b") as f:
        f.truncate((f.seek(0, 2) + 131072) // 512 * 512)  # room to grow
    with tarfile.open(t.dir / "all.tar", "w") as tar:
        tar.add(t.dir / "inner", "inner")
        tar.add(t.dir / "inner", "behind")
    with tarfile.open(t.dir / "all.tar") as tar:
        member = tar.getmember("inner")
        return member.offset_data, member.size


def only_what_counts(text):
    """Without the order of keys in names, which way a number stands there, and what the file system decides."""
    text = re.sub(r"json:\{.*\}", "NAME", text)
    return without_times(re.sub(r"disk size: .*|\"actual-size\".*|\"filename\": .*", "", text))


@pytest.mark.parametrize("args", [
    ["qemu-img", "info", "--image-opts", PART], ["qemu-img", "info", "--output=json", "--image-opts", PART],
    ["qemu-img", "info", name()], ["qemu-img", "map", "--output=json", "--image-opts", PART],
    ["qemu-img", "map", "--image-opts", PART], ["qemu-img", "resize", name(size=None), "1M"],
    ["qemu-img", "convert", "-O", "raw", name(), "out"],
    ["qemu-img", "dd", "bs=1k", "skip=63", "if=" + name("disk", OFFSET, SIZE), "of=out"],
    ["qemu-io", "--image-opts", PART, "-c", "length", "-c", "write -P 9 0 1k", "-c", f"write -P 10 {SIZE - 512} 512",
     "-c", f"read -P 3 65536 1k", "-c", "discard 4k 4k", "-c", "write -z 8k 4k"],
    ["qemu-io", "--image-opts", PART, "-c", f"write {SIZE - 512} 1k", "-c", f"read {SIZE} 512"],
], ids=lambda args: " ".join(args[:2]))
def test_a_part_is_what_it_is_to_qemu(t, args):
    results = []
    for who, run in (("ours", t.ours), ("real", t.real)):
        (t.dir / who).mkdir()
        disk(t, f"{who}/disk")
        results.append(run(*args, cwd=t.dir / who))
    same(*results, only_what_counts)
    for path in ("disk", "out"):
        if (t.dir / "real" / path).exists():
            assert (t.dir / "ours" / path).read_bytes() == (t.dir / "real" / path).read_bytes()


@pytest.mark.parametrize("offset,size,words", [
    (0, 1000, "Specified size is not multiple of 512"),
    (400000, None, "Offset (400000) cannot be greater than size of the containing file (327680)"),
    (327680, 512, "The sum of offset (327680) and size (512) has to be smaller or equal to the"),
    (-1, None, "Parameter 'offset' expects a non-negative number below 2^64"),
    ("12z", None, "Parameter 'offset' expects a non-negative number below 2^64"),
    (2**63 - 1, 512, "cannot be greater than size"),
], ids=str)
def test_what_no_part_can_be_is_refused_in_the_words_of_qemu(t, offset, size, words):
    disk(t)
    for r in (t.ours("qemu-img", "info", name("disk", offset, size)), t.real("qemu-img", "info", name("disk", offset, size))):
        assert r.code == 1 and words in r.err, r


def test_a_part_of_a_size_keeps_it(t):
    disk(t)
    before = (t.dir / "disk").read_bytes()
    for run in (t.ours, t.real):
        r = run("qemu-img", "resize", "--image-opts", PART, "1M")
        assert r.code == 1 and "Cannot resize fixed-size raw disks" in r.err, r
    assert (t.dir / "disk").read_bytes() == before


def test_writing_never_leaves_the_part(t):
    disk(t)
    before = (t.dir / "disk").read_bytes()
    (t.dir / "new").write_bytes(b"n" * SIZE)
    t.ok("convert", "-n", "-O", "raw", "new", name())
    (t.dir / "new").write_bytes(b"n" * (SIZE + 512))
    r = t.drover("convert", "-n", "-O", "raw", "new", name())
    assert r.code == 1 and "output file is smaller than input file" in r.err, r
    assert (t.dir / "disk").read_bytes() == before[:OFFSET] + b"n" * SIZE + before[OFFSET + SIZE:]


def test_an_image_in_a_tar_is_read_and_written_there(t):
    offset, size = in_tar(t)
    inner = name("all.tar", offset, size, "qcow2")
    before = (t.dir / "all.tar").read_bytes()
    assert t.drover("compare", inner, "inner").code == 0
    t.io(inner, "write -P 9 64k 64k")
    for tool in ("qemu-img check", "qemu-io -c 'read -P 9 64k 64k' -c 'read -P 8 512k 64k'"):
        command, _, rest = tool.partition(" ")
        args = [part.strip("'") for part in re.findall(r"'[^']*'|\S+", rest)]
        r = t.real(command, *args, "--image-opts", f"driver=qcow2,file.driver=raw,file.offset={offset},file.size={size},"
                   "file.file.filename=all.tar")
        assert r.code == 0 and "failed" not in r.out, r
    # when the part is full nothing is written behind it
    r = t.drover("io", "-c", "write -P 1 0 1M", inner)
    assert r.code == 1 and "No space left on device" in r.out, r
    after = (t.dir / "all.tar").read_bytes()
    assert len(after) == len(before)
    assert (after[:offset], after[offset + size:]) == (before[:offset], before[offset + size:])
    assert t.ours("qemu-img", "check", inner).code in (0, 3)


def test_a_part_may_be_of_a_part(t):
    offset, size = in_tar(t)
    (t.dir / "disk").write_bytes(b"x" * 4096 + (t.dir / "all.tar").read_bytes())
    options = f"driver=qcow2,file.driver=raw,file.offset={offset},file.size={size},file.file.driver=raw,file.file.offset=4k," \
              "file.file.file.filename=disk"
    ours, real = (run("qemu-img", "map", "--output=json", "--image-opts", options) for run in (t.ours, t.real))
    assert [{**e, "offset": 0} for e in json.loads(ours.out)] == [{**e, "offset": 0} for e in json.loads(real.out)]
    assert [e["offset"] for e in json.loads(ours.out) if e["data"]] == \
        [e["offset"] + offset + 4096 for e in json.loads(real.out) if e["data"]]  # where it stands in the file itself


def test_a_part_may_be_a_parent_and_passes_the_gate(t):
    offset, size = in_tar(t)
    (t.dir / "there").mkdir()
    (t.dir / "all.tar").rename(t.dir / "there" / "all.tar")
    inner = name(t.dir / "there" / "all.tar", offset, size, "qcow2")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", inner, "top")
    assert t.drover("compare", "top", "inner").code == 0
    real = t.real("qemu-img", "compare", "top", "inner")
    assert real.code == 0, real
    (t.dir / "here").mkdir()
    (t.dir / "top").rename(t.dir / "here" / "top")
    r = t.drover("info", "--backing-chain", "here/top")
    assert r.code == 1 and "outside the image's directory" in r.err, r
    t.ok("info", "--backing-chain", "--allow-path", t.dir / "there", "here/top")


def test_a_part_stays_the_parent_when_the_image_between_goes(t):
    offset, size = in_tar(t)
    inner = name(t.dir / "all.tar", offset, size, "qcow2")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", inner, "middle")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", "middle", "top")
    t.ok("stream", "--base", inner, "top")
    (t.dir / "middle").unlink()
    for tool in (t.drover, lambda *args: t.real("qemu-img", *args)):
        r = tool("compare", "top", "inner")
        assert r.code == 0, r
    assert '"driver": "qcow2"' in t.ok("snapshot", "-l", inner)  # its whole name


def test_parents_of_an_image_in_a_part_stand_beside_the_file(t):
    (t.dir / "sub").mkdir()
    t.ok("create", "-f", "qcow2", "sub/base", "1M")
    t.io("sub/base", "write -P 5 0 64k")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", "base", "sub/child")
    (t.dir / "sub" / "all").write_bytes(bytes(512) + (t.dir / "sub" / "child").read_bytes())
    child = name("sub/all", 512, None, "qcow2")
    assert t.drover("compare", child, "sub/base").code == 0
    assert "is a part of a file, beside which nothing is recorded" in t.drover("chain", "fingerprint", child).err


def test_a_part_is_locked_as_the_file_that_it_is_of(t):
    disk(t)
    with subprocess.Popen([shutil.which("qemu-io") or pytest.skip("qemu-io is not installed"), "-f", "raw", t.dir / "disk"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        held.stdin.write("read 0 512\n")  # its answer says that the disk is open
        held.stdin.flush()
        held.stdout.readline()
        r = t.drover("io", "-c", "write 0 512", name())
        held.stdin.close()
    assert r.code == 1 and "lock" in r.err, r
    assert t.drover("io", "-c", "write 0 512", name()).code == 0


def test_one_part_is_not_copied_onto_another_that_it_overlaps(t):
    disk(t)
    before = (t.dir / "disk").read_bytes()
    for one, other in ((name(), "disk"), ("disk", name()), (name(), name("disk", 0, 131072))):
        for more in ([], ["-U"]):
            r = t.drover("convert", *more, "-n", "-f", "raw", "-O", "raw", one, other)
            assert r.code == 1 and "the target must be another file" in r.err and len(r.err.splitlines()) == 1, r
    assert (t.dir / "disk").read_bytes() == before


def test_one_part_is_copied_to_another_of_the_same_file(t):
    disk(t)
    before = (t.dir / "disk").read_bytes()
    one, other = name("disk", 0, 65536), name("disk", 131072, 65536)
    t.ok("convert", "-n", "-f", "raw", "-O", "raw", one, other)
    assert (t.dir / "disk").read_bytes() == before[:131072] + before[:65536] + before[196608:]
    assert t.drover("compare", one, other).code == 0


def two_in_one(t):
    """A file with a qcow2 image in its first 4M and an overlay on it behind."""
    t.ok("create", "-f", "qcow2", "base", "1M")
    t.io("base", "write -P 1 0 1M")
    base = name(t.dir / "all", 0, 4 << 20, "qcow2")
    with open(t.dir / "all", "wb") as f:
        f.write((t.dir / "base").read_bytes())
        f.truncate(8 << 20)
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", base, "child")
    with open(t.dir / "all", "r+b") as f:
        f.seek(4 << 20)
        f.write((t.dir / "child").read_bytes())
    (t.dir / "child").unlink()  # or it would count as an image that needs the parent
    return base, name(t.dir / "all", 4 << 20, None, "qcow2")


def test_an_overlay_and_its_parent_may_be_parts_of_one_file(t):
    base, top = two_in_one(t)
    assert t.drover("compare", top, "base").code == 0
    t.io(top, "write -P 2 64k 64k", "read -P 1 0 64k")
    assert t.ok("io", "-c", "read -P 1 64k 64k", base)  # the parent is as it was
    for tool, args in ((t.drover, ["check"]), (lambda *a: t.real("qemu-img", *a), ["check", "-U"])):
        assert tool(*args, top).code == 0 and tool(*args, base).code == 0
    r = t.real("qemu-io", "-r", "-U", "-c", "read -P 2 64k 64k", "-c", "read -P 1 128k 64k", top)
    assert r.code == 0 and "failed" not in r.out, r
    t.ok("commit", top)
    r = t.real("qemu-io", "-r", "-c", "read -P 2 64k 64k", "-c", "read -P 1 128k 64k", base)
    assert r.code == 0 and "failed" not in r.out, r
    t.io(top, "write -P 3 0 64k")
    t.ok("rebase", "-b", "", top)
    r = t.real("qemu-io", "-r", "-c", "read -P 3 0 64k", "-c", "read -P 2 64k 64k", top)
    assert r.code == 0 and "failed" not in r.out, r


def test_other_programs_are_kept_from_the_file_while_a_part_is_written(t):
    _, top = two_in_one(t)
    with subprocess.Popen([t.bin / "drover", "io", top], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        held.stdin.write("write 0 512\n")  # its answer says that the disk is open
        held.stdin.flush()
        held.stdout.readline()
        r = t.real("qemu-io", "-f", "raw", "-c", "read 0 512", "all")
        held.stdin.close()
    assert r.code == 1 and "lock" in r.err, r


def test_a_parent_that_overlaps_its_child_is_refused(t):
    _, top = two_in_one(t)
    base = name(t.dir / "all", 0, 5 << 20, "qcow2")
    for args in (["rebase", "-u", "-F", "qcow2", "-b", base, top], ["rebase", "-F", "qcow2", "-b", base, top]):
        r = t.drover(*args)
        assert r.code == 1 and len(r.err.splitlines()) == 1, r
    r = t.drover("info", "--backing-chain", "--image-opts", f"driver=qcow2,file.driver=raw,file.offset={4 << 20},file.file.filename=all,"
                 f"backing.driver=qcow2,backing.file.driver=raw,backing.file.size={5 << 20},backing.file.file.filename={t.dir}/all")
    assert r.code == 1 and "has bytes in common with" in r.err and len(r.err.splitlines()) == 1, r


def test_tables_off_a_sector_are_only_read(t):
    t.ok("create", "-f", "qcow2", "base", "1M")
    t.io("base", "write -P 1 0 64k")
    (t.dir / "all").write_bytes(bytes(100) + (t.dir / "base").read_bytes())
    inner = name("all", 100, None, "qcow2")
    assert t.drover("compare", inner, "base").code == 0
    r = t.drover("io", "-c", "write 0 512", inner)
    assert r.code == 1 and "in the middle of a sector" in r.err, r
    t.io(name("all", 100, 512), "write -P 1 0 512")  # a raw disk has no tables


def test_a_json_name_without_a_part_is_the_file(t):
    t.ok("create", "-f", "qcow2", "base", "1M")
    plain = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}'
    r = t.real("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", plain, "top")
    assert r.code == 0, r
    assert t.drover("compare", "top", "base").code == 0
    assert t.drover("check", plain).code == 0


def test_a_packed_image_in_a_part_is_unpacked(t):
    t.ok("create", "-f", "qcow2", "one", "1M")
    t.io("one", "write -P 5 0 64k")
    assert t.start("gzip", "-k", "one").code == 0
    packed = (t.dir / "one.gz").read_bytes()
    (t.dir / "all").write_bytes(bytes(512) + packed)
    inner = "json:" + json.dumps({"file": {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "all"}}})
    assert t.drover("compare", inner, "one").code == 0


def test_nothing_is_made_in_the_place_of_a_part(t):
    disk(t)
    before = t.names()
    for args in (["snapshot", "-c", name()], ["bitmap", "--add", name(), "b"], ["create", "-f", "vmdk", name(), "64k"]):
        r = t.drover(*args)
        assert r.code != 0 and r.err.startswith("drover: "), r
        assert t.names() == before, r
