/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening and closing: the process-wide table of open files, and who may use one.
 *
 * A byte-range lock test sees the other open descriptions of its own process, so all users that
 * lock one file against each other share one object, and this file decides between them. There are
 * three kinds of users, and the table has one object for each kind: exclusive ones (a writer, or
 * any number of readers), readers that share with everybody (FORCE_SHARE) and users without locks
 * (NO_LOCK). The lock bytes of different kinds never conflict. Because an object never mixes kinds,
 * its lock bytes are always exactly those of its users, and go when the last one leaves.
 *
 * A part of a file (part.h) is a user of the file with a claim on some of its bytes. Users that
 * have claims exclude each other only where these overlap; towards other processes the object is a
 * writer while one of them is.
 *
 * Two kinds of locks: table_lock protects the table's links and is never held over a system call.
 * Each object's state_lock serialises its opens, closes, upgrades and downgrades, with their system
 * calls, and so makes only users of that same file wait. state_lock is taken before table_lock;
 * an open that finds an object in the table pins it, releases the table and only then waits. */
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "storage/storage.h"

#define TABLE_SIZE 1024u
#define OPEN_TRIES 16 /* of a name that goes over to another file each time */

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static struct dr_file *table[TABLE_SIZE]; /* under table_lock */

static enum dr_file_kind kind_of(unsigned flags)
{
    if (flags & DR_FILE_NO_LOCK)
        return DR_FILE_UNLOCKED;
    return flags & DR_FILE_FORCE_SHARE ? DR_FILE_SHARING : DR_FILE_EXCLUSIVE;
}

static struct dr_file **table_slot(const struct dr_fs *fs, struct dr_file_id id)
{
    uint64_t h = (id.ino + id.dev * 31 + (uintptr_t)fs / 64) * 0x9e3779b97f4a7c15u;
    return &table[(h >> 32) % TABLE_SIZE];
}

/* An object of the same bytes as like, decoded in the same way, for users of that kind. */
static struct dr_file *table_find(const struct dr_file *like, enum dr_file_kind kind)
{
    struct dr_file *f = *table_slot(like->fs, like->id);
    while (f && (f->part || f->fs != like->fs || !dr_same_id(f->id, like->id) || f->kind != kind ||
                 f->decoding != like->decoding))
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
    DR_LOCK_SCOPE(&table_lock);
    struct dr_file **p = table_slot(f->fs, f->id);
    while (*p != f)
        p = &(*p)->next;
    *p = f->next;
}

/* The pinned object that has fresh's place in the table, or NULL: then fresh has taken the place.
 */
static struct dr_file *table_enter(struct dr_file *fresh)
{
    DR_LOCK_SCOPE(&table_lock);
    /* Parts of one file are different bytes; the file below sees to it who may have which. */
    struct dr_file *present = fresh->part ? NULL : table_find(fresh, fresh->kind);
    if (present)
        dr_file_pin(present);
    else
        table_add(fresh);
    return present;
}

/* ------------------------------------------------------------------ sharing */

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

/* Read the size again after locking: the previous holder of the lock may have appended. */
static int settle_size(struct dr_file *f, struct dr_error *err)
{
    return f->block_device ? 0 : dr_file_refresh_size(f, err);
}

/* The descriptor becomes one for writing; the flags say so only once it is. */
static int raise_to_writer(struct dr_file *f, struct dr_error *err)
{
    unsigned old = f->flags;
    int r = 0;
    f->flags = (old & ~(unsigned)DR_FILE_FORCE_SHARE) | DR_FILE_RDWR; /* for upgrade to see */
    if (f->ops->upgrade)
        r = f->ops->upgrade(f, err);
    if (r == 0 && (r = settle_size(f, err)) < 0 && f->ops->downgrade)
        f->ops->downgrade(f, NULL);
    if (r < 0)
        f->flags = old;
    return r;
}

/* ------------------------------------------------------------------ claims */

