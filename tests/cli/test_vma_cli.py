# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vma commands as others drive them: arguments and lines, Proxmox's restore over a FIFO, pipes, signals."""
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import threading

import pytest
import vmagen
from vmagen import CLUSTER, CONF
from vmarun import Vma, v  # noqa: F401  pylint: disable=unused-import

USAGE = """usage: vma command [command options]

vma list <filename>
vma config <filename> [-c <config>]
vma create <filename> [-c <config>] [-d format=<format>:<device name>=<path> [-d ...]]
vma extract <filename> [-d <drive-list>] [-r <fifo>] <targetdir>
vma verify <filename> [-v]
"""


def disks(seed=4, sizes=(5 * CLUSTER, 3 * CLUSTER + 512, 20 * CLUSTER)):
    rng = random.Random(seed)
    return {i + 1: vmagen.random_disk(rng, size) for i, size in enumerate(sizes)}


def archive(v, name="a.vma", **kw):
    a = vmagen.simple(disks(), order="interleaved", **kw)
    a.write(v.dir / name)
    return a


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("args", [[], ["nope"], ["-h"], ["--help"], ["list"], ["list", "-h"], ["list", "a.vma", "b.vma"],
                                  ["list", "--json", "a.vma"], ["config"], ["config", "a.vma", "-c"], ["create"],
                                  ["create", "-x", "a.vma"], ["extract", "a.vma"], ["extract", "a.vma", "b", "c"],
                                  ["extract", "-p", "a.vma", "b"], ["verify"], ["verify", "-x", "a.vma"], ["index", "a.vma"]])
def test_wrong_use_of_vma_prints_the_usage_on_standard_output(v, args):
    archive(v)
    r = v.vma(*args)
    assert (r.code, r.text, r.errors) == (1, USAGE, "") and v.names() == ["a.vma"]


@pytest.mark.parametrize("args", [["list"], ["config"], ["create"], ["extract", "a.vma"], ["verify"], ["index"],
                                  ["list", "a.vma", "b"], ["create", "a.vma", "b.raw"], ["extract", "--output", "x", "a.vma", "b"],
                                  ["extract", "-n", "a.vma", "b"], ["extract", "--jobs", "17", "a.vma", "b"],
                                  ["extract", "--resume", "--progress", "x", "a.vma", "b"],
                                  ["extract", "-p", "--json", "a.vma", "b"],
                                  ["extract", "--salvage", "--resume", "a.vma", "b"], ["verify", "--against", "x", "a.vma"],
                                  ["extract", "--sums", "x", "--no-sums", "a.vma", "b"], ["create", "--compress", "gzip", "b.vma"],
                                  ["create", "--compress", "zstd:0", "b.vma"], ["create", "--uuid", "x", "b.vma"],
                                  ["create", "--ctime", "1x", "b.vma"], ["verify", "--headers-only", "--sums", "x", "a.vma"]])
def test_wrong_use_of_drover_vma_says_where_help_is(v, args):
    archive(v)
    r = v.drover(*args)
    assert r.code == 1 and r.text == "" and r.errors.endswith(f"Try 'drover vma {args[0]} --help' for more information\n"), r
    assert v.names() == ["a.vma"]


def test_options_and_operands_come_in_any_order(v):
    archive(v)
    assert v.vma("config", "a.vma", "-c", "qemu-server.conf").out == v.vma("config", "-c", "qemu-server.conf", "a.vma").out == CONF
    assert v.vma("extract", "a.vma", "-d", "drive-scsi1", "out", "-v").code == 0
    assert sorted(os.listdir(v.dir / "out")) == ["disk-drive-scsi1.raw", "qemu-server.conf"]


def test_disks_and_their_names(v):
    v.put("a=b.raw", bytes(range(256)) * 256)
    v.put("plain.raw", b"x" * 512)
    v.ok("vma", "create", "a.vma", "-d", "format=raw:drive-x=a=b.raw", "-d", "format=raw:plain.raw", "-d", "z=plain.raw")
    assert re.findall(r"devname: (\S+)", v.ok("vma", "list", "a.vma").text) == ["drive-x", "disk1", "z"]
    r = v.vma("create", "b.vma", "plain.raw", "y=plain.raw")
    assert r.code == 0 and r.errors.startswith("vma: warning: ")
    assert re.findall(r"devname: (\S+)", v.ok("vma", "list", "b.vma").text) == ["disk0", "y"]
    for args in (["-d", "x=plain.raw", "plain.raw"], ["-d", "format=raw"], ["-d", "format=nope:x=plain.raw"],
                 ["-d", "x=absent.raw"], ["-c", "absent.conf"]):
        assert v.fails("vma", "create", "c.vma", *args) and "c.vma" not in v.names()


