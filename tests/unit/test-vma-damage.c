/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Damaged and hostile archives: each is refused with a message that says where, and with salvage
 * what is left comes out and what is lost is told exactly. */
#include "faultfs.h"
#include "test-vma-archive.h"

static void refuse(struct bench *b, struct dr_vma_extract_options o, const char *damage,
                   const char *words)
{
    struct dr_error err = DR_ERROR_INIT;
    o.salvage = false;
    int r = extract(b, o, &err);
    if (r != -EBADMSG || !strstr(err.text, words) || strncmp(err.text, ARCHIVE ": ", 8) != 0)
        fail_msg("%d: '%s' lacks '%s'", r, err.text, words);
    if (damage)
        assert_string_equal(b->damage, damage);
}

static void salvage(struct bench *b, struct dr_vma_extract_options o, const char *damage)
{
    o.salvage = true;
    ok(extract(b, o, &err));
    assert_string_equal(b->damage, damage);
}

/* Stores the archive and looks at it in all ways: only checked, and extracted. */
static void is_damaged(struct bench *b, const char *strict, const char *words, const char *salvaged)
{
    struct dr_vma_extract_options none = {.headers_only = true};
    store(b);
    refuse(b, none, strict, words);
    salvage(b, none, salvaged);
    if (b->a.header.n_disks == 0 || b->a.disks[0].vmstate)
        return;
    struct dr_vma_target t = target(b, b->a.disks[0].id, b->a.disks[0].size, 0);
    struct dr_vma_extract_options one = {.targets = &t, .n_targets = 1};
    refuse(b, one, strict, words);
    end_target(&t);
    t = target(b, b->a.disks[0].id, b->a.disks[0].size, 0);
    salvage(b, one, salvaged);
    expect_image(b, &t, 0);
    end_target(&t);
}

static void remove_extent(struct archive *a, unsigned i)
{
    size_t from = a->extents[i], to = i + 1 < a->n_extents ? a->extents[i + 1] : a->len;
    memmove(a->buf + from, a->buf + to, a->len - to);
    a->len -= to - from;
}

static void forget(struct archive *a, unsigned id, uint32_t cluster)
{
    memset(a->image[id] + (uint64_t)cluster * 65536, 0, 65536);
}

static void begin(struct bench *b)
{
    empty_archive(&b->a);
    plain_archive(&b->a);
}

/* ------------------------------------------------------------------ what is missing */

static void missing_clusters_are_found(void **state)
{
    struct bench *b = *state;
    begin(b);
    remove_extent(&b->a, 1);
    forget(&b->a, 1, 1);
    is_damaged(b, "missing 1 65536 65536\n", "disk 1 ('drive-scsi0'): 65536 bytes at offset 65536",
               "missing 1 65536 65536\n");
    assert_int_equal(b->result.missing_bytes, 65536);
    begin(b);
    remove_extent(&b->a, 2); /* zeros must be listed too */
    remove_extent(&b->a, 1);
    forget(&b->a, 1, 1);
    is_damaged(b, "missing 1 65536 131072\n", "131072 bytes at offset 65536",
               "missing 1 65536 131072\n");
    begin(b);
    b->a.len = b->a.extents[0];
    memset(b->a.image[1], 0, 4 * 65536);
    is_damaged(b, "missing 1 0 262144\n", "the archive ends at offset 12800",
               "missing 1 0 262144\n");
}

static void missing_clusters_of_disks_nobody_wants_are_found(void **state)
{
    struct bench *b = *state;
    add_disk(&b->a, 1, "a", 65536 + 5);
    add_disk(&b->a, 2, "b", 65536);
    end_header(&b->a);
    add_extent(&b->a, &(struct vma_slot){2, 0, 1, 0}, 1, true);
    store(b);
    struct dr_vma_target t = target(b, 2, 65536, 0);
    refuse(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, "missing 1 0 65541\n",
           "disk 1 ('a'): 65541 bytes at offset 0 are missing");
    end_target(&t);
}

