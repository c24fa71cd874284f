/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What new archives hold: taken apart again with the parser, and looked at through the I/O that
 * made them. */
#include "test-vma.h"
#include "faultfs.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

#include "archive/sums.h"

#define ARCHIVE "b.vma"
#define SUMS    "b.vma.sums"

static const struct dr_vma_config config = {
    .name = "qemu-server.conf", .data = (const uint8_t *)"cores: 2\n", .len = 9};

static int create(struct dr_fs *fs, const struct dr_vma_create_disk *disks, size_t n,
                  struct dr_vma_create_options o, unsigned workers,
                  struct dr_vma_create_result *result, struct dr_error *err)
{
    struct dr_job job = {.workers = workers};
    o.disks = disks;
    o.n_disks = n;
    return dr_vma_create_fs(fs, ARCHIVE, &o, &job, result, err);
}

/* ------------------------------------------------------------------ content */

static void disks_and_configs_come_back(void **state)
{
    struct dr_fs *fs = *state;
    const uint64_t sizes[] = {66536, 65536 * 130 + 4096 * 3 + 512, 512, 1, 65536 * 58, 65537};
    const size_t n = sizeof(sizes) / sizeof(*sizes);
    struct dr_vma_create_disk disks[6] = {0};
    uint8_t *want[6];
    char names[6][32];
    for (size_t i = 0; i < n; i++) {
        snprintf(names[i], sizeof(names[i]), "drive-scsi%zu", i);
        want[i] = random_disk(fs, names[i], sizes[i], 0xff0f3001ffff0001 >> i, i);
        disks[i] = (struct dr_vma_create_disk){.name = names[i], .disk = open_disk(fs, names[i])};
    }
    struct dr_vma_config configs[] = {config, {.name = "empty", .len = 0}};
    struct dr_vma_create_options o = {.configs = configs, .n_configs = 2};
    struct dr_vma_create_result result;
    ok(create(fs, disks, n, o, 3, &result, &err));

    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    assert_true(u.ascending);
    assert_int_equal(u.header.n_disks, n);
    uint64_t zeros = 0, total = 0;
    for (size_t i = 0; i < n; i++) {
        const struct dr_vma_disk *d = &u.header.disks[i];
        assert_int_equal(d->id, i + 1);
        assert_string_equal(d->name, names[i]);
        assert_int_equal(d->size, dr_round_up(sizes[i], 512));
        assert_int_equal(result.disks[i].size, d->size);
        has_disk(&u, d->id, want[i], sizes[i]);
        zeros += result.disks[i].zero_bytes;
        total += d->size;
        ok(dr_close(disks[i].disk, &err));
        free(want[i]);
    }
    assert_true(zeros < total && total - zeros <= u.blocks * DR_VMA_BLOCK);
    assert_true(total - zeros > (u.blocks - n) * DR_VMA_BLOCK);
    assert_int_equal(u.header.n_configs, 2);
    assert_string_equal(u.header.configs[0].name, "qemu-server.conf");
    assert_memory_equal(u.header.configs[0].data, config.data, config.len);
    assert_int_equal(u.header.configs[1].len, 0);
    unpacked_free(&u);
}

static void chains_are_seen_through(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "base.vmdk", "vmdk", MiB, NULL);
    put(fs, "base.vmdk", 0, 300 * KiB, 1);
    make(fs, "top.vmdk", "vmdk", 0, "base.vmdk");
    put(fs, "top.vmdk", 100 * KiB, 70000, 2);
    put(fs, "top.vmdk", 0, 64 * KiB, 0);
    uint64_t size;
    uint8_t *want = view(fs, "top.vmdk", &size);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "top.vmdk")};
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){0}, 2, NULL, &err));
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    has_disk(&u, 1, want, size);
    unpacked_free(&u);
    ok(dr_close(disk.disk, &err));
    free(want);
}

