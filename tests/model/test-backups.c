/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Full and incremental backups of every format that keeps bitmaps, inside or beside, with bitmaps
 * of every granularity: each shows what the disk held at its instant. */
#include "backups.h"

#include "slower.h"

static void each_backup_holds_its_instant(void **state)
{
    static const uint64_t granularities[] = {512, 4096, 65536, 2u << 20};
    enum { N = sizeof(granularities) / sizeof(granularities[0]) };
    const struct subject *s = *state;
    /* With a sanitizer each subject has one of them, and all come up. */
    unsigned step = SLOWER > 1 ? N : 1, first = (unsigned)strlen(s->name) % step;
    for (unsigned i = first; i < model_length(N); i += step)
        backups_program(*state, model_seed() + i, granularities[i % N], 30, 4);
}

int main(void)
{
    return model_run("each backup holds its instant", each_backup_holds_its_instant, backups_takes)
               ? 1
               : 0;
}
