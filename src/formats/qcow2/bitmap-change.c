/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Adding, removing, clearing, enabling, disabling and merging bitmaps. The texts are QEMU's. */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"
#include "core/marks.h"

#define DEFAULT_MIN UINT64_C(4096) /* granularity when none is told: the cluster, within these */
#define DEFAULT_MAX UINT64_C(65536)

static int not_found(const char *name, struct dr_error *err)
{
    return dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", name);
}

/* ours: it is in use by this very open. */
static int check_usable(const struct dr_image *image, const struct qcow2_bitmap *b, bool ours,
                        const char *name, struct dr_error *err)
{
    if ((b->flags & QCOW2_BITMAP_IN_USE) && !ours)
        return dr_fail(err, EUCLEAN, "Bitmap '%s' is inconsistent and cannot be used", name);
    if (qcow2_bitmap_foreign(b))
        return dr_fail(err, ENOTSUP,
                       "%s: the bitmap \"%s\" has extra data that this version does not know; it "
                       "can only be removed",
                       image->path, name);
    return 0;
}

/* ------------------------------------------------------------------ merge */

static int set_dirty(void *user, uint64_t off, uint64_t len)
{
    struct qcow2_bits *s = user;
    return qcow2_bits_set(s, off, len, s->err);
}

static int check_source(struct qcow2_bitmap_edit *e, const struct dr_bitmap_change *c,
                        struct dr_error *err)
{
    uint64_t size = qcow2_of(e->image)->h.size, theirs = c->source->size;
    if (theirs == size)
        return 0;
    return dr_fail(err, EINVAL,
                   "Bitmaps are of different sizes (destination size is %llu, source size is %llu) "
                   "and can't be merged",
                   ULL(size), ULL(theirs));
}

static int merge(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d,
                 const struct dr_bitmap_change *c, struct dr_error *err)
{
    struct qcow2_bits bits = {0};
    int r = c->ranges ? 0 : check_source(e, c, err);
    if (r == 0)
        r = d->b.table_at ? qcow2_bits_open(&bits, e->image, &d->b, false, err)
                          : qcow2_bits_open_new(&bits, e->image, &d->b, d->entries, err);
    if (r == 0) {
        bits.err = err;
        r = c->ranges ? dr_marks_each(c->ranges, e->image->size, set_dirty, &bits)
                      : dr_image_bitmap_read(c->source, c->source_name, set_dirty, &bits, err);
    }
    if (r == 0)
        r = qcow2_bits_store(&bits, err);
    int kept = qcow2_edit_taken(e, &bits, r < 0 ? NULL : err);
    r = r < 0 ? r : kept;
    if (r == 0 && bits.table_changed)
        r = qcow2_edit_table(e, d, DR_STEAL(bits.table), bits.bitmap.entries, err);
    qcow2_bits_close(&bits);
    return r;
}

/* ------------------------------------------------------------------ add, remove */

static int check_new(struct qcow2_bitmap_edit *e, const struct dr_bitmap_change *c,
                     uint64_t granularity, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(e->image);
    uint64_t bytes;
    if (!*c->name)
        return dr_fail(err, EINVAL, "Bitmap name cannot be empty");
    if (granularity < 512 || granularity > UINT32_MAX || granularity & (granularity - 1))
        return dr_fail(err, EINVAL, "Granularity must be power of 2 and at least 512");
    if (strlen(c->name) > QCOW2_MAX_BITMAP_NAME)
        return dr_fail(err, EINVAL, "Bitmap name too long: %s", c->name);
    if (qcow2_edit_find(e, c->name))
        return dr_fail(err, EEXIST, "Bitmap already exists: %s", c->name);
    if (q->h.version < 3)
        return dr_fail(err, ENOTSUP,
                       "Can't make bitmap '%s' persistent in '%s': Cannot store dirty bitmaps in "
                       "qcow2 v2 files",
                       c->name, e->image->path);
    if (e->n >= QCOW2_MAX_BITMAPS)
        return dr_fail(err, EINVAL,
                       "Can't make bitmap '%s' persistent in '%s': Maximum number of persistent "
                       "bitmaps is already reached",
                       c->name, e->image->path);
    bytes = dr_div_up(dr_div_up(q->h.size, granularity), 8);
    if (bytes > QCOW2_MAX_BITMAP_BYTES)
        return dr_fail(err, EINVAL,
                       "Can't make bitmap '%s' persistent in '%s': Bitmap '%s' doesn't satisfy the "
                       "constraints: Too much space will be occupied by the bitmap. Use larger "
                       "granularity",
                       c->name, e->image->path, c->name);
    return 0;
}

/* A disk of no bytes has a table all the same: an empty one is what readers refuse. */
static uint64_t table_entries(const struct qcow2 *q, unsigned granularity_bits)
{
    return dr_max(1, qcow2_bitmap_entries(q, q->h.size, granularity_bits));
}

