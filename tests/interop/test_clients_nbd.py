# SPDX-License-Identifier: LGPL-2.1-or-later
"""libnbd's tools, nbdkit and ovirt-imageio's command lines, with Drover as their qemu-nbd."""
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time

import pytest

from clients import fixture_client, skip_without  # noqa: F401: pytest finds the fixture by its name
from tools import run


@pytest.fixture(name='disks', scope='module')
def fixture_disks(client):
    """disk.qcow2, its content as disk.raw, and top.qcow2 over it."""
    skip_without('nbdkit', 'nbdcopy', 'nbdinfo', 'qemu-img', 'qemu-io')
    if not os.path.exists(client.path('links', 'nbdkit-drover-plugin.so')):
        pytest.skip('our plugin for nbdkit is not built')
    work = client.path('work')
    run('qemu-img', 'create', '-q', '-f', 'qcow2', 'disk.qcow2', '8M', cwd=work)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', '-c', 'write -P 2 5M 192k', 'disk.qcow2', cwd=work)
    run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', 'disk.qcow2', 'disk.raw', cwd=work)
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'disk.qcow2', '-F', 'qcow2', 'top.qcow2', cwd=work)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 3 2M 64k', 'top.qcow2', cwd=work)


def play(client, *argv):
    return run(*argv, env=client.env, cwd=client.path('work'), timeout=60).stdout


def same(client, a, b):
    run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', client.work(a), client.work(b))


def test_libnbd_s_tools_start_qemu_nbd_on_a_socket_of_theirs(client, disks):
    play(client, 'nbdcopy', '--', '[', 'qemu-nbd', '-r', '-f', 'qcow2', 'disk.qcow2', ']', 'out.raw')
    same(client, 'out.raw', 'disk.raw')
    assert int(play(client, 'nbdinfo', '--size', '--', '[', 'qemu-nbd', '-f', 'qcow2', 'disk.qcow2', ']')) == 8 << 20
    extents = json.loads(play(client, 'nbdinfo', '--json', '--map', '--', '[', 'qemu-nbd', '-f', 'qcow2', 'disk.qcow2', ']'))
    assert [(e['offset'], e['type']) for e in extents] == [(0, 0), (1 << 20, 3), (5 << 20, 0), ((5 << 20) + (192 << 10), 3)]
    run('qemu-img', 'create', '-q', '-f', 'qcow2', client.work('new.qcow2'), '8M')
    play(client, 'nbdcopy', '--flush', '--', 'disk.raw', '[', 'qemu-nbd', '-f', 'qcow2', 'new.qcow2', ']')
    run('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', client.work('disk.raw'), client.work('new.qcow2'))
    run('qemu-img', 'check', '-q', client.work('new.qcow2'))


def test_nbdkit_starts_qemu_nbd_behind_its_nbd_plugin(client, disks):
    play(client, 'nbdkit', '-U', '-', 'nbd', 'command=qemu-nbd', 'arg=-f', 'arg=qcow2', 'arg=disk.qcow2',
         '--run', 'nbdcopy "$uri" out2.raw')
    same(client, 'out2.raw', 'disk.raw')


# image, what is asked of it, and what the export must be equal to: as ovirt-imageio's qemu_nbd.py builds the line.
SHOWN = [('top.qcow2', {'driver': 'qcow2'}, ('convert', '-f', 'qcow2', 'top.qcow2')),
         ('top.qcow2', {'driver': 'qcow2', 'backing': None}, ('convert', '-f', 'qcow2', 'alone.qcow2')),
         ('disk.raw', {'driver': 'raw'}, ('convert', '-f', 'raw', 'disk.raw'))]


@pytest.mark.parametrize('image, options, expected', SHOWN, ids=('chain', 'without its parents', 'raw'))
def test_ovirt_imageio_gets_the_disk_that_it_asks_for(client, disks, image, options, expected):
    run('cp', 'top.qcow2', 'alone.qcow2', cwd=client.path('work'))
    run('qemu-img', 'rebase', '-u', '-b', '', client.work('alone.qcow2'))
    run('qemu-img', *expected[:3], '-O', 'raw', expected[3], 'expected.raw', cwd=client.path('work'))
    version = play(client, 'qemu-nbd', '--version').splitlines()[0].split(None, 2)[1]
    assert tuple(int(n) for n in version.split('.')) >= (5, 2, 0)
    socket = client.work('socket')
    line = ['qemu-nbd', '--export-name=', '--persistent', '--shared=8', f'--socket={socket}', '--read-only', '--cache=none',
            '--aio=native', '--discard=unmap', '--detect-zeroes=unmap']
    line += ['--allocation-depth'] if options['driver'] != 'raw' else []
    line.append('json:' + json.dumps({**options, 'file': {'driver': 'file', 'filename': image}}))
    server = subprocess.Popen(line, env=client.env, cwd=client.path('work'), stderr=subprocess.PIPE)
    try:
        # It, too, tries to connect until it can.
        while not os.path.exists(socket) and server.poll() is None:
            time.sleep(0.01)
        play(client, 'nbdcopy', f'nbd+unix:///?socket={socket}', 'shown.raw')
    finally:
        server.send_signal(signal.SIGTERM)
        err = server.communicate(timeout=30)[1]
    assert server.returncode == 0, err
    same(client, 'shown.raw', 'expected.raw')
    os.unlink(client.work('shown.raw'))


