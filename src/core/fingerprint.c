/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "core/fingerprint.h"

#include <inttypes.h>
#include <stdio.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/publish.h"

#define MAX_BYTES 4096u
#define SAMPLES   16u
#define SAMPLE    (UINT64_C(64) << 10)
#define FIRST     (UINT64_C(1) << 20) /* where a first partition begins, as a rule */
#define ULL(x)    ((unsigned long long)(x))

/* ------------------------------------------------------------------ the text */

/* The name is kept as a hash: it may hold any bytes. */
static uint64_t name_hash(const char *name)
{
    return XXH3_64bits(name, strlen(name));
}

static bool is_hex(const char *text)
{
    size_t n = strspn(text, "0123456789abcdef");
    return text[n] == '\0' && (n == 0 || n == DR_FINGERPRINT_HEX - 1);
}

/* One record at *text, which goes behind it. false: it is damaged. */
static bool parse_one(const char **text, uint64_t *name, struct dr_fingerprint *print)
{
    uint64_t sum = 0;
    char id[9] = "", sampled[40] = "", full[40] = "";
    int at_sum = 0, end = 0;
    *print = (struct dr_fingerprint){0};
    int n = sscanf(*text,
                   "drover-parent 1\nname %16" SCNx64 "\nsize %20" SCNu64
                   "\nformat %31s\nid %8s\nsampled %33s\nfull %33s\n%nsum %16" SCNx64 "\n%n",
                   name, &print->size, print->format, id, sampled, full, &at_sum, &sum, &end);
    bool whole = n == 7 && at_sum > 0 && sum == XXH3_64bits(*text, (size_t)at_sum);
    if (strcmp(full, "-") == 0)
        full[0] = '\0';
    if (!whole || end <= at_sum || !is_hex(sampled) || !is_hex(full))
        return false;
    char *rest = NULL;
    print->has_id = strcmp(id, "-") != 0;
    print->id = print->has_id ? (uint32_t)strtoul(id, &rest, 16) : 0;
    memcpy(print->sampled, sampled, sizeof(print->sampled));
    memcpy(print->full, full, sizeof(print->full));
    *text += end;
    return true;
}

/* 1 and *print: the record of that parent name; 0: there is none of it. */
static int parse(const struct dr_image *image, const char *path, const char *text,
                 struct dr_fingerprint *print, struct dr_error *err)
{
    const char *p = text;
    uint64_t name = 0;
    do {
        if (!parse_one(&p, &name, print))
            return dr_fail(
                err, EBADMSG,
                "%s: is damaged; to record the parent of %s anew: drover chain fingerprint %s",
                path, image->path, image->path);
        if (name == name_hash(image->backing_name))
            return 1;
    } while (*p);
    return 0;
}

static char *format_text(const char *name, const struct dr_fingerprint *p)
{
    char *text = NULL, *whole = NULL;
    char id[9] = "-";
    if (p->has_id)
        snprintf(id, sizeof(id), "%08x", p->id);
    if (asprintf(&text,
                 "drover-parent 1\nname %016" PRIx64 "\nsize %" PRIu64
                 "\nformat %s\nid %s\nsampled %s\nfull %s\n",
                 name_hash(name), p->size, p->format, id, p->sampled,
                 p->full[0] ? p->full : "-") < 0)
        return NULL;
    if (asprintf(&whole, "%ssum %016" PRIx64 "\n", text, XXH3_64bits(text, strlen(text))) < 0)
        whole = NULL;
    free(text);
    return whole;
}

/* The same, and behind it the one of the present parent. */
static char *format_both(const char *name, const struct dr_fingerprint *next, const char *present,
                         const struct dr_fingerprint *now)
{
    CLEANUP_FREE char *first = format_text(name, next);
    CLEANUP_FREE char *second = format_text(present, now);
    char *both = NULL;
    if (!first || !second || asprintf(&both, "%s%s", first, second) < 0)
        return NULL;
    return both;
}

/* ------------------------------------------------------------------ the file */

static bool means_none(int r)
{
    return r == -ENOENT || r == -ENOTDIR || r == -ENAMETOOLONG;
}

