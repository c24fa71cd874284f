/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/info-text.h"
#include "cli/common/json.h"
#include "drover/ops.h"

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {KEY_BACKING_CHAIN, "backing-chain", NULL, "tell about the parents too", false},
    {KEY_LIMITS, "limits", NULL, "see /sys/block/*/queue", true},
    {0, NULL, NULL, NULL, false},
};

static const char *const key_order[] = {"snapshots",
                                        "backing-filename-format",
                                        "virtual-size",
                                        "filename",
                                        "cluster-size",
                                        "format",
                                        "actual-size",
                                        "encrypted",
                                        "format-specific",
                                        "full-backing-filename",
                                        "backing-filename",
                                        "dirty-flag",
                                        NULL};

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_JSON json_t *info = NULL;
    CLEANUP_FREE char *text = NULL;
    struct dr_error err = DR_ERROR_INIT;
    bool json, chain = cli_has(args, KEY_BACKING_CHAIN);
    int r;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    /* One image is told about whatever state its parents are in; a chain even when its content ids
     * do not fit: they are part of what is told. */
    const struct cli_image_spec spec = {.name = args->operands[0],
                                        .format_key = 'f',
                                        .no_data = true,
                                        .flags = chain ? DR_OPEN_NO_CHECK_ID : DR_OPEN_NO_BACKING};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    r = dr_info(image.path, &image.open, chain, &text, &err);
    if (r < 0) {
        cli_fail_open(cli, image.path, &err);
        return 1;
    }
    info = cli_json_load(cli, text);
    if (!info)
        return 1;
    if (json)
        cli_print_json(info, key_order);
    else
        cli_print_info(info);
    return 0;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_share,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_info = {
    .name = "info",
    .operands = "FILE",
    .brief = "Tell what an image is: format, sizes, parent",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
