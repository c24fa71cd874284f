# SPDX-License-Identifier: LGPL-2.1-or-later
"""amend next to qemu-img's: what is refused and in which words, and what the image is afterwards."""
import json
import shutil

import pytest
from conftest import once, same

REFUSED = [
    ["a.qcow2"], ["-o", "foo=1", "a.qcow2"], ["-f", "raw", "-o", "size=1", "a.qcow2"], ["-o", "cluster_size=4k", "a.qcow2"],
    ["-o", "refcount_bits=3", "a.qcow2"], ["-o", "refcount_bits=x", "a.qcow2"], ["-o", "refcount_bits=0", "a.qcow2"],
    ["-o", "refcount_bits=128", "a.qcow2"], ["-o", "compat=0.10", "bits.qcow2"], ["-o", "compat=0.11", "a.qcow2"], ["-o", "compat=", "a.qcow2"],
    ["-o", "lazy_refcounts=on", "old.qcow2"], ["-o", "refcount_bits=1", "old.qcow2"], ["-o", "lazy_refcounts=x", "a.qcow2"],
    ["-o", "extended_l2=on", "a.qcow2"], ["-o", "data_file=x", "a.qcow2"], ["-o", "data_file_raw=on", "a.qcow2"], ["-o", "size=1000", "a.qcow2"],
    ["-o", "size=3x", "a.qcow2"], ["-o", "backing_file=b", "a.qcow2"], ["-o", "backing_file=base.img", "over.qcow2"],
    ["-o", "backing_fmt=qcow2", "over.qcow2"], ["-o", "preallocation=full", "a.qcow2"], ["-o", "encryption=on", "a.qcow2"],
    ["-o", "encrypt.format=luks", "a.qcow2"], ["-o", "encrypt.iter-time=3", "a.qcow2"], ["-o", "compression_type=zstd", "a.qcow2"],
    ["-o", "nocow=on", "a.qcow2"], ["-t", "bad", "-o", "size=2M", "a.qcow2"], ["-o", "size=2M", "a.qcow2", "extra"],
    ["-f", "bad", "-o", "size=1M", "a.qcow2"], ["-o", "size=1M", "nothere"], ["-o", "help"], ["-f", "raw", "-o", "help"],
    ["-o", "compat=0.10", "data.qcow2"], ["-o", "compat=0.10", "extl2.qcow2"],
    ["-o", "refcount_bits=1", "snap.qcow2"], ["-o", "compat=0.10,size=4M", "snap.qcow2"],
]
DONE = [
    ("a.qcow2", "compat=0.10"), ("a.qcow2", "compat=v2"), ("a.qcow2", "lazy_refcounts=on"), ("a.qcow2", "refcount_bits=1"), ("a.qcow2", "refcount_bits=64"),
    ("a.qcow2", "size=5M"), ("a.qcow2", "size=1M"), ("a.qcow2", "size=0"), ("a.qcow2", "data_file_raw=off"), ("a.qcow2", "refcount_bits=16"),
    ("a.qcow2", "compat=1.1,refcount_bits=8,lazy_refcounts=on,size=9M"), ("bits.qcow2", "compat=0.10,refcount_bits=16"),
    ("old.qcow2", "compat=1.1"), ("old.qcow2", "compat=v3,refcount_bits=2,lazy_refcounts=on"), ("old.qcow2", "size=4M"),
    ("over.qcow2", "compat=0.10"), ("over.qcow2", "refcount_bits=32"), ("over.qcow2", "backing_file=base.img,backing_fmt=raw,lazy_refcounts=on"),
    ("data.qcow2", "data_file_raw=off"), ("data.qcow2", "refcount_bits=8"), ("extl2.qcow2", "refcount_bits=64"), ("zstd.qcow2", "refcount_bits=8"),
    ("snap.qcow2", "refcount_bits=2"), ("snap.qcow2", "refcount_bits=64,lazy_refcounts=on"), ("snap.qcow2", "compat=0.10"),
    ("old-snap.qcow2", "compat=1.1"), ("packed.qcow2", "refcount_bits=8"), ("packed.qcow2", "compat=0.10"),
]


def make(t):
    """One image of each kind, with data, zeros of both kinds, and a hole."""
    def image(name, *options, backing=None):
        args = ["-b", backing, "-F", "raw"] if backing else []
        for o in options:
            args += ["-o", o]
        assert t.real("qemu-img", "create", "-q", "-f", "qcow2", *args, name, "3M").code == 0
        r = t.real("qemu-io", "-c", "write -P 5 100k 300k", "-c", "write -P 6 1M 128k", "-c", "write -z 1M 64k", "-c", "write -zu 1536k 128k", name)
        assert r.code == 0, r
    t.real("qemu-img", "create", "-q", "-f", "raw", "base.img", "2M")
    t.real("qemu-io", "-f", "raw", "-c", "write -P 9 0 2M", "base.img")
    image("a.qcow2")
    image("bits.qcow2", "refcount_bits=8")
    image("old.qcow2", "compat=0.10")
    image("over.qcow2", backing="base.img")
    image("data.qcow2", "data_file=the.data,data_file_raw=on")
    image("extl2.qcow2", "extended_l2=on")
    image("zstd.qcow2", "compression_type=zstd")
    for name, options in (("snap.qcow2", []), ("old-snap.qcow2", ["compat=0.10"])):
        assert t.real("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", *options] if options else []), name, "3M").code == 0
        t.real("qemu-io", "-c", "write -P 5 100k 300k", "-c", "write -zu 2M 64k" if not options else "read 0 1", name)
        t.real("qemu-img", "snapshot", "-c", "one", name)
        t.real("qemu-io", "-c", "write -P 7 130k 100k", name)
    assert t.real("qemu-img", "convert", "-c", "-O", "qcow2", "a.qcow2", "packed.qcow2").code == 0


