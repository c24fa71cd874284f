/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Pruning a set: the newest backups show what they did, whatever is interrupted, and the others go
 * without a trace. */
#include "base/cleanup.h"
#include "faultfs.h"
#include "powerfs.h"
#include "slower.h"
#define SIZE (1280u * 1024 + 3 * 512)
#include "test-backup.h"

#define BACKUPS 5

/* How the backups are stored: all of one format, or a raw one and children of it. */
struct store {
    const char *first, *others, *pairs;
};
static const struct store stores[] = {
    {"qcow2", "qcow2", NULL},
    {"vmdk", "vmdk", NULL},
    {"raw", "add-cow", NULL},
    {"vmdk", "vmdk", "twoGbMaxExtentSparse"},
};
#define N_STORES (sizeof(stores) / sizeof(stores[0]))

/* What each backup b0, b1... held. */
static uint8_t *held[BACKUPS];
static uint64_t held_size[BACKUPS];

static void name_of(unsigned i, char *name)
{
    snprintf(name, 8, "b%u", i);
}

static void forget_series(void)
{
    for (unsigned i = 0; i < BACKUPS; i++)
        free(DR_STEAL(held[i]));
}

/* Bytes that the disk has more than whole sectors, which only a raw one can. */
static uint64_t odd;

/* A disk that grows and shrinks, and its backups b0 to b4. */
static void make_series(struct dr_fs *fs, const struct store *store)
{
    static const uint64_t sizes[BACKUPS] = {SIZE, SIZE, SIZE + MiB, SIZE - 512 * KiB, SIZE};
    uint64_t seed = 8;
    const struct dr_pair subformat = {"subformat", store->pairs};
    make_tracked(fs, 0);
    for (unsigned i = 0; i < BACKUPS; i++) {
        const struct dr_backup_options o = {.set = set,
                                            .bitmap = "B",
                                            .format = i == 0 ? store->first : store->others,
                                            .pairs = &subformat,
                                            .n_pairs = store->pairs != NULL};
        struct dr_disk *disk = NULL;
        char name[8];
        ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
        ok(dr_truncate(disk, sizes[i] + odd, &err));
        change_at_random(disk, &seed, 5);
        ok(dr_close(disk, &err));
        name_of(i, name);
        ok(dr_backup_fs(fs, "disk", NULL, name, &o, NULL, NULL, &err));
        held[i] = view(fs, "disk", &held_size[i]);
    }
}

static int prune_to(struct dr_fs *fs, unsigned keep, struct dr_error *why)
{
    const struct dr_prune_options o = {.keep = keep};
    return dr_backup_prune_fs(fs, set, &o, NULL, why);
}

static size_t listed(struct dr_fs *fs)
{
    struct dr_backup_set s;
    ok(dr_set_load(&s, fs, set, &err));
    size_t n = 0;
    for (size_t i = 0; i < s.n; i++)
        n += !s.all[i].leaving;
    dr_set_free(&s);
    return n;
}

static bool good_backup(struct dr_fs *fs, unsigned i, struct dr_error *why)
{
    char name[8];
    struct dr_disk *disk = NULL;
    name_of(i, name);
    if (dr_backup_verify_fs(fs, set, name, NULL, NULL, NULL, why) < 0 ||
        dr_open_fs(fs, name, NULL, &disk, why) < 0)
        return false;
    uint64_t size = dr_size(disk);
    uint8_t *have = malloc(size + 1);
    int r = dr_pread(disk, have, 0, size, why);
    if (r == 0 && (!dr_sums_fits(held_size[i], size) || memcmp(have, held[i], held_size[i]) != 0 ||
                   !dr_is_zero(have + held_size[i], size - held_size[i])))
        r = dr_fail(why, EBADMSG, "%s shows something else", name);
    free(have);
    dr_close(disk, NULL);
    return r == 0;
}

