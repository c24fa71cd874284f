/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Storage: bytes in a container. A dr_fs opens, names and removes files; a dr_file reads and
 * writes one. Knows nothing of disk-image formats.
 *
 * Thread safety: everything on an open dr_file may be called from many threads. The user count and
 * the process-wide table are protected inside. No lock that two files share is held over a system
 * call: a file that answers slowly makes only its own users wait.
 * Errors: 0 or -errno, text in err; every text names the file and, where there is one, the offset.
 */
#ifndef DR_STORAGE_STORAGE_H
#define DR_STORAGE_STORAGE_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "drover/drover.h"

struct dr_busy_range;
struct dr_dir_lock;
struct dr_file;
struct dr_fs;

/* Which object a path leads to: two names or files with equal ids are the same object, also when
 * they come from different file systems. */
struct dr_file_id {
    const void *owner; /* whose numbers these are: the file system in memory, say. NULL = the
                        * operating system's */
    uint64_t dev, ino;
    uint64_t from, to; /* of a part (part.h): its bytes, UINT64_MAX = to the end. 0, 0: all of it */
};

static inline bool dr_same_id(struct dr_file_id a, struct dr_file_id b)
{
    return a.owner == b.owner && a.dev == b.dev && a.ino == b.ino && a.from == b.from &&
           a.to == b.to;
}

/* Do they have bytes in common? Two parts of one file that do not overlap have none. */
static inline bool dr_ids_overlap(struct dr_file_id a, struct dr_file_id b)
{
    return a.owner == b.owner && a.dev == b.dev && a.ino == b.ino && a.from <= b.to - 1 &&
           b.from <= a.to - 1; /* 0 - 1: the end of a whole file is as far as can be */
}

/* ------------------------------------------------------------------ locks */

/* A user of a file says what it does itself (use) and what others must not do meanwhile (unshared),
 * in QEMU's permissions: bit i is lock byte 100+i for use, 200+i for unshared. */
enum dr_perm {
    DR_PERM_READ = 1 << 0, /* consistent read */
    DR_PERM_WRITE = 1 << 1,
    DR_PERM_WRITE_UNCHANGED = 1 << 2,
    DR_PERM_RESIZE = 1 << 3,
    DR_PERM_ALL = 15,
};

/* ------------------------------------------------------------------ open flags */

enum dr_file_flag {
    DR_FILE_RDWR = 1 << 0,   /* excludes every other writer and every reader that does not share */
    DR_FILE_CREATE = 1 << 1, /* make it, -EEXIST if something has the name; implies RDWR */
    DR_FILE_FORCE_SHARE = 1 << 2, /* read although somebody writes */
    DR_FILE_NO_LOCK = 1 << 3,     /* no lock bytes at all, not even between users in this process */
    DR_FILE_NO_FLUSH = 1 << 4,    /* dr_file_flush does nothing (cache=unsafe) */
    DR_FILE_DIRECT = 1 << 5,      /* past the host's page cache (O_DIRECT); where the container
                                     refuses: drop from the page cache after use */
    DR_FILE_TRUNCATE = 1 << 6,    /* with RDWR: cut to 0 after the lock is taken; with CREATE: take
                                     over an existing regular file (or block device, which is not
                                     cut) instead of -EEXIST */
    DR_FILE_PRIVATE = 1 << 7,     /* with CREATE: nobody but the owner may open it */
    DR_FILE_NOCOW = 1 << 8,       /* with CREATE: without copy-on-write of the file system, if that
                                     has one that can be turned off (Btrfs) */
};

/* Three kinds of users, which never share an object: see dr_file_open(). */
enum dr_file_kind {
    DR_FILE_EXCLUSIVE, /* locked: one writer, or readers that tolerate no writer */
    DR_FILE_SHARING,   /* readers by FORCE_SHARE */
    DR_FILE_UNLOCKED,  /* readers and writers by NO_LOCK */
};

/* ------------------------------------------------------------------ files */