def test_a_configuration_file_has_its_limit(v):
    v.put("fits.conf", b"x" * 65535)
    v.put("large.conf", b"x" * 65536)
    v.ok("vma", "create", "a.vma", "-c", v.dir / "fits.conf")
    assert v.ok("vma", "config", "a.vma", "-c", "fits.conf").out == b"x" * 65535
    assert "large.conf" in v.fails("vma", "create", "b.vma", "-c", "large.conf")


# ---------------------------------------------------------------------------------------- lists


def test_what_is_listed(v):
    a = archive(v, configs=[("qemu-server.conf", CONF), ("qemu-server.fw", b"fw")])
    lines = v.ok("vma", "list", "a.vma").text.splitlines()
    assert lines == [f"CFG: size: {len(CONF)} name: qemu-server.conf", "CFG: size: 2 name: qemu-server.fw",
                     *(f"DEV: dev_id={i} size: {len(d)} devname: drive-scsi{i - 1}" for i, d in a.contents.items()),
                     "CTIME: Fri Jul 14 02:40:00 2017"]
    told = json.loads(v.ok("drover", "vma", "list", "--json", "a.vma").text)
    assert told == json.loads(v.ok("drover", "vma", "list", "--output=json", "a.vma").text)
    assert (told["ctime"], told["uuid"], told["compression"]) == (vmagen.CTIME, "10111213-1415-1617-1819-1a1b1c1d1e1f", None)
    assert told["disks"] == [{"id": i, "name": f"drive-scsi{i - 1}", "size": len(d), "vmstate": False}
                             for i, d in a.contents.items()]
    assert told["configs"] == [{"name": "qemu-server.conf", "size": len(CONF)}, {"name": "qemu-server.fw", "size": 2}]
    text = v.ok("drover", "vma", "list", "a.vma").text
    assert all(w in text for w in ("qemu-server.fw", "drive-scsi2", str(20 * CLUSTER), "2017-07-14 02:40:00"))


@pytest.fixture
def terminals():
    try:
        for fd in os.openpty():
            os.close(fd)
    except OSError as e:
        pytest.skip(f"no terminal can be made here: {e}")


@pytest.mark.usefixtures("terminals")
def test_a_configuration_file_does_not_steer_a_terminal(v):
    data = "a\u202eb\x9bc\x1b[2Jd\tü\n".encode() + b"\x9be\0f\xe2\x80"
    vmagen.simple({}, configs=[("qemu-server.conf", data)]).write(v.dir / "a.vma")
    ours, theirs = os.openpty()
    p = v.start("drover", "vma", "config", "a.vma", stdout=theirs)
    os.close(theirs)
    assert p.communicate(timeout=30)[1] == b"" and p.returncode == 0
    shown = os.read(ours, 1000).replace(b"\r\n", b"\n").expandtabs()
    os.close(ours)
    assert re.fullmatch(rb"a\?{3}b\?\?c\?\[2Jd +\xc3\xbc\n\?e\?f\?\?", shown), shown


def test_names_that_are_not_utf8_or_control_in_disguise_are_escaped(v):
    for name, shown in ((b"drive-\xff", "drive-\\xff"), (b"drive-\xc2\x9b31m", "drive-\\xc2\\x9b31m"), ("drive-ü".encode(), "drive-ü"),
                        (b"drive-\x1b[2J", "drive-\\x1b[2J")):
        vmagen.simple({1: b"x" * 512}, names={1: name}).write(v.dir / "a.vma")
        assert shown.encode() in v.ok("drover", "vma", "list", "a.vma").out
        told = json.loads(v.ok("drover", "vma", "list", "--json", "a.vma").text)["disks"][0]["name"]
        assert told in (shown, name.decode(errors="replace"))
        assert (v.vma("list", "a.vma").code == 0) == ("\\" not in shown)


