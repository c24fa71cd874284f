/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Repairs of qcow2 images that fail or are cut off make nothing worse; what a repair leaves alone;
 * recovery and trim. */
#include "test-qcow2-damage.h"

/* ------------------------------------------------------------------ repairs that are rehearsed */

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

static json_t *check_by_name(unsigned repair)
{
    char *text = NULL;
    ok(dr_check_fs(mem, PATH, NULL, repair, NULL, NULL, &text, &err));
    json_t *o = json_loads(text, 0, NULL);
    free(text);
    assert_non_null(o);
    return o;
}

static uint64_t number_of(const json_t *o, const char *name)
{
    return (uint64_t)json_integer_value(json_object_get(o, name));
}

/* In bytes of the file that both have. */
static bool is_same(const struct copy *a, const struct copy *b)
{
    return a->size == b->size && memcmp(a->bytes, b->bytes, a->size) == 0;
}

/* Every 8 bytes that the repair changes in front of the old end belong to a change of the plan: of
 * a count, an entry or a field, or of a table that is written from there on. */
static void expect_planned(const struct copy *before, const struct copy *after, const json_t *plan,
                           const char *name)
{
    uint64_t at = 0;
    for (; at + 8 <= dr_min(before->size, after->size); at += 8) {
        bool planned = memcmp(before->bytes + at, after->bytes + at, 8) == 0;
        for (size_t i = 0; !planned && i < json_array_size(plan); i++) {
            const json_t *change = json_array_get(plan, i);
            uint64_t from = number_of(change, "offset");
            bool table = strstr(json_string_value(json_object_get(change, "change")), "anew");
            planned = table || (from < at + 8 && at < from + 24);
        }
        if (!planned)
            fail_msg("%s: byte %llu changes, which is not planned", name, ULL(at));
    }
}

static void a_rehearsed_repair_changes_nothing_and_tells_what_the_repair_does(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_DAMAGES * N_SHAPES; i++) {
        const struct damage *d = &damages[i / N_SHAPES];
        make_in(mem, &shapes[i % N_SHAPES]);
        struct patient p = patient_of(mem, &shapes[i % N_SHAPES]);
        if (can_have(&p, d)) {
            d->inflict(&p);
            struct copy before = copy_of(mem);
            json_t *plan = check_by_name(DR_REPAIR_ALL | DR_REPAIR_DRY_RUN);
            struct copy rehearsed = copy_of(mem);
            json_t *done = check_by_name(DR_REPAIR_ALL);
            struct copy after = copy_of(mem);
            if (!is_same(&before, &rehearsed))
                fail_msg("%s: changes the file", d->name);
            size_t planned = json_array_size(json_object_get(plan, "plan"));
            if ((planned == 0) != is_same(&before, &after))
                fail_msg("%s, %s: %zu changes are planned", p.shape->name, d->name, planned);
            expect_planned(&before, &after, json_object_get(plan, "plan"), d->name);
            assert_int_equal(number_of(plan, "corruptions-fixable"),
                             number_of(done, "corruptions-fixed"));
            assert_int_equal(number_of(plan, "leaks-fixable"), number_of(done, "leaks-fixed"));
            assert_int_equal(number_of(plan, "corruptions"),
                             number_of(done, "corruptions") + number_of(done, "corruptions-fixed"));
            json_decref(plan);
            json_decref(done);
            free(before.bytes);
            free(rehearsed.bytes);
            free(after.bytes);
        }
        ok(mem->ops->unlink(mem, PATH, &err));
    }
}

/* ------------------------------------------------------------------ repairs that are cut off */

/* The state that must not get worse. */
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
    const struct dr_check_result repaired = checked(mem, DR_CHECK_FIX_ALL);
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
        if (fired && r == 0 &&
            (result.corruptions != repaired.corruptions || result.leaks != repaired.leaks))
            fail_msg("%s: nothing is said of it", where);
        expect_no_worse(mem, &before, repaired.corruptions, where);
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
        for (size_t i = 0; i <= powerfs_ops(power); i = powerfs_next(power, i, POWERFS_EVERY))
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

/* ------------------------------------------------------------------ no space */

static int nothing_grows(void *user, const struct faultfs_io *io)
{
    const uint64_t *size = user;
    bool grows = io->kind == FAULTFS_WRITE || io->kind == FAULTFS_ZERO;
    return grows && io->off + io->len > *size ? -ENOSPC : 0;
}

static int check_without_space(unsigned fix, struct dr_check_result *result)
{
    struct faultfs *faults = faultfs_new(mem);
    uint64_t size = patient_of(mem, &shapes[0]).size;
    faultfs_observe(faults, nothing_grows, &size);
    int r = check_in(faultfs_fs(faults), fix, result);
    faultfs_free(faults);
    assert_int_equal(patient_of(mem, &shapes[0]).size, size);
    return r;
}

