/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images, chains and disks, for the core, the operations and the drivers.
 *
 *   dr_image   one format driver over its files: one layer. Refcounted.
 *   dr_chain   images linked by backing, top first. Immutable, refcounted.
 *   dr_disk    what the public API hands out: a gate and the present chain.
 */
#ifndef DR_CORE_CORE_H
#define DR_CORE_CORE_H

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/stripe.h"
#include "core/pages.h"
#include "formats/format.h"

#define DR_CHAIN_MAX 4096 /* the most images of a chain */

/* With enum dr_open_flag, for check: an unclean image is opened for writing as it is. */
#define DR_OPEN_AS_FOUND (1u << 31)
/* The same, for info: a file with several disks may be opened without saying which. There is
 * nothing to map then; the size is that of all of them. A parent is one disk all the same. */
#define DR_OPEN_WHOLE (1u << 30)

/* The same, for who looks for the children of an image: only what is recorded of the parent counts.
 * A driver that can tell without the disk's other files does not open them; nothing may be mapped
 * then. Reading only. */
#define DR_OPEN_RECORDED (1u << 29)

struct dr_cache;   /* pages.c */
struct dr_ranges;  /* inflight.c */
struct dr_flusher; /* flush.c */
struct dr_index;   /* index.c */
struct dr_noting;  /* bitmaps.c */

enum dr_need_kind {
    DR_NEED_NONE,
    DR_NEED_PAGE,
    DR_NEED_FLUSH,
    DR_NEED_BEGIN,
    DR_NEED_REPAIR, /* it can never succeed: two tables have one sector, at `off` */
};

/* What an image has been told of writers. */
enum dr_begun {
    DR_BEGUN_WRITING = 1, /* begin_write was called */
    DR_BEGUN_CHANGES = 2, /* for changes of the view */
    DR_END_DUE = 4, /* end_write failed: it is still due, and begin_write comes before any change */
};

struct dr_need {
    enum dr_need_kind kind;
    unsigned file;
    uint64_t off, len; /* PAGE: every page of this range */
};

/* The pages that were read for a callback stay in memory until it has succeeded, so that a callback
 * which needs many of them, one after another, gets on whatever else is going on. Begins as {0}. */
struct dr_hold {
    struct dr_page **pages;
    size_t n, room;
};

/* A file as it was when an image was opened on it while others may write (FORCE_SHARE). */
struct dr_seen_file {
    uint64_t mtime, size;
};

/* size, flags and writable may be read at any time; they change while no request is past the gate,
 * but for an image below the top: that is frozen while requests read it. */
struct dr_unpack_damage;

struct dr_image {
    const struct dr_format *fmt;
    void *state; /* the driver's */
    struct dr_fs *fs;
    char *path;             /* as given or resolved; for messages and for names next to it */
    char *member;           /* which disk of the file; NULL = not said (DR_FORMAT_MEMBERS) */
    struct dr_file **files; /* [0] is the file at path; with contained, [1] is, and [0] the part of
                               it or file beside it that is the image (dr_image_enter) */
    unsigned n_files;
    const char *packer; /* files[0] is what this made smaller as a whole, unpacked; NULL = none */
    struct dr_unpack_damage
        *doubt;                /* SALVAGE: it could not be unpacked to its end; NULL = it was */
    struct dr_seen_file *seen; /* of each file, if others may write it; else NULL */
    _Atomic uint64_t size;     /* guest bytes */
    _Atomic unsigned flags;    /* enum dr_open_flag as they hold for this image */
    _Atomic bool writable;
    _Atomic unsigned thaws; /* how often it was thawed */
    _Atomic bool masked;    /* what is written to it now, images above hold, too, or its parents: a
                               job makes it durable, and flushes of the disk pass it over. Until it
                               is frozen */
    _Atomic bool leaving; /* the disk is about to go on without it: flushes of the disk do not punch
                             what was freed, for which the guest's next writes would wait */
    _Atomic bool given_up;    /* frozen although some of its metadata is in memory only */
    _Atomic bool overwritten; /* what it shows changes, although it is UNCHANGED: the promise is for
                                 the disk, whose images above hold the same. Until it is frozen */
    bool contained;           /* it is a member of a DR_FORMAT_CONTAINER */
    bool unclean;             /* set by open: was not closed after writing */
    bool always_placed;       /* set by open: what the disk grows by gets its place at once */
    char *backing_name;       /* as recorded, NULL = none */
    char *backing_format;     /* as recorded, NULL = not recorded */

