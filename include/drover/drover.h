/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: copy-on-write disk images. Open a disk, read it, write it, ask where its bytes live.
 *
 * Conventions of every function here
 *  - Offsets, lengths and sizes are bytes, unless a name says otherwise.
 *  - The result is 0 or a negative errno value. The text of a failure is in the last argument,
 *    which may be NULL; it names the file, the offset and what was expected.
 *  - A pointer may be NULL where its comment says so. Otherwise NULL is refused with -EINVAL;
 *    functions that return no errno, such as dr_size(), must not be called with NULL. Unknown flags
 *    are refused with -EINVAL.
 *  - Results that a function hands out through a pointer are there only after success. Free with
 *    free() what a comment calls malloc'ed.
 *  - The library never prints, never exits and never aborts on bad input.
 *  - One struct dr_disk may be used from many threads at once, except in dr_close().
 */
#ifndef DROVER_DROVER_H
#define DROVER_DROVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DR_API __attribute__((visibility("default")))

/* The text of a failure. The caller owns it and initialises it with DR_ERROR_INIT, also before
 * using it again after a failure, because a text that is there is kept. */
struct dr_error {
    int errnum;      /* positive errno value, 0 = nothing failed */
    char text[2048]; /* no newline at its end; names stand in it as they are, but for passwords */
};
#define DR_ERROR_INIT \
    {                 \
        0, ""         \
    }

/* "MAJOR.MINOR.PATCH" of the library in use. Never NULL. */
DR_API const char *dr_version(void);

/* ------------------------------------------------------------------ formats */

struct dr_format_info {
    const char *name;
    bool can_write, can_create;
    bool can_back; /* its images may have a backing image */
    bool plain;    /* its images are nothing but the disk: a writer changes no metadata */
    const char *parent_format;  /* the only format their backing images can have; NULL = any */
    const char *default_parent; /* the format of one of which nothing is told; NULL = it must be */
};

/* The formats this library knows, index from 0 on. -ENOENT: no more. The strings live forever. */
DR_API int dr_format_list(size_t index, struct dr_format_info *info);

struct dr_create_option {
    const char *name, *type, *help; /* type: "str" "size" "bool (on/off)" "num" */
    const char *initial;            /* what holds when it is not given, or NULL */
};

/* The options NAME=VALUE for creating an image of this format, index from 0 on. -ENOENT: no
 * more; -EINVAL: no such format. */
DR_API int dr_format_option(const char *format, size_t index, struct dr_create_option *option);
/* The same of those that an image may be given later (dr_amend). */
DR_API int dr_format_amend_option(const char *format, size_t index,
                                  struct dr_create_option *option);

/* ------------------------------------------------------------------ notices */

/* Lines about what is no failure, but should be known: another program's lock on an image that is
 * read, say. notice is called with each, from any thread, also from several at once, and may call
 * this library; the text names the file and has no line end. NULL = nobody wants them, as in the
 * beginning. When this returns, calls of an earlier notice have returned, but when a notice itself
 * has called this. For the whole process. */
DR_API void dr_on_notice(void (*notice)(void *user, const char *text), void *user);

/* ------------------------------------------------------------------ memory */

/* Bytes that the caches of the whole process may take; 0 = leave as it is. Before this is called,
 * what the environment's DROVER_CACHE_METADATA, DROVER_CACHE_DECODED and DROVER_CACHE_INDEX say
 * (64M, for example). */
struct dr_cache_limits {
    uint64_t metadata; /* tables of open images; 64 MiB to begin with */
    uint64_t decoded;  /* compressed units that were read lately, decoded; 32 MiB */
    uint64_t index;    /* which image of a chain has what; 32 MiB */
};

/* May be called at any time, from any thread; what is over a new limit goes as the caches are used.
 * -EINVAL: a limit of less than 1 MiB; nothing is changed. */
DR_API int dr_set_cache_limits(const struct dr_cache_limits *limits, struct dr_error *err);

/* ------------------------------------------------------------------ opening */

struct dr_disk; /* an open disk: a chain of images, the top one first */

