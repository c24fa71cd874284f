/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What `drover ctl SOCKET backup` says of archives and spill files. */
#ifndef DR_CLI_LIVE_ARCHIVE_H
#define DR_CLI_LIVE_ARCHIVE_H

#include <jansson.h>

#include "cli/live/client.h"

/* Does the last operand stand for an archive? */
bool ctl_is_archive(const struct cli_args *args);
/* 0, or the exit code after a message. *arguments is to be freed in both cases. */
int ctl_archive_arguments(struct ctl *ctl, const struct cli_args *args, json_t **arguments);
int ctl_set_spill(struct ctl *ctl, const struct cli_args *args, json_t *to);

#endif
