# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nbdkit plugin: what clients see, and what is in the images afterwards."""
import errno
import hashlib
import json
import os
import random
import signal
import socket
import struct
import subprocess

import pytest

import programs
from serving import GiB, KiB, MiB, PLUGIN, TiB, connect_by_hand, drover, extents, io, ok, run, zeros_and_data

nbd = pytest.importorskip("nbd")


def make(fmt, name, size, parent=None, *options):
    args = ["-b", parent[1], "-F", parent[0]] if parent else []
    drover("create", "-q", "-f", fmt, *args, *options, name, *([] if parent else [size]))
    return name


def fingerprint(*names):
    return [hashlib.sha256(open(n, "rb").read()).hexdigest() for n in names]


def chain(fmt):
    """A child over a parent: 0x11 from 0, 0x22 from 1 MiB in the child, and a range that it says is zero."""
    base = make("raw" if fmt == "add-cow" else fmt, "base", 8 * MiB)
    base_format = "raw" if fmt == "add-cow" else fmt
    io(base, "write -P 0x11 0 2M", fmt=base_format)
    make(fmt, "disk", 8 * MiB, (base_format, base))
    io("disk", "write -P 0x22 1M 128k", "write -z 512k 64k", fmt=fmt)
    return "disk"


FORMATS = ["vmdk", "qcow2", "add-cow"]


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("fmt", FORMATS)
def test_clients_see_the_bytes_and_the_zeros_of_a_chain(serve, fmt):
    told = json.loads(drover("map", "--output=json", chain(fmt)))
    h = serve("disk").connect()
    assert h.get_size() == 8 * MiB
    assert h.pread(4, 0) == b"\x11" * 4 and h.pread(4, MiB) == b"\x22" * 4
    assert h.pread(64 * KiB, 512 * KiB) == bytes(64 * KiB)
    ours = zeros_and_data((e["length"], 2 if e["zero"] else 0) for e in told)
    assert zeros_and_data(extents(h, 8 * MiB)) == ours


def test_a_disk_of_tebibytes_is_described_and_reached_to_its_end(serve):
    make("qcow2", "disk", 8 * TiB)
    io("disk", "write -P 7 5T 64k", "write -P 8 7T 64k")
    h = serve("disk").connect()
    assert zeros_and_data(extents(h, 3 * TiB, 4 * TiB)) == [
        (0, TiB, False), (TiB, TiB + 64 * KiB, True), (TiB + 64 * KiB, 3 * TiB, False)]
    assert h.pread(512, 7 * TiB) == b"\x08" * 512
    h.pwrite(b"\x09" * 512, 8 * TiB - 512)
    assert h.pread(1024, 8 * TiB - 1024) == bytes(512) + b"\x09" * 512


def test_requests_of_64_mib_of_data_and_128_mib_of_zeros(serve):
    make("qcow2", "disk", 6 * GiB)
    h = serve("disk").connect()
    data = random.Random(1).randbytes(64 * MiB)
    h.pwrite(data, 4 * GiB + 512)
    assert h.pread(64 * MiB, 4 * GiB + 512) == data
    h.zero(128 * MiB, 4 * GiB - 64 * MiB)
    assert h.pread(512, 4 * GiB + 64 * MiB - 512) == bytes(512)
    assert h.pread(512, 4 * GiB + 64 * MiB) == data[-512:]
    h.trim(128 * MiB, 4 * GiB)
    assert zeros_and_data(extents(h, 6 * GiB)) == [(0, 6 * GiB, False)]


def test_one_extent_is_told_to_a_client_that_wants_one(serve):
    h = serve(chain("qcow2")).connect()
    got = []
    h.block_status(8 * MiB, 0, lambda _c, _o, e, _err: got.extend(e) or 0, nbd.CMD_FLAG_REQ_ONE)
    assert got == [512 * KiB, 0]


def test_a_disk_inside_an_archive_is_read_only_unless_it_is_temporary(serve):
    make("raw", "disk.raw", MiB)
    io("disk.raw", "write -P 5 0 64k", fmt="raw")
    drover("vma", "create", "a.vma", "-d", "drive-a=disk.raw")
    before = fingerprint("a.vma")
    h = serve("vma:a.vma#drive-a").connect("drive-a")
    assert h.is_read_only() and h.pread(512, 0) == b"\x05" * 512
    h = serve("vma:a.vma#drive-a", "temporary=true").connect()
    h.pwrite(b"\x06" * 512, 512)
    assert h.pread(1024, 0) == b"\x05" * 512 + b"\x06" * 512
    assert fingerprint("a.vma") == before


