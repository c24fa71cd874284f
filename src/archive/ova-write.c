/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing OVAs: the descriptor, the disks, the manifest, in one tar.
 *
 * The descriptor comes first and has the sizes of the disks, which are known when those are
 * compressed. In a file it gets its room, and its bytes at the end: blank lines fill the room. The
 * file is made under another name and takes its own when all of it is durable. A pipe takes no
 * second write in front: there the disks are compressed twice, first to learn their sizes. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "archive/ova-write.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "ops/newimage.h"
#include "ops/ops-internal.h"
#include "ops/sequential.h"

#define RECORD    10240u /* a tar is whole ones */
#define NAME_MAX_ 80u    /* a file's name in a ustar header has 100 bytes */

struct writing {
    const struct dr_ova_create_options *o;
    struct dr_job *job;
    const char *path, *name;
    struct dr_file *out;
    struct ova_new_disk *disks;
    size_t n;
    struct dr_pair *pairs; /* settings of the disks */
    size_t n_pairs;
    int64_t mtime;
    size_t room;          /* bytes of the descriptor */
    uint64_t done, total; /* guest bytes that were read, of all passes */
};

/* ------------------------------------------------------------------ what is asked for */

static bool is_plain_name(const char *name)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    size_t n = strlen(name);
    return n > 0 && n <= NAME_MAX_ && strspn(name, allowed) == n && name[0] != '.' &&
           name[0] != '-';
}

static int check_options(const struct writing *w, struct dr_error *err)
{
    const struct dr_ova_create_options *o = w->o;
    bool ide = o->controller && strcmp(o->controller, "ide") == 0;
    if (!is_plain_name(w->name))
        return dr_fail(err, EINVAL,
                       "'%.100s' is no name of a machine: expected up to %u letters, digits, '-', "
                       "'_', '.', and none of '-' and '.' in front",
                       w->name, NAME_MAX_);
    if (o->controller && !ide && strcmp(o->controller, "lsilogic") != 0)
        return dr_fail(err, EINVAL, "controller '%.60s': expected lsilogic or ide", o->controller);
    size_t most = ide ? 4 : DR_OVA_DISKS_MAX;
    if (o->n_disks == 0 || o->n_disks > most)
        return dr_fail(err, EINVAL, "%zu disks: a machine gets 1 to %zu", o->n_disks, most);
    if (o->memory % (1u << 20) || o->memory >> 50)
        return dr_fail(err, EINVAL, "%" PRIu64 " bytes of memory: expected whole MiB", o->memory);
    if (o->cpus > 1024)
        return dr_fail(err, EINVAL, "%u processors: expected at most 1024", o->cpus);
    return 0;
}

/* Subformat and adapter are ours to say; others may be anything that a stream can have. */
static int make_pairs(struct writing *w, struct dr_error *err)
{
    const struct dr_ova_create_options *o = w->o;
    bool ide = o->controller && strcmp(o->controller, "ide") == 0;
    w->pairs = calloc(o->n_pairs + 2, sizeof(*w->pairs));
    if (!w->pairs)
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    for (size_t i = 0; i < o->n_pairs; i++) {
        if (strcmp(o->pairs[i].name, "subformat") == 0 ||
            strcmp(o->pairs[i].name, "adapter_type") == 0)
            return dr_fail(err, EINVAL, "%s: %s follows from the machine and cannot be set",
                           w->path, o->pairs[i].name);
        w->pairs[w->n_pairs++] = o->pairs[i];
    }
    w->pairs[w->n_pairs++] = (struct dr_pair){"subformat", "streamOptimized"};
    w->pairs[w->n_pairs++] = (struct dr_pair){"adapter_type", ide ? "ide" : "lsilogic"};
    return 0;
}

static int make_disks(struct writing *w, struct dr_error *err)
{
    w->disks = calloc(w->o->n_disks, sizeof(*w->disks));
    if (!w->disks)
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    for (; w->n < w->o->n_disks; w->n++) {
        struct ova_new_disk *d = &w->disks[w->n];
        d->disk = w->o->disks[w->n];
        d->capacity = dr_round_up(dr_size(d->disk), 512);
        if (asprintf(&d->name, "%s-disk%zu.vmdk", w->name, w->n + 1) < 0) {
            d->name = NULL;
            return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
        }
        w->total += d->capacity;
        if (dr_ops_reads(dr_fs_posix(), d->disk->chain, w->path) && !w->o->use_fd)
            return dr_fail(err, EBUSY, "%s: is read from, as a disk or its parent", w->path);
    }
    return 0;
}

