/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A bit flipped in every byte of small packed disks and archives. Without salvage, what comes out
 * is right or the work is refused. With salvage, each byte that comes out is right, or is in a
 * range that is told. */
#include "test-vma-archive.h"

#include <bzlib.h>
#include <lz4frame.h>
#include <lzma.h>
#include <lzo/lzo1x.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#define PIECE  1024u
#define DISK   (3 * PIECE + 512) /* bytes of the raw disk */
#define MAGIC  9u                /* bytes by which a packer is known */
#define PACKED "/p"
#define OUT    "/o"
#define RANGES 64u
#define ROOM   (128u << 10)

/* ------------------------------------------------------------------ packers */

struct bytes {
    uint8_t *p;
    size_t n;
};

static void add(struct bytes *b, const void *p, size_t n)
{
    b->p = realloc(b->p, b->n + n);
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

static void add_be32(struct bytes *b, uint32_t v)
{
    uint8_t raw[4];
    put_be32(raw, v);
    add(b, raw, 4);
}

static uint8_t scratch[ROOM];

static void gzip_member(struct bytes *out, const uint8_t *p, size_t n)
{
    z_stream z = {.next_in = (Bytef *)p, .avail_in = (uInt)n, .next_out = scratch};
    z.avail_out = ROOM;
    assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    add(out, scratch, z.total_out);
    deflateEnd(&z);
}

static void gzip(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    for (size_t at = 0; at < n; at += piece)
        gzip_member(out, p + at, dr_min(piece, n - at));
}

static void bgzip_member(struct bytes *out, const uint8_t *p, size_t n)
{
    uint8_t head[18] = {0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 6, 0, 'B', 'C', 2, 0}, tail[8];
    z_stream z = {.next_in = (Bytef *)p, .avail_in = (uInt)n, .next_out = scratch};
    z.avail_out = ROOM;
    assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, -15, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    put_le16(head + 16, (uint16_t)(z.total_out + 25));
    put_le32(tail, (uint32_t)crc32(0, p, (uInt)n));
    put_le32(tail + 4, (uint32_t)n);
    add(out, head, sizeof(head));
    add(out, scratch, z.total_out);
    add(out, tail, sizeof(tail));
    deflateEnd(&z);
}

static void bgzip(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    for (size_t at = 0; at < n; at += piece)
        bgzip_member(out, p + at, dr_min(piece, n - at));
    bgzip_member(out, p, 0);
}

static void xz(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    lzma_stream x = LZMA_STREAM_INIT;
    assert_int_equal(lzma_easy_encoder(&x, 0, LZMA_CHECK_CRC64), LZMA_OK);
    x.next_out = scratch;
    x.avail_out = ROOM;
    for (size_t at = 0; at < n; at += piece) {
        x.next_in = p + at;
        x.avail_in = dr_min(piece, n - at);
        assert_int_equal(lzma_code(&x, at + piece < n ? LZMA_FULL_FLUSH : LZMA_FINISH),
                         LZMA_STREAM_END);
    }
    add(out, scratch, x.total_out);
    lzma_end(&x);
}

/* As `xz -T` does: the headers of blocks tell sizes. */
static void xz_sizes(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    lzma_stream x = LZMA_STREAM_INIT;
    lzma_mt how = {.threads = 1, .block_size = piece, .check = LZMA_CHECK_CRC32};
    assert_int_equal(lzma_stream_encoder_mt(&x, &how), LZMA_OK);
    x.next_in = p;
    x.avail_in = n;
    x.next_out = scratch;
    x.avail_out = ROOM;
    assert_int_equal(lzma_code(&x, LZMA_FINISH), LZMA_STREAM_END);
    add(out, scratch, x.total_out);
    lzma_end(&x);
}

static void zstd_frames(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 1);
    for (size_t at = 0; at < n; at += piece) {
        size_t used = ZSTD_compress2(c, scratch, ROOM, p + at, dr_min(piece, n - at));
        assert_false(ZSTD_isError(used));
        add(out, scratch, used);
    }
    ZSTD_freeCCtx(c);
}

