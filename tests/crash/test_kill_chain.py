# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes to a family of images: every disk reads as it did, and the
same command finishes the work."""
import json
import os
import shutil

import crashlib
import pytest
import replay
from qcow2kill import TEARS

DROVER = crashlib.DROVER
FORMATS = {'vmdk': ['-o', 'subformat=monolithicSparse'], 'split': ['-o', 'subformat=twoGbMaxExtentSparse'], 'qcow2': []}


def run(directory, *argv, ok=True):
    return crashlib.run(DROVER, *argv, ok=ok, cwd=directory)


class Family:
    """base <- mid <- (top, other), and what each shows."""

    def __init__(self, where, kind):
        self.dir, self.fmt = os.path.join(where, 'made'), 'qcow2' if kind == 'qcow2' else 'vmdk'
        self.expected = os.path.join(where, 'expected')
        os.makedirs(self.dir)
        os.makedirs(self.expected)
        for name, parent, writes in (('base', None, 'write -P 1 0 300k'), ('mid', 'base', 'write -P 2 128k 400k'),
                                     ('top', 'mid', 'write -P 3 200k 64k'), ('other', 'mid', 'write -P 4 500k 64k')):
            more = ['-b', parent, '-F', self.fmt] if parent else []
            run(self.dir, 'create', '-q', '-f', self.fmt, *FORMATS[kind], *more, name, '1M')
            run(self.dir, 'io', '-f', self.fmt, '-c', writes, name)
        with open(os.path.join(self.dir, 'web.vmsd'), 'w', encoding='ascii') as f:
            f.write('snapshot.current = "2"\nsnapshot0.uid = "2"\nsnapshot0.numDisks = "1"\nsnapshot0.disk0.fileName = "mid"\n'
                    'snapshot.numSnapshots = "1"\n')
        for name in ('base', 'mid', 'top', 'other'):
            run(self.dir, 'convert', '-f', self.fmt, '-O', 'raw', name, os.path.join(self.expected, name))

    def differs(self, directory, name, like=None):
        done = run(directory, 'compare', '-f', self.fmt, '-F', 'raw', name, os.path.join(self.expected, like or name),
                   ok=False)
        return done.returncode != 0


def killed(family, where, argv, tear, most=8):
    """Copies in which argv was killed at one of its changes after another; the number of the change comes, too."""
    counted = os.path.join(where, 'counted')
    shutil.copytree(family.dir, counted)
    env = replay.environment(counted, DROVER_COUNT=os.path.join(where, 'count'))
    crashlib.run(DROVER, *argv, cwd=counted, env=env)
    with open(os.path.join(where, 'count'), encoding='ascii') as f:
        total = int(f.read())
    assert total > 0
    for n in crashlib.kill_points(total, most):
        directory = os.path.join(where, 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(family.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n, **({'DROVER_KILL_TEAR': '1'} if tear else {}))
        done = crashlib.run(DROVER, *argv, ok=False, cwd=directory, env=env)
        assert done.returncode in (-9, 0), done.stderr
        yield n, directory


def vmsd_is_whole(directory):
    with open(os.path.join(directory, 'web.vmsd'), encoding='ascii') as f:
        assert f.read().count('numSnapshots') == 1


@TEARS
@pytest.mark.parametrize('way', ['--up', '--down'])
@pytest.mark.parametrize('kind', FORMATS)
def test_deleting_a_snapshot_changes_no_disk_wherever_it_is_killed(kind, way, tear, tmp_path):
    family = Family(str(tmp_path), kind)
    argv = ['snapshot', '-q', '--update-vmsd', way, '-d', 'mid', 'top']
    for n, directory in killed(family, str(tmp_path), argv, tear):
        for name in ('top', 'other'):
            assert not family.differs(directory, name), f'{name}, killed at {n}'
        if way == '--up':
            assert not family.differs(directory, 'base'), n
        vmsd_is_whole(directory)
        if os.path.exists(os.path.join(directory, 'mid')):
            done = run(directory, 'snapshot', '-q', '--update-vmsd', '-d', 'mid', 'top', ok=False)
            assert done.returncode == 0, f'killed at {n}: {done.stderr}'
        assert not os.path.exists(os.path.join(directory, 'mid')), n
        for name in ('top', 'other'):
            assert not family.differs(directory, name), f'{name}, killed at {n} and finished'
        with open(os.path.join(directory, 'web.vmsd'), encoding='ascii') as f:
            assert 'numSnapshots = "0"' in f.read()


@TEARS
@pytest.mark.parametrize('kind', FORMATS)
def test_going_back_leaves_the_disk_as_it_was_or_as_the_snapshot(kind, tear, tmp_path):
    family = Family(str(tmp_path), kind)
    argv = ['snapshot', '-q', '-a', 'base', 'top']
    for n, directory in killed(family, str(tmp_path), argv, tear):
        for name in ('base', 'mid', 'other'):
            assert not family.differs(directory, name), f'{name}, killed at {n}'
        if os.path.exists(os.path.join(directory, 'top')):
            assert not family.differs(directory, 'top') or not family.differs(directory, 'top', 'base'), n
        run(directory, 'recover', 'top')
        assert not family.differs(directory, 'top') or not family.differs(directory, 'top', 'base'), n
        run(directory, *argv)
        assert not family.differs(directory, 'top', 'base'), n


@TEARS
@pytest.mark.parametrize('verb', ['relocate', 'pack'])
@pytest.mark.parametrize('kind', FORMATS)
def test_references_are_old_or_new_wherever_it_is_killed(kind, verb, tear, tmp_path):
    family = Family(str(tmp_path), kind)
    if verb == 'relocate':
        os.mkdir(os.path.join(family.dir, 'sub'))
        names = [f for f in os.listdir(family.dir) if f.startswith('base')]
        for name in names:
            os.rename(os.path.join(family.dir, name), os.path.join(family.dir, 'sub', name))
    else:  # a name that its first sector has no room for, some way round
        run(family.dir, 'rebase', '-u', '-b', './' * 300 + 'base', '-F', family.fmt, 'mid')
    for n, directory in killed(family, str(tmp_path), ['chain', verb, '-q', 'top'], tear):
        done = run(directory, 'chain', verb, '-q', 'top', ok=False)
        assert done.returncode == 0, f'killed at {n}: {done.stderr}'
        for name in ('mid', 'top', 'other'):
            assert not family.differs(directory, name), f'{name}, killed at {n}'


@pytest.mark.parametrize('argv', [('rebase', '-F', 'qcow2', '-b', 'base', 'top'), ('snapshot', '-q', '--down', '-d', 'mid', 'top')],
                         ids=['rebase', 'merge'])
def test_a_record_of_the_parent_counts_wherever_it_is_killed(argv, tmp_path):
    """Of the image that gets another parent, of the old one until then: written to, that one is refused."""
    family = Family(str(tmp_path), 'qcow2')
    os.remove(os.path.join(family.dir, 'other'))
    run(family.dir, 'chain', 'fingerprint', 'top')
    parents = set()
    for n, directory in killed(family, str(tmp_path), argv, False, most=1):
        assert not family.differs(directory, 'top'), n
        if os.path.exists(os.path.join(directory, 'mid')):
            run(directory, 'recover', '-q', 'mid', ok=False)
        parent = json.loads(run(directory, 'info', '--output=json', 'top').stdout)['backing-filename']
        parents.add(parent)
        run(directory, 'io', '-f', 'qcow2', '-c', 'write -P 9 0 64k', parent)
        done = run(directory, 'map', 'top', ok=False)
        assert done.returncode == 1 and 'some blocks were compared' in done.stderr, (n, parent, done)
    assert parents == {'mid', 'base'}
