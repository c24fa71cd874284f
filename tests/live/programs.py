# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random programs on a served disk that know what they must read, and random jobs below them."""
import os
import random
import threading

import pytest

from qmp import Refused
from serving import MiB, drover, extents, io

nbd = pytest.importorskip("nbd")

LENGTHS = [1, 511, 512, 4096, 65536, 200000]


def new_seed():
    """Told, so that a failure can be had again: the output of a test that fails is shown."""
    seed = int(os.environ.get("DROVER_TEST_SEED") or random.randrange(1 << 32))
    print(f"DROVER_TEST_SEED={seed}")
    return seed


class Program(threading.Thread):
    """One client at work in its own part of the disk, against a copy in memory, for so many steps or until `stop`."""

    def __init__(self, server, seed, part, steps=None, export="", trims=True, maps=True):
        super().__init__()
        self.trims, self.maps = trims, maps
        self.rng, self.steps, self.done = random.Random(seed), steps, 0
        self.handle = server.connect(export)
        self.base, self.size = part
        self.shadow = bytearray(self.handle.pread(self.size, self.base))
        self.stop, self.error, self.news = False, None, threading.Condition()
        self.start()

    def run(self):
        try:
            while not self.stop and self.done != self.steps:
                self.step()
                with self.news:
                    self.done += 1
                    self.news.notify_all()
            self.check(0, self.size)
        except Exception as e:  # pylint: disable=broad-except
            with self.news:
                self.error = e
                self.news.notify_all()

    def go_on(self, n):
        """Wait until it has done n more steps."""
        with self.news:
            until = self.done + n
            assert self.news.wait_for(lambda: self.done >= until or self.error, 240)
        assert not self.error, self.error

    def end(self):
        """It leaves, having seen nothing wrong: what is in its part."""
        self.stop = self.steps is None
        self.join(300)
        assert not self.is_alive() and not self.error, self.error
        self.handle.flush()
        self.handle.shutdown()
        return bytes(self.shadow)

    def check(self, off, length):
        got = self.handle.pread(length, self.base + off)
        wrong = next((i for i in range(length) if got[i] != self.shadow[off + i]), None) \
            if got != self.shadow[off:off + length] else None
        assert wrong is None, f"step {self.done}: {length} at {self.base + off}: first wrong at {self.base + off + wrong}"

    def step(self):
        rng, h = self.rng, self.handle
        off = rng.randrange(self.size)
        length = min(self.size - off, rng.choice(LENGTHS))
        what = rng.choice(["write", "write", "zero", "hole", "trim", "read", "read", "extents", "flush"])
        if (what in ("zero", "hole") and not h.can_zero()) or (what == "trim" and not (self.trims and h.can_trim())):
            what = "write"  # a filter may not have them
        if what == "write":
            data = rng.randbytes(length)
            h.pwrite(data, self.base + off, rng.choice([0, nbd.CMD_FLAG_FUA]))
            self.shadow[off:off + length] = data
        elif what in ("zero", "hole"):
            h.zero(length, self.base + off, nbd.CMD_FLAG_NO_HOLE if what == "zero" else 0)
            self.shadow[off:off + length] = bytes(length)
        elif what == "trim":
            h.trim(length, self.base + off)
            got = h.pread(length, self.base + off)
            assert all(g in (0, s) for g, s in zip(got, self.shadow[off:off + length])), "a trim shows other bytes"
            self.shadow[off:off + length] = got
        elif what == "read":
            self.check(off, length)
        elif what == "extents" and self.maps:
            self.check_extents(off, length)
        else:
            h.flush()

    def check_extents(self, off, length):
        """Only what reads as zeros is called so."""
        at = off
        for n, flags in extents(self.handle, length, self.base + off):
            part = self.shadow[at:min(at + n, off + length)]
            assert not flags & 2 or not any(part), f"step {self.done}: {n} from {self.base + at} are called zeros"
            at += n


