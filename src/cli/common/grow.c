/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/common/grow.h"

#include <string.h>

#include "base/bytes.h"

int cli_get_filling(const struct cli *cli, const char *mode, enum cli_filling *filling)
{
    static const char *const modes[] = {"off", "falloc", "full"};

    *filling = CLI_FILL_OFF;
    for (unsigned i = 0; mode && i < 3; i++) {
        if (strcmp(mode, modes[i]) == 0) {
            *filling = (enum cli_filling)i;
            return 0;
        }
    }
    if (!mode)
        return 0;
    cli_error(cli,
              strcmp(mode, "metadata") == 0 ? "Unsupported preallocation mode: %s"
                                            : "Invalid preallocation mode '%s'",
              mode);
    return 1;
}

static int write_zeros(struct dr_disk *disk, uint64_t off, uint64_t end, struct dr_error *err)
{
    enum { STEP = 1 << 20 };
    CLEANUP_FREE void *zeros = calloc(1, STEP);
    int r = zeros ? 0 : dr_fail(err, ENOMEM, "out of memory");

    for (; r == 0 && off < end; off += STEP)
        r = dr_pwrite(disk, zeros, off, (size_t)dr_min(STEP, end - off), 0, err);
    return r;
}

int cli_fill(const struct cli *cli, struct dr_disk *disk, enum cli_filling filling, uint64_t old,
             uint64_t size)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = 0;

    if (filling == CLI_FILL_FALLOC) /* what no image has yet must become this one's own first */
        r = dr_zero(disk, old, size - old, DR_EXPLICIT, &err);
    if (r == 0 && filling == CLI_FILL_FALLOC)
        r = dr_zero(disk, old, size - old, 0, &err);
    if (r == 0 && filling == CLI_FILL_FULL)
        r = write_zeros(disk, old, size, &err);
    if (r == 0)
        return 0;
    cli_error(cli, "Could not preallocate new data: %s", err.text);
    if (dr_truncate(disk, old, NULL) < 0)
        cli_error(cli, "the disk keeps the new size");
    return 1;
}
