/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "powerfs-log.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "slower.h"

struct power_file {
    struct dr_file base;
    struct dr_file *live; /* not in the table */
};

static struct powerfs *owner(struct dr_fs *fs)
{
    return (struct powerfs *)fs;
}

static struct dr_file *live_of(struct dr_file *f)
{
    return ((struct power_file *)f)->live;
}

/* ------------------------------------------------------------------ the log */

static void op_clear(struct power_op *op)
{
    free(op->data);
    free(op->path);
    free(op->to);
}

/* Takes over what op points to. A test that has no memory has failed. */
static void append(struct powerfs *p, struct power_op op)
{
    if (p->n_ops == p->room) {
        size_t room = p->room ? p->room * 2 : 256;
        struct power_op *log = realloc(p->log, room * sizeof(*log));
        if (!log)
            abort();
        p->log = log;
        p->room = room;
    }
    p->log[p->n_ops++] = op;
}

static char *copy_text(const char *s)
{
    char *out = strdup(s);
    if (!out)
        abort();
    return out;
}

static void log_file(struct dr_file *f, enum powerfs_kind kind, uint64_t off, uint64_t len,
                     uint8_t *data)
{
    append(owner(f->fs), (struct power_op){.kind = kind,
                                           .ino = f->id.ino,
                                           .off = off,
                                           .len = len,
                                           .data = data,
                                           .path = copy_text(f->path)});
}

/* One of the planted faults, if its turn has come. */
static bool skip_now(size_t *left)
{
    if (*left == SIZE_MAX)
        return false;
    return (*left)-- == 0; /* then SIZE_MAX: only once */
}

/* ------------------------------------------------------------------ files */

static void power_close(struct dr_file *f)
{
    live_of(f)->ops->close(live_of(f));
    free(f->path);
    free(f);
}

static ssize_t power_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    return live_of(f)->ops->pread(live_of(f), buf, off, len);
}

static uint8_t *gather(const struct iovec *iov, int n, uint64_t *len)
{
    *len = 0;
    for (int i = 0; i < n; i++)
        *len += iov[i].iov_len;
    uint8_t *buf = malloc(*len ? *len : 1), *p = buf;
    for (int i = 0; buf && i < n; i++) {
        memcpy(p, iov[i].iov_base, iov[i].iov_len);
        p += iov[i].iov_len;
    }
    return buf;
}

/* A disk takes sectors, and the host's page cache has all that was written to them before: a sector
 * never arrives without its older half. Widens the range; NULL = as it was. */
static uint8_t *whole_sectors(struct dr_file *live, uint64_t *off, uint64_t *len)
{
    uint64_t from = dr_round_down(*off, 512);
    uint64_t to = dr_min(dr_round_up(*off + *len, 512), dr_file_size(live));
    if (from == *off && to == *off + *len)
        return NULL;
    uint8_t *buf = malloc(to - from);
    if (buf && dr_file_pread(live, buf, from, to - from, NULL)) {
        free(buf);
        return NULL;
    }
    *off = from;
    *len = to - from;
    return buf;
}

static int power_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    uint64_t len;
    uint8_t *data = gather(iov, n, &len);
    if (!data)
        return -ENOMEM;
    DR_LOCK_SCOPE(&owner(f->fs)->lock);
    int r = dr_file_pwritev(live_of(f), iov, n, off, NULL);
    uint8_t *whole = r ? NULL : whole_sectors(live_of(f), &off, &len);
    if (whole) {
        free(data);
        data = whole;
    }
    log_file(f, POWERFS_WRITE, off, len, data);
    return r;
}

static int power_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                        uint64_t *run)
{
    return dr_file_extent(live_of(f), off, len, kind, run, NULL);
}

/* [off, end) lies in one sector and is now zero. */
static void log_edge(struct dr_file *f, uint64_t off, uint64_t end)
{
    uint64_t len = end - off;
    uint8_t *data = whole_sectors(live_of(f), &off, &len);
    log_file(f, data ? POWERFS_WRITE : POWERFS_ZERO, off, len, data);
}

