/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "plant.h"

#include <string.h>

#include "base/bytes.h"
#include "toy.h"

static struct dr_format planted;
static const struct dr_format *healthy;

static int reserve_no_tail(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                           uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int e = healthy->reserve(image, off, len, want, host_len, r, err);
    if (!e && want == DR_WANT_DATA && r->off + r->len > off + len) {
        r->pad += r->off + r->len - (off + len);
        r->len = off + len - r->off;
    }
    return e;
}

static int reserve_early(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                         uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int e = healthy->reserve(image, off, len, want, host_len, r, err);
    if (!e)
        healthy->publish(image, r);
    return e;
}

static void nothing(struct dr_image *image, struct dr_reservation *r)
{
    (void)image;
    (void)r;
}

static int open_long(struct dr_image *image, struct dr_error *err)
{
    int e = healthy->open(image, err);
    if (!e && strstr(dr_path_basename(image->path), "mid"))
        image->size = dr_max(image->size, 8 << 20);
    return e;
}

/* ------------------------------------------------------------------ add-cow: files[1] is the raw
 * file, and the bit of sector n stands in byte 2560 + n / 8 of files[0] */

static struct dr_file *raw_file(struct dr_image *image)
{
    return image->files[1];
}

static void publish_eager(struct dr_image *image, struct dr_reservation *r)
{
    uint8_t byte;
    for (uint64_t off = r->off; r->want != DR_WANT_HOLE && off < r->off + r->len; off += 512) {
        uint64_t at = 2560 + off / 512 / 8;
        dr_file_pread_short(image->files[0], &byte, at, 1, NULL, NULL);
        byte |= (uint8_t)(1u << (off / 512 % 8));
        dr_file_pwrite(image->files[0], &byte, at, 1, NULL);
    }
    healthy->publish(image, r);
}

static int reserve_no_punch(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                            uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int e = healthy->reserve(image, off, len, want, host_len, r, err);
    if (!e && r->todo == DR_TODO_ZERO_HOST)
        r->todo = DR_TODO_NOTHING;
    return e;
}

static void publish_early_punch(struct dr_image *image, struct dr_reservation *r)
{
    if (r->want == DR_WANT_HOLE)
        dr_file_zero(raw_file(image), r->off, r->len, DR_FILE_ZERO_PUNCH, NULL);
    healthy->publish(image, r);
}

static uint64_t bit_byte(const struct dr_reservation *r)
{
    return 2560 + r->off / 512 / 8;
}

static int reserve_remember(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                            uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int e = healthy->reserve(image, off, len, want, host_len, r, err);
    if (!e)
        r->priv[5] = *dr_page_at(r->pins[0].page, bit_byte(r));
    return e;
}

static void publish_lost_bits(struct dr_image *image, struct dr_reservation *r)
{
    uint8_t byte = (uint8_t)r->priv[5];
    dr_page_put(image, r->pins[0].page, bit_byte(r), &byte, 1);
    healthy->publish(image, r);
}

static int resize_raw_first(struct dr_image *image, uint64_t size, uint64_t below,
                            struct dr_error *err)
{
    int e = size > image->size ? dr_file_truncate(raw_file(image), size, err) : 0;
    return e ? e : healthy->resize(image, size, below, err);
}

static int resize_bare(struct dr_image *image, uint64_t size, uint64_t below, struct dr_error *err)
{
    if (size < image->size)
        return healthy->resize(image, size, below, err);
    int e = dr_file_truncate(raw_file(image), size, err);
    if (!e)
        image->size = size;
    return e;
}

/* ------------------------------------------------------------------ planting */

void plant_into(const char *format, enum plant fault)
{
    healthy = strcmp(format, "toy") ? dr_format_find(format) : &dr_format_toy;
    planted = *healthy;
    if (fault == PLANT_NO_TAIL)
        planted.reserve = reserve_no_tail;
    if (fault == PLANT_EARLY_PUBLISH) {
        planted.reserve = reserve_early;
        planted.publish = planted.cancel = nothing;
    }
    if (fault == PLANT_LONG_PARENT)
        planted.open = open_long;
    if (fault == PLANT_EAGER_BITS)
        planted.publish = publish_eager;
    if (fault == PLANT_NO_PUNCH)
        planted.reserve = reserve_no_punch;
    if (fault == PLANT_EARLY_PUNCH)
        planted.publish = publish_early_punch;
    if (fault == PLANT_LOST_BITS) {
        planted.reserve = reserve_remember;
        planted.publish = publish_lost_bits;
    }
    if (fault == PLANT_GROW_FIRST)
        planted.resize = resize_raw_first;
    if (fault == PLANT_GROW_BARE)
        planted.resize = resize_bare;
    if (fault >= PLANT_REUSED_EARLY)
        plant_qcow2(&planted, healthy, fault);
    dr_format_register(&planted);
}

void plant(enum plant fault)
{
    plant_into("toy", fault);
}
