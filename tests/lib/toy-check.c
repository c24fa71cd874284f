/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The toy format as a whole: check and recovery. Reads and writes the files
 * directly; nothing of the image may be dirty. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "toy.h"

/* How often each cluster is referred to, found by walking the tables. */
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

static void tally_add(struct tally *t, unsigned space, uint64_t place, uint64_t len,
                      const char *what)
{
    const struct toy *toy = t->image->state;
    for (uint64_t c = place / toy->cluster; c * toy->cluster < place + len; c++)
        if (c >= toy->clusters)
            tally_say(t, "%s at %" PRIu64 " is beyond the end", what, place);
        else
            t->seen[space][c]++;
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
    for (unsigned i = 0; !e->coded && i < toy->subs; i++)
        if (e->held >> i & 1)
            end = e->host + (i + 1) * toy->sub;
    if (end > dr_file_size(t->image->files[space]))
        tally_say(t, "the entry for %" PRIu64 " ends at %" PRIu64 ", behind the file", guest, end);
    tally_add(t, space, e->host, 1, "data");
    if (t->result)
        t->result->allocated_clusters++;
    if (t->result && e->coded)
        t->result->compressed_clusters++;
}

/* A table of len bytes; what is behind the end of the file is zeros, as the page cache has it. */
static int tally_read(struct tally *t, uint64_t at, uint8_t *buf, size_t len, struct dr_error *err)
{
    return dr_file_pread_short(t->image->files[0], buf, at, len, NULL, err);
}

static int tally_l1(struct tally *t, uint64_t at, struct dr_error *err)
{
    const struct toy *toy = t->image->state;
    uint8_t l1[TOY_L1_BYTES];
    CLEANUP_FREE uint8_t *l2 = malloc(toy->l2_bytes);
    if (!l2)
        return dr_fail(err, ENOMEM, "out of memory");
    tally_add(t, TOY_META, at, TOY_L1_BYTES, "a level-1 table");
    int r = tally_read(t, at, l1, TOY_L1_BYTES, err);
    for (uint64_t i = 0; !r && i < TOY_L1; i++) {
        uint64_t table = get_be64(l1 + 8 * i);
        if (!table)
            continue;
        tally_add(t, TOY_META, table, toy->l2_bytes, "a table");
        if (table % toy->cluster) {
            tally_say(t, "the table for entry %" PRIu64 " is not aligned", i);
            continue;
        }
        r = tally_read(t, table, l2, toy->l2_bytes, err);
        for (uint64_t j = 0; !r && j < toy->l2_entries; j++) {
            struct toy_entry e = toy_get_entry(l2 + 16 * j);
            tally_entry(t, (i * toy->l2_entries + j) * toy->cluster, &e);
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
    tally_add(t, TOY_META, 0, TOY_SECTOR, "the header");
    tally_add(t, TOY_META, TOY_DATA_ROOTS_AT, 8 * TOY_ROOTS, "the data file's roots");
    tally_add(t, TOY_META, toy->roots_at, toy_roots_bytes(toy), "the roots");
    for (int space = 0; space < 2; space++)
        for (unsigned i = 0; i < TOY_ROOTS; i++)
            if (toy->blocks[space][i])
                tally_add(t, TOY_META, toy->blocks[space][i], toy->cluster, "a count block");
    int r = tally_l1(t, toy->l1_at, err);
    for (unsigned i = 0; !r && i < TOY_SNAPSHOTS; i++)
        if (toy->snapshots[i])
            r = tally_l1(t, toy->snapshots[i], err);
    return r;
}

static int toy_read_count(struct dr_image *image, unsigned space, uint64_t cluster, uint16_t *count,
                          struct dr_error *err)
{
    const struct toy *toy = image->state;
    uint8_t raw[2];
    uint64_t block = toy->blocks[space][cluster / toy->block];
    *count = 0;
    if (!block)
        return 0;
    int r =
        dr_file_pread_short(image->files[0], raw, block + 2 * (cluster % toy->block), 2, NULL, err);
    *count = get_be16(raw);
    return r;
}

/* Make all counts on disk those that were seen. */
static int tally_store(struct tally *t, struct dr_error *err)
{
    const struct toy *toy = t->image->state;
    int r = 0;
    for (unsigned space = 0; space < 2; space++)
        for (uint64_t i = 0; !r && i < toy->clusters; i += toy->block) {
            uint8_t raw[TOY_MAX_CLUSTER];
            uint64_t used = 0;
            for (unsigned j = 0; j < toy->block; j++) {
                put_be16(raw + 2 * j, t->seen[space][i + j]);
                used += t->seen[space][i + j];
            }
            if (toy->blocks[space][i / toy->block])
                r = dr_file_pwrite(t->image->files[0], raw, toy->blocks[space][i / toy->block],
                                   2 * toy->block, err);
            else if (used)
                r = dr_fail(err, EUCLEAN, "%s: clusters from %" PRIu64 " on are used, not counted",
                            t->image->path, i);
        }
    return r ? r : dr_file_flush(t->image->files[0], err);
}

int toy_recount(struct dr_image *image, uint64_t extra_l1, struct dr_error *err)
{
    __attribute__((cleanup(tally_cleanup))) struct tally t;
    int r = tally_all(&t, image, NULL, err);
    if (!r && extra_l1)
        r = tally_l1(&t, extra_l1, err);
    if (!r && t.bad)
        r = dr_fail(err, EUCLEAN, "%s: the tables are damaged", image->path);
    return r ? r : tally_store(&t, err);
}

int toy_recover(struct dr_image *image, struct dr_error *err)
{
    return toy_recount(image, 0, err);
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
    const struct toy *toy = image->state;
    uint64_t leaks = 0;
    result->total_clusters = dr_div_up(image->size, toy->cluster);
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
                end = (i + 1) * toy->cluster;
        }
        int r = end < dr_file_size(image->files[space])
                    ? dr_file_truncate(image->files[space], end, err)
                    : 0;
        if (r)
            return r;
    }
    return 0;
}
