/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sources of archives: the same bytes come out of every kind of container, and damage is told. */
#include "place.h"

#include <sys/ioctl.h>
#include <bzlib.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <lzo/lzo1x.h>
#include <poll.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include "storage/source.h"
#include "base/bytes.h"

/* ------------------------------------------------------------------ a pipe that stays empty */

/* Stands for the C library's function while a test wants it: each call waits in vain for its whole
 * time, and the last one that the test wants comes with a stop. */
static int waits_until_stop;
static volatile int stop_now;

int poll(struct pollfd *fds, nfds_t n, int ms)
{
    if (waits_until_stop == 0) {
        const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
        return ppoll(fds, n, ms < 0 ? NULL : &time, NULL);
    }
    stop_now = --waits_until_stop == 0;
    return 0;
}

/* ------------------------------------------------------------------ bzip2 without memory */

/* Stands for the library's function, which allocates: the call with this number, from now on, gets
 * no memory; 0: all get some. */
static int init_that_fails;

__attribute__((visibility("default"))) int BZ2_bzDecompressInit(bz_stream *b, int verbosity,
                                                                int small)
{
    if (init_that_fails > 0 && --init_that_fails == 0)
        return BZ_MEM_ERROR;
    void *real = dlsym(RTLD_NEXT, "BZ2_bzDecompressInit");
    int (*init)(bz_stream *, int, int);
    memcpy(&init, &real, sizeof(init));
    return init(b, verbosity, small);
}

/* ------------------------------------------------------------------ bytes and containers */

struct bytes {
    uint8_t *p;
    size_t n;
};

static void add(struct bytes *b, const void *p, size_t n)
{
    b->p = realloc(b->p, b->n + n);
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

/* Half noise, half the same: neither all stored nor all shrunk. */
static struct bytes sample(size_t n)
{
    struct bytes b = {malloc(n), n};
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        b.p[i] = (i >> 12) % 2 ? (uint8_t)x : (uint8_t)(i >> 14);
    }
    return b;
}

static void put(struct place *p, const char *path, const void *bytes, size_t n)
{
    unlink(path);
    struct dr_file *f = open_ok(p, path, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(f, bytes, 0, n, &err));
    dr_file_unref(f);
}

static void zstd_frame(struct bytes *out, const uint8_t *p, size_t n)
{
    size_t room = ZSTD_compressBound(n);
    uint8_t *buf = malloc(room);
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 1);
    size_t used = ZSTD_compress2(c, buf, room, p, n);
    assert_false(ZSTD_isError(used));
    add(out, buf, used);
    ZSTD_freeCCtx(c);
    free(buf);
}

static struct bytes zstd_pack(const struct bytes *plain)
{
    static const uint8_t skip[12] = {0x53, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4};
    struct bytes out = {0};
    add(&out, skip, sizeof(skip));
    zstd_frame(&out, plain->p, plain->n / 3);
    zstd_frame(&out, plain->p, 0);
    add(&out, skip, sizeof(skip));
    zstd_frame(&out, plain->p + plain->n / 3, plain->n - plain->n / 3);
    return out;
}

static void gzip_member(struct bytes *out, uint8_t *p, size_t n)
{
    uint8_t *buf = malloc(n + 1000);
    z_stream z = {.next_in = p, .avail_in = (uInt)n, .next_out = buf, .avail_out = (uInt)n + 1000};
    assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    add(out, buf, n + 1000 - z.avail_out);
    deflateEnd(&z);
    free(buf);
}

static struct bytes gzip_pack(const struct bytes *plain)
{
    struct bytes out = {0};
    gzip_member(&out, plain->p, plain->n / 3);
    gzip_member(&out, plain->p, 0);
    gzip_member(&out, plain->p + plain->n / 3, plain->n - plain->n / 3);
    return out;
}

static void bzip2_stream(struct bytes *out, uint8_t *p, size_t n)
{
    unsigned room = (unsigned)(n + n / 100 + 1000);
    char *buf = malloc(room);
    assert_int_equal(BZ2_bzBuffToBuffCompress(buf, &room, (char *)p, (unsigned)n, 1, 0, 0), BZ_OK);
    add(out, buf, room);
    free(buf);
}

static struct bytes bzip2_pack(const struct bytes *plain)
{
    struct bytes out = {0};
    bzip2_stream(&out, plain->p, plain->n / 3);
    bzip2_stream(&out, plain->p + plain->n / 3, plain->n - plain->n / 3);
    return out;
}

