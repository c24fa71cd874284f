# SPDX-License-Identifier: LGPL-2.1-or-later
"""What other tools get wrong about chain operations, one test each; the numbers are those of our own
list of findings."""
import hashlib
import json
import os
import resource
import shutil

import crashlib
import pytest
import replay
from crashlib import DROVER, MIB, drover, run, write


def chain(tmp_path):
    """old and new, full of 1 and of 2; top over old, empty: whoever loses its copies shows 2 or 0."""
    where = tmp_path / 'chain'
    where.mkdir()
    for name, pattern in (('old', 1), ('new', 2)):
        drover('create', '-q', '-f', 'vmdk', where / f'{name}.vmdk', 2 * MIB)
        write(where / f'{name}.vmdk', 'vmdk', [(pattern, 0, 2 * MIB)])
    drover('create', '-q', '-f', 'vmdk', '-b', 'old.vmdk', '-F', 'vmdk', where / 'top.vmdk')
    expected = tmp_path / 'expected.raw'
    expected.write_bytes(b'\1' * (2 * MIB))
    return where, expected


def parent(path):
    return json.loads(drover('info', '-U', '--output=json', path).stdout).get('backing-filename')


def kill_everywhere(where, tmp_path, argv):
    """The directory as each kill leaves it."""
    for n in range(1, 1000):
        killed = tmp_path / 'killed'
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(where, killed)
        env = replay.environment(str(killed), DROVER_KILL_AT=n)
        done = run(*[a.replace('{d}', str(killed)) for a in argv], ok=False, env=env)
        if done.returncode == 0:
            return
        assert done.returncode == -9, done.stderr
        yield killed
    pytest.fail('it does not end')


@pytest.mark.parametrize('argv,to', [
    (['rebase', '-b', 'new.vmdk', '-F', 'vmdk', '{d}/top.vmdk'], 'new.vmdk'),
    (['rebase', '-b', '', '{d}/top.vmdk'], None)], ids=['rebase', 'flatten'])
def test_f1_a_kill_right_after_the_switch_of_a_rebase_loses_nothing(argv, to, tmp_path):
    where, expected = chain(tmp_path)
    switched = 0
    for killed in kill_everywhere(where, tmp_path, [DROVER] + argv):
        assert crashlib.differs(str(expected), str(killed), 'top.vmdk') is None
        switched += parent(killed / 'top.vmdk') == to
    assert switched > 0, 'no kill came after the switch'


def test_f2_a_kill_right_after_the_switch_of_a_stream_loses_nothing(tmp_path):
    where, expected = chain(tmp_path)
    switched = 0
    for killed in kill_everywhere(where, tmp_path, [DROVER, 'stream', '{d}/top.vmdk']):
        assert crashlib.differs(str(expected), str(killed), 'top.vmdk') is None
        switched += parent(killed / 'top.vmdk') is None
    assert switched > 0, 'no kill came after the switch'


@pytest.mark.skipif(not crashlib.HAVE_QEMU, reason='qemu-img is not installed')
def test_the_kills_find_what_qemu_img_loses(tmp_path):
    """The two tests above can fail: qemu-img's own rebase of a qcow2 does not pass them."""
    where = tmp_path / 'chain'
    where.mkdir()
    expected = tmp_path / 'expected.raw'
    expected.write_bytes(b'\1' * (2 * MIB))
    (where / 'old.raw').write_bytes(b'\1' * (2 * MIB))
    (where / 'new.raw').write_bytes(b'\2' * (2 * MIB))
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'old.raw', '-F', 'raw',
        where / 'top.qcow2')
    argv = ['qemu-img', 'rebase', '-f', 'qcow2', '-b', 'new.raw', '-F', 'raw', '{d}/top.qcow2']
    lost = sum(crashlib.differs(str(expected), str(killed), 'top.qcow2', 'qemu-img') is not None
               for killed in kill_everywhere(where, tmp_path, argv))
    assert lost > 0


def test_f3_a_shorter_intermediate_image_hides_what_lies_deeper(tmp_path):
    drover('create', '-q', '-f', 'vmdk', tmp_path / 'base.vmdk', 4 * MIB)
    write(tmp_path / 'base.vmdk', 'vmdk', [(0x11, 0, 4 * MIB)])
    for name, size, below in (('mid', MIB, 'base'), ('top', 4 * MIB, 'mid')):
        drover('create', '-q', '-f', 'vmdk', '-b', f'{below}.vmdk', '-F', 'vmdk',
               tmp_path / f'{name}.vmdk', size)
    expected = tmp_path / 'expected.raw'
    expected.write_bytes(b'\x11' * MIB + bytes(3 * MIB))
    assert crashlib.differs(str(expected), str(tmp_path), 'top.vmdk') is None
    drover('stream', '--base', 'base.vmdk', tmp_path / 'top.vmdk')
    assert parent(tmp_path / 'top.vmdk') == 'base.vmdk'
    assert crashlib.differs(str(expected), str(tmp_path), 'top.vmdk') is None


