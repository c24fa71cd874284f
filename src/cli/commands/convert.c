/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <string.h>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/suggest.h"
#include "cli/common/pipes.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {'f', "format", "FMT", "format of the sources; without it, it is found out", false},
    {'O', "target-format", "FMT", "format of the target (raw)", false},
    {'o', "options", "NAME=VALUE,...", "settings of the target's format; -o help lists them",
     false},
    {'n', "no-create", NULL, "the target exists: write over what it holds", false},
    {KEY_TARGET_IS_ZERO, "target-is-zero", NULL, "with -n: the target reads as zeros", false},
    {'B', "backing", "FILE", "make the target a child of FILE, with what differs only", false},
    {'F', "backing-format", "FMT", "format of the target's parent", false},
    {'S', "sparse", "SIZE", "runs of zeros this long are not written (4k); 0: write all", false},
    {'t', NULL, "CACHE", "cache mode of the target (unsafe: no sync at the end)", false},
    {'T', NULL, "CACHE", "cache mode of the sources", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'m', "jobs", "N", "how many workers, 1 to 16", false},
    {'W', NULL, NULL, "write in any order (always done where it is faster)", false},
    {KEY_SALVAGE, "salvage", NULL, "unreadable parts of a source become zeros", false},
    {KEY_VERIFY, "verify", NULL, "first compare a source in an OVA with the manifest", false},
    {KEY_ORPHANS, "orphans", "FILE", "--salvage: put into FILE what nothing in the source leads to",
     false},
    {KEY_IMAGE_OPTS, "image-opts", NULL, "sources are lists like driver=vmdk,file.filename=PATH",
     false},
    {KEY_TARGET_IMAGE_OPTS, "target-image-opts", NULL, "with -n: the target is such a list", false},
    {'c', "compress", NULL, "compress the target (qcow2)", false},
    {'C', NULL, NULL, "let the kernel copy what it can (reflink): zeros are not looked for", false},
    {'l', "snapshot", "NAME", "the source as a snapshot inside it shows it: a name, or an id",
     false},
    {KEY_BITMAPS, "bitmaps", NULL, "copy the bitmaps inside the source's own image, too", false},
    {KEY_OUTPUT, "output", "human|json", "--salvage: how to list what cannot be vouched for",
     false},
    {KEY_FORCE, "force", NULL, "also a growing VMDK of more than 2 TiB, which VMware does not take",
     false},
    {KEY_CHECKSUM, "checksum", NULL, "print the checksum of what the target shows", false},
    {KEY_SKIP_BROKEN_BITMAPS, "skip-broken-bitmaps", NULL, "--bitmaps: without inconsistent ones",
     false},
    {0, NULL, NULL, NULL, false},
};

struct convert {
    const struct cli *cli;
    struct dr_convert_options o;
    struct cli_pairs pairs;
    char *backing, *backing_format;
    struct cli_image *sources;
    struct cli_image target;
    struct cli_pipe in, out; /* what the source and the target are, if they are no files */
    const char *orphans;
    char digest[DR_CHECKSUM_TEXT];
    uint64_t rate;
    bool lost;        /* something could not be read, and is zeros in the target */
    json_t *salvaged; /* --output=json: the ranges that cannot be vouched for; else NULL */
    bool not_told;    /* one is missing in it */
    size_t n;
};

static void convert_free(struct convert *c)
{
    for (size_t i = 0; i < c->n; i++)
        cli_image_free(&c->sources[i]);
    free(c->sources);
    cli_image_free(&c->target);
    cli_pipe_close(&c->in);
    cli_pipe_close(&c->out);
    cli_pairs_free(&c->pairs);
    free(c->backing);
    free(c->backing_format);
    json_decref(c->salvaged);
}

