/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The contract between the core and a format driver. Drivers map, the core moves bytes.
 *
 * A driver answers questions about metadata pages that the core has loaded for it, and edits those
 * pages. It never copies guest data, but in views_fill, whose bytes go into several trees.
 * Callbacks marked [page] run with the image lock held, do no I/O and may return -EAGAIN after
 * dr_page_get(), dr_page_pin(), dr_need_begin() or dr_need_flush() said so: the core does what is
 * needed outside the lock and calls again with the same arguments. All others may do I/O on the
 * image's files through dr_file_*; the core calls at most one of them at a time per image and none
 * while a [page] callback runs, unless said otherwise.
 */
#ifndef DR_FORMATS_FORMAT_H
#define DR_FORMATS_FORMAT_H

#include <jansson.h>

#include "base/error.h"
#include "storage/storage.h"

struct dr_image;
struct dr_marks;
struct dr_page;

/* A result below 0 ends what calls it, with that result. */
typedef int (*dr_orphan_fn)(void *user, uint64_t off, uint64_t len, struct dr_error *err);

/* ------------------------------------------------------------------ extents */

enum dr_kind {
    DR_HOLE,  /* this image has nothing here: ask the backing image, or zeros */
    DR_ZERO,  /* this image says zeros, whatever the backing has */
    DR_DATA,  /* the bytes stand in file at host */
    DR_CODED, /* the bytes are part of a coded (compressed) unit */
};

/* A unit whose parts differ (sub-units: some held, some zeros, some a hole) is answered part by
 * part. Several coded units may stand in one cluster of the file, whose count is then as high: its
 * last unit that is freed frees it (release). */
struct dr_extent {
    enum dr_kind kind;
    uint64_t len;         /* guest bytes from the asked offset on that this answer covers, > 0 */
    struct dr_file *file; /* DATA, CODED: one of the image's files */
    uint64_t host;        /* DATA: where the byte at the asked offset is; CODED: first coded byte */
    uint32_t host_len;    /* CODED: number of coded bytes (an upper bound is fine) */
    uint32_t unit;        /* CODED: guest bytes the unit decodes to */
    uint32_t inner;       /* CODED: the asked offset's place in the decoded unit */
    uint64_t tag;         /* CODED: the driver's own, for decode */
    bool in_place;        /* DATA: may be overwritten where it is */
    bool placed;          /* ZERO: has a place all the same, which a discard gives up */
    bool shared;          /* DATA, placed: others in the file have it, too, and keep it */
    bool flat;            /* DATA: holes of the file are this image's zeros (raw, flat extents) */
    bool stays;           /* DATA: no way to give its place up, so a discard does nothing */
};

/* ------------------------------------------------------------------ reservations */

enum dr_want {
    DR_WANT_DATA,
    DR_WANT_ZERO,
    DR_WANT_HOLE,
    DR_WANT_CODED,
    DR_WANT_ZERO_KEPT, /* zeros that keep the place they have, so that writing there later needs
                          none; only with DR_FORMAT_KEEPS_ZEROED */
    DR_WANT_LOWER,     /* the whole unit as it is, in a place nearer to the file's beginning; only
                          between compact_begin and compact_end */
};

enum dr_todo {
    DR_TODO_WRITE,     /* write the guest bytes [off, off+len) at host, and pad zeros behind them */
    DR_TODO_ZERO_HOST, /* make [host, host+len+pad) zero in the file, giving space back if the
                          caller said so or punch does */
    DR_TODO_COPY,      /* copy `bytes` bytes of the file from `from` to host: LOWER */
    DR_TODO_NOTHING,   /* just publish */
};

/* Bytes of a page that a reservation keeps ready to be edited. */
struct dr_pin {
    struct dr_page *page;
    uint64_t off; /* in the file */
    size_t len;
};
#define DR_RESERVATION_PINS 3 /* without an allocation; there may be more */
/* How many places one reservation may hand to dr_free_later, in reserve, publish and cancel
 * together. */
#define DR_RESERVATION_FREED 4

