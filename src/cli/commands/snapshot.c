/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"
#include "cli/common/tree.h"

static const struct cli_option options[] = {
    {'c', "create", NULL, "make a child of FILE; it is the new active disk (named NAME)", false},
    {'l', "list", NULL, "show FILE's family as a tree", false},
    {KEY_OUTPUT, "output", "human|json", "how to print the tree", false},
    {KEY_ASCII, "ascii", NULL, "draw the tree with plain characters", false},
    {'a', "apply", NULL, "internal snapshots", true},
    {'d', "delete", NULL, "internal snapshots", true},
    {0, NULL, NULL, NULL, false},
};

/* qemu-img's snapshots live inside an image: none of our formats has them. */
static const struct cli_option qemu_options[] = {
    {'l', NULL, NULL, "list the internal snapshots", false},
    {'c', NULL, "NAME", "make an internal snapshot", false},
    {'a', NULL, "NAME", "go back to an internal snapshot", false},
    {'d', NULL, "NAME", "delete an internal snapshot", false},
    {0, NULL, NULL, NULL, false},
};

int cli_show_tree(const struct cli *cli, const struct cli_args *args, const struct cli_image *image,
                  unsigned *problems)
{
    struct dr_tree_node *nodes = NULL;
    struct dr_error err = DR_ERROR_INIT;
    size_t n = 0;
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (dr_tree(image->path, &image->open, &nodes, &n, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    for (size_t i = 0; i < n; i++)
        *problems += nodes[i].problem != NULL;
    if (json) {
        CLEANUP_JSON json_t *tree = cli_tree_json(nodes, n);
        json_dumpf(tree, stdout, JSON_INDENT(4) | JSON_ENSURE_ASCII);
        printf("\n");
    } else {
        cli_tree_print(nodes, n, cli_has(args, KEY_ASCII) || !cli_utf8());
    }
    dr_tree_free(nodes, n);
    return 0;
}

static int create(const struct cli *cli, const struct cli_args *args, const struct cli_image *image,
                  const char *name)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *active = NULL;

    if (dr_snapshot_create(image->path, name, &image->open, &active, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (!cli_has(args, 'q'))
        printf("%s\n", active);
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    bool making = cli_has(args, 'c');
    unsigned problems = 0;

    if (making && cli_has(args, 'l'))
        return cli_usage(cli, "Cannot mix '-l', '-a', '-c', '-d'");
    if (args->n_operands < 1 || args->n_operands > (making ? 2 : 1))
        return cli_usage(cli, making ? "Expecting [NAME] and one image file name"
                                     : "Expecting one image file name");
    const struct cli_image_spec spec = {.name = args->operands[args->n_operands - 1],
                                        .format_key = 'f'};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    cli_export_allowed(args);
    if (making) {
        cli_catch_signals(); /* it takes no time, and nothing is left half made */
        return create(cli, args, &image, args->n_operands == 2 ? args->operands[0] : NULL);
    }
    cli_die_politely(cli, "nothing was changed");
    return cli_show_tree(cli, args, &image, &problems);
}

static int run_as_qemu(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_DISK struct dr_disk *disk = NULL;
    unsigned actions = (unsigned)cli_has(args, 'l') + cli_has(args, 'a') + cli_has(args, 'c') +
                       cli_has(args, 'd');

    if (actions > 1)
        return cli_usage(cli, "Cannot mix '-l', '-a', '-c', '-d'");
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    const struct cli_image_spec spec = {.name = args->operands[0], .no_data = cli_has(args, 'l')};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, &disk) < 0)
        return 1;
    if (cli_has(args, 'c'))
        cli_error(cli, "Could not create snapshot '%s': -95 (Operation not supported)",
                  cli_value(args, 'c'));
    else if (cli_has(args, 'a'))
        cli_error(cli, "Could not apply snapshot '%s': Block driver does not support snapshots",
                  cli_value(args, 'a'));
    else if (cli_has(args, 'd'))
        cli_error(cli, "Could not delete snapshot '%s': snapshot not found", cli_value(args, 'd'));
    return actions > 0 && !cli_has(args, 'l');
}

static const struct cli_option *const sets[] = {options,        cli_opts_image,  cli_opts_share,
                                                cli_opts_quiet, cli_opts_common, NULL};
static const struct cli_option *const qemu_sets[] = {
    qemu_options, cli_opts_image, cli_opts_share, cli_opts_quiet, cli_opts_common, NULL};

const struct cli_command cli_cmd_snapshot = {
    .name = "snapshot",
    .operands = "-c [NAME] FILE | -l FILE",
    .brief = "Freeze a disk and go on in a new child, or show the family",
    .about = "-c prints the name of the new active disk; FILE becomes its frozen parent. Without\n"
             "NAME the child of X.vmdk is called X-000001.vmdk, with the lowest free number.\n"
             "The tree marks FILE with *; what does not open with its parent says why.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};

const struct cli_command cli_cmd_qemu_snapshot = {
    .name = "snapshot",
    .operands = "FILE",
    .brief = "Internal snapshots",
    .sets = qemu_sets,
    .roles = CLI_QEMU_IMG,
    .run = run_as_qemu,
};
