/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Judges an L2 entry: the clusters that it refers to, and its faults. A damaged entry is counted as
 * QEMU counts it, so that both find the same. */
#include "formats/qcow2/check.h"

#include <stdarg.h>
#include <stdio.h>

struct judging {
    const struct qcow2 *q;
    uint64_t v, held, zero; /* held, zero: masks of sub-clusters */
    struct qcow2_fault *faults;
    unsigned n;
};

static struct qcow2_fault *fault(struct judging *j, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static struct qcow2_fault *fault(struct judging *j, const char *fmt, ...)
{
    struct qcow2_fault *f = &j->faults[j->n++];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(f->text, sizeof(f->text), fmt, ap);
    va_end(ap);
    f->mendable = false;
    return f;
}

static void judge_coded(struct judging *j, struct qcow2_reference *ref)
{
    const struct qcow2 *q = j->q;
    unsigned x = 62 - (q->h.cluster_bits - 8);
    uint64_t sectors = ((j->v & ~(QCOW2_CODED | QCOW2_COPIED)) >> x) + 1;
    uint64_t host = j->v & ((UINT64_C(1) << x) - 1);
    struct qcow2_fault *copied = NULL;
    if (j->v & QCOW2_COPIED) {
        copied = fault(j,
                       "ERROR: coffset=0x%llx: copied flag must never be set for compressed "
                       "clusters",
                       ULL(host));
        copied->mendable = true;
        copied->value = j->v & ~QCOW2_COPIED;
        copied->masks = 0;
    }
    if (qcow2_has_data_file(q))
        fault(j, "ERROR compressed cluster with data file, entry=0x%llx", ULL(j->v));
    else if (j->held | j->zero)
        fault(j,
              "ERROR compressed cluster with non-zero subcluster allocation bitmap, entry=0x%llx",
              ULL(j->v));
    else
        *ref = (struct qcow2_reference){QCOW2_USE_CODED, host, sectors * 512 - host % 512, false};
    if (copied && j->n > 1)
        copied->mendable = false;
}

/* A place that is no cluster's beginning: without data in it, it can be given up. In a raw data
 * file each cluster has one place, since that file is the disk for whoever opens it by itself. */
static void judge_place(struct judging *j, uint64_t at, uint64_t host)
{
    bool extended = j->q->entry == 16, alone = j->n == 0;
    bool data = extended ? j->held != 0 : !(j->v & QCOW2_ZERO);
    struct qcow2_fault *f = NULL;
    if (at % j->q->cluster && data)
        f = fault(j, "ERROR offset=%llx: Data cluster is not properly aligned; L2 entry corrupted.",
                  ULL(at));
    else if (at % j->q->cluster)
        f = fault(j,
                  "ERROR offset=%llx: Preallocated cluster is not properly aligned; L2 entry "
                  "corrupted.",
                  ULL(at));
    else if (host != QCOW2_NO_PLACE && at != host)
        f = fault(j, "ERROR offset=%llx: In the data file it must be at 0x%llx", ULL(at),
                  ULL(host));
    if (f && host != QCOW2_NO_PLACE && (j->q->h.autoclear & QCOW2_DATA_RAW)) {
        f->mendable = alone;
        f->value = host | QCOW2_COPIED | (j->v & QCOW2_ZERO);
        f->masks = j->zero << 32 | j->held;
    } else if (f && at % j->q->cluster && !data) {
        f->mendable = alone;
        f->value = extended ? 0 : QCOW2_ZERO;
        f->masks = j->zero << 32;
    }
}

static void judge_standard(struct judging *j, uint64_t host, struct qcow2_reference *ref)
{
    const struct qcow2 *q = j->q;
    bool extended = q->entry == 16, copied = j->v & QCOW2_COPIED;
    uint64_t at = j->v & QCOW2_OFFSET;
    if (j->v & QCOW2_L2_RESERVED)
        fault(j, "ERROR found l2 entry with reserved bits set: %llx", ULL(j->v));
    else if ((j->v & QCOW2_ZERO) && (extended || q->h.version < 3))
        fault(j, "ERROR found l2 entry with bit 0 set, which this kind of image has not: %llx",
              ULL(j->v));
    if (at == 0 && !(qcow2_has_data_file(q) && copied)) {
        if (j->held)
            fault(j, "ERROR: Unallocated cluster has non-zero subcluster allocation map");
        return;
    }
    *ref = (struct qcow2_reference){QCOW2_USE_CLUSTER, at, q->cluster, copied};
    if (j->held & j->zero) {
        fault(j, "ERROR offset=%llx: Allocated cluster has corrupted subcluster allocation bitmap",
              ULL(at));
        return;
    }
    judge_place(j, at, qcow2_has_data_file(q) ? host : QCOW2_NO_PLACE);
}

unsigned qcow2_entry_faults(const struct qcow2 *q, const uint8_t *raw, uint64_t host,
                            struct qcow2_fault faults[2], struct qcow2_reference *ref)
{
    struct judging j = {.q = q, .v = get_be64(raw), .faults = faults};
    uint64_t masks = q->entry == 16 ? get_be64(raw + 8) : 0;
    j.held = masks & UINT32_MAX;
    j.zero = masks >> 32;
    *ref = (struct qcow2_reference){0};
    if (j.v & QCOW2_CODED)
        judge_coded(&j, ref);
    else if (j.v | masks)
        judge_standard(&j, host, ref);
    return j.n;
}
