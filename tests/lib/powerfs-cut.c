/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Building the disk after a power cut from the record. */
#include "powerfs-log.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

#define SECTOR 512u

/* ------------------------------------------------------------------ small parts */

void power_names_free(struct power_name *names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i].path);
    free(names);
}

bool power_name_set(struct power_name **names, size_t *n, const char *path, uint64_t ino)
{
    for (size_t i = 0; i < *n; i++) {
        struct power_name *name = &(*names)[i];
        if (strcmp(name->path, path) != 0)
            continue;
        name->ino = ino;
        if (!ino) {
            free(name->path);
            *name = (*names)[--*n];
        }
        return true;
    }
    if (!ino)
        return true;
    struct power_name *more = realloc(*names, (*n + 1) * sizeof(*more));
    if (!more)
        return false;
    *names = more;
    more[*n].path = strdup(path);
    more[*n].ino = ino;
    return more[(*n)++].path != NULL;
}

char *power_base_path(char text[32], uint64_t ino)
{
    snprintf(text, 32, "/%" PRIu64, ino);
    return text;
}

static int copy_run(struct dr_file *src, struct dr_file *dst, uint64_t off, uint64_t len)
{
    uint8_t buf[16384];
    int r = 0;
    while (len && !r) {
        size_t n = (size_t)dr_min(len, sizeof(buf));
        r = dr_file_pread(src, buf, off, n, NULL);
        if (!r)
            r = dr_file_pwrite(dst, buf, off, n, NULL);
        off += n;
        len -= n;
    }
    return r;
}

int power_copy_bytes(struct dr_file *src, struct dr_file *dst)
{
    uint64_t size = dr_file_size(src), run;
    enum dr_file_extent kind;
    int r = dr_file_truncate(dst, size, NULL);
    for (uint64_t off = 0; off < size && !r; off += run) {
        r = dr_file_extent(src, off, size - off, &kind, &run, NULL);
        if (!r && kind == DR_FILE_DATA)
            r = copy_run(src, dst, off, run);
    }
    return r;
}

/* ------------------------------------------------------------------ what is durable */

static bool is_change(const struct power_op *op)
{
    return op->kind != POWERFS_FLUSH && op->kind != POWERFS_SYNC_DIR;
}

static bool in_dir(const char *path, const char *dir)
{
    size_t n = strlen(dir);
    if (n == 1)
        n = 0; /* the root */
    return strncmp(path, dir, n) == 0 && path[n] == '/' && !strchr(path + n + 1, '/');
}

static bool makes_durable(const struct power_op *flush, const struct power_op *op)
{
    if (op->kind <= POWERFS_TRUNCATE)
        return flush->kind == POWERFS_FLUSH && flush->ino == op->ino;
    return flush->kind == POWERFS_SYNC_DIR && in_dir(op->to ? op->to : op->path, flush->path);
}

struct cut {
    const struct powerfs *p;
    size_t prefix;
    enum powerfs_mode mode;
    uint64_t seed;
    bool *durable; /* of each op before prefix */
    size_t last;   /* ONLY_LAST, ALL_BUT_ONE: the op that counts */
};

static size_t count_open(const struct cut *c)
{
    size_t n = 0;
    for (size_t i = 0; i < c->prefix; i++)
        n += !c->durable[i];
    return n;
}

/* The n-th that is not durable. */
static size_t nth_open(const struct cut *c, size_t n)
{
    for (size_t i = 0; i < c->prefix; i++)
        if (!c->durable[i] && n-- == 0)
            return i;
    return SIZE_MAX;
}

static bool same_flush(const struct power_op *a, const struct power_op *b)
{
    return a->kind == b->kind && a->ino == b->ino &&
           (a->kind == POWERFS_FLUSH || strcmp(a->path, b->path) == 0);
}

/* Backwards through the log with the different flushes seen so far, which are few. */
static bool find_durable(struct cut *c)
{
    const struct power_op *log = c->p->log;
    CLEANUP_FREE const struct power_op **seen = calloc(c->prefix + 1, sizeof(*seen));
    size_t n = 0;
    if (!seen)
        return false;
    for (size_t i = c->prefix; i-- > 0;) {
        size_t k = 0;
        if (is_change(&log[i])) {
            while (k < n && !makes_durable(seen[k], &log[i]))
                k++;
            c->durable[i] = k < n;
            continue;
        }
        c->durable[i] = true;
        while (k < n && !same_flush(seen[k], &log[i]))
            k++;
        if (k == n)
            seen[n++] = &log[i];
    }
    return true;
}

static bool cut_prepare(struct cut *c)
{
    c->durable = calloc(c->prefix + 1, sizeof(*c->durable));
    if (!c->durable || !find_durable(c))
        return false;
    size_t n = count_open(c);
    c->last = SIZE_MAX;
    if (n && c->mode == POWERFS_ONLY_LAST)
        c->last = nth_open(c, n - 1);
    if (n && c->mode == POWERFS_ALL_BUT_ONE)
        c->last = nth_open(c, (size_t)(c->seed % n));
    return true;
}

/* ------------------------------------------------------------------ what has arrived */

static uint64_t mix(uint64_t a, uint64_t b, uint64_t c)
{
    uint64_t v = a * 0x9e3779b97f4a7c15u + b * 0xd1b54a32d192ed03u + c * 0x8cb92ba72f3d8dd7u;
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
    return v ^ (v >> 31);
}

