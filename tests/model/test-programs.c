/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Every short program: all sequences of three operations on a disk of three units, each cut after
 * each I/O. What is left opens, without repair; the disk has the size that it had after one of the
 * operations since the last one that made everything durable, and each of its sectors holds what it
 * held after one of them; snapshots inside the image are those of one of these moments and show
 * what they always did; the base has what it had or what was committed. A bitmap inside the image
 * that claims to be consistent has every sector that was changed since; a disabled one stays.
 *
 * A usual run takes a part of the programs, with another seed another part; a long run takes all.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "model.h"
#include "noted.h"
#include "ops/ops-internal.h"
#include "plant.h"
#include "powerfs.h"
#include "qcow2-verify.h"
#include "slower.h"

#define SECTOR 512u

enum {
    LENGTH = 3,        /* operations */
    UNITS = 3,         /* of the disk at first; it may have one more */
    MAX_SNAPSHOTS = 4, /* one at first, and one for each operation */
};

/* ------------------------------------------------------------------ the operations */

enum kind {
    WRITE,
    WRITE_PART,
    WRITE_CODED,
    ZERO,
    DISCARD,
    DROP,
    FLUSH,
    REOPEN,
    CREATE,
    APPLY,
    DELETE,
    GROW,
    SHRINK,
    COMMIT,
    BITMAP,
    KINDS,
};

struct step {
    enum kind kind;
    unsigned unit, units;
    const char *text;
};

/* unit of a BITMAP says which. */
static const struct bitmap_change {
    const char *name;
    enum dr_bitmap_action action;
} bitmap_changes[] = {
    {"new", DR_BITMAP_ADD},    {"on", DR_BITMAP_CLEAR}, {"on", DR_BITMAP_DISABLE},
    {"off", DR_BITMAP_ENABLE}, {"on", DR_BITMAP_MERGE}, {"on", DR_BITMAP_REMOVE},
};

/* Those that change bitmaps stand last: only images that have bitmaps get them. */
static const struct step steps[] = {
    {WRITE, 0, 1, "write 0"},
    {WRITE, 1, 1, "write 1"},
    {WRITE, 2, 1, "write 2"},
    {WRITE_PART, 0, 1, "write in 0"},
    {WRITE_PART, 1, 1, "write in 1"},
    {WRITE_PART, 2, 1, "write in 2"},
    {WRITE_CODED, 0, 1, "compress 0"},
    {WRITE_CODED, 1, 1, "compress 1"},
    {WRITE_CODED, 2, 1, "compress 2"},
    {ZERO, 0, 1, "zero 0"},
    {ZERO, 1, 1, "zero 1"},
    {ZERO, 0, 3, "zero all"},
    {DISCARD, 0, 1, "discard 0"},
    {DISCARD, 1, 1, "discard 1"},
    {DISCARD, 0, 3, "discard all"},
    {DROP, 0, 1, "drop 0"},
    {DROP, 1, 1, "drop 1"},
    {FLUSH, 0, 0, "flush"},
    {REOPEN, 0, 0, "reopen"},
    {CREATE, 0, 0, "snapshot -c"},
    {APPLY, 0, 0, "snapshot -a of the first"},
    {DELETE, 0, 0, "snapshot -d of the first"},
    {DELETE, 1, 0, "snapshot -d of the last"},
    {GROW, 0, 0, "resize +"},
    {SHRINK, 0, 0, "resize -"},
    {COMMIT, 0, 0, "commit"},
    {BITMAP, 0, 0, "bitmap --add new"},
    {BITMAP, 1, 0, "bitmap --clear on"},
    {BITMAP, 2, 0, "bitmap --disable on"},
    {BITMAP, 3, 0, "bitmap --enable off"},
    {BITMAP, 4, 0, "bitmap --merge on"},
    {BITMAP, 5, 0, "bitmap --remove on"},
};
enum {
    N_STEPS = sizeof(steps) / sizeof(steps[0]),
    N_BITMAP_STEPS = sizeof(bitmap_changes) / sizeof(bitmap_changes[0]),
};

