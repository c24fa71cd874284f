/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/vma/vma.h"

static const struct cli_option options[] = {
    {'d', "disk", "NAME", "only this disk (repeatable), and no configuration files", false},
    {KEY_OUTPUT, "output", "FILE", "one disk into FILE, which may be a block device", false},
    {KEY_TO, "to", "FORMAT", "format of the new images (raw)", false},
    {'o', "options", "NAME=VALUE,...", "settings of the format; -o help lists them", false},
    {'n', "no-create", NULL, "with --output: FILE exists, write over what it holds", false},
    {KEY_TARGET_IS_ZERO, "target-is-zero", NULL, "FILE exists and reads as zeros", false},
    {KEY_FORCE, "force", NULL, "replace existing files that nobody uses", false},
    {KEY_ID_NAMES, "id-names", NULL, "names that cannot be names of files become disk-ID", false},
    {KEY_SALVAGE, "salvage", NULL, "take what a damaged archive still holds", false},
    {KEY_RESUME, "resume", NULL, "keep what is there when interrupted, and go on from it", false},
    {KEY_NO_SYNC, "no-sync", NULL, "do not wait until all is durable", false},
    {KEY_SUMS, "sums", "FILE", "the checksums (ARCHIVE.sums, if it is there)", false},
    {KEY_NO_SUMS, "no-sums", NULL, "use no checksums", false},
    {KEY_JSON, "json", NULL, "print JSON", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'m', "jobs", "N", "how many workers, 1 to 16", false},
    {0, NULL, NULL, NULL, false},
};

enum { EXIT_MISSING = 3 };

/* A failure that was told already; no errno. */
enum { TOLD = -1000 };

struct item {
    const struct dr_vma_disk *disk;
    char *file; /* its name in the directory */
};

struct extract {
    const struct cli *cli;
    const struct cli_args *args;
    const char *archive;
    const char *output; /* one disk goes into this file; NULL = all into a directory */
    bool in_place;      /* it is there already, and is written over */
    const char *format;
    unsigned flags; /* enum dr_open_flag of the new images */
    struct cli_pairs pairs;
    struct dr_vma *vma;
    const struct dr_vma_header *header;
    struct item items[256];
    size_t n;
    struct vma_targets targets; /* in place */
    struct vma_damage damage;
    struct dr_vma_extract_options read;
    struct dr_vma_files_result result;
};

static void extract_free(struct extract *x)
{
    vma_targets_cleanup(&x->targets);
    for (size_t i = 0; i < x->n; i++)
        free(x->items[i].file);
    cli_pairs_free(&x->pairs);
    vma_damage_free(&x->damage);
    dr_vma_close(x->vma);
}

/* ------------------------------------------------------------------ which disks */

static void add_item(struct extract *x, const struct dr_vma_disk *d)
{
    for (size_t i = 0; i < x->n; i++) {
        if (x->items[i].disk == d)
            return;
    }
    x->items[x->n++] = (struct item){.disk = d};
}

