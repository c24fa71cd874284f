/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Exports, as clients see them, and the connections that have them. An export shows a disk of the
 * list, or one that a client of the control socket has opened; it may be removed while connections
 * have it, and the disk may be closed as soon as no request is under way on it. So every use of a
 * connection's disk stands between shown_begin() and shown_end(). */
#ifndef DR_EXPORTS_SHOWN_H
#define DR_EXPORTS_SHOWN_H

#include "exports/disk-list.h"

struct connection;

/* Begin to show the disks of the list. They have names that differ. */
int shown_open(struct disk_list *list, struct dr_error *err);
/* Forget all exports. No connection is left, or none is used any more. */
void shown_close(struct disk_list *list);

/* The names, the first one added first: each is called with one at a time. Non-zero ends it. */
int shown_list(struct disk_list *list, int (*each)(void *user, const char *name), void *user);

/* A client wants the export; "" means the first one. -ENOENT: there is none of that name. socket:
 * its connection's, or -1; it stays the caller's. */
int shown_connect(struct disk_list *list, const char *name, bool readonly, int socket,
                  struct connection **c, struct dr_error *err);
/* Returns the connection's socket. */
int shown_disconnect(struct disk_list *list, struct connection *c);
/* NULL: the export was removed. Else its disk, until shown_end(). */
struct dr_disk *shown_begin(struct disk_list *list, struct connection *c);
void shown_end(struct disk_list *list, struct connection *c);
/* May clients of this connection write? Between shown_begin() and shown_end(). */
bool shown_writable(const struct connection *c);

/* What its changes go through; NULL: the disk is not one of the list, and nothing waits. */
struct dr_stall *shown_stall(const struct connection *c);

/* As in struct dr_live_exports. hang_up is called with the socket of each connection that has an
 * export which is removed `hard`. */
int shown_add(struct disk_list *list, const char *id, const char *name, struct dr_disk *disk,
              bool writable, struct dr_error *err);
int shown_remove(struct disk_list *list, const char *id, bool hard, void (*hang_up)(int socket),
                 struct dr_error *err);

#endif
