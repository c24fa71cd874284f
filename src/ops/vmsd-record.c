/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A new snapshot in the list of its machine. Which machine: the one whose .vmx uses the disk, and
 * X.vmx has its list in X.vmsd; else the one whose list knows an image that the disk stands on. The
 * new list is written before the child has its name, and takes the old one's place afterwards. */
#include <strings.h>
#include <time.h>

#include "base/cleanup.h"
#include "ops/vmsd-record.h"

static bool ends_with(const char *name, const char *tail)
{
    size_t n = strlen(name), t = strlen(tail);
    return n > t && strcasecmp(name + n - t, tail) == 0;
}

static bool same_stem(const char *a, const char *b)
{
    const char *dot = strrchr(a, '.');
    size_t n = (size_t)(dot - a) + 1;
    return strncmp(a, b, n) == 0 && !strchr(b + n, '.');
}

/* ------------------------------------------------------------------ the machine */

struct search {
    struct dr_fs *fs;
    const struct dr_chain *chain;
    const char *path; /* of the disk */
    struct dr_file_id id;
    char **names;
    size_t n;
    const char *vmx, *vmsd; /* among the names, or NULL */
    char *device;           /* "scsi0:0", or NULL */
};

/* Does the value name the disk? */
static bool is_disk(const struct search *s, const char *value)
{
    CLEANUP_FREE char *at = dr_path_sibling(s->path, value);
    struct dr_file_id id;
    return at && s->fs->ops->identify(s->fs, at, &id, NULL) == 0 && dr_same_id(id, s->id);
}

static int read_vmx(struct search *s, const char *name, struct dr_error *err)
{
    static const char key[] = ".fileName";
    CLEANUP_FREE char *at = dr_path_sibling(s->path, name);
    struct dict d;
    int r = at ? dict_load(&d, s->fs, at, err) : dr_fail(err, ENOMEM, "%s: out of memory", s->path);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < d.n; i++) {
        const struct dict_line *l = &d.lines[i];
        if (!l->key || !ends_with(l->key, key) || !is_disk(s, l->value) || s->vmx == name)
            continue;
        if (s->vmx)
            r = dr_fail(err, EINVAL, "%s: is used by two machines, %s and %s", s->path, s->vmx,
                        name);
        else if (!(s->device = strndup(l->key, strlen(l->key) - strlen(key))))
            r = dr_fail(err, ENOMEM, "%s: out of memory", at);
        s->vmx = name;
    }
    dict_free(&d);
    return r;
}

static bool knows(const struct vmsd *v, const struct dr_chain *chain)
{
    for (size_t i = 0; i < chain->n; i++)
        if (vmsd_of_image(v, chain->images[i]->path))
            return true;
    return false;
}

static int read_vmsd(struct search *s, const char *name, struct dr_error *err)
{
    CLEANUP_FREE char *at = dr_path_sibling(s->path, name);
    struct vmsd v;
    int r = at ? vmsd_load(&v, s->fs, at, err) : dr_fail(err, ENOMEM, "%s: out of memory", s->path);
    if (r < 0)
        return r;
    if (s->vmx ? same_stem(s->vmx, name) : !s->vmsd && knows(&v, s->chain))
        s->vmsd = name;
    vmsd_free(&v);
    return 0;
}

static int look(struct search *s, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(s->path);
    int r = dir ? dr_ops_list(s->fs, dir, &s->names, &s->n, err)
                : dr_fail(err, ENOMEM, "%s: out of memory", s->path);
    if (r == 0)
        r = s->fs->ops->identify(s->fs, s->path, &s->id, err);
    for (size_t i = 0; r == 0 && i < s->n; i++)
        if (ends_with(s->names[i], ".vmx"))
            r = read_vmx(s, s->names[i], err);
    for (size_t i = 0; r == 0 && i < s->n; i++)
        if (ends_with(s->names[i], ".vmsd"))
            r = read_vmsd(s, s->names[i], err);
    if (r == 0 && s->vmx && !s->vmsd)
        r = dr_fail(err, ENOENT, "%s: its machine, %s, has no list of snapshots, %.*svmsd", s->path,
                    s->vmx, (int)(strlen(s->vmx) - 3), s->vmx);
    return r;
}

static void look_end(struct search *s)
{
    if (s->names)
        dr_ops_free_names(s->names, s->n);
    free(s->device);
}

/* ------------------------------------------------------------------ the list */

static const char *device_of(const struct search *s, const struct vmsd *v)
{
    for (size_t i = 0; !s->device && i < s->chain->n; i++) {
        const char *path = s->chain->images[i]->path;
        const struct vmsd_snapshot *known = vmsd_of_image(v, path);
        for (size_t k = 0; known && k < known->n_disks; k++)
            if (vmsd_is_disk(&known->disks[k], path) && known->disks[k].node)
                return known->disks[k].node;
    }
    return s->device;
}

static int64_t now(void)
{
    struct timespec ts = {0};
    clock_gettime(CLOCK_REALTIME, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static int write_list(struct vmsd_record *record, struct dr_error *err)
{
    size_t len = 0;
    CLEANUP_FREE char *text = dict_text(&record->vmsd.dict, &len);
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", record->path);
    if (len > DICT_MAX_BYTES || record->vmsd.dict.n > DICT_MAX_LINES)
        return dr_fail(err, EFBIG, "%s: would be longer than %u bytes or %u lines", record->path,
                       DICT_MAX_BYTES, DICT_MAX_LINES);
    int r = dr_temp_create(&record->temp, record->fs, record->path, record->old, record->old, err);
    return r < 0 ? r : dr_file_pwrite(record->temp.file, text, 0, len, err);
}

/* It is read once more behind its lock: of two snapshots of one machine the later one waits for
 * nothing, and fails. */
static int change_list(struct vmsd_record *record, const struct search *s, struct dr_error *err)
{
    int r = dr_file_open(record->fs, record->path, DR_FILE_RDWR, &record->old, err);
    if (r == 0)
        r = vmsd_load(&record->vmsd, record->fs, record->path, err);
    if (r == 0)
        r = vmsd_add_image(&record->vmsd, record->path, s->path, device_of(s, &record->vmsd), now(),
                           err);
    return r < 0 ? r : write_list(record, err);
}

int vmsd_record_begin(struct vmsd_record *record, struct dr_fs *fs, const struct dr_chain *chain,
                      struct dr_error *err)
{
    struct search s = {.fs = fs, .chain = chain, .path = chain->images[0]->path};
    *record = (struct vmsd_record){.fs = fs};
    int r = look(&s, err);
    if (r == 0 && s.vmsd) {
        record->path = dr_path_sibling(s.path, s.vmsd);
        r = record->path ? change_list(record, &s, err)
                         : dr_fail(err, ENOMEM, "%s: out of memory", s.path);
    }
    look_end(&s);
    return r;
}

int vmsd_record_publish(struct vmsd_record *record, struct dr_error *err)
{
    return record->path ? dr_temp_publish(&record->temp, err) : 0;
}

void vmsd_record_end(struct vmsd_record *record)
{
    dr_temp_end(&record->temp);
    dr_file_unref(record->old);
    vmsd_free(&record->vmsd);
    free(record->path);
    *record = (struct vmsd_record){0};
}
