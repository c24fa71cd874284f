# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMDK images go to and fro between Drover and QEMU's tools."""
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess

import pytest
from tools import DROVER, MIB, TOOLS, Disk, Drover, Qemu, create, rng, run

pytestmark = pytest.mark.usefixtures('qemu')

SUBFORMATS = ['monolithicSparse', 'twoGbMaxExtentSparse', 'monolithicFlat', 'twoGbMaxExtentFlat']
SPARSE = SUBFORMATS[:2]
ESX = 'vmfsSparse'
KINDS = SUBFORMATS + ['vmfs', 'streamOptimized']
needs_7z = pytest.mark.skipif(not shutil.which('7z'), reason='7z is not installed')
needs_libvmdk = pytest.mark.skipif(not shutil.which('vmdkinfo') or not shutil.which('vmdkmount'),
                                   reason="libvmdk's tools are not installed")
SIZES = [MIB, 33 * MIB + 7 * 512, 65536 - 512]


def other(tool):
    return Qemu if tool is Drover else Drover


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('subformat', SUBFORMATS)
@pytest.mark.parametrize('maker', TOOLS, ids=lambda t: t.name)
def test_made_by_one_written_by_both(maker, subformat, size, tmp_path):
    rnd = rng(maker.name, subformat, size)
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', size)
    create(maker, disk.path, 'vmdk', size, f'subformat={subformat}')
    disk.verify(tmp_path)
    for writer in (other(maker), maker, other(maker)):
        disk.write(writer, rnd)
        disk.verify(tmp_path)
    run('qemu-img', 'check', '-q', disk.path)
    run(DROVER, 'check', '-q', disk.path)


@pytest.mark.parametrize('subformat', SPARSE)
@pytest.mark.parametrize('maker', TOOLS, ids=lambda t: t.name)
def test_zeroed_grains(maker, subformat, tmp_path):
    rnd = rng('zeroed', maker.name, subformat)
    base = Disk(tmp_path / 'base.vmdk', 'vmdk', 4 * MIB)
    create(maker, base.path, 'vmdk', base.size, f'subformat={subformat}')
    base.write(other(maker), rnd, 10)
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', 4 * MIB, base.content)
    create(maker, disk.path, 'vmdk', disk.size, f'subformat={subformat},zeroed_grain=on',
           'base.vmdk')
    for writer in (other(maker), maker):
        run(*writer.io, '-f', 'vmdk', '-c', 'write -z 0 1M', '-c', 'write -z 3M 64k', disk.path)
        disk.content[:MIB] = bytes(MIB)
        disk.content[3 * MIB:3 * MIB + 65536] = bytes(65536)
        disk.verify(tmp_path)
        disk.write(writer, rnd)
        disk.verify(tmp_path)
    base.verify(tmp_path)


@pytest.mark.parametrize('sizes', [(4, 4, 4), (3, 4, 5), (5, 2, 4)], ids=str)
@pytest.mark.parametrize('subformat', SPARSE)
@pytest.mark.parametrize('makers', [(Drover, Qemu, Drover), (Qemu, Drover, Qemu)],
                         ids=lambda m: '-'.join(t.name for t in m))
def test_chains(makers, subformat, sizes, tmp_path):
    rnd = rng('chain', subformat, sizes, makers[0].name)
    below, disks = None, []
    for i, maker in enumerate(makers):
        disk = Disk(tmp_path / f'l{i}.vmdk', 'vmdk', sizes[i] * MIB + i * 512,
                    below and below.content)
        create(maker, disk.path, 'vmdk', disk.size, f'subformat={subformat}',
               below and f'l{i - 1}.vmdk')
        disk.write(other(maker), rnd)
        disk.verify(tmp_path)
        disks.append(disk)
        below = disk
    for disk in disks:
        disk.verify(tmp_path)
    disks[-1].write(makers[0], rnd)
    for disk in disks:
        disk.verify(tmp_path)


@pytest.mark.parametrize('subformat', SPARSE)
def test_qemu_goes_on_after_each_chain_operation(subformat, tmp_path):
    rnd = rng('operations', subformat)

    def child(name, parent, tool):
        disk = Disk(tmp_path / name, 'vmdk', 3 * MIB, parent and parent.content)
        create(tool, disk.path, 'vmdk', disk.size, f'subformat={subformat}',
               parent and parent.path.rsplit('/', 1)[1])
        disk.write(tool, rnd)
        return disk

    base = child('base.vmdk', None, Qemu)
    mid = child('mid.vmdk', base, Drover)
    top = child('top.vmdk', mid, Qemu)
    away = child('away.vmdk', None, Qemu)
    run(DROVER, 'rebase', '-b', 'away.vmdk', '-F', 'vmdk', top.path)
    top.verify(tmp_path)
    top.write(Qemu, rnd)
    run(DROVER, 'rebase', '-b', 'mid.vmdk', '-F', 'vmdk', top.path)
    top.verify(tmp_path)
    done = run(DROVER, 'snapshot', '-c', top.path)
    new = Disk(done.stdout.strip().splitlines()[-1].split()[-1].strip("'\""), 'vmdk', top.size,
               top.content)
    new.write(Qemu, rnd)
    new.verify(tmp_path)
    run(DROVER, 'commit', new.path)
    top.content = new.content
    top.verify(tmp_path)
    new.verify(tmp_path)
    new.write(Qemu, rnd)
    run(DROVER, 'stream', '--base', 'base.vmdk', new.path)
    new.verify(tmp_path)
    run(DROVER, 'stream', new.path)
    for disk in (base, mid, top, away):
        shutil.move(disk.path, str(tmp_path / 'gone'))
    new.verify(tmp_path)


