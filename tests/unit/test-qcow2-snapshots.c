/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots inside qcow2 images: what they show, what the counts say, what is kept and refused. */
#include <sched.h>
#include <stdio.h>

#include "formats/qcow2/qcow2.h"
#include "faultfs.h"
#include "test-qcow2-snapshots.h"

/* ------------------------------------------------------------------ what they show */

static void a_snapshot_shows_what_the_disk_held(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct states s = make_states(fs, &geometries[i]);
        check_clean(fs);
        view_is(fs, "1", s.first);
        view_is(fs, "one", s.first);
        view_is(fs, "snapshot.name=one,snapshot.id=1", s.first);
        view_is(fs, NULL, s.second);
        states_free(&s);
        dr_fs_memory_free(fs);
    }
}

static void snapshots_come_and_go_without_a_trace(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct states s = make_states(fs, &geometries[i]);
        struct dr_disk *disk = open_disk(fs);
        ok(dr_image_snapshot_create(top_of(disk), "two", &err));
        write_version(disk, 0, SIZE, 3);
        ok(dr_image_snapshot_apply(top_of(disk), "1", &err));
        ok(dr_close(disk, &err));
        check_clean(fs);
        view_is(fs, NULL, s.first);
        view_is(fs, "2", s.second);
        disk = open_disk(fs);
        ok(dr_image_snapshot_delete(top_of(disk), "1", &err));
        write_version(disk, 0, SIZE, 4);
        ok(dr_close(disk, &err));
        check_clean(fs);
        view_is(fs, "2", s.second);
        disk = open_disk(fs);
        ok(dr_image_snapshot_delete(top_of(disk), "2", &err));
        write_version(disk, 0, SIZE, 5);
        ok(dr_close(disk, &err));
        check_clean(fs);
        states_free(&s);
        dr_fs_memory_free(fs);
    }
}

/* The L2 tables that the disk's L1 table (snapshot false) or that of the first snapshot leads to.
 */
static void read_l1(struct dr_fs *fs, bool snapshot, uint64_t *tables, uint32_t *n)
{
    struct dr_file *f;
    uint8_t header[72], entry[12];
    ok(dr_file_open(fs, PATH, DR_FILE_FORCE_SHARE, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, entry, get_be64(header + 64), sizeof(entry), &err));
    uint64_t at = get_be64(snapshot ? entry : header + 40);
    *n = get_be32(snapshot ? entry + 8 : header + 36);
    assert_in_range(*n, 1, 4096);
    ok(dr_file_pread(f, tables, at, *n * sizeof(*tables), &err));
    for (uint32_t i = 0; i < *n; i++)
        tables[i] = get_be64((const uint8_t *)&tables[i]) & UINT64_C(0x00fffffffffffe00);
    dr_file_unref(f);
}

