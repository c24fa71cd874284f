/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* `drover serve` and qemu-nbd: what their files share. */
#ifndef DR_CLI_SERVE_SERVE_H
#define DR_CLI_SERVE_SERVE_H

#include <sys/types.h>

#include "cli/cli.h"

/* ------------------------------------------------------------------ listen.c */

#define LISTEN_MOST 8
/* Where systemd's protocol wants the first socket. */
#define LISTEN_FIRST 3

/* The sockets that clients connect to: one in the file system, or one for each address of a host.
 */
struct listener {
    char *path;      /* NULL: TCP */
    char *directory; /* the one that was made for path, or NULL */
    char *host;      /* TCP: as clients name it */
    unsigned port;
    int fds[LISTEN_MOST];
    size_t n;
};
#define LISTENER_INIT \
    {                 \
        .n = 0        \
    }

/* path NULL: a new name that nobody else can reach. 0, or 1 after a message. */
int listen_unix(const struct cli *cli, const char *path, struct listener *l);
/* The sockets that our parent opened for us, told as systemd does it (LISTEN_PID, LISTEN_FDS). How
 * many; 0: none. */
size_t listen_given(void);
/* Take over so many, also in a child of the process that they were told to. 0, or 1 after a
 * message.
 */
int listen_take_given(const struct cli *cli, size_t n, struct listener *l);
/* Remove a socket that nobody listens at; anything else stays. */
void listen_remove_left(const char *path);
/* port 0: one that is free. */
int listen_tcp(const struct cli *cli, const char *address, unsigned port, struct listener *l);
/* What clients are told to use; export "": the default one. tls_psk (may be NULL) is the file of
 * keys. malloc'ed, NULL = out of memory. */
char *listener_uri(const struct listener *l, const char *export, bool tls, const char *tls_psk);
/* Close the sockets and remove the name. */
void listener_end(struct listener *l);

/* ------------------------------------------------------------------ nbdkit.c */

/* A list of words that ends with NULL. */
struct words {
    char **words;
    size_t n;
    bool failed; /* out of memory */
};
void words_add(struct words *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void words_free(struct words *w);

struct server {
    pid_t pid;
    int told; /* it writes here that its disks are open, and later that they are closed well */
};

/* Paths of nbdkit and of our plugin, malloc'ed. 0, or 1 after a message that says what to do. */
int nbdkit_find(const struct cli *cli, char **program, char **plugin);
/* Run it on these sockets; returns when it serves. parameters: of the plugin. 0, or 1 when it has
 * said what is wrong and ended. */
int nbdkit_start(const struct cli *cli, const struct words *options, const struct words *parameters,
                 const struct listener *l, struct server *server);
/* It has ended with this status of wait(2). The exit code. */
int nbdkit_ended(const struct cli *cli, struct server *server, int status);

/* ------------------------------------------------------------------ serve.c */

struct relay;

/* How a server differs from what `drover serve` makes of the same options. */
struct serve_manner {
    struct words options;    /* more of nbdkit's, its filters among them */
    struct words parameters; /* of these filters */
    struct relay *relay;     /* between clients and nbdkit; or NULL (relay.h) */
    size_t given;            /* so many sockets are those of listen_given(); 0: make them */
    void (*ready)(
        void *user); /* called when clients are served, instead of printing URIs; or NULL */
    void *user;
};
/* The server of these options and operands of `drover serve`, until it ends. The exit code. */
int serve_disks(const struct cli *cli, const struct cli_args *args,
                const struct serve_manner *manner);

/* ------------------------------------------------------------------ list.c */

struct nbd_place {
    const char *socket; /* in the file system; NULL: TCP */
    const char *host, *port;
    const char *tls_certificates, *tls_psk; /* a directory, a file; or NULL */
    const char *tls_user;                   /* whose key of that file */
};
/* Print what exports a server has, as qemu-nbd does. The exit code. */
int list_exports(const struct cli *cli, const struct nbd_place *place);

#endif
