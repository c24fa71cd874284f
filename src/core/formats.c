/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the public API tells about formats. */
#include "core/core.h"

DR_API int dr_format_list(size_t index, struct dr_format_info *info)
{
    const struct dr_format *fmt = dr_format_at(index);

    if (!info)
        return -EINVAL;
    if (!fmt)
        return -ENOENT;
    *info = (struct dr_format_info){
        .name = fmt->name,
        .can_write = fmt->flags & DR_FORMAT_WRITE,
        .can_create = fmt->flags & DR_FORMAT_CREATE,
        .can_back = fmt->flags & DR_FORMAT_BACKING,
        .plain = fmt->flags & DR_FORMAT_NO_PROBE,
        .parent_format = fmt->parent_format,
        .default_parent = fmt->default_parent,
    };
    return 0;
}

static int nth_option(const struct dr_option_help *o, size_t index, struct dr_create_option *option)
{
    for (; o && o->name; o++) {
        if (index-- == 0) {
            *option = (struct dr_create_option){o->name, o->type, o->help, o->initial};
            return 0;
        }
    }
    return -ENOENT;
}

DR_API int dr_format_option(const char *format, size_t index, struct dr_create_option *option)
{
    const struct dr_format *fmt = format ? dr_format_find(format) : NULL;

    return fmt && option ? nth_option(fmt->create_options, index, option) : -EINVAL;
}

DR_API int dr_format_amend_option(const char *format, size_t index, struct dr_create_option *option)
{
    const struct dr_format *fmt = format ? dr_format_find(format) : NULL;

    return fmt && option ? nth_option(fmt->amend_options, index, option) : -EINVAL;
}