/* All that the set names is good, the `keep` newest are among it, and it is restored right. */
static bool good_set(struct dr_fs *fs, unsigned keep, struct dr_error *why)
{
    struct dr_backup_set s;
    unsigned found = 0;
    if (dr_set_load(&s, fs, set, why) < 0)
        return false;
    bool good = true;
    for (size_t i = 0; good && i < s.n; i++) {
        unsigned number = (unsigned)(s.all[i].name[1] - '0');
        if (s.all[i].leaving || s.all[i].name[0] != 'b')
            continue;
        good = good_backup(fs, number, why);
        found += number >= BACKUPS - keep;
    }
    dr_set_free(&s);
    if (good && found != keep)
        return dr_fail(why, ENOENT, "%u of the kept backups are there, not %u", found, keep) == 0;
    return good;
}

static void restores(struct dr_fs *fs, unsigned i)
{
    const struct dr_restore_options o = {.shrink = true};
    char name[8];
    name_of(i, name);
    make(fs, "restored", "raw", 512, NULL);
    ok(dr_restore_fs(fs, name, "restored", &o, NULL, NULL, &err));
    same_view(fs, "restored", held[i], held_size[i]);
    ok(fs->ops->unlink(fs, "restored", &err));
}

/* Files of a series of so many backups that were never pruned. */
static size_t files_of(const struct store *store, unsigned keep)
{
    struct dr_fs *fs = dr_fs_memory_new();
    const struct dr_pair subformat = {"subformat", store->pairs};
    make_tracked(fs, 0);
    for (unsigned i = 0; i < keep; i++) {
        const struct dr_backup_options o = {.set = set,
                                            .bitmap = "B",
                                            .format = store->others,
                                            .pairs = &subformat,
                                            .n_pairs = store->pairs != NULL};
        char name[8];
        name_of(i, name);
        if (i == 0 && strcmp(store->others, "add-cow") == 0)
            make(fs, "parent", "raw", SIZE, NULL);
        ok(dr_backup_fs(fs, "disk", NULL, name, &o, NULL, NULL, &err));
    }
    size_t n = count_files(fs) - exists(fs, "parent");
    dr_fs_memory_free(fs);
    return n;
}

/* ------------------------------------------------------------------ what is kept */

static void the_newest_backups_show_what_they_did(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_STORES; k++)
        for (unsigned keep = BACKUPS; keep > 0; keep--) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct dr_error why = DR_ERROR_INIT;
            make_series(fs, &stores[k]);
            ok(prune_to(fs, keep, &err));
            assert_int_equal(listed(fs), keep);
            if (!good_set(fs, keep, &why))
                fail_msg("%s, %u kept: %s", stores[k].others, keep, why.text);
            for (unsigned i = BACKUPS - keep; i < BACKUPS; i++)
                restores(fs, i);
            if (strcmp(stores[k].others, "add-cow") != 0)
                assert_int_equal(count_files(fs), files_of(&stores[k], keep));
            put(fs, "disk", MiB + 100, 5, 0x55);
            const struct dr_backup_options o = {
                .set = set, .bitmap = "B", .format = stores[k].others};
            struct dr_backup_result result;
            ok(dr_backup_fs(fs, "disk", NULL, "next", &o, NULL, &result, &err));
            assert_true(result.incremental);
            assert_int_equal(result.copied, 64 * KiB); /* the checksums of the last one are there */
            holds_the_disk(fs, "next");
            forget_series();
            dr_fs_memory_free(fs);
        }
}

static void a_disk_that_ends_within_a_sector_is_pruned_too(void **state)
{
    (void)state;
    disk_format = "raw";
    odd = 129;
    for (size_t k = 0; k < N_STORES; k++)
        for (unsigned keep = BACKUPS; keep > 0; keep--) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct dr_error why = DR_ERROR_INIT;
            make_series(fs, &stores[k]);
            ok(prune_to(fs, keep, &err));
            assert_int_equal(listed(fs), keep);
            if (!good_set(fs, keep, &why))
                fail_msg("%s, %u kept: %s", stores[k].others, keep, why.text);
            forget_series();
            dr_fs_memory_free(fs);
        }
    odd = 0;
    disk_format = "qcow2";
}

static void every_backup_may_be_followed_by_a_prune(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t seed = 12;
    make_tracked(fs, 0);
    for (unsigned i = 0; i < 9; i++) {
        char name[8];
        name_of(i, name);
        back_up(fs, name);
        ok(prune_to(fs, 3, &err));
        assert_int_equal(listed(fs), dr_min(i + 1u, 3u));
        for (unsigned k = i < 2 ? 0 : i - 2; k <= i; k++) {
            name_of(k, name);
            verified(fs, name);
        }
        holds_the_disk(fs, name);
        change_disk(fs, &seed, 4);
    }
}

