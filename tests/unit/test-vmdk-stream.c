/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading streamOptimized images. */
#include "test-vmdk-stream.h"

static uint8_t want[DISK], got[DISK];

static struct dr_disk *opened(const char *path, unsigned flags)
{
    struct dr_open_options o = {.flags = flags};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(mem, path, &o, &disk, &err));
    return disk;
}

static void made(struct making *m)
{
    make_stream(m);
    save_stream(m, "s.vmdk");
}

static void close_disk(struct dr_disk *disk)
{
    ok(dr_close(disk, &err));
}

/* Reads as a whole, and piece by piece in an order that is none of the file's. */
static void reads_right(const char *path)
{
    struct dr_disk *disk = opened(path, 0);
    expected_disk(want);
    assert_int_equal(dr_size(disk), DISK);
    ok(dr_pread(disk, got, 0, DISK, &err));
    assert_memory_equal(got, want, DISK);
    for (uint64_t i = 0, off = 0; i < 300; i++, off = (off + 1234567) % (DISK - 9000)) {
        ok(dr_pread(disk, got, off, 9000, &err));
        assert_memory_equal(got, want + off, 9000);
    }
    close_disk(disk);
}

static void every_layout_reads_the_same(void **state)
{
    (void)state;
    for (int layout = 0; layout < LAYOUTS; layout++)
        for (int full = 0; full < 2; full++) {
            struct making m = {.layout = (enum layout)layout, .empty_table = full};
            made(&m);
            reads_right("s.vmdk");
            free(m.buf);
        }
}

static void a_footer_is_found_in_front_of_padding(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER, .padding = 10240 + 100};
    made(&m);
    reads_right("s.vmdk");
    free(m.buf);
}

static void deflate_without_a_zlib_frame_is_read(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER, .raw = true};
    made(&m);
    reads_right("s.vmdk");
    free(m.buf);
}

static void holes_are_told_without_reading_grains(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    struct dr_extent_status s;
    made(&m);
    struct dr_disk *disk = opened("s.vmdk", 0);
    ok(dr_block_status(disk, 2 * GRAIN, DISK - 2 * GRAIN, &s, &err));
    assert_int_equal(s.len, 3 * GRAIN);
    assert_true(s.flags & DR_EXTENT_ZERO);
    ok(dr_block_status(disk, 5 * GRAIN + 512, DISK - 5 * GRAIN - 512, &s, &err));
    assert_int_equal(s.len, GRAIN - 512);
    assert_true(s.flags & DR_EXTENT_CODED);
    close_disk(disk);
    free(m.buf);
}

static void a_stream_is_not_opened_for_writing(void **state)
{
    (void)state;
    struct making m = {.layout = FRONT_TWICE};
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    made(&m);
    fails(EROFS, "written once", dr_open_fs(mem, "s.vmdk", &o, &disk, &err));
    free(m.buf);
}

/* ------------------------------------------------------------------ damage */

static int read_grain(uint64_t grain)
{
    struct dr_disk *disk;
    int r = dr_open_fs(mem, "s.vmdk", NULL, &disk, &err);
    if (r < 0)
        return r;
    r = dr_pread(disk, got, grain * GRAIN, 512, &err);
    dr_close(disk, NULL);
    return r;
}

static void damaged_grains_are_errors_that_name_their_offset(void **state)
{
    (void)state;
    static const struct {
        unsigned at; /* in grain 1 */
        uint64_t value;
        unsigned len;
        const char *why;
    } cases[] = {
        {0, 16, 8, "expected 1 to 8192 of sector 8"},
        {8, 0, 4, "says 0 compressed bytes"},
        {8, 8193, 4, "expected 1 to 8192"},
        {8, 8000, 4, "the next one begins in them"},
        {12, 0, 1, "are damaged"},
        {30, UINT64_MAX, 8, "are damaged"},
        {8, 20, 4, "are damaged"},
    };
    char offset[40];
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct making m = {.layout = FOOTER};
        uint8_t value[8];
        make_stream(&m);
        put_le64(value, cases[i].value);
        memcpy(m.buf + m.gtes[1] * 512 + cases[i].at, value, cases[i].len);
        save_stream(&m, "s.vmdk");
        snprintf(offset, sizeof(offset), "offset %u", m.gtes[1] * 512);
        fails(EIO, cases[i].why, read_grain(1));
        assert_non_null(strstr(err.text, offset));
        ok(read_grain(0));
        ok(read_grain(5));
        free(m.buf);
    }
}

static void a_grain_that_decodes_to_less_is_an_error(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    uint8_t plain[GRAIN] = {1}, coded[GRAIN];
    make_stream(&m);
    uint8_t *at = m.buf + m.gtes[1] * 512;
    int64_t n = dr_zlib(plain, GRAIN - 512, 6, coded, 400);
    assert_true(n > 0);
    put_le32(at + 8, (uint32_t)n);
    memcpy(at + 12, coded, (size_t)n);
    save_stream(&m, "s.vmdk");
    fails(EIO, "has 3584 bytes, expected 4096", read_grain(1));
    free(m.buf);
}

