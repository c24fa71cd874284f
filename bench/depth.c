/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What depth costs, against a chain of one image and in one process: random 4 KiB reads, a walk
 * over where the bytes are, the operations that walk, opening, and what a snapshot, a rebase and a
 * commit of an empty layer take. All pieces are in the lowest image, or scattered over all images.
 * Hot in the page cache. Opening, and the reads of which all are in the lowest image, once more
 * with 256 descriptors; the changes of the graph with 256 descriptors only.
 *
 *     drover-bench-depth [-c] [-f FORMAT] [-n READS] [-r ROUNDS] DIRECTORY
 *
 * -c: time of the processors, not of the clock on the wall. */
#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench.h"
#include "core/core.h"
#include "drover/ops.h"

#define UNIT   4096u
#define PIECE  65536u
#define PIECES 8192u
#define FEW    256u /* descriptors */

static struct dr_error err = DR_ERROR_INIT;
static unsigned reads = 20000, rounds = 5;

static void must(int r, const char *what)
{
    bench_must(r, what, &err);
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
    bool scattered; /* piece by piece over all images; else all in the lowest */
};

static const char *layer(const struct subject *s, unsigned i)
{
    static char paths[4][4096];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof(paths[0]), "%s/%c%u-%u.%s", s->dir, s->scattered ? 's' : 'd', s->depth, i,
             s->format);
    return path;
}

static struct dr_disk *open_top(const struct subject *s, unsigned flags)
{
    struct dr_open_options open = {.format = s->format, .flags = flags};
    struct dr_disk *disk;
    must(dr_open(layer(s, s->depth - 1), &open, &disk, &err), "open");
    return disk;
}

static unsigned layer_of_piece(const struct subject *s, uint64_t piece)
{
    uint64_t x = piece;
    bench_random(&x);
    return s->scattered ? (unsigned)(bench_random(&x) % s->depth) : 0;
}

/* Pieces at the same distance all over the disk: those of them that layer i is to have. */
static void fill(const struct subject *s, unsigned i)
{
    struct dr_open_options open = {.format = s->format,
                                   .flags = DR_OPEN_RDWR | DR_OPEN_NO_FLUSH | DR_OPEN_NO_BACKING};
    struct dr_disk *disk;
    uint8_t buf[PIECE];
    memset(buf, 0x5a, sizeof(buf));
    must(dr_open(layer(s, i), &open, &disk, &err), "open");
    for (uint64_t piece = 0; piece < PIECES; piece++)
        if (layer_of_piece(s, piece) == i)
            must(dr_pwrite(disk, buf, piece * (s->size / PIECES), PIECE, 0, &err), "fill");
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
        if (i == 0 || s->scattered)
            fill(s, i);
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
    double start = bench_now();
    for (unsigned i = 0; i < reads; i++) {
        uint64_t piece = bench_random(&x) % PIECES, unit = bench_random(&x) % (PIECE / UNIT);
        must(dr_pread(disk, buf, piece * (size / PIECES) + unit * UNIT, UNIT, &err), "read");
    }
    return bench_now() - start;
}

/* The seconds that a walk takes, without opening. other: one image with the same bytes. */
typedef double walk_fn(const struct subject *s, const struct subject *other);

static double map_time(const struct subject *s, const struct subject *other)
{
    (void)other;
    struct dr_disk *disk = open_top(s, 0);
    double start = bench_now();
    for (uint64_t off = 0; off < s->size;) {
        struct dr_extent_status status;
        must(dr_block_status(disk, off, s->size - off, &status, &err), "map");
        off += status.len;
    }
    double took = bench_now() - start;
    must(dr_close(disk, &err), "close");
    return took;
}

#define INFO_CALLS 100 /* one takes microseconds */

static double info_time(const struct subject *s, const struct subject *other)
{
    (void)other;
    struct dr_disk *disk = open_top(s, 0);
    double start = bench_now();
    for (unsigned i = 0; i < INFO_CALLS; i++) {
        char *json = NULL;
        must(dr_disk_info(disk, NULL, false, &json, &err), "info");
        free(json);
    }
    double took = (bench_now() - start) / INFO_CALLS;
    must(dr_close(disk, &err), "close");
    return took;
}

static double compare_time(const struct subject *s, const struct subject *other)
{
    struct dr_disk *disk = open_top(s, 0), *plain = open_top(other, 0);
    struct dr_compare_result result;
    double start = bench_now();
    must(dr_compare(disk, plain, false, NULL, &result, &err), "compare");
    double took = bench_now() - start;
    must(result.same ? 0 : -EIO, "compare");
    must(dr_close(disk, &err), "close");
    must(dr_close(plain, &err), "close");
    return took;
}

