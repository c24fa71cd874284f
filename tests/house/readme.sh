#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# The README's tour can be typed as it stands, from its first command to its last; so can the examples
# of the manual page.
# usage: readme.sh SOURCE_DIR DROVER
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/bin" "$tmp/tour"
ln -s "$(readlink -f "$2")" "$tmp/bin/drover"
PATH=$tmp/bin:$PATH
sed -n '/^## A tour/,/^From C:/s/^    \(drover .*\)/\1/p' "$1/README.md" >"$tmp/tour.sh"
[ "$(wc -l <"$tmp/tour.sh")" -gt 10 ]
cd "$tmp/tour"
truncate -s 20G disk.raw
printf 'the last thing on the disk' | dd of=disk.raw bs=1 seek=21474836000 conv=notrunc status=none
sh -ex "$tmp/tour.sh"
# What the middle line is there for.
cp disk.vmdk base.vmdk
drover create -q -f vmdk -b base.vmdk -F vmdk one.vmdk
drover create -q -f vmdk -b base.vmdk -F vmdk two.vmdk
if drover commit -q two.vmdk; then
    echo "a commit under another image's feet was not refused"
    exit 1
fi
# The manual's examples, but for what goes onto a device.
mkdir "$tmp/manual"
cd "$tmp/manual"
truncate -s 16M scsi0.raw base.img
drover vma create -d drive-scsi0=scsi0.raw backup.vma.zst
sed -n '/^=head1 EXAMPLES/,/^=head1 SEE/s/^    //p' "$1/docs/man/drover.pod" | grep -v /dev/ >"$tmp/manual.sh"
[ "$(wc -l <"$tmp/manual.sh")" -gt 15 ]
sh -ex "$tmp/manual.sh"
