/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-merge.h"

#include <stdio.h>

#include "base/cleanup.h"
#include "core/fingerprint.h"
#include "ops/backup-sums.h"

static int no_memory(const struct dr_merge *m, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", m->set);
}

static struct dr_open_options how_to_open(const struct dr_merge *m, const struct dr_backup_entry *e)
{
    struct dr_open_options open = *m->open;
    open.format = e->format;
    open.flags &= DR_OPEN_NO_LOCK | DR_OPEN_NO_FLUSH | DR_OPEN_ANY_PATH;
    return open;
}

/* The path of an image that the set names, if the gate allows it. */
static int path_of(const struct dr_merge *m, const struct dr_backup_entry *e, char **path,
                   struct dr_error *err)
{
    *path = dr_set_path(m->set, e);
    if (!*path)
        return no_memory(m, err);
    return dr_fs_exists(m->fs, *path) ? dr_gate_check(m->fs, m->set, *path, m->open, err)
                                      : dr_gate_check_new(m->fs, m->set, *path, m->open, err);
}

/* The image alone, without its parents. */
static int open_alone(const struct dr_merge *m, const struct dr_backup_entry *e, const char *path,
                      struct dr_image **image, struct dr_error *err)
{
    struct dr_open_options open = how_to_open(m, e);
    return dr_image_open(m->fs, path, e->format, open.flags | DR_OPEN_NO_BACKING, image, err);
}

/* ------------------------------------------------------------------ those that leave */

/* The file itself, where path is a link to it. */
static int add_file(const struct dr_merge *m, char ***list, size_t at, const char *path,
                    struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    int r = m->fs->ops->realpath(m->fs, path, &real, err);
    if (r < 0)
        return r;
    char **more = realloc(*list, (at + 2) * sizeof(**list));
    if (!more)
        return no_memory(m, err);
    *list = more;
    more[at + 1] = NULL;
    more[at] = dr_ops_name_from(m->fs, m->set, real);
    return more[at] ? 0 : no_memory(m, err);
}

/* An interrupted prune noted its files when all of them were there. */
static int noted_files(const struct dr_merge *m, size_t at, struct dr_error *err)
{
    static char *const none[] = {NULL};
    m->files[at] = dr_set_copy_files(m->gone[at]->leaving ? m->gone[at]->leaving : none);
    return m->files[at] ? 0 : no_memory(m, err);
}

/* An image may count in sectors where its disk did not. */
static int check_size(const struct dr_image *image, const struct dr_backup_entry *e,
                      struct dr_error *err)
{
    if (dr_sums_fits(e->size, image->size))
        return 0;
    return dr_fail(
        err, EBADMSG, "%s: has %llu bytes, and backup \"%s\" had %llu: it is another image",
        image->path, (unsigned long long)image->size, e->name, (unsigned long long)e->size);
}

static int look_inside(struct dr_merge *m, size_t at, struct dr_image *image, bool exclusive,
                       struct dr_error *err)
{
    const struct dr_backup_entry *e = m->gone[at];
    uint64_t bytes = 0;
    int r = e->leaving ? 0 : check_size(image, e, err);
    if (r < 0)
        return r;
    r = exclusive ? dr_ops_lock(image, err) : 0;
    if (r == 0)
        r = dr_ops_disk_size(image, &bytes, err);
    m->freed += bytes;
    for (unsigned i = 0; r == 0 && !e->leaving && i < image->n_files; i++)
        r = add_file(m, &m->files[at], i, image->files[i]->path, err);
    return r;
}

