/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names of images on the command line, and how to open them. */
#ifndef DR_CLI_IMAGE_H
#define DR_CLI_IMAGE_H

#include "cli/cli.h"
#include "drover/ops.h"

struct cli_image {
    char *path;
    const char *given;                          /* the operand that it came from */
    char *format;                               /* NULL = find out */
    char *backing, *backing_format, *data_file; /* in the place of those recorded, or NULL */
    const char *device;   /* the driver that takes devices only, if one was asked for */
    bool read_only;       /* its settings say so: a command that writes is refused */
    bool copy_on_read;    /* a driver says so: what is read from below is written into the image */
    bool limits_requests; /* its throttle group does, which nothing here obeys */
    uint64_t read_rate, write_rate; /* of its throttle group, bytes a second; 0 = none */
    const char **allow;
    struct dr_open_options open; /* points into the above */
};

/* Which options of the command say how to open this image. */
struct cli_image_spec {
    const char *name;   /* the operand */
    int format_key;     /* 'f', 'F' or 0 */
    int cache_key;      /* 't', 'T' or 0 */
    unsigned flags;     /* enum dr_open_flag to begin with */
    int opts_key;       /* what makes name a list instead of a path; 0 = --image-opts */
    bool pipes;         /* "-" is a name like any other to this place: the caller asks what it is */
    bool no_image_opts; /* name is a path, whatever that says */
    bool no_data;       /* what the guest's bytes are is not asked */
    uint64_t *rate; /* the command obeys it, 0 = none: a throttle group may lower it. NULL = none */
};

/* 0, or the exit code 1 after a message. Ends with cli_image_free(). */
int cli_image_get(const struct cli *cli, const struct cli_args *args,
                  const struct cli_image_spec *spec, struct cli_image *image);
void cli_image_free(struct cli_image *image);
#define CLEANUP_IMAGE __attribute__((cleanup(cli_image_free)))

/* The same for a list of options, or a json: name; for cli_image_get(). 0 or -errno, with message.
 */
int cli_image_of_options(const struct cli *cli, const struct cli_args *args, const char *text,
                         struct cli_image *image);
int cli_image_of_json(const struct cli *cli, const struct cli_args *args, const char *name,
                      struct cli_image *image);

/* Flags that all images of a command share: --locking, the habits of the name. */
int cli_shared_flags(const struct cli *cli, const struct cli_args *args, unsigned *flags);

/* none, writeback, writethrough, directsync, unsafe → flags are added. -EINVAL. */
int cli_cache_flags(const char *mode, unsigned *flags, bool *writethrough);

/* The file must be there and no directory: what is wrong, in the words that scripts know. 0 or
 * -errno. */
int cli_image_problem(const struct cli_image *image, char *text, size_t size);
/* The same, said. */
int cli_image_check(const struct cli *cli, const struct cli_image *image);
/* The library could not open path: its text, in the form of the name we were called by. */
void cli_fail_open(const struct cli *cli, const char *path, const struct dr_error *err);
/* That text alone. */
void cli_open_reason(const struct cli *cli, const char *path, const struct dr_error *err,
                     char *text, size_t size);
/* cli_image_check() and dr_open(), with message. */
int cli_image_open(const struct cli *cli, const struct cli_image *image, struct dr_disk **disk);

void cli_cleanup_disk(struct dr_disk **disk);
#define CLEANUP_DISK __attribute__((cleanup(cli_cleanup_disk)))

/* For commands that serve the disk and do not copy what is read. 0 or -EINVAL, with message. */
int cli_refuse_copy_on_read(const struct cli *cli, const struct cli_image *image);

bool cli_format_exists(const char *name);
/* The only format that backing images of this format can have, or NULL. */
const char *cli_parent_format(const char *format);
/* May images of this format have a backing image of that one? */
bool cli_parent_may_be(const char *format, const char *parent);
/* May a backing image of this format's images go without a format? */
bool cli_parent_is_known(const char *format);

/* NAME=VALUE,NAME=VALUE with ",," for a comma; a NAME alone means NAME=on. Later lists add to
 * earlier ones, a later value of the same name wins. */
struct cli_pairs {
    struct dr_pair *pairs; /* the strings are malloc'ed */
    size_t n;
};
int cli_pairs_add(struct cli_pairs *list, const char *text);
/* All that -o gave; says what is wrong. */
int cli_pairs_from_args(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list);
int cli_pairs_set(struct cli_pairs *list, const char *name, const char *value);
const char *cli_pairs_find(const struct cli_pairs *list, const char *name);
/* The value, malloc'ed, taken out of the list; NULL = not there. */
char *cli_pairs_take(struct cli_pairs *list, const char *name);
/* tls-creds=ID, password-secret=ID and cookie-secret=ID among the settings become what the --object
 * of that id says. A failure is told. */
int cli_objects_resolve(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list);
/* Refuses objects that nothing here obeys. A failure is told. */
int cli_objects_check(const struct cli *cli, const struct cli_args *args);
/* All secrets that were given, after that: len bytes and a '\0'. */
struct cli_secret {
    char *id, *text;
    size_t len;
};
const struct cli_secret *cli_secrets(size_t *n);
void cli_pairs_free(struct cli_pairs *list);
#define CLEANUP_PAIRS __attribute__((cleanup(cli_pairs_free)))

#endif