/* The sectors that were zeroed in part are written, as the host does. */
static void log_zero(struct dr_file *f, uint64_t off, uint64_t len)
{
    uint64_t end = off + len, from = dr_round_up(off, 512);
    uint64_t to = end == dr_file_size(live_of(f)) ? end : dr_round_down(end, 512);
    if (off < from)
        log_edge(f, off, dr_min(from, end));
    if (from < to)
        log_file(f, POWERFS_ZERO, from, to - from, NULL);
    if (from <= to && to < end)
        log_edge(f, to, end);
}

static int power_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    DR_LOCK_SCOPE(&owner(f->fs)->lock);
    int r = dr_file_zero(live_of(f), off, len, flags, NULL);
    if (!r)
        log_zero(f, off, len);
    return r;
}

static int power_truncate(struct dr_file *f, uint64_t size)
{
    DR_LOCK_SCOPE(&owner(f->fs)->lock);
    int r = dr_file_truncate(live_of(f), size, NULL);
    if (!r)
        log_file(f, POWERFS_TRUNCATE, size, 0, NULL);
    return r;
}

static int power_flush(struct dr_file *f)
{
    struct powerfs *p = owner(f->fs);
    DR_LOCK_SCOPE(&p->lock);
    p->flushes++;
    if (!skip_now(&p->skip_flush))
        log_file(f, POWERFS_FLUSH, 0, 0, NULL);
    return 0;
}

static int power_get_size(struct dr_file *f, uint64_t *size)
{
    return live_of(f)->ops->get_size(live_of(f), size);
}

static const struct dr_file_ops power_file_ops = {
    .name = "power",
    .close = power_close,
    .pread = power_pread,
    .pwritev = power_pwritev,
    .extent = power_extent,
    .zero = power_zero,
    .truncate = power_truncate,
    .flush = power_flush,
    .get_size = power_get_size,
};

/* ------------------------------------------------------------------ names */

static char *real_path(struct powerfs *p, const char *path)
{
    char *real;
    if (p->live->ops->realpath(p->live, path, &real, NULL))
        abort(); /* the name was just looked at under the lock */
    return real;
}

static struct power_file *wrap(struct powerfs *p, struct dr_file *live, const char *path,
                               unsigned flags)
{
    struct power_file *f = calloc(1, sizeof(*f));
    if (!f)
        abort();
    live->flags = flags | DR_FILE_RDWR; /* the rights of a user are checked on the outer file */
    f->live = live;
    f->base.ops = &power_file_ops;
    f->base.fs = &p->fs;
    f->base.path = copy_text(path);
    f->base.id = live->id;
    f->base.atomic_size = live->atomic_size;
    f->base.block_device = live->block_device;
    f->base.size = dr_file_size(live);
    return f;
}

static int power_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                      struct dr_error *err)
{
    struct powerfs *p = owner(fs);
    struct dr_file_id id;
    struct dr_file *live;
    DR_LOCK_SCOPE(&p->lock);
    bool there = p->live->ops->identify(p->live, path, &id, NULL) == 0;
    int r = p->live->ops->open(p->live, path, flags, &live, err);
    if (r)
        return r;
    *file = &wrap(p, live, path, flags)->base;
    if (!there)
        append(p, (struct power_op){
                      .kind = POWERFS_CREATE, .ino = live->id.ino, .path = real_path(p, path)});
    return 0;
}

static int power_identify(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                          struct dr_error *err)
{
    return owner(fs)->live->ops->identify(owner(fs)->live, path, id, err);
}

static int move(struct powerfs *p, const char *from, const char *to, bool replace,
                struct dr_error *err)
{
    struct dr_file_id id;
    DR_LOCK_SCOPE(&p->lock);
    int r = p->live->ops->identify(p->live, from, &id, err);
    if (r)
        return r;
    char *old = real_path(p, from);
    r = (replace ? p->live->ops->rename : p->live->ops->rename_new)(p->live, from, to, err);
    if (r)
        free(old);
    else
        append(p, (struct power_op){
                      .kind = POWERFS_RENAME, .ino = id.ino, .path = old, .to = real_path(p, to)});
    return r;
}

