/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <langinfo.h>
#include <locale.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "cli/cli.h"
#include "cli/common/tree.h"

bool cli_utf8(void)
{
    /* Set the character set only, so that numbers look as scripts expect. */
    setlocale(LC_CTYPE, "");
    return strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
}

/* ------------------------------------------------------------------ the table */

enum { COLUMNS = 7, WITHOUT_USAGE = 4, FIRST_ON_THE_RIGHT = 2, LAST_ON_THE_RIGHT = 5 };

static void row_free(struct cli_row *row)
{
    free(row->label);
    free(row->format);
    free(row->size);
    free(row->disk_size);
    free(row->note);
    free(row->allocated);
    free(row->exclusive);
    free(row->id);
}

static char *size_cell(bool known, uint64_t bytes)
{
    char text[CLI_SIZE_TEXT];

    return strdup(known ? cli_human_size(bytes, text) : "?");
}

static int add_usage(struct cli_row *row, const struct dr_layer_usage *usage)
{
    bool known = usage && usage->known;

    row->allocated = size_cell(known, known ? usage->allocated : 0);
    row->exclusive = size_cell(known, known ? usage->exclusive : 0);
    row->id = strdup(known && usage->id[0] ? usage->id : "-");
    return row->allocated && row->exclusive && row->id ? 0 : -ENOMEM;
}

int cli_table_add(struct cli_table *table, const char *label, const char *format, uint64_t size,
                  uint64_t disk_size, const struct dr_layer_usage *usage, const char *note)
{
    struct cli_row *bigger = reallocarray(table->rows, table->n + 1, sizeof(*bigger));

    if (!bigger)
        return -ENOMEM;
    table->rows = bigger;
    struct cli_row row = {.label = strdup(label), .format = strdup(format), .note = strdup(note)};
    row.size = size_cell(size != UINT64_MAX, size);
    row.disk_size = size_cell(disk_size != UINT64_MAX, disk_size);
    if (!row.label || !row.format || !row.note || !row.size || !row.disk_size ||
        (table->with_usage && add_usage(&row, usage) < 0)) {
        row_free(&row);
        return -ENOMEM;
    }
    if (strstr(row.label, "json:"))
        dr_hide_secrets(row.label);
    cli_tame(row.label);
    cli_tame(row.format);
    table->rows[table->n++] = row;
    return 0;
}

