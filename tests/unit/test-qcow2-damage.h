/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images in memory and kinds of damage, which the tests of qcow2's check and repair share. */
#ifndef DR_TESTS_TEST_QCOW2_DAMAGE_H
#define DR_TESTS_TEST_QCOW2_DAMAGE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/core.h"
#include "formats/qcow2/check.h"
#include "ops/ops-internal.h"

#include "faultfs.h"
#include "powerfs.h"
#include "test-in-memory.h"

#define KiB  UINT64_C(1024)
#define SIZE (1024 * KiB)
#define PATH "/d/a.qcow2"

/* ------------------------------------------------------------------ images */

struct shape {
    const char *name;
    struct dr_option options[3];
    size_t n;
};
static const struct shape shapes[] = {
    {"clusters of 4 KiB", {{"cluster_size", "4096"}}, 1},
    {"version 2", {{"cluster_size", "4096"}, {"compat", "0.10"}}, 2},
    {"clusters of 512 bytes", {{"cluster_size", "512"}}, 1},
    {"counts of 1 bit", {{"cluster_size", "4096"}, {"refcount_bits", "1"}}, 2},
    {"counts of 64 bits", {{"cluster_size", "4096"}, {"refcount_bits", "64"}}, 2},
    {"sub-clusters", {{"cluster_size", "16384"}, {"extended_l2", "on"}}, 2},
};
#define N_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static inline void write_at(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

static inline void make_in(struct dr_fs *fs, const struct shape *shape)
{
    struct dr_create_params p = {.size = SIZE, .options = shape->options, .n_options = shape->n};
    struct dr_disk *disk;
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    ok(dr_format_qcow2.create(fs, PATH, &p, &err));
    ok(dr_open_fs(fs, PATH, &open, &disk, &err));
    write_at(disk, 0, 100 * KiB, 1);
    write_at(disk, 512 * KiB, 80 * KiB, 2);
    ok(dr_zero(disk, 64 * KiB, 16 * KiB, 0, &err));
    write_at(disk, 700 * KiB, 3 * KiB, 3);
    ok(dr_close(disk, &err));
}

static inline uint64_t peek(struct dr_fs *fs, uint64_t off, unsigned len)
{
    uint8_t raw[8] = {0};
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_NO_LOCK, &f, &err));
    ok(dr_file_pread_short(f, raw + 8 - len, off, len, NULL, &err));
    dr_file_unref(f);
    return get_be64(raw);
}

static inline void poke(struct dr_fs *fs, uint64_t off, uint64_t v, unsigned len)
{
    uint8_t raw[8];
    struct dr_file *f;
    put_be64(raw, v);
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, raw + 8 - len, off, len, &err));
    dr_file_unref(f);
}

/* An image under the knife. */
struct patient {
    struct dr_fs *fs;
    const struct shape *shape;
    uint64_t cluster, l1, roots, size, entry; /* entry: bytes of one */
    unsigned version, order;
};

static inline struct patient patient_of(struct dr_fs *fs, const struct shape *shape)
{
    struct patient p = {.fs = fs, .shape = shape};
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_NO_LOCK, &f, &err));
    p.size = dr_file_size(f);
    dr_file_unref(f);
    p.version = (unsigned)peek(fs, 4, 4);
    p.cluster = UINT64_C(1) << peek(fs, 20, 4);
    p.l1 = peek(fs, QCOW2_AT_L1 + 4, 8);
    p.roots = peek(fs, QCOW2_AT_REFTABLE, 8);
    p.order = p.version < 3 ? 4 : (unsigned)peek(fs, QCOW2_AT_ORDER, 4);
    p.entry = p.version >= 3 && (peek(fs, QCOW2_AT_INCOMPATIBLE, 8) & QCOW2_EXTL2) ? 16 : 8;
    return p;
}

static inline uint64_t l2_of(const struct patient *p)
{
    return peek(p->fs, p->l1, 8) & QCOW2_OFFSET;
}

