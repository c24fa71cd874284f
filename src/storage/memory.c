/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file system in memory: sparse, as large as offsets go. Names are kept as absolute paths, tidied
 * by their text alone; there are no links. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "storage/page-tree.h"
#include "storage/storage.h"

struct mem_inode {
    pthread_rwlock_t lock; /* size, pages, changes */
    uint64_t size;
    struct page_tree pages;
    uint64_t number;
    uint64_t changes; /* how often it was changed: its time */
    unsigned refs;    /* name and open files; under the file system's lock */
    bool device;      /* keeps its size, and tells of no holes; set before it is first opened */
};

struct mem_name {
    char *path;
    struct mem_inode *inode;
};

struct mem_fs {
    struct dr_fs base;
    pthread_mutex_t lock;
    struct mem_name *names;
    size_t n_names;
    struct mem_dir_lock *locks;
    uint64_t next_number;
};

/* Directories exist by being named: a lock is one of the name. */
struct mem_dir_lock {
    struct dr_dir_lock base;
    struct mem_dir_lock *next;
    char *path;
};

struct mem_file {
    struct dr_file base;
    struct mem_inode *inode;
};

static struct mem_fs *mem_fs(struct dr_fs *fs)
{
    return (struct mem_fs *)fs;
}

static struct mem_inode *inode_of(struct dr_file *f)
{
    return ((struct mem_file *)f)->inode;
}

/* ------------------------------------------------------------------ inodes */

static struct mem_inode *inode_new(struct mem_fs *m)
{
    struct mem_inode *inode = calloc(1, sizeof(*inode));
    if (!inode)
        return NULL;
    pthread_rwlock_init(&inode->lock, NULL);
    inode->number = ++m->next_number;
    return inode;
}

static void inode_unref(struct mem_inode *inode)
{
    if (--inode->refs)
        return;
    page_tree_drop(&inode->pages, 0, UINT64_MAX);
    pthread_rwlock_destroy(&inode->lock);
    free(inode);
}

/* ------------------------------------------------------------------ bytes */

static void read_pages(const struct mem_inode *inode, uint8_t *buf, uint64_t off, size_t len)
{
    while (len) {
        size_t at = off % PAGE_TREE_BYTES;
        size_t n = (size_t)dr_min(len, PAGE_TREE_BYTES - at);
        const uint8_t *page = page_tree_get(&inode->pages, off / PAGE_TREE_BYTES);
        if (page)
            memcpy(buf, page + at, n);
        else
            memset(buf, 0, n);
        buf += n;
        off += n;
        len -= n;
    }
}

static ssize_t mem_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    struct mem_inode *inode = inode_of(f);
    size_t n = 0;
    pthread_rwlock_rdlock(&inode->lock);
    if (off < inode->size) {
        n = (size_t)dr_min(len, inode->size - off);
        read_pages(inode, buf, off, n);
    }
    pthread_rwlock_unlock(&inode->lock);
    return (ssize_t)n;
}

/* Never writes the size of a device, which is read without the lock. */
static void grow_to(struct mem_inode *inode, uint64_t size)
{
    if (size > inode->size)
        inode->size = size;
}

static int write_pages(struct mem_inode *inode, const uint8_t *buf, uint64_t off, size_t len)
{
    while (len) {
        size_t at = off % PAGE_TREE_BYTES;
        size_t n = (size_t)dr_min(len, PAGE_TREE_BYTES - at);
        uint8_t *page = page_tree_make(&inode->pages, off / PAGE_TREE_BYTES);
        if (!page)
            return -ENOSPC;
        memcpy(page + at, buf, n);
        buf += n;
        off += n;
        len -= n;
        grow_to(inode, off);
    }
    return 0;
}

static int mem_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    struct mem_inode *inode = inode_of(f);
    uint64_t end = off;
    int r = 0;
    for (int i = 0; i < n; i++)
        end += iov[i].iov_len;
    if (inode->device && end > inode->size)
        return -ENOSPC;
    pthread_rwlock_wrlock(&inode->lock);
    inode->changes++;
    for (int i = 0; i < n && !r; i++) {
        r = write_pages(inode, iov[i].iov_base, off, iov[i].iov_len);
        off += iov[i].iov_len;
    }
    pthread_rwlock_unlock(&inode->lock);
    return r;
}

