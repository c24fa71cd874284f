# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's drivers that are neither a format nor a file: disks without a medium, filters, what is refused by name."""
import json
import time

import pytest
from conftest import same


def opts(*more):
    return ",".join(["driver=null-co", "size=1M", *more])


def only_sizes(text):
    return "\n".join(line for line in text.splitlines() if "virtual size" in line or "disk size" in line or line.startswith("Images"))


@pytest.mark.parametrize("args", [
    ["info", "null-co://"], ["info", 'json:{"driver":"null-aio"}'], ["info", "--image-opts", opts()],
    ["info", "--image-opts", "driver=null-aio,size=1000,latency-ns=100"],
    ["info", "--image-opts", "driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on"],
    ["info", "--image-opts", "driver=raw,offset=64k,size=128k,file.driver=null-co,file.size=1M"],
    ["compare", "--image-opts", opts("read-zeroes=on"), "driver=raw,file.filename=zeros"],
    ["compare", "--image-opts", opts(), "driver=raw,file.filename=zeros"],
    ["map", "--output=json", "--image-opts", opts("read-zeroes=on")],
    ["convert", "-n", "-O", "raw", "zeros", "null-co://"],
    ["info", "--image-opts", opts("frob=1")],
    ["info", "--image-opts", "driver=qcow2,file.driver=null-co"],
], ids=lambda args: " ".join(args)[:60])
def test_a_disk_without_a_medium_is_what_it_is_to_qemu(t, args):
    (t.dir / "zeros").write_bytes(bytes(1 << 20))
    same(t.ours("qemu-img", *args), t.real("qemu-img", *args), lambda text: text if "map" in args else only_sizes(text))


def test_its_zeros_are_read_as_data_and_what_is_written_is_gone(t):
    t.ok("convert", "-O", "raw", "--image-opts", opts(), "copy")
    assert (t.dir / "copy").read_bytes() == bytes(1 << 20)
    (t.dir / "full").write_bytes(b"x" * (1 << 20))
    r = t.ours("qemu-img", "convert", "-n", "--target-image-opts", "full", opts())
    assert r.code == 0, r
    t.io("null-co://", "write -P 5 0 64k", "read -P 0 0 64k")
    r = t.drover("convert", "-n", "-O", "raw", "full", "json:" + json.dumps({"driver": "null-co", "size": 65536}))
    assert r.code == 1 and "smaller" in r.err, r
    for args in (["bench", "-c", "50"], ["bench", "-w", "-c", "50"]):
        r = t.ours("qemu-img", *args, "--image-opts", opts())
        assert r.code == 0 and "Run completed" in r.out, r
    for args in (["resize", "null-co://", "2G"], ["snapshot", "-c", "null-co://"], ["info", "null-co://x"],
                 ["info", "--image-opts", "driver=null-co,size=much"]):
        r = t.drover(*args)
        assert r.code == 1 and len(r.err.splitlines()) == 1, r


def test_each_request_takes_the_latency(t):
    begin = time.monotonic()
    t.io("json:" + json.dumps({"driver": "null-co", "size": "1M", "latency-ns": 100_000_000}), "read 0 512", "write 0 512", "read 0 512")
    assert time.monotonic() - begin >= 0.3


def slowly(group, options):
    return ["--object", f"throttle-group,id=t,{group}", "--image-opts", f"driver=throttle,throttle-group=t,{options}"]


def chain(t):
    t.ok("create", "-f", "qcow2", "base", "1M")
    t.io("base", "write -P 1 0 256k")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", "base", "top")


