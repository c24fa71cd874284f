# SPDX-License-Identifier: LGPL-2.1-or-later
"""`drover vma extract`: into files, devices and formats; out of damaged archives; going on after an interruption."""
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
import uuid

import pytest
import vmagen
from stopping import stopped
from vmarun import MIB, SANITIZED, same_files, v  # noqa: F401  pylint: disable=unused-import

CLUSTER = 65536
GOOD = dict(vmagen.good())
BAD = {case.name: case for case in vmagen.bad()}


def archive(per=vmagen.WRITE_SLOTS, **kw):
    rng = random.Random(12)
    contents = {1: vmagen.random_disk(rng, 9 * CLUSTER + 1024), 2: vmagen.random_disk(rng, 7 * CLUSTER)}
    return vmagen.simple(contents, order="interleaved", per=per, **kw)


def extract(v, *args, **kw):
    return v.run("drover", "vma", "extract", *args, **kw)


def compare(v, image, data):
    v.put("expected.raw", data)
    v.ok("drover", "compare", "-f", "raw", "expected.raw", image)


def test_all_into_a_directory(v):
    a = archive()
    data = a.build()
    v.put("a.vma", data)
    assert extract(v, "a.vma", "out").code == 0
    wanted = {"qemu-server.conf": vmagen.CONF, "drive-scsi0.raw": a.contents[1], "drive-scsi1.raw": a.contents[2]}
    same_files(v.dir / "out", wanted)
    (v.dir / "there").mkdir()
    assert extract(v, "-", "there", stdin=data).code == 0
    same_files(v.dir / "there", wanted)
    v.put("there/drive-scsi0.raw", b"precious")
    r = extract(v, "a.vma", "there")
    assert r.code == 1 and "drive-scsi0.raw" in r.errors
    assert v.get("there/drive-scsi0.raw") == b"precious"
    assert extract(v, "--force", "a.vma", "there").code == 0
    same_files(v.dir / "there", wanted)


def test_without_waiting_until_it_is_durable(v):
    if SANITIZED or not shutil.which("strace"):
        pytest.skip("needs strace, which the leak checker does not stand")
    a = archive()
    a.write(v.dir / "a.vma")
    trace = v.dir / "trace"
    drover = [str(v.bin / "drover"), "vma", "extract"]
    for more, synced in ((["--no-sync"], False), ([], True)):
        done = subprocess.run(["strace", "-f", "-e", "trace=fsync,fdatasync,syncfs", "-o", str(trace), *drover, *more, "a.vma", "out"],
                              cwd=v.dir, capture_output=True, check=False)
        assert done.returncode == 0, done
        assert ("sync(" in trace.read_text()) == synced
        same_files(v.dir / "out", {"qemu-server.conf": vmagen.CONF, "drive-scsi0.raw": a.contents[1], "drive-scsi1.raw": a.contents[2]})
        subprocess.run(["rm", "-r", str(v.dir / "out")], check=True)
    assert extract(v, "--no-sync", "--resume", "a.vma", "out").code == 1


def test_sparse_files_come_out(v):
    data = bytearray(200 * CLUSTER)
    data[100 * CLUSTER:100 * CLUSTER + 4096] = b"x" * 4096
    vmagen.simple({1: bytes(data)}).write(v.dir / "a.vma")
    for tool, name in ((("drover", "vma"), "drive-scsi0.raw"), (("vma",), "disk-drive-scsi0.raw")):
        v.ok(*tool, "extract", "a.vma", "out")
        assert os.stat(v.dir / "out" / name).st_blocks * 512 <= 128 * 1024
        subprocess.run(["rm", "-r", str(v.dir / "out")], check=True)
    zeros = vmagen.simple({1: bytes(64 * CLUSTER)}, store_zeros=True)  # stored as data, by a lesser writer
    zeros.write(v.dir / "z.vma")
    v.ok("drover", "vma", "extract", "z.vma", "out")
    assert os.stat(v.dir / "out" / "drive-scsi0.raw").st_size == 64 * CLUSTER


@pytest.mark.parametrize("form,options", [("vmdk", []), ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"]), ("vmdk",
                         ["-o", "subformat=monolithicFlat"]), ("raw", []), ("add-cow", [])], ids=str)
def test_into_other_formats(v, form, options):
    a = archive()
    a.write(v.dir / "a.vma")
    r = extract(v, "--to", form, *options, "a.vma", "out")
    if form == "add-cow" and r.code != 0:
        pytest.skip("add-cow needs an image file of its own: " + r.errors)
    assert r.code == 0, r
    for i, name in ((1, "drive-scsi0"), (2, "drive-scsi1")):
        compare(v, f"out/{name}.{form}", a.contents[i])
    assert not [n for n in os.listdir(v.dir / "out") if n.startswith(".")]


@pytest.mark.parametrize("size", [1, 511, 1000, 66536])
@pytest.mark.parametrize("form", ["raw", "vmdk"])
def test_sizes_that_are_no_whole_sectors(v, size, form):
    data = random.Random(size).randbytes(size)
    vmagen.simple({1: data}).write(v.dir / "a.vma")
    assert extract(v, "--to", form, "a.vma", "out").code == 0
    v.ok("drover", "convert", "-O", "raw", f"out/drive-scsi0.{form}", "check.raw")
    got = v.get("check.raw")
    assert got[:size] == data and not any(got[size:]) and len(got) - size < 512
    if form == "raw":
        assert v.get("out/drive-scsi0.raw") == data


