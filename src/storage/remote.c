/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What dr_fs_posix() does with the names of remote disks. */
#include "storage/remote.h"

#include <openssl/sha.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

static const char owner; /* its address marks the ids of remote files */

/* Two names are one file if their URIs are the same. A server may have one disk under two names,
 * which nobody can see from here. */
int dr_remote_identify(const char *name, struct dr_file_id *id, struct dr_error *err)
{
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    uint8_t digest[SHA256_DIGEST_LENGTH];
    int r = dr_remote_parse(name, &remote, err);
    if (r < 0)
        return r;
    SHA256((const uint8_t *)remote.uri, strlen(remote.uri), digest);
    *id = (struct dr_file_id){&owner, get_le64(digest), get_le64(digest + 8)};
    return 0;
}

/* A json: name with settings stays as it is: the URI alone would be opened without them. */
int dr_remote_realpath(const char *name, char **out, struct dr_error *err)
{
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    int r = dr_remote_parse(name, &remote, err);
    if (r < 0)
        return r;
    *out = strdup(remote.plain ? remote.uri : name);
    return *out ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", name);
}

int dr_remote_check_beside(const char *path, const char *name, struct dr_error *err)
{
    if (name[0] == '/' || !dr_remote_is(path) || dr_remote_is(name) || dr_remote_path_length(path))
        return 0;
    return dr_fail(
        err, EINVAL,
        "%s: names \"%.200s\", but nothing stands beside a disk with such a name; only a "
        "whole name would do",
        path, name);
}

int dr_remote_refuse(const char *name, const char *what, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP, "%s: is a disk on a server, where no file can be %s", name, what);
}

static int open_either(const struct dr_remote *remote, const char *name, unsigned flags,
                       struct dr_file **file, struct dr_error *err)
{
    if (remote->kind == DR_REMOTE_NBD)
        return dr_nbd_open(remote, name, flags, file, err);
    if (flags & DR_FILE_RDWR)
        return dr_fail(err, EROFS, "%s: cannot be written: HTTP servers only give files", name);
    return dr_http_open(remote, name, file, err);
}

int dr_remote_open(struct dr_fs *fs, const char *name, unsigned flags, struct dr_file **file,
                   struct dr_error *err)
{
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    struct dr_file_id id;
    if ((flags & DR_FILE_CREATE) && !(flags & DR_FILE_TRUNCATE))
        return dr_remote_refuse(name, "created", err);
    int r = dr_remote_identify(name, &id, err);
    if (r == 0)
        r = dr_remote_parse(name, &remote, err);
    CLEANUP_FREE char *path = strdup(name);
    if (r == 0 && !path)
        r = dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (r == 0)
        r = open_either(&remote, name, flags, file, err);
    if (r < 0)
        return r;
    (*file)->fs = fs;
    (*file)->id = id;
    (*file)->path = DR_STEAL(path);
    return 0;
}
