/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Long random sequences against memory: from one thread with everything checked, from several on
 * neighbouring ranges, and from several on the same ranges. */
#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "model.h"
#include "plant.h"
#include "toy.h"

static void check_clean(const struct subject *s, struct dr_fs *fs, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result;
    if (model_check(fs, s, 0, &result, &err))
        MODEL_FAIL(s, "check %s: %s", when, err.text);
    if (result.corruptions || result.leaks || result.check_errors)
        MODEL_FAIL(s, "check %s: %llu corruptions, %llu leaks", when,
                   (unsigned long long)result.corruptions, (unsigned long long)result.leaks);
}

static uint8_t *read_snapshot(const struct subject *s, struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t *buf = malloc(s->size + 1);
    if (toy_snapshot_read(fs, subject_top(s), buf, s->size, 0xee, &err))
        MODEL_FAIL(s, "read the snapshot: %s", err.text);
    return buf;
}

static uint8_t *read_base(const struct subject *s, struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size;
    uint8_t *buf = model_read_all(fs, subject_base(s), s->base_format, &size, &err);
    if (!buf)
        MODEL_FAIL(s, "read the base: %s", err.text);
    return buf;
}

/* What nobody may change while the top is written. */
struct frozen {
    uint8_t *snapshot, *base;
};

static struct frozen freeze(const struct subject *s, struct dr_fs *fs)
{
    struct frozen f = {0};
    if (s->snapshot)
        f.snapshot = read_snapshot(s, fs);
    if (s->base_format)
        f.base = read_base(s, fs);
    return f;
}

static void check_frozen(const struct subject *s, struct dr_fs *fs, struct frozen *before)
{
    struct frozen now = freeze(s, fs);
    if (now.snapshot && memcmp(now.snapshot, before->snapshot, s->size))
        MODEL_FAIL(s, "the internal snapshot has changed");
    if (now.base && memcmp(now.base, before->base, s->base_size))
        MODEL_FAIL(s, "the base has changed");
    free(now.snapshot);
    free(now.base);
    free(before->snapshot);
    free(before->base);
}

static void must_run(struct workload *w, const struct op *op, unsigned i)
{
    if (workload_run(w, op))
        MODEL_FAIL(w->subject, "operation %u, %s: %s", i, op_text(op), w->err.text);
    if (getenv("DROVER_VERBOSE"))
        print_message("%u %s\n", i, op_text(op));
}

static void long_run(const struct subject *s, struct dr_fs *fs, unsigned n)
{
    struct rnd rnd = {model_seed()};
    struct shadow view;
    uint8_t *below;
    struct workload w;
    subject_make(s, fs, &rnd, &view, &below);
    struct frozen frozen = freeze(s, fs);
    workload_init(&w, s, fs, &view, s->base_format ? below : NULL);
    if (workload_open(&w, DR_OPEN_RDWR))
        MODEL_FAIL(s, "open: %s", w.err.text);
    workload_verify(&w, "after creating");
    for (unsigned i = 0; i < n; i++) {
        struct op op = workload_next(&w, &rnd);
        must_run(&w, &op, i);
        if (i % 50 == 49 || getenv("DROVER_PARANOID"))
            workload_verify(&w, op_text(&op));
    }
    if (workload_close(&w))
        MODEL_FAIL(s, "close: %s", w.err.text);
    check_clean(s, fs, "at the end");
    if (workload_open(&w, 0))
        MODEL_FAIL(s, "reopen: %s", w.err.text);
    workload_verify(&w, "after the last close");
    model_check_bitmaps(w.disk, view.now, s->size, true);
    workload_close(&w);
    check_frozen(s, fs, &frozen);
    workload_free(&w);
    shadow_free(&view);
    free(below);
}

static void one_thread(void **state)
{
    struct dr_fs *fs = dr_fs_memory_new();
    long_run(*state, fs, model_length(1200));
    dr_fs_memory_free(fs);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st;
    (void)type;
    (void)at;
    return remove(path);
}