static int get_sparse(struct convert *c, const char *text)
{
    c->o.sparse_size = DR_CONVERT_SPARSE_DEFAULT;
    if (!text)
        return 0;
    if (cli_get_size(c->cli, "buffer size for sparse output", text, &c->o.sparse_size) < 0)
        return 1;
    if (c->o.sparse_size % 512 == 0 && c->o.sparse_size <= 16777216)
        return 0;
    cli_error(c->cli, "Invalid buffer size for sparse output specified. Valid sizes are multiples "
                      "of 512 up to 16777216. Select 0 to disable sparse detection (fully "
                      "allocates output).");
    return 1;
}

static int get_workers(const struct cli *cli, const char *text, unsigned *workers)
{
    char *end;
    long n = text ? strtol(text, &end, 10) : 0;

    if (!text)
        return 0;
    if (end == text || *end || n < 1 || n > 16) {
        cli_error(cli, "Invalid number of coroutines. Allowed number of coroutines is between 1 "
                       "and 16");
        return 1;
    }
    *workers = (unsigned)n;
    return 0;
}

/* -o backing_file=B,backing_fmt=F is the same as -B and -F. */
static int get_settings(struct convert *c, const struct cli_args *args)
{
    const char *text;

    if (cli_pairs_from_args(c->cli, args, &c->pairs) < 0)
        return 1;
    CLEANUP_FREE char *in_list = cli_pairs_take(&c->pairs, "backing_file");
    text = cli_has(args, 'B') ? cli_value(args, 'B') : in_list;
    c->backing = text ? cli_plain_name(c->cli, text) : NULL;
    c->backing_format = cli_pairs_take(&c->pairs, "backing_fmt");
    c->o.backing = c->backing;
    c->o.backing_format = cli_has(args, 'F') ? cli_value(args, 'F') : c->backing_format;
    if (c->o.no_create && cli_has(args, 'o')) {
        cli_error(c->cli, "-o has no effect when skipping image creation");
        return 1;
    }
    if (c->o.backing_format && !c->o.backing && !c->o.no_create &&
        !cli_parent_may_be(c->o.out_format, c->o.backing_format)) {
        cli_error(c->cli, "Backing file format not supported for file format '%s'",
                  c->o.out_format);
        return 1;
    }
    for (size_t i = 0; i < c->pairs.n; i++) {
        if (!cli_option_exists(c->o.out_format, c->pairs.pairs[i].name)) {
            cli_error(c->cli, "Invalid parameter '%s'", c->pairs.pairs[i].name);
            return 1;
        }
    }
    c->o.pairs = c->pairs.pairs;
    c->o.n_pairs = c->pairs.n;
    if (c->o.backing && !c->o.backing_format && !cli_has(args, 'n') &&
        (c->cli->role != CLI_DROVER || !cli_parent_is_known(c->o.out_format))) {
        cli_error(c->cli, "Use of backing file requires explicit backing format");
        return 1;
    }
    return 0;
}

static int get_target_flags(struct convert *c, const struct cli_args *args)
{
    const char *cache = cli_has(args, 't') ? cli_value(args, 't') : "unsafe";

    if (cli_cache_flags(cache, &c->o.target_flags, NULL) < 0) {
        cli_error(c->cli, "Invalid cache option: %s", cache);
        return 1;
    }
    c->o.unsafe_target = c->o.target_flags & DR_OPEN_NO_FLUSH;
    return cli_shared_flags(c->cli, args, &c->o.target_flags);
}

