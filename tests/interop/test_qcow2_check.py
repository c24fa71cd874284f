# SPDX-License-Identifier: LGPL-2.1-or-later
"""Damaged qcow2 images made by QEMU: `drover check` and `qemu-img check` find the same, by numbers;
what Drover has repaired is clean for both, and reads as before."""
import json
import os
import shutil

import pytest

from tools import Drover, Qemu, run

pytestmark = pytest.mark.usefixtures('qemu')

KEYS = ['corruptions', 'leaks', 'check-errors', 'total-clusters', 'allocated-clusters',
        'fragmented-clusters', 'compressed-clusters', 'image-end-offset']
OFFSET, COPIED = 0x00fffffffffffe00, 1 << 63


class Image:
    """The tables of an image, to be poked."""

    def __init__(self, path):
        self.path = str(path)
        self.version = self.get(4, 4)
        self.cluster_bits = self.get(20, 4)
        self.cluster = 1 << self.cluster_bits
        self.l1, self.l1_entries = self.get(40), self.get(36, 4)
        self.roots, self.snapshots, self.n_snapshots = self.get(48), self.get(64), self.get(60, 4)
        self.order = self.get(96, 4) if self.version == 3 else 4
        self.extended = self.version == 3 and bool(self.get(72) & 16)
        self.data_file = self.version == 3 and bool(self.get(72) & 4)
        self.entry = 16 if self.extended else 8

    def get(self, at, length=8):
        with open(self.path, 'rb') as f:
            f.seek(at)
            return int.from_bytes(f.read(length), 'big')

    def put(self, at, value, length=8):
        with open(self.path, 'r+b') as f:
            f.seek(at)
            f.write((value & ((1 << 8 * length) - 1)).to_bytes(length, 'big'))

    @property
    def size(self):
        return os.path.getsize(self.path)

    @property
    def end(self):  # in whole clusters
        return -(-self.size // self.cluster) * self.cluster

    def link(self):
        """Where the first L1 entry that leads to a table stands."""
        return next(self.l1 + 8 * i for i in range(self.l1_entries) if self.get(self.l1 + 8 * i))

    def table(self):
        return self.get(self.link()) & OFFSET

    def entries(self, coded):
        """Where the entries that lead to a cluster, or to compressed bytes, stand."""
        for i in range(self.cluster // self.entry):
            at = self.table() + i * self.entry
            value = self.get(at)
            if value & OFFSET and bool(value >> 62 & 1) == coded:
                yield at

    def data(self, n=0):
        return list(self.entries(False))[n]

    def coded(self):
        return next(self.entries(True), None)

    def block(self, i=0):
        return self.get(self.roots + 8 * i) & ~511

    def count(self, host, value):
        bits = 1 << self.order
        block, i = divmod(host // self.cluster, self.cluster * 8 // bits)
        assert self.block(block)
        at = self.block(block) + i * bits // 8
        if bits >= 8:
            self.put(at, value, bits // 8)
        else:
            shift, mask = i % (8 // bits) * bits, (1 << bits) - 1
            self.put(at, self.get(at, 1) & ~(mask << shift) | value << shift, 1)

    def flip(self, at, bit):
        self.put(at, self.get(at) ^ bit)

    def move(self, at, by):
        self.put(at, self.get(at) + by)


# Each returns False where the image cannot have this damage.
def nothing(i):
    pass


def count_too_high(i):
    if i.order == 0:
        return False
    i.count(i.table(), 2)


def count_of_a_table_zero(i):
    i.count(i.table(), 0)


def count_of_data_zero(i):
    i.count(i.get(i.data()) & OFFSET, 0)


def unused_cluster_counted(i):
    end = i.end
    if not i.block(end // i.cluster // (i.cluster * 8 >> i.order)):
        return False
    os.truncate(i.path, end + i.cluster)
    i.count(end, 1)


def copied_clear_in_l2(i):
    i.put(i.data(1), i.get(i.data(1)) & ~COPIED)


def copied_set_everywhere(i):
    for at in list(i.entries(False)):
        i.put(at, i.get(at) | COPIED)


def copied_wrong_in_l1(i):
    i.flip(i.link(), COPIED)


def reserved_bit_in_l2(i):
    i.put(i.data(), i.get(i.data()) | 1 << 57)


def reserved_bit_in_l1(i):
    i.put(i.link(), i.get(i.link()) | 1 << 57)


def table_misaligned(i):
    i.move(i.link(), 512)


def data_misaligned(i):
    i.move(i.data(), 512)


def zero_misaligned(i):
    at = i.data()
    if i.version < 3:
        return False
    i.put(at, (i.get(at) + 512) | (0 if i.extended else 1))
    if i.extended:
        i.put(at + 8, 0xff << 32)


def compressed_and_copied(i):
    if not i.coded():
        return False
    i.flip(i.coded(), COPIED)


def compressed_behind_the_end(i):
    if not i.coded():
        return False
    i.move(i.coded(), 1 << 30)


def held_and_zero(i):
    if not i.extended:
        return False
    i.put(i.data() + 8, 1 << 32 | 1)


def held_nowhere(i):
    if not i.extended:
        return False
    at = i.data()
    i.put(at, 0)
    i.put(at + 8, 5)


def data_behind_the_end(i):
    if i.data_file:
        return False
    i.put(i.data(), COPIED | i.end + 7 * i.cluster)


def table_behind_the_end(i):
    i.put(i.link(), COPIED | i.end + 7 * i.cluster)


def two_entries_at_one_place(i):
    if i.data_file or i.order == 0:
        return False
    i.put(i.data(0), i.get(i.data(1)))


def data_in_its_own_table(i):
    if i.data_file or i.order == 0:
        return False
    i.put(i.data(), COPIED | i.table())


def data_in_the_counts(i):
    if i.data_file:
        return False
    i.put(i.data(), COPIED | i.block())


def reserved_bit_in_the_reftable(i):
    i.flip(i.roots, 1)


def counts_behind_the_end(i):
    i.put(i.roots, 1 << 35)


def no_counts(i):
    i.put(i.roots, 0)


def counts_all_zero(i):
    with open(i.path, 'r+b') as f:
        f.seek(i.block())
        f.write(bytes(i.cluster))


def one_block_for_two_ranges(i):
    i.put(i.roots + 8, i.get(i.roots))


def snapshot_table_misaligned(i):
    if not i.n_snapshots:
        return False
    i.move(i.snapshots, 8)


def snapshot_table_too_large(i):
    if not i.n_snapshots:
        return False
    i.put(i.snapshots + 8, 0x7fffffff, 4)


def snapshot_of_an_older_version(i):
    """As a version 2 image has it that became version 3."""
    if i.version < 3 or i.n_snapshots != 2:
        return False
    with open(i.path, 'r+b') as f:
        f.seek(i.snapshots)
        table = f.read(4096)
        id_len, name_len, extra = (int.from_bytes(table[a:b], 'big')
                                   for a, b in ((12, 14), (14, 16), (36, 40)))
        names = table[40 + extra:40 + extra + id_len + name_len]
        first = table[:36] + bytes(4) + names
        second = table[-(-(40 + extra + len(names)) // 8) * 8:]
        f.seek(i.snapshots)
        f.write((first + bytes(-len(first) % 8) + second)[:4096])


def marked_as_corrupt(i):
    if i.version < 3:
        return False
    i.put(72, i.get(72) | 2)


def dirty_with_counts_missing(i):
    if i.version < 3:
        return False
    i.put(72, i.get(72) | 1)
    i.count(i.get(i.data()) & OFFSET, 0)


# A repair has no answer to these.
LASTING = [reserved_bit_in_l2, reserved_bit_in_l1, table_misaligned, data_misaligned,
           compressed_behind_the_end, held_and_zero, held_nowhere, data_behind_the_end,
           table_behind_the_end, snapshot_table_misaligned, snapshot_table_too_large,
           data_in_its_own_table]
# Repaired, but what leaked may be the data that the entry should lead to.
KEEPING_LEAKS = [data_in_the_counts]
DAMAGES = [nothing, count_too_high, count_of_a_table_zero, count_of_data_zero,
           unused_cluster_counted, copied_clear_in_l2, copied_set_everywhere, copied_wrong_in_l1,
           zero_misaligned, compressed_and_copied, two_entries_at_one_place, data_in_the_counts, snapshot_of_an_older_version,
           reserved_bit_in_the_reftable, counts_behind_the_end, no_counts, counts_all_zero,
           one_block_for_two_ranges, marked_as_corrupt, dirty_with_counts_missing] + LASTING

# Options of create, and what else is in the image.
KINDS = {
    'plain': ('', ''),
    'version 2': ('compat=0.10', 'compressed snapshots'),
    'clusters of 512 bytes': ('cluster_size=512', 'compressed snapshots'),
    'sub-clusters': ('extended_l2=on', 'compressed snapshots'),
    'counts of 1 bit': ('refcount_bits=1', ''),
    'counts of 64 bits': ('refcount_bits=64', 'snapshots'),
    'bitmaps': ('cluster_size=4k', 'bitmaps'),
    'data file': ('data_file=DATA', ''),
}


def make(path, options, content):
    options = options.replace('DATA', str(path) + '.data')
    run('qemu-img', 'create', '-q', '-f', 'qcow2', *(['-o', options] if options else []), path,
        '3M')

    def write(*commands):
        run('qemu-io', '-f', 'qcow2', *sum((['-c', c] for c in commands), []), path)

    write('write -P 1 0 200k', 'write -P 2 1M 128k', 'write -z 1600k 128k', 'write -P 7 1700k 3k')
    if 'compressed' in content:
        write('write -c -P 5 256k 192k', 'write -c -P 6 2240k 64k')
    if 'snapshots' in content:
        run('qemu-img', 'snapshot', '-c', 'first', path)
        write('write -P 9 64k 64k')
        run('qemu-img', 'snapshot', '-c', 'second', path)
        write('write -P 10 1M 16k')
    if 'bitmaps' in content:
        run('qemu-img', 'bitmap', '--add', path, 'b1')
        run('qemu-img', 'bitmap', '--add', path, 'b2')
        write('write -P 11 100k 64k')


def check(tool, path, *options):
    done = run(*tool.img, 'check', '-f', 'qcow2', '--output=json', *options, path, ok=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    return done.returncode, {key: report.get(key, 0) for key in KEYS}, done.stderr


def guest_bytes(path):
    """None if not all can be read."""
    out = str(path) + '.raw'
    done = run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path, out, ok=False)
    if done.returncode:
        return None
    with open(out, 'rb') as f:
        return f.read()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.replace(' ', '-'))
def sound(request, tmp_path):
    path = tmp_path / 'sound.qcow2'
    make(path, *KINDS[request.param])
    return path


def damaged(sound, damage):
    path = sound.with_name('damaged.qcow2')
    shutil.copy(sound, path)
    return None if damage(Image(path)) is False else path


def test_both_find_the_same_and_what_drover_repairs_is_clean_for_both(sound):
    for damage in DAMAGES:
        path = damaged(sound, damage)
        if not path:
            continue
        theirs, ours = check(Qemu, path), check(Drover, path)
        assert ours[:2] == theirs[:2], f'{damage.__name__}:\n{theirs[2]}\n{ours[2]}'
        before = guest_bytes(path)
        repaired = run(*Drover.img, 'check', '-q', '-f', 'qcow2', '-r', 'all', path, ok=False)
        theirs, ours = check(Qemu, path), check(Drover, path)
        assert ours[:2] == theirs[:2], f'{damage.__name__}, repaired:\n{theirs[2]}\n{ours[2]}'
        assert repaired.returncode == ours[0]
        if damage not in LASTING:
            allowed = (0, 3) if damage in KEEPING_LEAKS else (0,)
            assert ours[0] in allowed, f'{damage.__name__}, repaired:\n{ours[2]}'
        assert before is None or guest_bytes(path) == before, damage.__name__


def bitmap_names(path):
    info = json.loads(run('qemu-img', 'info', '--output=json', path).stdout)
    return [b['name'] for b in info['format-specific']['data'].get('bitmaps', [])]


def find_extension(image, wanted):
    at = image.get(100, 4)
    while image.get(at, 4) != wanted:
        at += 8 + -(-image.get(at + 4, 4) // 8) * 8
    return at + 8


@pytest.mark.parametrize('damage, left', [
    (lambda i, directory, extension: i.put(directory + 16, 9, 1), ['b2']),
    (lambda i, directory, extension: i.put(directory, 1 << 40), ['b2']),
    (lambda i, directory, extension: i.put(directory + 18, 60000, 2), []),
    (lambda i, directory, extension: i.put(extension + 16, 1 << 40), []),
    (lambda i, directory, extension: i.put(extension + 16, 77), []),
    (lambda i, directory, extension: i.put(extension, 0, 4), []),
], ids=['type', 'table', 'length', 'directory', 'odd-directory', 'number'])
def test_a_repair_removes_bitmaps_that_cannot_be_right_and_keeps_the_others(tmp_path, damage,
                                                                            left):
    """QEMU opens no such image."""
    path = tmp_path / 'bitmaps.qcow2'
    make(path, '', 'bitmaps')
    before = guest_bytes(path)
    image = Image(path)
    extension = find_extension(image, 0x23852875)
    damage(image, image.get(extension + 16), extension)
    run(*Drover.img, 'check', '-r', 'all', path, ok=False)
    for tool in (Drover, Qemu):
        assert check(tool, path)[1]['corruptions'] == 0
    assert bitmap_names(path) == left
    assert guest_bytes(path) == before


def test_the_repair_of_an_image_that_qemu_left_dirty_is_reported(tmp_path):
    path = tmp_path / 'dirty.qcow2'
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on', path, '64M')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 5 0 3M', '-c', 'flush', '-c', 'sigraise 9', path,
        ok=False)
    assert Image(path).get(72) & 1
    code, found, _ = check(Drover, path)
    assert (code, found) == check(Qemu, path)[:2]
    assert code == 2 and found['corruptions'] > 40
    done = run(*Drover.img, 'check', '-r', 'all', path)
    assert f"{found['corruptions']} corruptions" in done.stdout
    assert not Image(path).get(72) & 1
    assert check(Qemu, path)[0] == 0


def test_an_image_that_qemu_left_dirty_is_recovered_when_it_is_written_to(tmp_path):
    path = tmp_path / 'dirty.qcow2'
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on', path, '64M')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 5 0 3M', '-c', 'flush', '-c', 'sigraise 9', path,
        ok=False)
    run(*Drover.io, '-f', 'qcow2', '-c', 'write -P 6 1M 64k', path)
    assert check(Qemu, path)[0] == 0
    expected = b'\5' * (1 << 20) + b'\6' * 65536 + b'\5' * ((2 << 20) - 65536)
    assert guest_bytes(path) == expected + bytes(61 << 20)
