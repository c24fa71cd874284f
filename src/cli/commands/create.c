/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/suggest.h"
#include "cli/common/pipes.h"
#include "cli/common/progress.h"
#include "drover/chain.h"

static const struct cli_option options[] = {
    {'f', "format", "FMT", "format of the new image (raw)", false},
    {'b', "backing", "FILE", "parent, as it is to be recorded: relative to the new image", false},
    {'F', "backing-format", "FMT", "format of the parent", false},
    {'u', NULL, NULL, "do not open the parent (SIZE is needed then)", false},
    {'o', "options", "NAME=VALUE,...", "settings of the format; -o help lists them", false},
    {KEY_FINGERPRINT, "fingerprint", NULL, "record what the parent is, beside the image", false},
    {KEY_ADOPT, "adopt", "DATA", "vmdk: DATA holds the disk; make only the descriptor for it",
     false},
    {KEY_FORCE, "force", NULL, "also a growing VMDK of more than 2 TiB, which VMware does not take",
     false},
    {0, NULL, NULL, NULL, false},
};

struct create {
    const struct cli *cli;
    const char *shown; /* as it was typed */
    char *path;
    const char *format;
    struct cli_pairs pairs; /* what is left is the format's */
    char *backing, *backing_format;
    bool unsafe, has_size, force;
    const char **adopt; /* files with data */
    size_t n_adopt;
    uint64_t size;
    unsigned flags;
};

static void create_free(struct create *c)
{
    cli_pairs_free(&c->pairs);
    free(c->path);
    free(c->adopt);
    free(c->backing);
    free(c->backing_format);
}

static int get_size(struct create *c, const char *text)
{
    if (!text)
        return 0;
    c->has_size = true;
    return cli_get_size(c->cli, "image size", text, &c->size) < 0;
}

/* A short option wins over the same thing said with -o. */
static int take(struct create *c, const struct cli_args *args, int key, const char *name,
                char **out)
{
    const char *value = cli_value(args, key);

    CLEANUP_FREE char *given = cli_pairs_take(&c->pairs, name);
    if (!value)
        value = given;
    if (!value)
        return 0;
    if (key == 'b' && !*value) { /* a script's variable that is not set, more often than not */
        cli_error(c->cli, "%s: Expected backing file name, got empty string", c->path);
        return -EINVAL;
    }
    *out = key == 'b' ? cli_plain_name(c->cli, value) : strdup(value);
    if (!*out)
        return -ENOMEM;
    if (*out && !**out) {
        free(*out);
        *out = NULL;
    }
    return 0;
}

static int check_names(const struct create *c)
{
    struct dr_format_info info = {0};

    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, c->format) == 0)
            break;
    }
    if (!info.name || strcmp(info.name, c->format) != 0) {
        cli_error(c->cli, "%s: Unknown file format '%s'", c->path, c->format);
        return 1;
    }
    if (!info.can_create) {
        cli_error(c->cli, "%s: Format driver '%s' does not support image creation", c->path,
                  c->format);
        return 1;
    }
    for (size_t i = 0; i < c->pairs.n; i++) {
        if (!cli_option_exists(c->format, c->pairs.pairs[i].name)) {
            cli_error(c->cli, "%s: Invalid parameter '%s'", c->path, c->pairs.pairs[i].name);
            return 1;
        }
    }
    if (c->backing && !info.can_back) {
        cli_error(c->cli, "%s: Backing file not supported for file format '%s'", c->path,
                  c->format);
        return 1;
    }
    if (c->backing_format && !c->backing && !cli_parent_may_be(c->format, c->backing_format)) {
        cli_error(c->cli, "%s: Backing file format not supported for file format '%s'", c->path,
                  c->format);
        return 1;
    }
    if (c->backing_format && !cli_format_exists(c->backing_format)) {
        cli_error(c->cli, "%s: Unknown backing file format '%s'", c->path, c->backing_format);
        return 1;
    }
    return 0;
}

