/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing add-cow: what goes to disk in which order, what is punched when, another size, another
 * parent. */
#include <pthread.h>
#include <stdio.h>
#include <time.h>

#include "faultfs.h"
#include "formats/addcow/addcow.h"
#include "test-addcow.h"

/* ------------------------------------------------------------------ what I/O happens */

#define MAX_STEPS 64

struct steps {
    struct faultfs_io io[MAX_STEPS];
    bool raw[MAX_STEPS];
    unsigned n;
};

static int note(void *user, const struct faultfs_io *io)
{
    struct steps *s = user;
    unsigned kinds = 1u << FAULTFS_WRITE | 1u << FAULTFS_ZERO | 1u << FAULTFS_FLUSH |
                     1u << FAULTFS_TRUNCATE | 1u << FAULTFS_COPY;
    if (!(kinds & 1u << io->kind) || s->n == MAX_STEPS)
        return 0;
    s->raw[s->n] = strstr(io->path, ".raw") != NULL;
    s->io[s->n++] = *io;
    return 0;
}

/* As text: "Wr" a write to the raw file, "Zr" zeros there, "Fr" its flush, "Wm" metadata ... */
static const char *steps_text(const struct steps *s, char *text, size_t room)
{
    size_t at = 0;
    text[0] = 0;
    for (unsigned i = 0; i < s->n && at + 4 < room; i++) {
        enum faultfs_kind k = s->io[i].kind;
        char c = k == FAULTFS_WRITE      ? 'W'
                 : k == FAULTFS_ZERO     ? 'Z'
                 : k == FAULTFS_FLUSH    ? 'F'
                 : k == FAULTFS_TRUNCATE ? 'T'
                                         : 'C';
        at += (size_t)snprintf(text + at, room - at, "%s%c%c", i ? " " : "", c,
                               s->raw[i] ? 'r' : 'm');
    }
    return text;
}

struct rig {
    struct dr_fs *mem;
    struct faultfs *fault;
    struct dr_disk *disk;
    struct steps steps;
};

static int rig_up(void **state)
{
    struct rig *g = calloc(1, sizeof(*g));
    g->mem = dr_fs_memory_new();
    g->fault = faultfs_new(g->mem);
    *state = g;
    return 0;
}

static void rig_close(struct rig *g)
{
    ok(dr_close(g->disk, &err));
    g->disk = NULL;
}

static int rig_down(void **state)
{
    struct rig *g = *state;
    dr_close(g->disk, NULL);
    faultfs_free(g->fault);
    dr_fs_memory_free(g->mem);
    free(g);
    return 0;
}

/* d.add-cow over base, which is full of 0xbb. */
static void rig_open(struct rig *g, uint64_t size, uint64_t base_size)
{
    put_pattern(g->mem, "base", base_size, 0xbb);
    if (!exists(g->mem, "d.add-cow"))
        ok(create_at(g->mem, "d.add-cow", size, "base", "raw", NULL, NULL, &err));
    ok(open_flags(faultfs_fs(g->fault), "d.add-cow", DR_OPEN_RDWR, &g->disk, &err));
    faultfs_observe(g->fault, note, &g->steps);
    g->steps.n = 0;
}

static void did(struct rig *g, const char *want)
{
    char text[256];
    if (strcmp(steps_text(&g->steps, text, sizeof(text)), want) != 0)
        fail_msg("\"%s\", not \"%s\"", text, want);
    g->steps.n = 0;
}

static struct dr_chain *chain_of(struct rig *g)
{
    return g->disk->chain;
}

/* ------------------------------------------------------------------ writes */

static void bits_follow_the_data(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    write_at(g->disk, 4096, 4096, 1);
    did(g, "Wr");
    ok(dr_flush(g->disk, &err));
    did(g, "Fr Wm Fm");
    ok(dr_flush(g->disk, &err));
    did(g, "");
    write_at(g->disk, 4096, 512, 2); /* in place: no metadata */
    ok(dr_flush(g->disk, &err));
    did(g, "Wr Fr");
    rig_close(g);
    assert_false(bit_in_file(g->mem, "d.add-cow", 7));
    assert_true(bit_in_file(g->mem, "d.add-cow", 8) && bit_in_file(g->mem, "d.add-cow", 15));
    assert_false(bit_in_file(g->mem, "d.add-cow", 16));
}

