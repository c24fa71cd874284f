/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The passes of a check read ahead (formats/ahead.h). Where a pass writes to the file (c->writes),
 * each piece is used before the next one is read: it might be what is written. */
#include "formats/ahead.h"

#include "formats/qcow2/check.h"

struct qcow2_ahead {
    struct qcow2_check *c;
    struct dr_ahead *ahead;
    qcow2_piece_fn fn;
    void *user;
};

static int use(void *user, const void *what, uint8_t *bytes, struct dr_error *err)
{
    const struct qcow2_ahead *a = user;
    return a->fn(a->c, what, bytes, a->user, err);
}

int qcow2_ahead_add(struct qcow2_check *c, const struct qcow2_piece *piece, struct dr_error *err)
{
    const struct dr_ahead_range range = {piece->at, piece->len, piece->used};
    return dr_ahead_add(c->ahead->ahead, &range, piece, c->writes, err);
}

void qcow2_ahead_start(struct qcow2_check *c, qcow2_piece_fn fn, void *user)
{
    c->ahead->fn = fn;
    c->ahead->user = user;
    dr_ahead_start(c->ahead->ahead, use, c->ahead);
}

int qcow2_ahead_finish(struct qcow2_check *c, int r, struct dr_error *err)
{
    return dr_ahead_finish(c->ahead->ahead, r, err);
}

int qcow2_ahead_new(struct qcow2_check *c)
{
    struct qcow2_ahead *a = calloc(1, sizeof(*a));
    if (!a)
        return -ENOMEM;
    a->c = c;
    a->ahead = dr_ahead_new(c->f, sizeof(struct qcow2_piece), qcow2_check_limits.readers);
    if (!a->ahead) {
        free(a);
        return -ENOMEM;
    }
    c->ahead = a;
    return 0;
}

void qcow2_ahead_free(struct qcow2_check *c)
{
    if (!c->ahead)
        return;
    dr_ahead_free(c->ahead->ahead);
    free(c->ahead);
    c->ahead = NULL;
}
