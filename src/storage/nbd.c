/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Disks of NBD servers as files, through libnbd. nbd.h has the plan. */
#include "base/loaded.h"
#include "storage/nbd.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

#define DEPTH        16u
#define EXTENT_TRIES 3u /* before a server whose answer ends the connection is asked no more */
#define ZERO_MAX     ((uint64_t)1 << 30) /* bytes of one request for zeros */
#define LOOK_MAX     ((uint64_t)1 << 30) /* bytes of one question for extents */

static struct nbd_file *nbd_of(struct dr_file *f)
{
    return (struct nbd_file *)f;
}

/* ------------------------------------------------------------------ one request */

/* Called by libnbd with its lock held. 1: the request needs no further care. */
static int answered(void *user, int *error)
{
    struct nbd_request *q = user;
    q->error = *error;
    if (*error == 0 && q->command == NBD_READ && !nbd_is_whole(q))
        q->error = EPROTO;
    if (*error == 0 && (q->keep || q->not_kept))
        nbd_kept_answered(q->file, q);
    q->answered = true;
    sem_post(&q->done);
    return 1;
}

int64_t nbd_issue(struct nbd_handle *h, struct nbd_request *q, nbd_completion_callback done)
{
    nbd_extent_callback extents = {.callback = nbd_take_extents, .user_data = q};
    nbd_chunk_callback piece = {.callback = nbd_take_piece, .user_data = q};
    switch (q->command) {
    case NBD_READ:
        return nbd_aio_pread_structured(h, q->buf, (size_t)q->len, q->off, piece, done, q->flags);
    case NBD_WRITE:
        return nbd_aio_pwrite(h, q->buf, (size_t)q->len, q->off, done, q->flags);
    case NBD_ZERO:
        return nbd_aio_zero(h, q->len, q->off, done, q->flags);
    case NBD_FLUSH:
        return nbd_aio_flush(h, done, q->flags);
    case NBD_EXTENT:
        return nbd_aio_block_status(h, q->len, q->off, extents, done, q->flags);
    }
    return -1;
}

int nbd_ask(struct nbd_connection *c, struct nbd_request *q)
{
    nbd_completion_callback done = {.callback = answered, .user_data = q};
    struct nbd_pieces pieces;
    pieces.n = 0;
    pieces.wrong = false;
    q->pieces = &pieces;
    q->error = 0;
    q->answered = false;
    pthread_mutex_lock(&c->lock);
    /* When the connection ends in here, libnbd answers and returns a number that it freed. */
    bool sent = c->handle && (nbd_issue(c->handle, q, done) >= 0 || q->answered);
    int why = !sent && c->handle ? nbd_get_errno() : ENOTCONN;
    bool over = !c->handle || nbd_aio_is_dead(c->handle) > 0 || nbd_aio_is_closed(c->handle) > 0;
    pthread_mutex_unlock(&c->lock);
    if (sent) {
        nbd_wake(c);
        while (sem_wait(&q->done) < 0)
            ;
    }
    q->pieces = NULL;
    if (!sent)
        return over || !why ? ENOTCONN : why;
    /* ESHUTDOWN: the server is ending, and may be there again soon. */
    return q->error == ESHUTDOWN ? ENOTCONN : q->error;
}

static _Thread_local bool told_lost; /* the last error was this */

static int check_lost(const struct nbd_file *f)
{
    told_lost = atomic_load(&f->lost);
    return told_lost ? -EIO : 0;
}

/* Send it until there is an answer, or for `reconnect` seconds from when it first got none: a
 * server may end by this very request. Doing one twice does no harm. */