static int clear(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d, struct dr_error *err)
{
    uint64_t n = table_entries(qcow2_of(e->image), d->b.granularity_bits);
    uint64_t *table = calloc(n, sizeof(*table));
    if (!table)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    return qcow2_edit_table(e, d, table, n, err);
}

static int add(struct qcow2_bitmap_edit *e, const struct dr_bitmap_change *c, struct dr_error *err)
{
    uint64_t cluster = qcow2_of(e->image)->cluster, granularity = c->granularity;
    if (!granularity)
        granularity = dr_min(dr_max(cluster, DEFAULT_MIN), DEFAULT_MAX);
    int r = check_new(e, c, granularity, err);
    if (r < 0)
        return r;
    struct qcow2_bitmap_draft *d =
        qcow2_edit_add(e, c->name, (unsigned)__builtin_ctzll(granularity));
    if (!d)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    qcow2_draft_flags(d, c->disabled ? 0 : QCOW2_BITMAP_AUTO);
    r = clear(e, d, err);
    return r < 0 || !(c->source_name || c->ranges) ? r : merge(e, d, c, err);
}

/* Nothing is set any more, or just these ranges. */
static int renew(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d,
                 const struct dr_bitmap_change *c, struct dr_error *err)
{
    int r = clear(e, d, err); /* what the present table leads to has been left by that */
    if (r < 0 || !c->ranges)
        return r;
    d->b.table_at = 0;
    return merge(e, d, c, err);
}

/* ------------------------------------------------------------------ one of them */

int qcow2_edit_change(struct qcow2_bitmap_edit *e, const struct dr_bitmap_change *c,
                      struct dr_error *err)
{
    if (c->action == DR_BITMAP_ADD)
        return add(e, c, err);
    struct qcow2_bitmap_draft *d = qcow2_edit_find(e, c->name);
    if (!d)
        return not_found(c->name, err);
    if (c->action == DR_BITMAP_REMOVE)
        return qcow2_edit_remove(e, d, err);
    int r = check_usable(e->image, &d->b, false, c->name, err);
    if (r < 0)
        return r;
    switch (c->action) {
    case DR_BITMAP_CLEAR:
        return renew(e, d, c, err);
    case DR_BITMAP_ENABLE:
        qcow2_draft_flags(d, d->b.flags | QCOW2_BITMAP_AUTO);
        return 0;
    case DR_BITMAP_DISABLE:
        qcow2_draft_flags(d, d->b.flags & ~(uint32_t)QCOW2_BITMAP_AUTO);
        return 0;
    default:
        return merge(e, d, c, err);
    }
}

static int change_untracked(struct dr_image *image, const struct dr_bitmap_change *c,
                            struct dr_error *err)
{
    struct qcow2_bitmap_edit e;
    int r = qcow2_edit_begin(&e, image, err);
    if (r == 0) {
        r = qcow2_edit_change(&e, c, err);
        if (r == 0)
            r = qcow2_edit_commit(&e, err);
        else
            qcow2_places_lose(image, &e.taken, NULL);
    }
    qcow2_edit_end(&e);
    return r;
}

/* What was written so far goes into the bitmaps first, and what is written afterwards into those
 * that there are then. */
int qcow2_bitmap_change(struct dr_image *image, const struct dr_bitmap_change *c,
                        struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    bool writing = q->changing;
    int r = qcow2_track_end(image, err);
    if (r < 0)
        return r;
    atomic_store(&q->editing, true);
    r = change_untracked(image, c, err);
    atomic_store(&q->editing, false);
    int again = writing ? qcow2_track_begin(image, r < 0 ? NULL : err) : 0;
    return r < 0 ? r : again;
}

/* ------------------------------------------------------------------ reading one */

static int read_one(struct dr_image *image, const char *name, bool stored, dr_bitmap_dirty each,
                    void *user, bool *enabled, struct dr_error *err)
{
    CLEANUP_BITMAPS struct qcow2_bitmaps t = {0};
    int r = qcow2_bitmaps_load(image, &t, err);
    if (r < 0)
        return r;
    const struct qcow2_bitmap *b = qcow2_bitmaps_find(&t, name);
    if (!b)
        return not_found(name, err);
    bool ours = stored && qcow2_track_has(image, (uint32_t)(b - t.list));
    *enabled = b->flags & QCOW2_BITMAP_AUTO;
    r = check_usable(image, b, ours, name, err);
    return r < 0 ? r : qcow2_bitmap_each_dirty(image, b, image->size, each, user, err);
}

int qcow2_bitmap_read(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                      struct dr_error *err)
{
    bool enabled;
    return read_one(image, name, false, each, user, &enabled, err);
}

int qcow2_bitmap_stored(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                        bool *enabled, struct dr_error *err)
{
    return read_one(image, name, true, each, user, enabled, err);
}
