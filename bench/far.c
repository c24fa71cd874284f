/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Work on a file that is far away: each read takes 10 ms, and 64 may be under way. Once with one
 * request at a time, then with as many as Drover chooses. Prints a line for each kind of work:
 *
 *     copy   a raw file is copied
 *     check  a qcow2 image is checked, which has 256 tables in different places
 *
 * and both times in seconds, and their ratio. */
#include "bench.h"
#include "faultfs.h"
#include "formats/qcow2/check.h"
#include "ops/ops-internal.h"

#define ITEMS  256u
#define LENGTH (ITEMS * (size_t)DR_STOCK_BUFFER)

static int take_10_ms(void *user, const struct faultfs_io *io)
{
    (void)user;
    struct timespec t = {0, 10000000};
    if (io->kind == FAULTFS_READ && !strstr(io->path, "target") && io->len >= 65536)
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

#define TABLES 256u
#define SPAN   (UINT64_C(512) << 20) /* that a table of 64 KiB tells of */

static void make_scattered(struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_create_options create = {.format = "qcow2", .size = TABLES * SPAN, .has_size = true};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    bench_must(dr_create_fs(fs, "scattered", &create, &err), "create", &err);
    bench_must(dr_open_fs(fs, "scattered", &rw, &disk, &err), "open", &err);
    for (uint64_t i = 0; i < TABLES; i++)
        bench_must(dr_pwrite(disk, "drover", i * SPAN, 6, 0, &err), "write", &err);
    bench_must(dr_close(disk, &err), "close", &err);
}

static double check(struct dr_fs *fs, unsigned readers)
{
    struct dr_error err = DR_ERROR_INIT;
    char *json = NULL;
    double start = bench_now();
    qcow2_check_limits.readers = readers;
    bench_must(dr_check_fs(fs, "scattered", NULL, 0, NULL, NULL, &json, &err), "check", &err);
    free(json);
    return bench_now() - start;
}

static void compare(struct dr_fs *fs, const char *name, double (*work)(struct dr_fs *, unsigned))
{
    double one = 1e9, many = 1e9;
    for (int i = 0; i < 3; i++) { /* in turn; the fastest of each */
        double a = work(fs, 1), b = work(fs, 0);
        one = a < one ? a : one;
        many = b < many ? b : many;
    }
    printf("%s %.3f %.3f %.2f\n", name, one, many, one / many);
}

int main(void)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = memory ? faultfs_new(memory) : NULL;
    if (!f)
        return 1;
    make_source(faultfs_fs(f));
    make_scattered(faultfs_fs(f));
    faultfs_set_depth(f, 64);
    faultfs_observe(f, take_10_ms, NULL);
    compare(faultfs_fs(f), "copy", copy);
    compare(faultfs_fs(f), "check", check);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return 0;
}
