# SPDX-License-Identifier: LGPL-2.1-or-later
"""qemu-img bench: the same words, and the requests that were asked for."""
import re

import pytest

from test_qemu_img import same

WRONG = [
    [], ['-c', 'x', 'a.raw'], ['-c', '-1', 'a.raw'], ['-s', '3G', 'a.raw'], ['-S', '3G', 'a.raw'], ['-o', 'x', 'a.raw'],
    ['-s', 'x', 'a.raw'], ['--pattern', '300', 'a.raw'], ['-i', 'foo', 'a.raw'], ['-t', 'foo', 'a.raw'],
    ['-d', 'x', 'a.raw'], ['--flush-interval', '2', 'a.raw'], ['-w', '--flush-interval', '2', 'a.raw'],
    ['--flush-interval', 'x', '-w', 'a.raw'], ['-w', '-U', 'a.raw'], ['a.raw', 'b.raw'], ['-c', '3', 'nope.raw'],
    ['-c', '10', '-o', '2M', 'a.raw'], ['-c', '2', '-s', '2M', 'a.raw'],
]
RIGHT = [
    ['-c', '10'], ['-c', '0'], ['-q', '-c', '3'], ['-c', '10', '-s', '8k', '-S', '16k', '-o', '64k'], ['-c', '3', '-s', '1000'],
    ['-c', '10', '-w'], ['-c', '10', '-w', '-d', '2', '--flush-interval', '2'], ['-c', '3', '-i', 'native', '-t', 'none'],
    ['-c', '10', '-w', '-d', '2', '--flush-interval', '4', '--no-drain'],
]


@pytest.mark.parametrize('args', WRONG, ids=' '.join)
def test_what_is_wrong_is_told_in_the_known_words(t, args):
    t.ok('create', '-q', 'a.raw', '1M')
    args = ['-f', 'raw', *args] if args else args
    same(t.ours('qemu-img', 'bench', *args), t.real('qemu-img', 'bench', *args))


@pytest.mark.parametrize('args', RIGHT, ids=' '.join)
def test_the_words_are_those_of_qemu_img(t, args):
    t.ok('create', '-q', 'a.raw', '1M')
    ours, real = (f('qemu-img', 'bench', '-f', 'raw', *args, 'a.raw') for f in (t.ours, t.real))
    assert ours.code == real.code == 0 and ours.err == real.err == ''
    time = re.compile(r'in [0-9]+\.[0-9]{3} seconds')
    assert time.search(ours.out) and time.sub('', ours.out) == time.sub('', real.out)


@pytest.mark.parametrize('depth', ['1', '16'])
def test_writes_go_where_they_were_asked_to(t, depth):
    for fmt in ('raw', 'vmdk', 'qcow2'):
        disk = f'{fmt}.disk'
        t.ok('create', '-q', '-f', fmt, disk, '1M')
        t.ok('bench', '-w', '--pattern', '0x41', '-c', '4', '-s', '8k', '-S', '32k', '-o', '64k', '-d', depth, disk)
        t.ok('convert', '-O', 'raw', disk, 'all')
        want = bytearray(1 << 20)
        for at in range(64 << 10, 192 << 10, 32 << 10):
            want[at:at + (8 << 10)] = b'A' * (8 << 10)
        assert (t.dir / 'all').read_bytes() == want


def test_at_the_end_of_the_disk_the_requests_begin_again(t):
    t.ok('create', '-q', 'a.raw', '64k')
    t.ok('bench', '-w', '--pattern', '1', '-c', '50', '-s', '4k', '-S', '12k', '-o', '48k', 'a.raw')
    data = (t.dir / 'a.raw').read_bytes()
    assert len(data) == 64 << 10 and data[48 << 10:52 << 10] == b'\1' * 4096 and data[12 << 10:16 << 10] == b'\1' * 4096
