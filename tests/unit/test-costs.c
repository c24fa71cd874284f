/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What things cost: calls to the files and shared locks of a request, flushes of an allocating
 * write, punches of a large discard, system calls and bytes of opening a layer. The tables in
 * docs/design.md have the same figures. Where calls are counted the files are in memory, behind a
 * layer that counts. */
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/core.h"
#include "drover/ops.h"
#include "faultfs.h"
#include "slower.h"
#include "ops/ops-internal.h"
#include "toy.h"
#include "outcome.h"

#define KIB 1024u
#define MIB (1024u * KIB)

struct world {
    struct dr_fs *memory;
    struct faultfs *counted;
    struct dr_fs *fs;
    struct dr_disk *disk;
};

static int setup(void **state)
{
    static struct world w;
    w.memory = dr_fs_memory_new();
    w.counted = faultfs_new(w.memory);
    w.fs = faultfs_fs(w.counted);
    w.disk = NULL;
    dr_format_register(&dr_format_toy);
    *state = &w;
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;
    dr_close(w->disk, NULL);
    dr_format_register(NULL);
    faultfs_free(w->counted);
    dr_fs_memory_free(w->memory);
    return 0;
}

static void create(struct world *w, const char *format, uint64_t size)
{
    struct dr_create_params toy = {.size = size};
    struct dr_create_options o = {.format = format, .size = size, .has_size = true};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    if (strcmp(format, "toy") == 0)
        ok(dr_format_toy.create(w->fs, "dir/disk.toy", &toy, &err));
    else
        ok(dr_create_fs(w->fs, "dir/disk.img", &o, &err));
    ok(dr_open_fs(w->fs, strcmp(format, "toy") == 0 ? "dir/disk.toy" : "dir/disk.img", &open,
                  &w->disk, &err));
}

static void write_at(struct world *w, uint64_t off, size_t len)
{
    uint8_t *buf = malloc(len);
    memset(buf, 0x5a, len);
    ok(dr_pwrite(w->disk, buf, off, len, 0, &err));
    free(buf);
}

/* Flushes of the files that a write at off and a flush of the disk take. */
static unsigned flushes_of_write(struct world *w, uint64_t off)
{
    faultfs_reset(w->counted);
    write_at(w, off, 4 * KIB);
    ok(dr_flush(w->disk, &err));
    return (unsigned)faultfs_count_of(w->counted, FAULTFS_FLUSH);
}

/* ------------------------------------------------------------------ flushes */

static void an_allocating_write_with_counts_costs_two_flushes_also_with_a_new_table(void **state)
{
    struct world *w = *state;
    create(w, "toy", 1 * MIB);
    write_at(w, 512 * KIB, 512); /* marks the image, and allocates what the first write does */
    ok(dr_flush(w->disk, &err));
    assert_int_equal(flushes_of_write(w, 0), 2);
    assert_int_equal(flushes_of_write(w, 4 * KIB), 2);
    assert_int_equal(flushes_of_write(w, 0), 1); /* in place */
}

static void an_allocating_write_to_vmdk_costs_two_flushes(void **state)
{
    struct world *w = *state;
    create(w, "vmdk", 64 * MIB);
    write_at(w, 0, 512);
    ok(dr_flush(w->disk, &err));
    assert_int_equal(flushes_of_write(w, 1 * MIB), 2);
    assert_int_equal(flushes_of_write(w, 40 * MIB), 2); /* another table */
    assert_int_equal(flushes_of_write(w, 1 * MIB), 1);
}

static void an_allocating_write_to_add_cow_costs_one_flush_of_each_file(void **state)
{
    struct world *w = *state;
    create(w, "add-cow", 64 * MIB);
    write_at(w, 0, 512);
    ok(dr_flush(w->disk, &err));
    assert_int_equal(flushes_of_write(w, 1 * MIB), 2);
    assert_int_equal(flushes_of_write(w, 1 * MIB), 1);
}

/* ------------------------------------------------------------------ punches */