static int choose(struct extract *x)
{
    const char *name;

    for (size_t i = 0; (name = cli_nth_value(x->args, 'd', i)); i++) {
        const struct dr_vma_disk *d = vma_find_disk(x->cli, x->archive, x->header, name);
        if (!d)
            return -1;
        add_item(x, d);
    }
    for (size_t i = 0; !cli_has(x->args, 'd') && i < x->header->n_disks; i++)
        add_item(x, &x->header->disks[i]);
    if (x->output && x->n != 1) {
        cli_error(x->cli, "--output is for one disk, and %s has %zu: choose one with --disk",
                  x->archive, x->n);
        return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ what files are called */

static bool is_unique(const struct extract *x, const struct dr_vma_disk *d)
{
    for (size_t i = 0; i < x->header->n_disks; i++) {
        const struct dr_vma_disk *other = &x->header->disks[i];
        if (other != d && strcmp(other->name, d->name) == 0)
            return false;
    }
    return true;
}

/* The directory may be somebody's home: no hidden file is made there, which might act without being
 * seen. The library keeps some of those names for itself, too. */
static bool can_be_file(const char *name)
{
    return vma_is_file_name(name) && name[0] != '.';
}

static int refuse_name(const struct extract *x, const char *name, bool safe)
{
    CLEANUP_FREE char *escaped = vma_escape(name);

    cli_error(x->cli, "%s: '%s' %s; --id-names numbers such files", x->archive,
              escaped ? escaped : "?",
              safe ? "is the name of more than one disk" : "cannot be the name of a file");
    return -1;
}

/* The state of a machine is a stream, and no disk of any format, unless that is asked for. */
static bool is_stream(const struct extract *x, const struct dr_vma_disk *d)
{
    return d->vmstate && !x->output;
}

static const char *item_format(const struct extract *x, const struct dr_vma_disk *d)
{
    return is_stream(x, d) ? "raw" : x->format;
}

static int name_item(const struct extract *x, struct item *item)
{
    const struct dr_vma_disk *d = item->disk;
    bool fits = strlen(d->name) + 1 + strlen(x->format) <= NAME_MAX;
    bool safe = fits && can_be_file(d->name), fine = safe && is_unique(x, d);
    int n;

    if (x->output) {
        const char *slash = strrchr(x->output, '/');
        n = asprintf(&item->file, "%s", slash ? slash + 1 : x->output);
    } else if (!fine && !cli_has(x->args, KEY_ID_NAMES)) {
        return refuse_name(x, d->name, safe);
    } else if (fine && d->vmstate) {
        n = asprintf(&item->file, "vmstate.bin");
    } else if (fine) {
        n = asprintf(&item->file, "%s.%s", d->name, x->format);
    } else {
        n = asprintf(&item->file, "disk-%u.%s", d->id, item_format(x, d));
    }
    return n < 0 ? -1 : 0;
}

static int name_items(struct extract *x)
{
    for (size_t i = 0; i < x->n; i++) {
        if (name_item(x, &x->items[i]) < 0)
            return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ configuration files */

/* *config stays without a name if another one of the same name comes later. */
static int name_config(const struct extract *x, size_t i, char number[32],
                       struct dr_vma_new_config *config)
{
    const struct dr_vma_config *c = &x->header->configs[i];
    bool safe = can_be_file(c->name), numbered = cli_has(x->args, KEY_ID_NAMES);
    bool again = vma_config_comes_again(x->header, i);

    *config = (struct dr_vma_new_config){.index = i};
    if (!safe && !numbered)
        return refuse_name(x, c->name, false);
    if (!numbered && again) {
        cli_error(x->cli, "warning: %s: holds '%s' more than once, the last one counts", x->archive,
                  c->name);
        return 0;
    }
    snprintf(number, 32, "config-%zu", i);
    config->file = safe && !again ? c->name : number;
    return 0;
}

/* ------------------------------------------------------------------ into new files */

static void on_message(void *user, const char *text)
{
    const struct extract *x = user;

    cli_error(x->cli, "%s", text);
}

static int extract_files(struct extract *x, struct cli_job *job, struct dr_error *err)
{
    struct dr_vma_new_disk disks[256];
    struct dr_vma_new_config configs[256];
    char numbers[256][32];
    struct dr_vma_files_options o = {
        .dir = x->output ? NULL : x->args->operands[1],
        .path = x->output,
        .disks = disks,
        .n_disks = x->n,
        .configs = configs,
        .read = x->read,
        .replace = cli_has(x->args, KEY_FORCE),
        .resume = cli_has(x->args, KEY_RESUME),
        .no_sync = cli_has(x->args, KEY_NO_SYNC),
        .flags = x->flags & DR_OPEN_NO_LOCK,
    };

    for (size_t i = 0; i < x->n; i++) {
        bool stream = is_stream(x, x->items[i].disk);
        disks[i] = (struct dr_vma_new_disk){.id = x->items[i].disk->id,
                                            .file = x->items[i].file,
                                            .format = item_format(x, x->items[i].disk),
                                            .pairs = stream ? NULL : x->pairs.pairs,
                                            .n_pairs = stream ? 0 : x->pairs.n};
    }
    bool wanted = !x->output && !cli_has(x->args, 'd');
    for (size_t i = 0; wanted && i < x->header->n_configs; i++) {
        if (name_config(x, i, numbers[i], &configs[o.n_configs]) < 0)
            return TOLD;
        o.n_configs += configs[o.n_configs].file != NULL;
    }
    job->message = on_message;
    job->user = x;
    return dr_vma_extract_files(x->vma, &o, job->job, &x->result, err);
}

/* ------------------------------------------------------------------ over what is there */

static int open_in_place(struct extract *x)
{
    const struct dr_vma_disk *d = x->items[0].disk;
    CLEANUP_IMAGE struct cli_image image = {0};
    const struct cli_image_spec spec = {.name = x->output,
                                        .flags = DR_OPEN_RDWR | (x->flags & DR_OPEN_NO_FLUSH)};
    struct dr_disk *disk;

    if (cli_image_get(x->cli, x->args, &spec, &image) != 0)
        return -1;
    image.open.format = x->format;
    if (cli_image_open(x->cli, &image, &disk) < 0)
        return -1;
    vma_targets_add(&x->targets, d->id, disk, cli_has(x->args, KEY_TARGET_IS_ZERO));
    if (dr_size(disk) >= d->size)
        return 0;
    cli_error(x->cli, "%s: has %" PRIu64 " bytes, the disk in the archive has %" PRIu64, x->output,
              dr_size(disk), d->size);
    return -1;
}

/* ------------------------------------------------------------------ results */

static json_t *files_json(const struct extract *x)
{
    json_t *files = json_array();

    for (size_t i = 0; i < x->n; i++) {
        const struct item *item = &x->items[i];
        json_array_append_new(
            files, json_pack("{s:o, s:i, s:I, s:o, s:s}", "name", vma_json_name(item->disk->name),
                             "id", (int)item->disk->id, "size", (json_int_t)item->disk->size,
                             "file", vma_json_name(x->in_place ? x->output : item->file), "format",
                             item_format(x, item->disk)));
    }
    return files;
}

static void tell(const struct extract *x, const struct cli_job *job)
{
    if (vma_wants_json(x->args)) {
        CLEANUP_JSON json_t *all =
            json_pack("{s:o, s:o}", "filename", vma_json_name(x->archive), "disks", files_json(x));
        vma_damage_json(all, &x->damage, &x->result.read);
        vma_print_json(all);
    } else if (!job->quiet && x->result.read.missing_bytes > 0) {
        printf("%" PRIu64 " bytes of disks are missing and read as zeros\n",
               x->result.read.missing_bytes);
    }
}

static int failed(const struct extract *x, const struct cli_job *job, int r,
                  const struct dr_error *err)
{
    char state[4300];
    bool kept = x->result.kept[0] && r != -ESTALE;

    if (r == TOLD)
        return 1;
    if (x->in_place)
        snprintf(state, sizeof(state), "'%s' holds a part of the disk", x->output);
    else if (kept)
        snprintf(state, sizeof(state), "the same command goes on from what is in '%s'",
                 x->result.kept);
    else
        snprintf(state, sizeof(state), "what was extracted is removed");
    if (cli_signalled() && r == -ECANCELED)
        return cli_job_failed(job, r, err, 1, state);
    cli_fail(x->cli, err);
    if (x->in_place || kept)
        cli_error(x->cli, "%s", state);
    if (r == -EEXIST && !cli_has(x->args, KEY_FORCE))
        cli_error(x->cli, "--force replaces files that nobody uses");
    if (r == -EBADMSG)
        cli_error(x->cli, "--salvage takes what the archive still holds");
    return 1;
}

static int extract_in_place(struct extract *x, struct cli_job *job, struct dr_error *err)
{
    x->read.targets = x->targets.list;
    x->read.n_targets = x->targets.n;
    int r = dr_vma_extract(x->vma, &x->read, job->job, &x->result.read, err);
    return r == 0 ? dr_close(DR_STEAL(x->targets.list[0].disk), err) : r;
}

static int extract(struct extract *x, struct cli_job *job)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = x->in_place ? extract_in_place(x, job, &err) : extract_files(x, job, &err);

    cli_job_end(job);
    if (r < 0)
        return failed(x, job, r, &err);
    tell(x, job);
    return x->damage.n > 0 ? EXIT_MISSING : 0;
}

/* ------------------------------------------------------------------ options */

static bool is_device(const char *path)
{
    struct stat st;

    return path && stat(path, &st) == 0 && S_ISBLK(st.st_mode);
}

static int check_output(const struct extract *x)
{
    size_t n = strlen(x->output);
    struct stat st;

    if (strcmp(x->output, "-") == 0)
        return cli_usage(x->cli,
                         "--output: a disk does not go to standard output: archives hold it "
                         "in any order (./- is a file)");
    if (n == 0 || x->output[n - 1] == '/' || (stat(x->output, &st) == 0 && S_ISDIR(st.st_mode)))
        return cli_usage(x->cli, "--output: '%s' is no name for a file", x->output);
    struct stat archive;
    if (stat(x->output, &st) == 0 && stat(x->args->operands[0], &archive) == 0 &&
        st.st_dev == archive.st_dev && st.st_ino == archive.st_ino) {
        cli_error(x->cli, "%s: is the archive: the disk must go to another file", x->output);
        return 1;
    }
    return 0;
}

static int get_form(struct extract *x)
{
    x->format = cli_has(x->args, KEY_TO) ? cli_value(x->args, KEY_TO) : "raw";
    if (!cli_format_exists(x->format)) {
        cli_error(x->cli, "Unknown file format '%s'", x->format);
        return 1;
    }
    if (cli_pairs_from_args(x->cli, x->args, &x->pairs) < 0)
        return 1;
    for (size_t i = 0; i < x->pairs.n; i++) {
        if (!cli_option_exists(x->format, x->pairs.pairs[i].name)) {
            cli_error(x->cli, "Invalid parameter '%s'", x->pairs.pairs[i].name);
            return 1;
        }
    }
    return cli_shared_flags(x->cli, x->args, &x->flags);
}

static int check_options(const struct extract *x)
{
    const struct cli_args *a = x->args;

    if (!x->output && (cli_has(a, 'n') || cli_has(a, KEY_TARGET_IS_ZERO)))
        return cli_usage(x->cli, "-n and --target-is-zero need --output");
    if (!x->in_place && cli_has(a, KEY_TARGET_IS_ZERO))
        return cli_usage(x->cli, "--target-is-zero requires use of -n flag");
    if (x->in_place && cli_has(a, KEY_RESUME))
        return cli_usage(x->cli, "--resume is for new files");
    if (cli_has(a, KEY_NO_SYNC) && cli_has(a, KEY_RESUME))
        return cli_usage(x->cli, "--no-sync and --resume exclude each other");
    if (cli_has(a, KEY_SALVAGE) && cli_has(a, KEY_RESUME))
        return cli_usage(x->cli, "--salvage and --resume exclude each other");
    if (cli_has(a, KEY_SUMS) && cli_has(a, KEY_NO_SUMS))
        return cli_usage(x->cli, "--sums and --no-sums exclude each other");
    if (a->n_operands != (x->output ? 1 : 2))
        return cli_usage(x->cli, "Expecting an archive and either a directory or --output");
    return x->output ? check_output(x) : 0;
}

static int get_options(struct extract *x)
{
    const struct cli_args *a = x->args;

    x->output = cli_value(a, KEY_OUTPUT);
    x->in_place = x->output && (cli_has(a, 'n') || is_device(x->output));
    x->flags = cli_has(a, KEY_NO_SYNC) ? DR_OPEN_NO_FLUSH : 0;
    x->read = (struct dr_vma_extract_options){
        .sums = cli_value(a, KEY_SUMS),
        .no_sums = cli_has(a, KEY_NO_SUMS),
        .salvage = cli_has(a, KEY_SALVAGE),
        .damage = vma_damage_add,
        .user = &x->damage,
    };
    int code = check_options(x);
    return code ? code : get_form(x);
}

static int prepare(struct extract *x)
{
    bool json = vma_wants_json(x->args);

    x->archive = vma_shown(x->args->operands[0]);
    if (vma_open_as(x->cli, x->args->operands[0], cli_has(x->args, 'q'), x->read.salvage, &x->vma) <
        0)
        return -1;
    cli_catch_signals(); /* from here on there is something to remove */
    x->header = dr_vma_header(x->vma);
    x->damage.header = x->header;
    x->damage.lines = json || !x->read.salvage ? NULL : stdout;
    x->damage.array = json ? json_array() : NULL;
    if (choose(x) < 0)
        return -1;
    return x->in_place ? open_in_place(x) : name_items(x);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(extract_free))) struct extract x = {
        .cli = cli,
        .args = args,
        .targets = {.cli = cli},
        .damage = {.cli = cli},
    };

    if (cli_wants_option_list(args))
        return cli_print_option_list(cli, cli_has(args, KEY_TO) ? cli_value(args, KEY_TO) : "raw",
                                     args->n_operands > 0, false);
    int code = get_options(&x);
    if (code != 0)
        return code;
    struct cli_job job;
    code = prepare(&x) < 0 ? 1 : vma_job_begin(cli, args, &job);
    return code == 0 ? extract(&x, &job) : code;
}

static const struct cli_option *const sets[] = {options, cli_opts_quiet, cli_opts_progress,
                                                cli_opts_common, NULL};

const struct cli_command vma_cmd_extract = {
    .name = "vma extract",
    .operands = "ARCHIVE DIRECTORY | ARCHIVE --output FILE",
    .brief = "Take disks and configuration files out of an archive",
    .about = "Files appear when all of them are complete. Ends with 3 if something is missing\n"
             "(--salvage). - is standard input.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
