/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The state: which image each disk goes on with, and which jobs have not ended. It is one file of
 * JSON, replaced as a whole, so that a server that is killed finds both as they belong together:
 *
 *   a disk's new image is durable and has its name → the state names it → the disk's first write
 *   a job has begun → the state has it → the client gets its reply
 *   a job has ended → the state forgets it
 *
 * A disk that goes over, and the job that made it do so, change in one write. A job that the state
 * has begins anew with the server: a stream, rebase or commit goes on where it was, since what it
 * has done is in the images; a mirror starts with a fresh target. What an earlier server made and
 * no disk went on with is removed then (leftovers.c). */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "core/publish.h"
#include "live/live.h"
#include "ops/ops-internal.h"
#include "storage/storage.h"

#define STATE_MAX (16u << 20) /* bytes of a file that are read */

/* ------------------------------------------------------------------ reading */

static int parse(const char *path, const char *text, size_t len, json_t **state,
                 struct dr_error *err)
{
    json_error_t why;
    *state = len == 0 ? json_object() : json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
    if (!*state)
        return dr_fail(err, EINVAL, "%s: is no state of a server: %s", path, why.text);
    if (len > 0 && json_integer_value(json_object_get(*state, "drover-state")) != 1) {
        json_decref(*state);
        *state = NULL;
        return dr_fail(err, EINVAL, "%s: is no state of a server, or of a newer one", path);
    }
    return 0;
}

/* Only where there is none may a server begin without: a state that cannot be looked at is not
 * nothing. */
static int look_for(struct dr_fs *fs, const char *path, bool *there, struct dr_error *err)
{
    struct dr_file_id id;
    struct dr_error why = DR_ERROR_INIT;
    int r = fs->ops->identify(fs, path, &id, &why);
    *there = r == 0;
    return r == 0 || r == -ENOENT ? 0 : dr_fail(err, -r, "%s", why.text);
}

static int read_state(struct dr_file *file, const char *path, json_t **state, struct dr_error *err)
{
    uint64_t size = dr_file_size(file);
    if (size > STATE_MAX)
        return dr_fail(err, EINVAL, "%s: is no state of a server: %llu bytes", path,
                       (unsigned long long)size);
    CLEANUP_FREE char *text = malloc((size_t)size + 1);
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_file_pread(file, text, 0, (size_t)size, err);
    return r < 0 ? r : parse(path, text, (size_t)size, state, err);
}

static json_t *find_disk(json_t *state, const char *name)
{
    json_t *one;
    size_t i;
    json_array_foreach(json_object_get(state, "disks"), i, one)
    {
        const char *its = json_string_value(json_object_get(one, "name"));
        if (its && strcmp(its, name) == 0)
            return one;
    }
    return NULL;
}

static bool is_same(struct dr_fs *fs, const char *given, const char *known)
{
    struct dr_file_id a, b;
    return known && (strcmp(given, known) == 0 ||
                     (fs->ops->identify(fs, given, &a, NULL) == 0 &&
                      fs->ops->identify(fs, known, &b, NULL) == 0 && dr_same_id(a, b)));
}

/* disk: what the state has of it. Another image by the same name would silently be left aside for
 * the one that the state has. */
static int check_given(struct dr_fs *fs, const char *state, const char *name, const char *given,
                       json_t *disk, struct dr_error *err)
{
    const char *path = json_string_value(json_object_get(disk, "path"));
    const char *first = json_string_value(json_object_get(disk, "first"));
    if (!given || !path || is_same(fs, given, path) || is_same(fs, given, first))
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: knows '%s' as the disk that began with %s and goes on with %s: serve %s by "
                   "another name, or with another state",
                   state, name, first ? first : path, path, given);
}

static int copy_names(const json_t *disk, const char *state, char **path, char **format,
                      struct dr_error *err)
{
    const char *its_path = json_string_value(json_object_get(disk, "path"));
    const char *its_format = json_string_value(json_object_get(disk, "format"));
    if (!its_path || !its_format)
        return 0;
    *path = strdup(its_path);
    *format = strdup(its_format);
    if (*path && *format)
        return 0;
    free(*path);
    free(*format);
    *path = *format = NULL;
    return dr_fail(err, ENOMEM, "%s: out of memory", state);
}

