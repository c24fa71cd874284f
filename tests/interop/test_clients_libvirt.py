# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's storage pools and the snapshots of its domains, with Drover as its qemu-img."""
import os
import select
import shutil
import signal
import xml.etree.ElementTree as ElementTree

import pytest

from clients import fixture_client, skip_without  # noqa: F401: pytest finds the fixture by its name
from tools import MIB, run

DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><disk type='file' device='disk'>
<driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"""


class Libvirt:
    """A daemon of its own for one user's session: it uses no file outside of the client's directory."""

    def __init__(self, client):
        self.client = client
        run_, home, pool = (client.path(name) for name in ('run', 'home', 'work/pool'))
        for name in (run_, home, pool):
            os.mkdir(name)
        self.env = {**client.env, 'HOME': home, 'XDG_RUNTIME_DIR': run_, 'XDG_CONFIG_HOME': home,
                    'XDG_CACHE_HOME': home, 'XDG_DATA_HOME': home}
        # As root libvirt would use the system's directories.
        self.prefix = ['setpriv', '--reuid=nobody', '--regid=nogroup', '--clear-groups'] if os.getuid() == 0 else []
        if self.prefix:
            for name in (run_, home, pool):
                shutil.chown(name, 'nobody', 'nogroup')
        self.pid_file = os.path.join(run_, 'libvirt', 'libvirtd.pid')

    def virsh(self, *words):
        """The first one starts the daemon."""
        return self.run('virsh', '-q', '-c', 'qemu:///session', *words)

    def run(self, *argv):
        return run(*self.prefix, *argv, env=self.env, cwd=self.client.path('work'), timeout=60).stdout

    def stop(self):
        if not os.path.exists(self.pid_file):
            return
        with open(self.pid_file, encoding='utf-8') as f:
            daemon = os.pidfd_open(int(f.read()))
        with os.fdopen(daemon) as f:
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
            assert select.select([f], [], [], 30)[0], 'libvirtd does not end'


@pytest.fixture(name='libvirt', scope='module')
def fixture_libvirt(client):
    skip_without('libvirtd', 'virsh', 'setpriv', 'qemu-system-x86_64')
    server = Libvirt(client)
    yield server
    server.stop()


def sector(pool, name, fmt, command):
    run('qemu-io', '-f', fmt, '-c', command, os.path.join(pool, name))


def define(client, libvirt, name, disk):
    with open(client.work(name), 'w', encoding='utf-8') as f:
        f.write(DOMAIN.format(name=name, disk=disk))
    libvirt.virsh('define', name)


def test_libvirt_pools_volumes_and_snapshots(client, libvirt):
    virsh, pool = libvirt.virsh, client.work('pool')
    virsh('pool-create-as', 'pool', 'dir', '--target', pool)
    for fmt in ('qcow2', 'raw', 'vmdk'):
        virsh('vol-create-as', 'pool', f'base.{fmt}', '8M', '--format', fmt)
    sector(pool, 'base.qcow2', 'qcow2', 'write -P 1 0 1M')
    virsh('vol-create-as', 'pool', 'top.qcow2', '8M', '--format', 'qcow2', '--backing-vol', 'base.qcow2',
          '--backing-vol-format', 'qcow2')
    sector(pool, 'top.qcow2', 'qcow2', 'write -P 2 1M 64k')
    virsh('vol-create-as', 'pool', 'full.qcow2', '8M', '--format', 'qcow2', '--prealloc-metadata')
    volume = ElementTree.fromstring(virsh('vol-dumpxml', '--pool', 'pool', 'top.qcow2'))
    assert volume.find('backingStore/path').text == pool + '/base.qcow2'
    assert volume.find('backingStore/format').get('type') == 'qcow2'

    virsh('vol-clone', '--pool', 'pool', 'top.qcow2', 'clone.qcow2')
    run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'qcow2', pool + '/top.qcow2', pool + '/clone.qcow2')
    virsh('vol-clone', '--pool', 'pool', 'base.vmdk', 'clone.vmdk')
    for name, size in (('clone.qcow2', 16), ('base.raw', 16)):
        virsh('vol-resize', '--pool', 'pool', name, f'{size}M')
        assert f'<capacity unit=\'bytes\'>{size * MIB}<' in virsh('vol-dumpxml', '--pool', 'pool', name)
    virsh('vol-resize', '--pool', 'pool', 'clone.qcow2', '12M', '--shrink')
    virsh('vol-delete', '--pool', 'pool', 'clone.vmdk')
    assert not os.path.exists(pool + '/clone.vmdk')

    define(client, libvirt, 'machine', pool + '/clone.qcow2')
    virsh('snapshot-create-as', 'machine', 'inside')
    sector(pool, 'clone.qcow2', 'qcow2', 'write -P 9 0 1M')
    virsh('snapshot-revert', 'machine', 'inside')
    sector(pool, 'clone.qcow2', 'qcow2', 'read -P 1 0 1M')
    virsh('snapshot-delete', 'machine', 'inside')
    virsh('snapshot-create-as', 'machine', 'outside', '--disk-only')
    assert 'clone.outside' in virsh('domblklist', 'machine')

    for name in ('base.qcow2', 'top.qcow2', 'full.qcow2', 'clone.qcow2', 'clone.outside'):
        run('qemu-img', 'check', '-q', '-f', 'qcow2', os.path.join(pool, name))
    run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'qcow2', pool + '/clone.outside', pool + '/clone.qcow2')
    called = client.calls()
    for what in ('create -f qcow2', 'create -f vmdk', 'create -f qcow2 -b', 'convert -f qcow2 -O qcow2', 'convert -f vmdk',
                 'resize pool/', 'resize --shrink', 'snapshot -c inside', 'snapshot -a inside', 'snapshot -d inside'):
        assert any(call.startswith('qemu-img ' + what) for call in called), (what, called)


def test_virtnbdbackup_copies_a_machine_that_is_off_and_restores_it(client, libvirt):
    skip_without('virtnbdbackup', 'virtnbdrestore', 'nbdkit', 'nbdinfo')
    disk = client.work('pool') + '/disk.qcow2'
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on,cluster_size=128k', disk, '8M')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 1M', '-c', 'write -P 2 5M 64k', disk)
    os.chmod(disk, 0o666)
    define(client, libvirt, 'other', disk)
    shared = ('-U', 'qemu:///session', '-f', client.work('pool/socket'), '-n')
    libvirt.run('virtnbdbackup', *shared, '-d', 'other', '-l', 'copy', '-o', client.work('pool/backup'))
    libvirt.run('virtnbdrestore', *shared, '-i', client.work('pool/backup'), '-o', client.work('pool/restored'),
                '-L', client.work('pool/log'))
    restored = client.work('pool/restored/disk.qcow2')
    run('qemu-img', 'check', '-q', '-f', 'qcow2', restored)
    run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'qcow2', disk, restored)
    called = client.calls()
    assert any(call.startswith('qemu-nbd -r') and '-e 2' in call for call in called), called
    assert any(call.startswith('qemu-nbd --discard=unmap') for call in called), called
    assert any(call.startswith('qemu-img create -f qcow2') for call in called), called
