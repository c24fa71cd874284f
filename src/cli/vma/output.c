/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where a new archive goes, and how it is compressed: for all commands that make one. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "cli/vma/vma.h"

int vma_get_compression(const struct cli *cli, const struct cli_args *args, const char *path,
                        struct dr_vma_create_options *o)
{
    const char *text = cli_value(args, KEY_COMPRESS);
    size_t n = strlen(path);
    char *end;

    if (!text && (cli_has(args, KEY_ZSTD) || (n > 4 && strcmp(path + n - 4, ".zst") == 0)))
        text = "zstd";
    if (!text || strcmp(text, "none") == 0)
        return 0;
    if (strncmp(text, "zstd", 4) != 0 || (text[4] && text[4] != ':'))
        return cli_usage(cli, "--compress must be zstd, zstd:LEVEL or none, not '%s'", text);
    o->compression = DR_VMA_ZSTD;
    if (!text[4])
        return 0;
    long level = strtol(text + 5, &end, 10);
    if (!text[5] || *end || level < 1 || level > 22)
        return cli_usage(cli, "the level of zstd must be between 1 and 22, not '%s'", text + 5);
    o->level = (int)level;
    return 0;
}

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), k = strlen(end);
    return n > k && strcmp(name + n - k, end) == 0;
}

bool vma_is_archive_name(const char *path)
{
    return ends_with(path, ".vma") || ends_with(path, ".vma.zst");
}

bool vma_is_stdout(const char *path)
{
    struct stat a, b;

    if (strcmp(path, "-") == 0)
        return true;
    return stat(path, &a) == 0 && fstat(STDOUT_FILENO, &b) == 0 && S_ISFIFO(a.st_mode) &&
           a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

int vma_take_stdout(const struct cli *cli, int *fd)
{
    if (isatty(STDOUT_FILENO)) {
        cli_error(cli, "an archive is not written to a terminal");
        return 1;
    }
    *fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
    if (*fd < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
        cli_error(cli, "standard output: %s", strerror(errno));
        return 1;
    }
    return 0;
}
