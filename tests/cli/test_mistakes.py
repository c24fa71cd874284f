# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people mistype and leave out: the command refuses before anything is made or lost."""
import os

import pytest


def test_a_backing_format_needs_a_backing_file(t):
    r = t.drover("create", "-f", "vmdk", "-F", "vmdk", "x.vmdk", "1M")
    assert r.code == 1 and "Backing format cannot be used without backing file" in r.err, r
    t.ok("create", "a.raw", "1M")
    r = t.drover("convert", "-O", "vmdk", "-F", "vmdk", "a.raw", "x.vmdk")
    assert r.code == 1 and "Backing format cannot be used without backing file" in r.err, r
    assert t.names() == ["a.raw"]


def test_a_mistyped_device_is_no_file(t):
    typo = f"/dev/drover-typo-{os.getpid()}"
    if not os.access("/dev", os.W_OK):
        pytest.skip("only root can make files in /dev")
    t.ok("create", "a.raw", "1M")
    t.ok("vma", "create", "-d", "d=a.raw", "a.vma")
    try:
        for command in (["create", typo, "1M"], ["convert", "a.raw", typo], ["convert", "-O", "vmdk", "a.raw", typo],
                        ["vma", "create", "-d", "d=a.raw", typo], ["vma", "extract", "a.vma", "--output", typo]):
            r = t.drover(*command)
            assert r.code == 1 and "there is no such device" in r.err, (command, r)
            assert not os.path.lexists(typo)
    finally:
        if os.path.lexists(typo):
            os.unlink(typo)
    assert not [n for n in os.listdir("/dev") if "drover" in n]


def test_the_directory_of_a_restored_disk_must_be_there(t):
    t.ok("create", "a.raw", "1M")
    t.ok("vma", "create", "-d", "d=a.raw", "a.vma")
    r = t.drover("vma", "extract", "a.vma", "--output", "mistyped/a.raw")
    assert r.code == 1 and "mistyped: No such file or directory" in r.err, r
    assert not os.path.exists(t.dir / "mistyped")


def test_a_line_end_in_a_name_forges_no_message(t):
    t.ok("create", "p.raw", "1M")
    t.ok("create", "-q", "-f", "add-cow", "-b", "p.raw", "a.add-cow")
    image = (t.dir / "a.add-cow").read_bytes()
    assert image.count(b"p.raw") == 1
    (t.dir / "a.add-cow").write_bytes(image.replace(b"p.raw", b"p\nraw"))
    for command in (["map"], ["check", "-r", "all"], ["convert", "-O", "vmdk"], ["vma", "create", "x.vma", "-d"],
                    ["create", "-f", "add-cow", "-F", "add-cow", "x.add-cow", "-b"]):
        r = t.drover(*command, "a.add-cow", *(["y.vmdk"] if command[0] == "convert" else []))
        assert "p\nraw" not in r.err + r.out, (command, r)
    r = t.drover("map", "a.add-cow")
    assert r.err.count("\n") == 1 and 'backing file "p?raw"' in r.err, r


def test_a_damaged_archive_is_told_how_to_be_salvaged(t):
    (t.dir / "a.raw").write_bytes(os.urandom(1 << 20))
    t.ok("vma", "create", "-d", "d=a.raw", "--no-sums", "a.vma")
    os.truncate(t.dir / "a.vma", 500000)
    r = t.drover("vma", "extract", "a.vma", "out")
    assert r.code == 1 and "--salvage" in r.err and not (t.dir / "out").exists(), r
    assert t.drover("vma", "extract", "--salvage", "a.vma", "out").code == 3


def test_what_is_past_the_end_is_told(t):
    t.ok("create", "a.raw", "1M")
    for command in ("read 1M 512", "write 512k 1M", "discard 0 2M"):
        r = t.drover("io", "-f", "raw", "-c", command, "a.raw")
        assert r.code == 1 and "are not inside the disk of 1048576 bytes" in r.err, r


