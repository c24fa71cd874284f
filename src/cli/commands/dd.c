/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <limits.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/pipes.h"
#include "cli/common/progress.h"

#define BLOCK 512u

static const struct cli_option options[] = {
    {'f', "format", "FMT", "format of the source; without it, it is found out", false},
    {'O', "target-format", "FMT", "format of the target (raw)", false},
    {KEY_IMAGE_OPTS, "image-opts", NULL, "the source is a list like driver=vmdk,file.filename=PATH",
     false},
    {'n', "no-create", NULL, "the target exists: write over what it holds", false},
    {'l', "snapshot", "NAME", "the source as a snapshot inside it shows it: a name, or an id",
     false},
    {0, NULL, NULL, NULL, false},
};

struct dd {
    const struct cli *cli;
    const char *in, *out;
    uint64_t block, count, skip, out_size, rate;
    bool has_count, has_out_size;
    struct cli_image source;
    struct cli_pipe from, to;
    struct dr_convert_options o;
};

static void dd_free(struct dd *d)
{
    cli_image_free(&d->source);
    cli_pipe_close(&d->from);
    cli_pipe_close(&d->to);
}

static int take_number(const struct dd *d, const char *name, const char *text, uint64_t *value)
{
    if (cli_get_size(d->cli, name, text, value) < 0)
        return 1;
    if (strcmp(name, "bs") != 0 || (*value > 0 && *value <= INT_MAX))
        return 0;
    cli_error(d->cli, "Invalid bs specified. Must be between 1 and %d.", INT_MAX);
    return 1;
}

static int take_operand(struct dd *d, const char *word)
{
    if (strncmp(word, "if=", 3) == 0)
        d->in = word + 3;
    else if (strncmp(word, "of=", 3) == 0)
        d->out = word + 3;
    else if (strncmp(word, "bs=", 3) == 0)
        return take_number(d, "bs", word + 3, &d->block);
    else if (strncmp(word, "skip=", 5) == 0)
        return take_number(d, "skip", word + 5, &d->skip);
    else if (strncmp(word, "count=", 6) == 0) {
        d->has_count = true;
        return take_number(d, "count", word + 6, &d->count);
    } else if (strncmp(word, "osize=", 6) == 0) { /* Proxmox VE's */
        d->has_out_size = true;
        return take_number(d, "osize", word + 6, &d->out_size);
    } else {
        cli_error(d->cli, "unrecognized operand %.*s", (int)strcspn(word, "="), word);
        return 1;
    }
    return 0;
}

static uint64_t in_bytes(const struct dd *d, uint64_t blocks)
{
    return blocks > INT64_MAX / d->block ? INT64_MAX : blocks * d->block;
}

/* qemu-img counts from the beginning of its input, with what it skips; dd(1) counts what it copies.
 */
static void get_range(struct dd *d)
{
    uint64_t from = in_bytes(d, d->skip), n = in_bytes(d, d->count);

    d->o.has_range = true;
    d->o.range_from = from;
    if (!d->has_count)
        d->o.range_to = INT64_MAX;
    else if (d->cli->role == CLI_QEMU_IMG)
        d->o.range_to = n;
    else
        d->o.range_to = n > INT64_MAX - from ? INT64_MAX : from + n;
    if (d->has_out_size && d->out_size < INT64_MAX - from && from + d->out_size < d->o.range_to)
        d->o.range_to = from + d->out_size;
}

static int get_source(struct dd *d, const struct cli_args *args)
{
    const struct cli_image_spec spec = {
        .name = d->in, .format_key = 'f', .pipes = true, .rate = &d->rate};
    CLEANUP_FREE char *file = NULL;

    if (cli_image_get(d->cli, args, &spec, &d->source) != 0 ||
        cli_pipe_in(d->cli, d->source.path, &d->from, &file) != 0)
        return 1;
    if (file) {
        free(d->source.path);
        d->source.path = DR_STEAL(file);
    }
    d->o.source = &d->source.open;
    d->o.from_fd = d->from.fd >= 0;
    d->source.open.snapshot = cli_value(args, 'l');
    if (d->o.from_fd && d->source.open.snapshot) {
        cli_error(d->cli, "%s: -l needs an image that can be read at random", d->in);
        return 1;
    }
    d->o.source_fd = d->from.fd;
    return d->from.fd < 0 && cli_image_check(d->cli, &d->source) < 0;
}

static int get_target(struct dd *d, const struct cli_args *args)
{
    d->o.out_format = cli_has(args, 'O') ? cli_value(args, 'O') : "raw";
    d->o.sparse_size = DR_CONVERT_SPARSE_DEFAULT;
    d->o.force = true;
    d->o.no_create = cli_has(args, 'n');
    if (!cli_format_exists(d->o.out_format)) {
        cli_error(d->cli, "Unknown file format '%s'", d->o.out_format);
        return 1;
    }
    if (cli_pipe_out(d->cli, d->out, &d->to) != 0 ||
        cli_shared_flags(d->cli, args, &d->o.target_flags) != 0)
        return 1;
    d->o.to_fd = d->to.fd >= 0;
    d->o.target_fd = d->to.fd;
    return 0;
}

static int copy(struct dd *d, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    const struct cli_job_limits limits = {.stdout_taken = d->o.to_fd, .rate = d->rate};
    const char *source = strcmp(d->in, "-") == 0 ? "standard input" : d->source.path;
    const char *target = strcmp(d->out, "-") == 0 ? "standard output" : d->out;
    struct cli_job job;
    char state[4300];
    int code = 0;

    if (cli_job_begin(d->cli, args, &limits, &job) != 0)
        return 1;
    int r = dr_convert(&source, 1, target, &d->o, job.job, &err);
    snprintf(state, sizeof(state),
             d->o.to_fd       ? "a part was written"
             : d->o.no_create ? "'%s' holds a part of the copy"
                              : "'%s' is as it was before",
             target);
    if (r < 0)
        code = cli_job_failed(&job, r, &err, 1, state);
    cli_job_end(&job);
    return code;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(dd_free))) struct dd d = {
        .cli = cli, .block = BLOCK, .from = CLI_PIPE_NONE, .to = CLI_PIPE_NONE};

    for (int i = 0; i < args->n_operands; i++)
        if (take_operand(&d, args->operands[i]) != 0)
            return 1;
    if (!d.in || !d.out) {
        cli_error(cli, "Must specify both input and output files");
        return 1;
    }
    if (d.has_out_size && !cli_has(args, 'n')) {
        cli_error(cli, "osize= tells the size of a target that exists: it goes with -n");
        return 1;
    }
    get_range(&d);
    if (get_source(&d, args) != 0 || get_target(&d, args) != 0)
        return 1;
    cli_export_allowed(args);
    return copy(&d, args);
}

static const struct cli_option *const sets[] = {options,           cli_opts_share,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_dd = {
    .name = "dd",
    .operands = "[bs=BYTES] [count=BLOCKS] [skip=BLOCKS] [osize=BYTES] if=FILE of=TARGET",
    .brief = "Copy a range of a disk, into a new one or a pipe",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