def test_one_disk_into_a_file(v):
    a = archive()
    a.write(v.dir / "a.vma")
    assert extract(v, "-d", "drive-scsi1", "--output", "x.raw", "a.vma").code == 0
    assert v.get("x.raw") == a.contents[2]
    assert extract(v, "-d", "drive-scsi0", "--output", "x.vmdk", "--to", "vmdk", "a.vma").code == 0
    compare(v, "x.vmdk", a.contents[1])
    r = extract(v, "--output", "y.raw", "a.vma")  # which one?
    assert r.code == 1 and "y.raw" not in v.names()
    r = extract(v, "-d", "drive-scsi1", "--output", "x.raw", "a.vma")  # it is there
    assert r.code == 1 and "x.raw" in r.errors
    r = extract(v, "-d", "nope", "--output", "y.raw", "a.vma")
    assert r.code == 1 and "nope" in r.errors
    assert sorted(n for n in v.names() if n != "expected.raw") == ["a.vma", "x.raw", "x.vmdk"]


def test_over_a_larger_disk_that_is_there(v):
    a = archive()
    a.write(v.dir / "a.vma")
    size = 12 * CLUSTER
    v.put("x.raw", b"\xee" * size)
    assert extract(v, "-n", "-d", "drive-scsi0", "--output", "x.raw", "a.vma").code == 0
    got = v.get("x.raw")
    assert len(got) == size and got[:len(a.contents[1])] == a.contents[1]
    assert set(got[len(a.contents[1]):]) == {0xee}  # not the archive's
    v.put("x.raw", bytes(size))
    assert extract(v, "-n", "--target-is-zero", "-d", "drive-scsi0", "--output", "x.raw", "a.vma").code == 0
    assert v.get("x.raw")[:len(a.contents[1])] == a.contents[1]
    v.put("small.raw", bytes(8 * CLUSTER))
    r = extract(v, "-n", "-d", "drive-scsi0", "--output", "small.raw", "a.vma")
    assert r.code == 1 and "small.raw" in r.errors and v.get("small.raw") == bytes(8 * CLUSTER)


