/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "core/bitmap-file.h"

#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/publish.h"

#define ULL(v) ((unsigned long long)(v))

/* The header: one sector. */
#define HEAD         512u
#define HEAD_STEP    4096u /* the second one stands here */
#define VERSION      1u
#define AT_VERSION   8u
#define AT_FLAGS     12u
#define AT_GEN       16u
#define AT_CONTENTS  24u
#define AT_LEN       32u
#define AT_SUM       40u
#define AT_HEAD_SUM  504u
#define FLAG_IN_USE  1u
#define FIRST        (2 * HEAD_STEP) /* contents begin behind the headers */
#define CONTENTS_MAX (DR_BITMAP_FILE_BYTES + (UINT64_C(64) << 20))

/* The contents. */
#define FIXED        16u
#define FILE_BYTES   40u
#define BITMAP_BYTES 24u
#define ENABLED      1u
#define PAGE_ENTRY   8u
#define PAGE_OF_BITS 1u
#define PAGE_OF_ONES 2u
#define MAX_ATTEMPTS 5 /* at reading while somebody writes */

static const uint8_t magic[8] = {'D', 'R', 'B', 'I', 'T', 'M', 'A', 'P'};

/* ------------------------------------------------------------------ sets and lists */

struct dr_marks *dr_noted_set(unsigned bits, uint64_t size)
{
    struct dr_marks *set = malloc(sizeof(*set));
    if (!set)
        return NULL;
    dr_marks_init(set, bits);
    if (dr_marks_cover(set, size) == 0)
        return set;
    dr_noted_set_free(set);
    return NULL;
}

void dr_noted_set_free(struct dr_marks *set)
{
    if (set)
        dr_marks_free(set);
    free(set);
}

struct dr_noted *dr_bitmap_file_find(const struct dr_bitmap_file *b, const char *name)
{
    for (uint32_t i = 0; i < b->n; i++)
        if (strcmp(b->list[i].name, name) == 0)
            return &b->list[i];
    return NULL;
}

static void clear_contents(struct dr_bitmap_file *b)
{
    for (uint32_t i = 0; i < b->n; i++) {
        free(b->list[i].name);
        dr_noted_set_free(b->list[i].set);
    }
    free(DR_STEAL(b->list));
    free(DR_STEAL(b->files));
    b->n = b->n_files = 0;
}

void dr_bitmap_file_free(struct dr_bitmap_file *b)
{
    clear_contents(b);
    free(DR_STEAL(b->path));
}

/* ------------------------------------------------------------------ reading the headers */

static bool head_is_whole(const uint8_t *head)
{
    return memcmp(head, magic, sizeof(magic)) == 0 &&
           get_le64(head + AT_HEAD_SUM) == XXH3_64bits(head, AT_HEAD_SUM);
}

static int check_head(const struct dr_bitmap_file *b, const uint8_t *head, uint64_t at,
                      uint64_t size, struct dr_error *err)
{
    uint32_t version = get_le32(head + AT_VERSION), flags = get_le32(head + AT_FLAGS);
    if (version != VERSION || flags & ~FLAG_IN_USE)
        return dr_fail(err, ENOTSUP,
                       "%s: the header at byte %llu has version %u and flags 0x%x, expected "
                       "version %u: made by a later program; remove the file if its bitmaps are "
                       "not needed",
                       b->path, ULL(at), version, flags, VERSION);
    if (b->at < FIRST || b->at % HEAD_STEP || b->len > CONTENTS_MAX || b->at > size ||
        b->len > size - b->at || !b->generation)
        return dr_fail(err, EBADMSG,
                       "%s: the header at byte %llu leads to bytes %llu+%llu, expected a multiple "
                       "of %u from %u on inside of the file's %llu bytes; remove the file",
                       b->path, ULL(at), ULL(b->at), ULL(b->len), HEAD_STEP, FIRST, ULL(size));
    return 0;
}

/* The valid header with the higher generation. A header that is not valid was torn: the other one
 * tells what is there. */
