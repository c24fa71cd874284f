/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of src/core share among themselves and nobody else needs. */
#ifndef DR_CORE_INTERNAL_H
#define DR_CORE_INTERNAL_H

#include "base/cleanup.h"
#include "core/core.h"

/* ------------------------------------------------------------------ inflight.c, see core.h for
 * ranges */

/* Readers and in-place writers stand in an epoch from before map until after their I/O. Entering
 * takes no lock. */
unsigned dr_epoch_enter(struct dr_ranges *ranges);
void dr_epoch_leave(struct dr_ranges *ranges, unsigned ticket);
/* Wait until everybody who entered before the call has left. One caller at a time. */
void dr_epoch_drain(struct dr_ranges *ranges);

/* ------------------------------------------------------------------ pages.c */

struct dr_cache *dr_cache_new(void);
void dr_cache_free(struct dr_image *image);

/* pages-load.c: read what need names and put it into the cache and the hold. image->lock held,
 * dropped for the I/O. */
int dr_cache_load(struct dr_image *image, struct dr_need need, struct dr_hold *hold,
                  struct dr_error *err);

/* pages-flush.c. Dirty pages that wait (not sealed). image->lock held. */
size_t dr_cache_dirty(const struct dr_cache *cache);
/* So many that writers had better flush. image->lock held. */
bool dr_cache_is_crowded(const struct dr_cache *cache);
/* Nothing waits and nothing is being written: what the pages say is durable. image->lock held. */
bool dr_cache_is_clean(const struct dr_cache *cache);

/* Flush: seal all dirty pages; write the sealed sectors of one level (image->lock NOT held; *wrote
 * = there were any); at the end forget them (ok) or make them dirty again. */
void dr_cache_seal(struct dr_cache *cache);
int dr_cache_write_level(struct dr_image *image, unsigned level, bool *wrote, struct dr_error *err);
/* False: not ok, and a sector has edits of another level since: no later flush can keep the order.
 */
bool dr_cache_unseal(struct dr_image *image, bool ok);

/* ------------------------------------------------------------------ decoded.c */

/* Bytes of the coded unit at ext (DR_CODED). The caller holds the place. once: the caller will not
 * ask for the unit again, so if it is not in the cache it need not be put there. */
int dr_decoded_read(struct dr_image *image, const struct dr_extent *ext, uint8_t *buf, size_t len,
                    bool once, struct dr_error *err);
void dr_decoded_close(const struct dr_image *image);

/* ------------------------------------------------------------------ limits.c */

enum dr_cache_kind { DR_CACHE_METADATA, DR_CACHE_DECODED, DR_CACHE_INDEX, DR_CACHE_KINDS };

/* The bytes that all caches of this kind in the process may take together. */
uint64_t dr_cache_limit(enum dr_cache_kind kind);
/* -EINVAL: the environment asks for something impossible. */
int dr_cache_limits_check(struct dr_error *err);

/* ------------------------------------------------------------------ flush.c */

struct dr_flusher *dr_flusher_new(void);
void dr_flusher_free(struct dr_flusher *flusher);

/* Until dr_flush_resume no flush of the image begins; waits for the one that runs. image->lock not
 * held. Those who want a flush meanwhile wait. */
void dr_flush_hold(struct dr_image *image);
void dr_flush_resume(struct dr_image *image);
/* Until this is taken back, what is freed is neither punched nor used again, so that whoever reads
 * tables past the page cache finds what they lead to. image->lock not held. */
void dr_keep_freed(struct dr_image *image, bool keep);

/* ------------------------------------------------------------------ change.c */

enum dr_change_mode {
    DR_CHANGE_WRITE,    /* the source's bytes, everywhere */
    DR_CHANGE_FILL,     /* the source's bytes, where this image is a HOLE */
    DR_CHANGE_ZERO,     /* this image says zeros */
    DR_CHANGE_DROP,     /* this image is a HOLE; whole units */
    DR_CHANGE_CODED,    /* one coded unit */
    DR_CHANGE_ALLOCATE, /* a place for what reads as zeros and has none, and zeros in it, made as
                           zero_flags say; what reads as zeros without a driver (flat) likewise */
    DR_CHANGE_LOWER,    /* the unit as it is, nearer to the file's beginning; whole units */
};

/* The bytes for guest offsets from `off` on: memory, a file's bytes, a coded unit; or zeros, if it
 * is none of them. */
struct dr_change_source {
    const uint8_t *buf;
    struct dr_file *file;
    uint64_t file_off;
    uint64_t off;
    const void *coded; /* one coded unit, with coded_len */
    uint32_t coded_len;
};

struct dr_change {
    struct dr_chain *chain;
    size_t at;
    enum dr_change_mode mode;
    const struct dr_change_source *src;
    unsigned zero_flags; /* enum dr_file_zero_flag */
    bool no_bytes;       /* -ENOTSUP rather than zeros as bytes */
    bool guest;          /* the chain's hooks are called */
    bool keeps_view;     /* what can be read here stays the same: bitmaps do not note it */
    bool *not_durable;   /* NULL, or: make it durable where one write does, else set this */
    /* NULL, or asked under the exclusive lock of [off, off+len): false = leave it as it is. */
    bool (*may)(void *user, uint64_t off, uint64_t len);
    void *user;
};

