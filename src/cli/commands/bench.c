/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* bench: requests of one size at regular offsets, a number of them at a time, as qemu-img sends
 * them. One thread sends one request at a time, so there are as many threads as requests in flight.
 */
#include <limits.h>
#include <string.h>
#include <time.h>

#include "base/thread.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/progress.h"

#define MAX_DEPTH     1024
#define DEFAULT_DEPTH "64"
#define DEFAULT_COUNT "75000"
#define DEFAULT_SIZE  "4k"

static const struct cli_option options[] = {
    {'c', NULL, "COUNT", "number of requests (75000)", false},
    {'d', NULL, "DEPTH", "requests in flight (64)", false},
    {KEY_FLUSH_INTERVAL, "flush-interval", "N", "flush after N writes", false},
    {'i', "aio", "MODE", "threads, native or io_uring; all are the same here", false},
    {'n', "native", NULL, "the same as -i native", false},
    {KEY_NO_DRAIN, "no-drain", NULL, "go on with other requests while a flush is under way", false},
    {'o', NULL, "OFFSET", "where the first request goes (0)", false},
    {KEY_PATTERN, "pattern", "BYTE", "what is written (0)", false},
    {'s', NULL, "BYTES", "size of a request (4k)", false},
    {'q', "quiet", NULL, "accepted, as by qemu-img; the time is printed all the same", false},
    {'S', NULL, "BYTES", "distance of one request from the next (as -s)", false},
    {'t', NULL, "CACHE", "none, writeback (default), writethrough, directsync, unsafe", false},
    {'w', NULL, NULL, "write instead of read: the disk loses what it holds", false},
    {0, NULL, NULL, NULL, false},
};

struct bench {
    struct dr_disk *disk;
    unsigned long count, depth, flush_interval;
    uint64_t offset, size, step;
    int pattern;
    bool write, fua, drain;

    pthread_mutex_t lock;
    pthread_cond_t drained;
    unsigned long begun, ended, in_flight; /* requests */
    uint64_t next;                         /* offset of the next request */
    bool flushing;                         /* nobody begins a request */
    int failed;                            /* -errno of the first failure */
};

/* ------------------------------------------------------------------ the requests */

/* Returns false when there is nothing more to send. */
static bool begin_request(struct bench *b, uint64_t *offset)
{
    uint64_t disk_size = dr_size(b->disk);
    bool go = false;
    pthread_mutex_lock(&b->lock);
    while (b->flushing)
        pthread_cond_wait(&b->drained, &b->lock);
    if (b->begun < b->count && b->failed == 0) {
        go = true;
        b->begun++;
        b->in_flight++;
        *offset = b->next;
        b->next += b->step;
        if (b->next + b->size > disk_size)
            b->next = disk_size > b->size ? b->next % (disk_size - b->size) : 0;
    }
    pthread_mutex_unlock(&b->lock);
    return go;
}

static int flush_now(struct bench *b)
{
    pthread_mutex_unlock(&b->lock);
    int r = dr_flush(b->disk, NULL);
    pthread_mutex_lock(&b->lock);
    return r;
}

/* After the last of an interval's writes the thread that sent it flushes. */
static void end_request(struct bench *b, int r)
{
    pthread_mutex_lock(&b->lock);
    b->in_flight--;
    b->ended++;
    if (r == 0 && b->flush_interval && b->ended % b->flush_interval == 0) {
        while (b->drain && b->flushing)
            pthread_cond_wait(&b->drained, &b->lock);
        b->flushing = b->drain;
        while (b->drain && b->in_flight > 0)
            pthread_cond_wait(&b->drained, &b->lock);
        r = flush_now(b);
        b->flushing = false;
    }
    if (r < 0 && b->failed == 0)
        b->failed = r;
    pthread_cond_broadcast(&b->drained);
    pthread_mutex_unlock(&b->lock);
}

static int send_request(const struct bench *b, void *buf, uint64_t offset)
{
    if (offset > dr_size(b->disk) || b->size > dr_size(b->disk) - offset)
        return -EIO;
    return b->write ? dr_pwrite(b->disk, buf, offset, b->size, b->fua ? DR_FUA : 0, NULL)
                    : dr_pread(b->disk, buf, offset, b->size, NULL);
}

static void *send_requests(void *user)
{
    struct bench *b = user;
    uint64_t offset;
    CLEANUP_FREE void *buf = NULL;
    if (posix_memalign(&buf, 4096, b->size ? b->size : 1) != 0) {
        buf = NULL;
        pthread_mutex_lock(&b->lock);
        b->failed = -ENOMEM;
        pthread_mutex_unlock(&b->lock);
        return NULL;
    }
    memset(buf, b->pattern, b->size);
    while (begin_request(b, &offset))
        end_request(b, send_request(b, buf, offset));
    return NULL;
}

