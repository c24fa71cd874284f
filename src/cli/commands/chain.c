/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"
#include "drover/chain.h"

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {KEY_ASCII, "ascii", NULL, "draw the tree with plain characters", false},
    {KEY_SEARCH, "search", "DIR", "check, relocate: look for lost parents there, too", false},
    {KEY_DRY_RUN, "dry-run", NULL, "relocate, pack: only tell what would be changed", false},
    {KEY_FULL_HASH, "full-hash", NULL, "fingerprint: of all that the parent holds", false},
    {KEY_REMOVE, "remove", NULL, "fingerprint: forget what was recorded", false},
    {'F', NULL, "FMT", "diff: format of the second disk", false},
    {0, NULL, NULL, NULL, false},
};

/* ------------------------------------------------------------------ check */

/* check's own: what is harmless may wait, as leaks may. */
enum { EXIT_PROBLEM = 2, EXIT_HARMLESS = 3 };

static json_t *findings_json(const char *path, const struct dr_chain_finding *list, size_t n,
                             size_t images)
{
    json_t *all = json_array();

    for (size_t i = 0; i < n; i++) {
        json_t *one = json_object();
        json_object_set_new(one, "filename", dr_json_text(list[i].path));
        json_object_set_new(one, "class", json_string(dr_chain_fault_name(list[i].fault)));
        json_object_set_new(one, "harmless",
                            json_boolean(dr_chain_fault_is_harmless(list[i].fault)));
        json_object_set_new(one, "text", dr_json_text(list[i].text));
        if (list[i].found)
            json_object_set_new(one, "found", dr_json_text(list[i].found));
        json_array_append_new(all, one);
    }
    return json_pack("{s:o,s:I,s:o}", "filename", dr_json_text(path), "images", (json_int_t)images,
                     "findings", all);
}

static void print_findings(const struct dr_chain_finding *list, size_t n, size_t images)
{
    for (size_t i = 0; i < n; i++) {
        cli_put(list[i].text);
        printf("\n");
    }
    if (n == 0)
        printf("%zu image%s, no problem.\n", images, images == 1 ? "" : "s");
}

static int exit_code_for(const struct dr_chain_finding *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!dr_chain_fault_is_harmless(list[i].fault))
            return EXIT_PROBLEM;
    return n > 0 ? EXIT_HARMLESS : 0;
}

/* All values of --search, NULL-terminated. */
static const char **search_dirs(const struct cli_args *args)
{
    const char **dirs = calloc(args->n_hits + 1, sizeof(*dirs));

    for (size_t n = 0; dirs && cli_nth_value(args, KEY_SEARCH, n); n++)
        dirs[n] = cli_nth_value(args, KEY_SEARCH, n);
    return dirs;
}

