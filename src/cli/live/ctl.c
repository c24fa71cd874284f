/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* `drover ctl`: the person's way to speak to a server of disks. What begins a job stays to show how
 * far it is; the job is the server's, and goes on when this program ends. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/absolute.h"
#include "cli/commands.h"
#include "cli/common/progress.h"
#include "cli/live/client.h"
#include "cli/live/archive.h"
#include "cli/live/bitmap.h"

static const struct cli_option options[] = {
    {'f', "format", "FMT", "snapshot, mirror, backup: of the new image; rebase: of the parent",
     false},
    {KEY_BASE, "base", "IMAGE", "stream, commit: the image that stays below", false},
    {KEY_TOP, "top", "IMAGE", "commit: the topmost image that goes down", false},
    {KEY_IMAGE, "image", "IMAGE", "stream, rebase: work on this image, not on the active one",
     false},
    {KEY_DOWN, "down", NULL, "delete: into the image's parent, which then reads as the image did",
     false},
    {KEY_REMOVE, "remove", NULL, "delete, commit: remove the files of what leaves the chain",
     false},
    {KEY_RETIRE, "retire", NULL,
     "stream: go on with an add-cow's raw file, and remove the rest of it", false},
    {KEY_TOP_ONLY, "top-only", NULL, "mirror: only what the active image holds", false},
    {KEY_BITMAPS, "bitmaps", NULL, "mirror: the new image gets the bitmaps, too", false},
    {KEY_STATE, "state", "SET", "backup: the file that lists backups", false},
    {KEY_BITMAP, "bitmap", "NAME", "backup: as for `drover backup`; with --state", false},
    {KEY_FULL, "full", NULL, "backup: all of the disk, whatever a bitmap says", false},
    {KEY_ALL, "all", NULL, "backup: all disks of the server, into an archive", false},
    {'c', "config", "FILE", "backup: put this file into the archive (repeatable)", false},
    {KEY_COMPRESS, "compress", "HOW", "backup: zstd[:LEVEL] or none; zstd if it ends in .zst",
     false},
    {KEY_SPILL, "spill", "DIR", "backup: what is overwritten goes there while FILE is slow", false},
    {KEY_SPILL_SIZE, "spill-size", "BYTES", "backup: at most so much of it (1G)", false},
    {KEY_WHEN_FULL, "when-full", "WHAT", "backup: when that is full: guest-waits, backup-fails",
     false},
    {'g', "granularity", "SIZE", "bitmap add: bytes that a bit stands for", false},
    {KEY_TEMPORARY, "temporary", NULL, "bitmap add: it ends with the server", false},
    {KEY_DISABLED, "disabled", NULL, "bitmap add: nothing is noted in it yet", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {KEY_HURRY, "hurry", NULL, "jobs: do not give way to those who use the disk", false},
    {KEY_NO_COMPLETE, "no-complete", NULL,
     "commit, mirror: do not go over to the other image when both are the same", false},
    {KEY_ON_ERROR, "on-error", "WHAT",
     "jobs: report (fail), ignore, stop (pause), enospc (pause if it is full)", false},
    {KEY_DETACH, "detach", NULL, "do not wait for the end of the job", false},
    {KEY_FORCE, "force", NULL,
     "cancel: even if ready; commit, delete: even if others become unusable", false},
    {KEY_JSON, "json", NULL, "print what the server says, a line of JSON each", false},
    {0, NULL, NULL, NULL, false},
};

/* ------------------------------------------------------------------ following a job */

struct follow {
    struct ctl *ctl;
    const struct cli_args *args;
    const char *id;
    struct timespec began;
    uint64_t total; /* bytes of the job, when it was asked last */
    bool ready, bar;
};

static double seconds_since(const struct timespec *then)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - then->tv_sec) + (double)(now.tv_nsec - then->tv_nsec) / 1e9;
}