int live_recall_fs(struct dr_fs *fs, const char *state, const char *name, const char *given,
                   char **path, char **format, struct dr_error *err)
{
    struct dr_file *file = NULL;
    json_t *all = NULL;
    *path = *format = NULL;
    bool there;
    int r = look_for(fs, state, &there, err);
    if (r < 0 || !there)
        return r;
    r = dr_file_open(fs, state, 0, &file, err);
    if (r == 0)
        r = read_state(file, state, &all, err);
    dr_file_unref(file);
    json_t *disk = find_disk(all, name);
    if (r == 0)
        r = check_given(fs, state, name, given, disk, err);
    if (r == 0)
        r = copy_names(disk, state, path, format, err);
    json_decref(all);
    return r;
}

int dr_live_recall(const char *state, const char *name, const char *given, char **path,
                   char **format, struct dr_error *err)
{
    DR_REQUIRE(state, err);
    DR_REQUIRE(name, err);
    DR_REQUIRE(path, err);
    DR_REQUIRE(format, err);
    return live_recall_fs(dr_fs_posix(), state, name, given, path, format, err);
}

/* ------------------------------------------------------------------ writing */

static bool set_text(json_t *object, const char *key, const char *text)
{
    return !text || json_object_set_new(object, key, json_string(text)) == 0;
}

static json_t *describe_job(const struct live_job *job)
{
    const struct live_order *o = &job->order;
    json_t *one = json_pack(
        "{s:s, s:s, s:i, s:b, s:b, s:b, s:b, s:b, s:b, s:b, s:b, s:b, s:I, s:b, s:b, s:s, s:s}",
        "id", dr_job_id(job->job), "disk", job->on->name, "kind", (int)o->kind, "retire", o->retire,
        "remove", o->remove, "force", o->force, "naming", job->naming, "existing", o->existing,
        "write-blocking", o->write_blocking, "top-only", o->top_only, "keep-finalize",
        o->keep_finalize, "keep-dismiss", o->keep_dismiss, "speed", (json_int_t)o->speed, "hurry",
        o->hurry, "paused", job->paused, "on-source-error", live_on_error_name(o->on_source_error),
        "on-target-error", live_on_error_name(o->on_target_error));
    if (set_text(one, "base", o->base) && set_text(one, "top", o->top) &&
        set_text(one, "target", o->target) && set_text(one, "format", o->format) &&
        set_text(one, "io-status", live_io_status(job->stopped_by)) &&
        json_object_set_new(one, "bitmaps", json_boolean(o->bitmaps)) == 0 &&
        json_object_set_new(one, "leaving", live_images_json(&o->leaving)) == 0)
        return one;
    json_decref(one);
    return NULL;
}

/* Disks that a client has added are not in it: the next server does not have them. Nor are mirrors
 * of what is written from now on: what was written is not known any more; nor backups: their
 * instant is over. Names that are not UTF-8 cannot be in it: NULL. */
static char *describe(struct dr_live *live)
{
    json_t *disks = json_array(), *jobs = json_array();
    DR_LOCK_SCOPE(&live->lock);
    bool all = true;
    for (const struct live_disk *d = live->disks; d; d = d->next)
        all &= d->node ||
               json_array_append_new(disks, json_pack("{s:s, s:s, s:s, s:s}", "name", d->name,
                                                      "path", d->path, "format", d->format, "first",
                                                      d->first)) == 0;
    for (const struct live_job *job = live->jobs; job; job = job->next)
        if (!job->done && !job->switched && !job->on->node && !job->order.only_new &&
            job->order.kind != LIVE_BACKUP &&
            (job->kept || (job->status < LIVE_ABORTING && !job->cancelled)))
            all &= json_array_append_new(jobs, describe_job(job)) == 0;
    all &= !live->other_disks || json_array_extend(disks, live->other_disks) == 0;
    all &= !live->other_jobs || json_array_extend(jobs, live->other_jobs) == 0;
    json_t *state = json_pack("{s:i, s:o, s:o, s:o, s:o}", "drover-state", 1, "disks", disks,
                              "jobs", jobs, "emptied", live_names_json(&live->emptied), "making",
                              live_names_json(&live->making));
    char *text = all && state ? dr_json_dump(state, JSON_INDENT(1)) : NULL;
    json_decref(state);
    return text;
}

/* *named: the new state has the name, although a failure may follow: it may not be durable. */
static int replace(struct dr_live *live, const char *text, bool *named, struct dr_error *err)
{
    struct dr_temp t;
    int r = dr_temp_create(&t, live->fs, live->state, live->state_file, live->state_file, err);
    if (r < 0)
        return r;
    r = dr_file_pwrite(t.file, text, 0, strlen(text), err);
    if (r == 0)
        r = dr_temp_publish(&t, err);
    *named = !t.temp;
    if (*named) { /* open, it keeps other servers from it */
        dr_file_unref(live->state_file);
        live->state_file = dr_file_ref(t.file);
    }
    dr_temp_end(&t);
    return r;
}

