/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What only add-cow has: a size that is the raw file's length, bits that neighbours share, and
 * places that are never free because each sector has but one. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "model.h"
#include "plant.h"
#include "powerfs.h"

#define KIB 1024u

static bool add_cow(const struct subject *s)
{
    return !strcmp(s->format, "add-cow");
}

static void must(const struct subject *s, int r, const char *what, const struct dr_error *err)
{
    if (r)
        MODEL_FAIL(s, "%s: %d %s", what, r, err->text);
}

/* ------------------------------------------------------------------ another size
 *
 * A disk with something written gets another size; whatever happens then - nothing, a failing I/O,
 * a cut - it has the old size and all it held, or the new size and all of that which fits, and
 * behind it zeros. Nothing of a longer parent shows, and nothing of what was cut off before. */

struct resizing {
    const struct subject *s;
    struct dr_disk *disk;
    uint64_t before, after;
    uint8_t *content; /* what is there before, zeros up to `after` behind it */
};

static uint64_t other_size(const struct subject *s, struct rnd *rnd)
{
    uint64_t size = 1 + rnd_below(rnd, 2 * dr_max(s->size, s->base_size));
    return rnd_below(rnd, 3) ? dr_round_down(size, 512) + 512 : size;
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
}

static int resize(struct resizing *t, struct dr_fs *fs, struct dr_error *err)
{
    int r = model_open(fs, t->s, DR_OPEN_RDWR, &t->disk, err);
    if (r)
        return r;
    r = dr_truncate(t->disk, t->after, err);
    int closed = dr_close(t->disk, err);
    return r ? r : closed;
}

