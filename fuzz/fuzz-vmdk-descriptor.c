/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The text parser of VMDK descriptors, and its edits: what was parsed can be edited and parsed
 * again, and an edit is found afterwards. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/vmdk/descriptor.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void edit(struct vmdk_desc *d)
{
    struct dr_error err = DR_ERROR_INIT;
    if (vmdk_desc_set(d, "parentFileNameHint", "other.vmdk", true, "parentCID", &err) == 0) {
        char *value = vmdk_desc_get(d, "parentFileNameHint");
        if (!value || strcmp(value, "other.vmdk") != 0)
            abort();
        free(value);
    }
    uint32_t cid;
    err = (struct dr_error)DR_ERROR_INIT;
    if (vmdk_desc_set_cid(d, 0x12345678, &err) == 0 &&
        (vmdk_desc_get_id(d, "fuzz", "CID", &cid, &err) < 0 || cid != 0x12345678))
        abort();
    err = (struct dr_error)DR_ERROR_INIT;
    vmdk_desc_comment_out(d, "createType", &err);
    err = (struct dr_error)DR_ERROR_INIT;
    if (vmdk_desc_remove(d, "parentFileNameHint", &err) == 0 &&
        vmdk_desc_find(d, "parentFileNameHint") != NULL)
        vmdk_desc_remove(d, "parentFileNameHint", &err); /* it may have stood there twice */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vmdk_desc d;
    struct dr_error err = DR_ERROR_INIT;
    vmdk_desc_probe(data, size);
    if (vmdk_desc_parse(&d, "fuzz", data, size, &err) < 0) {
        if (err.errnum == 0 || err.text[0] == '\0')
            abort(); /* every refusal says why */
        return 0;
    }
    edit(&d);
    vmdk_desc_free(&d);
    return 0;
}
