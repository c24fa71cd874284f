/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts after any prefix of a run, with any subset of what no flush had made durable: the
 * image opens read-only without repair, each sector is old or new and what was flushed is exact;
 * opening it for writing recovers it; the base has not changed. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "model.h"
#include "plant.h"
#include "powerfs.h"
#include "toy.h"

struct cuts {
    const struct subject *s;
    struct powerfs *power;
    struct shadow view, sets; /* sets: what the walk along the log allows */
    uint8_t *below, *base, *snapshot;
    struct workload w;
    struct shadow_log log;
};

/* Switches of the planted faults; off when the suite proper runs. */
static size_t plant_skip_flush = SIZE_MAX;
static uint64_t plant_try; /* another run each time */
static bool always_deep;   /* check every cut, not one of three */

static void cuts_setup(struct cuts *c, const struct subject *s, struct rnd *rnd)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size;
    *c = (struct cuts){.s = s, .power = powerfs_new()};
    struct dr_fs *fs = powerfs_fs(c->power);
    subject_make(s, fs, rnd, &c->view, &c->below);
    if (s->base_format)
        c->base = model_read_all(fs, subject_base(s), s->base_format, &size, &err);
    if (s->snapshot) {
        c->snapshot = malloc(s->size);
        assert_int_equal(toy_snapshot_read(fs, subject_top(s), c->snapshot, s->size, 0, &err), 0);
    }
    powerfs_settle(c->power);
    powerfs_skip_flush(c->power, plant_skip_flush);
    shadow_init(&c->sets, s->size);
    shadow_write(&c->sets, 0, c->view.now, s->size);
    shadow_flushed(&c->sets);
    workload_init(&c->w, s, fs, &c->view, s->base_format ? c->below : NULL);
}

static void cuts_free(struct cuts *c)
{
    workload_free(&c->w);
    shadow_free(&c->view);
    shadow_free(&c->sets);
    shadow_log_free(&c->log);
    free(c->below);
    free(c->base);
    free(c->snapshot);
    powerfs_free(c->power);
}

static void run_logged(struct cuts *c, const struct op *op)
{
    uint64_t start = powerfs_ops(c->power);
    bool flush = op->kind == OP_FLUSH || op->kind == OP_REOPEN;
    bool looks = op->kind == OP_READ || op->kind == OP_STATUS;
    if (workload_run(&c->w, op))
        MODEL_FAIL(c->s, "%s: %s", op_text(op), c->w.err.text);
    shadow_log_add(&c->log, &c->view, op->off, flush || looks ? 0 : op->len, flush, start,
                   powerfs_ops(c->power));
}

static void run_all(struct cuts *c, struct rnd *rnd, unsigned n)
{
    if (workload_open(&c->w, DR_OPEN_RDWR))
        MODEL_FAIL(c->s, "open: %s", c->w.err.text);
    for (unsigned i = 0; i < n; i++) {
        struct op op = workload_next(&c->w, rnd);
        run_logged(c, &op);
    }
    uint64_t start = powerfs_ops(c->power);
    if (workload_close(&c->w))
        MODEL_FAIL(c->s, "close: %s", c->w.err.text);
    shadow_log_add(&c->log, &c->view, 0, 0, true, start, powerfs_ops(c->power));
}

/* ------------------------------------------------------------------ one cut */

static const char *cut_text(const struct cuts *c, size_t k, unsigned mode, uint64_t seed)
{
    static char text[300], op[200];
    snprintf(text, sizeof(text), "cut after %zu of %zu (last: %s), mode %u, seed %llu", k,
             powerfs_ops(c->power),
             k ? powerfs_op_text(c->power, k - 1, op, sizeof(op)) : "nothing", mode,
             (unsigned long long)seed);
    return text;
}

