# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Linux guest that writes and syncs on a served disk while a series of backups is made of it: each holds exactly what
was durable at one instant of its own."""
import os
import shutil

import pytest

import guest
from serving import drover

LONG = bool(os.environ.get("DROVER_TEST_LONG"))
pytestmark = pytest.mark.usefixtures("initramfs")
# Of the disk: how many backups, and of which formats the full one and its children are.
SERIES = {
    "raw": (10, "qcow2", "qcow2"),
    "vmdk": (4, "vmdk", "vmdk"),
    "qcow2": (4, "qcow2", "qcow2"),
    "add-cow": (4, "raw", "add-cow"),
}


def make_disk(fmt):
    guest.make_file_system("fs.raw")
    if fmt == "add-cow":
        drover("create", "-q", "-f", fmt, "-b", "fs.raw", "-F", "raw", "disk")
    elif fmt == "raw":
        os.rename("fs.raw", "disk")
    else:
        drover("convert", "-O", fmt, "fs.raw", "disk")


class Series:
    """Backups of the disk "d" of a server, one after another."""

    def __init__(self, machine, full, child):
        self.machine, self.formats = machine, (full, child)
        self.before, self.after = [], []  # what was told before and after each

    def back_up(self, *more):
        n = len(self.before)
        self.before.append(self.machine.now().log)
        drover("ctl", "control", "backup", "--state", "set.json", "--bitmap", "daily", "-f", self.formats[n > 0],
               "-r", "10M", *more, "d", f"b{n}", timeout=240)
        self.after.append(self.machine.now().log)

    def names(self):
        return [f"b{n}" for n in range(len(self.before))]

    def judge(self, names, log):
        """Each is an instant that came after the one before and after what had been told before it was begun."""
        last = -1
        for name in names:
            fmt = self.formats[name != "b0"]
            drover("convert", "-f", fmt, "-O", "raw", name, "copy.raw", timeout=240)
            guest.read_files("copy.raw")
            step = guest.steps_of(log)
            assert step >= max(last, guest.step_told(self.before[int(name[1:])])), name
            last = step


@pytest.mark.parametrize("fmt", SERIES)
def test_each_backup_of_a_series_holds_exactly_what_was_durable_at_its_instant(serve, boot, fmt):
    n, full, child = SERIES[fmt]
    make_disk(fmt)
    server = serve("disk", f"format={fmt}", "control=control", "export=d")
    machine = boot(server)
    machine.go_on(100)
    series = Series(machine, full, child)
    for i in range(10 if LONG else n):
        series.back_up(*(["--spill", "."] if i % 3 == 2 else []))
        machine.go_on(40)
    told = machine.kill()
    assert not machine.trouble
    server.stop()
    names = series.names()
    series.judge(names, told.log)
    drover("backup", "verify", "set.json", timeout=240)
    meanwhile = sum(len(after) - len(before) for before, after in zip(series.before, series.after))
    assert meanwhile > len(names), "the guest was hardly at work meanwhile"

    # What is kept of them after a prune shows the same, and a restored disk, too.
    drover("backup", "prune", "--keep", "3", "set.json", timeout=240)
    series.judge(names[-3:], told.log)
    drover("restore", names[-2], "disk", timeout=240)
    shutil.rmtree("found")
    drover("convert", "-f", fmt, "-O", "raw", "disk", "copy.raw")
    guest.read_files("copy.raw")
    assert guest.steps_of(told.log) >= guest.step_told(series.before[-2])


def test_a_backup_that_mixes_two_instants_is_told_from_others(serve, boot):
    make_disk("raw")
    server = serve("disk", "format=raw", "control=control", "export=d")
    machine = boot(server)
    machine.go_on(100)
    series = Series(machine, "raw", "add-cow")
    series.back_up()
    machine.go_on(600)
    series.back_up()
    told = machine.kill()
    server.stop()
    drover("convert", "-f", "add-cow", "-O", "raw", "b1", "copy.raw")
    size = guest.SIZE
    with open("copy.raw", "r+b") as new, open("b0", "rb") as old:
        for at in range(size // 4, size, size // 8):  # all but the tables at the beginning
            old.seek(at)
            new.seek(at)
            new.write(old.read(size // 16))
    with pytest.raises((AssertionError, StopIteration)):
        guest.read_files("copy.raw")
        guest.steps_of(told.log)
