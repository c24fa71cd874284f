/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Windows for tables of several clusters: as many clusters in a row, each of which is free or can
 * move. All windows lie before the end, and no two of them overlap. */
#include "formats/qcow2/compact.h"

#include "base/cleanup.h"

enum state { FREE, MOVES, STAYS };

/* The last n clusters that were looked at, and the best row so far. */
struct search {
    uint64_t n;
    uint8_t *moves; /* by number modulo n: the cluster has to give way */
    uint64_t run,
        giving; /* clusters in a row that may be a window's; of the last n those giving way */
    uint64_t best, least; /* 0: none; clusters that give way in it */
};

static void search_add(struct search *s, uint64_t i, enum state state)
{
    if (state == STAYS) {
        s->run = s->giving = 0;
        return;
    }
    if (s->run >= s->n)
        s->giving -= s->moves[i % s->n];
    s->moves[i % s->n] = state == MOVES;
    s->giving += state == MOVES;
    if (++s->run >= s->n && s->giving < s->least) {
        s->best = i + 1 - s->n;
        s->least = s->giving;
    }
}

static bool in_long_table(const struct qcow2_compact *c, uint64_t i)
{
    for (unsigned k = 0; k < c->n_windows; k++)
        if (dr_inside(i - c->windows[k].at, 1, c->windows[k].n))
            return true;
    return false;
}

static enum state state_of(const struct qcow2_compact *c, uint64_t i, uint64_t count)
{
    if (qcow2_window_of(c, i))
        return STAYS;
    if (count == 0)
        return FREE;
    return qcow2_can_move(c, i) && !in_long_table(c, i) ? MOVES : STAYS;
}

static void search_block(const struct qcow2 *q, struct search *s, uint64_t b, const uint8_t *block)
{
    const struct qcow2_compact *c = q->compact;
    uint64_t per = qcow2_block_entries(q);
    for (uint64_t n = 0; n < per && b * per + n < c->end; n++)
        search_add(s, b * per + n,
                   state_of(c, b * per + n, qcow2_count_get(q->h.refcount_order, block, n)));
}

/* Clusters that no block counts would need one first. */
static int search_all(struct dr_image *image, struct search *s, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t per = qcow2_block_entries(q);
    CLEANUP_FREE uint8_t *block = malloc(q->cluster);
    int r = block ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint64_t b = 0; r == 0 && s->least && b < q->reftable_n && b * per < q->compact->end;
         b++) {
        if (!q->reftable[b]) {
            search_add(s, b * per, STAYS);
            continue;
        }
        r = dr_file_pread(image->files[0], block, q->reftable[b], q->cluster, err);
        if (r == 0)
            search_block(q, s, b, block);
    }
    return r;
}

static int find_window(struct dr_image *image, struct qcow2_window *w, struct dr_error *err)
{
    struct search s = {.n = w->n, .least = UINT64_MAX};
    CLEANUP_FREE uint8_t *moves = malloc((size_t)w->n);
    s.moves = moves;
    int r = moves ? search_all(image, &s, err) : dr_fail_errno(err, ENOMEM, "%s", image->path);
    w->to = r == 0 ? s.best : 0;
    return r;
}

/* The table stays. 1: the file's end may be another one now. */
static int stays(const struct qcow2 *q, struct qcow2_window *w)
{
    struct qcow2_compact *c = q->compact;
    c->stays = dr_max(c->stays, w->at + w->n);
    *w = c->windows[--c->n_windows];
    qcow2_choose_end(q, c);
    return 1;
}

static void choose_goal(struct qcow2_compact *c)
{
    uint64_t needed = 0, free = c->clusters - dr_min(c->clusters, c->used);
    for (unsigned i = 0; i < c->n_windows; i++) {
        needed += c->windows[i].to ? c->windows[i].n : 0;
        c->clears |= c->windows[i].to && c->windows[i].at < c->end;
    }
    c->goal = c->end;
    c->clears &= needed <= free;
    if (c->clears)
        c->end = c->clusters;
}

int qcow2_find_windows(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    int r = 1;
    while (r == 1) {
        r = 0;
        for (unsigned i = 0; r == 0 && i < c->n_windows; i++) {
            struct qcow2_window *w = &c->windows[i];
            if (w->at + w->n <= c->end)
                w->to = 0;
            else if (!w->to)
                r = find_window(image, w, err);
            if (r == 0 && !w->to && w->at + w->n > c->end)
                r = stays(q, w);
        }
    }
    choose_goal(c);
    return r;
}