/* Under the state's lock: the later state is the later file. */
static int save(struct dr_live *live, bool *named, struct dr_error *err)
{
    *named = false;
    if (!live->state)
        return 0;
    CLEANUP_FREE char *text = describe(live);
    return text ? replace(live, text, named, err)
                : dr_fail(err, EILSEQ, "%s: cannot hold a name that is not UTF-8", live->state);
}

int live_state_save(struct dr_live *live, struct dr_error *err)
{
    bool named;
    DR_LOCK_SCOPE(&live->state_lock);
    return save(live, &named, err);
}

int live_state_save_if_changed(struct dr_live *live, struct dr_error *err)
{
    pthread_mutex_lock(&live->lock);
    bool changed = live->changed;
    live->changed = false;
    pthread_mutex_unlock(&live->lock);
    return changed ? live_state_save(live, err) : 0;
}

/* ------------------------------------------------------------------ what disks go on with */

static void exchange(struct dr_live *live, const struct dr_switch *s, char **path, char **format)
{
    DR_LOCK_SCOPE(&live->lock);
    for (struct live_disk *d = live->disks; d; d = d->next)
        if (d->disk == s->disk) {
            char *old_path = d->path, *old_format = d->format;
            d->path = *path;
            d->format = *format;
            *path = old_path;
            *format = old_format;
            dr_memory_bitmaps_moved(d->bitmaps, d->path);
        }
}

static void exchange_all(struct dr_live *live, const struct dr_switch *switches, size_t n,
                         char **names)
{
    for (size_t i = 0; i < n; i++)
        exchange(live, &switches[i], &names[2 * i], &names[2 * i + 1]);
}

/* After a failure the disks go on with what they had, and so must the next server: a state that has
 * its name but may not be durable is replaced once more. Where not even that is possible, the disks
 * follow what the state says. */
static int record(struct dr_live *live, const struct dr_switch *switches, size_t n, char **names,
                  struct dr_error *err)
{
    bool named, back;
    DR_LOCK_SCOPE(&live->state_lock);
    exchange_all(live, switches, n, names);
    int r = save(live, &named, err);
    if (r == 0)
        return 0;
    exchange_all(live, switches, n, names);
    if (!named || save(live, &back, NULL) == 0 || back)
        return r;
    exchange_all(live, switches, n, names);
    return 0;
}

/* As record of struct dr_job_options: user is the dr_live. */
int live_record(struct dr_live *live, const struct dr_switch *switches, size_t n,
                struct dr_error *err)
{
    CLEANUP_FREE char **names = calloc(2 * n, sizeof(*names));
    bool all = names;
    for (size_t i = 0; names && i < n; i++) {
        names[2 * i] = strdup(switches[i].path);
        names[2 * i + 1] = strdup(switches[i].format);
        all &= names[2 * i] && names[2 * i + 1];
    }
    int r = all ? 0 : dr_fail(err, ENOMEM, "out of memory for the state");
    if (r == 0)
        r = record(live, switches, n, names, err);
    for (size_t i = 0; names && i < 2 * n; i++)
        free(names[i]);
    return r;
}

/* ------------------------------------------------------------------ beginning */

static char *copy_text(json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? strdup(text) : NULL;
}

static bool is_served(const struct dr_live *live, const char *name)
{
    for (const struct live_disk *d = live->disks; d && name; d = d->next)
        if (strcmp(d->name, name) == 0)
            return true;
    return false;
}

/* What the state says of disks that this server does not have is for another server to know:
 * without it, that one would go on with an image that has become a parent. */
static int keep_others(const struct dr_live *live, const json_t *list, const char *key,
                       json_t **kept, struct dr_error *err)
{
    json_t *one;
    size_t i;
    *kept = json_array();
    bool all = *kept;
    json_array_foreach(list, i,
                       one) if (!is_served(live, json_string_value(json_object_get(one, key))))
        all &= json_array_append(*kept, one) == 0;
    return all ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", live->state);
}

/* A state of a server that knew no policies has none: report. */
static enum live_on_error policy_of(const json_t *job, const char *key)
{
    const char *name = json_string_value(json_object_get(job, key));
    enum live_on_error policy;
    return name && live_on_error_parse(name, &policy) == 0 ? policy : LIVE_REPORT;
}

