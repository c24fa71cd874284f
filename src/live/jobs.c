/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs: each is one operation on a thread of its own, with QEMU's states and events around it.
 *
 *     created → running ⇄ paused                        ready, standby: only jobs that follow the
 *                  ↓ ↘ ready ⇄ standby                  guest until job-complete
 *               waiting → pending → concluded → null    pending: until job-finalize, if wanted
 *     any of them → aborting → concluded → null         failed or cancelled
 *
 * A change of state is an event, queued under the lock in which the state changes.
 *
 * Jobs of one group complete together (job-groups.c). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/thread.h"
#include "live/live.h"
#include "ops/ops-internal.h"

const char *live_kind_name(enum live_kind kind)
{
    static const char *const names[] = {"stream", "commit", "mirror", "x-drover-rebase", "backup"};
    return names[kind];
}

const char *live_status_name(enum live_status status)
{
    static const char *const names[] = {"created", "running", "paused",   "ready",     "standby",
                                        "waiting", "pending", "aborting", "concluded", "null"};
    return names[status];
}

const char *live_on_error_name(enum live_on_error policy)
{
    static const char *const names[] = {"report", "ignore", "enospc", "stop"};
    return policy <= LIVE_STOP ? names[policy] : NULL;
}

int live_on_error_parse(const char *name, enum live_on_error *policy)
{
    if (strcmp(name, "auto") == 0)
        name = "enospc"; /* what QEMU's jobs do by it */
    for (*policy = LIVE_REPORT; *policy <= LIVE_STOP; ++*policy)
        if (strcmp(name, live_on_error_name(*policy)) == 0)
            return 0;
    return -EINVAL;
}

static bool is_no_space(int error)
{
    return error == ENOSPC || error == EDQUOT;
}

const char *live_io_status(int error)
{
    return error == 0 ? "ok" : is_no_space(error) ? "nospace" : "failed";
}

int live_io_error(const char *status)
{
    static const int errors[] = {ENOSPC, EIO};
    for (size_t i = 0; status && i < sizeof(errors) / sizeof(errors[0]); i++)
        if (strcmp(status, live_io_status(errors[i])) == 0)
            return errors[i];
    return 0;
}

struct live_job *live_job_find(struct dr_live *live, const char *id)
{
    struct live_job *job = live->jobs;
    while (job && strcmp(dr_job_id(job->job), id) != 0)
        job = job->next;
    return job;
}

struct live_job *live_job_on(struct dr_live *live, const struct live_disk *on)
{
    struct live_job *job = live->jobs;
    while (job && ((job->on != on && !live_archive_has(job->order.archive, on)) ||
                   job->status >= LIVE_CONCLUDED))
        job = job->next;
    return job;
}

void live_order_clear(struct live_order *order)
{
    free(order->base);
    free(order->top);
    free(order->target);
    free(order->format);
    live_images_free(&order->leaving);
    free(order->set);
    free(order->bitmap);
    free(order->spill);
    live_archive_free(order->archive);
    *order = (struct live_order){0};
}

/* ------------------------------------------------------------------ events */

static void set_status(struct live_job *job, enum live_status status)
{
    job->status = status;
    live_event(
        job->live, "JOB_STATUS_CHANGE",
        json_pack("{s:s, s:s}", "id", dr_job_id(job->job), "status", live_status_name(status)));
}

/* type, device, len, offset, speed, as the events of block jobs have them. */
static json_t *progress_of(const struct live_job *job)
{
    struct dr_job_status s;
    dr_job_query(job->job, &s);
    return json_pack("{s:s, s:s, s:I, s:I, s:I}", "type", live_kind_name(job->order.kind), "device",
                     dr_job_id(job->job), "len", (json_int_t)s.total, "offset", (json_int_t)s.done,
                     "speed", (json_int_t)s.rate);
}

static void tell_end(struct live_job *job)
{
    json_t *data = progress_of(job);
    bool cancelled = job->cancelled && job->result == -ECANCELED;
    if (job->result < 0 && !cancelled)
        json_object_set_new(data, "error", dr_json_text(job->error.text));
    live_event(job->live, cancelled ? "BLOCK_JOB_CANCELLED" : "BLOCK_JOB_COMPLETED", data);
}

/* ------------------------------------------------------------------ on the job's thread */

