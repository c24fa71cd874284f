/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The inside of a dr_live.
 *
 *   live.c           disks by their names, beginning and end
 *   stall.c          requests of guests that wait until there is space for them
 *   state.c          the file that outlives the process
 *   leftovers.c      files that changes of chains leave
 *   jobs.c           jobs: a state machine around the operations of drover/ops.h, and its events
 *   qmp.c            the wire: clients, lines, replies, events
 *   qmp-commands.c   the table of commands, and what becomes of a line
 *   qmp-jobs.c       commands that begin jobs or speak to them
 *   qmp-disks.c      commands that ask about disks or change them at once
 *   qmp-edit.c       commands that change what lies below active images
 *   qmp-nodes.c      commands that give images names, for others to mean them by
 *   qmp-archive.c    backups of several disks into one archive, and where slow backups spill
 *   qmp-backup.c     backups of disks into images that are there, and transactions of them
 *   qmp-bitmaps.c    commands about bitmaps of what guests write
 *   bitmap-changes.c what these do, alone or at one instant with others
 *   qmp-snapshots.c  snapshots
 *   qmp-transaction.c several of these commands at one instant
 *   qmp-exports.c    commands that change what NBD clients see
 *
 * One lock covers everything here. It is never held while an operation runs, nor over a system call
 * on a file, and no request or question that passes a disk's gate is made under it: while the gate
 * is closed, live_record() takes the lock. Events are queued under it, so all clients see them in
 * the order in which they happened. */
#ifndef DR_LIVE_LIVE_H
#define DR_LIVE_LIVE_H

#include <jansson.h>
#include <pthread.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "drover/backup.h"
#include "drover/live.h"
#include "drover/ops.h"
#include "ops/point-backup.h"

#define LIVE_NAME_MAX    31
#define LIVE_LINE_MAX    (1u << 20) /* bytes of a request */
#define LIVE_OUT_MAX     (8u << 20) /* bytes that wait for a client: then it is hung up on */
#define LIVE_CLIENTS_MAX 16

struct live_disk {
    struct live_disk *next;
    char *name;
    struct dr_disk *disk;
    char *path, *format; /* of its active image; under the lock */
    char *first;         /* path that its active image had when the state first heard of the disk */
    struct dr_live *live;
    struct dr_stall *stall; /* its guest's requests go through it; or NULL */
    struct live_node *node; /* blockdev-add named it, and it is closed by us; else NULL */
    uint64_t size;          /* that the program knows; under the lock */
    struct dr_memory_bitmaps *bitmaps; /* that end with this server, or NULL; set under the lock by
                                          the thread of the clients */
};

/* An image, or the bytes of a file, has a name. Where blockdev-add gave it, it need not be part of
 * any disk, and nothing has it open until a command uses it. Only the thread of the clients
 * changes and removes nodes, so it may look at one without the lock. */
struct live_node {
    struct live_node *next;
    char *name, *path;
    bool added;      /* by blockdev-add; what follows is only said of these */
    bool inner;      /* described inside another node, and goes with that */
    char *format;    /* NULL: the bytes of a file */
    char *file_node; /* the node that the client named as its file, or NULL */
    bool read_only, has_parent;
    unsigned flags; /* enum dr_open_flag, without RDWR */
    uint64_t size;
};

/* NBD clients see a disk. */
struct live_export {
    struct live_export *next;
    char *id;
    struct live_disk *on;
    bool removed; /* but requests may be under way */
};

/* The names are QEMU's (JobStatus). */
enum live_status {
    LIVE_CREATED,
    LIVE_RUNNING,
    LIVE_PAUSED,
    LIVE_READY,
    LIVE_STANDBY,
    LIVE_WAITING,
    LIVE_PENDING,
    LIVE_ABORTING,
    LIVE_CONCLUDED,
    LIVE_NULL,
};

enum live_kind { LIVE_STREAM, LIVE_COMMIT, LIVE_MIRROR, LIVE_REBASE, LIVE_BACKUP };

/* What a job does about what it cannot read or write; the names are QEMU's (BlockdevOnError). */
enum live_on_error { LIVE_REPORT, LIVE_IGNORE, LIVE_ENOSPC, LIVE_STOP };

struct live_names {
    char **all;
    size_t n;
};

/* Images by their paths and formats; a format is one of the registry's own strings. */
struct live_images {
    struct live_image {
        char *path;
        const char *format;
    } * all;
    size_t n;
};

