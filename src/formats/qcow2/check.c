/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* check, repair, recovery of an image that was not closed, and trim.
 *
 * A repair goes in stages, each of which leaves the image no worse whenever it is cut off, is made
 * durable, and is followed by another look at everything:
 *
 *   1. snapshots that the file does not hold are cut off the table     one write to the header
 *   2. entries that have one right value get it                        each in its sector
 *   3. counts are corrected in place, or all of them written anew      each alone; or one write
 *   4. entries get clusters of their own where counts have no room     each in its sector
 *   5. a snapshot table or bitmap directory is written anew            one write to the header
 *   6. COPIED bits follow the counts                                   each in its sector
 *   7. the marks "dirty" and "corrupt" go when nothing is wrong        one write to the header
 *
 * Where more ways lead to a cluster than its count can say, and 4 has not helped, the image is
 * marked as corrupt: writing through one of them would change or free what the others show. */
#include "formats/qcow2/check.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/cleanup.h"

struct qcow2_check_limits qcow2_check_limits = {.tally = UINT64_C(31) << 20,
                                                .tables = UINT64_C(1) << 18};

/* More lines than anybody reads; a damaged image may have billions of findings. */
#define MAX_LINES 100000u

static void put_line(struct qcow2_check *c, const char *fmt, va_list ap)
{
    char line[512];
    vsnprintf(line, sizeof(line), fmt, ap);
    c->result->report(c->result->user, line);
}

void qcow2_say(struct qcow2_check *c, const char *fmt, ...)
{
    va_list ap;
    if (c->silent || c->said++ >= MAX_LINES)
        return;
    va_start(ap, fmt);
    put_line(c, fmt, ap);
    va_end(ap);
}