    /* the core's own */
    _Atomic unsigned refs;
    /* Page edits; never held across I/O. Every reader takes it, and so writes to its cache line,
     * unless map needs no lock (DR_FORMAT_FIXED_MAP). */
    DR_OWN_LINE pthread_mutex_t lock;
    struct dr_need need; /* what the last -EAGAIN wants; under lock */
    struct dr_cache *cache;
    struct dr_ranges *ranges;
    struct dr_flusher *flusher;
    const struct dr_gate *gate; /* while it is being opened; NULL = what the environment allows */
    const char *data_file;      /* the same: named by the user; NULL = as recorded */
    const char *key_secret;     /* the same: which secret has the password; NULL = not given */
    const char *member_format;  /* the same: of a member of a container; NULL = as its bytes say */
    _Atomic bool has_decoded;   /* decoded.c may know units of it */
    _Atomic uint64_t decoded_gen;             /* changes whenever units are forgotten */
    _Atomic uint64_t decoded_at, decoded_end; /* coded bytes of the unit that was read last */
    pthread_mutex_t begin_lock;               /* one begin_write at a time */
    _Atomic unsigned begun;                   /* enum dr_begun */
    struct dr_noting *noting; /* bitmaps beside the image are being kept (bitmaps.c); changes under
                                 begin_lock, while nobody writes */
    bool noting_begun;        /* they are, or there are none; under begin_lock */
};

/* A hook is told of every change that the guest makes to a disk. Both functions run under the lock
 * of the units that change; neither may enter the disk's gate, or write to its active image or
 * flush that. */
struct dr_hook {
    /* [off, off+len) is about to change, and still reads as before through chain's images[0]: time
     * to copy it elsewhere. A failure makes the guest's request fail, unchanged. NULL allowed. */
    int (*before)(void *user, struct dr_chain *chain, uint64_t off, uint64_t len,
                  struct dr_error *err);
    /* [off, off+len) may have changed: its data is written (not durable), the guest has not been
     * told. Also after a request that failed half way. NULL allowed. */
    void (*after)(void *user, uint64_t off, uint64_t len);
    void *user;
};
#define DR_HOOKS_MAX 8
struct dr_hooks { /* of a disk; changes only while no request is past its gate */
    unsigned n;
    struct dr_hook list[DR_HOOKS_MAX];
};

struct dr_chain {
    _Atomic unsigned refs;
    const struct dr_hooks *hooks; /* of the disk whose chain it is; NULL: of none */
    struct dr_index *index;       /* of its runs of frozen images; NULL: there is none */
    size_t n;
    struct dr_image *images[]; /* top first; each holds a reference */
};

/* ------------------------------------------------------------------ images (image.c, open.c) */

/* For drivers, during open: open a further file of the image (extent, data file). name as recorded:
 * resolved against the image's directory, must lie inside that directory's tree, or in a directory
 * that somebody allowed, once links are followed (invariant 6). The file gets the image's access
 * mode and locks and is appended to files[]. */
int dr_image_open_file(struct dr_image *image, const char *name, unsigned *index,
                       struct dr_error *err);

/* The same for a file that may be elsewhere, as a logical volume with the data is: inside the
 * image's directory tree, or where backing files may be (invariant 6). If the caller of dr_open()
 * named a data file, that one is opened and name is not looked at. */
int dr_image_open_data_file(struct dr_image *image, const char *name, unsigned *index,
                            struct dr_error *err);

/* For the driver of a container, at the end of open: the image becomes one of the format that the
 * bytes of `file` have, or that the user named, and is opened as such; the container's driver has
 * nothing to do with it from then on. Takes over the reference, also on failure. Such an image is
 * read-only, and one file: it has no parent, and no extents elsewhere. */
int dr_image_enter(struct dr_image *image, struct dr_file *file, struct dr_error *err);

/* The file that the image's name leads to. */
static inline struct dr_file *dr_image_named_file(const struct dr_image *image)
{
    return image->files[image->contained ? 1 : 0];
}

struct dr_image *dr_image_ref(struct dr_image *image);
/* The last reference closes: flush and end_write first if it was written (a failure is in err).
 * NULL allowed. */
int dr_image_unref(struct dr_image *image, struct dr_error *err);

/* One image without its chain; path: any name of an image. format NULL = probe. flags: enum
 * dr_open_flag. */
int dr_image_open(struct dr_fs *fs, const char *path, const char *format, unsigned flags,
                  struct dr_image **image, struct dr_error *err);
struct dr_gate;
struct dr_image_how {
    const struct dr_gate *gate; /* NULL: what the environment and the system allow */
    const char *data_file;      /* NULL: as the image records it */
    const char *key_secret;     /* the secret with its password; NULL: as its name says */
};
int dr_image_open_how(struct dr_fs *fs, const char *path, const char *format, unsigned flags,
                      const struct dr_image_how *how, struct dr_image **image,
                      struct dr_error *err);

