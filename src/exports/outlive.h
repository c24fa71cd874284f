/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_EXPORTS_OUTLIVE_H
#define DR_EXPORTS_OUTLIVE_H

/* Keep serving the other clients where nbdkit would abort because one went away. Call it once, in
 * the process that serves. */
void outlive_clients_that_vanish(void);

#endif