static void notice(struct qcow2_check *c, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static void notice(struct qcow2_check *c, const char *fmt, ...)
{
    va_list ap;
    if (c->silent)
        return;
    va_start(ap, fmt);
    put_line(c, fmt, ap);
    va_end(ap);
}

void qcow2_plan(struct qcow2_check *c, uint64_t at, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    if (!c->plan)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    c->plan(c->result->user, at, text);
}

static void found(struct qcow2_check *c, uint64_t times, const char *fmt, va_list ap)
{
    c->result->corruptions += times;
    if (!c->silent && c->said++ < MAX_LINES)
        put_line(c, fmt, ap);
}

void qcow2_found(struct qcow2_check *c, uint64_t times, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    found(c, times, fmt, ap);
    va_end(ap);
}

void qcow2_found_lost(struct qcow2_check *c, uint64_t times, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    found(c, times, fmt, ap);
    va_end(ap);
    c->lost = true;
}

/* ------------------------------------------------------------------ looking */

void qcow2_check_end(struct qcow2_check *c)
{
    qcow2_ahead_free(c);
    qcow2_tally_free(&c->tally);
    free(c->roots);
    free(c->l1s);
    free(c->bitmaps);
    free(c->overlaps);
    free(c->buf);
}

int qcow2_read_structure(struct qcow2_check *c, struct dr_check_result *result, bool silent,
                         struct dr_error *err)
{
    c->result = result;
    c->silent = silent;
    c->clusters = dr_div_up(dr_file_size(c->f), c->q->cluster);
    c->rebuild = c->no_block = c->copied_wrong = c->entries = false;
    c->highest = c->dangling = c->low = c->high = 0;
    c->n_overlaps = 0;
    c->crowd = 0;
    qcow2_tally_begin(&c->tally, 0, qcow2_check_limits.tally);
    int r = qcow2_read_snapshots(c, err);
    if (r == 0)
        r = qcow2_read_bitmaps(c, NULL, NULL, err);
    if (r == 0 && c->q->h.reftable_bad) {
        qcow2_found(c, 1, "ERROR the refcount table cannot be where the header says (at byte %u)",
                    QCOW2_AT_REFTABLE);
        c->rebuild = true;
    }
    return r < 0 ? r : qcow2_read_roots(c, err);
}

/* Look at everything anew, into *result. c->lost stays set once it is. */
static int examine(struct qcow2_check *c, struct dr_check_result *result, bool silent,
                   struct dr_error *err)
{
    const struct qcow2 *q = c->q;
    uint64_t total = dr_div_up(c->image->size, q->cluster);
    int r = qcow2_read_structure(c, result, silent, err);
    if (r == 0)
        r = qcow2_count_all(c, 0, err);
    if (r == 0 && c->n_overlaps)
        r = qcow2_name_overlaps(c, err);
    if (r == 0 && c->copied_wrong)
        r = qcow2_check_copied(c, false, err);
    result->total_clusters = total;
    result->image_end_offset = (c->highest + 1) * q->cluster;
    return r;
}

int qcow2_check_begin(struct qcow2_check *c, struct dr_image *image, struct dr_error *err)
{
    *c = (struct qcow2_check){.image = image, .q = qcow2_of(image), .f = image->files[0]};
    c->buf = malloc(QCOW2_CHECK_STEP);
    if (!c->buf || qcow2_ahead_new(c) < 0)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return 0;
}

/* ------------------------------------------------------------------ repairing */

enum stage {
    CUT_SNAPSHOTS,
    MEND_ENTRIES,
    CORRECT_COUNTS,
    SPLIT_CROWDED,
    RENEW_SNAPSHOTS,
    RENEW_BITMAPS,
    FREE_RENEWED, /* what the two have given up */
    CORRECT_COPIED,
    STAGES
};

static int cut_snapshots(struct qcow2_check *c, struct dr_error *err)
{
    uint8_t field[4];
    put_be32(field, c->n_snapshots);
    qcow2_plan(c, QCOW2_AT_SNAPSHOTS, "the header counts %u snapshots, not %u", c->n_snapshots,
               c->q->h.n_snapshots);
    int r = qcow2_switch(c->image, QCOW2_AT_SNAPSHOTS, field, sizeof(field), err);
    if (r == 0)
        c->q->h.n_snapshots = c->n_snapshots;
    return r;
}

/* Clusters that seem unused may be what a damaged entry should lead to. */
static bool keeps_leaks(const struct qcow2_check *c)
{
    return c->lost || c->bad_bitmaps;
}

static bool wants_all(unsigned fix)
{
    return (fix & DR_CHECK_FIX_ALL) == DR_CHECK_FIX_ALL;
}

static unsigned allowed(const struct qcow2_check *c, unsigned fix)
{
    unsigned what = wants_all(fix) ? QCOW2_RAISE : 0;
    return keeps_leaks(c) ? what : what | QCOW2_LOWER;
}

static bool must_rebuild(const struct qcow2_check *c)
{
    return c->rebuild || c->no_block;
}

/* Nothing that is in use looks free. */
static bool can_allocate(const struct qcow2_check *c)
{
    return !must_rebuild(c) && c->low == 0;
}

static bool corrects_counts(const struct qcow2_check *c, bool all)
{
    if (all && (must_rebuild(c) || c->low))
        return true;
    return c->high && !keeps_leaks(c) && !must_rebuild(c);
}

static bool wanted(const struct qcow2_check *c, unsigned stage, unsigned fix)
{
    bool all = wants_all(fix);
    switch (stage) {
    case CUT_SNAPSHOTS:
        return all && c->overhang;
    case MEND_ENTRIES:
        return all && c->entries;
    case RENEW_SNAPSHOTS:
        return all && c->incomplete && can_allocate(c) && c->n_snapshots == c->q->h.n_snapshots;
    case SPLIT_CROWDED: /* how a cluster is encrypted depends on its place */
        return all && c->crowd && can_allocate(c) && !c->q->h.crypt;
    case RENEW_BITMAPS:
        return all && c->bad_bitmaps && can_allocate(c);
    case FREE_RENEWED:
        return c->renewed && corrects_counts(c, all);
    case CORRECT_COUNTS:
        return corrects_counts(c, all);
    default: /* by counts that are right */
        return c->copied_wrong && (all || (can_allocate(c) && !c->high && !keeps_leaks(c)));
    }
}

int qcow2_reload(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    bool loaded;
    {
        DR_LOCK_SCOPE(&image->lock);
        dr_page_forget(image, 0, 0, UINT64_MAX);
        loaded = q->reftable;
        free(q->reftable);
        free(q->meta.slots);
        free(q->damage);
        q->reftable = NULL;
        q->damage = NULL;
        q->meta = (struct qcow2_set){0};
        q->reftable_full = q->damage_noted = false;
        q->cursor = q->coded_next = 0;
        q->n_free = 0;
        q->reftable_n = 0;
    }
    int r = loaded ? qcow2_load_reftable(image, err) : 0;
    if (r == 0)
        return 0;
    DR_LOCK_SCOPE(&image->lock);
    if (!q->damage)
        q->damage = strdup("its refcount table could not be read again");
    q->damage_noted = true; /* the image itself is right */
    return r;
}

/* The driver allocates: it must know the file as it is now. */
static int renew(struct qcow2_check *c, unsigned stage, struct dr_error *err)
{
    int r = qcow2_reload(c->image, err);
    if (r < 0 || stage == SPLIT_CROWDED)
        return r < 0 ? r : qcow2_split_crowded(c, err);
    c->renewed = true;
    return stage == RENEW_SNAPSHOTS ? qcow2_renew_snapshots(c, err) : qcow2_renew_bitmaps(c, err);
}

static int correct_counts(struct qcow2_check *c, unsigned fix, struct dr_error *err)
{
    if (!must_rebuild(c))
        return qcow2_count_all(c, allowed(c, fix), err);
    return c->dangling ? 0 : qcow2_rebuild(c, err);
}

static void announce(struct qcow2_check *c, unsigned stage)
{
    if ((stage != CORRECT_COUNTS && stage != FREE_RENEWED) || !must_rebuild(c))
        return;
    if (c->dangling)
        notice(c,
               "The refcount structure is not rebuilt: it would go behind the end of the file, "
               "where %llu entries say that there is data",
               ULL(c->dangling));
    else
        notice(c, "Rebuilding refcount structure");
}

static int run_stage(struct qcow2_check *c, unsigned stage, unsigned fix, struct dr_error *err)
{
    bool silent = c->silent;
    int r;
    announce(c, stage);
    c->silent = true;
    if (stage == CUT_SNAPSHOTS)
        r = cut_snapshots(c, err);
    else if (stage == MEND_ENTRIES)
        r = qcow2_mend_entries(c, err);
    else if (stage == CORRECT_COPIED)
        r = qcow2_check_copied(c, true, err);
    else if (stage == SPLIT_CROWDED || stage == RENEW_SNAPSHOTS || stage == RENEW_BITMAPS)
        r = renew(c, stage, err);
    else
        r = correct_counts(c, fix, err);
    c->silent = silent;
    return r < 0 ? r : dr_file_flush(c->f, err);
}

/* After examine has told what is wrong. *result becomes what is left. */
static int repair(struct qcow2_check *c, unsigned fix, struct dr_check_result *result,
                  struct dr_error *err)
{
    struct dr_check_result before = *result;
    bool silent = c->silent, changed = false;
    int r = 0;
    for (unsigned stage = 0; r == 0 && stage < STAGES; stage++) {
        if (!wanted(c, stage, fix))
            continue;
        struct dr_check_result ignored = before;
        c->result = &ignored;
        c->silent = silent;
        changed = true;
        r = run_stage(c, stage, fix, err);
        c->result = result;
        *result = (struct dr_check_result){.report = before.report, .user = before.user};
        if (r == 0)
            r = examine(c, result, true, err);
    }
    int loaded = changed ? qcow2_reload(c->image, r < 0 ? NULL : err) : 0;
    if (r < 0 || loaded < 0)
        return r < 0 ? r : loaded;
    if (before.corruptions > result->corruptions)
        result->corruptions_fixed = before.corruptions - result->corruptions;
    if (before.leaks > result->leaks)
        result->leaks_fixed = before.leaks - result->leaks;
    return 0;
}

/* The image may be written to again. */
static int clear_marks(struct qcow2_check *c, struct dr_error *err)
{
    struct dr_image *image = c->image;
    if (c->q->h.incompatible & (QCOW2_DIRTY | QCOW2_CORRUPT))
        qcow2_plan(c, QCOW2_AT_INCOMPATIBLE, "the header is not marked as dirty or corrupt");
    int r = qcow2_switch_bits(image, QCOW2_AT_INCOMPATIBLE, 0, QCOW2_DIRTY | QCOW2_CORRUPT, err);
    if (r == 0)
        image->unclean = false;
    return r;
}

/* More ways lead to some cluster than its count can say: nobody can write without harm. Version 2
 * has no such mark. */
static int mark_crowded(struct qcow2_check *c, struct dr_error *err)
{
    if (c->q->h.version < 3 || (c->q->h.incompatible & QCOW2_CORRUPT))
        return 0;
    notice(c,
           "The image is marked as corrupt and can only be read: %llu references are more than "
           "counts of %u bits can say; copy it with `convert`",
           ULL(c->crowd), 1u << c->q->h.refcount_order);
    qcow2_plan(c, QCOW2_AT_INCOMPATIBLE, "the header is marked as corrupt");
    return qcow2_switch_bits(c->image, QCOW2_AT_INCOMPATIBLE, QCOW2_CORRUPT, 0, err);
}

/* upgrading: version 3 is to follow, and what it demands is missing. */
static int check_image(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                       bool silent, bool upgrading, struct dr_error *err)
{
    struct qcow2_check c;
    int r = qcow2_check_begin(&c, image, err);
    c.plan = result->plan;
    c.upgrading = upgrading;
    if (r == 0)
        r = examine(&c, result, silent, err);
    if (r == 0 && c.said > MAX_LINES)
        notice(&c, "%llu more findings are not listed", ULL(c.said - MAX_LINES));
    if (r == 0 && fix && c.lost && c.high)
        notice(&c, "Leaked clusters are kept: they may be what the damaged entries led to");
    if (r == 0 && fix)
        r = repair(&c, fix, result, err);
    if (r == 0 && fix && result->corruptions == 0)
        r = clear_marks(&c, err);
    c.silent = silent;
    if (r == 0 && wants_all(fix) && c.crowd)
        r = mark_crowded(&c, err);
    qcow2_check_end(&c);
    return r;
}

int qcow2_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                struct dr_error *err)
{
    return check_image(image, fix, result, false, false, err);
}

