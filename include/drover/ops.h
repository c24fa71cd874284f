/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: what can be done with whole disks. Each operation takes a struct of options that may be
 * all zero but for what is required, and NULL where nothing is; job may be NULL. All of them are
 * crash-safe: killed or cut off anywhere, the disks involved open and read as before or as after,
 * and doing it again finishes the job. A refusal comes before anything is changed.
 *
 * Operations by path open what they need and close it again. Those named dr_disk_... work on a disk
 * that is open, and other threads may use it meanwhile; one of them at a time may change the disk's
 * images, the others get -EBUSY. Different operations may run in different threads; a struct of
 * options must not change while an operation has it.
 */
#ifndef DROVER_OPS_H
#define DROVER_OPS_H

#include "drover/drover.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------ jobs
 *
 * A job stands for one long operation. Make it, hand it to the operation, and free it when the
 * operation has returned. Meanwhile every thread may ask how far it is, change its rate, pause it,
 * let it go on or cancel it; changes hold at once. */

struct dr_job;

/* What a disk is about to go on with. */
struct dr_switch {
    struct dr_disk *disk;
    const char *path, *format; /* of its active image from then on */
};

/* What a job is to do about a piece that could not be read or written. */
enum dr_error_action {
    DR_ERROR_REPORT, /* the operation fails */
    DR_ERROR_IGNORE, /* go on with other pieces, and try this one again after a second; a rebase or
                        stream leaves it out, goes on to the end, and fails then */
    DR_ERROR_STOP,   /* wait until the job is not paused, and try it again */
};

struct dr_job_options {
    /* Called by the operation's threads, but one at a time, at most about 20 times a second and
     * once at the end. done and total are bytes of work; total may grow. Non-zero cancels the job,
     * also from the last call. NULL = nobody asks. */
    int (*progress)(void *user, uint64_t done, uint64_t total);
    /* Warnings and decisions that are no failures. Called from any thread, also from several at
     * once. NULL = drop them. */
    void (*message)(void *user, const char *text);
    /* Called once by an operation on an open disk when its copying is done and only the switch of
     * the disk's images is left, with the guest's requests going on. It may wait as long as it
     * likes. Non-zero: the operation is cancelled, and the disk keeps its images. NULL = go on. */
    int (*before_switch)(void *user);
    /* Called once by an operation that follows the guest (a mirror, a commit with pivot) when both
     * sides are nearly the same. From then on it copies what the guest changes, until
     * dr_job_complete(). NULL = it switches at once. */
    void (*ready)(void *user);
    /* Called when one or several disks are about to go on with another active image, which is
     * durable and has its name: time to note which it is. Their requests may wait meanwhile (they
     * do not for a snapshot), so it must not use the disks. A failure keeps the disks as they are.
     * When a snapshot fails after it was noted it is called again, with the images before. NULL =
     * nobody notes it. */
    int (*record)(void *user, const struct dr_switch *switches, size_t n, struct dr_error *err);
    /* Called when a rebase, stream, commit, mirror or convert could not read or write a piece, with
     * a positive errno and the text that the operation would fail with, and by several threads at
     * once when several pieces fail. Nothing of the piece is lost when it is tried again. Whoever
     * answers STOP calls dr_job_pause() before, or at any time dr_job_resume(): the job waits only
     * while it is paused. Failures outside the copying, and while requests of the disk wait for a
     * switch, are always the end. NULL = REPORT. */
    enum dr_error_action (*error)(void *user, bool reading, int error, const char *text);
    void *user;       /* for all of them */
    uint64_t rate;    /* bytes a second, 0 = as fast as it goes */
    unsigned workers; /* threads; 0 = as many as the processors or the files can use */
    /* An operation on an open disk gives way to requests: it takes them about a third of their
     * speed, and up to four times as long as without them. hurry: it does not. */
    bool hurry;
};

/* The names are QEMU's (JobStatus). */
enum dr_job_state {
    DR_JOB_CREATED,   /* no operation has it yet */
    DR_JOB_RUNNING,   /* also while it comes to rest for a pause */
    DR_JOB_PAUSED,    /* nothing is read or written until dr_job_resume() */
    DR_JOB_CONCLUDED, /* the operation has ended */
};

