/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "faultfs.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

#define SECTOR 512u

struct faultfs {
    struct dr_fs fs;
    struct dr_fs_ops fs_ops; /* mkdir and rmdir only where the inner one has them */
    struct dr_fs *inner;
    pthread_mutex_t lock; /* the rest */
    struct faultfs_plan plan;
    bool armed, fired;
    uint64_t matching, counts[FAULTFS_KINDS];
    faultfs_observer observer;
    void *user;
    unsigned depth;
};

struct fault_file {
    struct dr_file base;
    struct dr_file *inner; /* not in the table; its size is kept by the wrappers all the same */
};

static struct faultfs *owner(struct dr_fs *fs)
{
    return (struct faultfs *)fs;
}

static struct dr_file *inner_of(struct dr_file *f)
{
    return ((struct fault_file *)f)->inner;
}

const char *faultfs_kind_name(enum faultfs_kind kind)
{
    static const char *const names[FAULTFS_KINDS] = {"open",     "read",   "write",    "zero",
                                                     "truncate", "flush",  "extent",   "copy",
                                                     "rename",   "unlink", "sync_dir", "list"};
    return names[kind];
}

/* ------------------------------------------------------------------ the plan */

static uint64_t total(const struct faultfs *f)
{
    uint64_t n = 0;
    for (int i = 0; i < FAULTFS_KINDS; i++)
        n += f->counts[i];
    return n;
}

static bool plan_hits(struct faultfs *f, enum faultfs_kind kind)
{
    unsigned kinds = f->plan.kinds ? f->plan.kinds : ~0u;
    if (!f->armed || !(kinds & (1u << kind)))
        return false;
    uint64_t n = f->matching++;
    return f->plan.for_good ? n >= f->plan.nth : n == f->plan.nth;
}

/* Count it; 0 = do it, else -errno. *partial: some of it is to be done before that. */
static int admit(struct faultfs *f, struct faultfs_io io, bool *partial)
{
    pthread_mutex_lock(&f->lock);
    io.index = total(f);
    f->counts[io.kind]++;
    bool hit = plan_hits(f, io.kind);
    int error = f->plan.error ? f->plan.error : EIO;
    if (hit)
        f->fired = true;
    *partial = hit && f->plan.partial;
    faultfs_observer observer = f->observer;
    void *user = f->user;
    pthread_mutex_unlock(&f->lock);
    int r = observer ? observer(user, &io) : 0;
    return r ? r : hit ? -error : 0;
}

static int admit_file(struct dr_file *f, enum faultfs_kind kind, uint64_t off, uint64_t len,
                      bool *partial)
{
    struct faultfs_io io = {.kind = kind, .path = f->path, .off = off, .len = len};
    return admit(owner(f->fs), io, partial);
}

static int admit_name(struct dr_fs *fs, enum faultfs_kind kind, const char *path, const char *to,
                      struct dr_error *err)
{
    bool partial;
    struct faultfs_io io = {.kind = kind, .path = path, .to = to};
    int r = admit(owner(fs), io, &partial);
    return r ? dr_fail_errno(err, -r, "%s '%s'", faultfs_kind_name(kind), path) : 0;
}

/* Is this sector of the failing write done? */
static bool sector_done(struct faultfs *f, uint64_t sector, uint64_t first, uint64_t end)
{
    uint64_t seed = f->plan.seed;
    if (!seed)
        return sector < first + (end - first) / 2;
    uint64_t v = (sector + seed) * 0x9e3779b97f4a7c15u;
    v = (v ^ (v >> 29)) * 0xbf58476d1ce4e5b9u;
    return (v >> 40) & 1;
}

/* ------------------------------------------------------------------ files */

static void fault_close(struct dr_file *f)
{
    inner_of(f)->ops->close(inner_of(f));
    free(f->path);
    free(f);
}

static ssize_t fault_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    bool partial;
    int r = admit_file(f, FAULTFS_READ, off, len, &partial);
    return r ? r : inner_of(f)->ops->pread(inner_of(f), buf, off, len);
}

/* Some sectors of the bytes at off; buf NULL = zeros. */
static void write_some(struct dr_file *f, const uint8_t *buf, uint64_t off, uint64_t len)
{
    static const uint8_t zeros[SECTOR];
    uint64_t first = off / SECTOR, end = dr_div_up(off + len, SECTOR);
    for (uint64_t s = first; s < end; s++) {
        uint64_t from = dr_max(off, s * SECTOR), to = dr_min(off + len, (s + 1) * SECTOR);
        if (sector_done(owner(f->fs), s, first, end))
            dr_file_pwrite(inner_of(f), buf ? buf + (from - off) : zeros, from, (size_t)(to - from),
                           NULL);
    }
}

static uint8_t *gather(const struct iovec *iov, int n, uint64_t len)
{
    uint8_t *buf = malloc(len ? len : 1), *p = buf;
    for (int i = 0; buf && i < n; i++) {
        memcpy(p, iov[i].iov_base, iov[i].iov_len);
        p += iov[i].iov_len;
    }
    return buf;
}

