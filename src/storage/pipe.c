/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The writing end of a pipe as a file: writes and zeros that follow one another without a gap go
 * out in order through a descriptor that somebody else opened. Nothing can be read back, and
 * nothing is written twice. */
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "storage/storage.h"

#define LOOK_MS 100           /* how often a writer that waits looks whether it is to stop */
#define ZEROS   (256u * 1024) /* bytes of zeros written at once */

struct pipe_file {
    struct dr_file base;
    int fd;
    int own; /* fd once more, but not blocking; or -1 */
    bool socket;
    bool regular;             /* a file that the descriptor leads to: it can be made durable */
    const volatile int *stop; /* may be NULL */
    uint64_t pos;             /* bytes written */
    uint8_t *zeros;
};

static void pipe_close(struct dr_file *f)
{
    struct pipe_file *p = (struct pipe_file *)f;
    dr_cleanup_close(&p->own);
    free(p->zeros);
    free(f->path);
    free(p);
}

static ssize_t pipe_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    (void)f;
    (void)buf;
    (void)off;
    (void)len;
    return -ESPIPE;
}

static bool is_stopped(const struct pipe_file *p)
{
    return p->stop && __atomic_load_n(p->stop, __ATOMIC_RELAXED);
}

/* Poll with a timeout: the signal that asks to stop may be delivered to another thread, and would
 * not interrupt a write(2) here. */
static int wait_for_room(const struct pipe_file *p)
{
    struct pollfd room = {.fd = p->fd, .events = POLLOUT};
    int n = 0;
    while (n == 0) {
        if (is_stopped(p))
            return -ECANCELED;
        n = poll(&room, 1, LOOK_MS);
        if (n < 0 && errno != EINTR)
            return -errno;
    }
    return 0;
}

static int write_all(struct pipe_file *p, const uint8_t *buf, size_t len)
{
    while (len > 0) {
        if (is_stopped(p)) /* a reader that is always ready keeps nobody waiting */
            return -ECANCELED;
        ssize_t n = p->socket ? send(p->fd, buf, len, MSG_DONTWAIT | MSG_NOSIGNAL)
                              : write(p->own >= 0 ? p->own : p->fd, buf, len);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        int r = n < 0 ? wait_for_room(p) : 0;
        if (r < 0)
            return r;
        n = n < 0 ? 0 : n;
        buf += n;
        len -= (size_t)n;
        p->pos += (uint64_t)n;
    }
    return 0;
}

static int pipe_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    struct pipe_file *p = (struct pipe_file *)f;
    int r = off == p->pos ? 0 : -ESPIPE;
    for (int i = 0; i < n && r == 0; i++)
        r = write_all(p, iov[i].iov_base, iov[i].iov_len);
    return r;
}

static int pipe_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    struct pipe_file *p = (struct pipe_file *)f;
    (void)flags;
    int r = off == p->pos ? 0 : -ESPIPE;
    while (len > 0 && r == 0) {
        size_t n = (size_t)dr_min(len, ZEROS);
        r = write_all(p, p->zeros, n);
        len -= n;
    }
    return r;
}

static int pipe_flush(struct dr_file *f)
{
    const struct pipe_file *p = (const struct pipe_file *)f;
    return p->regular && fdatasync(p->fd) < 0 ? -errno : 0;
}

static const struct dr_file_ops pipe_ops = {
    .name = "pipe",
    .close = pipe_close,
    .pread = pipe_pread,
    .pwritev = pipe_pwritev,
    .zero = pipe_zero,
    .flush = pipe_flush,
};

/* The description of fd is shared with other programs, which would be surprised by writes that do
 * not wait: only a description of our own becomes non-blocking. */
static int open_unblocking(int fd)
{
    char name[32];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    return open(name, O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
}

int dr_file_open_pipe(int fd, const char *name, const volatile int *stop, struct dr_file **file,
                      struct dr_error *err)
{
    struct stat st;
    *file = NULL;
    if (fstat(fd, &st) < 0)
        return dr_fail_errno(err, errno, "%s: cannot be written to", name);
    struct pipe_file *p = calloc(1, sizeof(*p));
    if (!p)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    p->base = (struct dr_file){
        .ops = &pipe_ops,
        .id = {.owner = p, .ino = (uintptr_t)p},
        .path = strdup(name),
        .atomic_size = 512,
    };
    p->fd = fd;
    p->own = S_ISFIFO(st.st_mode) ? open_unblocking(fd) : -1;
    p->socket = S_ISSOCK(st.st_mode);
    p->regular = S_ISREG(st.st_mode);
    p->stop = stop;
    p->zeros = calloc(1, ZEROS);
    if (!p->base.path || !p->zeros) {
        pipe_close(&p->base);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    return dr_file_adopt(&p->base, DR_FILE_RDWR, file, err);
}