static int check(const struct cli *cli, const struct cli_args *args, const char *path,
                 const struct dr_open_options *open)
{
    CLEANUP_FREE const char **search = search_dirs(args);
    const struct dr_chain_options o = {.open = *open, .search = search};
    struct dr_chain_finding *list = NULL;
    struct dr_error err = DR_ERROR_INIT;
    size_t n = 0, images = 0;
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (dr_chain_examine(path, &o, &list, &n, &images, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (images == 0) {
        cli_error(cli, "%s: is a directory without images", path);
        return 1;
    }
    if (json) {
        CLEANUP_JSON json_t *all = findings_json(path, list, n, images);
        cli_dump_json(all);
    } else {
        print_findings(list, n, images);
    }
    int code = exit_code_for(list, n);
    dr_chain_findings_free(list, n);
    return code;
}

/* ------------------------------------------------------------------ relocate and pack */

static void print_line(void *user, const char *line)
{
    (void)user;
    cli_put(line);
    printf("\n");
}

static int mend(const struct cli *cli, const struct cli_args *args, const char *verb,
                const char *path, const struct dr_open_options *open)
{
    CLEANUP_FREE const char **search = search_dirs(args);
    const struct dr_chain_options o = {
        .open = *open,
        .search = search,
        .report = cli_has(args, 'q') ? NULL : print_line,
        .dry_run = cli_has(args, KEY_DRY_RUN),
    };
    struct dr_error err = DR_ERROR_INIT;
    unsigned changed = 0;
    int r = strcmp(verb, "pack") == 0 ? dr_pack_names(path, &o, &changed, &err)
                                      : dr_relocate(path, &o, &changed, &err);

    if (r < 0)
        cli_fail(cli, &err);
    else if (changed == 0 && !cli_has(args, 'q'))
        printf("%s\n", strcmp(verb, "pack") == 0 ? "All names are relative."
                                                 : "All parents are where they are recorded.");
    return r < 0;
}

/* ------------------------------------------------------------------ fingerprint */

struct fingerprint {
    const char *path;
    struct dr_fingerprint_options o;
};

static int record(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct fingerprint *f = user;

    return dr_fingerprint(f->path, &f->o, job, err);
}

static int fingerprint(const struct cli *cli, const struct cli_args *args,
                       const struct cli_image *image)
{
    struct fingerprint f = {.path = image->path,
                            .o = {.open = image->open,
                                  .full_hash = cli_has(args, KEY_FULL_HASH),
                                  .remove = cli_has(args, KEY_REMOVE)}};

    return cli_job_run(cli, args, record, &f);
}

/* ------------------------------------------------------------------ the command */

static bool is_mending(const char *verb)
{
    return strcmp(verb, "relocate") == 0 || strcmp(verb, "pack") == 0;
}

static bool is_verb(const char *verb)
{
    return is_mending(verb) || strcmp(verb, "show") == 0 || strcmp(verb, "tree") == 0 ||
           strcmp(verb, "check") == 0 || strcmp(verb, "fingerprint") == 0;
}

static int run_on_directory(const struct cli *cli, const struct cli_args *args, const char *verb,
                            const char *dir)
{
    struct dr_open_options open = {0};

    if (strcmp(verb, "show") == 0 || strcmp(verb, "tree") == 0)
        return cli_show_forest(cli, args, dir, true);
    if (cli_shared_flags(cli, args, &open.flags) != 0)
        return 1;
    cli_export_allowed(args);
    return is_mending(verb) ? mend(cli, args, verb, dir, &open) : check(cli, args, dir, &open);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    const char *verb = args->n_operands >= 2 ? args->operands[0] : "show";

    if (strcmp(verb, "diff") == 0)
        return cli_chain_diff(cli, args);
    if (args->n_operands < 1 || args->n_operands > 2)
        return cli_usage(
            cli, "Expecting [show|tree|check|relocate|pack|fingerprint] and one image file name");
    if (!is_verb(verb))
        return cli_usage(
            cli, "Expecting show, tree, check, diff, relocate, pack or fingerprint, not '%s'",
            verb);
    const struct cli_image_spec spec = {.name = args->operands[args->n_operands - 1],
                                        .format_key = 'f'};
    if (cli_is_directory(spec.name) && strcmp(verb, "fingerprint") != 0)
        return run_on_directory(cli, args, verb, spec.name);
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    if (strcmp(verb, "tree") == 0)
        return cli_show_tree(cli, args, &image, true);
    if (strcmp(verb, "check") == 0)
        return check(cli, args, image.path, &image.open);
    if (is_mending(verb)) {
        cli_export_allowed(args);
        cli_catch_signals(); /* it takes no time, and nothing is left half made */
        return mend(cli, args, verb, image.path, &image.open);
    }
    if (strcmp(verb, "fingerprint") == 0)
        return fingerprint(cli, args, &image);
    return cli_show_chain(cli, args, &image);
}

static const struct cli_option *const sets[] = {
    options, cli_opts_image, cli_opts_share, cli_opts_quiet, cli_opts_progress, cli_opts_common,
    NULL};

const struct cli_command cli_cmd_chain = {
    .name = "chain",
    .operands = "[show|tree|check|relocate|pack|fingerprint|diff] FILE|DIR...",
    .brief = "Show a disk and its parents, what is wrong with them, and mend it",
    .about =
        "relocate records anew where a parent is that was moved; pack makes names relative.\n"
        "fingerprint records what FILE's parent is, so that another one is refused.\n"
        "show ends with 1 if FILE itself is no disk. check ends with 0: every image opens with\n"
        "its parent, 2: one does not, 3: they do, but something should be mended. diff ends with\n"
        "0: the same, 1: they differ, 2: not opened, 4: not readable.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
