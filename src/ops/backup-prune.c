/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* prune: all but the newest backups of a series leave their set.
 *
 * Those that leave and stand on each other are one step (backup-merge.h). The set marks them as
 * leaving before anything of them changes: from then on they are no backups, and nobody takes what
 * is left of them for one. The set forgets them when their files are gone. A prune first of all
 * finishes what it finds marked, so an interrupted one is done again. */
#include "base/cleanup.h"
#include "ops/backup-merge.h"
#include "ops/backup-naming.h"

struct prune {
    struct dr_fs *fs;
    const char *path; /* of the set */
    const struct dr_prune_options *o;
    struct dr_job *job;
    struct dr_backup_set set;
    bool *goes; /* of each in the set */
    size_t told;
};

/* ------------------------------------------------------------------ which ones */

static bool same_text(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) == 0 : a == b;
}

static bool same_series(const struct dr_backup_entry *a, const struct dr_backup_entry *b)
{
    return same_text(a->disk, b->disk) && same_text(a->bitmap, b->bitmap) &&
           dr_set_in_archive(a) == dr_set_in_archive(b);
}

/* In the series of the backup like, or of one of the disks in its archive? */
static bool is_like(const struct dr_backup_set *s, const struct dr_backup_entry *like,
                    const struct dr_backup_entry *e)
{
    bool is = !like;
    for (size_t i = 0; !is && i < s->n; i++)
        is = (&s->all[i] == like || dr_set_same_archive(like, &s->all[i])) &&
             same_series(&s->all[i], e);
    return is;
}

/* An archive goes when all of its disks go. */
static void keep_whole_archives(struct prune *p)
{
    const struct dr_backup_set *s = &p->set;
    for (size_t i = 0; i < s->n; i++)
        for (size_t k = 0; !p->goes[i] && k < s->n; k++)
            if (dr_set_same_archive(&s->all[i], &s->all[k]))
                p->goes[k] = false;
}

/* Is its file there, and are those that it stands on? there: of the entries before it. */
static bool is_there(const struct prune *p, const bool *there, size_t at)
{
    const struct dr_backup_set *s = &p->set;
    const struct dr_backup_entry *e = &s->all[at];
    const struct dr_backup_entry *parent = e->parent ? dr_set_find(s, e->parent) : NULL;
    if (e->parent && (!parent || parent >= e || !there[parent - s->all]))
        return false;
    CLEANUP_FREE char *file = dr_set_main_file(p->fs, p->path, e);
    return file && dr_fs_exists(p->fs, file);
}

/* Which ones count among those that are kept? One that was found damaged, or whose image somebody
 * has removed, does not make an older one dispensable, and neither does one that stands on such. */
static void find_good(const struct prune *p, bool *good)
{
    const struct dr_backup_set *s = &p->set;
    for (size_t i = 0; i < s->n; i++)
        good[i] = is_there(p, good, i);
    for (size_t i = 0; i < s->n; i++)
        good[i] &= !s->all[i].leaving && !dr_set_damaged(s, &s->all[i]);
}

/* n older ones would have gone by their number alone. */
static void tell_kept(const struct prune *p, size_t n)
{
    if (n > 0)
        dr_job_message(p->job,
                       "%s: %zu more backup%s kept: newer ones are damaged or gone (see "
                       "`drover backup list`)",
                       p->path, n, n == 1 ? " is" : "s are");
}

