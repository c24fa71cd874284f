/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Making an archive: what is refused, the header, where it goes, and when it gets its name.
 *
 * To a file, in this order: archive and checksums complete and durable under temporary names; the
 * checksums of what had the name before removed; the archive gets its name; its checksums get
 * theirs. Whenever that stops, an archive has its own checksums or none. */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <uuid/uuid.h>
#include <xxhash.h>

#include "archive/leftovers.h"
#include "archive/vma-extents.h"
#include "archive/vma-instant.h"
#include "archive/vma-listed.h"
#include "archive/vma-write.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/publish.h"
#include "ops/ops-internal.h"

#define PVE_HEADER_MAX 524288u
#define FIFO_WAIT_NS   (20 * 1000 * 1000)

struct writer {
    struct dr_fs *fs;
    const char *path;
    const struct dr_vma_create_options *options;
    struct dr_job *job;

    struct dr_vma_header header;
    struct dr_vma_disk disks[VMA_MAX_DISKS];
    uint8_t *head;
    struct vma_member members[VMA_MAX_DISKS]; /* streams first */
    size_t n_taken;                           /* members whose chain we hold a reference to */
    size_t n_claimed;                         /* disks; at_instant */
    struct dr_vma_disk_result *instants;      /* of the disks, NULL without at_instant */

    bool to_file;        /* a new file that gets its name at the end */
    char *real;          /* path, where links lead to what is replaced */
    struct dr_file *old; /* what is replaced, NULL = nothing; locked */
    char *sums_path;     /* where the checksums will be, NULL = none wanted */
    bool sums_give_way;  /* they were there, and may be replaced */
    struct dr_temp sums_file;
    char *stale_sums[2]; /* where those of the archive before us are: beside it, beside path */
    struct vma_sums *sums;
    struct vma_frames *frames;
    struct vma_output out;
    struct vma_listed listed; /* with a set */
};

static int no_memory(const struct writer *w, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
}

/* ------------------------------------------------------------------ the header */

static int check_source(const struct dr_vma_create_disk *d, struct dr_error *err)
{
    char shown[VMA_SHOWN];
    if (!d->name)
        return dr_fail(err, EINVAL, "a disk without a name");
    vma_show(d->name, shown, sizeof(shown));
    if (!d->vmstate && !d->disk)
        return dr_fail(err, EINVAL, "disk '%s': no image is given", shown);
    if (!d->vmstate && dr_size(d->disk) > VMA_MAX_SIZE)
        return dr_fail(err, EFBIG, "disk '%s': %" PRIu64 " bytes, a VMA archive can hold %llu",
                       shown, dr_size(d->disk), VMA_MAX_SIZE);
    return 0;
}

static int list_disks(struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    if (o->n_disks == 0 && o->n_configs == 0)
        return dr_fail(err, EINVAL,
                       "%s: an archive without disks and configuration files would "
                       "not be readable by other programs",
                       w->path);
    if (o->n_disks > VMA_MAX_DISKS)
        return dr_fail(err, EINVAL, "%s: %zu disks, a VMA archive can hold %u", w->path, o->n_disks,
                       VMA_MAX_DISKS);
    int r = 0;
    for (size_t i = 0; i < o->n_disks && r == 0; i++) {
        const struct dr_vma_create_disk *d = &o->disks[i];
        r = check_source(d, err);
        if (r == 0)
            w->disks[i] = (struct dr_vma_disk){
                .id = (unsigned)i + 1,
                .name = d->name,
                .size = d->vmstate ? d->state_size : dr_round_up(dr_size(d->disk), 512),
                .vmstate = d->vmstate};
    }
    return r;
}

/* RFC 9562: version 4 is random, version 8 is whatever its maker takes it from. */
static void stamp_uuid(uint8_t uuid[16], unsigned version)
{
    uuid[6] = (uint8_t)((uuid[6] & 0x0f) | version << 4);
    uuid[8] = (uint8_t)((uuid[8] & 0x3f) | 0x80);
}