static void check_size(const struct resizing *t, struct dr_fs *fs, bool done, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size = 0;
    CLEANUP_FREE uint8_t *all = model_read_all(fs, subject_top(t->s), "add-cow", &size, &err);
    if (!all)
        MODEL_FAIL(t->s, "%llu to %llu, %s: %s", (unsigned long long)t->before,
                   (unsigned long long)t->after, when, err.text);
    if (size != t->after && (done || size != t->before))
        MODEL_FAIL(t->s, "%llu to %llu, %s: the size is %llu", (unsigned long long)t->before,
                   (unsigned long long)t->after, when, (unsigned long long)size);
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
    CLEANUP_FREE uint8_t *now = model_read_all(fs, subject_top(t->s), "add-cow", &size, &err);
    if (!now)
        MODEL_FAIL(t->s, "%s: %s", when, err.text);
    struct resizing more = {.s = t->s, .before = size, .content = t->content};
    if (size < t->before)
        memset(t->content + size, 0, t->before - size);
    t->before = size;
    more.after = 2 * dr_max(t->s->size, t->s->base_size) + 3 * 512 + 5;
    must(t->s, resize(&more, fs, &err), "growing afterwards", &err);
    check_size(&more, fs, true, when);
    must(t->s, model_check(fs, t->s, 0, &result, &err), "check", &err);
    if (result.corruptions || result.check_errors)
        MODEL_FAIL(t->s, "%s: %llu corruptions", when, (unsigned long long)result.corruptions);
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
    for (size_t k = 0; k <= powerfs_ops(p); k++)
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

static void resizes_survive_cuts(void **state)
{
    for (unsigned i = 0; i < model_length(8); i++)
        resize_cut(*state, model_seed() + i);
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
    for (unsigned i = 0; i < model_length(4); i++)
        for (uint64_t nth = 0; resize_fault(*state, model_seed() + i, nth); nth++)
            ;
}

static enum plant resize_plant;

static void resizes_with_a_fault(void **state)
{
    plant_into("add-cow", resize_plant);
    resizes_survive_cuts(state);
}

static void wrong_growth_is_found(void **state)
{
    static const enum plant faults[] = {PLANT_GROW_FIRST, PLANT_GROW_BARE};
    for (unsigned i = 0; i < 2; i++) {
        resize_plant = faults[i];
        if (!model_detects(resizes_with_a_fault, *state))
            MODEL_FAIL(*state, "nobody noticed fault %u", resize_plant);
    }
}

static bool with_a_longer_parent(const struct subject *s)
{
    return !strcmp(s->name, "add-cow-over-longer");
}

/* ------------------------------------------------------------------ neighbours
 *
 * Eight sectors have their bits in one byte, and each belongs to another thread; others read and
 * flush meanwhile. No bit is lost, none appears. */

enum { WRITERS = 4, HELPERS = 2, SECTORS = 768 };

enum job { JOB_WRITE, JOB_ZERO, JOB_DROP, JOB_READ, JOB_FLUSH };

struct crew {
    const struct subject *s;
    struct dr_disk *disk;
    const uint8_t *below;
    unsigned jobs; /* how many of the writers are done */
    pthread_mutex_t lock;
};

struct hand {
    struct crew *crew;
    pthread_t thread;
    enum job job;
    unsigned first; /* sector; then every WRITERS-th */
    struct dr_error err;
    int result;
};

/* What a sector holds once its writer has been there. */
static void sector_of(uint8_t *buf, unsigned n)
{
    memset(buf, (int)(1 + n % 251), 512);
    memcpy(buf, &n, sizeof(n));
}

static bool writers_left(struct crew *c)
{
    pthread_mutex_lock(&c->lock);
    bool left = c->jobs < WRITERS;
    pthread_mutex_unlock(&c->lock);
    return left;
}

/* The parent's bytes become the image's own and are given up again, which clears the bit. */
static int fill_and_drop(struct hand *h, uint64_t off)
{
    struct dr_chain *chain = dr_disk_enter(h->crew->disk);
    int r = dr_chain_fill(chain, 0, h->crew->below + off, off, 512, &h->err);
    if (!r)
        r = dr_chain_drop(chain, 0, off, 512, &h->err);
    dr_disk_leave(h->crew->disk);
    return r;
}

static int work_on(struct hand *h, unsigned n)
{
    uint8_t buf[512];
    uint64_t off = 512ull * n;
    if (h->job == JOB_ZERO)
        return dr_zero(h->crew->disk, off, 512, DR_MAY_UNMAP, &h->err);
    if (h->job == JOB_DROP)
        return fill_and_drop(h, off);
    sector_of(buf, n);
    return dr_pwrite(h->crew->disk, buf, off, 512, n % 97 ? 0 : DR_FUA, &h->err);
}

/* Old or new, never anything else. */
static int read_some(struct hand *h, struct rnd *rnd)
{
    uint8_t buf[16 * 512], want[512];
    static const uint8_t zeros[512];
    unsigned first = (unsigned)rnd_below(rnd, SECTORS - 16);
    int r = dr_pread(h->crew->disk, buf, 512ull * first, sizeof(buf), &h->err);
    for (unsigned i = 0; !r && i < 16; i++) {
        sector_of(want, first + i);
        if (memcmp(buf + 512 * i, want, 512) && memcmp(buf + 512 * i, zeros, 512) &&
            memcmp(buf + 512 * i, h->crew->below + 512ull * (first + i), 512))
            r = dr_fail(&h->err, EILSEQ, "sector %u is neither old nor new", first + i);
    }
    return r;
}

static void *hand_run(void *arg)
{
    struct hand *h = arg;
    struct rnd rnd = {model_seed()};
    if (h->job == JOB_READ || h->job == JOB_FLUSH) {
        while (!h->result && writers_left(h->crew))
            h->result = h->job == JOB_READ ? read_some(h, &rnd) : dr_flush(h->crew->disk, &h->err);
        return NULL;
    }
    for (unsigned n = h->first; n < SECTORS && !h->result; n += WRITERS)
        h->result = work_on(h, n);
    pthread_mutex_lock(&h->crew->lock);
    h->crew->jobs++;
    pthread_mutex_unlock(&h->crew->lock);
    return NULL;
}

static void run_crew(struct crew *c, const enum job *jobs)
{
    struct hand hands[WRITERS + HELPERS] = {0};
    for (unsigned i = 0; i < WRITERS + HELPERS; i++) {
        hands[i] = (struct hand){.crew = c, .job = jobs[i], .first = i};
        assert_int_equal(pthread_create(&hands[i].thread, NULL, hand_run, &hands[i]), 0);
    }
    for (unsigned i = 0; i < WRITERS + HELPERS; i++)
        pthread_join(hands[i].thread, NULL);
    for (unsigned i = 0; i < WRITERS + HELPERS; i++)
        must(c->s, hands[i].result, "a thread", &hands[i].err);
}

static void check_sectors(const struct crew *c, const enum job *jobs, const uint8_t *all)
{
    uint8_t want[512];
    for (unsigned n = 0; n < SECTORS; n++) {
        enum job job = jobs[n % WRITERS];
        sector_of(want, n);
        if (job == JOB_ZERO)
            memset(want, 0, 512);
        if (job == JOB_DROP)
            memcpy(want, c->below + 512ull * n, 512);
        if (memcmp(all + 512ull * n, want, 512))
            MODEL_FAIL(c->s, "sector %u is not what thread %u left", n, n % WRITERS);
    }
}

static void one_crew(const struct subject *s, const enum job *jobs, uint64_t seed)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *fs = dr_fs_memory_new();
    struct crew c = {.s = s, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct rnd rnd = {seed};
    struct shadow view;
    uint8_t *below = NULL;
    uint64_t size = 0;
    subject_make(s, fs, &rnd, &view, &below);
    c.below = below;
    must(s, model_open(fs, s, DR_OPEN_RDWR, &c.disk, &err), "open", &err);
    run_crew(&c, jobs);
    CLEANUP_FREE uint8_t *all = malloc(s->size);
    must(s, dr_pread(c.disk, all, 0, s->size, &err), "read", &err);
    check_sectors(&c, jobs, all);
    must(s, dr_close(c.disk, &err), "close", &err);
    CLEANUP_FREE uint8_t *again = model_read_all(fs, subject_top(s), "add-cow", &size, &err);
    if (!again)
        MODEL_FAIL(s, "reopen: %s", err.text);
    check_sectors(&c, jobs, again);
    free(below);
    shadow_free(&view);
    dr_fs_memory_free(fs);
}

static void neighbours_share_a_byte(void **state)
{
    static const enum job crews[][WRITERS + HELPERS] = {
        {JOB_WRITE, JOB_WRITE, JOB_WRITE, JOB_WRITE, JOB_READ, JOB_FLUSH},
        {JOB_WRITE, JOB_ZERO, JOB_WRITE, JOB_ZERO, JOB_FLUSH, JOB_FLUSH},
        {JOB_WRITE, JOB_DROP, JOB_ZERO, JOB_DROP, JOB_READ, JOB_FLUSH},
    };
    for (unsigned i = 0; i < model_length(9); i++)
        one_crew(*state, crews[i % 3], model_seed() + i);
}

static bool with_enough_sectors(const struct subject *s)
{
    return add_cow(s) && s->base_format && s->size >= SECTORS * 512ull;
}

int main(void)
{
    int r = model_run("another size, cut off", resizes_survive_cuts, add_cow);
    r += model_run("another size, every single I/O fails", resizes_survive_faults, add_cow);
    r += model_run("planted: growing in the wrong order", wrong_growth_is_found,
                   with_a_longer_parent);
    r += model_run("neighbours share a byte", neighbours_share_a_byte, with_enough_sectors);
    return r ? 1 : 0;
}
