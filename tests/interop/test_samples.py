# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images made by other programs, where DROVER_SAMPLES names a directory that has them."""
import hashlib
import os
import resource
import shutil

import pytest
from tools import DROVER, SAMPLES, run

SHA1 = 'dd2fade471d68658b2ebbff7474f5d0a99da8989'


def sample(name, tmp_path):
    where = os.path.join(SAMPLES, 'vmdk')
    if not os.path.exists(os.path.join(where, name)):
        pytest.skip(f'no {name} in DROVER_SAMPLES/vmdk')
    stem = name.rsplit('.', 1)[0]
    for other in os.listdir(where):  # its extents too
        if other.startswith(stem):
            shutil.copy(os.path.join(where, other), str(tmp_path))
    return str(tmp_path / name)


def sha1_of_disk(path, tmp_path):
    run(DROVER, 'convert', '-O', 'raw', path, tmp_path / 'raw')
    with open(tmp_path / 'raw', 'rb') as f:
        return hashlib.sha1(f.read()).hexdigest()


@pytest.mark.parametrize('name', ['monolithicSparse.vmdk', 'twoGbMaxExtentSparse.vmdk'])
def test_the_content_is_right(name, tmp_path):
    path = sample(name, tmp_path)
    assert sha1_of_disk(path, tmp_path) == SHA1
    assert run(DROVER, 'check', path, ok=False).returncode in (0, 3)


@pytest.mark.parametrize('name', ['monolithicSparse.vmdk', 'twoGbMaxExtentSparse.vmdk'])
def test_a_child_over_it_leaves_it_alone(name, tmp_path):
    path = sample(name, tmp_path)
    run(DROVER, 'create', '-f', 'vmdk', '-b', name, '-F', 'vmdk', tmp_path / 'child.vmdk')
    run(DROVER, 'io', '-c', 'write -P 7 1M 1M', tmp_path / 'child.vmdk')
    assert sha1_of_disk(path, tmp_path) == SHA1
    run(DROVER, 'rebase', '-b', '', tmp_path / 'child.vmdk')
    run(DROVER, 'io', '-r', '-c', 'read -P 7 1M 1M', tmp_path / 'child.vmdk')


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))


def refused(path, **kw):
    done = run(DROVER, 'info', path, ok=False, **kw)
    assert done.returncode == 1, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and os.path.basename(path) in lines[0], done.stderr
    return lines[0]


def test_a_hostile_header_is_refused_without_a_large_allocation(tmp_path):
    refused(sample('afl9.vmdk', tmp_path), preexec_fn=limit_memory)


def test_missing_extents_are_named(tmp_path):
    text = refused(sample('ms3-win.vmdk', tmp_path))
    assert '-s001.vmdk' in text or 's001' in text, text


def test_a_stream_of_vddk_reads_right(tmp_path):
    path = sample('streamOptimized.vmdk', tmp_path)
    assert sha1_of_disk(path, tmp_path) == SHA1
    run(DROVER, 'check', path)


def test_a_stream_of_ovftool_reads_as_qemu_reads_it(tmp_path):
    path = sample('iotest-version3.vmdk', tmp_path)
    run(DROVER, 'convert', '-O', 'qcow2', path, tmp_path / 'ours.qcow2')
    run('qemu-img', 'compare', path, tmp_path / 'ours.qcow2')
    run(DROVER, 'check', path)


def test_a_stream_that_was_cut_off_is_salvaged_and_its_loss_told(tmp_path):
    path = sample('iotest-version3.vmdk', tmp_path)
    whole = os.path.getsize(path)
    os.truncate(path, whole // 2)
    text = refused(path)
    assert 'File truncated, expecting at least' in text and f'{16 << 30} bytes (virtual size)' in text
    got = run(DROVER, 'convert', '--salvage', '-O', 'raw', path, tmp_path / 'part.raw', ok=False)
    assert got.returncode == 3 and str(16 << 30) in got.stderr, got
