/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-naming.h"

#include <inttypes.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/backup-sums.h"
#include "ops/ops-internal.h"

/* A rename keeps all of these. */
int dr_naming_mark(struct dr_fs *fs, const char *path, uint64_t group, char **mark,
                   struct dr_error *err)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    struct dr_file_stamp stamp;
    *mark = NULL;
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, err);
    if (r == 0)
        r = dr_file_stamp(file, true, &stamp, err);
    if (r == 0 && asprintf(mark, "%" PRIx64 ".%" PRIx64 ".%" PRIx64 ".%" PRIx64, stamp.ino,
                           stamp.size, stamp.mtime, group) < 0) {
        *mark = NULL;
        r = dr_fail(err, ENOMEM, "%s: out of memory", path);
    }
    return r;
}

/* ------------------------------------------------------------------ by the maker */

static int check_names(const struct dr_backup_set *s, const char *set,
                       const struct dr_backup_entry *entries, size_t n, struct dr_error *err)
{
    for (size_t i = 0; i < n; i++) {
        const char *parent = entries[i].parent;
        if (dr_set_find(s, entries[i].name))
            return dr_fail(err, EEXIST, "%s: has a backup called \"%s\" already", set,
                           entries[i].name);
        if (parent && !dr_set_find(s, parent))
            return dr_fail(err, ESTALE,
                           "%s: the backup \"%s\", which this one stands on, is not in it any more",
                           set, parent);
    }
    return 0;
}

static int announce(struct dr_naming *g, struct dr_error *err)
{
    struct dr_backup_set s;
    bool written = false;
    g->made = !g->held.file;
    if (g->made && g->had) /* a new one would not have the backups that it listed */
        return dr_fail(
            err, ESTALE,
            "%s: is gone since this backup began, and with it the list of the others: put "
            "it back",
            g->held.path);
    int r = dr_set_read_held(&g->held, &s, err);
    if (r == 0)
        r = check_names(&s, g->held.path, g->entries, g->n, err);
    if (r == 0)
        r = dr_set_write_held(&g->held, &s, g->entries, g->n, &written, err);
    if (r < 0 && written) /* not durably */
        dr_naming_withdraw(g);
    dr_set_free(&s);
    return r;
}

/* Two first backups may make the set at the same time: the second one adds to it. */
int dr_naming_announce(struct dr_naming *g, struct dr_fs *fs, const char *set, bool had,
                       const struct dr_backup_entry *entries, size_t n, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    bool again = true;
    int r = 0;
    while (again) {
        dr_error_reset(&why);
        *g = (struct dr_naming){.entries = entries, .n = n, .had = had};
        r = dr_set_hold(&g->held, fs, set, &why);
        if (r == 0)
            r = announce(g, &why);
        if (r < 0)
            dr_naming_end(g);
        again = r == -EEXIST && g->made && dr_fs_exists(fs, set);
    }
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

static bool is_announced(const struct dr_naming *g, const struct dr_backup_entry *e)
{
    bool same = false;
    for (size_t i = 0; e->naming && !same && i < g->n; i++)
        same = strcmp(g->entries[i].name, e->name) == 0;
    return same;
}

int dr_naming_confirm(struct dr_naming *g, struct dr_error *err)
{
    struct dr_backup_set s;
    int r = dr_set_read_held(&g->held, &s, err);
    for (size_t i = 0; r == 0 && i < s.n; i++)
        if (is_announced(g, &s.all[i]))
            free(DR_STEAL(s.all[i].naming));
    if (r == 0)
        r = dr_set_write_held(&g->held, &s, NULL, 0, &g->confirmed, err);
    dr_set_free(&s);
    return r;
}

/* Where the set cannot be written, the next backup finds that the files are not there. */
void dr_naming_withdraw(struct dr_naming *g)
{
    struct dr_backup_set s;
    if (!g->held.file)
        return;
    if (dr_set_read_held(&g->held, &s, NULL) == 0) {
        for (size_t i = s.n; i > 0; i--)
            if (is_announced(g, &s.all[i - 1]))
                dr_set_drop(&s, &s.all[i - 1]);
        if (g->made && s.n == 0)
            g->held.fs->ops->unlink(g->held.fs, g->held.path, NULL);
        else
            dr_set_write_held(&g->held, &s, NULL, 0, NULL, NULL);
    }
    dr_set_free(&s);
}

void dr_naming_end(struct dr_naming *g)
{
    dr_set_release(&g->held);
}

/* ------------------------------------------------------------------ by others, later */

/* The fourth part of a mark, with its dot; "": it has none. */
static const char *group_of(const char *mark)
{
    for (unsigned i = 0; i < 3 && *mark; i++)
        mark += strcspn(mark + (i > 0), ".") + (i > 0);
    return mark;
}

enum state {
    THERE,   /* it has its name */
    MISSING, /* nothing has its name */
    OTHER,   /* another file has */
    UNKNOWN, /* it cannot be told now */
};

struct settling {
    struct dr_fs *fs;
    const char *set;
    struct dr_open_options open;
    struct dr_job *job;
};

static bool is_left(struct dr_fs *fs, const char *path)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    return dr_file_open(fs, path, DR_FILE_RDWR, &file, NULL) == 0;
}

