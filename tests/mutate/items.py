# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plugin of pytest: every test notes the code it runs in a file of its own, and how long it took.

DROVER_COVER_ITEMS=DIR: DIR/N.map (tests/mutate/cover.c) and DIR/N.json with the test's id, seconds, and whether it failed.
"""
import itertools
import json
import os
import time

import pytest

MAP_SIZE = 16 << 20  # as cover.c has it
DIRECTORY = os.environ["DROVER_COVER_ITEMS"]
_number = itertools.count()
_failed = set()


def pytest_runtest_logreport(report):
    if report.failed:
        _failed.add(report.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    name = os.path.join(DIRECTORY, str(next(_number)))
    os.environ["DROVER_COVER"] = name + ".map"
    with open(name + ".map", "wb") as empty:
        empty.truncate(MAP_SIZE)
    begin = time.monotonic()
    yield
    with open(name + ".json", "w", encoding="utf-8") as note:
        json.dump({"id": item.nodeid, "seconds": time.monotonic() - begin,
                   "failed": item.nodeid in _failed}, note)
