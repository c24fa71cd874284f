/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A disk with something written gets another size; whatever happens then - nothing, a failing I/O,
 * a cut - it has the old size and all it held, or the new size and all of that which fits, and
 * behind it zeros. Nothing of a longer parent shows, and nothing of what was cut off before. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "model.h"
#include "plant.h"
#include "powerfs.h"

#define KIB 1024u
/* About so many cuts of one resize, and every failing I/O up to there: a large one that allocates
 * all it may repeats itself thousands of times. */
#define MANY 60

/* A toy grows without hiding what its file has there already. */
static bool resizable(const struct subject *s)
{
    return strcmp(s->format, "raw") != 0 && strcmp(s->format, "toy") != 0;
}

static void must(const struct subject *s, int r, const char *what, const struct dr_error *err)
{
    if (r)
        MODEL_FAIL(s, "%s: %d %s", what, r, err->text);
}

struct resizing {
    const struct subject *s;
    struct dr_disk *disk;
    uint64_t before, after;
    enum dr_preallocation prealloc; /* where it grows */
    uint8_t *content;               /* what is there before, zeros up to `after` behind it */
};

/* qcow2 and VMDK disks have whole sectors. */
static uint64_t whole(const struct subject *s, uint64_t size)
{
    return strcmp(s->format, "add-cow") ? dr_round_up(size, 512) : size;
}

static uint64_t other_size(const struct subject *s, struct rnd *rnd)
{
    uint64_t size = 1 + rnd_below(rnd, 2 * dr_max(s->size, s->base_size));
    return rnd_below(rnd, 3) ? dr_round_down(size, 512) + 512 : whole(s, size);
}

static void scribble(struct resizing *t, struct rnd *rnd)
{
    struct dr_error err = DR_ERROR_INIT;
    for (int i = 0; i < 6; i++) {
        uint64_t len = 1 + rnd_below(rnd, dr_min(30 * KIB, t->before));
        uint64_t off = rnd_below(rnd, 3) ? rnd_below(rnd, t->before - len + 1) : t->before - len;
        bool zero = rnd_below(rnd, 4) == 0;
        rnd_fill(rnd, t->content + off, len);
        if (zero)
            memset(t->content + off, 0, len);
        must(t->s,
             zero ? dr_zero(t->disk, off, len, DR_MAY_UNMAP, &err)
                  : dr_pwrite(t->disk, t->content + off, off, len, 0, &err),
             "scribble", &err);
    }
}

/* One change of size before the one that is looked at. */
static void resize_now(struct resizing *t, uint64_t size)
{
    struct dr_error err = DR_ERROR_INIT;
    must(t->s, dr_truncate(t->disk, size, &err), "resize", &err);
    model_limit_bitmaps(size);
    if (size < t->before)
        memset(t->content + size, 0, t->before - size);
    t->before = size;
}

static void resizing_setup(struct resizing *t, const struct subject *s, struct dr_fs *fs,
                           uint64_t seed)
{
    struct dr_error err = DR_ERROR_INIT;
    struct rnd rnd = {seed};
    struct shadow view;
    *t = (struct resizing){.s = s, .before = s->size};
    subject_make(s, fs, &rnd, &view, NULL);
    t->content = calloc(1, 4 * dr_max(s->size, s->base_size) + 4096);
    memcpy(t->content, view.now, s->size);
    shadow_free(&view);
    must(s, model_open(fs, s, DR_OPEN_RDWR, &t->disk, &err), "open", &err);
    scribble(t, &rnd);
    if (rnd_below(&rnd, 2)) {
        resize_now(t, other_size(s, &rnd));
        scribble(t, &rnd);
    }
    must(s, dr_close(t->disk, &err), "close", &err);
    t->after = other_size(s, &rnd);
    t->prealloc = (enum dr_preallocation)rnd_below(&rnd, DR_PREALLOC_FULL + 1);
    model_limit_bitmaps(t->after);
}

