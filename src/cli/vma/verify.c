/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/vma/vma.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"

enum { EXIT_SOUND = 0, EXIT_FAILED = 1, EXIT_DAMAGED = 2 };

struct verify {
    const struct cli *cli;
    struct dr_vma *vma;
    struct vma_targets targets;
    struct vma_damage damage;
    bool quiet, opening;
    struct dr_vma_extract_options o;
    struct dr_vma_extract_result result;
};

static void verify_free(struct verify *v)
{
    vma_targets_cleanup(&v->targets);
    vma_damage_free(&v->damage);
    dr_vma_close(v->vma);
}

/* "NAME=IMAGE": what the archive has as NAME must be what *image holds. Where there is but one disk
 * it needs no name. */
static const struct dr_vma_disk *against(const struct verify *v, const char *archive,
                                         const char *text, const char **image)
{
    const struct dr_vma_header *h = v->damage.header;
    const char *equals = strchr(text, '=');

    *image = equals ? equals + 1 : text;
    if (!equals && h->n_disks == 1)
        return &h->disks[0];
    if (!equals) {
        cli_usage(v->cli, "--against: expecting NAME=IMAGE, not '%s'", text);
        return NULL;
    }
    CLEANUP_FREE char *name = strndup(text, (size_t)(equals - text));
    return name ? vma_find_disk(v->cli, archive, h, name) : NULL;
}

static int add_against(struct verify *v, const struct cli_args *args, const char *text)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct cli_image_spec spec = {0};
    struct dr_disk *disk;
    const char *archive = vma_shown(args->operands[0]);
    const struct dr_vma_disk *d = against(v, archive, text, &spec.name);

    if (!d)
        return EXIT_FAILED;
    if (v->targets.n == sizeof(v->targets.list) / sizeof(v->targets.list[0])) {
        cli_error(v->cli, "%s: more images to compare with than it has disks", archive);
        return EXIT_FAILED;
    }
    if (cli_image_get(v->cli, args, &spec, &image) != 0 ||
        cli_image_open(v->cli, &image, &disk) < 0)
        return EXIT_FAILED;
    vma_targets_add(&v->targets, d->id, disk, false);
    v->targets.list[v->targets.n - 1].compare = true;
    return 0;
}

static int get_options(struct verify *v, const struct cli_args *args)
{
    const char *text;
    int code = 0;

    v->o = (struct dr_vma_extract_options){
        .sums = cli_value(args, KEY_SUMS),
        .no_sums = cli_has(args, KEY_NO_SUMS),
        .headers_only = cli_has(args, KEY_HEADERS_ONLY),
        .salvage = true, /* all that is wrong shall be told, not the first thing */
        .damage = vma_damage_add,
        .user = &v->damage,
    };
    if (v->o.sums && v->o.no_sums)
        return cli_usage(v->cli, "--sums and --no-sums exclude each other");
    if (v->o.headers_only && (v->o.sums || cli_has(args, KEY_AGAINST)))
        return cli_usage(v->cli, "--headers-only looks at no data: not with --sums or --against");
    for (size_t i = 0; code == 0 && (text = cli_nth_value(args, KEY_AGAINST, i)); i++)
        code = add_against(v, args, text);
    v->o.targets = v->targets.list;
    v->o.n_targets = v->targets.n;
    return code;
}

static void print_as_json(const struct verify *v, const char *name)
{
    CLEANUP_JSON json_t *all =
        json_pack("{s:o, s:b}", "filename", vma_json_name(name), "sound", v->damage.n == 0);

    vma_damage_json(all, &v->damage, &v->result);
    vma_print_json(all);
}

static void print_for_people(const struct verify *v, const struct cli_args *args)
{
    char size[CLI_SIZE_TEXT];

    if (v->damage.n > 0) {
        printf("%zu %s found\n", v->damage.n, v->damage.n == 1 ? "problem was" : "problems were");
        return;
    }
    printf("No problems were found: %s of disks", cli_human_size(v->result.bytes_read, size));
    if (v->o.headers_only)
        printf("; the data was not looked at");
    else if (v->result.sums_used)
        printf(", data checked with checksums");
    else if (!cli_has(args, KEY_AGAINST))
        printf("; there are no checksums to check the data with");
    printf(".\n");
}

static int verify(struct verify *v, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;
    int code = vma_job_begin(v->cli, args, &job);

    if (code != 0)
        return code;
    int r = dr_vma_extract(v->vma, &v->o, job.job, &v->result, &err);
    cli_job_end(&job);
    if (r < 0)
        return cli_job_failed(&job, r, &err, r == -EBADMSG ? EXIT_DAMAGED : EXIT_FAILED,
                              "nothing was decided");
    if (vma_wants_json(args))
        print_as_json(v, args->operands[0]);
    else if (!job.quiet)
        print_for_people(v, args);
    return v->damage.n > 0 ? EXIT_DAMAGED : EXIT_SOUND;
}