static void tables_that_a_snapshot_shares_stay_shared_when_another_one_goes(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint64_t own[4096], its[4096];
        uint32_t n_own, n_its;
        create(fs, &geometries[i], SIZE);
        struct dr_disk *disk = open_disk(fs);
        make_first(disk, &geometries[i]);
        ok(dr_image_snapshot_create(top_of(disk), "one", &err));
        ok(dr_image_snapshot_create(top_of(disk), "two", &err));
        ok(dr_image_snapshot_delete(top_of(disk), "2", &err));
        ok(dr_close(disk, &err));
        read_l1(fs, false, own, &n_own);
        read_l1(fs, true, its, &n_its);
        assert_int_equal(n_own, n_its);
        assert_memory_equal(own, its, n_own * sizeof(*own));
        check_clean(fs);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ what is kept, what is refused
 */

static void a_count_that_has_no_room_is_refused_before_anything_is_written(void **state)
{
    struct faultfs *faults = faultfs_new(*state);
    const struct geometry g = {PAIRS({"cluster_size", "4096"}, {"refcount_bits", "1"})};
    create(*state, &g, SIZE);
    struct dr_disk *disk = open_disk(faultfs_fs(faults));
    write_version(disk, 0, 8 * KiB, 1);
    ok(dr_flush(disk, &err));
    faultfs_reset(faults);
    refused(dr_image_snapshot_create(top_of(disk), "one", &err), EINVAL, "refcount_bits");
    assert_int_equal(faultfs_count_of(faults, FAULTFS_WRITE), 0);
    ok(dr_close(disk, &err));
    faultfs_free(faults);
    check_clean(*state);
}

/* Two bits have room for a third way, not for a fourth: of compressed clusters some have several.
 */
static void counting_that_stops_half_way_is_taken_back(void **state)
{
    const struct geometry g = {PAIRS({"cluster_size", "4096"}, {"refcount_bits", "2"})};
    create(*state, &g, SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, 16 * KiB, 1);
    write_coded(disk, 16 * KiB, 8 * KiB, 1); /* both in one cluster */
    refused(dr_image_snapshot_create(top_of(disk), "one", &err), EINVAL, "refcount_bits");
    ok(dr_close(disk, &err));
    check_clean(*state);
}

static void applying_brings_the_size_back(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, SIZE, 1);
    uint8_t *first = read_disk(disk);
    ok(dr_image_snapshot_create(top_of(disk), "small", &err));
    ok(dr_truncate(disk, 8 * MiB, &err));
    write_version(disk, 8 * MiB - 64 * KiB, 64 * KiB, 2);
    uint8_t *second = read_disk(disk);
    ok(dr_image_snapshot_create(top_of(disk), "large", &err));
    ok(dr_image_snapshot_apply(top_of(disk), "1", &err));
    assert_int_equal(dr_size(disk), SIZE);
    ok(dr_close(disk, &err));
    view_is(*state, NULL, first);
    check_clean(*state);
    disk = open_disk(*state);
    ok(dr_image_snapshot_apply(top_of(disk), "2", &err));
    assert_int_equal(dr_size(disk), 8 * MiB);
    ok(dr_close(disk, &err));
    uint64_t size;
    uint8_t *now = read_view(*state, NULL, &size);
    assert_int_equal(size, 8 * MiB);
    assert_memory_equal(now, second, 8 * MiB);
    check_clean(*state);
    free(first);
    free(second);
    free(now);
}

struct seen {
    unsigned n;
    char text[1000]; /* "id name, " */
};

static int see(void *user, const struct dr_snapshot_info *info)
{
    struct seen *seen = user;
    size_t used = strlen(seen->text);
    seen->n++;
    snprintf(seen->text + used, sizeof(seen->text) - used, "%s %s, ", info->id, info->name);
    return 0;
}

static void list_is(struct dr_image *image, const char *expected)
{
    struct seen seen = {0};
    ok(dr_image_snapshot_list(image, see, &seen, &err));
    assert_string_equal(seen.text, expected);
}

static void ids_go_up_and_names_may_repeat(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    struct dr_image *image = top_of(disk);
    char *id;
    ok(dr_image_snapshot_create(image, "a", &err));
    ok(dr_image_snapshot_create(image, "b", &err));
    ok(dr_image_snapshot_create(image, "a", &err));
    ok(dr_image_snapshot_delete(image, "2", &err));
    ok(dr_image_snapshot_create(image, "1", &err));
    list_is(image, "1 a, 3 a, 4 1, ");
    ok(dr_image_snapshot_find(image, "1", true, &id, &err));
    assert_string_equal(id, "1");
    free(id);
    ok(dr_image_snapshot_find(image, "1", false, &id, &err));
    assert_string_equal(id, "4");
    free(id);
    refused(dr_image_snapshot_delete(image, "2", &err), ENOENT, "2");
    refused(dr_image_snapshot_find(image, "b", true, &id, &err), ENOENT, "b");
    ok(dr_close(disk, &err));
    check_clean(*state);
}

static int see_times(void *user, const struct dr_snapshot_info *info)
{
    *(struct dr_snapshot_info *)user = *info;
    return 0;
}

/* As QEMU writes them when a machine is running. */
static void the_times_of_a_snapshot_are_told(void **state)
{
    uint8_t head[72], raw[20];
    struct dr_snapshot_info info;
    struct dr_file *f;
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    ok(dr_close(disk, &err));
    put_be32(raw, 1700000001);
    put_be32(raw + 4, 123456789);
    put_be64(raw + 8, UINT64_C(3723004005006));
    put_be32(raw + 16, 77);
    ok(dr_file_open(*state, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, head, 0, sizeof(head), &err));
    ok(dr_file_pwrite(f, raw, get_be64(head + 64) + 16, sizeof(raw), &err));
    dr_file_unref(f);
    disk = open_disk(*state);
    ok(dr_image_snapshot_list(top_of(disk), see_times, &info, &err));
    assert_int_equal(info.seconds, 1700000001);
    assert_int_equal(info.nanoseconds, 123456789);
    assert_int_equal(info.clock_ns, UINT64_C(3723004005006));
    assert_false(info.has_icount); /* the machine did not count */
    ok(dr_close(disk, &err));
}

