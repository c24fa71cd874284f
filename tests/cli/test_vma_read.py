# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vma list | config | verify | extract`, of every kind of archive that is allowed and of every kind that is not."""
import os
import re
import time

import pytest
import vmagen
from vmarun import MIB, same_files, v  # noqa: F401  pylint: disable=unused-import

GOOD = dict(vmagen.good())
BAD = {case.name: case for case in vmagen.bad()}
LARGE = dict(vmagen.big_good())


def listing(archive):
    """What `vma list` prints of it."""
    lines = [f"CFG: size: {len(data)} name: {name.decode()}" for name, data in archive.header.configs]
    for i, (name, size) in sorted(archive.header.disks.items()):
        if name == b"vmstate":
            lines.append(f"VMSTATE: dev_id={i} memory: {size}")
        else:
            lines.append(f"DEV: dev_id={i} size: {size} devname: {name.decode()}")
    return lines


def extracted(archive):
    """What a directory holds after `vma extract`."""
    out = {name.decode(): data for name, data in archive.header.configs}
    for name, data in archive.disks.items():
        out["vmstate.bin" if name == "vmstate" else f"disk-{name}.raw"] = data
    return out


@pytest.mark.parametrize("name", GOOD)
def test_a_good_archive(v, name):
    check_good(v, GOOD[name])


@pytest.mark.parametrize("name", LARGE)
def test_a_large_archive(v, name):
    check_good(v, LARGE[name]())


def check_good(v, archive):
    data = archive.build()
    v.put("a.vma", data)
    lines = v.ok("vma", "list", "a.vma").text.splitlines()
    assert lines[:-1] == listing(archive)
    assert lines[-1].startswith("CTIME: ")
    if 0 <= archive.header.ctime < 1 << 31:
        assert lines[-1] == "CTIME: " + time.asctime(time.gmtime(archive.header.ctime))
    else:
        assert str(archive.header.ctime) in lines[-1]
    v.ok("vma", "verify", "a.vma")
    v.ok("vma", "verify", "-", stdin=data)
    v.ok("vma", "extract", "a.vma", "out")
    same_files(v.dir / "out", extracted(archive))
    v.ok("vma", "extract", "-", "piped", stdin=data)
    same_files(v.dir / "piped", extracted(archive))
    for config, content in archive.header.configs[:3]:
        assert v.ok("vma", "config", "a.vma", "-c", config.decode(), raw=True).out == content
    assert v.names() == ["a.vma", "out", "piped"]


def test_list_and_config_read_only_the_header(v):
    archive = GOOD["two-disks"]
    v.put("head", archive.head)
    assert v.ok("vma", "list", "head").text.splitlines()[:-1] == listing(archive)
    assert v.ok("vma", "config", "head").out == vmagen.CONF
    assert v.ok("vma", "list", "-", stdin=archive.head).text.splitlines()[:-1] == listing(archive)
    assert v.ok("vma", "config", "-", "-c", "qemu-server.fw", stdin=archive.build()).out == b"[OPTIONS]\n"


def test_a_config_that_is_not_there(v):
    GOOD["plain"].write(v.dir / "a.vma")
    r = v.vma("config", "a.vma", "-c", "nope")
    assert r.code != 0 and r.out == b"" and "unable to find configuration data 'nope'" in r.errors
    (v.dir / "qemu-server.conf").write_bytes(b"this is not looked at")
    vmagen.simple({1: b"x" * 512}, configs=[]).write(v.dir / "b.vma")
    assert v.vma("config", "b.vma").code != 0


@pytest.mark.parametrize("size", [None, 0, 5 * 65536, 3 * 65536 - 512, 20 * 65536])
def test_the_state_of_a_machine(v, size):
    """A stream: zeros are written, where the original tool leaves them out. Its size is advice, cut at when larger."""
    import random  # pylint: disable=import-outside-toplevel
    state = bytes(70000) + vmagen.random_disk(random.Random(4), 5 * 65536 - 70000 - 5000) + bytes(5000)
    disk = vmagen.random_disk(random.Random(5), 65536 * 2)
    archive = vmagen.vmstate_archive(state, size, disk)
    data = archive.build()
    v.put("a.vma", data)
    if size == 0:  # a device without a size is none, and then its clusters are nobody's
        assert v.vma("verify", "a.vma").code != 0
        return
    assert v.ok("vma", "list", "a.vma").text.splitlines()[:-1] == listing(archive)
    v.ok("vma", "verify", "a.vma")
    for source, where in (("a.vma", "out"), ("-", "piped")):
        v.ok("vma", "extract", source, where, stdin=data if source == "-" else None)
        got = (v.dir / where / "vmstate.bin").read_bytes()
        assert len(got) >= min(len(state), size or len(state))
        assert got == state[:len(got)] or got == state + bytes(len(got) - len(state))
        if size in (None, 5 * 65536):
            assert got == state
        assert (v.dir / where / "disk-drive-scsi0.raw").read_bytes() == disk


