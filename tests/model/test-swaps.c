/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Readers, writers, flushers and somebody who swaps the chain under them, all the time. Each writer
 * has sectors of its own, so that what must be read is known at every moment. In `./dev soak` this
 * goes on for long, under ThreadSanitizer. */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "model.h"

#define WRITERS 2
#define READERS 2
#define SECTOR  512u

struct crowd {
    const struct subject *s;
    struct dr_disk *disk;
    uint64_t sectors;
    _Atomic unsigned writing;  /* writers that are not done */
    _Atomic uint32_t *version; /* of each sector: what was acknowledged last */
    unsigned rounds;
};

struct person {
    struct crowd *crowd;
    unsigned which;
    int result;
    struct dr_error err;
    pthread_t thread;
    unsigned done;
};

static void fill(uint8_t *buf, uint64_t sector, uint32_t version)
{
    for (unsigned i = 0; i < SECTOR; i += 16) {
        uint64_t words[2] = {sector, version};
        memcpy(buf + i, words, sizeof(words));
    }
}

static void *write_all(void *arg)
{
    struct person *p = arg;
    struct crowd *c = p->crowd;
    struct rnd rnd = {model_seed() + p->which};
    uint8_t buf[SECTOR];
    for (unsigned i = 0; i < c->rounds && p->result == 0; i++) {
        uint64_t n = rnd_below(&rnd, c->sectors / WRITERS) * WRITERS + p->which;
        fill(buf, n, c->version[n] + 1);
        p->result = dr_pwrite(c->disk, buf, n * SECTOR, SECTOR, i % 64 ? 0 : DR_FUA, &p->err);
        if (p->result == 0)
            atomic_fetch_add(&c->version[n], 1);
    }
    atomic_fetch_sub(&c->writing, 1);
    return NULL;
}

/* What was acknowledged before the read, or later, but never older. */
static void *read_all(void *arg)
{
    struct person *p = arg;
    struct crowd *c = p->crowd;
    struct rnd rnd = {model_seed() + 100 + p->which};
    uint8_t buf[SECTOR];
    while (p->result == 0 && atomic_load(&c->writing) > 0) {
        uint64_t n = rnd_below(&rnd, c->sectors), words[2];
        uint32_t least = atomic_load(&c->version[n]);
        p->result = dr_pread(c->disk, buf, n * SECTOR, SECTOR, &p->err);
        memcpy(words, buf, sizeof(words));
        if (p->result == 0 && least > 0 && (words[0] != n || words[1] < least))
            p->result = dr_fail(&p->err, EILSEQ, "sector %llu has version %llu, not %u",
                                (unsigned long long)n, (unsigned long long)words[1], least);
        p->done++;
    }
    return NULL;
}

/* Questions that read the chain, besides flushing. */
static void *flush_and_ask(void *arg)
{
    struct person *p = arg;
    struct crowd *c = p->crowd;
    while (p->result == 0 && atomic_load(&c->writing) > 0) {
        struct dr_extent_status status;
        p->result = dr_flush(c->disk, &p->err);
        if (p->result == 0)
            p->result = dr_block_status(c->disk, 0, dr_size(c->disk), &status, &p->err);
        if (!dr_writable(c->disk) || !dr_image_path(c->disk, 0))
            p->result = dr_fail(&p->err, EILSEQ, "the disk is another one");
        p->done++;
    }
    return NULL;
}

static void *swap_all(void *arg)
{
    struct person *p = arg;
    struct crowd *c = p->crowd;
    while (p->result == 0 && atomic_load(&c->writing) > 0) {
        struct dr_chain *present = dr_disk_chain(c->disk), *fresh = dr_chain_tail(present, 0);
        dr_chain_unref(present, NULL);
        p->result = fresh ? dr_disk_swap(c->disk, fresh, &p->err) : -ENOMEM;
        p->done++;
        sched_yield();
    }
    return NULL;
}

static void swaps_lose_nothing(void **state)
{
    static void *(*const roles[])(void *) = {write_all, write_all, read_all,      read_all,
                                             swap_all,  swap_all,  flush_and_ask, flush_and_ask};
    enum { PEOPLE = sizeof(roles) / sizeof(roles[0]) };
    const struct subject *s = *state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *fs = dr_fs_memory_new();
    struct rnd rnd = {model_seed()};
    struct shadow view;
    subject_make(s, fs, &rnd, &view, NULL);
    struct crowd c = {.s = s, .sectors = s->size / SECTOR, .rounds = model_length(600)};
    c.writing = WRITERS;
    c.version = calloc(c.sectors, sizeof(*c.version));
    assert_non_null(c.version);
    assert_int_equal(model_open(fs, s, DR_OPEN_RDWR, &c.disk, &err), 0);
    struct person people[PEOPLE] = {0};
    for (unsigned i = 0; i < PEOPLE; i++) {
        people[i] = (struct person){.crowd = &c, .which = i % 2};
        assert_int_equal(pthread_create(&people[i].thread, NULL, roles[i], &people[i]), 0);
    }
    for (unsigned i = 0; i < PEOPLE; i++)
        pthread_join(people[i].thread, NULL);
    for (unsigned i = 0; i < PEOPLE; i++)
        if (people[i].result < 0)
            MODEL_FAIL(s, "%s", people[i].err.text);
    assert_int_equal(dr_close(c.disk, &err), 0);
    uint64_t size;
    CLEANUP_FREE uint8_t *all = model_read_all(fs, subject_top(s), s->format, &size, &err);
    assert_non_null(all);
    for (uint64_t n = 0; n < c.sectors; n++) {
        uint8_t want[SECTOR];
        fill(want, n, c.version[n]);
        if (c.version[n] > 0 && memcmp(all + n * SECTOR, want, SECTOR) != 0)
            MODEL_FAIL(s, "sector %llu is not what was written last", (unsigned long long)n);
    }
    free(c.version);
    shadow_free(&view);
    dr_fs_memory_free(fs);
}

int main(void)
{
    return model_run("swaps lose nothing", swaps_lose_nothing, NULL) ? 1 : 0;
}