static bool overlaps(const struct dr_claim *a, const struct dr_claim *b)
{
    return a->from < b->to && b->from < a->to;
}

static bool has_writing_claim(const struct dr_file *f)
{
    const struct dr_claim *c = f->claims;
    while (c && !c->writes)
        c = c->next;
    return c;
}

static int busy_part(const struct dr_file *f, const struct dr_claim *mine,
                     const struct dr_claim *other, struct dr_error *err)
{
    return dr_fail(err, EBUSY,
                   "%s: Failed to get \"write\" lock: the part of it from byte %llu on and the one "
                   "from byte %llu on overlap",
                   f->path, (unsigned long long)mine->from, (unsigned long long)other->from);
}

/* May the part be used like that beside the exclusive users that there are? It may be one of them.
 */
static int check_claim(const struct dr_file *f, const struct dr_claim *mine, bool writes,
                       struct dr_error *err)
{
    bool whole = f->users > f->n_claims; /* users without a claim use all of it */
    if (whole && (writes || (f->flags & DR_FILE_RDWR)))
        return busy(f, writes ? "\"write\"" : "shared \"write\"", err);
    for (const struct dr_claim *c = f->claims; c; c = c->next)
        if (c != mine && overlaps(c, mine) && (writes || c->writes))
            return busy_part(f, mine, c, err);
    return 0;
}

static void add_claim(struct dr_file *f, struct dr_claim *claim, bool writes)
{
    claim->writes = writes;
    claim->next = f->claims;
    f->claims = claim;
    f->n_claims++;
}

static void remove_claim(struct dr_file *f, struct dr_claim *claim)
{
    struct dr_claim **at = &f->claims;
    while (*at != claim)
        at = &(*at)->next;
    *at = claim->next;
    f->n_claims--;
}

/* One more user without a lock. Readers and writers mix here, and a writer of another object may
 * have made the file longer. */
static int join_unlocked(struct dr_file *f, unsigned flags, struct dr_error *err)
{
    unsigned kept = ~(unsigned)(DR_FILE_NO_FLUSH | DR_FILE_DIRECT) | flags;
    int r = 0;
    if ((flags & DR_FILE_RDWR) && !(f->flags & DR_FILE_RDWR))
        r = raise_to_writer(f, err);
    f->flags &= kept; /* every user must want these */
    return r;
}

/* A part becomes a user beside others. */
static int join_exclusive_part(struct dr_file *f, unsigned flags, const struct dr_claim *claim,
                               struct dr_error *err)
{
    unsigned kept = ~(unsigned)(DR_FILE_NO_FLUSH | DR_FILE_DIRECT) | flags;
    int r = check_claim(f, claim, flags & DR_FILE_RDWR, err);
    if (r == 0 && (flags & DR_FILE_RDWR) && !(f->flags & DR_FILE_RDWR))
        r = raise_to_writer(f, err);
    if (r == 0)
        f->flags &= kept; /* every user must want these */
    return r;
}

/* One more user of f, whose state is locked. */
static int join(struct dr_file *f, unsigned flags, const struct dr_claim *claim,
                struct dr_error *err)
{
    if (f->kind == DR_FILE_EXCLUSIVE && claim) {
        int r = join_exclusive_part(f, flags, claim, err);
        return r < 0 ? r : dr_file_see_growth(f, err);
    }
    if (f->kind == DR_FILE_EXCLUSIVE) {
        if (flags & DR_FILE_RDWR)
            return busy(f, "\"write\"", err);
        return f->flags & DR_FILE_RDWR ? busy(f, "shared \"write\"", err) : 0;
    }
    int r = f->kind == DR_FILE_UNLOCKED ? join_unlocked(f, flags, err) : 0;
    return r < 0 ? r : dr_file_see_growth(f, err);
}

/* ------------------------------------------------------------------ open and close */

void dr_file_pin(struct dr_file *f)
{
    atomic_fetch_add(&f->pins, 1);
}