def test_an_image_file_of_another_size_is_named_once(t):
    t.ok("create", "-f", "add-cow", "a.add-cow", "1M")
    before = (t.dir / "a.raw").stat()
    r = t.drover("create", "-f", "add-cow", "a.add-cow", "2M")
    assert r.code == 1 and "name another with image_file" in r.err and r.err.count("a.add-cow") == 1, r
    assert (t.dir / "a.raw").stat().st_size == before.st_size


def test_a_disk_is_not_converted_onto_what_it_is_read_from(t):
    t.ok("create", "-f", "vmdk", "base.vmdk", "1M")
    t.io("base.vmdk", "write -P 7 0 1M")
    t.ok("create", "-f", "vmdk", "-b", "base.vmdk", "child.vmdk")
    os.symlink("base.vmdk", t.dir / "link.vmdk")
    before = (t.dir / "base.vmdk").read_bytes()
    for source, target in (("base.vmdk", "base.vmdk"), ("base.vmdk", "link.vmdk"), ("child.vmdk", "base.vmdk")):
        for more in ([], ["-O", "vmdk"], ["-n"], ["-n", "--locking", "off"], ["--locking", "off"]):
            r = t.drover("convert", *more, source, target)
            assert r.code == 1 and "must be another file" in r.err, (more, r)
    assert (t.dir / "base.vmdk").read_bytes() == before


def test_an_archive_and_its_disks_do_not_overwrite_each_other(t):
    (t.dir / "a.raw").write_bytes(os.urandom(1 << 20))
    t.ok("vma", "create", "-d", "d=a.raw", "a.vma")
    disk, archive = (t.dir / "a.raw").read_bytes(), (t.dir / "a.vma").read_bytes()
    for more in ([], ["--locking", "off"]):
        r = t.drover("vma", "create", "--force", *more, "-d", "d=a.raw", "a.raw")
        assert r.code == 1 and "must be another file" in r.err, r
        for how in ("--force", "-n"):
            r = t.drover("vma", "extract", "a.vma", "--output", "./a.vma", how, *more)
            assert r.code == 1 and "is the archive" in r.err, r
    assert (t.dir / "a.raw").read_bytes() == disk and (t.dir / "a.vma").read_bytes() == archive


def test_a_disk_does_not_become_its_own_parent(t):
    t.ok("create", "-f", "vmdk", "base.vmdk", "1M")
    t.ok("create", "-f", "vmdk", "-b", "base.vmdk", "child.vmdk")
    t.ok("create", "a.raw", "1M")
    t.ok("create", "-f", "add-cow", "-b", "a.raw", "a.add-cow", "-o", "image_file=b.raw")
    before = {n: (t.dir / n).read_bytes() for n in t.names()}
    for more in ([], ["--locking", "off"]):
        for command in (["create", "-f", "vmdk", "-b", "base.vmdk", "base.vmdk"],
                        ["create", "-f", "vmdk", "-b", "child.vmdk", "base.vmdk"],
                        ["create", "-f", "add-cow", "-b", "a.add-cow", "-F", "add-cow", "a.add-cow"],
                        ["create", "-f", "add-cow", "-o", "image_file=c.raw", "-b", "a.raw", "a.raw"],
                        ["create", "-f", "add-cow", "-o", "image_file=c.raw", "-u", "-b", "a.raw", "a.raw", "1M"],
                        ["convert", "-O", "vmdk", "-B", "base.vmdk", "a.raw", "base.vmdk"]):
            r = t.drover(*command, *more)
            assert r.code == 1 and "cannot be its own backing file" in r.err, (command, more, r)
    assert {n: (t.dir / n).read_bytes() for n in t.names()} == before


def test_the_words_that_scripts_look_for(t):
    (t.dir / "disk.img").write_bytes(b"d" * 4096)
    for args, words in ((["check", "-f", "qcow2", "disk.img"], "Image is not in qcow2 format"),
                        (["info", "-f", "qcow2", "disk.img"], "Image is not in qcow2 format"),
                        (["resize", "disk.img"], "Not enough arguments")):
        for r in (t.ours("qemu-img", *args), t.real("qemu-img", *args)):
            assert r.code == 1 and words in r.err, r
