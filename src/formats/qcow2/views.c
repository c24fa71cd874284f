/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The views of an image: which there are, what they have in a span, and where the parent shows. */
#include "formats/qcow2/views.h"

#include "base/cleanup.h"

/* Clusters that one question looks at: the bits of qcow2_views.holes. */
#define MAX_LOOK 64u
#define NOTHING  UINT64_MAX

/* ------------------------------------------------------------------ which views there are */

static void span_free(struct qcow2_span *s)
{
    free(s->sharers);
    free(s->classes);
}

void qcow2_views_free(struct qcow2 *q)
{
    struct qcow2_views *v = q->views;
    if (!v)
        return;
    span_free(&v->fill);
    span_free(&v->ask);
    pthread_cond_destroy(&v->turn);
    free(v->list);
    free(v);
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
        v->list[v->n++] = (struct qcow2_view){s->l1_at, s->info.size};
    return r;
}

static int span_init(struct qcow2_span *s, size_t n)
{
    s->sharers = calloc(n, sizeof(*s->sharers));
    s->classes = calloc(n, sizeof(*s->classes));
    return s->sharers && s->classes ? 0 : -ENOMEM;
}

/* Room for n views. */
static int make_views(struct qcow2 *q, size_t n)
{
    struct qcow2_views *v = q->views = calloc(1, sizeof(*v));
    if (!v)
        return -ENOMEM;
    pthread_cond_init(&v->turn, NULL);
    v->asked = NOTHING;
    v->list = calloc(n, sizeof(*v->list));
    int r = v->list ? span_init(&v->fill, n) : -ENOMEM;
    return r < 0 ? r : span_init(&v->ask, n);
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
    *all = (struct dr_views){image->size, qcow2_l2_span(q), q->cluster};
    r = make_views(q, (size_t)t.n + 1);
    if (r < 0)
        dr_fail_errno(err, ENOMEM, "%s", image->path);
    else
        q->views->list[q->views->n++] = (struct qcow2_view){q->h.l1_at, image->size};
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

/* [page] A view's L2 table for the span; 0 where it has none. */
static int read_link(struct dr_image *image, size_t view, uint64_t span, uint64_t *table,
                     struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t l1_at = view == 0 ? q->h.l1_at : q->views->list[view].l1_at;
    uint64_t link = l1_at + 8 * (span / qcow2_l2_span(q));
    struct dr_page *page;
    int r = qcow2_get_table_page(image, link, 8, &page, err);
    if (r < 0)
        return r;
    uint64_t entry = get_be64(dr_page_at(page, link));
    *table = entry & QCOW2_OFFSET;
    return qcow2_check_l1_entry(image, link, entry, err);
}

static uint64_t end_of(const struct qcow2_views *v, const struct qcow2_span *s,
                       const struct qcow2_sharer *sharer)
{
    return dr_min(v->list[sharer->view].size, s->end);
}

static int by_table(const void *a, const void *b)
{
    const struct qcow2_sharer *p = a, *q = b;
    if (p->table != q->table)
        return p->table < q->table ? -1 : 1;
    return p->view < q->view ? -1 : p->view > q->view;
}

static int by_end(const void *a, const void *b, void *views)
{
    const struct qcow2_sharer *p = a, *q = b;
    const struct qcow2_view *list = views;
    uint64_t x = list[p->view].size, y = list[q->view].size;
    return x != y ? (x < y ? -1 : 1) : by_table(a, b);
}

/* Sharers of one table stand together, and among these those that end at the same offset. */
static void make_classes(const struct qcow2_views *v, struct qcow2_span *s)
{
    struct qcow2_sharer *list = s->sharers;
    qsort(list, s->n_sharers, sizeof(*list), by_table);
    for (size_t i = 0, n; i < s->n_sharers; i += n) {
        for (n = 1; i + n < s->n_sharers && list[i + n].table == list[i].table; n++)
            ;
        qsort_r(&list[i], n, sizeof(*list), by_end, v->list);
    }
    for (size_t i = 0; i < s->n_sharers; i++) {
        uint64_t end = end_of(v, s, &list[i]);
        size_t n = s->n_classes;
        if (n == 0 || s->classes[n - 1].table != list[i].table || s->classes[n - 1].end != end)
            s->classes[s->n_classes++] = (struct qcow2_class){list[i].table, end, (uint32_t)i, 0};
        s->classes[s->n_classes - 1].n++;
        if (list[i].view == 0)
            s->disk_class = s->n_classes - 1;
    }
}

static void begin_span(struct qcow2 *q, struct qcow2_span *s, uint64_t begin, uint64_t disk)
{
    s->begin = begin;
    s->end = begin + qcow2_l2_span(q);
    s->disk = disk;
    s->links = q->views->links;
    s->n_read = s->n_sharers = s->n_classes = s->at = 0;
    s->disk_class = SIZE_MAX;
}

int qcow2_span_look(struct dr_image *image, struct qcow2_span *s, uint64_t off,
                    struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    const struct qcow2_views *v = q->views;
    uint64_t begin = dr_round_down(off, qcow2_l2_span(q)), table = 0;
    int r = image->size > begin ? read_link(image, 0, begin, &table, err) : 0;
    if (r < 0)
        return r;
    if (s->end == 0 || s->begin != begin || s->disk != table || s->links != v->links)
        begin_span(q, s, begin, table);
    else if (s->n_read == v->n)
        return 0;
    for (; s->n_read < v->n; s->n_read++) {
        if (v->list[s->n_read].size <= begin)
            continue;
        if (qcow2_views_enough(s))
            return 1;
        r = read_link(image, s->n_read, begin, &table, err);
        if (r < 0)
            return r;
        s->sharers[s->n_sharers++] = (struct qcow2_sharer){table, (uint32_t)s->n_read};
    }
    make_classes(v, s);
    return 0;
}

int qcow2_views_entry(struct dr_image *image, const struct qcow2_class *c, uint64_t off,
                      struct qcow2_entry *e, uint32_t *hole, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_page *page;
    *hole = c->end > off && !c->table ? qcow2_all_subs(q) : 0;
    *e = (struct qcow2_entry){.host = QCOW2_NO_PLACE};
    if (c->end <= off || !c->table)
        return 0;
    uint64_t at = qcow2_entry_at(q, c->table, off);
    int r = qcow2_get_table_page(image, at, q->entry, &page, err);
    if (r == 0)
        r = qcow2_read_entry(image, page, at, off, e, err);
    if (r == 0 && !e->coded)
        *hole = qcow2_all_subs(q) & ~(e->held | e->zero);
    return r;
}

/* ------------------------------------------------------------------ where the parent shows */

/* How far the views without a table reach. They are the first classes. */
static uint64_t empty_until(const struct qcow2_span *s)
{
    uint64_t until = 0;
    for (size_t i = 0; i < s->n_classes && !s->classes[i].table; i++)
        until = s->classes[i].end;
    return until;
}

/* [page] Note in which of the n clusters from `start` on some view has a hole. 1: call again. */
static int find_holes(struct dr_image *image, uint64_t start, unsigned n, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_views *v = q->views;
    struct qcow2_span *s = &v->ask;
    uint64_t all = n == 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
    for (; s->at < s->n_classes && v->holes != all; s->at++) {
        if (qcow2_views_enough(s))
            return 1;
        for (unsigned k = 0; k < n; k++) {
            struct qcow2_entry e;
            uint32_t hole;
            if (v->holes >> k & 1)
                continue;
            int r = qcow2_views_entry(image, &s->classes[s->at], start + k * q->cluster, &e, &hole,
                                      err);
            if (r < 0)
                return r;
            v->holes |= (uint64_t)(hole != 0) << k;
        }
    }
    return 0;
}

/* The question begins anew unless it is the one that the last call left half answered. */
static void note_question(struct qcow2_views *v, uint64_t start, unsigned n)
{
    if (v->asked == start && v->n_asked == n && v->ask.at > 0)
        return;
    v->asked = start;
    v->n_asked = n;
    v->ask.at = 0;
    v->holes = 0;
}

int qcow2_views_hole(struct dr_image *image, uint64_t off, uint64_t *len, bool *hole,
                     struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_views *v = q->views;
    int r = qcow2_span_look(image, &v->ask, off, err);
    if (r != 0)
        return r;
    uint64_t end = dr_min(off + *len, v->ask.end), start = qcow2_cluster_start(q, off);
    uint64_t empty = empty_until(&v->ask);
    if (empty > off) {
        *hole = true;
        *len = dr_min(end, empty) - off;
        return 0;
    }
    unsigned n = (unsigned)dr_min(MAX_LOOK, dr_div_up(end - start, q->cluster)), same = 1;
    note_question(v, start, n);
    r = find_holes(image, start, n, err);
    if (r == 1 || r == -EAGAIN)
        return r;
    v->asked = NOTHING;
    if (r < 0)
        return r;
    *hole = v->holes & 1;
    while (same < n && (v->holes >> same & 1) == *hole)
        same++;
    *len = dr_min(end, start + same * q->cluster) - off;
    return 0;
}
