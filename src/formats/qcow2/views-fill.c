/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Filling clusters of all views. Entries that are alike, in whatever table, are a group: they
 * become alike. A round goes over all tables and counts the groups, finds each a place that is
 * counted as often as tables lead there, writes the bytes, and goes over the tables again to put
 * the entries in.
 *
 * Sub-clusters are filled where their cluster is, if all that lead there are views of which none
 * holds anything in the holes. Else the group leaves the cluster, with a copy of what it holds; and
 * where only the disk would stay there, it leaves as well, and is the first (views.h). */
#include "formats/qcow2/views.h"

#include "base/cleanup.h"

/* Clusters that are filled together; and groups of them, of which as many again may be added for a
 * disk that leaves. */
#define MAX_CLUSTERS 64u
#define MAX_GROUPS   128u

struct group {
    unsigned cluster;       /* number in the range */
    struct qcow2_entry old; /* host, held and zero are those of all entries of the group */
    uint32_t hole;          /* sub-clusters to fill; 0: the disk, which only leaves */
    size_t valid;           /* bytes of the cluster in front of the end of these views */
    uint64_t times;         /* how many tables lead there, each as often as it is shared */
    uint64_t left;          /* of these: have to get their entry yet */
    uint64_t known;         /* views that lead to the old place */
    uint32_t others;        /* what those hold there that are not of the group */
    uint64_t count;         /* of the old place */
    uint64_t host;          /* where the bytes go; QCOW2_NO_PLACE: nowhere, they are zeros */
    uint32_t coded;         /* so many coded bytes go there; 0: plain ones */
    bool fresh;             /* that is a new place */
    bool moves;             /* which takes what the old one holds, too */
    struct dr_reservation pins;
};

struct fill {
    struct dr_image *image;
    struct qcow2 *q;
    struct qcow2_span *span;
    uint64_t off, len; /* MAX_CLUSTERS at most */
    const uint8_t *buf;
    uint32_t coded_len; /* buf has so many bytes, coded; 0: it is plain */
    unsigned n;         /* clusters */
    uint64_t zeros;     /* those that are filled with zeros, which need no place */
    struct group *groups;
    size_t n_groups;
    bool more;                             /* there are more groups: another round */
    struct qcow2_entry disk[MAX_CLUSTERS]; /* of the disk alone, where groups have places */
    size_t at;                             /* class, or group, at which a step goes on, */
    unsigned k;                            /* and cluster */
    unsigned dirty;
};

/* The disk's class is the first, if it is the only view in there. */
static const struct qcow2_class *class_at(const struct fill *f, size_t i)
{
    const struct qcow2_span *s = f->span;
    size_t disk = s->disk_class;
    if (disk != SIZE_MAX && i <= disk)
        i = i == 0 ? disk : i - 1;
    return &s->classes[i];
}

static bool disk_alone(const struct fill *f)
{
    return f->span->disk_class != SIZE_MAX && f->span->classes[f->span->disk_class].n == 1;
}

static uint64_t offset_of(const struct fill *f, unsigned cluster)
{
    return f->off + cluster * f->q->cluster;
}

/* ------------------------------------------------------------------ groups */

static bool alike(const struct qcow2_entry *a, const struct qcow2_entry *b)
{
    return a->host == b->host && a->held == b->held && a->zero == b->zero;
}

static bool becomes_zeros(const struct fill *f, unsigned cluster)
{
    return f->zeros >> cluster & 1;
}

/* Coded bytes are all of a cluster, so a view that has a part of it, or ends inside, cannot have
 * them. */
static bool may_get(const struct fill *f, const struct qcow2_entry *e, size_t valid)
{
    return !f->coded_len || (e->host == QCOW2_NO_PLACE && !e->zero && valid == f->len);
}

/* The first group of this cluster with such entries in which n more have room: before the round,
 * as its place can be counted, afterwards, as it has been. Both give the same answer. */
static struct group *find_group(const struct fill *f, unsigned cluster, const struct qcow2_entry *e,
                                size_t valid, uint64_t n, bool counting)
{
    uint64_t max = qcow2_max_count(f->q);
    for (size_t i = 0; i < f->n_groups; i++) {
        struct group *g = &f->groups[i];
        bool room = !counting ? g->left >= n : becomes_zeros(f, cluster) || g->times + n <= max;
        if (g->cluster == cluster && g->hole && valid == g->valid && alike(e, &g->old) && room)
            return g;
    }
    return NULL;
}

