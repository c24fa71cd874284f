/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What is no failure, but somebody should know. */
#ifndef DR_BASE_NOTICE_H
#define DR_BASE_NOTICE_H

/* A line for whom dr_on_notice() named; the text names the file, as an error does. */
void dr_notice(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