@pytest.mark.parametrize('subformat', SUBFORMATS)
@pytest.mark.parametrize('maker', TOOLS, ids=lambda t: t.name)
def test_both_describe_an_image_alike(maker, subformat, tmp_path):
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', 3 * MIB)
    create(maker, disk.path, 'vmdk', disk.size, f'subformat={subformat}')
    disk.write(maker, rng('info', maker.name, subformat))
    ours, theirs = (json.loads(run(*t.img, 'info', '--output=json', disk.path).stdout)
                    for t in TOOLS)
    for key in ('filename', 'format', 'virtual-size', 'dirty-flag'):
        assert ours.get(key) == theirs.get(key), key
    ours, theirs = ours['format-specific']['data'], theirs['format-specific']['data']
    for key in ('cid', 'parent-cid', 'create-type'):
        assert ours[key] == theirs[key], key
    assert len(ours['extents']) == len(theirs['extents'])
    for a, b in zip(ours['extents'], theirs['extents']):
        for key in b:
            assert a[key] == b[key], key


def runs(tool, path):
    """Whether each range reads as zeros / is data, neighbours joined."""
    out = []
    for e in json.loads(run(*tool.img, 'map', '--output=json', path).stdout):
        kind = (e['zero'], e['data'], e.get('depth'))
        if out and out[-1][2] == kind and out[-1][1] == e['start']:
            out[-1] = (out[-1][0], e['start'] + e['length'], kind)
        else:
            out.append((e['start'], e['start'] + e['length'], kind))
    return out


@pytest.mark.parametrize('subformat', SPARSE)
def test_both_map_a_chain_alike(subformat, tmp_path):
    rnd = rng('map', subformat)
    base = Disk(tmp_path / 'base.vmdk', 'vmdk', 4 * MIB)
    create(Drover, base.path, 'vmdk', base.size, f'subformat={subformat}')
    base.write(Drover, rnd)
    top = Disk(tmp_path / 'top.vmdk', 'vmdk', 4 * MIB, base.content)
    create(Drover, top.path, 'vmdk', top.size, f'subformat={subformat}', 'base.vmdk')
    top.write(Drover, rnd)
    assert runs(Drover, top.path) == runs(Qemu, top.path)


@pytest.mark.parametrize('parent', ['vmfs', 'vmfsSparse', 'monolithicSparse'])
def test_qemu_reads_esx_children(parent, tmp_path):
    rnd = rng('esx', parent)
    base = Disk(tmp_path / 'base.vmdk', 'vmdk', 5 * MIB + 3 * 512)
    create(Drover, base.path, 'vmdk', base.size, f'subformat={parent}')
    base.write(Drover, rnd)
    top = Disk(tmp_path / 'top.vmdk', 'vmdk', base.size, base.content)
    create(Drover, top.path, 'vmdk', top.size, f'subformat={ESX}', 'base.vmdk')
    for _ in range(3):
        top.write(Drover, rnd)
        top.verify(tmp_path)
        base.verify(tmp_path)
    run(DROVER, 'check', '-q', top.path)


def test_qemu_reads_esx_disks_of_another_size(tmp_path):
    rnd = rng('esx', 'resize')
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', 5 * MIB + 3 * 512)
    create(Drover, disk.path, 'vmdk', disk.size, f'subformat={ESX}')
    disk.write(Drover, rnd)
    run(DROVER, 'resize', '-q', disk.path, '300M')  # another sector of entries
    head = str(tmp_path / 'head')
    run('qemu-img', 'dd', '-f', 'vmdk', '-O', 'raw', 'bs=1M', 'count=6', f'if={disk.path}', f'of={head}')
    with open(head, 'rb') as f:
        assert f.read() == bytes(disk.content).ljust(6 * MIB, b'\0')
    run(DROVER, 'resize', '-q', '--shrink', disk.path, str(3 * MIB))
    disk.size = 3 * MIB
    del disk.content[disk.size:]
    disk.verify(tmp_path)
    disk.write(Drover, rnd)
    disk.verify(tmp_path)
    run(DROVER, 'check', '-q', disk.path)


