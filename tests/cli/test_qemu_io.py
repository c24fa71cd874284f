# SPDX-License-Identifier: LGPL-2.1-or-later
"""The io shell against the real qemu-io: the same lines but for times, the same exit codes, the same disk."""
import json
import re
import shutil

import pytest
from conftest import once, same, without_times

COMMANDS = [
    "write 0 64k", "write -P 3 64k 64k", "write -z 0 4k", "write -z -u 0 4k", "write -f 0 4k", "write -q 0 4k",
    "write -C 0 4k", "write -P 256 0 4k", "write -P x 0 4k", "write -P -1 0 512", "write -P 0xff 0 512",
    "write -P 010 0 512", "write 0", "write", "write 1M 4k", "write 100 100", "write 0 0", "write 0 1.5k",
    "write -s nofile 0 4k", "write -s /dev/null 0 4k", "write -s pattern 0 4k", "write -s pattern -z 0 4k",
    "write -zP 3 0 4k", "write -n 0 4k", "write -u 0 4k", "write -b 0 4k", "write -p 0 4k", "write 0 4k 4k",
    "write 512 -1", "write 0 3G", "write 4503599627370496 512", "write 100000 0x10000", "write -c -z 0 4k", "w 0 512",
    "read 0 0", "read 0 100", "read -v 0 32", "read -vC 3 40", "read -v 65500 77", "read -P 5 0 4k", "read -P 7 64k 64k",
    "read -P 7 -s 512 -l 1k 64k 4k", "read -P 7 -s 5000 64k 4k", "read -P 0 -l 0 0 4k", "read -l 512 0 4k",
    "read -s 512 0 4k", "read -l 4k -P 0 0 512", "read -s 0 -P 0 -l 600 0 512", "read -l x -P 0 0 512",
    "read -s -- -P 0 0 512", "read -q 0 4k", "read -Cq 0 4k", "read 2M 4k", "read -1 4k", "read 0 x", "read -Z 0 4k",
    "read 0 -- -5", "read -- -5 0", "read 0 9E", "read 9E 512", "read 0 9223372036854775807", "read 0x100 0x200",
    "read  0   4k ", "read -b 0 4k", "read -p 0 4k", "read -P", "read", "read 0", "r 0 512", "read -P 0 -s 0 -l 0 0 0",
    "aio_read 0 4k", "aio_read -P 0 128k 4k", "aio_read -P 9 0 4k", "aio_read -C 0 4k", "aio_read 0 x", "aio_read 2M 4k",
    "aio_read -i 0 4k", "aio_read -v 64k 16 16", "aio_write 0 4k", "aio_write -P 3 0 4k 4k", "aio_write -q 0 4k",
    "aio_write -C 0 4k", "aio_write -f 0 512", "aio_write 2M 4k", "aio_write -u 0 4k", "aio_write -z 0 4k 4k",
    "aio_write -i 0 4k", "aio_flush", "aio_flush 1", "aio_write", "aio_write -Z 0 1",
    "readv 0 4k 4k", "readv -P 3 0 4k 4k", "readv -v 0 16 16", "readv 0 9E", "readv 0 x", "readv 0 3G",
    "readv 0 1G 1G 1G", "readv 2M 4k", "readv 0", "readv -Z 0 1", "rv 0 1 2 3",
    "writev 0 4k 4k", "writev -P 5 0 4k 512", "writev -q 0 4k", "writev -f 0 4k", "writev -P 0x100 0 512", "writev 2M 4k", "wv 0 1",
    "discard 0 64k", "discard -q 0 4k", "discard -C 0 4k", "discard 2M 4k", "discard 0", "discard 0 x", "discard 0 9E",
    "discard -Z 0 1", "discard 0 0",
    "flush", "f", "flush -x", "alloc 0", "alloc 0 4k", "alloc 0 1M", "alloc 3 9", "alloc 2M", "alloc x", "alloc 0 x",
    "alloc 0 9E", "alloc 0 2M", "alloc 1M", "alloc", "map", "map foo", "length", "l", "length foo",
    "truncate", "truncate x", "truncate -1", "truncate -m foo 1M", "truncate 2M", "truncate 512k", "truncate 1000", "truncate 0",
    "foo", "help foo", "help", "help a b", "help alloc", "help flush", "help map", "help sleep", "help length",
    "quit", "q", "quit 1", "close", "c", "reopen", "reopen -r", "reopen -w", "reopen foo", "reopen -r -w",
    "reopen -c foo", "reopen -c writeback", "reopen -o foo=bar", "reopen -Z", "open", "open -Z", "open other", "open -r other",
    "sleep 1", "sleep x", "sleep", "sigraise 0", "sigraise", "break a b", "resume x", "remove_break x", "", " ",
    "info foo",
]


