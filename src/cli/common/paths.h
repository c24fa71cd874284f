/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_CLI_PATHS_H
#define DR_CLI_PATHS_H

#include "cli/cli.h"

/* Turn a name recorded in the image at `path` into a path relative to the working directory.
 * malloc'ed. */
char *cli_path_beside(const char *path, const char *name);
/* The last part of a path without what stands behind its last dot. malloc'ed; NULL = out of memory.
 */
char *cli_stem(const char *path);
/* Is there a file where this name of an image leads? errno says why not. */
bool cli_name_exists(const char *name);
bool cli_is_directory(const char *path);
bool cli_same_file(const char *a, const char *b);
/* The directory that path is in; malloc'ed. */
char *cli_directory_of(const char *path);

/* Turn a NAME from the command line into a path. malloc'ed; NULL = out of memory. When called as
 * a tool of QEMU, a leading "file:" is removed. */
char *cli_plain_name(const struct cli *cli, const char *name);
/* Length of the PROTOCOL in front of a ':' that QEMU's tools would see in name and that is none of
 * ours, else 0. */
size_t cli_foreign_protocol(const struct cli *cli, const char *name);

/* --allow-path for the operations that take no list of their own. Call before any thread starts. */
void cli_export_allowed(const struct cli_args *args);

/* -o settings of a format. */
bool cli_option_exists(const char *format, const char *name);
bool cli_wants_option_list(const struct cli_args *args); /* -o help */
/* with_file: a target was named; with_parent: the command takes backing_file, too. 0 or 1. */
int cli_print_option_list(const struct cli *cli, const char *format, bool with_file,
                          bool with_parent);

#endif
