# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks encrypted by LUKS, in a container of their own and inside qcow2: what one tool writes the other reads."""
import base64
import json
import os

import pytest
from tools import DROVER, MIB, TOOLS, Disk, Drover, Qemu, create, rng, run

SECRET = ['--object', 'secret,id=s,data=a password']
FORMATS = ['luks', 'qcow2']


def prefix(fmt):
    return 'encrypt.' if fmt == 'qcow2' else ''


def settings(fmt, **more):
    options = {'key-secret': 's', 'iter-time': 10, **{k.replace('_', '-'): v for k, v in more.items()}}
    return ('encrypt.format=luks,' if fmt == 'qcow2' else '') + ','.join(f'{prefix(fmt)}{k}={v}' for k, v in options.items())


def image(path, fmt):
    return f'driver={fmt},{prefix(fmt)}key-secret=s,file.filename={path}'


def name(path, fmt):
    return 'json:' + json.dumps({'driver': fmt, prefix(fmt) + 'key-secret': 's', 'file.filename': str(path)})


def make(tool, path, fmt, size, **more):
    """QEMU measures the processor first, which fails now and then."""
    argv = tool.img + ['create', '-q', *SECRET, '-f', fmt, '-o', settings(fmt, **more), path, size]
    for _ in range(30):
        if run(*argv, ok=False).returncode == 0:
            return
    run(*argv)


