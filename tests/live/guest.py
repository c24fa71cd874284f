# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Linux guest under TCG on a served disk, and a judge of what a copy of its disk must hold.

`./dev deps` unpacks the kernel into build-guest; guest-init.c is all that runs on it."""
import copy
import glob
import gzip
import os
import re
import shutil
import struct
import subprocess
import threading
import zlib

import pytest

from serving import DROVER, MiB, TOP, ok, run

KERNEL = os.path.join(TOP, "build-guest")
INIT = os.path.join(os.path.dirname(DROVER), "tests", "live", "guest-init")
SIZE = 64 * MiB
BLOCK, BLOCKS = 4096, 1024


def skip_without():
    for tool in ("qemu-system-x86_64", "mke2fs", "e2fsck", "debugfs"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is missing")
    if not glob.glob(KERNEL + "/boot/vmlinuz-*"):
        pytest.skip("no kernel for a guest: ./dev deps unpacks one")
    if not os.path.exists(INIT):
        pytest.skip("no static libraries to build the kernel's init from")


def archive(entries):
    """A cpio archive, as the kernel reads it: [(name, mode, content or (major, minor))]."""
    out = b""
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")]):
        device = content if isinstance(content, tuple) else (0, 0)
        content = b"" if isinstance(content, tuple) else content
        fields = (number + 1, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return out


def add_module(modules, name):
    """Append a module behind those that it needs. The kernel may have any of them built in."""
    for path in glob.glob(f"{KERNEL}/lib/modules/*/kernel/**/{name}.ko", recursive=True):
        content = content_of(path)
        for needed in re.search(rb"\0depends=([^\0]*)", content).group(1).decode().split(","):
            add_module(modules, needed)
        if content not in modules:
            modules.append(content)


def content_of(path):
    with open(path, "rb") as f:
        return f.read()


def add_program(entries, path):
    """Append a program of the host, and the libraries that it needs."""
    paths = {path, *re.findall(r"(/\S+) \(0x", ok("ldd", path))}
    have = {name for name, _, _ in entries}
    for path in paths:
        parts = path.strip("/").split("/")
        for n in range(1, len(parts)):
            entries += [("/".join(parts[:n]), 0o40755, b"")] if "/".join(parts[:n]) not in have else []
            have.add("/".join(parts[:n]))
        if path.strip("/") not in have:
            entries.append((path.strip("/"), 0o100755, content_of(path)))
            have.add(path.strip("/"))


def make_initramfs(path, modules=(), programs=()):
    """programs: names of the host's, which are found in /sbin."""
    entries = [(name, 0o40755, b"") for name in ("dev", "mnt", "modules", "proc", "sys", "sbin", "run", "etc", "tmp")]
    entries += [("dev/console", 0o20600, (5, 1)), ("init", 0o100755, content_of(INIT))]
    for name in programs:
        real = os.path.realpath(shutil.which(name))
        add_program(entries, real)
        if os.path.dirname(real) != "/sbin":
            entries.append((f"sbin/{name}", 0o120777, real.encode()))
    wanted, modules = modules, []
    for name in ("virtio_pci", "virtio_blk", "ext4", *wanted):
        add_module(modules, name)
    for number, module in enumerate(modules):
        entries.append((f"modules/{number:02}.ko", 0o100644, module))
    with gzip.open(path, "wb", 1) as f:
        f.write(archive(entries))
    return path


def make_file_system(path, size=SIZE):
    """An ext4 with an empty "db", and with our init for machines that boot from it."""
    os.makedirs("tree/sbin")
    shutil.copy(INIT, "tree/sbin/init")
    with open("tree/db", "wb") as f:
        f.truncate(BLOCK * BLOCKS)
    with open(path, "wb") as f:
        f.truncate(size)
    ok("mke2fs", "-q", "-t", "ext4", "-d", "tree", path)
    shutil.rmtree("tree")
    return path


class Told:
    """What the guest has told by some moment."""

    def __init__(self):
        self.files, self.gone, self.blocks, self.version = {}, set(), {}, 0
        self.log = []  # all of it, in order: (what, number, ...)

    def take(self, words):
        what, numbers = words[0], [int(w) for w in words[1:]]
        self.log.append((what, *numbers))
        if what == "file":
            self.files[numbers[0]] = tuple(numbers[1:])
        elif what == "gone":
            self.gone.add(numbers[0])
        else:
            self.blocks[numbers[0]] = self.version = numbers[1]