/* Blocks of zeros that stand as data in the image are found and left out. */
static void zeros_are_not_stored(void **state)
{
    struct dr_fs *fs = *state;
    free(random_disk(fs, "d", 20 * DR_VMA_CLUSTER, ~0ull, 1));
    struct dr_file *file;
    static const uint8_t zeros[3 * DR_VMA_BLOCK + 512];
    ok(dr_file_open(fs, "d", DR_FILE_RDWR, &file, &err));
    ok(dr_file_pwrite(file, zeros, 5 * DR_VMA_BLOCK, sizeof(zeros), &err));
    dr_file_unref(file);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d")};
    struct dr_vma_create_result result;
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){0}, 2, &result, &err));
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    assert_int_equal(u.blocks, 20 * 16 - 3);
    assert_int_equal(result.disks[0].zero_bytes, 3 * DR_VMA_BLOCK);
    unpacked_free(&u);
    ok(dr_close(disk.disk, &err));
}

static void zeros_behind_the_last_whole_block_are_counted_to_the_end_of_the_disk(void **state)
{
    struct dr_fs *fs = *state;
    const uint64_t size = DR_VMA_CLUSTER + 5 * DR_VMA_BLOCK + 512;
    make(fs, "d", "raw", size, NULL);
    put(fs, "d", DR_VMA_CLUSTER + 2 * DR_VMA_BLOCK, 512, 0x11);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d")};
    struct dr_vma_create_result result;
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){0}, 2, &result, &err));
    assert_int_equal(result.disks[0].zero_bytes, size - DR_VMA_BLOCK);
    ok(dr_close(disk.disk, &err));
}

struct watch {
    const uint8_t *bytes; /* of the disk */
    uint64_t size;
    _Atomic uint64_t read;
    _Atomic bool in_hole;
};

static int no_reads_in_holes(void *user, const struct faultfs_io *io)
{
    struct watch *w = user;
    if (io->kind != FAULTFS_READ)
        return 0;
    w->read += io->len;
    for (uint64_t off = io->off; off < io->off + io->len && off < w->size; off += DR_VMA_BLOCK)
        if (dr_is_zero(w->bytes + off, dr_min(DR_VMA_BLOCK, w->size - off)))
            w->in_hole = true;
    return w->in_hole ? -EIO : 0;
}

static void holes_are_never_read(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *faults = faultfs_new(fs);
    struct watch w = {.size = 65536 * 300 + 5 * DR_VMA_BLOCK + 512};
    /* blocks 0, 20..27, 33, 60..63 of 64 */
    uint8_t *bytes = random_disk(fs, "d", w.size, 0xf00000020ff00001, 3);
    w.bytes = bytes;
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(faultfs_fs(faults), "d")};
    faultfs_observe(faults, no_reads_in_holes, &w);
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){0}, 3, NULL, &err));
    assert_true(w.read > 0 && w.read < w.size / 3);
    faultfs_observe(faults, NULL, NULL);
    ok(dr_close(disk.disk, &err));
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    has_disk(&u, 1, bytes, w.size);
    unpacked_free(&u);
    free(bytes);
    faultfs_free(faults);
}

/* Of a disk of nothing the archive has 512 bytes for 58 clusters. */
static void a_huge_hole_is_only_headers(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "d.vmdk", "vmdk", 8ull << 30, NULL);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d.vmdk")};
    struct dr_vma_create_result result;
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){.configs = &config, .n_configs = 1}, 3,
              &result, &err));
    uint64_t extents = dr_div_up((8ull << 30) / DR_VMA_CLUSTER, VMA_WRITE_SLOTS);
    assert_int_equal(result.archive_bytes, VMA_FIXED_HEADER + 512 + extents * 512);
    assert_int_equal(result.disks[0].zero_bytes, 8ull << 30);
    ok(dr_close(disk.disk, &err));
}

struct failing {
    _Atomic uint64_t reads;
    uint64_t nth;
};

