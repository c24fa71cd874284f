# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups by command: a chain that qemu-img reads, too; the set; what is refused."""
import json
import os

import pytest


@pytest.fixture
def disk(t):
    t.ok("create", "-q", "-f", "qcow2", "disk.qcow2", "64M")
    t.io("disk.qcow2", "write -P 3 1M 2M")
    return "disk.qcow2"


def same_disks(t, a, b):
    t.ok("compare", a, b)
    assert t.real("qemu-img", "compare", a, b).code == 0


def test_a_series_of_backups(t, disk):
    assert t.ok("backup", "--bitmap", "daily", disk, "b0").startswith("Full backup of 64 MiB: 2 MiB read")
    t.io(disk, "write -P 4 1536k 64k")
    t.io(disk, "write -z 2M 64k")
    assert t.ok("backup", "--bitmap", "daily", disk, "b1").startswith("Incremental backup of 64 MiB: 64 KiB read")
    same_disks(t, disk, "b1")
    t.io(disk, "write -P 5 40M 512")
    t.ok("backup", "--since", "b1", disk, "b2")
    same_disks(t, disk, "b2")
    assert t.real("qemu-img", "check", disk).code == 0
    assert [b["name"] for b in json.loads((t.dir / "backups.json").read_text())["backups"]] == ["b0", "b1", "b2"]
    lines = t.ok("backup", "list", "backups.json").splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "b0", "b1", "b2"]
    assert [line.split()[-1] for line in lines[1:]] == ["full", "b0", "b1"]
    assert len(t.ok("backup", "verify", "backups.json").splitlines()) == 3


def listed(t):
    return json.loads(t.ok("backup", "list", "--output", "json", "backups.json"))


def test_a_list_tells_sizes_and_what_is_proven(t, disk):
    for i in range(3):
        t.io(disk, f"write -P {i + 5} {10 * i}M 1M")
        t.ok("backup", "--bitmap", "daily", disk, f"b{i}")
    told = listed(t)
    for i, one in enumerate(told["backups"]):
        info = json.loads(t.real("qemu-img", "info", "--output=json", f"b{i}").out)
        assert [one[k] for k in ("virtual-size", "actual-size")] == [info[k] for k in ("virtual-size", "actual-size")]
        assert (one["state"], one["verified"], one["parent"]) == ("unverified", None, f"b{i - 1}" if i else None)
    assert told["actual-size"] == sum(one["actual-size"] for one in told["backups"])
    t.ok("backup", "verify", "-q", "backups.json", "b1")
    os.unlink(t.dir / "b0")
    (t.dir / "b2").write_bytes(b"junk" * 1000)
    told = listed(t)["backups"]
    # what stands on a missing one cannot be restored, whatever was proven once
    assert [one["state"] for one in told] == ["missing", "missing", "unreadable"]
    assert told[1]["verified"] and told[1]["problem"] == 'it stands on "b0", which is missing' and "b0" in told[0]["problem"] and "actual-size" not in told[0]
    said = t.ok("backup", "list", "backups.json").splitlines()
    assert said[4].startswith("b0: ") and said[5].startswith("b1: ") and said[6].startswith("b2: ") and len(said) == 7


def test_damage_of_the_last_backup_does_not_come_into_the_digest_of_the_next(t, disk):
    """Without the file of checksums beside it they come from the bytes that it has by now."""
    t.io(disk, "write -P 5 0 1M")
    t.ok("backup", "--bitmap", "daily", disk, "b0")
    os.unlink(t.dir / "b0.sums")
    image = bytearray((t.dir / "b0").read_bytes())
    image[image.index(b"\5" * 65536)] = 1
    (t.dir / "b0").write_bytes(image)
    r = t.drover("backup", "--bitmap", "daily", disk, "b1")
    assert r.code == 1 and "its digest is" in r.err and "(--full)" in r.err and not (t.dir / "b1").exists(), r
    assert names(t) == ["b0"]
    t.ok("backup", "--bitmap", "daily", "--full", disk, "b1")
    t.ok("backup", "verify", "backups.json", "b1")


def test_a_backup_is_not_called_like_a_file_that_an_interrupted_prune_will_remove(t, disk):
    t.ok("backup", "--bitmap", "daily", disk, "b0")
    record = json.loads((t.dir / "backups.json").read_text())
    record["backups"][0]["leaving"] = ["b0", "b0-s001"]
    (t.dir / "backups.json").write_text(json.dumps(record))
    r = t.drover("backup", "--state", "backups.json", disk, "b0-s001")
    assert r.code == 1 and 'the backup "b0" has a file of this name and is being pruned' in r.err, r
    assert not (t.dir / "b0-s001").exists()
    t.ok("backup", "--state", "backups.json", disk, "b1")
    t.ok("backup", "prune", "--keep", "1", "backups.json")
    assert not (t.dir / "b0").exists() and (t.dir / "b1").exists()


