/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Convert with compression: whatever kind of bytes a unit holds, and whatever the target held or
 * shows there before, it reads as the source does. */
#include "test-ops.h"

#define UNIT  4096u
#define SIZE  (64 * UNIT + 512)
#define OTHER 0x5a /* what targets and their parents hold before */

static void put_random(struct dr_fs *fs, const char *path, uint64_t off, size_t len)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(len);
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < len; i++)
        buf[i] = (uint8_t)next_random(&state);
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

/* Units of each kind: full and in part; that compress and that do not; zeros that are written,
 * said, and never written; the same as in `old`; and half a sector's unit at the end. */
static uint8_t *make_source(struct dr_fs *fs, const char *path, const char *format)
{
    uint64_t size;
    make(fs, path, format, SIZE, NULL);
    put(fs, path, 0, 3 * UNIT, 0x11);
    put_random(fs, path, 3 * UNIT, 2 * UNIT);
    put(fs, path, 6 * UNIT, 2 * UNIT, 0x22);
    put(fs, path, 6 * UNIT, 2 * UNIT, 0);
    put(fs, path, 9 * UNIT + 512, 1024, 0x33);
    put_random(fs, path, 11 * UNIT - 512, 1024);
    put(fs, path, 20 * UNIT, 4 * UNIT, OTHER);
    put(fs, path, 30 * UNIT + 1024, 2 * UNIT, OTHER);
    put(fs, path, 64 * UNIT, 512, 0x44);
    uint8_t *bytes = view(fs, path, &size);
    assert_int_equal(size, SIZE);
    /* The zeros of the last one are bytes that somebody wrote, not a hole. */
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    static const uint8_t zeros[2 * UNIT];
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    ok(dr_pwrite(disk, zeros, 40 * UNIT, sizeof(zeros), 0, &err));
    ok(dr_close(disk, &err));
    return bytes;
}

static struct dr_convert_options compressing(void)
{
    static const struct dr_pair pairs[] = {{"cluster_size", "4096"}};
    return (struct dr_convert_options){.out_format = "qcow2",
                                       .pairs = pairs,
                                       .n_pairs = 1,
                                       .sparse_size = DR_CONVERT_SPARSE_DEFAULT,
                                       .compress = true};
}

static const char *const sources[] = {"raw", "qcow2"};

static void a_new_image_reads_as_its_source(void **state)
{
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < 2; i++) {
        const char *from = sources[i];
        struct dr_convert_options o = compressing();
        uint8_t *want = make_source(fs, from, from);
        ok(dr_convert_fs(fs, &from, 1, "new", &o, NULL, &err));
        same_view(fs, "new", want, SIZE);
        free(want);
    }
}

static void what_the_target_held_before_is_gone(void **state)
{
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < 2; i++) {
        const char *from = sources[i];
        struct dr_convert_options o = compressing(), old = {.out_format = "qcow2"};
        uint8_t *want = make_source(fs, from, from);
        make(fs, "full", "raw", SIZE, NULL);
        put(fs, "full", 0, SIZE, OTHER);
        ok(dr_convert_fs(fs, (const char *[]){"full"}, 1, "old", &old, NULL, &err));
        o.no_create = true;
        o.pairs = NULL;
        o.n_pairs = 0;
        ok(dr_convert_fs(fs, &from, 1, "old", &o, NULL, &err));
        same_view(fs, "old", want, SIZE);
        free(want);
    }
}

static void what_the_targets_parent_shows_is_hidden_where_it_differs(void **state)
{
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < 2; i++) {
        const char *from = sources[i];
        struct dr_convert_options o = compressing();
        uint8_t *want = make_source(fs, from, from);
        make(fs, "parent", "raw", SIZE, NULL);
        put(fs, "parent", 0, SIZE, OTHER);
        o.backing = "parent";
        o.backing_format = "raw";
        ok(dr_convert_fs(fs, &from, 1, "over", &o, NULL, &err));
        same_view(fs, "over", want, SIZE);
        free(want);
    }
}

/* Where one source ends and the next begins inside a unit, both halves are kept. */
static void sources_that_meet_inside_a_unit_are_both_there(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_convert_options o = compressing();
    uint8_t *one = make_source(fs, "raw", "raw"), *two = make_source(fs, "qcow2", "qcow2");
    uint8_t *want = malloc(3 * SIZE);
    memcpy(want, one, SIZE);
    memcpy(want + SIZE, two, SIZE);
    memcpy(want + 2 * SIZE, one, SIZE);
    ok(dr_convert_fs(fs, (const char *[]){"raw", "qcow2", "raw"}, 3, "new", &o, NULL, &err));
    same_view(fs, "new", want, 3 * SIZE);
    free(one);
    free(two);
    free(want);
}

static void a_format_that_cannot_compress_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    static const char *const formats[] = {"raw", "vmdk", "add-cow"};
    make(fs, "a", "raw", SIZE, NULL);
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        struct dr_convert_options o = {.out_format = formats[i], .compress = true};
        refused(dr_convert_fs(fs, (const char *[]){"a"}, 1, "b", &o, NULL, &err), ENOTSUP,
                "Compression not supported");
        assert_false(exists(fs, "b"));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(a_new_image_reads_as_its_source),
        ops_test(what_the_target_held_before_is_gone),
        ops_test(what_the_targets_parent_shows_is_hidden_where_it_differs),
        ops_test(sources_that_meet_inside_a_unit_are_both_there),
        ops_test(a_format_that_cannot_compress_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
