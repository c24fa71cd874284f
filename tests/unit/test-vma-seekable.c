/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* zstd files with a seek table: read at random, and what is wrong with a table is told. */
#include "place.h"

#include <pthread.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

#include "storage/source.h"
#include "base/bytes.h"
#include "faultfs.h"

#define FRAME 30000u
#define PLAIN 1000001u

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

static void add_u32(struct bytes *b, uint32_t v)
{
    uint8_t raw[4];
    put_le32(raw, v);
    add(b, raw, 4);
}

static struct bytes sample(void)
{
    struct bytes b = {malloc(PLAIN), PLAIN};
    uint64_t x = 0x2545f4914f6cdd1du;
    for (size_t i = 0; i < PLAIN; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        b.p[i] = i % 7 ? (uint8_t)(i >> 10) : (uint8_t)x;
    }
    return b;
}

/* ------------------------------------------------------------------ making one */

struct made {
    struct bytes file;
    size_t table;   /* where the table's entries begin */
    unsigned entry; /* their size */
};

static void add_frame(struct made *m, struct bytes *table, const uint8_t *p, size_t n, bool sums)
{
    uint8_t *buf = malloc(ZSTD_compressBound(n));
    size_t used = ZSTD_compress(buf, ZSTD_compressBound(n), p, n, 1);
    assert_false(ZSTD_isError(used));
    add(&m->file, buf, used);
    add_u32(table, (uint32_t)used);
    add_u32(table, (uint32_t)n);
    if (sums)
        add_u32(table, (uint32_t)XXH64(p, n, 0));
    free(buf);
}

static struct made make(const struct bytes *plain, bool sums)
{
    struct made m = {.entry = sums ? 12 : 8};
    struct bytes table = {0};
    uint32_t n = 0;
    for (size_t at = 0; at < plain->n; at += FRAME, n++) {
        if (at == 3 * FRAME) { /* an empty frame is a frame */
            add_frame(&m, &table, plain->p, 0, sums);
            n++;
        }
        add_frame(&m, &table, plain->p + at, dr_min(FRAME, plain->n - at), sums);
    }
    add_u32(&m.file, 0x184d2a5e);
    add_u32(&m.file, (uint32_t)table.n + 9);
    m.table = m.file.n;
    add(&m.file, table.p, table.n);
    add_u32(&m.file, n);
    add(&m.file, sums ? "\x80" : "\0", 1);
    add_u32(&m.file, 0x8f92eab1);
    free(table.p);
    return m;
}

static void put(struct place *p, const struct bytes *b)
{
    unlink(p->path);
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(f, b->p, 0, b->n, &err));
    dr_file_unref(f);
}

static int open_plain(struct place *p, struct dr_file **plain, struct dr_error *err)
{
    struct dr_file *f = open_ok(p, p->path, 0);
    const char *compression;
    int r = dr_source_plain_file(f, plain, &compression, err);
    assert_string_equal(compression, "zstd");
    dr_file_unref(f); /* the plain one holds it */
    return r;
}

/* ------------------------------------------------------------------ good */

struct reader {
    struct dr_file *file;
    const struct bytes *plain;
    unsigned seed;
    int bad;
};

static void *read_at_random(void *arg)
{
    struct reader *r = arg;
    uint8_t *buf = malloc(100000);
    uint64_t x = 0x9e3779b97f4a7c15u * (r->seed + 1);
    for (int i = 0; i < 60; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        size_t off = x % PLAIN, len = (size_t)dr_min(x >> 40 & 0xffff, PLAIN - off);
        r->bad += dr_file_pread(r->file, buf, off, len, NULL) != 0 ||
                  memcmp(buf, r->plain->p + off, len) != 0;
    }
    free(buf);
    return NULL;
}

