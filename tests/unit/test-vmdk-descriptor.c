/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The descriptor's text and the sparse header, without any file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/error.h"
#include "formats/vmdk/descriptor.h"
#include "formats/vmdk/header.h"

#define HEAD "# Disk DescriptorFile\nversion=1\nCID=0172e8a4\nparentCID=ffffffff\n"
#define TAIL \
    "createType=\"monolithicSparse\"\n\nRW 20480 SPARSE \"a.vmdk\"\n\nddb.adapterType = \"ide\"\n"
#define GOOD HEAD TAIL

static struct dr_error err;

static int parse_n(struct vmdk_desc *d, const void *text, size_t len)
{
    err = (struct dr_error)DR_ERROR_INIT;
    return vmdk_desc_parse(d, "x.vmdk", text, len, &err);
}

static int parse(struct vmdk_desc *d, const char *text)
{
    return parse_n(d, text, strlen(text));
}

static void must_parse(struct vmdk_desc *d, const char *text)
{
    if (parse(d, text) < 0)
        fail_msg("%s", err.text);
}

/* Refused, and the message has `why` in it. */
static void refused(const char *text, const char *why)
{
    struct vmdk_desc d;
    assert_true(parse(&d, text) < 0);
    assert_non_null(strstr(err.text, why));
    assert_null(d.text);
}

static void value_is(const struct vmdk_desc *d, const char *key, const char *expected)
{
    char *value = vmdk_desc_get(d, key);
    if (expected)
        assert_string_equal(value, expected);
    else
        assert_null(value);
    free(value);
}

static uint32_t id_of(const struct vmdk_desc *d, const char *key)
{
    uint32_t id = 0xdeadbeef;
    assert_int_equal(vmdk_desc_get_id(d, "x.vmdk", key, &id, &err), 0);
    return id;
}

/* ------------------------------------------------------------------ reading */

static void keys_are_whole_left_hand_sides(void **state)
{
    (void)state;
    struct vmdk_desc d;
    must_parse(&d, "# CID of this\n# createType=\"bogus\"\nversion=1\nparentCID=11111111\n"
                   "xCID=22222222\nCID=33333333\n" TAIL);
    assert_int_equal(id_of(&d, "CID"), 0x33333333);
    assert_int_equal(id_of(&d, "parentCID"), 0x11111111);
    value_is(&d, "createType", "monolithicSparse");
    vmdk_desc_free(&d);
}

static void case_blanks_crlf_and_bom_do_not_matter(void **state)
{
    (void)state;
    struct vmdk_desc d;
    must_parse(&d, "\xef\xbb\xbf\r\n  VERSION = 1 \r\ncid=ABCDEF01\r\nParentCid=FFFFFFFF\r\n"
                   "CREATETYPE = \"x y\" \r\n\trw  12\tsparse \"A b.vmdk\"  \r\n");
    assert_int_equal(id_of(&d, "CID"), 0xabcdef01);
    value_is(&d, "createType", "x y");
    assert_int_equal(d.n_extents, 1);
    assert_int_equal(d.extents[0].sectors, 12);
    assert_int_equal(d.extents[0].type, VMDK_SPARSE);
    assert_string_equal(d.extents[0].name, "A b.vmdk");
    vmdk_desc_free(&d);
}

static void a_lone_cr_is_no_line_end(void **state)
{
    (void)state;
    refused("version=1\rCID=12345678\rRW 1 ZERO\r", "version");
}

static void text_ends_at_nul(void **state)
{
    (void)state;
    static const char text[] = GOOD "\0CID=junk behind the end";
    struct vmdk_desc d;
    assert_int_equal(parse_n(&d, text, sizeof(text)), 0);
    assert_int_equal(d.len, strlen(GOOD));
    vmdk_desc_free(&d);
}

static void missing_final_newline_is_fine(void **state)
{
    (void)state;
    struct vmdk_desc d;
    must_parse(&d, HEAD "RW 1 SPARSE \"a\"");
    assert_int_equal(d.n_extents, 1);
    vmdk_desc_free(&d);
}

