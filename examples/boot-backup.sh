#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Boot a machine from a backup to see that it boots:
#     boot-backup.sh BACKUP [TEXT [SECONDS]]
# The machine's first serial port goes to standard output. As soon as TEXT (login:) was there, the
# machine is switched off and the script ends with 0; if it ends before that, or SECONDS (300) have
# passed, with 1. The disk is served with --temporary: what the machine writes is thrown away, and
# nothing of the backup changes, nor of the backups that it stands on.
#
# In the environment: DROVER, the command (drover); QEMU, the machine (qemu-system-x86_64), and
# QEMU_OPTIONS for it, as "-m 4096 -bios /usr/share/ovmf/OVMF.fd".
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: ${0##*/} BACKUP [TEXT [SECONDS]]" >&2
    exit 2
fi
backup=$1 text=${2:-login:} seconds=${3:-300}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# $uri is the server's: where its disk is. It runs this command in a shell of its own.
# shellcheck disable=SC2016
export MACHINE_PID=$work/pid
{
    machine="exec timeout $seconds ${QEMU:-qemu-system-x86_64} -machine q35,accel=kvm:tcg -m 1024"
    machine+=' -nodefaults -no-user-config -display none -no-reboot -serial stdio -pidfile "$MACHINE_PID"'
    machine+=' -drive "file=$uri,format=raw,if=virtio"'" ${QEMU_OPTIONS-}"
}

exec 3< <(exec "${DROVER:-drover}" serve --temporary --export disk --run "$machine" "$backup" </dev/null)
server=$!
seen='' found=1
while IFS= read -r -d '' -N 1 -u 3 byte; do # not lines: a prompt is none
    printf '%s' "$byte"
    seen=$seen$byte
    [ ${#seen} -le ${#text} ] || seen=${seen:1}
    if [ "$seen" = "$text" ]; then
        found=0
        kill "$(cat "$MACHINE_PID")"
        break
    fi
done
exec 3<&-
wait "$server" || true
echo
[ $found = 0 ] || echo "${0##*/}: \"$text\" was not seen" >&2
exit $found
