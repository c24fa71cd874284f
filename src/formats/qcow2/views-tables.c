/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* L2 tables into which holes can be filled. Views without a table get a new one together. A table
 * is edited where it is, if all that lead to it are views that end at the same offset. It is copied
 * first where views of different sizes share it, because a small one must hold nothing behind its
 * end, and where its count is higher than the views tell, as a crash may leave it: something
 * unknown might lead there, too. */
#include "formats/qcow2/views.h"

/* L1 entries that are pinned at once. */
#define MAX_LINKS 512u

/* [page] Is something of [off, off + len) a hole in the class? */
static int wants(struct dr_image *image, const struct qcow2_class *c, uint64_t off, uint64_t len,
                 bool *yes, struct dr_error *err)
{
    uint64_t cluster = qcow2_of(image)->cluster, end = dr_min(off + len, c->end);
    *yes = false;
    for (; !*yes && off < end; off += cluster) {
        struct qcow2_entry e;
        uint32_t hole;
        int r = qcow2_views_entry(image, c, off, &e, &hole, err);
        if (r < 0)
            return r;
        *yes = hole;
    }
    return 0;
}

/* How often the views that are known lead to the table of the i-th class: others of the same table
 * stand beside it. */
static uint64_t known_links(const struct qcow2_span *s, size_t i)
{
    const struct qcow2_class *c = s->classes;
    uint64_t known = 0;
    size_t first = i;
    while (first > 0 && c[first - 1].table == c[i].table)
        first--;
    for (; first < s->n_classes && c[first].table == c[i].table; first++)
        known += c[first].n;
    return known;
}

/* [page] May the table of the i-th class be edited? */
static int is_own(struct dr_image *image, const struct qcow2_span *s, size_t i, bool *own)
{
    const struct qcow2_class *c = &s->classes[i];
    uint64_t count = 0, known = known_links(s, i);
    *own = false;
    if (!c->table)
        return 0;
    int r = qcow2_count(image, c->table, &count);
    if (r == 0 && count < known)
        return qcow2_damage(image, "the L2 table at byte %llu is used %llu times, counted %llu",
                            ULL(c->table), ULL(known), ULL(count));
    *own = r == 0 && count == c->n;
    return r;
}

int qcow2_pin_often(struct dr_image *image, uint64_t host, uint64_t len, size_t n)
{
    int r = dr_free_ahead(image, n);
    for (size_t i = 0; r == 0 && i < n; i++) {
        r = qcow2_pin_counts(image, host, len);
        for (; r < 0 && i > 0; i--)
            qcow2_unpin_counts(image, host, len);
    }
    return r;
}

/* Which views leave a table together: the first n of the sharers of a class. */
struct leaving {
    size_t class, n;
};

/* The disk is the first that leaves a table: its L1 entry says by COPIED whether it is the only
 * one, and must not be what is left when the others have gone. */
static struct leaving who_leaves(const struct qcow2 *q, struct qcow2_span *s, size_t class)
{
    struct qcow2_class *c = &s->classes[class];
    struct leaving all = {class, (size_t)dr_min(dr_min(c->n, MAX_LINKS), qcow2_max_count(q))};
    if (!c->table || s->disk_class == SIZE_MAX || s->classes[s->disk_class].table != c->table)
        return all;
    c = &s->classes[s->disk_class];
    struct qcow2_sharer *sharers = &s->sharers[c->first];
    for (size_t i = 1; i < c->n && sharers[0].view != 0; i++)
        if (sharers[i].view == 0) {
            sharers[i].view = sharers[0].view;
            sharers[0].view = 0;
        }
    return (struct leaving){s->disk_class, 1};
}

static uint64_t link_at(const struct dr_image *image, const struct qcow2_span *s,
                        const struct qcow2_sharer *sharer)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t l1_at = sharer->view == 0 ? q->h.l1_at : q->views->list[sharer->view].l1_at;
    return l1_at + 8 * (s->begin / qcow2_l2_span(q));
}

