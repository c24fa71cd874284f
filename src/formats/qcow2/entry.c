/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* L2 entries. Standard ones have 8 bytes; extended ones have 16, of which the second 8 are two
 * masks: which sub-clusters are held (low half) and which read as zeros (high half). */
#include "formats/qcow2/qcow2.h"

#define RESERVED UINT64_C(0x3f000000000001fe) /* bits 1 to 8 and 56 to 61 */

/* A coded entry: x bits of offset, then the number of sectors less one. */
static unsigned coded_shift(const struct qcow2 *q)
{
    return 62 - (q->h.cluster_bits - 8);
}

static const char *decode_coded(const struct qcow2 *q, uint64_t v, uint64_t masks,
                                struct qcow2_entry *e)
{
    unsigned x = coded_shift(q);
    uint64_t sectors = ((v & ~(QCOW2_CODED | QCOW2_COPIED)) >> x) + 1;
    e->host = v & ((UINT64_C(1) << x) - 1);
    e->coded = (uint32_t)(sectors * 512 - e->host % 512);
    e->held = qcow2_all_subs(q);
    if (qcow2_has_data_file(q))
        return "a compressed cluster in an image with a data file";
    if (v & QCOW2_COPIED)
        return "a compressed cluster that says it is the only one";
    if (masks)
        return "a compressed cluster with sub-clusters";
    return e->host >= QCOW2_MAX_OFFSET ? "an offset beyond 2^56" : NULL;
}

const char *qcow2_entry_decode(const struct qcow2 *q, const uint8_t *raw, uint64_t off,
                               struct qcow2_entry *e)
{
    uint64_t v = get_be64(raw), masks = q->entry == 16 ? get_be64(raw + 8) : 0;
    bool extended = q->entry == 16, zero = v & QCOW2_ZERO;
    *e = (struct qcow2_entry){.host = QCOW2_NO_PLACE};
    if (v & QCOW2_CODED)
        return decode_coded(q, v, masks, e);
    if (v & RESERVED)
        return "reserved bits that are set";
    if (zero && (extended || q->h.version < 3))
        return "bit 0 set, which this kind of image has not";
    e->copied = v & QCOW2_COPIED;
    if ((v & QCOW2_OFFSET) || (qcow2_has_data_file(q) && e->copied))
        e->host = v & QCOW2_OFFSET;
    e->held = extended ? (uint32_t)masks : e->host != QCOW2_NO_PLACE && !zero;
    e->zero = extended ? (uint32_t)(masks >> 32) : zero;
    if (e->held & e->zero)
        return "a sub-cluster that is both held and zero";
    if (e->host == QCOW2_NO_PLACE)
        return e->held ? "a sub-cluster held nowhere" : NULL;
    if (qcow2_in_cluster(q, e->host))
        return "an offset that is no cluster's beginning";
    if (qcow2_has_data_file(q) && e->host != off)
        return "another place in the data file than its own";
    return NULL;
}

void qcow2_entry_encode(const struct qcow2 *q, const struct qcow2_entry *e, uint8_t *raw)
{
    uint64_t v = 0, masks = 0;
    if (e->coded) {
        uint64_t sectors = (e->host % 512 + e->coded - 1) / 512; /* less one */
        v = QCOW2_CODED | sectors << coded_shift(q) | e->host;
    } else {
        if (e->host != QCOW2_NO_PLACE)
            v = e->host | (e->copied ? QCOW2_COPIED : 0);
        if (q->entry == 16)
            masks = (uint64_t)e->zero << 32 | e->held;
        else if (e->zero)
            v |= QCOW2_ZERO;
    }
    put_be64(raw, v);
    if (q->entry == 16)
        put_be64(raw + 8, masks);
}
