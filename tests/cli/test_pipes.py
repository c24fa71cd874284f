# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that go through pipes: convert and dd with -, /dev/stdout and FIFOs."""
import gzip
import json
import os
import random
import signal
import subprocess
import threading

import pytest

from conftest import same

MIB = 1 << 20


@pytest.fixture
def disk(t):
    """The bytes of d.vmdk and d.raw, which are the same disk: data, zeros, data at the end."""
    data = bytearray(8 * MIB)
    data[MIB:MIB + 70000] = random.Random(1).randbytes(70000)
    data[-512:] = b"e" * 512
    (t.dir / "d.raw").write_bytes(data)
    t.ok("convert", "-O", "vmdk", "d.raw", "d.vmdk")
    return bytes(data)


def run(t, *args, stdin=b"", **kw):
    p = subprocess.run([t.bin / "drover", *args], cwd=t.dir, input=stdin, capture_output=True, timeout=60, check=False,
                       **kw)
    return p.returncode, p.stdout, p.stderr.decode()


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_pipe_gets_the_bytes_of_the_disk(t, disk, name):
    assert run(t, "convert", "-O", "raw", "d.vmdk", name) == (0, disk, "")
    assert t.names() == ["d.raw", "d.vmdk"]


def test_several_disks_go_into_a_pipe_one_after_another(t, disk):
    (t.dir / "odd").write_bytes(b"x" * 700)
    assert run(t, "convert", "odd", "d.vmdk", "-") == (0, b"x" * 700 + bytes(324) + disk, "")


def test_standard_output_that_is_a_file_gets_them_too(t, disk):
    with open(t.dir / "out", "wb") as out:
        out.write(b"before")
        out.flush()
        subprocess.run([t.bin / "drover", "convert", "d.vmdk", "-"], cwd=t.dir, stdout=out, check=True)
    assert (t.dir / "out").read_bytes() == b"before" + disk


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_disk_comes_from_a_pipe(t, disk, fmt, pack):
    assert run(t, "convert", "-O", fmt, "-", "new", stdin=pack(disk)) == (0, b"", "")
    assert t.drover("compare", "new", "d.raw").code == 0
    assert os.stat(t.dir / "new").st_blocks * 512 < MIB  # zeros are not written
    assert run(t, "convert", "-", "-", stdin=pack(disk)) == (0, disk, "")


def test_bytes_that_come_as_they_are(t, disk):
    packed = gzip.compress(disk)
    assert run(t, "convert", "-f", "raw", "-", "new", stdin=packed)[0] == 0
    assert (t.dir / "new").read_bytes() == packed + bytes(-len(packed) % 512)


def test_nothing_comes_from_a_pipe(t):
    assert run(t, "convert", "-f", "raw", "-O", "qcow2", "-", "new") == (0, b"", "")
    assert "virtual size: 0 B" in t.ok("info", "new")


def test_standard_input_that_is_a_file_is_that_file(t, disk):
    t.ok("create", "-q", "-f", "vmdk", "-b", "d.vmdk", "c.vmdk")
    with open(t.dir / "c.vmdk", "rb") as f:
        subprocess.run([t.bin / "drover", "convert", "-", t.dir / "new"], cwd="/", stdin=f, check=True)
    assert (t.dir / "new").read_bytes() == disk


def test_fifos_are_read_and_written(t, disk):
    os.mkfifo(t.dir / "in")
    os.mkfifo(t.dir / "out")
    got = []
    threads = [threading.Thread(target=lambda: (t.dir / "in").write_bytes(disk)),
               threading.Thread(target=lambda: got.append((t.dir / "out").read_bytes()))]
    for thread in threads:
        thread.start()
    assert run(t, "convert", "in", "out") == (0, b"", "")
    for thread in threads:
        thread.join()
    assert got == [disk]


def test_a_vmdk_grows_to_what_comes(t, disk):
    assert run(t, "convert", "-O", "vmdk", "-", "new.vmdk", stdin=disk) == (0, b"", "")
    t.ok("check", "new.vmdk")
    t.ok("compare", "-f", "raw", "d.raw", "new.vmdk")


