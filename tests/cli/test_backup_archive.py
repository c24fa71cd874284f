# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of disks into VMA archives, read by a reader that shares nothing with the writer; what is refused."""
import json
import os
import random
import signal
import subprocess

import pytest
import vmacheck
import vmagen
from conftest import DROVER

CONF = b"cores: 2\n"


@pytest.fixture
def disks(t):
    t.ok("create", "-q", "-f", "qcow2", "one.qcow2", "64M")
    t.io("one.qcow2", "write -P 3 1M 2M", "write -P 4 40M 4k")
    data = vmagen.random_disk(random.Random(1), 30 * 65536, 0.5)
    (t.dir / "two.raw").write_bytes(data)
    (t.dir / "qemu-server.conf").write_bytes(CONF)
    t.ok("convert", "-q", "-O", "raw", "one.qcow2", "one.flat")
    return {"one": (t.dir / "one.flat").read_bytes(), "two": data}


def holds(path, disks):
    parsed = vmacheck.check(path)
    assert parsed.configs == [(b"qemu-server.conf", CONF)]
    for name, data in disks.items():
        assert parsed.content(name) == data


@pytest.mark.parametrize("name", ["b.vma", "b.vma.zst"])
def test_disks_go_into_an_archive(t, disks, name):
    out = t.ok("backup", "-c", "qemu-server.conf", "one.qcow2", "two.raw", name)
    holds(t.dir / name, disks)
    assert "one: 64 MiB, 2.06 MiB read, digest " in out
    digests = dict(line.split(":")[0:1] + [line.split()[-1]] for line in out.splitlines() if "digest" in line)
    assert "checked with checksums" in t.ok("vma", "verify", name)
    t.ok("compare", "one.qcow2", f"vma:{name}#one")
    t.ok("backup", "-q", "--state", "s.json", "one.qcow2", "copy.qcow2")
    assert digests["one"] in (t.dir / "s.json").read_text()


def test_names_and_formats_are_given(t, disks):
    t.ok("backup", "-q", "-c", "qemu-server.conf", "-d", "drive-scsi0=one.qcow2", "-d", "format=raw:drive-scsi1=two.raw",
         "-O", "vma", "--no-sums", "b")
    holds(t.dir / "b", {"drive-scsi0": disks["one"], "drive-scsi1": disks["two"]})
    assert not (t.dir / "b.sums").exists()


def test_an_archive_goes_into_a_pipe(t, disks):
    r = subprocess.run([DROVER, "backup", "-c", "qemu-server.conf", "--compress", "zstd", "one.qcow2", "two.raw", "-"],
                       cwd=t.dir, capture_output=True, check=True)
    assert b"digest" in r.stderr
    (t.dir / "b.vma.zst").write_bytes(r.stdout)
    holds(t.dir / "b.vma.zst", disks)