static void many_threads_read_at_random(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    for (int sums = 0; sums < 2; sums++) {
        struct made m = make(&plain, sums);
        struct dr_file *f = NULL;
        struct reader readers[4];
        pthread_t threads[4];
        put(p, &m.file);
        assert_ok(open_plain(p, &f, &err));
        assert_int_equal(dr_file_size(f), PLAIN);
        for (unsigned i = 0; i < 4; i++) {
            readers[i] = (struct reader){f, &plain, i, 0};
            pthread_create(&threads[i], NULL, read_at_random, &readers[i]);
        }
        for (unsigned i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            assert_int_equal(readers[i].bad, 0);
        }
        dr_file_unref(f);
        free(m.file.p);
    }
    free(plain.p);
}

static void reads_end_with_the_plain_bytes(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, true);
    struct dr_file *f = NULL;
    uint8_t buf[100];
    size_t got;
    put(p, &m.file);
    assert_ok(open_plain(p, &f, &err));
    assert_ok(dr_file_pread_short(f, buf, PLAIN - 10, 100, &got, &err));
    assert_int_equal(got, 10);
    assert_memory_equal(buf, plain.p + PLAIN - 10, 10);
    assert_ok(dr_file_pread_short(f, buf, PLAIN + 10, 100, &got, &err));
    assert_int_equal(got, 0);
    assert_fails(dr_file_pwrite(f, buf, 0, 10, &err), EBADF, "not open for writing");
    enum dr_file_extent kind;
    uint64_t run;
    assert_ok(dr_file_extent(f, 0, PLAIN, &kind, &run, &err));
    assert_true(kind == DR_FILE_DATA && run == PLAIN);
    dr_file_unref(f);
    free(m.file.p);
    free(plain.p);
}

static void a_source_skips_over_frames_without_reading_them(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, true);
    struct dr_source *s;
    uint8_t buf[1000];
    uint64_t skipped;
    size_t got;
    memset(m.file.p + 4000, 0xaa, 1000); /* in a frame that nobody asks for */
    put(p, &m.file);
    assert_ok(dr_source_open(p->fs, p->path, -1, &s, &err));
    assert_non_null(dr_source_file(s));
    assert_ok(dr_source_skip(s, 10 * FRAME - 500, &skipped, &err));
    assert_ok(dr_source_read(s, buf, 1000, &got, &err));
    assert_memory_equal(buf, plain.p + 10 * FRAME - 500, 1000);
    assert_ok(dr_source_skip(s, PLAIN, &skipped, &err));
    assert_int_equal(skipped, PLAIN - 10 * FRAME - 500);
    dr_source_close(s);
    free(m.file.p);
    free(plain.p);
}

static int count(void *user, const struct faultfs_io *io)
{
    *(unsigned *)user += io->kind == FAULTFS_READ;
    return 0;
}

/* As many readers as frames are kept, each in a frame of its own: one that goes on to its next
 * frame takes the place of the one it is done with, and not of another reader's. */
static void readers_do_not_take_each_others_frames(void **state)
{
    enum { READERS = 16, HALF = FRAME / 2 };
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, true);
    struct faultfs *fault = faultfs_new(p->fs);
    struct dr_file *f = NULL;
    uint8_t buf[HALF];
    const char *compression;
    unsigned reads = 0;
    put(p, &m.file);
    struct dr_file *file = open_on(faultfs_fs(fault), p->path, 0);
    assert_ok(dr_source_plain_file(file, &f, &compression, &err));
    faultfs_observe(fault, count, &reads);
    for (unsigned i = 0; i < READERS; i++)
        assert_ok(dr_file_pread(f, buf, i * FRAME, HALF, &err));
    assert_int_equal(reads, READERS);
    for (unsigned i = 0; i < READERS; i++) {
        assert_ok(dr_file_pread(f, buf, i * FRAME + HALF, HALF, &err));
        assert_memory_equal(buf, plain.p + i * FRAME + HALF, HALF);
        assert_ok(dr_file_pread(f, buf, (READERS + i) * FRAME, HALF, &err));
        assert_memory_equal(buf, plain.p + (READERS + i) * FRAME, HALF);
    }
    assert_int_equal(reads, 2 * READERS);
    dr_file_unref(f);
    dr_file_unref(file);
    faultfs_free(fault);
    free(m.file.p);
    free(plain.p);
}

