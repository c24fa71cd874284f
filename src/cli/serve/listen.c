/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sockets of `drover serve`. They are made here and handed to nbdkit, as systemd does it, so
 * that we know when one is taken, which port a free one is, and whose name to remove at the end.
 * The command of --run must not inherit them: what it leaves behind would keep the port. */
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "cli/serve/serve.h"

/* ------------------------------------------------------------------ a name in the file system */

/* Does anybody listen at this socket? */
static bool is_listened_to(const struct sockaddr_un *address)
{
    CLEANUP_CLOSE int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    return fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ||
           errno != ECONNREFUSED;
}

static int tell_unix_problem(const struct cli *cli, const struct sockaddr_un *address, int e)
{
    struct stat st;

    if (e != EADDRINUSE)
        cli_error(cli, "%s: cannot make the socket: %s", address->sun_path, strerror(e));
    else if (stat(address->sun_path, &st) == 0 && !S_ISSOCK(st.st_mode))
        cli_error(cli, "%s: is there already, and is no socket: choose another name",
                  address->sun_path);
    else if (is_listened_to(address))
        cli_error(cli, "%s: another server listens there: end it, or choose another name",
                  address->sun_path);
    else
        cli_error(cli, "%s: a socket that a server left behind: remove it, and try again",
                  address->sun_path);
    return 1;
}

void listen_remove_left(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;

    if (strlen(path) >= sizeof(address.sun_path) || lstat(path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return;
    strcpy(address.sun_path, path);
    if (!is_listened_to(&address))
        unlink(path);
}

/* The directory is ours alone: XDG_RUNTIME_DIR is meant for sockets and goes with the session. */
static char *private_name(const struct cli *cli, struct listener *l)
{
    const char *in = getenv("XDG_RUNTIME_DIR");
    char *path = NULL;

    if (!in || !*in)
        in = getenv("TMPDIR");
    if (asprintf(&l->directory, "%s/drover-XXXXXX", in && *in ? in : "/tmp") < 0)
        l->directory = NULL;
    if (l->directory && !mkdtemp(l->directory)) {
        cli_error(cli, "%s: cannot make a directory for the socket: %s", l->directory,
                  strerror(errno));
        free(DR_STEAL(l->directory));
        return NULL;
    }
    if (!l->directory || asprintf(&path, "%s/socket", l->directory) < 0) {
        cli_error(cli, "out of memory");
        return NULL;
    }
    return path;
}

int listen_unix(const struct cli *cli, const char *path, struct listener *l)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CLEANUP_FREE char *name = path ? strdup(path) : private_name(cli, l);

    if (!name)
        return 1;
    if (strlen(name) >= sizeof(address.sun_path)) {
        cli_error(cli, "%s: the name of a socket has at most %zu bytes: choose a shorter one", name,
                  sizeof(address.sun_path) - 1);
        return 1;
    }
    strcpy(address.sun_path, name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        int code = tell_unix_problem(cli, &address, errno);
        if (fd >= 0)
            close(fd);
        return code;
    }
    l->fds[l->n++] = fd;
    l->path = realpath(name, NULL);
    if (!l->path || listen(fd, SOMAXCONN) < 0) {
        cli_error(cli, "%s: %s", name, strerror(errno));
        unlink(name);
        return 1;
    }
    return 0;
}

/* ------------------------------------------------------------------ a port */

static unsigned bound_port(int fd)
{
    union {
        struct sockaddr_storage any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } bound;
    socklen_t size = sizeof(bound);

    memset(&bound, 0, sizeof(bound));
    if (getsockname(fd, (struct sockaddr *)&bound, &size) < 0)
        return 0;
    return ntohs(bound.any.ss_family == AF_INET6 ? bound.v6.sin6_port : bound.v4.sin_port);
}

/* The second address of a host gets the port that the first one got. */
static void set_port(struct addrinfo *ai, unsigned port)
{
    if (ai->ai_family == AF_INET6)
        ((struct sockaddr_in6 *)ai->ai_addr)->sin6_port = htons((uint16_t)port);
    else if (ai->ai_family == AF_INET)
        ((struct sockaddr_in *)ai->ai_addr)->sin_port = htons((uint16_t)port);
}

/* A descriptor, or -errno. */
static int listen_at(const struct addrinfo *ai)
{
    int on = 1, fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (ai->ai_family == AF_INET6) /* IPv4 gets a socket of its own */
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on));
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0)
        return fd;
    int e = errno;
    close(fd);
    return -e;
}

