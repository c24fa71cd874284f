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
#define LEAVE_MAX   5u   /* seconds without an answer before one that shall end is hung up on */
#define GOODBYE     1000 /* milliseconds for the server to close its end */

#define LOST_BEFORE "the connection to the server was lost before it was flushed, and "

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

bool nbd_is_over(struct nbd_handle *h)
{
    return nbd_aio_is_dead(h) > 0 || nbd_aio_is_closed(h) > 0;
}

/* Wait for the socket, or for somebody to wake us, and let libnbd do what it can. Requests that
 * were answered are told so from in here. */
void nbd_step(struct nbd_connection *c, struct nbd_handle *h, int timeout)
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

int nbd_note_why(struct nbd_connection *c, const char *text)
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
        return nbd_note_why(c, libnbd_reason());
    int r = nbd_aio_connect_uri(h, f->uri) < 0 ? nbd_note_why(c, libnbd_reason()) : 0;
    while (r == 0 && nbd_aio_is_connecting(h) > 0 && (left = end - milliseconds()) > 0 &&
           !atomic_load(&f->stop))
        nbd_step(c, h, (int)dr_min((uint64_t)left, 1000u));
    if (r == 0 && left <= 0)
        r = nbd_note_why(c, "the server does not answer");
    else if (r == 0 && nbd_aio_is_ready(h) <= 0)
        r = nbd_note_why(c, libnbd_reason());
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
        return nbd_note_why(c, "the server says a size that no disk can have");
    if (least > 65536 || (least > 0 && !is_power_of_two(least))) {
        snprintf(text, sizeof(text),
                 "the server wants blocks of %lld bytes, at most 65536 are possible",
                 (long long)least);
        return nbd_note_why(c, text);
    }
    if (least > 1 && size % least != 0) {
        snprintf(text, sizeof(text),
                 "the server has %lld bytes, which is no multiple of its blocks of %lld",
                 (long long)size, (long long)least);
        return nbd_note_why(c, text);
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
    return e->max ? 0 : nbd_note_why(c, "the server takes no request of one block");
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
        now.zero >= was->zero && now.fast_zero >= was->fast_zero && now.extents >= was->extents &&
        now.multi >= was->multi)
        return 0;
    nbd_note_why(c, "the server has another disk under this name now");
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