static void a_full_file_system_keeps_no_count_from_being_corrected(void **state)
{
    (void)state;
    struct dr_check_result r;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    all_counts_zero(&p);
    ok(check_without_space(DR_CHECK_FIX_ALL, &r));
    assert_true(is_clean(r));
    assert_true(r.corruptions_fixed > 40);
}

static void without_space_for_new_counts_the_image_stays_as_it_is(void **state)
{
    (void)state;
    struct dr_check_result r;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    counts_at_an_odd_place(&p);
    uint8_t *before = guest_bytes(mem);
    assert_int_equal(check_without_space(DR_CHECK_FIX_ALL, &r), -ENOSPC);
    uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    free(before);
    free(after);
    assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
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

static struct dr_disk *open_disk;

/* The guest frees something while the check flushes. */
static int free_meanwhile(void *user, const struct faultfs_io *io)
{
    bool *done = user;
    if (io->kind == FAULTFS_FLUSH && !*done) {
        *done = true;
        ok(dr_zero(open_disk, 0, 64 * KiB, DR_MAY_UNMAP, &err));
    }
    return 0;
}

static void an_open_disk_has_no_leaks_because_something_was_just_freed(void **state)
{
    (void)state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct faultfs *faults = faultfs_new(mem);
    char *json;
    bool done = false;
    make_in(mem, &shapes[0]);
    ok(dr_open_fs(faultfs_fs(faults), PATH, &rw, &open_disk, &err));
    write_at(open_disk, 900 * KiB, 4 * KiB, 5);
    faultfs_observe(faults, free_meanwhile, &done);
    lines[0] = '\0';
    ok(dr_disk_check(open_disk, note, NULL, &json, NULL, &err));
    assert_true(done);
    faultfs_observe(faults, NULL, NULL);
    free(json);
    ok(dr_close(open_disk, &err));
    faultfs_free(faults);
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

/* ------------------------------------------------------------------ a raw data file */

/* The file is the disk for whoever opens it by itself: what the entry said is no other answer. */
static void what_lies_elsewhere_in_a_raw_data_file_is_at_its_own_place_again(void **state)
{
    (void)state;
    static const struct shape raw = {
        "a raw data file",
        {{"cluster_size", "4096"}, {"data_file", "a.data"}, {"data_file_raw", "on"}},
        3};
    static const uint64_t wrong[] = {8 * 4096, 4096 + 512}; /* aligned or not */
    for (size_t i = 0; i < 2; i++) {
        make_in(mem, &raw);
        struct patient p = patient_of(mem, &raw);
        CLEANUP_FREE uint8_t *before = guest_bytes(mem);
        poke(mem, entry_at(&p, 3), wrong[i] | QCOW2_COPIED, 8);
        assert_int_equal(checked(mem, 0).corruptions, 1);
        struct dr_check_result r = checked(mem, DR_CHECK_FIX_ALL);
        assert_int_equal(r.corruptions_fixed, 1);
        assert_true(is_clean(r));
        assert_int_equal(peek(mem, entry_at(&p, 3), 8), 3 * 4096 | QCOW2_COPIED);
        CLEANUP_FREE uint8_t *after = guest_bytes(mem);
        assert_memory_equal(before, after, SIZE);
        struct copy once = copy_of(mem);
        assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
        struct copy twice = copy_of(mem);
        assert_true(is_same(&once, &twice));
        free(once.bytes);
        free(twice.bytes);
        ok(mem->ops->unlink(mem, PATH, &err));
        ok(mem->ops->unlink(mem, "/d/a.data", &err));
    }
}

/* ------------------------------------------------------------------ more users than counts can say
 */

static const struct shape *const narrow = &shapes[3]; /* counts of 1 bit */

static void write_and_close(uint64_t off, int byte)
{
    struct dr_disk *disk;
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    ok(dr_open_fs(mem, PATH, &open, &disk, &err));
    write_at(disk, off, 4096, byte);
    ok(dr_close(disk, &err));
}

static int try_to_write(uint64_t off)
{
    struct dr_disk *disk;
    uint8_t bytes[512] = {0};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    err = (struct dr_error)DR_ERROR_INIT;
    int r = dr_open_fs(mem, PATH, &open, &disk, &err);
    if (r < 0)
        return r;
    r = dr_pwrite(disk, bytes, off, sizeof(bytes), 0, &err);
    dr_close(disk, NULL);
    return r;
}

static void two_users_of_a_cluster_that_cannot_be_counted_get_one_each(void **state)
{
    (void)state;
    make_in(mem, narrow);
    struct patient p = patient_of(mem, narrow);
    write_and_close(4096, 0x11);
    two_entries_at_one_place(&p);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    assert_int_equal(before[0], 0x11);
    assert_int_equal(checked(mem, 0).corruptions, 1);
    assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
    write_and_close(0, 0x22);
    memset(before, 0x22, 4096);
    CLEANUP_FREE uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    assert_true(is_clean(checked(mem, 0)));
}

/* Compressed bytes begin anywhere; the copy begins with a sector. */
static void two_users_of_compressed_bytes_at_an_odd_place_get_one_each(void **state)
{
    (void)state;
    make_in(mem, narrow);
    struct patient p = patient_of(mem, narrow);
    uint64_t host = (entry_of(&p, 1) & QCOW2_OFFSET) + 7;
    uint8_t plain[4096], coded[4096];
    struct dr_image *image;
    struct dr_file *f;
    memset(plain, 0x33, sizeof(plain));
    ok(dr_image_open(mem, PATH, "qcow2", 0, &image, &err));
    int64_t n = image->fmt->encode(image, plain, sizeof(plain), 0, coded, sizeof(coded));
    assert_in_range(n, 1, 500); /* in one sector */
    ok(dr_image_unref(image, &err));
    ok(dr_file_open(mem, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, coded, host, (size_t)n, &err));
    dr_file_unref(f);
    for (unsigned i = 0; i < 2; i++)
        poke(mem, entry_at(&p, i), QCOW2_CODED | host, 8);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    assert_memory_equal(before, plain, sizeof(plain));
    assert_true(checked(mem, 0).corruptions > 0);
    assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
    CLEANUP_FREE uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    assert_true(entry_of(&p, 0) != entry_of(&p, 1));
}

/* Each of them says that it is the only one, so the write itself could not see it. */
static void a_write_to_an_image_of_two_such_users_is_refused(void **state)
{
    (void)state;
    make_in(mem, narrow);
    struct patient p = patient_of(mem, narrow);
    two_entries_at_one_place(&p);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    struct copy file = copy_of(mem);
    for (uint64_t off = 0; off <= 512 * KiB; off += 4 * KiB)
        assert_int_equal(try_to_write(off), -EIO);
    assert_non_null(strstr(err.text, "than its count of 1 bit can say"));
    struct copy later = copy_of(mem);
    assert_true(is_same(&file, &later));
    CLEANUP_FREE uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    free(file.bytes);
    free(later.bytes);
    assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
    assert_int_equal(try_to_write(0), 0);
}

/* A table with two links is not copied: all that it leads to would have two. */
static void an_image_whose_counts_cannot_say_who_shares_is_marked_and_not_written_to(void **state)
{
    (void)state;
    make_in(mem, narrow);
    struct patient p = patient_of(mem, narrow);
    poke(mem, QCOW2_AT_SIZE, 2 * p.cluster / 8 * p.cluster, 8);
    poke(mem, QCOW2_AT_L1, 2, 4);
    poke(mem, p.l1 + 8, peek(mem, p.l1, 8), 8);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    uint64_t left = checked(mem, DR_CHECK_FIX_ALL).corruptions;
    assert_true(left > 0);
    assert_non_null(strstr(lines, "The image is marked as corrupt and can only be read"));
    assert_int_equal(checked(mem, DR_CHECK_FIX_ALL).corruptions, left);
    assert_int_equal(try_to_write(0), -EACCES);
    assert_non_null(strstr(err.text, "is marked as corrupt"));
    CLEANUP_FREE uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
}

static void what_is_said_to_be_shared_is_not_given_up_where_counts_cannot_say_so(void **state)
{
    (void)state;
    static void (*const clear[])(const struct patient *) = {not_copied_though_alone,
                                                            table_not_copied_though_alone};
    for (size_t i = 0; i < 2; i++) {
        make_in(mem, narrow);
        struct patient p = patient_of(mem, narrow);
        uint64_t entry = peek(mem, p.l1, 8);
        uint64_t off = i ? 120 * KiB : 0; /* a new entry of that table; another place for data */
        clear[i](&p);
        assert_int_equal(try_to_write(off), -EIO);
        assert_non_null(strstr(err.text, "which counts of 1 bit cannot say"));
        assert_int_equal(peek(mem, p.l1, 8) & QCOW2_OFFSET, entry & QCOW2_OFFSET);
        assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
        assert_int_equal(try_to_write(off), 0);
        ok(mem->ops->unlink(mem, PATH, &err));
    }
}

static void without_space_for_copies_the_image_is_marked(void **state)
{
    (void)state;
    struct dr_check_result r;
    make_in(mem, narrow);
    for (uint64_t i = 0; i < 20; i++) /* whatever was free in the file */
        write_and_close(200 * KiB + i * 4096, 4);
    struct patient p = patient_of(mem, narrow);
    poke(mem, entry_at(&p, 30), entry_of(&p, 1), 8);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    ok(check_without_space(DR_CHECK_FIX_ALL, &r));
    assert_int_equal(r.corruptions, 1);
    assert_int_equal(r.leaks, 0);
    assert_int_equal(try_to_write(0), -EACCES);
    r = checked(mem, DR_CHECK_FIX_ALL);
    if (!is_clean(r))
        fail_msg("%llu %llu %llu: %s", ULL(r.corruptions), ULL(r.leaks), ULL(r.corruptions_fixed),
                 lines);
    CLEANUP_FREE uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    assert_int_equal(try_to_write(0), 0);
}

/* ------------------------------------------------------------------ no counts at all */

static void an_image_whose_counts_cannot_be_found_is_read_and_not_written_to(void **state)
{
    (void)state;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    CLEANUP_FREE uint8_t *before = guest_bytes(mem);
    table_of_counts_at_an_odd_place(&p);
    CLEANUP_FREE uint8_t *damaged = guest_bytes(mem);
    assert_non_null(damaged);
    assert_memory_equal(before, damaged, SIZE);
    assert_int_equal(try_to_write(0), -EINVAL);
    assert_non_null(strstr(err.text, "the refcount table cannot be where"));
    assert_int_equal(peek(mem, QCOW2_AT_REFTABLE, 8), p.roots + 8);
    assert_true(is_clean(checked(mem, DR_CHECK_FIX_ALL)));
    CLEANUP_FREE uint8_t *after = guest_bytes(mem);
    assert_memory_equal(before, after, SIZE);
    assert_int_equal(try_to_write(0), 0);
}

/* It was opened for reading, and a commit wants to write to it. */
static void a_parent_whose_counts_cannot_be_found_takes_no_commit(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_in(mem, &shapes[0]);
    struct patient p = patient_of(mem, &shapes[0]);
    table_of_counts_at_an_odd_place(&p);
    const struct dr_commit_options commit = {0};
    struct dr_create_options create = {
        .format = "qcow2", .backing = PATH, .backing_format = "qcow2"};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    ok(dr_create_fs(mem, "/d/child.qcow2", &create, &err));
    ok(dr_open_fs(mem, "/d/child.qcow2", &open, &disk, &err));
    write_at(disk, 0, 4096, 9);
    fails(EINVAL, "the refcount table cannot be where", dr_disk_commit(disk, &commit, NULL, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(peek(mem, QCOW2_AT_REFTABLE, 8), p.roots + 8);
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
    const struct CMUnitTest tests[] = {
        T(a_rehearsed_repair_changes_nothing_and_tells_what_the_repair_does),
        T(a_repair_that_fails_anywhere_makes_nothing_worse),
        T(a_repair_that_is_cut_off_anywhere_makes_nothing_worse),
        T(a_full_file_system_keeps_no_count_from_being_corrected),
        T(without_space_for_new_counts_the_image_stays_as_it_is),
        T(an_image_that_is_dirty_gets_its_counts_when_it_is_opened_for_writing),
        T(a_dirty_image_that_cannot_be_repaired_is_not_written_to),
        T(leaks_are_kept_while_it_is_not_known_what_they_were),
        T(counts_that_are_too_low_are_raised_though_leaks_are_kept),
        T(an_open_disk_has_no_leaks_because_something_was_just_freed),
        T(counts_are_not_written_anew_while_entries_lead_behind_the_end),
        T(an_image_whose_counts_cannot_be_found_is_read_and_not_written_to),
        T(a_parent_whose_counts_cannot_be_found_takes_no_commit),
        T(what_lies_elsewhere_in_a_raw_data_file_is_at_its_own_place_again),
        T(two_users_of_a_cluster_that_cannot_be_counted_get_one_each),
        T(two_users_of_compressed_bytes_at_an_odd_place_get_one_each),
        T(a_write_to_an_image_of_two_such_users_is_refused),
        T(an_image_whose_counts_cannot_say_who_shares_is_marked_and_not_written_to),
        T(what_is_said_to_be_shared_is_not_given_up_where_counts_cannot_say_so),
        T(without_space_for_copies_the_image_is_marked),
        T(repairing_leaks_corrects_nothing_else),
        T(trim_cuts_the_file_behind_the_last_cluster_in_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
