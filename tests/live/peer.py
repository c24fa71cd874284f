# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ours and qemu-storage-daemon side by side: the same requests to both get the same replies and events."""
import json
import socket
import subprocess

import pytest

from serving import KiB, MiB, drover

nbd = pytest.importorskip("nbd")


class Client:
    """Speaks QMP and keeps all events."""

    def __init__(self, connection):
        self.waited = 0  # events that were waited for
        self.socket = connection
        self.socket.settimeout(60)
        self.lines = self.socket.makefile()  # not for writing, too: that would forget what was read ahead
        self.events = []
        assert "QMP" in json.loads(self.lines.readline())
        self.ask("qmp_capabilities")

    def hear(self):
        message = json.loads(self.lines.readline())
        if "event" in message:
            self.events.append(message)
        return message

    def ask(self, command, arguments=None):
        request = {"execute": command} if arguments is None else {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while "event" in (message := self.hear()):
            pass
        return message

    def wait(self, name, status=None):
        """Until such an event has come after the one that was waited for last."""
        def is_it(event):
            return event["event"] == name and (status is None or event["data"].get("status") == status)
        while not any(map(is_it, self.events[self.waited:])):
            self.hear()
        self.waited = len(self.events)


IMAGES = [("qcow2", "base", None), ("qcow2", "d", "base"), ("qcow2", "child", "base"), ("qcow2", "target", None),
          ("qcow2", "overlay", None), ("raw", "plain", None)]


@pytest.fixture(name="pair")
def two_servers(serve, work):
    """Ours, and qemu-storage-daemon, each with the disk d in a directory of its own: base ← d, and files that nobody
    has open."""
    for name in "ours", "theirs":
        (work / name).mkdir()
        for fmt, image, parent in IMAGES:
            backing = ["-b", parent, "-F", "qcow2"] if parent else []
            drover("create", "-q", "-f", fmt, *backing, f"{name}/{image}", *([] if parent else [str(8 * MiB)]))
        drover("io", "-f", "qcow2", "-c", "write -P 7 1M 1M", f"{name}/base")
        drover("io", "-f", "qcow2", "-c", "write -P 9 3M 1M", f"{name}/d")
    server = serve("ours/d", "format=qcow2", "control=control", "export=d")
    ours, meeting = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    ours.connect("control")
    meeting.bind("meeting")
    meeting.listen()
    with meeting, subprocess.Popen(
            ["qemu-storage-daemon", "--chardev", "socket,id=c,path=meeting",
             "--monitor", "chardev=c", "--blockdev", "driver=file,node-name=f,filename=theirs/d",
             "--blockdev", "driver=qcow2,node-name=d,file=f", "--nbd-server", f"addr.type=unix,addr.path={work.parent}/n",
             "--export", "type=nbd,id=d,node-name=d,name=d,writable=on"],) as theirs:
        meeting.settimeout(60)
        yield Client(ours), Client(meeting.accept()[0]), server
        theirs.terminate()
        theirs.wait(60)


def write_both(pair, work, *offsets, length=64 * KiB):
    """The guests of both write there."""
    _, _, server = pair
    for uri in server.uri("d"), f"nbd+unix:///d?socket={work.parent}/n":
        h = nbd.NBD()
        h.connect_uri(uri)
        for at in offsets:
            h.pwrite(b"\xa5" * length, at)
        h.flush()
        h.shutdown()


def bitmaps(pair, name="d"):
    """The bitmaps of a node, as both show them, in the order of their names."""
    out = []
    for reply in both(pair, "query-named-block-nodes"):
        found, = (n for n in reply["return"] if n["node-name"] == name)
        out.append(sorted((b for b in found.get("dirty-bitmaps", []) if "name" in b), key=lambda b: b["name"]))
    return out


def same_bitmaps(pair, name="d"):
    ours, theirs = bitmaps(pair, name)
    assert ours == theirs, (ours, theirs)
    return ours


def told(event):
    """What is the same in both: not how far a job is counted, and not the time."""
    data = {k: v for k, v in event.get("data", {}).items() if k not in ("len", "offset")}
    return event["event"], data


def in_dir(arguments, name):
    """Files are given as @FILE."""
    if isinstance(arguments, dict):
        return {k: in_dir(v, name) for k, v in arguments.items()}
    if isinstance(arguments, list):
        return [in_dir(v, name) for v in arguments]
    return f"{name}/{arguments[1:]}" if isinstance(arguments, str) and arguments.startswith("@") else arguments


def both(pair, command, arguments=None):
    ours, theirs, _ = pair
    replies = [c.ask(command, None if arguments is None else in_dir(arguments, n))
               for c, n in ((ours, "ours"), (theirs, "theirs"))]
    return replies


def same(pair, command, arguments=None):
    ours, theirs = both(pair, command, arguments)
    assert json.loads(json.dumps(ours).replace("ours/", "theirs/")) == theirs, (command, arguments, ours)


def both_wait(pair, *event):
    for c in pair[:2]:
        c.wait(*event)


def without_pauses(events):
    """QEMU pauses a job for a moment when it moves nodes about."""
    def is_pause(at):
        return [e[1].get("status") for e in events[at:at + 2]] == ["paused", "running"]
    return [e for i, e in enumerate(events) if not is_pause(i) and not (i and is_pause(i - 1))]


def same_events(pair):
    ours, theirs = (without_pauses([told(e) for e in c.events]) for c in pair[:2])
    assert ours == theirs, (ours, theirs)


def node(name, image, driver="qcow2", **more):
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": "@" + image}, **more}
