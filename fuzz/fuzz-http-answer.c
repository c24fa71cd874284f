/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Headers of HTTP servers: eight bytes of what was asked and is known, then lines. An answer that
 * is not refused has the range that was asked for, of the file that was opened. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "storage/http.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool it)
{
    if (!it)
        abort();
}

/* As libcurl gives them: with their end, and nothing behind it. */
static void take_lines(struct http_answer *a, const uint8_t *data, size_t size)
{
    for (size_t n; size > 0; data += n, size -= n) {
        const uint8_t *end = memchr(data, '\n', size);
        n = end ? (size_t)(end - data) + 1 : size;
        char *line = malloc(n);
        if (!line)
            return;
        memcpy(line, data, n);
        must(http_take_header(line, 1, n, a) == n);
        free(line);
    }
}

static void check(struct http_answer *a)
{
    struct http_file *f = a->file;
    int r = http_judge(a);
    must(r < 0 ? f->why[0] != '\0' : !a->encoded);
    must(memchr(a->version.etag, 0, sizeof(a->version.etag)) &&
         memchr(a->version.modified, 0, sizeof(a->version.modified)));
    if (r == 0 && a->status == 206)
        must(a->first == a->from && a->last >= a->first && a->last < a->end);
    if (r == 0 && f->opened)
        must(a->version.size == f->version.size && strcmp(a->version.etag, f->version.etag) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct http_file file = {.lock = PTHREAD_MUTEX_INITIALIZER};
    if (size < 8)
        return 0;
    struct http_answer a = {.file = &file,
                            .from = get_le16(data),
                            .end = get_le16(data) + get_le16(data + 2) + UINT64_C(1),
                            .status = data[4] & 1 ? 206 : 200,
                            .version = {.size = UINT64_MAX},
                            .length = UINT64_MAX};
    file.opened = false;
    take_lines(&a, data + 8, size - 8);
    check(&a);
    /* The same once more, of a file that was opened: it is taken, or has changed. */
    file.version = a.version;
    file.version.size = get_le16(data + 6);
    file.opened = true;
    check(&a);
    return 0;
}
