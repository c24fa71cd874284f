/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Each connection has two threads: one passes requests on, the other replies. Requests for the
 * status of blocks are answered here where only our contexts are wanted; where the server's own is
 * wanted, too, ours go before its answer, which ends the reply. Everything else goes through as it
 * is. */
#include "cli/serve/relay.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "base/thread.h"

#define REQUEST_MAGIC UINT32_C(0x25609513)
#define SIMPLE_MAGIC  UINT32_C(0x67446698)
#define CHUNK_MAGIC   UINT32_C(0x668e33ef)

#define BUFFER       (256u << 10)
#define MOST_EXTENTS 8192u /* of one answer; a client asks again from where it ends */
#define FLAG_ONE     8u    /* of a request: only the first extent */
#define FLAG_DONE    1u    /* of a chunk: the last one */

enum request { WRITE = 1, TRIM = 4, WRITE_ZEROES = 6, BLOCK_STATUS = 7 };
enum chunk { CHUNK_STATUS = 5, CHUNK_ERROR = 32769 };
#define NBD_EIO    5u
#define NBD_EINVAL 22u

/* A request for the status of blocks that the server answers, too. */
struct asked {
    struct asked *next;
    uint64_t cookie, off;
    uint32_t len;
    bool one;
};

/* ------------------------------------------------------------------ bytes */

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Wait for something to read. False: the client takes too long. */
static bool is_patient(const struct link *l, int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    for (;;) {
        int64_t left = l->until - now_ms();
        int r = left > 0 ? poll(&p, 1, (int)left) : 0;
        if (r >= 0 || errno != EINTR)
            return r > 0;
    }
}

/* As recv(), up to len bytes. */
static ssize_t take_some(const struct link *l, int from, void *buf, size_t len)
{
    ssize_t got;
    if (l->until && !is_patient(l, from))
        return -1;
    do
        got = recv(from, buf, len, 0);
    while (got < 0 && errno == EINTR);
    return got;
}

bool link_take(const struct link *l, int from, void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t got = take_some(l, from, (char *)buf + done, len - done);
        if (got <= 0)
            return false;
        done += (size_t)got;
    }
    return true;
}

bool link_give(int to, const void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t sent = send(to, (const char *)buf + done, len - done, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return false;
        done += sent < 0 ? 0 : (size_t)sent;
    }
    return true;
}

bool link_pump(const struct link *l, int from, int to, uint64_t len)
{
    char *buf = malloc(BUFFER);
    bool well = buf != NULL;
    while (well && len > 0) {
        ssize_t got = take_some(l, from, buf, dr_min(len, BUFFER));
        well = got > 0 && link_give(to, buf, (size_t)got);
        len -= well ? (uint64_t)got : 0;
    }
    free(buf);
    return well;
}

/* ------------------------------------------------------------------ answers */

static bool give_chunk(const struct link *l, uint16_t type, uint16_t flags, uint64_t cookie,
                       const void *data, uint32_t len)
{
    uint8_t head[20];
    put_be32(head, CHUNK_MAGIC);
    put_be16(head + 4, flags);
    put_be16(head + 6, type);
    memcpy(head + 8, &cookie, 8);
    put_be32(head + 16, len);
    return link_give(l->client, head, sizeof(head)) && link_give(l->client, data, len);
}

static bool give_error(const struct link *l, uint64_t cookie, uint32_t error)
{
    uint8_t data[6];
    put_be32(data, error);
    put_be16(data + 4, 0);
    return give_chunk(l, CHUNK_ERROR, FLAG_DONE, cookie, data, sizeof(data));
}

/* What one context says; an error ends the reply. */
static bool give_context(const struct link *l, size_t context, const struct asked *a, bool last,
                         bool *failed)
{
    struct context_extent *extents = calloc(MOST_EXTENTS, sizeof(*extents));
    uint8_t *data = malloc(4 + 8 * MOST_EXTENTS);
    size_t n = 0;
    if (extents && data)
        n = contexts_tell(l->relay->contexts, context, a->off, a->len, extents,
                          a->one ? 1 : MOST_EXTENTS);
    *failed = n == 0;
    for (size_t i = 0; i < n; i++) {
        put_be32(data + 4 + 8 * i, extents[i].len);
        put_be32(data + 8 + 8 * i, extents[i].flags);
    }
    if (n > 0)
        put_be32(data, CONTEXT_FIRST_ID + (uint32_t)context);
    bool well = n > 0 ? give_chunk(l, CHUNK_STATUS, last ? FLAG_DONE : 0, a->cookie, data,
                                   4 + 8 * (uint32_t)n)
                      : give_error(l, a->cookie, NBD_EIO);
    free(data);
    free(extents);
    return well;
}

/* All that the client chose; alone: nobody else ends the reply. Under the lock. */
static bool give_contexts(const struct link *l, const struct asked *a, bool alone)
{
    const struct contexts *c = l->relay->contexts;
    size_t last = 0;
    bool failed = false;
    if (a->len == 0 || !dr_inside(a->off, a->len, c->size))
        return !alone || give_error(l, a->cookie, NBD_EINVAL);
    for (size_t i = 0; i < c->n; i++)
        last = l->selected[i] ? i : last;
    for (size_t i = 0; !failed && i <= last; i++)
        if (l->selected[i] && !give_context(l, i, a, alone && i == last, &failed))
            return false;
    return !failed || alone; /* the server's part would come behind an error */
}

/* ------------------------------------------------------------------ requests */