struct dr_reservation {
    uint64_t off, len; /* guest range that publish makes visible: contains what was asked for, lies
                          inside the unit (with a span: the units that were asked for). Where it is
                          more than what was asked for (whole sub-units, or all that a unit holds
                          when it gets a new place), the core reads the head and tail from this same
                          chain. */
    struct dr_file *file; /* WRITE, ZERO_HOST */
    uint64_t host;
    uint64_t pad; /* WRITE: zeros to write behind len, up to the end of the last unit's space */
    bool punch;   /* ZERO_HOST */
    uint64_t from, bytes; /* COPY */
    enum dr_todo todo;
    enum dr_want want;
    /* the driver's own, from reserve to publish or cancel */
    uint64_t priv[6];
    /* dr_reserve_page's */
    struct dr_pin pins[DR_RESERVATION_PINS], *more;
    unsigned n_pins, room;
};

/* A place in a file that nothing points to any more. */
struct dr_freed {
    struct dr_file *file;
    uint64_t host, len;
};

/* ------------------------------------------------------------------ creating, changing the parent
 */

struct dr_option {
    const char *name, *value;
};

struct dr_create_params {
    uint64_t size;                   /* bytes */
    const struct dr_option *options; /* what -o gave; names the driver does not know: -EINVAL */
    size_t n_options;
    struct dr_image
        *backing; /* open, or NULL (no backing, or an unsafe create without opening it) */
    const char *backing_name;    /* as it is to be recorded; NULL = none */
    const char *backing_format;  /* NULL = not given */
    const struct dr_image *like; /* snapshot: take geometry and subformat from this one; or NULL */
    const struct dr_chain *like_chain; /* like and what is below it; or NULL */
    unsigned file_flags;               /* enum dr_file_flag to add when opening the new files */
    bool any_path;                     /* further files may be outside the image's directory tree */
    const char *final; /* where the image will stand when path is only the private place from which
                          what stands in its directory is moved; NULL = path */
    struct dr_image *bitmaps_of; /* measure: the image whose bitmaps the new one gets; or NULL */
    const volatile int *stop; /* non-zero: what takes long ends with dr_create_stopped; or NULL */
    bool all_new; /* the image is written before it is moved: all its files are made next to path,
                     none that exists becomes its own */
    bool force;   /* also what other programs are known not to take */
    const char *const *adopt; /* paths of files that hold the data: only what describes them is */
    size_t n_adopt;           /* made, and size is theirs. -ENOTSUP: the format has no such thing */
    bool on_device; /* path is a block device (DR_FORMAT_ON_DEVICE): write the image over what it
                       holds, which may be an older image, and never remove it */
};

/* 0, or the failure when somebody wants no new image any more. */
static inline int dr_create_stopped(const volatile int *stop, struct dr_error *err)
{
    if (!stop || !__atomic_load_n(stop, __ATOMIC_RELAXED))
        return 0;
    return dr_fail(err, ECANCELED, "stopped on request");
}

/* Bytes that the files of a new image take together. */
struct dr_cost {
    uint64_t fixed; /* header, tables, and disks that stand in their file as they are */
    uint64_t unit;  /* each such unit of the disk that holds data takes as much again; 0 = none */
    bool has_bitmaps;
    uint64_t bitmaps; /* copies of the bitmaps of params->bitmaps_of; with has_bitmaps */
};

/* One row a -o option; the table ends with a NULL name. */
struct dr_option_help {
    const char *name, *type, *help; /* type: "str" "size" "bool (on/off)" "num" */
    const char *initial;            /* what create says when it is not given; NULL = nothing */
};

enum dr_set_backing_flag {
    DR_TRY =
        1 << 0, /* only find out whether it would work: space, charset, permission; write nothing */
};

/* ------------------------------------------------------------------ amending */

