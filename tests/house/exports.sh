#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# The shared library exports exactly the functions that the public headers declare with DR_API.
# usage: exports.sh LIBRARY HEADER...
set -eu
export LC_ALL=C
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
lib=$1
shift
nm -D --defined-only "$lib" | awk '{ print $3 }' | sort >"$tmp/exported"
# A declaration may span lines: the name is the last word before the first parenthesis.
grep -hv '^#define' "$@" | tr '\n' ' ' | grep -o 'DR_API [^#(;]*(' | sed 's/ *($//; s/.*[ *]//' | sort >"$tmp/declared"
[ -s "$tmp/declared" ]
diff -u "$tmp/declared" "$tmp/exported" || {
    echo "exports.sh: '-' is declared but not exported, '+' is exported but not declared"
    exit 1
}
echo "$(wc -l <"$tmp/declared") functions"
