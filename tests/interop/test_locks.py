# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever has an image open, Drover and QEMU's tools keep each other out as QEMU's do among
themselves."""
import contextlib
import subprocess

import pytest
from tools import DROVER, MIB, TOOLS, Drover, Qemu, create, run

pytestmark = pytest.mark.usefixtures('qemu')

FORMATS = ['raw', 'vmdk']


@contextlib.contextmanager
def holding(tool, path, fmt, writable):
    """The tool has the image open until the block ends."""
    argv = tool.io + ['-f', fmt] + ([] if writable else ['-r']) + [path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True) as held:
        held.stdin.write('read 0 512\n')  # its answer says that the image is open
        held.stdin.flush()
        line = held.stdout.readline()
        assert 'read 512/512' in line, line + held.stderr.read()
        try:
            yield
        finally:
            held.stdin.close()
            held.wait()


@pytest.fixture(params=FORMATS)
def image(request, tmp_path):
    path = str(tmp_path / f'disk.{request.param}')
    create(Drover, path, request.param, MIB)
    return path, request.param


PAIRS = pytest.mark.parametrize('first,second', [(Drover, Qemu), (Qemu, Drover),
                                                 (Drover, Drover)],
                                ids=['drover-qemu', 'qemu-drover', 'drover-drover'])


@PAIRS
def test_a_writer_keeps_writers_out(first, second, image):
    path, fmt = image
    with holding(first, path, fmt, True):
        done = run(*second.io, '-f', fmt, '-c', 'write 0 512', path, ok=False)
        assert done.returncode != 0
        assert 'Failed to get' in done.stderr + done.stdout
    run(*second.io, '-f', fmt, '-c', 'write 0 512', path)


@PAIRS
def test_a_writer_keeps_readers_out(first, second, image):
    path, fmt = image
    with holding(first, path, fmt, True):
        done = run(*second.img, 'compare', '-f', fmt, '-F', fmt, path, path, ok=False)
        if fmt == 'raw' and second is Qemu:  # its raw reader minds no writer
            assert done.returncode == 0
            return
        assert done.returncode > 1
        assert 'Failed to get' in done.stderr


@PAIRS
def test_readers_share(first, second, image):
    path, fmt = image
    with holding(first, path, fmt, False):
        run(*second.img, 'info', path)
        run(*second.io, '-r', '-f', fmt, '-c', 'read 0 512', path)


@PAIRS
def test_a_reader_keeps_writers_out(first, second, image):
    path, fmt = image
    with holding(first, path, fmt, False):
        done = run(*second.io, '-f', fmt, '-c', 'write 0 512', path, ok=False)
        if fmt == 'raw' and first is Qemu:  # its raw reader minds no writer
            assert done.returncode == 0
        else:
            assert done.returncode != 0


@PAIRS
def test_force_share_reads_beside_a_writer(first, second, image):
    path, fmt = image
    with holding(first, path, fmt, True):
        run(*second.img, 'info', '-U', path)
        run(*second.io, '-r', '-U', '-f', fmt, '-c', 'read 0 512', path)


@pytest.mark.parametrize('user', TOOLS, ids=lambda t: t.name)
def test_nobody_writes_to_a_parent_in_use(user, tmp_path):
    create(Drover, tmp_path / 'base.vmdk', 'vmdk', MIB)
    create(Drover, tmp_path / 'top.vmdk', 'vmdk', MIB, backing='base.vmdk')
    writer = Qemu if user is Drover else Drover
    with holding(user, str(tmp_path / 'top.vmdk'), 'vmdk', True):
        done = run(*writer.io, '-f', 'vmdk', '-c', 'write 0 512', tmp_path / 'base.vmdk', ok=False)
        assert done.returncode != 0


@pytest.mark.parametrize('subformat', ['twoGbMaxExtentSparse', 'monolithicFlat'])
def test_extents_are_locked_too(subformat, tmp_path):
    create(Drover, tmp_path / 'd.vmdk', 'vmdk', MIB, f'subformat={subformat}')
    extent = next(p for p in tmp_path.iterdir() if p.name.startswith('d-'))
    with holding(Drover, str(tmp_path / 'd.vmdk'), 'vmdk', True):
        done = run('qemu-io', '-f', 'raw', '-c', 'write 0 512', extent, ok=False)
        assert done.returncode != 0


def test_a_chain_operation_waits_for_nobody(tmp_path):
    create(Drover, tmp_path / 'base.vmdk', 'vmdk', MIB)
    create(Drover, tmp_path / 'top.vmdk', 'vmdk', MIB, backing='base.vmdk')
    with holding(Qemu, str(tmp_path / 'top.vmdk'), 'vmdk', True):
        for argv in (['rebase', '-b', '', tmp_path / 'top.vmdk'], ['commit', tmp_path / 'top.vmdk'],
                     ['stream', tmp_path / 'top.vmdk']):
            done = run(DROVER, *argv, ok=False)
            assert done.returncode != 0
            assert 'Failed to get' in done.stderr