static void add_u32(struct bytes *b, uint32_t v)
{
    uint8_t raw[4];
    put_be32(raw, v);
    add(b, raw, 4);
}

#define LZOP_MAGIC "\x89LZO\0\r\n\x1a\n"
#define LZOP_BLOCK 50000u

static void lzop_block(struct bytes *out, const uint8_t *p, uint32_t n, uint32_t flags)
{
    static uint8_t work[LZO1X_1_MEM_COMPRESS], buf[LZOP_BLOCK * 2];
    lzo_uint used = sizeof(buf);
    assert_int_equal(lzo1x_1_compress(p, n, buf, &used, work), LZO_E_OK);
    bool shrunk = used < n;
    add_u32(out, n);
    add_u32(out, shrunk ? (uint32_t)used : n);
    if (flags & 1)
        add_u32(out, lzo_adler32(1, p, n));
    if (flags & 0x100)
        add_u32(out, lzo_crc32(0, p, n));
    if (shrunk && (flags & 2))
        add_u32(out, lzo_adler32(1, buf, used));
    if (shrunk && (flags & 0x200))
        add_u32(out, lzo_crc32(0, buf, used));
    add(out, shrunk ? buf : p, shrunk ? used : n);
}

/* version 0x1040, needs 0x0940, method 1, level 5, mode, times, no name */
static void lzop_header(struct bytes *out, uint32_t flags)
{
    uint8_t h[25] = {0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 1, 5};
    put_be32(h + 8, flags);
    add(out, LZOP_MAGIC, 9);
    add(out, h, sizeof(h));
    add_u32(out, flags & 0x1000 ? lzo_crc32(0, h, sizeof(h)) : lzo_adler32(1, h, sizeof(h)));
}

static void lzop_file(struct bytes *out, const uint8_t *p, size_t n, uint32_t flags)
{
    lzop_header(out, flags);
    for (size_t at = 0; at < n; at += LZOP_BLOCK)
        lzop_block(out, p + at, (uint32_t)dr_min(LZOP_BLOCK, n - at), flags);
    add_u32(out, 0);
}

static struct bytes lzop_pack(const struct bytes *plain)
{
    struct bytes out = {0};
    lzop_file(&out, plain->p, plain->n / 3, 0x3);
    lzop_file(&out, plain->p + plain->n / 3, plain->n - plain->n / 3, 0x1300);
    return out;
}

static struct bytes plain_pack(const struct bytes *plain)
{
    struct bytes out = {0};
    add(&out, plain->p, plain->n);
    return out;
}

static const struct kind {
    const char *name; /* NULL = plain */
    struct bytes (*pack)(const struct bytes *plain);
} kinds[] = {
    {NULL, plain_pack},  {"zstd", zstd_pack},   {"gzip", gzip_pack},
    {"lzop", lzop_pack}, {"bzip2", bzip2_pack},
};
#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))

/* ------------------------------------------------------------------ helpers */

static struct dr_source *open_source(struct place *p, int fd)
{
    struct dr_source *s;
    assert_ok(dr_source_open(p->fs, p->path, fd, &s, &err));
    return s;
}

/* Reads in odd steps, with a skip in between. */
static void assert_yields(struct dr_source *s, const struct bytes *plain)
{
    uint8_t *buf = malloc(plain->n + 1);
    size_t got, at = 0;
    uint64_t skipped;
    assert_ok(dr_source_read(s, buf, 1000, &got, &err));
    assert_int_equal(got, 1000);
    assert_memory_equal(buf, plain->p, 1000);
    assert_ok(dr_source_skip(s, 150001, &skipped, &err));
    assert_int_equal(skipped, 150001);
    at = 151001;
    assert_int_equal(dr_source_pos(s), at);
    assert_ok(dr_source_read(s, buf, plain->n, &got, &err));
    assert_int_equal(got, plain->n - at);
    assert_memory_equal(buf, plain->p + at, got);
    assert_int_equal(dr_source_pos(s), plain->n);
    assert_ok(dr_source_read(s, buf, 10, &got, &err));
    assert_int_equal(got, 0);
    assert_ok(dr_source_skip(s, 10, &skipped, &err));
    assert_int_equal(skipped, 0);
    free(buf);
}

struct pump {
    int fd;
    const struct bytes *b;
};