/* A frozen image becomes writable (commit into a parent) and frozen again. The caller is its only
 * writer. -EBUSY: others wrote to it since it was opened with FORCE_SHARE, so what is known of it
 * may be out of date. A chain that it is in goes on treating it as frozen: make another one
 * (dr_chain_tail with 0 will do) for what follows. */
int dr_image_thaw(struct dr_image *image, bool unchanged, struct dr_error *err);
int dr_image_freeze(struct dr_image *image, struct dr_error *err);
/* Freeze an image whose flush fails: what was not flushed is given up, and the unclean mark stays.
 */
void dr_image_give_up(struct dr_image *image);

/* Flush the image and mark it as closed well; it may be written to again. */
int dr_image_settle(struct dr_image *image, struct dr_error *err);
/* A new image of this format over files[i] of another one, which both have from then on: for a disk
 * that goes on with that file alone. Its flags are those of the other, but for UNCHANGED. Only one
 * of the two may be written to. */
int dr_image_over(struct dr_image *image, unsigned i, const char *format, struct dr_image **over,
                  struct dr_error *err);
/* The image, which was settled, is frozen for good: the file `kept` stays open for writing in the
 * hands of another image. Cannot fail. */
void dr_image_leave(struct dr_image *image, const struct dr_file *kept);

/* files[i] as it is now, pinned: a driver may put another file in its place while others use the
 * image. Ends with dr_file_unpin. */
struct dr_file *dr_image_file(struct dr_image *image, unsigned i);

/* fmt->set_backing with its arguments (format.h), while no flush of the image runs. Others may read
 * and write the image meanwhile. */
int dr_image_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                         const char *format, unsigned flags, struct dr_error *err);

/* Make durable whatever the files have in the machine's memory only: a process that was killed may
 * have left it there, and what builds on it could reach the disk first. Also when nothing was
 * written here. */
int dr_image_harden(struct dr_image *image, struct dr_error *err);

/* Do what a [page] callback needs that has returned -EAGAIN: `while ((r = callback()) == -EAGAIN &&
 * (r = dr_image_satisfy()) == 0);` and dr_hold_end() in the end. image->lock is held, dropped for
 * the I/O and held again on return. off: the guest offset at hand. */
int dr_image_satisfy(struct dr_image *image, struct dr_hold *hold, uint64_t off,
                     struct dr_error *err);
void dr_hold_end(struct dr_hold *hold); /* image->lock held */

/* Tell what this image alone has: fmt->map, with pages loaded as needed. Takes the lock itself. */
int dr_image_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                 struct dr_error *err);

/* The driver's callbacks of the same names, with image->lock held. The flusher makes sure that what
 * a reservation frees can be remembered, whatever becomes of it. A driver calls these for clusters
 * that no request can reach, behind the end of the disk. */
int dr_image_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                     uint32_t host_len, struct dr_reservation *r, struct dr_error *err);
void dr_image_publish(struct dr_image *image, struct dr_reservation *r);
void dr_image_cancel(struct dr_image *image, struct dr_reservation *r);

/* begin_write if this open has not done it yet (for this kind of change). */
int dr_image_begin(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err);

/* Flush in the one right order (flush.c): data, then metadata by levels, each durable before the
 * next. Also what was freed before comes back to use. */
int dr_image_flush(struct dr_image *image, struct dr_error *err);
/* The same, but what was freed is not punched and does not come back to use before the next flush:
 * while requests wait, or where they would wait for the file. */
int dr_image_flush_keep(struct dr_image *image, struct dr_error *err);

/* For a driver that edits many pages by itself, between two callbacks of [page] kind: flush if so
 * many are dirty that writers had better wait. */
int dr_image_relieve(struct dr_image *image, struct dr_error *err);

/* Flush until nothing is dirty: what a flush releases may dirty counts again. */
int dr_image_flush_all(struct dr_image *image, struct dr_error *err);

/* Snapshots inside an image (internal-snapshots.c): the driver's callbacks, with every writer of
 * the image kept out. -ENOTSUP: the format has none. Durable on return. The caller holds no place
 * of the image. */
int dr_image_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err);
int dr_image_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err);
int dr_image_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err);
int dr_image_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                           struct dr_error *err);
/* Bitmaps (bitmaps.c), wherever the image keeps them: inside by its driver, else in a file beside
 * it. As the driver's callbacks of these names. -ENOTSUP: it has no place for any. -EBADMSG: the
 * file beside it is damaged. change: the caller has claimed the disk; durable on return. What
 * writes to the image waits until it is durable. change_live: what writes waits for changes of
 * memory only, unless nothing was written yet; 1: such a change needs dr_image_bitmap_change(),
 * with the disk's requests kept out, and nothing was done. */