/* Does the image keep its bitmaps, and snapshots, inside? */
static bool inside(const struct subject *s)
{
    return strcmp(s->format, "qcow2") == 0;
}

static unsigned n_steps(const struct subject *s)
{
    return s->bitmaps ? N_STEPS : N_STEPS - N_BITMAP_STEPS;
}

/* ------------------------------------------------------------------ what there is at a moment */

struct snapshot {
    unsigned id;
    uint64_t size;
    uint8_t *view;
};

struct moment {
    uint64_t size;
    uint8_t *view;                            /* as long as the disk can be; zeros behind its end */
    struct snapshot snapshots[MAX_SNAPSHOTS]; /* their views belong to the program */
    unsigned n_snapshots;
    uint8_t *base; /* the same; NULL: there is none */
    struct noted noted;
    /* The operation that led here: its place in the log, and whether all is durable after it. */
    size_t start, end;
    bool durable;
    enum noted_state bitmaps;
};

struct program {
    const struct subject *s;
    struct powerfs *power;
    struct dr_disk *disk;
    uint64_t unit, longest; /* bytes of a unit; of the disk at most */
    struct moment moments[LENGTH + 2];
    unsigned n;
    uint8_t *kept[2 * MAX_SNAPSHOTS]; /* views of snapshots */
    unsigned n_kept;
    char text[200];
};

static unsigned done_well[KINDS]; /* how often each operation was not refused */

#define PROGRAM_FAIL(p, fmt, ...) MODEL_FAIL((p)->s, "%s: " fmt, (p)->text, __VA_ARGS__)

static struct moment *now(struct program *p)
{
    return &p->moments[p->n - 1];
}

static struct dr_image *top(const struct program *p)
{
    return p->disk->chain->images[0];
}

static uint8_t *copy_of(const uint8_t *bytes, size_t n)
{
    uint8_t *copy = malloc(n);
    if (!copy)
        abort();
    memcpy(copy, bytes, n);
    return copy;
}

/* The next moment, as the present one. */
static struct moment *begin_moment(struct program *p)
{
    struct moment *m = &p->moments[p->n], *before = now(p);
    *m = *before;
    m->view = copy_of(before->view, p->longest);
    m->base = before->base ? copy_of(before->base, p->longest) : NULL;
    m->start = powerfs_ops(p->power);
    m->durable = false;
    p->n++;
    return m;
}

/* ------------------------------------------------------------------ the images */

static uint8_t *read_whole(struct program *p, struct dr_fs *fs, const char *path,
                           const char *snapshot, uint64_t *size, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_open_options o = {.snapshot = snapshot, .flags = DR_OPEN_FORCE_SHARE};
    struct dr_disk *disk;
    if (dr_open_fs(fs, path, &o, &disk, &err))
        PROGRAM_FAIL(p, "%s: %s", when, err.text);
    *size = dr_size(disk);
    if (*size > p->longest)
        PROGRAM_FAIL(p, "%s: %s has %llu bytes", when, path, (unsigned long long)*size);
    uint8_t *bytes = calloc(1, p->longest);
    if (!bytes || dr_pread(disk, bytes, 0, *size, &err))
        PROGRAM_FAIL(p, "%s: %s", when, err.text);
    dr_close(disk, NULL);
    return bytes;
}

static void open_top(struct program *p)
{
    struct dr_error err = DR_ERROR_INIT;
    if (model_open(powerfs_fs(p->power), p->s, DR_OPEN_RDWR, &p->disk, &err))
        PROGRAM_FAIL(p, "open: %s", err.text);
}

static void close_top(struct program *p)
{
    struct dr_error err = DR_ERROR_INIT;
    if (dr_close(p->disk, &err))
        PROGRAM_FAIL(p, "close: %s", err.text);
    p->disk = NULL;
}

/* Something in all units but the last, and where the subject wants it a snapshot, and something
 * else after that. */
