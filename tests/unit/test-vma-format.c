/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bytes of VMA archives: what is built is read back, and every rule of the header and of
 * extents refuses what breaks it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "archive/vma-format.h"
#include "archive/vma-layout.h"
#include "base/bytes.h"

#define NAME "a.vma"

static const uint8_t uuid[16] = "0123456789abcdef";

/* ------------------------------------------------------------------ help */

static struct dr_vma_disk two_disks[] = {{1, "drive-scsi0", 1 << 20, false},
                                         {7, "vmstate", 100000, true}};
static struct dr_vma_config two_configs[] = {{"qemu-server.conf", (const uint8_t *)"a: b\n", 5},
                                             {"empty.fw", NULL, 0}};

static uint8_t *built(struct dr_vma_header h, uint32_t *size)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t *buf;
    memcpy(h.uuid, uuid, 16);
    if (vma_header_build(&h, &buf, size, &err) < 0)
        fail_msg("%s", err.text);
    return buf;
}

static uint8_t *sample(uint32_t *size)
{
    return built((struct dr_vma_header){.ctime = 1700000000,
                                        .disks = two_disks,
                                        .n_disks = 2,
                                        .configs = two_configs,
                                        .n_configs = 2},
                 size);
}

static void resum(uint8_t *buf, uint32_t size)
{
    assert_int_equal(vma_md5(buf, size, VMA_AT_MD5, buf + VMA_AT_MD5, "a.vma", NULL), 0);
}

static void note(void *user, const char *text)
{
    char *all = user;
    snprintf(all + strlen(all), 4096 - strlen(all), "%s\n", text);
}

static int parse(const uint8_t *buf, uint32_t size, struct dr_vma_header *h, char warned[4096],
                 struct dr_error *err)
{
    warned[0] = '\0';
    *err = (struct dr_error)DR_ERROR_INIT;
    return vma_header_parse(buf, size, NAME, h, note, warned, err);
}

/* Pokes 4 bytes at off, fixes the sum, and expects a refusal with these words. */
static void refuse_poked(uint32_t off, uint32_t value, const char *words)
{
    uint32_t size;
    uint8_t *buf = sample(&size);
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    put_be32(buf + off, value);
    resum(buf, size);
    assert_int_equal(parse(buf, size, &h, warned, &err), -EINVAL);
    if (!strstr(err.text, words) || strncmp(err.text, NAME ": ", 7) != 0)
        fail_msg("'%s' lacks '%s'", err.text, words);
    assert_null(h.disks);
    free(buf);
}

static void accept_poked(uint32_t off, uint32_t value, const char *words, struct dr_vma_header *h)
{
    uint32_t size;
    uint8_t *buf = sample(&size);
    struct dr_error err;
    char warned[4096];
    put_be32(buf + off, value);
    resum(buf, size);
    if (parse(buf, size, h, warned, &err) < 0)
        fail_msg("%s", err.text);
    if (!strstr(warned, words))
        fail_msg("'%s' lacks '%s'", warned, words);
    free(buf);
}

/* ------------------------------------------------------------------ header */

static void header_comes_back(void **state)
{
    (void)state;
    uint32_t size, told = 0;
    uint8_t *buf = sample(&size);
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    assert_int_equal(size % 512, 0);
    assert_int_equal(vma_header_size(buf, NAME, &told, NULL), 0);
    assert_int_equal(told, size);
    assert_int_equal(parse(buf, size, &h, warned, &err), 0);
    assert_string_equal(warned, "");
    free(buf); /* the header has copies */
    assert_memory_equal(h.uuid, uuid, 16);
    assert_int_equal(h.ctime, 1700000000);
    assert_int_equal(h.n_disks, 2);
    assert_int_equal(h.disks[0].id, 1);
    assert_string_equal(h.disks[0].name, "drive-scsi0");
    assert_int_equal(h.disks[0].size, 1 << 20);
    assert_false(h.disks[0].vmstate);
    assert_int_equal(h.disks[1].id, 7);
    assert_true(h.disks[1].vmstate);
    assert_int_equal(h.n_configs, 2);
    assert_string_equal(h.configs[0].name, "qemu-server.conf");
    assert_int_equal(h.configs[0].len, 5);
    assert_memory_equal(h.configs[0].data, "a: b\n", 5);
    assert_int_equal(h.configs[1].len, 0);
    assert_ptr_equal(vma_header_disk(&h, 7), &h.disks[1]);
    assert_null(vma_header_disk(&h, 2));
    vma_header_free(&h);
    assert_null(h.disks);
}

