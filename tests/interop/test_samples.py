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


@pytest.mark.parametrize('name', ['streamOptimized.vmdk', 'iotest-version3.vmdk'])
def test_what_is_not_supported_is_refused_not_misread(name, tmp_path):
    path = sample(name, tmp_path)
    if run(DROVER, 'info', path, ok=False).returncode != 0:
        refused(path)
    elif name == 'streamOptimized.vmdk':
        assert sha1_of_disk(path, tmp_path) == SHA1