static void check_reading(struct cuts *c, struct dr_fs *disk, const char *cut, uint8_t **all)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size, bad;
    *all = model_read_all(disk, subject_top(c->s), c->s->format, &size, &err);
    if (!*all)
        MODEL_FAIL(c->s, "%s: does not open or read: %s", cut, err.text);
    if (!shadow_allows(&c->sets, *all, &bad))
        MODEL_FAIL(c->s, "%s: the sector at %llu is neither old nor new", cut,
                   (unsigned long long)bad);
}

static void check_others(struct cuts *c, struct dr_fs *disk, const char *cut)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size;
    if (c->base) {
        CLEANUP_FREE uint8_t *now =
            model_read_all(disk, subject_base(c->s), c->s->base_format, &size, &err);
        if (!now || memcmp(now, c->base, c->s->base_size))
            MODEL_FAIL(c->s, "%s: the base has changed", cut);
    }
    if (c->snapshot) {
        CLEANUP_FREE uint8_t *now = malloc(c->s->size);
        if (toy_snapshot_read(disk, subject_top(c->s), now, c->s->size, 0, &err) ||
            memcmp(now, c->snapshot, c->s->size))
            MODEL_FAIL(c->s, "%s: the internal snapshot has changed", cut);
    }
}

static void check_result(struct cuts *c, struct dr_fs *disk, const char *cut, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result;
    if (model_check(disk, c->s, 0, &result, &err))
        MODEL_FAIL(c->s, "%s: check %s: %s", cut, when, err.text);
    if (result.corruptions || result.check_errors)
        MODEL_FAIL(c->s, "%s: %llu corruptions %s", cut, (unsigned long long)result.corruptions,
                   when);
}

/* Recover, read the same, write something, close, still sound; repair leaves no leak. */
static void check_writing(struct cuts *c, struct dr_fs *disk, const char *cut, const uint8_t *all)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result;
    struct dr_disk *d;
    uint8_t sector[512];
    if (model_open(disk, c->s, DR_OPEN_RDWR, &d, &err) ||
        dr_pread(d, c->w.buf, 0, c->s->size, &err))
        MODEL_FAIL(c->s, "%s: open for writing: %s", cut, err.text);
    if (memcmp(c->w.buf, all, c->s->size))
        MODEL_FAIL(c->s, "%s: recovery has changed the content", cut);
    memset(sector, 0x5a, sizeof(sector));
    for (uint64_t off = 0; off + 512 <= c->s->size; off += c->s->size / 3)
        if (dr_pwrite(d, sector, off, 512, 0, &err))
            MODEL_FAIL(c->s, "%s: write after recovery: %s", cut, err.text);
    if (dr_close(d, &err))
        MODEL_FAIL(c->s, "%s: close after recovery: %s", cut, err.text);
    check_result(c, disk, cut, "after recovery");
    if (model_check(disk, c->s, DR_CHECK_FIX_LEAKS, &result, &err) ||
        model_check(disk, c->s, 0, &result, &err) || result.leaks || result.corruptions)
        MODEL_FAIL(c->s, "%s: %llu leaks after a repair (%s)", cut,
                   (unsigned long long)result.leaks, err.text);
}

static void one_cut(struct cuts *c, size_t k, enum powerfs_mode mode, uint64_t seed, bool deep)
{
    struct dr_fs *disk = powerfs_cut(c->power, k, mode, seed);
    const char *cut = cut_text(c, k, mode, seed);
    uint8_t *all;
    assert_non_null(disk);
    check_reading(c, disk, cut, &all);
    check_others(c, disk, cut);
    if (deep) {
        check_result(c, disk, cut, "before recovery");
        check_writing(c, disk, cut, all);
    }
    free(all);
    dr_fs_memory_free(disk);
}