/* Where the i-th entry of the first table stands: all of the first ones have data. */
static inline uint64_t entry_at(const struct patient *p, unsigned i)
{
    return l2_of(p) + i * p->entry;
}

static inline uint64_t entry_of(const struct patient *p, unsigned i)
{
    return peek(p->fs, entry_at(p, i), 8);
}

static inline void set_count(const struct patient *p, uint64_t host, uint64_t count)
{
    uint64_t i = host / p->cluster, per = p->cluster * 8 >> p->order;
    uint64_t block = peek(p->fs, p->roots + 8 * (i / per), 8);
    uint64_t at = block + ((i % per) << p->order) / 8;
    uint8_t byte = (uint8_t)peek(p->fs, at, 1);
    if (p->order >= 3) {
        poke(p->fs, at, count, 1u << (p->order - 3));
    } else {
        qcow2_count_put(p->order, &byte, i % (8u >> p->order), count);
        poke(p->fs, at, byte, 1);
    }
}

/* ------------------------------------------------------------------ checking */

static char lines[65536];

static inline void note(void *user, const char *line)
{
    (void)user;
    size_t used = strlen(lines);
    snprintf(lines + used, sizeof(lines) - used, "%s\n", line);
}

static inline int check_in(struct dr_fs *fs, unsigned fix, struct dr_check_result *result)
{
    struct dr_image *image;
    unsigned flags = DR_OPEN_AS_FOUND | (fix ? (unsigned)DR_OPEN_RDWR : 0);
    *result = (struct dr_check_result){.report = note};
    lines[0] = '\0';
    err = (struct dr_error)DR_ERROR_INIT;
    int r = dr_image_open(fs, PATH, "qcow2", flags, &image, &err);
    if (r < 0)
        return r;
    r = dr_format_qcow2.check(image, fix, result, &err);
    int closed = dr_image_unref(image, r < 0 ? NULL : &err);
    return r != 0 ? r : closed;
}

static inline struct dr_check_result checked(struct dr_fs *fs, unsigned fix)
{
    struct dr_check_result result;
    int r = check_in(fs, fix, &result);
    ok_at(r, __LINE__);
    assert_int_equal(r, 0);
    return result;
}

static inline bool is_clean(struct dr_check_result r)
{
    return r.corruptions == 0 && r.leaks == 0 && r.check_errors == 0;
}

/* The guest's bytes, or NULL if some of them cannot be read. */
static inline uint8_t *guest_bytes(struct dr_fs *fs)
{
    struct dr_disk *disk;
    uint8_t *buf = calloc(1, SIZE);
    err = (struct dr_error)DR_ERROR_INIT;
    int r = dr_open_fs(fs, PATH, NULL, &disk, &err);
    if (r == 0) {
        r = dr_pread(disk, buf, 0, SIZE, &err);
        dr_close(disk, NULL);
    }
    if (r < 0) {
        free(buf);
        return NULL;
    }
    return buf;
}

/* ------------------------------------------------------------------ kinds of damage */

