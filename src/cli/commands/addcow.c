/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {KEY_KEEP, "keep", NULL, "rename FILE to FILE.done instead of removing it", false},
    {KEY_FORCE, "force", NULL, "even if other images have FILE as their parent", false},
    {0, NULL, NULL, NULL, false},
};

int cli_retire(const struct cli *cli, const struct cli_args *args, const char *path,
               const struct dr_retire_options *o)
{
    CLEANUP_FREE char *plain = NULL;
    struct dr_error err = DR_ERROR_INIT;

    if (dr_retire(path, o, &plain, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (cli_has(args, 'q'))
        return 0;
    cli_put(plain);
    printf(" is the whole disk now: a raw image that needs no other file. ");
    cli_put(path);
    printf(o->keep ? " is put away as " : " is gone");
    if (o->keep)
        cli_put(path);
    printf(o->keep ? ".done.\n" : ".\n");
    return 0;
}

static int retire(const struct cli *cli, const struct cli_args *args, const char *name)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct dr_retire_options o = {.keep = cli_has(args, KEY_KEEP),
                                  .force = cli_has(args, KEY_FORCE)};
    const struct cli_image_spec spec = {.name = name, .format_key = 'f', .flags = DR_OPEN_RDWR};

    if (cli_image_get(cli, args, &spec, &image) != 0)
        return 1;
    o.open = image.open;
    cli_export_allowed(args);
    cli_die_politely(cli, "the disk reads as before; the same command finishes the work");
    return cli_retire(cli, args, image.path, &o);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    if (args->n_operands != 2)
        return cli_usage(cli, "Expecting retire and one image file name");
    if (strcmp(args->operands[0], "retire") != 0)
        return cli_usage(cli, "Expecting retire, not '%s'", args->operands[0]);
    return retire(cli, args, args->operands[1]);
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_quiet,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_addcow = {
    .name = "addcow",
    .operands = "retire FILE",
    .brief = "Throw away the metadata of an add-cow disk whose raw file holds everything",
    .about = "retire refuses, and tells what is missing, until `drover stream FILE` is through.\n"
             "Then the raw file is the disk, and FILE and its parents are needed no more.\n"
             "Interrupted anywhere, the same command finishes the work.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
