/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/progress.h"
#include "drover/ops.h"

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {'r', "repair", "leaks|all", "repair what was found", false},
    {KEY_DRY_RUN, "dry-run", NULL, "with -r: change nothing, print what would be changed", false},
    {'T', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {0, NULL, NULL, NULL, false},
};

#define NO_CHECKS "This image format does not support checks"

enum { EXIT_CLEAN = 0, EXIT_ERROR = 1, EXIT_CORRUPT = 2, EXIT_LEAKS = 3, EXIT_UNSUPPORTED = 63 };

static const char *const key_order[] = {"image-end-offset",
                                        "compressed-clusters",
                                        "total-clusters",
                                        "corruptions",
                                        "corruptions-fixed",
                                        "corruptions-fixable",
                                        "leaks-fixable",
                                        "plan",
                                        "plan-more",
                                        "check-errors",
                                        "leaks",
                                        "leaks-fixed",
                                        "allocated-clusters",
                                        "filename",
                                        "format",
                                        "fragmented-clusters",
                                        NULL};

struct check {
    const struct cli *cli;
    bool to_stderr; /* findings must not stand in JSON */
    bool quiet;
};

static void report(void *user, const char *line)
{
    const struct check *c = user;

    CLEANUP_FREE char *text = strdup(line);

    if (!c->quiet && text)
        fprintf(c->to_stderr ? stderr : stdout, "%s\n", cli_tame(text));
}

static void print_clusters(const json_t *result)
{
    uint64_t total = cli_json_number(result, "total-clusters");
    uint64_t allocated = cli_json_number(result, "allocated-clusters");

    if (total == 0 || allocated == 0)
        return;
    printf("%" PRIu64 "/%" PRIu64 " = %0.2f%% allocated, %0.2f%% fragmented, "
           "%0.2f%% compressed clusters\n",
           allocated, total, (double)allocated * 100.0 / (double)total,
           (double)cli_json_number(result, "fragmented-clusters") * 100.0 / (double)allocated,
           (double)cli_json_number(result, "compressed-clusters") * 100.0 / (double)allocated);
}

static void print_human(const json_t *result)
{
    uint64_t corruptions = cli_json_number(result, "corruptions");
    uint64_t leaks = cli_json_number(result, "leaks");
    uint64_t errors = cli_json_number(result, "check-errors");

    if (corruptions + leaks + errors == 0)
        printf("No errors were found on the image.\n");
    if (corruptions)
        printf("\n%" PRIu64 " errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.\n",
               corruptions);
    if (leaks)
        printf("\n%" PRIu64 " leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.\n",
               leaks);
    if (errors)
        printf("\n%" PRIu64 " internal errors have occurred during the check.\n", errors);
    print_clusters(result);
    if (json_object_get(result, "image-end-offset"))
        printf("Image end offset: %" PRIu64 "\n", cli_json_number(result, "image-end-offset"));
}

static void print_repaired(const json_t *result)
{
    uint64_t leaks = cli_json_number(result, "leaks-fixed");
    uint64_t corruptions = cli_json_number(result, "corruptions-fixed");

    if (leaks + corruptions == 0)
        return;
    printf("The following inconsistencies were found and repaired:\n\n"
           "    %" PRIu64 " leaked clusters\n    %" PRIu64 " corruptions\n\n"
           "Double checking the fixed image now...\n",
           leaks, corruptions);
}

static void print_plan(const json_t *result)
{
    const json_t *plan = json_object_get(result, "plan"), *change;
    uint64_t more = cli_json_number(result, "plan-more");
    size_t i;

    if (!plan)
        return;
    if (json_array_size(plan) == 0)
        printf("The repair would change nothing.\n");
    json_array_foreach(plan, i, change)
    {
        CLEANUP_FREE char *text = strdup(json_string_value(json_object_get(change, "change")));
        if (text)
            printf("Would change byte %" PRIu64 ": %s\n", cli_json_number(change, "offset"),
                   cli_tame(text));
    }
    if (more)
        printf("%" PRIu64 " more changes are not listed.\n", more);
    if (i)
        printf("That would repair %" PRIu64 " errors and give back %" PRIu64
               " leaked clusters. Nothing was changed.\n",
               cli_json_number(result, "corruptions-fixable"),
               cli_json_number(result, "leaks-fixable"));
}

