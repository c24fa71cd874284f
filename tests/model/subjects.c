/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "toy.h"

#define KIB 1024u
#define MIB (1024u * KIB)

#define VMDK(kind) .format = "vmdk", .n_pairs = 1, .pairs = {{"subformat", kind}}
#define VMDK_ZEROED(kind) \
    .format = "vmdk", .n_pairs = 2, .pairs = {{"subformat", kind}, {"zeroed_grain", "on"}}

#define ADDCOW_JUNK .n_pairs = 1, .pairs = {{"image_file", "top.raw"}}, .junk = true

#define QCOW2(key, value) .format = "qcow2", .n_pairs = 1, .pairs = {{key, value}}
#define QCOW2_2(key, value, key2, value2) \
    .format = "qcow2", .n_pairs = 2, .pairs = {{key, value}, {key2, value2}}

const struct subject model_subjects[] = {
    {.name = "toy", .format = "toy", .size = 1 * MIB},
    {.name = "toy-odd", .format = "toy", .size = 700 * KIB + 1234},
    {.name = "toy-data-file",
     .format = "toy",
     .size = 1 * MIB,
     .n_pairs = 1,
     .pairs = {{"data_file", "top.data"}}},
    {.name = "toy-small-tables",
     .format = "toy",
     .size = 1 * MIB,
     .n_pairs = 1,
     .pairs = {{"l2_entries", "4"}}},
    {.name = "toy-snapshot", .format = "toy", .size = 512 * KIB, .snapshot = true},
    {.name = "toy-sectors", /* tables, counts and data share pages; the roots move twice */
     .format = "toy",
     .size = 128 * KIB,
     .n_pairs = 2,
     .pairs = {{"cluster", "512"}, {"roots", "2"}},
     .waits = true},
    {.name = "toy-sectors-snapshot",
     .format = "toy",
     .size = 64 * KIB + 300,
     .n_pairs = 3,
     .pairs = {{"cluster", "512"}, {"roots", "2"}, {"l2_entries", "48"}},
     .waits = true,
     .snapshot = true},
    {.name = "toy-large-tables", /* of two pages, copied */
     .format = "toy",
     .size = 512 * KIB,
     .n_pairs = 1,
     .pairs = {{"l2_entries", "512"}},
     .snapshot = true},
    {.name = "toy-over-raw",
     .format = "toy",
     .size = 1 * MIB,
     .base_format = "raw",
     .base_size = 1 * MIB},
    {.name = "toy-over-shorter",
     .format = "toy",
     .size = 1 * MIB,
     .base_format = "toy",
     .base_size = 500 * KIB + 700},
    {.name = "toy-over-longer",
     .format = "toy",
     .size = 600 * KIB + 3,
     .base_format = "toy",
     .base_size = 1 * MIB,
     .n_pairs = 1,
     .pairs = {{"data_file", "top.data"}}},
    {.name = "raw", .format = "raw", .size = 1 * MIB},
    {.name = "raw-odd", .format = "raw", .size = 300 * KIB + 3 * 512},
    {.name = "vmdk-sparse", .size = 2 * MIB, VMDK("monolithicSparse")},
    {.name = "vmdk-sparse-odd", .size = 1 * MIB + 7 * 512, VMDK("monolithicSparse")},
    {.name = "vmdk-zeroed", .size = 2 * MIB, VMDK_ZEROED("monolithicSparse")},
    {.name = "vmdk-split", .size = 2 * MIB, VMDK("twoGbMaxExtentSparse")},
    {.name = "vmdk-uneven", .size = 2 * MIB, VMDK("twoGbMaxExtentSparse"), .uneven = true},
    {.name = "vmdk-flat", .size = 1 * MIB, VMDK("monolithicFlat")},
    {.name = "vmdk-split-flat", .size = 1 * MIB, VMDK("twoGbMaxExtentFlat")},
    {.name = "vmdk-over-vmdk",
     .size = 2 * MIB,
     .base_format = "vmdk",
     .base_size = 2 * MIB,
     VMDK("monolithicSparse")},
    {.name = "vmdk-over-shorter",
     .size = 2 * MIB,
     .base_format = "vmdk",
     .base_size = 1 * MIB + 5 * 512,
     VMDK_ZEROED("monolithicSparse")},
    {.name = "vmdk-over-longer",
     .size = 1 * MIB + 9 * 512,
     .base_format = "vmdk",
     .base_size = 2 * MIB,
     VMDK("twoGbMaxExtentSparse")},
    {.name =
         "vmdk-esx", /* tables are made by the first write to each; grains share their sectors */
     .size = 5 * MIB,
     VMDK("vmfsSparse")},
    {.name = "vmdk-esx-over-vmdk",
     .size = 600 * KIB + 3 * 512,
     .base_format = "vmdk",
     .base_size = 500 * KIB,
     VMDK("vmfsSparse")},
    {.name = "vmdk-uneven-over-vmdk",
     .size = 2 * MIB,
     .base_format = "vmdk",
     .base_size = 2 * MIB,
     VMDK_ZEROED("twoGbMaxExtentSparse"),
     .uneven = true},
    {.name = "add-cow", .format = "add-cow", .size = 300 * KIB + 700},
    {.name = "add-cow-over-raw",
     .format = "add-cow",
     .size = 1 * MIB,
     .base_format = "raw",
     .base_size = 1 * MIB},
    {.name = "add-cow-over-shorter",
     .format = "add-cow",
     .size = 1 * MIB,
     .base_format = "raw",
     .base_size = 500 * KIB + 700,
     ADDCOW_JUNK},
    {.name = "add-cow-over-longer",
     .format = "add-cow",
     .size = 300 * KIB + 3,
     .base_format = "raw",
     .base_size = 1 * MIB},
    {.name = "add-cow-over-add-cow",
     .format = "add-cow",
     .size = 600 * KIB + 511,
     .base_format = "add-cow",
     .base_size = 400 * KIB + 100,
     ADDCOW_JUNK},
    {.name = "add-cow-over-vmdk",
     .format = "add-cow",
     .size = 1 * MIB,
     .base_format = "vmdk",
     .base_size = 700 * KIB + 512},
    {.name = "qcow2", .size = 3 * MIB, QCOW2("cluster_size", "4096")},
    {.name = "qcow2-odd", .format = "qcow2", .size = 1 * MIB + 5 * 512},
    {.name = "qcow2-v2", .size = 1 * MIB, QCOW2_2("compat", "0.10", "cluster_size", "2048")},
    {.name = "qcow2-sectors", /* tables, counts and data share pages; the tables grow */
     .size = 512 * KIB,
     .waits = true,
     QCOW2_2("cluster_size", "512", "refcount_bits", "64")},
    {.name = "qcow2-full-table", /* the refcount table has to grow */
     .size = 3 * MIB,
     .fill = 1960 * KIB,
     .waits = true,
     QCOW2_2("cluster_size", "512", "refcount_bits", "64")},
    {.name = "qcow2-bits", .size = 1 * MIB, QCOW2_2("cluster_size", "1024", "refcount_bits", "1")},
    {.name = "qcow2-large", .size = 5 * MIB, QCOW2("cluster_size", "2M")},
    {.name = "qcow2-sub-clusters",
     .size = 2 * MIB,
     .base_format = "raw",
     .base_size = 1 * MIB + 700,
     QCOW2_2("cluster_size", "16k", "extended_l2", "on")},
    {.name = "qcow2-data-file", .size = 1 * MIB, QCOW2("data_file", "top.data")},
    {.name = "qcow2-raw-data-file",
     .size = 1 * MIB,
     QCOW2_2("data_file", "top.data", "data_file_raw", "on")},
    {.name = "qcow2-zstd",
     .size = 1 * MIB,
     QCOW2_2("cluster_size", "8k", "compression_type", "zstd")},
    {.name = "qcow2-full", .size = 1 * MIB, QCOW2("preallocation", "full")},
    {.name = "qcow2-bitmaps",
     .size = 1 * MIB + 512,
     .bitmaps = true,
     QCOW2_2("cluster_size", "4096", "refcount_bits", "16")},
    {.name = "qcow2-bitmaps-sectors",
     .size = 256 * KIB,
     .base_format = "raw",
     .base_size = 200 * KIB,
     .waits = true,
     .bitmaps = true,
     QCOW2_2("cluster_size", "512", "refcount_bits", "64")},
    {.name = "qcow2-over-qcow2",
     .size = 2 * MIB,
     .base_format = "qcow2",
     .base_size = 2 * MIB,
     QCOW2("cluster_size", "4096")},
    {.name = "qcow2-over-longer",
     .size = 600 * KIB + 512,
     .base_format = "qcow2",
     .base_size = 1 * MIB,
     QCOW2("cluster_size", "8k")},
    {.name = "qcow2-over-vmdk",
     .size = 1 * MIB,
     .base_format = "vmdk",
     .base_size = 700 * KIB + 512,
     QCOW2("cluster_size", "16k")},
    {.name = "qcow2-device", .size = 1 * MIB + 512, .device = 2 * MIB, QCOW2("cluster_size", "8k")},
    {.name = "qcow2-device-sub-clusters",
     .size = 1 * MIB,
     .device = 3 * MIB,
     .base_format = "raw",
     .base_size = 700 * KIB,
     QCOW2_2("cluster_size", "16k", "extended_l2", "on")},
    {.name = "qcow2-device-sectors",
     .size = 256 * KIB,
     .device = 1 * MIB + 512,
     .waits = true,
     QCOW2_2("cluster_size", "512", "refcount_bits", "64")},
    {.name = "qcow2-device-preallocated",
     .size = 1 * MIB,
     .device = 2 * MIB,
     QCOW2_2("preallocation", "metadata", "cluster_size", "4k")},
    {.name = "qcow2-three",
     .size = 3 * 1024,
     .base_format = "raw",
     .base_size = 2 * 1024 + 512,
     QCOW2("cluster_size", "1024")},
    {.name = "qcow2-bits-three",
     .size = 3 * 1024,
     QCOW2_2("cluster_size", "1024", "refcount_bits", "1")},
    {.name = "qcow2-sub-clusters-three",
     .size = 3 * 16 * KIB,
     .base_format = "qcow2",
     .base_size = 3 * 16 * KIB,
     QCOW2_2("cluster_size", "16k", "extended_l2", "on")},
    {.name = "qcow2-snapshots-three",
     .size = 3 * 1024,
     .snapshots = true,
     QCOW2_2("cluster_size", "1024", "refcount_bits", "8")},
    {.name = "qcow2-sub-snapshots-three",
     .size = 3 * 16 * KIB,
     .base_format = "raw",
     .base_size = 2 * 16 * KIB,
     .snapshots = true,
     QCOW2_2("cluster_size", "16k", "extended_l2", "on")},
    {.name = "qcow2-bitmaps-three",
     .size = 3 * 1024,
     .snapshots = true,
     .bitmaps = true,
     QCOW2_2("cluster_size", "1024", "refcount_bits", "8")},
    {.name = "qcow2-bitmaps-over-three",
     .size = 3 * 2048,
     .base_format = "raw",
     .base_size = 2 * 2048 + 512,
     .bitmaps = true,
     QCOW2("cluster_size", "2048")},
    {.name = "raw-bitmaps", .format = "raw", .size = 512 * KIB, .bitmaps = true},
    {.name = "vmdk-bitmaps", .size = 1 * MIB, .bitmaps = true, VMDK("monolithicSparse")},
    {.name = "vmdk-flat-bitmaps", .size = 512 * KIB, .bitmaps = true, VMDK("monolithicFlat")},
    {.name = "add-cow-bitmaps",
     .format = "add-cow",
     .size = 300 * KIB + 700,
     .base_format = "raw",
     .base_size = 200 * KIB,
     .bitmaps = true},
    {.name = "vmdk-esx-three", .size = 3 * 512, VMDK("vmfsSparse")},
    {.name = "raw-bitmaps-three", .format = "raw", .size = 3 * 1024, .bitmaps = true},
    {.name = "add-cow-bitmaps-three",
     .format = "add-cow",
     .size = 3 * 2048,
     .base_format = "raw",
     .base_size = 2 * 2048 + 512,
     .bitmaps = true},
    {.name = "toy-over-add-cow",
     .format = "toy",
     .size = 1 * MIB,
     .base_format = "add-cow",
     .base_size = 700 * KIB + 300},
};
const size_t model_n_subjects = sizeof(model_subjects) / sizeof(model_subjects[0]);

