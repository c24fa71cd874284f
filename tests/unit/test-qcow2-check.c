/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Damage in qcow2 images: found, named, repaired where there is one answer, and never made worse,
 * whatever fails meanwhile. */
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

#define KiB  UINT64_C(1024)
#define SIZE (1024 * KiB)
#define PATH "/d/a.qcow2"

static struct dr_error err;
static struct dr_fs *mem;

static void ok_at(int r, int line)
{
    if (r < 0)
        fail_msg("line %d: %d %s", line, r, err.text);
}
#define ok(expression) (err = (struct dr_error)DR_ERROR_INIT, ok_at((expression), __LINE__))

static int set_up(void **state)
{
    (void)state;
    mem = dr_fs_memory_new();
    return mem ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    dr_fs_memory_free(mem);
    return 0;
}

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

static void write_at(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

static void make_in(struct dr_fs *fs, const struct shape *shape)
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

static uint64_t peek(struct dr_fs *fs, uint64_t off, unsigned len)
{
    uint8_t raw[8] = {0};
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_NO_LOCK, &f, &err));
    ok(dr_file_pread_short(f, raw + 8 - len, off, len, NULL, &err));
    dr_file_unref(f);
    return get_be64(raw);
}

static void poke(struct dr_fs *fs, uint64_t off, uint64_t v, unsigned len)
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

static struct patient patient_of(struct dr_fs *fs, const struct shape *shape)
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

static uint64_t l2_of(const struct patient *p)
{
    return peek(p->fs, p->l1, 8) & QCOW2_OFFSET;
}

/* Where the i-th entry of the first table stands: all of the first ones have data. */
static uint64_t entry_at(const struct patient *p, unsigned i)
{
    return l2_of(p) + i * p->entry;
}

static uint64_t entry_of(const struct patient *p, unsigned i)
{
    return peek(p->fs, entry_at(p, i), 8);
}

static void set_count(const struct patient *p, uint64_t host, uint64_t count)
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

static void note(void *user, const char *line)
{
    (void)user;
    size_t used = strlen(lines);
    snprintf(lines + used, sizeof(lines) - used, "%s\n", line);
}

static int check_in(struct dr_fs *fs, unsigned fix, struct dr_check_result *result)
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
    return r < 0 ? r : closed;
}

static struct dr_check_result checked(struct dr_fs *fs, unsigned fix)
{
    struct dr_check_result result;
    ok_at(check_in(fs, fix, &result), __LINE__);
    return result;
}

static bool is_clean(struct dr_check_result r)
{
    return r.corruptions == 0 && r.leaks == 0 && r.check_errors == 0;
}

/* The guest's bytes, or NULL if some of them cannot be read. */
static uint8_t *guest_bytes(struct dr_fs *fs)
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