def test_into_a_block_device(v):
    a = archive()
    a.write(v.dir / "a.vma")
    v.put("back", b"\xee" * (12 * CLUSTER))
    done = subprocess.run(["losetup", "-f", "--show", str(v.dir / "back")], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no loop devices")
    loop = done.stdout.decode().strip()
    try:
        assert extract(v, "-d", "drive-scsi0", "--output", loop, "a.vma").code == 0
    finally:
        subprocess.run(["losetup", "-d", loop], check=False)
    assert v.get("back")[:len(a.contents[1])] == a.contents[1]


def test_names_that_are_no_file_names(v):
    for name, files in (("config-name-traversal", {"config-1": b"evil"}), ("config-name-newline", {"config-1": b"evil"}),
                        ("disk-name-slash", {"disk-1.raw"}), ("disk-names-alike", {"disk-1.raw", "disk-2.raw"})):
        v.put("bad.vma", BAD[name].data)
        r = extract(v, "bad.vma", "out")
        assert r.code == 1 and "--id-names" in r.errors and not os.path.exists(v.dir / "out"), (name, r)
        r = extract(v, "--id-names", "bad.vma", "out")
        assert r.code == 0, (name, r)
        found = set(os.listdir(v.dir / "out"))
        assert found >= {"qemu-server.conf"} | set(files), found
        assert not any("/" in n or "\n" in n or ".." in n for n in found)
        subprocess.run(["rm", "-r", str(v.dir / "out")], check=True)
    assert sorted(os.listdir(v.dir)) == ["bad.vma"] and sorted(os.listdir(v.dir.parent)) == ["bin", "work"]


@pytest.mark.parametrize("name", [b"a\xc2\x9b31mb", b"a\xffb", "a\u202eb".encode(), b"\x1b[2J"])
def test_names_that_would_steer_a_terminal_are_no_file_names(v, name):
    disks = {1: b"x" * CLUSTER, 2: b"y" * CLUSTER}
    shown = re.sub(rb"[^ -~]", lambda m: b"\\x%02x" % m.group()[0], name)
    for kw in ({"names": {1: name}}, {"configs": [(name, b"c")]}):
        vmagen.simple(disks, **kw).write(v.dir / "a.vma")
        for args in (["vma", "extract", "a.vma", "out"], ["drover", "vma", "extract", "a.vma", "out"]):
            r = v.run(*args)
            assert r.code == 1 and b"'" + shown + b"'" in r.err and "out" not in v.names(), r
        assert extract(v, "--id-names", "a.vma", "out").code == 0
        assert {"disk-1.raw", "config-0"} & set(os.listdir(v.dir / "out"))
        shutil.rmtree(v.dir / "out")


def test_no_file_is_hidden(v):
    vmagen.simple({1: b"x" * CLUSTER}, configs=[(".profile", b"rm -rf"), ("qemu-server.conf", b"c")]).write(v.dir / "a.vma")
    assert ".profile" in v.fails("drover", "vma", "extract", "a.vma", "out") and "out" not in v.names()
    assert extract(v, "--id-names", "a.vma", "out").code == 0
    same_files(v.dir / "out", {"config-0": b"rm -rf", "qemu-server.conf": b"c", "drive-scsi0.raw": b"x" * CLUSTER})


def test_the_state_of_a_machine_is_no_disk_of_a_format(v):
    state = b"s" * CLUSTER
    vmagen.simple({1: b"x" * CLUSTER, 2: state, 3: state}, names={1: "x", 2: "vmstate", 3: "vmstate"}).write(v.dir / "a.vma")
    r = extract(v, "--json", "--id-names", "--to", "vmdk", "-d", "x", "-d", "disk-3", "a.vma", "out")
    assert r.code == 0 and [(d["file"], d["format"]) for d in json.loads(r.text)["disks"]] == [("x.vmdk", "vmdk"), ("disk-3.raw", "raw")]
    assert v.get("out/disk-3.raw") == state


def test_names_of_what_is_not_complete_are_kept_for_that(v):
    vmagen.simple({1: b"x" * CLUSTER}, names={1: b".drover.partial"}, configs=[(b".drover.record", b"{}")]).write(v.dir / "a.vma")
    assert extract(v, "a.vma", "out").code == 1 and "out" not in v.names()
    assert extract(v, "--id-names", "--resume", "a.vma", "out").code == 0
    same_files(v.dir / "out", {"disk-1.raw": b"x" * CLUSTER, "config-0": b"{}"})
    v.ok("vma", "extract", "a.vma", "other")
    same_files(v.dir / "other", {"disk-.drover.partial.raw": b"x" * CLUSTER, ".drover.record": b"{}"})


def test_symbolic_links_in_the_directory_are_not_followed(v):
    a = archive()
    a.write(v.dir / "a.vma")
    (v.dir / "out").mkdir()
    v.put("victim", b"precious")
    for name in ("drive-scsi0.raw", "qemu-server.conf"):
        os.symlink("../victim", v.dir / "out" / name)
    assert extract(v, "a.vma", "out").code == 1
    assert v.get("victim") == b"precious"
    assert extract(v, "--force", "a.vma", "out").code == 0
    assert v.get("victim") == b"precious" and v.get("out/drive-scsi0.raw") == a.contents[1]
    os.symlink("elsewhere", v.dir / "out2")
    assert extract(v, "a.vma", "out2").code == 1


def test_force_replaces_what_nobody_uses(v):
    a = archive()
    a.write(v.dir / "a.vma")
    (v.dir / "out").mkdir()
    for name in ("drive-scsi0.raw", "drive-scsi1.raw"):
        v.put("out/" + name, b"old" * 1000)
    user = v.start("drover", "io", "-f", "raw", "out/drive-scsi1.raw", stdin=subprocess.PIPE)
    user.stdin.write(b"length\n")
    user.stdin.flush()
    assert user.stdout.readline()  # it is open
    assert extract(v, "--force", "a.vma", "out").code == 1
    assert v.get("out/drive-scsi0.raw") == b"old" * 1000 and ".drover.partial" not in os.listdir(v.dir / "out")
    user.communicate(b"quit\n", timeout=30)
    assert extract(v, "--force", "a.vma", "out").code == 0
    assert v.get("out/drive-scsi0.raw") == a.contents[1] and v.get("out/drive-scsi1.raw") == a.contents[2]
    r = extract(v, "--force", "-d", "drive-scsi0", "--output", "a.vma", "a.vma")
    assert r.code == 1 and v.get("a.vma") == a.build()


def traced(v, what, *args, inject=()):
    """What it did, a line a call, with the names of the files."""
    if SANITIZED or not shutil.which("strace"):
        pytest.skip("needs strace, which the leak checker does not stand")
    done = subprocess.run(["strace", "-f", "-y", "-o", v.dir / "trace", "-e", "trace=" + what, *[x for i in inject for x in ("-e", i)],
                           v.bin / "drover", "vma", *args], cwd=v.dir, capture_output=True, check=False)
    return done.returncode, (v.dir / "trace").read_text()


@pytest.mark.parametrize("made", [False, True])
def test_what_a_success_tells_of_is_durable(v, made):
    archive().write(v.dir / "a.vma")
    if made:  # by a run that was killed, perhaps
        (v.dir / "out").mkdir()
    code, trace = traced(v, "fsync,fdatasync,renameat2", "extract", "a.vma", "out")
    assert code == 0
    places = [trace.index(f"/out/.drover.partial/{n}>") for n in ("qemu-server.conf", "drive-scsi0.raw", "drive-scsi1.raw")]
    renames = [m.start() for m in re.finditer(r'renameat2\(.*, "out/[^./"]', trace)]
    assert len(renames) == 3 and max(places) < renames[0]
    assert re.search(r"fsync\(\d+</.*/out>\)(.|\n)*fsync\(\d+<" + re.escape(str(v.dir.resolve())) + r">\)", trace[renames[-1]:])


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
@pytest.mark.parametrize("form", ["raw", "vmdk"])
def test_each_flush_that_fails_is_a_failure(v, form, call):
    archive().write(v.dir / "a.vma")
    for n in range(1, 40):
        code, trace = traced(v, "fsync,fdatasync", "extract", "--to", form, "a.vma", "out", inject=[f"inject={call}:error=EIO:when={n}"])
        if "INJECTED" not in trace:
            break
        assert code == 1 and not (v.dir / "out").exists(), trace
    assert code == 0 and n > 1


@pytest.mark.parametrize("there", [False, True])
def test_force_replaces_nothing_that_came_meanwhile(v, there):
    a = archive()
    data = a.build()
    (v.dir / "out").mkdir()
    if there:
        v.put("out/drive-scsi1.raw", b"old" * 1000)
    with v.start("drover", "vma", "extract", "--force", "-", "out", stdin=subprocess.PIPE) as p:
        p.stdin.write(data[:-1])
        p.stdin.flush()
        while not os.path.exists(v.dir / "out/.drover.partial/qemu-server.conf"):
            assert p.poll() is None
        v.put("new", b"precious")
        os.rename(v.dir / "new", v.dir / "out/drive-scsi1.raw")
        err = p.communicate(data[-1:])[1]
    assert p.returncode == 1 and b"drive-scsi1.raw" in err
    assert v.get("out/drive-scsi1.raw") == b"precious" and os.listdir(v.dir / "out") == ["drive-scsi1.raw"]


@pytest.mark.parametrize("more", [[], ["--resume"], ["--force"]], ids=str)
def test_what_was_put_aside_when_it_was_killed_stays_until_there_is_another(v, more):
    a = archive()
    a.write(v.dir / "a.vma")
    v.put("bad.vma", a.build()[:-1])
    old, others = "out/.drover.partial/.drover.old.drive-scsi0.raw", "out/.drover.partial/.drover.old.others"
    os.makedirs(v.dir / "out/.drover.partial")
    for name in (old, others):
        v.put(name, b"precious")
    for _ in range(2):
        r = extract(v, *more, "bad.vma", "out")
        assert r.code == 1
        assert f"{old}: is the drive-scsi0.raw that was to be replaced" in r.errors or "--resume" in more
        assert v.get(old) == b"precious" and v.get(others) == b"precious"
    r = extract(v, *more, "a.vma", "out") if "--resume" not in more else extract(v, "a.vma", "out")
    assert r.code == 0 and f"{others}: is the others that was" in r.errors and old not in r.errors, r
    assert v.get("out/drive-scsi0.raw") == a.contents[1]
    assert v.get(others) == b"precious" and os.listdir(v.dir / "out/.drover.partial") == [".drover.old.others"]


def test_a_directory_of_work_that_is_somebody_elses_by_now_is_left_alone(v):
    archive().write(v.dir / "a.vma")
    work = v.dir / "out/.drover.partial"
    os.makedirs(work)
    with stopped(v.dir, "openat", v.bin / "drover", "vma", "extract", "a.vma", "out", path="out/.drover.partial", sanitized=SANITIZED) as p:
        os.rename(work, v.dir / "gone")
        work.mkdir()
        v.put("out/.drover.partial/theirs", b"precious")
    assert p.returncode == 1 and "another extraction is using it" in p.err
    assert os.listdir(v.dir / "out") == [".drover.partial"] and os.listdir(work) == ["theirs"]


@pytest.mark.parametrize("end", [0, 1])
def test_nothing_is_touched_behind_a_link_that_took_the_place_of_the_directory_of_work(v, end):
    data = archive().build()
    (v.dir / "victim/deeper").mkdir(parents=True)
    names = ["deeper/file", "file", "drive-scsi0.raw", "drive-scsi1.raw", "qemu-server.conf"]
    for name in names:
        v.put("victim/" + name, b"precious")
    with v.start("drover", "vma", "extract", "-", "out", stdin=subprocess.PIPE) as p:
        p.stdin.write(data[:-1])
        p.stdin.flush()
        while not os.path.exists(v.dir / "out/.drover.partial/drive-scsi1.raw"):
            assert p.poll() is None
        os.rename(v.dir / "out/.drover.partial", v.dir / "gone")
        os.symlink("../victim", v.dir / "out/.drover.partial")
        p.communicate(data[len(data) - 1:][end:])
    assert p.returncode == 1
    assert all(v.get("victim/" + name) == b"precious" for name in names)
    assert os.listdir(v.dir / "out") == [".drover.partial"]


def test_more_disks_than_descriptors_at_first(v):
    vmagen.simple({n: bytes([n]) * 512 for n in range(1, 61)}).write(v.dir / "a.vma")
    for _ in range(2):  # in the second run each takes another's place
        done = subprocess.run(["sh", "-c", 'ulimit -S -n 40; exec "$0" vma extract --force --to vmdk a.vma out', v.bin / "drover"],
                              cwd=v.dir, capture_output=True, check=False)
        assert done.returncode == 0, done
    assert len(os.listdir(v.dir / "out")) == 61


def test_places_where_a_disk_does_not_go(v):
    archive().write(v.dir / "a.vma")
    (v.dir / "sub").mkdir()
    os.mkfifo(v.dir / "fifo")
    os.symlink("/dev/null", v.dir / "link")
    for output in ("-", "", ".", "sub", "sub/", "new/", "fifo"):
        r = extract(v, "--force", "-d", "drive-scsi0", "--output", output, "a.vma")
        assert r.code == 1 and r.errors and v.names() == ["a.vma", "fifo", "link", "sub"], (output, r)
    assert extract(v, "--force", "-d", "drive-scsi0", "--output", "link", "a.vma").code == 0
    assert not os.path.islink(v.dir / "link") and os.path.exists("/dev/null")


def test_json_tells_what_was_made(v):
    archive().write(v.dir / "a.vma")
    r = extract(v, "--json", "a.vma", "out")
    found = json.loads(r.out)
    assert [(d["name"], d["id"], d["file"]) for d in found["disks"]] == [("drive-scsi0", 1, "drive-scsi0.raw"),
                                                                         ("drive-scsi1", 2, "drive-scsi1.raw")]
    assert found["damage"] == [] and found["missing-bytes"] == 0
    listed = json.loads(v.ok("drover", "vma", "list", "--json", "a.vma").out)
    assert [(d["name"], d["size"]) for d in listed["disks"]] == [("drive-scsi0", 9 * CLUSTER + 1024), ("drive-scsi1", 7 * CLUSTER)]
    assert listed["uuid"].replace("-", "") == vmagen.UUID.hex() and listed["ctime"] == vmagen.CTIME


def test_hostile_names_in_lists(v):
    for name in ("config-name-forged", "config-name-escape", "disk-name-escape", "disk-name-newline"):
        v.put("bad.vma", BAD[name].data)
        r = v.ok("drover", "vma", "list", "bad.vma")
        assert "\\x" in r.text and not [line for line in r.text.splitlines() if line.startswith(("DEV: ", "CTIME: "))]
        assert json.loads(v.ok("drover", "vma", "list", "--json", "bad.vma").out)


# ---------------------------------------------------------------------------------------- salvage


def merged(ranges):
    out = []
    for a, b in sorted(ranges):
        if out and out[-1][1] >= a:
            out[-1][1] = max(out[-1][1], b)
        else:
            out.append([a, b])
    return [(a, b - a) for a, b in out]


def missing_of(a, extents):
    """{disk name: [(offset, length)]} that is lost with these extents."""
    lost = {}
    for e in extents:
        for s in e.slots:
            if s.disk:
                size = len(a.contents[s.disk])
                lost.setdefault(s.disk, []).append((s.cluster * CLUSTER, min((s.cluster + 1) * CLUSTER, size)))
    return {a.header.disks[i][0].decode(): merged(r) for i, r in lost.items()}


def salvage(v, data, stdin=False):
    """-> (exit code, {disk: missing ranges}, other damage)"""
    subprocess.run(["rm", "-rf", str(v.dir / "out")], check=True)
    v.put("bad.vma", data)
    r = extract(v, "--salvage", "--json", "-" if stdin else "bad.vma", "out", stdin=data if stdin else None)
    assert r.code in (0, 1, 3), r
    missing, other = {}, []
    for d in json.loads(r.out)["damage"]:
        if d["kind"] == "missing":
            missing.setdefault(d["disk"], []).append((d["offset"], d["length"]))
        else:
            other.append((d["kind"], d.get("disk"), d["offset"], d["length"]))
    return r.code, missing, other


def check_salvaged(v, a, missing):
    """What is not missing is right; what is missing reads as zeros."""
    for i, content in a.contents.items():
        name = a.header.disks[i][0].decode()
        wanted = bytearray(content)
        for at, length in missing.get(name, []):
            wanted[at:at + length] = bytes(length)
        assert v.get(f"out/{name}.raw") == wanted, name


@pytest.mark.parametrize("stdin", [False, True])
def test_a_broken_extent_costs_its_clusters_and_nothing_else(v, stdin):
    a = archive(per=3)
    data, places = a.build(), a.places()
    assert salvage(v, data, stdin) == (0, {}, [])
    for n in (0, 2, len(places) - 1):
        at, length, e = places[n]
        for where in (at + 3, at + 8, at + 30, at + 45, at + 500):
            code, missing, other = salvage(v, data[:where] + bytes([data[where] ^ 0x40]) + data[where + 1:], stdin)
            assert code == 3 and missing == missing_of(a, [e]), (n, where)
            assert other == [("extent", None, at, length)], (n, where)
        check_salvaged(v, a, missing)


@pytest.mark.parametrize("stdin", [False, True])
def test_a_hole_in_the_middle(v, stdin):
    """A piece of the archive lost to zeros, over several extents and not at their borders."""
    a = archive(per=2)
    data, places = a.build(), a.places()
    first, last = places[2][0] + 30, places[4][0] + 40
    bad = data[:first] + bytes(last - first) + data[last:]
    code, missing, _ = salvage(v, bad, stdin)
    assert code == 3 and missing == missing_of(a, [places[n][2] for n in (2, 3, 4)])
    check_salvaged(v, a, missing)


@pytest.mark.parametrize("stdin", [False, True])
@pytest.mark.parametrize("cut", [1, 511, 512, 513, 5000])
def test_bytes_that_are_gone(v, stdin, cut):
    """All behind them stands earlier than it should, at offsets that are no multiples of anything."""
    a = archive(per=2)
    data, places = a.build(), a.places()
    at = places[3][0]
    bad = data[:at + 20] + data[at + 20 + cut:]
    code, missing, _ = salvage(v, bad, stdin)
    assert code == 3
    if cut % 512 == 0:  # at others, extents cannot stand: they may be searched for or not
        assert missing == missing_of(a, [places[3][2]])
    elif missing != missing_of(a, [places[3][2]]):
        assert missing == missing_of(a, [p[2] for p in places[3:]])
    check_salvaged(v, a, missing)


@pytest.mark.parametrize("stdin", [False, True])
def test_an_archive_that_is_cut(v, stdin):
    a = archive(per=3)
    data, places = a.build(), a.places()
    for n in (0, 2, len(places) - 1):
        for into in (0, 100, 512, places[n][1] // 2, places[n][1] - 1):
            code, missing, _ = salvage(v, data[:places[n][0] + into], stdin)
            assert code == 3
            whole = missing_of(a, [p[2] for p in places[n:]])
            less = missing_of(a, [p[2] for p in places[n + 1:]])
            assert covers(whole, missing) and covers(missing, less), (n, into, missing)
            if into <= 512 and any(s.blocks for s in places[n][2].slots):
                pass
            check_salvaged(v, a, missing)
    text = extract(v, "--salvage", "--force", "bad.vma", "out").text
    assert all(f"{name}: {at}..{at + length} ({length} bytes): missing" in text
               for name, ranges in missing.items() for at, length in ranges), text


def covers(a, b):
    """Is all of b in a?"""
    def contained(at, length, ranges):
        return any(x <= at and at + length <= x + n for x, n in ranges)
    return all(contained(at, length, a.get(name, [])) for name, ranges in b.items() for at, length in ranges)


def test_duplicates_the_first_counts(v):
    a = archive(per=4)
    double = vmagen.Slot(1, 0, {k: b"\xdd" * 4096 for k in range(16)})
    a.extents.append(vmagen.Extent([double]))
    code, missing, other = salvage(v, a.build())
    assert code == 3 and missing == {} and other == [("duplicate", "drive-scsi0", 0, CLUSTER)]
    check_salvaged(v, a, {})


def test_salvage_finds_what_checksums_know(v):
    content = vmagen.random_disk(random.Random(1), 20 * CLUSTER, 0.9)
    v.put("a.raw", content)
    v.ok("drover", "vma", "create", "-q", "a.vma", "-d", "format=raw:x=a.raw")
    data = bytearray(v.get("a.vma"))
    parsed = vmagen.parse(bytes(data))
    at, _, slots = parsed.extents[0]
    data[at + 512 + 70] ^= 1
    v.put("a.vma", bytes(data))
    cluster = next(n for _, n, mask in slots if mask)
    r = extract(v, "--salvage", "--json", "a.vma", "out")
    found = json.loads(r.out)
    assert r.code == 3
    assert [(d["kind"], d["offset"], d["length"]) for d in found["damage"]] == [("checksum", cluster * CLUSTER, CLUSTER)]


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_never_gives_wrong_bytes_without_saying_so(v, seed):
    """Headers have checksums, and data gets them here: what comes out and is not listed is right."""
    rng = random.Random(seed)
    content = vmagen.random_disk(rng, 60 * CLUSTER)
    v.put("a.raw", content)
    v.ok("drover", "vma", "create", "-q", "bad.vma", "-d", "format=raw:drive-scsi0=a.raw")
    data = bytearray(v.get("bad.vma"))
    head = struct.unpack_from(">I", data, 56)[0]
    for _ in range(5):
        at, n = rng.randrange(head, len(data)), rng.choice((1, 512, 4096, 70000))
        how = rng.randrange(3)
        if how == 0:
            data[at:at + n] = rng.randbytes(min(n, len(data) - at))
        elif how == 1:
            data[at:at + n] = bytes(min(n, len(data) - at))
        elif rng.random() < 0.5:
            del data[at:at + n]
    v.put("bad.vma", bytes(data))
    r = extract(v, "--salvage", "--json", "bad.vma", "out")
    assert r.code in (0, 3), r
    got = v.get("out/drive-scsi0.raw")
    assert len(got) == len(content)
    listed = [(d["offset"], d["offset"] + d["length"]) for d in json.loads(r.out)["damage"] if d.get("disk")]
    for at in range(0, len(content), 4096):
        if got[at:at + 4096] != content[at:at + 4096]:
            assert any(a <= at < b for a, b in listed), at


@pytest.mark.parametrize("stdin", [False, True])
def test_salvage_uses_a_header_whose_checksum_is_wrong_and_says_so(v, stdin):
    a = archive(per=3)
    data = a.build()
    # the uuid, the checksum, the second device's name: what is right comes out under the name that it has then
    for where, second in ((12, "drive-scsi1"), (40, "drive-scsi1"), (4096 + 2 * 32, "disk-2")):
        bad = bytearray(data)
        bad[where] ^= 0x41
        code, missing, other = salvage(v, bytes(bad), stdin)
        assert (code, missing, other) == (3, {}, [("header", None, 0, 12800)]), where
        for i, name in ((1, "drive-scsi0"), (2, second)):
            assert v.get(f"out/{name}.raw") == a.contents[i]
        assert extract(v, "bad.vma", "other", stdin=None).code == 1 or stdin


def test_salvage_finds_the_extents_where_the_header_does_not_say_where_they_are(v):
    a = archive(per=3)
    for where in (1, 5, 57):  # magic, version, size
        bad = bytearray(a.build())
        bad[where] ^= 0x41
        code, missing, other = salvage(v, bytes(bad))
        assert (code, missing, other) == (3, {}, [("header", None, 0, 12800)]), where
        check_salvaged(v, a, {})


@pytest.mark.parametrize("packer", [[], ["lzop", "-c"]], ids=["plain", "lzop"])
def test_clusters_of_a_device_that_is_not_in_the_header_get_a_name_of_their_own(v, packer):
    a = archive(per=3)
    bad = bytearray(a.build())
    size = struct.unpack_from(">I", bad, 56)[0]
    bad[4096 + 2 * 32:4096 + 3 * 32] = bytes(32)
    bad[32:48] = bytes(16)
    bad[32:48] = hashlib.md5(bad[:size]).digest()
    packed = subprocess.run(packer, input=bytes(bad), stdout=subprocess.PIPE, check=True).stdout if packer else bytes(bad)
    code, missing, other = salvage(v, packed)
    assert (code, missing, other) == (3, {}, [("header", "unlisted-2", 0, 7 * CLUSTER)])
    assert v.get("out/drive-scsi0.raw") == a.contents[1]
    assert v.get("out/unlisted-2.raw") == a.contents[2]


def test_one_odd_extent_does_not_make_a_disk_of_256_tib(v):
    """It would be longer than a file can be in many file systems, and the salvage of all disks would end there."""
    a = archive(per=3)
    odd = vmagen.Extent([vmagen.Slot(9, 0, {0: b"x" * 4096}), vmagen.Slot(9, (1 << 32) - 2, {0: b"y" * 4096})]).build()
    code, missing, other = salvage(v, a.build() + odd)
    assert code == 3 and ("header", "unlisted-9", 0, CLUSTER) in other, other
    assert v.get("out/unlisted-9.raw") == (b"x" * 4096).ljust(CLUSTER, b"\0")
    check_salvaged(v, a, {})
    r = extract(v, "--salvage", "bad.vma", "again")
    assert b"device 9: its clusters from 268435456 on, up to 4294967294, are left out" in r.err, r


def test_salvage_makes_nothing_of_a_header_that_a_stream_does_not_have_all_of(v):
    bad = bytearray(archive().build())
    bad[56:60] = struct.pack(">I", 8 << 20)
    r = extract(v, "--salvage", "-", "out", stdin=bytes(bad))
    assert r.code == 1 and b"expected a header up to 8388608" in r.err and "out" not in v.names()


def test_of_a_damaged_stream_the_whole_state_may_be_wrong(v):
    """Also where it is longer than the header says."""
    state = random.Random(4).randbytes(6 * CLUSTER)
    data = bytearray(gzip.compress(vmagen.vmstate_archive(state, size=CLUSTER).build(), 1))
    data[-200] ^= 0x40
    _, _, other = salvage(v, bytes(data))
    told = [(at, at + length) for kind, disk, at, length in other if (kind, disk) == ("doubtful", "vmstate")]
    assert told == [(0, len(state))], other


def test_salvage_of_something_that_is_no_archive(v):
    for name in ("text", "cut-at-12288"):
        v.put("bad.vma", BAD[name].data)
        r = extract(v, "--salvage", "bad.vma", "out")
        assert r.code == 1 and not os.path.exists(v.dir / "out"), r


# ---------------------------------------------------------------------------------------- resume


def interrupt(v, *args, number=signal.SIGKILL, until=".drover.record"):
    """Start an extraction that is slow, and end it when something is there."""
    p = v.start("drover", "vma", "extract", "-r", "2M", *args)
    deadline = time.monotonic() + 30
    while not (os.path.exists(v.dir / until) and os.stat(v.dir / until).st_size > 0):
        assert p.poll() is None and time.monotonic() < deadline, p.communicate()
        time.sleep(0.01)
    time.sleep(0.3)
    p.send_signal(number)
    p.communicate(timeout=30)
    return p.returncode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_going_on(v, number):
    rng = random.Random(5)
    a = vmagen.simple({1: rng.randbytes(100 * CLUSTER), 2: vmagen.random_disk(rng, 40 * CLUSTER)}, order="interleaved")
    a.write(v.dir / "a.vma")
    interrupt(v, "--resume", "a.vma", "out", number=number, until="out/.drover.partial/.drover.record")
    assert os.listdir(v.dir / "out") == [".drover.partial"], "something has its final name"
    r = extract(v, "--resume", "a.vma", "out")
    assert r.code == 0, r
    same_files(v.dir / "out", {"qemu-server.conf": vmagen.CONF, "drive-scsi0.raw": a.contents[1], "drive-scsi1.raw": a.contents[2]})


def leave(v, *names):
    """What a kill may leave in the directory of work."""
    for name in names:
        path = v.dir / "out/.drover.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half of it")


# A new image has a directory of its own until it is complete; a file is replaced by one beside it.
LEFT = [".drive-scsi1.raw.drover.new-a1b2c3/drive-scsi1.raw", ".drive-scsi1.raw.drover-a1b2c3"]


def test_what_a_kill_left_incomplete_gets_no_name(v):
    a = vmagen.simple({1: random.Random(5).randbytes(100 * CLUSTER)})
    a.write(v.dir / "a.vma")
    interrupt(v, "--resume", "a.vma", "out", until="out/.drover.partial/.drover.record")
    leave(v, *LEFT)
    assert extract(v, "--resume", "a.vma", "out").code == 0
    same_files(v.dir / "out", {"qemu-server.conf": vmagen.CONF, "drive-scsi0.raw": a.contents[1]})


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=str)
def test_what_a_kill_left_before_anything_was_recorded_goes_away(v, resume):
    a = archive()
    a.write(v.dir / "a.vma")
    wanted = {"qemu-server.conf": vmagen.CONF, "drive-scsi0.raw": a.contents[1], "drive-scsi1.raw": a.contents[2]}
    for code in (0, 1):  # then the names are taken, which is noticed before there is anything to keep
        leave(v, *LEFT, "drive-scsi0.raw", "more.raw")
        r = extract(v, *resume, "a.vma", "out")
        assert r.code == code, r
        same_files(v.dir / "out", wanted)


