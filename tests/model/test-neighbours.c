/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Eight sectors have their bits in one byte, or 32 theirs in one L2 entry, and each belongs to
 * another thread; others read and flush meanwhile. No bit is lost, none appears. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "faultfs.h"
#include "model.h"
#include "plant.h"

static void must(const struct subject *s, int r, const char *what, const struct dr_error *err)
{
    if (r)
        MODEL_FAIL(s, "%s: %d %s", what, r, err->text);
}

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
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(h->crew->disk, &pass);
    int r = dr_chain_fill(chain, 0, h->crew->below + off, off, 512, &h->err);
    if (!r)
        r = dr_chain_drop(chain, 0, off, 512, &h->err);
    dr_disk_leave(h->crew->disk, &pass);
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
    CLEANUP_FREE uint8_t *again = model_read_all(fs, subject_top(s), s->format, &size, &err);
    if (!again)
        MODEL_FAIL(s, "reopen: %s", err.text);
    check_sectors(&c, jobs, again);
    free(below);
    shadow_free(&view);
    dr_fs_memory_free(fs);
}

static uint64_t plant_try; /* another run each time */

static void neighbours_share_a_byte(void **state)
{
    static const enum job crews[][WRITERS + HELPERS] = {
        {JOB_WRITE, JOB_WRITE, JOB_WRITE, JOB_WRITE, JOB_READ, JOB_FLUSH},
        {JOB_WRITE, JOB_ZERO, JOB_WRITE, JOB_ZERO, JOB_FLUSH, JOB_FLUSH},
        {JOB_WRITE, JOB_DROP, JOB_ZERO, JOB_DROP, JOB_READ, JOB_FLUSH},
    };
    for (unsigned i = 0; i < model_length(9); i++)
        one_crew(*state, crews[i % 3], model_seed() + plant_try + i);
}

static bool with_enough_sectors(const struct subject *s)
{
    return !strcmp(s->format, "add-cow") && s->base_format && s->size >= SECTORS * 512ull;
}

static bool with_small_parts(const struct subject *s)
{
    return with_enough_sectors(s) || !strcmp(s->name, "qcow2-sub-clusters");
}

/* ------------------------------------------------------------------ the same, not by chance
 *
 * While a sector's bytes are on their way to the raw file, its neighbour is written from beginning
 * to end. */

struct meddler {
    struct crew *crew;
    unsigned sector; /* whose write is under way */
    bool inside;
    struct hand hand;
};

static void *write_neighbour(void *arg)
{
    struct meddler *m = arg;
    m->hand = (struct hand){.crew = m->crew, .job = JOB_WRITE};
    m->hand.result = work_on(&m->hand, m->sector + 1);
    return NULL;
}

static int meddle(void *user, const struct faultfs_io *io)
{
    struct meddler *m = user;
    pthread_t thread;
    if (io->kind != FAULTFS_WRITE || m->inside)
        return 0;
    m->inside = true;
    if (pthread_create(&thread, NULL, write_neighbour, m))
        abort();
    pthread_join(thread, NULL);
    return 0;
}

static void a_write_inside_a_write(void **state)
{
    static const enum job jobs[WRITERS] = {JOB_WRITE, JOB_WRITE, JOB_WRITE, JOB_WRITE};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    struct crew c = {.s = *state};
    struct meddler m = {.crew = &c};
    struct hand first = {.crew = &c, .job = JOB_WRITE};
    struct rnd rnd = {model_seed()};
    struct shadow view;
    uint64_t size = 0;
    subject_make(c.s, memory, &rnd, &view, NULL);
    must(c.s, model_open(faultfs_fs(fault), c.s, DR_OPEN_RDWR, &c.disk, &err), "open", &err);
    for (m.sector = 0; m.sector < SECTORS; m.sector += 2) {
        m.inside = false;
        faultfs_observe(fault, meddle, &m);
        must(c.s, work_on(&first, m.sector), "write", &first.err);
        faultfs_observe(fault, NULL, NULL);
        must(c.s, m.hand.result, "write inside", &m.hand.err);
        assert_true(m.inside);
    }
    must(c.s, dr_close(c.disk, &err), "close", &err);
    CLEANUP_FREE uint8_t *all = model_read_all(memory, subject_top(c.s), "add-cow", &size, &err);
    if (!all)
        MODEL_FAIL(c.s, "reopen: %s", err.text);
    check_sectors(&c, jobs, all);
    shadow_free(&view);
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

static void losing_bits(void **state)
{
    plant_into("add-cow", PLANT_LOST_BITS);
    a_write_inside_a_write(state);
}

static void lost_bits_are_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    if (!model_detects(losing_bits, *state))
        MODEL_FAIL(*state, "nobody noticed that bits are lost");
}

/* ------------------------------------------------------------------ planted: no exclusive lock */

static bool sub_clusters(const struct subject *s)
{
    return with_small_parts(s) && !with_enough_sectors(s);
}

static void unlocked(void **state)
{
    plant_into("qcow2", PLANT_NARROW_LOCK);
    neighbours_share_a_byte(state);
}

/* Chance decides who meets whom. */
static void a_zero_beside_an_allocating_write_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    bool found = false;
    for (plant_try = 0; plant_try < 100 && !found; plant_try++)
        found = model_detects(unlocked, *state);
    plant_try = 0;
    if (!found)
        MODEL_FAIL(*state, "nobody noticed that a zero and a write meet in one cluster");
}

int main(void)
{
    int r;
    if (MODEL_ONLY_PLANTS) {
        r = model_run("planted: changes to one cluster beside each other",
                      a_zero_beside_an_allocating_write_is_found, sub_clusters);
    } else {
        r = model_run("neighbours share a byte", neighbours_share_a_byte, with_small_parts);
        r += model_run("a write inside a write", a_write_inside_a_write, with_enough_sectors);
        r += model_run("planted: lost bits", lost_bits_are_found, with_enough_sectors);
    }
    return r ? 1 : 0;
}