static void count_of_a_table_too_high(const struct patient *p)
{
    set_count(p, l2_of(p), 2);
}
static void count_of_data_zero(const struct patient *p)
{
    set_count(p, entry_of(p, 1) & QCOW2_OFFSET, 0);
}
static void count_of_the_table_of_counts_zero(const struct patient *p)
{
    set_count(p, p->roots, 0);
}
static void all_counts_zero(const struct patient *p)
{
    uint64_t block = peek(p->fs, p->roots, 8);
    for (uint64_t i = 0; i < p->cluster; i += 8)
        poke(p->fs, block + i, 0, 8);
}
static void unused_cluster_counted(const struct patient *p)
{
    uint64_t end = dr_round_up(p->size, p->cluster);
    poke(p->fs, end + 2 * p->cluster - 1, 0, 1);
    set_count(p, end, 1);
}
static void not_copied_though_alone(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) & ~QCOW2_COPIED, 8);
}
static void table_not_copied_though_alone(const struct patient *p)
{
    poke(p->fs, p->l1, peek(p->fs, p->l1, 8) & ~QCOW2_COPIED, 8);
}
static void two_entries_at_one_place(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 1), 8);
}
static void reserved_bits_in_l2(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) | UINT64_C(1) << 57, 8);
}
static void reserved_bits_in_l1(const struct patient *p)
{
    poke(p->fs, p->l1, peek(p->fs, p->l1, 8) | UINT64_C(1) << 57, 8);
}
static void table_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, p->l1, peek(p->fs, p->l1, 8) + 512, 8);
}
static void data_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), entry_of(p, 0) + 512, 8);
}
static void zeros_at_an_odd_place(const struct patient *p)
{
    uint64_t v = (entry_of(p, 0) + 512) | (p->entry == 8 ? QCOW2_ZERO : 0);
    poke(p->fs, entry_at(p, 0), v, 8);
    if (p->entry == 16)
        poke(p->fs, entry_at(p, 0) + 8, UINT64_MAX << 32, 8);
}
static void compressed_and_copied(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_CODED | QCOW2_COPIED | (entry_of(p, 0) & QCOW2_OFFSET), 8);
    if (p->entry == 16)
        poke(p->fs, entry_at(p, 0) + 8, 0, 8);
}
static void compressed_with_subclusters(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_CODED | (entry_of(p, 0) & QCOW2_OFFSET), 8);
}
static void held_and_zero(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0) + 8, UINT64_C(0x100000001), 8);
}
static void held_nowhere(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), 0, 8);
}
static void data_behind_the_end(const struct patient *p)
{
    uint64_t end = dr_round_up(p->size, p->cluster);
    poke(p->fs, entry_at(p, 0), QCOW2_COPIED | (end + 3 * p->cluster), 8);
}
static void data_in_a_table(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_COPIED | p->l1, 8);
}
static void data_in_the_counts(const struct patient *p)
{
    poke(p->fs, entry_at(p, 0), QCOW2_COPIED | peek(p->fs, p->roots, 8), 8);
}
static void reserved_bits_in_the_table_of_counts(const struct patient *p)
{
    poke(p->fs, p->roots, peek(p->fs, p->roots, 8) | 1, 8);
}
static void counts_at_an_odd_place(const struct patient *p)
{
    poke(p->fs, p->roots, peek(p->fs, p->roots, 8) + 512, 8);
}
static void counts_behind_the_end(const struct patient *p)
{
    poke(p->fs, p->roots, UINT64_C(1) << 40, 8);
}
static void table_of_counts_behind_the_end(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_REFTABLE, dr_round_up(p->size, p->cluster) + 4 * p->cluster, 8);
}
static void no_table_of_counts(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_REFTABLE + 8, 0, 4);
}
static void no_counts(const struct patient *p)
{
    poke(p->fs, p->roots, 0, 8);
}
static void one_block_for_two_ranges(const struct patient *p)
{
    poke(p->fs, p->roots + p->cluster - 8, peek(p->fs, p->roots, 8), 8);
}
static void marked_as_corrupt(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_INCOMPATIBLE + 7,
         peek(p->fs, QCOW2_AT_INCOMPATIBLE + 7, 1) | QCOW2_CORRUPT, 1);
    set_count(p, entry_of(p, 1) & QCOW2_OFFSET, 0);
}
static void snapshots_without_a_table(const struct patient *p)
{
    poke(p->fs, QCOW2_AT_SNAPSHOTS, 3, 4);
    poke(p->fs, QCOW2_AT_SNAPSHOTS + 4, dr_round_up(p->size, p->cluster), 8);
}

/* A snapshot of nothing, as version 2 has it. */
static void snapshot_of_version_2(const struct patient *p)
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
static uint64_t extensions_end(const struct patient *p)
{
    uint64_t at = peek(p->fs, QCOW2_AT_LENGTH, 4);
    while (peek(p->fs, at, 4))
        at += 8 + dr_round_up(peek(p->fs, at + 4, 4), 8);
    return at;
}
/* The first is of a type that does not exist, the second is all right. */
static void one_of_two_bitmaps_bad(const struct patient *p)
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

enum { SUB = 1, V3 = 2, WIDE = 4, KEEPS = 8, PLAIN = 16 };
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
    D(counts_at_an_odd_place, "refcount block 0 is not cluster aligned", PLAIN),
    D(counts_behind_the_end, "refcount block 0 is outside image", 0),
    D(table_of_counts_behind_the_end, "exceeding the end of the file", 0),
    D(no_table_of_counts, "ERROR cluster 0 refcount=0 reference=1", 0),
    D(no_counts, "ERROR cluster 0 refcount=0 reference=1", 0),
    D(one_block_for_two_ranges, "refcount=2", WIDE),
    D(marked_as_corrupt, "refcount=0 reference=1", V3),
    D(snapshots_without_a_table, "is missing: the header says that there are 3", 0),
    D(snapshot_of_version_2, "snapshot table entry 0 is incomplete", V3),
    D(one_of_two_bitmaps_bad, "ERROR bitmap directory entry 0", V3),