def position(v):
    try:
        return json.loads(v.get("out/.drover.partial/.drover.record")).get("position", 0)
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("stdin", [False, True])
def test_what_is_done_is_not_done_again(v, stdin):
    rng = random.Random(8)
    a = vmagen.simple({1: rng.randbytes(110 * CLUSTER), 2: vmagen.random_disk(rng, 9 * CLUSTER)}, per=2)
    a = vmagen.with_uuid(a, uuid.UUID(int=rng.getrandbits(128), version=4).bytes)
    data = a.build()
    v.put("a.vma", data)
    p = v.start("drover", "vma", "extract", "-r", "2M", "--resume", "a.vma", "out")
    deadline = time.monotonic() + 30
    while position(v) <= len(a.head):  # until a part is known to be durable
        assert p.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    p.kill()
    p.communicate(timeout=30)
    with open(v.dir / "out/.drover.partial/drive-scsi0.raw", "r+b") as f:
        f.write(b"this was there")
    r = extract(v, "--resume", "-" if stdin else "a.vma", "out", stdin=data if stdin else None)
    assert r.code == 0, r
    assert v.get("out/drive-scsi0.raw") == b"this was there" + a.contents[1][14:]
    assert v.get("out/drive-scsi1.raw") == a.contents[2]


def test_an_archive_damaged_before_where_it_goes_on_is_refused(v):
    a = vmagen.simple({1: random.Random(8).randbytes(110 * CLUSTER)}, per=2)
    data = a.build()
    v.put("a.vma", data)
    p = v.start("drover", "vma", "extract", "-r", "2M", "--resume", "a.vma", "out")
    deadline = time.monotonic() + 30
    while position(v) <= len(a.head):
        assert p.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    p.kill()
    p.communicate(timeout=30)
    at, times = a.places()[0][0], os.stat(v.dir / "a.vma")
    v.put("a.vma", data[:at + 20] + b"?" + data[at + 21:])
    os.utime(v.dir / "a.vma", ns=(times.st_atime_ns, times.st_mtime_ns))
    r = extract(v, "--resume", "a.vma", "out")
    assert r.code == 1 and str(at) in r.errors and os.listdir(v.dir / "out") == [".drover.partial"], r
    assert "the same command goes on" in r.errors
    v.put("a.vma", data)
    os.utime(v.dir / "a.vma", ns=(times.st_atime_ns, times.st_mtime_ns))
    record = v.dir / "out/.drover.partial/.drover.record"
    record.write_text(re.sub(r'"position":\d+', f'"position":{len(data) + 1}', record.read_text()))
    r = extract(v, "--resume", "a.vma", "out")
    assert r.code == 1 and str(len(data) + 1) in r.errors and os.listdir(v.dir / "out") == [".drover.partial"], r


