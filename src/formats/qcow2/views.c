/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Filling what the parent shows into every view of an image: the disk and each snapshot inside it.
 *
 * All views have one parent. Before another one takes its place, what it shows is written into the
 * image once, and linked into every tree that has nothing at that offset; the counts say how many
 * these are. A view is read through an L1 table, and several L1 tables may share an L2 table:
 *
 *   L1 disk ──┐                           what is put into the hole of a shared L2 table
 *             ├─► L2 ─► clusters          is there for all that share it, so the table
 *   L1 one  ──┘                           is edited where it is, and the new cluster is
 *   L1 two  ────► nothing                 counted as often as tables lead to it
 *
 * Views without a table get a new one together. A table is copied first where views of different
 * sizes share it, because a small one must hold nothing behind its end, and where its count is
 * higher than the views tell, as a crash may leave it: something unknown might lead there, too.
 * The disk is the first to get the copy: what it leaves to snapshots needs no COPIED, so COPIED
 * goes with the counts at any time. For the same reason sub-clusters are filled where their cluster
 * is, if no other view holds anything there: else the disk might be the only one that stays.
 *
 * Nothing that a view shows changes at any time. Counts and data are durable before the entries
 * that need them (invariants 1 and 5), so a crash leaves counts that are too high. */
#include "formats/qcow2/snapshot.h"

#include "base/cleanup.h"

/* What one step keeps pinned or frees at most: L1 entries of a new table, L2 entries of a new
 * cluster, ways to a place that is given up. */
#define MAX_AT_ONCE 512u
/* A step looks at an L1 entry and an L2 entry of every view together, and has their pages in memory
 * meanwhile: 32 MiB for so many views with tables of their own. The time grows with the square. */
#define MAX_VIEWS 4096u
/* Clusters that one question looks at. */
#define MAX_LOOK 512u

struct view {
    uint64_t l1_at, size;
};

struct qcow2_views {
    struct view *list; /* the disk is the first */
    size_t n;
    bool recount; /* the disk may be the only one left that leads to something */
};

/* A view's L1 entry for the span at hand. */
struct sharer {
    uint64_t link, table, end; /* end: guest offset, of the view or of the span */
    bool disk;
};

/* Views with the same L2 table that end at the same offset: what one of them gets all may have. */
struct class
{
    uint64_t table, end;
    size_t first, n; /* of the sharers */
};

struct fill {
    struct dr_image *image;
    struct qcow2 *q;
    struct qcow2_views *views;
    uint64_t span; /* guest offset where the span of one L2 table begins */
    uint64_t off, len;
    struct sharer *sharers;
    struct class *classes;
    size_t n_sharers, n_classes;
};

/* ------------------------------------------------------------------ which views there are */

void qcow2_views_free(struct qcow2 *q)
{
    if (!q->views)
        return;
    free(q->views->list);
    free(q->views);
    q->views = NULL;
}

/* QEMU reads the parent where a snapshot's L1 table is too short; here that cannot be shown. */
static int add_view(struct dr_image *image, const struct qcow2_snapshot *s, struct dr_error *err)
{
    struct qcow2_views *v = qcow2_of(image)->views;
    uint64_t span = qcow2_l2_span(qcow2_of(image));
    int r = qcow2_snapshot_check_l1(image, s, err);
    if (r == 0 && dr_div_up(s->info.size, span) > s->l1_entries)
        r = dr_fail(err, EIO,
                    "%s: the L1 table of a snapshot, at byte %llu, has %llu entries, too few for "
                    "its %llu bytes",
                    image->path, ULL(s->l1_at), ULL(s->l1_entries), ULL(s->info.size));
    if (r == 0)
        v->list[v->n++] = (struct view){s->l1_at, s->info.size};
    return r;
}