static void zero_part(struct mem_inode *inode, uint64_t off, uint64_t end)
{
    uint8_t *page = page_tree_get(&inode->pages, off / PAGE_TREE_BYTES);
    if (page && end > off)
        memset(page + off % PAGE_TREE_BYTES, 0, (size_t)(end - off));
}

static void zero_pages(struct mem_inode *inode, uint64_t off, uint64_t end)
{
    uint64_t first = dr_round_up(off, PAGE_TREE_BYTES), last = dr_round_down(end, PAGE_TREE_BYTES);
    if (first > last) {
        zero_part(inode, off, end); /* all in one page */
        return;
    }
    zero_part(inode, off, first);
    page_tree_drop(&inode->pages, first / PAGE_TREE_BYTES, last / PAGE_TREE_BYTES);
    zero_part(inode, last, end);
}

/* Space is given back in any case. */
static int mem_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    struct mem_inode *inode = inode_of(f);
    if (flags & DR_FILE_ZERO_ALLOCATE)
        return -ENOTSUP; /* pages of zeros take space */
    if (inode->device && off + len > inode->size)
        return -ENOSPC;
    pthread_rwlock_wrlock(&inode->lock);
    inode->changes++;
    zero_pages(inode, off, off + len);
    grow_to(inode, off + len);
    pthread_rwlock_unlock(&inode->lock);
    return 0;
}

static int mem_truncate(struct dr_file *f, uint64_t size)
{
    struct mem_inode *inode = inode_of(f);
    if (inode->device)
        return size == inode->size ? 0 : -ENOTSUP;
    pthread_rwlock_wrlock(&inode->lock);
    inode->changes++;
    if (size < inode->size)
        zero_pages(inode, size, dr_round_up(inode->size, PAGE_TREE_BYTES));
    inode->size = size;
    pthread_rwlock_unlock(&inode->lock);
    return 0;
}

static int mem_get_size(struct dr_file *f, uint64_t *size)
{
    struct mem_inode *inode = inode_of(f);
    pthread_rwlock_rdlock(&inode->lock);
    *size = inode->size;
    pthread_rwlock_unlock(&inode->lock);
    return 0;
}

static int mem_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp)
{
    struct mem_inode *inode = inode_of(f);
    (void)settle;
    pthread_rwlock_rdlock(&inode->lock);
    *stamp = (struct dr_file_stamp){.size = inode->size,
                                    .mtime = inode->changes,
                                    .ctime = inode->changes,
                                    .ino = inode->number};
    pthread_rwlock_unlock(&inode->lock);
    return 0;
}

static uint64_t data_run(const struct mem_inode *inode, uint64_t off, uint64_t len)
{
    uint64_t index = off / PAGE_TREE_BYTES, end = off + len;
    while (index * PAGE_TREE_BYTES < end && page_tree_get(&inode->pages, index))
        index++;
    return dr_min(end, index * PAGE_TREE_BYTES) - off;
}

static int mem_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                      uint64_t *run)
{
    struct mem_inode *inode = inode_of(f);
    if (inode->device)
        return 0;
    pthread_rwlock_rdlock(&inode->lock);
    uint64_t here = off / PAGE_TREE_BYTES, next = page_tree_next(&inode->pages, here);
    if (next == here) {
        *kind = DR_FILE_DATA;
        *run = data_run(inode, off, len);
    } else {
        *kind = DR_FILE_HOLE;
        *run = next == UINT64_MAX ? len : dr_min(len, next * PAGE_TREE_BYTES - off);
    }
    pthread_rwlock_unlock(&inode->lock);
    return 0;
}

static int mem_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static void mem_close(struct dr_file *f)
{
    struct mem_fs *m = mem_fs(f->fs);
    pthread_mutex_lock(&m->lock);
    inode_unref(inode_of(f));
    pthread_mutex_unlock(&m->lock);
    free(f->path);
    free(f);
}