/* Nothing of the old chain is needed by a new full backup. */
static void a_chain_that_nothing_needs_goes_as_a_whole(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_backup_options full = {.set = set, .bitmap = "B", .full = true};
    make_tracked(fs, 0);
    back_up(fs, "b0");
    back_up(fs, "b1");
    put(fs, "disk", MiB, 5, 0x55);
    ok(dr_backup_fs(fs, "disk", NULL, "b2", &full, NULL, NULL, &err));
    ok(prune_to(fs, 2, &err));
    assert_false(exists(fs, "b0"));
    verified(fs, "b1");
    ok(prune_to(fs, 1, &err));
    assert_false(exists(fs, "b1") || exists(fs, "b1.sums") || exists(fs, "b0.sums"));
    assert_int_equal(listed(fs), 1);
    holds_the_disk(fs, "b2");
}

static void each_disk_and_bitmap_has_its_own_series(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_backup_options o = {.set = set, .bitmap = "weekly"};
    struct dr_prune_options only = {.keep = 1, .like = "b1"};
    make_tracked(fs, 0);
    make(fs, "other", "qcow2", MiB, NULL);
    ok(dr_backup_fs(fs, "disk", NULL, "w0", &o, NULL, NULL, &err));
    back_up(fs, "b0");
    back_up(fs, "b1");
    ok(dr_backup_fs(fs, "disk", NULL, "w1", &o, NULL, NULL, &err));
    o.bitmap = "B";
    ok(dr_backup_fs(fs, "other", NULL, "o0", &o, NULL, NULL, &err));
    ok(dr_backup_prune_fs(fs, set, &only, NULL, &err));
    assert_int_equal(listed(fs), 4);
    assert_false(exists(fs, "b0"));
    ok(prune_to(fs, 1, &err));
    assert_int_equal(listed(fs), 3);
    verified(fs, "b1");
    verified(fs, "w1");
    verified(fs, "o0");
}

/* ------------------------------------------------------------------ dry run */

struct told {
    size_t steps, names;
    char into[8];
    uint64_t copied, freed;
};

static void note_step(void *user, const struct dr_prune_step *step)
{
    struct told *t = user;
    t->steps++;
    t->names += step->n;
    snprintf(t->into, sizeof(t->into), "%s", step->into ? step->into : "");
    t->copied += step->copied;
    t->freed += step->freed;
}

static uint64_t all_bytes(struct dr_fs *fs)
{
    uint64_t sum = 0;
    char **names;
    size_t n;
    ok(dr_ops_list(fs, ".", &names, &n, &err));
    for (size_t i = 0; i < n; i++) {
        size_t len;
        free(file_bytes(fs, names[i], &len));
        sum += len;
    }
    dr_ops_free_names(names, n);
    return sum;
}

static void a_dry_run_tells_and_changes_nothing(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_STORES; k++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct told dry = {0}, done = {0};
        struct dr_prune_options o = {.keep = 2, .dry_run = true, .tell = note_step, .user = &dry};
        make_series(fs, &stores[k]);
        size_t files = count_files(fs);
        uint64_t bytes = all_bytes(fs);
        ok(dr_backup_prune_fs(fs, set, &o, NULL, &err));
        assert_int_equal(count_files(fs), files);
        assert_int_equal(all_bytes(fs), bytes);
        assert_int_equal(listed(fs), BACKUPS);
        assert_int_equal(dry.steps, 1);
        assert_int_equal(dry.names, 3);
        assert_string_equal(dry.into, "b3");
        assert_true(dry.copied > 0 && dry.freed > 0);
        o.dry_run = false;
        o.user = &done;
        ok(dr_backup_prune_fs(fs, set, &o, NULL, &err));
        assert_memory_equal(&dry, &done, sizeof(dry));
        forget_series();
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ refused */

static void nothing_changes_where_it_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *user = NULL;
    const struct dr_prune_options like = {.keep = 1, .like = "b7"};
    const struct dr_create_options overlay = {
        .format = "qcow2", .backing = "b1", .backing_format = "qcow2"};
    make_series(fs, &stores[0]);
    refused(prune_to(fs, 0, &err), EINVAL, "at least one");
    refused(dr_backup_prune_fs(fs, set, &like, NULL, &err), ENOENT, "b7");
    refused(dr_backup_prune_fs(fs, "no-set", &like, NULL, &err), ENOENT, "no-set");

    ok(dr_open_fs(fs, "b4", NULL, &user, &err)); /* as a restore does */
    assert_true(prune_to(fs, 2, NULL) < 0);
    ok(dr_close(user, &err));
    ok(dr_create_fs(fs, "overlay", &overlay, &err));
    refused(prune_to(fs, 2, &err), EBUSY, "overlay");
    assert_int_equal(listed(fs), BACKUPS);
    for (unsigned i = 0; i < BACKUPS; i++)
        assert_true(good_backup(fs, i, NULL));
    ok(fs->ops->unlink(fs, "overlay", &err));
    ok(prune_to(fs, 2, &err));
    assert_true(good_set(fs, 2, NULL));
    forget_series();
}