int qcow2_views_begin(struct dr_image *image, struct dr_views *all, struct dr_error *err)
{
    CLEANUP_SNAPSHOTS struct qcow2_snapshots t = {0};
    struct qcow2 *q = qcow2_of(image);
    if (qcow2_has_data_file(q)) /* each cluster has one place there: no two views can differ */
        return dr_fail(err, ENOTSUP,
                       "%s: has its data in another file, so it cannot keep what snapshots inside "
                       "it show; `drover check` says more",
                       image->path);
    int r = qcow2_snapshots_load(image, &t, err);
    if (r < 0)
        return r;
    if (t.n >= MAX_VIEWS)
        return dr_fail(
            err, ENOTSUP,
            "%s: has %u snapshots inside, each of which would have to keep what it shows; "
            "no more than %u can. Delete some first",
            image->path, t.n, MAX_VIEWS - 1);
    *all = (struct dr_views){image->size, qcow2_l2_span(q), q->cluster};
    q->views = calloc(1, sizeof(*q->views));
    if (q->views)
        q->views->list = calloc((size_t)t.n + 1, sizeof(struct view));
    if (!q->views || !q->views->list)
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    else
        q->views->list[q->views->n++] = (struct view){q->h.l1_at, image->size};
    for (uint32_t i = 0; r == 0 && i < t.n; i++) {
        r = add_view(image, &t.list[i], err);
        all->size = dr_max(all->size, t.list[i].info.size);
    }
    if (r < 0)
        qcow2_views_free(q);
    return r;
}

int qcow2_views_end(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_tree disk = {q->h.l1_at, q->h.l1_entries};
    int r = q->views->recount ? qcow2_tree_recount(image, &disk, err) : 0;
    DR_LOCK_SCOPE(&image->lock);
    qcow2_views_free(q);
    return r;
}

/* ------------------------------------------------------------------ what they have in a span */

static int by_table(const void *a, const void *b)
{
    const struct sharer *p = a, *q = b;
    if (p->table != q->table)
        return p->table < q->table ? -1 : 1;
    return p->end < q->end ? -1 : p->end > q->end;
}

/* [page] The L1 entries of all views for the span, and the classes that they form. */
static int gather(struct fill *f, struct dr_error *err)
{
    uint64_t width = qcow2_l2_span(f->q);
    f->n_sharers = f->n_classes = 0;
    for (size_t i = 0; i < f->views->n; i++) {
        const struct view disk = {f->q->h.l1_at, f->image->size};
        const struct view *v = i == 0 ? &disk : &f->views->list[i];
        uint64_t link = v->l1_at + 8 * (f->span / width);
        struct dr_page *page;
        if (v->size <= f->span)
            continue;
        int r = qcow2_get_table_page(f->image, link, 8, &page, err);
        if (r < 0)
            return r;
        uint64_t entry = get_be64(dr_page_at(page, link));
        r = qcow2_check_l1_entry(f->image, link, entry, err);
        if (r < 0)
            return r;
        f->sharers[f->n_sharers++] =
            (struct sharer){link, entry & QCOW2_OFFSET, dr_min(v->size, f->span + width), i == 0};
    }
    qsort(f->sharers, f->n_sharers, sizeof(*f->sharers), by_table);
    for (size_t i = 0; i < f->n_sharers; i++) {
        if (i == 0 || by_table(&f->sharers[i - 1], &f->sharers[i]) != 0)
            f->classes[f->n_classes++] =
                (struct class){f->sharers[i].table, f->sharers[i].end, i, 0};
        f->classes[f->n_classes - 1].n++;
    }
    return 0;
}

static int fill_init(struct fill *f, struct dr_image *image, uint64_t off, uint64_t len)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t span = dr_round_down(off, qcow2_l2_span(q));
    *f = (struct fill){
        .image = image, .q = q, .views = q->views, .span = span, .off = off, .len = len};
    f->sharers = calloc(q->views->n, sizeof(*f->sharers));
    f->classes = calloc(q->views->n, sizeof(*f->classes));
    return f->sharers && f->classes ? 0 : -ENOMEM;
}

static void fill_free(struct fill *f)
{
    free(f->sharers);
    free(f->classes);
}
#define CLEANUP_FILL __attribute__((cleanup(fill_free)))

/* [page] The entry of a class for the cluster at off. *hole: its sub-clusters that show the parent.
 */
static int read_entry(struct fill *f, const struct class *c, uint64_t off, struct qcow2_entry *e,
                      uint32_t *hole, struct dr_error *err)
{
    struct dr_page *page;
    uint64_t at = qcow2_entry_at(f->q, c->table, off);
    *hole = 0;
    int r = qcow2_get_table_page(f->image, at, f->q->entry, &page, err);
    if (r == 0)
        r = qcow2_read_entry(f->image, page, at, off, e, err);
    if (r == 0 && !e->coded)
        *hole = qcow2_all_subs(f->q) & ~(e->held | e->zero);
    return r;
}

