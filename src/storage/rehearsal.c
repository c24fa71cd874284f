/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changed bytes stand in pages in memory over the file, which is never written to. After a cut the
 * file's own bytes count only up to where it was cut. */
#include "storage/rehearsal.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "storage/page-tree.h"

struct dr_rehearsal {
    struct dr_fs fs; /* first */
    struct dr_fs *inner;
    uint64_t limit;
    _Atomic uint64_t used;
    dr_rehearsal_wrote wrote;
    void *user;
};

struct rehearsed_file {
    struct dr_file base;   /* first */
    struct dr_file *inner; /* a reader; not in the process's table */
    pthread_mutex_t lock;  /* the rest */
    struct page_tree pages;
    uint64_t size, own; /* own: bytes of inner that still count */
};

static struct dr_rehearsal *owner(struct dr_fs *fs)
{
    return (struct dr_rehearsal *)fs;
}

static struct rehearsed_file *file_of(struct dr_file *f)
{
    return (struct rehearsed_file *)f;
}

static void tell(struct dr_file *f, uint64_t off, uint64_t len)
{
    const struct dr_rehearsal *r = owner(f->fs);
    if (r->wrote)
        r->wrote(r->user, f->path, off, len);
}

/* ------------------------------------------------------------------ bytes; the lock is held */

/* One page as it reads now. */
static int read_page(struct rehearsed_file *p, uint64_t index, uint8_t *out)
{
    const uint8_t *page = page_tree_get(&p->pages, index);
    uint64_t off = index * PAGE_TREE_BYTES;
    size_t len = off < p->own ? (size_t)dr_min(PAGE_TREE_BYTES, p->own - off) : 0;
    if (page) {
        memcpy(out, page, PAGE_TREE_BYTES);
        return 0;
    }
    memset(out, 0, PAGE_TREE_BYTES);
    return len ? dr_file_pread_short(p->inner, out, off, len, NULL, NULL) : 0;
}

/* The page, in memory to be changed. */
static int own_page(struct rehearsed_file *p, uint64_t index, uint8_t **page)
{
    struct dr_rehearsal *r = owner(p->base.fs);
    uint8_t now[PAGE_TREE_BYTES];
    *page = page_tree_get(&p->pages, index);
    if (*page)
        return 0;
    int rc = read_page(p, index, now);
    if (rc < 0)
        return rc;
    if (r->used + PAGE_TREE_BYTES > r->limit)
        return -EFBIG;
    *page = page_tree_make(&p->pages, index);
    if (!*page)
        return -ENOMEM;
    r->used += PAGE_TREE_BYTES;
    memcpy(*page, now, PAGE_TREE_BYTES);
    return 0;
}

/* bytes NULL: zeros. */
static int change(struct rehearsed_file *p, const uint8_t *bytes, uint64_t off, uint64_t len)
{
    uint64_t end = off + len;
    for (uint64_t at = off, n; at < end; at += n) {
        uint64_t in = at % PAGE_TREE_BYTES;
        uint8_t *page;
        n = dr_min(end - at, PAGE_TREE_BYTES - in);
        int r = own_page(p, at / PAGE_TREE_BYTES, &page);
        if (r < 0)
            return r;
        if (bytes)
            memcpy(page + in, bytes + (at - off), (size_t)n);
        else
            memset(page + in, 0, (size_t)n);
    }
    p->size = dr_max(p->size, end);
    return 0;
}

/* ------------------------------------------------------------------ a file */

static void rehearsed_close(struct dr_file *f)
{
    struct rehearsed_file *p = file_of(f);
    page_tree_drop(&p->pages, 0, UINT64_MAX);
    p->inner->ops->close(p->inner);
    pthread_mutex_destroy(&p->lock);
    free(f->path);
    free(p);
}

/* The lock is held over reads of the file, too: one repair uses it, and a page is read and changed
 * as one. */
