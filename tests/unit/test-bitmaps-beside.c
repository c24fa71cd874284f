/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps in a file beside the image: what changes do to them, and whom they are not trusted after.
 */
#include "test-bitmaps-beside.h"

#include "faultfs.h"

/* Run with a fresh image of each format in a file system of its own. */
static void each_kind(void (*test)(struct dr_fs *fs))
{
    for (size_t i = 0; i < N_KINDS; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &kinds[i]);
        test(fs);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ noting */

static void notes(struct dr_fs *fs)
{
    struct dr_disk *disk = open_disk(fs);
    write_at(disk, 0, 256 * KIB, 1);
    add(disk, "fine", 512, false);
    add(disk, "coarse", 64 * KIB, false);
    ok(dr_close(disk, &err));
    says(fs, "fine 512 on;coarse 65536 on;");
    disk = open_disk(fs);
    write_at(disk, 5 * 512 + 1, 512, 2);
    ok(dr_zero(disk, 128 * KIB, 4 * KIB, 0, &err));
    ok(dr_discard(disk, 0, 512, &err));
    write_at(disk, SIZE - 512, 512, 3);
    ok(dr_close(disk, &err));
    struct text t = described(fs);
    assert_non_null(strstr(t.s, "coarse 65536 on 0+128 256+128 2048+8;"));
    disk = open_disk(fs); /* without a write nothing becomes of them */
    ok(dr_close(disk, &err));
    says(fs, t.s);
}

static void writes_zeros_and_discards_set_bits_that_a_clean_close_stores(void **state)
{
    (void)state;
    each_kind(notes);
}

static void set_exactly(struct dr_fs *fs)
{
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 4 * KIB, false);
    write_at(disk, 64 * KIB, 1, 1);
    write_at(disk, 72 * KIB - 1, 2, 1);
    ok(dr_close(disk, &err));
    says(fs, "b 4096 on 128+24;");
}

static void a_bit_is_set_where_a_byte_of_its_granule_is_written_and_nowhere_else(void **state)
{
    (void)state;
    each_kind(set_exactly);
}

static void a_disk_without_bitmaps_gets_no_file(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[0]);
    struct dr_disk *disk = open_disk(fs);
    write_at(disk, 0, 512, 1);
    ok(dr_close(disk, &err));
    assert_false(dr_fs_exists(fs, BESIDE));
    says(fs, "");
    dr_fs_memory_free(fs);
}

static void in_use(struct dr_fs *fs)
{
    struct dr_disk *disk = open_disk(fs);
    add(disk, "on", 512, false);
    add(disk, "off", 512, true);
    says(fs, "on 512 on;off 512 off;");
    write_at(disk, 0, 512, 1);
    says(fs, "on 512 on inconsistent;off 512 off inconsistent;");
    struct text t = describe(disk); /* who writes knows that what is disabled stays */
    assert_string_equal(t.s, "on 512 on inconsistent;off 512 off;");
    refused(dr_disk_bitmap_read(disk, "on", put_range, &t, &err), EUCLEAN, "inconsistent");
    ok(dr_close(disk, &err));
    says(fs, "on 512 on 0+1;off 512 off;");
}

static void while_the_disk_is_written_to_nobody_relies_on_enabled_bitmaps(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[0]);
    in_use(fs);
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ changes */

