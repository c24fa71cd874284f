/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The index saved as a file next to the archive (docs/formats/vma-index.md). It only caches what
 * the archive says, so a file that does not fit the archive is ignored. */
#include <inttypes.h>
#include <stdio.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "archive/leftovers.h"
#include "storage/source.h"
#include "archive/vma-index.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/job.h"

#define MAGIC   "DrVMAidx"
#define VERSION 1u

/* The fixed part: where things stand. */
#define AT_VERSION  8
#define AT_DISKS    12 /* how many lists follow */
#define AT_LENGTH   16 /* of the archive's plain bytes */
#define AT_HEADER   24 /* md5 of the archive's header, as that has it */
#define AT_LAST     40 /* where the last extent stands */
#define AT_LAST_MD5 48 /* its checksum, as it has it */
#define AT_MTIME    64 /* of the archive; 0 = not known */
#define FIXED       72
#define DISK_HEAD   24           /* id (4), zeros (4), clusters (8), words (8) */
#define SUM         8            /* xxh3-64 of everything before it, at the end */
#define KIND        (3ull << 62) /* of a word: neither bit = one cluster */
#define ZERO_RUN    (2ull << 62) /* so many clusters of zeros */
#define FULL_RUN    (3ull << 62) /* so many whole ones, right behind what the last word said */
#define WHOLE       0xffffu
#define HOST_UNIT   512u
#define PIECE       65536u
#define VMA_MD5     32 /* where a header and an extent have their checksums */
#define VMA_EXT_MD5 24

char *vma_index_path(const char *archive)
{
    char *path;
    return asprintf(&path, "%s.idx", archive) >= 0 ? path : NULL;
}

/* Fill fields AT_LENGTH to FIXED of the fixed part from the archive. Saving writes them, loading
 * compares them. */
static int portrait(struct dr_file *archive, uint64_t last, uint8_t *fixed, struct dr_error *err)
{
    put_le64(fixed + AT_LENGTH, dr_file_size(archive));
    put_le64(fixed + AT_LAST, last);
    put_le64(fixed + AT_MTIME, dr_file_mtime(archive));
    int r = dr_file_pread(archive, fixed + AT_HEADER, VMA_MD5, 16, err);
    if (r == 0 && last)
        r = dr_file_pread(archive, fixed + AT_LAST_MD5, last + VMA_EXT_MD5, 16, err);
    return r;
}

/* ------------------------------------------------------------------ save */

struct writer {
    const struct vma_index *index;
    const struct dr_vma_header *header;
    struct dr_file *archive, *file;
    uint8_t *buf;
    size_t n;
    uint64_t pos; /* of buf in the file */
    XXH3_state_t *sum;
};

static int drain(struct writer *w, struct dr_error *err)
{
    int r = dr_file_pwrite(w->file, w->buf, w->pos, w->n, err);
    w->pos += w->n;
    w->n = 0;
    return r;
}

static int put_bytes(struct writer *w, const void *p, size_t n, struct dr_error *err)
{
    XXH3_64bits_update(w->sum, p, n);
    int r = w->n + n > PIECE ? drain(w, err) : 0;
    memcpy(w->buf + w->n, p, n);
    w->n += n;
    return r;
}

static int put_word(struct writer *w, uint64_t word, struct dr_error *err)
{
    uint8_t raw[8];
    put_le64(raw, word);
    return put_bytes(w, raw, sizeof(raw), err);
}

/* Count the clusters from c on that one word can stand for: clusters of zeros, or whole clusters
 * stored one after another from host offset `next`. */
static uint64_t run_length(const struct writer *w, const struct dr_vma_disk *disk, uint64_t c,
                           uint16_t mask, uint64_t next)
{
    uint64_t n = 0, end = vma_clusters(disk->size);
    for (; c + n < end; n++, next += DR_VMA_CLUSTER) {
        struct vma_place p = vma_index_find(w->index, disk->id, (uint32_t)(c + n));
        if (p.mask != mask || (mask && p.host != next))
            break;
    }
    return n;
}

/* Make the word for the clusters from *c on and advance *c. *next is the host offset at which
 * the data of the previous word ends, 0 at first. */
