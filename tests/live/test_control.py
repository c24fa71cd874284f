# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs on served disks, by `drover ctl` and QMP, while a client writes."""
import json
import os
import random
import signal
import socket
import subprocess
import threading

import pytest

from serving import DROVER, KiB, MiB, drover, io, run

nbd = pytest.importorskip("nbd")

SIZE = 8 * MiB
PIECE = 16 * KiB


def make(fmt, name, parent=None):
    args = ["-b", parent[1], "-F", parent[0]] if parent else []
    drover("create", "-q", "-f", fmt, *args, name, *([] if parent else [str(SIZE)]))


def chain(fmt):
    """base ← mid ← disk."""
    make(fmt, "base")
    io("base", "write -P 0x11 0 3M", fmt=fmt)
    make(fmt, "mid", (fmt, "base"))
    io("mid", "write -P 0x22 1M 3M", fmt=fmt)
    make(fmt, "disk", (fmt, "mid"))
    io("disk", "write -P 0x33 2M 1M", fmt=fmt)


class Guest:
    """Writes pieces all the time, flushes now and then, and knows what it has written."""

    def __init__(self, server, export=""):
        self.handle = server.connect(export)
        self.shadow = bytearray(self.handle.pread(SIZE // 2, 0) + self.handle.pread(SIZE // 2, SIZE // 2))
        self.flushed = bytes(self.shadow)
        self.touched = set()  # since the last flush
        self.stop, self.count, self.trouble = False, 0, None
        self.steps = threading.Condition()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        rnd = random.Random(7)
        try:
            while not self.stop:
                at = rnd.randrange(SIZE // PIECE) * PIECE
                data = bytes([rnd.randrange(1, 256)]) * PIECE
                self.touched.add(at)
                if rnd.randrange(4):
                    self.handle.pwrite(data, at)
                else:
                    data = bytes(PIECE)
                    self.handle.zero(PIECE, at)
                self.shadow[at:at + PIECE] = data
                if rnd.randrange(8) == 0:
                    self.handle.flush()
                    self.flushed, self.touched = bytes(self.shadow), set()
                with self.steps:
                    self.count += 1
                    self.steps.notify_all()
        except nbd.Error as e:
            self.trouble = e
            with self.steps:
                self.count += 1 << 40
                self.steps.notify_all()

    def go_on(self, n):
        """Wait until it has done n more requests."""
        with self.steps:
            until = self.count + n
            self.steps.wait_for(lambda: self.count >= until)

    def rest(self):
        self.stop = True
        self.thread.join()

    def end(self):
        """It leaves, having seen nothing wrong."""
        self.rest()
        assert self.trouble is None
        self.handle.flush()
        assert self.handle.pread(SIZE, 0) == bytes(self.shadow)
        self.handle.shutdown()
        return bytes(self.shadow)


def bytes_of(name, fmt):
    drover("convert", "-f", fmt, "-O", "raw", name, "all.raw")
    with open("all.raw", "rb") as f:
        return f.read(SIZE)


def ctl(*args, **kw):
    return drover("ctl", "control", *args, **kw)


@pytest.mark.parametrize("fmt", ["vmdk", "qcow2"])
def test_every_job_beside_a_client_that_writes(serve, fmt):
    chain(fmt)
    server = serve("disk", "control=control", "export=d")
    guest = Guest(server)
    guest.go_on(20)
    ctl("snapshot", "d", "new")
    guest.go_on(20)
    ctl("commit", "--top", "mid", "--base", "base", "d")
    guest.go_on(20)
    ctl("stream", "--base", "disk", "d")
    ctl("snapshot", "d", "newer")
    guest.go_on(20)
    ctl("commit", "--base", "disk", "d")
    guest.go_on(20)
    assert ctl("status").startswith("d: ") and "/disk (" in ctl("status")
    ctl("mirror", "-f", fmt, "d", "moved")
    guest.go_on(20)
    ctl("stream", "d")
    want = guest.end()
    server.stop()
    assert bytes_of("moved", fmt) == want
    assert not os.path.exists("control")
    assert run(DROVER, "check", "moved").returncode == 0


def test_a_raw_disk_gets_an_overlay_and_is_raw_again(serve):
    make("raw", "disk")
    server = serve("disk", "control=control", "export=d", "format=raw")
    guest = Guest(server)
    guest.go_on(20)
    ctl("snapshot", "-f", "add-cow", "d", "overlay")
    guest.go_on(20)
    ctl("commit", "d")
    assert "(raw, " in ctl("status")
    guest.go_on(20)
    want = guest.end()
    server.stop()
    assert bytes_of("disk", "raw") == want


def test_an_add_cow_becomes_the_raw_disk_that_its_data_is_in(serve):
    chain("qcow2")
    make("add-cow", "overlay", ("qcow2", "disk"))
    given = ["overlay", "control=control", "export=d", "state=state"]
    server = serve(*given)
    guest = Guest(server)
    guest.go_on(20)
    ctl("stream", "--retire", "d")
    assert "overlay.raw (raw, " in ctl("status")
    guest.go_on(20)
    want = guest.end()
    server.stop()
    assert not os.path.exists("overlay") and bytes_of("overlay.raw", "raw") == want
    server = serve(*given)  # the state knows what the name stood for
    assert server.connect().pread(SIZE, 0) == want


def test_the_images_below_the_active_one_are_changed_beside_a_client_that_writes(serve):
    chain("vmdk")
    make("vmdk", "other")
    io("other", "write -P 0x11 0 6M", fmt="vmdk")
    server = serve("disk", "control=control", "export=d")
    guest = Guest(server)
    ctl("snapshot", "d", "new")
    guest.go_on(20)
    ctl("rebase", "--image", "disk", "-f", "vmdk", "d", "other")
    guest.go_on(20)
    ctl("stream", "--image", "disk", "d")
    assert ", 1 below it)" in ctl("status")
    want = guest.end()
    server.stop()
    os.remove("other")
    assert bytes_of("new", "vmdk") == want


def test_a_mirror_that_is_not_completed_leaves_a_copy(serve):
    chain("qcow2")
    server = serve("disk", "control=control", "export=d")
    assert "is ready" in ctl("mirror", "--no-complete", "-f", "raw", "d", "copy")
    job = ctl("jobs").split(":")[0]
    ctl("cancel", job)
    while ctl("jobs"):
        pass
    server.stop()
    assert bytes_of("copy", "raw") == bytes_of("disk", "qcow2")


def test_backups_of_a_disk_in_use_hold_what_it_held(serve):
    chain("qcow2")
    server = serve("disk", "control=control", "export=d")
    handle = server.connect()
    for name, kind in ("b0", "full"), ("b1", "b0"), ("b2", "b1"):
        handle.pwrite(name.encode() * 2048, 5 * MiB + int(name[1]) * 64 * KiB)
        before = handle.pread(SIZE, 0)
        ctl("backup", "--state", "set.json", "--bitmap", "daily", "d", name)
        handle.pwrite(b"later" * 1000, MiB)
        assert bytes_of(name, "qcow2") == before
        assert drover("backup", "list", "set.json").splitlines()[-1].split()[-1] == kind
    ctl("backup", "-f", "raw", "d", "alone")
    assert bytes_of("alone", "raw") == handle.pread(SIZE, 0)
    handle.shutdown()
    server.stop()
    drover("backup", "verify", "set.json")


def test_a_backup_beside_a_client_that_writes_goes_on_by_command(serve):
    make("raw", "disk")
    server = serve("disk", "control=control", "export=d", "format=raw")
    guest = Guest(server)
    guest.go_on(20)
    for i in range(4):
        ctl("backup", "--state", "set.json", "--bitmap", "daily", "d", f"b{i}")
        guest.go_on(20)
    want = guest.end()
    server.stop()
    said = drover("backup", "--state", "set.json", "--bitmap", "daily", "-f", "raw", "disk", "last")
    assert said.startswith("Incremental")
    assert bytes_of("last", "qcow2") == want
    drover("backup", "verify", "set.json")


def test_an_interrupted_client_leaves_the_job_running(serve):
    chain("qcow2")
    server = serve("disk", "control=control", "export=d")
    with subprocess.Popen([DROVER, "ctl", "--json", "control", "stream", "-r", "1", "d"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as client:
        for line in client.stdout:
            if '"running"' in line:
                break
        while '"return"' not in client.stdout.readline():
            pass
        client.send_signal(signal.SIGINT)
        _, said = client.communicate(timeout=60)
    assert client.returncode == 130 and "goes on in the server" in said
    job = ctl("jobs").split(":")[0]
    assert job in said
    r = run(DROVER, "ctl", "control", "complete", job)
    assert r.returncode == 1 and "cannot accept command verb 'complete'" in r.stdout
    ctl("cancel", job)
    server.stop()


def test_what_ctl_cannot_do_is_one_line(serve, work):
    chain("vmdk")
    r = run(DROVER, "ctl", "control", "status")
    assert r.returncode == 1 and "no server listens there" in r.stdout
    server = serve("disk", "control=control", "export=d")
    for args, text in [(["stream", "e"], "Cannot find device='e'"),
                       (["snapshot", "d", "base"], "exists already"),
                       (["snapshot", "d", "/dev/shm/drover-outside"], "outside the image's directory"),
                       (["mirror", "-f", "nonsense", "d", "new"], "nonsense"),
                       (["backup", "-f", "nonsense", "d", "new"], "nonsense"),
                       (["backup", "--bitmap", "b", "d", "new"], "--state"),
                       (["backup", "d", "base"], "belongs to the disk itself"),
                       (["backup", "d", "control"], "exists already"),
                       (["backup", "d", "/dev/shm/drover-outside"], "outside the image's directory"),
                       (["resize", "d", "1X"], "Invalid size"),
                       (["cancel", "j"], "not found"),
                       (["dance"], "nothing that a server does")]:
        r = run(DROVER, "ctl", "control", *args)
        assert r.returncode == 1 and text in r.stdout, (args, r.stdout)
    assert sorted(os.listdir(work)) == ["base", "control", "disk", "mid"]
    server.stop()


def test_the_disk_may_be_left_out_when_there_is_one(serve):
    chain("qcow2")
    make("qcow2", "small")
    server = serve("disk", "control=control", "export=d")
    ctl("snapshot", "new")
    ctl("resize", str(2 * SIZE))
    ctl("stream", "--base", "base")
    assert ctl("status").startswith("d: ") and "/new (" in ctl("status")
    assert json.loads(ctl("--json", "resize", str(SIZE * 3)).strip()) == {"return": {}}
    server.stop()
    server = serve("new", "small", "control=control")
    r = run(DROVER, "ctl", "control", "resize", str(4 * SIZE))
    assert r.returncode == 1 and "has 2 disks: say which" in r.stdout
    server.stop()


def test_ctl_shows_what_a_job_says(serve):
    chain("qcow2")
    drover("create", "-q", "-f", "qcow2", "small", "1M")
    server = serve("disk", "control=control", "export=d")
    r = run(DROVER, "ctl", "control", "rebase", "-f", "qcow2", "d", "small")
    assert r.returncode == 0 and "its new backing file" in r.stdout
    server.stop()


def test_quit_ends_the_server_although_a_client_stays(serve):
    chain("vmdk")
    server = serve("disk", "control=control", "export=d")
    client = server.connect()
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("control")
        lines = s.makefile()
        assert "QMP" in json.loads(lines.readline())
        for command in ("qmp_capabilities", "quit"):
            s.sendall(json.dumps({"execute": command}).encode() + b"\n")
            assert json.loads(lines.readline()) == {"return": {}}
    assert server.process.wait(60) == 0
    del client


JOBS = {
    "stream": ["stream"],
    "commit": ["commit", "--base", "base"],
    "mirror": ["mirror", "-f", "qcow2"],
}


def look(server, guest, attempt):
    """What the guest flushed before the kill, and has not written to since, is there."""
    handle = server.connect()
    have = handle.pread(SIZE, 0)
    for at in range(0, SIZE, PIECE):
        if at not in guest.touched:
            assert have[at:at + PIECE] == guest.flushed[at:at + PIECE], f"{attempt}: at {at}"
    handle.shutdown()


@pytest.mark.parametrize("job", JOBS)
def test_a_server_that_is_killed_goes_on_with_its_job(serve, job):
    """What was flushed is there, and the job ends, wherever the server is killed."""
    rnd = random.Random(job)
    chain("qcow2")
    parameters = ["disk", "format=qcow2", "control=control", "export=d", "state=state"]
    server = serve(*parameters)
    for attempt in range(6):
        guest = Guest(server)
        target = [f"target{attempt}"] if job == "mirror" else []
        if job != "mirror":
            ctl("snapshot", "d", f"new{attempt}")
        ctl(*JOBS[job], "--detach", "-r", "20M", "d", *target)
        guest.go_on(rnd.randrange(1, 40))
        server.kill()
        guest.rest()
        server = serve(*parameters)
        look(server, guest, attempt)
        while True:
            jobs = ctl("jobs")
            if ", ready, " in jobs:
                run(DROVER, "ctl", "control", "complete", jobs.split(":")[0])
            elif not jobs:
                break
    assert not [n for n in os.listdir(".") if n.startswith(".")]
    server.stop()


EDITS = {
    "rebase": ["rebase", "--image", "mid", "-f", "qcow2"],
    "delete": ["delete"],
    "retire": ["stream", "--retire"],
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_server_that_is_killed_in_the_middle_of_a_change_of_the_chain_finishes_it(serve, edit):
    """Under load, at several points: what was flushed is there, the change is made in the end, and nothing is left."""
    rnd = random.Random(edit)
    chain("qcow2")
    make("qcow2", "other")
    io("other", "write -P 0x11 0 6M", fmt="qcow2")
    if edit == "retire":
        make("add-cow", "overlay", ("qcow2", "disk"))
    first = "overlay" if edit == "retire" else "disk"
    parameters = [first, "control=control", "export=d", "state=state"]
    server = serve(*parameters)
    for attempt in range(5):
        guest = Guest(server)
        if edit == "rebase":
            operands = ["d", ["other", "base"][attempt % 2]]
        elif edit == "delete":
            ctl("snapshot", "d", f"new{attempt}")
            ctl("snapshot", "d", f"newer{attempt}")
            operands = ["--remove", *(["--down"] if attempt % 2 else []), "d", f"new{attempt}"]
        else:
            if attempt:
                ctl("snapshot", "-f", "add-cow", "d", f"overlay{attempt}")
            operands = ["d"]
        guest.go_on(20)
        ctl(*EDITS[edit], "--detach", "-r", "20M", *operands)
        guest.go_on(rnd.randrange(1, 40))
        server.kill()
        guest.rest()
        server = serve(*parameters)
        look(server, guest, attempt)
        while ctl("jobs"):
            pass
        if edit == "delete":
            assert not os.path.exists(f"new{attempt}")
        if edit == "retire":
            assert "(raw, " in ctl("status")
    assert not [n for n in os.listdir(".") if n.startswith(".")]
    server.stop()


def test_a_parent_that_was_given_is_not_put_under_a_newer_image(serve):
    chain("qcow2")
    given = ["disk", "format=qcow2", "backing=mid", "backing-format=qcow2", "control=control", "export=d", "state=state"]
    serve(*given).stop()
    server = serve(*given)
    ctl("snapshot", "d", "new")
    server.stop()
    with pytest.raises(AssertionError, match="goes on with .*/new: backing="):
        serve(*given)
    server = serve("disk", "control=control", "export=d", "state=state")
    assert server.connect().pread(512, 2 * MiB) == b"\x33" * 512


def test_another_disk_is_not_served_by_a_name_that_the_state_knows(serve):
    chain("qcow2")
    server = serve("disk", "control=control", "export=d", "state=state")
    ctl("snapshot", "d", "new")
    server.stop()
    with pytest.raises(AssertionError, match="began with .*/disk and goes on with .*/new"):
        serve("mid", "control=control", "export=d", "state=state")
    os.link("disk", "link")
    for same in "link", "new":
        serve(same, "control=control", "export=d", "state=state").stop()


def test_a_name_means_the_same_to_a_server_in_another_directory(serve):
    chain("qcow2")
    server = serve("disk", "control=control", "export=d", "state=state")
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("control")
        lines = s.makefile()
        for command, arguments in (
                ("qmp_capabilities", {}),
                ("blockdev-snapshot-sync", {"device": "d", "snapshot-file": "its-snapshot-file"}),
                ("drive-mirror", {"device": "d", "target": "its-target", "sync": "full"})):
            s.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            while "return" not in (line := lines.readline()):
                assert line and "error" not in line
    while ", ready, " not in ctl("jobs"):
        pass
    with open("state", encoding="utf-8") as f:
        state = json.load(f)
    assert state["disks"][0]["path"] == os.path.abspath("its-snapshot-file")
    assert state["jobs"][0]["target"] == os.path.abspath("its-target")
    server.stop()
