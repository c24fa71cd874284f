/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Descriptors of other systems, names that are not quite those of the files, and parents that are
 * known by their UUID. */
#include "ops/ops-internal.h"

#include "faultfs.h"
#include "test-vmdk.h"

#define DESC "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
#define SIZE (8 * 512u)

static void make_data(const char *path, unsigned seed)
{
    uint8_t buf[SIZE];
    fill(buf, sizeof(buf), seed);
    make_zeros(path, sizeof(buf));
    poke(path, 0, buf, sizeof(buf));
}

static void reads_as(const char *path, unsigned seed)
{
    struct dr_disk *disk = opened(path, 0);
    assert_int_equal(dr_size(disk), SIZE);
    reads(disk, 0, SIZE, seed);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ names of extents */

static void extents_are_found_beside_the_descriptor(void **state)
{
    (void)state;
    static const char *const names[] = {
        "Disk-Flat.vmdk", "C:\\VMs\\web\\disk-flat.vmdk", "\\\\host\\share\\DISK-FLAT.VMDK",
        "/vmfs/volumes/4f/web/disk-flat.vmdk", "web/disk-flat.vmdk"};
    char text[300];
    make_data("/d/disk-flat.vmdk", 3);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        snprintf(text, sizeof(text), DESC "RW 8 FLAT \"%s\" 0\n", names[i]);
        make_text("/d/disk.vmdk", text);
        reads_as("/d/disk.vmdk", 3);
        ok(mem->ops->unlink(mem, "/d/disk.vmdk", &err));
    }
}

static void of_two_that_differ_in_case_none_is_taken(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_data("/d/disk-flat.vmdk", 3);
    make_data("/d/Disk-flat.vmdk", 4);
    make_text("/d/a.vmdk", DESC "RW 8 FLAT \"DISK-flat.vmdk\" 0\n");
    fails(ENOENT, "DISK-flat.vmdk", open_in(mem, "/d/a.vmdk", 0, &disk));
    make_text("/d/b.vmdk", DESC "RW 8 FLAT \"C:\\Disk-flat.vmdk\" 0\n");
    reads_as("/d/b.vmdk", 4);
}

/* What is there, but not allowed, has no stand-in. */
static void a_file_that_is_elsewhere_is_not_replaced(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_data("/other/disk-flat.vmdk", 3);
    make_data("/d/disk-flat.vmdk", 4);
    make_text("/d/a.vmdk", DESC "RW 8 FLAT \"../other/disk-flat.vmdk\" 0\n");
    assert_true(open_in(mem, "/d/a.vmdk", 0, &disk) < 0);
    assert_non_null(strstr(err.text, "/other"));
}

