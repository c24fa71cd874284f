/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sockets of clients. nbdkit tells its plugins of none, and 1.32 cannot end a connection. */
#ifndef DR_EXPORTS_CLIENTS_H
#define DR_EXPORTS_CLIENTS_H

#include <stdbool.h>

/* The process listens on its last socket: from now on those tell which connections are clients'. */
void clients_note_listeners(void);
void clients_forget_listeners(void);
/* Does the process listen there? One of path (of a unix socket) and port (of TCP) is given. */
bool clients_listen_at(const char *path, const char *port);

/* Shut down the connections of all clients for reading: nbdkit sends the replies that are under
 * way, and then closes them. */
void clients_hang_up(void);

/* In a callback in which nbdkit opens a connection: a descriptor of its socket that is ours, until
 * clients_let_go(). -1: it cannot be told which socket it is. */
int clients_socket(void);
/* Shut down that one for reading; -1 is allowed, also below. */
void clients_hang_up_on(int socket);
void clients_let_go(int socket);
/* The server is to end: let go of all, so that clients see when nbdkit closes its sockets, and take
 * no more. nbdkit 1.32 does not tell of connections that end from now on. */
void clients_end(void);

#endif
