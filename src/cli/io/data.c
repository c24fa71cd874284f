/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <ctype.h>
#include <getopt.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/error.h"
#include "cli/io/io.h"

struct request {
    const char *verb; /* "read", "wrote", "discard": for the report */
    uint64_t off, len;
    int pattern; /* -1 = none given */
    const char *pattern_file;
    uint64_t check_off, check_len; /* read: what the pattern must fill */
    bool has_check_off, has_check_len;
    bool machine, quiet, dump, zero, unmap, fua, no_fallback, compressed, vmstate, invalid;
};

#define DEFAULT_PATTERN 0xcd

/* ------------------------------------------------------------------ arguments */

static int get_pattern(const char *text, int *pattern)
{
    char *end;
    long value = strtol(text, &end, 0);

    if (end == text || *end || value < 0 || value > 255) {
        printf("%s is not a valid pattern byte\n", text);
        return -EINVAL;
    }
    *pattern = (int)value;
    return 0;
}

static int take_option(struct request *q, int c, bool reading)
{
    switch (c) {
    case 'C':
        q->machine = true;
        return 0;
    case 'q':
        q->quiet = true;
        return 0;
    case 'v':
        q->dump = true;
        return 0;
    case 'z':
        q->zero = true;
        return 0;
    case 'u':
        q->unmap = true;
        return 0;
    case 'f':
        q->fua = true;
        return 0;
    case 'n':
        q->no_fallback = true;
        return 0;
    case 'c':
        q->compressed = true;
        return 0;
    case 'b':
        q->vmstate = true;
        return 0;
    case 'i':
        q->invalid = true;
        return 0;
    case 'P':
        return get_pattern(optarg, &q->pattern);
    case 'l':
        q->has_check_len = true;
        return io_number(optarg, &q->check_len);
    case 's':
        if (!reading) {
            q->pattern_file = optarg;
            return 0;
        }
        q->has_check_off = true;
        return io_number(optarg, &q->check_off);
    default: /* -a, -p: for scripts of long ago */
        return 0;
    }
}

static int parse(struct request *q, const struct io_command *command, int argc, char **argv,
                 const char *letters, bool reading)
{
    int c, r = 0;

    *q = (struct request){.verb = reading ? "read" : "wrote", .pattern = -1};
    optind = 0;
    opterr = 1;
    while (r == 0 && (c = getopt(argc, argv, letters)) != -1)
        r = c == '?' ? io_wrong(command) : take_option(q, c, reading);
    return r;
}

/* off len */
static int get_range(struct request *q, const struct io_command *command, int argc, char **argv)
{
    if (optind != argc - 2)
        return io_wrong(command);
    int r = io_number(argv[optind], &q->off);
    if (r == 0)
        r = io_number(argv[optind + 1], &q->len);
    if (r == 0 && q->len > IO_REQUEST_MAX && !q->no_fallback) {
        printf("length cannot exceed %u%s, given %s\n", IO_REQUEST_MAX,
               strcmp(command->name, "write") == 0 ? " without -n" : "", argv[optind + 1]);
        return -EINVAL;
    }
    return r;
}

/* off len [len..] */
static int get_vector(struct request *q, const struct io_command *command, int argc, char **argv)
{
    if (optind > argc - 2)
        return io_wrong(command);
    int r = io_number(argv[optind], &q->off);
    for (int i = optind + 1; r == 0 && i < argc; i++) {
        uint64_t len;
        r = io_number(argv[i], &len);
        if (r == 0 && len > IO_REQUEST_MAX) {
            printf("Argument '%s' exceeds maximum size %u\n", argv[i], IO_REQUEST_MAX);
            return -EINVAL;
        }
        if (r == 0 && q->len + len > IO_REQUEST_MAX) {
            printf("The total number of bytes exceed the maximum size %u\n", IO_REQUEST_MAX);
            return -EINVAL;
        }
        q->len += r == 0 ? len : 0;
    }
    return r;
}

/* ------------------------------------------------------------------ the report */

static double seconds_since(const struct timespec *start)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    double s = (double)(now.tv_sec - start->tv_sec) + (double)(now.tv_nsec - start->tv_nsec) / 1e9;
    return s < 1e-9 ? 1e-9 : s;
}

static const char *time_text(double seconds, bool always_long, char *buf, size_t size)
{
    unsigned hundredths = (unsigned)(seconds * 100.0) % 100;
    unsigned whole = (unsigned)seconds;

    if (always_long || whole >= 60)
        snprintf(buf, size, "%u:%02u:%02u.%02u", whole / 3600, whole / 60 % 60, whole % 60,
                 hundredths);
    else
        snprintf(buf, size, "%02u.%02u sec", whole, hundredths);
    return buf;
}

