#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Each public header compiles by itself, in C and in C++, with the strictest of the usual warnings.
# usage: headers-alone.sh INCLUDE_DIR HEADER...
set -eu
inc=$1
shift
for header; do
    for std in c11 c17; do
        echo "#include \"$header\"" | ${CC:-cc} -std=$std -Wall -Wextra -Wpedantic -Werror -I"$inc" \
            -fsyntax-only -x c -
    done
    if command -v "${CXX:-c++}" >/dev/null; then
        echo "#include \"$header\"" | ${CXX:-c++} -std=c++11 -Wall -Wextra -Werror -I"$inc" \
            -fsyntax-only -x c++ -
    else
        echo "SKIP: g++ is not installed"
        exit 77
    fi
done
