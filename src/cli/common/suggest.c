/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/common/suggest.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/paths.h"

#define WORD_MAX 32u /* longer ones are not compared */
#define NEAR     2u  /* letters to change */

static unsigned least(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

/* Letters to insert, remove, replace, or swap with their neighbours, to get from a to b. */
static unsigned distance(const char *a, const char *b)
{
    unsigned d[WORD_MAX + 1][WORD_MAX + 1];
    size_t n = strlen(a), m = strlen(b);
    if (n > WORD_MAX || m > WORD_MAX)
        return UINT_MAX;
    for (size_t i = 0; i <= n; i++)
        for (size_t j = 0; j <= m; j++) {
            d[i][j] = (unsigned)(i == 0 ? j : i);
            if (i == 0 || j == 0)
                continue;
            unsigned same = a[i - 1] == b[j - 1] ? 0 : 1;
            d[i][j] = least(least(d[i - 1][j], d[i][j - 1]) + 1, d[i - 1][j - 1] + same);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                d[i][j] = least(d[i][j], d[i - 2][j - 2] + 1);
        }
    return d[n][m];
}

struct nearest {
    const char *word, *best;
    unsigned far;
};

/* A beginning of three letters and more counts as near. */
static void compare(struct nearest *n, const char *name)
{
    size_t len = strlen(n->word);
    unsigned far = len > 2 && strncmp(n->word, name, len) == 0 ? 1 : distance(n->word, name);
    if (far <= NEAR && far < len && far < n->far) {
        n->far = far;
        n->best = name;
    }
}

static const char *meant(const struct nearest *n, const char *dashes)
{
    static char text[80];
    text[0] = '\0';
    if (n->best)
        snprintf(text, sizeof(text), " (did you mean '%s%.40s'?)", dashes, n->best);
    return text;
}

const char *cli_meant_command(enum cli_role role, const char *word)
{
    struct nearest n = {.word = word, .far = UINT_MAX};
    for (size_t i = 0; cli_commands[i]; i++)
        if (cli_commands[i]->roles & role)
            compare(&n, cli_commands[i]->name);
    return meant(&n, "");
}

const char *cli_meant_child(const struct cli_command *command, const char *word)
{
    struct nearest n = {.word = word, .far = UINT_MAX};
    size_t own = strlen(command->name) + 1;
    for (size_t i = 0; command->children && command->children[i]; i++)
        compare(&n, command->children[i]->name + own);
    return meant(&n, "");
}

const char *cli_meant_option(const struct cli_command *command, const char *word)
{
    struct nearest n = {.far = UINT_MAX};
    CLEANUP_FREE char *name = NULL;
    size_t i = 0;
    const struct cli_option *o;
    if (!command || strncmp(word, "--", 2) != 0)
        return "";
    name = strndup(word + 2, strcspn(word + 2, "="));
    if (!name)
        return "";
    n.word = name;
    while ((o = cli_next_option(command, &i)))
        if (o->name)
            compare(&n, o->name);
    return meant(&n, "--");
}

/* ------------------------------------------------------------------ relative names */

/* The way from the directory `from` to `to`, both absolute and without links. */
static char *way(const char *from, const char *to)
{
    size_t common = 0, ups = 0;
    for (size_t i = 0;; i++) {
        bool end = from[i] == '\0' || from[i] == '/';
        if (end && (to[i] == '/' || (i == 0 && to[0] == '/')))
            common = i;
        if (from[i] == '\0' || from[i] != to[i])
            break;
    }
    for (const char *p = from + common; *p; p++)
        ups += p[0] == '/' && p[1] != '\0';
    const char *rest = to + common + (to[common] == '/');
    char *out = malloc(3 * ups + strlen(rest) + 1), *end = out;
    for (size_t i = 0; out && i < ups; i++)
        end = stpcpy(end, "../");
    if (out)
        strcpy(end, rest);
    return out;
}

void cli_hint_relative(const struct cli *cli, const char *path, const char *parent)
{
    CLEANUP_FREE char *beside = cli_path_beside(path, parent), *real = NULL, *dir = NULL;
    const char *slash = strrchr(path, '/');
    if (parent[0] == '/' || !slash || !beside || dr_name_format(parent) || cli_name_exists(beside))
        return;
    CLEANUP_FREE char *holds = strndup(path, (size_t)(slash - path + 1));
    real = realpath(parent, NULL);
    dir = holds ? realpath(holds, NULL) : NULL;
    CLEANUP_FREE char *right = real && dir ? way(dir, real) : NULL;
    if (right)
        fprintf(stderr, "%s: '%s' is relative to the directory of '%s'; did you mean '%s'?\n",
                cli->prog, parent, path, right);
}