static int power_rename(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    return move(owner(fs), from, to, true, err);
}

static int power_rename_new(struct dr_fs *fs, const char *from, const char *to,
                            struct dr_error *err)
{
    return move(owner(fs), from, to, false, err);
}

static int power_unlink(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct powerfs *p = owner(fs);
    struct dr_file_id id;
    DR_LOCK_SCOPE(&p->lock);
    int r = p->live->ops->identify(p->live, path, &id, err);
    if (r)
        return r;
    char *real = real_path(p, path);
    p->live->ops->unlink(p->live, path, NULL);
    append(p, (struct power_op){.kind = POWERFS_UNLINK, .ino = id.ino, .path = real});
    return 0;
}

/* path itself need not exist any more; the directory is what counts. */
static char *real_dir(const char *path)
{
    struct dr_fs *scratch = dr_fs_memory_new();
    struct dr_file *f;
    char *real = NULL, *dir = NULL;
    if (scratch && dr_file_open(scratch, path, DR_FILE_CREATE, &f, NULL) == 0) {
        dr_file_unref(f);
        if (scratch->ops->realpath(scratch, path, &real, NULL) == 0)
            dir = dr_path_dirname(real);
    }
    free(real);
    dr_fs_memory_free(scratch);
    if (!dir)
        abort();
    return dir;
}

static int power_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct powerfs *p = owner(fs);
    (void)err;
    DR_LOCK_SCOPE(&p->lock);
    p->sync_dirs++;
    if (!skip_now(&p->skip_sync_dir))
        append(p, (struct power_op){.kind = POWERFS_SYNC_DIR, .path = real_dir(path)});
    return 0;
}

static int power_list(struct dr_fs *fs, const char *dir, int (*each)(void *user, const char *name),
                      void *user, struct dr_error *err)
{
    return owner(fs)->live->ops->list(owner(fs)->live, dir, each, user, err);
}

static int power_copy_attrs(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                            struct dr_error *err)
{
    (void)fs;
    (void)from;
    (void)to;
    (void)err;
    return 0;
}

static int power_free_space(struct dr_fs *fs, const char *path, uint64_t *bytes,
                            struct dr_error *err)
{
    return owner(fs)->live->ops->free_space(owner(fs)->live, path, bytes, err);
}

static int power_realpath(struct dr_fs *fs, const char *path, char **out, struct dr_error *err)
{
    return owner(fs)->live->ops->realpath(owner(fs)->live, path, out, err);
}

static int power_make_device(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct powerfs *p = owner(fs);
    struct dr_file_id id;
    DR_LOCK_SCOPE(&p->lock);
    int r = p->live->ops->identify(p->live, path, &id, err);
    if (r == 0)
        p->device = id.ino;
    return r < 0 ? r : p->live->ops->make_device(p->live, path, err);
}

/* The live one unlocks it. */
static int power_lock_dir(struct dr_fs *fs, const char *path, struct dr_dir_lock **held,
                          struct dr_error *err)
{
    return dr_dir_lock(owner(fs)->live, path, held, err);
}

static const struct dr_fs_ops power_fs_ops = {
    .open = power_open,
    .identify = power_identify,
    .rename = power_rename,
    .rename_new = power_rename_new,
    .unlink = power_unlink,
    .sync_dir = power_sync_dir,
    .list = power_list,
    .copy_attrs = power_copy_attrs,
    .free_space = power_free_space,
    .realpath = power_realpath,
    .lock_dir = power_lock_dir,
    .make_device = power_make_device,
};

/* ------------------------------------------------------------------ handling it */

struct powerfs *powerfs_new(void)
{
    struct powerfs *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    p->fs.ops = &power_fs_ops;
    p->live = dr_fs_memory_new();
    p->base = dr_fs_memory_new();
    if (!p->live || !p->base)
        abort();
    p->skip_flush = p->skip_sync_dir = SIZE_MAX;
    pthread_mutex_init(&p->lock, NULL);
    return p;
}