static int choose(struct prune *p, bool marked, struct dr_error *err)
{
    size_t spared = 0;
    const struct dr_backup_set *s = &p->set;
    const struct dr_backup_entry *like = p->o->like ? dr_set_find(s, p->o->like) : NULL;
    CLEANUP_FREE bool *good = calloc(s->n + 1, sizeof(*good));
    p->goes = calloc(s->n + 1, sizeof(*p->goes));
    if (!p->goes || !good)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    if (p->o->like && !like)
        return dr_fail(err, ENOENT, "%s: has no backup called \"%s\"", p->path, p->o->like);
    find_good(p, good);
    for (size_t i = 0; i < s->n; i++) {
        const struct dr_backup_entry *e = &s->all[i];
        size_t newer = 0, bad = 0;
        for (size_t k = i + 1; k < s->n; k++)
            if (!s->all[k].leaving && same_series(&s->all[k], e))
                *(good[k] ? &newer : &bad) += 1;
        if (e->naming)
            return dr_fail(err, EBUSY,
                           "%s: its backup \"%s\" is being made, or was interrupted and cannot be "
                           "settled now",
                           p->path, e->name);
        p->goes[i] = e->leaving || (!marked && newer >= p->o->keep && is_like(s, like, e));
        spared += !marked && !p->goes[i] && newer + bad >= p->o->keep && is_like(s, like, e);
    }
    tell_kept(p, spared);
    keep_whole_archives(p);
    return 0;
}

/* The one that stands on entry at, or n: there is none. */
static int child_of(const struct prune *p, size_t at, size_t *child, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    *child = s->n;
    for (size_t i = 0; i < s->n; i++) {
        if (!s->all[i].parent || strcmp(s->all[i].parent, s->all[at].name) != 0)
            continue;
        if (*child < s->n)
            return dr_fail(err, EBUSY, "%s: both \"%s\" and \"%s\" stand on the backup \"%s\"",
                           p->path, s->all[*child].name, s->all[i].name, s->all[at].name);
        *child = i;
    }
    return 0;
}

/* Those that go and stand on each other, from entry at down. */
static int collect(const struct prune *p, size_t at, struct dr_merge *m, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    const struct dr_backup_entry *e = &s->all[at], *above = NULL;
    if (dr_set_in_archive(e)) {
        for (size_t i = 0; i < s->n; i++)
            if (dr_set_same_archive(e, &s->all[i]))
                m->gone[m->n++] = &s->all[i];
        return 0;
    }
    while (e) {
        size_t here = (size_t)(e - s->all), child;
        int r = child_of(p, here, &child, err);
        if (r < 0)
            return r;
        if (above && !p->goes[here])
            return dr_fail(err, EINVAL, "%s: \"%s\" would go, and stands on \"%s\", which is kept",
                           p->path, above->name, e->name);
        if (m->n == s->n)
            return dr_fail(err, EINVAL, "%s: the backup \"%s\" stands on itself", p->path, e->name);
        m->gone[m->n++] = above = e;
        e = e->parent ? dr_set_find(s, e->parent) : NULL;
    }
    return 0;
}

/* ------------------------------------------------------------------ one step */

/* The entry as it is now; NULL: it is not there any more, or another prune has marked it. */
static struct dr_backup_entry *still(struct dr_backup_set *s, const struct dr_backup_entry *seen)
{
    for (size_t k = 0; k < s->n; k++)
        if (strcmp(s->all[k].name, seen->name) == 0 &&
            strcmp(s->all[k].digest, seen->digest) == 0 && strcmp(s->all[k].file, seen->file) == 0)
            return !s->all[k].leaving == !seen->leaving ? &s->all[k] : NULL;
    return NULL;
}

/* Two prunes at once that keep different numbers must not merge into each other's files. */
static int mark_step(void *user, struct dr_backup_set *s, struct dr_error *err)
{
    const struct dr_merge *m = user;
    int changed = 0;
    if (m->into && !still(s, m->into))
        return dr_fail(err, ESTALE, "%s: somebody else has changed it meanwhile", m->set);
    for (size_t i = 0; i < m->n; i++) {
        struct dr_backup_entry *e = still(s, m->gone[i]);
        if (!e)
            return dr_fail(err, ESTALE, "%s: somebody else has changed it meanwhile", m->set);
        if (e->leaving)
            continue;
        e->leaving = dr_set_copy_files(m->files[i]);
        if (!e->leaving)
            return dr_fail(err, ENOMEM, "%s: out of memory", m->set);
        changed = 1;
    }
    return changed;
}

