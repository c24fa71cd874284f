/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing the snapshots of an image. The core has flushed and keeps writers out; readers go on.
 *
 *   create   1. in copies of the counts and of the disk's tables, raise the counts of all that the
 *               disk has, and clear COPIED; write the snapshot's L1 table and a snapshot table
 *            2. switch the header: L1 table, refcount table, snapshot table
 *            3. free the former ones
 *   apply    1. raise the counts of all that the snapshot has; copy its L1 table
 *            2. switch the header: size and L1 table
 *            3. lower the counts of all that the disk had
 *   delete   1. in copies of the counts and of the disk's tables, lower the counts of all that the
 *               snapshot has, and set COPIED where 1 is left; write a snapshot table
 *            2. switch the header: L1 table, refcount table, snapshot table
 *            3. free what is counted 0 times, and the former tables
 *
 * Step 1 is durable before step 2, one write inside a sector. A crash leaks what was allocated or
 * what is to be freed, and leaves nothing else that a check finds. What fails before the switch is
 * undone.
 *
 * What the disk has must still be counted when the counts of a deleted snapshot are gone: else they
 * were too low, and its clusters would be freed. The delete is refused. Where other snapshots could
 * lose clusters like that, and before an apply or a delete in place, all of the image's references
 * are counted as `check` does, and a count that is too low refuses the change.
 *
 * Where the file has no space for copies a snapshot can be deleted all the same, in place: a crash
 * may then leave COPIED clear where a count is 1. No harm comes of that, but QEMU's check reports
 * it. */
#include "formats/qcow2/bitmap.h"
#include "formats/qcow2/snapshot.h"

#include "base/cleanup.h"

/* A change on the way to its switch. */
struct change {
    struct dr_image *image;
    struct qcow2 *q;
    struct qcow2_snapshots table; /* the present ones */
    struct qcow2_tree tree;       /* what the snapshot has, or is to have */
    uint64_t raised;              /* of its counts, in place */
    struct qcow2_next next;
    uint64_t lost_at;             /* former snapshot table */
    uint64_t l1_at, l1_len;       /* new L1 table; len 0: none yet */
    uint64_t table_at, table_len; /* new snapshot table, the same */
};

static int change_begin(struct change *c, struct dr_image *image, struct dr_error *err)
{
    *c = (struct change){.image = image, .q = qcow2_of(image)};
    if (qcow2_has_data_file(c->q))
        return dr_fail(err, ENOTSUP, "%s: has its data in another file, and so no snapshots inside",
                       image->path);
    if (c->q->damage)
        return qcow2_refuse_damaged(image, err);
    return qcow2_snapshots_load(image, &c->table, err);
}

/* L1 entries of a disk of that size. What follows them in the table is the state of a machine. */
static uint64_t entries_for(const struct qcow2 *q, uint64_t size)
{
    return dr_div_up(size, qcow2_l2_span(q));
}

/* ------------------------------------------------------------------ new tables */

static int take(struct change *c, uint64_t bytes, uint64_t *at, uint64_t *len, struct dr_error *err)
{
    uint64_t n = dr_max(1, dr_div_up(bytes, c->q->cluster));
    int r = qcow2_take(c->image, n, at, err);
    if (r == 0) {
        *len = n * c->q->cluster;
        c->next.end = dr_max(c->next.end, *at + *len);
    }
    return r;
}

/* Write the L1 table at c->l1_at: the tree's entries, without COPIED, then zeros. */
static int write_l1(struct change *c, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *l1 = calloc(1, c->l1_len);
    uint64_t bytes = c->tree.entries * 8;
    if (!l1)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    int r = dr_file_pread(c->image->files[0], l1, c->tree.l1_at, bytes, err);
    for (uint64_t i = 0; r == 0 && i < bytes; i += 8)
        put_be64(l1 + i, get_be64(l1 + i) & ~QCOW2_COPIED);
    return r < 0 ? r : dr_file_pwrite(c->image->files[0], l1, c->l1_at, c->l1_len, err);
}

/* Everything before the switch is durable, and what was written past the page cache is not in it.
 */
static int settle(struct change *c, struct dr_error *err)
{
    int r = dr_image_flush_all(c->image, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&c->image->lock);
    if (c->l1_len)
        dr_page_forget(c->image, 0, c->l1_at, c->l1_len);
    if (c->table_len)
        dr_page_forget(c->image, 0, c->table_at, c->table_len);
    return 0;
}

static void guard_tables(struct change *c)
{
    for (uint64_t i = 0; i < c->l1_len; i += c->q->cluster)
        qcow2_guard(c->q, c->l1_at + i);
}

