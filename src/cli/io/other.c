/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>

#include "base/bytes.h"
#include "cli/common/info-text.h"
#include "cli/common/grow.h"
#include "cli/io/io.h"
#include "cli/common/json.h"

/* ------------------------------------------------------------------ helpers */

void io_print_usage(const struct io_command *command)
{
    printf("%s", command->name);
    if (command->operands)
        printf(" %s", command->operands);
    printf(" -- %s\n", command->brief);
}

int io_wrong(const struct io_command *command)
{
    io_print_usage(command);
    return -EINVAL;
}

int io_number(const char *text, uint64_t *value)
{
    int r = cli_parse_size(text, value);

    if (r == -ERANGE)
        printf("Parsing error: argument too large -- %s\n", text);
    else if (r < 0)
        printf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s\n",
               text);
    return r;
}

/* Three digits behind the point, or none when they are all 0. */
static void trim_zeros(char *number)
{
    char *point = strchr(number, '.');

    if (point && strspn(point + 1, "0") == strlen(point + 1))
        *point = '\0';
}

const char *io_size_text(double value, char *buf)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    char number[IO_SIZE_TEXT / 2];
    size_t unit = 0;

    while (value >= 1024.0 && unit < 6) {
        value /= 1024.0;
        unit++;
    }
    snprintf(number, sizeof(number), unit ? "%.3f" : "%f", value);
    trim_zeros(number);
    snprintf(buf, IO_SIZE_TEXT, "%s %s", number, units[unit]);
    return buf;
}

int io_failed(const struct io *io, const char *name, int r, const struct dr_error *err)
{
    printf("%s failed: %s\n", name, strerror(-r));
    if (io->cli->role == CLI_DROVER && err->text[0])
        cli_fail(io->cli, err);
    return r;
}

/* ------------------------------------------------------------------ looking */

int io_top_run(struct io *io, uint64_t off, uint64_t len, bool *allocated, uint64_t *n)
{
    struct dr_error err = DR_ERROR_INIT;

    for (*n = 0; *n < len;) {
        struct dr_extent_status s;
        int r = dr_block_status(io->disk, off + *n, len - *n, &s, &err);
        if (r < 0)
            return io_failed(io, "is_allocated", r, &err);
        bool here = (s.flags & DR_EXTENT_ALLOCATED) && s.depth == 0;
        if (*n > 0 && here != *allocated)
            break;
        *allocated = here;
        *n += s.len;
    }
    return 0;
}

int io_alloc(struct io *io, const struct io_command *command, int argc, char **argv)
{
    uint64_t off, len = 512, sum = 0, size = dr_size(io->disk), n;
    char text[IO_SIZE_TEXT];
    bool allocated;
    int r = io_number(argv[1], &off);

    (void)command;
    if (r == 0 && argc > 2)
        r = io_number(argv[2], &len);
    if (r < 0)
        return r;
    len = off < size ? dr_min(len, size - off) : 0;
    for (uint64_t at = 0; at < len; at += n) {
        r = io_top_run(io, off + at, len - at, &allocated, &n);
        if (r < 0)
            return r;
        sum += allocated ? n : 0;
    }
    printf("%" PRIu64 "/%" PRIu64 " bytes allocated at offset %s\n", sum, len,
           io_size_text((double)off, text));
    return 0;
}

int io_map(struct io *io, const struct io_command *command, int argc, char **argv)
{
    char size[IO_SIZE_TEXT], place[IO_SIZE_TEXT];
    uint64_t n, end = dr_size(io->disk);
    bool allocated = false;

    (void)command;
    (void)argc;
    (void)argv;
    for (uint64_t off = 0; off < end; off += n) {
        int r = io_top_run(io, off, end - off, &allocated, &n);
        if (r < 0)
            return r;
        printf("%s (0x%" PRIx64 ") bytes %s allocated at offset %s (0x%" PRIx64 ")\n",
               io_size_text((double)n, size), n, allocated ? "   " : "not",
               io_size_text((double)off, place), off);
    }
    return 0;
}

int io_length(struct io *io, const struct io_command *command, int argc, char **argv)
{
    char text[IO_SIZE_TEXT];

    (void)command;
    (void)argc;
    (void)argv;
    printf("%s\n", io_size_text((double)dr_size(io->disk), text));
    return 0;
}

