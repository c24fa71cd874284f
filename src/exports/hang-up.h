/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_EXPORTS_HANG_UP_H
#define DR_EXPORTS_HANG_UP_H

#include <stdbool.h>

#include "drover/drover.h"

/* Make SIGTERM, SIGINT, SIGQUIT and SIGHUP end the connections, too: what their handlers did until
 * now happens first, then clients' connections are shut down for reading, so that requests
 * under way are still answered. Call it when the process has its last signal handlers and
 * listens.
 *
 * ending is called first of all, once, from another thread than the signal's.
 *
 * A client that does not read its replies keeps a thread in send(2) for ever. When nothing has been
 * under way for HANG_UP_PATIENCE seconds, give_up is called, once, from another thread: no request
 * is under way then, and none begins any more. */
#define HANG_UP_PATIENCE 10
int hang_up_on_signals(void (*ending)(void), void (*give_up)(void), struct dr_error *err);
/* Around each request. False: give_up was called, the disks are gone. */
bool hang_up_begin_request(void);
void hang_up_end_request(void);
/* Do the same now, without a signal. */
void hang_up_now(void);
/* Undo hang_up_on_signals(); fine if that was never called. */
void hang_up_stop(void);

#endif
