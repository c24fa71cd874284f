/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup list: what a set has, how large it is, and how far it can be trusted. Each image is opened
 * and closed before the next one; nothing of what it holds is read. */
#include <errno.h>
#include <string.h>

#include "base/json.h"
#include "cli/commands/backup.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {0, NULL, NULL, NULL, false},
};

struct line {
    const struct dr_backup_entry *e;
    struct dr_backup_files files;
    bool looked;       /* files is known */
    const char *state; /* one word */
    char *problem;     /* why it is no good backup, or NULL */
};

struct list {
    const struct cli *cli;
    const char *set;
    struct dr_backup_entry *entries;
    struct line *lines;
    size_t n;
    uint64_t stored; /* bytes of all files, an archive counted once */
};

/* ------------------------------------------------------------------ looking */

static int no_memory(const char *set, struct dr_error *err)
{
    err->errnum = ENOMEM;
    snprintf(err->text, sizeof(err->text), "%s: out of memory", set);
    return -ENOMEM;
}

/* A reason that stands in the set already, or what opening the image says. */
static const char *state_of(const struct dr_backup_entry *e, int r)
{
    if (e->leaving)
        return "leaving";
    if (e->naming)
        return "unfinished";
    if (r == -ENOENT)
        return "missing";
    if (e->damaged || r == -EBADMSG)
        return "damaged";
    return r < 0 ? "unreadable" : e->verified ? "verified" : "unverified";
}

static int look(struct line *l, const char *set, const struct dr_open_options *open,
                struct dr_error *err)
{
    const struct dr_backup_entry *e = l->e;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_backup_look(set, e, open, &l->files, &why);
    const char *problem = r < 0 ? why.text : e->damaged;
    if (e->leaving)
        problem = "it is being pruned: prune again";
    else if (e->naming)
        problem = "it was interrupted, or is being made: the next backup or prune settles it";
    l->looked = r == 0 || l->files.size > 0;
    l->state = state_of(e, r);
    l->problem = problem ? strdup(problem) : NULL;
    return r != -ENOMEM && (!problem || l->problem) ? 0 : no_memory(set, err);
}

/* A backup that shows nothing without its parent is not there either, however good it was once.
 * What was found of a parent's bytes need not touch it: it may have all of them itself. The parent
 * stands before it. */
static int look_at_parent(struct list *list, size_t i, struct dr_error *err)
{
    struct line *l = &list->lines[i], *parent = NULL;
    if (l->problem || !l->e->parent)
        return 0;
    for (size_t k = i; k-- > 0 && !parent;)
        if (strcmp(list->entries[k].name, l->e->parent) == 0)
            parent = &list->lines[k];
    if (!parent ||
        (strcmp(parent->state, "missing") != 0 && strcmp(parent->state, "unreadable") != 0))
        return 0;
    l->state = parent->state;
    if (asprintf(&l->problem, "it stands on \"%s\", which is %s", l->e->parent, l->state) >= 0)
        return 0;
    l->problem = NULL;
    return no_memory(list->set, err);
}

/* Disks of one archive stand behind each other, as they came into the set. */
static bool is_in_archive_of(const struct dr_backup_entry *a, const struct dr_backup_entry *b)
{
    const char *end = strrchr(a->file, '#');
    return end && strcmp(a->format, "vma") == 0 && strcmp(b->format, "vma") == 0 &&
           strncmp(a->file, b->file, (size_t)(end - a->file) + 1) == 0;
}

static int look_at_all(struct list *list, const struct dr_open_options *open, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < list->n; i++) {
        struct line *l = &list->lines[i];
        l->e = &list->entries[i];
        r = look(l, list->set, open, err);
        if (r == 0)
            r = look_at_parent(list, i, err);
        if (l->looked && (i == 0 || !is_in_archive_of(l->e, &list->entries[i - 1])))
            list->stored += l->files.stored;
    }
    return r;
}

/* ------------------------------------------------------------------ telling */

static void put_text(const struct line *l)
{
    char size[CLI_SIZE_TEXT], stored[CLI_SIZE_TEXT] = "-", copied[CLI_SIZE_TEXT];
    const struct dr_backup_entry *e = l->e;
    CLEANUP_FREE char *line = NULL;
    if (l->looked)
        cli_human_size(l->files.stored, stored);
    if (asprintf(&line, "%-24s %-20s %10s %10s %10s  %-10s  %s%s", e->name, e->time,
                 cli_human_size(l->looked ? l->files.size : e->size, size), stored,
                 cli_human_size(e->copied, copied), l->state, e->parent ? "on " : "full",
                 e->parent ? e->parent : "") < 0)
        line = NULL;
    cli_put(line ? line : "out of memory");
    printf("\n");
}

