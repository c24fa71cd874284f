/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "volatile-nbd.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bytes.h"

#define SECTOR        512u
#define CLIENTS       4096 /* over its life */
#define REQUEST       28u
#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC   0x67446698u

enum command { COMMAND_READ, COMMAND_WRITE, COMMAND_LEAVE, COMMAND_FLUSH, COMMAND_ZERO = 6 };

#define FLAG_FUA 1u

struct client {
    struct volatile_nbd *server;
    pthread_t thread;
    int fd;
    unsigned life; /* the power's, when it came */
};

struct volatile_nbd {
    struct volatile_plan plan;
    int listener;
    pthread_t thread;
    pthread_mutex_t lock; /* all below */
    uint8_t *now, *durable;
    struct volatile_seen seen;
    unsigned life; /* power cuts so far */
    bool stop;
    unsigned n_clients;
    struct client clients[CLIENTS];
};

/* ------------------------------------------------------------------ power */

/* Under the lock. */
static void cut(struct volatile_nbd *s)
{
    for (uint64_t off = 0; off < s->plan.size; off += SECTOR) {
        size_t n = (size_t)dr_min((uint64_t)SECTOR, s->plan.size - off);
        if (s->plan.lose_all || memcmp(s->now + off, s->durable + off, n) == 0 ||
            rand_r(&s->plan.seed) % 2)
            memcpy(s->now + off, s->durable + off, n);
        else
            memcpy(s->durable + off, s->now + off, n);
    }
    s->life++;
    s->seen.cuts++;
    s->plan.flags = s->plan.then_flags;
    for (unsigned i = 0; i < s->n_clients && !s->plan.silent; i++)
        shutdown(s->clients[i].fd, SHUT_RDWR);
}

/* Counts bytes up to the planned cut: how many of n may pass. */
static size_t count(struct volatile_nbd *s, struct client *c, uint64_t *seen, uint64_t after,
                    size_t n)
{
    pthread_mutex_lock(&s->lock);
    bool alive = c->life == s->life && !s->stop,
         over = after && !s->seen.cuts && *seen + n >= after;
    n = !alive ? 0 : over ? (size_t)(after - *seen) : n;
    *seen += n;
    pthread_mutex_unlock(&s->lock);
    return n;
}

static void cut_if_due(struct volatile_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    if (!s->seen.cuts && ((s->plan.after_in && s->seen.in >= s->plan.after_in) ||
                          (s->plan.after_out && s->seen.out >= s->plan.after_out)))
        cut(s);
    pthread_mutex_unlock(&s->lock);
}

/* ------------------------------------------------------------------ bytes */

static bool is_alive(struct client *c)
{
    pthread_mutex_lock(&c->server->lock);
    bool alive = c->life == c->server->life && !c->server->stop;
    pthread_mutex_unlock(&c->server->lock);
    return alive;
}

static bool take(struct client *c, void *buf, size_t n)
{
    struct volatile_nbd *s = c->server;
    for (size_t done = 0; done < n;) {
        ssize_t got = recv(c->fd, (char *)buf + done, n - done, 0);
        if (got <= 0)
            return false;
        done += count(s, c, &s->seen.in, s->plan.after_in, (size_t)got);
        cut_if_due(s);
        if (!is_alive(c))
            return false;
    }
    return true;
}