struct dr_amend {
    const struct dr_option *options;
    size_t n_options;
    /* How far a step of it is; non-zero = stop. NULL = nobody asks. */
    int (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
    /* CHECK's answers: what the core does between FIRST and LAST. */
    uint64_t size; /* the disk gets this one */
    bool no_zeros; /* nothing may stay that the image says is zeros (DR_ZERO): it becomes nothing
                      where there is no parent, else bytes */
};

enum dr_amend_phase { DR_AMEND_CHECK, DR_AMEND_FIRST, DR_AMEND_LAST };

static inline int dr_amend_report(const struct dr_amend *a, uint64_t done, uint64_t total,
                                  struct dr_error *err)
{
    bool stop = a->progress && a->progress(a->user, done, total) != 0;
    return stop ? dr_fail(err, ECANCELED, "stopped on request") : 0;
}

/* ------------------------------------------------------------------ written in order */

/* An image that is written once, from front to back, into whatever takes bytes: a file, a pipe, a
 * place in an archive. Units go out in the order of the disk; all-zero ones are left out. */
struct dr_sequential {
    uint64_t unit;     /* guest bytes; a power of two. 0: ask unit_of */
    size_t coded_most; /* bytes that encode needs for a unit, at most */
    /* 1: these settings ask for such an image; 0: for another one of the format. */
    int (*wanted)(const char *path, const struct dr_create_params *params, struct dr_error *err);
    /* Write what comes before the first unit to the end of out, which the caller keeps open until
     * free. path: for messages, and for the image's own name. */
    int (*begin)(const char *path, const struct dr_create_params *params, struct dr_file *out,
                 void **state, struct dr_error *err);
    /* An image whose tables come in front of its units is told first which units there will be, so
     * many times: runs of them in the order of the disk, [off, off + len), and then len 0. Units
     * that turn out to be zeros are put, too. Such an image is only made for a pipe, where it has
     * no other way. All three, or none. */
    unsigned map_passes;
    int (*map)(void *state, unsigned pass, uint64_t off, uint64_t len, struct dr_error *err);
    uint64_t (*unit_of)(const void *state); /* after begin */
    /* No I/O, by many threads at once. len: unit, or what the end of the disk leaves of the last
     * one. The number of bytes in coded, or -errno. */
    int64_t (*encode)(const void *state, const uint8_t *in, size_t len, uint64_t off,
                      uint8_t *coded);
    /* What encode gave for the unit at off; ascending, by one thread at a time. */
    int (*put)(void *state, uint64_t off, const uint8_t *coded, size_t len, struct dr_error *err);
    /* Write what comes behind the last unit. Flushes nothing. */
    int (*finish)(void *state, struct dr_error *err);
    void (*free)(void *state); /* NULL allowed */
};

/* ------------------------------------------------------------------ read in one pass */

/* Where the bytes of an image come from, one after another. */
struct dr_inflow {
    /* As dr_source_read(): *got is short only at the end. */
    int (*read)(void *user, void *buf, size_t len, size_t *got, struct dr_error *err);
    void *user;
};

struct dr_incoming {
    uint64_t size;     /* of the disk, in bytes */
    uint64_t unit;     /* guest bytes of a unit; the last one may reach behind the end */
    size_t coded_most; /* bytes that next may need */
};

/* An image that is read from front to back, as it comes out of a pipe. */
struct dr_incoming_ops {
    /* Read up to the first unit. -ENOTSUP: the layout of this image forbids it. name, which lives
     * until free: for messages. *state is to be freed also after a failure. */
    int (*begin)(const char *name, struct dr_inflow *in, void **state, struct dr_incoming *what,
                 struct dr_error *err);
    /* 1: the next unit that is not zeros, ascending; 0: all have come. By one thread at a time. */
    int (*next)(void *state, uint8_t *coded, size_t *len, uint64_t *off, struct dr_error *err);
    /* No I/O, by many threads at once: one whole unit, zeros behind the end of the disk. */
    int (*decode)(const void *state, const uint8_t *coded, size_t len, uint64_t off, uint8_t *out,
                  struct dr_error *err);
    void (*free)(void *state); /* NULL allowed */
};

/* ------------------------------------------------------------------ internal snapshots */

/* A field that is 0 or NULL is not known. */
struct dr_snapshot_info {
    const char *id, *name;
    uint64_t size;     /* of the disk when it was made */
    uint64_t vm_state; /* bytes of a saved machine */
    int64_t seconds;   /* since 1970 */
    uint32_t nanoseconds;
    uint64_t clock_ns; /* how long the guest had been running */
    bool has_icount;
    uint64_t icount; /* instructions that it had executed */
};

/* The views of an image: the disk and each snapshot inside it. */
struct dr_views {
    uint64_t size;  /* of the largest */
    uint64_t group; /* guest ranges of so many bytes share tables: the core locks whole ones */
    uint64_t unit;  /* fill takes whole ones */
};

/* The strings live until it returns. A result other than 0 ends the list and becomes its result. */
typedef int (*dr_snapshot_each)(void *user, const struct dr_snapshot_info *info);

/* ------------------------------------------------------------------ bitmaps of what was written */

struct dr_bitmap_info {
    const char *name;
    uint64_t granularity; /* bytes of the disk that a bit stands for */
    bool enabled;         /* writes set its bits */
    bool inconsistent;    /* a writer was interrupted: nothing may rely on it */
    bool noting;          /* inconsistent only because it notes what is written by this very open */
    const char *distrust; /* beside the image: why it is inconsistent; NULL = it is in use */
};

/* [off, off + len) of the disk was written to, as far as a bitmap tells. A result other than 0 ends
 * it and becomes its result. */
typedef int (*dr_bitmap_dirty)(void *user, uint64_t off, uint64_t len);

struct dr_bitmap_change {
    enum dr_bitmap_action action;
    const char *name;
    uint64_t granularity;    /* ADD; 0 = the format's default */
    bool disabled;           /* ADD */
    bool inside;             /* ADD: not beside the image */
    struct dr_image *source; /* MERGE: what this bitmap of it has, too; may be the image itself */
    const char *source_name; /* ADD: the new one has that from the beginning, or NULL */
    /* NULL, or: ADD: the new one has these from the beginning; CLEAR: it has just these afterwards;
     * MERGE without source_name: it has these, too. */
    const struct dr_marks *ranges;
};

/* The name lives until it returns. A result other than 0 ends the list and becomes its result. */
typedef int (*dr_bitmap_each)(void *user, const struct dr_bitmap_info *info);

/* ------------------------------------------------------------------ info, check */

struct dr_check_result {         /* the numbers of qemu-img check */
    uint64_t corruptions, leaks; /* leaks in bytes / cluster_size */
    uint64_t corruptions_fixed, leaks_fixed;
    uint64_t check_errors;
    uint64_t image_end_offset;
    uint64_t total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters;
    /* each finding as a line; never NULL while check runs */
    void (*report)(void *user, const char *line);
    void *user;
    /* NULL, or the repair is a rehearsal, whose changes are thrown away: gets each of them, with
     * the offset in files[0] (DR_FORMAT_PLANS) */
    void (*plan)(void *user, uint64_t off, const char *change);
};

enum dr_check_flag { DR_CHECK_FIX_LEAKS = 1, DR_CHECK_FIX_ALL = 3 };

/* ------------------------------------------------------------------ the driver */

enum dr_format_flag {
    DR_FORMAT_BACKING = 1 << 0, /* can have a backing image */
    DR_FORMAT_WRITE = 1 << 1,
    DR_FORMAT_CREATE = 1 << 2,
    DR_FORMAT_CONTENT_ID =
        1 << 3, /* children notice when a parent changed: commit must repair them */
    DR_FORMAT_NO_PROBE = 1 << 4,    /* raw: what is left when nothing else fits */
    DR_FORMAT_PUNCH_FREED = 1 << 5, /* the core punches what release says is gone, before reuse */
    DR_FORMAT_MEMBERS = 1 << 6, /* a file holds several disks: image->member says which (NULL: not
                                   said), and NAME:PATH#MEMBER names one */
    DR_FORMAT_ADOPTS = 1 << 12, /* create knows dr_create_params.adopt */
    DR_FORMAT_PLANS = 1 << 10,  /* check says itself what a repair changes, if dr_check_result.plan
                                   is there; else the core tells of the bytes that are written */
    DR_FORMAT_REPAIR_AS_FOUND = 1 << 7, /* check with repair does what recover does, and wants an
                                           unclean image as it was left */
    DR_FORMAT_KEEPS_ZEROED = 1 << 9,    /* knows DR_WANT_ZERO_KEPT; others get DR_WANT_ZERO */
    DR_FORMAT_CONTAINER = 1 << 11, /* with MEMBERS: a member is an image of a format of its own,
                                      which its bytes tell, or the caller (dr_image_enter) */
    DR_FORMAT_FIXED_MAP = 1 << 13, /* where bytes are never changes, and no place is ever freed: map
                                      needs no lock and no pages, and readers keep no place */
    DR_FORMAT_NOISE = 1 << 14, /* what was not written yet reads as anything, also in a new image */
    DR_FORMAT_ON_DEVICE = 1 << 8, /* an image may stand on a block device, whose size is fixed and
                                     whose unused bytes may hold anything */
};

struct dr_format {
    const char *name;
    unsigned flags; /* enum dr_format_flag */
    const struct dr_option_help *create_options;
    const char
        *parent_format; /* the only format its parents can have; NULL = any, so it must be told */
    const char *default_parent;  /* the format of a parent of which nothing is told; NULL = it must
                                    be told */
    const char *snapshot_suffix; /* external snapshot names: "vmdk" → X-000001.vmdk */
    /* 0 = a reservation lies in one unit. Else a multiple of every unit: a reservation may cover
     * several neighbouring whole or partial units that are alike, and crosses no multiple of span.
     * Only the units it touches are locked. For formats whose units are small. */
    uint32_t span;

