/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* `drover serve`: what its files share. */
#ifndef DR_CLI_SERVE_SERVE_H
#define DR_CLI_SERVE_SERVE_H

#include <sys/types.h>

#include "cli/cli.h"

/* ------------------------------------------------------------------ listen.c */

#define LISTEN_MOST 8

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

#endif
