/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Open and close; the frame of an extraction: who wants what, the run, what was missing. */
#include <inttypes.h>
#include <stdio.h>

#include "archive/vma-read.h"
#include "core/core.h"

/* ------------------------------------------------------------------ open */

static int read_exactly(struct dr_vma *vma, uint8_t *buf, size_t len, struct dr_error *err)
{
    size_t got;
    uint64_t from = dr_source_pos(vma->source);
    int r = dr_source_read(vma->source, buf, len, &got, err);
    if (r == 0 && got < len)
        r = dr_fail(err, EINVAL, "%s: ends at offset %" PRIu64 ", expected a header up to %" PRIu64,
                    vma->name, from + got, from + len);
    return r;
}

/* What is too short for an archive may be none at all. */
static int read_begin(struct dr_vma *vma, uint8_t *fixed, struct dr_error *err)
{
    size_t got;
    int r = dr_source_read(vma->source, fixed, VMA_FIXED_HEADER, &got, err);
    if (r == 0 && got > 0 && got < VMA_FIXED_HEADER)
        r = vma_check_magic(fixed, got, vma->name, err);
    if (r == 0 && got < VMA_FIXED_HEADER)
        r = dr_fail(err, EINVAL, "%s: ends at offset %zu, expected a header up to %u", vma->name,
                    got, VMA_FIXED_HEADER);
    return r;
}

static int read_good_header(struct dr_vma *vma, struct dr_error *err)
{
    uint32_t size;
    CLEANUP_FREE uint8_t *fixed = malloc(VMA_FIXED_HEADER);
    if (!fixed)
        return dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    int r = read_begin(vma, fixed, err);
    if (r == 0)
        r = vma_header_size(fixed, vma->name, &size, err);
    if (r != 0)
        return r;
    CLEANUP_FREE uint8_t *all = malloc(size);
    if (!all)
        return dr_fail(err, ENOMEM, "%s: out of memory for a header of %" PRIu32 " bytes",
                       vma->name, size);
    memcpy(all, fixed, VMA_FIXED_HEADER);
    if (size > VMA_FIXED_HEADER)
        r = read_exactly(vma, all + VMA_FIXED_HEADER, size - VMA_FIXED_HEADER, err);
    if (r != 0)
        return r;
    r = vma_header_parse(all, size, vma->name, &vma->header, vma->message, vma->user, err);
    if (r == -EINVAL && vma->any_header && !dr_source_file(vma->source)) {
        dr_error_reset(err);
        r = vma_header_guess(all, size, vma->name, &vma->header, vma->message, vma->user, err);
    }
    return r;
}

#define CHEAP_PIECE (1u << 20) /* bytes; an extent has 3.7 MiB when it is full */

/* From the header of each extent to the next: does that unpack all, which is to be unpacked once
 * more for the data? */
static bool walk_is_cheap(const struct dr_vma *vma, const struct dr_file *file)
{
    return file == dr_source_stored(vma->source) || dr_source_largest_piece(file) <= CHEAP_PIECE;
}

/* Failures that are not damage stay what they are. */
static int read_header(struct dr_vma *vma, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    struct dr_file *file = dr_source_file(vma->source);
    int r = read_good_header(vma, &why);
    if (vma->any_header && file && (r == -EINVAL || r == -EBADMSG || r == -EIO)) {
        int guessed = vma_guess_header(vma, err);
        if (guessed == 0 || guessed == -ENOMEM)
            r = guessed;
    }
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    if (vma->any_header && file && (vma->header.wrong_sum || walk_is_cheap(vma, file)))
        r = vma_find_unlisted(vma, err);
    return r;
}

static int open_source(struct dr_vma *vma, const char *path, int fd, struct dr_error *err)
{
    struct dr_unpack_damage damage;
    char text[sizeof(damage.why.text) + 64];
    if (!vma->salvage)
        return dr_source_open(vma->fs, path, fd, &vma->source, err);
    int r = dr_source_open_salvaging(vma->fs, path, fd, &vma->source, &damage, err);
    if (r == 0 && damage.why.errnum && vma->message) {
        snprintf(text, sizeof(text), "%s: nothing could be unpacked behind that", damage.why.text);
        vma->message(vma->user, text);
    }
    return r;
}

int dr_vma_open_fs(struct dr_fs *fs, const char *path, const struct dr_vma_open_options *options,
                   struct dr_vma **out, struct dr_error *err)
{
    *out = NULL;
    struct dr_vma *vma = calloc(1, sizeof(*vma));
    if (!vma)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    vma->fs = fs;
    if (options) {
        vma->use_fd = options->use_fd;
        vma->salvage = options->salvage;
        vma->any_header = options->salvage && options->any_header;
        vma->message = options->message;
        vma->user = options->user;
    }
    int r = open_source(vma, path, vma->use_fd ? options->fd : -1, err);
    if (r == 0) {
        vma->name = dr_source_name(vma->source);
        r = read_header(vma, err);
    }
    if (r < 0) {
        dr_vma_close(vma);
        return r;
    }
    vma->header.compression = dr_source_compression(vma->source);
    *out = vma;
    return 0;
}