static size_t valid_bytes(const struct fill *f, const struct qcow2_class *c, unsigned cluster)
{
    return (size_t)dr_min(c->end - offset_of(f, cluster), f->q->cluster);
}

static void count_entry(struct fill *f, const struct qcow2_class *c, const struct qcow2_entry *e,
                        uint32_t hole)
{
    if (!hole)
        return;
    size_t valid = valid_bytes(f, c, f->k);
    if (!may_get(f, e, valid))
        return;
    struct group *g = find_group(f, f->k, e, valid, c->n, true);
    if (!g && f->n_groups == MAX_GROUPS) {
        f->more = true;
        return;
    }
    if (!g) {
        g = &f->groups[f->n_groups++];
        *g = (struct group){.cluster = f->k, .old = *e, .hole = hole, .valid = valid};
    }
    g->times += c->n;
}

/* [page] Show each entry of each class to see(). */
static int each_entry(struct fill *f,
                      void (*see)(struct fill *f, const struct qcow2_class *c,
                                  const struct qcow2_entry *e, uint32_t hole),
                      struct dr_error *err)
{
    for (; f->at < f->span->n_classes; f->at++, f->k = 0) {
        const struct qcow2_class *c = class_at(f, f->at);
        if (qcow2_views_enough(f->span))
            return 1;
        for (; f->k < f->n; f->k++) {
            struct qcow2_entry e;
            uint32_t hole;
            int r = qcow2_views_entry(f->image, c, offset_of(f, f->k), &e, &hole, err);
            if (r < 0)
                return r;
            see(f, c, &e, hole);
        }
    }
    return 0;
}

/* [page] Count the entries of each group. */
static int find_groups(struct fill *f, struct dr_error *err)
{
    return each_entry(f, count_entry, err);
}

/* ------------------------------------------------------------------ who stays where it is */

/* A cluster is there already, and holes of it are to be filled. */
static bool has_place(const struct fill *f, const struct group *g)
{
    return g->old.host != QCOW2_NO_PLACE && !becomes_zeros(f, g->cluster);
}

static bool any_has_place(const struct fill *f)
{
    bool any = false;
    for (size_t i = 0; i < f->n_groups; i++)
        any |= has_place(f, &f->groups[i]);
    return any;
}

static void count_user(struct fill *f, const struct qcow2_class *c, const struct qcow2_entry *e,
                       uint32_t hole)
{
    (void)hole;
    if (f->at == 0 && disk_alone(f))
        f->disk[f->k] = *e;
    for (size_t i = 0; i < f->n_groups; i++) {
        struct group *g = &f->groups[i];
        if (g->cluster != f->k || !has_place(f, g) || e->coded || e->host != g->old.host)
            continue;
        g->known += c->n;
        if (!alike(e, &g->old))
            g->others |= e->held;
    }
}

/* [page] Count who leads to the places that groups have. */
static int find_users(struct fill *f, struct dr_error *err)
{
    return each_entry(f, count_user, err);
}

/* Another group has holes in the same cluster, and ends elsewhere: what it writes there differs. */
static bool contradicted(const struct fill *f, const struct group *g)
{
    bool other = false;
    for (size_t i = 0; i < f->n_groups; i++)
        other |= f->groups[i].cluster == g->cluster && f->groups[i].old.host == g->old.host &&
                 f->groups[i].valid != g->valid;
    return other;
}

/* [page] Which groups have to leave their cluster? */
static int find_leavers(struct fill *f)
{
    for (; f->at < f->n_groups; f->at++) {
        struct group *g = &f->groups[f->at];
        if (!has_place(f, g))
            continue;
        int r = qcow2_count(f->image, g->old.host, &g->count);
        if (r < 0)
            return r;
        if (g->count < g->known)
            return qcow2_damage(f->image,
                                "the cluster at byte %llu is used %llu times, counted %llu",
                                ULL(g->old.host), ULL(g->known), ULL(g->count));
        g->moves = g->known != g->count || (g->others & g->hole) || contradicted(f, g);
    }
    return 0;
}