static void extent_lines_tell_everything(void **state)
{
    (void)state;
    struct vmdk_desc d;
    must_parse(&d, HEAD "RW 63 FLAT \"disk\" 7 \"part-uuid\" \"dev\"\nRDONLY 5 ZERO\n"
                        "NOACCESS 0 ZERO \nRW 9 VMFS \"f-flat.vmdk\"\nRW 1 SESPARSE \"s\"\n");
    assert_int_equal(d.n_extents, 5);
    assert_int_equal(d.extents[0].offset, 7);
    assert_int_equal(d.extents[1].access, VMDK_RDONLY);
    assert_int_equal(d.extents[1].type, VMDK_ZERO);
    assert_null(d.extents[1].name);
    assert_int_equal(d.extents[2].access, VMDK_NOACCESS);
    assert_int_equal(d.extents[3].type, VMDK_VMFS);
    assert_int_equal(d.extents[4].type, VMDK_SESPARSE);
    assert_string_equal(d.extents[4].type_name, "SESPARSE");
    vmdk_desc_free(&d);
}

static void broken_extent_lines_are_refused(void **state)
{
    (void)state;
    refused(HEAD "RW x SPARSE \"a\"\n", "number of sectors");
    refused(HEAD "RW -1 SPARSE \"a\"\n", "number of sectors");
    refused(HEAD "RW 99999999999999999999999 SPARSE \"a\"\n", "number of sectors");
    refused(HEAD "RW 36028797018963969 SPARSE \"a\"\n", "number of sectors");
    refused(HEAD "RW\n", "number of sectors");
    refused(HEAD "RW 1\n", "without a type");
    refused(HEAD "RW 1 SPARSE\n", "file name in quotes");
    refused(HEAD "RW 1 SPARSE \"\"\n", "file name in quotes");
    refused(HEAD "RW 1 SPARSE \"open end\n", "file name in quotes");
    refused(HEAD "RW 1 FLAT \"a\" zero\n", "extent offset");
}

/* Left out, they would change what the lines behind them mean. */
static void damaged_lines_that_matter_are_not_left_out(void **state)
{
    (void)state;
    struct vmdk_desc d;
    refused(HEAD "RX 1 FLAT \"a\" 0\nRW 1 FLAT \"b\" 0\n", "'RX' is no access");
    refused(HEAD "\x01 7\tZERO\nRW 1 FLAT \"b\" 0\n", "is no access");
    refused("version=1\nCID=1\nparentCID=\"11111111\nRW 1 ZERO\n", "'parentCID' without");
    refused(GOOD "parentFileNameHint \"base.vmdk\"\n", "'parentFileNameHint' without");
    must_parse(&d, GOOD "what else\nfoo=\"bar\n# RX 1 FLAT\nddb.x \"1\"\n");
    assert_int_equal(d.n_extents, 1);
    vmdk_desc_free(&d);
}

static void what_decides_may_stand_only_once(void **state)
{
    (void)state;
    refused(GOOD "CID=00000001\n", "2 lines 'CID'");
    refused(GOOD "parentcid=00000001\n", "2 lines 'parentCID'");
    refused(GOOD "createType=\"vmfs\"\n", "2 lines 'createType'");
}

static void versions_beyond_three_and_no_version_are_refused(void **state)
{
    (void)state;
    refused("# Disk DescriptorFile\nversion=4\nCID=1\n", "version '4'");
    refused("# Disk DescriptorFile\nversion=\n", "version ''");
    refused("# Disk DescriptorFile\nCID=1\n", "no line 'version='");
    refused("", "no line 'version='");
}

static void ids_are_one_to_eight_hex_digits(void **state)
{
    (void)state;
    struct vmdk_desc d;
    uint32_t id;
    must_parse(&d, "version=1\nCID=52db3b7\nparentCID=123456789\nx=12g\ny=\n");
    assert_int_equal(id_of(&d, "CID"), 0x52db3b7);
    assert_int_equal(vmdk_desc_get_id(&d, "x", "parentCID", &id, &err), -EINVAL);
    assert_int_equal(vmdk_desc_get_id(&d, "x", "x", &id, &err), -EINVAL);
    assert_int_equal(vmdk_desc_get_id(&d, "x", "y", &id, &err), -EINVAL);
    assert_int_equal(vmdk_desc_get_id(&d, "x", "z", &id, &err), -ENOENT);
    vmdk_desc_free(&d);
}

