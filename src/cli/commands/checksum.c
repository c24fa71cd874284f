/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/progress.h"
#include "drover/checksum.h"

static const struct cli_option options[] = {
    {'f', "format", "FMT", "format of the images; without it, it is found out", false},
    {'a', "algorithm", "xxh3|sha256", "what to compute (xxh3: faster; sha256: against forgery)",
     false},
    {KEY_SAVE, "save", "FILE", "write the checksums of each 64 KiB to FILE", false},
    {KEY_AGAINST, "against", "FILE", "tell what differs from checksums that were saved", false},
    {'l', "snapshot", "NAME", "the disk as a snapshot inside it shows it: a name, or an id", false},
    {KEY_IMAGE_OPTS, "image-opts", NULL, "FILEs are lists like driver=vmdk,file.filename=PATH",
     false},
    {'T', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {0, NULL, NULL, NULL, false},
};

/* Those of compare. */
enum { EXIT_SAME = 0, EXIT_DIFFER = 1, EXIT_NOT_OPENED = 2, EXIT_READ = 4 };

static const struct algorithm {
    const char *name;
    enum dr_checksum kind;
} algorithms[] = {{"xxh3", DR_CHECKSUM_XXH3}, {"sha256", DR_CHECKSUM_SHA256}};
#define N_ALGORITHMS (sizeof(algorithms) / sizeof(algorithms[0]))

static const char *const key_order[] = {"filename",     "algorithm", "digest",
                                        "virtual-size", "identical", "differs",
                                        "start",        "length",    NULL};

struct checksum {
    const struct cli *cli;
    const struct cli_args *args;
    struct dr_checksum_options o;
    struct dr_checksum_result result;
    json_t *all;    /* --output=json: what is printed at the end */
    json_t *ranges; /* --against with it */
};

static const char *algorithm_name(enum dr_checksum kind)
{
    size_t i = 0;
    while (algorithms[i].kind != kind)
        i++;
    return algorithms[i].name;
}

static int get_algorithm(struct checksum *c)
{
    const char *name = cli_value(c->args, 'a');
    for (size_t i = 0; name && i < N_ALGORITHMS; i++) {
        if (strcmp(name, algorithms[i].name) == 0) {
            c->o.kind = algorithms[i].kind;
            return 0;
        }
    }
    if (name)
        cli_error(c->cli, "Unknown algorithm '%s': it is xxh3 or sha256", name);
    return name ? EXIT_NOT_OPENED : 0;
}

static void range_differs(void *user, uint64_t off, uint64_t len)
{
    struct checksum *c = user;
    if (c->ranges)
        json_array_append_new(c->ranges, json_pack("{s:I, s:I}", "start", (json_int_t)off, "length",
                                                   (json_int_t)len));
    else
        printf("differs: %" PRIu64 "..%" PRIu64 "\n", off, off + len);
}

static void print_text(const struct checksum *c, const char *name)
{
    const struct dr_checksum_result *r = &c->result;
    printf("%s  ", r->digest);
    cli_put(name);
    printf("\n");
    if (!c->o.against)
        return;
    if (r->size != r->against_size)
        printf("Warning: Image size mismatch! %" PRIu64 " bytes, not %" PRIu64 "\n", r->size,
               r->against_size);
    if (r->same)
        printf("Images are identical.\n");
}

static int add_json(struct checksum *c, const char *name)
{
    const struct dr_checksum_result *r = &c->result;
    json_t *one = json_pack("{s:o, s:s, s:s, s:I}", "filename", dr_json_text(name), "algorithm",
                            algorithm_name(r->kind), "digest", r->digest, "virtual-size",
                            (json_int_t)r->size);
    int bad = !one;
    if (one && c->o.against) {
        bad |= json_object_set_new(one, "identical", json_boolean(r->same));
        bad |= json_object_set(one, "differs", c->ranges);
    }
    if (json_array_append_new(c->all, one) < 0 || bad) {
        cli_error(c->cli, "%s: cannot be told in JSON", name);
        return EXIT_READ;
    }
    return 0;
}

static int checksum_open(struct checksum *c, const char *name, struct dr_disk *disk,
                         const struct cli_job_limits *limits)
{
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;

    if (cli_job_begin(c->cli, c->args, limits, &job) != 0)
        return EXIT_NOT_OPENED;
    int r = dr_disk_checksum(disk, &c->o, job.job, &c->result, &err);
    int code = r < 0 ? cli_job_failed(&job, r, &err, EXIT_READ, "no checksum was computed") : 0;
    cli_job_end(&job);
    if (code != 0)
        return code;
    if (c->all)
        code = add_json(c, name);
    else
        print_text(c, name);
    return code ? code : c->o.against && !c->result.same ? EXIT_DIFFER : EXIT_SAME;
}

static int checksum_one(struct checksum *c, const char *name)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct cli_job_limits limits = {0};
    const struct cli_image_spec spec = {
        .name = name, .format_key = 'f', .cache_key = 'T', .rate = &limits.rate};

    if (cli_image_get(c->cli, c->args, &spec, &image) != 0)
        return EXIT_NOT_OPENED;
    image.open.snapshot = cli_value(c->args, 'l');
    if (cli_image_open(c->cli, &image, &disk) < 0)
        return EXIT_NOT_OPENED;
    return checksum_open(c, name, disk, &limits);
}

static int check_use(const struct checksum *c)
{
    const char *wrong = NULL;
    if (c->args->n_operands == 0)
        wrong = "Expecting an image file name";
    else if (c->args->n_operands > 1 && (c->o.save || c->o.against))
        wrong = "--save and --against go with one image only";
    else if (c->o.against && cli_has(c->args, 'a'))
        wrong = "--against computes what its FILE has: -a has no place there";
    return wrong ? cli_usage(c->cli, "%s", wrong) : 0;
}

/* The worst of all. */
static int run_all(struct checksum *c)
{
    int code = EXIT_SAME;

    for (int i = 0; i < c->args->n_operands && !cli_signalled(); i++) {
        int one = checksum_one(c, c->args->operands[i]);
        code = one > code ? one : code;
    }
    return code;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct checksum c = {.cli = cli, .args = args};
    CLEANUP_JSON json_t *all = NULL;
    CLEANUP_JSON json_t *ranges = NULL;
    bool json;

    c.o.save = cli_value(args, KEY_SAVE);
    c.o.against = cli_value(args, KEY_AGAINST);
    c.o.differs = range_differs;
    c.o.user = &c;
    int code = check_use(&c);
    if (code == 0)
        code = get_algorithm(&c);
    if (code == 0 && cli_output_json(cli, args, &json) != 0)
        code = EXIT_NOT_OPENED;
    if (code != 0)
        return code;
    if (json) {
        c.all = all = json_array();
        c.ranges = ranges = json_array();
    }
    code = run_all(&c);
    if (json)
        cli_print_json(all, key_order);
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_share,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_checksum = {
    .name = "checksum",
    .operands = "FILE...",
    .brief = "Compute one number for all that a disk holds, and keep it",
    .about = "It is the same for every format, chain, compression and layout of the image.\n"
             "Ends with 0: done, or the same; 1: it differs; 2: not opened; 4: not readable.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
