/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <ctype.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/common/suggest.h"

#define MAX_OPTIONS 64

const struct cli_option cli_opts_common[] = {
    {'h', "help", NULL, "show this help", false},
    {KEY_ALLOW_PATH, "allow-path", "DIR",
     "a directory in which backing files may be, too (repeatable)", false},
    {KEY_LOCKING, "locking", "on|off", "off: take no locks (file systems without them)", false},
    {KEY_FINGERPRINTS, "fingerprints", "on|off",
     "off: do not compare parents with what is recorded of them", false},
    {KEY_OBJECT, "object", "DEF",
     "TLS credentials, or a secret: for disks on servers and encrypted ones", false},
    {0, NULL, NULL, NULL, false},
};

const struct cli_option cli_opts_image[] = {
    {'f', "format", "FMT", "format of the image; without it, it is found out", false},
    {KEY_IMAGE_OPTS, "image-opts", NULL, "FILE is a list like driver=vmdk,file.filename=PATH",
     false},
    {0, NULL, NULL, NULL, false},
};

const struct cli_option cli_opts_share[] = {
    {'U', "force-share", NULL, "open although somebody may be writing", false},
    {0, NULL, NULL, NULL, false},
};

const struct cli_option cli_opts_quiet[] = {
    {'q', "quiet", NULL, "print errors only", false},
    {0, NULL, NULL, NULL, false},
};

const struct cli_option cli_opts_progress[] = {
    {'p', NULL, NULL, "show progress (SIGUSR1 shows it once)", false},
    {KEY_PROGRESS, "progress", "json|text|none", "json: one object a line on standard error",
     false},
    {0, NULL, NULL, NULL, false},
};

const struct cli_option *cli_next_option(const struct cli_command *command, size_t *i)
{
    size_t seen = 0;

    for (size_t s = 0; command->sets[s]; s++) {
        for (const struct cli_option *o = command->sets[s]; o->key; o++) {
            if (seen++ == *i) {
                (*i)++;
                return o;
            }
        }
    }
    return NULL;
}

static const struct cli_option *find_option(const struct cli_command *command, int key)
{
    const struct cli_option *o;
    size_t i = 0;

    while ((o = cli_next_option(command, &i))) {
        if (o->key == key)
            return o;
    }
    return NULL;
}

struct getopt_tables {
    char letters[2 * MAX_OPTIONS + 2];
    struct option longs[MAX_OPTIONS + 1];
    size_t n_letters, n_longs;
};

static void add_names(struct getopt_tables *t, int letter, const char *name, int key, int has_arg)
{
    if (letter < 256 && letter && t->n_letters + 2 < sizeof(t->letters)) {
        t->letters[t->n_letters++] = (char)letter;
        if (has_arg)
            t->letters[t->n_letters++] = ':';
    }
    if (name && t->n_longs < MAX_OPTIONS)
        t->longs[t->n_longs++] = (struct option){.name = name, .has_arg = has_arg, .val = key};
}

/* qemu-img's own --progress, from 10.1 on, is -p. */
static int argument_of(const struct cli *cli, int key)
{
    if (!find_option(cli->command, key)->arg)
        return no_argument;
    return cli->role == CLI_QEMU_IMG && key == KEY_PROGRESS ? optional_argument : required_argument;
}

/* Build getopt_long()'s two arguments from the tables. The leading ":" keeps it from printing
 * messages; we print them ourselves. */
static void build(const struct cli *cli, struct getopt_tables *t)
{
    const struct cli_option *o;
    const char *name;
    size_t i = 0;
    int letter, key;

    *t = (struct getopt_tables){.letters = ":", .n_letters = 1};
    while ((o = cli_next_option(cli->command, &i)))
        add_names(t, o->key, o->name, o->key, argument_of(cli, o->key));
    i = 0;
    while (cli_next_alias(cli, &i, &name, &letter, &key))
        add_names(t, letter, name, key, argument_of(cli, key));
}

/* The option that getopt_long() found; NULL: none. */
static const struct cli_option *found_option(const struct cli *cli, int c)
{
    const char *name;
    size_t i = 0;
    int letter, key;

    if (c == '?' || c == ':')
        return NULL;
    while (cli_next_alias(cli, &i, &name, &letter, &key))
        if (!name && letter == c)
            return find_option(cli->command, key);
    return find_option(cli->command, c);
}

int cli_refuse_option(const struct cli *cli, int c, char **argv)
{
    const char *what = argv[optind - 1];
    char letter[3] = {'-', (char)optopt, '\0'};

    if (optopt && optopt < 256 && strncmp(what, "--", 2) != 0)
        what = letter;
    if (c == ':')
        return cli_usage(cli, "missing argument for option '%s'", what);
    return cli_usage(cli, "unrecognized option '%s'%s", what, cli_meant_option(cli->command, what));
}

static bool add_hit(struct cli_args *args, int key, const char *arg)
{
    struct cli_hit *bigger = reallocarray(args->hits, args->n_hits + 1, sizeof(*bigger));

    if (!bigger)
        return false;
    args->hits = bigger;
    args->hits[args->n_hits++] = (struct cli_hit){key, arg};
    return true;
}

