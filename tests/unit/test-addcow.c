/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* add-cow's header: what is written byte for byte, what is read, what is refused and with which
 * words. */
#include <stdio.h>

#include "formats/addcow/addcow.h"
#include "test-addcow.h"

#define SIZE (8u * KiB)

/* A good image of 8 KiB: sector 0 from the raw file (0xaa), the rest from the parent (0xbb). */
static void put_pair(struct dr_fs *fs)
{
    put_pattern(fs, "raw", SIZE, 0xaa);
    put_pattern(fs, "base", SIZE, 0xbb);
    put_v7(fs, "a", "base", "raw", "\1\0", 2);
}

/* The good header with these bytes at off. */
static void poke(struct dr_fs *fs, size_t off, const void *bytes, size_t len)
{
    struct dr_file *f = NULL;
    put_pair(fs);
    ok(dr_file_open(fs, "a", DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, bytes, off, len, &err));
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ version 1 */

static void create_writes_this_header(void **state)
{
    struct dr_fs *fs = *state;
    uint8_t want[V7_HEADER], have[V7_HEADER + 8];
    ok(create_at(fs, "d.add-cow", SIZE + 100, "base.img", "raw", NULL, NULL, &err));
    v7_header(want, "base.img", "d.raw");
    /* 17 sectors, the last one short: 3 bytes of bits */
    assert_int_equal(get_file(fs, "d.add-cow", have, 0, sizeof(have)), V7_HEADER + 3);
    assert_memory_equal(have, want, V7_HEADER);
    assert_true(dr_is_zero(have + V7_HEADER, 3));
    assert_int_equal(file_len(fs, "d.raw"), SIZE + 100);
}

static void each_bit_says_who_has_its_sector(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    put_pair(fs);
    put_v7(fs, "a", "base", "raw", "\x05\x80", 2);
    ok(dr_open_fs(fs, "a", NULL, &disk, &err));
    assert_int_equal(dr_size(disk), SIZE);
    for (unsigned n = 0; n < 16; n++)
        reads(disk, n * 512u, 512, n == 0 || n == 2 || n == 15 ? 0xaa : 0xbb);
    ok(dr_close(disk, &err));
}

static void a_short_bitmap_reads_as_zeros(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    put_pair(fs);
    put_v7(fs, "a", "base", "raw", "\x81", 1);
    ok(dr_open_fs(fs, "a", NULL, &disk, &err));
    reads(disk, 0, 512, 0xaa);
    reads(disk, 7 * 512, 512, 0xaa);
    reads(disk, 8 * 512, SIZE - 8 * 512, 0xbb);
    ok(dr_close(disk, &err));
    put_v7(fs, "a", "base", "raw", "", 0);
    ok(open_flags(fs, "a", DR_OPEN_RDWR, &disk, &err));
    reads(disk, 0, SIZE, 0xbb);
    write_at(disk, SIZE - 512, 512, 1);
    ok(dr_close(disk, &err));
    assert_true(bit_in_file(fs, "a", 15));
    assert_false(bit_in_file(fs, "a", 14));
}

static void what_is_behind_the_bitmap_is_ignored(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    put_pair(fs);
    put_v7(fs, "a", "base", "raw", "\1\0\xff\xff\xff", 5);
    ok(dr_open_fs(fs, "a", NULL, &disk, &err));
    reads(disk, 512, SIZE - 512, 0xbb);
    ok(dr_close(disk, &err));
}

static void no_parent_reads_as_zeros(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    put_pair(fs);
    put_v7(fs, "a", "", "raw", "\2\0", 2);
    ok(dr_open_fs(fs, "a", NULL, &disk, &err));
    assert_int_equal(dr_chain_length(disk), 1);
    reads(disk, 0, 512, 0);
    reads(disk, 512, 512, 0xaa);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ what is refused */

static void every_length_below_the_header_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    uint8_t h[V7_HEADER];
    put_pair(fs);
    v7_header(h, "base", "raw");
    for (size_t len = 0; len < V7_HEADER; len++) {
        struct dr_disk *disk = NULL;
        struct dr_error why = DR_ERROR_INIT;
        put_file(fs, "a", h, len);
        int r = dr_open_fs(fs, "a", NULL, &disk, &why);
        if (len < 8) { /* not even a magic number: any raw file */
            assert_int_equal(r, 0);
            assert_string_equal(dr_image_format(disk, 0), "raw");
            ok(dr_close(disk, &err));
        } else if (r != -EINVAL || !strstr(why.text, "cut short")) {
            fail_msg("%zu bytes: %d: %s", len, r, why.text);
        }
        struct dr_open_options o = {.format = "add-cow"};
        assert_true(dr_open_fs(fs, "a", &o, &disk, NULL) < 0);
    }
}

static void versions_are_told_apart(void **state)
{
    struct dr_fs *fs = *state;
    poke(fs, 8, "\1\0\0\0", 4);
    unopenable(fs, "a", ENOTSUP, "drafts v10 to v13 (little endian)");
    poke(fs, 8, "\0\0\0\2", 4);
    unopenable(fs, "a", ENOTSUP, "version 2, only version 1");
    poke(fs, 8, "\0\0\0\0", 4);
    unopenable(fs, "a", ENOTSUP, "version 0");
}

static void names_must_be_padded_with_nul(void **state)
{
    struct dr_fs *fs = *state;
    uint8_t full[1024];
    memset(full, 'x', sizeof(full));
    poke(fs, 12, full, 1024);
    unopenable(fs, "a", ENOTSUP, "backing_file has no NUL at its end");
    poke(fs, 1036, full, 1024);
    unopenable(fs, "a", ENOTSUP, "image_file has no NUL at its end");
    poke(fs, 12 + 1023, "x", 1);
    unopenable(fs, "a", ENOTSUP, "backing_file has bytes behind its NUL");
    poke(fs, 1036 + 500, "x", 1);
    unopenable(fs, "a", ENOTSUP, "image_file has bytes behind its NUL");
    /* a big-endian draft: the first of its numbers begins with zeros */
    poke(fs, 12, "\0\0\0\x24", 4);
    unopenable(fs, "a", ENOTSUP, "looks like one of the drafts v10 to v13");
    uint8_t none[1024] = {0};
    poke(fs, 1036, none, sizeof(none));
    unopenable(fs, "a", EINVAL, "names no image_file");
}

static void reserved_bytes_must_be_zero(void **state)
{
    struct dr_fs *fs = *state;
    for (size_t at = 2060; at < 2560; at += 499) {
        poke(fs, at, "\1", 1);
        unopenable(fs, "a", ENOTSUP, "reserved bytes 2060 to 2559 are not zero");
    }
}

/* The drafts with a bit a cluster have the same header; their bitmap is 128 times shorter. */
static void a_bitmap_for_clusters_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    put_sparse(fs, "raw", 64 * KiB); /* 128 sectors, 16 bytes */
    put_v7(fs, "a", "", "raw", "\1\2", 2);
    unopenable(fs, "a", ENOTSUP, "drafts v8 and v9");
    struct dr_disk *disk = NULL;
    put_v7(fs, "a", "", "raw", "\1\2\0", 3);
    ok(dr_open_fs(fs, "a", NULL, &disk, &err));
    ok(dr_close(disk, &err));
}