int dr_vma_open(const char *path, const struct dr_vma_open_options *options, struct dr_vma **vma,
                struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(vma, err);
    return dr_vma_open_fs(dr_fs_posix(), path, options, vma, err);
}

void dr_vma_close(struct dr_vma *vma)
{
    if (!vma)
        return;
    vma_header_free(&vma->header);
    dr_source_close(vma->source);
    free(vma);
}

const struct dr_vma_header *dr_vma_header(const struct dr_vma *vma)
{
    return &vma->header;
}

/* ------------------------------------------------------------------ targets */

static bool same_group(const struct vma_rate *rate, const struct dr_vma_target *t)
{
    return rate->group && t->rate_group && strcmp(rate->group, t->rate_group) == 0;
}

/* Of different rates in a group the lowest holds, for all of it. */
static struct vma_rate *rate_of(struct vma_read *x, const struct dr_vma_target *t)
{
    unsigned i = 0;
    while (i < x->n_rates && !same_group(&x->rates[i], t))
        i++;
    if (i == x->n_rates && t->rate == 0)
        return NULL;
    if (i == x->n_rates)
        x->rates[x->n_rates++] = (struct vma_rate){t->rate_group, t->rate, 0};
    if (t->rate != 0)
        x->rates[i].rate = dr_min(x->rates[i].rate, t->rate);
    return &x->rates[i];
}

static int check_target(const struct vma_read *x, const struct dr_vma_target *t,
                        struct dr_error *err)
{
    const struct dr_vma_disk *disk = vma_header_disk(&x->vma->header, t->id);
    if (!disk)
        return dr_fail(err, EINVAL, "%s: has no disk %u", x->vma->name, t->id);
    if (x->disks[t->id].target)
        return dr_fail(err, EINVAL, "%s: disk %u has two targets", x->vma->name, t->id);
    if (!t->disk)
        return dr_fail(err, EINVAL, "%s: no target is given for disk %u", x->vma->name, t->id);
    if (!t->compare && !dr_writable(t->disk))
        return dr_fail(err, EINVAL, "%s: is not open for writing", dr_image_path(t->disk, 0));
    /* Archives have whole sectors; what such a disk was made from need not. */
    uint64_t room = t->compare ? dr_round_up(dr_size(t->disk), 512) : dr_size(t->disk);
    if ((!disk->vmstate || t->compare) && room < disk->size)
        return dr_fail(err, ENOSPC, "%s: holds %" PRIu64 " bytes, the archived disk has %" PRIu64,
                       dr_image_path(t->disk, 0), dr_size(t->disk), disk->size);
    return 0;
}

/* The state of a machine goes on as long as there is room: its size is only advice. */
static int set_targets(struct vma_read *x, struct dr_error *err)
{
    if (x->o->headers_only && x->o->n_targets > 0)
        return dr_fail(err, EINVAL, "%s: targets need more than the structure", x->vma->name);
    for (size_t i = 0; i < x->o->n_targets; i++) {
        const struct dr_vma_target *t = &x->o->targets[i];
        int r = check_target(x, t, err);
        if (r < 0)
            return r;
        struct vma_reading *d = &x->disks[t->id];
        d->target = t;
        d->end = d->disk->vmstate ? dr_size(t->disk) : d->disk->size;
        if (t->rate_group)
            rate_of(x, t);
        d->zeros = t->compare || !t->is_zero;
    }
    for (size_t i = 0; i < x->o->n_targets; i++) /* whose group got a rate after them */
        x->disks[x->o->targets[i].id].rate = rate_of(x, &x->o->targets[i]);
    return 0;
}

/* ------------------------------------------------------------------ checksums */

/* Beside the archive that a link leads to, and failing that beside the link. */
static int open_usual_sums(struct vma_read *x, struct dr_error *err)
{
    struct dr_fs *fs = x->vma->fs;
    CLEANUP_FREE char *real = NULL;
    bool linked = fs->ops->realpath(fs, x->vma->name, &real, NULL) == 0;
    int r = -ENOENT;
    for (int i = linked ? 0 : 1; i < 2 && r == -ENOENT; i++) {
        CLEANUP_FREE char *path = NULL;
        dr_error_reset(err);
        if (asprintf(&path, "%s.sums", i == 0 ? real : x->vma->name) < 0) {
            path = NULL;
            return dr_fail(err, ENOMEM, "%s: out of memory", x->vma->name);
        }
        r = vma_sums_open(fs, path, &x->vma->header, &x->sums, err);
    }
    return r;
}