static void the_table_grows_beyond_a_cluster_and_shrinks_to_nothing(void **state)
{
    create(*state, &geometries[4], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, 4 * KiB, 1);
    for (unsigned i = 1; i <= 40; i++) {
        char name[60];
        snprintf(name, sizeof(name), "a snapshot with a name of some length, number %u", i);
        ok(dr_image_snapshot_create(top_of(disk), name, &err));
    }
    ok(dr_close(disk, &err));
    check_clean(*state);
    disk = open_disk(*state);
    for (unsigned i = 40; i >= 1; i--) {
        char id[12];
        snprintf(id, sizeof(id), "%u", i % 2 ? i : 42 - i);
        ok(dr_image_snapshot_delete(top_of(disk), id, &err));
    }
    list_is(top_of(disk), "");
    ok(dr_close(disk, &err));
    check_clean(*state);
    struct dr_file *f;
    uint8_t raw[12], none[12] = {0};
    ok(dr_file_open(*state, PATH, 0, &f, &err));
    ok(dr_file_pread(f, raw, 60, sizeof(raw), &err));
    dr_file_unref(f);
    assert_memory_equal(raw, none, sizeof(raw));
}

/* The entry of the first snapshot becomes what a program of tomorrow has written: a machine's
 * state, and extra data that is not known today. */
static void what_an_entry_holds_is_kept(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, 8 * KiB, 1);
    ok(dr_image_snapshot_create(top_of(disk), "a name that is to give way", &err));
    ok(dr_close(disk, &err));
    uint8_t header[72], entry[92], later[92];
    struct dr_file *f;
    ok(dr_file_open(*state, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, entry, get_be64(header + 64), sizeof(entry), &err));
    put_be32(entry + 32, 4711);
    put_be16(entry + 14, 7);
    put_be32(entry + 36, 44); /* 20 more */
    put_be64(entry + 40, UINT64_C(5) << 32);
    put_be64(entry + 56, 99);
    memset(entry + 64, 0xa5, 20);
    memcpy(entry + 84, "1future", 8);
    ok(dr_file_pwrite(f, entry, get_be64(header + 64), sizeof(entry), &err));
    dr_file_unref(f);
    disk = open_disk(*state);
    struct dr_snapshot_info info;
    ok(dr_image_snapshot_list(top_of(disk), see_times, &info, &err));
    assert_true(info.has_icount);
    assert_int_equal(info.icount, 99);
    list_is(top_of(disk), "1 future, ");
    ok(dr_image_snapshot_create(top_of(disk), "two", &err));
    ok(dr_image_snapshot_create(top_of(disk), "three", &err));
    ok(dr_image_snapshot_delete(top_of(disk), "2", &err));
    ok(dr_close(disk, &err));
    ok(dr_file_open(*state, PATH, 0, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, later, get_be64(header + 64), sizeof(later), &err));
    dr_file_unref(f);
    assert_memory_equal(entry, later, sizeof(entry));
    check_clean(*state);
}

/* In tables that are not the disk's, COPIED means nothing: other programs may leave it set. */
static void a_snapshot_is_not_written_in_place_after_it_was_applied(void **state)
{
    struct states s = make_states(*state, &geometries[4]);
    uint8_t header[72], l1[8], raw[512];
    struct dr_file *f;
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, SIZE, 3); /* the disk has no table in common with the snapshot */
    ok(dr_close(disk, &err));
    ok(dr_file_open(*state, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, raw, get_be64(header + 64), 8, &err));
    uint64_t l1_at = get_be64(raw);
    for (uint64_t at = l1_at; at < l1_at + SIZE / (32 * KiB) * 8; at += 8) {
        ok(dr_file_pread(f, l1, at, sizeof(l1), &err));
        uint64_t table = get_be64(l1) & 0xffffffffffff;
        ok(dr_file_pread(f, raw, table, sizeof(raw), &err));
        for (unsigned i = 0; i < sizeof(raw); i += 8)
            if (raw[i] == 0 && get_be64(raw + i)) /* not compressed */
                raw[i] = 0x80;
        ok(dr_file_pwrite(f, raw, table, sizeof(raw), &err));
    }
    dr_file_unref(f);
    disk = open_disk(*state);
    ok(dr_image_snapshot_apply(top_of(disk), "1", &err));
    write_version(disk, 0, SIZE, 4);
    ok(dr_close(disk, &err));
    view_is(*state, "1", s.first);
    check_clean(*state);
    states_free(&s);
}