#undef D
};
#define N_DAMAGES (sizeof(damages) / sizeof(damages[0]))

static bool can_have(const struct patient *p, const struct damage *d)
{
    if ((d->only & SUB) && p->entry != 16)
        return false;
    if ((d->only & V3) && p->version < 3)
        return false;
    if ((d->only & PLAIN) && p->cluster == 512) /* nothing is at an odd place */
        return false;
    return !(d->only & WIDE) || p->order > 0;
}

/* ------------------------------------------------------------------ the tests */

static void a_sound_image_has_nothing_to_report(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SHAPES; i++) {
        make_in(mem, &shapes[i]);
        struct dr_check_result r = checked(mem, 0);
        if (!is_clean(r) || lines[0])
            fail_msg("%s: %s", shapes[i].name, lines);
        assert_int_equal(r.total_clusters, SIZE / patient_of(mem, &shapes[i]).cluster);
        assert_int_equal(r.compressed_clusters, 0);
        assert_true(r.allocated_clusters > 0);
        struct patient p = patient_of(mem, &shapes[i]);
        assert_int_equal(r.image_end_offset, dr_round_up(p.size, p.cluster));
        ok(mem->ops->unlink(mem, PATH, &err));
    }
}

static void find_and_repair(const struct shape *shape, const struct damage *d)
{
    make_in(mem, shape);
    struct patient p = patient_of(mem, shape);
    if (can_have(&p, d)) {
        d->inflict(&p);
        CLEANUP_FREE uint8_t *before = guest_bytes(mem);
        struct dr_check_result r = checked(mem, 0);
        if (is_clean(r) || !strstr(lines, d->says))
            fail_msg("%s, %s: %s", shape->name, d->name, lines);
        r = checked(mem, DR_CHECK_FIX_ALL);
        if ((r.corruptions == 0) == !!(d->only & KEEPS))
            fail_msg("%s, %s: %llu errors after the repair", shape->name, d->name,
                     ULL(r.corruptions));
        CLEANUP_FREE uint8_t *after = guest_bytes(mem);
        if (before && (!after || memcmp(before, after, SIZE) != 0))
            fail_msg("%s, %s: the disk reads otherwise after the repair: %s", shape->name, d->name,
                     err.text);
        struct dr_check_result again = checked(mem, 0);
        if (again.corruptions != r.corruptions || (r.corruptions == 0 && again.leaks != r.leaks))
            fail_msg("%s, %s: the next check says: %s", shape->name, d->name, lines);
    }
    ok(mem->ops->unlink(mem, PATH, &err));
}

static void damage_is_found_and_repaired_and_the_disk_reads_the_same(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SHAPES; i++)
        for (size_t d = 0; d < N_DAMAGES; d++)
            find_and_repair(&shapes[i], &damages[d]);
}

/* ------------------------------------------------------------------ repairs that are cut off */

/* What must not get worse. */
struct health {
    uint8_t *bytes; /* the guest's; NULL = not all of them could be read */
    unsigned low;   /* counts that are too low */
    bool marked;    /* as corrupt or dirty */
};

static unsigned lines_with(const char *text)
{
    unsigned n = 0;
    for (const char *at = lines; (at = strstr(at, text)); at++)
        n++;
    return n;
}

static struct health health_of(struct dr_fs *fs)
{
    struct health h = {.bytes = guest_bytes(fs)};
    checked(fs, 0);
    h.low = lines_with("ERROR cluster");
    if (peek(fs, 4, 4) >= 3)
        h.marked = peek(fs, QCOW2_AT_INCOMPATIBLE, 8) & (QCOW2_CORRUPT | QCOW2_DIRTY);
    return h;
}

