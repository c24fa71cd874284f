#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
here=$(dirname "$0")
/usr/bin/python3 -c 'import pytest' 2>/dev/null || { echo "skip: pytest is missing"; exit 77; }
exec /usr/bin/python3 -B -m pytest -q -p no:cacheprovider "$here" "$@"
