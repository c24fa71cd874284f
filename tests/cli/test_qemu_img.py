# SPDX-License-Identifier: LGPL-2.1-or-later
"""Called as qemu-img: the same output, byte for byte, and the same exit codes as the real one."""
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import once, same

SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


def fill(t):
    once(t, "qemu-img", lambda: fill_new(t))


def fill_new(t):
    """raw.img, a.vmdk and its child c.vmdk, flat.vmdk, split.vmdk; made by the real tools."""
    q = lambda *a: t.real("qemu-img", *a)
    q("create", "-q", "raw.img", "1M")
    q("create", "-q", "same.img", "1M")
    q("create", "-q", "long.img", "2M")
    q("create", "-q", "-f", "vmdk", "a.vmdk", "64M")
    t.real("qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 10M 64k", "a.vmdk")
    q("create", "-q", "-f", "vmdk", "-b", "a.vmdk", "-F", "vmdk", "c.vmdk")
    t.real("qemu-io", "-c", "write -P 3 512k 128k", "-c", "write -z 10M 64k", "c.vmdk")
    q("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "10M")
    t.real("qemu-io", "-c", "write -P 4 1M 1M", "flat.vmdk")
    q("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "split.vmdk", "3G")
    t.real("qemu-io", "-c", "write -P 5 2047M 2M", "split.vmdk")
    t.real("qemu-io", "-f", "raw", "-c", "write -P 6 64k 64k", "raw.img")
    q("create", "-q", "-f", "vmdk", "short.vmdk", "64M")
    t.real("qemu-io", "-c", "write -P 1 0 1M", "short.vmdk")
    q("create", "-q", "-f", "vmdk", "-b", "short.vmdk", "-F", "vmdk", "longer.vmdk", "96M")
    t.real("qemu-io", "-c", "write -P 7 80M 64k", "longer.vmdk")
    q("create", "-q", "-f", "vmdk", "-b", "longer.vmdk", "-F", "vmdk", "between.vmdk", "70M")
    q("create", "-q", "-f", "vmdk", "gone.vmdk", "1M")
    q("create", "-q", "-f", "vmdk", "-b", "gone.vmdk", "-F", "vmdk", "orphan.vmdk")
    (t.dir / "gone.vmdk").unlink()
    (t.dir / "empty.img").write_bytes(b"")


READ_ONLY = [
    ["convert", "-C", "-c", "-O", "qcow2", "raw.img", "x"], ["commit", "-f", "raw", "-b", "x", "raw.img"],
    ["info", "raw.img"], ["info", "-f", "raw", "raw.img"], ["info", "a.vmdk"], ["info", "c.vmdk"],
    ["info", "flat.vmdk"], ["info", "split.vmdk"], ["info", "-f", "raw", "a.vmdk"], ["info", "-U", "c.vmdk"],
    ["info", "--backing-chain", "c.vmdk"], ["info", "--backing-chain", "a.vmdk"],
    ["info", "--output=json", "raw.img"], ["info", "--output=json", "a.vmdk"],
    ["info", "--output=json", "c.vmdk"], ["info", "--output=json", "flat.vmdk"],
    ["info", "--output=json", "split.vmdk"], ["info", "--output=human", "a.vmdk"],
    ["info", "--backing-chain", "--output=json", "c.vmdk"],
    ["info", "--image-opts", "driver=vmdk,file.filename=c.vmdk"],
    ["info", "--image-opts", "driver=vmdk,file.driver=file,file.filename=c.vmdk"],
    ["info", 'json:{"driver":"vmdk","file":{"driver":"file","filename":"c.vmdk"}}'],
    ["info", "file:raw.img"],
    ["info", "nope"], ["info", "."], ["info", "-f", "nope", "raw.img"], ["info", "--output=xml", "raw.img"],
    ["info"], ["info", "a.vmdk", "c.vmdk"], ["info", "--image-opts", "-f", "vmdk", "driver=vmdk"],
    ["info", "-Z"], ["info", "--nope"], [], ["nope"],
    ["map", "raw.img"], ["map", "a.vmdk"], ["map", "c.vmdk"], ["map", "flat.vmdk"], ["map", "split.vmdk"],
    ["map", "--output=json", "raw.img"], ["map", "--output=json", "a.vmdk"],
    ["map", "--output=json", "c.vmdk"],
    ["map", "--output=json", "split.vmdk"], ["map", "-f", "raw", "c.vmdk"],
    ["map", "--output=json", "--start-offset=512k", "--max-length=1M", "c.vmdk"],
    ["map", "--start-offset=512k", "--max-length=1M", "c.vmdk"], ["map"], ["map", "nope"],
    ["map", "-s", "512k", "-l", "1M", "c.vmdk"], ["map", "--start-offset=99M", "c.vmdk"], ["map", "--output=json", "--max-length=1", "c.vmdk"],
    ["map", "--output=json", "longer.vmdk"], ["map", "--output=json", "between.vmdk"], ["map", "between.vmdk"],
    ["map", "--output=json", "empty.img"], ["map", "empty.img"], ["map", "--output=json", "-s", "99M", "c.vmdk"],
    ["map", "--output=json", "-l", "0", "raw.img"],
    ["compare", "raw.img", "raw.img"], ["compare", "raw.img", "same.img"], ["compare", "same.img", "long.img"],
    ["compare", "-s", "same.img", "long.img"], ["compare", "a.vmdk", "c.vmdk"], ["compare", "-p", "a.vmdk", "c.vmdk"],
    ["compare", "-q", "a.vmdk", "c.vmdk"], ["compare", "-p", "a.vmdk", "a.vmdk"], ["compare", "-f", "raw", "raw.img", "a.vmdk"],
    ["compare", "-f", "vmdk", "-F", "raw", "a.vmdk", "raw.img"], ["compare", "-s", "a.vmdk", "raw.img"],
    ["compare", "nope", "c.vmdk"], ["compare", "c.vmdk", "nope"], ["compare", "a.vmdk"], ["compare", "a", "b", "c"],
    ["compare", "-Z", "a", "b"], ["compare", "-U", "a.vmdk", "a.vmdk"], ["compare", "long.img", "same.img"],
    ["compare", "split.vmdk", "raw.img"], ["compare", "flat.vmdk", "flat.vmdk"],
    ["check", "raw.img"], ["check", "a.vmdk"], ["check", "c.vmdk"], ["check", "-q", "c.vmdk"], ["check", "flat.vmdk"],
    ["check", "--output=json", "a.vmdk"], ["check", "--output=json", "raw.img"], ["check", "nope"],
    ["check", "-q", "--output=json", "a.vmdk"], ["check", "orphan.vmdk"], ["check", "--output=json", "orphan.vmdk"],
    ["check", "-r", "nope", "a.vmdk"], ["check"], ["check", "--output=xml", "a.vmdk"],
    ["snapshot", "-l", "a.vmdk"], ["snapshot", "-c", "x", "a.vmdk"], ["snapshot", "-a", "x", "a.vmdk"],
    ["snapshot", "-d", "x", "a.vmdk"], ["snapshot", "a.vmdk"], ["snapshot", "-c", "x", "-d", "y", "a.vmdk"],
    ["snapshot", "-l", "nope"],
    ["create"], ["create", "x"], ["create", "x", "1M", "2M"], ["create", "-f", "nope", "x", "1M"],
    ["create", "-f", "vmdk", "x"], ["create", "-f", "vmdk", "-o", "nope=1", "x", "1M"],
    ["create", "-f", "raw", "-b", "raw.img", "x"], ["create", "-f", "vmdk", "-b", "a.vmdk", "x"],
    ["create", "-f", "vmdk", "-b", "nope.vmdk", "-F", "vmdk", "x"], 
    ["create", "-o", "size=1M", "x", "2M"], ["create", "-o", "size=1M,", "x"], ["create", "-o", "", "x", "1M"],
    ["create", "-f", "vmdk", "-b", "", "x", "1M"], ["create", "-F", "raw", "x", "1M"],
    ["convert", "-o", "", "raw.img", "x"], ["convert", "-F", "vmdk", "raw.img", "x"], ["convert", "-C", "--salvage", "raw.img", "x"],
    ["convert", "-n", "-O", "vmdk", "-o", "compat6=on", "raw.img", "a.vmdk"], ["measure", "-o", "size=1M,", "raw.img"],
    ["convert"], ["convert", "a.vmdk"], ["convert", "nope", "x"], ["convert", "-O", "nope", "a.vmdk", "x"],
    ["convert", "-n", "a.vmdk", "nope"], ["convert", "-S", "1", "a.vmdk", "x"], ["convert", "-S", "x", "a.vmdk", "x"],
    ["convert", "-S", "32M", "a.vmdk", "x"], ["convert", "-m", "99", "a.vmdk", "x"], ["convert", "-m", "x", "a.vmdk", "x"],
    ["convert", "-t", "nope", "a.vmdk", "x"], ["convert", "-T", "nope", "a.vmdk", "x"], ["convert", "-r", "x", "a.vmdk", "x"],
    ["convert", "--target-is-zero", "a.vmdk", "x"], ["convert", "-B", "a.vmdk", "-O", "vmdk", "c.vmdk", "x"],
    ["convert", "-f", "nope", "a.vmdk", "x"],
    ["commit"], ["commit", "nope"], ["commit", "a.vmdk"], ["commit", "-b", "nope", "c.vmdk"], ["commit", "-t", "nope", "a.vmdk"],
    ["commit", "-r", "x", "c.vmdk"],
    ["rebase"], ["rebase", "c.vmdk"], ["rebase", "-b", "a.vmdk", "c.vmdk"], ["rebase", "-u", "-b", "a.vmdk", "c.vmdk"],
    ["rebase", "-b", "a.vmdk", "-F", "nope", "c.vmdk"], ["rebase", "-b", "nope.vmdk", "-F", "vmdk", "c.vmdk"],
    ["rebase", "-b", "a.vmdk", "-F", "vmdk", "nope"], ["rebase", "-T", "nope", "-b", "", "c.vmdk"],
]


def roughly(text):
    """Without how often progress was shown; and the real one forgets a newline."""
    return re.sub(r"(    \([\d.]+/100%\)\r)+", "PROGRESS", text).rstrip("\n")


def name_of(args):
    return " ".join(args) or "(nothing)"


@pytest.mark.parametrize("args", READ_ONLY, ids=name_of)
def test_prints_and_ends_as_qemu_img(t, args):
    fill(t)
    before = t.names()
    ours = t.ours("qemu-img", *args)
    assert t.names() == before
    same(ours, t.real("qemu-img", *args), roughly)


CREATE = [
    ["-o", "preallocation=full", "x.img", "1M"], ["-o", "preallocation=off", "x.img", "1M"],
    ["x.img", "1M"], ["-q", "x.img", "1M"], ["-o", "size=2M", "x.img"], ["-f", "vmdk", "x.vmdk", "64M"],
    *[["-f", "vmdk", "-o", f"subformat={s}", "x.vmdk", "1G"] for s in SUBFORMATS],
    ["-o", "extent_size_hint=0", "x.img", "1M"], ["-o", "preallocation=off,extent_size_hint=64k,nocow=off", "x.img", "1M"],
    ["-o", "extent_size_hint=x", "x.img", "1M"],
    ["-f", "vmdk", "-o", "size=2M,subformat=twoGbMaxExtentSparse", "x.vmdk"],
    ["-f", "vmdk", "-o", "adapter_type=lsilogic", "-o", "hwversion=7", "x.vmdk", "1M"],
    ["-f", "vmdk", "-o", "compat6", "x.vmdk", "1M"],
    ["-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "x.vmdk"],
    ["-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "x.vmdk", "20M"],
    ["-f", "vmdk", "-o", "backing_file=base.vmdk,backing_fmt=vmdk", "x.vmdk"],
    ["-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "sub/x.vmdk"],
    ["nodir/x", "1M"], [".", "1M"], ["-f", "vmdk", "-o", "subformat=nope", "x.vmdk", "1M"],
]


@pytest.mark.parametrize("args", CREATE, ids=name_of)
def test_create_makes_and_says_the_same(t, args):
    made = {}
    for who, run in (("ours", t.ours), ("real", t.real)):
        where = t.dir / who
        (where / "sub").mkdir(parents=True)
        t.real("qemu-img", "create", "-q", "-f", "vmdk", "base.vmdk", "10M", cwd=where)
        result = run("qemu-img", "create", *args, cwd=where)
        files = sorted(str(p.relative_to(where)) for p in where.rglob("*") if p.is_file())
        shown = [t.real("qemu-img", "info", f, cwd=where).out for f in files]
        made[who] = (result.out, result.err, result.code, files,
                     [re.sub(r"cid: \d+|disk size.*", "", s) for s in shown])
    if made["real"][2] != 0:  # what is left behind after a failure is not to be copied
        assert made["ours"][3] == ["base.vmdk"]
        assert made["ours"][2] == made["real"][2]
        assert made["ours"][1].startswith("qemu-img: ") and made["ours"][1].count("\n") <= 3
    else:
        assert made["ours"] == made["real"]


@pytest.mark.parametrize("args", [["-T", "", "info", "raw.img"], ["--trace=", "info", "raw.img"], ["-T", "", "--trace", "", "info", "raw.img"],
                                  ["--", "info", "raw.img"], ["-T"], ["--trace"], ["-Z"], ["--nope", "info"]], ids=name_of)
def test_what_stands_before_the_command(t, args):
    fill(t)
    same(t.ours("qemu-img", *args), t.real("qemu-img", *args))
    for option in ("--vers", "-V"):
        r = t.ours("qemu-img", option, "info")
        assert r.code == 0 and r.out.startswith("qemu-img version"), r


def test_a_value_may_end_in_a_comma(t):
    t.ok("create", "-q", "-f", "vmdk", "a,", "1M")
    r = t.ours("qemu-img", "create", "-f", "vmdk", "-o", "backing_fmt=vmdk,backing_file=a,,", "b")
    assert r.code == 0 and " backing_file=a,, " in r.out, r
    assert t.ours("qemu-img", "create", "-f", "vmdk", "-o", "backing_file=a,,,", "c").code == 1


def test_a_map_of_a_flat_disk_knows_the_zeros(t):
    fill(t)
    def zeros(run):
        spans = []
        for e in json.loads(run("qemu-img", "map", "--output=json", "flat.vmdk").out):
            assert e["present"] and e["depth"] == 0 and e["offset"] == e["start"]
            if spans and spans[-1][2] == e["zero"]:
                spans[-1][1] += e["length"]
            else:
                spans.append([e["start"], e["length"], e["zero"]])
        return spans
    assert zeros(t.ours) == zeros(t.real)


RESIZE = [["raw.img", "2M"], ["raw.img", "512k"], ["--shrink", "raw.img", "512k"], ["raw.img", "+1M"], ["raw.img", "-1M"],
          ["--shrink", "raw.img", "-512k"], ["--shrink", "raw.img", "-9M"], ["raw.img", "x"], ["raw.img"], ["nope", "1M"],
          ["raw.img", "1M", "2M"], ["-q", "raw.img", "+1M"], ["raw.img", "0"], ["raw.img", "+0"],
          ["--preallocation=x", "raw.img", "9M"], ["--preallocation=off", "raw.img", "1000k"],
          ["--preallocation=full", "raw.img", "+1M"], ["--preallocation=falloc", "raw.img", "1500k"],
          ["--preallocation=falloc", "--shrink", "raw.img", "512k"], ["--preallocation=full", "raw.img", "1M"]]


@pytest.mark.parametrize("args", RESIZE, ids=name_of)
def test_resize(t, args):
    fill(t)
    shutil.copy(t.dir / "raw.img", t.dir / "before")
    ours = t.ours("qemu-img", "resize", "-f", "raw", *args)
    after = (t.dir / "raw.img").read_bytes()
    shutil.copy(t.dir / "before", t.dir / "raw.img")
    same(ours, t.real("qemu-img", "resize", "-f", "raw", *args))
    assert after.rstrip(b"\0") == (t.dir / "raw.img").read_bytes().rstrip(b"\0")
    assert len(after) == len((t.dir / "raw.img").read_bytes())


@pytest.mark.parametrize("mode, room", [("off", 0), ("falloc", 1), ("full", 1)])
def test_preallocation_takes_the_space(t, mode, room):
    def blocks(name):
        return os.stat(t.dir / name).st_blocks * 512 >> 20
    assert t.ours("qemu-img", "create", "-q", "-o", f"preallocation={mode}", "x.img", "4M").code == 0
    assert blocks("x.img") == 4 * room
    r = t.ours("qemu-img", "resize", "-f", "raw", f"--preallocation={mode}", "x.img", "6M")
    assert r.out == "Image resized.\n" and blocks("x.img") == 6 * room
    assert (t.dir / "x.img").read_bytes() == bytes(6 << 20)


QCOW2_GROWTH = ["cluster_size=64k", "extended_l2=on", "data_file=x.data", "data_file=x.data,data_file_raw=on", "cluster_size=4k", "compat=0.10"]


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("settings", QCOW2_GROWTH)
def test_a_qcow2_grows_with_as_much_space_as_in_qemu(t, settings, mode):
    """The places of the new clusters differ, as QEMU puts them behind the end of the file, and so do a few blocks."""
    def grown(tool):
        for name in ("x.qcow2", "x.data"):
            (t.dir / name).unlink(missing_ok=True)
        assert t.real("qemu-img", "create", "-q", "-f", "qcow2", "-o", settings, "x.qcow2", "3M").code == 0
        assert t.real("qemu-io", "-c", "write -q -P 5 1M 300k", "x.qcow2").code == 0
        r = tool("qemu-img", "resize", f"--preallocation={mode}", "x.qcow2", "9M")
        assert t.real("qemu-img", "check", "-q", "x.qcow2").code == 0
        reads = t.real("qemu-io", "-r", "-c", "read -P 5 1M 300k", "-c", "read -P 0 1324k 7892k", "x.qcow2")
        assert reads.code == 0 and "failed" not in reads.out, reads
        extents = json.loads(t.real("qemu-img", "map", "--output=json", "x.qcow2").out)
        placed = sum(e["length"] for e in extents if e["present"] and e["start"] >= 3 << 20)
        return r, placed, sum(os.stat(t.dir / name).st_blocks * 512 for name in t.names() if name.startswith("x."))
    ours, our_placed, our_space = grown(t.ours)
    real, real_placed, real_space = grown(t.real)
    same(ours, real)
    if "extended_l2" not in settings:  # there QEMU says that they are not present
        assert our_placed == real_placed
    assert abs(our_space - real_space) < 200 << 10


def test_growing_with_space_over_a_parent_hides_it(t):
    for mode in ("metadata", "falloc", "full"):
        t.ok("create", "-f", "raw", "base.img", "4M")
        t.io("base.img", "write -P 9 0 4M", fmt="raw")
        t.ok("create", "-f", "qcow2", "-b", "base.img", "-F", "raw", "top.qcow2", "1M")
        t.ok("resize", "-f", "qcow2", "--preallocation", mode, "top.qcow2", "6M")
        for tool in (t.ours, t.real):
            r = tool("qemu-io", "-f", "qcow2", "-c", "read -P 9 0 1M", "-c", "read -P 0 1M 5M", "top.qcow2")
            assert r.code == 0 and "failed" not in r.out, r
        assert t.real("qemu-img", "check", "top.qcow2").code == 0


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_no_room_for_a_qcow2_to_grow_leaves_the_old_size(t, tmp_path, mode):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        t.ok("create", "-q", "-f", "qcow2", small / "x.qcow2", "1M")
        t.io(small / "x.qcow2", "write -P 3 0 100k", fmt="qcow2")
        r = t.ours("qemu-img", "resize", f"--preallocation={mode}", small / "x.qcow2", "9M")
        assert r.code == 1 and r.err.startswith("qemu-img: Could not preallocate new data: "), r
        assert json.loads(t.ok("info", "--output=json", small / "x.qcow2"))["virtual-size"] == 1 << 20
        assert t.real("qemu-img", "check", small / "x.qcow2").code == 0
        t.io(small / "x.qcow2", "read -P 3 0 100k", "write -P 4 500k 64k", fmt="qcow2")
    finally:
        subprocess.run(["umount", str(small)], check=False)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_no_room_for_preallocation_leaves_the_old_size(t, tmp_path, mode):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        t.ok("create", "-q", small / "x.img", "1M")
        r = t.ours("qemu-img", "resize", "-f", "raw", f"--preallocation={mode}", small / "x.img", "9M")
        assert r.code == 1 and r.err.startswith("qemu-img: Could not preallocate new data: "), r
        assert os.stat(small / "x.img").st_size == 1 << 20
        r = t.ours("qemu-img", "create", "-q", "-o", f"preallocation={mode}", small / "y.img", "9M")
        assert r.code == 1 and os.listdir(small) == ["x.img"], r
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_missing_parent_is_told_in_the_known_words(t):
    t.ok("create", "-q", "-f", "vmdk", "a.vmdk", "1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "a.vmdk", "b.vmdk")
    (t.dir / "a.vmdk").unlink()
    for args in (["map", "b.vmdk"], ["compare", "b.vmdk", "b.vmdk"], ["convert", "-O", "raw", "b.vmdk", "x"]):
        same(t.ours("qemu-img", *args), t.real("qemu-img", *args))
    same(t.ours("qemu-io", "-c", "length", "b.vmdk"), t.real("qemu-io", "-c", "length", "b.vmdk"))


def test_a_lock_is_told_in_the_known_words(t):
    fill(t)
    holder = subprocess.Popen([t.bin / "qemu-io", "a.vmdk"], cwd=t.dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.read(1)  # the prompt: it has the disk open
        for args in (["info", "a.vmdk"], ["check", "a.vmdk"], ["compare", "a.vmdk", "a.vmdk"], ["map", "a.vmdk"],
                     ["info", "-U", "a.vmdk"]):
            same(t.ours("qemu-img", *args), t.real("qemu-img", *args))
        for args in (["-c", "length", "a.vmdk"], ["-r", "-c", "length", "a.vmdk"], ["-U", "-r", "-c", "length", "a.vmdk"]):
            same(t.ours("qemu-io", *args), t.real("qemu-io", *args))
    finally:
        holder.communicate()


def test_resize_of_a_disk_that_cannot(t):
    fill(t)
    t.ok("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "a.vmdk", "s.vmdk")
    before = (t.dir / "s.vmdk").read_bytes()
    r = t.ours("qemu-img", "resize", "s.vmdk", "+1M")
    assert r.code == 1 and "s.vmdk" in r.err and (t.dir / "s.vmdk").read_bytes() == before, r


def test_a_vmdk_grows_which_qemu_s_cannot(t):
    fill(t)
    size = json.loads(t.real("qemu-img", "info", "--output=json", "a.vmdk").out)["virtual-size"]
    assert t.ours("qemu-img", "resize", "a.vmdk", "+1M").out == "Image resized.\n"
    assert json.loads(t.real("qemu-img", "info", "--output=json", "a.vmdk").out)["virtual-size"] == size + (1 << 20)


def test_the_list_of_options_is_sorted_and_explained(t):
    out = t.ours("qemu-img", "create", "-f", "vmdk", "-o", "help").out
    real = t.real("qemu-img", "create", "-f", "vmdk", "-o", "help").out
    names = re.findall(r"^  (\w+)=<.*> +- .+$", out, flags=re.M)
    assert names == sorted(names) and {"size", "subformat", "adapter_type"} <= set(names)
    assert set(names) - {"compression_level"} == set(re.findall(r"^  (\w+)=<", real, flags=re.M))


def test_json_keys_stand_in_the_known_order(t):
    fill(t)
    ours = json.loads(t.ours("qemu-img", "info", "--output=json", "c.vmdk").out)
    real = json.loads(t.real("qemu-img", "info", "--output=json", "c.vmdk").out)
    assert list(ours) == list(real)


def test_json_is_plain_ascii(t):
    name = "ä€😀\x9b\x1b.vmdk"
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "1M")
    (t.dir / "base.vmdk").rename(t.dir / name)
    same(t.ours("qemu-img", "info", "--output=json", name), t.real("qemu-img", "info", "--output=json", name))
    same(t.ours("qemu-img", "check", "--output=json", name), t.real("qemu-img", "check", "--output=json", name))
    for args in (["chain", "--output", "json"], ["snapshot", "-l", "--output", "json"]):
        out = t.ok(*args, name)
        assert out.isascii() and "\x1b" not in out
        json.loads(out)


def test_commit_says_the_same_and_leaves_the_same_disk(t):
    fill(t)
    for who, run in (("ours", t.ours), ("real", t.real)):
        shutil.copytree(t.dir, t.dir.parent / who)
        r = run("qemu-img", "commit", "c.vmdk", cwd=t.dir.parent / who)
        assert (r.out, r.err, r.code) == ("Image committed.\n", "", 0)
    r = t.real("qemu-img", "compare", t.dir.parent / "ours/a.vmdk", t.dir.parent / "real/a.vmdk")
    assert r.code == 0, r
    r = t.real("qemu-img", "compare", t.dir.parent / "ours/c.vmdk", t.dir.parent / "ours/a.vmdk")
    assert r.code == 0, r


@pytest.mark.parametrize("source", ["raw.img", "a.vmdk", "c.vmdk", "flat.vmdk", "split.vmdk"])
@pytest.mark.parametrize("out", [["raw"], *[["vmdk", "-o", f"subformat={s}"] for s in SUBFORMATS]], ids=name_of)
def test_convert_makes_the_same_disk(t, source, out):
    fill(t)
    r = t.ours("qemu-img", "convert", "-p", "-O", *out, source, "x")
    assert (r.err, r.code) == ("", 0) and r.out.endswith("    (100.00/100%)\r\n")
    r = t.real("qemu-img", "compare", source, "x")
    assert r.out.endswith("Images are identical.\n"), r
    assert t.ours("qemu-img", "compare", source, "x").out == r.out


def test_several_sources_stand_one_after_another(t):
    fill(t)
    for who, run in (("ours", t.ours), ("real", t.real)):
        assert run("qemu-img", "convert", "raw.img", "long.img", "flat.vmdk", who).code == 0
    assert (t.dir / "ours").read_bytes() == (t.dir / "real").read_bytes()


@pytest.mark.parametrize("args", [
    ["--image-opts", "driver=raw,file.filename=raw.img", "driver=vmdk,file.filename=a.vmdk"],
    ["--image-opts", "driver=vmdk,file.filename=c.vmdk", "driver=raw,file.filename=flat.vmdk", "driver=vmdk,file.filename=a.vmdk"],
    ["json:{'driver':'raw','file.filename':'raw.img'}", "a.vmdk"], ["a.vmdk", "json:{'driver':'raw','file.filename':'c.vmdk'}"],
    ["--image-opts", "driver=vmdk,file.filename=c.vmdk,backing=", "driver=vmdk,file.filename=c.vmdk"],
    ["--image-opts", "driver=vmdk,file.filename=c.vmdk", "driver=vmdk,file.filename=c.vmdk,backing="],
], ids=name_of)
def test_each_source_is_opened_as_it_says(t, args):
    fill(t)
    for who, run in (("ours", t.ours), ("real", t.real)):
        r = run("qemu-img", "convert", *args, who)
        assert r.code == 0, r
    assert (t.dir / "ours").read_bytes() == (t.dir / "real").read_bytes()


VMDK = "driver=vmdk,file.filename=c.vmdk"


@pytest.mark.parametrize("args", [
    ["resize", "--image-opts", "driver=raw,file.filename=raw.img,read-only=on", "2M"],
    ["resize", "--image-opts", "driver=raw,file.filename=raw.img,file.read-only=true", "2M"],
    ["resize", "json:{'driver':'raw','read-only':true,'file':{'driver':'file','filename':'raw.img'}}", "2M"],
    ["commit", "--image-opts", VMDK + ",read-only=on"], ["rebase", "-b", "", "--image-opts", VMDK + ",read-only=on"],
    ["convert", "-n", "--target-image-opts", "raw.img", "driver=raw,file.filename=long.img,read-only=on"],
    ["map", "--image-opts", VMDK + ",read-only=x"], ["map", "--image-opts", VMDK + ",file.locking=of"],
    ["map", "--image-opts", VMDK + ",discard=x"], ["map", "--image-opts", VMDK + ",file.aio=x"],
    ["map", "--image-opts", VMDK + ",force-share=x"],
], ids=name_of)
def test_settings_are_heeded_or_refused(t, args):
    fill(t)
    before = {n: (t.dir / n).read_bytes() for n in ("raw.img", "long.img", "c.vmdk", "a.vmdk")}
    ours, real = t.ours("qemu-img", *args), t.real("qemu-img", *args)
    assert (ours.code, ours.out, ours.err.count("\n")) == (1, "", 1), ours
    assert real.code == 1, real
    assert before == {n: (t.dir / n).read_bytes() for n in before}


@pytest.mark.parametrize("settings", [
    "'backing':null", "'read-only':true", "'read-only':false,'auto-read-only':true", "'discard':'unmap','detect-zeroes':'on'",
    "'cache':{'direct':false,'no-flush':true}", "'force-share':true", "'node-name':'x'"])
def test_settings_that_change_nothing_and_no_parent(t, settings):
    fill(t)
    name = "json:{'driver':'vmdk','file':{'driver':'file','filename':'c.vmdk','locking':'auto'}," + settings + "}"
    for args in (["map"], ["map", "--output=json"], ["measure"]):
        same(t.ours("qemu-img", *args, name), t.real("qemu-img", *args, name))


def test_a_rebase_without_the_old_parent_is_an_unsafe_one(t):
    fill(t)
    before = (t.dir / "c.vmdk").read_bytes()
    r = t.ours("qemu-img", "rebase", "-b", "", "--image-opts", VMDK + ",backing=")
    assert r.code == 1 and "-u" in r.err and (t.dir / "c.vmdk").read_bytes() == before, r
    assert t.ours("qemu-img", "rebase", "-u", "-b", "", "--image-opts", VMDK + ",backing=").code == 0


def test_each_source_begins_with_a_sector(t):
    (t.dir / "a").write_bytes(b"a" * 1000)
    (t.dir / "b").write_bytes(b"b" * 70001)
    (t.dir / "c").write_bytes(b"c" * 100)
    for options in ([], ["-S", "0"], ["-n"]):
        for who, run in (("ours", t.ours), ("real", t.real)):
            if "-n" in options:
                (t.dir / who).write_bytes(b"old" * 50000)
            assert run("qemu-img", "convert", *options, "-f", "raw", "-O", "raw", "a", "b", "c", who).code == 0
        assert (t.dir / "ours").read_bytes() == (t.dir / "real").read_bytes()


def test_the_rest_of_the_last_sector_is_not_the_parents(t):
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "1M")
    t.io("base.vmdk", "write -P 1 0 1M")
    (t.dir / "odd").write_bytes(b"x" * 1000)
    r = t.ours("qemu-img", "convert", "-O", "vmdk", "-B", "base.vmdk", "-F", "vmdk", "odd", "out.vmdk")
    assert r.code == 0, r
    assert t.real("qemu-img", "compare", "odd", "out.vmdk").code == 0


def test_a_raw_disk_in_use_can_be_looked_at(t):
    fill(t)
    holder = subprocess.Popen([t.bin / "qemu-io", "-f", "raw", "raw.img"], cwd=t.dir, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        holder.stdout.read(1)  # the prompt: it has the disk open
        for args in (["info"], ["info", "--output=json"], ["info", "--backing-chain"], ["map"], ["map", "--output=json"],
                     ["measure"], ["check"], ["snapshot", "-l"], ["info", "-f", "raw"]):
            same(t.ours("qemu-img", *args, "raw.img"), t.real("qemu-img", *args, "raw.img"))
        for args in (["convert", "raw.img", "x"], ["compare", "raw.img", "raw.img"], ["resize", "-f", "raw", "raw.img", "2M"],
                     ["create", "raw.img", "1M"]):
            r = t.ours("qemu-img", *args)
            assert r.code != 0 and '"write" lock' in r.err, (args, r)
        assert t.drover("info", "raw.img").code == 1  # who types drover is told
    finally:
        holder.communicate()


def test_a_link_to_nothing_leads_the_new_disk(t):
    (t.dir / "sub").mkdir()
    (t.dir / "src").write_bytes(b"x" * 4096)
    for args in (["create", "-q", "link", "1M"], ["convert", "src", "link"], ["create", "-q", "-f", "vmdk", "link", "1M"]):
        os.symlink("sub/second", t.dir / "link")
        os.symlink("../disk", t.dir / "sub/second")
        r = t.ours("qemu-img", *args)
        assert r.code == 0 and os.readlink(t.dir / "link") == "sub/second", r
        assert os.path.isfile(t.dir / "disk") and not os.path.islink(t.dir / "disk")
        for name in ("link", "sub/second", "disk"):
            (t.dir / name).unlink()


def test_a_strangers_link_is_not_followed(t):
    os.symlink("victim", t.dir / "link")
    try:
        os.lchown(t.dir / "link", 65534, 65534)
    except PermissionError:
        pytest.skip("only root can make others' links")
    assert t.ours("qemu-img", "create", "-q", "link", "1M").code == 0
    assert t.names() == ["link"] and not os.path.islink(t.dir / "link")


def test_nobody_else_may_write_to_a_new_disk(t):
    (t.dir / "src").write_bytes(b"x" * 4096)
    before = os.umask(0)
    try:
        assert t.ours("qemu-img", "create", "-q", "a.img", "1M").code == 0
        assert t.ours("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", "src", "b.vmdk").code == 0
    finally:
        os.umask(before)
    assert {os.stat(t.dir / n).st_mode & 0o777 for n in ("a.img", "b.vmdk", "b-flat.vmdk")} == {0o644}


def test_space_is_asked_for_where_the_link_leads(t):
    (t.dir / "src").write_bytes(b"x" * 1000000)
    with open(t.dir / "out", "wb") as out:  # /dev/fd is on a file system without space
        r = subprocess.run([t.bin / "qemu-img", "convert", "-S", "0", "src", f"/dev/fd/{out.fileno()}"], cwd=t.dir,
                           pass_fds=[out.fileno()], capture_output=True, check=False)
    assert (r.returncode, r.stderr) == (0, b"")
    assert (t.dir / "out").read_bytes().rstrip(b"\0") == b"x" * 1000000


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_is_printed_never_gets_into_a_disk(t, closed):
    (t.dir / "src").write_bytes(b"x" * 300000)
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "child.vmdk")
    def sh(script):
        return subprocess.run(["sh", "-c", f"{script} {closed}"], cwd=t.dir, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "PATH": f"{t.bin}:{os.environ['PATH']}"}, check=False).returncode
    assert sh("qemu-img convert -p --salvage -f raw -O raw src out") == 0
    assert (t.dir / "out").read_bytes() == b"x" * 300000 + bytes(32)  # whole sectors
    assert sh("qemu-io -c 'write -P 3 0 1M' -c 'read -v 0 4k' -c nope child.vmdk") == 1
    assert sh("qemu-img commit -p child.vmdk") == 0
    assert sh("qemu-img create -f vmdk new.vmdk 1M") == 0
    assert (t.dir / "src").read_bytes() == b"x" * 300000
    t.io("child.vmdk", "read -P 3 0 1M")
    for name in ("base.vmdk", "child.vmdk", "new.vmdk"):
        assert t.real("qemu-img", "check", name).code == 0
    wanted = 1 if ">&-" in closed.split() else 0
    assert sh("drover info src") == wanted  # there, it is an error


def test_version_line_is_one_that_scripts_understand(t):
    for tool in ("qemu-img", "qemu-io"):
        assert re.match(rf"{tool} version \d+\.\d+\.\d+ ", t.ours(tool, "--version").out)
    out = t.ours("qemu-img", "--help").out
    assert re.search(r"^Supported formats:.* vmdk.* raw$|^Supported formats:.* raw.* vmdk$", out, flags=re.M)


def test_every_option_of_the_real_command_is_known(t):
    text = t.real("qemu-img", "--help").out
    for name in ("create", "info", "map", "compare", "convert", "commit", "rebase", "check", "resize"):
        line = re.search(rf"^  {name} (.*)$", text, flags=re.M).group(1)
        for option in re.findall(r"(?:^|[ \[|])(--?[A-Za-z][\w-]*)", line):
            r = t.ours("qemu-img", name, option, "--help")
            assert "unrecognized" not in r.err, (name, option, r)