static int exit_code(const json_t *result)
{
    if (cli_json_number(result, "check-errors"))
        return EXIT_ERROR;
    if (cli_json_number(result, "corruptions"))
        return EXIT_CORRUPT;
    return cli_json_number(result, "leaks") ? EXIT_LEAKS : EXIT_CLEAN;
}

static int get_repair(const struct cli *cli, const struct cli_args *args, unsigned *repair)
{
    const char *mode = cli_value(args, 'r');

    if (mode && strcmp(mode, "leaks") == 0)
        *repair = DR_REPAIR_LEAKS;
    else if (mode && strcmp(mode, "all") == 0)
        *repair = DR_REPAIR_ALL;
    else if (mode)
        return cli_usage(cli, "Unknown option value for -r (expecting 'leaks' or 'all'): %s", mode);
    if (cli_has(args, KEY_DRY_RUN) && !mode)
        return cli_usage(cli, "--dry-run goes with -r");
    if (cli_has(args, KEY_DRY_RUN))
        *repair |= DR_REPAIR_DRY_RUN;
    return 0;
}

static int check(struct check *c, const struct cli_image *image, unsigned repair, bool json)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *text = NULL;
    CLEANUP_JSON json_t *result = NULL;
    int r = dr_check(image->path, &image->open, repair, report, c, &text, &err);

    /* Opening may be refused with the same number. */
    if (r == -ENOTSUP && strcmp(err.text, NO_CHECKS) == 0) {
        cli_error(c->cli, NO_CHECKS);
        return EXIT_UNSUPPORTED;
    }
    if (r < 0) {
        cli_fail_open(c->cli, image->path, &err);
        return EXIT_ERROR;
    }
    result = cli_json_load(c->cli, text);
    if (!result)
        return EXIT_ERROR;
    if (json && !c->quiet) {
        cli_print_json(result, key_order);
    } else if (!c->quiet) {
        print_repaired(result);
        print_human(result);
        print_plan(result);
    }
    return exit_code(result);
}

/* qemu-img fails the check of an image whose parents do not open. Problems of the image itself
 * are left to the check. */
static bool parents_open(const struct cli *cli, const struct cli_image *image)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_open_options open = image->open;
    const char *child;

    open.flags = (open.flags & ~(unsigned)DR_OPEN_RDWR) | DR_OPEN_NO_CHECK_ID;
    if (dr_open(image->path, &open, &disk, &err) == 0 || !cli_backing_reason(&err, &child))
        return true;
    cli_fail_open(cli, image->path, &err);
    return false;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct check c = {.cli = cli, .quiet = cli_has(args, 'q')};
    unsigned repair = DR_REPAIR_NONE;
    bool json, changes;

    if (get_repair(cli, args, &repair) != 0 || cli_output_json(cli, args, &json) != 0)
        return EXIT_ERROR;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    c.to_stderr = json;
    changes = repair && !(repair & DR_REPAIR_DRY_RUN);
    const struct cli_image_spec spec = {
        .name = args->operands[0],
        .format_key = 'f',
        .cache_key = 'T',
        .no_data = true,
        .flags = changes ? (unsigned)DR_OPEN_RDWR : 0,
    };
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return EXIT_ERROR;
    if (cli->role == CLI_QEMU_IMG && !parents_open(cli, &image))
        return EXIT_ERROR;
    cli_die_politely(cli, changes ? "the disk reads as before; the same command finishes the work"
                                  : "nothing was changed");
    return check(&c, &image, repair, json);
}

static const struct cli_option *const sets[] = {options,        cli_opts_image,  cli_opts_share,
                                                cli_opts_quiet, cli_opts_common, NULL};

const struct cli_command cli_cmd_check = {
    .name = "check",
    .operands = "FILE",
    .brief = "Check an image's metadata, and repair it when asked",
    .about = "Ends with 0: clean, 1: could not check, 2: damage, 3: only wasted space, 63: the\n"
             "format has nothing to check.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