/* Beside the file itself: what leads to the image may be a link, which another one need not share.
 */
static int find_place(struct dr_fs *fs, const char *image, char **path, struct dr_error *err)
{
    enum dr_name_kind kind;
    CLEANUP_FREE char *real = NULL;
    *path = NULL;
    if (dr_look(fs, image, &kind, NULL, NULL) == 0 && kind == DR_NAME_LINK) {
        int r = fs->ops->realpath(fs, image, &real, NULL);
        if (r < 0 && !means_none(r))
            return dr_fail_errno(err, -r, "%s: the link cannot be followed", image);
    }
    if (asprintf(path, "%s" DR_FINGERPRINT_SUFFIX, real ? real : image) >= 0)
        return 0;
    *path = NULL;
    return dr_fail(err, ENOMEM, "%s: out of memory", image);
}

/* A device, a part of a file, or a disk that a server has. */
static bool has_nothing_beside(const struct dr_file *file)
{
    return file->block_device || dr_name_is_remote(file->path);
}

/* 1: text has what is recorded at path, of which only so much is looked at; 0: nothing is there. */
static int read_record(struct dr_fs *fs, const char *path, char text[MAX_BYTES + 1],
                       struct dr_error *err)
{
    struct dr_file *file = NULL;
    int r = dr_look(fs, path, NULL, NULL, NULL);
    if (means_none(r))
        return 0;
    if (r < 0)
        return dr_fail_errno(err, -r, "%s", path);
    r = dr_file_open(fs, path, DR_FILE_NO_LOCK | DR_FILE_FORCE_SHARE, &file, err);
    if (r < 0)
        return r;
    size_t len = (size_t)dr_min(dr_file_size(file), MAX_BYTES);
    r = len ? dr_file_pread(file, text, 0, len, err) : 0;
    dr_file_unref(file);
    text[len] = '\0';
    return r < 0 ? r : 1;
}

int dr_fingerprint_load(const struct dr_image *image, struct dr_fingerprint *print,
                        struct dr_error *err)
{
    char text[MAX_BYTES + 1];
    if (!image->backing_name || has_nothing_beside(image->files[0]))
        return 0;
    CLEANUP_FREE char *path = NULL;
    int r = find_place(image->fs, image->files[0]->path, &path, err);
    if (r == 0)
        r = read_record(image->fs, path, text, err);
    return r <= 0 ? r : parse(image, path, text, print, err);
}

/* like: gets its owner and mode from that one where there is no record yet. */
static int write_record(struct dr_fs *fs, const char *path, const char *text, struct dr_file *like,
                        struct dr_error *err)
{
    struct dr_temp temp = {0};
    struct dr_file *old = NULL;
    int r = dr_fs_exists(fs, path) ? dr_file_open(fs, path, DR_FILE_RDWR, &old, err) : 0;
    if (r == 0)
        r = dr_temp_create(&temp, fs, path, old, old ? old : like, err);
    if (r == 0)
        r = dr_file_pwrite(temp.file, text, 0, strlen(text), err);
    if (r == 0)
        r = dr_temp_publish(&temp, err);
    dr_temp_end(&temp);
    dr_file_unref(old);
    return r;
}

static int store(const struct dr_image *image, const char *text, struct dr_error *err)
{
    CLEANUP_FREE char *path = NULL;
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    int r = find_place(image->fs, image->files[0]->path, &path, err);
    return r < 0 ? r : write_record(image->fs, path, text, image->files[0], err);
}

int dr_fingerprint_store(const struct dr_image *image, const struct dr_fingerprint *print,
                         struct dr_error *err)
{
    const struct dr_file *file = image->files[0];
    if (has_nothing_beside(file))
        return dr_fail(err, ENOTSUP, "%s: is a %s, beside which nothing is recorded", image->path,
                       file->part                      ? "part of a file"
                       : dr_name_is_remote(file->path) ? "disk on a server"
                                                       : "block device");
    CLEANUP_FREE char *text = format_text(image->backing_name, print);
    return store(image, text, err);
}

