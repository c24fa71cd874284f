/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Proof that a backup holds what its disk held: its bytes are read, summed, and compared with the
 * digest in the set. */
#include "base/cleanup.h"
#include "ops/backup-copy.h"
#include "ops/backup-set.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ the sums of a disk */

static int instant_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    (void)fresh;
    return dr_frozen_now(user, present, err);
}

/* Other threads may use the disk: they are the sums of one instant. */
static int sum_frozen(struct dr_sums *sums, struct dr_disk *disk, struct dr_job *job,
                      struct dr_error *err)
{
    struct dr_frozen f = {.disk = disk, .size = sums->size, .sums = sums};
    uint64_t pause = 0;
    int r = dr_frozen_begin(&f, err);
    if (r == 0)
        r = dr_disk_exchange(disk, instant_step, &f, &pause, err);
    dr_job_held(job, pause);
    if (r == 0)
        r = dr_frozen_copy(&f, 0, 0, job, err);
    int broken = dr_frozen_finish(&f, r < 0 ? NULL : err);
    dr_frozen_end(&f);
    return r < 0 ? r : broken;
}

int dr_sums_of_disk(struct dr_sums *sums, struct dr_disk *disk, struct dr_job *job,
                    struct dr_error *err)
{
    *sums = (struct dr_sums){0};
    int r = dr_disk_claim(disk, "verify", err);
    if (r < 0)
        return r;
    r = dr_sums_begin(sums, dr_size(disk), err);
    if (r == 0)
        r = sum_frozen(sums, disk, job, err);
    dr_disk_unclaim(disk);
    if (r < 0)
        dr_sums_end(sums);
    return r;
}

int dr_disk_digest(struct dr_disk *disk, struct dr_job *job, char *text, struct dr_error *err)
{
    struct dr_sums sums;
    DR_REQUIRE(disk, err);
    DR_REQUIRE(text, err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    r = dr_job_end(job, dr_sums_of_disk(&sums, disk, job, err));
    if (r == 0) {
        dr_sums_digest(&sums, text);
        dr_sums_end(&sums);
    }
    return r;
}

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
            r = differs(e, what, dr_sums_differ(&want, have), err);
    }
    dr_sums_end(&want);
    if (err && err->errnum)
        return r;
    dr_sums_digest(have, digest);
    return dr_fail(err, EBADMSG, "%s: its digest is %s, and that of backup \"%s\" was %s", what,
                   digest, e->name, e->digest);
}

static int verify(struct dr_fs *fs, const struct dr_backup_entry *e, const char *path,
                  struct dr_disk *disk, struct dr_job *job, struct dr_error *err)
{
    struct dr_sums have;
    char digest[DR_DIGEST_TEXT];
    int r = dr_sums_of_disk(&have, disk, job, err);
    if (r < 0)
        return r;
    dr_sums_digest(&have, digest);
    if (have.size != e->size || strcmp(digest, e->digest) != 0)
        r = tell_difference(fs, e, path, &have, dr_image_path(disk, 0), err);
    dr_sums_end(&have);
    return r;
}

static int verify_entry(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e,
                        const struct dr_open_options *options, struct dr_disk *against,
                        struct dr_job *job, struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_set_path(set, e);
    CLEANUP_DISK struct dr_disk *backup = NULL;
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    if (!path)
        return dr_fail(err, ENOMEM, "%s: out of memory", set);
    open.format = e->format;
    int r = 0;
    if (!against) {
        r = dr_gate_check(fs, set, path, &open, err);
        if (r == 0)
            r = dr_open_fs(fs, path, &open, &backup, err);
    }
    return r < 0 ? r : verify(fs, e, path, against ? against : backup, job, err);
}

int dr_backup_verify_fs(struct dr_fs *fs, const char *set, const char *name,
                        const struct dr_open_options *open, struct dr_disk *against,
                        struct dr_job *job, struct dr_error *err)
{
    struct dr_backup_set s;
    int r = dr_set_load(&s, fs, set, err);
    if (r < 0)
        return r;
    const struct dr_backup_entry *e = dr_set_find(&s, name);
    r = e ? verify_entry(fs, set, e, open, against, job, err)
          : dr_fail(err, ENOENT, "%s: has no backup called \"%s\"", set, name);
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