static int build(struct writer *w, struct dr_error *err)
{
    uint32_t size;
    free(DR_STEAL(w->head));
    return vma_header_build(&w->header, &w->head, &size, err);
}

/* Reproducible: from all of the header, which is then built a second time. */
static int uuid_from_header(struct writer *w, struct dr_error *err)
{
    int r = build(w, err);
    if (r < 0)
        return r;
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(w->head, w->header.header_size));
    memcpy(w->header.uuid, canonical.digest, 16);
    stamp_uuid(w->header.uuid, 8);
    return 0;
}

static int make_header(struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    w->header =
        (struct dr_vma_header){.disks = w->disks,
                               .n_disks = o->n_disks,
                               .configs = (struct dr_vma_config *)o->configs, /* not written to */
                               .n_configs = o->n_configs,
                               .ctime = o->has_ctime      ? o->ctime
                                        : o->reproducible ? 0
                                                          : (int64_t)time(NULL)};
    int r = list_disks(w, err);
    if (r == 0 && o->has_uuid)
        memcpy(w->header.uuid, o->uuid, 16);
    else if (r == 0 && o->reproducible)
        r = uuid_from_header(w, err);
    else
        uuid_generate_random(w->header.uuid);
    if (r == 0)
        r = build(w, err);
    if (r == 0 && w->header.header_size > PVE_HEADER_MAX)
        dr_job_message(w->job,
                       "%s: the header has %" PRIu32 " bytes; Proxmox VE itself writes at most %u, "
                       "but reads it",
                       w->path, w->header.header_size, PVE_HEADER_MAX);
    return r;
}

/* ------------------------------------------------------------------ what is written */

/* References, not passes: requests to the disks, and swaps of their chains, do not wait for the
 * archive. */
static void take_chains(struct writer *w)
{
    const struct dr_vma_create_options *o = w->options;
    size_t at = 0;
    for (int streams = 1; streams >= 0; streams--)
        for (size_t i = 0; i < o->n_disks; i++)
            if (o->disks[i].vmstate == (streams == 1))
                w->members[at++] =
                    (struct vma_member){.disk = &w->disks[i],
                                        .chain = streams ? NULL : dr_disk_chain(o->disks[i].disk),
                                        .fd = o->disks[i].state_fd};
    w->n_taken = o->n_disks;
}

static void drop_chains(struct writer *w)
{
    for (size_t i = 0; i < w->n_taken; i++)
        dr_chain_unref(w->members[i].chain, NULL);
}

static int write_header(struct writer *w, struct dr_error *err)
{
    size_t len = w->header.header_size;
    if (!w->frames)
        return vma_output_write(&w->out, w->head, len, err);
    CLEANUP_FREE uint8_t *coded = malloc(vma_frames_bound(len));
    size_t coded_len;
    if (!coded)
        return no_memory(w, err);
    int r = vma_frames_compress(w->frames, w->head, len, coded, &coded_len, err);
    if (r == 0)
        r = vma_frames_add(w->frames, coded_len, len, err);
    return r < 0 ? r : vma_output_write(&w->out, coded, coded_len, err);
}

static int write_table(struct writer *w, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *table = NULL;
    size_t len;
    int r = vma_frames_table(w->frames, &table, &len, err);
    return r < 0 ? r : vma_output_write(&w->out, table, len, err);
}

static int begin_digests(struct writer *w, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && w->options->checksum && i < w->n_taken; i++)
        if (w->members[i].chain)
            r = dr_sums_begin(&w->members[i].digest, w->members[i].disk->size, err);
    return r;
}

