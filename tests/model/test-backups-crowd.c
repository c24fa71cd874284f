/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writers in threads while backups are taken one after another. Each writer has sectors of its own
 * and writes them in an order that its seed gives, with the number of the write in each sector; so
 * a backup tells how far the writer had come, and must show exactly what it had written by then. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backups.h"
#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define SECTOR  512u
#define WRITERS 3
#define SET     "dir/backups.json"

struct crowd {
    const struct subject *s;
    struct dr_disk *disk;
    uint64_t sectors;     /* of the disk; sector n belongs to writer n % WRITERS */
    uint64_t granularity; /* of the bitmaps */
    pthread_mutex_t lock;
    pthread_cond_t more;
    uint64_t limit; /* each writer writes so often, and then waits for more */
    bool enough;    /* writers end */
};

struct writer {
    struct crowd *crowd;
    unsigned which;
    _Atomic uint64_t begun, done; /* writes that were begun, and that were answered */
    int r;
    struct dr_error err;
    pthread_t thread;
    /* For the judge: its sectors after `judged` writes, in an array of all sectors. */
    uint8_t *want;
    uint64_t judged;
};

enum { WRITES = 300 }; /* of each writer for each backup */

/* What write `number` of a writer does: one sector of its own becomes this. */
struct change {
    uint64_t sector;
    bool zero;
    uint8_t bytes[SECTOR];
};

static void change_of(const struct crowd *c, unsigned which, uint64_t number, struct change *change)
{
    struct rnd rnd = {model_seed() + which * 1000003u + number * 7919u};
    rnd_next(&rnd);
    uint64_t own = (c->sectors - which + WRITERS - 1) / WRITERS;
    change->sector = rnd_below(&rnd, own) * WRITERS + which;
    change->zero = rnd_below(&rnd, 8) == 0;
    rnd_fill(&rnd, change->bytes, SECTOR);
    memcpy(change->bytes, &number, sizeof(number));
    if (change->zero)
        memset(change->bytes, 0, SECTOR);
}

/* May a writer do its n-th write? It waits until it may, or is to end. */
static bool may_write(struct crowd *c, uint64_t n)
{
    pthread_mutex_lock(&c->lock);
    while (n > c->limit && !c->enough)
        pthread_cond_wait(&c->more, &c->lock);
    bool may = n <= c->limit;
    pthread_mutex_unlock(&c->lock);
    return may;
}

static void let_write(struct crowd *c, uint64_t limit, bool enough)
{
    pthread_mutex_lock(&c->lock);
    c->limit = limit;
    c->enough = enough;
    pthread_cond_broadcast(&c->more);
    pthread_mutex_unlock(&c->lock);
}

static void *write_all(void *arg)
{
    struct writer *w = arg;
    struct crowd *c = w->crowd;
    struct change change;
    for (uint64_t i = 1; w->r == 0 && may_write(c, i); i++) {
        change_of(c, w->which, i, &change);
        uint64_t off = change.sector * SECTOR;
        atomic_store(&w->begun, i);
        w->r = change.zero
                   ? dr_zero(c->disk, off, SECTOR, i % 2 ? DR_MAY_UNMAP : 0, &w->err)
                   : dr_pwrite(c->disk, change.bytes, off, SECTOR, i % 64 ? 0 : DR_FUA, &w->err);
        atomic_store(&w->done, i);
    }
    return NULL;
}

/* ------------------------------------------------------------------ judging a backup */

struct judged {
    const struct crowd *c;
    const char *name;
    const uint8_t *bytes; /* of the backup */
    uint64_t least[WRITERS], most[WRITERS];
};

static bool own_sectors_same(const struct judged *j, const struct writer *w)
{
    for (uint64_t n = w->which; n < j->c->sectors; n += WRITERS)
        if (memcmp(j->bytes + n * SECTOR, w->want + n * SECTOR, SECTOR) != 0)
            return false;
    return true;
}

static void judge_next(struct writer *w)
{
    struct change change;
    change_of(w->crowd, w->which, ++w->judged, &change);
    memcpy(w->want + change.sector * SECTOR, change.bytes, SECTOR);
}

/* The writer's sectors are as after one of the writes that may have been its last. */
static void judge_writer(const struct judged *j, struct writer *w)
{
    unsigned which = w->which;
    while (w->judged < j->least[which])
        judge_next(w);
    while (!own_sectors_same(j, w)) {
        if (w->judged >= j->most[which])
            MODEL_FAIL(j->c->s,
                       "%s, granularity %llu: writer %u had written %llu to %llu times, and it "
                       "shows what the disk held after none of these",
                       j->name, (unsigned long long)j->c->granularity, which,
                       (unsigned long long)j->least[which], (unsigned long long)j->most[which]);
        judge_next(w);
    }
}

