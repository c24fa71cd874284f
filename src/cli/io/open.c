/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <getopt.h>
#include <string.h>

#include "cli/io/io.h"
#include "exports/exports.h"

static void cant_open(const struct io *io, const char *name, const char *text)
{
    cli_error(io->cli, "can't open%s%s: %s", name ? " device " : "", name ? name : "", text);
}

int io_open_disk(struct io *io, struct cli_image *image, const char *name)
{
    struct dr_error err = DR_ERROR_INIT;
    char text[4300];
    int r;

    r = cli_image_problem(image, text, sizeof(text));
    if (r == 0 && (image->open.flags & DR_OPEN_FORCE_SHARE) && (image->open.flags & DR_OPEN_RDWR)) {
        snprintf(text, sizeof(text), "force-share=on can only be used with read-only images");
        r = -EINVAL;
    }
    if (r < 0) {
        cant_open(io, name, text);
    } else {
        r = io->temporary ? temporary_open(image->path, &image->open, &io->disk, &err)
                          : dr_open(image->path, &image->open, &io->disk, &err);
        if (r < 0) {
            cli_open_reason(io->cli, image->path, &err, text, sizeof(text));
            cant_open(io, name, text);
        }
    }
    if (r < 0) {
        io->disk = NULL;
        cli_image_free(image);
        return r;
    }
    io->image = *image;
    return 0;
}

int io_close_disk(struct io *io)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = io->disk ? dr_close(io->disk, &err) : 0;

    if (r < 0)
        cli_fail(io->cli, &err);
    io->disk = NULL;
    cli_image_free(&io->image);
    return r;
}

int io_close(struct io *io, const struct io_command *command, int argc, char **argv)
{
    (void)command;
    (void)argc;
    (void)argv;
    return io_close_disk(io);
}

struct opening {
    unsigned flags;
    bool writethrough, temporary, copy_on_read;
    const char *options; /* -o */
};

static int parse_open(struct io *io, const struct io_command *command, int argc, char **argv,
                      struct opening *o)
{
    int c;

    *o = (struct opening){.flags = DR_OPEN_RDWR};
    optind = 0;
    opterr = 1;
    while ((c = getopt(argc, argv, "srCnUki:o:t:d:")) != -1) {
        if (c == 'r') {
            o->flags &= ~(unsigned)DR_OPEN_RDWR;
        } else if (c == 'U') {
            o->flags |= DR_OPEN_FORCE_SHARE;
        } else if (c == 'n') {
            o->flags |= DR_OPEN_DIRECT;
        } else if (c == 'o') {
            o->options = optarg;
        } else if (c == 't' && cli_cache_flags(optarg, &o->flags, &o->writethrough) < 0) {
            cli_error(io->cli, "Invalid cache option: %s", optarg);
            return -EINVAL;
        } else if (c == 's') {
            o->temporary = true;
        } else if (c == 'C') {
            o->copy_on_read = true;
        } else if (c == '?') {
            return io_wrong(command);
        }
    }
    return 0;
}

int io_open(struct io *io, const struct io_command *command, int argc, char **argv)
{
    struct opening o;
    struct cli_image image;
    struct cli_args args = *io->args;
    struct cli_hit hits[3];
    char *list = NULL;
    int r;

    r = parse_open(io, command, argc, argv, &o);
    if (r < 0)
        return r;
    if (optind < argc - 1 || (optind == argc && !o.options))
        return io_wrong(command);
    if (io->disk) {
        cli_error(io->cli, "file open already, try 'help close'");
        return -EBUSY;
    }
    const char *name = optind < argc ? argv[optind] : NULL;
    /* -o adds to the name: together they are what --image-opts takes. */
    if (o.options &&
        asprintf(&list, "%s%s%s", o.options, name ? ",file.filename=" : "", name ? name : "") < 0)
        return -ENOMEM;
    args.n_hits = 0;
    args.hits = hits;
    if (o.options)
        hits[args.n_hits++] = (struct cli_hit){KEY_IMAGE_OPTS, NULL};
    static const int handed_on[] = {KEY_LOCKING, KEY_FINGERPRINTS};
    for (size_t i = 0; i < sizeof(handed_on) / sizeof(handed_on[0]); i++) {
        const char *value = cli_value(io->args, handed_on[i]);
        if (value)
            hits[args.n_hits++] = (struct cli_hit){handed_on[i], value};
    }
    const struct cli_image_spec spec = {.name = list ? list : name, .flags = o.flags};
    r = cli_image_get(io->cli, &args, &spec, &image) != 0 ? -EINVAL : 0;
    io->temporary = o.temporary;
    io->copy_on_read = o.copy_on_read || image.copy_on_read;
    if (r == 0)
        r = io_open_disk(io, &image, name);
    free(list);
    io->writethrough = o.writethrough;
    return r;
}

static int parse_reopen(struct io *io, const struct io_command *command, int argc, char **argv,
                        unsigned *flags)
{
    bool read_only = false, writable = false;
    int c;

    optind = 0;
    opterr = 1;
    while ((c = getopt(argc, argv, "c:o:rw")) != -1) {
        if (c == 'c') {
            *flags &= ~(unsigned)(DR_OPEN_DIRECT | DR_OPEN_NO_FLUSH);
            if (cli_cache_flags(optarg, flags, &io->writethrough) < 0) {
                cli_error(io->cli, "Invalid cache option: %s", optarg);
                return -EINVAL;
            }
        } else if (c == 'o') {
            optarg[strcspn(optarg, "=")] = '\0';
            cli_error(io->cli, "Cannot change the option '%s'", optarg);
            return -EINVAL;
        } else if (c == 'r') {
            read_only = true;
        } else if (c == 'w') {
            writable = true;
        } else {
            return io_wrong(command);
        }
    }
    if (read_only && writable) {
        cli_error(io->cli, "Only one -r/-w option may be given");
        return -EINVAL;
    }
    if (optind != argc)
        return io_wrong(command);
    if (read_only)
        *flags &= ~(unsigned)DR_OPEN_RDWR;
    if (writable)
        *flags |= DR_OPEN_RDWR;
    return 0;
}

int io_reopen(struct io *io, const struct io_command *command, int argc, char **argv)
{
    unsigned flags = io->image.open.flags;
    int r = parse_reopen(io, command, argc, argv, &flags);

    if (r < 0)
        return r;
    struct cli_image image = io->image;
    io->image = (struct cli_image){0};
    image.open.flags = flags;
    r = io_close_disk(io);
    if (r < 0) {
        cli_image_free(&image);
        return r;
    }
    CLEANUP_FREE char *name = strdup(image.path);
    return io_open_disk(io, &image, name);
}