static int fault_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    bool partial;
    uint64_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    int r = admit_file(f, FAULTFS_WRITE, off, len, &partial);
    if (!r)
        return dr_file_pwritev(inner_of(f), iov, n, off, NULL);
    CLEANUP_FREE uint8_t *buf = partial ? gather(iov, n, len) : NULL;
    if (buf)
        write_some(f, buf, off, len);
    return r;
}

static int fault_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                        uint64_t *run)
{
    bool partial;
    int r = admit_file(f, FAULTFS_EXTENT, off, len, &partial);
    return r ? r : dr_file_extent(inner_of(f), off, len, kind, run, NULL);
}

static int fault_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    bool partial;
    if (!inner_of(f)->ops->zero)
        return -ENOTSUP;
    int r = admit_file(f, FAULTFS_ZERO, off, len, &partial);
    if (r && partial)
        write_some(f, NULL, off, dr_min(len, 1u << 20));
    return r ? r : dr_file_zero(inner_of(f), off, len, flags, NULL);
}

static int fault_truncate(struct dr_file *f, uint64_t size)
{
    bool partial;
    int r = admit_file(f, FAULTFS_TRUNCATE, size, 0, &partial);
    return r ? r : dr_file_truncate(inner_of(f), size, NULL);
}

static int fault_flush(struct dr_file *f)
{
    bool partial;
    int r = admit_file(f, FAULTFS_FLUSH, 0, 0, &partial);
    return r ? r : inner_of(f)->ops->flush(inner_of(f));
}

static int fault_get_size(struct dr_file *f, uint64_t *size)
{
    struct dr_file *inner = inner_of(f);
    *size = dr_file_size(inner);
    return inner->ops->get_size ? inner->ops->get_size(inner, size) : 0;
}

static ssize_t fault_copy(struct dr_file *dst, uint64_t dst_off, struct dr_file *src,
                          uint64_t src_off, uint64_t len)
{
    bool partial;
    uint64_t copied;
    if (!inner_of(dst)->ops->copy || dst->fs != src->fs)
        return -ENOTSUP;
    int r = admit_file(dst, FAULTFS_COPY, dst_off, len, &partial);
    if (r && partial && len > SECTOR)
        dr_file_copy(inner_of(dst), dst_off, inner_of(src), src_off, dr_round_down(len / 2, SECTOR),
                     &copied, NULL);
    if (!r)
        r = dr_file_copy(inner_of(dst), dst_off, inner_of(src), src_off, len, &copied, NULL);
    return r ? r : (ssize_t)copied;
}

static int fault_upgrade(struct dr_file *f, struct dr_error *err)
{
    struct dr_file *inner = inner_of(f);
    unsigned old = inner->flags;
    inner->flags = f->flags;
    int r = inner->ops->upgrade ? inner->ops->upgrade(inner, err) : 0;
    if (r)
        inner->flags = old;
    return r;
}

static int fault_downgrade(struct dr_file *f, struct dr_error *err)
{
    struct dr_file *inner = inner_of(f);
    inner->flags = f->flags;
    return inner->ops->downgrade ? inner->ops->downgrade(inner, err) : 0;
}

static int fault_lock(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err)
{
    struct dr_file *inner = inner_of(f);
    return inner->ops->lock ? inner->ops->lock(inner, use, unshared, err) : 0;
}

static const struct dr_file_ops fault_file_ops = {
    .name = "fault",
    .close = fault_close,
    .pread = fault_pread,
    .pwritev = fault_pwritev,
    .extent = fault_extent,
    .zero = fault_zero,
    .truncate = fault_truncate,
    .flush = fault_flush,
    .get_size = fault_get_size,
    .copy = fault_copy,
    .upgrade = fault_upgrade,
    .downgrade = fault_downgrade,
    .lock = fault_lock,
};

/* ------------------------------------------------------------------ names */

static int fault_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                      struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    int r = admit_name(fs, FAULTFS_OPEN, path, NULL, err);
    if (r)
        return r;
    CLEANUP_FREE struct fault_file *f = calloc(1, sizeof(*f));
    CLEANUP_FREE char *own_path = strdup(path);
    if (!f || !own_path)
        return dr_fail_errno(err, ENOMEM, "Could not open '%s'", path);
    r = inner->ops->open(inner, path, flags, &f->inner, err);
    if (r)
        return r;
    f->inner->flags = flags & DR_FILE_CREATE ? flags | DR_FILE_RDWR : flags;
    f->base.ops = &fault_file_ops;
    f->base.fs = fs;
    f->base.path = DR_STEAL(own_path);
    f->base.id = f->inner->id;
    f->base.atomic_size = f->inner->atomic_size;
    f->base.block_device = f->inner->block_device;
    f->base.depth = owner(fs)->depth;
    f->base.block_device = f->inner->block_device;
    f->base.size = dr_file_size(f->inner);
    *file = &DR_STEAL(f)->base;
    return 0;
}