/* Somebody has put another parent under the kept backup. */
static void a_chain_that_is_not_the_sets_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_rebase_options rebase = {.backing = "b0", .backing_format = "qcow2"};
    make_series(fs, &stores[0]);
    ok(dr_rebase_fs(fs, "b2", &rebase, NULL, &err));
    refused(prune_to(fs, 2, &err), EINVAL, "not those that");
    assert_int_equal(listed(fs), BACKUPS);
    assert_true(exists(fs, "b1"));
    forget_series();
}

static void what_is_marked_is_no_backup(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_backup_set s;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    back_up(fs, "b1");
    struct faultfs *f = faultfs_new(fs);
    struct dr_backup_options o = {.set = set, .since = "b0"};
    size_t marked = 0;
    for (uint64_t nth = 0; marked == 0; nth++) {
        faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .for_good = true});
        assert_true(prune_to(faultfs_fs(f), 1, NULL) < 0);
        faultfs_disarm(f);
        ok(dr_set_load(&s, fs, set, &err));
        for (size_t i = 0; i < s.n; i++)
            marked += s.all[i].leaving != NULL;
        dr_set_free(&s);
    }
    refused(dr_backup_verify_fs(fs, set, "b0", NULL, NULL, NULL, &err), ENOENT, "pruned");
    refused(dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &err), ENOENT, "b0");
    refused(dr_backup_fs(fs, "disk", NULL, "b0", NULL, NULL, NULL, &err), EEXIST, "b0");
    verified(fs, "b1");
    assert_true(back_up(fs, "b2").incremental);
    ok(prune_to(fs, 2, &err)); /* goes on with what it was about */
    assert_false(exists(fs, "b0"));
    verified(fs, "b1");
    holds_the_disk(fs, "b2");
    faultfs_free(f);
}

/* ------------------------------------------------------------------ proof */

/* Another byte in what b0 holds of 0x22. */
static void damage_oldest(struct dr_fs *fs, uint8_t is)
{
    size_t len, at = 0;
    struct dr_file *file = NULL;
    uint8_t *bytes = file_bytes(fs, "b0", &len), run[4096];
    memset(run, 0x22, sizeof(run));
    while (at + sizeof(run) <= len && memcmp(bytes + at, run, sizeof(run) - 1) != 0)
        at += 512;
    assert_true(at + sizeof(run) <= len);
    ok(dr_file_open(fs, "b0", DR_FILE_RDWR, &file, &err));
    ok(dr_file_pwrite(file, &is, at + sizeof(run) - 1, 1, &err));
    dr_file_unref(file);
    free(bytes);
}

/* When the set has marked b0, which then was right. */
static int damage_marked(void *user, const struct faultfs_io *io)
{
    struct dr_fs **fs = user;
    if (*fs && io->kind == FAULTFS_RENAME && strstr(io->to, set))
        damage_oldest(DR_STEAL(*fs), 0x23);
    return 0;
}

