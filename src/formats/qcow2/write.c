/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing where clusters are: reserve, publish, cancel. */
#include "formats/qcow2/compact.h"

/* Reserve leaves these for publish and cancel in dr_reservation.priv. The pins are: the L2 entry,
 * the counts of the new place, the counts of the old one. */
enum {
    PRIV_AT,      /* where the L2 entry stands; 0: publish has nothing to do */
    PRIV_ENTRY,   /* its new value: two words */
    PRIV_NEW = 3, /* place that cancel gives back; QCOW2_NO_PLACE: none */
    PRIV_OLD,     /* place that publish frees; QCOW2_NO_PLACE: none */
    PRIV_LENS     /* bytes of the new one, and << 32 of the old one */
};

/* A request for one cluster, with its entry as it is and as it is going to be. */
struct request {
    struct dr_image *image;
    struct qcow2 *q;
    uint64_t off, len;    /* guest */
    uint64_t start;       /* of the cluster */
    uint64_t end;         /* of its bytes that belong to the disk */
    unsigned first, last; /* sub-clusters: first, and the one behind the last */
    enum dr_want want;
    uint32_t coded_len;
    struct qcow2_entry old, new;
    bool place; /* needs a new place */
    bool drops; /* the old place loses its last reference from this table */
    bool zero_host;
    bool keep; /* zeros, which keep the cluster's own place */
};

/* ------------------------------------------------------------------ L2 tables */

static void copy_table_page(struct dr_image *image, struct dr_page *to, uint64_t at, uint64_t from,
                            size_t len, bool shares)
{
    const struct qcow2 *q = qcow2_of(image);
    uint8_t raw[DR_PAGE_SIZE];
    struct dr_page *page = NULL;
    if (dr_page_get(image, 0, from, &page) < 0)
        return; /* cannot be: all of the table was read */
    memcpy(raw, dr_page_at(page, from), len);
    /* A standard or extended entry that is shared with the other table says so. */
    for (size_t i = 0; shares && i < len; i += q->entry)
        put_be64(raw + i, get_be64(raw + i) & ~QCOW2_COPIED);
    dr_page_put(image, to, at, raw, len);
}

/* After a failure some of it may be written to the file, where nothing is. */
static int write_table(struct dr_image *image, uint64_t fresh, uint64_t old, bool shares)
{
    const struct qcow2 *q = qcow2_of(image);
    size_t step = (size_t)dr_min(q->cluster, DR_PAGE_SIZE);
    for (uint64_t i = 0; i < q->cluster; i += step) {
        struct dr_page *page;
        int r = dr_page_new(image, 0, fresh + i, step, QCOW2_LEVEL_L2, &page);
        if (r < 0)
            return r;
        if (old)
            copy_table_page(image, page, fresh + i, old + i, step, shares);
        dr_page_unpin(image, page, fresh + i, step);
    }
    return 0;
}

int qcow2_write_table(struct dr_image *image, uint64_t fresh, uint64_t old)
{
    return write_table(image, fresh, old, true);
}

static void link_table(struct dr_image *image, struct dr_page *l1, uint64_t at, uint64_t table)
{
    uint8_t raw[8];
    put_be64(raw, table | QCOW2_COPIED);
    dr_page_put(image, l1, at, raw, sizeof(raw));
    qcow2_guard(qcow2_of(image), table);
}

int qcow2_replace_table(struct dr_image *image, uint64_t link, uint64_t old, uint64_t fresh,
                        bool shares)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_reservation pins = {0};
    struct dr_page *l1;
    bool old_pinned = false;
    int r = dr_reserve_page(image, &pins, 0, link, 8, QCOW2_LEVEL_L1, &l1);
    if (r == 0)
        r = qcow2_reserve_counts(image, &pins, fresh, q->cluster);
    if (r == 0 && old) /* by the reservation, too, which sees if its pins exclude each other */
        r = qcow2_reserve_counts(image, &pins, old, q->cluster);
    if (r == 0 && old) {
        r = qcow2_pin_counts(image, old, q->cluster);
        old_pinned = r == 0;
    }
    if (r == 0)
        r = write_table(image, fresh, old, shares);
    if (r == 0) {
        qcow2_add(image, fresh, q->cluster, 1);
        link_table(image, l1, link, fresh);
        if (old) /* its count stays pinned */
            qcow2_free_later(image, old, q->cluster);
    } else if (old_pinned) {
        qcow2_unpin_counts(image, old, q->cluster);
    }
    dr_reserve_unpin(image, &pins);
    return r;
}

