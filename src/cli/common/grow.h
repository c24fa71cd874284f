/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing a disk's size, with space for what is new. */
#ifndef DR_CLI_GROW_H
#define DR_CLI_GROW_H

#include "cli/common/image.h"

/* mode NULL: off. 0, or 1 after a message. */
int cli_get_prealloc(const struct cli *cli, const char *mode, enum dr_preallocation *prealloc);
/* 0, or -errno after a message. */
int cli_resize(const struct cli *cli, struct dr_disk *disk, uint64_t size,
               enum dr_preallocation prealloc);

#endif
