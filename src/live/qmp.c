/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The wire: one thread waits for everything that happens on the control socket. Requests are lines
 * of JSON, answered one after another; replies and events wait in each client's own buffer until it
 * takes them. Nothing here blocks on a client: one that sends a line without an end, or does not
 * take what is said to it, is hung up on. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/json.h"
#include "base/thread.h"
#include "live/live.h"

struct buffer {
    char *bytes;
    size_t len, room;
};

struct live_client {
    struct live_client *next;
    int fd;
    struct buffer in;  /* the thread's own */
    struct buffer out; /* under the lock */
    bool negotiated;   /* changed by the thread, under the lock */
    bool closing;      /* when out has been sent; the same */
    _Atomic bool dead;
};

/* ------------------------------------------------------------------ buffers */

static bool append(struct buffer *b, const char *bytes, size_t len, size_t most)
{
    if (b->len + len > most)
        return false;
    if (b->len + len > b->room) {
        size_t room = b->room ? b->room : 4096;
        while (room < b->len + len)
            room *= 2;
        char *more = realloc(b->bytes, room);
        if (!more)
            return false;
        b->bytes = more;
        b->room = room;
    }
    memcpy(b->bytes + b->len, bytes, len);
    b->len += len;
    return true;
}

static void drop_front(struct buffer *b, size_t len)
{
    b->len -= len;
    memmove(b->bytes, b->bytes + len, b->len);
}

/* Under the lock. */
static void say(struct live_client *c, const json_t *message)
{
    CLEANUP_FREE char *text = message ? dr_json_dump(message, JSON_COMPACT) : NULL;
    if (!text || !append(&c->out, text, strlen(text), LIVE_OUT_MAX) ||
        !append(&c->out, "\r\n", 2, LIVE_OUT_MAX))
        c->dead = true;
}

void live_event(struct dr_live *live, const char *name, json_t *data)
{
    struct timeval now;
    gettimeofday(&now, NULL);
    json_t *event = json_pack("{s:{s:I, s:I}, s:s}", "timestamp", "seconds", (json_int_t)now.tv_sec,
                              "microseconds", (json_int_t)now.tv_usec, "event", name);
    if (data)
        json_object_set_new(event, "data", data);
    for (struct live_client *c = live->clients; c && event; c = c->next)
        if (c->negotiated)
            say(c, event);
    json_decref(event);
    live_wake(live);
}

/* ------------------------------------------------------------------ clients, on the thread */

static void free_client(struct live_client *c)
{
    close(c->fd);
    free(c->in.bytes);
    free(c->out.bytes);
    free(c);
}

static void drop_dead(struct dr_live *live)
{
    DR_LOCK_SCOPE(&live->lock);
    for (struct live_client **at = &live->clients; *at;) {
        struct live_client *c = *at;
        if (c->dead || (c->closing && c->out.len == 0)) {
            *at = c->next;
            free_client(c);
        } else
            at = &c->next;
    }
}

/* False: there is no descriptor for a client, who is left waiting. */
static bool greet(struct dr_live *live)
{
    int fd = accept4(live->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    bool none = fd < 0 && errno != EAGAIN && errno != ECONNABORTED;
    struct live_client *c = fd < 0 ? NULL : calloc(1, sizeof(*c));
    unsigned n = 0;
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_client *other = live->clients; other; other = other->next)
        n++;
    if (!c || n >= LIVE_CLIENTS_MAX) {
        free(c);
        if (fd >= 0)
            close(fd);
        return !none;
    }
    json_t *greeting = qmp_greeting();
    c->fd = fd;
    say(c, greeting);
    json_decref(greeting);
    c->next = live->clients;
    live->clients = c;
    return true;
}

static void send_out(struct live_client *c)
{
    while (c->out.len > 0 && !c->dead) {
        ssize_t n = send(c->fd, c->out.bytes, c->out.len, MSG_NOSIGNAL);
        if (n > 0)
            drop_front(&c->out, (size_t)n);
        else if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        else
            c->dead = true;
    }
}

