/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/commands.h"
#include "cli/image.h"
#include "cli/paths.h"
#include "cli/progress.h"

static const struct cli_option options[] = {
    {KEY_BASE, "base", "PARENT", "stop there: PARENT stays (without it, no parent stays)", false},
    {'t', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {0, NULL, NULL, NULL, false},
};

static bool has_parent(const struct cli_image *image)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options o = image->open;

    o.flags = (o.flags & ~(unsigned)DR_OPEN_RDWR) | DR_OPEN_NO_BACKING;
    /* When this fails, the operation itself says why. */
    return dr_open(image->path, &o, &disk, NULL) < 0 || dr_image_backing_name(disk, 0);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct dr_stream_options o = {.base = cli_value(args, KEY_BASE)};
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;
    const char *rate = cli_value(args, 'r');
    uint64_t bytes = 0;
    int code = 0;
    bool had_parent;

    if (rate && cli_get_size(cli, "rate limit", rate, &bytes) < 0)
        return 1;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .cache_key = 't', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    o.open = image.open;
    had_parent = has_parent(&image);
    cli_export_allowed(args);
    if (cli_job_begin(cli, args, &job) != 0)
        return 1;
    job.job.rate = bytes;
    int r = dr_stream(image.path, &o, &job.job, &err);
    if (r < 0)
        code = cli_job_failed(&job, r, &err, 1,
                              "the disk reads as before; the same command finishes the work");
    cli_job_end(&job);
    if (r == 0 && !had_parent && !job.quiet)
        printf("'%s' has no parent: there was nothing to do.\n", image.path);
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_image,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_stream = {
    .name = "stream",
    .operands = "FILE",
    .brief = "Pull the parents' data into a disk, so that it needs them no more",
    .about = "Interrupted anywhere, the disk reads as before; the same command goes on.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
