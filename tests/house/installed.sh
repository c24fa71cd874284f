#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# A program outside this tree builds against the installed library by way of pkg-config alone, and
# works. usage: installed.sh SOURCE_DIR BUILD_DIR
set -eu
src=$1
build=$2
command -v pkg-config >/dev/null || { echo "SKIP: pkg-config is not installed"; exit 77; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
DESTDIR="$tmp/stage" meson install -C "$build" --no-rebuild --quiet >"$tmp/log" 2>&1 ||
    { cat "$tmp/log"; exit 1; }
pc=$(find "$tmp/stage" -name drover.pc)
[ -n "$pc" ] || { echo "no drover.pc was installed"; exit 1; }
PKG_CONFIG_PATH=$(dirname "$pc")
export PKG_CONFIG_PATH PKG_CONFIG_SYSROOT_DIR="$tmp/stage"
so=$(find "$tmp/stage" -name 'libdrover.so')
lib=$(dirname "$so")
static=$([ -n "$so" ] || echo --static)

# shellcheck disable=SC2046,SC2086
${CC:-cc} -std=c17 -Wall -Wextra -Werror -o "$tmp/disk-map" "$src/examples/disk-map.c" \
    $(pkg-config --cflags --libs $static drover)

# 3 MiB: a hole, the bytes "0123456789abcdef", a hole.
truncate -s 3M "$tmp/disk.raw"
printf 0123456789abcdef | dd of="$tmp/disk.raw" bs=1M seek=1 conv=notrunc status=none
LD_LIBRARY_PATH=$lib "$tmp/disk-map" "$tmp/disk.raw" 1048576 16 "$tmp/out" >"$tmp/map"
cat "$tmp/map"
[ "$(cat "$tmp/out")" = 0123456789abcdef ]
grep -q '3145728 bytes' "$tmp/map"
grep -q 'data' "$tmp/map"
grep -q 'zero' "$tmp/map"
if LD_LIBRARY_PATH=$lib "$tmp/disk-map" "$tmp/absent.raw" 2>"$tmp/err"; then
    echo "opening a missing disk did not fail"
    exit 1
fi
grep -q 'absent.raw' "$tmp/err"

# What else an installation has.
command=$(find "$tmp/stage" -path '*/bin/drover')
[ -n "$command" ] || { echo "the command is not installed"; exit 1; }
LD_LIBRARY_PATH=$lib "$command" --version | grep -q '[0-9]\.[0-9]'
[ -n "$(find "$tmp/stage" -name 'drover.1*')" ] || { echo "the manual page is not installed"; exit 1; }