static int open_backing(struct create *c, const struct cli_args *args, struct dr_disk **disk)
{
    struct cli_image image;
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *path = cli_path_beside(c->path, c->backing);

    if (!path)
        return -ENOMEM;
    const struct cli_image_spec spec = {.name = path, .no_image_opts = true};
    if (cli_image_get(c->cli, args, &spec, &image) != 0)
        return -EINVAL;
    image.open.format = c->backing_format;
    int r = !cli_name_exists(image.path) ? dr_fail(&err, ENOENT, "No such file or directory")
                                         : dr_open(image.path, &image.open, disk, &err);
    if (r < 0)
        cli_error(c->cli, "%s: Could not open '%s': %s\nCould not open backing image.", c->path,
                  image.path, err.text);
    if (r == -ENOENT)
        cli_hint_relative(c->cli, c->path, c->backing);
    cli_image_free(&image);
    return r;
}

/* Without a size, take the parent's. Without the parent's format, only tell which one it seems
 * to be. */
static int ask_backing(struct create *c, const struct cli_args *args)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;

    if (c->backing && !c->backing_format && c->cli->role == CLI_DROVER) {
        const char *only = cli_parent_format(c->format);
        c->backing_format = only ? strdup(only) : NULL;
    }
    if (c->backing && !c->backing_format && dr_name_format(c->backing))
        c->backing_format = strdup(dr_name_format(c->backing));
    bool known = c->backing_format ||
                 (c->cli->role == CLI_DROVER && cli_parent_is_known(c->format));
    if (!c->backing || (c->unsafe && known))
        return 0;
    if (c->unsafe) {
        cli_error(c->cli, "%s: Backing file specified without backing format", c->path);
        return 1;
    }
    if (open_backing(c, args, &disk) < 0)
        return 1;
    const char *packer = dr_image_packer(disk, 0), *format = dr_image_format(disk, 0);
    bool raw = strcmp(format, "raw") == 0; /* which means the bytes as they are */
    if (!known) {
        cli_error(c->cli,
                  "%s: Backing file specified without backing format\nDetected format of %s%s%s%s.",
                  c->path, format, packer ? ", compressed by " : "", packer ? packer : "",
                  packer && raw ? ": unpack it first" : "");
        return 1;
    }
    if (packer && raw)
        cli_error(c->cli,
                  "warning: %s is compressed by %s: as a raw disk it is the compressed bytes; "
                  "unpack it to have what they hold",
                  c->backing, packer);
    if (!c->has_size)
        c->size = dr_size(disk);
    c->has_size = true;
    return 0;
}

static void print_value(const char *name, const char *value)
{
    printf(" %s=", name);
    for (; *value; value++) {
        putchar(*value);
        if (*value == ',')
            putchar(',');
    }
}

static void print_setting(const struct create *c, const struct dr_create_option *o)
{
    const char *value = cli_pairs_find(&c->pairs, o->name);
    uint64_t bytes;

    if (!value)
        value = o->initial;
    if (!value)
        return;
    if (strcmp(o->type, "size") == 0 && cli_parse_size(value, &bytes) == 0)
        printf(" %s=%" PRIu64, o->name, bytes);
    else
        print_value(o->name, value);
}

/* qemu-img has the settings of a qcow2 image in an order of its own: these, the size, compat, the
 * parent, others. */
static const char *const qcow2_first[] = {"cluster_size", "extended_l2", "preallocation",
                                          "compression_type"};
#define N_FIRST (sizeof(qcow2_first) / sizeof(*qcow2_first))

static bool is_printed_apart(const struct create *c, const char *name)
{
    if (strcmp(name, "size") == 0 || strncmp(name, "backing_f", 9) == 0)
        return true;
    for (size_t i = 0; strcmp(c->format, "qcow2") == 0 && i < N_FIRST; i++) {
        if (strcmp(name, qcow2_first[i]) == 0)
            return true;
    }
    return strcmp(c->format, "qcow2") == 0 && strcmp(name, "compat") == 0;
}

static void print_named(const struct create *c, const char *name)
{
    struct dr_create_option o;

    for (size_t i = 0; dr_format_option(c->format, i, &o) == 0; i++) {
        if (strcmp(o.name, name) == 0)
            print_setting(c, &o);
    }
}