/* The group in which the disk's entry is, if the disk has something to fill there. */
static struct group *group_of_disk(const struct fill *f, unsigned cluster)
{
    const struct qcow2_class *c = &f->span->classes[f->span->disk_class];
    for (size_t i = 0; i < f->n_groups; i++) {
        struct group *g = &f->groups[i];
        if (g->cluster == cluster && g->hole && alike(&f->disk[cluster], &g->old) &&
            g->valid == valid_bytes(f, c, cluster))
            return g;
    }
    return NULL;
}

/* Would nobody but the disk stay where the group has been? */
static bool leaves_disk(const struct fill *f, const struct group *g)
{
    const struct qcow2_entry *disk = &f->disk[g->cluster];
    uint64_t stay = g->known;
    if (!g->moves || !disk_alone(f) || disk->coded || disk->host != g->old.host)
        return false;
    const struct group *mine = group_of_disk(f, g->cluster);
    if (mine && mine->moves)
        return false;
    for (size_t i = 0; i < f->n_groups; i++) {
        const struct group *other = &f->groups[i];
        if (other->cluster == g->cluster && other->old.host == g->old.host && other->moves)
            stay -= other->times;
    }
    return stay == 1;
}

/* The disk leaves as one of the groups, or as a new one that has nothing to fill. */
static void move_disk(struct fill *f)
{
    for (size_t i = 0, n = f->n_groups; i < n; i++) {
        const struct group *g = &f->groups[i];
        if (!leaves_disk(f, g))
            continue;
        struct group *mine = group_of_disk(f, g->cluster);
        if (!mine) {
            mine = &f->groups[f->n_groups++];
            *mine = (struct group){.cluster = g->cluster, .old = f->disk[g->cluster], .times = 1};
        }
        mine->moves = true;
    }
}

/* ------------------------------------------------------------------ places */

static uint64_t place_len(const struct fill *f, const struct group *g)
{
    return g->coded ? g->coded : f->q->cluster;
}

/* [page] Where the bytes of the group go. */
static int find_host(struct fill *f, struct group *g, struct dr_error *err)
{
    int r = 1;
    g->coded = f->coded_len;
    g->fresh = false;
    g->host = g->old.host;
    if (becomes_zeros(f, g->cluster) && g->hole) {
        g->host = QCOW2_NO_PLACE;
        return 0;
    }
    if (has_place(f, g) && !g->moves)
        return 0;
    g->fresh = true;
    if (g->coded)
        r = qcow2_find_packed(f->image, g->coded, g->times, &g->host);
    return r == 1 ? qcow2_find_free(f->image, 1, &g->host, err) : r;
}

/* [page] Find each group its place, counted as often as it is going to be used. */
static int reserve_groups(struct fill *f, struct dr_error *err)
{
    for (; f->at < f->n_groups; f->at++) {
        struct group *g = &f->groups[f->at];
        int r = find_host(f, g, err);
        if (r == 0 && g->fresh)
            r = qcow2_reserve_counts(f->image, &g->pins, g->host, place_len(f, g));
        if (r < 0) {
            dr_reserve_unpin(f->image, &g->pins);
            g->fresh = false;
            return r;
        }
        g->left = g->times;
        if (g->fresh)
            qcow2_add(f->image, g->host, place_len(f, g), (int)g->times);
        if (g->coded)
            qcow2_packed_until(f->q, g->host + g->coded);
    }
    return 0;
}

/* The holes' bytes, and with a new place all others; zeros behind the end of the views. */
static int write_plain(const struct fill *f, const struct group *g, uint8_t *bytes,
                       struct dr_error *err)
{
    const struct qcow2 *q = f->q;
    struct dr_file *file = qcow2_data(f->image);
    int r = 0;
    memset(bytes, 0, q->cluster);
    if (f->buf)
        memcpy(bytes, f->buf + g->cluster * q->cluster, g->valid);
    for (unsigned i = 0; r == 0 && i < q->subs; i++) {
        uint64_t at = i * q->sub;
        if (g->moves && (g->old.held >> i & 1))
            r = dr_file_pread(file, bytes + at, g->old.host + at, q->sub, err);
        else if (!g->fresh && (g->hole >> i & 1))
            r = dr_file_pwrite(file, bytes + at, g->host + at, q->sub, err);
    }
    if (r == 0 && g->fresh)
        r = dr_file_pwrite(file, bytes, g->host, q->cluster, err);
    return r;
}

