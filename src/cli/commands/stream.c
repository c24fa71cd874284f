/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {KEY_BASE, "base", "PARENT", "stop there: PARENT stays (without it, no parent stays)", false},
    {KEY_RETIRE, "retire", NULL, "then throw away an add-cow's metadata: its raw file is the disk",
     false},
    {KEY_KEEP, "keep", NULL, "with --retire: rename FILE to FILE.done instead", false},
    {KEY_FORCE, "force", NULL, "with --retire: even if other images have FILE as their parent",
     false},
    {KEY_REFUSE_SNAPSHOTS, "refuse-snapshots", NULL,
     "fail if FILE has snapshots inside, instead of copying for them, too", false},
    {'t', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {0, NULL, NULL, NULL, false},
};

static bool has_parent(const struct cli_image *image)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options o = image->open;

    o.flags = (o.flags & ~(unsigned)DR_OPEN_RDWR) | DR_OPEN_NO_BACKING;
    /* A failure here is not reported: the operation fails in the same way and says why. */
    return dr_open(image->path, &o, &disk, NULL) < 0 || dr_image_backing_name(disk, 0);
}

/* Does the plain file of an image without parents lack anything? */
static bool is_incomplete(const struct cli_image *image)
{
    const struct dr_retire_options look = {.open = image->open, .force = true};
    struct dr_retire_state state;
    bool missing = dr_retire_look(image->path, &look, &state, NULL) == 0 && state.missing > 0;

    free(state.plain);
    return missing;
}

struct stream {
    const char *path;
    struct dr_stream_options o;
};

static int stream(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct stream *s = user;

    return dr_stream(s->path, &s->o, job, err);
}

/* Refuse what would make --retire fail before anything is copied. */
static int check_retire(const struct cli *cli, const struct cli_args *args, const char *path,
                        const struct dr_retire_options *o)
{
    struct dr_retire_state state;
    struct dr_error err = DR_ERROR_INIT;

    if (!cli_has(args, KEY_RETIRE)) {
        if (cli_has(args, KEY_KEEP) || cli_has(args, KEY_FORCE))
            return cli_usage(cli, "--keep and --force go with --retire");
        return 0;
    }
    if (cli_has(args, KEY_BASE))
        return cli_usage(cli, "--retire needs the whole disk: it cannot go with --base");
    int r = dr_retire_look(path, o, &state, &err);
    free(state.plain);
    if (r == 0)
        return 0;
    cli_fail(cli, &err);
    return 1;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct stream s = {.o = {.base = cli_value(args, KEY_BASE),
                             .refuse_snapshots = cli_has(args, KEY_REFUSE_SNAPSHOTS)}};
    struct dr_retire_options retire = {.keep = cli_has(args, KEY_KEEP),
                                       .force = cli_has(args, KEY_FORCE)};
    bool idle;

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .cache_key = 't', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    s.path = image.path;
    s.o.open = retire.open = image.open;
    cli_export_allowed(args);
    if (check_retire(cli, args, image.path, &retire) != 0)
        return 1;
    idle = !has_parent(&image) && !is_incomplete(&image);
    int code = cli_job_run(cli, args, stream, &s);
    if (code == 0 && cli_has(args, KEY_RETIRE))
        return cli_retire(cli, args, image.path, &retire);
    if (code == 0 && idle && !cli_has(args, 'q'))
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
