/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The toy format as a whole: check, recovery, internal snapshots. Reads and writes the files
 * directly; nothing of the image may be dirty. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "toy.h"

enum { OFF_SNAPSHOT = 32 };

/* What refers to what, found by walking the tables. */
struct tally {
    struct dr_image *image;
    struct dr_check_result *result; /* NULL: nobody wants to hear */
    uint16_t *seen[2];              /* TOY_MAX_CLUSTERS each */
    uint64_t bad;
};

static void tally_cleanup(struct tally *t)
{
    free(t->seen[0]);
    free(t->seen[1]);
}

__attribute__((format(printf, 2, 3))) static void tally_say(struct tally *t, const char *fmt, ...)
{
    char line[200];
    va_list ap;
    t->bad++;
    if (!t->result || !t->result->report)
        return;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    t->result->report(t->result->user, line);
}

static void tally_add(struct tally *t, unsigned space, uint64_t place, const char *what)
{
    const struct toy *toy = t->image->state;
    if (place / TOY_CLUSTER >= toy->clusters)
        tally_say(t, "%s at %" PRIu64 " is beyond the end", what, place);
    else
        t->seen[space][place / TOY_CLUSTER]++;
}

static void tally_entry(struct tally *t, uint64_t guest, const struct toy_entry *e)
{
    const struct toy *toy = t->image->state;
    unsigned space = toy_data_space(toy);
    const char *problem = toy_entry_problem(toy, e);
    if (problem) {
        tally_say(t, "the entry for %" PRIu64 " has %s", guest, problem);
        return;
    }
    if (!e->held)
        return;
    uint64_t end = e->host + e->coded;
    for (unsigned i = 0; !e->coded && i < 8; i++)
        if (e->held >> i & 1)
            end = e->host + (i + 1) * TOY_SUB;
    if (end > dr_file_size(t->image->files[space]))
        tally_say(t, "the entry for %" PRIu64 " ends at %" PRIu64 ", behind the file", guest, end);
    tally_add(t, space, e->host, "data");
    if (t->result)
        t->result->allocated_clusters++;
    if (t->result && e->coded)
        t->result->compressed_clusters++;
}

/* A table of len bytes; what is behind the end of the file is zeros, as the page cache has it. */
static int tally_read(struct tally *t, uint64_t at, uint8_t *buf, struct dr_error *err)
{
    return dr_file_pread_short(t->image->files[0], buf, at, TOY_CLUSTER, NULL, err);
}

static int tally_l1(struct tally *t, uint64_t at, struct dr_error *err)
{
    const struct toy *toy = t->image->state;
    uint8_t l1[TOY_CLUSTER], l2[TOY_CLUSTER];
    int r = tally_read(t, at, l1, err);
    for (uint64_t i = 0; !r && i < TOY_ROOTS; i++) {
        uint64_t table = get_be64(l1 + 8 * i);
        if (!table)
            continue;
        tally_add(t, TOY_META, table, "a table");
        if (table % TOY_CLUSTER) {
            tally_say(t, "the table for entry %" PRIu64 " is not aligned", i);
            continue;
        }
        r = tally_read(t, table, l2, err);
        for (uint64_t j = 0; !r && j < toy->l2_entries; j++) {
            struct toy_entry e = toy_get_entry(l2 + 16 * j);
            tally_entry(t, (i * toy->l2_entries + j) * TOY_CLUSTER, &e);
        }
    }
    return r;
}

static int tally_all(struct tally *t, struct dr_image *image, struct dr_check_result *result,
                     struct dr_error *err)
{
    const struct toy *toy = image->state;
    *t = (struct tally){.image = image, .result = result};
    for (int i = 0; i < 2; i++)
        if (!(t->seen[i] = calloc(TOY_MAX_CLUSTERS, sizeof(uint16_t))))
            return dr_fail(err, ENOMEM, "out of memory");
    for (unsigned i = 0; i < 4; i++)
        t->seen[TOY_META][i] = 1;
    for (int space = 0; space < 2; space++)
        for (unsigned i = 0; i < TOY_ROOTS; i++)
            if (toy->blocks[space][i])
                tally_add(t, TOY_META, toy->blocks[space][i], "a count block");
    int r = tally_l1(t, TOY_L1_AT, err);
    if (!r && toy->snapshot) {
        tally_add(t, TOY_META, toy->snapshot, "the snapshot");
        r = tally_l1(t, toy->snapshot, err);
    }
    return r;
}

