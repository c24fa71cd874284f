/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* chain show, chain tree and snapshot -l: which images belong together, and what each holds. */
#include <inttypes.h>
#include <string.h>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/tree.h"

#define DEPTH_SHOWN 512 /* more than any chain may have: a loop */

/* ------------------------------------------------------------------ trees */

static int print_nodes(const struct cli_args *args, const struct dr_tree_node *nodes, size_t n,
                       const struct dr_layer_usage *usage, bool json)
{
    if (json) {
        CLEANUP_JSON json_t *tree = cli_tree_json(nodes, n, usage);
        json_dumpf(tree, stdout, JSON_INDENT(4) | JSON_ENSURE_ASCII);
        printf("\n");
        return 0;
    }
    return cli_tree_print(nodes, n, usage, cli_has(args, KEY_ASCII) || !cli_utf8()) < 0;
}

/* Takes the nodes over. */
static int show_nodes(const struct cli *cli, const struct cli_args *args,
                      struct dr_tree_node *nodes, size_t n, const struct dr_open_options *open,
                      bool with_usage, bool json)
{
    CLEANUP_FREE struct dr_layer_usage *usage = NULL;
    struct dr_error err = DR_ERROR_INIT;
    int code = 0;

    if (with_usage) {
        usage = calloc(n + 1, sizeof(*usage));
        if (!usage || dr_tree_usage(nodes, n, open, usage, &err) < 0) {
            cli_error(cli, "%s", usage ? err.text : "out of memory");
            code = 1;
        }
    }
    if (code == 0)
        code = print_nodes(args, nodes, n, usage, json);
    dr_tree_free(nodes, n);
    return code;
}

int cli_show_tree(const struct cli *cli, const struct cli_args *args, const struct cli_image *image,
                  bool usage)
{
    struct dr_tree_node *nodes = NULL;
    struct dr_error err = DR_ERROR_INIT;
    size_t n = 0;
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (dr_tree(image->path, &image->open, &nodes, &n, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    return show_nodes(cli, args, nodes, n, &image->open, usage, json);
}

int cli_show_forest(const struct cli *cli, const struct cli_args *args, const char *dir)
{
    struct dr_open_options open = {0};
    struct dr_tree_node *nodes = NULL;
    struct dr_error err = DR_ERROR_INIT;
    size_t n = 0;
    bool json;

    if (cli_output_json(cli, args, &json) != 0 || cli_shared_flags(cli, args, &open.flags) != 0)
        return 1;
    cli_export_allowed(args);
    if (dr_forest(dir, &open, &nodes, &n, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (n == 0) {
        cli_error(cli, "%s: is a directory without images", dir);
        dr_tree_free(nodes, n);
        return 1;
    }
    return show_nodes(cli, args, nodes, n, &open, true, json);
}

/* ------------------------------------------------------------------ one chain */

struct chain {
    const struct cli *cli;
    const struct cli_image *top;
    json_t *list; /* an object an image, top first, perhaps with "problem" */
    unsigned problems;
    struct dr_layer_usage *usage; /* of each image in the list */
    bool useless;                 /* the first of them is no disk, with parents or without */
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

static const char *note_of(const struct chain *c, const json_t *image, size_t i)
{
    if (text_of(image, "problem"))
        return "does not open";
    if (i == 0)
        return "* active";
    return i + 1 < json_array_size(c->list) ? "" : "base";
}

static int show(struct chain *c)
{
    CLEANUP_TABLE struct cli_table table = {.with_usage = true};
    json_t *image;
    size_t i;

    json_array_foreach(c->list, i, image)
    {
        const char *format = text_of(image, "format");
        const json_t *size = json_object_get(image, "virtual-size");
        const json_t *disk_size = json_object_get(image, "actual-size");
        if (cli_table_add(&table, text_of(image, "filename"), format ? format : "?",
                          size ? (uint64_t)json_integer_value(size) : UINT64_MAX,
                          disk_size ? (uint64_t)json_integer_value(disk_size) : UINT64_MAX,
                          &c->usage[i], note_of(c, image, i)) < 0)
            return 1;
    }
    cli_table_print(&table);
    if (c->problems)
        printf("\n");
    list_problems(c);
    return 0;
}

/* Each image stands on the next one of the list. */
static int measure(struct chain *c)
{
    size_t n = json_array_size(c->list), i;
    CLEANUP_FREE struct dr_tree_node *nodes = calloc(n + 1, sizeof(*nodes));
    struct dr_error err = DR_ERROR_INIT;
    json_t *image;

    c->usage = calloc(n + 1, sizeof(*c->usage));
    if (!nodes || !c->usage) {
        cli_error(c->cli, "out of memory");
        return 1;
    }
    json_array_foreach(c->list, i, image)
    {
        nodes[i].path = (char *)text_of(image, "filename");
        nodes[i].format = (char *)text_of(image, "format");
        nodes[i].parent = i + 1 < n ? i + 1 : SIZE_MAX;
    }
    if (dr_tree_usage(nodes, n, &c->top->open, c->usage, &err) < 0) {
        cli_fail(c->cli, &err);
        return 1;
    }
    json_array_foreach(c->list, i, image) cli_usage_json(image, &c->usage[i]);
    return 0;
}

int cli_show_chain(const struct cli *cli, const struct cli_args *args,
                   const struct cli_image *image)
{
    struct chain c = {.cli = cli, .top = image};
    CLEANUP_JSON json_t *list = json_array();
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    c.list = list;
    walk(&c);
    int code = measure(&c);
    if (code == 0 && json) {
        json_dumpf(list, stdout, JSON_INDENT(4) | JSON_ENSURE_ASCII);
        printf("\n");
    } else if (code == 0) {
        code = show(&c);
    }
    free(c.usage);
    return code ? code : c.useless ? 1 : 0;
}
