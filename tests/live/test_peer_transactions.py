# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transactions of bitmaps and backups beside qemu-storage-daemon: the same replies, events, counts and bytes."""
import json
import shutil

import pytest

from peer import (both, both_wait, node, same, same_bitmaps, same_events, told,  # pylint: disable=unused-import
                  two_servers, without_pauses, write_both)
from serving import KiB, MiB, drover

pytestmark = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is missing")

ABORT = "abort", {}
X = node("x", "target", backing=None)


def bitmap(verb, name="b", on="d", **more):
    return f"block-dirty-bitmap-{verb}", {"node": on, "name": name, **more}


def merge(target, *sources):
    return "block-dirty-bitmap-merge", {"node": "d", "target": target, "bitmaps": list(sources)}


def backup(sync="full", device="d", target="x", job="j", **more):
    more = {k.replace("_", "-"): v for k, v in more.items()}
    return "blockdev-backup", {"job-id": job, "device": device, "target": target, "sync": sync, **more}


def transaction(*actions, **properties):
    properties = {k.replace("_", "-"): v for k, v in properties.items()}
    arguments = {"actions": [{"type": kind, "data": data} for kind, data in actions]}
    return "transaction", {**arguments, "properties": properties} if properties else arguments


# qemu-storage-daemon 7.2 ends when an action that enables, disables, clears or merges is refused at its beginning, so
# no transaction here has that, but for a clear that is refused after others.
REFUSED = [
    transaction(ABORT, completion_mode="nonsense"),
    transaction(ABORT, completion_mode="grouped"),
    transaction(ABORT, nonsense=1),
    transaction(bitmap("add", "x"), completion_mode="grouped"),
    transaction(bitmap("remove"), completion_mode="grouped"),
    transaction(("blockdev-snapshot", {"node": "d", "overlay": "x"}), completion_mode="grouped"),
    transaction(bitmap("add", "x"), ("block-dirty-bitmap-add", {"node": "d"})),
    transaction(bitmap("add", "x"), bitmap("add", "x")),
    transaction(bitmap("add", "x"), bitmap("add", "b")),
    transaction(bitmap("add", "x"), bitmap("add", "y", on="none")),
    transaction(bitmap("add", "x"), bitmap("add", "")),
    transaction(bitmap("remove"), bitmap("add")),
    transaction(bitmap("remove"), bitmap("remove")),
    transaction(bitmap("remove"), bitmap("remove", "none")),
    transaction(bitmap("clear"), ABORT),
    transaction(bitmap("enable", "off"), ABORT),
    transaction(bitmap("disable"), bitmap("enable", "off"), ABORT),
    transaction(merge("b", "off"), ABORT),
    transaction(bitmap("add", "x"), merge("x", "b"), merge("off", "x"), bitmap("remove"), ABORT),
    transaction(backup(), ABORT),
    transaction(backup("incremental", bitmap="none")),
    transaction(backup("incremental", bitmap="b"), bitmap("remove")),
    transaction(bitmap("remove"), backup("incremental", bitmap="b")),
    transaction(bitmap("add", "x"), merge("x", "b"), backup("incremental", bitmap="x"), ABORT),
    transaction(backup(), backup(device="e", target="y", job="k"), ABORT),
    transaction(backup(), backup(device="e", target="y")),
    transaction(backup(target="d")),
]


@pytest.fixture(name="busy_pair", params=[False, True], ids=["in memory", "persistent"])
def with_bitmaps(pair, work, request):
    """Another disk e, targets x and y, and on d a bitmap b with two ranges and one, off, that notes nothing."""
    persistent = request.param
    for name in "ours", "theirs":
        for image in "e", "y":
            drover("create", "-q", "-f", "qcow2", work / name / image, str(8 * MiB))
    for name, image in ("e", "e"), ("y", "y"), ("x", "target"):
        same(pair, "blockdev-add", node(name, image))
    same(pair, *transaction(bitmap("add", persistent=persistent),
                            bitmap("add", "off", disabled=True, persistent=persistent)))
    write_both(pair, work, MiB, 5 * MiB)
    return pair


