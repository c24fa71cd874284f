/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counts the damage of an archive and tells of it, once for each stretch. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "archive/vma-read.h"

void vma_read_message(const struct vma_read *x, const char *fmt, ...)
{
    char text[1024], line[1536];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(line, sizeof(line), "%s: %s", x->vma->name, text);
    if (x->vma->message)
        x->vma->message(x->vma->user, line);
    else
        dr_job_message(x->job, "%s", line);
}

/* ------------------------------------------------------------------ text */

static const char *what_happened(const struct dr_vma_damage *d)
{
    switch (d->kind) {
    case DR_VMA_MISSING:
        return "are missing";
    case DR_VMA_DUPLICATE:
        return "are there twice, the first ones count";
    case DR_VMA_CHECKSUM:
        return "do not fit their checksums";
    case DR_VMA_DIFFERS:
        return "differ from what they are compared with";
    case DR_VMA_DOUBTFUL:
        return "may be wrong anywhere, since the compressed stream that has them is damaged";
    case DR_VMA_HEADER:
        return d->id ? "were taken, though the header does not list them"
                     : "are a header with a wrong checksum, which was used all the same";
    case DR_VMA_EXTENT:
        break;
    }
    return "are no valid extent";
}

static void describe(const struct vma_read *x, const struct vma_pending *p, char *text, size_t size)
{
    const struct dr_vma_damage *d = &p->damage;
    char shown[VMA_SHOWN], of[VMA_SHOWN + 32] = "";
    if (d->id)
        snprintf(of, sizeof(of), "disk %u ('%s'): ", d->id,
                 vma_show(x->disks[d->id].disk->name, shown, sizeof(shown)));
    if (d->kind == DR_VMA_EXTENT && p->why[0])
        snprintf(text, size, "%s", p->why);
    else
        snprintf(text, size, "%s: %s%" PRIu64 " bytes at offset %" PRIu64 " %s%s%s", x->vma->name,
                 of, d->len, d->off, what_happened(d), p->why[0] ? ": " : "", p->why);
}

/* ------------------------------------------------------------------ telling */

static uint64_t *counter(struct dr_vma_extract_result *r, enum dr_vma_damage_kind kind)
{
    uint64_t *const counters[] = {
        [DR_VMA_MISSING] = &r->missing_bytes,   [DR_VMA_DUPLICATE] = &r->duplicate_bytes,
        [DR_VMA_CHECKSUM] = &r->checksum_bytes, [DR_VMA_DIFFERS] = &r->different_bytes,
        [DR_VMA_EXTENT] = &r->extent_bytes,     [DR_VMA_DOUBTFUL] = &r->doubtful_bytes,
        [DR_VMA_HEADER] = &r->header_bytes,
    };
    return counters[kind];
}

/* Under damage_lock. */
static void tell(struct vma_read *x, struct vma_pending *p, char *text, size_t size)
{
    if (p->damage.len == 0)
        return;
    describe(x, p, text, size);
    p->damage.text = text;
    if (x->o->damage)
        x->o->damage(x->o->user, &p->damage);
    *p = (struct vma_pending){0};
}

static bool continues(const struct vma_pending *p, const struct vma_pending *fresh)
{
    return p->damage.len > 0 && p->damage.id == fresh->damage.id &&
           p->damage.off + p->damage.len == fresh->damage.off;
}

static void add(struct vma_read *x, const struct vma_pending *fresh)
{
    char text[1024];
    DR_LOCK_SCOPE(&x->damage_lock);
    *counter(&x->result, fresh->damage.kind) += fresh->damage.len;
    struct vma_pending *p = &x->pending[fresh->damage.kind];
    if (continues(p, fresh)) {
        p->damage.len += fresh->damage.len;
        return;
    }
    tell(x, p, text, sizeof(text));
    *p = *fresh;
}

void vma_damage_flush(struct vma_read *x)
{
    char text[1024];
    DR_LOCK_SCOPE(&x->damage_lock);
    for (unsigned i = 0; i < VMA_DAMAGE_KINDS; i++)
        tell(x, &x->pending[i], text, sizeof(text));
}

int vma_damage(struct vma_read *x, enum dr_vma_damage_kind kind, unsigned id, uint64_t off,
               uint64_t len, const char *why, struct dr_error *err)
{
    struct vma_pending fresh = {.damage = {.kind = kind, .id = id, .off = off, .len = len}};
    char text[1024];
    snprintf(fresh.why, sizeof(fresh.why), "%s", why ? why : "");
    if (x->o->salvage) {
        add(x, &fresh);
        return 0;
    }
    describe(x, &fresh, text, sizeof(text));
    add(x, &fresh);
    vma_damage_flush(x);
    return dr_fail(err, EBADMSG, "%s", text);
}

