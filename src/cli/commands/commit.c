/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {'b', "base", "FILE", "the parent that takes the data (the nearest one)", false},
    {'d', "keep", NULL, "do not empty FILE afterwards", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'t', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {KEY_FORCE, "force", NULL, "even if other images have the same parent and would break", false},
    {0, NULL, NULL, NULL, false},
};

static int has_parent(const struct cli *cli, const struct cli_image *image, const char *base)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct cli_image look = *image;

    look.open.flags = (look.open.flags & ~(unsigned)DR_OPEN_RDWR) | DR_OPEN_NO_BACKING;
    if (cli_image_open(cli, &look, &disk) < 0)
        return 1;
    if (dr_image_backing_name(disk, 0))
        return 0;
    if (cli->role == CLI_DROVER)
        cli_error(cli, "%s: has no parent to commit into", image->path);
    else if (base)
        cli_error(cli, "Did not find '%s' in the backing chain of '%s'", base, image->given);
    else
        cli_error(cli, "Image does not have a backing file");
    return 1;
}

struct commit {
    const char *path;
    struct dr_commit_options o;
};

static int commit(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct commit *c = user;

    return dr_commit(c->path, &c->o, job, err);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct commit c = {.o = {
                           .base = cli_value(args, 'b'),
                           .keep = cli_has(args, 'd') || cli_has(args, 'b'),
                           .force = cli_has(args, KEY_FORCE),
                       }};

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .cache_key = 't', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || has_parent(cli, &image, c.o.base) != 0)
        return 1;
    c.path = image.path;
    c.o.open = image.open;
    cli_export_allowed(args);
    int code = cli_job_run(cli, args, commit, &c);
    if (code == 0 && !cli_has(args, 'q'))
        printf("Image committed.\n");
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_image,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_commit = {
    .name = "commit",
    .operands = "FILE",
    .brief = "Write what a disk holds into its parent",
    .about = "Other images on the same parent would read something else afterwards: the command\n"
             "lists them and refuses.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
