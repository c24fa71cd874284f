# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit's filters over our plugin, with random programs above and jobs below."""
import errno

import pytest

import programs
from qmp import Control
from serving import MiB, drover, io, run, DROVER

nbd = pytest.importorskip("nbd")

SIZE = 8 * MiB
FILTERS = {
    "error": ["error=ENOSPC", "error-pread-rate=10%", "error-pwrite-rate=10%", "error-zero-rate=10%",
              "error-trim-rate=10%", "error-extents-rate=10%"],
    "delay": ["rdelay=1ms", "wdelay=2ms"],
    "blocksize": ["minblock=4096", "maxdata=65536", "maxlen=262144"],
    "multi-conn": ["multi-conn-mode=emulate"],
    "cow": [],
    "cache": ["cache=writeback"],
}


class Stubborn:
    """A client that tries again whatever fails."""

    def __init__(self, handle):
        self.handle, self.failed = handle, 0

    def __getattr__(self, name):
        def method(*args):
            while True:
                try:
                    return getattr(self.handle, name)(*args)
                except nbd.Error as e:
                    assert e.errnum == errno.ENOSPC
                    self.failed += 1
        return method


class Unreliable:
    """A server whose clients try again."""

    def __init__(self, server):
        self.server, self.clients = server, []

    def connect(self, export=""):
        self.clients.append(Stubborn(self.server.connect(export)))
        return self.clients[-1]


def bytes_of(name):
    drover("convert", "-f", "qcow2", "-O", "raw", name, "all.raw")
    with open("all.raw", "rb") as f:
        return f.read()


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_above_and_jobs_below_change_no_byte(serve, name):
    seed = programs.new_seed()
    drover("create", "-q", "-f", "qcow2", "disk", SIZE)
    io("disk", "write -P 0x11 0 6M", fmt="qcow2")
    before = bytes_of("disk")
    server = serve("disk", "format=qcow2", "control=control", "export=d", *FILTERS[name],
                   options=["--filter=" + name])
    clients = Unreliable(server)
    part = MiB + 4096
    # The cache filter goes on showing what was trimmed below it, and tells of holes below what it has not written yet.
    own = name != "cache"
    running = [programs.Program(clients, seed + i, (i * part, part), steps=120, trims=own, maps=own) for i in range(2)]
    control = Control()
    jobs = programs.Jobs(control, seed, "qcow2", SIZE, can_grow=False)
    for _ in range(5):
        jobs.run_one()
    want = b"".join(p.end() for p in running)
    (path, _), *_ = control.chain()
    control.close()
    server.stop()
    after = bytes_of(path)
    assert after == (before if name == "cow" else want + before[len(want):])
    assert run(DROVER, "check", path).returncode == 0
    assert (name == "error") == (sum(c.failed for c in clients.clients) > 0)
