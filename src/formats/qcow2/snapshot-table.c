/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The snapshot table. An entry that stays is copied byte by byte into the next table, so whatever
 * stands in it that is not known here is kept.
 *
 *   0 u64 L1 offset   8 u32 L1 entries   12 u16 length of the id   14 u16 of the name
 *   16 u32 seconds   20 u32 nanoseconds   24 u64 guest's clock   32 u32 VM state
 *   36 u32 length of what follows: u64 VM state, u64 disk size, u64 icount, ...; id; name; padding
 */
#include "formats/qcow2/snapshot.h"

#include <stdio.h>
#include <time.h>

#include "base/cleanup.h"

#define ENTRY_FIXED 40u
#define ENTRY_EXTRA 24u
#define MAX_EXTRA   1024u                /* QEMU's */
#define MAX_TABLE   (UINT64_C(64) << 20) /* bytes (QEMU's) */
#define MAX_GUARDED (UINT64_C(1) << 20)  /* clusters of L1 tables that are protected at most */
#define FIRST_READ  64u                  /* bytes of an entry, most often */
#define NO_ICOUNT   UINT64_MAX

void qcow2_snapshots_free(struct qcow2_snapshots *t)
{
    free(t->bytes);
    free(t->list);
    *t = (struct qcow2_snapshots){0};
}

/* ------------------------------------------------------------------ reading */

static void read_extra(const uint8_t *extra, uint32_t len, struct dr_snapshot_info *info)
{
    if (len >= 8)
        info->vm_state = get_be64(extra);
    if (len >= 16)
        info->size = get_be64(extra + 8);
    if (len >= 24 && get_be64(extra + 16) != NO_ICOUNT) {
        info->has_icount = true;
        info->icount = get_be64(extra + 16);
    }
}

/* The entry at t->bytes + at. -ERANGE: it does not end in there. */
static int parse_entry(struct dr_image *image, const struct qcow2_snapshots *t, size_t at,
                       struct qcow2_snapshot *s, struct dr_error *err)
{
    const uint8_t *raw = t->bytes + at;
    if (t->len - at < ENTRY_FIXED)
        return -ERANGE;
    uint32_t extra = get_be32(raw + 36);
    if (extra > MAX_EXTRA)
        return dr_fail(err, EIO,
                       "%s: the snapshot table's entry at byte %llu has %u bytes of extra data, "
                       "expected at most %u; `drover check` says more",
                       image->path, ULL(qcow2_of(image)->h.snapshots_at + at), extra, MAX_EXTRA);
    *s = (struct qcow2_snapshot){.at = at, .l1_at = get_be64(raw), .l1_entries = get_be32(raw + 8)};
    s->id_len = get_be16(raw + 12);
    s->name_len = get_be16(raw + 14);
    s->id_at = at + ENTRY_FIXED + extra;
    s->name_at = s->id_at + s->id_len;
    if (t->len < s->name_at + s->name_len)
        return -ERANGE;
    s->len = dr_round_up(s->name_at + s->name_len - at, 8);
    s->info.seconds = get_be32(raw + 16);
    s->info.nanoseconds = get_be32(raw + 20);
    s->info.clock_ns = get_be64(raw + 24);
    s->info.vm_state = get_be32(raw + 32);
    s->info.size = image->size;
    read_extra(raw + ENTRY_FIXED, extra, &s->info);
    return 0;
}

static int parse_table(struct dr_image *image, struct qcow2_snapshots *t, struct dr_error *err)
{
    size_t at = 0;
    int r = 0;
    for (uint32_t i = 0; r == 0 && i < t->n; i++) {
        r = at > t->len ? -ERANGE : parse_entry(image, t, at, &t->list[i], err);
        at += t->list[i].len;
    }
    if (r == 0)
        t->len = dr_min(t->len, at);
    return r;
}

/* The table's first len bytes. */
static int read_table(struct dr_image *image, struct qcow2_snapshots *t, size_t len,
                      struct dr_error *err)
{
    free(t->bytes);
    t->bytes = malloc(len ? len : 1);
    if (!t->bytes)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return dr_file_pread_short(image->files[0], t->bytes, qcow2_of(image)->h.snapshots_at, len,
                               &t->len, err);
}

/* How long the table is shows only in its entries. */
int qcow2_snapshots_load(struct dr_image *image, struct qcow2_snapshots *t, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t at = q->h.snapshots_at, size = dr_file_size(image->files[0]);
    *t = (struct qcow2_snapshots){.n = q->h.n_snapshots};
    if (t->n == 0)
        return 0;
    if (at == 0 || at % q->cluster || at >= size)
        return dr_fail(err, EIO, "%s: the header has the snapshot table at byte %llu, %s",
                       image->path, ULL(at),
                       at >= size ? "behind the end" : "which is no cluster's beginning");
    t->list = calloc(t->n, sizeof(*t->list));
    if (!t->list)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    uint64_t most = dr_min(size - at, MAX_TABLE), len = dr_min(most, FIRST_READ * (uint64_t)t->n);
    int r;
    for (;; len = dr_min(most, len * 2)) {
        r = read_table(image, t, len, err);
        if (r == 0)
            r = parse_table(image, t, err);
        if (r != -ERANGE || len == most)
            break;
    }
    if (r == -ERANGE)
        r = dr_fail(err, EIO, "%s: the snapshot table at byte %llu ends before its %u entries do",
                    image->path, ULL(at), t->n);
    if (r < 0)
        qcow2_snapshots_free(t);
    return r;
}

