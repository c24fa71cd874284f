# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running the program on archives: with limits on time and memory, never a signal, nothing raw for a terminal."""
import os
import re
import resource
import subprocess

import pytest
from conftest import DROVER

MIB = 1 << 20
# As UTF-8: control characters from 0x80 on, ends of lines, changes of direction.
STEERING = rb"\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]"


def sanitized():
    with open(DROVER, "rb") as f:
        text = f.read()
    return b"__asan_init" in text or b"__tsan_init" in text


SANITIZED = os.path.exists(DROVER) and sanitized()


class Ran:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def text(self):
        return self.out.decode(errors="backslashreplace")

    @property
    def errors(self):
        return self.err.decode(errors="backslashreplace")

    def __repr__(self):
        return f"<exit {self.code}\n--- out\n{self.text[:3000]}--- err\n{self.errors[:3000]}>"


class Vma:
    """The program under its names, in a directory of its own: dir. What the tests say it is called."""

    def __init__(self, tmp_path):
        self.dir = tmp_path / "work"
        self.bin = tmp_path / "bin"
        self.dir.mkdir()
        self.bin.mkdir()
        for name in ("drover", "vma"):
            os.symlink(DROVER, self.bin / name)

    def start(self, *args, stdin=None, env=None, memory=512 * MIB, file_size=None, cwd=None, **kw):
        args = [str(self.bin / args[0]), *map(str, args[1:])]
        full = {**os.environ, "LC_ALL": "C", "TZ": "UTC", **(env or {})}
        # Limits are set from outside: with a preexec_fn Python would copy itself for each start.
        p = subprocess.Popen(args, cwd=cwd or self.dir, stdin=subprocess.DEVNULL if stdin is None else stdin,
                             stdout=kw.pop("stdout", subprocess.PIPE), stderr=kw.pop("stderr", subprocess.PIPE),
                             env=full, **kw)
        try:
            resource.prlimit(p.pid, resource.RLIMIT_CORE, (0, 0))
            if memory and not SANITIZED:
                resource.prlimit(p.pid, resource.RLIMIT_AS, (memory, memory))
            if file_size is not None:
                resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (file_size, file_size))
        except ProcessLookupError:  # it was quick
            pass
        return p

    def run(self, *args, stdin=None, timeout=60, raw=False, **kw):
        p = self.start(*args, stdin=subprocess.PIPE if isinstance(stdin, bytes) else stdin, **kw)
        try:
            out, err = p.communicate(stdin if isinstance(stdin, bytes) else None, timeout)
        except subprocess.TimeoutExpired:
            p.kill()
            out, err = p.communicate()
            pytest.fail(f"{args} did not end: {Ran(None, out, err)}")
        r = Ran(p.returncode, out, err)
        assert 0 <= r.code < 100 or r.code == 255, (args, r)  # 255: no such configuration file
        assert not bad_bytes(err) and (raw or not bad_bytes(out)), (args, r)
        return r

    def vma(self, *args, **kw):
        return self.run("vma", *args, **kw)

    def drover(self, *args, **kw):
        return self.run("drover", "vma", *args, **kw)

    def ok(self, *args, **kw):
        """args: the name first."""
        r = self.run(*args, **kw)
        assert r.code == 0, (args, r)
        return r

    def fails(self, *args, **kw):
        r = self.run(*args, **kw)
        assert r.code != 0, (args, r)
        assert r.err.startswith(args[0].encode() + b": "), (args, r)
        return r.errors

    def put(self, name, data):
        (self.dir / name).write_bytes(data)
        return name

    def get(self, name):
        return (self.dir / name).read_bytes()

    def names(self):
        return sorted(os.listdir(self.dir))


def bad_bytes(data):
    """Control characters that a terminal would act on; progress may return the carriage."""
    return bytes(set(data) & (set(range(32)) - set(b"\n\r\t") | {127})) or re.findall(STEERING, data)


@pytest.fixture
def v(tmp_path):
    if not os.path.exists(DROVER):
        pytest.skip(f"{DROVER} is not built")
    import shutil  # pylint: disable=import-outside-toplevel
    yield Vma(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


def same_files(directory, expected):
    """The directory holds exactly these files: {name: bytes}."""
    found = sorted(os.listdir(directory))
    assert found == sorted(expected), (found, sorted(expected))
    for name, data in expected.items():
        path = os.path.join(directory, name)
        size = os.path.getsize(path)
        assert size == len(data), f"{name}: {size} bytes instead of {len(data)}"
        with open(path, "rb") as f:
            content = f.read()
        if content != data:
            at = next(i for i, (x, y) in enumerate(zip(content, data)) if x != y)
            raise AssertionError(f"{name}: byte {at} differs")
