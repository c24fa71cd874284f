/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One thread, one poll() over all sockets. What is carried is small, so writing may wait. */
#include "cutting.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bytes.h"

#define PAIRS  24
#define BUFFER 65536

#define NBD_REQUEST    0x25609513u
#define NBD_SIMPLE     0x67446698u
#define NBD_STRUCTURED 0x668e33efu
#define REQUEST_BYTES  28u
#define COMMAND_READ   0u
#define COMMAND_WRITE  1u
#define COMMAND_LEAVE  2u

struct pair {
    int fd[2]; /* CUTTING_SERVER, CUTTING_CLIENT; -1 = free */
    uint64_t bytes[2];
    bool first;
    bool talking;     /* NBD: there has been a request */
    uint32_t payload; /* bytes of a write that still come; swallow: they go nowhere */
    bool swallow;
};

struct cutting {
    struct cutting_plan plan;
    struct cutting_seen seen;
    pthread_t thread;
    int listener, stop;
    bool cut; /* the one has been made */
    struct pair pairs[PAIRS];
    uint8_t buffer[BUFFER];
};

/* ------------------------------------------------------------------ carrying */

static void end_pair(struct pair *p)
{
    for (int side = 0; side < 2; side++) {
        close(p->fd[side]);
        p->fd[side] = -1;
    }
}

