/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tables of qcow2 images that grow with the disk, or have several pages. */
#include "formats/qcow2/qcow2.h"
#include "test-qcow2-snapshots.h"

static void put_file(struct dr_fs *fs, uint64_t off, const void *bytes, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, bytes, off, len, &err));
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ growing */

/* What other programs, and shrinking, leave behind the end. */
struct behind {
    uint64_t size, span;         /* of the disk; of a table */
    uint64_t host, len;          /* the rest of the disk's last cluster */
    uint64_t l1, entries, table; /* the first level, and what its first entry says */
};

static struct behind find_behind(struct dr_fs *fs)
{
    struct behind b;
    struct dr_extent_status last;
    struct dr_disk *disk = open_disk(fs);
    const struct qcow2 *q = qcow2_of(top_of(disk));
    b.size = dr_size(disk);
    ok(dr_block_status(disk, b.size - 512, 512, &last, &err));
    b.span = qcow2_l2_span(q);
    b.host = last.host_off + 512;
    b.len = dr_round_up(b.size, q->cluster) - b.size;
    b.l1 = q->h.l1_at;
    b.entries = q->h.l1_entries;
    ok(dr_file_pread(top_of(disk)->files[0], &b.table, b.l1, 8, &err));
    ok(dr_close(disk, &err));
    return b;
}

static void reads_zeros(struct dr_disk *disk, uint64_t off, size_t len)
{
    uint8_t *buf = malloc(len);
    ok(dr_pread(disk, buf, off, len, &err));
    for (size_t i = 0; i < len; i++)
        if (buf[i] != 0)
            fail_msg("%02x at %llu", buf[i], (unsigned long long)(off + i));
    free(buf);
}

static void a_disk_that_grows_shows_zeros_whatever_stood_behind_its_end(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &geometries[i], SIZE - 1536);
        struct dr_disk *disk = open_disk(fs);
        write_version(disk, 0, SIZE - 1536, 1);
        ok(dr_close(disk, &err));
        struct behind b = find_behind(fs);
        uint8_t *junk = malloc(b.len + 1);
        memset(junk, 0xee, b.len);
        put_file(fs, b.host, junk, b.len);
        for (unsigned k = 0; k < 3; k++)
            put_file(fs, b.l1 + 8 * (b.entries + k), &b.table, 8);
        disk = open_disk(fs);
        uint64_t grown = (b.entries + 3) * b.span;
        ok(dr_truncate(disk, grown, &err));
        reads_zeros(disk, b.size, SIZE);
        for (unsigned k = 0; k < 3; k++)
            reads_zeros(disk, (b.entries + k) * b.span, 4096);
        ok(dr_close(disk, &err));
        check_clean(fs);
        free(junk);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ beside a data file */

/* There a cluster has the offset that it has on the disk. */
static void an_entry_that_leads_elsewhere_in_the_data_file_is_damage(void **state)
{
    const struct geometry g = {PAIRS({"cluster_size", "4096"}, {"data_file", "disk.data"})};
    uint8_t raw[8], buf[512];
    create(*state, &g, SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, SIZE, 1);
    ok(dr_close(disk, &err));
    disk = open_disk(*state);
    struct dr_file *f = top_of(disk)->files[0];
    ok(dr_file_pread(f, raw, qcow2_of(top_of(disk))->h.l1_at, sizeof(raw), &err));
    uint64_t entry = (get_be64(raw) & QCOW2_OFFSET) + 8;
    ok(dr_file_pread(f, raw, entry, sizeof(raw), &err));
    assert_int_equal(get_be64(raw), QCOW2_COPIED | 4096);
    ok(dr_close(disk, &err));
    put_be64(raw, QCOW2_COPIED | 8192);
    put_file(*state, entry, raw, sizeof(raw));
    disk = open_disk(*state);
    ok(dr_pread(disk, buf, 0, sizeof(buf), &err));
    ok(dr_pread(disk, buf, 8192, sizeof(buf), &err));
    refused(dr_pread(disk, buf, 4096, sizeof(buf), &err), EIO, "another place in the data file");
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ several pages */

/* A page of 4 KiB has the entries of 32 MiB. */
static void an_extent_ends_with_the_entries_that_are_alike(void **state)
{
    const struct geometry g = {PAIRS({"cluster_size", "64k"})};
    create(*state, &g, 128 * MiB);
    struct dr_disk *disk = open_disk(*state);
    ok(dr_zero(disk, 0, 32 * MiB, DR_EXPLICIT, &err));
    ok(dr_zero(disk, 40 * MiB, MiB, DR_EXPLICIT, &err));
    for (unsigned from = 0; from < 32; from++) {
        struct dr_extent ext;
        ok(dr_image_map(top_of(disk), from * MiB, 128 * MiB - from * MiB, &ext, &err));
        assert_int_equal(ext.kind, DR_ZERO);
        assert_int_equal(ext.len, 32 * MiB - from * MiB);
    }
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ places with no counts */

/* All data of the block's clusters goes, and then the block: the counts of the next ones stay. */
static uint64_t take_away_block(struct dr_fs *fs)
{
    const uint64_t cluster = 512, covers = 64 * cluster; /* a block has 64 counts of 64 bits */
    struct dr_disk *disk = open_disk(fs);
    struct dr_extent_status s;
    uint64_t gone = 0, zero = 0;
    for (uint64_t k = 0; k < 5; k++) /* the tables first, so that the rest is data */
        write_version(disk, k * covers, cluster, 1);
    write_version(disk, 0, 5 * covers, 1);
    ok(dr_block_status(disk, 2 * covers + covers / 2, cluster, &s, &err));
    gone = s.host_off / covers;
    for (uint64_t off = 0; off < 5 * covers; off += cluster) {
        ok(dr_block_status(disk, off, cluster, &s, &err));
        if ((s.flags & DR_EXTENT_OFFSET) && s.host_off / covers == gone)
            ok(dr_discard(disk, off, cluster, &err));
    }
    uint64_t root = qcow2_of(top_of(disk))->h.reftable_at + 8 * gone, roots[2];
    ok(dr_flush(disk, &err));
    ok(dr_file_pread(top_of(disk)->files[0], roots, root, sizeof(roots), &err));
    assert_true(roots[0] && roots[1]);
    ok(dr_close(disk, &err));
    put_file(fs, root, &zero, sizeof(zero));
    check_clean(fs);
    return gone;
}

/* A longer first level, of 100 clusters, would need two blocks there. */
static void a_run_goes_elsewhere_where_the_next_block_exists(void **state)
{
    const struct geometry g = {PAIRS({"cluster_size", "512"}, {"refcount_bits", "64"})};
    create(*state, &g, 160 * MiB);
    uint64_t gone = take_away_block(*state), size;
    uint8_t *before = read_view(*state, NULL, &size);
    struct dr_disk *disk = open_disk(*state);
    const struct qcow2 *q = qcow2_of(top_of(disk));
    ok(dr_truncate(disk, 200 * MiB, &err));
    assert_true(q->reftable[gone]); /* one block */
    ok(dr_close(disk, &err));
    check_clean(*state);
    uint8_t *after = read_view(*state, NULL, &size);
    assert_memory_equal(after, before, 5 * 64 * 512);
    free(before);
    free(after);
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_disk_that_grows_shows_zeros_whatever_stood_behind_its_end),
        T(an_entry_that_leads_elsewhere_in_the_data_file_is_damage),
        T(a_run_goes_elsewhere_where_the_next_block_exists),
        T(an_extent_ends_with_the_entries_that_are_alike),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
