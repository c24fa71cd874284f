# SPDX-License-Identifier: LGPL-2.1-or-later
"""create and snapshot for add-cow: a pair of files, with any names, all of it or nothing."""
import json
import os
import shutil
import subprocess

import pytest
from conftest import DROVER

MIB = 1 << 20


def info(t, image, **kw):
    return json.loads(t.ok("info", "--output=json", image, **kw))


def pattern(t, image, byte, off, length, fmt="raw"):
    t.io(image, f"write -P {byte} {off} {length}", fmt=fmt)


def base(t, name="base.img", size="4M"):
    t.ok("create", "-q", name, size)
    pattern(t, name, 1, 0, "1M")


def same_view(t, a, b):
    r = t.drover("compare", a, b)
    assert r.code == 0, r


def state(t):
    """Every file below the working directory, with what it holds."""
    found = {}
    for p in sorted(t.dir.rglob("*")):
        found[str(p.relative_to(t.dir))] = p.read_bytes() if p.is_file() else None
    return found


def refused(t, *args, word, **kw):
    before = state(t)
    r = t.drover(*args, **kw)
    assert r.code == 1 and r.err.startswith("drover: ") and r.err.strip().count("\n") <= 1, r
    assert ".drover." not in r.err and word in r.err, r.err
    assert state(t) == before
    return r.err


# ---------------------------------------------------------------------- what is made

@pytest.mark.parametrize("more", [[], ["-F", "raw"]])
@pytest.mark.parametrize("how", [["-b", "base.img"], ["-o", "backing_file=base.img"],
                                 ["-o", "backing_file=base.img,backing_fmt=raw"]], ids=" ".join)
def test_a_child_of_a_raw_disk(t, how, more):
    base(t)
    t.ok("create", "-q", "-f", "add-cow", *how, *more, "-o", "image_file=own.raw", "disk.add-cow")
    assert t.names() == ["base.img", "disk.add-cow", "own.raw"]
    told = info(t, "disk.add-cow")
    assert (told["format"], told["virtual-size"]) == ("add-cow", 4 * MIB)
    assert (told["backing-filename"], told["backing-filename-format"]) == ("base.img", "raw")
    assert told["format-specific"]["data"]["image-file"] == "own.raw"
    assert os.path.getsize(t.dir / "own.raw") == 4 * MIB and os.stat(t.dir / "own.raw").st_blocks == 0
    assert os.path.getsize(t.dir / "disk.add-cow") == 2560 + 4 * MIB // 512 // 8
    same_view(t, "disk.add-cow", "base.img")


def test_the_raw_file_is_called_after_the_disk(t):
    t.ok("create", "-q", "-f", "add-cow", "disk.add-cow", "1M")
    t.ok("create", "-q", "-f", "add-cow", "other", "1M")
    assert t.names() == ["disk.add-cow", "disk.raw", "other", "other.raw"]


def test_the_command_tells_what_it_makes(t):
    base(t)
    out = t.ok("create", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "disk.add-cow")
    assert out.startswith("Formatting 'disk.add-cow', fmt=add-cow size=4194304 backing_file=base.img")
    assert "image_file=own.raw" in out


@pytest.mark.parametrize("fmt", ["vmdk", "add-cow"])
def test_a_parent_of_another_format_must_be_told(t, fmt):
    t.ok("create", "-q", "-f", fmt, "base", "1M")
    told = refused(t, "create", "-f", "add-cow", "-b", "base", "disk.add-cow", word="-F")
    assert fmt in told
    t.ok("create", "-q", "-f", "add-cow", "-b", "base", "-F", fmt, "disk.add-cow")
    told = info(t, "disk.add-cow")
    assert (told["backing-filename"], told["backing-filename-format"]) == ("base", fmt)


def test_a_raw_parent_is_never_taken_for_another_format(t):
    base(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "disk.add-cow")
    t.ok("create", "-q", "-f", "vmdk", "header.vmdk", "1M")
    head = (t.dir / "header.vmdk").read_bytes()[:4096]
    with open(t.dir / "base.img", "r+b") as f:  # a guest may write what it likes
        f.write(head)
    t.ok("convert", "disk.add-cow", "view.raw")
    assert (t.dir / "view.raw").read_bytes()[:4096] == head


