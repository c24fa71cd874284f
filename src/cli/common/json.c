/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "cli/common/json.h"

int cli_output_json(const struct cli *cli, const struct cli_args *args, bool *json)
{
    const char *mode = cli_value(args, KEY_OUTPUT);

    *json = mode && strcmp(mode, "json") == 0;
    if (!mode || *json || strcmp(mode, "human") == 0)
        return 0;
    cli_error(cli, "--output must be used with human or json as argument.");
    return 1;
}

static void hide_in_text(json_t *value)
{
    const char *text = json_string_value(value);
    CLEANUP_FREE char *hidden = strncmp(text, "json:", 5) == 0 ? strdup(text) : NULL;

    if (!hidden)
        return;
    dr_hide_secrets(hidden);
    json_string_set(value, hidden);
}

void cli_json_hide(json_t *value)
{
    const char *key;
    json_t *item;
    size_t i;

    if (json_is_string(value))
        hide_in_text(value);
    json_array_foreach(value, i, item) cli_json_hide(item);
    json_object_foreach(value, key, item) cli_json_hide(item);
}

void cli_dump_json(json_t *value)
{
    cli_json_hide(value);
    /* Print plain ASCII, as QEMU does: it is readable in any locale and contains no terminal
     * escapes. */
    json_dumpf(value, stdout, JSON_INDENT(4) | JSON_ENSURE_ASCII);
    printf("\n");
}

static json_t *reordered(json_t *object, const char *const *order)
{
    json_t *result = json_object();
    const char *key;
    json_t *value;

    for (size_t i = 0; order[i]; i++) {
        value = json_object_get(object, order[i]);
        if (value)
            json_object_set(result, order[i], value);
    }
    json_object_foreach(object, key, value)
    {
        if (!json_object_get(result, key))
            json_object_set(result, key, value);
    }
    return result;
}

void cli_print_json(json_t *value, const char *const *order)
{
    json_t *sorted, *item;
    size_t i;

    if (json_is_array(value)) {
        sorted = json_array();
        json_array_foreach(value, i, item) json_array_append_new(sorted, reordered(item, order));
    } else {
        sorted = reordered(value, order);
    }
    cli_dump_json(sorted);
    json_decref(sorted);
}

json_t *cli_json_load(const struct cli *cli, const char *text)
{
    json_error_t where;
    json_t *value = json_loads(text, 0, &where);

    if (!value)
        cli_error(cli, "the library's answer is not JSON: %s", where.text);
    return value;
}

char *cli_json_standard(const char *text)
{
    char *out = malloc(2 * strlen(text) + 1), *to = out;
    char quote = '\0'; /* of the string that we are in */

    for (; out && *text; text++) {
        if (quote && text[0] == '\\' && text[1]) {
            if (*++text != '\'')
                *to++ = '\\';
            *to++ = *text;
        } else if (quote ? *text == quote : *text == '"' || *text == '\'') {
            quote = quote ? '\0' : *text;
            *to++ = '"';
        } else {
            if (*text == '"') /* within '...' */
                *to++ = '\\';
            *to++ = *text;
        }
    }
    if (out)
        *to = '\0';
    return out;
}

uint64_t cli_json_number(const json_t *object, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(object, key));
}