def make(t, fmt):
    once(t, f"qemu-io {fmt}", lambda: make_new(t, fmt))


def make_new(t, fmt):
    t.real("qemu-img", "create", "-q", "-f", fmt, "disk", "1M")
    t.real("qemu-img", "create", "-q", "-f", "vmdk", "other", "2M")
    t.real("qemu-io", "-f", fmt, "-c", "write -P 7 64k 64k", "-c", "write -P 65 65500 40", "disk")
    (t.dir / "pattern").write_text("drover" * 100)


def both(t, *args, stdin=""):
    """Run both on copies of the same directory; the disk must be the same afterwards."""
    copy = t.dir.parent / "copy"
    shutil.copytree(t.dir, copy)
    ours = t.ours("qemu-io", *args, stdin=stdin)
    real = t.real("qemu-io", *args, stdin=stdin, cwd=copy)
    same(ours, real, without_times)
    if not any(a.startswith("discard") for a in args):  # the real one leaves a vmdk as it is
        r = t.real("qemu-img", "compare", t.dir / "disk", copy / "disk")
        assert "identical" in r.out, r
    return ours


def test_a_discard_touches_nothing_else(t):
    make(t, "vmdk")
    t.io("disk", "write -P 1 0 256k", "discard 64k 64k", "read -P 1 0 64k", "read -P 1 128k 128k")
    out = t.drover("io", "-c", "read -P 1 64k 64k", "-c", "read -P 0 64k 64k", "disk").out
    assert out.count("verification failed") == 1


# QEMU's VMDK cannot change its size.
BOTH = [(c, fmt) for c in COMMANDS for fmt in ("raw", "vmdk") if fmt == "raw" or not re.match("truncate [0-9]", c)]


@pytest.mark.parametrize("command, fmt", BOTH, ids=[f"{c or '(empty)'}-{fmt}" for c, fmt in BOTH])
def test_prints_ends_and_writes_as_qemu_io(t, command, fmt):
    make(t, fmt)
    both(t, "-f", fmt, "-c", command, "disk")


SEQUENCES = [
    ["write -P 1 0 64k", "read -P 1 0 64k", "write -z 32k 64k", "read -P 0 32k 64k", "map"],
    ["open disk"], ["close", "read 0 512"], ["close", "open -r disk", "write 0 512", "read 0 512"],
    ["reopen -r", "write 0 4k", "reopen -w", "write 0 4k"], ["close", "open -o driver=vmdk disk", "length"],
    ["close", "open -o driver=vmdk,file.filename=disk", "length"], ["close", "open nope", "length"],
    ["close", "open -i threads disk", "length"],
    ["close", "open -n disk", "read 0 512"], ["close", "open -t nope disk"], ["foo", "read 0 512"],
    ["quit", "read 0 512"], ["read -P 1 0 512", "write 0 512"], ["close", "open disk other"], ["close", "map"],
    ["close", "help map"], ["aio_write -P 9 0 64k", "aio_read -P 9 0 64k", "aio_flush", "read -P 9 0 64k"],
    ["writev -P 2 500 100 200 300", "readv -P 2 500 600", "read -v 496 32"],
    ["write -P 3 1048575 1", "write -P 3 1048575 2", "read -P 3 1048575 1"], ["close", "close"],
]
RAW_SEQUENCES = [
    ["write -P 1 0 1M", "truncate 512k", "length", "truncate 2M", "read -P 1 0 512k", "read -P 0 512k 1536k", "map"],
    ["truncate -m full 2M", "length", "truncate -m falloc 3M", "length", "truncate -m full 1M", "truncate -m metadata 4M",
     "truncate -m off 1M", "length"],
    ["truncate 0", "read 0 1", "write 0 1", "truncate 4k", "write -P 1 0 4k", "read -P 1 0 4k"],
]


