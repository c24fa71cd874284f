# SPDX-License-Identifier: LGPL-2.1-or-later
"""Long commands: what they show, and that an interruption leaves everything as it was."""
import json
import re
import shutil
import signal
import subprocess

import pytest
from vmarun import SANITIZED


def big(t):
    t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "64M")
    t.io("base.vmdk", "write -P 1 0 32M")
    t.ok("snapshot", "-q", "-c", "top.vmdk", "base.vmdk")
    t.io("top.vmdk", "write -P 2 16M 16M")


def slow(t, *args):
    """Start a command that would take minutes, and wait until it has begun."""
    p = subprocess.Popen([t.bin / "drover", *args], cwd=t.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(p.stderr.readline())["total"] > 0
    return p


SLOW = [["convert", "-r", "1M", "--progress=json", "top.vmdk", "out.raw"],
        ["commit", "-r", "1M", "--progress=json", "top.vmdk"],
        ["rebase", "-r", "1M", "--progress=json", "-b", "", "top.vmdk"],
        ["stream", "-r", "1M", "--progress=json", "top.vmdk"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("args", SLOW, ids=lambda a: a[0])
def test_an_interrupted_command_says_so_and_leaves_the_view(t, args, number):
    big(t)
    t.ok("convert", "top.vmdk", "before.raw")
    names = t.names()
    p = slow(t, *args)
    p.send_signal(number)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 128 + number
    assert re.search(r"^drover: interrupted: .+$", err, flags=re.M)
    assert t.names() == names
    t.ok("compare", "-F", "raw", "top.vmdk", "before.raw")
    again = [a for a in args if not a.startswith("--progress")]
    again[again.index("1M")] = "1G"
    t.ok(*again)
    t.ok("compare", "-F", "raw", "top.vmdk", "before.raw")


@pytest.mark.parametrize("args", SLOW, ids=lambda a: a[0])
def test_sigusr1_shows_how_far_it_is(t, args):
    big(t)
    p = subprocess.Popen([t.bin / "drover", *(a for a in args if a != "--progress=json")], cwd=t.dir, stderr=subprocess.PIPE,
                         text=True)
    try:
        while not handles(p.pid):  # sent any earlier, the signal would end the program
            assert p.poll() is None
        p.send_signal(signal.SIGUSR1)
        assert re.match(r"^    \(\d+\.\d\d/100%\)\n$", p.stderr.readline())
        assert p.poll() is None
    finally:
        p.kill()
        p.communicate()


def handles(pid):
    with open(f"/proc/{pid}/status") as f:
        caught = int(re.search(r"^SigCgt:\s*(\w+)", f.read(), flags=re.M).group(1), 16)
    return caught >> (signal.SIGUSR1 - 1) & 1


@pytest.mark.parametrize("args", [["convert", "top.vmdk", "out.raw"], ["rebase", "-b", "", "top.vmdk"], ["commit", "top.vmdk"],
                                  ["stream", "top.vmdk"], ["compare", "top.vmdk", "top.vmdk"]], ids=lambda a: a[0])
def test_progress_is_shown_when_asked(t, args):
    big(t)
    (t.dir.parent / "copy").mkdir()
    for name in ("base.vmdk", "top.vmdk"):
        (t.dir.parent / "copy" / name).write_bytes((t.dir / name).read_bytes())
    out = t.ok(*args[:1], "-p", *args[1:])
    shown = re.findall(r"    \(([\d.]+)/100%\)\r", out)
    assert shown[0] == "0.00" and shown[-1] == "100.00"
    assert [float(s) for s in shown] == sorted(float(s) for s in shown)
    r = t.drover(*args[:1], "--progress=json", *args[1:], cwd=t.dir.parent / "copy")
    lines = [json.loads(line) for line in r.err.splitlines()]
    assert r.code == 0 and lines[-1]["percent"] == 100 and all(set(x) == {"done", "total", "percent"} for x in lines)


def test_quiet_is_quiet(t):
    big(t)
    for args in (["convert", "-p", "-q", "top.vmdk", "out.raw"], ["compare", "-p", "-q", "top.vmdk", "out.raw"],
                 ["check", "-q", "top.vmdk"], ["rebase", "-p", "-q", "-b", "", "top.vmdk"], ["create", "-q", "x", "1M"]):
        assert t.ok(*args) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_shell_says_that_a_signal_ended_it(t, number):
    t.ok("create", "-q", "a.raw", "1M")
    p = subprocess.Popen([t.bin / "drover", "io", "-f", "raw", "a.raw"], cwd=t.dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    assert p.stdout.read(8) == "drover> "  # it waits for a command
    p.send_signal(number)
    _, err = p.communicate(timeout=30)
    assert (p.returncode, err) == (128 + number, "drover: interrupted: what was not flushed may be lost\n")


def test_a_creation_that_is_interrupted_leaves_nothing(t):
    p = subprocess.Popen([t.bin / "drover", "create", "-o", "preallocation=full", "big.raw", "16G"], cwd=t.dir,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not t.names() and p.poll() is None:  # the private directory: it has begun
        pass
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and err == "drover: interrupted: 'big.raw' is as it was before\n"
    assert t.names() == []


def test_a_snapshot_is_made_whole_in_spite_of_a_signal(t):
    if SANITIZED or not shutil.which("strace"):
        pytest.skip("needs strace, which the leak checker does not stand")
    t.ok("create", "-q", "-f", "vmdk", "a.vmdk", "1M")
    done = t.start("strace", "-f", "-o", "/dev/null", "-e", "inject=mkdir,mkdirat:signal=SIGINT:when=1",
                   t.bin / "drover", "snapshot", "-c", "a.vmdk")
    assert (done.code, done.out) == (0, "a-000001.vmdk\n"), done
    assert t.names() == ["a-000001.vmdk", "a.vmdk"]