static const char *with_suffix(char *buf, size_t n, const char *stem, const char *format)
{
    snprintf(buf, n, "%s.%s", stem, format);
    return buf;
}

const char *subject_top(const struct subject *s)
{
    static _Thread_local char path[64];
    return with_suffix(path, sizeof(path), MODEL_TOP, s->format);
}

const char *subject_base(const struct subject *s)
{
    static _Thread_local char path[64];
    return with_suffix(path, sizeof(path), MODEL_BASE, s->base_format);
}

/* ------------------------------------------------------------------ making images */

static bool is_device(struct dr_fs *fs, const char *path)
{
    struct dr_file *f;
    if (dr_file_open(fs, path, 0, &f, NULL))
        return false;
    bool device = f->block_device;
    dr_file_unref(f);
    return device;
}

int model_create(struct dr_fs *fs, const char *format, const char *path, uint64_t size,
                 const struct dr_pair *pairs, size_t n, const char *backing,
                 const char *backing_format, struct dr_error *err)
{
    const struct dr_format *fmt = dr_format_find(format);
    struct dr_option options[4];
    struct dr_image *parent = NULL;
    assert_non_null(fmt);
    for (size_t i = 0; i < n; i++)
        options[i] = (struct dr_option){pairs[i].name, pairs[i].value};
    struct dr_create_params p = {.size = size, .options = options, .n_options = n};
    p.on_device = is_device(fs, path);
    CLEANUP_FREE char *where = backing ? dr_path_sibling(path, backing) : NULL;
    int r = backing ? dr_image_open(fs, where, backing_format, 0, &parent, err) : 0;
    p.backing = parent;
    p.backing_name = backing;
    p.backing_format = backing_format;
    if (!r)
        r = fmt->create(fs, path, &p, err);
    dr_image_unref(parent, NULL);
    return r;
}