def test_a_configuration_file_is_printed_as_it_is(v):
    vmagen.simple({}, configs=[("qemu-server.conf", bytes(range(256)))]).write(v.dir / "a.vma")
    assert v.drover("config", "a.vma", raw=True).out == v.vma("config", "a.vma", raw=True).out == bytes(range(256))
    for name, said in (("vma", b"unable to find configuration data 'nope'\n"),
                       ("drover vma", b"drover: a.vma: holds no configuration file 'nope'\n")):
        p = v.start(*name.split(), "config", "a.vma", "-c", "nope")
        assert p.communicate(timeout=30) == (b"", said) and p.returncode == 255


# ---------------------------------------------------------------------------------------- the restore of Proxmox VE


class Restore:
    """What qemu-server does: parse the listing until CTIME, look at the configuration, make targets, send the map."""

    def __init__(self, v, *args, archive="a.vma", stdin=None):
        os.mkfifo(v.dir / "fifo")
        self.p = v.start("vma", "extract", "-v", "-r", v.dir / "fifo", *args, archive, "out", stdin=stdin)
        self.fifo, self.devices, self.conf = v.dir / "fifo", {}, None
        for line in self.p.stdout:
            m = re.match(rb"^DEV:\sdev_id=(\d+)\ssize:\s(\d+)\sdevname:\s(\S+)$", line)
            if m:
                self.devices[m.group(3).decode()] = int(m.group(2))
            if line.startswith(b"CTIME: "):
                self.conf = (v.dir / "out" / "qemu-server.conf").read_bytes()
                break

    def send(self, *lines, end="done\n"):
        with open(self.fifo, "wb", buffering=0) as f:
            f.write(("".join(line + "\n" for line in lines) + end).encode())

    def end(self):
        out, err = self.p.communicate(timeout=30)
        return self.p.returncode, out.decode(), err.decode()


def target(v, name, size, fill=b"\xee"):
    (v.dir / name).write_bytes(fill * size)
    return v.dir / name


@pytest.mark.parametrize("compressed", [False, True])
def test_the_restore_protocol(v, compressed):
    a = archive(v)
    producer = None
    if compressed:
        if not shutil.which("zstd"):
            pytest.skip("zstd is missing")
        producer = subprocess.Popen("zstd -q -c a.vma | zstd -q -d -c", shell=True, cwd=v.dir, stdout=subprocess.PIPE)
    r = Restore(v, archive="-" if compressed else "a.vma", stdin=producer and producer.stdout)
    assert r.conf == CONF and r.devices == {f"drive-scsi{i - 1}": len(d) for i, d in a.contents.items()}
    size = [len(d) for d in a.contents.values()]
    sparse, thick = target(v, "sparse.raw", size[0], b"\0"), target(v, "thick", size[1] + 3584)
    large = target(v, "large", size[2] + (4 << 20))
    r.send(f"format=raw:0:drive-scsi0={sparse}", "0:drive-scsi9=/nowhere", f"throttling.bps=0x40000000:throttling.group=a:format=raw:"
           f"cache=none:1:drive-scsi1={thick}", f"format=raw:throttling.bps=1073741824:throttling.group=a:1:drive-scsi2={large}")
    code, out, err = r.end()
    if producer:
        producer.stdout.close()
        assert producer.wait(30) == 0
    assert (code, err) == (0, "") and sorted(os.listdir(v.dir / "out")) == ["qemu-server.conf"]
    assert sparse.read_bytes() == a.contents[1]
    assert thick.read_bytes() == a.contents[2] + b"\xee" * 3584
    assert large.read_bytes() == a.contents[3] + b"\xee" * (4 << 20)
    assert re.search(r"^progress 100% \(read \d+ bytes, duration \d+ sec\)$", out, flags=re.M)
    assert re.search(r"^total bytes read \d+, sparse bytes \d+ \(\S+%\)$", out, flags=re.M)


@pytest.mark.parametrize("end", ["done\n", "", "\n", "done", "done\n0:nonsense\n", "\nnonsense\n"])
def test_what_ends_a_map(v, end):
    a = archive(v)
    r = Restore(v)
    one = target(v, "one.raw", len(a.contents[1]))
    r.send("skip=drive-scsi2", "0:drive-scsi0=/nowhere", f"1:drive-scsi0={one}", "skip=drive-scsi1", end=end)
    assert r.end()[0] == 0 and one.read_bytes() == a.contents[1]