static void layout_is_the_formats(void **state)
{
    (void)state;
    uint32_t size;
    uint8_t *buf = sample(&size);
    assert_memory_equal(buf, "VMA\0\0\0\0\1", 8);
    assert_int_equal(get_be32(buf + 48), 12288);
    /* 0, "qemu-server.conf", its 5 bytes, "empty.fw", nothing, "drive-scsi0", "vmstate" */
    uint32_t end = 1 + 19 + 7 + 11 + 2 + 14 + 10;
    assert_int_equal(get_be32(buf + 52), end);
    assert_int_equal(get_be32(buf + 2044), 1);
    assert_int_equal(get_be32(buf + 3068), 20);
    assert_int_equal(get_le16(buf + 12288 + 1), 17); /* the one little-endian number */
    assert_string_equal((char *)buf + 12288 + 3, "qemu-server.conf");
    assert_int_equal(get_be32(buf + 4096 + 7 * 32), end - 10);
    assert_int_equal(get_be64(buf + 4096 + 7 * 32 + 8), 100000);
    free(buf);
}

static void nothing_at_all_is_an_archive(void **state)
{
    (void)state;
    uint32_t size;
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    uint8_t *buf = built((struct dr_vma_header){0}, &size);
    assert_int_equal(size, 12800); /* 12288 is refused by the reference tool */
    assert_int_equal(parse(buf, size, &h, warned, &err), 0);
    assert_int_equal(h.n_disks + h.n_configs, 0);
    vma_header_free(&h);
    /* what that tool makes of nothing */
    put_be32(buf + 56, 12288);
    resum(buf, 12288);
    assert_int_equal(parse(buf, 12288, &h, warned, &err), 0);
    vma_header_free(&h);
    /* but with a disk its name would be outside */
    put_be32(buf + 4096 + 32, 1);
    resum(buf, 12288);
    assert_int_equal(parse(buf, 12288, &h, warned, &err), -EINVAL);
    free(buf);
}

static void largest_tables_come_back(void **state)
{
    (void)state;
    struct dr_vma_disk disks[254];
    struct dr_vma_config configs[256];
    static char names[510][16];
    uint8_t *data = malloc(65535);
    memset(data, 0x5a, 65535);
    for (unsigned i = 0; i < 254; i++) {
        snprintf(names[i], 16, "disk%u", i);
        disks[i] = (struct dr_vma_disk){i + 1, names[i], VMA_MAX_SIZE, false};
    }
    for (unsigned i = 0; i < 256; i++) {
        snprintf(names[254 + i], 16, "config %u", i);
        configs[i] = (struct dr_vma_config){names[254 + i], data, 65535};
    }
    uint32_t size;
    uint8_t *buf = built(
        (struct dr_vma_header){
            .disks = disks, .n_disks = 254, .configs = configs, .n_configs = 256},
        &size);
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    assert_int_equal(parse(buf, size, &h, warned, &err), 0);
    assert_int_equal(h.n_disks, 254);
    assert_int_equal(h.n_configs, 256);
    assert_string_equal(h.disks[253].name, "disk253");
    assert_int_equal(h.disks[253].size, VMA_MAX_SIZE);
    assert_string_equal(h.configs[255].name, "config 255");
    assert_int_equal(h.configs[255].len, 65535);
    assert_memory_equal(h.configs[255].data, data, 65535);
    vma_header_free(&h);
    free(buf);
    free(data);
}