/* The two kinds of bytes in a container. */
enum dr_file_extent {
    DR_FILE_DATA,
    DR_FILE_HOLE, /* reads as zeros and takes no space */
};

enum dr_file_zero_flag {
    DR_FILE_ZERO_PUNCH = 1 << 0,    /* give the space back if the container can */
    DR_FILE_ZERO_FAST = 1 << 1,     /* -ENOTSUP rather than writing zeros byte by byte */
    DR_FILE_ZERO_ALLOCATE = 1 << 2, /* all of the range takes its space now, so that no later write
                                       there lacks it; written where it cannot be reserved */
    DR_FILE_ZERO_WRITE = 1 << 3,    /* the zeros are written even where the container has a shorter
                                       way */
};

/* What tells one state of a file from another. Fields that the container does not know are 0. */
struct dr_file_stamp {
    uint64_t size;
    uint64_t mtime, ctime; /* nanoseconds since 1970: of the bytes, of anything */
    uint64_t ino;
};

struct dr_file_ops {
    const char *name;
    void (*close)(struct dr_file *f);
    /* Up to len bytes at off; the number read, short only at the end of the file; or -errno. */
    ssize_t (*pread)(struct dr_file *f, void *buf, uint64_t off, size_t len);
    /* All of iov at off, growing the file; 0 or -errno. On failure any part may have been written,
     * each 512-byte sector old or new. May modify iov. */
    int (*pwritev)(struct dr_file *f, struct iovec *iov, int n, uint64_t off);
    /* As pwritev, and durable, by itself and alone: 0. 1 = written, but a flush is still needed.
     * Optional. */
    int (*pwritev_durable)(struct dr_file *f, struct iovec *iov, int n, uint64_t off);
    int (*extent)(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                  uint64_t *run); /* optional: absent = all DATA */
    /* Zeros in [off, off+len), growing the file if it ends inside; -ENOTSUP: the wrapper writes
     * zeros. flags: PUNCH, FAST, ALLOCATE. */
    int (*zero)(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags);
    int (*truncate)(struct dr_file *f, uint64_t size);
    int (*flush)(struct dr_file *f);
    /* The container's size now. Optional: absent = the size never changes by itself. */
    int (*get_size)(struct dr_file *f, uint64_t *size);
    /* Copy without passing through this process: reflink or copy_file_range. The number of bytes
     * copied (> 0), or -ENOTSUP/-EXDEV/-EINVAL: use read and write. src has the same ops. Optional.
     */
    ssize_t (*copy)(struct dr_file *dst, uint64_t dst_off, struct dr_file *src, uint64_t src_off,
                    uint64_t len);
    /* Re-open for writing behind the same object, exchanging locks as docs/formats/protocols say.
     */
    int (*upgrade)(struct dr_file *f, struct dr_error *err);
    int (*downgrade)(struct dr_file *f, struct dr_error *err); /* back to a reader's locks */
    /* Hold exactly these, whatever was held before; on failure what was held stays. 0, 0 = nothing,
     * cannot fail. All three optional: absent = nobody outside this process can open the file. */
    int (*lock)(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err);
    /* Small reads at scattered places come next (random) / no longer: read nothing ahead. Advice;
     * optional. */
    void (*advise)(struct dr_file *f, bool random);
    /* When the bytes were last changed, in nanoseconds since 1970; 0 = not known. Optional. */
    uint64_t (*mtime)(struct dr_file *f);
    /* See dr_file_stamp. Optional: absent = only the size is known. */
    int (*stamp)(struct dr_file *f, bool settle, struct dr_file_stamp *stamp);
    /* Bytes of space it takes, or -errno. Optional: absent = the data that extent tells of. */
    int (*usage)(struct dr_file *f, uint64_t *bytes);
    /* Why r, which an operation of f returned, means that the container could not be reached and
     * nothing has happened, and what to do about it; or NULL: it means what the errno says.
     * Optional. */
    const char *(*reason)(struct dr_file *f, int r);
};