static void announce(const struct create *c)
{
    const bool qcow2 = strcmp(c->format, "qcow2") == 0;
    struct dr_create_option o;

    if (c->n_adopt)
        return;
    printf("Formatting '%s', fmt=%s", c->shown, c->format);
    for (size_t i = 0; qcow2 && i < N_FIRST; i++)
        print_named(c, qcow2_first[i]);
    printf(" size=%" PRIu64, c->size);
    if (qcow2)
        print_named(c, "compat");
    if (c->backing)
        print_value("backing_file", c->backing);
    if (c->backing_format)
        print_value("backing_fmt", c->backing_format);
    for (size_t i = 0; dr_format_option(c->format, i, &o) == 0; i++) {
        if (!is_printed_apart(c, o.name))
            print_setting(c, &o);
    }
    printf("\n");
}

/* Does the library's text name the file already, if by the path without links? */
static bool begins_with_file(const char *text, const char *path)
{
    CLEANUP_FREE char *real = realpath(path, NULL);

    return strncmp(text, path, strlen(path)) == 0 ||
           (real && strncmp(text, real, strlen(real)) == 0);
}

static int create(struct create *c, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    const struct dr_create_options o = {
        .format = c->format,
        .size = c->size,
        .has_size = c->has_size,
        .pairs = c->pairs.pairs,
        .n_pairs = c->pairs.n,
        .backing = c->backing,
        .backing_format = c->backing_format,
        .unsafe = c->unsafe,
        .no_replace = c->n_adopt > 0,
        .force = c->force,
        .adopt = c->adopt,
        .n_adopt = c->n_adopt,
        .flags = c->flags,
        .stop = cli_stop(),
    };

    if (!cli_has(args, 'q'))
        announce(c);
    cli_catch_signals();
    int r = dr_create(c->path, &o, &err);
    if (r == -ECANCELED && cli_signalled()) {
        cli_error(c->cli, "interrupted: '%s' is as it was before", c->path);
        return cli_signalled();
    }
    if (r < 0) {
        if (begins_with_file(err.text, c->path))
            cli_fail(c->cli, &err);
        else
            cli_error(c->cli, "%s: %s", c->path, err.text);
        return 1;
    }
    const struct dr_fingerprint_options print = {.open.format = c->format, .open.flags = c->flags};
    if (cli_has(args, KEY_FINGERPRINT) && dr_fingerprint(c->path, &print, NULL, &err) < 0) {
        cli_fail(c->cli, &err);
        return 1;
    }
    return 0;
}

static int get_settings(struct create *c, const struct cli_args *args)
{
    if (cli_pairs_from_args(c->cli, args, &c->pairs) < 0)
        return 1;
    CLEANUP_FREE char *size = cli_pairs_take(&c->pairs, "size");
    if (take(c, args, 'b', "backing_file", &c->backing) < 0 ||
        take(c, args, 'F', "backing_fmt", &c->backing_format) < 0)
        return 1;
    if (size && args->n_operands > 1) {
        cli_error(c->cli, "%s: The image size must be specified only once", c->path);
        return 1;
    }
    return get_size(c, args->n_operands > 1 ? args->operands[1] : size);
}

/* "X-flat.vmdk", "X-f001.vmdk", "X-s012.vmdk": how VMware calls the files of the disk X.vmdk. Where
 * the part between is, from -; NULL: another name. */
static const char *data_suffix(const char *name)
{
    const char *dot = strrchr(name, '.'), *dash = strrchr(name, '-');

    if (!dot || !dash || dash > dot || dash == name || dash[-1] == '/')
        return NULL;
    if (strncmp(dash, "-flat.", 6) == 0)
        return dash;
    size_t digits = strspn(dash + 2, "0123456789");
    return strchr("fs", dash[1]) && digits >= 3 && dash + 2 + digits == dot ? dash : NULL;
}

/* What a shell makes of --adopt X-f*.vmdk: one value and operands, of which only the descriptor has
 * another kind of name. */
