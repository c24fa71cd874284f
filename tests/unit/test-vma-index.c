/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The index of an archive: it finds every cluster, whatever the order, and tells whatever headers
 * can show to be wrong; its side file is believed only where it fits. */
#include "vma-archive.h"

#include <sys/resource.h>
#include <unistd.h>
#include <xxhash.h>

#include "archive/vma-index.h"
#include "drover/vma.h"
#include "faultfs.h"
#include "ops/job.h"

#define KIB 1024u

static int setup_memory(void **state)
{
    struct place *p = calloc(1, sizeof(*p));
    p->fs = dr_fs_memory_new();
    strcpy(p->path, "/d/a.vma");
    strcpy(p->other, "/d/a.vma.idx");
    *state = p;
    return 0;
}

static int teardown_memory(void **state)
{
    struct place *p = *state;
    dr_fs_memory_free(p->fs);
    free(p);
    return 0;
}

static struct archive two_disks(void)
{
    struct archive a = {0};
    archive_disk(&a, 1, "drive-scsi0", 9000 * KIB);
    archive_disk(&a, 7, "drive-virtio1", 3 * 64 * KIB + 5000);
    archive_in_order(&a);
    return a;
}

/* ------------------------------------------------------------------ helpers */

static int build(struct place *p, struct dr_file **file, struct vma_index **index,
                 struct dr_vma_header *header, struct dr_error *err)
{
    *file = open_ok(p, p->path, 0);
    *index = NULL;
    int r = vma_index_header(*file, header, NULL, NULL, err);
    return r < 0 ? r : vma_index_build(*file, header, NULL, index, err);
}

/* Every block of every disk stands where the index says. */
static void assert_finds_all(const struct archive *a, const struct vma_index *index,
                             struct dr_file *file)
{
    uint8_t want[DR_VMA_BLOCK], got[DR_VMA_BLOCK];
    for (size_t i = 0; i < a->header.n_disks; i++) {
        const struct dr_vma_disk *disk = &a->disks[i];
        for (uint64_t b = 0; !disk->vmstate && b * DR_VMA_BLOCK < disk->size; b++) {
            struct vma_place p = vma_index_find(index, disk->id, (uint32_t)(b / VMA_BLOCKS));
            unsigned k = b % VMA_BLOCKS;
            assert_true(p.present);
            archive_block(disk, b, want);
            if (!(p.mask >> k & 1)) {
                assert_true(dr_is_zero(want, sizeof(want)));
                continue;
            }
            uint64_t host = p.host +
                            (uint64_t)__builtin_popcount(p.mask & ((1u << k) - 1)) * DR_VMA_BLOCK;
            assert_ok(dr_file_pread(file, got, host, sizeof(got), &err));
            assert_memory_equal(got, want, sizeof(got));
        }
    }
}

static void assert_good(struct place *p, struct archive *a)
{
    struct dr_file *file;
    struct vma_index *index;
    struct dr_vma_header header = {0};
    archive_build(a);
    archive_write(a, p->fs, p->path);
    assert_ok(build(p, &file, &index, &header, &err));
    assert_finds_all(a, index, file);
    assert_int_equal(vma_index_last(index), a->last);
    vma_index_free(index);
    vma_header_free(&header);
    dr_file_unref(file);
}

static void assert_bad(struct place *p, const struct archive *a, const char *words)
{
    struct dr_file *file;
    struct vma_index *index;
    struct dr_vma_header header = {0};
    archive_write(a, p->fs, p->path);
    assert_fails(build(p, &file, &index, &header, &err), EBADMSG, words);
    assert_null(index);
    vma_header_free(&header);
    dr_file_unref(file);
}

/* ------------------------------------------------------------------ building */

static void clusters_are_found_in_any_order(void **state)
{
    struct archive a = two_disks();
    assert_good(*state, &a);
    archive_shuffle(&a);
    assert_good(*state, &a);
    a.slots = 59;
    assert_good(*state, &a);
    a.slots = 1;
    a.empties = true;
    assert_good(*state, &a);
    archive_free(&a);
}