/* ------------------------------------------------------------------ the header */

int vma_damage_header(struct vma_read *x, struct dr_error *err)
{
    const struct dr_vma_header *h = &x->vma->header;
    int r = 0;
    if (h->wrong_sum)
        r = vma_damage(x, DR_VMA_HEADER, 0, 0, h->header_size, NULL, err);
    for (size_t i = 0; i < h->n_disks && r == 0; i++)
        if (x->vma->odd[h->disks[i].id])
            r = vma_damage(x, DR_VMA_HEADER, h->disks[i].id, 0, h->disks[i].size, NULL, err);
    return r;
}

/* ------------------------------------------------------------------ what is missing */

static bool next_gap(const struct vma_reading *d, uint64_t from, uint64_t *first, uint64_t *n)
{
    return d->disk && !d->disk->vmstate &&
           vma_seen_gap(&d->seen, from, vma_clusters(d->disk->size), first, n);
}

/* Salvaging over an image that held something: its old bytes must not look like the archive's. */
static int zero_gap(const struct vma_read *x, const struct vma_reading *d, uint64_t off,
                    uint64_t len, struct dr_error *err)
{
    const struct dr_vma_target *t = d->target;
    if (!x->o->salvage || !t || t->compare || t->is_zero)
        return 0;
    return dr_zero(t->disk, off, len, 0, err);
}

/* ------------------------------------------------------------------ what is doubtful */

void vma_doubt_note(struct vma_read *x, const struct vma_slot *s)
{
    struct vma_reading *d = &x->disks[s->id];
    if (d->doubt_to == 0)
        d->doubt_from = s->cluster;
    d->doubt_from = dr_min(d->doubt_from, s->cluster);
    d->doubt_to = dr_max(d->doubt_to, (uint64_t)s->cluster + 1);
}

void vma_doubt_renew(struct vma_read *x)
{
    uint64_t vouched = dr_source_vouched(x->vma->source);
    if (vouched == x->vouched)
        return;
    x->vouched = vouched;
    for (unsigned id = 1; id < 256; id++)
        x->disks[id].doubt_to = 0;
}

/* From the first to the last cluster of each disk: in between, too, where the stream has some of
 * another part. */
void vma_doubt_tell(struct vma_read *x)
{
    vma_doubt_renew(x);
    for (unsigned id = 1; id < 256; id++) {
        struct vma_reading *d = &x->disks[id];
        uint64_t off = d->doubt_from * DR_VMA_CLUSTER, end = d->doubt_to * DR_VMA_CLUSTER;
        if (d->doubt_to == 0)
            continue;
        if (!d->disk->vmstate) /* whose size is only advice */
            end = dr_min(end, d->disk->size);
        vma_damage(x, DR_VMA_DOUBTFUL, id, off, end - off, NULL, NULL);
        d->doubt_to = 0;
    }
}

/* All runs are told, also when the first one is the failure. */
int vma_damage_missing(struct vma_read *x, struct dr_error *err)
{
    struct vma_pending first = {0};
    if (x->broke_off)
        vma_doubt_tell(x);
    vma_damage_flush(x);
    for (unsigned id = 1; id < 256; id++) {
        const struct vma_reading *d = &x->disks[id];
        uint64_t at, n;
        for (uint64_t from = 0; next_gap(d, from, &at, &n); from = at + n) {
            uint64_t off = at * DR_VMA_CLUSTER;
            uint64_t len = dr_min(n * DR_VMA_CLUSTER, d->disk->size - off);
            struct vma_pending gap = {
                .damage = {.kind = DR_VMA_MISSING, .id = id, .off = off, .len = len}};
            if (first.damage.len == 0)
                first = gap;
            add(x, &gap);
            int r = zero_gap(x, d, off, len, err);
            if (r < 0)
                return r;
        }
    }
    vma_damage_flush(x);
    if (first.damage.len == 0 || x->o->salvage)
        return 0;
    char text[1024];
    describe(x, &first, text, sizeof(text));
    return dr_fail(err, EBADMSG,
                   "%s (of %" PRIu64 " in all; the archive ends at offset %" PRIu64 ")", text,
                   x->result.missing_bytes, x->pos);
}