static void the_image_file_must_be_there(void **state)
{
    struct dr_fs *fs = *state;
    put_pair(fs);
    fs->ops->unlink(fs, "raw", NULL);
    unopenable(fs, "a", ENOENT, "its image file \"raw\" does not exist");
    put_file(fs, "raw", "", 0);
    unopenable(fs, "a", EINVAL, "its image file \"raw\" is empty");
    struct dr_disk *disk = NULL;
    put_v7(fs, "a", "base", "raw", "", 0);
    ok(dr_open_fs(fs, "a", NULL, &disk, &err));
    assert_int_equal(dr_size(disk), 0);
    ok(dr_close(disk, &err));
}

static void no_two_of_the_three_files_are_one(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    put_pair(fs);
    put_v7(fs, "a", "base", "a", "\1\0", 2);
    unopenable(fs, "a", EINVAL, "is the metadata file itself");
    refused(open_flags(fs, "a", DR_OPEN_RDWR, &disk, &err), EINVAL, "is the metadata file itself");
    put_v7(fs, "a", "raw", "raw", "\1\0", 2);
    unopenable(fs, "a", EINVAL, "is the file that holds the data of a");
    refused(open_flags(fs, "a", DR_OPEN_RDWR, &disk, &err), EINVAL, "holds the data of a");
    put_v7(fs, "a", "json:{\"driver\":\"add-cow\",\"file\":{\"filename\":\"a\"}}", "raw", "\1\0",
           2);
    unopenable(fs, "a", ELOOP, "a loop");
    put_v7(fs, "a", "a", "raw", "\1\0", 2);
    unopenable(fs, "a", ELOOP, "a loop");
}

/* ------------------------------------------------------------------ the parent's name */

struct name_case {
    const char *field, *name, *format; /* name NULL: refused */
};

