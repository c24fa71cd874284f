/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* For functions on the way of each request: compiled into their callers.
 *
 * Where the kernel guards its returns (AMD's safe RET), a system call leaves the processor without
 * its memory of who called whom, and each return after it costs about 20 cycles more. So it matters
 * for a request that the kernel answers from its cache through how many functions it goes. */
#ifndef DR_BASE_INLINE_H
#define DR_BASE_INLINE_H

#define DR_INLINE static inline __attribute__((always_inline))

#endif