/* Pages of tables are read with those beside them, and if that fails, alone: both fail. */
static int fail_twice(void *user, const struct faultfs_io *io)
{
    struct failing *f = user;
    if (io->kind != FAULTFS_READ)
        return 0;
    uint64_t read = f->reads++;
    return read == f->nth || read == f->nth + 1 ? -EIO : 0;
}

/* Also of tables, which are read to find out what is zero: for each of them once, so that asking
 * again would find out. */
static void whatever_cannot_be_read_of_a_disk_is_told(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *faults = faultfs_new(fs);
    struct failing f = {0};
    make(fs, "d.vmdk", "vmdk", 256 * MiB, NULL);
    for (unsigned i = 0; i < 4; i++) /* tables for 32 MiB each */
        put(fs, "d.vmdk", i * 64 * MiB, 100 * KiB, (int)i + 1);
    for (int r = -EIO; r < 0; f.nth++) {
        struct dr_error why = DR_ERROR_INIT;
        struct dr_disk *disk = open_disk(faultfs_fs(faults), "d.vmdk");
        const struct dr_vma_create_disk from = {.name = "d", .disk = disk};
        f.reads = 0;
        faultfs_observe(faults, fail_twice, &f);
        r = create(fs, &from, 1, (struct dr_vma_create_options){0}, 1, NULL, &why);
        faultfs_observe(faults, NULL, NULL);
        if (r < 0 ? r != -EIO : f.reads > f.nth)
            fail_msg("read %u: %d %s", (unsigned)f.nth, r, why.text);
        ok(dr_close(disk, &err));
    }
    assert_true(f.nth > 6);
    faultfs_free(faults);
}

static void many_disks_share_extents(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_create_disk disks[254] = {0};
    struct dr_vma_config configs[256];
    char names[256][8];
    uint8_t *want = random_disk(fs, "d", 1024, 1, 5);
    for (size_t i = 0; i < 256; i++) {
        snprintf(names[i], sizeof(names[i]), "n%zu", i);
        configs[i] =
            (struct dr_vma_config){.name = names[i], .data = (uint8_t *)names[i], .len = 2};
    }
    for (size_t i = 0; i < 254; i++)
        disks[i] = (struct dr_vma_create_disk){.name = names[i], .disk = open_disk(fs, "d")};
    struct dr_vma_create_options o = {.configs = configs, .n_configs = 256};
    ok(create(fs, disks, 254, o, 4, NULL, &err));
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    assert_int_equal(u.header.n_disks, 254);
    assert_int_equal(u.header.n_configs, 256);
    assert_int_equal(u.extents, 5);
    for (unsigned id = 1; id <= 254; id++)
        has_disk(&u, id, want, 1024);
    unpacked_free(&u);
    for (size_t i = 0; i < 254; i++)
        ok(dr_close(disks[i].disk, &err));
    free(want);
}

static void note(void *user, const char *text)
{
    snprintf(user, 2048, "%s", text);
}

static void a_header_that_pve_would_not_write_is_told(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_config configs[256];
    uint8_t *data = calloc(1, 65535);
    char names[256][8], text[2048] = "";
    for (size_t i = 0; i < 256; i++) {
        snprintf(names[i], sizeof(names[i]), "c%zu", i);
        configs[i] = (struct dr_vma_config){.name = names[i], .data = data, .len = 65535};
    }
    struct dr_job job = {.message = note, .user = text};
    struct dr_vma_create_options o = {.configs = configs, .n_configs = 256};
    ok(dr_vma_create_fs(fs, ARCHIVE, &o, &job, NULL, &err));
    assert_non_null(strstr(text, "at most 524288"));
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    assert_int_equal(u.header.n_configs, 256);
    assert_int_equal(u.header.configs[255].len, 65535);
    assert_int_equal(u.extents, 1);
    assert_int_equal(u.empty_extents, 1);
    unpacked_free(&u);
    *text = 0;
    o.n_configs = 1;
    o.replace = true;
    ok(dr_vma_create_fs(fs, ARCHIVE, &o, &job, NULL, &err));
    assert_string_equal(text, "");
    free(data);
}

