/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The process-wide table of open files. A byte-range lock test sees the other open descriptions of
 * its own process, so one file must be one object here, and what users in this process allow each
 * other is decided in this table. */
#include <stdlib.h>

#include "base/error.h"
#include "storage/storage.h"

#define TABLE_SIZE 1024u
#define OPEN_TRIES 16 /* of a name that goes over to another file each time */

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static struct dr_file *table[TABLE_SIZE]; /* under table_lock */

static struct dr_file **table_slot(const struct dr_fs *fs, struct dr_file_id id)
{
    uint64_t h = (id.ino + id.dev * 31 + (uintptr_t)fs / 64) * 0x9e3779b97f4a7c15u;
    return &table[(h >> 32) % TABLE_SIZE];
}

static struct dr_file *table_find(const struct dr_fs *fs, struct dr_file_id id)
{
    struct dr_file *f = *table_slot(fs, id);
    while (f && (f->fs != fs || f->id.dev != id.dev || f->id.ino != id.ino))
        f = f->next;
    return f;
}

static void table_add(struct dr_file *f)
{
    struct dr_file **slot = table_slot(f->fs, f->id);
    f->next = *slot;
    *slot = f;
}

static void table_remove(struct dr_file *f)
{
    struct dr_file **p = table_slot(f->fs, f->id);
    while (*p != f)
        p = &(*p)->next;
    *p = f->next;
}

/* ------------------------------------------------------------------ sharing */

static bool is_sharer(unsigned flags)
{
    return flags & (DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK);
}

/* The lock bytes that belong to a state; see docs on QEMU's permissions. */
static int take_locks(struct dr_file *f, unsigned flags, struct dr_error *err)
{
    unsigned use = DR_PERM_READ, unshared = DR_PERM_WRITE | DR_PERM_RESIZE;
    if (!f->ops->lock || (flags & DR_FILE_NO_LOCK))
        return 0;
    if (flags & DR_FILE_RDWR)
        use |= DR_PERM_WRITE | DR_PERM_RESIZE;
    else if (flags & DR_FILE_FORCE_SHARE)
        unshared = 0;
    return f->ops->lock(f, use, unshared, err);
}

static int busy(const struct dr_file *f, const char *what, struct dr_error *err)
{
    return dr_fail(err, EBUSY,
                   "%s: Failed to get %s lock. The image [%s] is already open in this process",
                   f->path, what, f->path);
}

/* Users whose rights count: everybody but those who asked not to be considered. */
static unsigned exclusive_users(const struct dr_file *f)
{
    return f->refs - f->sharers;
}

static int check_sharing(const struct dr_file *f, unsigned flags, struct dr_error *err)
{
    if (is_sharer(flags))
        return 0;
    if ((flags & DR_FILE_RDWR) && (f->writers || exclusive_users(f)))
        return busy(f, "\"write\"", err);
    if (f->writers)
        return busy(f, "shared \"write\"", err);
    return 0;
}

/* What the object is when one more user comes: the strongest wish of each kind. */
static unsigned merge_flags(unsigned old, unsigned add)
{
    unsigned any = (old | add) & DR_FILE_RDWR;
    unsigned all = old & add;
    if (!any)
        any |= all & DR_FILE_FORCE_SHARE;
    return any | (all & (DR_FILE_NO_LOCK | DR_FILE_NO_FLUSH | DR_FILE_DIRECT));
}

/* What was seen before the lock was ours may have grown since: who had the lock appended. */
static int settle_size(struct dr_file *f, struct dr_error *err)
{
    return f->block_device ? 0 : dr_file_refresh_size(f, err);
}

static int raise_state(struct dr_file *f, unsigned flags, struct dr_error *err)
{
    unsigned old = f->flags;
    int r = 0;
    if ((flags & ~old) & DR_FILE_RDWR) {
        f->flags = flags; /* upgrade looks at NO_LOCK */
        if (f->ops->upgrade)
            r = f->ops->upgrade(f, err);
    } else if ((old & ~flags) & (DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK)) {
        r = take_locks(f, flags, err);
    }
    f->flags = r ? old : flags;
    if (!r && ((flags & ~old) & DR_FILE_RDWR))
        r = settle_size(f, err);
    return r;
}

static int join(struct dr_file *f, unsigned flags, struct dr_error *err)
{
    int r = check_sharing(f, flags, err);
    if (!r)
        r = raise_state(f, merge_flags(f->flags, flags), err);
    return r;
}

static void count_user(struct dr_file *f, unsigned flags)
{
    f->refs++;
    if (is_sharer(flags))
        f->sharers++;
    else if (flags & DR_FILE_RDWR)
        f->writers++;
}

/* ------------------------------------------------------------------ open and close */

static int enter_table(struct dr_file *fresh, unsigned flags, struct dr_error *err)
{
    int r = take_locks(fresh, flags, err);
    if (!r)
        r = settle_size(fresh, err);
    if (r)
        return r;
    pthread_mutex_init(&fresh->flush_lock, NULL);
    table_add(fresh);
    count_user(fresh, flags);
    return 0;
}

/* fresh is used up: it becomes the object of the table, or is closed. */
static int settle(struct dr_file *fresh, unsigned flags, struct dr_file **file,
                  struct dr_error *err)
{
    pthread_mutex_lock(&table_lock);
    struct dr_file *present = table_find(fresh->fs, fresh->id);
    int r = present ? join(present, flags, err) : enter_table(fresh, flags, err);
    if (!r && present)
        count_user(present, flags);
    pthread_mutex_unlock(&table_lock);
    if (r || present)
        fresh->ops->close(fresh);
    *file = present ? present : fresh;
    return r;
}

