# SPDX-License-Identifier: LGPL-2.1-or-later
"""libguestfs, with Drover as its qemu-img. Its appliance is a guest under TCG, which takes
minutes to do all this: `./dev soak` runs these tests, `./dev test` skips them."""
import glob
import os
import struct

import pytest

from clients import fixture_client, skip_without  # noqa: F401: pytest finds the fixture by its name
from tools import MIB, run

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KERNEL = os.path.join(TOP, 'build-guest')
pytestmark = pytest.mark.skipif(not os.environ.get('DROVER_TEST_LONG'), reason='takes minutes: ./dev soak runs it')


@pytest.fixture(name='guests', scope='module')
def fixture_guests(tmp_path_factory):
    """The environment in which libguestfs builds its appliance from the kernel that ./dev unpacks, and boots it."""
    skip_without('guestfish', 'supermin', 'depmod', 'qemu-system-x86_64')
    modules = glob.glob(KERNEL + '/lib/modules/*')
    if not modules:
        pytest.skip('no kernel for a guest: ./dev deps unpacks one')
    if not os.path.isdir('/lib/modules'):
        pytest.skip('supermin wants a directory /lib/modules, even an empty one')
    version = os.path.basename(modules[0])
    run('depmod', '-b', KERNEL, version)
    return {'SUPERMIN_KERNEL': glob.glob(KERNEL + '/boot/vmlinuz-*')[0], 'SUPERMIN_MODULES': modules[0],
            'SUPERMIN_KERNEL_VERSION': version, 'LIBGUESTFS_BACKEND': 'direct',
            'LIBGUESTFS_BACKEND_SETTINGS': 'force_tcg', 'LIBGUESTFS_CACHEDIR': str(tmp_path_factory.mktemp('appliance'))}


@pytest.fixture(name='tool')
def fixture_tool(client, guests):
    os.makedirs(client.path('tmp'), exist_ok=True)

    def tool(*argv, more=(), **kw):
        env = {**client.env, **guests, **dict(more), 'TMPDIR': client.path('tmp')}
        return run(*argv, env=env, cwd=client.path('work'), timeout=1800, **kw).stdout

    return tool


def called(client, *starts):
    calls = client.calls()
    for start in starts:
        assert any(call.startswith(start) for call in calls), (start, calls)


def test_guestfish_makes_disks_and_files_on_them(client, tool):
    script = '''
    disk-create base.qcow2 qcow2 96M preallocation:metadata
    disk-create plain.raw raw 16M
    add-drive base.qcow2 format:qcow2 discard:enable
    add-drive plain.raw format:raw
    run
    part-disk /dev/sda mbr
    mkfs ext4 /dev/sda1
    mount /dev/sda1 /
    fill 97 1048576 /data
    write-append /note hello
    '''
    tool('guestfish', input=script)
    run('qemu-img', 'check', '-q', client.work('base.qcow2'))
    script = '''
    disk-create top.qcow2 qcow2 -1 backingfile:base.qcow2 backingformat:qcow2
    disk-format top.qcow2
    disk-virtual-size top.qcow2
    disk-has-backing-file top.qcow2
    disk-has-backing-file base.qcow2
    add-drive-ro top.qcow2
    run
    mount-ro /dev/sda1 /
    checksum md5 /data
    cat /note
    '''
    said = tool('guestfish', input=script).split()
    assert said == ['qcow2', str(96 * MIB), 'true', 'false', '7202826a7791073fe2787f0c94603278', 'hello']
    called(client, 'qemu-img create -f qcow2 -o preallocation=metadata', 'qemu-img info -U --output json',
           'qemu-img create -f qcow2 -o backing_file=')


def holds_the_data(client, fmt, name):
    run('qemu-img', 'convert', '-f', fmt, '-O', 'raw', client.work(name), client.work('look.raw'))
    with open(client.work('look.raw'), 'rb') as f:
        return b'a' * MIB in f.read()


def make_full_disk(client, name, size=64):
    """A disk of so many MiB with ext4 in a partition: a file of a megabyte of the letter a, and free space that is full of b."""
    os.makedirs(client.work('files'), exist_ok=True)
    with open(client.work('files/data'), 'wb') as f:
        f.write(b'a' * MIB)
    raw = client.work('full.raw')
    with open(raw, 'wb') as f:
        f.write(bytes(446) + struct.pack('<4xB3xII', 0x83, 2048, (size - 1) * 2048) + bytes(48) + b'\x55\xaa')
        f.write(bytes(MIB - 512) + b'b' * MIB * (size - 1))
    run('mke2fs', '-q', '-t', 'ext4', '-E', f'nodiscard,offset={MIB}', '-d', client.work('files'), raw, f'{(size - 1) << 10}k')
    run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, client.work(name))
    assert os.stat(client.work(name)).st_blocks * 512 > size * MIB * 3 // 4


def test_virt_df_and_virt_sparsify(client, tool):
    skip_without('virt-df', 'virt-sparsify', 'mke2fs')
    make_full_disk(client, 'full.qcow2')
    assert '/dev/sda1' in tool('virt-df', '--format=qcow2', '-a', 'full.qcow2')
    tool('virt-sparsify', '--format', 'qcow2', '--convert', 'qcow2', '--compress', 'full.qcow2', 'sparse.qcow2')
    tool('virt-sparsify', '--in-place', '--format', 'qcow2', 'full.qcow2')
    for name in ('full.qcow2', 'sparse.qcow2'):
        run('qemu-img', 'check', '-q', client.work(name))
        assert os.stat(client.work(name)).st_blocks * 512 < 16 * MIB, name
        assert holds_the_data(client, 'qcow2', name)
    called(client, 'qemu-img convert')


def test_virt_resize(client, tool):
    skip_without('virt-resize', 'mke2fs')
    make_full_disk(client, 'small.qcow2')
    run('qemu-img', 'create', '-q', '-f', 'qcow2', client.work('bigger.qcow2'), '96M')
    tool('virt-resize', '--format', 'qcow2', '--output-format', 'qcow2', '--expand', '/dev/sda1', 'small.qcow2', 'bigger.qcow2')
    run('qemu-img', 'check', '-q', client.work('bigger.qcow2'))
    assert holds_the_data(client, 'qcow2', 'bigger.qcow2')
    with open(client.work('look.raw'), 'rb') as f:
        assert struct.unpack('<I', f.read(462)[458:])[0] > 90 * 2048  # sectors of the first partition
