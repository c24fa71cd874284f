# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots inside an image: the words of qemu-img, and what changes their view is refused."""
import hashlib
import json

import pytest
from conftest import same


def digest(t, name):
    return hashlib.sha256((t.dir / name).read_bytes()).hexdigest()


@pytest.fixture
def disk(t):
    t.ok("create", "-q", "-f", "qcow2", "disk.qcow2", "8M")
    t.io("disk.qcow2", "write -P 1 0 1M")
    return "disk.qcow2"


def test_lists_are_those_of_qemu_img(t, disk):
    for name in ("one", "one", "", "name with spaces", "a name that is longer than its column"):
        assert t.real("qemu-img", "snapshot", "-c", name, disk).code == 0
        t.ok("snapshot", "-i", "-c", name, disk)
    real = t.real("qemu-img", "snapshot", "-l", disk)
    same(t.ours("qemu-img", "snapshot", "-l", disk), real)
    same(t.drover("snapshot", "-i", "-l", disk), real)
    same(t.drover("info", disk), t.real("qemu-img", "info", disk))
    same(t.drover("info", "--output=json", disk), t.real("qemu-img", "info", "--output=json", disk))
    info = json.loads(t.ok("info", "--output=json", disk))
    assert json.loads(t.ok("snapshot", "-i", "-l", "--output=json", disk)) == info["snapshots"]


def test_no_snapshots_no_list(t, disk):
    same(t.ours("qemu-img", "snapshot", "-l", disk), t.real("qemu-img", "snapshot", "-l", disk))
    assert t.ok("snapshot", "-i", "-l", disk) == ""
    assert json.loads(t.ok("snapshot", "-i", "-l", "--output=json", disk)) == []


@pytest.mark.parametrize("args", [("-a", "nope"), ("-d", "nope"), ("-d", "1"), ("-l", "-c", "x"), ("-a", "x", "-d", "x")])
def test_mistakes_are_answered_as_by_qemu_img(t, disk, args):
    t.ok("snapshot", "-i", "-c", "one", disk)
    ours = t.ours("qemu-img", "snapshot", *args, disk)
    real = t.real("qemu-img", "snapshot", *args, disk)
    assert (ours.err.splitlines()[0], ours.code) == (real.err.splitlines()[0], real.code)


def test_images_that_cannot_have_one(t):
    t.ok("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", "bits.qcow2", "1M")
    t.io("bits.qcow2", "write 0 64k")
    t.ok("create", "-q", "-f", "qcow2", "-o", "data_file=d.data", "d.qcow2", "1M")
    t.ok("create", "-q", "-f", "raw", "d.raw", "1M")
    for name in ("bits.qcow2", "d.qcow2", "d.raw"):
        ours = t.ours("qemu-img", "snapshot", "-c", "x", name)
        real = t.real("qemu-img", "snapshot", "-c", "x", name)  # of a raw disk it also says how it found out
        assert (ours.err, ours.code) == (real.err.splitlines(keepends=True)[-1], real.code)
    before = digest(t, "bits.qcow2")
    r = t.drover("snapshot", "-i", "-c", "x", "bits.qcow2")
    assert r.code == 1 and "refcount_bits" in r.err
    assert digest(t, "bits.qcow2") == before
    assert "data in another file" in t.drover("snapshot", "-i", "-c", "x", "d.qcow2").err
    assert "raw images have no snapshots inside" in t.drover("snapshot", "-i", "-c", "x", "d.raw").err
    assert "raw images have no snapshots inside" in t.drover("snapshot", "-a", "x", "d.raw").err


def test_going_back_and_forth(t, disk):
    t.ok("convert", "-O", "raw", disk, "first.raw")
    t.ok("snapshot", "-i", "-c", "one", disk)
    t.io(disk, "write -P 2 512k 2M")
    t.ok("convert", "-O", "raw", disk, "second.raw")
    t.ok("snapshot", "-i", "-c", "two", disk)
    for name in ("1", "one", "snapshot.id=1", "snapshot.id=1,snapshot.name=one"):
        t.ok("convert", "-O", "raw", "-l", name, disk, "out.raw")
        assert digest(t, "out.raw") == digest(t, "first.raw")
    t.ok("snapshot", "-a", "one", disk)
    t.ok("compare", disk, "first.raw")
    t.ok("snapshot", "-a", "2", disk)
    t.ok("compare", disk, "second.raw")
    t.ok("snapshot", "-d", "one", disk)
    t.ok("snapshot", "-d", "2", disk)
    assert t.ok("snapshot", "-i", "-l", disk) == ""
    t.ok("check", "-q", disk)


def test_the_two_kinds_do_not_mix(t, disk):
    t.ok("snapshot", "-i", "-c", "inside", disk)
    child = t.ok("snapshot", "-c", disk).strip()
    assert child == "disk-000001.qcow2"
    assert "inside" not in t.ok("snapshot", "-l", child)
    assert t.ok("snapshot", "-i", "-l", child) == ""
    for args in (("-i", disk), ("-i", "-c", disk), ("-a", "inside"), ("-i", "-l", "-c", "x", disk)):
        assert t.drover("snapshot", *args).code == 1


def test_unknown_snapshots_are_named(t, disk):
    t.ok("snapshot", "-i", "-c", "one", disk)
    for args in (("snapshot", "-a", "two", disk), ("snapshot", "-d", "two", disk),
                 ("convert", "-O", "raw", "-l", "two", disk, "out.raw"),
                 ("measure", "-O", "raw", "-l", "two", disk)):
        r = t.drover(*args)
        assert r.code == 1 and r.err == f"drover: {disk}: has no snapshot two inside\n", r
        r = t.ours("qemu-img", *args)
        assert r.code == 1 and "snapshot" in r.err and (args[0] == "snapshot" or "Failed to load snapshot" in r.err), r
    assert "out.raw" not in t.names()


# QEMU changes what the snapshots show without a word.
@pytest.mark.parametrize("args", [("rebase", "--refuse-snapshots", "-b", ""), ("stream", "--refuse-snapshots"),
                                  ("commit",), ("commit", "-d")])
def test_nothing_is_copied_for_a_snapshot_where_that_is_not_wanted_or_not_possible(t, disk, args):
    t.ok("create", "-q", "-f", "qcow2", "other.qcow2", "8M")
    t.ok("create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", "top.qcow2")
    t.io("top.qcow2", "write -P 3 64k 64k")
    t.ok("snapshot", "-i", "-c", "one", "top.qcow2")
    before = digest(t, "top.qcow2"), digest(t, disk)
    r = t.drover(*args, "top.qcow2")
    assert r.code == 1 and "has 1 snapshot inside" in r.err, r
    assert before == (digest(t, "top.qcow2"), digest(t, disk))
    t.ok("snapshot", "-d", "one", "top.qcow2")
    t.ok(*args, "top.qcow2")
