/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The requests of the FUSE file system: a directory with one file, which is the disk.
 *
 * The kernel keeps what was read in its page cache. Writes go through it: when write(2) returns the
 * disk has the bytes, so that an error reaches the program that wrote, and a second opener, with
 * O_DIRECT or without, sees them. FUSE's write-back cache would be faster for small writes, but
 * then the kernel would let the file grow past the end of the disk, and answers about holes would
 * miss what it has not written yet. Only programs that map the file for writing leave changes in
 * the page cache; SEEK_DATA and SEEK_HOLE have the kernel write these back before they call a range
 * a hole.
 *
 * The file behaves like a block device in that its users cannot change its size: truncate(2) to
 * another size is refused, and a write ends at the end of the disk. Clients of the control socket
 * can; then the kernel is told to ask again.
 *
 * What changes the disk goes through its dr_stall, where it may wait for space. The loop is told
 * so, and has another thread for the other requests.
 */
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "exports/fuse-file.h"

#define BLOCK 4096

/* Names and attributes change only through the kernel, so it may remember them for long. */
static const double remember = 86400.0;

static struct fuse_disk *disk_of(fuse_req_t req)
{
    return fuse_req_userdata(req);
}

static long long now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME_COARSE, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void note_change(struct fuse_disk *d)
{
    atomic_store_explicit(&d->mtime, now(), memory_order_relaxed);
}

/* Answer with the errno of a failure, and tell its text once. */
static void reply_failure(fuse_req_t req, int r, const struct dr_error *err)
{
    struct fuse_disk *d = disk_of(req);

    if (err->text[0] && d->options->message) {
        DR_LOCK_SCOPE(&d->lock);
        if (strcmp(d->last_text, err->text) != 0) {
            memcpy(d->last_text, err->text, sizeof(d->last_text));
            d->options->message(d->options->user, err->text);
        }
    }
    fuse_reply_err(req, -r);
}

/* ------------------------------------------------------------------ attributes */

/* Blocks that the top image takes in its file system: an estimate, since parents, tables and
 * snapshots are not looked at. Programs such as cp look for holes only if there are fewer blocks
 * than the size needs, so there is always one less. */
static blkcnt_t count_blocks(const struct fuse_disk *d)
{
    const char *name = dr_image_path(d->disk, 0);
    CLEANUP_FREE char *path = name ? dr_name_file(name) : NULL;
    uint64_t needed = (dr_size(d->disk) + 511) / 512;
    struct stat st;

    if (!path || stat(path, &st) < 0 || needed == 0)
        return 0;
    return (blkcnt_t)dr_min((uint64_t)st.st_blocks, needed - 1);
}

static void set_time(struct timespec *t, long long ns)
{
    t->tv_sec = ns / 1000000000;
    t->tv_nsec = ns % 1000000000;
}

static void get_attributes(struct fuse_disk *d, fuse_ino_t ino, struct stat *st)
{
    *st = (struct stat){.st_ino = ino, .st_blksize = BLOCK};
    set_time(&st->st_atim, d->started);
    set_time(&st->st_ctim, d->started);
    if (ino == FUSE_ROOT_ID) {
        st->st_mode = S_IFDIR | 0555;
        st->st_nlink = 2;
        st->st_uid = geteuid();
        st->st_gid = getegid();
        st->st_mtim = st->st_ctim;
        return;
    }
    st->st_mode = S_IFREG | atomic_load(&d->mode);
    st->st_nlink = 1;
    st->st_uid = atomic_load(&d->uid);
    st->st_gid = atomic_load(&d->gid);
    st->st_size = (off_t)dr_size(d->disk);
    st->st_blocks = count_blocks(d);
    set_time(&st->st_mtim, atomic_load(&d->mtime));
}

static void answer_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct fuse_disk *d = disk_of(req);
    struct fuse_entry_param e = {
        .ino = FUSE_DISK_FILE, .attr_timeout = remember, .entry_timeout = remember};

    if (parent != FUSE_ROOT_ID || strcmp(name, d->options->name) != 0) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    get_attributes(d, FUSE_DISK_FILE, &e.attr);
    fuse_reply_entry(req, &e);
}