def test_a_map_may_come_in_pieces_and_its_writer_may_stay(v):
    a = archive(v)
    r = Restore(v, "-d", "drive-scsi0")
    one = target(v, "one.raw", len(a.contents[1]))
    with open(r.fifo, "wb", buffering=0) as f:
        for piece in ("1:drive-", f"scsi0={one}", "\ndo", "ne\n"):
            f.write(piece.encode())
        assert r.end()[0] == 0
    assert one.read_bytes() == a.contents[1]


@pytest.mark.parametrize("lines, message", [
    (["nonsense"], "read map failed - parse error ('nonsense')"),
    (["2:drive-scsi0=x"], "read map failed - parse error ('2:drive-scsi0=x')"),
    (["format=raw:drive-scsi0=x"], "read map failed - parse error ("),
    (["0:x.raw"], "read map failed - no dev name specified"),
    (["format=raw"], "read map failed - option 'format' not terminated"),
    (["format=raw:format=raw:0:drive-scsi0=x"], "read map failed - duplicate value for option 'format'"),
    (["throttling.bps=1k:0:drive-scsi0=x"], "read map failed - not a number: 1k"),
    (["throttling.bps=-1:0:drive-scsi0=x"], "read map failed - not a number: -1"),
    (["skip="], "read map failed - option 'skip' has no value"),
    (["skip"], "read map failed - option 'skip' has no value"),
    (["x" * 8192], "read map failed - parse error"),
    (["0:drive-scsi1=x"], "no device name mapping for drive-scsi0"),
    (["cache=nope:0:drive-scsi0=x"], "invalid cache option: nope"),
    (["0:drive-scsi0=absent"], "can't open file absent - "),
    (["format=nope:0:drive-scsi0=one.raw"], "can't open file one.raw - "),
    (["0:drive-scsi0=small.raw"], f"vma_reader_register_bs for stream drive-scsi0 failed - unexpected size 512 != {5 * CLUSTER}"),
    (["0:drive-scsi0=large.raw"], "vma_reader_register_bs for stream drive-scsi0 failed - unexpected size "),
])
def test_maps_that_are_refused(v, lines, message):
    archive(v)
    r = Restore(v)
    target(v, "small.raw", 512)
    target(v, "one.raw", 5 * CLUSTER)
    os.truncate(target(v, "large.raw", 0), 5 * CLUSTER + (4 << 20) + 512)
    r.send(*lines)
    code, _, err = r.end()
    assert code == 1 and f"vma: {message}" in err and err.count("\n") == 1, err
    assert "out" not in v.names()


def test_a_guessed_format_leads_to_no_other_place(v):
    a = archive(v)
    size = len(a.contents[1])
    (v.dir / "sub").mkdir()
    v.put("precious", b"\xee" * size)
    descriptor = (f'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
                  f'RW {size // 512} FLAT "{v.dir}/precious" 0\nddb.adapterType = "ide"\n')
    (v.dir / "sub" / "volume").write_text(descriptor)
    r = Restore(v, "-d", "drive-scsi0")
    r.send(f"0:drive-scsi0={v.dir}/sub/volume")
    code, _, err = r.end()
    assert code == 1 and "precious" in err and v.get("precious") == b"\xee" * size
    os.unlink(v.dir / "fifo")
    r = Restore(v, "-d", "drive-scsi0")
    r.send(f"format=vmdk:1:drive-scsi0={v.dir}/sub/volume")  # somebody says that it is one
    assert r.end()[0] == 0 and v.get("precious") == a.contents[1]


def test_what_verify_ends_with_where_nothing_can_be_opened(v):
    data = archive(v).build()
    for name, content in (("short", data[:5000]), ("md5", data[:100] + b"x" + data[101:]), ("other", b"#!/bin/sh\n" * 2000), ("empty", b"")):
        v.put(name, content)
        r = v.drover("verify", name)
        assert r.code == 2 and name in r.errors and r.text == "", r
    for name in ("absent", ".", "sub/absent"):
        assert v.drover("verify", name).code == 1