def test_a_socket_that_is_given_must_be_one_and_be_the_only_place(client, disks):
    for more, said in (('-k /nowhere', "Unix socket can't be set when using socket activation"),
                       ('3<disk.raw', 'LISTEN_FDS: descriptor 3 is no socket to listen at')):
        line = f'LISTEN_PID=$$ LISTEN_FDS=1 exec {client.path("links", "qemu-nbd")} -f raw disk.raw {more}'
        done = run('sh', '-c', line, ok=False, env=client.env, cwd=client.path('work'), timeout=60)
        assert (done.returncode, done.stderr) == (1, f'qemu-nbd: {said}\n')


def test_virt_v2v_reads_a_disk_where_it_stands_in_an_ova(client, disks):
    """The lines of -i ova, which the test with the real one runs too; that takes minutes."""
    work = client.path('work')
    run('qemu-img', 'convert', '-f', 'raw', '-O', 'vmdk', '-o', 'subformat=streamOptimized', 'disk.raw', 'disk1.vmdk', cwd=work)
    with tarfile.open(client.work('machine.ova'), 'w', format=tarfile.USTAR_FORMAT) as tar:
        tar.add(client.work('disk.qcow2'), 'other')
        tar.add(client.work('disk1.vmdk'), 'disk1.vmdk')
    with tarfile.open(client.work('machine.ova')) as tar:
        offset, size = tar.getmember('disk1.vmdk').offset_data, (os.path.getsize(client.work('disk1.vmdk')) + 511) // 512 * 512
    part = {'driver': 'raw', 'offset': offset, 'size': size, 'file': {'driver': 'file', 'filename': client.work('machine.ova')}}
    name = 'json:' + json.dumps({'file': part})
    assert 'file format: vmdk' in play(client, 'qemu-img', 'info', name)
    play(client, 'qemu-nbd', '--fork', '-t', '--shared=0', '--discard=unmap', '--pid-file', 'v2v.pid',
         '--socket', client.work('v2v'), '-s', name)
    with open(client.work('v2v.pid'), encoding='utf-8') as f:
        pid = int(f.read())
    play(client, 'nbdcopy', f'nbd+unix:///?socket={client.work("v2v")}', 'v2v.raw')
    os.kill(pid, signal.SIGTERM)
    same(client, 'v2v.raw', 'disk.raw')


# Refused before anybody is served, with the words and the exit code of QEMU's.
REFUSED = ['-o 9437184 -f qcow2 disk.qcow2', '--detect-zeroes=unmap -f qcow2 disk.qcow2', '-L -x name', '-L -o 1', '-f bad disk.qcow2',
           'absent', '--aio=bad disk.qcow2', '--cache=bad disk.qcow2', '-e x disk.qcow2', '--tls-creds=x disk.qcow2', '-B no -f qcow2 disk.qcow2']


@pytest.mark.parametrize('line', REFUSED)
def test_what_cannot_be_served_is_refused_as_by_qemu(client, disks, line):
    told = []
    for program in (client.path('links', 'qemu-nbd'), shutil.which('qemu-nbd')):
        done = run(program, '-k', client.work('refused'), *line.split(), ok=False, cwd=client.path('work'), timeout=30)
        told.append((done.returncode, done.stdout, done.stderr))
    assert told[0] == told[1] and told[0][0] == 1


@pytest.mark.parametrize('words', [('-r', '-s'), ('-p', '1')], ids=('reading wins over a snapshot', 'a socket wins over a port'))
def test_some_options_win_over_others(client, disks, words):
    socket = client.work('won' + words[0])  # the server of the last case may still be ending
    run(client.path('links', 'qemu-nbd'), '--fork', '--pid-file', f'{socket}.pid', '-k', socket, *words, '-f', 'qcow2', 'disk.qcow2',
        cwd=client.path('work'), timeout=30)
    info = json.loads(play(client, 'nbdinfo', '--json', f'nbd+unix:///?socket={socket}'))
    assert info['exports'][0]['is_read_only'] == ('-r' in words)


def test_a_disk_goes_to_the_kernel_by_another_program(client, disks):
    for words, said in ((('-d', '/dev/nbd9'), 'nbd-client -d /dev/nbd9'), (('-c', '/dev/nbd9', 'disk.raw'), 'nbd-client -unix'),
                        (('-D', 'a' * 4097, 'disk.raw'), 'export description too long')):
        done = run(client.path('links', 'qemu-nbd'), *words, ok=False, cwd=client.path('work'), timeout=30)
        assert done.returncode == 1 and said in done.stderr, done