/* All disks of an archive leave together. */
static int look_at_archive(struct dr_merge *m, size_t at, bool exclusive, struct dr_error *err)
{
    const struct dr_backup_entry *e = m->gone[at];
    CLEANUP_FREE char *path = dr_set_main_file(m->fs, m->set, e);
    CLEANUP_FILE struct dr_file *file = NULL;
    uint64_t bytes = 0;
    if (!path)
        return no_memory(m, err);
    bool there = dr_fs_exists(m->fs, path);
    int r = there ? dr_gate_check(m->fs, m->set, path, m->open, err)
                  : dr_gate_check_new(m->fs, m->set, path, m->open, err);
    if (r == 0 && there) {
        r = dr_file_open(m->fs, path,
                         exclusive ? DR_FILE_RDWR : DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file,
                         err);
        if (r == 0)
            r = dr_file_usage(file, &bytes, err);
    }
    if (r < 0)
        return r;
    m->freed += at == 0 ? bytes : 0;
    return there && !e->leaving ? add_file(m, &m->files[at], 0, path, err)
                                : noted_files(m, at, err);
}

/* A file that somebody has removed by hand is no obstacle, unless the kept one needs it. */
static int look_at_gone(struct dr_merge *m, size_t at, bool exclusive, struct dr_error *err)
{
    const struct dr_backup_entry *e = m->gone[at];
    CLEANUP_FREE char *path = NULL;
    CLEANUP_IMAGE struct dr_image *image = NULL;
    struct dr_error why = DR_ERROR_INIT;
    if (dr_set_in_archive(e))
        return look_at_archive(m, at, exclusive, err);
    int r = path_of(m, e, &path, err);
    if (r < 0)
        return r;
    bool there = dr_fs_exists(m->fs, path);
    r = there ? open_alone(m, e, path, &image, &why) : 0;
    if (r < 0 && !(e->leaving && r == -ENOENT))
        return dr_fail(err, -r, "%s", why.text);
    if (image)
        r = look_inside(m, at, image, exclusive, err);
    else
        r = 0;
    return r == 0 && !m->files[at] ? noted_files(m, at, err) : r;
}

static bool is_of_merge(const struct dr_merge *m, struct dr_file_id id)
{
    for (size_t i = 0; i <= m->n; i++) {
        const struct dr_backup_entry *e = i < m->n ? m->gone[i] : m->into;
        CLEANUP_FREE char *path = e ? dr_set_path(m->set, e) : NULL;
        struct dr_file_id its;
        if (path && dr_name_identify(m->fs, path, &its, NULL) == 0 && dr_same_id(its, id))
            return true;
    }
    return false;
}

/* Images that stand on one that leaves, and are neither it nor the kept one; with commas between.
 * What an interrupted replacement left aside is no image. */
static char *list_strangers(const struct dr_merge *m, const struct dr_scan *scan,
                            struct dr_file_id gone)
{
    char *text = NULL;
    size_t len = 0;
    struct dr_aside aside;
    FILE *out = open_memstream(&text, &len);
    if (!out)
        return NULL;
    for (size_t i = 0; i < scan->n; i++) {
        const struct dr_scan_entry *e = &scan->all[i];
        if (dr_scan_is_child(e, gone) && !is_of_merge(m, e->id) &&
            !dr_aside_parse(dr_path_basename(e->path), DR_ASIDE_FILE, &aside))
            fprintf(out, "%s%s", ftell(out) > 0 ? ", " : "", e->path);
    }
    fclose(out);
    return text;
}

static int refuse_strangers(const struct dr_merge *m, struct dr_error *err)
{
    struct dr_scan scan = {0};
    int r = 0;
    for (size_t i = 0; r == 0 && i < m->n; i++) {
        CLEANUP_FREE char *path = dr_set_path(m->set, m->gone[i]), *names = NULL;
        CLEANUP_FREE char *file = dr_set_main_file(m->fs, m->set, m->gone[i]);
        struct dr_file_id id;
        if (!path || !file)
            r = no_memory(m, err);
        else if (dr_name_identify(m->fs, path, &id, NULL) < 0)
            continue;
        if (r == 0)
            r = dr_scan_beside(&scan, m->fs, file, m->open, err);
        if (r == 0 && !(names = list_strangers(m, &scan, id)))
            r = no_memory(m, err);
        if (r == 0 && *names)
            r = dr_fail(err, EBUSY,
                        "%s: these images stand on the backup \"%s\", which is to go: %s", path,
                        m->gone[i]->name, names);
    }
    dr_scan_free(&scan);
    return r;
}