static void report(const struct request *q, const struct timespec *start)
{
    double s = seconds_since(start), bytes = (double)q->len;
    char size[IO_SIZE_TEXT], speed[IO_SIZE_TEXT], when[64];

    if (q->quiet)
        return;
    if (q->machine) {
        printf("%" PRIu64 ",1,%s,%.3f,%.3f\n", q->len, time_text(s, true, when, sizeof(when)),
               bytes / s, 1.0 / s);
        return;
    }
    printf("%s %" PRIu64 "/%" PRIu64 " bytes at offset %" PRIu64 "\n", q->verb, q->len, q->len,
           q->off);
    printf("%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n", io_size_text(bytes, size),
           time_text(s, false, when, sizeof(when)), io_size_text(bytes / s, speed), 1.0 / s);
}

static void dump(const uint8_t *buf, uint64_t off, uint64_t len)
{
    for (uint64_t i = 0; i < len; i += 16) {
        uint64_t n = dr_min(16, len - i);
        printf("%08" PRIx64 ":  ", off + i);
        for (uint64_t k = 0; k < n; k++)
            printf("%02x ", buf[i + k]);
        printf(" ");
        for (uint64_t k = 0; k < n; k++)
            putchar(isalnum(buf[i + k]) ? buf[i + k] : '.');
        printf("\n");
    }
}

/* ------------------------------------------------------------------ reading */

static int check_pattern_range(struct request *q, const struct io_command *command)
{
    if (q->pattern < 0)
        return q->has_check_len || q->has_check_off ? io_wrong(command) : 0;
    if (!q->has_check_len)
        q->check_len = q->len >= q->check_off ? q->len - q->check_off : UINT64_MAX;
    if (dr_inside(q->check_off, q->check_len, q->len))
        return 0;
    printf("pattern verification range exceeds end of read data\n");
    return -EINVAL;
}

static int verify(const struct request *q, const uint8_t *buf)
{
    for (uint64_t i = 0; q->pattern >= 0 && i < q->check_len; i++) {
        if (buf[q->check_off + i] != (uint8_t)q->pattern) {
            printf("Pattern verification failed at offset %" PRIu64 ", %" PRIu64 " bytes\n",
                   q->off + q->check_off, q->check_len);
            return -EINVAL;
        }
    }
    return 0;
}

/* -EIO is what qemu-io has for it, and tells nobody what is wrong. */
static int outside(const struct io *io, uint64_t off, uint64_t len, struct dr_error *err)
{
    return dr_fail(err, EIO,
                   "%s: %" PRIu64 " bytes at %" PRIu64 " are not inside the disk of %" PRIu64
                   " bytes",
                   dr_image_path(io->disk, 0), len, off, dr_size(io->disk));
}

/* What the image itself does not hold goes into it. */
static int copy_up(struct io *io, const struct request *q, const uint8_t *buf, struct dr_error *err)
{
    int r = 0;
    bool allocated;
    for (uint64_t at = 0, n; r == 0 && at < q->len; at += n) {
        r = io_top_run(io, q->off + at, q->len - at, &allocated, &n);
        if (r < 0 || allocated)
            continue;
        r = dr_is_zero(buf + at, (size_t)n)
                ? dr_zero(io->disk, q->off + at, n, 0, err)
                : dr_pwrite(io->disk, buf + at, q->off + at, (size_t)n, 0, err);
    }
    return r;
}

static int do_read(struct io *io, struct request *q, const char *name)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE uint8_t *buf = malloc(q->len + 1);
    struct timespec start;
    int r;

    if (!buf) {
        cli_error(io->cli, "no memory for %" PRIu64 " bytes", q->len);
        return -ENOMEM;
    }
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (q->vmstate)
        r = -ENOTSUP;
    else if (!dr_inside(q->off, q->len, dr_size(io->disk)))
        r = outside(io, q->off, q->len, &err);
    else
        r = dr_pread(io->disk, buf, q->off, q->len, &err);
    if (r == 0 && io->copy_on_read && (io->image.open.flags & DR_OPEN_RDWR))
        r = copy_up(io, q, buf, &err);
    if (r < 0)
        return io_failed(io, name, r, &err);
    r = verify(q, buf);
    if (q->quiet)
        return r;
    if (q->dump)
        dump(buf, q->off, q->len);
    report(q, &start);
    return r;
}

int io_read(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct request q;
    int r = parse(&q, command, argc, argv, "abCl:pP:qs:v", true);

    if (r == 0 && q.pattern < 0 && (q.has_check_len || q.has_check_off))
        return io_wrong(command);
    if (r == 0)
        r = get_range(&q, command, argc, argv);
    if (r == 0)
        r = check_pattern_range(&q, command);
    return r < 0 ? r : do_read(io, &q, "read");
}

int io_readv(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct request q;
    int r = parse(&q, command, argc, argv, "CP:qv", true);

    if (r == 0)
        r = get_vector(&q, command, argc, argv);
    if (r == 0)
        r = check_pattern_range(&q, command);
    return r < 0 ? r : do_read(io, &q, "readv");
}

/* -i: QEMU counts a request that is never sent; there is nothing to count here. */
static int injected(const char *what)
{
    printf("injecting invalid %s request\n", what);
    return 0;
}