static void must(int r, const struct subject *s, const char *what, const struct dr_error *err)
{
    if (r)
        MODEL_FAIL(s, "%s: %d %s", what, r, err->text);
}

/* Extents in the order of the disk; the sizes are in sectors and end inside grains of the whole. */
static const unsigned uneven_sectors[] = {128, 8, 1000, 257, 1, 2702};

static void make_extent(const struct subject *s, struct dr_fs *fs, unsigned i, char *line, size_t n)
{
    struct dr_error err = DR_ERROR_INIT;
    char path[64];
    snprintf(path, sizeof(path), "dir/e%u.vmdk", i);
    struct dr_pair pairs[2] = {{"subformat", "twoGbMaxExtentSparse"}, {"zeroed_grain", "on"}};
    must(model_create(fs, "vmdk", path, uneven_sectors[i] * 512ull, pairs, s->n_pairs, NULL, NULL,
                      &err),
         s, "create an extent", &err);
    must(fs->ops->unlink(fs, path, &err), s, "unlink", &err);
    snprintf(line, n, "RW %u SPARSE \"e%u-s001.vmdk\"\n", uneven_sectors[i], i);
}

/* The lines of an embedded or textual descriptor for key; "" if it has none. */
static void parent_lines(const struct subject *s, struct dr_fs *fs, char *out, size_t n)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_image *base;
    out[0] = 0;
    if (!s->base_format)
        return;
    must(dr_image_open(fs, subject_base(s), NULL, 0, &base, &err), s, "open the base", &err);
    snprintf(out, n, "parentFileNameHint=\"base.vmdk\"\n");
    char id[32];
    snprintf(id, sizeof(id), "parentCID=%08x\n", base->fmt->id(base));
    memmove(out + strlen(id), out, strlen(out) + 1);
    memcpy(out, id, strlen(id));
    dr_image_unref(base, NULL);
}