static int write_groups(struct fill *f, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *bytes = malloc(f->q->cluster);
    int r = bytes ? 0 : dr_fail_errno(err, ENOMEM, "%s", f->image->path);
    for (size_t i = 0; r == 0 && i < f->n_groups; i++) {
        const struct group *g = &f->groups[i];
        if (g->coded) {
            r = dr_file_pwrite(f->image->files[0], f->buf, g->host, g->coded, err);
            dr_decoded_forget(f->image, f->image->files[0], g->host, g->coded);
        } else if (g->host != QCOW2_NO_PLACE) {
            r = write_plain(f, g, bytes, err);
        }
    }
    return r;
}

/* ------------------------------------------------------------------ entries */

static void fill_entry(const struct fill *f, const struct group *g, struct qcow2_entry *e)
{
    if (g->coded) {
        *e = (struct qcow2_entry){.host = g->host, .coded = g->coded, .held = qcow2_all_subs(f->q)};
        return;
    }
    if (becomes_zeros(f, g->cluster) && g->hole)
        e->zero |= g->hole;
    else
        e->held |= g->hole;
    if (g->fresh) { /* else COPIED is each one's own */
        e->host = g->host;
        e->copied = g->times == 1;
    }
}

/* [page] The entry of the class becomes what its group is going to be. */
static int link_entry(struct fill *f, const struct qcow2_class *c, struct group *g,
                      struct qcow2_entry *e, struct dr_error *err)
{
    struct dr_image *image = f->image;
    struct dr_reservation pins = {0};
    struct dr_page *page = NULL;
    uint64_t cluster = f->q->cluster, at = qcow2_entry_at(f->q, c->table, offset_of(f, f->k));
    uint8_t raw[16];
    int r = dr_reserve_page(image, &pins, 0, at, f->q->entry, QCOW2_LEVEL_L2, &page);
    if (r == 0 && g->fresh) /* pinned already; here it is seen if that excludes the entry's pin */
        r = qcow2_reserve_counts(image, &pins, g->host, place_len(f, g));
    if (r == 0 && g->moves)
        r = qcow2_reserve_counts(image, &pins, g->old.host, cluster);
    if (r == 0 && g->moves)
        r = qcow2_pin_often(image, g->old.host, cluster, c->n);
    if (r == 0) {
        fill_entry(f, g, e);
        qcow2_entry_encode(f->q, e, raw);
        dr_page_put(image, page, at, raw, f->q->entry);
        g->left -= c->n;
    }
    for (size_t i = 0; r == 0 && g->moves && i < c->n; i++)
        qcow2_free_later(image, g->old.host, cluster);
    (void)err;
    dr_reserve_unpin(image, &pins);
    return r;
}

/* The group of this entry; of the disk's, perhaps the one that has nothing to fill. */
static struct group *group_of(const struct fill *f, const struct qcow2_class *c,
                              const struct qcow2_entry *e, uint32_t hole)
{
    struct group *found = NULL;
    if (hole)
        found = find_group(f, f->k, e, valid_bytes(f, c, f->k), c->n, false);
    for (size_t i = 0; !found && f->at == 0 && disk_alone(f) && i < f->n_groups; i++) {
        struct group *g = &f->groups[i];
        if (g->cluster == f->k && !g->hole && g->left > 0)
            found = g;
    }
    return found;
}