def damage(t, name, mib, byte):
    with open(t.dir / name, "r+b") as f:
        f.seek(mib * 1024 * 1024)
        f.write(byte)


def test_what_verify_finds_is_recorded(t, disk):
    t.ok("backup", "--bitmap", "daily", "-O", "raw", disk, "b0")
    damage(t, "b0", 1, b"?")
    assert t.drover("backup", "verify", "backups.json").code == 1
    assert listed(t)["backups"][0]["state"] == "damaged" and "at 1048576" in listed(t)["backups"][0]["problem"]
    assert t.ok("backup", "list", "backups.json").splitlines()[2].startswith("b0: differs")
    r = t.drover("backup", "--bitmap", "daily", "-O", "add-cow", disk, "b1")
    assert r.code == 1 and "is damaged" in r.err and "--full" in r.err and not (t.dir / "b1").exists()
    t.ok("restore", disk, "b0")
    t.ok("backup", "verify", "backups.json")
    assert listed(t)["backups"][0]["state"] == "verified"
    assert t.ok("backup", "--bitmap", "daily", "-O", "add-cow", disk, "b1").startswith("Incremental")
    t.ok("backup", "verify", "backups.json", "b1")
    damage(t, "b0", 2, b"?")
    assert t.drover("backup", "verify", "backups.json", "b0").code == 1
    assert [one["state"] for one in listed(t)["backups"]] == ["damaged", "unverified"]
    assert t.drover("backup", "--bitmap", "daily", "-O", "add-cow", disk, "b2").code == 1
    damage(t, "b0", 2, b"\3")
    t.ok("backup", "verify", "backups.json", "b1")  # it shows what it did, so others may stand on it
    t.ok("backup", "--bitmap", "daily", "-O", "add-cow", disk, "b2")


def test_a_set_of_many_tiny_values_is_refused(t):
    (t.dir / "tiny").write_text('{"drover-backups": 1, "backups": [' + "{}," * 1000000 + "{}]}")
    r = t.drover("backup", "list", "tiny")
    assert r.code == 1 and "more values" in r.err


def test_many_of_one_name_end_soon(t, disk):
    t.ok("backup", "--bitmap", "daily", "-O", "raw", disk, "b0")
    damage(t, "b0", 1, b"?")
    said = json.loads((t.dir / "backups.json").read_text())
    said["backups"] += [{**said["backups"][0], "file": f"f{i}", "parent": "b0"} for i in range(60)]
    (t.dir / "backups.json").write_text(json.dumps(said))
    assert t.drover("backup", "verify", "backups.json", "b0").code == 1
    assert "damaged" in json.loads((t.dir / "backups.json").read_text())["backups"][0]


def test_what_qemu_writes_is_noted(t, disk):
    t.ok("backup", "--bitmap", "b", disk, "b0")
    assert t.real("qemu-io", "-c", "write -P 9 5M 4k", disk).code == 0
    assert t.ok("backup", "--bitmap", "b", disk, "b1").startswith("Incremental")
    same_disks(t, disk, "b1")


@pytest.mark.parametrize("fmt", ["raw", "vmdk"])
def test_a_bitmap_beside_the_disk_tells_what_has_changed(t, fmt):
    t.ok("create", "-q", "-f", fmt, "disk", "64M")
    t.io("disk", "write -P 3 1M 2M", fmt=fmt)
    assert t.ok("backup", "-f", fmt, "--bitmap", "daily", "disk", "b0").startswith("Full backup of 64 MiB")
    t.io("disk", "write -P 4 1536k 64k", fmt=fmt)
    assert t.ok("backup", "-f", fmt, "--bitmap", "daily", "disk", "b1").startswith("Incremental backup of 64 MiB: 64 KiB")
    same_disks(t, "disk", "b1")
    assert t.real("qemu-io", "-f", fmt, "-c", "write -P 9 5M 4k", "disk").code == 0
    r = t.drover("backup", "-f", fmt, "--bitmap", "daily", "disk", "b2")
    assert r.code == 1 and "another program" in r.err and "drover bitmap --rebuild" in r.err
    noted = json.loads((t.dir / "backups.json").read_text())["backups"][-1]["noted"]
    t.ok("bitmap", "-f", fmt, "--rebuild", "--against", "b1", "disk", noted)
    assert t.ok("backup", "-f", fmt, "--bitmap", "daily", "disk", "b2").startswith("Incremental")
    same_disks(t, "disk", "b2")


def names(t):
    return [b["name"] for b in json.loads((t.dir / "backups.json").read_text())["backups"]]


