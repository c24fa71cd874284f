/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What dr_fs_posix() does with the names of remote disks. */
#include "storage/remote.h"

#include <curl/curl.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "storage/part.h"

static const char owner; /* its address marks the ids of remote files */

/* ------------------------------------------------------------------ which disk is it? */

/* n bytes of a URI, with what is encoded in them decoded; NULL: out of memory. libcurl takes a
 * length of 0 for that of the text. */
static char *decoded(const char *text, size_t n)
{
    return n ? curl_easy_unescape(NULL, text, (int)n, NULL)
             : curl_easy_unescape(NULL, "%00", 3, NULL);
}

static char *lower(char *text)
{
    for (char *c = text; c && *c; c++)
        *c = *c >= 'A' && *c <= 'Z' ? (char)(*c + 'a' - 'A') : *c;
    return text;
}

int dr_remote_parameter(const char *uri, const char *key, char **value)
{
    const char *at = uri + strcspn(uri, "?#");
    size_t len = strlen(key), n;
    *value = NULL;
    for (; *at == '?' || *at == '&' || *at == ';'; at += n) {
        at++;
        n = strcspn(at, "&;#");
        if (n > len && strncmp(at, key, len) == 0 && at[len] == '=') {
            *value = decoded(at + len + 1, n - len - 1);
            return *value ? 0 : -ENOMEM;
        }
    }
    return 0;
}

/* By hand, since libcurl takes "nbd+unix:///x" for a host called x. */
static char *nbd_disk(const char *uri)
{
    const char *host = strstr(uri, "://") + 3;
    size_t host_len = strcspn(host, "/?#");
    const char *export = host + host_len, *user = memchr(host, '@', host_len);
    host_len -= user ? (size_t)(user + 1 - host) : 0;
    host = user ? user + 1 : host;
    export += *export == '/';
    size_t export_len = strcspn(export, "?#");
    bool port = !memchr(host, ']', host_len) ? memchr(host, ':', host_len) != NULL
                                             : host[host_len - 1] != ']';
    char *what = decoded(export, export_len), *socket, *where, *disk = NULL;
    int r = dr_remote_parameter(uri, "socket", &socket);
    where = socket ? NULL : lower(decoded(host, host_len));
    if (r < 0 || !what || (!socket && !where) ||
        asprintf(&disk, "nbd%s %s%s %s", socket ? "+unix" : "", socket ? socket : where,
                 socket || port ? "" : ":10809", what) < 0)
        disk = NULL;
    curl_free(what);
    curl_free(where);
    curl_free(socket);
    return disk;
}

/* The part, with what it encodes decoded; "" if there is none. NULL: out of memory. */
static char *part_of(CURLU *url, CURLUPart part, unsigned flags)
{
    char *text = NULL;
    CURLUcode code = curl_url_get(url, part, &text, flags);
    char *copy = code == CURLUE_OUT_OF_MEMORY ? NULL : strdup(code ? "" : text);
    curl_free(text);
    return copy;
}

static char *http_disk(const char *uri)
{
    CURLU *url = curl_url();
    char *disk = NULL;
    if (url && curl_url_set(url, CURLUPART_URL, uri, 0) == CURLUE_OK) {
        CLEANUP_FREE char *scheme = part_of(url, CURLUPART_SCHEME, 0);
        CLEANUP_FREE char *host = lower(part_of(url, CURLUPART_HOST, CURLU_URLDECODE));
        CLEANUP_FREE char *port = part_of(url, CURLUPART_PORT, CURLU_DEFAULT_PORT);
        CLEANUP_FREE char *path = part_of(url, CURLUPART_PATH, CURLU_URLDECODE);
        CLEANUP_FREE char *query = part_of(url, CURLUPART_QUERY, 0);
        if (scheme && host && port && path && query &&
            asprintf(&disk, "%s %s:%s %s ?%s", scheme, host, port, path, query) < 0)
            disk = NULL;
    }
    curl_url_cleanup(url);
    return disk;
}

/* Two names are one file if they have one server and one disk of it: however that is spelled, and
 * whoever somebody is there. A server may have one disk under two names, which nobody can see from
 * here. */
int dr_remote_identify(const char *name, struct dr_file_id *id, struct dr_error *err)
{
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    uint8_t digest[SHA256_DIGEST_LENGTH];
    int r = dr_remote_parse(name, &remote, err);
    if (r < 0)
        return r;
    CLEANUP_FREE char *disk = remote.kind == DR_REMOTE_NBD    ? nbd_disk(remote.uri)
                              : remote.kind == DR_REMOTE_HTTP ? http_disk(remote.uri)
                                                              : strdup(name);
    if (!disk)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    SHA256((const uint8_t *)disk, strlen(disk), digest);
    *id =
        (struct dr_file_id){.owner = &owner, .dev = get_le64(digest), .ino = get_le64(digest + 8)};
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
    if (dr_part_is(path)) {
        CLEANUP_FREE char *bottom = dr_part_bottom(path);
        return bottom ? dr_remote_check_beside(bottom, name, err) : 0;
    }
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
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    if (dr_remote_parse(name, &remote, NULL) == 0 && remote.kind == DR_REMOTE_NULL)
        return dr_fail(err, ENOTSUP, "%s: is a disk without a medium, which cannot be %s", name,
                       what);
    return dr_fail(err, ENOTSUP, "%s: is a disk on a server, where no file can be %s", name, what);
}

static int open_any(const struct dr_remote *remote, const char *name, unsigned flags,
                    struct dr_file **file, struct dr_error *err)
{
    if (remote->kind == DR_REMOTE_NBD)
        return dr_nbd_open(remote, name, flags, file, err);
    if (remote->kind == DR_REMOTE_NULL)
        return dr_null_open(remote, name, file, err);
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
        r = open_any(&remote, name, flags, file, err);
    if (r < 0)
        return r;
    (*file)->fs = fs;
    (*file)->id = id;
    (*file)->path = DR_STEAL(path);
    return 0;
}
