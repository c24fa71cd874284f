# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks pass through NBD, to and from programs that know nothing of Drover."""
import os
import shutil
import signal

import pytest
import tools
from tools import Disk, Drover, MIB, create, rng, run

pytestmark = pytest.mark.skipif(not (shutil.which('nbdcopy') and shutil.which('qemu-nbd')),
                                reason='nbdcopy or qemu-nbd is not installed')
KINDS = ['monolithicSparse', 'twoGbMaxExtentSparse', 'monolithicFlat', 'twoGbMaxExtentFlat']


def served(path, fmt, *more):
    """A server for as long as the copy takes, as nbdcopy starts one."""
    return ['[', 'qemu-nbd', *more, '-f', fmt, path, ']']


def same(disk, path):
    with open(path, 'rb') as f:
        assert f.read() == bytes(disk.content)


@pytest.mark.parametrize('subformat', KINDS)
def test_a_served_disk_is_the_same(subformat, tmp_path):
    disk = Disk(tmp_path / 'disk.vmdk', 'vmdk', 5 * MIB + 3 * 512)
    create(Drover, disk.path, 'vmdk', disk.size, f'subformat={subformat}')
    disk.write(Drover, rng('nbd', subformat), 12)
    run('nbdcopy', '--', *served(disk.path, 'vmdk', '-r'), tmp_path / 'out.raw')
    same(disk, tmp_path / 'out.raw')


def test_a_served_chain_is_the_same(tmp_path):
    create(Drover, tmp_path / 'base.vmdk', 'vmdk', 4 * MIB)
    base = Disk(tmp_path / 'base.vmdk', 'vmdk', 4 * MIB)
    base.write(Drover, rng('nbd', 'base'), 12)
    run(tools.DROVER, 'snapshot', '-c', 'top.vmdk', base.path)
    top = Disk(tmp_path / 'top.vmdk', 'vmdk', 4 * MIB, base.content)
    top.write(Drover, rng('nbd', 'top'), 12)
    run('nbdcopy', '--', *served(top.path, 'vmdk', '-r'), tmp_path / 'out.raw')
    same(top, tmp_path / 'out.raw')


@pytest.mark.parametrize('subformat', KINDS)
def test_what_is_written_over_nbd_is_read(subformat, tmp_path):
    raw = Disk(tmp_path / 'disk.raw', 'raw', 4 * MIB)
    create(Drover, raw.path, 'raw', raw.size)
    raw.write(Drover, rng('nbd', 'in', subformat), 12)
    target = Disk(tmp_path / 'disk.vmdk', 'vmdk', raw.size, raw.content)
    create(Drover, target.path, 'vmdk', target.size, f'subformat={subformat}')
    run('nbdcopy', '--flush', '--', raw.path, *served(target.path, 'vmdk'))
    target.verify(tmp_path)
    target.write(Drover, rng('nbd', 'more', subformat), 6)
    target.verify(tmp_path)


@pytest.mark.skipif(not shutil.which('nbdkit'), reason='nbdkit is not installed')
def test_a_raw_disk_from_nbdkit(tmp_path):
    raw = Disk(tmp_path / 'disk.raw', 'raw', 2 * MIB + 512)
    create(Drover, raw.path, 'raw', raw.size)
    raw.write(Drover, rng('nbdkit'), 12)
    run('nbdcopy', '--', '[', 'nbdkit', '--exit-with-parent', '-r', 'file', raw.path, ']',
        tmp_path / 'copy.raw')
    copy = Disk(tmp_path / 'copy.raw', 'raw', raw.size, raw.content)
    copy.verify(tmp_path)


def test_a_served_disk_is_not_written_to(tmp_path):
    """qemu-nbd's locks and Drover's are the same ones."""
    create(Drover, tmp_path / 'disk.vmdk', 'vmdk', 2 * MIB)
    run('qemu-nbd', '--fork', '--pid-file', tmp_path / 'pid', '-k', tmp_path / 'socket',
        '-f', 'vmdk', tmp_path / 'disk.vmdk')
    try:
        done = run(tools.DROVER, 'io', '-c', 'write 0 4k', tmp_path / 'disk.vmdk', ok=False)
        assert done.returncode == 1 and 'lock' in done.stderr
        run(tools.DROVER, 'info', '-U', tmp_path / 'disk.vmdk')
    finally:
        os.kill(int((tmp_path / 'pid').read_text(encoding='ascii')), signal.SIGTERM)