/* Small pieces: a decoder must not count on how they fall. */
static void *pump(void *arg)
{
    struct pump *p = arg;
    for (size_t at = 0; at < p->b->n;) {
        ssize_t n = write(p->fd, p->b->p + at, (size_t)dr_min(p->b->n - at, 1777));
        if (n <= 0)
            break;
        at += (size_t)n;
    }
    close(p->fd);
    return NULL;
}

static void assert_same_name(const char *a, const char *b)
{
    assert_true((a && b && strcmp(a, b) == 0) || (!a && !b));
}

/* ------------------------------------------------------------------ good */

static void a_file_yields_its_plain_bytes(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(700001);
    for (size_t k = 0; k < N_KINDS; k++) {
        struct bytes packed = kinds[k].pack(&plain);
        put(p, p->path, packed.p, packed.n);
        struct dr_source *s = open_source(p, -1);
        assert_same_name(dr_source_compression(s), kinds[k].name);
        assert_string_equal(dr_source_name(s), p->path);
        assert_yields(s, &plain);
        dr_source_close(s);
        free(packed.p);
    }
    free(plain.p);
}

static void a_pipe_yields_its_plain_bytes(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(700001);
    for (size_t k = 0; k < N_KINDS; k++) {
        struct bytes packed = kinds[k].pack(&plain);
        int fd[2];
        pthread_t thread;
        assert_int_equal(pipe(fd), 0);
        struct pump job = {fd[1], &packed};
        pthread_create(&thread, NULL, pump, &job);
        struct dr_source *s = open_source(p, fd[0]);
        assert_same_name(dr_source_compression(s), kinds[k].name);
        assert_null(dr_source_file(s));
        assert_yields(s, &plain);
        dr_source_close(s);
        pthread_join(thread, NULL);
        assert_int_equal(close(fd[0]), 0); /* it was not closed by the source */
        free(packed.p);
    }
    free(plain.p);
}

/* Who comes behind on the same pipe finds what was not asked for. */
static void a_plain_pipe_is_not_read_ahead(void **state)
{
    struct place *p = *state;
    int fd[2];
    uint8_t buf[100];
    size_t got;
    assert_int_equal(pipe(fd), 0);
    assert_int_equal(write(fd[1], "0123456789abcdef", 16), 16);
    struct dr_source *s = open_source(p, fd[0]);
    assert_ok(dr_source_read(s, buf, 12, &got, &err));
    assert_int_equal(got, 12);
    assert_memory_equal(buf, "0123456789ab", 12);
    assert_int_equal(read(fd[0], buf, 100), 4);
    assert_memory_equal(buf, "cdef", 4);
    dr_source_close(s);
    close(fd[0]);
    close(fd[1]);
}

/* Unless all that comes is the caller's. */
static void a_plain_pipe_is_read_ahead_where_that_is_asked_for(void **state)
{
    struct place *p = *state;
    int fd[2], left = -1;
    uint8_t buf[100];
    size_t got;
    assert_int_equal(pipe(fd), 0);
    assert_int_equal(write(fd[1], "0123456789abcdef", 16), 16);
    struct dr_source *s = open_source(p, fd[0]);
    dr_source_read_ahead(s);
    assert_ok(dr_source_read(s, buf, 12, &got, &err));
    assert_int_equal(got, 12);
    assert_memory_equal(buf, "0123456789ab", 12);
    assert_int_equal(ioctl(fd[0], FIONREAD, &left), 0);
    assert_int_equal(left, 0);
    assert_int_equal(dr_source_pos(s), 12);
    assert_int_equal(dr_source_stored_pos(s), 12);
    close(fd[1]);
    assert_ok(dr_source_read(s, buf, 100, &got, &err));
    assert_int_equal(got, 4);
    assert_memory_equal(buf, "cdef", 4);
    dr_source_close(s);
    close(fd[0]);
}

/* The signal that asked to stop may have gone to another thread: it interrupts no read. */
static void waiting_for_a_pipe_ends_with_a_stop(void **state)
{
    struct place *p = *state;
    int fd[2];
    uint8_t buf[16];
    size_t got;
    assert_int_equal(pipe(fd), 0);
    assert_int_equal(write(fd[1], "0123456789abcdef", 16), 16);
    struct dr_source *s = open_source(p, fd[0]);
    dr_source_stop_by(s, &stop_now);
    assert_ok(dr_source_read(s, buf, 16, &got, &err));
    assert_int_equal(got, 16);
    waits_until_stop = 5;
    assert_fails(dr_source_read(s, buf, 16, &got, &err), ECANCELED, "stopped on request");
    assert_int_equal(waits_until_stop, 0);
    dr_source_close(s);
    close(fd[0]);
    close(fd[1]);
}

