/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names guest data that lies on the image's own tables: an entry that leads there is damaged, and
 * what it should lead to is not known. The walk has noted the clusters in which a table and data
 * meet; only if there are some, this reads the tables again, first to tell what lies in these
 * clusters, then to tell which entries lead there. The counts are compared as always, so that the
 * number of errors is QEMU's. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

#define MAX_OVERLAPS 65536u /* 1 MiB; others are not named */

static int by_cluster(const void *a, const void *b)
{
    const struct qcow2_overlap *x = a, *y = b;
    return x->cluster < y->cluster ? -1 : x->cluster > y->cluster;
}

/* Sort; each once. */
static void settle(struct qcow2_check *c)
{
    size_t n = 0;
    if (c->n_overlaps == 0)
        return;
    qsort(c->overlaps, c->n_overlaps, sizeof(*c->overlaps), by_cluster);
    for (size_t i = 0; i < c->n_overlaps; i++)
        if (n == 0 || c->overlaps[n - 1].cluster != c->overlaps[i].cluster)
            c->overlaps[n++] = c->overlaps[i];
    c->n_overlaps = n;
}

void qcow2_note_overlap(struct qcow2_check *c, uint64_t cluster)
{
    if (c->n_overlaps == c->room_overlaps) {
        settle(c);
        size_t room = dr_max(c->room_overlaps, 2 * c->n_overlaps + 16);
        if (room > MAX_OVERLAPS)
            return;
        void *more = realloc(c->overlaps, room * sizeof(*c->overlaps));
        if (!more)
            return; /* less is named */
        c->overlaps = more;
        c->room_overlaps = room;
    }
    c->overlaps[c->n_overlaps++] = (struct qcow2_overlap){.cluster = cluster};
}

/* The first overlap in [at, at + len), or NULL. */
static struct qcow2_overlap *find(const struct qcow2_check *c, uint64_t at, uint64_t len)
{
    uint64_t first = at / c->q->cluster;
    size_t low = 0, high = c->n_overlaps;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (c->overlaps[mid].cluster >= first)
            high = mid;
        else
            low = mid + 1;
    }
    struct qcow2_overlap *o = &c->overlaps[low];
    return low < c->n_overlaps && len && o->cluster * c->q->cluster < at + len ? o : NULL;
}

/* ------------------------------------------------------------------ what lies there */

static void mark(struct qcow2_check *c, uint64_t at, uint64_t len, const char *what)
{
    uint64_t end;
    if (dr_add_overflow(at, len, &end))
        return;
    for (struct qcow2_overlap *o = find(c, at, len);
         o && o < c->overlaps + c->n_overlaps && o->cluster * c->q->cluster < end; o++)
        if (!o->what)
            o->what = what;
}

static int mark_tables(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                       uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    (void)part;
    (void)at;
    (void)err;
    for (size_t i = 0; i < len; i += 8)
        if (get_be64(bytes + i) & QCOW2_OFFSET)
            mark(c, get_be64(bytes + i) & QCOW2_OFFSET, c->q->cluster, user);
    return 0;
}

static int mark_everything(struct qcow2_check *c, struct dr_error *err)
{
    const struct qcow2_header *h = &c->q->h;
    static char l2[] = "an L2 table", bits[] = "the bits of a bitmap";
    mark(c, 0, c->q->cluster, "the header");
    mark(c, h->l1_at, h->l1_entries * UINT64_C(8), "the L1 table");
    mark(c, h->reftable_at, h->reftable_clusters * c->q->cluster, "the refcount table");
    mark(c, h->snapshots_at, c->snapshots_len, "the snapshot table");
    mark(c, c->q->bitmaps_at, c->q->bitmaps_len, "the bitmap directory");
    mark(c, c->q->crypto_at, c->q->crypto_len, "the encryption header");
    for (size_t i = 1; i < c->n_l1s; i++)
        mark(c, c->l1s[i].at, c->l1s[i].len, "a snapshot's L1 table");
    for (size_t i = 0; i < c->n_bitmaps; i++)
        mark(c, c->bitmaps[i].at, c->bitmaps[i].len, "a bitmap's table");
    for (uint64_t i = 0; i < c->n_roots; i++)
        if (c->roots[i])
            mark(c, c->roots[i] & ~QCOW2_ROOT_RESERVED, c->q->cluster, "a refcount block");
    int r = qcow2_sweep(c, c->l1s, c->n_l1s, mark_tables, l2, err);
    return r < 0 ? r : qcow2_sweep(c, c->bitmaps, c->n_bitmaps, mark_tables, bits, err);
}

/* ------------------------------------------------------------------ which entries lead there */

static int name_entries(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                        uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    (void)table;
    (void)user;
    (void)err;
    for (size_t i = 0; i < len; i += c->q->entry) {
        struct qcow2_fault ignored[2];
        struct qcow2_reference ref;
        qcow2_entry_faults(c->q, bytes + i, QCOW2_NO_PLACE, ignored, &ref);
        const struct qcow2_overlap *o = ref.use == QCOW2_USE_NOTHING ? NULL
                                                                     : find(c, ref.at, ref.len);
        if (!o || !o->what)
            continue;
        c->lost = true;
        qcow2_say(c, "ERROR L2 entry at byte %llu: guest data at 0x%llx lies on %s", ULL(at + i),
                  ULL(ref.at), o->what);
    }
    return 0;
}

int qcow2_name_overlaps(struct qcow2_check *c, struct dr_error *err)
{
    settle(c);
    int r = mark_everything(c, err);
    return r < 0 ? r : qcow2_each_table(c, NULL, name_entries, NULL, err);
}
