# SPDX-License-Identifier: LGPL-2.1-or-later
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True

import replay  # noqa: E402  pylint: disable=wrong-import-position


@pytest.fixture(autouse=True)
def needs_preload():
    if not os.path.exists(replay.PRELOAD):
        pytest.skip(f'the recorder is not built ({replay.PRELOAD})')