static void one_backup(struct crowd *c, struct dr_fs *fs, struct writer *writers, unsigned number)
{
    const struct dr_backup_options o = {
        .set = SET, .bitmap = "B", .format = number % 3 ? "qcow2" : "add-cow"};
    struct dr_backup_result result;
    struct dr_error err = DR_ERROR_INIT;
    struct judged j = {.c = c};
    char path[32];
    uint64_t size;
    snprintf(path, sizeof(path), "dir/b%u", number);
    for (unsigned i = 0; i < WRITERS; i++)
        j.least[i] = atomic_load(&writers[i].done);
    let_write(c, (number + 1) * WRITES, false);
    if (dr_disk_backup(c->disk, path, &o, NULL, &result, &err))
        MODEL_FAIL(c->s, "%s: %s", path, err.text);
    for (unsigned i = 0; i < WRITERS; i++)
        j.most[i] = atomic_load(&writers[i].begun);
    if (result.incremental != (number > 0))
        MODEL_FAIL(c->s, "%s is %sincremental", path, number ? "not " : "");
    CLEANUP_FREE uint8_t *bytes = model_read_all(fs, path, o.format, &size, &err);
    if (!bytes)
        MODEL_FAIL(c->s, "%s: %s", path, err.text);
    j.name = path;
    j.bytes = bytes;
    for (unsigned i = 0; i < WRITERS; i++)
        judge_writer(&j, &writers[i]);
    if (dr_backup_verify_fs(fs, SET, dr_path_basename(path), NULL, NULL, NULL, &err))
        MODEL_FAIL(c->s, "%s: %s", path, err.text);
}

/* ------------------------------------------------------------------ the crowd */

static void backups_among_writers(const struct subject *s, uint64_t granularity, unsigned backups)
{
    const struct dr_bitmap_options bitmap = {.granularity = granularity};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *fs = dr_fs_memory_new();
    struct rnd rnd = {model_seed()};
    struct shadow view;
    struct writer writers[WRITERS] = {0};
    subject_make(s, fs, &rnd, &view, NULL);
    shadow_free(&view);
    struct crowd c = {.s = s, .sectors = s->size / SECTOR, .granularity = granularity};
    pthread_mutex_init(&c.lock, NULL);
    pthread_cond_init(&c.more, NULL);
    assert_int_equal(model_open(fs, s, DR_OPEN_RDWR, &c.disk, &err), 0);
    if (dr_zero(c.disk, 0, s->size, 0, &err) ||
        dr_disk_bitmap_change(c.disk, "B", DR_BITMAP_ADD, &bitmap, &err))
        MODEL_FAIL(s, "%s", err.text);
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i].crowd = &c;
        writers[i].which = i;
        writers[i].want = calloc(c.sectors, SECTOR);
        assert_non_null(writers[i].want);
        assert_int_equal(pthread_create(&writers[i].thread, NULL, write_all, &writers[i]), 0);
    }
    for (unsigned i = 0; i < backups; i++)
        one_backup(&c, fs, writers, i);
    let_write(&c, 0, true);
    for (unsigned i = 0; i < WRITERS; i++) {
        pthread_join(writers[i].thread, NULL);
        if (writers[i].r < 0)
            MODEL_FAIL(s, "a writer: %s", writers[i].err.text);
        free(writers[i].want);
    }
    if (dr_close(c.disk, &err))
        MODEL_FAIL(s, "close: %s", err.text);
    pthread_cond_destroy(&c.more);
    pthread_mutex_destroy(&c.lock);
    dr_fs_memory_free(fs);
}

static void each_backup_is_of_one_instant(void **state)
{
    static const uint64_t granularities[] = {512, 4096, 65536, 2u << 20};
    const struct subject *s = *state;
    size_t n = (size_t)(s - model_subjects); /* each subject begins with another one */
    for (unsigned i = 0; i < model_length(2); i++)
        backups_among_writers(s, granularities[(n + i) % 4], 5);
}

static bool takes(const struct subject *s)
{
    return backups_takes(s) && s->size % SECTOR == 0;
}

int main(void)
{
    return model_run("backups among writers", each_backup_is_of_one_instant, takes) ? 1 : 0;
}