/* What a job is to do. */
struct live_order {
    enum live_kind kind;
    char *base; /* stream, commit: path of an image of the chain; rebase: the new parent; or NULL */
    char *top;  /* of an image of the chain: what goes down first; stream, rebase: the image that is
                   filled; NULL = the active one */
    char *target, *format; /* target: of a mirror or backup; with retire: the active image, whose
                              metadata goes */
    char *set, *bitmap;    /* backup: as in struct dr_backup_options, or NULL */
    bool full;             /* the same */
    struct live_archive *archive; /* backup: of several disks into target, an archive; or NULL */
    struct dr_point *point;       /* backup: whose instant is over; the job's own; or NULL */
    char *spill;                  /* backup: as in struct dr_backup_spill, or NULL */
    uint64_t spill_size;
    bool spill_fails;
    struct live_images leaving; /* stream with remove, commit: images that leave the chain, upper
                                   ones first; under the lock */
    bool retire;                /* stream: go on with the active image's plain file alone */
    bool remove;                /* stream, commit: remove the files of what leaves the chain */
    bool force;                 /* commit: even if other images have the base as their parent */
    bool existing, top_only, only_new, write_blocking, bitmaps; /* mirror */
    unsigned flags;                   /* mirror: enum dr_open_flag of the target */
    bool keep_finalize, keep_dismiss; /* wait for job-finalize, job-dismiss */
    bool paused;                      /* from the beginning */
    int stopped_by; /* 0, or the positive errno for which an earlier server had paused it */
    enum live_on_error on_source_error, on_target_error;
    uint64_t speed;
    bool hurry; /* do not give way to the guest */
};

struct live_job {
    struct live_job *next;
    struct dr_live *live;
    struct live_disk *on;
    struct live_order order;
    struct dr_job *job;
    pthread_t thread;
    pthread_cond_t changed;
    enum live_status status;
    unsigned group;        /* jobs with the same number complete together; 0: alone */
    unsigned step, passed; /* of the group: up to which it has come / all have */
    bool begun, dropped;   /* dropped: it never begins */
    bool ended;            /* its operation has a result, or there is none */
    bool paused, cancelled, finalize;
    bool done;      /* its operation has ended */
    bool naming;    /* mirror: its new target is about to get its name, or has it */
    bool switched;  /* the disk has gone over, so that there is nothing for the next server to do */
    bool stays;     /* the server ends: it is joined and freed there */
    bool kept;      /* and the next server shall go on with it */
    int stopped_by; /* 0, or the positive errno for which it was paused */
    char *message;  /* the last one of its operation, or NULL; under the lock */
    int result;
    struct dr_error error;
};

struct live_client;

struct dr_live {
    pthread_mutex_t lock;
    char *control;
    void (*quit)(void *user);
    void (*resized)(void *user, const char *name);
    void (*write_back)(void *user, const char *name);
    void (*failed)(void *user, const struct dr_error *err);
    void *failed_user;
    void *user;
    struct dr_fs *fs; /* of the state; tests have another one */
    char *state;
    struct dr_file *state_file; /* open and locked; under state_lock */
    pthread_mutex_t state_lock; /* taken before the lock, and held while the state is written */
    json_t *other_disks, *other_jobs; /* what the state says of disks that are not here */
    bool changed;              /* a job has begun or ended, and the state does not say so yet */
    struct live_names emptied; /* overlays that commits have emptied and left */
    struct live_names making;  /* new images of snapshots that are under way */
    char **allow;              /* NULL-terminated, or NULL */
    const struct dr_live_exports *served;
    struct live_export *exports;
    bool hung_up; /* by nbd-server-stop; of the clients' thread */
    struct live_disk *disks;
    struct live_node *nodes;
    unsigned unnamed; /* nodes that nobody gave a name */
    unsigned groups;  /* jobs that complete together: numbers given away */
    struct live_planned
        *planned; /* by the transaction that is being read; of the clients' thread */
    struct live_job *jobs, *gone; /* gone: their threads are to be joined */
    struct live_client *clients;
    pthread_t thread;
    bool started, stopping, quitting;
    int listener, bell; /* bell: an eventfd that wakes the thread */
};

/* ------------------------------------------------------------------ live.c; all under the lock */

