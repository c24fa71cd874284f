# SPDX-License-Identifier: LGPL-2.1-or-later
"""A served disk whose file system is full: its clients' writes wait, and go on when there is space."""
import json
import os
import signal
import socket
import subprocess
import threading

import pytest

from serving import KiB, MiB, drover, io, run

nbd = pytest.importorskip("nbd")

SIZE = 24 * MiB


class Qmp:
    """A client of the control socket that keeps the events it hears."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("r")
        self.events = []
        self.hear()
        self.ask("qmp_capabilities")

    def hear(self):
        return json.loads(self.lines.readline())

    def ask(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            message = self.hear()
            if "event" not in message:
                return message["return"]
            self.events.append(message)

    def await_event(self, name):
        while True:
            message = self.events.pop(0) if self.events else self.hear()
            if message.get("event") == name:
                return message["data"]


@pytest.fixture(name="small")
def small_file_system(tmp_path):
    """A directory whose file system has room for less than the disk."""
    where = tmp_path / "small"
    where.mkdir()
    if os.geteuid() != 0 or run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", where).returncode != 0:
        pytest.skip("cannot mount a small file system")
    yield where
    run("umount", "-l", where)


class Writer:
    """Writes all of the disk in the background."""

    def __init__(self, server):
        self.handle = server.connect("disk0")
        self.failed = None
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        try:
            for at in range(0, SIZE, 256 * KiB):
                self.handle.pwrite(bytes([at // MiB + 1]) * (256 * KiB), at)
            self.handle.flush()
        except nbd.Error as e:
            self.failed = e

    def join(self):
        self.thread.join(60)
        assert not self.thread.is_alive()


def read_all(handle):
    return b"".join(handle.pread(MiB, at) for at in range(0, SIZE, MiB))


WANTED = b"".join(bytes([n + 1]) * MiB for n in range(SIZE // MiB))


def begin(serve, small, work, fmt, *more):
    drover("create", "-q", "-f", fmt, small / "disk", str(SIZE))
    server = serve(f"control={work / 'control'}", *more, f"disk={small / 'disk'}", "export=disk0", "read-only=false")
    return server, Qmp(work / "control")


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vmdk"])
@pytest.mark.parametrize("said", [True, False])
def test_writes_wait_until_there_is_space(serve, small, tmp_path, fmt, said):
    server, qmp = begin(serve, small, tmp_path, fmt)
    writer = Writer(server)
    event = qmp.await_event("BLOCK_IO_ERROR")
    assert (event["device"], event["operation"], event["action"], event["nospace"]) == ("disk0", "write", "stop", True)
    assert qmp.ask("query-block")[0]["io-status"] == "nospace"
    other = server.connect("disk0")
    assert other.pread(KiB, 0) == b"\1" * KiB  # reads go on
    assert writer.thread.is_alive()
    run("mount", "-o", "remount,size=64m", small)
    if said:
        qmp.ask("cont")
    writer.join()
    assert writer.failed is None
    assert read_all(other) == WANTED
    assert qmp.ask("query-block")[0]["io-status"] == "ok"
    server.stop()


def test_writes_of_all_exports_of_a_disk_wait_in_one_line(serve, small, tmp_path):
    server, qmp = begin(serve, small, tmp_path, "raw")
    qmp.ask("block-export-add", type="nbd", id="second", **{"node-name": "disk0", "name": "second", "writable": True})
    writer = Writer(server)
    qmp.await_event("BLOCK_IO_ERROR")
    later = server.connect("second")
    done = later.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"\xee" * MiB)), SIZE - MiB)
    for _ in range(10):
        later.poll(50)  # without the line it would be told ENOSPC now
    run("mount", "-o", "remount,size=64m", small)
    qmp.ask("cont")
    while not later.aio_command_completed(done):
        later.poll(-1)
    writer.join()
    assert writer.failed is None
    assert read_all(later) == WANTED  # what the first client wrote there came later
    server.stop()


def test_a_snapshot_elsewhere_makes_space(serve, small, tmp_path):
    server, qmp = begin(serve, small, tmp_path, "raw", f"allow-path={tmp_path}")
    writer = Writer(server)
    qmp.await_event("BLOCK_IO_ERROR")
    qmp.ask("blockdev-snapshot-sync", device="disk0", **{"snapshot-file": str(tmp_path / "new"), "format": "qcow2"})
    qmp.ask("cont")
    writer.join()
    assert writer.failed is None
    assert read_all(server.connect("disk0")) == WANTED
    server.stop()


def test_the_end_does_not_wait_for_writes_that_wait(serve, small, tmp_path):
    server, qmp = begin(serve, small, tmp_path, "raw")
    writer = Writer(server)
    qmp.await_event("BLOCK_IO_ERROR")
    server.stop(signal.SIGTERM)
    writer.join()
    assert writer.failed is not None


def test_a_client_that_is_killed_leaves_a_server_that_works(serve, small, tmp_path):
    server, qmp = begin(serve, small, tmp_path, "raw")
    with subprocess.Popen(["qemu-io", "-f", "raw", server.uri("disk0"), "-c", f"write -P 0x77 0 {SIZE}"]) as client:
        qmp.await_event("BLOCK_IO_ERROR")
        client.kill()
    run("mount", "-o", "remount,size=64m", small)
    qmp.ask("cont")
    server.connect("disk0").pwrite(b"\1" * MiB, 0)
    assert server.connect("disk0").pread(MiB, 0) == b"\1" * MiB
    server.stop()


def test_report_lets_writes_fail(serve, small, tmp_path):
    server, qmp = begin(serve, small, tmp_path, "raw", "on-error=report")
    writer = Writer(server)
    writer.join()
    assert writer.failed is not None and writer.failed.errno == "ENOSPC"
    assert qmp.await_event("BLOCK_IO_ERROR")["action"] == "report"
    server.stop()