def test_what_is_refused_has_changed_nothing(busy_pair):
    before = same_bitmaps(busy_pair)
    assert [b["count"] for b in before] == [128 * KiB, 0]
    different = []
    for command, arguments in REFUSED:
        ours, theirs = both(busy_pair, command, arguments)
        assert "error" in theirs, arguments
        if ours != theirs:
            different.append((arguments, ours, theirs))
    assert not different, "\n".join(map(str, different))
    same_events(busy_pair)
    assert same_bitmaps(busy_pair) == before
    for c in busy_pair[:2]:
        assert c.ask("query-jobs") == {"return": []}


def test_actions_see_those_before_them(busy_pair, work):
    same(busy_pair, *transaction(bitmap("add", "all"), merge("all", "b"), bitmap("disable", "all"), bitmap("clear"),
                                 bitmap("remove", "off"), bitmap("add", "new", granularity=4 * KiB)))
    assert [b["count"] for b in same_bitmaps(busy_pair)] == [128 * KiB, 0, 0]
    write_both(busy_pair, work, 3 * MiB)
    assert [b["count"] for b in same_bitmaps(busy_pair)] == [128 * KiB, 64 * KiB, 64 * KiB]


def per_job(pair):
    """The events of each job in their order: whose come first, two jobs that run at once decide."""
    out = []
    for c in pair[:2]:
        events = without_pauses([told(e) for e in c.events])
        out.append({job: [e for e in events if job in (e[1].get("id"), e[1].get("device"))] for job in "jk"})
    return out


def test_a_bitmap_of_this_instant_says_what_is_copied(busy_pair, work):
    """What libvirt's incremental backups are made of."""
    same(busy_pair, *transaction(bitmap("add", "tmp", disabled=True), merge("tmp", "b"), bitmap("add", "next"),
                                 backup("incremental", bitmap="tmp")))
    both_wait(busy_pair, "JOB_STATUS_CHANGE", "null")
    same_events(busy_pair)
    write_both(busy_pair, work, 2 * MiB)
    same_bitmaps(busy_pair)
    both(busy_pair, "blockdev-del", {"node-name": "x"})
    for name in "ours", "theirs":
        shown, = json.loads(drover("map", "--output=json", "-f", "qcow2", work / name / "target"))[1:2]
        assert (shown["start"], shown["data"]) == (MiB, True)
    drover("compare", "-f", "qcow2", "-F", "qcow2", work / "ours" / "target", work / "theirs" / "target")


def wait_until(pair, *wanted):
    """Until both have told all these states of jobs."""
    for c in pair[:2]:
        while not set(wanted) <= {(e["data"].get("id"), e["data"].get("status")) for e in c.events}:
            c.hear()


def test_jobs_of_a_group_complete_together(busy_pair):
    group = (backup("incremental", bitmap="b", auto_finalize=False), backup(device="e", target="y", job="k"))
    same(busy_pair, *transaction(*group, completion_mode="grouped"))
    wait_until(busy_pair, ("j", "pending"), ("k", "pending"))
    same(busy_pair, "job-finalize", {"id": "k"})
    wait_until(busy_pair, ("j", "null"), ("k", "null"))
    ours, theirs = per_job(busy_pair)
    assert ours == theirs
    assert [e["data"]["id"] for c in busy_pair[:2] for e in c.events if e["data"].get("status") == "null"] == \
        ["k", "j", "k", "j"]
    assert [b["count"] for b in same_bitmaps(busy_pair)] == [0, 0]


@pytest.mark.parametrize("mode", ["individual", "grouped"])
def test_one_cancelled_job_of_a_group_ends_the_other_and_keeps_its_bitmap(busy_pair, mode):
    pair = (backup("incremental", bitmap="b", auto_finalize=False), backup(device="e", target="y", job="k", speed=1))
    same(busy_pair, *transaction(*pair, completion_mode=mode))
    same(busy_pair, "job-cancel", {"id": "k"})
    if mode == "individual":
        wait_until(busy_pair, ("j", "pending"), ("k", "null"))
        same(busy_pair, "job-finalize", {"id": "j"})
    wait_until(busy_pair, ("j", "null"), ("k", "null"))
    assert same_bitmaps(busy_pair)[0]["count"] == (0 if mode == "individual" else 128 * KiB)