struct live_disk *live_find_disk(struct dr_live *live, const char *name);
/* Like it, and also by the name that a client gave to its active image. */
struct live_disk *live_find_device(struct dr_live *live, const char *name);
/* The n-th disk, or NULL. Takes the lock itself. Only the thread of the clients closes one. */
struct live_disk *live_nth_disk(struct dr_live *live, size_t n);
const char *live_node_path(const struct dr_live *live, const char *name); /* or NULL */
/* The name of an image's node: what a client called it, or one that is made up now. */
const char *live_node_of(struct dr_live *live, const char *path);
bool live_is_name(const char *name);
/* May a client call something so? */
int live_check_name(struct dr_live *live, const char *name, struct dr_error *err);
int live_name_node(struct dr_live *live, const char *name, const char *path, struct dr_error *err);
struct live_node *live_find_node(const struct dr_live *live, const char *name); /* or NULL */
void live_free_node(struct live_node *node);                                    /* may be NULL */
/* Takes over a node's disk, also on failure; NULL = out of memory. Not in the list yet. */
struct live_disk *live_make_disk(const char *name, struct dr_disk *disk);
void live_free_disk(struct live_disk *d); /* may be NULL; its dr_disk stays open */
void live_wake(struct dr_live *live);
/* Without the lock: if the disk has another size than the program knows, tell the program. */
void live_tell_size(struct dr_live *live, struct live_disk *d);

/* ------------------------------------------------------------------ stall.c */

/* Called without any lock of the stall when a request has failed; waits: it is made again. */
typedef void (*live_stall_listener)(void *user, int error, bool waits, const char *text);
void live_stall_listen(struct dr_stall *stall, live_stall_listener listener, void *user);
/* The positive errno for which requests wait, or 0. */
int live_stall_error(struct dr_stall *stall);

/* ------------------------------------------------------------------ state.c; without the lock */

int live_recall_fs(struct dr_fs *fs, const char *state, const char *name, const char *given,
                   char **path, char **format, struct dr_error *err);
/* Read it, and begin its jobs again. */
int live_state_begin(struct dr_live *live, struct dr_error *err);
int live_state_save(struct dr_live *live, struct dr_error *err);
int live_state_save_if_changed(struct dr_live *live, struct dr_error *err);
/* Disks are about to go on with other images. */
int live_record(struct dr_live *live, const struct dr_switch *switches, size_t n,
                struct dr_error *err);

/* ------------------------------------------------------------------ leftovers.c */

/* Under the lock. False: out of memory. A name is in a list once. */
bool live_names_add(struct live_names *names, const char *name);
void live_names_remove(struct live_names *names, const char *name);
bool live_names_copy(const struct live_names *from, struct live_names *to);
json_t *live_names_json(const struct live_names *names); /* NULL: one is not UTF-8, or no memory */
void live_names_free(struct live_names *names);

/* The rest without the lock. Remove what the state knows of and no disk went on with. */
int live_leftovers_begin(struct dr_live *live, json_t *state, struct dr_error *err);
/* Images at these paths are about to be made, and nothing is there / they are made or given up. */
int live_making(struct dr_live *live, const char *const *paths, size_t n, bool begin,
                struct dr_error *err);
/* Does the disk's chain have the image at this path? */
bool live_has_image(const struct live_disk *on, const char *path);
/* The images that job takes out of its disk's chain, unless an earlier server has noted them. On
 * the job's thread, before anything changes. */
int live_note_leaving(struct live_job *job, struct dr_error *err);
/* An earlier server may have been killed when images had left the chain, but not all their files
 * were removed: remove the rest. */
int live_remove_left(const struct live_job *job, struct dr_error *err);
json_t *live_images_json(const struct live_images *images); /* NULL: as live_names_json */
/* What a job of an earlier server, as the state has it, takes out of its chain. */
int live_leaving_parse(const json_t *job, struct live_images *images, struct dr_error *err);
void live_images_free(struct live_images *images);

/* ------------------------------------------------------------------ jobs.c; under the lock */

/* Begin a job; the strings in *order are taken over, also on failure. Its point is only taken over
 * if the job begins: giving one up waits for requests of the disk. */
int live_job_begin(struct dr_live *live, struct live_disk *on, const char *id,
                   struct live_order *order, struct dr_error *err);
/* The same in two steps: created, it has its name and its thread, and then begins or is dropped. In
 * between, job->group and what is in its order may be set. Dropping leaves the point to the caller,
 * who takes it out of the order first. */
int live_job_create(struct dr_live *live, struct live_disk *on, const char *id,
                    struct live_order *order, struct live_job **job, struct dr_error *err);
