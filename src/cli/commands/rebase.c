/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/suggest.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {'b', "backing", "FILE", "the new parent, as it is to be recorded; \"\": none (flatten)",
     false},
    {'F', "backing-format", "FMT", "format of the new parent", false},
    {'u', "unsafe", NULL, "only rewrite the name: the parents must hold the same", false},
    {KEY_FORCE, "force", NULL, "with -u: even a parent that is missing, FILE itself, a loop",
     false},
    {KEY_DROP_EQUAL, "drop-equal", NULL, "then give up what equals the new parent", false},
    {KEY_DRY_RUN, "dry-run", NULL, "only find out what it would do: copy, give back", false},
    {KEY_REFUSE_SNAPSHOTS, "refuse-snapshots", NULL,
     "fail if FILE has snapshots inside, instead of copying for them, too", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'t', NULL, "CACHE", "cache mode of FILE and its parents", false},
    {'T', NULL, "CACHE", "cache mode of the new parent", false},
    {'c', "compress", NULL, "compress what is copied", false},
    {0, NULL, NULL, NULL, false},
};

/* The recorded name must be one that every reader of the format understands. */
static int get_backing(const struct cli *cli, const struct cli_args *args, char **backing)
{
    const char *name = cli_value(args, 'b');

    if (!name)
        return 0;
    if (cli_foreign_protocol(cli, name)) {
        cli_error(cli, "Could not open new backing file '%s': Unknown protocol '%.*s'", name,
                  (int)cli_foreign_protocol(cli, name), name);
        return 1;
    }
    *backing = cli_plain_name(cli, name);
    return *backing ? 0 : 1;
}

static int get_options(const struct cli *cli, const struct cli_args *args,
                       struct dr_rebase_options *o)
{
    unsigned ignored = 0;

    o->backing_format = cli_value(args, 'F');
    o->unsafe = cli_has(args, 'u');
    o->force = cli_has(args, KEY_FORCE);
    o->drop_equal = cli_has(args, KEY_DROP_EQUAL);
    o->force_share = cli_has(args, 'U');
    o->dry_run = cli_has(args, KEY_DRY_RUN);
    o->compress = cli_has(args, 'c');
    o->refuse_snapshots = cli_has(args, KEY_REFUSE_SNAPSHOTS);
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    if (!o->backing && !o->unsafe)
        return cli_usage(cli, "Must specify backing file (-b) or use unsafe mode (-u)");
    if (!o->backing)
        o->backing = "";
    const char *cache = cli_value(args, 'T');
    if (cache && cli_cache_flags(cache, &ignored, NULL) < 0) {
        cli_error(cli, "Invalid source cache option: %s", cache);
        return 1;
    }
    if (o->backing_format && !cli_format_exists(o->backing_format)) {
        cli_error(cli, "Invalid format name: '%s'", o->backing_format);
        return 1;
    }
    /* As drover, ask for a format only where the library does not know it from the child's
     * format. */
    if (o->backing[0] && !o->backing_format && cli->role != CLI_DROVER) {
        cli_error(cli,
                  "Could not change the backing file to '%s': backing format must be specified",
                  o->backing);
        return 1;
    }
    return 0;
}

/* Report a missing parent in qemu-img's words, which scripts look for. */
static int check_backing(const struct cli *cli, const struct cli_image *image,
                         const struct dr_rebase_options *o)
{
    if (!o->backing || !o->backing[0] || (o->unsafe && o->force))
        return 0;
    CLEANUP_FREE char *path = cli_path_beside(image->path, o->backing);
    if (!path || cli_name_exists(path))
        return 0;
    cli_error(cli, "Could not open new backing file '%s': Could not open '%s': %s", o->backing,
              path, strerror(errno));
    cli_hint_relative(cli, image->path, o->backing);
    return 1;
}

struct rebase {
    const char *path;
    struct dr_rebase_options o;
};

static int rebase(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct rebase *rb = user;

    return dr_rebase(rb->path, &rb->o, job, err);
}

static void tell_plan(const struct dr_rebase_options *o)
{
    char copied[CLI_SIZE_TEXT], freed[CLI_SIZE_TEXT];

    printf("%" PRIu64 " bytes (%s) would be copied", o->plan->copied,
           cli_human_size(o->plan->copied, copied));
    if (o->plan->free != UINT64_MAX)
        printf(", %" PRIu64 " are free", o->plan->free);
    if (o->drop_equal)
        printf("; %" PRIu64 " bytes (%s) would be given back", o->plan->freed,
               cli_human_size(o->plan->freed, freed));
    printf(".\nIt would work; nothing was changed.\n");
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_FREE char *backing = NULL;
    struct dr_rebase_plan plan = {0};
    struct rebase rb = {.o.plan = &plan};

    if (get_backing(cli, args, &backing) != 0)
        return 1;
    rb.o.backing = backing;
    if (get_options(cli, args, &rb.o) != 0)
        return 1;
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .cache_key = 't', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0 ||
        check_backing(cli, &image, &rb.o) != 0)
        return 1;
    if ((image.open.flags & DR_OPEN_NO_BACKING) && !rb.o.unsafe) {
        cli_error(cli, "'%s': without its backing file there is nothing to copy from: use -u",
                  image.path);
        return 1;
    }
    rb.path = image.path;
    rb.o.open = image.open;
    cli_export_allowed(args);
    int code = cli_job_run(cli, args, rebase, &rb);
    if (code == 0 && rb.o.dry_run && !cli_has(args, 'q'))
        tell_plan(&rb.o);
    return code;
}

static const struct cli_option *const sets[] = {
    options, cli_opts_image, cli_opts_share, cli_opts_quiet, cli_opts_progress, cli_opts_common,
    NULL};

const struct cli_command cli_cmd_rebase = {
    .name = "rebase",
    .operands = "FILE",
    .brief = "Give a disk another parent, or none, without changing what it holds",
    .about = "Interrupted anywhere, the disk reads as before; the same command finishes the work.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
