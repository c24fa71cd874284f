/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which formats there are. Adding one is one line here. */
#include "core/internal.h"

static const struct dr_format *extra; /* tests */

static const struct dr_format *const formats[] = {
    &dr_format_vma,
    &dr_format_ova,
    &dr_format_ovf,
    &dr_format_vmdk,
    &dr_format_qcow2,
    &dr_format_addcow,
    &dr_format_luks,
    /* last: what is left when nothing else fits */
    &dr_format_raw,
};

void dr_format_register(const struct dr_format *fmt)
{
    extra = fmt;
}

const struct dr_format *dr_format_at(size_t i)
{
    if (extra) {
        if (i == 0)
            return extra;
        i--;
    }
    return i < sizeof(formats) / sizeof(formats[0]) ? formats[i] : NULL;
}

const struct dr_format *dr_format_find(const char *name)
{
    const struct dr_format *fmt;
    for (size_t i = 0; (fmt = dr_format_at(i)); i++)
        if (strcmp(fmt->name, name) == 0)
            return fmt;
    return NULL;
}
