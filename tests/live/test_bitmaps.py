# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps beside a served disk: what a client writes is in them at the end, whatever became of the chain meanwhile; or
nobody trusts them."""
import json
import os
import shutil
import subprocess

import pytest

from serving import KiB, MiB, drover

nbd = pytest.importorskip("nbd")
pytestmark = pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="no qemu-nbd")

PIECE = 64 * KiB
FORMATS = {"raw": "add-cow", "vmdk": "vmdk", "add-cow": "add-cow"}


@pytest.fixture(name="disk", params=FORMATS)
def served_disk(request, serve):
    """The format, the server, and a client of a disk with a bitmap."""
    fmt = request.param
    drover("create", "-q", "-f", fmt, "disk", str(8 * MiB))
    drover("bitmap", "--add", "-f", fmt, "disk", "b")
    server = serve("disk", "control=control", "export=d", f"format={fmt}")
    return fmt, server, server.connect("d")


def write(client, *offsets):
    for at in offsets:
        client.pwrite(b"\xa5" * PIECE, at)
    client.flush()


def untrusted(fmt):
    info = json.loads(drover("info", "--force-share", "--output=json", "-f", fmt, "disk"))
    return [b.get("untrusted") for b in info["bitmaps"]]


def dirty(fmt):
    """Offsets of granules, by way of an image that qemu can read."""
    drover("convert", "-f", fmt, "-O", "qcow2", "--bitmaps", "disk", "copy")
    # It is ready when this returns, and ends with its client.
    subprocess.run(["qemu-nbd", "-r", "--fork", "-B", "b", "-f", "qcow2", "-k", os.path.abspath("n"), "copy"], check=True)
    found, h = [], nbd.NBD()
    h.add_meta_context("qemu:dirty-bitmap:b")
    h.connect_unix("n")

    def note(_context, at, entries, _error):
        for length, flags in zip(entries[::2], entries[1::2]):
            found.extend(range(at, at + length, PIECE) if flags else [])
            at += length

    h.block_status(h.get_size(), 0, note)
    h.shutdown()
    return found


def test_a_snapshot_leaves_the_bitmap_complete_beside_the_frozen_image(disk):
    fmt, server, client = disk
    write(client, MiB)
    assert untrusted(fmt) != [None], "of a disk that is written to nobody has all changes"
    drover("ctl", "control", "snapshot", "-f", FORMATS[fmt], "d", "new")
    write(client, 3 * MiB)
    assert untrusted(fmt) == [None]
    server.kill()
    assert untrusted(fmt) == [None]
    assert dirty(fmt) == [MiB]


def test_a_snapshot_that_is_committed_again_is_in_the_bitmap(disk):
    fmt, server, client = disk
    write(client, MiB)
    drover("ctl", "control", "snapshot", "-f", FORMATS[fmt], "d", "new")
    write(client, 3 * MiB)
    drover("ctl", "control", "commit", "d")
    write(client, 5 * MiB)
    client.shutdown()
    server.stop()
    assert untrusted(fmt) == [None]
    assert dirty(fmt) == [MiB, 3 * MiB, 5 * MiB]


def test_a_server_that_is_killed_leaves_nothing_that_is_trusted(disk):
    fmt, server, client = disk
    write(client, MiB)
    drover("ctl", "control", "snapshot", "-f", FORMATS[fmt], "d", "new")
    drover("ctl", "control", "commit", "d")
    write(client, 5 * MiB)
    server.kill()
    assert None not in untrusted(fmt)