def test_verify_never_says_that_nothing_is_wrong_beside_what_is(v):
    a = archive(v)
    v.put("odd.vma", a.header.build(fix={4096 + 7 * 32 + 8: (1 << 20).to_bytes(8, "big")}) + a.build()[len(a.header.build()):])
    r = v.drover("verify", "odd.vma")
    assert r.code == 2 and "has no name" in r.errors and r.text == "1 problem was found\n", r
    r = v.drover("verify", "-q", "odd.vma")
    assert r.code == 2 and r.errors == r.text == "", r
    told = json.loads(v.drover("verify", "--json", "odd.vma").text)
    assert told["sound"] is False and told["damage"][0]["kind"] == "header" and "has no name" in told["damage"][0]["text"]


def test_no_map_is_waited_for_when_nobody_reads_the_listing(v):
    archive(v)
    os.mkfifo(v.dir / "fifo")
    r, w = os.pipe()
    os.close(r)
    p = v.start("vma", "extract", "-r", "fifo", "a.vma", "out", stdout=w)
    os.close(w)
    assert p.communicate(timeout=30)[1] == b"" and p.returncode == 1 and v.names() == ["a.vma", "fifo"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_map(v, number):
    archive(v)
    r = Restore(v)
    r.p.send_signal(number)
    code, _, err = r.end()
    assert code == 128 + number and "interrupted" in err and "out" not in v.names()


def test_a_signal_in_the_middle_of_a_restore(v):
    a = archive(v)
    r = Restore(v)
    one = target(v, "one.raw", len(a.contents[3]))
    r.send("skip=drive-scsi0", "skip=drive-scsi1", f"format=raw:throttling.bps=65536:1:drive-scsi2={one}")
    while one.read_bytes() == b"\xee" * len(a.contents[3]):
        assert r.p.poll() is None
    r.p.send_signal(signal.SIGTERM)
    code, _, err = r.end()
    assert code == 128 + signal.SIGTERM and "interrupted" in err and "out" not in v.names()


def test_devinfo_and_a_failure_that_leaves_nothing(v):
    a = archive(v)
    r = v.ok("vma", "extract", "a.vma", "out")
    assert r.text.splitlines() == [f"DEVINFO out/tmp-disk-drive-scsi{i - 1}.raw {len(d)}" for i, d in a.contents.items()]
    v.put("cut.vma", v.get("a.vma")[:-512])
    r = v.vma("extract", "cut.vma", "out2")
    assert r.code == 1 and r.errors.startswith("vma: restore failed - ") and "out2" not in v.names()
    r = v.vma("extract", "a.vma", "out")
    assert r.code == 1 and "unable to create target directory out" in r.errors
    r = v.vma("verify", "cut.vma")
    assert r.code == 1 and r.errors.startswith("vma: verify failed - ")
    r = v.drover("verify", "cut.vma")
    assert r.code == 2 and re.search(r"^archive: \d+\.\.\d+ \(\d+ bytes\): .*cut.vma: ends at offset \d+ .*expected \d+ bytes", r.text), r


# ---------------------------------------------------------------------------------------- pipes


def test_create_zstd_extract(v):
    if not shutil.which("zstd"):
        pytest.skip("zstd is missing")
    for i, data in disks().items():
        v.put(f"{i}.raw", data)
    v.put("qemu-server.conf", CONF)
    names = [x for i in disks() for x in ("-d", f"drive-scsi{i}={i}.raw")]
    one = v.start("drover", "vma", "create", "-p", "-c", "qemu-server.conf", *names, "-")
    two = subprocess.Popen(["zstd", "-q"], stdin=one.stdout, stdout=subprocess.PIPE)
    r = v.drover("extract", "-", "out", stdin=two.stdout)
    one.stdout.close()
    two.stdout.close()
    shown = one.stderr.read()
    one.stderr.close()
    assert (one.wait(10), two.wait(10), r.code) == (0, 0, 0) and b"100.00/100%" in shown, r
    for i, data in disks().items():
        assert v.get(f"out/drive-scsi{i}.raw") == data[:len(data)]
    assert v.get("out/qemu-server.conf") == CONF


def test_a_slow_reader_gets_everything(v):
    v.put("a.raw", disks()[3])
    p = v.start("vma", "create", "exec:cat", "-d", "format=raw:x=a.raw")
    got = bytearray()
    while True:
        piece = os.read(p.stdout.fileno(), 4096)
        if not piece:
            break
        got += piece
    assert p.wait(30) == 0 and vmagen.parse(bytes(got), True).content("x") == disks()[3]
    p.stdout.close()
    p.stderr.close()


def test_a_reader_that_goes_away(v):
    v.put("a.raw", random.Random(1).randbytes(40 * CLUSTER))
    p = v.start("drover", "vma", "create", "-d", "x=a.raw", "-")
    os.read(p.stdout.fileno(), 100)
    p.stdout.close()
    assert p.wait(30) == 1 and b"standard output" in p.stderr.read()
    p.stderr.close()
    archive(v)
    for args in (["vma", "config", "a.vma"], ["drover", "vma", "list", "a.vma"], ["drover", "vma", "list", "--json", "a.vma"]):
        r, w = os.pipe()
        os.close(r)  # before it starts: what it prints would fit into the pipe
        p = v.start(*args, stdout=w)
        os.close(w)
        assert p.communicate(timeout=30)[1] == b"" and p.returncode == 1


def test_header_commands_do_not_wait_for_the_rest_of_a_pipe(v):
    a = archive(v)
    for args, wanted in ((["config", "-"], CONF), (["list", "-"], b"DEV: dev_id=1 ")):
        r, w = os.pipe()
        feeder = threading.Thread(target=os.write, args=(w, a.build()[:20000]))
        feeder.start()
        got = v.vma(*args, stdin=r, raw=True)
        os.close(r)
        feeder.join()
        os.close(w)  # only now: until then there might have come more
        assert got.code == 0 and wanted in got.out


@pytest.mark.parametrize("args", [["drover", "vma", "extract", "-", "out"], ["vma", "extract", "-v", "-", "out"],
                                  ["drover", "vma", "verify", "-"], ["vma", "verify", "-"]])
def test_a_pipe_that_stalls_does_not_keep_an_interrupted_command(v, args):
    a = archive(v)
    r, w = os.pipe()
    p = v.start(*args, stdin=r)
    os.close(r)
    os.write(w, a.build()[:40000])
    while "out" in args and "out" not in v.names():
        assert p.poll() is None
    while not catches(p.pid, signal.SIGINT):
        assert p.poll() is None
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=30)[1]
    assert p.returncode == 130 and b"interrupted" in err and "out" not in v.names()
    os.close(w)