static void answer_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct stat st;

    (void)fi;
    get_attributes(disk_of(req), ino, &st);
    fuse_reply_attr(req, &st, remember);
}

static void answer_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *st, int set,
                           struct fuse_file_info *fi)
{
    struct fuse_disk *d = disk_of(req);

    if (ino != FUSE_DISK_FILE ||
        ((set & FUSE_SET_ATTR_SIZE) && (uint64_t)st->st_size != dr_size(d->disk))) {
        fuse_reply_err(req, EPERM);
        return;
    }
    if (set & FUSE_SET_ATTR_MODE)
        atomic_store(&d->mode, st->st_mode & 0777);
    if (set & FUSE_SET_ATTR_UID)
        atomic_store(&d->uid, st->st_uid);
    if (set & FUSE_SET_ATTR_GID)
        atomic_store(&d->gid, st->st_gid);
    if (set & FUSE_SET_ATTR_MTIME_NOW)
        note_change(d);
    else if (set & FUSE_SET_ATTR_MTIME)
        atomic_store(&d->mtime, st->st_mtim.tv_sec * 1000000000ll + st->st_mtim.tv_nsec);
    answer_getattr(req, ino, fi);
}

static void answer_statfs(fuse_req_t req, fuse_ino_t ino)
{
    struct statvfs st = {
        .f_bsize = BLOCK,
        .f_frsize = BLOCK,
        .f_blocks = (fsblkcnt_t)((dr_size(disk_of(req)->disk) + BLOCK - 1) / BLOCK),
        .f_files = 2,
        .f_namemax = 255};

    (void)ino;
    fuse_reply_statfs(req, &st);
}

/* ------------------------------------------------------------------ the directory */

static void answer_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
                           struct fuse_file_info *fi)
{
    const char *const names[] = {".", "..", disk_of(req)->options->name};
    char buf[1024];
    size_t used = 0, room = dr_min(size, sizeof(buf));

    (void)fi;
    if (ino != FUSE_ROOT_ID) {
        fuse_reply_err(req, ENOTDIR);
        return;
    }
    for (off_t i = off; i >= 0 && i < 3; i++) {
        struct stat st = {.st_ino = i < 2 ? FUSE_ROOT_ID : FUSE_DISK_FILE,
                          .st_mode = i < 2 ? S_IFDIR : S_IFREG};
        size_t n = fuse_add_direntry(req, buf + used, room - used, names[i], &st, i + 1);
        if (n > room - used)
            break;
        used += n;
    }
    fuse_reply_buf(req, buf, used);
}

/* `drover unmount` asks which process to wait for. */
static void answer_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned cmd, void *arg,
                         struct fuse_file_info *fi, unsigned flags, const void *in, size_t in_size,
                         size_t out_size)
{
    int pid = getpid();

    (void)arg;
    (void)fi;
    (void)flags;
    (void)in;
    (void)in_size;
    if (ino == FUSE_ROOT_ID && cmd == FUSE_DISK_PID && out_size >= sizeof(pid))
        fuse_reply_ioctl(req, 0, &pid, sizeof(pid));
    else
        fuse_reply_err(req, ENOTTY);
}

static void refuse_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                         dev_t rdev)
{
    (void)parent;
    (void)name;
    (void)mode;
    (void)rdev;
    fuse_reply_err(req, EPERM);
}

static void refuse_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                          struct fuse_file_info *fi)
{
    (void)fi;
    refuse_mknod(req, parent, name, mode, 0);
}

static void refuse_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    refuse_mknod(req, parent, name, mode, 0);
}

static void refuse_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    refuse_mknod(req, parent, name, 0, 0);
}

static void refuse_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t to,
                          const char *new_name, unsigned flags)
{
    (void)to;
    (void)new_name;
    (void)flags;
    refuse_mknod(req, parent, name, 0, 0);
}

/* ------------------------------------------------------------------ opening */

static bool opened_for_writing(const struct fuse_file_info *fi)
{
    return (fi->flags & O_ACCMODE) != O_RDONLY;
}