static ssize_t rehearsed_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    struct rehearsed_file *p = file_of(f);
    uint8_t *out = buf;
    DR_LOCK_SCOPE(&p->lock);
    if (off >= p->size)
        return 0;
    len = (size_t)dr_min(len, p->size - off);
    for (size_t done = 0, n; done < len; done += n) {
        uint64_t at = off + done, in = at % PAGE_TREE_BYTES;
        uint64_t next = page_tree_next(&p->pages, at / PAGE_TREE_BYTES);
        uint64_t clean = next == UINT64_MAX
                             ? len - done
                             : next * PAGE_TREE_BYTES - dr_min(at, next * PAGE_TREE_BYTES);
        int r = 0;
        if (clean) { /* up to the next page that was changed */
            n = (size_t)dr_min(clean, len - done);
            size_t from_file = at < p->own ? (size_t)dr_min(n, p->own - at) : 0;
            memset(out + done, 0, n);
            if (from_file)
                r = dr_file_pread_short(p->inner, out + done, at, from_file, NULL, NULL);
        } else {
            n = (size_t)dr_min(PAGE_TREE_BYTES - in, len - done);
            memcpy(out + done, page_tree_get(&p->pages, at / PAGE_TREE_BYTES) + in, n);
        }
        if (r < 0)
            return r;
    }
    return (ssize_t)len;
}

static int rehearsed_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    struct rehearsed_file *p = file_of(f);
    uint64_t at = off;
    int r = 0;
    pthread_mutex_lock(&p->lock);
    for (int i = 0; r == 0 && i < n; at += iov[i].iov_len, i++)
        r = change(p, iov[i].iov_base, at, iov[i].iov_len);
    pthread_mutex_unlock(&p->lock);
    if (r == 0)
        tell(f, off, at - off);
    return r;
}

static int rehearsed_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    struct rehearsed_file *p = file_of(f);
    (void)flags;
    pthread_mutex_lock(&p->lock);
    int r = 0;
    if (off >= p->own && page_tree_next(&p->pages, off / PAGE_TREE_BYTES) == UINT64_MAX)
        p->size = dr_max(p->size, off + len); /* zeros already */
    else
        r = change(p, NULL, off, len);
    pthread_mutex_unlock(&p->lock);
    if (r == 0)
        tell(f, off, len);
    return r;
}

static int rehearsed_truncate(struct dr_file *f, uint64_t size)
{
    struct rehearsed_file *p = file_of(f);
    uint64_t whole = dr_div_up(size, PAGE_TREE_BYTES), in = size % PAGE_TREE_BYTES;
    pthread_mutex_lock(&p->lock);
    page_tree_drop(&p->pages, whole, UINT64_MAX);
    uint8_t *last = in ? page_tree_get(&p->pages, size / PAGE_TREE_BYTES) : NULL;
    if (last)
        memset(last + in, 0, PAGE_TREE_BYTES - in);
    p->own = dr_min(p->own, size);
    p->size = size;
    pthread_mutex_unlock(&p->lock);
    tell(f, size, 0);
    return 0;
}

static int rehearsed_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static int rehearsed_get_size(struct dr_file *f, uint64_t *size)
{
    struct rehearsed_file *p = file_of(f);
    DR_LOCK_SCOPE(&p->lock);
    *size = p->size;
    return 0;
}

static int rehearsed_extent(struct dr_file *f, uint64_t off, uint64_t len,
                            enum dr_file_extent *kind, uint64_t *run)
{
    struct rehearsed_file *p = file_of(f);
    DR_LOCK_SCOPE(&p->lock);
    uint64_t next = page_tree_next(&p->pages, off / PAGE_TREE_BYTES);
    *kind = DR_FILE_DATA;
    *run = dr_min(len, PAGE_TREE_BYTES - off % PAGE_TREE_BYTES);
    if (next == off / PAGE_TREE_BYTES)
        return 0;
    if (next != UINT64_MAX)
        len = dr_min(len, next * PAGE_TREE_BYTES - off);
    *run = len;
    *kind = DR_FILE_HOLE;
    if (off >= p->own)
        return 0;
    return dr_file_extent(p->inner, off, dr_min(len, p->own - off), kind, run, NULL);
}

static const char *rehearsed_reason(struct dr_file *f, int r)
{
    (void)f;
    return r == -EFBIG ? "more would be written than a rehearsal keeps in memory" : NULL;
}

static int stays(struct dr_file *f, struct dr_error *err)
{
    (void)f;
    (void)err;
    return 0;
}

/* As a reader, whatever the user would do. */
static int rehearsed_lock(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err)
{
    struct dr_file *inner = file_of(f)->inner;
    return !inner->ops->lock ? 0
                             : inner->ops->lock(inner, use ? DR_PERM_READ : 0,
                                                unshared & (DR_PERM_WRITE | DR_PERM_RESIZE), err);
}

