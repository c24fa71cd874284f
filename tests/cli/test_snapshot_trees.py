# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots that are images: the tree with what machines say of it, going back, taking one out."""
import json
import os
import shutil
import time

import pytest

FORMATS = {"vmdk": "vmdk", "qcow2": "qcow2", "add-cow": "add-cow", "vmdk-split": "vmdk"}


def names(fmt):
    suffix = FORMATS[fmt]
    return {n: f"{n}.{suffix}" for n in ("base", "mid", "low", "top", "other")} | {
        "base": "base.raw" if fmt == "add-cow" else f"base.{suffix}"}


def family(t, fmt="vmdk"):
    """base <- low <- mid <- (top, other); what each shows is in NAME.flat."""
    n, f = names(fmt), FORMATS[fmt]
    options = ["-o", "subformat=twoGbMaxExtentSparse"] if fmt == "vmdk-split" else []
    base = "raw" if fmt == "add-cow" else f
    t.ok("create", "-q", "-f", base, *(options if base == f else []), n["base"], "8M")
    t.io(n["base"], "write -P 1 0 4M", fmt=base)
    for child, parent, writes in (("low", "base", ["write -P 2 1M 1M"]), ("mid", "low", ["write -P 3 2M 2M", "write -z 7M 64k"]),
                                  ("top", "mid", ["write -P 4 3M 128k"]), ("other", "mid", ["write -P 5 2M 2M"])):
        t.ok("create", "-q", "-f", f, *options, "-b", n[parent], "-F", base if parent == "base" else f, n[child])
        t.io(n[child], *writes, fmt=f)
    for name in n:
        t.ok("convert", "-f", base if name == "base" else f, "-O", "raw", n[name], f"{name}.flat")
    return n


def same(t, n, fmt, *which):
    for name in which:
        f = "raw" if n[name].endswith(".raw") else FORMATS[fmt]
        assert t.ok("compare", "-f", f, "-F", "raw", n[name], f"{name}.flat") == "Images are identical.\n", name


def parent(t, name):
    return json.loads(t.ok("info", "--output=json", name)).get("backing-filename")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("way", ["--up", "--down"])
def test_a_snapshot_is_taken_out_and_every_disk_reads_the_same(t, fmt, way):
    n = family(t, fmt)
    said = t.ok("snapshot", way, "-d", n["mid"], n["top"])
    assert f"merged {way[2:]} into" in said and not (t.dir / n["mid"]).exists()
    same(t, n, fmt, "top", "other", "base", *(["low"] if way == "--up" else []))
    assert parent(t, n["top"]) == parent(t, n["other"]) == n["low"]
    if way == "--down":
        f = FORMATS[fmt]
        assert t.ok("compare", "-f", f, "-F", "raw", n["low"], "mid.flat") == "Images are identical.\n"
    assert t.drover("chain", "check", ".").code == 0
    left = sorted(p.name for p in t.dir.iterdir() if p.name.startswith("mid") and not p.name.endswith(".flat"))
    assert left == []


def test_the_cheaper_way_is_taken(t):
    n = family(t)
    # mid holds 2 MiB; top shows all of it but 128k, other shows nothing of it.
    said = t.ok("snapshot", "--dry-run", "-d", "mid.vmdk", "top.vmdk")
    assert "would be merged up into 2 images: 1966080 bytes" in said and (t.dir / "mid.vmdk").exists()
    t.io("other.vmdk", "discard 2M 2M")
    t.ok("snapshot", "-q", "-c", "third.vmdk", "mid.vmdk")
    said = t.ok("snapshot", "--dry-run", "-d", "mid.vmdk", "top.vmdk")
    assert "would be merged down into low.vmdk" in said and "2097152 bytes" in said
    assert "merged down" in t.ok("snapshot", "-d", "mid.vmdk", "top.vmdk")
    same(t, n, "vmdk", "top", "base")


def test_a_base_can_only_go_up_and_one_that_has_siblings(t):
    n = family(t)
    r = t.drover("snapshot", "--down", "-d", "base.vmdk", "top.vmdk")
    assert r.code == 1 and "it has no parent" in r.err
    assert "merged up into 1 image" in t.ok("snapshot", "-d", "base.vmdk", "top.vmdk")
    assert parent(t, "low.vmdk") is None
    same(t, n, "vmdk", "low", "mid", "top", "other")
    t.ok("snapshot", "-q", "-c", "fork.vmdk", "low.vmdk")
    r = t.drover("snapshot", "--down", "-d", "mid.vmdk", "top.vmdk")
    assert r.code == 1 and "other children" in r.err
    assert "merged up" in t.ok("snapshot", "-d", "mid.vmdk", "top.vmdk")
    same(t, n, "vmdk", "low", "top", "other")