struct dr_job_status {
    enum dr_job_state state;
    int result;       /* concluded: 0 or the negative errno of the operation */
    bool cancelled;   /* it was told to end */
    bool pausing;     /* it was told to pause */
    uint64_t done;    /* bytes of work */
    uint64_t total;   /* 0 = not known yet */
    uint64_t rate;    /* bytes a second, 0 = as fast as it goes */
    uint64_t held_ns; /* the longest time for which the operation held the requests of an open disk
                         while it switched images */
};

/* id: a letter, then letters, digits, '-', '.' and '_'; NULL = "job-N", unlike every other of that
 * kind in this process. options may be NULL. */
DR_API int dr_job_new(const char *id, const struct dr_job_options *options, struct dr_job **job,
                      struct dr_error *err);
/* The operation has returned, or never began. NULL is allowed. */
DR_API void dr_job_free(struct dr_job *job);
DR_API const char *dr_job_id(const struct dr_job *job);
/* Each value is a present one; they need not be of the same instant. */
DR_API void dr_job_query(const struct dr_job *job, struct dr_job_status *status);
/* "created", "running", "paused", "concluded". */
DR_API const char *dr_job_state_name(enum dr_job_state state);
/* The operation ends soon with -ECANCELED, also while it is paused, unless it has ended by then.
 * Nothing is lost: doing the operation again goes on. The only one of these functions that a signal
 * handler may call. NULL is allowed. */
DR_API void dr_job_cancel(struct dr_job *job);
/* The job finishes the requests that are under way and then rests. */
DR_API void dr_job_pause(struct dr_job *job);
DR_API void dr_job_resume(struct dr_job *job);
/* Bytes a second, 0 = as fast as it goes. */
DR_API void dr_job_set_rate(struct dr_job *job, uint64_t rate);
/* An operation that has called `ready` ends, also if it is told before that: the disk goes on with
 * the other side, or, without `pivot`, with what it has, and the other side is the disk as it was
 * at that moment. The first call counts. */
DR_API void dr_job_complete(struct dr_job *job, bool pivot);

/* One NAME=VALUE of -o. Tables end by count. */
struct dr_pair {
    const char *name, *value;
};

/* ------------------------------------------------------------------ create */

struct dr_create_options {
    const char *format; /* required */
    uint64_t size;      /* 0 with a backing = the backing's */
    bool has_size;
    const struct dr_pair *pairs;
    size_t n_pairs;
    const char *backing;        /* as it is to be recorded: relative to path's directory */
    const char *backing_format; /* -EINVAL without backing */
    bool unsafe;                /* do not open the backing (size is needed then) */
    bool no_replace;            /* -EEXIST instead of taking an existing image's place */
    unsigned flags;             /* enum dr_open_flag that matter: NO_FLUSH, NO_LOCK, ANY_PATH */
    const volatile int *stop;   /* NULL, or set non-zero to cancel: -ECANCELED, nothing is left */
    bool force;                 /* also what other programs are known not to take: a growing VMDK
                                   of more than 2 TiB */
    /* VMDK: files in path's directory that hold the disk already. Only a descriptor for them is
     * made, and they give the size. Of a split disk one of its pieces is enough. */
    const char *const *adopt;
    size_t n_adopt;
};
/* An existing file at path is replaced only when the new image is complete. */
DR_API int dr_create(const char *path, const struct dr_create_options *options,
                     struct dr_error *err);

/* ------------------------------------------------------------------ convert */

/* Checksums of what a disk shows. docs/formats/backup.md says how they are computed; checksum.h has
 * more. */
enum dr_checksum {
    DR_CHECKSUM_XXH3,   /* XXH3-128: fast, against accidents. The digest of backups */
    DR_CHECKSUM_SHA256, /* against somebody who changes the disk on purpose, too */
};

/* Bytes of any digest in hexadecimal, with its end. */
#define DR_CHECKSUM_TEXT 65

enum dr_salvaged_kind {
    DR_SALVAGED_LOST,     /* could not be read: the target has zeros there */
    DR_SALVAGED_DOUBTFUL, /* was read, but may be wrong anywhere: it comes from compressed data that
                             is damaged */
    DR_SALVAGED_END,      /* off: the compressed file could not be unpacked beyond this byte of what
                             is packed in it, and all behind is lost; len 0 */
};

/* A range of a source that a salvage cannot vouch for. */
struct dr_salvaged {
    enum dr_salvaged_kind kind;
    const char *disk;  /* the source's name, or of the image below it that is damaged */
    uint64_t off, len; /* bytes of the disk */
    const char *text;  /* why, or NULL: not known. Both lines live during the call */
};