static void huge_disks_cost_no_memory(void **state)
{
    struct bench *b = *state;
    static char names[254][8];
    for (unsigned id = 1; id <= 254; id++) {
        snprintf(names[id - 1], 8, "d%u", id);
        b->a.disks[id - 1] = (struct dr_vma_disk){id, names[id - 1], VMA_MAX_SIZE, false};
    }
    b->a.header.n_disks = 254;
    end_header(&b->a);
    struct vma_slot s[2] = {{254, 0xffffffff, 0, 0}, {254, 0x80000000, 0, 0}};
    add_extent(&b->a, s, 2, true);
    store(b);
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(extract(b, (struct dr_vma_extract_options){0}, &err), -EBADMSG);
    assert_non_null(strstr(b->damage, "missing 253 0 281474976710656\n"
                                      "missing 254 0 140737488355328\n"
                                      "missing 254 140737488420864 140737488224256\n"));
}

static void names_are_escaped(void **state)
{
    struct bench *b = *state;
    add_disk(&b->a, 1, "aXb", 65536);
    end_header(&b->a);
    uint8_t *name = memmem(b->a.buf, b->a.len, "aXb", 3);
    name[1] = '\n';
    vma_md5(b->a.buf, b->a.len, VMA_AT_MD5, b->a.buf + VMA_AT_MD5, "a.vma", NULL);
    store(b);
    refuse(b, (struct dr_vma_extract_options){0}, NULL, "disk 1 ('a\\x0ab')");
}

/* ------------------------------------------------------------------ cut off */

/* The damage that is_damaged must find in plain_archive cut at `len`. */
static void expect_cut(struct archive *a, size_t len, char *damage, bool *header_only)
{
    uint64_t from = 0, to = 0;
    char missing[256] = "";
    *damage = '\0';
    *header_only = false;
    for (uint32_t c = 0; c < 4; c++) {
        size_t end = c < 3 ? a->extents[c + 1] : a->len;
        if (end <= len)
            continue;
        if (a->extents[c] < len)
            sprintf(damage, "extent 0 %zu %zu\n", a->extents[c], len - a->extents[c]);
        *header_only = *header_only || a->extents[c] < len;
        forget(a, 1, c);
        from = to ? from : c * 65536u;
        to = (c + 1) * 65536u;
        sprintf(missing, "missing 1 %llu %llu\n", (unsigned long long)from,
                (unsigned long long)(to - from));
    }
    strcat(damage, missing);
}

static void every_truncation_is_found(void **state)
{
    struct bench *b = *state;
    begin(b);
    size_t end = b->a.len, first = b->a.extents[0];
    b->workers = 1;
    for (size_t cut = first; cut < end;) {
        char damage[512];
        bool in_extent;
        begin(b);
        expect_cut(&b->a, cut, damage, &in_extent);
        b->a.len = cut;
        store(b);
        /* the first failure ends it: what is missing is not counted then */
        const char *missing = strstr(damage, "missing");
        char *strict = strndup(damage, in_extent ? (size_t)(missing - damage) : sizeof(damage));
        refuse(b, (struct dr_vma_extract_options){.headers_only = true}, strict,
               in_extent ? "ends at offset" : "are missing");
        free(strict);
        struct dr_vma_target t = target(b, 1, 4 * 65536, 0);
        salvage(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, damage);
        expect_image(b, &t, 0);
        end_target(&t);
        /* all bytes around the beginnings of things, some in between */
        size_t near = 0;
        for (unsigned i = 0; i < 4; i++)
            near += cut + 8 > b->a.extents[i] && cut < b->a.extents[i] + 520;
        cut += near ? (cut % 512 < 8 || cut % 512 > 504 ? 1 : 61) : 1021;
    }
    for (size_t cut = 0; cut < first; cut += cut % 4096 < 3 || cut > first - 5 ? 1 : 811) {
        struct dr_vma *vma;
        write_file(b->fs, ARCHIVE, b->a.buf, cut);
        refused(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err), EINVAL, ARCHIVE);
    }
}