/* The job's turn comes again when it is not paused. */
static void wait_for_resume(struct live_job *job)
{
    while (job->paused && !job->cancelled)
        pthread_cond_wait(&job->changed, &job->live->lock);
}

static void on_ready(void *user)
{
    struct live_job *job = user;
    DR_LOCK_SCOPE(&job->live->lock);
    wait_for_resume(job);
    if (job->cancelled)
        return;
    set_status(job, LIVE_READY);
    live_event(job->live, "BLOCK_JOB_READY", progress_of(job));
}

static void make_pending(struct live_job *job)
{
    set_status(job, LIVE_PENDING);
    if (job->order.keep_finalize)
        live_event(job->live, "BLOCK_JOB_PENDING",
                   json_pack("{s:s, s:s}", "type", live_kind_name(job->order.kind), "id",
                             dr_job_id(job->job)));
    job->finalize |= !live_group_by_hand(job);
    pthread_cond_broadcast(&job->changed);
}

/* Those of the group from this one on, the last one first. */
static void group_make_pending(const struct live_job *job, struct live_job *from)
{
    if (!from)
        return;
    group_make_pending(job, from->next);
    if (live_group_has(job, from))
        make_pending(from);
}

static int wait_for_switch(struct live_job *job)
{
    DR_LOCK_SCOPE(&job->live->lock);
    wait_for_resume(job);
    if (job->cancelled)
        return 1;
    set_status(job, LIVE_WAITING);
    if (!job->group)
        make_pending(job);
    else if (live_group_waits(job))
        group_make_pending(job, job->live->jobs);
    while (job->status == LIVE_WAITING && !job->cancelled)
        pthread_cond_wait(&job->changed, &job->live->lock);
    while (!job->finalize && !job->cancelled)
        pthread_cond_wait(&job->changed, &job->live->lock);
    return job->cancelled;
}

/* From here on a file by the target's name is the mirror's; before, it is somebody else's. Where
 * the state cannot be written, the next server takes it for that. */
static void note_naming(struct live_job *job)
{
    if (job->order.kind != LIVE_MIRROR || job->order.existing)
        return;
    pthread_mutex_lock(&job->live->lock);
    job->naming = true;
    pthread_mutex_unlock(&job->live->lock);
    live_state_save(job->live, NULL);
}

static int on_switch(void *user)
{
    struct live_job *job = user;
    int r = wait_for_switch(job);
    if (r == 0)
        note_naming(job);
    return r;
}

static int on_record(void *user, const struct dr_switch *switches, size_t n, struct dr_error *err)
{
    struct live_job *job = user;
    struct dr_live *live = job->live;
    pthread_mutex_lock(&live->lock);
    bool leaves = job->order.kind == LIVE_COMMIT && !job->order.remove;
    char *left = leaves ? strdup(job->on->path) : NULL;
    bool noted = !leaves || (left && live_names_add(&live->emptied, left));
    /* With retire or remove there are files to be removed yet. */
    job->switched = noted && !job->order.retire && !job->order.remove;
    pthread_mutex_unlock(&live->lock);
    int r = noted ? live_record(live, switches, n, err)
                  : dr_fail(err, ENOMEM, "out of memory for the state");
    if (r < 0) {
        DR_LOCK_SCOPE(&live->lock);
        job->switched = false;
        if (left)
            live_names_remove(&live->emptied, left);
    }
    free(left);
    return r;
}

static void pause_running(struct live_job *job)
{
    job->paused = true;
    dr_job_pause(job->job);
    set_status(job, job->status == LIVE_READY ? LIVE_STANDBY : LIVE_PAUSED);
}

static bool stops_at(enum live_on_error policy, int error)
{
    return policy == LIVE_STOP || (policy == LIVE_ENOSPC && is_no_space(error));
}

/* A job that waits for its switch, or is about to end, cannot be paused any more. */
static enum dr_error_action action_for(const struct live_job *job, bool reading, int error)
{
    enum live_on_error policy = reading ? job->order.on_source_error : job->order.on_target_error;
    if (job->cancelled || job->status >= LIVE_WAITING)
        return DR_ERROR_REPORT;
    if (stops_at(policy, error))
        return DR_ERROR_STOP;
    return policy == LIVE_IGNORE ? DR_ERROR_IGNORE : DR_ERROR_REPORT;
}

