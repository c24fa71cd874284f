# SPDX-License-Identifier: LGPL-2.1-or-later
"""Long random sequences through both shells on the same chains: the same lines, the same bytes, and each tool reads what
the other wrote."""
import os
import random

import pytest
from conftest import same, without_times

LONG = bool(os.environ.get("DROVER_TEST_LONG"))
SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
SIZES = [1 << 20, (1 << 20) + 512 * 77, 3 << 20]


def request(rng, size):
    """One command that both shells understand alike; now and then past the end."""
    off = rng.randrange(size)
    if rng.random() < 0.5:
        off -= off % rng.choice([512, 4096, 65536])
    length = min(rng.choice([1, 511, 512, 4096, 65536, 200000, rng.randrange(1, 300000)]), size - off)
    if rng.random() < 0.02:
        length = size - off + 1
    kind = rng.choice(["write", "write", "write", "zero", "zero", "read", "readv", "writev", "aio", "flush"])
    byte = rng.randrange(256)
    if kind == "write":
        return f"write -P {byte} {off} {length}"
    if kind == "zero":
        return f"write -z {rng.choice(['', '-u '])}{off} {length}"
    if kind == "read":
        return f"read -v {off} {min(length, 600)}"
    if kind == "readv":
        return f"readv -P {byte} {off} {length // 2} {length - length // 2}"
    if kind == "writev":
        return f"writev -P {byte} {off} {length // 3} {length - length // 3}"
    if kind == "aio":
        return f"aio_write -P {byte} {off} {length}\naio_flush"
    return kind


def plain(text):
    """Neither times nor prompts: where the real one's stand depends on when a request is done."""
    return without_times(text).replace("qemu-io> ", "")


def make_chain(run, cwd, fmt, subformat, sizes):
    names = []
    for i, size in enumerate(sizes):
        name = f"disk{i}.{fmt}"
        args = ["create", "-q", "-f", fmt]
        if fmt == "vmdk":
            args += ["-o", f"subformat={subformat}"] if i == 0 else ["-b", names[-1], "-F", "vmdk"]
        r = run("qemu-img", *args, name, str(size), cwd=cwd)
        assert r.code == 0, r
        names.append(name)
    return names


@pytest.mark.parametrize("seed", range(60 if LONG else 8))
def test_both_shells_tell_and_leave_the_same(t, seed):
    rng = random.Random(f"{os.environ.get('DROVER_TEST_SEED', '')}-{seed}")
    fmt = rng.choice(["raw", "vmdk", "vmdk", "vmdk"])
    sizes = [rng.choice(SIZES) for _ in range(1 if fmt == "raw" else rng.randrange(1, 4))]
    chains = {}
    for who, run in (("ours", t.ours), ("real", t.real)):
        (t.dir / who).mkdir()
        chains[who] = make_chain(run, t.dir / who, fmt, SUBFORMATS[seed % 4], sizes)
    for i, name in enumerate(chains["ours"]):
        # A child may not be written before its parent is done: the parent's id changes.
        script = "".join(request(rng, sizes[i]) + "\n" for _ in range(120 if LONG else 60))
        args = ("-f", fmt, name)
        same(t.ours("qemu-io", *args, stdin=script, cwd=t.dir / "ours"),
             t.real("qemu-io", *args, stdin=script, cwd=t.dir / "real"), plain)
        if i + 1 < len(sizes):
            # The id changed: make the children anew on what is there now.
            for who, run in (("ours", t.ours), ("real", t.real)):
                r = run("qemu-img", "create", "-q", "-f", "vmdk", "-b", name, "-F", "vmdk", chains[who][i + 1],
                        str(sizes[i + 1]), cwd=t.dir / who)
                assert r.code == 0, r
    top = chains["ours"][-1]
    for tool in (t.ours, t.real):
        r = tool("qemu-img", "compare", "-f", fmt, "-F", fmt, f"ours/{top}", f"real/{top}")
        assert r.code == 0, r
        r = tool("qemu-img", "check", f"ours/{top}")
        assert r.code in (0, 63), r
    for who in ("ours", "real"):  # each reads the other's map alike
        args = ("map", "-f", fmt, f"{who}/{top}")
        same(t.ours("qemu-img", *args), t.real("qemu-img", *args))


@pytest.mark.parametrize("seed", range(40 if LONG else 6))
def test_chain_operations_leave_what_both_tools_read(t, seed):
    rng = random.Random(f"chain-{os.environ.get('DROVER_TEST_SEED', '')}-{seed}")
    t.ok("create", "-q", "-f", "vmdk", "-o", f"subformat={SUBFORMATS[seed % 4]}", "disk.vmdk", str(rng.choice(SIZES)))
    names = ["disk.vmdk"]
    for _ in range(rng.randrange(2, 5)):
        script = "".join(request(rng, 1 << 20) + "\n" for _ in range(25))
        t.drover("io", names[-1], stdin=script)
        names.append(t.ok("snapshot", "-c", names[-1]).strip())
    t.drover("io", names[-1], stdin="".join(request(rng, 1 << 20) + "\n" for _ in range(25)))
    top = names[-1]
    t.ok("convert", top, "flat.raw")
    for _ in range(4):
        if len(names) < 2:
            break
        operation = rng.choice(["rebase", "flatten", "stream", "commit", "stream-base"])
        if operation == "rebase":
            target = rng.choice(names[:-1])
            t.ok("rebase", *rng.choice([[], ["--drop-equal"]]), "-b", target, "-F", "vmdk", top)
            names = names[:names.index(target) + 1] + [top]
        elif operation == "flatten":
            t.ok("rebase", "-b", "", top)
            names = [top]
        elif operation == "stream":
            t.ok("stream", top)
            names = [top]
        elif operation == "stream-base":
            target = rng.choice(names[:-1])
            t.ok("stream", "--base", target, top)
            names = names[:names.index(target) + 1] + [top]
        else:
            t.ok("commit", "--force", top)
        told = t.drover("chain", "check", top)
        if told.code == 3:  # what a commit by force made invalid
            assert all("is another child of" in line for line in told.out.splitlines()), told
        else:
            assert told.code == 0 and told.out == f"{len(names)} image{'s' if len(names) > 1 else ''}, no problem.\n", told
        for tool in (t.ours, t.real):
            r = tool("qemu-img", "compare", "-F", "raw", top, "flat.raw")
            assert r.out == "Images are identical.\n", (operation, r)
            r = tool("qemu-img", "check", top)
            assert r.code == 0, (operation, r)
