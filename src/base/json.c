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

char *dr_json_dump(const json_t *value, size_t flags)
{
    size_t len = json_dumpb(value, NULL, 0, flags);
    char *text = len > 0 ? malloc(len + 1) : NULL;
    if (text && json_dumpb(value, text, len, flags) != len) {
        free(text);
        return NULL;
    }
    if (text)
        text[len] = '\0';
    return text;
}

static void drop_if(int failed, json_t **value)
{
    if (!failed)
        return;
    json_decref(*value);
    *value = NULL;
}

void dr_json_put(json_t **object, const char *key, json_t *value)
{
    drop_if(json_object_set_new(*object, key, value) < 0, object);
}

void dr_json_append(json_t **array, json_t *value)
{
    drop_if(json_array_append_new(*array, value) < 0, array);
}
