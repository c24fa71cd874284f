/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The index of an archive: one word a cluster, in chunks that are made when something comes into
 * them, and that shrink to nothing when they are full of zeros. A chunk into which little has come
 * is a short list: a hostile archive, far longer than what it stores, may touch each chunk once. */
#include <inttypes.h>

#include "archive/vma-index.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/copy.h"

/* A word: the place of the first block, in units of 512 from the end of the archive's header on,
 * and the mask below it. 0 = missing; all zeros has no mask, so it is like no other. */
#define HOST_UNIT  512u
#define HOST_MAX   (1ull << 56)
#define WORD_ZERO  (1ull << 16)
#define CHUNK      512u   /* clusters a chunk */
#define FEW_FIRST  4u     /* room of a list at first */
#define FEW_MAX    64u    /* and at most: then there is a word for each cluster */
#define READ_AHEAD 65536u /* where extents have no data, their headers stand close together */

struct chunk {
    uint32_t used, zeros; /* words that are not 0; that are WORD_ZERO */
    uint32_t room; /* 0: words has one for each cluster; else it is a list of `used` words, and
                      behind the room for them stands which cluster each is of */
    uint64_t words[];
};

struct disk {
    uint64_t clusters, found;
    struct chunk **chunks;
};

struct vma_index {
    struct disk disks[256]; /* by id; clusters 0 = not kept */
    uint64_t base, last;    /* where the extents begin; where the last one does */
};

static struct chunk all_zero; /* stands for a chunk full of zeros */

/* ------------------------------------------------------------------ the words */

static uint64_t chunk_len(const struct disk *d, uint64_t c)
{
    return dr_min(CHUNK, d->clusters - c * CHUNK);
}

static uint16_t *list_of(struct chunk *chunk)
{
    return (uint16_t *)(chunk->words + chunk->room);
}

/* 0 = nothing has come yet. */
static uint64_t word_at(struct chunk *chunk, uint64_t i)
{
    if (!chunk || chunk == &all_zero)
        return chunk ? WORD_ZERO : 0;
    if (chunk->room == 0)
        return chunk->words[i];
    for (uint32_t k = 0; k < chunk->used; k++)
        if (list_of(chunk)[k] == i)
            return chunk->words[k];
    return 0;
}

static void add_word(struct chunk *chunk, uint64_t i, uint64_t word)
{
    if (chunk->room > 0)
        list_of(chunk)[chunk->used] = (uint16_t)i;
    chunk->words[chunk->room > 0 ? chunk->used : i] = word;
    chunk->used++;
    chunk->zeros += word == WORD_ZERO;
}

/* Room for one more word. */
static int make_room(struct chunk **slot)
{
    struct chunk *old = *slot;
    if (old && (old->room == 0 || old->used < old->room))
        return 0;
    uint32_t room = old ? old->room * 2 : FEW_FIRST;
    room = room > FEW_MAX ? 0 : room;
    size_t each = sizeof(uint64_t) + (room ? sizeof(uint16_t) : 0);
    struct chunk *chunk = calloc(1, sizeof(*chunk) + (room ? room : CHUNK) * each);
    if (!chunk)
        return -ENOMEM;
    chunk->room = room;
    for (uint32_t k = 0; old && k < old->used; k++)
        add_word(chunk, list_of(old)[k], old->words[k]);
    free(old);
    *slot = chunk;
    return 0;
}

/* Full of zeros and nothing else: then the pointer says it all. */
static void shrink(struct disk *d, uint64_t c)
{
    struct chunk *chunk = d->chunks[c];
    if (chunk->zeros < chunk_len(d, c))
        return;
    free(chunk);
    d->chunks[c] = &all_zero;
}

static int put_word(struct disk *d, uint64_t cluster, uint64_t word)
{
    struct chunk **slot = &d->chunks[cluster / CHUNK];
    if (word_at(*slot, cluster % CHUNK))
        return -EEXIST;
    int r = make_room(slot);
    if (r < 0)
        return r;
    add_word(*slot, cluster % CHUNK, word);
    d->found++;
    shrink(d, cluster / CHUNK);
    return 0;
}

