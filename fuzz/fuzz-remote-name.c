/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names of remote disks, as people and images give them: URLs, QEMU's spellings, json: objects.
 * What a name becomes is itself a name of the same disk, and leads nowhere up. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "storage/remote.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool it)
{
    if (!it)
        abort();
}

/* Taken twice it is the same. */
static void check_uri(const char *name, const char *uri)
{
    DR_CLEANUP_REMOTE struct dr_remote again = {0};
    struct dr_file_id a = {0}, b = {0};
    must(dr_remote_is(uri) && dr_remote_parse(uri, &again, NULL) == 0);
    must(strcmp(uri, again.uri) == 0 && again.plain);
    must(dr_remote_identify(name, &a, NULL) == 0 && dr_remote_identify(uri, &b, NULL) == 0);
    must(memcmp(&a, &b, sizeof(a)) == 0);
    must(!strstr(uri, "/../"));
}

static void check_directory(const char *name)
{
    size_t length = dr_remote_path_length(name);
    must(length <= strlen(name) && !memchr(name, '?', length));
    if (dr_remote_check_beside(name, "x", NULL) == 0) {
        CLEANUP_FREE char *sibling = dr_path_sibling(name, "x");
        must(sibling && dr_remote_is(sibling));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *name = strndup((const char *)data, size), *path = NULL;
    if (!name || !dr_remote_is(name))
        return 0;
    int r = dr_remote_parse(name, &remote, &err);
    must(r == 0 || (err.errnum == -r && err.text[0]));
    if (r < 0)
        return 0;
    check_uri(name, remote.uri);
    check_directory(name);
    must(dr_remote_realpath(name, &path, NULL) == 0);
    must(remote.timeout <= 86400 && remote.reconnect <= 86400);
    return 0;
}