static void clear_log(struct powerfs *p)
{
    for (size_t i = 0; i < p->n_ops; i++)
        op_clear(&p->log[i]);
    p->n_ops = 0;
}

void powerfs_free(struct powerfs *p)
{
    if (!p)
        return;
    clear_log(p);
    free(p->log);
    power_names_free(p->names, p->n_names);
    dr_fs_memory_free(p->live);
    dr_fs_memory_free(p->base);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

struct dr_fs *powerfs_fs(struct powerfs *p)
{
    return &p->fs;
}

static void settle_names(struct powerfs *p)
{
    for (size_t i = 0; i < p->n_ops; i++) {
        const struct power_op *op = &p->log[i];
        bool ok = true;
        if (op->kind == POWERFS_CREATE)
            ok = power_name_set(&p->names, &p->n_names, op->path, op->ino);
        if (op->kind == POWERFS_UNLINK || op->kind == POWERFS_RENAME)
            ok = power_name_set(&p->names, &p->n_names, op->path, 0);
        if (op->kind == POWERFS_RENAME)
            ok = ok && power_name_set(&p->names, &p->n_names, op->to, op->ino);
        if (!ok)
            abort();
    }
}

static void settle_bytes(struct powerfs *p, const struct power_name *name)
{
    struct dr_file *src, *dst;
    char path[32];
    if (dr_file_open(p->live, name->path, 0, &src, NULL) ||
        dr_file_open(p->base, power_base_path(path, name->ino), DR_FILE_CREATE, &dst, NULL) ||
        power_copy_bytes(src, dst))
        abort();
    dr_file_unref(src);
    dr_file_unref(dst);
}

void powerfs_settle(struct powerfs *p)
{
    DR_LOCK_SCOPE(&p->lock);
    settle_names(p);
    dr_fs_memory_free(p->base);
    p->base = dr_fs_memory_new();
    if (!p->base)
        abort();
    for (size_t i = 0; i < p->n_names; i++)
        settle_bytes(p, &p->names[i]);
    clear_log(p);
    p->flushes = p->sync_dirs = 0;
}

size_t powerfs_ops(struct powerfs *p)
{
    DR_LOCK_SCOPE(&p->lock);
    return p->n_ops;
}

size_t powerfs_next(struct powerfs *p, size_t cut, size_t cuts)
{
    size_t n = powerfs_ops(p), step = getenv("DROVER_TEST_LONG") ? 1 : (n / cuts + 1) * SLOWER;
    return cut < n ? dr_min(cut + step, n) : n + 1;
}

enum powerfs_kind powerfs_op_kind(struct powerfs *p, size_t i)
{
    DR_LOCK_SCOPE(&p->lock);
    return p->log[i].kind;
}

char *powerfs_op_text(struct powerfs *p, size_t i, char *text, size_t len)
{
    static const char *const names[] = {"write",  "zero",   "truncate", "flush",
                                        "create", "rename", "unlink",   "sync_dir"};
    DR_LOCK_SCOPE(&p->lock);
    const struct power_op *op = &p->log[i];
    if (op->kind <= POWERFS_TRUNCATE)
        snprintf(text, len, "%zu %s %s %" PRIu64 "+%" PRIu64, i, names[op->kind], op->path, op->off,
                 op->len);
    else
        snprintf(text, len, "%zu %s %s%s%s", i, names[op->kind], op->path, op->to ? " -> " : "",
                 op->to ? op->to : "");
    return text;
}

void powerfs_skip_flush(struct powerfs *p, size_t n)
{
    DR_LOCK_SCOPE(&p->lock);
    p->skip_flush = n;
}

void powerfs_skip_sync_dir(struct powerfs *p, size_t n)
{
    DR_LOCK_SCOPE(&p->lock);
    p->skip_sync_dir = n;
}

size_t powerfs_flushes(struct powerfs *p)
{
    DR_LOCK_SCOPE(&p->lock);
    return p->flushes;
}

size_t powerfs_sync_dirs(struct powerfs *p)
{
    DR_LOCK_SCOPE(&p->lock);
    return p->sync_dirs;
}
