/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Shared by the parts of the operating system's storage: posix.c (bytes), posix-lock.c (lock
 * bytes), posix-window.c (which files have a descriptor), posix-fs.c (names). */
#ifndef DR_STORAGE_POSIX_H
#define DR_STORAGE_POSIX_H

#include <sys/stat.h>

#include "base/stripe.h"
#include "storage/storage.h"

struct window_list;

struct posix_link {
    struct posix_link *prev, *next;
};

/* In the place of a descriptor's number. */
enum posix_no_fd {
    POSIX_SHUT = -1, /* opened again when somebody needs it */
    POSIX_BUSY = -2, /* a thread is opening or shutting it */
};

struct posix_file {
    struct dr_file base;
    /* The descriptor, or enum posix_no_fd. Used between posix_begin() and posix_end(), where it
     * stays the same number. */
    _Atomic int fd;
    int cached;             /* a writer with O_DIRECT: the same file without it, else -1 */
    _Atomic bool direct;    /* fd has O_DIRECT */
    unsigned use, unshared; /* lock bytes held; under the file's state_lock */
    uint32_t sector;        /* block device: its logical block */
    uint32_t block;         /* regular file: the file system's block */
    /* Calls that the file system refused; they are not tried again. */
    _Atomic bool no_punch, no_zero_range, no_allocate, no_seek, no_dsync;
    /* Copies into this file: never possible, or not from files of that device. */
    _Atomic bool no_clone, no_copy;
    _Atomic uint64_t no_clone_from, no_copy_from; /* dr_file_id.dev + 1; 0 = none */
    _Atomic bool inode_dirty;      /* owner, mode or labels were set: fdatasync is not enough */
    _Atomic bool random;           /* read nothing ahead */
    _Atomic signed char in_pieces; /* large writes go in pieces: 1 yes, -1 no, 0 not known yet */

    /* owned by posix-window.c */
    bool by_name;        /* base.path leads to it, so it can be opened again; constant */
    _Atomic bool recent; /* used since somebody last looked for a descriptor to shut */
    struct window_list
        *list; /* of the files that may be shut; NULL = it may not. Under window_lock */
    struct posix_link link;
    char *home;    /* the absolute name to open it by; NULL = base.path. Of who made it busy */
    void *mapping; /* keeps the first description, which has the lock bytes; or NULL */
    struct dr_stripe users[DR_STRIPES]; /* between posix_begin() and posix_end() */
};

static inline struct posix_file *posix_file(struct dr_file *f)
{
    return (struct posix_file *)f;
}

extern const struct dr_file_ops posix_file_ops;

/* ------------------------------------------------------------------ the window (posix-window.c) */

struct posix_use {
    struct posix_file *p;
    unsigned stripe;
    int fd; /* or -errno: it was shut and cannot be opened again; -ESTALE: the name leads elsewhere
             */
};

int posix_window_open(struct posix_file *p);

/* Nobody shuts the descriptor before posix_end(). */
static inline struct posix_use posix_begin(struct posix_file *p)
{
    struct posix_use use = {.p = p, .stripe = dr_stripe_of_thread()};
    /* Count first, then look: who shuts it takes the number away first, then looks at the counts.
     */
    atomic_fetch_add(&p->users[use.stripe].n, 1);
    use.fd = atomic_load(&p->fd);
    if (use.fd < 0)
        use.fd = posix_window_open(p);
    else if (!atomic_load_explicit(&p->recent, memory_order_relaxed))
        atomic_store_explicit(&p->recent, true, memory_order_relaxed);
    return use;
}

static inline void posix_end(struct posix_use *use)
{
    atomic_fetch_sub(&use->p->users[use->stripe].n, 1);
}

/* struct posix_use name, until the end of the scope. */
#define POSIX_USE(name, p) \
    __attribute__((cleanup(posix_end), unused)) struct posix_use name = posix_begin(p)

/* From now on an open file may be shut, unless it is of a kind that never is. */
void posix_window_enter(struct posix_file *p);
/* From now on it stays as it is, open or shut. */
void posix_window_leave(struct posix_file *p);
/* Shut a descriptor, after EMFILE. False: there is none that could be shut. */
bool posix_window_make_room(void);
/* path is about to lead nowhere or elsewhere: whoever has that file open in this process gets its
 * descriptor back and keeps it. */
int posix_window_keep(const char *path, struct dr_error *err);
/* Give up the mapping, and with it the lock bytes of the first description. The caller is the only
 * one who opens, shuts or locks the file. */
void posix_unmap(struct posix_file *p);
const char *posix_reason(struct dr_file *f, int r);

/* ------------------------------------------------------------------ */

/* Two nodes for one block device are one device; its number stands in for the inode. */
struct dr_file_id posix_id(const struct stat *st);

/* Regular file or block device; others fail with the reason. */
int posix_check_type(const char *path, const struct stat *st, struct dr_error *err);

/* Open path or the file behind a /proc link, with O_DIRECT if *direct and the file system takes it;
 * *direct says so. The descriptor or -errno. */
int posix_open_fd(const char *path, int how, mode_t mode, bool *direct);
/* A file that is written with O_DIRECT gets p->cached; if there cannot be one it is no longer
 * direct.
 */
void posix_open_cached(struct posix_file *p);
/* Stop using O_DIRECT. */
void posix_give_up_direct(struct posix_file *p, int fd);

int posix_lock(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err);
int posix_upgrade(struct dr_file *f, struct dr_error *err);
int posix_downgrade(struct dr_file *f, struct dr_error *err);

#endif