static void changes(struct dr_fs *fs, bool live)
{
    struct dr_disk *disk = open_disk(fs);
    add(disk, "a", 512, false);
    write_at(disk, 0, 512, 1);
    add(disk, "b", 512, true);
    write_at(disk, 512, 512, 1);
    if (!live) {
        ok(dr_close(disk, &err));
        says(fs, "a 512 on 0+2;b 512 off;");
        disk = open_disk(fs);
    }
    ok(change(disk, "b", DR_BITMAP_MERGE, "a", &err));
    ok(change(disk, "b", DR_BITMAP_ENABLE, NULL, &err));
    ok(change(disk, "a", DR_BITMAP_CLEAR, NULL, &err));
    write_at(disk, 4 * 512, 512, 1);
    ok(change(disk, "a", DR_BITMAP_DISABLE, NULL, &err));
    write_at(disk, 8 * 512, 512, 1);
    refused(change(disk, "a", DR_BITMAP_ADD, NULL, &err), EEXIST, "already exists");
    refused(change(disk, "x", DR_BITMAP_CLEAR, NULL, &err), ENOENT, "not found");
    refused(change(disk, "a", DR_BITMAP_MERGE, "x", &err), ENOENT, "not found");
    ok(dr_close(disk, &err));
    says(fs, "a 512 off 4+1;b 512 on 0+2 4+1 8+1;");
    disk = open_disk(fs);
    ok(change(disk, "a", DR_BITMAP_REMOVE, NULL, &err));
    write_at(disk, 12 * 512, 512, 1);
    ok(dr_close(disk, &err));
    says(fs, "b 512 on 0+2 4+1 8+1 12+1;");
    disk = open_disk(fs);
    ok(change(disk, "b", DR_BITMAP_REMOVE, NULL, &err));
    ok(dr_close(disk, &err));
    assert_false(dr_fs_exists(fs, BESIDE));
}

static void each_change_does_the_same_at_rest_and_after_writes(void **state)
{
    (void)state;
    for (unsigned live = 0; live < 2; live++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &kinds[0]);
        changes(fs, live);
        dr_fs_memory_free(fs);
    }
}

static void refuses_what_the_file_cannot_hold(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[0]);
    struct dr_disk *disk = open_disk(fs);
    struct dr_bitmap_options o = {.granularity = 4 * MIB};
    refused(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, &o, &err), EINVAL, "2 MiB");
    o.granularity = 1000;
    refused(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, &o, &err), EINVAL, "power of 2");
    o.granularity = 512;
    ok(dr_truncate(disk, UINT64_C(1) << 40, &err));
    refused(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, &o, &err), EFBIG, "granularity");
    o.granularity = 64 * KIB;
    ok(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, &o, &err));
    refused(dr_truncate(disk, UINT64_C(1) << 50, &err), EFBIG, "granularity");
    ok(dr_close(disk, &err));
    says(fs, "b 65536 on;");
    dr_fs_memory_free(fs);
}

static void resizes(struct dr_fs *fs)
{
    struct dr_disk *disk = open_disk(fs);
    add(disk, "on", 64 * KIB, false);
    write_at(disk, SIZE - 512, 512, 1);
    ok(change(disk, "on", DR_BITMAP_DISABLE, NULL, &err));
    ok(change(disk, "on", DR_BITMAP_ENABLE, NULL, &err));
    ok(dr_truncate(disk, 512 * KIB, &err));
    ok(dr_close(disk, &err));
    says(fs, "on 65536 on;");
    disk = open_disk(fs);
    ok(dr_truncate(disk, 640 * KIB, &err));
    ok(dr_close(disk, &err));
    says(fs, "on 65536 on 1024+256;");
}

static void what_a_disk_grows_by_counts_as_changed_and_what_it_loses_is_forgotten(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[0]);
    resizes(fs);
    dr_fs_memory_free(fs);
}

static void a_disk_that_loses_a_file_keeps_its_bitmaps(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[2]); /* in pieces */
    struct dr_disk *disk = open_disk(fs);
    ok(dr_truncate(disk, 2048ull * MIB, &err));
    add(disk, "b", 64 * KIB, false);
    ok(dr_close(disk, &err));
    disk = open_disk(fs);
    write_at(disk, 0, 512, 1);
    ok(dr_truncate(disk, MIB, &err));
    ok(dr_close(disk, &err));
    says(fs, "b 65536 on 0+128;");
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ where there is no place */