bool dr_image_bitmaps_inside(const struct dr_image *image);
int dr_image_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                         struct dr_error *err);
int dr_image_bitmap_read(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                         struct dr_error *err);
int dr_image_bitmap_change(struct dr_image *image, const struct dr_bitmap_change *change,
                           struct dr_error *err);
int dr_image_bitmap_change_live(struct dr_image *image, const struct dr_bitmap_change *change,
                                struct dr_error *err);
/* Call step, which reads and writes no file, while no change of the image is under way and nobody
 * asks for its bitmaps. The caller holds none of the image's locks. */
void dr_image_quietly(struct dr_image *image, void (*step)(void *user), void *user);
/* What a bitmap has by now, also while it notes changes, in two steps: what is stored of it, and
 * what was noted since the bitmaps were stored, which an enabled one has, too. The second reads no
 * file; it is exact with every writer kept out. Bitmaps are neither changed nor stored in between:
 * the caller has claimed the disk. -ENOENT, -EUCLEAN: it is inconsistent. */
int dr_image_bitmap_stored(struct dr_image *image, const char *name, struct dr_marks *into,
                           bool *enabled, struct dr_error *err);
void dr_image_bitmap_noted(struct dr_image *image, struct dr_marks *into);
/* The bitmap, which may be inconsistent, has exactly these from now on, and is trusted again. The
 * same conditions as for change. Interrupted, it is inconsistent or, inside an image, gone. */
int dr_image_bitmap_rebuild(struct dr_image *image, const char *name, const struct dr_marks *ranges,
                            struct dr_error *err);
/* The file of bitmaps beside an image is called like it, with this behind (bitmap-file.h). */
#define DR_BITMAP_FILE_SUFFIX ".drover-bitmaps"
/* Does the file of bitmaps beside the image, which nobody writes to, say that somebody does? Then
 * that writer was interrupted. */
bool dr_bitmaps_left_in_use(struct dr_image *image);
/* Let the file say that nobody does, and none of its bitmaps is trusted. The image is writable. */
int dr_bitmaps_settle(struct dr_image *image, struct dr_error *err);
/* Remove the file of bitmaps beside an image whose files[0] is, or was, at path. Nothing happens
 * where there is none. */
int dr_bitmaps_unlink(struct dr_fs *fs, const char *path, struct dr_error *err);
/* How many snapshots there are. */
int dr_image_snapshot_count(struct dr_image *image, size_t *n, struct dr_error *err);
/* The id, malloc'ed, of the first snapshot that `text` means: with ids_first one with that id, else
 * one with that name; without, the other way round. -ENOENT. */
int dr_image_snapshot_find(struct dr_image *image, const char *text, bool ids_first, char **id,
                           struct dr_error *err);
/* The image, just opened for reading, shows the snapshot that text means: an id, else a name, or
 * "snapshot.id=ID", "snapshot.name=NAME", or both with a comma between. */
int dr_image_snapshot_show(struct dr_image *image, const char *text, struct dr_error *err);

/* The callbacks of the same names, for an image that is open for writing or, but for fill, for
 * reading. fill: off and len are multiples of the unit, unless coded_len says that buf is one
 * unit's bytes, coded; durable with the next flush. One thread at a time asks for holes. */
int dr_image_views_begin(struct dr_image *image, struct dr_views *views, struct dr_error *err);
int dr_image_views_hole(struct dr_image *image, uint64_t off, uint64_t *len, bool *hole,
                        struct dr_error *err);
int dr_image_views_fill(struct dr_image *image, const struct dr_views *views, const void *buf,
                        uint32_t coded_len, uint64_t off, uint64_t len, struct dr_error *err);
int dr_image_views_end(struct dr_image *image, struct dr_error *err);

/* The coded bytes in this range of a file are other ones from now on. Nobody holds the place of a
 * unit there. */
void dr_decoded_forget(struct dr_image *image, const struct dr_file *file, uint64_t host,
                       uint64_t len);

/* Names of images (name.c): a path, or FORMAT:PATH#MEMBER for a format with DR_FORMAT_MEMBERS. If
 * what stands behind the colon names a file as a whole, there is no member; else the last '#'
 * begins it. */
struct dr_name {
    const struct dr_format *fmt; /* NULL = not said: a plain path */
    char *file, *member;         /* malloc'ed; member NULL = none */
};
int dr_name_parse(struct dr_fs *fs, const char *name, struct dr_name *n, struct dr_error *err);
void dr_name_clear(struct dr_name *n);