/* What a part uses of the file that it is of. */
struct dr_claim {
    uint64_t from, to; /* to = UINT64_MAX: all that is behind from, also what is not there yet */
    bool writes;
    struct dr_claim *next;
};

/* Is the object a part of another file? */
enum dr_file_part {
    DR_PART_NONE,
    DR_PART_OF_SIZE,
    DR_PART_TO_END, /* of the file, as that was when the part was opened */
};

/* Base of every implementation's own struct (first member). open fills in all up to size; path is
 * malloc'ed and freed by close. */
struct dr_file {
    const struct dr_file_ops *ops;
    struct dr_fs *fs;
    struct dr_file_id id;
    char *path;             /* as opened; for messages and for naming things next to it */
    _Atomic unsigned flags; /* enum dr_file_flag of the present state */
    unsigned atomic_size;   /* bytes written all or nothing, by themselves aligned: 512; less in a
                               part that begins off a sector */
    /* Alignment that the operations need, in bytes, powers of two up to 64 KiB; 0 or 1 = anything.
     * Offsets and lengths of pread are multiples of read_align, those of pwritev and zero of
     * write_align, and all buffers lie at multiples of mem_align (up to 4096). One exception: a
     * write or zero may have any length if it reaches the end of the file. The wrappers see to all
     * this (aligned.c), so callers need not; they are faster where they do. Set by open, constant.
     */
    unsigned read_align, write_align, mem_align;
    /* How many requests are worth having under way at once, where the way to the bytes is long;
     * 0 = local files: a request for each processor is enough. */
    unsigned depth;
    struct dr_file
        *under; /* the file whose bytes are decoded here; NULL: these are the file's own */
    /* A part of another file (part.h): its bytes stand in under, from under_at on. */
    enum dr_file_part part;
    uint64_t under_at;
    struct dr_claim claim; /* of a part, on under */
    /* How it decodes under, where that can be done in several ways that give different bytes of a
     * damaged file. Opens of one file share an object only where this is equal. 0 = plain bytes. */
    unsigned decoding;
    bool block_device;       /* or like one: it has the room that it has */
    bool encrypted;          /* what is read here stands in under, but not as it is (encrypted.h) */
    _Atomic uint64_t size;   /* bytes; kept by the wrappers */
    _Atomic bool dirty;      /* written since the last successful flush began */
    _Atomic int flush_error; /* sticky: negative errno of the first failed flush */
    _Atomic bool unlinked;   /* by its image, which has become smaller and does without it */
    /* owned by file.c */
    enum dr_file_kind kind;
    _Atomic unsigned users;  /* those who opened it, and their dr_file_ref()s */
    _Atomic unsigned pins;   /* what keeps the object: all users together, and dr_file_pin()s */
    bool gone;               /* without users, and not to be used again; under state_lock */
    struct dr_claim *claims; /* of the users that are parts; under state_lock */
    unsigned n_claims;
    struct dr_file *next;
    pthread_mutex_t
        state_lock; /* serialises opening, closing and changes between reader and writer */
    pthread_mutex_t range_lock; /* of busy: ranges being written, where write_align is set */
    pthread_cond_t range_free;
    struct dr_busy_range *busy;
    pthread_mutex_t flush_lock; /* a second flush waits for the first */
};

/* Open path and become a user of the file. Users of one file in this process are checked against
 * each other as users in other processes are: a writer excludes other writers and every reader that
 * does not share (-EBUSY; the message has the words: Failed to get "write" lock / Failed to get
 * shared "write" lock). One file (by file system and id) opened again by the same kind of user is
 * the same object; exclusive users, FORCE_SHARE readers and NO_LOCK users have an object each, so
 * use dr_file_same() to compare files. Lock bytes are held exactly as long as users need them.
 * Directories, FIFOs and sockets are refused (-EISDIR/-EINVAL) without blocking.
 * An open waits for system calls on the same file only.
 *
 * A regular file of the operating system that is only read may be without a descriptor while nobody
 * needs it, so that a process can have more files open than descriptors (posix-window.c). Its locks
 * stay. It gets its descriptor back by the absolute name that it had when it lost it, whichever
 * directory the process is in by then. If somebody else has renamed, removed or replaced it
 * meanwhile, calls on it fail with -ESTALE, and with the errno of open(2) if it may no longer be
 * opened (another user, another root directory); both pass when the cause does. Renames and
 * removals by the dr_fs of the same process do no harm. */
