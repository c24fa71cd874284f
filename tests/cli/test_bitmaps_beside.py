# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps in a file beside the image, on a real file system: who writes without knowing of them is noticed, whatever it
does to the times of the file."""
import json
import os
import shutil
import subprocess

import pytest

BESIDE = '.drover-bitmaps'
FORMATS = {'raw': [], 'vmdk': [], 'add-cow': [], 'qcow2': ['-o', 'compat=0.10']}


@pytest.fixture(name='disk', params=FORMATS)
def make_disk(request, t, monkeypatch):
    monkeypatch.chdir(t.dir)
    t.ok('create', '-f', request.param, *FORMATS[request.param], 'disk', '4M')
    t.ok('io', '-c', 'write -P 1 0 4M', 'disk')
    t.ok('convert', '-O', 'raw', 'disk', 'backup')
    t.ok('bitmap', '--add', '-g', '4k', 'disk', 'b')
    return 'disk'


def bitmaps(t, path):
    info = json.loads(t.ok('info', '--output=json', path))
    return {b['name']: b.get('untrusted') for b in info.get('bitmaps', [])}


def test_what_we_write_keeps_a_bitmap_trusted(disk, t):
    t.ok('io', '-c', 'write 1M 64k', disk)
    assert bitmaps(t, disk) == {'b': None}


def test_a_byte_written_by_another_program_is_noticed(disk, t):
    with open(disk, 'r+b') as f:
        byte = f.read(1)
        f.seek(0)
        f.write(byte)
    assert 'another program' in bitmaps(t, disk)['b']
    t.ok('io', '-c', 'write 0 512', disk)
    assert 'another program' in bitmaps(t, disk)['b'], 'our own writes do not make it good'


def test_times_that_are_put_back_do_not_hide_a_write(disk, t):
    before = os.stat(disk)
    with open(disk, 'r+b') as f:
        byte = f.read(1)
        f.seek(0)
        f.write(byte)
    os.utime(disk, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(disk).st_mtime_ns == before.st_mtime_ns
    assert 'another program' in bitmaps(t, disk)['b']


def test_an_image_that_was_put_back_from_a_copy_is_noticed(disk, t):
    shutil.copy2(disk, 'copy')
    os.rename('copy', disk)
    assert 'put back' in bitmaps(t, disk)['b']


def test_a_rebuilt_bitmap_is_trusted_again(disk, t):
    t.ok('io', '-c', 'write -P 2 1M 64k', disk)
    os.utime(disk)
    assert bitmaps(t, disk)['b']
    t.ok('bitmap', '--rebuild', '--against', 'backup', '-F', 'raw', disk, 'b')
    assert bitmaps(t, disk) == {'b': None}


def test_the_last_bitmap_takes_its_file_along(disk, t):
    assert os.path.exists(disk + BESIDE)
    t.ok('bitmap', '--remove', disk, 'b')
    assert not os.path.exists(disk + BESIDE)


def test_a_link_leads_to_the_same_bitmaps(t, monkeypatch):
    monkeypatch.chdir(t.dir)
    disk = 'disk'
    t.ok('create', '-f', 'raw', disk, '4M')
    t.ok('bitmap', '--add', disk, 'b')
    os.mkdir('elsewhere')
    os.symlink('../' + disk, 'elsewhere/link')
    t.ok('bitmap', '--add', 'elsewhere/link', 'c')
    assert set(bitmaps(t, disk)) == {'b', 'c'}
    assert not os.path.exists('elsewhere/link' + BESIDE)


@pytest.fixture(name='seconds')
def whole_seconds(tmp_path):
    """A directory on a file system that keeps times in whole seconds."""
    image, where = tmp_path / 'fs.img', tmp_path / 'mnt'
    where.mkdir()
    image.touch()
    os.truncate(image, 32 << 20)
    mkfs = shutil.which('mkfs.ext4', path=os.environ['PATH'] + ':/usr/sbin:/sbin')
    if not mkfs or subprocess.run([mkfs, '-q', '-I', '128', image], capture_output=True, check=False).returncode != 0:
        pytest.skip('no mkfs.ext4')
    if subprocess.run(['mount', '-o', 'loop', image, where], capture_output=True, check=False).returncode != 0:
        pytest.skip('file systems cannot be mounted here')
    yield where
    subprocess.run(['umount', where], check=False)


def test_a_write_at_once_is_noticed_where_times_are_whole_seconds(seconds, t):
    disk = str(seconds / 'disk')
    t.ok('create', '-f', 'raw', disk, '4M')
    t.ok('bitmap', '--add', disk, 'b')
    for _ in range(3):
        t.ok('io', '-c', 'write 0 64k', disk)
        assert bitmaps(t, disk) == {'b': None}
    with open(disk, 'r+b') as f:
        f.seek(1000000)  # where no sample is taken
        f.write(b'x')
    assert 'another program' in bitmaps(t, disk)['b']


def test_under_the_name_of_qemu_img_there_are_bitmaps_inside_only(disk, t):
    for args in (['bitmap', '--add', disk, 'c'], ['convert', '--bitmaps', '-O', 'qcow2', disk, 'copy']):
        r = t.ours('qemu-img', *args)
        assert r.code == 1 and 'support' in r.err, r
    assert bitmaps(t, disk) == {'b': None}
    r = t.ours('qemu-img', 'bitmap', '--remove', disk, 'b')
    assert r.code == 0 and not os.path.exists(disk + BESIDE)