static void images_that_can_have_none_are_refused(void **state)
{
    const struct geometry g = {PAIRS({"data_file", "disk.data"})};
    create(*state, &g, SIZE);
    struct dr_disk *disk = open_disk(*state);
    refused(dr_image_snapshot_create(top_of(disk), "one", &err), ENOTSUP, "data in another file");
    ok(dr_close(disk, &err));
}

static void a_snapshot_can_only_be_read(void **state)
{
    struct states s = make_states(*state, &geometries[0]);
    struct dr_open_options o = {.flags = DR_OPEN_RDWR, .snapshot = "1"};
    struct dr_disk *disk;
    refused(dr_open_fs(*state, PATH, &o, &disk, &err), EINVAL, "only be read");
    o = (struct dr_open_options){.snapshot = "two"};
    refused(dr_open_fs(*state, PATH, &o, &disk, &err), ENOENT, "two");
    o.snapshot = "snapshot.id=1,snapshot.name=two";
    refused(dr_open_fs(*state, PATH, &o, &disk, &err), ENOENT, "two");
    o.snapshot = "snapshot.id=1,name=one";
    refused(dr_open_fs(*state, PATH, &o, &disk, &err), EINVAL, "expected an id or a name");
    states_free(&s);
}

/* The counts say that a cluster of the disk is free. */
static void a_damaged_image_is_left_alone(void **state)
{
    struct states s = make_states(*state, &geometries[4]);
    uint8_t header[72], none[8] = {0}, raw[8];
    struct dr_file *f;
    ok(dr_file_open(*state, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, raw, get_be64(header + 40), 8, &err));
    uint64_t i = (get_be64(raw) & 0xffffffffff) / 512; /* the first L2 table */
    ok(dr_file_pread(f, raw, get_be64(header + 48) + i / 64 * 8, 8, &err));
    ok(dr_file_pwrite(f, none, get_be64(raw) + i % 64 * 8, 8, &err));
    dr_file_unref(f);
    struct dr_disk *disk = open_disk(*state);
    refused(dr_image_snapshot_create(top_of(disk), "two", &err), EIO, "counted as free");
    list_is(top_of(disk), "1 one, ");
    ok(dr_close(disk, &err));
    view_is(*state, "1", s.first);
    states_free(&s);
}

/* The count of the cluster that the disk has at `off` becomes less. Its first L2 table has it. */
static void lower_count(struct dr_fs *fs, uint64_t off, unsigned from)
{
    uint8_t header[72], raw[8];
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, raw, get_be64(header + 40), 8, &err));
    ok(dr_file_pread(f, raw, (get_be64(raw) & 0xfffffffe00) + 8 * (off / 4096), 8, &err));
    uint64_t i = (get_be64(raw) & 0xfffffffe00) / 4096;
    ok(dr_file_pread(f, raw, get_be64(header + 48), 8, &err));
    uint64_t at = get_be64(raw) + 2 * i;
    ok(dr_file_pread(f, raw, at, 2, &err));
    assert_int_equal(get_be16(raw), from);
    put_be16(raw, (uint16_t)(from - 1));
    ok(dr_file_pwrite(f, raw, at, 2, &err));
    dr_file_unref(f);
}

/* The counts say that only the snapshot has what the disk has, too. */
static void what_the_disk_has_is_not_freed_with_a_snapshot(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, SIZE, 1);
    uint8_t *before = read_disk(disk);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    write_version(disk, 0, 512, 1); /* a table of its own */
    ok(dr_close(disk, &err));
    lower_count(*state, 3 * 4096, 2);
    disk = open_disk(*state);
    refused(dr_image_snapshot_delete(top_of(disk), "1", &err), EIO, "is damaged");
    ok(dr_close(disk, &err));
    view_is(*state, NULL, before);
    view_is(*state, "1", before);
    free(before);
}

