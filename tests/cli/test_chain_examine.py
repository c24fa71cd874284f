# SPDX-License-Identifier: LGPL-2.1-or-later
"""chain show of directories, chain check and chain diff."""
import json
import os
import shutil
import subprocess

import pytest
from conftest import DROVER


def family(t):
    """base <- mid <- (top, other)."""
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "8M")
    t.io("base.vmdk", "write -P 1 0 4M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "mid.vmdk")
    t.io("mid.vmdk", "write -P 2 2M 4M", "write -z 1M 64k")
    for child in ("top.vmdk", "other.vmdk"):
        t.ok("create", "-q", "-f", "vmdk", "-b", "mid.vmdk", "-F", "vmdk", child)
    t.io("top.vmdk", "write -P 3 3M 64k")


def shown(t, *args):
    return {os.path.normpath(n["filename"]): n for n in json.loads(t.ok("chain", "show", "--output=json", *args))}


def check(t, *args, code=2):
    r = t.drover("chain", "check", "--output=json", *args)
    assert r.code == code, r
    return [(os.path.normpath(f["filename"]), f["class"]) for f in json.loads(r.out)["findings"]]


def test_a_directory_is_shown_as_its_families(t):
    family(t)
    t.ok("create", "-q", "-f", "raw", "r.raw", "1M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "r.raw", "-F", "raw", "child.qcow2")
    t.ok("create", "-q", "-f", "qcow2", "alone.qcow2", "1M")
    (t.dir / "notes.txt").write_text("no disk\n")
    nodes = shown(t, ".")
    assert {k: v.get("parent") for k, v in nodes.items()} == {
        "alone.qcow2": None, "base.vmdk": None, "mid.vmdk": "base.vmdk", "other.vmdk": "mid.vmdk",
        "top.vmdk": "mid.vmdk", "r.raw": None, "child.qcow2": "r.raw"}
    lines = t.ok("chain", "show", "--ascii", ".").splitlines()
    assert "`-- child.qcow2" in lines[lines.index(next(x for x in lines if x.startswith("r.raw"))) + 1]


def test_what_is_covered_in_every_disk_is_not_exclusive(t):
    family(t)
    nodes = shown(t, ".")
    assert {k: (v["allocated-bytes"], v["exclusive-bytes"]) for k, v in nodes.items()} == {
        "base.vmdk": (4 << 20, (2 << 20) - 65536), "mid.vmdk": ((4 << 20) + 65536, (4 << 20) + 65536),
        "top.vmdk": (65536, 65536), "other.vmdk": (0, 0)}
    # In the chain of top alone mid's bytes under top's are covered.
    assert shown(t, "top.vmdk")["mid.vmdk"]["exclusive-bytes"] == 4 << 20
    assert nodes["mid.vmdk"]["parent-content-id"] == nodes["base.vmdk"]["content-id"]


def test_a_shorter_parent_and_odd_sizes_are_counted_to_the_byte(t):
    (t.dir / "odd.raw").write_bytes(b"x" * 5000)
    t.ok("create", "-q", "-f", "qcow2", "-b", "odd.raw", "-F", "raw", "child.qcow2", "1M")
    nodes = shown(t, ".")
    assert nodes["odd.raw"]["allocated-bytes"] == nodes["odd.raw"]["exclusive-bytes"] == 5000


def test_a_sound_directory_has_no_findings(t):
    family(t)
    assert check(t, ".", code=0) == []
    assert t.ok("chain", "check", ".") == "4 images, no problem.\n"


def test_a_lost_parent_is_missing_and_a_moved_one_is_named(t):
    family(t)
    (t.dir / "sub").mkdir()
    os.rename(t.dir / "base.vmdk", t.dir / "sub" / "renamed.vmdk")
    r = t.drover("chain", "check", "--output=json", "top.vmdk")
    found = json.loads(r.out)["findings"]
    assert r.code == 2 and [(f["class"], os.path.normpath(f["found"])) for f in found] == [
        ("moved", "sub/renamed.vmdk")]
    os.remove(t.dir / "sub" / "renamed.vmdk")
    assert check(t, ".") == [("mid.vmdk", "missing")]


def test_a_parent_is_looked_for_where_one_says(t, tmp_path_factory):
    family(t)
    far = tmp_path_factory.mktemp("far") / "a" / "b"
    far.mkdir(parents=True)
    shutil.move(t.dir / "base.vmdk", far / "base.vmdk")
    assert check(t, "top.vmdk") == [("mid.vmdk", "missing")]
    assert check(t, "--search", str(far), "top.vmdk") == [("mid.vmdk", "moved")]


def test_a_parent_without_ids_is_found_by_name_and_size_only(t):
    t.ok("create", "-q", "-f", "raw", "r.raw", "1M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "r.raw", "-F", "raw", "child.qcow2")
    (t.dir / "sub").mkdir()
    os.rename(t.dir / "r.raw", t.dir / "sub" / "r.raw")
    assert check(t, "child.qcow2") == [("child.qcow2", "moved")]
    os.truncate(t.dir / "sub" / "r.raw", 2 << 20)
    assert check(t, "child.qcow2") == [("child.qcow2", "missing")]


def test_a_changed_parent_and_the_sibling_that_it_makes_invalid(t):
    family(t)
    t.io("mid.vmdk", "write -P 9 0 64k")
    assert check(t, ".") == [("other.vmdk", "changed"), ("top.vmdk", "changed")]
    t.ok("rebase", "-u", "-b", "mid.vmdk", "-F", "vmdk", "top.vmdk")
    assert check(t, "top.vmdk", code=3) == [("other.vmdk", "sibling")]


def test_loops_of_any_length(t):
    family(t)
    t.ok("rebase", "-u", "--force", "-b", "mid.vmdk", "-F", "vmdk", "mid.vmdk")
    assert ("mid.vmdk", "loop") in check(t, "mid.vmdk")
    t.ok("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2")
    t.ok("rebase", "-u", "--force", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2")
    assert check(t, "a.qcow2") == [("a.qcow2", "loop"), ("b.qcow2", "loop")]


def test_harmless_findings_end_with_3(t):
    family(t)
    t.ok("create", "-q", "-f", "vmdk", "big.vmdk", "12M")
    t.ok("rebase", "-q", "-u", "-b", "big.vmdk", "-F", "vmdk", "top.vmdk")
    assert check(t, "top.vmdk", code=3) == [("top.vmdk", "capacity")]
    t.ok("create", "-q", "-f", "raw", "r.raw", "1M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "r.raw", "-F", "raw", "c.qcow2")
    t.ok("rebase", "-u", "-b", "r.raw", "-F", "raw", "c.qcow2")
    assert check(t, "c.qcow2", code=0) == []


def test_a_parent_elsewhere_is_forbidden(t, tmp_path_factory):
    far = tmp_path_factory.mktemp("far")
    t.ok("create", "-q", "-f", "vmdk", str(far / "base.vmdk"), "1M")
    t.ok("create", "-q", "-f", "vmdk", "--allow-path", str(far), "-b", str(far / "base.vmdk"), "-F", "vmdk", "c.vmdk")
    assert check(t, "c.vmdk") == [("c.vmdk", "forbidden")]
    assert check(t, "--allow-path", str(far), "c.vmdk", code=0) == []


def test_a_damaged_image_is_found_once(t):
    family(t)
    (t.dir / "base.vmdk").write_bytes(b"KDMV" + bytes(508))
    found = check(t, ".")
    assert ("base.vmdk", "damaged") in found and not [f for f in found if f[0] in ("top.vmdk", "other.vmdk")]


def diff(t, *args, code=1):
    r = t.drover("chain", "diff", "--output=json", *args)
    assert r.code == code, r
    return [(d["start"], d["length"]) for d in json.loads(r.out)]


def test_diff_tells_each_range_once(t):
    family(t)
    assert diff(t, "top.vmdk", "other.vmdk") == [(3 << 20, 65536)]
    assert diff(t, "top.vmdk", "base.vmdk") == [(1 << 20, 65536), (2 << 20, 4 << 20)]
    assert diff(t, "top.vmdk", "top.vmdk", code=0) == []
    r = t.drover("chain", "diff", "other.vmdk", "top.vmdk")
    assert r.code == 1 and "0x300000" in r.out and r.out.endswith("65536 bytes (64 KiB) in 1 range differ.\n")
    assert t.ok("chain", "diff", "mid.vmdk", "other.vmdk") == "No difference.\n"


def test_diff_whose_ranges_cannot_be_written_says_why(t):
    t.ok("create", "-f", "raw", "zeros.raw", "8M")
    t.ok("create", "-f", "raw", "many.raw", "8M")
    t.ok("io", "-f", "raw", *[x for i in range(400) for x in ("-c", f"write -q {i * 16}k 4k")], "many.raw")
    for args in ((), ("--output=json",)):
        for name in ("many.raw", "zeros.raw"):
            with open("/dev/full", "w") as full:
                r = subprocess.run([t.bin / "drover", "chain", "diff", *args, "-f", "raw", "-F", "raw", "zeros.raw", name],
                                   cwd=t.dir, stdout=full, stderr=subprocess.PIPE, timeout=20, check=False)
            assert (r.returncode, r.stderr) == (4, b"drover: standard output: No space left on device\n")


def test_diff_to_the_sector_and_behind_the_shorter_end(t):
    a, b = bytearray(1 << 20), bytearray(1 << 20)
    b[512] = b[1023] = b[700000] = 1
    (t.dir / "a.raw").write_bytes(a)
    (t.dir / "b.raw").write_bytes(bytes(b) + b"\0" * 4096 + b"y")
    assert diff(t, "-f", "raw", "-F", "raw", "a.raw", "b.raw") == [
        (512, 512), (700000 // 512 * 512, 512), ((1 << 20) + 4096, 1)]


def test_diff_reads_nothing_of_layers_that_both_share(t):
    """The base is gone bad behind its tables: what both read from it is not looked at."""
    family(t)
    size = (t.dir / "base.vmdk").stat().st_size
    trace = t.dir / "trace"
    r = t.real("strace", "-f", "-y", "-e", "trace=pread64,preadv", "-o", str(trace), DROVER, "chain", "diff", "top.vmdk",
               "other.vmdk") if shutil.which("strace") else None
    if not r:
        pytest.skip("no strace")
    read = sum(int(line.rsplit("= ", 1)[1]) for line in trace.read_text().splitlines()
               if "base.vmdk>" in line and line.rsplit("= ", 1)[1].isdigit())
    assert r.code == 1 and 0 < read < size // 8


def test_diff_says_what_it_could_not_open(t):
    family(t)
    assert t.drover("chain", "diff", "top.vmdk", "nope.vmdk").code == 2
    assert t.drover("chain", "diff", "top.vmdk").code == 1


def parents(t, *names):
    return [json.loads(t.ok("info", "--output=json", n)).get("backing-filename") for n in names]


def test_relocate_records_where_each_parent_of_a_chain_is(t):
    t.ok("create", "-q", "-f", "raw", "flat.raw", "1M")
    family(t)
    t.ok("convert", "top.vmdk", "before.raw")
    (t.dir / "disks").mkdir()
    os.rename(t.dir / "base.vmdk", t.dir / "disks" / "golden.vmdk")
    os.rename(t.dir / "mid.vmdk", t.dir / "layer.vmdk")
    tree = {p.name: p.read_bytes() for p in t.dir.glob("*.vmdk")}
    said = t.ok("chain", "relocate", "--dry-run", "top.vmdk")
    assert said.count("would be recorded") == 2 and {p.name: p.read_bytes() for p in t.dir.glob("*.vmdk")} == tree
    said = t.ok("chain", "relocate", "top.vmdk").splitlines()
    assert said == ['./layer.vmdk: its parent is recorded as "disks/golden.vmdk", was "base.vmdk"',
                    'top.vmdk: its parent is recorded as "layer.vmdk", was "mid.vmdk"'] or len(said) == 2
    assert parents(t, "top.vmdk", "layer.vmdk", "other.vmdk") == ["layer.vmdk", "disks/golden.vmdk", "mid.vmdk"]
    assert t.ok("compare", "-F", "raw", "top.vmdk", "before.raw") == "Images are identical.\n"
    assert t.ok("chain", "relocate", ".").count("\n") == 1  # other's, too
    assert check(t, ".", code=0) == []
    assert t.ok("chain", "relocate", ".") == "All parents are where they are recorded.\n"


def test_relocate_mends_what_it_can_and_names_what_it_cannot(t):
    family(t)
    t.ok("create", "-q", "-f", "vmdk", "lost.vmdk", "1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "lost.vmdk", "-F", "vmdk", "alone.vmdk")
    os.remove(t.dir / "lost.vmdk")
    os.rename(t.dir / "base.vmdk", t.dir / "golden.vmdk")
    r = t.drover("chain", "relocate", ".")
    assert r.code == 1 and "alone.vmdk" in r.err and "--search" in r.err and "golden.vmdk" in r.out
    assert parents(t, "mid.vmdk") == ["golden.vmdk"]


def test_relocate_does_not_choose_between_two_that_are_equally_good(t):
    family(t)
    for name in ("a.vmdk", "b.vmdk"):
        shutil.copy(t.dir / "base.vmdk", t.dir / name)
    os.remove(t.dir / "base.vmdk")
    r = t.drover("chain", "relocate", "mid.vmdk")
    assert r.code == 1 and "2 images may as well" in r.err and parents(t, "mid.vmdk") == ["base.vmdk"]


def test_a_parent_found_far_away_is_recorded_and_has_to_be_allowed(t, tmp_path_factory):
    family(t)
    far = tmp_path_factory.mktemp("far")
    shutil.move(t.dir / "base.vmdk", far / "base.vmdk")
    said = t.ok("chain", "relocate", "--search", str(far), "mid.vmdk")
    assert "--allow-path" in said and check(t, "mid.vmdk") == [("mid.vmdk", "forbidden")]
    assert check(t, "--allow-path", str(far), "mid.vmdk", code=0) == []


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "add-cow"])
def test_pack_makes_names_relative(t, fmt):
    suffix = "vmdk" if fmt == "vmdk" else "raw"
    t.ok("create", "-q", "-f", suffix, f"base.{suffix}", "1M")
    t.ok("create", "-q", "-f", fmt, "-b", str(t.dir / f"base.{suffix}"), "-F", suffix, "disk.img")
    assert parents(t, "disk.img") == [str(t.dir / f"base.{suffix}")]
    assert t.ok("chain", "pack", "disk.img").count("\n") == 1
    assert parents(t, "disk.img") == [f"base.{suffix}"]
    assert t.ok("chain", "pack", ".") == "All names are relative.\n"
    os.remove(t.dir / f"base.{suffix}")
    r = t.drover("chain", "pack", "disk.img")
    assert r.code == 1 and "relocate" in r.err


def plan(t, *args):
    words = t.ok("rebase", "--dry-run", *args).split()
    assert "would" in words and "changed." in words
    given = int(words[words.index("given") - 6]) if "given" in words else None
    return int(words[0]), given


def test_a_rehearsed_rebase_says_exactly_what_would_be_copied_and_given_back(t):
    family(t)
    t.ok("convert", "-O", "vmdk", "mid.vmdk", "same.vmdk")
    assert plan(t, "-b", "same.vmdk", "-F", "vmdk", "top.vmdk") == (0, None)
    # All that mid has and base has not, but for the 64k that top has itself.
    assert plan(t, "-b", "base.vmdk", "-F", "vmdk", "top.vmdk") == ((4 << 20), None)
    assert plan(t, "-b", "", "top.vmdk") == (6 * (1 << 20) - 2 * 65536, None)
    t.ok("convert", "-O", "vmdk", "top.vmdk", "new.vmdk")
    t.io("top.vmdk", "write -P 2 4M 1M", "write -P 7 6M 64k", "write -z 7M 64k")
    assert plan(t, "--drop-equal", "-b", "new.vmdk", "-F", "vmdk", "top.vmdk") == (0, (1 << 20) + 65536)
    used = {n["filename"]: n for n in json.loads(t.ok("chain", "--output=json", "top.vmdk"))}["top.vmdk"]["allocated-bytes"]
    t.ok("rebase", "--drop-equal", "-b", "new.vmdk", "-F", "vmdk", "top.vmdk")
    after = {n["filename"]: n for n in json.loads(t.ok("chain", "--output=json", "top.vmdk"))}["top.vmdk"]["allocated-bytes"]
    assert used - after == (1 << 20) + 65536


def test_the_rules_of_size_and_format_are_explained(t):
    family(t)
    t.ok("create", "-q", "-f", "vmdk", "big.vmdk", "12M")
    t.ok("create", "-q", "-f", "qcow2", "q.qcow2", "8M")
    r = t.drover("rebase", "--dry-run", "-b", "big.vmdk", "-F", "vmdk", "top.vmdk")
    assert r.code == 0 and "not shown" in r.err and "VMware" in r.err
    r = t.drover("rebase", "-b", "q.qcow2", "-F", "qcow2", "top.vmdk")
    assert r.code == 1 and "must be a VMDK" in r.err and "convert -O vmdk" in r.err