static int tell_tcp_problem(const struct cli *cli, const char *address, unsigned port, int e)
{
    if (e == EADDRINUSE)
        cli_error(cli, "port %u of %s is taken: choose another with --port (0: any that is free)",
                  port, address);
    else
        cli_error(cli, "cannot listen at port %u of %s: %s", port, address, strerror(e));
    return 1;
}

int listen_tcp(const struct cli *cli, const char *address, unsigned port, struct listener *l)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list = NULL;
    int r = getaddrinfo(address, "0", &hints, &list), last = EADDRNOTAVAIL;

    if (r != 0) {
        cli_error(cli, "%s: %s", address, gai_strerror(r));
        return 1;
    }
    l->port = port;
    for (struct addrinfo *ai = list; ai && l->n < LISTEN_MOST; ai = ai->ai_next) {
        set_port(ai, l->port);
        int fd = listen_at(ai);
        if (fd >= 0)
            l->fds[l->n++] = fd;
        else
            last = -fd;
        if (fd >= 0 && l->port == 0)
            l->port = bound_port(fd);
        if (last == EADDRINUSE)
            break; /* half of a host would be somebody else's server */
    }
    freeaddrinfo(list);
    l->host = strdup(address);
    if (l->n == 0 || last == EADDRINUSE || !l->host)
        return tell_tcp_problem(cli, address, l->port, last);
    return 0;
}

/* ------------------------------------------------------------------ sockets that were opened for
 * us */

static long number_in(const char *name)
{
    const char *text = getenv(name);
    char *end;

    errno = 0;
    long value = text ? strtol(text, &end, 10) : -1;
    return !text || end == text || *end || errno ? -1 : value;
}

/* Variables that were meant for another process are none for us. */
size_t listen_given(void)
{
    long n = number_in("LISTEN_FDS");

    return number_in("LISTEN_PID") == (long)getpid() && n > 0 ? (size_t)n : 0;
}

int listen_take_given(const struct cli *cli, size_t n, struct listener *l)
{
    if (n > LISTEN_MOST) {
        cli_error(cli, "%zu sockets are given: expected at most %d", n, LISTEN_MOST);
        return 1;
    }
    for (size_t i = 0; i < n; i++) {
        int fd = LISTEN_FIRST + (int)i, on = 0;
        socklen_t size = sizeof(on);
        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &size) < 0 || !on ||
            fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
            cli_error(cli, "LISTEN_FDS: descriptor %d is no socket to listen at", fd);
            return 1;
        }
        l->fds[l->n++] = fd;
    }
    l->port = bound_port(LISTEN_FIRST);
    l->host = strdup("");
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
    return l->host ? 0 : 1;
}

/* ------------------------------------------------------------------ URIs */

/* Everything but what may stand in any part of a URI becomes %XX. */
static char *quote(const char *text)
{
    static const char plain[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/";
    char *out = malloc(3 * strlen(text) + 1), *p = out;

    for (; out && *text; text++) {
        if (strchr(plain, *text))
            *p++ = *text;
        else
            p += sprintf(p, "%%%02X", (unsigned char)*text);
    }
    if (out)
        *p = '\0';
    return out;
}

char *listener_uri(const struct listener *l, const char *export, bool tls, const char *tls_psk)
{
    CLEANUP_FREE char *name = quote(export), *path = quote(l->path ? l->path : "");
    CLEANUP_FREE char *psk = quote(tls_psk ? tls_psk : ""), *key = NULL;
    char *uri = NULL;
    bool v6 = l->host && strchr(l->host, ':');
    int r;

    if (!name || !path || !psk || asprintf(&key, "%stls-psk-file=%s", l->path ? "&" : "?", psk) < 0)
        return NULL;
    const char *s = tls ? "s" : "", *behind = tls && tls_psk ? key : "";
    if (l->path)
        r = asprintf(&uri, "nbd%s+unix:///%s?socket=%s%s", s, name, path, behind);
    else
        r = asprintf(&uri, "nbd%s://%s%s%s:%u/%s%s", s, v6 ? "[" : "", l->host, v6 ? "]" : "",
                     l->port, name, behind);
    return r < 0 ? NULL : uri;
}

void listener_end(struct listener *l)
{
    for (size_t i = 0; i < l->n; i++)
        close(l->fds[i]);
    if (l->path)
        unlink(l->path);
    if (l->directory)
        rmdir(l->directory);
    free(l->path);
    free(l->directory);
    free(l->host);
    *l = (struct listener)LISTENER_INIT;
}
