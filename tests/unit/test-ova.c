/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* OVF descriptors, the heads of tars, and windows, without the command. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "archive/ova-write.h"
#include "base/error.h"
#include "storage/window.h"

/* ------------------------------------------------------------------ units */

static void units_of_capacities(void **state)
{
    static const struct {
        const char *text;
        uint64_t bytes; /* 0: not understood */
    } cases[] = {
        {NULL, 1},
        {"", 1},
        {" ", 1},
        {"byte", 1},
        {"byte * 2^30", UINT64_C(1) << 30},
        {"byte*2^20", 1u << 20},
        {"2^10 * byte", 1u << 10},
        {"byte * 10^9", 1000000000},
        {"byte * 1024 * 1024", 1u << 20},
        {"GigaBytes", 1u << 30},
        {"megabytes", 1u << 20},
        {"KiloBytes", 1u << 10},
        {" byte  *  2 ^ 3 ", 8},
        {"byte *", 0},
        {"byte 2", 0},
        {"bit", 0},
        {"byte * 2^64", 0},
        {"byte * 2^", 0},
        {"byte * 99999999999999999999", 0},
        {"byte * 0", 0},
        {"byte * 2^40 * 2^40", 0},
        {"* byte", 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint64_t bytes = 0;
        bool ok = ovf_unit(cases[i].text, &bytes);
        if (ok != (cases[i].bytes != 0) || (ok && bytes != cases[i].bytes))
            fail_msg("%s: %d, %llu", cases[i].text, ok, (unsigned long long)bytes);
    }
}

/* ------------------------------------------------------------------ descriptors */

#define ENVELOPE(inner)                                                                  \
    "<?xml version=\"1.0\"?><Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" " \
    "xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\">" inner "</Envelope>"
#define FILE_(more) \
    "<References><File ovf:id=\"f\" ovf:href=\"d&amp;1.vmdk\" " more "/></References>"
#define DISK_(more) "<DiskSection><Disk ovf:diskId=\"d\" ovf:fileRef=\"f\" " more "/></DiskSection>"

static void descriptors_that_are_refused(void **state)
{
    static const struct {
        const char *text, *why;
    } cases[] = {
        {"", "XML"},
        {"no xml", "XML"},
        {"<Envelope>", "XML"},
        {ENVELOPE("<a>"), "XML"},
        {"<Domain/>", "expected <Envelope>"},
        {"<!DOCTYPE Envelope><Envelope/>", "document type"},
        {ENVELOPE("&lol;"), ""},
        {ENVELOPE("<References><File href=\"x\"/></References>"), "without id"},
        {ENVELOPE("<References><File id=\"x\"/></References>"), "without href"},
        {ENVELOPE("<References><File id=\"x\" href=\"\"/></References>"), "without href"},
        {ENVELOPE(FILE_("ovf:size=\"-1\"")), "size of File"},
        {ENVELOPE(FILE_("ovf:size=\"18446744073709551616\"")), "size of File"},
        {ENVELOPE(FILE_("ovf:chunkSize=\"1k\"")), "chunkSize of File"},
        {ENVELOPE("<DiskSection><Disk capacity=\"1\"/></DiskSection>"), "without diskId"},
        {ENVELOPE(DISK_("ovf:capacity=\"\"")), "capacity of Disk"},
        {ENVELOPE(DISK_("ovf:capacity=\"1\" ovf:capacityAllocationUnits=\"apples\"")), "apples"},
        {ENVELOPE(DISK_("ovf:capacity=\"8589934592\" "
                        "ovf:capacityAllocationUnits=\"byte * 2^30\"")),
         "times"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_error err = DR_ERROR_INIT;
        struct ovf ovf;
        int r = ovf_parse("x.ovf", cases[i].text, strlen(cases[i].text), &ovf, &err);
        ovf_free(&ovf);
        if (r >= 0 || strncmp(err.text, "x.ovf: ", 7) != 0 || !strstr(err.text, cases[i].why) ||
            strchr(err.text, '\n'))
            fail_msg("%s: %d, %s", cases[i].text, r, err.text);
    }
}

static void a_descriptor_says_what_there_is(void **state)
{
    static const char text[] = ENVELOPE(
        FILE_("ovf:size=\" 77 \" ovf:compression=\"gzip\" ovf:chunkSize=\"5\"")
            DISK_("ovf:capacity=\"3\" ovf:capacityAllocationUnits=\"byte * 2^30\" "
                  "ovf:parentRef=\"p\"") "<VirtualSystem ovf:id=\"x\"><Name>a &lt; b</Name>"
                                         "<VirtualHardwareSection><System><File id=\"deep\"/>"
                                         "</System></VirtualHardwareSection></VirtualSystem>");
    struct dr_error err = DR_ERROR_INIT;
    struct ovf ovf;
    (void)state;
    assert_int_equal(ovf_parse("x", text, sizeof(text) - 1, &ovf, &err), 0);
    assert_string_equal(ovf.name, "a < b");
    assert_int_equal(ovf.n_files, 1);
    assert_string_equal(ovf.files[0].href, "d&1.vmdk");
    assert_string_equal(ovf.files[0].compression, "gzip");
    assert_true(ovf.files[0].has_size && ovf.files[0].size == 77 && ovf.files[0].chunk == 5);
    assert_int_equal(ovf.n_disks, 1);
    assert_string_equal(ovf.disks[0].file_ref, "f");
    assert_string_equal(ovf.disks[0].parent, "p");
    assert_true(ovf.disks[0].has_capacity && ovf.disks[0].capacity == UINT64_C(3) << 30);
    assert_ptr_equal(ovf_file_by_id(&ovf, "f"), &ovf.files[0]);
    assert_null(ovf_file_by_id(&ovf, "g"));
    ovf_free(&ovf);
}

/* The error is the caller's to print. */
static void nothing_is_printed(void **state)
{
    static const char *const texts[] = {
        "<?xml version='1.0' encoding='ISO-2022-JP'?><Envelope>\x1b\xff</Envelope>",
        "<?xml version='1.0' encoding='EBCDIC-US'?><Envelope>\x80\xff</Envelope>",
        "<?xml version='1.0' encoding='FOO'?><Envelope/>",
        "<Envelope><",
    };
    FILE *printed = tmpfile();
    int before = dup(STDERR_FILENO);
    (void)state;
    assert_non_null(printed);
    fflush(stderr);
    dup2(fileno(printed), STDERR_FILENO);
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        struct dr_error err = DR_ERROR_INIT;
        struct ovf ovf;
        int r = ovf_parse("x", texts[i], strlen(texts[i]), &ovf, &err);
        ovf_free(&ovf);
        assert_int_equal(r, -EINVAL);
        assert_memory_equal(err.text, "x: line 1: no well-formed XML: ", 31);
    }
    fflush(stderr);
    dup2(before, STDERR_FILENO);
    close(before);
    assert_int_equal(lseek(fileno(printed), 0, SEEK_END), 0);
    fclose(printed);
}

static void a_capacity_may_be_a_property(void **state)
{
    static const char text[] = ENVELOPE(DISK_("ovf:capacity=\"${size}\""));
    struct ovf ovf;
    (void)state;
    assert_int_equal(ovf_parse("x", text, sizeof(text) - 1, &ovf, NULL), 0);
    assert_false(ovf.disks[0].has_capacity);
    assert_string_equal(ovf.disks[0].odd_capacity, "${size}");
    ovf_free(&ovf);
}

/* ------------------------------------------------------------------ heads of tars */

static void make_header(uint8_t *b, const char *name, char type, unsigned size)
{
    unsigned sum = 0;
    memset(b, 0, 512);
    memcpy(b, name, strlen(name));
    snprintf((char *)b + 124, 12, "%011o", size);
    b[156] = (uint8_t)type;
    memset(b + 148, ' ', 8);
    for (int i = 0; i < 512; i++)
        sum += b[i];
    snprintf((char *)b + 148, 8, "%06o", sum);
}

static void a_tar_is_known_by_its_first_header(void **state)
{
    uint8_t buf[4096] = {0};
    (void)state;
    assert_false(ova_tar_begins(buf, sizeof(buf)));
    make_header(buf, "m.ovf", '0', 5);
    assert_true(ova_tar_begins(buf, sizeof(buf)) && ova_tar_begins_with_ovf(buf, sizeof(buf)));
    assert_false(ova_tar_begins(buf, 511));
    buf[0]++;
    assert_false(ova_tar_begins(buf, sizeof(buf)));
    make_header(buf, "disk.vmdk", '0', 5);
    assert_true(ova_tar_begins(buf, sizeof(buf)) && !ova_tar_begins_with_ovf(buf, sizeof(buf)));
    make_header(buf, "././@LongLink", 'L', 600); /* passed over, if all of it is there */
    make_header(buf + 1536, "m.ovf", '0', 5);
    assert_true(ova_tar_begins_with_ovf(buf, sizeof(buf)));
    assert_false(ova_tar_begins_with_ovf(buf, 1536));
    make_header(buf, "././@LongLink", 'L', 01777777777);
    assert_false(ova_tar_begins_with_ovf(buf, sizeof(buf)));
}

static void headers_that_are_written(void **state)
{
    uint8_t b[OVA_BLOCK];
    (void)state;
    assert_int_equal(ova_tar_header("a.ovf", 5, 7, b, NULL), 0);
    assert_true(ova_tar_begins_with_ovf(b, sizeof(b)));
    assert_memory_equal(b + 257, "ustar\0", 6);
    assert_memory_equal(b + 124, "00000000005", 11);
    assert_int_equal(ova_tar_header("b", UINT64_C(9) << 30, 0, b, NULL), 0);
    assert_true(ova_tar_begins(b, sizeof(b)));
    assert_int_equal(b[124], 0x80); /* a size in base-256 */
    assert_int_equal(b[131], 2);    /* 9 GiB are 2 * 2^32 and 2^30 */
    assert_true(ova_tar_header("far too long a name, far too long a name, far too long a name, far "
                               "too long a name, far too long a name",
                               5, 0, b, NULL) < 0);
}

/* ------------------------------------------------------------------ manifests */

static void lines_of_manifests(void **state)
{
#define HEX40 "0123456789abcdef0123456789ABCDEF01234567"
    static const struct {
        const char *text;
        int n; /* < 0: refused */
    } cases[] = {
        {"", 0},
        {"\n \r\n", 0},
        {"SHA1(a)= " HEX40 "\n", 1},
        {"sha1 (a b(1).vmdk) =" HEX40 "\r\nSHA1(c)= " HEX40, 2},
        {"SHA1(a)= " HEX40 "\nSHA1(./a)= " HEX40, -1},
        {"SHA1(a)= " HEX40 "0", -1},
        {"SHA1(a)= 0123", -1},
        {"SHA256(a)= " HEX40, -1},
        {"SHA1()= " HEX40, -1},
        {"SHA1(a= " HEX40, -1},
        {"MD5(a)= 00", -1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_error err = DR_ERROR_INIT;
        struct ova_manifest m;
        int r = ova_manifest_parse("x.mf", cases[i].text, strlen(cases[i].text), &m, &err);
        if ((r < 0) != (cases[i].n < 0) || (r == 0 && (int)m.n != cases[i].n) ||
            (r < 0 && !strstr(err.text, "line ")))
            fail_msg("%s: %d, %s", cases[i].text, r, err.text);
        ova_manifest_free(&m);
    }
}

/* ------------------------------------------------------------------ windows */

static void a_window_shows_parts_of_files(void **state)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f, *w;
    uint8_t buf[64];
    size_t got;
    (void)state;
    assert_int_equal(dr_file_open(fs, "/f", DR_FILE_CREATE, &f, NULL), 0);
    assert_int_equal(dr_file_pwrite(f, "0123456789abcdef", 0, 16, NULL), 0);
    const struct dr_window_part parts[] = {
        {f, 2, 3}, {f, 0, 0}, {f, 10, 2}, {f, 14, 100}, {f, 0, 5}};
    assert_int_equal(dr_file_window("w", parts, 5, &w, NULL), 0);
    assert_int_equal(dr_file_size(w), 7); /* nothing behind the part that is cut */
    for (size_t at = 0; at < 7; at++)
        for (size_t len = 1; at + len <= 7; len++) {
            assert_int_equal(dr_file_pread(w, buf, at, len, NULL), 0);
            assert_memory_equal(buf, &"234abef"[at], len);
        }
    assert_int_equal(dr_file_pread_short(w, buf, 3, 64, &got, NULL), 0);
    assert_int_equal(got, 4);
    dr_file_unref(f); /* the window has it */
    assert_int_equal(dr_file_pread(w, buf, 0, 7, NULL), 0);
    dr_file_unref(w);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(units_of_capacities),
        cmocka_unit_test(descriptors_that_are_refused),
        cmocka_unit_test(a_descriptor_says_what_there_is),
        cmocka_unit_test(nothing_is_printed),
        cmocka_unit_test(a_capacity_may_be_a_property),
        cmocka_unit_test(a_tar_is_known_by_its_first_header),
        cmocka_unit_test(headers_that_are_written),
        cmocka_unit_test(lines_of_manifests),
        cmocka_unit_test(a_window_shows_parts_of_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