static void every_flipped_byte_of_a_header_is_found(void **state)
{
    (void)state;
    uint32_t size;
    uint8_t *buf = sample(&size);
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    for (uint32_t i = 0; i < size; i++) {
        buf[i] ^= 0x41;
        assert_int_equal(parse(buf, size, &h, warned, &err), -EINVAL);
        buf[i] ^= 0x41;
    }
    for (uint32_t cut = 0; cut < size; cut += cut < 12280 ? 1117 : 1)
        assert_int_equal(parse(buf, cut, &h, warned, &err), -EINVAL);
    assert_int_equal(parse(buf, size, &h, warned, &err), 0);
    vma_header_free(&h);
    free(buf);
}

static void broken_headers_are_refused(void **state)
{
    (void)state;
    refuse_poked(0, 0x564d4101, "no VMA archive");
    refuse_poked(4, 2, "version 2");
    refuse_poked(56, 12287, "header of 12287 bytes (offset 56)");
    refuse_poked(56, (64u << 20) + 1, "header of 67108865 bytes (offset 56)");
    refuse_poked(56, 0xffffffff, "header of 4294967295 bytes (offset 56)");
    refuse_poked(56, 12800 + 512, "inside its header");
    refuse_poked(48, 12287, "expected them between");
    refuse_poked(48, 0xfffffff0, "expected them between"); /* + size wraps in 32 bits */
    refuse_poked(52, 0xffffd000, "expected them between");
    refuse_poked(52, 513, "expected them between");
    refuse_poked(2044, 2, "configuration 0: its name");
    refuse_poked(3068, 21, "configuration 0: its contents");
    refuse_poked(3068 + 4, 5000, "configuration 1: its contents");
    refuse_poked(2044, 20, "does not end in a NUL");    /* the contents as a name */
    refuse_poked(2044, 38, "does not end in a NUL");    /* the empty blob */
    refuse_poked(52, 30, "configuration 1: its name");  /* a blob cut by the buffer's end */
    refuse_poked(4096 + 32 + 8, 0x00010001, "at most"); /* 2^48 + ... */
    refuse_poked(12288 + 3, 0x71006d75, "holds a NUL");
    refuse_poked(12288 + 3, 0x00656d75, "name is empty");
}

static void odd_headers_are_told(void **state)
{
    (void)state;
    struct dr_vma_header h;
    accept_poked(2044 + 4, 0, "configuration 1 has no name", &h);
    assert_int_equal(h.n_configs, 1);
    vma_header_free(&h);
    accept_poked(3068, 0, "configuration 0 has no contents", &h);
    assert_int_equal(h.n_configs, 1);
    vma_header_free(&h);
    accept_poked(4096 + 32, 41, "device 1 (offset 4128) has no name", &h);
    assert_int_equal(h.n_disks, 1);
    vma_header_free(&h);
    accept_poked(4096 + 7 * 32 + 12, 0, "device 7 (offset 4320) has no size", &h);
    assert_int_equal(h.n_disks, 1);
    vma_header_free(&h);
    accept_poked(2044 + 4, 1, "two configurations have the name 'qemu-server.conf'", &h);
    assert_int_equal(h.n_configs, 2);
    vma_header_free(&h);
    accept_poked(4096 + 7 * 32, 40, "devices 1 and 7 have the same name, 'drive-scsi0'", &h);
    assert_int_equal(h.n_disks, 2);
    vma_header_free(&h);
}

static void device_255_is_told(void **state)
{
    (void)state;
    uint32_t size;
    uint8_t *buf = sample(&size);
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    memcpy(buf + 4096 + 255 * 32, buf + 4096 + 32, 32);
    memset(buf + 4096 + 32, 0, 32);
    resum(buf, size);
    assert_int_equal(parse(buf, size, &h, warned, &err), 0);
    assert_non_null(strstr(warned, "device 255 ('drive-scsi0')"));
    assert_int_equal(h.disks[1].id, 255);
    vma_header_free(&h);
    free(buf);
}

static void hostile_names_reach_messages_escaped(void **state)
{
    (void)state;
    uint32_t size;
    uint8_t *buf = sample(&size);
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    memcpy(buf + 12288 + 42, "\x1b[2J\nDEV:\\\x9b", 11); /* "drive-scsi0" */
    put_be32(buf + 4096 + 7 * 32, 40);
    resum(buf, size);
    assert_int_equal(parse(buf, size, &h, warned, &err), 0);
    assert_non_null(strstr(warned, "'\\x1b[2J\\x0aDEV:\\x5c\\x9b"));
    vma_header_free(&h);
    free(buf);
}

