# SPDX-License-Identifier: LGPL-2.1-or-later
"""libqcow, a reader that shares no code with QEMU, shows what Drover wrote. It reads versions 2 and 3 with
deflate; zero clusters, other compression, sub-clusters and data files it does not know (as of 20201213)."""
import os
import shutil
import subprocess

import pytest
from tools import DROVER, MIB, Disk, Drover, create, rng, run

pytestmark = [pytest.mark.skipif(not shutil.which('qcowmount'), reason='libqcow-utils is not installed'),
              pytest.mark.skipif(not os.access('/dev/fuse', os.R_OK | os.W_OK), reason='FUSE is not there')]

OPTIONS = ['compat=0.10', 'compat=0.10,cluster_size=512', 'compat=0.10,cluster_size=2M', '', 'cluster_size=4k',
           'refcount_bits=1', 'refcount_bits=64', 'lazy_refcounts=on', 'preallocation=metadata',
           'preallocation=falloc', 'preallocation=full']


def shown(path, where):
    """The disk's bytes, by way of a mount."""
    where.mkdir(exist_ok=True)
    run('qcowmount', path, where)
    try:
        with open(where / 'qcow1', 'rb') as f:
            return f.read()
    finally:
        subprocess.run(['fusermount', '-u', str(where)], check=True)


def fill(disk, rnd):
    """Random data at random places: whole clusters of zeros would become what libqcow does not know."""
    argv = []
    for _ in range(12):
        length = rnd.choice((512, 4096, 65536, 131072))
        off = rnd.randrange(0, disk.size - length + 1) // 512 * 512
        pattern = rnd.randrange(1, 256)
        argv += ['-c', f'write -P {pattern} {off} {length}']
        disk.content[off:off + length] = bytes([pattern]) * length
    run(*Drover.io, '-f', 'qcow2', *argv, disk.path)


@pytest.mark.parametrize('options', OPTIONS)
def test_libqcow_reads_what_drover_wrote(options, tmp_path):
    rnd = rng('libqcow', options)
    disk = Disk(tmp_path / 'disk.qcow2', 'qcow2', 5 * MIB + 512)
    create(Drover, disk.path, 'qcow2', disk.size, options)
    for _ in range(2):
        fill(disk, rnd)
        assert shown(disk.path, tmp_path / 'mount') == bytes(disk.content)
    text = run('qcowinfo', disk.path).stdout
    assert f'({disk.size} bytes)' in text
    assert 'Format version\t\t: ' + ('2' if 'compat' in options else '3') in text


@pytest.mark.parametrize('options', ['compat=0.10', 'compat=1.1', 'compat=0.10,cluster_size=4k'])
def test_libqcow_decodes_what_drover_compressed(options, tmp_path):
    rnd = rng('libqcow compressed', options)
    words = [rnd.randbytes(5) for _ in range(100)]
    content = b''.join(rnd.choices(words, k=3 * MIB // 5))[:3 * MIB // 65536 * 65536 - 65536]
    (tmp_path / 'plain.raw').write_bytes(content)
    run(DROVER, 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, tmp_path / 'plain.raw',
        tmp_path / 'disk.qcow2')
    assert shown(tmp_path / 'disk.qcow2', tmp_path / 'mount') == content