def test_an_image_on_which_nothing_stands_is_removed_but_not_the_disk_itself(t):
    n = family(t)
    r = t.drover("snapshot", "-d", "top.vmdk", "top.vmdk")
    assert r.code == 1 and "the disk itself" in r.err
    assert "removed; nothing stands on it" in t.ok("snapshot", "-d", "other.vmdk", "top.vmdk")
    assert not (t.dir / "other.vmdk").exists()
    same(t, n, "vmdk", "top", "mid")
    assert t.drover("snapshot", "-d", "nope.vmdk", "top.vmdk").code == 1


def test_sizes_that_differ_along_the_chain_change_no_disk(t):
    t.ok("create", "-q", "-f", "qcow2", "base.qcow2", "8M")
    t.io("base.qcow2", "write -P 1 0 8M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "4M")
    for child, size in (("a", "8M"), ("b", "6M"), ("c", "2M")):
        t.ok("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", f"{child}.qcow2", size)
        t.ok("convert", "-O", "raw", f"{child}.qcow2", f"{child}.flat")
    shutil.copytree(t.dir, t.dir / "copy")
    for way, directory in (("--up", t.dir), ("--down", t.dir / "copy")):
        t.ok("snapshot", way, "-d", "mid.qcow2", "a.qcow2", cwd=directory)
        for child in "abc":
            out = t.ok("compare", "-F", "raw", f"{child}.qcow2", f"{child}.flat", cwd=directory)
            assert out == "Images are identical.\n", (way, child)


@pytest.mark.parametrize("stranger", ["mid", "low"])
def test_children_beside_an_ancestor_in_another_directory_count_before_anything_is_changed(t, stranger):
    for d in ("lib", "vm"):
        (t.dir / d).mkdir()
    allow = ["--allow-path", t.dir / "lib"]
    t.ok("create", "-q", "-f", "qcow2", "lib/low.qcow2", "8M")
    t.ok("create", "-q", "-f", "qcow2", "-b", "low.qcow2", "-F", "qcow2", "lib/mid.qcow2")
    t.ok("create", "-q", *allow, "-f", "qcow2", "-b", "../lib/mid.qcow2", "-F", "qcow2", "vm/top.qcow2")
    t.ok("create", "-q", "-f", "qcow2", "-b", f"{stranger}.qcow2", "-F", "qcow2", "lib/other.qcow2")
    r = t.drover("snapshot", *allow, "-d", "../lib/mid.qcow2", "vm/top.qcow2")
    if stranger == "mid":
        assert r.code == 1 and "other.qcow2 stands on it, too" in r.err, r
        assert r.out == "" and parent(t, "vm/top.qcow2") == "../lib/mid.qcow2"
    else:
        assert r.code == 0 and "merged up into 1 image" in r.out and not (t.dir / "lib/mid.qcow2").exists(), r
    assert t.drover("chain", "check", "lib").code == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_going_back_makes_the_disk_an_empty_image_on_the_snapshot(t, fmt):
    n = family(t, fmt)
    before = sorted(p.name for p in t.dir.iterdir())
    t.ok("snapshot", "-a", n["low"], n["top"])
    f = FORMATS[fmt]
    assert t.ok("compare", "-f", f, "-F", "raw", n["top"], "low.flat") == "Images are identical.\n"
    same(t, n, fmt, "base", "low", "mid", "other")
    assert sorted(p.name for p in t.dir.iterdir()) == before and parent(t, n["top"]) == n["low"]
    assert t.drover("chain", "check", ".").code == 0


def test_a_disk_on_which_others_stand_does_not_go_back(t):
    n = family(t)
    r = t.drover("snapshot", "-a", "base.vmdk", "low.vmdk")
    assert r.code == 1 and "other images stand on it" in r.err
    r = t.drover("snapshot", "-a", "top.vmdk", "mid.vmdk")
    assert r.code == 1 and "made on that disk" in r.err
    same(t, n, "vmdk", "low", "mid", "top", "other")


VMSD = '''.encoding = "UTF-8"
snapshot.lastUID = "7"
snapshot.current = "7"
snapshot0.uid = "3"
snapshot0.filename = "web-Snapshot3.vmsn"
snapshot0.displayName = "before |22it|22"
snapshot0.description = "a note"
snapshot0.createTimeHigh = "416404"
snapshot0.createTimeLow = "-1"
snapshot0.numDisks = "1"
snapshot0.disk0.fileName = "base.vmdk"
snapshot0.disk0.node = "scsi0:0"
snapshot1.uid = "5"
snapshot1.parent = "3"
snapshot1.displayName = "sec|6Fnd"
snapshot1.numDisks = "2"
snapshot1.disk0.fileName = "low.vmdk"
snapshot1.disk0.node = "scsi0:0"
snapshot1.disk1.fileName = "data.vmdk"
snapshot1.disk1.node = "scsi0:1"
snapshot2.uid = "7"
snapshot2.parent = "5"
snapshot2.displayName = "third"
snapshot2.numDisks = "1"
snapshot2.disk0.fileName = "mid.vmdk"
snapshot2.disk0.node = "scsi0:0"
snapshot.numSnapshots = "3"
custom.key = "stays"
'''


def machine(t):
    n = family(t)
    (t.dir / "web.vmsd").write_text(VMSD)
    (t.dir / "web.vmx").write_text('.encoding = "UTF-8"\nscsi0:0.fileName = "top.vmdk"\nide1:0.fileName = "cd.iso"\n')
    return n


def vmsd(t):
    return dict(line.split(" = ", 1) for line in (t.dir / "web.vmsd").read_text().splitlines())


def test_the_tree_says_which_disk_a_machine_uses_and_what_its_snapshots_are(t):
    machine(t)
    for args in (["top.vmdk"], ["."]):
        out = t.ok("snapshot", "-l", *args)
        assert "web.vmx: uses top.vmdk (scsi0:0)\n" in out.replace("./", "")
        assert 'snapshot "before "it"" is base.vmdk (scsi0:0), 2026-' in out.replace("./", "")
        assert 'snapshot "third" is mid.vmdk (scsi0:0), current\n' in out.replace("./", "")
        assert "cd.iso" not in out and "data.vmdk" not in out
    nodes = {n["filename"]: n for n in json.loads(t.ok("snapshot", "-l", "--output=json", "top.vmdk"))}
    assert nodes["top.vmdk"]["used-by"] == [{"descriptor": "web.vmx", "device": "scsi0:0"}]
    third = nodes["mid.vmdk"]["snapshots"][0]
    assert (third["name"], third["uid"], third["parent-uid"], third["current"]) == ("third", 7, 5, True)


def test_a_damaged_vmsd_is_told_and_never_written(t):
    n = machine(t)
    (t.dir / "web.vmsd").write_text(VMSD + "what is this\n")
    assert "web.vmsd: line 29 is not of the form" in t.ok("snapshot", "-l", "top.vmdk")
    r = t.drover("snapshot", "--update-vmsd", "-d", "mid.vmdk", "top.vmdk")
    assert r.code == 1 and "line 29" in r.err and (t.dir / "mid.vmdk").exists()
    for change in "-d", "-a":
        r = t.drover("snapshot", change, "before", "top.vmdk")
        assert r.code == 1 and 'is called "before"' in r.err and "line 29" in r.err, r
    same(t, n, "vmdk", "top")


def test_deleting_by_the_snapshots_name_keeps_its_parents_state_and_the_vmsd_true(t):
    n = machine(t)
    # Down would be as cheap, but the snapshot "second" is what low.vmdk holds.
    t.io("top.vmdk", "discard 3M 128k")
    assert "merged up" in t.ok("snapshot", "--update-vmsd", "-d", "third", "top.vmdk")
    same(t, n, "vmdk", "base", "low", "other")
    now = vmsd(t)
    assert now["snapshot.numSnapshots"] == '"2"' and now["snapshot.current"] == '"5"' and now["custom.key"] == '"stays"'
    assert not [k for k in now if k.startswith("snapshot2.")] and now["snapshot0.displayName"] == '"before |22it|22"'
    assert t.drover("snapshot", "--down", "-d", "low.vmdk", "top.vmdk").code == 1


def test_a_snapshot_of_two_disks_loses_one_and_those_behind_are_renumbered(t):
    machine(t)
    t.ok("snapshot", "--update-vmsd", "-d", "low.vmdk", "top.vmdk")
    now = vmsd(t)
    assert now["snapshot1.disk0.fileName"] == '"data.vmdk"' and now["snapshot1.numDisks"] == '"1"'
    assert "snapshot1.disk1.fileName" not in now and now["snapshot.numSnapshots"] == '"3"'
    t.ok("snapshot", "--update-vmsd", "-d", 'before "it"', "top.vmdk")
    now = vmsd(t)
    assert now["snapshot.numSnapshots"] == '"2"' and now["snapshot0.displayName"] == '"third"'
    assert now["snapshot1.parent"] == '"0"'


def test_going_back_sets_the_current_snapshot(t):
    machine(t)
    t.ok("snapshot", "--update-vmsd", "-a", "second", "top.vmdk")
    assert vmsd(t)["snapshot.current"] == '"5"' and parent(t, "top.vmdk") == "low.vmdk"
    before = (t.dir / "web.vmsd").read_bytes()
    t.ok("snapshot", "-a", "mid.vmdk", "top.vmdk")
    assert (t.dir / "web.vmsd").read_bytes() == before


def test_making_one_adds_it_to_the_list_of_the_machine_that_uses_the_disk(t):
    n = machine(t)
    assert t.ok("snapshot", "--update-vmsd", "-c", "now.vmdk", "top.vmdk") == "now.vmdk\n"
    now = vmsd(t)
    assert {k[10:]: v for k, v in now.items() if k.startswith("snapshot3.")} == {
        "uid": '"8"', "parent": '"7"', "displayName": '"Snapshot 8"', "numDisks": '"1"', "disk0.fileName": '"top.vmdk"',
        "disk0.node": '"scsi0:0"', "createTimeHigh": now["snapshot3.createTimeHigh"], "createTimeLow": now["snapshot3.createTimeLow"]}
    assert [now[f"snapshot.{k}"] for k in ("numSnapshots", "current", "lastUID")] == ['"4"', '"8"', '"8"']
    assert now["custom.key"] == '"stays"' and (t.dir / "web.vmsd").read_text().startswith(VMSD[:19])
    out = t.ok("snapshot", "-l", "now.vmdk")
    assert f'snapshot "Snapshot 8" is top.vmdk (scsi0:0), {time.strftime("%Y-%m-")}' in out
    # A second child of what is frozen: the machine goes on from that snapshot, and has no other one.
    t.ok("snapshot", "-q", "--update-vmsd", "-c", "fork.vmdk", "mid.vmdk")
    assert vmsd(t) == {**now, "snapshot.current": '"7"'}
    t.ok("snapshot", "-q", "--update-vmsd", "-d", "Snapshot 8", "now.vmdk")
    assert vmsd(t)["snapshot.numSnapshots"] == '"3"'
    same(t, n, "vmdk", "mid", "other")


def test_the_first_snapshot_of_a_machine_and_refusals_that_change_nothing(t):
    machine(t)
    os.remove(t.dir / "web.vmsd")
    r = t.drover("snapshot", "--update-vmsd", "-c", "now.vmdk", "top.vmdk")
    assert r.code == 1 and "web.vmx, has no list of snapshots, web.vmsd" in r.err
    (t.dir / "web.vmsd").write_text("what is this\n")
    r = t.drover("snapshot", "--update-vmsd", "-c", "now.vmdk", "top.vmdk")
    assert r.code == 1 and "web.vmsd: line 1 is not" in r.err and not (t.dir / "now.vmdk").exists()
    (t.dir / "web.vmsd").write_text('snapshot.lastUID = "9223372036854775807"\n')
    r = t.drover("snapshot", "--update-vmsd", "-c", "now.vmdk", "top.vmdk")
    assert r.code == 1 and "no number above the last one" in r.err and not (t.dir / "now.vmdk").exists()
    (t.dir / "web.vmsd").write_text("")
    t.ok("snapshot", "-q", "--update-vmsd", "-c", "now.vmdk", "top.vmdk")
    now = vmsd(t)
    assert now[".encoding"] == '"UTF-8"' and now["snapshot0.uid"] == now["snapshot.current"] == now["snapshot.numSnapshots"] == '"1"'
    assert "snapshot0.parent" not in now
    before = (t.dir / "web.vmsd").read_bytes()
    t.ok("snapshot", "-q", "--update-vmsd", "-c", "alone.vmdk", "other.vmdk")
    (t.dir / "two.vmx").write_text('scsi0:0.fileName = "top.vmdk"\n')
    r = t.drover("snapshot", "--update-vmsd", "-c", "more.vmdk", "top.vmdk")
    assert r.code == 1 and "is used by two machines, two.vmx and web.vmx" in r.err and not (t.dir / "more.vmdk").exists()
    assert (t.dir / "web.vmsd").read_bytes() == before


def test_names_inside_a_qcow2_come_first(t):
    n = family(t, "qcow2")
    t.ok("snapshot", "-i", "-c", "mid.qcow2", "top.qcow2")
    t.ok("snapshot", "-d", "mid.qcow2", "top.qcow2")
    assert (t.dir / n["mid"]).exists()
    t.ok("snapshot", "-d", "mid.qcow2", "top.qcow2")
    assert not (t.dir / n["mid"]).exists()
    same(t, n, "qcow2", "top", "other")




def test_a_name_that_nothing_has(t):
    family(t)
    assert 'no image of its family is called "nope.vmdk"' in t.drover("snapshot", "-d", "nope.vmdk", "top.vmdk").err
    assert "no snapshots inside" in t.drover("snapshot", "-d", "nope", "top.vmdk").err
    assert 'called "nope"' in t.drover("snapshot", "--external", "-a", "nope", "top.vmdk").err