static int fill_top(struct program *p, struct rnd *rnd, struct dr_error *err)
{
    struct moment *m = now(p);
    rnd_fill(rnd, m->view, 2 * p->unit);
    int r = dr_pwrite(p->disk, m->view, 0, 2 * p->unit, 0, err);
    if (r == 0)
        r = dr_image_snapshot_create(top(p), "first", err);
    if (r < 0)
        return r;
    p->kept[p->n_kept++] = copy_of(m->view, p->longest);
    m->snapshots[m->n_snapshots++] = (struct snapshot){1, m->size, p->kept[0]};
    rnd_fill(rnd, m->view + p->unit, p->unit);
    return dr_pwrite(p->disk, m->view + p->unit, p->unit, p->unit, 0, err);
}

/* In place of those that all harnesses have. */
static int make_bitmaps(struct program *p, struct rnd *rnd, struct dr_error *err)
{
    struct moment *m = now(p);
    int r = dr_disk_bitmap_change(p->disk, "fine", DR_BITMAP_REMOVE, NULL, err);
    if (r == 0)
        r = dr_disk_bitmap_change(p->disk, "coarse", DR_BITMAP_REMOVE, NULL, err);
    rnd_fill(rnd, m->view + p->unit, p->unit);
    return r < 0 ? r : noted_make(p->disk, p->unit, m->view + p->unit, &m->noted, err);
}

static void program_setup(struct program *p, const struct subject *s, struct rnd *rnd)
{
    struct dr_error err = DR_ERROR_INIT;
    struct shadow view;
    uint64_t size;
    *p = (struct program){.s = s, .power = powerfs_new(), .n = 1, .unit = s->size / UNITS};
    p->longest = p->unit * (UNITS + 1);
    struct moment *m = now(p);
    subject_make(s, powerfs_fs(p->power), rnd, &view, NULL);
    m->size = s->size;
    m->view = calloc(1, p->longest);
    memcpy(m->view, view.now, s->size);
    m->durable = true;
    m->bitmaps = NOTED_STORED;
    shadow_free(&view);
    if (s->base_format)
        m->base =
            read_whole(p, powerfs_fs(p->power), subject_base(s), NULL, &size, "at the beginning");
    open_top(p);
    if (s->snapshots && fill_top(p, rnd, &err))
        PROGRAM_FAIL(p, "fill: %s", err.text);
    if (s->bitmaps && make_bitmaps(p, rnd, &err))
        PROGRAM_FAIL(p, "add bitmaps: %s", err.text);
    close_top(p);
    powerfs_settle(p->power);
}

static void program_free(struct program *p)
{
    for (unsigned i = 0; i < p->n; i++) {
        free(p->moments[i].view);
        free(p->moments[i].base);
    }
    for (unsigned i = 0; i < p->n_kept; i++)
        free(p->kept[i]);
    powerfs_free(p->power);
}

/* ------------------------------------------------------------------ running one operation */

static void same_as_read(struct program *p, const char *what)
{
    struct dr_error err = DR_ERROR_INIT;
    struct moment *m = now(p);
    CLEANUP_FREE uint8_t *bytes = calloc(1, p->longest);
    if (dr_size(p->disk) != m->size || dr_pread(p->disk, bytes, 0, m->size, &err))
        PROGRAM_FAIL(p, "after %s the disk has %llu bytes %s", what,
                     (unsigned long long)dr_size(p->disk), err.text);
    if (memcmp(bytes, m->view, p->longest))
        PROGRAM_FAIL(p, "after %s the disk shows something else", what);
}