enum dr_open_flag {
    DR_OPEN_RDWR = 1 << 0,        /* writable top image; the others are always read-only */
    DR_OPEN_NO_BACKING = 1 << 1,  /* only the top image; what it does not hold reads as zeros */
    DR_OPEN_FORCE_SHARE = 1 << 2, /* read even while somebody writes; excludes RDWR */
    DR_OPEN_NO_FLUSH = 1 << 3,    /* dr_flush() writes metadata but asks no disk to be durable */
    DR_OPEN_NO_LOCK = 1 << 4,     /* take no locks at all (file systems without them) */
    DR_OPEN_ANY_PATH = 1 << 5,    /* names found inside images may point anywhere */
    DR_OPEN_NO_CHECK_ID =
        1 << 6, /* accept a parent whose content id does not match (repair tools) */
    DR_OPEN_NO_RECOVER = 1 << 7, /* RDWR: fail with -EUCLEAN instead of recovering an image that was
                                    not closed */
    DR_OPEN_UNCHANGED = 1 << 8,  /* RDWR: the caller promises that no byte readable at the top
                                    changes; content ids stay (rebase, stream) */
    DR_OPEN_DIRECT = 1 << 9,     /* past the host's page cache (O_DIRECT) where that is
                                    possible, else advise it to keep nothing */
    DR_OPEN_SALVAGE = 1 << 10,   /* open an image of which parts are missing, too: reads of those
                                    parts fail. Excludes RDWR */
    DR_OPEN_NO_FINGERPRINT = 1 << 11, /* what is recorded beside images of what their parents were
                                         (dr_fingerprint) is not compared */
    DR_OPEN_VERIFY = 1 << 12, /* read all of the top image's file first and compare the digests that
                                 the manifest of its machine (OVA, OVF) has of it. -EBADMSG: it has
                                 others; -ENOTSUP: nothing has digests of it */
};

struct dr_open_options {
    const char *format; /* of the top image; NULL = find out (raw if nothing fits). Unless
                           it is "raw", an image that is compressed as a whole is
                           unpacked (dr_set_unpacking) */
    unsigned flags;     /* enum dr_open_flag */
    const char *const *allow_paths; /* NULL or NULL-terminated: directories, besides an image's own,
                                       in which backing files and extents may be; added to the
                                       environment's DROVER_ALLOW_PATH (':' between) and
                                       /etc/drover/allow-paths (one a line) */
    const char *backing;        /* NULL, or a path to use instead of the recorded backing name */
    const char *backing_format; /* with backing; NULL = find out */
    const char *data_file; /* NULL, or a path to use instead of the data file that the top image
                              records, for formats whose data may stand in a file of its own */
    const char *snapshot;  /* NULL, or a snapshot inside the top image to show instead of the disk:
                              its id, or else its name, or as `qemu-img convert -l` takes it,
                              "snapshot.id=ID,snapshot.name=NAME". Only for reading. -ENOENT */
    const char
        *key_secret; /* NULL, or the id of the secret (dr_secret_set) that opens the top image,
                        which is encrypted; else its json: name may say one. Without, only
                        what is not encrypted can be had of it (dr_info, dr_check). -EACCES:
                        it is the wrong password; -ENOENT: there is no such secret */
};

/* Images that are compressed as a whole (gzip, bzip2, zstd, lzop, xz, lz4) are read as what is
 * inside. One that has no index and must be read at random is unpacked into a temporary file in
 * $TMPDIR (else /var/tmp) that has no name; opening takes that long. */
struct dr_unpacking {
    const volatile int *stop; /* when it is not 0, unpacking fails with -ECANCELED. NULL = never */
    void (*message)(void *user,
                    const char *text); /* told before a long one. Any thread. NULL = not */
    void *user;
};
/* For the whole process. NULL = none of it. Not to be called while images are being opened. */
DR_API void dr_set_unpacking(const struct dr_unpacking *how);

