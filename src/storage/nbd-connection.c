/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The connections of an NBD file: making them, keeping them going, making them anew. */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/thread.h"
#include "storage/nbd.h"

#define BUSY_ENOUGH 4u /* requests on each connection before another one is made */
#define RETRY_FIRST 50 /* milliseconds between attempts, doubled up to: */
#define RETRY_LAST  2000
#define BRIEF       2u   /* seconds: a connection that lived for less is not made anew at once */
#define GOODBYE     1000 /* milliseconds for the server to close its end */

uint64_t nbd_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec + 1; /* never 0 */
}

static int64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void nbd_wake(struct nbd_connection *c)
{
    (void)!write(c->wake, &(uint64_t){1}, sizeof(uint64_t));
}

/* ------------------------------------------------------------------ the protocol's steps */

static bool is_over(struct nbd_handle *h)
{
    return nbd_aio_is_dead(h) > 0 || nbd_aio_is_closed(h) > 0;
}

/* Wait for the socket, or for somebody to wake us, and let libnbd do what it can. Requests that
 * were answered are told so from in here. */
static void step(struct nbd_connection *c, struct nbd_handle *h, int timeout)
{
    unsigned direction = nbd_aio_get_direction(h);
    struct pollfd fds[2] = {{.fd = nbd_aio_get_fd(h)}, {.fd = c->wake, .events = POLLIN}};
    uint64_t count;
    if (direction & LIBNBD_AIO_DIRECTION_READ)
        fds[0].events |= POLLIN;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        fds[0].events |= POLLOUT;
    if (poll(fds, 2, timeout) <= 0)
        return;
    if (fds[1].revents)
        (void)!read(c->wake, &count, sizeof(count));
    if (fds[0].revents)
        atomic_store(&c->heard, nbd_seconds());
    /* The direction may have changed by a request that came meanwhile. */
    direction = nbd_aio_get_direction(h);
    if ((fds[0].revents & (POLLIN | POLLHUP | POLLERR)) && (direction & LIBNBD_AIO_DIRECTION_READ))
        nbd_aio_notify_read(h);
    else if ((fds[0].revents & (POLLOUT | POLLHUP | POLLERR)) &&
             (direction & LIBNBD_AIO_DIRECTION_WRITE))
        nbd_aio_notify_write(h);
}

