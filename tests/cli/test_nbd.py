# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks of NBD servers as sources and targets."""
import concurrent.futures
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess

import pytest

from remote import Cutting, Nbdkit, OddNbd, make_certificates, wait_for_socket

MIB = 1 << 20
ONE_THREAD = ["-t", "1"]  # for each connection: nbdkit 1.32 fails an assertion when one with several is cut

pytestmark = pytest.mark.skipif(not shutil.which("nbdkit"), reason="nbdkit is not installed")


@pytest.fixture
def serve(t, tmp_path):
    servers = []

    def start(*args, **kw):
        servers.append(Nbdkit(tmp_path, f"s{len(servers)}", *args, **kw))
        return servers[-1]

    yield start
    for s in servers:
        s.stop()


@pytest.fixture
def cutting(tmp_path):
    proxies = []

    def start(*args, **kw):
        proxies.append(Cutting(tmp_path / f"cut{len(proxies)}.sock", *args, **kw))
        return proxies[-1]

    yield start
    for p in proxies:
        p.stop()


@pytest.fixture
def odd(tmp_path):
    servers = []

    def start(*args, **kw):
        servers.append(OddNbd(tmp_path / f"odd{len(servers)}.sock", *args, **kw))
        return servers[-1]

    yield start
    for s in servers:
        s.stop()


def make_disk(t, name="disk.raw", size=64 * MIB):
    """Data at the beginning and at 40 MiB, holes elsewhere."""
    with open(t.dir / name, "wb") as f:
        f.truncate(size)
        f.write(random.Random(1).randbytes(3 * MIB))
        f.seek(40 * MIB)
        f.write(random.Random(2).randbytes(MIB))
    return name


def test_a_raw_disk_is_read_and_its_holes_are_not(t, serve):
    make_disk(t)
    s = serve("file", t.dir / "disk.raw")
    t.ok("convert", "-O", "raw", s.uri, "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == (t.dir / "disk.raw").read_bytes()
    assert sum(n for _, n in s.requests("Read")) < 5 * MIB
    assert json.loads(t.ok("info", "--output=json", s.uri))["virtual-size"] == 64 * MIB
    assert "identical" in t.ok("compare", s.uri, "disk.raw")
    assert t.ok("checksum", s.uri).split()[0] == t.ok("checksum", "disk.raw").split()[0]
    data = [(e["start"], e["length"]) for e in json.loads(t.ok("map", "--output=json", s.uri)) if e["data"]]
    assert data == [(0, 3 * MIB), (40 * MIB, MIB)]


def test_qemus_spellings_name_the_same_disk(t, serve):
    make_disk(t)
    s = serve("file", t.dir / "disk.raw", options=["-e", "a disk"])
    path = str(s.socket)
    nested = json.dumps({"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix", "path": path}, "export": "a disk"}})
    flat = json.dumps({"driver": "nbd", "server.type": "unix", "server.path": path, "export": "a disk"})
    options = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={path},file.export=a disk"
    for args in ([f"nbd:unix:{path}:exportname=a disk"], [f"nbd+unix:///a%20disk?socket={path}"], ["json:" + nested], ["json:" + flat],
                 ["--image-opts", options]):
        assert json.loads(t.ok("info", "--output=json", *args))["virtual-size"] == 64 * MIB
        assert t.ours("qemu-img", "info", *args).code == 0
    r = t.drover("info", "json:" + json.dumps({"driver": "nbd", "path": path, "colour": "red"}))
    assert r.code == 1 and "colour" in r.err
    (t.dir / "nbd:plain").write_bytes(bytes(512))
    assert t.drover("info", "nbd:plain").code == 0


