/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* New images. The data file first, then the tables, the header last: a file with a magic number is
 * complete. A block device loses the beginning of what it held before anything else, so that an
 * interrupted attempt is not taken for the older image, half overwritten. */
#include "formats/qcow2/layout.h"
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"

#define STEP        (UINT64_C(1) << 20) /* bytes written at once */
#define FALLOC_STEP (UINT64_C(1) << 30) /* bytes reserved before it is asked whether to stop */
#define SECTOR      512u

struct creation {
    struct dr_fs *fs;
    const char *path;
    const struct dr_create_params *params;
    struct qcow2_layout lay;
    uint64_t cluster;
    struct dr_file *file;
    uint8_t *buf; /* what is being filled */
    size_t len;   /* bytes of it that are */
    uint64_t at;  /* where in the file it begins */
    char *data_path;
    bool made, made_data; /* and to be removed after a failure */
};

static unsigned creation_flags(const struct creation *c)
{
    return DR_FILE_CREATE | c->params->file_flags | (c->lay.nocow ? DR_FILE_NOCOW : 0u);
}

/* ------------------------------------------------------------------ the data file */

/* A plain name goes where the image is made and moves with it. */
static int place_data_file(struct creation *c, struct dr_error *err)
{
    const char *name = c->lay.data_file;
    const char *final = c->params->final ? c->params->final : c->path;
    c->data_path = dr_path_sibling(strchr(name, '/') ? final : c->path, name);
    if (!c->data_path)
        return dr_fail_errno(err, ENOMEM, "%s", c->path);
    if (c->params->on_device && dr_path_is_no_device(c->data_path))
        return dr_fail(err, ENODEV,
                       "%s: its data file would be made among the devices, as %s, and not last; "
                       "give its path",
                       c->path, c->data_path);
    if (strcmp(name, dr_path_basename(final)) == 0)
        return dr_fail(err, EINVAL, "%s: its data file \"%s\" would be the image itself", c->path,
                       name);
    return 0;
}

/* Zeros in [off, end) that take space. */
static int preallocate(struct creation *c, struct dr_file *f, uint64_t off, uint64_t end,
                       struct dr_error *err)
{
    bool full = c->lay.prealloc == QCOW2_PREALLOC_FULL;
    unsigned how = full ? DR_FILE_ZERO_WRITE : DR_FILE_ZERO_ALLOCATE;
    uint64_t step = full ? STEP : FALLOC_STEP;
    int r = 0;
    for (; r == 0 && off < end && c->lay.prealloc >= QCOW2_PREALLOC_FALLOC; off += step) {
        r = dr_create_stopped(c->params->stop, err);
        if (r == 0)
            r = dr_file_zero(f, off, dr_min(step, end - off), how, err);
    }
    return r;
}

static int make_data_file(struct creation *c, struct dr_error *err)
{
    struct dr_file *f = NULL;
    int r = place_data_file(c, err);
    if (r == 0)
        r = dr_file_open(c->fs, c->data_path, creation_flags(c), &f, err);
    if (r < 0)
        return r;
    c->made_data = true;
    r = dr_file_truncate(f, c->lay.h.size, err);
    if (r == 0)
        r = preallocate(c, f, 0, c->lay.h.size, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    dr_file_unref(f);
    if (r == 0 && !(c->params->file_flags & DR_FILE_NO_FLUSH))
        r = c->fs->ops->sync_dir(c->fs, c->data_path, err);
    return r;
}

/* ------------------------------------------------------------------ tables */

static int write_out(struct creation *c, struct dr_error *err)
{
    int r = c->len ? dr_file_pwrite(c->file, c->buf, c->at, c->len, err) : 0;
    c->at += c->len;
    c->len = 0;
    return r;
}

/* n big-endian words follow. Room for them in one go; zeroed. */
static int room_for(struct creation *c, size_t bytes, uint8_t **p, struct dr_error *err)
{
    int r = c->len + bytes > STEP ? write_out(c, err) : 0;
    *p = c->buf + c->len;
    memset(*p, 0, bytes);
    c->len += bytes;
    return r;
}

/* A table of n entries, `first` in the first of them and `step` more in each that follows. The next
 * one is written behind it. */
static int write_table(struct creation *c, uint64_t n, uint64_t first, uint64_t step,
                       struct dr_error *err)
{
    uint64_t bytes = dr_round_up(n * 8, c->cluster);
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < bytes / 8; i++) {
        uint8_t *p;
        r = room_for(c, 8, &p, err);
        if (r == 0 && i < n)
            put_be64(p, first + i * step);
    }
    return r;
}