/* Somebody who kept no counts while writing (lazy refcounts) was killed. */
int qcow2_recover(struct dr_image *image, struct dr_error *err)
{
    struct dr_check_result result = {0};
    int r = check_image(image, DR_CHECK_FIX_ALL, &result, true, false, err);
    if (r == 0 && result.corruptions)
        r = dr_fail(
            err, EIO,
            "%s: was not closed properly, and %llu errors in it cannot be repaired; `drover "
            "check` names them",
            image->path, ULL(result.corruptions));
    return r;
}

int qcow2_complete_snapshots(struct dr_image *image, struct dr_error *err)
{
    struct dr_check_result result = {0};
    int r = check_image(image, DR_CHECK_FIX_ALL, &result, true, true, err);
    if (r == 0 && result.corruptions)
        r = dr_fail(err, EIO,
                    "%s: has %llu errors that cannot be repaired; `drover check` names them",
                    image->path, ULL(result.corruptions));
    return r;
}

int qcow2_refuse_low_counts(struct dr_image *image, struct dr_error *err)
{
    struct dr_check_result result = {0};
    struct qcow2_check c;
    int r = qcow2_check_begin(&c, image, err);
    if (r == 0)
        r = qcow2_read_structure(&c, &result, true, err);
    if (r == 0)
        r = qcow2_count_all(&c, 0, err);
    if (r == 0 && c.low)
        r = dr_fail(
            err, EIO,
            "%s: the cluster at byte %llu is counted less often than it is used (%llu are), "
            "so it could be freed while something still has it; `drover check -r all` "
            "mends it",
            image->path, ULL(c.low_at), ULL(c.low));
    if (r == 0 && c.crowd)
        r = dr_fail(err, EIO,
                    "%s: more entries lead to a cluster than its count of %u bit%s can say, so a "
                    "write to one would change another; `drover check -r all` gives each its own",
                    image->path, 1u << c.q->h.refcount_order, c.q->h.refcount_order ? "s" : "");
    if (r == 0 && must_rebuild(&c))
        r = dr_fail(err, EIO,
                    "%s: its reference counts are damaged, so something could be freed that is "
                    "still in use; `drover check -r all` mends them",
                    image->path);
    qcow2_check_end(&c);
    return r;
}