class Guest:
    """A running machine; its thread listens to what it tells."""

    def __init__(self, initramfs, uris, seed, mode="load"):
        disks = []
        for n, uri in enumerate(uris):
            disks += ["-blockdev", f"driver=nbd,node-name=d{n},discard=unmap,server.type=unix,server.path={socket_path(uri)},"
                      f"export={uri.split('/')[3].split('?')[0]}", "-device", f"virtio-blk-pci,drive=d{n}"]
        kernel, = glob.glob(KERNEL + "/boot/vmlinuz-*")
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "160", "-nodefaults",
             "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernel,
             "-initrd", str(initramfs), "-append",
             f"console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable "
             f"nowatchdog rcupdate.rcu_cpu_stall_suppress=1 mode={mode} seed={seed}", *disks],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.told, self.steps, self.lines = Told(), 0, []
        self.ended, self.trouble = False, None
        self.news = threading.Condition()
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self):
        for line in self.process.stdout:
            line = line.decode(errors="replace").strip()
            with self.news:
                if re.fullmatch(r"(file \d+ \d+ \d+|gone \d+|block \d+ \d+)", line):
                    self.told.take(line.split())
                    self.steps += 1
                else:
                    self.lines.append(line)
                    if re.search(r"^bad |I/O error|EXT4-fs (error|warning)|Kernel panic|BUG:|Call Trace", line):
                        self.trouble = self.trouble or line
                self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    def go_on(self, n=30):
        """Wait until it has told n more things, and none of them is bad."""
        with self.news:
            until = self.steps + n
            got = self.news.wait_for(lambda: self.steps >= until or self.ended or self.trouble, 240)
        assert got and not self.ended and not self.trouble, "\n".join(self.lines)

    def now(self):
        with self.news:
            return copy.deepcopy(self.told)

    def end(self):
        """Let it unmount and power off; what it had told."""
        self.process.stdin.write(b"q\n")
        self.process.stdin.flush()
        self.process.wait(240)
        self.thread.join()
        assert not self.trouble and "end" in self.lines, "\n".join(self.lines)
        return self.told

    def kill(self):
        """Its power fails; what it had told."""
        self.process.kill()
        self.process.wait(60)
        self.thread.join()
        return self.told


def socket_path(uri):
    return re.search("socket=([^&]*)", uri).group(1)


# ---------------------------------------------------------------- judging a copy of the disk

def check_block(block, number, least, most):
    found, version, crc = struct.unpack("<QQQ", block[:24])
    assert found == number and zlib.crc32(block[24:]) == crc, f"block {number} is damaged"
    assert least <= version <= most, f"block {number}: version {version}, expected {least} to {most}"


def read_files(copy_of_disk):
    """All files of a raw copy, into "found". The copy is changed: its journal is replayed."""
    r = run("e2fsck", "-f", "-p", copy_of_disk)
    # A mounted ext4 does not keep the totals in its superblock up to date, and its journal does not bring them back.
    wrong = re.sub(r"Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.\s+FIXED\.", "", r.stdout)
    assert r.returncode in (0, 1) and "FIXED" not in wrong, r.stdout
    shutil.rmtree("found", ignore_errors=True)
    os.mkdir("found")
    ok("debugfs", "-R", "rdump / found", copy_of_disk)


def judge(copy_of_disk, before, after, at_least=20):
    """A raw copy holds everything that the guest had told before it was made or frozen, and nothing from a time after
    it. It is changed: its journal is replayed."""
    read_files(copy_of_disk)
    must = {n: f for n, f in before.files.items() if n not in after.gone}
    assert len(must) >= at_least, "the test looks at too few files"
    for number, (size, crc) in must.items():
        assert os.path.exists(f"found/f{number}"), f"file {number} is missing"
        with open(f"found/f{number}", "rb") as f:
            data = f.read()
        assert (len(data), zlib.crc32(data)) == (size, crc), f"file {number} is damaged"
    with open("found/db", "rb") as f:
        for number, version in before.blocks.items():
            f.seek(number * BLOCK)
            check_block(f.read(BLOCK), number, version, after.version + 1)


def found_files():
    """{number: (size, checksum)} of what read_files() has found."""
    out = {}
    for name in os.listdir("found"):
        if re.fullmatch(r"f\d+", name):
            with open(f"found/{name}", "rb") as f:
                data = f.read()
            out[int(name[1:])] = (len(data), zlib.crc32(data))
    return out


def found_versions():
    """{number: version} of the blocks of "db" that were written."""
    out = {}
    with open("found/db", "rb") as f:
        for number in range(BLOCKS):
            block = f.read(BLOCK)
            if any(block):
                check_block(block, number, 1, 1 << 62)
                out[number] = struct.unpack_from("<Q", block, 8)[0]
    return out


def step_told(log):
    """The least that steps_of() may say of a disk when all of `log` had been told before: it counts by blocks."""
    return max((i for i, s in enumerate(log) if s[0] == "block"), default=-1)


def steps_of(log):
    """After how many steps the disk was as what read_files() has found: each step is durable before the next begins, so
    one instant has all steps of some number and none behind it, but the one that was under way."""
    files, versions = found_files(), found_versions()
    last = max(versions.values())
    step = next((i for i, s in enumerate(log) if s[0] == "block" and s[2] == last), len(log))
    want_files, want_versions = {}, {}
    for what, number, *more in log[:step + 1]:
        if what == "file":
            want_files[number] = tuple(more)
        elif what == "gone":
            del want_files[number]
        else:
            want_versions[number] = more[0]
    if step == len(log):  # it was not told any more; what the block held before is gone
        number = next(n for n, v in versions.items() if v == last)
        del versions[number]
        want_versions.pop(number, None)
    # What comes behind that block may be under way: a removal, which the next sync makes durable, and a file.
    under_way = {number for what, number, *_ in log[step + 1:step + 3] if what != "block"}
    assert versions == {**want_versions, **{n: v for n, v in versions.items() if v == last}}
    for number in want_files.keys() | files.keys():
        if number not in under_way:
            assert files.get(number) == want_files.get(number), f"file {number} at step {step}"
    return step
