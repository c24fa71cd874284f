/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"
#include "cli/common/grow.h"
#include "cli/common/image.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {KEY_SHRINK, "shrink", NULL, "allow a smaller size: what is beyond it is lost", false},
    {KEY_PREALLOCATION, "preallocation", "MODE",
     "space for what is new: off, metadata, falloc (reserved), full (zeros)", false},
    {0, NULL, NULL, NULL, false},
};

/* "+1G", "-1G" or "1G" → the new size. */
static int get_size(const struct cli *cli, const char *text, uint64_t old, uint64_t *size)
{
    char sign = text[0] == '+' || text[0] == '-' ? *text++ : '\0';
    uint64_t n;

    if (cli_parse_size(text, &n) < 0) {
        cli_error(cli, "Parameter 'size' expects a non-negative number below 2^64\n"
                       "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, "
                       "peta-\nand exabytes, respectively.");
        return 1;
    }
    *size = n;
    if (sign == '+')
        *size = n > INT64_MAX - old ? 0 : old + n;
    else if (sign == '-')
        *size = n < old ? old - n : 0;
    if (*size > 0)
        return 0;
    cli_error(cli, "New image size must be positive");
    return 1;
}

static int resize(const struct cli *cli, const struct cli_args *args, struct dr_disk *disk,
                  enum dr_preallocation prealloc)
{
    uint64_t old = dr_size(disk), size;

    if (get_size(cli, args->operands[1], old, &size) != 0)
        return 1;
    if (size <= old && prealloc != DR_PREALLOC_OFF) {
        cli_error(cli, "Preallocation can only be used for growing images");
        return 1;
    }
    if (size < old && !cli_has(args, KEY_SHRINK)) {
        cli_error(cli, "Use the --shrink option to perform a shrink operation.");
        cli_error(cli, "warning: Shrinking an image will delete all data beyond the shrunken "
                       "image's end. Before performing such an operation, make sure there is no "
                       "important data there.");
        return 1;
    }
    return cli_resize(cli, disk, size, prealloc) < 0 ? 1 : 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    enum dr_preallocation prealloc;

    if (cli_get_prealloc(cli, cli_value(args, KEY_PREALLOCATION), &prealloc) != 0)
        return 1;
    if (args->n_operands < 2 && args->n_hits == 0) /* qemu-img takes the last word for the size */
        return cli_usage(cli, "Not enough arguments");
    if (args->n_operands != 2)
        return cli_usage(cli, "Expecting image file name and size");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, &disk) < 0)
        return 1;
    cli_die_politely(cli, "the disk has its old size or the new one");
    int code = resize(cli, args, disk, prealloc);
    if (dr_close(disk, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (code == 0 && !cli_has(args, 'q'))
        printf("Image resized.\n");
    return code;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_quiet,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_resize = {
    .name = "resize",
    .operands = "FILE [+|-]SIZE",
    .brief = "Change the size of a disk, where its format can",
    .about = "What is new reads as zeros.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .last_is_operand = true,
    .run = run,
};