static inline void count_of_a_table_too_high(const struct patient *p)
{
    set_count(p, l2_of(p), 2);
}
static inline void count_of_data_zero(const struct patient *p)
{
    set_count(p, entry_of(p, 1) & QCOW2_OFFSET, 0);
}
static inline void count_of_the_table_of_counts_zero(const struct patient *p)
{
    set_count(p, p->roots, 0);
}
static inline void all_counts_zero(const struct patient *p)
{
    uint64_t block = peek(p->fs, p->roots, 8);
    for (uint64_t i = 0; i < p->cluster; i += 8)
        poke(p->fs, block + i, 0, 8);
}
static inline void unused_cluster_counted(const struct patient *p)
{
    uint64_t end = dr_round_up(p->size, p->cluster);
    poke(p->fs, end + 2 * p->cluster - 1, 0, 1);
    set_count(p, end, 1);
}
static inline void not_copied_though_alone(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) & ~QCOW2_COPIED, 8);
}
static inline void table_not_copied_though_alone(const struct patient *p)
{
    poke(p->fs, p->l1, peek(p->fs, p->l1, 8) & ~QCOW2_COPIED, 8);
}
static inline void counts_unsound_and_data_lost(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) | UINT64_C(1) << 57, 8);
    poke(p->fs, p->roots, peek(p->fs, p->roots, 8) | 1, 8);
}
static inline void two_entries_at_one_place(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 1), 8);
}
static inline void two_compressed_at_one_place(const struct patient *p)
{
    uint64_t v = QCOW2_CODED | (entry_of(p, 1) & QCOW2_OFFSET) | UINT64_C(1) << 60;
    poke(p->fs, entry_at(p, 0), v, 8);
    poke(p->fs, entry_at(p, 1), v, 8);
}
static inline void reserved_bits_in_l2(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) | UINT64_C(1) << 57, 8);
}
static inline void reserved_bits_in_l1(const struct patient *p)
{
    poke(p->fs, p->l1, peek(p->fs, p->l1, 8) | UINT64_C(1) << 57, 8);
}
static inline void table_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, p->l1, peek(p->fs, p->l1, 8) + 512, 8);
}
static inline void data_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) + 512, 8);
}
static inline void zeros_at_an_odd_place(const struct patient *p)
{
    uint64_t v = (entry_of(p, 0) + 512) | (p->entry == 8 ? QCOW2_ZERO : 0);
    poke(p->fs, entry_at(p, 0), v, 8);
    if (p->entry == 16)
        poke(p->fs, entry_at(p, 0) + 8, UINT64_MAX << 32, 8);
}
static inline void compressed_and_copied(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_CODED | QCOW2_COPIED | (entry_of(p, 0) & QCOW2_OFFSET), 8);
    if (p->entry == 16)
        poke(p->fs, entry_at(p, 0) + 8, 0, 8);
}
static inline void compressed_with_subclusters(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_CODED | (entry_of(p, 0) & QCOW2_OFFSET), 8);
}
static inline void held_and_zero(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0) + 8, UINT64_C(0x100000001), 8);
}
static inline void held_nowhere(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), 0, 8);
}
static inline void data_behind_the_end(const struct patient *p)
{
    uint64_t end = dr_round_up(p->size, p->cluster);
    poke(p->fs, entry_at(p, 0), QCOW2_COPIED | (end + 3 * p->cluster), 8);
}
static inline void data_in_a_table(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_COPIED | p->l1, 8);
}
static inline void data_in_the_counts(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_COPIED | peek(p->fs, p->roots, 8), 8);
}
static inline void reserved_bits_in_the_table_of_counts(const struct patient *p)
{
    poke(p->fs, p->roots, peek(p->fs, p->roots, 8) | 1, 8);
}
static inline void counts_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, p->roots, peek(p->fs, p->roots, 8) + 512, 8);
}
static inline void counts_behind_the_end(const struct patient *p)
{
    poke(p->fs, p->roots, UINT64_C(1) << 40, 8);
}
static inline void table_of_counts_behind_the_end(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_REFTABLE, dr_round_up(p->size, p->cluster) + 4 * p->cluster, 8);
}
static inline void table_of_counts_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_REFTABLE, p->roots + 8, 8);
}
static inline void table_of_counts_too_large(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_REFTABLE + 8, UINT32_MAX, 4);
}
static inline void no_table_of_counts(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_REFTABLE + 8, 0, 4);
}
static inline void no_counts(const struct patient *p)
{
    poke(p->fs, p->roots, 0, 8);
}
static inline void one_block_for_two_ranges(const struct patient *p)
{
    poke(p->fs, p->roots + p->cluster - 8, peek(p->fs, p->roots, 8), 8);
}
static inline void marked_as_corrupt(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_INCOMPATIBLE + 7,
         peek(p->fs, QCOW2_AT_INCOMPATIBLE + 7, 1) | QCOW2_CORRUPT, 1);
    set_count(p, entry_of(p, 1) & QCOW2_OFFSET, 0);
}
static inline void snapshots_without_a_table(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_SNAPSHOTS, 3, 4);
    poke(p->fs, QCOW2_AT_SNAPSHOTS + 4, dr_round_up(p->size, p->cluster), 8);
}