bool cli_parse(const struct cli *cli, int argc, char **argv, struct cli_args *args, int *exit_code)
{
    struct getopt_tables tables;
    int c;

    *args = (struct cli_args){0};
    int parsed = cli->command->last_is_operand && argc > 1 && argv[argc - 1][0] == '-' &&
                         isdigit((unsigned char)argv[argc - 1][1])
                     ? argc - 1
                     : argc;
    build(cli, &tables);
    optind = 0; /* GNU: start over, and permute again */
    opterr = 0;
    while ((c = getopt_long(parsed, argv, tables.letters, tables.longs, NULL)) != -1) {
        const struct cli_option *o = found_option(cli, c);

        if (!o) {
            *exit_code = cli_refuse_option(cli, c, argv);
            return false;
        }
        if (o->unsupported) {
            if (o->name)
                cli_error(cli, "--%s (%s) is not supported", o->name, o->help);
            else
                cli_error(cli, "-%c (%s) is not supported", o->key, o->help);
            *exit_code = 1;
            return false;
        }
        if (o->key == 'h')
            args->help = true;
        if (!add_hit(args, o->key == KEY_PROGRESS && !optarg ? 'p' : o->key, optarg)) {
            cli_error(cli, "out of memory");
            *exit_code = 1;
            return false;
        }
    }
    args->operands = argv + optind;
    args->n_operands = argc - optind;
    return true;
}

void cli_args_free(struct cli_args *args)
{
    free(args->hits);
    *args = (struct cli_args){0};
}

bool cli_has(const struct cli_args *args, int key)
{
    for (size_t i = 0; i < args->n_hits; i++) {
        if (args->hits[i].key == key)
            return true;
    }
    return false;
}

const char *cli_value(const struct cli_args *args, int key)
{
    for (size_t i = args->n_hits; i > 0; i--) {
        if (args->hits[i - 1].key == key)
            return args->hits[i - 1].arg;
    }
    return NULL;
}

const char *cli_nth_value(const struct cli_args *args, int key, size_t n)
{
    for (size_t i = 0; i < args->n_hits; i++) {
        if (args->hits[i].key == key && n-- == 0)
            return args->hits[i].arg;
    }
    return NULL;
}

/* Programs ask qemu-img's help for what it can do, in its words: vdsm for "filename bitmap". */
static void print_operands(const struct cli *cli, const char *operands)
{
    static const struct {
        const char *ours, *theirs;
    } words[] = {{"FILE BITMAP", "filename bitmap"}, {"FILE", "filename"}};

    for (size_t i = 0; cli->role == CLI_QEMU_IMG && i < sizeof(words) / sizeof(*words); i++) {
        if (strcmp(operands, words[i].ours) == 0)
            operands = words[i].theirs;
    }
    printf("%s%s\n", operands[0] ? " " : "", operands);
}

void cli_print_synopsis(const struct cli *cli, const struct cli_command *command)
{
    const struct cli_option *o;
    size_t i = 0;

    if (cli->role == CLI_QEMU_IMG)
        printf("  %s", command->name);
    else
        printf("usage: %s%s%s", cli->prog, cli->role == CLI_DROVER ? " " : "",
               cli->role == CLI_DROVER ? command->name : "");
    while (cli->role == CLI_QEMU_IMG && (o = cli_next_option(command, &i))) {
        if (o->key < 256 && o->arg)
            printf(" [-%c %s]", o->key, o->arg);
        else if (o->key < 256)
            printf(" [-%c]", o->key);
        else if (o->arg)
            printf(" [--%s=%s]", o->name, o->arg);
        else
            printf(" [--%s]", o->name);
    }
    if (cli->role != CLI_QEMU_IMG)
        printf(" [OPTION]...");
    print_operands(cli, command->operands);
}

static void print_option(const struct cli_option *o)
{
    char left[64];

    if (o->key < 256 && o->name)
        snprintf(left, sizeof(left), "-%c, --%s%s%s", o->key, o->name, o->arg ? " " : "",
                 o->arg ? o->arg : "");
    else if (o->key < 256)
        snprintf(left, sizeof(left), "-%c%s%s", o->key, o->arg ? " " : "", o->arg ? o->arg : "");
    else
        snprintf(left, sizeof(left), "    --%s%s%s", o->name, o->arg ? "=" : "",
                 o->arg ? o->arg : "");
    if (strlen(left) > 24)
        printf("  %s\n  %-24s", left, "");
    else
        printf("  %-24s", left);
    printf(" %s%s\n", o->help, o->unsupported ? " (not supported)" : "");
}

void cli_print_help(const struct cli *cli, const struct cli_command *command)
{
    const struct cli_option *o;
    size_t i = 0;

    cli_print_synopsis(cli, command);
    printf("%s.\n", command->brief);
    if (command->about)
        printf("%s\n", command->about);
    printf("\n");
    for (size_t c = 0; command->children && command->children[c]; c++)
        printf("  %-12s %s\n", command->children[c]->name, command->children[c]->brief);
    if (command->children)
        printf("\n");
    while ((o = cli_next_option(command, &i)))
        print_option(o);
}