static void an_archive_without_disks_has_an_empty_index(void **state)
{
    struct archive a = {0};
    struct dr_vma_config config = {"qemu-server.conf", (const uint8_t *)"x", 1};
    a.header.configs = &config;
    a.header.n_configs = 1;
    assert_good(*state, &a);
    archive_extent(&a, NULL, 0);
    archive_write(&a, ((struct place *)*state)->fs, ((struct place *)*state)->path);
    archive_free(&a);
}

/* What a machine's state says of its size is advice: no cluster is missing or too much. */
static void the_state_of_a_machine_is_no_disk(void **state)
{
    struct archive a = {0};
    archive_disk(&a, 1, "drive-scsi0", 200 * KIB);
    archive_disk(&a, 2, "vmstate", 1000 * KIB);
    archive_in_order(&a);
    a.n_order -= 3;
    assert_good(*state, &a);
    a.order[a.n_order - 1].cluster = 1000000;
    assert_good(*state, &a);
    archive_free(&a);
}

static void zeros_behind_the_last_extent_are_padding(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    struct dr_file *file;
    struct vma_index *index;
    struct dr_vma_header header = {0};
    static const uint8_t zeros[70000];
    archive_build(&a);
    size_t end = a.n;
    for (size_t n = 1; n <= sizeof(zeros); n = n * 7 + 100) {
        a.n = end;
        archive_add(&a, zeros, n);
        archive_write(&a, p->fs, p->path);
        assert_ok(build(p, &file, &index, &header, &err));
        vma_index_free(index);
        vma_header_free(&header);
        dr_file_unref(file);
        a.bytes[a.n - 1] = 1;
        assert_bad(p, &a, "are no extent");
    }
    archive_free(&a);
}

struct tally {
    uint64_t reads, bytes;
};

static int tally(void *user, const struct faultfs_io *io)
{
    struct tally *t = user;
    if (io->kind == FAULTFS_READ) {
        t->reads++;
        t->bytes += io->len;
    }
    return 0;
}

static void only_headers_are_read(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    struct vma_index *index;
    struct dr_vma_header header = {0};
    struct faultfs *fault = faultfs_new(p->fs);
    struct tally t = {0};
    a.slots = 10;
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    struct dr_file *file = open_on(faultfs_fs(fault), p->path, 0);
    faultfs_observe(fault, tally, &t);
    assert_ok(vma_index_header(file, &header, NULL, NULL, &err));
    assert_int_equal(t.reads, 2);
    assert_int_equal(t.bytes, header.header_size);
    t = (struct tally){0};
    assert_ok(vma_index_build(file, &header, NULL, &index, &err));
    assert_int_equal(t.reads, dr_div_up(a.n_order, 10));
    assert_int_equal(t.bytes, t.reads * VMA_EXTENT_HEADER);
    vma_index_free(index);
    vma_header_free(&header);
    dr_file_unref(file);
    faultfs_free(fault);
    archive_free(&a);
}

/* 1 TiB of nothing: one word for what would be millions. */
static void holes_take_no_memory(void **state)
{
    struct place *p = *state;
    struct dr_vma_disk disk = {1, "d", 1ull << 40, false};
    struct dr_vma_header header = {.disks = &disk, .n_disks = 1, .header_size = 12800};
    struct vma_index *index;
    struct rusage before, after;
    uint64_t first = 0;
    (void)p;
    getrusage(RUSAGE_SELF, &before);
    assert_ok(vma_index_new(&header, "x", 1ull << 40, &index, &err));
    assert_int_equal(vma_index_put(index, 1, &first, 1u << 24, 0, 0), 0);
    assert_int_equal(first, 1u << 24);
    assert_ok(vma_index_check(index, &header, "x", &err));
    getrusage(RUSAGE_SELF, &after);
    assert_true(after.ru_maxrss - before.ru_maxrss < 4096); /* KiB */
    struct vma_place at = vma_index_find(index, 1, 12345678);
    assert_true(at.present && at.mask == 0);
    first = 77;
    assert_int_equal(vma_index_put(index, 1, &first, 1, 0, 0), -EEXIST);
    vma_index_free(index);
}

/* One cluster here, one there: what a disk of 6 TiB in an archive that is mostly a hole may take
 * before it shows that the rest is missing. */
