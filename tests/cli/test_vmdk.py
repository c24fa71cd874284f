# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMDKs as the command line meets them: short, damaged, cut off, on devices."""
import os
import random
import subprocess

import pytest

HEAD = '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="{kind}"\n\n{extents}\n'


def descriptor(t, name, kind, extents):
    (t.dir / name).write_text(HEAD.format(kind=kind, extents=extents))


def noise(n, seed=1):
    return random.Random(seed).randbytes(n)


def test_salvage_of_a_short_flat_extent_lists_what_is_missing_and_ends_with_3(t):
    data = noise(3900001)
    (t.dir / "ns-flat.vmdk").write_bytes(data)
    descriptor(t, "ns.vmdk", "vmfs", 'RW 8192 VMFS "ns-flat.vmdk"')
    r = t.drover("convert", "-O", "raw", "ns.vmdk", "out.raw")
    assert r.code == 1 and "3900001" in r.err and "4194304" in r.err and "--salvage" in r.err, r
    r = t.drover("convert", "--salvage", "-O", "raw", "ns.vmdk", "out.raw")
    assert r.code == 3 and "bytes 3899904 to 4194304" in r.err, r
    whole = 3900001 // 512 * 512
    assert (t.dir / "out.raw").read_bytes() == data[:whole] + bytes(4194304 - whole)
    assert t.ours("qemu-img", "convert", "--salvage", "-O", "raw", "ns.vmdk", "out.raw").code == 0


def test_salvage_of_a_whole_disk_ends_with_0(t):
    (t.dir / "a-flat.vmdk").write_bytes(noise(1 << 20))
    descriptor(t, "a.vmdk", "vmfs", 'RW 2048 VMFS "a-flat.vmdk"')
    r = t.drover("convert", "--salvage", "-O", "raw", "a.vmdk", "out.raw")
    assert r.code == 0 and not r.err, r


def test_salvage_of_a_split_disk_without_one_piece_keeps_the_others(t):
    t.ok("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "s.vmdk", "5G")
    t.io("s.vmdk", "write -P 1 1M 64k", "write -P 2 2100M 64k", "write -P 3 4500M 64k")
    os.unlink(t.dir / "s-s002.vmdk")
    r = t.drover("convert", "-O", "raw", "s.vmdk", "out.raw")
    assert r.code == 1 and "s-s002.vmdk" in r.err, r
    r = t.drover("convert", "--salvage", "-O", "raw", "s.vmdk", "out.raw")
    assert r.code == 3 and "bytes 2146435072 to 4292870144" in r.err, r
    t.io("out.raw", "read -P 1 1M 64k", "read -P 3 4500M 64k", "read -P 0 2100M 64k", fmt="raw")


def test_salvage_keeps_what_begins_in_the_middle_of_a_lost_64_kib(t):
    data = noise(300 * 512)
    (t.dir / "a.raw").write_bytes(data)
    descriptor(t, "a.vmdk", "custom", 'RW 100 FLAT "a.raw" 0\nNOACCESS 101 FLAT "a.raw" 100\nRW 1 FLAT "a.raw" 201\n'
                                      'RW 10 SPARSE "gone.vmdk"\nRW 88 FLAT "a.raw" 212')
    r = t.drover("convert", "--salvage", "-O", "raw", "a.vmdk", "out.raw")
    assert r.code == 3 and r.err.count("cannot be read") == 2, r
    assert "bytes 51200 to 102912 " in r.err and "bytes 103424 to 108544 " in r.err, r
    assert (t.dir / "out.raw").read_bytes() == data[:51200] + bytes(51712) + data[102912:103424] + bytes(5120) + data[108544:]


def test_the_head_of_a_disk_says_how_much_of_it_is_needed(t):
    t.ok("create", "-q", "-f", "vmdk", "a.vmdk", "40G")
    whole = (t.dir / "a.vmdk").read_bytes()
    (t.dir / "head.vmdk").write_bytes(whole[:65536])
    r = t.ours("qemu-img", "info", "head.vmdk")
    assert r.code == 1 and f"File truncated, expecting at least {len(whole)} bytes" in r.err, r
    assert "42949672960 bytes (virtual size)" in r.err


def test_a_device_as_an_extent_opens_if_its_directory_is_allowed(t):
    (t.dir / "img").write_bytes(noise(1 << 20))
    r = subprocess.run(["losetup", "-f", "--show", t.dir / "img"], capture_output=True, check=False)
    if r.returncode != 0:
        pytest.skip("no loop devices here")
    device = r.stdout.decode().strip()
    try:
        descriptor(t, "full.vmdk", "fullDevice", f'RW 2048 FLAT "{device}" 0')
        r = t.drover("convert", "-O", "raw", "full.vmdk", "out.raw")
        assert r.code == 1 and "--allow-path /dev" in r.err, r
        t.ok("convert", "--allow-path", "/dev", "-O", "raw", "full.vmdk", "out.raw")
        assert (t.dir / "out.raw").read_bytes() == noise(1 << 20)
        descriptor(t, "part.vmdk", "partitionedDevice", f'RW 1 ZERO\nRW 2047 FLAT "{device}" 1 "uuid" "{device}"')
        t.ok("convert", "--allow-path", "/dev", "-O", "raw", "part.vmdk", "out.raw")
        assert (t.dir / "out.raw").read_bytes() == bytes(512) + noise(1 << 20)[512:]
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
