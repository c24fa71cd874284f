/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing streamOptimized images in the form that ESXi takes: version 3; grains in rising order,
 * zeros left out; behind the last grain of each table the table; then the directory, the footer,
 * the end of the stream. Tables without grains are left out.
 *
 * Workers compress grains, with their markers, and one thread appends them. What is appended is
 * gathered into pieces of some size. Nothing that was written is touched again, so the output may
 * be a pipe. A file without its end has no footer, so nobody takes it for complete. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/codec.h"
#include "base/error.h"
#include "formats/vmdk/stream.h"

#define GRAIN (VMDK_DEFAULT_GRAIN * VMDK_SECTOR)
/* Not longer than what zlib makes at its default, in a third of the time. */
#define DEFAULT_LEVEL 5
#define PIECE         (512u << 10) /* bytes written at once */
#define CODED_MOST    (GRAIN + GRAIN / 64 + 2 * VMDK_SECTOR)
#define NO_TABLE      UINT64_MAX

struct writer {
    const char *path; /* the output's, for messages */
    struct dr_file *out;
    uint64_t start, at; /* bytes: where the stream begins in out; and how far it is gathered */
    struct vmdk_header h;
    int level;
    uint32_t *directory; /* n_tables sectors, 0: no table */
    uint64_t table;      /* the one that grains are put in, or NO_TABLE */
    uint32_t entries[VMDK_GTES];
    size_t gathered;
    uint8_t piece[PIECE];
};

/* ------------------------------------------------------------------ appending */

static int write_out(struct writer *w, struct dr_error *err)
{
    size_t len = w->gathered;
    w->gathered = 0;
    return len ? dr_file_pwrite(w->out, w->piece, w->start + w->at - len, len, err) : 0;
}

/* len bytes and zeros up to the end of the sector. */
static int append(struct writer *w, const void *buf, size_t len, struct dr_error *err)
{
    size_t padded = (size_t)dr_round_up(len, VMDK_SECTOR);
    if (w->gathered + padded > PIECE) {
        int r = write_out(w, err);
        if (r < 0)
            return r;
    }
    if (len > 0)
        memcpy(w->piece + w->gathered, buf, len);
    memset(w->piece + w->gathered + len, 0, padded - len);
    w->gathered += padded;
    w->at += padded;
    return 0;
}

/* The sector that comes next, if an entry can lead there. */
static int next_sector(const struct writer *w, uint32_t *sector, struct dr_error *err)
{
    if (w->at / VMDK_SECTOR > UINT32_MAX)
        return dr_fail(err, EFBIG, "%s: the stream is longer than the 2 TiB that a VMDK can have",
                       w->path);
    *sector = (uint32_t)(w->at / VMDK_SECTOR);
    return 0;
}

static int append_marker(struct writer *w, uint64_t sectors, enum vmdk_marker_type type,
                         struct dr_error *err)
{
    uint8_t marker[VMDK_MARKER_LOOK] = {0};
    put_le64(marker, sectors);
    put_le32(marker + VMDK_MARKER_HEAD, type);
    return append(w, marker, sizeof(marker), err);
}

static int append_header(struct writer *w, struct dr_error *err)
{
    uint8_t buf[VMDK_HEADER_SIZE];
    vmdk_header_encode(&w->h, buf);
    return append(w, buf, sizeof(buf), err);
}

/* ------------------------------------------------------------------ tables */

/* The table whose grains are all there. */
static int end_table(struct writer *w, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    uint32_t sector = 0;
    if (w->table == NO_TABLE)
        return 0;
    for (size_t i = 0; i < VMDK_GTES; i++)
        put_le32(buf + i * 4, w->entries[i]);
    int r = append_marker(w, w->h.gt_sectors, VMDK_MARKER_GT, err);
    if (r == 0)
        r = next_sector(w, &sector, err);
    if (r < 0)
        return r;
    w->directory[w->table] = sector;
    w->table = NO_TABLE;
    memset(w->entries, 0, sizeof(w->entries));
    return append(w, buf, sizeof(buf), err);
}

