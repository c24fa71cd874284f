/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Faults of the qcow2 driver: each is the real callback with one step left out, or done too soon.
 */
#include "plant.h"

#include "base/cleanup.h"
#include "formats/qcow2/qcow2.h"

static const struct dr_format *healthy;

/* ------------------------------------------------------------------ counts, places */

/* Where qcow2_reserve leaves for publish the place that is given up, and its length. */
enum { PRIV_OLD = 4, PRIV_LENS = 5 };

/* The old place can be allocated before the entry that led to it is written over on disk. */
static void publish_reusing(struct dr_image *image, struct dr_reservation *r)
{
    uint64_t host = r->priv[PRIV_OLD], len = r->priv[PRIV_LENS] >> 32, count = 0;
    if (host != QCOW2_NO_PLACE && qcow2_count(image, host, &count) == 0 && count == 1 &&
        len == qcow2_of(image)->cluster) {
        r->priv[PRIV_OLD] = QCOW2_NO_PLACE;
        qcow2_add(image, host, len, -1);
        qcow2_note_free(qcow2_of(image), host, len);
    }
    healthy->publish(image, r);
}

/* The place can be allocated at once; the core punches it afterwards. */
static void release_before_punch(struct dr_image *image, const struct dr_freed *freed,
                                 struct dr_freed *gone)
{
    healthy->release(image, freed, gone);
    if (gone->len)
        healthy->reuse(image, gone);
}

static void reuse_nothing(struct dr_image *image, const struct dr_freed *gone)
{
    (void)image;
    (void)gone;
}

/* A compressed cluster that goes takes away the count of its neighbour in the host cluster, too. */
static void release_twice(struct dr_image *image, const struct dr_freed *freed,
                          struct dr_freed *gone)
{
    uint64_t count = 0;
    if (freed->len % qcow2_of(image)->cluster && qcow2_count(image, freed->host, &count) == 0 &&
        count > 1)
        qcow2_add(image, freed->host, freed->len, -1);
    healthy->release(image, freed, gone);
}

/* ------------------------------------------------------------------ locks */

/* Changes to two sub-clusters of one cluster run beside each other, on one L2 entry. */
static void unit_of_sub_cluster(const struct dr_image *image, uint64_t off, uint64_t *uoff,
                                uint64_t *ulen)
{
    const struct qcow2 *q = qcow2_of(image);
    *uoff = dr_round_down(off, q->sub);
    *ulen = q->sub;
}

/* ------------------------------------------------------------------ header */

static int set_backing_bare(struct dr_image *image, const struct dr_image *parent, const char *name,
                            const char *format, unsigned flags, struct dr_error *err)
{
    struct qcow2_header *h = &qcow2_of(image)->h;
    struct qcow2_ext ext = {0};
    uint8_t *head, type[4];
    int r = healthy->set_backing(image, parent, name, format, flags, err);
    if (r < 0 || (flags & DR_TRY))
        return r;
    r = qcow2_read_head(image, &head, err);
    if (r < 0)
        return r;
    r = qcow2_ext_find(h, image->path, head, qcow2_of(image)->cluster, PLANT_EXTENSION, &ext, err);
    put_be32(type, PLANT_EXTENSION + 1);
    if (r == 1)
        r = dr_file_pwrite(image->files[0], type, ext.at - 8, sizeof(type), err);
    free(head);
    return r < 0 ? r : dr_file_flush(image->files[0], err);
}

/* ------------------------------------------------------------------ snapshots */

/* The entries of the table at byte `at` say COPIED. */
static int set_copied(struct dr_image *image, uint64_t at, uint64_t len, size_t entry,
                      uint64_t *first, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *table = malloc(len ? len : 1);
    *first = 0;
    int r = dr_file_pread(image->files[0], table, at, len, err);
    for (uint64_t i = 0; r == 0 && i < len; i += entry) {
        uint64_t v = get_be64(table + i);
        if (!(v & QCOW2_OFFSET) || (v & QCOW2_CODED))
            continue;
        put_be64(table + i, v | QCOW2_COPIED);
        *first = *first ? *first : v & QCOW2_OFFSET;
    }
    if (r == 0)
        r = dr_file_pwrite(image->files[0], table, at, len, err);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, at, len);
    return r;
}

/* Of the disk's L1 table and of its first L2 table. */
static int snapshot_copied(struct dr_image *image, const char *name, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t l2, data;
    int r = healthy->snapshot_create(image, name, err);
    if (r == 0)
        r = set_copied(image, q->h.l1_at, q->h.l1_entries * UINT64_C(8), 8, &l2, err);
    if (r == 0 && l2)
        r = set_copied(image, l2, q->cluster, q->entry, &data, err);
    return r;
}

/* ------------------------------------------------------------------ no space */

/* Goes on as if the refcount table had grown, behind whose end something else lies. */
static int begin_without_space(struct dr_image *image, uint64_t off, bool changes,
                               struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    bool grows = q->reftable_full;
    int r = healthy->begin_write(image, off, changes, err);
    if (r != -ENOSPC || !grows)
        return r;
    dr_error_reset(err);
    DR_LOCK_SCOPE(&image->lock);
    uint64_t *larger = realloc(q->reftable, 2 * q->reftable_n * sizeof(*larger));
    if (!larger)
        abort();
    memset(larger + q->reftable_n, 0, q->reftable_n * sizeof(*larger));
    q->reftable = larger;
    q->reftable_n *= 2;
    q->reftable_full = false;
    q->damage_noted = false;
    q->marked = true;
    return 0;
}

/* ------------------------------------------------------------------ planting */

void plant_qcow2(struct dr_format *planted, const struct dr_format *driver, enum plant fault)
{
    healthy = driver;
    switch (fault) {
    case PLANT_REUSED_EARLY:
        planted->publish = publish_reusing;
        break;
    case PLANT_LATE_PUNCH:
        planted->release = release_before_punch;
        planted->reuse = reuse_nothing;
        break;
    case PLANT_LOST_COUNT:
        planted->release = release_twice;
        break;
    case PLANT_NARROW_LOCK:
        planted->unit = unit_of_sub_cluster;
        break;
    case PLANT_LOST_EXTENSION:
        planted->set_backing = set_backing_bare;
        break;
    case PLANT_COPIED:
        planted->snapshot_create = snapshot_copied;
        break;
    case PLANT_NO_SPACE_IGNORED:
        planted->begin_write = begin_without_space;
        break;
    default:
        break;
    }
}
