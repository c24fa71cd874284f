#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# The main job on a real file system: a disk with a diary in it is converted, snapshotted, written,
# rebased, committed and converted back, and is proven to be whole. Run it as `./dev demo`.
set -euo pipefail
export LC_ALL=C.UTF-8
cd "$(dirname "$(readlink -f "$0")")/.."
here=$PWD/build/demo
PATH=$PWD/build:$PATH:/usr/sbin:/sbin
rm -rf "$here"
mkdir -p "$here"
cd "$here"

if [ -t 1 ]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' cyan=$'\e[36m' off=$'\e[0m'
else
    bold='' dim='' green='' red='' cyan='' off=''
fi
step=0
chapter() { step=$((step + 1)); printf '\n%s\n' "$bold$step. $*$off"; }
note() { printf '%s\n' "$dim   $*$off"; }
good() { printf '%s\n' "$green   ✓ $*$off"; }
bad() { printf '%s\n' "$red   ✗ $*$off"; exit 1; }
# Show a command as one would type it, then do it. Words that need quotes get them.
typed() {
    local word line='' q="'"
    for word; do
        case $word in
        '' | *[!a-zA-Z0-9_./:=@%+,-]*) word=$q$word$q ;;
        esac
        line+=" $word"
    done
    printf '%s\n' "$cyan   \$$line$off"
}
run() { typed "$@"; "$@" 2>&1 | sed 's/^/     /'; }
stopped() {
    local status=$?
    [ $status = 0 ] || printf '%s\n' "${red}the demo stopped at step $step; its files are in $here$off" >&2
}
trap stopped EXIT

# ---------------------------------------------------------------- a real disk

chapter "A real disk: ext4 with this machine's own files, and a diary"
mkdir files
total=0
for dir in /usr/share/doc /usr/share/perl /usr/include /usr/share/man /usr/share/locale \
    /usr/lib/python3 /usr/share/mime /usr/share/zoneinfo; do
    [ -d "$dir" ] && [ $total -lt 100000 ] || continue
    kib=$(du -sk "$dir" 2>/dev/null | cut -f1)
    [ "$kib" -lt 150000 ] || continue
    mkdir -p "files$(dirname "$dir")"
    cp -a --reflink=auto "$dir" "files$dir" 2>/dev/null || true
    total=$((total + kib))
done
page() { printf '%-4095s\n' "$1"; } # one block of the file system
page "(Monday's page is still empty)" >files/diary.txt
page "(Tuesday's page is still empty)" >>files/diary.txt
run mke2fs -q -F -t ext4 -b 4096 -d files disk.raw 320M
good "disk.raw: $(du -h --apparent-size disk.raw | cut -f1) of disk, $(du -h disk.raw | cut -f1) of data, $(find files -type f | wc -l) files"

# Where the diary's pages stand on the disk: the demo plays the guest that writes them.
block() { debugfs -R "bmap /diary.txt $1" disk.raw 2>/dev/null; }
monday_at=$(($(block 0) * 4096))
tuesday_at=$(($(block 1) * 4096))
[ $monday_at -gt 0 ] && [ $tuesday_at -gt 0 ] || bad "debugfs did not find the diary"

chapter "Convert it to VMDK"
run drover convert -O vmdk disk.raw disk.vmdk
run drover compare disk.raw disk.vmdk

# ---------------------------------------------------------------- snapshots

chapter "Take a snapshot, let the guest write Monday's page; again for Tuesday's"
snapshot() { # sets $active from what the command prints
    typed drover snapshot -c "$1"
    local out
    out=$(drover snapshot -c "$1")
    printf '     %s\n' "$out"
    active=$(printf '%s\n' "$out" | grep -o '[^ :]*\.vmdk' | tail -n 1)
    active=${active##*/}
    [ -f "$active" ] || bad "the new active disk '$active' is not there"
}
snapshot disk.vmdk
monday=$active
page "Monday: snapshotted, then wrote this." >monday.txt
run drover io -c "write -s monday.txt $monday_at 4k" "$monday"
snapshot "$monday"
tuesday=$active
page "Tuesday: the disk under me is frozen." >tuesday.txt
run drover io -c "write -s tuesday.txt $tuesday_at 4k" "$tuesday"

chapter "The family, and what the newest disk shows"
run drover snapshot -l "$tuesday"
note "each snapshot holds only what was written since:"
run du -h --apparent-size disk.vmdk "$monday" "$tuesday"
drover convert -O raw "$tuesday" before.raw
view=$(sha256sum <before.raw | cut -d' ' -f1)
good "sha256 of the whole disk as the guest sees it: ${view:0:16}..."

# ---------------------------------------------------------------- rebase, commit

chapter "Rebase: put Tuesday directly on the base, without Monday's file in between"
run drover rebase -b disk.vmdk -F vmdk "$tuesday"
run drover snapshot -l "$tuesday"
run drover compare before.raw "$tuesday"
good "Monday's page was pulled in first: not one byte changed for the guest"

chapter "Commit it into the base"
note "Monday's file still stands on that base and would break; Drover notices:"
typed drover commit "$tuesday"
if drover commit "$tuesday" >refusal.txt 2>&1; then
    bad "the commit was not refused"
fi
fold -s -w 92 refusal.txt | sed 's/^/     /'
note "nobody needs Monday's file any more, so:"
run rm "$monday"
run drover commit "$tuesday"

# ---------------------------------------------------------------- proof

chapter "Convert back to raw, and prove it"
run drover convert -O raw disk.vmdk back.raw
run e2fsck -fn back.raw
[ "$(sha256sum <back.raw | cut -d' ' -f1)" = "$view" ] || bad "the disk is not what the guest saw"
good "same sha256 as before the rebase and the commit"
run debugfs -R 'cat /diary.txt' back.raw >diary.out
sed -n '/^     [MT]/s/ *$//p' diary.out
debugfs -R 'cat /diary.txt' back.raw 2>/dev/null >diary.back
cat monday.txt tuesday.txt | cmp -s - diary.back || bad "the diary is not what was written"
good "both pages of the diary are there"
mkdir out
debugfs -R 'rdump /usr out' back.raw >/dev/null 2>&1 || true
diff -rq --no-dereference files/usr out/usr >differences.txt || bad "files differ: see differences.txt"
good "$(find out/usr -type f | wc -l) files out of the disk are equal to this machine's own"
rm -rf files out before.raw diary.* differences.txt refusal.txt monday.txt tuesday.txt

cat <<END

${bold}That was the main job.$off Took $SECONDS s; the disks are in build/demo. What to try next:

   cd build/demo; PATH=\$PATH:$(dirname "$here")
   drover info --backing-chain $tuesday
   drover map --output=json $tuesday | head
   drover snapshot -c $tuesday      # another one on top
   drover stream $tuesday           # pull everything in: it needs no parent any more
   drover chain $tuesday
   drover --help
END