/* [page] Does a view show the parent in the cluster at off? */
static int any_hole(struct fill *f, uint64_t off, bool *any, struct dr_error *err)
{
    *any = false;
    for (size_t i = 0; !*any && i < f->n_classes; i++) {
        const struct class *c = &f->classes[i];
        struct qcow2_entry e;
        uint32_t hole = 0;
        int r = c->table && c->end > off ? read_entry(f, c, off, &e, &hole, err) : 0;
        if (r < 0)
            return r;
        *any = hole || (!c->table && c->end > off);
    }
    return 0;
}

int qcow2_views_hole(struct dr_image *image, uint64_t off, uint64_t *len, bool *hole,
                     struct dr_error *err)
{
    CLEANUP_FILL struct fill f = {0};
    uint64_t cluster = qcow2_of(image)->cluster, end = off + *len;
    bool same;
    int r = fill_init(&f, image, off, *len);
    if (r == 0)
        r = gather(&f, err);
    if (r == 0)
        r = any_hole(&f, dr_round_down(off, cluster), hole, err);
    if (r < 0)
        return r;
    end = dr_min(end, f.span + qcow2_l2_span(f.q));
    uint64_t at = dr_round_down(off, cluster) + cluster;
    for (unsigned n = 0; at < end && n < MAX_LOOK; n++, at += cluster) {
        r = any_hole(&f, at, &same, err);
        if (r < 0)
            return r;
        if (same != *hole)
            break;
    }
    *len = dr_min(at, end) - off;
    return 0;
}

/* ------------------------------------------------------------------ tables of their own */

/* [page] Is something of what is to be filled a hole in the class? */
static int wants(struct fill *f, const struct class *c, bool *yes, struct dr_error *err)
{
    *yes = false;
    for (uint64_t off = f->off; !*yes && off < dr_min(f->off + f->len, c->end);
         off += f->q->cluster) {
        struct qcow2_entry e;
        uint32_t hole = UINT32_MAX;
        int r = c->table ? read_entry(f, c, off, &e, &hole, err) : 0;
        if (r < 0)
            return r;
        *yes = hole;
    }
    return 0;
}

/* [page] May the table of the class be edited? All that lead to it are in the class. */
static int is_own(struct fill *f, const struct class *c, bool *own, struct dr_error *err)
{
    uint64_t count, known = 0;
    *own = false;
    if (!c->table)
        return 0;
    for (size_t i = 0; i < f->n_classes; i++)
        known += f->classes[i].table == c->table ? f->classes[i].n : 0;
    int r = qcow2_count(f->image, c->table, &count);
    (void)err;
    if (r == 0 && count < known)
        return qcow2_damage(f->image, "the L2 table at byte %llu is used %llu times, counted %llu",
                            ULL(c->table), ULL(known), ULL(count));
    *own = r == 0 && count == c->n;
    return r;
}

/* [page] Pin each count of the place n times, for as many calls of qcow2_free_later. */
static int pin_often(struct dr_image *image, uint64_t host, uint64_t len, size_t n)
{
    int r = dr_free_ahead(image, n);
    for (size_t i = 0; r == 0 && i < n; i++) {
        r = qcow2_pin_counts(image, host, len);
        for (; r < 0 && i > 0; i--)
            qcow2_unpin_counts(image, host, len);
    }
    return r;
}

static void free_often(struct dr_image *image, uint64_t host, uint64_t len, size_t n)
{
    for (size_t i = 0; i < n; i++)
        qcow2_free_later(image, host, len);
}

/* The sharers of the class lead to the new table at `fresh`. Their L1 entries are the first pins.
 */
static void link_class(struct fill *f, struct class *c, uint64_t fresh, struct dr_reservation *pins)
{
    for (size_t i = 0; i < c->n; i++) {
        struct sharer *s = &f->sharers[c->first + i];
        uint8_t raw[8];
        put_be64(raw, fresh | (c->n == 1 && s->disk ? QCOW2_COPIED : 0));
        dr_page_put(f->image, dr_reserved_pin(pins, (unsigned)i)->page, s->link, raw, sizeof(raw));
        s->table = fresh;
    }
    qcow2_guard(f->q, fresh);
    c->table = fresh;
}