static void a_megabyte_is_too_long(void **state)
{
    (void)state;
    size_t len = VMDK_DESC_MAX;
    char *text = malloc(len);
    struct vmdk_desc d;
    assert_non_null(text);
    memset(text, '#', len);
    memcpy(text, GOOD, strlen(GOOD));
    assert_int_equal(parse_n(&d, text, len), -EINVAL);
    assert_int_equal(parse_n(&d, text, len - 1), 0);
    vmdk_desc_free(&d);
    free(text);
}

static void probe_knows_descriptors_from_other_text(void **state)
{
    (void)state;
#define PROBE(text) vmdk_desc_probe((const uint8_t *)(text), strlen(text))
    assert_true(PROBE(GOOD) >= 80);
    assert_true(PROBE("#disk descriptorfile\r\n") >= 80);
    assert_true(PROBE("\xef\xbb\xbfversion=1\r\n") >= 80);
    assert_true(PROBE("# a comment\n\n version=2\n") >= 80);
    assert_int_equal(PROBE("version=4\n"), 0);
    assert_int_equal(PROBE("CID=1\nversion=1\n"), 0);
    assert_int_equal(PROBE("#!/bin/sh\nversion=1.2\n"), 0);
    assert_int_equal(PROBE(""), 0);
    assert_int_equal(PROBE("#"), 0);
#undef PROBE
}

/* ------------------------------------------------------------------ editing */

static void edits_keep_everything_else(void **state)
{
    (void)state;
    struct vmdk_desc d;
    must_parse(&d, "# Disk DescriptorFile\nversion=1\nCID=1\nfoo.bar=\"keep\"\n" TAIL "# end\n");
    assert_int_equal(vmdk_desc_set(&d, "CID", "0000002a", false, "version", &err), 0);
    assert_int_equal(vmdk_desc_set(&d, "parentCID", "00000007", false, "CID", &err), 0);
    assert_int_equal(vmdk_desc_set(&d, "parentFileNameHint", "b c.vmdk", true, "createType", &err),
                     0);
    assert_string_equal(d.text,
                        "# Disk DescriptorFile\nversion=1\nCID=0000002a\nparentCID=00000007\n"
                        "foo.bar=\"keep\"\ncreateType=\"monolithicSparse\"\n"
                        "parentFileNameHint=\"b c.vmdk\"\n\nRW 20480 SPARSE \"a.vmdk\"\n\n"
                        "ddb.adapterType = \"ide\"\n# end\n");
    assert_int_equal(vmdk_desc_set(&d, "parentfilenamehint", "z", true, NULL, &err), 0);
    value_is(&d, "parentFileNameHint", "z");
    assert_int_equal(vmdk_desc_remove(&d, "parentFileNameHint", &err), 0);
    value_is(&d, "parentFileNameHint", NULL);
    vmdk_desc_free(&d);
}

static void new_lines_end_as_the_others_do(void **state)
{
    (void)state;
    struct vmdk_desc d;
    must_parse(&d, "version=1\r\nCID=1");
    assert_int_equal(vmdk_desc_set(&d, "parentCID", "2", false, "CID", &err), 0);
    assert_string_equal(d.text, "version=1\r\nCID=1\r\nparentCID=2");
    vmdk_desc_free(&d);
}

static void values_with_quotes_or_line_ends_are_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"a\"b", "a\nb", "a\rb"};
    struct vmdk_desc d;
    must_parse(&d, GOOD);
    for (size_t i = 0; i < 3; i++) {
        err = (struct dr_error)DR_ERROR_INIT;
        assert_int_equal(vmdk_desc_set(&d, "parentFileNameHint", bad[i], true, NULL, &err),
                         -EINVAL);
        assert_false(vmdk_name_is_writable(bad[i]));
    }
    assert_string_equal(d.text, GOOD);
    assert_false(vmdk_name_is_writable(""));
    vmdk_desc_free(&d);
}