static int write_bytes(struct program *p, const struct step *step, uint64_t off, uint64_t len,
                       struct dr_error *err)
{
    struct rnd rnd = {p->n * 100 + step->unit};
    struct moment *m = now(p);
    if (off + len > m->size)
        return -ERANGE;
    if (step->kind == WRITE_CODED && !top(p)->fmt->encode)
        return -ENOTSUP;
    if (step->kind == ZERO)
        memset(m->view + off, 0, len);
    else if (step->kind == WRITE_CODED)
        memset(m->view + off, (int)(p->n * 10 + step->unit), len);
    else
        rnd_fill(&rnd, m->view + off, len);
    if (step->kind == ZERO)
        return dr_zero(p->disk, off, len, DR_MAY_UNMAP, err);
    if (step->kind != WRITE_CODED)
        return dr_pwrite(p->disk, m->view + off, off, len, 0, err);
    uint8_t *coded = malloc(len + 4096);
    int64_t n = top(p)->fmt->encode(top(p), m->view + off, len, off, coded, len + 4096);
    assert_true(n > 0);
    int r = dr_chain_write_coded(p->disk->chain, 0, coded, (uint32_t)n, off, len, err);
    free(coded);
    return r;
}

/* Zeros, or what the base has, or as before: which of these is up to the format. */
static int give_up(struct program *p, const struct step *step, uint64_t off, uint64_t len,
                   struct dr_error *err)
{
    struct moment *m = now(p);
    if (step->kind == DROP && p->s->bitmaps)
        return -ENOTSUP; /* only for what equals the base: no bitmap notes it */
    len = dr_min(len, m->size - off);
    CLEANUP_FREE uint8_t *bytes = malloc(len);
    const uint8_t *below = step->kind == DROP && m->base ? m->base + off : NULL;
    int r = step->kind == DROP ? dr_chain_drop(p->disk->chain, 0, off, len, err)
                               : dr_discard(p->disk, off, len, err);
    if (r == 0)
        r = dr_pread(p->disk, bytes, off, len, err);
    for (uint64_t i = 0; r == 0 && i < len; i++)
        if (bytes[i] != m->view[off + i] && bytes[i] != (below ? below[i] : 0))
            PROGRAM_FAIL(p, "after %s byte %llu is %02x", step->text, (unsigned long long)(off + i),
                         bytes[i]);
    if (r == 0)
        memcpy(m->view + off, bytes, len);
    return r;
}

static int create_snapshot(struct program *p, struct dr_error *err)
{
    struct moment *m = now(p);
    int r = dr_image_snapshot_create(top(p), "more", err);
    if (r < 0)
        return r;
    struct snapshot *s = &m->snapshots[m->n_snapshots++];
    p->kept[p->n_kept] = copy_of(m->view, p->longest);
    *s = (struct snapshot){1, m->size, p->kept[p->n_kept++]};
    for (unsigned i = 0; i + 1 < m->n_snapshots; i++)
        s->id = (unsigned)dr_max(s->id, m->snapshots[i].id + 1);
    return 0;
}

static int use_snapshot(struct program *p, const struct step *step, struct dr_error *err)
{
    struct moment *m = now(p);
    char id[12];
    if (m->n_snapshots == 0)
        return -ENOENT;
    unsigned i = step->unit ? m->n_snapshots - 1 : 0;
    struct snapshot *s = &m->snapshots[i];
    snprintf(id, sizeof(id), "%u", s->id);
    int r = step->kind == APPLY ? dr_image_snapshot_apply(top(p), id, err)
                                : dr_image_snapshot_delete(top(p), id, err);
    if (r < 0)
        return r;
    if (step->kind == APPLY) {
        m->size = s->size;
        memcpy(m->view, s->view, p->longest);
    } else {
        memmove(s, s + 1, (m->n_snapshots - i - 1) * sizeof(*s));
        m->n_snapshots--;
    }
    return 0;
}

static int resize(struct program *p, bool larger, struct dr_error *err)
{
    struct moment *m = now(p);
    uint64_t size = larger ? m->size + p->unit : m->size - p->unit;
    if (size > p->longest || size == 0)
        return -ERANGE;
    int r = dr_truncate(p->disk, size, err);
    if (r < 0)
        return r;
    if (!larger)
        memset(m->view + size, 0, p->unit);
    m->size = size;
    return 0;
}

