/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What depth costs, against a chain of one image and in one process: random 4 KiB reads, a walk
 * over where the bytes are, opening, and what a snapshot, a rebase and a commit of an empty layer
 * take. Hot in the page cache.
 *
 *     drover-bench-depth [-n READS] [-r ROUNDS] DIRECTORY
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/core.h"
#include "drover/ops.h"

#define UNIT       4096u
#define PIECE      65536u
#define PIECES     8192u
#define MAX_ROUNDS 64

static struct dr_error err = DR_ERROR_INIT;
static unsigned reads = 20000, rounds = 5;

static void must(int r, const char *what)
{
    if (r >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, err.errnum ? err.text : strerror(-r));
    exit(1);
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static uint64_t random_of(uint64_t *x)
{
    *x = *x * 6364136223846793005u + 1442695040888963407u;
    return *x >> 20;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values)
{
    qsort(values, rounds, sizeof(*values), by_value);
    return values[rounds / 2];
}

static void verdict(const char *what, unsigned depth, const char *value, bool good)
{
    printf("%-34s %5u  %-28s %s\n", what, depth, value, good ? "ok" : "MISSED");
    fflush(stdout);
}

/* ------------------------------------------------------------------ chains */

struct subject {
    const char *dir, *format;
    uint64_t size;
    unsigned depth;
};

static const char *layer(const struct subject *s, unsigned i)
{
    static char paths[4][4096];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof(paths[0]), "%s/d%u-%u.%s", s->dir, s->depth, i, s->format);
    return path;
}

static struct dr_disk *open_top(const struct subject *s, unsigned flags)
{
    struct dr_open_options open = {.format = s->format, .flags = flags};
    struct dr_disk *disk;
    must(dr_open(layer(s, s->depth - 1), &open, &disk, &err), "open");
    return disk;
}

/* Pieces at the same distance all over the disk, in the lowest image. */
static void fill(const struct subject *s)
{
    struct dr_open_options open = {.format = s->format, .flags = DR_OPEN_RDWR | DR_OPEN_NO_FLUSH};
    struct dr_disk *disk;
    uint8_t buf[PIECE];
    memset(buf, 0x5a, sizeof(buf));
    must(dr_open(layer(s, 0), &open, &disk, &err), "open");
    for (uint64_t i = 0; i < PIECES; i++)
        must(dr_pwrite(disk, buf, i * (s->size / PIECES), PIECE, 0, &err), "fill");
    must(dr_close(disk, &err), "close");
}

/* Each layer is made on its parent alone: opening all the chain for each would take its square. */
static void make_layer(const struct subject *s, unsigned i)
{
    struct dr_fs *fs = dr_fs_posix();
    struct dr_image *below = NULL;
    const char *parent = i ? layer(s, i - 1) : NULL;
    if (parent)
        must(dr_image_open(fs, parent, s->format, DR_OPEN_NO_BACKING, &below, &err), "parent");
    const struct dr_create_params p = {
        .size = s->size,
        .backing = below,
        .backing_name = parent ? strrchr(parent, '/') + 1 : NULL,
        .backing_format = parent ? s->format : NULL,
    };
    must(dr_format_find(s->format)->create(fs, layer(s, i), &p, &err), "create");
    dr_image_unref(below, NULL);
}

static void make_chain(const struct subject *s)
{
    for (unsigned i = 0; i < s->depth; i++) {
        make_layer(s, i);
        if (i == 0)
            fill(s);
    }
}

static void remove_all(const char *dir)
{
    DIR *d = opendir(dir);
    char path[8192];
    for (struct dirent *e; d && (e = readdir(d));) {
        snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
        if (e->d_name[0] != '.')
            unlink(path);
    }
    if (d)
        closedir(d);
}

/* ------------------------------------------------------------------ reads and walks */

static double read_time(struct dr_disk *disk, uint64_t size)
{
    uint8_t buf[UNIT];
    uint64_t x = 1;
    double start = now();
    for (unsigned i = 0; i < reads; i++) {
        uint64_t piece = random_of(&x) % PIECES, unit = random_of(&x) % (PIECE / UNIT);
        must(dr_pread(disk, buf, piece * (size / PIECES) + unit * UNIT, UNIT, &err), "read");
    }
    return now() - start;
}

static double walk_time(const struct subject *s)
{
    struct dr_disk *disk = open_top(s, 0);
    double start = now();
    for (uint64_t off = 0; off < s->size;) {
        struct dr_extent_status status;
        must(dr_block_status(disk, off, s->size - off, &status, &err), "map");
        off += status.len;
    }
    double took = now() - start;
    must(dr_close(disk, &err), "close");
    return took;
}

static void compare_reads(const char *format, const struct subject *s, unsigned n)
{
    struct dr_disk *disks[4];
    double took[4][MAX_ROUNDS], one = 0;
    char what[64], value[64];
    for (unsigned i = 0; i < n; i++) {
        disks[i] = open_top(&s[i], 0);
        read_time(disks[i], s[i].size);
    }
    for (unsigned round = 0; round < rounds; round++)
        for (unsigned i = 0; i < n; i++)
            took[i][round] = read_time(disks[i], s[i].size);
    for (unsigned i = 0; i < n; i++) {
        double m = median(took[i]);
        one = i ? one : m;
        snprintf(what, sizeof(what), "%s: random 4 KiB reads", format);
        snprintf(value, sizeof(value), "%.2f us, %.2f times", m / reads * 1e6, m / one);
        verdict(what, s[i].depth, value, m <= 1.5 * one);
        must(dr_close(disks[i], &err), "close");
    }
}

