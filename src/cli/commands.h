/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One table a command, each in commands/NAME.c, io/io.c or vma/vma.c. */
#ifndef DR_CLI_COMMANDS_H
#define DR_CLI_COMMANDS_H

#include "cli/cli.h"

extern const struct cli_command cli_cmd_addcow;
extern const struct cli_command cli_cmd_amend;
extern const struct cli_command cli_cmd_backup;
extern const struct cli_command cli_cmd_bitmap;
extern const struct cli_command cli_cmd_check;
extern const struct cli_command cli_cmd_chain;
extern const struct cli_command cli_cmd_commit;
extern const struct cli_command cli_cmd_compact;
extern const struct cli_command cli_cmd_compare;
extern const struct cli_command cli_cmd_checksum;
extern const struct cli_command cli_cmd_completion;
extern const struct cli_command cli_cmd_convert;
extern const struct cli_command cli_cmd_create;
extern const struct cli_command cli_cmd_ctl;
extern const struct cli_command cli_cmd_bench;
extern const struct cli_command cli_cmd_qemu_nbd; /* the whole tool */
extern const struct cli_command cli_cmd_dd;
extern const struct cli_command cli_cmd_info;
extern const struct cli_command cli_cmd_io;
extern const struct cli_command cli_cmd_map;
extern const struct cli_command cli_cmd_measure;
extern const struct cli_command cli_cmd_mount;
extern const struct cli_command cli_cmd_ova;
extern const struct cli_command cli_cmd_qemu_snapshot;
extern const struct cli_command cli_cmd_rebase;
extern const struct cli_command cli_cmd_recover;
extern const struct cli_command cli_cmd_resize;
extern const struct cli_command cli_cmd_restore;
extern const struct cli_command cli_cmd_serve;
extern const struct cli_command cli_cmd_snapshot;
extern const struct cli_command cli_cmd_stream;
extern const struct cli_command cli_cmd_unmount;
extern const struct cli_command cli_cmd_vma;

/* commands/chain-show.c: the family of an image, with what each one holds if usage says so. The
 * exit code. */
struct cli_image;
int cli_show_tree(const struct cli *cli, const struct cli_args *args, const struct cli_image *image,
                  bool usage);
/* All families of a directory; and an image with its ancestors, top first. */
int cli_show_forest(const struct cli *cli, const struct cli_args *args, const char *dir,
                    bool usage);
int cli_show_chain(const struct cli *cli, const struct cli_args *args,
                   const struct cli_image *image);
/* commands/chain-diff.c */
int cli_chain_diff(const struct cli *cli, const struct cli_args *args);

/* commands/addcow.c: retire the image and tell what is left. The exit code. */
struct dr_retire_options;
int cli_retire(const struct cli *cli, const struct cli_args *args, const char *path,
               const struct dr_retire_options *o);

#endif