class Jobs:
    """Jobs at random on one disk. Every one of them ends as it was told to, and leaves no image that nobody needs."""

    def __init__(self, control, seed, fmt, size, can_grow, disk="d"):
        self.control, self.rng, self.fmt, self.size, self.disk = control, random.Random(seed), fmt, size, disk
        self.can_grow, self.count = can_grow, 0

    def run_one(self, between=lambda: None):
        chain = self.control.chain(self.disk)
        kinds = ["mirror"] + ["snapshot"] * (3 if len(chain) < 5 else 0)
        kinds += ["resize"] if self.can_grow else []
        kinds += ["stream", "commit"] * (2 if len(chain) > 1 else 0) + ["rebase"] * (len(chain) > 1)
        kinds += ["middle", "middle", "below", "delete"] * (len(chain) > 2)
        kind = self.rng.choice(kinds)
        self.count += 1
        print(f"{self.count}: {kind} on {[(os.path.basename(f), d) for f, d in chain]}")
        getattr(self, kind)(chain, between)
        self.clean(chain)

    def name(self):
        return os.path.abspath(f"image{self.count}")

    def snapshot(self, _chain, _between):
        self.control.ask("blockdev-snapshot-sync", device=self.disk, snapshot_file=self.name(),
                         format=self.fmt)

    def resize(self, _chain, _between):
        self.size += self.rng.randrange(2) * 512 * 1024
        self.control.ask("block_resize", device=self.disk, size=self.size)

    def stream(self, chain, between):
        base = self.rng.choice([None] + [f for f, _ in chain[1:]])
        self.job("block-stream", between, base=base)

    def commit(self, chain, between):
        self.job("block-commit", between, base=self.rng.choice(chain[1:])[0])

    def middle(self, chain, between):
        """Of images below the active one."""
        top = self.rng.randrange(1, len(chain) - 1)
        base = self.rng.randrange(top + 1, len(chain))
        self.job("block-commit", between, top=chain[top][0], base=chain[base][0])

    def below(self, chain, between):
        """Fill an image below the active one."""
        at = self.rng.randrange(1, len(chain) - 1)
        self.job("block-stream", between, x_image=chain[at][0],
                 base=self.rng.choice([None] + [f for f, _ in chain[at + 1:]]))

    def delete(self, chain, between):
        """An image in the middle goes, up or down, and its file with it."""
        at = self.rng.randrange(1, len(chain) - 1)
        self.job("x-drover-delete", between, image=chain[at][0], down=self.rng.randrange(2) == 0, remove=True)
        assert os.path.exists(chain[at][0]) == (chain[at] in self.control.chain(self.disk))

    def rebase(self, chain, between):
        """Onto another image of the chain, or onto one that has something else."""
        at = self.rng.randrange(len(chain) - 1)
        file, fmt = self.rng.choice(chain[at + 1:] + [(self.name(), self.fmt)])
        if file == self.name():
            drover("create", "-q", "-f", fmt, file, self.size)
            io(file, f"write -P {self.count % 255 + 1} {self.rng.randrange(16) * 65536} 1M", fmt=fmt)
        self.job("x-drover-rebase", between, x_image=chain[at][0], backing_file=file, backing_format=fmt)

    def mirror(self, _chain, between):
        self.job("drive-mirror", between, target=self.name(), sync="full", format=self.fmt)

    def job(self, command, between, **arguments):
        """Begin one, perhaps slow, perhaps paused for a while, perhaps cancelled; follow it to its end."""
        cancel, slow = self.rng.randrange(5) == 0, self.rng.randrange(3) == 0
        print(f"    {command} {arguments}{' slow' if slow else ''}{' cancelled' if cancel else ''}")
        self.control.ask(command, device=self.disk, job_id="job", speed=MiB if slow else None, **arguments)
        between()
        if slow:
            self.say("job-pause")
            between()
            self.say("job-resume")
            self.say("block-job-set-speed", device="job", speed=0)
        if cancel:
            self.say("job-cancel")
        states = []
        for state in self.control.states("job"):
            states.append(state)
            if state == "ready" and not cancel:
                between()
                self.say("job-complete")
        assert "BLOCK_JOB_COMPLETED" in states or (cancel and "BLOCK_JOB_CANCELLED" in states), states

    def say(self, verb, **arguments):
        """A verb that comes too late, or too early, is refused: that is right, too."""
        try:
            self.control.ask(verb, **(arguments or {"id": "job"}))
        except Refused as e:
            print(f"    {verb}: {e}")

    def clean(self, before):
        """Remove images that have left the chain: while they are there, nothing may go down into their parents."""
        needed = {f for f, _ in self.control.chain(self.disk)}
        for file, _ in before:
            if file not in needed and os.path.exists(file):
                os.unlink(file)
        if os.path.exists(self.name()) and self.name() not in needed:
            os.unlink(self.name())  # what a mirror that was cancelled had copied
