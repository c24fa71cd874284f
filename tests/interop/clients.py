# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real programs that call qemu-img, with Drover first in their PATH under that name, and every call noted."""
import os
import shutil
import tempfile

import pytest

from tools import DROVER

NAMES = ('qemu-img', 'qemu-io', 'qemu-nbd')
# Each call becomes one line: its words, and how it ended.
NOTE = """#!/bin/sh
{links}/{name} "$@"
code=$?
printf '%s %s => %s\\n' {name} "$*" $code >>{calls}
exit $code
"""
# A server must be the very process that its client started.
NOTE_SERVER = """#!/bin/sh
printf '%s %s => 0\\n' {name} "$*" >>{calls}
exec {links}/{name} "$@"
"""


def skip_without(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f'{program} is missing: ./dev deps or ./dev soak installs it')


class Client:
    """A directory for a client: bin/ goes first in its PATH. Anybody may work in it: a client may drop root's rights."""

    def __init__(self, top):
        self.top = str(top)
        self.calls_file = self.path('calls')
        for name in ('bin', 'links', 'work'):
            os.mkdir(self.path(name))
        for name in (self.top, self.path('work')):
            os.chmod(name, 0o777)
        with open(self.calls_file, 'w', encoding='utf-8'):
            os.chmod(self.calls_file, 0o666)
        shutil.copy(DROVER, self.path('links', 'drover'))  # where it was built, others may not look
        plugin = os.path.join(os.path.dirname(os.path.abspath(DROVER)), 'nbdkit-drover-plugin.so')
        if os.path.exists(plugin):
            shutil.copy(plugin, self.path('links'))
        for name in NAMES:
            os.symlink('drover', self.path('links', name))
            with open(self.path('bin', name), 'w', encoding='utf-8') as f:
                f.write((NOTE_SERVER if name == 'qemu-nbd' else NOTE).format(links=self.path('links'), name=name, calls=self.calls_file))
            os.chmod(self.path('bin', name), 0o755)
        self.env = {**os.environ, 'LC_ALL': 'C', 'PATH': self.path('bin') + ':' + os.environ['PATH'] + ':/usr/sbin'}

    def path(self, *names):
        return os.path.join(self.top, *names)

    def work(self, name):
        return self.path('work', name)

    def calls(self):
        """What was called up to now, with paths in this directory made short; each call must have succeeded."""
        with open(self.calls_file, encoding='utf-8') as f:
            lines = f.read().replace(self.path('work') + '/', '').splitlines()
        assert lines and all(line.endswith(' => 0') for line in lines), lines
        return [line[:-len(' => 0')] for line in lines]


@pytest.fixture(name='client', scope='module')
def fixture_client():
    top = tempfile.mkdtemp(prefix='drover-')
    yield Client(top)
    shutil.rmtree(top, ignore_errors=True)