static int get_options(struct convert *c, const struct cli_args *args,
                       struct cli_job_limits *limits)
{
    c->o.out_format = cli_has(args, 'O') ? cli_value(args, 'O') : "raw";
    c->o.compress = cli_has(args, 'c');
    c->o.no_create = cli_has(args, 'n');
    c->o.target_is_zero = cli_has(args, KEY_TARGET_IS_ZERO);
    c->o.salvage = cli_has(args, KEY_SALVAGE);
    c->orphans = cli_value(args, KEY_ORPHANS);
    c->o.digest = cli_has(args, KEY_CHECKSUM) ? c->digest : NULL;
    c->o.offload = cli_has(args, 'C');
    c->o.bitmaps = cli_has(args, KEY_BITMAPS);
    c->o.skip_broken_bitmaps = cli_has(args, KEY_SKIP_BROKEN_BITMAPS);
    c->o.bitmaps_inside = c->cli->role == CLI_QEMU_IMG; /* which knows no others */
    if (c->o.skip_broken_bitmaps && !c->o.bitmaps) {
        cli_error(c->cli, "Use of --skip-broken-bitmaps requires --bitmaps");
        return 1;
    }
    if (c->orphans && !c->o.salvage) {
        cli_error(c->cli, "--orphans requires --salvage");
        return 1;
    }
    if (!cli_format_exists(c->o.out_format)) {
        cli_error(c->cli, "Unknown file format '%s'", c->o.out_format);
        return 1;
    }
    if (c->o.target_is_zero && !c->o.no_create) {
        cli_error(c->cli, "--target-is-zero requires use of -n flag");
        return 1;
    }
    if (cli_has(args, KEY_TARGET_IMAGE_OPTS) && !c->o.no_create) {
        cli_error(c->cli, "--target-image-opts requires use of -n flag");
        return 1;
    }
    if (c->o.offload && cli_has(args, 'S')) {
        cli_error(c->cli, "Cannot enable copy offloading when -S is used");
        return 1;
    }
    if (c->o.offload && c->o.compress) {
        cli_error(c->cli, "Cannot enable copy offloading when -c is used");
        return 1;
    }
    if (c->o.offload && c->o.salvage) {
        cli_error(c->cli, "Cannot use copy offloading in salvaging mode");
        return 1;
    }
    bool json;
    if (cli_output_json(c->cli, args, &json) != 0)
        return 1;
    if (json && (!c->o.salvage || c->o.digest)) {
        cli_error(c->cli, "--output=json requires --salvage, and excludes --checksum");
        return 1;
    }
    if (json && !(c->salvaged = json_array())) {
        cli_error(c->cli, "out of memory");
        return 1;
    }
    const char *rate = cli_value(args, 'r');
    if (rate && cli_get_size(c->cli, "rate limit", rate, &c->rate) < 0)
        return 1;
    return get_sparse(c, cli_value(args, 'S')) ||
           get_workers(c->cli, cli_value(args, 'm'), &limits->workers) || get_settings(c, args) ||
           get_target_flags(c, args);
}

/* What messages call it. */
static void name_pipe(struct cli_image *image, const char *standard)
{
    char *name = strcmp(image->path, "-") == 0 ? strdup(standard) : NULL;
    if (!name)
        return;
    free(image->path);
    image->path = name;
}

static int get_source(struct convert *c, const struct cli_args *args, const char *name, size_t n)
{
    struct cli_image_spec spec = {
        .name = name, .format_key = 'f', .cache_key = 'T', .pipes = true, .rate = &c->rate};
    struct cli_image *source = &c->sources[c->n++];
    CLEANUP_FREE char *file = NULL;

    if (cli_image_get(c->cli, args, &spec, source) != 0 ||
        cli_pipe_in(c->cli, source->path, &c->in, &file) != 0)
        return 1;
    if (c->in.fd >= 0 && n > 1) {
        cli_error(c->cli, "%s: a pipe must be the only source", name);
        return 1;
    }
    if (c->in.fd >= 0 && cli_has(args, 'l')) {
        cli_error(c->cli, "%s: -l needs an image that can be read at random", name);
        return 1;
    }
    if (file) {
        free(source->path);
        source->path = DR_STEAL(file);
    }
    if (c->in.fd >= 0)
        name_pipe(source, "standard input");
    source->open.snapshot = cli_value(args, 'l');
    if (c->in.fd < 0 && cli_image_check(c->cli, source) < 0)
        return 1;
    if (c->in.fd >= 0 && cli_has(args, KEY_VERIFY)) {
        cli_error(c->cli, "%s: --verify needs an archive that can be read at random", name);
        return 1;
    }
    source->open.flags |= cli_has(args, KEY_VERIFY) ? DR_OPEN_VERIFY : 0u;
    return 0;
}