/* Which disk it is: files[0]'s id, unlike for each member. Equal for what dr_name_identify says of
 * a name and dr_image_id of the image that was opened by it. */
struct dr_file_id dr_image_id(const struct dr_image *image);
struct dr_file_id dr_member_id(struct dr_file_id id, const char *member);
int dr_name_identify(struct dr_fs *fs, const char *name, struct dr_file_id *id,
                     struct dr_error *err);

/* Which format is the image at path? Never reads more than 4 KiB. -ENOTSUP: it is compressed as a
 * whole, or something else that must not be taken for raw. */
int dr_probe(struct dr_fs *fs, const char *path, unsigned file_flags, const struct dr_format **fmt,
             struct dr_error *err);
/* The same of the bytes that an image begins with: 4 KiB of them, or all there are. */
int dr_probe_bytes(const uint8_t *head, size_t got, const char *path, const struct dr_format **fmt,
                   struct dr_error *err);
/* -ENOTSUP, and what it is: not a disk image, but something else that is known by its first bytes.
 */
int dr_refuse_foreign(const uint8_t *head, size_t got, const char *path, struct dr_error *err);
const struct dr_format *dr_format_find(const char *name); /* NULL = none */
const struct dr_format *dr_format_at(size_t i);           /* NULL past the end; raw is last */
/* Tests only: one more driver, first in the order. Not thread-safe. */
void dr_format_register(const struct dr_format *fmt);

/* ------------------------------------------------------------------ locks of ranges (inflight.c)
 *
 * Each image has them for its units, and a job for what it copies. */

struct dr_ranges *dr_ranges_new(void);
void dr_ranges_free(struct dr_ranges *ranges);

/* A held or awaited range; lives on the stack of the thread that holds it. */
struct dr_range {
    uint64_t off, len;
    bool exclusive;
    struct dr_range *prev, *next;
    struct dr_range_slot *slot; /* NULL: the range is in the list */
};
/* Waits, first come first served, until no earlier range conflicts (overlap, one of them
 * exclusive). */
void dr_range_lock(struct dr_ranges *ranges, struct dr_range *range, uint64_t off, uint64_t len,
                   bool exclusive);
void dr_range_unlock(struct dr_ranges *ranges, struct dr_range *range);

/* ------------------------------------------------------------------ chains (chain.c) */

/* Takes over the references in images[]. NULL = out of memory (references are dropped). */
struct dr_chain *dr_chain_new(struct dr_image *const *images, size_t n);
struct dr_chain *dr_chain_ref(struct dr_chain *chain);
int dr_chain_unref(struct dr_chain *chain, struct dr_error *err);

/* May a chain have n images? -ELOOP says what to do. path: the image on top. Also asked by whoever
 * puts an image on another, before anything is written. */
int dr_chain_check_length(const char *path, size_t n, struct dr_error *err);
size_t dr_chain_bound(void);
/* Tests only: another bound, 0 = DR_CHAIN_MAX again. */
void dr_chain_set_bound(size_t n);

/* Images of a chain that nobody else uses yet were thawed or frozen since it was made: begin its
 * index again. Cannot fail; without memory look-ups ask layer by layer. */
void dr_chain_renew_index(struct dr_chain *chain);

/* The chain above its index `first`: images[first..]; shares the images. NULL = out of memory. */
struct dr_chain *dr_chain_tail(struct dr_chain *chain, size_t first);

/* Where bytes live, seen through images[first..]. A place stays valid (is not reused) until
 * dr_place_done. */
struct dr_place {
    struct dr_extent ext; /* HOLE: nobody has it; it reads as zeros */
    size_t owner; /* index of the image that answers; n for HOLE; for bytes past a parent's end the
                     image that ends (kind ZERO, past_end set) */
    bool past_end;
    struct dr_image *pinned; /* private */
    unsigned ticket;         /* private */
};

/* off + len <= images[first]->size. A shorter image below ends the look-up: what is past its end is
 * zero, whatever lies deeper. */
int dr_chain_map(struct dr_chain *chain, size_t first, uint64_t off, uint64_t len,
                 struct dr_place *place, struct dr_error *err);
/* As dr_chain_map over images[first..last) only: HOLE when none of those has it. */
int dr_chain_map_part(struct dr_chain *chain, size_t first, size_t last, uint64_t off, uint64_t len,
                      struct dr_place *place, struct dr_error *err);
/* Do not write to, drop from or flush a chain while holding a place of it: the flush waits for the
 * place. */
void dr_place_done(struct dr_place *place);

