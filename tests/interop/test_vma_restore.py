# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program called as vma by one who does what Proxmox's restore does: reads its lines from a pipe, makes volumes
when CTIME comes, and tells through a fifo where each disk goes."""
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
from tools import DROVER, MIB, run

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'cli'))

import vmagen  # noqa: E402  pylint: disable=wrong-import-position
from vmarestore import Restore, raw_volume  # noqa: E402  pylint: disable=wrong-import-position

CONF = b'''memory: 512
#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:
#qmdump#map:scsi1:drive-scsi1:local:raw:
#qmdump#map:efidisk0:drive-efidisk0:::
'''


@pytest.fixture
def where(tmp_path):
    os.symlink(os.path.abspath(DROVER), str(tmp_path / 'vma'))
    return tmp_path


def contents(seed=3):
    rng = random.Random(seed)
    return {1: vmagen.random_disk(rng, 20 * 65536 + 1024), 2: vmagen.random_disk(rng, 7 * 65536),
            3: vmagen.random_disk(rng, 540672)}


def archive(**kw):
    return vmagen.simple(contents(), configs=[(b'qemu-server.conf', CONF), (b'qemu-server.fw', b'[OPTIONS]\n')],
                         names={1: 'drive-scsi0', 2: 'drive-scsi1', 3: 'drive-efidisk0'}, order='interleaved', **kw)


def check(restore, made):
    for i, data in made.contents.items():
        name = made.header.disks[i][0].decode()
        with open(os.path.join(restore.dir, f'vm-100-{name}.raw'), 'rb') as f:
            assert f.read()[:len(data)] == data, name


def test_a_restore(where):
    made = archive()
    made.write(where / 'backup.vma')
    restore = Restore(where, raw_volume)
    assert restore.watch() == 0, restore.errors
    assert restore.devices == [(1, 1311744 + 0, 'drive-scsi0'), (2, 458752, 'drive-scsi1'), (3, 540672, 'drive-efidisk0')]
    assert restore.configs_there == ['qemu-server.conf', 'qemu-server.fw']
    assert restore.lines[0] == f'CFG: size: {len(CONF)} name: qemu-server.conf'
    assert any(line.startswith('progress 100%') for line in restore.lines)
    assert any(line.startswith('total bytes read ') for line in restore.lines)
    assert os.listdir(restore.tmp) and sorted(os.listdir(restore.tmp)) == ['qemu-server.conf', 'qemu-server.fw']
    check(restore, made)


def test_targets_with_old_content_are_zeroed(where):
    """Thick LVM: a volume is what its last owner left."""
    made = archive()
    made.write(where / 'backup.vma')
    restore = Restore(where, lambda *a: raw_volume(*a, zero=1, fill=b'\xee'))
    assert restore.watch() == 0, restore.errors
    check(restore, made)


def test_a_device_as_target(where):
    made = archive()
    made.write(where / 'backup.vma')
    loops = []

    def volume(restore, name, size):
        line = raw_volume(restore, name, size, fill=b'\xee')
        path = line.split('=', 2)[2]
        done = run('losetup', '-f', '--show', path, ok=False)
        if done.returncode:
            pytest.skip('no loop devices')
        loops.append(done.stdout.strip())
        return f'format=raw:1:{name}={loops[-1]}'

    try:
        restore = Restore(where, volume)
        assert restore.watch() == 0, restore.errors
    finally:
        for loop in loops:
            run('losetup', '-d', loop, ok=False)
    check(restore, made)


@pytest.mark.parametrize('how', ['cat backup.vma', 'zstd -q -d -c backup.vma.zst', 'zcat backup.vma.gz', 'lzop -d -c backup.vma.lzo',
                                 'bzcat -q backup.vma.bz2'])
def test_a_restore_from_a_pipe(how, where):
    made = archive()
    made.write(where / 'backup.vma')
    tool = {'zst': ['zstd', '-q'], 'gz': ['gzip', '-k'], 'lzo': ['lzop'], 'bz2': ['bzip2', '-k']}.get(how.rsplit('.', 1)[1])
    if tool:
        if not shutil.which(tool[0]):
            pytest.skip(f'{tool[0]} is not installed')
        run(*tool, where / 'backup.vma')
    restore = Restore(where, raw_volume, source='-', before=how + ' |')
    assert restore.watch() == 0, restore.errors
    check(restore, made)


def test_a_producer_that_is_slow(where):
    """Nothing is waited for that is not needed: the listing comes with the header, before the first extent."""
    made = archive()
    data = made.build()
    os.mkfifo(str(where / 'pipe'))
    restore = Restore(where, raw_volume, source='-', before='cat pipe |')
    listed = threading.Event()
    answer = restore.answer
    restore.answer = lambda: (answer(), listed.set())
    result = []
    watcher = threading.Thread(target=lambda: result.append(restore.watch()))
    watcher.start()
    with open(where / 'pipe', 'wb', buffering=0) as f:
        head = len(made.head)
        for at in range(0, head, 3000):
            f.write(data[at:min(at + 3000, head)])
        assert listed.wait(30), 'no listing, though the whole header is there'
        for at in range(head, len(data), 70001):
            f.write(data[at:at + 70001])
    watcher.join()
    assert result == [0], restore.errors
    check(restore, made)


def test_throttling(where):
    made = archive()
    made.write(where / 'backup.vma')
    stored = sum(len(data) for data in made.contents.values())
    started = time.monotonic()
    bps = stored // 2
    restore = Restore(where, lambda *a: raw_volume(*a, options=f'throttling.bps={bps}:throttling.group=restore:', zero=1))
    assert restore.watch() == 0, restore.errors
    assert time.monotonic() - started > 0.7  # about two seconds, less what may go at once
    check(restore, made)


@pytest.mark.parametrize('options', ['cache=none:', 'cache=unsafe:', 'cache=writeback:throttling.bps=0x10000000:',
                                     'throttling.group=g:throttling.bps=100000000:cache=directsync:'])
def test_options_in_any_order(options, where):
    made = archive()
    made.write(where / 'backup.vma')
    restore = Restore(where, lambda r, n, s: raw_volume(r, n, s).replace('format=', options + 'format='))
    assert restore.watch() == 0, restore.errors
    check(restore, made)


def test_a_disk_that_is_skipped(where):
    made = archive()
    made.write(where / 'backup.vma')
    restore = Restore(where, lambda r, n, s: 'skip=' + n if n == 'drive-scsi1' else raw_volume(r, n, s))
    assert restore.watch() == 0, restore.errors
    del made.contents[2]
    check(restore, made)
    assert not os.path.exists(os.path.join(restore.dir, 'vm-100-drive-scsi1.raw'))


def test_other_formats_and_no_format(where):
    made = archive()
    made.write(where / 'backup.vma')

    def volume(restore, name, size):
        path = os.path.join(restore.dir, 'vm-100-' + name)
        if name == 'drive-scsi0':
            run(DROVER, 'create', '-q', '-f', 'vmdk', path + '.vmdk', str(size))
            return f'format=vmdk:0:{name}={path}.vmdk'
        if name == 'drive-scsi1':
            run(DROVER, 'create', '-q', '-f', 'vmdk', path + '.vmdk', str(size))
            return f'1:{name}={path}.vmdk'  # found out
        return raw_volume(restore, name, size).replace('format=raw:', '')

    restore = Restore(where, volume)
    assert restore.watch() == 0, restore.errors
    for name in ('drive-scsi0', 'drive-scsi1'):
        run(DROVER, 'convert', '-O', 'raw', where / f'vm-100-{name}.vmdk', where / f'vm-100-{name}.raw')
    check(restore, made)


@pytest.mark.parametrize('extra,works', [(0, True), (4 * MIB, True), (4 * MIB + 1024, False), (-1024, False)])
def test_the_size_of_a_target(extra, works, where):
    made = archive()
    made.write(where / 'backup.vma')
    restore = Restore(where, lambda *a: raw_volume(*a, extra=extra))
    code = restore.watch()
    assert (code == 0) == works, restore.errors
    if works:
        check(restore, made)
    else:
        assert 0 < code < 100 and 'unexpected size' in restore.errors and 'drive-' in restore.errors, restore.errors


GOOD_LINE = 'format=raw:0:drive-scsi0='


@pytest.mark.parametrize('line,says', [
    ('nonsense', 'parse error'), ('2:drive-scsi0=x', 'parse error'), ('format=raw:drive-scsi0=x', 'parse error'),
    ('format=raw', "'format' not terminated"), ('format=raw:format=raw:0:drive-scsi0=x', "duplicate value for option 'format'"),
    ('throttling.bps=many:0:drive-scsi0=x', 'not a number: many'), ('skip=', "option 'skip' has no value"), ('0:=x', 'no dev name'),
    ('cache=sometimes:format=raw:0:drive-scsi0=x', 'invalid cache option: sometimes'),
    ('format=raw:0:drive-scsi0=/nope/at/all', "can't open file /nope/at/all"), (None, 'no device name mapping for drive-scsi0')])
def test_a_wrong_map(line, says, where):
    archive().write(where / 'backup.vma')
    restore = Restore(where, lambda r, n, s: line if n == 'drive-scsi0' else raw_volume(r, n, s))
    code = restore.watch()
    assert 0 < code < 100, restore.errors
    assert says in restore.errors, restore.errors
    assert restore.errors.startswith('vma: '), restore.errors


def test_the_last_line_for_a_name_counts_and_others_do_not_matter(where):
    made = archive()
    made.write(where / 'backup.vma')

    def volume(restore, name, size):
        return f'0:{name}=/nope/never\n0:no-such-drive=/nope/neither\n' + raw_volume(restore, name, size)

    restore = Restore(where, volume)
    assert restore.watch() == 0, restore.errors
    check(restore, made)


@pytest.mark.parametrize('more', [b'', b'\n', b'\nnonsense\n', b'done\nnonsense\n'])
def test_how_a_map_can_end(more, where):
    made = archive()
    made.write(where / 'backup.vma')
    restore = Restore(where, raw_volume, more=more)
    assert restore.watch() == 0, restore.errors
    check(restore, made)


def test_a_damaged_archive_fails_with_a_message(where):
    made = archive(per=5)
    data = made.build()
    at = made.places()[3][0]
    with open(where / 'backup.vma', 'wb') as f:
        f.write(data[:at + 200])
    restore = Restore(where, raw_volume)
    assert 0 < restore.watch() < 100
    assert str(at) in restore.errors, restore.errors


def test_a_machine_without_disks(where):
    vmagen.Archive(vmagen.Header([(b'qemu-server.conf', b'memory: 512\n')]), [vmagen.Extent([])]).write(where / 'backup.vma')
    restore = Restore(where, raw_volume)
    assert restore.watch() == 0, restore.errors
    assert restore.devices == [] and restore.configs_there == ['qemu-server.conf']


def test_forged_lines_do_not_reach_the_parent(where):
    header = vmagen.Header([(b'qemu-server.conf', b'x'), (b'a\nDEV: dev_id=1 size: 512 devname: drive-scsi0\nCTIME: x', b'')])
    vmagen.Archive(header, [vmagen.Extent([])]).write(where / 'backup.vma')
    restore = Restore(where, raw_volume)
    assert 0 < restore.watch() < 100
    assert restore.devices == []


def test_the_preview_of_a_configuration_closes_the_pipe_early(where):
    """`decompressor | vma config -`: it takes the header and goes."""
    made = archive()
    made.write(where / 'backup.vma')
    done = subprocess.run(['bash', '-c', 'cat backup.vma backup.vma backup.vma | ./vma config -'], cwd=where, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout == CONF and done.stderr == b''


def test_an_end_while_nobody_answers(where):
    """The fifo is there, and nothing comes through it."""
    archive().write(where / 'backup.vma')
    os.mkfifo(where / 'map.fifo')
    process = subprocess.Popen(['./vma', 'extract', '-r', 'map.fifo', 'backup.vma', 'out'], cwd=where, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith(b'CTIME: '):
            break
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode != 0


def test_what_is_extracted_is_what_other_tools_read(where, qemu):
    del qemu
    made = archive()
    made.write(where / 'backup.vma')
    run(DROVER, 'vma', 'extract', '--to', 'vmdk', where / 'backup.vma', where / 'out')
    for i, data in made.contents.items():
        name = made.header.disks[i][0].decode()
        (where / 'expected.raw').write_bytes(data)
        for image in (f'{where}/out/{name}.vmdk',):
            run('qemu-img', 'compare', '-f', 'raw', '-F', 'vmdk', where / 'expected.raw', image)
            run('qemu-img', 'check', image)
        run(DROVER, 'convert', '-O', 'vmdk', f'vma:{where}/backup.vma#{name}', where / 'x.vmdk')
        run('qemu-img', 'compare', '-f', 'raw', '-F', 'vmdk', where / 'expected.raw', where / 'x.vmdk')
        os.unlink(where / 'x.vmdk')


def test_disks_that_are_left_out_need_no_line(where):
    made = archive()
    made.write(where / 'backup.vma')
    target = where / 'x.raw'
    target.write_bytes(bytes(len(made.contents[2])))
    (where / 'map').write_text(f'format=raw:0:drive-scsi1={target}\ndone\n', encoding='ascii')  # a file does as well
    run(where / 'vma', 'extract', '-d', 'drive-scsi1', '-r', where / 'map', where / 'backup.vma', where / 'out')
    assert target.read_bytes() == made.contents[2]
    assert sorted(os.listdir(where / 'out')) == ['qemu-server.conf', 'qemu-server.fw']
