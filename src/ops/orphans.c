/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What lies in an image's file although nothing leads to it, for those who look for lost data: a
 * file as long as the image's has it at the same places, and holes elsewhere. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "core/publish.h"
#include "ops/ops-internal.h"

#define PIECE (UINT64_C(1) << 20)
#define BLOCK UINT64_C(4096)

struct rescue {
    struct dr_file *from, *to;
    uint8_t *buf; /* PIECE bytes */
    uint64_t found;
    void (*report)(void *user, const char *line);
    void *user;
    const volatile int *stop;
};

/* Write what is not zero, in runs of blocks. */
static int keep(struct rescue *s, uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = 0;
    for (uint64_t i = 0, from; r == 0 && i < len;) {
        while (i < len && dr_is_zero(s->buf + i, (size_t)dr_min(BLOCK, len - i)))
            i += BLOCK;
        for (from = i; i < len && !dr_is_zero(s->buf + i, (size_t)dr_min(BLOCK, len - i));)
            i += BLOCK;
        uint64_t end = dr_min(i, len);
        if (from >= end)
            continue;
        r = dr_file_pwrite(s->to, s->buf + from, off + from, (size_t)(end - from), err);
        s->found += end - from;
    }
    return r;
}

static void tell(struct rescue *s, const char *line)
{
    if (s->report)
        s->report(s->user, line);
}

/* Block by block; what cannot be read is told and becomes zeros. */
static void read_readable(struct rescue *s, uint64_t at, uint64_t len)
{
    for (uint64_t i = 0; i < len; i += BLOCK) {
        struct dr_error why = DR_ERROR_INIT;
        size_t n = (size_t)dr_min(BLOCK, len - i);
        if (dr_file_pread_short(s->from, s->buf + i, at + i, n, NULL, &why) == 0)
            continue;
        memset(s->buf + i, 0, n);
        tell(s, why.text);
    }
}

static int rescue_range(void *user, uint64_t off, uint64_t len, struct dr_error *err)
{
    struct rescue *s = user;
    uint64_t before = s->found, end = off + len, run;
    int r = 0;
    for (uint64_t at = off; r == 0 && at < end; at += run) {
        enum dr_file_extent kind;
        if (s->stop && *s->stop)
            return dr_fail(err, ECANCELED, "stopped on request");
        r = dr_file_extent(s->from, at, end - at, &kind, &run, err);
        if (r < 0 || kind == DR_FILE_HOLE)
            continue;
        run = dr_min(run, PIECE);
        if (dr_file_pread_short(s->from, s->buf, at, (size_t)run, NULL, NULL) < 0)
            read_readable(s, at, run);
        r = keep(s, at, run, err);
    }
    if (r == 0 && s->found > before) {
        char line[200];
        snprintf(line, sizeof(line),
                 "nothing leads to the %" PRIu64 " bytes at byte %" PRIu64 " of the file, %" PRIu64
                 " of which are not zero",
                 len, off, s->found - before);
        tell(s, line);
    }
    return r;
}

static int rescue(struct rescue *s, struct dr_image *image, struct dr_fs *fs, const char *target,
                  struct dr_error *err)
{
    struct dr_temp temp = {0};
    int r = dr_temp_create(&temp, fs, target, NULL, NULL, err);
    if (r < 0)
        return r;
    s->from = image->files[0];
    s->to = temp.file;
    r = dr_file_truncate(s->to, dr_file_size(s->from), err);
    if (r == 0)
        r = image->fmt->orphans(image, rescue_range, s, err);
    if (r == 0)
        r = dr_temp_publish(&temp, err);
    dr_temp_end(&temp);
    return r;
}

int dr_salvage_orphans_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                          const char *target, void (*report)(void *user, const char *line),
                          void *user, const volatile int *stop, uint64_t *found,
                          struct dr_error *err)
{
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    CLEANUP_DISK struct dr_disk *disk = NULL;
    CLEANUP_FREE uint8_t *buf = malloc(PIECE);
    struct rescue s = {.buf = buf, .report = report, .user = user, .stop = stop};
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (dr_fs_exists(fs, target))
        return dr_fail(err, EEXIST, "%s: exists already; name another file, or remove it", target);
    open.flags = (open.flags & ~(unsigned)DR_OPEN_RDWR) | DR_OPEN_NO_BACKING;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    struct dr_image *image = disk->chain->images[0];
    if (!image->fmt->orphans)
        return dr_fail(err, ENOTSUP,
                       "%s: what nothing leads to is found in qcow2 images only, not in %s", path,
                       image->fmt->name);
    r = rescue(&s, image, fs, target, err);
    if (r == 0 && found)
        *found = s.found;
    return r;
}

int dr_salvage_orphans(const char *path, const struct dr_open_options *options, const char *target,
                       void (*report)(void *user, const char *line), void *user,
                       const volatile int *stop, uint64_t *found, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(target, err);
    return dr_salvage_orphans_fs(dr_fs_posix(), path, options, target, report, user, stop, found,
                                 err);
}
