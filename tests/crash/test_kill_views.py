# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes to a qcow2 image with another parent: rebase, flatten and
stream, with snapshots inside, and with compression. The disk and its snapshots show what they did, to
qemu-img, too, and the same command finishes."""
import os

import crashlib
import pytest
from qcow2kill import DROVER, MIB, NEEDS_QEMU, ROUNDS, each_kill, info, leaks_at_most, run, show

pytestmark = NEEDS_QEMU

# name: a snapshot inside, the parent afterwards, the command
CASES = {
    'rebase': (True, 'other.qcow2', ['rebase', '-b', 'other.qcow2', '-F', 'qcow2']),
    'rebase-shorter': (True, 'short.qcow2', ['rebase', '-b', 'short.qcow2', '-F', 'qcow2']),
    'rebase-drop-equal': (False, 'other.qcow2', ['rebase', '--drop-equal', '-b', 'other.qcow2', '-F', 'qcow2']),
    'rebase-compressed': (True, 'other.qcow2', ['rebase', '-c', '-b', 'other.qcow2', '-F', 'qcow2']),
    'flatten': (True, None, ['rebase', '-b', '']),
    'flatten-compressed': (True, None, ['rebase', '-c', '-b', '']),
    'flatten-compressed-alone': (False, None, ['rebase', '-c', '-b', '']),
    'stream': (True, None, ['stream']),
    'stream-to-base': (True, 'base.qcow2', ['stream', '--base', 'base.qcow2']),
}


def make(directory, options, snapshot):
    """base <- mid <- disk; other and short have some of what base has, and something else."""
    os.mkdir(directory)

    def image(name, size, *writes, backing=None):
        parent = ['-b', backing, '-F', 'qcow2'] if backing else []
        run(directory, DROVER, 'create', '-q', '-f', 'qcow2', *options, *parent, name, size)
        run(directory, DROVER, 'io', *[a for w in writes for a in ('-c', w)], name)
    image('base.qcow2', MIB, 'write -P 1 0 300k', 'write -P 2 500k 100k')
    image('mid.qcow2', MIB, 'write -P 3 200k 70k', 'write -z 550k 10k', backing='base.qcow2')
    image('other.qcow2', MIB, 'write -P 1 0 100k', 'write -P 4 400k 300k')
    image('short.qcow2', MIB // 2, 'write -P 1 0 100k', 'write -P 4 400k 100k')
    image('disk.qcow2', MIB, 'write -P 5 64k 64k', 'write -z 280k 30k', backing='mid.qcow2')
    if snapshot:
        run(directory, DROVER, 'snapshot', '-i', '-c', 'one', 'disk.qcow2')
    run(directory, DROVER, 'io', '-c', 'write -P 6 100k 90k', '-c', 'write -P 7 900k 20k', 'disk.qcow2')


def parents(directory):
    names = [n for n in sorted(os.listdir(directory)) if n.endswith('.qcow2') and n != 'disk.qcow2']
    return {n: open(os.path.join(directory, n), 'rb').read() for n in names}


@ROUNDS
@pytest.mark.parametrize('case', CASES)
def test_a_kill_leaves_every_view_and_the_command_finishes(case, options, tear, tmp_path):
    snapshot, parent, command = CASES[case]
    argv, made = [DROVER, *command, 'disk.qcow2'], str(tmp_path / 'made')
    make(made, options, snapshot)
    views = {s: show(made, s) for s in ([None, 'one'] if snapshot else [None])}
    others = parents(made)
    unfinished = 0

    def same(directory):
        for s, view in views.items():
            assert show(directory, s) == view
        assert parents(directory) == others

    for directory in each_kill(tmp_path, argv, tear):
        same(directory)
        leaks_at_most(directory)
        unfinished += info(directory).get('backing-filename') != parent
        run(directory, *argv)
        assert info(directory).get('backing-filename') == parent
        same(directory)
        leaks_at_most(directory)
        crashlib.drover('io', '-c', 'write -P 8 0 1M', 'disk.qcow2', cwd=directory)
        run(directory, 'qemu-img', 'check', '-q', 'disk.qcow2')
        if snapshot:
            assert show(directory, 'one') == views['one']
    assert unfinished > 0