static int commit(struct program *p, struct dr_error *err)
{
    struct moment *m = now(p);
    if (!m->base)
        return -ENOENT;
    int r = dr_disk_commit(p->disk, &(struct dr_commit_options){0}, NULL, err);
    if (r == 0)
        memcpy(m->base, m->view, m->size);
    return r;
}

static int run_kind(struct program *p, const struct step *step, struct dr_error *err)
{
    uint64_t off = step->unit * p->unit, len = step->units * p->unit;
    switch (step->kind) {
    case WRITE_PART:
        return write_bytes(p, step, off + SECTOR, SECTOR, err);
    case WRITE:
    case WRITE_CODED:
    case ZERO:
        return write_bytes(p, step, off, dr_min(len, now(p)->size - off), err);
    case DISCARD:
    case DROP:
        return give_up(p, step, off, len, err);
    case FLUSH:
        return dr_flush(p->disk, err);
    case REOPEN:
        close_top(p);
        open_top(p);
        return 0;
    case CREATE:
        return create_snapshot(p, err);
    case APPLY:
    case DELETE:
        return use_snapshot(p, step, err);
    case GROW:
    case SHRINK:
        return resize(p, step->kind == GROW, err);
    case BITMAP:
        return noted_change(p->disk, bitmap_changes[step->unit].name,
                            bitmap_changes[step->unit].action, &now(p)->noted, err);
    default:
        return commit(p, err);
    }
}

/* Operations on the image as a whole are refused where it has no room for them, or nothing to do
 * them with; what reads and writes is not. */
static bool may_refuse(enum kind kind, int r)
{
    return kind >= CREATE || r == -ERANGE || r == -ENOTSUP;
}

static void note_changes(struct program *p)
{
    struct moment *m = now(p), *before = m - 1;
    noted_compare(&m->noted, before->view, m->view, dr_min(before->size, m->size));
    noted_cut(&m->noted, m->size);
}

/* Is all that the disk holds at this moment what it held at the last one that is durable? */
static bool holds_what_is_durable(const struct program *p)
{
    const struct moment *m = &p->moments[p->n - 1], *last = m - 1;
    while (last > p->moments && !last->durable)
        last--;
    return last->size == m->size && !memcmp(last->view, m->view, (size_t)m->size);
}

/* A change of bitmaps that stand beside the image leaves the disk as durable as it was. */
static bool makes_durable(const struct program *p, enum kind kind)
{
    if (kind == BITMAP && !inside(p->s))
        return holds_what_is_durable(p);
    return kind >= FLUSH && kind != GROW && kind != SHRINK;
}

static void run_step(struct program *p, const struct step *step)
{
    struct dr_error err = DR_ERROR_INIT;
    snprintf(p->text + strlen(p->text), sizeof(p->text) - strlen(p->text), "%s%s",
             p->n > 1 ? ", " : "", step->text);
    struct moment *m = begin_moment(p);
    int r = run_kind(p, step, &err);
    if (r < 0 && !may_refuse(step->kind, r))
        PROGRAM_FAIL(p, "%s", err.text);
    done_well[step->kind] += r == 0;
    same_as_read(p, step->text);
    note_changes(p);
    m->end = powerfs_ops(p->power);
    m->durable = r == 0 && makes_durable(p, step->kind);
    if (step->kind == REOPEN)
        m->bitmaps = NOTED_STORED;
    else if (m->size != (m - 1)->size)
        m->bitmaps = NOTED_ANY;
    else if (m->bitmaps == NOTED_STORED)
        m->bitmaps = inside(p->s) ? NOTED_OPEN : NOTED_ANY; /* beside, all are distrusted */
}

/* ------------------------------------------------------------------ cuts */

struct cut {
    struct program *p;
    struct dr_fs *fs;
    unsigned first, last; /* moments that it may show */
    char text[200];
};