/* How many reads from now on a signal interrupts. In this program it replaces the C library's. */
static _Atomic int interrupted_reads;

ssize_t read(int fd, void *buf, size_t len)
{
    if (interrupted_reads > 0) {
        interrupted_reads--;
        errno = EINTR;
        return -1;
    }
    return syscall(SYS_read, fd, buf, len);
}

static void state_streams_are_taken_to_their_end(void **state)
{
    struct dr_fs *fs = *state;
    const size_t len = 5 * DR_VMA_CLUSTER + 1000; /* fits no pipe: a file */
    uint8_t *want = calloc(1, len);
    for (size_t i = 0; i < len; i++)
        want[i] = i / DR_VMA_BLOCK == 3 ? 0 : (uint8_t)(i * 7 + 1);
    FILE *file = tmpfile();
    assert_int_equal(fwrite(want, 1, len, file), len);
    fflush(file);
    lseek(fileno(file), 0, SEEK_SET);
    uint8_t *bytes = random_disk(fs, "d", 70000, ~0ull, 1);
    struct dr_vma_create_disk disks[] = {
        {.name = "d", .disk = open_disk(fs, "d")},
        {.name = "vmstate", .vmstate = true, .state_fd = fileno(file), .state_size = 12345}};
    struct dr_vma_create_result result;
    interrupted_reads = 2;
    ok(create(fs, disks, 2, (struct dr_vma_create_options){0}, 3, &result, &err));
    assert_int_equal(interrupted_reads, 0);
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    assert_int_equal(u.header.disks[1].size, 12345);
    assert_int_equal(result.disks[1].size, 12345);
    assert_false(u.ascending); /* the stream comes first */
    has_disk(&u, 1, bytes, 70000);
    has_disk(&u, 2, want, len);
    struct vma_sums *s = NULL;
    struct vma_sum sum;
    bool known;
    ok(vma_sums_open(fs, SUMS, &u.header, &s, &err));
    ok(vma_sums_get(s, 2, 5, &sum, &known, &err));
    assert_true(known);
    vma_sums_close(s);
    unpacked_free(&u);
    ok(dr_close(disks[0].disk, &err));
    fclose(file);
    free(want);
    free(bytes);
}

/* ------------------------------------------------------------------ reproducible */

static void the_same_input_makes_the_same_bytes(void **state)
{
    struct dr_fs *fs = *state;
    free(random_disk(fs, "a", 65536 * 200, 0xffff00ffff0000ff, 1));
    free(random_disk(fs, "b", 65536 * 70 + 512, 0x3fff00ffff0000ff, 2));
    struct dr_vma_create_disk disks[] = {{.name = "a", .disk = open_disk(fs, "a")},
                                         {.name = "b", .disk = open_disk(fs, "b")}};
    size_t first_len = 0, len;
    uint8_t *first = NULL;
    for (unsigned workers = 1; workers <= 9; workers += 4) {
        struct dr_vma_create_options o = {.reproducible = true, .replace = true};
        ok(create(fs, disks, 2, o, workers, NULL, &err));
        uint8_t *bytes = file_bytes(fs, ARCHIVE, &len);
        if (first)
            assert_true(len == first_len && memcmp(first, bytes, len) == 0);
        free(first);
        first = bytes;
        first_len = len;
    }
    struct unpacked u, v;
    unpack(first, first_len, &u);
    assert_int_equal(u.header.ctime, 0);
    assert_int_equal(u.header.uuid[6] >> 4, 8);
    struct dr_vma_create_options o = {
        .reproducible = true, .replace = true, .has_ctime = true, .ctime = 77};
    ok(create(fs, disks, 2, o, 2, NULL, &err));
    unpack_file(fs, ARCHIVE, &v);
    assert_int_equal(v.header.ctime, 77);
    assert_memory_not_equal(u.header.uuid, v.header.uuid, 16);
    unpacked_free(&u);
    unpacked_free(&v);
    free(first);
    for (size_t i = 0; i < 2; i++)
        ok(dr_close(disks[i].disk, &err));
}