static void a_footer_of_another_disk_is_refused(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    make_stream(&m);
    put_le64(m.buf + m.len - 1024 + 12, CAPACITY + 8);
    save_stream(&m, "s.vmdk");
    fails(EINVAL, "different disks", read_grain(0));
    free(m.buf);
}

static void grains_too_large_to_be_held_are_refused(void **state)
{
    (void)state;
    struct making m = {.layout = FRONT};
    make_stream(&m);
    put_le64(m.buf + 20, 0x4000);
    save_stream(&m, "s.vmdk");
    fails(ENOTSUP, "compressed grains of 16384 sectors", read_grain(0));
    free(m.buf);
}

/* ------------------------------------------------------------------ cut off */

static void a_stream_without_its_end_is_refused(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    make_stream(&m);
    m.len = m.gtes[1023] * 512u;
    save_stream(&m, "s.vmdk");
    fails(EINVAL, "cut off", read_grain(0));
    free(m.buf);
}

static void salvage_reads_the_grains_that_are_there(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    make_stream(&m);
    m.len = m.gtes[1023] * 512u + 20; /* in the middle of that grain */
    save_stream(&m, "s.vmdk");
    expected_disk(want);
    struct dr_disk *disk = opened("s.vmdk", DR_OPEN_SALVAGE);
    ok(dr_pread(disk, got, 0, 512 * GRAIN, &err)); /* what is between two grains was not written */
    assert_memory_equal(got, want, 512 * GRAIN);
    fails(EIO, "nothing is known", dr_pread(disk, got, 512 * GRAIN, 512, &err));
    fails(EIO, "nothing is known", dr_pread(disk, got, DISK - 512, 512, &err));
    close_disk(disk);
    free(m.buf);
}

static void salvage_finds_the_grains_behind_damage(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    make_stream(&m);
    memset(m.buf + m.gtes[1] * 512, 0xee, 512);
    memset(m.buf + m.len - 1024, 0, 512); /* no footer either */
    save_stream(&m, "s.vmdk");
    expected_disk(want);
    memset(want + GRAIN, 0, GRAIN);
    struct dr_disk *disk = opened("s.vmdk", DR_OPEN_SALVAGE);
    ok(dr_pread(disk, got, 0, DISK - 512, &err));
    assert_memory_equal(got, want, DISK - 512);
    close_disk(disk);
    free(m.buf);
}

/* ------------------------------------------------------------------ in one pass */

struct pipe {
    const uint8_t *bytes;
    size_t len, at;
};

static int read_pipe(void *user, void *buf, size_t len, size_t *n, struct dr_error *error)
{
    struct pipe *p = user;
    (void)error;
    *n = (size_t)dr_min(len, p->len - p->at);
    memcpy(buf, p->bytes + p->at, *n);
    p->at += *n;
    return 0;
}

/* The disk in `got`, or the failure. */
static int read_in_one_pass(const struct making *m)
{
    struct pipe p = {m->buf, m->len, 0};
    struct dr_inflow in = {read_pipe, &p};
    struct dr_incoming what;
    void *state = NULL;
    int r = vmdk_incoming.begin("pipe", &in, &state, &what, &err);
    memset(got, 0, sizeof(got));
    if (r == 0) {
        uint8_t coded[3 * GRAIN], plain[GRAIN];
        size_t len;
        uint64_t off;
        assert_int_equal(what.size, DISK);
        assert_int_equal(what.unit, GRAIN);
        assert_true(what.coded_most <= sizeof(coded));
        while (r == 0 && (r = vmdk_incoming.next(state, coded, &len, &off, &err)) > 0) {
            r = vmdk_incoming.decode(state, coded, len, off, plain, &err);
            if (r == 0)
                memcpy(got + off, plain, (size_t)dr_min(GRAIN, DISK - off));
        }
    }
    vmdk_incoming.free(state);
    return r;
}

static void every_layout_is_read_in_one_pass(void **state)
{
    (void)state;
    expected_disk(want);
    for (int layout = 0; layout < LAYOUTS; layout++) {
        struct making m = {.layout = (enum layout)layout, .padding = 1000};
        if (layout == STALE_HEADER)
            continue; /* it says that its tables come first */
        make_stream(&m);
        ok(read_in_one_pass(&m));
        assert_memory_equal(got, want, DISK);
        free(m.buf);
    }
}

static void a_pipe_that_ends_early_is_noticed_wherever_that_is(void **state)
{
    (void)state;
    for (int layout = 0; layout < LAYOUTS; layout++) {
        struct making m = {.layout = (enum layout)layout};
        if (layout == STALE_HEADER)
            continue;
        make_stream(&m);
        size_t whole = m.len, last = m.gtes[LAST_GRAIN] * 512u;
        for (m.len = 0; m.len <= last; m.len += m.len < 1024 ? 100 : 512)
            fails(EIO, "cut off", read_in_one_pass(&m));
        if (layout < FRONT)
            for (m.len = last; m.len < whole; m.len += 512)
                fails(EIO, "cut off", read_in_one_pass(&m));
        free(m.buf);
    }
}

