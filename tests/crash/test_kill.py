# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each of its changes: the view is unchanged, for other tools too, and
running the command again finishes."""
import os
import shutil

import crashlib
import pytest
import replay


def count_changes(op, chain, where):
    directory = str(where / 'counted')
    shutil.copytree(chain.dir, directory)
    env = replay.environment(directory, DROVER_COUNT=where / 'count')
    done = crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(directory)
    return int((where / 'count').read_text(encoding='ascii'))


def kill_points(total, limit):
    limit *= crashlib.SOAK
    if total <= limit:
        return range(1, total + 1)
    step = total / limit  # the switches are at the end
    return sorted({1 + int(i * step) for i in range(limit)} | set(range(total - 12, total + 1)))


def qemu_problem(op, chain, directory):
    why = crashlib.differs(chain.expected, directory, 'top.vmdk', 'qemu-img')
    if not why or op.other_tools:
        return why
    # commit: for one moment only Drover knows the parent; never the wrong content though
    return why if 'mismatch at' in why or 'differ' in why else None


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('op', crashlib.OPERATIONS, ids=lambda op: op.name)
def test_a_kill_leaves_the_view(op, tear, tmp_path):
    chain = crashlib.Chain(str(tmp_path), **op.chain)
    total = count_changes(op, chain, tmp_path)
    assert total > 0
    for n in kill_points(total, 16 if tear else 40):
        directory = str(tmp_path / 'killed')
        if os.path.exists(directory):
            shutil.rmtree(directory)
        shutil.copytree(chain.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n)
        if tear:
            env['DROVER_KILL_TEAR'] = '1'
        done = crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
        where = f'kill at change {n} of {total}'
        assert done.returncode in (-9, 0), f'{where}: {done.returncode} {done.stderr}'
        why = crashlib.problem(op, chain, directory)
        if not why and crashlib.HAVE_QEMU:
            why = qemu_problem(op, chain, directory)
        assert why is None, f'{where}: {why}'
        if tear or n % 3 == 0 or n > total - 8:
            assert crashlib.finish(op, chain, directory) is None, where


# What recover may say of each, besides that nothing was interrupted.
FINDINGS = ['was not closed after writing: mended', 'left by an interrupted replacement: removed',
            'a commit into its parent was interrupted', ': removed', ': finished']


@pytest.mark.parametrize('name', ['rebase-split', 'commit', 'snapshot-split', 'convert', 'convert-raw',
                                  'convert-split'])
def test_recover_settles_what_a_kill_left(name, tmp_path):
    op = next(o for o in crashlib.OPERATIONS if o.name == name)
    chain = crashlib.Chain(str(tmp_path), **op.chain)
    total = count_changes(op, chain, tmp_path)
    settled = 0
    for n in kill_points(total, 20):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n)
        crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
        path = os.path.join(directory, (op.result or 'top.vmdk') if op.argv[0] == 'convert' else 'top.vmdk')
        where = f'kill at change {n} of {total}'
        there = os.path.exists(path) or any(name.startswith('.') for name in os.listdir(directory))
        if not there:
            continue  # not even a leftover: there is nothing to ask about
        done = crashlib.drover('recover', path, ok=False)
        assert done.returncode == 0, f'{where}: {done.stderr}'
        lines = done.stdout.splitlines()
        if not lines[-1].startswith('Nothing was interrupted'):
            settled += 1
            assert all(any(known in line for known in FINDINGS) for line in lines[:-1]), done.stdout
        assert not [name for name in os.listdir(directory) if name.startswith('.')], where
        assert crashlib.problem(op, chain, directory) is None, where
        if os.path.exists(path):
            assert 'Nothing was interrupted' in crashlib.drover('recover', path).stdout, where
        assert crashlib.finish(op, chain, directory) is None, where
    assert settled > 0


@pytest.mark.parametrize('name', ['convert', 'convert-raw', 'convert-split', 'snapshot'])
def test_running_again_leaves_nothing_of_the_first_run(name, tmp_path):
    op = next(o for o in crashlib.OPERATIONS if o.name == name)
    chain = crashlib.Chain(str(tmp_path), **op.chain)
    total = count_changes(op, chain, tmp_path)
    for n in kill_points(total, 12):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n)
        crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
        assert crashlib.finish(op, chain, directory) is None
        left = [d for d in os.listdir(directory)
                if d.startswith('.') and os.listdir(os.path.join(directory, d))]
        assert not left, f'kill at change {n} of {total}'
