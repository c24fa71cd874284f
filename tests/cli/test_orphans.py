# SPDX-License-Identifier: LGPL-2.1-or-later
"""convert --salvage --orphans: what a qcow2 whose tables are lost still has in its file."""
import os
import struct


def lose_the_table(t, name):
    with open(os.path.join(t.dir, name), "r+b") as f:
        f.seek(36)
        entries, at = struct.unpack(">IQ", f.read(12))
        f.seek(at)
        f.write(b"\0" * 8 * entries)


def test_what_is_lost_stands_at_its_place(t):
    t.ok("create", "-q", "-f", "qcow2", "d.qcow2", "10M")
    t.io("d.qcow2", "write -P 0x5a 1M 1M")
    lose_the_table(t, "d.qcow2")
    r = t.drover("convert", "--salvage", "--orphans", "lost", "d.qcow2", "out.raw")
    assert r.code == 0 and r.err.startswith("nothing leads to the "), r
    with open(os.path.join(t.dir, "d.qcow2"), "rb") as image, open(os.path.join(t.dir, "lost"), "rb") as lost:
        a, b = image.read(), lost.read()
    at = a.index(b"\x5a" * (1 << 20))
    assert len(a) == len(b) and b[at:at + (1 << 20)] == b"\x5a" * (1 << 20) and not any(b[:65536])
    assert t.drover("compare", "out.raw", "out.raw").code == 0


def test_mistakes(t):
    t.ok("create", "-q", "-f", "qcow2", "d.qcow2", "1M")
    t.ok("create", "-q", "-f", "vmdk", "d.vmdk", "1M")
    (t.dir / "there").write_text("mine")
    for argv, why in ((["--orphans", "x", "d.qcow2", "out"], "requires --salvage"),
                      (["--salvage", "--orphans", "x", "d.qcow2", "d.qcow2", "out"], "one source only"),
                      (["--salvage", "--orphans", "x", "d.vmdk", "out"], "qcow2 images only"),
                      (["--salvage", "--orphans", "there", "d.qcow2", "out"], "exists already")):
        r = t.drover("convert", *argv)
        assert r.code == 1 and why in r.err, r
        assert not os.path.exists(t.dir / "out") and not os.path.exists(t.dir / "x")
    assert (t.dir / "there").read_text() == "mine"
