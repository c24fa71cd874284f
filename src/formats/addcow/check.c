/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* info and check: what the bitmap says. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

/* Units whose bytes are in the raw file. What waits in memory counts. */
static int count_own(struct dr_image *image, uint64_t *n, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t bits = addcow_bits(h, image->size);
    if (h->all) {
        *n = bits;
        return 0;
    }
    int r = image->writable ? dr_image_flush(image, err) : 0;
    return r < 0 ? r : addcow_count(image, 0, bits, n, err);
}

/* The last unit may be shorter; what it has in it is all of it. */
static uint64_t units_to_bytes(const struct dr_image *image, uint64_t units)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    return units == addcow_bits(h, image->size) ? image->size : units * h->granule;
}

/* ------------------------------------------------------------------ info */

/* Names are bytes, JSON wants UTF-8. */
static json_t *text(const char *bytes)
{
    json_t *value = json_string(bytes);
    if (value)
        return value;
    CLEANUP_FREE char *plain = strdup(bytes);
    for (char *p = plain; p && *p; p++)
        if ((unsigned char)*p >= 0x80)
            *p = '?';
    return plain ? json_string(plain) : NULL;
}

int addcow_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t n;
    *cluster_size = h->granule;
    int r = count_own(image, &n, err);
    if (r < 0)
        return r;
    uint64_t bits = addcow_bits(h, image->size);
    bool whole = n == bits;
    json_int_t percent = whole ? 100 : (json_int_t)(n * 100 / bits); /* 100 means all */
    if (json_object_set_new(data, "layout", text(h->layout == ADDCOW_V7 ? "v7" : "v20")) < 0 ||
        json_object_set_new(data, "image-file", text(h->image)) < 0 ||
        json_object_set_new(data, "granularity", json_integer(h->granule)) < 0 ||
        json_object_set_new(data, "copied-in", json_integer((json_int_t)units_to_bytes(image, n))) <
            0 ||
        json_object_set_new(data, "copied-in-percent", json_integer(percent)) < 0 ||
        json_object_set_new(data, "all-copied-in", json_boolean(whole)) < 0 ||
        (h->layout == ADDCOW_V20 &&
         json_object_set_new(data, "all-allocated", json_boolean(h->all)) < 0))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return 0;
}

/* ------------------------------------------------------------------ check */

__attribute__((format(printf, 2, 3))) static void say(struct dr_check_result *result,
                                                      const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    result->report(result->user, line);
}

/* Bits behind the disk's end show nothing, until another program makes the raw file longer. */
static int check_tail(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                      struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_file *meta = image->files[ADDCOW_META];
    uint64_t bits = addcow_bits(h, image->size), n, size = dr_file_size(meta);
    uint64_t end = size > h->bitmap_off ? dr_min(size - h->bitmap_off, INT64_MAX / 8) * 8 : 0;
    bool mend = fix == DR_CHECK_FIX_ALL;
    if (h->all || end <= bits)
        return 0;
    int r = addcow_count(image, bits, end, &n, err);
    if (r < 0 || n == 0)
        return r;
    say(result,
        "%s: %" PRIu64 " bits are set behind the end of the disk, at %" PRIu64
        " bytes: its image file was cut, or a change of size did not finish",
        image->path, n, image->size);
    if (mend)
        r = addcow_cut_tail(meta, h, image->size, err);
    if (r == 0 && mend)
        r = dr_file_flush(meta, err);
    *(mend && r == 0 ? &result->corruptions_fixed : &result->corruptions) += n;
    return r;
}

int addcow_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                 struct dr_error *err)
{
    int r = fix ? addcow_refuse_write(image, err) : 0;
    if (r == 0)
        r = count_own(image, &result->allocated_clusters, err);
    if (r < 0)
        return r;
    result->has_clusters = true;
    result->total_clusters = addcow_bits(&addcow_of(image)->h, image->size);
    result->image_end_offset = dr_file_size(image->files[ADDCOW_META]);
    r = check_tail(image, fix, result, err);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, ADDCOW_META, ADDCOW_HEADER_SIZE, INT64_MAX - ADDCOW_HEADER_SIZE);
    return r;
}