static void complete_clusters_of_a_cut_extent_are_saved(void **state)
{
    struct bench *b = *state;
    add_disk(&b->a, 1, "d", 5 * 65536);
    end_header(&b->a);
    struct vma_slot s[] = {
        {1, 0, 0xffff, 0}, {1, 1, 0, 0}, {1, 2, 0x00ff, 0}, {1, 3, 0x000f, 0}, {1, 4, 0, 0}};
    add_extent(&b->a, s, 5, true);
    b->a.len -= 4 * 4096 + 1; /* a byte of the third, all of the fourth */
    forget(&b->a, 1, 2);
    forget(&b->a, 1, 3);
    char damage[128];
    snprintf(damage, sizeof(damage), "extent 0 12800 %zu\nmissing 1 131072 131072\n",
             b->a.len - 12800);
    store(b);
    struct dr_vma_target t = target(b, 1, 5 * 65536, 0x44);
    salvage(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, damage);
    expect_image(b, &t, 0x44);
    end_target(&t);
    assert_int_equal(b->result.bytes_read, 3 * 65536);
}

static void every_flipped_byte_of_extent_headers_is_found(void **state)
{
    struct bench *b = *state;
    struct dr_vma_extract_options none = {.headers_only = true};
    b->workers = 1;
    begin(b);
    for (unsigned i = 0; i < 4; i++) {
        size_t off = b->a.extents[i], end = i < 3 ? b->a.extents[i + 1] : b->a.len;
        char extent[64], all[128];
        sprintf(extent, "extent 0 %zu %zu\n", off, end - off);
        sprintf(all, "%smissing 1 %u 65536\n", extent, i * 65536);
        for (size_t at = off; at < off + 512; at += at < off + 56 ? 1 : 7) {
            b->a.buf[at] ^= 0x20;
            store(b);
            struct dr_error err = DR_ERROR_INIT;
            assert_int_equal(extract(b, none, &err), -EBADMSG);
            assert_non_null(strstr(err.text, "extent"));
            salvage(b, none, all);
            b->a.buf[at] ^= 0x20;
        }
    }
}

/* ------------------------------------------------------------------ behind the last extent */

static void add_bytes(struct archive *a, int byte, size_t n)
{
    need(a, n);
    memset(a->buf + a->len, byte, n);
    a->len += n;
}

static void what_follows_must_be_extents(void **state)
{
    struct bench *b = *state;
    static const size_t sizes[] = {1, 511, 512, 513, 70000};
    for (unsigned i = 0; i < 5; i++) {
        begin(b);
        size_t end = b->a.len;
        char damage[64];
        sprintf(damage, "extent 0 %zu %zu\n", end, sizes[i]);
        add_bytes(&b->a, 'x', sizes[i]);
        is_damaged(b, NULL, "extent", damage);
        assert_int_equal(b->result.extent_bytes, sizes[i]);
        begin(b);
        add_bytes(&b->a, 0, sizes[i]);
        add_bytes(&b->a, 1, 1);
        sprintf(damage, "extent 0 %zu %zu\n", end, sizes[i] + 1);
        is_damaged(b, NULL, "extent", damage);
    }
}

static void zeros_behind_the_last_extent_are_told(void **state)
{
    struct bench *b = *state;
    static const size_t sizes[] = {1, 511, 512, 513, 200000};
    for (unsigned i = 0; i < 5; i++) {
        begin(b);
        char words[64];
        sprintf(words, "%zu zeros behind the last extent, at offset %zu", sizes[i], b->a.len);
        add_bytes(&b->a, 0, sizes[i]);
        store(b);
        ok(extract(b, (struct dr_vma_extract_options){0}, &err));
        assert_non_null(strstr(b->warnings, words));
        assert_string_equal(b->damage, "");
    }
}