/* Columns on the screen: continuation bytes of UTF-8 take none. */
static int width(const char *text)
{
    int n = 0;

    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

static const char *cell(const struct cli_row *row, size_t column)
{
    const char *const cells[COLUMNS] = {row->label,     row->format,    row->size, row->disk_size,
                                        row->allocated, row->exclusive, row->id};

    return cells[column];
}

static int widest(const struct cli_table *table, size_t column, const char *title)
{
    int most = width(title);

    for (size_t i = 0; i < table->n; i++) {
        int w = width(cell(&table->rows[i], column));
        most = w > most ? w : most;
    }
    return most;
}

static void print_cell(const char *text, int columns, bool right)
{
    int pad = columns - width(text);

    printf("%*s%s%*s  ", right ? pad : 0, "", text, right ? 0 : pad, "");
}

static bool is_on_the_right(size_t column)
{
    return column >= FIRST_ON_THE_RIGHT && column <= LAST_ON_THE_RIGHT;
}

void cli_table_print(const struct cli_table *table)
{
    static const char *const titles[COLUMNS] = {
        "NAME", "FORMAT", "VIRTUAL SIZE", "DISK SIZE", "ALLOCATED", "EXCLUSIVE", "ID"};
    const size_t n = table->with_usage ? COLUMNS : WITHOUT_USAGE;
    int columns[COLUMNS];

    for (size_t c = 0; c < n; c++)
        columns[c] = widest(table, c, titles[c]);
    for (size_t c = 0; c < n; c++)
        print_cell(titles[c], columns[c], is_on_the_right(c));
    printf("NOTE\n");
    for (size_t i = 0; i < table->n; i++) {
        const struct cli_row *row = &table->rows[i];
        for (size_t c = 0; c < n; c++)
            print_cell(cell(row, c), columns[c], is_on_the_right(c));
        printf("%s\n", row->note);
    }
}

void cli_table_free(struct cli_table *table)
{
    for (size_t i = 0; i < table->n; i++)
        row_free(&table->rows[i]);
    free(table->rows);
    *table = (struct cli_table){0};
}

/* ------------------------------------------------------------------ the family */

struct family {
    const struct dr_tree_node *nodes;
    size_t n;
    const struct dr_layer_usage *usage;
    bool ascii;
    const char *common; /* directory that all names share with the first */
    struct cli_table table;
};

static bool has_child(const struct family *f, size_t i)
{
    for (size_t k = 0; k < f->n; k++) {
        if (f->nodes[k].parent == i)
            return true;
    }
    return false;
}

static bool is_last(const struct family *f, size_t i)
{
    for (size_t k = i + 1; k < f->n; k++) {
        if (f->nodes[k].parent == f->nodes[i].parent)
            return false;
    }
    return true;
}

/* An object, a socket's path and the parameters of a URL may have slashes, and are no directory. */
static bool has_directory(const char *name)
{
    if (strncmp(name, "json:", 5) == 0)
        return false;
    return !dr_name_is_remote(name) || (strstr(name, "://") && !strpbrk(name, "?{"));
}

/* Names of the asked image's own directory are shown without it. */
static const char *short_name(const struct family *f, const char *path)
{
    size_t asked = 0;

    while (asked < f->n && !f->nodes[asked].asked)
        asked++;
    const char *base = asked < f->n ? f->nodes[asked].path : path;
    const char *slash = has_directory(base) ? strrchr(base, '/') : NULL;
    size_t dir = slash ? (size_t)(slash - base) + 1 : 0;
    if (dir && strncmp(path, base, dir) == 0 && !strchr(path + dir, '/'))
        return path + dir;
    return path;
}

/* Report a problem only at the image that causes it; every image on top of it fails for the same
 * reason. */
static const char *own_problem(const struct family *f, size_t i)
{
    const struct dr_tree_node *node = &f->nodes[i];

    if (node->parent != SIZE_MAX && f->nodes[node->parent].problem)
        return NULL;
    return node->problem;
}

static const char *state_of(const struct family *f, size_t i)
{
    if (!f->nodes[i].problem)
        return has_child(f, i) ? "" : "active";
    return own_problem(f, i) ? "does not open" : "parent does not open";
}

static int add_node(struct family *f, size_t i, const char *indent)
{
    const struct dr_tree_node *node = &f->nodes[i];
    bool root = node->parent == SIZE_MAX;
    CLEANUP_FREE char *label = NULL;
    CLEANUP_FREE char *note = NULL;
    CLEANUP_FREE char *below = NULL;
    const char *branch = is_last(f, i) ? (f->ascii ? "`-- " : "└── ")
                                       : (f->ascii ? "|-- " : "├── ");
    const char *trunk = is_last(f, i) ? "    " : (f->ascii ? "|   " : "│   ");

    if (asprintf(&label, "%s%s%s", indent, root ? "" : branch, short_name(f, node->path)) < 0 ||
        asprintf(&below, "%s%s", indent, root ? "" : trunk) < 0 ||
        asprintf(&note, "%s%s%s", node->asked ? "*" : "",
                 node->asked && state_of(f, i)[0] ? " " : "", state_of(f, i)) < 0)
        return -ENOMEM;
    int r = cli_table_add(&f->table, label, node->format ? node->format : "?", node->size,
                          node->disk_size, f->usage ? &f->usage[i] : NULL, note);
    for (size_t k = i + 1; r == 0 && k < f->n; k++) {
        if (f->nodes[k].parent == i)
            r = add_node(f, k, below);
    }
    return r;
}

int cli_tree_print(const struct dr_tree_node *nodes, size_t n, const struct dr_layer_usage *usage,
                   bool ascii)
{
    struct family f = {.nodes = nodes, .n = n, .usage = usage, .ascii = ascii};
    int r = 0;

    f.table.with_usage = usage;
    for (size_t i = 0; r == 0 && i < n; i++) {
        if (nodes[i].parent == SIZE_MAX)
            r = add_node(&f, i, "");
    }
    if (r == 0)
        cli_table_print(&f.table);
    for (size_t i = 0, told = 0; r == 0 && i < n; i++) {
        if (!own_problem(&f, i))
            continue;
        printf("%s", told++ ? "" : "\n");
        cli_put(own_problem(&f, i));
        printf("\n");
    }
    cli_table_free(&f.table);
    return r;
}

void cli_usage_json(json_t *image, const struct dr_layer_usage *usage)
{
    if (!usage->known)
        return;
    json_object_set_new(image, "allocated-bytes", json_integer((json_int_t)usage->allocated));
    json_object_set_new(image, "exclusive-bytes", json_integer((json_int_t)usage->exclusive));
    if (usage->id[0])
        json_object_set_new(image, "content-id", json_string(usage->id));
    if (usage->parent_id[0])
        json_object_set_new(image, "parent-content-id", json_string(usage->parent_id));
}

json_t *cli_tree_json(const struct dr_tree_node *nodes, size_t n,
                      const struct dr_layer_usage *usage)
{
    json_t *list = json_array();

    for (size_t i = 0; i < n; i++) {
        const struct dr_tree_node *node = &nodes[i];
        json_t *one = json_object();
        json_object_set_new(one, "filename", dr_json_text(node->path));
        json_object_set_new(one, "format", json_string(node->format ? node->format : "?"));
        json_object_set_new(one, "virtual-size", json_integer((json_int_t)node->size));
        json_object_set_new(one, "actual-size", json_integer((json_int_t)node->disk_size));
        if (node->parent != SIZE_MAX)
            json_object_set_new(one, "parent", dr_json_text(nodes[node->parent].path));
        json_object_set_new(one, "asked", json_boolean(node->asked));
        if (node->problem)
            json_object_set_new(one, "problem", dr_json_text(node->problem));
        if (usage)
            cli_usage_json(one, &usage[i]);
        json_array_append_new(list, one);
    }
    return list;
}
