/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The VMDK descriptor: a text of lines. Kept as text, so that what we do not know stays as it is;
 * every edit splices the text and parses it again. Keys, createType and extent keywords are taken
 * in any case; a key is the whole left-hand side of a line, never a string found somewhere.
 * docs/formats/vmdk.md has the grammar. */
#ifndef DR_FORMATS_VMDK_DESCRIPTOR_H
#define DR_FORMATS_VMDK_DESCRIPTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "drover/drover.h"

#define VMDK_DESC_MAX    (1u << 20)           /* bytes of text */
#define VMDK_MAX_SECTORS (UINT64_C(1) << 54)  /* of a disk or an extent: bytes stay below 2^63 */
#define VMDK_NO_PARENT   UINT32_C(0xffffffff) /* parentCID of a base */

enum vmdk_line_kind {
    VMDK_LINE_OTHER, /* comment, blank, or something unknown: kept, never read */
    VMDK_LINE_KEY,
    VMDK_LINE_EXTENT,
};

/* A line of the text; offsets into vmdk_desc.text. */
struct vmdk_line {
    enum vmdk_line_kind kind;
    size_t off, len; /* without the line end */
    size_t end;      /* where the next line starts */
    size_t key, key_len;
    size_t value, value_len; /* without the quotes */
};

enum vmdk_access { VMDK_RW, VMDK_RDONLY, VMDK_NOACCESS };

enum vmdk_extent_type {
    VMDK_SPARSE,
    VMDK_SESPARSE,
    VMDK_FLAT,
    VMDK_VMFS,
    VMDK_ZERO,
    VMDK_ABSENT,      /* of an open image: nothing of it can be read (NOACCESS, or a salvage) */
    VMDK_UNSUPPORTED, /* a type that exists but that nothing here reads: see type_name */
};

struct vmdk_extent_line {
    enum vmdk_access access;
    uint64_t sectors;
    enum vmdk_extent_type type;
    char type_name[24]; /* as the text says */
    char *name;         /* NULL: none */
    uint64_t offset;    /* sectors; 0 if not given */
};

struct vmdk_desc {
    char *text; /* NUL-terminated, no NUL inside */
    size_t len;
    struct vmdk_line *lines;
    size_t n_lines;
    struct vmdk_extent_line *extents;
    size_t n_extents;
};

/* Can the name stand between quotes? It must not be empty or contain a quote, CR or LF. */
bool vmdk_name_is_writable(const char *name);

/* The text ends at the first NUL of buf. where: the file's name for messages. -EINVAL: not a
 * descriptor. On failure nothing is owned. */
int vmdk_desc_parse(struct vmdk_desc *d, const char *where, const void *buf, size_t len,
                    struct dr_error *err);
void vmdk_desc_free(struct vmdk_desc *d);

/* Is this text a descriptor? 0 = no, the higher the surer. For the probe. */
int vmdk_desc_probe(const uint8_t *buf, size_t len);

/* The first line with that key, or NULL. */
const struct vmdk_line *vmdk_desc_find(const struct vmdk_desc *d, const char *key);
/* Its value, malloc'ed; NULL: no such key, or no memory. */
char *vmdk_desc_get(const struct vmdk_desc *d, const char *key);
/* A name of the text as UTF-8, malloc'ed; NULL: it is that as far as one can tell, or cannot be
 * converted (charset.c). */
char *vmdk_desc_to_utf8(const struct vmdk_desc *d, const char *name);
/* The encoding that the text claims, malloc'ed, if it is one that nothing here converts and the
 * name would need that; else NULL. */
char *vmdk_desc_unknown_charset(const struct vmdk_desc *d, const char *name);

/* Texts of other systems (charset.c). */

/* A text in UTF-16, with a byte order mark or without, becomes one in UTF-8, and lone CRs become
 * LFs where there is no LF; *recoded: so it was. *text is malloc'ed and may be replaced. -EINVAL,
 * -ENOMEM. */
int vmdk_text_decode(const char *where, char **text, size_t *len, bool *recoded,
                     struct dr_error *err);
#define VMDK_PEEK_MOST 4096u
/* The first bytes of a file as such a text, as far as ASCII goes; their number. For the probe. */
size_t vmdk_text_peek(const uint8_t *buf, size_t len, char text[VMDK_PEEK_MOST]);

/* -ENOENT (no message): no such key; -EINVAL: not 1 to 8 hex digits. */
int vmdk_desc_get_id(const struct vmdk_desc *d, const char *where, const char *key, uint32_t *id,
                     struct dr_error *err);

/* Edits. On failure (-ENOMEM, or -EINVAL when the text would no longer be a descriptor) d is as
 * before. */

/* [off, off+len) of the text becomes with. */
int vmdk_desc_splice(struct vmdk_desc *d, size_t off, size_t len, const char *with,
                     struct dr_error *err);
/* The value of key becomes value, quotes kept as they are; a key that is missing gets a line behind
 * that of after (or behind the last header key). quoted: for a new line. */
int vmdk_desc_set(struct vmdk_desc *d, const char *key, const char *value, bool quoted,
                  const char *after, struct dr_error *err);
/* The same for an entry of the data base, key with "ddb.": a new one goes to its place among the
 * sorted ones. */
int vmdk_desc_set_ddb(struct vmdk_desc *d, const char *key, const char *value,
                      struct dr_error *err);
int vmdk_desc_remove(struct vmdk_desc *d, const char *key, struct dr_error *err);
/* The line becomes a comment; the text keeps its length. */
int vmdk_desc_comment_out(struct vmdk_desc *d, const char *key, struct dr_error *err);
/* CID, and with it longContentID and change tracking, which the new id makes invalid. Keeps the
 * length of the text if the old CID has 8 digits. */
int vmdk_desc_set_cid(struct vmdk_desc *d, uint32_t cid, struct dr_error *err);

/* ddb.longContentID, if there is one: 128 random bits that end in the CID, as VMware makes them. */
int vmdk_desc_renew_long_id(struct vmdk_desc *d, uint32_t cid, struct dr_error *err);

/* The lines of extents, descriptor-extents.c. i: index in d->extents. */
int vmdk_desc_set_sectors(struct vmdk_desc *d, size_t i, uint64_t sectors, struct dr_error *err);
/* Add a line behind that of extents[i], with its access and type; name as the text is to have it.
 */
int vmdk_desc_add_extent(struct vmdk_desc *d, size_t i, uint64_t sectors, const char *name,
                         struct dr_error *err);
/* FLAT has an offset, 0, the others have none. */
int vmdk_desc_set_type(struct vmdk_desc *d, size_t i, const char *type, struct dr_error *err);
int vmdk_desc_remove_extent(struct vmdk_desc *d, size_t i, struct dr_error *err);
/* The number of cylinders for a disk of this size, where the text has a geometry. */
int vmdk_desc_set_cylinders(struct vmdk_desc *d, uint64_t sectors, struct dr_error *err);

/* A new random content id that may be used; digits: how many hex digits it must have without
 * padding (7), else any. */
uint32_t vmdk_random_cid(size_t digits);
/* 0, fffffffe and ffffffff have meanings of their own. */
bool vmdk_cid_is_reserved(uint32_t cid);

#endif