# ---------------------------------------------------------------- writing

@pytest.mark.parametrize("fmt", ["raw", *FORMATS])
def test_what_was_flushed_is_there_after_a_kill(serve, fmt):
    name = make("raw", "disk", 8 * MiB) if fmt == "raw" else chain(fmt)
    server = serve(name, f"format={fmt}")
    h = server.connect()
    h.pwrite(b"\x31" * 64 * KiB, 3 * MiB)
    h.flush()
    h.pwrite(b"\x32" * 4096, 4 * MiB, nbd.CMD_FLAG_FUA)
    h.zero(64 * KiB, 0, nbd.CMD_FLAG_FUA)
    server.kill()
    io(name, "read -P 0x31 3M 64k", "read -P 0x32 4M 4k", "read -P 0 0 64k", fmt=fmt)


@pytest.mark.parametrize("fmt, number", [(fmt, signal.SIGTERM) for fmt in FORMATS] + [("qcow2", signal.SIGHUP)])
def test_the_server_ends_although_clients_stay_and_its_images_are_clean(serve, fmt, number):
    server = serve(chain(fmt))
    clients = [server.connect() for _ in range(3)]
    clients[0].pwrite(b"\x31" * 5000, 3 * MiB + 11)
    server.stop(number)
    out = drover("check", "disk")
    assert "No errors were found" in out, out
    io("disk", f"read -P 0x31 {3 * MiB + 11} 5000", fmt=fmt)


def test_a_disk_that_is_only_read_is_left_as_it_is(serve):
    before = fingerprint(chain("vmdk"), "base")
    server = serve("disk", options=["-r"])
    h = server.connect()
    assert h.is_read_only()
    h.pread(512, 0)
    with pytest.raises(nbd.Error):
        h.set_strict_mode(0)
        h.pwrite(b"x" * 512, 0)
    server.stop()
    assert fingerprint("disk", "base") == before


