# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the command-line tests share: running the program under its three names, next to the real tools."""
import os
import re
import shutil
import subprocess

import pytest

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DROVER = os.path.abspath(os.environ.get("DROVER", os.path.join(TOP, "build", "drover")))


class Result:
    def __init__(self, process):
        self.code = process.returncode
        self.out = process.stdout.decode(errors="replace")
        self.err = process.stderr.decode(errors="replace")

    def __repr__(self):
        return f"<exit {self.code}\n--- out\n{self.out}--- err\n{self.err}>"


class Tools:
    """drover, and the same program as qemu-img and qemu-io ("ours"), and the real ones."""

    def __init__(self, tmp_path):
        self.dir = tmp_path / "work"
        self.dir.mkdir()
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        for name in ("drover", "qemu-img", "qemu-io"):
            os.symlink(DROVER, self.bin / name)

    def start(self, program, *args, stdin="", cwd=None, env=None, timeout=60):
        full = {**os.environ, "LC_ALL": "C", **(env or {})}
        return Result(subprocess.run([str(program), *map(str, args)], cwd=cwd or self.dir, input=stdin.encode(),
                                     capture_output=True, env=full,
                                     timeout=timeout, check=False))

    def drover(self, *args, **kw):
        return self.start(self.bin / "drover", *args, **kw)

    def ours(self, tool, *args, **kw):
        return self.start(self.bin / tool, *args, **kw)

    def real(self, tool, *args, **kw):
        path = shutil.which(tool)
        if not path or os.path.realpath(path) == os.path.realpath(DROVER):
            pytest.skip(f"the real {tool} is not installed")
        return self.start(path, *args, **kw)

    def ok(self, *args, **kw):
        r = self.drover(*args, **kw)
        assert r.code == 0, r
        return r.out

    def io(self, image, *commands, fmt=None, options=()):
        args = ["io", *options]
        if fmt:
            args += ["-f", fmt]
        for c in commands:
            args += ["-c", c]
        r = self.drover(*args, image)
        assert r.code == 0 and "failed" not in r.out, r
        return r.out

    def names(self):
        return sorted(os.listdir(self.dir))


_made = {}


def once(t, key, make):
    """Fill t.dir as make() does; made once a session, then copied."""
    if key not in _made:
        make()
        _made[key] = t.dir.parent.parent / f"template-{len(_made)}"  # next to the tests' own directories
        shutil.copytree(t.dir, _made[key])
    else:
        shutil.copytree(_made[key], t.dir, dirs_exist_ok=True)


@pytest.fixture
def t(tmp_path):
    if not os.path.exists(DROVER):
        pytest.skip(f"{DROVER} is not built")
    yield Tools(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)  # hundreds of disks would stay for pytest's last three runs


def without_times(text):
    """Drop what no two runs share: seconds and speeds."""
    text = re.sub(r"; \S+( sec)? \([^)]*/sec and [\d.]+ ops/sec\)", "; TIME", text)
    return re.sub(r"^(\d+,\d+),.*$", r"\1,TIME", text, flags=re.M)


def same(ours, real, filter=lambda text: text):
    lines = zip(filter(ours.out).splitlines(), filter(real.out).splitlines())
    for number, (mine, theirs) in enumerate(lines, 1):  # the first difference says more than both texts
        assert mine == theirs, f"line {number}"
    assert (filter(ours.out), filter(ours.err), ours.code) == (filter(real.out), filter(real.err), real.code)