static int request(struct nbd_file *f, struct nbd_request *q)
{
    bool writes = q->command == NBD_WRITE || q->command == NBD_ZERO || q->command == NBD_FLUSH;
    unsigned left = q->command == NBD_EXTENT ? EXTENT_TRIES : UINT_MAX;
    uint64_t since = 0;
    int r = ENOTCONN;
    q->file = f;
    told_lost = false;
    if (sem_init(&q->done, 0, 0) < 0)
        return -errno;
    while (r == ENOTCONN && left-- > 0 && (!since || nbd_seconds() < since + f->reconnect)) {
        struct nbd_connection *c = writes && check_lost(f) < 0 ? NULL : nbd_pick(f);
        if (!c)
            break;
        r = nbd_ask(c, q);
        nbd_put(c);
        since = since ? since : nbd_seconds();
    }
    sem_destroy(&q->done);
    return writes && check_lost(f) < 0 ? check_lost(f) : -r;
}

/* A write or zeros, which is kept until a flush. */
static int change(struct nbd_file *f, struct nbd_request *q)
{
    int r = check_lost(f);
    if (r == 0)
        r = nbd_kept_begin(f, q);
    if (r < 0)
        return r;
    r = request(f, q);
    if (nbd_kept_end(f, q, r))
        nbd_kept_make_room(f);
    return r;
}

/* ------------------------------------------------------------------ extents */

static bool is_known(struct nbd_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                     uint64_t *run, uint64_t *changes)
{
    DR_LOCK_SCOPE(&f->extent_lock);
    *changes = f->changes;
    if (!nbd_covers(f->extents, off))
        return false;
    nbd_look_up(f->extents, off, len, kind, run);
    return true;
}

static int ask_extents(struct nbd_file *f, uint64_t off, uint64_t len, struct nbd_extents *e)
{
    uint64_t align = f->export.align, from = dr_round_down(off, align);
    uint64_t end = dr_min(dr_round_up(off + len, align), f->export.size);
    end = dr_max(end, dr_min(from + LOOK_MAX, f->export.size));
    struct nbd_request q = {
        .command = NBD_EXTENT, .off = from, .len = dr_min(end - from, LOOK_MAX), .extents = e};
    return request(f, &q);
}

/* Keep what was said for those that ask next, unless it may be older than a write. */
static void keep_extents(struct nbd_file *f, struct nbd_extents **e, uint64_t changes)
{
    DR_LOCK_SCOPE(&f->extent_lock);
    if (f->changes != changes)
        return;
    free(f->extents);
    f->extents = DR_STEAL(*e);
}

/* A server need not know: then all is data. */
static int nbd_extent(struct dr_file *base, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                      uint64_t *run)
{
    struct nbd_file *f = nbd_of(base);
    uint64_t changes;
    *kind = DR_FILE_DATA;
    *run = len;
    if (!f->export.extents || atomic_load(&f->no_extents) || off >= f->export.size ||
        is_known(f, off, len, kind, run, &changes))
        return 0;
    CLEANUP_FREE struct nbd_extents *e = malloc(sizeof(*e));
    if (!e)
        return -ENOMEM;
    e->from = e->end = 0;
    int r = ask_extents(f, off, len, e);
    if (r == -ENOTCONN)
        atomic_store(&f->no_extents, true);
    if (r == -EINVAL || r == -ENOTSUP || r == -EOVERFLOW || r == -EIO || r == -EPROTO ||
        r == -ENOTCONN)
        return 0;
    if (r < 0 || !nbd_covers(e, off))
        return r;
    nbd_look_up(e, off, len, kind, run);
    keep_extents(f, &e, changes);
    return 0;
}

void nbd_forget_extents(struct nbd_file *f)
{
    DR_LOCK_SCOPE(&f->extent_lock);
    f->changes++;
    free(DR_STEAL(f->extents));
}

/* ------------------------------------------------------------------ reading and writing */

static ssize_t nbd_pread_file(struct dr_file *base, void *buf, uint64_t off, size_t len)
{
    struct nbd_file *f = nbd_of(base);
    uint64_t size = f->export.size;
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    for (size_t done = 0, n; done < len; done += n) {
        n = dr_min(len - done, f->export.max);
        struct nbd_request q = {
            .command = NBD_READ, .buf = (char *)buf + done, .off = off + done, .len = n};
        int r = request(f, &q);
        if (r < 0)
            return r;
    }
    return (ssize_t)len;
}

