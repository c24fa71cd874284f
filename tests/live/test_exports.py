# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exports that clients of the control socket add and remove, with NBD clients that have them."""
import json
import socket

import pytest

from serving import MiB, drover, io

nbd = pytest.importorskip("nbd")


class Control:
    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect("control")
        self.lines = self.socket.makefile()  # not for writing, too: that would forget what was read ahead
        self.events = []
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        """What it returns, or the text of the error."""
        request = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while "event" in (message := json.loads(self.lines.readline())):
            self.events.append((message["event"], message["data"].get("id")))
        return message["return"] if "return" in message else message["error"]["desc"]


@pytest.fixture
def control(serve):
    """A server of the disk d, beside which x lies, and its control."""
    drover("create", "-q", "-f", "vmdk", "disk", str(8 * MiB))
    drover("create", "-q", "-f", "qcow2", "x", str(4 * MiB))
    io("x", "write -P 0x44 1M 1M", fmt="qcow2")
    made = serve("disk", "control=control", "export=d")
    said = Control()
    said.server = made
    return said


def add_x(control, **more):
    assert control("blockdev-add", driver="qcow2", node_name="x", file={"driver": "file", "filename": "x"}) == {}
    assert control("block-export-add", type="nbd", id="e", node_name="x", **more) == {}


def test_an_added_export_is_served_until_it_is_removed(control):
    other = control.server.connect("d")
    add_x(control, writable=True)
    client = control.server.connect("x")
    assert client.get_size() == 4 * MiB
    assert client.pread(512, MiB) == b"\x44" * 512
    client.pwrite(b"\x55" * 4096, 2 * MiB)
    client.flush()
    assert control("block-export-del", id="e") == "export 'e' still in use"
    assert control("block-export-del", id="e", mode="hard") == {}
    assert control.events == [("BLOCK_EXPORT_DELETED", "e")]
    client.poll(30000)  # it is told that the connection has ended, without asking for anything
    assert client.aio_is_dead() or client.aio_is_closed()
    with pytest.raises(nbd.Error):
        control.server.connect("x")
    assert control("blockdev-del", node_name="x") == {}
    io("x", "read -P 0x55 2M 4k", fmt="qcow2")  # nobody has it
    other.pwrite(b"\x66" * 512, 0)
    assert other.pread(512, 0) == b"\x66" * 512
    control.server.stop()


def test_clients_of_other_exports_keep_their_connections(control):
    add_x(control)
    clients = [control.server.connect(name) for name in ("d", "x", "d", "x")]
    stranger = nbd.NBD()  # asks for no export, and stays
    stranger.set_opt_mode(True)
    stranger.connect_unix(control.server.socket)
    assert control("block-export-del", id="e", mode="hard") == {}
    for client in clients[1::2]:
        client.poll(30000)
        assert client.aio_is_dead() or client.aio_is_closed()
    for client in clients[0::2]:
        client.pread(512, 0)
    stranger.set_export_name("d")
    stranger.opt_go()
    stranger.pread(512, 0)
    control.server.stop()


def test_an_added_export_is_read_only_unless_it_is_said(control):
    add_x(control, name="other name")
    client = control.server.connect("other%20name")
    assert client.is_read_only()
    with pytest.raises(nbd.Error):
        client.set_strict_mode(0)
        client.pwrite(b"x", 0)
    names = []
    lister = nbd.NBD()
    lister.set_opt_mode(True)
    lister.connect_unix(control.server.socket)
    lister.opt_list(lambda name, _: names.append(name) or 0)
    assert names == ["d", "other name"]
    lister.opt_abort()


def test_a_stopped_server_has_no_clients_until_it_is_started(control):
    client = control.server.connect("d")
    client.pwrite(b"\x66" * 512, 0)
    assert control("nbd-server-stop") == {}
    assert control.events == [("BLOCK_EXPORT_DELETED", "d")]
    with pytest.raises(nbd.Error):
        client.pread(512, 0)
    with pytest.raises(nbd.Error):
        control.server.connect("d")
    unix = {"type": "unix", "data": {"path": "elsewhere"}}
    assert "and nowhere else" in control("nbd-server-start", addr=unix)
    assert "and nowhere else" in control("nbd-server-start",
                                         addr={"type": "inet", "data": {"host": "::1", "port": "1"}})
    unix["data"]["path"] = control.server.socket
    assert control("nbd-server-start", addr=unix) == {}
    assert control("nbd-server-start", addr=unix) == "NBD server already running"
    with pytest.raises(nbd.Error):
        control.server.connect("d")
    assert control("block-export-add", type="nbd", id="d", node_name="d") == {}
    assert control.server.connect("d").pread(512, 0) == b"\x66" * 512
    control.server.stop()
