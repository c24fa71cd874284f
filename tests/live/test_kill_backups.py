# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server is killed at one change to its files after another while a disk is backed up and a client writes: the disk
has all that was durable, the set names whole backups only, and the next backup misses nothing."""
import json
import os
import random
import shutil

import pytest

import programs
from serving import DROVER, drover, io, run
from test_kill_jobs import PRELOAD, SIZE, Client

LONG = bool(os.environ.get("DROVER_TEST_LONG"))
BACKUP = ("--state", "set.json", "--bitmap", "daily")


def contents(name, fmt):
    drover("convert", "-f", fmt, "-O", "raw", name, "../read")
    with open("../read", "rb") as f:
        return f.read()


def make_disk(fmt):
    """A disk with one backup, and with changes since; what it holds, and what the backup does."""
    if fmt == "add-cow":
        drover("create", "-q", "-f", "raw", "base", SIZE)
        io("base", "write -P 0x22 256k 256k", fmt="raw")
        drover("create", "-q", "-f", fmt, "-b", "base", "-F", "raw", "disk")
    else:
        drover("create", "-q", "-f", fmt, "disk", SIZE)
    io("disk", "write -P 0x11 0 1536k", fmt=fmt)
    drover("backup", "-q", *BACKUP, "-f", fmt, "disk", "b0")
    first = contents("b0", "qcow2")
    io("disk", "write -P 0x33 384k 256k", "write -z 768k 64k", fmt=fmt)
    return contents("disk", fmt), first


def back_up_until_killed(server, client):
    """Whether it was killed before two backups were there."""
    for name in "b1", "b2":
        if run(DROVER, "ctl", "control", "backup", *BACKUP, "d", name).returncode != 0:
            break
    client.stop = True
    client.join()
    if server.process.poll() is None:
        server.process.terminate()
    return server.process.wait(120) == -9


def listed():
    with open("set.json", encoding="utf-8") as f:
        return [b["name"] for b in json.load(f)["backups"] if not (b.get("leaving") or b.get("naming"))]


def next_backup(fmt, name):
    """It holds what the disk does; in full only where it is said that nobody knows what has changed."""
    r = run(DROVER, "backup", "-q", *BACKUP, "-f", fmt, "disk", name)
    if r.returncode != 0:
        assert "--full" in r.stdout, r.stdout
        drover("backup", "-q", "--full", *BACKUP, "-f", fmt, "disk", name)
    assert contents(name, "qcow2") == contents("disk", fmt)
    return r.returncode == 0


def look_at_backups(fmt, before):
    """before: what the backups hold that there were before the kill."""
    names = listed()
    assert names in (["b0"], ["b0", "b1"], ["b0", "b1", "b2"])
    assert contents("b0", "qcow2") == before
    drover("backup", "verify", "set.json")
    trusted = next_backup(fmt, "next")
    io("disk", "write -P 0x77 1000k 100k", fmt=fmt)
    next_backup(fmt, "last")
    drover("backup", "verify", "set.json")
    return names, trusted


@pytest.mark.parametrize("fmt", ["raw", "qcow2"] + (["vmdk", "add-cow"] if LONG else []))
def test_a_server_that_is_killed_while_it_backs_up_leaves_nothing_wrong(serve, work, fmt):
    if not os.path.exists(PRELOAD):
        pytest.skip("the recorder is not built")
    rnd = random.Random(programs.new_seed())
    parameters = ["disk", f"format={fmt}", "control=control", "export=d", "state=state"]
    at, seen = 1, []
    while True:
        print("killed at", at)
        shutil.rmtree(work)
        work.mkdir()
        os.chdir(work)
        expected, first = make_disk(fmt)  # anew: a copy of a disk is not trusted
        env = {"LD_PRELOAD": PRELOAD, "DROVER_WATCH": os.path.realpath(work), "DROVER_KILL_AT": str(at)}
        client, killed = None, True
        try:
            server = serve(*parameters, env=env)
        except AssertionError:  # killed before it was ready
            pass
        else:
            client = Client(server)
            killed = back_up_until_killed(server, client)
        again = serve(*parameters)
        data = bytes(again.connect().pread(SIZE, 0))
        again.stop()
        if client:
            client.judge(data, expected)
        else:
            assert data == expected
        assert contents("disk", fmt) == data
        seen.append(look_at_backups(fmt, first))
        if not killed:
            break
        at += 1 if LONG else rnd.randrange(1, 120)
    assert len(seen) > 3 and seen[-1][0] == ["b0", "b1", "b2"] and seen[-1][1]