static int write_as_read(struct writer *w, struct dr_error *err)
{
    int r = begin_digests(w, err);
    if (r < 0)
        return r;
    struct vma_extents x = {.members = w->members,
                            .n = w->options->n_disks,
                            .uuid = w->header.uuid,
                            .out = &w->out,
                            .frames = w->frames,
                            .sums = w->sums,
                            .job = w->job,
                            .zeros = w->options->zero_so_far};
    return vma_extents_run(&x, err);
}

static int write_instant(struct writer *w, struct dr_error *err)
{
    const struct vma_instant x = {.options = w->options,
                                  .header = &w->header,
                                  .out = &w->out,
                                  .frames = w->frames,
                                  .sums = w->sums,
                                  .job = w->job,
                                  .fs = w->fs,
                                  .results = w->instants};
    return vma_instant_run(&x, err);
}

/* All of the archive into the output, durable if it has to be; and its checksums. */
static int write_archive(struct writer *w, struct dr_error *err)
{
    int r = write_header(w, err);
    if (r == 0)
        r = w->instants ? write_instant(w, err) : write_as_read(w, err);
    if (r == 0 && w->frames)
        r = write_table(w, err);
    if (r == 0 && !w->options->no_sync)
        r = vma_output_sync(&w->out, err);
    return r == 0 && w->sums ? vma_sums_finish(w->sums, err) : r;
}

/* ------------------------------------------------------------------ checksums */

static char *with_suffix(const char *path, const char *suffix)
{
    char *out = NULL;
    return asprintf(&out, "%s%s", path, suffix) < 0 ? NULL : out;
}

/* A link keeps leading to the archive, whose checksums stand beside it and not beside the link. */
static int find_real(struct writer *w, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL, *dir = dr_path_dirname(w->path), *real_dir = NULL, *here = NULL;
    bool there = dr_fs_exists(w->fs, w->path);
    if (!dir)
        return no_memory(w, err);
    int r = there ? w->fs->ops->realpath(w->fs, w->path, &real, err) : 0;
    if (r == 0 && there)
        r = dr_real_dir(w->fs, dir, &real_dir, err);
    if (r < 0)
        return r;
    here = there ? dr_path_join(real_dir, dr_path_basename(w->path)) : NULL;
    if (there && !here)
        return no_memory(w, err);
    w->real = there && strcmp(real, here) != 0 ? DR_STEAL(real) : strdup(w->path);
    return w->real ? 0 : no_memory(w, err);
}

static int plan_stale(struct writer *w, struct dr_error *err)
{
    int r = find_real(w, err);
    if (r < 0)
        return r;
    w->stale_sums[0] = with_suffix(w->real, ".sums");
    w->stale_sums[1] = with_suffix(w->path, ".sums");
    return w->stale_sums[0] && w->stale_sums[1] ? 0 : no_memory(w, err);
}

/* Find out where checksums go, and whether a file that is there may give way. */
static int plan_sums(struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    int r = w->to_file ? plan_stale(w, err) : 0;
    if (r < 0 || o->no_sums || (!w->to_file && !o->sums))
        return r;
    w->sums_path = strdup(o->sums ? o->sums : w->stale_sums[0]);
    if (!w->sums_path)
        return no_memory(w, err);
    if (w->to_file && strcmp(w->sums_path, w->path) == 0)
        return dr_fail(err, EINVAL, "%s: archive and checksums cannot be one file", w->path);
    if (!dr_fs_exists(w->fs, w->sums_path))
        return 0;
    if (!vma_sums_is(w->fs, w->sums_path))
        return dr_fail(err, EEXIST, "%s: exists and holds no checksums", w->sums_path);
    if (o->sums && !o->replace)
        return dr_fail(err, EEXIST, "%s: exists already", w->sums_path);
    w->sums_give_way = true;
    return 0;
}

static int begin_sums(struct writer *w, struct dr_error *err)
{
    if (!w->sums_path)
        return 0;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_temp_create(&w->sums_file, w->fs, w->sums_path, NULL, w->old, &why);
    if (r == 0 && w->options->no_sync)
        w->sums_file.file->flags |= DR_FILE_NO_FLUSH;
    if (r == 0)
        r = vma_sums_create(w->sums_file.file, &w->header, &w->sums, &why);
    return r < 0 ? dr_fail(err, -r, "%s: cannot be made: %s", w->sums_path, why.text) : 0;
}