static int check_flags(const char *path, unsigned *flags, struct dr_error *err)
{
    if (*flags & DR_FILE_CREATE)
        *flags |= DR_FILE_RDWR;
    if ((*flags & DR_FILE_RDWR) && (*flags & DR_FILE_FORCE_SHARE))
        return dr_fail(err, EINVAL, "%s: a forced shared open cannot be for writing", path);
    if ((*flags & DR_FILE_TRUNCATE) && !(*flags & DR_FILE_RDWR))
        return dr_fail(err, EINVAL, "%s: only an open for writing can cut the file", path);
    return 0;
}

/* Does path still lead to f? What cannot be told counts as yes. */
static bool name_leads_to(struct dr_fs *fs, const char *path, const struct dr_file *f)
{
    struct dr_file_id id;
    int r = fs->ops->identify(fs, path, &id, NULL);
    if (r)
        return r != -ENOENT;
    return id.dev == f->id.dev && id.ino == f->id.ino;
}

/* Opened and locked; *stale: but the name went over to another file before the lock was ours. */
static int open_once(struct dr_fs *fs, const char *path, unsigned flags, bool made, bool *stale,
                     struct dr_file **file, struct dr_error *err)
{
    struct dr_file *f = NULL;
    int r = fs->ops->open(fs, path, flags, &f, err);
    if (r)
        return r;
    unsigned lasting = flags & ~(unsigned)(DR_FILE_CREATE | DR_FILE_TRUNCATE | DR_FILE_PRIVATE);
    f->flags = lasting;
    if (made)
        f->dirty = true; /* the inode itself is not durable yet */
    r = settle(f, lasting, file, err);
    if (r && made)
        fs->ops->unlink(fs, path, NULL);
    *stale = !r && !(flags & DR_FILE_NO_LOCK) && !name_leads_to(fs, path, *file);
    if (*stale)
        dr_file_unref(*file);
    return r;
}

/* Who replaces a file holds its lock until the new one has the name: whoever opened the old one in
 * between and got its lock then would work, alone and unseen, on a file that has no name. */
static int open_settled(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                        struct dr_error *err)
{
    bool made = (flags & DR_FILE_CREATE) && !(flags & DR_FILE_TRUNCATE);
    for (int i = 0; i < OPEN_TRIES; i++) {
        bool stale = false;
        int r = open_once(fs, path, flags, made, &stale, file, err);
        if (r || !stale)
            return r;
        if (made)
            return dr_fail(err, ESTALE, "%s: was taken away while it was made", path);
    }
    return dr_fail(err, EBUSY, "%s: is being replaced all the time", path);
}

int dr_file_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                 struct dr_error *err)
{
    struct dr_file *f = NULL;
    *file = NULL;
    int r = check_flags(path, &flags, err);
    if (!r)
        r = open_settled(fs, path, flags, &f, err);
    if (r)
        return r;
    if ((flags & DR_FILE_TRUNCATE) && !f->block_device)
        r = dr_file_truncate(f, 0, err);
    if (r)
        dr_file_unref(f);
    else
        *file = f;
    return r;
}

int dr_file_adopt(struct dr_file *fresh, unsigned flags, struct dr_file **file,
                  struct dr_error *err)
{
    *file = NULL;
    fresh->flags = flags;
    int r = settle(fresh, flags, &fresh, err);
    if (!r)
        *file = fresh;
    return r;
}

struct dr_file *dr_file_ref(struct dr_file *f)
{
    pthread_mutex_lock(&table_lock);
    f->refs++;
    pthread_mutex_unlock(&table_lock);
    return f;
}

/* Which kind of user leaves is not known. A sharer is assumed while there is one: that keeps the
 * stronger lock, so a wrong guess can refuse somebody but never lets two writers in. */
void dr_file_unref(struct dr_file *f)
{
    if (!f)
        return;
    pthread_mutex_lock(&table_lock);
    bool last = --f->refs == 0;
    if (f->sharers)
        f->sharers--;
    if (last) {
        table_remove(f);
        /* Before anybody can look for the file again: our own old bytes must not stop him. */
        if (f->ops->lock && !(f->flags & DR_FILE_NO_LOCK))
            f->ops->lock(f, 0, 0, NULL);
    }
    pthread_mutex_unlock(&table_lock);
    if (last) {
        pthread_mutex_destroy(&f->flush_lock);
        f->ops->close(f);
    }
}

/* ------------------------------------------------------------------ reader to writer and back */

int dr_file_upgrade(struct dr_file *f, struct dr_error *err)
{
    pthread_mutex_lock(&table_lock);
    int r = 0;
    if (!(f->flags & DR_FILE_RDWR)) {
        if (exclusive_users(f) > 1)
            r = busy(f, "\"write\"", err);
        else
            r = raise_state(f, merge_flags(f->flags, f->flags | DR_FILE_RDWR), err);
        if (!r && !(f->flags & DR_FILE_NO_LOCK)) {
            f->writers = 1;
            if (f->sharers == f->refs)
                f->sharers--;
        }
    }
    pthread_mutex_unlock(&table_lock);
    return r;
}

int dr_file_downgrade(struct dr_file *f, struct dr_error *err)
{
    pthread_mutex_lock(&table_lock);
    int r = 0;
    if (f->flags & DR_FILE_RDWR) {
        f->flags &= ~(unsigned)DR_FILE_RDWR;
        if (f->ops->downgrade)
            r = f->ops->downgrade(f, err);
        if (r)
            f->flags |= DR_FILE_RDWR;
        else
            f->writers = 0;
    }
    pthread_mutex_unlock(&table_lock);
    return r;
}