void live_job_start(struct live_job *job);
void live_job_drop(struct live_job *job);
struct live_job *live_job_find(struct dr_live *live, const char *id);
/* A job that has not ended on this disk, or NULL. */
struct live_job *live_job_on(struct dr_live *live, const struct live_disk *on);
const char *live_kind_name(enum live_kind kind);
const char *live_status_name(enum live_status status);
/* "report" and so on; NULL = another number. */
const char *live_on_error_name(enum live_on_error policy);
/* -EINVAL: there is no such name. */
int live_on_error_parse(const char *name, enum live_on_error *policy);
/* What QEMU calls the io-status: "ok", "nospace", "failed". error: a positive errno, or 0. */
const char *live_io_status(int error);
/* An error that has this io-status; NULL or another word: 0. */
int live_io_error(const char *status);

enum live_verb {
    LIVE_CANCEL,
    LIVE_PAUSE,
    LIVE_RESUME,
    LIVE_SET_SPEED,
    LIVE_COMPLETE,
    LIVE_FINALIZE,
    LIVE_DISMISS,
};
/* -EINVAL: not in the job's state. force: of CANCEL; speed: of SET_SPEED. */
int live_job_do(struct live_job *job, enum live_verb verb, bool force, uint64_t speed,
                struct dr_error *err);
/* Cancel all; the state keeps those that nobody else has cancelled. Takes the lock itself. */
void live_jobs_stop(struct dr_live *live);
/* Stop all and wait for them. Takes the lock itself. */
void live_jobs_end(struct dr_live *live);
/* Free those whose threads have ended. Takes the lock itself. */
void live_jobs_reap(struct dr_live *live);
void live_order_clear(struct live_order *order);

/* ------------------------------------------------------------------ job-groups.c; under the lock
 */

bool live_group_has(const struct live_job *job, const struct live_job *other);
void live_group_wake(struct live_job *job);
/* All members are in WAITING. */
bool live_group_waits(const struct live_job *job);
/* One member's wish is that of all. */
bool live_group_by_hand(const struct live_job *job);
/* The operation of a member has ended; r: its result. Waits until it may conclude. */
void live_group_end(struct live_job *job, int r);
/* Of a struct live_job; takes the lock itself, on the job's thread. It has come to its next step:
 * wait for the others. Other than 0: one of them never comes so far. */
int live_group_keep_step(void *user);

/* ------------------------------------------------------------------ qmp.c */

int live_listen(struct dr_live *live, struct dr_error *err);
void live_hang_up(struct dr_live *live);
/* To all clients, under the lock. Takes over data, which may be NULL. Without memory it is lost. */
void live_event(struct dr_live *live, const char *name, json_t *data);

/* ------------------------------------------------------------------ qmp-commands.c */

struct qmp_error {
    const char *class; /* NULL = GenericError */
    struct dr_error text;
};
#define QMP_ERROR_INIT      \
    {                       \
        NULL, DR_ERROR_INIT \
    }

struct qmp_arg {
    const char *name;
    char type; /* 's'tring, 'n'umber (not negative), 'u': the same with another text, 'b'ool,
                  'l'ist, 'o'bject, 'r'eference to a node (its name, or an object that describes
                  it), 'R': that, or null */
    bool required;
};
#define QMP_ARGS_MAX 24
struct qmp_command {
    const char *name;
    /* args has what the table allows, with the right types. The result is a new reference; NULL: it
     * failed, and err says how. Called without the lock. */
    json_t *(*run)(struct dr_live *live, json_t *args, struct qmp_error *err);
    struct qmp_arg args[QMP_ARGS_MAX]; /* ends with a NULL name; "*": run checks them itself */
};
extern const struct qmp_command
    *const qmp_tables[]; /* each ends with a NULL name; NULL-terminated */
extern const struct qmp_command qmp_job_commands[], qmp_disk_commands[], qmp_node_commands[],
    qmp_export_commands[], qmp_edit_commands[], qmp_own_commands[], qmp_archive_commands[],
    qmp_bitmap_commands[], qmp_backup_commands[], qmp_snapshot_commands[],
    qmp_transaction_commands[];

const struct qmp_command *qmp_find_command(const char *name); /* or NULL */
/* One line of a client: a new reference to the reply. *negotiated: has it said qmp_capabilities? */
json_t *qmp_answer(struct dr_live *live, const char *line, size_t len, bool *negotiated);
/* Are args what the table takes? As QEMU does, look at what is known in the table's order first.
 * where: goes before their names in texts, "" or "file.". */