static void names_are_read(void **state)
{
    (void)state;
    static const struct name_case cases[] = {
        {"base.img", "base.img", "raw"},
        {"json.img", "json.img", "raw"},
        {"nbd:localhost", "nbd:localhost", "raw"},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"filename\":\"a b\"}}", "a b", "vmdk"},
        {"json:{ \"file\" : {\"driver\":\"file\",\"filename\":\"x\"}, \"driver\":\"qcow2\"}", "x",
         "qcow2"},
        {"json:{\"driver\":\"raw\",\"file.filename\":\"json:x\"}", "json:x", "raw"},
        {"json:{\"driver\":\"raw\",\"file.driver\":\"file\",\"file.filename\":\"x\"}", "x", "raw"},
        {"json:", NULL, NULL},
        {"json:[]", NULL, NULL},
        {"json:{}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\"}", NULL, NULL},
        {"json:{\"file\":{\"filename\":\"x\"}}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"filename\":\"\"}}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\",\"file\":\"x\"}", NULL, NULL},
        {"json:{\"driver\":3,\"file\":{\"filename\":\"x\"}}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"driver\":\"nbd\",\"filename\":\"x\"}}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"host\":\"h\",\"filename\":\"x\"}}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"filename\":\"x\"},\"offset\":512}", NULL, NULL},
        {"json:{\"driver\":\"vmdk\",\"driver\":\"raw\",\"file\":{\"filename\":\"x\"}}", NULL, NULL},
        {"json:{\"driver\":\"raw\",\"file\":{\"filename\":\"x\"},\"file.filename\":\"y\"}", NULL,
         NULL},
        {"json:{\"driver\":\"raw\",\"file\":{\"filename\":\"a\\u0000b\"}}", NULL, NULL},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *name = NULL, *format = NULL;
        struct dr_error err = DR_ERROR_INIT;
        int r = addcow_name_decode("a", cases[i].field, &name, &format, &err);
        if ((r == 0) != (cases[i].name != NULL) ||
            (r == 0 && (strcmp(name, cases[i].name) || strcmp(format, cases[i].format))) ||
            (r < 0 && !strstr(err.text, "only json:")))
            fail_msg("%s: %d %s", cases[i].field, r, err.text);
        free(name);
        free(format);
    }
}

static void names_are_written(void **state)
{
    (void)state;
    static const struct name_case cases[] = {
        {"base.img", "base.img", NULL},
        {"base.img", "base.img", "raw"},
        {"a,b \n\"c", "a,b \n\"c", "raw"},
        {"\xff\xfe", "\xff\xfe", "raw"},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"filename\":\"../b.vmdk\"}}", "../b.vmdk", "vmdk"},
        {"json:{\"driver\":\"raw\",\"file\":{\"filename\":\"json:x\"}}", "json:x", NULL},
        {NULL, "\xff", "vmdk"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *field = NULL, *name = NULL, *format = NULL;
        int r = addcow_name_encode("a", cases[i].name, cases[i].format, &field, NULL);
        assert_int_equal(r, cases[i].field ? 0 : -EILSEQ);
        if (r < 0)
            continue;
        assert_string_equal(field, cases[i].field);
        ok(addcow_name_decode("a", field, &name, &format, &err));
        assert_string_equal(name, cases[i].name);
        assert_string_equal(format, cases[i].format ? cases[i].format : "raw");
        free(field);
        free(name);
        free(format);
    }
}

static void a_name_may_have_1023_bytes(void **state)
{
    struct dr_fs *fs = *state;
    char name[1025];
    memset(name, 'n', sizeof(name));
    name[1023] = 0;
    ok(create_at(fs, "a", 512, name, "raw", NULL, NULL, &err));
    struct dr_image *image = NULL;
    ok(dr_image_open(fs, "a", NULL, 0, &image, &err));
    assert_string_equal(image->backing_name, name);
    assert_string_equal(image->backing_format, "raw");
    dr_image_unref(image, NULL);
    name[1023] = 'n';
    name[1024] = 0;
    refused(create_at(fs, "b", 512, name, "raw", NULL, NULL, &err), ENAMETOOLONG, "1024 bytes");
    name[1000] = 0;
    refused(create_at(fs, "b", 512, name, "vmdk", NULL, NULL, &err), ENAMETOOLONG,
            "with its format");
    name[1000] = 'n';
    refused(create_at(fs, "b", 512, NULL, NULL, "image_file", name, &err), ENAMETOOLONG,
            "image file has 1024");
    assert_false(exists(fs, "b") || exists(fs, "b.raw"));
}

/* A guest can write any header into its raw disk: a raw parent stays raw. */
static void a_raw_parent_is_never_probed(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    uint8_t h[V7_HEADER + 512] = {0};
    put_pair(fs);
    v7_header(h, "", "raw2");
    put_file(fs, "base", h, sizeof(h));
    put_v7(fs, "a", "base", "raw", "\0\0", 2);
    ok(open_flags(fs, "a", DR_OPEN_ANY_PATH, &disk, &err));
    assert_string_equal(dr_image_format(disk, 1), "raw");
    uint8_t have[8];
    ok(dr_pread(disk, have, 0, 8, &err));
    assert_memory_equal(have, "ADD_COW\xff", 8);
    ok(dr_close(disk, &err));
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, new_fs, free_fs)
    const struct CMUnitTest tests[] = {
        T(create_writes_this_header),
        T(each_bit_says_who_has_its_sector),
        T(a_short_bitmap_reads_as_zeros),
        T(what_is_behind_the_bitmap_is_ignored),
        T(no_parent_reads_as_zeros),
        T(every_length_below_the_header_is_refused),
        T(versions_are_told_apart),
        T(names_must_be_padded_with_nul),
        T(reserved_bytes_must_be_zero),
        T(a_bitmap_for_clusters_is_refused),
        T(the_image_file_must_be_there),
        T(no_two_of_the_three_files_are_one),
        T(names_are_read),
        T(names_are_written),
        T(a_name_may_have_1023_bytes),
        T(a_raw_parent_is_never_probed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