static bool listed_as_damaged(struct dr_fs *fs, const char *name)
{
    struct dr_backup_entry *list;
    size_t n;
    bool damaged = false;
    ok(dr_backup_list_fs(fs, set, &list, &n, &err));
    for (size_t i = 0; i < n; i++)
        damaged |= strcmp(list[i].name, name) == 0 && list[i].damaged;
    dr_backup_list_free(list, n);
    return damaged;
}

static void what_is_merged_is_verified_before_the_old_is_removed(void **state)
{
    (void)state;
    for (size_t k = 0; k < 2; k++) {
        const struct dr_backup_options others = {
            .set = set, .bitmap = "B", .format = k ? "add-cow" : "qcow2"};
        struct dr_backup_options first = others;
        struct dr_fs *memory = dr_fs_memory_new(), *planted = memory;
        struct faultfs *f = faultfs_new(memory);
        first.format = k ? "raw" : "qcow2";
        make_tracked(memory, 0);
        ok(dr_backup_fs(memory, "disk", NULL, "b0", &first, NULL, NULL, &err));
        put(memory, "disk", 8 * KiB, 4 * KiB, 0x33);
        ok(dr_backup_fs(memory, "disk", NULL, "b1", &others, NULL, NULL, &err));
        faultfs_observe(f, damage_marked, &planted);
        refused(prune_to(faultfs_fs(f), 1, &err), EBADMSG, "nothing is removed");
        assert_null(planted);
        assert_int_equal(listed_as_damaged(memory, "b1"), k == 1); /* it has a copy of the damage */
        assert_true(exists(memory, "b0") && exists(memory, "b1") && exists(memory, "b0.sums"));
        refused(prune_to(memory, 1, &err), EBADMSG, "nothing is"); /* damaged still */
        damage_oldest(memory, 0x22);
        if (k == 0) { /* else the kept one has a copy of the damage by now */
            ok(prune_to(memory, 1, &err));
            assert_false(exists(memory, "b0"));
            holds_the_disk(memory, "b1");
        }
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* With one kept: what is no good backup makes none dispensable. */
static void note_message(void *user, const char *text)
{
    snprintf(user, 200, "%s", text);
}

static void a_backup_that_is_damaged_or_gone_does_not_count(void **state)
{
    char text[200] = "";
    struct dr_job job = {.message = note_message, .user = text};
    const struct dr_prune_options one = {.keep = 1};
    struct dr_fs *fs = *state;
    const struct dr_backup_options o = {.set = set, .format = "raw"};
    const char other = 'x';
    struct dr_file *file = NULL;
    make_tracked(fs, 0);
    ok(dr_backup_fs(fs, "disk", NULL, "b0", &o, NULL, NULL, &err));
    ok(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err));
    ok(dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &err));
    ok(fs->ops->unlink(fs, "b2", &err));
    ok(dr_file_open(fs, "b1", DR_FILE_RDWR, &file, &err));
    ok(dr_file_pwrite(file, &other, 77, 1, &err));
    dr_file_unref(file);
    assert_true(dr_backup_verify_fs(fs, set, "b1", NULL, NULL, NULL, NULL) == -EBADMSG);
    ok(dr_backup_prune_fs(fs, set, &one, &job, &err));
    assert_non_null(strstr(text, "2 more backups are kept"));
    verified(fs, "b0");
    assert_int_equal(listed(fs), 3);
    text[0] = 0;
    ok(dr_backup_fs(fs, "disk", NULL, "b3", &o, NULL, NULL, &err));
    ok(dr_backup_prune_fs(fs, set, &one, &job, &err));
    assert_string_equal(text, "");
    assert_int_equal(listed(fs), 1);
    verified(fs, "b3");
}

