/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Measures what a request costs above the system call that it comes to: random 4 KiB reads and
 * in-place writes through the library, and the same by pread(2) and pwrite(2) on the raw file, in
 * turns and in one process, with one thread and with two. Hot in the page cache.
 *
 *     drover-bench-requests [-c] [-n REQUESTS] [-r ROUNDS] [-s SIZE] [-w BYTES] DIRECTORY
 *
 * -c: time of the processors, not of the clock on the wall. -w: how many bytes one write of the raw
 * file brings, at most 1 MiB; the library writes to ext4 in pieces of 128 KiB. Times are medians of
 * the rounds, the ratio is the median of the rounds' ratios: a round takes both one after the
 * other, so that what else the machine does meets both. */
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "bench.h"
#include "drover/ops.h"

#define UNIT  4096u
#define PIECE (1u << 20)
#define LIMIT 1.3 /* times the system call */

static struct dr_error err = DR_ERROR_INIT;
static uint64_t size = 512ull << 20;
static uint64_t folio = 128 << 10;
static unsigned requests = 20000, rounds = 41;

static void must(int r, const char *what)
{
    bench_must(r, what, &err);
}

/* ------------------------------------------------------------------ what is measured */

struct way {
    struct dr_disk *disk; /* or, without one, */
    int fd;
    bool write;
};

struct worker {
    const struct way *way;
    unsigned seed, n;
    pthread_t thread;
};

static void one_request(const struct way *w, uint8_t *buf, uint64_t off)
{
    if (w->disk && w->write)
        must(dr_pwrite(w->disk, buf, off, UNIT, 0, &err), "write");
    else if (w->disk)
        must(dr_pread(w->disk, buf, off, UNIT, &err), "read");
    else if ((w->write ? pwrite(w->fd, buf, UNIT, (off_t)off)
                       : pread(w->fd, buf, UNIT, (off_t)off)) != (ssize_t)UNIT)
        must(-1, "the raw file");
}

static void *work(void *arg)
{
    struct worker *w = arg;
    uint8_t *buf = aligned_alloc(UNIT, UNIT);
    uint64_t x = w->seed;
    memset(buf, 0x55, UNIT);
    for (unsigned i = 0; i < w->n; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        one_request(w->way, buf, (x >> 20) % (size / UNIT) * UNIT);
    }
    free(buf);
    return NULL;
}

static double seconds(const struct way *way, unsigned threads)
{
    struct worker w[2];
    double start = bench_now();
    for (unsigned i = 0; i < threads; i++) {
        w[i] = (struct worker){.way = way, .seed = i + 1, .n = requests / threads};
        if (i > 0)
            must(-pthread_create(&w[i].thread, NULL, work, &w[i]), "thread");
    }
    work(&w[0]);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(w[i].thread, NULL);
    return bench_now() - start;
}

/* ------------------------------------------------------------------ a table of medians */

static void compare(const char *name, struct dr_disk *disk, int fd, bool write, unsigned threads)
{
    double ours[BENCH_MAX_ROUNDS], theirs[BENCH_MAX_ROUNDS], ratios[BENCH_MAX_ROUNDS];
    const struct way lib = {.disk = disk, .write = write}, sys = {.fd = fd, .write = write};
    seconds(&lib, threads); /* warm */
    seconds(&sys, threads);
    for (unsigned i = 0; i < rounds; i++) {
        theirs[i] = seconds(&sys, threads);
        ours[i] = seconds(&lib, threads);
        ratios[i] = ours[i] / theirs[i];
    }
    double a = bench_median(ours, rounds), b = bench_median(theirs, rounds);
    double ratio = bench_median(ratios, rounds);
    printf("%-8s %-14s %u thread%s %8.3f us %8.3f us %6.2f  %s\n", name,
           write ? "write in place" : "read", threads, threads == 1 ? " " : "s", a / requests * 1e6,
           b / requests * 1e6, ratio, ratio <= LIMIT ? "ok" : "MISSED");
    fflush(stdout);
}

/* ------------------------------------------------------------------ the disks */

static void fill(struct dr_disk *disk)
{
    uint8_t *buf = malloc(PIECE);
    for (uint64_t off = 0; off < size; off += PIECE) {
        memset(buf, (int)(off / PIECE) | 1, PIECE);
        must(dr_pwrite(disk, buf, off, PIECE, 0, &err), "fill");
    }
    must(dr_flush(disk, &err), "flush");
    free(buf);
}

static struct dr_disk *make(const char *dir, const char *format, char *path, size_t room)
{
    struct dr_open_options open = {.format = format, .flags = DR_OPEN_RDWR};
    struct dr_create_options create = {.format = format, .size = size, .has_size = true};
    struct dr_disk *disk;
    snprintf(path, room, "%s/requests.%s", dir, format);
    must(dr_create(path, &create, &err), "create");
    must(dr_open(path, &open, &disk, &err), "open");
    fill(disk);
    return disk;
}

int main(int argc, char **argv)
{
    static const char *const formats[] = {"raw", "vmdk", "qcow2"};
    char raw[4096], path[4096];
    int opt;
    while ((opt = getopt(argc, argv, "cn:r:s:w:")) != -1) {
        unsigned long long value = optarg ? strtoull(optarg, NULL, 0) : 0;
        if (opt == 'c')
            bench_clock = CLOCK_PROCESS_CPUTIME_ID;
        else if (opt == 'n')
            requests = (unsigned)value;
        else if (opt == 'r' && value > 0 && value <= BENCH_MAX_ROUNDS)
            rounds = (unsigned)value;
        else if (opt == 's' && value >= PIECE)
            size = value / PIECE * PIECE;
        else if (opt == 'w' && value >= UNIT && value <= PIECE && PIECE % value == 0)
            folio = value;
        else
            return 2;
    }
    if (optind + 1 != argc)
        return 2;
    snprintf(raw, sizeof(raw), "%s/requests.bytes", argv[optind]);
    int fd = open(raw, O_RDWR | O_CREAT | O_TRUNC, 0600);
    must(fd < 0 ? -1 : 0, raw);
    /* In pieces like those of the images: the size of the folios that the system caches them in,
     * which follows from that, decides what a small read or write costs. */
    uint8_t *piece = calloc(1, PIECE);
    for (uint64_t off = 0; off < size; off += folio)
        if (pwrite(fd, piece, folio, (off_t)off) != (ssize_t)folio)
            must(-1, raw);
    free(piece);
    fsync(fd);
    printf("%-8s %-14s %-9s %11s %11s %6s\n", "", "", "", "drover", "system", "ratio");
    for (size_t f = 0; f < sizeof(formats) / sizeof(formats[0]); f++) {
        struct dr_disk *disk = make(argv[optind], formats[f], path, sizeof(path));
        for (unsigned threads = 1; threads <= 2; threads++) {
            compare(formats[f], disk, fd, false, threads);
            compare(formats[f], disk, fd, true, threads);
        }
        must(dr_close(disk, &err), "close");
        unlink(path);
    }
    close(fd);
    unlink(raw);
    return 0;
}
