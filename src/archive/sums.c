/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "archive/sums.h"
#include "base/bytes.h"
#include "base/cleanup.h"

#define MAGIC       "DRVMASUM"
#define VERSION     1u
#define FIXED       64u /* bytes in front of the entries */
#define ENTRY       64u /* bytes for each disk */
#define MAX_DISKS   255u
#define SUM         16u
#define TABLE_ALIGN 4096u
#define CHUNK       65536u /* of a table, when all of it is read */

/* Fields of the fixed part. */
#define AT_VERSION 8
#define AT_DISKS   12
#define AT_ARCHIVE 16
#define AT_SELF    48
/* Fields of an entry. */
#define AT_ID       0
#define AT_CLUSTERS 8
#define AT_TABLE    16
#define AT_SUM      32

/* Look-ups come in the order of clusters more or less, for a few disks at a time. */
#define CACHE_SLOTS 32u
#define CACHE_BYTES 4096u

struct table {
    unsigned id;
    bool grows;                /* a stream: its length is not known before its end */
    _Atomic uint64_t clusters; /* entries of the table */
    uint64_t off;              /* of the table in the file */
    uint8_t sum[SUM];          /* of the whole table */
};

struct cached {
    uint64_t off; /* of the bytes in the file, 0 = empty (the fixed part stands there) */
    uint8_t bytes[CACHE_BYTES];
};

struct vma_sums {
    struct dr_file *file;
    uint8_t archive[SUM];
    unsigned n;
    struct table tables[MAX_DISKS];
    struct table *by_id[256];
    pthread_mutex_t lock; /* the cache */
    struct cached cache[CACHE_SLOTS];
};

/* ------------------------------------------------------------------ sums */

static void put_sum(uint8_t *p, XXH128_hash_t h)
{
    put_le64(p, h.low64);
    put_le64(p + 8, h.high64);
}

struct vma_sum vma_sum_of(const uint8_t *cluster)
{
    XXH128_hash_t h = XXH3_128bits(cluster, DR_VMA_CLUSTER);
    struct vma_sum sum = {h.low64, h.high64};
    if (sum.low == 0 && sum.high == 0)
        sum.low = 1;
    return sum;
}

static void hash_u64(XXH3_state_t *state, uint64_t v)
{
    uint8_t b[8];
    put_le64(b, v);
    XXH3_128bits_update(state, b, sizeof(b));
}

static void hash_bytes(XXH3_state_t *state, const void *data, size_t len)
{
    hash_u64(state, len);
    if (len > 0)
        XXH3_128bits_update(state, data, len);
}

/* Hash the fields of the parsed header that distinguish one archive from another. */
static int identify(const struct dr_vma_header *header, uint8_t out[SUM], struct dr_error *err)
{
    XXH3_state_t *state = XXH3_createState();
    if (!state)
        return dr_fail(err, ENOMEM, "out of memory for checksums");
    XXH3_128bits_reset(state);
    XXH3_128bits_update(state, header->uuid, sizeof(header->uuid));
    hash_u64(state, (uint64_t)header->ctime);
    hash_u64(state, header->header_size);
    hash_u64(state, header->n_disks);
    for (size_t i = 0; i < header->n_disks; i++) {
        hash_u64(state, header->disks[i].id);
        hash_u64(state, header->disks[i].size);
        hash_bytes(state, header->disks[i].name, strlen(header->disks[i].name));
    }
    hash_u64(state, header->n_configs);
    for (size_t i = 0; i < header->n_configs; i++) {
        hash_bytes(state, header->configs[i].name, strlen(header->configs[i].name));
        hash_bytes(state, header->configs[i].data, header->configs[i].len);
    }
    put_sum(out, XXH3_128bits_digest(state));
    XXH3_freeState(state);
    return 0;
}

/* ------------------------------------------------------------------ the layout */

static struct vma_sums *sums_new(void)
{
    struct vma_sums *s = calloc(1, sizeof(*s));
    if (s)
        pthread_mutex_init(&s->lock, NULL);
    return s;
}

