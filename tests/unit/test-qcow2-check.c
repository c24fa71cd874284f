/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Damage in qcow2 images is found, named, and repaired where there is one answer, in bounded memory
 * and time. */
#include "test-qcow2-damage.h"

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

/* ------------------------------------------------------------------ data on tables */

static uint64_t place_of(const struct patient *p, const char *what)
{
    uint64_t behind = dr_round_up(p->size, p->cluster);
    if (!strcmp(what, "the L1 table"))
        return p->l1;
    if (!strcmp(what, "the refcount table"))
        return p->roots;
    if (!strcmp(what, "a refcount block"))
        return peek(mem, p->roots, 8);
    if (!strcmp(what, "an L2 table"))
        return l2_of(p);
    if (!strcmp(what, "the snapshot table")) {
        snapshot_of_version_2(p);
        return behind;
    }
    two_bitmaps(p);
    if (!strcmp(what, "the bitmap directory"))
        return behind;
    uint64_t table = behind + p->cluster;
    if (!strcmp(what, "a bitmap's table"))
        return table;
    poke(mem, table + 3 * p->cluster - 8, 0, 8);
    poke(mem, table, table + 2 * p->cluster, 8);
    set_count(p, table + 2 * p->cluster, 1);
    return table + 2 * p->cluster;
}

/* The number of errors is that of the same reference to other data. */
static void data_that_lies_on_a_table_is_named(void **state)
{
    (void)state;
    static const char *const tables[] = {
        "the L1 table",       "the refcount table",   "a refcount block", "an L2 table",
        "the snapshot table", "the bitmap directory", "a bitmap's table", "the bits of a bitmap"};
    for (size_t i = 0; i < sizeof(tables) / sizeof(tables[0]); i++) {
        char line[160];
        make_in(mem, &shapes[0]);
        struct patient p = patient_of(mem, &shapes[0]);
        uint64_t at = place_of(&p, tables[i]);
        struct dr_check_result sound = checked(mem, 0);
        assert_null(strstr(lines, "lies on"));
        poke(mem, entry_at(&p, 1), QCOW2_COPIED | at, 8);
        struct dr_check_result r = checked(mem, 0);
        snprintf(line, sizeof(line),
                 "ERROR L2 entry at byte %llu: guest data at 0x%llx lies on %s\n",
                 ULL(entry_at(&p, 1)), ULL(at), tables[i]);
        if (!strstr(lines, line) || strstr(strstr(lines, "lies on") + 1, "lies on"))
            fail_msg("%s: %s", line, lines);
        /* Its count is too low; and it is one block of counts. */
        assert_int_equal(r.corruptions,
                         sound.corruptions + 1 + !strcmp(tables[i], "a refcount block"));
        assert_int_equal(r.leaks, 1);
        /* The cluster that the entry should lead to may be the one that nothing leads to. */
        assert_in_range(checked(mem, DR_CHECK_FIX_ALL).leaks, 1, 3);
        assert_non_null(strstr(lines, "Leaked clusters are kept"));
        ok(mem->ops->unlink(mem, PATH, &err));
    }
}

/* One line for each, whichever of them the search comes to first. */
static void data_that_lies_on_many_tables_is_named_for_each(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    const char *const tables[] = {"the L1 table", "the refcount table",   "a refcount block",
                                  "an L2 table",  "the bitmap directory", "a bitmap's table"};
    uint64_t at[6];
    place_of(&p, "the bitmap directory"); /* makes the bitmaps */
    uint64_t behind = dr_round_up(p.size, p.cluster);
    for (unsigned i = 0; i < 6; i++) {
        at[i] = i < 4 ? place_of(&p, tables[i]) : behind + (i - 4) * p.cluster;
        poke(mem, entry_at(&p, i + 1), QCOW2_COPIED | at[i], 8);
    }
    checked(mem, 0);
    for (unsigned i = 0; i < 6; i++) {
        char line[160];
        snprintf(line, sizeof(line),
                 "ERROR L2 entry at byte %llu: guest data at 0x%llx lies on %s\n",
                 ULL(entry_at(&p, i + 1)), ULL(at[i]), tables[i]);
        if (!strstr(lines, line))
            fail_msg("%s: %s", line, lines);
    }
}