static double open_time(const struct subject *s, const struct subject *other)
{
    (void)other;
    double start = bench_now();
    must(dr_close(open_top(s, 0), &err), "close");
    return bench_now() - start;
}

/* These two open for themselves; what that takes is measured beside and taken off. */
static double measure_time(const struct subject *s, const struct subject *other)
{
    struct dr_open_options open = {.format = s->format};
    struct dr_measure_options o = {.source = &open, .out_format = "vmdk"};
    struct dr_measure_result result;
    double opening = open_time(s, other), start = bench_now();
    must(dr_measure(layer(s, s->depth - 1), 0, &o, &result, &err), "measure");
    return bench_now() - start - opening;
}

static double convert_time(const struct subject *s, const struct subject *other)
{
    char target[4096];
    const char *source = layer(s, s->depth - 1);
    struct dr_open_options open = {.format = s->format};
    struct dr_convert_options o = {
        .source = &open, .out_format = "raw", .sparse_size = DR_CONVERT_SPARSE_DEFAULT};
    snprintf(target, sizeof(target), "%s/target", s->dir);
    unlink(target);
    double opening = open_time(s, other), start = bench_now();
    must(dr_convert(&source, 1, target, &o, NULL, &err), "convert");
    double took = bench_now() - start - opening;
    unlink(target);
    return took;
}

static const struct {
    const char *name;
    walk_fn *time;
} walks[] = {
    {"map", map_time},         {"info", info_time},       {"measure", measure_time},
    {"compare", compare_time}, {"convert", convert_time}, {"(open and close)", open_time},
};

static void compare_reads(const char *format, const struct subject *s, unsigned n)
{
    struct dr_disk *disks[4];
    double took[4][BENCH_MAX_ROUNDS], one = 0;
    char what[64], value[64];
    for (unsigned i = 0; i < n; i++) {
        disks[i] = open_top(&s[i], 0);
        read_time(disks[i], s[i].size);
    }
    for (unsigned round = 0; round < rounds; round++)
        for (unsigned i = 0; i < n; i++)
            took[i][round] = read_time(disks[i], s[i].size);
    for (unsigned i = 0; i < n; i++) {
        double m = bench_median(took[i], rounds);
        one = i ? one : m;
        snprintf(what, sizeof(what), "%s%s: random 4 KiB reads", format,
                 s[i].scattered ? ", scattered" : "");
        snprintf(value, sizeof(value), "%.2f us, %.2f times", m / reads * 1e6, m / one);
        verdict(what, s[i].depth, value, m <= 1.5 * one);
        must(dr_close(disks[i], &err), "close");
    }
}

