/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/json.h"
#include "cli/common/tree.h"

#define DEPTH_SHOWN 512 /* more than any chain may have: a loop */

enum { EXIT_PROBLEM = 2 };

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {KEY_ASCII, "ascii", NULL, "draw the tree with plain characters", false},
    {0, NULL, NULL, NULL, false},
};

struct chain {
    const struct cli *cli;
    const struct cli_image *top;
    json_t *list; /* an object an image, top first, perhaps with "problem" */
    unsigned problems;
    bool useless; /* the first of them is no disk, with parents or without */
};

static int try_open(const struct chain *c, const char *path, const char *format, unsigned flags,
                    struct dr_error *err)
{
    struct dr_open_options o = c->top->open;
    struct dr_disk *disk = NULL;

    o.format = format;
    o.flags |= flags;
    int r = dr_open(path, &o, &disk, err);
    dr_close(disk, NULL);
    return r;
}

static void add_problem(struct chain *c, json_t *image, const char *text)
{
    json_object_set_new(image, "problem", dr_json_text(text));
    c->problems++;
}

/* Get the description of the image alone, without its parents. NULL: it could not be opened; it
 * was added with the reason. */
static json_t *add_image(struct chain *c, const char *path, const char *format)
{
    struct dr_open_options o = c->top->open;
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *text = NULL;

    o.format = format;
    o.flags |= DR_OPEN_NO_BACKING;
    int r = dr_info(path, &o, false, &text, &err);
    json_t *image = r == 0 ? json_loads(text, 0, NULL) : NULL;
    if (image) {
        json_array_append_new(c->list, image);
        return image;
    }
    image = json_pack("{s:o}", "filename", dr_json_text(path));
    json_array_append_new(c->list, image);
    add_problem(c, image, err.text);
    return NULL;
}

static const char *text_of(const json_t *image, const char *key)
{
    return json_string_value(json_object_get(image, key));
}

/* Walk down the chain as far as the gate allows. A chain that opens as a whole is followed by
 * its names; in a broken one each image is opened as a top of its own, so that the problem is
 * shown at the image that has it. */
static void walk(struct chain *c)
{
    const char *path = c->top->path, *format = c->top->format;

    c->useless = try_open(c, path, format, DR_OPEN_NO_BACKING, NULL) < 0;
    for (unsigned depth = 0; path && depth < DEPTH_SHOWN; depth++) {
        struct dr_error err = DR_ERROR_INIT;
        struct dr_error below = DR_ERROR_INIT;
        json_t *image = add_image(c, path, format);
        if (!image)
            return;
        const char *next = text_of(image, "full-backing-filename");
        int r = try_open(c, path, format, 0, &err);
        if (r < 0 && (r == -EACCES || r == -ELOOP || !next || !cli_name_exists(next))) {
            add_problem(c, image, err.text);
            return;
        }
        format = text_of(image, "backing-filename-format");
        if (r < 0 && try_open(c, next, format, 0, &below) == 0)
            add_problem(c, image, err.text);
        path = next;
    }
}

/* The library's texts begin with the name of the file, so it is not printed again. */
static void list_problems(const struct chain *c)
{
    json_t *image;
    size_t i;

    json_array_foreach(c->list, i, image)
    {
        const char *problem = text_of(image, "problem");
        if (problem) {
            cli_put(problem);
            printf("\n");
        }
    }
}

static int show(struct chain *c)
{
    CLEANUP_TABLE struct cli_table table = {0};
    json_t *image;
    size_t i;

    json_array_foreach(c->list, i, image)
    {
        const char *problem = text_of(image, "problem"), *format = text_of(image, "format");
        const json_t *size = json_object_get(image, "virtual-size");
        const json_t *disk_size = json_object_get(image, "actual-size");
        const char *note = problem                            ? "does not open"
                           : i + 1 < json_array_size(c->list) ? ""
                                                              : "base";
        if (!problem && i == 0)
            note = "* active";
        if (cli_table_add(&table, text_of(image, "filename"), format ? format : "?",
                          size ? (uint64_t)json_integer_value(size) : UINT64_MAX,
                          disk_size ? (uint64_t)json_integer_value(disk_size) : UINT64_MAX,
                          note) < 0)
            return 1;
    }
    cli_table_print(&table);
    if (c->problems)
        printf("\n");
    list_problems(c);
    return 0;
}

static void tell_problems(const struct chain *c)
{
    list_problems(c);
    if (c->problems == 0)
        printf("%zu image%s, no problem.\n", json_array_size(c->list),
               json_array_size(c->list) == 1 ? "" : "s");
}

static int follow(const struct cli *cli, const struct cli_args *args, const struct cli_image *image,
                  bool check)
{
    struct chain c = {.cli = cli, .top = image};
    CLEANUP_JSON json_t *list = json_array();
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    c.list = list;
    walk(&c);
    if (json) {
        json_dumpf(list, stdout, JSON_INDENT(4) | JSON_ENSURE_ASCII);
        printf("\n");
    } else if (check) {
        tell_problems(&c);
    } else if (show(&c) != 0) {
        return 1;
    }
    if (check && c.problems)
        return EXIT_PROBLEM;
    return c.useless ? 1 : 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    const char *verb = args->n_operands == 2 ? args->operands[0] : "show";
    unsigned problems = 0;

    if (args->n_operands < 1 || args->n_operands > 2)
        return cli_usage(cli, "Expecting [show|tree|check] and one image file name");
    if (strcmp(verb, "show") != 0 && strcmp(verb, "tree") != 0 && strcmp(verb, "check") != 0)
        return cli_usage(cli, "Expecting show, tree or check, not '%s'", verb);
    const struct cli_image_spec spec = {.name = args->operands[args->n_operands - 1],
                                        .format_key = 'f'};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    if (strcmp(verb, "tree") == 0)
        return cli_show_tree(cli, args, &image, &problems);
    return follow(cli, args, &image, strcmp(verb, "check") == 0);
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_share,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_chain = {
    .name = "chain",
    .operands = "[show|tree|check] FILE",
    .brief = "Show a disk and its parents, the whole family, or what is wrong with them",
    .about =
        "check ends with 0: every image opens with its parent, 2: one does not. show ends with\n"
        "1 if FILE itself is no disk.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