static void make_uneven(const struct subject *s, struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    char text[2048], parent[200], line[100];
    parent_lines(s, fs, parent, sizeof(parent));
    int n = snprintf(text, sizeof(text),
                     "# Disk DescriptorFile\nversion=1\nCID=12345678\n%s"
                     "createType=\"twoGbMaxExtentSparse\"\n\n# Extent description\n",
                     parent[0] ? parent : "parentCID=ffffffff\n");
    for (unsigned i = 0; i < 6; i++) {
        make_extent(s, fs, i, line, sizeof(line));
        n += snprintf(text + n, sizeof(text) - (size_t)n, "%s", line);
    }
    n += snprintf(text + n, sizeof(text) - (size_t)n,
                  "\n# The Disk Data Base \n#DDB\n\nddb.adapterType = \"ide\"\n"
                  "ddb.geometry.cylinders = \"4\"\nddb.geometry.heads = \"16\"\n"
                  "ddb.geometry.sectors = \"63\"\nddb.virtualHWVersion = \"4\"\n");
    struct dr_file *f;
    must(dr_file_open(fs, subject_top(s), DR_FILE_CREATE, &f, &err), s, "descriptor", &err);
    must(dr_file_pwrite(f, text, 0, (size_t)n, &err), s, "descriptor", &err);
    must(dr_file_flush(f, &err), s, "descriptor", &err);
    dr_file_unref(f);
    must(fs->ops->sync_dir(fs, subject_top(s), &err), s, "sync the directory", &err);
}

