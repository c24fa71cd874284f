/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_CLI_INFO_TEXT_H
#define DR_CLI_INFO_TEXT_H

#include <jansson.h>

/* Print the answer of dr_info() as text: one object, or an array of them separated by empty
 * lines. */
void cli_print_info(const json_t *info);
/* The "format-specific" part alone. */
void cli_print_format_specific(const json_t *info);

#endif
