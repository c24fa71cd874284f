/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The parents below the active image of an open disk change, while other threads read and write the
 * disk: what they read is what was written, all the time and afterwards, and after a cut anywhere
 * the disk reads as before. */
#include "test-ops-crowd.h"
#include "test-ops-power.h"

struct rig {
    struct dr_fs *fs;
    const char *format;
    struct crowd c;
};

static void make_on(struct dr_fs *fs, const char *path, const char *format, const char *backing,
                    uint64_t size)
{
    struct dr_create_options o = {.format = format,
                                  .size = backing ? 0 : size,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = backing ? format : NULL};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base ← low ← mid ← top, and other, all with some data of their own. */
static void make_disks(struct dr_fs *fs, const char *format, uint64_t size)
{
    static const char *const names[] = {"base", "low", "mid", "top"};
    for (unsigned i = 0; i < 4; i++) {
        make_on(fs, names[i], format, i ? names[i - 1] : NULL, size);
        put(fs, names[i], i * size / 8, size / 4, 0x11 * ((int)i + 1));
        if (i == 2)
            put(fs, names[i], size / 8 * 7, size / 16, 0);
    }
    make_on(fs, "other", format, NULL, size);
    put(fs, "other", size / 8, size / 2, 0x77);
    put(fs, "other", size / 8 * 7, size / 8, 0x88);
}

static int set_up(void **state)
{
    static struct rig g;
    g = (struct rig){.fs = dr_fs_memory_new(), .format = *state};
    make_disks(g.fs, g.format, CROWD_SIZE);
    *state = &g;
    return 0;
}

static int take_down(void **state)
{
    struct rig *g = *state;
    dr_fs_memory_free(g->fs);
    return 0;
}

#define WITH(form, test)                                                      \
    {                                                                         \
        .name = #test " (" form ")", .test_func = test, .setup_func = set_up, \
        .teardown_func = take_down, .initial_state = form                     \
    }
#define FOR_EACH_FORMAT(test) WITH("vmdk", test), WITH("qcow2", test), WITH("add-cow", test)

/* The disk's chain is these images, and only the top one may be written to. */
static void chain_is(struct dr_disk *disk, const char *const *names, size_t n)
{
    assert_int_equal(dr_chain_length(disk), n);
    for (size_t i = 0; i < n; i++)
        assert_string_equal(dr_image_path(disk, i), names[i]);
    struct dr_chain *chain = dr_disk_chain(disk);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(chain->images[i]->writable, i == 0);
    dr_chain_unref(chain, NULL);
}
#define CHAIN_IS(disk, ...)                            \
    chain_is(disk, (const char *const[]){__VA_ARGS__}, \
             sizeof((const char *const[]){__VA_ARGS__}) / sizeof(const char *))

static void a_lower_image_gets_another_parent_in_use(void **state)
{
    struct rig *g = *state;
    crowd_begin(&g->c, g->fs, "top");
    struct dr_rebase_options to = {.image = "mid", .backing = "other", .backing_format = g->format};
    uint64_t size;
    uint8_t *low = view(g->fs, "low", &size);
    ok(dr_disk_rebase(g->c.disk, &to, NULL, &err));
    CHAIN_IS(g->c.disk, "top", "mid", "other");
    crowd_pass(&g->c, 5);
    to.backing = "low";
    to.drop_equal = true;
    ok(dr_disk_rebase(g->c.disk, &to, NULL, &err));
    CHAIN_IS(g->c.disk, "top", "mid", "low", "base");
    same_view(g->fs, "low", low, size);
    free(low);
    crowd_end(&g->c, "top");
}

static void a_lower_image_reads_the_same_afterwards(void **state)
{
    struct rig *g = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_rebase_options to = {
        .image = "mid", .backing = "other", .backing_format = g->format, .drop_equal = true};
    struct dr_disk *disk;
    uint64_t size;
    uint8_t *mid = view(g->fs, "mid", &size), *top = view(g->fs, "top", &size);
    ok(dr_open_fs(g->fs, "top", &rw, &disk, &err));
    ok(dr_disk_rebase(disk, &to, NULL, &err));
    ok(dr_close(disk, &err));
    same_view(g->fs, "mid", mid, size);
    same_view(g->fs, "top", top, size);
    free(mid);
    free(top);
}

static void a_lower_image_takes_in_those_below_it(void **state)
{
    struct rig *g = *state;
    crowd_begin(&g->c, g->fs, "top");
    ok(dr_disk_stream(g->c.disk, &(struct dr_stream_options){.image = "mid", .base = "base"}, NULL,
                      &err));
    CHAIN_IS(g->c.disk, "top", "mid", "base");
    crowd_pass(&g->c, 5);
    ok(dr_disk_stream(g->c.disk, &(struct dr_stream_options){.image = "mid"}, NULL, &err));
    CHAIN_IS(g->c.disk, "top", "mid");
    ok(g->fs->ops->unlink(g->fs, "base", &err)); /* nobody needs it any more */
    crowd_end(&g->c, "top");
}

static int stop_at_once(void *user, uint64_t done, uint64_t total)
{
    (void)user, (void)done, (void)total;
    return 1;
}

static void a_cancelled_rebase_of_a_lower_image_leaves_the_chain(void **state)
{
    struct rig *g = *state;
    const struct dr_job_options stopping = {.progress = stop_at_once};
    struct dr_job *job;
    crowd_begin(&g->c, g->fs, "top");
    struct dr_rebase_options to = {.image = "mid", .backing = "other", .backing_format = g->format};
    ok(dr_job_new(NULL, &stopping, &job, &err));
    refused(dr_disk_rebase(g->c.disk, &to, job, &err), ECANCELED, "");
    dr_job_free(job);
    CHAIN_IS(g->c.disk, "top", "mid", "low", "base");
    ok(dr_disk_rebase(g->c.disk, &to, NULL, &err)); /* it goes on from there */
    CHAIN_IS(g->c.disk, "top", "mid", "other");
    crowd_end(&g->c, "top");
}

static void what_a_lower_image_cannot_be_put_on_is_refused(void **state)
{
    struct rig *g = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    static const struct {
        const char *image, *backing;
        int error;
        const char *text;
    } cases[] = {
        {"mid", "top", ELOOP, "loop"},
        {"mid", "mid", ELOOP, "its own backing file"},
        {"other", "base", EINVAL, "'other' is not an image of its chain"},
        {"base", "other", EBUSY, "base"},
    };
    struct dr_disk *disk, *second;
    ok(dr_open_fs(g->fs, "top", &rw, &disk, &err));
    ok(dr_open_fs(g->fs, "base", NULL, &second, &err)); /* somebody else reads it */
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_rebase_options to = {
            .image = cases[i].image, .backing = cases[i].backing, .backing_format = g->format};
        refused(dr_disk_rebase(disk, &to, NULL, &err), cases[i].error, cases[i].text);
        CHAIN_IS(disk, "top", "mid", "low", "base");
    }
    refused(dr_disk_stream(disk, &(struct dr_stream_options){.image = "low", .base = "mid"}, NULL,
                           &err),
            EINVAL, "mid is not one of its backing files");
    ok(dr_close(second, &err));
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ cut off */

static int on_open_disk(struct dr_fs *fs, int (*run)(struct dr_disk *disk, struct dr_error *err),
                        struct dr_error *err)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top", &rw, &disk, err);
    if (r < 0)
        return r;
    r = run(disk, err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int rebase_disk(struct dr_disk *disk, struct dr_error *err)
{
    const struct dr_rebase_options o = {.image = "mid",
                                        .backing = "other",
                                        .backing_format = dr_image_format(disk, 1),
                                        .drop_equal = true};
    return dr_disk_rebase(disk, &o, NULL, err);
}

static int rebase(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, rebase_disk, err);
}

static int stream_disk(struct dr_disk *disk, struct dr_error *err)
{
    return dr_disk_stream(disk, &(struct dr_stream_options){.image = "mid"}, NULL, err);
}

static int stream(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, stream_disk, err);
}

