/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "storage/unpacked.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "storage/source-codec.h"

#define WINDOW       ((size_t)32 << 20) /* more than all readers of one copy are apart */
#define PIECE        ((size_t)1 << 20)
#define BLOCK        ((size_t)64 << 10) /* of zeros, to be left out of the temporary file */
#define RESTARTS_MAX 2u                 /* readers in order start again that often */
#define TELL_FROM    (UINT64_C(256) << 20)
#define KEEP_FREE    (UINT64_C(64) << 20) /* of the temporary file's file system */

struct unpacked {
    struct dr_file base;
    const char *packer;
    struct dr_unpack_damage *damage; /* while it is opened; NULL = damage is a failure */
    _Atomic int fd;                  /* the temporary file that has all bytes, or -1 */
    pthread_mutex_t lock;            /* all below, and the making of the temporary file */
    struct dr_source *source;
    uint8_t
        *window;  /* the byte at offset i is at i % WINDOW, for the last WINDOW bytes before pos */
    uint64_t pos; /* of source */
    unsigned restarts;
    int no_place; /* -errno: why there is no temporary file, once one was needed */
};

static struct dr_unpacking unpacking; /* set before the first image is opened */

DR_API void dr_set_unpacking(const struct dr_unpacking *how)
{
    unpacking = how ? *how : (struct dr_unpacking){0};
}

/* ------------------------------------------------------------------ the temporary file */

static const char *temporary_dir(void)
{
    const char *dir = getenv("TMPDIR");
    return dir && *dir ? dir : "/var/tmp";
}

/* Not every file system makes files without names: there the name goes at once. */
static int open_temporary(const char *dir)
{
    int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    char *name = NULL;
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL))
        return fd < 0 ? -errno : fd;
    if (asprintf(&name, "%s/drover-XXXXXX", dir) < 0)
        return -ENOMEM;
    fd = mkostemp(name, O_CLOEXEC);
    int r = fd < 0 ? -errno : fd;
    if (fd >= 0)
        unlink(name);
    free(name);
    return r;
}

static bool room_left(int fd)
{
    struct statvfs st;
    return fstatvfs(fd, &st) < 0 || (uint64_t)st.f_bavail * st.f_frsize >= KEEP_FREE;
}

