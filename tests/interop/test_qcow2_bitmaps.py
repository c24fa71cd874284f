# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps inside qcow2 images: what Drover and QEMU's tools say of them, and do with them, in turns."""
import json

import pytest
from tools import MIB, TOOLS, Qemu, create, run

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