/* *pauses: it does now, and the state does not say so yet. */
static enum dr_error_action decide(struct live_job *job, bool reading, int error, bool *pauses)
{
    static const char *const names[] = {"report", "ignore", "stop"};
    DR_LOCK_SCOPE(&job->live->lock);
    if (job->paused && job->stopped_by)
        return DR_ERROR_STOP; /* another piece has failed, and it was told: this one waits, too */
    enum dr_error_action action = action_for(job, reading, error);
    live_event(job->live, "BLOCK_JOB_ERROR",
               json_pack("{s:s, s:s, s:s}", "device", dr_job_id(job->job), "operation",
                         reading ? "read" : "write", "action", names[action]));
    if (action != DR_ERROR_STOP)
        return action;
    job->stopped_by = error;
    *pauses = true;
    if (!job->paused)
        pause_running(job);
    return action;
}

static enum dr_error_action on_error(void *user, bool reading, int error, const char *text)
{
    struct live_job *job = user;
    bool pauses = false;
    (void)text;
    enum dr_error_action action = decide(job, reading, error, &pauses);
    if (pauses)
        live_state_save(job->live, NULL); /* without it the next server would try at once */
    return action;
}

/* A warning of the operation, or a decision that is no failure. QEMU has none of these. */
static void on_message(void *user, const char *text)
{
    struct live_job *job = user;
    DR_LOCK_SCOPE(&job->live->lock);
    free(job->message);
    job->message = strdup(text);
    live_event(job->live, "X_DROVER_JOB_MESSAGE",
               json_pack("{s:s, s:o}", "id", dr_job_id(job->job), "message", dr_json_text(text)));
}

/* An earlier server may have gone over to the plain file and been killed then. */
static int stream(struct live_job *job, const struct dr_stream_options *o, struct dr_error *err)
{
    const struct live_order *order = &job->order;
    const char *top = dr_image_path(job->on->disk, 0);
    if (!top)
        return dr_fail(err, ENOMEM, "out of memory for a job");
    if (o->retire && order->target && strcmp(top, order->target) != 0)
        return dr_ops_retire_rest(job->on->disk, order->target, &o->open, err);
    int r = dr_disk_stream(job->on->disk, o, job->job, err);
    return r < 0 ? r : live_remove_left(job, err);
}

/* Images that an earlier server has committed for this job and taken out of the chain. */
static bool list_committed(const struct live_job *job, struct live_names *committed)
{
    const struct live_images *leaving = &job->order.leaving;
    bool all = true;
    for (size_t i = 0; all && i < leaving->n; i++)
        if (!live_has_image(job->on, leaving->all[i].path))
            all = live_names_add(committed, leaving->all[i].path);
    return all;
}

/* An earlier server may have finished the commit, or that of the images below the active one. */
static int commit(struct live_job *job, struct dr_commit_options *o, struct dr_error *err)
{
    const struct live_images *leaving = &job->order.leaving;
    struct live_names emptied = {0}, committed = {0};
    if (leaving->n > 0 && !live_has_image(job->on, leaving->all[0].path))
        return live_remove_left(job, err);
    pthread_mutex_lock(&job->live->lock);
    bool copied = live_names_copy(&job->live->emptied, &emptied);
    pthread_mutex_unlock(&job->live->lock);
    copied = copied && list_committed(job, &committed);
    o->emptied = (const char *const *)emptied.all;
    o->n_emptied = emptied.n;
    o->committed = (const char *const *)committed.all;
    o->n_committed = committed.n;
    int r = copied ? dr_disk_commit(job->on->disk, o, job->job, err)
                   : dr_fail(err, ENOMEM, "out of memory for a commit");
    live_names_free(&emptied);
    live_names_free(&committed);
    return r < 0 ? r : live_remove_left(job, err);
}