static void answer(struct dr_live *live, struct live_client *c, const char *line, size_t len)
{
    bool negotiated = c->negotiated;
    json_t *reply = qmp_answer(live, line, len, &negotiated);
    DR_LOCK_SCOPE(&live->lock);
    say(c, reply);
    c->negotiated = negotiated;
    json_decref(reply);
}

static bool is_blank(const char *line, size_t len)
{
    while (len > 0 && strchr(" \t\r", line[len - 1]))
        len--;
    return len == 0;
}

/* Answer every line that is complete. */
static void answer_lines(struct dr_live *live, struct live_client *c)
{
    size_t begin = 0;
    const char *end;
    while (!c->dead && c->in.len > begin &&
           (end = memchr(c->in.bytes + begin, '\n', c->in.len - begin))) {
        size_t len = (size_t)(end - c->in.bytes) - begin;
        if (!is_blank(c->in.bytes + begin, len))
            answer(live, c, c->in.bytes + begin, len);
        begin += len + 1;
    }
    drop_front(&c->in, begin);
}

static void hear(struct dr_live *live, struct live_client *c)
{
    char some[4096];
    ssize_t n = recv(c->fd, some, sizeof(some), 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        c->dead = true;
        return;
    }
    if (append(&c->in, some, (size_t)n, LIVE_LINE_MAX)) {
        answer_lines(live, c);
        return;
    }
    struct qmp_error err = QMP_ERROR_INIT;
    qmp_fail(&err, NULL, "A request is one line of at most %u bytes", LIVE_LINE_MAX);
    json_t *reply =
        json_pack("{s:{s:s, s:s}}", "error", "class", "GenericError", "desc", err.text.text);
    DR_LOCK_SCOPE(&live->lock);
    say(c, reply);
    c->closing = true;
    json_decref(reply);
}

/* ------------------------------------------------------------------ the thread */

static size_t list_fds(struct dr_live *live, bool deaf, struct pollfd *fds)
{
    DR_LOCK_SCOPE(&live->lock);
    size_t n = 2;
    fds[0] = (struct pollfd){.fd = live->listener, .events = deaf ? 0 : POLLIN};
    fds[1] = (struct pollfd){.fd = live->bell, .events = POLLIN};
    for (const struct live_client *c = live->clients; c; c = c->next)
        fds[n++] = (struct pollfd){
            .fd = c->fd,
            .events = (short)((c->closing ? 0 : POLLIN) | (c->out.len > 0 ? POLLOUT : 0))};
    return n;
}

/* The list of clients changes on this thread only. */
static void serve_clients(struct dr_live *live, const struct pollfd *fds)
{
    size_t i = 2;
    for (struct live_client *c = live->clients; c; c = c->next, i++) {
        if (fds[i].revents & (POLLIN | POLLHUP | POLLERR) && !c->closing)
            hear(live, c);
        DR_LOCK_SCOPE(&live->lock);
        send_out(c);
        if (fds[i].revents & (POLLHUP | POLLERR) && c->closing)
            c->dead = true;
    }
}

/* Has a client said "quit", and its reply been sent as far as it takes it? */
static bool take_quit(struct dr_live *live)
{
    DR_LOCK_SCOPE(&live->lock);
    bool quit = live->quitting;
    live->quitting = false;
    return quit;
}

static bool is_stopping(struct dr_live *live)
{
    DR_LOCK_SCOPE(&live->lock);
    return live->stopping;
}

