/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* All that one L1 table leads to, walked table by table with the pages that the core loads. A table
 * that several L1 tables share counts what is below it once for each of them, so every walk goes
 * through all tables of its tree.
 *
 * Neighbours in the file that follow each other in the table are counted together, and a walk waits
 * for the disk only when too many dirty pages have gathered. */
#include "formats/qcow2/snapshot.h"

#include "base/cleanup.h"

#define MAX_FREED 1024u /* ranges that wait for a flush, and keep pages in memory */

struct walk {
    struct dr_image *image;
    struct qcow2 *q;
    const struct qcow2_tree *tree;
    /* [page] Do what is to be done for w->table; called again after -EAGAIN, goes on then. */
    int (*step)(struct walk *w, struct dr_error *err);

    /* counting */
    int diff;
    enum qcow2_shift how;
    bool guard;           /* refuse entries that lead to a table */
    bool frees;           /* what has lost its last way is freed */
    bool revives;         /* what is counted 0 times is counted once, and freed */
    uint64_t done, limit; /* clusters counted; stop after so many */
    size_t n_freed;       /* since the last flush */
    /* COPIED */
    uint64_t *marks; /* tables with an entry that has COPIED (share), or has not */
    bool share;
    bool recount; /* set it as the counts say, else clear it */
    bool own;     /* in the L1 entries, too */

    uint64_t i;           /* the L1 entry at hand */
    uint64_t link, table; /* where it stands, and its L2 table */
    uint64_t entry;       /* next entry of that */
    bool table_counted;
    uint64_t first, n; /* clusters that are gathered and not counted yet */
};

/* ------------------------------------------------------------------ going through the tables */

static int no_room(const struct walk *w, uint64_t cluster, struct dr_error *err)
{
    return dr_fail(err, EINVAL,
                   "%s: the cluster at byte %llu is used as often as its count of %u bits can "
                   "tell (%llu times); an image with more refcount_bits can have a snapshot",
                   w->image->path, ULL(cluster * w->q->cluster), 1u << w->q->h.refcount_order,
                   ULL(qcow2_max_count(w->q)));
}

/* [page] */
static int read_link(struct walk *w, struct dr_error *err)
{
    struct dr_page *page;
    w->link = w->tree->l1_at + 8 * w->i;
    int r = dr_page_get(w->image, 0, w->link, &page);
    if (r < 0)
        return r;
    uint64_t v = get_be64(dr_page_at(page, w->link));
    w->table = v & QCOW2_OFFSET;
    return qcow2_check_l1_entry(w->image, w->link, v, err);
}