/* The request counts as sent: what becomes of it changes no exit code. */
int io_aio_read(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct request q;
    int r = parse(&q, command, argc, argv, "CP:iqv", true);

    if (r == 0 && q.invalid)
        return injected("read");
    if (r == 0)
        r = get_vector(&q, command, argc, argv);
    if (r == 0)
        r = check_pattern_range(&q, command);
    if (r < 0)
        return r;
    do_read(io, &q, "readv");
    return 0;
}

/* ------------------------------------------------------------------ writing */

static int check_write(const struct request *q)
{
    if (q->no_fallback && !q->zero) {
        printf("-n requires -z to be specified\n");
        return -EINVAL;
    }
    if (q->unmap && !q->zero) {
        printf("-u requires -z to be specified\n");
        return -EINVAL;
    }
    if (q->zero + (q->pattern >= 0) + (q->pattern_file != NULL) > 1) {
        printf("Only one of -z, -P, and -s can be specified at the same time\n");
        return -EINVAL;
    }
    return 0;
}

static int fill_from_file(uint8_t *buf, uint64_t len, const char *path)
{
    FILE *file = fopen(path, "re");

    if (!file) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -EINVAL;
    }
    size_t n = fread(buf, 1, len, file);
    int failed = ferror(file);
    fclose(file);
    if (n == 0 || failed) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", path, failed ? "cannot be read" : "file is empty");
        return -EINVAL;
    }
    for (uint64_t i = n; i < len; i++)
        buf[i] = buf[i - n];
    return 0;
}

/* What is to be written; NULL with *r = 0 for zeros. */
static uint8_t *make_data(struct io *io, const struct request *q, int *r)
{
    uint8_t *buf;

    *r = 0;
    if (q->zero)
        return NULL;
    buf = malloc(q->len + 1);
    if (!buf) {
        cli_error(io->cli, "no memory for %" PRIu64 " bytes", q->len);
        *r = -ENOMEM;
    } else if (q->pattern_file && q->len) {
        *r = fill_from_file(buf, q->len, q->pattern_file);
    } else {
        memset(buf, q->pattern >= 0 ? q->pattern : DEFAULT_PATTERN, q->len);
    }
    return buf;
}

static int do_write(struct io *io, struct request *q, const char *name)
{
    struct dr_error err = DR_ERROR_INIT;
    unsigned flags = q->fua || io->writethrough ? DR_FUA : 0;
    struct timespec start;
    int r;
    CLEANUP_FREE uint8_t *buf = make_data(io, q, &r);

    if (r < 0)
        return r;
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (q->vmstate || (q->compressed && !q->zero))
        r = -ENOTSUP;
    else if (!dr_inside(q->off, q->len, dr_size(io->disk)))
        r = outside(io, q->off, q->len, &err);
    else if (q->zero)
        r = dr_zero(io->disk, q->off, q->len, flags | (q->unmap ? DR_MAY_UNMAP : 0), &err);
    else
        r = dr_pwrite(io->disk, buf, q->off, q->len, flags, &err);
    if (r < 0)
        return io_failed(io, name, r, &err);
    report(q, &start);
    return 0;
}

int io_write(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct request q;
    int r = parse(&q, command, argc, argv, "bcCfnpP:qs:uz", false);

    if (r == 0 && optind != argc - 2)
        return io_wrong(command);
    if (r == 0)
        r = check_write(&q);
    if (r == 0)
        r = get_range(&q, command, argc, argv);
    return r < 0 ? r : do_write(io, &q, "write");
}

int io_writev(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct request q;
    int r = parse(&q, command, argc, argv, "CfqP:", false);

    if (r == 0)
        r = get_vector(&q, command, argc, argv);
    return r < 0 ? r : do_write(io, &q, "writev");
}

int io_aio_write(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct request q;
    int r = parse(&q, command, argc, argv, "CfiP:quz", false);

    if (r == 0 && q.zero && optind != argc - 2) {
        printf("-z supports only a single length parameter\n");
        return -EINVAL;
    }
    if (r == 0 && q.unmap && !q.zero) {
        printf("-u requires -z to be specified\n");
        return -EINVAL;
    }
    if (r == 0 && q.invalid)
        return injected("write");
    if (r == 0)
        r = get_vector(&q, command, argc, argv);
    if (r < 0)
        return r;
    do_write(io, &q, "aio_write");
    return 0;
}

int io_discard(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct dr_error err = DR_ERROR_INIT;
    struct timespec start;
    struct request q;
    int r = parse(&q, command, argc, argv, "Cq", false);

    if (r == 0)
        r = get_range(&q, command, argc, argv);
    if (r < 0)
        return r;
    q.verb = "discard";
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (!dr_inside(q.off, q.len, dr_size(io->disk)))
        r = outside(io, q.off, q.len, &err);
    else
        r = dr_discard(io->disk, q.off, q.len, &err);
    if (r < 0)
        return io_failed(io, "discard", r, &err);
    report(&q, &start);
    return 0;
}