static void answer_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct fuse_disk *d = disk_of(req);

    if (ino != FUSE_DISK_FILE) {
        fuse_reply_err(req, EISDIR);
        return;
    }
    if (opened_for_writing(fi) && !dr_writable(d->disk)) {
        fuse_reply_err(req, EROFS);
        return;
    }
    fi->keep_cache = 1; /* nobody changes the disk but through this kernel */
    fi->noflush = !opened_for_writing(fi);
    if (opened_for_writing(fi))
        atomic_fetch_add(&d->writers, 1);
    if (fuse_reply_open(req, fi) < 0 && opened_for_writing(fi))
        atomic_fetch_sub(&d->writers, 1); /* the program was killed meanwhile: no release follows */
}

static void answer_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    if (opened_for_writing(fi))
        atomic_fetch_sub(&disk_of(req)->writers, 1);
    fuse_reply_err(req, 0);
}

/* ------------------------------------------------------------------ data */

/* How much of [off, off+len) lies inside the disk. */
static uint64_t inside(const struct fuse_disk *d, off_t off, uint64_t len)
{
    uint64_t size = dr_size(d->disk);

    return (uint64_t)off < size ? dr_min(len, size - (uint64_t)off) : 0;
}

struct buffer {
    size_t size;
    void *bytes; /* aligned for O_DIRECT */
};

static void free_buffer(void *p)
{
    struct buffer *b = p;

    free(b->bytes);
    free(b);
}

/* This thread's own buffer, of at least that size, or NULL. */
static void *get_buffer(struct fuse_disk *d, size_t size)
{
    struct buffer *b = pthread_getspecific(d->buffer);

    if (!b) {
        b = calloc(1, sizeof(*b));
        if (!b || pthread_setspecific(d->buffer, b) != 0) {
            free(b);
            return NULL;
        }
    }
    if (b->size < size) {
        free(b->bytes);
        b->size = dr_max(size, (size_t)1 << 20);
        if (posix_memalign(&b->bytes, BLOCK, b->size) != 0)
            *b = (struct buffer){0};
    }
    return b->bytes;
}

static void answer_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
                        struct fuse_file_info *fi)
{
    struct fuse_disk *d = disk_of(req);
    struct dr_error err = DR_ERROR_INIT;

    (void)ino;
    (void)fi;
    size = (size_t)inside(d, off, size);
    void *buf = get_buffer(d, size);
    if (!buf) {
        fuse_reply_err(req, ENOMEM);
        return;
    }
    int r = dr_pread(d->disk, buf, (uint64_t)off, size, &err);
    if (r < 0)
        reply_failure(req, r, &err);
    else
        fuse_reply_buf(req, buf, size);
}

/* What changes the disk may have to wait until there is space for it. */
struct change {
    struct fuse_disk *disk;
    enum { WRITE, PUNCH, ZERO, FLUSH } kind;
    const void *buf;
    uint64_t off, len;
    bool waits; /* the loop may have another thread instead of this one */
};

static void set_waits(struct change *c, bool waits)
{
    if (c->waits != waits)
        fuse_loop_waits(c->disk->loop, waits);
    c->waits = waits;
}

/* Give space back. A discard gives up most, the place in the format's tables, too, but may leave
 * bytes as they were; zeroing what is zero already costs nothing. */
static int punch(struct fuse_disk *d, uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = dr_discard(d->disk, off, len, err);

    return r < 0 ? r : dr_zero(d->disk, off, len, DR_MAY_UNMAP, err);
}

static int try_change(const struct change *c, struct dr_error *err)
{
    struct fuse_disk *d = c->disk;
    bool through = d->options->writethrough;
    int r;

    switch (c->kind) {
    case WRITE:
        return dr_pwrite(d->disk, c->buf, c->off, c->len, through ? DR_FUA : 0, err);
    case PUNCH:
        r = punch(d, c->off, c->len, err);
        return r == 0 && through ? dr_flush(d->disk, err) : r;
    case ZERO:
        return dr_zero(d->disk, c->off, c->len, through ? DR_FUA : 0, err);
    default:
        return dr_flush(d->disk, err);
    }
}

