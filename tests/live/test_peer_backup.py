# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups into images that are there beside qemu-storage-daemon: the same requests, replies, events and bytes."""
import shutil

import pytest

from peer import (bitmaps, both, both_wait, node, same, same_bitmaps, same_events,  # pylint: disable=unused-import
                  two_servers, write_both)
from serving import KiB, MiB, drover

pytestmark = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is missing")

X = node("x", "target", backing=None)


def backup(sync="full", target="x", **more):
    more = {k.replace("_", "-"): v for k, v in more.items()}
    return "blockdev-backup", {"job-id": "j", "device": "d", "target": target, "sync": sync, **more}


def add(name="b", **more):
    return "block-dirty-bitmap-add", {"node": "d", "name": name, **more}


REFUSED = [
    ("blockdev-backup", {}),
    ("blockdev-backup", {"device": "d", "target": "x"}),
    ("blockdev-backup", {"device": "d", "sync": "full"}),
    backup("nonsense"),
    backup(bitmap_mode="nonsense"),
    backup(target="none"),
    backup(target="d"),
    backup(target="s"),
    backup(device="none"),
    backup("incremental"),
    backup("bitmap"),
    backup("bitmap", bitmap="b"),
    backup("bitmap", bitmap="none", bitmap_mode="never"),
    backup("bitmap", bitmap_mode="never"),
    backup("incremental", bitmap="none"),
    backup("incremental", bitmap="b", bitmap_mode="never"),
    backup("incremental", bitmap="b", bitmap_mode="always"),
    backup("none", bitmap="b", bitmap_mode="always"),
    backup("full", bitmap="b"),
    backup("full", bitmap="b", bitmap_mode="never"),
    backup("top", bitmap="b", bitmap_mode="never"),
    backup("full", bitmap_mode="always"),
    backup(on_target_error="nonsense"),
    backup(speed="x"),
    backup(nonsense=1),
]


def test_what_is_refused_is_refused_in_the_same_words(pair, work):
    for name in "ours", "theirs":
        drover("create", "-q", "-f", "qcow2", work / name / "small", "1M")
    same(pair, "blockdev-add", node("s", "small"))
    same(pair, "blockdev-add", X)
    same(pair, *add())
    different = []
    for command, arguments in REFUSED:
        ours, theirs = both(pair, command, arguments)
        assert "error" in theirs, (command, arguments)
        if ours != theirs:
            different.append((command, arguments, ours, theirs))
    assert not different, "\n".join(map(str, different))


def same_targets(pair, work):
    """Close both, and compare."""
    both(pair, "blockdev-del", {"node-name": "x"})
    drover("compare", "-f", "qcow2", "-F", "qcow2", work / "ours" / "target", work / "theirs" / "target")


@pytest.mark.parametrize("sync", ["full", "top"])
def test_a_backup_of_all_or_of_the_active_image(pair, work, sync):
    same(pair, "blockdev-add", X)
    write_both(pair, work, 5 * MiB)
    same(pair, *backup(sync))
    both_wait(pair, "JOB_STATUS_CHANGE", "null")
    same_events(pair)
    same_targets(pair, work)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_series_of_incremental_backups(pair, work, persistent):
    same(pair, "blockdev-add", X)
    same(pair, *add(persistent=persistent))
    write_both(pair, work, 4 * MiB)
    same(pair, *backup("full", bitmap="b", bitmap_mode="on-success"))
    both_wait(pair, "JOB_STATUS_CHANGE", "null")
    assert same_bitmaps(pair)[0]["count"] == 0
    for at in MiB, 2 * MiB + 512, 7 * MiB:
        write_both(pair, work, at, length=4 * KiB)
        assert same_bitmaps(pair)[0]["count"] == 64 * KiB
        same(pair, *backup("incremental", bitmap="b"))
        both_wait(pair, "JOB_STATUS_CHANGE", "null")
        assert same_bitmaps(pair)[0]["count"] == 0
    same_events(pair)
    same_targets(pair, work)
    drover("compare", "-U", "-f", "qcow2", "-F", "qcow2", work / "ours" / "d", work / "ours" / "target")


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("mode", ["never", "on-success", "always"])
@pytest.mark.parametrize("ends", ["job-finalize", "job-cancel"])
def test_what_becomes_of_the_bitmap(pair, work, mode, ends, persistent):
    same(pair, "blockdev-add", X)
    same(pair, *add(persistent=persistent))
    write_both(pair, work, MiB)
    same(pair, *backup("bitmap", bitmap="b", bitmap_mode=mode, auto_finalize=False))
    both_wait(pair, "BLOCK_JOB_PENDING")
    write_both(pair, work, 6 * MiB)
    assert [[b["busy"] for b in one] for one in bitmaps(pair)] == [[True], [True]]
    for verb in "clear", "remove", "enable", "disable":
        same(pair, f"block-dirty-bitmap-{verb}", {"node": "d", "name": "b"})
    same(pair, *add("other", persistent=persistent))
    same(pair, "block-dirty-bitmap-merge", {"node": "d", "target": "other", "bitmaps": ["b"]})
    same(pair, *backup("bitmap", bitmap="b", bitmap_mode=mode))
    same(pair, ends, {"id": "j"})
    both_wait(pair, "JOB_STATUS_CHANGE", "null")
    b, other = same_bitmaps(pair)
    assert other["count"] == 0 and b["count"] in (64 * KiB, 128 * KiB)
    same_targets(pair, work)


def test_only_what_is_about_to_change(pair, work):
    same(pair, "blockdev-add", X)
    same(pair, *backup("none"))
    write_both(pair, work, MiB, 3 * MiB)
    same(pair, "job-cancel", {"id": "j"})
    both_wait(pair, "JOB_STATUS_CHANGE", "null")
    same_events(pair)
    same_targets(pair, work)
    drover("io", "-f", "qcow2", "-c", "read -P 7 1M 64k", "-c", "read -P 9 3M 64k", "-c", "read -P 0 2M 64k",
           work / "ours" / "target")
