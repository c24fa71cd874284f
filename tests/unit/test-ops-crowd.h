/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A disk in use: threads that read, write, zero and discard it, flush it and ask it questions while
 * an operation runs. Every byte belongs to one thread, which knows what it must read. */
#ifndef DROVER_TESTS_TEST_OPS_CROWD_H
#define DROVER_TESTS_TEST_OPS_CROWD_H

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "test-ops.h"

#define CROWD_SIZE   (3u * MiB + 5 * 512)
#define CROWD_REGION (256u * KiB)
#define CROWD_PIECE  (16u * KiB)
#define CROWD_OWNERS 3
#define CROWD_PEOPLE (CROWD_OWNERS + 2)

struct crowd {
    struct dr_fs *fs;
    struct dr_disk *disk;
    uint8_t *expected; /* each byte written by its owner only */
    _Atomic bool stop;
    _Atomic unsigned steps[CROWD_PEOPLE];
    struct crowd_person {
        struct crowd *crowd;
        unsigned which;
        pthread_t thread;
        char trouble[300];
    } people[CROWD_PEOPLE];
};

/* DROVER_SOAK makes everything last longer, DROVER_TEST_SEED makes it another one. */
static inline unsigned crowd_setting(const char *name, unsigned otherwise)
{
    const char *e = getenv(name);
    return e ? (unsigned)strtoul(e, NULL, 0) : otherwise;
}

/* Even regions: pieces smaller than a unit, in turn of owners 0 and 1. Odd ones: owner 2's. */
static inline unsigned crowd_owner(uint64_t off)
{
    return off / CROWD_REGION % 2 ? 2 : (unsigned)(off / CROWD_PIECE % 2);
}

/* Some range that one owner has. */
static inline void crowd_range(unsigned owner, uint64_t *seed, uint64_t *off, size_t *len)
{
    uint64_t part = owner == 2 ? CROWD_REGION : CROWD_PIECE;
    do
        *off = next_random(seed) % CROWD_SIZE;
    while (crowd_owner(*off) != owner);
    uint64_t end = dr_min(dr_round_down(*off, part) + part, CROWD_SIZE);
    if (next_random(seed) % 3 == 0)
        *off = dr_round_down(*off, part);
    *len = (size_t)(next_random(seed) % (end - *off) + 1);
    if (owner == 2 && next_random(seed) % 2)
        *len = (size_t)(end - *off);
}

static inline void crowd_trouble(struct crowd_person *p, const char *what, uint64_t off,
                                 const struct dr_error *err)
{
    snprintf(p->trouble, sizeof(p->trouble), "%s at %llu: %s", what, (unsigned long long)off,
             err->text);
}

/* discarded: each byte may be a zero as well. */
static inline void crowd_check(struct crowd_person *p, uint64_t off, size_t len, bool discarded)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t *buf = malloc(len), *want = p->crowd->expected + off;
    if (dr_pread(p->crowd->disk, buf, off, len, &err) < 0)
        crowd_trouble(p, "read", off, &err);
    for (size_t i = 0; i < len && !p->trouble[0]; i++) {
        if (buf[i] != want[i] && !(discarded && buf[i] == 0))
            snprintf(p->trouble, sizeof(p->trouble), "byte %llu is %02x, not %02x",
                     (unsigned long long)(off + i), buf[i], want[i]);
        want[i] = buf[i];
    }
    free(buf);
}

static inline void *crowd_use(void *arg)
{
    struct crowd_person *p = arg;
    struct crowd *c = p->crowd;
    uint64_t seed = 77 + p->which + (uint64_t)crowd_setting("DROVER_TEST_SEED", 0) * CROWD_PEOPLE;
    while (!atomic_load(&c->stop) && !p->trouble[0]) {
        struct dr_error err = DR_ERROR_INIT;
        uint64_t off;
        size_t len;
        int r = 0;
        crowd_range(p->which, &seed, &off, &len);
        switch (next_random(&seed) % 8) {
        case 0:
        case 1:
        case 2:
            memset(c->expected + off, (int)(next_random(&seed) % 255 + 1), len);
            r = dr_pwrite(c->disk, c->expected + off, off, len, 0, &err);
            break;
        case 3:
            memset(c->expected + off, 0, len);
            r = dr_zero(c->disk, off, len, DR_MAY_UNMAP, &err);
            break;
        case 4:
            r = dr_discard(c->disk, off, len, &err);
            if (r == 0)
                crowd_check(p, off, len, true);
            break;
        default:
            crowd_check(p, off, len, false);
        }
        if (r < 0)
            crowd_trouble(p, "change", off, &err);
        atomic_fetch_add(&c->steps[p->which], 1);
    }
    return NULL;
}

