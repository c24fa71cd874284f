# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real NBD servers on unix sockets for the tests of remote disks."""
import re
import select
import socket
import subprocess
import time


def wait_for_socket(path, process):
    """Returns when somebody listens there."""
    end = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as s:
            try:
                s.connect(str(path))
                return
            except OSError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                select.select([], [], [], 0.01)


class Nbdkit:
    """nbdkit in the foreground, with its log filter on top."""

    def __init__(self, directory, name, *args, filters=(), options=()):
        self.socket = directory / f"{name}.sock"
        self.log = directory / f"{name}.log"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.args = ["nbdkit", "-f", "-U", str(self.socket), *options, "--filter=log", *(f"--filter={f}" for f in filters),
                     *map(str, args), f"logfile={self.log}"]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.args, stderr=subprocess.PIPE)
        wait_for_socket(self.socket, self.process)

    def kill(self):
        """Without a word to its clients."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()

    def requests(self, kind):
        """(offset, count) of each, in their order."""
        found = re.findall(rf"\b{kind} id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", self.log.read_text())
        return [(int(o, 16), int(n, 16)) for o, n in found]

    def connections(self):
        return len(set(re.findall(r"connection=(\d+) Read", self.log.read_text())))

    def most_at_once(self, kind):
        """How many of them were under way at one time."""
        now = most = 0
        for line in self.log.read_text().splitlines():
            if f" {kind} id=" in line:
                now += 1
            elif f" ...{kind} id=" in line:
                now -= 1
            most = max(most, now)
        return most