/* ------------------------------------------------------------------ the kept one */

/* Its chain must be the backups that leave, and nothing else. */
static int check_chain(const struct dr_merge *m, const struct dr_chain *chain, struct dr_error *err)
{
    bool same = chain->n == m->n + 1;
    for (size_t i = 0; same && i < m->n; i++) {
        CLEANUP_FREE char *path = NULL;
        struct dr_file_id id;
        int r = path_of(m, m->gone[i], &path, err);
        if (r == 0)
            r = dr_name_identify(m->fs, path, &id, err);
        if (r < 0)
            return r;
        same = dr_same_id(dr_image_id(chain->images[i + 1]), id);
    }
    if (same)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: its parents are not those that %s says: rebase it, or take it out of the "
                   "set, by hand",
                   chain->images[0]->path, m->set);
}

static bool same_directory(struct dr_fs *fs, const char *a, const char *b)
{
    CLEANUP_FREE char *real_a = NULL, *real_b = NULL;
    if (fs->ops->realpath(fs, a, &real_a, NULL) < 0 || fs->ops->realpath(fs, b, &real_b, NULL) < 0)
        return false;
    CLEANUP_FREE char *dir_a = dr_path_dirname(real_a), *dir_b = dr_path_dirname(real_b);
    return dir_a && dir_b && strcmp(dir_a, dir_b) == 0;
}

static bool may_go_down(const struct dr_merge *m, const struct dr_chain *chain)
{
    const struct dr_image *k = chain->images[0], *p = chain->images[chain->n - 1];
    bool may = k->fmt == p->fmt && !(k->fmt->flags & DR_FORMAT_CONTENT_ID);
    for (size_t i = 0; may && i < chain->n; i++) {
        size_t snapshots = 0;
        may = chain->images[i]->n_files == 1 && !chain->images[i]->files[0]->block_device &&
              dr_image_snapshot_count(chain->images[i], &snapshots, NULL) >= 0 && snapshots == 0;
    }
    return may && same_directory(m->fs, k->path, p->path);
}

/* Bytes that go from one image to another, and those of them that need room. The target of a merge
 * down is the last image of the chain, that of one up the first. */
static int count_bytes(const struct dr_merge *m, struct dr_chain *chain, uint64_t *bytes,
                       uint64_t *room, struct dr_error *err)
{
    bool down = m->way == DR_MERGE_DOWN;
    size_t last = chain->n - 1;
    uint64_t size = chain->images[0]->size;
    struct dr_walk from, to;
    dr_walk_init(&from, chain, down ? 0 : 1, down ? last : chain->n, size);
    dr_walk_init(&to, chain, down ? last : 0, down ? chain->n : 1, size);
    *bytes = *room = 0;
    for (uint64_t off = 0, end; off < size; off = end) {
        int r = dr_walk_to(&from, off, err);
        if (r == 0)
            r = dr_walk_to(&to, off, err);
        if (r < 0)
            return r;
        end = dr_min(from.run.end, to.run.end);
        if (from.run.kind != DR_RUN_DATA || (!down && to.run.kind != DR_RUN_HOLE))
            continue;
        *bytes += end - off;
        *room += to.run.kind == DR_RUN_DATA ? 0 : end - off;
    }
    return 0;
}

/* Merged down, the kept one's file goes and the oldest one's stays: it is the other way round in
 * what dr_merge_look has added up. */
