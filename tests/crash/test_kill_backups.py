# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes while it backs up, prunes or restores: the set names only
what is whole, the next backup misses nothing, and the same command again ends what was begun."""
import json
import os
import shutil

import crashlib
import pytest
from qcow2kill import DROVER, MIB, NEEDS_QEMU, each_kill, leaks_at_most, run, show

pytestmark = NEEDS_QEMU
LONG = crashlib.SOAK > 1
PRUNE = [DROVER, 'backup', 'prune', '-q', '--keep', '2', 'backups.json']
RESTORE = [DROVER, 'restore', '-q', 'b1', 'disk.qcow2']


def backup(target, *more):
    return [DROVER, 'backup', '-q', '--bitmap', 'daily', *more, 'disk.qcow2', target]


def write(directory, *what):
    run(directory, DROVER, 'io', *[a for w in what for a in ('-c', w)], 'disk.qcow2')


def make(directory, n, fmt='qcow2'):
    """A disk, its backups b0 to b(n - 1), what each of them holds, and the disk after more writes."""
    held = []
    os.mkdir(directory)
    run(directory, DROVER, 'create', '-q', '-f', 'qcow2', 'disk.qcow2', MIB)
    for i in range(n):
        write(directory, f'write -P {i + 1} {i * 100}k 200k', f'write -z {i * 130}k 64k')
        run(directory, *backup(f'b{i}', '-O', fmt))
        held.append(show(directory))
    write(directory, 'write -P 77 300k 70k', 'discard 0 64k')
    return held


def names(directory, leaving=False):
    with open(os.path.join(directory, 'backups.json'), encoding='utf-8') as f:
        return [b['name'] for b in json.load(f)['backups'] if leaving or not (b.get('leaving') or b.get('naming'))]


def announced(directory):
    """What a killed backup has announced in the set, and not listed yet."""
    with open(os.path.join(directory, 'backups.json'), encoding='utf-8') as f:
        return [b['name'] for b in json.load(f)['backups'] if b.get('naming')]


def someone_elses_file_stays(directory):
    """What the next backup finds in the place of the announced one is not what was announced."""
    other = directory + '.other'
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(directory, other)
    with open(os.path.join(other, 'b1'), 'wb') as f:
        f.write(b'mine')
    done = run(other, *(a for a in backup('b2', '--full') if a != '-q'))
    assert announced(other) == [] and names(other) == ['b0', 'b2']
    assert 'left alone' in done.stderr
    with open(os.path.join(other, 'b1'), 'rb') as f:
        assert f.read() == b'mine'


def holds(directory, name, want):
    run(directory, DROVER, 'convert', '-O', 'raw', name, 'out.raw')
    with open(os.path.join(directory, 'out.raw'), 'rb') as f:
        assert f.read() == want, name


def whole(directory, held):
    """Each backup that the set names shows what it did."""
    run(directory, DROVER, 'backup', 'verify', '-q', 'backups.json')
    for name in names(directory):
        if int(name[1:]) < len(held):
            holds(directory, name, held[int(name[1:])])


@pytest.mark.parametrize('tear', [False, True] if LONG else [False])
def test_a_killed_backup_is_in_the_set_or_not_and_the_next_one_misses_nothing(tear, tmp_path):
    made = str(tmp_path / 'made')
    held = make(made, 1)
    disk = show(made)
    seen, taken_in = set(), 0
    for directory in each_kill(tmp_path, backup('b1'), tear):
        whole(directory, held + [disk])
        listed = names(directory)
        assert listed in (['b0'], ['b0', 'b1'])
        seen.add(len(listed))
        waiting = announced(directory)
        if waiting:
            someone_elses_file_stays(directory)
        named = os.path.exists(os.path.join(directory, 'b1'))
        assert show(directory) == disk
        write(directory, 'write -P 99 500k 10k')
        after = show(directory)
        again = run(directory, *backup('b2'), ok=False)
        if again.returncode != 0:  # it says so where the bitmap does not tell all
            assert '--full' in again.stderr
            run(directory, *backup('b2', '--full'))
        holds(directory, 'b2', after)
        whole(directory, held + [disk, after])
        assert show(directory) == after
        listed = names(directory)
        assert announced(directory) == [] and ('b1' in listed) == named
        for name in ('b1', 'b1.sums'):
            assert os.path.exists(os.path.join(directory, name)) == named
        taken_in += bool(waiting) and named
    assert 1 in seen and taken_in > 0


@pytest.mark.parametrize('fmt,tear', [('qcow2', False), ('vmdk', True)] + ([('qcow2', True), ('vmdk', False)] if LONG else []))
def test_a_killed_prune_leaves_each_kept_backup_and_goes_on(fmt, tear, tmp_path):
    made = str(tmp_path / 'made')
    held = make(made, 4, fmt)
    marked = 0
    for directory in each_kill(tmp_path, PRUNE, tear):
        whole(directory, held)
        assert names(directory)[-2:] == ['b2', 'b3']
        marked += names(directory) != names(directory, leaving=True)
        run(directory, *PRUNE)
        whole(directory, held)
        assert names(directory, leaving=True) == ['b2', 'b3']
        left = {f for f in os.listdir(directory) if f[0] in 'b.'}
        assert left == {'b2', 'b2.sums', 'b3', 'b3.sums', 'backups.json'}
        run(directory, *backup('b4', '-O', fmt))
        holds(directory, 'b4', show(directory))
    assert marked > 0


@pytest.mark.parametrize('tear', [True, False] if LONG else [True])
def test_a_killed_restore_is_finished_by_another_and_noted_for_the_next_backup(tear, tmp_path):
    made = str(tmp_path / 'made')
    held = make(made, 2)
    before, unfinished = show(made), 0
    for directory in each_kill(tmp_path, RESTORE, tear):
        unfinished += show(directory) != held[1]
        again = run(directory, *backup('b2'), ok=False)
        if again.returncode != 0:
            assert '--full' in again.stderr
            run(directory, *backup('b2', '--full'))
        holds(directory, 'b2', show(directory))
        run(directory, *RESTORE)
        assert show(directory) == held[1]
        leaks_at_most(directory)
    assert unfinished > 0 and before != held[1]


@pytest.mark.parametrize('tear', [False, True] if LONG else [True])
def test_a_killed_backup_into_an_archive_is_in_the_set_or_gone(tear, tmp_path):
    made = str(tmp_path / 'made')
    held = make(made, 1)
    disk, taken_in = show(made), 0
    argv = [DROVER, 'backup', '-q', '--state', 'backups.json', 'disk.qcow2', 'a.vma']
    for directory in each_kill(tmp_path, argv, tear):
        waiting, there = announced(directory), os.path.exists(os.path.join(directory, 'a.vma'))
        assert show(directory) == disk
        run(directory, *backup('b2', '--full'))
        listed = names(directory)
        assert announced(directory) == [] and ('a.vma#disk' in listed) == there
        left = {f for f in os.listdir(directory) if 'a.vma' in f}
        assert not waiting or left <= ({'a.vma', 'a.vma.sums'} if there else set())
        run(directory, DROVER, 'backup', 'verify', '-q', 'backups.json')
        taken_in += bool(waiting) and there
        if there:
            holds(directory, 'vma:a.vma#disk', disk)
        holds(directory, 'b0', held[0])
    assert taken_in > 0
