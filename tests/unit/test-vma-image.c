/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A disk inside an archive is an image: it reads as the disk did, wherever a name of an image can
 * stand. Through the public headers, but for what makes the archives. */
#include "vma-archive.h"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include "drover/ops.h"
#include "drover/vma.h"

#define KIB 1024u

struct fixture {
    char dir[64], archive[128];
    struct archive a;
};

static char *path_in(const struct fixture *f, const char *name)
{
    static char buffers[4][400];
    static unsigned next;
    char *out = buffers[next++ % 4];
    snprintf(out, 400, "%s/%s", f->dir, name);
    return out;
}

/* "vma:" the archive "#" member */
static char *member(const struct fixture *f, const char *name)
{
    static char buffers[4][400];
    static unsigned next;
    char *out = buffers[next++ % 4];
    snprintf(out, 400, "vma:%s%s%s", f->archive, name ? "#" : "", name ? name : "");
    return out;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    strcpy(f->dir, "/tmp/drover-image-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    snprintf(f->archive, sizeof(f->archive), "%s/backup.vma", f->dir);
    archive_disk(&f->a, 1, "drive-scsi0", 5000 * KIB);
    archive_disk(&f->a, 2, "vmstate", 100 * KIB);
    archive_disk(&f->a, 7, "drive-virtio1", 3 * 64 * KIB + 5001); /* no whole sectors */
    archive_in_order(&f->a);
    archive_shuffle(&f->a);
    archive_build(&f->a);
    archive_write(&f->a, dr_fs_posix(), f->archive);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    char cmd[128];
    archive_free(&f->a);
    snprintf(cmd, sizeof(cmd), "rm -rf %s", f->dir);
    int r = system(cmd);
    free(f);
    return r;
}

/* ------------------------------------------------------------------ helpers */

static struct dr_disk *open_disk(const char *name, const struct dr_open_options *o)
{
    struct dr_disk *disk = NULL;
    struct dr_error err = DR_ERROR_INIT;
    if (dr_open(name, o, &disk, &err) < 0)
        fail_msg("%s: %s", name, err.text);
    return disk;
}

static int reads_differ(struct dr_disk *disk, const struct dr_vma_disk *is, uint64_t seed)
{
    uint8_t *got = malloc(300000), *want = malloc(300000);
    int bad = 0;
    for (int i = 0; i < 40; i++) {
        uint64_t off = archive_mix(seed, 2 * (uint64_t)i) % is->size;
        size_t len =
            (size_t)dr_min(archive_mix(seed, 2 * (uint64_t)i + 1) % 300000, is->size - off);
        archive_expect(is, off, len, want);
        bad += dr_pread(disk, got, off, len, NULL) != 0 || memcmp(got, want, len) != 0;
    }
    free(got);
    free(want);
    return bad;
}

static void assert_is(const char *name, const struct dr_vma_disk *is)
{
    struct dr_disk *disk = open_disk(name, NULL);
    assert_int_equal(dr_size(disk), is->size);
    assert_string_equal(dr_image_format(disk, 0), "vma");
    assert_string_equal(dr_image_path(disk, 0), name);
    assert_false(dr_writable(disk));
    assert_int_equal(reads_differ(disk, is, is->id), 0);
    assert_ok(dr_close(disk, &err));
}

static void assert_refused(const char *name, const struct dr_open_options *o, int errnum,
                           const char *words)
{
    struct dr_disk *disk = NULL;
    assert_fails(dr_open(name, o, &disk, &err), errnum, words);
}

/* ------------------------------------------------------------------ reading */

static void every_disk_reads_as_it_was(void **state)
{
    struct fixture *f = *state;
    assert_is(member(f, "drive-scsi0"), &f->a.disks[0]);
    assert_is(member(f, "drive-virtio1"), &f->a.disks[2]);
    assert_is(member(f, "1"), &f->a.disks[0]);
    assert_is(member(f, "7"), &f->a.disks[2]);
    assert_ok(dr_vma_index(f->archive, NULL, NULL, &err));
    assert_is(member(f, "drive-scsi0"), &f->a.disks[0]);
    assert_is(member(f, "drive-virtio1"), &f->a.disks[2]);
}

struct reading {
    struct dr_disk *disk;
    const struct dr_vma_disk *is;
    uint64_t seed;
    int bad;
};

static void *read_in_thread(void *arg)
{
    struct reading *r = arg;
    r->bad = reads_differ(r->disk, r->is, r->seed);
    return NULL;
}

static void assert_threads_read(struct fixture *f, struct dr_disk *one, struct dr_disk *other)
{
    struct reading r[4];
    pthread_t threads[4];
    for (unsigned i = 0; i < 4; i++) {
        r[i] = (struct reading){i % 2 ? one : other, &f->a.disks[i % 2 ? 0 : 2], i + 100, 0};
        pthread_create(&threads[i], NULL, read_in_thread, &r[i]);
    }
    for (unsigned i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(r[i].bad, 0);
    }
}

static void two_disks_of_one_archive_are_open_at_once_and_read_by_many_threads(void **state)
{
    struct fixture *f = *state;
    struct dr_disk *one = open_disk(member(f, "drive-scsi0"), NULL);
    struct dr_disk *other = open_disk(member(f, "drive-virtio1"), NULL);
    struct dr_disk *again = open_disk(member(f, "drive-virtio1"), NULL);
    assert_threads_read(f, one, other);
    assert_ok(dr_close(one, &err));
    assert_int_equal(reads_differ(again, &f->a.disks[2], 5), 0);
    assert_ok(dr_close(other, &err));
    assert_ok(dr_close(again, &err));
}

static void a_disk_ends_with_its_last_byte(void **state)
{
    struct fixture *f = *state;
    struct dr_disk *disk = open_disk(member(f, "7"), NULL);
    uint64_t size = f->a.disks[2].size;
    uint8_t got[100], want[100];
    archive_expect(&f->a.disks[2], size - 100, 100, want);
    assert_ok(dr_pread(disk, got, size - 100, 100, &err));
    assert_memory_equal(got, want, 100);
    assert_int_equal(dr_pread(disk, got, size - 99, 100, NULL), -EINVAL);
    assert_ok(dr_close(disk, &err));
}

/* Data where blocks are stored, at the place it is said to be; zeros elsewhere; no gap. */
static void the_map_says_where_each_block_stands(void **state)
{
    struct fixture *f = *state;
    const struct dr_vma_disk *is = &f->a.disks[0];
    struct dr_disk *disk = open_disk(member(f, "drive-scsi0"), NULL);
    uint8_t *want = malloc(is->size);
    uint64_t off = 0;
    unsigned data = 0, zero = 0;
    while (off < is->size) {
        struct dr_extent_status s;
        assert_ok(dr_block_status(disk, off, is->size - off, &s, &err));
        assert_true(s.off == off && s.len > 0 && (s.flags & DR_EXTENT_ALLOCATED));
        archive_expect(is, off, s.len, want);
        if (s.flags & DR_EXTENT_DATA) {
            assert_true(s.flags & DR_EXTENT_OFFSET);
            assert_string_equal(s.file, f->archive);
            assert_memory_equal(f->a.bytes + s.host_off, want, s.len);
            data++;
        } else {
            assert_true(s.flags & DR_EXTENT_ZERO);
            assert_true(dr_is_zero(want, s.len));
            zero++;
        }
        off += s.len;
    }
    assert_true(data > 5 && zero > 5);
    free(want);
    assert_ok(dr_close(disk, &err));
}

/* In ascending order the blocks of an extent's clusters are one run. */
static void neighbouring_clusters_are_one_extent(void **state)
{
    struct fixture *f = *state;
    struct archive a = {0};
    struct dr_extent_status s;
    archive_disk(&a, 3, "d", 1000 * KIB);
    archive_in_order(&a);
    archive_build(&a);
    archive_write(&a, dr_fs_posix(), f->archive);
    struct dr_disk *disk = open_disk(f->archive, NULL);
    for (uint64_t off = 0, end; off < dr_size(disk); off = end) {
        bool data = archive_block_is_data(3, off / DR_VMA_BLOCK);
        for (end = off;
             end < dr_size(disk) && archive_block_is_data(3, end / DR_VMA_BLOCK) == data;)
            end += DR_VMA_BLOCK;
        assert_ok(dr_block_status(disk, off, dr_size(disk) - off, &s, &err));
        assert_int_equal(s.len, end - off);
    }
    assert_ok(dr_close(disk, &err));
    archive_free(&a);
}

static void an_archive_is_only_read(void **state)
{
    struct fixture *f = *state;
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    assert_refused(member(f, "drive-scsi0"), &o, EROFS, "vma images can only be read");
    assert_ok(chmod(f->archive, 0444));
    assert_is(member(f, "drive-scsi0"), &f->a.disks[0]);
}

/* ------------------------------------------------------------------ names */

static void one_disk_needs_no_name(void **state)
{
    struct fixture *f = *state;
    struct archive a = {0};
    archive_disk(&a, 3, "drive-sata3", 1000 * KIB);
    archive_disk(&a, 4, "vmstate", 64 * KIB);
    archive_in_order(&a);
    archive_build(&a);
    archive_write(&a, dr_fs_posix(), f->archive);
    assert_is(f->archive, &a.disks[0]);
    assert_is(member(f, NULL), &a.disks[0]);
    assert_is(member(f, "3"), &a.disks[0]);
    archive_free(&a);
}

static void several_disks_are_listed(void **state)
{
    struct fixture *f = *state;
    char words[400];
    snprintf(words, sizeof(words), "holds 2 disks, name one of them: %s, %s",
             member(f, "drive-scsi0"), member(f, "drive-virtio1"));
    assert_refused(f->archive, NULL, EINVAL, words);
    assert_refused(member(f, NULL), NULL, EINVAL, words);
    assert_refused(member(f, "drive-scsi1"), NULL, ENOENT,
                   "has no disk 'drive-scsi1', only: drive-scsi0, drive-virtio1");
    assert_refused(member(f, ""), NULL, ENOENT, "has no disk ''");
    assert_refused(member(f, "3"), NULL, ENOENT, "has no disk '3'");
    assert_refused(member(f, "07"), NULL, ENOENT, "has no disk '07'");
    assert_refused(member(f, "a\nb"), NULL, ENOENT, "has no disk 'a\\x0ab'");
}

static void the_state_of_a_machine_is_no_disk(void **state)
{
    struct fixture *f = *state;
    assert_refused(member(f, "vmstate"), NULL, EINVAL, "drover vma extract");
    assert_refused(member(f, "2"), NULL, EINVAL, "stream");
}

static void two_disks_of_one_name_are_told_apart_by_number(void **state)
{
    struct fixture *f = *state;
    uint8_t *head = f->a.bytes;
    memcpy(head + VMA_AT_DEVICES + 7 * VMA_DEVICE_LEN, head + VMA_AT_DEVICES + VMA_DEVICE_LEN, 4);
    assert_int_equal(
        vma_md5(head, f->a.header.header_size, VMA_AT_MD5, head + VMA_AT_MD5, "a.vma", NULL), 0);
    archive_write(&f->a, dr_fs_posix(), f->archive);
    assert_refused(member(f, "drive-scsi0"), NULL, EINVAL, "2 disks have the name");
    assert_is(member(f, "7"), &f->a.disks[2]);
}

static void a_disk_may_have_a_number_as_its_name(void **state)
{
    struct fixture *f = *state;
    struct archive a = {0};
    archive_disk(&a, 1, "2", 100 * KIB);
    archive_disk(&a, 2, "1", 200 * KIB);
    archive_in_order(&a);
    archive_build(&a);
    archive_write(&a, dr_fs_posix(), f->archive);
    assert_is(member(f, "2"), &a.disks[0]);
    assert_is(member(f, "1"), &a.disks[1]);
    archive_free(&a);
}

static void a_file_with_the_whole_name_wins(void **state)
{
    struct fixture *f = *state;
    struct archive a = {0};
    archive_disk(&a, 1, "x", 300 * KIB);
    archive_in_order(&a);
    archive_build(&a);
    archive_write(&a, dr_fs_posix(), path_in(f, "backup.vma#drive-scsi0"));
    assert_is(member(f, "drive-scsi0"), &a.disks[0]);
    char *twice = strdup(member(f, "drive-scsi0#x"));
    assert_is(twice, &a.disks[0]);
    free(twice);
    archive_free(&a);
}

static void plain_paths_are_never_taken_apart(void **state)
{
    struct fixture *f = *state;
    char *odd = path_in(f, "vma:backup.vma#drive-scsi0");
    struct dr_file *file = open_on(dr_fs_posix(), odd, DR_FILE_CREATE);
    assert_ok(dr_file_truncate(file, 65536, &err));
    dr_file_unref(file);
    struct dr_disk *disk = open_disk(odd, NULL);
    assert_string_equal(dr_image_format(disk, 0), "raw");
    assert_ok(dr_close(disk, &err));
    char *hash = path_in(f, "backup.vma#drive-scsi0");
    assert_refused(hash, NULL, ENOENT, hash);
    assert_null(dr_name_format("x.vma#y"));
    assert_null(dr_name_format("./vma:x"));
    assert_null(dr_name_format("raw:x"));
    assert_string_equal(dr_name_format("vma:x"), "vma");
}

static void a_format_that_is_given_must_be_the_names(void **state)
{
    struct fixture *f = *state;
    struct dr_open_options o = {.format = "raw"};
    assert_refused(member(f, "drive-scsi0"), &o, EINVAL, "names a disk in a vma file");
    o.format = "vma";
    struct dr_disk *disk = open_disk(member(f, "drive-scsi0"), &o);
    assert_ok(dr_close(disk, &err));
    assert_refused(f->archive, &o, EINVAL, "name one of them");
    assert_refused(path_in(f, "nothing.vma"), &o, ENOENT, "nothing.vma");
    assert_refused("vma:/nonexistent.vma#x", NULL, ENOENT, "/nonexistent.vma");
}

static void names_beside_keep_their_form(void **state)
{
    static const char *const cases[][3] = {
        {"/d/x.vmdk", "vma:../b.vma#x", "vma:/d/../b.vma#x"},
        {"x.vmdk", "vma:b.vma#x", "vma:b.vma#x"},
        {"/d/x.vmdk", "vma:/e/b.vma#x", "vma:/e/b.vma#x"},
        {"vma:/d/b.vma#x", "y", "/d/y"},
        {"/d/x", "y#z", "/d/y#z"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *got = dr_name_beside(cases[i][0], cases[i][1]);
        assert_string_equal(got, cases[i][2]);
        free(got);
    }
    char *file = dr_name_file("vma:/nonexistent/b.vma#x#y");
    assert_string_equal(file, "/nonexistent/b.vma#x");
    free(file);
}

/* ------------------------------------------------------------------ compressed archives */

static void add_le32(struct dr_file *f, uint32_t v)
{
    uint8_t raw[4];
    put_le32(raw, v);
    assert_ok(dr_file_pwrite(f, raw, dr_file_size(f), 4, &err));
}

static void write_seekable(const struct archive *a, const char *path)
{
    size_t step = 100000, room = ZSTD_compressBound(step), n = 0;
    uint8_t *buf = malloc(room);
    uint32_t sizes[400][2];
    struct dr_file *f = open_on(dr_fs_posix(), path, DR_FILE_CREATE);
    for (size_t at = 0; at < a->n; at += step, n++) {
        size_t len = dr_min(step, a->n - at);
        size_t used = ZSTD_compress(buf, room, a->bytes + at, len, 1);
        sizes[n][0] = (uint32_t)used;
        sizes[n][1] = (uint32_t)len;
        assert_ok(dr_file_pwrite(f, buf, dr_file_size(f), used, &err));
    }
    add_le32(f, 0x184d2a5e);
    add_le32(f, (uint32_t)n * 8 + 9);
    for (size_t i = 0; i < n; i++) {
        add_le32(f, sizes[i][0]);
        add_le32(f, sizes[i][1]);
    }
    add_le32(f, (uint32_t)n);
    assert_ok(dr_file_pwrite(f, "\0", dr_file_size(f), 1, &err));
    add_le32(f, 0x8f92eab1);
    dr_file_unref(f);
    free(buf);
}

static void a_compressed_archive_with_a_seek_table_is_read_at_random(void **state)
{
    struct fixture *f = *state;
    strcat(f->archive, ".zst");
    write_seekable(&f->a, f->archive);
    for (int i = 0; i < 2; i++) {
        struct dr_disk *one = open_disk(member(f, "drive-scsi0"), NULL);
        struct dr_disk *other = open_disk(member(f, "drive-virtio1"), NULL);
        assert_threads_read(f, one, other);
        assert_ok(dr_close(one, &err));
        assert_ok(dr_close(other, &err));
        assert_ok(dr_vma_index(f->archive, NULL, NULL, &err));
    }
    assert_refused(f->archive, NULL, EINVAL, "holds 2 disks"); /* known by its name */
}

static void an_archive_that_cannot_be_read_at_random_says_so(void **state)
{
    static const struct {
        const char *suffix, *kind, *magic;
        size_t len;
    } kinds[] = {{".gz", "gzip", "\x1f\x8b\x08", 3},
                 {".zst", "zstd", "\x28\xb5\x2f\xfd", 4},
                 {".bz2", "bzip2", "BZh9", 4},
                 {".lzo", "lzop", "\x89LZO\0\r\n\x1a\n", 9}};
    struct fixture *f = *state;
    for (size_t i = 0; i < 4; i++) {
        char path[200], words[100], name[300];
        snprintf(path, sizeof(path), "%s%s", f->archive, kinds[i].suffix);
        snprintf(words, sizeof(words), "is compressed (%s)", kinds[i].kind);
        snprintf(name, sizeof(name), "vma:%s#x", path);
        struct dr_file *file = open_on(dr_fs_posix(), path, DR_FILE_CREATE);
        assert_ok(dr_file_pwrite(file, kinds[i].magic, 0, kinds[i].len, &err));
        assert_ok(dr_file_truncate(file, 10000, &err));
        dr_file_unref(file);
        assert_refused(path, NULL, ENOTSUP, words);
        assert_refused(name, NULL, ENOTSUP, words);
    }
}

/* ------------------------------------------------------------------ as a parent */

static void make_child(const char *path, const char *format, const char *backing,
                       const struct dr_open_options *open)
{
    const struct dr_create_options o = {
        .format = format, .backing = backing, .flags = open ? open->flags : 0};
    assert_ok(dr_create(path, &o, &err));
}

static void a_child_stands_on_a_disk_in_an_archive(void **state)
{
    struct fixture *f = *state;
    uint8_t *buf = malloc(200000), *want = malloc(200000);
    struct stat before, after;
    const struct dr_vma_disk *is = &f->a.disks[0];
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    assert_int_equal(stat(f->archive, &before), 0);
    make_child(path_in(f, "x.add-cow"), "add-cow", "vma:backup.vma#drive-scsi0", NULL);
    struct dr_disk *disk = open_disk(path_in(f, "x.add-cow"), &rw);
    assert_int_equal(dr_chain_length(disk), 2);
    assert_string_equal(dr_image_backing_name(disk, 0), "vma:backup.vma#drive-scsi0");
    assert_string_equal(dr_image_path(disk, 1), member(f, "drive-scsi0"));
    assert_int_equal(reads_differ(disk, is, 1), 0);
    memset(buf, 0x5a, 100);
    assert_ok(dr_pwrite(disk, buf, 100000, 100, 0, &err));
    archive_expect(is, 0, 200000, want);
    memset(want + 100000, 0x5a, 100);
    assert_ok(dr_pread(disk, buf, 0, 200000, &err));
    assert_memory_equal(buf, want, 200000);
    assert_ok(dr_close(disk, &err));
    assert_int_equal(stat(f->archive, &after), 0);
    assert_true(before.st_mtim.tv_nsec == after.st_mtim.tv_nsec &&
                before.st_mtim.tv_sec == after.st_mtim.tv_sec);
    free(buf);
    free(want);
}

static void the_gate_looks_at_the_archive(void **state)
{
    struct fixture *f = *state;
    const char *child = path_in(f, "vm/x.add-cow");
    const char *dirs[] = {f->dir, NULL};
    struct dr_open_options any = {.flags = DR_OPEN_ANY_PATH}, listed = {.allow_paths = dirs};
    assert_int_equal(mkdir(path_in(f, "vm"), 0700), 0);
    make_child(child, "add-cow", "vma:../backup.vma#drive-virtio1", &any);
    assert_refused(child, NULL, EACCES, "refuses to open its backing file");
    struct dr_disk *disk = open_disk(child, &listed);
    assert_string_equal(dr_image_format(disk, 1), "vma");
    assert_ok(dr_close(disk, &err));
}

/* Two disks of one file are two disks: no loop, no clash of locks. */
static void children_of_two_disks_of_one_archive_are_open_at_once(void **state)
{
    struct fixture *f = *state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    make_child(path_in(f, "a.add-cow"), "add-cow", "vma:backup.vma#1", NULL);
    make_child(path_in(f, "b.add-cow"), "add-cow", "vma:backup.vma#7", NULL);
    struct dr_disk *a = open_disk(path_in(f, "a.add-cow"), &rw);
    struct dr_disk *b = open_disk(path_in(f, "b.add-cow"), &rw);
    assert_int_equal(reads_differ(a, &f->a.disks[0], 1), 0);
    assert_int_equal(reads_differ(b, &f->a.disks[2], 2), 0);
    assert_ok(dr_close(a, &err));
    assert_ok(dr_close(b, &err));
}

static void rebase_tells_the_disks_of_one_archive_apart(void **state)
{
    struct fixture *f = *state;
    struct archive a = {0};
    archive_disk(&a, 1, "old", 1000 * KIB);
    archive_disk(&a, 2, "new", 1000 * KIB);
    archive_in_order(&a);
    archive_build(&a);
    archive_write(&a, dr_fs_posix(), f->archive);
    make_child(path_in(f, "x.add-cow"), "add-cow", "vma:backup.vma#old", NULL);
    struct dr_rebase_options o = {.backing = "vma:backup.vma#new", .backing_format = "vma"};
    assert_ok(dr_rebase(path_in(f, "x.add-cow"), &o, NULL, &err));
    struct dr_disk *disk = open_disk(path_in(f, "x.add-cow"), NULL);
    assert_string_equal(dr_image_path(disk, 1), member(f, "new"));
    assert_int_equal(reads_differ(disk, &a.disks[0], 3), 0); /* the view stands still */
    assert_ok(dr_close(disk, &err));
    archive_free(&a);
}

static void a_vmdk_does_not_stand_on_an_archive(void **state)
{
    struct fixture *f = *state;
    struct dr_create_options o = {.format = "vmdk", .backing = "vma:backup.vma#drive-scsi0"};
    assert_fails(dr_create(path_in(f, "x.vmdk"), &o, &err), EINVAL, "vma");
    o.backing_format = "vma";
    assert_fails(dr_create(path_in(f, "x.vmdk"), &o, &err), EINVAL, "must be a VMDK");
    o.format = "add-cow";
    o.backing_format = "raw";
    assert_fails(dr_create(path_in(f, "x.add-cow"), &o, &err), EINVAL, "vma");
    assert_int_equal(access(path_in(f, "x.vmdk"), F_OK), -1);
    assert_int_equal(access(path_in(f, "x.add-cow"), F_OK), -1);
}

/* ------------------------------------------------------------------ damaged archives */

static void a_damaged_archive_is_refused_with_its_place(void **state)
{
    struct fixture *f = *state;
    f->a.bytes[f->a.last + 300] ^= 1;
    archive_write(&f->a, dr_fs_posix(), f->archive);
    char words[100];
    snprintf(words, sizeof(words), "extent at offset %llu", (unsigned long long)f->a.last);
    assert_refused(member(f, "drive-scsi0"), NULL, EBADMSG, words);
    f->a.n = f->a.last;
    archive_write(&f->a, dr_fs_posix(), f->archive);
    assert_refused(member(f, "drive-scsi0"), NULL, EBADMSG, "missing");
    f->a.bytes[100] ^= 1;
    archive_write(&f->a, dr_fs_posix(), f->archive);
    assert_refused(member(f, "drive-scsi0"), NULL, EINVAL, "checksum");
}

/* A side file that does not fit costs time, nothing else. */
static void a_stale_side_file_does_no_harm(void **state)
{
    struct fixture *f = *state;
    assert_ok(dr_vma_index(f->archive, NULL, NULL, &err));
    archive_shuffle(&f->a);
    archive_build(&f->a);
    archive_write(&f->a, dr_fs_posix(), f->archive);
    assert_is(member(f, "drive-scsi0"), &f->a.disks[0]);
}

/* A backup that is made reproducibly over and over: the same header, length and last extent, other
 * places in between. Only its time tells. */
static void an_archive_that_was_made_again_needs_a_new_side_file(void **state)
{
    struct fixture *f = *state;
    assert_ok(dr_vma_index(f->archive, NULL, NULL, &err));
    for (unsigned i = 0; i < VMA_WRITE_SLOTS / 2; i++) { /* the first extent, turned round */
        struct archive_slot *one = &f->a.order[i], *other = &f->a.order[VMA_WRITE_SLOTS - 1 - i];
        struct archive_slot t = *one;
        *one = *other;
        *other = t;
    }
    archive_build(&f->a);
    archive_write(&f->a, dr_fs_posix(), f->archive);
    assert_is(member(f, "drive-scsi0"), &f->a.disks[0]);
    assert_is(member(f, "drive-virtio1"), &f->a.disks[2]);
}

/* ------------------------------------------------------------------ archives by Proxmox's tool */

static void samples_read_as_expected(void **state)
{
    static const struct {
        const char *member, *md5;
    } samples[] = {
        {"p01-pve41-multi.vma#drive-scsi0", "0c7eeadb42ed2585c1ecd850d0df4216"},
        {"p01-pve41-multi.vma#2", "3eeff81a1ea25139ff43bfedea691292"},
        {"p02-pve41-single.vma", "0c7eeadb42ed2585c1ecd850d0df4216"},
    };
    const char *dir = getenv("DROVER_SAMPLES");
    (void)state;
    if (!dir || access(dir, F_OK) != 0) {
        print_message("no sample images (DROVER_SAMPLES)\n");
        skip();
        return;
    }
    for (size_t i = 0; i < 3; i++) {
        char name[400], hex[33];
        uint8_t sum[16];
        snprintf(name, sizeof(name), "vma:%s/vma/%s", dir, samples[i].member);
        struct dr_disk *disk = open_disk(name, NULL);
        size_t size = dr_size(disk);
        uint8_t *all = malloc(size);
        assert_ok(dr_pread(disk, all, 0, size, &err));
        assert_int_equal(EVP_Digest(all, size, sum, NULL, EVP_md5(), NULL), 1);
        for (int k = 0; k < 16; k++)
            snprintf(hex + 2 * k, 3, "%02x", sum[k]);
        assert_string_equal(hex, samples[i].md5);
        free(all);
        assert_ok(dr_close(disk, &err));
    }
}

int main(void)
{
#define IMAGE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        IMAGE(every_disk_reads_as_it_was),
        IMAGE(two_disks_of_one_archive_are_open_at_once_and_read_by_many_threads),
        IMAGE(a_disk_ends_with_its_last_byte),
        IMAGE(the_map_says_where_each_block_stands),
        IMAGE(neighbouring_clusters_are_one_extent),
        IMAGE(an_archive_is_only_read),
        IMAGE(one_disk_needs_no_name),
        IMAGE(several_disks_are_listed),
        IMAGE(the_state_of_a_machine_is_no_disk),
        IMAGE(two_disks_of_one_name_are_told_apart_by_number),
        IMAGE(a_disk_may_have_a_number_as_its_name),
        IMAGE(a_file_with_the_whole_name_wins),
        IMAGE(plain_paths_are_never_taken_apart),
        IMAGE(a_format_that_is_given_must_be_the_names),
        IMAGE(names_beside_keep_their_form),
        IMAGE(a_compressed_archive_with_a_seek_table_is_read_at_random),
        IMAGE(an_archive_that_cannot_be_read_at_random_says_so),
        IMAGE(a_child_stands_on_a_disk_in_an_archive),
        IMAGE(the_gate_looks_at_the_archive),
        IMAGE(children_of_two_disks_of_one_archive_are_open_at_once),
        IMAGE(rebase_tells_the_disks_of_one_archive_apart),
        IMAGE(a_vmdk_does_not_stand_on_an_archive),
        IMAGE(a_damaged_archive_is_refused_with_its_place),
        IMAGE(a_stale_side_file_does_no_harm),
        IMAGE(an_archive_that_was_made_again_needs_a_new_side_file),
        cmocka_unit_test(samples_read_as_expected),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
