/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a .vmsd says of snapshots: snapshotN.uid, .parent, .displayName, .createTimeHigh and Low,
 * .numDisks, .diskM.fileName, .diskM.node. */
#include <ctype.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"
#include "ops/vmsd.h"

/* ------------------------------------------------------------------ reading */

/* Decimal digits at *p, below `bound`; *p goes behind them. */
static bool take_number(const char **p, unsigned bound, unsigned *number)
{
    const char *digits = *p;
    *number = 0;
    for (; isdigit((unsigned char)**p) && *number < bound; (*p)++)
        *number = *number * 10 + (unsigned)(**p - '0');
    return *p > digits && *number < bound && !(digits[0] == '0' && *p > digits + 1);
}

/* "snapshotN." in front of *rest? */
static bool is_of_snapshot(const char *key, unsigned *index, const char **rest)
{
    static const char word[] = "snapshot";
    const char *p = key + strlen(word);
    if (strncasecmp(key, word, strlen(word)) != 0 || !take_number(&p, VMSD_MAX_SNAPSHOTS, index) ||
        *p != '.')
        return false;
    *rest = p + 1;
    return true;
}

static int64_t number(const char *value)
{
    char *end;
    long long n = strtoll(value, &end, 10);
    return *value && *end == '\0' ? n : 0;
}

static struct vmsd_snapshot *snapshot_at(struct vmsd *v, unsigned index)
{
    for (size_t i = v->n; i-- > 0;)
        if (v->all[i].index == index)
            return &v->all[i];
    struct vmsd_snapshot *more = realloc(v->all, (v->n + 1) * sizeof(*more));
    if (!more)
        return NULL;
    v->all = more;
    more[v->n] = (struct vmsd_snapshot){.index = index, .name = ""};
    return &more[v->n++];
}

static struct vmsd_disk *disk_at(struct vmsd_snapshot *s, unsigned index)
{
    for (size_t i = 0; i < s->n_disks; i++)
        if (s->disks[i].index == index)
            return &s->disks[i];
    struct vmsd_disk *more = realloc(s->disks, (s->n_disks + 1) * sizeof(*more));
    if (!more)
        return NULL;
    s->disks = more;
    more[s->n_disks] = (struct vmsd_disk){.index = index};
    return &more[s->n_disks++];
}

static bool take_disk(struct vmsd_snapshot *s, const char *key, const char *value)
{
    unsigned index;
    if (!take_number(&key, VMSD_MAX_DISKS, &index) || *key != '.')
        return true;
    struct vmsd_disk *disk = disk_at(s, index);
    if (!disk)
        return false;
    if (strcasecmp(key, ".fileName") == 0 && !disk->file)
        disk->file = value;
    if (strcasecmp(key, ".node") == 0)
        disk->node = value;
    return true;
}

static bool take(struct vmsd *v, const struct dict_line *l)
{
    unsigned index;
    const char *key;
    if (!l->key || !is_of_snapshot(l->key, &index, &key))
        return true;
    struct vmsd_snapshot *s = snapshot_at(v, index);
    if (!s)
        return false;
    if (strcasecmp(key, "uid") == 0)
        s->uid = (uint64_t)number(l->value);
    else if (strcasecmp(key, "parent") == 0)
        s->parent = (uint64_t)number(l->value);
    else if (strcasecmp(key, "displayName") == 0)
        s->name = l->value;
    else if (strcasecmp(key, "createTimeHigh") == 0)
        s->microseconds |= (int64_t)((uint64_t)number(l->value) << 32);
    else if (strcasecmp(key, "createTimeLow") == 0) /* is printed with a sign */
        s->microseconds |= (int64_t)((uint64_t)number(l->value) & UINT32_MAX);
    else if (strncasecmp(key, "disk", 4) == 0)
        return take_disk(s, key + 4, l->value);
    return true;
}

static int read_snapshots(struct vmsd *v, const char *path, struct dr_error *err)
{
    const char *current = dict_get(&v->dict, "snapshot.current");
    v->current = current ? (uint64_t)number(current) : 0;
    for (size_t i = 0; i < v->dict.n; i++)
        if (!take(v, &v->dict.lines[i])) {
            vmsd_free(v);
            return dr_fail(err, ENOMEM, "%s: out of memory", path);
        }
    return 0;
}