/* Change [off, off+len) of images[at]; *done = how much of it, from off on, was dealt with. */
int dr_change_run(const struct dr_change *c, uint64_t off, uint64_t len, uint64_t *done,
                  struct dr_error *err);

/* ------------------------------------------------------------------ swap.c */

/* Does any of them want to see data before it changes? */
bool dr_hooks_any_before(const struct dr_chain *chain);
int dr_hooks_before(struct dr_chain *chain, uint64_t off, uint64_t len, struct dr_error *err);
void dr_hooks_after(const struct dr_chain *chain, uint64_t off, uint64_t len);

/* ------------------------------------------------------------------ index.c */

/* One for each run of two or more frozen images, as a list; NULL = there is none, or no memory. The
 * array must outlive it. */
struct dr_index *dr_index_new(struct dr_image *const *images, size_t n);
void dr_index_free(struct dr_index *list);
/* The index that knows about images[i]; NULL = none, or it is out of use. */
struct dr_index *dr_index_at(struct dr_index *list, size_t i);
/* images[from..*owner) have nothing in [off, off+*len), after *len was cut. *owner may have
 * something there, or ends before; it may be the image behind the run. false: ask layer by layer.
 * May load pages. */
bool dr_index_find(struct dr_index *ix, size_t from, uint64_t off, size_t *owner, uint64_t *len);
/* How much of [off, off+len) dr_index_find will answer in one piece, as far as that is known: no
 * use in asking images above for more. */
uint64_t dr_index_reach(struct dr_index *ix, uint64_t off, uint64_t len);
/* The image has become writable, and nobody has written yet. */
void dr_index_thawed(struct dr_image *image);

/* ------------------------------------------------------------------ image.c */

/* The parts of dr_image_harden: the bytes of the image's files, and that the name of one of them
 * leads to it. */
int dr_image_harden_files(struct dr_image *image, struct dr_error *err);
int dr_image_harden_name(struct dr_image *image, struct dr_file *file, struct dr_error *err);

/* dr_image_map with image->lock held; drops it while it loads pages. */
int dr_image_map_locked(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                        struct dr_error *err);

/* ------------------------------------------------------------------ bitmaps.c: bitmaps beside an
 * image */

/* Pieces of each file that are compared; tests make it 0. */
extern unsigned dr_noting_samples;

/* Before the first write of an open: if there are bitmaps beside the image, mark them as in use,
 * durably, and note changes from now on. begin_lock held. */
int dr_noting_begin(struct dr_image *image, struct dr_error *err);
/* All of the image is durable and nobody writes: store the bitmaps, then unmark them. After a
 * failure they stay in use. */
int dr_noting_end(struct dr_image *image, struct dr_error *err);
/* Forget what was noted; what is on disk stays in use. */
void dr_noting_drop(struct dr_image *image);
/* As the driver's callback `changed`. */
void dr_noting_changed(struct dr_image *image, uint64_t off, uint64_t len);
/* All of the disk counts as changed. */
void dr_noting_everything(struct dr_image *image);
/* May the disk get that size? -EFBIG: a bitmap would be too large. */
int dr_noting_check_size(struct dr_image *image, uint64_t size, struct dr_error *err);
/* The disk had another size before. */
void dr_noting_resized(struct dr_image *image, uint64_t old);

/* ------------------------------------------------------------------ name.c */

#define DR_CLEANUP_NAME __attribute__((cleanup(dr_name_clear)))

/* ------------------------------------------------------------------ gate.c */

struct dr_gate {
    struct dr_fs *fs;
    bool any;       /* DR_OPEN_ANY_PATH */
    char **allowed; /* real paths of directories, NULL-terminated */
};
int dr_gate_make(struct dr_gate *gate, struct dr_fs *fs, const struct dr_open_options *options,
                 struct dr_error *err);
void dr_gate_clear(struct dr_gate *gate);
/* May the image at `from` open the backing file at path? */
int dr_gate_pass(const struct dr_gate *gate, const char *from, const char *path,
                 struct dr_error *err);
/* The same for the file that was opened: the name may have been turned in between. */
int dr_gate_pass_file(const struct dr_gate *gate, const char *from, struct dr_file *file,
                      struct dr_error *err);
/* May the image at `from` open a further file of its own, an extent or a data file as `what` says,
 * at the real path `real`? */
int dr_gate_pass_further(const struct dr_gate *gate, const char *from, const char *real,
                         const char *what, struct dr_error *err);

/* ------------------------------------------------------------------ open.c */

int dr_chain_open(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                  struct dr_chain **chain, struct dr_error *err);

/* The format of an image whose file is open, unless *fmt says it; what is packed as a whole is
 * replaced by its plain bytes. (probe.c) */
int dr_probe_image(struct dr_image *image, const struct dr_format **fmt, struct dr_error *err);

#endif
