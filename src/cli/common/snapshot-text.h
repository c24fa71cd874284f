/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The list of the snapshots inside an image, as qemu-img prints it. */
#ifndef DR_CLI_SNAPSHOT_TEXT_H
#define DR_CLI_SNAPSHOT_TEXT_H

#include <jansson.h>

/* info: what dr_info() says of one image. Without snapshots nothing is printed. */
void cli_print_snapshots(const json_t *info);

#endif