static void a_plain_file_can_be_read_at_random_also_through_a_descriptor(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(100000);
    put(p, p->path, plain.p, plain.n);
    int fd = open(p->path, O_RDONLY);
    uint8_t buf[10];
    for (int i = 0; i < 2; i++) {
        struct dr_source *s = open_source(p, i ? fd : -1);
        struct dr_file *f = dr_source_file(s);
        assert_non_null(f);
        assert_int_equal(dr_file_size(f), plain.n);
        assert_ok(dr_file_pread(f, buf, 99990, 10, &err));
        assert_memory_equal(buf, plain.p + 99990, 10);
        dr_source_close(s);
    }
    assert_int_equal(lseek(fd, 0, SEEK_CUR), 0);
    /* Not at its start: what stands before is not ours. */
    assert_int_equal(lseek(fd, 50000, SEEK_SET), 50000);
    struct dr_source *s = open_source(p, fd);
    size_t got;
    assert_null(dr_source_file(s));
    assert_ok(dr_source_read(s, buf, 10, &got, &err));
    assert_memory_equal(buf, plain.p + 50000, 10);
    dr_source_close(s);
    close(fd);
    free(plain.p);
}

static void short_and_empty_files_are_plain(void **state)
{
    struct place *p = *state;
    uint8_t buf[10];
    size_t got;
    for (size_t n = 0; n < 4; n++) {
        put(p, p->path, "\x28\xb5\x2f", n);
        struct dr_source *s = open_source(p, -1);
        assert_null(dr_source_compression(s));
        assert_ok(dr_source_read(s, buf, 10, &got, &err));
        assert_int_equal(got, n);
        dr_source_close(s);
    }
}

static void directories_and_missing_files_are_refused(void **state)
{
    struct place *p = *state;
    struct dr_source *s;
    assert_fails(dr_source_open(p->fs, p->dir, -1, &s, &err), EISDIR, "is a directory");
    assert_fails(dr_source_open(p->fs, p->path, -1, &s, &err), ENOENT, p->path);
    assert_fails(dr_source_open(p->fs, p->path, 12345, &s, &err), EBADF, p->path);
}

/* ------------------------------------------------------------------ bad */

/* Everything there is, or the failure. */
static int read_all_of(struct place *p, int fd, struct bytes *out, struct dr_error *err)
{
    uint8_t *buf = malloc(5000);
    struct dr_source *s;
    size_t got = 1;
    int r = dr_source_open(p->fs, p->path, fd, &s, err);
    if (r < 0) {
        free(buf);
        return r;
    }
    while (r == 0 && got > 0) {
        r = dr_source_read(s, buf, 5000, &got, err);
        add(out, buf, got);
    }
    if (r < 0) /* it fails again, the same way */
        assert_int_equal(dr_source_read(s, buf, 1, &got, NULL), r);
    dr_source_close(s);
    free(buf);
    return r;
}

static int read_all(struct place *p, struct bytes *out, struct dr_error *err)
{
    return read_all_of(p, -1, out, err);
}

static void cut_after(struct place *p, size_t kind, const struct bytes *plain, size_t step)
{
    struct bytes packed = kinds[kind].pack(plain);
    for (size_t n = 10; n < packed.n; n += step) {
        struct bytes out = {0};
        struct dr_error err = DR_ERROR_INIT;
        put(p, p->path, packed.p, n);
        int r = read_all(p, &out, &err);
        if (r < 0 && (r != -EBADMSG || !strstr(err.text, "ends at")))
            fail_msg("%s cut at %zu: %s", kinds[kind].name, n, err.text);
        if (r == 0) /* at a boundary of members */
            assert_true(out.n < plain->n);
        assert_true(out.n <= plain->n && memcmp(out.p ? out.p : plain->p, plain->p, out.n) == 0);
        free(out.p);
    }
    free(packed.p);
}

static void every_truncation_is_told_or_harmless(void **state)
{
    struct bytes little = sample(300), plain = sample(30000);
    for (size_t k = 1; k < N_KINDS; k++) {
        cut_after(*state, k, &little, 1);
        cut_after(*state, k, &plain, 97);
    }
    free(little.p);
    free(plain.p);
}

