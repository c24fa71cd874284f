/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sources of archives: the same bytes come out of every kind of container, and damage is told. */
#include "place.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>
#include <zstd.h>

#include "archive/source.h"
#include "base/bytes.h"

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
    {NULL, plain_pack},
    {"zstd", zstd_pack},
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
static int read_all(struct place *p, struct bytes *out, struct dr_error *err)
{
    uint8_t *buf = malloc(5000);
    struct dr_source *s;
    size_t got = 1;
    int r = dr_source_open(p->fs, p->path, -1, &s, err);
    while (r == 0 && got > 0) {
        r = dr_source_read(s, buf, 5000, &got, err);
        if (r == 0)
            add(out, buf, got);
    }
    if (r < 0) /* it fails again, the same way */
        assert_int_equal(dr_source_read(s, buf, 1, &got, NULL), r);
    dr_source_close(s);
    free(buf);
    return r;
}

static void every_truncation_is_told_or_harmless(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(30000);
    for (size_t k = 1; k < N_KINDS; k++) {
        struct bytes packed = kinds[k].pack(&plain);
        for (size_t n = SIZE_MAX; n != packed.n; n = n < packed.n - 200 ? n + 97 : n + 1) {
            size_t len = n == SIZE_MAX ? 10 : n;
            struct bytes out = {0};
            struct dr_error err = DR_ERROR_INIT;
            put(p, p->path, packed.p, len);
            int r = read_all(p, &out, &err);
            n = n == SIZE_MAX ? 10 : n;
            if (r < 0 && (r != -EBADMSG || !strstr(err.text, "ends at")))
                fail_msg("%s cut at %zu: %s", kinds[k].name, len, err.text);
            if (r == 0) /* at a boundary of members */
                assert_true(out.n < plain.n);
            assert_true(out.n <= plain.n && memcmp(out.p ? out.p : plain.p, plain.p, out.n) == 0);
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

int main(void)
{
#define POSIX(f) cmocka_unit_test_setup_teardown(f, setup_posix, teardown_posix)
    const struct CMUnitTest tests[] = {
        POSIX(a_file_yields_its_plain_bytes),
        POSIX(a_pipe_yields_its_plain_bytes),
        POSIX(a_plain_pipe_is_not_read_ahead),
        POSIX(a_plain_file_can_be_read_at_random_also_through_a_descriptor),
        POSIX(short_and_empty_files_are_plain),
        POSIX(directories_and_missing_files_are_refused),
        POSIX(every_truncation_is_told_or_harmless),
        POSIX(no_flipped_bit_goes_unseen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