/* Part of a bitmap would be taken for that of a draft. */
static void an_empty_bitmap_gets_its_full_length_first(void **state)
{
    struct rig *g = *state;
    put_sparse(g->mem, "d.raw", 64 * MiB);
    put_v7(g->mem, "d.add-cow", "base", "d.raw", "", 0);
    rig_open(g, 64 * MiB, MiB);
    write_at(g->disk, 0, 512, 1);
    did(g, "Tm Fm Wr");
    rig_close(g);
    assert_int_equal(file_len(g->mem, "d.add-cow"), V7_HEADER + 64 * MiB / 4096);
    ok(open_flags(g->mem, "d.add-cow", 0, &g->disk, &err));
    reads(g->disk, 0, 512, 1);
}

/* One bit a sector must not mean one system call a sector. */
static void a_large_write_is_one_call(void **state)
{
    struct rig *g = *state;
    rig_open(g, 40 * MiB, MiB);
    write_at(g->disk, 512 * 3, 35 * MiB, 1);
    did(g, "Wr");
    reads(g->disk, 0, 3 * 512, 0xbb);
    reads(g->disk, 512 * 3, 35 * MiB, 1);
    reads(g->disk, 512 * 3 + 35 * MiB, 4096, 0);
    rig_close(g);
}

static void part_of_a_sector_brings_the_rest_along(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    write_at(g->disk, 1000, 3000, 1); /* 1000..3999: sectors 1 to 7 */
    did(g, "Wr");
    reads(g->disk, 0, 1000, 0xbb);
    reads(g->disk, 1000, 3000, 1);
    reads(g->disk, 4000, 10000, 0xbb);
    rig_close(g);
    assert_false(bit_in_file(g->mem, "d.add-cow", 0));
    assert_true(bit_in_file(g->mem, "d.add-cow", 1) && bit_in_file(g->mem, "d.add-cow", 7));
    assert_false(bit_in_file(g->mem, "d.add-cow", 8));
}

/* A parent that ends inside a sector: its bytes, then zeros. */
static void a_short_parent_ends_in_zeros(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, 5000);
    reads(g->disk, 0, 5000, 0xbb);
    reads(g->disk, 5000, MiB - 5000, 0);
    write_at(g->disk, 4700, 10, 1);
    reads(g->disk, 4600, 100, 0xbb);
    reads(g->disk, 4710, 290, 0xbb);
    reads(g->disk, 5000, 1000, 0);
    rig_close(g);
}

/* The last sector of an odd disk has one bit, and nothing is written behind its end. */
static void the_raw_file_never_grows(void **state)
{
    struct rig *g = *state;
    rig_open(g, 10000, MiB);
    write_at(g->disk, 9990, 10, 1);
    reads(g->disk, 9728, 262, 0xbb);
    reads(g->disk, 9990, 10, 1);
    ok(dr_zero(g->disk, 9000, 1000, DR_EXPLICIT, &err));
    rig_close(g);
    assert_int_equal(file_len(g->mem, "d.raw"), 10000);
    assert_true(bit_in_file(g->mem, "d.add-cow", 19));
    assert_false(bit_in_file(g->mem, "d.add-cow", 20));
}