    /* buf: the first len bytes of the file (up to 4 KiB, fewer if it is shorter). 0 = not mine,
     * else the higher the surer (100 = magic number). No I/O. */
    int (*probe)(const uint8_t *buf, size_t len, const char *path);

    /* image->files[0] is open. Read and check header and geometry; open further files through
     * dr_image_open_file(); set image->size, state, backing_name, backing_format (malloc'ed),
     * unclean. Nothing is written, however unclean. On failure the core calls close. */
    int (*open)(struct dr_image *image, struct dr_error *err);
    /* Free image->state, which may be NULL or half made. The core closes the files. */
    void (*close)(struct dr_image *image);

    /* Make a new, complete, durable image at path (all names O_EXCL); on failure leave nothing
     * behind. */
    int (*create)(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                  struct dr_error *err);

    /* Compute the bytes that create would write. Arithmetic only, apart from a look at the bitmaps
     * of params->bitmaps_of: path is for messages, params->backing is NULL. Optional. */
    int (*measure)(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                   struct dr_error *err);
    /* The file whose bytes are the disk, at the same offsets, as soon as map says DATA everywhere:
     * what is left when the rest of the image is thrown away. It is one of the image's files, not
     * files[0]. Optional. */
    struct dr_file *(*plain)(const struct dr_image *image);