static int operate(struct live_job *job, struct dr_error *err)
{
    const struct live_order *o = &job->order;
    const struct dr_open_options open = {.allow_paths = (const char *const *)job->live->allow};
    const struct dr_stream_options streaming = {
        .open = open, .base = o->base, .image = o->top, .retire = o->retire, .remove = o->remove};
    struct dr_commit_options committing = {.open = open,
                                           .base = o->base,
                                           .top = o->top,
                                           .pivot = !o->top,
                                           .remove = o->remove,
                                           .force = o->force};
    const struct dr_mirror_options mirror = {
        .open = {.allow_paths = open.allow_paths, .flags = o->flags},
        .format = o->format,
        .existing = o->existing,
        .top = o->top_only,
        .only_new = o->only_new,
        .write_blocking = o->write_blocking,
        .bitmaps = o->bitmaps};
    const struct dr_rebase_options rebase = {
        .open = open, .backing = o->base, .backing_format = o->format, .image = o->top};
    const struct dr_backup_options backup = {.open = open,
                                             .format = o->format,
                                             .set = o->set,
                                             .bitmap = o->bitmap,
                                             .full = o->full,
                                             .spill = live_spill(o)};
    switch (o->kind) {
    case LIVE_STREAM:
        return stream(job, &streaming, err);
    case LIVE_COMMIT:
        return commit(job, &committing, err);
    case LIVE_MIRROR:
        return dr_disk_mirror(job->on->disk, o->target, &mirror, job->job, err);
    case LIVE_REBASE:
        return dr_disk_rebase(job->on->disk, &rebase, job->job, err);
    case LIVE_BACKUP:
        if (o->archive)
            return live_archive_run(job, err);
        if (o->point && job->group)
            dr_point_together(o->point, live_group_keep_step, job);
        if (o->point)
            return dr_point_run(o->point, job->job, err);
        return dr_disk_backup(job->on->disk, o->target, &backup, job->job, NULL, err);
    }
    return dr_fail(err, EINVAL, "a job of an unknown kind");
}

/* The job leaves the list; its thread, which this may be, is joined later. */
static void retire(struct live_job *job)
{
    struct live_job **at = &job->live->jobs;
    while (*at != job)
        at = &(*at)->next;
    *at = job->next;
    set_status(job, LIVE_NULL);
    job->next = job->live->gone;
    job->live->gone = job;
    live_wake(job->live);
}

/* The job failed while the end of the server was stopping it: its policies were not asked. Which
 * side has failed is not known any more, unless it had no space. */
static void note_late_failure(struct live_job *job, int error)
{
    const struct live_order *o = &job->order;
    if (!stops_at(o->on_target_error, error) ||
        !(is_no_space(error) || stops_at(o->on_source_error, error)))
        return;
    job->paused = true;
    job->stopped_by = error;
}

/* The job has ended: the state says so before any client hears it. Jobs that the end of the server
 * stops are kept, also those that fail at that moment: the next server meets the failure again, or
 * does not. If the state cannot be written, the job begins again with the next server, which does
 * no harm. */
static void forget(struct live_job *job, int r, struct dr_error *err)
{
    pthread_mutex_lock(&job->live->lock);
    if (job->kept && r < 0 && r != -ECANCELED)
        note_late_failure(job, -r);
    job->done = r == 0 || !job->kept;
    pthread_mutex_unlock(&job->live->lock);
    if (job->done || r != -ECANCELED)
        live_state_save(job->live, err);
}

/* False: it is not to begin at all. */
static bool wait_for_beginning(struct live_job *job)
{
    DR_LOCK_SCOPE(&job->live->lock);
    while (!job->begun && !job->dropped)
        pthread_cond_wait(&job->changed, &job->live->lock);
    return job->begun;
}

static void *work(void *user)
{
    struct live_job *job = user;
    struct dr_error err = DR_ERROR_INIT;
    if (!wait_for_beginning(job))
        return NULL;
    int r = live_note_leaving(job, &err);
    live_state_save(job->live, NULL); /* a killed job's files are known by it */
    if (r == 0)
        r = operate(job, &err);
    live_tell_size(job->live, job->on);
    forget(job, r, &err);
    DR_LOCK_SCOPE(&job->live->lock);
    job->result = r;
    job->error = err;
    job->ended = true;
    if (r < 0)
        set_status(job, LIVE_ABORTING);
    else if (job->status < LIVE_WAITING) { /* it had nothing to switch */
        set_status(job, LIVE_WAITING);
        set_status(job, LIVE_PENDING);
    }
    if (job->group)
        live_group_end(job, r);
    tell_end(job);
    set_status(job, LIVE_CONCLUDED);
    live_group_wake(job);
    if (!job->order.keep_dismiss && !job->stays)
        retire(job);
    return NULL;
}

/* ------------------------------------------------------------------ beginning */