static void zeros_punch_and_set_bits(void **state)
{
    struct rig *g = *state;
    struct dr_file *raw = NULL;
    rig_open(g, MiB, MiB);
    rig_close(g);
    put_pattern(g->mem, "d.raw", MiB, 0xee); /* what a cancelled write may have left */
    rig_open(g, MiB, MiB);
    ok(dr_zero(g->disk, 8192, 65536, 0, &err));
    did(g, "Zr");
    ok(dr_zero(g->disk, 100 * KiB + 7, 4 * KiB, 0, &err)); /* edges are filled up with bytes */
    reads(g->disk, 8192, 65536, 0);
    reads(g->disk, 100 * KiB, 7, 0xbb);
    reads(g->disk, 100 * KiB + 7, 4 * KiB, 0);
    reads(g->disk, 104 * KiB + 7, 512, 0xbb);
    rig_close(g);
    ok(dr_file_open(g->mem, "d.raw", 0, &raw, &err));
    enum dr_file_extent kind;
    uint64_t run;
    ok(dr_file_extent(raw, 8192, 65536, &kind, &run, &err));
    assert_true(kind == DR_FILE_HOLE && run == 65536);
    dr_file_unref(raw);
    assert_true(bit_in_file(g->mem, "d.add-cow", 16));
}

/* A discard never brings the parent's bytes back. */
static void a_discard_keeps_the_bit(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    write_at(g->disk, 0, 64 * KiB, 1);
    ok(dr_discard(g->disk, 0, 64 * KiB, &err));
    reads(g->disk, 0, 64 * KiB, 0);
    rig_close(g);
    assert_true(bit_in_file(g->mem, "d.add-cow", 0) && bit_in_file(g->mem, "d.add-cow", 127));
}

/* What the parent shows and nobody wants need not be copied in one day; the file gets no bytes. */
static void a_discard_hides_what_the_parent_has(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    uint8_t before[1024];
    ok(dr_pread(g->disk, before, 64 * KiB, sizeof(before), &err));
    assert_true(before[100] && before[700]);
    ok(dr_discard(g->disk, 64 * KiB + 100, 128 * KiB, &err));
    did(g, "Zr");
    reads(g->disk, 64 * KiB + 512, 128 * KiB - 512, 0);
    uint8_t after[512];
    ok(dr_pread(g->disk, after, 64 * KiB, sizeof(after), &err));
    assert_memory_equal(after, before, sizeof(after)); /* a sector in part: left alone */
    rig_close(g);
    assert_true(!bit_in_file(g->mem, "d.add-cow", 128) && bit_in_file(g->mem, "d.add-cow", 129));
}

/* Streaming zeros over junk: the bit alone would show the junk. */
static void a_fill_with_zeros_punches(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, 4096);
    rig_close(g);
    put_pattern(g->mem, "d.raw", MiB, 0xee);
    rig_open(g, MiB, 4096);
    ok(dr_chain_fill(chain_of(g), 0, NULL, 65536, 65536, &err));
    did(g, "Zr");
    reads(g->disk, 65536, 65536, 0);
    rig_close(g);
    assert_true(bit_in_file(g->mem, "d.add-cow", 128));
}

/* ------------------------------------------------------------------ dropping */

static void a_drop_is_punched_when_it_is_durable(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    write_at(g->disk, 0, 64 * KiB, 1);
    ok(dr_flush(g->disk, &err));
    g->steps.n = 0;
    ok(dr_chain_drop(chain_of(g), 0, 8192, 8192, &err));
    did(g, "");
    reads(g->disk, 8192, 8192, 0xbb);
    ok(dr_flush(g->disk, &err));
    did(g, "Wm Fm Zr");
    rig_close(g);
}

/* Guest and host place are the same: what is written there again must outlive the punch. */
static void nothing_is_written_where_a_punch_waits(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    write_at(g->disk, 0, 64 * KiB, 1);
    ok(dr_flush(g->disk, &err));
    ok(dr_chain_drop(chain_of(g), 0, 8192, 8192, &err));
    g->steps.n = 0;
    write_at(g->disk, 32 * KiB, 512, 3); /* elsewhere: no wait */
    did(g, "Wr");
    write_at(g->disk, 12288, 512, 2);
    did(g, "Fr Wm Fm Zr Wr");
    ok(dr_flush(g->disk, &err));
    did(g, "Fr Wm Fm");
    reads(g->disk, 8192, 4096, 0xbb);
    reads(g->disk, 12288, 512, 2);
    reads(g->disk, 12800, 3584, 0xbb);
    rig_close(g);
}