/* Where this fails, too, counts stay too high. */
static void change_undo(struct change *c)
{
    qcow2_next_undo(&c->next);
    int r = c->raised ? qcow2_tree_unraise(c->image, &c->tree, c->raised, NULL) : 0;
    if (r == 0 && c->l1_len)
        r = qcow2_lose(c->image, c->l1_at, c->l1_len, NULL);
    if (r == 0 && c->table_len)
        qcow2_lose(c->image, c->table_at, c->table_len, NULL);
    qcow2_next_free(&c->next);
    c->l1_len = c->table_len = 0;
}

static void change_end(struct change *c)
{
    qcow2_next_free(&c->next);
    qcow2_snapshots_free(&c->table);
}

/* ------------------------------------------------------------------ switches */

/* To the copies, and to a snapshot table of n entries. */
static int switch_all(struct change *c, uint32_t n, struct dr_error *err)
{
    c->lost_at = c->q->h.snapshots_at;
    return qcow2_next_switch(&c->next, n, c->table_at, err);
}

/* Free what is no longer in force. */
static int lose_former(struct change *c, struct dr_error *err)
{
    int r = c->table.len ? qcow2_lose(c->image, c->lost_at, c->table.len, err) : 0;
    return r < 0 ? r : qcow2_next_end(&c->next, err);
}

static int switch_table(struct change *c, uint32_t n, struct dr_error *err)
{
    struct qcow2 *q = c->q;
    uint64_t old = q->h.snapshots_at;
    uint8_t field[12];
    put_be32(field, n);
    put_be64(field + 4, c->table_at);
    int r = qcow2_switch_tables(c->image, QCOW2_AT_SNAPSHOTS, field, sizeof(field), err);
    if (r < 0)
        return r;
    pthread_mutex_lock(&c->image->lock);
    q->h.n_snapshots = n;
    q->h.snapshots_at = c->table_at;
    pthread_mutex_unlock(&c->image->lock);
    return c->table.len ? qcow2_lose(c->image, old, c->table.len, err) : 0;
}

/* Size, kind of encryption and L1 table stand next to each other. */
static int switch_disk(struct change *c, uint64_t size, uint64_t entries, struct dr_error *err)
{
    struct qcow2 *q = c->q;
    uint8_t field[24];
    put_be64(field, size);
    put_be32(field + 8, q->h.crypt);
    put_be32(field + 12, (uint32_t)entries);
    put_be64(field + 16, c->l1_at);
    int r = qcow2_switch_tables(c->image, QCOW2_AT_SIZE, field, sizeof(field), err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&c->image->lock); /* readers look there */
    q->h.size = size;
    q->h.l1_entries = (uint32_t)entries;
    q->h.l1_at = c->l1_at;
    c->image->size = size;
    return 0;
}

/* ------------------------------------------------------------------ create */

static int prepare_create(struct change *c, const char *name, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *bytes = NULL;
    size_t len = 0;
    int r = qcow2_next_begin(&c->next, c->image, true, err);
    if (r == 0)
        r = take(c, c->tree.entries * 8, &c->l1_at, &c->l1_len, err);
    if (r == 0)
        r = qcow2_snapshots_with(c->image, &c->table, name, c->l1_at, c->tree.entries, &bytes, &len,
                                 err);
    if (r == 0)
        r = take(c, len, &c->table_at, &c->table_len, err);
    if (r == 0)
        r = qcow2_next_count(&c->next, err);
    if (r == 0)
        r = qcow2_next_tables(&c->next, err);
    if (r < 0)
        return r;
    uint64_t raised;
    c->tree.l1_at = c->next.l1_at;
    r = qcow2_tree_raise(c->image, &c->tree, &raised, err);
    if (r == 0)
        r = qcow2_tree_share(c->image, &c->tree, true, err);
    if (r == 0)
        r = write_l1(c, err);
    if (r == 0)
        r = dr_file_pwrite(c->image->files[0], bytes, c->table_at, len, err);
    return r < 0 ? r : settle(c, err);
}

/* Nothing was changed yet where this fails. */
static int check_create(struct change *c, const char *name, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *bytes = NULL;
    size_t len = 0;
    int r = qcow2_snapshots_with(c->image, &c->table, name, 0, 0, &bytes, &len, err);
    return r < 0 ? r : qcow2_tree_check(c->image, &c->tree, true, err);
}

