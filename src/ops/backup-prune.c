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
    struct link *links;
    size_t told;
};

/* Of each in the set, by their numbers; as many as there are = none. */
struct link {
    size_t parent, child, other; /* other: a second child */
};

/* ------------------------------------------------------------------ what belongs together
 *
 * A set may have very many backups: each is looked at a few times, not once for each other one. */

static int by_address(const struct dr_backup_entry *a, const struct dr_backup_entry *b)
{
    return (a > b) - (a < b);
}

static int by_text(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) : (a != NULL) - (b != NULL);
}

static int by_name(const void *a, const void *b)
{
    const struct dr_backup_entry *x = *(void *const *)a, *y = *(void *const *)b;
    int order = strcmp(x->name, y->name);
    return order ? order : by_address(x, y);
}

static int by_series(const void *a, const void *b)
{
    const struct dr_backup_entry *x = *(void *const *)a, *y = *(void *const *)b;
    int order = by_text(x->disk, y->disk);
    if (order == 0)
        order = by_text(x->bitmap, y->bitmap);
    return order ? order : dr_set_in_archive(x) - dr_set_in_archive(y);
}

/* Each that is in none is alone. */
static int by_archive(const void *a, const void *b)
{
    const struct dr_backup_entry *x = *(void *const *)a, *y = *(void *const *)b;
    if (dr_set_same_archive(x, y))
        return 0;
    int order = dr_set_in_archive(x) - dr_set_in_archive(y);
    if (order == 0 && dr_set_in_archive(x)) {
        const char *end_x = strrchr(x->file, '#'), *end_y = strrchr(y->file, '#');
        size_t len_x = end_x ? (size_t)(end_x - x->file) : 0;
        size_t len_y = end_y ? (size_t)(end_y - y->file) : 0;
        order = strncmp(x->file, y->file, dr_min(len_x, len_y));
        order = order ? order : (len_x > len_y) - (len_x < len_y);
    }
    return order ? order : by_address(x, y);
}

/* Malloc'ed, NULL = out of memory. */
static const struct dr_backup_entry **sort(const struct dr_backup_set *s,
                                           int (*order)(const void *, const void *))
{
    const struct dr_backup_entry **all = calloc(s->n + 1, sizeof(*all));
    for (size_t i = 0; all && i < s->n; i++)
        all[i] = &s->all[i];
    if (all)
        qsort(all, s->n, sizeof(*all), order);
    return all;
}

/* The number of each one's group: that of one of its members. Malloc'ed, NULL = out of memory. */
static size_t *group(const struct dr_backup_set *s, int (*order)(const void *, const void *))
{
    CLEANUP_FREE const struct dr_backup_entry **all = sort(s, order);
    size_t *numbers = calloc(s->n + 1, sizeof(*numbers));
    if (!all) {
        free(numbers);
        return NULL;
    }
    for (size_t i = 0; numbers && i < s->n; i++) {
        bool same = i > 0 && order(&all[i - 1], &all[i]) == 0;
        size_t at = (size_t)(all[i] - s->all);
        numbers[at] = same ? numbers[all[i - 1] - s->all] : at;
    }
    return numbers;
}

