/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Random programs over one disk of which backups are taken: what the disk held at each instant is
 * kept in memory, and each backup must show exactly that, at once and at the end, and what is left
 * of it after a power cut. */
#ifndef DROVER_TESTS_BACKUPS_H
#define DROVER_TESTS_BACKUPS_H

#include "model.h"
#include "powerfs.h"

/* One program; granularity: of the bitmaps. Fails the test on anything that is wrong. */
void backups_program(const struct subject *s, uint64_t seed, uint64_t granularity, unsigned steps,
                     unsigned cuts);

/* Are we looking at what a power cut has left? For planted faults. */
extern bool backups_after_cut;

/* Formats that are written to, and keep bitmaps inside or beside. */
bool backups_takes(const struct subject *s);

#endif
