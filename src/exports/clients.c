/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A connection of a client was accepted by a socket that listens, so it has that one's name, or its
 * port. Other connections of the process, to storage for example, are left alone.
 *
 * Descriptors are those of nbdkit, which may close one at any time, and another thread may get its
 * number. So whatever is looked at is duplicated first: what is found to be a client's is what is
 * shut down.
 *
 * Which connection has which socket, nbdkit does not tell, but it tells the peer: that of TCP is
 * one of a kind; on a unix socket it is a process, which may have several connections. Those that
 * were told apart before are ours by then, so what is left is mostly one. Where several are left,
 * because a process opens connections at the same moment, none is taken. This is only asked while
 * nbdkit opens a connection, since then it has not closed its socket. */
#include "exports/clients.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "base/cleanup.h"

#define LISTENERS_MOST 16

union name {
    struct sockaddr any;
    struct sockaddr_storage room;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_un local;
};

static union name listeners[LISTENERS_MOST];
static size_t n_listeners;

/* ------------------------------------------------------------------ sockets */

static bool is_stream(int fd, bool listening)
{
    socklen_t type_size = sizeof(int), accepts_size = sizeof(int);
    int type = 0, accepts = 0;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_size) == 0 && type == SOCK_STREAM &&
           getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &accepts_size) == 0 &&
           (accepts != 0) == listening;
}

static bool get_name(int fd, union name *name)
{
    socklen_t size = sizeof(*name);
    memset(name, 0, sizeof(*name));
    return getsockname(fd, &name->any, &size) == 0;
}

static bool same_listener(const union name *a, const union name *b)
{
    if (a->any.sa_family != b->any.sa_family)
        return false;
    if (a->any.sa_family == AF_INET)
        return a->v4.sin_port == b->v4.sin_port;
    if (a->any.sa_family == AF_INET6)
        return a->v6.sin6_port == b->v6.sin6_port;
    if (a->any.sa_family == AF_UNIX)
        return memcmp(a->local.sun_path, b->local.sun_path, sizeof(a->local.sun_path)) == 0;
    return true; /* vsock: nobody but clients has it */
}

static bool is_clients(int fd)
{
    union name name;
    bool is = false;
    if (!is_stream(fd, false) || !get_name(fd, &name))
        return false;
    for (size_t i = 0; i < n_listeners && !is; i++)
        is = same_listener(&listeners[i], &name);
    return is;
}

/* each gets a duplicate of every descriptor of a socket, and returns whether it keeps it. */
static void for_each_socket(bool (*each)(void *user, int fd), void *user)
{
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        struct stat st;
        int fd = (int)strtol(entry->d_name, NULL, 10), own = -1;
        if (entry->d_name[0] != '.' && fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode))
            own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (own >= 0 && !each(user, own))
            close(own);
    }
    closedir(dir);
}

/* ------------------------------------------------------------------ listeners */

static bool note_listener(void *user, int fd)
{
    (void)user;
    if (n_listeners < LISTENERS_MOST && is_stream(fd, true) &&
        get_name(fd, &listeners[n_listeners]))
        n_listeners++;
    return false;
}

void clients_note_listeners(void)
{
    for_each_socket(note_listener, NULL);
}

void clients_forget_listeners(void)
{
    n_listeners = 0;
}

static bool is_socket_at(const union name *name, const char *path)
{
    struct stat ours, given;
    return name->any.sa_family == AF_UNIX &&
           (strcmp(name->local.sun_path, path) == 0 ||
            (stat(name->local.sun_path, &ours) == 0 && stat(path, &given) == 0 &&
             ours.st_dev == given.st_dev && ours.st_ino == given.st_ino));
}

static bool is_port(const union name *name, const char *port)
{
    long number = strtol(port, NULL, 10);
    return (name->any.sa_family == AF_INET && ntohs(name->v4.sin_port) == number) ||
           (name->any.sa_family == AF_INET6 && ntohs(name->v6.sin6_port) == number);
}