/* An archive and its checksums are written aside, and locked. */
static void remove_asides(struct dr_fs *fs, const char *path)
{
    CLEANUP_FREE char *sums = dr_sums_path(path);
    dr_ops_remove_asides(fs, path, is_left);
    if (sums)
        dr_ops_remove_asides(fs, sums, is_left);
}

/* Files of an image that had begun to get their names go on, so that the last one has it, too. */
static enum state look(const struct settling *g, const struct dr_backup_entry *e, const char *path)
{
    CLEANUP_FREE char *mark = NULL;
    if (dr_gate_check_new(g->fs, g->set, path, &g->open, NULL) < 0)
        return UNKNOWN;
    if (!(g->open.flags & DR_OPEN_NO_LOCK)) {
        dr_new_settle_others(g->fs, path);
        if (dr_set_in_archive(e))
            remove_asides(g->fs, path);
    }
    int r = dr_naming_mark(g->fs, path, 0, &mark, NULL);
    if (r < 0 || !mark)
        return r == -ENOENT ? MISSING : UNKNOWN;
    size_t len = (size_t)(group_of(mark) - mark);
    return (size_t)(group_of(e->naming) - e->naming) == len && strncmp(mark, e->naming, len) == 0
               ? THERE
               : OTHER;
}

/* Nothing has the image's name: its side file, if it is its own, is of no use. */
static void remove_sums(const struct settling *g, const struct dr_backup_entry *e, const char *path)
{
    CLEANUP_FREE char *side = dr_sums_path(path);
    struct dr_sums sums;
    char digest[DR_DIGEST_TEXT];
    if (!side || dr_sums_load(&sums, g->fs, side, NULL) < 0)
        return;
    dr_sums_digest(&sums, digest);
    if (strcmp(digest, e->digest) == 0 && !dr_fs_exists(g->fs, path))
        g->fs->ops->unlink(g->fs, side, NULL);
    dr_sums_end(&sums);
}

/* False: it could not be. */
static bool remove_all(const struct settling *g, const struct dr_backup_entry *e, const char *path)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_set_in_archive(e)
                ? dr_set_remove_archive(g->fs, path, &why)
                : dr_ops_remove_image(g->fs, path, e->format, &g->open, NULL, NULL, &why);
    if (r < 0)
        dr_job_message(g->job, "%s: left by an interrupted backup, and cannot be removed: %s", path,
                       why.text);
    else
        dr_job_message(g->job, "%s: left by an interrupted backup: removed", path);
    if (r == 0)
        remove_sums(g, e, path);
    return r == 0;
}

