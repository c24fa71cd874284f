# SPDX-License-Identifier: LGPL-2.1-or-later
import os
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True

import serving  # noqa: E402


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty directory to be in; what is temporary goes to one beside it."""
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path / "work"


@pytest.fixture
def serve(work):
    """serve(PARAMETER..., options=[nbdkit's], env={more variables}) starts nbdkit with our plugin; all of them end with the test."""
    if not shutil.which("nbdkit") or not os.path.exists(serving.PLUGIN):
        pytest.skip("nbdkit or our plugin is missing")
    started = []

    def start(*parameters, options=(), env=None):
        started.append(serving.Server(work, parameters, options, len(started), env))
        return started[-1].wait_ready()

    yield start
    for server in started:
        server.kill()