/* Under file->lock. */
static void note_state(struct nbd_connection *c, enum nbd_state state)
{
    struct nbd_file *f = c->file;
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

static void set_state(struct nbd_connection *c, enum nbd_state state)
{
    DR_LOCK_SCOPE(&c->file->lock);
    note_state(c, state);
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

/* ------------------------------------------------------------------ serving requests */

/* Requests that it has, and whether it shall end after them. */
static unsigned requests_of(struct nbd_connection *c, bool *leaving)
{
    DR_LOCK_SCOPE(&c->file->lock);
    *leaving = c->state == NBD_LEAVING;
    return c->in_flight;
}

/* With the socket shut down, libnbd finds the end of the stream and tells all requests. */
static void hang_up(struct nbd_connection *c, const char *why)
{
    nbd_note_why(c, why);
    shutdown(nbd_aio_get_fd(c->handle), SHUT_RDWR);
    atomic_store(&c->heard, nbd_seconds());
}

/* False: it is to end, and has nothing under way any more. */
static bool go_on(struct nbd_connection *c)
{
    bool leaving;
    unsigned n = requests_of(c, &leaving);
    uint64_t patience = leaving ? dr_min(c->file->timeout, LEAVE_MAX) : c->file->timeout;
    if (n > 0 && nbd_seconds() >= atomic_load(&c->heard) + patience)
        hang_up(c, "the server does not answer");
    return n > 0 || !leaving;
}

static void serve(struct nbd_connection *c)
{
    c->why[0] = '\0';
    while (!atomic_load(&c->file->stop) && !nbd_is_over(c->handle) && go_on(c))
        nbd_step(c, c->handle, 1000);
}

/* Say goodbye, so that the server does not report an error; but do not wait for it for long. */
static void leave(struct nbd_connection *c)
{
    int64_t end = milliseconds() + GOODBYE, left;
    if (!c->handle || nbd_aio_disconnect(c->handle, 0) < 0)
        return;
    while (!nbd_is_over(c->handle) && (left = end - milliseconds()) > 0)
        nbd_step(c, c->handle, (int)left);
}

/* The file is being closed; only other connections' threads may still have a request here. */
static void abandon(struct nbd_connection *c)
{
    bool leaving;
    set_state(c, NBD_USELESS);
    while (c->handle && !nbd_is_over(c->handle) && requests_of(c, &leaving) > 0) {
        hang_up(c, NULL);
        nbd_step(c, c->handle, 100);
    }
}

/* ------------------------------------------------------------------ coming up */

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

static bool is_first(const struct nbd_connection *c)
{
    return c == &c->file->connections[0];
}

/* The others follow the first, which writes again what is kept. False: it will never be up. */
static bool wait_for_first(struct nbd_connection *c)
{
    struct nbd_file *f = c->file;
    DR_LOCK_SCOPE(&f->lock);
    while (!atomic_load(&f->stop) && f->connections[0].state != NBD_UP &&
           f->connections[0].state != NBD_USELESS)
        pthread_cond_wait(&f->changed, &f->lock);
    return !atomic_load(&f->stop) && f->connections[0].state == NBD_UP;
}

/* Does the server answer on this one, if it is up? */
static bool probe(struct nbd_file *f, struct nbd_connection *c)
{
    char block[65536];
    struct nbd_request q = {.command = NBD_READ, .buf = block, .len = f->export.align, .file = f};
    pthread_mutex_lock(&f->lock);
    bool up = c->state == NBD_UP;
    if (up && c->in_flight++ == 0)
        atomic_store(&c->heard, nbd_seconds());
    pthread_mutex_unlock(&f->lock);
    if (!up)
        return true;
    sem_init(&q.done, 0, 0);
    int r = nbd_ask(c, &q);
    sem_destroy(&q.done);
    nbd_put(c);
    return r != ENOTCONN;
}

/* See the head of nbd.h. */
static int probe_others(struct nbd_connection *c)
{
    struct nbd_file *f = c->file;
    bool good = true;
    if (f->export.size < f->export.align || nbd_kept_idle(f))
        return 0;
    for (size_t i = 0; i < NBD_CONNECTIONS; i++)
        if (&f->connections[i] != c)
            good &= probe(f, &f->connections[i]);
    return good ? 0 : nbd_note_why(c, "another connection was lost meanwhile");
}

/* Is any other connection in use? Under file->lock. */
static bool others_live(const struct nbd_connection *c)
{
    for (const struct nbd_connection *o = c->file->connections;
         o < c->file->connections + NBD_CONNECTIONS; o++)
        if (o != c && (o->state == NBD_UP || o->state == NBD_LEAVING))
            return true;
    return false;
}

/* Of the first one: write again what is kept, when the others are over. */
static int replay_if_wanted(struct nbd_connection *c, struct nbd_handle *h)
{
    struct nbd_file *f = c->file;
    char text[120];
    pthread_mutex_lock(&f->lock);
    while (f->replay && others_live(c) && !atomic_load(&f->stop))
        pthread_cond_wait(&f->changed, &f->lock);
    bool wanted = f->replay;
    pthread_mutex_unlock(&f->lock);
    if (!wanted)
        return 0;
    nbd_forget_extents(f);
    int r = atomic_load(&f->stop) ? -ENOTCONN : nbd_replay(c, h);
    if (r == -ENOTCONN)
        return r;
    if (r < 0) {
        snprintf(text, sizeof(text), LOST_BEFORE "the server did not take it again: %s",
                 strerrordesc_np(-r));
        nbd_lose(f, text);
    }
    DR_LOCK_SCOPE(&f->lock);
    f->replay = false;
    f->replayed_most = 0;
    return 0;
}

/* One connection after another. -ENOTCONN: it must be made anew. */
static int join(struct nbd_connection *c, struct nbd_handle *h)
{
    struct nbd_file *f = c->file;
    pthread_mutex_lock(&f->lock);
    while (f->joining && !atomic_load(&f->stop))
        pthread_cond_wait(&f->changed, &f->lock);
    f->joining = true;
    pthread_mutex_unlock(&f->lock);
    int r = is_first(c) ? replay_if_wanted(c, h) : 0;
    if (r == 0)
        r = probe_others(c);
    if (r == 0) {
        atomic_store(&c->heard, nbd_seconds());
        give_handle(c, h);
    }
    DR_LOCK_SCOPE(&f->lock);
    f->joining = false;
    if (r == 0 && f->replay)
        r = nbd_note_why(c, "another connection was lost meanwhile");
    else if (r == 0)
        note_state(c, NBD_UP);
    pthread_cond_broadcast(&f->changed);
    return r;
}

/* True: the connection is up. False: it never will be, or nobody wants it any more. */
static bool connect_again(struct nbd_connection *c)
{
    struct nbd_file *f = c->file;
    bool first = is_first(c);
    for (int wait = RETRY_FIRST; !atomic_load(&f->stop);
         wait = wait < RETRY_LAST ? 2 * wait : wait) {
        struct nbd_handle *h = NULL;
        int r = first || wait_for_first(c) ? handshake(c, &h) : -ESTALE;
        if (r == 0)
            r = check_export(c, h);
        bool refused = r == -ESTALE || (r < 0 && !first);
        if (r == 0 && (r = join(c, h)) == 0)
            return true;
        if (h != c->handle)
            nbd_close(h);
        set_state(c, refused ? NBD_USELESS : NBD_DOWN);
        if (refused)
            return false;
        pause_for(c, wait);
    }
    return false;
}

/* ------------------------------------------------------------------ the end of one */

void nbd_lose(struct nbd_file *f, const char *why)
{
    pthread_mutex_lock(&f->lock);
    if (!atomic_load(&f->lost))
        snprintf(f->why_lost, sizeof(f->why_lost), "%s", why);
    atomic_store(&f->lost, true);
    f->replay = false;
    pthread_mutex_unlock(&f->lock);
    nbd_kept_drop(f);
}

/* What was answered and not flushed may be gone with the server. */
static void note_loss(struct nbd_connection *c)
{
    struct nbd_file *f = c->file;
    int kept = nbd_kept_any(f);
    if (kept < 0)
        nbd_lose(f, LOST_BEFORE "more had been written than is kept in memory");
    if (!c->why[0])
        nbd_note_why(c, nbd_aio_is_dead(c->handle) > 0 ? libnbd_reason() : NULL);
    DR_LOCK_SCOPE(&f->lock);
    if (kept > 0 && !atomic_load(&f->lost))
        f->replay = true;
    for (size_t i = 0; f->replay && i < NBD_CONNECTIONS; i++)
        if (&f->connections[i] != c && f->connections[i].state == NBD_UP) {
            f->connections[i].state = NBD_LEAVING;
            nbd_wake(&f->connections[i]);
        }
    note_state(c, NBD_DOWN);
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
        if (!nbd_is_over(c->handle))
            leave(c);
        note_loss(c);
        if (nbd_seconds() < born + BRIEF)
            pause_for(c, RETRY_FIRST);
        up = connect_again(c);
    }
    abandon(c);
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

void nbd_disconnect(struct nbd_file *f)
{
    atomic_store(&f->stop, true);
    pthread_mutex_lock(&f->lock);
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
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
    if (--c->in_flight == 0 && c->state == NBD_LEAVING)
        nbd_wake(c);
}
