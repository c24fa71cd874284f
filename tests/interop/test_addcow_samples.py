# SPDX-License-Identifier: LGPL-2.1-or-later
"""add-cow images of the format author's own qemu-img, where DROVER_SAMPLES names a directory that has them."""
import hashlib
import os
import shutil

import pytest
from tools import DROVER, SAMPLES, run

WHERE = os.path.join(SAMPLES, 'add-cow')


def expected():
    try:
        with open(os.path.join(WHERE, 'EXPECTED.md5'), encoding='ascii') as f:
            return [line.split() for line in f]
    except FileNotFoundError:
        return []


def copied(name, tmp_path):
    if not name:
        pytest.skip('no add-cow/EXPECTED.md5 in DROVER_SAMPLES')
    shutil.copytree(os.path.join(WHERE, os.path.dirname(name)), str(tmp_path / 'd'))
    return str(tmp_path / 'd' / os.path.basename(name))


@pytest.mark.parametrize('md5,size,name', [e for e in expected() if e[0] != '-'] or [('', '0', '')])
def test_the_content_is_right(md5, size, name, tmp_path):
    path = copied(name, tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / 'd').iterdir()}
    run(DROVER, 'convert', '-O', 'raw', path, tmp_path / 'plain')
    out = (tmp_path / 'plain').read_bytes()
    assert (len(out), hashlib.md5(out).hexdigest()) == (int(size), md5)
    run(DROVER, 'check', path)
    run(DROVER, 'convert', '-O', 'add-cow', path, tmp_path / 'out.add-cow')
    run(DROVER, 'compare', path, tmp_path / 'out.add-cow')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'd').iterdir()} == before


@pytest.mark.parametrize('name', [e[2] for e in expected() if e[0] == '-'] or [''])
def test_an_unknown_feature_is_refused(name, tmp_path):
    r = run(DROVER, 'info', copied(name, tmp_path), ok=False)
    assert r.returncode == 1 and 'unknown features 0x1' in r.stderr


@pytest.mark.parametrize('name', [e[2] for e in expected() if '02-' in e[2]] or [''])
def test_a_child_over_it_leaves_it_alone(name, tmp_path):
    path = copied(name, tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / 'd').iterdir()}
    child = str(tmp_path / 'd' / 'child.add-cow')
    run(DROVER, 'create', '-f', 'add-cow', '-b', path, '-F', 'add-cow', child)
    run(DROVER, 'io', '-c', 'write -P 1 1000 70000', child)
    r = run(DROVER, 'commit', child, ok=False)
    assert r.returncode == 1 and 'can only be read' in r.stderr
    assert {n: (tmp_path / 'd' / n).read_bytes() for n in before} == before
