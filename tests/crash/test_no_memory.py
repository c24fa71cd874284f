# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where memory is short a command says so: it never prints half of an answer and succeeds."""
import os
import subprocess

import pytest

from crashlib import DROVER, drover, write

LIBRARY = os.environ.get('DROVER_NO_MEMORY') or os.path.join(os.path.dirname(DROVER), 'tests', 'crash',
                                                             'libdrover-no-memory.so')
QUESTIONS = [
    ('info', '--output=json', '--backing-chain', 'top.qcow2'),
    ('info', '--backing-chain', 'top.qcow2'),
    ('info', '--output=json', 'disk.vmdk'),
    ('check', '--output=json', 'top.qcow2'),
    ('map', '--output=json', 'top.qcow2'),
    ('measure', '--output=json', '-O', 'qcow2', 'top.qcow2'),
    ('snapshot', '-l', 'top.qcow2'),
]


@pytest.fixture(name='images', scope='module')
def fixture_images(tmp_path_factory):
    if not os.path.exists(LIBRARY):
        pytest.skip(f'{LIBRARY} is not built')
    where = tmp_path_factory.mktemp('images')
    before = os.getcwd()
    os.chdir(where)
    drover('create', '-q', '-f', 'qcow2', 'base.qcow2', '1M')
    drover('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'top.qcow2')
    drover('create', '-q', '-f', 'vmdk', 'disk.vmdk', '1M')
    for name in ('base.qcow2', 'top.qcow2'):
        write(name, 'qcow2', [(7, 65536 * (name == 'top.qcow2'), 65536)])
    drover('snapshot', '-c', 'one', 'top.qcow2')
    drover('bitmap', '--add', 'top.qcow2', 'marks')
    yield where
    os.chdir(before)


def ask(question, where, **env):
    # Where the locale cannot be loaded, plain ASCII is printed.
    env = dict(os.environ, LC_ALL='C', LD_PRELOAD=LIBRARY, **env)
    return subprocess.run([DROVER, *question], cwd=where, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          check=False, timeout=60)


@pytest.mark.parametrize('question', QUESTIONS, ids=lambda q: ' '.join(q[:-1]))
def test_an_answer_is_whole_or_a_failure(images, tmp_path, question):
    count = tmp_path / 'count'
    whole = ask(question, images, DROVER_ALLOCATIONS=str(count))
    assert whole.returncode == 0, whole.stderr
    n = int(count.read_text())
    assert n > 20
    failures = 0
    for at in range(1, n + 1, -(-n // 120)):
        done = ask(question, images, DROVER_NO_MEMORY_AT=str(at))
        if done.returncode != 0:
            failures += 1
            assert done.returncode == 1 and done.stderr, (at, done)
        else:
            assert done.stdout == whole.stdout, at
    assert failures > 10
