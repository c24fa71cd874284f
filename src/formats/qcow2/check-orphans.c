/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The clusters that no table leads to: what an image with damaged tables has lost may lie there. */
#include "formats/qcow2/check.h"

/* Show the clusters of the tally's window without references, in runs. A run that reaches the end
 * of the window goes on in the next one: *from is where it began. */
static int show_window(struct qcow2_check *c, uint64_t *from, dr_orphan_fn each, void *user,
                       struct dr_error *err)
{
    uint64_t end = dr_min(c->tally.end, c->clusters), cluster = c->q->cluster;
    int r = 0;
    for (uint64_t i = c->tally.begin; r == 0 && i < end; i++) {
        uint64_t used = qcow2_tally_next(&c->tally, i);
        if (used >= end)
            break;
        if (!qcow2_tally_get(&c->tally, used, NULL)) {
            i = used;
            continue;
        }
        if (used > *from)
            r = each(user, *from * cluster, (used - *from) * cluster, err);
        *from = used + 1;
        i = used;
    }
    return r;
}

int qcow2_orphans(struct dr_image *image, dr_orphan_fn each, void *user, struct dr_error *err)
{
    struct dr_check_result ignored = {0};
    struct qcow2_check c;
    uint64_t from = 0;
    int r = qcow2_check_begin(&c, image, err);
    if (r == 0)
        r = qcow2_read_structure(&c, &ignored, true, err);
    c.tally.end = 0;
    do {
        qcow2_tally_begin(&c.tally, c.tally.end, qcow2_check_limits.tally);
        if (r == 0)
            r = qcow2_walk(&c, err);
        if (r == 0)
            r = show_window(&c, &from, each, user, err);
    } while (r == 0 && c.tally.more);
    if (r == 0 && from < c.clusters)
        r = each(user, from * c.q->cluster, dr_file_size(c.f) - from * c.q->cluster, err);
    qcow2_check_end(&c);
    return r;
}
