/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-sums.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "core/core.h"
#include "core/publish.h"

#define MAGIC      "DRDSKSUM"
#define VERSION    1u
#define HEADER     64u
#define AT_VERSION 8u
#define AT_KIND    12u
#define AT_SIZE    16u
#define AT_N       24u
#define AT_DIGEST  32u
#define AT_OWN     48u
#define TABLE_AT   4096u
#define BLOCK      4096u            /* of the table: those of zeros are holes of the file */
#define PIECE      (256u * 1024)    /* of the table, written or read at once */
#define LARGEST    (INT64_MAX / 32) /* disk: its table still fits into a file */

/* ------------------------------------------------------------------ sums */

#define SUM    16u /* bytes of an XXH3-128 */
#define SHA256 32u

static void put_hash(uint8_t *to, XXH128_hash_t h)
{
    put_le64(to, h.low64);
    put_le64(to + 8, h.high64);
}

static uint64_t grains_of(uint64_t size)
{
    return size / DR_SUMS_GRAIN + (size % DR_SUMS_GRAIN != 0);
}

static size_t width(const struct dr_sums *s)
{
    return s->kind == DR_CHECKSUM_SHA256 ? SHA256 : SUM;
}

static size_t table_len(const struct dr_sums *s)
{
    return (size_t)s->n * width(s);
}

static int no_memory(struct dr_error *err, uint64_t size)
{
    return dr_fail(err, ENOMEM, "out of memory for the checksums of %llu bytes",
                   (unsigned long long)size);
}

int dr_sums_begin_as(struct dr_sums *s, enum dr_checksum kind, uint64_t size, struct dr_error *err)
{
    *s = (struct dr_sums){.size = size, .n = grains_of(size), .kind = kind};
    s->table = calloc((size_t)s->n + 1, width(s));
    return s->table ? 0 : no_memory(err, size);
}

int dr_sums_begin(struct dr_sums *s, uint64_t size, struct dr_error *err)
{
    return dr_sums_begin_as(s, DR_CHECKSUM_XXH3, size, err);
}

void dr_sums_end(struct dr_sums *s)
{
    free(s->table);
    *s = (struct dr_sums){0};
}

int dr_sums_resize(struct dr_sums *s, uint64_t size, struct dr_error *err)
{
    uint64_t n = grains_of(size);
    uint8_t *table = n == s->n ? s->table : realloc(s->table, (size_t)(n + 1) * width(s));
    if (!table)
        return no_memory(err, size);
    if (n > s->n)
        memset(table + s->n * width(s), 0, (size_t)(n - s->n) * width(s));
    s->size = size;
    s->n = n;
    s->table = table;
    return 0;
}

uint64_t dr_sums_next(const struct dr_sums *a, const struct dr_sums *b, uint64_t from, bool equal)
{
    size_t w = width(a);
    for (uint64_t i = from / DR_SUMS_GRAIN; i < a->n; i++)
        if ((memcmp(a->table + i * w, b->table + i * w, w) == 0) == equal)
            return i * DR_SUMS_GRAIN;
    return a->size;
}

static bool sha256(const void *data, size_t len, uint8_t *to)
{
    unsigned n = SHA256;
    return EVP_Digest(data, len, to, &n, EVP_sha256(), NULL) == 1;
}

static int no_sha256(struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "libcrypto cannot compute a SHA-256");
}

/* Zeros stand for a grain of zeros, and for nothing else. */
static int put_whole(enum dr_checksum kind, uint8_t *to, const uint8_t *grain)
{
    if (kind == DR_CHECKSUM_SHA256)
        return sha256(grain, DR_SUMS_GRAIN, to) ? 0 : -ENOMEM;
    XXH128_hash_t h = XXH3_128bits(grain, DR_SUMS_GRAIN);
    if (h.low64 == 0 && h.high64 == 0)
        h.low64 = 1;
    put_hash(to, h);
    return 0;
}

static int put_one(struct dr_sums *s, uint64_t off, const uint8_t *buf, size_t len)
{
    uint8_t padded[DR_SUMS_GRAIN], *to = s->table + off / DR_SUMS_GRAIN * width(s);
    if (!buf || dr_is_zero(buf, len)) {
        memset(to, 0, width(s));
        return 0;
    }
    if (len == DR_SUMS_GRAIN)
        return put_whole(s->kind, to, buf);
    memcpy(padded, buf, len); /* behind the end of the disk there are zeros */
    memset(padded + len, 0, sizeof(padded) - len);
    return put_whole(s->kind, to, padded);
}

int dr_sums_put(struct dr_sums *s, uint64_t off, const uint8_t *buf, uint64_t len,
                struct dr_error *err)
{
    int r = 0;
    for (uint64_t done = 0; r == 0 && done < len; done += DR_SUMS_GRAIN)
        r = put_one(s, off + done, buf ? buf + done : NULL,
                    (size_t)dr_min(DR_SUMS_GRAIN, len - done));
    return r < 0 ? no_sha256(err) : 0;
}