static int write_block(int fd, const uint8_t *buf, size_t len, uint64_t off)
{
    while (len > 0) {
        ssize_t n = pwrite(fd, buf, len, (off_t)off);
        if (n < 0 && errno != EINTR)
            return -errno;
        n = n < 0 ? 0 : n;
        buf += n;
        off += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

static int write_piece(int fd, const uint8_t *buf, size_t len, uint64_t off)
{
    int r = room_left(fd) ? 0 : -ENOSPC;
    for (size_t at = 0; at < len && r == 0; at += BLOCK) {
        size_t n = dr_min(BLOCK, len - at);
        if (!dr_is_zero(buf + at, n))
            r = write_block(fd, buf + at, n, off + at);
    }
    return r;
}

static int cannot_keep(const struct unpacked *u, int r, struct dr_error *err)
{
    if (r == -ENOSPC)
        return dr_fail(
            err, ENOSPC,
            "%s: is compressed by %s and must be read at random, but there is no room in %s "
            "to unpack it: set TMPDIR to a directory that has room, or unpack it first",
            u->base.path, u->packer, temporary_dir());
    return dr_fail_errno(err, -r, "%s: cannot be unpacked into a temporary file in %s",
                         u->base.path, temporary_dir());
}

static void tell(const struct unpacked *u)
{
    char text[1024];
    if (!unpacking.message)
        return;
    snprintf(text, sizeof(text), "%s: compressed by %s: unpacking it into a temporary file in %s",
             u->base.path, u->packer, temporary_dir());
    unpacking.message(unpacking.user, text);
}

/* ------------------------------------------------------------------ one pass over all */

/* The bytes in front of the damage are taken. */
static int note_damage(struct dr_unpack_damage *damage, const struct dr_source *source,
                       const struct dr_error *why)
{
    damage->vouched = dr_source_vouched(source);
    damage->came = dr_source_pos(source);
    damage->why = *why;
    return 0;
}

/* Decode everything, into fd unless that is negative. *size: how much it was. */
static int pass(const struct unpacked *u, int fd, uint64_t *size, struct dr_error *err)
{
    struct dr_source *source = NULL;
    CLEANUP_FREE uint8_t *buf = malloc(PIECE);
    size_t got = PIECE;
    *size = 0;
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", u->base.path);
    int r = dr_source_open_file(u->base.under, &source, err);
    if (r == 0)
        dr_source_stop_by(source, unpacking.stop);
    for (bool told = fd < 0; r == 0 && got == PIECE;) {
        struct dr_error why = DR_ERROR_INIT;
        r = dr_source_read(source, buf, PIECE, &got, &why);
        /* Behind bytes that cannot be read no packer's stream goes on. */
        if ((r == -EBADMSG || r == -EIO) && u->damage)
            r = note_damage(u->damage, source, &why);
        else if (r < 0)
            dr_fail(err, -r, "%s", why.text);
        if (r == 0 && fd >= 0 && (r = write_piece(fd, buf, got, *size)) < 0)
            r = cannot_keep(u, r, err);
        *size += got;
        if (r == 0 && *size > INT64_MAX - PIECE)
            r = dr_fail(err, EFBIG, "%s: unpacks to more than a disk can have", u->base.path);
        if (r == 0 && unpacking.stop && __atomic_load_n(unpacking.stop, __ATOMIC_RELAXED))
            r = dr_fail(err, ECANCELED, "%s: stopped on request", u->base.path);
        if (!told && *size >= TELL_FROM) {
            told = true;
            tell(u);
        }
    }
    dr_source_close(source);
    return r;
}

/* Under lock, or before anybody else knows of u. */
static int keep(struct unpacked *u, uint64_t *size, struct dr_error *err)
{
    int fd = open_temporary(temporary_dir());
    if (fd < 0)
        return cannot_keep(u, fd, err);
    int r = pass(u, fd, size, err);
    if (r == 0 && ftruncate(fd, (off_t)*size) < 0)
        r = cannot_keep(u, -errno, err);
    if (r < 0)
        close(fd);
    else
        atomic_store(&u->fd, fd);
    return r;
}

/* ------------------------------------------------------------------ the window */

static void stop_window(struct unpacked *u)
{
    dr_source_close(DR_STEAL(u->source));
    free(DR_STEAL(u->window));
    u->pos = 0;
}

static int start_window(struct unpacked *u)
{
    dr_source_close(DR_STEAL(u->source));
    u->pos = 0;
    if (!u->window)
        u->window = malloc(WINDOW);
    return u->window ? dr_source_open_file(u->base.under, &u->source, NULL) : -ENOMEM;
}

static int advance(struct unpacked *u, uint64_t to)
{
    while (u->pos < to) {
        size_t at = (size_t)(u->pos % WINDOW), got, want = dr_min(PIECE, WINDOW - at);
        int r = dr_source_read(u->source, u->window + at, want, &got, NULL);
        u->pos += got;
        if (r < 0)
            return r;
        if (got < want && u->pos < to)
            return -ESTALE; /* it was longer when it was opened */
    }
    return 0;
}

/* [off, off+len) is in the window afterwards; or 1: the temporary file has it. */
static int move_window(struct unpacked *u, uint64_t off, size_t len)
{
    uint64_t size;
    bool behind = u->source && u->pos > WINDOW && off < u->pos - WINDOW;
    int r = 0;
    if (atomic_load(&u->fd) >= 0)
        return 1;
    if (behind && u->no_place < 0)
        return u->no_place; /* starting again for each such read would never end */
    if (behind && u->restarts++ == RESTARTS_MAX) {
        stop_window(u);
        u->no_place = keep(u, &size, NULL);
        return u->no_place < 0 ? u->no_place : 1;
    }
    if (behind || !u->source)
        r = start_window(u);
    if (r == 0)
        r = advance(u, off + len);
    if (r < 0)
        stop_window(u);
    return r;
}

static void copy_out(const struct unpacked *u, uint8_t *buf, uint64_t off, size_t len)
{
    size_t at = (size_t)(off % WINDOW), n = dr_min(len, WINDOW - at);
    memcpy(buf, u->window + at, n);
    memcpy(buf + n, u->window, len - n);
}

/* ------------------------------------------------------------------ the file */

static int read_temporary(int fd, uint8_t *buf, uint64_t off, size_t len)
{
    while (len > 0) {
        ssize_t n = pread(fd, buf, len, (off_t)off);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        buf += n;
        off += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

static int read_some(struct unpacked *u, uint8_t *buf, uint64_t off, size_t len)
{
    int fd = atomic_load(&u->fd);
    if (fd < 0) {
        DR_LOCK_SCOPE(&u->lock);
        int r = move_window(u, off, len);
        if (r == 0)
            copy_out(u, buf, off, len);
        if (r <= 0)
            return r;
        fd = atomic_load(&u->fd);
    }
    return read_temporary(fd, buf, off, len);
}

static ssize_t unpacked_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    struct unpacked *u = (struct unpacked *)f;
    uint64_t size = dr_file_size(f);
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    for (size_t done = 0, n; done < len; done += n) {
        n = dr_min(PIECE, len - done);
        int r = read_some(u, (uint8_t *)buf + done, off + done, n);
        if (r < 0)
            return r;
    }
    return (ssize_t)len;
}

/* Only the temporary file knows holes. */
static int unpacked_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                           uint64_t *run)
{
    struct unpacked *u = (struct unpacked *)f;
    int fd = atomic_load(&u->fd);
    *kind = DR_FILE_DATA;
    *run = len;
    if (fd < 0)
        return 0;
    off_t data = lseek(fd, (off_t)off, SEEK_DATA);
    if (data < 0 && errno != ENXIO)
        return 0;
    *kind = data == (off_t)off ? DR_FILE_DATA : DR_FILE_HOLE;
    off_t end = *kind == DR_FILE_DATA ? lseek(fd, (off_t)off, SEEK_HOLE) : data;
    if (end > (off_t)off)
        *run = dr_min(len, (uint64_t)end - off);
    return 0;
}

static void unpacked_close(struct dr_file *f)
{
    struct unpacked *u = (struct unpacked *)f;
    stop_window(u);
    if (u->fd >= 0)
        close(u->fd);
    pthread_mutex_destroy(&u->lock);
    dr_file_unref(f->under);
    free(f->path);
    free(u);
}

static int no_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static uint64_t unpacked_mtime(struct dr_file *f)
{
    return dr_file_mtime(f->under);
}

static int unpacked_usage(struct dr_file *f, uint64_t *bytes)
{
    return dr_file_usage(f->under, bytes, NULL);
}

static const char *unpacked_reason(struct dr_file *f, int r)
{
    (void)f;
    switch (r) {
    case -ENOSPC:
        return "there is no room to unpack it: set TMPDIR to a directory that has room";
    case -EBADMSG:
        return "its compressed data is damaged";
    case -ESTALE:
        return "it has changed since it was opened";
    default:
        return NULL;
    }
}

static const struct dr_file_ops unpacked_ops = {
    .name = "unpacked",
    .close = unpacked_close,
    .pread = unpacked_pread,
    .extent = unpacked_extent,
    .flush = no_flush,
    .mtime = unpacked_mtime,
    .usage = unpacked_usage,
    .reason = unpacked_reason,
};

/* ------------------------------------------------------------------ open */

int dr_unpack_head(struct dr_file *f, uint8_t *head, size_t len, size_t *got, const char **packer,
                   struct dr_error *err)
{
    struct dr_source *source = NULL;
    int r = dr_file_pread_short(f, head, 0, len, got, err);
    if (r < 0)
        return r;
    *packer = dr_source_compression_of(head, *got);
    if (!*packer)
        return 0;
    r = dr_source_open_file(f, &source, err);
    if (r == 0)
        r = dr_source_read(source, head, len, got, err);
    dr_source_close(source);
    return r;
}

static int open_in_order(struct dr_file *f, const char *packer, bool at_random,
                         struct dr_unpack_damage *damage, struct dr_file **plain,
                         struct dr_error *err)
{
    struct unpacked *u = calloc(1, sizeof(*u));
    uint64_t size = 0;
    if (!u)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    pthread_mutex_init(&u->lock, NULL);
    atomic_init(&u->fd, -1);
    u->packer = packer;
    u->damage = damage;
    u->base = (struct dr_file){
        .ops = &unpacked_ops,
        .under = dr_file_ref(f),
        /* what no file system opened has only its own id to be known by */
        .id = f->fs && !f->part ? f->id : (struct dr_file_id){.owner = u, .ino = (uintptr_t)u},
        .path = strdup(f->path),
        .atomic_size = 512,
        .decoding = 1 + (damage ? DR_SOURCE_SALVAGE : DR_SOURCE_STRICT),
    };
    int r = u->base.path ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    if (r == 0)
        r = at_random || damage ? keep(u, &size, err) : pass(u, -1, &size, err);
    if (r < 0) {
        unpacked_close(&u->base);
        return r;
    }
    u->base.size = size;
    u->damage = NULL;
    return dr_file_adopt(&u->base, f->flags & (DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK), plain, err);
}

int dr_unpack(struct dr_file *f, bool at_random, struct dr_unpack_damage *damage,
              struct dr_file **plain, struct dr_error *err)
{
    const char *packer = NULL;
    enum dr_source_salvage salvage = !damage     ? DR_SOURCE_STRICT
                                     : at_random ? DR_SOURCE_SALVAGE
                                                 : DR_SOURCE_SALVAGE_KEEP;
    int r = dr_source_indexed_file(f, salvage, damage, plain, &packer, err);
    return r == -ENOTSUP ? open_in_order(f, packer, at_random, damage, plain, err) : r;
}