static const struct dr_file_ops rehearsed_ops = {
    .name = "rehearsal",
    .close = rehearsed_close,
    .pread = rehearsed_pread,
    .pwritev = rehearsed_pwritev,
    .extent = rehearsed_extent,
    .zero = rehearsed_zero,
    .truncate = rehearsed_truncate,
    .flush = rehearsed_flush,
    .get_size = rehearsed_get_size,
    .upgrade = stays,
    .downgrade = stays,
    .lock = rehearsed_lock,
    .reason = rehearsed_reason,
};

/* ------------------------------------------------------------------ names */

static int refuse(const char *path, struct dr_error *err)
{
    return dr_fail(err, EROFS, "%s: would be made, renamed or removed, which is not rehearsed",
                   path);
}

static int rehearsal_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                          struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    if (flags & (DR_FILE_CREATE | DR_FILE_TRUNCATE))
        return refuse(path, err);
    CLEANUP_FREE struct rehearsed_file *p = calloc(1, sizeof(*p));
    CLEANUP_FREE char *own_path = strdup(path);
    if (!p || !own_path)
        return dr_fail_errno(err, ENOMEM, "Could not open '%s'", path);
    flags &= ~(unsigned)(DR_FILE_RDWR | DR_FILE_DIRECT);
    int r = inner->ops->open(inner, path, flags, &p->inner, err);
    if (r < 0)
        return r;
    p->inner->flags = flags;
    p->base.ops = &rehearsed_ops;
    p->base.fs = fs;
    p->base.path = DR_STEAL(own_path);
    p->base.id = p->inner->id;
    p->base.atomic_size = p->inner->atomic_size;
    p->base.block_device = p->inner->block_device;
    p->base.size = p->size = p->own = dr_file_size(p->inner);
    pthread_mutex_init(&p->lock, NULL);
    *file = &DR_STEAL(p)->base;
    return 0;
}

static int rehearsal_identify(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                              struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->identify(inner, path, id, err);
}

static int rehearsal_rename(struct dr_fs *fs, const char *from, const char *to,
                            struct dr_error *err)
{
    (void)fs;
    (void)from;
    return refuse(to, err);
}

static int rehearsal_unlink(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    (void)fs;
    return refuse(path, err);
}

static int rehearsal_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    (void)fs;
    (void)path;
    (void)err;
    return 0;
}

static int rehearsal_list(struct dr_fs *fs, const char *dir,
                          int (*each)(void *user, const char *name), void *user,
                          struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->list(inner, dir, each, user, err);
}

static int rehearsal_copy_attrs(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                                struct dr_error *err)
{
    (void)fs;
    (void)from;
    return refuse(to->path, err);
}

static int rehearsal_free_space(struct dr_fs *fs, const char *path, uint64_t *bytes,
                                struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->free_space(inner, path, bytes, err);
}

static int rehearsal_realpath(struct dr_fs *fs, const char *path, char **out, struct dr_error *err)
{
    struct dr_fs *inner = owner(fs)->inner;
    return inner->ops->realpath(inner, path, out, err);
}

static int rehearsal_look(struct dr_fs *fs, const char *path, enum dr_name_kind *kind,
                          struct dr_file_id *id, struct dr_error *err)
{
    return dr_look(owner(fs)->inner, path, kind, id, err);
}

static const struct dr_fs_ops rehearsal_fs_ops = {
    .open = rehearsal_open,
    .identify = rehearsal_identify,
    .rename = rehearsal_rename,
    .rename_new = rehearsal_rename,
    .unlink = rehearsal_unlink,
    .sync_dir = rehearsal_sync_dir,
    .list = rehearsal_list,
    .copy_attrs = rehearsal_copy_attrs,
    .free_space = rehearsal_free_space,
    .realpath = rehearsal_realpath,
    .look = rehearsal_look,
};

struct dr_rehearsal *dr_rehearsal_new(struct dr_fs *inner, uint64_t limit, dr_rehearsal_wrote wrote,
                                      void *user)
{
    struct dr_rehearsal *r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    r->fs.ops = &rehearsal_fs_ops;
    r->inner = inner;
    r->limit = limit;
    r->wrote = wrote;
    r->user = user;
    return r;
}

struct dr_fs *dr_rehearsal_fs(struct dr_rehearsal *r)
{
    return &r->fs;
}

void dr_rehearsal_free(struct dr_rehearsal *r)
{
    free(r);
}