/* That there are none, or another archive's, is no failure unless they were asked for. */
static int open_sums(struct vma_read *x, struct dr_error *err)
{
    const struct dr_vma_extract_options *o = x->o;
    if (o->no_sums || o->headers_only || (!o->sums && x->vma->use_fd))
        return 0;
    if (o->sums)
        return vma_sums_open(x->vma->fs, o->sums, &x->vma->header, &x->sums, err);
    struct dr_error why = DR_ERROR_INIT;
    int r = open_usual_sums(x, &why);
    if (r == -ENOMEM)
        return dr_fail(err, ENOMEM, "%s", why.text);
    if (r < 0 && r != -ENOENT)
        vma_read_message(x, "checksums are not used: %s", why.text);
    return 0;
}

static void want_sums(struct vma_read *x)
{
    x->result.sums_used = x->sums != NULL;
    for (unsigned id = 1; id < 256 && x->sums; id++)
        x->disks[id].zeros = x->disks[id].disk != NULL;
}

/* ------------------------------------------------------------------ the run */

static int run(struct vma_read *x, struct dr_error *err)
{
    struct dr_copy_policy policy = {
        .user = x,
        .next = vma_read_next,
        .work = vma_read_work,
        .buffers = 2,
        .buffer_size = VMA_READ_BUFFER,
        .clock = x->clock,
    };
    for (size_t i = 0; i < x->vma->header.n_disks; i++)
        policy.total += vma_clusters(x->vma->header.disks[i].size) * DR_VMA_CLUSTER;
    return dr_copy_run(&policy, x->job, err);
}

static int extract(struct vma_read *x, struct dr_error *err)
{
    int r = set_targets(x, err);
    if (r == 0)
        r = open_sums(x, err);
    if (r < 0)
        return r;
    want_sums(x);
    x->vma->done = true;
    r = vma_damage_header(x, err);
    if (r == 0)
        r = run(x, err);
    if (r == 0 && x->resume.from > x->pos) /* then nothing was taken */
        r = dr_fail(err, EINVAL,
                    "%s: ends at offset %" PRIu64 ", before offset %" PRIu64
                    ", from which its extraction shall go on",
                    x->vma->name, x->pos, x->resume.from);
    if (r == 0)
        r = vma_damage_missing(x, err);
    else
        vma_damage_flush(x);
    return r < 0 ? r : vma_flush_targets(x, err);
}

/* ------------------------------------------------------------------ begin and end */

static void init_locks(struct vma_read *x)
{
    pthread_condattr_t attr;
    pthread_mutex_init(&x->lock, NULL);
    pthread_mutex_init(&x->damage_lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&x->idle, &attr);
    pthread_condattr_destroy(&attr);
}

static void clean_up(struct vma_read *x)
{
    vma_chunks_free(x);
    for (unsigned id = 0; id < 256; id++)
        vma_seen_free(&x->disks[id].seen);
    vma_sums_close(x->sums);
    pthread_cond_destroy(&x->idle);
    pthread_mutex_destroy(&x->damage_lock);
    pthread_mutex_destroy(&x->lock);
    free(x->window);
    free(x);
}

static int begin(struct vma_read *x, struct dr_vma *vma, struct dr_error *err)
{
    x->vma = vma;
    x->clock = vma->clock;
    x->pos = vma->header.header_size;
    x->last_unit = UINT64_MAX - VMA_EXTENT_HEADER;
    x->checkpoint_at = vma_read_now(x) + VMA_CHECKPOINT_NS;
    x->file = vma->in_order ? NULL : dr_source_file(vma->source);
    x->unpack = x->file && x->o->n_targets == 0 && !x->o->headers_only &&
                dr_source_compression(vma->source);
    x->shifted = dr_source_has_gaps(x->file);
    x->window = x->file ? malloc(VMA_READ_WINDOW) : NULL;
    if (x->file && !x->window)
        return dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    dr_source_stop_by(vma->source, dr_job_stop_flag(x->job));
    for (size_t i = 0; i < vma->header.n_disks; i++)
        x->disks[vma->header.disks[i].id].disk = &vma->header.disks[i];
    if (vma->done)
        return dr_fail(err, EINVAL, "%s: its disks were read already; open it again", vma->name);
    return 0;
}

int vma_read_disks(struct dr_vma *vma, const struct dr_vma_extract_options *options,
                   const struct vma_resume *resume, struct dr_job *job,
                   struct dr_vma_extract_result *result, struct dr_error *err)
{
    struct vma_read *x = calloc(1, sizeof(*x));
    if (!x)
        return dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    x->o = options;
    x->resume = resume ? *resume : (struct vma_resume){0};
    x->job = job;
    init_locks(x);
    int r = begin(x, vma, err);
    if (r == 0)
        r = extract(x, err);
    if (result)
        *result = x->result;
    dr_source_stop_by(vma->source, NULL);
    clean_up(x);
    return r;
}

int dr_vma_extract(struct dr_vma *vma, const struct dr_vma_extract_options *options,
                   struct dr_job *job, struct dr_vma_extract_result *result, struct dr_error *err)
{
    DR_REQUIRE(vma, err);
    if (options)
        DR_REQUIRE_N(options->targets, options->n_targets, err);
    static const struct dr_vma_extract_options defaults;
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job,
                      vma_read_disks(vma, options ? options : &defaults, NULL, job, result, err));
}