static void uuid_and_time_are_as_given(void **state)
{
    struct dr_fs *fs = *state;
    struct unpacked u, v;
    struct dr_vma_create_options o = {.configs = &config,
                                      .n_configs = 1,
                                      .has_uuid = true,
                                      .has_ctime = true,
                                      .ctime = -5,
                                      .uuid = {9, 8, 7}};
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    unpack_file(fs, ARCHIVE, &u);
    assert_memory_equal(u.header.uuid, o.uuid, 16);
    assert_int_equal(u.header.ctime, -5);
    unpacked_free(&u);
    o.has_uuid = o.has_ctime = false;
    o.replace = true;
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    unpack_file(fs, ARCHIVE, &u);
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    unpack_file(fs, ARCHIVE, &v);
    assert_memory_not_equal(u.header.uuid, v.header.uuid, 16);
    assert_true(u.header.ctime > 1000000000);
    unpacked_free(&u);
    unpacked_free(&v);
}

/* ------------------------------------------------------------------ compression */

/* Frame by frame, as the table at the end says. */
static uint8_t *unzstd(const uint8_t *buf, size_t len, size_t *plain_len, unsigned *frames)
{
    uint32_t n = get_le32(buf + len - 9);
    size_t table = 8 + (size_t)n * 8 + 9, at = 0;
    assert_int_equal(get_le32(buf + len - 4), 0x8f92eab1);
    assert_int_equal(buf[len - 5], 0);
    const uint8_t *t = buf + len - table;
    assert_int_equal(get_le32(t), 0x184d2a5e);
    assert_int_equal(get_le32(t + 4), table - 8);
    uint8_t *out = NULL;
    *plain_len = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t coded = get_le32(t + 8 + i * 8), plain = get_le32(t + 12 + i * 8);
        out = realloc(out, *plain_len + plain);
        assert_int_equal(ZSTD_getFrameContentSize(buf + at, coded), plain);
        assert_int_equal(ZSTD_findFrameCompressedSize(buf + at, coded), coded);
        assert_true(buf[at + 4] & 4); /* it has a checksum: nothing else covers the data */
        assert_int_equal(ZSTD_decompress(out + *plain_len, plain, buf + at, coded), plain);
        at += coded;
        *plain_len += plain;
    }
    assert_int_equal(at, len - table);
    *frames = n;
    return out;
}

static void zstd_frames_are_independent(void **state)
{
    struct dr_fs *fs = *state;
    uint8_t *bytes = random_disk(fs, "d", 65536 * 150, 0xffff00ff000000ff, 1);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d")};
    struct dr_vma_create_options o = {.reproducible = true};
    size_t plain_len, coded_len, len;
    unsigned frames;
    ok(create(fs, &disk, 1, o, 1, NULL, &err));
    uint8_t *plain = file_bytes(fs, ARCHIVE, &plain_len);
    o.compression = DR_VMA_ZSTD;
    o.replace = true;
    for (int level = 0; level < 6; level += 5) {
        o.level = level;
        ok(create(fs, &disk, 1, o, 3, NULL, &err));
        uint8_t *coded = file_bytes(fs, ARCHIVE, &coded_len);
        uint8_t *again = unzstd(coded, coded_len, &len, &frames);
        assert_int_equal(len, plain_len);
        assert_memory_equal(again, plain, len);
        assert_int_equal(frames, 7); /* the header; 58, 58, 34 clusters and what is where */
        assert_int_equal(ZSTD_getFrameContentSize(coded, coded_len), VMA_FIXED_HEADER + 512);
        free(coded);
        free(again);
    }
    o.level = 1000;
    refused(create(fs, &disk, 1, o, 3, NULL, &err), EINVAL, "level 1000");
    free(plain);
    free(bytes);
    ok(dr_close(disk.disk, &err));
}