static int sync_dir(const struct writer *w, const char *path, struct dr_error *err)
{
    return w->options->no_sync ? 0 : w->fs->ops->sync_dir(w->fs, path, err);
}

static int drop_stale(struct writer *w, const char *path, struct dr_error *err)
{
    if (!path || !vma_sums_is(w->fs, path))
        return 0;
    int r = w->fs->ops->unlink(w->fs, path, err);
    return r < 0 ? r : sync_dir(w, path, err);
}

/* The archive has its name. What had that of the checksums is removed: a file that is there now is
 * somebody else's, or the archive itself, by another path. */
static int publish_sums(struct writer *w, struct dr_error *err)
{
    int r = w->sums ? dr_temp_publish(&w->sums_file, err) : 0;
    return r < 0 ? dr_prefix(err, r, "%s: is complete, but its checksums are not in place", w->path)
                 : 0;
}

static void end_sums(struct writer *w)
{
    vma_sums_close(DR_STEAL(w->sums));
    dr_temp_end(&w->sums_file);
    free(w->sums_path);
    free(w->stale_sums[0]);
    free(w->stale_sums[1]);
    free(w->real);
}

/* ------------------------------------------------------------------ to a file */

/* Refuse when somebody else has taken the archive's name meanwhile: the checksums beside it are
 * theirs and must not be replaced. */
static int check_name(const struct writer *w, struct dr_error *err)
{
    struct dr_file_id id;
    bool there = w->fs->ops->identify(w->fs, w->real, &id, NULL) == 0;
    if (w->old ? there && dr_same_id(id, w->old->id) : !there)
        return 0;
    return dr_fail(err, w->old ? ESTALE : EEXIST, "%s: was %s by somebody else meanwhile", w->path,
                   w->old ? "replaced" : "made");
}

/* Archive and checksums under their temporary names, durable; and the old checksums are gone. */
static int write_file(struct writer *w, struct dr_file *file, struct dr_error *err)
{
    if (w->options->no_sync)
        file->flags |= DR_FILE_NO_FLUSH;
    vma_output_to_file(&w->out, file, w->path, w->job);
    int r = begin_sums(w, err);
    if (r == 0)
        r = write_archive(w, err);
    if (r == 0 && w->instants)
        r = dr_job_before_switch(w->job, err);
    if (r == 0)
        r = check_name(w, err);
    for (unsigned i = 0; i < 2 && r == 0; i++)
        r = drop_stale(w, w->stale_sums[i], err);
    return r == 0 && w->sums_give_way ? drop_stale(w, w->sums_path, err) : r;
}

/* Remove what still has the name that we gave it; somebody else's file stays. */
static void remove_ours(struct writer *w, const char *path, const struct dr_temp *temp)
{
    struct dr_file_id id;
    if (!temp->file || temp->temp || w->fs->ops->identify(w->fs, path, &id, NULL) < 0 ||
        !dr_same_id(id, temp->file->id))
        return;
    w->fs->ops->unlink(w->fs, path, NULL);
    w->fs->ops->sync_dir(w->fs, path, NULL); /* before the set forgets it */
}

/* There is to be no archive that its set does not list. The checksums may not have their name yet:
 * what has it then belongs to somebody else. */
static void take_back(struct writer *w, const struct dr_temp *archive)
{
    if (w->sums)
        remove_ours(w, w->sums_path, &w->sums_file);
    remove_ours(w, w->path, archive);
}

