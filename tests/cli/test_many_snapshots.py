# SPDX-License-Identifier: LGPL-2.1-or-later
"""As many snapshots inside a qcow2 image as QEMU allows: they are looked at one after another, in bounded memory."""
import os
import struct
import subprocess

import pytest

from peak import peak

DROVER = os.environ.get('DROVER', 'drover')
MOST = 65536
MIB = 1 << 20


def make(path, n, cluster, tables):
    """An overlay of base.raw with n snapshots, which have nothing but `tables` empty L2 tables, each shared by as many
    of them as the others; 0: they have none."""
    entry = struct.calcsize('>QIHHIIQII3Q') + 8
    table_clusters = -(-n * entry // cluster)
    used = 0

    def take(clusters):
        nonlocal used
        used += clusters
        return used - clusters
    take(1)
    l1, snapshots, l1s, l2s = take(1), take(table_clusters), take(n), take(tables)
    blocks = -(-(used + used // 200 + 64) // (cluster // 2))
    roots = -(-blocks * 8 // cluster)
    roots_at, blocks_at = take(roots), take(blocks)
    counts = [1] * used + [0] * (blocks * cluster // 2 - used)
    with open(path, 'wb') as f:
        f.truncate(used * cluster)
        name = b'base.raw'
        f.write(struct.pack('>4sIQIIQIIQQIIQ3QII', b'QFI\xfb', 3, 256, len(name), cluster.bit_length() - 1, 8 * cluster, 0, 1, l1 * cluster,
                            roots_at * cluster, roots, n, snapshots * cluster, 0, 0, 0, 4, 104))
        f.write(struct.pack('>II8sQ', 0xe2792aca, 3, b'raw', 0))
        f.seek(256)
        f.write(name)
        f.seek(snapshots * cluster)
        f.write(b''.join(struct.pack('>QIHHIIQII3Q', (l1s + i) * cluster, 1, 5, 1, 0, 0, 0, 0, 24, 0, 8 * cluster,
                                     2**64 - 1) + b'%05ds' % i + bytes(2) for i in range(n)))
        for i in range(n if tables else 0):
            table = l2s + i % tables
            f.seek((l1s + i) * cluster)
            f.write(struct.pack('>Q', table * cluster))
            counts[table] = n // tables
        f.seek(roots_at * cluster)
        f.write(struct.pack(f'>{blocks}Q', *((blocks_at + i) * cluster for i in range(blocks))))
        f.seek(blocks_at * cluster)
        f.write(struct.pack(f'>{len(counts)}H', *counts))


@pytest.mark.parametrize('n,cluster,tables,compress', [
    (MOST, 512, 0, []), (MOST, 512, 1024, ['-c']), (MOST, 512, MOST, []), (MOST // 4, 4096, MOST // 4, [])])
def test_a_rebase_keeps_what_each_shows_in_bounded_memory(n, cluster, tables, compress, tmp_path):
    content = (b'drover' * 100).ljust(8 * cluster, b'\0')
    (tmp_path / 'base.raw').write_bytes(content)
    disk = tmp_path / 'disk.qcow2'
    make(disk, n, cluster, tables)
    _, most = peak(DROVER, 'rebase', *compress, '-b', '', disk, DROVER_CACHE_METADATA='16M')
    assert most < 96 * MIB
    subprocess.run([DROVER, 'check', '-q', disk], check=True)
    for snapshot in (0, n // 2, n - 1):
        out = tmp_path / 'out.raw'
        subprocess.run([DROVER, 'convert', '-q', '-l', f'snapshot.id={snapshot:05}', '-O', 'raw', disk, out], check=True)
        assert out.read_bytes() == content
