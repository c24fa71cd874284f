#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# A program that opens a local disk loads none of the libraries that src/base/loaded.h speaks of.
# usage: linked.sh DROVER FILE...
set -eu
drover=$1 tmp=$(mktemp)
trap 'rm -f "$tmp"' EXIT
readelf -d "$@" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' >"$tmp"
grep -q '^libc\.so' "$tmp"
if grep -E '^lib(archive|curl|gcrypt|nbd|xml2)\.so' "$tmp"; then
    echo "linked.sh: linked, and should be loaded when needed"
    exit 1
fi
! LD_DEBUG=files "$drover" info "$drover" 2>&1 | grep -E 'calling init.*/lib(archive|curl|gcrypt|nbd|xml2)\.so'
