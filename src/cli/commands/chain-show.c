/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* chain show, chain tree and snapshot -l: which images belong together, and what each holds. */
#include <inttypes.h>
#include <string.h>
#include <time.h>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/tree.h"

#define DEPTH_SHOWN 512 /* more than any chain may have: a loop */

/* ------------------------------------------------------------------ trees */

/* What the machines beside the disks say of them. Nobody has to have any. */
struct notes {
    struct dr_machine_note *all;
    size_t n;
};

static const struct dr_tree_node *node_of(const struct dr_machine_note *note,
                                          const struct dr_tree_node *nodes, size_t n)
{
    for (size_t i = 0; note->image[0] && i < n; i++)
        if (cli_same_file(nodes[i].path, note->image))
            return &nodes[i];
    return NULL;
}

static void format_time(int64_t microseconds, char *text, size_t size)
{
    time_t seconds = (time_t)(microseconds / 1000000);
    struct tm tm;

    text[0] = '\0';
    if (microseconds > 0 && localtime_r(&seconds, &tm))
        strftime(text, size, ", %Y-%m-%d %H:%M:%S", &tm);
}

static void print_note(const struct dr_machine_note *note)
{
    char when[64];

    format_time(note->microseconds, when, sizeof(when));
    if (!note->image[0]) {
        cli_put(note->text);
        printf("\n");
        return;
    }
    cli_put(note->descriptor);
    printf(": ");
    if (note->snapshot) {
        printf("snapshot \"");
        cli_put(note->snapshot);
        printf("\" is ");
    } else {
        printf("uses ");
    }
    cli_put(note->image);
    if (note->device[0]) {
        printf(" (");
        cli_put(note->device);
        printf(")");
    }
    printf("%s%s\n", when, note->current ? ", current" : "");
}

/* Those of the images that are shown, and of descriptors that cannot be read. */
static void print_notes(const struct notes *notes, const struct dr_tree_node *nodes, size_t n)
{
    size_t printed = 0;

    for (size_t i = 0; i < notes->n; i++)
        if (!notes->all[i].image[0] || node_of(&notes->all[i], nodes, n)) {
            printf("%s", printed++ ? "" : "\n");
            print_note(&notes->all[i]);
        }
}

static void add_note_json(json_t *image, const struct dr_machine_note *note)
{
    const char *key = note->snapshot ? "snapshots" : "used-by";
    json_t *list = json_object_get(image, key);

    if (!list) {
        list = json_array();
        json_object_set_new(image, key, list);
    }
    json_t *one = json_pack("{s:o}", "descriptor", dr_json_text(note->descriptor));
    if (note->device[0])
        json_object_set_new(one, "device", dr_json_text(note->device));
    if (note->snapshot) {
        json_object_set_new(one, "name", dr_json_text(note->snapshot));
        json_object_set_new(one, "uid", json_integer((json_int_t)note->uid));
        json_object_set_new(one, "parent-uid", json_integer((json_int_t)note->parent_uid));
        json_object_set_new(one, "date-sec", json_integer(note->microseconds / 1000000));
        json_object_set_new(one, "current", json_boolean(note->current));
    }
    json_array_append_new(list, one);
}

static void add_notes_json(json_t *tree, const struct notes *notes,
                           const struct dr_tree_node *nodes, size_t n)
{
    for (size_t i = 0; i < notes->n; i++) {
        const struct dr_tree_node *node = node_of(&notes->all[i], nodes, n);
        if (node)
            add_note_json(json_array_get(tree, (size_t)(node - nodes)), &notes->all[i]);
    }
}

static int print_nodes(const struct cli *cli, const struct cli_args *args,
                       const struct dr_tree_node *nodes, size_t n,
                       const struct dr_layer_usage *usage, const struct notes *notes, bool json)
{
    if (json) {
        CLEANUP_JSON json_t *tree = cli_tree_json(nodes, n, usage);
        add_notes_json(tree, notes, nodes, n);
        cli_dump_json(tree);
        return 0;
    }
    if (cli_tree_print(nodes, n, usage, cli_has(args, KEY_ASCII) || !cli_utf8()) < 0) {
        cli_error(cli, "out of memory");
        return 1;
    }
    print_notes(notes, nodes, n);
    return 0;
}

/* Takes the nodes over. */
static int show_nodes(const struct cli *cli, const struct cli_args *args, const char *dir,
                      struct dr_tree_node *nodes, size_t n, const struct dr_open_options *open,
                      bool with_usage, bool json)
{
    CLEANUP_FREE struct dr_layer_usage *usage = NULL;
    struct dr_error err = DR_ERROR_INIT;
    struct notes notes = {0};
    int code = 0;

    if (dir)
        dr_machine_notes(dir, &notes.all, &notes.n, NULL);
    if (with_usage) {
        usage = calloc(n + 1, sizeof(*usage));
        if (!usage || dr_tree_usage(nodes, n, open, usage, &err) < 0) {
            cli_error(cli, "%s", usage ? err.text : "out of memory");
            code = 1;
        }
    }
    if (code == 0)
        code = print_nodes(cli, args, nodes, n, usage, &notes, json);
    dr_machine_notes_free(notes.all, notes.n);
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
    CLEANUP_FREE char *dir = cli_directory_of(image->path);
    return show_nodes(cli, args, dir, nodes, n, &image->open, usage, json);
}

int cli_show_forest(const struct cli *cli, const struct cli_args *args, const char *dir, bool usage)
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
    return show_nodes(cli, args, dir, nodes, n, &open, usage, json);
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
        cli_dump_json(list);
    } else if (code == 0) {
        code = show(&c);
    }
    free(c.usage);
    return code ? code : c.useless ? 1 : 0;
}
