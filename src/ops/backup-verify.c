/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Proof that a backup holds what its disk held: its bytes are read, summed, and compared with the
 * digest in the set, which records what was found. And what can be told of it without that. */
#include "base/cleanup.h"
#include "ops/backup-set.h"
#include "ops/backup-sums.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ compared with the set */

static int differs(const struct dr_backup_entry *e, const char *what, uint64_t off,
                   struct dr_error *err)
{
    return dr_fail(err, EBADMSG,
                   "%s: differs from what backup \"%s\" held, first in the 65536 bytes at %llu",
                   what, e->name, (unsigned long long)off);
}

/* The side file, if it belongs to this backup, knows where the difference is. */
static int tell_difference(struct dr_fs *fs, const struct dr_backup_entry *e, const char *path,
                           const struct dr_sums *have, const char *what, struct dr_error *err)
{
    CLEANUP_FREE char *side = dr_sums_path(path);
    struct dr_sums want = {0};
    char digest[DR_DIGEST_TEXT];
    int r = -EBADMSG;
    if (have->size != e->size)
        return dr_fail(err, EBADMSG, "%s: has %llu bytes, and backup \"%s\" had %llu", what,
                       (unsigned long long)have->size, e->name, (unsigned long long)e->size);
    if (side && dr_sums_load(&want, fs, side, NULL) == 0) {
        dr_sums_digest(&want, digest);
        if (strcmp(digest, e->digest) == 0 && want.size == have->size)
            r = differs(e, what, dr_sums_next(&want, have, 0, false), err);
    }
    dr_sums_end(&want);
    if (err && err->errnum)
        return r;
    dr_sums_digest(have, digest);
    return dr_fail(err, EBADMSG, "%s: its digest is %s, and that of backup \"%s\" was %s", what,
                   digest, e->name, e->digest);
}

int dr_verify_disk(struct dr_fs *fs, const struct dr_backup_entry *e, const char *path,
                   struct dr_disk *disk, struct dr_job *job, struct dr_error *err)
{
    struct dr_sums have;
    char digest[DR_DIGEST_TEXT];
    uint64_t size = dr_size(disk);
    if (dr_sums_fits(e->size, size))
        size = e->size;
    int r = dr_sums_of_part(&have, DR_CHECKSUM_XXH3, disk, size, job, err);
    if (r < 0)
        return r;
    dr_sums_digest(&have, digest);
    if (have.size != e->size || strcmp(digest, e->digest) != 0)
        r = tell_difference(fs, e, path, &have, dr_image_path(disk, 0), err);
    dr_sums_end(&have);
    return r;
}

static int read_entry(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e,
                      const struct dr_open_options *options, struct dr_disk *against,
                      struct dr_job *job, struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_set_path(set, e), *file = dr_set_main_file(fs, set, e);
    CLEANUP_DISK struct dr_disk *backup = NULL;
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    if (!path || !file)
        return dr_fail(err, ENOMEM, "%s: out of memory", set);
    open.format = e->format;
    int r = 0;
    if (!against) {
        r = dr_gate_check(fs, set, file, &open, err);
        if (r == 0)
            r = dr_open_fs(fs, path, &open, &backup, err);
    }
    return r < 0 ? r : dr_verify_disk(fs, e, path, against ? against : backup, job, err);
}

static int verify_entry(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e,
                        const struct dr_open_options *options, struct dr_disk *against,
                        struct dr_job *job, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = read_entry(fs, set, e, options, against, job, &why);
    if (!against && (r == 0 || r == -EBADMSG))
        dr_set_record_verified(fs, set, e, r == 0 ? NULL : why.text, job);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

/* ------------------------------------------------------------------ without reading it */

int dr_backup_look_fs(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e,
                      const struct dr_open_options *options, struct dr_backup_files *files,
                      struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_set_path(set, e), *file = dr_set_main_file(fs, set, e);
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    *files = (struct dr_backup_files){0};
    if (!path || !file)
        return dr_fail(err, ENOMEM, "%s: out of memory", set);
    open.format = e->format;
    open.flags |= DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK | DR_OPEN_NO_BACKING;
    int r = dr_gate_check(fs, set, file, &open, err);
    if (r == 0)
        r = dr_open_fs(fs, path, &open, &disk, err);
    if (r == 0)
        r = dr_ops_disk_size(disk->chain->images[0], &files->stored, err);
    if (r < 0)
        return r;
    files->size = dr_size(disk);
    return dr_sums_fits(e->size, files->size)
               ? 0
               : dr_fail(err, EBADMSG, "%s: has %llu bytes, and had %llu when it was made", path,
                         (unsigned long long)files->size, (unsigned long long)e->size);
}

int dr_backup_look(const char *set, const struct dr_backup_entry *e,
                   const struct dr_open_options *open, struct dr_backup_files *files,
                   struct dr_error *err)
{
    DR_REQUIRE(set, err);
    DR_REQUIRE(e, err);
    DR_REQUIRE(files, err);
    return dr_backup_look_fs(dr_fs_posix(), set, e, open, files, err);
}

/* ------------------------------------------------------------------ by name */

int dr_backup_verify_fs(struct dr_fs *fs, const char *set, const char *name,
                        const struct dr_open_options *open, struct dr_disk *against,
                        struct dr_job *job, struct dr_error *err)
{
    struct dr_backup_set s;
    int r = dr_set_load(&s, fs, set, err);
    if (r < 0)
        return r;
    const struct dr_backup_entry *e = dr_set_find(&s, name);
    if (!e)
        r = dr_fail(err, ENOENT, "%s: has no backup called \"%s\"", set, name);
    else if (e->leaving)
        r = dr_fail(err, ENOENT, "%s: its backup \"%s\" is being pruned", set, name);
    else if (e->naming)
        r = dr_fail(err, ENOENT,
                    "%s: its backup \"%s\" is being made, or was interrupted: the next backup or "
                    "prune with this set settles it",
                    set, name);
    else
        r = verify_entry(fs, set, e, open, against, job, err);
    dr_set_free(&s);
    return r;
}

int dr_backup_verify(const char *set, const char *name, const struct dr_open_options *open,
                     struct dr_disk *against, struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(set, err);
    DR_REQUIRE(name, err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job, dr_backup_verify_fs(dr_fs_posix(), set, name, open, against, job, err));
}