def test_sizes(t):
    base(t)
    for size in ("1M", "9M", "1", "4194305"):
        t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", f"d{size}.add-cow", size)
    assert info(t, "d1M.add-cow")["virtual-size"] == MIB
    assert info(t, "d9M.add-cow")["virtual-size"] == 9 * MIB
    assert info(t, "d1.add-cow")["virtual-size"] == 1
    t.ok("convert", "d9M.add-cow", "view.raw")
    assert (t.dir / "view.raw").read_bytes() == (t.dir / "base.img").read_bytes() + bytes(5 * MIB)


def test_qemu_img_makes_one_too(t):
    base(t)
    assert t.ours("qemu-img", "create", "-q", "-f", "add-cow", "-b", "base.img", "-F", "raw", "d.add-cow").code == 0
    r = t.ours("qemu-img", "create", "-q", "-f", "add-cow", "-b", "base.img", "e.add-cow")
    assert r.code == 1 and "Backing file specified without backing format" in r.err


def test_the_pair_can_be_moved(t):
    (t.dir / "a").mkdir()
    base(t, "a/base.img")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", f"image_file={t.dir}/a/own.raw", "a/disk.add-cow")
    os.rename(t.dir / "a", t.dir / "b")
    assert info(t, "b/disk.add-cow")["format-specific"]["data"]["image-file"] == "own.raw"
    same_view(t, "b/disk.add-cow", "b/base.img")


def test_made_from_another_directory(t):
    for d in ("images", "elsewhere"):
        (t.dir / d).mkdir()
    base(t, "images/base.img")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "../images/disk.add-cow",
         cwd=t.dir / "elsewhere")
    assert sorted(os.listdir(t.dir / "images")) == ["base.img", "disk.add-cow", "own.raw"]
    assert os.listdir(t.dir / "elsewhere") == []
    same_view(t, "images/disk.add-cow", "images/base.img")


def test_a_raw_file_in_a_directory_below(t):
    (t.dir / "sub").mkdir()
    base(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=sub/own.raw", "disk.add-cow")
    assert os.listdir(t.dir / "sub") == ["own.raw"]
    same_view(t, "disk.add-cow", "base.img")
    refused(t, "create", "-f", "add-cow", "-b", "base.img", "-o", "image_file=nope/own.raw", "x.add-cow", word="nope")


def test_all_names_of_a_pair_are_durable(t):
    with open(DROVER, "rb") as f:
        if b"__asan_init" in (text := f.read()) or b"__tsan_init" in text or not shutil.which("strace"):
            pytest.skip("needs strace, which the leak checker does not stand")
    (t.dir / "sub").mkdir()
    base(t)
    done = subprocess.run(["strace", "-f", "-y", "-o", t.dir / "trace", "-e", "trace=fsync,fdatasync,pwrite64", DROVER, "create", "-q",
                           "-f", "add-cow", "-b", "base.img", "-F", "raw", "-o", "image_file=sub/own.raw", "disk.add-cow"],
                          cwd=t.dir, capture_output=True, check=False)
    assert done.returncode == 0, done
    trace = (t.dir / "trace").read_text()
    header = trace.index("ADD_COW")
    raw, below = trace.index("/sub/own.raw>)"), trace.index("/sub>)")
    assert raw < below < header < trace.index("sync(", header) < trace.rindex(f"<{t.dir.resolve()}>)")


# ---------------------------------------------------------------------- raw files that exist

def test_a_raw_disk_that_exists_becomes_the_disk(t):
    base(t, "own.raw")
    before = (t.dir / "own.raw").read_bytes()
    t.ok("create", "-q", "-f", "add-cow", "-o", "image_file=own.raw", "disk.add-cow", "4M")
    assert (t.dir / "own.raw").read_bytes() == before
    t.ok("convert", "disk.add-cow", "view.raw")
    assert (t.dir / "view.raw").read_bytes() == before


def test_an_empty_one_is_taken(t):
    base(t)
    t.ok("create", "-q", "own.raw", "4M")
    inode = os.stat(t.dir / "own.raw").st_ino
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "disk.add-cow")
    assert os.stat(t.dir / "own.raw").st_ino == inode
    same_view(t, "disk.add-cow", "base.img")


def test_one_with_data_is_not_hidden_unasked(t):
    base(t)
    base(t, "own.raw")
    pattern(t, "own.raw", 7, 0, 512)
    refused(t, "create", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "disk.add-cow", word="reuse=on")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw,reuse=on", "disk.add-cow")
    same_view(t, "disk.add-cow", "base.img")


def test_one_of_another_size_is_refused(t):
    base(t)
    t.ok("create", "-q", "own.raw", "1M")
    refused(t, "create", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "disk.add-cow", word="1048576")


# ---------------------------------------------------------------------- names