static void show_bar(struct follow *f, uint64_t done, uint64_t total)
{
    enum { WIDTH = 30 };
    f->total = total;
    double share = total ? (double)done / (double)total : 0, time = seconds_since(&f->began);
    double speed = time > 0 ? (double)done / time : 0;
    int full = (int)(share * WIDTH);
    char text[CLI_SIZE_TEXT], eta[32] = "";
    if (speed > 0 && total > done) {
        unsigned left = (unsigned)((double)(total - done) / speed);
        snprintf(eta, sizeof(eta), ", %u:%02u left", left / 60, left % 60);
    }
    printf("\r[%.*s%*s] %5.1f %%, %s/s%s   ", full, "##############################", WIDTH - full,
           "", share * 100, cli_human_size((uint64_t)speed, text), eta);
    fflush(stdout);
    f->bar = true;
}

static void end_bar(struct follow *f)
{
    if (f->bar)
        printf("\n");
    f->bar = false;
}

/* Ask how far the job is, and show it. */
static int ask_progress(struct follow *f)
{
    CLEANUP_JSON json_t *jobs = NULL;
    json_t *job;
    size_t i;
    int code = ctl_ask(f->ctl, "query-jobs", NULL, &jobs);
    json_array_foreach(jobs, i, job)
    {
        const char *id = json_string_value(json_object_get(job, "id"));
        if (id && strcmp(id, f->id) == 0)
            show_bar(f, cli_json_number(job, "current-progress"),
                     cli_json_number(job, "total-progress"));
    }
    return code;
}

static int on_ready(struct follow *f)
{
    if (cli_has(f->args, KEY_NO_COMPLETE)) {
        end_bar(f);
        if (!f->ctl->show)
            printf("%s is ready: both images are the same. `drover ctl %s complete %s` goes over, "
                   "`cancel` leaves a copy.\n",
                   f->id, f->ctl->path, f->id);
        f->ready = true;
        return 0;
    }
    return ctl_ask(f->ctl, "job-complete", json_pack("{s:s}", "id", f->id), NULL);
}

static void on_error(struct follow *f, const json_t *data)
{
    const char *operation = json_string_value(json_object_get(data, "operation"));
    const char *action = json_string_value(json_object_get(data, "action"));
    if (!operation || !action || strcmp(action, "report") == 0)
        return; /* the job's end tells why */
    end_bar(f);
    if (strcmp(action, "stop") == 0)
        cli_error(f->ctl->cli,
                  "%s is paused after a failed %s: `drover ctl %s resume %s` tries again", f->id,
                  operation, f->ctl->path, f->id);
    else
        cli_error(f->ctl->cli, "%s: a %s has failed", f->id, operation);
}

/* A warning, or a decision that is no failure. */
static void show_message(struct follow *f, const json_t *data)
{
    const char *id = json_string_value(json_object_get(data, "id"));
    const char *text = json_string_value(json_object_get(data, "message"));
    if (!id || !text || strcmp(id, f->id) != 0 || f->ctl->show)
        return;
    end_bar(f);
    cli_error(f->ctl->cli, "%s: %s", f->id, text);
}

/* *ended: it was the job's last event. */
static int on_event(struct follow *f, json_t *event, bool *ended)
{
    const char *name = json_string_value(json_object_get(event, "event"));
    json_t *data = json_object_get(event, "data");
    const char *device = json_string_value(json_object_get(data, "device"));
    const char *error = json_string_value(json_object_get(data, "error"));
    *ended = false;
    if (name && strcmp(name, "X_DROVER_JOB_MESSAGE") == 0)
        show_message(f, data);
    if (!name || !device || strcmp(device, f->id) != 0)
        return 0;
    if (strcmp(name, "BLOCK_JOB_READY") == 0)
        return on_ready(f);
    if (strcmp(name, "BLOCK_JOB_ERROR") == 0)
        on_error(f, data);
    *ended = strcmp(name, "BLOCK_JOB_COMPLETED") == 0 || strcmp(name, "BLOCK_JOB_CANCELLED") == 0;
    if (!*ended)
        return 0;
    if (!error && strcmp(name, "BLOCK_JOB_COMPLETED") == 0) {
        if (f->bar && f->total)
            show_bar(f, f->total, f->total);
        end_bar(f);
        return 0;
    }
    end_bar(f);
    cli_error(f->ctl->cli, "%s: %s", f->id, error ? error : "was cancelled");
    return 1;
}

