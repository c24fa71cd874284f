/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Transactions: several commands at one instant, all or none.
 *
 *     in order        check each action as its command would, and as if those before it were done;
 *                     a backup gets its target and its job, which does not begin yet
 *     disks wait      change the bitmaps and begin the backups' instants, in order; bitmaps are
 *                     removed last; what fails undoes what was done
 *     afterwards      the jobs begin, or, if anything has failed, are given up, the last one first
 *
 * Snapshots are taken by an operation of their own, so a transaction has either snapshots or other
 * actions. Texts and the order of events are QEMU's. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "live/live.h"
#include "ops/ops-internal.h"

enum kind { BITMAP, BLOCKDEV_BACKUP, DRIVE_BACKUP, SNAPSHOT, OVERLAY, ABORT };

static const struct type {
    const char *name;
    enum kind kind;
    enum dr_bitmap_action action; /* of BITMAP */
} types[] = {
    {"abort", ABORT, 0},
    {"block-dirty-bitmap-add", BITMAP, DR_BITMAP_ADD},
    {"block-dirty-bitmap-clear", BITMAP, DR_BITMAP_CLEAR},
    {"block-dirty-bitmap-disable", BITMAP, DR_BITMAP_DISABLE},
    {"block-dirty-bitmap-enable", BITMAP, DR_BITMAP_ENABLE},
    {"block-dirty-bitmap-merge", BITMAP, DR_BITMAP_MERGE},
    {"block-dirty-bitmap-remove", BITMAP, DR_BITMAP_REMOVE},
    {"blockdev-backup", BLOCKDEV_BACKUP, 0},
    {"blockdev-snapshot", OVERLAY, 0},
    {"blockdev-snapshot-sync", SNAPSHOT, 0},
    {"drive-backup", DRIVE_BACKUP, 0},
};

struct action {
    const struct type *type;
    json_t *data;
    struct live_change change; /* of BITMAP */
    struct live_ready backup;
};

struct transaction {
    struct dr_live *live;
    struct action *all;
    size_t n;
    struct live_shot *shots;
    size_t n_shots;
    bool grouped;
    unsigned group;
    bool changes; /* a bitmap changes */
    struct live_moment moment;
    size_t quiet; /* disks whose requests wait */
};

/* ------------------------------------------------------------------ the arguments */

static int refuse_type(const char *type, struct qmp_error *err)
{
    bool internal = strcmp(type, "blockdev-snapshot-internal-sync") == 0;
    qmp_fail(err, NULL, "Parameter 'type' does not accept value '%s'%s", type,
             internal ? ": there are no snapshots inside images here" : "");
    return -EINVAL;
}

static const struct qmp_arg *args_of(const struct type *type)
{
    static const struct qmp_arg none[] = {{0}};
    return type->kind == ABORT ? none : qmp_find_command(type->name)->args;
}

static int check_action(json_t *json, size_t i, struct action *action, struct qmp_error *err)
{
    static const struct qmp_arg table[] = {{"type", 's', true}, {"data", 'o', true}, {0}};
    char where[40];
    snprintf(where, sizeof(where), "actions[%zu]", i);
    if (!json_is_object(json)) {
        qmp_fail(err, NULL, "Invalid parameter type for '%s', expected: object", where);
        return -EINVAL;
    }
    snprintf(where, sizeof(where), "actions[%zu].", i);
    int r = qmp_check_args(table, where, json, err);
    const char *name = qmp_string(json, "type");
    action->data = json_object_get(json, "data");
    for (size_t k = 0; r == 0 && k < sizeof(types) / sizeof(types[0]); k++)
        if (strcmp(types[k].name, name) == 0)
            action->type = &types[k];
    if (r < 0 || !action->type)
        return r < 0 ? r : refuse_type(name, err);
    snprintf(where, sizeof(where), "actions[%zu].data.", i);
    return qmp_check_args(args_of(action->type), where, action->data, err);
}

static int check_properties(struct transaction *t, json_t *properties, struct qmp_error *err)
{
    static const struct qmp_arg table[] = {{"completion-mode", 's', false}, {0}};
    if (!properties)
        return 0;
    int r = qmp_check_args(table, "properties.", properties, err);
    const char *mode = qmp_string(properties, "completion-mode");
    if (r < 0 || !mode)
        return r;
    t->grouped = strcmp(mode, "grouped") == 0;
    if (t->grouped || strcmp(mode, "individual") == 0)
        return 0;
    qmp_fail(err, NULL, "Parameter 'completion-mode' does not accept value '%s'", mode);
    return -EINVAL;
}

/* As a whole, before any of it is looked at. */
static int check_all(struct transaction *t, json_t *args, struct qmp_error *err)
{
    const json_t *actions = json_object_get(args, "actions");
    int r = 0;
    for (size_t i = 0; r == 0 && i < t->n; i++)
        r = check_action(json_array_get(actions, i), i, &t->all[i], err);
    return r < 0 ? r : check_properties(t, json_object_get(args, "properties"), err);
}

/* ------------------------------------------------------------------ each in order */

