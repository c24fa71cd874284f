/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The io shell: qemu-io's commands on a disk. */
#ifndef DR_CLI_IO_H
#define DR_CLI_IO_H

#include <time.h>

#include "cli/common/image.h"

struct io {
    const struct cli *cli;
    const struct cli_args *args;
    struct dr_disk *disk;   /* NULL = none open */
    struct cli_image image; /* how it was opened */
    bool writethrough;
    bool temporary;    /* what is written is thrown away at the end */
    bool copy_on_read; /* what is read from below is written into the image */
    bool quit;
};

enum io_flag {
    IO_NO_FILE = 1 << 0,  /* works without an open disk */
    IO_UNLISTED = 1 << 2, /* help lists what qemu-io 7.2 has */
    IO_WRITES = 1 << 1,
};

struct io_command {
    const char *name, *other_name;
    const char *operands;
    const char *brief;
    const char *about; /* for help NAME, or NULL */
    int min, max;      /* number of arguments; max -1 = any */
    unsigned flags;    /* enum io_flag */
    /* argv[0] is the name. 0, or negative: failed, and said so. */
    int (*run)(struct io *io, const struct io_command *command, int argc, char **argv);
};

extern const struct io_command io_commands[]; /* ends with a NULL name; by name */
const struct io_command *io_find(const char *name);
int io_line(struct io *io, const char *line); /* one line of input */

/* Largest request, as in QEMU: a multiple of 512 below 2 GiB. */
#define IO_REQUEST_MAX 2147483136u

void io_print_usage(const struct io_command *command);
/* Wrong use: print it. -EINVAL. */
int io_wrong(const struct io_command *command);
/* A size or offset; what is wrong with it is printed. */
int io_number(const char *text, uint64_t *value);
/* "64 KiB", "1.500 MiB", "12 bytes". */
#define IO_SIZE_TEXT 48
const char *io_size_text(double value, char *buf);
/* "NAME failed: Input/output error", and for drover's own name the reason. Returns r. */
int io_failed(const struct io *io, const char *name, int r, const struct dr_error *err);

/* io/open.c. image is taken over. name: for messages, NULL = none was given. */
int io_open_disk(struct io *io, struct cli_image *image, const char *name);
int io_close_disk(struct io *io);
int io_open(struct io *io, const struct io_command *command, int argc, char **argv);
int io_close(struct io *io, const struct io_command *command, int argc, char **argv);
int io_reopen(struct io *io, const struct io_command *command, int argc, char **argv);

/* io/other.c. The run at off that the top image itself holds, or does not: *n bytes, at most len. A
 * failure is said. */
int io_top_run(struct io *io, uint64_t off, uint64_t len, bool *allocated, uint64_t *n);

/* io/data.c */
int io_read(struct io *io, const struct io_command *command, int argc, char **argv);
int io_write(struct io *io, const struct io_command *command, int argc, char **argv);
int io_readv(struct io *io, const struct io_command *command, int argc, char **argv);
int io_writev(struct io *io, const struct io_command *command, int argc, char **argv);
int io_aio_read(struct io *io, const struct io_command *command, int argc, char **argv);
int io_aio_write(struct io *io, const struct io_command *command, int argc, char **argv);
int io_discard(struct io *io, const struct io_command *command, int argc, char **argv);

/* io/other.c */
int io_abort(struct io *io, const struct io_command *command, int argc, char **argv);
int io_aio_flush(struct io *io, const struct io_command *command, int argc, char **argv);
int io_alloc(struct io *io, const struct io_command *command, int argc, char **argv);
int io_break(struct io *io, const struct io_command *command, int argc, char **argv);
int io_zone(struct io *io, const struct io_command *command, int argc, char **argv);
int io_flush(struct io *io, const struct io_command *command, int argc, char **argv);
int io_help(struct io *io, const struct io_command *command, int argc, char **argv);
int io_info(struct io *io, const struct io_command *command, int argc, char **argv);
int io_length(struct io *io, const struct io_command *command, int argc, char **argv);
int io_map(struct io *io, const struct io_command *command, int argc, char **argv);
int io_quit(struct io *io, const struct io_command *command, int argc, char **argv);
int io_sigraise(struct io *io, const struct io_command *command, int argc, char **argv);
int io_sleep(struct io *io, const struct io_command *command, int argc, char **argv);
int io_truncate(struct io *io, const struct io_command *command, int argc, char **argv);

#endif