static void clusters_that_data_of_two_entries_share_are_no_tables(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    two_entries_at_one_place(&p);
    assert_int_equal(checked(mem, 0).leaks, 1);
    assert_null(strstr(lines, "lies on"));
    assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
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

/* ------------------------------------------------------------------ several readers */

static struct dr_check_result checked_by(unsigned readers, unsigned fix)
{
    const struct qcow2_check_limits usual = qcow2_check_limits;
    qcow2_check_limits.readers = readers;
    struct dr_check_result r = checked(mem, fix);
    qcow2_check_limits = usual;
    return r;
}

static void assert_same_by_one_and_four(const char *what)
{
    struct dr_check_result one = checked_by(1, 0), four;
    CLEANUP_FREE char *said = strdup(lines);
    for (int i = 0; i < 3; i++) {
        four = checked_by(4, 0);
        if (memcmp(&one, &four, sizeof(one)) != 0 || strcmp(lines, said) != 0)
            fail_msg("%s: one thread says:\n%sfour say:\n%s", what, said, lines);
    }
}

static void one_thread_and_four_find_and_say_the_same(void **state)
{
    (void)state;
    for (size_t d = 0; d < N_DAMAGES; d++) {
        make_in(mem, &shapes[0]);
        struct patient p = patient_of(mem, &shapes[0]);
        if (can_have(&p, &damages[d])) {
            damages[d].inflict(&p);
            assert_same_by_one_and_four(damages[d].name);
        }
        ok(mem->ops->unlink(mem, PATH, &err));
    }
    struct patient p = make_wide();
    harm_wide(&p);
    poke(mem, p.roots + 8 * 20, 0, 8);
    assert_same_by_one_and_four("a wide image");
    checked_by(4, DR_CHECK_FIX_ALL);
    assert_true(is_clean(checked_by(4, 0)));
}

/* Reads of the image, which wait for each other. */
struct meeting {
    pthread_mutex_t lock;
    pthread_cond_t all_there;
    unsigned there, wanted;
    uint64_t from; /* reads of tables begin here */
};

static int meet(void *user, const struct faultfs_io *io)
{
    struct meeting *m = user;
    if (io->kind != FAULTFS_READ || io->off < m->from)
        return 0;
    pthread_mutex_lock(&m->lock);
    if (++m->there == m->wanted)
        pthread_cond_broadcast(&m->all_there);
    while (m->there < m->wanted)
        pthread_cond_wait(&m->all_there, &m->lock);
    pthread_mutex_unlock(&m->lock);
    return 0;
}

/* Sixteen tables, none behind the other: without eight readers the test hangs. */
static void a_file_far_away_gets_as_many_requests_at_once_as_it_wants(void **state)
{
    (void)state;
    struct meeting m = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 8, 0};
    struct faultfs *far = faultfs_new(mem);
    struct dr_disk *disk;
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_create_params create = {
        .size = 64 * 1024 * KiB, .options = shapes[0].options, .n_options = shapes[0].n};
    ok(dr_format_qcow2.create(mem, PATH, &create, &err));
    ok(dr_open_fs(mem, PATH, &open, &disk, &err));
    for (uint64_t i = 0; i < 16; i++)
        write_at(disk, i * 4096 * KiB, 512, 1);
    ok(dr_close(disk, &err));
    m.from = peek(mem, peek(mem, QCOW2_AT_L1 + 4, 8), 8) & QCOW2_OFFSET;
    faultfs_set_depth(far, 8);
    faultfs_observe(far, meet, &m);
    assert_true(is_clean(checked(faultfs_fs(far), 0)));
    assert_true(m.there >= 16);
    faultfs_free(far);
}

