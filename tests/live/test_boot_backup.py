# SPDX-License-Identifier: LGPL-2.1-or-later
"""examples/boot-backup.sh boots a machine from an incremental backup, and leaves it as it is."""
import hashlib
import os
import shutil

import pytest

from serving import DROVER, MiB, TOP, drover, run

SCRIPT = os.path.join(TOP, "examples", "boot-backup.sh")


def boot_sector(text):
    """Real-mode code, loaded to 7c00h: it writes itself to the disk's second sector, too, tells the text on the first
    serial port, and halts."""
    begin = bytes.fromhex("31c08ed88ec0")  # ds = es = 0
    write = bytes.fromhex("b80103 b90200 b600 bb007c cd13")  # int 13h, ah = 3: one sector at bx; dl is the drive
    tell = bytes.fromhex("ac 84c0 7406 baf803 ee ebf5 f4 ebfd")  # lodsb, out 3f8h, until 0; then hlt
    at = 0x7C00 + len(begin) + len(write) + 3 + len(tell)
    code = begin + write + b"\xbe" + at.to_bytes(2, "little") + tell + text.encode() + b"\0"
    return code + bytes(510 - len(code)) + b"\x55\xaa"


def hashes():
    found = {}
    for name in os.listdir("."):
        with open(name, "rb") as f:
            found[name] = hashlib.sha256(f.read()).digest()
    return found


@pytest.fixture
def backups(work):
    """A full backup of a disk that does not boot, and an increment that does."""
    if not shutil.which("qemu-system-x86_64") or not shutil.which("nbdkit"):
        pytest.skip("qemu-system-x86_64 or nbdkit is missing")
    drover("create", "-q", "-f", "raw", "disk", 8 * MiB)
    drover("backup", "-q", "-f", "raw", "--bitmap", "b", "disk", "full")
    with open("sector", "wb") as f:
        f.write(boot_sector("it has booted"))
    drover("io", "-f", "raw", "-c", "write -q -s sector 0 512", "disk")
    drover("backup", "-q", "-f", "raw", "--bitmap", "b", "disk", "increment")
    return work


def boot(*args):
    return run("bash", SCRIPT, *args, env={**os.environ, "DROVER": DROVER}, timeout=180)


def test_a_machine_boots_from_an_increment_and_writes_nothing_into_it(backups):
    before = hashes()
    r = boot("increment", "has booted", 120)
    assert r.returncode == 0 and "it has booted" in r.stdout, r.stdout
    assert hashes() == before
    drover("backup", "verify", "backups.json")


def test_a_backup_that_does_not_boot_is_told(backups):
    r = boot("full", "has booted", 8)
    assert r.returncode == 1 and "was not seen" in r.stdout, r.stdout