static void empty_extents_are_compressed_together(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "d.vmdk", "vmdk", 64 * MiB, NULL);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d.vmdk")};
    struct dr_vma_create_options o = {.compression = DR_VMA_ZSTD};
    size_t coded_len, len;
    unsigned frames;
    ok(create(fs, &disk, 1, o, 2, NULL, &err));
    uint8_t *coded = file_bytes(fs, ARCHIVE, &coded_len);
    uint8_t *plain = unzstd(coded, coded_len, &len, &frames);
    struct unpacked u;
    unpack(plain, len, &u);
    assert_int_equal(u.extents, 18);
    assert_int_equal(frames, 3);
    unpacked_free(&u);
    free(coded);
    free(plain);
    ok(dr_close(disk.disk, &err));
}

/* ------------------------------------------------------------------ checksums */

static void sums_are_those_of_the_clusters(void **state)
{
    struct dr_fs *fs = *state;
    const uint64_t size = 65536 * 130 + 4096 + 512;
    uint8_t *bytes = random_disk(fs, "d", size, 0xffff00000f0000ff, 1);
    uint8_t *cluster = malloc(DR_VMA_CLUSTER);
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d")};
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){.compression = DR_VMA_ZSTD}, 3, NULL,
              &err));
    ok(create(fs, &disk, 1, (struct dr_vma_create_options){.replace = true}, 3, NULL, &err));
    struct unpacked u;
    struct vma_sums *s = NULL;
    unpack_file(fs, ARCHIVE, &u);
    ok(vma_sums_open(fs, SUMS, &u.header, &s, &err));
    for (uint32_t c = 0; c < vma_clusters(size); c++) {
        uint64_t off = (uint64_t)c * DR_VMA_CLUSTER, len = dr_min(DR_VMA_CLUSTER, size - off);
        struct vma_sum want, have;
        bool known;
        memset(cluster, 0, DR_VMA_CLUSTER);
        memcpy(cluster, bytes + off, len);
        want = vma_sum_of(cluster);
        ok(vma_sums_get(s, 1, c, &have, &known, &err));
        assert_int_equal(known, !dr_is_zero(cluster, DR_VMA_CLUSTER));
        assert_true(!known || (want.low == have.low && want.high == have.high));
    }
    vma_sums_close(s);
    unpacked_free(&u);
    ok(dr_close(disk.disk, &err));
    free(bytes);
    free(cluster);
}

static void sums_of_what_was_there_never_stay(void **state)
{
    struct dr_fs *fs = *state;
    struct unpacked u;
    struct vma_sums *s = NULL;
    struct dr_vma_create_options o = {.configs = &config, .n_configs = 1, .replace = true};
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    unpack_file(fs, ARCHIVE, &u);
    ok(vma_sums_open(fs, SUMS, &u.header, &s, &err));
    vma_sums_close(s);
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    refused(vma_sums_open(fs, SUMS, &u.header, &s, &err), ESTALE, "another archive");
    o.no_sums = true;
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    assert_false(exists(fs, SUMS));
    o.no_sums = false;
    o.sums = "elsewhere";
    ok(create(fs, NULL, 0, o, 1, NULL, &err));
    assert_false(exists(fs, SUMS));
    assert_true(exists(fs, "elsewhere"));
    assert_int_equal(count_files(fs), 2);
    unpacked_free(&u);
}

/* ------------------------------------------------------------------ failures */

/* Puts bytes under the name of the archive, and takes away the sums. */
static void put_archive(struct dr_fs *fs, const void *bytes, size_t len)
{
    struct dr_file *file;
    ok(dr_file_open(fs, ARCHIVE, DR_FILE_RDWR | DR_FILE_CREATE | DR_FILE_TRUNCATE, &file, &err));
    ok(dr_file_pwrite(file, bytes, 0, len, &err));
    dr_file_unref(file);
    if (exists(fs, SUMS))
        ok(fs->ops->unlink(fs, SUMS, &err));
}

