/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Space for what a disk has become larger by. */
#ifndef DR_CLI_GROW_H
#define DR_CLI_GROW_H

#include "cli/common/image.h"

enum cli_filling { CLI_FILL_OFF, CLI_FILL_FALLOC, CLI_FILL_FULL };

/* mode NULL: off. 0, or 1 after a message. */
int cli_get_filling(const struct cli *cli, const char *mode, enum cli_filling *filling);
/* The disk grew from old to size: space for all of that; or the old size again, and 1 after a
 * message. */
int cli_fill(const struct cli *cli, struct dr_disk *disk, enum cli_filling filling, uint64_t old,
             uint64_t size);

#endif