/* The archive stays locked until its checksums have their name: nobody else may replace it. */
static int replace(struct writer *w, struct dr_error *err)
{
    struct dr_temp archive;
    int r = dr_temp_create(&archive, w->fs, w->path, w->old, w->old, err);
    if (r < 0)
        return r;
    r = write_file(w, archive.file, err);
    if (r == 0 && w->options->set)
        r = vma_listed_announce(&w->listed, w->fs, w->path, archive.temp, w->options, w->instants,
                                err);
    if (r == 0)
        r = dr_temp_publish(&archive, err);
    if (r == 0)
        r = publish_sums(w, err);
    if (r == 0)
        r = vma_listed_confirm(&w->listed, err);
    if (r < 0 && w->listed.announced && !archive.temp && !w->listed.naming.confirmed)
        take_back(w, &archive);
    vma_listed_end(&w->listed);
    dr_temp_end(&archive);
    return r;
}

static int create_file(struct writer *w, struct dr_error *err)
{
    CLEANUP_FILE struct dr_file *old = NULL;
    if (dr_fs_exists(w->fs, w->path)) {
        if (!w->options->replace)
            return dr_fail(err, EEXIST, "%s: exists already", w->path);
        int r = dr_file_open(w->fs, w->path, DR_FILE_RDWR, &old, err);
        if (r < 0)
            return r;
    }
    struct stat st; /* found out before all the writing */
    if (!old && w->fs == dr_fs_posix() && lstat(w->path, &st) == 0)
        return dr_fail(err, EEXIST, "%s: is a link that leads to nothing", w->path);
    w->old = old;
    vma_drop_leftovers(w->fs, w->real);
    if (w->sums_path)
        vma_drop_leftovers(w->fs, w->sums_path);
    int r = replace(w, err);
    w->old = NULL;
    return r;
}

/* ------------------------------------------------------------------ to anything else */

/* Erase the rest of the device: old bytes behind the archive would be taken for damage. */
static int zero_rest(struct writer *w, struct dr_error *err)
{
    uint64_t end = w->out.pos, size = w->out.file ? dr_file_size(w->out.file) : 0;
    if (end >= size)
        return 0;
    int r = dr_file_zero(w->out.file, end, size - end, DR_FILE_ZERO_PUNCH, err);
    return r == 0 && !w->options->no_sync ? dr_file_flush(w->out.file, err) : r;
}

/* Written to as it is; its checksums, if asked for, get their name at the end. */
static int write_through(struct writer *w, struct dr_error *err)
{
    int r = begin_sums(w, err);
    if (r == 0)
        r = write_archive(w, err);
    if (r == 0)
        r = zero_rest(w, err);
    if (r == 0 && w->sums_give_way)
        r = drop_stale(w, w->sums_path, err);
    if (r == 0)
        r = publish_sums(w, err);
    return r;
}

/* The reader of a pipe sees its end, but not why: it must not come behind a whole extent, which may
 * have been the last one. The beginning of another one, or of a zstd frame, is what no archive ends
 * with. */
static void spoil(struct writer *w)
{
    static const uint8_t extent[] = {'V', 'M', 'A', 'E'}, frame[] = {0x28, 0xb5, 0x2f, 0xfd};
    vma_output_write(&w->out, w->frames ? frame : extent, 4, NULL);
}

static int create_on_fd(struct writer *w, int fd, struct dr_error *err)
{
    vma_output_to_fd(&w->out, fd, w->path, w->job);
    int r = write_through(w, err);
    if (r < 0 && r != -EPIPE)
        spoil(w);
    vma_output_close(&w->out);
    return r;
}

static int create_on_device(struct writer *w, struct dr_error *err)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    if (!w->options->replace)
        return dr_fail(err, EEXIST, "%s: is a block device, and what it holds is not written over",
                       w->path);
    int r = dr_file_open(w->fs, w->path, DR_FILE_RDWR, &file, err);
    if (r < 0)
        return r;
    vma_output_to_file(&w->out, file, w->path, w->job);
    return write_through(w, err);
}