static bool file_is(struct dr_fs *fs, const char *path, const uint8_t *want, size_t want_len)
{
    size_t len;
    uint8_t *have = exists(fs, path) ? file_bytes(fs, path, &len) : NULL;
    bool same = have && len == want_len && memcmp(have, want, len) == 0;
    free(have);
    return same;
}

/* The archive that was there stays until the new one is complete, and nobody is told that it is
 * when it is not. */
static void a_call_that_fails_anywhere_leaves_the_old_archive_or_a_whole_one(void **state)
{
    static const uint8_t old[] = "what was there";
    static const struct dr_vma_create_options variants[] = {
        {.reproducible = true, .replace = true},
        {.reproducible = true, .replace = true, .compression = DR_VMA_ZSTD},
        {.reproducible = true, .replace = true, .no_sums = true},
    };
    struct dr_fs *fs = *state;
    struct faultfs *faults = faultfs_new(fs);
    free(random_disk(fs, "d", 65536 * 5 + 512, 0xffff00ffff0000ff, 1));
    struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d")};
    for (size_t i = 0; i < sizeof(variants) / sizeof(variants[0]); i++) {
        size_t len, sums_len = 0;
        put_archive(fs, old, sizeof(old));
        ok(create(fs, &disk, 1, variants[i], 1, NULL, &err));
        uint8_t *good = file_bytes(fs, ARCHIVE, &len);
        uint8_t *sums = exists(fs, SUMS) ? file_bytes(fs, SUMS, &sums_len) : NULL;
        assert_true(variants[i].no_sums == !sums);
        bool fired = true;
        for (uint64_t nth = 0; fired; nth++) {
            struct dr_error why = DR_ERROR_INIT;
            put_archive(fs, old, sizeof(old));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .partial = nth % 2});
            int r = create(faultfs_fs(faults), &disk, 1, variants[i], 1, NULL, &why);
            fired = faultfs_fired(faults);
            faultfs_disarm(faults);
            bool whole = file_is(fs, ARCHIVE, good, len);
            if (r == 0 && (!whole || (sums && !file_is(fs, SUMS, sums, sums_len))))
                fail_msg("variant %zu, call %llu fails, and nothing is said", i,
                         (unsigned long long)nth);
            if (r < 0 && (!fired || (!whole && !file_is(fs, ARCHIVE, old, sizeof(old)))))
                fail_msg("variant %zu, call %llu: %s", i, (unsigned long long)nth, why.text);
        }
        free(good);
        free(sums);
    }
    ok(dr_close(disk.disk, &err));
    faultfs_free(faults);
}

/* ------------------------------------------------------------------ a pipe */

static sem_t waits; /* for a reader, or has ended */

/* In the place of the C library's: the writer has found no reader and will look again. */
int nanosleep(const struct timespec *time, struct timespec *left)
{
    sem_post(&waits);
    errno = clock_nanosleep(CLOCK_REALTIME, 0, time, left);
    return errno ? -1 : 0;
}

static void an_unknown_compression_is_refused(void **state)
{
    (void)state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_vma_create_options o = {
        .configs = &config, .n_configs = 1, .compression = (enum dr_vma_compression)99};
    assert_int_equal(dr_vma_create("/nowhere/archive.vma", &o, NULL, NULL, &err), -EINVAL);
    assert_non_null(strstr(err.text, "unknown compression 99"));
}

struct to_pipe {
    char path[64];
    int result;
    atomic_bool ended;
};

static void *write_to_pipe(void *user)
{
    struct to_pipe *to = user;
    struct dr_vma_create_options o = {.configs = &config, .n_configs = 1};
    to->result = dr_vma_create(to->path, &o, NULL, NULL, NULL);
    atomic_store(&to->ended, true);
    sem_post(&waits);
    return NULL;
}

