/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The OVF descriptor of a machine: which files there are, and which of them are its disks. */
#ifndef DR_ARCHIVE_OVA_OVF_H
#define DR_ARCHIVE_OVA_OVF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "drover/drover.h"

#define OVF_TEXT_MAX  (4u << 20) /* bytes of a descriptor */
#define OVF_FILES_MAX 4096u
#define OVF_DISKS_MAX 1024u

struct ovf_file {
    char *id, *href;   /* never NULL */
    char *compression; /* NULL = none */
    bool has_size;
    uint64_t size;
    uint64_t chunk; /* bytes of each of its pieces, HREF.000000000 and on; 0 = it is whole */
};

struct ovf_disk {
    char *id;       /* never NULL */
    char *file_ref; /* id of its file; NULL: the machine begins with an empty disk */
    char *format;   /* a URI, or NULL */
    char *parent;   /* id of the disk it differs from, or NULL */
    bool has_capacity;
    uint64_t capacity;  /* bytes */
    char *odd_capacity; /* what it says instead of a number, or NULL */
};

struct ovf {
    char *name; /* of the machine, or NULL */
    struct ovf_file *files;
    size_t n_files;
    struct ovf_disk *disks;
    size_t n_disks;
};

/* text needs no zero behind it. name: for messages. Nothing outside is read, and a document type,
 * with which entities come, is refused. End with ovf_free(), also after a failure. */
int ovf_parse(const char *name, const char *text, size_t len, struct ovf *ovf,
              struct dr_error *err);
void ovf_free(struct ovf *ovf);

const struct ovf_file *ovf_file_by_id(const struct ovf *ovf, const char *id); /* NULL: none */

/* Bytes of a unit such as "byte * 2^30", "MegaBytes"; NULL = a byte. False: not understood. */
bool ovf_unit(const char *text, uint64_t *bytes);

#endif