/* The longer ones are not all equally long, either. */
static void zstd_mixed(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    for (size_t at = 0, i = 0, len; at < n; at += len, i++) {
        len = dr_min(i % 2 ? piece - 64 * i : piece, n - at);
        zstd_frames(out, p + at, len, len);
    }
}

static void zstd_table(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    struct bytes table = {0};
    uint8_t raw[8], foot[9] = {0};
    for (size_t at = 0, len; at < n; at += len) {
        size_t before = out->n;
        len = dr_min(piece, n - at);
        zstd_frames(out, p + at, len, len);
        put_le32(raw, (uint32_t)(out->n - before));
        put_le32(raw + 4, (uint32_t)len);
        add(&table, raw, 8);
    }
    put_le32(foot, (uint32_t)(table.n / 8));
    put_le32(foot + 5, 0x8f92eab1u);
    add(&table, foot, sizeof(foot));
    put_le32(raw, 0x184d2a5eu);
    put_le32(raw + 4, (uint32_t)table.n);
    add(out, raw, 8);
    add(out, table.p, table.n);
    free(table.p);
}

/* Each flush ends a block, and the next one begins at any bit. */
static void bzip2(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    bz_stream b = {.next_out = (char *)scratch, .avail_out = ROOM};
    assert_int_equal(BZ2_bzCompressInit(&b, 1, 0, 0), BZ_OK);
    for (size_t at = 0; at < n; at += piece) {
        bool last = at + piece >= n;
        b.next_in = (char *)(uintptr_t)p + at;
        b.avail_in = (unsigned)dr_min(piece, n - at);
        assert_int_equal(BZ2_bzCompress(&b, last ? BZ_FINISH : BZ_FLUSH),
                         last ? BZ_STREAM_END : BZ_RUN_OK);
    }
    add(out, scratch, ROOM - b.avail_out);
    BZ2_bzCompressEnd(&b);
}

static void lz4(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    LZ4F_preferences_t how = {.frameInfo = {.contentChecksumFlag = LZ4F_contentChecksumEnabled}};
    for (size_t at = 0; at < n; at += piece) {
        size_t used = LZ4F_compressFrame(scratch, ROOM, p + at, dr_min(piece, n - at), &how);
        assert_false(LZ4F_isError(used));
        add(out, scratch, used);
    }
}

/* As lzop writes by itself: checksums of the plain bytes only. */
static void lzop(struct bytes *out, const uint8_t *p, size_t n, size_t piece)
{
    static uint8_t work[LZO1X_1_MEM_COMPRESS];
    uint8_t head[25] = {0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 1, 5, 0, 0, 0, 1};
    assert_int_equal(lzo_init(), LZO_E_OK);
    add(out, "\x89LZO\0\r\n\x1a\n", 9);
    add(out, head, sizeof(head));
    add_be32(out, lzo_adler32(1, head, sizeof(head)));
    for (size_t at = 0; at < n; at += piece) {
        size_t len = dr_min(piece, n - at);
        lzo_uint used = ROOM;
        assert_int_equal(lzo1x_1_compress(p + at, len, scratch, &used, work), LZO_E_OK);
        /* of a disk the first is stored as it is, which decodes at any place */
        bool shrunk = used < len && (at > 0 || piece != PIECE);
        add_be32(out, (uint32_t)len);
        add_be32(out, (uint32_t)(shrunk ? used : len));
        add_be32(out, lzo_adler32(1, p + at, len));
        add(out, shrunk ? scratch : p + at, shrunk ? used : len);
    }
    add_be32(out, 0);
}

static const struct packer {
    const char *name;
    void (*pack)(struct bytes *out, const uint8_t *p, size_t n, size_t piece);
    bool pieces; /* those that are not damaged can be had */
} packers[] = {
    {"gzip", gzip, false},
    {"bgzip", bgzip, true},
    {"xz", xz, true},
    {"xz, sizes", xz_sizes, true},
    {"zstd", zstd_frames, true},
    {"lzop", lzop, true},
    {"bzip2", bzip2, false},
    {"lz4", lz4, false},
    {"zstd, mixed", zstd_mixed, true},
    {"zstd, table", zstd_table, true},
};

