/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Making a new image of the toy format. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "toy.h"

const struct dr_option_help toy_options[] = {
    {"data_file", "str", "name of a separate file for the data", NULL},
    {"l2_entries", "num", "entries in a level-2 table", NULL},
    {"clusters", "num", "no more than this many clusters in each file", NULL},
    {"cluster", "num", "bytes in a cluster", NULL},
    {"block", "num", "counts in a count block", NULL},
    {"roots", "num", "how many count blocks there may be before the roots move", NULL},
    {NULL, NULL, NULL, NULL},
};

static int toy_header_fields(uint8_t *h, const struct dr_create_params *p, struct dr_error *err)
{
    memcpy(h, toy_magic, 8);
    put_be64(h + TOY_OFF_SIZE, p->size);
    put_be32(h + TOY_OFF_CLUSTERS, 4096);
    put_be32(h + TOY_OFF_L2, 32);
    put_be32(h + TOY_OFF_CLUSTER, 4096);
    put_be32(h + TOY_OFF_ROOTS_N, TOY_ROOTS);
    put_be32(h + TOY_OFF_BLOCK, 64);
    put_be64(h + TOY_OFF_ROOTS_AT, TOY_FIRST_ROOTS);
    put_be64(h + TOY_OFF_L1, TOY_FIRST_L1);
    for (size_t i = 0; i < p->n_options; i++) {
        const struct dr_option *o = &p->options[i];
        uint32_t n = (uint32_t)strtoul(o->value, NULL, 10);
        if (!strcmp(o->name, "data_file") && strlen(o->value) < 63)
            memcpy(h + TOY_OFF_DATA, o->value, strlen(o->value));
        else if (!strcmp(o->name, "l2_entries"))
            put_be32(h + TOY_OFF_L2, n);
        else if (!strcmp(o->name, "clusters"))
            put_be32(h + TOY_OFF_CLUSTERS, n);
        else if (!strcmp(o->name, "cluster"))
            put_be32(h + TOY_OFF_CLUSTER, n);
        else if (!strcmp(o->name, "block"))
            put_be32(h + TOY_OFF_BLOCK, n);
        else if (!strcmp(o->name, "roots"))
            put_be32(h + TOY_OFF_ROOTS_N, n);
        else
            return dr_fail(err, EINVAL, "toy: unknown option %s", o->name);
    }
    return 0;
}

int toy_header_backing(uint8_t *h, const char *name, const char *format, struct dr_error *err)
{
    memset(h + TOY_OFF_BACKING, 0, TOY_BACKING_CAP);
    memset(h + TOY_OFF_BACKING_FORMAT, 0, 16);
    if (name && strlen(name) >= TOY_BACKING_CAP)
        return dr_fail(err, ENOSPC, "toy: no room for a backing name of %zu bytes", strlen(name));
    if (name)
        memcpy(h + TOY_OFF_BACKING, name, strlen(name));
    if (name && format)
        memcpy(h + TOY_OFF_BACKING_FORMAT, format, strnlen(format, 15));
    return 0;
}

static int toy_create_data(struct dr_fs *fs, const char *path, const uint8_t *h, unsigned flags,
                           struct dr_error *err)
{
    CLEANUP_FREE char *data = dr_path_sibling(path, (const char *)h + TOY_OFF_DATA);
    struct dr_file *f = NULL;
    int r = data ? dr_file_open(fs, data, DR_FILE_CREATE | flags, &f, err)
                 : dr_fail(err, ENOMEM, "out of memory");
    if (r)
        return r;
    r = dr_file_flush(f, err);
    dr_file_unref(f);
    if (r)
        fs->ops->unlink(fs, data, NULL);
    return r;
}

static void toy_count_new(uint8_t *block, const struct toy *t, uint64_t at, uint64_t len)
{
    for (uint64_t c = at / t->cluster; c * t->cluster < at + len; c++)
        put_be16(block + 2 * c, 1);
}

static int toy_fill_new(struct dr_file *f, const uint8_t *h, struct dr_error *err)
{
    uint8_t block[512] = {0}, root[512] = {0};
    struct toy t = {.roots_n = get_be32(h + TOY_OFF_ROOTS_N)};
    if (!toy_set_cluster(&t, get_be32(h + TOY_OFF_CLUSTER)))
        return dr_fail(err, EINVAL, "toy: clusters of %u bytes", t.cluster);
    toy_count_new(block, &t, 0, 512);
    toy_count_new(block, &t, TOY_DATA_ROOTS_AT, 8 * TOY_ROOTS);
    toy_count_new(block, &t, TOY_FIRST_L1, TOY_L1_BYTES);
    toy_count_new(block, &t, TOY_FIRST_ROOTS, toy_roots_bytes(&t));
    toy_count_new(block, &t, TOY_FIRST_BLOCK, t.cluster);
    put_be64(root, TOY_FIRST_BLOCK);
    int r = dr_file_truncate(f, TOY_FIRST_BLOCK + 4096, err);
    if (!r)
        r = dr_file_pwrite(f, block, TOY_FIRST_BLOCK, sizeof(block), err);
    if (!r)
        r = dr_file_pwrite(f, root, TOY_FIRST_ROOTS, sizeof(root), err);
    if (!r) /* the header last: until then nobody takes it for an image */
        r = dr_file_flush(f, err);
    if (!r)
        r = dr_file_pwrite(f, h, 0, 512, err);
    return r ? r : dr_file_flush(f, err);
}

int toy_create(struct dr_fs *fs, const char *path, const struct dr_create_params *p,
               struct dr_error *err)
{
    uint8_t h[512] = {0};
    struct dr_file *f = NULL;
    int r = toy_header_fields(h, p, err);
    if (!r)
        r = toy_header_backing(h, p->backing_name, p->backing_format, err);
    if (!r && h[TOY_OFF_DATA])
        r = toy_create_data(fs, path, h, p->file_flags, err);
    if (r)
        return r;
    r = dr_file_open(fs, path, DR_FILE_CREATE | p->file_flags, &f, err);
    bool made = !r;
    if (!r)
        r = toy_fill_new(f, h, err);
    if (!r)
        r = fs->ops->sync_dir(fs, path, err);
    dr_file_unref(f);
    if (!r)
        return 0;
    if (made)
        fs->ops->unlink(fs, path, NULL);
    CLEANUP_FREE char *data = dr_path_sibling(path, (const char *)h + TOY_OFF_DATA);
    if (h[TOY_OFF_DATA] && data)
        fs->ops->unlink(fs, data, NULL);
    return r;
}