    /* The unit that off is in, which is what the core locks before reserve; pure geometry. [*uoff,
     * *uoff + *ulen) contains off, its end may pass image->size. */
    void (*unit)(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen);

    /* [page] Tell what this image alone has at off; 0 < ext->len <= len; as long as the loaded page
     * tells (and dr_page_zero_until). off + len <= image->size. Damaged entries: -EIO naming file
     * and offset. */
    int (*map)(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
               struct dr_error *err);

    /* Check a page (len <= 4096 bytes at off of file) as it enters the cache. Optional. */
    int (*vet)(struct dr_image *image, struct dr_file *file, uint64_t off, const uint8_t *page,
               size_t len, struct dr_error *err);

    /* [page] off, len inside one unit (or span), locked exclusively by the caller. Pin, by
     * dr_reserve_page, whatever publish is going to edit. host_len: for CODED, the bytes needed.
     * -ENOTSUP: for ZERO "write zeros as DATA", for HOLE/CODED "cannot". -ENOSPC: the format has no
     * room. LOWER where nothing is to be moved, or no place is free: 0, with DR_TODO_NOTHING.
     * Making or copying a table that several units share is a step of reserve itself, complete when
     * it returns: those units may be reserved by others before this one is published. */
    int (*reserve)(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                   uint32_t host_len, struct dr_reservation *r, struct dr_error *err);
    /* Image lock held, no I/O, cannot fail. Hand each place that loses a reference to
     * dr_free_later().
     */
    void (*publish)(struct dr_image *image, struct dr_reservation *r);
    void (*cancel)(struct dr_image *image, struct dr_reservation *r);
    /* Image lock held, no I/O. The removal of a place that was handed to dr_free_later() is
     * durable, and nobody reads or writes there any more. Lower its counts that are above 1, and
     * say in *gone (len 0 so far) which part has no reference left: a range of the same file that
     * may be larger than what was freed (the last compressed unit of a cluster leaves the whole
     * cluster). What is in gone keeps its count until reuse, and nothing may be put there. A count
     * that is lowered here stands in a page that reserve has pinned and that is kept pinned until
     * now: release cannot load one. Absent: what was freed is gone. */
    void (*release)(struct dr_image *image, const struct dr_freed *freed, struct dr_freed *gone);
    /* Image lock held, no I/O. The core has punched gone, if DR_FORMAT_PUNCH_FREED says so: lower
     * its counts to 0, it may be allocated again. Called in the order of release. Optional. */
    void (*reuse)(struct dr_image *image, const struct dr_freed *gone);

