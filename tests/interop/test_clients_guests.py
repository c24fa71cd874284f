# SPDX-License-Identifier: LGPL-2.1-or-later
"""libguestfs and virt-v2v, with Drover as their qemu-img and qemu-nbd. Their appliance is a guest under TCG, which takes
minutes to do all this: only `./dev soak` runs these tests."""
import glob
import os
import struct
import tarfile

import pytest

from clients import fixture_client, skip_without  # noqa: F401: pytest finds the fixture by its name
from hive import Hive
from tools import MIB, run

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KERNEL = os.path.join(TOP, 'build-guest')


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


# What virt-v2v wants to find of a Windows: no program of it ever runs.
SOFTWARE = {'Microsoft': {'Windows': {'CurrentVersion': {}}, 'Windows NT': {'CurrentVersion': {
    'ProductName': 'Windows Server 2022 Test', 'CurrentVersion': '6.3', 'CurrentBuild': '20348', 'CurrentBuildNumber': '20348',
    'CurrentMajorVersionNumber': 10, 'CurrentMinorVersionNumber': 0, 'EditionID': 'ServerStandard', 'InstallationType': 'Server',
    'PathName': 'C:\\Windows', 'SystemRoot': 'C:\\Windows'}}}}
SYSTEM = {'Select': {'Current': 1, 'Default': 1, 'LastKnownGood': 1}, 'ControlSet001': {
    'Control': {'ComputerName': {'ComputerName': {'ComputerName': 'TEST'}}, 'CriticalDeviceDatabase': {}, 'Class': {},
                'GroupOrderList': {}, 'CrashControl': {}},
    'Enum': {}, 'Services': {'Tcpip': {'Parameters': {'Hostname': 'TEST'}}}}, 'MountedDevices': {}}


def program_of_windows():
    """The headers of an empty program for x86-64, which tell the architecture."""
    head = bytearray(64)
    head[:2], head[0x18], head[0x3c] = b'MZ', 64, 64
    optional = struct.pack('<H66xH', 0x20b, 3).ljust(240, b'\0')
    return bytes(head) + struct.pack('<4sHHIIIHH', b'PE\0\0', 0x8664, 0, 0, 0, 0, len(optional), 0x22) + optional


OVF = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
<References><File ovf:href="disk1.vmdk" ovf:id="file1" ovf:size="{size}"/></References>
<DiskSection><Info>disks</Info><Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1"
 ovf:fileRef="file1"/></DiskSection>
<VirtualSystem ovf:id="machine"><Info>a machine</Info><Name>fromova</Name><VirtualHardwareSection><Info>hardware</Info>
<Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID>
<rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
<Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>6</rasd:ResourceType></Item>
<Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
<rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
</VirtualHardwareSection></VirtualSystem></Envelope>
"""


def make_machine(client, tool):
    """windows.qcow2, and the same disk in machine.ova. It holds a megabyte of the letter a."""
    for name, content in (('SOFTWARE', Hive(SOFTWARE).bytes()), ('SYSTEM', Hive(SYSTEM).bytes()), ('cmd.exe', program_of_windows())):
        with open(client.work(name), 'wb') as f:
            f.write(content)
    script = '''
    disk-create windows.qcow2 qcow2 192M
    add-drive windows.qcow2 format:qcow2
    run
    part-disk /dev/sda mbr
    mkfs ntfs /dev/sda1
    mount /dev/sda1 /
    mkdir-p /Windows/System32/Config
    mkdir-p /Windows/System32/Drivers
    mkdir "/Program Files"
    touch /autoexec.bat
    upload SOFTWARE /Windows/System32/Config/SOFTWARE
    upload SYSTEM /Windows/System32/Config/SYSTEM
    upload cmd.exe /Windows/System32/cmd.exe
    fill 97 1048576 /data
    '''
    tool('guestfish', input=script)
    disk = client.work('disk1.vmdk')
    run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'vmdk', '-o', 'subformat=streamOptimized', client.work('windows.qcow2'), disk)
    with open(client.work('machine.ovf'), 'w', encoding='utf-8') as f:
        f.write(OVF.format(size=os.path.getsize(disk), capacity=192 * MIB))
    with tarfile.open(client.work('machine.ova'), 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name in ('machine.ovf', 'disk1.vmdk'):
            tar.add(client.work(name), name)


@pytest.fixture(name='v2v')
def fixture_v2v(client, tool):
    """Run virt-v2v with local output. It puts programs into a Windows that it only looks for."""
    skip_without('virt-v2v')
    if not os.path.exists(client.work('windows.qcow2')):
        make_machine(client, tool)
        os.mkdir(client.work('tools'))
        os.mkdir(client.work('out'))
    for name in ('rhsrvany.exe', 'pnp_wait.exe'):
        with open(client.work('tools/' + name), 'wb') as f:
            f.write(program_of_windows())
    env = {'VIRT_TOOLS_DATA_DIR': client.work('tools')}
    return lambda *words: tool('virt-v2v', *words, '-o', 'local', '-os', client.work('out'), more=env)


def test_virt_v2v_converts_a_disk(client, v2v):
    v2v('-i', 'disk', '-if', 'qcow2', 'windows.qcow2', '-of', 'qcow2', '-on', 'fromdisk')
    run('qemu-img', 'check', '-q', client.work('out/fromdisk-sda'))
    assert holds_the_data(client, 'qcow2', 'out/fromdisk-sda')
    called(client, 'qemu-nbd -t --shared=0', 'qemu-img create -f qcow2')


def test_virt_v2v_converts_an_ova(client, v2v):
    v2v('-i', 'ova', 'machine.ova', '-of', 'raw')
    assert holds_the_data(client, 'raw', 'out/fromova-sda')
    called(client, 'qemu-nbd -t --shared=0', 'qemu-img info json:')