void vma_sums_close(struct vma_sums *s)
{
    if (!s)
        return;
    dr_file_unref(s->file);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static void cleanup_sums(struct vma_sums **s)
{
    vma_sums_close(*s);
}
#define CLEANUP_SUMS __attribute__((cleanup(cleanup_sums)))

static size_t fixed_len(unsigned disks)
{
    return FIXED + (size_t)disks * ENTRY;
}

/* Place the tables in the order of ids. The table of a stream comes last, where it can grow. */
static int lay_out(struct vma_sums *s, const struct dr_vma_header *header, const char *path,
                   struct dr_error *err)
{
    uint64_t off = dr_round_up(fixed_len((unsigned)header->n_disks), TABLE_ALIGN);
    for (unsigned pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < header->n_disks; i++) {
            const struct dr_vma_disk *disk = &header->disks[i];
            if (disk->vmstate != (pass == 1))
                continue;
            if (disk->id > 255 || s->by_id[disk->id] || s->n == MAX_DISKS)
                return dr_fail(err, EINVAL, "%s: disk id %u cannot have checksums", path, disk->id);
            if (disk->vmstate && s->n > 0 && s->tables[s->n - 1].grows)
                return dr_fail(err, ENOTSUP, "%s: no checksums for more than one machine state",
                               path);
            struct table *t = &s->tables[s->n++];
            t->id = disk->id;
            t->grows = disk->vmstate;
            t->clusters = disk->vmstate ? 0 : vma_clusters(disk->size);
            t->off = off;
            off += dr_round_up(t->clusters * SUM, TABLE_ALIGN);
            s->by_id[disk->id] = t;
        }
    }
    return 0;
}

/* Hash a whole table. Holes of the file count as zeros. */
static int hash_table(struct vma_sums *s, const struct table *t, uint8_t out[SUM],
                      struct dr_error *err)
{
    static const uint8_t zeros[CHUNK];
    CLEANUP_FREE uint8_t *buf = malloc(CHUNK);
    XXH3_state_t *state = buf ? XXH3_createState() : NULL;
    if (!state)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->file->path);
    XXH3_128bits_reset(state);
    uint64_t len = t->clusters * SUM, run;
    int r = 0;
    for (uint64_t at = 0; at < len && r == 0; at += run) {
        enum dr_file_extent kind;
        r = dr_file_extent(s->file, t->off + at, len - at, &kind, &run, err);
        if (r < 0)
            break;
        run = kind == DR_FILE_HOLE ? run : dr_min(run, CHUNK);
        if (kind != DR_FILE_HOLE)
            r = dr_file_pread(s->file, buf, t->off + at, (size_t)run, err);
        for (uint64_t done = 0; done < run && r == 0; done += CHUNK)
            XXH3_128bits_update(state, kind == DR_FILE_HOLE ? zeros : buf,
                                (size_t)dr_min(run - done, CHUNK));
    }
    put_sum(out, XXH3_128bits_digest(state));
    XXH3_freeState(state);
    return r;
}

static void build_fixed(const struct vma_sums *s, uint8_t *buf)
{
    memcpy(buf, MAGIC, 8);
    put_le32(buf + AT_VERSION, VERSION);
    put_le32(buf + AT_DISKS, s->n);
    memcpy(buf + AT_ARCHIVE, s->archive, SUM);
    for (unsigned i = 0; i < s->n; i++) {
        uint8_t *e = buf + fixed_len(i);
        put_le32(e + AT_ID, s->tables[i].id);
        put_le64(e + AT_CLUSTERS, s->tables[i].clusters);
        put_le64(e + AT_TABLE, s->tables[i].off);
        memcpy(e + AT_SUM, s->tables[i].sum, SUM);
    }
    put_sum(buf + AT_SELF, XXH3_128bits(buf, fixed_len(s->n)));
}

/* ------------------------------------------------------------------ writing */

int vma_sums_create(struct dr_file *file, const struct dr_vma_header *header,
                    struct vma_sums **sums, struct dr_error *err)
{
    CLEANUP_SUMS struct vma_sums *s = sums_new();
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", file->path);
    s->file = dr_file_ref(file);
    int r = identify(header, s->archive, err);
    if (r == 0)
        r = lay_out(s, header, file->path, err);
    if (r == 0)
        *sums = DR_STEAL(s);
    return r;
}

