#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Run a directory of pytest files as one meson test; 77 = skipped.
python=${PYTHON:-/usr/bin/python3}
"$python" -c 'import pytest' 2>/dev/null || { echo "pytest is not installed"; exit 77; }
PYTHONDONTWRITEBYTECODE=1 exec "$python" -m pytest -q -p no:cacheprovider -rs "$@"