/* The flush that is to carry the cleared bit fails once: still no punch, still no reuse before. */
static void a_failed_flush_keeps_the_punch_waiting(void **state)
{
    struct rig *g = *state;
    rig_open(g, MiB, MiB);
    write_at(g->disk, 0, 64 * KiB, 1);
    ok(dr_flush(g->disk, &err));
    ok(dr_chain_drop(chain_of(g), 0, 8192, 8192, &err));
    faultfs_arm(g->fault, &(struct faultfs_plan){.kinds = 1u << FAULTFS_WRITE, .error = EIO});
    assert_int_equal(dr_flush(g->disk, NULL), -EIO);
    faultfs_disarm(g->fault);
    g->steps.n = 0;
    write_at(g->disk, 8192, 512, 2);
    did(g, "Fm Wm Fm Zr Wr");
    reads(g->disk, 8192, 512, 2);
    rig_close(g);
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(g->mem, "d.add-cow", NULL, &disk, &err));
    reads(disk, 8192, 512, 2);
    reads(disk, 8704, 4096, 0xbb);
    ok(dr_close(disk, &err));
}

static void a_drop_gives_the_bitmap_back_by_trim(void **state)
{
    struct rig *g = *state;
    rig_open(g, 256 * MiB, MiB);
    for (unsigned i = 0; i < 256; i += 32)
        write_at(g->disk, i * (uint64_t)MiB, 64 * KiB, 1);
    ok(dr_flush(g->disk, &err));
    struct dr_image *top = chain_of(g)->images[0];
    ok(top->fmt->trim(top, &err)); /* not empty: nothing happens */
    reads(g->disk, 32 * MiB, 64 * KiB, 1);
    ok(dr_chain_drop(chain_of(g), 0, 0, 256 * MiB, &err));
    ok(dr_flush(g->disk, &err));
    ok(top->fmt->trim(top, &err));
    reads(g->disk, 32 * MiB, 64 * KiB, 0);
    rig_close(g);
    assert_int_equal(file_len(g->mem, "d.add-cow"), V7_HEADER + 256 * MiB / 4096);
    assert_int_equal(disk_size(g->mem, "d.add-cow"), 4096);
}

/* ------------------------------------------------------------------ another size */

static void no_line(void *user, const char *line)
{
    (void)user;
    fail_msg("%s", line);
}

static void growing_hides_a_longer_parent(void **state)
{
    struct rig *g = *state;
    rig_open(g, 10000, 50000);
    reads(g->disk, 9000, 1000, 0xbb);
    ok(dr_truncate(g->disk, 40000, &err));
    reads(g->disk, 0, 10000, 0xbb);
    reads(g->disk, 10000, 30000, 0);
    ok(dr_truncate(g->disk, 100000, &err));
    reads(g->disk, 10000, 90000, 0);
    write_at(g->disk, 99000, 1000, 1);
    rig_close(g);
    assert_int_equal(file_len(g->mem, "d.raw"), 100000);
    /* bits up to where the parent ends, no further */
    assert_true(bit_in_file(g->mem, "d.add-cow", 19) && bit_in_file(g->mem, "d.add-cow", 97));
    assert_false(bit_in_file(g->mem, "d.add-cow", 98));
}

static void the_raw_file_grows_last(void **state)
{
    struct rig *g = *state;
    rig_open(g, 8192, 50000);
    ok(dr_truncate(g->disk, 81920, &err));
    did(g, "Tm Wm Wm Wm Fm Tr Fr");
    rig_close(g);
}

static void the_raw_file_shrinks_first(void **state)
{
    struct rig *g = *state;
    rig_open(g, 64 * KiB, 1000);
    write_at(g->disk, 0, 64 * KiB, 1);
    ok(dr_flush(g->disk, &err));
    g->steps.n = 0;
    ok(dr_truncate(g->disk, 5000, &err));
    did(g, "Tr Fr Tm Wm Fm");
    rig_close(g);
    assert_int_equal(file_len(g->mem, "d.add-cow"), V7_HEADER + 2);
    assert_true(bit_in_file(g->mem, "d.add-cow", 9));
    assert_false(bit_in_file(g->mem, "d.add-cow", 10));
}

