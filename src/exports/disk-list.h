/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The disks that one server shows: what the NAME=VALUE parameters say about them, and opening and
 * closing them. It knows nothing of nbdkit. */
#ifndef DR_EXPORTS_DISK_LIST_H
#define DR_EXPORTS_DISK_LIST_H

#include <pthread.h>

#include "drover/live.h"

enum disk_mode {
    DISK_AS_ASKED,   /* opened by the first client, for writing if it may write */
    DISK_READ_ONLY,  /* opened at once */
    DISK_READ_WRITE, /* opened at once; it is an error if that cannot be */
};

struct disk_settings {
    struct dr_open_options open; /* its flags without RDWR */
    enum disk_mode mode;
    bool temporary; /* what is written is thrown away */
    enum dr_stall_policy on_error;
};

struct disk_list;

struct served {
    struct disk_list *list;
    char *name; /* of the export; unlike all others */
    char *path; /* absolute, as dr_open() takes it */
    struct disk_settings settings;
    struct dr_disk *disk;   /* NULL: not open. Set under the list's lock */
    struct dr_stall *stall; /* what clients change goes through it */
};

struct shown;

struct disk_list {
    struct served *served;
    size_t n;
    struct disk_settings before; /* what was said before the first disk holds for all */
    char **texts;                /* what the settings point to */
    size_t n_texts;
    char **allowed; /* NULL-terminated */
    size_t n_allowed;
    const char *description;     /* what clients are told of all disks; NULL: what each is */
    const char *control, *state; /* of struct dr_live_options; or NULL */
    struct dr_live *live;        /* while they are open and one of these is given */
    int ready_fd; /* -1, or where to tell that all disks are open, and later that they are closed */
    bool opened;  /* disk_list_open() was fine */
    bool well;    /* no disk has failed to close; while disk_list_close() runs, as the next two */
    void (*failed)(void *user, const struct dr_error *err);
    void *failed_user;
    struct shown *shown; /* shown.c */
    /* Requests of a disk begin to wait, as struct dr_stall_options has it; or NULL. */
    void (*waits)(void *user, const char *name, const char *text);
    void *user; /* of waits */
    pthread_mutex_t lock;
};
#define DISK_LIST_INIT                                    \
    {                                                     \
        .ready_fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER \
    }

#define DISK_LIST_HELP                                                                             \
    "[disk=]DISK          (required) a disk, as drover names them; several may be given\n"         \
    "What follows holds for the disk before it; before the first disk, for all:\n"                 \
    "export=NAME          name of the export (default: the file's or the member's name)\n"         \
    "format=FORMAT        of the top image (default: find out)\n"                                  \
    "read-only=true|false open it so now (default: when a client comes, as nbdkit -r says)\n"      \
    "temporary=true       writable, and what is written is thrown away at the end\n"               \
    "snapshot=NAME        show a snapshot inside the image\n"                                      \
    "backing=DISK         instead of the recorded parent; with backing-format=FORMAT; empty: "     \
    "none\n"                                                                                       \
    "data-file=FILE       instead of the recorded data file\n"                                     \
    "cache=writeback|none|unsafe\n"                                                                \
    "locking=on|off       lock the files (default: on)\n"                                          \
    "fingerprints=on|off  compare parents with what is recorded of them (default: on)\n"           \
    "on-error=enospc|report|stop\n"                                                                \
    "                     writes wait, rather than fail, when there is no space (default), "       \
    "never,\n"                                                                                     \
    "                     or whatever is wrong\n"                                                  \
    "share=true           read it even while somebody writes to it\n"                              \
    "For all disks:\n"                                                                             \
    "description=TEXT     what clients are told of the disks (default: format, length of the "     \
    "chain)\n"                                                                                     \
    "allow-path=DIR       a directory where parents may be, too; may be repeated\n"                \
    "control=SOCKET       jobs on the disks over this unix socket, see drover(1), ctl; the "       \
    "disks\n"                                                                                      \
    "                     are opened at once, for writing where that can be\n"                     \
    "state=FILE           which images disks have and which jobs there are outlives the server\n"  \
    "secret=ID,fd=N       the password of disks that name the secret ID: all that descriptor N\n"  \
    "                     has; it is closed\n"                                                     \
    "ready-fd=N           write a line to this descriptor when the disks are open, and one when\n" \
    "                     they have been closed without a loss"

/* Take in one parameter. */
int disk_list_config(struct disk_list *list, const char *key, const char *value,
                     struct dr_error *err);
/* There are no more of them: give every disk a name, refuse what does not fit together. */
int disk_list_complete(struct disk_list *list, struct dr_error *err);
/* Let the disks that the state knows go on with the images that they had. */
int disk_list_recall(struct disk_list *list, struct dr_error *err);
/* Recall, then open and close all of them to see that this works; refuse to serve a disk for
 * writing whose files another one of the list uses. */
int disk_list_try(struct disk_list *list, struct dr_error *err);
/* Open those that are not left to the first client, begin to show them and their control, and tell
 * ready_fd. control: what the program does for the control's clients; the paths in it are the
 * list's. */
int disk_list_open(struct disk_list *list, const struct dr_live_options *control,
                   struct dr_error *err);
/* Make sure that the disk is open. readonly: this client only reads. */
int disk_list_use(struct disk_list *list, struct served *served, bool readonly,
                  struct dr_error *err);
/* Close what is open; failed is called for each disk whose last writes may be lost. The first time
 * after disk_list_open() that none is, ready_fd is told. */
void disk_list_close(struct disk_list *list, void (*failed)(void *user, const struct dr_error *err),
                     void *user);
/* Requests that wait fail, and no request waits from now on: the server is to end. */
void disk_list_end_waiting(struct disk_list *list);
void disk_list_free(struct disk_list *list);

#endif
