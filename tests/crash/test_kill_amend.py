# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that amend, and resize with preallocation, make to a
qcow2 image: the disk and its snapshot show what they did, qemu-img finds nothing that its -r leaks
does not mend, and the same command finishes it."""
import os

import pytest
from qcow2kill import DROVER, MIB, NEEDS_QEMU, TEARS, each_kill, info, leaks_at_most, run, show

# name: create's options, a snapshot inside, the command
CASES = {
    'wider': (['refcount_bits=8'], True, ['amend', '-o', 'refcount_bits=64', 'disk.qcow2']),
    'narrower': (['cluster_size=512', 'refcount_bits=64'], False, ['amend', '-o', 'refcount_bits=1', 'disk.qcow2']),
    'upgrade': (['compat=0.10'], True, ['amend', '-o', 'compat=1.1,lazy_refcounts=on', 'disk.qcow2']),
    'downgrade': (['cluster_size=512'], True, ['amend', '-o', 'compat=0.10', 'disk.qcow2']),
    'metadata': (['cluster_size=4k'], True, ['resize', '--preallocation=metadata', 'disk.qcow2', '3M']),
    'falloc': (['cluster_size=64k'], False, ['resize', '--preallocation=falloc', 'disk.qcow2', '3M']),
    'full': (['extended_l2=on'], False, ['resize', '--preallocation=full', 'disk.qcow2', '3M']),
}

pytestmark = NEEDS_QEMU


def settings(directory):
    now = info(directory)
    return now['virtual-size'], now['format-specific']


def make(directory, options, snapshot):
    os.mkdir(directory)
    run(directory, DROVER, 'create', '-q', '-f', 'qcow2', '-o', ','.join(options), 'disk.qcow2', MIB)
    run(directory, DROVER, 'io', '-c', 'write -P 1 0 500k', '-c', 'write -z 600k 100k', 'disk.qcow2')
    if snapshot:
        run(directory, DROVER, 'snapshot', '-i', '-c', 'one', 'disk.qcow2')
    run(directory, DROVER, 'io', '-c', 'write -P 2 300k 100k', '-c', 'write -z 0 64k', 'disk.qcow2')


def check(directory, views):
    for snapshot, view in views.items():
        now = show(directory, snapshot)
        assert now[:MIB] == view and not any(now[MIB:])
    leaks_at_most(directory)


@TEARS
@pytest.mark.parametrize('case', CASES)
def test_a_kill_leaves_every_view_and_the_command_finishes(case, tear, tmp_path):
    options, snapshot, command = CASES[case]
    argv, made = [DROVER, *command], str(tmp_path / 'made')
    make(made, options, snapshot)
    views = {s: show(made, s) for s in ([None, 'one'] if snapshot else [None])}
    old = settings(made)
    for directory in each_kill(tmp_path, argv, tear):
        done = settings(str(tmp_path / 'counted'))
        assert done != old
        check(directory, views)
        if 'resize' in command:
            assert settings(directory)[0] in (old[0], done[0])
        if settings(directory) != done:
            run(directory, *argv)
        assert settings(directory) == done
        check(directory, views)
        run(directory, DROVER, 'io', '-c', 'write -P 7 0 1M', 'disk.qcow2')
        run(directory, 'qemu-img', 'check', '-q', 'disk.qcow2')
        if snapshot:
            assert show(directory, 'one')[:MIB] == views['one']
