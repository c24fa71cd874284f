/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What nothing in a damaged qcow2 leads to is put aside: all of it, and nothing else. */
#include "test-qcow2-damage.h"

#define OUT "/d/orphans"

static uint64_t rescue(struct dr_fs *fs)
{
    uint64_t found = UINT64_MAX;
    ok(dr_salvage_orphans_fs(fs, PATH, NULL, OUT, NULL, NULL, NULL, &found, &err));
    return found;
}

static uint8_t *content(struct dr_fs *fs, const char *path, uint64_t *size)
{
    struct dr_file *f;
    ok(dr_file_open(fs, path, DR_FILE_NO_LOCK, &f, &err));
    *size = dr_file_size(f);
    uint8_t *bytes = malloc(*size);
    ok(dr_file_pread(f, bytes, 0, *size, &err));
    dr_file_unref(f);
    return bytes;
}

/* The active L1 table leads nowhere any more. */
static void lose_l1(struct dr_fs *fs)
{
    uint64_t at = peek(fs, 40, 8), n = peek(fs, 36, 4);
    for (uint64_t i = 0; i < n; i++)
        poke(fs, at + 8 * i, 0, 8);
}

/* Blocks of the guest's bytes, which make_in wrote, in the image's file are all in the other one,
 * and what the image still knows is not. */
static void all_is_there(struct dr_fs *fs, uint64_t found)
{
    uint64_t size, out_size, guest = 0;
    CLEANUP_FREE uint8_t *image = content(fs, PATH, &size), *out = content(fs, OUT, &out_size);
    assert_int_equal(out_size, size);
    assert_true(dr_is_zero(out, 512)); /* the header */
    uint64_t reftable = peek(fs, 48, 8);
    assert_true(dr_is_zero(out + reftable, 512));
    for (uint64_t at = 0; at + 512 <= size; at += 512) {
        bool ones = image[at] >= 1 && image[at] <= 3 &&
                    memcmp(image + at, image + at + 1, 511) == 0;
        if (!ones)
            continue;
        guest += 512;
        assert_memory_equal(out + at, image + at, 512);
    }
    assert_true(guest >= 160 * KiB && found >= guest && found < guest + 64 * KiB);
}

static void what_a_lost_table_led_to_is_put_aside(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SHAPES; i++) {
        make_in(mem, &shapes[i]);
        lose_l1(mem);
        all_is_there(mem, rescue(mem));
        ok(mem->ops->unlink(mem, PATH, &err));
        ok(mem->ops->unlink(mem, OUT, &err));
    }
}

static void a_sound_image_has_no_orphans(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SHAPES; i++) {
        make_in(mem, &shapes[i]);
        assert_int_equal(rescue(mem), 0);
        ok(mem->ops->unlink(mem, PATH, &err));
        ok(mem->ops->unlink(mem, OUT, &err));
    }
}

static void with_little_memory_the_same_is_put_aside(void **state)
{
    (void)state;
    const struct qcow2_check_limits usual = qcow2_check_limits;
    make_in(mem, &shapes[2]);
    uint64_t l1 = peek(mem, 40, 8), size;
    poke(mem, l1 + 8, 0, 8); /* a hole in the middle of what is used */
    uint64_t many = rescue(mem);
    CLEANUP_FREE uint8_t *first = content(mem, OUT, &size);
    ok(mem->ops->unlink(mem, OUT, &err));
    qcow2_check_limits = (struct qcow2_check_limits){.tally = 1, .tables = 4};
    uint64_t few = rescue(mem);
    qcow2_check_limits = usual;
    CLEANUP_FREE uint8_t *second = content(mem, OUT, &size);
    assert_true(many > 0);
    assert_int_equal(few, many);
    assert_memory_equal(first, second, size);
}

static void a_failure_leaves_no_file_and_the_image_as_it_was(void **state)
{
    (void)state;
    struct faultfs *fault = faultfs_new(mem);
    uint64_t size, n, failed = 0;
    make_in(mem, &shapes[0]);
    lose_l1(mem);
    CLEANUP_FREE uint8_t *before = content(mem, PATH, &size);
    faultfs_reset(fault);
    uint64_t whole = rescue(faultfs_fs(fault));
    n = faultfs_count(fault);
    ok(mem->ops->unlink(mem, OUT, &err));
    for (uint64_t i = 0; i < n; i++) {
        uint64_t found, left;
        faultfs_arm(fault, &(struct faultfs_plan){.nth = i, .error = EIO});
        int r = dr_salvage_orphans_fs(faultfs_fs(fault), PATH, NULL, OUT, NULL, NULL, NULL, &found,
                                      &err);
        faultfs_disarm(fault);
        CLEANUP_FREE uint8_t *after = content(mem, PATH, &left);
        assert_int_equal(left, size);
        assert_memory_equal(after, before, size);
        failed += r < 0;
        if (r == 0 && found == whole)
            all_is_there(mem, found);
        if (dr_fs_exists(mem, OUT))
            ok(mem->ops->unlink(mem, OUT, &err));
    }
    assert_true(n > 10 && failed > n / 2);
    faultfs_free(fault);
}