@pytest.fixture(autouse=True)
def in_its_own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Encrypted(Disk):
    def io(self, tool, *commands):
        done = run(*tool.io, *SECRET, '--image-opts', image(self.path, self.format),
                   *(part for c in commands for part in ('-c', c)))
        assert 'failed' not in done.stdout, done.stdout

    def write(self, tool, rnd, n=4):
        commands = []
        for _ in range(n):
            length = rnd.choice((1, 512, 700, 65536, 200000))
            off, pattern = rnd.randrange(0, self.size - length), rnd.randrange(1, 256)
            off, length = (off, length) if tool is Drover else (off // 512 * 512, (length + 511) // 512 * 512)
            commands.append(f'write -P {pattern} {off} {length}')
            self.content[off:off + length] = bytes([pattern]) * length
        self.io(tool, *commands)

    def verify(self, where, tools=None):
        expected = self.expect(where)
        for tool in tools or TOOLS:
            run(*tool.img, 'compare', *SECRET, '--image-opts', 'driver=raw,file.filename=' + expected,
                image(self.path, self.format))
        if self.format == 'qcow2':
            run('qemu-img', 'check', '-q', *SECRET, '--image-opts', image(self.path, self.format))
            run(DROVER, 'check', '-q', self.path)


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('maker', TOOLS, ids=lambda tool: tool.name)
def test_what_one_has_made_both_write_and_read(maker, fmt, tmp_path):
    make(maker, 'disk', fmt, 3 * MIB)
    disk = Encrypted('disk', fmt, 3 * MIB)
    disk.io(Qemu, 'write -z 0 3M')  # a new container holds noise
    for tool in (Qemu, Drover):
        disk.write(tool, rng('luks', maker.name, fmt, tool.name))
    disk.io(Drover, 'write -z 100k 3000', 'discard 1M 1M')
    disk.content[100 << 10:(100 << 10) + 3000] = bytes(3000)
    if fmt == 'qcow2':
        disk.content[MIB:2 * MIB] = bytes(MIB)
    disk.verify(tmp_path)
    with open('disk', 'rb') as f:
        stored = f.read()
    assert not [p for p in set(disk.content) - {0} if bytes([p]) * 512 in stored]


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('more', [
    {'cipher_alg': 'aes-128', 'cipher_mode': 'cbc', 'ivgen_alg': 'essiv', 'ivgen_hash_alg': 'sha256', 'hash_alg': 'sha1'},
    {'cipher_alg': 'serpent-256', 'hash_alg': 'sha512', 'ivgen_alg': 'plain'},
    {'cipher_alg': 'twofish-128', 'cipher_mode': 'ecb', 'hash_alg': 'ripemd160'}], ids=['essiv', 'serpent', 'ecb'])
def test_ciphers(more, fmt, tmp_path):
    with open('plain.raw', 'wb') as f:
        f.write(os.urandom(100000) + bytes(MIB) + os.urandom(150000 + 64))
    run(DROVER, 'convert', '-q', *SECRET, '-f', 'raw', '-O', fmt, '-o', settings(fmt, **more), 'plain.raw', 'disk')
    make(Drover, 'other', fmt, os.path.getsize('plain.raw') // 512 * 512 + 512, **more)
    run(DROVER, 'convert', '-q', '-n', *SECRET, '-f', 'raw', '--target-image-opts', 'plain.raw', image('other', fmt))
    for path in ('disk', 'other'):
        for tool in TOOLS:
            run(*tool.img, 'compare', *SECRET, '--image-opts', 'driver=raw,file.filename=plain.raw', image(path, fmt))


@pytest.mark.parametrize('fmt', FORMATS)
def test_info_map_and_measure_say_what_qemu_img_says(fmt):
    make(Drover, 'disk', fmt, 4 * MIB)
    Encrypted('disk', fmt, 4 * MIB).io(Drover, 'write -P 5 1M 64k')
    for argv in (['info', '--output=json', 'disk'],
                 ['map', '--output=json', *SECRET, '--image-opts', image('disk', fmt)]):
        ours, theirs = (json.loads(run(*tool.img, *argv).stdout) for tool in TOOLS)
        assert ours == theirs
    # QEMU's numbers; it makes a key to find them, which takes long
    sizes = json.loads(run(DROVER, 'measure', '--output=json', '-O', fmt, '-o', settings(fmt), '--size', '40M').stdout)
    assert sizes['required'] == {'luks': 44011520, 'qcow2': 2424832}[fmt]
    assert sizes['fully-allocated'] == {'luks': 44011520, 'qcow2': 44367872}[fmt]
    assert ['encrypted: yes'] == [line for line in run(DROVER, 'info', 'disk').stdout.splitlines() if 'encrypted' in line]


@pytest.mark.parametrize('fmt', FORMATS)
def test_without_the_password_nothing_is_read_and_nothing_changes(fmt):
    make(Drover, 'disk', fmt, MIB)
    Encrypted('disk', fmt, MIB).io(Drover, 'write -P 5 0 64k')
    with open('disk', 'rb') as f:
        before = f.read()
    wrong = ['--object', 'secret,id=s,data=another']
    option = f"'{prefix(fmt)}key-secret' is required"
    for argv, said in ((['disk'], option), ([*wrong, name('disk', fmt)], 'Invalid password'),
                       ([name('disk', fmt)], "No secret with id 's'")):
        for command in (['convert', '-O', 'raw', *argv, 'out.raw'], ['io', '-c', 'read 0 4k', *argv],
                        ['io', '-c', 'write 0 4k', *argv]):
            done = run(DROVER, *command, ok=False)
            assert done.returncode == 1 and said in done.stderr and done.stderr.count('\n') == 1, done.stderr
            assert 'another' not in done.stderr
    assert not os.path.exists('out.raw')
    with open('disk', 'rb') as f:
        assert f.read() == before
    done = run(DROVER, 'convert', *SECRET, '-c', '-O', fmt, '-o', settings(fmt), 'disk', 'new', ok=False)
    assert done.returncode == 1 and 'Compression and encryption not supported' in done.stderr and not os.path.exists('new')
    done = run(DROVER, 'create', '-f', fmt, '-o', settings(fmt), 'new', '1M', ok=False)
    assert done.returncode == 1 and "No secret with id 's'" in done.stderr and not os.path.exists('new')


def test_secrets_come_from_files_and_in_base64():
    with open('key', 'wb') as f:
        f.write(b'\x01\x02 bytes\n')
    with open('key64', 'wb') as f:
        f.write(base64.b64encode(b'\x01\x02 bytes\n') + b'\n')
    run(DROVER, 'create', '-q', '--object', 'secret,id=s,file=key', '-f', 'luks', '-o', settings('luks'), 'disk', '1M')
    for tool in TOOLS:
        run(*tool.img, 'convert', '--object', 'secret,id=s,file=key64,format=base64', '-O', 'raw', name('disk', 'luks'), 'out')
    done = run(DROVER, 'info', '--object', 'secret,id=s,data=$$$$,format=base64', 'disk', ok=False)
    assert done.returncode == 1 and 'no base64' in done.stderr
    done = run(DROVER, 'info', *SECRET, *SECRET, 'disk', ok=False)
    assert done.returncode == 1 and 'id is that of another secret' in done.stderr


def test_parents_and_overlays():
    make(Drover, 'base', 'luks', 2 * MIB)
    Encrypted('base', 'luks', 2 * MIB).io(Drover, 'write -P 1 0 2M')
    run(DROVER, 'create', '-q', *SECRET, '-f', 'qcow2', '-o', settings('qcow2'), '-b', name('base', 'luks'), '-F', 'luks', 'top')
    top = Encrypted('top', 'qcow2', 2 * MIB, b'\1' * 2 * MIB)
    top.io(Drover, 'write -P 2 100 5000')
    top.io(Qemu, 'write -P 3 1M 512')
    top.content[100:5100] = b'\2' * 5000
    top.content[MIB:MIB + 512] = b'\3' * 512
    top.verify('.')
    run(DROVER, 'commit', '-q', *SECRET, '-d', name('top', 'qcow2'))
    Encrypted('base', 'luks', 2 * MIB, top.content).verify('.')
    run(DROVER, 'rebase', '-q', *SECRET, '-b', '', name('top', 'qcow2'))
    top.verify('.')


def test_snapshots_moving_and_growing(tmp_path):
    make(Drover, 'disk', 'qcow2', 4 * MIB)
    disk = Encrypted('disk', 'qcow2', 4 * MIB)
    disk.write(Drover, rng('luks', 'moving'))
    run(DROVER, 'snapshot', '-i', '-c', 'one', 'disk')
    disk.io(Drover, 'write -P 9 0 2M', 'write -P 8 3M 64k')
    run(DROVER, 'snapshot', '-i', '-a', 'one', 'disk')
    disk.verify(tmp_path)
    disk.io(Drover, 'write -P 9 0 2M', 'write -P 8 3M 64k')
    run(DROVER, 'snapshot', '-i', '-d', 'one', 'disk')
    disk.io(Drover, 'discard 0 1M')
    disk.content[:2 * MIB] = bytes(MIB) + b'\x09' * MIB
    disk.content[3 * MIB:3 * MIB + 65536] = b'\x08' * 65536
    before = os.path.getsize('disk')
    run(DROVER, 'compact', '-q', *SECRET, name('disk', 'qcow2'))
    assert os.path.getsize('disk') < before
    disk.verify(tmp_path)
    for fmt in FORMATS:
        make(Drover, 'grown', fmt, MIB)
        run(DROVER, 'resize', '-q', *SECRET, name('grown', fmt), '3M')
        Encrypted('grown', fmt, 3 * MIB).io(Drover, 'read -P 0 1M 2M')


@pytest.mark.parametrize('how', ['metadata', 'falloc'])
def test_reserved_clusters_read_as_zeros(how, tmp_path):
    run(DROVER, 'create', '-q', *SECRET, '-f', 'qcow2', '-o', settings('qcow2') + f',preallocation={how}', 'disk', '2M')
    disk = Encrypted('disk', 'qcow2', 2 * MIB)
    disk.verify(tmp_path)
    disk.write(Drover, rng('luks', how))
    disk.verify(tmp_path)


def test_cryptsetup_opens_what_is_made():
    make(Drover, 'disk', 'luks', MIB)
    assert 'Key Slot 0: ENABLED' in run('cryptsetup', 'luksDump', 'disk').stdout
    assert run('cryptsetup', 'open', '--type', 'luks1', '--test-passphrase', 'disk', '-d', '-', input='a password')
    done = run('cryptsetup', 'open', '--type', 'luks1', '--test-passphrase', 'disk', '-d', '-', input='another', ok=False)
    assert done.returncode == 2


def test_a_disk_that_is_copied_has_zeros_where_the_source_has_holes():
    run(DROVER, 'create', '-q', '-f', 'raw', 'plain.raw', '2M')
    run(DROVER, 'io', '-f', 'raw', '-c', 'write -P 3 1M 4k', 'plain.raw')
    for fmt in FORMATS:
        run(DROVER, 'convert', '-q', *SECRET, '-f', 'raw', '-O', fmt, '-o', settings(fmt), 'plain.raw', 'disk')
        Encrypted('disk', fmt, 2 * MIB).io(Drover, 'read -P 0 0 1M', 'read -P 3 1M 4k', 'read -P 0 1028k 1020k')
        os.unlink('disk')


def test_disks_are_extracted_from_archives_into_encrypted_images():
    run(DROVER, 'create', '-q', '-f', 'raw', 'plain.raw', '2M')
    run(DROVER, 'io', '-f', 'raw', '-c', 'write -P 3 1M 4k', 'plain.raw')
    run(DROVER, 'vma', 'create', '-q', '--disk', 'format=raw:disk=plain.raw', 'x.vma')
    for fmt in FORMATS:
        run(DROVER, 'vma', 'extract', '-q', *SECRET, '--to=' + fmt, '-o', settings(fmt), '--output=out', 'x.vma')
        run(DROVER, 'compare', *SECRET, '--image-opts', 'driver=raw,file.filename=plain.raw', image('out', fmt))
        os.unlink('out')


def test_encrypted_disks_are_served():
    for fmt in FORMATS:
        make(Drover, 'disk', fmt, MIB)
        run(DROVER, 'serve', *SECRET, '--run', 'qemu-io -f raw -c "write -P 5 1000 5000" $uri', name('disk', fmt))
        Encrypted('disk', fmt, MIB).io(Drover, 'read -P 5 1000 5000')
        done = run(DROVER, 'serve', *SECRET[:1], 'secret,id=s,data=another', '--run', 'true', name('disk', fmt), ok=False)
        assert done.returncode == 1 and 'Invalid password' in done.stderr, done.stderr
        os.unlink('disk')


def test_a_secret_reaches_the_parent_of_a_disk_that_is_served():
    make(Drover, 'base', 'luks', MIB)
    Encrypted('base', 'luks', MIB).io(Drover, 'write -P 4 0 1M')
    run(DROVER, 'create', '-q', *SECRET, '-f', 'qcow2', '-b', name('base', 'luks'), '-F', 'luks', 'top')
    secrets = ['--object', 'secret,id=other,data=', *SECRET]
    run(DROVER, 'serve', *secrets, '--run', 'qemu-io -f raw -c "write -P 5 1000 5000" -c "read -P 4 10000 5000" $uri >said', 'top')
    with open('said', encoding='utf-8') as f:
        assert 'failed' not in f.read()
    run(DROVER, 'io', *SECRET, '-c', 'read -P 5 1000 5000', '-c', 'read -P 4 6000 5000', 'top')


def test_a_raw_disk_that_a_guest_has_encrypted_is_read_as_it_is():
    make(Drover, 'disk', 'luks', MIB)
    run(DROVER, 'convert', '-q', '-f', 'raw', '-O', 'raw', 'disk', 'copy')
    run('cmp', 'disk', 'copy')
    create(Drover, 'over', 'qcow2', 4 * MIB, backing='disk', backing_format='raw')
    run(DROVER, 'io', '-c', 'read -v 0 6', 'over')