/* Passwords of encrypted images. An image that is opened by a json: name, or created, refers to its
 * password by the id of a secret, with QEMU's keys: json:{"driver": "luks", "key-secret": "sec0",
 * "file": {"driver": "file", "filename": "disk.luks"}}, for a qcow2 "encrypt.key-secret". Secrets
 * are of the whole process, are kept out of swap space where the system allows that, and are wiped
 * when they are forgotten. An image keeps no password: only opening it asks for the secret. Any
 * thread.
 *
 * Set or replace the secret called id: len bytes, at most DR_SECRET_MAX. data is copied. -EINVAL:
 * longer than that, or id is NULL. -ENOMEM. */
#define DR_SECRET_MAX 65536u
DR_API int dr_secret_set(const char *id, const void *data, size_t len);
/* Forget it; NULL = all of them. Nothing happens where there is none. */
DR_API void dr_secret_forget(const char *id);

/* Every path of an image may also be FORMAT:PATH#MEMBER: one disk of a file that holds several,
 * such as vma:backup.vma#drive-scsi0. #MEMBER may be left out if there is only one; if PATH#MEMBER
 * is itself the name of a file, it is that. A path that begins like this by chance is written
 * ./vma:... The functions below return malloc'ed strings, NULL = out of memory. */
/* The format that such a name says; NULL: it is a plain path. */
DR_API const char *dr_name_format(const char *name);
/* Is it the name of a disk on a server: an NBD or HTTP URL, or one of QEMU's spellings of them? */
DR_API bool dr_name_is_remote(const char *name);
/* The path of the file that name leads to: where name is a part of a file, of that file. */
DR_API char *dr_name_file(const char *name);
/* The same name as it is from any directory; links stay. */
DR_API char *dr_name_absolute(const char *name);
/* Turn `name`, which is relative to the directory of `path` as backing names are, into a path. */
DR_API char *dr_name_beside(const char *path, const char *name);

/* Open the disk at path. options may be NULL: read-only, defaults. On success *disk is the caller's
 * and ends with dr_close(); after a failure it is NULL. -EBUSY/-EAGAIN: locked by somebody;
 * -EACCES: a name inside the image points where it must not; -EINVAL: not an image of that format;
 * -ESTALE: a parent changed. */
DR_API int dr_open(const char *path, const struct dr_open_options *options, struct dr_disk **disk,
                   struct dr_error *err);

/* Flush, settle the image's "being written" mark, unlock, free. The handle is gone whatever the
 * result; a failure means that the last writes may be lost. NULL is allowed. */
DR_API int dr_close(struct dr_disk *disk, struct dr_error *err);

DR_API uint64_t dr_size(const struct dr_disk *disk);
DR_API bool dr_writable(const struct dr_disk *disk);
/* The smallest piece of which a write, if it covers all of it, copies nothing from a parent: the
 * top image's cluster or grain. A power of 2 from 512 to 2 MiB; 4096 in formats without such
 * pieces. */
DR_API uint32_t dr_block_size(const struct dr_disk *disk);

/* The chain, top first. index 0 is the top; NULL past the base, and of a path, where
 * there is no memory for it. The strings live until the disk is closed, also when its chain changes
 * meanwhile. */
DR_API size_t dr_chain_length(const struct dr_disk *disk);
DR_API const char *dr_image_path(const struct dr_disk *disk, size_t index);
DR_API const char *dr_image_format(const struct dr_disk *disk, size_t index);
/* Which packer made the image's file smaller as a whole ("gzip", "xz"); NULL: none did. Of an image
 * that was opened as raw, whose bytes are taken as they are, what they look like. */
DR_API const char *dr_image_packer(const struct dr_disk *disk, size_t index);
DR_API uint64_t dr_image_size(const struct dr_disk *disk, size_t index);
/* The backing name as recorded in the image at index, or NULL. */
DR_API const char *dr_image_backing_name(const struct dr_disk *disk, size_t index);

/* ------------------------------------------------------------------ data */

enum dr_io_flag {
    DR_FUA = 1 << 0,       /* durable when the call returns */
    DR_MAY_UNMAP = 1 << 1, /* dr_zero: space may be given back */
    DR_EXPLICIT =
        1 << 2,       /* dr_zero: the top image itself must say zero, even where its parent does */
    DR_FAST = 1 << 3, /* dr_zero: -ENOTSUP rather than writing zeros as bytes; part of the range may
                         be zeros by then */
};

