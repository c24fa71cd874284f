/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup of disks into one VMA archive: `vma create` of disks as they are at one instant, with a
 * digest of each. */
#include <string.h>
#include <sys/stat.h>

#include "cli/commands/backup.h"
#include "cli/common/paths.h"
#include "cli/vma/vma.h"

struct archive {
    const struct cli *cli;
    const char *path;
    struct vma_source source;
    struct dr_vma_create_options o;
    struct dr_vma_create_result *result;
    unsigned keep; /* archives of each disk; 0 = all */
    int fd;        /* standard output, as it was; -1 = an archive with a name */
};

static void archive_free(struct archive *a)
{
    vma_source_free(&a->source);
    free(a->result);
    if (a->fd >= 0)
        close(a->fd);
}

/* ------------------------------------------------------------------ is it one? */

bool cli_backup_is_archive(const struct cli_args *args)
{
    const char *format = cli_value(args, 'O');
    if (format || args->n_operands == 0)
        return format && strcmp(format, "vma") == 0;
    const char *target = args->operands[args->n_operands - 1];
    return vma_is_archive_name(target) || vma_is_stdout(target);
}

/* ------------------------------------------------------------------ options */

/* Options for images would be ignored. */
static int refuse_others(const struct cli *cli, const struct cli_args *args)
{
    static const struct {
        int key;
        const char *name;
    } others[] = {{KEY_BITMAP, "--bitmap"}, {KEY_SINCE, "--since"}, {'o', "-o"}};
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (cli_has(args, others[i].key))
            return cli_usage(cli,
                             "%s is for backups into images: an archive holds all of its disks",
                             others[i].name);
    if (cli_has(args, KEY_PRUNE) && !cli_has(args, KEY_STATE))
        return cli_usage(cli, "--prune goes with --state: an archive is in no other set");
    return 0;
}

/* A disk is called in the archive as its file is, without what stands behind the last dot. */
static int add_operand(struct archive *a, const struct cli_args *args, const char *path)
{
    CLEANUP_FREE char *name = cli_stem(path);
    if (!name) {
        cli_error(a->cli, "out of memory");
        return 1;
    }
    return vma_source_image(&a->source, args, cli_value(args, 'f'), name, path);
}

static int get_sources(struct archive *a, const struct cli_args *args)
{
    int code = 0;
    for (int i = 0; i + 1 < args->n_operands && code == 0; i++)
        code = add_operand(a, args, args->operands[i]);
    for (size_t i = 0; i < args->n_hits && code == 0; i++) {
        if (args->hits[i].key == 'c')
            code = vma_source_config(&a->source, args->hits[i].arg);
        else if (args->hits[i].key == 'd')
            code = vma_source_disk(&a->source, args, args->hits[i].arg);
    }
    if (code == 0 && a->source.n_disks == 0)
        code = cli_usage(a->cli, "Expecting disks and the archive that they go into");
    return code;
}

static int get_options(struct archive *a, const struct cli_args *args)
{
    a->o.at_instant = true;
    a->o.no_sums = cli_has(args, KEY_NO_SUMS);
    a->o.set = cli_value(args, KEY_STATE);
    int code = refuse_others(a->cli, args);
    if (code == 0 && cli_has(args, KEY_PRUNE))
        code = cli_get_kept(a->cli, cli_value(args, KEY_PRUNE), &a->keep);
    if (code == 0 && a->o.set && vma_is_stdout(a->path))
        code = cli_usage(a->cli, "--state is for archives with a name");
    if (code == 0)
        code = vma_get_compression(a->cli, args, a->path, &a->o);
    if (code == 0 && vma_is_stdout(a->path)) {
        code = vma_take_stdout(a->cli, &a->fd);
        a->path = "standard output";
        a->o.use_fd = true;
        a->o.fd = a->fd;
    }
    if (code == 0)
        code = get_sources(a, args);
    a->o.disks = a->source.disks;
    a->o.n_disks = a->source.n_disks;
    a->o.configs = a->source.configs;
    a->o.n_configs = a->source.n_configs;
    return code;
}

/* ------------------------------------------------------------------ the command */

static void print_result(const struct archive *a)
{
    char size[CLI_SIZE_TEXT], copied[CLI_SIZE_TEXT];
    for (size_t i = 0; i < a->o.n_disks; i++) {
        const struct dr_vma_disk_result *d = &a->result->disks[i];
        cli_put(a->o.disks[i].name);
        printf(": %s, %s read, digest %s\n", cli_human_size(d->size, size),
               cli_human_size(d->copied, copied), d->digest);
    }
    cli_put(a->path);
    printf(": %s\n", cli_human_size(a->result->archive_bytes, size));
}

static int make(const struct archive *a, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;
    int code = vma_job_begin(a->cli, args, &job);
    if (code != 0)
        return code;
    int r = dr_vma_create(a->path, &a->o, job.job, a->result, &err);
    cli_job_end(&job);
    if (r < 0)
        code = cli_job_failed(&job, r, &err, 1,
                              a->o.use_fd ? "what went to standard output is no whole archive"
                                          : "there is no archive");
    return code;
}

/* Of the disks that are in it. */
static int prune(const struct archive *a, const struct cli_args *args)
{
    const char *slash = strrchr(a->path, '/');
    CLEANUP_FREE char *like = NULL;
    if (asprintf(&like, "%s#%s", slash ? slash + 1 : a->path, a->o.disks[0].name) < 0) {
        like = NULL;
        cli_error(a->cli, "out of memory");
        return 1;
    }
    return cli_prune(a->cli, args, a->o.set,
                     &(struct dr_prune_options){.keep = a->keep, .like = like});
}

int cli_backup_archive(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(archive_free))) struct archive a = {
        .cli = cli, .source = {.cli = cli}, .fd = -1};

    if (args->n_operands < 1)
        return cli_usage(cli, "Expecting disks and the archive that they go into");
    a.path = args->operands[args->n_operands - 1];
    a.result = calloc(1, sizeof(*a.result));
    if (!a.result) {
        cli_error(cli, "out of memory");
        return 1;
    }
    int code = get_options(&a, args);
    if (code != 0)
        return code;
    cli_export_allowed(args);
    code = make(&a, args);
    if (code == 0 && !cli_has(args, 'q'))
        print_result(&a);
    return code == 0 && a.keep > 0 ? prune(&a, args) : code;
}