/* The image was left somewhere in the middle of a repair. */
static void expect_no_worse(struct dr_fs *fs, const struct health *before, uint64_t left,
                            const char *where)
{
    struct health h = health_of(fs);
    if (before->bytes && (!h.bytes || memcmp(before->bytes, h.bytes, SIZE) != 0))
        fail_msg("%s: the disk reads otherwise: %s", where, err.text);
    if (h.low > before->low)
        fail_msg("%s: %u counts are too low, before there were %u: %s", where, h.low, before->low,
                 lines);
    if (before->marked && !h.marked && checked(fs, 0).corruptions)
        fail_msg("%s: damaged and no longer marked: %s", where, lines);
    free(h.bytes);
    struct dr_check_result r = checked(fs, DR_CHECK_FIX_ALL);
    if (r.corruptions != left)
        fail_msg("%s: a second repair leaves %llu errors, not %llu", where, ULL(r.corruptions),
                 ULL(left));
    uint8_t *after = guest_bytes(fs);
    if (before->bytes && (!after || memcmp(before->bytes, after, SIZE) != 0))
        fail_msg("%s: the disk reads otherwise after a second repair", where);
    free(after);
}

/* The file of the damaged image, to begin with again and again. */
struct copy {
    uint8_t *bytes;
    uint64_t size;
};

static struct copy copy_of(struct dr_fs *fs)
{
    struct copy c;
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_NO_LOCK, &f, &err));
    c.size = dr_file_size(f);
    c.bytes = malloc(c.size);
    ok(dr_file_pread(f, c.bytes, 0, c.size, &err));
    dr_file_unref(f);
    return c;
}

static void restore(struct dr_fs *fs, const struct copy *c)
{
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, 0, &err));
    ok(dr_file_pwrite(f, c->bytes, 0, c->size, &err));
    dr_file_unref(f);
}

static void fail_each_io(const struct shape *shape, const struct damage *d)
{
    make_in(mem, shape);
    struct patient p = patient_of(mem, shape);
    if (!can_have(&p, d)) {
        ok(mem->ops->unlink(mem, PATH, &err));
        return;
    }
    d->inflict(&p);
    struct copy copy = copy_of(mem);
    struct health before = health_of(mem);
    uint64_t left = checked(mem, DR_CHECK_FIX_ALL).corruptions;
    struct faultfs *faults = faultfs_new(mem);
    bool fired = true;
    for (uint64_t nth = 0; fired; nth++) {
        struct dr_check_result result;
        char where[160];
        restore(mem, &copy);
        faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .partial = nth % 2, .seed = nth});
        int r = check_in(faultfs_fs(faults), DR_CHECK_FIX_ALL, &result);
        fired = faultfs_fired(faults);
        faultfs_disarm(faults);
        snprintf(where, sizeof(where), "%s, %s, I/O %llu fails", shape->name, d->name, ULL(nth));
        if (fired && r == 0 && result.corruptions != left)
            fail_msg("%s: nothing is said of it", where);
        expect_no_worse(mem, &before, left, where);
    }
    faultfs_free(faults);
    free(before.bytes);
    free(copy.bytes);
    ok(mem->ops->unlink(mem, PATH, &err));
}

static void a_repair_that_fails_anywhere_makes_nothing_worse(void **state)
{
    (void)state;
    for (size_t d = 0; d < N_DAMAGES; d++)
        fail_each_io(&shapes[d % N_SHAPES == 3 ? 0 : d % N_SHAPES], &damages[d]);
}

static void cut_everywhere(const struct shape *shape, const struct damage *d)
{
    struct powerfs *power = powerfs_new();
    struct dr_fs *fs = powerfs_fs(power);
    make_in(fs, shape);
    struct patient p = patient_of(fs, shape);
    if (can_have(&p, d)) {
        d->inflict(&p);
        struct health before = health_of(fs);
        powerfs_settle(power);
        uint64_t left = checked(fs, DR_CHECK_FIX_ALL).corruptions;
        for (size_t i = 0; i <= powerfs_ops(power); i++)
            for (unsigned m = 0; m < POWERFS_MODES + 2u; m++) {
                enum powerfs_mode mode = m < POWERFS_MODES ? m : POWERFS_RANDOM;
                char where[160];
                if (m && powerfs_open_ops(power, i) == 0)
                    break;
                snprintf(where, sizeof(where), "%s, %s, cut after %zu changes, mode %u",
                         shape->name, d->name, i, m);
                struct dr_fs *disk = powerfs_cut(power, i, mode, i * 7 + m);
                expect_no_worse(disk, &before, left, where);
                dr_fs_memory_free(disk);
            }
        free(before.bytes);
    }
    powerfs_free(power);
}

