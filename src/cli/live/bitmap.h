/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* `drover ctl SOCKET bitmap`: bitmaps of what guests write. */
#ifndef DR_CLI_LIVE_BITMAP_H
#define DR_CLI_LIVE_BITMAP_H

#include "cli/live/client.h"

/* Check args, the operands behind SOCKET and "bitmap" and the options that belong to them. 0, or
 * the exit code after a message. */
int ctl_bitmap_check(const struct cli *cli, const struct cli_args *args);
/* disk: the only one of the server, where ctl_bitmap_lacks_disk; else NULL. */
int ctl_bitmap(struct ctl *ctl, const struct cli_args *args, const char *disk);
/* The disk's name was left out, and is needed. */
bool ctl_bitmap_lacks_disk(const struct cli_args *args);

#endif