struct dr_convert_options {
    const struct dr_open_options *source;      /* how to open all sources; NULL = defaults */
    const struct dr_open_options *const *each; /* or each of them; NULL = all as source says */
    const char *out_format;                    /* NULL = raw */
    const struct dr_pair *pairs;
    size_t n_pairs;
    const char *backing; /* -B: the target keeps only what differs from this (must equal the
                            source's view where the source's layers above it say nothing) */
    const char *backing_format;
    bool no_create;       /* -n: the target exists and is written over */
    bool target_is_zero;  /* with no_create: it reads as zeros already */
    uint64_t sparse_size; /* -S: runs of zeros at least this long are not written; 0 = none, write
                             all; default by DR_CONVERT_SPARSE_DEFAULT */
    bool salvage;         /* unreadable source ranges become zeros, with a message */
    bool *lost;           /* NULL, or salvage sets it where there were such ranges */
    /* NULL, or salvage calls it with each such range, besides the message. One call at a time. */
    void (*salvaged)(void *user, const struct dr_salvaged *range);
    void *salvaged_user;
    bool compress;
    bool bitmaps;             /* the target gets the source's bitmaps, too; one source only */
    bool skip_broken_bitmaps; /* but inconsistent ones, which are refused otherwise */
    bool bitmaps_inside;      /* from an image that has its bitmaps inside to one that can have */
    bool offload; /* -C: let the kernel copy (reflink, copy_file_range) what is plain in both files;
                     zeros in it are not looked for then */
    bool force;   /* as in struct dr_create_options */
    bool unsafe_target;    /* -t unsafe: no fsync at the end */
    unsigned target_flags; /* enum dr_open_flag for the target */
    /* NULL, or DR_CHECKSUM_TEXT bytes: the checksum of what the target shows, of this kind. It is
     * computed of what is written where that passes through memory; else the target is read. */
    char *digest;
    enum dr_checksum digest_kind;
    /* Instead of the files: descriptors of pipes, sockets or files that somebody opened. They are
     * read and written from front to back, once, and not closed; sources and target are what
     * messages call them. The target is raw then: all bytes of the disk, holes as zeros. The source
     * is one, and raw or compressed raw (each->format "raw": the bytes as they come); how much
     * comes need not be known, so the target must be of a format that can grow. */
    bool from_fd, to_fd;
    int source_fd, target_fd;
    /* Of one source only the bytes [range_from, range_to), as far as it has them. */
    bool has_range;
    uint64_t range_from, range_to;
};
#define DR_CONVERT_SPARSE_DEFAULT 4096

/* n sources, one after another, make one target disk. */
DR_API int dr_convert(const char *const *sources, size_t n, const char *target,
                      const struct dr_convert_options *options, struct dr_job *job,
                      struct dr_error *err);

/* What lies in the image's file although none of its tables leads there: data that damaged tables
 * have lost, but also what was given up long ago. Makes the file target, which must not exist, as
 * long as the image's file: the bytes stand at the same offsets, the rest is a hole. What cannot be
 * read is a hole, too, and told. report (may be NULL) is called with a line for each range. stop is
 * NULL, or set non-zero to cancel: -ECANCELED. *found (found may be NULL) = the bytes that are not
 * zero. The image is only read; its parents are not opened. -ENOTSUP: not a qcow2. A failure leaves
 * no target. */
DR_API int dr_salvage_orphans(const char *path, const struct dr_open_options *options,
                              const char *target, void (*report)(void *user, const char *line),
                              void *user, const volatile int *stop, uint64_t *found,
                              struct dr_error *err);

/* ------------------------------------------------------------------ measure */

struct dr_measure_options {
    const struct dr_open_options *source; /* how to open the source; NULL = defaults */
    const char *out_format;               /* NULL = raw */
    const struct dr_pair *pairs;          /* settings of the new image, as for dr_convert */
    size_t n_pairs;
    bool
        backing; /* it would have a backing image: how much of the source that holds is not known */
};
struct dr_measure_result {
    uint64_t required;        /* the lengths of its files with the data the source has */
    uint64_t fully_allocated; /* when every byte of it has been written */
    bool has_bitmaps;         /* the source's format and the new one's keep bitmaps */
    uint64_t bitmaps;         /* bytes that copies of the source's bitmaps would take besides */
};
/* Tell how many bytes a new image would take, at most. Nothing is made and no data is read. The
 * image is to hold what `source` holds; source NULL: a disk of `size` bytes. -ENOTSUP: the format
 * does not tell. */