@pytest.mark.parametrize("args", [["drover", "vma", "create", "--vmstate", "-", "--vmstate-size", "1M", "a.vma"],
                                  ["vma", "create", "exec:sleep 100", "-d", "format=raw:x=a.raw"],
                                  ["vma", "create", "exec:cat >/dev/null; sleep 100", "-d", "format=raw:x=a.raw"]])
def test_a_creation_that_waits_for_others_can_be_interrupted(v, args):
    v.put("a.raw", random.Random(1).randbytes(40 * CLUSTER))
    r, w = os.pipe()
    p = v.start(*args, stdin=r, start_new_session=True)  # nobody sits at a terminal
    while not catches(p.pid, signal.SIGINT):
        assert p.poll() is None
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=30)[1]
    assert p.returncode == 130 and err.decode().count("\n") == 1 and b"interrupted" in err and v.names() == ["a.raw"]
    os.close(r)
    os.close(w)


@pytest.mark.usefixtures("terminals")
def test_a_command_may_ask_who_sits_at_the_terminal(v):
    v.put("a.raw", random.Random(1).randbytes(4 * CLUSTER))
    script = "read answer </dev/tty; cat >out.vma; echo it was $answer >said"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(v.dir)
        os.execv(v.bin / "vma", ["vma", "create", "exec:" + script, "-d", "format=raw:x=a.raw"])
    os.write(terminal, b"secret\n")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert v.get("said") == b"it was secret\n" and vmagen.check(v.dir / "out.vma").content("x") == v.get("a.raw")


def catches(pid, number):
    with open(f"/proc/{pid}/status", encoding="ascii") as f:
        caught = int(re.search(r"^SigCgt:\s*(\w+)", f.read(), flags=re.M).group(1), 16)
    return caught >> (number - 1) & 1


@pytest.mark.parametrize("command, said", [("cat >x; exit 3", "exit status 3"), ("exit 3", "exit status 3"),
                                           ("cat >x; kill -9 $$", "signal 9"), ("nope-nope 2>/dev/null", "exit status 127")])