/* A whole chunk of zeros at once. */
static bool put_chunk(struct disk *d, uint64_t cluster, uint64_t n)
{
    uint64_t c = cluster / CHUNK, len = chunk_len(d, c);
    if (cluster % CHUNK || n < len || d->chunks[c])
        return false;
    d->chunks[c] = &all_zero;
    d->found += len;
    return true;
}

int vma_index_put(struct vma_index *index, unsigned id, uint64_t *first, uint64_t n, uint16_t mask,
                  uint64_t host)
{
    struct disk *d = &index->disks[id];
    uint64_t step = (uint64_t)__builtin_popcount(mask) * DR_VMA_BLOCK;
    if (mask && (host < index->base || host > HOST_MAX || (host - index->base) % HOST_UNIT))
        return -ERANGE;
    host -= mask ? index->base : host;
    for (uint64_t end = *first + n; *first < end; host += step) {
        if (!mask && put_chunk(d, *first, end - *first)) {
            *first += chunk_len(d, *first / CHUNK);
            continue;
        }
        int r = put_word(d, *first, mask ? host / HOST_UNIT << 16 | mask : WORD_ZERO);
        if (r < 0)
            return r;
        ++*first;
    }
    return 0;
}

struct vma_place vma_index_find(const struct vma_index *index, unsigned id, uint32_t cluster)
{
    const struct disk *d = &index->disks[id];
    if (cluster >= d->clusters)
        return (struct vma_place){0};
    uint64_t word = word_at(d->chunks[cluster / CHUNK], cluster % CHUNK);
    return (struct vma_place){word != 0, (uint16_t)word, index->base + (word >> 16) * HOST_UNIT};
}

uint64_t vma_index_last(const struct vma_index *index)
{
    return index->last;
}

void vma_index_set_last(struct vma_index *index, uint64_t off)
{
    index->last = off;
}

/* ------------------------------------------------------------------ new, complete, free */

static int refuse_size(const struct dr_vma_header *header, const char *name, uint64_t size,
                       struct dr_error *err)
{
    uint64_t wanted = 0;
    for (size_t i = 0; i < header->n_disks; i++) {
        const struct dr_vma_disk *disk = &header->disks[i];
        /* The header's parser has bounded each size: no sum overflows. */
        wanted += disk->vmstate ? 0 : vma_clusters(disk->size);
    }
    uint64_t body = size > header->header_size ? size - header->header_size : 0;
    uint64_t room = body / VMA_EXTENT_HEADER * VMA_SLOTS;
    if (wanted <= room)
        return 0;
    return dr_fail(err, EBADMSG,
                   "%s: ends at %" PRIu64 ", where at most %" PRIu64 " of its disks' %" PRIu64
                   " clusters can be: it was cut off",
                   name, size, room, wanted);
}

int vma_index_new(const struct dr_vma_header *header, const char *name, uint64_t size,
                  struct vma_index **index, struct dr_error *err)
{
    *index = NULL;
    int r = refuse_size(header, name, size, err);
    if (r < 0)
        return r;
    struct vma_index *x = calloc(1, sizeof(*x));
    bool ok = x;
    if (x)
        x->base = header->header_size;
    for (size_t i = 0; ok && i < header->n_disks; i++) {
        struct disk *d = &x->disks[header->disks[i].id];
        if (header->disks[i].vmstate)
            continue;
        d->clusters = vma_clusters(header->disks[i].size);
        d->chunks = calloc(dr_div_up(d->clusters, CHUNK) + 1, sizeof(struct chunk *));
        ok = d->chunks;
    }
    if (!ok) {
        vma_index_free(x);
        return dr_fail(err, ENOMEM, "%s: out of memory for its index", name);
    }
    *index = x;
    return 0;
}

void vma_index_free(struct vma_index *index)
{
    for (unsigned id = 0; index && id < 256; id++) {
        struct disk *d = &index->disks[id];
        for (uint64_t c = 0; d->chunks && c < dr_div_up(d->clusters, CHUNK); c++)
            if (d->chunks[c] != &all_zero)
                free(d->chunks[c]);
        free(d->chunks);
    }
    free(index);
}

static uint64_t first_missing(const struct disk *d)
{
    for (uint64_t c = 0; c < dr_div_up(d->clusters, CHUNK); c++) {
        if (d->chunks[c] == &all_zero)
            continue;
        for (uint64_t i = 0; i < chunk_len(d, c); i++)
            if (!word_at(d->chunks[c], i))
                return c * CHUNK + i;
    }
    return d->clusters;
}