static bool take_question(struct link *l, const uint8_t *head, bool *ours)
{
    struct asked *a = malloc(sizeof(*a));
    if (!a)
        return false;
    *a = (struct asked){.off = get_be64(head + 16),
                        .len = get_be32(head + 24),
                        .one = get_be16(head + 4) & FLAG_ONE};
    memcpy(&a->cookie, head + 8, 8);
    *ours = !l->base;
    pthread_mutex_lock(&l->lock);
    bool well = l->base || give_contexts(l, a, true);
    if (l->base) {
        a->next = l->asked;
        l->asked = DR_STEAL(a);
    }
    pthread_mutex_unlock(&l->lock);
    free(a);
    return well;
}

static void pass_requests(struct link *l)
{
    struct contexts *c = l->relay->contexts;
    uint8_t head[28];
    while (link_take(l, l->client, head, sizeof(head)) && get_be32(head) == REQUEST_MAGIC) {
        uint16_t type = get_be16(head + 6);
        uint32_t len = get_be32(head + 24);
        bool ours = false;
        if (c && (type == WRITE || type == TRIM || type == WRITE_ZEROES))
            contexts_note(c, get_be64(head + 16), len);
        if (type == BLOCK_STATUS && l->any && !take_question(l, head, &ours))
            return;
        if (!ours && !link_give(l->server, head, sizeof(head)))
            return;
        if (type == WRITE && !link_pump(l, l->client, l->server, len))
            return;
    }
}

/* ------------------------------------------------------------------ replies */

/* The server answers this question, or says that it cannot: ours go before. Under the lock. */
static bool add_ours(struct link *l, const uint8_t *head)
{
    struct asked **at = &l->asked;
    uint64_t cookie;
    memcpy(&cookie, head + 8, 8);
    while (*at && (*at)->cookie != cookie)
        at = &(*at)->next;
    struct asked *a = *at;
    if (!a)
        return true;
    bool well = get_be16(head + 6) != CHUNK_STATUS || give_contexts(l, a, false);
    *at = a->next;
    free(a);
    return well;
}

static bool pass_chunk(struct link *l)
{
    uint8_t head[20];
    if (!link_take(l, l->server, head, 16))
        return false;
    bool chunk = get_be32(head) == CHUNK_MAGIC;
    if (!chunk && get_be32(head) != SIMPLE_MAGIC)
        return false;
    if (chunk && !link_take(l, l->server, head + 16, 4))
        return false;
    pthread_mutex_lock(&l->lock);
    bool well = !chunk || add_ours(l, head);
    well = well && link_give(l->client, head, chunk ? 20 : 16);
    if (well && chunk)
        well = link_pump(l, l->server, l->client, get_be32(head + 16));
    pthread_mutex_unlock(&l->lock);
    return well;
}

/* Simple replies to reads have data behind them; but where contexts were chosen, there are none. */
static void *pass_replies(void *user)
{
    struct link *l = user;
    if (l->any)
        while (pass_chunk(l))
            continue;
    else
        link_pump(l, l->server, l->client, UINT64_MAX);
    shutdown(l->client, SHUT_RDWR);
    shutdown(l->server, SHUT_RDWR);
    return NULL;
}

/* ------------------------------------------------------------------ connections */

static void use_export(struct link *l)
{
    pthread_t replies;
    l->until = 0;
    if (dr_thread_start(&replies, pass_replies, l) != 0)
        return;
    pass_requests(l);
    shutdown(l->server, SHUT_WR); /* what it still answers goes on to the client */
    pthread_join(replies, NULL);
}

static void end_link(struct link *l)
{
    for (struct asked *a = l->asked, *next; a; a = next) {
        next = a->next;
        free(a);
    }
    if (l->server >= 0)
        close(l->server);
    close(l->client);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

static bool reach_server(struct link *l)
{
    const struct sockaddr_un *address = &l->relay->server;
    l->server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return l->server >= 0 &&
           connect(l->server, (const struct sockaddr *)address, sizeof(*address)) == 0;
}

static void *serve_client(void *user)
{
    struct link *l = user;
    if (l->relay->patience > 0)
        l->until = now_ms() + (int64_t)l->relay->patience * 1000;
    if (reach_server(l) && link_negotiate(l))
        use_export(l);
    end_link(l);
    return NULL;
}

static void begin_link(struct relay *relay, int client)
{
    struct link *l = calloc(1, sizeof(*l));
    pthread_t thread;
    if (!l) {
        close(client);
        return;
    }
    *l = (struct link){.relay = relay, .client = client, .server = -1};
    /* A head and what it tells of go in two pieces. */
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    pthread_mutex_init(&l->lock, NULL);
    if (dr_thread_start(&thread, serve_client, l) == 0)
        pthread_detach(thread);
    else
        end_link(l);
}

static void *accept_clients(void *user)
{
    struct relay *relay = user;
    struct pollfd fds[LISTEN_MOST];
    for (size_t i = 0; i < relay->n; i++)
        fds[i] = (struct pollfd){.fd = relay->fds[i], .events = POLLIN};
    for (;;) {
        if (poll(fds, relay->n, -1) < 0 && errno != EINTR)
            return NULL;
        for (size_t i = 0; i < relay->n; i++) {
            int client = fds[i].revents ? accept4(fds[i].fd, NULL, NULL, SOCK_CLOEXEC) : -1;
            if (client >= 0)
                begin_link(relay, client);
            else if (fds[i].revents && errno != EAGAIN && errno != ECONNABORTED)
                poll(NULL, 0, 100); /* no descriptors: some will be closed */
        }
    }
}

int relay_start(const struct cli *cli, struct relay *relay)
{
    pthread_t thread;
    for (size_t i = 0; i < relay->n; i++) /* a client may be gone before it is accepted */
        fcntl(relay->fds[i], F_SETFL, O_NONBLOCK);
    int r = dr_thread_start(&thread, accept_clients, relay);
    if (r == 0) {
        pthread_detach(thread);
        return 0;
    }
    cli_error(cli, "cannot start a thread: %s", strerror(r));
    return 1;
}
