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
