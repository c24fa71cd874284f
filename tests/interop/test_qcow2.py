# SPDX-License-Identifier: LGPL-2.1-or-later
"""qcow2 images go to and fro between Drover and QEMU's tools."""
import json
import os

import pytest
from tools import DROVER, MIB, TOOLS, Disk, Drover, Qemu, compare, create, create_encrypted, rng, run

pytestmark = pytest.mark.usefixtures('qemu')

OPTIONS = ['', 'cluster_size=512', 'cluster_size=4k', 'cluster_size=2M', 'compat=0.10', 'refcount_bits=1',
           'refcount_bits=8,cluster_size=512', 'refcount_bits=64', 'extended_l2=on', 'extended_l2=on,cluster_size=16k',
           'lazy_refcounts=on', 'compression_type=zstd', 'compression_type=zlib,cluster_size=1M', 'preallocation=metadata',
           'preallocation=falloc', 'preallocation=full',
           'extended_l2=on,preallocation=metadata', 'data_file=disk.data', 'data_file=disk.data,data_file_raw=on']


def other(tool):
    return Qemu if tool is Drover else Drover


def clean(path):
    run('qemu-img', 'check', '-q', path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('size', [5 * MIB + 512, 65536 - 512])
@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('maker', TOOLS, ids=lambda t: t.name)
def test_made_by_one_written_by_both(maker, options, size, tmp_path):
    rnd = rng('qcow2', maker.name, options, size)
    disk = Disk('disk.qcow2', 'qcow2', size)
    create(maker, disk.path, 'qcow2', size, options)
    clean(disk.path)
    disk.verify(tmp_path)
    for writer in (other(maker), maker, other(maker)):
        disk.write(writer, rnd)
        clean(disk.path)
        disk.verify(tmp_path)
    if 'data_file_raw' in options:
        with open('disk.data', 'rb') as f:
            assert f.read(size) == disk.content


@pytest.mark.parametrize('options', ['', 'cluster_size=512', 'compression_type=zstd', 'extended_l2=on', 'compat=0.10'])
@pytest.mark.parametrize('maker', TOOLS, ids=lambda t: t.name)
def test_compressed_by_one_written_by_the_other(maker, options, tmp_path):
    rnd = rng('compressed', maker.name, options)
    disk = Disk('disk.qcow2', 'qcow2', 3 * MIB + 512)
    words = [rnd.randbytes(5) for _ in range(200)]
    for at in range(0, 3 * MIB, 250000):
        disk.content[at:at + 100000] = b''.join(rnd.choices(words, k=20000))
    disk.content[MIB:MIB + 200000] = rnd.randbytes(200000)  # does not shrink
    with open('plain.raw', 'wb') as f:
        f.write(disk.content)
    argv = maker.img + ['convert', '-c', '-f', 'raw', '-O', 'qcow2'] + (['-o', options] if options else [])
    run(*argv, 'plain.raw', disk.path)
    clean(disk.path)
    disk.verify(tmp_path)
    compressed = json.loads(run('qemu-img', 'check', '--output=json', disk.path).stdout)['compressed-clusters']
    assert compressed > 5
    for writer in (other(maker), maker):
        disk.write(writer, rnd, 12)
        clean(disk.path)
        disk.verify(tmp_path)


def test_what_drover_compresses_is_no_larger(tmp_path):
    rnd = rng('size')
    words = [rnd.randbytes(4) for _ in range(1000)]
    (tmp_path / 'plain.raw').write_bytes(b''.join(rnd.choices(words, k=MIB)))
    for kind in ('zlib', 'zstd'):
        sizes = []
        for tool in TOOLS:
            run(*tool.img, 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', f'compression_type={kind}', 'plain.raw',
                f'{tool.name}.{kind}')
            sizes.append(os.stat(f'{tool.name}.{kind}').st_size)
        assert sizes[0] <= sizes[1] + 4096


@pytest.mark.parametrize('options', ['', 'extended_l2=on', 'cluster_size=512', 'compat=0.10'])
@pytest.mark.parametrize('makers', [(Drover, Qemu, Drover), (Qemu, Drover, Qemu)],
                         ids=lambda m: '-'.join(t.name for t in m))
def test_chains(makers, options, tmp_path):
    rnd = rng('chain', options, *(m.name for m in makers))
    below, disks = None, []
    for i, maker in enumerate(makers):
        size = (4, 3, 5)[i] * MIB
        disk = Disk(f'{i}.qcow2', 'qcow2', size, below.content if below else None)
        create(maker, disk.path, 'qcow2', size, options, below.path if below else None, 'qcow2')
        disk.write(other(maker), rnd)
        disk.write(maker, rnd)
        clean(disk.path)
        disk.verify(tmp_path)
        disks.append(disk)
        below = disk
    for disk in disks[:-1]:
        disk.verify(tmp_path)


@pytest.mark.parametrize('options', ['', 'cluster_size=512', 'extended_l2=on,cluster_size=16k'])
def test_rebase_and_commit_and_stream(options, tmp_path):
    rnd = rng('rebase', options)
    for name in ('a', 'b'):
        disk = Disk(f'{name}.qcow2', 'qcow2', 3 * MIB)
        create(Drover, disk.path, 'qcow2', disk.size, options)
        disk.write(Qemu, rnd, 9)
    a = Disk('a.qcow2', 'qcow2', 3 * MIB)
    run('qemu-img', 'convert', '-O', 'raw', a.path, 'a.raw')
    with open('a.raw', 'rb') as f:
        a.content[:] = f.read()
    top = Disk('top.qcow2', 'qcow2', 3 * MIB, a.content)
    create(Qemu, top.path, 'qcow2', top.size, options, 'a.qcow2', 'qcow2')
    top.write(Qemu, rnd)
    for parent in ('b.qcow2', 'a.qcow2', ''):
        run(DROVER, 'rebase', '-b', parent, '-F', 'qcow2', top.path)
        info = json.loads(run('qemu-img', 'info', '--output=json', top.path).stdout)
        assert info.get('backing-filename', '') == parent
        assert info.get('backing-filename-format', 'qcow2') == 'qcow2'
        clean(top.path)
        top.verify(tmp_path)
    create(Drover, 'over.qcow2', 'qcow2', top.size, options, 'top.qcow2', 'qcow2')
    over = Disk('over.qcow2', 'qcow2', top.size, top.content)
    over.write(Drover, rnd)
    run(DROVER, 'commit', over.path)
    top.content[:] = over.content
    for disk in (top, over):
        clean(disk.path)
        disk.verify(tmp_path)
    over.write(Qemu, rnd)
    run(DROVER, 'stream', over.path)
    os.unlink('top.qcow2')
    clean(over.path)
    over.verify(tmp_path)


@pytest.mark.parametrize('options', ['', 'cluster_size=512', 'extended_l2=on', 'refcount_bits=2'])
def test_what_a_snapshot_holds_is_not_written_to(options, tmp_path):
    rnd = rng('snapshot', options)
    disk = Disk('disk.qcow2', 'qcow2', 3 * MIB + 512)
    create(Qemu, disk.path, 'qcow2', disk.size, options)
    disk.write(Qemu, rnd, 12)
    kept = bytes(disk.content)
    run('qemu-img', 'snapshot', '-c', 'before', disk.path)
    for writer in (Drover, Qemu, Drover):
        disk.write(writer, rnd, 12)
        run(DROVER, 'io', '-f', 'qcow2', '-c', 'discard 100k 200k', '-c', 'write -z 1M 300k', disk.path)
        disk.content[100 << 10:300 << 10] = bytes(200 << 10)
        disk.content[MIB:MIB + (300 << 10)] = bytes(300 << 10)
        clean(disk.path)
        run('qemu-img', 'convert', '-l', 'before', '-O', 'raw', disk.path, 'kept.raw')
        with open('kept.raw', 'rb') as f:
            assert f.read() == kept


@pytest.mark.parametrize('extra', [0, 1, 3])
@pytest.mark.parametrize('bits', [9, 12, 16])
def test_the_header_keeps_what_it_does_not_know(bits, extra, tmp_path):
    """A parent is recorded, changed, and forgotten; extensions that are in the way stay."""
    create(Qemu, 'disk.qcow2', 'qcow2', MIB, f'cluster_size={1 << bits}')
    for name in ('a.qcow2', 'another-parent.raw'):
        create(Qemu, name, name.split('.')[1], MIB)
    head = bytearray((tmp_path / 'disk.qcow2').read_bytes()[:1 << bits])
    at, kept = 112, []
    while int.from_bytes(head[at:at + 4], 'big'):
        at += 8 + (int.from_bytes(head[at + 4:at + 8], 'big') + 7) // 8 * 8
    for i in range(extra):
        data = bytes([65 + i]) * (20 + 70 * i)
        head[at:at + 8 + len(data)] = (0xabcd0000 + i).to_bytes(4, 'big') + len(data).to_bytes(4, 'big') + data
        kept.append(data)
        at += 8 + (len(data) + 7) // 8 * 8
        head[at:at + 8] = bytes(8)
    with open('disk.qcow2', 'r+b') as f:
        f.write(head[:1 << bits])
    for name in ('a.qcow2', 'another-parent.raw', 'a.qcow2', '', 'another-parent.raw'):
        args = ['-F', name.split('.')[1]] if name else []
        done = run(DROVER, 'rebase', '-u', '-b', name, *args, 'disk.qcow2', ok=False)
        if bits == 9 and extra == 3 and done.returncode:  # one sector is not enough for all that
            assert 'no room' in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        info = json.loads(run('qemu-img', 'info', '--output=json', 'disk.qcow2').stdout)
        assert info.get('backing-filename', '') == name
        assert not name or info['backing-filename-format'] == name.split('.')[1]
        clean('disk.qcow2')
        now = (tmp_path / 'disk.qcow2').read_bytes()[:1 << bits]
        assert all(data in now for data in kept)
        assert bits <= 12 or b'raw external data' in now or b'lazy refcounts' in now


def test_an_image_marked_corrupt_is_only_read(tmp_path):
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    with open('disk.qcow2', 'r+b') as f:
        f.seek(79)
        f.write(b'\2')
    done = run(DROVER, 'io', '-f', 'qcow2', '-c', 'write 0 4k', 'disk.qcow2', ok=False)
    assert done.returncode == 1 and 'corrupt' in done.stderr and 'check -r all' in done.stderr
    run(DROVER, 'convert', '-O', 'raw', 'disk.qcow2', 'out.raw')
    assert (tmp_path / 'out.raw').read_bytes() == bytes(MIB)


@pytest.mark.parametrize('write', [False, True])
@pytest.mark.parametrize('left', [0, 1, 100])
def test_a_table_that_was_cut_off_is_no_zeros(left, write, tmp_path):
    create(Qemu, 'disk.qcow2', 'qcow2', 64 * MIB)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 40M 64k', 'disk.qcow2')
    content = (tmp_path / 'disk.qcow2').read_bytes()
    l1 = int.from_bytes(content[40:48], 'big')
    l2 = int.from_bytes(content[l1:l1 + 8], 'big') & ~(1 << 63)
    (tmp_path / 'disk.qcow2').write_bytes(content[:l2 + 4096 * left // 100 if left > 1 else l2 + left * 8])
    args = [] if write else ['-r']
    done = run(DROVER, 'io', *args, '-f', 'qcow2', '-c', 'read 40M 64k', 'disk.qcow2', ok=False)
    assert done.returncode == 1 and 'ends at byte' in done.stdout + done.stderr
    assert run(DROVER, 'convert', '-O', 'raw', 'disk.qcow2', 'out.raw', ok=False).returncode == 1
    (tmp_path / 'disk.qcow2').write_bytes(content[:l1])
    assert run(DROVER, 'convert', '-O', 'raw', 'disk.qcow2', 'out.raw', ok=False).returncode == 1


def test_counts_behind_the_end_of_the_file_free_nothing(tmp_path):
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 64k', 'disk.qcow2')
    with open('disk.qcow2', 'r+b') as f:
        f.seek(0x10000)
        f.write((1 << 40).to_bytes(8, 'big'))
    before = (tmp_path / 'disk.qcow2').read_bytes()
    done = run(DROVER, 'io', '-f', 'qcow2', '-c', 'write 512k 64k', 'disk.qcow2', ok=False)
    assert done.returncode == 1 and 'where the file has ended' in done.stdout + done.stderr
    assert (tmp_path / 'disk.qcow2').read_bytes() == before
    run(DROVER, 'io', '-r', '-f', 'qcow2', '-c', 'read -P 7 0 64k', 'disk.qcow2')


def test_nothing_is_committed_into_a_corrupt_parent(tmp_path):
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    create(Qemu, 'child.qcow2', 'qcow2', MIB, '', 'disk.qcow2', 'qcow2')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 3 0 64k', 'child.qcow2')
    with open('disk.qcow2', 'r+b') as f:
        f.seek(79)
        f.write(b'\2')
    before = (tmp_path / 'disk.qcow2').read_bytes()
    done = run(DROVER, 'commit', 'child.qcow2', ok=False)
    assert done.returncode == 1 and 'corrupt' in done.stderr
    assert (tmp_path / 'disk.qcow2').read_bytes() == before


def test_an_entry_that_leads_into_a_table_is_refused_and_marked(tmp_path):
    create(Qemu, 'disk.qcow2', 'qcow2', MIB)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 128k', 'disk.qcow2')
    with open('disk.qcow2', 'r+b') as f:
        f.seek(40)
        f.seek(int.from_bytes(f.read(8), 'big'))  # L1
        f.seek(int.from_bytes(f.read(8), 'big') & ~(1 << 63))  # L2
        f.write((0x10000 | 1 << 63).to_bytes(8, 'big'))  # the refcount table
        f.seek(0)
        before = f.read(0x30000)
    done = run(DROVER, 'io', '-f', 'qcow2', '-c', 'write -P 7 0 4k', 'disk.qcow2', ok=False)
    assert done.returncode == 1 and 'refcount table' in done.stderr
    with open('disk.qcow2', 'rb') as f:
        after = f.read(0x30000)
    assert after[79] == 2 and after[:79] == before[:79] and after[80:] == before[80:]
    assert run('qemu-io', '-f', 'qcow2', '-c', 'write 0 4k', 'disk.qcow2', ok=False).returncode


@pytest.mark.parametrize('method', ['aes', 'luks'])
def test_encrypted_images_are_told_of_and_not_read(method, tmp_path):
    create_encrypted('disk.qcow2', '1M', method)
    run('qemu-io', '--object', 'secret,id=s,data=abc', '-c', 'write -P 5 0 64k', '--image-opts',
        f'driver=qcow2,encrypt.format={method},encrypt.key-secret=s,file.filename=disk.qcow2')
    run(DROVER, 'info', 'disk.qcow2')
    run(DROVER, 'map', '--output=json', 'disk.qcow2')
    before = (tmp_path / 'disk.qcow2').read_bytes()
    for args in (['convert', '-O', 'raw', 'disk.qcow2', 'out.raw'], ['io', '-c', 'read 0 4k', 'disk.qcow2'],
                 ['io', '-c', 'write 0 4k', 'disk.qcow2']):
        done = run(DROVER, *args, ok=False)
        assert done.returncode == 1 and f'encrypted ({method.upper()})' in done.stderr
    assert not (tmp_path / 'out.raw').exists()
    assert (tmp_path / 'disk.qcow2').read_bytes() == before
    create(Qemu, 'base.qcow2', 'qcow2', MIB)
    run(DROVER, 'rebase', '-u', '-b', 'base.qcow2', '-F', 'qcow2', 'disk.qcow2')
    assert json.loads(run('qemu-img', 'info', '--output=json', 'disk.qcow2').stdout)['backing-filename'] == 'base.qcow2'


def merged(rows):
    """Without what later versions say more, and where clusters with zeros have a place in the file."""
    out = []
    for row in rows:
        row = {k: v for k, v in row.items() if k != 'compressed' and (k != 'offset' or not row['zero'])}
        last = out[-1] if out else None
        if last and row['zero'] and all(last[k] == row[k] for k in ('depth', 'present', 'zero', 'data')):
            last['length'] += row['length']
        else:
            out.append(row)
    return out


@pytest.mark.parametrize('options', OPTIONS[:12])
def test_info_and_map_and_measure_say_what_qemu_img_says(options, tmp_path):
    rnd = rng('info', options)
    disk = Disk('disk.qcow2', 'qcow2', 9 * MIB)
    create(Drover, disk.path, 'qcow2', disk.size, options)
    disk.write(Qemu, rnd, 9)
    for args in (['info'], ['info', '--output=json'], ['map'], ['map', '--output=json'],
                 ['measure', '-O', 'qcow2', '-o', options or 'refcount_bits=16']):
        ours, theirs = (run(*tool.img, *args, disk.path).stdout for tool in TOOLS)
        if '--output=json' in args:
            ours, theirs = json.loads(ours), json.loads(theirs)
        if args[0] == 'map' and '--output=json' in args:  # later versions say more
            ours, theirs = merged(ours), merged(theirs)
        assert ours == theirs, args


def test_old_qcow_is_named(tmp_path):
    run('qemu-img', 'create', '-q', '-f', 'qcow', 'old.qcow', '1M')
    done = run(DROVER, 'info', 'old.qcow', ok=False)
    assert done.returncode == 1 and 'qcow' in done.stderr


def test_compare_agrees():
    create(Drover, 'a.qcow2', 'qcow2', MIB)
    run('qemu-io', '-f', 'qcow2', '-c', 'write -z 0 512k', 'a.qcow2')
    create(Qemu, 'b.qcow2', 'qcow2', MIB, 'cluster_size=512')
    for tool in TOOLS:
        compare(tool, 'a.qcow2', 'qcow2', 'b.qcow2', 'qcow2')


@pytest.mark.parametrize('options', ['', 'compat=0.10', 'extended_l2=on', 'preallocation=full', 'data_file=disk.data', 'cluster_size=4k'])
def test_zeros_keep_their_place_unless_it_may_be_unmapped(options):
    """As many clusters as with QEMU afterwards; and writing there again takes none."""
    def clusters(tool):
        for name in ('disk.qcow2', 'disk.data'):
            if os.path.exists(name):
                os.remove(name)
        create(Qemu, 'disk.qcow2', 'qcow2', MIB, options)
        run(*Qemu.io, '-f', 'qcow2', '-c', 'write -P 5 0 512k', 'disk.qcow2')
        found = []
        for command in ('write -z 64k 128k', 'write -P 6 96k 16k', 'write -zu 256k 64k', 'write -z 256k 64k', 'discard 64k 64k'):
            run(*tool.io, '-f', 'qcow2', '-c', command, 'disk.qcow2')
            clean('disk.qcow2')
            found.append(json.loads(run('qemu-img', 'check', '--output=json', 'disk.qcow2').stdout)['allocated-clusters'])
        run(*Qemu.io, '-r', '-f', 'qcow2', '-c', 'read -P 5 0 64k', '-c', 'read -P 0 64k 32k', '-c', 'read -P 0 256k 64k', 'disk.qcow2')
        return found
    assert clusters(Drover) == clusters(Qemu)