int dr_file_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                 struct dr_error *err);
/* A new file in the directory dir, open for writing, that has no name and goes with its last user.
 * flags: NO_LOCK, NO_FLUSH, DIRECT. -ENOTSUP: there are none in this file system; err is as it was.
 */
int dr_file_open_nameless(struct dr_fs *fs, const char *dir, unsigned flags, struct dr_file **file,
                          struct dr_error *err);
/* The regular file or block device behind a descriptor that somebody else opened for reading, by a
 * descriptor of its own (the offset of fd stays where it is), without locks; name is for messages.
 * Fails for pipes and the like. */
int dr_file_open_fd(int fd, const char *name, struct dr_file **file, struct dr_error *err);
/* What fd leads to (a pipe, a socket, a file), to be written from front to back: each write and
 * dr_file_zero() begins where the last one ended, else it fails with -ESPIPE, and so does every
 * read. One thread at a time. fd stays the caller's and is not closed. A write that waits for a
 * reader ends with -ECANCELED when *stop (may be NULL) is not 0. */
int dr_file_open_pipe(int fd, const char *name, const volatile int *stop, struct dr_file **file,
                      struct dr_error *err);
/* A file that no dr_fs opened, such as bytes decoded from another one, gets its place in the
 * process-wide table and one user. fresh->id must be like nobody else's: fs NULL and the object's
 * own address will do. On failure it is closed. */
int dr_file_adopt(struct dr_file *fresh, unsigned flags, struct dr_file **file,
                  struct dr_error *err);
/* One more user of the caller's kind; the caller is one already. No lock is taken. */
struct dr_file *dr_file_ref(struct dr_file *f);
/* A user leaves. With the last one the lock bytes go. NULL allowed. */
void dr_file_unref(struct dr_file *f);
/* Keep the object valid without being a user: a caller that pins a file may finish calls on it
 * although its users leave, upgrade or downgrade it meanwhile. No lock is taken. */
void dr_file_pin(struct dr_file *f);
void dr_file_unpin(struct dr_file *f);
/* Do both stand for the same container? */
static inline bool dr_file_same(const struct dr_file *a, const struct dr_file *b)
{
    return a == b || (a && b && a->fs == b->fs && dr_same_id(a->id, b->id));
}

/* The one user of this object becomes a writer / a reader again (commit into a frozen parent).
 * Fails, changing nothing, if anybody else, in this process or another, uses the file unshared. A
 * FORCE_SHARE reader becomes an exclusive user by it and stays one. */
int dr_file_upgrade(struct dr_file *f, struct dr_error *err);
int dr_file_downgrade(struct dr_file *f, struct dr_error *err);

/* The same for parts, which use no more of the file than their claim says: users whose claims do
 * not overlap may all write. The file is locked against other processes as its strongest user
 * needs. claim stays the caller's and must live until dr_file_unclaim(), which is what a user with
 * a claim leaves by; claim->writes is set by open, upgrade and downgrade. */
int dr_file_open_claim(struct dr_fs *fs, const char *path, unsigned flags, struct dr_claim *claim,
                       struct dr_file **file, struct dr_error *err);
void dr_file_unclaim(struct dr_file *f, struct dr_claim *claim);
int dr_file_upgrade_claim(struct dr_file *f, struct dr_claim *claim, struct dr_error *err);
int dr_file_downgrade_claim(struct dr_file *f, struct dr_claim *claim, struct dr_error *err);