/* An extent is two frames: 8 TiB of data are more than four million. */
static void a_table_may_list_millions_of_frames(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample(), table = {0}, foot = {0};
    struct made m = {.entry = 8};
    const uint32_t n = 5000000; /* all but the first are empty: holes of the file */
    struct dr_file *f = NULL;
    uint8_t buf[FRAME];
    add_frame(&m, &table, plain.p, FRAME, false);
    add_u32(&m.file, 0x184d2a5e);
    add_u32(&m.file, n * 8 + 9);
    add(&m.file, table.p, table.n);
    add_u32(&foot, n);
    add(&foot, "\0", 1);
    add_u32(&foot, 0x8f92eab1);
    put(p, &m.file);
    struct dr_file *file = open_ok(p, p->path, DR_FILE_RDWR);
    uint64_t end = m.file.n + (n - 1) * 8ull;
    assert_ok(dr_file_truncate(file, end, &err));
    assert_ok(dr_file_pwrite(file, foot.p, end, foot.n, &err));
    dr_file_unref(file);
    assert_ok(open_plain(p, &f, &err));
    assert_int_equal(dr_file_size(f), FRAME);
    assert_ok(dr_file_pread(f, buf, 0, FRAME, &err));
    assert_memory_equal(buf, plain.p, FRAME);
    dr_file_unref(f);
    free(foot.p);
    free(table.p);
    free(m.file.p);
    free(plain.p);
}

/* ------------------------------------------------------------------ bad */

/* A file as m says, opened for reading at random; the stream of a file with a bad table is read
 * all the same. */
static void assert_refused(struct place *p, const struct made *m, int errnum, const char *words)
{
    struct dr_file *f = NULL;
    struct dr_source *s;
    uint8_t buf[1000];
    size_t got;
    put(p, &m->file);
    assert_fails(open_plain(p, &f, &err), errnum, words);
    assert_null(f);
    assert_ok(dr_source_open(p->fs, p->path, -1, &s, &err));
    assert_null(dr_source_file(s));
    assert_ok(dr_source_read(s, buf, 1000, &got, &err));
    assert_int_equal(got, 1000);
    dr_source_close(s);
}

static void a_bad_table_is_refused(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, true);
    uint8_t *foot = m.file.p + m.file.n - 9, *entry = m.file.p + m.table;
    uint32_t n = get_le32(foot);

    put_le32(foot, n + 1);
    assert_refused(p, &m, EBADMSG, "does not begin where it should");
    put_le32(foot, 0xffffffff);
    assert_refused(p, &m, EBADMSG, "more frames than there can be");
    put_le32(foot, n);
    foot[4] = 0;
    assert_refused(p, &m, EBADMSG, "does not begin where it should");
    foot[4] = 0x84;
    assert_refused(p, &m, EBADMSG, "bits of a version");
    foot[4] = 0x80;
    put_le32(entry, get_le32(entry) + 1);
    assert_refused(p, &m, EBADMSG, "do not make up the file");
    put_le32(entry, get_le32(entry) - 1);
    put_le32(entry + 4, 0x7fffffff);
    assert_refused(p, &m, EBADMSG, "too large");
    put_le32(entry + 4, FRAME);
    free(m.file.p);
    free(plain.p);
}

static void frames_that_tell_their_sizes_need_no_table(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, false);
    struct dr_file *f;
    uint8_t buf[1000];
    m.file.p[m.file.n - 1] ^= 1; /* no table, but a frame that is to be skipped */
    put(p, &m.file);
    assert_ok(open_plain(p, &f, &err));
    assert_int_equal(dr_file_size(f), PLAIN);
    for (uint64_t off = PLAIN - 1000; off > 70000; off -= 70000) {
        assert_ok(dr_file_pread(f, buf, off, sizeof(buf), &err));
        assert_memory_equal(buf, plain.p + off, sizeof(buf));
    }
    dr_file_unref(f);
    free(m.file.p);
    free(plain.p);
}