static int tell(const struct prune *p, const struct dr_merge *m, struct dr_error *err)
{
    CLEANUP_FREE const char **names = calloc(m->n, sizeof(*names));
    if (!names)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    for (size_t i = 0; i < m->n; i++)
        names[i] = m->gone[i]->name;
    const struct dr_prune_step step = {.names = names,
                                       .n = m->n,
                                       .into = m->into ? m->into->name : NULL,
                                       .copied = m->copied,
                                       .freed = m->freed,
                                       .verified = m->verified};
    if (p->o->tell)
        p->o->tell(p->o->user, &step);
    return 0;
}

static int do_step(struct prune *p, struct dr_merge *m, struct dr_error *err)
{
    int r = dr_merge_look(m, !p->o->dry_run, err);
    if (r == 0 && !p->o->dry_run) {
        if (!p->o->no_verify)
            r = dr_merge_verify_kept(m, err);
        if (r == 0)
            r = dr_set_change(p->fs, p->path, mark_step, m, err);
        if (r == 0)
            r = dr_merge_copy(m, err);
        if (r == 0 && !p->o->no_verify)
            r = dr_merge_verify_merged(m, err);
        if (r == 0)
            r = dr_merge_finish(m, err);
    }
    if (r == 0)
        r = tell(p, m, err);
    p->told++;
    dr_merge_end(m);
    return r;
}

/* The step whose newest backup is entry at, if one begins there. */
static int step_at(struct prune *p, size_t at, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    size_t child;
    int r = child_of(p, at, &child, err);
    if (r < 0 || (child < s->n && p->goes[child]))
        return r;
    for (size_t i = 0; i < at; i++) /* the step of the archive's first disk is that of all */
        if (dr_set_same_archive(&s->all[i], &s->all[at]))
            return 0;
    CLEANUP_FREE const struct dr_backup_entry **gone = calloc(s->n, sizeof(*gone));
    struct dr_merge m = {.fs = p->fs,
                         .set = p->path,
                         .open = &p->o->open,
                         .job = p->job,
                         .gone = gone,
                         .into = child < s->n ? &s->all[child] : NULL};
    if (!gone)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    r = collect(p, at, &m, err);
    return r < 0 ? r : do_step(p, &m, err);
}

/* marked: only what an interrupted prune has marked. */
static int all_steps(struct prune *p, bool marked, struct dr_error *err)
{
    int r = dr_set_load(&p->set, p->fs, p->path, err);
    if (r == 0)
        r = choose(p, marked, err);
    for (size_t i = 0; r == 0 && i < p->set.n; i++)
        if (p->goes[i])
            r = step_at(p, i, err);
    free(DR_STEAL(p->goes));
    dr_set_free(&p->set);
    return r;
}

/* What is marked comes first, as it was marked: its merge may be done already. */
int dr_backup_prune_fs(struct dr_fs *fs, const char *set, const struct dr_prune_options *options,
                       struct dr_job *job, struct dr_error *err)
{
    struct prune p = {.fs = fs, .path = set, .o = options, .job = job};
    if (options->keep == 0)
        return dr_fail(err, EINVAL, "%s: at least one backup of each series must be kept", set);
    if (!dr_fs_exists(fs, set))
        return dr_fail(err, ENOENT, "%s: there is no such list of backups", set);
    int r = options->dry_run ? 0 : dr_naming_settle(fs, set, &options->open, job, err);
    if (r == 0)
        r = all_steps(&p, true, err);
    if (r == 0 && !(options->dry_run && p.told > 0)) /* what comes after that is not known yet */
        r = all_steps(&p, false, err);
    return r;
}

int dr_backup_prune(const char *set, const struct dr_prune_options *options, struct dr_job *job,
                    struct dr_error *err)
{
    DR_REQUIRE(set, err);
    DR_REQUIRE(options, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_backup_prune_fs(dr_fs_posix(), set, options, job, err));
}
