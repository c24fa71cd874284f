/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What differs between real file systems and devices: reflinks, zeroing, holes, running full. Each
 * is made in a file, mounted in a mount namespace of this test, and gone with it. Without the
 * rights or the tools for that the tests are skipped. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/error.h"
#include "storage/storage.h"
#include "place.h"

#define MIB (1u << 20)

struct volume {
    const char *kind;
    const char *make; /* command; %s = the file that is to hold it; NULL = mounted without one */
    const char *options;
    bool reflinks;
};

static const struct volume volumes[] = {
    {"ext4", "mkfs.ext4 -q -F %s >/dev/null 2>&1", "loop", false},
    {"xfs", "mkfs.xfs -q -f %s >/dev/null 2>&1", "loop", true},
    {"btrfs", "mkfs.btrfs -q -f %s >/dev/null 2>&1", "loop", true},
    {"tmpfs", NULL, "size=8M", false},
};

static char top[] = "/tmp/drover-volumes-XXXXXX";
static char dir[64], image[64], a_path[96], b_path[96], node[96];
static char device[64];

__attribute__((format(printf, 1, 2))) static bool run(const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    return system(line) == 0;
}

static bool make_image(void)
{
    int fd = open(image, O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600);
    bool ok = fd >= 0 && ftruncate(fd, 400l * MIB) == 0;
    if (fd >= 0)
        close(fd);
    return ok;
}

static void mount_volume(const struct volume *v)
{
    char line[256];
    bool ok = true;
    if (v->make) {
        snprintf(line, sizeof(line), v->make, image);
        ok = make_image() && run("%s", line);
    }
    if (!ok || !run("mount -t %s -o %s %s %s 2>/dev/null", v->kind, v->options,
                    v->make ? image : "none", dir)) {
        print_message("cannot make and mount %s\n", v->kind);
        skip();
    }
}

static int unmount(void **state)
{
    (void)state;
    run("mountpoint -q %s && umount %s", dir, dir);
    return 0;
}

static void fill(struct dr_file *f, uint64_t off, size_t len, int value)
{
    uint8_t *buf = malloc(len);
    memset(buf, value, len);
    assert_ok(dr_file_pwrite(f, buf, off, len, &err));
    free(buf);
}

static void assert_bytes(struct dr_file *f, uint64_t off, size_t len, int value)
{
    uint8_t *buf = malloc(len);
    assert_ok(dr_file_pread(f, buf, off, len, &err));
    for (size_t i = 0; i < len; i++)
        if (buf[i] != value)
            fail_msg("byte %zu is 0x%02x, not 0x%02x", (size_t)off + i, buf[i], value);
    free(buf);
}