/* A pipe that has no more bytes now fails so when nobody may wait. That is no damage. */
static void a_read_that_fails_is_told_wherever_it_does(void **state)
{
    struct bytes plain = sample(300);
    for (size_t k = 1; k < N_KINDS; k++) {
        struct bytes packed = kinds[k].pack(&plain);
        for (size_t n = 0; n < packed.n; n++) {
            struct bytes out = {0};
            struct dr_error err = DR_ERROR_INIT;
            int fd[2];
            char where[64];
            assert_int_equal(pipe2(fd, O_NONBLOCK | O_CLOEXEC), 0);
            assert_int_equal(write(fd[1], packed.p, n), n);
            int r = read_all_of(*state, fd[0], &out, &err);
            snprintf(where, sizeof(where), "cannot read at offset %zu", n);
            if (r != -EAGAIN || !strstr(err.text, where))
                fail_msg("%s, %zu bytes: %d %s", kinds[k].name, n, r, err.text);
            assert_true(out.n <= plain.n && memcmp(out.p ? out.p : plain.p, plain.p, out.n) == 0);
            close(fd[0]);
            close(fd[1]);
            free(out.p);
        }
        free(packed.p);
    }
    free(plain.p);
}

static void no_flipped_bit_goes_unseen(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(30000);
    for (size_t k = 1; k < N_KINDS; k++) {
        struct bytes packed = kinds[k].pack(&plain);
        size_t told = 0;
        for (size_t at = 20; at < packed.n; at += 101) {
            struct bytes out = {0};
            struct dr_error err = DR_ERROR_INIT;
            packed.p[at] ^= 0x10;
            put(p, p->path, packed.p, packed.n);
            int r = read_all(p, &out, &err);
            packed.p[at] ^= 0x10;
            if (r == 0 && (out.n != plain.n || memcmp(out.p, plain.p, out.n) != 0))
                fail_msg("%s: bit at %zu changed the bytes unseen", kinds[k].name, at);
            if (r < 0 && r != -EBADMSG)
                fail_msg("%s: bit at %zu: %s", kinds[k].name, at, err.text);
            told += r < 0;
            free(out.p);
        }
        assert_true(told > 20);
        free(packed.p);
    }
    free(plain.p);
}

/* Each of the two streams needs some, and the bytes of the first one are not all there is. */
static void a_lack_of_memory_for_bzip2_is_told(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(30000), packed = bzip2_pack(&plain);
    struct bytes out = {0};
    struct dr_source *s;
    put(p, p->path, packed.p, packed.n);
    init_that_fails = 1;
    assert_fails(dr_source_open(p->fs, p->path, -1, &s, &err), ENOMEM, "out of memory");
    init_that_fails = 2;
    assert_fails(read_all(p, &out, &err), ENOMEM, "out of memory");
    assert_true(out.n < plain.n);
    free(out.p);
    free(packed.p);
    free(plain.p);
}

/* ------------------------------------------------------------------ other programs' */

static void what_the_programs_compress_is_read(void **state)
{
    static const char *const programs[] = {"zstd", "gzip", "lzop", "bzip2"};
    struct place *p = *state;
    struct bytes plain = sample(700001);
    unsigned tried = 0;
    put(p, p->other, plain.p, plain.n);
    for (size_t i = 0; i < 4; i++) {
        char cmd[400];
        snprintf(cmd, sizeof(cmd), "%s -c <%s >%s 2>/dev/null", programs[i], p->other, p->path);
        if (system(cmd) != 0) {
            print_message("%s is not installed\n", programs[i]);
            continue;
        }
        struct dr_source *s = open_source(p, -1);
        assert_string_equal(dr_source_compression(s), programs[i]);
        assert_yields(s, &plain);
        dr_source_close(s);
        tried++;
    }
    free(plain.p);
    if (tried == 0)
        skip();
}

/* ------------------------------------------------------------------ lzop, gzip: their own traps */

static void assert_told(struct place *p, const struct bytes *packed, int errnum, const char *words)
{
    struct bytes out = {0};
    put(p, p->path, packed->p, packed->n);
    assert_fails(read_all(p, &out, &err), errnum, words);
    free(out.p);
}

