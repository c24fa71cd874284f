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