    /* No I/O, no lock, called by many threads at once. decode: the coded bytes of ext (host_len, or
     * what the file has of them) → exactly ext->unit bytes.
     * encode: the size used in out, or -ENOTSUP when it does not shrink into out_cap. */
    int (*decode)(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                  size_t in_len, uint8_t *out, struct dr_error *err);
    int64_t (*encode)(struct dr_image *image, const uint8_t *in, size_t in_len, uint64_t guest_off,
                      uint8_t *out, size_t out_cap);
    /* Some images of the format are written in one go. Optional. */
    const struct dr_sequential *sequential;
    /* Some can be read in one pass. Optional. */
    const struct dr_incoming_ops *incoming;

    /* Before the first write of an open (DR_OPEN_UNCHANGED in image->flags: the view stays), and
     * again whenever reserve asked by dr_need_begin(): mark the image as being written, durably.
     * This is also where reserve has a switch of the header done that must come before it goes on
     * (a refcount table that is full moves): flush (dr_image_flush), write the new table with the
     * driver's own I/O where no count says that anything is used, flush, switch one sector of the
     * header, flush, then dr_page_forget what was written and free the old table. Meanwhile reserve
     * keeps asking for begin instead of editing the old table.
     * changes: the guest's view is about to change (first such call: new content id). off: the
     * guest offset at hand. Runs while [page] callbacks of other threads may run: guard what they
     * read. */
    int (*begin_write)(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err);
    /* All metadata is durable, no write is in flight: unmark, durably. Idempotent. */
    int (*end_write)(struct dr_image *image, struct dr_error *err);

    /* Called through dr_image_set_backing. parent: open image or NULL (none, or unsafe without
     * opening). name: as it is to be recorded, NULL = no parent. One sector or one dr_replace;
     * durable on return. Must not flush the image: no flush of it runs meanwhile, while other
     * threads may read, and edit pages that the next flush writes. */
    int (*set_backing)(struct dr_image *image, const struct dr_image *parent, const char *name,
                       const char *format, unsigned flags, struct dr_error *err);
    /* Change what create's options have laid down. Called for each phase with the same `what`; no
     * request is on its way, all is durable, and begin_write was done. CHECK refuses what cannot
     * be, and changes nothing. FIRST and LAST do their own I/O and forget (dr_page_forget) what
     * they have rewritten; each is durable when it returns, and cut off anywhere the image is right
     * and the same call may be made again. Optional, with amend_options. */
    int (*amend)(struct dr_image *image, struct dr_amend *what, enum dr_amend_phase phase,
                 struct dr_error *err);
    const struct dr_option_help *amend_options;
    /* The n-th place (from 0) where the recorded backing image may be; *path malloc'ed. -ENOENT: no
     * more. Absent: only the recorded name, relative to the image's directory. */
    int (*backing_candidate)(const struct dr_image *image, unsigned n, char **path,
                             struct dr_error *err);
    /* Is this the parent the image was made on? -ESTALE with a message that names both ids, both
     * files and the way out. parent->writable state does not matter. Absent: anything is. */
    int (*check_backing)(const struct dr_image *image, const struct dr_image *parent,
                         struct dr_error *err);

    /* Formats with content ids (DR_FORMAT_CONTENT_ID), for commit and recover: protocols.md "VMDK,
     * Commit". next_id: the id the parent gets while `child` is being committed into it. set_id
     * makes it so, durably, with the unclean mark; set_parent_id rewrites only the child's record
     * of its parent's id. */
    uint32_t (*id)(const struct dr_image *image);
    uint32_t (*parent_id)(const struct dr_image *image);
    uint32_t (*commit_id)(const struct dr_image *parent, const struct dr_image *child);
    int (*set_id)(struct dr_image *image, uint32_t id, struct dr_error *err);
    int (*set_parent_id)(struct dr_image *image, uint32_t id, struct dr_error *err);