/* [page] Put the entries of all groups in. */
static int link_groups(struct fill *f, struct dr_error *err)
{
    for (; f->at < f->span->n_classes; f->at++, f->k = 0) {
        const struct qcow2_class *c = class_at(f, f->at);
        if (qcow2_views_enough(f->span))
            return 1;
        if (f->k == 0 && f->dirty++ == QCOW2_VIEWS_DIRTY) {
            f->dirty = 0;
            return dr_need_flush(f->image);
        }
        for (; f->k < f->n; f->k++) {
            struct qcow2_entry e;
            uint32_t hole;
            int r = qcow2_views_entry(f->image, c, offset_of(f, f->k), &e, &hole, err);
            struct group *g = r == 0 ? group_of(f, c, &e, hole) : NULL;
            if (g)
                r = link_entry(f, c, g, &e, err);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

/* After a failure what was not linked is not counted. */
static void end_groups(struct fill *f)
{
    DR_LOCK_SCOPE(&f->image->lock);
    for (size_t i = 0; i < f->n_groups; i++) {
        struct group *g = &f->groups[i];
        uint64_t count = 0, len = place_len(f, g);
        if (g->fresh && g->left) {
            f->q->views->recount |= g->left < g->times; /* the disk may be alone there now */
            qcow2_add(f->image, g->host, len, -(int)g->left);
            if (g->coded)
                f->q->coded_next = 0;
            for (uint64_t at = qcow2_cluster_start(f->q, g->host); at < g->host + len;
                 at += f->q->cluster)
                if (qcow2_count(f->image, at, &count) == 0 && count == 0)
                    qcow2_note_free(f->q, at, f->q->cluster);
        }
        dr_reserve_unpin(f->image, &g->pins);
    }
    f->n_groups = 0;
}

/* ------------------------------------------------------------------ rounds */

/* [page] Tables first: what they are, and that they may be edited. */
static int give_tables(struct fill *f, struct dr_error *err)
{
    int r = qcow2_ready_to_write(f->image, err);
    if (r == 0)
        r = qcow2_span_look(f->image, f->span, f->off, err);
    return r != 0 ? r : qcow2_views_tables(f->image, f->span, f->off, f->len, err);
}

static int settle_places(struct fill *f, struct dr_error *err)
{
    (void)err;
    int r = find_leavers(f);
    if (r == 0)
        move_disk(f);
    return r;
}

/* Run a step to its end. It keeps pages as long as it does not get on. */
static int run_step(struct fill *f, int (*step)(struct fill *f, struct dr_error *err),
                    struct dr_error *err)
{
    int r;
    f->at = 0;
    f->k = 0;
    do {
        struct dr_hold hold = {0};
        DR_LOCK_SCOPE(&f->image->lock);
        do {
            r = step(f, err);
        } while (r == -EAGAIN && (r = dr_image_satisfy(f->image, &hold, f->off, err)) == 0);
        dr_hold_end(&hold);
    } while (r == 1);
    return r;
}

static int fill_round(struct fill *f, struct dr_error *err)
{
    f->more = false;
    f->n_groups = 0;
    int r = run_step(f, find_groups, err);
    if (r == 0 && any_has_place(f))
        r = run_step(f, find_users, err);
    if (r == 0 && any_has_place(f))
        r = run_step(f, settle_places, err);
    if (r == 0 && f->n_groups > 0) {
        r = run_step(f, reserve_groups, err);
        if (r == 0)
            r = write_groups(f, err);
        if (r == 0)
            r = run_step(f, link_groups, err);
        end_groups(f);
    }
    return r;
}

static int fill_some(struct fill *f, struct dr_error *err)
{
    const struct qcow2 *q = f->q;
    f->n = (unsigned)dr_div_up(f->len, q->cluster);
    f->zeros = 0;
    for (unsigned k = 0; !f->coded_len && q->h.version >= 3 && k < f->n; k++)
        if (!f->buf || dr_is_zero(f->buf + k * q->cluster, q->cluster))
            f->zeros |= UINT64_C(1) << k;
    f->span->at = 0;
    int r = run_step(f, give_tables, err);
    do {
        if (r == 0)
            r = fill_round(f, err);
    } while (r == 0 && f->more);
    return r;
}

static void take_turn(struct dr_image *image, struct qcow2_views *v)
{
    DR_LOCK_SCOPE(&image->lock);
    while (v->filling)
        pthread_cond_wait(&v->turn, &image->lock);
    v->filling = true;
}

static void end_turn(struct dr_image *image, struct qcow2_views *v)
{
    DR_LOCK_SCOPE(&image->lock);
    v->filling = false;
    pthread_cond_signal(&v->turn);
}

int qcow2_views_fill(struct dr_image *image, const void *buf, uint32_t coded_len, uint64_t off,
                     uint64_t len, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE struct fill *f = calloc(1, sizeof(*f));
    CLEANUP_FREE struct group *groups = calloc((size_t)2 * MAX_GROUPS, sizeof(*groups));
    if (!f || !groups)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    f->image = image;
    f->q = q;
    f->span = &q->views->fill;
    f->groups = groups;
    f->coded_len = coded_len;
    take_turn(image, q->views);
    int r = 0;
    for (uint64_t at = 0; r == 0 && at < len; at += f->len) {
        f->off = off + at;
        f->len = dr_min(len - at, MAX_CLUSTERS * q->cluster);
        f->buf = buf ? (const uint8_t *)buf + at : NULL;
        r = fill_some(f, err);
    }
    end_turn(image, q->views);
    return r;
}
