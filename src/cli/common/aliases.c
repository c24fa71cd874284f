/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names that qemu-img gives to options from its version 10.1 on. Under that name they are
 * understood beside those that help shows. */
#include <string.h>

#include "cli/cli.h"

static const struct alias {
    const char *command;
    const char *name; /* or NULL: */
    int letter;
    int key;
} aliases[] = {
    {"amend", "cache", 0, 't'},           {"bench", "buffer-size", 0, 's'},
    {"bench", "cache", 0, 't'},           {"bench", "count", 0, 'c'},
    {"bench", "depth", 0, 'd'},           {"bench", "offset", 0, 'o'},
    {"bench", "step-size", 0, 'S'},       {"bench", "write", 0, 'w'},
    {"check", "cache", 0, 'T'},           {"commit", "cache", 0, 't'},
    {"commit", "drop", 0, 'd'},           {"commit", "rate-limit", 0, 'r'},
    {"compare", "a-format", 0, 'f'},      {"compare", "b-format", 0, 'F'},
    {"compare", "cache", 0, 'T'},         {"compare", "strict", 0, 's'},
    {"convert", NULL, 'b', 'B'},          {"convert", "copy-range-offloading", 0, 'C'},
    {"convert", "oob-writes", 0, 'W'},    {"convert", "parallel", 0, 'm'},
    {"convert", "rate-limit", 0, 'r'},    {"convert", "source-cache", 0, 'T'},
    {"convert", "source-format", 0, 'f'}, {"convert", "sparse-size", 0, 'S'},
    {"convert", "target-cache", 0, 't'},  {"convert", "target-format-options", 0, 'o'},
    {"create", NULL, 'B', 'F'},           {"create", "backing-unsafe", 0, 'u'},
    {"dd", "output-format", 0, 'O'},      {"rebase", NULL, 'B', 'F'},
    {"rebase", "backing-cache", 0, 'T'},  {"rebase", "backing-unsafe", 0, 'u'},
    {"rebase", "cache", 0, 't'},          {"snapshot", "apply", 0, 'a'},
    {"snapshot", "create", 0, 'c'},       {"snapshot", "delete", 0, 'd'},
    {"snapshot", "list", 0, 'l'},
};

bool cli_next_alias(const struct cli *cli, size_t *i, const char **name, int *letter, int *key)
{
    for (; cli->role == CLI_QEMU_IMG && *i < sizeof(aliases) / sizeof(aliases[0]); (*i)++) {
        const struct alias *a = &aliases[*i];
        if (strcmp(a->command, cli->command->name) != 0)
            continue;
        *name = a->name;
        *letter = a->letter;
        *key = a->key;
        (*i)++;
        return true;
    }
    return false;
}