def test_f5_what_equals_the_new_parent_is_given_up_when_asked(tmp_path):
    where, _ = chain(tmp_path)
    top = where / 'top.vmdk'
    write(top, 'vmdk', [(2, 0, 2 * MIB)])
    before = os.stat(top).st_blocks
    drover('rebase', '--drop-equal', '-b', 'new.vmdk', '-F', 'vmdk', top)
    assert os.stat(top).st_blocks < before - MIB // 512
    drover('io', '-r', '-c', f'read -P 2 0 {2 * MIB}', top)


def test_f6_holes_cost_nothing(tmp_path):
    for name in ('a', 'b'):
        drover('create', '-q', '-f', 'vmdk', tmp_path / f'{name}.vmdk', '100G')
    drover('create', '-q', '-f', 'vmdk', '-b', 'a.vmdk', '-F', 'vmdk', tmp_path / 'top.vmdk')

    def used():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    drover('rebase', '-b', 'b.vmdk', '-F', 'vmdk', tmp_path / 'top.vmdk')
    drover('rebase', '-b', '', tmp_path / 'top.vmdk')
    drover('compare', tmp_path / 'a.vmdk', tmp_path / 'b.vmdk')
    drover('map', tmp_path / 'top.vmdk')
    # Reading it all takes seconds; sanitizers and slow machines get their share too.
    assert used() - before < 2.0


def digest(directory):
    sums = {}
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), 'rb') as f:
            sums[name] = hashlib.sha1(f.read()).hexdigest()
    return sums


def refused(directory, *argv):
    """One line, no change to any file."""
    before = digest(directory)
    done = drover(*argv, ok=False, cwd=directory)
    assert done.returncode == 1, done
    assert done.stderr.strip(), 'no word about why'
    assert digest(directory) == before, 'something has changed'
    return done.stderr


@pytest.mark.parametrize('subformat', ['monolithicSparse', 'twoGbMaxExtentSparse'])
def test_f7_what_cannot_work_is_refused_before_any_copying(subformat, tmp_path):
    where, _ = chain(tmp_path)
    deep = 'x' * 200 + '/'
    drover('create', '-q', '-f', 'vmdk', '-b', 'old.vmdk', '-F', 'vmdk', '-o',
           f'subformat={subformat}', where / 'child.vmdk')
    refused(where, 'rebase', '-b', './' * 8000 + 'new.vmdk', '-F', 'vmdk', 'child.vmdk')
    refused(where, 'rebase', '-b', deep + 'new.vmdk', '-F', 'vmdk', 'child.vmdk')
    refused(where, 'rebase', '-b', 'new.vmdk', '-F', 'vmdk', '-f', 'raw', 'child.vmdk')
    for parent_name in ('old.vmdk', 'new.vmdk'):  # the one it has, too
        refused(where, 'rebase', '-b', parent_name, '-F', 'raw', 'child.vmdk')


@pytest.mark.parametrize('name', ['missing.vmdk', 'top.vmdk', 'child.vmdk', 'junk.vmdk'])
def test_f8_an_unsafe_rebase_refuses_what_cannot_be_a_parent(name, tmp_path):
    where, _ = chain(tmp_path)
    drover('create', '-q', '-f', 'vmdk', '-b', 'top.vmdk', '-F', 'vmdk', where / 'child.vmdk')
    (where / 'junk.vmdk').write_bytes(b'no image' * 1000)
    refused(where, 'rebase', '-u', '-b', name, '-F', 'vmdk', 'top.vmdk')


def test_f10_a_commit_that_would_spoil_siblings_is_refused(tmp_path):
    where, expected = chain(tmp_path)
    drover('create', '-q', '-f', 'vmdk', '-b', 'old.vmdk', '-F', 'vmdk', where / 'sibling.vmdk')
    write(where / 'top.vmdk', 'vmdk', [(7, 0, 65536)])
    text = refused(where, 'commit', 'top.vmdk')
    assert 'sibling.vmdk' in text
    assert crashlib.differs(str(expected), str(where), 'sibling.vmdk') is None
    drover('commit', '--force', where / 'top.vmdk')
    drover('io', '-r', '-c', 'read -P 7 0 65536', where / 'old.vmdk')
