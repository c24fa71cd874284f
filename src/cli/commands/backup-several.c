/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup of several disks into new images in one directory: all of them are locked before the first
 * one is read, so that they are backed up as they are together. */
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "cli/commands/backup.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"
#include "drover/backup.h"

struct several {
    const struct cli *cli;
    struct dr_backup_disk *disks;
    size_t n;
    char *set; /* where none is given */
};

/* The first failure to close one, after a backup that is complete, is told. */
static int close_all(struct several *s, int code)
{
    for (size_t i = 0; i < s->n; i++) {
        struct dr_error err = DR_ERROR_INIT;
        if (s->disks[i].disk && dr_close(s->disks[i].disk, &err) < 0 && code == 0) {
            cli_fail(s->cli, &err);
            code = 1;
        }
        free((char *)(uintptr_t)s->disks[i].target);
    }
    free(s->disks);
    free(s->set);
    return code;
}

/* DIR/NAME-20261130T021000Z.FORMAT, NAME as the disk's file is called without what stands behind
 * its last dot. Malloc'ed; NULL = out of memory. */
static char *target_of(const char *dir, const char *path, const char *time, const char *format)
{
    CLEANUP_FREE char *stem = cli_stem(path);
    char *target;
    return !stem || asprintf(&target, "%s/%s-%s.%s", dir, stem, time, format) < 0 ? NULL : target;
}

static int add_disk(struct several *s, const struct cli_args *args, const char *path,
                    const char *time, const struct dr_backup_options *o)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    const struct cli_image_spec spec = {
        .name = path, .format_key = 'f', .flags = o->bitmap ? DR_OPEN_RDWR | DR_OPEN_UNCHANGED : 0};
    struct dr_backup_disk *d = &s->disks[s->n];
    if (cli_image_get(s->cli, args, &spec, &image) != 0 ||
        cli_image_open(s->cli, &image, &d->disk) < 0)
        return 1;
    s->n++;
    d->options = *o;
    d->target = target_of(args->operands[args->n_operands - 1], image.path, time, o->format);
    for (size_t i = 0; d->target && i + 1 < s->n; i++)
        if (strcmp(s->disks[i].target, d->target) == 0) {
            cli_error(s->cli, "two disks are called so that their backups would be %s", d->target);
            return 1;
        }
    if (!d->target)
        cli_error(s->cli, "out of memory");
    return d->target ? 0 : 1;
}

static int check_use(const struct cli *cli, const struct cli_args *args)
{
    struct stat st;
    if (args->n_operands < 2)
        return cli_usage(cli, "Expecting disks and the directory for their backups");
    if (cli_has(args, KEY_SINCE) || cli_has(args, KEY_IMAGE_OPTS) || cli_has(args, KEY_PRUNE))
        return cli_usage(cli, "--consistent takes neither --since nor --image-opts nor --prune");
    if (stat(args->operands[args->n_operands - 1], &st) == 0 && S_ISDIR(st.st_mode))
        return 0;
    cli_error(cli, "%s: is no directory", args->operands[args->n_operands - 1]);
    return 1;
}

static int add_disks(struct several *s, const struct cli_args *args,
                     const struct dr_backup_options *o)
{
    time_t seconds = time(NULL);
    struct tm tm;
    char text[32];
    int code = 0;
    s->disks = calloc((size_t)args->n_operands, sizeof(*s->disks));
    if (!s->disks || !gmtime_r(&seconds, &tm) ||
        strftime(text, sizeof(text), "%Y%m%dT%H%M%SZ", &tm) == 0) {
        cli_error(s->cli, "out of memory");
        return 1;
    }
    for (int i = 0; code == 0 && i + 1 < args->n_operands; i++)
        code = add_disk(s, args, args->operands[i], text, o);
    return code;
}

static int make(void *user, struct dr_job *job, struct dr_error *err)
{
    struct several *s = user;
    return dr_disks_backup(s->disks, s->n, job, err);
}

static void print_results(const struct several *s)
{
    char size[CLI_SIZE_TEXT], copied[CLI_SIZE_TEXT];
    for (size_t i = 0; i < s->n; i++) {
        const struct dr_backup_result *r = &s->disks[i].result;
        cli_put(s->disks[i].target);
        printf(": %s, %s, %s read, digest %s\n", r->incremental ? "incremental" : "full",
               cli_human_size(r->size, size), cli_human_size(r->copied, copied), r->digest);
    }
}

int cli_backup_several(const struct cli *cli, const struct cli_args *args,
                       const struct dr_backup_options *options)
{
    struct several s = {.cli = cli};
    struct dr_backup_options o = *options;
    int code = check_use(cli, args);
    if (code != 0)
        return code;
    if (!o.set && asprintf(&s.set, "%s/backups.json", args->operands[args->n_operands - 1]) < 0)
        return 1;
    o.set = o.set ? o.set : s.set;
    cli_export_allowed(args);
    code = add_disks(&s, args, &o);
    if (code == 0)
        code = cli_job_run(cli, args, make, &s);
    if (code == 0 && !cli_has(args, 'q'))
        print_results(&s);
    return close_all(&s, code);
}
