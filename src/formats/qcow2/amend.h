/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing what create has laid down: amend.c says in which order, refcounts.c changes the width of
 * the counts. Nobody else reads or writes through the disk meanwhile. */
#ifndef DR_FORMATS_QCOW2_AMEND_H
#define DR_FORMATS_QCOW2_AMEND_H

#include "formats/qcow2/snapshot.h"

/* The image as it is to become; settings that were not asked for are as they are now. */
struct qcow2_amend {
    unsigned version, order;
    bool lazy, raw;
    const char *data_file; /* NULL = as it is; "" = none is recorded */
    uint64_t size;
    const char *backing_file, *backing_format; /* NULL = not given */
    struct dr_amend *what;
};

/* ------------------------------------------------------------------ refcounts.c */

/* Counts of 1 << order bits. A failure leaves the old ones, or (q->damage) the one or the other. */
int qcow2_change_order(struct dr_image *image, const struct qcow2_amend *amend, unsigned order,
                       struct dr_error *err);

#endif