static void a_parent_is_found_whatever_the_case(void **state)
{
    (void)state;
    struct dr_disk *disk;
    ok(create("/d/base.vmdk", MIB, NULL));
    write_one("/d/base.vmdk", 0, 1000, 1, 0);
    ok(create("/d/child.vmdk", MIB, "base.vmdk"));
    ok(mem->ops->rename(mem, "/d/base.vmdk", "/d/BASE.vmdk", &err));
    disk = opened("/d/child.vmdk", 0);
    reads(disk, 0, 1000, 1);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ charsets */

static void names_are_read_in_their_charset(void **state)
{
    (void)state;
    static const struct {
        const char *charset, *bytes, *file;
    } cases[] = {
        {"GB18030", "\x95\x32\x82\x36", "/d/\xf0\xa0\x80\x80"},
        {"gbk", "\xb4\xc5\xc5\xcc", "/d/\xe7\xa3\x81\xe7\x9b\x98"},
        {"windows-31J", "\x83\x5c", "/d/\xe3\x82\xbd"}, /* its second byte is a backslash */
        {"Shift_JIS", "\x87\x40", "/d/\xe2\x91\xa0"},
        {"Big5", "\xba\xcf\xba\xd0", "/d/\xe7\xa3\x81\xe7\xa2\x9f"},
        {"ISO-8859-2", "\xb1", "/d/\xc4\x85"},
        {"ISO-8859-1", "\xe4", "/d/\xc3\xa4"},
        {"UTF-8", "\xc3\xa4", "/d/\xc3\xa4"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[400], file[40];
        snprintf(file, sizeof(file), "%s-flat.vmdk", cases[i].file);
        make_data(file, 5);
        snprintf(text, sizeof(text), DESC "encoding=\"%s\"\nRW 8 FLAT \"%s-flat.vmdk\" 0\n",
                 cases[i].charset, cases[i].bytes);
        make_text("/d/a.vmdk", text);
        reads_as("/d/a.vmdk", 5);
        ok(mem->ops->unlink(mem, "/d/a.vmdk", &err));
        ok(mem->ops->unlink(mem, file, &err));
    }
}

static void an_unknown_charset_is_named(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_text("/d/a.vmdk", DESC "encoding=\"x-klingon\"\nRW 8 FLAT \"\xe4-flat.vmdk\" 0\n");
    fails(ENOENT, "charset x-klingon, which is not known", open_in(mem, "/d/a.vmdk", 0, &disk));
    make_text("/d/b.vmdk", "version=1\nCID=12345678\nparentCID=11111111\nencoding=\"x-klingon\"\n"
                           "parentFileNameHint=\"\xe4.vmdk\"\nRW 8 ZERO\n");
    fails(EINVAL, "charset x-klingon, which is not known", open_in(mem, "/d/b.vmdk", 0, &disk));
    make_text("/d/c.vmdk", DESC "encoding=\"x-klingon\"\nRW 8 FLAT \"gone.vmdk\" 0\n");
    assert_int_equal(open_in(mem, "/d/c.vmdk", 0, &disk), -ENOENT);
    assert_null(strstr(err.text, "charset")); /* it would say the same in any */
}

/* ------------------------------------------------------------------ whole texts */

static void make_wide(const char *path, const char *text, bool big, bool mark)
{
    size_t skip = mark ? 0 : 2;
    uint8_t buf[2000] = {0xff, 0xfe};
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i++)
        buf[2 + 2 * i] = (uint8_t)text[i];
    if (big) { /* one byte further */
        memmove(buf + 1, buf, sizeof(buf) - 1);
        buf[0] = 0xfe, buf[1] = 0xff, buf[2] = 0;
    }
    make_zeros(path, 2 + 2 * n - skip);
    poke(path, 0, buf + skip, 2 + 2 * n - skip);
}

#define FLAT_TEXT \
    DESC "encoding=\"UTF-16\"\nRW 8 FLAT \"disk-flat.vmdk\" 0\nddb.adapterType = \"ide\"\n"

static void written_and_read(const char *path)
{
    uint32_t cid;
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(mem, path, &(struct dr_open_options){.flags = DR_OPEN_RDWR}, &disk, &err));
    cid = vmdk_id(disk->chain->images[0]);
    write_at(disk, 0, SIZE, 7);
    assert_int_not_equal(vmdk_id(disk->chain->images[0]), cid);
    cid = vmdk_id(disk->chain->images[0]);
    ok(dr_close(disk, &err));
    assert_int_equal(cid_of(path), cid);
    reads_as(path, 7);
}

static void texts_of_other_systems_are_read_and_written(void **state)
{
    (void)state;
    char cr[] = FLAT_TEXT;
    for (char *p = cr; *p; p++)
        *p = *p == '\n' ? '\r' : *p;
    make_data("/d/disk-flat.vmdk", 3);
    make_wide("/d/le.vmdk", FLAT_TEXT, false, true);
    make_wide("/d/be.vmdk", FLAT_TEXT, true, true);
    make_wide("/d/le-bare.vmdk", FLAT_TEXT, false, false);
    make_wide("/d/be-bare.vmdk", FLAT_TEXT, true, false);
    make_text("/d/cr.vmdk", cr);
    make_text("/d/plain.vmdk", "version=1\r\nCID=12345678\r\nRW 8 FLAT \"disk-flat.vmdk\" 0\r\n");
    static const char *const paths[] = {"/d/le.vmdk",    "/d/be.vmdk",      "/d/cr.vmdk",
                                        "/d/plain.vmdk", "/d/le-bare.vmdk", "/d/be-bare.vmdk"};
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        reads_as(paths[i], i ? 7 : 3);
        written_and_read(paths[i]);
    }
}