static uint64_t next_word(const struct writer *w, const struct dr_vma_disk *disk, uint64_t *c,
                          uint64_t *next)
{
    struct vma_place p = vma_index_find(w->index, disk->id, (uint32_t)*c);
    uint64_t n = 1;
    if (!p.mask || (p.mask == WHOLE && p.host == *next)) {
        n = run_length(w, disk, *c, p.mask, *next);
        *next += p.mask ? n * DR_VMA_CLUSTER : 0;
        *c += n;
        return (p.mask ? FULL_RUN : ZERO_RUN) | n;
    }
    *next = p.host + (uint64_t)__builtin_popcount(p.mask) * DR_VMA_BLOCK;
    *c += n;
    return (p.host - w->header->header_size) / HOST_UNIT << 16 | p.mask;
}

static uint64_t count_words(const struct writer *w, const struct dr_vma_disk *disk)
{
    uint64_t n = 0, next = 0;
    for (uint64_t c = 0; c < vma_clusters(disk->size); n++)
        next_word(w, disk, &c, &next);
    return n;
}

static int put_disk(struct writer *w, const struct dr_vma_disk *disk, struct dr_error *err)
{
    uint8_t head[DISK_HEAD] = {0};
    uint64_t next = 0;
    put_le32(head, disk->id);
    put_le64(head + 8, vma_clusters(disk->size));
    put_le64(head + 16, count_words(w, disk));
    int r = put_bytes(w, head, sizeof(head), err);
    for (uint64_t c = 0; r == 0 && c < vma_clusters(disk->size);)
        r = put_word(w, next_word(w, disk, &c, &next), err);
    return r;
}

static int put_all(struct writer *w, struct dr_error *err)
{
    uint8_t fixed[FIXED] = MAGIC;
    uint32_t n = 0;
    for (size_t i = 0; i < w->header->n_disks; i++)
        n += !w->header->disks[i].vmstate;
    put_le32(fixed + AT_VERSION, VERSION);
    put_le32(fixed + AT_DISKS, n);
    int r = portrait(w->archive, vma_index_last(w->index), fixed, err);
    if (r == 0)
        r = put_bytes(w, fixed, sizeof(fixed), err);
    for (size_t i = 0; r == 0 && i < w->header->n_disks; i++)
        if (!w->header->disks[i].vmstate)
            r = put_disk(w, &w->header->disks[i], err);
    if (r == 0)
        r = put_word(w, XXH3_64bits_digest(w->sum), err);
    return r < 0 ? r : drain(w, err);
}

static int fill(void *user, struct dr_file *tmp, struct dr_error *err)
{
    struct writer *w = user;
    w->file = tmp;
    w->sum = XXH3_createState();
    w->buf = malloc(PIECE);
    int r = w->sum && w->buf ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", tmp->path);
    if (r == 0) {
        XXH3_64bits_reset(w->sum);
        r = put_all(w, err);
    }
    XXH3_freeState(w->sum);
    free(w->buf);
    return r;
}

/* Open the file to be replaced, and refuse if it is not an index: a mistyped index path must not
 * overwrite another file. */
static int open_old(struct dr_fs *fs, const char *path, struct dr_file **old, struct dr_error *err)
{
    uint8_t magic[8];
    size_t got = 0;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_file_open(fs, path, DR_FILE_RDWR, old, &why);
    if (r == -ENOENT)
        return 0;
    if (r == 0)
        r = dr_file_pread_short(*old, magic, 0, sizeof(magic), &got, &why);
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    if (got > 0 && memcmp(magic, MAGIC, sizeof(magic)) != 0)
        return dr_fail(err, EEXIST, "%s: exists and is no index: left as it is", path);
    return 0;
}

int vma_index_save(const struct vma_index *index, struct dr_fs *fs, const char *path,
                   struct dr_file *archive, const struct dr_vma_header *header,
                   struct dr_error *err)
{
    struct writer w = {.index = index, .header = header, .archive = archive};
    struct dr_file *old = NULL, *fresh = NULL;
    int r = open_old(fs, path, &old, err);
    if (r == 0)
        r = dr_replace(fs, path, old, fill, &w, &fresh, err);
    dr_file_unref(fresh);
    dr_file_unref(old);
    return r;
}

/* ------------------------------------------------------------------ load */