static int make_job(struct dr_live *live, struct live_disk *on, const char *id,
                    struct live_order *order, struct live_job **job, struct dr_error *err)
{
    struct live_job *fresh = calloc(1, sizeof(*fresh));
    if (!fresh)
        return dr_fail(err, ENOMEM, "out of memory for a job");
    const struct dr_job_options options = {
        .rate = order->speed,
        .hurry = order->hurry,
        .before_switch = on_switch,
        .record = on_record,
        .error = on_error,
        .message = on_message,
        .ready = order->kind == LIVE_MIRROR || (order->kind == LIVE_COMMIT && !order->top)
                     ? on_ready
                     : NULL,
        .user = fresh,
    };
    int r = dr_job_new(id, &options, &fresh->job, err);
    if (r < 0) {
        free(fresh);
        return r;
    }
    fresh->live = live;
    fresh->on = on;
    fresh->order = *order;
    *order = (struct live_order){0};
    pthread_cond_init(&fresh->changed, NULL);
    if (fresh->order.paused)
        dr_job_pause(fresh->job); /* before its thread begins */
    *job = fresh;
    return 0;
}

static void free_job(struct live_job *job)
{
    pthread_cond_destroy(&job->changed);
    dr_job_free(job->job);
    dr_point_free(job->order.point);
    live_order_clear(&job->order);
    free(job->message);
    free(job);
}

int live_job_create(struct dr_live *live, struct live_disk *on, const char *id,
                    struct live_order *order, struct live_job **made, struct dr_error *err)
{
    struct live_job *job = NULL, *other = live_job_on(live, on), **end = &live->jobs;
    int r = 0;
    if (live->stopping)
        r = dr_fail(err, EBUSY, "The server is about to end");
    else if (other)
        r = dr_fail(err, EBUSY, "Node '%s' is busy: block device is in use by block job: %s",
                    on->name, live_kind_name(other->order.kind));
    else if (live_job_find(live, id))
        r = dr_fail(err, EEXIST, "Job ID '%s' already in use", id);
    else
        r = make_job(live, on, id, order, &job, err);
    live_order_clear(order);
    if (r < 0)
        return r;
    while (*end)
        end = &(*end)->next;
    r = dr_thread_start(&job->thread, work, job); /* it waits for the lock before it tells */
    if (r != 0) {
        job->order.point = NULL; /* the caller's again */
        free_job(job);
        return dr_fail_errno(err, r, "no thread for job '%s'", id);
    }
    *end = job;
    set_status(job, LIVE_CREATED);
    *made = job;
    return 0;
}

void live_job_start(struct live_job *job)
{
    job->live->changed = true;
    job->begun = true;
    set_status(job, LIVE_RUNNING);
    if (job->order.paused)
        pause_running(job);
    job->stopped_by = job->order.paused ? job->order.stopped_by : 0;
    pthread_cond_broadcast(&job->changed);
}

void live_job_drop(struct live_job *job)
{
    job->dropped = job->ended = true;
    job->result = -ECANCELED;
    set_status(job, LIVE_ABORTING);
    set_status(job, LIVE_CONCLUDED);
    pthread_cond_broadcast(&job->changed);
    retire(job);
}

int live_job_begin(struct dr_live *live, struct live_disk *on, const char *id,
                   struct live_order *order, struct dr_error *err)
{
    struct live_job *job;
    int r = live_job_create(live, on, id, order, &job, err);
    if (r == 0)
        live_job_start(job);
    return r;
}

/* ------------------------------------------------------------------ verbs */

static bool allowed(enum live_status status, enum live_verb verb)
{
#define IN(s) (1u << (s))
    static const unsigned in[] = {
        [LIVE_CANCEL] = IN(LIVE_CREATED) | IN(LIVE_RUNNING) | IN(LIVE_PAUSED) | IN(LIVE_READY) |
                        IN(LIVE_STANDBY) | IN(LIVE_WAITING) | IN(LIVE_PENDING),
        [LIVE_PAUSE] = IN(LIVE_CREATED) | IN(LIVE_RUNNING) | IN(LIVE_PAUSED) | IN(LIVE_READY) |
                       IN(LIVE_STANDBY),
        [LIVE_RESUME] = IN(LIVE_CREATED) | IN(LIVE_RUNNING) | IN(LIVE_PAUSED) | IN(LIVE_READY) |
                        IN(LIVE_STANDBY),
        [LIVE_SET_SPEED] = IN(LIVE_CREATED) | IN(LIVE_RUNNING) | IN(LIVE_PAUSED) | IN(LIVE_READY) |
                           IN(LIVE_STANDBY),
        [LIVE_COMPLETE] = IN(LIVE_READY) | IN(LIVE_STANDBY),
        [LIVE_FINALIZE] = IN(LIVE_PENDING),
        [LIVE_DISMISS] = IN(LIVE_CONCLUDED),
    };
#undef IN
    return in[verb] & (1u << status);
}