    /* Write-open of an unclean image: metadata only, idempotent, before anything else is written.
     */
    int (*recover)(struct dr_image *image, struct dr_error *err);
    /* NULL, or a refusal of what resize cannot do, before anything of the image changes. */
    int (*may_resize)(struct dr_image *image, uint64_t size, struct dr_error *err);
    /* The disk gets a new size; the caller has flushed. Nothing of the parent may come to light
     * behind the old size: parent_size is where the parent ends (0 = there is none, UINT64_MAX =
     * not known), and where that is more than the old size, the core has filled the unit the old
     * size lies in. -ENOTSUP. */
    int (*resize)(struct dr_image *image, uint64_t size, uint64_t parent_size,
                  struct dr_error *err);
    /* Snapshots inside the image. All optional. The core has flushed, and keeps out every writer of
     * the image, in-place ones too, until the callback returns; readers go on, so each write of the
     * driver leaves tables that may be read at any time, as a crash would leave them. The callback
     * does its own I/O, with begin_write done before, and is durable when it returns: first counts
     * go up, then new tables are written, then one sector of the header switches. What it rewrites
     * by dr_file_pwrite it forgets with dr_page_forget; what loses a reference it hands to
     * dr_free_later, after dr_free_ahead, and the core flushes once more. create: named, at the
     * present state. apply: the disk becomes what it was. delete: the others stay. A change of the
     * disk's size by apply is the caller's to announce: the disk is in nobody else's hands then.
     * After a failure the unclean mark stays, so that recover gives back what has leaked. */
    int (*snapshot_create)(struct dr_image *image, const char *name, struct dr_error *err);
    int (*snapshot_apply)(struct dr_image *image, const char *id, struct dr_error *err);
    int (*snapshot_delete)(struct dr_image *image, const char *id, struct dr_error *err);
    int (*snapshot_list)(struct dr_image *image, dr_snapshot_each each, void *user,
                         struct dr_error *err);
    /* The image, which was just opened for reading, is what it was when the snapshot was made,
     * until it is closed. */
    int (*snapshot_show)(struct dr_image *image, const char *id, struct dr_error *err);
    /* Bitmaps that the image keeps. Optional. An image that keeps none, because its format or this
     * version of it has no room for them, has them in a file beside it (core/bitmaps.c). */
    bool (*bitmaps_inside)(const struct dr_image *image);
    /* -ENOTSUP: an image of this version has none. */
    int (*bitmap_list)(struct dr_image *image, dr_bitmap_each each, void *user,
                       struct dr_error *err);
    /* Show what the bitmap has: ascending, never two ranges that touch. */
    int (*bitmap_read)(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                       struct dr_error *err);
    /* The same of a bitmap that notes what is written by this very open: what it had before. With
     * bitmap_noted; the core's begin_lock is held. *enabled: it gets what bitmap_noted tells, too.
     */
    int (*bitmap_stored)(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                         bool *enabled, struct dr_error *err);
    /* What changed since the bitmaps were stored; NULL = nothing. Reads no file. */
    const struct dr_marks *(*bitmap_noted)(const struct dr_image *image);
    /* As a snapshot callback: the core has flushed and keeps out every writer. The image has the
     * bitmaps from before or those from afterwards, whenever it is interrupted. */
    int (*bitmap_change)(struct dr_image *image, const struct dr_bitmap_change *change,
                         struct dr_error *err);
    /* The same beside those who write: they wait for memory only, in dr_image_quietly().
     * begin_write was done, for changes of the view. 1: such a change is for bitmap_change; nothing
     * was done. After a failure bitmaps may say that more has changed than did. Optional. */
    int (*bitmap_change_live)(struct dr_image *image, const struct dr_bitmap_change *change,
                              struct dr_error *err);
    /* The guest's view of [off, off + len) may have changed through this image, with begin_write
     * called for changes before: the bitmaps of it that are enabled note that. Under the lock of
     * the units, by many threads at once; no I/O, cannot fail. Optional. */
    void (*changed)(struct dr_image *image, uint64_t off, uint64_t len);
    /* All views together, for who gives them another parent: begin, any number of hole and fill,
     * end, while nobody changes snapshots or the disk's size. Optional, all or none.
     *   hole [page]: does some view show its parent at off? *len becomes shorter if that is so for
     *     less. off + *len <= size. 1: there are so many views that it has to be called again, with
     *     the same arguments; it goes on where it was, and needs no pages of before. Asked by one
     *     thread at a time.
     *   fill: every view that shows its parent inside [off, off + len), whole units of one group,
     *     has these bytes (NULL: zeros) there from now on; none changes what it has itself. If
     *     coded_len > 0, buf has so many bytes of one unit, coded, and [off, off + len) is all of
     *     it that a view has; only views that have nothing at all in it get them. The core has
     *     called begin_write, keeps writers out of the group, and flushes afterwards. The driver
     *     does its own I/O, in the order that leaves each view as it is after a crash.
     *   end: also after a failure. Nobody writes. */
    int (*views_begin)(struct dr_image *image, struct dr_views *views, struct dr_error *err);
    int (*views_hole)(struct dr_image *image, uint64_t off, uint64_t *len, bool *hole,
                      struct dr_error *err);
    int (*views_fill)(struct dr_image *image, const void *buf, uint32_t coded_len, uint64_t off,
                      uint64_t len, struct dr_error *err);
    int (*views_end)(struct dr_image *image, struct dr_error *err);
    /* Cut what no table points to off the end of the files (commit has emptied the image).
     * Optional. */
    int (*trim)(struct dr_image *image, struct dr_error *err);
    /* Compaction of the files. Optional, all or none; with trim. All is flushed before begin and
     * finish, and the core keeps out every writer of the image until they return; readers go on. An
     * image that is open for reading only gets begin, sizes and end, to find out what would be.
     *   begin: look at all tables and choose which length the files shall get, never more than they
     *     have. Until end, DR_WANT_LOWER moves what stands behind that into free places before it.
     *     Reads no guest data, and changes nothing on disk.
     *   look: optional. What takes long of begin, while requests go on, but nobody begins to write:
     *     before it has returned, none of the others is called.
     *   moves: would LOWER move a unit that has its bytes there? Image lock held, no I/O.
     *   spare: image lock held, no I/O. Suppose that the units with these bytes (DATA or CODED) had
     *     given up their places when begin looked.
     *   length: bytes that the files will have together, as far as can be told.
     *   finish: move tables down. It does its own I/O, as a snapshot callback does, and is durable
     *     when the core has flushed once more; trim follows. *again becomes true if what tables
     * have left lets the files become shorter still, when all of it is done once more. end: forget
     * what begin has made; also after a failure of it. */
    int (*compact_begin)(struct dr_image *image, struct dr_error *err);
    int (*compact_look)(struct dr_image *image, struct dr_error *err);
    bool (*compact_moves)(const struct dr_image *image, const struct dr_extent *ext);
    void (*compact_spare)(struct dr_image *image, const struct dr_extent *ext);
    uint64_t (*compact_length)(const struct dr_image *image);
    int (*compact_finish)(struct dr_image *image, bool *again, struct dr_error *err);
    void (*compact_end)(struct dr_image *image);
    /* Add what is special to the format to data (qemu-img info's format-specific "data"). Also sets
     * *cluster_size (0 = none). */
    int (*info)(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err);
    /* Are the guest's bytes encrypted? Optional: absent = they are not. */
    bool (*encrypted)(const struct dr_image *image);
    int (*check)(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                 struct dr_error *err);
    /* Show the ranges of files[0] that nothing in the image leads to, ascending, none twice.
     * Optional. */
    int (*orphans)(struct dr_image *image, dr_orphan_fn each, void *user, struct dr_error *err);
};

extern const struct dr_format dr_format_addcow;
extern const struct dr_format dr_format_luks;
extern const struct dr_format dr_format_ova;
extern const struct dr_format dr_format_ovf;
extern const struct dr_format dr_format_qcow2;
extern const struct dr_format dr_format_raw;
extern const struct dr_format dr_format_vma;
extern const struct dr_format dr_format_vmdk;

#endif
