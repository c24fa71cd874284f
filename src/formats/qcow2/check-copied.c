/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The COPIED bits of the active tables: set where the count on disk is 1, clear elsewhere. Only
 * when the counting has found that some are wrong does this read the active tables again, to tell
 * which ones. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

#define CACHE_LINES 1024u
#define LINE        4096u

struct copied {
    struct qcow2_check *c;
    bool fix;
    uint64_t tags[CACHE_LINES]; /* 1 + where the line begins; 0 = none */
    uint8_t *lines;
};

/* The count on disk. *known: there is one that can be read, or none. */
static int stored_count(struct copied *p, uint64_t host, uint64_t *count, bool *known,
                        struct dr_error *err)
{
    const struct qcow2 *q = p->c->q;
    uint64_t cluster = host / q->cluster, per = qcow2_block_entries(q), block;
    enum qcow2_root root = qcow2_root_of(p->c, cluster / per, &block);
    unsigned order = q->h.refcount_order;
    *count = 0;
    *known = root != QCOW2_ROOT_UNKNOWN;
    if (root != QCOW2_ROOT_BLOCK)
        return 0;
    uint64_t in_block = (cluster % per << order) / 8, at = dr_round_down(block + in_block, LINE);
    uint8_t *line = p->lines + at / LINE % CACHE_LINES * LINE;
    int r = 0;
    if (p->tags[at / LINE % CACHE_LINES] != at + 1) {
        r = dr_file_pread_short(p->c->f, line, at, LINE, NULL, err);
        p->tags[at / LINE % CACHE_LINES] = r < 0 ? 0 : at + 1;
    }
    /* Counts that share a byte begin at its lowest bits. */
    unsigned index = order < 3 ? (unsigned)(cluster % (8u >> order)) : 0;
    if (r == 0)
        *count = qcow2_count_get(order, line + (block + in_block - at), index);
    return r;
}

/* Nothing else lies where the table does, so it can be written to. */
static int stands_alone(struct copied *p, uint64_t at, uint64_t times, bool *alone,
                        struct dr_error *err)
{
    uint64_t count;
    int r = stored_count(p, at, &count, alone, err);
    *alone = *alone && count == times && at >= p->c->q->cluster;
    return r;
}

/* The right value of an entry with a wrong bit, else v. */
static int right_value(struct copied *p, uint64_t v, bool data_file, uint64_t *right,
                       struct dr_error *err)
{
    uint64_t count = 1;
    bool known = true;
    int r = data_file ? 0 : stored_count(p, v & QCOW2_OFFSET, &count, &known, err);
    *right = !known ? v : count == 1 ? v | QCOW2_COPIED : v & ~QCOW2_COPIED;
    return r;
}

/* Report it, or put the right value into the entry. Where some table could not be followed, it
 * may be a way to the cluster: none is said to be the only one. */
static bool settle(struct copied *p, const char *what, uint64_t at, uint8_t *entry, uint64_t right,
                   uint64_t times)
{
    struct qcow2_check *c = p->c;
    uint64_t v = get_be64(entry);
    if (p->fix && (!c->lost || !(right & QCOW2_COPIED))) {
        qcow2_plan(c, at, "COPIED is %s in the entry of the %s",
                   right & QCOW2_COPIED ? "set" : "cleared", what);
        put_be64(entry, right);
        return true;
    }
    if (!p->fix)
        qcow2_found(c, times,
                    "ERROR OFLAG_COPIED %s: entry=%llx refcount %s 1 (entry at byte %llu)", what,
                    ULL(v), right & QCOW2_COPIED ? "is" : "is not", ULL(at));
    return false;
}

static int copied_l1(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                     uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    struct copied *p = user;
    bool changed = false, alone = true;
    int r = 0;
    if (!part->active)
        return 0;
    for (size_t i = 0; r == 0 && i < len; i += 8) {
        uint64_t v = get_be64(bytes + i), right;
        if (p->fix && (i == 0 || (at + i) % c->q->cluster == 0))
            r = stands_alone(p, at + i, part->times, &alone, err);
        if (r < 0 || !alone || !(v & QCOW2_OFFSET))
            continue;
        r = right_value(p, v, false, &right, err);
        if (r == 0 && right != v)
            changed |= settle(p, "L2 cluster", at + i, bytes + i, right, part->active);
    }
    return r < 0 || !changed ? r : dr_file_pwrite(c->f, bytes, at, len, err);
}

static bool is_standard(const struct qcow2 *q, uint64_t v)
{
    if (v & QCOW2_CODED)
        return false;
    return (v & QCOW2_OFFSET) || (qcow2_has_data_file(q) && (v & QCOW2_COPIED));
}

static int copied_table(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                        uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    struct copied *p = user;
    const struct qcow2 *q = c->q;
    size_t from = len, to = 0;
    bool alone = true;
    int r = 0;
    if (!table->active)
        return 0;
    if (p->fix)
        r = stands_alone(p, table->at, table->times, &alone, err);
    for (size_t i = 0; r == 0 && alone && i < len; i += q->entry) {
        uint64_t v = get_be64(bytes + i), right;
        if (!is_standard(q, v))
            continue;
        r = right_value(p, v, qcow2_has_data_file(q), &right, err);
        if (r < 0 || right == v ||
            !settle(p, "data cluster", at + i, bytes + i, right, table->active))
            continue;
        from = dr_min(from, i);
        to = i + 8;
    }
    return r < 0 || !to ? r : dr_file_pwrite(c->f, bytes + from, at + from, to - from, err);
}

int qcow2_check_copied(struct qcow2_check *c, bool fix, struct dr_error *err)
{
    CLEANUP_FREE struct copied *p = calloc(1, sizeof(*p));
    CLEANUP_FREE uint8_t *lines = malloc((size_t)CACHE_LINES * LINE);
    if (!p || !lines)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    p->c = c;
    p->fix = fix;
    p->lines = lines;
    c->writes = fix;
    int r = qcow2_each_table(c, copied_l1, copied_table, p, err);
    c->writes = false;
    return r;
}