DR_API int dr_measure(const char *source, uint64_t size, const struct dr_measure_options *options,
                      struct dr_measure_result *result, struct dr_error *err);

/* ------------------------------------------------------------------ compare */

struct dr_compare_result {
    bool same;
    bool size_differs; /* the common part may still be the same; the longer one's rest must be zeros
                        */
    uint64_t mismatch_off;  /* first difference, if !same */
    bool strict_allocation; /* strict: they differ only in what is allocated, at mismatch_off */
    unsigned failed; /* after a failure: 1 or 2 = which disk could not be read or opened, else 0 */
};
DR_API int dr_compare(struct dr_disk *a, struct dr_disk *b, bool strict, struct dr_job *job,
                      struct dr_compare_result *result, struct dr_error *err);

/* ------------------------------------------------------------------ rebase, stream, commit */

/* What a rebase would do, in bytes of the disk. Found out by reading what it would read. */
struct dr_rebase_plan {
    uint64_t copied; /* into the overlay, as it allocates them; with snapshots inside, at most */
    uint64_t freed;  /* with drop_equal: of the overlay's own, since they equal the new parent's */
    uint64_t free;   /* in the overlay's file system; UINT64_MAX = not known */
};

struct dr_rebase_options {
    struct dr_open_options open; /* of the overlay; flags RDWR is implied */
    const char *backing;         /* required; "" = none (flatten); as it is to be recorded */
    const char *backing_format;
    bool unsafe;                 /* -u: only rewrite the name */
    bool force;                  /* -u: even if the parent is missing, itself, a loop or no image */
    bool drop_equal;             /* afterwards give up what equals the new parent */
    bool force_share;            /* -U on the new parent */
    bool dry_run;                /* change nothing; with: */
    struct dr_rebase_plan *plan; /* NULL, or what it would do */
    /* Snapshots inside the image keep what they show: it is copied for them, too. With this, and in
     * formats that cannot do that, an image with snapshots inside is refused. */
    bool refuse_snapshots;
    bool compress;     /* what is copied is compressed, for snapshots inside, too */
    const char *image; /* the member of the chain that gets another parent; NULL = the top image */
};
/* On an open disk, which other threads may read and write meanwhile: its requests are held up only
 * for the switch. options->open tells how to open the new parent. A lower image must have no other
 * users: it is written to, though it reads the same all the time. -EBUSY: another operation changes
 * the disk's images. With unsafe the disk reads through the new parent from then on, with force it
 * goes on with the old one until it is opened again. */
DR_API int dr_disk_rebase(struct dr_disk *disk, const struct dr_rebase_options *options,
                          struct dr_job *job, struct dr_error *err);
DR_API int dr_rebase(const char *path, const struct dr_rebase_options *options, struct dr_job *job,
                     struct dr_error *err);

/* Change what create's options have laid down: dr_format_amend_option() lists what a format lets
 * change. Everything is checked before anything changes. Cut off anywhere the image is right and
 * shows what it did; asking again finishes it. */
struct dr_amend_options {
    struct dr_open_options open;
    const struct dr_pair *pairs;
    size_t n_pairs;
    bool shrink; /* a smaller size is meant: what is behind it is lost */
};
/* On an open disk: its requests wait until it is done. */
DR_API int dr_disk_amend(struct dr_disk *disk, const struct dr_amend_options *options,
                         struct dr_job *job, struct dr_error *err);
DR_API int dr_amend(const char *path, const struct dr_amend_options *options, struct dr_job *job,
                    struct dr_error *err);

struct dr_stream_options {
    struct dr_open_options open;
    const char *base;      /* a member of the chain that stays the parent; NULL = none stays */
    bool refuse_snapshots; /* as in struct dr_rebase_options */
    const char *image;     /* the member of the chain that is filled; NULL = the top image */
    bool retire; /* no base; the disk goes on with the top image's plain file, and the rest of that
                    image is removed (dr_retire) */
    bool remove; /* remove the images that leave the chain. One that somebody uses, or that an image
                    beside it has as its parent, stays, which is a failure after all else is done */
};
/* As dr_disk_rebase. Without remove, images that leave the chain keep their files. */
DR_API int dr_disk_stream(struct dr_disk *disk, const struct dr_stream_options *options,
                          struct dr_job *job, struct dr_error *err);
