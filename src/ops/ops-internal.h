/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The operations on any file system, for tests on a made one, and what they share. */
#ifndef DR_OPS_INTERNAL_H
#define DR_OPS_INTERNAL_H

#include "core/aside.h"
#include "drover/backup.h"
#include "drover/chain.h"
#include "ops/newimage.h"
#include "ops/stock.h"

/* ------------------------------------------------------------------ as in drover/ops.h */

int dr_create_fs(struct dr_fs *fs, const char *path, const struct dr_create_options *options,
                 struct dr_error *err);
int dr_convert_fs(struct dr_fs *fs, const char *const *sources, size_t n, const char *target,
                  const struct dr_convert_options *options, struct dr_job *job,
                  struct dr_error *err);
int dr_measure_fs(struct dr_fs *fs, const char *source, uint64_t size,
                  const struct dr_measure_options *options, struct dr_measure_result *result,
                  struct dr_error *err);
int dr_rebase_fs(struct dr_fs *fs, const char *path, const struct dr_rebase_options *options,
                 struct dr_job *job, struct dr_error *err);
/* On an open disk. recorded: the name of the parent to be recorded, where that is not the one that
 * opens it, or NULL. retire: at last go on with the plain file alone. shared: other threads may use
 * it. No job is begun or ended. */
int dr_ops_rebase(struct dr_disk *disk, const struct dr_rebase_options *options,
                  const char *recorded, bool retire, bool shared, struct dr_job *job,
                  struct dr_error *err);
int dr_stream_fs(struct dr_fs *fs, const char *path, const struct dr_stream_options *options,
                 struct dr_job *job, struct dr_error *err);
int dr_retire_look_fs(struct dr_fs *fs, const char *path, const struct dr_retire_options *options,
                      struct dr_retire_state *state, struct dr_error *err);
int dr_retire_fs(struct dr_fs *fs, const char *path, const struct dr_retire_options *options,
                 char **plain, struct dr_error *err);
int dr_commit_fs(struct dr_fs *fs, const char *path, const struct dr_commit_options *options,
                 struct dr_job *job, struct dr_error *err);
int dr_amend_fs(struct dr_fs *fs, const char *path, const struct dr_amend_options *options,
                struct dr_job *job, struct dr_error *err);
int dr_snapshot_create_fs(struct dr_fs *fs, const char *path, const char *name,
                          const struct dr_open_options *options, char **active,
                          struct dr_error *err);
int dr_tree_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               struct dr_tree_node **nodes, size_t *n, struct dr_error *err);
int dr_forest_fs(struct dr_fs *fs, const char *dir, const struct dr_open_options *options,
                 struct dr_tree_node **nodes, size_t *n, struct dr_error *err);
int dr_tree_usage_fs(struct dr_fs *fs, const struct dr_tree_node *nodes, size_t n,
                     const struct dr_open_options *options, struct dr_layer_usage *usage,
                     struct dr_error *err);
int dr_chain_examine_fs(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                        struct dr_chain_finding **findings, size_t *n, size_t *images,
                        struct dr_error *err);
int dr_relocate_fs(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                   unsigned *changed, struct dr_error *err);
int dr_pack_names_fs(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                     unsigned *changed, struct dr_error *err);
/* Hand a line of text to whoever asked to be told; report may be NULL. */
void dr_ops_report(void (*report)(void *user, const char *line), void *user, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int dr_fingerprint_fs(struct dr_fs *fs, const char *path,
                      const struct dr_fingerprint_options *options, struct dr_job *job,
                      struct dr_error *err);
int dr_snapshot_delete_fs(struct dr_fs *fs, const char *disk, const char *name,
                          const struct dr_snapshot_options *options, struct dr_snapshot_plan *plan,
                          struct dr_job *job, struct dr_error *err);
int dr_snapshot_revert_fs(struct dr_fs *fs, const char *disk, const char *name,
                          const struct dr_snapshot_options *options, struct dr_error *err);
int dr_compact_fs(struct dr_fs *fs, const char *path, const struct dr_compact_options *options,
                  struct dr_job *job, struct dr_compact_result *result, struct dr_error *err);
int dr_info_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               bool chain, char **json, struct dr_error *err);
int dr_salvage_orphans_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                          const char *target, void (*report)(void *user, const char *line),
                          void *user, const volatile int *stop, uint64_t *found,
                          struct dr_error *err);