static int make_change(void *user, struct dr_error *err)
{
    struct change *c = user;

    set_waits(c, false);
    int r = try_change(c, err);
    if (r < 0)
        set_waits(c, true);
    return r;
}

static int change(struct change *c, struct dr_error *err)
{
    struct dr_stall *stall = c->disk->options->stall;

    set_waits(c, dr_stall_waiting(stall) > 0);
    int r = dr_stall_run(stall, make_change, c, err);
    set_waits(c, false);
    if (c->kind != FLUSH)
        note_change(c->disk); /* after a failure, too: a part may be there */
    return r;
}

static void answer_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
                         struct fuse_file_info *fi)
{
    struct fuse_disk *d = disk_of(req);
    struct dr_error err = DR_ERROR_INIT;
    size_t n = (size_t)inside(d, off, size);
    struct change c = {.disk = d, .kind = WRITE, .buf = buf, .off = (uint64_t)off, .len = n};

    (void)ino;
    (void)fi;
    if (n == 0 && size > 0) {
        fuse_reply_err(req, ENOSPC);
        return;
    }
    int r = change(&c, &err);
    if (r < 0)
        reply_failure(req, r, &err);
    else
        fuse_reply_write(req, n);
}

static void answer_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct dr_error err = DR_ERROR_INIT;
    struct change c = {.disk = disk_of(req), .kind = FLUSH};

    (void)ino;
    reply_failure(req, opened_for_writing(fi) ? change(&c, &err) : 0, &err);
}

static void answer_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    struct dr_error err = DR_ERROR_INIT;
    struct change c = {.disk = disk_of(req), .kind = FLUSH};

    (void)ino;
    (void)datasync;
    (void)fi;
    reply_failure(req, change(&c, &err), &err);
}

/* `drover unmount` flushes by the directory, and wants to know rather than wait. */
static void answer_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    struct dr_error err = DR_ERROR_INIT;

    (void)ino;
    (void)datasync;
    (void)fi;
    reply_failure(req, dr_flush(disk_of(req)->disk, &err), &err);
}

/* Punching gives space back, zeroing a range keeps it; both read as zeros. Space is not reserved in
 * advance: a promise that a later write succeeds could not be kept for a disk with parents. */
static void answer_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len,
                             struct fuse_file_info *fi)
{
    struct fuse_disk *d = disk_of(req);
    struct dr_error err = DR_ERROR_INIT;
    uint64_t n = inside(d, off, (uint64_t)len);
    struct change c = {.disk = d, .kind = ZERO, .off = (uint64_t)off, .len = n};
    int r;

    (void)ino;
    (void)fi;
    if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
        c.kind = PUNCH;
    if (c.kind == ZERO && (mode & ~FALLOC_FL_KEEP_SIZE) != FALLOC_FL_ZERO_RANGE)
        r = -EOPNOTSUPP;
    else if (!(mode & FALLOC_FL_KEEP_SIZE) && n < (uint64_t)len)
        r = -ENOSPC;
    else
        r = change(&c, &err);
    reply_failure(req, r, &err);
}

/* ------------------------------------------------------------------ holes */

void fuse_disk_write_back(struct fuse_disk *d, uint64_t off, uint64_t len)
{
    /* Invalidating a range writes back what is dirty there. The kernel asks other threads for it
     * while this one waits. */
    fuse_lowlevel_notify_inval_inode(d->session, FUSE_DISK_FILE, (off_t)off, (off_t)len);
}

/* Find the first range from off on that is a hole, or none. *at = dr_size() and *len = 0: there is
 * no more; at the end of a file is a hole, as lseek(2) has it. */
static int find_range(struct fuse_disk *d, uint64_t off, bool hole, uint64_t *at, uint64_t *len,
                      struct dr_error *err)
{
    uint64_t size = dr_size(d->disk);

    *len = 0;
    for (*at = off; *at < size; *at += *len) {
        struct dr_extent_status status;
        int r = dr_block_status(d->disk, *at, size - *at, &status, err);
        if (r < 0)
            return r;
        *len = status.len;
        if (!!(status.flags & DR_EXTENT_ZERO) == hole)
            return 0;
    }
    *len = 0;
    return 0;
}