static int write_bytes(struct nbd_file *f, void *buf, uint64_t off, size_t len, uint32_t flags)
{
    int r = 0;
    for (size_t done = 0, n; r == 0 && done < len; done += n) {
        n = dr_min(len - done, dr_min((size_t)f->export.max, NBD_WRITE_MAX));
        struct nbd_request q = {.command = NBD_WRITE,
                                .buf = (char *)buf + done,
                                .off = off + done,
                                .len = n,
                                .flags = flags};
        r = change(f, &q);
    }
    return r;
}

static size_t iov_bytes(const struct iovec *iov, int n)
{
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    return len;
}

static void gather(uint8_t *to, const struct iovec *iov, int n)
{
    for (int i = 0; i < n; i++) {
        memcpy(to, iov[i].iov_base, iov[i].iov_len);
        to += iov[i].iov_len;
    }
}

static int write_iov(struct nbd_file *f, const struct iovec *iov, int n, uint64_t off,
                     uint32_t flags)
{
    size_t len = iov_bytes(iov, n);
    CLEANUP_FREE uint8_t *joined = n > 1 ? malloc(len) : NULL;
    if (!dr_inside(off, len, f->export.size))
        return -ENOSPC;
    if (n > 1 && !joined)
        return -ENOMEM;
    if (joined)
        gather(joined, iov, n);
    int r = write_bytes(f, joined ? joined : iov[0].iov_base, off, len, flags);
    nbd_forget_extents(f);
    return r;
}

static int nbd_pwritev_file(struct dr_file *base, struct iovec *iov, int n, uint64_t off)
{
    return write_iov(nbd_of(base), iov, n, off, 0);
}

static int nbd_pwritev_durable(struct dr_file *base, struct iovec *iov, int n, uint64_t off)
{
    struct nbd_file *f = nbd_of(base);
    int r = write_iov(f, iov, n, off, f->export.fua ? LIBNBD_CMD_FLAG_FUA : 0);
    return r < 0 ? r : f->export.fua || !f->export.flush ? 0 : 1;
}

/* libnbd's own check for a request that does not cover whole blocks would name the request only. */
static int nbd_zero_file(struct dr_file *base, uint64_t off, uint64_t len, unsigned flags)
{
    struct nbd_file *f = nbd_of(base);
    bool fast = flags & DR_FILE_ZERO_FAST;
    uint32_t how = flags & DR_FILE_ZERO_PUNCH && !(flags & DR_FILE_ZERO_ALLOCATE)
                       ? 0
                       : LIBNBD_CMD_FLAG_NO_HOLE;
    int r = 0;
    if (!dr_inside(off, len, f->export.size))
        return -ENOSPC;
    if (!f->export.zero || (fast && !f->export.fast_zero))
        return -ENOTSUP;
    if (fast)
        how |= LIBNBD_CMD_FLAG_FAST_ZERO;
    for (uint64_t done = 0, n; r == 0 && done < len; done += n) {
        n = dr_min(len - done, ZERO_MAX);
        struct nbd_request q = {.command = NBD_ZERO, .off = off + done, .len = n, .flags = how};
        r = change(f, &q);
    }
    nbd_forget_extents(f);
    return r;
}

/* A server without flushes says of nothing whether it is durable: what it answered counts as that.
 */
int nbd_flush_now(struct nbd_file *f)
{
    struct nbd_request q = {.command = NBD_FLUSH};
    uint64_t number = nbd_kept_flush_begin(f);
    int r = check_lost(f);
    if (r == 0 && f->export.flush)
        r = request(f, &q);
    if (r == 0)
        nbd_kept_flushed(f, number);
    return r;
}

static int nbd_flush_file(struct dr_file *base)
{
    return nbd_flush_now(nbd_of(base));
}

static int nbd_truncate_file(struct dr_file *base, uint64_t size)
{
    return size == nbd_of(base)->export.size ? 0 : -ENOTSUP;
}

