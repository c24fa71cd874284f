/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/common/image.h"

int cli_pairs_set(struct cli_pairs *list, const char *name, const char *value)
{
    free(cli_pairs_take(list, name));
    struct dr_pair *bigger = reallocarray(list->pairs, list->n + 1, sizeof(*bigger));
    if (!bigger)
        return -ENOMEM;
    list->pairs = bigger;
    CLEANUP_FREE char *n = strdup(name);
    CLEANUP_FREE char *v = strdup(value);
    if (!n || !v)
        return -ENOMEM;
    list->pairs[list->n++] = (struct dr_pair){DR_STEAL(n), DR_STEAL(v)};
    return 0;
}

/* Cuts one item off *rest, undoing ",,". */
static char *next_item(char **rest)
{
    char *item = *rest, *out = item, *in = item;

    for (; *in && !(in[0] == ',' && in[1] != ','); in++) {
        *out++ = *in;
        if (*in == ',')
            in++;
    }
    *rest = *in ? in + 1 : in;
    *out = '\0';
    return item;
}

int cli_pairs_add(struct cli_pairs *list, const char *text)
{
    CLEANUP_FREE char *copy = strdup(text);
    char *rest = copy;
    int r = copy ? 0 : -ENOMEM;

    while (r == 0 && *rest) {
        char *item = next_item(&rest);
        char *equals = strchr(item, '=');
        if (equals)
            *equals++ = '\0';
        r = cli_pairs_set(list, item, equals ? equals : "on");
    }
    return r;
}

int cli_pairs_from_args(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list)
{
    const char *text;
    int r = 0;

    for (size_t i = 0; r == 0 && (text = cli_nth_value(args, 'o', i)); i++) {
        /* what stood between the commas was a variable that is not set; ",," is one in a value */
        size_t commas = 0, n = strlen(text);
        while (commas < n && text[n - 1 - commas] == ',')
            commas++;
        if (n == 0 || *text == ',' || commas % 2 == 1) {
            cli_error(cli, "Invalid option list: %s", text);
            return -EINVAL;
        }
        r = cli_pairs_add(list, text);
        if (r < 0)
            cli_error(cli, "out of memory");
    }
    return r;
}

const char *cli_pairs_find(const struct cli_pairs *list, const char *name)
{
    for (size_t i = 0; i < list->n; i++) {
        if (strcmp(list->pairs[i].name, name) == 0)
            return list->pairs[i].value;
    }
    return NULL;
}

char *cli_pairs_take(struct cli_pairs *list, const char *name)
{
    for (size_t i = 0; i < list->n; i++) {
        if (strcmp(list->pairs[i].name, name) == 0) {
            char *value = (char *)list->pairs[i].value;
            free((char *)list->pairs[i].name);
            memmove(&list->pairs[i], &list->pairs[i + 1],
                    (list->n - i - 1) * sizeof(list->pairs[0]));
            list->n--;
            return value;
        }
    }
    return NULL;
}

void cli_pairs_free(struct cli_pairs *list)
{
    for (size_t i = 0; i < list->n; i++) {
        free((char *)list->pairs[i].name);
        free((char *)list->pairs[i].value);
    }
    free(list->pairs);
    *list = (struct cli_pairs){0};
}
