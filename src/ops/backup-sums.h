/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The checksums of what a disk holds, from which its digest is computed: one for each 64 KiB of it,
 * and one over all of these. docs/formats/backup.md has the side file that keeps them. */
#ifndef DR_OPS_BACKUP_SUMS_H
#define DR_OPS_BACKUP_SUMS_H

#include "drover/backup.h"
#include "drover/checksum.h"
#include "storage/storage.h"

#define DR_SUMS_GRAIN 65536u

struct dr_sums {
    uint64_t size, n; /* bytes of the disk, and its grains */
    uint8_t *table;   /* a sum for each; zeros: the grain is zeros */
    enum dr_checksum kind;
};

/* Of a disk that holds zeros. Memory is taken as sums are put. */
int dr_sums_begin_as(struct dr_sums *s, enum dr_checksum kind, uint64_t size, struct dr_error *err);
/* The same with XXH3-128, as all backups have. */
int dr_sums_begin(struct dr_sums *s, uint64_t size, struct dr_error *err);
void dr_sums_end(struct dr_sums *s);
/* The disk has another size: what is new is zeros. */
int dr_sums_resize(struct dr_sums *s, uint64_t size, struct dr_error *err);
/* [off, off+len) of the disk holds this; off begins a grain, and only the disk's last grain may be
 * given in part. From any thread, a grain by one at a time. buf NULL: zeros. */
int dr_sums_put(struct dr_sums *s, uint64_t off, const uint8_t *buf, uint64_t len,
                struct dr_error *err);
/* The same of XXH3-128 of a grain that was computed elsewhere, over 64 KiB with zeros behind the
 * end of the disk; 0, 0: it is zeros. */
void dr_sums_put_xxh3(const struct dr_sums *s, uint64_t grain, uint64_t low, uint64_t high);
/* Those of XXH3-128 have one of DR_DIGEST_TEXT bytes. */
void dr_sums_digest(const struct dr_sums *s, char *text);
/* text: DR_CHECKSUM_TEXT bytes. */
int dr_sums_digest_any(const struct dr_sums *s, char *text, struct dr_error *err);
/* Where the first grain at or behind `from` (which begins one) begins that differs (or that is
 * equal), of disks of one size; the size: none does. */
uint64_t dr_sums_next(const struct dr_sums *a, const struct dr_sums *b, uint64_t from, bool equal);

/* Those of what the disk holds at one instant of this call. It is claimed here. */
int dr_sums_of_disk(struct dr_sums *s, enum dr_checksum kind, struct dr_disk *disk,
                    struct dr_job *job, struct dr_error *err);
/* The same of its first `size` bytes. */
int dr_sums_of_part(struct dr_sums *s, enum dr_checksum kind, struct dr_disk *disk, uint64_t size,
                    struct dr_job *job, struct dr_error *err);
/* Can an image of `have` bytes be the backup of a disk of `size` bytes? Some formats count in
 * sectors: the image then ends with the disk's last sector. */
bool dr_sums_fits(uint64_t size, uint64_t have);

/* The name of the side file of the image at path, malloc'ed; NULL = out of memory. */
char *dr_sums_path(const char *path);
/* Write the side file, durably; another one of the kind gives way. flags: enum dr_file_flag. */
int dr_sums_save(const struct dr_sums *s, struct dr_fs *fs, const char *path, unsigned flags,
                 struct dr_error *err);
/* The same for an image that has no name yet, at path: -EEXIST if one has it by now. *held is the
 * side file, locked, also after a failure if it has its name: until it is given back nobody else
 * writes one for an image of this name, and what has the side file's name may be removed. */
int dr_sums_save_for(const struct dr_sums *s, struct dr_fs *fs, const char *path, unsigned flags,
                     struct dr_file **held, struct dr_error *err);
/* Read it. -ENOENT; -EINVAL: it is damaged or something else. */
int dr_sums_load_any(struct dr_sums *s, struct dr_fs *fs, const char *path, struct dr_error *err);
/* Is there a header with the right checksum of itself? -errno: that cannot be read. */
int dr_sums_is(struct dr_fs *fs, const char *path, bool *is, struct dr_error *err);
/* Only the size of the disk, from the header. */
int dr_sums_load_size(struct dr_fs *fs, const char *path, uint64_t *size, struct dr_error *err);
/* The same of a backup: only XXH3-128. */
int dr_sums_load(struct dr_sums *s, struct dr_fs *fs, const char *path, struct dr_error *err);

#endif