static int resize(struct resizing *t, struct dr_fs *fs, struct dr_error *err)
{
    int r = model_open(fs, t->s, DR_OPEN_RDWR, &t->disk, err);
    if (r)
        return r;
    enum dr_preallocation how = t->after > dr_size(t->disk) ? t->prealloc : DR_PREALLOC_OFF;
    r = dr_resize(t->disk, t->after, how, err);
    int closed = dr_close(t->disk, err);
    return r ? r : closed;
}

static void check_size(const struct resizing *t, struct dr_fs *fs, bool done, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size = 0;
    CLEANUP_FREE uint8_t *all = model_read_all(fs, subject_top(t->s), t->s->format, &size, &err);
    if (!all)
        MODEL_FAIL(t->s, "%llu to %llu, %s: %s", (unsigned long long)t->before,
                   (unsigned long long)t->after, when, err.text);
    if (size != t->after && (done || size != t->before))
        MODEL_FAIL(t->s, "%llu to %llu, %s: the size is %llu", (unsigned long long)t->before,
                   (unsigned long long)t->after, when, (unsigned long long)size);
    if (!memcmp(all, t->content, size))
        return;
    for (uint64_t i = 0; i < size; i++)
        if (all[i] != t->content[i])
            MODEL_FAIL(t->s, "%llu to %llu, %s: size %llu, byte %llu is %02x, not %02x",
                       (unsigned long long)t->before, (unsigned long long)t->after, when,
                       (unsigned long long)size, (unsigned long long)i, all[i], t->content[i]);
}

/* Larger than ever: what was cut off, and the parent, must not come back. */
static void check_growth(struct resizing *t, struct dr_fs *fs, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result;
    uint64_t size = 0;
    CLEANUP_FREE uint8_t *now = model_read_all(fs, subject_top(t->s), t->s->format, &size, &err);
    if (!now)
        MODEL_FAIL(t->s, "%s: %s", when, err.text);
    struct resizing more = {.s = t->s, .before = size, .content = t->content};
    if (size < t->before)
        memset(t->content + size, 0, t->before - size);
    t->before = size;
    more.after = whole(t->s, 2 * dr_max(t->s->size, t->s->base_size) + 3 * 512 + 5);
    model_pause_bitmaps(t->s, fs);
    must(t->s, resize(&more, fs, &err), "growing afterwards", &err);
    check_size(&more, fs, true, when);
    must(t->s, model_check(fs, t->s, 0, &result, &err), "check", &err);
    if (result.corruptions || result.check_errors)
        MODEL_FAIL(t->s, "%s: %llu corruptions", when, (unsigned long long)result.corruptions);
    model_resume_bitmaps();
}

static void resize_cut(const struct subject *s, uint64_t seed)
{
    struct resizing t;
    struct dr_error err = DR_ERROR_INIT;
    struct powerfs *p = powerfs_new();
    char when[120], op[80];
    resizing_setup(&t, s, powerfs_fs(p), seed);
    powerfs_settle(p);
    must(s, resize(&t, powerfs_fs(p), &err), "resize", &err);
    check_size(&t, powerfs_fs(p), true, "at the end");
    size_t n = powerfs_ops(p);
    for (size_t k = 0; k <= n; k = powerfs_next(p, k, MANY))
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
            if (mode && !powerfs_open_ops(p, k))
                continue;
            struct dr_fs *disk = powerfs_cut(p, k, mode, seed + k);
            snprintf(when, sizeof(when), "cut after %zu (%s), mode %u", k,
                     k ? powerfs_op_text(p, k - 1, op, sizeof(op)) : "nothing", mode);
            check_size(&t, disk, k == powerfs_ops(p), when);
            if (mode == POWERFS_RANDOM || k + 1 >= powerfs_ops(p)) {
                struct resizing copy = t;
                copy.content = malloc(4 * dr_max(s->size, s->base_size) + 4096);
                memcpy(copy.content, t.content, 4 * dr_max(s->size, s->base_size) + 4096);
                check_growth(&copy, disk, when);
                free(copy.content);
            }
            dr_fs_memory_free(disk);
        }
    free(t.content);
    powerfs_free(p);
}