bool clients_listen_at(const char *path, const char *port)
{
    for (size_t i = 0; i < n_listeners; i++)
        if (path ? is_socket_at(&listeners[i], path) : is_port(&listeners[i], port))
            return true;
    return false;
}

/* ------------------------------------------------------------------ hanging up */

static bool shut_if_clients(void *user, int fd)
{
    (void)user;
    if (is_clients(fd))
        shutdown(fd, SHUT_RD);
    return false;
}

void clients_hang_up(void)
{
    for_each_socket(shut_if_clients, NULL);
}

/* ------------------------------------------------------------------ which connection has it */

struct socket {
    struct socket *next;
    int fd;
    ino_t inode; /* one of a kind while fd is open */
};

static struct socket *known; /* those of connections that were told apart */
static bool ended;
static pthread_mutex_t known_lock = PTHREAD_MUTEX_INITIALIZER;

struct peer {
    union name name;
    socklen_t size;
    int64_t process, owner; /* of a unix socket */
};

struct look {
    struct peer peer;
    struct socket found; /* fd -1: none yet */
    bool several;
};

static bool is_peers(int fd, const struct peer *peer)
{
    union name name;
    struct ucred who;
    socklen_t size = sizeof(name), who_size = sizeof(who);
    memset(&name, 0, sizeof(name));
    if (getpeername(fd, &name.any, &size) < 0 || name.any.sa_family != peer->name.any.sa_family)
        return false;
    if (name.any.sa_family != AF_UNIX)
        return size == peer->size && memcmp(&name, &peer->name, size) == 0;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &who_size) == 0 &&
           who.pid == peer->process && who.uid == peer->owner;
}

static bool is_known(ino_t inode)
{
    const struct socket *s = known;
    while (s && s->inode != inode)
        s = s->next;
    return s;
}

/* One socket may have several descriptors. */
static bool look_at(void *user, int fd)
{
    struct look *look = user;
    struct stat st;
    if (!is_clients(fd) || !is_peers(fd, &look->peer) || fstat(fd, &st) < 0 || is_known(st.st_ino))
        return false;
    if (look->found.fd < 0) {
        look->found = (struct socket){.fd = fd, .inode = st.st_ino};
        return true;
    }
    look->several |= look->found.inode != st.st_ino;
    return false;
}

static bool get_peer(struct peer *peer)
{
    peer->size = sizeof(peer->name);
    if (n_listeners == 0 || nbdkit_peer_name(&peer->name.any, &peer->size) < 0)
        return false;
    if (peer->name.any.sa_family != AF_UNIX)
        return true;
    peer->process = nbdkit_peer_pid();
    peer->owner = nbdkit_peer_uid();
    return peer->process >= 0 && peer->owner >= 0;
}

int clients_socket(void)
{
    struct look look = {.found.fd = -1};
    if (!get_peer(&look.peer))
        return -1;
    DR_LOCK_SCOPE(&known_lock);
    for_each_socket(look_at, &look);
    if (look.found.fd < 0)
        return -1;
    struct socket *s = look.several || ended ? NULL : malloc(sizeof(*s));
    if (!s) {
        close(look.found.fd);
        return -1;
    }
    *s = look.found;
    s->next = known;
    known = s;
    return s->fd;
}

/* Under the lock: the link that leads to it, or to NULL. */
static struct socket **find(int fd)
{
    struct socket **at = &known;
    while (*at && (*at)->fd != fd)
        at = &(*at)->next;
    return at;
}

static void forget(struct socket **at)
{
    struct socket *gone = *at;
    *at = gone->next;
    close(gone->fd);
    free(gone);
}

void clients_hang_up_on(int socket)
{
    DR_LOCK_SCOPE(&known_lock);
    if (*find(socket))
        shutdown(socket, SHUT_RD);
}

void clients_let_go(int socket)
{
    DR_LOCK_SCOPE(&known_lock);
    struct socket **at = find(socket);
    if (*at)
        forget(at);
}

void clients_end(void)
{
    DR_LOCK_SCOPE(&known_lock);
    ended = true;
    while (known)
        forget(&known);
}
