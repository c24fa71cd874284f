# SPDX-License-Identifier: LGPL-2.1-or-later
"""compact: what it says, what a dry run says, and what it refuses."""
import json
import os


def make(t, name="disk.qcow2", fmt="qcow2", *options):
    t.ok("create", "-q", "-f", fmt, *options, name, "8M")
    t.io(name, "write -P 1 0 1M", "write -P 0 1M 2M", "write -P 3 3M 1M", fmt=fmt)


def length(t, name="disk.qcow2"):
    return os.path.getsize(t.dir / name)


def test_a_dry_run_tells_what_the_run_does_and_changes_nothing(t):
    make(t)
    before, bytes_before = length(t), (t.dir / "disk.qcow2").read_bytes()
    plan = json.loads(t.ok("compact", "--dry-run", "--output", "json", "disk.qcow2"))
    assert (t.dir / "disk.qcow2").read_bytes() == bytes_before
    done = json.loads(t.ok("compact", "--output", "json", "disk.qcow2"))
    assert plan["dry-run"] and not done["dry-run"]
    for key in ("zeros", "length-before", "length-after"):
        assert plan[key] == done[key], key
    assert done["zeros"] == 2 << 20 and done["moved"] > 0
    assert (done["length-before"], done["length-after"]) == (before, length(t)) and length(t) <= before - (2 << 20)
    assert done["actual-size-after"] < done["actual-size-before"]


def test_what_it_says(t):
    make(t)
    assert t.ok("compact", "--dry-run", "disk.qcow2").startswith("2097152 bytes (2 MiB) of zeros would be given back.\n")
    assert "of zeros given back" in t.ok("compact", "disk.qcow2")
    assert t.ok("compact", "-q", "disk.qcow2") == ""
    assert "(100.00/100%)" in t.ok("compact", "-q", "disk.qcow2", "--progress", "text") + t.ok("compact", "-p", "disk.qcow2")


def test_without_zeros_the_data_is_not_read(t):
    make(t)
    done = json.loads(t.ok("compact", "--no-zeros", "--output", "json", "disk.qcow2"))
    assert done["zeros"] == done["moved"] == 0


def test_a_raw_disk_keeps_its_size(t):
    (t.dir / "disk.raw").write_bytes(b"x" * 65536 + bytes(1 << 20) + b"y" * 100)
    used = os.stat(t.dir / "disk.raw").st_blocks
    t.ok("compact", "-f", "raw", "disk.raw")
    assert (t.dir / "disk.raw").read_bytes() == b"x" * 65536 + bytes(1 << 20) + b"y" * 100
    assert os.stat(t.dir / "disk.raw").st_blocks * 512 <= used * 512 - (1 << 20)


def test_what_is_refused(t):
    make(t)
    t.ok("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "disk.qcow2", "stream.vmdk")
    for args, words in ((["stream.vmdk"], "written once"), (["--dry-run", "stream.vmdk"], "written once"),
                        (["nothere.qcow2"], "No such file"), ([], "one image file name")):
        r = t.drover("compact", *args)
        assert r.code == 1 and words in r.err, r
    with open(t.dir / "disk.qcow2", "r+b") as f:  # the first L2 entry leads to the header
        f.seek(0)
        head = f.read(48)
        f.seek(int.from_bytes(head[40:48], "big"))
        table = int.from_bytes(f.read(8), "big") & ((1 << 56) - 1)
        f.seek(table)
        f.write((1 << 63).to_bytes(8, "big"))
        f.seek(table + 8)
        f.write((1 << 63 | 0x10000).to_bytes(8, "big"))
    before = (t.dir / "disk.qcow2").read_bytes()
    r = t.drover("compact", "disk.qcow2")
    assert r.code == 1 and "drover check" in r.err, r
    assert (t.dir / "disk.qcow2").read_bytes() == before
