/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_BASE_JSON_H
#define DR_BASE_JSON_H

#include <jansson.h>

/* A new string value. Names are bytes of any charset and JSON wants UTF-8: of what is none, bytes
 * above 0x7f become '?'. NULL: out of memory. */
json_t *dr_json_text(const char *bytes);

#endif