static void shrink_and_grow_shows_zeros(void **state)
{
    struct rig *g = *state;
    rig_open(g, 64 * KiB, MiB);
    write_at(g->disk, 0, 64 * KiB, 1);
    ok(dr_truncate(g->disk, 5001, &err));
    ok(dr_truncate(g->disk, 128 * KiB, &err));
    reads(g->disk, 0, 5001, 1);
    reads(g->disk, 5001, 128 * KiB - 5001, 0);
    rig_close(g);
    ok(open_flags(g->mem, "d.add-cow", 0, &g->disk, &err));
    reads(g->disk, 5001, 128 * KiB - 5001, 0);
}

/* The raw file cannot grow (a file system's limit): no bits are left behind the end. */
static void growth_that_fails_leaves_no_bits(void **state)
{
    struct rig *g = *state;
    struct dr_check_result result = {.report = no_line};
    rig_open(g, 8192, 50000);
    write_at(g->disk, 0, 8192, 1);
    ok(dr_flush(g->disk, &err));
    for (uint64_t n = 0; n < 2; n++) { /* the metadata's truncate, the raw file's */
        faultfs_arm(g->fault, &(struct faultfs_plan){
                                  .nth = n, .kinds = 1u << FAULTFS_TRUNCATE, .error = EFBIG});
        assert_int_equal(dr_truncate(g->disk, 81920, NULL), -EFBIG);
        faultfs_disarm(g->fault);
        assert_int_equal(dr_size(g->disk), 8192);
        assert_int_equal(file_len(g->mem, "d.add-cow"), V7_HEADER + 2);
    }
    ok(dr_format_addcow.check(chain_of(g)->images[0], 0, &result, &err));
    assert_int_equal(result.corruptions, 0);
    ok(dr_truncate(g->disk, 81920, &err));
    reads(g->disk, 0, 8192, 1);
    reads(g->disk, 8192, 81920 - 8192, 0);
    rig_close(g);
}

/* Bits that a killed shrink left behind the end must not show what comes to lie there. */
static void growing_clears_stale_bits(void **state)
{
    struct rig *g = *state;
    put_pattern(g->mem, "d.raw", 8192, 1);
    put_v7(g->mem, "d.add-cow", "base", "d.raw", "\xff\xff\xff\xff\xff\xff", 6);
    rig_open(g, 8192, 1000);
    ok(dr_truncate(g->disk, 20000, &err));
    reads(g->disk, 8192, 20000 - 8192, 0);
    rig_close(g);
    assert_true(bit_in_file(g->mem, "d.add-cow", 15));
    for (unsigned n = 16; n < 48; n++)
        assert_false(bit_in_file(g->mem, "d.add-cow", n));
}

static void growing_without_the_parent_hides_all_of_it(void **state)
{
    struct rig *g = *state;
    rig_open(g, 8192, MiB);
    rig_close(g);
    ok(open_flags(g->mem, "d.add-cow", DR_OPEN_RDWR | DR_OPEN_NO_BACKING, &g->disk, &err));
    ok(dr_truncate(g->disk, 20000, &err));
    rig_close(g);
    ok(open_flags(g->mem, "d.add-cow", DR_OPEN_RDWR, &g->disk, &err));
    reads(g->disk, 0, 8192, 0xbb);
    reads(g->disk, 8192, 20000 - 8192, 0);
    rig_close(g);
    /* an end inside a sector that is the parent's cannot be hidden without it */
    ok(open_flags(g->mem, "d.add-cow", DR_OPEN_RDWR, &g->disk, &err));
    ok(dr_truncate(g->disk, 8000, &err));
    rig_close(g);
    ok(open_flags(g->mem, "d.add-cow", DR_OPEN_RDWR | DR_OPEN_NO_BACKING, &g->disk, &err));
    refused(dr_truncate(g->disk, 9000, &err), EINVAL, "without its backing file");
}

/* ------------------------------------------------------------------ another parent */