/* [page] A new table for the class: empty, or a copy of the one that it has. */
static int give_table(struct fill *f, struct class *c, struct dr_error *err)
{
    struct dr_reservation pins = {0};
    struct dr_page *page;
    uint64_t fresh, old = c->table, cluster = f->q->cluster;
    bool old_pinned = false;
    int r = old ? dr_page_get_all(f->image, 0, old, cluster) : 0;
    if (r == 0)
        r = qcow2_find_free(f->image, 1, &fresh, err);
    for (size_t i = 0; r == 0 && i < c->n; i++)
        r = dr_reserve_page(f->image, &pins, 0, f->sharers[c->first + i].link, 8, QCOW2_LEVEL_L1,
                            &page);
    if (r == 0)
        r = qcow2_reserve_counts(f->image, &pins, fresh, cluster);
    if (r == 0 && old) /* by the reservation, too, which sees if its pins exclude each other */
        r = qcow2_reserve_counts(f->image, &pins, old, cluster);
    if (r == 0 && old) {
        r = pin_often(f->image, old, cluster, c->n);
        old_pinned = r == 0;
    }
    if (r == 0)
        r = qcow2_write_table(f->image, fresh, old);
    if (r == 0) {
        qcow2_add(f->image, fresh, cluster, (int)c->n);
        link_class(f, c, fresh, &pins);
        if (old)
            free_often(f->image, old, cluster, c->n);
        f->views->recount |= old != 0;
    }
    for (size_t i = 0; r < 0 && old_pinned && i < c->n; i++)
        qcow2_unpin_counts(f->image, old, cluster);
    dr_reserve_unpin(f->image, &pins);
    return r;
}

/* The disk is the first that leaves a table: its L1 entry says by COPIED whether it is the only
 * one, and must not be what is left when the others have gone. */
static void disk_first(const struct fill *f, struct class *c)
{
    for (size_t i = 0; c->table && i < f->n_sharers; i++)
        if (f->sharers[i].disk && f->sharers[i].table == c->table)
            *c = (struct class){c->table, f->sharers[i].end, i, 1};
}

/* [page] Every class that gets something has a table that may be edited. */
static int give_tables(struct fill *f, struct dr_error *err)
{
    int r = qcow2_ready_to_write(f->image, err);
    if (r == 0)
        r = gather(f, err);
    for (size_t i = 0; r == 0 && i < f->n_classes; i++) {
        struct class c = f->classes[i];
        bool yes = false, own = true;
        r = wants(f, &c, &yes, err);
        if (r == 0 && yes)
            r = is_own(f, &c, &own, err);
        if (r < 0 || own)
            continue;
        disk_first(f, &c);
        c.n = (size_t)dr_min(dr_min(c.n, MAX_AT_ONCE), qcow2_max_count(f->q));
        r = give_table(f, &c, err);
        if (r == 0)
            r = gather(f, err);
        i = SIZE_MAX; /* the classes are other ones: begin again */
    }
    return r;
}

/* ------------------------------------------------------------------ clusters */

/* Entries that are alike in several classes, and become alike. */
struct group {
    size_t of[MAX_AT_ONCE]; /* classes */
    size_t n;
    uint64_t times; /* how many tables lead there, each as often as it is shared */
    uint64_t off;   /* guest offset of the cluster */
    size_t valid;   /* bytes of it in front of the end of these views */
    struct qcow2_entry old;
    uint32_t hole;
    uint64_t host; /* where the bytes go; QCOW2_NO_PLACE: nowhere, they are zeros */
    bool fresh;    /* that is a new place */
    bool moves;    /* which takes what the old one holds, too */
    struct dr_reservation pins;
};

static bool alike(const struct qcow2_entry *a, const struct qcow2_entry *b)
{
    return a->host == b->host && a->held == b->held && a->zero == b->zero;
}