static int toy_read_count(struct dr_image *image, unsigned space, uint64_t cluster, uint16_t *count,
                          struct dr_error *err)
{
    const struct toy *toy = image->state;
    uint8_t raw[2];
    uint64_t block = toy->blocks[space][cluster / TOY_BLOCK];
    *count = 0;
    if (!block)
        return 0;
    int r =
        dr_file_pread_short(image->files[0], raw, block + 2 * (cluster % TOY_BLOCK), 2, NULL, err);
    *count = get_be16(raw);
    return r;
}

/* Make all counts on disk those that were seen. */
static int tally_store(struct tally *t, struct dr_error *err)
{
    const struct toy *toy = t->image->state;
    int r = 0;
    for (unsigned space = 0; space < 2; space++)
        for (uint64_t i = 0; !r && i < toy->clusters; i += TOY_BLOCK) {
            uint8_t raw[2 * TOY_BLOCK];
            uint64_t used = 0;
            for (unsigned j = 0; j < TOY_BLOCK; j++) {
                put_be16(raw + 2 * j, t->seen[space][i + j]);
                used += t->seen[space][i + j];
            }
            if (toy->blocks[space][i / TOY_BLOCK])
                r = dr_file_pwrite(t->image->files[0], raw, toy->blocks[space][i / TOY_BLOCK],
                                   sizeof(raw), err);
            else if (used)
                r = dr_fail(err, EUCLEAN, "%s: clusters from %" PRIu64 " on are used, not counted",
                            t->image->path, i);
        }
    return r ? r : dr_file_flush(t->image->files[0], err);
}

int toy_recover(struct dr_image *image, struct dr_error *err)
{
    __attribute__((cleanup(tally_cleanup))) struct tally t;
    int r = tally_all(&t, image, NULL, err);
    if (!r && t.bad)
        r = dr_fail(err, EUCLEAN, "%s: the tables are damaged", image->path);
    return r ? r : tally_store(&t, err);
}

static int tally_compare(struct tally *t, uint64_t *leaks, struct dr_error *err)
{
    const struct toy *toy = t->image->state;
    for (unsigned space = 0; space < 2; space++)
        for (uint64_t i = 0; i < toy->clusters; i++) {
            uint16_t count, seen = t->seen[space][i];
            int r = toy_read_count(t->image, space, i, &count, err);
            if (r)
                return r;
            if (count > seen)
                ++*leaks;
            if (count < seen)
                tally_say(t, "cluster %" PRIu64 " of file %u is used %u times, counted %u", i,
                          space, seen, count);
        }
    return 0;
}

int toy_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
              struct dr_error *err)
{
    __attribute__((cleanup(tally_cleanup))) struct tally t;
    uint64_t leaks = 0;
    result->has_clusters = true;
    result->total_clusters = dr_div_up(image->size, TOY_CLUSTER);
    result->image_end_offset = dr_file_size(image->files[0]);
    int r = tally_all(&t, image, result, err);
    if (!r)
        r = tally_compare(&t, &leaks, err);
    if (r)
        return r;
    if (fix && leaks && !t.bad && !(r = tally_store(&t, err))) {
        result->leaks_fixed = leaks;
        leaks = 0;
        pthread_mutex_lock(&image->lock);
        dr_page_forget(image, 0, 0, dr_file_size(image->files[0]));
        pthread_mutex_unlock(&image->lock);
    }
    result->corruptions += t.bad;
    result->leaks += leaks;
    return r;
}

int toy_trim(struct dr_image *image, struct dr_error *err)
{
    const struct toy *toy = image->state;
    for (unsigned space = 0; space < (toy->has_data ? 2 : 1); space++) {
        uint64_t end = 0;
        for (uint64_t i = 0; i < toy->clusters; i++) {
            uint16_t count;
            int r = toy_read_count(image, space, i, &count, err);
            if (r)
                return r;
            if (count)
                end = (i + 1) * TOY_CLUSTER;
        }
        int r = end < dr_file_size(image->files[space])
                    ? dr_file_truncate(image->files[space], end, err)
                    : 0;
        if (r)
            return r;
    }
    return 0;
}

