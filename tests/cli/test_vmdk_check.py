# SPDX-License-Identifier: LGPL-2.1-or-later
"""check of VMDKs as the command line shows it: one line a finding, qemu-img's exit codes and keys."""
import json
import os

GRAIN = 65536


def make(t, name="a.vmdk", *options):
    t.ok("create", "-q", "-f", "vmdk", *options, name, "8M")
    t.io(name, "write -P 1 0 1M", "write -P 2 4M 1M")


def findings(t, name="a.vmdk", code=0, *options):
    r = t.drover("check", *options, name)
    assert r.code == code, r
    return [line for line in r.out.splitlines() if line.startswith(name + ": ")]


def report(t, name="a.vmdk", code=0):
    r = t.drover("check", "--output=json", name)
    assert r.code == code, r
    return json.loads(r.out)


def poke(t, name, offset, data):
    with open(t.dir / name, "r+b") as f:
        f.seek(offset)
        f.write(data)


def test_a_sound_disk_has_no_findings(t):
    make(t)
    assert findings(t) == []
    keys = report(t)
    assert keys == {"filename": keys["filename"], "format": "vmdk", "check-errors": 0}


def test_a_cut_off_disk_is_one_line_and_damage(t):
    make(t)
    whole = os.path.getsize(t.dir / "a.vmdk")
    os.truncate(t.dir / "a.vmdk", whole - 5 * GRAIN)
    lines = findings(t, code=2)
    assert len(lines) == 1 and f"File truncated, expecting at least {whole} bytes" in lines[0], lines
    assert report(t, code=2)["corruptions"] == 5
    before = (t.dir / "a.vmdk").read_bytes()
    assert t.drover("check", "-r", "all", "a.vmdk").code == 2
    assert (t.dir / "a.vmdk").read_bytes() == before
    r = t.drover("convert", "--salvage", "-O", "raw", "a.vmdk", "out.raw")
    assert r.code == 3 and f"bytes {5 * 2 ** 20 - 5 * GRAIN} to {5 * 2 ** 20}" in r.err, r
    os.truncate(t.dir / "a.vmdk", 30000)
    r = t.drover("check", "a.vmdk")
    assert r.code == 1 and "File truncated, expecting at least 65536 bytes" in r.err, r


def test_a_cut_off_stream_with_its_tables_in_front_is_one_line(t):
    make(t)
    t.io("a.vmdk", *(f"write -s /bin/sh {i} 64k" for i in ("5M", "6M", "7M")))
    r = t.real("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "a.vmdk", "s.vmdk")
    assert r.code == 0, r
    assert findings(t, "s.vmdk") == []
    os.truncate(t.dir / "s.vmdk", os.path.getsize(t.dir / "s.vmdk") - 50000)
    lines = findings(t, "s.vmdk", code=2)
    assert len(lines) == 1 and "File truncated, expecting at least" in lines[0], lines


def test_a_repair_tells_what_it_did(t):
    make(t)
    poke(t, "a.vmdk", 0x1b * 512 + 8, bytes(4))
    r = t.drover("check", "-r", "all", "a.vmdk")
    assert r.code == 0 and "1 corruptions" in r.out and "No errors were found" in r.out, r
    t.io("a.vmdk", "read -P 1 0 1M", "read -P 2 4M 1M")
    poke(t, "a.vmdk", 0x1b * 512 + 8, b"\5\0\0\0")
    r = t.drover("check", "-r", "all", "--dry-run", "a.vmdk")
    assert r.code == 2 and "Would change byte" in r.out and "Nothing was changed" in r.out, r
    assert report(t, code=2)["corruptions"] == 1


def test_a_parent_that_changed_is_found_in_the_child(t):
    make(t)
    t.ok("create", "-q", "-f", "vmdk", "-b", "a.vmdk", "c.vmdk")
    assert findings(t, "c.vmdk") == []
    t.io("a.vmdk", "write -P 9 0 64k")
    lines = findings(t, "c.vmdk", code=2)
    assert len(lines) == 1 and "the CID of" in lines[0] and "rebase -u" in lines[0], lines
    os.unlink(t.dir / "a.vmdk")
    assert findings(t, "c.vmdk") == []


def test_a_disk_that_was_not_closed_is_told_and_recovered(t):
    make(t)
    poke(t, "a.vmdk", 72, b"\1")
    lines = findings(t)
    assert len(lines) == 1 and "was not closed cleanly" in lines[0], lines
    lines = findings(t, "a.vmdk", 0, "-r", "all")
    assert len(lines) == 1 and "was not closed cleanly" in lines[0], lines
    assert findings(t) == []