static int write_blocks(struct creation *c, struct dr_error *err)
{
    unsigned order = c->lay.h.refcount_order;
    uint64_t per_block = c->cluster * 8 >> order, n = qcow2_layout_clusters(&c->lay);
    CLEANUP_FREE uint8_t *block = malloc(c->cluster);
    if (!block)
        return dr_fail_errno(err, ENOMEM, "%s", c->path);
    int r = write_out(c, err);
    for (uint64_t i = 0; r == 0 && i < c->lay.blocks; i++) {
        memset(block, 0, c->cluster);
        for (uint64_t j = 0; j < per_block && i * per_block + j < n; j++)
            qcow2_count_put(order, block, j, 1);
        r = dr_file_pwrite(c->file, block, c->at, c->cluster, err);
        c->at += c->cluster;
    }
    return r;
}

/* A new disk's bytes are there, unless its parent's are to be seen. */
static int write_l2_tables(struct creation *c, struct dr_error *err)
{
    const struct qcow2_layout *lay = &c->lay;
    bool extended = lay->h.incompatible & QCOW2_EXTL2;
    uint64_t n = dr_div_up(lay->h.size, c->cluster), entry = extended ? 16 : 8;
    uint64_t first = lay->data_file ? 0 : qcow2_data_first(lay) * c->cluster;
    /* What is encrypted is said to be zeros: what the file has there would decrypt to noise. */
    uint64_t all = lay->h.crypt ? (uint64_t)UINT32_MAX << 32 : UINT32_MAX;
    uint64_t masks = lay->backing_name ? 0 : all;
    uint64_t bits = QCOW2_COPIED | (lay->h.crypt && !extended ? 1u : 0u);
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < lay->l2 * c->cluster / entry; i++) {
        uint8_t *p;
        r = room_for(c, entry, &p, err);
        if (r < 0 || i >= n)
            continue;
        put_be64(p, (first + i * c->cluster) | bits);
        if (extended)
            put_be64(p + 8, masks);
    }
    return r;
}

static int write_tables(struct creation *c, struct dr_error *err)
{
    const struct qcow2_layout *lay = &c->lay;
    uint64_t l2_first = qcow2_l1_first(lay) + lay->l1;
    c->at = c->cluster;
    int r = write_table(c, lay->blocks, (1 + lay->reftable) * c->cluster, c->cluster, err);
    if (r == 0)
        r = write_blocks(c, err);
    if (r == 0)
        r = write_table(c, lay->l2, l2_first * c->cluster | QCOW2_COPIED, c->cluster, err);
    if (r == 0)
        r = write_out(c, err);
    c->at = l2_first * c->cluster;
    if (r == 0)
        r = write_l2_tables(c, err);
    return r < 0 ? r : write_out(c, err);
}

static int write_crypto(struct creation *c, struct dr_error *err)
{
    struct luks_header *luks = &c->lay.luks;
    if (!c->lay.h.crypt)
        return 0;
    CLEANUP_FREE uint8_t *bytes = calloc(1, luks->payload);
    if (!bytes)
        return dr_fail_errno(err, ENOMEM, "%s", c->path);
    int r = luks_make(&c->lay.encrypt, c->path, luks, bytes, err);
    return r < 0 ? r
                 : dr_file_pwrite(c->file, bytes, qcow2_crypto_first(&c->lay) * c->cluster,
                                  luks->payload, err);
}

/* Clusters that are allocated at once read as zeros, whatever a device held there. */
static int write_data(struct creation *c, struct dr_error *err)
{
    uint64_t first = qcow2_data_first(&c->lay) * c->cluster;
    uint64_t end = qcow2_layout_clusters(&c->lay) * c->cluster;
    int r;
    if (!c->params->on_device)
        r = dr_file_truncate(c->file, end, err);
    else
        r = dr_file_zero(c->file, first, end - first, DR_FILE_ZERO_PUNCH, err);
    return r < 0 ? r : preallocate(c, c->file, first, end, err);
}

static int write_header(struct creation *c, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *head = malloc(c->cluster);
    if (!head)
        return dr_fail_errno(err, ENOMEM, "%s", c->path);
    int r = qcow2_first_cluster(&c->lay, c->path, head, err);
    if (r == 0)
        r = dr_file_flush(c->file, err);
    if (r == 0)
        r = dr_file_pwrite(c->file, head, 0, c->cluster, err);
    return r < 0 ? r : dr_file_flush(c->file, err);
}

