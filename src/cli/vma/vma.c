/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/common/json.h"
#include "cli/common/suggest.h"
#include "cli/vma/vma.h"
#include "cli/commands.h"

/* ------------------------------------------------------------------ names from outside */

bool vma_is_plain(const char *name)
{
    while (*name) {
        size_t n = cli_char_length(name);
        if (n == 0)
            return false;
        name += n;
    }
    return true;
}

bool vma_is_file_name(const char *name)
{
    return dr_vma_name_is_safe(name) && vma_is_plain(name);
}

char *vma_escape(const char *name)
{
    char *text = malloc(4 * strlen(name) + 1), *to = text;

    while (text && *name) {
        size_t n = cli_char_length(name);
        if (n == 0)
            to += sprintf(to, "\\x%02x", (unsigned char)*name++);
        for (size_t i = 0; i < n; i++)
            *to++ = *name++;
    }
    if (text)
        *to = '\0';
    return text;
}

json_t *vma_json_name(const char *name)
{
    json_t *value = json_string(name);
    CLEANUP_FREE char *escaped = value ? NULL : vma_escape(name);

    return value ? value : json_string(escaped ? escaped : "?");
}

void vma_print_json(json_t *value)
{
    cli_dump_json(value);
}

bool vma_wants_json(const struct cli_args *args)
{
    return cli_has(args, KEY_JSON);
}

/* ------------------------------------------------------------------ opening */

static void on_message(void *user, const char *text)
{
    cli_error(user, "%s", text);
}

const char *vma_shown(const char *name)
{
    return strcmp(name, "-") == 0 ? "standard input" : name;
}

int vma_try_open(const char *name, enum vma_salvage salvage,
                 void (*message)(void *user, const char *text), void *user, struct dr_vma **vma,
                 struct dr_error *err)
{
    bool standard = strcmp(name, "-") == 0;
    const struct dr_vma_open_options o = {
        .use_fd = standard,
        .fd = STDIN_FILENO,
        .salvage = salvage != VMA_WHOLE,
        .any_header = salvage == VMA_ANY_HEADER,
        .message = message,
        .user = user,
    };

    return dr_vma_open(vma_shown(name), &o, vma, err);
}

int vma_open_as(const struct cli *cli, const char *name, bool quiet, bool salvage,
                struct dr_vma **vma)
{
    struct dr_error err = DR_ERROR_INIT;
    enum vma_salvage how = salvage ? VMA_ANY_HEADER : VMA_WHOLE;
    int r = vma_try_open(name, how, quiet ? NULL : on_message, (void *)cli, vma, &err);

    if (r < 0)
        cli_fail(cli, &err);
    return r;
}

int vma_open(const struct cli *cli, const char *name, bool quiet, struct dr_vma **vma)
{
    return vma_open_as(cli, name, quiet, false, vma);
}

const struct dr_vma_disk *vma_find_id(const struct dr_vma_header *header, unsigned id)
{
    for (size_t i = 0; i < header->n_disks; i++) {
        if (header->disks[i].id == id)
            return &header->disks[i];
    }
    return NULL;
}

static bool is_disk_id(const char *name, unsigned id)
{
    char text[16];

    snprintf(text, sizeof(text), "disk-%u", id);
    return strcmp(name, text) == 0;
}

const struct dr_vma_disk *vma_find_disk(const struct cli *cli, const char *archive,
                                        const struct dr_vma_header *header, const char *name)
{
    const struct dr_vma_disk *found = NULL, *by_id = NULL;
    size_t n = 0;

    for (size_t i = 0; i < header->n_disks; i++) {
        if (strcmp(header->disks[i].name, name) == 0) {
            found = &header->disks[i];
            n++;
        } else if (is_disk_id(name, header->disks[i].id)) {
            by_id = &header->disks[i];
        }
    }
    if (n <= 1 && (found || by_id))
        return found ? found : by_id;
    if (n > 1)
        cli_error(cli, "%zu disks are called '%s': say disk-ID (`vma list --json` has the ids)", n,
                  name);
    else
        cli_error(cli, "%s has no disk '%s' (`vma list` shows what it has)", archive, name);
    return NULL;
}

bool vma_config_comes_again(const struct dr_vma_header *header, size_t i)
{
    for (size_t k = i + 1; k < header->n_configs; k++) {
        if (strcmp(header->configs[i].name, header->configs[k].name) == 0)
            return true;
    }
    return false;
}

static int get_workers(const struct cli *cli, const char *text, unsigned *workers)
{
    char *end;
    long n = text ? strtol(text, &end, 10) : 0;

    if (!text)
        return 0;
    if (end == text || *end || n < 1 || n > 16)
        return cli_usage(cli, "--jobs must be between 1 and 16, not '%s'", text);
    *workers = (unsigned)n;
    return 0;
}

int vma_job_begin(const struct cli *cli, const struct cli_args *args, struct cli_job *job)
{
    const char *rate = cli_value(args, 'r');
    struct cli_job_limits limits = {0};

    if (vma_wants_json(args) && cli_has(args, 'p'))
        return cli_usage(cli, "-p would stand in the middle of --json: take --progress=json");
    if (rate && cli_get_size(cli, "rate limit", rate, &limits.rate) < 0)
        return 1;
    int code = get_workers(cli, cli_value(args, 'm'), &limits.workers);
    return code ? code : cli_job_begin(cli, args, &limits, job);
}

/* ------------------------------------------------------------------ the command */

static int run(const struct cli *cli, const struct cli_args *args)
{
    if (args->n_operands > 0)
        return cli_usage(cli, "Command not found: vma %s%s", args->operands[0],
                         cli_meant_child(cli->command, args->operands[0]));
    return cli_usage(cli, "Expecting list, config, create, extract, verify or index");
}

static const struct cli_command *const children[] = {&vma_cmd_list,
                                                     &vma_cmd_config,
                                                     &vma_cmd_create,
                                                     &vma_cmd_extract,
                                                     &vma_cmd_verify,
                                                     &vma_cmd_index,
                                                     NULL};
static const struct cli_option *const sets[] = {cli_opts_common, NULL};

const struct cli_command cli_cmd_vma = {
    .name = "vma",
    .operands = "COMMAND ARCHIVE...",
    .brief = "Read, check and write backup archives of Proxmox VE",
    .sets = sets,
    .children = children,
    .roles = CLI_DROVER,
    .run = run,
};
