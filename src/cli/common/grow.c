/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/common/grow.h"

#include <string.h>

int cli_get_prealloc(const struct cli *cli, const char *mode, enum dr_preallocation *prealloc)
{
    static const char *const modes[] = {"off", "metadata", "falloc", "full"};

    *prealloc = DR_PREALLOC_OFF;
    for (unsigned i = 0; mode && i < 4; i++) {
        if (strcmp(mode, modes[i]) == 0) {
            *prealloc = (enum dr_preallocation)i;
            return 0;
        }
    }
    if (!mode)
        return 0;
    cli_error(cli, "Invalid preallocation mode '%s'", mode);
    return 1;
}

static bool is_plain(const char *format)
{
    struct dr_format_info info;

    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, format) == 0)
            return info.plain;
    }
    return false;
}

int cli_resize(const struct cli *cli, struct dr_disk *disk, uint64_t size,
               enum dr_preallocation prealloc)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = dr_resize(disk, size, prealloc, &err);

    if (r == -ENOTSUP && cli->role != CLI_DROVER && prealloc == DR_PREALLOC_METADATA &&
        is_plain(dr_image_format(disk, 0)))
        cli_error(cli, "Unsupported preallocation mode: metadata");
    else if (r == -ENOTSUP && cli->role != CLI_DROVER)
        cli_error(cli, "Image format driver does not support resize");
    else if (r < 0)
        cli_fail(cli, &err);
    return r;
}