/* All of [off, off+len) must lie inside the disk, else -EINVAL and nothing is done. len 0 is fine,
 * with buf NULL, too. -EROFS: the disk is not open for writing. flags: enum dr_io_flag. Byte
 * granularity. After a failed write each 512-byte sector is old or new. */
DR_API int dr_pread(struct dr_disk *disk, void *buf, uint64_t off, size_t len,
                    struct dr_error *err);
DR_API int dr_pwrite(struct dr_disk *disk, const void *buf, uint64_t off, size_t len,
                     unsigned flags, struct dr_error *err);
DR_API int dr_zero(struct dr_disk *disk, uint64_t off, uint64_t len, unsigned flags,
                   struct dr_error *err);
/* Tell that the guest no longer needs these bytes. Afterwards they read as zeros or as before,
 * never as the parent's. */
DR_API int dr_discard(struct dr_disk *disk, uint64_t off, uint64_t len, struct dr_error *err);
/* Make everything durable that was written so far. After a failed flush every later one fails
 * too (-EIO), since the kernel has dropped the data: close the disk and open it again. */
DR_API int dr_flush(struct dr_disk *disk, struct dr_error *err);
/* The disk gets this size; what is new reads as zeros. Other calls may be in progress: they come
 * before the change or after it, and wait until it is durable. -ENOTSUP: not with this format;
 * -EBUSY: an operation that changes the disk's chain is under way. */
DR_API int dr_truncate(struct dr_disk *disk, uint64_t size, struct dr_error *err);
/* As dr_truncate; what is new gets its place in the disk's files at once. Only for growing. After a
 * failure the disk has its old size. Killed: the old size, or the new one and some of the space.
 * -ENOTSUP also: METADATA of a raw disk, which has none. */
enum dr_preallocation {
    DR_PREALLOC_OFF,
    DR_PREALLOC_METADATA, /* the format's tables; the data may be a hole of the file */
    DR_PREALLOC_FALLOC,   /* and its space is reserved, or zeros are written where it cannot be */
    DR_PREALLOC_FULL,     /* and zeros are written */
};
DR_API int dr_resize(struct dr_disk *disk, uint64_t size, enum dr_preallocation prealloc,
                     struct dr_error *err);

/* ------------------------------------------------------------------ where bytes live */

enum dr_extent_flag {
    DR_EXTENT_ALLOCATED = 1 << 0, /* some image of the chain provides it (qemu-img: "present") */
    DR_EXTENT_ZERO = 1 << 1,      /* reads as zeros */
    DR_EXTENT_DATA = 1 << 2,      /* takes space in a file */
    DR_EXTENT_OFFSET = 1 << 3, /* file and host_off are valid: the bytes stand there as they are */
    DR_EXTENT_CODED = 1 << 4,  /* compressed */
};

struct dr_extent_status {
    uint64_t off, len; /* guest range */
    unsigned flags;    /* enum dr_extent_flag */
    unsigned depth;    /* index in the chain of the image that answers; behind the end of a shorter
                          parent its child does */
    const char *file;  /* with OFFSET: lives until the disk is closed */
    uint64_t host_off;
};

/* Tell where the bytes from off on live. 0 < status->len <= len: the answer covers as much as
 * can be told without reading guest data. */
DR_API int dr_block_status(struct dr_disk *disk, uint64_t off, uint64_t len,
                           struct dr_extent_status *status, struct dr_error *err);

/* ------------------------------------------------------------------ bitmaps (drover/ops.h) */

/* What dr_disk_bitmap_change does. */
enum dr_bitmap_action {
    DR_BITMAP_ADD, /* nothing is set in it, and it is enabled */
    DR_BITMAP_REMOVE,
    DR_BITMAP_CLEAR, /* nothing is set in it any more */
    DR_BITMAP_ENABLE,
    DR_BITMAP_DISABLE, /* it stays as it is */
    DR_BITMAP_MERGE    /* what another one has is set in it, too */
};

#ifdef __cplusplus
}
#endif
#endif