@pytest.mark.parametrize("commands", RAW_SEQUENCES, ids=lambda c: "; ".join(c))
def test_a_raw_disk_changes_its_size(t, commands):
    make(t, "raw")
    both(t, "-f", "raw", *[a for c in commands for a in ("-c", c)], "disk")


@pytest.mark.parametrize("commands", SEQUENCES, ids=lambda c: "; ".join(c))
def test_several_commands_in_a_row(t, commands):
    make(t, "vmdk")
    args = [a for c in commands for a in ("-c", c)]
    both(t, "-f", "vmdk", *args, "disk")


@pytest.mark.parametrize("args", [
    ["-r", "-c", "write 0 4k", "disk"], ["-r", "-c", "aio_write 0 4k", "disk"], ["-r", "-c", "writev 0 4k", "disk"],
    ["-r", "-c", "discard 0 4k", "disk"], ["-r", "-c", "flush", "disk"], ["-r", "-c", "truncate 512", "disk"],
    ["-r", "-c", "read 0 4k", "disk"], ["-c", "read 0 4k", "nope"], ["-f", "vmdk", "-c", "length", "nope"],
    ["-f", "nope", "-c", "length", "disk"], ["-c", "read 0 4k"], ["-c", "open disk", "-c", "length"],
    ["-t", "none", "-c", "read 0 4k", "disk"], ["-n", "-c", "read 0 4k", "disk"], ["-t", "nope", "disk"],
    ["-t", "writethrough", "-c", "write 0 4k", "disk"], ["-t", "unsafe", "-c", "write 0 4k", "disk"],
    ["-i", "nope", "-c", "length", "disk"], ["-i", "threads", "-c", "length", "disk"],
    ["-d", "unmap", "-c", "discard 0 64k", "disk"], ["-d", "nope", "disk"], ["-U", "-r", "-c", "length", "disk"], ["-U", "-c", "length", "disk"],
    ["-c", "open -U disk", "-c", "length"], ["-c", "open -r -U disk", "-c", "length"],
    ["--image-opts", "-c", "length", "driver=vmdk,file.filename=disk"],
    ["--image-opts", "-f", "vmdk", "-c", "length", "driver=vmdk,file.filename=disk"],
], ids=" ".join)
def test_options_of_the_program(t, args):
    make(t, "vmdk")
    both(t, *args)


@pytest.mark.parametrize("script", [
    "read 0 512\nfoo\n\nwrite 0 4k\nmap\nquit\nread 0 1\n", "read 0 512", "", "\n", "write -P 4 0 512\nread -P 77 0 512\n",
    "close\nopen disk\nread 0 512\n", "# no comment\nlength\n",
])
def test_a_script_on_standard_input(t, script):
    make(t, "vmdk")
    both(t, "disk", stdin=script)


def test_a_disk_that_grows_takes_its_space(t):
    for mode in ("full", "falloc"):
        t.ok("create", "-q", f"{mode}.img", "1M")
        assert t.ours("qemu-io", "-f", "raw", "-c", f"truncate -m {mode} 3M", f"{mode}.img").code == 0
        assert 2 << 20 <= (t.dir / f"{mode}.img").stat().st_blocks * 512 < 3 << 20


@pytest.mark.parametrize("args", [["--image-opts", "-c", "write 0 512", "driver=vmdk,file.filename=disk,read-only=on"],
                                  ["-c", "open -o driver=vmdk,file.filename=disk,read-only=on", "-c", "write 0 512"]])
def test_a_disk_that_is_to_be_read_only_is_not_written(t, args):
    make(t, "vmdk")
    before = (t.dir / "disk").read_bytes()
    r = t.ours("qemu-io", *args)
    assert r.code == 1 and "Block node is read-only" in r.err and (t.dir / "disk").read_bytes() == before, r
    assert t.real("qemu-io", *args).code == 1
    both(t, "-r", "--image-opts", "-c", "read 0 512", "driver=vmdk,file.filename=disk,read-only=on")


def test_no_word_of_a_long_line_is_lost(t):
    make(t, "raw")
    lengths = " 100" * 1022
    both(t, "-f", "raw", "-c", "writev -P 3 0" + lengths, "-c", "readv -P 3 0" + lengths, "disk")
    r = t.ours("qemu-io", "-f", "raw", "-c", "writev -P 3 0" + " 1" * 5000, "disk")
    assert "5000" in r.out.splitlines()[0] or r.code == 1, r