static int append_directory(struct writer *w, struct dr_error *err)
{
    int r = append_marker(w, w->h.gd_sectors, VMDK_MARKER_GD, err);
    w->h.gd_off = w->at / VMDK_SECTOR;
    for (uint64_t i = 0; r == 0 && i < w->h.n_tables; i += VMDK_SECTOR / 4) {
        uint8_t buf[VMDK_SECTOR] = {0};
        for (uint64_t t = i; t < w->h.n_tables && t < i + VMDK_SECTOR / 4; t++)
            put_le32(buf + (t - i) * 4, w->directory[t]);
        r = append(w, buf, sizeof(buf), err);
    }
    return r;
}

/* ------------------------------------------------------------------ for the core */

static void writer_free(void *state)
{
    struct writer *w = state;
    if (!w)
        return;
    free(w->directory);
    free(w);
}

static int writer_begin(const char *path, const struct dr_create_params *params,
                        struct dr_file *out, void **state, struct dr_error *err)
{
    struct vmdk_stream_plan plan = {0};
    struct writer *w = *state = calloc(1, sizeof(*w));
    if (!w)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    int r = vmdk_stream_plan(path, params, &plan, err);
    CLEANUP_FREE char *text = plan.text;
    w->path = out->path;
    w->out = out;
    w->start = dr_file_size(out);
    w->level = plan.level ? plan.level : DEFAULT_LEVEL;
    w->table = NO_TABLE;
    if (r == 0)
        r = vmdk_header_stream(&w->h, path, plan.sectors, VMDK_DEFAULT_GRAIN, err);
    if (r < 0)
        return r;
    w->directory = calloc((size_t)w->h.n_tables + 1, sizeof(w->directory[0]));
    if (!w->directory)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    r = append_header(w, err);
    if (r == 0)
        r = append(w, text, plan.len, err);
    while (r == 0 && w->at < w->h.overhead * VMDK_SECTOR)
        r = append(w, "", 1, err);
    return r;
}

/* A grain is always a whole one: the last is filled up with zeros. */
static int64_t writer_encode(const void *state, const uint8_t *in, size_t len, uint64_t off,
                             uint8_t *coded)
{
    const struct writer *w = state;
    CLEANUP_FREE uint8_t *padded = NULL;
    if (len < GRAIN) {
        padded = calloc(1, GRAIN);
        if (!padded)
            return -ENOMEM;
        memcpy(padded, in, len);
        in = padded;
    }
    int64_t n =
        dr_zlib(in, GRAIN, w->level, coded + VMDK_MARKER_HEAD, CODED_MOST - VMDK_MARKER_HEAD);
    if (n < 0)
        return n;
    put_le64(coded, off / VMDK_SECTOR);
    put_le32(coded + 8, (uint32_t)n);
    return n + VMDK_MARKER_HEAD;
}

static int writer_put(void *state, uint64_t off, const uint8_t *coded, size_t len,
                      struct dr_error *err)
{
    struct writer *w = state;
    uint64_t grain = off / GRAIN, table = grain / VMDK_GTES;
    int r = table == w->table ? 0 : end_table(w, err);
    if (r == 0)
        r = next_sector(w, &w->entries[grain % VMDK_GTES], err);
    w->table = table;
    return r < 0 ? r : append(w, coded, len, err);
}

static int writer_finish(void *state, struct dr_error *err)
{
    struct writer *w = state;
    int r = end_table(w, err);
    if (r == 0)
        r = append_directory(w, err);
    if (r == 0)
        r = append_marker(w, 1, VMDK_MARKER_FOOTER, err);
    if (r == 0)
        r = append_header(w, err);
    if (r == 0)
        r = append_marker(w, 0, VMDK_MARKER_EOS, err);
    return r < 0 ? r : write_out(w, err);
}

const struct dr_sequential vmdk_sequential = {
    .unit = GRAIN,
    .coded_most = CODED_MOST,
    .wanted = vmdk_stream_wanted,
    .begin = writer_begin,
    .encode = writer_encode,
    .put = writer_put,
    .finish = writer_finish,
    .free = writer_free,
};
