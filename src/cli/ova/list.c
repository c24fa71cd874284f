/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What `info` tells of a machine, a line for each disk. */
#include <inttypes.h>
#include <string.h>

#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/ova/ova.h"
#include "drover/ops.h"

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {0, NULL, NULL, NULL, false},
};

static const char *const key_order[] = {"machine", "descriptor", "manifest",
                                        "disks",   "problem",    NULL};

static void print_disk(const json_t *disk)
{
    const json_t *capacity = json_object_get(disk, "capacity");
    const char *problem = json_string_value(json_object_get(disk, "problem"));
    char text[CLI_SIZE_TEXT];

    cli_put(json_string_value(json_object_get(disk, "name")));
    if (json_is_integer(capacity))
        printf("  %s", cli_human_size((uint64_t)json_integer_value(capacity), text));
    if (json_object_get(disk, "stored"))
        printf(", stored in %s", cli_human_size(cli_json_number(disk, "stored"), text));
    if (problem) {
        printf("  ");
        cli_put(problem);
    }
    printf("\n");
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_JSON json_t *info = NULL;
    CLEANUP_FREE char *text = NULL;
    struct dr_error err = DR_ERROR_INIT;
    json_t *disks, *disk;
    bool json;
    size_t i;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one archive or descriptor");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .no_data = true, .flags = DR_OPEN_NO_BACKING};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    if (dr_info(image.path, &image.open, false, &text, &err) < 0) {
        cli_fail_open(cli, image.path, &err);
        return 1;
    }
    info = cli_json_load(cli, text);
    if (!info)
        return 1;
    json_t *data = json_object_get(json_object_get(info, "format-specific"), "data");
    disks = json_object_get(data, "disks");
    if (!json_object_get(data, "descriptor")) {
        cli_error(cli, "%s: is no OVA, and no OVF descriptor", image.path);
        return 1;
    }
    if (json) {
        cli_print_json(data, key_order);
        return 0;
    }
    json_array_foreach(disks, i, disk) print_disk(disk);
    return 0;
}

static const struct cli_option *const sets[] = {options, cli_opts_share, cli_opts_common, NULL};

const struct cli_command ova_cmd_list = {
    .name = "ova list",
    .operands = "ARCHIVE",
    .brief = "List the disks of a machine in an OVA, or of an OVF descriptor",
    .about = "Each is an image, ova:ARCHIVE#NAME, for every command that reads images.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