int vmsd_parse(struct vmsd *v, const char *path, const void *data, size_t len, struct dr_error *err)
{
    *v = (struct vmsd){0};
    int r = dict_parse(&v->dict, path, data, len, err);
    return r < 0 ? r : read_snapshots(v, path, err);
}

int vmsd_load(struct vmsd *v, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    *v = (struct vmsd){0};
    int r = dict_load(&v->dict, fs, path, err);
    return r < 0 ? r : read_snapshots(v, path, err);
}

void vmsd_free(struct vmsd *v)
{
    for (size_t i = 0; i < v->n; i++)
        free(v->all[i].disks);
    free(v->all);
    dict_free(&v->dict);
    *v = (struct vmsd){0};
}

/* ------------------------------------------------------------------ images */

bool vmsd_is_disk(const struct vmsd_disk *disk, const char *path)
{
    return disk->file && strcmp(dr_path_basename(disk->file), dr_path_basename(path)) == 0;
}

const struct vmsd_snapshot *vmsd_of_image(const struct vmsd *v, const char *path)
{
    for (size_t i = 0; i < v->n; i++)
        for (size_t k = 0; k < v->all[i].n_disks; k++)
            if (vmsd_is_disk(&v->all[i].disks[k], path))
                return &v->all[i];
    return NULL;
}

/* ------------------------------------------------------------------ changing */

static bool set_number(struct dict *d, uint64_t value, const char *fmt, unsigned index)
    __attribute__((format(printf, 3, 0)));

static bool set_number(struct dict *d, uint64_t value, const char *fmt, unsigned index)
{
    char key[64], text[24];
    snprintf(key, sizeof(key), fmt, index);
    snprintf(text, sizeof(text), "%" PRIu64, value);
    return dict_set(d, key, text);
}

static bool rename_keys(struct dict *d, const char *from, const char *to)
{
    for (size_t i = 0; i < d->n; i++) {
        struct dict_line *l = &d->lines[i];
        char *key = NULL, *text = NULL;
        if (!l->key || strncasecmp(l->key, from, strlen(from)) != 0)
            continue;
        const char *value = strchr(l->text, '=');
        if (asprintf(&key, "%s%s", to, l->key + strlen(from)) < 0 ||
            asprintf(&text, "%s %s", key, value) < 0) {
            free(key);
            return false;
        }
        free(l->key);
        free(l->text);
        l->key = key;
        l->text = text;
    }
    return true;
}

/* VMware numbers them without gaps: the last one gets the number of the one that goes. */
static bool close_gap(struct dict *d, const char *fmt, unsigned index, unsigned last)
    __attribute__((format(printf, 2, 0)));

static bool close_gap(struct dict *d, const char *fmt, unsigned index, unsigned last)
{
    char from[64], to[64];
    snprintf(from, sizeof(from), fmt, last);
    snprintf(to, sizeof(to), fmt, index);
    return last == index || rename_keys(d, from, to);
}

static unsigned last_index(const struct vmsd *v)
{
    unsigned last = 0;
    for (size_t i = 0; i < v->n; i++)
        last = v->all[i].index > last ? v->all[i].index : last;
    return last;
}

/* The children of the one that goes get its parent. */
static bool move_children(struct vmsd *v, const struct vmsd_snapshot *gone)
{
    bool done = true;
    for (size_t i = 0; done && i < v->n; i++)
        if (v->all[i].parent == gone->uid && &v->all[i] != gone)
            done = set_number(&v->dict, gone->parent, "snapshot%u.parent", v->all[i].index);
    if (done && v->current == gone->uid)
        done = set_number(&v->dict, gone->parent, "snapshot.current", 0);
    return done;
}

static bool forget_snapshot(struct vmsd *v, const struct vmsd_snapshot *s)
{
    char prefix[64];
    bool done = s->uid == 0 || move_children(v, s);
    snprintf(prefix, sizeof(prefix), "snapshot%u.", s->index);
    if (done)
        dict_remove(&v->dict, prefix);
    if (done)
        done = close_gap(&v->dict, "snapshot%u.", s->index, last_index(v));
    return done && set_number(&v->dict, v->n - 1, "snapshot.numSnapshots", 0);
}