static void walk_over_millions_of_blobs_ends(void **state)
{
    (void)state;
    uint32_t size = 8u << 20;
    uint8_t *buf = calloc(1, size); /* 2-byte blobs all the way */
    struct dr_vma_header h;
    struct dr_error err;
    char warned[4096];
    memcpy(buf, "VMA\0\0\0\0\1", 8);
    put_be32(buf + 48, 12288);
    put_be32(buf + 52, size - 12288);
    put_be32(buf + 56, size);
    for (unsigned i = 0; i < 256; i++) {
        put_be32(buf + 2044 + i * 4, 1 + i * 30000);
        put_be32(buf + 3068 + i * 4, 1 + i * 30000);
    }
    resum(buf, size);
    assert_int_equal(parse(buf, size, &h, warned, &err), -EINVAL);
    assert_non_null(strstr(err.text, "does not end in a NUL"));
    free(buf);
}

/* ------------------------------------------------------------------ building */

static void refuse_build(struct dr_vma_header h, const char *words)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t *buf;
    uint32_t size;
    assert_int_equal(vma_header_build(&h, &buf, &size, &err), -EINVAL);
    assert_null(buf);
    if (!strstr(err.text, words))
        fail_msg("'%s' lacks '%s'", err.text, words);
}

static void refuse_disk(unsigned id, const char *name, uint64_t size, bool vmstate,
                        const char *words)
{
    struct dr_vma_disk d[2] = {{1, "first", 512, false}, {id, name, size, vmstate}};
    refuse_build((struct dr_vma_header){.disks = d, .n_disks = 2}, words);
}

static void refuse_config(const char *name, size_t len, const char *words)
{
    struct dr_vma_config c[2] = {{"first", NULL, 0}, {name, NULL, len}};
    refuse_build((struct dr_vma_header){.configs = c, .n_configs = 2}, words);
}

static void writers_rules_hold(void **state)
{
    (void)state;
    struct dr_vma_disk none = {0, "a", 512, false}; /* the first one, which nothing precedes */
    char name[257];
    memset(name, 'n', 256);
    name[256] = '\0';
    refuse_build((struct dr_vma_header){.disks = &none, .n_disks = 1}, "device id 0");
    refuse_disk(0, "a", 512, false, "device id 0");
    refuse_disk(1, "a", 512, false, "ascending");
    refuse_disk(255, "a", 512, false, "device id 255");
    refuse_disk(2, "", 512, false, "cannot be");
    refuse_disk(2, "a b", 512, false, "cannot be");
    refuse_disk(2, "a/b", 512, false, "cannot be");
    refuse_disk(2, "a\nb", 512, false, "a\\x0ab");
    refuse_disk(2, name, 512, false, "cannot be");
    refuse_disk(2, "first", 512, false, "two disks");
    refuse_disk(2, "vmstate", 512, false, "state of a machine");
    refuse_disk(2, "state", 512, true, "state of a machine");
    refuse_disk(2, "a", 0, false, "size 0");
    refuse_disk(2, "a", 513, false, "size 513");
    refuse_disk(2, "a", VMA_MAX_SIZE + 512, false, "size 281474976711168");
    refuse_config("../a", 0, "cannot be");
    refuse_config("..", 0, "cannot be");
    refuse_config("", 0, "cannot be");
    refuse_config("first", 0, "two configurations");
    refuse_config("a", 65536, "65536 bytes");
    refuse_build((struct dr_vma_header){.n_disks = 255}, "255 disks");
    refuse_build((struct dr_vma_header){.n_configs = 257}, "257 configurations");
}

