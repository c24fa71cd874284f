/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How long changes of the chain of a disk in use hold its requests.
 *
 *     drover-bench-pause DIR FORMAT [ROUNDS [JOB]]
 *
 * Four threads write 4 KiB at random, as fast as they can, each with a flush after every 256th
 * write, while a snapshot is made each 0.1 s, and, if JOB says so, committed (with a pivot),
 * streamed or mirrored 0.1 s later. Says the median and the longest pause as the snapshots or jobs
 * tell it (held_ns), and the longest that a write took. */
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "bench.h"
#include "drover/ops.h"

#define DISK_SIZE   (UINT64_C(1) << 30)
#define WRITTEN     (DISK_SIZE / 4)
#define THREADS     4
#define FLUSH_EVERY 256
#define BLOCK       4096

struct writer {
    struct dr_disk *disk;
    pthread_t thread;
    uint64_t random;
    double longest; /* seconds that a write took */
};

static _Atomic int stop;

static void *write_on(void *user)
{
    struct writer *w = user;
    struct dr_error err = DR_ERROR_INIT;
    char bytes[BLOCK];
    memset(bytes, (int)w->random & 0xff, sizeof(bytes));
    for (unsigned n = 1; !atomic_load(&stop); n++) {
        double begin = bench_now();
        uint64_t off = bench_random(&w->random) % (WRITTEN / BLOCK) * BLOCK;
        bench_must(dr_pwrite(w->disk, bytes, off, sizeof(bytes), 0, &err), "write", &err);
        double took = bench_now() - begin;
        w->longest = took > w->longest ? took : w->longest;
        if (n % FLUSH_EVERY == 0)
            bench_must(dr_flush(w->disk, &err), "flush", &err);
    }
    return NULL;
}

static int snapshot(struct dr_disk *disk, const char *path, const char *format, struct dr_job *job,
                    struct dr_error *err)
{
    struct dr_overlay overlay = {.disk = disk, .path = path, .format = format};
    int r = dr_disks_snapshot(&overlay, 1, job, err);
    free(overlay.active);
    return r;
}

/* what NULL: a snapshot. Returns the pause in ms. */
static double change(struct dr_disk *disk, const char *what, const char *path, const char *format)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_commit_options pivot = {.pivot = true, .force = true};
    struct dr_mirror_options as_it_is = {.format = format};
    struct dr_job *job;
    struct dr_job_status status;
    int r = dr_job_new(NULL, NULL, &job, &err);
    if (r == 0 && !what)
        r = snapshot(disk, path, format, job, &err);
    else if (r == 0 && strcmp(what, "commit") == 0)
        r = dr_disk_commit(disk, &pivot, job, &err);
    else if (r == 0 && strcmp(what, "stream") == 0)
        r = dr_disk_stream(disk, NULL, job, &err);
    else if (r == 0)
        r = dr_disk_mirror(disk, path, &as_it_is, job, &err);
    bench_must(r, what ? what : "snapshot", &err);
    dr_job_query(job, &status);
    dr_job_free(job);
    return (double)status.held_ns / 1e6;
}

static void remove_all(const char *dir, const char *format, unsigned images)
{
    char path[4096];
    for (unsigned n = 0; n < images; n++) {
        snprintf(path, sizeof(path), "%s/pause-%u.%s", dir, n, format);
        unlink(path);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3 || argc > 5) {
        fprintf(stderr, "usage: drover-bench-pause DIR FORMAT [ROUNDS [commit|stream|mirror]]\n");
        return 2;
    }
    const char *dir = argv[1], *format = argv[2], *job = argc > 4 ? argv[4] : NULL;
    unsigned rounds = argc > 3 ? (unsigned)atoi(argv[3]) : 30, images = 0;
    struct dr_create_options create = {.format = format, .size = DISK_SIZE, .has_size = true};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    struct writer writers[THREADS];
    double held[BENCH_MAX_ROUNDS], longest = 0;
    char path[4096];
    if (rounds < 1 || rounds > BENCH_MAX_ROUNDS)
        rounds = BENCH_MAX_ROUNDS;
    remove_all(dir, format, 2 * BENCH_MAX_ROUNDS + 1);
    snprintf(path, sizeof(path), "%s/pause-%u.%s", dir, images++, format);
    bench_must(dr_create(path, &create, &err), "create", &err);
    bench_must(dr_open(path, &rw, &disk, &err), "open", &err);
    for (unsigned i = 0; i < THREADS; i++) {
        writers[i] = (struct writer){.disk = disk, .random = i + 1};
        bench_must(-pthread_create(&writers[i].thread, NULL, write_on, &writers[i]), "thread",
                   NULL);
    }
    for (unsigned n = 0; n < rounds; n++)
        for (const char *what = NULL;; what = job) {
            usleep(100 * 1000);
            snprintf(path, sizeof(path), "%s/pause-%u.%s", dir, images++, format);
            held[n] = change(disk, what, path, format);
            if (what == job)
                break;
        }
    atomic_store(&stop, 1);
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(writers[i].thread, NULL);
        longest = writers[i].longest > longest ? writers[i].longest : longest;
    }
    bench_must(dr_close(disk, &err), "close", &err);
    double median = bench_median(held, rounds);
    printf("%s: %u times %s holds requests for %.2f ms, at most %.1f ms; longest write %.1f ms\n",
           format, rounds, job ? job : "snapshot", median, held[rounds - 1], longest * 1e3);
    remove_all(dir, format, images);
    return 0;
}