/* Counts of 1 bit cannot say that something is shared: what is said to be would be freed though
 * somebody else has it. */
static int refuse_shared(struct dr_image *image, uint64_t host)
{
    const struct qcow2 *q = qcow2_of(image);
    if (qcow2_max_count(q) > 1)
        return 0;
    return qcow2_damage(image,
                        "the cluster at byte %llu is said to be shared, which counts of 1 bit "
                        "cannot say",
                        ULL(host));
}

/* Nobody else refers to the table for off: make it or copy it. Changes nothing that can be seen, so
 * it need not be undone when the reservation comes to nothing. */
static int own_table(struct dr_image *image, uint64_t off, uint64_t *table, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t fresh, hole, link = q->h.l1_at + 8 * (off / qcow2_l2_span(q));
    bool copied;
    int r = qcow2_find_l2(image, off, table, &copied, &hole, err);
    if (r < 0 || (*table && copied))
        return r;
    if (*table && (r = refuse_shared(image, *table)) < 0)
        return r;
    if (*table && (r = dr_page_get_all(image, 0, *table, q->cluster)) < 0)
        return r;
    if ((r = qcow2_find_free(image, 1, &fresh, err)) < 0)
        return r;
    if ((r = qcow2_replace_table(image, link, *table, fresh, true)) == 0)
        *table = fresh;
    return r;
}

/* ------------------------------------------------------------------ planning */

static uint32_t mask_of(unsigned first, unsigned last)
{
    uint64_t below = (UINT64_C(1) << first) - 1;
    return (uint32_t)(((UINT64_C(1) << last) - 1) & ~below);
}

static bool whole_cluster(const struct request *q)
{
    return q->off == q->start && q->off + q->len == q->end;
}

/* Data needs no other place than the cluster has. */
static bool has_own_place(const struct request *q)
{
    return q->old.host != QCOW2_NO_PLACE && !q->old.coded &&
           (q->old.copied || qcow2_has_data_file(q->q));
}

static void plan_data(struct request *q)
{
    bool own = has_own_place(q);
    uint32_t keeps = own ? q->old.held : 0;
    if (q->old.held && !own) { /* the new place takes all that the old one holds */
        q->first = (unsigned)dr_min(q->first, (unsigned)__builtin_ctz(q->old.held));
        q->last = (unsigned)dr_max(q->last, 32u - (unsigned)__builtin_clz(q->old.held));
    }
    uint32_t mask = mask_of(q->first, q->last);
    q->place = !own;
    q->drops = !own && q->old.host != QCOW2_NO_PLACE;
    q->new = (struct qcow2_entry){
        .host = q->old.host, .copied = true, .held = keeps | mask, .zero = q->old.zero & ~mask};
}

static int plan_coded(struct request *q)
{
    if (!whole_cluster(q) || q->coded_len == 0 || q->coded_len >= q->q->cluster ||
        qcow2_has_data_file(q->q) || q->q->h.crypt)
        return -ENOTSUP;
    q->new = (struct qcow2_entry){.coded = q->coded_len, .held = qcow2_all_subs(q->q)};
    q->place = true;
    q->drops = q->old.host != QCOW2_NO_PLACE;
    return 0;
}