/* A pipe without a reader yet: wait for one, as everybody does, but in a way that can be stopped.
 */
static int open_special(const struct writer *w, bool fifo, struct dr_error *err)
{
    for (;;) {
        int fd = open(w->path, O_WRONLY | O_CLOEXEC | O_NOCTTY | (fifo ? O_NONBLOCK : 0));
        if (fd >= 0)
            return fd;
        if (dr_job_stopped(w->job))
            return dr_fail(err, ECANCELED, "stopped on request");
        if (errno != EINTR && !(fifo && errno == ENXIO))
            return dr_fail_errno(err, errno, "Could not open '%s'", w->path);
        struct timespec ts = {0, FIFO_WAIT_NS};
        nanosleep(&ts, NULL);
    }
}

static int create_special(struct writer *w, bool fifo, struct dr_error *err)
{
    CLEANUP_CLOSE int fd = open_special(w, fifo, err);
    return fd < 0 ? fd : create_on_fd(w, fd, err);
}

/* ------------------------------------------------------------------ the call */

enum place { PLACE_FILE, PLACE_FD, PLACE_DEVICE, PLACE_FIFO, PLACE_CHAR };

static enum place place_of(const struct writer *w)
{
    struct stat st;
    if (w->options->use_fd)
        return PLACE_FD;
    if (w->fs != dr_fs_posix() || stat(w->path, &st) < 0)
        return PLACE_FILE;
    return S_ISBLK(st.st_mode)    ? PLACE_DEVICE
           : S_ISFIFO(st.st_mode) ? PLACE_FIFO
           : S_ISCHR(st.st_mode)  ? PLACE_CHAR
                                  : PLACE_FILE;
}

static int create_at(struct writer *w, enum place place, struct dr_error *err)
{
    switch (place) {
    case PLACE_FD:
        return create_on_fd(w, w->options->fd, err);
    case PLACE_DEVICE:
        return create_on_device(w, err);
    case PLACE_FIFO:
    case PLACE_CHAR:
        return create_special(w, place == PLACE_FIFO, err);
    case PLACE_FILE:
        if (w->fs == dr_fs_posix() && dr_path_is_no_device(w->path))
            return dr_fail(err, ENODEV,
                           "%s: there is no such device, and a file there would not last", w->path);
        break;
    }
    return create_file(w, err);
}

static bool reads_the_place(const struct writer *w, struct dr_disk *disk)
{
    struct dr_chain *chain = dr_disk_chain(disk);
    bool reads = dr_ops_reads(w->fs, chain, w->path);
    dr_chain_unref(chain, NULL);
    return reads;
}

/* With locks it would be found out later; there may be none. */
static int refuse_own_source(const struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    for (size_t i = 0; i < o->n_disks && !o->use_fd; i++)
        if (!o->disks[i].vmstate && reads_the_place(w, o->disks[i].disk))
            return dr_fail(err, EBUSY,
                           "%s: is read from, as disk '%s' or its parent: the archive must be "
                           "another file",
                           w->path, o->disks[i].name);
    return 0;
}

static int check_instant(const struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    if (o->n_disks == 0)
        return dr_fail(err, EINVAL, "%s: a backup without a disk", w->path);
    if (o->reproducible)
        return dr_fail(err, EINVAL,
                       "%s: a backup of disks in use takes clusters as they come, and is not "
                       "reproducible",
                       w->path);
    for (size_t i = 0; i < o->n_disks; i++)
        if (o->disks[i].vmstate)
            return dr_fail(err, EINVAL,
                           "%s: the state of a machine cannot be read at one instant with its "
                           "disks",
                           w->path);
    return 0;
}

/* From now on no disk gets another size. */
static int claim_disks(struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    int r = check_instant(w, err);
    if (r < 0)
        return r;
    w->instants = calloc(o->n_disks, sizeof(*w->instants));
    if (!w->instants)
        return no_memory(w, err);
    while (r == 0 && w->n_claimed < o->n_disks) {
        struct dr_disk *disk = o->disks[w->n_claimed].disk;
        r = disk ? dr_disk_claim(disk, "backup", err) : check_source(&o->disks[w->n_claimed], err);
        w->n_claimed += r == 0;
    }
    return r;
}