NAMES = ["with space", "comma,comma", "new\nline", "quote\"'s", "ü", os.fsdecode(b"\xff\xfe"), "x" * 240, "-dash", "%s%n"]


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:20])
def test_any_name_will_do(t, name):
    base(t, f"./{name}.img")
    double = name.replace(",", ",,")
    t.ok("create", "-q", "-f", "add-cow", "-o", f"backing_file={double}.img,image_file={double}.r", f"./{name}.ac")
    assert t.names() == sorted([f"{name}.img", f"{name}.r", f"{name}.ac"])
    same_view(t, f"./{name}.ac", f"./{name}.img")
    t.io(f"./{name}.ac", "write -P 4 2M 64k")
    t.ok("convert", f"./{name}.ac", "want.raw")
    t.ok("stream", "-q", "--retire", f"./{name}.ac")
    assert (t.dir / f"{name}.r").read_bytes() == (t.dir / "want.raw").read_bytes()


def test_a_parents_name_with_format_must_be_utf8(t):
    name = os.fsdecode(b"b\xff")
    t.ok("create", "-q", "-f", "vmdk", name, "1M")
    refused(t, "create", "-f", "add-cow", "-b", name, "-F", "vmdk", "disk.add-cow", word="UTF-8")


@pytest.mark.parametrize("length,fits", [(499, True), (500, True), (1023, True), (1024, False), (3000, False)])
def test_long_names(t, length, fits):
    base(t)
    tail = "base.img"
    long = "./" * ((length - len(tail)) // 2) + ("" if (length - len(tail)) % 2 == 0 else "/") + tail
    long = long.replace(".//", "./", 1) if len(long) != length else long
    assert len(long) == length
    args = ["create", "-q", "-f", "add-cow", "-b", long, "disk.add-cow"]
    if not fits:
        refused(t, *args, word="1023")
        return
    t.ok(*args)
    assert info(t, "disk.add-cow")["backing-filename"] == long
    same_view(t, "disk.add-cow", "base.img")
    t.ok("rebase", "-u", "-b", "base.img", "disk.add-cow")
    t.ok("rebase", "-u", "-b", long, "disk.add-cow")
    same_view(t, "disk.add-cow", "base.img")


@pytest.mark.parametrize("length,fits", [(1023, True), (1024, False)])
def test_long_image_names(t, length, fits):
    (t.dir / "s").mkdir()
    own = "s/" * 1 + "../s/" * ((length - 2) // 5) + "x" * ((length - 2) % 5 or 5)
    own = own[:length] if len(own) >= length else own
    assert len(own) == length
    args = ["create", "-q", "-f", "add-cow", "-o", f"image_file={own}", "disk.add-cow", "1M"]
    if fits:
        t.ok(*args)
        t.io("disk.add-cow", "write -P 4 0 64k")
    else:
        refused(t, *args, word="1023")


# ---------------------------------------------------------------------- refusals

@pytest.mark.parametrize("args,word", [
    (["-b", "nope.img", "x.add-cow"], "No such file"),
    (["-b", "base.img", "-F", "nope", "x.add-cow"], "nope"),
    (["-b", "base.img", "-F", "vmdk", "x.add-cow"], "VMDK"),
    (["x.add-cow"], "size"),
    (["-b", "base.img", "-o", "image_file=base.img", "x.add-cow"], "base.img"),
    (["-b", "base.img", "-o", "image_file=x.add-cow", "x.add-cow"], "metadata"),
    (["-b", "base.img", "-o", "image_file=", "x.add-cow"], "empty"),
    (["-b", "base.img", "-o", "image_file=/etc/own.raw", "x.add-cow"], "directory"),
    (["-b", "base.img", "-o", "image_file=../own.raw", "x.add-cow"], "directory"),
    (["-b", "base.img", "-o", "layout=v20", "x.add-cow"], "v20"),
    (["-b", "base.img", "-o", "layout=v9", "x.add-cow"], "v9"),
    (["-b", "base.img", "-o", "cluster_size=64k", "x.add-cow"], "cluster_size"),
    (["-b", "dir", "x.add-cow"], "dir"),
    (["-b", "base.img", "nodir/x.add-cow"], "nodir"),
], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_bad_requests_change_nothing(t, args, word):
    base(t)
    (t.dir / "dir").mkdir()
    refused(t, "create", "-f", "add-cow", *args, word=word)


def test_a_vmdk_cannot_stand_on_an_add_cow(t):
    t.ok("create", "-q", "-f", "add-cow", "disk.add-cow", "1M")
    refused(t, "create", "-f", "vmdk", "-b", "disk.add-cow", "-F", "add-cow", "child.vmdk", word="VMDK")
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "child.vmdk")
    refused(t, "rebase", "-b", "disk.add-cow", "-F", "add-cow", "child.vmdk", word="VMDK")


def test_a_qcow2_parent_shows_through(t):
    t.real("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    t.real("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 9k", "base.qcow2")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.qcow2", "-F", "qcow2", "x.add-cow")
    t.ok("io", "-c", "read -P 7 100k 9k", "-c", "read -P 0 109k 90k", "x.add-cow")


# ---------------------------------------------------------------------- snapshots

def test_snapshots_are_numbered(t):
    base(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "disk.add-cow")
    t.io("disk.add-cow", "write -P 2 1M 64k")
    assert t.ok("snapshot", "-c", "disk.add-cow") == "disk-000001.add-cow\n"
    assert t.ok("snapshot", "-c", "disk-000001.add-cow") == "disk-000002.add-cow\n"
    assert t.names() == ["base.img", "disk-000001.add-cow", "disk-000001.raw", "disk-000002.add-cow", "disk-000002.raw",
                         "disk.add-cow", "disk.raw"]
    same_view(t, "disk-000002.add-cow", "disk.add-cow")
    assert info(t, "disk-000001.add-cow")["backing-filename-format"] == "add-cow"
    tree = t.ok("snapshot", "-l", "disk.add-cow")
    assert all(n in tree for n in ("base.img", "disk-000002.add-cow")) and "does not open" not in tree


def test_a_snapshot_takes_no_file_that_exists(t):
    t.ok("create", "-q", "-f", "add-cow", "disk.add-cow", "1M")
    (t.dir / "disk-000001.raw").write_text("mine")
    assert t.ok("snapshot", "-c", "disk.add-cow") == "disk-000002.add-cow\n"
    (t.dir / "named.raw").write_text("mine too")
    t.ok("create", "-q", "empty.raw", "1M")  # what create would take, a snapshot does not
    refused(t, "snapshot", "-c", "empty.add-cow", "disk.add-cow", word="empty.raw")
    refused(t, "snapshot", "-c", "named.add-cow", "disk.add-cow", word="named.raw")
    refused(t, "snapshot", "-c", "disk-000002.add-cow", "disk.add-cow", word="exists already")
    assert (t.dir / "named.raw").read_text() == "mine too"


def test_a_raw_file_that_is_taken(t):
    """Two disks in one file would write over each other."""
    base(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "one.add-cow")
    refused(t, "create", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "two.add-cow",
            word="its image file own.raw is that of one.add-cow already")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw,reuse=on", "two.add-cow")


@pytest.mark.parametrize("link", [False, True])
def test_a_raw_file_that_is_taken_in_its_own_directory(t, link):
    """The one who has it may stand beside it, and a link may lead there."""
    base(t)
    (t.dir / "sub").mkdir()
    (t.dir / "sub" / "base.img").symlink_to("../base.img")
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "--allow-path", t.dir,
         "sub/one.add-cow")
    if link:
        (t.dir / "here.raw").symlink_to("sub/own.raw")
    name = "here.raw" if link else "sub/own.raw"
    refused(t, "create", "-f", "add-cow", "-b", "base.img", "-o", "image_file=" + name, "two.add-cow",
            word="is that of %s/sub/one.add-cow already" % t.dir)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=%s,reuse=on" % name, "two.add-cow")


def test_an_image_made_again_has_its_own_raw_file(t):
    """It is its own metadata that names the file."""
    base(t)
    for _ in range(2):
        t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "-o", "image_file=own.raw", "one.add-cow")


@pytest.mark.parametrize("how", ["lost", "cut", "gone"])
def test_a_raw_file_that_lost_its_bytes(t, how):
    base(t)
    t.ok("create", "-q", "-f", "add-cow", "-b", "base.img", "disk.add-cow")
    raw = t.dir / "disk.raw"
    if how == "gone":
        raw.unlink()
        refused(t, "info", "disk.add-cow", word='its image file "disk.raw" does not exist')
        return
    os.truncate(raw, 0 if how == "lost" else MIB)
    if how == "lost":
        refused(t, "convert", "-O", "raw", "disk.add-cow", "out",
                word='its image file "disk.raw" is empty, but there are bits for a disk of')
        return
    r = t.drover("check", "disk.add-cow")
    assert r.code == 2 and "that was cut, or a change of size did not finish" in r.out + r.err, r