struct reader {
    struct dr_file *file;
    const struct dr_vma_header *header;
    struct vma_index *index;
    uint64_t archive_size;
    uint64_t next; /* where the data of the last word ends */
    uint8_t *buf;
    uint64_t pos, end; /* in the file; the checksum stands at end */
    size_t at, n;      /* in buf */
    XXH3_state_t *sum;
};

static int damaged(const struct reader *rd, const char *what, struct dr_error *err)
{
    return dr_fail(err, EBADMSG, "%s: damaged index before offset %" PRIu64 ": %s", rd->file->path,
                   rd->pos - rd->n + rd->at, what);
}

static int get_bytes(struct reader *rd, void *out, size_t n, struct dr_error *err)
{
    for (size_t done = 0; done < n;) {
        if (rd->at == rd->n) {
            rd->at = 0;
            rd->n = (size_t)dr_min(PIECE, rd->end - rd->pos);
            if (rd->n == 0)
                return damaged(rd, "it ends too early", err);
            int r = dr_file_pread(rd->file, rd->buf, rd->pos, rd->n, err);
            if (r < 0)
                return r;
            rd->pos += rd->n;
            XXH3_64bits_update(rd->sum, rd->buf, rd->n);
        }
        size_t step = (size_t)dr_min(n - done, rd->n - rd->at);
        memcpy((uint8_t *)out + done, rd->buf + rd->at, step);
        rd->at += step;
        done += step;
    }
    return 0;
}

/* Decode a word: the number of its clusters, their mask, and the host offset of the first one. */
static bool parse_word(const struct reader *rd, uint64_t word, uint64_t *n, uint16_t *mask,
                       uint64_t *host)
{
    *n = word & ~KIND;
    *host = rd->next;
    *mask = (word & KIND) == FULL_RUN ? WHOLE : 0;
    if (word & ZERO_RUN)
        return *n > 0 && (!*mask || rd->next > 0);
    if (word & KIND)
        return false;
    *n = 1;
    *mask = (uint16_t)word;
    *host = rd->header->header_size + (word >> 16) * HOST_UNIT;
    return *mask;
}

static int take_word(struct reader *rd, unsigned id, uint64_t clusters, uint64_t word, uint64_t *c,
                     struct dr_error *err)
{
    uint64_t n, host, bytes;
    uint16_t mask;
    bool ok = parse_word(rd, word, &n, &mask, &host) && n <= clusters - *c;
    if (ok && mask) {
        bytes = n * (uint64_t)__builtin_popcount(mask) * DR_VMA_BLOCK;
        ok = dr_inside(host, bytes, rd->archive_size);
        rd->next = host + bytes;
    }
    int r = ok ? vma_index_put(rd->index, id, c, n, mask, host) : -ERANGE;
    if (r == -ENOMEM)
        return dr_fail(err, ENOMEM, "%s: out of memory", rd->file->path);
    return r < 0 ? damaged(rd, "a cluster stands where none can be", err) : 0;
}

static int take_disk(struct reader *rd, const struct dr_vma_disk *disk, struct dr_error *err)
{
    uint8_t head[DISK_HEAD], raw[8];
    uint64_t clusters = vma_clusters(disk->size), c = 0;
    rd->next = 0;
    int r = get_bytes(rd, head, sizeof(head), err);
    if (r < 0)
        return r;
    if (get_le32(head) != disk->id || get_le64(head + 8) != clusters)
        return damaged(rd, "its disks are not the archive's", err);
    for (uint64_t words = get_le64(head + 16); words > 0; words--) {
        if (c == clusters)
            return damaged(rd, "more clusters than the disk has", err);
        if ((r = get_bytes(rd, raw, sizeof(raw), err)) < 0 ||
            (r = take_word(rd, disk->id, clusters, get_le64(raw), &c, err)) < 0)
            return r;
    }
    return c == clusters ? 0 : damaged(rd, "fewer clusters than the disk has", err);
}

static int take_disks(struct reader *rd, uint32_t n, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < rd->header->n_disks; i++) {
        if (rd->header->disks[i].vmstate)
            continue;
        if (n-- == 0)
            return damaged(rd, "its disks are not the archive's", err);
        r = take_disk(rd, &rd->header->disks[i], err);
    }
    return r == 0 && (n > 0 || rd->pos != rd->end || rd->at != rd->n)
               ? damaged(rd, "something stands behind the last disk", err)
               : r;
}