static void what_cannot_be_read_in_one_pass_is_told_at_once(void **state)
{
    (void)state;
    struct making m = {.layout = FRONT};
    make_stream(&m);
    memcpy(m.buf, "# Disk", 6);
    fails(ENOTSUP, "in other files", read_in_one_pass(&m));
    memcpy(m.buf, "KDMV\3\0", 6);
    put_le32(m.buf + 8, 1); /* not compressed */
    put_le16(m.buf + 77, 0);
    fails(ENOTSUP, "no stream", read_in_one_pass(&m));
    free(m.buf);
}

static void grains_out_of_order_end_the_pass(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    make_stream(&m);
    put_le64(m.buf + m.gtes[5] * 512, 0);
    fails(ENOTSUP, "not in the order", read_in_one_pass(&m));
    put_le64(m.buf + m.gtes[5] * 512, CAPACITY + 512);
    fails(EIO, "which cannot be", read_in_one_pass(&m));
    free(m.buf);
}

/* ------------------------------------------------------------------ check */

static char found[4096];

static void note(void *user, const char *line)
{
    (void)user;
    strncat(found, line, sizeof(found) - strlen(found) - 2);
    strcat(found, "\n");
}

static uint64_t check(void)
{
    struct dr_image *image;
    struct dr_check_result result = {.report = note};
    found[0] = '\0';
    ok(dr_image_open(mem, "s.vmdk", NULL, 0, &image, &err));
    ok(image->fmt->check(image, 0, &result, &err));
    dr_image_unref(image, NULL);
    return result.corruptions;
}

static void check_has_nothing_to_say_of_a_good_stream(void **state)
{
    (void)state;
    for (int layout = 0; layout < LAYOUTS; layout++) {
        struct making m = {.layout = (enum layout)layout};
        made(&m);
        assert_int_equal(check(), 0);
        assert_string_equal(found, "");
        free(m.buf);
    }
}

static void check_finds_what_is_wrong_and_nothing_else(void **state)
{
    (void)state;
    static const struct {
        uint32_t entry; /* of grain 5: a sector, or how far from that of grain 1 */
        bool relative;
        const char *why;
    } cases[] = {
        {1000000, false, "should be at sector 1000000"},
        {0, true, "the marker at sector"},
        {2, false, "the marker at sector 2 "},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct making m = {.layout = FOOTER};
        make_stream(&m);
        uint32_t entry = cases[i].entry + (cases[i].relative ? m.gtes[1] : 0);
        put_le32(m.buf + m.tables[0] * 512 + 5 * 4, entry);
        save_stream(&m, "s.vmdk");
        assert_int_equal(check(), 1);
        if (!strstr(found, cases[i].why))
            fail_msg("%s", found);
        free(m.buf);
    }
}

static void check_of_a_stream_that_was_cut_off_is_one_line(void **state)
{
    (void)state;
    char words[100];
    struct making m = {.layout = FRONT};
    make_stream(&m);
    uint8_t *tables = m.buf + get_le64(m.buf + 56) * 512 + 512;
    m.len = 190 * 512; /* the last two grains were behind that */
    put_le32(tables + 1023 * 4, 200);
    put_le32(tables + LAST_GRAIN * 4, 260);
    save_stream(&m, "s.vmdk");
    snprintf(words, sizeof(words),
             "File truncated, expecting at least %u bytes: it has %u, and 2 grains are lost\n",
             261 * 512, 190 * 512);
    assert_int_equal(check(), 2);
    if (!strstr(found, words) || strchr(found, '\n') != found + strlen(found) - 1)
        fail_msg("%s", found);
    free(m.buf);
}

static void check_finds_grains_that_share_bytes(void **state)
{
    (void)state;
    struct making m = {.layout = FOOTER};
    make_stream(&m);
    put_le32(m.buf + m.gtes[0] * 512 + 8, 1000); /* reaches into grain 1 */
    save_stream(&m, "s.vmdk");
    assert_int_equal(check(), 1);
    assert_non_null(strstr(found, "lies on something else"));
    free(m.buf);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(every_layout_reads_the_same),
        TEST(a_footer_is_found_in_front_of_padding),
        TEST(deflate_without_a_zlib_frame_is_read),
        TEST(holes_are_told_without_reading_grains),
        TEST(a_stream_is_not_opened_for_writing),
        TEST(damaged_grains_are_errors_that_name_their_offset),
        TEST(a_grain_that_decodes_to_less_is_an_error),
        TEST(a_footer_of_another_disk_is_refused),
        TEST(grains_too_large_to_be_held_are_refused),
        TEST(a_stream_without_its_end_is_refused),
        TEST(salvage_reads_the_grains_that_are_there),
        TEST(salvage_finds_the_grains_behind_damage),
        TEST(every_layout_is_read_in_one_pass),
        TEST(a_pipe_that_ends_early_is_noticed_wherever_that_is),
        TEST(what_cannot_be_read_in_one_pass_is_told_at_once),
        TEST(grains_out_of_order_end_the_pass),
        TEST(check_has_nothing_to_say_of_a_good_stream),
        TEST(check_finds_what_is_wrong_and_nothing_else),
        TEST(check_of_a_stream_that_was_cut_off_is_one_line),
        TEST(check_finds_grains_that_share_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
