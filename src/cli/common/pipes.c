/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/common/pipes.h"

bool cli_refuse_pipe(const struct cli *cli, const char *name)
{
    if (strcmp(name, "-") != 0)
        return false;
    cli_error(cli, "'-' is standard input or output, which cannot be used here: only convert and "
                   "dd read and write disks in order; a file of this name is ./-");
    return true;
}

/* The descriptor of this process that a name like /dev/fd/3 means, or -1. */
static int descriptor_of(const char *name, int standard)
{
    static const char *const dirs[] = {"/dev/fd/", "/proc/self/fd/"};

    if (strcmp(name, "-") == 0)
        return standard;
    if (strcmp(name, "/dev/stdin") == 0)
        return STDIN_FILENO;
    if (strcmp(name, "/dev/stdout") == 0)
        return STDOUT_FILENO;
    if (strcmp(name, "/dev/stderr") == 0)
        return STDERR_FILENO;
    for (size_t i = 0; i < sizeof(dirs) / sizeof(dirs[0]); i++) {
        size_t n = strlen(dirs[i]);
        char *end;
        if (strncmp(name, dirs[i], n) != 0 || name[n] < '0' || name[n] > '9')
            continue;
        long fd = strtol(name + n, &end, 10);
        return *end == '\0' && fd <= 1 << 20 ? (int)fd : -1;
    }
    return -1;
}

static bool goes_in_order(const struct stat *st)
{
    return S_ISFIFO(st->st_mode) || S_ISSOCK(st->st_mode) || S_ISCHR(st->st_mode);
}

/* The name of the file behind a descriptor, by which what it names is found beside it. */
static char *name_behind(int fd, const struct stat *st)
{
    char link[32], name[4096];
    struct stat same;

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof(name) - 1);
    name[n < 0 ? 0 : n] = '\0';
    if (n > 0 && stat(name, &same) == 0 && same.st_dev == st->st_dev && same.st_ino == st->st_ino)
        return strdup(name);
    return strdup(link);
}

static int unusable(const struct cli *cli, const char *name, int e)
{
    cli_error(cli, "Could not open '%s': %s", name, strerror(e));
    return 1;
}

int cli_pipe_in(const struct cli *cli, const char *name, struct cli_pipe *pipe, char **file)
{
    struct stat st;
    int fd = descriptor_of(name, STDIN_FILENO);

    *pipe = CLI_PIPE_NONE;
    *file = NULL;
    if (fd < 0) {
        if (stat(name, &st) < 0 || !S_ISFIFO(st.st_mode))
            return 0;
        *pipe = (struct cli_pipe){open(name, O_RDONLY | O_CLOEXEC), true};
        return pipe->fd < 0 ? unusable(cli, name, errno) : 0;
    }
    if (fstat(fd, &st) < 0)
        return unusable(cli, name, errno);
    if (!goes_in_order(&st))
        return (*file = name_behind(fd, &st)) ? 0 : unusable(cli, name, ENOMEM);
    if (isatty(fd)) {
        cli_error(cli, "%s: is a terminal, from which no disk can be read", name);
        return 1;
    }
    pipe->fd = fd;
    return 0;
}

int cli_pipe_out(const struct cli *cli, const char *name, struct cli_pipe *pipe)
{
    struct stat st;
    int fd = descriptor_of(name, STDOUT_FILENO);

    *pipe = CLI_PIPE_NONE;
    if (fd < 0) {
        if (stat(name, &st) < 0 || (!S_ISFIFO(st.st_mode) && !S_ISCHR(st.st_mode)))
            return 0;
        *pipe = (struct cli_pipe){open(name, O_WRONLY | O_CLOEXEC | O_NOCTTY), true};
        fd = pipe->fd;
    }
    if (fd < 0 || fstat(fd, &st) < 0)
        return unusable(cli, name, errno);
    if (isatty(fd)) {
        cli_error(cli, "%s: is a terminal, which a disk is not written to", name);
        cli_pipe_close(pipe);
        return 1;
    }
    pipe->fd = fd;
    return 0;
}

void cli_pipe_close(struct cli_pipe *pipe)
{
    if (pipe->own && pipe->fd >= 0)
        close(pipe->fd);
    *pipe = CLI_PIPE_NONE;
}