/* As a crash may leave it: data that no bit speaks of. */
static void make_junk(const struct subject *s, struct dr_fs *fs, struct rnd *rnd)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f;
    CLEANUP_FREE uint8_t *buf = malloc(s->size);
    rnd_fill(rnd, buf, s->size);
    must(dr_file_open(fs, "dir/top.raw", DR_FILE_RDWR, &f, &err), s, "the raw file", &err);
    must(dr_file_pwrite(f, buf, 0, s->size, &err), s, "junk", &err);
    must(dr_file_flush(f, &err), s, "junk", &err);
    dr_file_unref(f);
}

/* A device holds whatever was there before: here, bytes that look like entries of tables. */
static void make_device(const struct subject *s, struct dr_fs *fs, struct rnd *rnd)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f;
    CLEANUP_FREE uint8_t *buf = malloc(s->device);
    rnd_fill(rnd, buf, s->device);
    for (uint64_t i = 0; i + 8 <= s->device; i += 8)
        if (rnd_below(rnd, 2))
            put_be64(buf + i, (UINT64_C(1) << 63) | rnd_below(rnd, s->device / 512) * 512);
    must(dr_file_open(fs, subject_top(s), DR_FILE_CREATE, &f, &err), s, "the device", &err);
    must(dr_file_pwrite(f, buf, 0, s->device, &err), s, "the device", &err);
    must(dr_file_flush(f, &err), s, "the device", &err);
    dr_file_unref(f);
    must(fs->ops->sync_dir(fs, subject_top(s), &err), s, "the device", &err);
    must(fs->ops->make_device(fs, subject_top(s), &err), s, "the device", &err);
}

