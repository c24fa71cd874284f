/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A streamOptimized image that comes out of a pipe: every unit that is told of lies inside the
 * disk, behind the one before it. */
#include <stdlib.h>
#include <string.h>

#include "formats/vmdk/stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct pipe {
    const uint8_t *bytes;
    size_t left;
};

static int read_pipe(void *user, void *buf, size_t len, size_t *got, struct dr_error *err)
{
    struct pipe *p = user;
    (void)err;
    *got = len < p->left ? len : p->left;
    if (*got > 0)
        memcpy(buf, p->bytes, *got);
    p->bytes += *got;
    p->left -= *got;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct pipe p = {data, size};
    struct dr_inflow in = {read_pipe, &p};
    struct dr_incoming what;
    void *state = NULL;
    uint64_t off = 0, end = 0;
    size_t len = 0;
    if (vmdk_incoming.begin("pipe", &in, &state, &what, NULL) == 0) {
        uint8_t *coded = malloc(what.coded_most), *plain = malloc(what.unit);
        if (!coded || !plain)
            abort();
        while (vmdk_incoming.next(state, coded, &len, &off, NULL) > 0) {
            if (off < end || off >= what.size || len > what.coded_most)
                abort();
            end = off + what.unit;
            vmdk_incoming.decode(state, coded, len, off, plain, NULL);
        }
        free(coded);
        free(plain);
    }
    vmdk_incoming.free(state);
    return 0;
}