static uint64_t bytes_taken(const char *path)
{
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

/* ------------------------------------------------------------------ reflinks */

static bool is_shared(const char *path)
{
    union {
        struct fiemap map;
        char room[sizeof(struct fiemap) + sizeof(struct fiemap_extent)];
    } u = {.map = {.fm_length = 4096, .fm_flags = FIEMAP_FLAG_SYNC, .fm_extent_count = 1}};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    assert_int_equal(ioctl(fd, FS_IOC_FIEMAP, &u.map), 0);
    close(fd);
    assert_int_equal(u.map.fm_mapped_extents, 1);
    return u.map.fm_extents[0].fe_flags & FIEMAP_EXTENT_SHARED;
}

static void copy_all(struct dr_file *dst, uint64_t dst_off, struct dr_file *src, uint64_t src_off,
                     uint64_t len)
{
    while (len) {
        uint64_t n;
        assert_ok(dr_file_copy(dst, dst_off, src, src_off, len, &n, &err));
        assert_true(n > 0 && n <= len);
        dst_off += n;
        src_off += n;
        len -= n;
    }
}

static void check_copy(const struct volume *v)
{
    mount_volume(v);
    struct dr_file *a = open_on(dr_fs_posix(), a_path, DR_FILE_CREATE),
                   *b = open_on(dr_fs_posix(), b_path, DR_FILE_CREATE);
    fill(a, 0, MIB, 1);
    fill(a, MIB, MIB + 77, 2);
    copy_all(b, 0, a, 0, 2 * MIB + 77);
    assert_bytes(b, 0, MIB, 1);
    assert_bytes(b, MIB, MIB + 77, 2);
    assert_int_equal(dr_file_size(b), 2 * MIB + 77);
    /* At odd places bytes are copied, not shared. */
    copy_all(b, 100, a, MIB + 33, 5000);
    assert_bytes(b, 99, 1, 1);
    assert_bytes(b, 100, 5000, 2);
    assert_bytes(b, 5100, 1, 1);
    copy_all(b, 4 * MIB, a, 0, MIB);
    assert_bytes(b, 2 * MIB + 77, 2 * MIB - 77, 0);
    assert_bytes(b, 4 * MIB, MIB, 1);
    dr_file_unref(b);
    b = open_on(dr_fs_posix(), b_path, DR_FILE_RDWR | DR_FILE_TRUNCATE);
    uint64_t n;
    assert_ok(dr_file_copy(b, 0, a, 0, MIB, &n, &err));
    if (v->reflinks) {
        assert_int_equal(n, MIB);
        assert_true(is_shared(b_path));
        fill(b, 0, 4096, 3);
        assert_bytes(a, 0, 4096, 1);
    }
    dr_file_unref(a);
    dr_file_unref(b);
}

/* ------------------------------------------------------------------ zeros and holes */

static uint64_t holes_in(struct dr_file *f)
{
    uint64_t sum = 0, run_;
    enum dr_file_extent kind;
    for (uint64_t off = 0; off < dr_file_size(f); off += run_) {
        assert_ok(dr_file_extent(f, off, dr_file_size(f) - off, &kind, &run_, &err));
        assert_true(run_ > 0);
        if (kind == DR_FILE_HOLE)
            sum += run_;
    }
    return sum;
}

static void check_zero(const struct volume *v)
{
    mount_volume(v);
    struct dr_file *f = open_on(dr_fs_posix(), a_path, DR_FILE_CREATE);
    fill(f, 0, 4 * MIB, 1);
    assert_ok(dr_file_flush(f, &err));
    assert_ok(dr_file_zero(f, MIB + 5, MIB, 0, &err));
    assert_bytes(f, MIB - 10, 15, 1);
    assert_bytes(f, MIB + 5, MIB, 0);
    assert_bytes(f, 2 * MIB + 5, 10, 1);
    assert_ok(dr_file_flush(f, &err));
    assert_true(bytes_taken(a_path) >= 4 * MIB); /* the space is kept */
    assert_ok(dr_file_zero(f, MIB + 5, MIB, DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, &err));
    assert_bytes(f, MIB - 10, 15, 1);
    assert_bytes(f, MIB + 5, MIB, 0);
    assert_bytes(f, 2 * MIB + 5, 10, 1);
    assert_ok(dr_file_flush(f, &err));
    assert_true(bytes_taken(a_path) < 3 * MIB + 65536);
    assert_in_range(holes_in(f), MIB - 65536, MIB);
    assert_ok(dr_file_zero(f, 100 * (uint64_t)MIB, MIB, DR_FILE_ZERO_PUNCH, &err));
    assert_int_equal(dr_file_size(f), 101 * MIB);
    assert_true(bytes_taken(a_path) < 4 * MIB);
    dr_file_unref(f);
}

static void run_full(const struct volume *v)
{
    mount_volume(v);
    struct dr_file *f = open_on(dr_fs_posix(), a_path, DR_FILE_CREATE);
    struct dr_error why = DR_ERROR_INIT;
    uint8_t *buf = malloc(MIB);
    uint64_t space, written = 0;
    memset(buf, 7, MIB);
    uint64_t by_link;
    char link[120];
    snprintf(link, sizeof(link), "%s.link", dir); /* on another file system */
    assert_ok(dr_fs_posix()->ops->free_space(dr_fs_posix(), a_path, &space, &err));
    assert_int_equal(symlink(a_path, link), 0);
    int by = dr_fs_posix()->ops->free_space(dr_fs_posix(), link, &by_link, NULL);
    assert_int_equal(unlink(link), 0);
    assert_int_equal(by, 0);
    assert_int_equal(by_link, space);
    int r;
    while ((r = dr_file_pwrite(f, buf, written, MIB, &why)) == 0) {
        written += MIB;
        assert_true(written <= 400 * (uint64_t)MIB);
    }
    assert_int_equal(r, -ENOSPC);
    assert_non_null(strstr(why.text, "No space left on device"));
    assert_non_null(strstr(why.text, a_path));
    assert_true(written <= space);
    assert_in_range(dr_file_size(f), written, written + MIB);
    assert_bytes(f, 0, MIB, 7);
    uint64_t size = dr_file_size(f);
    assert_ok(dr_file_refresh_size(f, &err));
    assert_int_equal(dr_file_size(f), size);
    assert_ok(dr_file_flush(f, &err)); /* a failed write is no failed flush */
    dr_file_unref(f);
    free(buf);
}

#define FOR_EACH_VOLUME(test, check)   \
    static void test##_ext4(void **s)  \
    {                                  \
        (void)s;                       \
        check(&volumes[0]);            \
    }                                  \
    static void test##_xfs(void **s)   \
    {                                  \
        (void)s;                       \
        check(&volumes[1]);            \
    }                                  \
    static void test##_btrfs(void **s) \
    {                                  \
        (void)s;                       \
        check(&volumes[2]);            \
    }                                  \
    static void test##_tmpfs(void **s) \
    {                                  \
        (void)s;                       \
        check(&volumes[3]);            \
    }

FOR_EACH_VOLUME(copies_inside_the_kernel_on, check_copy)
FOR_EACH_VOLUME(zeroes_and_gives_space_back_on, check_zero)

static void a_full_volume_fails_the_write_only(void **state)
{
    (void)state;
    run_full(&volumes[3]);
}

/* ------------------------------------------------------------------ block devices */

static int detach(void **state)
{
    (void)state;
    if (device[0])
        run("losetup -d %s", device);
    device[0] = '\0';
    unlink(node);
    return 0;
}

static void attach(void)
{
    char line[128];
    snprintf(line, sizeof(line), "losetup -f --show %s 2>/dev/null", image);
    FILE *p = make_image() ? popen(line, "r") : NULL;
    if (p && fgets(device, sizeof(device), p))
        device[strcspn(device, "\n")] = '\0';
    if (p)
        pclose(p);
    if (!device[0]) {
        print_message("cannot make a loop device\n");
        skip();
    }
}

static void a_block_device_is_a_file_of_fixed_size(void **state)
{
    (void)state;
    attach();
    struct dr_file *f = open_on(dr_fs_posix(), device, DR_FILE_CREATE | DR_FILE_TRUNCATE);
    enum dr_file_extent kind;
    uint64_t run_;
    assert_true(f->block_device);
    assert_int_equal(dr_file_size(f), 400 * MIB);
    fill(f, 0, 4 * MIB, 5);
    assert_ok(dr_file_extent(f, 0, 400 * (uint64_t)MIB, &kind, &run_, &err));
    assert_int_equal(kind, DR_FILE_DATA);
    assert_ok(dr_file_flush(f, &err));
    assert_ok(dr_file_truncate(f, 400 * (uint64_t)MIB, &err));
    assert_int_equal(dr_file_truncate(f, MIB, NULL), -ENOTSUP);
    assert_int_equal(dr_file_pwrite(f, "xy", 400 * (uint64_t)MIB - 1, 2, NULL), -ENOSPC);
    assert_int_equal(dr_file_size(f), 400 * MIB);
    dr_file_unref(f);
}

static void a_block_device_is_zeroed_to_the_byte(void **state)
{
    (void)state;
    attach();
    struct dr_file *f = open_on(dr_fs_posix(), device, DR_FILE_RDWR);
    for (unsigned flags = 0; flags <= DR_FILE_ZERO_PUNCH; flags++) {
        fill(f, 0, 4 * MIB, 5);
        assert_ok(dr_file_zero(f, 1001, 2 * MIB, flags, &err));
        assert_bytes(f, 0, 1001, 5);
        assert_bytes(f, 1001, 2 * MIB, 0);
        assert_bytes(f, 1001 + 2 * MIB, MIB, 5);
        assert_ok(dr_file_zero(f, 3 * MIB + 10, 20, flags, &err));
        assert_bytes(f, 3 * MIB, 10, 5);
        assert_bytes(f, 3 * MIB + 10, 20, 0);
        assert_bytes(f, 3 * MIB + 30, 1000, 5);
    }
    dr_file_unref(f);
}

static void two_nodes_of_a_device_are_one_file(void **state)
{
    (void)state;
    attach();
    struct stat st;
    struct dr_file *f = open_on(dr_fs_posix(), device, 0), *g;
    assert_int_equal(stat(device, &st), 0);
    if (mknod(node, S_IFBLK | 0600, st.st_rdev) || (g = NULL, open(node, O_RDONLY) < 0)) {
        dr_file_unref(f);
        skip();
    }
    assert_int_equal(dr_file_open(dr_fs_posix(), node, 0, &g, NULL), 0);
    assert_ptr_equal(f, g);
    assert_int_equal(dr_file_open(dr_fs_posix(), node, DR_FILE_RDWR, &g, NULL), -EBUSY);
    dr_file_unref(f);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ */

static int enter(void **state)
{
    (void)state;
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
        return 77;
    if (!mkdtemp(top))
        return -1;
    snprintf(dir, sizeof(dir), "%s/mnt", top);
    snprintf(image, sizeof(image), "%s/image", top);
    snprintf(node, sizeof(node), "%s/node", top);
    snprintf(a_path, sizeof(a_path), "%s/a", dir);
    snprintf(b_path, sizeof(b_path), "%s/b", dir);
    return mkdir(dir, 0700);
}

static int leave(void **state)
{
    (void)state;
    return run("rm -rf %s", top) ? 0 : -1;
}

int main(void)
{
#define V(test)                                           \
    cmocka_unit_test_teardown(test##_ext4, unmount),      \
        cmocka_unit_test_teardown(test##_xfs, unmount),   \
        cmocka_unit_test_teardown(test##_btrfs, unmount), \
        cmocka_unit_test_teardown(test##_tmpfs, unmount)
    const struct CMUnitTest tests[] = {
        V(copies_inside_the_kernel_on),
        V(zeroes_and_gives_space_back_on),
        cmocka_unit_test_teardown(a_full_volume_fails_the_write_only, unmount),
        cmocka_unit_test_teardown(a_block_device_is_a_file_of_fixed_size, detach),
        cmocka_unit_test_teardown(a_block_device_is_zeroed_to_the_byte, detach),
        cmocka_unit_test_teardown(two_nodes_of_a_device_are_one_file, detach),
    };
    int r = enter(NULL);
    if (r == 77)
        puts("skipped: no right to mount");
    if (r)
        return r;
    r = cmocka_run_group_tests(tests, NULL, NULL);
    return leave(NULL) ? 1 : r;
}