static void on_real_files(void **state)
{
    char dir[] = "/tmp/drover-model-XXXXXX";
    assert_non_null(mkdtemp(dir));
    assert_int_equal(chdir(dir), 0);
    long_run(*state, dr_fs_posix(), model_length(200));
    assert_int_equal(chdir("/"), 0);
    nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

/* ------------------------------------------------------------------ no room
 *
 * A format that runs out of clusters: a write that does not fit leaves each sector old or new, what
 * is given up is used again after a flush, and nothing leaks. */

static void when_it_is_full(void **state)
{
    struct subject s = *(const struct subject *)*state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct rnd rnd = {model_seed()};
    struct shadow view;
    struct workload w;
    unsigned refused = 0, written = 0;
    if (s.device) {
        s.device = s.size / 3;
    } else {
        s.pairs[0] = (struct dr_pair){"clusters", "70"};
        s.n_pairs = 1;
    }
    subject_make(&s, fs, &rnd, &view, NULL);
    workload_init(&w, &s, fs, &view, NULL);
    if (workload_open(&w, DR_OPEN_RDWR))
        MODEL_FAIL(&s, "open: %s", w.err.text);
    unsigned n = model_length(600);
    for (unsigned i = 0; i < n; i++) {
        struct op op = workload_next(&w, &rnd);
        op.len = dr_min(op.len, 9000);
        if (i % 40 == 39)
            op = (struct op){.kind = i % 80 == 79 ? OP_FLUSH : OP_DISCARD, .len = s.size};
        int r = workload_run(&w, &op);
        if (r && r != -ENOSPC)
            MODEL_FAIL(&s, "%s: %s", op_text(&op), w.err.text);
        if (r)
            workload_settle(&w, &op);
        refused += r == -ENOSPC;
        written += !r && op.kind == OP_WRITE;
    }
    workload_verify(&w, "at the end");
    if (workload_close(&w))
        MODEL_FAIL(&s, "close: %s", w.err.text);
    assert_true(refused > n / 60 && written > n / 60);
    check_clean(&s, fs, "at the end");
    workload_free(&w);
    shadow_free(&view);
    dr_fs_memory_free(fs);
}

static bool can_be_full(const struct subject *s)
{
    return !strcmp(s->name, "toy") || (s->device && s->n_pairs == 1 && !s->base_format) ||
           !strcmp(s->name, "qcow2-device-sectors");
}

/* Where the suite runs there may be no devices. */
static bool on_a_file(const struct subject *s)
{
    return !s->device;
}

/* ------------------------------------------------------------------ threads */

#define THREADS 4

struct worker {
    pthread_t thread;
    const struct subject *s;
    struct dr_disk *disk;
    uint64_t seed, off, len; /* its own range */
    struct shadow view;      /* of the range */
    uint64_t *last;          /* overlapping: what it wrote last, a sector each; 0 = nothing */
    unsigned n;
    struct dr_error err;
    bool failed;
};

static uint64_t range_op(struct worker *w, struct rnd *rnd, uint64_t *len)
{
    *len = 1 + rnd_below(rnd, dr_min(rnd_below(rnd, 2) ? 3000 : 40000, w->len));
    return rnd_below(rnd, w->len - *len + 1);
}

static int own_step(struct worker *w, struct rnd *rnd, uint8_t *buf)
{
    uint64_t len, off = range_op(w, rnd, &len), at = w->off + off;
    switch (rnd_below(rnd, 12)) {
    case 0:
        shadow_zero(&w->view, off, len);
        return dr_zero(w->disk, at, len, rnd_below(rnd, 2) ? DR_MAY_UNMAP : DR_EXPLICIT, &w->err);
    case 1:
        return dr_flush(w->disk, &w->err);
    case 2:
    case 3:
        if (dr_pread(w->disk, buf, at, len, &w->err))
            return -EIO;
        return memcmp(buf, w->view.now + off, len)
                   ? dr_fail(&w->err, EIO, "wrong content in %llu+%llu", (unsigned long long)at,
                             (unsigned long long)len)
                   : 0;
    default:
        rnd_fill(rnd, buf, len);
        shadow_write(&w->view, off, buf, len);
        return dr_pwrite(w->disk, buf, at, len, rnd_below(rnd, 20) ? 0 : DR_FUA, &w->err);
    }
}

static void *own_range(void *arg)
{
    struct worker *w = arg;
    struct rnd rnd = {w->seed};
    uint8_t *buf = malloc(w->len + 1);
    for (unsigned i = 0; w->len > 0 && i < w->n && !w->failed;
         i++) /* a small disk's share may be nothing */
        w->failed = own_step(w, &rnd, buf) != 0;
    free(buf);
    return NULL;
}

/* Every sector of a write says who wrote it and when. */
static void stamp(uint8_t *buf, uint64_t len, uint64_t value)
{
    for (uint64_t i = 0; i < len; i += 8)
        memcpy(buf + i, &value, 8);
}

static bool stamp_whole(const uint8_t *sector, uint64_t len, uint64_t *value)
{
    memcpy(value, sector, 8);
    for (uint64_t i = 8; i + 8 <= len; i += 8)
        if (memcmp(sector + i, value, 8))
            return false;
    return true;
}

static int shared_read(struct worker *w, uint64_t off, uint64_t len, uint8_t *buf)
{
    uint64_t value;
    int r = dr_pread(w->disk, buf, off, len, &w->err);
    for (uint64_t i = 0; !r && i < len; i += 512)
        if (!stamp_whole(buf + i, 512, &value) || value >> 32 > THREADS)
            r = dr_fail(&w->err, EIO, "the sector at %llu is torn", (unsigned long long)(off + i));
    return r;
}

static void *same_range(void *arg)
{
    struct worker *w = arg;
    struct rnd rnd = {w->seed};
    uint64_t sectors = w->len / 512;
    uint8_t *buf = malloc(w->len + 1);
    for (unsigned i = 0; i < w->n && !w->failed; i++) {
        uint64_t n = 1 + rnd_below(&rnd, dr_min(40, sectors)),
                 first = rnd_below(&rnd, sectors - n + 1);
        uint64_t kind = rnd_below(&rnd, 12), value = (w->seed & 7) << 32 | (i + 1);
        int r;
        if (kind == 0)
            r = dr_flush(w->disk, &w->err);
        else if (kind < 4)
            r = shared_read(w, first * 512, n * 512, buf);
        else {
            value = kind == 4 ? 0 : value;
            stamp(buf, n * 512, value);
            r = kind == 4 ? dr_zero(w->disk, first * 512, n * 512, DR_MAY_UNMAP, &w->err)
                          : dr_pwrite(w->disk, buf, first * 512, n * 512, 0, &w->err);
            for (uint64_t j = 0; j < n; j++)
                w->last[first + j] = value ? value : UINT64_MAX;
        }
        w->failed = r != 0;
    }
    free(buf);
    return NULL;
}

static void run_workers(const struct subject *s, struct worker *workers, void *(*body)(void *))
{
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&workers[i].thread, NULL, body, &workers[i]), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(workers[i].thread, NULL);
    for (int i = 0; i < THREADS; i++)
        if (workers[i].failed)
            MODEL_FAIL(s, "thread %d: %s", i, workers[i].err.text);
}