static struct cut make_cut(struct program *p, size_t k, enum powerfs_mode mode, uint64_t seed)
{
    struct cut c = {.p = p, .fs = powerfs_cut(p->power, k, mode, seed)};
    char op[120] = "nothing";
    assert_non_null(c.fs);
    for (unsigned i = 1; i < p->n; i++) {
        if (p->moments[i].durable && p->moments[i].end <= k)
            c.first = i;
        if (p->moments[i].start < k)
            c.last = i;
    }
    c.last = (unsigned)dr_max(c.first, c.last);
    if (k)
        powerfs_op_text(p->power, k - 1, op, sizeof(op));
    snprintf(c.text, sizeof(c.text), "cut after %zu of %zu (%s), mode %u, seed %llu", k,
             powerfs_ops(p->power), op, mode, (unsigned long long)seed);
    return c;
}

/* They are those of one of the moments, with what the disk shows beyond that. */
static void check_bitmaps(struct cut *c, const uint8_t *bytes, uint64_t size)
{
    struct program *p = c->p;
    struct dr_error err = DR_ERROR_INIT;
    struct noted found;
    const char *why = NULL;
    enum noted_state state = NOTED_STORED;
    if (!p->s->bitmaps)
        return;
    for (unsigned i = c->first; i <= c->last; i++)
        state = (enum noted_state)dr_max(state, p->moments[i].bitmaps);
    if (noted_read(c->fs, subject_top(p->s), &found, &err))
        PROGRAM_FAIL(p, "%s: %s", c->text, err.text);
    for (unsigned i = c->last;; i--) {
        const struct moment *m = &p->moments[i];
        why = noted_wrong(&found, &m->noted, m->view, bytes, dr_min(size, m->size), state);
        if (!why)
            return;
        if (i == c->first)
            PROGRAM_FAIL(p, "%s: of the bitmaps: %s", c->text, why);
    }
}

static void check_disk(struct cut *c)
{
    struct program *p = c->p;
    uint64_t size;
    CLEANUP_FREE uint8_t *bytes = read_whole(p, c->fs, subject_top(p->s), NULL, &size, c->text);
    check_bitmaps(c, bytes, size);
    bool known_size = false;
    for (unsigned i = c->first; i <= c->last; i++)
        known_size |= p->moments[i].size == size;
    if (!known_size)
        PROGRAM_FAIL(p, "%s: the disk has %llu bytes", c->text, (unsigned long long)size);
    for (uint64_t off = 0; off < size; off += SECTOR) {
        bool known = false;
        for (unsigned i = c->first; i <= c->last && !known; i++)
            known = !memcmp(bytes + off, p->moments[i].view + off, SECTOR);
        if (!known)
            PROGRAM_FAIL(p, "%s: the sector at %llu is neither old nor new", c->text,
                         (unsigned long long)off);
    }
}

static void check_base(struct cut *c)
{
    struct program *p = c->p;
    uint64_t size;
    if (!p->s->base_format)
        return;
    CLEANUP_FREE uint8_t *bytes = read_whole(p, c->fs, subject_base(p->s), NULL, &size, c->text);
    for (uint64_t off = 0; off < size; off++) {
        bool known = false;
        for (unsigned i = 0; i <= c->last && !known; i++)
            known = bytes[off] == p->moments[i].base[off];
        if (!known)
            PROGRAM_FAIL(p, "%s: the base's byte %llu has changed", c->text,
                         (unsigned long long)off);
    }
}

static int note_id(void *user, const struct dr_snapshot_info *info)
{
    struct moment *found = user;
    if (found->n_snapshots < MAX_SNAPSHOTS)
        found->snapshots[found->n_snapshots++].id = (unsigned)atoi(info->id);
    return 0;
}

static bool same_ids(const struct moment *a, const struct moment *b)
{
    bool same = a->n_snapshots == b->n_snapshots;
    for (unsigned i = 0; same && i < a->n_snapshots; i++)
        same = a->snapshots[i].id == b->snapshots[i].id;
    return same;
}

