/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The snapshot table and the bitmap directory: finds the tables that they name, and what is wrong
 * with their own entries. */
#include "formats/qcow2/bitmap.h"
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

#define MAX_EXTRA 1024u /* QEMU's */
#define MAX_TABLE (UINT64_C(64) << 20)

static int new_ranges(struct qcow2_check *c, struct qcow2_range **ranges, size_t n,
                      struct dr_error *err)
{
    free(*ranges);
    *ranges = malloc((n ? n : 1) * sizeof(**ranges));
    return *ranges ? 0 : dr_fail_errno(err, ENOMEM, "%s", c->image->path);
}

/* ------------------------------------------------------------------ snapshots */

/* READ; NOT_THERE: behind the end of the file, or zeros; DAMAGED: nobody knows where it ends. */
enum { READ, NOT_THERE, DAMAGED };

int qcow2_read_snapshot(struct qcow2_check *c, uint64_t at, struct qcow2_snapshot *s,
                        struct dr_error *err)
{
    uint8_t raw[QCOW2_SNAPSHOT_HEADER] = {0};
    uint64_t size = dr_file_size(c->f);
    int r = dr_file_pread_short(c->f, raw, at, sizeof(raw), NULL, err);
    *s = (struct qcow2_snapshot){.at = at};
    if (r < 0)
        return r;
    if (dr_is_zero(raw, sizeof(raw)))
        return NOT_THERE;
    s->l1_at = get_be64(raw);
    s->l1_entries = get_be32(raw + 8);
    s->extra = get_be32(raw + 36);
    s->len = sizeof(raw) + (uint64_t)s->extra + get_be16(raw + 12) + get_be16(raw + 14);
    if (!dr_inside(at, s->len, size) || at + s->len - c->q->h.snapshots_at > MAX_TABLE)
        return DAMAGED;
    return READ;
}

static void judge_snapshot(struct qcow2_check *c, uint32_t i, const struct qcow2_snapshot *s)
{
    uint64_t bytes = s->l1_entries * UINT64_C(8);
    if (s->extra > MAX_EXTRA)
        qcow2_found_lost(c, 1,
                         "ERROR Too much extra metadata in snapshot table entry %u (at byte "
                         "%llu)",
                         i, ULL(s->at));
    else if ((c->q->h.version >= 3 || c->upgrading) && s->extra < QCOW2_SNAPSHOT_EXTRA) {
        qcow2_found(c, 1, "ERROR snapshot table entry %u is incomplete (at byte %llu)", i,
                    ULL(s->at));
        c->incomplete = true;
    }
    if (s->l1_at % c->q->cluster || s->l1_at > INT64_MAX)
        qcow2_found_lost(c, 1,
                         "ERROR snapshot %u l1_offset=0x%llx: L1 table is not cluster aligned; "
                         "snapshot table entry corrupted (at byte %llu)",
                         i, ULL(s->l1_at), ULL(s->at));
    else if (bytes > QCOW2_MAX_L1)
        qcow2_found_lost(c, 1,
                         "ERROR snapshot %u l1_size=0x%x: L1 table is too large; snapshot table "
                         "entry corrupted (at byte %llu)",
                         i, s->l1_entries, ULL(s->at));
    else
        c->l1s[c->n_l1s++] = (struct qcow2_range){s->l1_at, bytes, false};
}

int qcow2_read_snapshots(struct qcow2_check *c, struct dr_error *err)
{
    const struct qcow2_header *h = &c->q->h;
    uint64_t at = h->snapshots_at;
    int r = new_ranges(c, &c->l1s, h->n_snapshots + (size_t)1, err);
    if (r < 0)
        return r;
    c->l1s[0] = (struct qcow2_range){h->l1_at, h->l1_entries * UINT64_C(8), true};
    c->n_l1s = 1;
    c->n_snapshots = 0;
    c->snapshots_len = 0;
    c->overhang = c->incomplete = false;
    if (h->n_snapshots && qcow2_has_data_file(c->q))
        qcow2_found(c, 1, "ERROR %u snapshots in image with data file (at byte %u)", h->n_snapshots,
                    QCOW2_AT_SNAPSHOTS);
    for (uint32_t i = 0; i < h->n_snapshots; i++) {
        struct qcow2_snapshot s;
        at = dr_round_up(at, 8);
        if ((r = qcow2_read_snapshot(c, at, &s, err)) < 0)
            return r;
        if (r == NOT_THERE) { /* whatever the header says */
            c->overhang = true;
            qcow2_found_lost(
                c, h->n_snapshots - i,
                "ERROR snapshot table entry %u at byte %llu is missing: the header says "
                "that there are %u",
                i, ULL(at), h->n_snapshots);
            break;
        }
        if (r == DAMAGED) {
            qcow2_found_lost(c, h->n_snapshots - i,
                             "ERROR snapshot table entry %u at byte %llu has lengths that are out "
                             "of bounds: only %u of %u snapshots can be read",
                             i, ULL(at), i, h->n_snapshots);
            break;
        }
        judge_snapshot(c, i, &s);
        at += s.len;
        c->snapshots_len = at - h->snapshots_at;
        c->n_snapshots++;
    }
    return r < 0 ? r : 0;
}

/* ------------------------------------------------------------------ bitmaps */

