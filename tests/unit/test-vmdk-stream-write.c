/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing streamOptimized images: what is written, and that it reads back the same. */
#include "base/codec.h"
#include "formats/vmdk/stream.h"
#include "test-ops.h"

#define GRAIN 65536u

static int to_stream(struct dr_fs *fs, const char *const *from, size_t n, const char *to,
                     const char *level, struct dr_error *error)
{
    struct dr_pair pairs[2] = {{"subformat", "streamOptimized"}, {"compression_level", level}};
    struct dr_convert_options o = {.out_format = "vmdk",
                                   .sparse_size = DR_CONVERT_SPARSE_DEFAULT,
                                   .pairs = pairs,
                                   .n_pairs = level ? 2 : 1};
    return dr_convert_fs(fs, from, n, to, &o, NULL, error);
}

static void source(struct dr_fs *fs, const char *path, uint64_t size)
{
    static uint8_t noise[3 * GRAIN];
    uint32_t x = 1;
    for (size_t i = 0; i < sizeof(noise); i++)
        noise[i] = (uint8_t)((x = x * 1664525 + 1013904223) >> 24);
    make(fs, path, "raw", size, NULL);
    put(fs, path, 0, 100, 0x11);
    put(fs, path, 5 * GRAIN - 7, GRAIN, 0x22);
    struct dr_file *f;
    ok(dr_file_open(fs, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, noise, 20 * GRAIN, sizeof(noise), &err)); /* does not get smaller */
    dr_file_unref(f);
    put(fs, path, 33 * MiB + 5, 9, 0x33); /* in the second table */
    put(fs, path, size - 3, 3, 0x44);
}

static void what_is_written_reads_back(void **state)
{
    /* whole grains, a cut one, a disk that ends with its second table */
    static const uint64_t sizes[] = {70 * MiB, 64 * MiB + 1536, 64 * MiB};
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < 3; i++) {
        const char *from = "a.raw";
        uint64_t size;
        fs->ops->unlink(fs, "a.raw", NULL);
        source(fs, "a.raw", sizes[i]);
        uint8_t *want = view(fs, "a.raw", &size);
        ok(to_stream(fs, &from, 1, "s.vmdk", i == 0 ? "1" : NULL, &err)); /* over the one before */
        same_view(fs, "s.vmdk", want, size);
        assert_int_equal(count_files(fs), 2);
        free(want);
    }
}

/* Reads like one who has nothing but the bytes, one after another. */
static void the_form_is_the_one_that_esxi_takes(void **state)
{
    struct dr_fs *fs = *state;
    const char *from = "a.raw";
    size_t len, tables = 0, grains = 0;
    struct vmdk_header h, foot;
    uint64_t last = 0, at;
    static const uint8_t zeros[512];
    source(fs, "a.raw", 70 * MiB);
    ok(to_stream(fs, &from, 1, "s.vmdk", NULL, &err));
    uint8_t *all = file_bytes(fs, "s.vmdk", &len);
    ok(vmdk_header_decode(&h, "s.vmdk", all, len, &err));
    assert_int_equal(h.version, 3);
    assert_int_equal(h.flags, 0x30001);
    assert_true(h.gd_off == VMDK_GD_AT_END);
    assert_int_equal(h.desc_off, 1);
    assert_int_equal(h.desc_len, 20);
    assert_int_equal(h.overhead, 128);
    const char *text = (const char *)all + 512;
    assert_true(strncmp(text, "# Disk DescriptorFile\nversion=1\nCID=", 36) == 0);
    assert_non_null(strstr(text, "createType=\"streamOptimized\"\n\n# Extent description\nRDONLY "
                                 "143360 SPARSE \"s.vmdk\"\n\n# The Disk Data Base \n#DDB\n"));
    assert_non_null(strstr(text, "ddb.toolsVersion = \"2147483647\""));
    assert_non_null(strstr(text, "ddb.adapterType = \"lsilogic\""));
    for (at = 128 * 512;;) {
        struct vmdk_marker m = vmdk_marker_decode(all + at);
        assert_true(at + 512 <= len);
        if (m.size > 0) {
            assert_true(grains == 0 || m.val > last);
            assert_true(dr_is_zlib(all + at + 12, 2));
            last = m.val;
            grains++;
            at += vmdk_coded_sectors(m.size) * 512;
            continue;
        }
        if (m.type == VMDK_MARKER_GD)
            break;
        assert_int_equal(m.type, VMDK_MARKER_GT);
        assert_int_equal(m.val, 4);
        tables++;
        at += 5 * 512;
    }
    assert_int_equal(tables, 3);
    assert_int_equal(grains, 1 + 2 + 3 + 1 + 1);
    assert_int_equal(at + 5 * 512, len); /* directory, footer, end of stream */
    assert_int_equal(vmdk_marker_decode(all + at + 1024).type, VMDK_MARKER_FOOTER);
    ok(vmdk_header_decode(&foot, "s.vmdk", all + at + 1536, len, &err));
    assert_int_equal(foot.gd_off, at / 512 + 1);
    foot.gd_off = h.gd_off;
    assert_memory_equal(&foot, &h, sizeof(h));
    assert_memory_equal(all + len - 512, zeros, 512);
    free(all);
}