/* Shorten a DATA place to what the host's file really has: *zero = the bytes there are a hole of
 * the file (read as zeros, unread); ext.len is cut to the run. Changes nothing for other kinds. */
int dr_place_sparse(struct dr_place *place, bool *zero, struct dr_error *err);

/* ------------------------------------------------------------------ the index (index.c)
 *
 * Chains keep what they have found out about which of their frozen images owns a range. The
 * limit of dr_cache_limits.index is for all of them together: what is too much is dropped, and
 * found out again. */
size_t dr_index_bytes(void); /* in use */

/* ------------------------------------------------------------------ I/O (io.c: the only data
 * mover)
 *
 * `at` is the image of the chain that is read from or written to; what it does not hold comes from
 * images[at+1..], and zeros where a shorter one of those has ended. off + len <= images[at]->size,
 * else -EINVAL. Changes through images[0] call the chain's hooks, but not those by fill and drop,
 * which jobs make without changing what the guest reads. */
int dr_chain_read(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                  struct dr_error *err);
/* Like read, but what lies past the end of images[at] is zeros. */
int dr_chain_read_padded(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                         struct dr_error *err);
int dr_chain_write(struct dr_chain *chain, size_t at, const void *buf, uint64_t off, size_t len,
                   struct dr_error *err);
/* The same, by one durable write where the bytes are overwritten in place and the metadata that
 * leads to them is durable already; *durable = that was so: else a flush has to follow. */
int dr_chain_write_durable(struct dr_chain *chain, size_t at, const void *buf, uint64_t off,
                           size_t len, bool *durable, struct dr_error *err);
/* flags: DR_MAY_UNMAP, DR_EXPLICIT. */
int dr_chain_zero(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, unsigned flags,
                  struct dr_error *err);
int dr_chain_discard(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                     struct dr_error *err);
/* Write buf, but only where images[at] is (still) a HOLE, looked at under the unit's lock. buf NULL
 * = zeros. */
int dr_chain_fill(struct dr_chain *chain, size_t at, const void *buf, uint64_t off, uint64_t len,
                  struct dr_error *err);
/* One coded unit, like dr_chain_write_coded, but only where all of it is (still) a HOLE. */
int dr_chain_fill_coded(struct dr_chain *chain, size_t at, const void *coded, uint32_t coded_len,
                        uint64_t off, uint64_t len, struct dr_error *err);
/* Make [off, off+len) a HOLE of images[at], whole units only (partial units at the edges are left
 * alone): what is below shows. For commit (emptying) and drop-equal. -ENOTSUP. */
int dr_chain_drop(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                  struct dr_error *err);
/* dr_chain_drop, but only of what may() still agrees to give up. It is asked under the lock that
 * keeps writers out of the units, so what it finds is true until they are dropped; it may read. */
int dr_chain_drop_if(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                     bool (*may)(void *user, uint64_t off, uint64_t len), void *user,
                     struct dr_error *err);
/* Whole units of images[at] which read as zeros give up their place, as far as that takes no bytes
 * to say: they become nothing where no image below shows anything but zeros, else zeros; in a flat
 * image, a hole of the file. The view does not change. may: NULL, or asked under the units' lock
 * whether they still read as zeros. -ENOTSUP: of some it takes bytes to say so. */
int dr_chain_vacate(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                    bool (*may)(void *user, uint64_t off, uint64_t len), void *user,
                    struct dr_error *err);
/* Move the units of [off, off+len) that stand behind the length which dr_image_compact_begin has
 * chosen into free places before it, as long as there are any. */
int dr_chain_lower(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                   struct dr_error *err);
/* The driver's check, without repairs, of an image that others write to meanwhile. No place that is
 * freed is used again before it returns, and counts are raised before anything leads to what they
 * count, so nothing contradicts itself on disk; but for tables and their copies, which may be read
 * while they are written. So what this finds may be no damage: with writers kept out another check
 * must tell. Those who begin to write to the image, or need a longer refcount table, wait. */
int dr_image_check_beside(struct dr_image *image, struct dr_check_result *result,
                          struct dr_error *err);
/* The driver's callbacks of the same names (formats/format.h), with nobody writing to the image.
 * finish also cuts the files. Drivers without them are only asked to cut. */