def sesparse(size, grains):
    """The bytes of a seSparse extent. grains: {number: bytes, or 1 (unmapped) or 2 (zero)}"""
    n = -(-size // (4096 * 4096))
    tables, data = [0] * (n * 4096), b''
    for number, what in grains.items():
        place = len(data) // 4096
        rotated = (place & 0xfff) << 48 | place >> 12
        tables[number] = what << 60 if isinstance(what, int) else 3 << 60 | rotated
        data += b'' if isinstance(what, int) else what
    head = struct.pack('<26Q', 0xcafebabe, 0x200000001, size // 512, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1,
                       4, 4, 8, n * 64, 0, 0, 0, 0, 8 + n * 64, 1 << 20)
    head = head.ljust(512, b'\0') + struct.pack('<4Q', 0xcafecafe, 0, 0, 0).ljust(1536, b'\0')
    head += struct.pack(f'<{n}Q', *[(1 << 60) + i for i in range(n)]).ljust(2048, b'\0')
    return head + struct.pack(f'<{len(tables)}Q', *tables) + data


def test_both_read_sesparse(tmp_path):
    rnd = rng('sesparse')
    base = Disk(tmp_path / 'base.vmdk', 'vmdk', 40 * MIB)
    create(Drover, base.path, 'vmdk', base.size, 'subformat=vmfs')
    base.write(Drover, rnd, 30)
    grains = {n: rnd.choice([1, 2, rnd.randbytes(4096), rnd.randbytes(4096)]) for n in rnd.sample(range(10240), 5000)}
    (tmp_path / 'top-sesparse.vmdk').write_bytes(sesparse(base.size, grains))
    cid = json.loads(run(DROVER, 'info', '--output=json', base.path).stdout)['format-specific']['data']['cid']
    (tmp_path / 'top.vmdk').write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={cid:08x}\ncreateType="seSparse"\n'
        f'parentFileNameHint="base.vmdk"\nRW {base.size // 512} SESPARSE "top-sesparse.vmdk"\n')
    top = Disk(tmp_path / 'top.vmdk', 'vmdk', base.size, base.content)
    for n, what in grains.items():
        top.content[n * 4096:n * 4096 + 4096] = bytes(4096) if isinstance(what, int) else what
    top.verify(tmp_path)
    run(DROVER, 'check', '-q', top.path)
    assert 'can only be read' in run(DROVER, 'io', '-c', 'write 0 512', top.path, ok=False).stderr


def test_what_qemu_appends_to_an_esx_disk_is_kept(tmp_path):
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', 2 * MIB)  # one table, which is there: QEMU makes none
    create(Drover, disk.path, 'vmdk', disk.size, f'subformat={ESX}')
    rnd = rng('appended')
    disk.write(Drover, rnd)
    disk.write(Qemu, rnd)
    disk.verify(tmp_path)
    disk.write(Drover, rnd)
    disk.verify(tmp_path)
    run(DROVER, 'check', '-q', disk.path)


