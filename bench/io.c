/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What `qemu-img bench` does, through the library: COUNT requests of SIZE bytes, each STEP behind
 * the one before, back from the end to the beginning, DEPTH at a time. The same options, as far as
 * they go, and -F for --flush-interval: drover-bench-io [-c COUNT] [-d DEPTH] [-f FORMAT]
 * [-F INTERVAL] [-s SIZE] [-S STEP] [-w] FILE */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "drover/drover.h"

struct bench {
    struct dr_disk *disk;
    uint64_t count, size, step, disk_size;
    uint64_t interval; /* flush after so many requests; 0: only at the end */
    bool write;
    _Atomic uint64_t next;
    _Atomic bool failed;
};

static void *worker(void *arg)
{
    struct bench *b = arg;
    struct dr_error err = DR_ERROR_INIT;
    char *buf = malloc(b->size);
    uint64_t i, last = b->disk_size - b->size;
    memset(buf, 0x55, b->size);
    while (!b->failed && (i = atomic_fetch_add(&b->next, 1)) < b->count) {
        uint64_t off = i * b->step % b->disk_size;
        off = off < last ? off : last;
        int r = b->write ? dr_pwrite(b->disk, buf, off, b->size, 0, &err)
                         : dr_pread(b->disk, buf, off, b->size, &err);
        if (r == 0 && b->interval && (i + 1) % b->interval == 0)
            r = dr_flush(b->disk, &err);
        if (r) {
            fprintf(stderr, "%s\n", err.text);
            b->failed = true;
        }
    }
    free(buf);
    return NULL;
}

static void run(struct bench *b, unsigned depth)
{
    pthread_t threads[64];
    unsigned n = 0;
    while (n < depth - 1 && pthread_create(&threads[n], NULL, worker, b) == 0)
        n++;
    worker(b);
    while (n > 0)
        pthread_join(threads[--n], NULL);
}

int main(int argc, char **argv)
{
    struct bench b = {.count = 75000, .size = 4096};
    struct dr_open_options o = {0};
    struct dr_error err = DR_ERROR_INIT;
    unsigned long depth = 64;
    int opt;
    while ((opt = getopt(argc, argv, "c:d:f:F:s:S:w")) != -1) {
        switch (opt) {
        case 'c':
            b.count = strtoull(optarg, NULL, 0);
            break;
        case 'd':
            depth = strtoul(optarg, NULL, 0);
            break;
        case 'f':
            o.format = optarg;
            break;
        case 'F':
            b.interval = strtoull(optarg, NULL, 0);
            break;
        case 's':
            b.size = strtoull(optarg, NULL, 0);
            break;
        case 'S':
            b.step = strtoull(optarg, NULL, 0);
            break;
        case 'w':
            b.write = true;
            o.flags = DR_OPEN_RDWR;
            break;
        default:
            return 2;
        }
    }
    if (optind + 1 != argc || depth < 1 || depth > 64)
        return 2;
    int r = dr_open(argv[optind], &o, &b.disk, &err);
    if (r == 0) {
        b.disk_size = dr_size(b.disk);
        b.step = b.step ? b.step : b.size;
        if (b.size <= b.disk_size)
            run(&b, (unsigned)depth);
        r = dr_close(b.disk, &err);
    }
    if (r)
        fprintf(stderr, "%s\n", err.text);
    return r || b.failed ? 1 : 0;
}