static int read_head(struct dr_file *f, struct dr_bitmap_file *b, struct dr_error *err)
{
    uint8_t bytes[HEAD_STEP + HEAD] = {0};
    const uint8_t *best = NULL;
    int r = dr_file_refresh_size(f, err);
    if (r == 0)
        r = dr_file_pread_short(f, bytes, 0, sizeof(bytes), NULL, err);
    if (r < 0)
        return r;
    for (unsigned i = 0; i < 2; i++) {
        const uint8_t *head = bytes + (size_t)i * HEAD_STEP;
        if (head_is_whole(head) && (!best || get_le64(head + AT_GEN) > get_le64(best + AT_GEN)))
            best = head;
    }
    if (!best)
        return dr_fail(err, EBADMSG,
                       "%s: has no valid header at byte 0 or %u, expected \"%.8s\" and a checksum; "
                       "no bitmap in it can be used; remove the file",
                       b->path, HEAD_STEP, (const char *)magic);
    b->generation = get_le64(best + AT_GEN);
    b->in_use = get_le32(best + AT_FLAGS) & FLAG_IN_USE;
    b->at = get_le64(best + AT_CONTENTS);
    b->len = get_le64(best + AT_LEN);
    b->sum = get_le64(best + AT_SUM);
    return check_head(b, best, (uint64_t)(best - bytes), dr_file_size(f), err);
}

/* ------------------------------------------------------------------ reading the contents */

struct reader {
    const struct dr_bitmap_file *b;
    const uint8_t *bytes;
    size_t at, len;
};

static int refuse(const struct reader *rd, const char *expected, struct dr_error *err)
{
    return dr_fail(err, EBADMSG, "%s: byte %llu: expected %s; remove the file", rd->b->path,
                   ULL(rd->b->at + rd->at), expected);
}

/* NULL: there are not so many bytes left. */
static const uint8_t *next(struct reader *rd, size_t n)
{
    if (n > rd->len - rd->at)
        return NULL;
    rd->at += n;
    return rd->bytes + rd->at - n;
}

static int read_files(struct reader *rd, struct dr_bitmap_file *b, uint32_t n, struct dr_error *err)
{
    const uint8_t *p = n <= DR_BITMAP_FILE_FILES ? next(rd, (size_t)n * FILE_BYTES) : NULL;
    if (!p)
        return refuse(rd, "fewer files of the image", err);
    b->files = calloc(n ? n : 1, sizeof(*b->files));
    if (!b->files)
        return dr_fail_errno(err, ENOMEM, "%s", b->path);
    b->n_files = n;
    for (uint32_t i = 0; i < n; i++, p += FILE_BYTES)
        b->files[i] = (struct dr_noted_file){
            .stamp = {.size = get_le64(p),
                      .mtime = get_le64(p + 8),
                      .ctime = get_le64(p + 16),
                      .ino = get_le64(p + 24)},
            .sample = get_le64(p + 32),
        };
    return 0;
}

/* bits NULL: all of them are 1. */
static void set_page(struct dr_marks *set, uint64_t index, const uint8_t *bits)
{
    uint64_t first = index * DR_MARKS_PAGE_BITS;
    if (!bits) {
        dr_marks_set(set, first << set->bits, (uint64_t)DR_MARKS_PAGE_BITS << set->bits);
        return;
    }
    for (uint64_t i = 0, from; i < DR_MARKS_PAGE_BITS; i++) {
        for (from = i; i < DR_MARKS_PAGE_BITS && bits[i / 8] >> i % 8 & 1; i++)
            ;
        if (i > from)
            dr_marks_set(set, (first + from) << set->bits, (i - from) << set->bits);
    }
}

static int read_pages(struct reader *rd, struct dr_noted *one, uint32_t n, struct dr_error *err)
{
    const uint8_t *entries = next(rd, (size_t)n * PAGE_ENTRY);
    uint64_t least = 0;
    if (!entries)
        return refuse(rd, "fewer pages of bits", err);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t index = get_le32(entries + (size_t)i * PAGE_ENTRY);
        uint32_t kind = get_le32(entries + (size_t)i * PAGE_ENTRY + 4);
        const uint8_t *bits = kind == PAGE_OF_BITS ? next(rd, DR_MARKS_PAGE) : NULL;
        if (index < least || index >= one->set->n_pages ||
            (kind == PAGE_OF_BITS ? !bits : kind != PAGE_OF_ONES))
            return refuse(rd, "pages of bits in ascending order, inside the disk and the file",
                          err);
        set_page(one->set, index, bits);
        least = index + UINT64_C(1);
    }
    return 0;
}

