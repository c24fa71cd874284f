# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps inside qcow2 images: what Drover and QEMU's tools say of them, and do with them, in turns."""
import json
import os
import shutil
import subprocess

import pytest
from tools import DROVER, MIB, TOOLS, Drover, Qemu, create, rng, run

pytestmark = pytest.mark.usefixtures('qemu')

OPTIONS = ['', 'cluster_size=512', 'cluster_size=2M', 'refcount_bits=64,cluster_size=4k', 'extended_l2=on']


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def both(*args, ok=True):
    """What the command prints, which is the same from both."""
    ours, theirs = (run(*tool.img, *args, ok=ok) for tool in TOOLS)
    assert ours.stdout == theirs.stdout
    assert ours.returncode == theirs.returncode
    return ours.stdout


def listed(path):
    """Name, flags, granularity of each bitmap."""
    info = json.loads(run('qemu-img', 'info', '--output=json', path).stdout)
    return [(b['name'], b['flags'], b['granularity']) for b in info['format-specific']['data'].get('bitmaps', [])]


@pytest.mark.parametrize('options', OPTIONS)
def test_info_and_measure_say_what_qemu_img_says(options):
    create(Qemu, 'disk.qcow2', 'qcow2', 70 * MIB, options)
    run('qemu-img', 'bitmap', '--add', 'disk.qcow2', 'first')
    run('qemu-img', 'bitmap', '--add', '--disable', '-g', '512', 'disk.qcow2', 'x' * 1000)
    run('qemu-img', 'bitmap', '--add', '--disable', '-g', '1G', 'disk.qcow2', 'third one')
    both('info', 'disk.qcow2')
    ours, theirs = (json.loads(run(*tool.img, 'info', '--output=json', 'disk.qcow2').stdout) for tool in TOOLS)
    assert ours == theirs
    assert len(ours['format-specific']['data']['bitmaps']) == 3
    for target in ('', 'cluster_size=512', 'cluster_size=2M', 'compat=0.10'):
        both('measure', '-O', 'qcow2', '-o', target or 'refcount_bits=16', 'disk.qcow2')
        ours, theirs = (json.loads(run(*tool.img, 'measure', '--output=json', '-O', 'qcow2', '-o',
                                       target or 'refcount_bits=16', 'disk.qcow2').stdout) for tool in TOOLS)
        assert ours == theirs
    both('measure', '-O', 'raw', 'disk.qcow2')


def test_nothing_is_measured_where_there_can_be_no_bitmaps():
    create(Qemu, 'old.qcow2', 'qcow2', MIB, 'compat=0.10')
    run('qemu-img', 'create', '-q', '-f', 'raw', 'disk.raw', MIB)
    for args in (['old.qcow2'], ['disk.raw'], ['--size', '1M']):
        assert 'bitmaps' not in both('measure', '-O', 'qcow2', *args)


def test_a_bitmap_that_a_writer_left_is_in_use():
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    run('qemu-img', 'bitmap', '--add', 'disk.qcow2', 'b')
    run('sh', '-c', "qemu-io -c 'write 0 64k' -c abort disk.qcow2 >/dev/null 2>&1; true")
    assert listed('disk.qcow2') == [('b', ['in-use', 'auto'], 65536)]
    both('info', 'disk.qcow2')
    both('measure', '-O', 'qcow2', 'disk.qcow2')


# ---------------------------------------------------------------- the bits, as QEMU sees them

def dirty(path, name):
    """Ranges that QEMU says are set, neighbours joined."""
    if not shutil.which('nbdinfo') or not shutil.which('qemu-nbd'):
        pytest.skip('nbdinfo and qemu-nbd are not installed')
    done = run('nbdinfo', '--json', f'--map=qemu:dirty-bitmap:{name}', '--', '[', 'qemu-nbd', '-r', '-f', 'qcow2', '-B', name,
               path, ']')
    out = []
    for row in json.loads(done.stdout):
        if row['type'] and out and out[-1][0] + out[-1][1] == row['offset']:
            out[-1][1] += row['length']
        elif row['type']:
            out.append([row['offset'], row['length']])
    return out


def sound(path):
    for tool in TOOLS:
        done = run(*tool.img, 'check', '-f', 'qcow2', path, ok=False)
        assert done.returncode == 0, f'{tool.name}: {done.stdout}{done.stderr}'


def bitmap(tool, *args, ok=True):
    return run(*tool.img, 'bitmap', *args, ok=ok)


