/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Disks that a server has: their names, and files of dr_fs_posix() that are reached through libnbd
 * (nbd.c) or libcurl (http.c). The operations of dr_fs_posix() ask dr_remote_is() and come here.
 *
 * Names: nbd://, nbds://, nbd+unix://, nbds+unix://, http:// and https:// URLs; QEMU's
 * nbd:HOST:PORT[:exportname=NAME] and nbd:unix:PATH[:exportname=NAME]; and json:{...} objects with
 * QEMU's keys of its drivers nbd, http and https. A file of that name is written ./nbd:...
 * QEMU's null-co:// and null-aio://, disks without a medium, are told by their names, too (null.c).
 */
#ifndef DR_STORAGE_REMOTE_H
#define DR_STORAGE_REMOTE_H

#include "storage/storage.h"

enum dr_remote_kind { DR_REMOTE_NBD, DR_REMOTE_HTTP, DR_REMOTE_NULL };

struct dr_remote {
    enum dr_remote_kind kind;
    char *uri;           /* for libnbd or libcurl, which QEMU's spellings become, too */
    char *user, *cookie; /* http: NAME:PASSWORD and cookies; NULL = none */
    unsigned timeout;    /* seconds without any answer after which a connection is given up */
    unsigned reconnect;  /* seconds in which a lost connection must be back */
    bool insecure;       /* https: the server's certificate is not verified */
    bool plain;          /* nothing but the URI was given */
    uint64_t size;       /* null: bytes of the disk */
    uint64_t latency;    /* null: nanoseconds that a request takes */
    bool zeroes;         /* null: it is known to be zeros */
};

/* Only looks at the name. */
bool dr_remote_is(const char *name);
/* The bytes of a remote name up to the end of its path, where that has directories as a file's has:
 * what follows a ? belongs to none. 0: it has none, as where a socket or a json: object leads to
 * the disk, and nothing stands beside it. */
size_t dr_remote_path_length(const char *name);
/* -EINVAL: something in the name means nothing. Clear it afterwards in any case. */
int dr_remote_parse(const char *name, struct dr_remote *remote, struct dr_error *err);
void dr_remote_clear(struct dr_remote *remote);
#define DR_CLEANUP_REMOTE __attribute__((cleanup(dr_remote_clear)))

/* The value of a parameter behind the ? of a URI, decoded, to be freed by curl_free(); NULL: it is
 * not there. -ENOMEM. */
int dr_remote_parameter(const char *uri, const char *key, char **value);

/* -EINVAL: dr_path_sibling() cannot tell where the name leads, which stands in the image at path.
 */
int dr_remote_check_beside(const char *path, const char *name, struct dr_error *err);

/* As the operations of struct dr_fs_ops. None of the three talks to a server. */
int dr_remote_identify(const char *name, struct dr_file_id *id, struct dr_error *err);
int dr_remote_realpath(const char *name, char **out, struct dr_error *err);
int dr_remote_refuse(const char *name, const char *what, struct dr_error *err);
int dr_remote_open(struct dr_fs *fs, const char *name, unsigned flags, struct dr_file **file,
                   struct dr_error *err);

/* Open files of each kind; remote's strings stay the caller's. All of dr_file but fs, id and path
 * is filled in. */
int dr_nbd_open(const struct dr_remote *remote, const char *name, unsigned flags,
                struct dr_file **file, struct dr_error *err);
int dr_http_open(const struct dr_remote *remote, const char *name, struct dr_file **file,
                 struct dr_error *err);
int dr_null_open(const struct dr_remote *remote, const char *name, struct dr_file **file,
                 struct dr_error *err);

#endif