int dr_image_compact_begin(struct dr_image *image, struct dr_error *err);
/* Behind begin; others may write meanwhile. */
int dr_image_compact_look(struct dr_image *image, struct dr_error *err);
bool dr_image_compact_moves(struct dr_image *image, const struct dr_extent *ext);
void dr_image_compact_spare(struct dr_image *image, const struct dr_extent *ext);
uint64_t dr_image_compact_length(struct dr_image *image);
int dr_image_compact_finish(struct dr_image *image, bool *again, struct dr_error *err);
void dr_image_compact_end(struct dr_image *image);
/* Copy [src_off, +len) of src's file bytes, a DATA place of another chain, without passing through
 * memory, where images[at] is written whole units at a time; *copied may be less than len;
 * -ENOTSUP: read and write. */
int dr_chain_copy_from(struct dr_chain *chain, size_t at, uint64_t off, struct dr_file *src,
                       uint64_t src_off, uint64_t len, uint64_t *copied, struct dr_error *err);
/* For a driver that makes room: copy bytes of a file to another place in it, which nothing leads to
 * yet. What is behind the file's end reads as zeros. */
int dr_copy_within(struct dr_file *file, uint64_t from, uint64_t to, uint64_t len,
                   struct dr_error *err);
/* Write one coded unit (convert -c): in_len coded bytes that decode to [off, off+len). */
int dr_chain_write_coded(struct dr_chain *chain, size_t at, const void *coded, uint32_t coded_len,
                         uint64_t off, uint64_t len, struct dr_error *err);
/* images[at] gets this size; what is new reads as zeros, whatever lies below. The caller is its
 * only user. -ENOTSUP. */
int dr_chain_resize(struct dr_chain *chain, size_t at, uint64_t size, struct dr_error *err);
/* Give [off, off+len) of images[at], which reads as zeros, a place in its files: holes of them
 * (METADATA), reserved, or written. The view does not change. */
int dr_chain_allocate(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                      enum dr_preallocation how, struct dr_error *err);
/* dr_image_harden for images[first..]: before something durable relies on what they show. */
int dr_chain_harden(struct dr_chain *chain, size_t first, struct dr_error *err);
/* Every dirty image of images[at..], deepest first. */
int dr_chain_flush(struct dr_chain *chain, size_t at, struct dr_error *err);

/* ------------------------------------------------------------------ disks (disk.c, swap.c) */

#define DR_KEPT_BUCKETS 64

struct dr_disk {
    struct dr_fs *fs;
    unsigned flags;
    _Atomic(struct dr_chain *) chain; /* swapped only with the gate closed and nobody past it */

    /* the gate */
    struct dr_stripe inside[DR_STRIPES];   /* requests past the gate, and those that came: swap.c */
    struct dr_stripe flushing[DR_STRIPES]; /* flushes at work, which are not past it */
    _Atomic bool closed;                   /* to requests */
    _Atomic bool flushes_closed;           /* to flushes, somewhat earlier */
    _Atomic bool switching;                /* a switch is being prepared */
    pthread_mutex_t gate_lock; /* taken to close and open, and by those who meet a closed gate */
    pthread_cond_t gate_cond;
    unsigned waiting, let_through; /* requests; under gate_lock, as is opened */
    uint64_t opened;               /* how often the gate was opened again */
    const char *claim;             /* who changes the graph; under gate_lock, as the next two */
    bool lent;                     /* others may change bitmaps beside that */
    bool borrowed;                 /* somebody does */
    struct dr_hooks hooks;

    /* Texts that were handed out: they live as long as the disk, whatever becomes of the chain. */
    struct dr_kept *_Atomic kept[DR_KEPT_BUCKETS];
    pthread_mutex_t kept_lock;
};

/* As dr_open, on any file system. */
int dr_open_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               struct dr_disk **disk, struct dr_error *err);

/* One request past the gate; lives on the stack of the thread that makes it. */
struct dr_pass {
    struct dr_chain *chain;
    unsigned stripe;
};
/* Pass the gate: pass->chain, which is returned too, stays the disk's chain until dr_disk_leave.
 * Takes no lock while the gate is open. A thread holds at most one pass of a disk, and only for one
 * request: a swap waits for it, and everybody waits for the swap. */
struct dr_chain *dr_disk_enter(struct dr_disk *disk, struct dr_pass *pass);
void dr_disk_leave(struct dr_disk *disk, struct dr_pass *pass);

/* Do requests use the disk: is one past the gate, or has one come since the last look? *seen is how
 * many had come then, 0 before the first look; it may have wrapped around. */
bool dr_disk_busy(const struct dr_disk *disk, uint32_t *seen);

/* The present chain with a reference of its own, for what takes longer than a request; ends with
 * dr_chain_unref. The disk may get another chain meanwhile: then this one reads as the disk did,
 * as long as nobody changes its images, and must not be written to. */
struct dr_chain *dr_disk_chain(struct dr_disk *disk);