static int set_parent(struct rig *g, const char *name, const char *format, unsigned flags,
                      struct dr_error *err)
{
    struct dr_image *top = chain_of(g)->images[0];
    return top->fmt->set_backing(top, NULL, name, format, flags, err);
}

static void header_is(struct dr_fs *fs, const char *backing)
{
    uint8_t want[V7_HEADER], have[V7_HEADER];
    v7_header(want, backing, "d.raw");
    get_file(fs, "d.add-cow", have, 0, sizeof(have));
    assert_memory_equal(have, want, V7_HEADER);
}

/* Between the copying of the metadata file and its rename somebody writes and flushes. */
struct meanwhile {
    struct rig *g;
    pthread_t thread;
    bool started;
};

static void *write_and_flush(void *arg)
{
    struct rig *g = arg;
    struct dr_error why = DR_ERROR_INIT;
    uint8_t buf[512] = {7};
    if (dr_pwrite(g->disk, buf, 4096, sizeof(buf), 0, &why) < 0 || dr_flush(g->disk, &why) < 0)
        fail_msg("%s", why.text);
    return NULL;
}

static int start_before_rename(void *user, const struct faultfs_io *io)
{
    struct meanwhile *m = user;
    if (io->kind != FAULTFS_RENAME || m->started)
        return 0;
    m->started = true;
    pthread_create(&m->thread, NULL, write_and_flush, m->g);
    /* Time enough for the flush to do harm, if nothing holds it up. */
    struct timespec while_ = {.tv_nsec = 100000000};
    nanosleep(&while_, NULL);
    return 0;
}

static void a_flush_while_the_metadata_is_replaced_is_not_lost(void **state)
{
    struct rig *g = *state;
    char name[700];
    rig_open(g, MiB, MiB);
    struct meanwhile m = {.g = g};
    memset(name, 'n', sizeof(name) - 1);
    name[sizeof(name) - 1] = 0;
    for (size_t i = 100; i < sizeof(name) - 1; i += 100)
        name[i] = '/';
    faultfs_observe(g->fault, start_before_rename, &m);
    ok(dr_image_set_backing(chain_of(g)->images[0], NULL, name, "raw", 0, &err));
    assert_true(m.started);
    pthread_join(m.thread, NULL);
    faultfs_observe(g->fault, NULL, NULL);
    assert_true(bit_in_file(g->mem, "d.add-cow", 8)); /* the flush said that it is durable */
}

static void a_short_name_is_one_sector(void **state)
{
    struct rig *g = *state;
    char name[600];
    memset(name, 'n', sizeof(name));
    rig_open(g, MiB, MiB);
    ok(set_parent(g, "other", "vmdk", DR_TRY, &err));
    did(g, "");
    ok(set_parent(g, "other", "vmdk", 0, &err));
    assert_int_equal(g->steps.io[0].off, 0);
    assert_int_equal(g->steps.io[0].len, 512);
    did(g, "Wm Fm");
    header_is(g->mem, "json:{\"driver\":\"vmdk\",\"file\":{\"filename\":\"other\"}}");
    name[499] = 0;
    ok(set_parent(g, name, "raw", 0, &err));
    did(g, "Wm Fm");
    header_is(g->mem, name);
    ok(set_parent(g, "b", NULL, 0, &err)); /* and nothing is left of the long one */
    did(g, "Wm Fm");
    header_is(g->mem, "b");
    ok(set_parent(g, NULL, NULL, 0, &err));
    header_is(g->mem, "");
    rig_close(g);
}