void dr_file_unpin(struct dr_file *f)
{
    if (atomic_fetch_sub(&f->pins, 1) > 1)
        return;
    pthread_mutex_destroy(&f->flush_lock);
    pthread_mutex_destroy(&f->state_lock);
    pthread_mutex_destroy(&f->range_lock);
    pthread_cond_destroy(&f->range_free);
    f->ops->close(f);
}

/* The last user has left, or the first could not stay. The lock bytes go while the object is still
 * in the table: an open of the same file waits for the state lock instead of testing against them.
 * The state lock is held. */
static void retire(struct dr_file *f)
{
    f->gone = true;
    if (f->ops->lock && !(f->flags & DR_FILE_NO_LOCK))
        f->ops->lock(f, 0, 0, NULL);
    table_remove(f);
}

static void init_object(struct dr_file *f, unsigned flags)
{
    pthread_mutex_init(&f->flush_lock, NULL);
    pthread_mutex_init(&f->state_lock, NULL);
    pthread_mutex_init(&f->range_lock, NULL);
    pthread_cond_init(&f->range_free, NULL);
    f->kind = kind_of(flags);
    f->pins = 1; /* of all users together */
    f->users = 1;
}

/* fresh, whose state is locked, is in the table: take its locks. */
static int settle_fresh(struct dr_file *fresh, unsigned flags, struct dr_claim *claim,
                        struct dr_error *err)
{
    int r = take_locks(fresh, flags, err);
    if (r == 0)
        r = settle_size(fresh, err);
    if (r < 0)
        retire(fresh);
    else if (claim)
        add_claim(fresh, claim, flags & DR_FILE_RDWR);
    return r;
}

/* Become a user of present, which is pinned; *gone: its last user left meanwhile, or became another
 * kind of user. */
static int settle_present(struct dr_file *present, unsigned flags, struct dr_claim *claim,
                          bool *gone, struct dr_error *err)
{
    DR_LOCK_SCOPE(&present->state_lock);
    *gone = present->gone || present->kind != kind_of(flags);
    int r = *gone ? 0 : join(present, flags, claim, err);
    if (r < 0 || *gone)
        return r;
    atomic_fetch_add(&present->users, 1);
    if (claim)
        add_claim(present, claim, flags & DR_FILE_RDWR);
    return 0;
}