static int say_how_to_come_back(struct follow *f)
{
    end_bar(f);
    cli_error(f->ctl->cli,
              "%s goes on in the server: `drover ctl %s jobs` shows it, `drover ctl %s cancel %s` "
              "ends it",
              f->id, f->ctl->path, f->ctl->path, f->id);
    return cli_signalled();
}

static int follow(struct ctl *ctl, const struct cli_args *args, const char *id)
{
    struct follow f = {.ctl = ctl, .args = args, .id = id};
    int code = 0;
    bool ended = false;
    clock_gettime(CLOCK_MONOTONIC, &f.began);
    while (code == 0 && !ended && !f.ready) {
        if (cli_signalled())
            return say_how_to_come_back(&f);
        CLEANUP_JSON json_t *event = ctl_event(ctl, 250, &code);
        if (event)
            code = on_event(&f, event, &ended);
        else if (code == 0 && !cli_signalled() && !ctl->show)
            code = ask_progress(&f);
    }
    return code;
}

/* ------------------------------------------------------------------ what begins jobs */

static int set_common(const struct cli *cli, const struct cli_args *args, json_t *to)
{
    const char *rate = cli_value(args, 'r'), *format = cli_value(args, 'f');
    uint64_t speed = 0;
    if (rate && cli_get_size(cli, "rate limit", rate, &speed) < 0)
        return 1;
    if (rate)
        json_object_set_new(to, "speed", json_integer((json_int_t)speed));
    if (format)
        json_object_set_new(to, json_object_get(to, "backing-file") ? "backing-format" : "format",
                            json_string(format));
    if (cli_has(args, KEY_IMAGE))
        json_object_set_new(to, "x-image", json_string(cli_value(args, KEY_IMAGE)));
    if (cli_has(args, KEY_BASE))
        json_object_set_new(to, "base", json_string(cli_value(args, KEY_BASE)));
    if (cli_has(args, KEY_TOP))
        json_object_set_new(to, "top", json_string(cli_value(args, KEY_TOP)));
    return 0;
}

/* A mirror or backup has a policy for each side. */
static void set_policy(const struct cli_args *args, const char *command, json_t *to)
{
    const char *policy = cli_value(args, KEY_ON_ERROR);
    bool two_sides = strcmp(command, "drive-mirror") == 0 || strcmp(command, "drive-backup") == 0 ||
                     strcmp(command, "x-drover-archive") == 0;
    if (!policy)
        return;
    if (two_sides)
        json_object_set_new(to, "on-source-error", json_string(policy));
    json_object_set_new(to, two_sides ? "on-target-error" : "on-error", json_string(policy));
}

/* Takes over arguments. */
static int begin_job(struct ctl *ctl, const struct cli_args *args, const char *command,
                     json_t *arguments)
{
    char id[64];
    snprintf(id, sizeof(id), "ctl-%ld", (long)getpid());
    json_object_set_new(arguments, "job-id", json_string(id));
    if (set_common(ctl->cli, args, arguments) != 0) {
        json_decref(arguments);
        return 1;
    }
    cli_catch_signals();
    set_policy(args, command, arguments);
    if (cli_has(args, KEY_HURRY))
        json_object_set_new(arguments, "x-hurry", json_true());
    int code = ctl_ask(ctl, command, arguments, NULL);
    if (code == 0 && cli_has(args, KEY_DETACH) && !ctl->show)
        printf("%s\n", id);
    return code || cli_has(args, KEY_DETACH) ? code : follow(ctl, args, id);
}

static int do_stream(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    return begin_job(
        ctl, args, "block-stream",
        json_pack("{s:s, s:b}", "device", operands[0], "x-retire", cli_has(args, KEY_RETIRE)));
}

static int do_commit(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    return begin_job(ctl, args, "block-commit",
                     json_pack("{s:s, s:b, s:b}", "device", operands[0], "x-remove",
                               cli_has(args, KEY_REMOVE), "x-force", cli_has(args, KEY_FORCE)));
}