# ---------------------------------------------------------------------------------------- bad ones


def snapshot(v):
    """Everything below the parent directory of the working directory, to see that nothing else came to be."""
    out = set()
    for top, dirs, files in os.walk(v.dir.parent):
        out |= {os.path.join(top, name) for name in dirs + files}
    return out


def names_offset(text, at):
    return any(re.search(rf"(?<![0-9a-fA-F]){form}(?![0-9a-fA-F])", text) for form in (str(at), f"0x{at:x}"))


def check_outcome(v, case, wanted, *args, **kw):
    r = v.run(*args, timeout=20, **kw)
    if wanted is True:
        assert r.code == 0, (args, r)
    if wanted is False:
        assert r.code != 0, (args, r)
    if r.code != 0:
        assert r.err.startswith(args[0].encode() + b": "), (args, r)
        name = "standard input" if "-" in args else "bad.vma"
        # A disk may be too large for the file system: then the file is what must be named.
        assert name in r.errors or "cannot change the size" in r.errors, (args, r)
    return r


def nothing_left(v, where, case, before):
    """No disk under its final name, and nothing at all outside of the directory."""
    out = v.dir / where
    new = {n for n in snapshot(v) - before if n != str(out) and not n.startswith(str(out) + "/")}
    assert not new, new
    assert not os.path.exists("/tmp/drover-evil.conf") and not os.path.exists("/tmp/drover-evil")
    if out.is_dir():
        left = [n for n in os.listdir(out) if n.startswith("disk-") or n.startswith("vmstate")]
        assert not left, left


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive(v, name):
    case = BAD[name]
    v.put("bad.vma", case.data)
    before = snapshot(v)
    r = check_outcome(v, case, case.listed, "vma", "list", "bad.vma")
    if r.code == 0:
        assert sum(line.startswith("CTIME: ") for line in r.text.splitlines()) == 1, r
        assert "drive-forged" not in [line.split()[-1] for line in r.text.splitlines() if line.startswith("DEV: ")], r
    r = check_outcome(v, case, case.verified, "vma", "verify", "bad.vma")
    if r.code != 0 and case.at is not None:
        assert names_offset(r.errors, case.at), (case.at, r)
    if case.says:
        assert any(word in r.errors for word in case.says), r
    if case.warns:
        assert r.err, "no warning"
    check_outcome(v, case, case.verified, "vma", "verify", "-", stdin=case.data)
    assert snapshot(v) == before
    r = check_outcome(v, case, case.extracted, "vma", "extract", "bad.vma", "out")
    if r.code != 0:
        nothing_left(v, "out", case, before)
    check_outcome(v, case, case.extracted, "vma", "extract", "-", "piped", stdin=case.data)
    if r.code != 0:
        before.update(n for n in snapshot(v) if "/out" in n)
        nothing_left(v, "piped", case, before)


def test_of_equal_config_names_the_last_wins(v):
    v.put("bad.vma", BAD["config-names-alike"].data)
    v.ok("vma", "extract", "bad.vma", "out")
    assert (v.dir / "out" / "same").read_bytes() == b"2"