static void a_new_cid_keeps_the_length(void **state)
{
    (void)state;
    static const char text[] =
        "# Disk DescriptorFile\nversion=3\nCID=216bc064\nparentCID=ffffffff\n" TAIL
        "changeTrackPath=\"x-ctk.vmdk\"\nddb.longContentID = "
        "\"3ca4d6ec709912129cf7ecb7216bc064\"\n";
    struct vmdk_desc d;
    must_parse(&d, text);
    assert_int_equal(vmdk_desc_set_cid(&d, 0x0badcafe, &err), 0);
    assert_int_equal(d.len, strlen(text));
    assert_int_equal(id_of(&d, "CID"), 0x0badcafe);
    value_is(&d, "version", "1");
    value_is(&d, "changeTrackPath", NULL);
    char *id = vmdk_desc_get(&d, "ddb.longContentID");
    assert_int_equal(strlen(id), 32);
    assert_string_equal(id + 24, "0badcafe");
    assert_memory_not_equal(id, "3ca4d6ec709912129cf7ecb7", 24);
    free(id);
    vmdk_desc_free(&d);
}

static void seven_digits_stay_seven(void **state)
{
    (void)state;
    struct vmdk_desc d;
    static const struct {
        uint32_t cid;
        const char *digits;
    } cases[] = {{0x00ffffff, "00ffffff"},
                 {0x01000000, "1000000"},
                 {0x0fffffff, "fffffff"},
                 {0x10000000, "10000000"}};
    for (size_t i = 0; i < 4; i++) {
        must_parse(&d, "version=1\nCID=52db3b7\n");
        assert_int_equal(vmdk_desc_set_cid(&d, cases[i].cid, &err), 0);
        value_is(&d, "CID", cases[i].digits);
        vmdk_desc_free(&d);
    }
    must_parse(&d, "version=1\nCID=52db3b7\n");
    uint32_t cid = vmdk_random_cid(7);
    assert_true(cid >= 0x01000000 && cid <= 0x0fffffff);
    assert_int_equal(vmdk_desc_set_cid(&d, cid, &err), 0);
    assert_int_equal(d.len, strlen("version=1\nCID=52db3b7\n"));
    assert_int_equal(id_of(&d, "CID"), cid);
    assert_int_equal(vmdk_desc_set_cid(&d, 0xabcdef01, &err), 0);
    assert_string_equal(d.text, "version=1\nCID=abcdef01\n");
    vmdk_desc_free(&d);
}

static void reserved_ids_are_never_generated(void **state)
{
    (void)state;
    assert_true(vmdk_cid_is_reserved(0));
    assert_true(vmdk_cid_is_reserved(0xfffffffe));
    assert_true(vmdk_cid_is_reserved(0xffffffff));
    assert_false(vmdk_cid_is_reserved(1));
    for (int i = 0; i < 1000; i++)
        assert_false(vmdk_cid_is_reserved(vmdk_random_cid(8)));
}

/* ------------------------------------------------------------------ the header */

#define BIG (UINT64_C(1) << 40)

static void good_header(uint8_t buf[VMDK_HEADER_SIZE], struct vmdk_header *h)
{
    assert_int_equal(vmdk_header_layout(h, "x", 20480, 128, 20, false, &err), 0);
    vmdk_header_encode(h, buf);
}

static int decode(const uint8_t *buf, uint64_t file_size)
{
    struct vmdk_header h;
    err = (struct dr_error)DR_ERROR_INIT;
    return vmdk_header_decode(&h, "x.vmdk", buf, file_size, &err);
}

static void layout_is_vmwares(void **state)
{
    (void)state;
    struct vmdk_header h;
    uint8_t buf[VMDK_HEADER_SIZE];
    good_header(buf, &h);
    assert_int_equal(h.rgd_off, 0x15); /* 10 MiB */
    assert_int_equal(h.gd_off, 0x1a);
    assert_int_equal(h.overhead, 128);
    assert_int_equal(vmdk_header_layout(&h, "x", 131072, 128, 20, false, &err), 0);
    assert_int_equal(h.gd_off, 0x1e); /* 64 MiB */
    assert_int_equal(vmdk_header_layout(&h, "x", 20480, 128, 0, true, &err), 0);
    assert_int_equal(h.rgd_off, 1); /* a piece of a split disk */
    assert_int_equal(h.gd_off, 6);
    assert_int_equal(h.version, 2);
    assert_int_equal(h.flags, 7);
}

