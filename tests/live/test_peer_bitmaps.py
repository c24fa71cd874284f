# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps of served disks beside qemu-storage-daemon: the same requests, the same replies, the same counts."""
import shutil

import pytest

from peer import both, node, same, same_bitmaps, two_servers, write_both  # pylint: disable=unused-import
from serving import KiB, MiB, drover

pytestmark = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is missing")


def bitmap(verb, name="b", **more):
    return f"block-dirty-bitmap-{verb}", {"node": "d", "name": name, **more}


def merge(target, *sources, name="d"):
    return "block-dirty-bitmap-merge", {"node": name, "target": target, "bitmaps": list(sources)}


REFUSED = [
    ("block-dirty-bitmap-add", {}),
    ("block-dirty-bitmap-add", {"node": "d"}),
    ("block-dirty-bitmap-add", {"node": "none", "name": "x"}),
    bitmap("add", ""),
    bitmap("add", "b"),
    bitmap("add", "stored"),
    bitmap("add", "stored", persistent=True),
    bitmap("add", "b", persistent=True),
    bitmap("add", "x", granularity=0),
    bitmap("add", "x", granularity=256),
    bitmap("add", "x", granularity=1000),
    bitmap("add", "x", granularity="big"),
    bitmap("add", "x", persistent="yes"),
    bitmap("add", "x" * 1024),
    bitmap("add", "x", nonsense=1),
    ("block-dirty-bitmap-remove", {"node": "none", "name": "b"}),
    ("block-dirty-bitmap-clear", {"name": "b"}),
    bitmap("remove", "none"),
    bitmap("clear", "none"),
    bitmap("enable", "none"),
    bitmap("disable", "none"),
    ("block-dirty-bitmap-merge", {"node": "d", "target": "b"}),
    ("block-dirty-bitmap-merge", {"node": "none", "target": "b", "bitmaps": []}),
    merge("none"),
    merge("b", "none"),
    merge("b", {"node": "none", "name": "b"}),
    merge("b", {"node": "d", "name": "none"}),
    merge("b", {"node": "small", "name": "other"}),
]


def test_what_is_refused_is_refused_in_the_same_words(pair, work):
    for name in "ours", "theirs":
        drover("create", "-q", "-f", "qcow2", work / name / "small", "1M")
    same(pair, "blockdev-add", node("small", "small"))
    same(pair, "block-dirty-bitmap-add", {"node": "small", "name": "other"})
    same(pair, *bitmap("add", "b"))
    same(pair, *bitmap("add", "stored", persistent=True))
    different = []
    for command, arguments in REFUSED:
        ours, theirs = both(pair, command, arguments)
        assert "error" in theirs, (command, arguments)
        if ours != theirs:
            different.append((command, arguments, ours, theirs))
    assert not different, "\n".join(map(str, different))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("granularity", [None, 512, 64 * KiB, 2 * MiB])
def test_what_a_guest_writes_is_counted_alike(pair, work, persistent, granularity):
    more = {} if granularity is None else {"granularity": granularity}
    same(pair, *bitmap("add", persistent=persistent, **more))
    same(pair, *bitmap("add", "off", disabled=True, persistent=persistent, **more))
    assert [b["count"] for b in same_bitmaps(pair)] == [0, 0]
    write_both(pair, work, 512, 3 * MiB, length=4 * KiB)
    b, off = same_bitmaps(pair)
    assert b["count"] > 0 == off["count"]
    same(pair, *bitmap("disable"))
    same(pair, *bitmap("enable", "off"))
    write_both(pair, work, 5 * MiB)
    same_bitmaps(pair)
    same(pair, *bitmap("clear"))
    assert same_bitmaps(pair)[0]["count"] == 0
    same(pair, *merge("b", "off"))
    same_bitmaps(pair)
    same(pair, *bitmap("remove", "off"))
    same_bitmaps(pair)
    same(pair, *bitmap("remove"))
    assert same_bitmaps(pair) == []


def test_bitmaps_are_merged_whatever_keeps_them(pair, work):
    same(pair, *bitmap("add", "small", granularity=4 * KiB))
    write_both(pair, work, MiB)
    same(pair, *bitmap("disable", "small"))
    same(pair, *bitmap("add", "stored", persistent=True))
    write_both(pair, work, 2 * MiB)
    same(pair, *bitmap("add", "all", granularity=MiB, disabled=True))
    same(pair, *merge("all", "small", {"node": "d", "name": "stored"}))
    assert same_bitmaps(pair)[0]["count"] == 2 * MiB
    same(pair, *merge("stored", "small", "all"))
    same_bitmaps(pair)
    same(pair, *merge("all", "small", "none"))
    same_bitmaps(pair)


def test_a_bitmap_stays_with_its_image_when_there_is_an_overlay(pair, work):
    same(pair, *bitmap("add"))
    same(pair, *bitmap("add", "stored", persistent=True))
    write_both(pair, work, MiB)
    same(pair, "blockdev-add", node("x", "overlay"))
    same(pair, "blockdev-snapshot", {"node": "d", "overlay": "x"})
    same(pair, "block-dirty-bitmap-add", {"node": "x", "name": "b", "persistent": True})
    write_both(pair, work, 3 * MiB)
    assert same_bitmaps(pair, "x")[0]["count"] == 64 * KiB
    assert [b["count"] for b in same_bitmaps(pair)] == [64 * KiB, 64 * KiB]
    same(pair, *merge("b", {"node": "d", "name": "stored"}, name="x"))
    assert same_bitmaps(pair, "x")[0]["count"] == 128 * KiB