void dr_sums_put_xxh3(const struct dr_sums *s, uint64_t grain, uint64_t low, uint64_t high)
{
    put_hash(s->table + grain * width(s), (XXH128_hash_t){.low64 = low, .high64 = high});
}

void dr_sums_digest(const struct dr_sums *s, char *text)
{
    XXH128_hash_t h = XXH3_128bits(s->table, table_len(s));
    snprintf(text, DR_DIGEST_TEXT, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
}

int dr_sums_digest_any(const struct dr_sums *s, char *text, struct dr_error *err)
{
    uint8_t sum[SHA256];
    if (s->kind == DR_CHECKSUM_XXH3) {
        dr_sums_digest(s, text);
        return 0;
    }
    if (!sha256(s->table, table_len(s), sum))
        return no_sha256(err);
    for (size_t i = 0; i < SHA256; i++)
        snprintf(text + 2 * i, 3, "%02x", sum[i]);
    return 0;
}

/* ------------------------------------------------------------------ the side file */

char *dr_sums_path(const char *path)
{
    char *name;
    return asprintf(&name, "%s.sums", path) < 0 ? NULL : name;
}

static void make_header(const struct dr_sums *s, uint8_t *h)
{
    memset(h, 0, HEADER);
    memcpy(h, MAGIC, 8);
    put_le32(h + AT_VERSION, VERSION);
    put_le32(h + AT_KIND, s->kind);
    put_le64(h + AT_SIZE, s->size);
    put_le64(h + AT_N, s->n);
    put_hash(h + AT_DIGEST, XXH3_128bits(s->table, table_len(s)));
    put_hash(h + AT_OWN, XXH3_128bits(h, HEADER));
}

/* Only what is not zeros is written. */
static int write_table(const struct dr_sums *s, struct dr_file *file, struct dr_error *err)
{
    uint64_t len = table_len(s);
    int r = 0;
    for (uint64_t off = 0, end; r == 0 && off < len; off = end) {
        bool zero = dr_is_zero(s->table + off, (size_t)dr_min(BLOCK, len - off));
        end = dr_min(off + BLOCK, len);
        while (!zero && end < len && end - off < PIECE &&
               !dr_is_zero(s->table + end, (size_t)dr_min(BLOCK, len - end)))
            end = dr_min(end + BLOCK, len);
        if (!zero)
            r = dr_file_pwrite(file, s->table + off, TABLE_AT + off, (size_t)(end - off), err);
    }
    return r;
}

static int write_file(const struct dr_sums *s, struct dr_file *file, struct dr_error *err)
{
    uint8_t header[HEADER];
    make_header(s, header);
    int r = dr_file_truncate(file, TABLE_AT + table_len(s), err);
    if (r == 0)
        r = dr_file_pwrite(file, header, 0, HEADER, err);
    return r < 0 ? r : write_table(s, file, err);
}

/* Another file by that name may be anything: only one of this kind gives way. */
static int open_old(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **old,
                    struct dr_error *err)
{
    uint8_t magic[8];
    size_t got = 0;
    if (!dr_fs_exists(fs, path))
        return 0;
    int r = dr_file_open(fs, path, DR_FILE_RDWR | flags, old, err);
    if (r == 0)
        r = dr_file_pread_short(*old, magic, 0, sizeof(magic), &got, err);
    if (r == 0 && (got < sizeof(magic) || memcmp(magic, MAGIC, sizeof(magic)) != 0))
        r = dr_fail(err, EEXIST, "%s: exists already, and holds no checksums of a disk", path);
    if (r < 0)
        dr_file_unref(DR_STEAL(*old));
    return r;
}

/* image: NULL, or what must not be there when the side file gets its name. held may be NULL. */
static int save(const struct dr_sums *s, struct dr_fs *fs, const char *path, unsigned flags,
                const char *image, struct dr_file **held, struct dr_error *err)
{
    struct dr_file *old = NULL;
    struct dr_temp temp = {0};
    struct dr_error why = DR_ERROR_INIT;
    int r = open_old(fs, path, flags, &old, &why);
    if (r < 0)
        return image && (r == -EAGAIN || r == -EBUSY)
                   ? dr_fail(err, EEXIST, "%s: somebody else is making it, too: %s", image,
                             why.text)
                   : dr_fail(err, -r, "%s", why.text);
    if (image && dr_fs_exists(fs, image))
        r = dr_fail(err, EEXIST, "%s: exists by now: somebody else made it meanwhile", image);
    if (r == 0)
        r = dr_temp_create(&temp, fs, path, old, NULL, err);
    if (r == 0)
        r = write_file(s, temp.file, err);
    if (r == 0)
        r = dr_temp_publish(&temp, err);
    if (held && temp.file && !temp.temp) /* after a failure its name may not last */
        *held = DR_STEAL(temp.file);
    dr_temp_end(&temp);
    dr_file_unref(old);
    return r;
}

int dr_sums_save(const struct dr_sums *s, struct dr_fs *fs, const char *path, unsigned flags,
                 struct dr_error *err)
{
    return save(s, fs, path, flags, NULL, NULL, err);
}

int dr_sums_save_for(const struct dr_sums *s, struct dr_fs *fs, const char *path, unsigned flags,
                     struct dr_file **held, struct dr_error *err)
{
    CLEANUP_FREE char *side = dr_sums_path(path);
    *held = NULL;
    return side ? save(s, fs, side, flags, path, held, err)
                : dr_fail(err, ENOMEM, "%s: out of memory", path);
}

static int bad(struct dr_error *err, const char *path, const char *what)
{
    return dr_fail(err, EINVAL, "%s: no checksums of a disk, or damaged: %s", path, what);
}

static int read_table(struct dr_sums *s, struct dr_file *file, struct dr_error *err)
{
    uint64_t len = table_len(s);
    for (uint64_t off = 0, run; off < len; off += run) {
        enum dr_file_extent kind;
        int r = dr_file_extent(file, TABLE_AT + off, len - off, &kind, &run, err);
        if (r == 0 && kind != DR_FILE_HOLE) {
            run = dr_min(run, PIECE);
            r = dr_file_pread(file, s->table + off, TABLE_AT + off, (size_t)run, err);
        }
        if (r < 0)
            return r;
    }
    return 0;
}

static int read_header(struct dr_file *file, const char *path, uint8_t *header,
                       struct dr_error *err)
{
    uint8_t own[HEADER];
    size_t got = 0;
    int r = dr_file_pread_short(file, header, 0, HEADER, &got, err);
    if (r < 0)
        return r;
    if (got < HEADER || memcmp(header, MAGIC, 8) != 0)
        return bad(err, path, "the first 8 bytes are not " MAGIC);
    memcpy(own, header, HEADER);
    memset(own + AT_OWN, 0, SUM);
    put_hash(own + AT_OWN, XXH3_128bits(own, HEADER));
    if (memcmp(own, header, HEADER) != 0)
        return bad(err, path, "the checksum of its header at 48 is another one");
    return 0;
}

static int read_file(struct dr_sums *s, struct dr_file *file, const char *path,
                     struct dr_error *err)
{
    uint8_t header[HEADER], own[HEADER];
    int r = read_header(file, path, header, err);
    if (r < 0)
        return r;
    uint64_t size = get_le64(header + AT_SIZE);
    if (get_le32(header + AT_VERSION) != VERSION || size > LARGEST)
        return bad(err, path, "its version or the size of the disk is not known");
    uint64_t n = grains_of(size);
    uint32_t kind = get_le32(header + AT_KIND);
    if (kind > DR_CHECKSUM_SHA256)
        return bad(err, path, "the kind of its checksums at 12 is not known");
    *s = (struct dr_sums){.n = n, .kind = (enum dr_checksum)kind};
    if (get_le64(header + AT_N) != n || dr_file_size(file) != TABLE_AT + table_len(s))
        return bad(err, path, "its length is not that of the table");
    r = dr_sums_begin_as(s, s->kind, size, err);
    if (r == 0)
        r = read_table(s, file, err);
    if (r < 0)
        return r;
    make_header(s, own);
    return memcmp(own, header, HEADER) == 0 ? 0 : bad(err, path, "the table has another digest");
}

int dr_sums_is(struct dr_fs *fs, const char *path, bool *is, struct dr_error *err)
{
    struct dr_file *file = NULL;
    uint8_t header[HEADER];
    *is = false;
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, err);
    if (r < 0)
        return r;
    r = read_header(file, path, header, err);
    dr_file_unref(file);
    *is = r == 0;
    return r == -EINVAL ? 0 : r;
}

int dr_sums_load_size(struct dr_fs *fs, const char *path, uint64_t *size, struct dr_error *err)
{
    struct dr_file *file = NULL;
    uint8_t header[HEADER];
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, err);
    if (r == 0)
        r = read_header(file, path, header, err);
    if (r == 0)
        *size = get_le64(header + AT_SIZE);
    if (r == 0 && get_le32(header + AT_VERSION) != VERSION)
        r = bad(err, path, "its version is not known");
    dr_file_unref(file);
    return r;
}

int dr_sums_load_any(struct dr_sums *s, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_file *file = NULL;
    *s = (struct dr_sums){0};
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, err);
    if (r == 0)
        r = read_file(s, file, path, err);
    dr_file_unref(file);
    if (r < 0)
        dr_sums_end(s);
    return r;
}

int dr_sums_load(struct dr_sums *s, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    int r = dr_sums_load_any(s, fs, path, err);
    if (r == 0 && s->kind != DR_CHECKSUM_XXH3) {
        dr_sums_end(s);
        r = bad(err, path, "a backup has checksums of the kind 0 (at 12)");
    }
    return r;
}
