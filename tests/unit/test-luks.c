/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* LUKS: headers that cannot be, stripes, secrets, parts of sectors written at once, and what a
 * power cut leaves. That other programs understand the format is tests/interop/test_luks.py. */
#include "outcome.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/secret.h"
#include "core/core.h"
#include "drover/ops.h"
#include "faultfs.h"
#include "formats/luks/header.h"
#include "ops/ops-internal.h"
#include "powerfs.h"

#define SIZE   (1u << 20)
#define SECTOR 512u

static const char *const formats[] = {"luks", "qcow2"};

/* ------------------------------------------------------------------ disks */

static void make_disk(struct dr_fs *fs, const char *format)
{
    static const struct dr_pair inside[] = {
        {"encrypt.format", "luks"}, {"encrypt.key-secret", "s"}, {"encrypt.iter-time", "1"}};
    static const struct dr_pair own[] = {{"key-secret", "s"}, {"iter-time", "1"}};
    bool luks = strcmp(format, "luks") == 0;
    struct dr_create_options o = {
        .format = format, .size = SIZE, .pairs = luks ? own : inside, .n_pairs = luks ? 2 : 3};
    ok(dr_secret_set("s", "password", 8));
    ok(dr_create_fs(fs, "/d/disk", &o, &err));
}

static struct dr_disk *open_disk(struct dr_fs *fs, const char *format, unsigned flags)
{
    struct dr_open_options o = {.format = format, .flags = flags, .key_secret = "s"};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "/d/disk", &o, &disk, &err));
    return disk;
}

