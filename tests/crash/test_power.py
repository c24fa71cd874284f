# SPDX-License-Identifier: LGPL-2.1-or-later
"""Power cuts of the real program: after any prefix of what it did and any subset of what it had not
flushed, the guest's view is there, and running the command again finishes."""
import copy
import random

import addcowchain
import crashlib
import pytest
import replay
import vmachain

ALL = crashlib.OPERATIONS + addcowchain.OPERATIONS + vmachain.OPERATIONS


def record(op, where):
    chain = op.make(where)
    recording = replay.Recording(chain.dir)
    done = recording.run(op.command(chain.dir), str(where / 'log'), cwd=chain.dir)
    assert done.returncode == 0, done.stderr
    assert recording.records, 'nothing was recorded'
    assert chain.problem(op, chain.dir) is None
    return chain, recording


def cuts(recording, limit):
    points = recording.interesting()
    if len(points) > limit * crashlib.SOAK:
        points = sorted(random.Random(crashlib.SEED).sample(points, limit * crashlib.SOAK))
    return points


def first_problem(op, chain, recording, where, points, reruns=4):
    again = set(random.Random(crashlib.SEED).sample(points, min(reruns, len(points))))
    for k in points:
        for seed, mode in enumerate(['none', 'last', 'random'] + ['random'] * crashlib.SOAK):
            target = str(where / 'cut')
            recording.build(k, random.Random(k * 1000 + seed), target, mode)
            why = chain.problem(op, target)
            if not why and seed == 2 and k in again:
                why = crashlib.finish(op, chain, target)
            if why:
                before = recording.records[k - 1] if k else None
                return f'cut after {k} of {len(recording.records)} ({before}), {mode}, seed {seed}: {why}'
    return None


@pytest.mark.parametrize('op', ALL, ids=lambda op: op.name)
def test_a_power_cut_leaves_the_view(op, tmp_path):
    chain, recording = record(op, tmp_path)
    points = cuts(recording, 25 * chain.share // 2)
    assert first_problem(op, chain, recording, tmp_path, points) is None


@pytest.mark.parametrize('name', ['rebase', 'commit', 'stream', 'addcow-rebase', 'addcow-rebase-long-name',
                                  'addcow-commit', 'addcow-retire', 'addcow-snapshot'])
def test_a_skipped_flush_is_noticed(name, tmp_path):
    """The tests above can fail: without one of its flushes the program does not pass them."""
    op = next(o for o in ALL if o.name == name)
    chain, recording = record(op, tmp_path)
    for n in range(recording.flushes()):
        planted = copy.copy(recording)
        planted.records = list(recording.records)
        open_to_loss = planted.drop_flush(n)
        points = [k for k in planted.interesting() if k in open_to_loss]
        if first_problem(op, chain, planted, tmp_path, points, reruns=0):
            return
    pytest.fail('no skipped flush was noticed')


@pytest.mark.skipif(not crashlib.HAVE_QEMU, reason='qemu-img is not installed')
def test_the_recorder_sees_how_qemu_img_loses_data(tmp_path):
    """qemu-img switches the header of a rebased qcow2 before its tables are on disk."""
    where = tmp_path / 'd'
    where.mkdir()
    expected = tmp_path / 'expected'
    expected.write_bytes(b'\1' * crashlib.MIB)
    (where / 'a.raw').write_bytes(b'\1' * crashlib.MIB)
    (where / 'b.raw').write_bytes(b'\2' * crashlib.MIB)
    overlay = where / 'o.qcow2'
    crashlib.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'a.raw', '-F', 'raw', overlay)
    recording = replay.Recording(str(where))
    done = recording.run(['qemu-img', 'rebase', '-f', 'qcow2', '-F', 'raw', '-b',
                          str(where / 'b.raw'), str(overlay)], str(tmp_path / 'log'))
    assert done.returncode == 0
    wrong = 0
    for k in range(len(recording.records) + 1):
        recording.build(k, random.Random(k), str(tmp_path / 'cut'))
        wrong += crashlib.differs(str(expected), str(tmp_path / 'cut'), 'o.qcow2',
                                  'qemu-img') is not None
    assert wrong > 0