static int check_portrait(const struct reader *rd, struct dr_file *archive, const uint8_t *fixed,
                          struct dr_error *err)
{
    uint8_t now[FIXED] = {0};
    uint64_t last = get_le64(fixed + AT_LAST);
    if (memcmp(fixed, MAGIC, 8) != 0 || get_le32(fixed + AT_VERSION) != VERSION)
        return dr_fail(err, ESTALE, "%s: is no index of a version that is known", rd->file->path);
    bool fits = get_le64(fixed + AT_LENGTH) == rd->archive_size &&
                (!last || dr_inside(last, VMA_EXTENT_HEADER, rd->archive_size));
    int r = fits ? portrait(archive, last, now, err) : 0;
    if (r < 0)
        return r;
    if (fits && memcmp(now + AT_LENGTH, fixed + AT_LENGTH, FIXED - AT_LENGTH) == 0)
        return 0;
    return dr_fail(err, ESTALE, "%s: is the index of another archive than %s", rd->file->path,
                   archive->path);
}

static int take_all(struct reader *rd, struct dr_file *archive, struct dr_error *err)
{
    uint8_t fixed[FIXED], sum[SUM];
    int r = get_bytes(rd, fixed, sizeof(fixed), err);
    if (r == 0)
        r = check_portrait(rd, archive, fixed, err);
    if (r == 0)
        r = vma_index_new(rd->header, archive->path, rd->archive_size, &rd->index, err);
    if (r == 0)
        r = take_disks(rd, get_le32(fixed + AT_DISKS), err);
    if (r == 0)
        r = dr_file_pread(rd->file, sum, rd->end, SUM, err);
    if (r < 0)
        return r;
    vma_index_set_last(rd->index, get_le64(fixed + AT_LAST));
    return get_le64(sum) == XXH3_64bits_digest(rd->sum)
               ? 0
               : damaged(rd, "its checksum does not fit", err);
}

static int load(struct reader *rd, struct dr_file *archive, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(PIECE);
    XXH3_state_t *sum = XXH3_createState();
    uint64_t size = dr_file_size(rd->file);
    int r = buf && sum ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rd->file->path);
    rd->buf = buf;
    rd->sum = sum;
    rd->end = size - dr_min(size, SUM);
    rd->archive_size = dr_file_size(archive);
    if (r == 0) {
        XXH3_64bits_reset(sum);
        r = take_all(rd, archive, err);
    }
    XXH3_freeState(sum);
    return r;
}

int vma_index_load(struct dr_fs *fs, const char *path, struct dr_file *archive,
                   const struct dr_vma_header *header, struct vma_index **index,
                   struct dr_error *err)
{
    struct reader rd = {.header = header};
    *index = NULL;
    /* No lock is needed: the file is only ever replaced as a whole, by a rename. */
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &rd.file, err);
    if (r < 0)
        return r;
    r = load(&rd, archive, err);
    dr_file_unref(rd.file);
    if (r < 0)
        vma_index_free(rd.index);
    else
        *index = rd.index;
    return r;
}

/* ------------------------------------------------------------------ public */

static int index_plain(struct dr_file *plain, const char *side, struct dr_job *job,
                       struct dr_error *err)
{
    struct dr_vma_header header = {0};
    struct vma_index *index = NULL;
    int r = vma_index_header(plain, &header, NULL, NULL, err);
    if (r == 0)
        r = vma_index_build(plain, &header, job, &index, err);
    if (r == 0)
        r = vma_index_save(index, dr_fs_posix(), side, plain, &header, err);
    vma_index_free(index);
    vma_header_free(&header);
    return r;
}

static int make_index(const char *path, const char *side, struct dr_job *job, struct dr_error *err)
{
    struct dr_file *file, *plain = NULL;
    const char *compression;
    CLEANUP_FREE char *usual = vma_index_path(path);
    if (!usual)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_file_open(dr_fs_posix(), path, 0, &file, err);
    if (r < 0)
        return r;
    r = dr_source_plain_file(file, &plain, &compression, err);
    if (r == 0)
        vma_drop_leftovers(dr_fs_posix(), side ? side : usual);
    if (r == 0)
        r = index_plain(plain, side ? side : usual, job, err);
    dr_file_unref(plain);
    dr_file_unref(file);
    return r;
}

int dr_vma_index(const char *path, const char *side, struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, make_index(path, side, job, err));
}