/* ------------------------------------------------------------------ the rest */

/* The text stays as it is until another request of the same thread fails. */
static const char *nbd_reason(struct dr_file *base, int r)
{
    static _Thread_local char text[400];
    struct nbd_file *f = nbd_of(base);
    if (r == -EIO && told_lost) {
        snprintf(text, sizeof(text), "what had been written may not be there: %s", f->why_lost);
        return text;
    }
    if (r == -EPROTO)
        return "the server's answer does not have the bytes that were asked for";
    if (r != -ENOTCONN)
        return NULL;
    DR_LOCK_SCOPE(&f->lock);
    snprintf(text, sizeof(text), "the connection to the server was lost and did not come back%s%s",
             f->why[0] ? ": " : "", f->why);
    return text;
}

static int nbd_upgrade(struct dr_file *base, struct dr_error *err)
{
    struct nbd_file *f = nbd_of(base);
    return f->export.read_only
               ? dr_fail(err, EROFS, "%s: the server lets nobody write to it", f->name)
               : 0;
}

static void nbd_free(struct nbd_file *f)
{
    nbd_disconnect(f);
    for (size_t i = 0; i < NBD_CONNECTIONS; i++)
        pthread_mutex_destroy(&f->connections[i].lock);
    pthread_mutex_destroy(&f->lock);
    pthread_mutex_destroy(&f->extent_lock);
    nbd_kept_destroy(&f->kept);
    pthread_cond_destroy(&f->changed);
    free(f->extents);
    free(f->uri);
    free(f->name);
    free(f->base.path);
    free(f);
}

static void nbd_close_file(struct dr_file *base)
{
    nbd_free(nbd_of(base));
}

static const struct dr_file_ops nbd_ops = {
    .name = "nbd",
    .close = nbd_close_file,
    .pread = nbd_pread_file,
    .pwritev = nbd_pwritev_file,
    .pwritev_durable = nbd_pwritev_durable,
    .extent = nbd_extent,
    .zero = nbd_zero_file,
    .truncate = nbd_truncate_file,
    .flush = nbd_flush_file,
    .upgrade = nbd_upgrade,
    .reason = nbd_reason,
};

static void init_locks(struct nbd_file *f)
{
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&f->changed, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_init(&f->lock, NULL);
    pthread_mutex_init(&f->extent_lock, NULL);
    nbd_kept_init(&f->kept);
    for (size_t i = 0; i < NBD_CONNECTIONS; i++) {
        f->connections[i].file = f;
        f->connections[i].wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        pthread_mutex_init(&f->connections[i].lock, NULL);
    }
}

/* The size is the server's affair, as that of a block device. */
static void fill_in(struct nbd_file *f)
{
    struct dr_file *base = &f->base;
    base->ops = &nbd_ops;
    base->size = f->export.size;
    base->atomic_size = 512;
    base->block_device = true;
    base->depth = DEPTH;
    base->read_align = base->write_align = f->export.align;
}

int dr_nbd_open(const struct dr_remote *remote, const char *name, unsigned flags,
                struct dr_file **file, struct dr_error *err)
{
    int loaded = dr_load_nbd(err);
    if (loaded < 0)
        return dr_prefix(err, loaded, "%s", name);
    struct nbd_file *f = calloc(1, sizeof(*f));
    if (!f)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    init_locks(f);
    f->uri = strdup(remote->uri);
    f->name = strdup(name);
    f->timeout = (unsigned)dr_max(remote->timeout, 1u);
    f->reconnect = remote->reconnect;
    int r = f->uri && f->name ? nbd_check_tls(f->uri, name, err)
                              : dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (r == 0)
        r = nbd_connect_first(f, err);
    if (r == 0 && (flags & DR_FILE_RDWR))
        r = nbd_upgrade(&f->base, err);
    if (r < 0) {
        nbd_free(f);
        return r;
    }
    fill_in(f);
    *file = &f->base;
    return 0;
}
