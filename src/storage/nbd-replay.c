/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing again what a server may have lost, over a new connection that only its thread uses yet.
 *
 * Requests go in the old order. Several are under way at once, but none that overlaps another: a
 * server may do them in any order. */
#include <sys/socket.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "storage/nbd.h"

#define DEPTH 16u

struct again {
    struct nbd_request q;
    bool sent, done; /* both: it was answered */
    struct replay *all;
};

struct replay {
    struct nbd_connection *c;
    struct nbd_handle *h;
    struct again slots[DEPTH];
    uint64_t answers;
    int error; /* the first of the server */
};

/* Called by libnbd, in the thread that waits for it. */
static int answered_again(void *user, int *error)
{
    struct again *a = user;
    a->done = true;
    a->all->answers++;
    if (*error && !a->all->error)
        a->all->error = *error;
    return 1;
}

/* Callers that wait for a connection wait on while more is written again than ever before. */
static void note_progress(struct replay *all)
{
    struct nbd_file *f = all->c->file;
    DR_LOCK_SCOPE(&f->lock);
    if (all->answers > f->replayed_most) {
        f->replayed_most = all->answers;
        f->down_since = nbd_seconds();
    }
}

static int wait_a_little(struct replay *all)
{
    struct nbd_connection *c = all->c;
    nbd_step(c, all->h, 1000);
    note_progress(all);
    if (nbd_is_over(all->h) || atomic_load(&c->file->stop))
        return nbd_note_why(c, "the server went away again");
    if (all->error == ESHUTDOWN)
        return nbd_note_why(c, "the server is ending");
    if (nbd_seconds() >= atomic_load(&c->heard) + c->file->timeout)
        return nbd_note_why(c, "the server does not answer");
    return -all->error;
}

static bool is_under_way(const struct again *a)
{
    return a->sent && !a->done;
}

/* A slot for this range, when nothing under way overlaps it. */
static struct again *find_slot(struct replay *all, uint64_t off, uint64_t len)
{
    struct again *found = NULL;
    for (struct again *a = all->slots; a < all->slots + DEPTH; a++) {
        if (!is_under_way(a))
            found = a;
        else if (off < a->q.off + a->q.len && a->q.off < off + len)
            return NULL;
    }
    return found;
}

static int send_one(struct replay *all, const struct nbd_request *q)
{
    struct again *a;
    while (!(a = find_slot(all, q->off, q->len))) {
        int r = wait_a_little(all);
        if (r < 0)
            return r;
    }
    *a = (struct again){.q = *q, .sent = true, .all = all};
    nbd_completion_callback done = {.callback = answered_again, .user_data = a};
    if (nbd_issue(all->h, &a->q, done) >= 0 || a->done)
        return 0; /* nbd_ask() says why the number does not count */
    a->sent = false;
    return nbd_is_over(all->h) || !nbd_get_errno()
               ? nbd_note_why(all->c, "the server went away again")
               : -nbd_get_errno();
}

static int wait_for_all(struct replay *all)
{
    int r = -all->error;
    for (size_t i = 0; r == 0 && i < DEPTH; i++)
        while (r == 0 && is_under_way(&all->slots[i]))
            r = wait_a_little(all);
    return r;
}

static int send_kept(struct replay *all)
{
    struct nbd_file *f = all->c->file;
    struct nbd_kept_write w;
    uint8_t *bytes;
    int r = 0;
    for (uint64_t i = 0; r == 0 && nbd_kept_next(f, &i, &w, &bytes); i++) {
        struct nbd_request q = {.command = w.zero ? NBD_ZERO : NBD_WRITE,
                                .buf = bytes,
                                .off = w.off,
                                .len = w.len,
                                .flags = w.flags & ~(uint32_t)LIBNBD_CMD_FLAG_FAST_ZERO,
                                .file = f};
        r = send_one(all, &q);
    }
    return r == 0 ? wait_for_all(all) : r;
}

static int flush(struct replay *all)
{
    struct nbd_file *f = all->c->file;
    struct nbd_request q = {.command = NBD_FLUSH, .file = f};
    if (!f->export.flush || (f->base.flags & DR_FILE_NO_FLUSH))
        return 0;
    uint64_t number = nbd_kept_flush_begin(f);
    int r = send_one(all, &q);
    if (r == 0)
        r = wait_for_all(all);
    if (r == 0)
        nbd_kept_flushed(f, number);
    return r;
}

/* What is still on its way reads the bytes that are kept, and its callbacks the slots. */
static void give_up(struct replay *all)
{
    shutdown(nbd_aio_get_fd(all->h), SHUT_RDWR);
    for (int tries = 0; tries < 100 && !nbd_is_over(all->h); tries++)
        nbd_step(all->c, all->h, 10);
}

int nbd_replay(struct nbd_connection *c, struct nbd_handle *h)
{
    struct replay all = {.c = c, .h = h};
    atomic_store(&c->heard, nbd_seconds());
    nbd_kept_hold(c->file, true);
    int r = send_kept(&all);
    if (r == 0)
        r = flush(&all);
    if (r < 0)
        give_up(&all);
    nbd_kept_hold(c->file, false);
    return r;
}
