# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots inside qcow2 images, made, applied and deleted by Drover and by qemu-img in turns."""
import json

import pytest
from tools import DROVER, MIB, TOOLS, Disk, Drover, Qemu, create, create_encrypted, rng, run

pytestmark = pytest.mark.usefixtures('qemu')

OPTIONS = ['', 'cluster_size=512', 'cluster_size=2M', 'compat=0.10', 'refcount_bits=64,cluster_size=4k', 'extended_l2=on']


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(tool, path, name):
    if tool is Qemu:
        run('qemu-img', 'snapshot', '-c', name, path)
    else:
        run(DROVER, 'snapshot', '-i', '-c', name, path)


def listed(path):
    info = json.loads(run('qemu-img', 'info', '--output=json', path).stdout)
    return [s['name'] for s in info.get('snapshots', [])]


def shows(tool, disk, name, content):
    run(*tool.img, 'convert', '-l', name, '-O', 'raw', disk.path, 'out.raw')
    with open('out.raw', 'rb') as f:
        assert f.read() == bytes(content), f'{tool.name}: {name} shows something else'


@pytest.mark.parametrize('options', OPTIONS)
def test_taken_in_turns(options, tmp_path):
    rnd = rng('snapshots', options)
    disk = Disk('disk.qcow2', 'qcow2', 2 * MIB + 512)
    create(rnd.choice(TOOLS), disk.path, 'qcow2', disk.size, options)
    held = {}
    for turn in range(16):
        tool = rnd.choice(TOOLS)
        what = rnd.choice(('create', 'create', 'apply', 'delete')) if held else 'create'
        if what == 'create':
            make(tool, disk.path, f's{turn}')
            held[f's{turn}'] = bytes(disk.content)
        elif what == 'apply':
            name = rnd.choice(sorted(held))
            run(*tool.img, 'snapshot', '-a', name, disk.path)
            disk.content[:] = held[name]
        else:
            name = rnd.choice(sorted(held))
            run(*tool.img, 'snapshot', '-d', name, disk.path)
            del held[name]
        disk.write(rnd.choice(TOOLS), rnd, n=2)
        run('qemu-img', 'check', '-q', disk.path)
        run(DROVER, 'check', '-q', disk.path)
        assert sorted(listed(disk.path)) == sorted(held)
    disk.verify(tmp_path)
    for name, content in held.items():
        for tool in TOOLS:
            shows(tool, disk, name, content)


@pytest.mark.parametrize('maker', TOOLS, ids=lambda t: t.name)
def test_of_compressed_clusters(maker):
    rnd = rng('compressed snapshots', maker.name)
    disk = Disk('disk.qcow2', 'qcow2', 2 * MIB)
    words = [rnd.randbytes(5) for _ in range(200)]
    disk.content[:] = b''.join(rnd.choices(words, k=disk.size // 5 + 1))[:disk.size]
    with open('plain.raw', 'wb') as f:
        f.write(disk.content)
    run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', 'plain.raw', disk.path)
    make(maker, disk.path, 'one')
    held = bytes(disk.content)
    disk.write(Drover, rnd)
    run('qemu-img', 'check', '-q', disk.path)
    for tool in TOOLS:
        shows(tool, disk, 'one', held)
    run(DROVER, 'snapshot', '-a', 'one', disk.path)
    run(DROVER, 'snapshot', '-d', 'one', disk.path)
    run('qemu-img', 'check', '-q', disk.path)
    run('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', 'plain.raw', disk.path)


@pytest.mark.parametrize('tool', TOOLS, ids=lambda t: t.name)
def test_bring_the_size_back(tool):
    create(Drover, 'disk.qcow2', 'qcow2', MIB)
    make(Drover, 'disk.qcow2', 'small')
    run('qemu-img', 'resize', '-q', 'disk.qcow2', '900M')
    make(Drover, 'disk.qcow2', 'large')
    for name, size in (('small', MIB), ('large', 900 * MIB)):
        run(*tool.img, 'snapshot', '-a', name, 'disk.qcow2')
        run('qemu-img', 'check', '-q', 'disk.qcow2')
        assert json.loads(run(DROVER, 'info', '--output=json', 'disk.qcow2').stdout)['virtual-size'] == size


def test_of_an_encrypted_disk():
    secret = ['--object', 'secret,id=s,data=abc']
    image = ['--image-opts', 'driver=qcow2,encrypt.key-secret=s,file.filename=disk.qcow2']

    def io(*commands):
        done = run('qemu-io', *secret, *image, *(part for c in commands for part in ('-c', c)))
        assert 'failed' not in done.stdout
    create_encrypted('disk.qcow2', 4 * MIB, 'luks')
    io('write -P 1 0 1M')
    make(Drover, 'disk.qcow2', 'one')
    io('write -P 2 0 2M')
    run('qemu-img', 'check', '-q', *secret, *image)
    run(DROVER, 'snapshot', '-a', 'one', 'disk.qcow2')
    io('read -P 1 0 1M', 'read -P 0 1M 1M')
    run(DROVER, 'snapshot', '-d', 'one', 'disk.qcow2')
    run('qemu-img', 'check', '-q', *secret, *image)
