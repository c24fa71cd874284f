/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "archive/vma-output.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/sigpipe.h"

#define POLL_MS    100
#define PIPE_BYTES (1 << 20)
#define WRITE_MAX  (1u << 30)

void vma_output_to_file(struct vma_output *o, struct dr_file *file, const char *name,
                        struct dr_job *job)
{
    *o = (struct vma_output){.file = file, .fd = -1, .own_fd = -1, .name = name, .job = job};
}

/* Writing must not block, or a job could not be stopped while nobody empties the pipe. The
 * caller's descriptor may be shared with programs that rely on it to block, so its flags stay as
 * they are and the pipe is opened a second time, non-blocking. */
static int open_again(int fd)
{
    char path[32];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
}

void vma_output_to_fd(struct vma_output *o, int fd, const char *name, struct dr_job *job)
{
    struct stat st;
    *o = (struct vma_output){.fd = fd, .own_fd = -1, .name = name, .job = job};
    if (fstat(fd, &st) < 0)
        return; /* the first write says so */
    o->socket = S_ISSOCK(st.st_mode);
    if (S_ISFIFO(st.st_mode)) {
        o->own_fd = open_again(fd);
        fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES); /* fewer turns; as much as we may have */
    }
}

void vma_output_close(struct vma_output *o)
{
    if (o->own_fd >= 0)
        close(o->own_fd);
    o->own_fd = -1;
}

/* ------------------------------------------------------------------ descriptors */

static ssize_t write_some(const struct vma_output *o, const uint8_t *p, size_t len)
{
    size_t n = (size_t)dr_min(len, WRITE_MAX);
    if (o->socket)
        return send(o->fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT);
    return write(o->own_fd >= 0 ? o->own_fd : o->fd, p, n);
}

/* Decide what a failed write means: 0 = wait and try again, else the failure. */
static int consider(const struct vma_output *o, int e, struct dr_error *err)
{
    if (dr_job_stopped(o->job))
        return dr_fail(err, ECANCELED, "stopped on request");
    if (e == EINTR)
        return 0;
    if (e == EAGAIN || e == EWOULDBLOCK) {
        struct pollfd p = {.fd = o->own_fd >= 0 ? o->own_fd : o->fd, .events = POLLOUT};
        poll(&p, 1, POLL_MS);
        return 0;
    }
    if (e == EPIPE)
        return dr_fail(err, EPIPE, "%s: nobody reads the archive any more, after %" PRIu64 " bytes",
                       o->name, o->pos);
    return dr_fail_errno(err, e, "%s: cannot write at offset %" PRIu64, o->name, o->pos);
}

static int write_fd(struct vma_output *o, const uint8_t *p, size_t len, struct dr_error *err)
{
    while (len > 0) {
        ssize_t n = write_some(o, p, len);
        if (n < 0) {
            int r = consider(o, errno, err);
            if (r < 0)
                return r;
            continue;
        }
        p += n;
        len -= (size_t)n;
        o->pos += (uint64_t)n;
    }
    return 0;
}

int vma_output_write(struct vma_output *o, const void *buf, size_t len, struct dr_error *err)
{
    if (o->file) {
        int r = dr_file_pwrite(o->file, buf, o->pos, len, err);
        o->pos += r == 0 ? len : 0;
        return r;
    }
    struct dr_sigpipe quiet;
    dr_sigpipe_hold(&quiet);
    int r = write_fd(o, buf, len, err);
    dr_sigpipe_release(&quiet, r == -EPIPE);
    return r;
}

int vma_output_sync(struct vma_output *o, struct dr_error *err)
{
    struct stat st;
    if (o->file)
        return dr_file_flush(o->file, err);
    if (fstat(o->fd, &st) < 0 || !(S_ISREG(st.st_mode) || S_ISBLK(st.st_mode)))
        return 0;
    if (fsync(o->fd) < 0)
        return dr_fail_errno(err, errno, "%s: cannot make the archive durable", o->name);
    return 0;
}
