# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server of disks for tests, and clients for it."""
import os
import signal
import socket
import struct
import subprocess

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DROVER = os.path.abspath(os.environ.get("DROVER", os.path.join(TOP, "build", "drover")))
PLUGIN = os.environ.get("DROVER_NBDKIT_PLUGIN") or os.path.join(os.path.dirname(DROVER), "nbdkit-drover-plugin.so")

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def run(*args, timeout=60, **kw):
    return subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=timeout, check=False, **kw)


def ok(*args, **kw):
    r = run(*args, **kw)
    assert r.returncode == 0, f"{args}: {r.returncode}\n{r.stdout}"
    return r.stdout


def drover(*args, **kw):
    return ok(DROVER, *args, **kw)


def io(image, *commands, fmt=None):
    """drover io; a pattern that does not match is a failure."""
    out = drover("io", *(["-f", fmt] if fmt else []), *[a for c in commands for a in ("-c", c)], image)
    assert "failed" not in out, out


def zeros_and_data(extents):
    """[(length, NBD flags)] → [(offset, end, is data)], neighbours joined."""
    out, at = [], 0
    for length, flags in extents:
        data = not flags & 2
        if out and out[-1][2] == data:
            out[-1] = (out[-1][0], at + length, data)
        else:
            out.append((at, at + length, data))
        at += length
    return out


class Server:
    """nbdkit in the foreground with our plugin, at a socket of its own."""

    def __init__(self, work, parameters, options, number, env=None):
        self.socket = str(work.parent / f"s{number}")
        self.log = work.parent / f"log{number}"
        ready, told = os.pipe()
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                ["nbdkit", "-f", "-U", self.socket, *options, PLUGIN, *map(str, parameters), f"ready-fd={told}"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=[told],
                env={**os.environ, **(env or {})})
        os.close(told)
        self.ready = ready

    def wait_ready(self):
        line = os.read(self.ready, 100)  # nothing comes from one that ended
        os.close(self.ready)
        if line != b"ready\n":
            self.process.wait(60)  # its locks go after its end of the pipe
        assert line == b"ready\n", self.text()
        return self

    def text(self):
        return self.log.read_text(errors="replace")

    def uri(self, export=""):
        return f"nbd+unix:///{export}?socket={self.socket}"

    def connect(self, export=""):
        """A libnbd handle that asks for the extents, too."""
        import nbd  # pylint: disable=import-outside-toplevel
        h = nbd.NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(self.uri(export))
        return h

    def stop(self, number=signal.SIGTERM):
        """End it as an administrator does."""
        self.process.send_signal(number)
        assert self.process.wait(60) == 0, self.text()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)


def extents(handle, size, offset=0):
    """All extents of [offset, offset + size): [(length, flags)]."""
    out = []

    def take(_context, _offset, entries, _error):
        out.extend(zip(entries[::2], entries[1::2]))
        return 0

    at = offset
    while at < offset + size:
        got = len(out)
        handle.block_status(min(size - (at - offset), (1 << 32) - 512), at, take)
        at += sum(length for length, _ in out[got:])
    return out


def connect_by_hand(server):
    """A socket at which the server expects requests, and who is at it can do what libnbd never does."""
    s = socket.socket(socket.AF_UNIX)
    s.connect(server.socket)
    s.recv(18, socket.MSG_WAITALL)  # NBDMAGIC IHAVEOPT flags
    s.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))  # flags, EXPORT_NAME ""
    s.recv(10, socket.MSG_WAITALL)
    return s
