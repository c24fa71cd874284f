/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup: make one, verify those of a set. list and prune are in files of their own. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "cli/commands/backup.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/pipes.h"
#include "cli/common/progress.h"
#include "drover/backup.h"

static const struct cli_option options[] = {
    {KEY_FULL, "full", NULL, "TARGET holds all of DISK, whatever a bitmap says", false},
    {KEY_BITMAP, "bitmap", "NAME", "a bitmap of DISK notes what changes between backups", false},
    {KEY_SINCE, "since", "BACKUP", "with the bitmap of this backup of the set", false},
    {KEY_CONSISTENT, "consistent", NULL, "of several DISKs, together, into the directory TARGET",
     false},
    {KEY_STATE, "state", "SET", "the file that lists the backups (backups.json beside TARGET)",
     false},
    {KEY_PRUNE, "prune", "KEEP", "afterwards keep only so many of this disk's with this bitmap",
     false},
    {'O', "target-format", "FMT", "format of TARGET (qcow2); vma: an archive, as by its name",
     false},
    {'o', "options", "NAME=VALUE,...", "settings of TARGET's format; -o help lists them", false},
    {'c', "config", "FILE", "archive: put this configuration file in (repeatable)", false},
    {'d', "disk", "[format=FMT:]NAME=FILE", "archive: put this disk in, as NAME (repeatable)",
     false},
    {KEY_COMPRESS, "compress", "zstd[:LEVEL]|none", "archive: zstd if TARGET ends in .zst", false},
    {KEY_NO_SUMS, "no-sums", NULL, "archive: write no checksums beside it", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option verify_options[] = {
    {KEY_AGAINST, "against", "DISK", "read DISK instead, and compare that with the backup", false},
    {'f', "format", "FMT", "format of DISK", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option restore_options[] = {
    {KEY_SHRINK, "shrink", NULL, "DISK may become smaller: what is behind the end is lost", false},
    {'F', "source-format", "FMT", "format of BACKUP", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {0, NULL, NULL, NULL, false},
};

/* ------------------------------------------------------------------ make one */

struct backup {
    struct cli_image disk;
    struct cli_pairs pairs;
    char *target, *set;
    struct dr_backup_options o;
    struct dr_backup_result result;
    unsigned keep; /* 0 = all */
};

static void backup_free(struct backup *b)
{
    cli_image_free(&b->disk);
    cli_pairs_free(&b->pairs);
    free(b->target);
    free(b->set);
}

static int make(void *user, struct dr_job *job, struct dr_error *err)
{
    struct backup *b = user;
    return dr_backup(b->disk.path, &b->disk.open, b->target, &b->o, job, &b->result, err);
}

static int get_settings(const struct cli *cli, const struct cli_args *args, struct backup *b)
{
    const char *format = cli_has(args, 'O') ? cli_value(args, 'O') : "qcow2";
    if (!cli_format_exists(format)) {
        cli_error(cli, "Unknown file format '%s'", format);
        return 1;
    }
    if (cli_pairs_from_args(cli, args, &b->pairs) < 0 ||
        cli_shared_flags(cli, args, &b->o.open.flags) != 0)
        return 1;
    b->o.format = format;
    b->o.pairs = b->pairs.pairs;
    b->o.n_pairs = b->pairs.n;
    b->o.set = cli_value(args, KEY_STATE);
    b->o.bitmap = cli_value(args, KEY_BITMAP);
    b->o.since = cli_value(args, KEY_SINCE);
    b->o.full = cli_has(args, KEY_FULL);
    return 0;
}

static int get_target(const struct cli *cli, const struct cli_args *args, struct backup *b)
{
    if (cli_refuse_pipe(cli, args->operands[1]))
        return 1;
    b->target = cli_plain_name(cli, args->operands[1]);
    b->set = b->target ? dr_name_beside(b->target, "backups.json") : NULL;
    if (!b->set) {
        cli_error(cli, "out of memory");
        return 1;
    }
    b->o.set = b->o.set ? b->o.set : b->set;
    return cli_has(args, KEY_PRUNE) ? cli_get_kept(cli, cli_value(args, KEY_PRUNE), &b->keep) : 0;
}

static int run_make(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(backup_free))) struct backup b = {0};
    char size[CLI_SIZE_TEXT], copied[CLI_SIZE_TEXT];

    if (cli_wants_option_list(args))
        return cli_print_option_list(cli, cli_has(args, 'O') ? cli_value(args, 'O') : "qcow2",
                                     false, false);
    if (cli_backup_is_archive(args))
        return cli_backup_archive(cli, args);
    if (get_settings(cli, args, &b) != 0)
        return 1;
    if (cli_has(args, KEY_CONSISTENT))
        return cli_backup_several(cli, args, &b.o);
    if (args->n_operands != 2)
        return cli_usage(cli, "Expecting the disk and the new file for its backup");
    const struct cli_image_spec spec = {.name = args->operands[0], .format_key = 'f'};
    if (cli_image_get(cli, args, &spec, &b.disk) != 0 || cli_image_check(cli, &b.disk) < 0 ||
        get_target(cli, args, &b) != 0)
        return 1;
    b.o.open.allow_paths = b.disk.open.allow_paths;
    cli_export_allowed(args);
    int code = cli_job_run(cli, args, make, &b);
    if (code == 0 && !cli_has(args, 'q'))
        printf("%s backup of %s: %s read, digest %s\n",
               b.result.incremental ? "Incremental" : "Full", cli_human_size(b.result.size, size),
               cli_human_size(b.result.copied, copied), b.result.digest);
    if (code != 0 || b.keep == 0)
        return code;
    const char *name = strrchr(b.target, '/');
    return cli_prune(cli, args, b.o.set,
                     &(struct dr_prune_options){
                         .open = {.flags = b.o.open.flags, .allow_paths = b.o.open.allow_paths},
                         .keep = b.keep,
                         .like = name ? name + 1 : b.target});
}

/* ------------------------------------------------------------------ verify */

struct verify {
    const char *set, *name;
    const char *archive; /* all disks of this one; NULL = of all */
    struct dr_open_options open;
    struct dr_disk *against;
};

static int verify(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct verify *v = user;
    return dr_backup_verify(v->set, v->name, &v->open, v->against, job, err);
}

/* The backup itself, or a disk of this archive. */
static bool is_of(const char *name, const char *archive)
{
    size_t len = strlen(archive);
    return strncmp(name, archive, len) == 0 && (name[len] == 0 || name[len] == '#');
}

/* Is it no backup, but an archive with some? */
static bool names_archive(const char *set, const char *name)
{
    struct dr_backup_entry *list;
    bool any = false, itself = false;
    size_t n;
    if (dr_backup_list(set, &list, &n, NULL) < 0)
        return false;
    for (size_t i = 0; i < n; i++) {
        any |= is_of(list[i].name, name);
        itself |= strcmp(list[i].name, name) == 0;
    }
    dr_backup_list_free(list, n);
    return any && !itself;
}

/* All are looked at, also behind one that is damaged. */
static int verify_all(const struct cli *cli, const struct cli_args *args, struct verify *v)
{
    struct dr_backup_entry *list;
    struct dr_error err = DR_ERROR_INIT;
    size_t n;
    int code = 0;

    if (dr_backup_list(v->set, &list, &n, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    for (size_t i = 0; i < n && code < 128; i++) {
        v->name = list[i].name;
        if (list[i].leaving || list[i].naming || (v->archive && !is_of(list[i].name, v->archive)))
            continue;
        int r = cli_job_run(cli, args, verify, v);
        if (r == 0 && !cli_has(args, 'q')) {
            cli_put(list[i].name);
            printf(": %s\n", list[i].digest);
        }
        code = r ? r : code;
    }
    dr_backup_list_free(list, n);
    return code;
}

static int run_verify(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct verify v = {0};

    if (args->n_operands < 1 || args->n_operands > 2 ||
        (cli_has(args, KEY_AGAINST) && args->n_operands != 2))
        return cli_usage(cli, "Expecting the file that lists the backups, and one of these");
    v.set = args->operands[0];
    v.name = args->n_operands > 1 ? args->operands[1] : NULL;
    if (cli_shared_flags(cli, args, &v.open.flags) != 0)
        return 1;
    cli_export_allowed(args);
    if (v.name && !cli_has(args, KEY_AGAINST) && names_archive(v.set, v.name))
        v.archive = v.name;
    if (!v.name || v.archive)
        return verify_all(cli, args, &v);
    if (cli_has(args, KEY_AGAINST)) {
        const struct cli_image_spec spec = {.name = cli_value(args, KEY_AGAINST),
                                            .format_key = 'f'};
        if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, &disk) < 0)
            return 1;
        v.against = disk;
    }
    int code = cli_job_run(cli, args, verify, &v);
    if (code == 0 && !cli_has(args, 'q'))
        printf("The %s holds what was backed up.\n", v.against ? "disk" : "backup");
    return code;
}

/* ------------------------------------------------------------------ restore */

struct restore {
    const char *source, *disk;
    struct dr_restore_options o;
    uint64_t written;
};

static int restore(void *user, struct dr_job *job, struct dr_error *err)
{
    struct restore *s = user;
    return dr_restore(s->source, s->disk, &s->o, job, &s->written, err);
}

/* A disk of an archive may be given as its set lists it, ARCHIVE#DISK: the image's name, malloc'ed.
 * NULL: it is not given like that. */
static char *listed_in_archive(const char *name)
{
    const char *hash = strrchr(name, '#');
    CLEANUP_FREE char *archive = hash ? strndup(name, (size_t)(hash - name)) : NULL;
    char *image = NULL;
    if (!archive || access(name, F_OK) == 0 || access(archive, F_OK) != 0 ||
        asprintf(&image, "vma:%s", name) < 0)
        return NULL;
    return image;
}

static int run_restore(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image source = {0}, disk = {0};
    struct restore s = {0};
    char written[CLI_SIZE_TEXT];

    if (args->n_operands != 2)
        return cli_usage(cli, "Expecting a backup and the disk that is to hold it");
    CLEANUP_FREE char *listed = listed_in_archive(args->operands[0]);
    const struct cli_image_spec from = {
        .name = listed ? listed : args->operands[0], .format_key = 'F', .no_image_opts = true};
    const struct cli_image_spec to = {
        .name = args->operands[1], .format_key = 'f', .flags = DR_OPEN_RDWR};
    if (cli_image_get(cli, args, &from, &source) != 0 || cli_image_check(cli, &source) < 0 ||
        cli_image_get(cli, args, &to, &disk) != 0 || cli_image_check(cli, &disk) < 0)
        return 1;
    s.source = source.path;
    s.disk = disk.path;
    s.o = (struct dr_restore_options){
        .source = source.open, .open = disk.open, .shrink = cli_has(args, KEY_SHRINK)};
    cli_export_allowed(args);
    int code = cli_job_run(cli, args, restore, &s);
    if (code == 0 && !cli_has(args, 'q'))
        printf("%s differed, and were written.\n", cli_human_size(s.written, written));
    return code;
}

/* ------------------------------------------------------------------ the tables */

static const struct cli_option *const sets[] = {options,           cli_opts_image,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};
static const struct cli_option *const verify_sets[] = {verify_options, cli_opts_quiet,
                                                       cli_opts_progress, cli_opts_common, NULL};
static const struct cli_option *const restore_sets[] = {
    restore_options, cli_opts_image, cli_opts_quiet, cli_opts_progress, cli_opts_common, NULL};

static const struct cli_command verify_command = {
    .name = "backup verify",
    .operands = "SET [BACKUP]",
    .brief = "Read a backup, or all of a set, and compare with the digest that was recorded",
    .sets = verify_sets,
    .roles = CLI_DROVER,
    .run = run_verify,
};
static const struct cli_command *const children[] = {&cli_cmd_backup_list, &verify_command,
                                                     &cli_cmd_backup_prune, NULL};

const struct cli_command cli_cmd_backup = {
    .name = "backup",
    .operands = "DISK... TARGET",
    .brief = "Copy disks, or what has changed, into new images or an archive, with digests",
    .about =
        "With --bitmap the next backup with the same bitmap holds only what has changed, on top\n"
        "of the last one. `backup list`, `verify` and `prune` take the file that lists them.\n"
        "Several DISKs go into one archive: TARGET.vma, TARGET.vma.zst, or - for a pipe.",
    .sets = sets,
    .children = children,
    .roles = CLI_DROVER,
    .run = run_make,
};

const struct cli_command cli_cmd_restore = {
    .name = "restore",
    .operands = "BACKUP DISK",
    .brief = "Make a disk hold what a backup shows, writing only what differs",
    .about = "Interrupted, do it again: it goes on where it was. DISK must not be in use.",
    .sets = restore_sets,
    .roles = CLI_DROVER,
    .run = run_restore,
};