static void a_repair_that_is_cut_off_anywhere_makes_nothing_worse(void **state)
{
    (void)state;
    for (size_t d = 0; d < N_DAMAGES; d++)
        cut_everywhere(&shapes[(d + 1) % N_SHAPES], &damages[d]);
}

/* ------------------------------------------------------------------ little memory, much to read */

/* Ten pages of counts, 2000 tables. */
static const struct shape wide = {
    "wide", {{"cluster_size", "512"}, {"preallocation", "metadata"}}, 2};

static struct patient make_wide(void)
{
    struct dr_create_params p = {
        .size = 64 * 1024 * KiB, .options = wide.options, .n_options = wide.n};
    ok(dr_format_qcow2.create(mem, PATH, &p, &err));
    return patient_of(mem, &wide);
}

static uint64_t wide_entry(const struct patient *p, unsigned guest_cluster)
{
    unsigned per_table = (unsigned)(p->cluster / 8);
    uint64_t table = peek(mem, p->l1 + guest_cluster / per_table * UINT64_C(8), 8) & QCOW2_OFFSET;
    return table + guest_cluster % per_table * UINT64_C(8);
}

/* Low and high in the file. */
static void harm_wide(const struct patient *p)
{
    static const unsigned hurt[] = {3, 40000, 130000};
    for (size_t i = 0; i < 3; i++) {
        uint64_t at = wide_entry(p, hurt[i]), next = wide_entry(p, hurt[i] + 1);
        set_count(p, peek(mem, at, 8) & QCOW2_OFFSET, 0);
        poke(mem, next, peek(mem, next, 8) & ~QCOW2_COPIED, 8);
    }
    poke(mem, wide_entry(p, 7), peek(mem, wide_entry(p, 120000), 8), 8);
}

static void with_little_memory_the_same_is_found_and_repaired(void **state)
{
    (void)state;
    const struct qcow2_check_limits usual = qcow2_check_limits;
    for (int rebuild = 0; rebuild < 2; rebuild++) {
        struct patient p = make_wide();
        harm_wide(&p);
        if (rebuild)
            poke(mem, p.roots + 8 * 20, 0, 8);
        struct dr_check_result many = checked(mem, 0);
        CLEANUP_FREE char *said = strdup(lines);
        qcow2_check_limits = (struct qcow2_check_limits){.tally = 16 * KiB, .tables = 100};
        struct dr_check_result few = checked(mem, 0);
        assert_true(few.corruptions >= 7);
        assert_int_equal(few.corruptions, many.corruptions);
        assert_int_equal(few.leaks, many.leaks);
        assert_int_equal(few.allocated_clusters, many.allocated_clusters);
        assert_int_equal(few.image_end_offset, many.image_end_offset);
        assert_string_equal(lines, said);
        checked(mem, DR_CHECK_FIX_ALL);
        assert_int_equal(!!strstr(lines, "Rebuilding"), rebuild);
        qcow2_check_limits = usual;
        assert_true(is_clean(checked(mem, 0)));
        ok(mem->ops->unlink(mem, PATH, &err));
    }
}

/* Read naively, these are 2^36 entries; each table is read once. */
static void many_ways_to_one_table_are_counted_at_once(void **state)
{
    (void)state;
    struct dr_create_params params = {.size = SIZE};
    ok(dr_format_qcow2.create(mem, PATH, &params, &err));
    const uint64_t at = 1024 * KiB, bytes = QCOW2_MAX_L1, n = bytes / 8, table = at + bytes;
    uint8_t *l1 = malloc(bytes), l2[64 * 1024];
    for (uint64_t i = 0; i < n; i++)
        put_be64(l1 + 8 * i, table);
    for (uint64_t i = 0; i < sizeof(l2) / 8; i++)
        put_be64(l2 + 8 * i, table + sizeof(l2));
    struct dr_file *f;
    ok(dr_file_open(mem, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, l1, at, bytes, &err));
    ok(dr_file_pwrite(f, l2, table, sizeof(l2), &err));
    ok(dr_file_truncate(f, table + 2 * sizeof(l2), &err));
    dr_file_unref(f);
    free(l1);
    poke(mem, QCOW2_AT_L1, n, 4);
    poke(mem, QCOW2_AT_L1 + 4, at, 8);
    struct dr_check_result r = checked(mem, 0);
    /* Those that are more than a count can say, and the two clusters. */
    uint64_t excess = n - 65535 + n * sizeof(l2) / 8 - 65535;
    assert_true(r.corruptions > excess);
    assert_int_equal(r.allocated_clusters, n * sizeof(l2) / 8);
    checked(mem, DR_CHECK_FIX_ALL);
    assert_true(checked(mem, 0).corruptions >= excess);
}