static bool forget_disk(struct vmsd *v, const struct vmsd_snapshot *s, unsigned index)
{
    char prefix[64], fmt[64];
    unsigned last = 0;
    for (size_t k = 0; k < s->n_disks; k++)
        last = s->disks[k].index > last ? s->disks[k].index : last;
    snprintf(prefix, sizeof(prefix), "snapshot%u.disk%u.", s->index, index);
    snprintf(fmt, sizeof(fmt), "snapshot%u.disk%u.", s->index, last);
    dict_remove(&v->dict, prefix);
    return (last == index || rename_keys(&v->dict, fmt, prefix)) &&
           set_number(&v->dict, s->n_disks - 1, "snapshot%u.numDisks", s->index);
}

bool vmsd_forget_image(struct vmsd *v, const char *path)
{
    const struct vmsd_snapshot *s = vmsd_of_image(v, path);
    if (!s)
        return true;
    if (s->n_disks == 1)
        return forget_snapshot(v, s);
    for (size_t k = 0; k < s->n_disks; k++)
        if (vmsd_is_disk(&s->disks[k], path))
            return forget_disk(v, s, s->disks[k].index);
    return true;
}

bool vmsd_set_current(struct vmsd *v, const char *path)
{
    const struct vmsd_snapshot *s = vmsd_of_image(v, path);
    return !s || set_number(&v->dict, s->uid, "snapshot.current", 0);
}

static uint64_t last_uid(const struct vmsd *v)
{
    const char *told = dict_get(&v->dict, "snapshot.lastUID");
    uint64_t last = told ? (uint64_t)number(told) : 0;
    for (size_t i = 0; i < v->n; i++)
        last = v->all[i].uid > last ? v->all[i].uid : last;
    return last;
}

static bool set_text(struct dict *d, unsigned index, const char *key, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static bool set_text(struct dict *d, unsigned index, const char *key, const char *fmt, ...)
{
    char name[64];
    CLEANUP_FREE char *value = NULL;
    va_list ap;
    va_start(ap, fmt);
    int len = vasprintf(&value, fmt, ap);
    va_end(ap);
    if (len < 0)
        value = NULL;
    snprintf(name, sizeof(name), "snapshot%u.%s", index, key);
    return value && dict_set(d, name, value);
}

static bool add_snapshot(struct vmsd *v, unsigned index, uint64_t uid, const char *file,
                         const char *device, int64_t microseconds)
{
    struct dict *d = &v->dict;
    uint64_t time = (uint64_t)microseconds;
    return set_text(d, index, "uid", "%" PRIu64, uid) &&
           (v->current == 0 || set_text(d, index, "parent", "%" PRIu64, v->current)) &&
           set_text(d, index, "displayName", "Snapshot %" PRIu64, uid) &&
           set_text(d, index, "createTimeHigh", "%" PRId32, (int32_t)(time >> 32)) &&
           set_text(d, index, "createTimeLow", "%" PRId32, (int32_t)(time & UINT32_MAX)) &&
           set_text(d, index, "numDisks", "1") &&
           set_text(d, index, "disk0.fileName", "%s", file) &&
           (!device || set_text(d, index, "disk0.node", "%s", device)) &&
           set_number(d, v->n + 1, "snapshot.numSnapshots", 0) &&
           set_number(d, uid, "snapshot.lastUID", 0) && set_number(d, uid, "snapshot.current", 0);
}

int vmsd_add_image(struct vmsd *v, const char *where, const char *path, const char *device,
                   int64_t microseconds, struct dr_error *err)
{
    bool known = vmsd_of_image(v, path) != NULL;
    unsigned index = v->n ? last_index(v) + 1 : 0;
    uint64_t uid = last_uid(v);
    if (!known && index >= VMSD_MAX_SNAPSHOTS)
        return dr_fail(err, EFBIG, "%s: has %u snapshots, and no room for another one", where,
                       VMSD_MAX_SNAPSHOTS);
    if (!known && uid >= INT32_MAX)
        return dr_fail(err, EINVAL, "%s: no number above the last one, %" PRIu64 ", can be given",
                       where, uid);
    bool done = v->dict.n > 0 || dict_set(&v->dict, ".encoding", "UTF-8");
    if (done)
        done = known
                   ? vmsd_set_current(v, path)
                   : add_snapshot(v, index, uid + 1, dr_path_basename(path), device, microseconds);
    return done ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", where);
}