/* ------------------------------------------------------------------ disks */

/* What was told of one salvage. */
struct told {
    uint64_t from[RANGES], to[RANGES];
    unsigned n;
    bool sizes; /* the header may say a wrong one */
};

static void note(struct told *t, uint64_t from, uint64_t to)
{
    assert_true(t->n < RANGES);
    t->from[t->n] = from;
    t->to[t->n++] = to;
}

static void note_salvaged(void *user, const struct dr_salvaged *range)
{
    bool end = range->kind == DR_SALVAGED_END;
    note(user, range->off, end ? UINT64_MAX : range->off + range->len);
}

static bool is_told(const struct told *t, uint64_t at)
{
    for (unsigned i = 0; i < t->n; i++)
        if (at >= t->from[i] && at < t->to[i])
            return true;
    return false;
}

/* What nothing makes much smaller, and what everything does. */
static void fill(uint8_t *p, size_t n)
{
    uint64_t x = 0x2545f4914f6cdd1du;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        p[i] = i % 512 < 64 ? (uint8_t)x : (uint8_t)(1 + i / 512);
    }
}

static int convert(struct dr_fs *fs, bool salvage, struct told *told, struct dr_error *err)
{
    const char *source = PACKED;
    struct dr_job job = {.workers = 1};
    struct dr_convert_options o = {.salvage = salvage,
                                   .sparse_size = DR_CONVERT_SPARSE_DEFAULT,
                                   .unsafe_target = true,
                                   .salvaged = note_salvaged,
                                   .salvaged_user = told};
    return dr_convert_fs(fs, &source, 1, OUT, &o, &job, err);
}

/* The target, ROOM bytes at most. */
static size_t take_out(struct dr_fs *fs, uint8_t *buf)
{
    struct dr_file *f;
    size_t n;
    ok(dr_file_open(fs, OUT, 0, &f, &err));
    ok(dr_file_pread_short(f, buf, 0, ROOM, &n, &err));
    dr_file_unref(f);
    ok(fs->ops->unlink(fs, OUT, &err));
    return n;
}

/* 1: something came out. */
static int try_disk(struct dr_fs *fs, const struct bytes *packed, size_t at, bool salvage,
                    const uint8_t *disk, const char *name)
{
    static uint8_t out[ROOM];
    struct told told = {.n = 0};
    struct dr_error err = DR_ERROR_INIT;
    write_file(fs, PACKED, packed->p, packed->n);
    int r = convert(fs, salvage, &told, &err);
    if (r < 0) {
        if (at < packed->n && r != -EBADMSG && r != -EINVAL && r != -ENOTSUP)
            fail_msg("%s, byte %zu: %d: %s", name, at, r, err.text);
        return 0;
    }
    size_t n = take_out(fs, out);
    if (at < MAGIC && n >= packed->n && memcmp(out, packed->p, packed->n) == 0)
        return 1; /* another kind of file: its bytes, as they are */
    if (!salvage)
        assert_int_equal(told.n, 0);
    if (n > DISK && !is_told(&told, DISK))
        fail_msg("%s, byte %zu: a disk of %zu bytes", name, at, n);
    for (size_t i = 0; i < DISK; i++)
        if ((i >= n || out[i] != disk[i]) && !is_told(&told, i))
            fail_msg("%s, byte %zu%s: wrong at %zu, and not told", name, at,
                     salvage ? ", salvage" : "", i);
    return 1;
}