def test_a_killed_backup_into_a_pipe_is_no_whole_archive(t, disks):
    p = subprocess.Popen([DROVER, "backup", "-r", "1M", "one.qcow2", "two.raw", "-"], cwd=t.dir, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
    head = os.read(p.stdout.fileno(), 4096)
    p.send_signal(signal.SIGTERM)
    rest, err = p.communicate(timeout=60)
    assert p.returncode != 0 and b"no whole archive" in err
    (t.dir / "b.vma").write_bytes(head + rest)
    with pytest.raises(vmacheck.Broken):
        vmacheck.check(t.dir / "b.vma")
    assert t.drover("vma", "verify", "b.vma").code == 2


def test_a_reader_that_goes_ends_the_backup(t, disks):
    p = subprocess.Popen([DROVER, "backup", "two.raw", "-"], cwd=t.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.read(100)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(timeout=60) == 1
    assert err.count(b"\n") == 1 and b"nobody reads the archive any more" in err
    p.stderr.close()


def listed(t, leaving=False):
    return [b["name"] for b in json.loads((t.dir / "s.json").read_text())["backups"] if leaving or "leaving" not in b]


def test_archives_are_listed_verified_and_pruned_as_wholes(t, disks):
    for i in range(3):
        t.io("one.qcow2", f"write -P {20 + i} {i}M 100k")
        t.ok("backup", "-q", "--state", "s.json", "one.qcow2", "two.raw", f"a{i}.vma.zst")
    assert listed(t) == [f"a{i}.vma.zst#{name}" for i in range(3) for name in ("one", "two")]
    t.ok("convert", "-q", "-O", "raw", "one.qcow2", "one.now")
    t.ok("backup", "verify", "--against", "one.qcow2", "s.json", "a2.vma.zst#one")
    assert t.drover("backup", "verify", "--against", "one.qcow2", "s.json", "a1.vma.zst#one").code != 0
    assert t.ok("backup", "verify", "s.json", "a1.vma.zst").count("\n") == 2
    t.io("one.qcow2", "write -P 1 0 64M")
    t.ok("restore", "-q", "vma:a2.vma.zst#one", "one.qcow2")
    t.ok("compare", "one.qcow2", "one.now")
    t.ok("backup", "-q", "--state", "s.json", "two.raw", "b.vma")  # a1 has two disks, one of which is kept
    assert "a0.vma.zst#one" in t.ok("backup", "prune", "--keep", "2", "s.json")
    assert listed(t, True) == ["a1.vma.zst#one", "a1.vma.zst#two", "a2.vma.zst#one", "a2.vma.zst#two", "b.vma#two"]
    assert not [n for n in t.names() if n.startswith("a0")]
    t.ok("backup", "verify", "s.json")
    t.ok("backup", "-q", "--prune", "1", "--state", "s.json", "one.qcow2", "two.raw", "c.vma")
    assert listed(t, True) == ["c.vma#one", "c.vma#two"]
    (t.dir / "c.vma").write_bytes((t.dir / "c.vma").read_bytes()[:-600] + bytes(600))
    assert t.drover("backup", "verify", "s.json", "c.vma").code != 0


@pytest.mark.usefixtures("disks")
def test_a_disk_of_an_archive_is_restored_by_the_name_that_the_set_has(t):
    t.ok("backup", "-q", "--state", "s.json", "one.qcow2", "two.raw", "x.vma")
    names = [b["name"] for b in json.loads((t.dir / "s.json").read_text())["backups"]]
    t.io("one.qcow2", "write -P 99 0 4096")
    r = t.drover("restore", "x.vma", "one.qcow2")
    assert r.code == 1 and len(names) == 2 and all(f"vma:{name}" in r.err for name in names), r.err
    assert t.ok("restore", names[0], "one.qcow2").endswith(" KiB differed, and were written.\n")
    t.ok("compare", "one.flat", "one.qcow2")


def test_an_archive_leaves_the_increments_of_images_alone(t, disks):
    def image(name):
        return t.ok("backup", "--bitmap", "d", "--state", "s.json", "one.qcow2", name)

    assert image("i0").startswith("Full")
    t.io("one.qcow2", "write -P 9 3M 100k")
    t.ok("backup", "-q", "--state", "s.json", "one.qcow2", "a.vma")
    t.io("one.qcow2", "write -P 8 5M 100k")
    assert image("i1").startswith("Incremental")
    t.ok("compare", "one.qcow2", "i1")
    t.ok("backup", "prune", "-q", "--keep", "1", "s.json")
    assert listed(t, True) == ["a.vma#one", "i1"]
    t.ok("compare", "one.qcow2", "i1")


def test_an_archive_that_something_stands_on_or_uses_is_not_pruned(t, disks):
    for name in ("a.vma", "b.vma"):
        t.ok("backup", "-q", "--state", "s.json", "two.raw", name)
    t.ok("create", "-q", "-f", "add-cow", "-b", "vma:a.vma#two", "-F", "vma", "work.add-cow")
    r = t.drover("backup", "prune", "--keep", "1", "s.json")
    assert r.code == 1 and "work.add-cow" in r.err
    assert listed(t, True) == ["a.vma#two", "b.vma#two"] and (t.dir / "a.vma").exists()


def test_an_archive_whose_name_the_set_has_is_refused_before_anything_is_read(t, disks):
    t.ok("backup", "-q", "--state", "s.json", "two.raw", "a.vma")
    os.rename(t.dir / "a.vma", t.dir / "elsewhere")
    names = t.names()
    r = t.drover("backup", "--state", "s.json", "two.raw", "a.vma")
    assert r.code == 1 and 'has a backup called "a.vma#two" already' in r.err
    assert t.names() == names


def test_what_is_refused(t, disks):
    names = t.names()
    for args, text in ((["b.vma"], "Expecting disks and the archive"),
                       (["one.qcow2", "one.qcow2", "b.vma"], "two disks have the name 'one'"),
                       (["--bitmap", "d", "one.qcow2", "b.vma"], "--bitmap is for backups into images"),
                       (["--since", "d", "one.qcow2", "b.vma"], "--since is for backups into images"),
                       (["-O", "vma", "one.qcow2", "two.raw"], "exists already"),
                       (["--state", "s.json", "one.qcow2", "-"], "--state is for archives with a name"),
                       (["--prune", "2", "one.qcow2", "b.vma"], "--prune goes with --state"),
                       (["nothing.qcow2", "b.vma"], "nothing.qcow2"),
                       (["-c", "nothing.conf", "one.qcow2", "b.vma"], "nothing.conf"),
                       (["--compress", "lzop", "one.qcow2", "b.vma"], "--compress must be zstd")):
        r = t.drover("backup", *args)
        assert r.code == 1 and text in r.err, r
    assert t.names() == names


def test_a_disk_in_use_is_refused_before_anything_is_read(t, disks):
    names = t.names()
    with subprocess.Popen([DROVER, "io", "two.raw"], cwd=t.dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        user.stdin.write(b"read 0 512\n")
        user.stdin.flush()
        user.stdout.readline()
        r = t.drover("backup", "one.qcow2", "two.raw", "b.vma")
        assert r.code == 1 and "two.raw" in r.err and "lock" in r.err
        user.stdin.close()
        user.wait(timeout=60)
    assert t.names() == names