static int count_freed(struct dr_merge *m, struct dr_chain *chain, uint64_t grows,
                       struct dr_error *err)
{
    uint64_t k = 0, p = 0;
    int r = 0;
    if (m->way == DR_MERGE_DOWN) {
        r = dr_ops_disk_size(chain->images[0], &k, err);
        if (r == 0)
            r = dr_ops_disk_size(chain->images[chain->n - 1], &p, err);
    }
    uint64_t all = m->freed + k - dr_min(p, m->freed + k);
    m->freed = all - dr_min(grows, all);
    return r;
}

static int look_at_chain(struct dr_merge *m, struct dr_chain *chain, bool exclusive,
                         struct dr_error *err)
{
    struct dr_image *k = chain->images[0];
    uint64_t room = 0;
    int r = check_size(k, m->into, err);
    if (r < 0 || chain->n == 1) /* an earlier prune got so far, or somebody else */
        return r;
    m->size = k->size;
    r = check_chain(m, chain, err);
    if (r < 0)
        return r;
    m->way = may_go_down(m, chain) ? DR_MERGE_DOWN : DR_MERGE_UP;
    struct dr_image *target = chain->images[m->way == DR_MERGE_DOWN ? chain->n - 1 : 0];
    r = count_bytes(m, chain, &m->copied, &room, err);
    if (r == 0)
        r = count_freed(m, chain, room, err);
    if (r == 0 && exclusive && room > dr_ops_image_space(target))
        r = dr_fail(err, ENOSPC, "%s: needs %llu more bytes, its file system has %llu free",
                    target->path, (unsigned long long)room,
                    (unsigned long long)dr_ops_image_space(target));
    if (r == 0 && exclusive)
        r = dr_ops_lock(k, err);
    if (r == 0 && exclusive)
        dr_ops_remove_asides(m->fs, k->path, NULL);
    return r;
}

static int look_at_kept(struct dr_merge *m, bool exclusive, struct dr_error *err)
{
    CLEANUP_FREE char *path = NULL;
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = how_to_open(m, m->into);
    int r = path_of(m, m->into, &path, err);
    if (r == 0)
        r = dr_open_fs(m->fs, path, &open, &disk, err);
    return r < 0 || !disk ? r : look_at_chain(m, disk->chain, exclusive, err);
}

int dr_merge_look(struct dr_merge *m, bool exclusive, struct dr_error *err)
{
    m->files = calloc(m->n, sizeof(*m->files));
    int r = m->files ? 0 : no_memory(m, err);
    for (size_t i = 0; r == 0 && i < m->n; i++)
        r = look_at_gone(m, i, exclusive, err);
    if (r == 0 && m->into)
        r = look_at_kept(m, exclusive, err);
    return r < 0 ? r : refuse_strangers(m, err);
}

void dr_merge_end(struct dr_merge *m)
{
    for (size_t i = 0; m->files && i < m->n; i++) {
        for (size_t k = 0; m->files[i] && m->files[i][k]; k++)
            free(m->files[i][k]);
        free(m->files[i]);
    }
    free(m->files);
    m->files = NULL;
}

/* ------------------------------------------------------------------ the merge */

/* An older backup may have been of a larger disk. What is cut off is behind the end of the kept
 * one, and nobody reads it. */
static int cut_to_size(const struct dr_merge *m, const char *path, struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = how_to_open(m, m->into);
    open.flags |= DR_OPEN_RDWR;
    int r = dr_open_fs(m->fs, path, &open, &disk, err);
    if (r == 0 && dr_size(disk) > m->size)
        r = dr_truncate(disk, m->size, err);
    return r < 0 ? r : dr_ops_close(&disk, err);
}