def test_prune_keeps_the_newest(t, disk):
    for i in range(4):
        t.io(disk, f"write -P {i + 5} {i}M 128k")
        t.ok("backup", "--bitmap", "daily", disk, f"b{i}")
        t.ok("convert", "-O", "raw", disk, f"was{i}")
    for i in (1, 2, 3):
        t.ok("chain", "fingerprint", f"b{i}")
    said = t.ok("backup", "prune", "--keep", "2", "--dry-run", "backups.json")
    assert said.startswith("b0, b1: would be merged into b2, 256 KiB copied, about ") and names(t) == ["b0", "b1", "b2", "b3"]
    said = t.ok("backup", "prune", "--keep", "2", "backups.json")
    assert said.startswith("b0, b1: merged into b2, 256 KiB copied, about ") and names(t) == ["b2", "b3"]
    assert sorted(p.name for p in t.dir.iterdir() if p.name[0] == "b") == ["b2", "b2.sums", "b3", "b3.drover-parent", "b3.sums",
                                                                              "backups.json"]
    t.ok("backup", "verify", "backups.json")
    for i in (2, 3):
        same_disks(t, f"b{i}", f"was{i}")
        t.ok("restore", f"b{i}", disk)
        same_disks(t, disk, f"was{i}")
        assert t.real("qemu-img", "check", f"b{i}").code == 0
    said = t.ok("backup", "--bitmap", "daily", "--prune", "2", disk, "b4")
    assert said.startswith("Incremental") and "\nb2: merged into b3" in said
    t.ok("backup", "--bitmap", "daily", "--full", "--prune", "1", "-q", disk, "b5")
    assert names(t) == ["b5"] and not (t.dir / "b4.sums").exists()
    t.ok("backup", "verify", "backups.json")


def test_a_prune_that_finds_damage_removes_nothing(t, disk):
    for i in range(3):
        t.io(disk, f"write -P {i + 5} {i}M 128k")
        t.ok("backup", "--bitmap", "daily", disk, f"b{i}")
    before = {name: (t.dir / name).read_bytes() for name in ("b0", "b1", "b2")}
    image = bytearray(before["b0"])
    image[image.index(b"\5" * 65536)] = 1  # which b1 needs of b0
    (t.dir / "b0").write_bytes(image)
    r = t.drover("backup", "prune", "--keep", "2", "backups.json")
    assert r.code == t.drover("backup", "verify", "backups.json", "b1").code == 1 and "nothing removed: " in r.err, r.err
    assert (t.dir / "b1").read_bytes() == before["b1"] and (t.dir / "b0").read_bytes() == image
    assert names(t) == ["b0", "b1", "b2"] and [one["state"] for one in listed(t)["backups"]] == ["unverified", "damaged", "unverified"]
    (t.dir / "b0").write_bytes(before["b0"])
    assert t.ok("backup", "prune", "--keep", "2", "backups.json") == ""  # a damaged one does not count
    t.ok("backup", "verify", "backups.json", "b1")
    assert t.ok("backup", "prune", "--keep", "2", "backups.json").endswith(" given back, verified\n")
    assert [one["state"] for one in listed(t)["backups"]] == ["verified", "unverified"]
    assert t.ok("backup", "prune", "--no-verify", "--keep", "1", "backups.json").endswith(" given back\n")
    t.ok("backup", "verify", "backups.json")


def test_a_prune_that_is_refused_changes_nothing(t, disk):
    for i in range(3):
        t.io(disk, f"write -P {i + 5} {i}M 128k")
        t.ok("backup", "--bitmap", "daily", disk, f"b{i}")
    t.ok("create", "-f", "qcow2", "-b", "b0", "-F", "qcow2", "mine.qcow2")
    r = t.drover("backup", "prune", "--keep", "1", "backups.json")
    assert r.code == 1 and "mine.qcow2" in r.err and names(t) == ["b0", "b1", "b2"]
    t.ok("backup", "verify", "backups.json")


def test_verify_tells_of_damage(t, disk):
    t.ok("backup", disk, "b0", "-O", "raw")
    t.ok("backup", "verify", "backups.json", "b0")
    damage(t, "b0", 1, b"?")
    r = t.drover("backup", "verify", "backups.json")
    assert r.code == 1 and "first in the 65536 bytes at 1048576" in r.err
    t.ok("restore", disk, "b0")
    t.ok("backup", "verify", "backups.json", "b0")


def test_against_a_disk(t, disk):
    t.ok("backup", disk, "b0")
    assert t.ok("backup", "verify", "--against", disk, "backups.json", "b0") == "The disk holds what was backed up.\n"
    t.io(disk, "write -P 9 3M 1")
    assert "at 3145728" in t.drover("backup", "verify", "--against", disk, "backups.json", "b0").err


