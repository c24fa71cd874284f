# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of `ova create` at each of its changes: there is no archive, or the old one, or the new one whole."""
import os
import random
import shutil

import crashlib
import pytest
import replay


@pytest.mark.parametrize('tear', [False, True], ids=['between', 'torn'])
@pytest.mark.parametrize('replace', [False, True], ids=['new', 'replace'])
def test_a_killed_creation_leaves_a_whole_archive_or_none(replace, tear, tmp_path):
    start = tmp_path / 'start'
    start.mkdir()
    rng = random.Random(1)
    for name in 'a', 'b':
        (start / name).write_bytes(rng.randbytes(200000) + bytes(800000 + 576))
    old = None
    if replace:
        crashlib.drover('ova', 'create', '-d', 'format=raw:b', 'web.ova', cwd=str(start))
        old = (start / 'web.ova').read_bytes()
    argv = [crashlib.DROVER, 'ova', 'create', '--force', '-d', 'format=raw:a', '-d', 'format=raw:b', 'web.ova']

    def run(n=None):
        where = str(tmp_path / 'run')
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(start, where)
        more = {'DROVER_COUNT': tmp_path / 'count'} if n is None else {'DROVER_KILL_AT': n}
        if tear:
            more['DROVER_KILL_TEAR'] = '1'
        return where, crashlib.run(*argv, ok=False, cwd=where, env=replay.environment(where, **more))

    _, done = run()
    assert done.returncode == 0, done.stderr
    total = int((tmp_path / 'count').read_text(encoding='ascii'))
    assert total > 5
    seen = set()
    for n in crashlib.kill_points(total, 40):
        where, done = run(n)
        assert done.returncode in (-9, 0), (n, done.stderr)
        path = os.path.join(where, 'web.ova')
        now = open(path, 'rb').read() if os.path.exists(path) else None
        seen.add('old' if now == old else 'new')
        if now != old:
            check = crashlib.run(crashlib.DROVER, 'check', 'web.ova', ok=False, cwd=where)
            assert check.returncode == 0 and len(now) > 400000, (n, check)
        again = crashlib.run(*argv, ok=False, cwd=where)  # nothing that is left is in the way
        assert again.returncode == 0, (n, again.stderr)
        assert sorted(os.listdir(where)) == ['a', 'b', 'web.ova'], n
    assert 'old' in seen