def test_what_cannot_be_is_told_before_it_begins(t, disk):
    qcow2 = t.dir / "d.qcow2"
    t.ok("convert", "-O", "qcow2", "d.raw", qcow2)
    for args, stdin, why in ((["-O", "vmdk", "d.raw", "-"], b"", "cannot be written into a pipe"),
                             (["-c", "-O", "qcow2", "d.raw", "-"], b"", "compressed clusters cannot go into a pipe"),
                             (["-O", "qcow2", "-o", "preallocation=full", "d.raw", "-"], b"", "preallocation does not go with a pipe"),
                             (["-O", "qcow2", "-o", "data_file=x", "d.raw", "-"], b"", "data_file does not go with a pipe"),
                             (["-O", "qcow2", "-", "-"], disk, "begins with the size of its disk"),
                             (["-n", "d.raw", "-"], b"", "does not go with a pipe"),
                             (["-c", "-O", "qcow2", "-", "new"], disk, "does not go with a pipe"),
                             (["-o", "preallocation=full", "d.raw", "-"], b"", "no meaning in a pipe"),
                             (["-", "d.raw", "new"], disk, "the only source"),
                             (["-l", "s", "-", "new"], disk, "at random"),
                             (["-", "new"], qcow2.read_bytes(), "holds a qcow2 image")):
        code, out, err = run(t, "convert", *args, stdin=stdin)
        assert code == 1 and out == b"" and why in err and err.count("\n") == 1, (args, err)
    assert t.names() == ["d.qcow2", "d.raw", "d.vmdk"]


@pytest.mark.parametrize("args", [["create", "-f", "raw", "-", "1M"], ["info", "-"], ["check", "-"], ["map", "-"],
                                  ["resize", "-", "2M"], ["compare", "-", "d.raw"]])
def test_others_refuse_a_pipe(t, disk, args):
    code, out, err = run(t, *args, stdin=disk)
    assert code in (1, 2) and out == b"" and "standard input or output" in err, err
    assert "-" not in t.names()


def test_a_file_called_like_that_can_be_named(t, disk):
    t.ok("convert", "d.vmdk", "./-")
    assert (t.dir / "-").read_bytes() == disk
    t.ok("convert", "./-", "new")
    assert (t.dir / "new").read_bytes() == disk


def test_progress_of_a_pipe_goes_to_standard_error(t, disk):
    code, out, err = run(t, "convert", "-p", "d.raw", "-")
    assert (code, out) == (0, disk) and "(100.00/100%)" in err
    code, out, err = run(t, "convert", "-p", "-", "new", stdin=disk)
    assert code == 0 and out.endswith(b"(100.00/100%)\r\n") and err == ""


def test_the_checksum_of_what_goes_through_pipes(t, disk):
    digest = t.ok("checksum", "d.raw").split()[0]
    assert run(t, "convert", "--checksum", "d.vmdk", "-") == (0, disk, f"{digest}  -\n")
    assert run(t, "convert", "--checksum", "-", "-", stdin=disk) == (0, disk, f"{digest}  -\n")
    for fmt in "raw", "qcow2":
        assert run(t, "convert", "--checksum", "-O", fmt, "-", "new", stdin=disk) == (0, f"{digest}  new\n".encode(), "")