int qcow2_snapshots_find(struct dr_image *image, const struct qcow2_snapshots *t, const char *id,
                         const struct qcow2_snapshot **s, struct dr_error *err)
{
    for (uint32_t i = 0; i < t->n; i++) {
        *s = &t->list[i];
        if ((*s)->id_len == strlen(id) && memcmp(t->bytes + (*s)->id_at, id, strlen(id)) == 0)
            return 0;
    }
    return dr_fail(err, ENOENT, "%s: has no snapshot with the id %s", image->path, id);
}

int qcow2_snapshot_check_l1(struct dr_image *image, const struct qcow2_snapshot *s,
                            struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t bytes = s->l1_entries * 8;
    if (bytes <= QCOW2_MAX_L1 && s->l1_at % q->cluster == 0 && s->l1_at < QCOW2_MAX_OFFSET &&
        (s->l1_at >= q->cluster || bytes == 0))
        return 0;
    return dr_fail(err, EIO,
                   "%s: the snapshot table's entry at byte %llu has an L1 table of %llu entries at "
                   "byte %llu, where none can be; `drover check` says more",
                   image->path, ULL(q->h.snapshots_at + s->at), ULL(s->l1_entries), ULL(s->l1_at));
}

void qcow2_guard_snapshots(struct dr_image *image)
{
    struct qcow2 *q = qcow2_of(image);
    CLEANUP_SNAPSHOTS struct qcow2_snapshots t = {0};
    uint64_t room = MAX_GUARDED;
    if (qcow2_snapshots_load(image, &t, NULL) < 0)
        return;
    DR_LOCK_SCOPE(&image->lock);
    for (uint32_t i = 0; i < t.n; i++) {
        const struct qcow2_snapshot *s = &t.list[i];
        if (qcow2_snapshot_check_l1(image, s, NULL) < 0)
            continue;
        for (uint64_t at = 0; at < s->l1_entries * 8 && room > 0; at += q->cluster, room--)
            qcow2_guard(q, s->l1_at + at);
    }
}

/* ------------------------------------------------------------------ the next table */

static unsigned long next_id(const struct qcow2_snapshots *t)
{
    unsigned long largest = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        char text[24] = "";
        memcpy(text, t->bytes + t->list[i].id_at, dr_min(t->list[i].id_len, sizeof(text) - 1));
        unsigned long id = strtoul(text, NULL, 10);
        largest = id > largest && id < UINT32_MAX ? id : largest;
    }
    return largest + 1;
}

static int table_bytes(struct dr_image *image, size_t used, uint8_t **bytes, size_t *len,
                       struct dr_error *err)
{
    if (used > MAX_TABLE)
        return dr_fail(err, EFBIG, "%s: its snapshot table cannot be larger than %llu bytes",
                       image->path, ULL(MAX_TABLE));
    *len = dr_round_up(used, qcow2_of(image)->cluster);
    *bytes = calloc(1, *len);
    return *bytes ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
}

int qcow2_snapshots_with(struct dr_image *image, const struct qcow2_snapshots *t, const char *name,
                         uint64_t l1_at, uint64_t l1_entries, uint8_t **bytes, size_t *len,
                         struct dr_error *err)
{
    char id[24];
    size_t name_len = strlen(name), old = dr_round_up(t->len, 8);
    size_t id_len = (size_t)snprintf(id, sizeof(id), "%lu", next_id(t));
    struct timespec now;
    if (t->n >= QCOW2_MAX_SNAPSHOTS)
        return dr_fail(err, EFBIG, "%s: has %u snapshots, which is the most there can be",
                       image->path, t->n);
    if (name_len > QCOW2_MAX_SNAPSHOT_NAME)
        return dr_fail(err, ENAMETOOLONG, "%s: the name of a snapshot has at most %u bytes",
                       image->path, QCOW2_MAX_SNAPSHOT_NAME);
    int r =
        table_bytes(image, old + ENTRY_FIXED + ENTRY_EXTRA + id_len + name_len, bytes, len, err);
    if (r < 0)
        return r;
    uint8_t *raw = *bytes + old;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t->len)
        memcpy(*bytes, t->bytes, t->len);
    put_be64(raw, l1_at);
    put_be32(raw + 8, (uint32_t)l1_entries);
    put_be16(raw + 12, (uint16_t)id_len);
    put_be16(raw + 14, (uint16_t)name_len);
    put_be32(raw + 16, (uint32_t)now.tv_sec);
    put_be32(raw + 20, (uint32_t)now.tv_nsec);
    put_be32(raw + 36, ENTRY_EXTRA);
    put_be64(raw + ENTRY_FIXED + 8, image->size);
    put_be64(raw + ENTRY_FIXED + 16, NO_ICOUNT);
    memcpy(raw + ENTRY_FIXED + ENTRY_EXTRA, id, id_len);
    memcpy(raw + ENTRY_FIXED + ENTRY_EXTRA + id_len, name, name_len);
    return 0;
}

int qcow2_snapshots_without(struct dr_image *image, const struct qcow2_snapshots *t,
                            const struct qcow2_snapshot *s, uint8_t **bytes, size_t *len,
                            struct dr_error *err)
{
    size_t behind = dr_min(s->at + s->len, t->len), rest = t->len - behind;
    *bytes = NULL;
    *len = 0;
    if (t->n == 1)
        return 0;
    int r = table_bytes(image, s->at + rest, bytes, len, err);
    if (r < 0)
        return r;
    memcpy(*bytes, t->bytes, s->at);
    memcpy(*bytes + s->at, t->bytes + behind, rest);
    return 0;
}