int dr_check_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                unsigned repair, void (*report)(void *user, const char *line), void *user,
                char **json, struct dr_error *err);
int dr_recover_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                  bool dry_run, void (*report)(void *user, const char *line), void *user,
                  unsigned *found, struct dr_error *err);
int dr_backup_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *source,
                 const char *target, const struct dr_backup_options *options, struct dr_job *job,
                 struct dr_backup_result *result, struct dr_error *err);
int dr_backup_list_fs(struct dr_fs *fs, const char *set, struct dr_backup_entry **list, size_t *n,
                      struct dr_error *err);
int dr_backup_look_fs(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e,
                      const struct dr_open_options *open, struct dr_backup_files *files,
                      struct dr_error *err);
int dr_backup_verify_fs(struct dr_fs *fs, const char *set, const char *name,
                        const struct dr_open_options *open, struct dr_disk *against,
                        struct dr_job *job, struct dr_error *err);
int dr_backup_prune_fs(struct dr_fs *fs, const char *set, const struct dr_prune_options *options,
                       struct dr_job *job, struct dr_error *err);
int dr_restore_fs(struct dr_fs *fs, const char *source, const char *disk,
                  const struct dr_restore_options *options, struct dr_job *job, uint64_t *written,
                  struct dr_error *err);

/* ------------------------------------------------------------------ snapshot-switch.c */

/* Freeze the images below the active one that a snapshot could not freeze. Whoever changes the
 * chain of an open disk begins with it, once the disk is claimed: a failure is one that the disk's
 * flushes have, too. job may be NULL. */
int dr_ops_freeze_parents(struct dr_disk *disk, struct dr_job *job, struct dr_error *err);

/* ------------------------------------------------------------------ remove.c */

/* Names of the images beside the open image that have it as their parent, with commas between;
 * malloc'ed, "" = none. */
int dr_ops_children(struct dr_image *image, const struct dr_open_options *open, char **names,
                    struct dr_error *err);
/* Lock the image as a writer does, so that nobody else has it open; nothing is written. */
int dr_ops_lock(struct dr_image *image, struct dr_error *err);
/* Remove the image at path, with all its files. -EBUSY: somebody uses it, or an image beside it has
 * it as its parent. may (or NULL) is asked before, when nobody else can open the image any more. */
int dr_ops_remove_image(struct dr_fs *fs, const char *path, const char *format,
                        const struct dr_open_options *open,
                        int (*may)(void *user, struct dr_image *image, struct dr_error *err),
                        void *user, struct dr_error *err);

/* Does nothing stand in the image itself, so that it shows what its parent shows? */
bool dr_ops_holds_nothing(struct dr_image *image);

/* The images of a disk's chain, to remove those that an operation takes out of it. */
struct dr_ops_left {
    char **paths;
    const struct dr_format **formats;
    size_t n;
};
int dr_ops_left_begin(struct dr_ops_left *left, struct dr_disk *disk, struct dr_error *err);
/* Remove those that are not in the chain any more. Does nothing before dr_ops_left_begin. */
int dr_ops_left_remove(const struct dr_ops_left *left, struct dr_disk *disk,
                       const struct dr_open_options *open, struct dr_error *err);
void dr_ops_left_free(struct dr_ops_left *left);

/* ------------------------------------------------------------------ retire.c */

/* -EBUSY: other images beside the open image have it as their parent. */
int dr_ops_retire_check(struct dr_image *image, const struct dr_open_options *open,
                        struct dr_error *err);
/* Remove all of the open image but its plain file, which is the disk by now. */
int dr_ops_retire_remove(struct dr_image *image, const struct dr_open_options *open,
                         struct dr_error *err);
/* The disk went on with the plain file of the image at path, and then its process was killed:
 * remove the rest of that image, if it is still there. */
int dr_ops_retire_rest(struct dr_disk *disk, const char *path, const struct dr_open_options *open,
                       struct dr_error *err);

/* ------------------------------------------------------------------ snapshots-inside.c */

/* -ENOTSUP if the image has snapshots inside: they share its parent. what: would change it, for the
 * text. */
