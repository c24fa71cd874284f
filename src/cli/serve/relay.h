/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A relay between NBD clients and nbdkit, for what nbdkit has not got: metadata contexts other than
 * base:allocation, and a limit of how long a client may take to say what it wants. */
#ifndef DR_CLI_SERVE_RELAY_H
#define DR_CLI_SERVE_RELAY_H

#include <sys/socket.h>
#include <sys/un.h>

#include "cli/serve/contexts.h"
#include "cli/serve/serve.h"

/* The ids by which clients know the contexts; the server's are small. */
#define CONTEXT_FIRST_ID 0x10000u

struct relay {
    struct contexts *contexts; /* or NULL */
    unsigned patience; /* seconds that a client has until it uses an export; 0: any number */
    struct sockaddr_un server; /* nbdkit's socket */
    int fds[LISTEN_MOST];      /* where clients come */
    size_t n;
};

/* From now on each client is connected with the server, until the process ends. Both the relay and
 * what it points to have to stay. 0, or 1 after a message. */
int relay_start(const struct cli *cli, struct relay *relay);

/* ------------------------------------------------------------------ what its files share */

struct asked; /* relay.c */

/* One client and its connection with the server. */
struct link {
    struct relay *relay;
    int client, server;
    int64_t until;               /* of the clock, in ms: the handshake ends; 0: whenever it does */
    bool selected[CONTEXT_MOST]; /* the client wants to be told of these */
    bool any;                    /* one of them */
    bool base;                   /* and of one of the server's own */
    pthread_mutex_t lock;        /* what goes to the client goes as a whole; asked */
    struct asked *asked;
};

/* All of it. False: the connection has ended. */
bool link_take(const struct link *l, int from, void *buf, size_t len);
bool link_give(int to, const void *buf, size_t len);
/* Pass len bytes on. */
bool link_pump(const struct link *l, int from, int to, uint64_t len);

/* relay-options.c: the handshake. True: the client uses the export now. */
bool link_negotiate(struct link *l);

#endif