static int begin(struct writing *w, struct dr_error *err)
{
    int r = check_options(w, err);
    if (r == 0)
        r = make_pairs(w, err);
    if (r == 0)
        r = make_disks(w, err);
    if (r < 0)
        return r;
    CLEANUP_FREE char *widest = ova_descriptor(w->name, w->o, w->disks, w->n, false, 0);
    if (!widest)
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    w->room = strlen(widest);
    w->mtime = w->o->has_mtime ? w->o->mtime : (int64_t)time(NULL);
    return 0;
}

static void end(struct writing *w)
{
    for (size_t i = 0; i < w->n; i++)
        free(w->disks[i].name);
    free(w->disks);
    free(w->pairs);
}

/* ------------------------------------------------------------------ members */

static int append_zeros(struct writing *w, uint64_t len, struct dr_error *err)
{
    return len ? dr_file_zero(w->out, dr_file_size(w->out), len, DR_FILE_ZERO_WRITE, err) : 0;
}

static int put_header(struct writing *w, const char *name, uint64_t size, uint64_t at,
                      struct dr_error *err)
{
    uint8_t block[OVA_BLOCK];
    int r = ova_tar_header(name, size, w->mtime, block, err);
    return r < 0 ? r : dr_file_pwrite(w->out, block, at, sizeof(block), err);
}

/* A member whose bytes are at hand, at `at` of the archive; padded where that is its end. */
static int put_text(struct writing *w, const char *name, const char *text, uint64_t at,
                    struct dr_error *err)
{
    size_t len = strlen(text);
    int r = put_header(w, name, len, at, err);
    if (r == 0)
        r = dr_file_pwrite(w->out, text, at + OVA_BLOCK, len, err);
    if (r == 0 && dr_file_size(w->out) == at + OVA_BLOCK + len)
        r = append_zeros(w, dr_round_up(len, OVA_BLOCK) - len, err);
    return r;
}

/* The disk as a stream at the end of the archive; counted only, without one. */
static int put_stream(struct writing *w, struct ova_new_disk *d, struct dr_file *out,
                      struct dr_error *err)
{
    const struct dr_convert_options o = {
        .out_format = "vmdk", .pairs = w->pairs, .n_pairs = w->n_pairs};
    const struct dr_sequential_part part = {.disk = d->disk, .to = dr_size(d->disk)};
    struct dr_sequential_job what = {
        .o = &o,
        .parts = &part,
        .n = 1,
        .total = d->capacity,
        .job = w->job,
        .before = w->done,
        .after = w->total - w->done - d->capacity,
        .stored = &d->stored,
    };
    struct dr_file *tap = NULL;
    uint64_t start = out ? dr_file_size(out) : 0;
    struct ova_summing *sum = ova_summing_new(OVA_SHA256);
    int r = sum ? ova_tap(out, w->path, sum, &tap, err)
                : dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    if (r == 0)
        r = dr_sequential_write(tap, d->name, &what, err);
    if (r == 0)
        d->size = dr_file_size(tap) - start;
    w->done += d->capacity;
    if (!ova_summing_end(sum, r == 0 ? &d->digest : NULL) && r == 0)
        r = dr_fail(err, EIO, "%s: the digest of %s could not be computed", w->path, d->name);
    dr_file_unref(tap);
    return r;
}

static char *with_ending(const char *name, const char *ending)
{
    char *out = NULL;
    return asprintf(&out, "%s%s", name, ending) < 0 ? NULL : out;
}

static int put_descriptor(struct writing *w, struct ova_digest *digest, struct dr_error *err)
{
    CLEANUP_FREE char *text = ova_descriptor(w->name, w->o, w->disks, w->n, true, w->room);
    CLEANUP_FREE char *name = with_ending(w->name, ".ovf");
    struct ova_summing *sum = ova_summing_new(OVA_SHA256);
    if (!text || !name || !sum) {
        ova_summing_end(sum, NULL);
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    }
    ova_summing_add(sum, text, strlen(text));
    if (!ova_summing_end(sum, digest))
        return dr_fail(err, EIO, "%s: the digest of %s could not be computed", w->path, name);
    return put_text(w, name, text, 0, err);
}

static void put_digest(FILE *f, const char *name, const char *ending, const struct ova_digest *d)
{
    char hex[2 * OVA_DIGEST_MAX + 1];
    ova_digest_text(d, hex);
    fprintf(f, "%s(%s%s)= %s\n", ova_digest_name(d->kind), name, ending, hex);
}

