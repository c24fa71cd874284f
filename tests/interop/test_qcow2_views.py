# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another parent for qcow2 images with snapshots inside: the disk and every snapshot show what they
did before, to Drover and to QEMU, which itself would change what the snapshots show."""
import json
import os

import pytest
from tools import DROVER, MIB, TOOLS, Drover, create, rng, run

ROUNDS = 2 if os.environ.get('DROVER_TEST_LONG') else 1

pytestmark = pytest.mark.usefixtures('qemu')

OPTIONS = ['', 'cluster_size=512', 'cluster_size=2M', 'compat=0.10,cluster_size=1k', 'refcount_bits=2,cluster_size=4k',
           'extended_l2=on,cluster_size=16k', 'refcount_bits=64,cluster_size=4k']
WAYS = {'first parent': ['rebase', '-b', 'new.raw', '-F', 'raw', 'disk.qcow2'],
        'rebase': ['rebase', '-b', 'new.raw', '-F', 'raw', 'disk.qcow2'], 'flatten': ['rebase', '-b', '', 'disk.qcow2'],
        'compressed': ['rebase', '-c', '-b', 'new.raw', '-F', 'raw', 'disk.qcow2'],
        'flatten compressed': ['rebase', '-c', '-b', '', 'disk.qcow2'],
        'stream': ['stream', 'disk.qcow2'], 'stream to the base': ['stream', '--base', 'old.raw', 'disk.qcow2']}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def content(tool, snapshot=None):
    argv = ['-l', snapshot] if snapshot else []
    run(*tool.img, 'convert', *argv, '-O', 'raw', 'disk.qcow2', 'out.raw')
    with open('out.raw', 'rb') as f:
        return f.read()


def names():
    info = json.loads(run('qemu-img', 'info', '--output=json', 'disk.qcow2').stdout)
    return [s['name'] for s in info.get('snapshots', [])]


def views(tool):
    """QEMU reads a snapshot as if it were as large as the disk: what is behind its end is none of its content."""
    return {name: content(tool, name)[:len(content(Drover, name))] for name in [None] + names()}


def parent(rnd, path, size):
    """Bytes of two kinds, so that some of them are the same in two parents."""
    with open(path, 'wb') as f:
        f.truncate(size)
        for _ in range(12):
            off = rnd.randrange(0, size, 512)
            f.seek(off)
            f.write(bytes([rnd.choice((17, 18))]) * min(rnd.choice((512, 5000, 70000, 300000)), size - off))


def change(rnd, tool, size, path='disk.qcow2'):
    argv = []
    for _ in range(3):
        length = min(rnd.choice((512, 4096, 65536, 200000)), size) // 512 * 512
        off = rnd.randrange(0, size - length + 1) // 512 * 512
        argv += ['-c', rnd.choice((f'write -P {rnd.randrange(1, 256)} {off} {length}', f'write -z {off} {length}',
                                   f'discard {off} {length}'))]
    run(*tool.io, *argv, path)


def make(rnd, options, has_parent=True):
    """Snapshots that share tables, that do not, and that are of other sizes than the disk."""
    size = rnd.randrange(MIB // 2, 2 * MIB, 512)
    parent(rnd, 'old.raw', rnd.randrange(MIB // 2, 2 * MIB, 512))
    parent(rnd, 'new.raw', rnd.randrange(MIB // 2, 2 * MIB, 512))
    create(Drover, 'middle.qcow2', 'qcow2', size, '', 'old.raw', 'raw')
    change(rnd, Drover, size, 'middle.qcow2')
    create(rnd.choice(TOOLS), 'disk.qcow2', 'qcow2', size, options, *(['middle.qcow2', 'qcow2'] if has_parent else []))
    for turn in range(rnd.randrange(1, 9)):
        tool = rnd.choice(TOOLS)
        if len(names()) == 2 and 'refcount_bits=2' in options:
            break
        what = rnd.choice(('snapshot', 'snapshot', 'write', 'resize', 'apply'))
        if what == 'snapshot':
            inside = ['-i'] if tool is Drover else []
            run(*tool.img, 'snapshot', *inside, '-c', f's{turn}', 'disk.qcow2')
        elif what == 'write':
            change(rnd, tool, json.loads(run('qemu-img', 'info', '--output=json', 'disk.qcow2').stdout)['virtual-size'])
        elif what == 'resize' and 'compat' not in options:
            run(*tool.img, 'resize', '-q', '--shrink', 'disk.qcow2', rnd.randrange(MIB // 2, 2 * MIB, 512))
        elif what == 'apply' and names() and 'compat' not in options:
            run(*tool.img, 'snapshot', '-a', rnd.choice(names()), 'disk.qcow2')
    if not names():
        run('qemu-img', 'snapshot', '-c', 'last', 'disk.qcow2')


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('number', range(ROUNDS))
def test_every_view_stays(number, options, way):
    rnd = rng('views', number, options, way)
    make(rnd, options, way != 'first parent')
    before = {tool.name: views(tool) for tool in TOOLS}
    run('qemu-img', 'check', '-q', 'disk.qcow2')
    run(DROVER, *WAYS[way])
    run('qemu-img', 'check', '-q', 'disk.qcow2')
    run(DROVER, 'check', '-q', 'disk.qcow2')
    for tool in TOOLS:
        assert views(tool) == before[tool.name], tool.name
    # what was linked into several trees is written to and given up like anything else
    size = len(before['drover'][None])
    change(rnd, rnd.choice(TOOLS), size)
    for name in names():
        run('qemu-img', 'check', '-q', 'disk.qcow2')
        assert content(Drover, name) == before['drover'][name]
        run(*rnd.choice(TOOLS).img, 'snapshot', '-d', name, 'disk.qcow2')
    run('qemu-img', 'check', '-q', 'disk.qcow2')


@pytest.mark.parametrize('options', ['', 'extended_l2=on'])
def test_nothing_of_the_old_parent_comes_to_light_when_a_snapshot_grows(options):
    """QEMU clears what is behind the end of a disk only where it still has a parent."""
    parent(rng('growing', options), 'old.raw', 2 * MIB)
    with open('old.raw', 'r+b') as f:
        f.write(b'x' * MIB)
    create(Drover, 'disk.qcow2', 'qcow2', 96 * 1024 + 512, options, 'old.raw', 'raw')
    run(DROVER, 'snapshot', '-i', '-c', 'small', 'disk.qcow2')
    run(DROVER, 'resize', '-q', 'disk.qcow2', '500k')
    before = content(Drover, 'small')
    run(DROVER, 'rebase', '-b', '', 'disk.qcow2')
    run('qemu-img', 'snapshot', '-a', 'small', 'disk.qcow2')
    run('qemu-img', 'resize', '-q', 'disk.qcow2', '1M')
    for tool in TOOLS:
        assert content(tool) == before + bytes(MIB - len(before))