/* Calls that give space back when what was written is dropped, 1 MiB at a time. */
static unsigned punches_of_drop(struct world *w, uint64_t len)
{
    struct dr_chain *chain = w->disk->chain;
    for (uint64_t off = 0; off < len; off += MIB)
        write_at(w, off, MIB);
    ok(dr_flush(w->disk, &err));
    faultfs_reset(w->counted);
    for (uint64_t off = 0; off < len; off += MIB)
        ok(dr_chain_drop(chain, 0, off, MIB, &err));
    ok(dr_flush(w->disk, &err));
    return (unsigned)faultfs_count_of(w->counted, FAULTFS_ZERO);
}

static void neighbouring_freed_grains_are_punched_by_one_call(void **state)
{
    struct world *w = *state;
    create(w, "vmdk", 64 * MIB);
    assert_int_equal(punches_of_drop(w, 64 * MIB), 1); /* of 1024 grains */
}

static void neighbouring_freed_ranges_of_add_cow_are_punched_by_one_call(void **state)
{
    struct world *w = *state;
    create(w, "add-cow", 64 * MIB);
    assert_int_equal(punches_of_drop(w, 64 * MIB), 1);
}

/* What was freed in any order is sorted, and a place between that is still used is left alone. */
static void freed_places_with_a_used_one_between_them_are_two_punches(void **state)
{
    struct world *w = *state;
    struct dr_chain *chain;
    uint8_t byte;
    create(w, "vmdk", 64 * MIB);
    chain = w->disk->chain;
    write_at(w, 0, 5 * 64 * KIB);
    ok(dr_flush(w->disk, &err));
    faultfs_reset(w->counted);
    static const unsigned order[] = {4, 0, 3, 1};
    for (unsigned i = 0; i < 4; i++)
        ok(dr_chain_drop(chain, 0, order[i] * 64 * KIB, 64 * KIB, &err));
    ok(dr_flush(w->disk, &err));
    assert_int_equal(faultfs_count_of(w->counted, FAULTFS_ZERO), 2);
    ok(dr_pread(w->disk, &byte, 2 * 64 * KIB + 5, 1, &err));
    assert_int_equal(byte, 0x5a);
    ok(dr_pread(w->disk, &byte, 3 * 64 * KIB + 5, 1, &err));
    assert_int_equal(byte, 0);
}

/* The place is the snapshot's from now on: its count goes from two to one. */
static void what_a_snapshot_still_holds_is_not_punched(void **state)
{
    struct world *w = *state;
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    uint8_t old[64 * KIB];
    create(w, "toy", 1 * MIB);
    write_at(w, 0, sizeof(old));
    ok(dr_close(w->disk, &err));
    w->disk = NULL;
    ok(toy_snapshot(w->fs, "dir/disk.toy", &err));
    ok(dr_open_fs(w->fs, "dir/disk.toy", &open, &w->disk, &err));
    faultfs_reset(w->counted);
    ok(dr_chain_drop(w->disk->chain, 0, 0, sizeof(old), &err));
    ok(dr_flush(w->disk, &err));
    assert_int_equal(faultfs_count_of(w->counted, FAULTFS_ZERO), 0);
    ok(dr_close(w->disk, &err));
    w->disk = NULL;
    ok(toy_snapshot_read(w->fs, "dir/disk.toy", old, sizeof(old), 0, &err));
    for (size_t i = 0; i < sizeof(old); i++)
        assert_int_equal(old[i], 0x5a);
}

/* ------------------------------------------------------------------ calls to the files */

struct calls {
    uint64_t reads, writes, zeros, flushes, all;
};

static struct calls counted(struct faultfs *f)
{
    struct calls c = {
        .reads = faultfs_count_of(f, FAULTFS_READ),
        .writes = faultfs_count_of(f, FAULTFS_WRITE),
        .zeros = faultfs_count_of(f, FAULTFS_ZERO),
        .flushes = faultfs_count_of(f, FAULTFS_FLUSH),
        .all = faultfs_count(f),
    };
    faultfs_reset(f);
    return c;
}

