/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "base/bytes.h"
#include "cli/commands.h"
#include "cli/image.h"
#include "cli/progress.h"

static const struct cli_option options[] = {
    {KEY_SHRINK, "shrink", NULL, "allow a smaller size: what is beyond it is lost", false},
    {KEY_PREALLOCATION, "preallocation", "MODE",
     "space for what is new: off, falloc (reserved), full (zeros are written)", false},
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

enum filling { FILL_OFF, FILL_FALLOC, FILL_FULL };

static int get_filling(const struct cli *cli, const char *mode, enum filling *filling)
{
    static const char *const modes[] = {"off", "falloc", "full"};

    *filling = FILL_OFF;
    for (unsigned i = 0; mode && i < 3; i++) {
        if (strcmp(mode, modes[i]) == 0) {
            *filling = (enum filling)i;
            return 0;
        }
    }
    if (!mode)
        return 0;
    cli_error(cli,
              strcmp(mode, "metadata") == 0 ? "Unsupported preallocation mode '%s'"
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

/* Space for all of it, or the old size again. */
static int fill(const struct cli *cli, struct dr_disk *disk, enum filling filling, uint64_t old,
                uint64_t size)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = 0;

    if (filling == FILL_FALLOC) /* what no image has yet must become this one's own first */
        r = dr_zero(disk, old, size - old, DR_EXPLICIT, &err);
    if (r == 0 && filling == FILL_FALLOC)
        r = dr_zero(disk, old, size - old, 0, &err);
    if (r == 0 && filling == FILL_FULL)
        r = write_zeros(disk, old, size, &err);
    if (r == 0)
        return 0;
    cli_error(cli, "Could not preallocate new data: %s", err.text);
    if (dr_truncate(disk, old, NULL) < 0)
        cli_error(cli, "the disk keeps the new size");
    return 1;
}

static int resize(const struct cli *cli, const struct cli_args *args, struct dr_disk *disk,
                  enum filling filling)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t old = dr_size(disk), size;

    if (get_size(cli, args->operands[1], old, &size) != 0)
        return 1;
    if (size <= old && filling != FILL_OFF) {
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
    int r = dr_truncate(disk, size, &err);
    if (r == -ENOTSUP && cli->role != CLI_DROVER)
        cli_error(cli, "Image format driver does not support resize");
    else if (r < 0)
        cli_fail(cli, &err);
    return r < 0 ? 1 : fill(cli, disk, filling, old, size);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    enum filling filling;

    if (get_filling(cli, cli_value(args, KEY_PREALLOCATION), &filling) != 0)
        return 1;
    if (args->n_operands != 2)
        return cli_usage(cli, "Expecting image file name and size");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, &disk) < 0)
        return 1;
    cli_die_politely(cli, "the disk has its old size or the new one");
    int code = resize(cli, args, disk, filling);
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