static int walk_table(struct walk *w, struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&w->image->lock);
    w->entry = 0;
    w->table_counted = false;
    do {
        r = read_link(w, err);
        if (r == 0 && w->table)
            r = w->step(w, err);
    } while (r == -EAGAIN && (r = dr_image_satisfy(w->image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    return r == -EOVERFLOW ? no_room(w, w->first, err) : r;
}

/* Too many dirty pages, or too much that waits to be free: both go with a flush. */
static int relieve(struct walk *w, struct dr_error *err)
{
    if (w->n_freed < MAX_FREED)
        return dr_image_relieve(w->image, err);
    w->n_freed = 0;
    return dr_image_flush(w->image, err);
}

static int walk_tree(struct walk *w, struct dr_error *err)
{
    int r = 0;
    w->q = qcow2_of(w->image);
    for (w->i = 0; r == 0 && w->i < w->tree->entries && w->done < w->limit; w->i++) {
        r = walk_table(w, err);
        if (r == 0 && w->table)
            r = relieve(w, err);
    }
    return r;
}

/* ------------------------------------------------------------------ counting */

/* Guest offset of an entry of the table at hand. */
static uint64_t guest_offset(const struct walk *w, uint64_t entry)
{
    return w->i * qcow2_l2_span(w->q) + entry * w->q->cluster;
}

/* The clusters that an entry leads to; none: *n = 0. */
static int entry_clusters(struct walk *w, const struct dr_page *page, uint64_t at, uint64_t *first,
                          uint64_t *n, struct dr_error *err)
{
    const struct qcow2 *q = w->q;
    struct qcow2_entry e;
    int r = qcow2_read_entry(w->image, page, at, guest_offset(w, w->entry), &e, err);
    *n = 0;
    if (r < 0 || e.host == QCOW2_NO_PLACE)
        return r;
    *first = e.host / q->cluster;
    *n = e.coded ? (e.host + e.coded - 1) / q->cluster - *first + 1 : 1;
    const char *taken = w->guard ? qcow2_guarded(q, e.host, e.coded ? e.coded : q->cluster) : NULL;
    return !taken ? 0
                  : qcow2_damage(w->image, "the L2 entry at byte %llu leads to byte %llu, in %s",
                                 ULL(at), ULL(e.host), taken);
}

/* [page] Entries from w->entry on whose clusters follow each other. */
static int gather(struct walk *w, struct dr_error *err)
{
    const struct qcow2 *q = w->q;
    struct dr_page *page = NULL;
    uint64_t begin = w->entry;
    w->n = 0;
    for (; w->entry < q->l2_entries; w->entry++) {
        uint64_t at = w->table + w->entry * q->entry, first = 0, n = 0;
        int r = page && at % DR_PAGE_SIZE ? 0 : dr_page_get(w->image, 0, at, &page);
        if (r == 0)
            r = entry_clusters(w, page, at, &first, &n, err);
        if (r < 0) {
            w->n = 0;
            w->entry = begin;
            return r;
        }
        if (n > 0 && w->n > 0 && first != w->first + w->n)
            break;
        if (n > 0 && w->n == 0)
            w->first = first;
        w->n += n;
    }
    return 0;
}

/* [page] The clusters that are gathered have no other way. */
static int free_last(struct walk *w, uint64_t *done)
{
    const struct qcow2 *q = w->q;
    int r = qcow2_count_sole(w->image, w->first, w->n, done);
    if (r == 0)
        r = dr_free_ahead(w->image, 1);
    if (r == 0)
        r = qcow2_pin_counts(w->image, w->first * q->cluster, *done * q->cluster);
    if (r < 0)
        return r;
    qcow2_free_later(w->image, w->first * q->cluster, *done * q->cluster);
    w->n_freed++;
    return 0;
}

/* [page] Of the clusters that are gathered those that nothing leads to any more. */
static int free_uncounted(struct walk *w, uint64_t *done)
{
    const struct qcow2 *q = w->q;
    bool revived = false;
    int r = dr_free_ahead(w->image, 1);
    if (r == 0)
        r = qcow2_revive_counts(w->image, w->first, w->n, done, &revived);
    if (r < 0 || !revived)
        return r;
    qcow2_free_later(w->image, w->first * q->cluster, *done * q->cluster);
    w->n_freed++;
    return 0;
}

/* [page] */
static int count_gathered(struct walk *w, struct dr_error *err)
{
    while (w->n > 0 && w->done < w->limit) {
        uint64_t done = 0, n = dr_min(w->n, w->limit - w->done);
        int r = w->revives ? free_uncounted(w, &done)
                           : qcow2_shift_counts(w->image, w->first, n, w->diff, w->how, &done);
        if (r == 0 && done == 0 && w->frees)
            r = free_last(w, &done);
        if (r == 0 && done == 0)
            r = dr_fail(err, EIO, "%s: the count of the cluster at byte %llu went down meanwhile",
                        w->image->path, ULL(w->first * w->q->cluster));
        if (r < 0)
            return r;
        w->first += done;
        w->n -= done;
        w->done += done;
    }
    return 0;
}

/* Entries first: while they are read the table must not be free. */
static int count_step(struct walk *w, struct dr_error *err)
{
    const struct qcow2 *q = w->q;
    int r = count_gathered(w, err);
    if (r == 0 && w->entry < q->l2_entries)
        r = dr_page_get_all(w->image, 0, w->table, q->cluster);
    while (r == 0 && w->entry < q->l2_entries && w->done < w->limit) {
        r = gather(w, err);
        if (r == 0)
            r = count_gathered(w, err);
    }
    if (r < 0 || w->table_counted || w->done == w->limit)
        return r;
    w->table_counted = true;
    w->first = w->table / q->cluster;
    w->n = 1;
    return count_gathered(w, err);
}

int qcow2_tree_check(struct dr_image *image, const struct qcow2_tree *tree, bool raise,
                     struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = count_step, .limit = UINT64_MAX};
    w.diff = raise;
    w.guard = true; /* and only look */
    return walk_tree(&w, err);
}

int qcow2_tree_raise(struct dr_image *image, const struct qcow2_tree *tree, uint64_t *raised,
                     struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = count_step, .limit = UINT64_MAX};
    w.diff = 1;
    w.how = QCOW2_SHIFT_CHANGE;
    int r = walk_tree(&w, err);
    *raised = w.done;
    return r;
}

int qcow2_tree_unraise(struct dr_image *image, const struct qcow2_tree *tree, uint64_t raised,
                       struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = count_step, .limit = raised};
    w.diff = -1;
    w.how = QCOW2_SHIFT_CHANGE;
    return walk_tree(&w, err);
}

int qcow2_tree_lose(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = count_step, .limit = UINT64_MAX};
    w.diff = -1;
    w.how = QCOW2_SHIFT_CHANGE;
    w.frees = true;
    return walk_tree(&w, err);
}

int qcow2_tree_lower(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = count_step, .limit = UINT64_MAX};
    w.diff = -1;
    w.how = QCOW2_SHIFT_TO_ZERO;
    return walk_tree(&w, err);
}