static void expect(const char *what, struct calls have, struct calls want)
{
    if (memcmp(&have, &want, sizeof(have)) != 0)
        fail_msg("%s: %llu reads, %llu writes, %llu zeros, %llu flushes, %llu calls in all", what,
                 (unsigned long long)have.reads, (unsigned long long)have.writes,
                 (unsigned long long)have.zeros, (unsigned long long)have.flushes,
                 (unsigned long long)have.all);
}

/* Of each format that can be written, once the tables are in memory and the unit is allocated. */
static void a_request_in_place_is_one_call(void **state)
{
    static const char *const formats[] = {"raw", "vmdk", "add-cow", "qcow2"};
    (void)state;
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_create_options create = {.format = formats[i], .size = 4 * MIB, .has_size = true};
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disk;
        uint8_t buf[4096] = {1};
        ok(dr_create_fs(faultfs_fs(f), "disk", &create, &err));
        ok(dr_open_fs(faultfs_fs(f), "disk", &open, &disk, &err));
        ok(dr_pwrite(disk, buf, MIB, sizeof(buf), 0, &err));
        ok(dr_flush(disk, &err));
        faultfs_reset(f);

        ok(dr_pread(disk, buf, MIB, sizeof(buf), &err));
        expect(formats[i], counted(f), (struct calls){.reads = 1, .all = 1});
        ok(dr_pwrite(disk, buf, MIB, sizeof(buf), 0, &err));
        expect(formats[i], counted(f), (struct calls){.writes = 1, .all = 1});
        ok(dr_flush(disk, &err));
        expect(formats[i], counted(f), (struct calls){.flushes = 1, .all = 1});
        ok(dr_flush(disk, &err));
        expect(formats[i], counted(f), (struct calls){0});
        ok(dr_pwrite(disk, buf, MIB, sizeof(buf), DR_FUA, &err));
        expect(formats[i], counted(f), (struct calls){.writes = 1, .flushes = 1, .all = 2});
        ok(dr_close(disk, &err));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* Nothing is written where the disk reads as zeros already, unless the image itself must say so. */
static void zeros_are_written_where_there_are_none(void **state)
{
    static const char *const formats[] = {"vmdk", "qcow2"};
    static const struct {
        uint64_t off;
        unsigned flags;
        bool written;
    } cases[] = {
        {0, 0, false},       {0, DR_EXPLICIT, false},        {0, DR_MAY_UNMAP, false},
        {MIB / 2, 0, true}, /* its parent has data there */
        {2 * MIB, 0, false}, {2 * MIB, DR_MAY_UNMAP, false}, {2 * MIB, DR_EXPLICIT, true},
    };
    static const struct dr_pair zeroed_grain = {"zeroed_grain", "on"}; /* of vmdk */
    (void)state;
    for (size_t i = 0; i < 2 * sizeof(cases) / sizeof(cases[0]); i++) {
        const char *format = formats[i % 2];
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_create_options create = {.format = format, .size = 4 * MIB, .has_size = true};
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disk;
        uint8_t buf[64 * KIB] = {1};
        ok(dr_create_fs(memory, "parent", &create, &err));
        ok(dr_open_fs(memory, "parent", &open, &disk, &err));
        for (uint64_t off = 0; off < MIB; off += sizeof(buf))
            ok(dr_pwrite(disk, buf, off, sizeof(buf), 0, &err));
        ok(dr_close(disk, &err));
        create.backing = "parent";
        create.backing_format = format;
        create.pairs = &zeroed_grain;
        create.n_pairs = i % 2 == 0;
        ok(dr_create_fs(memory, "disk", &create, &err));
        ok(dr_open_fs(faultfs_fs(f), "disk", &open, &disk, &err));
        ok(dr_zero(disk, 0, sizeof(buf), DR_EXPLICIT, &err));
        ok(dr_flush(disk, &err));
        counted(f);
        ok(dr_zero(disk, cases[i / 2].off, sizeof(buf), cases[i / 2].flags, &err));
        ok(dr_flush(disk, &err));
        struct calls have = counted(f);
        if ((have.writes + have.zeros + have.flushes > 0) != cases[i / 2].written)
            fail_msg("%s, zeros at %llu, flags %u: %llu writes, %llu zeros, %llu flushes", format,
                     (unsigned long long)cases[i / 2].off, cases[i / 2].flags,
                     (unsigned long long)have.writes, (unsigned long long)have.zeros,
                     (unsigned long long)have.flushes);
        ok(dr_pread(disk, buf, cases[i / 2].off, sizeof(buf), &err));
        assert_int_equal(buf[0], 0);
        ok(dr_close(disk, &err));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* What an allocating write of 4 KiB and a flush cost in qcow2, next to what QEMU 7.2 does for them
 * (strace of qemu-io, the mean of ten). */
static const struct qcow2_cost {
    const char *name, *preallocation;
    uint64_t step; /* from one write to the next */
    bool snapshot; /* all is shared with a snapshot inside: a cluster is copied, and given up later
                    */
    uint64_t writes, flushes;
    uint64_t qemu_writes, qemu_flushes;
} qcow2_costs[] = {
    /* the data, its count, its entry */
    {"one after another", "off", 64 * 1024, false, 3, 2, 3, 2},
    {"anywhere", "off", 7 * MIB, false, 3, 2, 3, 2},
    {"preallocated", "metadata", 7 * MIB, false, 1, 1, 1, 1},
    /* and, unless it stands in the same sector, the lowered count of what the last write gave up */
    {"over a snapshot", "off", 2 * MIB, true, 4, 2, 4, 3},
};
#define N_QCOW2_COSTS (sizeof(qcow2_costs) / sizeof(qcow2_costs[0]))

static struct dr_disk *qcow2_for(const struct qcow2_cost *c, struct dr_fs *fs)
{
    struct dr_pair pairs[] = {{"preallocation", c->preallocation}};
    struct dr_create_options create = {.format = "qcow2", .size = 2048 * MIB, .has_size = true};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    create.pairs = pairs;
    create.n_pairs = 1;
    ok(dr_create_fs(fs, "disk", &create, &err));
    ok(dr_open_fs(fs, "disk", &open, &disk, &err));
    uint8_t *buf = calloc(1, MIB);
    memset(buf, 1, MIB);
    for (unsigned i = 0; c->snapshot && i < 64; i++)
        ok(dr_pwrite(disk, buf, i * MIB, MIB, 0, &err));
    if (c->snapshot)
        ok(dr_image_snapshot_create(disk->chain->images[0], "one", &err));
    ok(dr_pwrite(disk, buf, 0, 4096, 0, &err));
    ok(dr_flush(disk, &err));
    free(buf);
    return disk;
}

static void an_allocating_write_to_qcow2_costs_no_more_than_qemus(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_QCOW2_COSTS; i++) {
        const struct qcow2_cost *c = &qcow2_costs[i];
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_disk *disk = qcow2_for(c, faultfs_fs(f));
        uint8_t buf[4096] = {2};
        for (unsigned n = 1; n < 12; n++) {
            faultfs_reset(f);
            ok(dr_pwrite(disk, buf, n * c->step, sizeof(buf), 0, &err));
            ok(dr_flush(disk, &err));
            struct calls have = counted(f);
            assert_true(have.reads <=
                        2); /* of the entry's page, and of the rest of a copied cluster */
            assert_int_equal(have.flushes, c->flushes);
            assert_in_range(have.writes, c->snapshot ? c->writes - 1 : c->writes, c->writes);
            assert_int_equal(have.all, have.reads + have.writes + have.flushes);
            assert_true(c->writes <= c->qemu_writes && c->flushes <= c->qemu_flushes);
        }
        ok(dr_close(disk, &err));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* It becomes durable with the data, and then the link to it. */
static void a_new_l2_table_costs_no_flush_of_its_own(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_disk *disk = qcow2_for(&qcow2_costs[0], faultfs_fs(f));
    uint8_t buf[4096] = {2};
    faultfs_reset(f);
    ok(dr_pwrite(disk, buf, 1024 * MIB, sizeof(buf), 0, &err));
    ok(dr_flush(disk, &err));
    assert_int_equal(counted(f).flushes, 2);
    ok(dr_close(disk, &err));
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

/* ------------------------------------------------------------------ locks */

#define LOCKS_MAX 256

static __thread bool recording;
static const void *locks[2][LOCKS_MAX];
static size_t n_locks[2];
static int recorded; /* which of the two */

#if !SLOWER_THREADS /* that sanitizer must see each lock itself */
/* Every lock that the library takes comes through here. */
int pthread_mutex_lock(pthread_mutex_t *mutex)
{
    static int (*real)(pthread_mutex_t *);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_mutex_lock");
    if (recording && n_locks[recorded] < LOCKS_MAX)
        locks[recorded][n_locks[recorded]++] = mutex;
    return real(mutex);
}
#endif

static void use(struct dr_disk *disk, int which)
{
    uint8_t buf[4096] = {1};
    recorded = which;
    n_locks[which] = 0;
    recording = true;
    ok(dr_pread(disk, buf, MIB, sizeof(buf), &err));
    ok(dr_pwrite(disk, buf, MIB, sizeof(buf), 0, &err));
    ok(dr_pwrite(disk, buf, MIB, sizeof(buf), DR_FUA, &err));
    ok(dr_flush(disk, &err));
    recording = false;
}

/* Not where TMPDIR says: to find the real name of a file costs a call for each directory above it.
 */
static void make_dir(char *dir, size_t len)
{
    snprintf(dir, len, "/tmp/drover-costs-XXXXXX");
    assert_non_null(mkdtemp(dir));
}

static void requests_in_place_take_no_lock_that_those_on_another_disk_take(void **state)
{
    static const char *const formats[] = {"raw", "vmdk", "add-cow", "qcow2"};
    char dir[256], path[2][300], clean[300];
    (void)state;
    if (SLOWER_THREADS)
        skip();
    make_dir(dir, sizeof(dir));
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        struct dr_create_options create = {.format = formats[i], .size = 4 * MIB, .has_size = true};
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disks[2];
        uint8_t buf[4096] = {1};
        for (int k = 0; k < 2; k++) {
            snprintf(path[k], sizeof(path[k]), "%s/%s-%d", dir, formats[i], k);
            ok(dr_create(path[k], &create, &err));
            ok(dr_open(path[k], &open, &disks[k], &err));
            ok(dr_pwrite(disks[k], buf, MIB, sizeof(buf), 0, &err));
            ok(dr_flush(disks[k], &err));
        }
        use(disks[0], 0);
        use(disks[1], 1);
        for (size_t a = 0; a < n_locks[0]; a++)
            for (size_t b = 0; b < n_locks[1]; b++)
                if (locks[0][a] == locks[1][b])
                    fail_msg("%s: the %zu. lock of %zu is shared", formats[i], a + 1, n_locks[0]);
        /* The recorder works: an image's own lock is among them. */
        assert_true(strcmp(formats[i], "raw") == 0 || n_locks[0] > 0);
        ok(dr_close(disks[0], &err));
        ok(dr_close(disks[1], &err));
    }
    snprintf(clean, sizeof(clean), "rm -rf '%s'", dir);
    assert_int_equal(system(clean), 0);
}

/* ------------------------------------------------------------------ opening */

#define LAYERS 20

/* l0 is the lowest of LAYERS + 1 images, which hold nothing. */
static void make_layers(const char *dir, const char *format)
{
    char path[2][300];
    for (unsigned i = 0; i <= LAYERS; i++) {
        struct dr_create_options o = {.format = format, .size = 64 * MIB, .has_size = true};
        snprintf(path[i % 2], sizeof(path[0]), "%s/%s-l%u", dir, format, i);
        if (i > 0)
            o.backing = strrchr(path[(i + 1) % 2], '/') + 1;
        o.backing_format = i > 0 ? format : NULL;
        ok(dr_create(path[i % 2], &o, &err));
    }
}

static struct dr_disk *open_layer(const char *dir, const char *format, unsigned i)
{
    char path[300];
    struct dr_open_options open = {.format = format};
    struct dr_disk *disk;
    snprintf(path, sizeof(path), "%s/%s-l%u", dir, format, i);
    ok(dr_open(path, &open, &disk, &err));
    return disk;
}

/* Bytes that the allocator has given out for a chain of that many images. */
static size_t bytes_of_chain(const char *dir, const char *format, unsigned layers)
{
    size_t before = mallinfo2().uordblks;
    struct dr_disk *disk = open_layer(dir, format, layers);
    size_t bytes = mallinfo2().uordblks - before;
    ok(dr_close(disk, &err));
    return bytes;
}

/* A child opens and closes the chain between two stops; we count its system calls there. */
static unsigned calls_of_chain(const char *dir, const char *format, unsigned layers)
{
    unsigned calls = 0;
    int status;
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        ok(dr_close(open_layer(dir, format, layers), &err));
        _exit(0);
    }
    waitpid(child, &status, 0);
    if (ptrace(PTRACE_SETOPTIONS, child, NULL, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL) < 0)
        return 0;
    while (ptrace(PTRACE_SYSCALL, child, NULL, NULL) == 0 && waitpid(child, &status, 0) == child &&
           WIFSTOPPED(status))
        calls += WSTOPSIG(status) == (SIGTRAP | 0x80);
    return calls / 2; /* one stop before the call and one after it */
}

static void opening_a_layer_costs_what_the_table_says(void **state)
{
    static const struct {
        const char *format;
        unsigned calls;
        size_t bytes;
    } table[] = {{"vmdk", 36, 8 * KIB}, {"add-cow", 63, 8 * KIB}};
    char dir[256], clean[300];
    (void)state;
#if SLOWER > 1
    skip(); /* they make calls of their own */
#endif
    make_dir(dir, sizeof(dir));
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        const char *format = table[i].format;
        make_layers(dir, format);
        unsigned calls = calls_of_chain(dir, format, LAYERS);
        if (calls)
            calls = (calls - calls_of_chain(dir, format, 0)) / LAYERS;
        size_t bytes = (bytes_of_chain(dir, format, LAYERS) - bytes_of_chain(dir, format, 0)) /
                       LAYERS;
        if (calls > table[i].calls || bytes > table[i].bytes)
            fail_msg("%s: %u system calls and %zu bytes for each layer", format, calls, bytes);
    }
    snprintf(clean, sizeof(clean), "rm -rf '%s'", dir);
    assert_int_equal(system(clean), 0);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(an_allocating_write_with_counts_costs_two_flushes_also_with_a_new_table),
        T(an_allocating_write_to_vmdk_costs_two_flushes),
        T(an_allocating_write_to_add_cow_costs_one_flush_of_each_file),
        cmocka_unit_test(an_allocating_write_to_qcow2_costs_no_more_than_qemus),
        cmocka_unit_test(a_new_l2_table_costs_no_flush_of_its_own),
        T(neighbouring_freed_grains_are_punched_by_one_call),
        T(neighbouring_freed_ranges_of_add_cow_are_punched_by_one_call),
        T(freed_places_with_a_used_one_between_them_are_two_punches),
        T(what_a_snapshot_still_holds_is_not_punched),
        cmocka_unit_test(a_request_in_place_is_one_call),
        cmocka_unit_test(zeros_are_written_where_there_are_none),
        cmocka_unit_test(requests_in_place_take_no_lock_that_those_on_another_disk_take),
        cmocka_unit_test(opening_a_layer_costs_what_the_table_says),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