/* limit: how many prefixes to try; all of them when there are fewer. */
static void cut_everywhere(struct cuts *c, unsigned limit, struct rnd *rnd)
{
    struct shadow_walk walk;
    size_t n = powerfs_ops(c->power);
    shadow_walk_init(&walk, &c->log, &c->sets);
    for (size_t k = 0; k <= n; k++) {
        shadow_walk_to(&walk, k);
        if (n > limit && k < n && rnd_below(rnd, n) >= limit)
            continue;
        bool deep = rnd_below(rnd, 3) == 0 || always_deep;
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++)
            if (mode <= POWERFS_NONE || powerfs_open_ops(c->power, k))
                one_cut(c, k, mode, rnd_next(rnd), deep);
        for (unsigned i = 1; i < model_length(2) && powerfs_open_ops(c->power, k); i++)
            one_cut(c, k, POWERFS_RANDOM, rnd_next(rnd), deep);
    }
    shadow_walk_free(&walk);
}

static void power_cuts(void **state)
{
    struct cuts c;
    struct rnd rnd = {model_seed() + plant_try};
    cuts_setup(&c, *state, &rnd);
    run_all(&c, &rnd, model_length(40));
    cut_everywhere(&c, model_length(60), &rnd);
    cuts_free(&c);
}

/* ------------------------------------------------------------------ writes inside a flush
 *
 * At each I/O of a flush another write lands. It must not become visible through that flush with
 * its data still in the air. */

struct meddler {
    struct cuts *c;
    struct rnd rnd;
    bool active, inside, failed;
    unsigned writes;
};

static void *meddle_write(void *arg)
{
    struct meddler *m = arg;
    struct op op = {.kind = OP_WRITE, .seed = rnd_next(&m->rnd)};
    uint64_t size = m->c->s->size;
    op.len = dr_min(512 * (1 + rnd_below(&m->rnd, 20)), size);
    op.off = dr_round_down(rnd_below(&m->rnd, size - op.len + 1), 512);
    uint64_t start = powerfs_ops(m->c->power);
    m->failed |= workload_run(&m->c->w, &op) != 0;
    shadow_log_add(&m->c->log, &m->c->view, op.off, op.len, false, start, powerfs_ops(m->c->power));
    m->writes++;
    return NULL;
}

/* The flush waits for the write, which another thread makes: as it may be, and always the same. */
static int meddle(void *user, const struct faultfs_io *io)
{
    struct meddler *m = user;
    pthread_t thread;
    if (!m->active || m->inside ||
        (io->kind != FAULTFS_FLUSH && io->kind != FAULTFS_WRITE && io->kind != FAULTFS_ZERO))
        return 0;
    m->inside = true; /* its own I/O is left alone */
    if (pthread_create(&thread, NULL, meddle_write, m))
        abort();
    pthread_join(thread, NULL);
    m->inside = false;
    return 0;
}

/* A write to what an add-cow gave up waits for the next flush, and would for the one it is inside
 * of.
 */
static bool may_come_before(const struct subject *s, const struct op *op)
{
    if (op->kind == OP_FLUSH || op->kind == OP_REOPEN)
        return false;
    return strcmp(s->format, "add-cow") != 0 || (op->kind != OP_DROP && op->kind != OP_DISCARD);
}

/* A flush makes durable what came before it, not what came inside it: the log must have it so. */
static void flush_meddled(struct cuts *c, struct meddler *m)
{
    size_t before = c->log.n;
    struct shadow_event *events;
    m->active = true;
    if (dr_flush(c->w.disk, &c->w.err))
        MODEL_FAIL(c->s, "flush: %s", c->w.err.text);
    m->active = false;
    if (m->failed)
        MODEL_FAIL(c->s, "a write inside a flush: %s", c->w.err.text);
    shadow_log_add(&c->log, &c->view, 0, 0, true, powerfs_ops(c->power), powerfs_ops(c->power));
    events = c->log.events; /* the flush goes before the writes; it ends with the last of them */
    struct shadow_event flush = events[c->log.n - 1];
    memmove(&events[before + 1], &events[before], (c->log.n - 1 - before) * sizeof(*events));
    events[before] = flush;
}