/* Those who leave become a class of their own, which has the new table. */
static void split_class(struct qcow2_span *s, const struct leaving *l, uint64_t fresh)
{
    struct qcow2_class *c = &s->classes[l->class];
    struct qcow2_class new = {fresh, c->end, c->first, (uint32_t)l->n};
    size_t at = l->n == c->n ? l->class : s->n_classes++;
    bool disk = false;
    c->first += (uint32_t)l->n;
    c->n -= (uint32_t)l->n;
    s->classes[at] = new;
    for (size_t i = 0; i < l->n; i++) {
        struct qcow2_sharer *sharer = &s->sharers[new.first + i];
        sharer->table = fresh;
        disk |= sharer->view == 0;
    }
    if (disk) {
        s->disk_class = at;
        s->disk = fresh;
    }
}

/* Their L1 entries, which are the first pins, lead to the new table. */
static void link_table(struct dr_image *image, struct qcow2_span *s, const struct leaving *l,
                       uint64_t fresh, struct dr_reservation *pins)
{
    struct qcow2 *q = qcow2_of(image);
    const struct qcow2_class *c = &s->classes[l->class];
    for (size_t i = 0; i < l->n; i++) {
        const struct qcow2_sharer *sharer = &s->sharers[c->first + i];
        uint8_t raw[8];
        put_be64(raw, fresh | (l->n == 1 && sharer->view == 0 ? QCOW2_COPIED : 0));
        dr_page_put(image, dr_reserved_pin(pins, (unsigned)i)->page, link_at(image, s, sharer), raw,
                    sizeof(raw));
    }
    qcow2_guard(q, fresh);
    split_class(s, l, fresh);
    s->links = ++q->views->links;
    s->dirty += l->n;
}

/* [page] A new table for those who leave: empty, or a copy of the one that they have. */
static int give_table(struct dr_image *image, struct qcow2_span *s, const struct leaving *l,
                      struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct dr_reservation pins = {0};
    struct dr_page *page;
    uint64_t fresh, old = s->classes[l->class].table, first = s->classes[l->class].first;
    bool old_pinned = false;
    int r = old ? dr_page_get_all(image, 0, old, q->cluster) : 0;
    if (r == 0)
        r = qcow2_find_free(image, 1, &fresh, err);
    for (size_t i = 0; r == 0 && i < l->n; i++)
        r = dr_reserve_page(image, &pins, 0, link_at(image, s, &s->sharers[first + i]), 8,
                            QCOW2_LEVEL_L1, &page);
    if (r == 0)
        r = qcow2_reserve_counts(image, &pins, fresh, q->cluster);
    if (r == 0 && old) /* by the reservation, too, which sees if its pins exclude each other */
        r = qcow2_reserve_counts(image, &pins, old, q->cluster);
    if (r == 0 && old) {
        r = qcow2_pin_often(image, old, q->cluster, l->n);
        old_pinned = r == 0;
    }
    if (r == 0)
        r = qcow2_write_table(image, fresh, old);
    if (r == 0) {
        qcow2_add(image, fresh, q->cluster, (int)l->n);
        link_table(image, s, l, fresh, &pins);
        for (size_t i = 0; old && i < l->n; i++)
            qcow2_free_later(image, old, q->cluster);
        q->views->recount |= old != 0;
    }
    for (size_t i = 0; r < 0 && old_pinned && i < l->n; i++)
        qcow2_unpin_counts(image, old, q->cluster);
    dr_reserve_unpin(image, &pins);
    return r;
}

int qcow2_views_tables(struct dr_image *image, struct qcow2_span *s, uint64_t off, uint64_t len,
                       struct dr_error *err)
{
    for (; s->at < s->n_classes; s->at++) {
        bool yes, own = true;
        if (qcow2_views_enough(s))
            return 1;
        if (s->dirty > QCOW2_VIEWS_DIRTY) {
            s->dirty = 0;
            return dr_need_flush(image);
        }
        int r = wants(image, &s->classes[s->at], off, len, &yes, err);
        if (r == 0 && yes)
            r = is_own(image, s, s->at, &own);
        if (r < 0)
            return r;
        if (own)
            continue;
        struct leaving l = who_leaves(qcow2_of(image), s, s->at);
        r = give_table(image, s, &l, err);
        return r < 0 ? r : 1; /* the same class again, or what is left of it */
    }
    return 0;
}