static void a_table_that_lies_about_a_frame_is_found(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    uint8_t buf[100];
    for (int lie = 0; lie < 3; lie++) {
        struct made m = make(&plain, true);
        uint8_t *second = m.file.p + m.table + m.entry;
        struct dr_file *f = NULL;
        if (lie == 0)
            put_le32(second + 4, FRAME + 1);
        else if (lie == 1)
            put_le32(second + 4, FRAME - 1);
        else
            put_le32(second + 8, get_le32(second + 8) ^ 1);
        put(p, &m.file);
        if (lie < 2) { /* what is behind that frame would be displaced */
            assert_fails(open_plain(p, &f, &err), EBADMSG, "another length for a frame");
            free(m.file.p);
            continue;
        }
        assert_ok(open_plain(p, &f, &err));
        assert_ok(dr_file_pread(f, buf, 100, 100, &err));
        assert_fails(dr_file_pread(f, buf, FRAME + 100, 100, &err), EBADMSG, p->path);
        assert_fails(dr_file_pread(f, buf, FRAME + 100, 100, &err), EBADMSG, p->path);
        dr_file_unref(f);
        free(m.file.p);
    }
    free(plain.p);
}

static void damage_in_one_frame_spares_the_others(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, false);
    struct dr_file *f = NULL;
    uint8_t buf[100];
    uint32_t first = get_le32(m.file.p + m.table);
    m.file.p[first + 2] ^= 1; /* the second one's magic number */
    put(p, &m.file);
    assert_ok(open_plain(p, &f, &err));
    assert_fails(dr_file_pread(f, buf, FRAME + 10, 100, &err), EBADMSG, "cannot read 100 bytes");
    assert_ok(dr_file_pread(f, buf, FRAME - 100, 100, &err));
    assert_ok(dr_file_pread(f, buf, 2 * FRAME, 100, &err));
    assert_memory_equal(buf, plain.p + 2 * FRAME, 100);
    dr_file_unref(f);
    free(m.file.p);
    free(plain.p);
}

/* No byte of the table, changed, makes other bytes come out. */
static void no_changed_byte_of_a_table_goes_unseen(void **state)
{
    struct place *p = *state;
    struct bytes plain = sample();
    struct made m = make(&plain, true);
    uint8_t *buf = malloc(PLAIN);
    for (size_t at = m.table - 8; at < m.file.n; at += at < m.file.n - 30 ? 5 : 1) {
        struct dr_file *f = NULL;
        m.file.p[at] ^= 0x41;
        put(p, &m.file);
        if (open_plain(p, &f, NULL) == 0) {
            bool ok = dr_file_size(f) <= PLAIN &&
                      dr_file_pread(f, buf, 0, (size_t)dr_file_size(f), NULL) == 0;
            assert_true(!ok || memcmp(buf, plain.p, (size_t)dr_file_size(f)) == 0);
            assert_true(!ok || dr_file_size(f) == PLAIN);
        }
        dr_file_unref(f);
        m.file.p[at] ^= 0x41;
    }
    free(buf);
    free(m.file.p);
    free(plain.p);
}

int main(void)
{
#define POSIX(f) cmocka_unit_test_setup_teardown(f, setup_posix, teardown_posix)
    const struct CMUnitTest tests[] = {
        POSIX(many_threads_read_at_random),
        POSIX(reads_end_with_the_plain_bytes),
        POSIX(a_source_skips_over_frames_without_reading_them),
        POSIX(readers_do_not_take_each_others_frames),
        POSIX(a_table_may_list_millions_of_frames),
        POSIX(a_bad_table_is_refused),
        POSIX(frames_that_tell_their_sizes_need_no_table),
        POSIX(a_table_that_lies_about_a_frame_is_found),
        POSIX(damage_in_one_frame_spares_the_others),
        POSIX(no_changed_byte_of_a_table_goes_unseen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