static inline void *crowd_flush(void *arg)
{
    struct crowd_person *p = arg;
    while (!atomic_load(&p->crowd->stop) && !p->trouble[0]) {
        struct dr_error err = DR_ERROR_INIT;
        if (dr_flush(p->crowd->disk, &err) < 0)
            crowd_trouble(p, "flush", 0, &err);
        atomic_fetch_add(&p->crowd->steps[p->which], 1);
        sched_yield();
    }
    return NULL;
}

/* Questions about the chain, which may be another one each time. */
static inline void *crowd_ask(void *arg)
{
    struct crowd_person *p = arg;
    struct dr_disk *disk = p->crowd->disk;
    uint64_t seed = 5;
    while (!atomic_load(&p->crowd->stop) && !p->trouble[0]) {
        struct dr_error err = DR_ERROR_INIT;
        struct dr_extent_status status;
        uint64_t off = next_random(&seed) % CROWD_SIZE;
        if (dr_block_status(disk, off, CROWD_SIZE - off, &status, &err) < 0)
            crowd_trouble(p, "status", off, &err);
        if (dr_size(disk) < CROWD_SIZE || !dr_writable(disk) || !dr_image_path(disk, 0) ||
            dr_chain_length(disk) < 1)
            crowd_trouble(p, "question", off, &err);
        dr_image_backing_name(disk, dr_chain_length(disk) - 1);
        atomic_fetch_add(&p->crowd->steps[p->which], 1);
    }
    return NULL;
}

/* Until everybody has done some more. */
static inline void crowd_pass(struct crowd *c, unsigned steps)
{
    unsigned from[CROWD_PEOPLE];
    steps *= crowd_setting("DROVER_SOAK", 1);
    for (unsigned i = 0; i < CROWD_PEOPLE; i++)
        from[i] = atomic_load(&c->steps[i]);
    for (unsigned i = 0; i < CROWD_PEOPLE; i++)
        while (atomic_load(&c->steps[i]) - from[i] < steps && !c->people[i].trouble[0])
            sched_yield();
}

static inline void crowd_begin(struct crowd *c, struct dr_fs *fs, const char *path)
{
    static void *(*const roles[])(void *) = {crowd_use, crowd_use, crowd_use, crowd_flush,
                                             crowd_ask};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    *c = (struct crowd){.fs = fs, .expected = malloc(CROWD_SIZE)};
    ok(dr_open_fs(fs, path, &rw, &c->disk, &err));
    ok(dr_pread(c->disk, c->expected, 0, CROWD_SIZE, &err));
    for (unsigned i = 0; i < CROWD_PEOPLE; i++) {
        c->people[i].crowd = c;
        c->people[i].which = i;
        assert_int_equal(pthread_create(&c->people[i].thread, NULL, roles[i], &c->people[i]), 0);
    }
    crowd_pass(c, 5);
}

/* Everybody goes home; the disk reads as they left it, now and when it is opened by this path. */
static inline void crowd_end(struct crowd *c, const char *path)
{
    crowd_pass(c, 5);
    atomic_store(&c->stop, true);
    for (unsigned i = 0; i < CROWD_PEOPLE; i++)
        pthread_join(c->people[i].thread, NULL);
    for (unsigned i = 0; i < CROWD_PEOPLE; i++)
        if (c->people[i].trouble[0])
            fail_msg("person %u: %s", i, c->people[i].trouble);
    uint8_t *have = malloc(CROWD_SIZE);
    ok(dr_pread(c->disk, have, 0, CROWD_SIZE, &err));
    assert_memory_equal(have, c->expected, CROWD_SIZE);
    ok(dr_close(c->disk, &err));
    free(have);
    uint64_t size;
    have = view(c->fs, path, &size);
    assert_true(size >= CROWD_SIZE);
    for (uint64_t i = 0; i < CROWD_SIZE; i++)
        if (have[i] != c->expected[i])
            fail_msg("opened again, byte %llu is %02x, not %02x", (unsigned long long)i, have[i],
                     c->expected[i]);
    free(have);
    free(c->expected);
}

#endif