int qmp_check_args(const struct qmp_arg *table, const char *where, json_t *args,
                   struct qmp_error *err);
json_t *qmp_greeting(void);

/* Fails with the text; returns NULL. class NULL = GenericError. */
json_t *qmp_fail(struct qmp_error *err, const char *class, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* The reply of a command that has nothing to say, or NULL after a failure r < 0. */
json_t *qmp_done(int r);
const char *qmp_string(json_t *args, const char *name); /* or NULL */
bool qmp_bool(json_t *args, const char *name, bool otherwise);
uint64_t qmp_number(json_t *args, const char *name);
/* The disk that "device" or "node-name" means, or NULL and a failure. A node that blockdev-add
 * named is opened for that. Without the lock. */
struct live_disk *qmp_device(struct dr_live *live, json_t *args, struct qmp_error *err);
/* The same where "device" may be a node's name, too; and where it is called "node". */
struct live_disk *qmp_root_device(struct dr_live *live, json_t *args, struct qmp_error *err);
struct live_disk *qmp_node_device(struct dr_live *live, json_t *args, struct qmp_error *err);

/* ------------------------------------------------------------------ qmp-jobs.c */

/* The path of the image of the disk's chain that a client means, malloc'ed: by a node's name, or by
 * the name of its file. NULL and 0: it means none. */
int qmp_chain_path(struct dr_live *live, const struct live_disk *on, const char *node,
                   const char *file, char **path, struct qmp_error *err);
/* A path that a client named for the disk, malloc'ed; NULL and a failure: it must not be used. */
char *qmp_gated_path(struct dr_live *live, const struct live_disk *on, const char *path,
                     struct qmp_error *err);
/* Begin a job with the arguments that all jobs have; the strings in *order are taken over, and its
 * point if the job begins. created: not NULL, it is only created. */
json_t *qmp_begin_job(struct dr_live *live, struct live_disk *on, json_t *args,
                      struct live_order *order, struct live_job **created, struct qmp_error *err);

/* ------------------------------------------------------------------ qmp-archive.c */

/* The operation of a backup into an archive. */
int live_archive_run(struct live_job *job, struct dr_error *err);
/* Is the disk one of its disks? NULL allowed, as for freeing. */
bool live_archive_has(const struct live_archive *a, const struct live_disk *on);
void live_archive_free(struct live_archive *a);
/* The arguments that say where a backup spills; points into the order. */
int qmp_spill(struct dr_live *live, const struct live_disk *on, json_t *args,
              struct live_order *order, struct qmp_error *err);
struct dr_backup_spill live_spill(const struct live_order *order);

/* ------------------------------------------------------------------ qmp-bitmaps.c */

/* The bitmaps of chain's image i as queries show them, or NULL: it has none. The caller is past the
 * disk's gate, without the lock. */
json_t *live_show_bitmaps(struct dr_live *live, const struct live_disk *on, struct dr_image *image);

struct live_bitmap {
    bool found, stored; /* stored: persistent */
    bool enabled, inconsistent, busy;
    uint64_t granularity;
};
/* Look up a bitmap of the disk's active image. */
int live_find_bitmap(struct dr_live *live, struct live_disk *on, const char *name,
                     struct live_bitmap *b, struct qmp_error *err);
/* May it be used, and with change, changed? Else QEMU's text. */
int live_check_bitmap(const struct live_disk *on, const char *name, const struct live_bitmap *b,
                      bool change, struct qmp_error *err);

/* A bitmap as it will be when the actions that were read have been carried out. */
struct live_planned {
    struct live_planned *next;
    char *image, *name;
    struct live_bitmap b;
};
int live_plan_bitmap(struct dr_live *live, const char *image, const char *name,
                     const struct live_bitmap *b, struct qmp_error *err);
void live_forget_plans(struct dr_live *live);

/* A change of a bitmap that was read and found possible. */
struct live_change {
    enum dr_bitmap_action action;
    struct live_disk *on;
    char *image;      /* the path of the disk's image whose bitmap it is */
    const char *name; /* lives as long as the arguments that were read */
    bool stored, disabled /* of ADD */;
    uint64_t granularity;
    struct live_source {
        struct live_disk *on;
        char *image;
        const char *name;
        bool stored;
    } * sources; /* of MERGE */
    size_t n_sources;

    /* private: what undoing takes */
    struct dr_marks before;
    bool was_enabled, saved, readable, done;
};
/* Of a command's arguments. planned: the next one to be read finds the bitmap as it will be then.
 * Ends with live_change_free, also after a failure. */
int live_read_change(struct dr_live *live, enum dr_bitmap_action action, json_t *args, bool planned,
                     struct live_change *c, struct qmp_error *err);

/* ------------------------------------------------------------------ bitmap-changes.c */

/* Disks whose requests wait. */
struct live_moment {
    struct live_held {
        struct live_disk *on;
        struct dr_chain *chain; /* the present one */
        bool stored;            /* a bitmap that its image keeps changes */
        bool borrowed;
    } * all;
    size_t n;
};
/* What a stored bitmap has by now is added to into, which covers the disk. */
int live_read_stored(struct dr_image *image, const char *name, struct dr_marks *into,
                     struct dr_error *err);
int live_change_now(const struct live_change *c, struct dr_error *err);
/* The moment has all disks of the change. Undone, if it was done, in the same moment. */
int live_change_quiet(struct live_change *c, const struct live_moment *m, struct dr_error *err);
int live_change_undo(struct live_change *c, const struct live_moment *m, struct dr_error *err);
void live_change_free(struct live_change *c);

/* ------------------------------------------------------------------ qmp-backup.c */

/* A backup that is ready for its instant; the disk is claimed. */
struct live_ready {
    struct live_disk *on;
    struct live_job *job;   /* created */
    struct dr_point *point; /* in the job's order, too */
};
/* Read the arguments of a command, node: of blockdev-backup, and make it ready. late: bitmaps
 * change at the same instant, before it. */
int live_ready_backup(struct dr_live *live, json_t *args, bool node, bool late,
                      struct live_ready *ready, struct qmp_error *err);

/* drive-backup in those forms that QEMU has and x-set has not. */
bool qmp_is_point_backup(json_t *args);
json_t *qmp_drive_backup(struct dr_live *live, json_t *args, struct qmp_error *err);

/* ------------------------------------------------------------------ qmp-snapshots.c */

struct live_shot {
    struct dr_overlay overlay;
    char *path;
    const char *node; /* what the client calls the new image; or NULL */
    struct live_disk *on;
};
extern const struct qmp_arg qmp_snapshot_args[], qmp_overlay_args[];
/* shots[n] by the arguments of a command; those before were read. The path is to be freed. */
int live_read_shot(struct dr_live *live, json_t *args, struct live_shot *shot,
                   struct qmp_error *err);
int live_read_overlay(struct dr_live *live, json_t *args, struct live_shot *shots, size_t n,
                      struct qmp_error *err);
json_t *live_take_shots(struct dr_live *live, struct live_shot *shots, size_t n,
                        struct qmp_error *err);

/* ------------------------------------------------------------------ qmp-edit.c */

/* The disk that "device" means. By the name of a node it may also mean an image below an active
 * one, as may "x-image", the name of its file: *image is its path then, malloc'ed, else NULL. NULL
 * and a failure: it means none. Takes the lock itself. */
struct live_disk *qmp_device_image(struct dr_live *live, json_t *args, char **image,
                                   struct qmp_error *err);

/* ------------------------------------------------------------------ qmp-disks.c */

char *live_full_path(const struct live_disk *on, const char *path);
/* May a client make or use a file at this path for the disk? Without the lock. */
int live_gate(struct dr_live *live, const struct live_disk *on, const char *path,
              struct dr_error *err);

/* ------------------------------------------------------------------ qmp-exports.c; under the lock
 */

int live_export_add(struct dr_live *live, const char *id, struct live_disk *on,
                    struct dr_error *err);
bool live_is_exported(const struct dr_live *live, const struct live_disk *on);
void live_free_exports(struct dr_live *live);

/* ------------------------------------------------------------------ qmp-nodes.c; without the lock
 */

/* The disk of a node that blockdev-add named, opened if it is not; NULL and a failure. */
struct live_disk *live_node_disk(struct dr_live *live, struct live_node *node,
                                 struct dr_error *err);
/* The node's image is about to be opened by others, or forgotten: close it here. -EBUSY: it is in
 * use. */
int live_node_let_go(struct dr_live *live, struct live_node *node, struct dr_error *err);
/* A node that can become part of a disk, since blockdev-add named it. NULL and a failure. */
struct live_node *qmp_free_node(struct dr_live *live, const char *name, struct qmp_error *err);

#endif
