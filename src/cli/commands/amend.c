/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {'o', "options", "NAME=VALUE,...", "what is to change; -o help lists it", false},
    {'t', NULL, "CACHE", "cache mode of FILE", false},
    {KEY_FORCE, "force", NULL, "a smaller size may be given: what is beyond it is lost", false},
    {0, NULL, NULL, NULL, false},
};

static bool can_amend(const char *format)
{
    struct dr_create_option o;

    return dr_format_amend_option(format, 0, &o) == 0;
}

static int refuse_format(const struct cli *cli, const char *format)
{
    if (!cli_format_exists(format))
        cli_error(cli, "Unknown file format '%s'", format);
    else
        cli_error(cli, "Format driver '%s' does not support option amendment", format);
    return 1;
}

static int print_list(const struct cli *cli, const char *format)
{
    struct dr_create_option o;

    if (!can_amend(format))
        return refuse_format(cli, format);
    printf("Amend options for '%s':\n", format);
    for (size_t i = 0; dr_format_amend_option(format, i, &o) == 0; i++)
        printf(
            "  %s=<%s>%*s - %s\n", o.name, o.type,
            (int)(strlen(o.name) + strlen(o.type) < 19 ? 19 - strlen(o.name) - strlen(o.type) : 0),
            "", o.help);
    return 0;
}

static bool is_amendable(const char *format, const char *name)
{
    static const char *const keys[] = {"encrypt.iter-time", "encrypt.keyslot", "encrypt.new-secret",
                                       "encrypt.old-secret", "encrypt.state"};
    struct dr_create_option o;

    for (size_t i = 0; dr_format_amend_option(format, i, &o) == 0; i++) {
        if (strcmp(o.name, name) == 0)
            return true;
    }
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        if (strcmp(keys[i], name) == 0)
            return true; /* the library says why not */
    }
    return false;
}

/* Those of the host's files are none of the format's in qemu-img's eyes. */
static bool is_for_creation(const char *format, const char *name)
{
    if (strcmp(name, "encryption") == 0 || strncmp(name, "encrypt.", 8) == 0)
        return true;
    return cli_option_exists(format, name) && strcmp(name, "nocow") != 0 &&
           strcmp(name, "extent_size_hint") != 0;
}

static int check_names(const struct cli *cli, const char *format, const struct cli_pairs *pairs)
{
    for (size_t i = 0; i < pairs->n; i++) {
        const char *name = pairs->pairs[i].name;
        if (is_amendable(format, name))
            continue;
        if (is_for_creation(format, name))
            cli_error(cli,
                      "Invalid parameter '%s'\nThis option is only supported for image creation",
                      name);
        else
            cli_error(cli, "Invalid parameter '%s'", name);
        return 1;
    }
    return 0;
}

struct amend {
    const struct cli *cli;
    const char *path;
    struct dr_amend_options o;
    bool wants_rebase; /* what was asked for is another command's */
};

/* qemu-img does not name the file. */
static void drop_path(const struct amend *a, struct dr_error *err)
{
    size_t n = strlen(a->path);

    if (a->cli->role != CLI_DROVER && strncmp(err->text, a->path, n) == 0 &&
        strncmp(err->text + n, ": ", 2) == 0)
        memmove(err->text, err->text + n + 2, strlen(err->text + n + 2) + 1);
}

static int amend(void *user, struct dr_job *job, struct dr_error *err)
{
    struct amend *a = user;
    int r = dr_amend(a->path, &a->o, job, err);

    if (r < 0) {
        a->wants_rebase = strstr(err->text, "Cannot amend the backing file");
        drop_path(a, err);
    }
    return r;
}

/* The settings for size are numbers of bytes, with suffixes and fractions as anywhere else. */
static int get_size(const struct cli *cli, struct cli_pairs *pairs)
{
    char text[24];
    uint64_t size;
    CLEANUP_FREE char *given = cli_pairs_take(pairs, "size");

    if (!given)
        return 0;
    if (cli_parse_size(given, &size) < 0) {
        cli_error(cli, "Parameter 'size' expects a non-negative number below 2^64\n"
                       "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, "
                       "peta-\nand exabytes, respectively.");
        return 1;
    }
    snprintf(text, sizeof(text), "%llu", (unsigned long long)size);
    return cli_pairs_set(pairs, "size", text) < 0;
}

static int find_format(const struct cli *cli, struct cli_image *image, const char **format)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;

    if (image->open.format) {
        *format = image->open.format;
        return 0;
    }
    if (cli_image_open(cli, image, &disk) < 0)
        return 1;
    image->open.format = *format = dr_image_format(disk, 0);
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_PAIRS struct cli_pairs pairs = {0};
    const char *format = cli_value(args, 'f');

    if (!cli_has(args, 'o'))
        return cli_usage(cli, "Must specify options (-o)");
    if (format && cli_wants_option_list(args))
        return print_list(cli, format);
    if (args->n_operands != 1) {
        cli_error(cli, "Expecting one image file name");
        return 1;
    }
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .cache_key = 't', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &spec, &image) != 0 || find_format(cli, &image, &format) != 0)
        return 1;
    if (cli_wants_option_list(args))
        return print_list(cli, format);
    if (!can_amend(format))
        return refuse_format(cli, format);
    if (cli_pairs_from_args(cli, args, &pairs) < 0 || check_names(cli, format, &pairs) != 0 ||
        get_size(cli, &pairs) != 0)
        return 1;
    struct amend a = {
        .cli = cli,
        .path = image.path,
        .o = {.open = image.open,
              .pairs = pairs.pairs,
              .n_pairs = pairs.n,
              .shrink = cli->role != CLI_DROVER || cli_has(args, KEY_FORCE)},
    };
    cli_export_allowed(args);
    int code = cli_job_run(cli, args, amend, &a);
    if (a.wants_rebase)
        fprintf(stderr, "You can use '%s rebase' instead.\n",
                cli->role == CLI_DROVER ? "drover" : "qemu-img");
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_image,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_amend = {
    .name = "amend",
    .operands = "FILE",
    .brief = "Change settings that an image was created with",
    .about = "Interrupted anywhere, the disk reads as before; the same command finishes the work.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