int qcow2_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err)
{
    struct change c;
    int r = change_begin(&c, image, err);
    if (r == 0) {
        uint64_t entries = dr_min(entries_for(c.q, image->size), c.q->h.l1_entries);
        c.tree = (struct qcow2_tree){c.q->h.l1_at, entries};
        r = check_create(&c, name, err);
    }
    if (r == 0) {
        r = prepare_create(&c, name, err);
        if (r < 0)
            change_undo(&c);
        else if ((r = switch_all(&c, c.q->h.n_snapshots + 1, err)) == 0) {
            guard_tables(&c);
            /* The snapshot is there. What cannot be freed is leaked, which is no failure of this.
             */
            lose_former(&c, NULL);
        }
    }
    change_end(&c);
    return r;
}

/* ------------------------------------------------------------------ apply */

static int check_size(struct change *c, const struct qcow2_snapshot *s, struct dr_error *err)
{
    uint64_t size = s->info.size, entries = entries_for(c->q, size);
    if (size % 512 == 0 && entries * 8 <= QCOW2_MAX_L1)
        return 0;
    return dr_fail(err, EIO,
                   "%s: the snapshot table's entry at byte %llu has a disk of %llu bytes, which is "
                   "%s; `drover check` says more",
                   c->image->path, ULL(c->q->h.snapshots_at + s->at), ULL(size),
                   size % 512 ? "no multiple of 512" : "too large for clusters of this size");
}

static int find(struct change *c, const char *id, const struct qcow2_snapshot **s,
                struct dr_error *err)
{
    int r = qcow2_snapshots_find(c->image, &c->table, id, s, err);
    if (r == 0)
        r = qcow2_snapshot_check_l1(c->image, *s, err);
    if (r == 0)
        c->tree = (struct qcow2_tree){(*s)->l1_at, (*s)->l1_entries};
    return r;
}

static int prepare_apply(struct change *c, uint64_t entries, struct dr_error *err)
{
    int r = take(c, entries * 8, &c->l1_at, &c->l1_len, err);
    if (r == 0)
        r = qcow2_tree_raise(c->image, &c->tree, &c->raised, err);
    if (r == 0)
        r = qcow2_tree_share(c->image, &c->tree, false, err);
    if (r == 0)
        r = write_l1(c, err);
    return r < 0 ? r : settle(c, err);
}

int qcow2_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err)
{
    struct change c;
    const struct qcow2_snapshot *s = NULL;
    uint64_t entries = 0;
    int r = change_begin(&c, image, err);
    struct qcow2_tree old = {c.q->h.l1_at, c.q->h.l1_entries};
    uint64_t size = image->size;
    if (r == 0)
        r = find(&c, id, &s, err);
    if (r == 0)
        r = check_size(&c, s, err);
    if (r == 0) {
        entries = entries_for(c.q, s->info.size);
        c.tree.entries = dr_min(c.tree.entries, entries); /* not a machine's state */
        r = qcow2_tree_check(image, &c.tree, true, err);
    }
    if (r == 0)
        r = qcow2_tree_check(image, &old, false, err);
    if (r == 0)
        r = qcow2_refuse_low_counts(image, err);
    if (r == 0 && c.q->bitmaps_at && s->info.size != image->size)
        r = qcow2_track_all(image, s->info.size, err);
    if (r == 0)
        qcow2_track_everything(image);
    if (r != 0)
        goto out;
    if ((r = prepare_apply(&c, entries, err)) < 0)
        change_undo(&c);
    else
        r = switch_disk(&c, s->info.size, entries, err);
    if (r == 0 && image->size != size)
        r = qcow2_track_resize(image, err);
    if (r == 0)
        r = qcow2_tree_lose(image, &old, err);
    if (r == 0 && old.entries)
        r = qcow2_lose(image, old.l1_at, old.entries * 8, err);
out:
    change_end(&c);
    return r;
}

/* ------------------------------------------------------------------ delete */

/* The snapshot table without s. */
static int write_table_without(struct change *c, const struct qcow2_snapshot *s,
                               struct dr_error *err)
{
    CLEANUP_FREE uint8_t *bytes = NULL;
    size_t len = 0;
    c->table_at = 0;
    int r = qcow2_snapshots_without(c->image, &c->table, s, &bytes, &len, err);
    if (r < 0 || !bytes) /* no snapshot, no table */
        return r;
    r = take(c, len, &c->table_at, &c->table_len, err);
    return r < 0 ? r : dr_file_pwrite(c->image->files[0], bytes, c->table_at, len, err);
}