def test_what_is_temporary_is_gone_with_the_server(serve, tmp_path):
    before = fingerprint(chain("qcow2"), "base")
    server = serve("disk", "temporary=true")
    h = server.connect()
    h.pwrite(b"\x44" * MiB, MiB // 2)
    h.flush()
    assert h.pread(2 * MiB, 0) == b"\x11" * (MiB // 2) + b"\x44" * MiB + b"\x11" * (MiB // 2)
    assert os.listdir(tmp_path / "tmp") == []  # nothing to leave behind, however it ends
    server.kill()
    assert fingerprint("disk", "base") == before


def test_zeroing_fast_is_refused_where_bytes_would_be_written(serve):
    chain("vmdk")
    h = serve("disk").connect()
    with pytest.raises(nbd.Error) as e:
        h.zero(64 * KiB, 128 * KiB, nbd.CMD_FLAG_FAST_ZERO)
    assert e.value.errnum == errno.EOPNOTSUPP
    assert h.pread(64 * KiB, 128 * KiB) == b"\x11" * 64 * KiB
    h.zero(64 * KiB, 128 * KiB)
    assert h.pread(64 * KiB, 128 * KiB) == bytes(64 * KiB)


def test_a_trim_never_shows_the_parent(serve):
    chain("qcow2")
    h = serve("disk").connect()
    h.trim(128 * KiB, MiB)
    assert h.pread(128 * KiB, MiB) in (bytes(128 * KiB), b"\x22" * 128 * KiB)


def test_an_image_in_use_is_refused(serve):
    make("qcow2", "disk", MiB)
    server = serve("disk", "read-only=false")
    r = run("nbdkit", "-f", "-U", "other", PLUGIN, "disk")
    assert r.returncode != 0 and "lock" in r.stdout and "disk" in r.stdout, r.stdout
    server.stop()


# ---------------------------------------------------------------- several disks, several clients

def test_several_disks_have_names_and_the_first_is_the_default(serve):
    for i, name in enumerate(["a.qcow2", "b.qcow2", "c.qcow2"]):
        make("qcow2", name, (i + 1) * MiB)
    server = serve("a.qcow2", "b.qcow2", "export=second disk", "disk=c.qcow2", "read-only=true")
    names = [e["export-name"] for e in json.loads(ok("nbdinfo", "--list", "--json", server.uri()))["exports"]]
    assert sorted(names) == ["a.qcow2", "c.qcow2", "second disk"]
    assert server.connect().get_size() == MiB
    assert server.connect("second%20disk").get_size() == 2 * MiB
    assert server.connect("c.qcow2").is_read_only()
    with pytest.raises(nbd.Error):
        server.connect("d.qcow2")
    assert "no export named 'd.qcow2'" in server.text()


def test_a_disk_and_its_parent_are_not_both_served_for_writing(serve):
    chain("qcow2")
    for order in (["disk", "base"], ["base", "disk"], ["disk", "read-only=false", "base", "read-only=false"]):
        r = run("nbdkit", "-f", "-U", "s", PLUGIN, *order, timeout=20)
        assert r.returncode != 0 and "base is used by" in r.stdout, r.stdout
    assert serve("disk", "base", "read-only=true").connect("base").pread(1, 0) == b"\x11"


def test_what_one_client_flushed_others_see_and_find_durable(serve):
    server = serve(chain("qcow2"))
    a, b = server.connect(), server.connect()
    assert a.can_multi_conn()
    a.pwrite(b"\x51" * 4096, 0)
    assert b.pread(4096, 0) == b"\x51" * 4096
    b.flush()  # of what another connection wrote
    server.kill()
    io("disk", "read -P 0x51 0 4k")


@pytest.mark.parametrize("fmt", ["raw", *FORMATS])
def test_random_programs_of_several_clients_read_what_they_wrote(serve, fmt):
    name = make("raw", "disk", 8 * MiB) if fmt == "raw" else chain(fmt)
    server = serve(name, f"format={fmt}")
    part = MiB + 4099  # parts meet in the middle of clusters
    clients = [programs.Program(server, programs.new_seed() + i, (i * part, part), steps=150) for i in range(4)]
    want = b"".join(client.end() for client in clients)
    server.stop()
    drover("convert", "-f", fmt, "-O", "raw", name, "plain")
    with open("plain", "rb") as f:
        assert f.read(len(want)) == want


def test_the_server_ends_although_a_client_does_not_read_its_replies(serve):
    server = serve(chain("qcow2"))
    other = server.connect()
    other.pwrite(b"\x31" * 5000, 3 * MiB + 11)
    with connect_by_hand(server) as stuck:
        for handle in range(20):
            stuck.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, handle, 0, 2 * MiB))
        assert stuck.recv(4, socket.MSG_PEEK)  # there is a reply, far too long for the socket's buffers
        server.stop()
    assert "No errors were found" in drover("check", "disk")
    io("disk", f"read -P 0x31 {3 * MiB + 11} 5000", fmt="qcow2")


def test_the_name_that_a_client_asks_for_cannot_forge_the_log(serve):
    server = serve(chain("qcow2"))
    with pytest.raises(nbd.Error):
        server.connect("%1b%5b2J%0anbdkit:%20forged%7f%c2%9b")
    server.stop()
    assert "'?[2J?nbdkit: forged???'" in server.text(), server.text()


def test_a_client_that_leaves_in_the_middle_of_a_request_harms_nobody(serve):
    server = serve(chain("qcow2"))
    other = server.connect()
    for _ in range(3):
        s = connect_by_hand(server)
        s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, MiB) + b"x" * 1000)  # a write, cut off
        s.close()
    assert other.pread(4096, 0) == b"\x11" * 4096
    server.stop()
    assert "No errors were found" in drover("check", "disk")


def test_a_client_that_leaves_with_many_replies_under_way_harms_nobody(serve):
    server = serve(chain("qcow2"))
    other = server.connect()
    other.pwrite(b"\x31" * 5000, 3 * MiB + 11)
    for _ in range(10):
        with connect_by_hand(server) as s:
            for handle in range(16):
                s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, handle, 0, MiB))
            assert s.recv(4, socket.MSG_PEEK)
        assert other.pread(4096, 0) == b"\x11" * 4096
    server.stop()
    assert "No errors were found" in drover("check", "disk")
    io("disk", f"read -P 0x31 {3 * MiB + 11} 5000", fmt="qcow2")