def test_a_child_shows_what_it_holds_itself(t):
    make(t, "vmdk")
    t.real("qemu-img", "create", "-q", "-f", "vmdk", "-b", "disk", "-F", "vmdk", "child")
    t.real("qemu-io", "-c", "write 512k 128k", "-c", "write -z 0 64k", "child")
    for command in ("map", "alloc 0 1M", "alloc 512k 1M", "read -v 64k 32", "read 1M 1"):
        args = ("-r", "-f", "vmdk", "-c", command, "child")
        same(t.ours("qemu-io", *args), t.real("qemu-io", *args), without_times)


def test_info_tells_the_same(t):
    make(t, "vmdk")
    same(t.ours("qemu-io", "-c", "info", "disk"), t.real("qemu-io", "-c", "info", "disk"))


def test_under_its_own_name_it_says_why(t):
    make(t, "vmdk")
    r = t.drover("io", "-c", "read 0 512", "nope")
    assert r.code == 1 and r.err == "drover: can't open device nope: Could not open 'nope': No such file or directory\n"
    assert t.drover("io", "disk", stdin="length\n").out == "drover> 1 MiB\ndrover> "


def test_every_request_has_its_numbers(t):
    make(t, "raw")
    out = t.io("disk", "write -P 1 0 64k", "read -C 0 64k", fmt="raw").splitlines()
    assert out[0] == "wrote 65536/65536 bytes at offset 0"
    assert without_times(out[1]) == "64 KiB, 1 ops; TIME"
    assert without_times(out[2]) == "65536,1,TIME" and len(out[2].split(",")) == 5


def both_chains(t, make, *args):
    """The same by the real qemu-io and by ours; what qemu-img map tells of the image afterwards."""
    maps = []
    for tool in (t.real, t.ours):
        make()
        r = tool("qemu-io", *args)
        assert r.code == 0, r
        text = t.real("qemu-img", "map", "--output=json", "top.qcow2").out
        maps.append([(e["start"], e["length"], e["depth"], e["zero"], e["data"]) for e in json.loads(text)])
    return maps


def make_chain(t):
    for name in ("base.qcow2", "top.qcow2"):
        (t.dir / name).unlink(missing_ok=True)
    t.ok("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    t.io("base.qcow2", "write -P 3 0 512k")
    t.ok("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")


@pytest.mark.parametrize("open_", [["-C", "top.qcow2"], ["-c", "open -C top.qcow2"]], ids=["option", "command"])
def test_copy_on_read_writes_what_was_read_into_the_image(t, open_):
    real, ours = both_chains(t, lambda: make_chain(t), *open_, "-c", "write -P 9 64k 64k", "-c", "read -P 3 128k 128k",
                             "-c", "read -P 9 64k 64k")
    assert ours == real
    assert (65536, 196608, 0, False, True) in ours
    t.io("top.qcow2", "read -P 3 0 64k", "read -P 9 64k 64k", "read -P 3 128k 384k", "read -P 0 512k 512k")


def test_copy_on_read_of_a_disk_open_for_reading_leaves_it(t):
    make_chain(t)
    before = (t.dir / "top.qcow2").read_bytes()
    assert t.ours("qemu-io", "-r", "-C", "-c", "read -P 3 0 128k", "top.qcow2").code == 0
    assert (t.dir / "top.qcow2").read_bytes() == before


@pytest.mark.parametrize("open_", [["-s", "top.qcow2"], ["-c", "open -s top.qcow2"]], ids=["option", "command"])
def test_what_is_written_to_a_temporary_file_is_gone_at_the_end(t, open_):
    make_chain(t)
    before = (t.dir / "top.qcow2").read_bytes()
    names = t.names()
    r = t.ours("qemu-io", *open_, "-c", "write -P 9 64k 64k", "-c", "read -P 9 64k 64k", "-c", "read -P 3 128k 64k")
    assert r.code == 0 and "failed" not in r.out, r
    assert (t.dir / "top.qcow2").read_bytes() == before and t.names() == names


def test_a_temporary_file_over_a_disk_that_may_not_be_written(t):
    make_chain(t)
    (t.dir / "top.qcow2").chmod(0o444)
    r = t.ours("qemu-io", "-s", "-c", "write -P 9 0 64k", "-c", "read -P 9 0 64k", "top.qcow2")
    assert r.code == 0 and "failed" not in r.out, r