static int fault_identify(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                          struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->identify(inner, path, id, err);
}

static int fault_rename(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    int r = admit_name(fs, FAULTFS_RENAME, from, to, err);
    return r ? r : inner->ops->rename(inner, from, to, err);
}

static int fault_rename_new(struct dr_fs *fs, const char *from, const char *to,
                            struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    int r = admit_name(fs, FAULTFS_RENAME, from, to, err);
    return r ? r : inner->ops->rename_new(inner, from, to, err);
}

static int fault_unlink(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    int r = admit_name(fs, FAULTFS_UNLINK, path, NULL, err);
    return r ? r : inner->ops->unlink(inner, path, err);
}

static int fault_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    int r = admit_name(fs, FAULTFS_SYNC_DIR, path, NULL, err);
    return r ? r : inner->ops->sync_dir(inner, path, err);
}

static int fault_list(struct dr_fs *fs, const char *dir, int (*each)(void *user, const char *name),
                      void *user, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    int r = admit_name(fs, FAULTFS_LIST, dir, NULL, err);
    return r ? r : inner->ops->list(inner, dir, each, user, err);
}

static int fault_copy_attrs(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                            struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->copy_attrs(inner, inner_of(from), inner_of(to), err);
}

static int fault_free_space(struct dr_fs *fs, const char *path, uint64_t *bytes,
                            struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->free_space(inner, path, bytes, err);
}

static int fault_realpath(struct dr_fs *fs, const char *path, char **out, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->realpath(inner, path, out, err);
}

static int fault_look(struct dr_fs *fs, const char *path, enum dr_name_kind *kind,
                      struct dr_file_id *id, struct dr_error *err)
{
    return dr_look(owner(fs)->inner, path, kind, id, err);
}

static int fault_mkdir(struct dr_fs *fs, const char *path, unsigned mode, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->mkdir(inner, path, mode, err);
}

static int fault_rmdir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->rmdir(inner, path, err);
}

/* The inner one unlocks it. */
static int fault_lock_dir(struct dr_fs *fs, const char *path, struct dr_dir_lock **held,
                          struct dr_error *err)
{
    return dr_dir_lock(owner(fs)->inner, path, held, err);
}

/* ------------------------------------------------------------------ handling it */

struct faultfs *faultfs_new(struct dr_fs *inner)
{
    struct faultfs *f = calloc(1, sizeof(*f));
    if (!f)
        return NULL;
    f->fs_ops = (struct dr_fs_ops){
        .open = fault_open,
        .identify = fault_identify,
        .rename = fault_rename,
        .rename_new = fault_rename_new,
        .unlink = fault_unlink,
        .sync_dir = fault_sync_dir,
        .list = fault_list,
        .copy_attrs = fault_copy_attrs,
        .free_space = fault_free_space,
        .realpath = fault_realpath,
        .look = fault_look,
        .mkdir = inner->ops->mkdir ? fault_mkdir : NULL,
        .rmdir = inner->ops->rmdir ? fault_rmdir : NULL,
        .lock_dir = fault_lock_dir,
    };
    f->fs.ops = &f->fs_ops;
    f->inner = inner;
    pthread_mutex_init(&f->lock, NULL);
    return f;
}

void faultfs_free(struct faultfs *f)
{
    if (!f)
        return;
    pthread_mutex_destroy(&f->lock);
    free(f);
}

struct dr_fs *faultfs_fs(struct faultfs *f)
{
    return &f->fs;
}

static void reset_locked(struct faultfs *f)
{
    memset(f->counts, 0, sizeof(f->counts));
    f->matching = 0;
    f->fired = false;
}

void faultfs_arm(struct faultfs *f, const struct faultfs_plan *plan)
{
    DR_LOCK_SCOPE(&f->lock);
    reset_locked(f);
    f->plan = *plan;
    f->armed = true;
}

void faultfs_disarm(struct faultfs *f)
{
    DR_LOCK_SCOPE(&f->lock);
    f->armed = false;
}

bool faultfs_fired(struct faultfs *f)
{
    DR_LOCK_SCOPE(&f->lock);
    return f->fired;
}

void faultfs_reset(struct faultfs *f)
{
    DR_LOCK_SCOPE(&f->lock);
    reset_locked(f);
}

uint64_t faultfs_count(struct faultfs *f)
{
    DR_LOCK_SCOPE(&f->lock);
    return total(f);
}

uint64_t faultfs_count_of(struct faultfs *f, enum faultfs_kind kind)
{
    DR_LOCK_SCOPE(&f->lock);
    return f->counts[kind];
}

void faultfs_observe(struct faultfs *f, faultfs_observer observer, void *user)
{
    DR_LOCK_SCOPE(&f->lock);
    f->observer = observer;
    f->user = user;
}

void faultfs_set_depth(struct faultfs *f, unsigned depth)
{
    f->depth = depth;
}