@pytest.mark.skipif(not shutil.which('vmdkinfo'), reason='vmdkinfo is not installed')
@pytest.mark.parametrize('subformat', [*SUBFORMATS, ESX])
def test_vmdkinfo_reads_ours(subformat, tmp_path):
    size = 4 * MIB
    create(Drover, tmp_path / 'base.vmdk', 'vmdk', size, f'subformat={subformat}')
    text = run('vmdkinfo', tmp_path / 'base.vmdk').stdout
    assert re.search(rf'Media size:.*\({size} bytes\)', text), text
    if subformat in SPARSE:
        create(Drover, tmp_path / 'top.vmdk', 'vmdk', size, f'subformat={subformat}', 'base.vmdk')
        child = run('vmdkinfo', tmp_path / 'top.vmdk').stdout
        assert 'base.vmdk' in child, child
        ids = [re.search(r'Content identifier:\s*(\S+)', text).group(1),
               re.search(r'Parent content identifier:\s*(\S+)', child).group(1)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize('fmt', ['vmdk', 'raw'])
def test_convert_to_and_fro(fmt, tmp_path):
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', 9 * MIB + 512)
    create(Qemu, disk.path, 'vmdk', disk.size)
    disk.write(Qemu, rng('convert', fmt), 20)
    for maker in TOOLS:
        copy = Disk(tmp_path / f'{maker.name}.{fmt}', fmt, disk.size, disk.content)
        run(*maker.img, 'convert', '-f', 'vmdk', '-O', fmt, disk.path, copy.path)
        copy.verify(tmp_path)


def disk_with_data(tmp_path, size, seed):
    """A raw disk with data, zeros, and data at its very end."""
    disk = Disk(tmp_path / 'disk.raw', 'raw', size)
    with open(disk.path, 'wb') as f:
        f.truncate(size)
    disk.write(Drover, rng('kinds', seed), 12)
    run(*Drover.io, '-f', 'raw', '-c', f'write -P 77 {size - 1024} 1024', disk.path)
    disk.content[size - 1024:] = bytes([77]) * 1024
    return disk


# A grain cut short, and more than one table.
@pytest.mark.parametrize('size', [MIB + 3 * 512, 34 * MIB], ids=str)
# qemu-img reads ESX's flat disks and makes none.
@pytest.mark.parametrize('maker, kind', [pytest.param(tool, kind, id=f'{tool.name}-{kind}') for tool in TOOLS
                                         for kind in KINDS if tool is Drover or kind != 'vmfs'])
def test_every_kind_goes_both_ways(maker, kind, size, tmp_path):
    disk = disk_with_data(tmp_path, size, kind)
    made = tmp_path / 'made.vmdk'
    run(*maker.img, 'convert', '-f', 'raw', '-O', 'vmdk', '-o', f'subformat={kind}', disk.path, made)
    for reader in TOOLS:
        compare_raw(reader, disk.path, made, tmp_path)
    assert 'No errors' in run(DROVER, 'check', made).stdout
    if maker is Drover:
        run('qemu-img', 'check', '-q', made)


def compare_raw(reader, raw, image, tmp_path):
    run(*reader.img, 'compare', '-f', 'raw', '-F', 'vmdk', raw, image)
    run(*reader.img, 'convert', '-f', 'vmdk', '-O', 'raw', image, tmp_path / 'out.raw')
    run('cmp', raw, tmp_path / 'out.raw')
    os.unlink(tmp_path / 'out.raw')


@pytest.mark.parametrize('kind', ['twoGbMaxExtentSparse', 'twoGbMaxExtentFlat'])
def test_two_pieces_are_one_disk(kind, tmp_path):
    create(Drover, tmp_path / 'a.vmdk', 'vmdk', 2047 * MIB + 512, f'subformat={kind}')
    run(*Drover.io, '-f', 'vmdk', '-c', f'write -P 1 {2047 * MIB - 512} 1024', tmp_path / 'a.vmdk')
    for tool in (Qemu, Drover):
        done = run(*tool.io, '-f', 'vmdk', '-c', f'read -P 1 {2047 * MIB - 512} 1024', tmp_path / 'a.vmdk')
        assert 'failed' not in done.stdout
    assert len(list(tmp_path.glob('a-*'))) == 2


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()


@needs_7z
@pytest.mark.parametrize('kind', KINDS)
def test_7_zip_reads_ours(kind, tmp_path):
    disk = disk_with_data(tmp_path, 3 * MIB, kind)
    made = tmp_path / 'made.vmdk'
    run(DROVER, 'convert', '-O', 'vmdk', '-o', f'subformat={kind}', disk.path, made)
    assert 'Type = VMDK' in run('7z', 'l', '-slt', made).stdout
    done = subprocess.run(['7z', 'x', '-so', str(made)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(done.stdout).hexdigest() == digest(disk.path)


@needs_libvmdk
@pytest.mark.parametrize('kind', KINDS)
def test_libvmdk_reads_ours(kind, tmp_path):
    disk = disk_with_data(tmp_path, 3 * MIB, kind)
    made, mnt = tmp_path / 'made.vmdk', tmp_path / 'mnt'
    run(DROVER, 'convert', '-O', 'vmdk', '-o', f'subformat={kind}', disk.path, made)
    assert re.search(rf'Media size:.*\({3 * MIB} bytes\)', run('vmdkinfo', made).stdout)
    mnt.mkdir()
    if not os.path.exists('/dev/fuse'):
        pytest.skip('no FUSE here')
    done = run('vmdkmount', made, mnt, ok=False, timeout=30)
    if done.returncode != 0:
        pytest.skip(f'vmdkmount cannot mount here: {done.stderr}')
    try:
        assert digest(mnt / 'vmdk1') == digest(disk.path)
    finally:
        run('fusermount', '-u', mnt)


def test_a_disk_that_qemu_wrote_tells_its_stale_long_id_and_gets_a_new_one(tmp_path):
    create(Drover, tmp_path / 'a.vmdk', 'vmdk', MIB)
    run('qemu-io', '-f', 'vmdk', '-c', 'write -P 1 0 64k', tmp_path / 'a.vmdk')
    assert 'longContentID' in run(DROVER, 'check', tmp_path / 'a.vmdk').stdout
    run(DROVER, 'io', '-c', 'write -P 2 0 64k', tmp_path / 'a.vmdk')
    assert 'longContentID' not in run(DROVER, 'check', tmp_path / 'a.vmdk').stdout