/* The parent's name is sent as it is to be recorded. */
static int do_rebase(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    json_t *arguments = json_pack("{s:s, s:s}", "device", operands[0], "backing-file", operands[1]);
    if (!arguments)
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", operands[1]);
    return begin_job(ctl, args, "x-drover-rebase", arguments);
}

static int do_delete(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    json_t *arguments = json_pack("{s:s, s:s, s:b, s:b, s:b}", "device", operands[0], "image",
                                  operands[1], "down", cli_has(args, KEY_DOWN), "remove",
                                  cli_has(args, KEY_REMOVE), "force", cli_has(args, KEY_FORCE));
    if (!arguments)
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", operands[1]);
    return begin_job(ctl, args, "x-drover-delete", arguments);
}

static int do_mirror(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    CLEANUP_FREE char *target = dr_absolute_path(operands[1]);
    json_t *arguments = target
                            ? json_pack("{s:s, s:s, s:s}", "device", operands[0], "target", target,
                                        "sync", cli_has(args, KEY_TOP_ONLY) ? "top" : "full")
                            : NULL;
    if (!arguments)
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", operands[1]);
    if (cli_has(args, KEY_BITMAPS))
        json_object_set_new(arguments, "x-bitmaps", json_true());
    return begin_job(ctl, args, "drive-mirror", arguments);
}

static int do_backup(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    const char *bitmap = cli_value(args, KEY_BITMAP), *state = cli_value(args, KEY_STATE);
    CLEANUP_FREE char *target = dr_absolute_path(operands[1]);
    CLEANUP_FREE char *set = state ? dr_absolute_path(state) : NULL;
    bool full = !bitmap || cli_has(args, KEY_FULL);
    if (bitmap && !state)
        return cli_usage(ctl->cli, "--bitmap goes with --state, which lists the backups");
    json_t *arguments = target ? json_pack("{s:s, s:s, s:s}", "device", operands[0], "target",
                                           target, "sync", full ? "full" : "incremental")
                               : NULL;
    if (!arguments || (state && !set)) {
        json_decref(arguments);
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", operands[1]);
    }
    if (set)
        json_object_set_new(arguments, "x-set", json_string(set));
    if (bitmap)
        json_object_set_new(arguments, "x-bitmap", json_string(bitmap));
    if (ctl_set_spill(ctl, args, arguments) != 0) {
        json_decref(arguments);
        return 1;
    }
    return begin_job(ctl, args, "drive-backup", arguments);
}

static int do_archive(struct ctl *ctl, const struct cli_args *args)
{
    json_t *arguments = NULL;
    int code = ctl_archive_arguments(ctl, args, &arguments);
    if (code == 0)
        return begin_job(ctl, args, "x-drover-archive", arguments);
    json_decref(arguments);
    return code;
}

/* ------------------------------------------------------------------ what is done at once */

static int do_snapshot(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    CLEANUP_FREE char *file = dr_absolute_path(operands[1]);
    json_t *arguments = file ? json_pack("{s:s, s:s}", "device", operands[0], "snapshot-file", file)
                             : NULL;
    if (!arguments)
        return cli_usage(ctl->cli, "'%s' is no name that can be sent", operands[1]);
    if (cli_has(args, 'f'))
        json_object_set_new(arguments, "format", json_string(cli_value(args, 'f')));
    return ctl_ask(ctl, "blockdev-snapshot-sync", arguments, NULL);
}

static int do_resize(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    uint64_t size;
    (void)args;
    if (cli_get_size(ctl->cli, "size", operands[1], &size) < 0)
        return 1;
    return ctl_ask(ctl, "block_resize",
                   json_pack("{s:s, s:I}", "device", operands[0], "size", (json_int_t)size), NULL);
}

static int do_cont(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    (void)args, (void)operands;
    return ctl_ask(ctl, "cont", NULL, NULL);
}

