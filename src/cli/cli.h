/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The command: what its parts share. Everything below stands on the public API. */
#ifndef DR_CLI_CLI_H
#define DR_CLI_CLI_H

#include <stdarg.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "cli/common/options.h"
#include "drover/drover.h"

/* Under which name the program was called decides its name in messages, its command set and what
 * names inside images may point at. */
enum cli_role {
    CLI_DROVER = 1 << 0,
    CLI_QEMU_IMG = 1 << 1,
    CLI_QEMU_IO = 1 << 2,
    CLI_VMA = 1 << 3,
    CLI_QEMU_NBD = 1 << 4,
    CLI_ANY_ROLE = CLI_DROVER | CLI_QEMU_IMG | CLI_QEMU_IO | CLI_VMA | CLI_QEMU_NBD,
};

struct cli {
    const char
        *prog; /* "drover", "qemu-img", "qemu-io", "qemu-nbd", "vma": the prefix of messages */
    enum cli_role role;
    const struct cli_command *command;
};

struct cli_command {
    const char *name;
    const char *operands;                      /* "FILE [SIZE]" */
    const char *brief;                         /* one line, no full stop */
    const char *about;                         /* more lines for --help, or NULL */
    const struct cli_option *const *sets;      /* option tables, NULL-terminated */
    const struct cli_command *const *children; /* NULL-terminated: "vma list" of "vma"; or NULL */
    unsigned roles;                            /* enum cli_role in which the command exists */
    bool last_is_operand;                      /* even when it looks like an option: -1G */
    int usage_exit;                            /* exit code for wrong use; 0 = 1 */
    /* The exit code of the program. */
    int (*run)(const struct cli *cli, const struct cli_args *args);
};

/* main.c: all commands, NULL-terminated, in the order in which help shows them. */
extern const struct cli_command *const cli_commands[];
const struct cli_command *cli_find_command(const char *name, enum cli_role role);
void cli_print_version(const struct cli *cli);

/* ------------------------------------------------------------------ messages (output.c) */

/* Names inside images are written by strangers: control characters must not reach a terminal, of
 * whatever encoding, nor such as turn lines around. They become "?". Returns text. */
char *cli_tame(char *text);
/* text to stdout, tamed. */
void cli_put(const char *text);
/* Length of the character at s if it is well-formed UTF-8 that steers no terminal, else 0. */
size_t cli_char_length(const char *s);

/* "prog: text" on standard error, after what standard output holds. */
void cli_error(const struct cli *cli, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same for what the library said. */
void cli_fail(const struct cli *cli, const struct dr_error *err);
/* If a parent could not be opened: why (NULL: it is something else), and in err->text the end of
 * the child's name. */
const char *cli_backing_reason(const struct dr_error *err, const char **child_end);
/* Wrong use: the text, then where help is. Returns the exit code. */
int cli_usage(const struct cli *cli, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* "1.5 GiB": three significant digits, as qemu-img writes sizes. buf holds CLI_SIZE_TEXT bytes. */
#define CLI_SIZE_TEXT 32
const char *cli_human_size(uint64_t bytes, char *buf);

/* "1.5G" → bytes: decimal with a fraction and a suffix, or hexadecimal. -EINVAL, -ERANGE. */
int cli_parse_size(const char *text, uint64_t *bytes);
/* The same; a failure is told with what (the value's name) and the rules. */
int cli_get_size(const struct cli *cli, const char *what, const char *text, uint64_t *bytes);

#endif
