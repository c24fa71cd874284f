/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* QEMU's drivers that pass requests on, in the options of an image. */
#ifndef DR_CLI_FILTERS_H
#define DR_CLI_FILTERS_H

#include "cli/common/image.h"

/* Takes throttle and copy-on-read out of the list, notes in image what they ask for, and lets what
 * was below them stand in their place. 0 or -errno, with message. */
int cli_filters_take(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list,
                     struct cli_image *image);
/* Does the object throttle-group with these settings mean something? 0 or -errno, with message. */
int cli_throttle_check(const struct cli *cli, const struct cli_pairs *group);
/* The limit of the image's throttle group goes to spec->rate, if it is lower. Refuses it where the
 * command has none to obey. 0 or -errno, with message. */
int cli_image_take_rate(const struct cli *cli, const struct cli_image_spec *spec,
                        const struct cli_image *image);
/* What a driver of QEMU is for that does not exist here; NULL = there is none such. */
const char *cli_driver_is_for(const char *driver);

#endif