def test_what_is_read_through_copy_on_read_is_copied_by_io(t):
    chain(t)
    options = "driver=copy-on-read,file.driver=qcow2,file.file.filename=top"
    for run in (t.ours, t.real):
        r = run("qemu-io", "-c", "read -P 1 64k 64k", "--image-opts", options)
        assert r.code == 0 and "failed" not in r.out, r
        extents = json.loads(t.ok("map", "--output=json", "top"))
        assert [(e["start"], e["length"]) for e in extents if e["depth"] == 0 and e["data"]] == [(65536, 65536)], extents
    name = "json:" + json.dumps({"driver": "copy-on-read", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}}})
    before = (t.dir / "top").read_bytes()
    assert t.drover("compare", name, "base").code == 0  # nothing is written by those that only read
    assert (t.dir / "top").read_bytes() == before
    (t.dir / "dir").mkdir()
    (t.dir / "qemu-nbd").symlink_to(t.bin / "drover")
    for args in ([t.bin / "drover", "mount", "--image-opts", options, "dir"],
                 [t.dir / "qemu-nbd", "-k", t.dir / "socket", "--image-opts", options]):
        r = t.start(*args)
        assert r.code == 1 and "copied by `io` only" in r.err, r


@pytest.mark.parametrize("group,options", [
    ("x-bps-total=524288", "file.driver=raw,file.file.filename=disk"), ("limits.bps-read=524288", "file.driver=raw,file.file.filename=disk"),
], ids=["total", "read"])
def test_a_throttle_group_is_a_rate(t, group, options):
    (t.dir / "disk").write_bytes(b"x" * (3 << 18))
    begin = time.monotonic()
    assert t.ours("qemu-img", "convert", *slowly(group, options), "-O", "raw", "copy").code == 0
    assert time.monotonic() - begin >= 0.4
    assert (t.dir / "copy").read_bytes() == (t.dir / "disk").read_bytes()


def test_a_limit_of_the_other_direction_is_none(t):
    (t.dir / "disk").write_bytes(b"x" * (1 << 20))
    r = t.ours("qemu-img", "convert", *slowly("x-bps-write=1", "file.driver=raw,file.file.filename=disk"), "-O", "raw", "copy")
    assert r.code == 0, r


@pytest.mark.parametrize("group,options", [
    ("frob=1", "file.filename=disk"), ("limits.iops-total=-1", "file.filename=disk"), ("x-bps-total=1,x-bps-read=1", "file.filename=disk"),
    ("x-iops-total=5,x-iops-total-max=10", "file.driver=raw,file.file.filename=disk"),
], ids=str)
def test_throttle_groups_mean_what_they_mean_to_qemu(t, group, options):
    (t.dir / "disk").write_bytes(bytes(4096))
    same(t.ours("qemu-img", "info", *slowly(group, options)), t.real("qemu-img", "info", *slowly(group, options)), only_sizes)


def test_filters_that_would_not_be_obeyed_are_refused_by_name(t):
    chain(t)
    for args, words in (
            (["bench", "-c", "1", *slowly("x-bps-total=1000", "file.driver=qcow2,file.file.filename=top")], "does not obey a throttle group"),
            (["compare", *slowly("x-iops-total=9", "file.driver=qcow2,file.file.filename=top"), "driver=raw,file.filename=top"],
             "limits requests a second"),
            (["info", "--image-opts", "driver=throttle,throttle-group=u,file.filename=top"], "Throttle group 'u' does not exist"),
            (["info", "--image-opts", "driver=throttle,file.filename=top"], "Please specify a throttle group"),
            (["info", "--image-opts", "driver=blkdebug,image.driver=qcow2,image.file.filename=top"], "to test QEMU itself"),
            (["info", "--image-opts", "driver=blkverify,raw.filename=top,test.filename=base"], "'driver=blkverify' is not supported"),
            (["info", "--image-opts", "driver=compress,file.driver=qcow2,file.file.filename=top"], "convert -c"),
            (["info", "--image-opts", "driver=qcow2,file.filename=top,backing.driver=copy-on-read,backing.file.filename=base"],
             "stands outermost")):
        r = t.ours("qemu-img", *args)
        assert r.code in (1, 2) and words in r.err and len(r.err.splitlines()) == 1, r