static void vmdks(struct dr_fs *fs)
{
    make_disks(fs, "vmdk", SIZE);
}

static void qcow2s(struct dr_fs *fs)
{
    make_disks(fs, "qcow2", SIZE);
}

static void addcows(struct dr_fs *fs)
{
    make_disks(fs, "add-cow", SIZE);
}

static const struct operation operations[] = {
    {"rebase of mid, vmdk", "top", rebase, vmdks, NULL},
    {"rebase of mid, qcow2", "top", rebase, qcow2s, NULL},
    {"rebase of mid, add-cow", "top", rebase, addcows, NULL},
    {"stream into mid, vmdk", "top", stream, vmdks, NULL},
    {"stream into mid, qcow2", "top", stream, qcow2s, NULL},
    {"stream into mid, add-cow", "top", stream, addcows, NULL},
};
#define N_OPERATIONS (sizeof(operations) / sizeof(operations[0]))

static void no_cut_changes_the_view(void **state)
{
    (void)state;
    cut_each(operations, N_OPERATIONS);
}

static void missing_flush_is_caught(void **state)
{
    (void)state;
    for (size_t k = 0; k < 3; k++)
        miss_a_flush(&operations[k]);
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    kill_and_cut_each(operations, 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        FOR_EACH_FORMAT(a_lower_image_gets_another_parent_in_use),
        FOR_EACH_FORMAT(a_lower_image_reads_the_same_afterwards),
        FOR_EACH_FORMAT(a_lower_image_takes_in_those_below_it),
        FOR_EACH_FORMAT(a_cancelled_rebase_of_a_lower_image_leaves_the_chain),
        FOR_EACH_FORMAT(what_a_lower_image_cannot_be_put_on_is_refused),
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