/* The manifest, and what ends a tar. */
static int put_end(struct writing *w, const struct ova_digest *descriptor, struct dr_error *err)
{
    CLEANUP_FREE char *text = NULL, *name = with_ending(w->name, ".mf");
    size_t len = 0;
    FILE *f = name ? open_memstream(&text, &len) : NULL;
    if (!f)
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    put_digest(f, w->name, ".ovf", descriptor);
    for (size_t i = 0; i < w->n; i++)
        put_digest(f, w->disks[i].name, "", &w->disks[i].digest);
    if (fclose(f) != 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    int r = put_text(w, name, text, dr_file_size(w->out), err);
    uint64_t size = dr_file_size(w->out);
    if (r == 0)
        r = append_zeros(w, dr_round_up(size + 2 * OVA_BLOCK, RECORD) - size, err);
    return r;
}

/* ------------------------------------------------------------------ into a file */

static int write_file(struct writing *w, struct dr_error *err)
{
    struct ova_digest digest = {0};
    int r = append_zeros(w, OVA_BLOCK + dr_round_up(w->room, OVA_BLOCK), err);
    for (size_t i = 0; i < w->n && r == 0; i++) {
        uint64_t at = dr_file_size(w->out);
        r = append_zeros(w, OVA_BLOCK, err);
        if (r == 0)
            r = put_stream(w, &w->disks[i], w->out, err);
        if (r == 0)
            r = put_header(w, w->disks[i].name, w->disks[i].size, at, err);
    }
    if (r == 0)
        r = put_descriptor(w, &digest, err);
    return r < 0 ? r : put_end(w, &digest, err);
}

static int create_file(struct writing *w, uint64_t *bytes, struct dr_error *err)
{
    struct dr_fs *fs = dr_fs_posix();
    CLEANUP_NEW struct dr_new_image fresh = {0};
    unsigned flags = DR_OPEN_RDWR | (w->o->no_sync ? DR_OPEN_NO_FLUSH : 0u);
    int r = dr_new_begin(&fresh, fs, w->path, !w->o->replace, flags, err);
    if (r == 0)
        r = dr_new_open_file(&fresh, dr_format_find("ova"), flags, &w->out, err);
    if (r == 0)
        r = dr_new_check_places(&fresh, err);
    if (r == 0)
        r = write_file(w, err);
    if (r == 0)
        r = dr_file_flush(w->out, err);
    if (r == 0)
        *bytes = dr_file_size(w->out);
    dr_file_unref(w->out);
    return r < 0 ? r : dr_new_publish(&fresh, err);
}

/* ------------------------------------------------------------------ into a pipe */

static int write_pipe(struct writing *w, struct dr_error *err)
{
    struct ova_digest digest = {0};
    int r = 0;
    w->total *= 2;
    for (size_t i = 0; i < w->n && r == 0; i++)
        r = put_stream(w, &w->disks[i], NULL, err);
    if (r == 0)
        r = put_descriptor(w, &digest, err);
    for (size_t i = 0; i < w->n && r == 0; i++) {
        struct ova_new_disk *d = &w->disks[i];
        uint64_t size = d->size, stored = d->stored;
        r = put_header(w, d->name, size, dr_file_size(w->out), err);
        if (r == 0)
            r = put_stream(w, d, w->out, err);
        if (r == 0 && (d->size != size || d->stored != stored))
            r = dr_fail(err, ESTALE,
                        "%s: disk %zu changed while it was read: %" PRIu64 " bytes, and %" PRIu64
                        " before",
                        w->path, i + 1, d->size, size);
    }
    return r < 0 ? r : put_end(w, &digest, err);
}

static int create_pipe(struct writing *w, uint64_t *bytes, struct dr_error *err)
{
    int r = dr_file_open_pipe(w->o->fd, w->path, w->job ? dr_job_stop_flag(w->job) : NULL, &w->out,
                              err);
    if (r == 0)
        r = write_pipe(w, err);
    if (r == 0 && !w->o->no_sync)
        r = dr_file_flush(w->out, err);
    if (r == 0)
        *bytes = dr_file_size(w->out);
    dr_file_unref(w->out);
    return r;
}

/* ------------------------------------------------------------------ for everybody */

int dr_ova_create(const char *path, const struct dr_ova_create_options *options, struct dr_job *job,
                  struct dr_ova_create_result *result, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE_N(options->disks, options->n_disks, err);
    for (size_t i = 0; i < options->n_disks; i++)
        DR_REQUIRE(options->disks[i], err);
    struct writing w = {
        .o = options, .job = job, .path = path, .name = options->name ? options->name : "machine"};
    uint64_t bytes = 0;
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    r = begin(&w, err);
    if (r == 0)
        r = options->use_fd ? create_pipe(&w, &bytes, err) : create_file(&w, &bytes, err);
    end(&w);
    if (result)
        result->bytes = bytes;
    return dr_new_hide(dr_job_end(job, r), path, err);
}
