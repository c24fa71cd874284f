/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading tables in the order of the file, each byte once, however many ways lead to it: a damaged
 * image may have thousands of tables in one place, and would else take for ever. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

/* Add [what->at, what->at + len) in pieces. Entries do not end inside of a sector. */
static int add_pieces(struct qcow2_check *c, const struct qcow2_piece *what, uint64_t len,
                      struct dr_error *err)
{
    struct qcow2_piece piece = *what;
    int r = 0;
    for (uint64_t end = what->at + len; r == 0 && piece.at < end; piece.at += piece.len) {
        uint64_t next = dr_round_down(piece.at, 512) + QCOW2_CHECK_STEP;
        piece.len = (size_t)(dr_min(next, end) - piece.at);
        r = qcow2_ahead_add(c, &piece, err);
    }
    return r;
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
    qcow2_sweep_fn fn;
    void *user;
};

static int use_swept(struct qcow2_check *c, const struct qcow2_piece *piece, uint8_t *bytes,
                     void *user, struct dr_error *err)
{
    const struct sweeping *s = user;
    return bytes ? s->fn(c, &piece->part, piece->at, bytes, piece->len, s->user, err) : 0;
}

static int read_part(struct qcow2_check *c, const struct qcow2_sweep *part, void *user,
                     struct dr_error *err)
{
    (void)user;
    return add_pieces(c, &(struct qcow2_piece){.at = part->at, .part = *part}, part->len, err);
}

int qcow2_sweep(struct qcow2_check *c, const struct qcow2_range *ranges, size_t n,
                qcow2_sweep_fn fn, void *user, struct dr_error *err)
{
    struct sweeping s = {fn, user};
    qcow2_ahead_start(c, use_swept, &s);
    return qcow2_ahead_finish(c, qcow2_each_part(c, ranges, n, read_part, NULL, err), err);
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

struct reading {
    qcow2_table_fn each;
    void *user;
};

static int use_tables(struct qcow2_check *c, const struct qcow2_piece *piece, uint8_t *bytes,
                      void *user, struct dr_error *err)
{
    const struct reading *g = user;
    uint64_t first = piece->tables->at, cluster = c->q->cluster;
    int r = 0;
    for (size_t i = 0, part; bytes && r == 0 && i < piece->len; i += part) {
        const struct qcow2_table *t = &piece->tables[(piece->at + i - first) / cluster];
        part = dr_min(piece->len - i, t->at + cluster - (piece->at + i));
        r = g->each(c, t, piece->at + i, bytes + i, part, g->user, err);
    }
    return r;
}

/* Tables that follow each other without a gap are read as one. Tables that do not stand at the
 * beginning of a cluster may overlap: the first of those counts. */
static int add_tables(struct qcow2_check *c, const struct listing *l, struct dr_error *err)
{
    uint64_t cluster = c->q->cluster, odd_end = 0;
    int r = 0;
    for (size_t i = 0, next; r == 0 && i < l->n; i = next) {
        const struct qcow2_table *first = &l->tables[i];
        bool odd = first->at % cluster;
        next = i + 1;
        if (odd && first->at < odd_end)
            continue;
        while (!odd && next < l->n && l->tables[next].at == l->tables[next - 1].at + cluster)
            next++;
        if (odd)
            odd_end = first->at + cluster;
        struct qcow2_piece run = {.at = first->at, .tables = first};
        r = add_pieces(c, &run, (next - i) * cluster, err);
    }
    return r;
}

static int read_tables(struct qcow2_check *c, const struct listing *l, qcow2_table_fn each,
                       void *user, struct dr_error *err)
{
    struct reading g = {each, user};
    qcow2_ahead_start(c, use_tables, &g);
    return qcow2_ahead_finish(c, add_tables(c, l, err), err);
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
