/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tables that are written anew, elsewhere, because an entry in the middle of them has to grow or to
 * go: the snapshot table and the bitmap directory. The counts are right by now. The new table and
 * its counts are durable before the header leads to it, and only then is the old one given up. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

/* A table under construction. */
struct renewal {
    uint8_t *bytes;
    uint64_t len, room;
};

static int append(struct qcow2_check *c, struct renewal *t, uint64_t at, uint64_t len, uint8_t **p,
                  struct dr_error *err)
{
    uint64_t start = dr_round_up(t->len, 8);
    if (start + len > t->room) {
        uint64_t room = dr_max(2 * t->room, start + len + 4096);
        uint8_t *bytes = realloc(t->bytes, room);
        if (!bytes)
            return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
        t->bytes = bytes;
        t->room = room;
    }
    memset(t->bytes + t->len, 0, start - t->len);
    *p = t->bytes + start;
    t->len = start + len;
    return at ? dr_file_pread(c->f, *p, at, len, err) : 0;
}

/* Into free clusters, durably. */
static int place(struct qcow2_check *c, const struct renewal *t, uint64_t *host,
                 struct dr_error *err)
{
    uint64_t n = dr_max(1, dr_div_up(t->len, c->q->cluster));
    uint8_t *whole = calloc(n, c->q->cluster);
    if (!whole)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    memcpy(whole, t->bytes, t->len);
    int r = qcow2_load_reftable(c->image, err);
    if (r == 0)
        r = qcow2_take(c->image, n, host, err);
    if (r == 0)
        r = dr_file_pwrite(c->f, whole, *host, n * c->q->cluster, err);
    free(whole);
    return r < 0 ? r : dr_image_flush(c->image, err);
}

static int give_up(struct qcow2_check *c, uint64_t at, uint64_t len, struct dr_error *err)
{
    int r = len ? qcow2_lose(c->image, at, len, err) : 0;
    return r < 0 ? r : dr_image_flush_all(c->image, err);
}

/* ------------------------------------------------------------------ snapshots */

/* An entry of version 2 gets what version 3 demands: the size of the saved machine in 64 bits, and
 * that of the disk, which could not be changed then. */
static int append_snapshot(struct qcow2_check *c, struct renewal *t, const struct qcow2_snapshot *s,
                           struct dr_error *err)
{
    uint64_t names = s->len - QCOW2_SNAPSHOT_HEADER - s->extra;
    uint8_t *p, *q;
    int r = append(c, t, s->at, QCOW2_SNAPSHOT_HEADER, &p, err);
    if (r < 0 || s->extra >= QCOW2_SNAPSHOT_EXTRA)
        return r < 0 ? r : append(c, t, s->at + QCOW2_SNAPSHOT_HEADER, s->extra + names, &q, err);
    put_be32(p + 36, QCOW2_SNAPSHOT_EXTRA);
    uint32_t vm_state = get_be32(p + 32);
    r = append(c, t, 0, QCOW2_SNAPSHOT_EXTRA, &q, err);
    if (r < 0)
        return r;
    put_be64(q, vm_state);
    put_be64(q + 8, c->q->h.size);
    if (s->extra >= 8 && (r = dr_file_pread(c->f, q, s->at + QCOW2_SNAPSHOT_HEADER, 8, err)) < 0)
        return r;
    return append(c, t, s->at + QCOW2_SNAPSHOT_HEADER + s->extra, names, &q, err);
}

static int fill_snapshots(struct qcow2_check *c, struct renewal *t, struct dr_error *err)
{
    uint64_t at = c->q->h.snapshots_at;
    int r = 0;
    for (uint32_t i = 0; r == 0 && i < c->n_snapshots; i++) {
        struct qcow2_snapshot s;
        at = dr_round_up(at, 8);
        r = qcow2_read_snapshot(c, at, &s, err);
        if (r == 0)
            r = append_snapshot(c, t, &s, err);
        at += s.len;
    }
    return r;
}

int qcow2_renew_snapshots(struct qcow2_check *c, struct dr_error *err)
{
    struct qcow2_header *h = &c->q->h;
    struct renewal t = {0};
    uint64_t host = 0, old = h->snapshots_at, old_len = c->snapshots_len;
    uint8_t field[8];
    int r = fill_snapshots(c, &t, err);
    if (r == 0)
        r = place(c, &t, &host, err);
    free(t.bytes);
    if (r < 0)
        return r;
    put_be64(field, host);
    qcow2_plan(c, host, "the snapshot table is written anew here, with what version 3 demands");
    qcow2_plan(c, QCOW2_AT_SNAPSHOTS + 4,
               "the header has the snapshot table at byte %llu, not %llu", ULL(host),
               ULL(h->snapshots_at));
    r = qcow2_switch(c->image, QCOW2_AT_SNAPSHOTS + 4, field, sizeof(field), err);
    if (r < 0)
        return r;
    h->snapshots_at = host;
    return give_up(c, old, old_len, err);
}

/* ------------------------------------------------------------------ bitmaps */

static int append_bitmap(struct qcow2_check *c, uint64_t at, uint64_t len, void *user,
                         struct dr_error *err)
{
    uint8_t *p;
    return append(c, user, at, len, &p, err);
}

/* No bitmap is left that may be right. */
static int forget_bitmaps(struct qcow2_check *c, struct dr_error *err)
{
    struct qcow2 *q = c->q;
    qcow2_plan(c, QCOW2_AT_AUTOCLEAR, "the header has no bitmaps: none of them can be right");
    int r = qcow2_switch_bits(c->image, QCOW2_AT_AUTOCLEAR, 0, QCOW2_BITMAPS, err);
    if (r < 0)
        return r;
    q->n_bitmaps = 0;
    q->bitmaps_at = q->bitmaps_len = 0;
    q->bitmaps_bad = false;
    return 0;
}

int qcow2_renew_bitmaps(struct qcow2_check *c, struct dr_error *err)
{
    struct renewal t = {0};
    uint64_t host = 0;
    int r = qcow2_read_bitmaps(c, append_bitmap, &t, err);
    if (r == 0 && (c->n_bitmaps == 0 || c->q->bitmaps_bad)) {
        r = forget_bitmaps(c, err);
    } else if (r == 0) {
        uint64_t len = dr_round_up(t.len, 8);
        r = place(c, &t, &host, err);
        qcow2_plan(c, host, "the bitmap directory is written anew here, with %llu of %u bitmaps",
                   ULL(c->n_bitmaps), c->q->n_bitmaps);
        qcow2_plan(c, 0, "the header has the bitmap directory at byte %llu, not %llu", ULL(host),
                   ULL(c->q->bitmaps_at));
        if (r == 0)
            r = qcow2_set_bitmaps(c->image, (uint32_t)c->n_bitmaps, len, host, err);
    }
    free(t.bytes);
    return r; /* the next look finds what the old ones took, and gives it back */
}
