/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* libnbd checks a server's certificate only where it finds the certificate of an authority: in the
 * directory of tls-certificates, or else in its own places. Without one, versions as that of Debian
 * 12 fall back to those of the system and then check nothing at all, so anybody in between could
 * answer for the server. Here that is an error. Of a unix socket it has no host to check, as the
 * man page says; the file system says who listens there. */
#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "storage/nbd.h"

/* 1, 0 or -ENOMEM. */
static int has_authority(const char *directory, const char *below)
{
    CLEANUP_FREE char *path = NULL;
    if (asprintf(&path, "%s%s/ca-cert.pem", directory, below) < 0) {
        path = NULL;
        return -ENOMEM;
    }
    return access(path, R_OK) == 0;
}

/* Where libnbd looks by itself. */
static int has_default_authority(void)
{
    const char *home = getenv("HOME");
    if (geteuid() == 0)
        return has_authority("/etc/pki/libnbd", "");
    if (!home)
        return 0;
    int r = has_authority(home, "/.pki/libnbd");
    return r ? r : has_authority(home, "/.config/pki/libnbd");
}

static int check_directory(const char *uri, const char *directory, const char *name,
                           struct dr_error *err)
{
    bool socket = strncmp(uri, "nbds+unix:", 10) == 0;
    int r = directory ? has_authority(directory, "") : socket ? 1 : has_default_authority();
    if (r < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (r == 0 && directory)
        return dr_fail(err, EACCES,
                       "%s: the server's certificate cannot be checked: there is no "
                       "%s/ca-cert.pem that can be read",
                       name, directory);
    if (r == 0)
        return dr_fail(err, EACCES,
                       "%s: the server's certificate cannot be checked: give "
                       "tls-certificates=DIRECTORY, in which ca-cert.pem is",
                       name);
    return 0;
}

int nbd_check_tls(const char *uri, const char *name, struct dr_error *err)
{
    char *keys = NULL, *directory = NULL;
    if (strncmp(uri, "nbds", 4) != 0)
        return 0;
    int r = dr_remote_parameter(uri, "tls-psk-file", &keys);
    if (r == 0)
        r = dr_remote_parameter(uri, "tls-certificates", &directory);
    if (r < 0)
        r = dr_fail(err, ENOMEM, "%s: out of memory", name);
    else if (!keys)
        r = check_directory(uri, directory, name, err);
    curl_free(keys);
    curl_free(directory);
    return r;
}
