/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* checksum: one number for all that a disk shows, and a table by which two disks are compared
 * without having both. */
#include "drover/checksum.h"

#include "base/cleanup.h"
#include "ops/backup-copy.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ the sums of a disk */

/* Other threads may use the disk: they are the sums of one instant. */
static int sum_frozen(struct dr_sums *sums, struct dr_disk *disk, struct dr_job *job,
                      struct dr_error *err)
{
    struct dr_frozen f = {.disk = disk, .size = sums->size, .sums = sums}, *one = &f;
    int r = dr_frozen_begin(&f, err);
    if (r == 0)
        r = dr_frozen_now_all(&one, 1, job, err);
    if (r == 0)
        r = dr_frozen_copy(&f, 0, 0, job, err);
    int broken = dr_frozen_finish(&f, r < 0 ? NULL : err);
    dr_frozen_end(&f);
    return r < 0 ? r : broken;
}

int dr_sums_of_part(struct dr_sums *sums, enum dr_checksum kind, struct dr_disk *disk,
                    uint64_t size, struct dr_job *job, struct dr_error *err)
{
    *sums = (struct dr_sums){0};
    int r = dr_disk_claim(disk, "verify", err);
    if (r < 0)
        return r;
    r = dr_sums_begin_as(sums, kind, size, err);
    if (r == 0)
        r = sum_frozen(sums, disk, job, err);
    dr_disk_unclaim(disk);
    if (r < 0)
        dr_sums_end(sums);
    return r;
}

int dr_sums_of_disk(struct dr_sums *sums, enum dr_checksum kind, struct dr_disk *disk,
                    struct dr_job *job, struct dr_error *err)
{
    return dr_sums_of_part(sums, kind, disk, dr_size(disk), job, err);
}

bool dr_sums_fits(uint64_t size, uint64_t have)
{
    return have == size || have == dr_round_up(size, 512);
}

int dr_disk_digest(struct dr_disk *disk, struct dr_job *job, char *text, struct dr_error *err)
{
    struct dr_checksum_result result;
    DR_REQUIRE(text, err);
    int r = dr_disk_checksum(disk, NULL, job, &result, err);
    if (r == 0)
        memcpy(text, result.digest, DR_DIGEST_TEXT);
    return r;
}

/* ------------------------------------------------------------------ compared with saved ones */

static void tell_differences(const struct dr_sums *have, const struct dr_sums *want,
                             const struct dr_checksum_options *o, struct dr_checksum_result *result)
{
    result->same = true;
    for (uint64_t off = 0, end; off < have->size; off = end) {
        off = dr_sums_next(have, want, off, false);
        if (off == have->size)
            break;
        end = dr_sums_next(have, want, off, true);
        result->same = false;
        if (o->differs)
            o->differs(o->user, off, end - off);
    }
}

/* The shorter one is taken as one of the longer's size: the rest is zeros. */
static int compare(struct dr_sums *have, struct dr_sums *want, const struct dr_checksum_options *o,
                   struct dr_checksum_result *result, struct dr_error *err)
{
    result->against_size = want->size;
    uint64_t size = dr_max(have->size, want->size);
    int r = dr_sums_resize(have, size, err);
    if (r == 0)
        r = dr_sums_resize(want, size, err);
    if (r == 0)
        tell_differences(have, want, o, result);
    return r;
}

static int save(const struct dr_sums *sums, const struct dr_checksum_options *o,
                struct dr_error *err)
{
    return o->save ? dr_sums_save(sums, dr_fs_posix(), o->save, 0, err) : 0;
}

static int checksum(struct dr_disk *disk, const struct dr_checksum_options *o, struct dr_job *job,
                    struct dr_checksum_result *result, struct dr_error *err)
{
    struct dr_sums have = {0}, want = {0};
    int r = o->against ? dr_sums_load_any(&want, dr_fs_posix(), o->against, err) : 0;
    result->kind = o->against ? want.kind : o->kind;
    if (r == 0)
        r = dr_sums_of_disk(&have, result->kind, disk, job, err);
    result->size = have.size;
    if (r == 0)
        r = dr_sums_digest_any(&have, result->digest, err);
    if (r == 0)
        r = save(&have, o, err);
    if (r == 0 && o->against)
        r = compare(&have, &want, o, result, err);
    dr_sums_end(&have);
    dr_sums_end(&want);
    return r;
}

int dr_disk_checksum(struct dr_disk *disk, const struct dr_checksum_options *options,
                     struct dr_job *job, struct dr_checksum_result *result, struct dr_error *err)
{
    const struct dr_checksum_options none = {0};
    DR_REQUIRE(disk, err);
    DR_REQUIRE(result, err);
    *result = (struct dr_checksum_result){0};
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job, checksum(disk, options ? options : &none, job, result, err));
}

int dr_checksum_is_saved(const char *path, bool *saved, struct dr_error *err)
{
    struct dr_sums sums;
    struct dr_error why = DR_ERROR_INIT;
    DR_REQUIRE(path, err);
    DR_REQUIRE(saved, err);
    int r = dr_sums_is(dr_fs_posix(), path, saved, &why);
    if (r == 0 && *saved) {
        r = dr_sums_load_any(&sums, dr_fs_posix(), path, &why);
        dr_sums_end(&sums);
    }
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}