static void salvage_finds_the_next_extent(void **state)
{
    struct bench *b = *state;
    char damage[128];
    begin(b);
    size_t at = b->a.extents[2], n = 3 * 512 + 150 * 4096; /* beyond a window */
    add_bytes(&b->a, 0, n);
    memmove(b->a.buf + at + n, b->a.buf + at, b->a.len - n - at);
    memset(b->a.buf + at, 'V', n);
    /* of another archive, and one of ours that is broken */
    memcpy(b->a.buf + at + 512, b->a.buf + b->a.extents[0], 512);
    b->a.buf[at + 512 + 8] ^= 1;
    memcpy(b->a.buf + at + 1024, b->a.buf + b->a.extents[0], 512);
    b->a.buf[at + 1024 + 100] ^= 1;
    sprintf(damage, "extent 0 %zu %zu\n", at, n);
    is_damaged(b, NULL, "no extent at offset", damage);
    assert_int_equal(b->result.bytes_read, 4 * 65536);
}

/* ------------------------------------------------------------------ clusters that must not be */

static void duplicates_are_refused_and_the_first_counts(void **state)
{
    struct bench *b = *state;
    begin(b);
    struct vma_slot again[] = {{1, 2, 0xffff, 0}, {1, 3, 0, 0}};
    add_extent(&b->a, again, 2, false);
    is_damaged(b, "duplicate 1 131072 65536\n", "131072 are there twice",
               "duplicate 1 131072 131072\n");
    assert_int_equal(b->result.duplicate_bytes, 131072);
    assert_int_equal(b->result.bytes_read, 4 * 65536);
    begin(b);
    b->a.len = b->a.extents[3];
    b->a.n_extents--;
    struct vma_slot twice[] = {{1, 3, 0x0808, 0}, {1, 3, 0xf000, 0}};
    memset(b->a.image[1] + 3 * 65536, 0, 65536);
    add_extent(&b->a, twice, 1, true);
    b->a.len = b->a.extents[3];
    b->a.n_extents--;
    add_extent(&b->a, twice, 2, false);
    is_damaged(b, "duplicate 1 196608 65536\n", "196608 are there twice",
               "duplicate 1 196608 65536\n");
}

static void clusters_of_nothing_are_refused(void **state)
{
    struct bench *b = *state;
    char damage[64];
    begin(b);
    sprintf(damage, "extent 0 %zu 512\n", b->a.len);
    struct vma_slot other[] = {{2, 0, 0xffff, 0}, {3, 0, 0, 0}};
    add_extent(&b->a, other, 2, false);
    is_damaged(b, damage, "device 2 is not in the header", damage);
    static const uint16_t masks[] = {0, 1, 0xffff};
    for (unsigned i = 0; i < 3; i++) {
        begin(b);
        struct vma_slot beyond[] = {{1, 4, masks[i], 0}};
        add_extent(&b->a, beyond, 1, false);
        is_damaged(b, damage, "cluster 4 of device 1 ('drive-scsi0'), which has only 4", damage);
    }
}

static void blocks_behind_the_disk_are_cut(void **state)
{
    struct bench *b = *state;
    static const uint16_t masks[] = {0xffff, 0x00f1, 0x8000};
    for (unsigned i = 0; i < 3; i++) {
        empty_archive(&b->a);
        add_disk(&b->a, 1, "d", 65536 + 100);
        end_header(&b->a);
        struct vma_slot s[] = {{1, 1, masks[i], 0}, {1, 0, 0x0101, 0}};
        add_extent(&b->a, s, 2, true);
        store(b);
        struct dr_vma_target t = target(b, 1, 3 * 65536, 0x99);
        ok(extract(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, &err));
        expect_image(b, &t, 0x99);
        end_target(&t);
    }
}

