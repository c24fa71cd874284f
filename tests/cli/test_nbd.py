# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks of NBD servers as sources and targets."""
import json
import os
import random
import shutil

import pytest

from remote import Nbdkit

MIB = 1 << 20

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
    r = t.drover("compare", "child.qcow2", "disk.raw")
    assert r.code != 0 and f"--allow-path {s.uri}" in r.err
    assert "identical" in t.ok("compare", "--allow-path", s.uri, "child.qcow2", "disk.raw")
    assert "identical" in t.ok("compare", "child.qcow2", "disk.raw", env={"DROVER_ALLOW_PATH": f"/nowhere:{s.uri}:/tmp"})
    assert t.real("qemu-img", "compare", "child.qcow2", "disk.raw").code == 0


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
