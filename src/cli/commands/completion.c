/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"

static const struct cli_option options[] = {
    {0, NULL, NULL, NULL, false},
};

/* All commands of drover, those within others behind them: *i and *k start at 0. NULL at the end.
 */
static const struct cli_command *next_command(size_t *i, size_t *k)
{
    const struct cli_command *c;

    while ((c = cli_commands[*i])) {
        if (*k == 0 && (c->roles & CLI_DROVER)) {
            *k = 1;
            return c;
        }
        if (*k > 0 && c->children && c->children[*k - 1])
            return c->children[(*k)++ - 1];
        (*i)++;
        *k = 0;
    }
    return NULL;
}

/* COMMAND, letter, long name, argument; "-" for what there is not. */
static int print_list(void)
{
    const struct cli_command *c;
    size_t i = 0, k = 0;

    while ((c = next_command(&i, &k))) {
        const struct cli_option *o;
        size_t at = 0;
        while ((o = cli_next_option(c, &at)))
            printf("%s\t%c\t%s\t%s\n", c->name, o->key < 256 ? o->key : '-',
                   o->name ? o->name : "-", o->arg ? o->arg : "-");
    }
    return 0;
}

static void print_children(const struct cli_command *command)
{
    printf("    \"%s \"*)\n        if [ \"$COMP_CWORD\" -eq 2 ]; then\n"
           "            COMPREPLY=($(compgen -W \"",
           command->name);
    for (size_t i = 0; command->children[i]; i++)
        printf("%s%s", i ? " " : "", command->children[i]->name + strlen(command->name) + 1);
    printf("\" -- \"$word\"))\n            return\n        fi ;;\n");
}

static void print_words(const struct cli_command *command)
{
    const struct cli_option *o;
    size_t at = 0;

    for (size_t i = 0; command->children && command->children[i]; i++)
        print_words(command->children[i]);
    if (command->children) {
        print_children(command);
        return;
    }
    printf("    \"%s \"*) words=\"", command->name);
    while ((o = cli_next_option(command, &at))) {
        if (o->unsupported)
            continue;
        if (o->key < 256)
            printf("-%c ", o->key);
        if (o->name)
            printf("--%s ", o->name);
    }
    printf("\" ;;\n");
}

static int print_bash(void)
{
    printf("# bash completion for drover\n"
           "_drover()\n{\n"
           "    local word=\"${COMP_WORDS[COMP_CWORD]}\" words=\"\"\n"
           "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
           "        COMPREPLY=($(compgen -W \"help version");
    for (size_t i = 0; cli_commands[i]; i++) {
        if (cli_commands[i]->roles & CLI_DROVER)
            printf(" %s", cli_commands[i]->name);
    }
    printf("\" -- \"$word\"))\n        return\n    fi\n"
           "    case \"${COMP_WORDS[1]} ${COMP_WORDS[2]} \" in\n");
    for (size_t i = 0; cli_commands[i]; i++) {
        if (cli_commands[i]->roles & CLI_DROVER)
            print_words(cli_commands[i]);
    }
    printf("    esac\n"
           "    case \"$word\" in\n"
           "    -*) COMPREPLY=($(compgen -W \"$words\" -- \"$word\")) ;;\n"
           "    *) COMPREPLY=($(compgen -f -- \"$word\")) ;;\n"
           "    esac\n}\n"
           "complete -o filenames -F _drover drover\n");
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    if (args->n_operands == 1 && strcmp(args->operands[0], "bash") == 0)
        return print_bash();
    if (args->n_operands == 1 && strcmp(args->operands[0], "list") == 0)
        return print_list();
    return cli_usage(cli, "Expecting bash or list");
}

static const struct cli_option *const sets[] = {options, cli_opts_common, NULL};

const struct cli_command cli_cmd_completion = {
    .name = "completion",
    .operands = "bash|list",
    .brief = "Print a completion script for bash, or all options as a list",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
