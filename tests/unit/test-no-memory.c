/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Every allocation that an operation makes fails once, each in a run of its own. The operation
 * fails or does without; it never crashes, and afterwards the disk opens, is sound, and shows what
 * it showed before. OVAs are not among them: libarchive 3.6 crashes without memory. */
#include <ctype.h>
#include <jansson.h>
#include <stdio.h>

#include "archive/extract-files.h"
#include "archive/vma-read.h"
#include "archive/vma-write.h"
#include "no-memory.h"
#include "test-ops.h"

/* ------------------------------------------------------------------ the operations */

#define SIZE (256 * KiB)

struct operation {
    const char *name, *format;
    int (*run)(struct dr_fs *fs, struct dr_error *err);
    bool changes; /* what the disk shows */
    void (*prepare)(struct dr_fs *fs);
    bool may_leak; /* it has succeeded before it gives up what was there before */
};

static const char *chain_format; /* of the present run */

/* What the operation has answered when it succeeded: each time the same. No memory is used for it.
 */
static char answer[16384];

static int answered(int r, const char *text)
{
    size_t len = text ? strlen(text) : 0;
    if (r < 0)
        return r;
    assert_in_range(len, 1, sizeof(answer) - 1);
    if (answer[0])
        assert_string_equal(text, answer);
    memcpy(answer, text, len + 1);
    return r;
}

static const struct dr_pair *settings(const char *format, size_t *n)
{
    static const struct dr_pair small[] = {{"cluster_size", "4096"}};
    *n = strcmp(format, "qcow2") == 0;
    return *n ? small : NULL;
}

/* What is below an image: the library that reads names in JSON takes a lack of memory for a bad
 * name. */
static const char *below(const char *format)
{
    return strcmp(format, "add-cow") == 0 ? "raw" : format;
}

static void make_small(struct dr_fs *fs, const char *path, const char *format, const char *backing)
{
    struct dr_create_options o = {
        .format = format, .backing = backing, .backing_format = backing ? below(format) : NULL};
    o.pairs = settings(format, &o.n_pairs);
    o.size = SIZE;
    o.has_size = !backing;
    ok(dr_create_fs(fs, path, &o, &err));
}

/* top over base, with something in each of them, and other beside them. */
static struct dr_fs *make_chain(const char *format)
{
    struct dr_fs *fs = dr_fs_memory_new();
    make_small(fs, "base", below(format), NULL);
    put(fs, "base", 0, 96 * KiB, 0x11);
    make_small(fs, "top", format, "base");
    put(fs, "top", 64 * KiB, 40 * KiB, 0x22);
    make_small(fs, "other", below(format), NULL);
    put(fs, "other", 16 * KiB, 16 * KiB, 0x33);
    return fs;
}