static void put(struct dr_disk *disk, uint8_t byte, uint64_t off, size_t len)
{
    static uint8_t buf[SIZE];
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

/* ------------------------------------------------------------------ headers */

static void headers_that_cannot_be_are_refused(void **state)
{
    (void)state;
    static const struct {
        unsigned at;
        uint32_t value;
        const char *says;
    } damage[] = {
        {0, 0x4c554b53, NULL}, /* as it is */
        {0, 0x4c554b54, "no LUKS header"},
        {4, 0xbabe0002, "no LUKS header"},
        {104, 7, "disk begins at byte 3584"},
        {104, UINT32_MAX, "disk begins at byte"},
        {108, 0, "key has 0 bytes"},
        {108, 65, "key has 65 bytes"},
        {164, 0, "digest in its LUKS header has no iterations"},
        {164, UINT32_MAX, "iterations to try a password"},
        {208, 1, "key slot 0 of its LUKS header, at byte 208, is neither active nor inactive"},
        {212, 0, "has no iterations"},
        {212, UINT32_MAX, "iterations to try a password"},
        {248, 7, "lies in the header itself"},
        {248, UINT32_MAX, "reaches into the encrypted disk"},
        {252, 3999, "has not 4000 stripes"},
        {208 + 48 + 40, 9, "overlaps another one"},
        {208 + 7 * 48 + 44, UINT32_MAX, "key slot 7 of its LUKS header, at byte 544, has not"},
    };
    struct luks_options o = LUKS_DEFAULTS;
    struct luks_header h, again;
    uint8_t good[LUKS_HEADER], buf[LUKS_HEADER];
    o.secret = "s";
    ok(luks_plan(&o, "x", "", &h, &err));
    h.slots[0].active = true;
    h.slots[0].iterations = h.iterations = 1000;
    luks_encode(&h, good);
    for (size_t i = 0; i < sizeof(damage) / sizeof(damage[0]); i++) {
        memcpy(buf, good, sizeof(buf));
        put_be32(buf + damage[i].at, damage[i].value);
        if (damage[i].says)
            refused(luks_decode(buf, "x", &again, &err), EINVAL, damage[i].says);
        else
            ok(luks_decode(buf, "x", &again, &err));
    }
    memset(good + 40, 'x', 32);
    refused(luks_decode(good, "x", &again, &err), EINVAL, "at byte 40, does not end");
}

static void a_file_that_ends_in_its_header_is_refused(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_disk *disk;
    struct dr_file *f;
    make_disk(fs, "luks");
    ok(dr_file_open(fs, "/d/disk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, 100000, &err));
    dr_file_unref(f);
    refused(dr_open_fs(fs, "/d/disk", NULL, &disk, &err), EINVAL, "ends in its LUKS header");
    dr_fs_memory_free(fs);
}

static void the_key_is_in_all_stripes_together(void **state)
{
    (void)state;
    uint8_t key[33], got[33];
    uint8_t *stripes = malloc(sizeof(key) * LUKS_STRIPES);
    for (size_t i = 0; i < sizeof(key); i++)
        key[i] = (uint8_t)(i * 7);
    ok(luks_split("sha1", key, sizeof(key), stripes, &err));
    ok(luks_merge("sha1", stripes, sizeof(key), got, &err));
    assert_memory_equal(key, got, sizeof(key));
    stripes[5] ^= 1;
    ok(luks_merge("sha1", stripes, sizeof(key), got, &err));
    assert_memory_not_equal(key, got, sizeof(key));
    free(stripes);
}

/* ------------------------------------------------------------------ secrets */

static void a_secret_is_replaced_and_forgotten(void **state)
{
    (void)state;
    static char large[DR_SECRET_MAX + 1];
    void *data;
    size_t len;
    ok(dr_secret_set("a", "one", 3));
    ok(dr_secret_set("b", "", 0));
    ok(dr_secret_set("a", "two", 3));
    ok(dr_secret_get("a", "x", &data, &len, &err));
    assert_int_equal(len, 3);
    assert_memory_equal(data, "two", 3);
    dr_key_free(data, len);
    dr_secret_forget("a");
    refused(dr_secret_get("a", "x", &data, &len, &err), ENOENT, "No secret with id 'a'");
    ok(dr_secret_get("b", "x", &data, &len, &err));
    assert_int_equal(len, 0);
    dr_key_free(data, len);
    assert_int_equal(dr_secret_set("a", large, sizeof(large)), -EINVAL);
    dr_secret_forget(NULL);
    refused(dr_secret_get("b", "x", &data, &len, &err), ENOENT, "No secret");
}

static void another_password_opens_nothing(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_open_options o = {.key_secret = "s"};
        struct dr_disk *disk = NULL;
        make_disk(fs, formats[i]);
        ok(dr_secret_set("s", "passwore", 8));
        refused(dr_open_fs(fs, "/d/disk", &o, &disk, &err), EACCES, "Invalid password");
        dr_secret_forget("s");
        refused(dr_open_fs(fs, "/d/disk", &o, &disk, &err), ENOENT, "No secret");
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ parts of sectors */

struct writer {
    struct dr_disk *disk;
    uint64_t off;
    uint8_t byte;
};

static void *write_again_and_again(void *user)
{
    struct writer *w = user;
    for (int i = 0; i < 2000; i++)
        if (dr_pwrite(w->disk, &w->byte, w->off, 1, 0, NULL) < 0)
            return w;
    return NULL;
}

/* One byte each of the same sector: a sector that is read, changed and written back must not undo
 * what another thread has written in between. */
static void writers_of_one_sector_keep_what_others_write(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        make_disk(fs, formats[i]);
        struct dr_disk *disk = open_disk(fs, formats[i], DR_OPEN_RDWR);
        uint8_t got[8], want[8];
        put(disk, 0, 0, 4096);
        for (uint8_t round = 1; round <= 3; round++) {
            struct writer writers[8];
            pthread_t threads[8];
            for (unsigned t = 0; t < 8; t++) {
                writers[t] = (struct writer){disk, 1000 + t, (uint8_t)(round * 16 + t)};
                pthread_create(&threads[t], NULL, write_again_and_again, &writers[t]);
                want[t] = writers[t].byte;
            }
            for (unsigned t = 0; t < 8; t++) {
                void *failed;
                pthread_join(threads[t], &failed);
                assert_null(failed);
            }
            ok(dr_pread(disk, got, 1000, sizeof(got), &err));
            assert_memory_equal(got, want, sizeof(got));
        }
        ok(dr_close(disk, &err));
        dr_fs_memory_free(fs);
    }
}

/* What is read back is what was written, whatever the offset and length, and no plain sector is in
 * the file. */
static void any_offset_and_length(void **state)
{
    (void)state;
    static uint8_t want[SIZE], got[SIZE], file[8u << 20];
    for (size_t i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_file *f;
        size_t len;
        make_disk(fs, formats[i]);
        struct dr_disk *disk = open_disk(fs, formats[i], DR_OPEN_RDWR);
        put(disk, 1, 0, SIZE);
        memset(want, 1, SIZE);
        srand(5);
        for (int n = 0; n < 60; n++) {
            size_t off = (size_t)rand() % SIZE, most = (size_t)rand() % (n % 2 ? 1500 : 300000);
            size_t part = dr_min(most + 1, SIZE - off);
            put(disk, (uint8_t)n, off, part);
            memset(want + off, n, part);
        }
        ok(dr_zero(disk, 70001, 100000, DR_MAY_UNMAP, &err));
        memset(want + 70001, 0, 100000);
        ok(dr_close(disk, &err));
        disk = open_disk(fs, formats[i], 0);
        ok(dr_pread(disk, got, 0, SIZE, &err));
        assert_memory_equal(got, want, SIZE);
        ok(dr_close(disk, &err));
        ok(dr_file_open(fs, "/d/disk", 0, &f, &err));
        ok(dr_file_pread_short(f, file, 0, sizeof(file), &len, &err));
        dr_file_unref(f);
        assert_null(memmem(file, len, want + SIZE - SECTOR, SECTOR));
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ power cuts */

/* Each sector is what it was at the last flush, or one of what was written since. */
static void look_after_cut(struct dr_fs *disk_fs, const char *format)
{
    static uint8_t got[SIZE];
    struct dr_disk *disk = open_disk(disk_fs, format, DR_OPEN_RDWR);
    ok(dr_pread(disk, got, 0, SIZE, &err));
    for (size_t at = 0; at < SIZE; at += SECTOR) {
        uint8_t first = got[at];
        bool part = at == 4096; /* of this one 100 bytes were written */
        uint8_t second = part && got[at + 10] == 4 ? 4 : first;
        for (size_t i = 0; i < SECTOR; i++) {
            uint8_t want = part && i >= 10 && i < 110 ? second : first;
            if (got[at + i] != want)
                fail_msg("%s: sector %zu is neither old nor new", format, at / SECTOR);
        }
        bool rewritten = at >= 8192 && at < 8192 + 65536;
        bool later = at >= 300000 / SECTOR * SECTOR && at < 400000;
        if (first != 1 && !(rewritten && first == 2) && !(later && (first == 3 || first == 0)))
            fail_msg("%s: sector %zu has %u", format, at / SECTOR, first);
    }
    ok(dr_close(disk, &err));
}

static void a_power_cut_leaves_whole_sectors(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct powerfs *p = powerfs_new();
        make_disk(powerfs_fs(p), formats[i]);
        struct dr_disk *disk = open_disk(powerfs_fs(p), formats[i], DR_OPEN_RDWR);
        put(disk, 1, 0, SIZE);
        ok(dr_flush(disk, &err));
        powerfs_settle(p);
        put(disk, 2, 8192, 65536);
        put(disk, 4, 4096 + 10, 100);
        ok(dr_discard(disk, 327680, 65536, &err));
        put(disk, 3, 327680, 65536);
        ok(dr_close(disk, &err));
        for (size_t cut = 0; cut <= powerfs_ops(p); cut = powerfs_next(p, cut, 8))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *left = powerfs_cut(p, cut, (enum powerfs_mode)mode, cut + 3);
                look_after_cut(left, formats[i]);
                dr_fs_memory_free(left);
            }
        powerfs_free(p);
    }
}

/* ------------------------------------------------------------------ growing */

#define GROWN (SIZE + 5 * SECTOR)

/* The disk has what it had, and zeros behind that. Its size. */
static uint64_t look_at_grown(struct dr_fs *fs, const char *format)
{
    static uint8_t got[GROWN];
    struct dr_disk *disk = open_disk(fs, format, 0);
    uint64_t size = dr_size(disk);
    assert_in_range(size, SIZE, GROWN);
    ok(dr_pread(disk, got, 0, size, &err));
    for (size_t at = 0; at < size; at++)
        if (got[at] != (at < SIZE ? 1 : 0))
            fail_msg("%s: byte %zu of %llu is %u", format, at, (unsigned long long)size, got[at]);
    ok(dr_close(disk, &err));
    return size;
}

/* Killed: all that was done so far is there. */
static void a_disk_that_was_killed_while_it_grew_has_no_noise(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct powerfs *p = powerfs_new();
        make_disk(powerfs_fs(p), formats[i]);
        struct dr_disk *disk = open_disk(powerfs_fs(p), formats[i], DR_OPEN_RDWR);
        put(disk, 1, 0, SIZE);
        ok(dr_flush(disk, &err));
        powerfs_settle(p);
        ok(dr_truncate(disk, GROWN, &err));
        ok(dr_close(disk, &err));
        assert_true(powerfs_ops(p) > 0);
        for (size_t cut = 0; cut <= powerfs_ops(p); cut++) {
            struct dr_fs *left = powerfs_cut(p, cut, POWERFS_ALL, 0);
            uint64_t size = look_at_grown(left, formats[i]);
            if (cut == powerfs_ops(p))
                assert_int_equal(size, GROWN);
            dr_fs_memory_free(left);
        }
        powerfs_free(p);
    }
}

/* ------------------------------------------------------------------ faults */

/* Whatever fails while a disk grows, it is as it was. */
static void a_disk_that_cannot_grow_is_as_it_was(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        bool fired = true;
        for (uint64_t nth = 0; fired; nth++) {
            struct dr_fs *memory = dr_fs_memory_new();
            struct faultfs *f = faultfs_new(memory);
            make_disk(faultfs_fs(f), formats[i]);
            struct dr_disk *disk = open_disk(faultfs_fs(f), formats[i], DR_OPEN_RDWR);
            put(disk, 1, 0, SIZE);
            ok(dr_flush(disk, &err));
            faultfs_arm(f, &(struct faultfs_plan){
                               .nth = nth, .error = ENOSPC, .partial = true, .seed = nth});
            int r = dr_truncate(disk, GROWN, NULL);
            fired = faultfs_fired(f);
            faultfs_disarm(f);
            dr_close(disk, NULL);
            uint64_t size = look_at_grown(memory, formats[i]);
            if (r == 0 || strcmp(formats[i], "luks") == 0)
                assert_int_equal(size, r < 0 ? SIZE : GROWN);
            faultfs_free(f);
            dr_fs_memory_free(memory);
        }
    }
}

/* Or all of it, where only its name may not be durable. */
static void what_cannot_be_made_leaves_nothing(void **state)
{
    (void)state;
    unsigned nothing = 0;
    static const struct dr_pair inside[] = {
        {"encrypt.format", "luks"}, {"encrypt.key-secret", "s"}, {"encrypt.iter-time", "1"}};
    static const struct dr_pair own[] = {{"key-secret", "s"}, {"iter-time", "1"}};
    ok(dr_secret_set("s", "password", 8));
    for (size_t i = 0; i < 2; i++) {
        struct dr_create_options o = {.format = formats[i],
                                      .size = SIZE,
                                      .pairs = i == 0 ? own : inside,
                                      .n_pairs = i == 0 ? 2 : 3};
        bool fired = true;
        for (uint64_t nth = 0; fired; nth++) {
            struct dr_fs *memory = dr_fs_memory_new();
            struct faultfs *f = faultfs_new(memory);
            faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = dr_create_fs(faultfs_fs(f), "/d/disk", &o, NULL);
            fired = faultfs_fired(f);
            faultfs_disarm(f);
            bool there = dr_fs_exists(memory, "/d/disk");
            assert_true(r < 0 || there);
            if (there)
                ok(dr_close(open_disk(memory, formats[i], 0), &err));
            nothing += !there;
            faultfs_free(f);
            dr_fs_memory_free(memory);
        }
    }
    assert_true(nothing > 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(headers_that_cannot_be_are_refused),
        cmocka_unit_test(a_file_that_ends_in_its_header_is_refused),
        cmocka_unit_test(the_key_is_in_all_stripes_together),
        cmocka_unit_test(a_secret_is_replaced_and_forgotten),
        cmocka_unit_test(another_password_opens_nothing),
        cmocka_unit_test(writers_of_one_sector_keep_what_others_write),
        cmocka_unit_test(any_offset_and_length),
        cmocka_unit_test(a_power_cut_leaves_whole_sectors),
        cmocka_unit_test(a_disk_that_was_killed_while_it_grew_has_no_noise),
        cmocka_unit_test(a_disk_that_cannot_grow_is_as_it_was),
        cmocka_unit_test(what_cannot_be_made_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
