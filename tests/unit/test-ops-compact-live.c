/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A disk in use is compacted: its users' requests go on while its tables are checked, and those of
 * a VMDK also while they are looked at. Not so when tables move, and the file is cut. */
#include "test-ops.h"
#include "faultfs.h"

#define SIZE (UINT64_C(64) << 20)

/* While tables are read, write to the disk: from within the read, so what held requests up there
 * would never end. */
struct watch {
    struct dr_disk *disk;
    _Atomic uint64_t held, beside; /* bytes read while requests wait, and while they do not */
    _Atomic uint64_t writes;
};

static _Thread_local bool writing;

static int write_meanwhile(void *user, const struct faultfs_io *io)
{
    struct watch *w = user;
    if (io->kind != FAULTFS_READ || writing || !w->disk)
        return 0;
    if (atomic_load(&w->disk->closed)) {
        w->held += io->len;
        return 0;
    }
    w->beside += io->len;
    uint64_t n = w->writes++;
    if (n < 64) {
        uint8_t buf[512];
        memset(buf, 'w', sizeof(buf));
        writing = true;
        ok(dr_pwrite(w->disk, buf, SIZE / 2 + n * 64 * KiB, sizeof(buf), 0, &err));
        ok(n % 4 ? 0 : dr_flush(w->disk, &err));
        writing = false;
    }
    return 0;
}

static void make_disk(struct dr_fs *fs, const char *format, const char *name, const char *value)
{
    const struct dr_pair pair = {name, value};
    const struct dr_create_options o = {
        .format = format, .size = SIZE, .has_size = true, .pairs = &pair, .n_pairs = 1};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(SIZE / 2);
    memset(buf, 'd', SIZE / 2);
    ok(dr_create_fs(fs, "disk", &o, &err));
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_pwrite(disk, buf, 0, SIZE / 2, 0, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

static void requests_go_on_while_an_open_disk_is_checked(void **state)
{
    static const char *const disks[][3] = {{"vmdk", "subformat", "monolithicSparse"},
                                           {"vmdk", "subformat", "vmfsSparse"},
                                           {"qcow2", "cluster_size", "4k"}};
    const struct dr_compact_options o = {.no_zeros = true};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(fs);
        struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
        struct watch w = {0};
        struct dr_disk *disk = NULL;
        char *json = NULL;
        make_disk(fs, disks[i][0], disks[i][1], disks[i][2]);
        faultfs_observe(f, write_meanwhile, &w);
        ok(dr_open_fs(faultfs_fs(f), "disk", &rw, &disk, &err));
        ok(dr_pwrite(disk, "begun", 0, 5, 0, &err));
        w.disk = disk;
        ok(dr_disk_compact(disk, &o, NULL, NULL, &err));
        w.disk = NULL;
        uint64_t most = strcmp(disks[i][0], "vmdk") == 0 ? w.beside / 2 : w.beside;
        if (w.writes < 2 || w.held > most)
            fail_msg("%s: %d writes; %llu bytes read beside requests, %llu while they waited",
                     disks[i][2], (int)w.writes, (unsigned long long)w.beside,
                     (unsigned long long)w.held);
        ok(dr_close(disk, &err));
        ok(dr_check_fs(fs, "disk", NULL, DR_REPAIR_NONE, NULL, NULL, &json, &err));
        assert_null(strstr(json, "\"corruptions\""));
        free(json);
        faultfs_free(f);
        dr_fs_memory_free(fs);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_go_on_while_an_open_disk_is_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
