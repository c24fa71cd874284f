/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"

static const struct cli_option options[] = {
    {0, NULL, NULL, NULL, false},
};

/* COMMAND, letter, long name, argument; "-" for what there is not. */
static int print_list(void)
{
    for (size_t i = 0; cli_commands[i]; i++) {
        const struct cli_option *o;
        size_t at = 0;
        if (!(cli_commands[i]->roles & CLI_DROVER))
            continue;
        while ((o = cli_next_option(cli_commands[i], &at)))
            printf("%s\t%c\t%s\t%s\n", cli_commands[i]->name, o->key < 256 ? o->key : '-',
                   o->name ? o->name : "-", o->arg ? o->arg : "-");
    }
    return 0;
}

static void print_words(const struct cli_command *command)
{
    const struct cli_option *o;
    size_t at = 0;

    printf("    %s) words=\"", command->name);
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
           "    case \"${COMP_WORDS[1]}\" in\n");
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