# ---------------------------------------------------------------- the command

MISTAKES = [
    ['--add', 'b0'], ['--add', ''], ['--add', 'x' * 1024], ['--add', '-g', '1000', 'g'], ['--add', '-g', '256', 'g'],
    ['--add', '-g', '4G', 'g'], ['--add', '-g', '1T', 'g'], ['--add', '-g', 'x', 'g'],
    ['--remove', 'no'], ['--clear', 'no'], ['--enable', 'no'], ['--disable', 'no'], ['--merge', 'no', 'b0'],
    ['--merge', 'b0', 'no'], ['b0'], [], ['--add', 'one', 'two'], ['--add', '-F', 'qcow2', 'b'],
    ['--add', '-b', 'other.qcow2', 'b'], ['--remove', '-g', '512', 'b0'], ['--add', '--disable', '--add', 'z'],
    ['--merge', 'd', '-b', 'other.qcow2', '-F', 'qcow2', 'b0'],
    ['--clear', 'left'], ['--enable', 'left'], ['--disable', 'left'], ['--merge', 'left', 'b0'],
    ['--merge', 'b0', 'left'],
]


@pytest.fixture(scope='module')
def mistaken(tmp_path_factory):
    where = tmp_path_factory.mktemp('mistaken')
    disk, other = where / 'disk.qcow2', where / 'other.qcow2'
    create(Qemu, disk, 'qcow2', 10 * MIB)
    bitmap(Qemu, '--add', disk, 'left')
    subprocess.run(['qemu-io', '-c', 'write 0 64k', '-c', 'abort', str(disk)], check=False, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    bitmap(Qemu, '--add', disk, 'b0')
    create(Qemu, other, 'qcow2', 20 * MIB)
    bitmap(Qemu, '--add', other, 'd')
    return where


@pytest.mark.parametrize('args', MISTAKES, ids=lambda args: ' '.join(args)[:40])
def test_mistakes_are_answered_as_by_qemu_img(mistaken, args):
    said = []
    os.symlink(shutil.which(DROVER), 'qemu-img')
    for program in ('./qemu-img', 'qemu-img'):
        shutil.copy(mistaken / 'disk.qcow2', 'disk.qcow2')
        shutil.copy(mistaken / 'other.qcow2', 'other.qcow2')
        options, name = (args[:-1], args[-1:]) if args else ([], [])
        done = run(program, 'bitmap', *options, 'disk.qcow2', *name, ok=False)
        said.append((done.returncode, done.stderr[:300], listed('disk.qcow2')))  # we cut very long texts
    assert said[0] == said[1]
    assert said[0][0] == 1


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('backing', [False, True])
def test_bitmaps_are_made_and_changed_in_turns(options, backing):
    rnd = rng('bitmap', options, backing)
    size = 3 * MIB + 512
    if backing:
        create(Qemu, 'base.qcow2', 'qcow2', size)
    create(Qemu, 'disk.qcow2', 'qcow2', size, options, 'base.qcow2' if backing else None, 'qcow2')
    shutil.copy('disk.qcow2', 'twin.qcow2')
    names = ['b0', 'b1', 'a longer name']
    for _ in range(14):
        have = [b[0] for b in listed('disk.qcow2')]
        name = rnd.choice(names)
        if name not in have:
            args = ['--add', '-g', rnd.choice(['512', '4k', '64k', '1M'])] + rnd.choice([[], ['--disable']])
        else:
            args = rnd.choice([['--remove'], ['--clear'], ['--enable'], ['--disable'],
                               ['--merge', rnd.choice(have)], ['--disable', '--clear', '--enable']])
        tools = [Drover, Qemu]
        bitmap(rnd.choice(tools), *args, 'disk.qcow2', name)
        bitmap(Qemu, *args, 'twin.qcow2', name)
        off, length = rnd.randrange(0, size // 512) * 512, rnd.choice([512, 4096, 70000 // 512 * 512])
        length = min(length, size - off)
        for path in ('disk.qcow2', 'twin.qcow2'):
            run('qemu-io', '-f', 'qcow2', '-c', f'write {off} {length}', path)
        assert listed('disk.qcow2') == listed('twin.qcow2')
        both('info', 'disk.qcow2')
    sound('disk.qcow2')
    for name, _, _ in listed('disk.qcow2'):
        assert dirty('disk.qcow2', name) == dirty('twin.qcow2', name)


# ---------------------------------------------------------------- keeping them right

def content(path):
    run('qemu-img', 'convert', '-O', 'raw', path, 'content.raw')
    with open('content.raw', 'rb') as f:
        return f.read()


def check_bits(path, name, granularity, before, after, written):
    """Every unit that differs is set, and nothing is but what was written."""
    units = -(-max(len(before), len(after)) // granularity)
    bits = [False] * units
    for off, length in dirty(path, name):
        for i in range(off // granularity, -(-(off + length) // granularity)):
            bits[i] = True
    may = [False] * units
    for off, length in written:
        for i in range(off // granularity, -(-(off + length) // granularity)):
            may[i] = True
    for i in range(units):
        part = slice(i * granularity, (i + 1) * granularity)
        assert bits[i] or before[part] == after[part], f'{name}: unit {i} was missed'
        assert may[i] or not bits[i], f'{name}: unit {i} is set for nothing'


def random_range(rnd, size):
    off = rnd.randrange(0, size // 512) * 512
    return off, min(size - off, rnd.choice([512, 1024, 4096, 66048, 200192]))


@pytest.mark.parametrize('options', OPTIONS + ['compression_type=zstd'])
@pytest.mark.parametrize('backing', [False, True])
def test_enabled_bitmaps_note_what_is_written(options, backing):
    rnd = rng('track', options, backing)
    size = 3 * MIB + 512
    if backing:
        create(Qemu, 'base.qcow2', 'qcow2', size)
        run('qemu-io', '-f', 'qcow2', '-c', f'write -P 7 0 {size}', 'base.qcow2')
    create(Qemu, 'disk.qcow2', 'qcow2', size, options, 'base.qcow2' if backing else None, 'qcow2')
    run('qemu-io', '-f', 'qcow2', '-c', f'write -P 9 {MIB} {MIB}', 'disk.qcow2')
    names = {'fine': 512, 'usual': 65536, 'coarse': MIB}
    for name, granularity in names.items():
        bitmap(rnd.choice(TOOLS), '--add', '-g', granularity, 'disk.qcow2', name)
    bitmap(Drover, '--add', '--disable', 'disk.qcow2', 'idle')
    before, written = content('disk.qcow2'), []
    for tool in (Drover, Qemu, Drover):
        argv = []
        for _ in range(4):
            off, length = random_range(rnd, size)
            argv += ['-c', rnd.choice([f'write -P {rnd.randrange(256)}', 'write -z', 'discard', 'write -z -u', 'read'])
                     + f' {off} {length}']
            written += [] if 'read' in argv[-1] else [(off, length)]
        run(*tool.io, '-f', 'qcow2', *argv, 'disk.qcow2')
        assert [b[1] for b in listed('disk.qcow2')] == [['auto']] * 3 + [[]]
    sound('disk.qcow2')
    after = content('disk.qcow2')
    for name, granularity in names.items():
        check_bits('disk.qcow2', name, granularity, before, after, written)
    assert dirty('disk.qcow2', 'idle') == []


def test_reading_changes_no_bitmap():
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    bitmap(Qemu, '--add', 'disk.qcow2', 'b')
    with open('disk.qcow2', 'rb') as f:
        before = f.read()
    run(DROVER, 'io', '-c', 'read 0 1M', '-c', 'flush', 'disk.qcow2')
    run(DROVER, 'check', 'disk.qcow2')
    run(DROVER, 'convert', '-O', 'raw', 'disk.qcow2', 'out.raw')
    with open('disk.qcow2', 'rb') as f:
        assert f.read() == before


def test_rebase_flatten_and_stream_leave_bitmaps_as_they_are():
    create(Qemu, 'old.qcow2', 'qcow2', MIB)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 3 0 512k', 'old.qcow2')
    create(Qemu, 'new.qcow2', 'qcow2', MIB)
    create(Qemu, 'disk.qcow2', 'qcow2', MIB, '', 'old.qcow2', 'qcow2')
    bitmap(Qemu, '--add', 'disk.qcow2', 'b')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 4 64k 64k', 'disk.qcow2')
    before = content('disk.qcow2')
    for args in (['rebase', '-b', 'new.qcow2', '-F', 'qcow2', 'disk.qcow2'], ['stream', 'disk.qcow2'],
                 ['rebase', '-u', '-b', 'new.qcow2', '-F', 'qcow2', 'disk.qcow2'], ['rebase', '-b', '', 'disk.qcow2']):
        run(DROVER, *args)
        assert listed('disk.qcow2') == [('b', ['auto'], 65536)]
        assert dirty('disk.qcow2', 'b') == [[65536, 65536]]
        assert content('disk.qcow2') == before
        sound('disk.qcow2')


@pytest.mark.parametrize('more', [[], ['-d']], ids=['', 'keep'])
def test_a_commit_sets_bits_in_the_base_and_none_in_the_overlay(more):
    create(Qemu, 'base.qcow2', 'qcow2', MIB)
    create(Qemu, 'disk.qcow2', 'qcow2', MIB, '', 'base.qcow2', 'qcow2')
    for path in ('base.qcow2', 'disk.qcow2'):
        bitmap(Qemu, '--add', path, 'b')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 4 128k 64k', 'disk.qcow2')
    run(DROVER, 'commit', *more, 'disk.qcow2')
    for path in ('base.qcow2', 'disk.qcow2'):
        assert listed(path) == [('b', ['auto'], 65536)]
        assert dirty(path, 'b') == [[131072, 65536]]
        sound(path)


def joined(ranges, granularity, start, size):
    """The ranges, and all granules from the one with byte start up to size."""
    granules = {i for at, length in ranges for i in range(at // granularity, -(-(at + length) // granularity))}
    granules.update(range(start // granularity, -(-size // granularity)) if start < size else ())
    out = []
    for i in sorted(granules):
        end = min((i + 1) * granularity, size)
        if out and sum(out[-1]) == i * granularity:
            out[-1][1] = end - out[-1][0]
        else:
            out.append([i * granularity, end - i * granularity])
    return out


@pytest.mark.parametrize('options', OPTIONS)
def test_bitmaps_get_the_size_of_the_disk(options):
    """As by QEMU: what is gone is forgotten. What a disk grows by is set, which QEMU does not do: a backup of it when it
    was larger may have something else there."""
    create(Qemu, 'disk.qcow2', 'qcow2', 3 * MIB, options)
    for name, more in (('b', []), ('fine', ['-g', '512']), ('idle', ['--disable'])):
        bitmap(Qemu, '--add', *more, 'disk.qcow2', name)
    shutil.copy('disk.qcow2', 'twin.qcow2')
    writes = ['write 0 64k', 'write 1M 512', 'write 2000k 1000k', 'write 3000k 72k']
    for path in ('disk.qcow2', 'twin.qcow2'):
        for one in writes:
            run('qemu-io', '-f', 'qcow2', '-c', one, path)
    size, new = 3 * MIB, 3 * MIB
    for to in (2500 * 1024, 40 * MIB, 39 * MIB, 3 * MIB, 512, 3 * MIB):
        for tool, path in ((Drover, 'disk.qcow2'), (Qemu, 'twin.qcow2')):
            run(*tool.img, 'resize', '-f', 'qcow2', '--shrink', path, to)
        size, new = to, min(new, to)
        assert listed('disk.qcow2') == listed('twin.qcow2')
        for name, flags, granularity in listed('twin.qcow2'):
            start = new if 'auto' in flags else size
            assert dirty('disk.qcow2', name) == joined(dirty('twin.qcow2', name), granularity, start, size), (name, to)
        sound('disk.qcow2')
    run(DROVER, 'io', '-c', 'write 1M 64k', 'disk.qcow2')
    assert any(at <= MIB < at + length for at, length in dirty('disk.qcow2', 'b'))


def test_a_disk_with_an_inconsistent_bitmap_keeps_its_size():
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    bitmap(Qemu, '--add', 'disk.qcow2', 'b')
    subprocess.run(['qemu-io', '-c', 'write 0 64k', '-c', 'abort', 'disk.qcow2'], check=False,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = run(DROVER, 'resize', 'disk.qcow2', '2M', ok=False)
    assert done.returncode == 1 and "Bitmap 'b' is inconsistent and cannot be used" in done.stderr
    run(DROVER, 'bitmap', '--remove', 'disk.qcow2', 'b')
    run(DROVER, 'resize', 'disk.qcow2', '2M')


@pytest.mark.parametrize('resized', [False, True])
def test_going_back_to_a_snapshot_sets_everything(resized):
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    run('qemu-img', 'snapshot', '-c', 's', 'disk.qcow2')
    if resized:
        run('qemu-img', 'resize', '-q', 'disk.qcow2', '3M')
    bitmap(Qemu, '--add', 'disk.qcow2', 'b')
    bitmap(Qemu, '--add', '--disable', 'disk.qcow2', 'idle')
    run(DROVER, 'snapshot', '-a', 's', 'disk.qcow2')
    assert listed('disk.qcow2') == [('b', ['auto'], 65536), ('idle', [], 65536)]
    assert dirty('disk.qcow2', 'b') == [[0, MIB]]
    assert dirty('disk.qcow2', 'idle') == []
    sound('disk.qcow2')


# ---------------------------------------------------------------- convert

@pytest.mark.parametrize('options', OPTIONS)
def test_convert_copies_bitmaps(options):
    create(Qemu, 'base.qcow2', 'qcow2', 3 * MIB)
    bitmap(Qemu, '--add', 'base.qcow2', 'in-the-base')
    create(Qemu, 'disk.qcow2', 'qcow2', 3 * MIB, '', 'base.qcow2', 'qcow2')
    bitmap(Qemu, '--add', 'disk.qcow2', 'b')
    bitmap(Qemu, '--add', '-g', '512', 'disk.qcow2', 'fine')
    run('qemu-io', '-f', 'qcow2', '-c', 'write 1M 1000k', '-c', 'write 3000k 72k', 'disk.qcow2')
    bitmap(Qemu, '--disable', 'disk.qcow2', 'b')
    for more in ([], ['-c'], ['-B', 'base.qcow2', '-F', 'qcow2']):
        run(DROVER, 'convert', '--bitmaps', *more, '-O', 'qcow2', '-o', options or 'refcount_bits=16', 'disk.qcow2',
            'out.qcow2')
        assert sorted(listed('out.qcow2')) == sorted(listed('disk.qcow2'))
        for name in ('b', 'fine'):
            assert dirty('out.qcow2', name) == dirty('disk.qcow2', name)
        sound('out.qcow2')
        assert content('out.qcow2') == content('disk.qcow2')


def test_convert_into_an_image_with_bitmaps_sets_theirs_and_adds_more():
    for path in ('disk.qcow2', 'out.qcow2'):
        create(Qemu, path, 'qcow2', MIB)
    bitmap(Qemu, '--add', 'disk.qcow2', 'new')
    bitmap(Qemu, '--add', 'out.qcow2', 'old')
    run('qemu-io', '-f', 'qcow2', '-c', 'write 128k 64k', 'disk.qcow2')
    run(DROVER, 'convert', '-n', '--bitmaps', '-O', 'qcow2', 'disk.qcow2', 'out.qcow2')
    assert listed('out.qcow2') == [('old', ['auto'], 65536), ('new', ['auto'], 65536)]
    assert dirty('out.qcow2', 'old') == [[131072, 65536]]
    assert dirty('out.qcow2', 'new') == [[131072, 65536]]
    done = run(DROVER, 'convert', '-n', '--bitmaps', '-O', 'qcow2', 'disk.qcow2', 'out.qcow2', ok=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == 'drover: Failed to create bitmap new: Bitmap already exists: new'
    sound('out.qcow2')


@pytest.mark.parametrize('args', [
    ['--bitmaps', '-O', 'qcow2', 'disk.qcow2', 'out'], ['--skip-broken-bitmaps', '-O', 'qcow2', 'disk.qcow2', 'out'],
    ['--bitmaps', '--skip-broken-bitmaps', '-O', 'qcow2', 'disk.qcow2', 'out'], ['--bitmaps', 'other.qcow2', 'out'],
    ['--bitmaps', '-O', 'qcow2', 'disk.raw', 'out'], ['--bitmaps', '-O', 'qcow2', 'other.qcow2', 'other.qcow2', 'out'],
    ['--bitmaps', '-O', 'qcow2', '-o', 'compat=0.10', 'other.qcow2', 'out'],
], ids=' '.join)
def test_what_convert_refuses_is_what_qemu_img_refuses(mistaken, args):
    for name in ('disk.qcow2', 'other.qcow2'):
        shutil.copy(mistaken / name, name)
    bitmap(Qemu, '--remove', 'disk.qcow2', 'b0')
    run('qemu-img', 'create', '-q', '-f', 'raw', 'disk.raw', MIB)
    os.symlink(shutil.which(DROVER), 'qemu-img')
    ours, theirs = (run(program, 'convert', *args, ok=False) for program in ('./qemu-img', 'qemu-img'))
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)
