# SPDX-License-Identifier: LGPL-2.1-or-later
"""The point of add-cow: a raw disk is overlaid, written, streamed and retired, and is a raw disk again."""
import json
import os
import random
import shutil

import pytest
from conftest import DROVER, TOP
from stopping import stopped

MIB = 1 << 20
PRELOAD = os.environ.get("DROVER_PRELOAD",
                         os.path.join(os.path.dirname(DROVER), "tests", "crash", "libdrover-preload.so"))


def content(t, image, name="view.raw"):
    """What the disk shows, as bytes."""
    t.ok("convert", "-O", "raw", image, name)
    data = (t.dir / name).read_bytes()
    (t.dir / name).unlink()
    size = json.loads(t.ok("info", "--output=json", image))["virtual-size"]
    assert data[size:] == bytes(-size % 512)  # a new raw disk ends with a sector
    return data[:size]


def overlay(t, size=8 * MIB, parent="base.raw", fmt="raw", create=()):
    """A parent with data, holes and written zeros; an add-cow on it with writes of every kind."""
    rnd = random.Random(size)
    t.ok("create", "-q", "-f", fmt, parent, size)
    t.io(parent, "write -P 1 0 1M", "write -P 2 1300k 600k", "write -z 1M 64k", f"write -P 3 {size - 700} 700", fmt=fmt)
    t.ok("create", "-q", "-f", "add-cow", "-b", parent, "-F", fmt, *create, "disk.add-cow")
    commands = [f"write -P {rnd.randrange(4, 250)} {rnd.randrange(size - 70000)} {rnd.randrange(1, 70000)}" for _ in range(30)]
    t.io("disk.add-cow", *commands, "write -z 700k 600k", "write -P 7 511 2", "discard 1M 128k", f"write -P 8 {size - 1} 1")
    return content(t, "disk.add-cow")


def is_the_raw_disk(t, name, want):
    assert (t.dir / name).read_bytes() == want
    info = json.loads(t.real("qemu-img", "info", "--output=json", name).out)
    assert (info["format"], info["virtual-size"]) == ("raw", len(want)) and "backing-filename" not in info
    (t.dir / "want").write_bytes(want)
    assert t.real("qemu-img", "compare", "-f", "raw", "-F", "raw", name, "want").code == 0
    (t.dir / "want").unlink()


@pytest.mark.parametrize("parent,fmt", [("base.raw", "raw"), ("base.vmdk", "vmdk")])
def test_a_streamed_disk_is_retired_to_a_plain_raw_disk(t, parent, fmt):
    want = overlay(t, parent=parent, fmt=fmt)
    before = (t.dir / parent).read_bytes()
    t.ok("stream", "disk.add-cow")
    assert content(t, "disk.add-cow") == want
    assert "backing file" not in t.ok("info", "disk.add-cow")
    out = t.ok("addcow", "retire", "disk.add-cow")
    assert out == "disk.raw is the whole disk now: a raw image that needs no other file. disk.add-cow is gone.\n"
    assert t.names() == sorted([parent, "disk.raw"])
    assert (t.dir / parent).read_bytes() == before
    is_the_raw_disk(t, "disk.raw", want)


def test_a_disk_in_a_backup_is_used_at_once_and_restored_meanwhile(t):
    t.ok("create", "-q", "disk.raw", "4M")
    t.io("disk.raw", "write -P 1 0 1M", "write -P 2 3M 100k", fmt="raw")
    t.ok("vma", "create", "backup.vma", "-d", "drive-scsi0=disk.raw")
    t.ok("create", "-q", "-f", "add-cow", "-b", "vma:backup.vma#drive-scsi0", "-F", "vma", "new.add-cow")
    assert content(t, "new.add-cow") == (t.dir / "disk.raw").read_bytes()
    t.io("new.add-cow", "write -P 3 100k 1M")
    want = content(t, "new.add-cow")
    t.ok("stream", "-q", "--retire", "new.add-cow")
    (t.dir / "backup.vma").unlink()
    is_the_raw_disk(t, "new.raw", want)


def test_stream_retires_in_one_go(t):
    want = overlay(t)
    out = t.ok("stream", "-q", "--retire", "disk.add-cow")
    assert out == ""
    assert t.names() == ["base.raw", "disk.raw"]
    is_the_raw_disk(t, "disk.raw", want)


def test_the_metadata_can_be_kept(t):
    want = overlay(t)
    out = t.ok("stream", "--retire", "--keep", "disk.add-cow")
    assert "disk.add-cow is put away as disk.add-cow.done." in out
    assert t.names() == ["base.raw", "disk.add-cow.done", "disk.raw"]
    is_the_raw_disk(t, "disk.raw", want)
    # a run that was killed behind the renaming is repeated
    assert "is the whole disk now" in t.ok("addcow", "retire", "--keep", "disk.add-cow")
    r = t.drover("addcow", "retire", "disk.add-cow")
    assert r.code == 1 and "No such file" in r.err


