/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading the disks of an archive: what the files vma-read*.c share.
 *
 *   vma-read.c         open, close, and the frame of one extraction
 *   vma-read-next.c    the copy engine's next: extents, one after another, become items
 *   vma-read-work.c    its work: data and zeros of an item are checked, written, compared
 *   vma-read-damage.c  what is wrong with the archive: counted, merged, told
 *   vma-read-state.c   what the stages share
 *
 *   vma-guess.c        headers that are damaged, for a salvage
 *
 * vma-read.c calls next and work; these call damage and state and not each other.
 */
#ifndef DR_ARCHIVE_VMA_READ_H
#define DR_ARCHIVE_VMA_READ_H

#include "storage/source.h"
#include "archive/sums.h"
#include "archive/vma-format.h"
#include "archive/vma-seen.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/copy.h"

#define VMA_READ_BUFFER (512u * 1024) /* one write: what was read is still in the cache then */
#define VMA_READ_WINDOW (64u * 1024)  /* of headers that follow each other */

#define VMA_CHECKPOINT_NS (1000u * 1000 * 1000) /* between checkpoints, at least */

struct dr_vma {
    struct dr_fs *fs;
    struct dr_source *source;
    const char *name; /* for messages */
    struct dr_vma_header header;
    bool use_fd, done, salvage, any_header;
    bool uuid_known; /* with a wrong header: an extent has told it */
    bool odd[256];   /* disks that the header does not list, or not as they are */
    bool in_order;   /* tests: as if the source could not seek */
    void (*message)(void *user, const char *text);
    void *user;
    const struct dr_copy_clock *clock; /* tests bring their own; NULL = the system's */
};

/* As dr_vma_open, on any file system. */
int dr_vma_open_fs(struct dr_fs *fs, const char *path, const struct dr_vma_open_options *options,
                   struct dr_vma **vma, struct dr_error *err);

/* From a unit that is no extent to the next place where one may begin that stands at any byte: its
 * magic, or the part of it that is at the end of the unit. */
size_t vma_next_magic(const uint8_t unit[VMA_EXTENT_HEADER]);

/* ------------------------------------------------------------------ one extraction */

/* For an extraction that may be interrupted. */
struct vma_resume {
    /* Continue at this offset of the plain archive: the headers of extents before it are checked,
     * but their data is skipped. 0 = from the start. */
    uint64_t from;
    /* Called now and then: everything that the extents before off hold is durable in the targets. A
     * failure ends the extraction. NULL = not called. */
    int (*checkpoint)(void *user, uint64_t off, struct dr_error *err);
    void *user;
};

/* An extent on its way: header and, from a source that cannot seek, data. */
struct vma_chunk {
    struct vma_extent extent; /* only the slots that somebody wants */
    uint64_t off;             /* in the archive, of the byte behind the extent header */
    uint8_t *data;            /* NULL: read it from there */
    struct vma_chunk *next;   /* free ones */
    struct vma_chunk *all;    /* all there are */
};

struct vma_rate {
    const char *group;
    uint64_t rate; /* bytes a second */
    uint64_t next; /* when the next write may start, ns; under vma_read.lock */
};

struct vma_reading { /* of one disk */
    const struct dr_vma_disk *disk;
    const struct dr_vma_target *target; /* NULL = nobody wants it */
    struct vma_rate *rate;              /* NULL = no limit */
    uint64_t end;                       /* of what is written or compared, bytes */
    bool zeros;                         /* runs of zeros need work */
    struct vma_seen seen;
    bool cut;                      /* vmstate: what there was no room for was told */
    uint64_t expected;             /* vmstate: the next cluster */
    uint64_t zero_first, zero_n;   /* clusters of zeros that wait for more of their kind */
    uint64_t doubt_from, doubt_to; /* clusters from bytes that no checksum has vouched for yet */
};

struct vma_zeros {
    unsigned id;
    uint64_t first, n; /* clusters */
};

/* Damage that waits for its continuation. */
struct vma_pending {
    struct dr_vma_damage damage; /* len 0 = none */
    char why[512];
};

#define VMA_DAMAGE_KINDS (DR_VMA_HEADER + 1u)

enum vma_item_kind { VMA_ITEM_NONE, VMA_ITEM_DATA, VMA_ITEM_ZEROS };

struct vma_read {
    struct dr_vma *vma;
    const struct dr_vma_extract_options *o;
    struct vma_resume resume;
    struct dr_job *job;   /* the caller's; may be NULL */
    struct dr_file *file; /* the plain bytes, or NULL: one after another only */
    bool unpack; /* nobody wants the data, but to unpack them tells whether they are whole */
    struct vma_sums *sums;
    struct vma_reading disks[256]; /* by id; disk NULL = there is none */
    struct vma_rate rates[256];
    unsigned n_rates;
    const struct dr_copy_clock *clock;