int dr_fingerprint_store_next(const struct dr_image *image, const char *name,
                              const struct dr_fingerprint *print, struct dr_error *err)
{
    struct dr_fingerprint now;
    int r = dr_fingerprint_load(image, &now, err);
    if (r <= 0)
        return r;
    CLEANUP_FREE char *text = format_both(name, print, image->backing_name, &now);
    return store(image, text, err);
}

int dr_fingerprint_remove(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    enum dr_name_kind kind;
    CLEANUP_FREE char *name = NULL;
    if (dr_name_is_remote(path))
        return 0;
    int r = find_place(fs, path, &name, err);
    if (r < 0)
        return r;
    r = dr_look(fs, name, &kind, NULL, NULL);
    if (means_none(r) || (r == 0 && kind == DR_NAME_DIR))
        return 0;
    if (r < 0)
        return dr_fail_errno(err, -r, "%s", name);
    r = fs->ops->unlink(fs, name, err); /* it must not come back: the parent may change next */
    return r < 0 ? r : fs->ops->sync_dir(fs, name, err);
}

int dr_fingerprint_set_aside(struct dr_fs *fs, const char *path, char **text, struct dr_error *err)
{
    char buf[MAX_BYTES + 1];
    CLEANUP_FREE char *place = NULL;
    *text = NULL;
    if (dr_name_is_remote(path))
        return 0;
    int r = find_place(fs, path, &place, err);
    if (r == 0 && read_record(fs, place, buf, NULL) > 0 && !(*text = strdup(buf)))
        r = dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r == 0)
        r = dr_fingerprint_remove(fs, path, err);
    if (r < 0)
        free(DR_STEAL(*text));
    return r;
}

void dr_fingerprint_put_back(struct dr_fs *fs, const char *path, const char *text)
{
    CLEANUP_FREE char *place = NULL;
    struct dr_file *image = NULL;
    if (text && find_place(fs, path, &place, NULL) == 0 &&
        dr_file_open(fs, path, DR_FILE_NO_LOCK | DR_FILE_FORCE_SHARE, &image, NULL) == 0)
        write_record(fs, place, text, image, NULL);
    dr_file_unref(image);
}

/* ------------------------------------------------------------------ hashes
 *
 * The sampled hash is one of blocks of 64 KiB of what the parent shows, at most 19, or 32 where it
 * has less than 16 MiB: 16 or more are spread over it, one is at 1 MiB, because every mount of a
 * file system there changes its first blocks, and one is the last. The full one is of all. */

/* Where the block behind the one at off is, which does not end the disk. step: between blocks. */
static uint64_t next_block(uint64_t off, uint64_t step, uint64_t last)
{
    uint64_t next = (off / step + 1) * step;
    if (off < FIRST && step > SAMPLE)
        next = dr_min(next, FIRST);
    return step > SAMPLE ? dr_min(next, last) : off + SAMPLE;
}

static int hash_blocks(struct dr_chain *chain, size_t first, uint64_t step, bool (*stopped)(void *),
                       void *user, char text[DR_FINGERPRINT_HEX], struct dr_error *err)
{
    uint64_t size = chain->images[first]->size;
    uint64_t last = size > SAMPLE ? size - SAMPLE : 0, n = 0;
    CLEANUP_FREE uint8_t *buf = malloc(SAMPLE);
    XXH3_state_t *state = XXH3_createState();
    int r = buf && state ? 0
                         : dr_fail(err, ENOMEM, "%s: out of memory", chain->images[first]->path);
    if (r == 0)
        XXH3_128bits_reset(state);
    for (uint64_t off = 0; r == 0 && off < size; off = next_block(off, step, last)) {
        n = dr_min(SAMPLE, size - off);
        if (stopped && stopped(user))
            r = dr_fail(err, ECANCELED, "stopped on request");
        if (r == 0)
            r = dr_chain_read(chain, first, buf, off, (size_t)n, err);
        if (r == 0)
            XXH3_128bits_update(state, buf, (size_t)n);
        if (off + n == size)
            break;
    }
    if (r == 0) {
        XXH128_hash_t hash = XXH3_128bits_digest(state);
        snprintf(text, DR_FINGERPRINT_HEX, "%016" PRIx64 "%016" PRIx64, (uint64_t)hash.high64,
                 (uint64_t)hash.low64);
    }
    XXH3_freeState(state);
    return r;
}

