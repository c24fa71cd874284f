/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading tables in the order of the file, each byte once, however many ways lead to it: a damaged
 * image may have thousands of tables in one place, and would else take for ever. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

int qcow2_scan(struct qcow2_check *c, uint64_t at, uint64_t len, qcow2_scan_fn fn, void *user,
               struct dr_error *err)
{
    for (uint64_t end = at + len, next; at < end; at = next) {
        enum dr_file_extent kind;
        uint64_t run;
        int r = dr_file_extent(c->f, at, end - at, &kind, &run, err);
        if (r < 0)
            return r;
        /* An entry does not end inside of a sector. */
        next = kind == DR_FILE_HOLE ? dr_round_down(at + run, 512) : dr_round_up(at + run, 512);
        if (kind == DR_FILE_HOLE && (next > at || at + run == end)) {
            next = at + run == end ? end : next;
            continue;
        }
        next = dr_min(dr_max(next, dr_round_down(at, 512) + 512), at + QCOW2_CHECK_STEP);
        next = dr_min(next, end);
        r = dr_file_pread_short(c->f, c->buf, at, next - at, NULL, err);
        if (r == 0)
            r = fn(user, at, c->buf, next - at, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ------------------------------------------------------------------ ranges */

struct edge { /* a range begins or ends */
    uint64_t at;
    int times, active;
};

static int by_place(const void *a, const void *b)
{
    const struct edge *x = a, *y = b;
    return x->at < y->at ? -1 : x->at > y->at;
}

int qcow2_each_part(struct qcow2_check *c, const struct qcow2_range *ranges, size_t n,
                    qcow2_part_fn fn, void *user, struct dr_error *err)
{
    CLEANUP_FREE struct edge *edges = malloc((2 * n + 1) * sizeof(*edges));
    struct qcow2_sweep part = {0};
    size_t n_edges = 0;
    int r = 0;
    if (!edges)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    for (size_t i = 0; i < n; i++) {
        if (ranges[i].len == 0)
            continue;
        edges[n_edges++] = (struct edge){ranges[i].at, 1, ranges[i].active};
        edges[n_edges++] = (struct edge){ranges[i].at + ranges[i].len, -1, -ranges[i].active};
    }
    qsort(edges, n_edges, sizeof(*edges), by_place);
    for (size_t i = 0; r == 0 && i + 1 < n_edges; i++) {
        part.times += (uint64_t)edges[i].times;
        part.active += (uint64_t)edges[i].active;
        part.at = edges[i].at;
        part.len = edges[i + 1].at - edges[i].at;
        if (part.times && part.len)
            r = fn(c, &part, user, err);
    }
    return r;
}

struct sweeping {
    struct qcow2_check *c;
    const struct qcow2_sweep *part;
    qcow2_sweep_fn fn;
    void *user;
};

static int sweep_piece(void *user, uint64_t at, uint8_t *bytes, size_t len, struct dr_error *err)
{
    struct sweeping *s = user;
    return s->fn(s->c, s->part, at, bytes, len, s->user, err);
}

static int sweep_part(struct qcow2_check *c, const struct qcow2_sweep *part, void *user,
                      struct dr_error *err)
{
    struct sweeping s = *(const struct sweeping *)user;
    s.part = part;
    return qcow2_scan(c, part->at, part->len, sweep_piece, &s, err);
}

int qcow2_sweep(struct qcow2_check *c, const struct qcow2_range *ranges, size_t n,
                qcow2_sweep_fn fn, void *user, struct dr_error *err)
{
    struct sweeping s = {.c = c, .fn = fn, .user = user};
    return qcow2_each_part(c, ranges, n, sweep_part, &s, err);
}

/* ------------------------------------------------------------------ L2 tables */

/* Those of a window, [begin, end) of the file. */
struct listing {
    struct qcow2_table *tables;
    size_t n;
    uint64_t begin, end;
    bool more; /* there are some behind end */
    qcow2_sweep_fn each_l1;
    void *user;
};

static int by_at(const void *a, const void *b)
{
    const struct qcow2_table *x = a, *y = b;
    return x->at < y->at ? -1 : x->at > y->at;
}

/* Sort; the same table only once. */
static void merge(struct listing *l)
{
    size_t n = 0;
    qsort(l->tables, l->n, sizeof(*l->tables), by_at);
    for (size_t i = 0; i < l->n; i++) {
        struct qcow2_table *last = n ? &l->tables[n - 1] : NULL;
        if (!last || last->at != l->tables[i].at) {
            l->tables[n++] = l->tables[i];
            continue;
        }
        last->times += l->tables[i].times;
        if (l->tables[i].active)
            last->index = l->tables[i].index;
        last->active += l->tables[i].active;
    }
    l->n = n;
}

/* Make room: merge, and give up the highest ones if that does not help. */
static void make_room(struct listing *l)
{
    merge(l);
    if (l->n <= qcow2_check_limits.tables / 4 * 3)
        return;
    l->n = qcow2_check_limits.tables / 2;
    l->end = l->tables[l->n].at;
    l->more = true;
}

static void list_table(struct listing *l, const struct qcow2_table *table)
{
    if (table->at < l->begin)
        return;
    if (table->at >= l->end) {
        l->more = true;
        return;
    }
    if (l->n == qcow2_check_limits.tables)
        make_room(l);
    if (table->at < l->end)
        l->tables[l->n++] = *table;
}

static int list_l1(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                   uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    struct listing *l = user;
    int r = l->begin == 0 && l->each_l1 ? l->each_l1(c, part, at, bytes, len, l->user, err) : 0;
    if (r < 0)
        return r;
    for (size_t i = 0; i < len; i += 8) {
        uint64_t table = get_be64(bytes + i) & QCOW2_OFFSET;
        if (!table)
            continue;
        uint64_t index = (at + i - c->q->h.l1_at) / 8; /* where it is active */
        list_table(l, &(struct qcow2_table){table, part->times, (uint32_t)part->active,
                                            part->active ? (uint32_t)index : 0});
    }
    return 0;
}

/* A run of tables that follow each other without a gap. */
struct reading {
    struct qcow2_check *c;
    const struct qcow2_table *tables;
    qcow2_table_fn each;
    void *user;
};

static int read_piece(void *user, uint64_t at, uint8_t *bytes, size_t len, struct dr_error *err)
{
    struct reading *g = user;
    uint64_t first = g->tables->at, cluster = g->c->q->cluster;
    int r = 0;
    for (size_t i = 0, part; r == 0 && i < len; i += part) {
        const struct qcow2_table *t = &g->tables[(at + i - first) / cluster];
        part = dr_min(len - i, t->at + cluster - (at + i));
        r = g->each(g->c, t, at + i, bytes + i, part, g->user, err);
    }
    return r;
}

/* Tables that do not stand at the beginning of a cluster may overlap: the first of those counts. */
static int read_tables(struct qcow2_check *c, const struct listing *l, qcow2_table_fn each,
                       void *user, struct dr_error *err)
{
    uint64_t cluster = c->q->cluster, odd_end = 0;
    for (size_t i = 0, next; i < l->n; i = next) {
        const struct qcow2_table *first = &l->tables[i];
        bool odd = first->at % cluster;
        next = i + 1;
        if (odd && first->at < odd_end)
            continue;
        while (!odd && next < l->n && l->tables[next].at == l->tables[next - 1].at + cluster)
            next++;
        if (odd)
            odd_end = first->at + cluster;
        struct reading g = {c, first, each, user};
        int r = qcow2_scan(c, first->at, (next - i) * cluster, read_piece, &g, err);
        if (r < 0)
            return r;
    }
    return 0;
}

int qcow2_each_table(struct qcow2_check *c, qcow2_sweep_fn each_l1, qcow2_table_fn each, void *user,
                     struct dr_error *err)
{
    struct listing l = {.each_l1 = each_l1, .user = user};
    CLEANUP_FREE struct qcow2_table *tables = malloc(qcow2_check_limits.tables * sizeof(*tables));
    int r = 0;
    if (!tables)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    l.tables = tables;
    do {
        l.n = 0;
        l.end = UINT64_MAX;
        l.more = false;
        r = qcow2_sweep(c, c->l1s, c->n_l1s, list_l1, &l, err);
        if (r == 0) {
            merge(&l);
            r = read_tables(c, &l, each, user, err);
        }
        l.begin = l.end;
    } while (r == 0 && l.more);
    return r;
}