def test_a_command_that_fails_fails_the_archive(v, command, said):
    v.put("a.raw", random.Random(1).randbytes(40 * CLUSTER))
    r = v.vma("create", f"exec:{command}", "-d", "format=raw:x=a.raw")
    assert r.code == 1 and said in r.errors and r.errors.count("\n") == 1, r


def test_a_command_gets_the_archive(v):
    v.put("a.raw", disks()[1])
    v.put("qemu-server.conf", CONF)
    r = v.vma("create", "-v", "exec:cat >b.vma", "-c", "qemu-server.conf", "-d", "format=raw:x=a.raw")
    size, zeros = len(disks()[1]), sum(not any(disks()[1][i:i + 4096]) for i in range(0, len(disks()[1]), 4096)) * 4096
    assert r.code == 0 and r.text == ""
    assert r.errors.splitlines()[-1] == f"image x: size={size} zeros={zeros} saved={size - zeros}"
    assert re.match(rf"^(progress \d+% \d+/{size} \d+\n)+image x: ", r.errors)
    assert vmagen.parse(v.get("b.vma"), True).content("x") == disks()[1]


# ---------------------------------------------------------------------------------------- JSON, and into other places


def test_json_of_create_and_verify(v):
    v.put("a.raw", disks()[1])
    made = json.loads(v.ok("drover", "vma", "create", "--json", "-d", "x=a.raw", "a.vma").text)
    assert made["archive-bytes"] == len(v.get("a.vma")) and made["disks"][0]["size"] == len(disks()[1])
    told = json.loads(v.ok("drover", "vma", "verify", "--json", "--against", "x=a.raw", "a.vma").text)
    assert told["sound"] is True and told["sums-used"] is True and told["damage"] == []
    data = bytearray(disks()[1])
    data[2 * CLUSTER] ^= 1
    v.put("b.raw", data)
    r = v.drover("verify", "--json", "--against", "x=b.raw", "a.vma")
    told = json.loads(r.text)
    assert r.code == 2 and told["sound"] is False and [d["kind"] for d in told["damage"]] == ["differs"]
    r = v.drover("verify", "--against", "x=b.raw", "a.vma")
    assert r.code == 2 and "1 problem was found" in r.text
    v.put("header.vma", b"VMA\0" + bytes(20000))
    r = v.drover("verify", "--json", "header.vma")
    told = json.loads(r.text)
    assert r.code == 2 and told["sound"] is False and [d["kind"] for d in told["damage"]] == ["header"]
    assert told["damage"][0]["text"] in r.errors
    r = v.drover("verify", "--json", "not-there.vma")
    assert r.code == 1 and r.text == ""


def test_a_zst_name_compresses(v):
    v.put("a.raw", disks()[3])
    for args, name, packed in (([], "a.vma.zst", True), (["--compress=none"], "b.vma.zst", False), (["--zstd"], "c.vma", True),
                               (["--compress=zstd:1"], "d.vma", True)):
        v.ok("drover", "vma", "create", *args, "-d", "x=a.raw", name)
        assert (v.get(name)[:4] == b"\x28\xb5\x2f\xfd") == packed
        v.ok("drover", "vma", "verify", "--against", "x=a.raw", name)
    v.ok("vma", "create", "e.vma.zst", "-d", "format=raw:x=a.raw")  # the tool of that name never compresses
    assert v.get("e.vma.zst")[:4] == b"VMA\0"


@pytest.mark.usefixtures("terminals")
def test_an_archive_does_not_go_to_a_terminal(v):
    v.put("a.raw", b"x" * 512)
    ours, theirs = os.openpty()
    p = v.start("drover", "vma", "create", "-d", "x=a.raw", "-", stdout=theirs)
    os.close(theirs)
    assert b"terminal" in p.communicate(timeout=30)[1] and p.returncode == 1
    os.close(ours)


def test_several_files_of_one_image_come_together(v):
    a = archive(v)
    v.ok("drover", "vma", "extract", "a.vma", "--disk", "drive-scsi0", "--output", "one.vmdk", "--to", "vmdk", "-o",
         "subformat=twoGbMaxExtentSparse")
    assert v.names() == ["a.vma", "one-s001.vmdk", "one.vmdk"]
    v.ok("drover", "convert", "one.vmdk", "one.raw")
    assert v.get("one.raw") == a.contents[1]
    assert "one.vmdk" in v.fails("drover", "vma", "extract", "a.vma", "-d", "drive-scsi1", "--output", "one.vmdk", "--to", "vmdk")
    assert v.names() == ["a.vma", "one-s001.vmdk", "one.raw", "one.vmdk"]