static bool send_all(int fd, const uint8_t *bytes, size_t n)
{
    while (n > 0) {
        ssize_t sent = send(fd, bytes, n, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        bytes += sent;
        n -= (size_t)sent;
    }
    return true;
}

/* How many of n bytes from this side may pass before the cut. */
static size_t allowed(const struct cutting *c, const struct pair *p, int side, size_t n)
{
    if (side != (int)c->plan.side || c->cut)
        return n;
    uint64_t count = c->plan.always ? p->bytes[side] : c->seen.bytes[side];
    return (size_t)dr_min(n, c->plan.after - dr_min(count, c->plan.after));
}

static bool is_time(const struct cutting *c, const struct pair *p)
{
    unsigned side = c->plan.side;
    return side != CUTTING_NEVER && !c->cut &&
           (c->plan.always ? p->bytes[side] : c->seen.bytes[side]) >= c->plan.after;
}

/* False: the connection is over. */
static bool carry(struct cutting *c, struct pair *p, int side, const uint8_t *bytes, size_t n)
{
    n = allowed(c, p, side, n);
    bool good = send_all(p->fd[!side], bytes, n);
    p->bytes[side] += n;
    c->seen.bytes[side] += n;
    if (p->first && !p->talking)
        c->seen.first[side] += n;
    if (!is_time(c, p))
        return good;
    c->cut = !c->plan.always;
    return false;
}

/* ------------------------------------------------------------------ requests of NBD */

/* Structured replies have been agreed on by every client and server here. */
static bool answer_error(struct pair *p, const uint8_t *request, int error)
{
    uint8_t reply[26] = {0};
    bool read = get_be16(request + 6) == COMMAND_READ;
    put_be32(reply, read ? NBD_STRUCTURED : NBD_SIMPLE);
    memcpy(reply + 8, request + 8, 8);
    if (!read) {
        put_be32(reply + 4, (uint32_t)error);
        return send_all(p->fd[CUTTING_CLIENT], reply, 16);
    }
    put_be16(reply + 4, 1);     /* the last chunk */
    put_be16(reply + 6, 32769); /* an error */
    put_be32(reply + 16, 6);
    put_be32(reply + 20, (uint32_t)error);
    return send_all(p->fd[CUTTING_CLIENT], reply, sizeof(reply));
}

static bool on_request(struct cutting *c, struct pair *p, const uint8_t *request)
{
    unsigned command = get_be16(request + 6);
    p->talking = true;
    p->payload = command == COMMAND_WRITE ? get_be32(request + 24) : 0;
    p->swallow = false;
    if (command == COMMAND_LEAVE)
        return carry(c, p, CUTTING_CLIENT, request, REQUEST_BYTES);
    unsigned number = ++c->seen.requests;
    p->swallow = c->plan.fail &&
                 (number == c->plan.fail || (c->plan.fail_on && number > c->plan.fail));
    return p->swallow ? answer_error(p, request, c->plan.fail_errno)
                      : carry(c, p, CUTTING_CLIENT, request, REQUEST_BYTES);
}

/* The client talks in whole requests once it has been greeted. */
static bool from_client(struct cutting *c, struct pair *p)
{
    int fd = p->fd[CUTTING_CLIENT];
    if (p->payload) {
        ssize_t n = recv(fd, c->buffer, dr_min((size_t)p->payload, (size_t)BUFFER), 0);
        if (n <= 0)
            return false;
        p->payload -= (uint32_t)n;
        return p->swallow || carry(c, p, CUTTING_CLIENT, c->buffer, (size_t)n);
    }
    ssize_t n = recv(fd, c->buffer, 4, MSG_PEEK | MSG_WAITALL);
    if (n == 4 && get_be32(c->buffer) == NBD_REQUEST)
        return recv(fd, c->buffer, REQUEST_BYTES, MSG_WAITALL) == REQUEST_BYTES &&
               on_request(c, p, c->buffer);
    n = recv(fd, c->buffer, BUFFER, 0);
    return n > 0 && carry(c, p, CUTTING_CLIENT, c->buffer, (size_t)n);
}

static bool from_server(struct cutting *c, struct pair *p)
{
    ssize_t n = recv(p->fd[CUTTING_SERVER], c->buffer, BUFFER, 0);
    return n > 0 && carry(c, p, CUTTING_SERVER, c->buffer, (size_t)n);
}

/* ------------------------------------------------------------------ sockets */

static int unix_socket(const char *path, struct sockaddr_un *name)
{
    *name = (struct sockaddr_un){.sun_family = AF_UNIX};
    strncpy(name->sun_path, path, sizeof(name->sun_path) - 1);
    return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

static int listen_somewhere(const char *path)
{
    struct sockaddr_un local;
    struct sockaddr_in port = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int fd = path ? unix_socket(path, &local) : socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int r = path ? bind(fd, (struct sockaddr *)&local, sizeof(local))
                 : bind(fd, (struct sockaddr *)&port, sizeof(port));
    if (fd >= 0 && (r < 0 || listen(fd, 64) < 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void take_client(struct cutting *c)
{
    struct sockaddr_un name;
    int client = accept4(c->listener, NULL, NULL, SOCK_CLOEXEC);
    int server = client < 0 ? -1 : unix_socket(c->plan.server, &name);
    struct pair *p = NULL;
    for (size_t i = 0; i < PAIRS && !p; i++)
        p = c->pairs[i].fd[0] < 0 ? &c->pairs[i] : NULL;
    if (client < 0)
        return;
    if (!p || connect(server, (struct sockaddr *)&name, sizeof(name)) < 0) {
        close(client);
        close(server);
        return;
    }
    *p = (struct pair){.fd = {server, client}, .first = c->seen.connections++ == 0};
    if (is_time(c, p)) { /* after 0 bytes */
        c->cut = !c->plan.always;
        end_pair(p);
    }
}

static void *run(void *user)
{
    struct cutting *c = user;
    for (;;) {
        struct pollfd fds[2 + 2 * PAIRS] = {{.fd = c->stop, .events = POLLIN},
                                            {.fd = c->listener, .events = POLLIN}};
        for (unsigned i = 0; i < 2 * PAIRS; i++)
            fds[2 + i] = (struct pollfd){.fd = c->pairs[i / 2].fd[i % 2], .events = POLLIN};
        if (poll(fds, 2 + 2 * PAIRS, -1) < 0)
            continue;
        if (fds[0].revents)
            return NULL;
        for (unsigned i = 0; i < 2 * PAIRS; i++) {
            struct pair *p = &c->pairs[i / 2];
            if (fds[2 + i].revents && p->fd[0] >= 0 &&
                !(i % 2 ? from_client(c, p) : from_server(c, p)))
                end_pair(p);
        }
        if (fds[1].revents)
            take_client(c);
    }
}

struct cutting *cutting_start(const struct cutting_plan *plan)
{
    struct cutting *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->plan = *plan;
    for (size_t i = 0; i < PAIRS; i++)
        c->pairs[i].fd[0] = c->pairs[i].fd[1] = -1;
    c->stop = eventfd(0, EFD_CLOEXEC);
    c->listener = listen_somewhere(plan->path);
    if (c->listener >= 0 && pthread_create(&c->thread, NULL, run, c) == 0)
        return c;
    close(c->stop);
    close(c->listener);
    free(c);
    return NULL;
}

unsigned cutting_port(const struct cutting *c)
{
    struct sockaddr_in name;
    socklen_t len = sizeof(name);
    return getsockname(c->listener, (struct sockaddr *)&name, &len) < 0 ? 0 : ntohs(name.sin_port);
}

void cutting_stop(struct cutting *c, struct cutting_seen *seen)
{
    (void)!write(c->stop, &(uint64_t){1}, sizeof(uint64_t));
    pthread_join(c->thread, NULL);
    for (size_t i = 0; i < PAIRS; i++)
        if (c->pairs[i].fd[0] >= 0)
            end_pair(&c->pairs[i]);
    if (seen)
        *seen = c->seen;
    close(c->listener);
    close(c->stop);
    if (c->plan.path)
        unlink(c->plan.path);
    free(c);
}
