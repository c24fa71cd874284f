/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where an archive's bytes come from: one after another, from a file, a pipe, or out of a
 * compressed stream (zstd, gzip, bzip2, lzop, xz, lz4; found out by the first bytes). Plain files,
 * and packed ones with an index (xz, zstd with a seek table), can also be read at random: through
 * dr_source_file. */
#ifndef DR_STORAGE_SOURCE_H
#define DR_STORAGE_SOURCE_H

#include "storage/storage.h"

struct dr_source;

/* What happens to damaged pieces of a packed file that has several. */
enum dr_source_salvage {
    DR_SOURCE_STRICT,       /* reading them fails */
    DR_SOURCE_SALVAGE,      /* the same, and the list of pieces may end before the file does */
    DR_SOURCE_SALVAGE_KEEP, /* also: what was unpacked in front of the damage can be read and is
                               noted as doubtful */
    DR_SOURCE_SALVAGE_GAPS, /* also: pieces of unknown length may be missing, each of which reads as
                               DR_SOURCE_GAP damaged bytes */
};

/* Where the packed bytes could not be decoded to their end. */
struct dr_unpack_damage {
    uint64_t
        vouched; /* plain bytes that a checksum was right for; those behind may be wrong anywhere */
    uint64_t came; /* plain bytes that there are */
    struct dr_error why;
};

#define DR_SOURCE_GAP (4u << 20)

struct dr_source_range {
    uint64_t from, to; /* plain bytes, to is behind the last one */
};

/* fd < 0: open path (read-only, shared). Neither reads past what is asked for when it is plain, nor
 * blocks on a FIFO for longer than its writer. fd is not closed. */
int dr_source_open(struct dr_fs *fs, const char *path, int fd, struct dr_source **source,
                   struct dr_error *err);
/* The same; as_is: the bytes as they are stored, whatever packer may have made them. */
int dr_source_open_as(struct dr_fs *fs, const char *path, int fd, bool as_is,
                      struct dr_source **source, struct dr_error *err);
/* As dr_source_open, DR_SOURCE_SALVAGE_GAPS where f has pieces. *damage: how their list ended
 * early, and why.errnum 0 if it did not. */
int dr_source_open_salvaging(struct dr_fs *fs, const char *path, int fd, struct dr_source **source,
                             struct dr_unpack_damage *damage, struct dr_error *err);
/* The bytes of an open file, of which the source keeps a reference; what is packed is decoded from
 * front to back, even where it has an index. */
int dr_source_open_file(struct dr_file *f, struct dr_source **source, struct dr_error *err);
void dr_source_close(struct dr_source *s); /* NULL allowed */

const char *dr_source_name(const struct dr_source *s);        /* for messages */
const char *dr_source_compression(const struct dr_source *s); /* NULL = none */

/* Up to len bytes (plain bytes, after decompression) from where the last call ended: the number
 * read in *got, short only at the end. After a failure (-EBADMSG: damaged or cut off) *got are the
 * good bytes in front of the damage; where bytes come only one after another every later call fails
 * too. One thread at a time. */
int dr_source_read(struct dr_source *s, void *buf, size_t len, size_t *got, struct dr_error *err);
/* All that comes is the caller's, who wants small pieces: plain bytes of a pipe, too, are read
 * before they are asked for, and nobody else can go on reading it. */
void dr_source_read_ahead(struct dr_source *s);
/* Reading then fails with -ECANCELED, even while it waits for bytes of a pipe, when *stop is not 0.
 */
void dr_source_stop_by(struct dr_source *s, const volatile int *stop);
/* After a read that failed with damage: the next one goes on with what can be decoded behind that.
 * How much is missing in between is not known; dr_source_pos() does not count it. -ENODATA: nothing
 * more can be decoded. Only of a source that was opened for salvaging. */
int dr_source_resume(struct dr_source *s);
/* How far the container has been read, in bytes of it. */
uint64_t dr_source_stored_pos(const struct dr_source *s);
/* Plain bytes taken so far. */
uint64_t dr_source_pos(const struct dr_source *s);
/* The first so many plain bytes are as they were packed: a checksum said so. Those behind, up to
 * dr_source_pos(), may be wrong anywhere once a read has failed. */
uint64_t dr_source_vouched(const struct dr_source *s);
/* Pass over len bytes: free where the source can seek. Less than len: the end, in *skipped.
 * Failures as with dr_source_read. */
int dr_source_skip(struct dr_source *s, uint64_t len, uint64_t *skipped, struct dr_error *err);

/* The plain bytes as a file for reading at random from many threads, or NULL: this source cannot.
 * Lives as long as the source. */
struct dr_file *dr_source_file(struct dr_source *s);

/* The file that the bytes come from, as they are stored; NULL for a pipe. */
struct dr_file *dr_source_stored(struct dr_source *s);

/* How the bytes that begin like this are compressed (9 tell for sure), NULL = they are not. */
const char *dr_source_compression_of(const uint8_t *buf, size_t len);

/* The plain bytes of a packed file whose pieces can be decoded each by itself, as a file with the
 * id of f: a new reference. -ENOTSUP (silently): it is not such a file, or its pieces are too
 * large. packer as above. salvage and damage (may be NULL) as above. */
int dr_source_indexed_file(struct dr_file *f, enum dr_source_salvage salvage,
                           struct dr_unpack_damage *damage, struct dr_file **plain,
                           const char **packer, struct dr_error *err);
/* The most plain bytes that reading one byte of such a file decodes; 0 = f is no such file. */
uint64_t dr_source_largest_piece(const struct dr_file *f);
/* Are pieces of unknown length missing in such a file? */
bool dr_source_has_gaps(const struct dr_file *f);
/* Of what was read of such a file, the first range in [from, to) of bytes that no checksum was
 * right for, cut to that. False: none, or f is no such file. Any thread. */
bool dr_source_doubtful(struct dr_file *f, uint64_t from, uint64_t to,
                        struct dr_source_range *first);

/* The same for an open file: f itself if it is plain, a file of the plain bytes if it has
 * pieces (a new reference in *plain in both cases), -ENOTSUP if it is compressed in a way that can
 * only be read from the start. compression as above. */
int dr_source_plain_file(struct dr_file *f, struct dr_file **plain, const char **compression,
                         struct dr_error *err);

#endif