int dr_merge_copy(struct dr_merge *m, struct dr_error *err)
{
    CLEANUP_FREE char *kept = m->into ? dr_set_path(m->set, m->into) : NULL;
    CLEANUP_FREE char *oldest = dr_set_path(m->set, m->gone[m->n - 1]);
    if (m->way == DR_MERGE_NOT)
        return 0;
    if (!kept || !oldest)
        return no_memory(m, err);
    if (m->way == DR_MERGE_UP) {
        const struct dr_stream_options o = {.open = how_to_open(m, m->into)};
        return dr_stream_fs(m->fs, kept, &o, m->job, err);
    }
    const struct dr_commit_options o = {
        .open = how_to_open(m, m->into), .base = oldest, .keep = true};
    int r = dr_commit_fs(m->fs, kept, &o, m->job, err);
    if (r == 0)
        r = cut_to_size(m, oldest, err);
    return r;
}

/* ------------------------------------------------------------------ the proof */

/* The view of the image at path must be that of the kept one. */
static int verify(const struct dr_merge *m, const char *path, const char *kept,
                  struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    const struct dr_open_options open = how_to_open(m, m->into);
    int r = dr_open_fs(m->fs, path, &open, &disk, err);
    return r < 0 ? r : dr_verify_disk(m->fs, m->into, kept, disk, m->job, err);
}

int dr_merge_verify_kept(struct dr_merge *m, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *kept = m->into ? dr_set_path(m->set, m->into) : NULL;
    if (m->way == DR_MERGE_NOT)
        return 0;
    if (!kept)
        return no_memory(m, err);
    int r = verify(m, kept, kept, &why);
    if (r == -EBADMSG)
        dr_set_record_verified(m->fs, m->set, m->into, why.text, m->job);
    return r < 0 ? dr_fail(err, -r, "nothing is merged, and nothing removed: %s", why.text) : 0;
}

/* Merged down, it has not its name yet, and the kept one is as it was. */
int dr_merge_verify_merged(struct dr_merge *m, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *kept = m->into ? dr_set_path(m->set, m->into) : NULL;
    CLEANUP_FREE char *oldest = dr_set_path(m->set, m->gone[m->n - 1]);
    if (!m->into)
        return 0;
    if (!kept || !oldest)
        return no_memory(m, err);
    int r = verify(m, m->way == DR_MERGE_DOWN ? oldest : kept, kept, &why);
    m->verified = r == 0;
    if (r == -EBADMSG && m->way != DR_MERGE_DOWN)
        dr_set_record_verified(m->fs, m->set, m->into, why.text, m->job);
    return r < 0 ? dr_fail(err, -r, "nothing is removed: %s", why.text) : 0;
}

/* ------------------------------------------------------------------ the end
 *
 * Nobody else writes the set meanwhile: so the names that it gives to files that leave are not
 * given to others. */

/* Both are locked: whoever opens the name sees the one or the other, and gets neither before this
 * has ended. */
static int take_place(const struct dr_merge *m, struct dr_error *err)
{
    CLEANUP_FREE char *kept = dr_set_path(m->set, m->into), *real_kept = NULL, *real_oldest = NULL;
    CLEANUP_FREE char *oldest = dr_set_path(m->set, m->gone[m->n - 1]);
    CLEANUP_IMAGE struct dr_image *k = NULL, *p = NULL;
    if (!kept || !oldest)
        return no_memory(m, err);
    int r = open_alone(m, m->into, kept, &k, err);
    if (r < 0 || !k->backing_name)
        return r;
    r = open_alone(m, m->gone[m->n - 1], oldest, &p, err);
    if (r == 0)
        r = dr_ops_lock(k, err);
    if (r == 0)
        r = dr_ops_lock(p, err);
    if (r == 0)
        r = m->fs->ops->realpath(m->fs, kept, &real_kept, err);
    if (r == 0)
        r = m->fs->ops->realpath(m->fs, oldest, &real_oldest, err);
    if (r < 0)
        return r;
    dr_ops_copy_attrs(m->fs, real_kept, real_oldest);
    r = dr_fingerprint_remove(m->fs, kept, err); /* of the parent, which it has no more */
    if (r < 0)
        return r;
    r = m->fs->ops->rename(m->fs, real_oldest, real_kept, err);
    return r < 0 ? r : m->fs->ops->sync_dir(m->fs, real_kept, err);
}

