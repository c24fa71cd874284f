/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills while an open disk goes over to another image. */
#include "test-ops-power.h"

static int on_open_disk(struct dr_fs *fs, int (*run)(struct dr_disk *disk, struct dr_error *err),
                        struct dr_error *err)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top", &rw, &disk, err);
    if (r < 0)
        return r;
    r = dr_chain_length(disk) > 1 ? run(disk, err) : 0;
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int pivot_disk(struct dr_disk *disk, struct dr_error *err)
{
    const struct dr_commit_options o = {.pivot = true};
    return dr_disk_commit(disk, &o, NULL, err);
}

static int pivot(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, pivot_disk, err);
}

static int mirror_disk(struct dr_disk *disk, struct dr_error *err)
{
    return dr_disk_mirror(disk, "moved", NULL, NULL, err);
}

/* The target has its name only when it is whole. */
static int mirror(struct dr_fs *fs, struct dr_error *err)
{
    return exists(fs, "moved") ? 0 : on_open_disk(fs, mirror_disk, err);
}

/* The guest, while the job is ready: it writes again what is there, so that the disk reads as
 * before, and flushes in between. Its writes block. What fails, the power cut decides about. */
struct guest {
    struct dr_disk *disk;
    struct dr_job *job;
};

static void write_the_same(void *user)
{
    struct guest *g = user;
    static const uint64_t places[] = {16 * KiB, 66 * KiB, 200 * KiB, 650 * KiB};
    uint8_t buf[4096];
    for (unsigned i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        if (dr_pread(g->disk, buf, places[i], sizeof(buf), NULL) == 0)
            dr_pwrite(g->disk, buf, places[i], sizeof(buf), 0, NULL);
        if (i == 1)
            dr_flush(g->disk, NULL);
    }
    dr_zero(g->disk, 208 * KiB, 16 * KiB, DR_MAY_UNMAP, NULL);
    dr_job_complete(g->job, true);
}

static int blocking_disk(struct dr_disk *disk, bool mirror, struct dr_error *err)
{
    const struct dr_commit_options commit = {.pivot = true, .write_blocking = true};
    const struct dr_mirror_options move = {.write_blocking = true};
    struct guest g = {.disk = disk};
    const struct dr_job_options o = {.ready = write_the_same, .workers = 1, .user = &g};
    int r = dr_job_new(NULL, &o, &g.job, err);
    if (r == 0)
        r = mirror ? dr_disk_mirror(disk, "moved", &move, g.job, err)
                   : dr_disk_commit(disk, &commit, g.job, err);
    dr_job_free(g.job);
    return r;
}

static int blocking_pivot_disk(struct dr_disk *disk, struct dr_error *err)
{
    return blocking_disk(disk, false, err);
}

static int blocking_mirror_disk(struct dr_disk *disk, struct dr_error *err)
{
    return blocking_disk(disk, true, err);
}

static int blocking_pivot(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, blocking_pivot_disk, err);
}

static int blocking_mirror(struct dr_fs *fs, struct dr_error *err)
{
    return exists(fs, "moved") ? 0 : on_open_disk(fs, blocking_mirror_disk, err);
}

static void family(struct dr_fs *fs, const char *top, const char *base)
{
    struct dr_create_options b = {.format = base, .size = SIZE, .has_size = true};
    struct dr_create_options t = {.format = top, .backing = "base", .backing_format = base};
    ok(dr_create_fs(fs, "base", &b, &err));
    put(fs, "base", 0, 256 * KiB, 0x11);
    ok(dr_create_fs(fs, "top", &t, &err));
    put(fs, "top", 64 * KiB, 4 * KiB, 0x33);
    put(fs, "top", 192 * KiB, 64 * KiB, 0);
    put(fs, "top", 640 * KiB, 64 * KiB, 0x44);
}

static void vmdks(struct dr_fs *fs)
{
    family(fs, "vmdk", "vmdk");
}

static void qcow2s(struct dr_fs *fs)
{
    family(fs, "qcow2", "qcow2");
}

static void addcow(struct dr_fs *fs)
{
    family(fs, "add-cow", "raw");
}

static const struct operation operations[] = {
    {"pivot, vmdk", "top", pivot, vmdks, NULL},
    {"pivot, qcow2", "top", pivot, qcow2s, NULL},
    {"pivot, add-cow", "top", pivot, addcow, NULL},
    {"mirror, vmdk", "top", mirror, vmdks, NULL},
    {"mirror, qcow2", "top", mirror, qcow2s, NULL},
    {"mirror, add-cow", "top", mirror, addcow, NULL},
    {"pivot, blocking, qcow2", "top", blocking_pivot, qcow2s, NULL},
    {"mirror, blocking, qcow2", "top", blocking_mirror, qcow2s, NULL},
    {"mirror, blocking, vmdk", "top", blocking_mirror, vmdks, NULL},
    {"pivot, blocking, vmdk", "top", blocking_pivot, vmdks, NULL},
    {"pivot, blocking, add-cow", "top", blocking_pivot, addcow, NULL},
};

#define N_OPERATIONS (sizeof(operations) / sizeof(operations[0]))
#define N_KILLED     7 /* the first ones; more of the same takes long */

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
    kill_and_cut_each(operations, N_KILLED);
}

/* Whoever finds the name of a mirror finds all of the disk behind it. */
static void a_target_with_its_name_is_whole(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_OPERATIONS; k++) {
        if (strncmp(operations[k].name, "mirror", 6) != 0)
            continue;
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        uint64_t size;
        unsigned there = 0;
        operations[k].family(fs);
        uint8_t *want = view(fs, "top", &size);
        powerfs_settle(p);
        ok(operations[k].run(fs, &err));
        for (size_t i = 0; i <= powerfs_ops(p); i++)
            for (int mode = 0; mode < POWERFS_RANDOM; mode++) {
                struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
                there += exists(cut, "moved");
                if (exists(cut, "moved"))
                    same_view(cut, "moved", want, size);
                dr_fs_memory_free(cut);
            }
        assert_true(there > 0);
        free(want);
        powerfs_free(p);
    }
}

/* What the guest has flushed after the switch is found by the overlay's name, too. */
static void writes_after_a_pivot_last_under_both_names(void **state)
{
    static const char text[] = "written after the pivot";
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    for (size_t k = 0; k < 3; k++) {
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        struct dr_disk *disk;
        uint64_t size;
        operations[k].family(fs);
        powerfs_settle(p);
        ok(dr_open_fs(fs, "top", &rw, &disk, &err));
        ok(pivot_disk(disk, &err));
        ok(dr_pwrite(disk, text, 300 * KiB, sizeof(text), 0, &err));
        ok(dr_pwrite(disk, text, 64 * KiB, sizeof(text), 0, &err));
        ok(dr_flush(disk, &err));
        size_t acknowledged = powerfs_ops(p);
        ok(dr_close(disk, &err));
        for (size_t i = acknowledged; i <= powerfs_ops(p); i++)
            for (int mode = 0; mode < POWERFS_RANDOM; mode++) {
                struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
                uint8_t *by_top = view(cut, "top", &size), *by_base = view(cut, "base", &size);
                assert_memory_equal(by_top + 300 * KiB, text, sizeof(text));
                assert_memory_equal(by_top + 64 * KiB, text, sizeof(text));
                assert_memory_equal(by_top, by_base, size);
                free(by_top);
                free(by_base);
                dr_fs_memory_free(cut);
            }
        powerfs_free(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
        cmocka_unit_test(a_target_with_its_name_is_whole),
        cmocka_unit_test(writes_after_a_pivot_last_under_both_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