static void a_block_device_has_no_bitmaps_and_says_so(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_bitmap *list = NULL;
    size_t n;
    create(fs, &kinds[0]);
    ok(fs->ops->make_device(fs, PATH, &err));
    struct dr_disk *disk = open_disk(fs);
    refused(dr_disk_bitmaps(disk, &list, &n, &err), ENOTSUP, "block device");
    refused(dr_disk_bitmap_read(disk, "b", put_range, NULL, &err), ENOTSUP, "block device");
    refused(change(disk, "b", DR_BITMAP_ADD, NULL, &err), ENOTSUP, "Can't store");
    write_at(disk, 0, 512, 1);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
}

static void a_new_image_in_the_place_of_another_has_no_bitmaps_of_it(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[0]);
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 512, false);
    ok(dr_close(disk, &err));
    create(fs, &kinds[0]);
    says(fs, "");
    assert_false(dr_fs_exists(fs, BESIDE));
    dr_fs_memory_free(fs);
}

static int refuse_unlinking_bitmaps(void *user, const struct faultfs_io *io)
{
    (void)user;
    return io->kind == FAULTFS_UNLINK && strcmp(io->path, BESIDE) == 0 ? -EACCES : 0;
}

/* Where they cannot be unlinked, or the image is only moved into place by recover. */
static void bitmaps_that_outlive_their_image_are_not_trusted(void **state)
{
    (void)state;
    for (unsigned renames = 0; renames < 2; renames++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(fs);
        struct dr_error problem = DR_ERROR_INIT;
        create(fs, &kinds[2]);
        struct dr_disk *disk = open_disk(fs);
        add(disk, "b", 512, false);
        ok(dr_close(disk, &err));
        const struct dr_create_options o = {.format = "vmdk",
                                            .size = SIZE,
                                            .has_size = true,
                                            .pairs = kinds[2].pairs,
                                            .n_pairs = kinds[2].n_pairs};
        if (renames)
            faultfs_arm(f, &(struct faultfs_plan){.nth = 2, .kinds = 1u << FAULTFS_RENAME});
        else
            faultfs_observe(f, refuse_unlinking_bitmaps, NULL);
        int r = dr_create_fs(faultfs_fs(f), PATH, &o, &problem);
        assert_int_equal(r < 0, renames);
        faultfs_free(f);
        assert_true(dr_fs_exists(fs, BESIDE));
        if (renames)
            ok(dr_recover_fs(fs, PATH, NULL, false, NULL, NULL, NULL, &err));
        says(fs, renames ? "" : "b 512 on inconsistent;");
        assert_true(dr_fs_exists(fs, BESIDE) == !renames);
        dr_fs_memory_free(fs);
    }
}

static void removing_an_image_removes_its_bitmaps(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    const struct dr_open_options open = {0};
    create(fs, &kinds[2]);
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 512, false);
    ok(dr_close(disk, &err));
    ok(dr_ops_remove_image(fs, PATH, NULL, &open, NULL, NULL, &err));
    assert_false(dr_fs_exists(fs, BESIDE));
    dr_fs_memory_free(fs);
}

static void convert_copies_bitmaps_to_a_file_beside_the_target_and_back(void **state)
{
    (void)state;
    static const char *const formats[] = {"raw", "qcow2", "vmdk"};
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        const char *source = "/dir/source", *target = PATH;
        create(fs, &kinds[0]);
        struct dr_disk *disk = open_disk(fs);
        add(disk, "b", 512, false);
        write_at(disk, 512, 512, 1);
        ok(dr_close(disk, &err));
        struct dr_convert_options o = {.out_format = formats[i], .bitmaps = true};
        ok(dr_convert_fs(fs, &target, 1, source, &o, NULL, &err));
        o.out_format = formats[(i + 1) % 3];
        ok(dr_convert_fs(fs, &source, 1, target, &o, NULL, &err));
        says(fs, "b 512 on 1+1;");
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ trust */

static void overwrite(struct dr_fs *fs, const char *path, uint64_t off, const void *bytes,
                      size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, bytes, off, len, &err));
    dr_file_unref(f);
}