/* Exactly len bytes, or an error: -EIO with "ends at" when the file is shorter. */
int dr_file_pread(struct dr_file *f, void *buf, uint64_t off, size_t len, struct dr_error *err);
/* As far as the file goes, the rest of buf is zeroed; *got (may be NULL) = bytes that came from it.
 */
int dr_file_pread_short(struct dr_file *f, void *buf, uint64_t off, size_t len, size_t *got,
                        struct dr_error *err);
int dr_file_pwrite(struct dr_file *f, const void *buf, uint64_t off, size_t len,
                   struct dr_error *err);
/* n <= 1024. iov is used up. */
int dr_file_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off,
                    struct dr_error *err);
/* As dr_file_pwritev, and the bytes (not what was written before them) are durable on return, by
 * one system call where the container has one, else by a flush. A failure is sticky as that of a
 * flush, unless there was merely no space. With NO_FLUSH only written. */
int dr_file_pwritev_durable(struct dr_file *f, struct iovec *iov, int n, uint64_t off,
                            struct dr_error *err);
/* Zeros in [off, off+len); beyond the end of the file it grows, sparsely unless flags say
 * otherwise. After a failure it may have any part of them, and some of the space. */
int dr_file_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags,
                 struct dr_error *err);
/* The kind at off and for how long (0 < *run <= len). Past the end of the file: HOLE. */
int dr_file_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                   uint64_t *run, struct dr_error *err);
int dr_file_truncate(struct dr_file *f, uint64_t size, struct dr_error *err);
/* Durable, unless nothing was written since the last flush or NO_FLUSH. A failure is sticky. */
int dr_file_flush(struct dr_file *f, struct dr_error *err);
/* *copied > 0, or -ENOTSUP (silently, err untouched): read and write instead. */
int dr_file_copy(struct dr_file *dst, uint64_t dst_off, struct dr_file *src, uint64_t src_off,
                 uint64_t len, uint64_t *copied, struct dr_error *err);
/* Advice, which may come from any user of the file and is never wrong: random = read nothing ahead.
 */
void dr_file_advise(struct dr_file *f, bool random);
/* When the bytes were last changed, in nanoseconds since 1970; 0 = not known. */
uint64_t dr_file_mtime(struct dr_file *f);
/* The file's stamp now. settle: nobody writes meanwhile, and the stamp must still be that of the
 * file after a crash, and not any more after the next write of anybody: makes the file's times
 * durable, and waits until the clock that they come from has ticked (milliseconds; up to two
 * seconds where the file system keeps no finer times). */
int dr_file_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp,
                  struct dr_error *err);
/* Bytes of space it takes where it is kept. */
int dr_file_usage(struct dr_file *f, uint64_t *bytes, struct dr_error *err);
/* Re-read the size from the container (another process may have grown it). */
int dr_file_refresh_size(struct dr_file *f, struct dr_error *err);
/* The same, but never smaller: safe while other threads append. */
int dr_file_see_growth(struct dr_file *f, struct dr_error *err);

static inline uint64_t dr_file_size(const struct dr_file *f)
{
    return atomic_load(&f->size);
}

/* ------------------------------------------------------------------ file systems */

enum dr_name_kind { DR_NAME_FILE, DR_NAME_LINK, DR_NAME_DIR, DR_NAME_OTHER };