static void a_long_name_replaces_the_file(void **state)
{
    struct rig *g = *state;
    char name[1100];
    memset(name, 'n', sizeof(name));
    rig_open(g, 512 * MiB, MiB);
    write_at(g->disk, 300 * MiB, 4096, 1);
    ok(dr_flush(g->disk, &err));
    struct dr_file_id before = chain_of(g)->images[0]->files[0]->id;
    name[500] = 0;
    ok(set_parent(g, name, "raw", DR_TRY, &err));
    ok(set_parent(g, name, "raw", 0, &err));
    struct dr_file_id after = chain_of(g)->images[0]->files[0]->id;
    assert_true(before.ino != after.ino);
    header_is(g->mem, name);
    write_at(g->disk, 300 * MiB + 4096, 4096, 2); /* goes to the new file */
    ok(dr_flush(g->disk, &err));
    ok(set_parent(g, "base", "raw", 0, &err)); /* back: the long one spans two sectors */
    assert_true(after.ino != chain_of(g)->images[0]->files[0]->id.ino);
    name[500] = 'n';
    name[1024] = 0;
    refused(set_parent(g, name, "raw", DR_TRY, &err), ENAMETOOLONG, "at most 1023");
    refused(set_parent(g, name, "raw", 0, &err), ENAMETOOLONG, "at most 1023");
    header_is(g->mem, "base");
    rig_close(g);
    assert_true(disk_size(g->mem, "d.add-cow") < 64 * KiB); /* holes stay holes */
    ok(open_flags(g->mem, "d.add-cow", 0, &g->disk, &err));
    reads(g->disk, 300 * MiB, 4096, 1);
    reads(g->disk, 300 * MiB + 4096, 4096, 2);
    reads(g->disk, 0, MiB, 0xbb);
}

/* Whatever fails, the image has the old parent or the new one, and nothing lies about. */
static void a_name_switch_that_fails_changes_nothing(void **state)
{
    struct rig *g = *state;
    char name[800];
    memset(name, 'n', sizeof(name));
    name[700] = 0;
    rig_open(g, 64 * KiB, 64 * KiB);
    write_at(g->disk, 4096, 4096, 1);
    rig_close(g);
    size_t files = count_files(g->mem);
    bool done = false;
    for (uint64_t i = 0; !done; i++) {
        ok(open_flags(faultfs_fs(g->fault), "d.add-cow", DR_OPEN_RDWR, &g->disk, &err));
        faultfs_arm(g->fault, &(struct faultfs_plan){.nth = i, .error = ENOSPC, .partial = true});
        int r = set_parent(g, name, "raw", 0, NULL);
        done = !faultfs_fired(g->fault);
        faultfs_disarm(g->fault);
        assert_true(done ? r == 0 : r == -ENOSPC || r == 0);
        dr_close(g->disk, NULL);
        g->disk = NULL;
        assert_int_equal(count_files(g->mem), files);
        uint8_t byte;
        get_file(g->mem, "d.add-cow", &byte, 12, 1);
        header_is(g->mem, byte == 'n' ? name : "base");
        ok(open_flags(g->mem, "d.add-cow", DR_OPEN_RDWR | DR_OPEN_NO_BACKING, &g->disk, &err));
        reads(g->disk, 4096, 4096, 1);
        ok(set_parent(g, "base", "raw", 0, &err));
        rig_close(g);
    }
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, rig_up, rig_down)
    const struct CMUnitTest tests[] = {
        T(bits_follow_the_data),
        T(an_empty_bitmap_gets_its_full_length_first),
        T(a_large_write_is_one_call),
        T(part_of_a_sector_brings_the_rest_along),
        T(a_short_parent_ends_in_zeros),
        T(the_raw_file_never_grows),
        T(zeros_punch_and_set_bits),
        T(a_discard_keeps_the_bit),
        T(a_discard_hides_what_the_parent_has),
        T(a_fill_with_zeros_punches),
        T(a_drop_is_punched_when_it_is_durable),
        T(nothing_is_written_where_a_punch_waits),
        T(a_failed_flush_keeps_the_punch_waiting),
        T(a_drop_gives_the_bitmap_back_by_trim),
        T(growing_hides_a_longer_parent),
        T(the_raw_file_grows_last),
        T(the_raw_file_shrinks_first),
        T(shrink_and_grow_shows_zeros),
        T(growth_that_fails_leaves_no_bits),
        T(growing_clears_stale_bits),
        T(growing_without_the_parent_hides_all_of_it),
        T(a_flush_while_the_metadata_is_replaced_is_not_lost),
        T(a_short_name_is_one_sector),
        T(a_long_name_replaces_the_file),
        T(a_name_switch_that_fails_changes_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