static void distrusted(struct dr_fs *fs)
{
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 512, false);
    ok(dr_close(disk, &err));
    uint8_t same[16];
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, 0, &f, &err));
    ok(dr_file_pread(f, same, 0, sizeof(same), &err));
    dr_file_unref(f);
    overwrite(fs, PATH, 0, same, sizeof(same));
    says(fs, "b 512 on inconsistent;");
    disk = open_disk(fs);
    refused(change(disk, "b", DR_BITMAP_CLEAR, NULL, &err), EUCLEAN, "inconsistent");
    write_at(disk, 0, 512, 1);
    ok(dr_close(disk, &err));
    says(fs, "b 512 on inconsistent;");
    disk = open_disk(fs);
    add(disk, "new", 512, false);
    write_at(disk, 512, 512, 1);
    ok(dr_close(disk, &err));
    says(fs, "b 512 on inconsistent;new 512 on 1+1;");
    disk = open_disk(fs);
    ok(change(disk, "b", DR_BITMAP_REMOVE, NULL, &err));
    ok(dr_close(disk, &err));
    says(fs, "new 512 on 1+1;");
}

static void a_write_by_another_program_makes_bitmaps_distrusted_until_they_are_removed(void **state)
{
    (void)state;
    each_kind(distrusted);
}

static void interrupted(struct dr_fs *fs)
{
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 512, false);
    write_at(disk, 0, 512, 1);
    dr_image_give_up(disk->chain->images[0]); /* it is closed without a flush */
    ok(dr_close(disk, &err));
    says(fs, "b 512 on inconsistent;");
    disk = open_disk(fs);
    write_at(disk, 512, 512, 1);
    add(disk, "new", 512, false);
    write_at(disk, 1024, 512, 1);
    ok(dr_close(disk, &err));
    says(fs, "b 512 on inconsistent;new 512 on 2+1;");
}

static void an_interrupted_writer_leaves_bitmaps_that_nobody_trusts(void **state)
{
    (void)state;
    each_kind(interrupted);
}

static void a_rebuilt_bitmap_has_exactly_the_ranges_and_is_trusted(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    create(fs, &kinds[0]);
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 4 * KIB, false);
    write_at(disk, 0, 64 * KIB, 1);
    dr_image_give_up(disk->chain->images[0]);
    ok(dr_close(disk, &err));
    says(fs, "b 4096 on inconsistent;");
    struct dr_marks *set = dr_noted_set(9, SIZE);
    dr_marks_set(set, 16 * KIB, 512);
    disk = open_disk(fs);
    ok(dr_image_bitmap_rebuild(disk->chain->images[0], "b", set, &err));
    refused(dr_image_bitmap_rebuild(disk->chain->images[0], "x", set, &err), ENOENT, "not found");
    ok(dr_close(disk, &err));
    says(fs, "b 4096 on 32+8;");
    dr_noted_set_free(set);
    dr_fs_memory_free(fs);
}

static void rebuilds(struct dr_fs *fs)
{
    const char *source = PATH;
    const struct dr_convert_options raw = {.out_format = "raw"};
    const struct dr_open_options read = {.format = "raw"};
    struct dr_disk *disk = open_disk(fs), *backup;
    write_at(disk, 0, 256 * KIB, 1);
    ok(dr_close(disk, &err));
    ok(dr_convert_fs(fs, &source, 1, "/dir/backup", &raw, NULL, &err));
    disk = open_disk(fs);
    add(disk, "b", 512, false);
    write_at(disk, 512, 512, 2);
    ok(dr_zero(disk, 64 * KIB, 64 * KIB, 0, &err));
    write_at(disk, SIZE - 512, 512, 3);
    write_at(disk, 200 * KIB, 512, 1); /* it had these bytes before */
    dr_image_give_up(disk->chain->images[0]);
    ok(dr_close(disk, &err));
    says(fs, "b 512 on inconsistent;");
    disk = open_disk(fs);
    write_at(disk, 512, 512, 2); /* perhaps it was lost */
    ok(dr_zero(disk, 64 * KIB, 64 * KIB, 0, &err));
    write_at(disk, SIZE - 512, 512, 3);
    ok(dr_open_fs(fs, "/dir/backup", &read, &backup, &err));
    refused(dr_disk_bitmap_rebuild(disk, "x", backup, NULL, &err), ENOENT, "not found");
    ok(dr_disk_bitmap_rebuild(disk, "b", backup, NULL, &err));
    ok(dr_close(backup, &err));
    write_at(disk, 10 * 512, 512, 4);
    ok(dr_close(disk, &err));
    says(fs, "b 512 on 1+1 10+1 128+128 2055+1;");
}

