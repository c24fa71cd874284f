/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"

static const struct cli_option options[] = {
    {KEY_SIZE, "size", "SIZE", "of a disk of this size, instead of a FILE", false},
    {'O', "target-format", "FMT", "format of the new image (raw)", false},
    {'o', "options", "NAME=VALUE,...", "settings of that format; -o help lists them", false},
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {'l', "snapshot", "NAME", "the source as a snapshot inside it shows it: a name, or an id",
     false},
    {0, NULL, NULL, NULL, false},
};

struct measure {
    const struct cli *cli;
    struct dr_measure_options o;
    struct cli_pairs pairs;
    struct cli_image source;
    uint64_t size;
    bool json;
};

static void measure_free(struct measure *m)
{
    cli_pairs_free(&m->pairs);
    cli_image_free(&m->source);
}

/* A disk or a size, never both. */
static int check_operands(const struct cli *cli, const struct cli_args *args)
{
    const char *wrong = NULL;

    if (args->n_operands > 1)
        wrong = "At most one filename argument is allowed.";
    else if (args->n_operands == 0 &&
             (cli_has(args, 'f') || cli_has(args, 'l') || cli_has(args, KEY_IMAGE_OPTS)))
        wrong = "--image-opts, -f, and -l require a filename argument.";
    else if (args->n_operands == 0 && !cli_has(args, KEY_SIZE))
        wrong = "Either --size N or one filename must be specified.";
    else if (args->n_operands == 1 && cli_has(args, KEY_SIZE))
        wrong = "--size N cannot be used together with a filename.";
    if (!wrong)
        return 0;
    cli_error(cli, "%s", wrong);
    return 1;
}

static int get_settings(struct measure *m, const struct cli_args *args)
{
    if (cli_pairs_from_args(m->cli, args, &m->pairs) < 0)
        return 1;
    CLEANUP_FREE char *backing = cli_pairs_take(&m->pairs, "backing_file");
    free(cli_pairs_take(&m->pairs, "size")); /* the source has one */
    free(cli_pairs_take(&m->pairs, "backing_fmt"));
    m->o.backing = backing && *backing;
    for (size_t i = 0; i < m->pairs.n; i++) {
        if (!cli_option_exists(m->o.out_format, m->pairs.pairs[i].name)) {
            cli_error(m->cli, "Invalid parameter '%s'", m->pairs.pairs[i].name);
            cli_error(m->cli, "Invalid options for file format '%s'", m->o.out_format);
            return 1;
        }
    }
    m->o.pairs = m->pairs.pairs;
    m->o.n_pairs = m->pairs.n;
    return 0;
}

static int get_options(struct measure *m, const struct cli_args *args)
{
    const char *size = cli_value(args, KEY_SIZE);

    m->o.out_format = cli_has(args, 'O') ? cli_value(args, 'O') : "raw";
    if (cli_output_json(m->cli, args, &m->json) != 0)
        return 1;
    if (size && cli_get_size(m->cli, "image size", size, &m->size) < 0)
        return 1;
    if (check_operands(m->cli, args) != 0)
        return 1;
    if (!cli_format_exists(m->o.out_format)) {
        cli_error(m->cli, "Unknown file format '%s'", m->o.out_format);
        return 1;
    }
    return get_settings(m, args);
}

static int get_source(struct measure *m, const struct cli_args *args)
{
    if (args->n_operands == 0)
        return 0;
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .no_data = true};
    if (cli_image_get(m->cli, args, &spec, &m->source) != 0)
        return 1;
    if (cli_has(args, 'l'))
        m->source.open.snapshot = cli_value(args, 'l');
    m->o.source = &m->source.open;
    return cli_image_check(m->cli, &m->source) < 0;
}

static void print_json(const struct dr_measure_result *result)
{
    printf("{\n");
    if (result->has_bitmaps)
        printf("    \"bitmaps\": %" PRIu64 ",\n", result->bitmaps);
    printf("    \"required\": %" PRIu64 ",\n    \"fully-allocated\": %" PRIu64 "\n}\n",
           result->required, result->fully_allocated);
}

static void print(const struct dr_measure_result *result)
{
    printf("required size: %" PRIu64 "\nfully allocated size: %" PRIu64 "\n", result->required,
           result->fully_allocated);
    if (result->has_bitmaps)
        printf("bitmaps size: %" PRIu64 "\n", result->bitmaps);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(measure_free))) struct measure m = {.cli = cli};
    struct dr_measure_result result = {0};
    struct dr_error err = DR_ERROR_INIT;

    if (cli->role == CLI_DROVER && cli_wants_option_list(args))
        return cli_print_option_list(cli, cli_has(args, 'O') ? cli_value(args, 'O') : "raw", false,
                                     true);
    if (get_options(&m, args) != 0 || get_source(&m, args) != 0)
        return 1;
    cli_export_allowed(args);
    if (dr_measure(m.source.path, m.size, &m.o, &result, &err) < 0) {
        if (m.source.path && strstr(err.text, m.source.path)) /* else the new image is at fault */
            cli_fail_open(cli, m.source.path, &err);
        else
            cli_fail(cli, &err);
        return 1;
    }
    if (m.json)
        print_json(&result);
    else
        print(&result);
    return 0;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_share,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_measure = {
    .name = "measure",
    .operands = "[FILE]",
    .brief = "Tell how long the files of a new image would be",
    .about =
        "Of FILE converted, or of a new disk with --size. No data is read: what FILE holds may\n"
        "turn out to be zeros, so the new image may need less.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