/* Fewer threads than asked for are enough, as long as there is one. */
static int send_all(struct bench *b)
{
    unsigned long wanted = b->depth < b->count ? b->depth : b->count, n = 0;
    CLEANUP_FREE pthread_t *threads = calloc(wanted + 1, sizeof(*threads));
    int r = threads ? 0 : -ENOMEM;
    while (r == 0 && n < wanted) {
        r = -dr_thread_start(&threads[n], send_requests, b);
        n += r == 0;
    }
    for (unsigned long i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    return n > 0 || wanted == 0 ? b->failed : r;
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int measure(const struct cli *cli, struct bench *b)
{
    struct dr_error err = DR_ERROR_INIT;
    printf("Sending %lu %s requests, %llu bytes each, %lu in parallel (starting at offset %llu, "
           "step size %llu)\n",
           b->count, b->write ? "write" : "read", (unsigned long long)b->size, b->depth,
           (unsigned long long)b->offset, (unsigned long long)b->step);
    if (b->flush_interval)
        printf("Sending flush every %lu requests\n", b->flush_interval);
    fflush(stdout);
    double before = seconds_now();
    int r = send_all(b);
    double after = seconds_now();
    int closed = dr_close(b->disk, &err);
    if (r < 0) {
        cli_error(cli, "Failed request: %s", strerror(-r));
        return 1;
    }
    if (closed < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    printf("Run completed in %3.3f seconds.\n", after - before);
    return 0;
}

/* ------------------------------------------------------------------ arguments */

static int get_number(const struct cli *cli, const struct cli_args *args, int key,
                      const char *fallback, unsigned long least, unsigned long most,
                      const char *what, unsigned long *value)
{
    const char *text = cli_value(args, key);
    char *end;
    if (!text)
        text = fallback;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 0);
    if (end == text || *end || strchr(text, '-') || errno || n < least || n > most) {
        cli_error(cli, "Invalid %s specified", what);
        return 1;
    }
    *value = (unsigned long)n;
    return 0;
}

static int get_bytes(const struct cli *cli, const struct cli_args *args, int key,
                     const char *fallback, uint64_t most, const char *what, uint64_t *bytes)
{
    const char *text = cli_value(args, key);
    if (cli_get_size(cli, what, text ? text : fallback, bytes) < 0)
        return 1;
    if (*bytes <= most)
        return 0;
    cli_error(cli, "Invalid %s specified. Must be between 0 and %llu.", what,
              (unsigned long long)most);
    return 1;
}

static int check_flushes(const struct cli *cli, const struct bench *b)
{
    if (b->flush_interval && !b->write)
        cli_error(cli, "--flush-interval is only available in write tests");
    else if (b->flush_interval && b->flush_interval < b->depth)
        cli_error(cli, "Flush interval can't be smaller than depth");
    else
        return 0;
    return 1;
}

static int get_settings(const struct cli *cli, const struct cli_args *args, struct bench *b)
{
    const char *aio = cli_value(args, 'i'), *cache = cli_value(args, 't');
    unsigned long pattern;
    unsigned flags = 0;
    if (get_number(cli, args, 'c', DEFAULT_COUNT, 0, INT_MAX, "request count", &b->count) != 0 ||
        get_number(cli, args, 'd', DEFAULT_DEPTH, 1, MAX_DEPTH, "queue depth", &b->depth) != 0 ||
        get_bytes(cli, args, 'o', "0", INT64_MAX, "offset", &b->offset) != 0 ||
        get_bytes(cli, args, 's', DEFAULT_SIZE, INT_MAX, "buffer size", &b->size) != 0 ||
        get_bytes(cli, args, 'S', "0", INT_MAX, "step_size", &b->step) != 0 ||
        get_number(cli, args, KEY_PATTERN, "0", 0, 255, "pattern byte", &pattern) != 0 ||
        get_number(cli, args, KEY_FLUSH_INTERVAL, "0", 0, INT_MAX, "flush interval",
                   &b->flush_interval) != 0)
        return 1;
    if (aio && strcmp(aio, "threads") != 0 && strcmp(aio, "native") != 0 &&
        strcmp(aio, "io_uring") != 0) {
        cli_error(cli, "Invalid aio option: %s", aio);
        return 1;
    }
    if (cache && cli_cache_flags(cache, &flags, &b->fua) < 0) {
        cli_error(cli, "Invalid cache mode");
        return 1;
    }
    if (b->step == 0)
        b->step = b->size;
    b->next = b->offset;
    b->pattern = (int)pattern;
    b->write = cli_has(args, 'w');
    b->drain = !cli_has(args, KEY_NO_DRAIN);
    return check_flushes(cli, b);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    struct bench b = {.lock = PTHREAD_MUTEX_INITIALIZER, .drained = PTHREAD_COND_INITIALIZER};
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    if (get_settings(cli, args, &b) != 0)
        return 1;
    const struct cli_image_spec spec = {.name = args->operands[0],
                                        .format_key = 'f',
                                        .cache_key = 't',
                                        .flags = b.write ? DR_OPEN_RDWR : 0};
    if (cli_image_get(cli, args, &spec, &image) != 0)
        return 1;
    if (b.write && cli_has(args, 'U')) {
        cli_error(cli, "Could not open '%s': force-share=on can only be used with read-only images",
                  image.path);
        return 1;
    }
    if (cli_image_open(cli, &image, &b.disk) < 0)
        return 1;
    if (b.write)
        cli_die_politely(cli, "the disk holds some of what was to be written");
    return measure(cli, &b);
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_share,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_bench = {
    .name = "bench",
    .operands = "FILE",
    .brief = "Measure how long a disk takes for many requests",
    .about = "-w overwrites what the disk holds.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