def test_an_image_on_a_server_and_its_children_work(t, serve):
    make_disk(t)
    t.ok("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    s = serve("file", t.dir / "disk.qcow2")
    assert "identical" in t.ok("compare", s.uri, "disk.raw")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", s.uri, "--allow-path", s.uri, "child.qcow2")
    assert s.uri in t.ok("snapshot", "-l", s.uri)
    r = t.drover("compare", "child.qcow2", "disk.raw")
    assert r.code != 0 and f"--allow-path {s.uri}" in r.err
    assert "identical" in t.ok("compare", "--allow-path", s.uri, "child.qcow2", "disk.raw")
    assert "identical" in t.ok("compare", "child.qcow2", "disk.raw", env={"DROVER_ALLOW_PATH": f"/nowhere:{s.uri}:/tmp"})
    assert t.real("qemu-img", "compare", "child.qcow2", "disk.raw").code == 0


def test_nothing_stands_beside_a_socket(t, serve):
    """Neither may an image lead to other sockets, nor do allowed ones lead to them."""
    make_disk(t)
    base = serve("file", t.dir / "disk.raw")
    t.ok("create", "-f", "qcow2", "-F", "raw", "-u", "-b", base.socket.name, "relative.qcow2", "64M")
    image = serve("file", t.dir / "relative.qcow2")
    inner = {"driver": "qcow2", "file": {"driver": "nbd", "path": str(image.socket)}}
    for name in (image.uri, f"nbd:unix:{image.socket}", "json:" + json.dumps(inner)):
        for r in (t.drover("map", name), t.ours("qemu-img", "map", name)):
            assert r.code == 1 and "nothing stands beside" in r.err
    t.ok("create", "-f", "qcow2", "-F", "raw", "-u", "-b", base.uri, "whole.qcow2", "64M")
    image = serve("file", t.dir / "whole.qcow2")
    assert "refuses to open" in t.drover("map", image.uri).err
    inner["file"]["path"] = str(image.socket)
    t.ok("map", "--allow-path", base.uri, "json:" + json.dumps(inner))
    t.ok("create", "-f", "qcow2", "-F", "raw", "-u", "-b", f"{image.uri}/&socket={base.socket}", "led.qcow2", "64M")
    assert "refuses to open" in t.drover("map", "--allow-path", image.uri, "led.qcow2").err


def test_many_requests_are_under_way_at_once(t, serve):
    s = serve("pattern", "64M", "rdelay=10ms", filters=["delay"])
    t.ok("convert", "-O", "raw", s.uri, "copy.raw")
    assert s.most_at_once("Read") >= 8
    assert s.connections() > 1
    one = serve("pattern", "64M", "rdelay=10ms", "multi-conn-mode=disable", filters=["multi-conn", "delay"])
    t.ok("convert", "-O", "raw", one.uri, "copy1.raw")
    assert one.most_at_once("Read") >= 8 and one.connections() == 1


def test_blocks_of_the_server_are_obeyed(t, serve):
    make_disk(t)
    rules = ["blocksize-error-policy=error", "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K"]
    s = serve("file", t.dir / "disk.raw", *rules, filters=["blocksize-policy"])
    t.io(s.uri, "write -P 7 1000 5000", "write -z 70000 100000", "read -P 7 1000 5000", "read -P 0 70000 100000", fmt="raw")
    t.ok("convert", "-O", "raw", s.uri, "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == (t.dir / "disk.raw").read_bytes()
    assert max(n for _, n in s.requests("Read")) == 65536


def test_a_disk_on_a_server_is_written(t, serve):
    make_disk(t)
    t.ok("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    with open(t.dir / "target.raw", "wb") as f:
        f.write(b"x" * (64 * MIB))
    s = serve("file", t.dir / "target.raw")
    t.ok("convert", "-n", "-O", "raw", "disk.qcow2", s.uri)
    assert (t.dir / "target.raw").read_bytes() == (t.dir / "disk.raw").read_bytes()
    assert os.stat(t.dir / "target.raw").st_blocks * 512 < 8 * MIB
    t.io(s.uri, "discard 0 1M", "read -P 0 0 1M", "write -P 8 2M 64k", "flush", "write -f -P 9 1M 64k", "read -P 9 1M 64k", fmt="raw")
    log = s.log.read_text()
    assert " Zero" in log and " Flush" in log and "fua=1" in log
    r = t.drover("resize", "-f", "raw", s.uri, "80M")
    assert r.code == 1 and s.uri in r.err
    r = t.drover("convert", "-n", "-O", "raw", "disk.qcow2", serve("null", "1M").uri)
    assert r.code == 1


def test_a_read_only_server_is_not_written(t, serve):
    make_disk(t)
    s = serve("file", t.dir / "disk.raw", options=["-r"])
    r = t.drover("io", "-f", "raw", "-c", "write 0 512", s.uri)
    assert r.code == 1 and "lets nobody write" in r.err


def test_reads_go_on_after_lost_connections(t, serve, cutting):
    make_disk(t)
    s = serve("file", t.dir / "disk.raw", options=ONE_THREAD)
    c = cutting(s.socket, [1_000_000, 600, 100_000, 700_000, 300])
    t.ok("convert", "-O", "raw", c.uri, "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == (t.dir / "disk.raw").read_bytes()
    assert c.connections > 3


def test_a_server_that_does_not_come_back_is_an_error_in_time(t, serve, cutting):
    make_disk(t)
    c = cutting(serve("file", t.dir / "disk.raw", options=ONE_THREAD).socket, [1_000_000], then_refuse=True)
    r = t.drover("convert", "-O", "raw", c.uri, "copy.raw", env={"DROVER_NET_RECONNECT": "1"})
    assert r.code == 1 and "did not come back" in r.err and not (t.dir / "copy.raw").exists()


def test_another_disk_under_the_same_name_is_not_read(t, serve, cutting):
    make_disk(t)
    s = serve("file", t.dir / "disk.raw", options=ONE_THREAD)
    other = serve("memory", "32M")
    c = cutting(s.socket, [1_000_000], then=other.socket)
    r = t.drover("convert", "-O", "raw", c.uri, "copy.raw")
    assert r.code == 1 and "another disk" in r.err


def test_a_flush_that_is_cut_is_sent_again(t, serve, cutting):
    with open(t.dir / "target.raw", "wb") as f:
        f.truncate(8 * MIB)
    c = cutting(serve("file", t.dir / "target.raw", options=ONE_THREAD).socket, [], cut_on_flush=True)
    t.io(c.uri, "write -P 1 0 64k", "write -P 2 1M 64k", "flush", "read -P 1 0 64k", fmt="raw")
    assert c.was_cut and (t.dir / "target.raw").read_bytes()[MIB:MIB + 65536] == b"\2" * 65536


def while_killing(server, counts, command):
    """Runs the command, and kills the server, which forgets what was not flushed, when it has had so many writes, and starts it
    again."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(command)
        for count in counts:
            while not running.done() and server.log.read_text().count(" Write id=") < count:
                select.select([], [], [], 0.002)
            assert not running.done()
            server.kill()
            server.start()
        running.result()


def forgetful(t, serve, size):
    with open(t.dir / "target.raw", "wb") as f:
        f.truncate(size)
    return serve("file", t.dir / "target.raw", "cache=writeback", filters=["cache"], options=ONE_THREAD)


def test_a_copy_to_a_server_that_is_killed_is_whole(t, serve):
    data = random.Random(3).randbytes(24 * MIB)
    (t.dir / "disk.raw").write_bytes(data)
    s = forgetful(t, serve, len(data))
    while_killing(s, [4, 9], lambda: t.ok("convert", "-n", "-O", "raw", "-t", "writeback", "disk.raw", s.uri))
    assert (t.dir / "target.raw").read_bytes() == data


def test_random_writes_to_a_server_that_is_killed_are_there(t, serve):
    choice, shadow, commands = random.Random(4), bytearray(2 * MIB), []
    for i in range(400):
        offset, length, byte = choice.randrange(0, 2 * MIB - 20000), choice.randrange(1, 20000), choice.choice([0, i % 255 + 1])
        commands.append(f"write -P {byte} {offset} {length}" if byte else f"write -z {offset} {length}")
        shadow[offset:offset + length] = bytes([byte]) * length
        if i % 40 == 0:
            commands.append("flush")
    s = forgetful(t, serve, len(shadow))
    while_killing(s, [15, 30, 5], lambda: t.io(s.uri, *commands, "flush", fmt="raw"))
    assert (t.dir / "target.raw").read_bytes() == shadow


def test_writes_that_are_durable_by_themselves_are_not_lost(t, serve, cutting):
    with open(t.dir / "target.raw", "wb") as f:
        f.truncate(8 * MIB)
    c = cutting(serve("file", t.dir / "target.raw", options=ONE_THREAD).socket, [200_000])
    t.io(c.uri, "write -f -P 1 0 64k", "read -P 0 1M 512k", "write -f -P 2 64k 64k", "read -P 2 64k 64k", fmt="raw")
    assert c.connections == 2


def test_a_silent_server_is_given_up(t, tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        r = t.drover("info", f"nbd+unix:///?socket={tmp_path}/silent.sock", env={"DROVER_NET_TIMEOUT": "1"})
    assert r.code == 1 and "does not answer" in r.err


def test_errors_of_the_server_are_told(t, serve):
    s = serve("pattern", "8M", "error-pread=EIO", "error-pread-rate=100%", filters=["error"])
    r = t.drover("convert", "-f", "raw", "-O", "raw", s.uri, "copy.raw")
    assert r.code == 1 and "Input/output error" in r.err and s.uri in r.err
    s = serve("memory", "8M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", filters=["error"])
    r = t.drover("io", "-f", "raw", "-c", "write -P 1 0 4k", s.uri)
    assert "No space left" in r.out + r.err


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_a_server_proves_by_certificate_who_it_is(t, tmp_path, serve):
    make_certificates(tmp_path)
    make_disk(t)
    s = serve("file", t.dir / "disk.raw", options=["--tls=require", f"--tls-certificates={tmp_path}"], tcp=True)
    assert "identical" in t.ok("compare", f"nbds://localhost:{s.port}/?tls-certificates={tmp_path}", "disk.raw")
    t.ok("convert", "-n", "-O", "raw", "disk.raw", f"nbds://localhost:{s.port}/?tls-certificates={tmp_path}")
    for name in (f"nbds://127.0.0.1:{s.port}/?tls-certificates={tmp_path}", f"nbds://localhost:{s.port}/",
                 f"nbds://localhost:{s.port}/?tls-certificates={tmp_path}/another", f"nbds://localhost:{s.port}/?tls-certificates=/nowhere"):
        r = t.drover("info", name)
        assert r.code == 1 and "certificate" in r.err and len(r.err.splitlines()) == 1, r
    r = t.drover("info", f"nbd://localhost:{s.port}/")
    assert r.code == 1 and "TLS" in r.err
    for directory, code in ((tmp_path, 0), (tmp_path / "another", 1)):  # QEMU's spellings
        creds = ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={directory}"]
        name = {"driver": "raw", "file": {"driver": "nbd", "host": "localhost", "port": str(s.port), "tls-creds": "tls0"}}
        r = t.ours("qemu-img", "info", *creds, "--image-opts", f"driver=nbd,host=localhost,port={s.port},tls-creds=tls0")
        assert r.code == code and ("certificate" in r.err) == (code == 1), r
        assert t.ours("qemu-img", "info", *creds, "json:" + json.dumps(name)).code == code
    r = t.ours("qemu-img", "info", "--image-opts", f"driver=nbd,host=localhost,port={s.port},tls-creds=tls0")
    assert r.code == 1 and "No TLS credentials with id 'tls0'" in r.err


def test_a_disk_is_reached_by_tls(t, tmp_path, serve):
    (tmp_path / "keys.psk").write_text("me:" + "ab" * 32 + "\n")
    creds = ["--object", f"tls-creds-psk,id=keys,endpoint=client,dir={tmp_path},username=me"]
    make_disk(t)
    s = serve("file", t.dir / "disk.raw", options=["--tls=require", f"--tls-psk={tmp_path}/keys.psk"])
    assert "identical" in t.ok("compare", f"nbds+unix://me@/?socket={s.socket}&tls-psk-file={tmp_path}/keys.psk", "disk.raw")
    t.ok("info", *creds, "--image-opts", f"driver=nbd,server.type=unix,server.path={s.socket},tls-creds=keys")
    r = t.drover("info", s.uri)
    assert r.code == 1 and "cannot connect" in r.err


def test_qemu_nbd_serves_what_we_read_and_write(t, tmp_path):
    make_disk(t)
    t.ok("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    t.ok("create", "-f", "qcow2", "target.qcow2", "64M")
    if not shutil.which("qemu-nbd"):
        pytest.skip("qemu-nbd is not installed")
    servers = []
    for name in ("disk", "target"):
        path = tmp_path / f"{name}.q"
        servers.append(subprocess.Popen(["qemu-nbd", "-t", "-e", "8", "-f", "qcow2", "-k", path, t.dir / f"{name}.qcow2"]))
        wait_for_socket(path, servers[-1])
    try:
        t.ok("convert", "-n", "-O", "raw", f"nbd:unix:{tmp_path}/disk.q", f"nbd:unix:{tmp_path}/target.q")
        assert "identical" in t.ok("compare", f"nbd:unix:{tmp_path}/target.q", "disk.raw")
    finally:
        for s in servers:
            s.terminate()
            s.wait()
    assert t.real("qemu-img", "compare", "target.qcow2", "disk.raw").code == 0


DATA = random.Random(9).randbytes(3 * 4096)
HOLED = DATA[:4096] + bytes(4096) + DATA[8192:]


def same(t, server, data):
    """Read the way a copy is, and in small pieces."""
    t.ok("convert", "-f", "raw", "-O", "raw", server.uri, "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == data + bytes(-len(data) % 512)


def test_a_server_that_knows_next_to_nothing_is_read_and_written(t, odd):
    """Neither extents nor structured replies, flushes, zeros, trims."""
    s = odd(DATA, structured=False)
    same(t, s, DATA)
    t.io(s.uri, "write -P 7 100 5000", "write -z 1000 100", "discard 2000 512", "write -f -P 8 3000 10", "flush", "read -P 7 500 500",
         "read -P 8 3000 10", fmt="raw")
    assert s.data[1000:1100] == bytes(100) and s.data[900:1000] == b"\7" * 100 and s.data[3000:3010] == b"\10" * 10
    assert {c for c, _, _ in s.requests} == {s.READ, s.WRITE}


def test_a_size_that_is_no_multiple_of_anything_is_kept(t, odd):
    for blocks in (None, (1, 4096, 65536), (512, 4096, 65536)):
        size = 10001 if not blocks or blocks[0] == 1 else 10240
        s = odd(DATA[:size], blocks=blocks, flags=OddNbd.FLUSH)
        same(t, s, DATA[:size])
        t.io(s.uri, f"write -P 7 {size - 700} 700", f"read -P 7 {size - 700} 700", fmt="raw")
        assert s.data == DATA[:size - 700] + b"\7" * 700 and len(s.data) == size


def test_large_blocks_and_small_requests_are_obeyed(t, odd):
    s = odd(HOLED, blocks=(4096, 4096, 4096), flags=OddNbd.FLUSH)
    same(t, s, HOLED)
    t.io(s.uri, "write -P 7 100 5000", "read -P 7 100 5000", fmt="raw")
    assert all(o % 4096 == 0 and n == 4096 for c, o, n in s.requests if c in (s.READ, s.WRITE))
    r = t.drover("info", "-f", "raw", odd(HOLED[:9000], blocks=(4096, 4096, 4096)).uri)
    assert r.code == 1 and "no multiple of its blocks of 4096" in r.err and len(r.err.splitlines()) == 1


def chunk(kind, offset, data=b""):
    return (kind, struct.pack(">Q", offset) + data)


@pytest.mark.parametrize("pieces, expected", [
    (lambda o, n: [chunk(1, o, HOLED[o:4096]), chunk(2, 4096, struct.pack(">I", 4096)), chunk(1, 8192, HOLED[8192:])], HOLED),
    (lambda o, n: [chunk(1, 8192, HOLED[8192:]), chunk(2, 4096, struct.pack(">I", 4096)), chunk(1, o, HOLED[o:4096]), (0, b"")], HOLED),
    (lambda o, n: [chunk(1, o, HOLED[o:4096]), (0, b"")], None),
    (lambda o, n: [(0, b"")], None),
    (lambda o, n: [chunk(1, o, HOLED[o:8192]), chunk(1, o, HOLED[o:4096])], None),
    (lambda o, n: [chunk(1, o, HOLED[o:4096]), (32770, struct.pack(">IHQ", 5, 0, 4096))], None),
    (lambda o, n: [(32769, struct.pack(">IH", 5, 4) + b"gone")], None),
    (lambda o, n: [chunk(1, o, HOLED + b"more")], None),
    (lambda o, n: [chunk(2, o, struct.pack(">I", 1 << 31))], None),
    (lambda o, n: [chunk(2, o, struct.pack(">I", 0)), (0, b"")], None),
    (lambda o, n: [(9, b"what")], None),
    (lambda o, n: [(5, struct.pack(">III", 1, n, 3))], None),
], ids=["a hole", "any order", "too little", "nothing", "twice", "an error in the middle", "an error", "too much", "a huge hole", "an empty hole",
        "an unknown kind", "another command's"])
def test_a_read_in_chunks_is_whole_or_an_error(t, odd, pieces, expected):
    s = odd(HOLED, answer=lambda c, o, n: pieces(o, n) if c == 0 and n == len(HOLED) else None)
    r = t.drover("convert", "-f", "raw", "-O", "raw", s.uri, "copy.raw", env={"DROVER_NET_RECONNECT": "0"})
    assert (0, 0, len(HOLED)) in s.requests
    if expected:
        assert r.code == 0 and (t.dir / "copy.raw").read_bytes() == expected
    else:
        assert r.code == 1 and s.uri in r.err and t.names() == [], r


@pytest.mark.parametrize("entries", [[], [0, 0], [4096, 0, 0, 3], [1 << 30, 0], [4096, 0, 0xFFFFFFFF, 0], [100, 0, 100, 0], [1, 9, 4095, 4]],
                         ids=["none", "empty", "then empty", "beyond the end", "overflow", "short", "unknown flags"])
def test_extents_that_make_no_sense_lose_nothing(t, odd, entries):
    answers = [(5, struct.pack(f">I{len(entries)}I", 1, *entries))]
    s = odd(DATA, answer=lambda c, o, n: answers if c == OddNbd.STATUS else None)
    same(t, s, DATA)
    lost = odd(DATA, answer=lambda c, o, n: [(32769, struct.pack(">IH", 22, 0))] if c == OddNbd.STATUS else None)
    same(t, lost, DATA)
