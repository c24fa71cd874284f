/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/vma-listed.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/random.h"
#include "ops/ops-internal.h"

static int no_memory(const char *set, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", set);
}

/* As it is called in the set. NULL: out of memory. */
static char *name_of(const char *path, const char *disk)
{
    char *name;
    return asprintf(&name, "%s#%s", dr_path_basename(path), disk) < 0 ? NULL : name;
}

static int check_names(const struct dr_backup_set *s, const char *path,
                       const struct dr_vma_create_options *o, struct dr_error *err)
{
    for (size_t i = 0; i < o->n_disks; i++) {
        CLEANUP_FREE char *name = name_of(path, o->disks[i].name);
        if (!name)
            return no_memory(o->set, err);
        if (strchr(o->disks[i].name, '#'))
            return dr_fail(err, EINVAL,
                           "disk '%s': in a set of backups '#' stands between the archive's name "
                           "and the disk's",
                           o->disks[i].name);
        if (dr_set_find(s, name))
            return dr_fail(err, EEXIST, "%s: has a backup called \"%s\" already", o->set, name);
    }
    return 0;
}

int vma_listed_begin(struct vma_listed *l, struct dr_fs *fs, const char *path,
                     const struct dr_vma_create_options *o, struct dr_job *job,
                     struct dr_error *err)
{
    struct dr_backup_set s = {0};
    time_t seconds = time(NULL);
    struct tm tm;
    if (gmtime_r(&seconds, &tm))
        strftime(l->time, sizeof(l->time), "%Y-%m-%dT%H:%M:%SZ", &tm);
    int r = dr_naming_settle(fs, o->set, NULL, job, err);
    if (r == 0)
        r = dr_set_load(&s, fs, o->set, err);
    if (r == 0)
        r = check_names(&s, path, o, err);
    l->had = s.n > 0;
    dr_set_free(&s);
    return r;
}

static int make_entry(struct vma_listed *l, struct dr_backup_entry *e, struct dr_fs *fs,
                      const char *path, const struct dr_vma_create_options *o, size_t i,
                      const struct dr_vma_disk_result *result, struct dr_error *err)
{
    CLEANUP_FREE char *file = dr_ops_name_from(fs, o->set, path);
    const char *image = dr_image_path(o->disks[i].disk, 0);
    int r = image ? fs->ops->realpath(fs, image, &e->disk, err) : no_memory(o->set, err);
    if (r < 0)
        return r;
    e->name = name_of(path, o->disks[i].name);
    if (!file || asprintf(&e->file, "vma:%s#%s", file, o->disks[i].name) < 0)
        e->file = NULL;
    e->format = (char *)(uintptr_t) "vma";
    e->time = l->time;
    e->naming = l->mark;
    e->size = dr_size(o->disks[i].disk);
    e->copied = result->copied;
    memcpy(e->digest, result->digest, DR_DIGEST_TEXT);
    return e->name && e->file ? 0 : no_memory(o->set, err);
}

int vma_listed_announce(struct vma_listed *l, struct dr_fs *fs, const char *path, const char *temp,
                        const struct dr_vma_create_options *o,
                        const struct dr_vma_disk_result *results, struct dr_error *err)
{
    l->entries = calloc(o->n_disks + 1, sizeof(*l->entries));
    if (!l->entries)
        return no_memory(o->set, err);
    l->n = o->n_disks;
    int r = dr_naming_mark(fs, temp, dr_random64(), &l->mark, err);
    for (size_t i = 0; r == 0 && i < l->n; i++)
        r = make_entry(l, &l->entries[i], fs, path, o, i, &results[i], err);
    if (r == 0)
        r = dr_naming_announce(&l->naming, fs, o->set, l->had, l->entries, l->n, err);
    l->announced = r == 0;
    return r;
}

int vma_listed_confirm(struct vma_listed *l, struct dr_error *err)
{
    return l->announced ? dr_naming_confirm(&l->naming, err) : 0;
}

void vma_listed_end(struct vma_listed *l)
{
    if (l->announced && !l->naming.confirmed)
        dr_naming_withdraw(&l->naming);
    if (l->announced)
        dr_naming_end(&l->naming);
    for (size_t i = 0; i < l->n; i++) {
        free(l->entries[i].name);
        free(l->entries[i].file);
        free(l->entries[i].disk);
    }
    free(l->entries);
    free(l->mark);
    *l = (struct vma_listed){0};
}
