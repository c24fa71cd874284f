/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Parts of files: a partition of a disk, a disk inside a tar, read and written where they stand.
 *
 * Names are json: objects with QEMU's keys. A driver raw with offset, size or both makes the part;
 * around it may be the format of the image inside, and below it a file, another part, or the disk
 * of a server:
 *   json:{"driver": "qcow2", "file": {"driver": "raw", "offset": 1536, "size": 1048576,
 *                                     "file": {"driver": "file", "filename": "all.tar"}}}
 * An object that leads to a file and says nothing of a part stands for the file itself. Keys may be
 * nested or have dots ("file.filename").
 *
 * A part is a file on a file, a user of it with a claim on its range: parts that do not overlap may
 * be in use at once, also for writing and in one chain, others are refused as two users of one file
 * are. Other processes see the locks of the whole file. It never grows: what is written behind its
 * end fails with ENOSPC. Only one without a size may be resized by name. Where it does not begin at
 * a multiple of 512 its sectors are not written all or nothing (atomic_size). */
#ifndef DR_STORAGE_PART_H
#define DR_STORAGE_PART_H

#include "storage/storage.h"

struct dr_part {
    char *below;      /* the name of what is below: a path, or a json: name */
    char *format;     /* what the outermost driver says of the image inside; NULL: nothing */
    char *filename;   /* at the very bottom; NULL: a server's disk is there */
    char *key_secret; /* the id of the secret that opens the image inside; NULL: nothing is said */
    uint64_t offset, size;
    bool has_size;
    bool is_range; /* false: it is the whole file */
    bool read_only;
};

/* Only looks at the name. */
bool dr_part_is(const char *name);
/* -EINVAL: something in the name means nothing. Clear it afterwards in any case. */
int dr_part_parse(const char *name, struct dr_part *part, struct dr_error *err);
void dr_part_clear(struct dr_part *part);
#define DR_CLEANUP_PART __attribute__((cleanup(dr_part_clear)))

/* Which bytes of the file at the bottom, whose name is *bottom (malloc'ed), the name stands for:
 * [from, to), with to = UINT64_MAX where no size is said. 0, UINT64_MAX: all of it. Nobody has
 * looked whether the file has them. */
int dr_part_range(const char *name, char **bottom, uint64_t *from, uint64_t *to,
                  struct dr_error *err);

/* The path or remote name at the bottom; a copy of name where that is no part's. NULL = out of
 * memory, or the name means nothing. */
char *dr_part_bottom(const char *name);
/* The same name with another path at the bottom. */
int dr_part_rename(const char *name, const char *path, char **out, struct dr_error *err);

/* A number of bytes as QEMU takes it: 0x for hexadecimal, a suffix b, k, M, G, T, P or E. -EINVAL,
 * -ERANGE. */
int dr_part_size_of_text(const char *text, uint64_t *size);

/* As the operations of struct dr_fs_ops. */
int dr_part_refuse(const char *name, const char *what, struct dr_error *err);
int dr_part_open(struct dr_fs *fs, const char *name, unsigned flags, struct dr_file **file,
                 struct dr_error *err);

#endif