static void grow(struct table *t, uint64_t clusters)
{
    uint64_t have = t->clusters;
    while (have < clusters && !atomic_compare_exchange_weak(&t->clusters, &have, clusters))
        ;
}

static bool is_none(struct vma_sum sum)
{
    return sum.low == 0 && sum.high == 0;
}

static int write_run(struct vma_sums *s, const struct table *t, uint64_t cluster,
                     const struct vma_sum *sums, size_t n, struct dr_error *err)
{
    uint8_t bytes[64 * SUM];
    int r = 0;
    for (size_t done = 0; done < n && r == 0; done += 64) {
        size_t some = (size_t)dr_min(n - done, 64);
        for (size_t i = 0; i < some; i++) {
            put_le64(bytes + i * SUM, sums[done + i].low);
            put_le64(bytes + i * SUM + 8, sums[done + i].high);
        }
        r = dr_file_pwrite(s->file, bytes, t->off + (cluster + done) * SUM, some * SUM, err);
    }
    return r;
}

int vma_sums_put_run(struct vma_sums *s, unsigned id, uint32_t cluster, const struct vma_sum *sums,
                     size_t n, struct dr_error *err)
{
    struct table *t = id < 256 ? s->by_id[id] : NULL;
    if (!t || (!t->grows && !dr_inside(cluster, n, t->clusters)))
        return dr_fail(err, EINVAL, "%s: no place for cluster %u of disk %u", s->file->path,
                       cluster, id);
    if (t->grows)
        grow(t, (uint64_t)cluster + n);
    while (n > 0 && is_none(sums[n - 1]))
        n--;
    while (n > 0 && is_none(sums[0])) {
        sums++;
        cluster++;
        n--;
    }
    return write_run(s, t, cluster, sums, n, err);
}

int vma_sums_put(struct vma_sums *s, unsigned id, uint32_t cluster, struct vma_sum sum,
                 struct dr_error *err)
{
    return vma_sums_put_run(s, id, cluster, &sum, 1, err);
}

int vma_sums_finish(struct vma_sums *s, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *fixed = calloc(1, fixed_len(s->n));
    if (!fixed)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->file->path);
    const struct table *last = s->n ? &s->tables[s->n - 1] : NULL;
    uint64_t end = last ? last->off + last->clusters * SUM : fixed_len(0);
    int r = dr_file_truncate(s->file, end, err);
    for (unsigned i = 0; i < s->n && r == 0; i++)
        r = hash_table(s, &s->tables[i], s->tables[i].sum, err);
    if (r < 0)
        return r;
    build_fixed(s, fixed);
    r = dr_file_pwrite(s->file, fixed, 0, fixed_len(s->n), err);
    return r == 0 ? dr_file_flush(s->file, err) : r;
}

/* ------------------------------------------------------------------ reading */

static int damaged(const struct vma_sums *s, const char *what, struct dr_error *err)
{
    return dr_fail(err, EINVAL, "%s: damaged checksum file: %s", s->file->path, what);
}

/* Read the fixed part and check its checksum. *buf is malloc'ed. */
static int read_fixed(struct vma_sums *s, uint8_t **buf, struct dr_error *err)
{
    uint8_t head[FIXED], self[SUM];
    int r = dr_file_pread_short(s->file, head, 0, sizeof(head), NULL, err);
    if (r < 0)
        return r;
    if (memcmp(head, MAGIC, 8) != 0)
        return dr_fail(err, EINVAL, "%s: no checksums of a VMA archive", s->file->path);
    if (get_le32(head + AT_VERSION) != VERSION)
        return dr_fail(err, EINVAL, "%s: checksums of version %u, not %u", s->file->path,
                       get_le32(head + AT_VERSION), VERSION);
    unsigned n = get_le32(head + AT_DISKS);
    if (n > MAX_DISKS)
        return damaged(s, "number of disks", err);
    CLEANUP_FREE uint8_t *all = malloc(fixed_len(n));
    if (!all)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->file->path);
    r = dr_file_pread(s->file, all, 0, fixed_len(n), err);
    if (r < 0)
        return r == -EIO ? damaged(s, "too short", err) : r;
    memset(all + AT_SELF, 0, SUM);
    put_sum(self, XXH3_128bits(all, fixed_len(n)));
    if (memcmp(self, head + AT_SELF, SUM) != 0)
        return damaged(s, "its header's own checksum is wrong", err);
    *buf = DR_STEAL(all);
    return 0;
}

