/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: VMA archives, the backup format of Proxmox VE: several disks and configuration files in
 * one stream that is written to and read from pipes. docs/formats/vma.md has the format.
 *
 * The conventions of drover.h hold. One struct dr_vma is used by one thread at a time.
 * A disk inside an archive is also an ordinary image: dr_open("vma:backup.vma#drive-scsi0", ...).
 */
#ifndef DROVER_VMA_H
#define DROVER_VMA_H

#include "drover/drover.h"
#include "drover/backup.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DR_VMA_CLUSTER 65536u
#define DR_VMA_BLOCK   4096u

/* ------------------------------------------------------------------ what the header tells */

/* Names may be anything that stood in the file but are never empty and hold no NUL: escape them
 * before they reach a terminal, check them before they become file names. */
struct dr_vma_disk {
    unsigned id; /* 1..255 */
    const char *name;
    uint64_t size; /* bytes; of the state of a running machine: only advice */
    bool vmstate;  /* the state of a running machine (name "vmstate"): a stream, not a disk */
};

struct dr_vma_config {
    const char *name;
    const uint8_t *data; /* len bytes */
    size_t len;          /* 0..65535 */
};

struct dr_vma_header {
    uint8_t uuid[16];
    int64_t ctime;             /* seconds since 1970 */
    uint32_t header_size;      /* bytes: where the first extent begins */
    struct dr_vma_disk *disks; /* ascending by id */
    size_t n_disks;
    struct dr_vma_config *configs; /* in the order of the file */
    size_t n_configs;
    bool wrong_sum;          /* its checksum is wrong: dr_vma_open_options.any_header */
    const char *compression; /* NULL = none, else "zstd" "gzip" "lzop" "bzip2" "xz" "lz4" */
};

/* ------------------------------------------------------------------ opening */

struct dr_vma;

struct dr_vma_open_options {
    bool use_fd; /* read from fd; the path is for messages only */
    int fd;      /* a pipe or a file at its start; is not closed */
    /* Called with what is odd but no failure. NULL = not told. */
    void (*message)(void *user, const char *text);
    void *user;
    /* For dr_vma_extract_options.salvage: of a compressed file whose pieces are decoded each by
     * itself, a damaged one costs only itself. */
    bool salvage;
    /* With salvage: a header whose checksum is wrong is used as far as what it says can be, with a
     * message. Devices that have clusters in the archive and no place in the header get a name of
     * their own, "unlisted-ID", where the archive is a file that is not compressed, or the header
     * is wrong and the file can be read at random. Told again as damage when the disks are read. */
    bool any_header;
};

/* Open the archive at path, compressed or not (found out by content), and read its header and
 * nothing more. -EINVAL: no archive, or a damaged header. options may be NULL. */
DR_API int dr_vma_open(const char *path, const struct dr_vma_open_options *options,
                       struct dr_vma **vma, struct dr_error *err);
DR_API void dr_vma_close(struct dr_vma *vma); /* NULL is allowed */
/* Lives until dr_vma_close. */
DR_API const struct dr_vma_header *dr_vma_header(const struct dr_vma *vma);

/* ------------------------------------------------------------------ reading the disks
 *
 * One pass from the first extent to the end of the archive: checks everything that can be checked
 * and hands each disk's clusters to its target. Can be done once for each dr_vma_open. */

struct dr_vma_target {
    unsigned id;            /* of the disk; a disk without a target is checked and dropped */
    struct dr_disk *disk;   /* at least as large as the disk in the archive */
    bool is_zero;           /* it reads as zeros already: zeros need not be written */
    bool compare;           /* only compare (read-only is fine); the first difference is damage */
    uint64_t rate;          /* bytes a second written to it, 0 = no limit */
    const char *rate_group; /* targets of one group share the rate; NULL = its own */
};

enum dr_vma_damage_kind {
    DR_VMA_MISSING,   /* no extent has this range of the disk */
    DR_VMA_DUPLICATE, /* a second extent has it; the first one counts */
    DR_VMA_CHECKSUM,  /* the bytes are not what the checksums say */
    DR_VMA_DIFFERS,   /* compare: the bytes are not the target's */
    DR_VMA_EXTENT,    /* archive bytes that are no valid extent; off, len: of the archive */
    DR_VMA_DOUBTFUL,  /* unpacked from a compressed stream of which no checksum was right before it
                         broke off: the bytes were taken, and may be wrong anywhere */
    DR_VMA_HEADER,    /* id 0: the header's checksum is wrong, and it was used all the same; else:
                         the header does not list the disk, or says less of it than there is */
};

