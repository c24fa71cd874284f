/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which disks the machines of a directory use, and which snapshots froze which. */
#include <stdio.h>
#include <strings.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"
#include "ops/vmsd.h"

struct notes {
    struct dr_machine_note *all;
    size_t n;
};

static void clear(struct dr_machine_note *note)
{
    free(note->descriptor);
    free(note->image);
    free(note->device);
    free(note->snapshot);
    free(note->text);
}

void dr_machine_notes_free(struct dr_machine_note *notes, size_t n)
{
    for (size_t i = 0; notes && i < n; i++)
        clear(&notes[i]);
    free(notes);
}

static char *copy(const char *text)
{
    return text ? strdup(text) : NULL;
}

/* The strings of `what` are copied. image: as recorded, or NULL. */
static int add(struct notes *notes, struct dr_machine_note what, const char *image,
               struct dr_error *err)
{
    struct dr_machine_note *more = realloc(notes->all, (notes->n + 1) * sizeof(*more));
    if (more)
        notes->all = more;
    struct dr_machine_note note = what;
    note.descriptor = copy(what.descriptor);
    note.image = image ? dr_path_sibling(what.descriptor, image) : strdup("");
    note.device = strdup(what.device ? what.device : "");
    note.snapshot = copy(what.snapshot);
    note.text = copy(what.text);
    bool whole = more && note.descriptor && note.image && note.device &&
                 !what.snapshot == !note.snapshot && !what.text == !note.text;
    if (!whole) {
        clear(&note);
        return dr_fail(err, ENOMEM, "%s: out of memory", what.descriptor);
    }
    notes->all[notes->n++] = note;
    return 0;
}

static int add_problem(struct notes *notes, char *path, struct dr_error *why, struct dr_error *err)
{
    return add(notes, (struct dr_machine_note){.descriptor = path, .text = why->text}, NULL, err);
}

static bool ends_with(const char *name, const char *tail)
{
    size_t n = strlen(name), t = strlen(tail);
    return n > t && strcasecmp(name + n - t, tail) == 0;
}

/* scsi0:0.fileName = "X.vmdk" */
static int read_vmx(struct notes *notes, struct dr_fs *fs, char *path, struct dr_error *err)
{
    static const char key[] = ".fileName";
    struct dict d;
    struct dr_error why = DR_ERROR_INIT;
    int r = dict_load(&d, fs, path, &why);
    if (r < 0)
        return add_problem(notes, path, &why, err);
    for (size_t i = 0; r == 0 && i < d.n; i++) {
        const struct dict_line *l = &d.lines[i];
        if (!l->key || !ends_with(l->key, key) || !ends_with(l->value, ".vmdk"))
            continue;
        CLEANUP_FREE char *device = strndup(l->key, strlen(l->key) - strlen(key));
        r = add(notes, (struct dr_machine_note){.descriptor = path, .device = device}, l->value,
                err);
    }
    dict_free(&d);
    return r;
}

static int read_snapshot(struct notes *notes, char *path, const struct vmsd *v,
                         const struct vmsd_snapshot *s, struct dr_error *err)
{
    int r = 0;
    for (size_t k = 0; r == 0 && k < s->n_disks; k++) {
        if (!s->disks[k].file)
            continue;
        const struct dr_machine_note note = {
            .descriptor = path,
            .device = (char *)s->disks[k].node,
            .snapshot = (char *)s->name,
            .uid = s->uid,
            .parent_uid = s->parent,
            .microseconds = s->microseconds,
            .current = s->uid != 0 && s->uid == v->current,
        };
        r = add(notes, note, s->disks[k].file, err);
    }
    return r;
}

static int read_vmsd(struct notes *notes, struct dr_fs *fs, char *path, struct dr_error *err)
{
    struct vmsd v;
    struct dr_error why = DR_ERROR_INIT;
    int r = vmsd_load(&v, fs, path, &why);
    if (r < 0)
        return add_problem(notes, path, &why, err);
    for (size_t i = 0; r == 0 && i < v.n; i++)
        r = read_snapshot(notes, path, &v, &v.all[i], err);
    vmsd_free(&v);
    return r;
}

int dr_machine_notes(const char *dir, struct dr_machine_note **notes, size_t *n,
                     struct dr_error *err)
{
    DR_REQUIRE(dir, err);
    DR_REQUIRE(notes, err);
    DR_REQUIRE(n, err);
    struct dr_fs *fs = dr_fs_posix();
    struct notes all = {0};
    char **names = NULL;
    size_t count = 0;
    int r = dr_ops_list(fs, dir, &names, &count, err);
    for (size_t i = 0; r == 0 && i < count; i++) {
        CLEANUP_FREE char *path = strcmp(dir, ".") == 0 ? strdup(names[i])
                                                        : dr_path_join(dir, names[i]);
        if (!path)
            r = dr_fail(err, ENOMEM, "%s: out of memory", dir);
        else if (ends_with(names[i], ".vmx"))
            r = read_vmx(&all, fs, path, err);
        else if (ends_with(names[i], ".vmsd"))
            r = read_vmsd(&all, fs, path, err);
    }
    if (names)
        dr_ops_free_names(names, count);
    if (r < 0) {
        dr_machine_notes_free(all.all, all.n);
        return r;
    }
    *notes = all.all;
    *n = all.n;
    return 0;
}