static const struct dr_file_ops mem_file_ops = {
    .name = "memory",
    .close = mem_close,
    .pread = mem_pread,
    .pwritev = mem_pwritev,
    .extent = mem_extent,
    .zero = mem_zero,
    .truncate = mem_truncate,
    .flush = mem_flush,
    .get_size = mem_get_size,
    .stamp = mem_stamp,
};

/* ------------------------------------------------------------------ names */

static bool is_component(const char *s, size_t n, const char *what)
{
    return n == strlen(what) && memcmp(s, what, n) == 0;
}

static char *tidy(const char *path)
{
    char *out = malloc(strlen(path) + 2);
    size_t len = 0;
    if (!out)
        return NULL;
    while (*path) {
        size_t n = strcspn(path, "/");
        if (is_component(path, n, "..")) {
            while (len && out[--len] != '/')
                ;
        } else if (n && !is_component(path, n, ".")) {
            out[len++] = '/';
            memcpy(out + len, path, n);
            len += n;
        }
        path += n + (path[n] == '/');
    }
    if (!len)
        out[len++] = '/';
    out[len] = '\0';
    return out;
}

static struct mem_name *find_name(struct mem_fs *m, const char *key)
{
    for (size_t i = 0; i < m->n_names; i++)
        if (strcmp(m->names[i].path, key) == 0)
            return &m->names[i];
    return NULL;
}

static void remove_name(struct mem_fs *m, struct mem_name *name)
{
    free(name->path);
    inode_unref(name->inode);
    *name = m->names[--m->n_names];
}

static struct mem_inode *create_name(struct mem_fs *m, const char *key)
{
    struct mem_name *names = realloc(m->names, (m->n_names + 1) * sizeof(*names));
    if (!names)
        return NULL;
    m->names = names;
    char *path = strdup(key);
    struct mem_inode *inode = inode_new(m);
    if (!path || !inode) {
        free(path);
        free(inode);
        return NULL;
    }
    inode->refs = 1;
    names[m->n_names++] = (struct mem_name){path, inode};
    return inode;
}

static int no_memory(const char *path, struct dr_error *err)
{
    return dr_fail_errno(err, ENOMEM, "Could not open '%s'", path);
}

/* The inode for open, with the file system's lock held. */
static int look_up(struct mem_fs *m, const char *path, const char *key, unsigned flags,
                   struct mem_inode **inode, struct dr_error *err)
{
    struct mem_name *name = find_name(m, key);
    if (name && (flags & DR_FILE_CREATE) && !(flags & DR_FILE_TRUNCATE))
        return dr_fail_errno(err, EEXIST, "Could not create '%s'", path);
    if (!name && !(flags & DR_FILE_CREATE))
        return dr_fail_errno(err, ENOENT, "Could not open '%s'", path);
    *inode = name ? name->inode : create_name(m, key);
    return *inode ? 0 : no_memory(path, err);
}

static int mem_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                    struct dr_error *err)
{
    struct mem_fs *m = mem_fs(fs);
    CLEANUP_FREE char *key = tidy(path);
    CLEANUP_FREE char *own_path = strdup(path);
    CLEANUP_FREE struct mem_file *f = calloc(1, sizeof(*f));
    if (!key || !own_path || !f)
        return no_memory(path, err);
    DR_LOCK_SCOPE(&m->lock);
    int r = look_up(m, path, key, flags, &f->inode, err);
    if (r || !f->inode)
        return r;
    f->inode->refs++;
    f->base.ops = &mem_file_ops;
    f->base.fs = fs;
    f->base.id = (struct dr_file_id){.owner = m, .ino = f->inode->number};
    f->base.path = DR_STEAL(own_path);
    f->base.atomic_size = 512;
    uint64_t size;
    mem_get_size(&f->base, &size);
    f->base.size = size;
    f->base.block_device = f->inode->device;
    *file = &DR_STEAL(f)->base;
    return 0;
}

