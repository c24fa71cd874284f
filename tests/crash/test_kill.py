# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each of its changes: the view is unchanged, for other tools too, and
running the command again finishes."""
import os
import shutil

import addcowchain
import crashlib
import pytest
import replay
import vmachain

ALL = crashlib.OPERATIONS + addcowchain.OPERATIONS + vmachain.OPERATIONS


def count_changes(op, chain, where):
    directory = str(where / 'counted')
    shutil.copytree(chain.dir, directory)
    env = replay.environment(directory, DROVER_COUNT=where / 'count')
    done = crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(directory)
    return int((where / 'count').read_text(encoding='ascii'))


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('op', ALL, ids=lambda op: op.name)
def test_a_kill_leaves_the_view(op, tear, tmp_path):
    chain = op.make(tmp_path)
    total = count_changes(op, chain, tmp_path)
    assert total > 0
    # Few points: test_power looks at what is left after each change, torn or not, at far more of them.
    for n in crashlib.kill_points(total, 10 * chain.share // 2):
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
        why = chain.problem(op, directory)
        if not why and crashlib.HAVE_QEMU:
            why = chain.qemu_problem(op, directory)
        assert why is None, f'{where}: {why}'
        if tear or n % 3 == 0 or n > total - 8:
            assert crashlib.finish(op, chain, directory) is None, where


def everything(directory):
    return {os.path.relpath(os.path.join(top, name), directory): os.path.getsize(os.path.join(top, name))
            for top, _, files in os.walk(directory) for name in files}


@pytest.mark.parametrize('op', vmachain.OPERATIONS, ids=lambda op: op.name)
def test_an_interrupt_leaves_what_was_there_or_all_that_was_wanted(op, tmp_path):
    chain = op.make(tmp_path)
    total, ended = count_changes(op, chain, tmp_path), set()
    before = everything(chain.dir)
    for n in crashlib.kill_points(total, 60):
        directory = str(tmp_path / 'interrupted')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        done = crashlib.run(*op.command(directory), ok=False, cwd=directory,
                            env=replay.environment(directory, DROVER_INTERRUPT_AT=n))
        where = f'interrupt at change {n} of {total}: {done.returncode} {done.stderr}'
        ended.add(done.returncode)
        assert chain.problem(op, directory) is None, where
        if done.returncode == 0:
            assert os.path.exists(os.path.join(directory, op.result)), where
            assert chain.unsound(directory) is None, where
            continue
        assert done.returncode == 130 and done.stderr.count('\n') == 1 and 'interrupted: ' in done.stderr, where
        after = everything(directory)
        if '--resume' in op.argv:
            after = {name: size for name, size in after.items() if '.drover.partial' not in name}
        assert after == before, where
    assert ended == ({0} if op.name == 'vma-index' else {0, 130})  # an index so small is there before it could be given up


# What recover may say of each, besides that nothing was interrupted.
FINDINGS = ['was not closed after writing: mended', 'left by an interrupted replacement: removed',
            'a commit into its parent was interrupted', ': removed', ': finished']


@pytest.mark.parametrize('name', ['rebase-split', 'commit', 'snapshot-split', 'convert', 'convert-raw',
                                  'convert-split', 'addcow-rebase-long-name', 'addcow-convert',
                                  'addcow-create', 'addcow-snapshot'])
def test_recover_settles_what_a_kill_left(name, tmp_path):
    op = next(o for o in ALL if o.name == name)
    chain = op.make(tmp_path)
    total = count_changes(op, chain, tmp_path)
    settled = 0
    for n in crashlib.kill_points(total, 20):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n)
        crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
        path = os.path.join(directory, op.result if op.argv[0] in ('convert', 'create') else chain.top)
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
        assert chain.problem(op, directory) is None, where
        if os.path.exists(path):
            assert 'Nothing was interrupted' in crashlib.drover('recover', path).stdout, where
        assert crashlib.finish(op, chain, directory) is None, where
    assert settled > 0


@pytest.mark.parametrize('name', ['convert', 'convert-raw', 'convert-split', 'snapshot',
                                  'addcow-create', 'addcow-convert'])
def test_running_again_leaves_nothing_of_the_first_run(name, tmp_path):
    op = next(o for o in ALL if o.name == name)
    chain = op.make(tmp_path)
    total = count_changes(op, chain, tmp_path)
    for n in crashlib.kill_points(total, 12):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n)
        crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
        assert crashlib.finish(op, chain, directory) is None
        left = [d for d in os.listdir(directory)
                if d.startswith('.') and os.listdir(os.path.join(directory, d))]
        assert not left, f'kill at change {n} of {total}'


@pytest.mark.parametrize('again', [False, True], ids=['recovered', 'run-again'])
def test_a_kill_while_a_split_disk_is_replaced_leaves_the_old_or_the_new(again, tmp_path):
    """Several files cannot change at once: for a moment the name may lead nowhere, never to a mix."""
    op = crashlib.Operation('replace', 'convert', '-f', 'vmdk', '-O', 'vmdk', '-o',
                            'subformat=twoGbMaxExtentSparse', '{d}/top.vmdk', '{d}/out.vmdk')
    chain = crashlib.Chain(str(tmp_path))
    crashlib.drover('create', '-q', '-f', 'vmdk', '-o', 'subformat=twoGbMaxExtentSparse',
                    chain.path('out.vmdk'), str(chain.size))
    crashlib.write(chain.path('out.vmdk'), 'vmdk', [(9, 0, chain.size)])
    old = str(tmp_path / 'old.raw')
    crashlib.drover('convert', '-f', 'vmdk', '-O', 'raw', chain.path('out.vmdk'), old)
    total, gone = count_changes(op, chain, tmp_path), 0
    for n in crashlib.kill_points(total, 40):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chain.dir, directory)
        env = replay.environment(directory, DROVER_KILL_AT=n)
        crashlib.run(*op.command(directory), ok=False, cwd=directory, env=env)
        where = f'kill at change {n} of {total}'
        if not os.path.exists(os.path.join(directory, 'out.vmdk')):
            gone += 1
        elif crashlib.differs(old, directory, 'out.vmdk') is not None:
            assert crashlib.differs(chain.expected, directory, 'out.vmdk') is None, where
        if again:
            crashlib.drover(*op.command(directory)[1:])
        else:
            crashlib.drover('recover', os.path.join(directory, 'out.vmdk'))
        is_new = crashlib.differs(chain.expected, directory, 'out.vmdk') is None
        assert is_new or not again and crashlib.differs(old, directory, 'out.vmdk') is None, where
        left = [d for d in os.listdir(directory)
                if d.startswith('.') and (not again or os.listdir(os.path.join(directory, d)))]
        assert not left, f'{where}: {left}'
    assert gone > 0, 'no kill came between the files'