/* Proxmox VE's qemu-img takes zeroinit:FILE for a target that reads as zeros. */
static const char *take_zeroinit(struct convert *c, const struct cli_args *args, const char *name)
{
    static const char prefix[] = "zeroinit:";

    if (c->cli->role != CLI_QEMU_IMG || cli_has(args, KEY_TARGET_IMAGE_OPTS) ||
        strncmp(name, prefix, strlen(prefix)) != 0)
        return name;
    c->o.target_is_zero = c->o.no_create;
    return name + strlen(prefix);
}

static int get_images(struct convert *c, const struct cli_args *args)
{
    size_t n = (size_t)args->n_operands - 1;
    struct cli_image_spec spec;

    c->sources = calloc(n, sizeof(*c->sources));
    if (!c->sources)
        return 1;
    if (n > 1 && c->orphans) {
        cli_error(c->cli, "--orphans goes with one source only");
        return 1;
    }
    if (n > 1 && cli_has(args, 'l')) {
        cli_error(c->cli, "No support for concatenating multiple snapshot");
        return 1;
    }
    for (size_t i = 0; i < n; i++)
        if (get_source(c, args, args->operands[i], n) != 0)
            return 1;
    spec = (struct cli_image_spec){.name = take_zeroinit(c, args, args->operands[n]),
                                   .opts_key = KEY_TARGET_IMAGE_OPTS,
                                   .flags = DR_OPEN_RDWR,
                                   .pipes = true,
                                   .rate = &c->rate};
    if (cli_image_get(c->cli, args, &spec, &c->target) != 0 ||
        cli_pipe_out(c->cli, c->target.path, &c->out) != 0)
        return 1;
    if (c->target.format)
        c->o.out_format = c->target.format;
    c->o.target_flags |= c->target.open.flags & DR_OPEN_NO_LOCK;
    if (c->o.no_create && c->out.fd < 0)
        return cli_image_check(c->cli, &c->target) < 0;
    if (c->out.fd >= 0)
        name_pipe(&c->target, "standard output");
    c->o.force = c->cli->role != CLI_DROVER || cli_has(args, KEY_FORCE);
    c->o.from_fd = c->in.fd >= 0;
    c->o.source_fd = c->in.fd;
    c->o.to_fd = c->out.fd >= 0;
    c->o.target_fd = c->out.fd;
    return 0;
}

static void add_salvaged(void *user, const struct dr_salvaged *range)
{
    static const char *const kinds[] = {
        [DR_SALVAGED_LOST] = "lost",
        [DR_SALVAGED_DOUBTFUL] = "doubtful",
        [DR_SALVAGED_END] = "end",
    };
    struct convert *c = user;
    json_t *item =
        json_pack("{s:s, s:I}", "kind", kinds[range->kind], "start", (json_int_t)range->off);
    int bad = !item;

    if (range->kind != DR_SALVAGED_END)
        bad |= json_object_set_new(item, "length", json_integer((json_int_t)range->len));
    if (range->disk)
        bad |= json_object_set_new(item, "filename", dr_json_text(range->disk));
    if (range->text)
        bad |= json_object_set_new(item, "text", dr_json_text(range->text));
    bad |= json_array_append_new(c->salvaged, item);
    c->not_told = c->not_told || bad;
}

static int print_salvaged(const struct convert *c)
{
    static const char *const order[] = {"filename", "complete", "damage", NULL};
    CLEANUP_JSON json_t *all = json_pack("{s:o, s:b, s:O}", "filename",
                                         dr_json_text(c->target.path), "complete", !c->lost,
                                         "damage", c->salvaged);

    if (!all || c->not_told) {
        cli_error(c->cli, "what was lost cannot be told in JSON: out of memory");
        return 1;
    }
    cli_print_json(all, order);
    return 0;
}

