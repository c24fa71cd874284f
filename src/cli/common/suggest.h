/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the user may have meant. */
#ifndef DR_CLI_SUGGEST_H
#define DR_CLI_SUGGEST_H

#include "cli/cli.h"

/* " (did you mean 'convert'?)" for a mistyped command of this role, or one below a command, or an
 * option of it ("--prgress"), and "" when nothing is near. All stay valid until the next call. */
const char *cli_meant_command(enum cli_role role, const char *word);
const char *cli_meant_child(const struct cli_command *command, const char *word);
const char *cli_meant_option(const struct cli_command *command, const char *word);

/* The parent of the image at path was not found: if its name leads to a file from the working
 * directory, says that names are relative to the image's directory, and which one it would be. */
void cli_hint_relative(const struct cli *cli, const char *path, const char *parent);

#endif
