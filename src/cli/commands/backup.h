/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Kinds of backups that `drover backup` makes. */
#ifndef DR_CLI_BACKUP_H
#define DR_CLI_BACKUP_H

#include "cli/commands.h"

/* backup-archive.c: does the target, by -O or its name, stand for an archive? */
bool cli_backup_is_archive(const struct cli_args *args);
int cli_backup_archive(const struct cli *cli, const struct cli_args *args);

#endif