/* *room: bytes of bits that the bitmaps of the file may still take. */
static int read_bitmap(struct reader *rd, struct dr_bitmap_file *b, uint64_t *room,
                       struct dr_error *err)
{
    const uint8_t *p = next(rd, BITMAP_BYTES);
    if (!p)
        return refuse(rd, "another bitmap", err);
    uint32_t flags = get_le32(p), distrust = get_le32(p + 4), bits = get_le32(p + 8);
    uint32_t name_len = get_le32(p + 12), n_pages = get_le32(p + 16);
    if (flags & ~ENABLED || distrust >= DR_DISTRUSTS || bits < DR_BITMAP_FILE_MIN_BITS ||
        bits > DR_BITMAP_FILE_MAX_BITS || !name_len || name_len > DR_BITMAP_FILE_NAME ||
        get_le32(p + 20))
        return refuse(rd, "known flags and a granularity from 512 bytes to 2 MiB before it", err);
    if (b->disk / 8 >> bits > *room)
        return refuse(rd, "bitmaps of at most 128 MiB together before it", err);
    *room -= b->disk / 8 >> bits;
    const char *name = (const char *)next(rd, dr_round_up(name_len, 8));
    if (!name || memchr(name, 0, name_len))
        return refuse(rd, "a name before it", err);
    struct dr_noted *one = &b->list[b->n];
    *one = (struct dr_noted){.name = strndup(name, name_len),
                             .enabled = flags & ENABLED,
                             .distrust = (enum dr_distrust)distrust,
                             .set = dr_noted_set(bits, b->disk)};
    bool twice = one->name && dr_bitmap_file_find(b, one->name);
    b->n++; /* what was allocated is the file's to free */
    if (!one->name || !one->set)
        return dr_fail_errno(err, ENOMEM, "%s", b->path);
    return twice ? refuse(rd, "another name before it", err) : read_pages(rd, one, n_pages, err);
}

static int parse(struct dr_bitmap_file *b, const uint8_t *bytes, struct dr_error *err)
{
    struct reader rd = {.b = b, .bytes = bytes, .len = (size_t)b->len};
    const uint8_t *p = next(&rd, FIXED);
    if (!p)
        return refuse(&rd, "16 bytes of contents", err);
    b->disk = get_le64(p);
    uint64_t room = DR_BITMAP_FILE_BYTES;
    uint32_t n = get_le32(p + 12);
    if (b->disk > INT64_MAX || n > DR_BITMAP_FILE_MAX)
        return refuse(&rd, "a size below 2^63 and at most 256 bitmaps before it", err);
    b->list = calloc(n ? n : 1, sizeof(*b->list));
    int r = b->list ? read_files(&rd, b, get_le32(p + 8), err)
                    : dr_fail_errno(err, ENOMEM, "%s", b->path);
    for (uint32_t i = 0; r == 0 && i < n; i++)
        r = read_bitmap(&rd, b, &room, err);
    return r == 0 && rd.at != rd.len ? refuse(&rd, "the end of the contents", err) : r;
}

/* *sum_is_wrong: the contents are not those of the header. */
static int read_contents(struct dr_file *f, struct dr_bitmap_file *b, bool *sum_is_wrong,
                         struct dr_error *err)
{
    CLEANUP_FREE uint8_t *bytes = malloc(b->len ? b->len : 1);
    size_t got;
    if (!bytes)
        return dr_fail_errno(err, ENOMEM, "%s", b->path);
    int r = dr_file_pread_short(f, bytes, b->at, b->len, &got, err);
    if (r < 0)
        return r;
    *sum_is_wrong = XXH3_64bits(bytes, b->len) != b->sum;
    return *sum_is_wrong ? 0 : parse(b, bytes, err);
}

/* A writer may replace the contents while they are read: then there is another header, too. */
static int load_open(struct dr_file *f, struct dr_bitmap_file *b, struct dr_error *err)
{
    uint64_t last = 0;
    for (int i = 0; i < MAX_ATTEMPTS; i++) {
        bool wrong = false;
        int r = read_head(f, b, err);
        if (r == 0)
            r = read_contents(f, b, &wrong, err);
        if (r < 0 || !wrong)
            return r;
        if (b->generation == last)
            break;
        last = b->generation;
    }
    return dr_fail(err, EBADMSG,
                   "%s: the contents at bytes %llu+%llu do not have the checksum %016llx that the "
                   "header expects; no bitmap in it can be used; remove the file",
                   b->path, ULL(b->at), ULL(b->len), ULL(b->sum));
}