/* fresh is used up: it becomes the object of the table, or is closed. */
static int settle(struct dr_file *fresh, unsigned flags, struct dr_claim *claim,
                  struct dr_file **file, struct dr_error *err)
{
    struct dr_file *present;
    bool gone = true;
    int r = 0;
    init_object(fresh, flags);
    pthread_mutex_lock(&fresh->state_lock);
    while (gone && (present = table_enter(fresh))) {
        r = settle_present(present, flags, claim, &gone, err);
        dr_file_unpin(present);
    }
    if (gone)
        r = settle_fresh(fresh, flags, claim, err);
    pthread_mutex_unlock(&fresh->state_lock);
    if (r < 0 || !gone)
        dr_file_unpin(fresh);
    *file = gone ? fresh : present;
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

/* Does path still lead to f? Yes, too, if that cannot be told. */
static bool name_leads_to(struct dr_fs *fs, const char *path, const struct dr_file *f)
{
    struct dr_file_id id;
    int r = fs->ops->identify(fs, path, &id, NULL);
    if (r)
        return r != -ENOENT;
    return dr_same_id(id, f->id);
}

/* An open: of all of the file, or of what the claim says. */
struct wanted {
    struct dr_fs *fs;
    const char *path;
    unsigned flags;
    struct dr_claim *claim; /* NULL = all */
};

static void leave(struct dr_file *f, struct dr_claim *claim)
{
    if (claim)
        dr_file_unclaim(f, claim);
    else
        dr_file_unref(f);
}

/* Opened and locked; *stale: but the name went over to another file before the lock was ours. */
static int open_once(const struct wanted *w, bool made, bool *stale, struct dr_file **file,
                     struct dr_error *err)
{
    struct dr_fs *fs = w->fs;
    const char *path = w->path;
    unsigned flags = w->flags;
    struct dr_file *f = NULL;
    int r = fs->ops->open(fs, path, flags, &f, err);
    if (r)
        return r;
    unsigned lasting =
        flags & ~(unsigned)(DR_FILE_CREATE | DR_FILE_TRUNCATE | DR_FILE_PRIVATE | DR_FILE_NOCOW);
    f->flags = lasting;
    if (made)
        f->dirty = true; /* the inode itself is not durable yet */
    r = settle(f, lasting, w->claim, file, err);
    if (r && made)
        fs->ops->unlink(fs, path, NULL);
    *stale = !r && !(flags & DR_FILE_NO_LOCK) && !name_leads_to(fs, path, *file);
    if (*stale)
        leave(*file, w->claim);
    return r;
}

/* The replacer of a file keeps the old file's lock until the rename. An open that had got hold of
 * the old file meanwhile would then lock an inode without a name, so after locking we check that
 * the name still leads to our file, and retry. */
static int open_settled(const struct wanted *w, struct dr_file **file, struct dr_error *err)
{
    bool made = (w->flags & DR_FILE_CREATE) && !(w->flags & DR_FILE_TRUNCATE);
    for (int i = 0; i < OPEN_TRIES; i++) {
        bool stale = false;
        int r = open_once(w, made, &stale, file, err);
        if (r || !stale)
            return r;
        if (made)
            return dr_fail(err, ESTALE, "%s: was taken away while it was made", w->path);
    }
    return dr_fail(err, EBUSY, "%s: is being replaced all the time", w->path);
}

int dr_file_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                 struct dr_error *err)
{
    struct dr_file *f = NULL;
    *file = NULL;
    int r = check_flags(path, &flags, err);
    if (!r)
        r = open_settled(&(struct wanted){fs, path, flags, NULL}, &f, err);
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

int dr_file_open_claim(struct dr_fs *fs, const char *path, unsigned flags, struct dr_claim *claim,
                       struct dr_file **file, struct dr_error *err)
{
    *file = NULL;
    int r = check_flags(path, &flags, err);
    return r < 0 ? r : open_settled(&(struct wanted){fs, path, flags, claim}, file, err);
}

int dr_file_adopt(struct dr_file *fresh, unsigned flags, struct dr_file **file,
                  struct dr_error *err)
{
    *file = NULL;
    fresh->flags = flags;
    int r = settle(fresh, flags, NULL, &fresh, err);
    if (!r)
        *file = fresh;
    return r;
}

int dr_file_open_nameless(struct dr_fs *fs, const char *dir, unsigned flags, struct dr_file **file,
                          struct dr_error *err)
{
    struct dr_file *fresh;
    *file = NULL;
    int r = fs->ops->open_nameless ? fs->ops->open_nameless(fs, dir, flags, &fresh, err) : -ENOTSUP;
    return r < 0 ? r : dr_file_adopt(fresh, flags | DR_FILE_RDWR, file, err);
}

struct dr_file *dr_file_ref(struct dr_file *f)
{
    atomic_fetch_add(&f->users, 1);
    return f;
}

/* One user of several leaves: nothing else changes. False if there is only one. */
static bool leave_others(struct dr_file *f)
{
    unsigned users = f->users;
    while (users > 1)
        if (atomic_compare_exchange_weak(&f->users, &users, users - 1))
            return true;
    return false;
}

/* The state is locked. True: it was the last user, and the object is to be unpinned. */
static bool leave_locked(struct dr_file *f)
{
    bool last = atomic_fetch_sub(&f->users, 1) == 1; /* somebody may have joined meanwhile */
    if (last)
        retire(f);
    return last;
}

void dr_file_unref(struct dr_file *f)
{
    if (!f || leave_others(f))
        return;
    pthread_mutex_lock(&f->state_lock);
    bool last = leave_locked(f);
    pthread_mutex_unlock(&f->state_lock);
    if (last)
        dr_file_unpin(f);
}

/* ------------------------------------------------------------------ reader to writer and back */

/* A reader that shares becomes an exclusive user, if there is none. */
static int become_exclusive(struct dr_file *f, struct dr_error *err)
{
    DR_LOCK_SCOPE(&table_lock);
    if (table_find(f, DR_FILE_EXCLUSIVE))
        return busy(f, "\"write\"", err);
    f->kind = DR_FILE_EXCLUSIVE;
    return 0;
}

static void share_again(struct dr_file *f)
{
    DR_LOCK_SCOPE(&table_lock);
    f->kind = DR_FILE_SHARING;
}

/* The state is locked. */
static int upgrade_locked(struct dr_file *f, struct dr_error *err)
{
    bool shared = f->kind == DR_FILE_SHARING;
    int r = 0;
    if (f->flags & DR_FILE_RDWR)
        return 0;
    if (shared)
        r = become_exclusive(f, err);
    if (r == 0)
        r = raise_to_writer(f, err);
    if (r < 0 && shared && f->kind == DR_FILE_EXCLUSIVE)
        share_again(f);
    return r;
}

int dr_file_upgrade(struct dr_file *f, struct dr_error *err)
{
    DR_LOCK_SCOPE(&f->state_lock);
    if (!(f->flags & DR_FILE_RDWR) && f->kind != DR_FILE_UNLOCKED && f->users > 1)
        return busy(f, "\"write\"", err);
    return upgrade_locked(f, err);
}

static int downgrade_locked(struct dr_file *f, struct dr_error *err)
{
    int r = 0;
    f->flags &= ~(unsigned)DR_FILE_RDWR;
    if (f->ops->downgrade)
        r = f->ops->downgrade(f, err);
    if (r < 0)
        f->flags |= DR_FILE_RDWR;
    return r;
}

/* Users without locks mix: while there are others, one of them may write. */
int dr_file_downgrade(struct dr_file *f, struct dr_error *err)
{
    DR_LOCK_SCOPE(&f->state_lock);
    if (!(f->flags & DR_FILE_RDWR) || (f->kind == DR_FILE_UNLOCKED && f->users > 1))
        return 0;
    return downgrade_locked(f, err);
}

/* ------------------------------------------------------------------ users with claims */

int dr_file_upgrade_claim(struct dr_file *f, struct dr_claim *claim, struct dr_error *err)
{
    DR_LOCK_SCOPE(&f->state_lock);
    int r = 0;
    if (claim->writes)
        return 0;
    if (f->kind == DR_FILE_SHARING && f->users > 1)
        return busy(f, "\"write\"", err);
    if (f->kind == DR_FILE_EXCLUSIVE)
        r = check_claim(f, claim, true, err);
    if (r == 0)
        r = upgrade_locked(f, err);
    claim->writes = r == 0;
    return r;
}

/* The claim writes no more: so does the file, if it was the last one that did. */
static int settle_readers(struct dr_file *f, struct dr_error *err)
{
    bool others = has_writing_claim(f) || f->users > f->n_claims;
    return others || !(f->flags & DR_FILE_RDWR) ? 0 : downgrade_locked(f, err);
}

int dr_file_downgrade_claim(struct dr_file *f, struct dr_claim *claim, struct dr_error *err)
{
    DR_LOCK_SCOPE(&f->state_lock);
    if (!claim->writes)
        return 0;
    claim->writes = false;
    int r = settle_readers(f, err);
    claim->writes = r < 0;
    return r;
}

void dr_file_unclaim(struct dr_file *f, struct dr_claim *claim)
{
    pthread_mutex_lock(&f->state_lock);
    remove_claim(f, claim);
    bool last = leave_locked(f);
    if (!last && claim->writes)
        settle_readers(f, NULL); /* or it stays a writer to others until all have left */
    pthread_mutex_unlock(&f->state_lock);
    if (last)
        dr_file_unpin(f);
}
