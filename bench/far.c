/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Copying from a file that is far away: each read takes 10 ms, and 64 may be under way. Once with
 * one request at a time, then with as many as the engine chooses. Prints both times in seconds, and
 * their ratio. */
#include "bench.h"
#include "faultfs.h"
#include "ops/ops-internal.h"

#define ITEMS  256u
#define LENGTH (ITEMS * (size_t)DR_STOCK_BUFFER)

static int take_10_ms(void *user, const struct faultfs_io *io)
{
    (void)user;
    struct timespec t = {0, 10000000};
    if (io->kind == FAULTFS_READ && strstr(io->path, "source") && io->len >= 65536)
        nanosleep(&t, NULL);
    return 0;
}

static void make_source(struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_create_options create = {.format = "raw", .size = LENGTH, .has_size = true};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR, .format = "raw"};
    struct dr_disk *disk = NULL;
    uint8_t *bytes = malloc(LENGTH);
    if (!bytes)
        exit(1);
    memset(bytes, 0x5a, LENGTH);
    bench_must(dr_create_fs(fs, "source", &create, &err), "create", &err);
    bench_must(dr_open_fs(fs, "source", &rw, &disk, &err), "open", &err);
    bench_must(dr_pwrite(disk, bytes, 0, LENGTH, 0, &err), "write", &err);
    bench_must(dr_close(disk, &err), "close", &err);
    free(bytes);
}

static double copy(struct dr_fs *fs, unsigned workers)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_convert_options o = {.sparse_size = 4096};
    struct dr_job job = {.workers = workers};
    const char *from = "source";
    double start = bench_now();
    bench_must(dr_convert_fs(fs, &from, 1, "target", &o, &job, &err), "convert", &err);
    return bench_now() - start;
}

int main(void)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = memory ? faultfs_new(memory) : NULL;
    if (!f)
        return 1;
    make_source(faultfs_fs(f));
    faultfs_set_depth(f, 64);
    faultfs_observe(f, take_10_ms, NULL);
    double one = 1e9, many = 1e9;
    for (int i = 0; i < 3; i++) { /* in turn; the fastest of each */
        double a = copy(faultfs_fs(f), 1), b = copy(faultfs_fs(f), 0);
        one = a < one ? a : one;
        many = b < many ? b : many;
    }
    printf("%.3f %.3f %.2f\n", one, many, one / many);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return 0;
}
