/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Operations on a disk that other threads read and write: what they read is what was written, all
 * the time and afterwards, and the operation has done its work. */
#include "test-ops-crowd.h"

static const char *const formats[] = {"vmdk", "add-cow"};
#define N_FORMATS (sizeof(formats) / sizeof(formats[0]))

struct names {
    char base[40], mid[40], top[40], other[40];
};

static void make_on(struct dr_fs *fs, const char *path, const char *format, const char *backing)
{
    struct dr_create_options o = {.format = format,
                                  .size = backing ? 0 : CROWD_SIZE,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = backing ? format : NULL};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base <- mid <- top, and other, all with some data of their own. */
static struct names make_disks(struct dr_fs *fs, const char *format)
{
    struct names n;
    snprintf(n.base, sizeof(n.base), "base.%s", format);
    snprintf(n.mid, sizeof(n.mid), "mid.%s", format);
    snprintf(n.top, sizeof(n.top), "top.%s", format);
    snprintf(n.other, sizeof(n.other), "other.%s", format);
    make_on(fs, n.base, format, NULL);
    put(fs, n.base, 0, 2 * MiB, 0x11);
    make_on(fs, n.mid, format, n.base);
    put(fs, n.mid, 500 * KiB, 700 * KiB, 0x22);
    make_on(fs, n.top, format, n.mid);
    put(fs, n.top, 100 * KiB, 300 * KiB, 0x33);
    put(fs, n.top, 1 * MiB, 128 * KiB, 0);
    make_on(fs, n.other, format, NULL);
    put(fs, n.other, 64 * KiB, 2 * MiB, 0x44);
    put(fs, n.other, 700 * KiB, 300 * KiB, 0x11);
    return n;
}

/* ------------------------------------------------------------------ rebase, stream */

static void a_rebase_keeps_what_is_written_meanwhile(void **state)
{
    for (size_t f = 0; f < N_FORMATS; f++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct names n = make_disks(fs, formats[f]);
        struct crowd c;
        (void)state;
        crowd_begin(&c, fs, n.top);
        struct dr_rebase_options to = {.backing = n.other, .backing_format = formats[f]};
        ok(dr_disk_rebase(c.disk, &to, NULL, &err));
        assert_string_equal(dr_image_path(c.disk, 1), n.other);
        assert_int_equal(dr_chain_length(c.disk), 2);
        crowd_pass(&c, 5);
        to.backing = n.mid;
        to.drop_equal = true;
        ok(dr_disk_rebase(c.disk, &to, NULL, &err));
        assert_int_equal(dr_chain_length(c.disk), 3);
        crowd_end(&c, n.top);
        dr_fs_memory_free(fs);
    }
}

static void a_stream_keeps_what_is_written_meanwhile(void **state)
{
    for (size_t f = 0; f < N_FORMATS; f++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct names n = make_disks(fs, formats[f]);
        struct crowd c;
        (void)state;
        crowd_begin(&c, fs, n.top);
        struct dr_stream_options onto = {.base = n.base};
        ok(dr_disk_stream(c.disk, &onto, NULL, &err));
        assert_int_equal(dr_chain_length(c.disk), 2);
        assert_string_equal(dr_image_backing_name(c.disk, 0), n.base);
        crowd_pass(&c, 5);
        ok(dr_disk_stream(c.disk, NULL, NULL, &err));
        assert_int_equal(dr_chain_length(c.disk), 1);
        assert_null(dr_image_backing_name(c.disk, 0));
        /* nobody needs the parents any more */
        ok(fs->ops->unlink(fs, n.base, &err));
        crowd_end(&c, n.top);
        dr_fs_memory_free(fs);
    }
}

/* What such a disk discards is forgotten, not zero: the new parent must not show there. */
static void a_disk_without_a_parent_gets_one_while_it_is_used(void **state)
{
    for (size_t f = 0; f < N_FORMATS; f++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct names n = make_disks(fs, formats[f]);
        struct crowd c;
        (void)state;
        crowd_begin(&c, fs, n.base);
        struct dr_rebase_options to = {.backing = n.other, .backing_format = formats[f]};
        ok(dr_disk_rebase(c.disk, &to, NULL, &err));
        assert_int_equal(dr_chain_length(c.disk), 2);
        crowd_end(&c, n.base);
        dr_fs_memory_free(fs);
    }
}

static int stop_at_once(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)done;
    (void)total;
    return 1;
}

static void a_cancelled_stream_leaves_the_open_disk_on_its_parents(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    struct crowd c;
    struct dr_job job = {.progress = stop_at_once};
    crowd_begin(&c, fs, n.top);
    refused(dr_disk_stream(c.disk, NULL, &job, &err), ECANCELED, "stopped");
    assert_int_equal(dr_chain_length(c.disk), 3);
    crowd_pass(&c, 5);
    ok(dr_disk_stream(c.disk, NULL, NULL, &err)); /* the claim was given back */
    crowd_end(&c, n.top);
}

static void what_cannot_be_done_to_an_open_disk_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    struct dr_open_options o = {0};
    struct dr_disk *disk = NULL;
    struct dr_rebase_options to = {.backing = n.other};
    ok(dr_open_fs(fs, n.top, &o, &disk, &err));
    refused(dr_disk_rebase(disk, &to, NULL, &err), EROFS, "reading only");
    refused(dr_disk_stream(disk, NULL, NULL, &err), EROFS, "reading only");
    ok(dr_close(disk, &err));
    o.flags = DR_OPEN_RDWR | DR_OPEN_NO_BACKING;
    ok(dr_open_fs(fs, n.top, &o, &disk, &err));
    refused(dr_disk_stream(disk, NULL, NULL, &err), EINVAL, "without its backing file");
    ok(dr_disk_claim(disk, "another job", &err));
    refused(dr_disk_rebase(disk, &to, NULL, &err), EBUSY, "another job");
    dr_disk_unclaim(disk);
    ok(dr_close(disk, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_rebase_keeps_what_is_written_meanwhile),
        cmocka_unit_test(a_stream_keeps_what_is_written_meanwhile),
        cmocka_unit_test(a_disk_without_a_parent_gets_one_while_it_is_used),
        ops_test(a_cancelled_stream_leaves_the_open_disk_on_its_parents),
        ops_test(what_cannot_be_done_to_an_open_disk_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
