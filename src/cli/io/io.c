/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <limits.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/io/io.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {'c', "cmd", "COMMAND", "run this (repeatable); without it, commands come from standard input",
     false},
    {'r', "read-only", NULL, "open read-only", false},
    {'n', "nocache", NULL, "the same as -t none", false},
    {'t', "cache", "CACHE", "none, writeback, writethrough, directsync or unsafe", false},
    {'d', "discard", "MODE", "ignore, off, unmap or on (discards are always done)", false},
    {'m', "misalign", NULL, "ignored", false},
    {'k', "native-aio", NULL, "ignored", false},
    {'i', "aio", "MODE", "ignored", false},
    {'T', "trace", "WHAT", "ignored", false},
    {'s', "snapshot", NULL, "throw away at the end what is written", false},
    {'C', "copy-on-read", NULL, "write into the image what is read from its backing files", false},
    {'V', "version", NULL, "print the version", false},
    {0, NULL, NULL, NULL, false},
};

/* Words are parted by spaces, as in qemu-io: nothing can be quoted. */
static int split(char *line, char **words)
{
    int n = 0;
    char *word;

    while ((word = strsep(&line, " "))) {
        if (*word)
            words[n++] = word;
    }
    return n;
}

static int complain_count(const struct io_command *command, int n)
{
    fflush(stdout);
    if (command->max == -1)
        fprintf(stderr, "bad argument count %d to %s, expected at least %d arguments\n", n,
                command->name, command->min);
    else if (command->min == command->max)
        fprintf(stderr, "bad argument count %d to %s, expected %d arguments\n", n, command->name,
                command->min);
    else
        fprintf(stderr, "bad argument count %d to %s, expected between %d and %d arguments\n", n,
                command->name, command->min, command->max);
    return -EINVAL;
}

static int run_words(struct io *io, int argc, char **argv)
{
    const struct io_command *command = io_find(argv[0]);

    if (!command) {
        fflush(stdout);
        fprintf(stderr, "command \"%s\" not found\n", argv[0]);
        return -EINVAL;
    }
    if (!io->disk && !(command->flags & IO_NO_FILE)) {
        fflush(stdout);
        fprintf(stderr, "no file open, try 'help open'\n");
        return -EINVAL;
    }
    if (argc - 1 < command->min || (command->max != -1 && argc - 1 > command->max))
        return complain_count(command, argc - 1);
    if ((command->flags & IO_WRITES) && !dr_writable(io->disk)) {
        cli_error(io->cli, "Block node is read-only");
        return -EACCES;
    }
    return command->run(io, command, argc, argv);
}

int io_line(struct io *io, const char *line)
{
    size_t most = strlen(line) / 2 + 1; /* each with a space behind it */
    CLEANUP_FREE char *copy = strdup(line);
    CLEANUP_FREE char **words = calloc(most + 1, sizeof(*words));

    if (!copy || !words || most > INT_MAX)
        return -ENOMEM;
    int n = split(copy, words);
    return n > 0 ? run_words(io, n, words) : 0;
}

static int run_given(struct io *io)
{
    const char *line;
    int result = 0;

    for (size_t i = 0; !io->quit && (line = cli_nth_value(io->args, 'c', i)); i++) {
        if (io_line(io, line) < 0)
            result = -EINVAL;
    }
    return result;
}

static int run_script(struct io *io)
{
    CLEANUP_FREE char *line = NULL;
    size_t size = 0;
    ssize_t n;
    int result = 0;

    while (!io->quit) {
        printf("%s> ", io->cli->prog);
        fflush(stdout);
        n = getline(&line, &size, stdin);
        if (n < 0)
            break;
        line[strcspn(line, "\n")] = '\0';
        if (io_line(io, line) < 0)
            result = -EINVAL;
    }
    return result;
}

static int open_first(struct io *io, unsigned flags)
{
    struct cli_image image;
    const struct cli_image_spec spec = {
        .name = io->args->operands[0], .format_key = 'f', .flags = flags};

    if (io->args->n_operands == 0)
        return 0;
    if (cli_has(io->args, 'f') && cli_has(io->args, KEY_IMAGE_OPTS)) {
        cli_error(io->cli, "--image-opts and -f are mutually exclusive");
        return -EINVAL;
    }
    const char *format = cli_value(io->args, 'f');
    if (format && !cli_format_exists(format)) {
        cli_error(io->cli, "can't open device %s: Unknown driver '%s'", spec.name, format);
        return -EINVAL;
    }
    if (cli_image_get(io->cli, io->args, &spec, &image) != 0)
        return -EINVAL;
    io->copy_on_read = io->copy_on_read || image.copy_on_read;
    return io_open_disk(io, &image, spec.name);
}

static int get_flags(struct io *io, unsigned *flags)
{
    const char *cache = cli_has(io->args, 'n') ? "none" : cli_value(io->args, 't');
    const char *discard = cli_value(io->args, 'd');
    const char *aio = cli_value(io->args, 'i');

    io->temporary = cli_has(io->args, 's');
    io->copy_on_read = cli_has(io->args, 'C');
    *flags = cli_has(io->args, 'r') ? 0 : DR_OPEN_RDWR;
    if (cli_has(io->args, 'U'))
        *flags |= DR_OPEN_FORCE_SHARE;
    if (cache && cli_cache_flags(cache, flags, &io->writethrough) < 0) {
        cli_error(io->cli, "Invalid cache option: %s", cache);
        return -EINVAL;
    }
    if (discard && strcmp(discard, "ignore") != 0 && strcmp(discard, "off") != 0 &&
        strcmp(discard, "unmap") != 0 && strcmp(discard, "on") != 0) {
        cli_error(io->cli, "Invalid discard option: %s", discard);
        return -EINVAL;
    }
    if (aio && strcmp(aio, "threads") != 0 && strcmp(aio, "native") != 0 &&
        strcmp(aio, "io_uring") != 0) {
        cli_error(io->cli, "Invalid aio option: %s", aio);
        return -EINVAL;
    }
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct io io = {.cli = cli, .args = args};
    unsigned flags;
    int r;

    if (cli_has(args, 'V')) {
        cli_print_version(cli);
        return 0;
    }
    if (args->n_operands > 1) {
        cli_print_help(cli, cli->command);
        return 1;
    }
    if (get_flags(&io, &flags) < 0 || open_first(&io, flags) < 0)
        return 1;
    cli_die_politely(cli, "what was not flushed may be lost");
    r = cli_has(args, 'c') ? run_given(&io) : run_script(&io);
    if (io_close_disk(&io) < 0)
        r = -EIO;
    return r < 0;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_share,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_io = {
    .name = "io",
    .operands = "[FILE]",
    .brief = "Read, write and look at a disk with qemu-io's commands",
    .about = "-c help lists the commands.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IO,
    .run = run,
};