static void several_sources_share_the_grain_where_they_meet(void **state)
{
    struct dr_fs *fs = *state;
    const char *from[] = {"a.raw", "b.raw", "c.raw"};
    uint64_t size;
    make(fs, "a.raw", "raw", 100 * KiB + 100, NULL);
    make(fs, "b.raw", "raw", 1024, NULL);
    make(fs, "c.raw", "raw", 200 * KiB, NULL);
    put(fs, "a.raw", 99 * KiB, 1124, 0x11);
    put(fs, "b.raw", 0, 1024, 0x22);
    put(fs, "c.raw", 0, 512, 0x33);
    put(fs, "c.raw", 150 * KiB, 50 * KiB, 0x44);
    struct dr_convert_options o = {.sparse_size = DR_CONVERT_SPARSE_DEFAULT};
    ok(dr_convert_fs(fs, from, 3, "want.raw", &o, NULL, &err));
    uint8_t *want = view(fs, "want.raw", &size);
    ok(to_stream(fs, from, 3, "s.vmdk", NULL, &err));
    same_view(fs, "s.vmdk", want, size);
    free(want);
}

static void an_empty_stream_is_created(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_option option = {"subformat", "streamoptimized"};
    struct dr_create_params p = {.size = 40 * MiB, .options = &option, .n_options = 1};
    uint8_t *want = calloc(1, 40 * MiB);
    ok(dr_format_vmdk.create(fs, "s.vmdk", &p, &err));
    same_view(fs, "s.vmdk", want, 40 * MiB);
    free(want);
}

static void settings_that_make_no_stream_are_refused(void **state)
{
    static const struct {
        const char *name, *value, *why;
    } cases[] = {
        {"compression_level", "0", "expected 1 to 12"},
        {"compression_level", "13", "expected 1 to 12"},
        {"compression_level", "6x", "expected 1 to 12"},
        {"zeroed_grain", "on", "no zeroed grains"},
    };
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_option options[2] = {{"subformat", "streamOptimized"},
                                       {cases[i].name, cases[i].value}};
        struct dr_create_params p = {.size = MiB, .options = options, .n_options = 2};
        refused(dr_format_vmdk.create(fs, "s.vmdk", &p, &err), EINVAL, cases[i].why);
    }
    struct dr_option level = {"compression_level", "3"};
    struct dr_create_params p = {.size = MiB, .options = &level, .n_options = 1};
    refused(dr_format_vmdk.create(fs, "s.vmdk", &p, &err), EINVAL, "streamOptimized only");
    assert_int_equal(count_files(fs), 0);
}

static int set_up(void **state)
{
    *state = dr_fs_memory_new();
    return *state ? 0 : -1;
}

static int tear_down(void **state)
{
    dr_fs_memory_free(*state);
    return 0;
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(what_is_written_reads_back),
        TEST(the_form_is_the_one_that_esxi_takes),
        TEST(several_sources_share_the_grain_where_they_meet),
        TEST(an_empty_stream_is_created),
        TEST(settings_that_make_no_stream_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