static void safe_names_are_told(void **state)
{
    (void)state;
    char name[257];
    memset(name, 'n', 256);
    name[256] = '\0';
    assert_true(dr_vma_name_is_safe("qemu-server.conf"));
    assert_true(dr_vma_name_is_safe("with blank"));
    assert_true(dr_vma_name_is_safe("..."));
    assert_true(dr_vma_name_is_safe(name + 1));
    assert_false(dr_vma_name_is_safe(name));
    assert_false(dr_vma_name_is_safe(""));
    assert_false(dr_vma_name_is_safe("."));
    assert_false(dr_vma_name_is_safe(".."));
    assert_false(dr_vma_name_is_safe("a/b"));
    assert_false(dr_vma_name_is_safe("/"));
    assert_false(dr_vma_name_is_safe("a\nb"));
    assert_false(dr_vma_name_is_safe("a\x7f"));
}

static void long_names_are_cut_in_messages(void **state)
{
    (void)state;
    char buf[16];
    assert_string_equal(vma_show("\n\n\n\n\n\n", buf, sizeof(buf)), "\\x0a\\x0a\\x0a");
    assert_string_equal(vma_show("plain", buf, sizeof(buf)), "plain");
}

/* ------------------------------------------------------------------ extents */

static void make_extent(uint8_t buf[512])
{
    struct vma_slot slots[59] = {{0}};
    slots[0] = (struct vma_slot){1, 5, 0x8001, 0};
    slots[2] = (struct vma_slot){1, 0xffffffff, 0, 0};
    slots[58] = (struct vma_slot){7, 0, 0xffff, 0};
    assert_int_equal(vma_extent_build(slots, 59, uuid, buf, NULL), 0);
}

static void extent_comes_back(void **state)
{
    (void)state;
    uint8_t buf[512];
    struct vma_extent e;
    make_extent(buf);
    assert_memory_equal(buf, "VMAE\0\0\0\x12", 8);
    assert_memory_equal(buf + 40, "\x80\x01\0\1\0\0\0\5", 8);
    assert_int_equal(vma_extent_parse(buf, uuid, NAME, 0, &e, NULL), 0);
    assert_int_equal(e.n, 3);
    assert_int_equal(e.data_len, 18 * 4096);
    assert_int_equal(e.slot[0].mask, 0x8001);
    assert_int_equal(e.slot[1].cluster, 0xffffffff);
    assert_int_equal(e.slot[2].id, 7);
    assert_int_equal(e.slot[2].data, 2 * 4096);
    assert_int_equal(vma_block_at(&e.slot[0], 15), 4096);
    assert_int_equal(vma_block_at(&e.slot[2], 3), 5 * 4096);
}

static void resum_extent(uint8_t buf[512])
{
    assert_int_equal(vma_md5(buf, 512, VMA_AT_EXTENT_MD5, buf + VMA_AT_EXTENT_MD5, "a.vma", NULL),
                     0);
}

static void refuse_extent(const uint8_t buf[512], const char *words)
{
    struct dr_error err = DR_ERROR_INIT;
    struct vma_extent e;
    assert_int_equal(vma_extent_parse(buf, uuid, NAME, 12800, &e, &err), -EBADMSG);
    if (!strstr(err.text, words) || !strstr(err.text, NAME ": ") || !strstr(err.text, "12800"))
        fail_msg("'%s' lacks '%s'", err.text, words);
}

static void every_flipped_byte_of_an_extent_is_found(void **state)
{
    (void)state;
    uint8_t buf[512];
    make_extent(buf);
    for (unsigned i = 0; i < 512; i++) {
        buf[i] ^= 0x10;
        refuse_extent(buf, i < 6 ? "expected \"VMAE\"" : "checksum");
        buf[i] ^= 0x10;
    }
}

static void broken_extents_are_refused(void **state)
{
    (void)state;
    uint8_t buf[512];
    make_extent(buf);
    buf[5] = 1;
    resum_extent(buf);
    refuse_extent(buf, "expected \"VMAE\"");
    make_extent(buf);
    buf[8] ^= 1;
    resum_extent(buf);
    refuse_extent(buf, "another archive's");
    static const unsigned wrong[] = {0, 17, 19, 945, 65535};
    for (unsigned i = 0; i < 5; i++) {
        make_extent(buf);
        put_be16(buf + 6, (uint16_t)wrong[i]);
        resum_extent(buf);
        refuse_extent(buf, "it counts");
    }
    make_extent(buf);
    buf[43] = 0; /* the first slot is not used any more: its blocks are left over */
    resum_extent(buf);
    refuse_extent(buf, "it counts 18 blocks, its clusters have 16");
}