int dr_ops_refuse_snapshots(struct dr_image *image, const char *what, struct dr_error *err);

/* ------------------------------------------------------------------ bitmaps.c */

/* Change a bitmap of the active image of a disk that the caller has claimed. Without a source it is
 * the image itself. Durable on return. */
int dr_ops_bitmap_change(struct dr_disk *disk, struct dr_bitmap_change *change,
                         struct dr_error *err);
/* Before any data is copied: can the bitmaps of the one disk's top image get into the other's? */
int dr_ops_bitmaps_check(struct dr_disk *from, struct dr_disk *to,
                         const struct dr_convert_options *o, struct dr_error *err);
/* Copy them, but for inconsistent ones. */
int dr_ops_bitmaps_copy(struct dr_disk *from, struct dr_disk *to, struct dr_job *job,
                        struct dr_error *err);

/* Can all bitmaps of one image be kept in another one? -ENOTSUP: no. */
int dr_ops_bitmaps_check_move(struct dr_image *from, struct dr_image *to, struct dr_error *err);
/* Put them there; a bitmap of that name gets what the other one has, too. Nobody uses the images,
 * and `from` is not written to any more after success. */
int dr_ops_bitmaps_move(struct dr_image *from, struct dr_image *to, struct dr_job *job,
                        struct dr_error *err);

/* ------------------------------------------------------------------ directories of images (scan.c)
 *
 * Look at each file of some directories, without locks and without parents. Files that are no image
 * of a format with a magic number are listed as raw, unopened. */

struct dr_scan_entry {
    char *path;
    struct dr_file_id id;
    const struct dr_format *fmt; /* NULL = it is none that opens, problem says why */
    uint64_t size, disk_size;
    bool unclean;
    char *backing_name; /* as recorded, or NULL */
    char *backing_path; /* where that is, or NULL: nowhere */
    struct dr_file_id backing_id;
    char *backing_format; /* as recorded, or NULL */
    bool has_ids;         /* with: */
    uint32_t content_id, parent_id;
    char *problem;
};

struct dr_scan {
    struct dr_scan_entry *all;
    size_t n;
    char **dirs; /* that were scanned: the images of a chain are mostly in one */
    size_t n_dirs;
    struct dr_file_id *parts; /* files of images, besides their main files */
    size_t n_parts;
};

/* Add the files of dir that are not in the scan yet. A directory is looked at once. */
int dr_scan_dir(struct dr_scan *s, struct dr_fs *fs, const char *dir,
                const struct dr_open_options *options, struct dr_error *err);
/* Add the one file at path. */
int dr_scan_file(struct dr_scan *s, struct dr_fs *fs, const char *path,
                 const struct dr_open_options *options, struct dr_error *err);
void dr_scan_free(struct dr_scan *s);
/* Add the files beside path and, if it leads elsewhere by links, those beside the file itself. */
int dr_scan_beside(struct dr_scan *s, struct dr_fs *fs, const char *path,
                   const struct dr_open_options *options, struct dr_error *err);
/* The entry of this file, or n. */
size_t dr_scan_find(const struct dr_scan *s, struct dr_file_id id);
/* Is the file an extent, or the data file, of one of the images? */
bool dr_scan_is_part(const struct dr_scan *s, struct dr_file_id id);
/* Not opened to look on: raw, or a file of several disks none of which is named. */
bool dr_scan_is_opaque(const struct dr_scan_entry *e);
/* Does the entry name the file of this id, or a part of it, as its parent? */
static inline bool dr_scan_is_child(const struct dr_scan_entry *e, struct dr_file_id parent)
{
    return e->backing_path && dr_ids_overlap(e->backing_id, parent);
}

/* ------------------------------------------------------------------ small things (util.c) */

/* Is there a block device at path? It is written to, never replaced. */
bool dr_ops_is_device(struct dr_fs *fs, const char *path);

/* The format by this name, or a failure that lists the ones there are. need: enum dr_format_flag.
 */
const struct dr_format *dr_ops_format(const char *name, unsigned need, struct dr_error *err);
/* Is the file at path one of those that the chain reads? Locks would say so, too, but not what is
 * wrong; and they may be off. */