/* ------------------------------------------------------------------ create */

/* Forget an older image, durably, and then clear the place of the tables: only what is not zero in
 * them is written later. */
static int clear_device(struct creation *c, struct dr_error *err)
{
    uint64_t tables = qcow2_data_first(&c->lay) * c->cluster;
    int r = dr_file_zero(c->file, 0, SECTOR, 0, err);
    if (r == 0)
        r = dr_file_flush(c->file, err);
    return r < 0 ? r : dr_file_zero(c->file, SECTOR, tables - SECTOR, 0, err);
}

static int open_device(struct creation *c, struct dr_error *err)
{
    uint64_t need = qcow2_layout_clusters(&c->lay) * c->cluster;
    int r = dr_file_open(c->fs, c->path, DR_FILE_RDWR | c->params->file_flags, &c->file, err);
    if (r < 0)
        return r;
    if (need > dr_file_size(c->file))
        return dr_fail(err, ENOSPC,
                       "%s: the device is too small: it has %llu bytes, the new image takes %llu",
                       c->path, ULL(dr_file_size(c->file)), ULL(need));
    return clear_device(c, err);
}

static int open_file(struct creation *c, struct dr_error *err)
{
    if (c->params->on_device)
        return open_device(c, err);
    int r = dr_file_open(c->fs, c->path, creation_flags(c), &c->file, err);
    c->made = r == 0;
    return r;
}

static int make_image(struct creation *c, struct dr_error *err)
{
    int r = open_file(c, err);
    if (r == 0)
        r = write_tables(c, err);
    if (r == 0)
        r = write_crypto(c, err);
    if (r == 0)
        r = write_data(c, err);
    if (r == 0)
        r = write_header(c, err);
    if (r == 0 && c->made && !(c->params->file_flags & DR_FILE_NO_FLUSH))
        r = c->fs->ops->sync_dir(c->fs, c->path, err);
    return r;
}

/* Names that do not fit are refused before anything is made. */
static int check_names(struct creation *c, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *head = malloc(c->cluster);
    if (!head)
        return dr_fail_errno(err, ENOMEM, "%s", c->path);
    return qcow2_first_cluster(&c->lay, c->path, head, err);
}

int qcow2_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                 struct dr_error *err)
{
    struct creation c = {.fs = fs, .path = path, .params = params};
    int r = qcow2_lay_out(&c.lay, path, params, err);
    if (r < 0)
        return r;
    c.cluster = qcow2_cluster(&c.lay.h);
    c.buf = malloc(STEP);
    r = c.buf ? check_names(&c, err) : dr_fail_errno(err, ENOMEM, "%s", path);
    if (r == 0 && c.lay.data_file)
        r = make_data_file(&c, err);
    if (r == 0)
        r = make_image(&c, err);
    dr_file_unref(c.file);
    if (r < 0 && c.made)
        fs->ops->unlink(fs, path, NULL);
    if (r < 0 && c.made_data)
        fs->ops->unlink(fs, c.data_path, NULL);
    free(c.buf);
    free(c.data_path);
    return r;
}

/* ------------------------------------------------------------------ measure */

/* As qemu-img: all tables that the disk would need if it were full. */
int qcow2_measure(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                  struct dr_error *err)
{
    struct qcow2_layout lay;
    *cost = (struct dr_cost){0};
    int r = qcow2_lay_out(&lay, path, params, err);
    if (r < 0)
        return r;
    uint64_t cluster = qcow2_cluster(&lay.h);
    lay.l2 = lay.h.l1_entries;
    lay.data = lay.data_file ? 0 : dr_div_up(lay.h.size, cluster);
    uint64_t per_block = cluster * 8 >> lay.h.refcount_order;
    uint64_t fixed = 1 + lay.l1 + lay.l2 + lay.crypto;
    uint64_t blocks = dr_div_up(fixed + lay.data, per_block - 1), all;
    do {
        all = blocks;
        blocks = dr_div_up(fixed + lay.data + blocks + dr_div_up(blocks * 8, cluster), per_block);
    } while (blocks != all);
    cost->fixed = (fixed + blocks + dr_div_up(blocks * 8, cluster)) * cluster;
    cost->unit = lay.data_file ? 0 : cluster;
    if (lay.prealloc && !lay.data_file) {
        cost->fixed += lay.data * cluster;
        cost->unit = 0;
    }
    return lay.h.version < 3 ? 0 : qcow2_measure_bitmaps(params->bitmaps_of, cluster, cost, err);
}