/* 1 = read, 0 = the directory, or the file, ends before it does. */
static int read_bitmap(struct qcow2_check *c, uint64_t at, struct qcow2_bitmap *b,
                       struct dr_error *err)
{
    uint8_t raw[QCOW2_BITMAP_ENTRY];
    uint64_t end = dr_min(c->q->bitmaps_at + c->q->bitmaps_len, dr_file_size(c->f));
    *b = (struct qcow2_bitmap){0};
    if (!dr_inside(at, sizeof(raw), end))
        return 0;
    int r = dr_file_pread(c->f, raw, at, sizeof(raw), err);
    if (r < 0)
        return r;
    qcow2_bitmap_decode(raw, b);
    return dr_inside(at, qcow2_bitmap_entry_len(b), end);
}

/* A sound entry of the directory. */
static int take_bitmap(struct qcow2_check *c, uint64_t at, const struct qcow2_bitmap *b,
                       qcow2_bitmap_fn each, void *user, struct dr_error *err)
{
    c->bitmaps[c->n_bitmaps++] = (struct qcow2_range){b->table_at, b->entries * UINT64_C(8), false};
    return each ? each(c, at, qcow2_bitmap_entry_len(b), user, err) : 0;
}

/* Names are few and long: each is compared only with those that have the same hash. */
struct named {
    uint64_t hash, at, len; /* of the name in the file */
    uint32_t index;
};

static int name_order(const void *a, const void *b)
{
    const struct named *x = a, *y = b;
    if (x->hash != y->hash)
        return x->hash < y->hash ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

static int read_name(struct qcow2_check *c, uint64_t at, const struct qcow2_bitmap *b,
                     struct named *n, struct dr_error *err)
{
    uint8_t name[QCOW2_MAX_BITMAP_NAME];
    n->at = at + QCOW2_BITMAP_ENTRY + b->extra;
    n->len = dr_min(b->name_len, sizeof(name));
    n->hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    int r = dr_file_pread(c->f, name, n->at, n->len, err);
    for (uint64_t i = 0; i < n->len; i++)
        n->hash = (n->hash ^ name[i]) * UINT64_C(0x100000001b3);
    return r;
}

static int same_name(struct qcow2_check *c, const struct named *a, const struct named *b,
                     bool *same, struct dr_error *err)
{
    uint8_t x[QCOW2_MAX_BITMAP_NAME], y[QCOW2_MAX_BITMAP_NAME];
    int r = dr_file_pread(c->f, x, a->at, a->len, err);
    if (r == 0)
        r = dr_file_pread(c->f, y, b->at, b->len, err);
    *same = r == 0 && a->len == b->len && memcmp(x, y, a->len) == 0;
    return r;
}

/* twice[i]: an earlier bitmap than the i-th has the same name. */
static int find_twins(struct qcow2_check *c, bool *twice, struct dr_error *err)
{
    uint64_t at = c->q->bitmaps_at;
    uint32_t n = 0;
    CLEANUP_FREE struct named *names = calloc(c->q->n_bitmaps, sizeof(*names));
    if (!names)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    for (; n < c->q->n_bitmaps; n++) {
        struct qcow2_bitmap b;
        int r = read_bitmap(c, at, &b, err);
        if (r > 0)
            r = read_name(c, at, &b, &names[n], err) < 0 ? -EIO : 1;
        if (r < 0)
            return r;
        if (r == 0)
            break;
        names[n].index = n;
        at += qcow2_bitmap_entry_len(&b);
    }
    qsort(names, n, sizeof(*names), name_order);
    for (uint32_t i = 1; i < n; i++) {
        const struct named *a = &names[i - 1], *b = &names[i];
        int r = a->hash == b->hash ? same_name(c, a, b, &twice[b->index], err) : 0;
        if (r < 0)
            return r;
    }
    return 0;
}

int qcow2_read_bitmaps(struct qcow2_check *c, qcow2_bitmap_fn each, void *user,
                       struct dr_error *err)
{
    uint64_t at = c->q->bitmaps_at;
    CLEANUP_FREE bool *twice = calloc(c->q->n_bitmaps + 1, sizeof(*twice));
    if (!twice)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    int r = new_ranges(c, &c->bitmaps, c->q->n_bitmaps, err);
    if (r == 0 && c->q->n_bitmaps > 1)
        r = find_twins(c, twice, err);
    c->n_bitmaps = 0;
    c->bad_bitmaps = c->q->bitmaps_bad;
    if (c->bad_bitmaps)
        qcow2_found(c, 1, "ERROR the header's bitmaps extension is out of bounds");
    for (uint32_t i = 0; r == 0 && i < c->q->n_bitmaps; i++) {
        struct qcow2_bitmap b;
        int there = read_bitmap(c, at, &b, err);
        if (there < 0)
            return there;
        const char *bad = there ? qcow2_bitmap_problem(c->image, &b)
                                : "it is behind the end of the directory";
        if (!bad && twice[i])
            bad = "another one has the same name";
        if (bad) {
            qcow2_found(c, 1, "ERROR bitmap directory entry %u at byte %llu: %s", i, ULL(at), bad);
            c->bad_bitmaps = true;
        } else {
            r = take_bitmap(c, at, &b, each, user, err);
        }
        if (!there)
            break; /* nobody knows where the others are */
        at += qcow2_bitmap_entry_len(&b);
    }
    return r;
}