static void compare_walks(const char *format, const struct subject *s, unsigned n)
{
    double took[4][MAX_ROUNDS], one = 0;
    char what[64], value[64];
    for (unsigned round = 0; round < rounds; round++)
        for (unsigned i = 0; i < n; i++)
            took[i][round] = walk_time(&s[i]);
    for (unsigned i = 0; i < n; i++) {
        double m = median(took[i]);
        one = i ? one : m;
        snprintf(what, sizeof(what), "%s: map of %u pieces", format, PIECES);
        snprintf(value, sizeof(value), "%.1f ms, %.2f times", m * 1e3, m / one);
        if (s[i].depth <= 300)
            verdict(what, s[i].depth, value, m <= 2 * one);
        else /* there is no figure that it must reach */
            printf("%-34s %5u  %s\n", what, s[i].depth, value);
    }
}

/* ------------------------------------------------------------------ opening, graph changes */

static double resident_mib(void)
{
    long pages = 0, all = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f || fscanf(f, "%ld %ld", &all, &pages) != 2)
        pages = 0;
    if (f)
        fclose(f);
    return (double)pages * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
}

static unsigned open_files(void)
{
    unsigned n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (d && readdir(d))
        n++;
    if (d)
        closedir(d);
    return n;
}

static void measure_open(const char *format, const struct subject *s)
{
    double took[MAX_ROUNDS], memory = 0;
    unsigned files = open_files(), held = 0;
    char what[64], value[64];
    for (unsigned round = 0; round < rounds; round++) {
        double start = now();
        struct dr_disk *disk = open_top(s, 0);
        took[round] = now() - start;
        memory = resident_mib(); /* all of the process: freed memory is not told from the rest */
        held = open_files() - files;
        must(dr_close(disk, &err), "close");
    }
    double m = median(took);
    snprintf(what, sizeof(what), "%s: open", format);
    snprintf(value, sizeof(value), "%.3f s", m);
    verdict(what, s->depth, value, m < 0.2);
    snprintf(value, sizeof(value), "%.1f MiB resident", memory);
    verdict(what, s->depth, value, memory < 64);
    snprintf(value, sizeof(value), "%u descriptors", held);
    verdict(what, s->depth, value, held <= 256);
}

static void measure_changes(const char *format, const struct subject *s)
{
    char what[64], value[64], *active = NULL;
    double start = now();
    if (dr_format_find(format)->snapshot_suffix) {
        must(dr_snapshot_create(layer(s, s->depth - 1), "bench-snapshot", NULL, &active, &err),
             "snapshot");
        free(active);
        snprintf(what, sizeof(what), "%s: snapshot -c", format);
        snprintf(value, sizeof(value), "%.3f s", now() - start);
        verdict(what, s->depth, value, now() - start < 0.5);
        char path[4096];
        snprintf(path, sizeof(path), "%s/bench-snapshot", s->dir);
        unlink(path);
    }
    struct dr_rebase_options rebase = {.backing = strrchr(layer(s, s->depth - 2), '/') + 1,
                                       .backing_format = format,
                                       .unsafe = true};
    start = now();
    must(dr_rebase(layer(s, s->depth - 1), &rebase, NULL, &err), "rebase");
    snprintf(what, sizeof(what), "%s: rebase -u", format);
    snprintf(value, sizeof(value), "%.3f s", now() - start);
    verdict(what, s->depth, value, now() - start < 0.5);
    struct dr_commit_options commit = {0};
    start = now();
    must(dr_commit(layer(s, s->depth - 1), &commit, NULL, &err), "commit");
    snprintf(what, sizeof(what), "%s: commit", format);
    snprintf(value, sizeof(value), "%.3f s", now() - start);
    verdict(what, s->depth, value, now() - start < 0.5);
}

/* ------------------------------------------------------------------ all of it */

static void run(const char *dir, const char *format)
{
    const struct subject s[] = {
        {dir, format, UINT64_C(64) << 30, 1},
        {dir, format, UINT64_C(64) << 30, 300},
        {dir, format, UINT64_C(64) << 30, 1000},
    };
    enum { N = sizeof(s) / sizeof(s[0]) };
    for (unsigned i = 0; i < N; i++)
        make_chain(&s[i]);
    measure_open(format, &s[N - 1]);
    compare_reads(format, s, N);
    compare_walks(format, s, N);
    measure_changes(format, &s[N - 1]);
    remove_all(dir);
}

int main(int argc, char **argv)
{
    char dir[4096];
    int opt;
    while ((opt = getopt(argc, argv, "n:r:")) != -1) {
        unsigned long value = strtoul(optarg, NULL, 0);
        if (opt == 'n' && value > 0)
            reads = (unsigned)value;
        else if (opt == 'r' && value > 0 && value <= MAX_ROUNDS)
            rounds = (unsigned)value;
        else
            return 2;
    }
    if (optind + 1 != argc)
        return 2;
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    snprintf(dir, sizeof(dir), "%s/drover-depth-XXXXXX", argv[optind]);
    if (!mkdtemp(dir))
        must(-1, dir);
    printf("%-34s %5s\n", "", "depth");
    run(dir, "vmdk");
    run(dir, "add-cow");
    rmdir(dir);
    return 0;
}