static int convert(struct convert *c, struct cli_job *job)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE const char **paths = calloc(c->n, sizeof(*paths));
    CLEANUP_FREE const struct dr_open_options **each = calloc(c->n, sizeof(*each));
    char state[4300];

    if (!paths || !each)
        return 1;
    for (size_t i = 0; i < c->n; i++) {
        paths[i] = c->sources[i].path;
        each[i] = &c->sources[i].open; /* a list of settings is for its image alone */
    }
    c->o.each = each;
    c->o.lost = &c->lost;
    c->o.salvaged = c->salvaged ? add_salvaged : NULL;
    c->o.salvaged_user = c;
    int r = dr_convert(paths, c->n, c->target.path, &c->o, job->job, &err);
    if (r == 0 && c->salvaged && print_salvaged(c) != 0)
        return 1;
    if (r == 0)
        return c->lost && c->cli->role == CLI_DROVER ? 3 : 0;
    if (c->o.to_fd)
        snprintf(state, sizeof(state), "a part of the disk was written");
    else
        snprintf(state, sizeof(state),
                 c->o.no_create ? "'%s' holds a part of the copy" : "'%s' is as it was before",
                 c->target.path);
    int code = cli_job_failed(job, r, &err, 1, state);
    if (r == -ENOENT && c->o.backing)
        cli_hint_relative(c->cli, c->target.path, c->o.backing);
    if (r == -EUCLEAN && c->o.bitmaps)
        fprintf(stderr, "Try --skip-broken-bitmaps, or use '%s bitmap --remove' to delete it\n",
                c->cli->prog);
    return code;
}

static void report(void *user, const char *line)
{
    (void)user;
    fprintf(stderr, "%s\n", line);
}

/* First: it helps even where the disk cannot be converted. */
static int rescue_orphans(struct convert *c)
{
    struct dr_error err = DR_ERROR_INIT;
    if (!c->orphans)
        return 0;
    cli_catch_signals();
    if (dr_salvage_orphans(c->sources[0].path, &c->sources[0].open, c->orphans, report, NULL,
                           cli_stop(), NULL, &err) == 0)
        return 0;
    cli_fail(c->cli, &err);
    return cli_signalled() ? cli_signalled() : 1;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(convert_free))) struct convert c = {
        .cli = cli, .in = CLI_PIPE_NONE, .out = CLI_PIPE_NONE};
    struct cli_job job;

    if (cli_wants_option_list(args))
        return cli_print_option_list(cli, cli_has(args, 'O') ? cli_value(args, 'O') : "raw",
                                     args->n_operands > 0, true);
    struct cli_job_limits limits = {0};
    if (get_options(&c, args, &limits) != 0)
        return 1;
    if (args->n_operands < 2) {
        cli_error(cli, "Must specify image file name");
        return 1;
    }
    if (get_images(&c, args) != 0)
        return 1;
    if (c.salvaged && c.out.fd >= 0) {
        cli_error(cli, "--output=json needs standard output, which gets the disk");
        return 1;
    }
    cli_export_allowed(args);
    int code = rescue_orphans(&c);
    if (code != 0)
        return code;
    limits.stdout_taken = c.out.fd >= 0;
    limits.rate = c.rate;
    if (cli_job_begin(cli, args, &limits, &job) != 0)
        return 1;
    code = convert(&c, &job);
    cli_job_end(&job);
    if (code == 0 && c.o.digest && c.o.to_fd) { /* standard output may hold the disk */
        fprintf(stderr, "%s  %s\n", c.digest, args->operands[args->n_operands - 1]);
    } else if (code == 0 && c.o.digest) {
        printf("%s  ", c.digest);
        cli_put(args->operands[args->n_operands - 1]);
        printf("\n");
    }
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_share,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_convert = {
    .name = "convert",
    .operands = "FILE [FILE2...] TARGET",
    .brief = "Copy disks, one after another, into a new one of any format",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
