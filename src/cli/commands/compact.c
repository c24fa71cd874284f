/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {KEY_DRY_RUN, "dry-run", NULL, "change nothing, tell what would be given back", false},
    {KEY_NO_ZEROS, "no-zeros", NULL, "do not look for zeros: read no data, only metadata", false},
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'t', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {0, NULL, NULL, NULL, false},
};

struct compact {
    const char *path;
    struct dr_compact_options o;
    struct dr_compact_result result;
};

static int compact(void *user, struct dr_job *job, struct dr_error *err)
{
    struct compact *c = user;

    return dr_compact(c->path, &c->o, job, &c->result, err);
}

static void tell_text(const struct compact *c)
{
    const struct dr_compact_result *r = &c->result;
    char zeros[CLI_SIZE_TEXT], moved[CLI_SIZE_TEXT];

    if (c->o.dry_run)
        printf("%" PRIu64 " bytes (%s) of zeros would be given back.\n"
               "The file would have at most %" PRIu64 " bytes instead of %" PRIu64
               ". Nothing was changed.\n",
               r->zeros, cli_human_size(r->zeros, zeros), r->after, r->before);
    else
        printf("%" PRIu64 " bytes (%s) of zeros given back, %" PRIu64 " bytes (%s) moved.\n"
               "The file has %" PRIu64 " bytes instead of %" PRIu64 ", and takes %" PRIu64
               " instead of %" PRIu64 ".\n",
               r->zeros, cli_human_size(r->zeros, zeros), r->moved, cli_human_size(r->moved, moved),
               r->after, r->before, r->used_after, r->used_before);
}

static void tell_json(const struct compact *c)
{
    static const char *const order[] = {"filename",          "zeros",        "moved",
                                        "length-before",     "length-after", "actual-size-before",
                                        "actual-size-after", "dry-run",      NULL};
    const struct dr_compact_result *r = &c->result;
    CLEANUP_JSON json_t *o = json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:b}", "filename", c->path, "zeros",
        (json_int_t)r->zeros, "moved", (json_int_t)r->moved, "length-before", (json_int_t)r->before,
        "length-after", (json_int_t)r->after, "actual-size-before", (json_int_t)r->used_before,
        "actual-size-after", (json_int_t)r->used_after, "dry-run", c->o.dry_run);

    cli_print_json(o, order);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct compact c = {
        .o = {.dry_run = cli_has(args, KEY_DRY_RUN), .no_zeros = cli_has(args, KEY_NO_ZEROS)}};
    bool json = false;

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    const struct cli_image_spec spec = {.name = args->operands[0],
                                        .format_key = 'f',
                                        .cache_key = 't',
                                        .flags = c.o.dry_run ? 0 : DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    c.path = image.path;
    c.o.open = image.open;
    cli_export_allowed(args);
    int code = cli_job_run(cli, args, compact, &c);
    if (code == 0 && json)
        tell_json(&c);
    else if (code == 0 && !cli_has(args, 'q'))
        tell_text(&c);
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_image,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_compact = {
    .name = "compact",
    .operands = "FILE",
    .brief = "Give back the space that a disk takes and does not need",
    .about =
        "Zeros give up their place, what is behind moves down, and the file is cut, in place.\n"
        "Interrupted anywhere, the disk reads as before; the same command goes on.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