int qcow2_tree_free(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = count_step, .limit = UINT64_MAX};
    w.revives = true;
    return walk_tree(&w, err);
}

/* ------------------------------------------------------------------ COPIED */

/* [page] What COPIED is to be of something at host. */
static int wanted(struct walk *w, uint64_t host, uint64_t *flag)
{
    uint64_t count = 0;
    int r = w->recount ? qcow2_count(w->image, host, &count) : 0;
    *flag = count == 1 ? QCOW2_COPIED : 0;
    if (r == 0 && w->recount && count == 0)
        r = qcow2_damage(w->image, "the disk has the cluster at byte %llu, and no count of it",
                         ULL(host));
    return r;
}

/* [page] */
static int put_changed(struct walk *w, struct dr_page *page, uint64_t at, const uint8_t *raw,
                       size_t len, unsigned level)
{
    int r = dr_page_pin(w->image, page, at, len, level);
    if (r < 0)
        return r;
    dr_page_put(w->image, page, at, raw, len);
    dr_page_unpin(w->image, page, at, len);
    return 0;
}

/* [page] */
static int flag_link(struct walk *w, uint64_t flag)
{
    struct dr_page *page;
    uint8_t raw[8];
    int r = dr_page_get(w->image, 0, w->link, &page);
    if (r < 0)
        return r;
    uint64_t v = get_be64(dr_page_at(page, w->link)), fresh = (v & ~QCOW2_COPIED) | flag;
    put_be64(raw, fresh);
    return v == fresh ? 0 : put_changed(w, page, w->link, raw, sizeof(raw), QCOW2_LEVEL_L1);
}

/* [page] The sector of the table at w->entry. */
static int flag_sector(struct walk *w)
{
    const struct qcow2 *q = w->q;
    uint64_t at = w->table + w->entry * q->entry;
    uint8_t raw[512];
    struct dr_page *page;
    bool changed = false;
    int r = dr_page_get(w->image, 0, at, &page);
    if (r < 0)
        return r;
    memcpy(raw, dr_page_at(page, at), sizeof(raw));
    for (size_t i = 0; i < sizeof(raw); i += q->entry) {
        uint64_t v = get_be64(raw + i), flag;
        if (!(v & QCOW2_OFFSET) || (v & QCOW2_CODED))
            continue;
        if ((r = wanted(w, v & QCOW2_OFFSET, &flag)) < 0)
            return r;
        changed |= (v & QCOW2_COPIED) != flag;
        put_be64(raw + i, (v & ~QCOW2_COPIED) | flag);
    }
    if (changed)
        r = put_changed(w, page, at, raw, sizeof(raw), QCOW2_LEVEL_L2);
    if (r == 0)
        w->entry += sizeof(raw) / q->entry;
    return r;
}

static int flag_step(struct walk *w, struct dr_error *err)
{
    const struct qcow2 *q = w->q;
    uint64_t flag;
    int r = wanted(w, w->table, &flag);
    (void)err;
    if (r == 0 && w->own)
        r = flag_link(w, flag);
    if (r < 0 || (w->recount && !flag)) /* below a shared table nothing is the only one */
        return r;
    r = dr_page_get_all(w->image, 0, w->table, q->cluster);
    while (r == 0 && w->entry < q->l2_entries)
        r = flag_sector(w);
    return r;
}

/* [page] */
static int mark_step(struct walk *w, struct dr_error *err)
{
    const struct qcow2 *q = w->q;
    struct dr_page *page = NULL;
    int r = dr_page_get_all(w->image, 0, w->table, q->cluster);
    (void)err;
    for (uint64_t i = 0; r == 0 && !w->marks[w->i] && i < q->l2_entries; i++) {
        uint64_t at = w->table + i * q->entry;
        if (!page || at % DR_PAGE_SIZE == 0)
            r = dr_page_get(w->image, 0, at, &page);
        uint64_t v = r == 0 ? get_be64(dr_page_at(page, at)) : 0;
        if ((v & QCOW2_OFFSET) && !(v & QCOW2_CODED) && !(v & QCOW2_COPIED) != w->share)
            w->marks[w->i] = w->table;
    }
    return r;
}

int qcow2_tree_mark(struct dr_image *image, const struct qcow2_tree *tree, bool share,
                    uint64_t *tables, struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = mark_step, .limit = UINT64_MAX};
    w.marks = tables;
    w.share = share;
    return walk_tree(&w, err);
}

int qcow2_tree_share(struct dr_image *image, const struct qcow2_tree *tree, bool own,
                     struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = flag_step, .limit = UINT64_MAX};
    w.own = own;
    return walk_tree(&w, err);
}

int qcow2_tree_recount(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err)
{
    struct walk w = {.image = image, .tree = tree, .step = flag_step, .limit = UINT64_MAX};
    w.own = true;
    w.recount = true;
    return walk_tree(&w, err);
}