def test_a_new_directory_has_the_rights_of_any_other(v):
    vmagen.simple({1: bytes(CLUSTER)}).write(v.dir / "a.vma")
    before = os.umask(0o022)
    try:
        for mask in (0o022, 0o000, 0o077):
            os.umask(mask)
            assert extract(v, "a.vma", f"out{mask}").code == 0
            assert os.stat(v.dir / f"out{mask}").st_mode & 0o777 == 0o777 & ~mask
    finally:
        os.umask(before)


def test_going_on_with_another_archive_is_refused(v):
    rng = random.Random(6)
    a = vmagen.simple({1: rng.randbytes(100 * CLUSTER)})
    a.write(v.dir / "a.vma")
    interrupt(v, "--resume", "a.vma", "out", until="out/.drover.partial/.drover.record")
    other = vmagen.with_uuid(vmagen.simple({1: rng.randbytes(100 * CLUSTER)}), bytes(16))
    other.write(v.dir / "b.vma")
    r = extract(v, "--resume", "b.vma", "out")
    assert r.code == 1 and os.listdir(v.dir / "out") == [".drover.partial"], r
    # Reproducible archives of two days have the same header.
    day = vmagen.simple({1: rng.randbytes(100 * CLUSTER)})
    assert day.head == a.head and day.build() != a.build()
    day.write(v.dir / "day.vma")
    for name, stdin in (("day.vma", None), ("-", day.build())):
        r = extract(v, "--resume", name, "out", stdin=stdin)
        assert r.code == 1 and "another extraction" in r.errors and os.listdir(v.dir / "out") == [".drover.partial"], r
    # Nor into files of another format.
    r = extract(v, "--resume", "--to", "vmdk", "a.vma", "out")
    assert r.code == 1 and "another extraction" in r.errors and os.listdir(v.dir / "out") == [".drover.partial"], r
    assert extract(v, "--resume", "a.vma", "out").code == 0
    assert v.get("out/drive-scsi0.raw") == a.contents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_without_resume_leaves_nothing(v, number):
    vmagen.simple({1: random.Random(5).randbytes(100 * CLUSTER)}).write(v.dir / "a.vma")
    code = interrupt(v, "a.vma", "out", number=number, until="out/.drover.partial/drive-scsi0.raw")
    assert code > 0 or code == -number
    assert v.names() == ["a.vma"]


