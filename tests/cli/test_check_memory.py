# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory that a check takes has a bound, whatever the image."""
import os
import struct

import pytest

from peak import peak

DROVER = os.environ.get('DROVER', 'drover')
CLUSTER = 65536
TIB = 1 << 40
MIB = 1 << 20


def make(path, size):
    """A file of that size, nearly all of it a hole. Two clusters of data lie in each GiB, so that all of the file has to
    be counted; each refcount block stands at the beginning of the 2 GiB that it counts."""
    copied = 1 << 63
    counted = CLUSTER // 2 * CLUSTER  # by one block
    blocks, per_table = size // counted, CLUSTER // 8
    data = [block * counted + i * counted // 4 + 16 * CLUSTER for block in range(blocks) for i in range(4)]
    tables = -(-len(data) // per_table)
    roots = -(-blocks * 8 // CLUSTER)
    at = {'roots': 1, 'l1': 1 + roots, 'l2': 2 + roots}  # in clusters: in front of the first data; 0 is the header,
    first = at['l2'] + tables  # and here, not at 0, the first block
    assert first < 16
    with open(path, 'wb') as f:
        f.truncate(size)

        def put(offset, form, *values):
            f.seek(offset)
            f.write(struct.pack(form, *values))
        put(0, '>4sIQIIQIIQQIIQ3QII', b'QFI\xfb', 3, 0, 0, 16, len(data) * CLUSTER, 0, tables, at['l1'] * CLUSTER,
            at['roots'] * CLUSTER, roots, 0, 0, 0, 0, 0, 4, 104)
        places = [first * CLUSTER] + [block * counted for block in range(1, blocks)]
        put(at['roots'] * CLUSTER, f'>{blocks}Q', *places)
        put(at['l1'] * CLUSTER, f'>{tables}Q', *((at['l2'] + i) * CLUSTER | copied for i in range(tables)))
        put(at['l2'] * CLUSTER, f'>{len(data)}Q', *(place | copied for place in data))
        put(places[0], f'>{first + 1}H', *[1] * (first + 1))
        for block in range(blocks):
            if block:
                put(places[block], '>H', 1)
            for i in range(4):
                put(places[block] + 2 * (i * counted // 4 // CLUSTER + 16), '>H', 1)


def test_a_check_of_16_tib_takes_less_than_64_mib(tmp_path):
    disk = tmp_path / 'disk.qcow2'
    try:
        make(disk, 16 * TIB - 4096 * MIB)  # ext4 has no larger files
    except OSError as e:
        pytest.skip(f'no file of 16 TiB here: {e}')
    text, most = peak(DROVER, 'check', disk)
    assert 'No errors were found' in text
    assert most < 64 * MIB
