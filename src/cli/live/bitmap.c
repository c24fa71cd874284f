/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/live/bitmap.h"

#include <stdlib.h>
#include <string.h>

enum { AT = 2 }; /* index of the word behind "bitmap" */

static const struct change {
    const char *name, *operands;
    int n, most; /* names that it takes, the disk's not counted */
} changes[] = {
    {"add", " DISK BITMAP", 1, 1},     {"remove", " DISK BITMAP", 1, 1},
    {"clear", " DISK BITMAP", 1, 1},   {"enable", " DISK BITMAP", 1, 1},
    {"disable", " DISK BITMAP", 1, 1}, {"merge", " DISK BITMAP SOURCE...", 2, 1000},
    {"list", " [DISK]", 0, 0},
};

static const struct change *find_change(const char *name)
{
    for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++)
        if (strcmp(changes[i].name, name) == 0)
            return &changes[i];
    return NULL;
}

static bool is(const struct cli_args *args, const char *name)
{
    return strcmp(args->operands[AT], name) == 0;
}

int ctl_bitmap_check(const struct cli *cli, const struct cli_args *args)
{
    bool options = cli_has(args, 'g') || cli_has(args, KEY_TEMPORARY) ||
                   cli_has(args, KEY_DISABLED);
    if (args->n_operands <= AT)
        return cli_usage(cli, "Expecting: ctl SOCKET bitmap "
                              "add|remove|clear|enable|disable|merge|list");
    const struct change *c = find_change(args->operands[AT]);
    int n = args->n_operands - AT - 1;
    if (!c)
        return cli_usage(cli, "'%s' is nothing that is done with a bitmap", args->operands[AT]);
    if (n < c->n || n > c->most + 1)
        return cli_usage(cli, "Expecting: ctl SOCKET bitmap %s%s", c->name, c->operands);
    if (options && !is(args, "add"))
        return cli_usage(cli, "-g, --temporary and --disabled go with `bitmap add` only");
    return 0;
}

bool ctl_bitmap_lacks_disk(const struct cli_args *args)
{
    const struct change *c = find_change(args->operands[AT]);
    return c && c->n > 0 && args->n_operands - AT - 1 == c->n;
}

/* ------------------------------------------------------------------ list */

static void show_bitmap(const char *disk, const json_t *b)
{
    char dirty[CLI_SIZE_TEXT], granularity[CLI_SIZE_TEXT];
    bool broken = json_is_true(json_object_get(b, "inconsistent"));
    bool enabled = json_is_true(json_object_get(b, "recording"));
    const char *name = json_string_value(json_object_get(b, "name"));
    printf("%s: ", disk);
    cli_put(name ? name : "");
    cli_human_size(cli_json_number(b, "granularity"), granularity);
    if (broken)
        printf(": inconsistent, granularity %s", granularity);
    else
        printf(": %s set, granularity %s, %s", cli_human_size(cli_json_number(b, "count"), dirty),
               granularity, enabled ? "enabled" : "disabled");
    printf("%s%s\n", json_is_true(json_object_get(b, "persistent")) ? "" : ", temporary",
           json_is_true(json_object_get(b, "busy")) ? ", in use by a job" : "");
}

/* disk: NULL = all. */
static int list(struct ctl *ctl, const char *disk)
{
    CLEANUP_JSON json_t *disks = NULL;
    json_t *one, *bitmap;
    size_t i, k;
    bool found = !disk;
    int code = ctl_ask(ctl, "query-block", NULL, &disks);
    json_array_foreach(disks, i, one)
    {
        const char *name = json_string_value(json_object_get(one, "device"));
        const json_t *image = json_object_get(one, "inserted");
        if (!name || (disk && strcmp(name, disk) != 0))
            continue;
        found = true;
        json_array_foreach(json_object_get(image, "dirty-bitmaps"), k, bitmap)
        {
            if (!ctl->show)
                show_bitmap(name, bitmap);
        }
    }
    if (code == 0 && !found) {
        cli_error(ctl->cli, "%s: the server has no disk '%s' (`status` names them)", ctl->path,
                  disk);
        code = 1;
    }
    return code;
}

/* ------------------------------------------------------------------ changes */

static int set_add(const struct cli *cli, const struct cli_args *args, json_t *to)
{
    const char *granularity = cli_value(args, 'g');
    uint64_t bytes = 0;
    if (granularity && cli_get_size(cli, "granularity", granularity, &bytes) < 0)
        return 1;
    if (granularity)
        json_object_set_new(to, "granularity", json_integer((json_int_t)bytes));
    json_object_set_new(to, "persistent", json_boolean(!cli_has(args, KEY_TEMPORARY)));
    json_object_set_new(to, "disabled", json_boolean(cli_has(args, KEY_DISABLED)));
    return 0;
}

static json_t *names(char **from, int n)
{
    json_t *all = json_array();
    for (int i = 0; i < n; i++)
        if (json_array_append_new(all, json_string(from[i])) < 0) {
            json_decref(all);
            return NULL;
        }
    return all;
}

/* operands: behind the disk's name. */
static json_t *arguments_of(const struct cli_args *args, const char *disk, char **operands, int n)
{
    if (!is(args, "merge"))
        return json_pack("{s:s, s:s}", "node", disk, "name", operands[0]);
    json_t *sources = names(operands + 1, n - 1);
    return sources ? json_pack("{s:s, s:s, s:o}", "node", disk, "target", operands[0], "bitmaps",
                               sources)
                   : NULL;
}

int ctl_bitmap(struct ctl *ctl, const struct cli_args *args, const char *disk)
{
    char **operands = args->operands + AT + 1, command[64];
    int n = args->n_operands - AT - 1;
    if (is(args, "list"))
        return list(ctl, n > 0 ? operands[0] : NULL);
    if (!disk) {
        disk = *operands++;
        n--;
    }
    json_t *arguments = arguments_of(args, disk, operands, n);
    if (!arguments)
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", operands[0]);
    if (is(args, "add") && set_add(ctl->cli, args, arguments) != 0) {
        json_decref(arguments);
        return 1;
    }
    snprintf(command, sizeof(command), "block-dirty-bitmap-%s", args->operands[AT]);
    return ctl_ask(ctl, command, arguments, NULL);
}