def test_a_name_that_an_extent_would_take_is_found_before_anything_appears(v):
    archive(v)
    v.put("one-s001.vmdk", b"somebody's")
    r = v.drover("extract", "a.vma", "--disk", "drive-scsi0", "--output", "one.vmdk", "--to", "vmdk", "-o",
                 "subformat=twoGbMaxExtentSparse")
    assert r.code == 1 and "one-s001.vmdk" in r.errors and v.names() == ["a.vma", "one-s001.vmdk"]
    assert v.get("one-s001.vmdk") == b"somebody's"


def test_a_kill_between_the_names_of_two_files_is_finished_by_resume(v):
    a = archive(v)
    v.ok("drover", "vma", "extract", "--resume", "--rate", "1G", "a.vma", "out")
    done = {n: v.get(f"out/{n}") for n in os.listdir(v.dir / "out")}
    shutil.rmtree(v.dir / "out")
    # What is there after a kill at that moment: all complete, some with their names, some not.
    p = v.start("drover", "vma", "extract", "--resume", "--rate", "100k", "a.vma", "out")
    work = v.dir / "out" / ".drover.partial"
    while not (work / ".drover.record").exists():
        assert p.poll() is None
    p.kill()
    p.communicate()
    record = json.loads((work / ".drover.record").read_text())
    assert 0 <= record["position"] < len(a.build())
    record["complete"] = True
    (work / ".drover.record").write_text(json.dumps(record))
    for name, data in done.items():
        (work / name).write_bytes(data)
    os.rename(work / "drive-scsi0.raw", v.dir / "out" / "drive-scsi0.raw")
    v.ok("drover", "vma", "extract", "--resume", "a.vma", "out")
    assert {n: v.get(f"out/{n}") for n in os.listdir(v.dir / "out")} == done


def test_names_as_long_as_a_file_system_takes(v):
    vmagen.simple({1: b"x" * 512, 2: b"y" * 512}, names={1: "a" * 251, 2: "b" * 253}).write(v.dir / "a.vma")
    assert "--id-names" in v.fails("drover", "vma", "extract", "a.vma", "out") and "out" not in v.names()
    v.ok("drover", "vma", "extract", "--id-names", "a.vma", "out")
    assert sorted(os.listdir(v.dir / "out")) == ["a" * 251 + ".raw", "disk-2.raw", "qemu-server.conf"]
    v.ok("drover", "vma", "extract", "a.vma", "-d", "disk-1", "--output", "c" * 255)
    assert v.get("c" * 255) == b"x" * 512


def test_what_is_missing_becomes_zeros_where_something_stood(v):
    a = vmagen.simple({1: random.Random(2).randbytes(6 * CLUSTER)}, per=2)
    data, places = a.build(), a.places()
    v.put("bad.vma", data[:places[1][0]] + data[places[2][0]:])
    for args in ([], ["--target-is-zero"]):
        v.put("old.raw", b"\xee" * (7 * CLUSTER))
        r = v.drover("extract", "--salvage", "-n", *args, "-d", "drive-scsi0", "--output", "old.raw", "bad.vma")
        assert r.code == 3 and "drive-scsi0: 131072..262144 (131072 bytes): missing" in r.text
        fill = b"\xee" if args else b"\0"
        assert v.get("old.raw") == (a.contents[1][:2 * CLUSTER] + fill * 2 * CLUSTER + a.contents[1][4 * CLUSTER:] + b"\xee" * CLUSTER)


def test_lines_that_do_not_arrive(v):
    """The extraction is done all the same; a reader who went away needs no word about it."""
    a = archive(v)
    r, w = os.pipe()
    os.close(r)
    for out, said in ((w, b""), (os.open("/dev/full", os.O_WRONLY), b"vma: standard output: ")):
        p = v.start("vma", "extract", "-v", "a.vma", "out", stdout=out)
        os.close(out)
        err = p.communicate(timeout=30)[1]
        assert p.returncode == 1 and err.startswith(said) and err.count(b"\n") == bool(said), err
        assert v.get("out/disk-drive-scsi0.raw") == a.contents[1]
        shutil.rmtree(v.dir / "out")
