/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_CLI_JSON_H
#define DR_CLI_JSON_H

#include <jansson.h>

#include "cli/cli.h"

/* --output: false = human, true = json. 0, or the exit code after a message. */
int cli_output_json(const struct cli *cli, const struct cli_args *args, bool *json);

/* json: names among the texts in value may hold passwords and cookies: put stars in their place. */
void cli_json_hide(json_t *value);
/* Print it so. */
void cli_dump_json(json_t *value);
/* Print with the keys in the order scripts have seen for years; keys not named come last. */
void cli_print_json(json_t *value, const char *const *order);

/* QEMU's JSON may quote strings with ' instead: the same text with ", malloc'ed. NULL = out of
 * memory.
 */
char *cli_json_standard(const char *text);
json_t *cli_json_load(const struct cli *cli, const char *text);
static inline void cli_cleanup_json(json_t **value)
{
    json_decref(*value);
}
#define CLEANUP_JSON __attribute__((cleanup(cli_cleanup_json)))

/* 0 when absent. */
uint64_t cli_json_number(const json_t *object, const char *key);

#endif
