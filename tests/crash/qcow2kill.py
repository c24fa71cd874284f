# SPDX-License-Identifier: LGPL-2.1-or-later
"""For the tests that kill the real program while it changes disk.qcow2 in a directory: the kills, and qemu-img as the
witness of what is left."""
import json
import os
import shutil

import crashlib
import pytest
import replay

DROVER = os.environ.get('DROVER', 'drover')
MIB = 1 << 20

NEEDS_QEMU = pytest.mark.skipif(not crashlib.HAVE_QEMU, reason='qemu-img is the witness')
USUAL, SMALL = (), ('-o', 'cluster_size=512')
# Torn: of the change at which the kill comes, the first half is there. A short run does half of these.
_ROUNDS = {'usual-between': (USUAL, False), 'small-clusters-torn': (SMALL, True)}
if crashlib.SOAK > 1:
    _ROUNDS |= {'usual-torn': (USUAL, True), 'small-clusters-between': (SMALL, False)}
TEARS = pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
ROUNDS = pytest.mark.parametrize('options,tear', _ROUNDS.values(), ids=_ROUNDS.keys())


def run(directory, *argv, ok=True):
    return crashlib.run(*argv, ok=ok, cwd=directory)


def show(directory, snapshot=None, name='disk.qcow2'):
    """What the guest sees."""
    argv = ['-l', snapshot] if snapshot else []
    run(directory, 'qemu-img', 'convert', *argv, '-O', 'raw', name, 'out.raw')
    with open(os.path.join(directory, 'out.raw'), 'rb') as f:
        return f.read()


def info(directory, name='disk.qcow2'):
    return json.loads(run(directory, 'qemu-img', 'info', '--output=json', name).stdout)


def leaks_at_most(directory, name='disk.qcow2'):
    """A check that finds errors ends with 2, one that finds leaks with 3; these can be given back."""
    done = run(directory, 'qemu-img', 'check', '-q', name, ok=False)
    assert done.returncode in (0, 3), done.stderr
    run(directory, 'qemu-img', 'check', '-q', '-r', 'leaks', name, ok=False)
    run(directory, 'qemu-img', 'check', '-q', name)


def _run_watched(directory, argv, **how):
    done = crashlib.run(*argv, ok=False, cwd=directory, env=replay.environment(directory, **how))
    assert done.returncode in (-9, 0), done.stderr


def each_kill(tmp_path, argv, tear):
    """tmp_path/made is as before, and tmp_path/counted as after argv has run to its end; yields a copy of the former
    in which argv was killed, at one of its changes after another."""
    shutil.copytree(tmp_path / 'made', tmp_path / 'counted')
    _run_watched(str(tmp_path / 'counted'), argv, DROVER_COUNT=tmp_path / 'count')
    total = int((tmp_path / 'count').read_text(encoding='ascii'))
    assert total > 0
    for n in crashlib.kill_points(total, 12):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / 'made', directory)
        _run_watched(directory, argv, DROVER_KILL_AT=n, **({'DROVER_KILL_TEAR': '1'} if tear else {}))
        yield directory