/* [page] The first class with a hole in the cluster, and all that are like it. n = 0: none. */
static int find_group(struct fill *f, uint64_t off, struct group *g, struct dr_error *err)
{
    g->n = 0;
    g->times = 0;
    g->off = off;
    for (size_t i = 0; i < f->n_classes && g->n < MAX_AT_ONCE; i++) {
        const struct class *c = &f->classes[i];
        struct qcow2_entry e;
        uint32_t hole = 0;
        int r = c->end > off ? read_entry(f, c, off, &e, &hole, err) : 0;
        if (r < 0)
            return r;
        size_t valid = hole ? (size_t)dr_min(c->end - off, f->q->cluster) : 0;
        if (!hole || (g->n > 0 && (valid != g->valid || !alike(&e, &g->old))))
            continue;
        if (g->n > 0 && g->times + c->n > qcow2_max_count(f->q))
            break;
        g->old = e;
        g->hole = hole;
        g->valid = valid;
        g->times += c->n;
        g->of[g->n++] = i;
    }
    return 0;
}

/* [page] May the holes be written to where the cluster is? All that lead there are views, of which
 * none outside the group holds anything in the holes. */
static int may_stay(struct fill *f, const struct group *g, uint64_t count, bool *stay,
                    struct dr_error *err)
{
    uint64_t known = 0;
    uint32_t held = 0;
    *stay = false;
    for (size_t i = 0, k = 0; i < f->n_classes; i++) {
        const struct class *c = &f->classes[i];
        bool member = k < g->n && g->of[k] == i;
        struct qcow2_entry e = {0};
        uint32_t hole = 0;
        k += member;
        if (!c->table || c->end <= g->off)
            continue;
        int r = read_entry(f, c, g->off, &e, &hole, err);
        if (r < 0)
            return r;
        if (e.coded || e.host != g->host)
            continue;
        known += c->n;
        held |= member ? 0 : e.held;
    }
    *stay = known == count && !(held & g->hole);
    return 0;
}

/* [page] Where the bytes go. What the cluster holds stays there if nobody else can see what is
 * written to its holes; else the group leaves it. */
static int find_host(struct fill *f, struct group *g, bool zeros, struct dr_error *err)
{
    struct dr_image *image = f->image;
    uint64_t count;
    int r = 0;
    g->host = g->old.host;
    g->fresh = g->moves = false;
    if (zeros && f->q->h.version >= 3) {
        g->host = QCOW2_NO_PLACE;
        return 0;
    }
    if (g->host != QCOW2_NO_PLACE) {
        r = qcow2_count(image, g->host, &count);
        if (r == 0 && count < g->times)
            return qcow2_damage(image, "the cluster at byte %llu is used %llu times, counted %llu",
                                ULL(g->host), ULL(g->times), ULL(count));
        bool stay = false;
        if (r == 0)
            r = may_stay(f, g, count, &stay, err);
        if (r < 0 || stay)
            return r;
        g->moves = true;
    }
    g->fresh = true;
    return qcow2_find_free(image, 1, &g->host, err);
}

/* [page] From here on only the writing of the bytes can fail. */
static int reserve_group(struct fill *f, struct group *g, bool zeros, struct dr_error *err)
{
    struct dr_image *image = f->image;
    struct dr_page *page;
    uint64_t cluster = f->q->cluster;
    g->pins = (struct dr_reservation){0};
    int r = find_group(f, g->off, g, err);
    if (r == 0 && g->n > 0)
        r = find_host(f, g, zeros, err);
    for (size_t i = 0; r == 0 && i < g->n; i++) {
        uint64_t at = qcow2_entry_at(f->q, f->classes[g->of[i]].table, g->off);
        r = dr_reserve_page(image, &g->pins, 0, at, f->q->entry, QCOW2_LEVEL_L2, &page);
    }
    if (r == 0 && g->n > 0 && g->fresh)
        r = qcow2_reserve_counts(image, &g->pins, g->host, cluster);
    if (r == 0 && g->n > 0 && g->moves)
        r = qcow2_reserve_counts(image, &g->pins, g->old.host, cluster);
    if (r == 0 && g->n > 0 && g->moves)
        r = pin_often(image, g->old.host, cluster, (size_t)g->times);
    if (r == 0 && g->n > 0 && g->fresh)
        qcow2_add(image, g->host, cluster, (int)g->times);
    if (r < 0)
        dr_reserve_unpin(image, &g->pins);
    return r;
}

