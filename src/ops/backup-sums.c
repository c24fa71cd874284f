/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-sums.h"

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
#define AT_SIZE    16u
#define AT_N       24u
#define AT_DIGEST  32u
#define AT_OWN     48u
#define TABLE_AT   4096u
#define BLOCK      4096u            /* of the table: those of zeros are holes of the file */
#define PIECE      (256u * 1024)    /* of the table, written or read at once */
#define LARGEST    (INT64_MAX / 32) /* disk: its table still fits into a file */

/* ------------------------------------------------------------------ sums */

static void put_hash(uint8_t *to, XXH128_hash_t h)
{
    put_le64(to, h.low64);
    put_le64(to + 8, h.high64);
}

static uint64_t grains_of(uint64_t size)
{
    return size / DR_SUMS_GRAIN + (size % DR_SUMS_GRAIN != 0);
}

int dr_sums_begin(struct dr_sums *s, uint64_t size, struct dr_error *err)
{
    *s = (struct dr_sums){.size = size, .n = grains_of(size)};
    s->table = calloc((size_t)s->n + 1, DR_SUM);
    return s->table ? 0
                    : dr_fail(err, ENOMEM, "out of memory for the checksums of %llu bytes",
                              (unsigned long long)size);
}

void dr_sums_end(struct dr_sums *s)
{
    free(s->table);
    *s = (struct dr_sums){0};
}

int dr_sums_resize(struct dr_sums *s, uint64_t size, struct dr_error *err)
{
    uint64_t n = grains_of(size);
    uint8_t *table = n == s->n ? s->table : realloc(s->table, (size_t)(n + 1) * DR_SUM);
    if (!table)
        return dr_fail(err, ENOMEM, "out of memory for the checksums of %llu bytes",
                       (unsigned long long)size);
    if (n > s->n)
        memset(table + s->n * DR_SUM, 0, (size_t)(n - s->n) * DR_SUM);
    *s = (struct dr_sums){size, n, table};
    return 0;
}

uint64_t dr_sums_differ(const struct dr_sums *a, const struct dr_sums *b)
{
    for (uint64_t i = 0; i < a->n; i++)
        if (memcmp(a->table + i * DR_SUM, b->table + i * DR_SUM, DR_SUM) != 0)
            return i * DR_SUMS_GRAIN;
    return a->size;
}

/* Behind the end of the disk there are zeros. */
static XXH128_hash_t hash_padded(const uint8_t *buf, size_t len)
{
    uint8_t grain[DR_SUMS_GRAIN];
    memcpy(grain, buf, len);
    memset(grain + len, 0, sizeof(grain) - len);
    return XXH3_128bits(grain, sizeof(grain));
}

static void put_one(uint8_t *to, const uint8_t *buf, size_t len)
{
    if (!buf || dr_is_zero(buf, len)) {
        memset(to, 0, DR_SUM);
        return;
    }
    XXH128_hash_t h = len == DR_SUMS_GRAIN ? XXH3_128bits(buf, DR_SUMS_GRAIN)
                                           : hash_padded(buf, len);
    if (h.low64 == 0 && h.high64 == 0)
        h.low64 = 1; /* 0 stands for zeros */
    put_hash(to, h);
}

void dr_sums_put(struct dr_sums *s, uint64_t off, const uint8_t *buf, uint64_t len)
{
    for (uint64_t done = 0; done < len; done += DR_SUMS_GRAIN)
        put_one(s->table + (off + done) / DR_SUMS_GRAIN * DR_SUM, buf ? buf + done : NULL,
                (size_t)dr_min(DR_SUMS_GRAIN, len - done));
}

void dr_sums_digest(const struct dr_sums *s, char *text)
{
    XXH128_hash_t h = XXH3_128bits(s->table, (size_t)s->n * DR_SUM);
    snprintf(text, DR_DIGEST_TEXT, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
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
    put_le64(h + AT_SIZE, s->size);
    put_le64(h + AT_N, s->n);
    put_hash(h + AT_DIGEST, XXH3_128bits(s->table, (size_t)s->n * DR_SUM));
    put_hash(h + AT_OWN, XXH3_128bits(h, HEADER));
}

/* Only what is not zeros is written. */
static int write_table(const struct dr_sums *s, struct dr_file *file, struct dr_error *err)
{
    uint64_t len = s->n * DR_SUM;
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
    int r = dr_file_truncate(file, TABLE_AT + s->n * DR_SUM, err);
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
        r = dr_fail(err, EEXIST, "%s: exists already, and holds no checksums of a backup", path);
    return r;
}

int dr_sums_save(const struct dr_sums *s, struct dr_fs *fs, const char *path, unsigned flags,
                 struct dr_error *err)
{
    struct dr_file *old = NULL;
    struct dr_temp temp = {0};
    int r = open_old(fs, path, flags, &old, err);
    if (r == 0)
        r = dr_temp_create(&temp, fs, path, old, NULL, err);
    if (r == 0)
        r = write_file(s, temp.file, err);
    if (r == 0)
        r = dr_temp_publish(&temp, err);
    dr_temp_end(&temp);
    dr_file_unref(old);
    return r;
}

static int bad(struct dr_error *err, const char *path, const char *what)
{
    return dr_fail(err, EINVAL, "%s: no checksums of a backup, or damaged: %s", path, what);
}

static int read_table(struct dr_sums *s, struct dr_file *file, struct dr_error *err)
{
    uint64_t len = s->n * DR_SUM;
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

static int read_file(struct dr_sums *s, struct dr_file *file, const char *path,
                     struct dr_error *err)
{
    uint8_t header[HEADER], own[HEADER];
    size_t got = 0;
    int r = dr_file_pread_short(file, header, 0, HEADER, &got, err);
    if (r < 0)
        return r;
    if (got < HEADER || memcmp(header, MAGIC, 8) != 0)
        return bad(err, path, "the first 8 bytes are not " MAGIC);
    memcpy(own, header, HEADER);
    memset(own + AT_OWN, 0, DR_SUM);
    put_hash(own + AT_OWN, XXH3_128bits(own, HEADER));
    if (memcmp(own, header, HEADER) != 0)
        return bad(err, path, "the checksum of its header at 48 is another one");
    uint64_t size = get_le64(header + AT_SIZE);
    if (get_le32(header + AT_VERSION) != VERSION || size > LARGEST)
        return bad(err, path, "its version or the size of the disk is not known");
    uint64_t n = grains_of(size);
    if (get_le64(header + AT_N) != n || dr_file_size(file) != TABLE_AT + n * DR_SUM)
        return bad(err, path, "its length is not that of the table");
    r = dr_sums_begin(s, size, err);
    if (r == 0)
        r = read_table(s, file, err);
    if (r < 0)
        return r;
    make_header(s, own);
    return memcmp(own, header, HEADER) == 0 ? 0 : bad(err, path, "the table has another digest");
}

int dr_sums_load(struct dr_sums *s, struct dr_fs *fs, const char *path, struct dr_error *err)
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
