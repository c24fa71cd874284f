# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives that Proxmox's own tool wrote, where DROVER_SAMPLES names a directory that has them."""
import hashlib
import os
import shutil
import subprocess
import uuid

import pytest
from tools import DROVER, SAMPLES, run

WHERE = os.path.join(SAMPLES, 'vma')


def expected():
    """{archive: {item: md5}}"""
    out = {}
    path = os.path.join(WHERE, 'EXPECTED.md5')
    if SAMPLES and os.path.exists(path):
        with open(path, encoding='ascii') as f:
            for line in f:
                md5, archive, item = line.split()
                out.setdefault(archive, {})[item] = md5
    return out


EXPECTED = expected()
FILES = sorted(name for name in os.listdir(WHERE) if any(name.startswith(archive) for archive in EXPECTED)) if EXPECTED else ['none']
pytestmark = pytest.mark.skipif(not EXPECTED, reason='no EXPECTED.md5 in DROVER_SAMPLES/vma')


def items(name):
    return next(found for archive, found in EXPECTED.items() if name.startswith(archive))


def is_config(item):
    return item.startswith('qemu-server.')


def md5(path):
    digest = hashlib.md5()
    with open(path, 'rb') as f:
        for piece in iter(lambda: f.read(1 << 20), b''):
            digest.update(piece)
    return digest.hexdigest()


@pytest.fixture
def vma(tmp_path):
    path = tmp_path / 'vma'
    os.symlink(os.path.abspath(DROVER), str(path))
    return path


def check(name, where):
    for item, wanted in items(name).items():
        file = item if is_config(item) else 'vmstate.bin' if item == 'vmstate' else f'disk-{item}.raw'
        assert md5(os.path.join(where, file)) == wanted, item


@pytest.mark.parametrize('name', FILES)
def test_what_it_holds(name, vma, tmp_path):
    path = os.path.join(WHERE, name)
    run(vma, 'verify', path)
    run(vma, 'extract', path, tmp_path / 'out')
    check(name, tmp_path / 'out')
    with open(path, 'rb') as f:  # compressed or not, from standard input too
        run(vma, 'extract', '-', tmp_path / 'piped', stdin=f)
    check(name, tmp_path / 'piped')
    text = run(vma, 'list', path).stdout
    for item in items(name):
        assert f'name: {item}\n' in text if is_config(item) else f'devname: {item}\n' in text or 'VMSTATE: ' in text


@pytest.mark.parametrize('name', [name for name in FILES if name.endswith('.vma')] or ['none'])
def test_its_disks_are_images(name, tmp_path):
    for item, wanted in items(name).items():
        if is_config(item) or item == 'vmstate':
            continue
        image = f'vma:{os.path.join(WHERE, name)}#{item}'
        run(DROVER, 'convert', '-O', 'raw', image, tmp_path / 'out.raw')
        assert md5(tmp_path / 'out.raw') == wanted
        run(DROVER, 'compare', image, tmp_path / 'out.raw')


def sample(name):
    path = os.path.join(WHERE, name)
    if not os.path.exists(path):
        pytest.skip(f'no {name} in DROVER_SAMPLES/vma')
    return path


def test_an_archive_with_nothing_but_an_empty_file(vma, tmp_path):
    path = sample('p04-pve41-empty-config-only.vma')
    run(vma, 'verify', path)
    run(vma, 'extract', path, tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == ['empty.conf'] and os.path.getsize(tmp_path / 'out' / 'empty.conf') == 0


def test_an_archive_with_nothing_that_its_writer_cannot_read(vma, tmp_path):
    path = sample('p05-pve41-unreadable-empty.vma')
    text = run(vma, 'list', path).stdout
    assert text.startswith('CTIME: ') and text.count('\n') == 1
    run(vma, 'verify', path)
    run(vma, 'extract', path, tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == []


def test_a_header_that_its_writer_broke(vma, tmp_path):
    path = sample('p06-pve41-broken-509-char-name.vma')
    for args in (['list', path], ['config', path], ['verify', path], ['extract', path, tmp_path / 'out']):
        done = run(vma, *args, ok=False)
        assert 0 < done.returncode < 100 and os.path.basename(path) in done.stderr, done
        assert done.stdout == ''
    assert not os.path.exists(tmp_path / 'out') or os.listdir(tmp_path / 'out') == []


def test_a_compressed_archive_that_is_cut(vma, tmp_path):
    path = sample('vzdump-qemu-101-2026_11_20-09_28_23.vma.zst')
    for args in (['verify', path], ['extract', path, tmp_path / 'out']):
        done = run(vma, *args, ok=False)
        assert 0 < done.returncode < 100 and os.path.basename(path) in done.stderr, done
    left = os.listdir(tmp_path / 'out') if os.path.exists(tmp_path / 'out') else []
    assert not [name for name in left if name.startswith('disk-')]


@pytest.mark.parametrize('tool', [['zstd', '-q', '-c'], ['gzip', '-c'], ['gzip', '--rsyncable', '-c'], ['bzip2', '-c'], ['lzop', '-c'],
                                  ['zstd', '-q', '-c', '--long=24', '--check'], ['lzop', '-9', '-c']], ids=' '.join)
def test_compressed_by_other_programs(tool, vma, tmp_path):
    if not shutil.which(tool[0]):
        pytest.skip(f'{tool[0]} is not installed')
    name = 'p01-pve41-multi.vma'
    with open(tmp_path / 'packed', 'wb') as f:  # the name says nothing
        subprocess.run([*tool, sample(name)], stdout=f, check=True)
    run(vma, 'verify', tmp_path / 'packed')
    run(vma, 'extract', tmp_path / 'packed', tmp_path / 'out')
    check(name, tmp_path / 'out')


@pytest.mark.parametrize('name, disks, configs', [
    ('p02-pve41-single.vma', ['drive-scsi0'], ['qemu-server.conf']), ('p04-pve41-empty-config-only.vma', [], ['empty.conf'])])
def test_made_again_it_has_the_same_bytes(name, disks, configs, tmp_path):
    """One disk leaves no freedom of order: what Proxmox's tool and Drover write of it is the same."""
    with open(sample(name), 'rb') as f:
        wanted = f.read()
    run(DROVER, 'vma', 'extract', '-q', sample(name), tmp_path / 'out')
    args = [a for d in disks for a in ('-d', f'format=raw:{d}={tmp_path}/out/{d}.raw')]
    args += [a for c in configs for a in ('-c', tmp_path / 'out' / c)]
    run(DROVER, 'vma', 'create', '-q', '--uuid', uuid.UUID(bytes=wanted[8:24]), '--ctime',
        int.from_bytes(wanted[24:32], 'big'), *args, tmp_path / 'again.vma')
    assert (tmp_path / 'again.vma').read_bytes() == wanted