static int do_pause(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    (void)args;
    return ctl_ask(ctl, "job-pause", json_pack("{s:s}", "id", operands[0]), NULL);
}

static int do_resume(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    (void)args;
    return ctl_ask(ctl, "job-resume", json_pack("{s:s}", "id", operands[0]), NULL);
}

static int do_complete(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    (void)args;
    return ctl_ask(ctl, "job-complete", json_pack("{s:s}", "id", operands[0]), NULL);
}

static int do_cancel(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    return ctl_ask(
        ctl, "block-job-cancel",
        json_pack("{s:s, s:b}", "device", operands[0], "force", cli_has(args, KEY_FORCE)), NULL);
}

/* ------------------------------------------------------------------ what is shown */

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static void show_disk(const json_t *disk)
{
    const json_t *image = json_object_get(disk, "inserted");
    const char *status = text_of(disk, "io-status");
    char size[CLI_SIZE_TEXT];
    printf("%s: ", text_of(disk, "device"));
    cli_put(text_of(image, "file"));
    printf(" (%s, %s, %llu below it)\n", text_of(image, "drv"),
           cli_human_size(cli_json_number(json_object_get(image, "image"), "virtual-size"), size),
           (unsigned long long)cli_json_number(image, "backing_file_depth"));
    if (strcmp(status, "ok") != 0 && *status)
        printf("%s: its guest's writes wait: %s\n", text_of(disk, "device"),
               strcmp(status, "nospace") == 0 ? "there is no space for them" : "they fail");
}

static int do_jobs(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    CLEANUP_JSON json_t *jobs = NULL;
    json_t *job;
    size_t i;
    (void)args, (void)operands;
    int code = ctl_ask(ctl, "query-jobs", NULL, &jobs);
    json_array_foreach(jobs, i, job)
    {
        uint64_t total = cli_json_number(job, "total-progress");
        uint64_t done = cli_json_number(job, "current-progress");
        if (ctl->show)
            break;
        printf("%s: %s, %s, %.1f %%\n", text_of(job, "id"), text_of(job, "type"),
               text_of(job, "status"), total ? 100.0 * (double)done / (double)total : 0.0);
    }
    return code;
}

static int do_status(struct ctl *ctl, const struct cli_args *args, char **operands)
{
    CLEANUP_JSON json_t *disks = NULL;
    json_t *disk;
    size_t i;
    int code = ctl_ask(ctl, "query-block", NULL, &disks);
    json_array_foreach(disks, i, disk) if (!ctl->show) show_disk(disk);
    return code ? code : do_jobs(ctl, args, operands);
}

/* ------------------------------------------------------------------ the command */

static const struct verb {
    const char *name, *operands;
    int n;
    int (*run)(struct ctl *ctl, const struct cli_args *args, char **operands);
} verbs[] = {
    {"status", "", 0, do_status},
    {"jobs", "", 0, do_jobs},
    {"snapshot", " DISK FILE", 2, do_snapshot},
    {"stream", " DISK", 1, do_stream},
    {"commit", " DISK", 1, do_commit},
    {"mirror", " DISK FILE", 2, do_mirror},
    {"backup", " DISK FILE", 2, do_backup},
    {"rebase", " DISK PARENT", 2, do_rebase},
    {"delete", " DISK IMAGE", 2, do_delete},
    {"resize", " DISK SIZE", 2, do_resize},
    {"cont", "", 0, do_cont},
    {"pause", " JOB", 1, do_pause},
    {"resume", " JOB", 1, do_resume},
    {"complete", " JOB", 1, do_complete},
    {"cancel", " JOB", 1, do_cancel},
};

static const struct verb *find_verb(const char *name)
{
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
        if (strcmp(verbs[i].name, name) == 0)
            return &verbs[i];
    return NULL;
}

/* The disk of a server that has one, malloc'ed. */
static int find_only_disk(struct ctl *ctl, char **name)
{
    CLEANUP_JSON json_t *disks = NULL;
    int code = ctl_ask(ctl, "query-block", NULL, &disks);
    if (code != 0)
        return code;
    if (json_array_size(disks) != 1) {
        cli_error(ctl->cli, "%s: the server has %zu disks: say which one (`status` names them)",
                  ctl->path, json_array_size(disks));
        return 1;
    }
    *name = strdup(text_of(json_array_get(disks, 0), "device"));
    return *name ? 0 : 1;
}