/* True: the set is to forget it. */
static bool give_up(const struct settling *g, const struct dr_backup_entry *e, enum state state,
                    const char *path)
{
    switch (state) {
    case THERE:
        return remove_all(g, e, path);
    case MISSING:
        remove_sums(g, e, path);
        return true;
    case OTHER:
        dr_job_message(g->job,
                       "%s: is not, or not any more, what an interrupted backup had made: it is no "
                       "backup of %s, and left alone",
                       path, g->set);
        return true;
    case UNKNOWN:
        dr_job_message(g->job,
                       "%s: a backup to it was interrupted, and whether it is there cannot be told",
                       path);
        break;
    }
    return false;
}

/* Were both announced together? Two backups may begin in the same second. Sets of before have no
 * groups. */
static bool are_together(const struct dr_backup_entry *a, const struct dr_backup_entry *b)
{
    const char *group = group_of(a->naming);
    return strcmp(group, group_of(b->naming)) == 0 && (*group || strcmp(a->time, b->time) == 0);
}

static bool are_all_there(const struct dr_backup_set *s, const enum state *states,
                          const struct dr_backup_entry *e)
{
    bool all = true;
    for (size_t i = 0; all && i < s->n; i++)
        all = !s->all[i].naming || !are_together(&s->all[i], e) || states[i] == THERE;
    return all;
}

static int settle_all(const struct settling *g, struct dr_backup_set *s, char **paths,
                      enum state *states, bool *takes)
{
    int changed = 0;
    for (size_t i = 0; i < s->n; i++)
        if (s->all[i].naming)
            states[i] = look(g, &s->all[i], paths[i]);
    for (size_t i = 0; i < s->n; i++) /* those of one instant belong together */
        takes[i] = s->all[i].naming && are_all_there(s, states, &s->all[i]);
    for (size_t i = s->n; i-- > 0;) {
        struct dr_backup_entry *e = &s->all[i];
        if (takes[i]) {
            free(DR_STEAL(e->naming));
            dr_job_message(g->job,
                           "%s: its backup was interrupted when it was complete: it is one of %s "
                           "now",
                           paths[i], g->set);
            changed = 1;
        } else if (e->naming && give_up(g, e, states[i], paths[i])) {
            dr_set_drop(s, e);
            changed = 1;
        }
    }
    return changed;
}

static int settle(void *user, struct dr_backup_set *s, struct dr_error *err)
{
    const struct settling *g = user;
    const size_t n = s->n;
    char **paths = calloc(n + 1, sizeof(*paths));
    CLEANUP_FREE enum state *states = calloc(n + 1, sizeof(*states));
    CLEANUP_FREE bool *takes = calloc(n + 1, sizeof(*takes));
    bool enough = paths && states && takes;
    for (size_t i = 0; enough && i < n; i++)
        enough = (paths[i] = dr_set_main_file(g->fs, g->set, &s->all[i]));
    int r = enough ? settle_all(g, s, paths, states, takes)
                   : dr_fail(err, ENOMEM, "%s: out of memory", g->set);
    for (size_t i = 0; paths && i < n; i++)
        free(paths[i]);
    free(paths);
    return r;
}

static bool any_marked(struct dr_fs *fs, const char *set)
{
    struct dr_backup_set s;
    bool any = false;
    if (dr_set_load(&s, fs, set, NULL) < 0)
        return false; /* its reader will say why */
    for (size_t i = 0; !any && i < s.n; i++)
        any = s.all[i].naming;
    dr_set_free(&s);
    return any;
}

int dr_naming_settle(struct dr_fs *fs, const char *set, const struct dr_open_options *open,
                     struct dr_job *job, struct dr_error *err)
{
    struct settling g = {.fs = fs, .set = set, .job = job};
    if (open) {
        g.open.allow_paths = open->allow_paths;
        g.open.flags = open->flags & (DR_OPEN_NO_LOCK | DR_OPEN_NO_FLUSH | DR_OPEN_ANY_PATH);
    }
    return any_marked(fs, set) ? dr_set_change(fs, set, settle, &g, err) : 0;
}