static void a_reader_of_a_pipe_may_come_late(void **state)
{
    (void)state;
    char dir[] = "/tmp/drover-test-XXXXXX";
    struct to_pipe to = {0};
    pthread_t writer;
    uint8_t buf[4096], first[4] = {0};
    size_t all = 0;
    bool ended = false;
    assert_non_null(mkdtemp(dir));
    snprintf(to.path, sizeof(to.path), "%s/pipe", dir);
    assert_int_equal(mkfifo(to.path, 0600), 0);
    assert_int_equal(sem_init(&waits, 0, 0), 0);
    assert_int_equal(pthread_create(&writer, NULL, write_to_pipe, &to), 0);
    sem_wait(&waits);
    int fd = open(to.path, O_RDONLY | O_NONBLOCK);
    assert_true(fd >= 0);
    for (ssize_t n = 0; n > 0 || !ended; all += n > 0 ? (size_t)n : 0) {
        ended = atomic_load(&to.ended);
        n = read(fd, buf, sizeof(buf));
        if (n >= 4 && all == 0)
            memcpy(first, buf, 4);
        sched_yield();
    }
    pthread_join(writer, NULL);
    assert_int_equal(to.result, 0);
    assert_memory_equal(first, "VMA", 4);
    assert_in_range(all, 12288, 16384);
    close(fd);
    unlink(to.path);
    rmdir(dir);
}

/* ------------------------------------------------------------------ disks in use */

static int swap_chain(void *user, uint64_t done, uint64_t total)
{
    struct dr_disk *disk = user;
    struct dr_chain *present = dr_disk_chain(disk), *fresh = dr_chain_tail(present, 0);
    (void)done;
    (void)total;
    dr_chain_unref(present, NULL);
    return fresh && dr_disk_swap(disk, fresh, NULL) == 0 ? 0 : 1;
}

/* The archive holds no pass of the gate: a swap does not wait for it, nor it for a swap. */
static void a_disk_that_is_listed_twice_can_be_swapped_meanwhile(void **state)
{
    struct dr_fs *fs = *state;
    const uint64_t size = 65536 * 70;
    uint8_t *want = random_disk(fs, "d", size, 0xffffff00ff00ffff, 1);
    struct dr_disk *disk = open_disk(fs, "d");
    const struct dr_vma_create_disk disks[] = {{.name = "one", .disk = disk},
                                               {.name = "two", .disk = disk}};
    const struct dr_vma_create_options o = {.disks = disks, .n_disks = 2};
    struct dr_job job = {.workers = 2, .progress = swap_chain, .user = disk};
    alarm(60); /* a deadlock ends */
    ok(dr_vma_create_fs(fs, ARCHIVE, &o, &job, NULL, &err));
    alarm(0);
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    has_disk(&u, 1, want, size);
    has_disk(&u, 2, want, size);
    unpacked_free(&u);
    ok(dr_close(disk, &err));
    free(want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(disks_and_configs_come_back),
        ops_test(chains_are_seen_through),
        ops_test(zeros_are_not_stored),
        ops_test(zeros_behind_the_last_whole_block_are_counted_to_the_end_of_the_disk),
        ops_test(holes_are_never_read),
        ops_test(a_huge_hole_is_only_headers),
        ops_test(whatever_cannot_be_read_of_a_disk_is_told),
        ops_test(many_disks_share_extents),
        ops_test(a_header_that_pve_would_not_write_is_told),
        ops_test(state_streams_are_taken_to_their_end),
        ops_test(the_same_input_makes_the_same_bytes),
        ops_test(uuid_and_time_are_as_given),
        ops_test(zstd_frames_are_independent),
        ops_test(empty_extents_are_compressed_together),
        ops_test(sums_are_those_of_the_clusters),
        ops_test(sums_of_what_was_there_never_stay),
        ops_test(a_call_that_fails_anywhere_leaves_the_old_archive_or_a_whole_one),
        cmocka_unit_test(an_unknown_compression_is_refused),
        cmocka_unit_test(a_reader_of_a_pipe_may_come_late),
        ops_test(a_disk_that_is_listed_twice_can_be_swapped_meanwhile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
