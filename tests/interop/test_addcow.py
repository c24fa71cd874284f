# SPDX-License-Identifier: LGPL-2.1-or-later
"""add-cow images go to and fro between Drover and a reader and writer made from the description of
the format, and the last revision's own program; what is left when all is copied in goes to qemu-img."""
import hashlib
import json
import os
import shutil
import struct
import sys

import pytest
from tools import DROVER, MIB, SAMPLES, run, rng

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'lib'))
import addcow  # noqa: E402  pylint: disable=wrong-import-position

HAVE_QEMU = shutil.which('qemu-img') is not None


@pytest.fixture(autouse=True)
def needs_driver():
    if 'add-cow' not in run(DROVER, 'create', '--help', ok=False).stdout + \
            run(DROVER, '--help', ok=False).stdout:
        pytest.skip('this drover has no add-cow')


def drover(*argv, **kw):
    return run(DROVER, *argv, **kw)


def content_of(path, where, fmt='add-cow'):
    out = os.path.join(str(where), 'content.raw')
    drover('convert', '-f', fmt, '-O', 'raw', path, out)
    with open(out, 'rb') as f:
        return f.read()


def digest(directory):
    sums = {}
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), 'rb') as f:
            sums[name] = hashlib.md5(f.read()).hexdigest()
    return sums


def same(path, where):
    """Drover sees what the description says; returns it."""
    want = addcow.view(str(path))
    got = content_of(path, where)
    assert len(got) == addcow.up(len(want), 512) and not any(got[len(want):])  # converting rounds up
    got = got[:len(want)]
    assert got == want, next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
    return want


def map_says(path):
    """(offset, end, does the top image have it?), as the reader's runs()."""
    out, at = [], 0
    for e in json.loads(drover('map', '-f', 'add-cow', '--output=json', path).stdout):
        assert e['start'] == at
        at += e['length']
        has = e['depth'] == 0 and e.get('present', True)
        if out and out[-1][2] == has:
            out[-1] = (out[-1][0], at, has)
        else:
            out.append((e['start'], at, has))
    return out


# ---------------------------------------------------------------- images by the last revision


def expected():
    name = os.path.join(SAMPLES, 'add-cow', 'EXPECTED.md5')
    if not os.path.exists(name):
        return []
    with open(name, encoding='ascii') as f:
        return [line.split() for line in f]


@pytest.mark.skipif(not expected(), reason='no add-cow/EXPECTED.md5 in DROVER_SAMPLES')
@pytest.mark.parametrize('md5,size,name', expected(), ids=lambda v: v if '/' in str(v) else '')
def test_samples(md5, size, name, tmp_path):
    where = tmp_path / 'd'
    shutil.copytree(os.path.join(SAMPLES, 'add-cow', os.path.dirname(name)), where)
    os.chmod(where, 0o755)
    path = str(where / os.path.basename(name))
    before = digest(where)
    if md5 == '-':
        for verb in ('info', 'check', 'map'):
            done = drover(verb, path, ok=False)
            assert done.returncode != 0 and 'feature' in done.stderr, (verb, done)
        assert digest(where) == before
        return
    info = json.loads(drover('info', '--output=json', path).stdout)
    assert (info['format'], info['virtual-size']) == ('add-cow', int(size))
    assert hashlib.md5(same(path, tmp_path)).hexdigest() == md5
    image = addcow.Image.load(path)
    if not image.all_allocated:
        assert map_says(path) == image.runs()
    drover('check', path)
    raw = tmp_path / 'view.raw'
    raw.write_bytes(addcow.view(path))
    drover('compare', '-F', 'raw', path, raw)
    assert digest(where) == before
    assert drover('io', '-f', 'add-cow', '-c', 'write 0 512', path, ok=False).returncode != 0, \
        'the last revision is not written'
    assert digest(where) == before


def test_samples_as_parents(tmp_path):
    if not expected():
        pytest.skip('no add-cow/EXPECTED.md5 in DROVER_SAMPLES')
    where = tmp_path / 'd'
    shutil.copytree(os.path.join(SAMPLES, 'add-cow', '10-chain'), where)
    os.chmod(where, 0o755)
    view = bytearray(addcow.view(str(where / 'disk.add-cow')))
    done = drover('create', '-q', '-f', 'add-cow', '-b', 'disk.add-cow', '-F', 'add-cow',
                  where / 'top.add-cow', ok=False)
    assert done.returncode == 1 and 'top.raw' in done.stderr, 'that is the raw file of disk.add-cow'
    drover('create', '-q', '-f', 'add-cow', '-o', 'image_file=own.raw', '-b', 'disk.add-cow', '-F', 'add-cow',
           where / 'top.add-cow')
    drover('io', '-f', 'add-cow', '-c', 'write -P 7 1000 70000', where / 'top.add-cow')
    view[1000:71000] = bytes([7]) * 70000
    assert same(where / 'top.add-cow', tmp_path) == view
    drover('rebase', '-b', 'mid.add-cow', '-F', 'add-cow', where / 'top.add-cow')
    assert same(where / 'top.add-cow', tmp_path) == view


