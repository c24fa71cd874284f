# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of the real program while it compacts a qcow2 image with a snapshot and a bitmap inside: both views show what they
did, the bitmap is trusted, qemu-img finds nothing that its -r leaks does not mend, the file is never longer, and the same
command finishes it. The same of a disk of ESX's, whose tables move."""
import json
import os

from qcow2kill import DROVER, MIB, NEEDS_QEMU, each_kill, leaks_at_most, run, show

pytestmark = NEEDS_QEMU


def make(directory):
    os.mkdir(directory)
    run(directory, DROVER, 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', 'disk.qcow2', 2 * MIB)
    run(directory, DROVER, 'io', '-c', 'write -P 1 0 64k', 'disk.qcow2')
    run(directory, DROVER, 'snapshot', '-i', '-c', 'one', 'disk.qcow2')
    run(directory, DROVER, 'bitmap', '--add', 'disk.qcow2', 'changes')
    run(directory, DROVER, 'io', '-c', 'write -P 2 32k 500k', '-c', 'write -P 3 1M 100k', '-c', 'write -P 0 1200k 100k',
        'disk.qcow2')
    run(directory, DROVER, 'io', '-c', 'discard 64k 300k', 'disk.qcow2')


def length(directory):
    return os.path.getsize(os.path.join(directory, 'disk.qcow2'))


def bitmaps(directory):
    told = json.loads(run(directory, 'qemu-img', 'info', '-U', '--output=json', 'disk.qcow2').stdout)
    return told['format-specific']['data']['bitmaps']


def test_a_kill_leaves_every_view_and_the_command_finishes(tmp_path):
    argv, made = [DROVER, 'compact', '-q', 'disk.qcow2'], str(tmp_path / 'made')
    make(made)
    views = {s: show(made, s) for s in (None, 'one')}
    before, noted = length(made), bitmaps(made)
    for directory in each_kill(tmp_path, argv, tear=True):
        done = length(tmp_path / 'counted')
        assert done < before and length(directory) <= before
        assert bitmaps(directory) == noted
        run(directory, *argv)
        assert length(directory) <= done
        for s, view in views.items():
            assert show(directory, s) == view
        leaks_at_most(directory)


def test_a_kill_leaves_an_esx_disk_as_it_was_and_the_command_finishes(tmp_path):
    argv, made = [DROVER, 'compact', '-q', '--no-zeros', 'disk.vmdk'], str(tmp_path / 'made')
    os.mkdir(made)
    run(made, DROVER, 'create', '-q', '-f', 'vmdk', '-o', 'subformat=vmfsSparse', 'disk.vmdk', 6 * MIB)
    run(made, DROVER, 'io', '-c', 'write -P 1 0 60k', '-c', 'write -P 2 2M 20k', '-c', 'write -P 3 4M 8k', 'disk.vmdk')
    run(made, DROVER, 'io', '-c', 'discard 4k 56k', 'disk.vmdk')
    view = show(made, name='disk.vmdk')
    for directory in each_kill(tmp_path, argv, tear=True):
        done = os.path.getsize(tmp_path / 'counted' / 'disk-delta.vmdk')
        assert done == 512 * (5 + 3 * 32 + 8 + 40 + 16)
        assert show(directory, name='disk.vmdk') == view
        run(directory, *argv)
        assert os.path.getsize(os.path.join(directory, 'disk-delta.vmdk')) == done
        assert show(directory, name='disk.vmdk') == view
        run(directory, DROVER, 'check', '-q', 'disk.vmdk')