static void half_a_wide_character_is_refused(void **state)
{
    (void)state;
    struct dr_image *image;
    static const uint8_t lone[] = {0xff, 0xfe, 'v', 0, 0x00, 0xd8};
    make_zeros("/d/a.vmdk", sizeof(lone));
    poke("/d/a.vmdk", 0, lone, sizeof(lone));
    fails(EINVAL, "UTF-16LE, but is none",
          dr_image_open(mem, "/d/a.vmdk", "vmdk", 0, &image, &err));
}

/* ------------------------------------------------------------------ VirtualBox's children */

#define UUID  "0a000000-1234-5678-9abc-00000000000f"
#define OTHER "0b000000-1234-5678-9abc-00000000000f"

static void add_line(const char *path, const char *line)
{
    struct dr_image *image = image_of(path, DR_OPEN_RDWR | DR_OPEN_NO_BACKING);
    struct vmdk_desc d;
    ok(vmdk_desc_copy(image, &d, &err));
    ok(vmdk_desc_splice(&d, d.len, 0, line, &err));
    ok(vmdk_store(image, &d, 0, &err));
    vmdk_desc_free(&d);
    ok(dr_image_unref(image, &err));
}

static void make_pair(void)
{
    ok(create("/d/disk.vmdk", MIB, NULL));
    write_one("/d/disk.vmdk", 0, 2000, 1, 0);
    add_line("/d/disk.vmdk", "ddb.uuid.image=\"" UUID "\"\n");
    ok(create("/d/{child}.vmdk", MIB, NULL));
    write_one("/d/{child}.vmdk", 3 * GRAIN, 2000, 2, 0);
    add_line("/d/{child}.vmdk",
             "ddb.uuid.image=\"" OTHER "\"\nddb.uuid.parent=\"0A000000-1234-5678-"
             "9ABC-00000000000F\"\n");
}

static void a_parent_is_found_by_its_uuid(void **state)
{
    (void)state;
    make_pair();
    ok(create("/d/third.vmdk", MIB, NULL));
    make_zeros("/d/a.vmdk", 70000); /* no disk */
    struct dr_disk *disk = opened("/d/{child}.vmdk", 0);
    assert_int_equal(disk->chain->n, 2);
    reads(disk, 0, 2000, 1);
    reads(disk, 3 * GRAIN, 2000, 2);
    ok(dr_close(disk, &err));
    write_one("/d/{child}.vmdk", 0, 100, 5, 0);
    disk = opened("/d/{child}.vmdk", 0);
    reads(disk, 0, 100, 5);
    ok(dr_close(disk, &err));
}

static void a_parent_that_is_not_there_is_asked_for(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_pair();
    ok(mem->ops->rename(mem, "/d/disk.vmdk", "/other/disk.vmdk", &err));
    fails(ENOENT, "drover rebase -u -F vmdk -b PARENT", open_in(mem, "/d/{child}.vmdk", 0, &disk));
    assert_non_null(strstr(err.text, "VirtualBox"));
}

