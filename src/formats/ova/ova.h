/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of the ova driver share. image->state is a struct ova while the image is a whole
 * machine. */
#ifndef DR_FORMATS_OVA_OVA_H
#define DR_FORMATS_OVA_OVA_H

#include "archive/ova.h"
#include "core/core.h"

int ova_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
              struct dr_error *err);

#endif