DR_API int dr_stream(const char *path, const struct dr_stream_options *options, struct dr_job *job,
                     struct dr_error *err);

/* An image that keeps its disk in a plain file at the same offsets (add-cow) can go, once it holds
 * every byte: the plain file is the disk then. */
struct dr_retire_options {
    struct dr_open_options open; /* of the image; its parents are not opened */
    bool keep;                   /* rename the metadata to PATH.done instead of removing it */
    bool force;                  /* even if other images in its directory name it as their parent */
};
struct dr_retire_state {
    char *plain;            /* path of the plain file; malloc'ed */
    uint64_t missing;       /* bytes that it does not hold yet */
    uint64_t first_missing; /* with missing: where the first of them is */
};
/* How far is it? Reads only. -ENOTSUP: images of this format keep their disk otherwise; -EBUSY:
 * other images have it as their parent, and no force. */
DR_API int dr_retire_look(const char *path, const struct dr_retire_options *options,
                          struct dr_retire_state *state, struct dr_error *err);
/* Make the plain file durable, then remove the metadata. -ENODATA: bytes are missing (the text says
 * which); nothing was changed. A run that was killed before the removal is simply repeated; with
 * keep also one that was killed after it. *plain: malloc'ed, or NULL if nobody asks. */
DR_API int dr_retire(const char *path, const struct dr_retire_options *options, char **plain,
                     struct dr_error *err);

struct dr_commit_options {
    struct dr_open_options open;
    const char *base;    /* -b: a member of the chain; NULL = the immediate parent */
    const char *top;     /* a member of the chain: the topmost image that goes down. It and those
                            between it and base leave the chain. NULL = the active image, which
                            stays in the chain but with pivot */
    bool keep;           /* -d: do not empty the overlay afterwards */
    bool pivot;          /* of an open disk, its active image down into base: the disk goes on with
                            that, and the overlay is left as an empty image on it. The job
                            follows the guest until dr_job_complete() */
    bool write_blocking; /* of an open disk's active image: each write reaches the base, too, before
                            it is answered; else only near the end */
    bool force;          /* even if other images, in the base's directory or path's, name it */
    bool remove;         /* as in struct dr_stream_options; with pivot also the active image */
    const char *const *emptied; /* images that earlier commits with pivot have left: as long as they
                                   are empty, they show the disk's base and are no other images */
    size_t n_emptied;
    const char *const *committed; /* images that an earlier attempt at this commit has put into the
                                     base and taken out of the chain, but has not removed: they are
                                     no longer valid already */
    size_t n_committed;
};
/* On an open disk, which other threads may read and write meanwhile. Where the active image goes
 * down, base holds at the end what the disk held at one moment of this call, and the active image
 * keeps what was written to it since. With pivot the bitmaps inside the active image go into base;
 * where that cannot keep them it is refused. */
DR_API int dr_disk_commit(struct dr_disk *disk, const struct dr_commit_options *options,
                          struct dr_job *job, struct dr_error *err);
DR_API int dr_commit(const char *path, const struct dr_commit_options *options, struct dr_job *job,
                     struct dr_error *err);

/* ------------------------------------------------------------------ mirror */

struct dr_mirror_options {
    struct dr_open_options open; /* of the target: flags and allow_paths */
    const char *format;          /* of the target; NULL = as the active image's; with existing, find
                                    out */
    const struct dr_pair *pairs; /* settings of a new target */
    size_t n_pairs;
    bool existing; /* the target is there, as large as the disk, and is written over; else nothing
                      may be there */
    bool top;      /* copy only what the active image holds: a new target gets the same parent, an
                      existing one has it */
    bool only_new; /* with existing: copy only what is written from now on. The target has the rest
                      from elsewhere, or shall not have it */
    bool write_blocking; /* each write reaches the target, too, before it is answered; else only
                            near the end, so that a guest that writes faster than the target does
                            not keep the job busy for ever. A target that fails does not fail the
                            guest's writes */
    bool bitmaps; /* the target gets the bitmaps of the active image inside, with what the guest has
                     noted in them meanwhile; bitmaps of the same names in an existing target get
                     that, too. -ENOTSUP: one of the two cannot have any */
};
/* Copy the disk, which other threads may read and write meanwhile, into the image at target, and go
 * on with that one: the images that the disk had stay as they are at that moment. The job follows
 * the guest until dr_job_complete(), if it has `ready`. A new target gets its name when it is
 * complete; after a failure or a cancel there is none. Holes stay holes. */