struct dr_fs_ops {
    int (*open)(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                struct dr_error *err); /* no table, no sharing: file.c adds them */
    /* A new file, open for writing, in the directory dir, that never has a name. -ENOTSUP: there
     * are none here. Optional. */
    int (*open_nameless)(struct dr_fs *fs, const char *dir, unsigned flags, struct dr_file **file,
                         struct dr_error *err);
    int (*identify)(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                    struct dr_error *err);
    int (*rename)(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err);
    /* As rename, but -EEXIST if something has the name. */
    int (*rename_new)(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err);
    int (*unlink)(struct dr_fs *fs, const char *path, struct dr_error *err);
    /* Make the names in the directory that holds path durable. */
    int (*sync_dir)(struct dr_fs *fs, const char *path, struct dr_error *err);
    /* Names (not paths) in dir, any order, without . and ..; stops when each() returns non-zero and
     * returns that. */
    int (*list)(struct dr_fs *fs, const char *dir, int (*each)(void *user, const char *name),
                void *user, struct dr_error *err);
    /* Owner, group, mode, ACL and security labels of from onto to; what the caller may not set is
     * left, the mode never gets wider than from's. */
    int (*copy_attrs)(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                      struct dr_error *err);
    /* Bytes that may still be written in the file system that holds the file at path or, while
     * there is none, its directory. */
    int (*free_space)(struct dr_fs *fs, const char *path, uint64_t *bytes, struct dr_error *err);
    /* Absolute, without links, "." and "..". *out is malloc'ed. */
    int (*realpath)(struct dr_fs *fs, const char *path, char **out, struct dr_error *err);
    /* The same of an open file of this file system, whatever name led to it: between a look at a
     * name and its opening somebody may turn a link. Optional: absent or -ENOTSUP = not known. */
    int (*where)(struct dr_fs *fs, struct dr_file *f, char **out, struct dr_error *err);
    /* What stands at path itself; a link is not followed. Optional: absent = there are only files,
     * as identify says. Use dr_look(). */
    int (*look)(struct dr_fs *fs, const char *path, enum dr_name_kind *kind, struct dr_file_id *id,
                struct dr_error *err);
    /* A new directory with these rights, less the process's umask (-EEXIST if the name is taken) /
     * an empty one goes away. New images are made under their final names in a directory of 0700
     * and then moved. Optional: absent = directories exist by being named. */
    int (*mkdir)(struct dr_fs *fs, const char *path, unsigned mode, struct dr_error *err);
    int (*rmdir)(struct dr_fs *fs, const char *path, struct dr_error *err);
    /* Lock a directory / give the lock back: see dr_dir_lock(). Optional, both or none. */
    int (*lock_dir)(struct dr_fs *fs, const char *path, struct dr_dir_lock **held,
                    struct dr_error *err);
    void (*unlock_dir)(struct dr_dir_lock *held);
    /* The file at path, which nobody has open, becomes a block device of its present size and
     * content. Only file systems made for tests have it. */
    int (*make_device)(struct dr_fs *fs, const char *path, struct dr_error *err);
};

struct dr_fs {
    const struct dr_fs_ops *ops;
};

/* Does the name lead to anything? Not a link that leads nowhere. */
static inline bool dr_fs_exists(struct dr_fs *fs, const char *path)
{
    struct dr_file_id id;
    return fs->ops->identify(fs, path, &id, NULL) == 0;
}

/* Where the file is that f's bytes come from; see dr_fs_ops.where. */
static inline int dr_file_where(struct dr_fs *fs, struct dr_file *f, char **out,
                                struct dr_error *err)
{
    while (f->under)
        f = f->under;
    return fs->ops->where ? fs->ops->where(fs, f, out, err) : -ENOTSUP;
}

/* Where the bytes of a part stand: in which file, and *off becomes the offset there. A file that is
 * no part is itself. */
static inline struct dr_file *dr_file_whole(struct dr_file *f, uint64_t *off)
{
    for (; f->part; f = f->under)
        *off += f->under_at;
    return f;
}

/* A locked directory. File systems embed it. */
struct dr_dir_lock {
    struct dr_fs *fs; /* the one that unlocks it */
};

/* Lock a directory against everybody else who locks it, in this process or another, until it is
 * unlocked or the process ends. The lock tells a directory that somebody is at work in from one
 * that an interrupted process left; it keeps nobody from the files, and the directory may be
 * removed while it is locked. On network file systems only processes of one host see each other.
 * -EBUSY: somebody has locked it. -ENOENT: it is gone, also if it went, or another one got its
 * name, between the look at it and its locking. -ENOTSUP: there are no such locks here. */
