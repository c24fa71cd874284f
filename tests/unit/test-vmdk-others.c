/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* VMDKs of other programs: the sample files that DROVER_SAMPLES points to, and qemu-img's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/core.h"

#define MIB (UINT64_C(1) << 20)

static struct dr_error err;
static char dir[] = "/tmp/drover-vmdk-XXXXXX";
static const char *samples;
static bool have_qemu;

static void ok(int r)
{
    if (r < 0)
        fail_msg("%d %s", r, err.text);
}

/* A shell command in the test's directory succeeds. */
static void run(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void run(const char *format, ...)
{
    char text[1024], command[1200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    snprintf(command, sizeof(command), "cd %s && { %s; } >out 2>&1", dir, text);
    if (system(command) != 0)
        fail_msg("%s", text);
}

static struct dr_disk *opened(const char *where, const char *name, unsigned flags)
{
    char path[512];
    struct dr_open_options o = {.flags = flags};
    struct dr_disk *disk = NULL;
    snprintf(path, sizeof(path), "%s/%s", where, name);
    err = (struct dr_error)DR_ERROR_INIT;
    ok(dr_open(path, &o, &disk, &err));
    return disk;
}

static void dump(struct dr_disk *disk, const char *name)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *f = fopen(path, "we");
    uint64_t size = dr_size(disk);
    CLEANUP_FREE uint8_t *buf = malloc(MIB);
    assert_non_null(f);
    struct dr_extent_status status;
    for (uint64_t off = 0, n; off < size; off += n) {
        ok(dr_block_status(disk, off, size - off, &status, &err));
        n = status.len;
        if (status.flags & DR_EXTENT_ZERO)
            continue; /* leave a hole */
        n = dr_min(n, MIB);
        ok(dr_pread(disk, buf, off, (size_t)n, &err));
        assert_int_equal(fseeko(f, (off_t)off, SEEK_SET), 0);
        assert_int_equal(fwrite(buf, 1, (size_t)n, f), n);
    }
    assert_int_equal(fflush(f), 0);
    assert_int_equal(ftruncate(fileno(f), (off_t)size), 0);
    assert_int_equal(fclose(f), 0);
}

/* ------------------------------------------------------------------ samples */

static void vddks_disks_read_right(void **state)
{
    (void)state;
    static const char *const names[] = {"monolithicSparse.vmdk", "twoGbMaxExtentSparse.vmdk",
                                        "streamOptimized.vmdk"};
    if (!samples)
        skip();
    for (size_t i = 0; i < 3; i++) {
        struct dr_disk *disk = opened(samples, names[i], 0);
        dump(disk, "disk.raw");
        ok(dr_close(disk, &err));
        run("echo 'dd2fade471d68658b2ebbff7474f5d0a99da8989  disk.raw' | sha1sum -c -");
    }
}

static void other_samples_are_refused_with_a_reason(void **state)
{
    (void)state;
    static const struct {
        const char *name, *why;
    } cases[] = {
        {"afl9.vmdk", "text mode"},
        {"ms3-win.vmdk", "disk-s001.vmdk"},
        {"twoGbMaxExtentSparse-s001.vmdk", "split disk"},
    };
    if (!samples)
        skip();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char path[512];
        struct dr_disk *disk;
        snprintf(path, sizeof(path), "%s/%s", samples, cases[i].name);
        err = (struct dr_error)DR_ERROR_INIT;
        assert_true(dr_open(path, NULL, &disk, &err) < 0);
        if (!strstr(err.text, cases[i].why))
            fail_msg("%s: %s", cases[i].name, err.text);
    }
}

/* ------------------------------------------------------------------ qemu-img */

static const char *const subformats[] = {"monolithicSparse", "twoGbMaxExtentSparse",
                                         "monolithicFlat", "twoGbMaxExtentFlat"};

static void make(const char *name, const char *subformat, uint64_t size)
{
    char path[512];
    struct dr_option option = {"subformat", subformat};
    struct dr_create_params p = {.size = size, .options = &option, .n_options = 1};
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    ok(dr_format_vmdk.create(dr_fs_posix(), path, &p, &err));
}