static int get_adopted(struct create *c, const struct cli_args *args)
{
    size_t given = 0;
    const char *first = cli_value(args, KEY_ADOPT), *suffix;

    while (cli_nth_value(args, KEY_ADOPT, given))
        given++;
    c->adopt = calloc(given + (size_t)args->n_operands + 1, sizeof(*c->adopt));
    if (!c->adopt)
        return 1;
    for (size_t i = 0; i < given; i++)
        c->adopt[c->n_adopt++] = cli_nth_value(args, KEY_ADOPT, i);
    for (int i = 0; i < args->n_operands; i++) {
        if (data_suffix(args->operands[i]))
            c->adopt[c->n_adopt++] = args->operands[i];
        else if (c->path)
            return cli_usage(c->cli, "Unexpected argument: %s", args->operands[i]);
        else
            c->path = strdup(args->operands[i]);
    }
    suffix = data_suffix(first);
    if (!c->path && !suffix)
        return cli_usage(c->cli, "Expecting the name of the descriptor for %s", first);
    if (!c->path &&
        asprintf(&c->path, "%.*s%s", (int)(suffix - first), first, strrchr(first, '.')) < 0)
        c->path = NULL;
    c->format = cli_has(args, 'f') ? cli_value(args, 'f') : "vmdk";
    return !c->path;
}

static int adopt(struct create *c, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_DISK struct dr_disk *disk = NULL;
    const struct dr_open_options open = {.format = c->format, .flags = DR_OPEN_NO_BACKING};

    if (get_adopted(c, args) != 0 || cli_pairs_from_args(c->cli, args, &c->pairs) < 0 ||
        take(c, args, 'b', "backing_file", &c->backing) < 0 ||
        take(c, args, 'F', "backing_fmt", &c->backing_format) < 0 ||
        cli_shared_flags(c->cli, args, &c->flags) || check_names(c))
        return 1;
    cli_export_allowed(args);
    if (create(c, args) != 0)
        return 1;
    if (dr_open(c->path, &open, &disk, &err) < 0) {
        cli_fail(c->cli, &err);
        return 1;
    }
    if (!cli_has(args, 'q'))
        printf("'%s' describes a disk of %" PRIu64 " bytes; the data is as it was\n", c->path,
               dr_size(disk));
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(create_free))) struct create c = {.cli = cli};

    c.force = cli->role != CLI_DROVER || cli_has(args, KEY_FORCE);
    if (cli_has(args, KEY_ADOPT))
        return adopt(&c, args);
    c.format = cli_has(args, 'f') ? cli_value(args, 'f') : "raw";
    if (cli_wants_option_list(args))
        return cli_print_option_list(cli, c.format, args->n_operands > 0, true);
    if (args->n_operands < 1)
        return cli_usage(cli, "Expecting image file name");
    if (args->n_operands > 2)
        return cli_usage(cli, "Unexpected argument: %s", args->operands[2]);
    c.shown = args->operands[0];
    if (cli_foreign_protocol(cli, c.shown)) {
        cli_error(cli, "%s: Unknown protocol '%.*s'", c.shown,
                  (int)cli_foreign_protocol(cli, c.shown), c.shown);
        return 1;
    }
    if (cli_refuse_pipe(cli, c.shown))
        return 1;
    c.path = cli_plain_name(cli, c.shown);
    if (!c.path)
        return 1;
    c.unsafe = cli_has(args, 'u');
    if (get_settings(&c, args) || cli_shared_flags(cli, args, &c.flags) || check_names(&c) ||
        ask_backing(&c, args))
        return 1;
    if (!c.has_size) {
        cli_error(cli, "%s: Image creation needs a size parameter", c.path);
        return 1;
    }
    cli_export_allowed(args);
    return create(&c, args);
}

static const struct cli_option *const sets[] = {options, cli_opts_quiet, cli_opts_common, NULL};

const struct cli_command cli_cmd_create = {
    .name = "create",
    .operands = "FILE [SIZE]",
    .brief = "Create an empty disk image, or a child of another one",
    .about = "SIZE takes the suffixes k, M, G, T, P and E, and may have a fraction: 1.5G.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