int dr_fingerprint_sample(struct dr_chain *chain, size_t first, char text[DR_FINGERPRINT_HEX],
                          struct dr_error *err)
{
    uint64_t step = dr_round_down(chain->images[first]->size / SAMPLES, SAMPLE);
    return hash_blocks(chain, first, dr_max(step, SAMPLE), NULL, NULL, text, err);
}

int dr_fingerprint_full(struct dr_chain *chain, size_t first, bool (*stopped)(void *user),
                        void *user, char text[DR_FINGERPRINT_HEX], struct dr_error *err)
{
    return hash_blocks(chain, first, SAMPLE, stopped, user, text, err);
}

/* ------------------------------------------------------------------ comparing */

int dr_fingerprint_compare(const struct dr_image *image, const struct dr_fingerprint *print,
                           const struct dr_image *parent, struct dr_error *err)
{
    if (strcmp(print->format, parent->fmt->name) != 0)
        return dr_fail(err, ESTALE,
                       "%s: its parent was a %s image when that was recorded, and %s is %s",
                       image->path, print->format, parent->path, parent->fmt->name);
    if (print->size != parent->size)
        return dr_fail(err, ESTALE,
                       "%s: its parent had %llu bytes when that was recorded, and %s has %llu: it "
                       "was changed since, or is another one",
                       image->path, ULL(print->size), parent->path, ULL(parent->size));
    /* A child that records the id of its parent itself is asked for that (check_backing). */
    if (print->has_id && parent->fmt->id && parent->fmt->id(parent) != print->id &&
        !image->fmt->parent_id)
        return dr_fail(err, ESTALE,
                       "%s: its parent had the content id %08x when that was recorded, and %s has "
                       "%08x: it was written to since, or is another one",
                       image->path, print->id, parent->path, parent->fmt->id(parent));
    return 0;
}

int dr_fingerprint_refuse(const struct dr_image *image, const struct dr_image *parent,
                          const char *how, struct dr_error *err)
{
    return dr_fail(err, ESTALE,
                   "%s: %s does not hold what its parent held when that was recorded (%s): it was "
                   "written to since, or is another disk of the same size",
                   image->path, parent->path, how);
}

int dr_fingerprint_compare_sample(const struct dr_image *image, const struct dr_fingerprint *print,
                                  struct dr_chain *chain, size_t first, struct dr_error *err)
{
    char now[DR_FINGERPRINT_HEX] = "";
    int r = dr_fingerprint_sample(chain, first, now, err);
    return r == 0 && strcmp(now, print->sampled) != 0
               ? dr_fingerprint_refuse(image, chain->images[first], "some blocks were compared",
                                       err)
               : r;
}

/* What a refusal when a disk is opened says besides. */
static int with_way_out(const struct dr_image *image, const struct dr_error *why,
                        struct dr_error *err)
{
    return dr_fail(
        err, why->errnum,
        "%s. Put the right file back; or, if you know that this one is right, record it "
        "anew: drover chain fingerprint %s. To open it once all the same: --fingerprints "
        "off",
        why->text, image->path);
}

int dr_fingerprint_check(const struct dr_image *image, const struct dr_image *parent,
                         struct dr_error *err)
{
    struct dr_fingerprint print;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_fingerprint_load(image, &print, err);
    if (r <= 0)
        return r;
    r = dr_fingerprint_compare(image, &print, parent, &why);
    return r < 0 ? with_way_out(image, &why, err) : 1;
}

int dr_fingerprint_check_sample(struct dr_chain *chain, size_t child, struct dr_error *err)
{
    const struct dr_image *image = chain->images[child];
    struct dr_fingerprint print;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_fingerprint_load(image, &print, err);
    if (r <= 0)
        return r;
    r = dr_fingerprint_compare_sample(image, &print, chain, child + 1, &why);
    if (r == -ESTALE)
        return with_way_out(image, &why, err);
    return r == -ENOMEM ? dr_fail(err, ENOMEM, "%s", why.text) : 0;
}