static int read_backup(struct transaction *t, struct action *a, struct qmp_error *err)
{
    bool node = a->type->kind == BLOCKDEV_BACKUP;
    if (qmp_string(a->data, "x-set") || qmp_string(a->data, "x-bitmap")) {
        qmp_fail(err, NULL, "A backup with 'x-set' or 'x-bitmap' is no part of a transaction");
        return -EINVAL;
    }
    int r = live_ready_backup(t->live, a->data, node, t->changes, &a->backup, err);
    if (r == 0) {
        DR_LOCK_SCOPE(&t->live->lock);
        a->backup.job->group = t->group;
    }
    return r;
}

static int read_snapshot(struct transaction *t, struct action *a, struct qmp_error *err)
{
    int r = a->type->kind == OVERLAY
                ? live_read_overlay(t->live, a->data, t->shots, t->n_shots, err)
                : live_read_shot(t->live, a->data, &t->shots[t->n_shots], err);
    t->n_shots++;
    return r;
}

static int read_action(struct transaction *t, struct action *a, struct qmp_error *err)
{
    enum kind kind = a->type->kind;
    if (kind == ABORT) {
        qmp_fail(err, NULL, "Transaction aborted using Abort action");
        return -EINVAL;
    }
    if (t->grouped && kind != BLOCKDEV_BACKUP && kind != DRIVE_BACKUP) {
        qmp_fail(err, NULL,
                 "Action '%s' does not support Transaction property completion-mode = grouped",
                 a->type->name);
        return -EINVAL;
    }
    if (kind == SNAPSHOT || kind == OVERLAY)
        return read_snapshot(t, a, err);
    if (kind != BITMAP)
        return read_backup(t, a, err);
    t->changes = true;
    return live_read_change(t->live, a->type->action, a->data, true, &a->change, err);
}

/* ------------------------------------------------------------------ the disks that wait */

static int add_disk(struct transaction *t, struct live_disk *on, bool stored, struct qmp_error *err)
{
    struct live_moment *m = &t->moment;
    size_t i = 0;
    while (i < m->n && m->all[i].on != on)
        i++;
    if (i == m->n) {
        void *more = realloc(m->all, (m->n + 1) * sizeof(*m->all));
        if (!more)
            return dr_fail(&err->text, ENOMEM, "out of memory for a transaction");
        m->all = more;
        m->all[m->n++] = (struct live_held){.on = on};
    }
    m->all[i].stored |= stored;
    return 0;
}

static int add_disks(struct transaction *t, const struct action *a, struct qmp_error *err)
{
    if (a->type->kind != BITMAP)
        return add_disk(t, a->backup.on, false, err);
    int r = add_disk(t, a->change.on, a->change.stored, err);
    for (size_t i = 0; r == 0 && i < a->change.n_sources; i++)
        r = add_disk(t, a->change.sources[i].on, false, err);
    return r;
}

/* Those whose images keep bitmaps that change come first: they wait for flushes at work, and so do
 * the requests of all disks that are held already. */
static int stored_first(const void *a, const void *b)
{
    const struct live_held *x = a, *y = b;
    return y->stored - x->stored;
}

static bool is_claimed(const struct transaction *t, const struct live_disk *on)
{
    for (size_t i = 0; i < t->n; i++)
        if (t->all[i].backup.point && t->all[i].backup.on == on)
            return true;
    return false;
}

/* Nobody else holds the requests of two of the disks at once, in another order, nor changes the
 * bitmaps of images. */
static int borrow_disks(struct transaction *t, struct qmp_error *err)
{
    struct live_moment *m = &t->moment;
    int r = 0;
    for (size_t i = 0; r == 0 && i < m->n; i++) {
        struct live_held *h = &m->all[i];
        if (is_claimed(t, h->on) || (m->n == 1 && !h->stored))
            continue;
        r = dr_disk_borrow(h->on->disk, "bitmap", &err->text);
        h->borrowed = r == 0;
    }
    return r;
}

static void return_disks(const struct transaction *t)
{
    for (size_t i = 0; i < t->moment.n; i++)
        if (t->moment.all[i].borrowed)
            dr_disk_unborrow(t->moment.all[i].on->disk);
}

/* ------------------------------------------------------------------ the instant */

static bool is_removal(const struct action *a)
{
    return a->type->kind == BITMAP && a->change.action == DR_BITMAP_REMOVE;
}

static struct dr_chain *chain_of(const struct transaction *t, const struct live_disk *on)
{
    const struct live_held *h = t->moment.all;
    while (h->on != on)
        h++;
    return h->chain;
}

static int do_action(struct transaction *t, struct action *a, struct dr_error *err)
{
    struct live_disk *on = a->backup.on;
    return a->type->kind == BITMAP ? live_change_quiet(&a->change, &t->moment, err)
                                   : dr_point_now_quiet(a->backup.point, chain_of(t, on), err);
}