static void unclaim_disks(struct writer *w)
{
    while (w->n_claimed > 0)
        dr_disk_unclaim(w->options->disks[--w->n_claimed].disk);
}

static int begin_listed(struct writer *w, struct dr_error *err)
{
    const struct dr_vma_create_options *o = w->options;
    if (!w->to_file || !o->at_instant || o->replace)
        return dr_fail(err, EINVAL,
                       "%s: a set lists backups at one instant into new files, and nothing else",
                       w->path);
    return vma_listed_begin(&w->listed, w->fs, w->path, o, w->job, err);
}

static int create(struct writer *w, struct dr_error *err)
{
    enum place place = place_of(w);
    w->to_file = place == PLACE_FILE;
    int r = w->options->set ? begin_listed(w, err) : 0;
    if (r == 0 && w->options->at_instant)
        r = claim_disks(w, err);
    if (r == 0)
        r = make_header(w, err);
    if (r == 0)
        r = plan_sums(w, err);
    if (r == 0 && w->options->compression == DR_VMA_ZSTD)
        r = vma_frames_new(w->options->level, &w->frames, err);
    if (r == 0)
        r = refuse_own_source(w, err);
    if (r < 0)
        return r;
    take_chains(w);
    r = create_at(w, place, err);
    drop_chains(w);
    return r;
}

static void fill_result(const struct writer *w, struct dr_vma_create_result *result)
{
    *result = (struct dr_vma_create_result){.archive_bytes = w->out.pos};
    for (size_t i = 0; w->instants && i < w->options->n_disks; i++)
        result->disks[i] = w->instants[i];
    for (size_t i = 0; !w->instants && i < w->options->n_disks; i++) {
        const struct vma_member *m = &w->members[i];
        result->disks[m->disk->id - 1].size = m->disk->size;
        result->disks[m->disk->id - 1].zero_bytes = m->zero_bytes;
        if (m->digest.table)
            dr_sums_digest(&m->digest, result->disks[m->disk->id - 1].digest);
    }
}

int dr_vma_create_fs(struct dr_fs *fs, const char *path,
                     const struct dr_vma_create_options *options, struct dr_job *job,
                     struct dr_vma_create_result *result, struct dr_error *err)
{
    struct writer *w = calloc(1, sizeof(*w));
    if (!w)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    w->fs = fs;
    w->path = path;
    w->options = options;
    w->job = job;
    int r = create(w, err);
    unclaim_disks(w);
    if (r == 0 && result)
        fill_result(w, result);
    if (r < 0 && err)
        dr_aside_hide(err->text, DR_ASIDE_FILE, dr_path_basename(w->real ? w->real : path));
    if (r < 0 && err && w->sums_path)
        dr_aside_hide(err->text, DR_ASIDE_FILE, dr_path_basename(w->sums_path));
    end_sums(w);
    for (size_t i = 0; i < w->n_taken; i++)
        dr_sums_end(&w->members[i].digest);
    vma_frames_free(w->frames);
    free(w->instants);
    free(w->head);
    free(w);
    return r;
}

int dr_vma_create(const char *path, const struct dr_vma_create_options *options, struct dr_job *job,
                  struct dr_vma_create_result *result, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE_N(options->disks, options->n_disks, err);
    DR_REQUIRE_N(options->configs, options->n_configs, err);
    if (options->compression != DR_VMA_PLAIN && options->compression != DR_VMA_ZSTD)
        return dr_fail(err, EINVAL, "%s: unknown compression %d", path, (int)options->compression);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job, dr_vma_create_fs(dr_fs_posix(), path, options, job, result, err));
}
