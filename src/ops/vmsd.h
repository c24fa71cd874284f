/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* VMware's dictionaries beside disks: X.vmsd lists the snapshots of a machine, X.vmx says which
 * disks it uses. One `key = "value"` a line; '|' and two hexadecimal digits stand for a byte of a
 * value. Lines that we do not know stay as they are, and in their order. */
#ifndef DR_OPS_VMSD_H
#define DR_OPS_VMSD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "storage/storage.h"

#define DICT_MAX_BYTES     (1u << 20)
#define DICT_MAX_LINES     65536u
#define VMSD_MAX_SNAPSHOTS 4096u
#define VMSD_MAX_DISKS     256u

struct dict_line {
    char *text;        /* as it stands there, without its end */
    char *key, *value; /* decoded; NULL: a comment or an empty line */
};

struct dict {
    struct dict_line *lines;
    size_t n;
    bool crlf;
};

/* -EINVAL names path and the line. On failure there is nothing to free. */
int dict_parse(struct dict *d, const char *path, const void *data, size_t len,
               struct dr_error *err);
int dict_load(struct dict *d, struct dr_fs *fs, const char *path, struct dr_error *err);
void dict_free(struct dict *d);
/* NULL: there is no such key. Keys are compared without case. The first one counts. */
const char *dict_get(const struct dict *d, const char *key);
/* false = out of memory. A new key goes to the end. */
bool dict_set(struct dict *d, const char *key, const char *value);
/* Remove every line whose key begins so. */
void dict_remove(struct dict *d, const char *prefix);
/* The whole text, malloc'ed. */
char *dict_text(const struct dict *d, size_t *len);
/* Replace the file at path, atomically. */
int dict_save(const struct dict *d, struct dr_fs *fs, const char *path, struct dr_error *err);

/* ------------------------------------------------------------------ snapshots */

/* The disk of a snapshot: the image that became a parent when the snapshot was taken. */
struct vmsd_disk {
    unsigned index;
    const char *file, *node; /* as recorded; node, such as "scsi0:0", may be NULL */
};

struct vmsd_snapshot {
    unsigned index;       /* N of snapshotN */
    uint64_t uid, parent; /* 0 = none */
    const char *name;     /* never NULL */
    int64_t microseconds; /* since 1970; 0 = not said */
    struct vmsd_disk *disks;
    size_t n_disks;
};

struct vmsd {
    struct dict dict; /* the strings above live in it */
    struct vmsd_snapshot *all;
    size_t n;
    uint64_t current; /* uid of the snapshot that the machine runs on, 0 = none */
};

int vmsd_parse(struct vmsd *v, const char *path, const void *data, size_t len,
               struct dr_error *err);
int vmsd_load(struct vmsd *v, struct dr_fs *fs, const char *path, struct dr_error *err);
void vmsd_free(struct vmsd *v);
/* Does the disk name this file? What is compared is the last part of the name. */
bool vmsd_is_disk(const struct vmsd_disk *disk, const char *path);
/* The snapshot that froze the image at path, or NULL. */
const struct vmsd_snapshot *vmsd_of_image(const struct vmsd *v, const char *path);
/* Take the image at path out of the snapshot that froze it; a snapshot without disks goes, and
 * those made on it get its parent. Only v->dict is changed. false = out of memory. */
bool vmsd_forget_image(struct vmsd *v, const char *path);
/* A snapshot, the last and current one, froze the image at path; its parent is the one that was
 * current. If one did already, that becomes current, and nothing is added. device: "scsi0:0", or
 * NULL. microseconds: since 1970. Only v->dict is changed. -EINVAL, -EFBIG: the list, at
 * `where`, has no room or no number for it. */
int vmsd_add_image(struct vmsd *v, const char *where, const char *path, const char *device,
                   int64_t microseconds, struct dr_error *err);
/* The machine runs on the snapshot that froze the image at path; true also if there is none. */
bool vmsd_set_current(struct vmsd *v, const char *path);

#endif