/* Zeros, or nothing. Where no sub-cluster is left, the place is given up. */
static int plan_clear(struct request *q)
{
    const struct qcow2 *s = q->q;
    bool data_file = qcow2_has_data_file(s), whole = whole_cluster(q);
    bool aligned = (q->off - q->start) % s->sub == 0 &&
                   ((q->off + q->len) % s->sub == 0 || q->off + q->len == q->end);
    bool keep = q->keep && has_own_place(q) && s->h.version >= 3;
    if (q->want == DR_WANT_ZERO && s->h.version < 3) {
        if (q->image->backing_name)
            return -ENOTSUP;
        q->want = DR_WANT_HOLE; /* without a parent that reads as zeros, too */
    }
    if (!aligned || (q->old.coded && !whole))
        return -ENOTSUP;
    if (q->want == DR_WANT_HOLE && (s->h.autoclear & QCOW2_DATA_RAW))
        return -ENOTSUP;
    if (q->off + q->len == q->end)
        q->last = s->subs;
    uint32_t mask = mask_of(q->first, q->last);
    q->new = q->old;
    q->new.held &= ~mask;
    q->new.zero = q->want == DR_WANT_ZERO ? q->old.zero | mask : q->old.zero & ~mask;
    q->zero_host = data_file && (s->h.autoclear & QCOW2_DATA_RAW) && q->want == DR_WANT_ZERO;
    q->drops = q->old.host != QCOW2_NO_PLACE && !q->new.held && !q->zero_host && !keep;
    if (q->drops)
        q->new = (struct qcow2_entry){.host = QCOW2_NO_PLACE, .zero = q->new.zero};
    if (q->zero_host)
        q->new = (struct qcow2_entry){
            .host = q->start, .copied = true, .held = q->new.held, .zero = q->new.zero};
    return 0;
}

/* The entry as it is, in another place. */
static void plan_lower(struct request *q)
{
    q->new = q->old;
    q->place = true;
    q->drops = true;
}

static int make_plan(struct request *q)
{
    if (q->want == DR_WANT_LOWER) {
        plan_lower(q);
        return 0;
    }
    if (q->want == DR_WANT_CODED)
        return plan_coded(q);
    if (q->want == DR_WANT_DATA) {
        plan_data(q);
        return 0;
    }
    return plan_clear(q);
}

/* ------------------------------------------------------------------ places */

/* 1: there is none. */
static int find_lower_place(struct request *q, struct dr_error *err)
{
    uint32_t len = q->new.coded;
    int r = len ? qcow2_find_packed(q->image, len, 1, &q->new.host) : 1;
    if (r < 0 || (r == 0 && !qcow2_is_high(q->q, q->new.host, len)))
        return r;
    return qcow2_find_lower(q->image, &q->new.host, err);
}

static int find_place(struct request *q, struct dr_error *err)
{
    if (q->want == DR_WANT_LOWER)
        return find_lower_place(q, err);
    if (qcow2_has_data_file(q->q)) {
        q->new.host = q->start;
        return 0;
    }
    if (q->new.coded) {
        int r = qcow2_find_packed(q->image, q->coded_len, 1, &q->new.host);
        if (r <= 0)
            return r;
    }
    return qcow2_find_free(q->image, 1, &q->new.host, err);
}

static uint64_t place_len(const struct qcow2 *s, const struct qcow2_entry *e)
{
    return e->coded ? e->coded : s->cluster;
}

/* Nothing may be written over a table, whatever a damaged entry says. */
static int check_target(const struct request *q)
{
    const char *taken = NULL;
    if (q->want == DR_WANT_DATA && !q->place && !qcow2_has_data_file(q->q))
        taken = qcow2_guarded(q->q, q->new.host, q->q->cluster);
    return !taken ? 0
                  : qcow2_damage(q->image, "guest offset %llu is said to be at byte %llu, in %s",
                                 ULL(q->start), ULL(q->new.host), taken);
}

/* ------------------------------------------------------------------ reserve */