static void lone_clusters_take_little_memory(void **state)
{
    struct dr_vma_disk disk = {1, "d", 200000ull * 512 * DR_VMA_CLUSTER, false};
    struct dr_vma_header header = {.disks = &disk, .n_disks = 1, .header_size = 12800};
    struct vma_index *index;
    struct rusage before, after;
    (void)state;
    assert_ok(vma_index_new(&header, "x", 1ull << 40, &index, &err));
    getrusage(RUSAGE_SELF, &before);
    for (uint64_t c = 0; c < 200000; c++) {
        uint64_t first = c * 512 + c % 512;
        assert_int_equal(vma_index_put(index, 1, &first, 1, 0, 0), 0);
    }
    getrusage(RUSAGE_SELF, &after);
    assert_true(after.ru_maxrss - before.ru_maxrss < 100000); /* KiB; a word each for all: 800000 */
    assert_fails(vma_index_check(index, &header, "x", &err), EBADMSG,
                 "102200000 clusters are missing, the first is 1 (of");
    vma_index_free(index);
}

/* Chunks that are filled in any order, seen at each step: lists, longer ones, and then whole. */
static void a_chunk_is_right_at_every_length(void **state)
{
    enum { N = 512 };
    struct dr_vma_disk disk = {1, "d", (2 * N + 40) * DR_VMA_CLUSTER, false};
    struct dr_vma_header header = {.disks = &disk, .n_disks = 1, .header_size = 12800};
    struct vma_index *index;
    unsigned total = 2 * N + 40;
    (void)state;
    assert_ok(vma_index_new(&header, "x", 1ull << 40, &index, &err));
    for (unsigned n = 0; n < total; n++) {
        uint64_t c = (uint64_t)n * 601 % total, first = c;
        bool zero = c % 5 == 0;
        uint64_t host = 12800 + c * 512;
        assert_int_equal(vma_index_put(index, 1, &first, 1, zero ? 0 : 3, zero ? 0 : host), 0);
        first = c;
        assert_int_equal(vma_index_put(index, 1, &first, 1, 1, host), -EEXIST);
        for (unsigned k = 0; k < total; k += n % 61 == 0 ? 1 : 97) {
            struct vma_place at = vma_index_find(index, 1, k);
            unsigned turn = 0; /* k came in which turn? */
            while ((uint64_t)turn * 601 % total != k)
                turn++;
            assert_int_equal(at.present, turn <= n);
            assert_int_equal(at.mask, turn <= n && k % 5 ? 3 : 0);
            if (at.mask)
                assert_int_equal(at.host, 12800 + k * 512);
        }
    }
    assert_ok(vma_index_check(index, &header, "x", &err));
    vma_index_free(index);
}

/* ------------------------------------------------------------------ what headers can show */

static void a_missing_cluster_is_told(void **state)
{
    struct archive a = two_disks();
    archive_shuffle(&a);
    struct archive_slot gone = a.order[--a.n_order];
    char words[100];
    archive_build(&a);
    snprintf(words, sizeof(words), "1 clusters are missing, the first is %u (of", gone.cluster);
    assert_bad(*state, &a, words);
    archive_free(&a);
}

static void missing_clusters_are_counted_over_all_disks(void **state)
{
    struct archive a = two_disks();
    a.n_order -= 6; /* the four of the second disk, and the first one's last two */
    archive_build(&a);
    assert_bad(*state, &a, "6 clusters are missing, the first is 139 (of 141) of device 1");
    archive_free(&a);
}

static void a_duplicate_is_told(void **state)
{
    struct archive a = two_disks();
    a.order[20] = a.order[3];
    archive_build(&a);
    assert_bad(*state, &a, "cluster 3 of device 1 ('drive-scsi0') for the second time");
    archive_free(&a);
}

static void clusters_and_devices_that_are_not_there_are_told(void **state)
{
    struct archive a = two_disks();
    a.order[5].cluster = 141;
    archive_build(&a);
    assert_bad(*state, &a, "cluster 141 of device 1");
    a.order[5].cluster = UINT32_MAX;
    archive_build(&a);
    assert_bad(*state, &a, "cluster 4294967295 of device 1");
    a.order[5].id = 9;
    archive_build(&a);
    assert_bad(*state, &a, "device 9 is not in the header");
    archive_free(&a);
}

