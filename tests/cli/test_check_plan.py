# SPDX-License-Identifier: LGPL-2.1-or-later
"""check -r --dry-run: the plan of a repair, for files that may only be read."""
import json
import os
import struct

import pytest


@pytest.fixture
def leaky(t):
    """One cluster is counted too often."""
    t.ok("create", "-q", "-f", "qcow2", "d.qcow2", "10M")
    t.io("d.qcow2", "write -P 1 0 1M")
    with open(os.path.join(t.dir, "d.qcow2"), "r+b") as f:
        f.seek(48)
        f.seek(struct.unpack(">Q", f.read(8))[0])
        at = struct.unpack(">Q", f.read(8))[0] + 2 * 7
        f.seek(at)
        f.write(b"\0\3")
    return "d.qcow2", at


def content(t, name):
    with open(os.path.join(t.dir, name), "rb") as f:
        return f.read()


def test_a_line_for_each_change(t, leaky):
    name, at = leaky
    before = content(t, name)
    os.chmod(os.path.join(t.dir, name), 0o444)
    r = t.drover("check", "-r", "leaks", "--dry-run", name)
    assert r.code == 2 and f"Would change byte {at}: the count of the cluster at byte 458752 becomes 1, was 3\n" in r.out, r
    assert "Nothing was changed." in r.out and content(t, name) == before
    plan = json.loads(t.drover("check", "-r", "all", "--dry-run", "--output=json", name).out)
    assert plan["plan"] == [{"offset": at, "change": "the count of the cluster at byte 458752 becomes 1, was 3"}]
    assert plan["leaks"] == plan["leaks-fixable"] == 1 and "leaks-fixed" not in plan
    assert content(t, name) == before


def test_without_anything_to_repair(t):
    t.ok("create", "-q", "-f", "qcow2", "d.qcow2", "1M")
    assert "would change nothing" in t.ok("check", "-r", "all", "--dry-run", "d.qcow2")
    r = t.drover("check", "--dry-run", "d.qcow2")
    assert r.code == 1 and "goes with -r" in r.err


def test_other_formats_tell_of_bytes(t):
    t.ok("create", "-q", "-f", "vmdk", "d.vmdk", "10M")
    t.io("d.vmdk", "write -P 1 0 1M")
    with open(os.path.join(t.dir, "d.vmdk"), "ab") as f:
        f.write(b"x" * (1 << 20))
    before = content(t, "d.vmdk")
    r = t.drover("check", "-r", "leaks", "--dry-run", "d.vmdk")
    assert r.code == 3 and "d.vmdk ends here" in r.out, r
    assert content(t, "d.vmdk") == before