static int seek_data(struct fuse_disk *d, uint64_t off, uint64_t *at, struct dr_error *err)
{
    uint64_t len;
    int r = find_range(d, off, false, at, &len, err);

    if (r < 0 || *at == off || atomic_load(&d->writers) == 0)
        return r;
    fuse_disk_write_back(d, off, *at - off);
    return find_range(d, off, false, at, &len, err);
}

static int seek_hole(struct fuse_disk *d, uint64_t off, uint64_t *at, struct dr_error *err)
{
    uint64_t len, written_back = off; /* up to there nothing is dirty */
    int r = find_range(d, off, true, at, &len, err);

    while (r == 0 && len > 0 && *at + len > written_back && atomic_load(&d->writers) > 0) {
        written_back = *at + len;
        fuse_disk_write_back(d, *at, len);
        r = find_range(d, *at, true, at, &len, err);
    }
    return r;
}

static void answer_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence,
                         struct fuse_file_info *fi)
{
    struct fuse_disk *d = disk_of(req);
    struct dr_error err = DR_ERROR_INIT;
    uint64_t at = 0;
    int r = -EINVAL;

    (void)ino;
    (void)fi;
    if (off < 0 || inside(d, off, 1) == 0)
        r = -ENXIO;
    else if (whence == SEEK_DATA)
        r = seek_data(d, (uint64_t)off, &at, &err);
    else if (whence == SEEK_HOLE)
        r = seek_hole(d, (uint64_t)off, &at, &err);
    if (r == 0 && whence == SEEK_DATA && at >= dr_size(d->disk))
        r = -ENXIO;
    if (r < 0)
        reply_failure(req, r, &err);
    else
        fuse_reply_lseek(req, (off_t)at);
}

/* ------------------------------------------------------------------ the table */

static void begin(void *userdata, struct fuse_conn_info *conn)
{
    (void)userdata;
    /* O_TRUNC comes as a change of the size, which is refused. Attributes need not be asked for
     * before each read: nobody else changes the file. */
    conn->want &= ~(unsigned)(FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_AUTO_INVAL_DATA);
    /* Requests of asynchronous and of direct I/O that may be under way at once. */
    conn->max_background = 128;
    conn->congestion_threshold = 96;
}

const struct fuse_lowlevel_ops fuse_disk_ops = {
    .init = begin,
    .lookup = answer_lookup,
    .getattr = answer_getattr,
    .setattr = answer_setattr,
    .statfs = answer_statfs,
    .readdir = answer_readdir,
    .fsyncdir = answer_fsyncdir,
    .ioctl = answer_ioctl,
    .mknod = refuse_mknod,
    .create = refuse_create,
    .mkdir = refuse_mkdir,
    .unlink = refuse_unlink,
    .rmdir = refuse_unlink,
    .rename = refuse_rename,
    .open = answer_open,
    .release = answer_release,
    .read = answer_read,
    .write = answer_write,
    .flush = answer_flush,
    .fsync = answer_fsync,
    .fallocate = answer_fallocate,
    .lseek = answer_lseek,
};

int fuse_disk_init(struct fuse_disk *d, struct dr_disk *disk, const struct dr_fuse_options *options,
                   struct dr_error *err)
{
    *d = (struct fuse_disk){.disk = disk, .options = options, .started = now()};
    atomic_init(&d->mode, dr_writable(disk) ? 0600u : 0400u);
    atomic_init(&d->uid, geteuid());
    atomic_init(&d->gid, getegid());
    atomic_init(&d->mtime, d->started);
    int e = pthread_key_create(&d->buffer, free_buffer);
    if (e != 0)
        return dr_fail_errno(err, e, "%s: memory of threads", options->mountpoint);
    pthread_mutex_init(&d->lock, NULL);
    return 0;
}

void fuse_disk_destroy(struct fuse_disk *d)
{
    pthread_mutex_destroy(&d->lock);
    pthread_key_delete(d->buffer);
}