/* b3 is an incremental one on b2, which is damaged or gone. */
static void one_that_stands_on_a_damaged_one_does_not_count(void **state)
{
    (void)state;
    for (int gone = 0; gone < 2; gone++) {
        struct dr_fs *fs = dr_fs_memory_new();
        const struct dr_backup_options full = {
            .set = set, .bitmap = "B", .format = "raw", .full = true};
        const struct dr_backup_options more = {.set = set, .bitmap = "B", .format = "add-cow"};
        struct dr_file *file = NULL;
        make_tracked(fs, 0);
        ok(dr_backup_fs(fs, "disk", NULL, "b0", &full, NULL, NULL, &err));
        ok(dr_backup_fs(fs, "disk", NULL, "b1", &more, NULL, NULL, &err));
        ok(dr_backup_fs(fs, "disk", NULL, "b2", &full, NULL, NULL, &err));
        ok(dr_backup_fs(fs, "disk", NULL, "b3", &more, NULL, NULL, &err));
        ok(dr_file_open(fs, "b2", DR_FILE_RDWR, &file, &err));
        ok(dr_file_pwrite(file, "x", 77, 1, &err));
        dr_file_unref(file);
        if (gone)
            ok(fs->ops->unlink(fs, "b2", &err));
        else
            assert_true(dr_backup_verify_fs(fs, set, "b2", NULL, NULL, NULL, NULL) == -EBADMSG);
        prune_to(fs, 1, NULL);
        verified(fs, "b1");
        dr_fs_memory_free(fs);
    }
}

/* Nothing works any more once the set has been written. */
static int ends_after_the_mark(void *user, const struct faultfs_io *io)
{
    bool *marked = user;
    if (*marked && io->kind != FAULTFS_SYNC_DIR)
        return -EIO;
    *marked |= io->kind == FAULTFS_RENAME && strstr(io->to, set);
    return 0;
}

struct other_prune {
    struct dr_fs *fs;
    unsigned opens; /* of the set: the fourth one is to mark backups in it */
};

/* Another prune, which keeps fewer, marks them first, and is killed. */
static int prunes_more(void *user, const struct faultfs_io *io)
{
    struct other_prune *o = user;
    bool marked = false;
    if (io->kind != FAULTFS_OPEN || !strstr(io->path, set) || ++o->opens != 4)
        return 0;
    struct faultfs *f = faultfs_new(o->fs);
    faultfs_observe(f, ends_after_the_mark, &marked);
    assert_true(prune_to(faultfs_fs(f), 1, NULL) < 0 && marked);
    faultfs_free(f);
    return 0;
}

static void prunes_at_once_do_not_merge_into_each_other(void **state)
{
    struct other_prune other = {.fs = *state};
    const struct dr_prune_options o = {.keep = 2, .no_verify = true};
    struct faultfs *f = faultfs_new(*state);
    make_tracked(*state, 0);
    back_up(*state, "b0");
    back_up(*state, "b1");
    back_up(*state, "b2");
    assert_int_equal(listed(*state), 3);
    faultfs_observe(f, prunes_more, &other);
    refused(dr_backup_prune_fs(faultfs_fs(f), set, &o, NULL, &err), ESTALE, "meanwhile");
    faultfs_observe(f, NULL, NULL);
    assert_int_equal(listed(*state), 1);
    assert_true(exists(*state, "b0") && exists(*state, "b1"));
    ok(prune_to(*state, 1, &err));
    holds_the_disk(*state, "b2");
    faultfs_free(f);
}

/* ------------------------------------------------------------------ interruptions */

static bool same_size_again(struct dr_fs *fs)
{
    return dr_backup_verify_fs(fs, set, "b4", NULL, NULL, NULL, NULL) == 0;
}

/* What the set names is good; so is it after the next prune, which leaves nothing of the others. */
static bool good_after(struct dr_fs *fs, unsigned keep, bool again, size_t files, const char **what,
                       struct dr_error *why)
{
    *what = "what is found";
    if (!good_set(fs, keep, why))
        return false;
    if (!again)
        return true;
    *what = "the next prune";
    if (prune_to(fs, keep, why) < 0)
        return false;
    *what = "what the next prune left";
    if (!good_set(fs, keep, why) || !same_size_again(fs))
        return false;
    if (listed(fs) == keep && count_files(fs) == files)
        return true;
    dr_fail(why, EEXIST, "%zu backups and %zu files, not %u and %zu", listed(fs), count_files(fs),
            keep, files);
    return false;
}

