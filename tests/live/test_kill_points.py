# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server is killed at one change to its files after another while QMP's backups with a bitmap run: nothing has a
target's name that is not a whole backup, and whoever trusts the bitmap afterwards misses nothing."""
import json
import os
import random
import shutil

import pytest

import programs
from qmp import Control, Refused
from serving import MiB, drover, io
from test_kill_jobs import PRELOAD, SIZE, Client

LONG = bool(os.environ.get("DROVER_TEST_LONG"))
BITMAP = {"device": "d", "bitmap": "b"}
FULL = {"sync": "full", "bitmap_mode": "on-success", **BITMAP}
# Whether a client writes meanwhile; the backups, each into a file of its own.
CASES = {
    "idle": (False, [FULL, {"sync": "incremental", **BITMAP}]),
    "written to": (True, [FULL, {"sync": "bitmap", "bitmap_mode": "always", **BITMAP}]),
    "never": (False, [{"sync": "bitmap", "bitmap_mode": "never", **BITMAP}]),
}


def contents(name, fmt="qcow2"):
    drover("convert", "-f", fmt, "-O", "raw", name, "../read")
    with open("../read", "rb") as f:
        return f.read()


def make_disk(fmt):
    """A disk, a backup of it, t, and a bitmap that has what was changed since; what the disk holds."""
    drover("create", "-q", "-f", fmt, "disk", SIZE)
    io("disk", "write -P 0x11 0 1536k", fmt=fmt)
    drover("convert", "-f", fmt, "-O", "qcow2", "disk", "t")
    drover("bitmap", "--add", "-f", fmt, "disk", "b")
    io("disk", "write -P 0x33 384k 256k", "write -z 768k 64k", fmt=fmt)
    return contents("disk", fmt)


def child(parent, name):
    drover("create", "-q", "-f", "qcow2", "-b", parent, "-F", "qcow2", name)


def back_up(jobs):
    """All of the jobs; an incremental one goes into a child of the backup before it. False: the server was killed."""
    try:
        control = Control()
        for i, job in enumerate(jobs):
            if job["sync"] == "full":
                control.ask("drive-backup", job_id="j", target=os.path.abspath(f"b{i}"), **job)
            else:
                child(f"b{i - 1}" if i else "t", f"b{i}")
                control.ask("drive-backup", job_id="j", target=os.path.abspath(f"b{i}"), mode="existing", format="qcow2", **job)
            assert "BLOCK_JOB_COMPLETED" in list(control.states("j"))
        control.close()
    except (AssertionError, OSError):
        return False
    return True


def is_trusted(fmt):
    info = json.loads(drover("info", "--output=json", "-f", fmt, "disk"))
    found = info.get("bitmaps") or info["format-specific"]["data"]["bitmaps"]
    assert [b["name"] for b in found] == ["b"]
    return "untrusted" not in found[0] and "in-use" not in found[0].get("flags", [])


def next_backup(base, name):
    """What the bitmap says, into a child of that; None: nobody trusts the bitmap."""
    child(base, name)
    control = Control()
    try:
        control.ask("drive-backup", job_id="j", sync="bitmap", bitmap_mode="never", mode="existing", format="qcow2",
                    target=os.path.abspath(name), **BITMAP)
        assert "BLOCK_JOB_COMPLETED" in list(control.states("j"))
    except Refused as e:
        assert "inconsistent" in str(e)
        return None
    finally:
        control.close()
    return name


def judge(fmt, jobs, serve, parameters):
    """What the next backup by the bitmap makes of those that are there, where the bitmap is trusted: over the last one
    in any case, and over the one before as long as the bitmap was not handed on."""
    data, trusted = contents("disk", fmt), is_trusted(fmt)
    chain = ["t"]
    for i, job in enumerate(jobs):
        if os.path.exists(f"b{i}"):
            chain = [f"b{i}"] if job["sync"] == "full" else [*chain, f"b{i}"]
    server = serve(*parameters)
    control = Control()
    shown, = control.ask("query-block")[0]["inserted"]["dirty-bitmaps"]
    control.close()
    kept = shown["count"] > 0
    made = [next_backup(base, f"next{n}") for n, base in enumerate(chain[-2:] if kept else chain[-1:])]
    server.stop()
    for name in made:
        assert contents(name) == data if trusted else not name, (chain, kept)
    return trusted, kept, chain[-1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fmt", ["qcow2"] + (["raw", "vmdk"] if LONG else []))
def test_a_server_that_is_killed_while_it_backs_up_leaves_nothing_that_lies(serve, work, fmt, case):
    if not os.path.exists(PRELOAD):
        pytest.skip("the recorder is not built")
    written, jobs = CASES[case]
    rnd = random.Random(programs.new_seed())
    parameters = ["disk", f"format={fmt}", "control=control", "export=d", "state=state"]
    at, seen = 1, []
    while True:
        print("killed at", at)
        shutil.rmtree(work)
        work.mkdir()
        os.chdir(work)
        expected = make_disk(fmt)
        env = {"LD_PRELOAD": PRELOAD, "DROVER_WATCH": os.path.realpath(work), "DROVER_KILL_AT": str(at)}
        client, ended = None, False
        try:
            server = serve(*parameters, env=env)
        except AssertionError:  # killed before it was ready
            pass
        else:
            client = Client(server) if written else None
            ended = back_up(jobs)
            if client:
                client.stop = True
                client.join()
            if server.process.poll() is None:
                server.process.terminate()
            ended &= server.process.wait(120) != -9
        data = contents("disk", fmt)
        if client:
            client.judge(data, expected)
        else:
            assert data == expected
        seen.append(judge(fmt, jobs, serve, parameters))
        if ended:
            break
        step = rnd.randrange(1, 3) if LONG else rnd.randrange(3, 20)
        at += step + (at // 2 if written else 0)  # a client's writes count, too
    assert len(seen) > 2 and seen[-1] == (True, case == "never" or written, f"b{len(jobs) - 1}"), seen