static void *serve(void *user)
{
    struct dr_live *live = user;
    bool deaf = false; /* out of descriptors: look again for new clients in a second */
    while (!is_stopping(live)) {
        struct pollfd fds[2 + LIVE_CLIENTS_MAX];
        size_t n = list_fds(live, deaf, fds);
        uint64_t rung;
        if (poll(fds, (nfds_t)n, deaf ? 1000 : -1) < 0)
            continue;
        if (fds[1].revents && read(live->bell, &rung, sizeof(rung)) < 0)
            continue;
        serve_clients(live, fds);
        drop_dead(live);
        live_jobs_reap(live);
        deaf = (fds[0].revents & POLLIN) && !greet(live);
        if (take_quit(live))
            live->quit(live->user);
    }
    return NULL;
}

/* ------------------------------------------------------------------ beginning and end */

static int address_of(const char *path, struct sockaddr_un *address, struct dr_error *err)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address->sun_path))
        return dr_fail(err, ENAMETOOLONG, "%s: the path of a socket has at most %zu bytes", path,
                       sizeof(address->sun_path) - 1);
    strcpy(address->sun_path, path);
    return 0;
}

/* A socket is there: does anybody listen? If not, remove it. */
static int clear_stale(const char *path, const struct sockaddr_un *address, struct dr_error *err)
{
    struct stat st;
    if (lstat(path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return dr_fail(err, EEXIST, "%s: exists and is no socket: choose another path", path);
    CLEANUP_CLOSE int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return dr_fail_errno(err, errno, "%s: no socket", path);
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ||
        errno != ECONNREFUSED)
        return dr_fail(err, EADDRINUSE, "%s: another server listens there", path);
    if (unlink(path) < 0 && errno != ENOENT)
        return dr_fail_errno(err, errno, "%s: nobody listens there, and it cannot be removed",
                             path);
    return 0;
}

/* The mode is there before the name is. */
static int bind_private(int fd, const struct sockaddr_un *address)
{
    if (fchmod(fd, 0600) < 0)
        return -errno;
    return bind(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 ? -errno : 0;
}

static int open_socket(struct dr_live *live, struct dr_error *err)
{
    struct sockaddr_un address;
    int r = address_of(live->control, &address, err);
    if (r < 0)
        return r;
    live->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (live->listener < 0)
        return dr_fail_errno(err, errno, "%s: no socket", live->control);
    r = bind_private(live->listener, &address);
    if (r == -EADDRINUSE) {
        r = clear_stale(live->control, &address, err);
        if (r < 0)
            return r;
        r = bind_private(live->listener, &address);
    }
    if (r == 0 && listen(live->listener, LIVE_CLIENTS_MAX) < 0) {
        r = -errno;
        unlink(live->control);
    }
    return r < 0 ? dr_fail_errno(err, -r, "%s: cannot listen there", live->control) : 0;
}

int live_listen(struct dr_live *live, struct dr_error *err)
{
    int r = open_socket(live, err);
    if (r == 0) {
        live->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        r = live->bell < 0 ? dr_fail_errno(err, errno, "%s: no eventfd", live->control) : 0;
        if (r == 0) {
            r = -dr_thread_start(&live->thread, serve, live);
            if (r < 0)
                dr_fail_errno(err, -r, "%s: no thread", live->control);
        }
        if (r < 0)
            unlink(live->control);
    }
    live->started = r == 0;
    if (r < 0 && live->listener >= 0) {
        close(live->listener);
        live->listener = -1;
    }
    return r;
}

void live_hang_up(struct dr_live *live)
{
    pthread_mutex_lock(&live->lock);
    live->stopping = true;
    pthread_mutex_unlock(&live->lock);
    if (live->started) {
        live_wake(live);
        pthread_join(live->thread, NULL);
        unlink(live->control);
    }
    pthread_mutex_lock(&live->lock);
    for (struct live_client *c = live->clients, *next; c; c = next) {
        next = c->next;
        send_out(c);
        free_client(c);
    }
    live->clients = NULL;
    pthread_mutex_unlock(&live->lock);
    if (live->listener >= 0)
        close(live->listener);
    if (live->bell >= 0)
        close(live->bell);
    live->listener = live->bell = -1;
    live->started = false;
}