static void a_state_comes_in_order(void **state)
{
    struct bench *b = *state;
    add_disk(&b->a, 1, "vmstate", 3 * 65536);
    end_header(&b->a);
    static const uint32_t order[] = {0, 2, 1, 3};
    for (unsigned i = 0; i < 4; i++)
        add_extent(&b->a, &(struct vma_slot){1, order[i], 1, 0}, 1, true);
    char strict[64];
    sprintf(strict, "extent 0 %zu 512\n", b->a.extents[1]);
    is_damaged(b, strict, "cluster 2 of the machine's state, expected 1",
               "missing 1 65536 65536\nduplicate 1 65536 65536\n");
}

/* ------------------------------------------------------------------ checksums */

static struct vma_sums *new_sums(struct bench *b, const char *path)
{
    struct vma_sums *s;
    struct dr_file *file;
    ok(dr_file_open(b->fs, path, DR_FILE_CREATE, &file, &err));
    ok(vma_sums_create(file, &b->a.header, &s, &err));
    dr_file_unref(file);
    return s;
}

static void write_sums(struct bench *b, const char *path)
{
    struct vma_sums *s = new_sums(b, path);
    for (uint32_t c = 0; c < 4; c++)
        if (!dr_is_zero(b->a.image[1] + c * 65536, 65536))
            ok(vma_sums_put(s, 1, c, vma_sum_of(b->a.image[1] + c * 65536), &err));
    ok(vma_sums_finish(s, &err));
    vma_sums_close(s);
}

static void checksums_find_flipped_bits(void **state)
{
    struct bench *b = *state;
    struct dr_vma_extract_options o = {0};
    begin(b);
    write_sums(b, ARCHIVE ".sums");
    store(b);
    ok(extract(b, o, &err));
    assert_true(b->result.sums_used);
    for (unsigned i = 0; i < 4; i++) {
        size_t off = i == 2 ? 0 : b->a.extents[i] + 512 + i * 1000;
        if (!off)
            continue; /* nothing is stored there */
        char damage[64];
        sprintf(damage, "checksum 1 %u 65536\n", i * 65536);
        b->a.buf[off] ^= 4;
        store(b);
        refuse(b, o, damage, "do not fit their checksums");
        salvage(b, o, damage);
        assert_int_equal(b->result.checksum_bytes, 65536);
        b->a.buf[off] ^= 4;
    }
    b->a.buf[b->a.extents[0] + 512] ^= 4;
    store(b);
    ok(extract(b, (struct dr_vma_extract_options){.no_sums = true}, &err));
    assert_false(b->result.sums_used);
    ok(extract(b, (struct dr_vma_extract_options){.headers_only = true}, &err));
    assert_false(b->result.sums_used);
}

static void checksums_tell_zeros_from_data(void **state)
{
    struct bench *b = *state;
    struct dr_vma_extract_options o = {.sums = "/other"};
    begin(b);
    memset(b->a.image[1] + 2 * 65536, 7, 65536); /* there was data where the archive has zeros */
    write_sums(b, "/other");
    store(b);
    refuse(b, o, "checksum 1 131072 65536\n", "offset 131072");
    ok(extract(b, (struct dr_vma_extract_options){0}, &err)); /* found under its own name only */
    begin(b);
    forget(&b->a, 1, 3); /* there were zeros where it has data */
    write_sums(b, "/zeros");
    o.sums = "/zeros";
    refuse(b, o, "checksum 1 196608 65536\n", "offset 196608");
}

static void checksums_end_with_the_disk(void **state)
{
    struct bench *b = *state;
    uint8_t cluster[65536] = {0};
    add_disk(&b->a, 1, "d", 5120); /* a block and a quarter, stored as two */
    end_header(&b->a);
    add_extent(&b->a, &(struct vma_slot){1, 0, 0xffff, 0}, 1, true);
    memcpy(cluster, b->a.image[1], 5120);
    struct vma_sums *sums = new_sums(b, ARCHIVE ".sums");
    ok(vma_sums_put(sums, 1, 0, vma_sum_of(cluster), &err));
    ok(vma_sums_finish(sums, &err));
    vma_sums_close(sums);
    store(b);
    struct dr_vma_target t = target(b, 1, 5120, 0);
    ok(extract(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, &err));
    assert_true(b->result.sums_used);
    expect_image(b, &t, 0);
    end_target(&t);
    b->a.buf[b->a.extents[0] + 512 + 5119] ^= 1;
    store(b);
    refuse(b, (struct dr_vma_extract_options){0}, "checksum 1 0 5120\n", "5120 bytes at offset 0");
}

