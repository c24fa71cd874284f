/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Recording what the parent of an image is, and looking whether it still is. The sampled hash is
 * one of 16 blocks of 64 KiB, spread over what the parent shows; the full one is of all of it. */
#include "ops/fingerprint.h"

#include <inttypes.h>
#include <stdio.h>
#include <xxhash.h>

#include "base/cleanup.h"

#define SAMPLES 16u
#define SAMPLE  (UINT64_C(64) << 10)

/* ------------------------------------------------------------------ hashes */

static void format_hash(XXH128_hash_t hash, char text[DR_FINGERPRINT_HEX])
{
    snprintf(text, DR_FINGERPRINT_HEX, "%016" PRIx64 "%016" PRIx64, (uint64_t)hash.high64,
             (uint64_t)hash.low64);
}

/* Blocks at multiples of `step`, the last one at the end. */
static int hash_blocks(struct dr_chain *chain, size_t first, uint64_t step, struct dr_job *job,
                       char text[DR_FINGERPRINT_HEX], struct dr_error *err)
{
    uint64_t size = chain->images[first]->size;
    uint64_t last = size > SAMPLE ? size - SAMPLE : 0;
    CLEANUP_FREE uint8_t *buf = malloc(SAMPLE);
    XXH3_state_t *state = XXH3_createState();
    int r = buf && state ? 0
                         : dr_fail(err, ENOMEM, "%s: out of memory", chain->images[first]->path);
    if (r == 0)
        XXH3_128bits_reset(state);
    for (uint64_t off = 0; r == 0 && size > 0;) {
        size_t n = (size_t)dr_min(SAMPLE, size - off);
        if (dr_job_stopped(job))
            r = dr_fail(err, ECANCELED, "stopped on request");
        if (r == 0)
            r = dr_chain_read(chain, first, buf, off, n, err);
        if (r == 0)
            XXH3_128bits_update(state, buf, n);
        if (off + n >= size)
            break;
        off = step == SAMPLE ? off + SAMPLE : dr_min(off + step, last);
    }
    if (r == 0)
        format_hash(XXH3_128bits_digest(state), text);
    XXH3_freeState(state);
    return r;
}

static int sample(struct dr_chain *chain, size_t first, char text[DR_FINGERPRINT_HEX],
                  struct dr_error *err)
{
    uint64_t step = dr_round_down(chain->images[first]->size / SAMPLES, SAMPLE);
    return hash_blocks(chain, first, dr_max(step, SAMPLE), NULL, text, err);
}

/* ------------------------------------------------------------------ recording */

int ops_fingerprint_take(const struct dr_image *image, struct dr_chain *chain, size_t first,
                         bool full, struct dr_job *job, struct dr_error *err)
{
    const struct dr_image *parent = chain->images[first];
    struct dr_fingerprint print = {.size = parent->size, .has_id = parent->fmt->id};
    snprintf(print.format, sizeof(print.format), "%s", parent->fmt->name);
    if (print.has_id)
        print.id = parent->fmt->id(parent);
    int r = sample(chain, first, print.sampled, err);
    if (r == 0 && full)
        r = hash_blocks(chain, first, SAMPLE, job, print.full, err);
    return r < 0 ? r : dr_fingerprint_store(image, &print, err);
}

int ops_fingerprint_renew(const struct dr_image *image, struct dr_chain *chain, size_t first,
                          struct dr_error *err)
{
    return ops_fingerprint_take(image, chain, first, false, NULL, err);
}

/* ------------------------------------------------------------------ looking again */

static int refuse(const struct dr_image *image, const struct dr_image *parent, const char *which,
                  struct dr_error *err)
{
    return dr_fail(err, ESTALE,
                   "%s: %s does not hold what its parent held when that was recorded (%s): it was "
                   "written to since, or is another disk of the same size",
                   image->path, parent->path, which);
}

int ops_fingerprint_verify(const struct dr_image *image, struct dr_chain *chain, size_t first,
                           const struct dr_fingerprint *print, bool full, struct dr_error *err)
{
    char now[DR_FINGERPRINT_HEX] = "";
    const struct dr_image *parent = chain->images[first];
    int r = dr_fingerprint_compare(image, print, parent, err);
    if (r == 0)
        r = sample(chain, first, now, err);
    if (r == 0 && strcmp(now, print->sampled) != 0)
        return refuse(image, parent, "some blocks were compared", err);
    if (r < 0 || !full || !print->full[0])
        return r;
    r = hash_blocks(chain, first, SAMPLE, NULL, now, err);
    return r == 0 && strcmp(now, print->full) != 0 ? refuse(image, parent, "all was compared", err)
                                                   : r;
}

/* ------------------------------------------------------------------ by path */

/* The image alone, and its parent, which need not be what is recorded of it. */
static int open_both(struct dr_fs *fs, const char *path, const char *format,
                     const struct dr_open_options *open, struct dr_image **image,
                     struct dr_disk **parent, struct dr_error *err)
{
    CLEANUP_FREE char *where = NULL;
    struct dr_open_options as = *open;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK | (open->flags & DR_OPEN_ANY_PATH);
    int r = dr_image_open(fs, path, format, flags, image, err);
    if (r < 0 || !(*image)->backing_name)
        return r;
    r = dr_ops_backing_path(*image, open, &where, err);
    if (r == -ENOENT && !where)
        return dr_fail(err, ENOENT, "%s: its parent \"%s\" is not there", path,
                       (*image)->backing_name);
    if (r == 0)
        r = dr_gate_check(fs, path, where, open, err);
    as.format = (*image)->backing_format ? (*image)->backing_format : (*image)->fmt->parent_format;
    as.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    return r < 0 ? r : dr_open_fs(fs, where, &as, parent, err);
}

int ops_fingerprint_look(struct dr_fs *fs, const char *path, const char *format,
                         const struct dr_open_options *open, bool full, struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    CLEANUP_DISK struct dr_disk *parent = NULL;
    struct dr_fingerprint print = {0};
    struct dr_open_options as = *open;
    as.flags |= DR_OPEN_FORCE_SHARE;
    int r = open_both(fs, path, format, &as, &image, &parent, err);
    if (r == 0 && parent)
        r = dr_fingerprint_load(image, &print, err);
    if (r <= 0 || !parent)
        return r;
    return ops_fingerprint_verify(image, parent->chain, 0, &print, full, err);
}

int dr_fingerprint_fs(struct dr_fs *fs, const char *path,
                      const struct dr_fingerprint_options *options, struct dr_job *job,
                      struct dr_error *err)
{
    static const struct dr_fingerprint_options defaults;
    const struct dr_fingerprint_options *o = options ? options : &defaults;
    CLEANUP_IMAGE struct dr_image *image = NULL;
    CLEANUP_DISK struct dr_disk *parent = NULL;
    if (o->remove)
        return dr_fingerprint_remove(fs, path, err);
    int r = open_both(fs, path, o->open.format, &o->open, &image, &parent, err);
    if (r < 0)
        return r;
    if (!parent)
        return dr_fail(err, EINVAL, "%s: has no parent to record anything of", path);
    return ops_fingerprint_take(image, parent->chain, 0, o->full_hash, job, err);
}

int dr_fingerprint(const char *path, const struct dr_fingerprint_options *options,
                   struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_fingerprint_fs(dr_fs_posix(), path, options, job, err));
}
