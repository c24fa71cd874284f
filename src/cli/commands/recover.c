/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"
#include "drover/ops.h"

static const struct cli_option options[] = {
    {KEY_DRY_RUN, "dry-run", NULL, "only tell what was interrupted", false},
    {0, NULL, NULL, NULL, false},
};

static void report(void *user, const char *line)
{
    if (*(const bool *)user)
        return;
    cli_put(line);
    printf("\n");
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct dr_error err = DR_ERROR_INIT;
    bool dry_run = cli_has(args, KEY_DRY_RUN), quiet = cli_has(args, 'q');
    unsigned found = 0;

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one path");
    const struct cli_image_spec spec = {.name = args->operands[0], .format_key = 'f'};
    if (cli_image_get(cli, args, &spec, &image) != 0)
        return 1;
    /* The image may not exist yet, when only the remains of an interrupted creation do. */
    cli_export_allowed(args);
    cli_die_politely(cli, "the same command finishes the work");
    if (dr_recover(image.path, &image.open, dry_run, report, &quiet, &found, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (found == 0 && !quiet) {
        printf("Nothing was interrupted at '");
        cli_put(image.path);
        printf("'.\n");
    } else if (!quiet)
        printf("%u interrupted thing%s %s.\n", found, found == 1 ? "" : "s",
               dry_run ? "found; nothing was changed" : "settled");
    return 0;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_quiet,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_recover = {
    .name = "recover",
    .operands = "PATH",
    .brief = "Tell what was interrupted at an image, and finish or undo it",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