def test_after_a_kill_without_resume_it_starts_over(v):
    a = vmagen.simple({1: random.Random(5).randbytes(100 * CLUSTER)})
    a.write(v.dir / "a.vma")
    interrupt(v, "a.vma", "out", until="out/.drover.partial/drive-scsi0.raw")
    assert os.listdir(v.dir / "out") == [".drover.partial"]
    assert extract(v, "a.vma", "out").code == 0
    same_files(v.dir / "out", {"qemu-server.conf": vmagen.CONF, "drive-scsi0.raw": a.contents[1]})


def test_two_into_one_directory(v):
    a = vmagen.simple({1: random.Random(5).randbytes(100 * CLUSTER)})
    a.write(v.dir / "a.vma")
    p = v.start("drover", "vma", "extract", "-r", "2M", "a.vma", "out")
    while not os.path.exists(v.dir / "out/.drover.partial/drive-scsi0.raw"):
        assert p.poll() is None
        time.sleep(0.01)
    r = extract(v, "a.vma", "out")
    assert r.code == 1 and "another" in r.errors
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=30)


def test_a_rate(v):
    vmagen.simple({1: random.Random(5).randbytes(64 * CLUSTER)}).write(v.dir / "a.vma")
    started = time.monotonic()
    assert extract(v, "-r", "4M", "a.vma", "out").code == 0
    assert 0.5 < time.monotonic() - started < 5


