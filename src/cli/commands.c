/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/commands.h"

const struct cli_command *const cli_commands[] = {
    &cli_cmd_create,   &cli_cmd_info,          &cli_cmd_map,        &cli_cmd_measure,
    &cli_cmd_compare,  &cli_cmd_checksum,      &cli_cmd_convert,    &cli_cmd_dd,
    &cli_cmd_rebase,   &cli_cmd_commit,        &cli_cmd_stream,     &cli_cmd_addcow,
    &cli_cmd_snapshot, &cli_cmd_qemu_snapshot, &cli_cmd_chain,      &cli_cmd_check,
    &cli_cmd_recover,  &cli_cmd_resize,        &cli_cmd_amend,      &cli_cmd_bitmap,
    &cli_cmd_backup,   &cli_cmd_restore,       &cli_cmd_mount,      &cli_cmd_unmount,
    &cli_cmd_vma,      &cli_cmd_ova,           &cli_cmd_serve,      &cli_cmd_ctl,
    &cli_cmd_io,       &cli_cmd_bench,         &cli_cmd_completion, NULL,
};