def test_an_abort_ends_the_server(serve):
    server = serve(chain("qcow2"))
    server.process.send_signal(signal.SIGABRT)
    assert server.process.wait(60) == -signal.SIGABRT


# ---------------------------------------------------------------- with other programs

@pytest.mark.parametrize("fmt", FORMATS)
def test_nbdcopy_and_qemu_img_copy_a_disk_alike(serve, fmt):
    server = serve(chain(fmt))
    ok("nbdcopy", server.uri(), "by-nbdcopy")
    ok("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri(), "by-qemu")
    server.stop()
    drover("convert", "-O", "raw", "disk", "ours")
    assert fingerprint("by-nbdcopy") == fingerprint("by-qemu") == fingerprint("ours")


def test_nbdcopy_fills_a_disk(serve):
    data = random.Random(2).randbytes(3 * MiB) + bytes(2 * MiB) + b"end" * 1000
    data += bytes(8 * MiB - len(data))
    with open("source", "wb") as f:
        f.write(data)
    server = serve(chain("vmdk"))
    ok("nbdcopy", "source", server.uri())
    server.stop()
    assert "identical" in drover("compare", "-F", "raw", "disk", "source")


def test_qemu_io_works_on_a_served_disk(serve):
    server = serve(chain("vmdk"))
    out = ok("qemu-io", "-f", "raw", "-c", "write -P 3 100k 200k", "-c", "write -z 1M 64k", "-c", "discard 2M 1M",
             "-c", "read -P 3 100k 200k", "-c", "read -P 0 1M 64k", "-c", "flush", server.uri())
    assert "failed" not in out, out


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("parameters, says", [
    ([], "disk="),
    (["absent"], "absent"),
    (["disk", "read-only=perhaps"], "read-only=perhaps"),
    (["disk", "no-such=1"], "no-such"),
    (["export=x", "disk"], "must follow"),
    (["disk", "cache=never"], "cache=never"),
    (["disk", "disk"], "both be the export"),
    (["disk", "format=vmdk"], "disk"),
    (["disk", "share=true"], "read-only"),
    (["disk", "snapshot=s"], "s"),
    (["disk", "temporary=true", "read-only=true"], "temporary"),
    (["disk", "ready-fd=99"], "ready-fd=99"),
    (["disk="], "name of a disk"),
], ids=str)
def test_a_mistake_is_told_in_one_line(work, parameters, says):
    make("qcow2", "disk", MiB)
    r = run("nbdkit", "-f", "-U", "s", PLUGIN, *parameters, timeout=20)
    lines = [line for line in r.stdout.splitlines() if "error:" in line]
    assert r.returncode != 0 and len(lines) == 1 and says in lines[0], r.stdout


def test_damage_is_an_error_for_the_client_and_no_crash(serve):
    chain("qcow2")
    server = serve("disk", "read-only=true")
    h = server.connect()
    os.truncate("base", 512 * KiB)  # behind its back
    with pytest.raises(nbd.Error):
        h.pread(MiB, 0)
    assert "base" in server.text()
    assert h.pread(512, MiB) == b"\x22" * 512


@pytest.mark.parametrize("mode", ["read-only=false", "temporary=true"])
def test_the_plugin_goes_into_the_background_with_relative_names(work, monkeypatch, mode):
    chain("qcow2")
    os.mkdir("written")
    monkeypatch.setenv("TMPDIR", "written")
    ready, told = os.pipe()
    subprocess.run(["nbdkit", "-U", str(work / "s"), "-P", str(work / "pid"), PLUGIN, "disk", mode,
                    f"ready-fd={told}"], check=True, timeout=20, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, pass_fds=[told])
    os.close(told)
    with os.fdopen(ready) as f:
        assert f.readline() == "ready\n"
        h = nbd.NBD()
        h.connect_unix(str(work / "s"))
        assert h.pread(4, 0) == b"\x11" * 4
        os.kill(int((work / "pid").read_text()), signal.SIGTERM)
        assert f.read() == "closed\n"  # until nobody has the other end any more
