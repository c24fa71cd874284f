# SPDX-License-Identifier: LGPL-2.1-or-later
import os
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True

# Machines of their own that take minutes: only `./dev soak` sets this.
if not os.environ.get('DROVER_TEST_LONG'):
    collect_ignore = ['test_clients_guests.py']


@pytest.fixture
def qemu():
    if not shutil.which('qemu-img') or not shutil.which('qemu-io'):
        pytest.skip('qemu-img and qemu-io are not installed')