    /* next's */
    uint64_t pos;          /* of the next extent */
    uint64_t passed;       /* guest bytes that needed no work, for progress */
    unsigned quiet;        /* extents since the last item */
    bool ended, broke_off; /* broke_off: the stream could not be read to its end */
    bool shifted;          /* something of unknown length is missing: extents may begin anywhere */
    uint64_t vouched;      /* plain bytes of the stream: see dr_source_vouched() */
    bool held;             /* the bytes at pos were read already: unit */
    uint8_t unit[VMA_EXTENT_HEADER];
    size_t unit_len; /* less than all of it: the archive ends there */
    uint8_t *window; /* with file: window_len bytes at window_off */
    uint64_t window_off;
    size_t window_len;
    uint64_t last_unit;                    /* offset of the last unit that was looked at */
    struct vma_zeros zeros[VMA_SLOTS + 1]; /* that wait to become items */
    unsigned n_zeros;
    struct vma_chunk *ready; /* waits to become an item */
    struct vma_seen_budget budget;
    uint64_t told_at;       /* the last extent with slots that name nothing; 0 = none */
    uint64_t checkpoint_at; /* time of the next one */

    _Atomic bool stopping; /* the run is about to end: nobody should wait any more */
    pthread_mutex_t lock;  /* all below, and the rates */
    pthread_cond_t idle;
    unsigned under_way; /* items between next and the end of work */
    struct vma_chunk *free_chunks, *all_chunks;
    struct dr_vma_extract_result result;
    struct vma_pending pending[VMA_DAMAGE_KINDS];
    pthread_mutex_t damage_lock; /* result's damage, pending and the caller's damage() */
};

/* dr_vma_extract within another call of the job. resume: NULL = all zeros. */
int vma_read_disks(struct dr_vma *vma, const struct dr_vma_extract_options *options,
                   const struct vma_resume *resume, struct dr_job *job,
                   struct dr_vma_extract_result *result, struct dr_error *err);

/* vma-guess.c: of sources that can be read at random */

/* The header as far as it can be true. -EINVAL (silently): no extent tells that this is an archive.
 */
int vma_guess_header(struct dr_vma *vma, struct dr_error *err);
/* Add the devices that have clusters in the archive and are not in the header. */
int vma_find_unlisted(struct dr_vma *vma, struct dr_error *err);

/* vma-read-state.c */

/* A chunk, taken from the free ones or new; NULL = out of memory. */
struct vma_chunk *vma_chunk_take(struct vma_read *x);
void vma_chunk_done(struct vma_read *x, struct vma_chunk *chunk); /* it is free again */
void vma_chunks_free(struct vma_read *x);
uint64_t vma_read_now(const struct vma_read *x); /* ns, of a clock that only goes forward */
int vma_flush_targets(const struct vma_read *x, struct dr_error *err);

/* vma-read-next.c */
int vma_read_next(void *user, struct dr_copy_item *item, struct dr_error *err);

/* vma-read-work.c */
int vma_read_work(void *user, struct dr_copy_item *item, uint8_t *const *buf, struct dr_error *err);

/* vma-read-damage.c */

/* Salvaging: count it, tell it merged with its neighbours, 0. Else tell it and fail, -EBADMSG. why
 * (NULL for the kinds that explain themselves): the reason, a whole line. Any thread. */
int vma_damage(struct vma_read *x, enum dr_vma_damage_kind kind, unsigned id, uint64_t off,
               uint64_t len, const char *why, struct dr_error *err);
void vma_damage_flush(struct vma_read *x);
/* The slot comes from bytes that no checksum has vouched for; and: a checksum may have come, so
 * that those before are as they were. By next only. */
void vma_doubt_note(struct vma_read *x, const struct vma_slot *s);
void vma_doubt_renew(struct vma_read *x);
/* The stream broke off: no checksum vouches any more for what was noted. */
void vma_doubt_tell(struct vma_read *x);
/* Before the first extent: what the header does not say, or not surely. */
int vma_damage_header(struct vma_read *x, struct dr_error *err);
/* After the last extent: what no extent had. */
int vma_damage_missing(struct vma_read *x, struct dr_error *err);
__attribute__((format(printf, 2, 3))) void vma_read_message(const struct vma_read *x,
                                                            const char *fmt, ...);

#endif