static void check_snapshots(struct cut *c)
{
    struct program *p = c->p;
    struct dr_error err = DR_ERROR_INIT;
    struct moment found = {0};
    struct dr_image *image;
    const struct moment *m = NULL;
    if (!inside(p->s))
        return;
    if (dr_image_open(c->fs, subject_top(p->s), p->s->format, 0, &image, &err) ||
        dr_image_snapshot_list(image, note_id, &found, &err))
        PROGRAM_FAIL(p, "%s: %s", c->text, err.text);
    dr_image_unref(image, NULL);
    for (unsigned i = c->first; i <= c->last && !m; i++)
        if (same_ids(&found, &p->moments[i]))
            m = &p->moments[i];
    if (!m)
        PROGRAM_FAIL(p, "%s: there are %u snapshots", c->text, found.n_snapshots);
    for (unsigned i = 0; i < m->n_snapshots; i++) {
        const struct snapshot *s = &m->snapshots[i];
        char id[12];
        uint64_t size;
        snprintf(id, sizeof(id), "%u", s->id);
        CLEANUP_FREE uint8_t *view = read_whole(p, c->fs, subject_top(p->s), id, &size, c->text);
        if (size != s->size || memcmp(view, s->view, p->longest))
            PROGRAM_FAIL(p, "%s: snapshot %s shows something else", c->text, id);
    }
}

/* By a program that shares nothing with the driver, and calls corrupt what QEMU's check does. */
static void check_counts(struct cut *c)
{
    struct program *p = c->p;
    struct dr_error err = DR_ERROR_INIT;
    struct qcow2_verdict v;
    if (strcmp(p->s->format, "qcow2") != 0)
        return;
    if (qcow2_verify(c->fs, subject_top(p->s), &v, &err))
        PROGRAM_FAIL(p, "%s: %s", c->text, err.text);
    if (v.low || v.shared || v.broken || v.stale)
        PROGRAM_FAIL(p, "%s: %u low, %u shared, %u broken, %u stale: %s", c->text, v.low, v.shared,
                     v.broken, v.stale, v.text);
}

/* Bitmaps after each unit's first sector was written to, and the disk was closed. */
static void check_bitmaps_written(struct cut *c, const struct noted *before, uint64_t size)
{
    struct program *p = c->p;
    struct dr_error err = DR_ERROR_INIT;
    struct noted found;
    CLEANUP_FREE uint8_t *was = calloc(1, p->longest), *is = calloc(1, p->longest);
    for (uint64_t off = 0; off < size; off += p->unit)
        is[off] = 1;
    struct noted then = *before;
    noted_compare(&then, was, is, size);
    if (noted_read(c->fs, subject_top(p->s), &found, &err))
        PROGRAM_FAIL(p, "%s: after writing: %s", c->text, err.text);
    const char *why = noted_wrong(&found, &then, is, is, size, NOTED_ANY);
    for (unsigned i = 0; i < found.n && !why; i++)
        if (found.list[i].inconsistent != before->list[i].inconsistent)
            why = "another one is inconsistent";
    if (why)
        PROGRAM_FAIL(p, "%s: after writing, of the bitmaps: %s", c->text, why);
}

/* Write to every unit: snapshots do not change by that, bitmaps note it, and what is counted is
 * right. */
static void check_writing(struct cut *c)
{
    struct program *p = c->p;
    struct noted before = {.n = 0};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result;
    struct dr_disk *disk;
    uint8_t sector[SECTOR];
    memset(sector, 0x5a, sizeof(sector));
    if (p->s->bitmaps && noted_read(c->fs, subject_top(p->s), &before, &err))
        PROGRAM_FAIL(p, "%s: %s", c->text, err.text);
    if (model_open(c->fs, p->s, DR_OPEN_RDWR, &disk, &err))
        PROGRAM_FAIL(p, "%s: open for writing: %s", c->text, err.text);
    uint64_t size = dr_size(disk);
    for (uint64_t off = 0; off < size; off += p->unit)
        if (dr_pwrite(disk, sector, off, SECTOR, 0, &err))
            PROGRAM_FAIL(p, "%s: write: %s", c->text, err.text);
    if (dr_close(disk, &err))
        PROGRAM_FAIL(p, "%s: close: %s", c->text, err.text);
    if (p->s->bitmaps)
        check_bitmaps_written(c, &before, size);
    check_snapshots(c);
    check_counts(c);
    if (!inside(
            p->s)) /* no counts; add-cow tells of bits that a shrink which was cut left behind */
        return;
    if (model_check(c->fs, p->s, DR_CHECK_FIX_LEAKS, &result, &err) ||
        model_check(c->fs, p->s, 0, &result, &err) || result.leaks || result.corruptions)
        PROGRAM_FAIL(p, "%s: %llu leaks, %llu corruptions after a repair %s", c->text,
                     (unsigned long long)result.leaks, (unsigned long long)result.corruptions,
                     err.text);
}