@pytest.mark.parametrize("jobs", [1, 2, 16])
def test_jobs(v, jobs):
    a = GOOD["shuffled"]
    a.write(v.dir / "a.vma")
    assert extract(v, "-m", str(jobs), "a.vma", "out").code == 0
    for name, data in a.disks.items():
        assert v.get(f"out/{name}.raw") == data


def test_pipes_end_to_end(v):
    """create | zstd | extract, nothing in between ever in a file."""
    content = vmagen.random_disk(random.Random(7), 300 * CLUSTER, 0.3)
    v.put("a.raw", content)
    line = ("drover vma create - -d format=raw:x=a.raw | zstd -q | drover vma extract - one && "
            "drover vma create --zstd - -d format=raw:x=a.raw | drover vma extract - two && "
            "drover vma create - -d format=raw:x=a.raw | { sleep 0.3; dd bs=7777 status=none; } | vma verify -")
    done = subprocess.run(["bash", "-c", "set -o pipefail; " + line], cwd=v.dir, capture_output=True, check=False,
                          env={**os.environ, "PATH": f"{v.bin}:{os.environ['PATH']}"}, timeout=60)
    assert done.returncode == 0, done
    assert v.get("one/x.raw") == content and v.get("two/x.raw") == content


def test_a_full_disk(v):
    a = vmagen.simple({1: random.Random(5).randbytes(100 * CLUSTER)})
    a.write(v.dir / "a.vma")
    room = v.dir.parent / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(room)], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        for args in (["a.vma", room / "out"], ["--to", "vmdk", "a.vma", room / "out"], ["--output", room / "x.raw", "a.vma"]):
            r = extract(v, *args)
            assert r.code == 1 and "No space left" in r.errors, r
            assert os.listdir(room) == [], args
    finally:
        subprocess.run(["umount", str(room)], check=False)


def test_memory_stays_small(v):
    vmagen.write_huge(v.dir / "huge.vma", 4 * 10**9 // CLUSTER * CLUSTER, disks=2, zeros=True)
    r = extract(v, "huge.vma", "out", memory=256 * MIB)
    assert r.code == 0 and os.stat(v.dir / "out/drive-scsi0.raw").st_blocks == 0, r