static int take_places(struct request *q, struct dr_reservation *r, struct dr_error *err)
{
    bool counted = !qcow2_has_data_file(q->q);
    int rc = check_target(q);
    if (rc == 0 && q->drops && counted && !q->old.coded && !q->old.copied)
        rc = refuse_shared(q->image, q->old.host);
    if (rc == 0 && q->place)
        rc = find_place(q, err); /* 1: none that is lower */
    if (rc == 0 && q->place && counted)
        rc = qcow2_reserve_counts(q->image, r, q->new.host, place_len(q->q, &q->new));
    if (rc == 0 && q->drops && counted) {
        unsigned n = r->n_pins;
        rc = qcow2_reserve_counts(q->image, r, q->old.host, place_len(q->q, &q->old));
        for (uint64_t at = q->old.host; rc == 0 && n < r->n_pins; n++) {
            uint64_t count;
            rc = qcow2_count(q->image, at, &count);
            if (rc == 0 && count == 0)
                rc = qcow2_damage(q->image,
                                  "the cluster at byte %llu is in use and counted as free",
                                  ULL(dr_round_down(at, q->q->cluster)));
            at = dr_round_down(at, q->q->cluster) + q->q->cluster;
        }
    }
    return rc;
}

static void describe(const struct request *q, struct dr_reservation *r)
{
    const struct qcow2 *s = q->q;
    uint64_t from = q->first * s->sub, to = q->last * s->sub;
    r->file = q->new.coded ? q->image->files[s->data] : qcow2_data(q->image);
    r->off = q->off;
    r->len = q->len;
    r->todo = DR_TODO_NOTHING;
    if (q->want == DR_WANT_CODED) {
        r->todo = DR_TODO_WRITE;
        r->host = q->new.host;
    } else if (q->want == DR_WANT_LOWER) {
        r->todo = DR_TODO_COPY;
        r->host = q->new.host;
        r->from = q->old.host;
        r->bytes = place_len(s, &q->old);
    } else if (q->want == DR_WANT_DATA) {
        r->todo = DR_TODO_WRITE;
        r->off = q->start + from;
        r->len = dr_min(q->start + to, q->end) - r->off;
        r->pad = q->start + to - r->off - r->len;
        r->host = q->new.host + from;
    } else if (q->zero_host) {
        r->todo = DR_TODO_ZERO_HOST;
        r->host = q->off;
    }
    if (qcow2_has_data_file(s)) /* as long as the disk */
        r->pad = 0;
}

static void note_for_publish(const struct request *q, uint64_t at, struct dr_reservation *r)
{
    const struct qcow2 *s = q->q;
    uint8_t raw[16] = {0};
    bool counted = !qcow2_has_data_file(s);
    qcow2_entry_encode(s, &q->new, raw);
    memcpy(&r->priv[PRIV_ENTRY], raw, sizeof(raw));
    r->priv[PRIV_AT] = at;
    r->priv[PRIV_NEW] = q->place && counted ? q->new.host : QCOW2_NO_PLACE;
    r->priv[PRIV_OLD] = q->drops && counted ? q->old.host : QCOW2_NO_PLACE;
    r->priv[PRIV_LENS] = place_len(s, &q->new) | place_len(s, &q->old) << 32;
}

static void place_is_taken(struct request *q)
{
    struct qcow2 *s = q->q;
    if (!q->place || qcow2_has_data_file(s))
        return;
    qcow2_add(q->image, q->new.host, place_len(s, &q->new), 1);
    if (q->new.coded)
        qcow2_packed_until(s, q->new.host + q->new.coded);
}

static int nothing_to_do(const struct request *q, struct dr_reservation *r)
{
    r->off = q->off;
    r->len = q->len;
    r->todo = DR_TODO_NOTHING;
    r->priv[PRIV_AT] = 0;
    r->priv[PRIV_NEW] = r->priv[PRIV_OLD] = QCOW2_NO_PLACE;
    return 0;
}

/* The table for off, to be edited. Units that snapshots share, or whose table they share, do not
 * move: *table 0. */
