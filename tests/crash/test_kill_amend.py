# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that amend, and resize with preallocation, make to a
qcow2 image: the disk and its snapshot show what they did, qemu-img finds nothing that its -r leaks
does not mend, and the same command finishes it."""
import json
import os
import shutil

import crashlib
import pytest
import replay

DROVER = os.environ.get('DROVER', 'drover')
MIB = 1 << 20
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

pytestmark = pytest.mark.skipif(not crashlib.HAVE_QEMU, reason='qemu-img is the witness')


def show(directory, snapshot=None):
    argv = ['-l', snapshot] if snapshot else []
    crashlib.run('qemu-img', 'convert', *argv, '-O', 'raw', 'disk.qcow2', 'out.raw', cwd=directory)
    with open(os.path.join(directory, 'out.raw'), 'rb') as f:
        return f.read()


def settings(directory):
    info = json.loads(crashlib.run('qemu-img', 'info', '--output=json', 'disk.qcow2', cwd=directory).stdout)
    return info['virtual-size'], info['format-specific']


def make(directory, options, snapshot):
    def run(*argv):
        crashlib.run(*argv, cwd=directory)
    os.mkdir(directory)
    run(DROVER, 'create', '-q', '-f', 'qcow2', '-o', ','.join(options), 'disk.qcow2', MIB)
    run(DROVER, 'io', '-c', 'write -P 1 0 500k', '-c', 'write -z 600k 100k', 'disk.qcow2')
    if snapshot:
        run(DROVER, 'snapshot', '-i', '-c', 'one', 'disk.qcow2')
    run(DROVER, 'io', '-c', 'write -P 2 300k 100k', '-c', 'write -z 0 64k', 'disk.qcow2')


def killed(directory, command, **how):
    done = crashlib.run(DROVER, *command, ok=False, cwd=directory, env=replay.environment(directory, **how))
    assert done.returncode in (-9, 0), done.stderr


def check(directory, views):
    """At most space is lost: a check that finds errors ends with 2, one that finds leaks with 3."""
    for snapshot, view in views.items():
        now = show(directory, snapshot)
        assert now[:MIB] == view and not any(now[MIB:])
    assert crashlib.run('qemu-img', 'check', '-q', 'disk.qcow2', ok=False, cwd=directory).returncode in (0, 3)
    crashlib.run('qemu-img', 'check', '-q', '-r', 'leaks', 'disk.qcow2', ok=False, cwd=directory)
    crashlib.run('qemu-img', 'check', '-q', 'disk.qcow2', cwd=directory)


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('case', CASES)
def test_a_kill_leaves_every_view_and_the_command_finishes(case, tear, tmp_path):
    options, snapshot, command = CASES[case]
    made, counted, directory = (str(tmp_path / name) for name in ('made', 'counted', 'killed'))
    make(made, options, snapshot)
    views = {s: show(made, s) for s in ([None, 'one'] if snapshot else [None])}
    shutil.copytree(made, counted)
    killed(counted, command, DROVER_COUNT=tmp_path / 'count')
    done, old = settings(counted), settings(made)
    total = int((tmp_path / 'count').read_text(encoding='ascii'))
    assert total > 0 and done != old
    for n in range(1, total + 1, total // (12 * crashlib.SOAK) + 1):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(made, directory)
        killed(directory, command, DROVER_KILL_AT=n, **({'DROVER_KILL_TEAR': '1'} if tear else {}))
        check(directory, views)
        if 'resize' in command:
            assert settings(directory)[0] in (old[0], done[0])
        if settings(directory) != done:
            crashlib.run(DROVER, *command, cwd=directory)
        assert settings(directory) == done
        check(directory, views)
        crashlib.run(DROVER, 'io', '-c', 'write -P 7 0 1M', 'disk.qcow2', cwd=directory)
        crashlib.run('qemu-img', 'check', '-q', 'disk.qcow2', cwd=directory)
        if snapshot:
            assert show(directory, 'one')[:MIB] == views['one']
