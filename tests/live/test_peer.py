# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control socket beside qemu-storage-daemon: the same requests to both get the same replies and events."""
import shutil

import pytest

from peer import both, both_wait, node, same, same_events, two_servers  # pylint: disable=unused-import
from serving import MiB

pytestmark = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is missing")

X = node("x", "target", backing=None)
REFUSED = [
    ("blockdev-add", {}),
    ("blockdev-add", {"driver": "nonsense", "node-name": "x"}),
    ("blockdev-add", {"driver": 3}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "x"}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": 3}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": "none"}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": {"driver": "file"}}),
    ("blockdev-add", {"driver": "file", "node-name": "x"}),
    ("blockdev-add", {"driver": "file", "filename": "@target"}),
    ("blockdev-add", node("0x", "target")),
    ("blockdev-add", node("d", "target")),
    ("blockdev-add", node("x", "target", nonsense=1)),
    ("blockdev-add", node("x", "target", **{"read-only": "yes"})),
    ("blockdev-add", node("x", "target", backing="none")),
    ("blockdev-del", {}),
    ("blockdev-del", {"node-name": "none"}),
    ("blockdev-del", {"node-name": "d"}),
    ("blockdev-mirror", {"device": "d", "target": "none"}),
    ("blockdev-mirror", {"job-id": "j", "device": "d", "target": "none", "sync": "full"}),
    ("blockdev-mirror", {"job-id": "j", "device": "d", "target": "d", "sync": "full"}),
    ("blockdev-mirror", {"job-id": "j", "device": "d", "target": "d", "sync": "nonsense"}),
    ("blockdev-snapshot", {}),
    ("blockdev-snapshot", {"node": "none", "overlay": "none"}),
    ("blockdev-snapshot", {"node": "d", "overlay": "none"}),
    ("transaction", {}),
    ("transaction", {"actions": [3]}),
    ("transaction", {"actions": [{}]}),
    ("transaction", {"actions": [{"type": "abort"}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {}}]}),
    ("transaction", {"actions": [{"type": "nonsense", "data": {}}]}),
    ("transaction", {"actions": [{"type": "blockdev-snapshot", "data": {}}]}),
    ("block_resize", {"node-name": "d"}),
    ("block_resize", {"size": 512}),
    ("block_resize", {"node-name": "d", "size": "x"}),
    ("block-stream", {"job-id": "j", "device": "none"}),
    ("block-stream", {"job-id": "j", "device": "d", "base": "none"}),
    ("block-stream", {"job-id": "j", "device": "d", "speed": "x"}),
    ("job-cancel", {"id": "none"}),
    ("job-dismiss", {}),
    ("block-job-cancel", {"device": "none"}),
    ("change-backing-file", {"device": "none", "image-node-name": "d", "backing-file": "x"}),
    ("change-backing-file", {"device": "d", "image-node-name": "none", "backing-file": "x"}),
    ("block-export-add", {}),
    ("block-export-add", {"type": "nonsense", "id": "e", "node-name": "d"}),
    ("block-export-add", {"type": "nbd", "id": "e"}),
    ("block-export-add", {"type": "nbd", "node-name": "d"}),
    ("block-export-add", {"type": "nbd", "id": "0e", "node-name": "d"}),
    ("block-export-add", {"type": "nbd", "id": "d", "node-name": "d"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "none"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d", "name": "two", "nonsense": 1}),
    ("block-export-del", {}),
    ("block-export-del", {"id": "none"}),
    ("block-export-del", {"id": "d", "mode": "nonsense"}),
    ("nbd-server-start", {}),
    ("nbd-server-start", {"addr": 3}),
    ("nbd-server-start", {"addr": {}}),
    ("nbd-server-start", {"addr": {"type": "nonsense"}}),
    ("nbd-server-start", {"addr": {"type": "unix"}}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {}}}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "x"}}}),
    ("nbd-server-stop", {"nonsense": 1}),
    ("nonsense", {}),
]


def test_what_is_refused_is_refused_in_the_same_words(pair):
    different = []
    for command, arguments in REFUSED:
        ours, theirs = both(pair, command, arguments)
        assert "error" in theirs, (command, arguments)
        if ours != theirs:
            different.append((command, arguments, ours, theirs))
    assert not different, "\n".join(map(str, different))