static void lzop_blocks_of_absurd_sizes_are_refused(void **state)
{
    static const struct {
        uint32_t plain, coded;
    } sizes[] = {{0x7fffffff, 100}, {(64u << 20) + 1, 100}, {100, 101}, {100, 0}};
    struct place *p = *state;
    for (size_t i = 0; i < 4; i++) {
        struct bytes b = {0};
        uint8_t junk[400] = {1};
        lzop_header(&b, 3);
        add_u32(&b, sizes[i].plain);
        add_u32(&b, sizes[i].coded);
        add(&b, junk, sizeof(junk));
        assert_told(p, &b, EBADMSG, "impossible size");
        free(b.p);
    }
}

static void lzop_filters_methods_and_versions_of_the_future_are_refused(void **state)
{
    struct place *p = *state;
    struct bytes b = {0};
    lzop_header(&b, 0x800);
    assert_told(p, &b, ENOTSUP, "filters");
    b.p[9 + 6] = 128;
    assert_told(p, &b, ENOTSUP, "method 128");
    b.p[9 + 4] = 0x20;
    assert_told(p, &b, ENOTSUP, "newer version");
    free(b.p);
}

/* Also those of the piece in which the damage is, when read and when passed over. */
static void what_stands_in_front_of_damage_comes_out(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(200000), out = {0}, packed = lzop_pack(&plain);
    struct dr_error why = DR_ERROR_INIT;
    struct dr_source *s;
    uint64_t skipped;
    packed.p[packed.n - 10] ^= 1; /* in the last block */
    put(p, p->path, packed.p, packed.n);
    assert_int_equal(read_all(p, &out, &why), -EBADMSG);
    size_t last = (plain.n - plain.n / 3) % LZOP_BLOCK;
    assert_int_equal(out.n, plain.n - last);
    assert_memory_equal(out.p, plain.p, out.n);
    s = open_source(p, -1);
    assert_fails(dr_source_skip(s, plain.n, &skipped, &err), EBADMSG, "checksum");
    assert_int_equal(skipped, plain.n - last);
    assert_int_equal(dr_source_pos(s), skipped);
    dr_source_close(s);
    free(out.p);
    free(packed.p);
    free(plain.p);
}

static void a_zstd_window_without_bounds_is_refused(void **state)
{
    /* magic, no flags, a window of 2 GiB, one stored block of a byte */
    struct bytes b = {(uint8_t[]){0x28, 0xb5, 0x2f, 0xfd, 0, 0xa8, 9, 0, 0, 'x'}, 10};
    assert_told(*state, &b, ENOTSUP, "more than 128 MiB");
}

static void zeros_may_follow_gzip_data_and_nothing_else(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(1000), out = {0}, packed = gzip_pack(&plain);
    uint8_t tail[3000] = {0};
    struct dr_error err = DR_ERROR_INIT;
    add(&packed, tail, sizeof(tail));
    put(p, p->path, packed.p, packed.n);
    assert_int_equal(read_all(p, &out, &err), 0);
    assert_int_equal(out.n, plain.n);
    packed.p[packed.n - 1] = 7;
    assert_told(p, &packed, EBADMSG, "neither gzip data nor zeros");
    free(out.p);
    free(packed.p);
    free(plain.p);
}

int main(void)
{
    assert_int_equal(lzo_init(), LZO_E_OK);
#define POSIX(f) cmocka_unit_test_setup_teardown(f, setup_posix, teardown_posix)
    const struct CMUnitTest tests[] = {
        POSIX(a_file_yields_its_plain_bytes),
        POSIX(a_pipe_yields_its_plain_bytes),
        POSIX(a_plain_pipe_is_not_read_ahead),
        POSIX(a_plain_pipe_is_read_ahead_where_that_is_asked_for),
        POSIX(waiting_for_a_pipe_ends_with_a_stop),
        POSIX(a_plain_file_can_be_read_at_random_also_through_a_descriptor),
        POSIX(short_and_empty_files_are_plain),
        POSIX(directories_and_missing_files_are_refused),
        POSIX(every_truncation_is_told_or_harmless),
        POSIX(a_read_that_fails_is_told_wherever_it_does),
        POSIX(no_flipped_bit_goes_unseen),
        POSIX(a_lack_of_memory_for_bzip2_is_told),
        POSIX(what_the_programs_compress_is_read),
        POSIX(lzop_blocks_of_absurd_sizes_are_refused),
        POSIX(lzop_filters_methods_and_versions_of_the_future_are_refused),
        POSIX(what_stands_in_front_of_damage_comes_out),
        POSIX(a_zstd_window_without_bounds_is_refused),
        POSIX(zeros_may_follow_gzip_data_and_nothing_else),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