static void one_cut(struct program *p, size_t k, enum powerfs_mode mode, struct rnd *rnd)
{
    struct cut c = make_cut(p, k, mode, rnd_next(rnd));
    check_disk(&c);
    check_base(&c);
    check_snapshots(&c);
    check_counts(&c);
    if (rnd_below(rnd, 3) == 0)
        check_writing(&c);
    dr_fs_memory_free(c.fs);
}

/* ------------------------------------------------------------------ all of them */

static void run_program(const struct subject *s, unsigned long number)
{
    struct program p;
    struct rnd rnd = {model_seed() + number};
    program_setup(&p, s, &rnd);
    open_top(&p);
    for (unsigned i = 0; i < LENGTH; i++, number /= n_steps(s))
        run_step(&p, &steps[number % n_steps(s)]);
    run_step(&p, &(struct step){.kind = REOPEN, .text = "close"});
    close_top(&p);
    now(&p)->end = powerfs_ops(p.power);
    for (size_t k = 0, n = powerfs_ops(p.power); k <= n;
         k = powerfs_next(p.power, k, POWERFS_EVERY))
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++)
            if (mode == POWERFS_ALL || powerfs_open_ops(p.power, k))
                one_cut(&p, k, mode, &rnd);
    program_free(&p);
}

static uint64_t plant_try; /* other programs each time */

static void every_program(void **state)
{
    const struct subject *s = *state;
    unsigned long n = 1, step = (model_length(1) > 1 ? 1 : (s->bitmaps ? 96 : 24)) * SLOWER;
    for (unsigned i = 0; i < LENGTH; i++)
        n *= n_steps(s);
    memset(done_well, 0, sizeof(done_well));
    for (unsigned long i = (model_seed() + plant_try) % step; i < n; i += step)
        run_program(s, i);
    for (enum kind kind = WRITE; kind < KINDS; kind++)
        if (!done_well[kind] && (inside(s) || kind != WRITE_CODED) &&
            (s->snapshots || kind < CREATE || kind > DELETE) &&
            ((s->base_format && !s->snapshots) || kind != COMMIT) &&
            kind != (s->bitmaps ? DROP : BITMAP))
            MODEL_FAIL(s, "an operation was always refused: %u", kind);
}

static bool three_units(const struct subject *s)
{
    return strstr(s->name, "-three") != NULL;
}

/* ------------------------------------------------------------------ planted: COPIED stays */

static void sharing_what_is_copied(void **state)
{
    plant_into("qcow2", PLANT_COPIED);
    every_program(state);
}

static void copied_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    bool found = false;
    for (plant_try = 0; plant_try < 40 && !found; plant_try++)
        found = model_detects(sharing_what_is_copied, *state);
    plant_try = 0;
    if (!found)
        MODEL_FAIL(*state, "nobody noticed that what a snapshot has is written %s", "in place");
}

static bool with_snapshots(const struct subject *s)
{
    return three_units(s) && s->snapshots;
}

int main(void)
{
    if (MODEL_ONLY_PLANTS)
        return model_run("planted: COPIED stays", copied_is_found, with_snapshots) ? 1 : 0;
    return model_run("every short program", every_program, three_units) ? 1 : 0;
}
