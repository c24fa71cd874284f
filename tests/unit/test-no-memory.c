/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Every allocation that an operation makes fails once, each in a run of its own. The operation
 * fails or does without; it never crashes, and afterwards the disk opens and shows what it showed
 * before. */
#include <ctype.h>

#include "archive/extract-files.h"
#include "archive/vma-read.h"
#include "archive/vma-write.h"
#include "test-ops.h"

/* ------------------------------------------------------------------ an allocator that fails once
 */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CAN_FAIL 0 /* their own allocators come first */
#else
#define CAN_FAIL 1
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);

static long fail_at = -1; /* allocations until the one that fails; negative: none does */

static bool fails(void)
{
    return __atomic_load_n(&fail_at, __ATOMIC_RELAXED) >= 0 &&
           __atomic_fetch_sub(&fail_at, 1, __ATOMIC_RELAXED) == 0;
}

static void *none(void)
{
    errno = ENOMEM;
    return NULL;
}

/* In the place of the C library's, for the libraries that we use, too. */
#pragma GCC visibility push(default)
void *malloc(size_t size)
{
    return fails() ? none() : __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    return fails() ? none() : __libc_calloc(n, size);
}

void *realloc(void *old, size_t size)
{
    return fails() ? none() : __libc_realloc(old, size);
}
#pragma GCC visibility pop
#endif

static void let_fail(long at)
{
#if CAN_FAIL
    __atomic_store_n(&fail_at, at, __ATOMIC_RELAXED);
#else
    (void)at;
#endif
}

/* Whether the allocation that was to fail has come. */
static bool has_failed(void)
{
#if CAN_FAIL
    return __atomic_load_n(&fail_at, __ATOMIC_RELAXED) < 0;
#else
    return false;
#endif
}

/* ------------------------------------------------------------------ the operations */

#define SIZE (256 * KiB)

struct operation {
    const char *name, *format;
    int (*run)(struct dr_fs *fs, struct dr_error *err);
    bool changes; /* what the disk shows */
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

static const struct operation operations[] = {
    {"write and read", "vmdk", write_and_read, true},
    {"write and read", "qcow2", write_and_read, true},
    {"write and read", "add-cow", write_and_read, true},
    {"rebase", "vmdk", rebase, false},
    {"rebase", "qcow2", rebase, false},
    {"rebase", "add-cow", rebase, false},
    {"commit", "vmdk", commit, false},
    {"commit", "qcow2", commit, false},
    {"commit", "add-cow", commit, false},
    {"stream", "vmdk", stream, false},
    {"stream", "qcow2", stream, false},
    {"stream", "add-cow", stream, false},
    {"convert to vmdk", "qcow2", convert_to_vmdk, false},
    {"convert to qcow2", "vmdk", convert_to_qcow2, false},
    {"info", "vmdk", info, false},
    {"info", "qcow2", info, false},
    {"info", "add-cow", info, false},
    {"measure", "vmdk", measure, false},
    {"measure", "qcow2", measure, false},
    {"measure", "add-cow", measure, false},
    {"compare", "qcow2", compare, false},
    {"create", "vmdk", create, false},
    {"create", "qcow2", create, false},
    {"create", "add-cow", create, false},
    {"snapshot", "vmdk", snapshot, false},
    {"snapshot", "qcow2", snapshot, false},
    {"amend", "qcow2", amend, false},
    {"bitmaps", "qcow2", bitmaps, true},
    {"snapshots", "qcow2", snapshots, false},
    {"check", "vmdk", check, false},
    {"check", "qcow2", check, false},
    {"check", "add-cow", check, false},
    {"tree", "vmdk", tree, false},
    {"tree", "qcow2", tree, false},
    {"vma create", "qcow2", archive, false},
    {"vma extract", "vmdk", extract, false},
};

/* An operation that succeeded has made what it was to make. */
static void look_at_what_is_new(struct dr_fs *fs, const uint8_t *want)
{
    static const char *const names[] = {"new", "/extracted"};
    for (size_t i = 0; i < 2; i++)
        if (exists(fs, names[i]))
            same_view(fs, names[i], want, SIZE);
}

/* Returns whether the operation makes fewer allocations than that. */
static bool run_once(const struct operation *op, long at)
{
    chain_format = op->format;
    struct dr_fs *fs = make_chain(op->format);
    struct dr_error why = DR_ERROR_INIT;
    uint64_t size;
    uint8_t *before = view(fs, "top", &size);
    if (op->run == extract) {
        ok(archive(fs, &err));
        ok(fs->ops->rename(fs, "new.vma", "a.vma", &err));
    }
    let_fail(at);
    int r = op->run(fs, &why);
    bool failed = has_failed();
    let_fail(-1);
    /* To a file in memory a lack of it is a lack of space. */
    if (r < 0 && r != -ENOMEM && r != -ENOSPC)
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