static struct nbd_handle *new_handle(void)
{
    struct nbd_handle *h = nbd_create();
    if (h && (nbd_add_meta_context(h, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0 ||
              nbd_set_pread_initialize(h, false) < 0 ||
              nbd_set_uri_allow_transports(h, LIBNBD_ALLOW_TRANSPORT_TCP |
                                                  LIBNBD_ALLOW_TRANSPORT_UNIX) < 0 ||
              nbd_set_uri_allow_local_file(h, true) < 0)) {
        nbd_close(h);
        h = NULL;
    }
    return h;
}

static int note_why(struct nbd_connection *c, const char *text)
{
    snprintf(c->why, sizeof(c->why), "%s", text ? text : "the connection was closed");
    return -ENOTCONN;
}

/* libnbd says first which of its functions has failed. */
static const char *libnbd_reason(void)
{
    const char *text = nbd_get_error();
    const char *colon = text ? strstr(text, ": ") : NULL;
    return colon && strncmp(text, "nbd_", 4) == 0 ? colon + 2 : text;
}

/* A connection that is ready, or -errno, and the reason in c->why. */
static int handshake(struct nbd_connection *c, struct nbd_handle **out)
{
    struct nbd_file *f = c->file;
    int64_t end = milliseconds() + (int64_t)f->timeout * 1000, left = 1;
    struct nbd_handle *h = new_handle();
    *out = NULL;
    if (!h)
        return note_why(c, libnbd_reason());
    int r = nbd_aio_connect_uri(h, f->uri) < 0 ? note_why(c, libnbd_reason()) : 0;
    while (r == 0 && nbd_aio_is_connecting(h) > 0 && (left = end - milliseconds()) > 0 &&
           !atomic_load(&f->stop))
        step(c, h, (int)dr_min((uint64_t)left, 1000u));
    if (r == 0 && left <= 0)
        r = note_why(c, "the server does not answer");
    else if (r == 0 && nbd_aio_is_ready(h) <= 0)
        r = note_why(c, libnbd_reason());
    if (r < 0)
        nbd_close(h);
    else
        *out = h;
    return r;
}

/* ------------------------------------------------------------------ what the server has */

static bool is_power_of_two(int64_t n)
{
    return n > 0 && (n & (n - 1)) == 0;
}

static int read_export(struct nbd_connection *c, struct nbd_handle *h, struct nbd_export *e)
{
    int64_t size = nbd_get_size(h), least = nbd_get_block_size(h, LIBNBD_SIZE_MINIMUM);
    int64_t most = nbd_get_block_size(h, LIBNBD_SIZE_MAXIMUM);
    char text[128];
    if (size < 0)
        return note_why(c, "the server says a size that no disk can have");
    if (least > 65536 || (least > 0 && !is_power_of_two(least))) {
        snprintf(text, sizeof(text),
                 "the server wants blocks of %lld bytes, at most 65536 are possible",
                 (long long)least);
        return note_why(c, text);
    }
    *e = (struct nbd_export){
        .size = (uint64_t)size,
        .align = least > 1 ? (unsigned)least : 1,
        .max = most > 0 ? (uint32_t)dr_min((uint64_t)most, 32u << 20) : 32u << 20,
        .read_only = nbd_is_read_only(h) > 0,
        .multi = nbd_can_multi_conn(h) > 0,
        .flush = nbd_can_flush(h) > 0,
        .fua = nbd_can_fua(h) > 0,
        .zero = nbd_can_zero(h) > 0,
        .fast_zero = nbd_can_fast_zero(h) > 0,
        .extents = nbd_can_meta_context(h, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0,
    };
    e->max = (uint32_t)dr_round_down(e->max, e->align);
    return e->max ? 0 : note_why(c, "the server takes no request of one block");
}

/* -ESTALE: another disk is there now. */
static int check_export(struct nbd_connection *c, struct nbd_handle *h)
{
    struct nbd_export now;
    const struct nbd_export *was = &c->file->export;
    int r = read_export(c, h, &now);
    if (r < 0)
        return r;
    if (now.size == was->size && now.align == was->align && now.max >= was->max &&
        now.read_only <= was->read_only && now.flush >= was->flush && now.fua >= was->fua &&
        now.zero >= was->zero && now.fast_zero >= was->fast_zero && now.extents >= was->extents)
        return 0;
    note_why(c, "the server has another disk under this name now");
    return -ESTALE;
}

/* ------------------------------------------------------------------ states */

/* Under file->lock. */
static bool any_up(const struct nbd_file *f)
{
    for (size_t i = 0; i < NBD_CONNECTIONS; i++)
        if (f->connections[i].state == NBD_UP)
            return true;
    return false;
}

static void set_state(struct nbd_connection *c, enum nbd_state state)
{
    struct nbd_file *f = c->file;
    DR_LOCK_SCOPE(&f->lock);
    c->state = state;
    bool up = any_up(f);
    if (up)
        f->down_since = 0;
    else if (!f->down_since)
        f->down_since = nbd_seconds();
    if (!up)
        snprintf(f->why, sizeof(f->why), "%s", c->why);
    pthread_cond_broadcast(&f->changed);
}

/* Exchange the handle; requests that the old one had have all been told of its end. */
static void give_handle(struct nbd_connection *c, struct nbd_handle *h)
{
    pthread_mutex_lock(&c->lock);
    struct nbd_handle *old = c->handle;
    c->handle = h;
    pthread_mutex_unlock(&c->lock);
    nbd_close(old);
}

/* ------------------------------------------------------------------ the thread */

static unsigned requests_of(struct nbd_connection *c)
{
    DR_LOCK_SCOPE(&c->file->lock);
    return c->in_flight;
}

/* With the socket shut down, libnbd finds the end of the stream and tells all requests. */
static void give_up_silent(struct nbd_connection *c)
{
    if (requests_of(c) == 0 || nbd_seconds() < atomic_load(&c->heard) + c->file->timeout)
        return;
    note_why(c, "the server does not answer");
    shutdown(nbd_aio_get_fd(c->handle), SHUT_RDWR);
    atomic_store(&c->heard, nbd_seconds());
}

static void serve(struct nbd_connection *c)
{
    c->why[0] = '\0';
    while (!atomic_load(&c->file->stop) && !is_over(c->handle)) {
        step(c, c->handle, 1000);
        if (!is_over(c->handle))
            give_up_silent(c);
    }
}

/* Wait that long, less if the file is closed. */
static void pause_for(const struct nbd_connection *c, int ms)
{
    int64_t end = milliseconds() + ms, left;
    struct pollfd wake = {.fd = c->wake, .events = POLLIN};
    uint64_t count;
    while (!atomic_load(&c->file->stop) && (left = end - milliseconds()) > 0)
        if (poll(&wake, 1, (int)left) > 0)
            (void)!read(c->wake, &count, sizeof(count));
}

/* True: the connection is up. False: it never will be, or nobody wants it any more. */
static bool connect_again(struct nbd_connection *c)
{
    struct nbd_file *f = c->file;
    bool first = c == &f->connections[0];
    for (int wait = RETRY_FIRST; !atomic_load(&f->stop);
         wait = wait < RETRY_LAST ? 2 * wait : wait) {
        struct nbd_handle *h;
        int r = handshake(c, &h);
        if (r == 0 && (r = check_export(c, h)) < 0)
            nbd_close(h);
        if (r == 0) {
            atomic_store(&c->heard, nbd_seconds());
            give_handle(c, h);
            set_state(c, NBD_UP);
            return true;
        }
        set_state(c, r == -ESTALE || !first ? NBD_USELESS : NBD_DOWN);
        if (r == -ESTALE || !first)
            return false;
        pause_for(c, wait);
    }
    return false;
}

/* What was answered and not flushed may be gone with the server. */
static void lose(struct nbd_connection *c)
{
    if (atomic_load(&c->file->written) != atomic_load(&c->file->flushed))
        atomic_store(&c->file->lost, true);
    if (!c->why[0])
        note_why(c, nbd_aio_is_dead(c->handle) > 0 ? libnbd_reason() : NULL);
    set_state(c, NBD_DOWN);
}

static void *run(void *user)
{
    struct nbd_connection *c = user;
    bool up = c->handle || connect_again(c);
    while (up) {
        uint64_t born = nbd_seconds();
        serve(c);
        if (atomic_load(&c->file->stop))
            break;
        lose(c);
        if (nbd_seconds() < born + BRIEF)
            pause_for(c, RETRY_FIRST);
        up = connect_again(c);
    }
    return NULL;
}

static int start(struct nbd_connection *c)
{
    int r = dr_thread_start(&c->thread, run, c);
    c->started = r == 0;
    return -r;
}

/* ------------------------------------------------------------------ for the file */

int nbd_connect_first(struct nbd_file *f, struct dr_error *err)
{
    struct nbd_connection *c = &f->connections[0];
    struct nbd_handle *h = NULL;
    for (size_t i = 0; i < NBD_CONNECTIONS; i++)
        if (f->connections[i].wake < 0)
            return dr_fail(err, EMFILE, "%s: too many files are open", f->name);
    int r = handshake(c, &h);
    if (r == 0)
        r = read_export(c, h, &f->export);
    c->handle = h;
    if (r < 0)
        return dr_fail(err, -r, "%s: cannot connect: %s", f->name, c->why);
    c->state = NBD_UP;
    atomic_store(&c->heard, nbd_seconds());
    r = start(c);
    return r < 0 ? dr_fail_errno(err, -r, "%s: cannot start a thread", f->name) : 0;
}

/* Say goodbye, so that the server does not report an error; but do not wait for it for long. */
static void leave(struct nbd_connection *c)
{
    int64_t end = milliseconds() + GOODBYE, left;
    if (!c->handle || nbd_aio_disconnect(c->handle, 0) < 0)
        return;
    while (!is_over(c->handle) && (left = end - milliseconds()) > 0)
        step(c, c->handle, (int)left);
}

void nbd_disconnect(struct nbd_file *f)
{
    atomic_store(&f->stop, true);
    for (size_t i = 0; i < NBD_CONNECTIONS; i++) {
        struct nbd_connection *c = &f->connections[i];
        if (c->started) {
            nbd_wake(c);
            pthread_join(c->thread, NULL);
        }
        leave(c);
        nbd_close(c->handle);
        if (c->wake >= 0)
            close(c->wake);
    }
}

/* The one with the fewest requests; under f->lock. */
static struct nbd_connection *least_busy(struct nbd_file *f)
{
    struct nbd_connection *best = NULL;
    for (size_t i = 0; i < NBD_CONNECTIONS; i++) {
        struct nbd_connection *c = &f->connections[i];
        if (c->state == NBD_UP && (!best || c->in_flight < best->in_flight))
            best = c;
    }
    return best;
}

/* All are busy: make another one, for the requests that come next. Under f->lock. */
static void want_more(struct nbd_file *f, const struct nbd_connection *best)
{
    if (!f->export.multi || best->in_flight < BUSY_ENOUGH)
        return;
    for (size_t i = 0; i < NBD_CONNECTIONS; i++) {
        struct nbd_connection *c = &f->connections[i];
        if (c->state == NBD_DOWN)
            return;
        if (c->state == NBD_IDLE) {
            c->state = start(c) < 0 ? NBD_USELESS : NBD_DOWN;
            return;
        }
    }
}

struct nbd_connection *nbd_pick(struct nbd_file *f)
{
    DR_LOCK_SCOPE(&f->lock);
    struct nbd_connection *c;
    while (!(c = least_busy(f))) {
        struct timespec until = {.tv_sec = (time_t)(f->down_since - 1 + f->reconnect)};
        if (f->connections[0].state == NBD_USELESS || nbd_seconds() >= f->down_since + f->reconnect)
            return NULL;
        pthread_cond_timedwait(&f->changed, &f->lock, &until);
    }
    want_more(f, c);
    /* A connection on which nothing was under way has heard nothing for good reasons. */
    if (c->in_flight++ == 0)
        atomic_store(&c->heard, nbd_seconds());
    return c;
}

void nbd_put(struct nbd_connection *c)
{
    DR_LOCK_SCOPE(&c->file->lock);
    c->in_flight--;
}
