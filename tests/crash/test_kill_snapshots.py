# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes to the snapshots inside a qcow2 image: the
disk and every snapshot show what they did, and qemu-img finds leaks at most, which its -r leaks mends."""
import json
import os
import shutil

import crashlib
import pytest
import replay

DROVER = os.environ.get('DROVER', 'drover')
MIB = 1 << 20
ACTIONS = {'create': ['-i', '-c', 'two', 'disk.qcow2'], 'apply': ['-a', 'one', 'disk.qcow2'],
           'delete': ['-d', 'one', 'disk.qcow2']}

pytestmark = pytest.mark.skipif(not crashlib.HAVE_QEMU, reason='qemu-img is the witness')


def show(directory, snapshot=None):
    argv = ['-l', snapshot] if snapshot else []
    crashlib.run('qemu-img', 'convert', *argv, '-O', 'raw', 'disk.qcow2', 'out.raw', cwd=directory)
    with open(os.path.join(directory, 'out.raw'), 'rb') as f:
        return f.read()


def names(directory):
    info = crashlib.run('qemu-img', 'info', '--output=json', 'disk.qcow2', cwd=directory).stdout
    return [s['name'] for s in json.loads(info).get('snapshots', [])]


def make(directory, options):
    def run(*argv):
        crashlib.run(*argv, cwd=directory)
    os.mkdir(directory)
    run(DROVER, 'create', '-q', '-f', 'qcow2', *options, 'disk.qcow2', MIB)
    run(DROVER, 'io', '-c', 'write -P 1 0 500k', 'disk.qcow2')
    first = show(directory)
    run(DROVER, 'snapshot', '-i', '-c', 'one', 'disk.qcow2')
    run(DROVER, 'io', '-c', 'write -P 2 300k 400k', '-c', 'discard 0 64k', 'disk.qcow2')
    return first, show(directory)


def killed(directory, action, **how):
    env = replay.environment(directory, **how)
    done = crashlib.run(DROVER, 'snapshot', *ACTIONS[action], ok=False, cwd=directory, env=env)
    assert done.returncode in (-9, 0), done.stderr


def check(directory, action, first, second):
    disk = show(directory)
    assert disk == second or (action == 'apply' and disk == first)
    assert 'one' in names(directory) or action == 'delete'
    for name in names(directory):
        assert show(directory, name) == (first if name == 'one' else second)
    found = crashlib.run('qemu-img', 'check', '-q', 'disk.qcow2', ok=False, cwd=directory)
    assert found.returncode in (0, 3), found.stderr  # 3: leaks, and no corruption
    crashlib.run('qemu-img', 'check', '-q', '-r', 'leaks', 'disk.qcow2', ok=False, cwd=directory)
    crashlib.run('qemu-img', 'check', '-q', 'disk.qcow2', cwd=directory)


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('options', [(), ('-o', 'cluster_size=512')], ids=['usual', 'small-clusters'])
@pytest.mark.parametrize('action', ACTIONS)
def test_a_kill_leaves_every_view(action, options, tear, tmp_path):
    first, second = make(str(tmp_path / 'made'), options)
    shutil.copytree(tmp_path / 'made', tmp_path / 'counted')
    killed(str(tmp_path / 'counted'), action, DROVER_COUNT=tmp_path / 'count')
    total = int((tmp_path / 'count').read_text(encoding='ascii'))
    assert total > 3
    for n in range(1, total + 1, total // (12 * crashlib.SOAK) + 1):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / 'made', directory)
        killed(directory, action, DROVER_KILL_AT=n, **({'DROVER_KILL_TEAR': '1'} if tear else {}))
        check(directory, action, first, second)
        crashlib.run(DROVER, 'io', '-c', 'write -P 7 0 1M', 'disk.qcow2', cwd=directory)
        crashlib.run('qemu-img', 'check', '-q', 'disk.qcow2', cwd=directory)
        for name in names(directory):
            assert show(directory, name) == (first if name == 'one' else second)