static void the_first_piece_that_cannot_be_read_fails_the_check(void **state)
{
    (void)state;
    const unsigned kinds = 1u << FAULTFS_READ | 1u << FAULTFS_EXTENT;
    struct faultfs *f = faultfs_new(mem);
    make_wide();
    bool failed = true;
    for (uint64_t n = 0; failed; n += 31) {
        struct dr_check_result r;
        faultfs_arm(f, &(struct faultfs_plan){.nth = n, .kinds = kinds});
        failed = check_in(faultfs_fs(f), 0, &r) < 0;
        assert_int_equal(failed, faultfs_fired(f));
    }
    assert_true(faultfs_count_of(f, FAULTFS_READ) > 100);
    faultfs_free(f);
}

/* ------------------------------------------------------------------ many ways to one place */

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

static void count_lines(void *user, const char *line)
{
    unsigned *n = user;
    ++*n;
    snprintf(lines, sizeof(lines), "%s", line);
}

static void findings_beyond_number_are_counted_and_not_listed(void **state)
{
    (void)state;
    struct dr_image *image;
    unsigned n = 0;
    struct dr_check_result r = {.report = count_lines, .user = &n};
    struct patient p = make_wide();
    poke(mem, p.roots, 0, 8);
    struct dr_file *f;
    ok(dr_file_open(mem, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_zero(f, p.roots, 4096, 0, &err)); /* nothing has a count */
    dr_file_unref(f);
    ok(dr_image_open(mem, PATH, "qcow2", 0, &image, &err));
    ok(dr_format_qcow2.check(image, 0, &r, &err));
    ok(dr_image_unref(image, &err));
    assert_int_equal(n, 100001);
    char last[64];
    snprintf(last, sizeof(last), "%llu more findings are not listed",
             ULL(r.corruptions + r.leaks - 100000));
    assert_string_equal(lines, last);
}

/* Nor is any count cut short: each one here is the largest of a width, or one more. */
static void counts_take_no_more_memory_than_the_largest_of_their_page_needs(void **state)
{
    (void)state;
    struct qcow2_tally t = {0};
    uint64_t narrow = 0, bit = 0;
    for (unsigned order = 0; order <= 6; order++) {
        const uint64_t least = order ? UINT64_C(1) << (1u << (order - 1)) : 1;
        const uint64_t most = order < 6 ? (UINT64_C(1) << (1u << order)) - 1 : UINT64_MAX;
        for (unsigned k = 0; k < 2; k++) {
            const uint64_t count = k ? most : least;
            qcow2_tally_begin(&t, 0, UINT64_MAX);
            assert_int_equal(qcow2_tally_add(&t, 5, count, 0), 0);
            assert_int_equal(qcow2_tally_get(&t, 5, NULL), count);
            assert_int_equal(qcow2_tally_get(&t, 4, NULL) + qcow2_tally_get(&t, 6, NULL), 0);
            narrow = order == 0 ? t.bytes : narrow;
            bit = order == 1 ? t.bytes - narrow : bit; /* one more for each count */
            assert_int_equal(t.bytes, narrow + bit * ((1u << order) - 1));
            qcow2_tally_free(&t);
        }
    }
    assert_true(bit > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_sound_image_has_nothing_to_report),
        T(damage_is_found_and_repaired_and_the_disk_reads_the_same),
        T(data_that_lies_on_a_table_is_named),
        T(data_that_lies_on_many_tables_is_named_for_each),
        T(clusters_that_data_of_two_entries_share_are_no_tables),
        T(with_little_memory_the_same_is_found_and_repaired),
        T(one_thread_and_four_find_and_say_the_same),
        T(a_file_far_away_gets_as_many_requests_at_once_as_it_wants),
        T(the_first_piece_that_cannot_be_read_fails_the_check),
        T(findings_beyond_number_are_counted_and_not_listed),
        T(counts_take_no_more_memory_than_the_largest_of_their_page_needs),
        T(many_ways_to_one_table_are_counted_at_once),
        T(many_snapshots_with_one_table_are_counted_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
