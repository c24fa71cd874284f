/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names that stand for something to be read or written in order: "-", /dev/stdin, /dev/fd/N, FIFOs.
 */
#ifndef DR_CLI_PIPES_H
#define DR_CLI_PIPES_H

#include "cli/cli.h"

struct cli_pipe {
    int fd;   /* -1: the name is that of a file */
    bool own; /* fd is to be closed */
};
#define CLI_PIPE_NONE ((struct cli_pipe){.fd = -1})

/* "-" means standard input or output; a file of that name is ./- . True if name is "-" and the
 * command has no use for that, after a message. */
bool cli_refuse_pipe(const struct cli *cli, const char *name);

/* What the name stands for, opened. Standard input that is a file is no pipe: *file is its name
 * then, malloc'ed, else NULL. 0, or the exit code 1 after a message. */
int cli_pipe_in(const struct cli *cli, const char *name, struct cli_pipe *pipe, char **file);
int cli_pipe_out(const struct cli *cli, const char *name, struct cli_pipe *pipe);
void cli_pipe_close(struct cli_pipe *pipe);

#endif