static int nothing_grows(void *user, const struct faultfs_io *io)
{
    const uint64_t *size = user;
    return io->kind == FAULTFS_WRITE && io->off + io->len > *size ? -ENOSPC : 0;
}

/* The same where there is no space for copies of the counts. */
static void what_the_disk_has_is_not_freed_in_place_either(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, SIZE, 1);
    uint8_t *before = read_disk(disk);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    write_version(disk, 0, 512, 1);
    ok(dr_close(disk, &err));
    lower_count(*state, 3 * 4096, 2);
    struct faultfs *full = faultfs_new(*state);
    disk = open_disk(faultfs_fs(full));
    uint64_t size = dr_file_size(top_of(disk)->files[0]);
    faultfs_observe(full, nothing_grows, &size);
    refused(dr_image_snapshot_delete(top_of(disk), "1", &err), EIO, "less often than it is used");
    ok(dr_close(disk, &err));
    faultfs_free(full);
    view_is(*state, NULL, before);
    view_is(*state, "1", before);
    free(before);
}

struct quiet_table {
    uint64_t size, at, len;
    unsigned writes;
};

static int nothing_grows_and_the_table_rests(void *user, const struct faultfs_io *io)
{
    struct quiet_table *t = user;
    if (io->kind == FAULTFS_WRITE && io->off < t->at + t->len && io->off + io->len > t->at)
        t->writes++;
    return io->kind == FAULTFS_WRITE && io->off + io->len > t->size ? -ENOSPC : 0;
}

/* Of all clusters but one another snapshot is a user, too: the disk's table says the same as
 * before. */
static void a_delete_in_place_writes_no_table_that_says_the_same(void **state)
{
    uint8_t raw[8];
    struct quiet_table t = {.len = 4096};
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_version(disk, 0, SIZE, 1);
    uint8_t *snapshot = read_disk(disk);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    ok(dr_image_snapshot_create(top_of(disk), "two", &err));
    write_version(disk, 0, 512, 2); /* a table of its own */
    uint8_t *before = read_disk(disk);
    ok(dr_close(disk, &err));
    struct faultfs *full = faultfs_new(*state);
    disk = open_disk(faultfs_fs(full));
    struct dr_file *f = top_of(disk)->files[0];
    ok(dr_file_pread(f, raw, qcow2_of(top_of(disk))->h.l1_at, sizeof(raw), &err));
    t.at = get_be64(raw) & QCOW2_OFFSET;
    t.size = dr_file_size(f);
    faultfs_observe(full, nothing_grows_and_the_table_rests, &t);
    ok(dr_image_snapshot_delete(top_of(disk), "1", &err));
    ok(dr_close(disk, &err));
    assert_int_equal(t.writes, 0);
    faultfs_free(full);
    view_is(*state, NULL, before);
    view_is(*state, "2", snapshot);
    check_clean(*state);
    free(snapshot);
    free(before);
}

