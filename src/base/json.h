/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_BASE_JSON_H
#define DR_BASE_JSON_H

#include <jansson.h>

/* Make a JSON string. Names are bytes of any charset but JSON must be UTF-8: if the bytes are
 * not UTF-8, those above 0x7f become '?'. NULL: out of memory. */
json_t *dr_json_text(const char *bytes);

/* As json_dumps(), which may leave out characters where memory is short: the whole text, malloc'ed,
 * or NULL. */
char *dr_json_dump(const json_t *value, size_t flags);

/* Build a value that is whole or NULL. Both take over `value`; when it is NULL, or cannot be added
 * for want of memory, they free *object or *array and set it to NULL, and add nothing from then
 * on. So only the end result needs to be looked at. */
void dr_json_put(json_t **object, const char *key, json_t *value);
void dr_json_append(json_t **array, json_t *value);

#endif