static void a_bitmap_rebuilt_against_a_backup_has_what_differs_and_goes_on(void **state)
{
    (void)state;
    each_kind(rebuilds);
    struct dr_fs *fs = dr_fs_memory_new(); /* inside an image it is the same */
    const struct kind inside = {.format = "qcow2"};
    create(fs, &inside);
    rebuilds(fs);
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ many writers */

enum { WRITERS = 4, ROUNDS = 60 };

struct writer {
    struct dr_disk *disk;
    unsigned seed;
};

static void *write_anywhere(void *user)
{
    struct writer *w = user;
    uint8_t sector[512];
    for (unsigned i = 0; i < ROUNDS; i++) {
        w->seed = w->seed * 1103515245u + 12345u;
        uint64_t off = (uint64_t)(w->seed >> 8) % (SIZE / 512) * 512;
        memset(sector, (int)(w->seed >> 3), sizeof(sector));
        if (i % 4 == 0)
            dr_zero(w->disk, off, 512, DR_MAY_UNMAP, NULL);
        else
            dr_pwrite(w->disk, sector, off, sizeof(sector), 0, NULL);
    }
    return NULL;
}

struct missing {
    const uint8_t *was, *is;
    uint64_t next;
};

static int check_between(void *user, uint64_t off, uint64_t len)
{
    struct missing *m = user;
    assert_memory_equal(m->was + m->next, m->is + m->next, off - m->next);
    m->next = off + len;
    return 0;
}

static void written_by_many(struct dr_fs *fs)
{
    static const uint64_t granularities[] = {512, 4 * KIB, 64 * KIB, 2 * MIB};
    struct dr_disk *disk = open_disk(fs);
    pthread_t threads[WRITERS];
    struct writer writers[WRITERS];
    uint64_t size;
    for (size_t i = 0; i < 4; i++)
        add(disk, (const char *[]){"a", "b", "c", "d"}[i], granularities[i], false);
    ok(dr_close(disk, &err));
    CLEANUP_FREE uint8_t *was = read_all(fs, &size);
    disk = open_disk(fs);
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){disk, i * 7919 + 1};
        assert_int_equal(pthread_create(&threads[i], NULL, write_anywhere, &writers[i]), 0);
    }
    for (unsigned i = 0; i < 4; i++) /* while they write */
        ok(change(disk, "d", DR_BITMAP_MERGE, "a", &err));
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    ok(dr_close(disk, &err));
    CLEANUP_FREE uint8_t *is = read_all(fs, &size);
    assert_memory_not_equal(was, is, size);
    ok(try_open(fs, 0, &disk, &err));
    for (size_t i = 0; i < 4; i++) {
        struct missing m = {was, is, 0};
        ok(dr_disk_bitmap_read(disk, (const char *[]){"a", "b", "c", "d"}[i], check_between, &m,
                               &err));
        check_between(&m, size, 0);
    }
    ok(dr_close(disk, &err));
}

static void bitmaps_of_every_granularity_have_all_that_many_threads_change(void **state)
{
    (void)state;
    each_kind(written_by_many);
}

/* ------------------------------------------------------------------ damage */

static uint8_t *content(struct dr_fs *fs, size_t *len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, BESIDE, 0, &f, &err));
    *len = (size_t)dr_file_size(f);
    uint8_t *all = malloc(*len);
    ok(dr_file_pread(f, all, 0, *len, &err));
    dr_file_unref(f);
    return all;
}

