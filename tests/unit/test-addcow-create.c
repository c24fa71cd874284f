/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Making add-cow images beside or around files that exist; check and info; the last revision, which
 * is only read. */
#include <stdio.h>

#include "formats/addcow/addcow.h"
#include "test-addcow.h"

static int create(struct dr_fs *fs, const char *path, uint64_t size, const char *backing,
                  const char *options, struct dr_error *err)
{
    struct dr_pair pairs[4];
    char text[256];
    size_t n = 0;
    snprintf(text, sizeof(text), "%s", options ? options : "");
    for (char *p = text, *one; (one = strsep(&p, ",")) && *one;) {
        char *value = strchr(one, '=');
        *value++ = 0;
        pairs[n++] = (struct dr_pair){one, value};
    }
    struct dr_create_options o = {.format = "add-cow",
                                  .size = size,
                                  .has_size = size != 0,
                                  .backing = backing,
                                  .backing_format = backing ? "raw" : NULL,
                                  .pairs = pairs,
                                  .n_pairs = n};
    return dr_create_fs(fs, path, &o, err);
}

static void view_is(struct dr_fs *fs, const char *path, uint64_t off, size_t len, int byte)
{
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    reads(disk, off, len, byte);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ the image file */

static void the_raw_file_is_made_with_the_parents_size(void **state)
{
    struct dr_fs *fs = *state;
    put_pattern(fs, "base", 100001, 0xbb);
    ok(create(fs, "disk.add-cow", 0, "base", NULL, &err));
    assert_int_equal(file_len(fs, "disk.raw"), 100001);
    ok(create(fs, "other", 0, "base", NULL, &err));
    assert_int_equal(file_len(fs, "other.raw"), 100001);
    ok(create(fs, "big.add-cow", MiB, "base", "image_file=mine,layout=v7", &err));
    assert_int_equal(file_len(fs, "mine"), MiB);
    view_is(fs, "big.add-cow", 0, 100001, 0xbb);
    view_is(fs, "big.add-cow", 100001, 1000, 0);
    assert_int_equal(count_files(fs), 7);
}

static void an_image_file_with_data_is_not_taken(void **state)
{
    struct dr_fs *fs = *state;
    size_t len;
    put_pattern(fs, "base", 65536, 0xbb);
    put_pattern(fs, "disk.raw", 65536, 0xee);
    refused(create(fs, "disk.add-cow", 0, "base", NULL, &err), EEXIST, "exists and holds data");
    refused(create(fs, "disk.add-cow", 4096, "base", NULL, &err), EINVAL,
            "has 65536 bytes, the disk is to have 4096");
    assert_false(exists(fs, "disk.add-cow"));
    uint8_t *bytes = file_bytes(fs, "disk.raw", &len);
    assert_int_equal(len, 65536);
    assert_true(bytes[0] == 0xee && bytes[65535] == 0xee);
    free(bytes);
    ok(create(fs, "disk.add-cow", 0, "base", "reuse=on", &err));
    view_is(fs, "disk.add-cow", 0, 65536, 0xbb);
}

static void an_empty_image_file_is_taken(void **state)
{
    struct dr_fs *fs = *state;
    put_pattern(fs, "base", 65536, 0xbb);
    put_sparse(fs, "disk.raw", 65536);
    ok(create(fs, "disk.add-cow", 0, "base", NULL, &err));
    view_is(fs, "disk.add-cow", 0, 65536, 0xbb);
}

/* Without a parent, what is in the raw file is the disk. */
static void a_raw_disk_is_adopted(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_file *f = NULL;
    put_sparse(fs, "disk.raw", MiB + 700);
    ok(dr_file_open(fs, "disk.raw", DR_FILE_RDWR, &f, &err));
    uint8_t buf[4096];
    memset(buf, 0xaa, sizeof(buf));
    ok(dr_file_pwrite(f, buf, 65536, sizeof(buf), &err));
    ok(dr_file_pwrite(f, buf, MiB, 700, &err));
    dr_file_unref(f);
    ok(create(fs, "disk.add-cow", MiB + 700, NULL, NULL, &err));
    view_is(fs, "disk.add-cow", 0, 65536, 0);
    view_is(fs, "disk.add-cow", 65536, 4096, 0xaa);
    view_is(fs, "disk.add-cow", 65536 + 4096, 4096, 0);
    view_is(fs, "disk.add-cow", MiB, 700, 0xaa);
    assert_true(bit_in_file(fs, "disk.add-cow", 128) && !bit_in_file(fs, "disk.add-cow", 127));
    assert_false(bit_in_file(fs, "disk.add-cow", 136));
    fs->ops->unlink(fs, "disk.add-cow", NULL);
    ok(create(fs, "disk.add-cow", MiB + 700, NULL, "reuse=on", &err));
    view_is(fs, "disk.add-cow", 0, MiB + 700, 0);
}

static void the_three_files_must_differ(void **state)
{
    struct dr_fs *fs = *state;
    put_pattern(fs, "base", 65536, 0xbb);
    refused(create(fs, "disk.add-cow", 0, "base", "image_file=disk.add-cow", &err), EINVAL,
            "would be the metadata file itself");
    refused(create(fs, "disk.add-cow", 0, "base", "image_file=base,reuse=on", &err), EINVAL,
            "is also its backing file");
    refused(create(fs, "disk.add-cow", 0, "base", "image_file=", &err), EINVAL, "is empty");
    assert_int_equal(count_files(fs), 1);
}

static void unknown_options_are_refused(void **state)
{
    struct dr_fs *fs = *state;
    refused(create(fs, "a", 4096, NULL, "layout=v20", &err), ENOTSUP, "can only be read");
    refused(create(fs, "a", 4096, NULL, "layout=v8", &err), EINVAL, "none of the known layouts");
    refused(create(fs, "a", 4096, NULL, "reuse=maybe", &err), EINVAL, "neither on nor off");
    refused(create(fs, "a", 4096, NULL, "cluster_size=65536", &err), EINVAL,
            "unknown create option 'cluster_size'");
    refused(create(fs, "a", (uint64_t)INT64_MAX - 10, NULL, NULL, &err), EFBIG, "more than a disk");
    assert_int_equal(count_files(fs), 0);
}

static void a_vmdk_refuses_an_add_cow_parent(void **state)
{
    struct dr_fs *fs = *state;
    ok(create(fs, "p.add-cow", 65536, NULL, NULL, &err));
    struct dr_create_options o = {
        .format = "vmdk", .backing = "p.add-cow", .backing_format = "add-cow"};
    refused(dr_create_fs(fs, "c.vmdk", &o, &err), EINVAL, "parent must be a VMDK, not add-cow");
}

/* ------------------------------------------------------------------ check, info */

static json_t *info_of(struct dr_fs *fs, const char *path)
{
    struct dr_image *image = NULL;
    json_t *data = json_object();
    uint64_t cluster;
    ok(dr_image_open(fs, path, NULL, 0, &image, &err));
    ok(image->fmt->info(image, data, &cluster, &err));
    assert_int_equal(cluster, 512);
    dr_image_unref(image, NULL);
    return data;
}

/* Only what lies in the metadata's own directory moves with it. */
static void an_image_file_elsewhere_keeps_its_whole_name(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_pair pair = {"image_file", "/elsewhere/raw"};
    struct dr_create_options o = {.format = "add-cow",
                                  .size = 65536,
                                  .has_size = true,
                                  .pairs = &pair,
                                  .n_pairs = 1,
                                  .flags = DR_OPEN_ANY_PATH};
    ok(dr_create_fs(fs, "/d/a", &o, &err));
    struct dr_image *image = NULL;
    ok(dr_image_open(fs, "/d/a", NULL, DR_OPEN_ANY_PATH, &image, &err));
    json_t *data = json_object();
    uint64_t cluster;
    ok(image->fmt->info(image, data, &cluster, &err));
    assert_string_equal(json_string_value(json_object_get(data, "image-file")), "/elsewhere/raw");
    json_decref(data);
    dr_image_unref(image, NULL);
}

static void info_tells_how_much_is_copied_in(void **state)
{
    struct dr_fs *fs = *state;
    put_pattern(fs, "base", 100001, 0xbb);
    ok(create(fs, "d.add-cow", 0, "base", NULL, &err));
    put(fs, "d.add-cow", 1000, 5000, 1); /* sectors 1 to 11 */
    put(fs, "d.add-cow", 100000, 1, 1);
    json_t *data = info_of(fs, "d.add-cow");
    assert_string_equal(json_string_value(json_object_get(data, "layout")), "v7");
    assert_string_equal(json_string_value(json_object_get(data, "image-file")), "d.raw");
    assert_int_equal(json_integer_value(json_object_get(data, "copied-in")), 12 * 512);
    assert_true(json_is_false(json_object_get(data, "all-copied-in")));
    json_decref(data);
    put(fs, "d.add-cow", 0, 100001, 2);
    data = info_of(fs, "d.add-cow");
    assert_int_equal(json_integer_value(json_object_get(data, "copied-in")), 100001);
    assert_true(json_is_true(json_object_get(data, "all-copied-in")));
    json_decref(data);
}

static void note_line(void *user, const char *line)
{
    snprintf(user, 256, "%s", line);
}

static struct dr_check_result check(struct dr_fs *fs, const char *path, unsigned fix, char *said)
{
    struct dr_image *image = NULL;
    struct dr_check_result result = {.report = note_line, .user = said};
    said[0] = 0;
    ok(dr_image_open(fs, path, NULL, fix ? DR_OPEN_RDWR : 0, &image, &err));
    ok(image->fmt->check(image, fix, &result, &err));
    dr_image_unref(image, NULL);
    return result;
}

static void check_finds_bits_behind_the_end(void **state)
{
    struct dr_fs *fs = *state;
    char said[256];
    put_pattern(fs, "raw", 5000, 0xaa); /* 10 sectors */
    put_v7(fs, "a", "", "raw", "\xff\x0f\x03", 3);
    struct dr_check_result r = check(fs, "a", 0, said);
    assert_int_equal(r.corruptions, 4);
    assert_non_null(strstr(said, "for a disk of 12288 bytes, 4 of them set behind the end"));
    assert_int_equal(r.allocated_clusters, 10);
    assert_int_equal(r.total_clusters, 10);
    r = check(fs, "a", DR_CHECK_FIX_LEAKS, said);
    assert_int_equal(r.corruptions, 4);
    r = check(fs, "a", DR_CHECK_FIX_ALL, said);
    assert_int_equal(r.corruptions, 0);
    assert_int_equal(r.corruptions_fixed, 4);
    assert_int_equal(file_len(fs, "a"), V7_HEADER + 2);
    r = check(fs, "a", 0, said);
    assert_int_equal(r.corruptions, 0);
    assert_string_equal(said, "");
    view_is(fs, "a", 0, 5000, 0xaa);
}

/* The bits that were in memory before the repair are forgotten. */
static void a_repair_by_check_is_not_undone_by_the_next_write(void **state)
{
    struct dr_fs *fs = *state;
    char said[256] = "";
    static const unsigned fix[] = {0, DR_CHECK_FIX_ALL, 0};
    static const uint64_t corruptions[] = {4, 0, 0};
    struct dr_disk *disk = NULL;
    put_pattern(fs, "raw", 5000, 0xaa);
    put_v7(fs, "a", "", "raw", "\xfe\x0f\x03", 3);
    ok(open_flags(fs, "a", DR_OPEN_RDWR, &disk, &err));
    struct dr_image *image = disk->chain->images[0];
    for (int i = 0; i < 3; i++) {
        struct dr_check_result result = {.report = note_line, .user = said};
        reads(disk, 4608, 392, 0xaa); /* which loads the page of the bits behind the end */
        ok(image->fmt->check(image, fix[i], &result, &err));
        assert_int_equal(result.corruptions, corruptions[i]);
    }
    ok(dr_pwrite(disk, "new", 0, 3, 0, &err)); /* this bit and those stood in one sector */
    ok(dr_close(disk, &err));
    assert_int_equal(check(fs, "a", 0, said).corruptions, 0);
}

/* Nothing else tells how long the image file should be. */
static void check_notices_a_raw_file_that_was_cut(void **state)
{
    struct dr_fs *fs = *state;
    char said[256];
    ok(create(fs, "d.add-cow", 64 * MiB, NULL, NULL, &err));
    put_sparse(fs, "d.raw", 10 * MiB);
    assert_int_equal(check(fs, "d.add-cow", 0, said).corruptions, 1);
    assert_non_null(strstr(said, "has bits for a disk of 67108864 bytes"));
    assert_non_null(strstr(said, "d.raw at 10485760: that was cut"));
    assert_int_equal(check(fs, "d.add-cow", DR_CHECK_FIX_ALL, said).corruptions_fixed, 1);
    check(fs, "d.add-cow", 0, said);
    assert_string_equal(said, "");
}

/* What lies under a bit that is 0 is not seen, but takes space. */
static void check_gives_back_what_nobody_sees(void **state)
{
    struct dr_fs *fs = *state;
    char said[256];
    ok(create(fs, "d.add-cow", MiB, NULL, NULL, &err));
    struct dr_disk *disk = NULL;
    ok(open_flags(fs, "d.add-cow", DR_OPEN_RDWR, &disk, &err));
    write_at(disk, 64 * KiB, 512, 1);
    ok(dr_close(disk, &err));
    check(fs, "d.add-cow", 0, said);
    assert_string_equal(said, ""); /* the block it lies in is its own */
    struct dr_file *raw;
    ok(dr_file_open(fs, "d.raw", DR_FILE_RDWR, &raw, &err));
    ok(dr_file_pwrite(raw, "junk", 60 * KiB, 4, &err));
    for (unsigned i = 0; i < 16; i++)
        ok(dr_file_pwrite(raw, "junk", 512 * KiB + i * 4096, 4, &err));
    dr_file_unref(raw);
    struct dr_check_result r = check(fs, "d.add-cow", 0, said);
    assert_int_equal(r.leaks, 0); /* somebody may want to have the space beforehand */
    assert_non_null(strstr(said, "69632 bytes of its image file"));
    assert_non_null(strstr(said, "from offset 61440 on"));
    r = check(fs, "d.add-cow", DR_CHECK_FIX_LEAKS, said);
    assert_int_equal(r.leaks, 0);
    assert_int_equal(r.leaks_fixed, 17 * 8);
    check(fs, "d.add-cow", 0, said);
    assert_string_equal(said, "");
    view_is(fs, "d.add-cow", 64 * KiB, 512, 1);
}

/* The holes of a bitmap for terabytes are skipped, not read. */
static void a_huge_disk_costs_little(void **state)
{
    struct dr_fs *fs = *state;
    char said[256];
    uint64_t size = UINT64_C(1) << 50;
    ok(create(fs, "d.add-cow", size, NULL, NULL, &err));
    struct dr_disk *disk = NULL;
    ok(open_flags(fs, "d.add-cow", DR_OPEN_RDWR, &disk, &err));
    write_at(disk, size - 4096, 4096, 1);
    write_at(disk, size / 2 - 100, 200, 2);
    reads(disk, size - 4096, 4096, 1);
    ok(dr_close(disk, &err));
    struct dr_check_result r = check(fs, "d.add-cow", 0, said);
    assert_int_equal(r.allocated_clusters, 10);
    assert_int_equal(r.total_clusters, size / 512);
    assert_true(disk_size(fs, "d.add-cow") < 64 * KiB);
}

/* An empty disk has no bits: what it grows by would show the parent. */
static void an_empty_disk_grows_only_without_a_parent(void **state)
{
    struct dr_fs *fs = *state;
    static const size_t parents[] = {0, 1, 5000};
    for (size_t i = 0; i < 3; i++) {
        struct dr_disk *disk = NULL;
        put_pattern(fs, "base", parents[i], 0xbb);
        put_pattern(fs, "raw", 0, 0);
        put_v7(fs, "a", i == 0 ? "" : "base", "raw", "", 0);
        ok(open_flags(fs, "a", DR_OPEN_RDWR, &disk, &err));
        if (i == 0)
            ok(dr_truncate(disk, 5000, &err));
        else
            refused(dr_truncate(disk, 5000, &err), EINVAL, "cannot grow");
        ok(dr_close(disk, &err));
    }
}

/* ------------------------------------------------------------------ the last revision */

struct v20 {
    uint32_t backing_off, backing_len, image_off, image_len, bits;
    uint64_t features, compat;
    uint32_t header_size;
    const char *backing_fmt, *image_fmt;
};

static const struct v20 good = {76, 4, 80, 3, 12, 0, 0, 4096, "raw", "raw"};

/* Sectors of 4 KiB: the bits of one byte. */
static void put_v20(struct dr_fs *fs, const struct v20 *v, uint8_t bits)
{
    uint8_t h[8192] = {'A', 'C', 'O', 'W'};
    put_le32(h + 4, v->backing_off);
    put_le32(h + 8, v->backing_len);
    put_le32(h + 12, v->image_off);
    put_le32(h + 16, v->image_len);
    put_le32(h + 20, v->bits);
    put_le64(h + 24, v->features);
    put_le64(h + 32, v->compat);
    put_le32(h + 40, v->header_size);
    memcpy(h + 44, v->backing_fmt, strlen(v->backing_fmt));
    memcpy(h + 60, v->image_fmt, strlen(v->image_fmt));
    memcpy(h + 76, "baseraw", 7);
    h[4096] = bits;
    put_file(fs, "a", h, sizeof(h));
    put_pattern(fs, "raw", 20000, 0xaa);
    put_pattern(fs, "base", 20000, 0xbb);
}

static void the_last_revision_is_read(void **state)
{
    struct dr_fs *fs = *state;
    put_v20(fs, &good, 0x12);
    view_is(fs, "a", 0, 4096, 0xbb);
    view_is(fs, "a", 4096, 4096, 0xaa);
    view_is(fs, "a", 8192, 8192, 0xbb);
    view_is(fs, "a", 16384, 20000 - 16384, 0xaa);
    struct v20 v = good;
    v.compat = 1; /* all allocated: bits and parent are ignored */
    put_v20(fs, &v, 0);
    fs->ops->unlink(fs, "base", NULL);
    view_is(fs, "a", 0, 20000, 0xaa);
    v = good;
    v.backing_off = v.backing_len = 0;
    v.compat = 0xfe; /* other bits mean nothing */
    put_v20(fs, &v, 0x12);
    view_is(fs, "a", 0, 4096, 0);
    view_is(fs, "a", 4096, 4096, 0xaa);
    static const char *const raw_formats[] = {"", "raw", "host_device"};
    for (size_t i = 0; i < 3; i++) {
        v.image_fmt = raw_formats[i];
        put_v20(fs, &v, 0x12);
        view_is(fs, "a", 4096, 4096, 0xaa);
    }
}

static void the_last_revision_is_not_written(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    struct dr_image *image = NULL;
    put_v20(fs, &good, 0x12);
    refused(open_flags(fs, "a", DR_OPEN_RDWR, &disk, &err), EROFS, "can only be read; convert it");
    ok(dr_image_open(fs, "a", NULL, 0, &image, &err));
    ok(dr_image_thaw(image, true, &err)); /* as commit does with a parent */
    refused(dr_image_begin(image, 0, false, &err), EROFS, "can only be read");
    refused(image->fmt->resize(image, 40000, 0, &err), EROFS, "can only be read");
    refused(image->fmt->set_backing(image, NULL, "x", "raw", 0, &err), EROFS, "can only be read");
    refused(image->fmt->trim(image, &err), EROFS, "can only be read");
    ok(dr_image_freeze(image, &err));
    dr_image_unref(image, NULL);
    view_is(fs, "a", 0, 4096, 0xbb);
}

static void damage_to_the_last_revision_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    static const struct {
        struct v20 v;
        int errnum;
        const char *word;
    } cases[] = {
        {{14, 4, 80, 3, 12, 0, 0, 4096, "", ""}, ENOTSUP, "drafts v14 to v17 (version 14)"},
        {{76, 4, 80, 3, 8, 0, 0, 4096, "", ""}, ENOTSUP, "fit no layout"},
        {{76, 4, 80, 3, 22, 0, 0, 1 << 22, "", ""}, ENOTSUP, "fit no layout"},
        {{76, 4, 80, 3, 12, 0, 0, 8192, "", ""}, ENOTSUP, "fit no layout"},
        {{76, 4, 80, 3, 12, 4, 0, 4096, "", ""}, ENOTSUP, "unknown features 0x4"},
        {{76, 4, 80, 3, 12, 0, 0, 4096, "raw", "qcow2"}, ENOTSUP, "format \"qcow2\", only raw"},
        {{76, 0, 80, 3, 12, 0, 0, 4096, "", ""}, EINVAL, "name of its backing file"},
        {{76, 4021, 80, 3, 12, 0, 0, 4096, "", ""}, EINVAL, "not inside the header"},
        {{4095, 2, 80, 3, 12, 0, 0, 4096, "", ""}, EINVAL, "not inside the header"},
        {{76, UINT32_MAX, 80, 3, 12, 0, 0, 4096, "", ""}, EINVAL, "not inside the header"},
        {{76, 4, 0, 0, 12, 0, 0, 4096, "", ""}, EINVAL, "names no image_file"},
        {{76, 4, 40, 3, 12, 0, 0, 4096, "", ""}, EINVAL, "name of its image file"},
        {{76, 4, 80, 9, 12, 0, 0, 4096, "", ""}, EINVAL, "image file has a NUL inside"},
        {{76, 4, 76, 4, 12, 0, 0, 4096, "raw", "raw"}, EINVAL, "holds the data of a"},
        {{76, 4, 80, 3, 14, 0, 0, 16384, "raw", "raw"}, EINVAL, "cut short: 8192 bytes"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        put_v20(fs, &cases[i].v, 0x12);
        unopenable(fs, "a", cases[i].errnum, cases[i].word);
    }
}

static void every_length_of_the_last_revision_is_told(void **state)
{
    struct dr_fs *fs = *state;
    uint8_t h[4096];
    put_v20(fs, &good, 0x12);
    get_file(fs, "a", h, 0, sizeof(h));
    for (size_t len = 4; len < sizeof(h); len++) {
        put_file(fs, "a", h, len);
        unopenable(fs, "a", EINVAL, "cut short");
    }
}

/* ------------------------------------------------------------------ words of bits */

static void runs_are_counted_as_bit_by_bit(void **state)
{
    (void)state;
    uint64_t seed = 4711;
    uint8_t p[64];
    for (int round = 0; round < 20000; round++) {
        uint64_t from = next_random(&seed) % 512, to = next_random(&seed) % 512;
        bool on = next_random(&seed) & 1, set;
        memset(p, on ? 0xff : 0, sizeof(p));
        addcow_edit_bits(p, dr_min(from, to), dr_max(from, to), !on);
        if (next_random(&seed) % 4 == 0)
            p[next_random(&seed) % 64] ^= (uint8_t)next_random(&seed);
        uint64_t first = next_random(&seed) % 511,
                 end = first + 1 + next_random(&seed) % (512 - first);
        uint64_t n = first;
        bool want = p[first / 8] >> first % 8 & 1;
        while (n < end && (p[n / 8] >> n % 8 & 1) == want)
            n++;
        assert_int_equal(addcow_run(p, first, end, &set), n - first);
        assert_int_equal(set, want);
    }
}

static void bits_are_edited_one_by_one_alike(void **state)
{
    (void)state;
    for (unsigned first = 0; first <= 40; first++)
        for (unsigned end = first; end <= 40; end++)
            for (int set = 0; set < 2; set++) {
                uint8_t a[6] = {0x5a, 0xa5, 0x3c, 0xff, 0, 0x77}, b[6];
                memcpy(b, a, sizeof(b));
                for (unsigned i = first; i < end; i++)
                    b[i / 8] = (uint8_t)(set ? b[i / 8] | 1u << i % 8 : b[i / 8] & ~(1u << i % 8));
                addcow_edit_bits(a, first, end, set);
                assert_memory_equal(a, b, sizeof(a));
            }
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, new_fs, free_fs)
    const struct CMUnitTest tests[] = {
        T(the_raw_file_is_made_with_the_parents_size),
        T(an_image_file_with_data_is_not_taken),
        T(an_empty_image_file_is_taken),
        T(a_raw_disk_is_adopted),
        T(the_three_files_must_differ),
        T(unknown_options_are_refused),
        T(a_vmdk_refuses_an_add_cow_parent),
        T(an_image_file_elsewhere_keeps_its_whole_name),
        T(info_tells_how_much_is_copied_in),
        T(check_finds_bits_behind_the_end),
        T(a_repair_by_check_is_not_undone_by_the_next_write),
        T(check_notices_a_raw_file_that_was_cut),
        T(check_gives_back_what_nobody_sees),
        T(a_huge_disk_costs_little),
        T(an_empty_disk_grows_only_without_a_parent),
        T(the_last_revision_is_read),
        T(the_last_revision_is_not_written),
        T(damage_to_the_last_revision_is_refused),
        T(every_length_of_the_last_revision_is_told),
        T(runs_are_counted_as_bit_by_bit),
        T(bits_are_edited_one_by_one_alike),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