DR_API int dr_disk_mirror(struct dr_disk *disk, const char *target,
                          const struct dr_mirror_options *options, struct dr_job *job,
                          struct dr_error *err);

/* ------------------------------------------------------------------ snapshots that are images of
 * their own */

/* Make a new child of path; it is the new active disk. name: file name or NULL = X-000001.ext with
 * the lowest free number. *active: its path, malloc'ed; active may be NULL. */
DR_API int dr_snapshot_create(const char *path, const char *name,
                              const struct dr_open_options *options, char **active,
                              struct dr_error *err);
/* The same of a disk that is open for writing, which goes on with the child. options: allow_paths
 * and flags for the child. Other threads may use the disk; their requests wait while the child
 * takes over. job (may be NULL) tells how long that took. */
DR_API int dr_disk_snapshot(struct dr_disk *disk, const char *name,
                            const struct dr_open_options *options, char **active,
                            struct dr_job *job, struct dr_error *err);

/* Several disks at one moment: all go on with their children, or none does, and there are none. The
 * disks are different ones. It returns when what was active is durable. Where that fails, the disks
 * go on with their children all the same, the text says so, and so will flushes of the disk. */
struct dr_overlay {
    struct dr_disk *disk;        /* open for writing */
    struct dr_open_options open; /* allow_paths and flags for the child */
    const char *path;            /* of the child; NULL = beside the active image, X-000001.ext */
    bool existing;      /* the child is there, as large as the disk, and is not open: what it holds
                           covers the disk's. It gets the active image as its parent */
    const char *format; /* NULL = as the active image's. It must be one that can have parents */
    const struct dr_pair *pairs; /* settings of the child */
    size_t n_pairs;
    char *active; /* by dr_disks_snapshot: the child's path, malloc'ed; NULL if the disk does not go
                     on with it */
};
DR_API int dr_disks_snapshot(struct dr_overlay *overlays, size_t n, struct dr_job *job,
                             struct dr_error *err);

/* ------------------------------------------------------------------ snapshots inside an image
 *
 * Formats such as qcow2 keep states of a disk inside its image, where they share what has not
 * changed since. These have nothing to do with the snapshots above, which are images of their own.
 * -ENOTSUP: images of this format have none. To read one: dr_open_options.snapshot. */

struct dr_internal_snapshot { /* 0 = not known */
    char *id, *name;
    uint64_t size;     /* of the disk when it was made */
    uint64_t vm_state; /* bytes of a saved machine; it stays as it is, and is never loaded */
    int64_t seconds;   /* since 1970 */
    uint32_t nanoseconds;
    uint64_t clock_ns; /* how long the guest had been running */
    bool has_icount;
    uint64_t icount; /* instructions that it had executed */
};
/* All of them, in the order in which the image has them; free with dr_internal_snapshots_free. */
DR_API int dr_internal_snapshots(const char *path, const struct dr_open_options *options,
                                 struct dr_internal_snapshot **list, size_t *n,
                                 struct dr_error *err);
DR_API int dr_disk_internal_snapshots(struct dr_disk *disk, struct dr_internal_snapshot **list,
                                      size_t *n, struct dr_error *err);
DR_API void dr_internal_snapshots_free(struct dr_internal_snapshot *list, size_t n);

/* create: named, of the disk as it is; several may have one name, the new id is one more than the
 * largest. apply: the disk becomes what it was, its size, too; what it held since is gone unless
 * another snapshot has it. delete: the others stay. apply takes an id, or a name if none has that
 * id; delete a name, or an id if none has that name (as QEMU, whose delete takes names only). The
 * disk must be open for writing; its requests wait meanwhile, and job (may be NULL) tells how
 * long. Interrupted, the image holds what it held before or what it holds afterwards, and perhaps
 * space that `drover check -r leaks` gives back. */
DR_API int dr_disk_internal_snapshot_create(struct dr_disk *disk, const char *name,
                                            struct dr_job *job, struct dr_error *err);
DR_API int dr_disk_internal_snapshot_apply(struct dr_disk *disk, const char *snapshot,
                                           struct dr_job *job, struct dr_error *err);