/* The bitmaps are as they were, or distrusted; or the file is said to be damaged, which keeps
 * nobody from the disk. */
static void check_damaged(struct dr_fs *fs, const char *expected, size_t at)
{
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    struct dr_disk *disk;
    struct dr_error why = DR_ERROR_INIT;
    ok(try_open(fs, 0, &disk, &err));
    int r = dr_disk_bitmaps(disk, &list, &n, &why);
    if (r == -EBADMSG) {
        assert_non_null(strstr(why.text, BESIDE));
        assert_non_null(strstr(why.text, "expect"));
    } else {
        assert_int_equal(r, 0);
        struct text t = describe(disk);
        if (strcmp(t.s, expected) != 0 && strcmp(t.s, "b 512 on inconsistent;") != 0)
            fail_msg("byte %zu: %s", at, t.s);
    }
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
}

static void a_damaged_byte_never_makes_another_bitmap_that_is_trusted(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    size_t len;
    create(fs, &kinds[0]);
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b", 512, false);
    write_at(disk, 512, 512, 1);
    ok(dr_close(disk, &err));
    struct text expected = described(fs);
    CLEANUP_FREE uint8_t *all = content(fs, &len);
    for (size_t at = 0; at < len; at = at == 511 ? 4096 : at == 4607 ? 8192 : at + 1) {
        uint8_t byte = all[at] ^ 0x41;
        overwrite(fs, BESIDE, at, &byte, 1);
        check_damaged(fs, expected.s, at);
        overwrite(fs, BESIDE, at, &all[at], 1);
    }
    says(fs, expected.s);
    const uint8_t nothing[4608] = {0};
    overwrite(fs, BESIDE, 0, nothing, sizeof(nothing));
    check_damaged(fs, "", 0);
    disk = open_disk(fs);
    write_at(disk, 0, 512, 1);
    refused(change(disk, "c", DR_BITMAP_ADD, NULL, &err), EBADMSG, "remove the file");
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(writes_zeros_and_discards_set_bits_that_a_clean_close_stores),
        cmocka_unit_test(a_bit_is_set_where_a_byte_of_its_granule_is_written_and_nowhere_else),
        cmocka_unit_test(a_disk_without_bitmaps_gets_no_file),
        cmocka_unit_test(while_the_disk_is_written_to_nobody_relies_on_enabled_bitmaps),
        cmocka_unit_test(each_change_does_the_same_at_rest_and_after_writes),
        cmocka_unit_test(refuses_what_the_file_cannot_hold),
        cmocka_unit_test(what_a_disk_grows_by_counts_as_changed_and_what_it_loses_is_forgotten),
        cmocka_unit_test(a_disk_that_loses_a_file_keeps_its_bitmaps),
        cmocka_unit_test(
            a_write_by_another_program_makes_bitmaps_distrusted_until_they_are_removed),
        cmocka_unit_test(a_block_device_has_no_bitmaps_and_says_so),
        cmocka_unit_test(a_new_image_in_the_place_of_another_has_no_bitmaps_of_it),
        cmocka_unit_test(bitmaps_that_outlive_their_image_are_not_trusted),
        cmocka_unit_test(removing_an_image_removes_its_bitmaps),
        cmocka_unit_test(convert_copies_bitmaps_to_a_file_beside_the_target_and_back),
        cmocka_unit_test(an_interrupted_writer_leaves_bitmaps_that_nobody_trusts),
        cmocka_unit_test(a_rebuilt_bitmap_has_exactly_the_ranges_and_is_trusted),
        cmocka_unit_test(a_bitmap_rebuilt_against_a_backup_has_what_differs_and_goes_on),
        cmocka_unit_test(bitmaps_of_every_granularity_have_all_that_many_threads_change),
        cmocka_unit_test(a_damaged_byte_never_makes_another_bitmap_that_is_trusted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
