# SPDX-License-Identifier: LGPL-2.1-or-later
"""From an overlay to a plain raw disk, killed again and again on the way."""
import os
import shutil

import crashlib
import pytest
import replay
from addcowchain import TOP, AddCowChain, content
from crashlib import DROVER, run


def killed_at(n, directory, *argv):
    """Did the program end before its n-th change?"""
    env = replay.environment(directory, DROVER_KILL_AT=n)
    done = run(DROVER, *argv, os.path.join(directory, TOP), ok=False, env=env)
    assert done.returncode in (0, -9), (n, argv, done.stderr)
    return done.returncode == 0


def looks_right(chain, directory, where):
    """Whether the overlay is still there; what is there shows what it must."""
    if os.path.exists(os.path.join(directory, TOP)):
        assert chain.wrong_view(directory, TOP) is None, where
        return True
    assert content(directory, 'top.raw') == chain.view, where
    return False


@pytest.mark.parametrize('sizes', [(200000, 0, 150 * 1024 + 100), (90000, 0, 200 * 1024)], ids=str)
def test_streamed_resumed_retired_with_a_kill_at_every_step(sizes, tmp_path):
    chain = AddCowChain(str(tmp_path), sizes=sizes, bare=True)
    directory, ends = str(tmp_path / 'killed'), 0
    for n in range(1, 400):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        streamed = killed_at(n, directory, 'stream')
        assert looks_right(chain, directory, f'stream killed at {n}')
        killed_at(1 + n // 2, directory, 'stream')  # goes on, and is killed again
        assert looks_right(chain, directory, f'resumed stream killed at {1 + n // 2}')
        crashlib.drover('stream', os.path.join(directory, TOP))
        assert looks_right(chain, directory, f'stream finished after {n}')
        retired = killed_at(n, directory, 'addcow', 'retire')
        if looks_right(chain, directory, f'retire killed at {n}'):
            crashlib.drover('addcow', 'retire', os.path.join(directory, TOP))
        assert not looks_right(chain, directory, f'retired after {n}')
        assert chain.changed_parent(directory) is None
        if crashlib.HAVE_QEMU and chain.size % 512 == 0:
            run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', os.path.join(directory, 'top.raw'), chain.expected)
        ends += streamed and retired
        if ends:
            return
    pytest.fail('it does not end')