static void no_wrong_byte_of_a_packed_disk_comes_out_without_a_word(void **state)
{
    struct bench *b = *state;
    uint8_t disk[DISK];
    fill(disk, DISK);
    for (size_t k = 0; k < sizeof(packers) / sizeof(packers[0]); k++) {
        struct bytes packed = {0};
        size_t saved = 0, strict = 0;
        packers[k].pack(&packed, disk, DISK, PIECE);
        assert_int_equal(try_disk(b->fs, &packed, packed.n, false, disk, packers[k].name), 1);
        for (size_t at = 0; at < packed.n; at++) {
            unsigned bit = (3 * at + 4) % 8; /* of lzop's flags: that blocks have checksums */
            packed.p[at] ^= (uint8_t)(1u << bit);
            strict += (size_t)try_disk(b->fs, &packed, at, false, disk, packers[k].name);
            saved += (size_t)try_disk(b->fs, &packed, at, true, disk, packers[k].name);
            packed.p[at] ^= (uint8_t)(1u << bit);
        }
        assert_true(strict < packed.n / 4);
        assert_true(!packers[k].pieces || saved > packed.n - packed.n / 4);
        free(packed.p);
    }
}

/* A packed disk of which the checksum of the last piece is wrong, and no other byte. That is far
 * from what is looked at when a disk is opened. */
static void write_doubtful(struct dr_fs *fs, const uint8_t *disk, size_t n, size_t piece)
{
    struct bytes packed = {0}, frames = {0};
    zstd_table(&packed, disk, n, piece);
    zstd_frames(&frames, disk, n, piece);
    packed.p[frames.n - 1] ^= 1; /* a frame ends with its checksum */
    write_file(fs, PACKED, packed.p, packed.n);
    free(packed.p);
    free(frames.p);
}

static void a_salvage_and_a_reader_of_one_packed_file_do_not_share_what_they_read(void **state)
{
    enum { LEN = 32 << 10, PIECES = 64 };
    struct bench *b = *state;
    uint8_t *disk = malloc(LEN * PIECES), *last = disk + LEN * (PIECES - 1), buf[LEN];
    fill(disk, LEN * PIECES);
    write_doubtful(b->fs, disk, LEN * PIECES, LEN);
    for (unsigned salvage_first = 0; salvage_first < 2; salvage_first++) {
        struct dr_disk *disks[2];
        for (unsigned i = 0; i < 2; i++) {
            bool salvage = (i == 0) == salvage_first;
            struct dr_open_options open = {.flags = salvage ? DR_OPEN_SALVAGE : 0};
            ok(dr_open_fs(b->fs, PACKED, &open, &disks[salvage], &err));
        }
        struct dr_error why = DR_ERROR_INIT;
        ok(dr_pread(disks[1], buf, (uint64_t)(last - disk), LEN, &err));
        assert_memory_equal(buf, last, LEN);
        assert_int_equal(dr_pread(disks[0], buf, (uint64_t)(last - disk), LEN, &why), -EBADMSG);
        dr_close(disks[0], NULL);
        dr_close(disks[1], NULL);
    }
    free(disk);
}

/* ------------------------------------------------------------------ archives */

static void note_vma(void *user, const struct dr_vma_damage *d)
{
    struct told *told = user;
    if (d->id == 1)
        note(told, d->off, d->off + d->len);
    told->sizes = told->sizes || (d->id == 0 && d->kind == DR_VMA_HEADER);
}

/* Clusters of the disk of which nothing is told. */
static size_t untold(const struct told *t, uint64_t size)
{
    size_t n = 0;
    for (uint64_t off = 0; off < size; off += 65536) {
        bool any = false;
        for (unsigned i = 0; i < t->n && !any; i++)
            any = off < t->to[i] && off + 65536 > t->from[i];
        n += !any;
    }
    return n;
}