DR_API int dr_disk_internal_snapshot_delete(struct dr_disk *disk, const char *snapshot,
                                            struct dr_job *job, struct dr_error *err);
/* The same of an image that nobody has open; its parents are not needed. */
DR_API int dr_internal_snapshot_create(const char *path, const char *name,
                                       const struct dr_open_options *options, struct dr_error *err);
DR_API int dr_internal_snapshot_apply(const char *path, const char *snapshot,
                                      const struct dr_open_options *options, struct dr_error *err);
DR_API int dr_internal_snapshot_delete(const char *path, const char *snapshot,
                                       const struct dr_open_options *options, struct dr_error *err);

/* ------------------------------------------------------------------ bitmaps
 *
 * Images have bitmaps, qcow2 ones inside, others in a file beside them: each notes which parts of
 * the disk were written to since some moment, for incremental backups. Everything in this library
 * that writes to a disk keeps the enabled ones of its image right. While an image is open and was
 * written to they are marked as in use; a program that is killed then leaves them inconsistent, and
 * nothing relies on them any more. The same goes for bitmaps beside an image that another program
 * has written to, or that was put back from a copy. -ENOTSUP: the image has no place for any: it
 * can only be read, or is a block device. -EBADMSG: the file beside it is damaged. */

struct dr_bitmap {
    char *name;
    uint64_t granularity; /* bytes of the disk that a bit stands for */
    bool enabled;         /* writes set its bits */
    bool inconsistent;    /* can only be removed; or the image is being written to */
};
/* All of them, in the order in which the top image has them; free with dr_bitmaps_free. */
DR_API int dr_disk_bitmaps(struct dr_disk *disk, struct dr_bitmap **list, size_t *n,
                           struct dr_error *err);
DR_API void dr_bitmaps_free(struct dr_bitmap *list, size_t n);

/* each: [off, off + len) was written to. Ascending, never two ranges that touch. A result other
 * than 0 ends it and becomes its result. each must not use the disk. -EUCLEAN: it is inconsistent,
 * or the disk was written to through this very object, which stores bitmaps when it is closed. */
DR_API int dr_disk_bitmap_read(struct dr_disk *disk, const char *bitmap,
                               int (*each)(void *user, uint64_t off, uint64_t len), void *user,
                               struct dr_error *err);

struct dr_bitmap_options {
    uint64_t granularity;        /* ADD: a power of 2 from 512 to 2 GiB; 0 = the cluster's size,
                                    from 4 KiB to 64 KiB */
    bool disabled;               /* ADD */
    bool inside;                 /* ADD: -ENOTSUP rather than in a file beside the image */
    const char *source;          /* MERGE: the bitmap whose bits are set, too ... */
    struct dr_disk *source_disk; /* ... of this disk; NULL = the same one */
};
/* Of the top image; the disk must be open for writing. Other threads' requests wait meanwhile.
 * options: NULL = defaults. Durable on return. Interrupted, the image has the bitmaps from before
 * or those from afterwards, and perhaps space that `drover check -r leaks` gives back. -ENOENT,
 * -EEXIST; -EUCLEAN: it, or the source, is inconsistent. */
DR_API int dr_disk_bitmap_change(struct dr_disk *disk, const char *bitmap,
                                 enum dr_bitmap_action action,
                                 const struct dr_bitmap_options *options, struct dr_error *err);

/* Make a bitmap right that is inconsistent: what it has from then on is where the disk differs from
 * `against`, a backup of it, or a little more; it is trusted again. Compares both, as dr_compare()
 * does; other threads' requests wait meanwhile. Interrupted, it is as inconsistent as before; or,
 * inside an image, gone. Writes nothing else. */
DR_API int dr_disk_bitmap_rebuild(struct dr_disk *disk, const char *bitmap, struct dr_disk *against,
                                  struct dr_job *job, struct dr_error *err);

/* ------------------------------------------------------------------ the family */

struct dr_tree_node {
    char *path;
    char *format;
    uint64_t size, disk_size;
    char *problem; /* NULL, or why this image does not open with its parent */
    bool asked;    /* the image the question was about */
    size_t parent; /* index in the array, SIZE_MAX = a root */
};
/* All images in path's directory that belong to the same family: ancestors, descendants, siblings.
 * Parents stand before children. free with dr_tree_free. */
DR_API int dr_tree(const char *path, const struct dr_open_options *options,
                   struct dr_tree_node **nodes, size_t *n, struct dr_error *err);