static void what_is_encoded_decodes(void **state)
{
    (void)state;
    struct vmdk_header h, back;
    uint8_t buf[VMDK_HEADER_SIZE];
    good_header(buf, &h);
    assert_int_equal(vmdk_header_decode(&back, "x", buf, BIG, &err), 0);
    uint8_t again[VMDK_HEADER_SIZE];
    vmdk_header_encode(&back, again);
    assert_memory_equal(again, buf, sizeof(buf));
    assert_int_equal(back.n_tables, h.n_tables);
    assert_int_equal(back.gd_sectors, h.gd_sectors);
    assert_int_equal(back.gt_sectors, h.gt_sectors);
}

static void tables_are_rounded_up(void **state)
{
    (void)state;
    struct vmdk_header h;
    assert_int_equal(vmdk_header_layout(&h, "x", 65536, 128, 0, false, &err), 0);
    assert_int_equal(h.n_tables, 1);
    assert_int_equal(vmdk_header_layout(&h, "x", 65537, 128, 0, false, &err), 0);
    assert_int_equal(h.n_tables, 2);
    assert_int_equal(vmdk_header_layout(&h, "x", 0, 128, 0, false, &err), 0);
    assert_int_equal(h.n_tables, 0);
}

struct poke {
    size_t at, len;
    uint64_t value;
    int error;
    const char *why;
};

static void damaged_headers_are_refused(void **state)
{
    (void)state;
    static const struct poke pokes[] = {
        {0, 4, 0x766d646b, EINVAL, "unfinished"},
        {0, 4, 0x44574f43, EINVAL, "expected magic"},
        {0, 8, 0xcafebabe, ENOTSUP, "seSparse"},
        {0, 4, 0, EINVAL, "expected magic"},
        {4, 4, 0, ENOTSUP, "header version 0"},
        {4, 4, 4, ENOTSUP, "header version 4"},
        {8, 4, 0x30003, ENOTSUP, "compression algorithm 0"},
        {8, 4, 0x10003, ENOTSUP, "without markers"},
        {8, 4, 0x20003, EINVAL, "not compressed"},
        {8, 4, 0x40003, ENOTSUP, "0x40000"},
        {8, 4, 0x80000001, ENOTSUP, "0x80000000"},
        {12, 8, UINT64_C(1) << 55, EINVAL, "capacity"},
        {12, 8, UINT64_MAX, EINVAL, "capacity"},
        {12, 8, UINT64_C(1) << 50, EFBIG, "L1 size too big"},
        {20, 8, 0, EINVAL, "grain size"},
        {20, 8, 129, EINVAL, "grain size"},
        {20, 8, 0x400000, EINVAL, "grain size"},
        {20, 8, UINT64_C(1) << 63, EINVAL, "grain size"},
        {28, 8, UINT64_MAX - 5, EINVAL, "descriptor"},
        {28, 8, 0x16, EINVAL, "overlap"},
        {36, 8, UINT64_MAX, EINVAL, "descriptor"},
        {36, 8, UINT64_C(1) << 40, EINVAL, "descriptor"}, /* no file is so long: no truncation */
        {44, 4, 0, EINVAL, "entries a grain table"},
        {44, 4, 513, EINVAL, "entries a grain table"},
        {48, 8, UINT64_MAX, EINVAL, "grain directory"},
        {48, 8, UINT64_C(1) << 40, EINVAL, "grain directory"},
        {48, 8, 0x1a, EINVAL, "overlap"},
        {48, 8, 5, EINVAL, "overlap"},
        {56, 8, UINT64_MAX, EINVAL, "at the end"},
        {56, 8, UINT64_MAX - 1, EINVAL, "grain directory"},
        {56, 8, 0, EINVAL, "grain directory"},
        {64, 8, UINT64_MAX, EINVAL, "metadata"},
        {64, 8, UINT64_C(1) << 40, EINVAL, "metadata"},
        {73, 1, 13, EINVAL, "text mode"},
        {75, 1, 10, EINVAL, "text mode"},
        {77, 2, 1, EINVAL, "compression algorithm (1)"},
    };
    struct vmdk_header h;
    uint8_t buf[VMDK_HEADER_SIZE];
    good_header(buf, &h);
    assert_int_equal(decode(buf, BIG), 0);
    for (size_t i = 0; i < sizeof(pokes) / sizeof(pokes[0]); i++) {
        uint8_t poked[VMDK_HEADER_SIZE], value[8];
        memcpy(poked, buf, sizeof(poked));
        put_le64(value, pokes[i].value);
        memcpy(poked + pokes[i].at, value, pokes[i].len);
        assert_int_equal(decode(poked, BIG), -pokes[i].error);
        if (!strstr(err.text, pokes[i].why))
            fail_msg("poke %zu: '%s' does not say '%s'", i, err.text, pokes[i].why);
    }
}

