#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# `./dev mutate` makes the same mutants of the same seed, others of another one, and none of comments,
# preprocessor lines, messages or declarations. usage: mutate.sh SOURCE_DIR
set -eu
cd "$1"
git rev-parse --is-inside-work-tree >/dev/null 2>&1 || { echo "skipped: the sources are not in a git tree"; exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
tests/mutate/mutate --list 400 7 >"$dir/one"
tests/mutate/mutate --list 400 7 >"$dir/two"
tests/mutate/mutate --list 400 8 >"$dir/other"
cmp "$dir/one" "$dir/two"
[ "$(grep -c '^src/' "$dir/one")" = 400 ] || { echo "not 400 mutants"; exit 1; }
! cmp -s "$dir/one" "$dir/other" || { echo "the seed makes no difference"; exit 1; }
for kind in operator bound condition call; do
    grep -q "($kind)$" "$dir/one" || { echo "none is a change of $kind"; exit 1; }
done
! grep -nE '^    [-+]( *(/\*|\* |#|static )|[^ ;])' "$dir/one" || { echo "no code of a function"; exit 1; }