def state(t, name):
    info = json.loads(t.real("qemu-img", "info", "--output=json", name).out)
    for gone in ("actual-size", "children"):
        info.pop(gone, None)
    return info


def content(t, name, *options):
    r = t.real("qemu-img", "convert", *options, "-O", "raw", name, "content.raw")
    assert r.code == 0, r
    return (t.dir / "content.raw").read_bytes()


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_what_is_refused(t, args):
    once(t, "amend", lambda: make(t))
    same(t.ours("qemu-img", "amend", *args), t.real("qemu-img", "amend", *args))


@pytest.mark.parametrize("name, options", DONE)
def test_what_is_done(t, name, options):
    once(t, "amend", lambda: make(t))
    snapshots = [[]] if "snap" not in name else [[], ["-l", "one"]]
    before = [content(t, name, *s) for s in snapshots]
    shutil.copy(t.dir / name, t.dir / "kept")
    ours = t.ours("qemu-img", "amend", "-o", options, name)
    assert ours.code == 0, ours
    assert t.real("qemu-img", "check", name).code == 0
    our_state, our_content = state(t, name), [content(t, name, *s) for s in snapshots]
    r = t.real("qemu-io", "-c", "write -P 3 300k 200k", "-c", "read -P 3 300k 200k", name)
    assert r.code == 0 and "failed" not in r.out, r
    assert t.real("qemu-img", "check", name).code == 0
    shutil.copy(t.dir / "kept", t.dir / name)
    same(ours, t.real("qemu-img", "amend", "-o", options, name))
    assert our_state == state(t, name)
    for old, new in zip(before, our_content):
        n = min(len(old), len(new))
        assert old[:n] == new[:n] and not any(new[n:])


def test_the_data_file_gets_another_name(t):
    once(t, "amend", lambda: make(t))
    before = content(t, "data.qcow2")
    t.ok("amend", "-o", "data_file=moved.data", "data.qcow2")
    (t.dir / "the.data").rename(t.dir / "moved.data")
    assert content(t, "data.qcow2") == before
    assert state(t, "data.qcow2")["format-specific"]["data"]["data-file"] == "moved.data"


def test_progress_ends_with_all_of_it(t):
    once(t, "amend", lambda: make(t))
    for options in ("compat=0.10", "compat=1.1,refcount_bits=1", "size=4M"):
        ours = t.ours("qemu-img", "amend", "-p", "-o", options, "a.qcow2")
        assert ours.code == 0 and ours.out.endswith("    (100.00/100%)\r\n"), ours


def test_a_smaller_size_must_be_meant(t):
    once(t, "amend", lambda: make(t))
    r = t.drover("amend", "-o", "size=1M", "a.qcow2")
    assert r.code == 1 and "would lose" in r.err and state(t, "a.qcow2")["virtual-size"] == 3 << 20, r
    t.ok("amend", "--force", "-o", "size=1M", "a.qcow2")
    assert state(t, "a.qcow2")["virtual-size"] == 1 << 20


def test_what_version_2_cannot_hold_of_a_snapshot_is_refused(t):
    once(t, "amend", lambda: make(t))
    t.real("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "x.qcow2")
    t.real("qemu-io", "-c", "write -zu 64k 64k", "x.qcow2")
    t.real("qemu-img", "snapshot", "-c", "one", "x.qcow2")
    before = (t.dir / "x.qcow2").read_bytes()
    r = t.drover("amend", "-o", "compat=0.10", "x.qcow2")
    assert r.code == 1 and "a snapshot has zeros that version 2 could hold only as data" in r.err, r
    assert (t.dir / "x.qcow2").read_bytes() == before


def test_a_compression_that_version_2_has_no_word_for_is_refused(t):
    """QEMU 7.2 makes it a version 2 image, which is read as deflate from then on."""
    once(t, "amend", lambda: make(t))
    r = t.ours("qemu-img", "amend", "-o", "compat=0.10", "zstd.qcow2")
    assert r.code == 1 and r.err == "qemu-img: Cannot downgrade an image with incompatible features 0x8 set\n", r


def test_bitmaps_are_not_dropped(t):
    once(t, "amend", lambda: make(t))
    assert t.real("qemu-img", "bitmap", "--add", "a.qcow2", "b0").code == 0
    r = t.drover("amend", "-o", "compat=0.10", "a.qcow2")
    assert r.code == 1 and "has bitmaps" in r.err, r
    t.ok("amend", "-o", "refcount_bits=8,lazy_refcounts=on", "a.qcow2")
    assert [b["name"] for b in state(t, "a.qcow2")["format-specific"]["data"]["bitmaps"]] == ["b0"]
    assert t.real("qemu-img", "check", "a.qcow2").code == 0


def test_the_list_of_what_can_be_amended(t):
    assert "backing_file" not in t.ok("backup", "-o", "help")  # which a backup does not take
    for options in (["-f", "qcow2", "-o", "help"], ["-f", "qcow2", "-o", "?"]):
        ours, real = t.ours("qemu-img", "amend", *options), t.real("qemu-img", "amend", *options)
        real.out = "".join(line for line in real.out.splitlines(True) if "encrypt." not in line)
        same(ours, real)