static void many_snapshots_with_one_table_are_counted_at_once(void **state)
{
    (void)state;
    struct dr_create_params params = {.size = SIZE};
    ok(dr_format_qcow2.create(mem, PATH, &params, &err));
    const uint64_t at = 1024 * KiB, n = QCOW2_MAX_SNAPSHOTS, entry = 56;
    uint8_t *table = calloc(n, entry);
    for (uint64_t i = 0; i < n; i++) { /* 32 MiB each, which overlap */
        put_be64(table + i * entry, at * 8 + i % 512 * 64 * KiB);
        put_be32(table + i * entry + 8, 4 * 1024 * 1024);
        put_be32(table + i * entry + 36, 16);
    }
    struct dr_file *f;
    ok(dr_file_open(mem, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, table, at, n * entry, &err));
    ok(dr_file_truncate(f, 128 * 1024 * KiB, &err));
    dr_file_unref(f);
    free(table);
    poke(mem, at * 16, 0x1234, 8);
    poke(mem, QCOW2_AT_SNAPSHOTS, n, 4);
    poke(mem, QCOW2_AT_SNAPSHOTS + 4, at, 8);
    assert_true(checked(mem, 0).corruptions > 1000);
}

/* ------------------------------------------------------------------ recovery, trim */

/* As QEMU leaves an image with lazy refcounts when it is killed. */
static void an_image_that_is_dirty_gets_its_counts_when_it_is_opened_for_writing(void **state)
{
    (void)state;
    struct dr_disk *disk;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    for (unsigned i = 0; i < 20; i++)
        set_count(&p, entry_of(&p, i) & QCOW2_OFFSET, 0);
    poke(mem, QCOW2_AT_INCOMPATIBLE, QCOW2_DIRTY, 8);
    uint8_t *before = guest_bytes(mem); /* reading changes nothing */
    assert_int_equal(peek(mem, QCOW2_AT_INCOMPATIBLE, 8), QCOW2_DIRTY);
    rw.flags |= DR_OPEN_NO_RECOVER;
    assert_int_equal(dr_open_fs(mem, PATH, &rw, &disk, NULL), -EUCLEAN);
    rw.flags = DR_OPEN_RDWR;
    ok(dr_open_fs(mem, PATH, &rw, &disk, &err));
    write_at(disk, 300 * KiB, 64 * KiB, 9);
    ok(dr_close(disk, &err));
    assert_int_equal(peek(mem, QCOW2_AT_INCOMPATIBLE, 8), 0);
    assert_true(is_clean(checked(mem, 0)));
    memset(before + 300 * KiB, 9, 64 * KiB);
    uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    free(before);
    free(after);
}

static void a_dirty_image_that_cannot_be_repaired_is_not_written_to(void **state)
{
    (void)state;
    struct dr_disk *disk;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    reserved_bits_in_l1(&p);
    poke(mem, QCOW2_AT_INCOMPATIBLE, QCOW2_DIRTY, 8);
    assert_int_equal(dr_open_fs(mem, PATH, &rw, &disk, &err), -EIO);
    assert_non_null(strstr(err.text, "1 errors in it cannot be repaired"));
    assert_int_equal(peek(mem, QCOW2_AT_INCOMPATIBLE, 8), QCOW2_DIRTY);
}

static void leaks_are_kept_while_it_is_not_known_what_they_were(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    unused_cluster_counted(&p);
    reserved_bits_in_l2(&p);
    assert_int_equal(checked(mem, DR_CHECK_FIX_LEAKS).leaks, 1);
    assert_non_null(strstr(lines, "Leaked clusters are kept"));
    assert_int_equal(checked(mem, DR_CHECK_FIX_ALL).leaks, 1);
    /* Also when all counts are written anew, and the old ones cannot be read. */
    counts_at_an_odd_place(&p);
    struct dr_check_result r = checked(mem, DR_CHECK_FIX_ALL);
    assert_int_equal(r.corruptions, 1);
    assert_true(r.leaks >= 1);
    assert_non_null(strstr(lines, "Rebuilding refcount structure"));
    checked(mem, 0);
    char leak[64];
    snprintf(leak, sizeof(leak), "Leaked cluster %llu ",
             ULL(dr_round_up(p.size, p.cluster) / p.cluster));
    assert_non_null(strstr(lines, leak));
}