def test_an_archive_that_lies_about_sizes_takes_no_memory(v):
    for i, size in enumerate((1 << 48, 1 << 40, (1 << 44) + 512)):
        disks = {n: (f"drive-scsi{n}", size) for n in range(1, 255)}
        header = vmagen.Header([(b"qemu-server.conf", vmagen.CONF)], disks)
        slots = [vmagen.Slot(n, (n * 2654435761) % (size // 65536)) for n in range(1, 255)]
        v.put(f"{i}.vma", vmagen.Archive(header, vmagen.pack(slots)).build())
        for command in (["list"], ["verify"]):
            r = v.vma(*command, f"{i}.vma", memory=256 * MIB, timeout=20)
            assert (r.code == 0) == (command == ["list"]), r
        r = v.vma("extract", f"{i}.vma", f"out{i}", memory=256 * MIB, timeout=20)
        assert r.code != 0 and not os.path.exists(v.dir / f"out{i}")


def test_clusters_far_apart_take_no_memory(v):
    """Each in a page of its own of the bitmap that finds duplicates."""
    import random  # pylint: disable=import-outside-toplevel
    header = vmagen.Header([(b"qemu-server.conf", vmagen.CONF)], {1: ("drive-scsi0", 1 << 48)})
    slots = [vmagen.Slot(1, n) for n in random.Random(1).sample(range(1 << 32), 100000)]
    v.put("a.vma", vmagen.Archive(header, vmagen.pack(slots)).build())
    for args in (["vma", "verify", "a.vma"], ["drover", "vma", "verify", "a.vma"], ["drover", "map", "vma:a.vma"]):
        r = v.run(*args, memory=400 * MIB, timeout=30)
        assert r.code != 0 and ("a.vma" in r.errors or "missing" in r.text) and "out of memory" not in r.errors, r


def test_something_that_is_no_file(v):
    (v.dir / "sub").mkdir()
    for command in (["list"], ["verify"], ["config"]):
        for name in ("nope.vma", "sub", "/dev/null", ""):
            assert v.fails("vma", *command, name)
    assert v.fails("vma", "extract", "nope.vma", "out")
    assert v.names() in (["sub"], ["out", "sub"])
    GOOD["plain"].write(v.dir / "a.vma")
    assert v.fails("vma", "extract", "a.vma", "sub")  # it must not be there yet
    assert v.fails("vma", "extract", "a.vma", "no/such/parent")
    assert os.listdir(v.dir / "sub") == []


@pytest.mark.parametrize("args", [[], ["nope"], ["list"], ["list", "a", "b"], ["config"], ["verify"], ["extract"],
                                  ["extract", "a.vma"], ["create"], ["list", "--nope", "a"], ["verify", "-x", "a"], ["-h"]],
                         ids=" ".join)
def test_wrong_arguments_get_the_usage(v, args):
    r = v.vma(*args)
    assert r.code == 1 and b"usage: vma command" in r.out + r.err, r


def test_only_some_disks(v):
    archive = GOOD["interleaved"]
    archive.write(v.dir / "a.vma")
    v.ok("vma", "extract", "a.vma", "-d", "drive-scsi1", "out")
    wanted = extracted(archive)
    same_files(v.dir / "out", {n: d for n, d in wanted.items() if n in ("qemu-server.conf", "disk-drive-scsi1.raw")})
    v.ok("vma", "extract", "-d", "drive-scsi0,drive-scsi2", "a.vma", "two")
    same_files(v.dir / "two", {n: d for n, d in wanted.items() if n != "disk-drive-scsi1.raw"})


def test_a_disk_left_out_is_still_checked(v):
    for name in ("repeated", "missing-middle"):
        v.put("bad.vma", BAD["extent-cluster-" + name].data)
        r = v.vma("extract", "bad.vma", "-d", "none-of-them", "out-" + name)
        assert r.code != 0, r


def test_progress_and_totals(v):
    archive = GOOD["two-disks"]
    archive.write(v.dir / "a.vma")
    text = v.ok("vma", "verify", "-v", "a.vma").text
    assert text.splitlines()[:4] == listing(archive)
    assert re.search(r"^progress \d+% \(read \d+ bytes, duration \d+ sec\)$", text, re.M), text
    assert re.search(r"^total bytes read 524288, sparse bytes \d+ \([\d.]+%\)$", text, re.M), text
    assert re.search(r"^space reduction due to 4K zero blocks [\d.]+%$", text, re.M), text
    small = vmagen.simple({1: b"x" * 512})  # the original divides by zero here
    small.write(v.dir / "small.vma")
    assert "progress 100%" in v.ok("vma", "extract", "-v", "small.vma", "small").text
    GOOD["config-only"].write(v.dir / "c.vma")
    assert "vma archive contains no image data" in v.ok("vma", "verify", "-v", "c.vma").text


def test_percentages_never_pass_100(v):
    archive = vmagen.simple({i: b"x" * 512 for i in range(1, 20)})
    archive.write(v.dir / "a.vma")
    text = v.ok("vma", "verify", "-v", "a.vma").text
    assert max(map(int, re.findall(r"^progress (\d+)%", text, re.M))) == 100