struct dr_vma_damage {
    enum dr_vma_damage_kind kind;
    unsigned id; /* the disk, 0 = the archive */
    uint64_t off, len;
    const char *text; /* a line for people; lives during the call */
};

struct dr_vma_extract_options {
    const struct dr_vma_target *targets;
    size_t n_targets;
    /* Where checksums are: a path; NULL = the archive's name + ".sums" if that exists and fits. */
    const char *sums;
    bool no_sums;
    /* Go on behind damage and keep what is good. The result then counts the damage and the call
     * succeeds if the archive could be read at all. Ranges that are missing become zeros in the
     * targets. Without salvage the first damage is the failure. */
    bool salvage;
    /* Structure only: block data is not looked at (verify). Skipped where the archive can seek. */
    bool headers_only;
    void (*damage)(void *user, const struct dr_vma_damage *damage); /* each, merged; or NULL */
    void *user;
};

struct dr_vma_extract_result {
    uint64_t bytes_read;         /* of disks: clusters times 65536 */
    uint64_t zero_bytes;         /* of these, blocks that the archive does not store */
    uint64_t zero_cluster_bytes; /* of these, in clusters that are all zeros */
    uint64_t missing_bytes, duplicate_bytes, checksum_bytes, different_bytes, extent_bytes;
    uint64_t doubtful_bytes, header_bytes;
    bool sums_used;
};

/* With no targets: verify. Data of a failed call may stand in the targets; they are flushed when
 * the call succeeds. progress: bytes of disks. -EBADMSG: damage. result may be NULL. */
DR_API int dr_vma_extract(struct dr_vma *vma, const struct dr_vma_extract_options *options,
                          struct dr_job *job, struct dr_vma_extract_result *result,
                          struct dr_error *err);

/* ------------------------------------------------------------------ extracting into new files
 *
 * Disks become new images, configuration files become files. All are made in a staging directory
 * and get their names together, when all of them are complete and durable. */

struct dr_vma_new_disk {
    unsigned id;
    const char *file;            /* its name in the directory; with options.path: ignored */
    const char *format;          /* NULL = raw */
    const struct dr_pair *pairs; /* settings of the format */
    size_t n_pairs;
};

struct dr_vma_new_config {
    size_t index; /* in dr_vma_header.configs */
    const char *file;
};

struct dr_vma_files_options {
    /* One of the two. dir: all files go into this directory, which is made if it does not exist;
     * staging directory: dir/.drover.partial. path: the one disk there is becomes this file;
     * staging directory: .NAME.drover.partial beside it. */
    const char *dir, *path;
    const struct dr_vma_new_disk *disks;
    size_t n_disks;
    const struct dr_vma_new_config *configs;
    size_t n_configs;
    /* How the archive is read, and targets for further disks, which need not be new images. */
    struct dr_vma_extract_options read;
    bool replace; /* existing files that nobody uses give way; else -EEXIST */
    bool resume;  /* after an interruption keep what was made, and go on from it in the next call */
    bool no_sync; /* do not wait until anything is durable; not with resume */
    unsigned flags; /* enum dr_open_flag: NO_LOCK */
    /* There is no staging directory: dir is made, and must not exist. Disks are called tmp-FILE in
     * it until all are complete; configuration files have their names from the start. */
    bool in_sight;
    /* Called when the configuration files are durable, before disks are made; may change what
     * read.targets points to and n_targets through the pointer that the caller has. Non-zero: the
     * call ends with -ECANCELED. NULL = not called. */
    int (*ready)(void *user);
    void *user;
};

struct dr_vma_files_result {
    struct dr_vma_extract_result read; /* all 0 if only names were missing */
    /* After a failure: the staging directory, if it was left to go on from. "" = nothing was left.
     */
    char kept[4096];
};

/* -EEXIST: a file has one of the names (without replace) or came meanwhile. -EBUSY: a file that
 * would give way is in use, or another call uses the staging directory. -ESTALE: with resume, the
 * staging directory is that of another extraction. result may be NULL. Messages of the job tell of
 * old files that an interrupted call has left in the staging directory. */