/* The text says of which file it is, and often that has the backup's name. */
static void put_problem(const struct line *l)
{
    size_t len = strlen(l->e->name);
    if (strncmp(l->problem, l->e->name, len) != 0 || l->problem[len] != ':') {
        cli_put(l->e->name);
        printf(": ");
    }
    cli_put(l->problem);
    printf("\n");
}

static void put_human(const struct list *list)
{
    printf("%-24s %-20s %10s %10s %10s  %-10s  %s\n", "NAME", "TIME", "DISK", "STORED", "READ",
           "STATE", "HOLDS");
    for (size_t i = 0; i < list->n; i++)
        put_text(&list->lines[i]);
    for (size_t i = 0; i < list->n; i++)
        if (list->lines[i].problem)
            put_problem(&list->lines[i]);
}

static json_t *text(const char *bytes)
{
    return bytes ? dr_json_text(bytes) : json_null();
}

static json_t *number(uint64_t value)
{
    return json_integer((json_int_t)value);
}

/* NULL: out of memory. */
static json_t *to_json(const struct list *list, const struct line *l)
{
    const struct dr_backup_entry *e = l->e;
    CLEANUP_FREE char *path = dr_name_beside(list->set, e->file);
    json_t *o = path ? json_object() : NULL;
    dr_json_put(&o, "name", text(e->name));
    dr_json_put(&o, "filename", text(path));
    dr_json_put(&o, "format", text(e->format));
    dr_json_put(&o, "virtual-size", number(l->looked ? l->files.size : e->size));
    if (l->looked)
        dr_json_put(&o, "actual-size", number(l->files.stored));
    dr_json_put(&o, "state", text(l->state));
    if (l->problem)
        dr_json_put(&o, "problem", text(l->problem));
    dr_json_put(&o, "verified", text(e->verified));
    dr_json_put(&o, "parent", text(e->parent));
    dr_json_put(&o, "disk", text(e->disk));
    dr_json_put(&o, "disk-size", number(e->size));
    dr_json_put(&o, "copied", number(e->copied));
    dr_json_put(&o, "bitmap", text(e->bitmap));
    dr_json_put(&o, "time", text(e->time));
    dr_json_put(&o, "digest", text(e->digest));
    return o;
}

static int put_json(const struct list *list)
{
    CLEANUP_JSON json_t *root = json_object();
    json_t *backups = json_array();
    for (size_t i = 0; i < list->n; i++)
        dr_json_append(&backups, to_json(list, &list->lines[i]));
    dr_json_put(&root, "filename", text(list->set));
    dr_json_put(&root, "actual-size", number(list->stored));
    dr_json_put(&root, "backups", backups);
    if (root)
        cli_json_hide(root);
    CLEANUP_FREE char *out = root ? dr_json_dump(root, JSON_INDENT(4) | JSON_ENSURE_ASCII) : NULL;
    if (!out) {
        cli_error(list->cli, "out of memory");
        return 1;
    }
    printf("%s\n", out);
    return 0;
}

/* ------------------------------------------------------------------ the command */

static int show(struct list *list, const struct cli_args *args, bool json)
{
    const struct dr_open_options open = {0};
    struct dr_error err = DR_ERROR_INIT;
    int r = dr_backup_list(list->set, &list->entries, &list->n, &err);
    if (r == 0) {
        list->lines = calloc(list->n + 1, sizeof(*list->lines));
        cli_export_allowed(args);
        r = list->lines ? look_at_all(list, &open, &err) : no_memory(list->set, &err);
    }
    if (r < 0) {
        cli_fail(list->cli, &err);
        return 1;
    }
    if (json)
        return put_json(list);
    put_human(list);
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct list list = {.cli = cli};
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting the file that lists the backups");
    list.set = args->operands[0];
    int code = show(&list, args, json);
    for (size_t i = 0; list.lines && i < list.n; i++)
        free(list.lines[i].problem);
    free(list.lines);
    dr_backup_list_free(list.entries, list.n);
    return code;
}

static const struct cli_option *const sets[] = {options, cli_opts_common, NULL};

const struct cli_command cli_cmd_backup_list = {
    .name = "backup list",
    .operands = "SET",
    .brief = "Show the backups of a set: sizes, what each holds, and how far it is proven",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