int dr_bitmap_file_load(struct dr_fs *fs, const char *path, struct dr_bitmap_file *b,
                        struct dr_error *err)
{
    enum dr_name_kind kind;
    struct dr_file *f;
    *b = (struct dr_bitmap_file){0};
    int r = dr_look(fs, path, &kind, NULL, NULL);
    if (r == -ENOENT || r == -ENAMETOOLONG || r == -ENOTDIR)
        return -ENOENT;
    b->path = strdup(path);
    if (!b->path)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    if (r == 0 && kind != DR_NAME_FILE)
        return dr_fail(err, EBADMSG, "%s: is no regular file; expected a file of bitmaps", path);
    r = dr_file_open(fs, path, DR_FILE_NO_LOCK, &f, err);
    if (r < 0)
        return r;
    r = load_open(f, b, err);
    dr_file_unref(f);
    b->keep_from = b->at;
    b->keep_to = b->at + b->len;
    return r;
}

/* ------------------------------------------------------------------ writing */

struct writer {
    uint8_t *bytes;
    size_t len, room;
};

/* Zeroed; NULL = out of memory. */
static uint8_t *add(struct writer *w, size_t n)
{
    if (n > w->room - w->len) {
        size_t room = (w->len + n) * 2;
        uint8_t *more = realloc(w->bytes, room);
        if (!more)
            return NULL;
        w->bytes = more;
        w->room = room;
    }
    w->len += n;
    return memset(w->bytes + w->len - n, 0, n);
}

static bool put_files(struct writer *w, const struct dr_bitmap_file *b)
{
    for (uint32_t i = 0; i < b->n_files; i++) {
        const struct dr_noted_file *f = &b->files[i];
        uint8_t *p = add(w, FILE_BYTES);
        if (!p)
            return false;
        put_le64(p, f->stamp.size);
        put_le64(p + 8, f->stamp.mtime);
        put_le64(p + 16, f->stamp.ctime);
        put_le64(p + 24, f->stamp.ino);
        put_le64(p + 32, f->sample);
    }
    return true;
}

static bool put_pages(struct writer *w, const struct dr_marks *set, size_t n_pages, size_t at)
{
    const _Atomic uint8_t *bits;
    uint32_t n = 0;
    for (size_t i = 0; i < n_pages; i++) {
        enum dr_marks_kind kind = dr_marks_page(set, i, &bits);
        if (kind == DR_MARKS_NONE)
            continue;
        uint8_t *p = add(w, PAGE_ENTRY);
        if (!p)
            return false;
        put_le32(p, (uint32_t)i);
        put_le32(p + 4, kind == DR_MARKS_WHOLE ? PAGE_OF_ONES : PAGE_OF_BITS);
        n++;
    }
    put_le32(w->bytes + at + 16, n);
    for (size_t i = 0; i < n_pages; i++) {
        if (dr_marks_page(set, i, &bits) != DR_MARKS_SOME)
            continue;
        uint8_t *p = add(w, DR_MARKS_PAGE);
        if (!p)
            return false;
        for (size_t k = 0; k < DR_MARKS_PAGE; k++)
            p[k] = atomic_load_explicit(&bits[k], memory_order_relaxed);
    }
    return true;
}

static bool put_bitmap(struct writer *w, const struct dr_noted *one, uint64_t disk)
{
    size_t at = w->len, name_len = strlen(one->name);
    uint64_t bits = dr_div_up(disk, UINT64_C(1) << one->set->bits);
    uint8_t *p = add(w, BITMAP_BYTES + dr_round_up(name_len, 8));
    if (!p)
        return false;
    put_le32(p, one->enabled ? ENABLED : 0);
    put_le32(p + 4, one->distrust);
    put_le32(p + 8, one->set->bits);
    put_le32(p + 12, (uint32_t)name_len);
    memcpy(p + BITMAP_BYTES, one->name, name_len);
    size_t n_pages = (size_t)dr_min(one->set->n_pages, dr_div_up(bits, DR_MARKS_PAGE_BITS));
    return put_pages(w, one->set, n_pages, at);
}

static int build(const struct dr_bitmap_file *b, struct writer *w, struct dr_error *err)
{
    uint8_t *p = add(w, FIXED);
    bool ok = p != NULL;
    if (ok) {
        put_le64(p, b->disk);
        put_le32(p + 8, b->n_files);
        put_le32(p + 12, b->n);
        ok = put_files(w, b);
    }
    for (uint32_t i = 0; ok && i < b->n; i++)
        ok = put_bitmap(w, &b->list[i], b->disk);
    if (!ok)
        return dr_fail_errno(err, ENOMEM, "%s", b->path);
    if (w->len > CONTENTS_MAX)
        return dr_fail(err, EFBIG, "%s: the bitmaps take %zu bytes, expected at most %llu", b->path,
                       w->len, ULL(CONTENTS_MAX));
    return 0;
}