static int mem_identify(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                        struct dr_error *err)
{
    struct mem_fs *m = mem_fs(fs);
    CLEANUP_FREE char *key = tidy(path);
    if (!key)
        return no_memory(path, err);
    DR_LOCK_SCOPE(&m->lock);
    struct mem_name *name = find_name(m, key);
    if (!name)
        return dr_fail_errno(err, ENOENT, "Could not open '%s'", path);
    *id = (struct dr_file_id){.owner = m, .ino = name->inode->number};
    return 0;
}

static int move_name(struct dr_fs *fs, const char *from, const char *to, bool replace,
                     struct dr_error *err)
{
    struct mem_fs *m = mem_fs(fs);
    CLEANUP_FREE char *from_key = tidy(from);
    CLEANUP_FREE char *to_key = tidy(to);
    if (!from_key || !to_key)
        return no_memory(from, err);
    DR_LOCK_SCOPE(&m->lock);
    if (!find_name(m, from_key))
        return dr_fail_errno(err, ENOENT, "Could not rename '%s' to '%s'", from, to);
    struct mem_name *target = find_name(m, to_key);
    if (target && !replace)
        return dr_fail_errno(err, EEXIST, "Could not rename '%s' to '%s'", from, to);
    if (strcmp(from_key, to_key) == 0)
        return 0;
    if (target)
        remove_name(m, target);
    struct mem_name *source = find_name(m, from_key);
    free(source->path);
    source->path = DR_STEAL(to_key);
    return 0;
}

static int mem_rename(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    return move_name(fs, from, to, true, err);
}

static int mem_rename_new(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    return move_name(fs, from, to, false, err);
}

static int mem_unlink(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct mem_fs *m = mem_fs(fs);
    CLEANUP_FREE char *key = tidy(path);
    if (!key)
        return no_memory(path, err);
    DR_LOCK_SCOPE(&m->lock);
    struct mem_name *name = find_name(m, key);
    if (!name)
        return dr_fail_errno(err, ENOENT, "Could not remove '%s'", path);
    remove_name(m, name);
    return 0;
}

static int mem_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    (void)fs;
    (void)path;
    (void)err;
    return 0;
}

struct name_list {
    char **names;
    size_t n;
};

static void free_names(struct name_list *l)
{
    for (size_t i = 0; i < l->n; i++)
        free(l->names[i]);
    free(l->names);
}

static bool listed(const struct name_list *l, const char *name, size_t len)
{
    for (size_t i = 0; i < l->n; i++)
        if (strncmp(l->names[i], name, len) == 0 && l->names[i][len] == '\0')
            return true;
    return false;
}

/* Copies, so that each() may open and remove files. -ENOTDIR: a file has that name. */
static int collect_names(struct mem_fs *m, const char *dir, struct name_list *l)
{
    DR_LOCK_SCOPE(&m->lock);
    size_t d = strcmp(dir, "/") == 0 ? 0 : strlen(dir);
    l->names = calloc(m->n_names + 1, sizeof(*l->names));
    if (!l->names)
        return -ENOMEM;
    for (size_t i = 0; i < m->n_names; i++) {
        const char *path = m->names[i].path;
        if (strcmp(path, dir) == 0)
            return -ENOTDIR;
        if (strncmp(path, dir, d) != 0 || path[d] != '/')
            continue;
        size_t len = strcspn(path + d + 1, "/"); /* of a file, or of the directory it is in */
        if (listed(l, path + d + 1, len))
            continue;
        l->names[l->n] = strndup(path + d + 1, len);
        if (!l->names[l->n])
            return -ENOMEM;
        l->n++;
    }
    return 0;
}

static int mem_list(struct dr_fs *fs, const char *dir, int (*each)(void *user, const char *name),
                    void *user, struct dr_error *err)
{
    CLEANUP_FREE char *key = tidy(dir);
    __attribute__((cleanup(free_names))) struct name_list l = {0};
    int r = key ? collect_names(mem_fs(fs), key, &l) : -ENOMEM;
    if (r < 0)
        return dr_fail_errno(err, -r, "Could not read directory '%s'", dir);
    for (size_t i = 0; i < l.n && !r; i++)
        r = each(user, l.names[i]);
    return r;
}

static int mem_copy_attrs(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                          struct dr_error *err)
{
    (void)fs;
    (void)from;
    (void)to;
    (void)err;
    return 0;
}