/* Something in the header is wrong, but not so that nothing could be read: a device that is ignored
 * for want of a name, say. */
static void count_message(struct verify *v, const char *text)
{
    v->damage.n++;
    if (v->damage.array)
        json_array_append_new(v->damage.array, json_pack("{s:s, s:o}", "kind", "header", "text",
                                                         vma_json_name(text)));
}

/* What is told later is no fault of the archive: zeros behind it, or checksums that do not belong
 * to it. */
static void on_message(void *user, const char *text)
{
    struct verify *v = user;

    if (v->opening)
        count_message(v, text);
    if (!v->quiet)
        cli_error(v->cli, "%s", text);
}

static int open_archive(struct verify *v, const struct cli_args *args, struct dr_error *err)
{
    v->quiet = cli_has(args, 'q');
    v->opening = true;
    int r = vma_try_open(args->operands[0], VMA_SALVAGE, on_message, v, &v->vma, err);
    v->opening = false;
    return r;
}

/* A file without a good header is damaged; other failures mean that it could not be read. */
static int not_opened(const struct cli *cli, const struct cli_args *args, int r,
                      const struct dr_error *err)
{
    bool damaged = r == -EINVAL || r == -EBADMSG;

    cli_fail(cli, err);
    if (damaged && vma_wants_json(args)) {
        CLEANUP_JSON json_t *all =
            json_pack("{s:o, s:b, s:[{s:s, s:o}]}", "filename", vma_json_name(args->operands[0]),
                      "sound", false, "damage", "kind", "header", "text", vma_json_name(err->text));
        vma_print_json(all);
    }
    return damaged ? EXIT_DAMAGED : EXIT_FAILED;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    __attribute__((cleanup(verify_free))) struct verify v = {
        .cli = cli, .targets = {.cli = cli}, .damage = {.cli = cli}};

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one archive");
    v.damage.array = vma_wants_json(args) ? json_array() : NULL;
    int r = open_archive(&v, args, &err);
    if (r < 0)
        return not_opened(cli, args, r, &err);
    v.damage.header = dr_vma_header(v.vma);
    v.damage.lines = vma_wants_json(args) ? NULL : stdout;
    int code = get_options(&v, args);
    return code ? code : verify(&v, args);
}

static const struct cli_option verify_options[] = {
    {KEY_AGAINST, "against", "[NAME=]IMAGE", "compare the disk NAME with IMAGE (repeatable)",
     false},
    {KEY_SUMS, "sums", "FILE", "the checksums (ARCHIVE.sums, if it is there)", false},
    {KEY_NO_SUMS, "no-sums", NULL, "use no checksums", false},
    {KEY_HEADERS_ONLY, "headers-only", NULL, "do not look at the data", false},
    {KEY_JSON, "json", NULL, "print JSON", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'m', "jobs", "N", "how many workers, 1 to 16", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option *const verify_sets[] = {
    verify_options, cli_opts_share, cli_opts_quiet, cli_opts_progress, cli_opts_common, NULL};

const struct cli_command vma_cmd_verify = {
    .name = "vma verify",
    .operands = "ARCHIVE",
    .brief = "Check an archive whole, and say all that is wrong with it",
    .about =
        "The format has no checksums over data; those of `drover vma create` stand beside it.\n"
        "Ends with 0: sound, 1: it could not be checked, 2: damaged. - is standard input.",
    .sets = verify_sets,
    .roles = CLI_DROVER,
    .run = run,
};

/* ------------------------------------------------------------------ index */

static int run_index(const struct cli *cli, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one archive");
    int code = vma_job_begin(cli, args, &job);
    if (code != 0)
        return code;
    int r = dr_vma_index(args->operands[0], cli_value(args, KEY_OUTPUT), job.job, &err);
    cli_job_end(&job);
    return r < 0 ? cli_job_failed(&job, r, &err, 1, "no index was made") : 0;
}

static const struct cli_option index_options[] = {
    {KEY_OUTPUT, "output", "FILE", "where the index goes (ARCHIVE.idx)", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option *const index_sets[] = {index_options, cli_opts_quiet,
                                                      cli_opts_progress, cli_opts_common, NULL};

const struct cli_command vma_cmd_index = {
    .name = "vma index",
    .operands = "ARCHIVE",
    .brief = "Note where everything is, so that disks inside open at once",
    .about = "The index stands beside the archive. It is only used as long as the archive is the "
             "same.",
    .sets = index_sets,
    .roles = CLI_DROVER,
    .run = run_index,
};
