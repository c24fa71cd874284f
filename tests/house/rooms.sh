#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# The shape of the source tree: licence lines, sizes of files, and that includes point one way
# (cli -> archive -> ops -> core -> formats, storage -> base; the disks inside an archive are a format
# that stands on the archive's own headers). usage: rooms.sh SOURCE_DIR
set -eu
cd "$1"
bad=0
complain() {
    echo "$*"
    bad=1
}

for f in $(find src include tests fuzz examples -name '*.[ch]'); do
    head -1 "$f" | grep -q 'SPDX-License-Identifier: LGPL-2.1-or-later' ||
        complain "$f: the first line is not the licence's"
    lines=$(wc -l <"$f")
    [ "$lines" -le 1000 ] || complain "$f: $lines lines"
done

# Which rooms each may include. Drivers need the core's own types and its pages, nothing else of it.
allowed() {
    case $1 in
    base) echo 'base/|drover/drover\.h' ;;
    storage) echo 'base/|storage/|drover/drover\.h' ;;
    formats) echo 'base/|storage/|formats/|core/core\.h|core/marks\.h|core/pages\.h|archive/(ova|ova-manifest|vma-format|vma-index)\.h|drover/drover\.h' ;;
    core) echo 'base/|storage/|formats/format\.h|core/|drover/' ;;
    ops) echo 'base/|storage/|formats/format\.h|core/(aside|core|fingerprint|marks|pages|publish)\.h|ops/|drover/' ;;
    live) echo 'base/|storage/storage\.h|core/(core|publish)\.h|ops/(memory-bitmaps|ops-internal|point-backup)\.h|live/|drover/' ;;
    archive) echo 'base/|storage/|core/(core|publish)\.h|ops/|archive/|drover/' ;;
    exports) echo 'base/|exports/|drover/' ;;
    cli) echo 'base/|cli/|exports/|drover/' ;;
    esac
}
for room in base storage formats core ops live archive exports cli; do
    # Names without a slash stand next to the file.
    wrong=$(grep -rnE '^#include "[^"]*/' "src/$room" --include='*.[ch]' |
        grep -vE "#include \"($(allowed "$room"))" || true)
    [ -z "$wrong" ] || complain "$room includes what it must not:
$wrong"
done

# A scope guard frees at every return, so at each of them its variable holds something.
wrong=$(grep -rnE '^ +CLEANUP_\w+ [^=;(]*;' src --include='*.[ch]' || true)
[ -z "$wrong" ] || complain "a scope guard over a variable without a first value:
$wrong"

# A format's name has no business outside its folder, the registry, and the command's help.
wrong=$(grep -rnE 'strcmp\([^)]*"(vmdk|qcow2|add-cow|raw)"' src/core src/ops src/storage --include='*.c' || true)
[ -z "$wrong" ] || complain "decided by a format's name:
$wrong"
[ "$(find src -name '*.c' | wc -l)" -gt 5 ] || complain "this is not the source tree"
exit $bad
