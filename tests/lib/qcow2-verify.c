/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qcow2-verify.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

#define COPIED  (UINT64_C(1) << 63)
#define CODED   (UINT64_C(1) << 62)
#define BITMAPS 0x23852875u /* the type of the extension */
#define PLACE   UINT64_C(0x00fffffffffffe00)

struct file {
    uint8_t *bytes;
    uint64_t size, cluster, n;
    unsigned bits, order, entry;
    uint32_t *ways; /* to each cluster */
    struct qcow2_verdict *v;
};

__attribute__((format(printf, 3, 4))) static void found(struct file *f, unsigned *what,
                                                        const char *fmt, ...)
{
    va_list ap;
    ++*what;
    if (f->v->text[0])
        return;
    va_start(ap, fmt);
    vsnprintf(f->v->text, sizeof(f->v->text), fmt, ap);
    va_end(ap);
}

static void use(struct file *f, uint64_t at, uint64_t len, const char *what)
{
    for (uint64_t i = at / f->cluster; i * f->cluster < at + len; i++)
        if (i < f->n)
            f->ways[i]++;
        else
            found(f, &f->v->broken, "%s at %llu is behind the end", what, (unsigned long long)at);
}

static bool inside(const struct file *f, uint64_t at, uint64_t len)
{
    return at <= f->size && len <= f->size - at;
}

/* ------------------------------------------------------------------ counting */

static void use_l2(struct file *f, uint64_t table)
{
    use(f, table, f->cluster, "an L2 table");
    for (uint64_t at = table; inside(f, table, f->cluster) && at < table + f->cluster;
         at += f->entry) {
        uint64_t e = get_be64(f->bytes + at);
        unsigned shift = 62 - (f->bits - 8);
        if (e & CODED) {
            uint64_t host = e & ((UINT64_C(1) << shift) - 1);
            uint64_t sectors = ((e & ~(CODED | COPIED)) >> shift) + 1;
            use(f, host, sectors * 512 - host % 512, "compressed data");
        } else if (e & PLACE) {
            use(f, e & PLACE, f->cluster, "data");
        }
    }
}

static void use_l1(struct file *f, uint64_t l1, uint64_t n, const char *what)
{
    if (n == 0)
        return;
    use(f, l1, n * 8, what);
    for (uint64_t i = 0; inside(f, l1, n * 8) && i < n; i++)
        if (get_be64(f->bytes + l1 + 8 * i) & PLACE)
            use_l2(f, get_be64(f->bytes + l1 + 8 * i) & PLACE);
}

static void use_snapshots(struct file *f)
{
    uint64_t start = get_be64(f->bytes + 64), at = start;
    uint32_t n = get_be32(f->bytes + 60);
    for (uint32_t i = 0; i < n && inside(f, at, 40); i++) {
        const uint8_t *e = f->bytes + at;
        use_l1(f, get_be64(e), get_be32(e + 8), "a snapshot's L1 table");
        at += dr_round_up(40 + get_be32(e + 36) + get_be16(e + 12) + get_be16(e + 14), 8);
    }
    if (n)
        use(f, start, at - start, "the snapshot table");
}

static void use_bitmap(struct file *f, uint64_t table, uint64_t n)
{
    use(f, table, n * 8, "a bitmap's table");
    for (uint64_t i = 0; inside(f, table, n * 8) && i < n; i++)
        if (get_be64(f->bytes + table + 8 * i) & PLACE)
            use(f, get_be64(f->bytes + table + 8 * i) & PLACE, f->cluster, "a bitmap");
}

static void use_bitmap_directory(struct file *f, uint64_t start, uint64_t len, uint32_t n)
{
    use(f, start, len, "the bitmap directory");
    for (uint64_t at = start; n > 0 && inside(f, at, 24); n--) {
        const uint8_t *e = f->bytes + at;
        use_bitmap(f, get_be64(e), get_be32(e + 8));
        at += dr_round_up(24 + get_be16(e + 18) + get_be32(e + 20), 8);
    }
}

/* The extension counts only where an autoclear bit says that it has not been left behind. */
static void use_bitmaps(struct file *f)
{
    if (get_be32(f->bytes + 4) < 3 || !(get_be64(f->bytes + 88) & 1))
        return;
    for (uint64_t at = get_be32(f->bytes + 100); inside(f, at, 32) && get_be32(f->bytes + at);
         at += 8 + dr_round_up(get_be32(f->bytes + at + 4), 8)) {
        const uint8_t *e = f->bytes + at + 8;
        if (get_be32(e - 8) == BITMAPS)
            use_bitmap_directory(f, get_be64(e + 16), get_be64(e + 8), get_be32(e));
    }
}

