# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chain of a thousand layers in a shell that allows 256 open files."""
import json
import re

LAYERS = 1000
LIMIT = 256


def few(t, *args):
    r = t.start("/bin/sh", "-c", f'ulimit -n {LIMIT} && exec "$0" "$@"', t.bin / "drover", *args)
    assert r.code == 0 and "failed" not in r.out, r
    return r.out


def layer(i):
    return f"l{i:04}.vmdk"


def chain(t):
    """All layers but the lowest are copies of one empty child, each with the name of its own parent."""
    t.ok("create", "-q", "-f", "vmdk", layer(0), "1M")
    t.io(layer(0), "write -P 1 0 1M")
    t.ok("create", "-q", "-f", "vmdk", "-b", layer(0), "-F", "vmdk", layer(1))
    child = (t.dir / layer(1)).read_bytes()
    parent_id = re.search(rb"\nparentCID=(\w{8})\n", child).group(1)
    child = re.sub(rb"\nCID=\w{8}\n", b"\nCID=" + parent_id + b"\n", child)
    for i in range(1, LAYERS):
        (t.dir / layer(i)).write_bytes(child.replace(layer(0).encode(), layer(i - 1).encode()))


def test_a_thousand_layers_work_with_256_open_files(t):
    chain(t)
    top = layer(LAYERS - 1)
    assert len(json.loads(few(t, "info", "--backing-chain", "--output=json", top))) == LAYERS
    few(t, "io", "-c", "read -P 1 0 1M", "-c", "write -P 2 64k 64k", "-c", "flush", "-c", "read -P 2 64k 64k", top)
    few(t, "check", "-q", top)
    few(t, "map", top)
    few(t, "snapshot", "-q", "-c", "new.vmdk", top)
    few(t, "io", "-c", "write -P 3 128k 64k", "new.vmdk")
    few(t, "convert", "new.vmdk", "flat.raw")
    few(t, "commit", "-q", "new.vmdk")
    few(t, "rebase", "-u", "-b", layer(LAYERS - 2), "-F", "vmdk", top)
    few(t, "io", "-c", "read -P 1 0 64k", "-c", "read -P 2 64k 64k", "-c", "read -P 3 128k 64k",
        "-c", "read -P 1 192k 832k", top)
    few(t, "compare", "-q", "-F", "raw", top, "flat.raw")