# ---------------------------------------------------------------- images by the Python writer


def random_ranges(rnd, size, unit=512):
    out = []
    for _ in range(8):
        off = rnd.randrange(0, size) // unit * unit
        out.append((off, min(unit * rnd.choice((1, 2, 7, 40)), size - off)))
    return out


SIZES = [(MIB, MIB), (MIB, 300 * 1024 + 100), (300 * 1024 + 7, MIB), (MIB + 511, MIB + 1)]


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('layout', ['v1', 'v20', 'v20-4k'])
def test_made_by_the_writer(layout, sizes, tmp_path):
    rnd = rng('writer', layout, sizes)
    size, base_size = sizes
    base, path = tmp_path / 'base.raw', tmp_path / 'disk.add-cow'
    base.write_bytes(rnd.randbytes(base_size))
    addcow.make(str(path), size, random_ranges(rnd, size), layout.split('-')[0], 'base.raw',
                content=rnd.randbytes(size), image='the raw file',
                cluster_bits=12 if layout == 'v20-4k' else 16)
    same(path, tmp_path)
    assert map_says(path) == addcow.Image.load(str(path)).runs()
    info = json.loads(drover('info', '--output=json', path).stdout)
    assert info['format'] == 'add-cow' and info['backing-filename'] == 'base.raw'
    drover('check', path)
    if layout != 'v1':
        return
    drover('io', '-f', 'add-cow', '-c', 'write -P 9 100k 1k', '-c', 'write -z 200k 512', path)
    view = bytearray(same(path, tmp_path))
    assert view[100 << 10:101 << 10] == bytes([9]) * 1024 and not any(view[200 << 10:(200 << 10) + 512])
    drover('stream', path)
    assert same(path, tmp_path) == view
    image = addcow.Image.load(str(path))
    assert image.complete() and image.raw() == view and image.backing is None


@pytest.mark.parametrize('fmt', ['vmdk', 'qcow2'])
def test_a_parent_of_another_format(fmt, tmp_path):
    if not HAVE_QEMU:
        pytest.skip('qemu-img is not installed')
    rnd = rng('foreign', fmt)
    plain, path = tmp_path / 'plain.raw', tmp_path / 'disk.add-cow'
    plain.write_bytes(rnd.randbytes(MIB))
    run('qemu-img', 'convert', '-f', 'raw', '-O', fmt, plain, tmp_path / f'base.{fmt}')
    addcow.make(str(path), MIB + 1024, random_ranges(rnd, MIB), 'v1', f'base.{fmt}', fmt,
                content=rnd.randbytes(MIB))
    if drover('info', tmp_path / f'base.{fmt}', ok=False).returncode:  # a format this drover does not read
        error = drover('convert', '-O', 'raw', path, tmp_path / 'no', ok=False)
        assert error.returncode == 1 and fmt in error.stderr and f'base.{fmt}' in error.stderr
        assert not (tmp_path / 'no').exists()
        return
    same(path, tmp_path)


