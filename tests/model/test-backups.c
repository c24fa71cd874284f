/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Full and incremental backups of every format that keeps bitmaps, inside or beside, with bitmaps
 * of every granularity: each shows what the disk held at its instant. */
#include "backups.h"

static void each_backup_holds_its_instant(void **state)
{
    static const uint64_t granularities[] = {512, 4096, 65536, 2u << 20};
    enum { N = sizeof(granularities) / sizeof(granularities[0]) };
    for (unsigned i = 0; i < model_length(N); i++)
        backups_program(*state, model_seed() + i, granularities[i % N], 30, 4);
}

int main(void)
{
    return model_run("each backup holds its instant", each_backup_holds_its_instant, backups_takes)
               ? 1
               : 0;
}