/* The holes' bytes, and with a new place all others; zeros behind the end of the views. */
static int write_group(struct fill *f, const struct group *g, const uint8_t *buf,
                       struct dr_error *err)
{
    const struct qcow2 *q = f->q;
    CLEANUP_FREE uint8_t *bytes = calloc(1, q->cluster);
    int r = 0;
    if (g->host == QCOW2_NO_PLACE)
        return 0;
    if (!bytes)
        return dr_fail_errno(err, ENOMEM, "%s", f->image->path);
    if (buf)
        memcpy(bytes, buf, g->valid);
    for (unsigned i = 0; r == 0 && i < q->subs; i++) {
        uint64_t at = i * q->sub;
        bool hole = g->hole >> i & 1;
        if (g->moves && (g->old.held >> i & 1))
            r = dr_file_pread(f->image->files[0], bytes + at, g->old.host + at, q->sub, err);
        else if (!g->fresh && hole)
            r = dr_file_pwrite(f->image->files[0], bytes + at, g->host + at, q->sub, err);
    }
    if (r == 0 && g->fresh)
        r = dr_file_pwrite(f->image->files[0], bytes, g->host, q->cluster, err);
    return r;
}

/* image->lock held. */
static void publish_group(struct fill *f, struct group *g)
{
    const struct qcow2 *q = f->q;
    for (size_t i = 0; i < g->n; i++) {
        uint64_t at = qcow2_entry_at(q, f->classes[g->of[i]].table, g->off);
        struct dr_page *page = dr_reserved_pin(&g->pins, (unsigned)i)->page;
        struct qcow2_entry e;
        uint8_t raw[16];
        qcow2_entry_decode(q, dr_page_at(page, at), g->off, &e); /* COPIED is each one's own */
        if (g->host == QCOW2_NO_PLACE)
            e.zero |= g->hole;
        else
            e.held |= g->hole;
        if (g->fresh) {
            e.host = g->host;
            e.copied = g->times == 1;
        }
        qcow2_entry_encode(q, &e, raw);
        dr_page_put(f->image, page, at, raw, q->entry);
    }
    if (g->moves) {
        free_often(f->image, g->old.host, q->cluster, (size_t)g->times);
        f->views->recount = true;
    }
    dr_reserve_unpin(f->image, &g->pins);
}

/* image->lock held. */
static void cancel_group(struct fill *f, struct group *g)
{
    uint64_t cluster = f->q->cluster;
    for (uint64_t i = 0; g->moves && i < g->times; i++)
        qcow2_unpin_counts(f->image, g->old.host, cluster);
    if (g->fresh) {
        qcow2_add(f->image, g->host, cluster, -(int)g->times);
        qcow2_note_free(f->q, g->host, cluster);
    }
    dr_reserve_unpin(f->image, &g->pins);
}

static int with_pages(struct fill *f, struct group *g, bool zeros, struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&f->image->lock);
    do {
        r = g ? reserve_group(f, g, zeros, err) : give_tables(f, err);
    } while (r == -EAGAIN && (r = dr_image_satisfy(f->image, &hold, f->off, err)) == 0);
    dr_hold_end(&hold);
    return r;
}

/* buf: the cluster's bytes, or NULL. */
static int fill_cluster(struct fill *f, struct group *g, uint64_t off, const uint8_t *buf,
                        struct dr_error *err)
{
    bool zeros = !buf || dr_is_zero(buf, f->q->cluster);
    for (;;) {
        g->off = off;
        int r = with_pages(f, g, zeros, err);
        if (r < 0 || g->n == 0)
            return r;
        r = write_group(f, g, zeros ? NULL : buf, err);
        DR_LOCK_SCOPE(&f->image->lock);
        if (r < 0) {
            cancel_group(f, g);
            return r;
        }
        publish_group(f, g);
    }
}

int qcow2_views_fill(struct dr_image *image, const void *buf, uint64_t off, uint64_t len,
                     struct dr_error *err)
{
    CLEANUP_FILL struct fill f = {0};
    uint64_t cluster = qcow2_of(image)->cluster;
    CLEANUP_FREE struct group *g = malloc(sizeof(*g));
    int r = fill_init(&f, image, off, len);
    if (r < 0 || !g)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    r = with_pages(&f, NULL, false, err);
    for (uint64_t at = off; r == 0 && at < off + len; at += cluster)
        r = fill_cluster(&f, g, at, buf ? (const uint8_t *)buf + (at - off) : NULL, err);
    return r;
}