/* Random runs of data, zeros and nothing. */
static void scribble(const struct subject *s, struct dr_fs *fs, const char *path,
                     const char *format, struct rnd *rnd, struct shadow *view, unsigned n)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_open_options o = {.format = format, .flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    must(dr_open_fs(fs, path, &o, &disk, &err), s, "open to scribble", &err);
    CLEANUP_FREE uint8_t *buf = malloc(64 * KIB);
    for (unsigned i = 0; i < n; i++) {
        uint64_t len = 1 + rnd_below(rnd, dr_min(64 * KIB, view->size));
        uint64_t off = rnd_below(rnd, view->size - len + 1);
        rnd_fill(rnd, buf, len);
        shadow_write(view, off, buf, len);
        must(dr_pwrite(disk, buf, off, len, 0, &err), s, "scribble", &err);
    }
    must(dr_close(disk, &err), s, "close after scribbling", &err);
}

/* One write from the beginning. */
static void fill(const struct subject *s, struct dr_fs *fs, struct rnd *rnd, struct shadow *view)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    CLEANUP_FREE uint8_t *buf = malloc(s->fill);
    rnd_fill(rnd, buf, s->fill);
    shadow_write(view, 0, buf, s->fill);
    must(model_open(fs, s, DR_OPEN_RDWR, &disk, &err), s, "open to fill", &err);
    must(dr_pwrite(disk, buf, 0, s->fill, 0, &err), s, "fill", &err);
    must(dr_close(disk, &err), s, "close after filling", &err);
}

static void make_base(const struct subject *s, struct dr_fs *fs, struct rnd *rnd,
                      struct shadow *base)
{
    struct dr_error err = DR_ERROR_INIT;
    shadow_init(base, s->base_size);
    must(model_create(fs, s->base_format, subject_base(s), s->base_size, NULL, 0, NULL, NULL, &err),
         s, "create the base", &err);
    scribble(s, fs, subject_base(s), s->base_format, rnd, base, 24);
}

void subject_make(const struct subject *s, struct dr_fs *fs, struct rnd *rnd, struct shadow *view,
                  uint8_t **below)
{
    struct dr_error err = DR_ERROR_INIT;
    struct shadow base = {0};
    shadow_init(view, s->size);
    if (fs->ops->mkdir)
        fs->ops->mkdir(fs, "dir", 0700, NULL);
    if (s->base_format) {
        make_base(s, fs, rnd, &base);
        shadow_write(view, 0, base.now, dr_min(base.size, view->size));
    }
    if (below) {
        *below = malloc(s->size + 1);
        memcpy(*below, view->now, s->size);
    }
    shadow_free(&base);
    if (s->device)
        make_device(s, fs, rnd);
    if (s->uneven)
        make_uneven(s, fs);
    else
        must(model_create(fs, s->format, subject_top(s), s->size, s->pairs, s->n_pairs,
                          s->base_format ? dr_path_basename(subject_base(s)) : NULL, s->base_format,
                          &err),
             s, "create the top", &err);
    if (s->junk)
        make_junk(s, fs, rnd);
    if (s->fill)
        fill(s, fs, rnd, view);
    if (s->snapshot) {
        scribble(s, fs, subject_top(s), s->format, rnd, view, 12);
        must(toy_snapshot(fs, subject_top(s), &err), s, "snapshot", &err);
    }
    model_add_bitmaps(s, fs, view->now);
    shadow_flushed(view);
}

/* ------------------------------------------------------------------ opening, looking */

int model_open(struct dr_fs *fs, const struct subject *s, unsigned flags, struct dr_disk **disk,
               struct dr_error *err)
{
    struct dr_open_options o = {.format = s->format, .flags = flags};
    return dr_open_fs(fs, subject_top(s), &o, disk, err);
}