static void checksums_of_another_archive_are_not_used(void **state)
{
    struct bench *b = *state;
    begin(b);
    b->a.header.ctime = 1;
    write_sums(b, ARCHIVE ".sums");
    store(b);
    ok(extract(b, (struct dr_vma_extract_options){0}, &err));
    assert_false(b->result.sums_used);
    assert_non_null(strstr(b->warnings, "checksums are not used"));
    struct dr_error err = DR_ERROR_INIT;
    struct dr_vma_extract_options o = {.sums = ARCHIVE ".sums"};
    assert_int_equal(extract(b, o, &err), -ESTALE);
    err = (struct dr_error)DR_ERROR_INIT;
    o.sums = "/none";
    assert_int_equal(extract(b, o, &err), -ENOENT);
}

/* ------------------------------------------------------------------ comparing */

static void disks_are_compared(void **state)
{
    struct bench *b = *state;
    begin(b);
    store(b);
    struct dr_vma_target t = target(b, 1, 4 * 65536 + 512, 0);
    ok(extract(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, &err));
    t.compare = true;
    struct dr_vma_extract_options o = {.targets = &t, .n_targets = 1};
    ok(extract(b, o, &err));
    assert_string_equal(b->damage, "");
    uint8_t x = 0xee;
    ok(dr_pwrite(t.disk, &x, 4 * 65536 + 100, 1, 0, &err)); /* behind the archived disk's end */
    ok(extract(b, o, &err));
    static const struct {
        uint64_t at, off;
    } poke[] = {{0, 0},
                {65536 + 4096, 65536 + 4096},
                {2 * 65536 + 5000, 2 * 65536 + 4096},
                {4 * 65536 - 1, 4 * 65536 - 4096}};
    for (unsigned i = 0; i < 4; i++) {
        uint8_t old;
        char damage[64];
        sprintf(damage, "differs 1 %llu 4096\n", (unsigned long long)poke[i].off);
        ok(dr_pread(t.disk, &old, poke[i].at, 1, &err));
        ok(dr_pwrite(t.disk, &x, poke[i].at, 1, 0, &err));
        refuse(b, o, damage, "differ from what they are compared with");
        salvage(b, o, damage);
        assert_int_equal(b->result.different_bytes, 4096);
        ok(dr_pwrite(t.disk, &old, poke[i].at, 1, 0, &err));
    }
    end_target(&t);
}

/* ------------------------------------------------------------------ bytes that cannot be read */

struct bad {
    uint64_t from, to;
    int error; /* 0 = EIO */
};

static int fail_range(void *user, const struct faultfs_io *io)
{
    const struct bad *bad = user;
    return io->kind == FAULTFS_READ && strcmp(io->path, ARCHIVE) == 0 && io->off < bad->to &&
                   io->off + io->len > bad->from
               ? -(bad->error ? bad->error : EIO)
               : 0;
}