DR_API void dr_tree_free(struct dr_tree_node *nodes, size_t n);

/* ------------------------------------------------------------------ info, check, recover, resize
 */

/* As `qemu-img info --output=json` prints: one object, or with chain an array of them, top first.
 * *json is malloc'ed. */
DR_API int dr_info(const char *path, const struct dr_open_options *options, bool chain, char **json,
                   struct dr_error *err);

/* The same of an open disk, which other threads may use. options (may be NULL) tell where its
 * images may be found. */
DR_API int dr_disk_info(struct dr_disk *disk, const struct dr_open_options *options, bool chain,
                        char **json, struct dr_error *err);

enum dr_repair {
    DR_REPAIR_NONE = 0,
    DR_REPAIR_LEAKS = 1,
    DR_REPAIR_ALL = 3,
    DR_REPAIR_DRY_RUN = 4, /* with one of these: change nothing, tell what would be changed */
};
/* As `qemu-img check --output=json`; *json is malloc'ed. repair: enum dr_repair. report gets a line
 * a finding, or is NULL. -ENOTSUP: the format has nothing to check.
 * With DR_REPAIR_DRY_RUN the image is opened for reading only. The numbers are those of the image
 * as it is; "corruptions-fixable", "leaks-fixable" and "plan" say what the repair would do: an
 * array of {"offset", "change"}, at most 100000, then "plan-more" counts the rest. -EFBIG: it would
 * write more than fits into memory. */
DR_API int dr_check(const char *path, const struct dr_open_options *options, unsigned repair,
                    void (*report)(void *user, const char *line), void *user, char **json,
                    struct dr_error *err);

/* The top image of an open disk, without repair: the image would change under its users. Requests
 * to a disk that is open for writing wait until the check has ended; job (may be NULL) tells how
 * long. */
DR_API int dr_disk_check(struct dr_disk *disk, void (*report)(void *user, const char *line),
                         void *user, char **json, struct dr_job *job, struct dr_error *err);

/* Say what was interrupted at path (through report, a line each, or NULL) and, unless dry_run,
 * finish or undo it. *found = how many things there were; found may be NULL. What another process
 * is making there is reported, too, but left alone and not counted. */
DR_API int dr_recover(const char *path, const struct dr_open_options *options, bool dry_run,
                      void (*report)(void *user, const char *line), void *user, unsigned *found,
                      struct dr_error *err);

/* ------------------------------------------------------------------ compact
 *
 * Give back what an image takes and does not need: units that hold only zeros, places in the file
 * that nothing leads to, and, once the units behind them have moved down, the file's end. What the
 * disk shows does not change, nor does its content id. The files never get longer meanwhile.
 * Interrupted anywhere, the disk reads the same; doing it again goes on. */

struct dr_compact_options {
    struct dr_open_options open; /* dr_compact: how to open the disk */
    bool no_zeros;               /* do not look for zeros in the data: only metadata is read */
    bool dry_run;                /* change nothing, and tell what would be given back */
};

struct dr_compact_result {
    uint64_t zeros;  /* bytes of the disk that hold zeros, and took space for them */
    uint64_t moved;  /* bytes of the disk that moved to another place in the file */
    uint64_t before; /* bytes of all files of the image together: their lengths */
    uint64_t after;
    uint64_t used_before; /* bytes that they take in the file system */
    uint64_t used_after;  /* a dry run does not know it: as before, less the zeros at most */
};

/* The image at path alone; its parents are read only where it takes part of a unit from them.
 * result may be NULL; it is filled in after a failure, too. -ENOTSUP: images of that format, or of
 * that kind, cannot be compacted; -EIO: the image is damaged (`drover check` says how). */
DR_API int dr_compact(const char *path, const struct dr_compact_options *options,
                      struct dr_job *job, struct dr_compact_result *result, struct dr_error *err);
/* The active image of an open disk, beside its users. They go on while it is checked; their
 * requests wait while all tables are looked at (a VMDK's: not), while tables move, and while the
 * file's end is looked for; job tells how long. A damaged image: -EIO. What a
 * crash has leaked is found only by dr_compact. */
DR_API int dr_disk_compact(struct dr_disk *disk, const struct dr_compact_options *options,
                           struct dr_job *job, struct dr_compact_result *result,
                           struct dr_error *err);

#ifdef __cplusplus
}
#endif
#endif