/* Of ops at random: a quarter whole, a quarter gone, half of them sector by sector. */
static bool random_part(const struct cut *c, size_t i, uint64_t part)
{
    uint64_t how = mix(c->seed, i, 1) % 4;
    return how < 2 ? how == 0 : mix(c->seed, i, part + 2) & 1;
}

static bool arrived(const struct cut *c, size_t i, uint64_t part)
{
    if (c->durable[i])
        return true;
    switch (c->mode) {
    case POWERFS_ALL:
        return true;
    case POWERFS_ONLY_LAST:
        return i == c->last;
    case POWERFS_ALL_BUT_ONE:
        return i != c->last;
    case POWERFS_RANDOM:
        return random_part(c, i, part);
    default:
        return false;
    }
}

static int apply_write(const struct cut *c, size_t i, struct dr_file *f)
{
    const struct power_op *op = &c->p->log[i];
    uint64_t end = op->off + op->len;
    int r = 0;
    for (uint64_t from = op->off, to; from < end && !r; from = to) {
        to = dr_min(end, dr_round_down(from, SECTOR) + SECTOR);
        if (arrived(c, i, from / SECTOR))
            r = dr_file_pwrite(f, op->data + (from - op->off), from, (size_t)(to - from), NULL);
    }
    bool grown = c->mode == POWERFS_RANDOM && !c->durable[i] && mix(c->seed, i, 0) & 1;
    if (!r && grown && end > dr_file_size(f))
        r = dr_file_truncate(f, end, NULL);
    return r;
}

static int apply(const struct cut *c, size_t i, struct dr_file *f)
{
    const struct power_op *op = &c->p->log[i];
    if (op->kind == POWERFS_WRITE)
        return apply_write(c, i, f);
    if (!arrived(c, i, 0))
        return 0;
    if (op->kind == POWERFS_ZERO)
        return dr_file_zero(f, op->off, op->len, 0, NULL);
    return dr_file_truncate(f, op->off, NULL);
}

static int restore_base(const struct cut *c, uint64_t ino, struct dr_file *f)
{
    struct dr_file *base;
    char path[32];
    if (dr_file_open(c->p->base, power_base_path(path, ino), 0, &base, NULL))
        return 0; /* made since */
    int r = power_copy_bytes(base, f);
    dr_file_unref(base);
    return r;
}

static int build_file(const struct cut *c, struct dr_fs *disk, const struct power_name *name)
{
    struct dr_file *f;
    int r = dr_file_open(disk, name->path, DR_FILE_CREATE, &f, NULL);
    if (r)
        return r;
    r = restore_base(c, name->ino, f);
    for (size_t i = 0; i < c->prefix && !r; i++)
        if (c->p->log[i].kind <= POWERFS_TRUNCATE && c->p->log[i].ino == name->ino)
            r = apply(c, i, f);
    dr_file_unref(f);
    if (r == 0 && name->ino == c->p->device)
        r = disk->ops->make_device(disk, name->path, NULL);
    return r;
}

static bool apply_name(const struct power_op *op, struct power_name **names, size_t *n)
{
    if (op->kind == POWERFS_CREATE)
        return power_name_set(names, n, op->path, op->ino);
    if (!power_name_set(names, n, op->path, 0))
        return false;
    return op->kind == POWERFS_UNLINK || power_name_set(names, n, op->to, op->ino);
}

static bool build_names(const struct cut *c, struct power_name **names, size_t *n)
{
    bool ok = true;
    for (size_t i = 0; i < c->p->n_names && ok; i++)
        ok = power_name_set(names, n, c->p->names[i].path, c->p->names[i].ino);
    for (size_t i = 0; i < c->prefix && ok; i++) {
        const struct power_op *op = &c->p->log[i];
        if (op->kind >= POWERFS_CREATE && is_change(op) && arrived(c, i, 0))
            ok = apply_name(op, names, n);
    }
    return ok;
}

static int build_disk(const struct cut *c, struct dr_fs *disk)
{
    struct power_name *names = NULL;
    size_t n = 0;
    int r = build_names(c, &names, &n) ? 0 : -ENOMEM;
    for (size_t i = 0; i < n && !r; i++)
        r = build_file(c, disk, &names[i]);
    power_names_free(names, n);
    return r;
}

struct dr_fs *powerfs_cut(struct powerfs *p, size_t prefix, enum powerfs_mode mode, uint64_t seed)
{
    DR_LOCK_SCOPE(&p->lock);
    struct cut c = {.p = p, .prefix = dr_min(prefix, p->n_ops), .mode = mode, .seed = seed};
    struct dr_fs *disk = dr_fs_memory_new();
    if (disk && (!cut_prepare(&c) || build_disk(&c, disk))) {
        dr_fs_memory_free(disk);
        disk = NULL;
    }
    free(c.durable);
    return disk;
}

size_t powerfs_open_ops(struct powerfs *p, size_t prefix)
{
    DR_LOCK_SCOPE(&p->lock);
    struct cut c = {.p = p, .prefix = dr_min(prefix, p->n_ops), .mode = POWERFS_NONE};
    size_t n = cut_prepare(&c) ? count_open(&c) : 0;
    free(c.durable);
    return n;
}