static void write_pattern(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

static void qemu_reads_what_we_write(void **state)
{
    (void)state;
    if (!have_qemu)
        skip();
    for (size_t i = 0; i < 4; i++) {
        make("ours.vmdk", subformats[i], 3000 * MIB);
        struct dr_disk *disk = opened(dir, "ours.vmdk", DR_OPEN_RDWR);
        write_pattern(disk, 1000, 200000, 0x11);
        write_pattern(disk, 2046 * MIB + 77, 2 * MIB, 0x22); /* across the cut */
        ok(dr_close(disk, &err));
        run("qemu-img check ours.vmdk && qemu-io -r -f vmdk -c 'read -P 0x11 1000 200000' "
            "-c 'read -P 0 0 1000' -c 'read -P 0 201000 60000' "
            "-c 'read -P 0x22 2145386573 2097152' ours.vmdk | tee log && "
            "! grep -q 'verification failed' log && rm ours*.vmdk");
    }
}

static void we_read_and_extend_what_qemu_writes(void **state)
{
    (void)state;
    if (!have_qemu)
        skip();
    for (size_t i = 0; i < 4; i++) {
        run("qemu-img create -f vmdk -o subformat=%s theirs.vmdk 3000M && "
            "qemu-io -f vmdk -c 'write -P 0x33 1000 200000' -c 'write -P 0x44 2047M 2M' "
            "theirs.vmdk",
            subformats[i]);
        struct dr_disk *disk = opened(dir, "theirs.vmdk", DR_OPEN_RDWR);
        write_pattern(disk, 150000, 100000, 0x55);
        write_pattern(disk, 2500 * MIB, 10, 0x66);
        dump(disk, "whole.raw");
        ok(dr_close(disk, &err));
        run("qemu-img check theirs.vmdk && qemu-img compare -f vmdk -F raw theirs.vmdk whole.raw "
            "&& "
            "qemu-io -r -f raw -c 'read -P 0x33 1000 149000' -c 'read -P 0x55 150000 100000' "
            "-c 'read -P 0x44 2047M 2M' -c 'read -P 0x66 2500M 10' whole.raw | tee log && "
            "! grep -q 'verification failed' log && rm theirs*.vmdk whole.raw");
    }
}

static void the_layout_is_qemus_byte_for_byte(void **state)
{
    (void)state;
    static const unsigned sizes[] = {10, 40, 5000};
    if (!have_qemu)
        skip();
    for (size_t i = 0; i < 3; i++) {
        make("a.vmdk", "monolithicSparse", sizes[i] * MIB);
        run("qemu-img create -f vmdk b.vmdk %uM && cmp -n 512 a.vmdk b.vmdk && "
            "cmp -i 10752 a.vmdk b.vmdk && rm a.vmdk b.vmdk",
            sizes[i]);
    }
}

static void chains_are_shared_with_qemu(void **state)
{
    (void)state;
    if (!have_qemu)
        skip();
    make("base.vmdk", "twoGbMaxExtentFlat", 3000 * MIB);
    run("qemu-io -f vmdk -c 'write -P 1 0 1M' base.vmdk && "
        "qemu-img create -f vmdk -b base.vmdk -F vmdk child.vmdk");
    struct dr_disk *disk = opened(dir, "child.vmdk", DR_OPEN_RDWR);
    assert_int_equal(dr_chain_length(disk), 2);
    write_pattern(disk, 500000, 1000, 2);
    ok(dr_close(disk, &err));
    run("qemu-io -r -f vmdk -c 'read -P 1 0 500000' -c 'read -P 2 500000 1000' "
        "-c 'read -P 1 501000 500000' child.vmdk | tee log && ! grep -q 'verification failed' log "
        "&& "
        "rm base*.vmdk child.vmdk");
}

static int set_up(void **state)
{
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    char command[64];
    snprintf(command, sizeof(command), "rm -rf %s", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(vddks_disks_read_right),
        cmocka_unit_test(other_samples_are_refused_with_a_reason),
        cmocka_unit_test(qemu_reads_what_we_write),
        cmocka_unit_test(we_read_and_extend_what_qemu_writes),
        cmocka_unit_test(the_layout_is_qemus_byte_for_byte),
        cmocka_unit_test(chains_are_shared_with_qemu),
    };
    static char vmdk_samples[512];
    const char *root = getenv("DROVER_SAMPLES");
    if (root) {
        snprintf(vmdk_samples, sizeof(vmdk_samples), "%s/vmdk", root);
        samples = access(vmdk_samples, R_OK) == 0 ? vmdk_samples : NULL;
    }
    have_qemu = system("qemu-img --version >/dev/null 2>&1 && qemu-io --version >/dev/null 2>&1") ==
                0;
    if (!samples && !have_qemu) {
        printf("neither DROVER_SAMPLES nor qemu-img and qemu-io are there\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
