/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* VMware's lists of snapshots: what was read can be changed, and what is written then can be read
 * again and says so. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ops/vmsd.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_again(const struct vmsd *changed, const char *image, size_t others)
{
    struct vmsd v;
    struct dr_error err = DR_ERROR_INIT;
    size_t len;
    char *text = dict_text(&changed->dict, &len);
    if (!text || vmsd_parse(&v, "fuzz", text, len, &err) < 0)
        abort(); /* what we write we can read */
    if (others != SIZE_MAX && v.n > others)
        abort();
    (void)image;
    vmsd_free(&v);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vmsd v;
    struct dr_error err = DR_ERROR_INIT;
    if (vmsd_parse(&v, "fuzz", data, size, &err) < 0) {
        if (err.errnum == 0 || err.text[0] == '\0')
            abort(); /* every refusal says why */
        return 0;
    }
    char *image = v.n > 0 && v.all[0].n_disks > 0 && v.all[0].disks[0].file
                      ? strdup(v.all[0].disks[0].file)
                      : NULL;
    if (image) {
        size_t n = v.n;
        if (!vmsd_set_current(&v, image) || !vmsd_forget_image(&v, image))
            abort();
        check_again(&v, image, n);
    } else if (dict_set(&v.dict, "fuzz.key", "a \"quoted\" | value\n")) {
        const char *value = dict_get(&v.dict, "FUZZ.KEY");
        if (!value || strcmp(value, "a \"quoted\" | value\n") != 0)
            abort();
        check_again(&v, NULL, SIZE_MAX);
    }
    free(image);
    vmsd_free(&v);
    return 0;
}
