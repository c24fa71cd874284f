/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <uuid/uuid.h>

#include "cli/vma/vma.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"

static const struct cli_option options[] = {
    {'c', "config", "FILE", "put this configuration file in (repeatable)", false},
    {'d', "disk", "[format=FMT:]NAME=FILE", "put this disk in, as NAME (repeatable)", false},
    {KEY_VMSTATE, "vmstate", "FILE", "put the state of a running machine in", false},
    {KEY_VMSTATE_SIZE, "vmstate-size", "SIZE", "its size, when FILE is a pipe", false},
    {KEY_COMPRESS, "compress", "zstd[:LEVEL]|none", "zstd if ARCHIVE ends in .zst, else none",
     false},
    {KEY_ZSTD, "zstd", NULL, "the same as --compress=zstd", false},
    {KEY_REPRODUCIBLE, "reproducible", NULL, "the same input makes the same bytes", false},
    {KEY_UUID, "uuid", "UUID", "of the archive (random)", false},
    {KEY_CTIME, "ctime", "SECONDS", "when the archive was made, since 1970 (now)", false},
    {KEY_SUMS, "sums", "FILE", "where the checksums go (ARCHIVE.sums)", false},
    {KEY_NO_SUMS, "no-sums", NULL, "write no checksums", false},
    {KEY_CHECKSUM, "checksum", NULL, "print the checksum of each disk", false},
    {KEY_NO_SYNC, "no-sync", NULL, "do not wait until all is durable", false},
    {KEY_FORCE, "force", NULL, "replace an existing ARCHIVE", false},
    {KEY_JSON, "json", NULL, "print JSON", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'m', "jobs", "N", "how many workers, 1 to 16", false},
    {0, NULL, NULL, NULL, false},
};

struct create {
    const struct cli *cli;
    const char *path;
    struct dr_vma_create_options o;
    struct vma_source source;
    int fd; /* standard output, as it was; -1 = an archive with a name */
};

static void create_free(struct create *c)
{
    vma_source_free(&c->source);
    if (c->fd >= 0)
        close(c->fd);
}

/* ------------------------------------------------------------------ options */

static int get_identity(struct create *c, const struct cli_args *args)
{
    const char *uuid = cli_value(args, KEY_UUID), *ctime = cli_value(args, KEY_CTIME);
    char *end;

    c->o.has_uuid = uuid;
    c->o.has_ctime = ctime;
    if (uuid && uuid_parse(uuid, c->o.uuid) < 0)
        return cli_usage(c->cli, "--uuid: '%s' is no UUID", uuid);
    if (!ctime)
        return 0;
    errno = 0;
    c->o.ctime = strtoll(ctime, &end, 10);
    if (!*ctime || *end || errno)
        return cli_usage(c->cli, "--ctime: '%s' is no number of seconds", ctime);
    return 0;
}

static int get_sources(struct create *c, const struct cli_args *args)
{
    const char *state = cli_value(args, KEY_VMSTATE);
    int code = 0;

    for (size_t i = 0; i < args->n_hits && code == 0; i++) {
        const struct cli_hit *hit = &args->hits[i];
        if (hit->key == 'c')
            code = vma_source_config(&c->source, hit->arg);
        else if (hit->key == 'd')
            code = vma_source_disk(&c->source, args, hit->arg);
    }
    if (code == 0 && state)
        code = vma_source_vmstate(&c->source, state, cli_value(args, KEY_VMSTATE_SIZE));
    return code;
}

/* The archive goes to standard output: whatever else is printed must not. */
static int take_stdout(struct create *c)
{
    if (vma_take_stdout(c->cli, &c->fd) != 0)
        return 1;
    c->path = "standard output";
    c->o.use_fd = true;
    c->o.fd = c->fd;
    return 0;
}