static int prepare_delete(struct change *c, const struct qcow2_snapshot *s, struct dr_error *err)
{
    int r = qcow2_next_begin(&c->next, c->image, false, err);
    if (r == 0)
        r = write_table_without(c, s, err);
    if (r == 0)
        r = qcow2_next_count(&c->next, err);
    if (r == 0)
        r = qcow2_tree_lower(c->image, &c->tree, err);
    if (r == 0)
        r = dr_image_flush_all(c->image, err);
    if (r == 0)
        r = qcow2_next_tables(&c->next, err);
    struct qcow2_tree disk = {c->next.l1_at, c->next.l1_entries};
    if (r == 0)
        r = qcow2_tree_recount(c->image, &disk, err);
    return r < 0 ? r : settle(c, err);
}

static int delete_now(struct change *c, const struct qcow2_snapshot *s, struct dr_error *err)
{
    int r = prepare_delete(c, s, err);
    if (r < 0) {
        change_undo(c);
        return r;
    }
    r = switch_all(c, c->q->h.n_snapshots - 1, err);
    if (r == 0)
        r = qcow2_tree_free(c->image, &c->tree, err);
    if (r == 0 && c->tree.entries)
        r = qcow2_lose(c->image, c->tree.l1_at, c->tree.entries * 8, err);
    return r < 0 ? r : lose_former(c, err);
}

static int delete_in_place(struct change *c, const struct qcow2_snapshot *s, struct dr_error *err)
{
    int r = write_table_without(c, s, err);
    if (r == 0)
        r = settle(c, err);
    if (r < 0) {
        change_undo(c);
        return r;
    }
    r = switch_table(c, c->q->h.n_snapshots - 1, err);
    if (r == 0)
        r = qcow2_tree_lose(c->image, &c->tree, err);
    if (r == 0 && c->tree.entries)
        r = qcow2_lose(c->image, c->tree.l1_at, c->tree.entries * 8, err);
    struct qcow2_tree disk = {c->q->h.l1_at, c->q->h.l1_entries};
    return r < 0 ? r : qcow2_tree_recount(c->image, &disk, err);
}

static bool has_no_space(int r)
{
    return r == -ENOSPC || r == -EDQUOT || r == -EFBIG;
}

int qcow2_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err)
{
    struct change c;
    const struct qcow2_snapshot *s = NULL;
    int r = change_begin(&c, image, err);
    if (r == 0)
        r = find(&c, id, &s, err);
    if (r == 0)
        r = qcow2_tree_check(image, &c.tree, false, err);
    bool others = c.q->h.n_snapshots > 1; /* delete_now checks the counts of what the disk has */
    if (r == 0 && others)
        r = qcow2_refuse_low_counts(image, err);
    if (r == 0)
        r = delete_now(&c, s, err);
    if (has_no_space(r) && !c.q->damage && !c.q->damage_noted) {
        dr_error_reset(err);
        r = dr_image_flush_all(image, err); /* what was undone goes */
        if (r == 0 && !others)
            r = qcow2_refuse_low_counts(image, err);
        if (r == 0)
            r = delete_in_place(&c, s, err);
    }
    change_end(&c);
    return r;
}

/* ------------------------------------------------------------------ list, show */

int qcow2_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                        struct dr_error *err)
{
    CLEANUP_SNAPSHOTS struct qcow2_snapshots t = {0};
    int r = qcow2_snapshots_load(image, &t, err);
    for (uint32_t i = 0; r == 0 && i < t.n; i++) {
        const struct qcow2_snapshot *s = &t.list[i];
        struct dr_snapshot_info info = s->info;
        CLEANUP_FREE char *id = strndup((const char *)t.bytes + s->id_at, s->id_len);
        CLEANUP_FREE char *name = strndup((const char *)t.bytes + s->name_at, s->name_len);
        if (!id || !name)
            return dr_fail_errno(err, ENOMEM, "%s", image->path);
        info.id = id;
        info.name = name;
        r = each(user, &info);
    }
    return r;
}

int qcow2_snapshot_show(struct dr_image *image, const char *id, struct dr_error *err)
{
    struct change c = {.image = image, .q = qcow2_of(image)};
    const struct qcow2_snapshot *s = NULL;
    int r = qcow2_snapshots_load(image, &c.table, err);
    if (r == 0)
        r = find(&c, id, &s, err);
    if (r == 0)
        r = check_size(&c, s, err);
    if (r == 0) {
        c.q->h.l1_at = s->l1_at;
        c.q->h.l1_entries = (uint32_t)s->l1_entries;
        image->size = c.q->h.size = s->info.size;
    }
    qcow2_snapshots_free(&c.table);
    return r;
}