/* A snapshot of nothing, as version 2 has it. */
static inline void snapshot_of_version_2(const struct patient *p)
{
    uint64_t at = dr_round_up(p->size, p->cluster);
    poke(p->fs, at + p->cluster - 8, 0, 8);
    poke(p->fs, at, p->l1, 8);
    poke(p->fs, at + 12, 1, 2); /* of the id */
    poke(p->fs, at + 14, 1, 2); /* of the name */
    poke(p->fs, at + 40, UINT64_C(0x3161) << 48, 8);
    set_count(p, at, 1);
    poke(p->fs, QCOW2_AT_SNAPSHOTS, 1, 4);
    poke(p->fs, QCOW2_AT_SNAPSHOTS + 4, at, 8);
}
static inline uint64_t extensions_end(const struct patient *p)
{
    uint64_t at = peek(p->fs, QCOW2_AT_LENGTH, 4);
    while (peek(p->fs, at, 4))
        at += 8 + dr_round_up(peek(p->fs, at + 4, 4), 8);
    return at;
}
/* The first is of a type that does not exist, the second is all right. */
static inline void one_of_two_bitmaps_bad(const struct patient *p)
{
    uint64_t ext = extensions_end(p), at = dr_round_up(p->size, p->cluster);
    poke(p->fs, at + 2 * p->cluster - 8, 0, 8);
    poke(p->fs, ext, QCOW2_EXT_BITMAPS, 4);
    poke(p->fs, ext + 4, 24, 4);
    poke(p->fs, ext + 8, 2, 4);
    poke(p->fs, ext + 16, 64, 8);
    poke(p->fs, ext + 24, at, 8);
    poke(p->fs, ext + 32, 0, 8);
    poke(p->fs, QCOW2_AT_AUTOCLEAR, QCOW2_BITMAPS, 8);
    for (uint64_t i = 0; i < 2; i++) {
        uint64_t entry = at + 32 * i;
        poke(p->fs, entry, at + p->cluster, 8);
        poke(p->fs, entry + 8, 1, 4);
        poke(p->fs, entry + 16, i == 0 ? 9 : 1, 1);
        poke(p->fs, entry + 17, 16, 1);
        poke(p->fs, entry + 18, 1, 2);
        poke(p->fs, entry + 24, 'a' + i, 1);
        set_count(p, at + i * p->cluster, 1);
    }
}
static inline void two_bitmaps(const struct patient *p)
{
    uint64_t at = dr_round_up(p->size, p->cluster);
    one_of_two_bitmaps_bad(p);
    poke(p->fs, at + 16, 1, 1);
    poke(p->fs, at, at + 2 * p->cluster, 8);
    poke(p->fs, at + 3 * p->cluster - 8, 0, 8);
    set_count(p, at + 2 * p->cluster, 1);
}
static inline void two_bitmaps_of_one_name(const struct patient *p)
{
    two_bitmaps(p);
    poke(p->fs, dr_round_up(p->size, p->cluster) + 32 + 24, 'a', 1);
}
/* Its bits count as set then. */
static inline void bitmap_that_leads_nowhere(const struct patient *p)
{
    two_bitmaps(p);
    poke(p->fs, dr_round_up(p->size, p->cluster) + p->cluster, 2, 8);
}

