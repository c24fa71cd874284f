# SPDX-License-Identifier: LGPL-2.1-or-later
"""What newer versions than QEMU 7.2 know: names of options of qemu-img 10.1, and commands of qemu-io 8.1 for disks with zones."""
import shutil

import pytest

# Each line does what the one beside it does.
LINES = [
    ("create -f qcow2 -b base.qcow2 -B qcow2 --backing-unsafe new.qcow2 8M", "create -f qcow2 -b base.qcow2 -F qcow2 -u new.qcow2 8M"),
    ("convert --source-format qcow2 --target-format qcow2 --target-format-options cluster_size=4k --source-cache none "
     "--target-cache writeback --sparse-size 8k --parallel 2 --oob-writes --rate-limit 1G --progress top.qcow2 new.qcow2",
     "convert -f qcow2 -O qcow2 -o cluster_size=4k -T none -t writeback -S 8k -m 2 -W -r 1G -p top.qcow2 new.qcow2"),
    ("convert -O qcow2 -b base.qcow2 -F qcow2 --copy-range-offloading top.qcow2 new.qcow2",
     "convert -O qcow2 -B base.qcow2 -F qcow2 -C top.qcow2 new.qcow2"),
    ("compare --a-format qcow2 --b-format qcow2 --strict --cache none --progress top.qcow2 base.qcow2",
     "compare -f qcow2 -F qcow2 -s -T none -p top.qcow2 base.qcow2"),
    ("commit --cache none --drop --rate-limit 1G --progress top.qcow2", "commit -t none -d -r 1G -p top.qcow2"),
    ("rebase --backing other.qcow2 -B qcow2 --cache none --backing-cache none --compress --progress top.qcow2",
     "rebase -b other.qcow2 -F qcow2 -t none -T none -c -p top.qcow2"),
    ("rebase --backing absent -B qcow2 --backing-unsafe top.qcow2", "rebase -b absent -F qcow2 -u top.qcow2"),
    ("amend --cache none --options compat=0.10 --progress other.qcow2", "amend -t none -o compat=0.10 -p other.qcow2"),
    ("check --cache none top.qcow2", "check -T none top.qcow2"),
    ("snapshot --apply one base.qcow2", "snapshot -a one base.qcow2"),
    ("snapshot --delete one base.qcow2", "snapshot -d one base.qcow2"),
    ("snapshot --list base.qcow2", "snapshot -l base.qcow2"),
    ("dd --output-format qcow2 bs=1M count=1 if=top.qcow2 of=new.qcow2", "dd -O qcow2 bs=1M count=1 if=top.qcow2 of=new.qcow2"),
]


@pytest.fixture(name="made", scope="module")
def fixture_made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


def copies(t, made):
    """The images, made once, in two directories."""
    if not (made / "top.qcow2").exists():
        for args in (("create", "-f", "qcow2", "base.qcow2", "8M"), ("create", "-f", "qcow2", "other.qcow2", "8M"),
                     ("io", "-c", "write -P 1 0 1M", "base.qcow2"), ("snapshot", "-c", "one", "base.qcow2"),
                     ("io", "-c", "write -P 2 1M 1M", "base.qcow2"),
                     ("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"),
                     ("io", "-c", "write -P 3 3M 100k", "top.qcow2")):
            t.ok(*args, cwd=made)
    for name in ("new", "old"):
        shutil.copytree(made, t.dir / name)


@pytest.mark.parametrize("new, old", LINES, ids=[new.split(" -")[0].replace(" ", "-") + str(i) for i, (new, _) in enumerate(LINES)])
def test_the_newer_name_means_the_same(t, made, new, old):
    copies(t, made)
    said = []
    for which, line in (("new", new), ("old", old)):
        r = t.ours("qemu-img", *line.split(), cwd=t.dir / which)
        image = "new.qcow2" if (t.dir / which / "new.qcow2").exists() else "top.qcow2"
        said.append((r.code, r.out.split("\r")[-1], r.err, t.ours("qemu-img", "info", "-U", "--backing-chain", image, cwd=t.dir / which).out))
    assert said[0] == said[1] and said[0][0] in (0, 1) and "nrecognized" not in said[0][2], said


def test_the_newer_names_are_those_of_qemu_img_only(t):
    r = t.drover("create", "-B", "qcow2", "new.qcow2", "1M")
    assert r.code != 0 and "unrecognized option '-B'" in r.err, r
    r = t.drover("convert", "--progress", "json", "new.raw")  # there it takes an argument
    assert "Must specify image file name" in r.err, r


@pytest.mark.parametrize("command, word", [("zone_report 0 1", "report"), ("zo 0 1M", "open"), ("zap 0 4k", "append")])
def test_disks_have_no_zones(t, command, word):
    t.ok("create", "-f", "raw", "disk.raw", "8M")
    r = t.ours("qemu-io", "-f", "raw", "-c", command, "disk.raw")
    assert (r.code, r.out, r.err) == (1, f"zone {word} failed: Operation not supported\n", ""), r
    assert "zone" not in t.ours("qemu-io", "-c", "help").out


def test_limits_are_refused_by_name(t):
    r = t.ours("qemu-img", "info", "--limits", "x")
    assert (r.code, r.err) == (1, "qemu-img: --limits (see /sys/block/*/queue) is not supported\n"), r