DR_API int dr_vma_extract_files(struct dr_vma *vma, const struct dr_vma_files_options *options,
                                struct dr_job *job, struct dr_vma_files_result *result,
                                struct dr_error *err);

/* Can name be used as the name of a file in a directory of the caller's choice? It has no '/',
 * is not ".", ".." or empty, has no control characters, and file systems take it. */
DR_API bool dr_vma_name_is_safe(const char *name);

/* ------------------------------------------------------------------ writing */

enum dr_vma_compression { DR_VMA_PLAIN, DR_VMA_ZSTD };

struct dr_vma_create_disk {
    const char *name;     /* unique, no blanks, no '/', fewer than 256 bytes */
    struct dr_disk *disk; /* open; sizes that are no multiple of 512 are rounded up with zeros */
    /* A stream, the state of a running machine, instead of a disk: read from state_fd to its end.
     * The name must be "vmstate". state_size: what the header shall say; the stream may be shorter
     * or longer. */
    bool vmstate;
    int state_fd;
    uint64_t state_size;
};

struct dr_vma_create_options {
    const struct dr_vma_create_disk *disks;
    size_t n_disks; /* <= 254 */
    const struct dr_vma_config *configs;
    size_t n_configs; /* <= 256 */
    bool use_fd;      /* write to fd (pipe, socket, file); path is for messages only */
    int fd;
    enum dr_vma_compression compression;
    int level; /* of the compression; 0 = its default */
    /* The same input makes the same archive, byte for byte: uuid from the content of the header,
     * clusters in ascending order, ctime as given (0 if not). */
    bool reproducible;
    bool has_uuid, has_ctime;
    uint8_t uuid[16];
    int64_t ctime;
    bool no_sums;     /* write no side file with checksums; always so with use_fd unless sums */
    const char *sums; /* its path; NULL = path + ".sums" */
    bool checksum;    /* tell the digest of each disk, which costs no further reading */
    bool no_sync;     /* do not wait until all is durable */
    bool replace;     /* take an existing file's place; else -EEXIST */
    /* A backup of disks that other threads use meanwhile: the archive has what all of them hold at
     * one instant of this call, at which their requests wait for a moment. From then on, before a
     * range changes that was not read yet, it is read and written to the archive first; so clusters
     * come in any order. The disks are different ones. Not with vmstate and reproducible. -EBUSY:
     * another operation changes the images of a disk. */
    bool at_instant;
    struct dr_backup_spill spill; /* at_instant; of all disks */
    /* at_instant, an archive in a new file: NULL, or the path of a set of backups (drover/backup.h)
     * that lists each disk as ARCHIVE#DISK. It is made if it is not there. -EEXIST: it has one of
     * these names. After a failure there is neither archive nor entry. */
    const char *set;
    uint64_t
        *zero_so_far; /* NULL, or zeros among what is done: up to date when progress is called */
};

struct dr_vma_create_result {
    struct dr_vma_disk_result {
        uint64_t size, zero_bytes;
        uint64_t copied; /* at_instant: bytes that were read from the disk */
        /* at_instant, or with checksum: of the disk, as it was copied; see checksum.h. Else, and of
         * a stream: empty */
        char digest[DR_DIGEST_TEXT];
    } disks[256]; /* in the order of options->disks */
    uint64_t archive_bytes;
};

/* The archive appears under its name only when it is complete. A device or FIFO at path is written
 * to; after a failure what went to a pipe or socket ends within an extent, if somebody reads it
 * still, so that nobody takes it for a whole archive. progress: bytes of disks. result may be NULL.
 */
DR_API int dr_vma_create(const char *path, const struct dr_vma_create_options *options,
                         struct dr_job *job, struct dr_vma_create_result *result,
                         struct dr_error *err);

/* ------------------------------------------------------------------ index */

/* Make the side file (NULL = archive + ".idx") that lets the disks inside be opened without reading
 * all extent headers first. The archive must be able to seek: not compressed, or zstd with a seek
 * table. */
DR_API int dr_vma_index(const char *path, const char *side, struct dr_job *job,
                        struct dr_error *err);

#ifdef __cplusplus
}
#endif
#endif