/* A deep chain against one image, in turns. */
static void compare_walks(const struct subject *deep, const struct subject *one,
                          const struct subject *other)
{
    double took[2][BENCH_MAX_ROUNDS];
    char what[64], value[64];
    for (size_t w = 0; w < sizeof(walks) / sizeof(walks[0]); w++) {
        for (unsigned round = 0; round < rounds; round++) {
            took[0][round] = walks[w].time(one, other);
            took[1][round] = walks[w].time(deep, other);
        }
        double a = bench_median(took[0], rounds), b = bench_median(took[1], rounds);
        snprintf(what, sizeof(what), "%s%s: %s", deep->format, deep->scattered ? ", scattered" : "",
                 walks[w].name);
        snprintf(value, sizeof(value), "%.3g ms, %.3g ms, %.2f times", a * 1e3, b * 1e3, b / a);
        if (deep->depth <= 300 && walks[w].time != open_time)
            verdict(what, deep->depth, value, b <= 2 * a);
        else /* there is no figure that it must reach */
            printf("%-34s %5u  %s\n", what, deep->depth, value);
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

/* How many descriptors this process may have; 0 = as many as there can be. */
static void allow_files(rlim_t n)
{
    struct rlimit limit;
    must(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
    limit.rlim_cur = n ? n : limit.rlim_max;
    must(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
}

static void measure_open(const char *format, const struct subject *s, rlim_t allowed)
{
    double took[BENCH_MAX_ROUNDS], memory = 0;
    unsigned files = open_files(), held = 0;
    char what[64], value[64];
    allow_files(allowed);
    for (unsigned round = 0; round < rounds; round++) {
        double start = bench_now();
        struct dr_disk *disk = open_top(s, 0);
        took[round] = bench_now() - start;
        memory = resident_mib(); /* all of the process: freed memory is not told from the rest */
        held = open_files() - files;
        must(dr_close(disk, &err), "close");
    }
    double m = bench_median(took, rounds);
    snprintf(what, sizeof(what), "%s: open", format);
    snprintf(value, sizeof(value), "%.3f s", m);
    verdict(what, s->depth, value, m < 0.2);
    snprintf(value, sizeof(value), "%.1f MiB resident", memory);
    verdict(what, s->depth, value, memory < 64);
    snprintf(value, sizeof(value), "%u descriptors", held);
    verdict(what, s->depth, value, !allowed || held <= allowed);
    allow_files(0);
}

static void measure_changes(const char *format, const struct subject *s)
{
    char what[64], value[64], *active = NULL;
    double start = bench_now();
    if (dr_format_find(format)->snapshot_suffix) {
        must(dr_snapshot_create(layer(s, s->depth - 1), "bench-snapshot", NULL, &active, &err),
             "snapshot");
        free(active);
        snprintf(what, sizeof(what), "%s: snapshot -c", format);
        snprintf(value, sizeof(value), "%.3f s", bench_now() - start);
        verdict(what, s->depth, value, bench_now() - start < 0.5);
        char path[4096];
        snprintf(path, sizeof(path), "%s/bench-snapshot", s->dir);
        unlink(path);
    }
    struct dr_rebase_options rebase = {.backing = strrchr(layer(s, s->depth - 2), '/') + 1,
                                       .backing_format = format,
                                       .unsafe = true};
    start = bench_now();
    must(dr_rebase(layer(s, s->depth - 1), &rebase, NULL, &err), "rebase");
    snprintf(what, sizeof(what), "%s: rebase -u", format);
    snprintf(value, sizeof(value), "%.3f s", bench_now() - start);
    verdict(what, s->depth, value, bench_now() - start < 0.5);
    struct dr_commit_options commit = {0};
    start = bench_now();
    must(dr_commit(layer(s, s->depth - 1), &commit, NULL, &err), "commit");
    snprintf(what, sizeof(what), "%s: commit", format);
    snprintf(value, sizeof(value), "%.3f s", bench_now() - start);
    verdict(what, s->depth, value, bench_now() - start < 0.5);
}

/* ------------------------------------------------------------------ all of it */

static void run(const char *dir, const char *format)
{
    const struct subject s[] = {
        {dir, format, UINT64_C(64) << 30, 1, false},
        {dir, format, UINT64_C(64) << 30, 300, false},
        {dir, format, UINT64_C(64) << 30, 1000, false},
        {dir, format, UINT64_C(64) << 30, 300, true},
    };
    const struct subject other = {dir, format, UINT64_C(64) << 30, 1, true};
    enum { N = sizeof(s) / sizeof(s[0]) };
    for (unsigned i = 0; i < N; i++)
        make_chain(&s[i]);
    make_chain(&other);
    measure_open(format, &s[2], 0);
    measure_open(format, &s[2], FEW);
    compare_reads(format, s, N);
    printf("with %u descriptors:\n", FEW);
    allow_files(FEW);
    compare_reads(format, s, 3);
    allow_files(0);
    for (unsigned i = 1; i < N; i++)
        compare_walks(&s[i], &s[0], &other);
    allow_files(FEW);
    measure_changes(format, &s[2]);
    allow_files(0);
    remove_all(dir);
}

int main(int argc, char **argv)
{
    static const char *const formats[] = {"vmdk", "add-cow"};
    const char *only = NULL;
    char dir[4096];
    int opt;
    while ((opt = getopt(argc, argv, "cf:n:r:")) != -1) {
        if (opt == 'f')
            only = optarg;
        if (opt == 'c')
            bench_clock = CLOCK_PROCESS_CPUTIME_ID;
        if (opt == 'f' || opt == 'c')
            continue;
        unsigned long value = strtoul(optarg, NULL, 0);
        if (opt == 'n' && value > 0)
            reads = (unsigned)value;
        else if (opt == 'r' && value > 0 && value <= BENCH_MAX_ROUNDS)
            rounds = (unsigned)value;
        else
            return 2;
    }
    if (optind + 1 != argc)
        return 2;
    allow_files(0);
    snprintf(dir, sizeof(dir), "%s/drover-depth-XXXXXX", argv[optind]);
    if (!mkdtemp(dir))
        must(-1, dir);
    printf("%-34s %5s\n", "", "depth");
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++)
        if (!only || strcmp(only, formats[i]) == 0)
            run(dir, formats[i]);
    rmdir(dir);
    return 0;
}