static int unlink_if_there(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = fs->ops->unlink(fs, path, &why);
    return r < 0 && r != -ENOENT ? dr_fail(err, -r, "%s", why.text) : 0;
}

static int unlink_beside(const struct dr_merge *m, const char *path, struct dr_error *err)
{
    CLEANUP_FREE char *sums = dr_sums_path(path);
    int r = sums ? unlink_if_there(m->fs, sums, err) : no_memory(m, err);
    if (r == 0)
        r = dr_bitmaps_unlink(m->fs, path, err);
    if (r == 0)
        r = dr_fingerprint_remove(m->fs, path, err);
    return r < 0 ? r : m->fs->ops->sync_dir(m->fs, path, err);
}

static int remove_archive(const struct dr_merge *m, const struct dr_backup_entry *e,
                          struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_set_main_file(m->fs, m->set, e);
    int r = path ? dr_gate_check_new(m->fs, m->set, path, m->open, err) : no_memory(m, err);
    return r < 0 ? r : dr_set_remove_archive(m->fs, path, err);
}

/* The main file goes last, as everywhere: it tells whose the others are. */
static int remove_files(const struct dr_merge *m, const struct dr_backup_entry *e,
                        struct dr_error *err)
{
    CLEANUP_FREE char *path = NULL;
    CLEANUP_IMAGE struct dr_image *image = NULL;
    struct dr_error why = DR_ERROR_INIT;
    size_t n = 0;
    if (dr_set_in_archive(e))
        return remove_archive(m, e, err);
    int r = path_of(m, e, &path, err);
    if (r < 0)
        return r;
    r = open_alone(m, e, path, &image, &why);
    if (r == -EAGAIN || r == -EBUSY)
        return dr_fail(err, -r, "%s", why.text);
    r = image ? dr_ops_lock(image, err) : 0; /* what cannot be opened goes, too */
    if (r == 0 && image)
        dr_ops_remove_asides(m->fs, path, NULL);
    while (e->leaving[n])
        n++;
    while (r == 0 && n-- > 0) {
        CLEANUP_FREE char *file = dr_set_path_of(m->set, e->leaving[n]);
        r = file ? dr_gate_check_new(m->fs, m->set, file, m->open, err) : no_memory(m, err);
        if (r == 0)
            r = unlink_if_there(m->fs, file, err);
    }
    return r < 0 ? r : unlink_beside(m, path, err);
}

static struct dr_backup_entry *find_leaving(struct dr_backup_set *s, const char *name)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->all[i].leaving && strcmp(s->all[i].name, name) == 0)
            return &s->all[i];
    return NULL;
}

/* Another process may have finished the same step meanwhile. */
static int finish_step(void *user, struct dr_backup_set *s, struct dr_error *err)
{
    struct dr_merge *m = user;
    int r = 0, changed = 0;
    if (!find_leaving(s, m->gone[m->n - 1]->name))
        return 0;
    if (m->way == DR_MERGE_DOWN)
        r = take_place(m, err);
    for (size_t i = 0; r == 0 && i < m->n; i++) {
        struct dr_backup_entry *e = find_leaving(s, m->gone[i]->name);
        if (!e)
            continue;
        r = remove_files(m, e, err);
        if (r == 0)
            dr_set_drop(s, e);
        changed = 1;
    }
    for (size_t i = 0; r == 0 && i < s->n; i++)
        if (m->into && strcmp(s->all[i].name, m->into->name) == 0) {
            free(DR_STEAL(s->all[i].parent));
            if (m->verified)
                r = dr_set_mark_verified(&s->all[i], err);
        }
    return r < 0 ? r : changed;
}

int dr_merge_finish(struct dr_merge *m, struct dr_error *err)
{
    int r = refuse_strangers(m, err);
    return r < 0 ? r : dr_set_change(m->fs, m->set, finish_step, m, err);
}