static void unreadable_data_is_missing(void **state)
{
    struct bench *b = *state;
    begin(b);
    store(b);
    struct dr_fs *memory = b->fs;
    struct bad bad = {b->a.extents[1] + 600, b->a.extents[1] + 601, 0};
    struct faultfs *f = faultfs_new(memory);
    b->fs = faultfs_fs(f);
    faultfs_observe(f, fail_range, &bad);
    struct dr_vma_target t = target(b, 1, 4 * 65536, 0);
    struct dr_vma_extract_options o = {.targets = &t, .n_targets = 1};
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(extract(b, o, &err), -EIO);
    bad.error = ENOTCONN; /* which is no damage: a salvage does not give the bytes up */
    o.salvage = true;
    assert_int_equal(extract(b, o, NULL), -ENOTCONN);
    assert_string_equal(b->damage, "");
    bad.error = 0;
    salvage(b, o, "missing 1 65536 65536\n");
    forget(&b->a, 1, 1);
    expect_image(b, &t, 0);
    end_target(&t);
    b->fs = memory;
    faultfs_free(f);
}

/* Clusters that stand together are read together. Of what the target held, nothing is left. */
static void only_the_cluster_that_cannot_be_read_is_missing(void **state)
{
    struct bench *b = *state;
    for (unsigned lost = 0; lost < 3; lost++) {
        struct vma_slot slots[3];
        char damage[64];
        empty_archive(&b->a);
        add_disk(&b->a, 1, "disk", 3 * 65536);
        end_header(&b->a);
        for (unsigned i = 0; i < 3; i++)
            slots[i] = (struct vma_slot){.id = 1, .cluster = i, .mask = 0xffff};
        add_extent(&b->a, slots, 3, true);
        store(b);
        struct dr_fs *memory = b->fs;
        uint64_t at = b->a.extents[0] + 512 + lost * 65536 + 5000;
        struct bad bad = {at, at + 1, 0};
        struct faultfs *f = faultfs_new(memory);
        b->fs = faultfs_fs(f);
        faultfs_observe(f, fail_range, &bad);
        struct dr_vma_target t = target(b, 1, 3 * 65536, lost ? 0xaa : 0);
        snprintf(damage, sizeof(damage), "missing 1 %u 65536\n", lost * 65536);
        salvage(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, damage);
        forget(&b->a, 1, lost);
        expect_image(b, &t, 0);
        end_target(&t);
        b->fs = memory;
        faultfs_free(f);
    }
}

static void unreadable_headers_are_stepped_over(void **state)
{
    struct bench *b = *state;
    char damage[128];
    begin(b);
    store(b);
    struct dr_fs *memory = b->fs;
    struct bad bad = {b->a.extents[1] + 100, b->a.extents[1] + 101, 0};
    struct faultfs *f = faultfs_new(memory);
    b->fs = faultfs_fs(f);
    faultfs_observe(f, fail_range, &bad);
    struct dr_vma_target t = target(b, 1, 4 * 65536, 0);
    struct dr_vma_extract_options o = {.targets = &t, .n_targets = 1};
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(extract(b, o, &err), -EIO);
    sprintf(damage, "extent 0 %zu %zu\nmissing 1 65536 65536\n", b->a.extents[1],
            b->a.extents[2] - b->a.extents[1]);
    salvage(b, o, damage);
    forget(&b->a, 1, 1);
    expect_image(b, &t, 0);
    end_target(&t);
    b->fs = memory;
    faultfs_free(f);
}

static void failing_targets_fail_the_run(void **state)
{
    struct bench *b = *state;
    begin(b);
    store(b);
    struct faultfs *f = faultfs_new(b->fs);
    struct dr_fs *memory = b->fs;
    b->fs = faultfs_fs(f);
    for (uint64_t i = 0; i < 100; i++) {
        struct dr_vma_target t = target(b, 1, 4 * 65536, 0x31);
        faultfs_arm(f, &(struct faultfs_plan){.nth = i, .error = ENOSPC});
        struct dr_error err = DR_ERROR_INIT;
        int r = extract(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1}, &err);
        bool fired = faultfs_fired(f);
        faultfs_disarm(f);
        if (r == 0)
            expect_image(b, &t, 0x31);
        else
            assert_true(fired && err.text[0]);
        dr_close(t.disk, NULL);
        if (!fired) {
            assert_true(i > 8);
            break;
        }
    }
    b->fs = memory;
    faultfs_free(f);
}