static void odd_extents_are_taken(void **state)
{
    (void)state;
    uint8_t buf[512];
    struct vma_extent e;
    assert_int_equal(vma_extent_build(NULL, 0, uuid, buf, NULL), 0);
    assert_int_equal(vma_extent_parse(buf, uuid, NAME, 0, &e, NULL), 0);
    assert_int_equal(e.n, 0);
    make_extent(buf);
    buf[42] = 0xee;     /* reserved */
    buf[40 + 8] = 0xff; /* mask of a slot that is not used */
    resum_extent(buf);
    assert_int_equal(vma_extent_parse(buf, uuid, NAME, 0, &e, NULL), 0);
    assert_int_equal(e.n, 3);
}

static void slots_must_fit_the_header(void **state)
{
    (void)state;
    struct dr_vma_header h = {.disks = two_disks, .n_disks = 2};
    struct dr_error err = DR_ERROR_INIT;
    struct vma_slot s = {1, 15, 0, 0};
    assert_int_equal(vma_slot_check(&h, &s, NAME, 9, &err), 0);
    s.cluster = 16;
    assert_int_equal(vma_slot_check(&h, &s, NAME, 9, &err), -EBADMSG);
    assert_string_equal(err.text, NAME ": extent at offset 9: cluster 16 of device 1 "
                                       "('drive-scsi0'), which has only 16");
    err = (struct dr_error)DR_ERROR_INIT;
    s.id = 2;
    assert_int_equal(vma_slot_check(&h, &s, NAME, 9, &err), -EBADMSG);
    assert_non_null(strstr(err.text, "device 2 is not in the header"));
    s = (struct vma_slot){7, 0xffffffff, 0, 0}; /* a stream may be longer than it said */
    assert_int_equal(vma_slot_check(&h, &s, NAME, 9, &err), 0);
    assert_int_equal(vma_clusters(1), 1);
    assert_int_equal(vma_clusters(65536), 1);
    assert_int_equal(vma_clusters(VMA_MAX_SIZE), 1ull << 32);
}

/* What stands behind the fixed part: a byte that is not used, and for each blob 2 bytes and its
 * own, of a name with the NUL at its end. */
static void a_header_is_as_long_as_its_blobs_need(void **state)
{
    (void)state;
    static const uint8_t data[1200];
    struct dr_vma_disk disk = {1, "disk", 512, false};
    for (size_t len = 0; len < sizeof(data); len++) {
        struct dr_vma_config config = {"conf", data, len};
        uint32_t size;
        free(built(
            (struct dr_vma_header){
                .disks = &disk, .n_disks = 1, .configs = &config, .n_configs = 1},
            &size));
        size_t blobs = 1 + (2 + 5) + (2 + len) + (2 + 5);
        assert_int_equal(size, (VMA_FIXED_HEADER + blobs + 511) / 512 * 512);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_header_is_as_long_as_its_blobs_need),
        cmocka_unit_test(header_comes_back),
        cmocka_unit_test(layout_is_the_formats),
        cmocka_unit_test(nothing_at_all_is_an_archive),
        cmocka_unit_test(largest_tables_come_back),
        cmocka_unit_test(every_flipped_byte_of_a_header_is_found),
        cmocka_unit_test(broken_headers_are_refused),
        cmocka_unit_test(odd_headers_are_told),
        cmocka_unit_test(device_255_is_told),
        cmocka_unit_test(hostile_names_reach_messages_escaped),
        cmocka_unit_test(walk_over_millions_of_blobs_ends),
        cmocka_unit_test(writers_rules_hold),
        cmocka_unit_test(safe_names_are_told),
        cmocka_unit_test(long_names_are_cut_in_messages),
        cmocka_unit_test(extent_comes_back),
        cmocka_unit_test(every_flipped_byte_of_an_extent_is_found),
        cmocka_unit_test(broken_extents_are_refused),
        cmocka_unit_test(odd_extents_are_taken),
        cmocka_unit_test(slots_must_fit_the_header),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