bool dr_ops_reads(struct dr_fs *fs, const struct dr_chain *chain, const char *path);
/* Settings as the drivers take them, malloc'ed. */
int dr_ops_settings(const struct dr_pair *pairs, size_t n, struct dr_option **options,
                    struct dr_error *err);
/* In which format an image of format fmt at path opens a parent: as given, or the only one there
 * can be, or its default. A parent is never probed: what a guest wrote into a raw one would decide.
 * Only a default that the parent does not look like is not taken. -EINVAL: it must be told. */
int dr_ops_parent_format(struct dr_fs *fs, const struct dr_format *fmt, const char *path,
                         const char *parent, const char *given, const char **format,
                         struct dr_error *err);
/* enum dr_file_flag for enum dr_open_flag, as far as new files are concerned. */
unsigned dr_ops_file_flags(unsigned open_flags);
/* Malloc'ed list of names in a directory, sorted; free with dr_ops_free_names. */
int dr_ops_list(struct dr_fs *fs, const char *dir, char ***names, size_t *n, struct dr_error *err);
void dr_ops_free_names(char **names, size_t n);
/* Is there a directory at path that can be listed? */
bool dr_ops_is_directory(struct dr_fs *fs, const char *path);
/* Give the file `to` owner, mode and labels of the file `from`, as far as we may. */
void dr_ops_copy_attrs(struct dr_fs *fs, const char *from, const char *to);
/* Bytes free at path; UINT64_MAX when that is not known. */
uint64_t dr_ops_free_space(struct dr_fs *fs, const char *path);
/* The same where the image keeps its data. */
uint64_t dr_ops_image_space(const struct dr_image *image);
/* Bytes that the image's files take in the file system. */
int dr_ops_disk_size(struct dr_image *image, uint64_t *bytes, struct dr_error *err);
/* Find the image's recorded backing, *path malloc'ed: the one that opening takes, or if it takes
 * none the first that is there. -ENOENT with *path NULL: it has none or it is nowhere. */
int dr_ops_backing_path(struct dr_image *image, const struct dr_open_options *options, char **path,
                        struct dr_error *err);
/* The secret that the settings of a new, encrypted image name; NULL: it is not encrypted. */
const char *dr_ops_key_secret(const struct dr_pair *pairs, size_t n);
/* name as recorded in an image at path → where that is. */
char *dr_ops_resolve(const char *path, const char *name);
/* Which image of the chain does the user mean by name? As a path, as a name in the top image's
 * directory, or as it is recorded. chain->n = none. */
size_t dr_ops_member(const struct dr_chain *chain, const char *name);
/* The name under which an image at path records the file at target: relative if it can be.
 * Malloc'ed, NULL = out of memory. */
char *dr_ops_name_from(struct dr_fs *fs, const char *path, const char *target);
/* The same for images[k] of an open chain. A password or cookie that was given when the chain was
 * opened, and that no header of it has, is not recorded. */
char *dr_ops_name_of(struct dr_fs *fs, const char *path, const struct dr_chain *chain, size_t k);
/* Remove the files that interrupted attempts made to replace the file at path, if is_dead says so
 * of one. NULL: all are; the caller holds the lock of the file at path, so no attempt is under way.
 */
void dr_ops_remove_asides(struct dr_fs *fs, const char *path,
                          bool (*is_dead)(struct dr_fs *fs, const char *aside));

static inline void dr_cleanup_disk(struct dr_disk **disk)
{
    if (*disk)
        dr_close(*disk, NULL);
}
static inline void dr_cleanup_file(struct dr_file **file)
{
    dr_file_unref(*file);
}
static inline void dr_cleanup_image(struct dr_image **image)
{
    dr_image_unref(*image, NULL);
}
#define CLEANUP_DISK  __attribute__((cleanup(dr_cleanup_disk)))
#define CLEANUP_FILE  __attribute__((cleanup(dr_cleanup_file)))
#define CLEANUP_IMAGE __attribute__((cleanup(dr_cleanup_image)))

/* Close a disk whose closing may fail, and forget it. */
static inline int dr_ops_close(struct dr_disk **disk, struct dr_error *err)
{
    struct dr_disk *d = *disk;
    *disk = NULL;
    return d ? dr_close(d, err) : 0;
}

#endif
