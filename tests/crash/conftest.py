# SPDX-License-Identifier: LGPL-2.1-or-later
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True


@pytest.fixture(autouse=True)
def needs_preload():
    if not os.path.exists(os.environ.get('DROVER_PRELOAD', '')):
        pytest.skip('DROVER_PRELOAD does not name the recorder (run by meson)')
