# SPDX-License-Identifier: LGPL-2.1-or-later
"""rebase -c: what is copied is compressed, what the overlay had stays, and all tools read the same."""
import json
import os

import pytest
from tools import DROVER, MIB, TOOLS, Disk, Drover, create, rng, run

pytestmark = pytest.mark.usefixtures('qemu')

OPTIONS = ['', 'cluster_size=512', 'cluster_size=512k', 'compression_type=zstd', 'compat=0.10', 'extended_l2=on']


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parent(rnd, path, size):
    """Words that compress well, places that do not, holes; and much that two parents have alike."""
    words = [b'%07d ' % (i * 7919) for i in range(50)]
    with open(path, 'wb') as f:
        f.truncate(size)
        for off in range(0, size, 1 << 17):
            f.seek(off)
            kind = rnd.randrange(4)
            if kind:
                f.write(rnd.randbytes(90000) if kind == 1 else b''.join(rnd.choices(words, k=9000)) if kind == 2 else words[0] * 9000)
        f.truncate(size)


@pytest.mark.parametrize('target', ['new.raw', ''], ids=['rebase', 'flatten'])
@pytest.mark.parametrize('options', OPTIONS)
def test_the_copies_are_compressed(options, target):
    rnd = rng('rebase -c', options, target)
    size = 3 * MIB + 512 * 77
    parent(rnd, 'old.raw', size - 5000 // 512 * 512)
    parent(rnd, 'new.raw', size + 70000)
    with open('old.raw', 'rb') as f:
        disk = Disk('disk.qcow2', 'qcow2', size, f.read())
    create(Drover, disk.path, 'qcow2', disk.size, options, 'old.raw', 'raw')
    disk.write(Drover, rnd, n=3)
    run('cp', disk.path, 'plain.qcow2')
    run(DROVER, 'rebase', '-c', '-b', target, *(['-F', 'raw'] if target else []), disk.path)
    run(DROVER, 'rebase', '-b', target, *(['-F', 'raw'] if target else []), 'plain.qcow2')
    disk.verify('.')
    run('qemu-img', 'check', '-q', disk.path)
    result = json.loads(run(DROVER, 'check', '--output=json', disk.path).stdout)
    assert result['compressed-clusters'] > 0 and 'corruptions' not in result and 'leaks' not in result
    if '512k' not in options:
        assert os.stat(disk.path).st_blocks < os.stat('plain.qcow2').st_blocks
    for tool in TOOLS:
        disk.write(tool, rnd)
    disk.verify('.')


def test_it_is_refused_where_nothing_can_be_compressed():
    parent(rng('refused'), 'old.raw', MIB)
    create(Drover, 'top.vmdk', 'vmdk', MIB)
    assert 'Compression not supported' in run(DROVER, 'rebase', '-c', '-b', '', 'top.vmdk', ok=False).stderr