def test_holes_stay_holes(t):
    t.ok("create", "-q", "base.raw", "1G")
    t.io("base.raw", "write -P 1 500M 1M", fmt="raw")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", "disk.add-cow")
    t.ok("stream", "--retire", "disk.add-cow")
    assert os.stat(t.dir / "disk.raw").st_blocks * 512 <= 2 * MIB
    assert t.drover("compare", "-f", "raw", "-F", "raw", "base.raw", "disk.raw").code == 0


def test_a_disk_without_parents_can_be_retired_after_a_stream(t):
    t.ok("create", "-q", "-f", "add-cow", "disk.add-cow", "4M")
    t.io("disk.add-cow", "write -P 5 1M 64k")
    want = content(t, "disk.add-cow")
    t.ok("stream", "disk.add-cow")
    t.ok("addcow", "retire", "disk.add-cow")
    is_the_raw_disk(t, "disk.raw", want)


@pytest.mark.parametrize("size", [1, 511, 513, 4097, MIB + 100])
def test_odd_sizes(t, size):
    (t.dir / "base.raw").write_bytes(bytes(range(1, 256)) * (size // 255 + 1))
    os.truncate(t.dir / "base.raw", size)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", "disk.add-cow")
    want = content(t, "disk.add-cow")
    assert len(want) == size
    t.ok("stream", "--retire", "disk.add-cow")
    assert (t.dir / "disk.raw").read_bytes() == want


# ---------------------------------------------------------------------- refusals

def state(t):
    return {n: (t.dir / n).read_bytes() for n in t.names()}


def refused(t, *args):
    before = state(t)
    r = t.drover(*args)
    assert r.code == 1 and r.err.startswith("drover: ") and r.err.count("\n") <= 2, r
    assert state(t) == before
    return r.err


def test_says_what_is_missing(t):
    t.ok("create", "-q", "base.raw", "1M")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", "disk.add-cow")
    t.io("disk.add-cow", "write -P 1 0 64k", "write -P 1 128k 512")
    told = refused(t, "addcow", "retire", "disk.add-cow")
    missing = MIB - 65536 - 512
    assert f"{missing} of {MIB} bytes are not in disk.raw yet, the first at offset 65536" in told
    assert "drover stream" in told


def test_children_are_told_and_kept(t):
    overlay(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "disk.add-cow", "-F", "add-cow", "child.add-cow")
    for args in (["stream", "--retire", "disk.add-cow"], ["stream", "disk.add-cow"]):
        if "--retire" in args:
            assert "child.add-cow" in refused(t, *args)
        else:
            t.ok(*args)
    t.ok("create", "-q", "-f", "add-cow", "-b", "disk.add-cow", "-F", "add-cow", "brother.add-cow")
    assert ": brother.add-cow, child.add-cow; rebase them" in refused(t, "addcow", "retire", "disk.add-cow")
    want = content(t, "child.add-cow")
    for child in ("brother.add-cow", "child.add-cow"):
        t.ok("rebase", "-u", "-b", "disk.raw", "-F", "raw", child)
    t.ok("addcow", "retire", "disk.add-cow")
    assert content(t, "child.add-cow") == want


def test_force_goes_over_children(t):
    overlay(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "disk.add-cow", "-F", "add-cow", "child.add-cow")
    t.ok("stream", "--retire", "--force", "disk.add-cow")
    assert "disk.add-cow" not in t.names()


@pytest.mark.parametrize("args", [["base.raw"], ["base.vmdk"]])
def test_other_formats_have_nothing_to_retire(t, args):
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "1M")
    t.ok("create", "-q", "base.raw", "1M")
    assert "do not keep their disk in a plain file" in refused(t, "addcow", "retire", *args)
    assert "do not keep their disk in a plain file" in refused(t, "stream", "--retire", *args)


@pytest.mark.parametrize("args", [["addcow"], ["addcow", "retire"], ["addcow", "x", "y"], ["addcow", "retire", "a", "b"],
                                  ["stream", "--keep", "disk.add-cow"], ["stream", "--force", "disk.add-cow"],
                                  ["stream", "--retire", "--base", "base.raw", "disk.add-cow"]])
def test_wrong_use(t, args):
    t.ok("create", "-q", "base.raw", "1M")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", "disk.add-cow")
    assert "--help" in refused(t, *args)


def test_a_missing_parent_does_not_matter_when_all_is_there(t):
    t.ok("create", "-q", "base.raw", "1M")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", "disk.add-cow")
    t.io("disk.add-cow", "write -P 9 0 1M")
    (t.dir / "base.raw").unlink()
    t.ok("addcow", "retire", "disk.add-cow")
    assert (t.dir / "disk.raw").read_bytes() == b"\x09" * MIB


def test_a_disk_in_use_is_not_retired(t):
    import subprocess
    t.ok("create", "-q", "-f", "add-cow", "disk.add-cow", "1M")
    t.ok("stream", "disk.add-cow")
    p = subprocess.Popen([t.bin / "drover", "io", "disk.add-cow"], cwd=t.dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert p.stdout.read(8) == b"drover> "
        r = t.drover("addcow", "retire", "disk.add-cow")
        assert r.code == 1 and "disk.add-cow" in t.names()
    finally:
        p.communicate(b"quit\n", timeout=20)
    t.ok("addcow", "retire", "disk.add-cow")


# ---------------------------------------------------------------------- killed

def killed_at(t, n, *args):
    env = {"LD_PRELOAD": PRELOAD, "DROVER_WATCH": os.path.realpath(t.dir), "DROVER_KILL_AT": str(n),
           "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}
    return t.drover(*args, env=env)


def changes(t, *args):
    count = t.dir.parent / "count"
    env = {"LD_PRELOAD": PRELOAD, "DROVER_WATCH": os.path.realpath(t.dir), "DROVER_COUNT": str(count),
           "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}
    r = t.drover(*args, env=env)
    assert r.code == 0, r
    return int(count.read_text())


def points(total, limit):
    return sorted({1 + i * total // limit for i in range(limit)} | set(range(max(1, total - 11), total + 1)))


def test_keeping_takes_nobodys_name(t):
    overlay(t)
    t.ok("stream", "-q", "disk.add-cow")
    with open(DROVER, "rb") as f:
        sanitized = b"__asan_init" in (program := f.read()) or b"__tsan_init" in program
    done = t.dir / "disk.add-cow.done"
    with stopped(t.dir, "newfstatat", DROVER, "addcow", "retire", "--keep", "disk.add-cow", path=str(done.resolve()), sanitized=sanitized) as p:
        done.write_bytes(b"precious")
    assert p.returncode == 1 and "disk.add-cow.done" in p.err
    assert done.read_bytes() == b"precious" and "disk.add-cow" in t.names()


def test_a_killed_stream_keeps_what_it_saved_now_and_then(t):
    if not os.path.exists(PRELOAD):
        pytest.skip(f"{PRELOAD} is not built")
    with open(t.dir / "base.raw", "wb") as f:
        for i in range(224):
            f.write(bytes([i + 1]) * MIB)
    for name in ("counted", "disk"):
        t.ok("create", "-q", "-f", "add-cow", "-b", "base.raw", f"{name}.add-cow")
    total = changes(t, "stream", "-q", "-t", "unsafe", "counted.add-cow")
    # It saves after 128 MiB. While one thread does that another goes on, and must not be done before it.
    r = killed_at(t, total * 97 // 100, "stream", "-t", "unsafe", "disk.add-cow")
    assert r.code == -9, r
    copied = json.loads(t.ok("info", "--output=json", "disk.add-cow"))["format-specific"]["data"]["copied-in"]
    assert 100 * MIB < copied < 224 * MIB
    t.ok("stream", "-q", "--retire", "disk.add-cow")
    assert t.drover("compare", "-f", "raw", "-F", "raw", "base.raw", "disk.raw").code == 0


@pytest.mark.parametrize("keep", [[], ["--keep"]], ids=["gone", "kept"])
def test_killed_anywhere_it_reads_the_same_and_goes_on(t, keep):
    if not os.path.exists(PRELOAD):
        pytest.skip(f"{PRELOAD} is not built")
    want = overlay(t, size=2 * MIB + 300)
    start = t.dir.parent / "start"
    shutil.copytree(t.dir, start)
    command = ["stream", "-q", "--retire", *keep, "disk.add-cow"]
    total = changes(t, *command)
    assert total > 10
    for n in points(total, 25):
        shutil.rmtree(t.dir)
        shutil.copytree(start, t.dir)
        r = killed_at(t, n, *command)
        assert r.code in (-9, 0), (n, r)
        if "disk.add-cow" in t.names():
            assert content(t, "disk.add-cow") == want, n
            t.ok(*command)
        assert "disk.add-cow" not in t.names(), n
        assert (t.dir / "disk.raw").read_bytes() == want, n
        assert t.names() == sorted(["base.raw", "disk.raw"] + (["disk.add-cow.done"] if keep else [])), n
    is_the_raw_disk(t, "disk.raw", want)