/* Cut anywhere, and be it between two extents. */
static void every_truncation_is_told(void **state)
{
    struct archive a = two_disks();
    a.slots = 20;
    archive_build(&a);
    size_t whole = a.n;
    for (a.n = a.header.header_size; a.n < whole; a.n += a.n % 512 ? 12345 : 4000) {
        struct place *p = *state;
        struct dr_file *file;
        struct vma_index *index;
        struct dr_vma_header header = {0};
        struct dr_error err = DR_ERROR_INIT;
        archive_write(&a, p->fs, p->path);
        int r = build(p, &file, &index, &header, &err);
        if (r != -EBADMSG)
            fail_msg("cut at %zu: %d %s", a.n, r, err.text);
        vma_header_free(&header);
        dr_file_unref(file);
    }
    archive_free(&a);
}

static void every_flipped_byte_of_an_extent_header_is_told(void **state)
{
    struct archive a = two_disks();
    archive_build(&a);
    for (size_t at = a.last; at < a.last + VMA_EXTENT_HEADER; at += 7) {
        a.bytes[at] ^= 0x20;
        assert_bad(*state, &a, "extent");
        a.bytes[at] ^= 0x20;
    }
    archive_free(&a);
}

/* A size that the archive's length cannot hold is refused before anything is allocated for it. */
static void a_size_without_room_for_its_clusters_is_refused(void **state)
{
    struct archive a = two_disks();
    a.disks[1].size = 1ull << 47;
    a.n_order = 10;
    archive_build(&a);
    assert_bad(*state, &a, "it was cut off");
    archive_free(&a);
}

static void a_job_can_be_stopped(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    struct vma_index *index;
    struct dr_job job = {.cancelled = 1};
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    struct dr_file *file = open_ok(p, p->path, 0);
    assert_fails(vma_index_build(file, &a.header, &job, &index, &err), ECANCELED, "stopped");
    assert_null(index);
    dr_file_unref(file);
    archive_free(&a);
}

/* ------------------------------------------------------------------ side file */

static void save(struct place *p, const struct archive *a)
{
    struct dr_file *file;
    struct vma_index *index;
    struct dr_vma_header header = {0};
    archive_write(a, p->fs, p->path);
    assert_ok(build(p, &file, &index, &header, &err));
    assert_ok(vma_index_save(index, p->fs, p->other, file, &header, &err));
    vma_index_free(index);
    vma_header_free(&header);
    dr_file_unref(file);
}

static int load(struct place *p, const struct archive *a, bool find, struct dr_error *why)
{
    struct dr_vma_header header = {0};
    struct vma_index *index = NULL;
    struct dr_file *file = open_ok(p, p->path, 0);
    assert_ok(vma_index_header(file, &header, NULL, NULL, &err));
    int r = vma_index_load(p->fs, p->other, file, &header, &index, why);
    assert_true((r == 0) == (index != NULL));
    if (r == 0 && find) {
        assert_finds_all(a, index, file);
        assert_int_equal(vma_index_last(index), a->last);
    }
    vma_index_free(index);
    vma_header_free(&header);
    dr_file_unref(file);
    return r;
}

static void a_side_file_says_the_same(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    archive_disk(&a, 9, "vmstate", 100000);
    for (int i = 0; i < 3; i++) {
        archive_build(&a);
        save(p, &a); /* over the one before */
        assert_ok(load(p, &a, true, &err));
        archive_shuffle(&a);
        a.empties = i;
    }
    archive_free(&a);
}

static void another_archives_side_file_is_not_used(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    archive_build(&a);
    assert_fails(load((archive_write(&a, p->fs, p->path), p), &a, true, &err), ENOENT, p->other);
    save(p, &a);
    a.header.ctime = 5; /* another header, nothing else */
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    assert_fails(load(p, &a, true, &err), ESTALE, "another archive");
    a.header.ctime = 0;
    archive_build(&a);
    archive_extent(&a, NULL, 0); /* longer */
    archive_write(&a, p->fs, p->path);
    assert_fails(load(p, &a, true, &err), ESTALE, "another archive");
    struct archive_slot t = a.order[a.n_order - 1]; /* another last extent */
    a.order[a.n_order - 1] = a.order[a.n_order - 2];
    a.order[a.n_order - 2] = t;
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    assert_fails(load(p, &a, true, &err), ESTALE, "another archive");
    archive_free(&a);
}

