/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_BASE_JSON_H
#define DR_BASE_JSON_H

#include <jansson.h>

/* Make a JSON string. Names are bytes of any charset but JSON must be UTF-8: if the bytes are
 * not UTF-8, those above 0x7f become '?'. NULL: out of memory. */
json_t *dr_json_text(const char *bytes);

#endif