/* Flush the present chain. The gate may be closed meanwhile, and the disk get another chain by
 * dr_disk_exchange: a flush takes long, and requests need not wait for it. */
int dr_disk_flush(struct dr_disk *disk, struct dr_error *err);

/* Run step while no request is past the gate, and no flush is at work. Flushes the disk first, with
 * the gate open, so that little is left for step to flush; then keeps new flushes out, waits for
 * those at work, closes the gate, waits for the requests inside, runs step, and opens it again.
 * step may set *fresh: the disk's chain from then on, whose reference is taken
 * over; the hooks go with it. When step fails (fresh is NULL then), the disk is as before. step
 * must not enter this disk's gate. *pause_ns (may be NULL): how long requests were held up. Callers
 * come one after another, and between two of them every request that waited gets in. */
typedef int (*dr_quiet_step)(void *user, struct dr_chain *present, struct dr_chain **fresh,
                             struct dr_error *err);
int dr_disk_quiesce(struct dr_disk *disk, dr_quiet_step step, void *user, uint64_t *pause_ns,
                    struct dr_error *err);
/* The same without the flush: to undo something after a failure, which may well make the flush
 * fail, too. */
int dr_disk_quiesce_unflushed(struct dr_disk *disk, dr_quiet_step step, void *user,
                              uint64_t *pause_ns, struct dr_error *err);
/* The same beside flushes at work, which go on with the chain they have: for a step that only puts
 * another chain in place, with the same images open, and waits for no file. */
int dr_disk_exchange(struct dr_disk *disk, dr_quiet_step step, void *user, uint64_t *pause_ns,
                     struct dr_error *err);
/* Announce a switch that is being prepared, and take that back: requests that would wait for the
 * disk inside the gate (DR_FUA) wait outside until then, since the switch would wait for them. */
void dr_disk_announce(struct dr_disk *disk, bool begin);
bool dr_disk_is_about_to_change(const struct dr_disk *disk);
/* dr_disk_quiesce with nothing to do but to put fresh in the place of the chain. Takes over the
 * reference, also on failure. */
int dr_disk_swap(struct dr_disk *disk, struct dr_chain *fresh, struct dr_error *err);

/* Only one operation at a time changes the graph of a disk or the place of its data. what: its
 * name, a string that lives on; -EBUSY names the one that has the claim. */
int dr_disk_claim(struct dr_disk *disk, const char *what, struct dr_error *err);
void dr_disk_unclaim(struct dr_disk *disk);
/* A claim that others need not wait for with changes of bitmaps, as long as it is lent: its owner
 * lends it, and takes it back, for which it waits for such a change, before it touches them itself.
 * dr_disk_borrow is dr_disk_claim for these changes, and dr_disk_unborrow its end. */
void dr_disk_lend(struct dr_disk *disk);
void dr_disk_take_back(struct dr_disk *disk);
int dr_disk_borrow(struct dr_disk *disk, const char *what, struct dr_error *err);
void dr_disk_unborrow(struct dr_disk *disk);

/* From its return on every change that the guest makes calls the hook / from its return on the hook
 * is not called any more. A hook is known by its user pointer. */
int dr_disk_hook(struct dr_disk *disk, const struct dr_hook *hook, struct dr_error *err);
/* dr_disk_hook for a step of dr_disk_quiesce: no request is past the gate. */
int dr_disk_hook_quiet(struct dr_disk *disk, const struct dr_hook *hook, struct dr_error *err);
void dr_disk_unhook(struct dr_disk *disk, const void *user);

/* The real path of a directory. In a file system without mkdir, where they exist by being named, a
 * directory that nothing is in yet is what its name says. *real is malloc'ed. */
int dr_real_dir(struct dr_fs *fs, const char *dir, char **real, struct dr_error *err);

/* Does real (a real path) lie in the tree of the directory that path is in? path may be a link, or
 * not exist yet. */
int dr_gate_own_tree(struct dr_fs *fs, const char *path, const char *real, bool *inside,
                     struct dr_error *err);

/* Is a file at path, named by the image at from (real paths), allowed? The text says how to allow
 * it. */
int dr_gate_check(struct dr_fs *fs, const char *from, const char *path,
                  const struct dr_open_options *options, struct dr_error *err);

/* The same for a file that may not be there yet: its directory counts. */
int dr_gate_check_new(struct dr_fs *fs, const char *from, const char *path,
                      const struct dr_open_options *options, struct dr_error *err);

/* Where opening the chain finds the parent that child records: of the places where it may be the
 * first that the gate allows and that has the right id. Malloc'ed. */
int dr_backing_locate(struct dr_image *child, const struct dr_open_options *options, char **path,
                      struct dr_error *err);

#endif