def test_a_mirror_to_a_node(pair):
    same(pair, "blockdev-add", X)
    same(pair, "blockdev-mirror", {"job-id": "j", "device": "d", "target": "x", "sync": "full"})
    both_wait(pair, "BLOCK_JOB_READY")
    same(pair, "blockdev-del", {"node-name": "x"})
    for query in "query-jobs", "query-block-jobs":
        ours, theirs = both(pair, query)
        ours, theirs = ours["return"][0], theirs["return"][0]
        for counted in "len", "offset", "current-progress", "total-progress", "busy":
            assert (counted in ours) == (counted in theirs)
            ours.pop(counted, None)
            theirs.pop(counted, None)
        assert ours == theirs
    same(pair, "job-complete", {"id": "j"})
    both_wait(pair, "JOB_STATUS_CHANGE", "null")
    same(pair, "query-block-exports")
    same(pair, "query-jobs")
    same(pair, "blockdev-del", {"node-name": "d"})
    same(pair, "blockdev-del", {"node-name": "x"})
    same_events(pair)


def test_a_mirror_that_is_cancelled(pair):
    same(pair, "blockdev-add", X)
    for force in False, True:
        same(pair, "blockdev-mirror", {"job-id": "j", "device": "d", "target": "x", "sync": "full"})
        both_wait(pair, "BLOCK_JOB_READY")
        same(pair, "block-job-cancel", {"device": "j", "force": force})
        both_wait(pair, "JOB_STATUS_CHANGE", "null")
    same(pair, "query-block-exports")
    same_events(pair)


def test_jobs_that_wait_for_finalize_and_dismiss(pair):
    manual = {"job-id": "j", "device": "d", "auto-finalize": False, "auto-dismiss": False}
    same(pair, "block-stream", manual)
    both_wait(pair, "BLOCK_JOB_PENDING")
    same(pair, "job-dismiss", {"id": "j"})
    same(pair, "block-stream", manual)
    same(pair, "job-finalize", {"id": "j"})
    both_wait(pair, "JOB_STATUS_CHANGE", "concluded")
    same(pair, "job-complete", {"id": "j"})
    same(pair, "job-dismiss", {"id": "j"})
    same_events(pair)


def test_a_snapshot_with_an_overlay_that_is_there(pair):
    same(pair, "blockdev-add", node("x", "overlay"))
    same(pair, "blockdev-add", node("c", "child", **{"read-only": True}))
    same(pair, "blockdev-add", node("r", "plain", driver="raw"))
    same(pair, "blockdev-snapshot", {"node": "d", "overlay": "c"})
    same(pair, "blockdev-snapshot", {"node": "d", "overlay": "r"})
    same(pair, "blockdev-snapshot", {"node": "d", "overlay": "x"})
    same(pair, "query-block-exports")
    same(pair, "blockdev-del", {"node-name": "x"})
    same(pair, "blockdev-del", {"node-name": "d"})
    same_events(pair)


def test_exports_come_and_go(pair, work):
    same(pair, "blockdev-add", node("r", "plain", driver="raw", **{"read-only": True}))
    same(pair, "block-export-add", {"type": "nbd", "id": "e", "node-name": "r", "writable": True})
    same(pair, "block-export-add", {"type": "nbd", "id": "e", "node-name": "r"})
    same(pair, "blockdev-del", {"node-name": "r"})
    ours, theirs = both(pair, "query-block-exports")
    assert sorted(map(str, ours["return"])) != [] and len(ours["return"]) == len(theirs["return"]) == 2
    same(pair, "block-export-del", {"id": "e"})
    same(pair, "block-export-del", {"id": "e"})
    same(pair, "blockdev-del", {"node-name": "r"})
    same(pair, "nbd-server-stop")
    same(pair, "nbd-server-stop")
    same(pair, "query-block-exports")
    same(pair, "block-export-add", {"type": "nbd", "id": "e", "node-name": "d"})
    ours, theirs, server = pair
    assert "return" in ours.ask("nbd-server-start", {"addr": {"type": "unix", "data": {"path": server.socket}}})
    assert "return" in theirs.ask("nbd-server-start", {"addr": {"type": "unix", "data": {"path": f"{work.parent}/m"}}})
    same(pair, "block-export-add", {"type": "nbd", "id": "e", "node-name": "d"})
    same(pair, "query-block-exports")
    same_events(pair)


def test_a_node_is_described_alike(pair):
    same(pair, "blockdev-add", X)
    nodes = [{n["node-name"]: n for n in reply["return"]} for reply in both(pair, "query-named-block-nodes")]
    for name in "x", "d":
        ours, theirs = nodes[0][name], nodes[1][name]
        assert set(theirs) - set(ours) == set()
        for key in set(theirs) - {"image", "file", "backing_file"}:
            assert ours[key] == theirs[key], key
        missing = set(theirs["image"]) - set(ours["image"])
        assert missing <= {"actual-size", "cluster-size", "format-specific", "backing-image"}
        assert ours["image"]["virtual-size"] == theirs["image"]["virtual-size"] == 8 * MiB