/* As shadow_walk, but events may overlap: a flush settles what ended before it began. */
static void allow_overlapping(struct cuts *c, struct shadow *initial, size_t k)
{
    const struct shadow_log *log = &c->log;
    size_t floor = 0;
    for (size_t i = 0; i < log->n; i++)
        if (log->events[i].flush && log->events[i].end <= k)
            floor = i;
    shadow_free(&c->sets);
    shadow_init(&c->sets, c->s->size);
    shadow_write(&c->sets, 0, initial->now, initial->size);
    shadow_flushed(&c->sets);
    for (size_t i = 0; i < log->n; i++) {
        const struct shadow_event *e = &log->events[i];
        if (!e->flush && (e->start < k || i < floor))
            shadow_allow(&c->sets, e, i < floor);
    }
}

/* A write inside a flush that waits for the next flush would wait for ever. */
__attribute__((unused)) static bool never_waits(const struct subject *s)
{
    return !s->waits;
}

static void writes_inside_flushes(void **state)
{
    const struct subject *s = *state;
    struct cuts c;
    struct shadow initial;
    struct rnd rnd = {model_seed() + plant_try};
    cuts_setup(&c, s, &rnd);
    shadow_init(&initial, s->size);
    shadow_write(&initial, 0, c.view.now, s->size);
    struct faultfs *fault = faultfs_new(powerfs_fs(c.power));
    struct meddler m = {.c = &c, .rnd = {model_seed() + plant_try + 1}};
    faultfs_observe(fault, meddle, &m);
    c.w.fs = faultfs_fs(fault);
    if (workload_open(&c.w, DR_OPEN_RDWR))
        MODEL_FAIL(s, "open: %s", c.w.err.text);
    for (unsigned i = 0; i < model_length(12); i++) {
        for (int j = 0; j < 2; j++) {
            struct op op = workload_next(&c.w, &rnd);
            if (may_come_before(s, &op))
                run_logged(&c, &op);
        }
        flush_meddled(&c, &m);
    }
    if (workload_close(&c.w))
        MODEL_FAIL(s, "close: %s", c.w.err.text);
    for (size_t k = 0, n = powerfs_ops(c.power); k <= n; k++) {
        if (rnd_below(&rnd, n) >= model_length(80))
            continue;
        allow_overlapping(&c, &initial, k);
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++)
            one_cut(&c, k, mode, rnd_next(&rnd), false);
    }
    assert_true(m.writes > 0 || !strcmp(s->format, "raw"));
    shadow_free(&initial);
    faultfs_free(fault);
    cuts_free(&c);
}

/* ------------------------------------------------------------------ planted faults */

static enum plant plant_fault;

static void with_a_fault(void **state)
{
    const struct subject *s = *state;
    plant_into(s->format, plant_fault);
    power_cuts(state);
}

static void wrong_order_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    static const enum plant faults[] = {PLANT_EAGER_BITS, PLANT_EARLY_PUNCH};
    for (unsigned i = 0; i < 2; i++) {
        bool found = false;
        plant_fault = faults[i];
        for (plant_try = 0; plant_try < 100 && !found; plant_try++)
            found = model_detects(with_a_fault, *state);
        plant_try = 0;
        if (!found)
            MODEL_FAIL(*state, "nobody noticed fault %u", plant_fault);
    }
}

__attribute__((unused)) static bool one_add_cow(const struct subject *s)
{
    return !strcmp(s->name, "add-cow-over-raw");
}

static void skipped_flush_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    const struct subject *s = *state;
    bool found = false;
    for (plant_skip_flush = 0; plant_skip_flush < 40 && !found; plant_skip_flush++)
        found = model_detects(power_cuts, s);
    plant_skip_flush = SIZE_MAX;
    if (!found)
        MODEL_FAIL(s, "no skipped flush was noticed");
}

__attribute__((unused)) static bool not_raw(const struct subject *s)
{
    return !strcmp(s->name, "toy") || !strcmp(s->name, "vmdk-sparse") ||
           !strcmp(s->name, "add-cow-over-shorter");
}

