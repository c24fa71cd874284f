# SPDX-License-Identifier: LGPL-2.1-or-later
"""streamOptimized VMDKs: written and read by the command, in files and pipes, and what others say of them."""
import os
import shutil
import subprocess

import pytest

STREAM = ["-O", "vmdk", "-o", "subformat=streamOptimized"]


@pytest.fixture
def disk(t):
    """40 MiB of which little is not zeros."""
    data = bytearray(40 << 20)
    for at, n, fill in ((0, 70000, b"first "), (5 << 20, 1 << 20, b"more or less "), ((40 << 20) - 9, 9, b"the end. ")):
        data[at:at + n] = (fill * (n // len(fill) + 1))[:n]
    (t.dir / "d.raw").write_bytes(data)
    return bytes(data)


def drover(t, *args, stdin=b""):
    p = subprocess.run([t.bin / "drover", *args], cwd=t.dir, input=stdin, capture_output=True, timeout=60, check=False)
    return p.returncode, p.stdout, p.stderr.decode()


def back(t, name):
    t.ok("convert", "-O", "raw", name, "back.raw")
    return (t.dir / "back.raw").read_bytes()


def test_a_stream_is_written_and_read(t, disk):
    t.ok("convert", *STREAM, "d.raw", "s.vmdk")
    assert back(t, "s.vmdk") == disk
    assert (t.dir / "s.vmdk").stat().st_size < 200000
    t.ok("check", "s.vmdk")
    t.ok("convert", "-c", *STREAM, "s.vmdk", "t.vmdk")
    assert back(t, "t.vmdk") == disk


def test_others_read_it(t, disk):
    t.ok("convert", *STREAM, "d.raw", "s.vmdk")
    for tool, *args in (("qemu-img", "compare", "d.raw", "s.vmdk"), ("vmdkinfo", "s.vmdk")):
        if shutil.which(tool):
            subprocess.run([tool, *args], cwd=t.dir, check=True, capture_output=True)
    if shutil.which("7z"):
        got = subprocess.run(["7z", "x", "-so", "s.vmdk"], cwd=t.dir, check=True, capture_output=True).stdout
        assert got == disk


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="no qemu-img")
def test_what_others_write_is_read(t, disk):
    subprocess.run(["qemu-img", "convert", *STREAM, "d.raw", "q.vmdk"], cwd=t.dir, check=True)
    assert back(t, "q.vmdk") == disk
    t.ok("check", "q.vmdk")


def test_a_stream_goes_into_a_pipe(t, disk):
    t.ok("convert", *STREAM, "d.raw", "s.vmdk")
    code, out, err = drover(t, "convert", *STREAM, "d.raw", "-")
    assert (code, err) == (0, "")
    (t.dir / "p.vmdk").write_bytes(out)
    assert back(t, "p.vmdk") == disk
    assert len(out) == (t.dir / "s.vmdk").stat().st_size


def test_what_makes_no_stream_is_told_in_one_line_and_nothing_is_made(t, disk):
    t.ok("convert", "-O", "vmdk", "d.raw", "base.vmdk")
    for args, why in ((["convert", *STREAM, "-B", "base.vmdk", "-F", "vmdk", "d.raw", "x"], "no backing file"),
                      (["convert", "-O", "vmdk", "-c", "d.raw", "x"], "Compression not supported"),
                      (["convert", "-O", "vmdk", "-o", "compression_level=3", "d.raw", "x"], "streamOptimized only"),
                      (["convert", *STREAM, "-", "x"], "size of its disk"),
                      (["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "-o", "subformat=streamOptimized", "x"],
                       "no backing file")):
        code, out, err = drover(t, *args, stdin=disk[:4096])
        assert code == 1 and why in err and len(err.splitlines()) == 1, (args, err)
    assert not (t.dir / "x").exists()


def test_a_stream_is_a_base_and_is_not_written(t, disk):
    t.ok("convert", *STREAM, "d.raw", "s.vmdk")
    t.ok("create", "-f", "vmdk", "-b", "s.vmdk", "-F", "vmdk", "child.vmdk")
    t.ok("io", "-c", "write -P 7 64k 4k", "child.vmdk")
    assert back(t, "child.vmdk") == disk[:65536] + b"\x07" * 4096 + disk[69632:]
    code, _, err = drover(t, "commit", "child.vmdk")
    assert code == 1 and "written once" in err
    code, _, err = drover(t, "convert", "-n", "-O", "vmdk", "d.raw", "s.vmdk")
    assert code == 1 and "written once" in err
    assert back(t, "s.vmdk") == disk


def test_a_checksum_of_a_stream_is_that_of_its_disk(t, disk):
    assert disk
    plain = t.ok("checksum", "d.raw").split()[0]
    assert plain in t.ok("convert", "--checksum", *STREAM, "d.raw", "s.vmdk")


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vmdk"])
def test_a_stream_comes_from_a_pipe(t, disk, fmt):
    t.ok("convert", *STREAM, "d.raw", "s.vmdk")
    stream = (t.dir / "s.vmdk").read_bytes()
    assert drover(t, "convert", "-f", "vmdk", "-O", fmt, "-", "new", stdin=stream) == (0, b"", "")
    assert back(t, "new") == disk
    assert drover(t, "convert", "-", "-", stdin=stream) == (0, disk, "")
    code, _, err = drover(t, "convert", "-f", "vmdk", "-O", fmt, "-", "new", stdin=stream[:-600])
    assert code == 1 and "cut off" in err and back(t, "new") == disk


def test_a_vmdk_that_is_no_stream_is_refused_in_a_pipe(t, disk):
    assert disk
    t.ok("convert", "-O", "vmdk", "d.raw", "sparse.vmdk")
    code, _, err = drover(t, "convert", "-f", "vmdk", "-", "new", stdin=(t.dir / "sparse.vmdk").read_bytes())
    assert code == 1 and "no stream" in err and len(err.splitlines()) == 1 and not (t.dir / "new").exists()


def test_units_out_of_a_pipe_stay_where_they_were(t):
    """Several go into one item: with holes between them, a gap at the beginning and a unit that the disk ends in."""
    data = bytearray((3 << 20) + 512)
    for grain in (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 30, 32, 47, 48):
        at = grain << 16
        data[at:at + 65536] = os.urandom(min(65536, len(data) - at))
    (t.dir / "d.raw").write_bytes(data)
    _, stream, _ = drover(t, "convert", *STREAM, "d.raw", "-")
    assert drover(t, "convert", "-f", "vmdk", "-O", "raw", "-", "new", stdin=stream) == (0, b"", "")
    assert (t.dir / "new").read_bytes() == data
    assert drover(t, "convert", "-", "-", stdin=stream) == (0, bytes(data), "")


def test_zeros_out_of_a_pipe_take_no_space(t):
    """The first block of each grain is not zeros."""
    data = b"".join(os.urandom(4096) + bytes(61440) for _ in range(32))
    (t.dir / "d.raw").write_bytes(data)
    _, stream, _ = drover(t, "convert", *STREAM, "d.raw", "-")
    for size, least, most in (([], 0, 32 * 8192), (["-S", "0"], len(data), 2 * len(data))):
        assert drover(t, "convert", *size, "-f", "vmdk", "-O", "raw", "-", "new", stdin=stream) == (0, b"", "")
        assert (t.dir / "new").read_bytes() == data
        assert least <= (t.dir / "new").stat().st_blocks * 512 <= most