uint8_t *model_read_all(struct dr_fs *fs, const char *path, const char *format, uint64_t *size,
                        struct dr_error *err)
{
    struct dr_open_options o = {.format = format};
    struct dr_disk *disk;
    if (dr_open_fs(fs, path, &o, &disk, err))
        return NULL;
    *size = dr_size(disk);
    uint8_t *buf = malloc(*size + 1);
    int r = dr_pread(disk, buf, 0, *size, err);
    if (!r)
        model_check_bitmaps(disk, buf, *size, false);
    dr_close(disk, NULL);
    if (!r)
        return buf;
    free(buf);
    return NULL;
}

void model_check_line(void *user, const char *line)
{
    (void)user;
    if (getenv("DROVER_VERBOSE"))
        print_message("check: %s\n", line);
}

int model_check(struct dr_fs *fs, const struct subject *s, unsigned fix,
                struct dr_check_result *result, struct dr_error *err)
{
    struct dr_image *image;
    *result = (struct dr_check_result){.report = model_check_line};
    int r = dr_image_open(fs, subject_top(s), s->format, fix ? DR_OPEN_RDWR : 0, &image, err);
    if (r)
        return r;
    r = image->fmt->check ? image->fmt->check(image, fix, result, err) : 0;
    if (r == -ENOTSUP)
        r = 0;
    int closed = dr_image_unref(image, err);
    return r ? r : closed;
}

/* ------------------------------------------------------------------ running */

uint64_t model_seed(void)
{
    const char *e = getenv("DROVER_SEED");
    if (!e)
        e = getenv("DROVER_TEST_SEED");
    return e ? strtoull(e, NULL, 0) : 20091211;
}

unsigned model_length(unsigned n)
{
    const char *e = getenv("DROVER_SOAK");
    unsigned long times = e ? strtoul(e, NULL, 0) : getenv("DROVER_TEST_LONG") ? 20 : 1;
    n = n * (unsigned)(times ? times : 1);
    return n > 10 ? n / SLOWER : n;
}

const char *model_only(void)
{
    return getenv("DROVER_ONLY");
}

static bool model_wants(const struct subject *s, bool (*takes)(const struct subject *s))
{
    if (!dr_format_find(s->format) || (s->base_format && !dr_format_find(s->base_format)) ||
        (takes && !takes(s)))
        return false;
    return !model_only() || strstr(s->name, model_only());
}

int model_run(const char *group, void (*test)(void **state), bool (*takes)(const struct subject *s))
{
    struct CMUnitTest *tests = calloc(model_n_subjects, sizeof(*tests));
    size_t n = 0;
    if (!dr_format_find("toy"))
        dr_format_register(&dr_format_toy);
    for (size_t i = 0; i < model_n_subjects; i++)
        if (model_wants(&model_subjects[i], takes))
            tests[n++] =
                (struct CMUnitTest){.name = model_subjects[i].name,
                                    .test_func = test,
                                    .initial_state = (void *)(uintptr_t)&model_subjects[i]};
    int r = _cmocka_run_group_tests(group, tests, n, NULL, NULL);
    free(tests);
    return r;
}

/* ------------------------------------------------------------------ failing */

static bool expects_failure; /* in a process that model_detects made */
enum { DETECTED = 42 };

void model_fail(const char *file, int line, const struct subject *s, const char *fmt, ...)
{
    char text[5000];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (expects_failure && !getenv("DROVER_VERBOSE"))
        _exit(DETECTED);
    print_error("%s:%d: subject %s, DROVER_SEED=%llu\n%s\n", file, line, s->name,
                (unsigned long long)model_seed(), text);
    if (expects_failure)
        _exit(DETECTED);
    _fail(file, line);
    abort();
}

bool model_detects(void (*test)(void **state), const struct subject *s)
{
    int status = 0;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        void *state = (void *)(uintptr_t)s;
        expects_failure = true;
        test(&state);
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_true(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == DETECTED);
    return WEXITSTATUS(status) == DETECTED;
}

const struct subject *model_subject(const char *name)
{
    for (size_t i = 0; i < model_n_subjects; i++)
        if (!strcmp(model_subjects[i].name, name))
            return &model_subjects[i];
    return NULL;
}