int io_info(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct dr_open_options o = io->image.open;
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *text = NULL;
    CLEANUP_JSON json_t *info = NULL;
    char size[IO_SIZE_TEXT];

    (void)command;
    (void)argc;
    (void)argv;
    /* A second look at a disk that we ourselves have open, perhaps for writing. */
    o.flags &= ~(unsigned)DR_OPEN_RDWR;
    o.flags |= DR_OPEN_FORCE_SHARE | DR_OPEN_NO_BACKING;
    if (dr_info(io->image.path, &o, false, &text, &err) < 0) {
        cli_fail(io->cli, &err);
        return -err.errnum;
    }
    info = cli_json_load(io->cli, text);
    if (!info)
        return -EINVAL;
    printf("format name: %s\n", json_string_value(json_object_get(info, "format")));
    printf("cluster size: %s\n", io_size_text((double)cli_json_number(info, "cluster-size"), size));
    printf("vm state offset: 0 bytes\n");
    cli_print_format_specific(info);
    return 0;
}

/* ------------------------------------------------------------------ the rest */

int io_flush(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = dr_flush(io->disk, &err);

    (void)command;
    (void)argc;
    (void)argv;
    return r < 0 ? io_failed(io, "flush", r, &err) : 0;
}

/* Requests are done when their command returns: there is nothing to wait for. */
int io_aio_flush(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)io;
    (void)command;
    (void)argc;
    (void)argv;
    return 0;
}

int io_truncate(struct io *io, const struct io_command *command, int argc, char **argv)
{
    enum dr_preallocation prealloc = DR_PREALLOC_OFF;
    uint64_t size, old = dr_size(io->disk);
    int c;

    optind = 0;
    opterr = 1;
    while ((c = getopt(argc, argv, "m:")) != -1) {
        if (c == '?')
            return io_wrong(command);
        if (cli_get_prealloc(io->cli, optarg, &prealloc) != 0)
            return -EINVAL;
    }
    if (optind != argc - 1)
        return io_wrong(command);
    int r = io_number(argv[optind], &size);
    if (r < 0)
        return r;
    if (size < old && prealloc != DR_PREALLOC_OFF) {
        cli_error(io->cli, "Cannot use preallocation for shrinking files");
        return -EINVAL;
    }
    return cli_resize(io->cli, io->disk, size, prealloc);
}

int io_help(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)io;
    (void)command;
    if (argc > 1) {
        const struct io_command *one = io_find(argv[1]);
        if (!one) {
            printf("command %s not found\n", argv[1]);
            return -EINVAL;
        }
        io_print_usage(one);
        if (one->about)
            printf("\n%s\n", one->about);
        return 0;
    }
    for (const struct io_command *c = io_commands; c->name; c++)
        if (!(c->flags & IO_UNLISTED))
            io_print_usage(c);
    printf("\nUse 'help commandname' for extended help.\n");
    return 0;
}

int io_quit(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)command;
    (void)argc;
    (void)argv;
    io->quit = true;
    return 0;
}

int io_sleep(struct io *io, const struct io_command *command, int argc, char **argv)
{
    char *end;
    long ms = strtol(argv[1], &end, 0);

    (void)io;
    (void)command;
    (void)argc;
    if (end == argv[1] || *end || ms < 0) {
        printf("%s is not a valid number\n", argv[1]);
        return -EINVAL;
    }
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
    return 0;
}

int io_sigraise(struct io *io, const struct io_command *command, int argc, char **argv)
{
    uint64_t number;
    int r = io_number(argv[1], &number);

    (void)io;
    (void)command;
    (void)argc;
    if (r < 0)
        return r;
    if (number > 64) {
        printf("signal argument '%s' is too large to be a valid signal number\n", argv[1]);
        return -EINVAL;
    }
    /* A test means to see a crash here: what was printed must not be lost with us. */
    fflush(stdout);
    raise((int)number);
    return 0;
}

int io_abort(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)io;
    (void)command;
    (void)argc;
    (void)argv;
    fflush(stdout);
    abort();
}

int io_break(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)io;
    (void)argc;
    if (strcmp(command->name, "break") == 0)
        printf("Could not set breakpoint: %s\n", strerror(ENOTSUP));
    else if (strcmp(command->name, "remove_break") == 0)
        printf("Could not remove breakpoint %s: %s\n", argv[1], strerror(ENOTSUP));
    else
        printf("Could not resume request: %s\n", strerror(ENOTSUP));
    return -ENOTSUP;
}

/* Disks have no zones. "zone_report" → "zone report failed: ...", as newer versions of qemu-io say
 * it of a disk without. */
int io_zone(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)io;
    (void)argc;
    (void)argv;
    printf("zone %s failed: %s\n", command->name + strlen("zone_"), strerror(ENOTSUP));
    return -ENOTSUP;
}