enum { SUB = 1, V3 = 2, WIDE = 4, KEEPS = 8, PLAIN = 16, NARROW = 32 };
static const struct damage {
    const char *name;
    void (*inflict)(const struct patient *p);
    const char *says; /* the line that names it */
    unsigned only;    /* shapes that can have it; KEEPS: a repair has no answer */
} damages[] = {
#define D(name, says, only)     \
    {                           \
#name, name, says, only \
    }
    D(count_of_a_table_too_high, "Leaked cluster", WIDE),
    D(count_of_data_zero, "refcount=0 reference=1", 0),
    D(count_of_the_table_of_counts_zero, "ERROR cluster 1 refcount=0 reference=1", 0),
    D(all_counts_zero, "ERROR cluster 0 refcount=0 reference=1 (at byte 0)", 0),
    D(unused_cluster_counted, "Leaked cluster", 0),
    D(not_copied_though_alone, "OFLAG_COPIED data cluster", 0),
    D(table_not_copied_though_alone, "OFLAG_COPIED L2 cluster", 0),
    D(two_entries_at_one_place, "refcount=1 reference=2", WIDE),
    D(two_entries_at_one_place, "2 references, counts go up to 1", NARROW),
    D(two_compressed_at_one_place, "2 references, counts go up to 1", NARROW),
    D(data_in_a_table, "2 references, counts go up to 1", NARROW),
    D(data_in_the_counts, "2 references, counts go up to 1", NARROW),
    D(reserved_bits_in_l2, "l2 entry with reserved bits set", KEEPS),
    D(reserved_bits_in_l1, "L1 entry with reserved bits set", KEEPS),
    D(table_at_an_odd_place, "Table is not cluster aligned", KEEPS | PLAIN),
    D(data_at_an_odd_place, "Data cluster is not properly aligned", KEEPS | PLAIN),
    D(zeros_at_an_odd_place, "Preallocated cluster is not properly aligned", V3 | PLAIN),
    D(compressed_and_copied, "copied flag must never be set for compressed", 0),
    D(compressed_with_subclusters, "non-zero subcluster allocation bitmap", SUB | KEEPS),
    D(held_and_zero, "corrupted subcluster allocation bitmap", SUB | KEEPS),
    D(held_nowhere, "non-zero subcluster allocation map", SUB | KEEPS),
    D(data_behind_the_end, "exceeding the end of the file", KEEPS),
    D(data_in_a_table, "refcount=1 reference=2", WIDE),
    D(data_in_the_counts, "ERROR refcount block 0 refcount=2", WIDE),
    D(reserved_bits_in_the_table_of_counts, "refcount table entry 0 has reserved bits", 0),
    D(counts_unsound_and_data_lost, "refcount table entry 0 has reserved bits", KEEPS),
    D(counts_at_an_odd_place, "refcount block 0 is not cluster aligned", PLAIN),
    D(counts_behind_the_end, "refcount block 0 is outside image", 0),
    D(table_of_counts_behind_the_end, "exceeding the end of the file", 0),
    D(table_of_counts_at_an_odd_place, "cannot be where the header says", 0),
    D(table_of_counts_too_large, "cannot be where the header says", 0),
    D(no_table_of_counts, "ERROR cluster 0 refcount=0 reference=1", 0),
    D(no_counts, "ERROR cluster 0 refcount=0 reference=1", 0),
    D(one_block_for_two_ranges, "refcount=2", WIDE),
    D(marked_as_corrupt, "refcount=0 reference=1", V3),
    D(snapshots_without_a_table, "is missing: the header says that there are 3", 0),
    D(snapshot_of_version_2, "snapshot table entry 0 is incomplete", V3),
    D(one_of_two_bitmaps_bad, "ERROR bitmap directory entry 0", V3),
    D(two_bitmaps_of_one_name, "another one has the same name", V3),
    D(bitmap_that_leads_nowhere, "ERROR bitmap table entry 0x2", V3),
#undef D
};
#define N_DAMAGES (sizeof(damages) / sizeof(damages[0]))

static inline bool can_have(const struct patient *p, const struct damage *d)
{
    if ((d->only & SUB) && p->entry != 16)
        return false;
    if ((d->only & V3) && p->version < 3)
        return false;
    if ((d->only & PLAIN) && p->cluster == 512) /* nothing is at an odd place */
        return false;
    if ((d->only & NARROW) && p->order > 0)
        return false;
    return !(d->only & WIDE) || p->order > 0;
}

#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

#endif
