/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_EXPORTS_HANG_UP_H
#define DR_EXPORTS_HANG_UP_H

#include "drover/drover.h"

/* Make SIGTERM, SIGINT and SIGQUIT end the connections, too: what their handlers did until now
 * happens first, then clients' connections are shut down for reading, so that requests
 * under way are still answered. Call it when the process has its last signal handlers and listens.
 */
int hang_up_on_signals(struct dr_error *err);
/* Do the same now, without a signal. */
void hang_up_now(void);
/* Undo hang_up_on_signals(); fine if that was never called. */
void hang_up_stop(void);

#endif