/* The borders are anywhere in a unit, so neighbours share units, tables and sectors of tables. */
static void neighbours(const struct subject *s, struct dr_disk *disk, struct shadow *view)
{
    struct worker workers[THREADS] = {0};
    for (int i = 0; i < THREADS; i++) {
        struct worker *w = &workers[i];
        uint64_t from = view->size * (unsigned)i / THREADS,
                 to = view->size * (unsigned)(i + 1) / THREADS;
        from = dr_round_down(from, 512) + (i ? 512 : 0);
        to = i + 1 == THREADS ? view->size : dr_round_down(to, 512) + 512;
        *w = (struct worker){.s = s, .disk = disk, .seed = model_seed() * 8 + (unsigned)i};
        w->off = from;
        w->len = to - from;
        w->n = model_length(150);
        shadow_init(&w->view, w->len);
        memcpy(w->view.now, view->now + from, w->len);
    }
    run_workers(s, workers, own_range);
    for (int i = 0; i < THREADS; i++) {
        memcpy(view->now + workers[i].off, workers[i].view.now, workers[i].len);
        shadow_free(&workers[i].view);
    }
}

static void disjoint_threads(void **state)
{
    const struct subject *s = *state;
    struct rnd rnd = {model_seed()};
    struct shadow view;
    struct dr_fs *fs = dr_fs_memory_new();
    struct workload w;
    subject_make(s, fs, &rnd, &view, NULL);
    struct frozen frozen = freeze(s, fs);
    workload_init(&w, s, fs, &view, NULL);
    if (workload_open(&w, DR_OPEN_RDWR))
        MODEL_FAIL(s, "open: %s", w.err.text);
    neighbours(s, w.disk, &view);
    workload_verify(&w, "after the threads");
    if (workload_close(&w))
        MODEL_FAIL(s, "close: %s", w.err.text);
    check_clean(s, fs, "after the threads");
    if (workload_open(&w, 0))
        MODEL_FAIL(s, "reopen: %s", w.err.text);
    workload_verify(&w, "after the reopen");
    workload_close(&w);
    check_frozen(s, fs, &frozen);
    workload_free(&w);
    shadow_free(&view);
    dr_fs_memory_free(fs);
}