static int find_table(const struct request *q, uint64_t *table, struct dr_error *err)
{
    uint64_t hole;
    bool copied;
    if (q->want != DR_WANT_LOWER)
        return own_table(q->image, q->off, table, err);
    int r = qcow2_find_l2(q->image, q->off, table, &copied, &hole, err);
    if (r == 0 && !copied)
        *table = 0;
    return r;
}

int qcow2_ready_to_write(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    if (qcow2_is_locked(q))
        return qcow2_refuse_locked(image, err);
    if (q->damage || q->damage_noted)
        return qcow2_refuse_damaged(image, err);
    return q->marked ? 0 : dr_need_begin(image);
}

int qcow2_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                  uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    struct qcow2 *s = qcow2_of(image);
    struct request q = {
        .image = image, .q = s, .off = off, .len = len, .want = want, .coded_len = host_len};
    if (want == DR_WANT_ZERO_KEPT) {
        q.keep = true;
        q.want = DR_WANT_ZERO;
    }
    struct dr_page *page;
    uint64_t table = 0, at = 0;
    *r = (struct dr_reservation){.want = want};
    q.start = dr_round_down(off, s->cluster);
    q.end = q.start + s->cluster;
    if (q.start < image->size) /* resize works behind the end, too */
        q.end = dr_min(q.end, image->size);
    q.first = (unsigned)((off - q.start) / s->sub);
    q.last = (unsigned)dr_div_up(off + len - q.start, s->sub);
    int rc = qcow2_ready_to_write(image, err);
    if (rc == 0)
        rc = find_table(&q, &table, err);
    if (rc == 0 && !table)
        return nothing_to_do(&q, r);
    if (rc == 0) {
        at = qcow2_entry_at(s, table, off);
        rc = dr_reserve_page(image, r, 0, at, s->entry, QCOW2_LEVEL_L2, &page);
    }
    if (rc == 0)
        rc = qcow2_read_entry(image, page, at, q.start, &q.old, err);
    if (rc == 0 && want == DR_WANT_LOWER && !qcow2_stands_high(s, &q.old))
        return nothing_to_do(&q, r);
    if (rc == 0)
        rc = make_plan(&q);
    if (rc == 0)
        rc = take_places(&q, r, err);
    if (rc != 0)
        return rc < 0 ? rc : nothing_to_do(&q, r);
    place_is_taken(&q);
    describe(&q, r);
    note_for_publish(&q, at, r);
    return 0;
}

/* ------------------------------------------------------------------ publish, cancel */

void qcow2_publish(struct dr_image *image, struct dr_reservation *r)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t host = r->priv[PRIV_OLD], len = r->priv[PRIV_LENS] >> 32;
    if (r->priv[PRIV_AT] == 0)
        return;
    dr_page_put(image, dr_reserved_pin(r, 0)->page, r->priv[PRIV_AT], &r->priv[PRIV_ENTRY],
                q->entry);
    if (host == QCOW2_NO_PLACE)
        return;
    /* The counts stay pinned until they are lowered. A compressed cluster lies in one or two. */
    unsigned n = (unsigned)(dr_div_up(host + len, q->cluster) - host / q->cluster);
    for (unsigned i = 0; i < n; i++)
        dr_reserved_pin(r, r->n_pins - n + i)->page = NULL;
    for (uint64_t end = host + len, part; host < end; host += part) {
        part = dr_min(end, dr_round_down(host, q->cluster) + q->cluster) - host;
        qcow2_free_later(image, host, part);
    }
}

void qcow2_cancel(struct dr_image *image, struct dr_reservation *r)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t host = r->priv[PRIV_NEW], len = r->priv[PRIV_LENS] & UINT32_MAX, count = 0;
    if (host == QCOW2_NO_PLACE)
        return;
    q->coded_next = 0;
    qcow2_add(image, host, len, -1);
    for (uint64_t at = dr_round_down(host, q->cluster); at < host + len; at += q->cluster)
        if (qcow2_count(image, at, &count) == 0 && count == 0)
            qcow2_note_free(q, at, q->cluster);
}