static void harmless_flags_are_ignored(void **state)
{
    (void)state;
    struct vmdk_header h;
    uint8_t buf[VMDK_HEADER_SIZE];
    good_header(buf, &h);
    put_le32(buf + 8, 0x8003);
    assert_int_equal(decode(buf, BIG), 0);
    put_le32(buf + 8, 0x2); /* without bit 0 the line-end bytes mean nothing */
    buf[73] = 0;
    assert_int_equal(decode(buf, BIG), 0);
}

static void tables_must_lie_in_the_file(void **state)
{
    (void)state;
    struct vmdk_header h;
    uint8_t buf[VMDK_HEADER_SIZE];
    good_header(buf, &h);
    assert_int_equal(decode(buf, 128 * 512), 0);
    assert_int_equal(decode(buf, 127 * 512), -EINVAL);
    assert_int_equal(decode(buf, 512), -EINVAL);
}

static void too_big_for_32_bit_sectors_is_refused(void **state)
{
    (void)state;
    struct vmdk_header h;
    err = (struct dr_error)DR_ERROR_INIT;
    /* 62 TiB are fine */
    assert_int_equal(vmdk_header_layout(&h, "x", UINT64_C(62) << 31, 128, 20, false, &err), 0);
    assert_int_equal(vmdk_header_layout(&h, "x", UINT64_C(1) << 50, 128, 20, false, &err), -EFBIG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys_are_whole_left_hand_sides),
        cmocka_unit_test(case_blanks_crlf_and_bom_do_not_matter),
        cmocka_unit_test(a_lone_cr_is_no_line_end),
        cmocka_unit_test(text_ends_at_nul),
        cmocka_unit_test(missing_final_newline_is_fine),
        cmocka_unit_test(extent_lines_tell_everything),
        cmocka_unit_test(broken_extent_lines_are_refused),
        cmocka_unit_test(damaged_lines_that_matter_are_not_left_out),
        cmocka_unit_test(what_decides_may_stand_only_once),
        cmocka_unit_test(versions_beyond_three_and_no_version_are_refused),
        cmocka_unit_test(ids_are_one_to_eight_hex_digits),
        cmocka_unit_test(a_megabyte_is_too_long),
        cmocka_unit_test(probe_knows_descriptors_from_other_text),
        cmocka_unit_test(edits_keep_everything_else),
        cmocka_unit_test(new_lines_end_as_the_others_do),
        cmocka_unit_test(values_with_quotes_or_line_ends_are_refused),
        cmocka_unit_test(a_new_cid_keeps_the_length),
        cmocka_unit_test(seven_digits_stay_seven),
        cmocka_unit_test(reserved_ids_are_never_generated),
        cmocka_unit_test(layout_is_vmwares),
        cmocka_unit_test(what_is_encoded_decodes),
        cmocka_unit_test(tables_are_rounded_up),
        cmocka_unit_test(damaged_headers_are_refused),
        cmocka_unit_test(harmless_flags_are_ignored),
        cmocka_unit_test(tables_must_lie_in_the_file),
        cmocka_unit_test(too_big_for_32_bit_sectors_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