/* Begin a job that the state has. What has become impossible meanwhile is told by its events. */
static void begin_again(struct dr_live *live, json_t *one)
{
    const char *id = json_string_value(json_object_get(one, "id"));
    const char *name = json_string_value(json_object_get(one, "disk"));
    json_int_t kind = json_integer_value(json_object_get(one, "kind"));
    struct live_disk *on = name ? live_find_disk(live, name) : NULL;
    if (!id || !on || kind < LIVE_STREAM || kind > LIVE_REBASE)
        return;
    struct live_order order = {
        .kind = (enum live_kind)kind,
        .base = copy_text(one, "base"),
        .top = copy_text(one, "top"),
        .target = copy_text(one, "target"),
        .format = copy_text(one, "format"),
        .retire = json_is_true(json_object_get(one, "retire")),
        .remove = json_is_true(json_object_get(one, "remove")),
        .force = json_is_true(json_object_get(one, "force")),
        .existing = json_is_true(json_object_get(one, "existing")),
        .write_blocking = json_is_true(json_object_get(one, "write-blocking")),
        .bitmaps = json_is_true(json_object_get(one, "bitmaps")),
        .top_only = json_is_true(json_object_get(one, "top-only")),
        .keep_finalize = json_is_true(json_object_get(one, "keep-finalize")),
        .keep_dismiss = json_is_true(json_object_get(one, "keep-dismiss")),
        .paused = json_is_true(json_object_get(one, "paused")),
        .hurry = json_is_true(json_object_get(one, "hurry")),
        .stopped_by = live_io_error(json_string_value(json_object_get(one, "io-status"))),
        .on_source_error = policy_of(one, "on-source-error"),
        .on_target_error = policy_of(one, "on-target-error"),
        .speed = (uint64_t)json_integer_value(json_object_get(one, "speed")),
    };
    int r = live_leaving_parse(one, &order.leaving, NULL);
    if (r < 0 || (kind == LIVE_MIRROR && !order.target) || (kind == LIVE_REBASE && !order.base))
        live_order_clear(&order);
    else
        live_job_begin(live, on, id, &order, NULL);
}

/* Which image a disk began with is for the state to know, if it has heard of the disk before. */
static int learn_first(struct dr_live *live, json_t *state, struct dr_error *err)
{
    bool all = true;
    DR_LOCK_SCOPE(&live->lock);
    for (struct live_disk *d = live->disks; d; d = d->next) {
        d->first = copy_text(find_disk(state, d->name), "first");
        if (!d->first)
            d->first = strdup(d->path);
        all &= d->first != NULL;
    }
    return all ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", live->state);
}

/* A server that was killed may have left in the machine's memory what its clients take for written,
 * also in images that are parents by now: it was about to freeze them. The next flush of a client
 * means that, too. */
static int harden_disks(const struct dr_live *live, struct dr_error *err)
{
    int r = 0;
    for (const struct live_disk *d = live->disks; r == 0 && d; d = d->next) {
        if (!dr_writable(d->disk))
            continue;
        struct dr_chain *chain = dr_disk_chain(d->disk);
        r = dr_chain_harden(chain, 0, err);
        dr_chain_unref(chain, NULL);
    }
    return r;
}

int live_state_begin(struct dr_live *live, struct dr_error *err)
{
    json_t *state = NULL, *one;
    size_t i;
    bool there;
    if (!live->state)
        return 0;
    int r = look_for(live->fs, live->state, &there, err);
    if (r == 0 && there) {
        r = dr_file_open(live->fs, live->state, DR_FILE_RDWR, &live->state_file, err);
        if (r == 0)
            r = read_state(live->state_file, live->state, &state, err);
        if (r == 0)
            dr_ops_remove_asides(live->fs, live->state, NULL);
        if (r == 0)
            r = harden_disks(live, err);
    }
    if (r == 0)
        r = learn_first(live, state, err);
    if (r == 0)
        r = keep_others(live, json_object_get(state, "disks"), "name", &live->other_disks, err);
    if (r == 0)
        r = keep_others(live, json_object_get(state, "jobs"), "disk", &live->other_jobs, err);
    if (r == 0)
        r = live_leftovers_begin(live, state, err);
    if (r == 0) {
        DR_LOCK_SCOPE(&live->lock);
        json_array_foreach(json_object_get(state, "jobs"), i, one) begin_again(live, one);
    }
    json_decref(state);
    if (r == 0)
        r = live_state_save(live, err);
    if (r == 0 && !there) /* now the state is ours, and there are no jobs that might write it */
        dr_ops_remove_asides(live->fs, live->state, NULL);
    return r;
}