/* Later generations go to the other header: the one that counts is never written over. */
static int put_head(struct dr_file *f, struct dr_bitmap_file *b, struct dr_error *err)
{
    uint8_t head[HEAD] = {0};
    memcpy(head, magic, sizeof(magic));
    put_le32(head + AT_VERSION, VERSION);
    put_le32(head + AT_FLAGS, b->in_use ? FLAG_IN_USE : 0);
    uint64_t generation = b->generation + 1;
    put_le64(head + AT_GEN, generation);
    put_le64(head + AT_CONTENTS, b->at);
    put_le64(head + AT_LEN, b->len);
    put_le64(head + AT_SUM, b->sum);
    put_le64(head + AT_HEAD_SUM, XXH3_64bits(head, AT_HEAD_SUM));
    int r = dr_file_pwrite(f, head, generation % 2 * HEAD_STEP, sizeof(head), err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0) /* after a failure the next try goes to the same place */
        b->generation = generation;
    return r;
}

static int put_contents(struct dr_file *f, struct dr_bitmap_file *b, const struct writer *w,
                        uint64_t at, struct dr_error *err)
{
    int r = dr_file_pwrite(f, w->bytes, at, w->len, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r < 0)
        return r;
    b->at = at;
    b->len = w->len;
    b->sum = XXH3_64bits(w->bytes, w->len);
    return 0;
}

static int create(struct dr_bitmap_file *b, const struct writer *w, struct dr_file *like,
                  struct dr_error *err)
{
    struct dr_temp t;
    int r = dr_temp_create(&t, like->fs, b->path, NULL, like, err);
    if (r < 0)
        return r;
    r = put_contents(t.file, b, w, FIRST, err);
    if (r == 0)
        r = put_head(t.file, b, err);
    if (r == 0)
        r = dr_temp_publish(&t, err);
    if (t.temp)
        b->generation = 0;
    dr_temp_end(&t);
    return r;
}

static int open_to_write(const struct dr_bitmap_file *b, struct dr_file *like, struct dr_file **f,
                         struct dr_error *err)
{
    unsigned flags = DR_FILE_RDWR | DR_FILE_NO_LOCK | (like->flags & DR_FILE_NO_FLUSH);
    return dr_file_open(like->fs, b->path, flags, f, err);
}

static int replace_contents(struct dr_bitmap_file *b, const struct writer *w, struct dr_file *like,
                            struct dr_error *err)
{
    struct dr_file *f;
    uint64_t at = w->len <= b->keep_from - FIRST ? FIRST : dr_round_up(b->keep_to, HEAD_STEP);
    int r = open_to_write(b, like, &f, err);
    if (r < 0)
        return r;
    r = put_contents(f, b, w, at, err);
    if (r == 0) { /* from now on either header may count */
        b->keep_from = dr_min(b->keep_from, at);
        b->keep_to = dr_max(b->keep_to, at + w->len);
        r = put_head(f, b, err);
    }
    if (r == 0) {
        b->keep_from = at;
        b->keep_to = at + w->len;
        if (dr_file_size(f) > b->keep_to)
            dr_file_truncate(f, b->keep_to, NULL);
    }
    dr_file_unref(f);
    return r;
}

int dr_bitmap_file_store(struct dr_bitmap_file *b, bool in_use, struct dr_file *like,
                         struct dr_error *err)
{
    struct writer w = {0};
    int r = build(b, &w, err);
    if (r < 0) {
        free(w.bytes);
        return r;
    }
    b->in_use = in_use;
    r = b->generation ? replace_contents(b, &w, like, err) : create(b, &w, like, err);
    free(w.bytes);
    if (b->generation == 1) {
        b->keep_from = b->at;
        b->keep_to = b->at + b->len;
    }
    return r;
}

int dr_bitmap_file_use(struct dr_bitmap_file *b, struct dr_file *like, struct dr_error *err)
{
    struct dr_file *f;
    int r = open_to_write(b, like, &f, err);
    if (r < 0)
        return r;
    b->in_use = true;
    r = put_head(f, b, err);
    dr_file_unref(f);
    return r;
}
