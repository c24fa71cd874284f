/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A machine as OVF has it: a descriptor, the files it refers to, perhaps a manifest of their
 * digests. An OVA is all of that in one tar, whose members are ranges of the file and are read
 * where they stand; else the files lie beside the descriptor. */
#ifndef DR_ARCHIVE_OVA_H
#define DR_ARCHIVE_OVA_H

#include "archive/ova-ovf.h"
#include "archive/ova-tar.h"
#include "storage/window.h"

/* Where the files beside a descriptor are: opens one by the name that the descriptor has for it,
 * or refuses. The reference becomes the caller's. */
typedef int (*ova_beside)(void *user, const char *name, struct dr_file **file,
                          struct dr_error *err);

struct ova {
    struct dr_file *file; /* the tar or the descriptor; the caller's */
    bool is_tar;
    struct ova_tar tar;
    struct ovf ovf;
    const char *descriptor; /* its name; NULL: the tar has none */
    ova_beside beside;
    void *user;
};

/* What a name in it leads to. */
struct ova_found {
    const struct ovf_disk *disk; /* NULL: a file that is no disk */
    const struct ovf_file *file; /* NULL: the descriptor does not know it */
    const char *name;
};

/* Read the directory and the descriptor. beside, user: may be NULL for what is surely a tar. A tar
 * without descriptor opens, for the sake of its members. file must live as long. End with
 * ova_close(), also after a failure. */
int ova_open(struct dr_file *file, ova_beside beside, void *user, struct ova *ova,
             struct dr_error *err);
void ova_close(struct ova *ova);

/* The disk that `name` means: a file's name, a disk's id, or a file's id; else any member of the
 * tar. -ENOENT lists what there is. */
int ova_find(const struct ova *ova, const char *name, struct ova_found *found,
             struct dr_error *err);
/* The n-th disk that has a file (from 0); false: no more. -ENOENT in *r: the descriptor names no
 * such file. */
bool ova_disk_at(const struct ova *ova, size_t n, struct ova_found *found);
size_t ova_disk_count(const struct ova *ova);

/* The bytes of a file of the machine, as they are stored (compressed ones, too), as a file that is
 * only read; its name in messages is that of the archive, '#', its own. cut: pieces that the end of
 * the archive cuts off are shown as far as they go; else that is a failure. */
int ova_file_open(const struct ova *ova, const struct ova_found *found, bool cut,
                  struct dr_file **file, struct dr_error *err);
/* How many pieces it is stored in, each with a name and a digest of its own. */
int ova_file_pieces(const struct ova *ova, const struct ova_found *found, size_t *n,
                    struct dr_error *err);
/* The name of one of them, or NULL: out of memory. The caller frees it. */
char *ova_piece_name(const struct ova_found *found, size_t i);
/* How many bytes are stored of it, without reading any. */
int ova_file_stored(const struct ova *ova, const struct ova_found *found, uint64_t *bytes,
                    struct dr_error *err);

/* "name, name": its disks, each with prefix in front; cut to size with "...". */
void ova_list_disks(const struct ova *ova, const char *prefix, char *text, size_t size);

#endif
