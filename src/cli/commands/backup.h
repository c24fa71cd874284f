/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Kinds of backups that `drover backup` makes, and how old ones go. */
#ifndef DR_CLI_BACKUP_H
#define DR_CLI_BACKUP_H

#include "cli/commands.h"
#include "drover/backup.h"

/* backup-archive.c: does the target, by -O or its name, stand for an archive? */
bool cli_backup_is_archive(const struct cli_args *args);
int cli_backup_archive(const struct cli *cli, const struct cli_args *args);

/* backup-list.c */
extern const struct cli_command cli_cmd_backup_list;

/* backup-prune.c */
extern const struct cli_command cli_cmd_backup_prune;
/* How many backups are to be kept. 0, or the exit code 1 after a message. */
int cli_get_kept(const struct cli *cli, const char *text, unsigned *keep);
/* Prune the set and tell of each step; tell and user of o are not looked at. The exit code. */
int cli_prune(const struct cli *cli, const struct cli_args *args, const char *set,
              const struct dr_prune_options *o);

/* backup-several.c: each DISK into a new image in a directory. */
struct dr_backup_options;
int cli_backup_several(const struct cli *cli, const struct cli_args *args,
                       const struct dr_backup_options *options);

#endif
