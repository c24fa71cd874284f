/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/live/archive.h"

#include <stdlib.h>
#include <string.h>

#include "base/absolute.h"
#include "cli/vma/vma.h"

bool ctl_is_archive(const struct cli_args *args)
{
    const char *target = args->operands[args->n_operands - 1], *format = cli_value(args, 'f');
    if (format)
        return strcmp(format, "vma") == 0;
    return cli_has(args, KEY_ALL) || vma_is_archive_name(target);
}

int ctl_set_spill(struct ctl *ctl, const struct cli_args *args, json_t *to)
{
    const char *spill = cli_value(args, KEY_SPILL), *size = cli_value(args, KEY_SPILL_SIZE);
    const char *full = cli_value(args, KEY_WHEN_FULL);
    uint64_t bytes = 0;
    if (!spill && (size || full))
        return cli_usage(ctl->cli, "--spill-size and --when-full go with --spill");
    if (size && cli_get_size(ctl->cli, "size of the spill file", size, &bytes) < 0)
        return 1;
    CLEANUP_FREE char *path = spill ? dr_absolute_path(spill) : NULL;
    if (spill && (!path || json_object_set_new(to, "x-spill", json_string(path)) < 0))
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", spill);
    if (size)
        json_object_set_new(to, "x-spill-size", json_integer((json_int_t)bytes));
    if (full)
        json_object_set_new(to, "x-when-full", json_string(full));
    return 0;
}

/* ------------------------------------------------------------------ an archive */

/* As JSON has them: text. */
static int set_configs(struct ctl *ctl, const struct cli_args *args, json_t *to)
{
    CLEANUP_SOURCE struct vma_source source = {.cli = ctl->cli};
    json_t *configs = json_array();
    for (size_t i = 0; i < args->n_hits; i++)
        if (args->hits[i].key == 'c' && vma_source_config(&source, args->hits[i].arg) != 0) {
            json_decref(configs);
            return 1;
        }
    for (size_t i = 0; i < source.n_configs; i++) {
        const struct dr_vma_config *c = &source.configs[i];
        json_t *data = json_stringn((const char *)c->data, c->len);
        if (!data) {
            cli_error(ctl->cli, "%s: is no text in UTF-8: a server does not take it", c->name);
            json_decref(configs);
            return 1;
        }
        json_array_append_new(configs, json_pack("{s:s, s:o}", "name", c->name, "data", data));
    }
    json_object_set_new(to, "configs", configs);
    return 0;
}

static int set_disks(struct ctl *ctl, const struct cli_args *args, json_t *to)
{
    int n = args->n_operands - 3; /* the socket, the command and the archive stand beside them */
    if (cli_has(args, KEY_ALL) && n > 0)
        return cli_usage(ctl->cli, "--all and names of disks exclude each other");
    if (cli_has(args, KEY_ALL))
        return 0;
    if (n == 0)
        return cli_usage(ctl->cli, "Expecting names of disks, or --all");
    json_t *devices = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(devices, json_string(args->operands[2 + i]));
    json_object_set_new(to, "devices", devices);
    return 0;
}

int ctl_archive_arguments(struct ctl *ctl, const struct cli_args *args, json_t **arguments)
{
    const char *target = args->operands[args->n_operands - 1];
    struct dr_vma_create_options o = {0};
    CLEANUP_FREE char *path = dr_absolute_path(target);
    *arguments = path ? json_pack("{s:s}", "target", path) : NULL;
    if (!*arguments)
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", target);
    if (cli_has(args, KEY_BITMAP))
        return cli_usage(ctl->cli,
                         "--bitmap is for backups into images: an archive holds all of its disks");
    const char *set = cli_value(args, KEY_STATE);
    CLEANUP_FREE char *set_path = set ? dr_absolute_path(set) : NULL;
    if (set && (!set_path || json_object_set_new(*arguments, "x-set", json_string(set_path)) < 0))
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", set);
    int code = vma_get_compression(ctl->cli, args, target, &o);
    json_object_set_new(*arguments, "compression",
                        json_string(o.compression == DR_VMA_ZSTD ? "zstd" : "none"));
    json_object_set_new(*arguments, "level", json_integer(o.level));
    if (code == 0)
        code = set_disks(ctl, args, *arguments);
    if (code == 0)
        code = set_configs(ctl, args, *arguments);
    return code ? code : ctl_set_spill(ctl, args, *arguments);
}