static void counts_that_are_too_low_are_raised_though_leaks_are_kept(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    reserved_bits_in_l1(&p);
    unused_cluster_counted(&p);
    count_of_data_zero(&p);
    struct dr_check_result r = checked(mem, DR_CHECK_FIX_ALL);
    assert_int_equal(r.corruptions, 1);
    assert_int_equal(r.leaks, 1);
    checked(mem, 0);
    assert_null(strstr(lines, "refcount=0"));
}

static void an_open_disk_has_no_leaks_because_something_was_just_freed(void **state)
{
    (void)state;
    struct dr_disk *disk;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    char *json;
    make_in(mem, &shapes[0]);
    ok(dr_open_fs(mem, PATH, &rw, &disk, &err));
    ok(dr_zero(disk, 0, 64 * KiB, DR_MAY_UNMAP, &err));
    lines[0] = '\0';
    ok(dr_disk_check(disk, note, NULL, &json, NULL, &err));
    free(json);
    ok(dr_close(disk, &err));
    assert_string_equal(lines, "");
}

/* New counts would go where these entries say that the guest's data is. */
static void counts_are_not_written_anew_while_entries_lead_behind_the_end(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    data_behind_the_end(&p);
    no_counts(&p);
    struct dr_check_result r = checked(mem, DR_CHECK_FIX_ALL);
    assert_non_null(strstr(lines, "The refcount structure is not rebuilt"));
    assert_true(r.corruptions > 1);
    assert_int_equal(peek(mem, QCOW2_AT_REFTABLE, 8), p.roots);
}

static void repairing_leaks_corrects_nothing_else(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    unused_cluster_counted(&p);
    count_of_data_zero(&p);
    struct dr_check_result r = checked(mem, DR_CHECK_FIX_LEAKS);
    assert_int_equal(r.leaks, 0);
    assert_int_equal(r.leaks_fixed, 1);
    assert_int_equal(r.corruptions, 2);
    assert_int_equal(r.corruptions_fixed, 0);
}

static uint64_t file_size(void)
{
    struct dr_file *f;
    ok(dr_file_open(mem, PATH, DR_FILE_NO_LOCK, &f, &err));
    uint64_t size = dr_file_size(f);
    dr_file_unref(f);
    return size;
}

static void trim_cuts_the_file_behind_the_last_cluster_in_use(void **state)
{
    (void)state;
    struct dr_image *image;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    uint8_t *before = guest_bytes(mem);
    poke(mem, p.size + 100 * KiB, 1, 8);
    ok(dr_image_open(mem, PATH, "qcow2", DR_OPEN_RDWR, &image, &err));
    ok(dr_format_qcow2.trim(image, &err));
    ok(dr_image_unref(image, &err));
    assert_int_equal(file_size(), p.size);
    uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    free(before);
    free(after);
    assert_true(is_clean(checked(mem, 0)));
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        T(a_sound_image_has_nothing_to_report),
        T(damage_is_found_and_repaired_and_the_disk_reads_the_same),
        T(a_repair_that_fails_anywhere_makes_nothing_worse),
        T(a_repair_that_is_cut_off_anywhere_makes_nothing_worse),
        T(with_little_memory_the_same_is_found_and_repaired),
        T(many_ways_to_one_table_are_counted_at_once),
        T(many_snapshots_with_one_table_are_counted_at_once),
        T(an_image_that_is_dirty_gets_its_counts_when_it_is_opened_for_writing),
        T(a_dirty_image_that_cannot_be_repaired_is_not_written_to),
        T(leaks_are_kept_while_it_is_not_known_what_they_were),
        T(counts_that_are_too_low_are_raised_though_leaks_are_kept),
        T(an_open_disk_has_no_leaks_because_something_was_just_freed),
        T(counts_are_not_written_anew_while_entries_lead_behind_the_end),
        T(repairing_leaks_corrects_nothing_else),
        T(trim_cuts_the_file_behind_the_last_cluster_in_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
