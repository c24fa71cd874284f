# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block devices are written to and stay devices: nothing ever takes the place of their node."""
import json
import os
import stat
import subprocess

import pytest
from conftest import same

MIB = 1 << 20


@pytest.fixture
def device(t, tmp_path):
    """A loop device of 4 MiB, through a node of our own: the machine's nodes are not at stake."""
    disk = tmp_path / "behind"
    disk.write_bytes(b"\x55" * (4 * MIB))
    r = subprocess.run(["losetup", "-f", "--show", disk], capture_output=True, text=True, check=False)
    if r.returncode:
        pytest.skip("no loop devices")
    loop = r.stdout.strip()
    node = t.dir / "dev"
    try:
        try:
            os.mknod(node, stat.S_IFBLK | 0o600, os.stat(loop).st_rdev)
        except PermissionError:
            pytest.skip("no right to make device nodes")
        yield node
        assert stat.S_ISBLK(os.lstat(node).st_mode)
    finally:
        subprocess.run(["losetup", "-d", loop], check=False)


def read(node, off, size):
    with open(node, "rb") as f:
        return os.pread(f.fileno(), size, off)


def test_create_on_a_device_leaves_it_a_device(t, device):
    for size, code in (("1M", 0), ("4M", 0), ("5M", 1)):
        ours = t.ours("qemu-img", "create", "-f", "raw", "dev", size)
        assert ours.code == code and stat.S_ISBLK(os.lstat(device).st_mode), ours
        assert ("Cannot grow device files" in ours.err) == bool(code)
    # what another format would be known by is gone, what comes later is not
    assert read(device, 0, 4096) == bytes(4096) and read(device, MIB, 16) == b"\x55" * 16
    assert t.names() == ["dev"]


@pytest.mark.parametrize("args", [["create", "-f", "vmdk", "dev", "1M"], ["convert", "-O", "vmdk", "some.img", "dev"]], ids=" ".join)
def test_other_formats_are_not_made_on_a_device(t, device, args):
    t.ok("create", "some.img", "1M")
    r = t.drover(*args)
    assert r.code == 1 and "dev: " in r.err, r
    assert read(device, 0, 16) == b"\x55" * 16 and t.names() == ["dev", "some.img"]


@pytest.mark.parametrize("options", [[], ["-n"]], ids=" ".join)
def test_convert_writes_the_disk_on_the_device(t, device, options):
    t.ok("create", "-f", "vmdk", "a.vmdk", "4M")
    t.io("a.vmdk", "write -P 7 1M 64k")
    assert t.ours("qemu-img", "convert", *options, "-O", "raw", "a.vmdk", "dev").code == 0
    assert stat.S_ISBLK(os.lstat(device).st_mode)
    assert t.ours("qemu-img", "compare", "-f", "vmdk", "-F", "raw", "a.vmdk", "dev").out == "Images are identical.\n"
    assert read(device, 0, 16) == bytes(16) and read(device, MIB, 16) == b"\x07" * 16


def test_a_link_to_a_device_is_the_device(t, device):
    os.symlink("dev", t.dir / "link")
    assert t.ours("qemu-img", "create", "-f", "raw", "link", "1M").code == 0
    assert (t.dir / "link").is_symlink() and read(device, 0, 512) == bytes(512)


def test_the_driver_for_devices_opens_it(t, device):
    args = ["-c", "open -o driver=host_device,filename=dev", "-c", "write -P 3 5k 1k", "-c", "read -P 3 5k 1k", "-c", "length"]
    r = t.ours("qemu-io", *args)
    assert r.code == 0 and r.out.endswith("\n4 MiB\n"), r
    assert read(device, 5 * 1024, 1024) == b"\x03" * 1024


@pytest.mark.parametrize("size", ["1M", "5M"])
def test_a_device_keeps_its_size(t, device, size):
    r = t.ours("qemu-img", "resize", "-f", "raw", "--shrink", "dev", size)
    assert r.code == 1 and r.err.startswith("qemu-img: "), r
    with open(device, "rb") as f:
        assert os.lseek(f.fileno(), 0, os.SEEK_END) == 4 * MIB


def test_info_and_map_of_a_device(t, device):
    for args in (["info", "dev"], ["map", "-f", "raw", "--output=json", "dev"]):
        same(t.ours("qemu-img", *args), t.real("qemu-img", *args))