static int cancel(struct live_job *job, bool force, struct dr_error *err)
{
    if (job->paused && !force)
        return dr_fail(err, EINVAL, "The block job for device '%s' is currently paused",
                       dr_job_id(job->job));
    if (job->status == LIVE_READY && !force) {
        dr_job_complete(job->job, false); /* the target is a copy of this moment */
        return 0;
    }
    job->cancelled = true;
    dr_job_cancel(job->job);
    return 0;
}

static int pause_job(struct live_job *job, struct dr_error *err)
{
    if (job->paused)
        return dr_fail(err, EINVAL, "Job is already paused");
    pause_running(job);
    job->live->changed = true;
    return 0;
}

static void let_go_on(struct live_job *job)
{
    job->paused = false;
    job->stopped_by = 0;
    job->live->changed = true;
    set_status(job, job->status == LIVE_STANDBY ? LIVE_READY : LIVE_RUNNING);
    dr_job_resume(job->job);
}

static int resume(struct live_job *job, struct dr_error *err)
{
    if (!job->paused)
        return dr_fail(err, EINVAL, "Can't resume a job that was not paused");
    let_go_on(job);
    return 0;
}

static void complete(struct live_job *job)
{
    if (job->paused)
        let_go_on(job);
    dr_job_complete(job->job, true);
}

/* With all of its group. */
static void finalize(struct live_job *job)
{
    job->finalize = true;
    for (struct live_job *other = job->live->jobs; other; other = other->next)
        other->finalize |= live_group_has(job, other);
    live_group_wake(job);
}

int live_job_do(struct live_job *job, enum live_verb verb, bool force, uint64_t speed,
                struct dr_error *err)
{
    static const char *const names[] = {"cancel",   "pause",    "resume", "set-speed",
                                        "complete", "finalize", "dismiss"};
    int r = 0;
    if (!allowed(job->status, verb))
        return dr_fail(err, EINVAL, "Job '%s' in state '%s' cannot accept command verb '%s'",
                       dr_job_id(job->job), live_status_name(job->status), names[verb]);
    switch (verb) {
    case LIVE_CANCEL:
        r = cancel(job, force, err);
        break;
    case LIVE_PAUSE:
        r = pause_job(job, err);
        break;
    case LIVE_RESUME:
        r = resume(job, err);
        break;
    case LIVE_SET_SPEED:
        dr_job_set_rate(job->job, speed);
        job->order.speed = speed;
        job->live->changed = true;
        break;
    case LIVE_COMPLETE:
        complete(job);
        break;
    case LIVE_FINALIZE:
        finalize(job);
        break;
    case LIVE_DISMISS:
        retire(job);
        return 0;
    }
    pthread_cond_broadcast(&job->changed);
    return r;
}

/* ------------------------------------------------------------------ the end */

static struct live_job *take_gone(struct dr_live *live)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_job *job = live->gone;
    if (job)
        live->gone = job->next;
    return job;
}

void live_jobs_reap(struct dr_live *live)
{
    struct live_job *job;
    while ((job = take_gone(live))) {
        pthread_join(job->thread, NULL);
        free_job(job);
    }
}

void live_jobs_stop(struct dr_live *live)
{
    DR_LOCK_SCOPE(&live->lock);
    live->stopping = true;
    for (struct live_job *job = live->jobs; job; job = job->next) {
        job->kept |= !job->cancelled;
        job->stays = true;
        job->cancelled = true;
        dr_job_cancel(job->job);
        pthread_cond_broadcast(&job->changed);
    }
}

/* All stay in the list until the last one has ended: it may write the state. */
void live_jobs_end(struct dr_live *live)
{
    live_jobs_stop(live);
    for (struct live_job *job = live->jobs; job; job = job->next)
        pthread_join(job->thread, NULL);
    for (struct live_job *job = live->jobs, *next; job; job = next) {
        next = job->next;
        free_job(job);
    }
    live->jobs = NULL;
    live_jobs_reap(live);
}