/* One cluster is counted once too few: its other user is a snapshot that is not touched. */
static void what_another_snapshot_has_is_not_freed_by_a_delete_or_apply(void **state)
{
    (void)state;
    for (int apply = 0; apply < 2; apply++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &geometries[0], SIZE);
        struct dr_disk *disk = open_disk(fs);
        write_version(disk, 0, SIZE, 1);
        ok(dr_image_snapshot_create(top_of(disk), "one", &err));
        if (apply)
            write_version(disk, 0, SIZE, 2);
        uint8_t *kept = read_disk(disk);
        ok(dr_image_snapshot_create(top_of(disk), "two", &err));
        ok(dr_close(disk, &err));
        lower_count(fs, 3 * 4096, apply ? 2 : 3);
        disk = open_disk(fs);
        if (!apply) { /* the disk goes: only the snapshots have it */
            write_version(disk, 0, SIZE, 3);
            ok(dr_flush(disk, &err));
        }
        if (apply)
            refused(dr_image_snapshot_apply(top_of(disk), "1", &err), EIO, "less often than it is");
        else
            refused(dr_image_snapshot_delete(top_of(disk), "1", &err), EIO,
                    "less often than it is");
        list_is(top_of(disk), "1 one, 2 two, ");
        ok(dr_close(disk, &err));
        view_is(fs, "2", kept);
        free(kept);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ beside others */

struct writer {
    struct dr_disk *disk;
    _Atomic unsigned version, stop;
};

static void *write_in_place(void *user)
{
    struct writer *w = user;
    uint8_t buf[4 * KiB];
    for (unsigned v = 1; !atomic_load(&w->stop); v++) {
        memset(buf, (int)(v % 250 + 1), sizeof(buf));
        if (dr_pwrite(w->disk, buf, 0, sizeof(buf), 0, NULL) < 0)
            return w;
        if (dr_pread(w->disk, buf, 0, sizeof(buf), NULL) < 0 || buf[77] != v % 250 + 1)
            return w;
        atomic_store(&w->version, v);
    }
    return NULL;
}

static void a_writer_beside_does_not_reach_a_snapshot(void **state)
{
    struct writer w;
    pthread_t thread;
    void *result;
    create(*state, &geometries[0], SIZE);
    w = (struct writer){.disk = open_disk(*state)};
    write_version(w.disk, 0, SIZE, 1);
    assert_int_equal(pthread_create(&thread, NULL, write_in_place, &w), 0);
    for (unsigned round = 1; round <= 10; round++) {
        char id[12];
        uint64_t size;
        unsigned reached = atomic_load(&w.version);
        ok(dr_image_snapshot_create(top_of(w.disk), "now", &err));
        snprintf(id, sizeof(id), "%u", round);
        uint8_t *at_once = read_view(*state, id, &size);
        while (atomic_load(&w.version) < reached + 3)
            sched_yield();
        uint8_t *later = read_view(*state, id, &size);
        assert_memory_equal(at_once, later, size);
        free(at_once);
        free(later);
    }
    for (unsigned round = 1; round <= 10; round++) {
        char id[12];
        snprintf(id, sizeof(id), "%u", round);
        ok(dr_image_snapshot_delete(top_of(w.disk), id, &err));
    }
    atomic_store(&w.stop, 1);
    pthread_join(thread, &result);
    assert_null(result);
    ok(dr_close(w.disk, &err));
    check_clean(*state);
}

/* However much the disk holds. */
static void a_snapshot_costs_a_fixed_number_of_flushes(void **state)
{
    (void)state;
    uint64_t flushes[2];
    for (unsigned i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *faults = faultfs_new(fs);
        const struct geometry g = {PAIRS({"cluster_size", "512"})};
        create(fs, &g, 2 * MiB);
        struct dr_disk *disk = open_disk(faultfs_fs(faults));
        write_version(disk, 0, i ? 2 * MiB : 64 * KiB, 1);
        ok(dr_flush(disk, &err));
        faultfs_reset(faults);
        ok(dr_image_snapshot_create(top_of(disk), "one", &err));
        flushes[i] = faultfs_count_of(faults, FAULTFS_FLUSH);
        ok(dr_close(disk, &err));
        faultfs_free(faults);
        check_clean(fs);
        dr_fs_memory_free(fs);
    }
    assert_int_equal(flushes[0], flushes[1]);
    assert_in_range(flushes[0], 1, 6);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_snapshot_shows_what_the_disk_held),
        T(snapshots_come_and_go_without_a_trace),
        cmocka_unit_test(tables_that_a_snapshot_shares_stay_shared_when_another_one_goes),
        T(a_count_that_has_no_room_is_refused_before_anything_is_written),
        T(counting_that_stops_half_way_is_taken_back),
        T(applying_brings_the_size_back),
        T(ids_go_up_and_names_may_repeat),
        T(the_times_of_a_snapshot_are_told),
        T(the_table_grows_beyond_a_cluster_and_shrinks_to_nothing),
        T(what_an_entry_holds_is_kept),
        T(a_snapshot_is_not_written_in_place_after_it_was_applied),
        T(images_that_can_have_none_are_refused),
        T(a_snapshot_can_only_be_read),
        T(a_damaged_image_is_left_alone),
        T(what_the_disk_has_is_not_freed_with_a_snapshot),
        T(what_the_disk_has_is_not_freed_in_place_either),
        T(a_delete_in_place_writes_no_table_that_says_the_same),
        T(what_another_snapshot_has_is_not_freed_by_a_delete_or_apply),
        T(a_writer_beside_does_not_reach_a_snapshot),
        T(a_snapshot_costs_a_fixed_number_of_flushes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