def test_a_file_that_is_mounted_is_refused_before_anything_is_copied(t):
    t.ok("create", "some.img", "1M")
    for name in ("behind", "target"):
        (t.dir / name).write_bytes(b"\x55" * MIB)
    if subprocess.run(["mount", "--bind", t.dir / "behind", t.dir / "target"], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        for args in (["create", "target", "2M"], ["create", "-f", "vmdk", "target", "2M"],
                     ["convert", "-O", "raw", "some.img", "target"], ["convert", "-O", "vmdk", "some.img", "target"]):
            r = t.drover(*args)
            assert r.code == 1 and "target: is a mount point" in r.err, r
            assert (t.dir / "behind").read_bytes() == b"\x55" * MIB
            assert t.names() == ["behind", "some.img", "target"]
        assert t.drover("convert", "-n", "-f", "raw", "-O", "raw", "some.img", "target").code == 0
        assert (t.dir / "behind").read_bytes() == bytes(MIB)
    finally:
        subprocess.run(["umount", t.dir / "target"], check=False)


def test_an_archive_on_a_device(t, device):
    t.ok("create", "some.img", "1M")
    t.io("some.img", "write -P 7 64k 64k")
    for args in ([], ["--no-sums"]):
        r = t.drover("vma", "create", *args, "-d", "x=some.img", "dev")
        assert r.code == 1 and "dev: is a block device" in r.err and read(device, 0, 16) == b"\x55" * 16, r
    assert t.drover("vma", "create", "--force", "-d", "x=some.img", "dev").code == 0
    r = t.drover("vma", "verify", "--against", "x=some.img", "dev")
    assert r.code == 0 and read(device, 4 * MIB - 512, 512) == bytes(512) and t.names() == ["dev", "some.img"], r


def pattern(t, name="a.img"):
    """A disk of 3 MiB that holds some data, raw."""
    t.ok("create", name, "3M")
    t.io(name, "write -P 7 1M 192k", "write -P 9 2500k 3k", fmt="raw")


def test_a_qcow2_image_on_a_device(t, device):
    assert t.ours("qemu-img", "create", "-q", "-f", "qcow2", "dev", "16M").code == 0
    same(t.ours("qemu-img", "info", "dev"), t.real("qemu-img", "info", "dev"))
    t.io("dev", "write -P 7 1M 100k", "write -P 8 5000k 5k", "read -P 0 0 1M", "read -P 0 9M 7M", fmt="qcow2")
    for tool in (t.ours, t.real):
        assert tool("qemu-img", "check", "-f", "qcow2", "dev").code == 0
        r = tool("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 100k", "-c", "read -P 0 1124k 3876k", "-c", "read -P 8 5000k 5k", "-c", "read -P 0 5005k 1M", "dev")
        assert "failed" not in r.out and r.code == 0, r
    assert stat.S_ISBLK(os.lstat(device).st_mode) and t.names() == ["dev"]


def test_a_qcow2_image_on_a_device_goes_through_every_operation(t, device):
    pattern(t)
    t.ok("create", "-f", "qcow2", "dev", "3M")
    t.ok("convert", "-n", "-f", "raw", "-O", "qcow2", "a.img", "dev")
    t.ok("snapshot", "-i", "-c", "one", "dev")
    t.io("dev", "write -P 5 0 64k", fmt="qcow2")
    t.ok("snapshot", "-i", "-a", "one", "dev")
    t.ok("resize", "-f", "qcow2", "dev", "40M")
    t.ok("resize", "-f", "qcow2", "--shrink", "dev", "3M")
    t.ok("snapshot", "-i", "-d", "one", "dev")
    t.ok("compare", "-f", "raw", "-F", "qcow2", "a.img", "dev")
    t.ok("create", "-f", "qcow2", "-b", "dev", "-F", "qcow2", "top.qcow2")
    t.io("top.qcow2", "write -P 6 512 512", fmt="qcow2")
    t.io("a.img", "write -P 6 512 512", fmt="raw")
    t.ok("commit", "-f", "qcow2", "top.qcow2")
    t.ok("compare", "-f", "raw", "-F", "qcow2", "a.img", "dev")
    t.ok("create", "-f", "qcow2", "base.qcow2", "3M")
    t.ok("rebase", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "dev")
    t.ok("check", "dev")
    t.ok("compare", "-f", "raw", "-F", "qcow2", "a.img", "dev")
    assert t.real("qemu-img", "check", "-f", "qcow2", "dev").code == 0
    assert stat.S_ISBLK(os.lstat(device).st_mode)


@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "preallocation=metadata"], ["-o", "extended_l2=on"], ["-o", "cluster_size=4k"]], ids=" ".join)
def test_convert_makes_a_qcow2_image_on_a_device(t, device, options):
    pattern(t)
    t.ok("convert", "-f", "raw", "-O", "qcow2", *options, "a.img", "dev")
    assert stat.S_ISBLK(os.lstat(device).st_mode) and t.names() == ["a.img", "dev"]
    for tool in (t.ours, t.real):
        assert tool("qemu-img", "check", "-f", "qcow2", "dev").code == 0
        r = tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "a.img", "dev")
        assert r.out == "Images are identical.\n", r


def test_a_device_of_the_measured_size_takes_the_image(t, device):
    t.ok("create", "big.img", "64M")
    t.io("big.img", "write -P 7 0 1M", "write -P 8 30M 2M", fmt="raw")
    need = json.loads(t.ok("measure", "-f", "raw", "-O", "qcow2", "--output=json", "big.img"))["required"]
    assert need <= 4 * MIB
    loop = subprocess.run(["losetup", "-j", device.parent.parent / "behind", "-O", "NAME", "-n"], capture_output=True, text=True, check=True).stdout.strip()
    os.truncate(device.parent.parent / "behind", need)
    subprocess.run(["losetup", "-c", loop], check=True)
    t.ok("convert", "-f", "raw", "-O", "qcow2", "big.img", "dev")
    assert t.real("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "big.img", "dev").code == 0


def test_a_full_device_says_so(t, device):
    t.ok("create", "big.img", "64M")
    t.io("big.img", "write -P 7 0 8M", fmt="raw")
    r = t.drover("convert", "-f", "raw", "-O", "qcow2", "big.img", "dev")
    assert r.code == 1 and "the device is full: all its 4194304 bytes are in use" in r.err, r
    r = t.drover("create", "-f", "qcow2", "-o", "preallocation=full", "dev", "8M")
    assert r.code == 1 and "the device is too small: it has 4194304 bytes" in r.err, r
