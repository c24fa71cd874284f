/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Packed files whose pieces (frames, blocks, members) are decoded each by itself. The list of all
 * pieces makes a file of the plain bytes that is read at random, from many threads, and of which a
 * damaged piece costs only itself. The code of each packer finds the pieces and decodes one; the
 * list, the decoded pieces that are kept, and the file are here.
 *
 * Memory: 24 bytes a piece (28 once a salvage has read damaged ones), and the larger of 64 MiB and
 * four decoded pieces; each reader also has the packed bytes of the piece that it decodes. */
#ifndef DR_STORAGE_SOURCE_PIECES_H
#define DR_STORAGE_SOURCE_PIECES_H

#include "storage/source-codec.h"

#define SOURCE_PIECES_MAX      (16u << 20)
#define SOURCE_PIECE_PLAIN_MAX (64u << 20) /* bytes */
#define SOURCE_PIECE_CODED_MAX (80u << 20)

struct source_piece {
    uint64_t coded, plain; /* offsets: in the container; among the plain bytes, up to the next */
    uint32_t coded_len;
    uint32_t word; /* the packer's: a checksum, or flags */
};

/* The list while it is made. */
struct source_pieces;

struct source_piece_packer {
    const char *name; /* of what it makes: for messages of the file's operations */
    /* List the pieces of f. -ENOTSUP (silently): it has no good list, or cannot be listed. */
    int (*find)(struct dr_file *f, struct source_pieces *s, struct dr_error *err);
    /* plain_len bytes from coded. -EBADMSG: damaged, and *good (0 before the call) plain bytes came
     * in front of the damage. Called from many threads. */
    int (*decode)(const struct source_piece *p, uint32_t common, const uint8_t *coded,
                  uint8_t *plain, size_t plain_len, size_t *good);
    /* The list has no checksum of its own: a length counts only where the piece decodes to it, or
     * where it is that of others. proof_for_salvage: only a salvage goes by that; others find out
     * when they read the piece. */
    bool unproven, proof_for_salvage;
};

/* One more, behind the others. -ENOTSUP (silently): it is too large, or there are too many. */
int source_pieces_add(struct source_pieces *s, uint64_t coded, uint64_t coded_len,
                      uint64_t plain_len, uint32_t word, struct dr_error *err);
/* What decode() gets as common; 0 without. */
void source_pieces_common(struct source_pieces *s, uint32_t common);
bool source_pieces_salvaging(const struct source_pieces *s);
/* Is it a salvage that goes on behind pieces of unknown length? */
bool source_pieces_bridging(const struct source_pieces *s);
/* From this offset of the container on there is no good piece: 0 where the file is salvaged, and it
 * then ends with the pieces before. Else -ENOTSUP. */
int source_pieces_end(struct source_pieces *s, uint64_t at, const char *why);

/* No good piece is at this offset of the container. How many plain bytes are missing is not known.
 * -ENOTSUP: nobody can do with that. Else *from is the offset from where on the next piece is to be
 * looked for: behind the beginning of the last one, whose length may be what is damaged. */
int source_pieces_gap(struct source_pieces *s, uint64_t at, uint64_t *from, struct dr_error *err);
/* Where one of these bytes, which begin pieces, is next from *at on. -ENODATA (silently): nowhere.
 */
int source_pieces_search(struct dr_file *f, const uint8_t *magic, size_t len, uint64_t *at,
                         struct dr_error *err);

/* The file of the plain bytes of f: a new reference in *plain. -ENOTSUP (silently): there is none.
 * damage: NULL = what is damaged fails; else: how the list ended early is noted there. */
int source_pieces_open(struct dr_file *f, const struct source_piece_packer *packer,
                       enum dr_source_salvage salvage, struct dr_unpack_damage *damage,
                       struct dr_file **plain, struct dr_error *err);

extern const struct source_piece_packer source_zstd_table, source_zstd_frames, source_xz_blocks,
    source_gzip_blocks, source_lzop_blocks;

#endif