/* The sector at *bad cannot be read. */
static int refuse_bad(void *user, const struct faultfs_io *io)
{
    const uint64_t *bad = user;
    return io->kind == FAULTFS_READ && io->off <= *bad && *bad < io->off + io->len ? -EIO : 0;
}

static void what_cannot_be_read_is_told_and_left_out(void **state)
{
    (void)state;
    struct faultfs *fault = faultfs_new(mem);
    uint64_t found, size, bad = 0;
    make_in(mem, &shapes[0]);
    lose_l1(mem);
    uint64_t whole = rescue(mem);
    ok(mem->ops->unlink(mem, OUT, &err));
    CLEANUP_FREE uint8_t *image = content(mem, PATH, &size);
    while (image[bad] != 1 || memcmp(image + bad, image + bad + 1, 4095) != 0)
        bad += 4096;
    faultfs_observe(fault, refuse_bad, &bad);
    lines[0] = '\0';
    ok(dr_salvage_orphans_fs(faultfs_fs(fault), PATH, NULL, OUT, note, NULL, NULL, &found, &err));
    assert_non_null(strstr(lines, PATH));
    assert_int_equal(found, whole - 4096);
    faultfs_free(fault);
}

static void expect_lost(const char *expected)
{
    struct dr_convert_options o = {.salvage = true, .sparse_size = 4096, .out_format = "raw"};
    struct dr_job job = {.message = note};
    const char *source = PATH;
    lines[0] = '\0';
    ok(dr_convert_fs(mem, &source, 1, OUT, &o, &job, &err));
    assert_string_equal(lines, expected);
}

/* Each once, whoever found it, and however often. */
static void what_a_salvage_could_not_read_is_told_joined_and_in_order(void **state)
{
    (void)state;
    static const unsigned hurt[] = {20, 1, 3, 2, 128, 130};
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    for (size_t i = 0; i < sizeof(hurt) / sizeof(hurt[0]); i++) {
        uint64_t at = entry_at(&p, hurt[i]);
        poke(mem, at, peek(mem, at, 8) | UINT64_C(1) << 57, 8);
    }
    expect_lost("/d/a.qcow2: bytes 4096 to 16384 cannot be read, zeros instead\n"
                "/d/a.qcow2: bytes 81920 to 86016 cannot be read, zeros instead\n"
                "/d/a.qcow2: bytes 524288 to 528384 cannot be read, zeros instead\n"
                "/d/a.qcow2: bytes 532480 to 536576 cannot be read, zeros instead\n");
    uint64_t size;
    CLEANUP_FREE uint8_t *after = content(mem, OUT, &size);
    assert_int_equal(size, SIZE);
    for (size_t i = 0; i < sizeof(hurt) / sizeof(hurt[0]); i++)
        memset(before + hurt[i] * p.cluster, 0, p.cluster);
    assert_memory_equal(before, after, SIZE);
}

static void a_lost_table_is_one_lost_range(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    poke(mem, p.l1, UINT64_C(1) << 57 | 512, 8);
    expect_lost("/d/a.qcow2: bytes 0 to 1048576 cannot be read, zeros instead\n");
}

static void stopped_it_leaves_no_file(void **state)
{
    (void)state;
    const volatile int stop = 1;
    make_in(mem, &shapes[0]);
    lose_l1(mem);
    fails(ECANCELED, "stopped",
          dr_salvage_orphans_fs(mem, PATH, NULL, OUT, NULL, NULL, &stop, NULL, &err));
    assert_false(dr_fs_exists(mem, OUT));
}

static void a_file_that_is_there_is_kept(void **state)
{
    (void)state;
    struct dr_file *f;
    uint64_t size;
    make_in(mem, &shapes[0]);
    ok(dr_file_open(mem, OUT, DR_FILE_CREATE | DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, "mine", 0, 4, &err));
    dr_file_unref(f);
    fails(EEXIST, "exists",
          dr_salvage_orphans_fs(mem, PATH, NULL, OUT, NULL, NULL, NULL, NULL, &err));
    CLEANUP_FREE uint8_t *kept = content(mem, OUT, &size);
    assert_int_equal(size, 4);
    assert_memory_equal(kept, "mine", 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(what_a_lost_table_led_to_is_put_aside),
        T(a_sound_image_has_no_orphans),
        T(with_little_memory_the_same_is_put_aside),
        T(a_failure_leaves_no_file_and_the_image_as_it_was),
        T(what_cannot_be_read_is_told_and_left_out),
        T(what_a_salvage_could_not_read_is_told_joined_and_in_order),
        T(a_lost_table_is_one_lost_range),
        T(stopped_it_leaves_no_file),
        T(a_file_that_is_there_is_kept),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
