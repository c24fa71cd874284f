# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes to the snapshots inside a qcow2 image: the
disk and every snapshot show what they did, and qemu-img finds leaks at most, which its -r leaks mends."""
import os

import pytest
from qcow2kill import DROVER, MIB, NEEDS_QEMU, ROUNDS, each_kill, info, leaks_at_most, run, show

ACTIONS = {'create': ['-i', '-c', 'two', 'disk.qcow2'], 'apply': ['-a', 'one', 'disk.qcow2'],
           'delete': ['-d', 'one', 'disk.qcow2']}

pytestmark = NEEDS_QEMU


def names(directory):
    return [s['name'] for s in info(directory).get('snapshots', [])]


def make(directory, options):
    os.mkdir(directory)
    run(directory, DROVER, 'create', '-q', '-f', 'qcow2', *options, 'disk.qcow2', MIB)
    run(directory, DROVER, 'io', '-c', 'write -P 1 0 500k', 'disk.qcow2')
    first = show(directory)
    run(directory, DROVER, 'snapshot', '-i', '-c', 'one', 'disk.qcow2')
    run(directory, DROVER, 'io', '-c', 'write -P 2 300k 400k', '-c', 'discard 0 64k', 'disk.qcow2')
    return first, show(directory)


def check(directory, action, first, second):
    disk = show(directory)
    assert disk == second or (action == 'apply' and disk == first)
    assert 'one' in names(directory) or action == 'delete'
    for name in names(directory):
        assert show(directory, name) == (first if name == 'one' else second)
    leaks_at_most(directory)


@ROUNDS
@pytest.mark.parametrize('action', ACTIONS)
def test_a_kill_leaves_every_view(action, options, tear, tmp_path):
    first, second = make(str(tmp_path / 'made'), options)
    for directory in each_kill(tmp_path, [DROVER, 'snapshot', *ACTIONS[action]], tear):
        check(directory, action, first, second)
        run(directory, DROVER, 'io', '-c', 'write -P 7 0 1M', 'disk.qcow2')
        run(directory, 'qemu-img', 'check', '-q', 'disk.qcow2')
        for name in names(directory):
            assert show(directory, name) == (first if name == 'one' else second)
