# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that stands still behind a system call, for what somebody else does in between."""
import contextlib
import os
import shutil
import signal
import subprocess

import pytest


def stopped_child(pid):
    """The traced process, once it stands still by its signal."""
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        child = f.read().split()
    trace = f"/proc/{pid}/cwd/trace"
    if not child or not os.path.exists(trace):
        return 0
    with open(trace) as f:
        return int(child[0]) if "stopped by SIGSTOP" in f.read() else 0


@contextlib.contextmanager
def stopped(cwd, call, *args, path=None, sanitized=False):
    """Goes on at the end: then returncode and err are there."""
    if sanitized or not shutil.which("strace"):
        pytest.skip("needs strace, which the leak checker does not stand")
    where = ["-P", path] if path else []
    with subprocess.Popen(["strace", "-o", "trace", *where, "-e", "trace=" + call, "-e", f"inject={call}:signal=STOP:when=1", *args],
                          cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
        while not (pid := stopped_child(p.pid)):
            assert p.poll() is None, p.stderr.read()
        try:
            yield p
        finally:
            os.kill(pid, signal.SIGCONT)
            p.err = p.communicate(timeout=60)[1].decode()