static bool cut_everywhere(const struct store *store, size_t skip, size_t *flushes, bool report)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    const unsigned keep = 2;
    bool good = true;
    make_series(fs, store);
    powerfs_settle(p);
    powerfs_skip_flush(p, skip);
    ok(prune_to(fs, keep, &err));
    *flushes = powerfs_flushes(p);
    size_t files = count_files(fs);
    for (size_t i = 0; good && i <= powerfs_ops(p); i = powerfs_next(p, i, 60))
        for (int mode = 0; mode < POWERFS_MODES && good; mode++) {
            struct dr_error why = DR_ERROR_INIT;
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
            const char *what;
            char text[128] = "the end";
            if (i < powerfs_ops(p))
                powerfs_op_text(p, i, text, sizeof(text));
            good = good_after(cut, keep, (i + (size_t)mode) % 3 == 0, files, &what, &why);
            if (report && !good)
                fail_msg("%s, cut before %zu %s, mode %d: %s: %s", store->others, i, text, mode,
                         what, why.text);
            dr_fs_memory_free(cut);
        }
    forget_series();
    powerfs_free(p);
    return good;
}

static void after_a_power_cut_each_kept_backup_is_there(void **state)
{
    size_t flushes;
    (void)state;
    for (size_t i = 0; i < N_STORES; i++) {
        assert_true(cut_everywhere(&stores[i], SIZE_MAX, &flushes, true));
        assert_true(flushes > 3);
    }
}

/* A planted fault: something goes before what stands for it is durable. */
static void a_missing_flush_is_caught(void **state)
{
    (void)state;
    ONLY_IN_A_PLAIN_BUILD();
    for (size_t i = 0; i < 2; i++) {
        size_t flushes = 1;
        bool caught = false;
        for (size_t skip = 0; skip < flushes && !caught; skip++)
            caught = !cut_everywhere(&stores[i], skip, &flushes, false);
        assert_true(caught);
    }
}

/* Whichever I/O fails, for once or for good: what the set names is good, and the next one ends. */
static void after_a_failure_the_next_prune_goes_on(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_STORES; k++)
        for (uint64_t nth = 0, fired = 1; fired; nth += SLOWER * (k < 1 ? 1u : 9u)) {
            struct dr_fs *memory = dr_fs_memory_new();
            struct faultfs *f = faultfs_new(memory);
            struct dr_fs *fs = faultfs_fs(f);
            struct dr_error why = DR_ERROR_INIT;
            const char *what;
            make_series(fs, &stores[k]);
            faultfs_arm(
                f, &(struct faultfs_plan){.nth = nth, .error = ENOSPC, .for_good = nth % 2 == 1});
            int r = prune_to(fs, 2, &why);
            fired = faultfs_fired(f);
            faultfs_disarm(f);
            if (r < 0 && why.errnum == 0)
                fail_msg("I/O %d: no text", (int)nth);
            if (!good_set(fs, 2, &why))
                fail_msg("%s, I/O %d: %s", stores[k].others, (int)nth, why.text);
            ok(prune_to(fs, 2, &err));
            size_t files = count_files(fs);
            if (!good_after(fs, 2, true, files, &what, &why))
                fail_msg("%s, I/O %d: %s: %s", stores[k].others, (int)nth, what, why.text);
            assert_false(exists(fs, "b0") || exists(fs, "b1") || exists(fs, "b2"));
            forget_series();
            faultfs_free(f);
            dr_fs_memory_free(memory);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_newest_backups_show_what_they_did),
        cmocka_unit_test(a_disk_that_ends_within_a_sector_is_pruned_too),
        ops_test(every_backup_may_be_followed_by_a_prune),
        ops_test(a_chain_that_nothing_needs_goes_as_a_whole),
        ops_test(each_disk_and_bitmap_has_its_own_series),
        cmocka_unit_test(a_dry_run_tells_and_changes_nothing),
        ops_test(nothing_changes_where_it_is_refused),
        ops_test(a_chain_that_is_not_the_sets_is_refused),
        ops_test(what_is_marked_is_no_backup),
        ops_test(a_backup_that_is_damaged_or_gone_does_not_count),
        ops_test(prunes_at_once_do_not_merge_into_each_other),
        cmocka_unit_test(what_is_merged_is_verified_before_the_old_is_removed),
        cmocka_unit_test(one_that_stands_on_a_damaged_one_does_not_count),
        cmocka_unit_test(after_a_power_cut_each_kept_backup_is_there),
        cmocka_unit_test(a_missing_flush_is_caught),
        cmocka_unit_test(after_a_failure_the_next_prune_goes_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