/* What cannot be undone is added to the text. */
static void undo_all(struct transaction *t, int r, struct dr_error *err)
{
    for (size_t i = t->n; i-- > 0;) {
        struct live_change *c = &t->all[i].change;
        struct dr_error why = DR_ERROR_INIT;
        if (t->all[i].type->kind == BITMAP && live_change_undo(c, &t->moment, &why) < 0)
            dr_prefix(err, r, "bitmap '%s' could not be put back (%s)", c->name, why.text);
    }
}

/* Removals last, first those of bitmaps that images keep: the others cannot fail. */
static int do_all(struct transaction *t, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < t->n; i++)
        if (!is_removal(&t->all[i]))
            r = do_action(t, &t->all[i], err);
    for (int stored = 1; stored >= 0; stored--)
        for (size_t i = 0; r == 0 && i < t->n; i++)
            if (is_removal(&t->all[i]) && t->all[i].change.stored == stored)
                r = do_action(t, &t->all[i], err);
    if (r < 0)
        undo_all(t, r, err);
    return r;
}

static int hold_next(struct transaction *t, struct dr_error *err);

/* Each disk's step holds the next one's requests, too. */
static int quiet_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct transaction *t = user;
    (void)fresh;
    t->moment.all[t->quiet++].chain = present;
    return t->quiet < t->moment.n ? hold_next(t, err) : do_all(t, err);
}

static int hold_next(struct transaction *t, struct dr_error *err)
{
    const struct live_held *h = &t->moment.all[t->quiet];
    return h->stored ? dr_disk_quiesce_unflushed(h->on->disk, quiet_step, t, NULL, err)
                     : dr_disk_exchange(h->on->disk, quiet_step, t, NULL, err);
}

/* Flushing first leaves little to do while requests wait. */
static int do_at_once(struct transaction *t, struct dr_error *err)
{
    struct live_moment *m = &t->moment;
    int r = 0;
    qsort(m->all, m->n, sizeof(*m->all), stored_first);
    for (size_t i = 0; r == 0 && i < m->n; i++)
        if (m->all[i].stored)
            r = dr_disk_flush(m->all[i].on->disk, err);
    return r < 0 ? r : hold_next(t, err);
}

/* ------------------------------------------------------------------ beginning, or giving up */

static void start_jobs(const struct transaction *t)
{
    for (size_t i = 0; i < t->n; i++)
        if (t->all[i].backup.point)
            dr_disk_lend(t->all[i].backup.on->disk);
    DR_LOCK_SCOPE(&t->live->lock);
    for (size_t i = 0; i < t->n; i++)
        if (t->all[i].backup.point)
            live_job_start(t->all[i].backup.job);
}

static void drop_jobs(const struct transaction *t)
{
    for (size_t i = t->n; i-- > 0;) {
        const struct live_ready *b = &t->all[i].backup;
        if (!b->point)
            continue;
        pthread_mutex_lock(&t->live->lock);
        b->job->order.point = NULL;
        live_job_drop(b->job);
        pthread_mutex_unlock(&t->live->lock);
        dr_point_free(b->point);
    }
}

static int carry_out(struct transaction *t, struct qmp_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < t->n; i++)
        r = add_disks(t, &t->all[i], err);
    if (r == 0)
        r = borrow_disks(t, err);
    if (r == 0)
        r = do_at_once(t, &err->text);
    return_disks(t);
    return r;
}

/* Both kinds are there, or a disk is to have a snapshot that waits for its own. */
static int check_mixture(const struct transaction *t, struct qmp_error *err)
{
    if (t->n_shots == 0 || t->n_shots == t->n)
        return 0;
    qmp_fail(err, NULL,
             "A transaction of snapshots has no other actions here: send two transactions");
    return -EINVAL;
}

static json_t *run(struct transaction *t, struct qmp_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < t->n; i++)
        r = read_action(t, &t->all[i], err);
    if (r == 0)
        r = check_mixture(t, err);
    if (r == 0 && t->n > 0 && t->n_shots == t->n)
        return live_take_shots(t->live, t->shots, t->n_shots, err);
    if (r == 0 && t->n > 0)
        r = carry_out(t, err);
    if (r < 0)
        drop_jobs(t);
    else
        start_jobs(t);
    return qmp_done(r);
}

static json_t *transaction(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct transaction t = {.live = live, .n = json_array_size(json_object_get(args, "actions"))};
    t.all = calloc(t.n + 1, sizeof(*t.all));
    t.shots = calloc(t.n + 1, sizeof(*t.shots));
    json_t *result = NULL;
    if (!t.all || !t.shots)
        qmp_fail(err, NULL, "out of memory");
    else if (check_all(&t, args, err) == 0) {
        t.group = t.grouped ? ++live->groups : 0;
        result = run(&t, err);
        live_forget_plans(live);
    }
    for (size_t i = 0; t.all && i < t.n; i++)
        live_change_free(&t.all[i].change);
    for (size_t i = 0; t.shots && i < t.n_shots; i++)
        free(t.shots[i].path);
    free(t.moment.all);
    free(t.shots);
    free(t.all);
    return result;
}

const struct qmp_command qmp_transaction_commands[] = {
    {"transaction", transaction, {{"actions", 'l', true}, {"properties", 'o', false}}},
    {0},
};