/* Every byte of it, changed, and every length. */
static void a_damaged_side_file_is_not_used(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    archive_build(&a);
    save(p, &a);
    struct dr_file *f = open_ok(p, p->other, DR_FILE_RDWR);
    uint64_t size = dr_file_size(f);
    for (uint64_t at = 0; at < size; at += at < 200 || at > size - 20 ? 1 : 13) {
        uint8_t byte;
        assert_ok(dr_file_pread(f, &byte, at, 1, &err));
        byte ^= 0x81;
        assert_ok(dr_file_pwrite(f, &byte, at, 1, &err));
        dr_file_unref(f);
        int r = load(p, &a, false, NULL);
        if (r != -ESTALE && r != -EBADMSG)
            fail_msg("byte %d changed: %d", (int)at, r);
        f = open_ok(p, p->other, DR_FILE_RDWR);
        byte ^= 0x81;
        assert_ok(dr_file_pwrite(f, &byte, at, 1, &err));
    }
    for (uint64_t n = size; n-- > 0; n -= dr_min(n, 37)) {
        assert_ok(dr_file_truncate(f, n, &err));
        dr_file_unref(f);
        assert_int_equal(load(p, &a, false, NULL), -EBADMSG);
        f = open_ok(p, p->other, DR_FILE_RDWR);
    }
    dr_file_unref(f);
    archive_free(&a);
}

/* As the document says: 72 bytes, a disk's 24, words; the checksum at the end is right again. */
static void set_first_word(struct place *p, uint64_t word)
{
    struct dr_file *f = open_ok(p, p->other, DR_FILE_RDWR);
    size_t size = (size_t)dr_file_size(f);
    uint8_t *all = malloc(size);
    assert_ok(dr_file_pread(f, all, 0, size, &err));
    put_le64(all + 72 + 24, word);
    put_le64(all + size - 8, XXH3_64bits(all, size - 8));
    assert_ok(dr_file_pwrite(f, all, 0, size, &err));
    dr_file_unref(f);
    free(all);
}

/* Whoever can write a side file can make its checksum fit, too. */
static void a_side_file_cannot_lead_out_of_the_archive(void **state)
{
    struct place *p = *state;
    struct archive a = {0};
    archive_disk(&a, 1, "d", 40 * DR_VMA_CLUSTER);
    archive_in_order(&a);
    archive_build(&a);
    save(p, &a);
    const uint64_t bad[] = {
        a.n / 512 << 16 | 1,
        (1ull << 45) << 16 | 0xffff,
        (1ull << 46) - 1,
        3ull << 62 | 2,
        2ull << 62,
        2ull << 62 | 41,
        2ull << 62 | 1ull << 61,
        1ull << 62 | 1,
        0,
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        set_first_word(p, bad[i]);
        struct dr_error why = DR_ERROR_INIT;
        int r = load(p, &a, false, &why);
        if (r != -EBADMSG || !strstr(why.text, "a cluster stands where none can be"))
            fail_msg("word %zu: %d, %s", i, r, why.text);
        dr_error_reset(&why);
    }
    archive_free(&a);
}

static void somebodys_file_is_not_replaced_by_an_index(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    struct dr_file *file;
    struct vma_index *index;
    struct dr_vma_header header = {0};
    char text[8] = {0};
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    struct dr_file *other = open_ok(p, p->other, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(other, "a thesis", 0, 8, &err));
    dr_file_unref(other);
    assert_ok(build(p, &file, &index, &header, &err));
    assert_fails(vma_index_save(index, p->fs, p->other, file, &header, &err), EEXIST, "no index");
    other = open_ok(p, p->other, 0);
    assert_ok(dr_file_pread(other, text, 0, 8, &err));
    assert_memory_equal(text, "a thesis", 8);
    dr_file_unref(other);
    vma_index_free(index);
    vma_header_free(&header);
    dr_file_unref(file);
    archive_free(&a);
}

/* Fails at any I/O: nothing or the old one has the name, no temporary file is left. */
static int one_more(void *user, const char *name)
{
    unsigned *n = user;
    (void)name;
    ++*n;
    return 0;
}