/* ------------------------------------------------------------------ the bitmap alone */

static void gaps_between_seen_clusters(void **state)
{
    (void)state;
    struct vma_seen s = {{0}};
    struct vma_seen_budget budget = {0};
    uint64_t first, n;
    static const uint32_t seen[] = {0, 1, 63, 64, 32767, 32768, 40000, 1u << 24, 0xffffffff};
    assert_true(vma_seen_gap(&s, 0, 10, &first, &n));
    assert_int_equal(n, 10);
    for (unsigned i = 0; i < 9; i++) {
        assert_int_equal(vma_seen_add(&s, seen[i], &budget), 0);
        assert_int_equal(vma_seen_add(&s, seen[i], &budget), 1);
    }
    assert_int_equal(budget.clusters, 9);
    uint64_t gaps = 0, total = 0;
    for (uint64_t from = 0; vma_seen_gap(&s, from, 1ull << 32, &first, &n); from = first + n) {
        gaps++;
        total += n;
    }
    assert_int_equal(gaps, 5);
    assert_int_equal(total, (1ull << 32) - 9);
    assert_false(vma_seen_gap(&s, 0, 2, &first, &n));
    assert_true(vma_seen_gap(&s, 5, 40001, &first, &n));
    assert_int_equal(first, 5);
    assert_int_equal(n, 58);
    vma_seen_free(&s);
}

static void scattered_clusters_end_at_a_budget(void **state)
{
    (void)state;
    struct vma_seen s = {{0}};
    struct vma_seen_budget budget = {.used = VMA_SEEN_FREE - 16384};
    uint32_t i = 0;
    while (i < 100 && vma_seen_add(&s, i << 15, &budget) == 0)
        i++;
    assert_int_equal(i, 3); /* and a directory */
    assert_int_equal(vma_seen_add(&s, i << 15, &budget), -E2BIG);
    for (uint32_t k = 1; k <= 8192; k++)
        assert_int_equal(vma_seen_add(&s, k, &budget), 0);
    assert_int_equal(vma_seen_add(&s, i << 15, &budget), 0); /* it grows with what is honest */
    vma_seen_free(&s);
}

#define BOTH(f)                                           \
    {#f, f, setup, teardown, NULL},                       \
    {                                                     \
#f " in order", f, setup_in_order, teardown, NULL \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(missing_clusters_are_found),
        BOTH(missing_clusters_of_disks_nobody_wants_are_found),
        cmocka_unit_test_setup_teardown(huge_disks_cost_no_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(names_are_escaped, setup, teardown),
        BOTH(every_truncation_is_found),
        BOTH(complete_clusters_of_a_cut_extent_are_saved),
        BOTH(every_flipped_byte_of_extent_headers_is_found),
        BOTH(what_follows_must_be_extents),
        BOTH(zeros_behind_the_last_extent_are_told),
        BOTH(salvage_finds_the_next_extent),
        BOTH(duplicates_are_refused_and_the_first_counts),
        BOTH(clusters_of_nothing_are_refused),
        BOTH(blocks_behind_the_disk_are_cut),
        cmocka_unit_test_setup_teardown(a_state_comes_in_order, setup, teardown),
        BOTH(checksums_find_flipped_bits),
        BOTH(checksums_tell_zeros_from_data),
        BOTH(checksums_end_with_the_disk),
        BOTH(checksums_of_another_archive_are_not_used),
        BOTH(disks_are_compared),
        cmocka_unit_test_setup_teardown(unreadable_data_is_missing, setup, teardown),
        cmocka_unit_test_setup_teardown(only_the_cluster_that_cannot_be_read_is_missing, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(unreadable_headers_are_stepped_over, setup, teardown),
        BOTH(failing_targets_fail_the_run),
        cmocka_unit_test(gaps_between_seen_clusters),
        cmocka_unit_test(scattered_clusters_end_at_a_budget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
