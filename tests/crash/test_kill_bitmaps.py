# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes to an image with bitmaps: they are the old ones or the new
ones, and those that could miss something say so. qemu-img is the witness."""
import json
import os
import shutil

import crashlib
import pytest
import replay

DROVER = os.environ.get('DROVER', 'drover')
MIB = 1 << 20
CHANGES = {'add': ['--add', 'disk.qcow2', 'new'], 'remove': ['--remove', 'disk.qcow2', 'one'],
           'clear': ['--clear', 'disk.qcow2', 'one'], 'merge': ['--merge', 'one', 'disk.qcow2', 'two'],
           'disable': ['--disable', 'disk.qcow2', 'one']}
WRITES = {'write': ['io', '-c', 'write -P 5 700k 20k', '-c', 'flush', '-c', 'write -z 64k 64k', '-c', 'discard 128k 64k',
                    'disk.qcow2'],
          'grow': ['resize', '-q', 'disk.qcow2', '3M'], 'shrink': ['resize', '-q', '--shrink', 'disk.qcow2', '500k'],
          'convert': ['convert', '-n', '-O', 'qcow2', 'other.raw', 'disk.qcow2']}

pytestmark = pytest.mark.skipif(not crashlib.HAVE_QEMU, reason='qemu-img is the witness')


def run(directory, *argv, ok=True):
    return crashlib.run(*argv, ok=ok, cwd=directory)


def bitmaps(directory):
    info = json.loads(run(directory, 'qemu-img', 'info', '--output=json', 'disk.qcow2').stdout)
    return {b['name']: b['flags'] for b in info['format-specific']['data'].get('bitmaps', [])}


def dirty(directory, name):
    done = run(directory, 'nbdinfo', '--json', f'--map=qemu:dirty-bitmap:{name}', '--', '[', 'qemu-nbd', '-r', '-f',
               'qcow2', '-B', name, 'disk.qcow2', ']')
    return [(row['offset'], row['length']) for row in json.loads(done.stdout) if row['type']]


def state(directory):
    """Names, flags and bits."""
    return {name: (flags, dirty(directory, name)) for name, flags in bitmaps(directory).items()}


def content(directory):
    run(directory, 'qemu-img', 'convert', '-O', 'raw', 'disk.qcow2', 'out.raw')
    with open(os.path.join(directory, 'out.raw'), 'rb') as f:
        return f.read()


def make(directory, options):
    os.mkdir(directory)
    run(directory, 'qemu-img', 'create', '-q', '-f', 'qcow2', *options, 'disk.qcow2', MIB)
    run(directory, 'qemu-img', 'create', '-q', '-f', 'raw', 'other.raw', MIB)
    run(directory, 'qemu-io', '-f', 'raw', '-c', 'write -P 6 300k 100k', 'other.raw')
    run(directory, 'qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 500k', 'disk.qcow2')
    for name in ('one', 'two'):
        run(directory, 'qemu-img', 'bitmap', '--add', 'disk.qcow2', name)
    run(directory, 'qemu-img', 'bitmap', '--disable', 'disk.qcow2', 'two')
    run(directory, 'qemu-io', '-f', 'qcow2', '-c', 'write -P 2 400k 10k', 'disk.qcow2')


def killed(directory, argv, **how):
    done = run(directory, *argv, ok=False) if not how else crashlib.run(
        *argv, ok=False, cwd=directory, env=replay.environment(directory, **how))
    assert done.returncode in (-9, 0), done.stderr


def each_kill(tmp_path, argv, tear):
    """The directory after a kill at each of some changes."""
    shutil.copytree(tmp_path / 'made', tmp_path / 'counted')
    killed(str(tmp_path / 'counted'), argv, DROVER_COUNT=tmp_path / 'count')
    total = int((tmp_path / 'count').read_text(encoding='ascii'))
    assert total > 3
    for n in range(1, total + 1, total // (12 * crashlib.SOAK) + 1):
        directory = str(tmp_path / 'killed')
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / 'made', directory)
        killed(directory, argv, DROVER_KILL_AT=n, **({'DROVER_KILL_TEAR': '1'} if tear else {}))
        yield directory


def sound(directory):
    run(directory, 'qemu-img', 'check', '-q', '-r', 'leaks', 'disk.qcow2', ok=False)
    run(directory, 'qemu-img', 'check', '-q', 'disk.qcow2')


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('options', [(), ('-o', 'cluster_size=512')], ids=['usual', 'small-clusters'])
@pytest.mark.parametrize('action', CHANGES)
def test_a_killed_change_leaves_the_old_bitmaps_or_the_new_ones(action, options, tear, tmp_path):
    make(str(tmp_path / 'made'), options)
    argv = [DROVER, 'bitmap', *CHANGES[action]]
    before, disk = state(str(tmp_path / 'made')), content(str(tmp_path / 'made'))
    seen = []
    for directory in each_kill(tmp_path, argv, tear):
        now = state(directory)
        after = state(str(tmp_path / 'counted'))
        assert now in (before, after)
        assert content(directory) == disk
        seen.append(now == after)
        sound(directory)
        run(directory, *argv, ok=False)  # again: it works, or it was done
        assert state(directory) == after
        sound(directory)
    assert before != after and False in seen and True in seen


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('options', [(), ('-o', 'cluster_size=512')], ids=['usual', 'small-clusters'])
@pytest.mark.parametrize('work', WRITES)
def test_a_killed_writer_leaves_no_bitmap_that_misses_something(work, options, tear, tmp_path):
    made = str(tmp_path / 'made')
    make(made, options)
    before, bits = content(made), dirty(made, 'one')
    trusted = 0
    for directory in each_kill(tmp_path, [DROVER, *WRITES[work]], tear):
        flags = bitmaps(directory)
        assert set(flags) == {'one', 'two'}
        after = content(directory)
        if 'in-use' not in flags['one']:
            trusted += 1
            now = dirty(directory, 'one')
            noted = set(u for off, length in now for u in range(off // 65536, -(-(off + length) // 65536)))
            for unit in range(min(len(before), len(after)) // 65536):
                part = slice(unit * 65536, (unit + 1) * 65536)
                assert before[part] == after[part] or unit in noted
            old = set(u for off, length in bits for u in range(off // 65536, -(-(off + length) // 65536)))
            assert old <= noted
        sound(directory)
    assert trusted > 0