static unsigned plant_try;

static void resizes_survive_cuts(void **state)
{
    for (unsigned i = 0; i < model_length(3); i += SLOWER)
        resize_cut(*state, model_seed() + 1000 * plant_try + i);
}

static bool resize_fault(const struct subject *s, uint64_t seed, uint64_t nth)
{
    struct resizing t;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *memory = dr_fs_memory_new();
    char when[60];
    resizing_setup(&t, s, memory, seed);
    struct faultfs *f = faultfs_new(memory);
    struct faultfs_plan plan = {.nth = nth, .error = nth % 2 ? EIO : ENOSPC, .for_good = nth % 3};
    faultfs_arm(f, &plan);
    int r = resize(&t, faultfs_fs(f), &err);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    snprintf(when, sizeof(when), "I/O %llu failed", (unsigned long long)nth);
    if (r && !fired)
        MODEL_FAIL(s, "no I/O has failed: %s", err.text);
    check_size(&t, memory, !r, when);
    if (r)
        check_growth(&t, memory, when);
    free(t.content);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

static void resizes_survive_faults(void **state)
{
    for (unsigned i = 0; i < model_length(2); i += SLOWER)
        for (uint64_t nth = 0; resize_fault(*state, model_seed() + i, nth);
             nth += SLOWER + nth / MANY)
            ;
}

/* Nothing can be cut off half way where nothing is done. */
static void empty_disks(void **state)
{
    const struct subject *s = *state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *fs = dr_fs_memory_new();
    struct resizing t;
    resizing_setup(&t, s, fs, model_seed());
    t.after = 0;
    assert_int_equal(resize(&t, fs, &err), -EINVAL);
    t.after = t.before;
    check_size(&t, fs, true, "after a refusal");
    free(t.content);
    dr_fs_memory_free(fs);

    struct subject none = *s;
    none.size = 0;
    none.junk = false;
    struct powerfs *p = powerfs_new();
    assert_int_equal(
        model_create(powerfs_fs(p), "add-cow", subject_top(s), 0, NULL, 0, NULL, NULL, &err), 0);
    powerfs_settle(p);
    t = (struct resizing){.s = &none, .after = 5000, .content = calloc(1, 9000)};
    must(s, resize(&t, powerfs_fs(p), &err), "grow from nothing", &err);
    for (size_t k = 0; k <= powerfs_ops(p); k++)
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
            struct dr_fs *disk = powerfs_cut(p, k, mode, k);
            check_size(&t, disk, k == powerfs_ops(p), "growing from nothing");
            dr_fs_memory_free(disk);
        }
    free(t.content);
    powerfs_free(p);
}

static enum plant resize_plant;

static void resizes_with_a_fault(void **state)
{
    plant_into("add-cow", resize_plant);
    resizes_survive_cuts(state);
}

static void wrong_growth_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    static const enum plant faults[] = {PLANT_GROW_FIRST, PLANT_GROW_BARE};
    for (unsigned i = 0; i < 2; i++) {
        resize_plant = faults[i];
        bool found = false;
        for (plant_try = 0; plant_try < 100 && !found; plant_try++)
            found = model_detects(resizes_with_a_fault, *state);
        if (!found)
            MODEL_FAIL(*state, "nobody noticed fault %u", resize_plant);
    }
}

static bool with_a_longer_parent(const struct subject *s)
{
    return !strcmp(s->name, "add-cow-over-longer");
}

int main(void)
{
    int r = model_run("another size, cut off", resizes_survive_cuts, resizable);
    r += model_run("another size, every single I/O fails", resizes_survive_faults, resizable);
    r += model_run("empty disks", empty_disks, with_a_longer_parent);
    r += model_run("planted: growing in the wrong order", wrong_growth_is_found,
                   with_a_longer_parent);
    return r ? 1 : 0;
}
