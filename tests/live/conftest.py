# SPDX-License-Identifier: LGPL-2.1-or-later
import os
import random
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True

import guest  # noqa: E402
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


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory):
    guest.skip_without()
    return guest.make_initramfs(tmp_path_factory.mktemp("guest") / "initramfs.gz")


@pytest.fixture
def boot(initramfs):  # pylint: disable=redefined-outer-name
    """boot(SERVER[, mode]): a guest on its exports."""
    started = []

    def start(server, mode="load", exports=("d",), image=initramfs):
        seed = int(os.environ.get("DROVER_TEST_SEED") or random.randrange(1 << 32))
        print(f"DROVER_TEST_SEED={seed}")
        started.append(guest.Guest(image, [server.uri(e) for e in exports], seed, mode))
        started[-1].go_on()
        return started[-1]

    yield start
    for g in started:
        g.kill()
