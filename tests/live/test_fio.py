# SPDX-License-Identifier: LGPL-2.1-or-later
"""fio's NBD client, which checks the sums of what it wrote, on a disk whose chain changes all the time."""
import os
import shutil
import threading

import pytest

from qmp import Control
from serving import MiB, drover, ok, run, DROVER

SIZE = 16 * MiB


class Fio(threading.Thread):
    """Writes at random and verifies, again and again, with another seed each time."""

    def __init__(self, uri):
        super().__init__()
        self.uri, self.rounds, self.stop, self.error = uri, 0, False, None
        self.news = threading.Condition()
        self.start()

    def command(self, seed, *more):
        return ["fio", "--name=f", "--ioengine=nbd", f"--uri={self.uri}", "--rw=randwrite", "--bsrange=512-128k",
                "--blockalign=512", "--iodepth=16", f"--size={SIZE}", "--io_size=6m", "--verify=crc32c",
                "--verify_fatal=1", "--fsync=32", f"--randseed={seed}", *more]

    def run(self):
        while not self.stop and not self.error:
            r = run(*self.command(self.rounds + 1, "--verify_backlog=16"), timeout=240)
            with self.news:
                self.rounds += 1
                self.error = r.stdout if r.returncode or "verify:" in r.stdout else None
                self.news.notify_all()

    def end(self):
        self.stop = True
        self.join()
        assert not self.error, self.error


def work(control, fmt, n):
    """Every kind of job, one after another."""
    def do(command, **arguments):
        control.ask(command, device="d", job_id="job", **arguments)
        states = []
        for state in control.states("job"):
            states.append(state)
            if state == "ready":
                control.ask("job-complete", id="job")
        assert "BLOCK_JOB_COMPLETED" in states, states

    def snapshot(name):
        control.ask("blockdev-snapshot-sync", device="d", snapshot_file=os.path.abspath(name), format=fmt)

    (bottom, _), = control.chain()
    a, b, c = (f"{x}{n}" for x in "abc")
    snapshot(a)
    snapshot(b)
    do("block-stream", base=bottom)
    os.unlink(a)
    snapshot(c)
    do("block-commit", top=os.path.abspath(b), base=bottom)
    os.unlink(b)
    do("block-commit", base=bottom)
    os.unlink(c)
    do("drive-mirror", target=os.path.abspath(f"m{n}"), sync="full", format=fmt)


@pytest.mark.parametrize("fmt", ["vmdk", "qcow2"])
def test_fio_finds_every_block_that_it_wrote_whatever_job_runs(serve, fmt):
    if not shutil.which("fio") or "nbd" not in ok("fio", "--enghelp"):
        pytest.skip("fio with its nbd engine is missing")
    drover("create", "-q", "-f", fmt, "disk", SIZE)
    server = serve("disk", f"format={fmt}", "control=control", "export=d")
    fio = Fio(server.uri("d"))
    control = Control()
    n = 0
    while (fio.rounds < 2 or n < 2) and not fio.error:
        work(control, fmt, n)
        n += 1
    (path, _), = control.chain()
    control.close()
    fio.end()
    server.stop()
    assert run(DROVER, "check", path).returncode == 0
    server = serve(path, f"format={fmt}", "read-only=true")
    fio.uri = server.uri()
    ok(*fio.command(fio.rounds, "--verify_only=1"), timeout=240)