static int write_and_read(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    static uint8_t buf[24 * KiB];
    memset(buf, 0x44, sizeof(buf));
    int r = dr_open_fs(fs, "top", &o, &disk, err);
    if (r < 0)
        return r;
    r = dr_pwrite(disk, buf, 128 * KiB + 512, sizeof(buf), 0, err);
    if (r == 0)
        r = dr_zero(disk, 70 * KiB, 9 * KiB, 0, err);
    if (r == 0)
        r = dr_discard(disk, 96 * KiB, 4 * KiB, err);
    if (r == 0)
        r = dr_flush(disk, err);
    if (r == 0)
        r = dr_pread(disk, buf, 60 * KiB, sizeof(buf), err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int rebase(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "other", .backing_format = below(chain_format), .drop_equal = true};
    return dr_rebase_fs(fs, "top", &o, NULL, err);
}

static int commit(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {0};
    return dr_commit_fs(fs, "top", &o, NULL, err);
}

static int stream(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_stream_options o = {0};
    return dr_stream_fs(fs, "top", &o, NULL, err);
}

static int convert_to(struct dr_fs *fs, const char *format, struct dr_error *err)
{
    struct dr_convert_options o = {.out_format = format, .sparse_size = 4096};
    return dr_convert_fs(fs, (const char *[]){"top"}, 1, "new", &o, NULL, err);
}

static int convert_to_vmdk(struct dr_fs *fs, struct dr_error *err)
{
    return convert_to(fs, "vmdk", err);
}

static int convert_to_qcow2(struct dr_fs *fs, struct dr_error *err)
{
    return convert_to(fs, "qcow2", err);
}

/* Each number becomes "0": content ids are random. */
static int answered_json(int r, char *json)
{
    char *to = json;
    for (const char *from = json; r == 0 && *from; from++) {
        bool digit = isdigit((unsigned char)*from);
        if (!digit || to == json || to[-1] != '0')
            *to++ = digit ? '0' : *from;
    }
    if (r == 0)
        *to = '\0';
    r = answered(r, json);
    free(json);
    return r;
}

static int info(struct dr_fs *fs, struct dr_error *err)
{
    char *json = NULL;
    int r = dr_info_fs(fs, "top", NULL, true, &json, err);
    return answered_json(r, json);
}

static int measure(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_measure_options o = {.out_format = chain_format};
    struct dr_measure_result result;
    char text[64];
    int r = dr_measure_fs(fs, "top", 0, &o, &result, err);
    if (r < 0)
        return r;
    snprintf(text, sizeof(text), "%llu %llu", (unsigned long long)result.required,
             (unsigned long long)result.fully_allocated);
    return answered(r, text);
}

static int compare(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_compare_result result = {0};
    struct dr_disk *a, *b;
    char text[64];
    int r = dr_open_fs(fs, "top", NULL, &a, err);
    if (r < 0)
        return r;
    r = dr_open_fs(fs, "other", NULL, &b, err);
    if (r == 0) {
        r = dr_compare(a, b, false, NULL, &result, err);
        dr_close(b, NULL);
    }
    dr_close(a, NULL);
    snprintf(text, sizeof(text), "%d %llu", result.same, (unsigned long long)result.mismatch_off);
    return answered(r, text);
}

static int create(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_create_options o = {
        .format = chain_format, .backing = "top", .backing_format = chain_format};
    o.pairs = settings(chain_format, &o.n_pairs);
    return dr_create_fs(fs, "new", &o, err);
}

static int snapshot(struct dr_fs *fs, struct dr_error *err)
{
    char *active = NULL;
    int r = dr_snapshot_create_fs(fs, "top", "one", NULL, &active, err);
    free(active);
    return r;
}

static int amend(struct dr_fs *fs, struct dr_error *err)
{
    static const struct dr_pair wide = {"refcount_bits", "64"};
    struct dr_amend_options o = {.pairs = &wide, .n_pairs = 1};
    return dr_amend_fs(fs, "top", &o, NULL, err);
}

static int bitmaps(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_bitmap_options o = {0}, from = {.source = "one"};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top", &open, &disk, err);
    if (r < 0)
        return r;
    r = dr_disk_bitmap_change(disk, "one", DR_BITMAP_ADD, &o, err);
    if (r == 0)
        r = dr_disk_bitmap_change(disk, "two", DR_BITMAP_ADD, &o, err);
    if (r == 0)
        r = dr_pwrite(disk, "x", 200 * KiB, 1, 0, err);
    if (r == 0)
        r = dr_disk_bitmap_change(disk, "two", DR_BITMAP_MERGE, &from, err);
    if (r == 0)
        r = dr_disk_bitmap_change(disk, "one", DR_BITMAP_REMOVE, &o, err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int snapshots(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top", &o, &disk, err);
    if (r < 0)
        return r;
    struct dr_image *image = disk->chain->images[0];
    r = dr_image_snapshot_create(image, "one", err);
    if (r == 0)
        r = dr_image_snapshot_create(image, "two", err);
    if (r == 0)
        r = dr_image_snapshot_apply(image, "1", err);
    if (r == 0)
        r = dr_image_snapshot_delete(image, "2", err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int check(struct dr_fs *fs, struct dr_error *err)
{
    char *json = NULL;
    int r = dr_check_fs(fs, "top", NULL, 0, NULL, NULL, &json, err);
    return answered_json(r, json);
}

static int tree(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_tree_node *nodes = NULL;
    size_t n = 0, used = 0;
    char text[1024] = "";
    int r = dr_tree_fs(fs, "base", NULL, &nodes, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n; i++)
        used += (size_t)snprintf(
            text + used, sizeof(text) - used, "%s %s %d %llu %llu %s\n", nodes[i].path,
            nodes[i].format, (int)nodes[i].parent, (unsigned long long)nodes[i].size,
            (unsigned long long)nodes[i].disk_size, nodes[i].problem ? nodes[i].problem : "");
    dr_tree_free(nodes, n);
    return answered(r, text);
}

static int archive(struct dr_fs *fs, struct dr_error *err)
{
    static const struct dr_vma_config config = {"a.conf", (const uint8_t *)"cores: 2\n", 9};
    struct dr_vma_create_disk disk = {.name = "drive-a"};
    struct dr_vma_create_options o = {
        .disks = &disk, .n_disks = 1, .configs = &config, .n_configs = 1};
    int r = dr_open_fs(fs, "top", NULL, &disk.disk, err);
    if (r < 0)
        return r;
    r = dr_vma_create_fs(fs, "new.vma", &o, NULL, NULL, err);
    int closed = dr_close(disk.disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* From the archive that make_chain() made. */
static int extract(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_vma_new_disk disk = {.id = 1, .format = chain_format};
    struct dr_vma_files_options o = {.path = "/extracted", .disks = &disk, .n_disks = 1};
    struct dr_vma *vma;
    int r = dr_vma_open_fs(fs, "a.vma", NULL, &vma, err);
    if (r < 0)
        return r;
    r = dr_vma_extract_files_fs(fs, vma, &o, NULL, NULL, err);
    dr_vma_close(vma);
    return r;
}

/* ------------------------------------------------------------------ prepared before */

static void make_archive(struct dr_fs *fs)
{
    ok(archive(fs, &err));
    ok(fs->ops->rename(fs, "new.vma", "a.vma", &err));
}

/* Two snapshots inside the image, and something of its own in each of them. */
static void make_snapshots(struct dr_fs *fs)
{
    for (unsigned i = 0; i < 2; i++) {
        struct dr_open_options o = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disk = NULL;
        ok(dr_open_fs(fs, "top", &o, &disk, &err));
        ok(dr_image_snapshot_create(disk->chain->images[0], i ? "two" : "one", &err));
        ok(dr_close(disk, &err));
        put(fs, "top", (8 + i) * 16 * KiB, 8 * KiB, 0x55);
    }
}

static void make_bitmap(struct dr_fs *fs)
{
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_bitmap_options o = {0};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "top", &open, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "one", DR_BITMAP_ADD, &o, &err));
    ok(dr_close(disk, &err));
    put(fs, "top", 200 * KiB, 1, 0x66);
}

static void make_backup(struct dr_fs *fs)
{
    static const struct dr_backup_options o = {.set = "set", .bitmap = "nightly"};
    ok(dr_backup_fs(fs, "top", NULL, "full", &o, NULL, NULL, &err));
    put(fs, "top", 200 * KiB, 1, 0x66);
}

/* The disk of an archive, by the index of its extents. */
static int read_archive(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    uint8_t byte = 0;
    int r = dr_open_fs(fs, "vma:a.vma#drive-a", NULL, &disk, err);
    if (r < 0)
        return r;
    r = dr_pread(disk, &byte, 70 * KiB, 1, err);
    if (r == 0)
        assert_int_equal(byte, 0x22);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int bitmaps_again(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_bitmap_options o = {0}, from = {.source = "one"};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top", &open, &disk, err);
    if (r < 0)
        return r;
    r = dr_pwrite(disk, "y", 240 * KiB, 1, 0, err);
    if (r == 0)
        r = dr_disk_bitmap_change(disk, "two", DR_BITMAP_ADD, &o, err);
    if (r == 0)
        r = dr_disk_bitmap_change(disk, "two", DR_BITMAP_MERGE, &from, err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* Only what has changed since the last one. */
static int backup(struct dr_fs *fs, struct dr_error *err)
{
    static const struct dr_backup_options o = {.set = "set", .bitmap = "nightly"};
    return dr_backup_fs(fs, "top", NULL, "new", &o, NULL, NULL, err);
}

static int verify(struct dr_fs *fs, struct dr_error *err)
{
    return dr_backup_verify_fs(fs, "set", "full", NULL, NULL, NULL, err);
}

static int convert_to_stream(struct dr_fs *fs, struct dr_error *err)
{
    static const struct dr_pair stream = {"subformat", "streamOptimized"};
    struct dr_convert_options o = {.out_format = "vmdk", .pairs = &stream, .n_pairs = 1};
    return dr_convert_fs(fs, (const char *[]){"top"}, 1, "new", &o, NULL, err);
}

static int compact(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_compact_options o = {0};
    return dr_compact_fs(fs, "top", &o, NULL, NULL, err);
}

static const struct operation operations[] = {
    {"write and read", "vmdk", write_and_read, true, NULL, false},
    {"write and read", "qcow2", write_and_read, true, NULL, false},
    {"write and read", "add-cow", write_and_read, true, NULL, false},
    {"rebase", "vmdk", rebase, false, NULL, false},
    {"rebase", "qcow2", rebase, false, NULL, false},
    {"rebase", "add-cow", rebase, false, NULL, false},
    {"commit", "vmdk", commit, false, NULL, false},
    {"commit", "qcow2", commit, false, NULL, false},
    {"commit", "add-cow", commit, false, NULL, false},
    {"stream", "vmdk", stream, false, NULL, false},
    {"stream", "qcow2", stream, false, NULL, false},
    {"stream", "add-cow", stream, false, NULL, false},
    {"convert to vmdk", "qcow2", convert_to_vmdk, false, NULL, false},
    {"convert to qcow2", "vmdk", convert_to_qcow2, false, NULL, false},
    {"info", "vmdk", info, false, NULL, false},
    {"info", "qcow2", info, false, NULL, false},
    {"info", "add-cow", info, false, NULL, false},
    {"measure", "vmdk", measure, false, NULL, false},
    {"measure", "qcow2", measure, false, NULL, false},
    {"measure", "add-cow", measure, false, NULL, false},
    {"compare", "qcow2", compare, false, NULL, false},
    {"create", "vmdk", create, false, NULL, false},
    {"create", "qcow2", create, false, NULL, false},
    {"create", "add-cow", create, false, NULL, false},
    {"snapshot", "vmdk", snapshot, false, NULL, false},
    {"snapshot", "qcow2", snapshot, false, NULL, false},
    {"amend", "qcow2", amend, false, NULL, false},
    {"bitmaps", "qcow2", bitmaps, true, NULL, false},
    {"snapshots", "qcow2", snapshots, false, NULL, true},
    {"check", "vmdk", check, false, NULL, false},
    {"check", "qcow2", check, false, NULL, false},
    {"check", "add-cow", check, false, NULL, false},
    {"tree", "vmdk", tree, false, NULL, false},
    {"tree", "qcow2", tree, false, NULL, false},
    {"rebase with snapshots", "qcow2", rebase, false, make_snapshots, false},
    {"bitmaps of before", "qcow2", bitmaps_again, true, make_bitmap, false},
    {"bitmaps of before", "vmdk", bitmaps_again, true, make_bitmap, false},
    {"incremental backup", "qcow2", backup, false, make_backup, true},
    {"verify", "qcow2", verify, false, make_backup, false},
    {"convert to a stream", "vmdk", convert_to_stream, false, NULL, false},
    {"compact", "vmdk", compact, false, NULL, false},
    {"compact", "qcow2", compact, false, NULL, false},
    {"vma create", "qcow2", archive, false, NULL, false},
    {"vma read", "vmdk", read_archive, false, make_archive, false},
    {"vma extract", "vmdk", extract, false, make_archive, false},
};

/* An operation that succeeded has made what it was to make. */
static void look_at_what_is_new(struct dr_fs *fs, const uint8_t *want)
{
    static const char *const names[] = {"new", "/extracted"};
    for (size_t i = 0; i < 2; i++)
        if (exists(fs, names[i]))
            same_view(fs, names[i], want, SIZE);
}

#define LINE 300

static void note_line(void *user, const char *line)
{
    snprintf(user, LINE, "%s", line);
}

/* A failure may leave places that nothing leads to, but no damage. Success leaves neither. */
static void look_at_tables(struct dr_fs *fs, const struct operation *op, long at, int r)
{
    struct dr_image *image;
    char said[LINE] = "";
    struct dr_check_result result = {.report = note_line, .user = said};
    ok(dr_image_open(fs, "top", NULL, DR_OPEN_NO_BACKING, &image, &err));
    if (image->fmt->check)
        ok(image->fmt->check(image, 0, &result, &err));
    dr_image_unref(image, NULL);
    if (result.corruptions || (r == 0 && result.leaks && !op->may_leak))
        fail_msg("%s, %s: without allocation %ld: %d, then %llu errors and %llu leaks: %s",
                 op->format, op->name, at, r, (unsigned long long)result.corruptions,
                 (unsigned long long)result.leaks, said);
}

/* libjansson 2.14 writes behind its buffer when it reads a text and has no memory for it. */
static void let_json_fail(bool on)
{
#if CAN_FAIL
    json_set_alloc_funcs(on ? malloc : REAL(malloc), free);
#else
    (void)on;
#endif
}

/* Returns whether the operation makes fewer allocations than that. */
static bool run_once(const struct operation *op, long at)
{
    chain_format = op->format;
    struct dr_fs *fs = make_chain(op->format);
    struct dr_error why = DR_ERROR_INIT;
    uint64_t size;
    if (op->prepare)
        op->prepare(fs);
    uint8_t *before = view(fs, "top", &size);
    let_json_fail(op->prepare != make_backup);
    let_fail(at);
    int r = op->run(fs, &why);
    bool failed = has_failed();
    let_fail(-1);
    let_json_fail(true);
    /* To a file in memory a lack of it is a lack of space; to what reads a set, damage. */
    if (r < 0 && r != -ENOMEM && r != -ENOSPC && op->prepare != make_backup)
        fail_msg("%s, %s: without allocation %ld it says %d %s", op->format, op->name, at, r,
                 why.text);
    if (r < 0 && !failed)
        fail_msg("%s, %s: %d %s", op->format, op->name, r, why.text);
    if (op->changes)
        free(view(fs, "top", &size));
    else
        same_view(fs, "top", before, size);
    assert_int_equal(size, SIZE);
    if (r == 0) {
        assert_true(op->run != extract || exists(fs, "/extracted"));
        look_at_what_is_new(fs, before);
    }
    free(before);
    look_at_tables(fs, op, at, r);
    dr_fs_memory_free(fs);
    return !failed;
}

static void any_allocation_may_fail(void **state)
{
    (void)state;
    if (!CAN_FAIL)
        skip();
    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
        long at = 0;
        answer[0] = '\0';
        while (!run_once(&operations[i], at))
            at++;
        if (at < 10)
            fail_msg("%s: only %ld allocations are noticed", operations[i].name, at);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