__attribute__((unused)) static bool some_subjects(const struct subject *s)
{
    return !strcmp(s->name, "toy") || !strcmp(s->name, "raw") || !strcmp(s->name, "vmdk-sparse") ||
           !strcmp(s->name, "add-cow-over-raw") || !strcmp(s->name, "qcow2-over-qcow2");
}

#ifdef DR_TEST_PLANT /* built with a page cache of its own */
extern bool planted_no_seal;
bool planted_no_seal = true;

static void missing_seal_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    bool found = false;
    for (plant_try = 0; plant_try < 100 && !found; plant_try++)
        found = model_detects(writes_inside_flushes, *state);
    if (!found)
        MODEL_FAIL(*state, "nobody noticed that pages are not sealed");
}
#endif

static const struct {
    const char *subject;
    enum plant fault;
    void (*harness)(void **state);
} qcow2_plants[] = {
    {"qcow2-bits", PLANT_REUSED_EARLY, power_cuts},
    {"qcow2", PLANT_LATE_PUNCH, writes_inside_flushes},
    {"qcow2-zstd", PLANT_LOST_COUNT, power_cuts},
};
enum { N_QCOW2_PLANTS = sizeof(qcow2_plants) / sizeof(qcow2_plants[0]) };

static void (*plant_harness)(void **state);

static void run_planted(void **state)
{
    plant_into("qcow2", plant_fault);
    plant_harness(state);
}

static void qcow2_faults_are_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    const struct subject *s = *state;
    always_deep = true;
    for (unsigned i = 0; i < N_QCOW2_PLANTS; i++) {
        bool found = strcmp(s->name, qcow2_plants[i].subject) != 0;
        plant_fault = qcow2_plants[i].fault;
        plant_harness = qcow2_plants[i].harness;
        for (plant_try = 0; plant_try < 100 && !found; plant_try++)
            found = model_detects(run_planted, *state);
        if (!found)
            MODEL_FAIL(s, "nobody noticed fault %u", plant_fault);
    }
}

__attribute__((unused)) static bool has_qcow2_plants(const struct subject *s)
{
    for (unsigned i = 0; i < N_QCOW2_PLANTS; i++)
        if (!strcmp(s->name, qcow2_plants[i].subject))
            return true;
    return false;
}

#ifdef QCOW2_LEVELS /* built with a driver of its own */
static void wrong_levels_are_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    bool found = false;
    always_deep = true;
    for (plant_try = 0; plant_try < 100 && !found; plant_try++)
        found = model_detects(power_cuts, *state);
    if (!found)
        MODEL_FAIL(*state, "nobody noticed that tables become durable in another order");
}

static bool qcow2_ones(const struct subject *s)
{
    return !strcmp(s->name, "qcow2-over-qcow2");
}
#endif

int main(void)
{
    int r = 0;
#ifdef QCOW2_LEVELS
    r += model_run("planted: qcow2 tables become durable in another order", wrong_levels_are_found,
                   qcow2_ones);
    (void)skipped_flush_is_found;
    (void)wrong_order_is_found;
    (void)qcow2_faults_are_found;
#elif defined(DR_TEST_PLANT)
    r += model_run("planted: pages are not sealed", missing_seal_is_found, not_raw);
    (void)qcow2_faults_are_found;
    (void)skipped_flush_is_found;
    (void)wrong_order_is_found;
#else
    if (MODEL_ONLY_PLANTS)
        return model_run("planted: faults of the qcow2 driver", qcow2_faults_are_found,
                         has_qcow2_plants)
                   ? 1
                   : 0;
    r += model_run("power cuts", power_cuts, NULL);
    r += model_run("writes inside a flush", writes_inside_flushes, never_waits);
    r += model_run("planted: one flush is skipped", skipped_flush_is_found, some_subjects);
    r += model_run("planted: bits or holes too early", wrong_order_is_found, one_add_cow);
#endif
    return r ? 1 : 0;
}