int vma_index_check(const struct vma_index *index, const struct dr_vma_header *header,
                    const char *name, struct dr_error *err)
{
    uint64_t missing = 0, first = 0;
    const struct dr_vma_disk *where = NULL;
    for (size_t i = 0; i < header->n_disks; i++) {
        const struct disk *d = &index->disks[header->disks[i].id];
        if (d->found == d->clusters)
            continue;
        missing += d->clusters - d->found;
        if (!where) {
            where = &header->disks[i];
            first = first_missing(d);
        }
    }
    if (!where)
        return 0;
    char shown[VMA_SHOWN];
    return dr_fail(err, EBADMSG,
                   "%s: %" PRIu64 " clusters are missing, the first is %" PRIu64 " (of %" PRIu64
                   ") of device %u ('%s'): the archive is incomplete",
                   name, missing, first, index->disks[where->id].clusters, where->id,
                   vma_show(where->name, shown, sizeof(shown)));
}

/* ------------------------------------------------------------------ build */

struct build {
    struct dr_file *file;
    const struct dr_vma_header *header;
    struct dr_job *job;
    struct vma_index *index;
    uint64_t pos, size;
    uint8_t *buf; /* READ_AHEAD bytes of the file from at on, have of them */
    uint64_t at;
    size_t have;
    bool dense; /* the last extent had no data */
};

/* The extent header at pos, which is inside the file. */
static int get_header(struct build *b, const uint8_t **header, struct dr_error *err)
{
    if (b->pos < b->at || b->pos + VMA_EXTENT_HEADER > b->at + b->have) {
        size_t want = b->dense ? READ_AHEAD : VMA_EXTENT_HEADER;
        b->at = b->pos;
        int r = dr_file_pread_short(b->file, b->buf, b->at, want, &b->have, err);
        if (r < 0)
            return r;
    }
    *header = b->buf + (b->pos - b->at);
    return 0;
}

/* Padding behind the last extent: tapes and devices add it. */
static int zeros_to_end(struct build *b, bool *zeros, struct dr_error *err)
{
    *zeros = true;
    for (uint64_t off = b->pos; *zeros && off < b->size;) {
        enum dr_file_extent kind;
        uint64_t run;
        int r = dr_file_extent(b->file, off, b->size - off, &kind, &run, err);
        if (r == 0 && kind == DR_FILE_DATA) {
            run = dr_min(run, READ_AHEAD);
            r = dr_file_pread(b->file, b->buf, off, (size_t)run, err);
            *zeros = r == 0 && dr_is_zero(b->buf, (size_t)run);
        }
        if (r < 0)
            return r;
        off += run;
    }
    b->have = 0;
    return 0;
}

static int duplicate(const struct build *b, const struct vma_slot *s, struct dr_error *err)
{
    char shown[VMA_SHOWN];
    const struct dr_vma_disk *disk = vma_header_disk(b->header, s->id);
    return dr_fail(err, EBADMSG,
                   "%s: extent at offset %" PRIu64 ": cluster %" PRIu32
                   " of device %u ('%s') for the second time",
                   b->file->path, b->pos, s->cluster, s->id,
                   vma_show(disk->name, shown, sizeof(shown)));
}

static int add_slot(struct build *b, const struct vma_slot *s, struct dr_error *err)
{
    int r = vma_slot_check(b->header, s, b->file->path, b->pos, err);
    if (r < 0 || b->index->disks[s->id].clusters == 0)
        return r;
    uint64_t cluster = s->cluster;
    r = vma_index_put(b->index, s->id, &cluster, 1, s->mask, b->pos + VMA_EXTENT_HEADER + s->data);
    if (r == -EEXIST)
        return duplicate(b, s, err);
    if (r == -ERANGE)
        return dr_fail(err, EBADMSG, "%s: extent at offset %" PRIu64 " is beyond any archive",
                       b->file->path, b->pos);
    return r < 0 ? dr_fail(err, ENOMEM, "%s: out of memory for its index", b->file->path) : 0;
}