def test_a_reader_that_goes_away_is_told(t, disk):
    p = subprocess.Popen([t.bin / "drover", "convert", "d.raw", "-"], cwd=t.dir, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
    p.stdout.close()
    err = p.stderr.read().decode()
    assert p.wait(60) == 1 and "standard output: cannot" in err and "Broken pipe" in err


@pytest.mark.parametrize("args", [["d.raw", "-"], ["-", "new"]])
def test_one_that_waits_for_the_other_side_can_be_stopped(t, disk, args):
    p = subprocess.Popen([t.bin / "drover", "convert", *args], cwd=t.dir, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if args[0] == "-":
        p.stdin.write(disk[:100000])
        p.stdin.flush()
    while "SIGTERM" not in caught(p.pid):
        pass
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 128 + signal.SIGTERM
    assert b"interrupted" in p.stderr.read() and "new" not in t.names()


def caught(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as f:
        mask = next(int(line.split()[1], 16) for line in f if line.startswith("SigCgt"))
    return "SIGTERM" if mask >> (signal.SIGTERM - 1) & 1 else ""


RANGES = ["bs=1M skip=1 count=1", "bs=1M count=2", "bs=1M skip=3 count=5", "bs=1M skip=100", "bs=1M skip=6", "count=3",
          "bs=1M skip=8", "bs=0", "bs=1M count=x", "foo=1", "bs=1M count=0", "bs=513 count=1", "bs=513 skip=2100 count=5000"]


@pytest.mark.parametrize("words", RANGES)
def test_qemu_img_dd_is_like_qemus(t, disk, words):
    ours = t.ours("qemu-img", "dd", *words.split(), "if=d.vmdk", "of=ours")
    real = t.real("qemu-img", "dd", *words.split(), "if=d.vmdk", "of=real")
    same(ours, real)
    if real.code == 0:
        assert (t.dir / "ours").read_bytes() == (t.dir / "real").read_bytes()


def test_dd_copies_as_many_blocks_as_it_is_told(t, disk):
    want = disk[MIB + 1024:MIB + 1024 + 512 * 9]
    words = ["skip=2050", "count=9"]
    assert run(t, "dd", *words, "if=d.vmdk", "of=-") == (0, want, "")
    assert run(t, "dd", *words, "if=-", "of=-", stdin=disk) == (0, want, "")
    assert run(t, "dd", *words, "if=d.vmdk", "of=new", "-O", "qcow2")[0] == 0
    t.ok("convert", "new", "new.raw")
    assert (t.dir / "new.raw").read_bytes() == want


# ------------------------------------------------------------------ qcow2 into a pipe


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512,refcount_bits=1", "cluster_size=2M,refcount_bits=64",
                                     "compat=0.10", "extended_l2=on,lazy_refcounts=on,compression_type=zstd"])
def test_a_qcow2_image_goes_into_a_pipe_front_to_back(t, disk, options):
    (t.dir / "odd").write_bytes(b"x" * 700)
    code, out, err = run(t, "convert", "-O", "qcow2", "-o", options, "odd", "d.vmdk", "-")
    assert (code, err) == (0, "")
    (t.dir / "new").write_bytes(out)
    assert len(out) < MIB or "2M" in options  # what the source has nothing for is left out
    (t.dir / "raw").write_bytes(b"x" * 700 + bytes(324) + disk)
    r = t.real("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "new", "raw")
    assert r.code == 0, r
    for r in (t.real("qemu-img", "check", "new"), t.drover("check", "new")):
        assert r.code == 0 and "No errors were found" in r.out, r
    t.io("new", "write -P 3 4M 1M")  # and it goes on as any other
    assert t.real("qemu-img", "check", "new").code == 0


def test_the_map_decides_what_a_qcow2_image_in_a_pipe_has(t):
    t.ok("create", "-f", "qcow2", "s", "3G")
    t.io("s", "write -P 1 0 64k", "write -P 0 1G 128k", "write -z 2G 1M", "write -P 2 3221225000 472")
    code, out, err = run(t, "convert", "-O", "qcow2", "--checksum", "s", "-")
    assert code == 0 and err.split()[0] == t.ok("checksum", "s").split()[0]
    (t.dir / "new").write_bytes(out)
    assert t.drover("compare", "s", "new").code == 0
    data = [e["start"] for e in json.loads(t.ok("map", "--output=json", "new")) if e["data"]]
    assert data[:2] == [0, 1 << 30] and len(out) == (4 + 3 + 4) * 65536  # zeros in data are data


def test_a_disk_of_no_bytes_goes_into_a_pipe_and_a_file(t):
    (t.dir / "none").write_bytes(b"")
    code, out, err = run(t, "convert", "-O", "qcow2", "-f", "raw", "none", "-")
    assert (code, err) == (0, "")
    (t.dir / "new").write_bytes(out)
    t.ok("create", "-f", "qcow2", "made", "0")
    for name in ("new", "made"):
        r = t.real("qemu-img", "check", name)
        assert r.code == 0 and "No errors were found" in r.out, r
        t.ok("resize", name, "1M")
        t.io(name, "write -P 1 0 1M")
        assert "No errors were found" in t.real("qemu-img", "check", name).out


def test_a_qcow2_image_in_a_pipe_whose_reader_goes_is_told(t, disk):
    for end in (0, 70000, 330000):
        with subprocess.Popen([t.bin / "drover", "convert", "-O", "qcow2", "d.raw", "-"], cwd=t.dir, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as p:
            p.stdout.read(end)
            p.stdout.close()
            err = p.stderr.read().decode()
            assert p.wait(20) == 1 and "Broken pipe" in err, err


def test_a_disk_that_changes_while_its_tables_are_out_is_told(t):
    with open(t.dir / "busy", "wb") as f:
        f.write(random.Random(2).randbytes(MIB) * 24)
        f.seek(28 * MIB)
        f.write(b"e" * MIB)
    with subprocess.Popen([t.bin / "drover", "convert", "-f", "raw", "-O", "qcow2", "-m", "1", "busy", "-"], cwd=t.dir,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        p.stdout.read(1)
        with open(t.dir / "busy", "r+b") as f:  # as by a program without locks
            f.seek(26 * MIB)
            f.write(b"n" * MIB)
        p.stdout.read()
        err = p.stderr.read().decode()
        assert p.wait(20) == 1 and "changed while it was copied" in err, err