/* An entry must equal what lay_out() makes of the archive's header. */
static int check_entry(struct vma_sums *s, unsigned i, const uint8_t *e, struct dr_error *err)
{
    struct table *t = &s->tables[i];
    uint64_t clusters = get_le64(e + AT_CLUSTERS);
    uint8_t sum[SUM];
    if (get_le32(e + AT_ID) != t->id || get_le64(e + AT_TABLE) != t->off ||
        (!t->grows && clusters != t->clusters))
        return damaged(s, "its tables are not those of the archive's disks", err);
    t->clusters = clusters;
    if (clusters > UINT32_MAX + 1ull || !dr_inside(t->off, clusters * SUM, dr_file_size(s->file)))
        return damaged(s, "too short", err);
    int r = hash_table(s, t, sum, err);
    if (r == 0 && memcmp(sum, e + AT_SUM, SUM) != 0)
        r = damaged(s, "the checksum of a table is wrong", err);
    return r;
}

int vma_sums_open(struct dr_fs *fs, const char *path, const struct dr_vma_header *header,
                  struct vma_sums **sums, struct dr_error *err)
{
    CLEANUP_SUMS struct vma_sums *s = sums_new();
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    CLEANUP_FREE uint8_t *fixed = NULL;
    int r = dr_file_open(fs, path, 0, &s->file, err);
    if (r == 0)
        r = read_fixed(s, &fixed, err);
    if (r == 0)
        r = identify(header, s->archive, err);
    if (r < 0)
        return r;
    if (memcmp(s->archive, fixed + AT_ARCHIVE, SUM) != 0)
        return dr_fail(err, ESTALE, "%s: checksums of another archive", path);
    r = lay_out(s, header, path, err);
    if (r == 0 && get_le32(fixed + AT_DISKS) != s->n)
        r = damaged(s, "number of disks", err);
    for (unsigned i = 0; i < s->n && r == 0; i++)
        r = check_entry(s, i, fixed + fixed_len(i), err);
    if (r == 0)
        *sums = DR_STEAL(s);
    return r;
}

static int load(struct vma_sums *s, uint64_t off, struct cached *c, struct dr_error *err)
{
    if (c->off == off)
        return 0;
    c->off = 0;
    int r = dr_file_pread_short(s->file, c->bytes, off, CACHE_BYTES, NULL, err);
    c->off = r == 0 ? off : 0;
    return r;
}

int vma_sums_get(struct vma_sums *s, unsigned id, uint32_t cluster, struct vma_sum *sum,
                 bool *known, struct dr_error *err)
{
    struct table *t = id < 256 ? s->by_id[id] : NULL;
    *sum = (struct vma_sum){0, 0};
    *known = false;
    if (!t || cluster >= t->clusters)
        return 0;
    uint64_t at = t->off + (uint64_t)cluster * SUM, base = dr_round_down(at, CACHE_BYTES);
    DR_LOCK_SCOPE(&s->lock);
    struct cached *c = &s->cache[base / CACHE_BYTES % CACHE_SLOTS];
    int r = load(s, base, c, err);
    if (r < 0)
        return r;
    sum->low = get_le64(c->bytes + (at - base));
    sum->high = get_le64(c->bytes + (at - base) + 8);
    *known = !is_none(*sum);
    return 0;
}

bool vma_sums_is(struct dr_fs *fs, const char *path)
{
    struct dr_file *file = NULL;
    uint8_t magic[8];
    unsigned flags = DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK;
    bool is = dr_file_open(fs, path, flags, &file, NULL) == 0 &&
              dr_file_pread(file, magic, 0, sizeof(magic), NULL) == 0 &&
              memcmp(magic, MAGIC, sizeof(magic)) == 0;
    dr_file_unref(file);
    return is;
}