static inline int dr_dir_lock(struct dr_fs *fs, const char *path, struct dr_dir_lock **held,
                              struct dr_error *err)
{
    *held = NULL;
    return fs->ops->lock_dir ? fs->ops->lock_dir(fs, path, held, err) : -ENOTSUP;
}

/* NULL allowed. */
static inline void dr_dir_unlock(struct dr_dir_lock *held)
{
    if (held)
        held->fs->ops->unlock_dir(held);
}

/* kind, id and err may be NULL. */
static inline int dr_look(struct dr_fs *fs, const char *path, enum dr_name_kind *kind,
                          struct dr_file_id *id, struct dr_error *err)
{
    enum dr_name_kind some_kind;
    struct dr_file_id some_id;
    kind = kind ? kind : &some_kind;
    id = id ? id : &some_id;
    *kind = DR_NAME_FILE;
    return fs->ops->look ? fs->ops->look(fs, path, kind, id, err)
                         : fs->ops->identify(fs, path, id, err);
}

/* The operating system's. Never NULL, never freed. */
struct dr_fs *dr_fs_posix(void);

/* A file system in memory (tests, scratch). Flat names with '/' in them are fine; directories exist
 * by being named. Starts empty; free ends it and needs all its files closed. (memory.c) */
struct dr_fs *dr_fs_memory_new(void);
void dr_fs_memory_free(struct dr_fs *fs);

/* ------------------------------------------------------------------ path helpers (path.c);
 * malloc'ed results, NULL = out of memory. Only '/' separates. */

char *dr_path_dirname(const char *path);                   /* "." if there is none */
const char *dr_path_basename(const char *path);            /* points into path */
char *dr_path_join(const char *dir, const char *name);     /* name absolute → name */
char *dr_path_sibling(const char *path, const char *name); /* join(dirname(path), name) */
/* real lies in the tree of directory dir; both as realpath gives them. "/a/bc" is not in "/a/b". */
bool dr_path_inside(const char *dir, const char *real);
/* Is something mounted right at path (a file given to a container, say)? The kernel lets nothing
 * take the place of such a name. False when it cannot be told. */
bool dr_path_is_mount(const char *path);
/* Nothing is at path, and it is a place for devices: a name mistyped, most likely. A file there
 * would be kept in memory and be gone after a restart. */
bool dr_path_is_no_device(const char *path);
/* path is a dangling link: *to is the name that it finally leads to, where a new file should be
 * made (malloc'ed). NULL: path is no link, or a link made by another user, which is not followed
 * because it may be a trap in a directory that all may write to. 0, -ENOMEM, or -ELOOP. */
int dr_path_follow(const char *path, char **to);

/* ------------------------------------------------------------------ replacing a file
 * (core/replace.c; core/publish.h has the steps one by one)
 *
 * dr_replace: the new content stands, complete and durable, under a temporary name in the same
 * directory; it has the old file's owner, mode, labels and lock bytes; then rename, then the
 * directory is made durable. Killed anywhere: the old file or the new one, and perhaps a temporary
 * file that `recover` knows by its name (core/aside.h). */

/* Called with the temporary file open for writing; fills it. Need not flush. */
typedef int (*dr_replace_fill)(void *user, struct dr_file *tmp, struct dr_error *err);

/* old: the open file whose name is taken over (-ESTALE if path leads elsewhere by now; links are
 * followed), or NULL to make path new (-EEXIST if it exists). On success *fresh (may be NULL) is
 * the new file, open RDWR and locked as a writer unless old has no locks; old is still open,
 * without a name. After a failure *fresh is NULL and nothing has changed, with one exception: where
 * only the directory could not be made durable, *fresh is the new file, which has the name, and
 * whose flushes fail. */
int dr_replace(struct dr_fs *fs, const char *path, struct dr_file *old, dr_replace_fill fill,
               void *user, struct dr_file **fresh, struct dr_error *err);

/* Would dr_replace be able to begin? Makes the temporary file and removes it again; nothing else
 * changes. */
int dr_replace_try(struct dr_fs *fs, const char *path, struct dr_file *old, struct dr_error *err);

#endif