static bool give(struct client *c, const void *buf, size_t n)
{
    struct volatile_nbd *s = c->server;
    n = count(s, c, &s->seen.out, s->plan.after_out, n);
    for (size_t done = 0; done < n;) {
        ssize_t sent = send(c->fd, (const char *)buf + done, n - done, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        done += (size_t)sent;
    }
    cut_if_due(s);
    return is_alive(c);
}

/* ------------------------------------------------------------------ requests */

static bool greet(struct client *c)
{
    struct volatile_nbd *s = c->server;
    uint8_t hello[152] = "NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53";
    pthread_mutex_lock(&s->lock);
    unsigned has = s->plan.flags;
    put_be64(hello + 16, s->seen.cuts ? s->plan.then_size : s->plan.size);
    pthread_mutex_unlock(&s->lock);
    put_be32(hello + 24, 1u | (has & VOLATILE_READ_ONLY ? 2u : 0) |
                             (has & VOLATILE_FLUSH ? 4u : 0) | (has & VOLATILE_FUA ? 8u : 0) |
                             (has & VOLATILE_ZEROES ? 64u : 0) |
                             (has & VOLATILE_MULTI_CONN ? 256u : 0));
    return give(c, hello, sizeof(hello));
}

/* Power that went meanwhile has the request undone, and the answer is not sent. */
static int execute(struct client *c, unsigned command, unsigned flags, uint64_t off, uint32_t len,
                   uint8_t *data)
{
    struct volatile_nbd *s = c->server;
    bool changes = command == COMMAND_WRITE || command == COMMAND_ZERO;
    if (command != COMMAND_FLUSH && !dr_inside(off, len, s->plan.size))
        return EINVAL;
    if (c->life != s->life)
        return EIO;
    if (changes && s->seen.cuts && s->plan.then_errno)
        return s->plan.then_errno;
    if (command == COMMAND_READ)
        memcpy(data, s->now + off, len);
    if (command == COMMAND_WRITE)
        memcpy(s->now + off, data, len);
    if (command == COMMAND_ZERO)
        memset(s->now + off, 0, len);
    if (command == COMMAND_FLUSH)
        memcpy(s->durable, s->now, s->plan.size);
    if (changes && (flags & FLAG_FUA))
        memcpy(s->durable + off, s->now + off, len);
    s->seen.writes += changes;
    s->seen.flushes += command == COMMAND_FLUSH;
    return 0;
}

static bool serve_one(struct client *c, const uint8_t *request)
{
    struct volatile_nbd *s = c->server;
    unsigned flags = get_be16(request + 4), command = get_be16(request + 6);
    uint64_t off = get_be64(request + 16);
    uint32_t len = get_be32(request + 24);
    bool data = command == COMMAND_READ || command == COMMAND_WRITE;
    uint8_t reply[16];
    if (get_be32(request) != REQUEST_MAGIC || command == COMMAND_LEAVE)
        return false;
    uint8_t *bytes = data ? malloc(len + 1) : NULL;
    bool good = command != COMMAND_WRITE || take(c, bytes, len);
    if (good) {
        pthread_mutex_lock(&s->lock);
        int error = execute(c, command, flags, off, len, bytes);
        pthread_mutex_unlock(&s->lock);
        put_be32(reply, REPLY_MAGIC);
        put_be32(reply + 4, (uint32_t)error);
        memcpy(reply + 8, request + 8, 8);
        good = give(c, reply, sizeof(reply)) &&
               (command != COMMAND_READ || error || give(c, bytes, len));
    }
    free(bytes);
    return good;
}

static void *serve(void *user)
{
    struct client *c = user;
    uint8_t request[REQUEST], rest[4096];
    bool good = greet(c);
    while (good)
        good = take(c, request, sizeof(request)) && serve_one(c, request);
    /* A server without power does not even hang up. */
    while (c->server->plan.silent && recv(c->fd, rest, sizeof(rest), 0) > 0)
        ;
    shutdown(c->fd, SHUT_RDWR);
    return NULL;
}

static void *accept_all(void *user)
{
    struct volatile_nbd *s = user;
    for (;;) {
        int fd = accept(s->listener, NULL, NULL);
        pthread_mutex_lock(&s->lock);
        bool room = fd >= 0 && !s->stop && s->n_clients < CLIENTS;
        struct client *c = &s->clients[s->n_clients];
        if (room) {
            *c = (struct client){.server = s, .fd = fd, .life = s->life};
            s->n_clients++;
            s->seen.connections++;
            if (pthread_create(&c->thread, NULL, serve, c) != 0)
                abort();
        }
        pthread_mutex_unlock(&s->lock);
        if (!room) {
            if (fd >= 0)
                close(fd);
            return NULL;
        }
    }
}

/* ------------------------------------------------------------------ for tests */

struct volatile_nbd *volatile_start(const struct volatile_plan *plan)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct volatile_nbd *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->plan = *plan;
    s->now = calloc(1, plan->size + 1);
    s->durable = calloc(1, plan->size + 1);
    pthread_mutex_init(&s->lock, NULL);
    strncpy(name.sun_path, plan->path, sizeof(name.sun_path) - 1);
    s->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!s->now || !s->durable || bind(s->listener, (struct sockaddr *)&name, sizeof(name)) < 0 ||
        listen(s->listener, 64) < 0 || pthread_create(&s->thread, NULL, accept_all, s) != 0)
        abort();
    return s;
}

void volatile_cut(struct volatile_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    cut(s);
    pthread_mutex_unlock(&s->lock);
}

void volatile_hang_up(struct volatile_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    if (s->n_clients > 0)
        shutdown(s->clients[s->n_clients - 1].fd, SHUT_RDWR);
    pthread_mutex_unlock(&s->lock);
}

bool volatile_holds(struct volatile_nbd *s, const void *bytes, uint64_t off, uint64_t len)
{
    pthread_mutex_lock(&s->lock);
    bool same = memcmp(s->durable + off, bytes, len) == 0;
    pthread_mutex_unlock(&s->lock);
    return same;
}

struct volatile_seen volatile_look(struct volatile_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    struct volatile_seen seen = s->seen;
    pthread_mutex_unlock(&s->lock);
    return seen;
}

void volatile_stop(struct volatile_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    s->stop = true;
    for (unsigned i = 0; i < s->n_clients; i++)
        shutdown(s->clients[i].fd, SHUT_RDWR);
    pthread_mutex_unlock(&s->lock);
    shutdown(s->listener, SHUT_RDWR);
    pthread_join(s->thread, NULL);
    for (unsigned i = 0; i < s->n_clients; i++) {
        pthread_join(s->clients[i].thread, NULL);
        close(s->clients[i].fd);
    }
    close(s->listener);
    unlink(s->plan.path);
    free(s->now);
    free(s->durable);
    free(s);
}
