/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "base/cleanup.h"
#include "base/json.h"

json_t *dr_json_text(const char *bytes)
{
    json_t *value = json_string(bytes);
    if (value)
        return value;
    CLEANUP_FREE char *plain = strdup(bytes);
    for (char *p = plain; p && *p; p++)
        if ((unsigned char)*p >= 0x80)
            *p = '?';
    return plain ? json_string(plain) : NULL;
}