def test_a_raw_parent_that_looks_like_something_else_stays_raw(tmp_path):
    """Who can write into a raw disk must not choose what is read as its parent."""
    secret = tmp_path / 'secret'
    secret.write_bytes(b'secret' * 1000)
    text = (b'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            b'RW 8 FLAT "secret" 0\n')
    for name, head in (('vmdk', text), ('add-cow', addcow.header_1('', 'secret')), ('qcow2', b'QFI\xfb\0\0\0\3')):
        (tmp_path / f'base-{name}').write_bytes(head.ljust(4096, b'\0'))
        path = tmp_path / f'disk-{name}.add-cow'
        addcow.make(str(path), 4096, [(1024, 512)], backing=f'base-{name}', content=bytes([3]) * 4096)
        assert same(path, tmp_path)[:len(head)][:1024] == head[:1024]
        made = tmp_path / f'made-{name}.add-cow'
        done = drover('create', '-q', '-f', 'add-cow', '-b', f'base-{name}', '-F', 'raw', made)
        assert done.returncode == 0 and same(made, tmp_path).startswith(head)


# ---------------------------------------------------------------- images by Drover


def test_the_header_is_exact(tmp_path):
    (tmp_path / 'base.img').write_bytes(bytes(MIB))
    for name, raw, more in (('a', 'a.raw', ['-o', 'image_file=a.raw']), ('b c', 'b, c.raw', ['-o', 'image_file=b,, c.raw'])):
        path = tmp_path / f'{name}.add-cow'
        drover('create', '-q', '-f', 'add-cow', *more, '-b', 'base.img', '-F', 'raw', path)
        assert path.read_bytes()[:2560] == addcow.header_1('base.img', raw)
        assert (tmp_path / raw).stat().st_size == MIB and (tmp_path / raw).stat().st_blocks <= 8
        assert not any(path.read_bytes()[2560:])
    path = tmp_path / 'none.add-cow'
    drover('create', '-q', '-f', 'add-cow', path, '1M')
    image = addcow.Image.load(str(path))
    assert (image.layout, image.backing, image.size()) == ('v1', None, MIB)
    drover('create', '-q', '-f', 'vmdk', tmp_path / 'base.vmdk', '1M')
    drover('create', '-q', '-f', 'add-cow', '-b', 'base.vmdk', '-F', 'vmdk', tmp_path / 'v.add-cow')
    image = addcow.Image.load(str(tmp_path / 'v.add-cow'))
    assert (image.backing, image.backing_format) == ('base.vmdk', 'vmdk')


def test_made_elsewhere_moved_together(tmp_path):
    (tmp_path / 'd' / 'sub').mkdir(parents=True)
    (tmp_path / 'd' / 'base.raw').write_bytes(bytes([5]) * MIB)
    drover('create', '-q', '-f', 'add-cow', '-b', 'base.raw', '-F', 'raw', 'd/disk.add-cow', cwd=tmp_path)
    drover('io', '-c', 'write -P 6 0 64k', 'd/disk.add-cow', cwd=tmp_path)
    shutil.move(str(tmp_path / 'd'), str(tmp_path / 'e'))
    view = same(tmp_path / 'e' / 'disk.add-cow', tmp_path)
    assert view == bytes([6]) * 65536 + bytes([5]) * (MIB - 65536)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_written_streamed_retired(sizes, tmp_path):
    rnd = rng('retire', sizes)
    size, base_size = sizes
    where = tmp_path / 'd'
    where.mkdir()
    (where / 'base.raw').write_bytes(rnd.randbytes(base_size))
    view = bytearray((where / 'base.raw').read_bytes()[:size].ljust(size, b'\0'))
    path = where / 'disk.add-cow'
    drover('create', '-q', '-f', 'add-cow', '-o', 'image_file=disk.raw', '-b', 'base.raw', '-F', 'raw', path,
           str(size), ok=False)
    if addcow.Image.load(str(path)).size() != size:  # rounded: then it is made by the writer
        (where / 'disk.raw').unlink()
        addcow.make(str(path), size, backing='base.raw', image='disk.raw')
    argv = []
    for off, length in random_ranges(rnd, size):
        pattern = rnd.choice((None, 0xaa, rnd.randrange(1, 256)))
        argv += ['-c', f'write -z {off} {length}' if pattern is None else f'write -P {pattern} {off} {length}']
        view[off:off + length] = bytes([pattern or 0]) * length
    drover('io', '-f', 'add-cow', *argv, path)
    assert same(path, tmp_path) == view
    before = digest(where)
    done = drover('addcow', 'retire', path, ok=False)
    assert done.returncode == 1 and done.stderr.strip(), 'sectors are missing'
    assert digest(where) == before
    drover('stream', path)
    assert same(path, tmp_path) == view
    drover('addcow', 'retire', path)
    assert not path.exists() and (where / 'disk.raw').read_bytes() == view
    assert sorted(os.listdir(where)) == ['base.raw', 'disk.raw']
    if HAVE_QEMU and size % 512 == 0:
        (tmp_path / 'view.raw').write_bytes(view)
        run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', where / 'disk.raw', tmp_path / 'disk.qcow2')
        run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', tmp_path / 'disk.qcow2', tmp_path / 'view.raw')


@pytest.mark.parametrize('fmt', ['raw', 'vmdk', 'add-cow'])
def test_convert_to_and_fro(fmt, tmp_path):
    rnd = rng('convert', fmt)
    source = tmp_path / 'source.raw'
    content = bytearray(2 * MIB)
    for off, length in random_ranges(rnd, 2 * MIB, 4096):
        content[off:off + length] = rnd.randbytes(length)
    source.write_bytes(content)
    one, two, three = tmp_path / f'one.{fmt}', tmp_path / 'two.add-cow', tmp_path / 'three.raw'
    drover('convert', '-f', 'raw', '-O', fmt, source, one)
    drover('convert', '-f', fmt, '-O', 'add-cow', one, two)
    assert same(two, tmp_path) == content
    drover('check', two)
    drover('convert', '-f', 'add-cow', '-O', 'raw', two, three)
    assert three.read_bytes() == content
    if HAVE_QEMU:
        run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', source, three)


# ---------------------------------------------------------------- what is refused


def bad_images():
    good = addcow.header_1('base.raw', 'disk.raw')
    late = addcow.header_20('base.raw', 'disk.raw', backing_format='raw')
    for n in (0, 1, 3, 4, 7, 8, 11, 12, 75, 76, 511, 512, 1035, 1036, 2059, 2060, 2559):
        yield f'cut-{n}', good[:n], n >= 8
    for n in (4, 75, 76, 4095, 65535):
        yield f'late-cut-{n}', late[:n], True
    yield 'version-2', addcow.header_1('base.raw', 'disk.raw', 2), True
    yield 'little-endian', good[:8] + struct.pack('<I', 1) + good[12:], True
    yield 'backing-no-nul', addcow.header_1('x' * 1024, 'disk.raw'), True
    yield 'image-no-nul', addcow.header_1('base.raw', 'x' * 1024), True
    yield 'behind-nul', addcow.header_1(b'base.raw\0more', 'disk.raw'), True
    yield 'image-behind-nul', addcow.header_1('base.raw', b'disk.raw\0more'), True
    yield 'reserved', addcow.header_1('base.raw', 'disk.raw', reserved=b'\0\0\1'), True
    yield 'no-image', addcow.header_1('base.raw', ''), True
    yield 'missing-raw', addcow.header_1('base.raw', 'nothing.raw'), True
    yield 'missing-base', addcow.header_1('nothing.raw', 'disk.raw'), True
    yield 'raw-is-base', addcow.header_1('base.raw', 'base.raw'), True
    yield 'raw-is-link-to-base', addcow.header_1('base.raw', 'link.raw'), True
    yield 'raw-is-itself', addcow.header_1('base.raw', 'bad.add-cow'), True
    yield 'base-is-itself', addcow.header_1('json:{"driver":"add-cow","file":{"filename":"bad.add-cow"}}', 'disk.raw'), True
    yield 'raw-outside', addcow.header_1('base.raw', '../outside.raw'), True
    yield 'raw-is-directory', addcow.header_1('base.raw', 'dir'), True
    yield 'json-broken', addcow.header_1('json:{"driver":', 'disk.raw'), True
    yield 'json-no-name', addcow.header_1('json:{"driver":"raw"}', 'disk.raw'), True
    yield 'json-driver', addcow.header_1('json:{"driver":"wonder","file":{"filename":"base.raw"}}', 'disk.raw'), True
    yield 'draft-c', addcow.MAGIC_20 + struct.pack('<I', 1) + bytes(4096), True
    for bits in (8, 22):
        yield f'bits-{bits}', late[:20] + struct.pack('<I', bits) + late[24:], True
    yield 'feature', addcow.header_20('base.raw', 'disk.raw', features=1 << 40), True
    yield 'header-size', addcow.header_20('base.raw', 'disk.raw', header_size=4096), True
    yield 'image-format', addcow.header_20('base.raw', 'disk.raw', image_format='qcow2'), True
    yield 'offset', addcow.header_20('base.raw', 'disk.raw', image_offset=65530), True
    yield 'offset-wraps', addcow.header_20('base.raw', 'disk.raw', backing_size=0xfffffff0), True
    yield 'size-no-offset', addcow.header_20('', 'disk.raw', backing_size=4), True


@pytest.mark.parametrize('name,blob,magic', bad_images(), ids=lambda v: v if isinstance(v, str) else '')
def test_bad_input_is_refused_and_nothing_changes(name, blob, magic, tmp_path):
    where = tmp_path / 'd'
    (where / 'dir').mkdir(parents=True)
    for other in ('base.raw', 'disk.raw', '../outside.raw'):
        (where / other).write_bytes(bytes([1]) * 4096)
    os.link(where / 'base.raw', where / 'link.raw')
    (where / 'dir').rmdir()
    path = where / 'bad.add-cow'
    path.write_bytes(blob)
    before = digest(where)
    if name == 'raw-is-directory':
        (where / 'dir').mkdir()
    verbs = [('convert', '-f', 'add-cow', '-O', 'raw', path, tmp_path / 'out'),
             ('io', '-f', 'add-cow', '-c', 'write 0 512', path)]
    if magic and 'base' not in name and name not in ('json-driver', 'json-no-name'):
        verbs.append(('info', path))  # which shows what names it has, whatever stands behind them
    for verb in verbs:
        done = drover(*verb, ok=False)
        assert done.returncode == 1, (verb, done)
        assert done.stderr.strip() and 'add-cow' in done.stderr, done.stderr
        assert ' lock' not in done.stderr, 'that is not the reason'
    if name == 'raw-is-directory':
        (where / 'dir').rmdir()
    assert digest(where) == before