static int add_extent(struct build *b, const uint8_t *header, struct dr_error *err)
{
    struct vma_extent e;
    int r = vma_extent_parse(header, b->header->uuid, b->file->path, b->pos, &e, err);
    if (r < 0)
        return r;
    if (!dr_inside(b->pos, VMA_EXTENT_HEADER + (uint64_t)e.data_len, b->size))
        return dr_fail(err, EBADMSG,
                       "%s: ends at %" PRIu64 " inside the extent at offset %" PRIu64
                       ", which has %u bytes: it was cut off",
                       b->file->path, b->size, b->pos, VMA_EXTENT_HEADER + e.data_len);
    for (unsigned i = 0; r == 0 && i < e.n; i++)
        r = add_slot(b, &e.slot[i], err);
    b->index->last = b->pos;
    b->pos += VMA_EXTENT_HEADER + e.data_len;
    b->dense = e.data_len == 0;
    return r;
}

/* At pos stands no whole extent header, or one that begins with zeros. */
static int end_of_archive(struct build *b, struct dr_error *err)
{
    bool zeros;
    int r = zeros_to_end(b, &zeros, err);
    if (r < 0 || !zeros)
        return r < 0 ? r
                     : dr_fail(err, EBADMSG,
                               "%s: %" PRIu64 " bytes at offset %" PRIu64 " are no extent",
                               b->file->path, b->size - b->pos, b->pos);
    b->pos = b->size;
    return 0;
}

static int report(const struct build *b, struct dr_error *err)
{
    if (dr_job_report(b->job, b->pos, b->size))
        return dr_fail(err, ECANCELED, "stopped on request");
    return dr_job_rest(b->job, err);
}

static int scan(struct build *b, struct dr_error *err)
{
    int r = 0;
    for (unsigned n = 0; r == 0 && b->pos < b->size; n++) {
        const uint8_t *header = NULL;
        if (dr_job_stopped(b->job)) /* each header may cost a disk a seek: not only now and then */
            return dr_fail(err, ECANCELED, "stopped on request");
        if (n % 4096 == 4095 && (r = report(b, err)) < 0)
            return r;
        if (b->size - b->pos < VMA_EXTENT_HEADER) {
            r = end_of_archive(b, err);
            continue;
        }
        r = get_header(b, &header, err);
        if (r == 0)
            r = get_be32(header) == 0 ? end_of_archive(b, err) : add_extent(b, header, err);
    }
    return r;
}

int vma_index_build(struct dr_file *file, const struct dr_vma_header *header, struct dr_job *job,
                    struct vma_index **index, struct dr_error *err)
{
    struct build b = {.file = file, .header = header, .job = job, .pos = header->header_size};
    CLEANUP_FREE uint8_t *buf = malloc(READ_AHEAD);
    *index = NULL;
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", file->path);
    b.buf = buf;
    b.size = dr_file_size(file);
    int r = vma_index_new(header, file->path, b.size, &b.index, err);
    if (r < 0)
        return r;
    dr_file_advise(file, true);
    r = scan(&b, err);
    dr_file_advise(file, false);
    if (r == 0)
        r = vma_index_check(b.index, header, file->path, err);
    if (r == 0)
        r = report(&b, err);
    if (r < 0)
        vma_index_free(b.index);
    else
        *index = b.index;
    return r;
}

/* ------------------------------------------------------------------ the header */

int vma_index_header(struct dr_file *file, struct dr_vma_header *header,
                     void (*warn)(void *user, const char *text), void *user, struct dr_error *err)
{
    uint8_t fixed[VMA_FIXED_HEADER];
    uint32_t size = VMA_FIXED_HEADER;
    size_t got;
    int r = dr_file_pread_short(file, fixed, 0, sizeof(fixed), &got, err);
    if (r == 0)
        r = vma_header_size(fixed, file->path, &size, err);
    if (r < 0)
        return r;
    if (dr_file_size(file) < size)
        return dr_fail(err, EINVAL,
                       "%s: ends at %" PRIu64 " inside its header of %" PRIu32 " bytes", file->path,
                       dr_file_size(file), size);
    CLEANUP_FREE uint8_t *buf = malloc(size);
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", file->path);
    memcpy(buf, fixed, sizeof(fixed));
    r = dr_file_pread(file, buf + sizeof(fixed), sizeof(fixed), size - sizeof(fixed), err);
    return r < 0 ? r : vma_header_parse(buf, size, file->path, header, warn, user, err);
}