/* ------------------------------------------------------------------ snapshots */

static int snapshot_make(struct dr_image *image, struct dr_error *err)
{
    __attribute__((cleanup(tally_cleanup))) struct tally t;
    struct toy *toy = image->state;
    uint8_t page[TOY_CLUSTER], h[512];
    uint64_t c = 1;
    int r = tally_all(&t, image, NULL, err);
    while (c < toy->clusters && (t.seen[TOY_META][c] || !toy->blocks[TOY_META][c / TOY_BLOCK]))
        c++;
    if (!r && c == toy->clusters)
        r = dr_fail(err, ENOSPC, "%s: no room for a snapshot", image->path);
    if (!r)
        r = dr_file_pread(image->files[0], page, TOY_L1_AT, TOY_CLUSTER, err);
    if (!r)
        r = dr_file_pwrite(image->files[0], page, c * TOY_CLUSTER, TOY_CLUSTER, err);
    if (!r)
        r = toy_read_header(image, h, err);
    if (r)
        return r;
    put_be64(h + OFF_SNAPSHOT, c * TOY_CLUSTER);
    toy->snapshot = c * TOY_CLUSTER;
    r = toy_recover(image, err);
    return r ? r : toy_write_header(image, h, err);
}

int toy_snapshot(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_image *image;
    int r = dr_image_open(fs, path, "toy", DR_OPEN_RDWR, &image, err);
    if (r)
        return r;
    const struct toy *toy = image->state;
    r = toy->snapshot ? dr_fail(err, EEXIST, "%s: it has a snapshot", path)
                      : snapshot_make(image, err);
    int closed = dr_image_unref(image, err);
    return r ? r : closed;
}

static int snapshot_unit(struct dr_image *image, const struct toy_entry *e, uint8_t *unit,
                         uint8_t hole, struct dr_error *err)
{
    struct dr_file *f = image->files[toy_data_space(image->state)];
    uint8_t coded[TOY_CLUSTER];
    int r = 0;
    memset(unit, hole, TOY_CLUSTER);
    if (e->coded) {
        r = dr_file_pread(f, coded, e->host, e->coded, err);
        return r ? r : image->fmt->decode(image, coded, e->coded, unit, TOY_CLUSTER, err);
    }
    for (unsigned i = 0; !r && i < 8; i++) {
        if (e->zero >> i & 1)
            memset(unit + i * TOY_SUB, 0, TOY_SUB);
        if (e->held >> i & 1)
            r = dr_file_pread_short(f, unit + i * TOY_SUB, e->host + i * TOY_SUB, TOY_SUB, NULL,
                                    err);
    }
    return r;
}

static int snapshot_read(struct dr_image *image, uint8_t *buf, size_t len, uint8_t hole,
                         struct dr_error *err)
{
    const struct toy *toy = image->state;
    uint8_t raw[16], unit[TOY_CLUSTER];
    int r = 0;
    for (uint64_t at = 0; !r && at < len; at += TOY_CLUSTER) {
        uint64_t i = at / TOY_CLUSTER;
        struct toy_entry e = {0};
        r = dr_file_pread(image->files[0], raw, toy->snapshot + 8 * (i / toy->l2_entries), 8, err);
        uint64_t table = get_be64(raw);
        if (!r && table)
            r = dr_file_pread_short(image->files[0], raw, table + 16 * (i % toy->l2_entries), 16,
                                    NULL, err);
        if (table)
            e = toy_get_entry(raw);
        if (!r)
            r = snapshot_unit(image, &e, unit, hole, err);
        memcpy(buf + at, unit, dr_min(TOY_CLUSTER, len - at));
    }
    return r;
}

int toy_snapshot_read(struct dr_fs *fs, const char *path, uint8_t *buf, size_t len, uint8_t hole,
                      struct dr_error *err)
{
    struct dr_image *image;
    int r = dr_image_open(fs, path, "toy", 0, &image, err);
    if (r)
        return r;
    r = snapshot_read(image, buf, len, hole, err);
    int closed = dr_image_unref(image, err);
    return r ? r : closed;
}