/* 1: the disk came out, and what is not told of it is right. */
static int try_archive(struct bench *b, const struct bytes *packed, size_t at, const char *name,
                       size_t *kept)
{
    struct dr_vma_open_options open = {.salvage = true, .any_header = true};
    struct told told = {.n = 0};
    struct dr_vma *vma;
    uint8_t *buf;
    write_file(b->fs, ARCHIVE, packed->p, packed->n);
    if (dr_vma_open_fs(b->fs, ARCHIVE, &open, &vma, NULL) < 0)
        return 0;
    const struct dr_vma_disk *disk = vma_header_disk(dr_vma_header(vma), 1);
    uint64_t size = disk ? dr_min(disk->size, 8 * 65536) : 0;
    struct dr_vma_target t = {0};
    struct dr_job job = {.workers = 1};
    struct dr_vma_extract_options o = {
        .targets = &t, .n_targets = 1, .salvage = true, .damage = note_vma, .user = &told};
    if (!disk || disk->size > size) {
        dr_vma_close(vma);
        return 0;
    }
    t = target(b, 1, size, 0);
    ok(dr_vma_extract(vma, &o, &job, NULL, &err));
    dr_vma_close(vma);
    buf = calloc(1, 8 * 65536);
    ok(dr_pread(t.disk, buf, 0, size, &err));
    for (uint64_t i = 0; i < b->a.disks[0].size; i++)
        if (buf[i] != b->a.image[1][i] && !is_told(&told, i) && (i < size || !told.sizes))
            fail_msg("%s, byte %zu: wrong at %llu, and not told", name, at, (unsigned long long)i);
    *kept += untold(&told, b->a.disks[0].size);
    free(buf);
    end_target(&t);
    return 1;
}

static void no_wrong_byte_of_an_archive_comes_out_without_a_word(void **state)
{
    struct bench *b = *state;
    plain_archive(&b->a);
    for (size_t k = 0; k < sizeof(packers) / sizeof(packers[0]); k++) {
        struct bytes packed = {0};
        size_t saved = 0, kept = 0;
        packers[k].pack(&packed, b->a.buf, b->a.len, 8192);
        for (size_t at = 0; at < packed.n; at += 2) {
            packed.p[at] ^= (uint8_t)(1u << at % 8);
            saved += (size_t)try_archive(b, &packed, at, packers[k].name, &kept);
            packed.p[at] ^= (uint8_t)(1u << at % 8);
        }
        assert_true(kept > saved + saved / 2);
        assert_true(!packers[k].pieces || saved > packed.n / 2 - packed.n / 16);
        free(packed.p);
    }
}

static void write_sums(struct bench *b)
{
    struct vma_sums *sums;
    struct dr_file *f;
    ok(dr_file_open(b->fs, ARCHIVE ".sums", DR_FILE_CREATE, &f, &err));
    ok(vma_sums_create(f, &b->a.header, &sums, &err));
    dr_file_unref(f);
    for (uint32_t c = 0; c < 4; c++)
        if (!dr_is_zero(b->a.image[1] + c * 65536, 65536))
            ok(vma_sums_put(sums, 1, c, vma_sum_of(b->a.image[1] + c * 65536), &err));
    ok(vma_sums_finish(sums, &err));
    vma_sums_close(sums);
}

static void no_wrong_byte_of_a_plain_archive_with_checksums_comes_out_without_a_word(void **state)
{
    struct bench *b = *state;
    size_t saved = 0, tries = 0, kept = 0;
    plain_archive(&b->a);
    write_sums(b);
    struct bytes plain = {b->a.buf, b->a.len};
    for (size_t at = 0; at < plain.n; at += at < 5000 && at > 64 ? 97 : 29, tries++) {
        plain.p[at] ^= (uint8_t)(1u << at % 8);
        saved += (size_t)try_archive(b, &plain, at, "plain", &kept);
        plain.p[at] ^= (uint8_t)(1u << at % 8);
    }
    assert_true(saved > tries - tries / 50);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(
            a_salvage_and_a_reader_of_one_packed_file_do_not_share_what_they_read, setup, teardown),
        cmocka_unit_test_setup_teardown(no_wrong_byte_of_a_packed_disk_comes_out_without_a_word,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(no_wrong_byte_of_an_archive_comes_out_without_a_word, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(
            no_wrong_byte_of_a_plain_archive_with_checksums_comes_out_without_a_word, setup,
            teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
