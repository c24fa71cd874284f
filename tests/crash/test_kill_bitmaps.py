# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program at each change that it makes to an image with bitmaps: they are the old ones or the new
ones, and those that could miss something say so. qemu-img is the witness."""
import json
import os
import shutil

import pytest
from qcow2kill import DROVER, MIB, NEEDS_QEMU, ROUNDS, each_kill, info, leaks_at_most, run, show

CHANGES = {'add': ['--add', 'disk.qcow2', 'new'], 'remove': ['--remove', 'disk.qcow2', 'one'],
           'clear': ['--clear', 'disk.qcow2', 'one'], 'merge': ['--merge', 'one', 'disk.qcow2', 'two'],
           'merge-from-file': ['--merge', 'three', '-b', 'third.qcow2', '-F', 'qcow2', 'disk.qcow2', 'two'],
           'disable': ['--disable', 'disk.qcow2', 'one']}
WRITES = {'write': ['io', '-c', 'write -P 5 700k 20k', '-c', 'flush', '-c', 'write -z 64k 64k', '-c', 'discard 128k 64k',
                    'disk.qcow2'],
          'grow': ['resize', '-q', 'disk.qcow2', '3M'], 'shrink': ['resize', '-q', '--shrink', 'disk.qcow2', '500k'],
          'convert': ['convert', '-n', '-O', 'qcow2', 'other.raw', 'disk.qcow2']}
COPY = ['convert', '--bitmaps', '-O', 'qcow2', 'disk.qcow2', 'copy.qcow2']
INTO = ['convert', '-n', '--bitmaps', '-O', 'qcow2', 'disk.qcow2', 'copy.qcow2']

pytestmark = NEEDS_QEMU


def bitmaps(directory, name='disk.qcow2'):
    return {b['name']: b['flags'] for b in info(directory, name)['format-specific']['data'].get('bitmaps', [])}


def dirty(directory, bitmap, name='disk.qcow2'):
    done = run(directory, 'nbdinfo', '--json', f'--map=qemu:dirty-bitmap:{bitmap}', '--', '[', 'qemu-nbd', '-r', '-f',
               'qcow2', '-B', bitmap, name, ']')
    return [(row['offset'], row['length']) for row in json.loads(done.stdout) if row['type']]


def state(directory, name='disk.qcow2'):
    """Names, flags and bits."""
    return {b: (flags, dirty(directory, b, name)) for b, flags in bitmaps(directory, name).items()}


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
    run(directory, 'qemu-img', 'create', '-q', '-f', 'qcow2', 'third.qcow2', MIB)
    run(directory, 'qemu-img', 'bitmap', '--add', 'third.qcow2', 'three')
    run(directory, 'qemu-io', '-f', 'qcow2', '-c', 'write -P 2 800k 10k', 'third.qcow2')


@ROUNDS
@pytest.mark.parametrize('action', CHANGES)
def test_a_killed_change_leaves_the_old_bitmaps_or_the_new_ones(action, options, tear, tmp_path):
    make(str(tmp_path / 'made'), options)
    argv = [DROVER, 'bitmap', *CHANGES[action]]
    before, disk = state(str(tmp_path / 'made')), show(str(tmp_path / 'made'))
    seen = []
    for directory in each_kill(tmp_path, argv, tear):
        now = state(directory)
        after = state(str(tmp_path / 'counted'))
        assert now in (before, after)
        assert show(directory) == disk
        seen.append(now == after)
        leaks_at_most(directory)
        run(directory, *argv, ok=False)  # again: it works, or it was done
        assert state(directory) == after
        leaks_at_most(directory)
    assert before != after and False in seen and True in seen


@ROUNDS
@pytest.mark.parametrize('work', WRITES)
def test_a_killed_writer_leaves_no_bitmap_that_misses_something(work, options, tear, tmp_path):
    made = str(tmp_path / 'made')
    make(made, options)
    before, bits = show(made), dirty(made, 'one')
    trusted = 0
    for directory in each_kill(tmp_path, [DROVER, *WRITES[work]], tear):
        flags = bitmaps(directory)
        assert set(flags) == {'one', 'two'}
        after = show(directory)
        if 'in-use' not in flags['one']:
            trusted += 1
            now = dirty(directory, 'one')
            noted = set(u for off, length in now for u in range(off // 65536, -(-(off + length) // 65536)))
            for unit in range(min(len(before), len(after)) // 65536):
                part = slice(unit * 65536, (unit + 1) * 65536)
                assert before[part] == after[part] or unit in noted
            old = set(u for off, length in bits for u in range(off // 65536, -(-(off + length) // 65536)))
            assert old <= noted
        leaks_at_most(directory)
    assert trusted > 0


@ROUNDS
@pytest.mark.parametrize('present', [False, True], ids=['new', 'over-another'])
def test_a_killed_copy_with_bitmaps_is_there_with_all_of_them_or_not_at_all(present, options, tear, tmp_path):
    made = str(tmp_path / 'made')
    make(made, options)
    if present:
        shutil.copy(os.path.join(made, 'third.qcow2'), os.path.join(made, 'copy.qcow2'))
    bits, disk = state(made), show(made)
    old = (state(made, 'copy.qcow2'), show(made, name='copy.qcow2')) if present else None
    files = set(os.listdir(made)) | {'copy.qcow2'}
    seen = []
    for directory in each_kill(tmp_path, [DROVER, *COPY], tear):
        there = os.path.exists(os.path.join(directory, 'copy.qcow2'))
        now = (state(directory, 'copy.qcow2'), show(directory, name='copy.qcow2')) if there else None
        assert now in (old, (bits, disk))
        seen.append(now != old)
        assert state(directory) == bits
        run(directory, DROVER, *COPY)
        assert (state(directory, 'copy.qcow2'), show(directory, name='copy.qcow2')) == (bits, disk)
        run(directory, 'qemu-img', 'check', '-q', 'copy.qcow2')
        assert set(os.listdir(directory)) == files
    assert False in seen


@ROUNDS
def test_a_killed_copy_into_an_image_adds_no_bitmap_that_misses_something(options, tear, tmp_path):
    """The bitmaps come last, each whole; what the target had before is not touched. What a killed run has added must go
    before the next one: it refuses to copy a bitmap that is there."""
    made = str(tmp_path / 'made')
    make(made, options)
    shutil.copy(os.path.join(made, 'third.qcow2'), os.path.join(made, 'copy.qcow2'))
    bits, disk, before = state(made), show(made), show(made, name='copy.qcow2')
    unfinished = 0

    def noted(directory):
        return {u for off, n in dirty(directory, 'three', 'copy.qcow2') for u in range(off // 65536, -(-(off + n) // 65536))}
    for directory in each_kill(tmp_path, [DROVER, *INTO], tear):
        flags = bitmaps(directory, 'copy.qcow2')
        assert 'three' in flags and set(flags) <= {'one', 'two', 'three'}
        for name in set(flags) - {'three'}:
            if 'in-use' not in flags[name]:
                assert (flags[name], dirty(directory, name, 'copy.qcow2')) == bits[name]
                assert show(directory, name='copy.qcow2') == disk
        if 'in-use' not in flags['three'] and show(directory, name='copy.qcow2') != before:
            assert noted(directory) >= noted(made)
        unfinished += len(flags) < 3
        leaks_at_most(directory, 'copy.qcow2')
        for name in set(flags) - {'three'}:
            run(directory, DROVER, 'bitmap', '--remove', 'copy.qcow2', name)
        run(directory, DROVER, *INTO)
        assert show(directory, name='copy.qcow2') == disk
        flags = bitmaps(directory, 'copy.qcow2')
        assert {name: (flags[name], dirty(directory, name, 'copy.qcow2')) for name in bits} == bits
        run(directory, 'qemu-img', 'check', '-q', 'copy.qcow2')
    assert unfinished > 0