/* ------------------------------------------------------------------ trim */

/* The end of the last cluster with a count; UINT64_MAX: it cannot be told. */
static int counted_end(struct qcow2_check *c, uint64_t *end, struct dr_error *err)
{
    uint64_t per = qcow2_block_entries(c->q), cluster = c->q->cluster, at;
    CLEANUP_FREE uint8_t *block = malloc(cluster);
    int r = block ? qcow2_read_roots(c, err) : dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    *end = UINT64_MAX;
    for (uint64_t i = c->n_roots; r == 0 && i-- > 0;) {
        enum qcow2_root root = qcow2_root_of(c, i, &at);
        if (c->roots[i] && root != QCOW2_ROOT_BLOCK)
            return 0;
        if (root != QCOW2_ROOT_BLOCK)
            continue;
        r = dr_file_pread_short(c->f, block, at, cluster, NULL, err);
        for (uint64_t j = per; r == 0 && j-- > 0;)
            if (qcow2_count_get(c->q->h.refcount_order, block, j)) {
                *end = (i * per + j + 1) * cluster;
                return 0;
            }
    }
    return r;
}

int qcow2_trim(struct dr_image *image, struct dr_error *err)
{
    struct qcow2_check c;
    uint64_t end = UINT64_MAX;
    if (image->files[0]->block_device)
        return 0;
    int r = dr_image_flush_all(image, err);
    if (r < 0)
        return r;
    r = qcow2_check_begin(&c, image, err);
    c.clusters = dr_div_up(dr_file_size(c.f), c.q->cluster);
    if (r == 0)
        r = counted_end(&c, &end, err);
    qcow2_check_end(&c);
    if (r < 0 || end >= dr_file_size(image->files[0]))
        return r;
    {
        DR_LOCK_SCOPE(&image->lock);
        dr_page_forget(image, 0, end, UINT64_MAX - end);
    }
    r = dr_file_truncate(image->files[0], end, err);
    return r < 0 ? r : dr_file_flush(image->files[0], err);
}