static void a_failed_save_leaves_nothing(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    struct vma_index *index;
    struct dr_vma_header header = {0};
    struct faultfs *fault = faultfs_new(p->fs);
    struct dr_fs *fs = faultfs_fs(fault);
    unsigned failures = 0;
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    struct dr_file *file = open_on(fs, p->path, 0);
    assert_ok(vma_index_header(file, &header, NULL, NULL, &err));
    assert_ok(vma_index_build(file, &header, NULL, &index, &err));
    for (uint64_t nth = 0;; nth++) {
        struct faultfs_plan plan = {.nth = nth,
                                    .kinds = ~(1u << FAULTFS_UNLINK | 1u << FAULTFS_SYNC_DIR)};
        unsigned names = 0;
        faultfs_arm(fault, &plan);
        int r = vma_index_save(index, fs, p->other, file, &header, NULL);
        bool fired = faultfs_fired(fault);
        faultfs_disarm(fault);
        if (!fired) {
            assert_int_equal(r, 0);
            break;
        }
        assert_true(r < 0);
        assert_int_equal(p->fs->ops->list(p->fs, "/d", one_more, &names, NULL), 0);
        assert_int_equal(names, 1);
        failures++;
    }
    assert_true(failures > 3);
    vma_index_free(index);
    vma_header_free(&header);
    dr_file_unref(file);
    faultfs_free(fault);
    archive_free(&a);
}

/* ------------------------------------------------------------------ as everybody calls it */

static void the_public_call_makes_the_usual_side_file(void **state)
{
    struct place *p = *state;
    struct archive a = two_disks();
    char usual[200], zst[200], cmd[500];
    archive_build(&a);
    archive_write(&a, p->fs, p->path);
    snprintf(usual, sizeof(usual), "%s.idx", p->path);
    assert_ok(dr_vma_index(p->path, NULL, NULL, &err));
    assert_int_equal(access(usual, F_OK), 0);
    assert_ok(dr_vma_index(p->path, p->other, NULL, &err));
    assert_int_equal(access(p->other, F_OK), 0);
    assert_fails(dr_vma_index(p->other, NULL, NULL, &err), EINVAL, "no VMA archive");
    snprintf(zst, sizeof(zst), "%s.zst", p->path);
    snprintf(cmd, sizeof(cmd), "zstd -q -c <%s >%s 2>/dev/null", p->path, zst);
    if (system(cmd) == 0)
        assert_fails(dr_vma_index(zst, NULL, NULL, &err), ENOTSUP, "only be read from its start");
    archive_free(&a);
}

int main(void)
{
#define MEMORY(f) cmocka_unit_test_setup_teardown(f, setup_memory, teardown_memory)
#define POSIX(f)  cmocka_unit_test_setup_teardown(f, setup_posix, teardown_posix)
    const struct CMUnitTest tests[] = {
        MEMORY(clusters_are_found_in_any_order),
        MEMORY(an_archive_without_disks_has_an_empty_index),
        MEMORY(the_state_of_a_machine_is_no_disk),
        MEMORY(zeros_behind_the_last_extent_are_padding),
        MEMORY(only_headers_are_read),
        MEMORY(holes_take_no_memory),
        MEMORY(lone_clusters_take_little_memory),
        MEMORY(a_chunk_is_right_at_every_length),
        MEMORY(a_missing_cluster_is_told),
        MEMORY(missing_clusters_are_counted_over_all_disks),
        MEMORY(a_duplicate_is_told),
        MEMORY(clusters_and_devices_that_are_not_there_are_told),
        MEMORY(every_truncation_is_told),
        MEMORY(every_flipped_byte_of_an_extent_header_is_told),
        MEMORY(a_size_without_room_for_its_clusters_is_refused),
        MEMORY(a_job_can_be_stopped),
        MEMORY(a_side_file_says_the_same),
        MEMORY(another_archives_side_file_is_not_used),
        MEMORY(a_damaged_side_file_is_not_used),
        MEMORY(a_side_file_cannot_lead_out_of_the_archive),
        MEMORY(somebodys_file_is_not_replaced_by_an_index),
        MEMORY(a_failed_save_leaves_nothing),
        POSIX(the_public_call_makes_the_usual_side_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