static int mem_free_space(struct dr_fs *fs, const char *path, uint64_t *bytes, struct dr_error *err)
{
    (void)fs;
    (void)path;
    (void)err;
    *bytes = INT64_MAX;
    return 0;
}

/* A directory exists when some name lies in it. */
static bool has_name(struct mem_fs *m, const char *key)
{
    DR_LOCK_SCOPE(&m->lock);
    size_t n = strlen(key);
    if (n == 1)
        return true; /* the root */
    for (size_t i = 0; i < m->n_names; i++) {
        const char *path = m->names[i].path;
        if (strncmp(path, key, n) == 0 && (path[n] == '\0' || path[n] == '/'))
            return true;
    }
    return false;
}

static int mem_realpath(struct dr_fs *fs, const char *path, char **out, struct dr_error *err)
{
    *out = NULL;
    CLEANUP_FREE char *key = tidy(path);
    if (!key)
        return no_memory(path, err);
    if (!has_name(mem_fs(fs), key))
        return dr_fail_errno(err, ENOENT, "Could not open '%s'", path);
    *out = DR_STEAL(key);
    return 0;
}

static int mem_lock_dir(struct dr_fs *fs, const char *path, struct dr_dir_lock **held,
                        struct dr_error *err)
{
    struct mem_fs *m = mem_fs(fs);
    CLEANUP_FREE char *key = tidy(path);
    struct mem_dir_lock *lock = malloc(sizeof(*lock));
    if (!key || !lock) {
        free(lock);
        return no_memory(path, err);
    }
    DR_LOCK_SCOPE(&m->lock);
    for (const struct mem_dir_lock *l = m->locks; l; l = l->next) {
        if (strcmp(l->path, key) != 0)
            continue;
        free(lock);
        return dr_fail(err, EBUSY, "%s: somebody is at work in this directory", path);
    }
    *lock = (struct mem_dir_lock){.base.fs = fs, .next = m->locks, .path = DR_STEAL(key)};
    m->locks = lock;
    *held = &lock->base;
    return 0;
}

static void mem_unlock_dir(struct dr_dir_lock *held)
{
    struct mem_dir_lock *lock = (struct mem_dir_lock *)held;
    struct mem_fs *m = mem_fs(held->fs);
    DR_LOCK_SCOPE(&m->lock);
    struct mem_dir_lock **at = &m->locks;
    while (*at != lock)
        at = &(*at)->next;
    *at = lock->next;
    free(lock->path);
    free(lock);
}

static int mem_make_device(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct mem_fs *m = mem_fs(fs);
    CLEANUP_FREE char *key = tidy(path);
    if (!key)
        return no_memory(path, err);
    DR_LOCK_SCOPE(&m->lock);
    struct mem_name *name = find_name(m, key);
    if (!name)
        return dr_fail_errno(err, ENOENT, "Could not open '%s'", path);
    name->inode->device = true;
    return 0;
}

struct dr_fs *dr_fs_memory_new(void)
{
    static const struct dr_fs_ops ops = {
        .open = mem_open,
        .identify = mem_identify,
        .rename = mem_rename,
        .rename_new = mem_rename_new,
        .unlink = mem_unlink,
        .sync_dir = mem_sync_dir,
        .list = mem_list,
        .copy_attrs = mem_copy_attrs,
        .free_space = mem_free_space,
        .realpath = mem_realpath,
        .lock_dir = mem_lock_dir,
        .unlock_dir = mem_unlock_dir,
        .make_device = mem_make_device,
    };
    struct mem_fs *m = calloc(1, sizeof(*m));
    if (!m)
        return NULL;
    m->base.ops = &ops;
    pthread_mutex_init(&m->lock, NULL);
    return &m->base;
}

void dr_fs_memory_free(struct dr_fs *fs)
{
    if (!fs)
        return;
    struct mem_fs *m = mem_fs(fs);
    while (m->n_names)
        remove_name(m, &m->names[0]);
    free(m->names);
    pthread_mutex_destroy(&m->lock);
    free(m);
}