/* A sector holds what some thread wrote there last, or zeros if nobody did. */
static void check_last(const struct subject *s, struct worker *workers, const uint8_t *disk)
{
    for (uint64_t i = 0; i < workers[0].len / 512; i++) {
        uint64_t value;
        bool found = false, written = false;
        if (!stamp_whole(disk + 512 * i, 512, &value))
            MODEL_FAIL(s, "sector %llu is torn", (unsigned long long)i);
        for (int t = 0; t < THREADS; t++) {
            written |= workers[t].last[i] != 0;
            found |= workers[t].last[i] == (value ? value : UINT64_MAX);
        }
        if (!found && (written || value))
            MODEL_FAIL(s, "sector %llu holds %llx, which is nobody's last", (unsigned long long)i,
                       (unsigned long long)value);
    }
}

static void overlapping_threads(void **state)
{
    const struct subject *s = *state;
    struct rnd rnd = {model_seed()};
    struct shadow view;
    struct dr_error err = DR_ERROR_INIT;
    struct worker workers[THREADS] = {0};
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_disk *disk;
    subject_make(s, fs, &rnd, &view, NULL);
    if (model_open(fs, s, DR_OPEN_RDWR, &disk, &err) || dr_zero(disk, 0, s->size, 0, &err))
        MODEL_FAIL(s, "prepare: %s", err.text);
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.s = s, .disk = disk, .seed = model_seed() * 8 + (unsigned)i};
        workers[i].len = dr_round_down(dr_min(s->size, 128 * 1024), 512);
        workers[i].n = model_length(400);
        workers[i].last = calloc(workers[i].len / 512, 8);
    }
    run_workers(s, workers, same_range);
    if (dr_close(disk, &err))
        MODEL_FAIL(s, "close: %s", err.text);
    check_clean(s, fs, "after the threads");
    uint64_t size;
    uint8_t *all = model_read_all(fs, subject_top(s), s->format, &size, &err);
    if (!all)
        MODEL_FAIL(s, "read: %s", err.text);
    check_last(s, workers, all);
    free(all);
    for (int i = 0; i < THREADS; i++)
        free(workers[i].last);
    shadow_free(&view);
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ planted faults */

static void without_tails(void **state)
{
    plant(PLANT_NO_TAIL);
    one_thread(state);
}

static void without_tails_in_threads(void **state)
{
    plant(PLANT_NO_TAIL);
    disjoint_threads(state);
}

static void lost_tails_are_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    if (!model_detects(without_tails, *state) || !model_detects(without_tails_in_threads, *state))
        MODEL_FAIL(*state, "nobody noticed that tails are not copied");
}

static void without_punching(void **state)
{
    plant_into("add-cow", PLANT_NO_PUNCH);
    one_thread(state);
}

static void junk_behind_zeros_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    if (!model_detects(without_punching, *state))
        MODEL_FAIL(*state, "nobody noticed that zeros leave in the raw file what lay there");
}

static bool over_junk(const struct subject *s)
{
    return !strcmp(s->name, "add-cow-over-shorter");
}

static bool over_something(const struct subject *s)
{
    return !strcmp(s->name, "toy-over-raw");
}

int main(void)
{
    int r = model_run("one thread", one_thread, NULL);
    r += model_run("one thread, real files", on_real_files, on_a_file);
    r += model_run("no room", when_it_is_full, can_be_full);
    r += model_run("threads on neighbouring ranges", disjoint_threads, NULL);
    r += model_run("threads on the same range", overlapping_threads, NULL);
    r += model_run("planted: tails are not copied", lost_tails_are_found, over_something);
    r += model_run("planted: zeros without punching", junk_behind_zeros_is_found, over_junk);
    return r ? 1 : 0;
}