/* As it looks that a guest wrote to the beginning of a flat disk. */
static void the_data_of_a_disk_is_no_parent(void **state)
{
    (void)state;
    static const char text[] =
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        "createType=\"monolithicFlat\"\nRW 2048 FLAT \"x\" 0\n"
        "ddb.uuid.image=\"" UUID "\"\n";
    struct dr_file *f;
    make_pair();
    make_zeros("/d/a-flat.vmdk", 2 * MIB);
    ok(dr_file_open(mem, "/d/a-flat.vmdk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, text, 0, sizeof(text) - 1, &err));
    dr_file_unref(f);
    struct dr_disk *disk = opened("/d/{child}.vmdk", 0);
    assert_string_equal(dr_image_path(disk, 1), "/d/disk.vmdk");
    ok(dr_close(disk, &err));
}

static int fail_listing(void *user, const struct faultfs_io *io)
{
    (void)user;
    return io->kind == FAULTFS_LIST ? -EACCES : 0;
}

static void a_directory_that_cannot_be_read_is_told(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_pair();
    struct faultfs *fault = faultfs_new(mem);
    faultfs_observe(fault, fail_listing, NULL);
    fails(EACCES, "cannot be looked for", open_in(faultfs_fs(fault), "/d/{child}.vmdk", 0, &disk));
    faultfs_free(fault);
}

static void of_two_with_one_uuid_none_is_taken(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_pair();
    ok(create("/d/copy.vmdk", MIB, NULL));
    add_line("/d/copy.vmdk", "ddb.uuid.image=\"" UUID "\"\n");
    fails(EINVAL, "have the UUID of its parent", open_in(mem, "/d/{child}.vmdk", 0, &disk));
}

static void another_parent_is_recorded_by_its_uuid_too(void **state)
{
    (void)state;
    make_pair();
    ok(create("/d/copy.vmdk", MIB, NULL));
    for (int has_uuid = 0; has_uuid < 2; has_uuid++) {
        const struct dr_rebase_options o = {
            .backing = "copy.vmdk", .backing_format = "vmdk", .unsafe = true, .force = true};
        if (has_uuid)
            add_line("/d/copy.vmdk", "ddb.uuid.image=\"" OTHER "\"\n");
        ok(dr_rebase_fs(mem, "/d/{child}.vmdk", &o, NULL, &err));
        struct dr_image *child = image_of("/d/{child}.vmdk", DR_OPEN_NO_BACKING);
        CLEANUP_FREE char *uuid = vmdk_desc_get(&vmdk_of(child)->desc, "ddb.uuid.parent");
        assert_string_equal(uuid, has_uuid ? OTHER : "00000000-0000-0000-0000-000000000000");
        ok(dr_image_unref(child, &err));
    }
}

/* The record is complete from then on, for every program. */
static void a_commit_records_the_parent(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_pair();
    const struct dr_commit_options o = {.keep = true};
    ok(dr_commit_fs(mem, "/d/{child}.vmdk", &o, NULL, &err));
    disk = opened("/d/disk.vmdk", 0);
    reads(disk, 0, 2000, 1);
    reads(disk, 3 * GRAIN, 2000, 2);
    uint32_t cid = vmdk_id(disk->chain->images[0]);
    ok(dr_close(disk, &err));
    struct dr_image *image = image_of("/d/{child}.vmdk", DR_OPEN_NO_BACKING);
    assert_int_equal(vmdk_parent_id(image), cid);
    assert_string_equal(image->backing_name, "disk.vmdk");
    dr_image_unref(image, NULL);
    disk = opened("/d/{child}.vmdk", 0);
    reads(disk, 3 * GRAIN, 2000, 2);
    ok(dr_close(disk, &err));
}

/* An old UUID would bring the parent back. */
static void a_parent_that_was_taken_away_stays_away(void **state)
{
    (void)state;
    make_pair();
    struct dr_image *image = image_of("/d/{child}.vmdk", DR_OPEN_RDWR | DR_OPEN_NO_BACKING);
    ok(dr_image_set_backing(image, NULL, NULL, NULL, 0, &err));
    ok(dr_image_unref(image, &err));
    struct dr_disk *disk = opened("/d/{child}.vmdk", 0);
    assert_int_equal(disk->chain->n, 1);
    reads_zero(disk, 0, 2000);
    reads(disk, 3 * GRAIN, 2000, 2);
    ok(dr_close(disk, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(extents_are_found_beside_the_descriptor),
        T(of_two_that_differ_in_case_none_is_taken),
        T(a_file_that_is_elsewhere_is_not_replaced),
        T(a_parent_is_found_whatever_the_case),
        T(names_are_read_in_their_charset),
        T(an_unknown_charset_is_named),
        T(texts_of_other_systems_are_read_and_written),
        T(half_a_wide_character_is_refused),
        T(a_parent_is_found_by_its_uuid),
        T(a_parent_that_is_not_there_is_asked_for),
        T(of_two_with_one_uuid_none_is_taken),
        T(a_commit_records_the_parent),
        T(another_parent_is_recorded_by_its_uuid_too),
        T(the_data_of_a_disk_is_no_parent),
        T(a_directory_that_cannot_be_read_is_told),
        T(a_parent_that_was_taken_away_stays_away),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