/* The first of this name, or as many as there are. */
static size_t find_sorted(const struct dr_backup_set *s, const struct dr_backup_entry *const *all,
                          const char *name)
{
    size_t low = 0, high = s->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (strcmp(all[middle]->name, name) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low < s->n && strcmp(all[low]->name, name) == 0 ? (size_t)(all[low] - s->all) : s->n;
}

static int link_all(struct prune *p, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    CLEANUP_FREE const struct dr_backup_entry **all = sort(s, by_name);
    struct link *l = p->links = calloc(s->n + 1, sizeof(*p->links));
    if (!all || !l)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    for (size_t i = 0; i < s->n; i++)
        l[i] = (struct link){s->n, s->n, s->n};
    for (size_t i = 0; i < s->n; i++) {
        size_t at = l[i].parent = s->all[i].parent ? find_sorted(s, all, s->all[i].parent) : s->n;
        if (at < s->n)
            *(l[at].child == s->n ? &l[at].child : &l[at].other) = i;
    }
    return 0;
}

/* ------------------------------------------------------------------ which ones */

/* An archive goes when all of its disks go. */
static int keep_whole_archives(struct prune *p, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    CLEANUP_FREE size_t *archive = group(s, by_archive);
    CLEANUP_FREE bool *stays = calloc(s->n + 1, sizeof(*stays));
    if (!archive || !stays)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    for (size_t i = 0; i < s->n; i++)
        stays[archive[i]] |= !p->goes[i];
    for (size_t i = 0; i < s->n; i++)
        p->goes[i] &= !stays[archive[i]];
    return 0;
}

/* Which ones count among those that are kept? One that was found damaged, or whose image somebody
 * has removed, does not make an older one dispensable, and neither does one that stands on such. */
static int find_good(const struct prune *p, bool *good, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    CLEANUP_FREE bool *there = calloc(s->n + 1, sizeof(*there));
    CLEANUP_FREE bool *sound = calloc(s->n + 1, sizeof(*sound));
    if (!there || !sound)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    for (size_t i = 0; i < s->n; i++) { /* parents come before */
        const struct dr_backup_entry *e = &s->all[i];
        size_t parent = p->links[i].parent;
        CLEANUP_FREE char *file = dr_set_main_file(p->fs, p->path, e);
        there[i] = (!e->parent || (parent < i && there[parent])) && file &&
                   dr_fs_exists(p->fs, file);
        sound[i] = !e->damaged && (e->verified || !e->parent || (parent < i && sound[parent]));
        good[i] = there[i] && sound[i] && !e->leaving;
    }
    return 0;
}

/* In the series of the backup like, or of one of the disks in its archive? is: of each group. */
static void find_like(const struct prune *p, const struct dr_backup_entry *like,
                      const size_t *series, bool *is)
{
    for (size_t i = 0; i < p->set.n; i++)
        is[series[i]] |= !like || &p->set.all[i] == like ||
                         dr_set_same_archive(like, &p->set.all[i]);
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

static int refuse_unsettled(const struct prune *p, struct dr_error *err)
{
    for (size_t i = 0; i < p->set.n; i++)
        if (p->set.all[i].naming)
            return dr_fail(err, EBUSY,
                           "%s: its backup \"%s\" is being made, or was interrupted and cannot be "
                           "settled now",
                           p->path, p->set.all[i].name);
    return 0;
}

/* Those that are newer, of each series. */
struct newer {
    size_t good, bad;
};

static int choose_of(struct prune *p, bool marked, const struct dr_backup_entry *like,
                     struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    size_t spared = 0;
    CLEANUP_FREE bool *good = calloc(s->n + 1, sizeof(*good));
    CLEANUP_FREE bool *is_like = calloc(s->n + 1, sizeof(*is_like));
    CLEANUP_FREE struct newer *newer = calloc(s->n + 1, sizeof(*newer));
    CLEANUP_FREE size_t *series = group(s, by_series);
    if (!good || !is_like || !newer || !series)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    int r = find_good(p, good, err);
    if (r < 0)
        return r;
    find_like(p, like, series, is_like);
    for (size_t i = s->n; i-- > 0;) {
        struct newer *n = &newer[series[i]];
        bool may = !marked && is_like[series[i]] && !s->all[i].leaving;
        p->goes[i] = s->all[i].leaving || (may && n->good >= p->o->keep);
        spared += may && !p->goes[i] && n->good + n->bad >= p->o->keep;
        if (!s->all[i].leaving)
            *(good[i] ? &n->good : &n->bad) += 1;
    }
    tell_kept(p, spared);
    return keep_whole_archives(p, err);
}

static int choose(struct prune *p, bool marked, struct dr_error *err)
{
    const struct dr_backup_entry *like = p->o->like ? dr_set_find(&p->set, p->o->like) : NULL;
    p->goes = calloc(p->set.n + 1, sizeof(*p->goes));
    if (!p->goes)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->path);
    if (p->o->like && !like)
        return dr_fail(err, ENOENT, "%s: has no backup called \"%s\"", p->path, p->o->like);
    int r = refuse_unsettled(p, err);
    if (r == 0)
        r = link_all(p, err);
    return r < 0 ? r : choose_of(p, marked, like, err);
}

/* The one that stands on entry at; as many as there are: there is none. */
static int child_of(const struct prune *p, size_t at, size_t *child, struct dr_error *err)
{
    const struct dr_backup_set *s = &p->set;
    const struct link *l = &p->links[at];
    *child = l->child;
    if (l->other == s->n)
        return 0;
    return dr_fail(err, EBUSY, "%s: both \"%s\" and \"%s\" stand on the backup \"%s\"", p->path,
                   s->all[l->child].name, s->all[l->other].name, s->all[at].name);
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
        e = p->links[here].parent < s->n ? &s->all[p->links[here].parent] : NULL;
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
    free(DR_STEAL(p->links));
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