static void use_counts(struct file *f)
{
    uint64_t table = get_be64(f->bytes + 48), n = get_be32(f->bytes + 56) * f->cluster / 8;
    use(f, table, n * 8, "the refcount table");
    for (uint64_t i = 0; inside(f, table, n * 8) && i < n; i++)
        if (get_be64(f->bytes + table + 8 * i))
            use(f, get_be64(f->bytes + table + 8 * i), f->cluster, "a refcount block");
}

/* ------------------------------------------------------------------ comparing */

static uint64_t stored(const struct file *f, uint64_t i)
{
    uint64_t per = f->cluster * 8 >> f->order, table = get_be64(f->bytes + 48);
    if (i / per * 8 >= get_be32(f->bytes + 56) * f->cluster || !inside(f, table + i / per * 8, 8))
        return 0;
    uint64_t block = get_be64(f->bytes + table + i / per * 8), bit = i % per << f->order;
    if (!block || !inside(f, block, f->cluster))
        return 0;
    const uint8_t *p = f->bytes + block + bit / 8;
    if (f->order < 3)
        return *p >> bit % 8 & ((1u << (1u << f->order)) - 1);
    uint64_t count = 0;
    for (unsigned k = 0; k < 1u << f->order; k += 8)
        count = count << 8 | *p++;
    return count;
}

static void compare_counts(struct file *f)
{
    for (uint64_t i = 0; i < f->n; i++) {
        uint64_t says = stored(f, i);
        if (says < f->ways[i])
            found(f, &f->v->low, "cluster %llu is counted %llu times and used %u times",
                  (unsigned long long)i, (unsigned long long)says, f->ways[i]);
        if (says > f->ways[i])
            found(f, &f->v->leaked, "cluster %llu is counted %llu times, used only %u times",
                  (unsigned long long)i, (unsigned long long)says, f->ways[i]);
    }
}

static void compare_flag(struct file *f, uint64_t at)
{
    uint64_t e = get_be64(f->bytes + at), i = (e & PLACE) / f->cluster;
    if (!(e & PLACE) || (e & CODED) || i >= f->n)
        return;
    if ((e & COPIED) && f->ways[i] != 1)
        found(f, &f->v->shared, "the entry at %llu says COPIED of what has %u ways",
              (unsigned long long)at, f->ways[i]);
    else if ((stored(f, i) == 1) != ((e & COPIED) != 0))
        found(f, &f->v->stale, "the entry at %llu has a COPIED that is not as the counts say",
              (unsigned long long)at);
}

static void compare_flags(struct file *f)
{
    uint64_t l1 = get_be64(f->bytes + 40), n = get_be32(f->bytes + 36);
    for (uint64_t i = 0; inside(f, l1, n * 8) && i < n; i++) {
        uint64_t table = get_be64(f->bytes + l1 + 8 * i) & PLACE;
        compare_flag(f, l1 + 8 * i);
        for (uint64_t at = table; table && inside(f, table, f->cluster) && at < table + f->cluster;
             at += f->entry)
            compare_flag(f, at);
    }
}

static int load(struct dr_fs *fs, const char *path, struct file *f, struct dr_error *err)
{
    struct dr_file *file;
    int r = dr_file_open(fs, path, 0, &file, err);
    if (r < 0)
        return r;
    f->size = dr_file_size(file);
    f->bytes = calloc(1, f->size + 4096);
    r = dr_file_pread(file, f->bytes, 0, f->size, err);
    dr_file_unref(file);
    return r;
}

int qcow2_verify(struct dr_fs *fs, const char *path, struct qcow2_verdict *v, struct dr_error *err)
{
    struct file f = {.v = v};
    *v = (struct qcow2_verdict){0};
    int r = load(fs, path, &f, err);
    if (r == 0) {
        bool v3 = get_be32(f.bytes + 4) >= 3;
        f.bits = get_be32(f.bytes + 20);
        f.cluster = UINT64_C(1) << f.bits;
        f.order = v3 ? get_be32(f.bytes + 96) : 4;
        f.entry = v3 && (get_be64(f.bytes + 72) & 16) ? 16 : 8;
        f.n = dr_div_up(f.size, f.cluster);
        f.ways = calloc(f.n, sizeof(*f.ways));
        use(&f, 0, f.cluster, "the header");
        use_counts(&f);
        use_l1(&f, get_be64(f.bytes + 40), get_be32(f.bytes + 36), "the L1 table");
        use_snapshots(&f);
        use_bitmaps(&f);
        compare_counts(&f);
        compare_flags(&f);
    }
    free(f.bytes);
    free(f.ways);
    return r;
}
