# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vma create` and `drover vma create`: what they write is read by a reader that shares nothing with them, by every rule
for archives that Proxmox shall restore."""
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import time

import pytest
import vmagen
from vmarun import MIB, SANITIZED, same_files, v  # noqa: F401  pylint: disable=unused-import


def disk_file(v, name, size, seed=1, density=0.5):
    data = vmagen.random_disk(random.Random(seed), size, density)
    v.put(name, data)
    return data


def sparse_file(v, name, size, pieces):
    """pieces {offset: bytes}; the rest is a hole."""
    with open(v.dir / name, "wb") as f:
        f.truncate(size)
        for at, data in pieces.items():
            f.seek(at)
            f.write(data)


def padded(data, to=512):
    return data + bytes(-len(data) % to)


def checked(v, name, disks, configs=()):
    """Follows all rules and holds exactly this: disks {name: bytes}."""
    parsed = vmagen.check(v.dir / name)
    assert parsed.configs == [(n.encode(), d) for n, d in dict(configs).items()]
    assert sorted(n.decode() for n in parsed.names.values()) == sorted(disks)
    assert sorted(parsed.names) == list(range(1, len(disks) + 1))
    for n, data in disks.items():
        assert parsed.content(n) == padded(data), n
    return parsed


def conf(v, name="qemu-server.conf", data=vmagen.CONF):
    v.put(name, data)
    return name


# ---------------------------------------------------------------------------------------- sources


def test_disks_and_configs(v):
    a, b = disk_file(v, "a.raw", 70 * 65536), disk_file(v, "b.img", 3 * 65536, 2)
    (v.dir / "sub").mkdir()
    conf(v)
    conf(v, "sub/qemu-server.fw", b"[OPTIONS]\n")
    v.ok("vma", "create", "a.vma", "-c", "qemu-server.conf", "-c", "sub/qemu-server.fw", "-d",
         "format=raw:drive-scsi0=a.raw", "-d", "format=raw:drive-scsi1=b.img")
    checked(v, "a.vma", {"drive-scsi0": a, "drive-scsi1": b},
            {"qemu-server.conf": vmagen.CONF, "qemu-server.fw": b"[OPTIONS]\n"})
    assert not [n for n in v.names() if n.startswith(".")]
    v.ok("vma", "extract", "a.vma", "out")
    same_files(v.dir / "out", {"qemu-server.conf": vmagen.CONF, "qemu-server.fw": b"[OPTIONS]\n",
                               "disk-drive-scsi0.raw": a, "disk-drive-scsi1.raw": b})


def test_the_old_way_to_name_disks(v):
    a, b = disk_file(v, "a.raw", 65536), disk_file(v, "b.raw", 65536, 2)
    conf(v)
    v.ok("vma", "create", "a.vma", "-c", "qemu-server.conf", "a.raw", "x=b.raw")
    checked(v, "a.vma", {"disk0": a, "x": b}, {"qemu-server.conf": vmagen.CONF})
    assert v.fails("vma", "create", "b.vma", "-d", "format=raw:a.raw", "b.raw")
    assert "b.vma" not in v.names()


@pytest.mark.parametrize("size", [512, 1000, 4096, 4608, 65535, 65536, 65536 + 512, 2 * 65536 - 4096, 3 * 65536 + 5 * 4096 + 1536,
                                  58 * 65536, 59 * 65536 - 512])
def test_sizes(v, size):
    data = disk_file(v, "a.raw", size, size, 0.8)
    data = data[:-1] + b"!"
    v.put("a.raw", data)
    v.ok("vma", "create", "a.vma", "-d", "format=raw:drive-scsi0=a.raw")
    checked(v, "a.vma", {"drive-scsi0": data})
    v.ok("vma", "extract", "a.vma", "out")
    same_files(v.dir / "out", {"disk-drive-scsi0.raw": padded(data)})


def test_an_empty_disk_is_refused(v):
    v.put("empty", b"")
    assert v.fails("vma", "create", "a.vma", "-d", "format=raw:drive-scsi0=empty")
    assert v.names() == ["empty"]


def test_254_disks_and_256_configs(v):
    args, disks, configs = [], {}, {}
    for n in range(254):
        disks[f"drive-scsi{n}"] = disk_file(v, f"{n}.raw", 512 * (1 + n % 150), n)
        args += ["-d", f"format=raw:drive-scsi{n}={n}.raw"]
    for n in range(256):
        configs[f"f{n}.conf"] = b"%d\n" % n * 3
        args += ["-c", conf(v, f"f{n}.conf", configs[f"f{n}.conf"])]
    v.ok("vma", "create", "a.vma", *args)
    checked(v, "a.vma", disks, configs)
    v.put("more", bytes(512))
    assert "254" in v.fails("vma", "create", "b.vma", *args, "-d", "format=raw:more=more")
    conf(v, "more.conf")
    assert "256" in v.fails("vma", "create", "b.vma", *args, "-c", "more.conf")
    assert "b.vma" not in v.names()


def test_the_largest_config_and_an_empty_one(v):
    big = random.Random(1).randbytes(65535)
    conf(v, "big", big)
    conf(v, "empty", b"")
    v.ok("vma", "create", "a.vma", "-c", "big", "-c", "empty")
    checked(v, "a.vma", {}, {"big": big, "empty": b""})
    v.put("too-big", bytes(65536))
    assert "too-big" in v.fails("vma", "create", "b.vma", "-c", "too-big")
    assert "nope" in v.fails("vma", "create", "b.vma", "-c", "nope")
    assert v.names() == ["a.vma", "big", "empty", "too-big"] or "a.vma.sums" in v.names()


def test_a_first_name_as_long_as_breaks_the_original(v):
    """509 characters make its header one byte too long; here they are too many anyway, but the lengths around the
    steps of the header are all right."""
    disk_file(v, "a.raw", 512)
    for length in (200, 237, 255):
        v.ok("vma", "create", f"{length}.vma", "-d", f"format=raw:{'n' * length}=a.raw")
        assert vmagen.check(v.dir / f"{length}.vma").names == {1: b"n" * length}
    for length in (507, 508, 509, 510, 511, 512):
        data = b"x" * (length + 1)
        conf(v, "c", data)
        v.ok("vma", "create", f"c{length}.vma", "-c", "c")
        checked(v, f"c{length}.vma", {}, {"c": data})


@pytest.mark.parametrize("names", [["a b"], ["a/b"], ["a", "a"], ["a\nb"], ["\x1b[31m"], ["n" * 256], ["a\tb"], ["a\x9bb"],
                                   ["a\u202eb"], ["a\udcff"]], ids=ascii)
def test_names_that_would_not_restore(v, names):
    disk_file(v, "a.raw", 512)
    args = [x for n in names for x in ("-d", f"format=raw:{n}=a.raw")]
    assert v.fails("vma", "create", "a.vma", *args)
    assert v.names() == ["a.raw"]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a\x9bb", "a\u202eb", "a\udcff"], ids=ascii)
def test_configs_that_would_not_come_out(v, name):
    conf(v, name)
    assert v.fails("vma", "create", "a.vma", "-c", name)
    assert v.names() == [name]


def test_two_configs_of_one_name(v):
    (v.dir / "sub").mkdir()
    conf(v)
    conf(v, "sub/qemu-server.conf")
    assert v.fails("vma", "create", "a.vma", "-c", "qemu-server.conf", "-c", "sub/qemu-server.conf")
    assert "a.vma" not in v.names()


def test_no_disk_and_no_config(v):
    """What the original makes here it cannot read itself."""
    r = v.vma("create", "a.vma")
    if r.code == 0:
        vmagen.check(v.dir / "a.vma")


def vmdk_chain(v):
    """base <- top, and what the top reads."""
    size = 3 * MIB
    expected = bytearray(size)
    for name, backing, writes in (("base.vmdk", [], ((0x11, 0, 300000 // 512 * 512), (0x22, MIB, 200704))),
                                  ("top.vmdk", ["-b", "base.vmdk", "-F", "vmdk"], ((0x33, 65536, 65536), (0, MIB, 65536)))):
        v.ok("drover", "create", "-q", "-f", "vmdk", *backing, name, *([] if backing else [str(size)]))
        for pattern, at, length in writes:
            v.ok("drover", "io", "-c", f"write -P {pattern} {at} {length}", name)
            expected[at:at + length] = bytes([pattern]) * length
    return bytes(expected)


def test_a_chain_as_source(v):
    expected = vmdk_chain(v)
    v.ok("vma", "create", "a.vma", "-d", "format=vmdk:drive-scsi0=top.vmdk")
    checked(v, "a.vma", {"drive-scsi0": expected})
    v.ok("vma", "create", "b.vma", "drive-scsi0=top.vmdk")  # its format is found out
    checked(v, "b.vma", {"drive-scsi0": expected})


def test_a_guessed_format_leads_to_no_other_place(v):
    (v.dir / "sub").mkdir()
    data = disk_file(v, "a.raw", 65536)
    (v.dir / "sub" / "disk").write_text('# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
                                        f'RW 128 FLAT "{v.dir}/a.raw" 0\nddb.adapterType = "ide"\n')
    for args in (["x=sub/disk"], ["-d", "x=sub/disk"]):
        assert "a.raw" in v.fails("vma", "create", "a.vma", *args).splitlines()[-1]
    v.ok("vma", "create", "a.vma", "-d", "format=vmdk:x=sub/disk")
    checked(v, "a.vma", {"x": data})


def test_the_state_of_a_machine(v):
    state = vmagen.random_disk(random.Random(5), 3 * 65536) + bytes(65536)
    v.put("state", state)
    disk = disk_file(v, "a.raw", 5 * 65536)
    v.ok("vma", "create", "a.vma", "-d", "format=raw:vmstate=state", "-d", "format=raw:drive-scsi0=a.raw")
    parsed = vmagen.parse(vmagen.plain_bytes(v.dir / "a.vma"), strict=True)
    assert parsed.content("vmstate") == state and parsed.content("drive-scsi0") == disk
    v.ok("vma", "extract", "a.vma", "out")
    same_files(v.dir / "out", {"vmstate.bin": state, "disk-drive-scsi0.raw": disk})


# ---------------------------------------------------------------------------------------- what is stored


def test_holes_are_not_read_and_zeros_not_stored(v):
    sparse_file(v, "a.raw", 1 << 40, {0: b"x" * 5000, 1 << 30: b"y", (1 << 40) - 1: b"z"})
    r = v.ok("vma", "create", "-v", "a.vma", "-d", "format=raw:drive-scsi0=a.raw", timeout=60)
    parsed = vmagen.parse_header(vmagen.plain_bytes(v.dir / "a.vma")[:1 << 20], True)
    assert parsed.disks[1][0] == 1 << 40
    assert os.path.getsize(v.dir / "a.vma") == parsed.header_size + -(-(1 << 24) // 58) * 512 + 4 * 4096
    assert f"image drive-scsi0: size={1 << 40} zeros={(1 << 40) - 4 * 4096} saved={4 * 4096}\n" in r.errors
    v.ok("vma", "verify", "a.vma")


def test_zeros_in_the_source_are_not_stored(v):
    v.put("a.raw", b"x" * 4096 + bytes(4096) + b"x" * 4096 + bytes(13 * 4096) + bytes(65536))
    v.ok("vma", "create", "a.vma", "-d", "format=raw:drive-scsi0=a.raw")
    parsed = vmagen.check(v.dir / "a.vma")
    assert sum(length for _, length, _ in parsed.extents) == 512 + 2 * 4096


# ---------------------------------------------------------------------------------------- where it goes


def test_an_existing_file_is_left_alone(v):
    disk_file(v, "a.raw", 65536)
    v.put("a.vma", b"precious")
    assert "a.vma" in v.fails("vma", "create", "a.vma", "-d", "format=raw:x=a.raw")
    assert v.get("a.vma") == b"precious" and v.names() == ["a.raw", "a.vma"]


def test_a_file_called_minus(v):
    data = disk_file(v, "a.raw", 65536)
    v.ok("vma", "create", "-", "-d", "format=raw:x=a.raw")
    checked(v, "-", {"x": data})


def test_the_mode_of_the_file(v):
    disk_file(v, "a.raw", 65536)
    v.ok("vma", "create", "a.vma", "-d", "format=raw:x=a.raw")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat(v.dir / "a.vma").st_mode) == 0o666 & ~mask & 0o644


def test_a_fifo(v):
    data = disk_file(v, "a.raw", 40 * 65536)
    os.mkfifo(v.dir / "fifo")
    writer = v.start("vma", "create", "fifo", "-d", "format=raw:x=a.raw")
    got = subprocess.run(["cat", "fifo"], cwd=v.dir, capture_output=True, check=True, timeout=30).stdout
    assert writer.wait(30) == 0
    v.put("got.vma", got)
    checked(v, "got.vma", {"x": data})
    assert stat.S_ISFIFO(os.stat(v.dir / "fifo").st_mode) and v.names() == ["a.raw", "fifo", "got.vma"]
    waiting = v.start("vma", "create", "fifo", "-d", "format=raw:x=a.raw")  # nobody comes
    time.sleep(0.2)
    waiting.terminate()
    assert waiting.wait(20) != 0 and stat.S_ISFIFO(os.stat(v.dir / "fifo").st_mode)
    waiting.communicate()
    writer.communicate()


def test_a_command(v):
    data = disk_file(v, "a.raw", 40 * 65536)
    v.ok("vma", "create", "exec:zstd -q > a.vma.zst", "-d", "format=raw:x=a.raw")
    checked(v, "a.vma.zst", {"x": data})
    v.ok("vma", "extract", "a.vma.zst", "out")
    same_files(v.dir / "out", {"disk-x.raw": data})


@pytest.mark.parametrize("command", ["cat >/dev/null; exit 3", "exit 3", "head -c 100000 >/dev/null", "nope-no-such-program", "kill $$"])
def test_a_command_that_fails_is_a_failure(v, command):
    disk_file(v, "a.raw", 400 * 65536, density=1)
    r = v.vma("create", "exec:" + command, "-d", "format=raw:x=a.raw")
    assert r.code == 1 and "vma: " in r.errors, r


def test_lines_of_v(v):
    data = disk_file(v, "a.raw", 100 * 65536, density=0.2)
    r = v.ok("vma", "create", "-v", "a.vma", "-d", "format=raw:x=a.raw")
    text = r.errors
    assert r.out == b""
    zeros = sum(1 for at in range(0, len(data), 4096) if not any(data[at:at + 4096])) * 4096
    assert re.search(rf"^progress 100% {len(data)}/{len(data)} {zeros}$", text, re.M), text
    assert f"image x: size={len(data)} zeros={zeros} saved={len(data) - zeros}\n" in text, text


# ---------------------------------------------------------------------------------------- trouble


def little_room(v, size="2M"):
    room = v.dir.parent / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(room)], capture_output=True,
                      check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    return room


def test_a_disk_that_is_full(v):
    disk_file(v, "a.raw", 100 * 65536, density=1)
    room = little_room(v)
    try:
        text = v.fails("vma", "create", room / "a.vma", "-d", "format=raw:x=a.raw")
        assert "No space left" in text and os.listdir(room) == []
        v.ok("vma", "create", "a.vma", "-d", "format=raw:x=a.raw")
        text = v.fails("vma", "extract", "a.vma", room / "out")
        assert "No space left" in text
        assert not [n for _, _, files in os.walk(room) for n in files if n.startswith("disk-")]
    finally:
        subprocess.run(["umount", str(room)], check=False)
    assert "No space left" in v.fails("vma", "create", "/dev/full", "-d", "format=raw:x=a.raw")
    assert os.path.exists("/dev/full")


def test_a_limit_on_the_size_of_files(v):
    disk_file(v, "a.raw", 100 * 65536, density=1)
    v.fails("vma", "create", "a.vma", "-d", "format=raw:x=a.raw", file_size=MIB)
    assert v.names() == ["a.raw"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(v, number):
    disk_file(v, "a.raw", 4 * MIB, density=1)
    p = v.start("drover", "vma", "create", "-r", "100K", "a.vma", "-d", "x=a.raw")
    deadline = time.monotonic() + 20
    while not [n for n in v.names() if n != "a.raw"]:  # it has begun
        assert time.monotonic() < deadline and p.poll() is None
    p.send_signal(number)
    p.communicate(timeout=20)
    assert p.returncode != 0
    assert v.names() == ["a.raw"]


def test_a_kill_leaves_nothing_under_the_final_name(v):
    data = disk_file(v, "a.raw", 4 * MIB, density=1)
    p = v.start("drover", "vma", "create", "-r", "100K", "a.vma", "-d", "x=a.raw")
    deadline = time.monotonic() + 20
    while not [n for n in v.names() if n != "a.raw"]:
        assert time.monotonic() < deadline and p.poll() is None
    p.kill()
    p.communicate(timeout=20)
    assert "a.vma" not in v.names()
    v.ok("drover", "vma", "create", "a.vma", "-d", "x=a.raw")  # what was left is no hindrance
    checked(v, "a.vma", {"x": data})
    # An empty one could be somebody's who is just beginning, if it is not old.
    for name in (".a.vma.drover-abc123", ".a.vma.sums.drover-abc123"):
        v.put(name, b"")
    os.utime(v.dir / ".a.vma.sums.drover-abc123", (1500000000, 1500000000))
    v.ok("drover", "vma", "create", "--force", "a.vma", "-d", "x=a.raw")
    assert ".a.vma.drover-abc123" in v.names() and ".a.vma.sums.drover-abc123" not in v.names()
    assert [n for n in v.names() if n.startswith(".") and os.path.getsize(v.dir / n)] == []


def test_an_interrupted_pipe_is_not_told_to_be_as_before(v):
    disk_file(v, "a.raw", 8 * MIB, density=1)
    os.mkfifo(v.dir / "p")
    p = v.start("drover", "vma", "create", "--no-sums", "p", "-d", "format=raw:x=a.raw", "-r", "65536")
    with open(v.dir / "p", "rb", buffering=0) as pipe:
        assert pipe.read(1)
        p.send_signal(signal.SIGINT)
        while pipe.read(65536):
            pass
    err = p.communicate()[1]
    assert p.returncode == 130 and b"interrupted: what went to p is no whole archive" in err, err


def test_an_archive_through_a_descriptor_is_durable(v):
    if SANITIZED or not shutil.which("strace"):
        pytest.skip("needs strace, which the leak checker does not stand")
    disk_file(v, "a.raw", MIB)
    for more, synced in (([], True), (["--no-sync"], False)):
        with open(v.dir / "out.vma", "wb") as out:
            subprocess.run(["strace", "-f", "-y", "-o", v.dir / "trace", "-e", "trace=fsync,fdatasync", v.bin / "drover", "vma", "create",
                            *more, "-", "-d", "format=raw:x=a.raw"], cwd=v.dir, stdout=out, check=True)
        assert ("/out.vma>" in (v.dir / "trace").read_text()) == synced


@pytest.mark.parametrize("force", [[], ["--force"]], ids=str)
def test_a_link_to_nothing_is_no_archive_to_be(v, force):
    disk_file(v, "a.raw", MIB)
    os.symlink("nowhere", v.dir / "l.vma")
    r = v.run("drover", "vma", "create", *force, "l.vma", "-d", "format=raw:x=a.raw")
    assert r.code == 1 and "is a link that leads to nothing" in r.errors
    assert sorted(os.listdir(v.dir)) == ["a.raw", "l.vma"]


@pytest.mark.parametrize("more", [[], ["--zstd", "--no-sums"]], ids=["plain", "zstd, no sums"])
def test_the_checksums_are_those_of_the_disks(v, more):
    disk_file(v, "a.raw", 70 * 65536 + 1000)
    sparse_file(v, "b.raw", 40 * 65536, {5 * 65536 + 4096: b"x" * 4096})
    v.put("state", b"s" * 100000)
    v.ok("drover", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "b.raw", "c.qcow2")
    v.ok("drover", "io", "-c", "write -P 7 64k 100k", "c.qcow2")
    disks = ["-d", "a=a.raw", "-d", "b=b.raw", "-d", "c=c.qcow2"]
    want = v.ok("drover", "checksum", "a.raw", "b.raw", "c.qcow2").out
    digests = [line.split()[0].decode() for line in want.splitlines()]
    assert v.ok("drover", "vma", "create", "--checksum", *more, "o.vma", *disks, "--vmstate", "state").out == want
    r = v.ok("drover", "vma", "create", "--checksum", "--json", *more, "p.vma", *disks, "--vmstate", "state")
    assert [disk.get("digest") for disk in json.loads(r.out)["disks"]] == digests + [None]
    r = v.ok("drover", "vma", "create", "--checksum", *more, "-", *disks, raw=True)
    assert r.err.endswith(want) and want not in r.out