static int run_bitmap(struct ctl *ctl, const struct cli_args *args)
{
    CLEANUP_FREE char *disk = NULL;
    bool show = ctl->show;
    ctl->show = false; /* the reply to a question that nobody asked */
    int code = ctl_bitmap_lacks_disk(args) ? find_only_disk(ctl, &disk) : 0;
    ctl->show = show;
    return code ? code : ctl_bitmap(ctl, args, disk);
}

/* A disk's name that was left out is put first among the verb's operands. */
static int run_verb(struct ctl *ctl, const struct verb *verb, const struct cli_args *args)
{
    char **operands = args->operands + 2;
    CLEANUP_FREE char *disk = NULL;
    char *all[2] = {NULL, operands[0]};
    if (args->n_operands - 2 == verb->n)
        return verb->run(ctl, args, operands);
    bool show = ctl->show;
    ctl->show = false; /* the reply to a question that nobody asked */
    int code = find_only_disk(ctl, &disk);
    ctl->show = show;
    all[0] = disk;
    return code ? code : verb->run(ctl, args, all);
}

static bool has_operands(const struct verb *verb, int n)
{
    return n == verb->n || (n == verb->n - 1 && strncmp(verb->operands, " DISK", 5) == 0);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct ctl ctl;
    if (args->n_operands < 2)
        return cli_usage(cli, "Expecting the path of a control socket and what to do");
    bool bitmap = strcmp(args->operands[1], "bitmap") == 0;
    const struct verb *verb = find_verb(args->operands[1]);
    if (bitmap && ctl_bitmap_check(cli, args) != 0)
        return 1;
    if (!verb && !bitmap)
        return cli_usage(cli, "'%s' is nothing that a server does", args->operands[1]);
    bool archive = verb && verb->run == do_backup && ctl_is_archive(args);
    if (archive && args->n_operands < 3)
        return cli_usage(cli, "Expecting: ctl SOCKET backup --all|DISK... ARCHIVE");
    if (!archive && !bitmap && !has_operands(verb, args->n_operands - 2))
        return cli_usage(cli, "Expecting: ctl SOCKET %s%s", verb->name, verb->operands);
    int code = ctl_begin(&ctl, cli, args->operands[0]);
    ctl.show = cli_has(args, KEY_JSON);
    if (code == 0)
        code = archive  ? do_archive(&ctl, args)
               : bitmap ? run_bitmap(&ctl, args)
                        : run_verb(&ctl, verb, args);
    ctl_end(&ctl);
    return code;
}

static const struct cli_option *const sets[] = {options, cli_opts_common, NULL};

const struct cli_command cli_cmd_ctl = {
    .name = "ctl",
    .operands = "SOCKET COMMAND [DISK|JOB] [FILE|SIZE]",
    .brief = "Work on disks that a server has in use",
    .about =
        "SOCKET is what `drover serve --control` was given. DISK may be left out if it is the only "
        "one.\n"
        "  status, jobs, resize DISK SIZE, cont (writes that wait for space are tried again)\n"
        "  snapshot DISK FILE     go on with a new image, FILE, on what the disk has\n"
        "  stream, commit DISK    pull the parents' data into an image, or put it down into its "
        "base\n"
        "  mirror DISK FILE       copy the disk into a new image and go on with that\n"
        "  backup DISK... FILE    copy what it holds now into an image, or several into "
        "F.vma[.zst]\n"
        "  delete DISK IMAGE      take an image below the active one out of the chain\n"
        "  rebase DISK PARENT     give the active image, or --image, another parent\n"
        "  bitmap add, remove, clear, enable, disable DISK NAME; merge DISK NAME SOURCE...; list\n"
        "  pause, resume, complete, cancel JOB: jobs go on in the server if this is interrupted",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
