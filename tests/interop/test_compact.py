# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that QEMU made and wrote, compacted by Drover: QEMU finds nothing wrong, reads the same, and goes on writing."""
import json
import os

import pytest
from tools import DROVER, MIB, Disk, Drover, Qemu, create, rng, run

pytestmark = pytest.mark.usefixtures('qemu')

CASES = [('qcow2', 'compat=0.10'), ('qcow2', 'cluster_size=512'), ('qcow2', 'extended_l2=on,cluster_size=16k'),
         ('qcow2', 'refcount_bits=1,preallocation=metadata'), ('vmdk', 'subformat=twoGbMaxExtentSparse')]


def files_length(directory):
    return sum(os.path.getsize(os.path.join(directory, name)) for name in os.listdir(directory))


@pytest.mark.parametrize('fmt, options', CASES)
def test_written_compacted_and_written_again(fmt, options, tmp_path, monkeypatch):
    directory = tmp_path / 'disk'
    directory.mkdir()
    monkeypatch.chdir(directory)
    rnd = rng('compact', fmt, options)
    disk = Disk(f'disk.{fmt}', fmt, 6 * MIB)
    create(Qemu, disk.path, fmt, disk.size, options)
    disk.write(Qemu, rnd, 12)
    off = rnd.randrange(0, 4 * MIB) // 65536 * 65536
    run('qemu-io', '-c', f'write -P 0 {off} 1M', disk.path)
    disk.content[off:off + MIB] = bytes(MIB)
    before = files_length(directory)
    run(DROVER, 'compact', '-q', disk.path)
    assert files_length(directory) < before
    run('qemu-img', 'check', '-q', disk.path)
    disk.verify(tmp_path, [Qemu])
    disk.write(Qemu, rnd, 4)
    run('qemu-img', 'check', '-q', disk.path)
    disk.verify(tmp_path, [Drover])


@pytest.mark.parametrize('kind', ['-c', 'snapshot'])
def test_compressed_clusters_and_snapshots(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rnd = rng('compact', kind)
    disk = Disk('disk.qcow2', 'qcow2', 6 * MIB)
    words = [rnd.randbytes(5) for _ in range(200)]
    disk.content[0:4 * MIB] = b''.join(rnd.choices(words, k=MIB))[:4 * MIB]
    with open('plain.raw', 'wb') as f:
        f.write(disk.content)
    flag = ['-c'] if kind == '-c' else []
    run('qemu-img', 'convert', *flag, '-f', 'raw', '-O', 'qcow2', '-o', 'cluster_size=16k', 'plain.raw', disk.path)
    if kind == 'snapshot':
        run('qemu-img', 'snapshot', '-c', 'one', disk.path)
    disk.write(Qemu, rnd, 8)
    run('qemu-io', '-d', 'unmap', '-c', 'write -zu 0 2M', disk.path)
    disk.content[0:2 * MIB] = bytes(2 * MIB)
    before = os.path.getsize(disk.path)
    run(DROVER, 'compact', '-q', disk.path)
    assert os.path.getsize(disk.path) <= before - (MIB // 2 if kind == '-c' else 0)
    run('qemu-img', 'check', '-q', disk.path)
    disk.verify(tmp_path, [Qemu])
    if kind == 'snapshot':
        run('qemu-img', 'convert', '-l', 'one', '-O', 'raw', disk.path, 'then.raw')
        run('qemu-img', 'compare', 'then.raw', 'plain.raw')


def bitmaps_of(path):
    return json.loads(run('qemu-img', 'info', '--output=json', path).stdout)['format-specific']['data']['bitmaps']


@pytest.mark.parametrize('cluster', ['4k', '512'])
def test_bitmaps_and_a_grown_disk(cluster, tmp_path, monkeypatch):
    """Bits, tables and a directory that QEMU put behind the data, and an L1 table behind all of them."""
    monkeypatch.chdir(tmp_path)
    disk = Disk('disk.qcow2', 'qcow2', 6 * MIB)
    create(Qemu, disk.path, 'qcow2', disk.size, f'cluster_size={cluster}')
    run('qemu-io', '-c', 'write -P 1 0 4M', disk.path)
    run('qemu-img', 'resize', '-q', disk.path, '200M')
    for name in ('one', 'n' * 700):
        run('qemu-img', 'bitmap', '--add', '-g', '512', disk.path, name)
    run('qemu-io', '-c', 'write -P 2 4M 1M', '-c', 'discard 0 4M', disk.path)
    bitmaps = bitmaps_of(disk.path)
    run(DROVER, 'compact', '-q', disk.path)
    assert os.path.getsize(disk.path) < 2 * MIB
    run('qemu-img', 'check', '-q', disk.path)
    run('qemu-io', '-r', '-c', 'read -P 2 4M 1M', '-c', 'read -P 0 0 4M', disk.path)
    assert bitmaps_of(disk.path) == bitmaps
    run('qemu-io', '-c', 'write -P 3 0 1M', disk.path)
    run('qemu-img', 'check', '-q', disk.path)