static int get_options(struct create *c, const struct cli_args *args)
{
    c->o.reproducible = cli_has(args, KEY_REPRODUCIBLE);
    c->o.no_sums = cli_has(args, KEY_NO_SUMS);
    c->o.sums = cli_value(args, KEY_SUMS);
    c->o.no_sync = cli_has(args, KEY_NO_SYNC);
    c->o.checksum = cli_has(args, KEY_CHECKSUM);
    c->o.replace = cli_has(args, KEY_FORCE);
    if (c->o.no_sums && c->o.sums)
        return cli_usage(c->cli, "--sums and --no-sums exclude each other");
    int code = vma_get_compression(c->cli, args, c->path, &c->o);
    if (code == 0)
        code = get_identity(c, args);
    if (code == 0 && vma_is_stdout(c->path))
        code = take_stdout(c);
    if (code == 0)
        code = get_sources(c, args);
    c->o.disks = c->source.disks;
    c->o.n_disks = c->source.n_disks;
    c->o.configs = c->source.configs;
    c->o.n_configs = c->source.n_configs;
    return code;
}

/* ------------------------------------------------------------------ results */

static void print_as_json(const struct create *c, const struct dr_vma_create_result *result)
{
    json_t *disks = json_array();

    for (size_t i = 0; i < c->o.n_disks; i++) {
        const char *digest = result->disks[i].digest;
        json_array_append_new(disks, json_pack("{s:o, s:I, s:I, s:s*}", "name",
                                               vma_json_name(c->o.disks[i].name), "size",
                                               (json_int_t)result->disks[i].size, "zero-bytes",
                                               (json_int_t)result->disks[i].zero_bytes, "digest",
                                               *digest ? digest : NULL));
    }
    CLEANUP_JSON json_t *all = json_pack("{s:o, s:I, s:o}", "filename", vma_json_name(c->path),
                                         "archive-bytes", (json_int_t)result->archive_bytes,
                                         "disks", disks);
    vma_print_json(all);
}

static void print_for_people(const struct create *c, const struct dr_vma_create_result *result)
{
    char size[CLI_SIZE_TEXT], zeros[CLI_SIZE_TEXT];

    for (size_t i = 0; i < c->o.n_disks; i++) {
        cli_put(c->o.disks[i].name);
        printf(": %s, zeros in it %s\n", cli_human_size(result->disks[i].size, size),
               cli_human_size(result->disks[i].zero_bytes, zeros));
    }
    cli_put(c->path);
    printf(": %s\n", cli_human_size(result->archive_bytes, size));
}

/* As `drover checksum` prints them. */
static void print_checksums(const struct create *c, const struct dr_vma_create_result *result)
{
    for (size_t i = 0; i < c->o.n_disks; i++) {
        const char *digest = result->disks[i].digest;
        if (!*digest)
            continue;
        const char *name = dr_image_path(c->o.disks[i].disk, 0);
        printf("%s  ", digest);
        cli_put(name);
        printf("\n");
    }
}

/* Devices and pipes have taken what came until then. */
static bool is_replaced(const char *path)
{
    struct stat st;

    return stat(path, &st) < 0 || S_ISREG(st.st_mode);
}

static int create(struct create *c, const struct cli_args *args)
{
    CLEANUP_FREE struct dr_vma_create_result *result = calloc(1, sizeof(*result));
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;
    char state[4300];

    if (!result)
        return 1;
    int code = vma_job_begin(c->cli, args, &job);
    if (code != 0)
        return code;
    int r = dr_vma_create(c->path, &c->o, job.job, result, &err);
    cli_job_end(&job);
    if (r < 0) {
        snprintf(state, sizeof(state),
                 c->o.use_fd || !is_replaced(c->path) ? "what went to %s is no whole archive"
                                                      : "'%s' is as it was before",
                 c->path);
        return cli_job_failed(&job, r, &err, 1, state);
    }
    if (vma_wants_json(args))
        print_as_json(c, result);
    else if (!job.quiet && !c->o.use_fd && !c->o.checksum)
        print_for_people(c, result);
    if (c->o.checksum && !vma_wants_json(args))
        print_checksums(c, result);
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(create_free))) struct create c = {
        .cli = cli, .source = {.cli = cli}, .fd = -1};

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting the name of one archive (disks are given with -d)");
    c.path = args->operands[0];
    int code = get_options(&c, args);
    return code ? code : create(&c, args);
}

static const struct cli_option *const sets[] = {options,           cli_opts_share,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command vma_cmd_create = {
    .name = "vma create",
    .operands = "ARCHIVE",
    .brief = "Put disks and configuration files into a new archive",
    .about =
        "ARCHIVE appears under its name when it is complete; - is standard output. Proxmox VE\n"
        "wants a configuration file qemu-server.conf with a line for each disk.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