@pytest.mark.parametrize("args, text", [
    (("backup", "disk.qcow2"), "Expecting the disk"),
    (("backup", "disk.qcow2", "b0", "-O", "nope"), "Unknown file format"),
    (("backup", "disk.qcow2", "disk.qcow2"), "belongs to the disk itself"),
    (("backup", "disk.qcow2", "taken"), "exists already"),
    (("backup", "--since", "b", "disk.qcow2", "b0"), 'no backup called "b"'),
    (("backup", "--bitmap", "a", "--since", "b", "disk.qcow2", "b0"), "exclude"),
    (("backup", "list", "nope"), "no such list"),
    (("backup", "prune", "--keep", "1", "nope"), "no such list"),
    (("backup", "prune", "nope"), "--keep"),
    (("backup", "prune", "--keep", "0", "nope"), "not '0'"),
    (("backup", "--prune", "3x", "disk.qcow2", "b0"), "not '3x'"),
    (("backup", "list", "taken"), "is no list of backups"),
    (("restore", "disk.qcow2"), "Expecting a backup"),
    (("restore", "disk.qcow2", "disk.qcow2"), "belongs to what is restored"),
    (("restore", "disk.qcow2", "nope"), "nope"),
])
def test_mistakes(t, disk, args, text):
    (t.dir / "taken").write_bytes(b"x" * 512)
    r = t.drover(*args)
    assert r.code != 0 and text in r.err, r.err
    assert not (t.dir / "b0").exists()


def test_restore_makes_a_disk_what_it_was(t, disk):
    t.ok("backup", disk, "b0")
    t.io(disk, "write -P 7 0 128k")
    assert t.ok("restore", "b0", disk) == "128 KiB differed, and were written.\n"
    same_disks(t, disk, "b0")
    t.ok("resize", disk, "+64M")
    r = t.drover("restore", "b0", disk)
    assert r.code == 1 and "--shrink" in r.err
    t.ok("restore", "--shrink", "b0", disk)
    same_disks(t, disk, "b0")


def backed_up_together(t, *disks):
    """Names have the second in which they were made: within it there is one backup."""
    while True:
        r = t.drover("backup", "--consistent", "--bitmap", "daily", *disks, "to")
        if r.code == 0:
            return r.out
        assert "already" in r.err, r


def test_several_disks_are_backed_up_together(t, disk):
    t.ok("create", "-q", "-f", "vmdk", "other.vmdk", "8M")
    t.io("other.vmdk", "write -P 7 1M 1M", fmt="vmdk")
    (t.dir / "to").mkdir()
    for kind in "full", "incremental":
        out = backed_up_together(t, disk, "other.vmdk").splitlines()
        names = [line.split(": ")[0] for line in out]
        assert len(out) == 2 and all(line.split(": ")[1].startswith(kind) for line in out)
        assert [n.split("/")[1].split("-")[0] for n in names] == ["disk", "other"]
        same_disks(t, disk, names[0])
        t.ok("compare", "other.vmdk", names[1])
        t.io(disk, "write -P 8 5M 64k")
    backups = json.loads((t.dir / "to" / "backups.json").read_text())["backups"]
    assert len(backups) == 4 and len({b["name"] for b in backups}) == 4
    t.ok("backup", "verify", "to/backups.json")


def test_several_disks_or_none(t, disk):
    (t.dir / "to").mkdir()
    for args, text in ((["disk.qcow2", "nothing", "to"], "nothing"),
                       (["disk.qcow2", "nowhere"], "is no directory"),
                       (["disk.qcow2", "disk.qcow2", "to"], "two disks are called so"),
                       (["--since", "x", "disk.qcow2", "to"], "neither --since"),
                       (["to"], "Expecting disks and the directory")):
        r = t.drover("backup", "--consistent", *args)
        assert r.code == 1 and text in r.err, r
    assert not list((t.dir / "to").iterdir())


@pytest.mark.parametrize("fmt", ["qcow2", "raw", "vmdk"])
def test_a_disk_that_ends_within_a_sector_gets_its_size_back(t, fmt):
    data = bytes(range(1, 200)) * 1000
    (t.dir / "disk.raw").write_bytes(data)
    t.ok("backup", "-q", "-O", fmt, "disk.raw", "b")
    (t.dir / "disk.raw").write_bytes(b"x" * (len(data) + 1))
    t.ok("restore", "-q", "--shrink", "-f", "raw", "b", "disk.raw")
    assert (t.dir / "disk.raw").read_bytes() == data
    t.ok("restore", "-q", "-f", "raw", "b", "disk.raw")
    assert (t.dir / "disk.raw").read_bytes() == data
    os.remove(t.dir / "b.sums")  # then only the image tells, which may count in sectors
    t.ok("restore", "-q", "-f", "raw", "b", "disk.raw")
    assert (t.dir / "disk.raw").read_bytes().rstrip(bytes(1)) == data
