/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <jansson.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "cli/common/filters.h"
#include "cli/common/image.h"
#include "cli/common/pipes.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"

/* ------------------------------------------------------------------ flags */

int cli_cache_flags(const char *mode, unsigned *flags, bool *writethrough)
{
    static const struct {
        const char *name;
        unsigned flags;
        bool through;
    } modes[] = {{"none", DR_OPEN_DIRECT, false},
                 {"off", DR_OPEN_DIRECT, false},
                 {"writeback", 0, false},
                 {"unsafe", DR_OPEN_NO_FLUSH, false},
                 {"directsync", DR_OPEN_DIRECT, true},
                 {"writethrough", 0, true}};

    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
        if (strcmp(mode, modes[i].name) == 0) {
            *flags |= modes[i].flags;
            if (writethrough)
                *writethrough = modes[i].through;
            return 0;
        }
    }
    return -EINVAL;
}

/* --NAME on|off: off sets the flag. */
static int take_switch(const struct cli *cli, const struct cli_args *args, int key,
                       const char *name, unsigned flag, unsigned *flags)
{
    const char *value = cli_value(args, key);

    if (value && strcmp(value, "off") == 0)
        *flags |= flag;
    else if (value && strcmp(value, "on") != 0)
        return cli_usage(cli, "--%s must be on or off, not '%s'", name, value);
    return 0;
}

int cli_shared_flags(const struct cli *cli, const struct cli_args *args, unsigned *flags)
{
    int r;

    if (cli->role != CLI_DROVER)
        *flags |= DR_OPEN_ANY_PATH;
    r = take_switch(cli, args, KEY_LOCKING, "locking", DR_OPEN_NO_LOCK, flags);
    return r ? r
             : take_switch(cli, args, KEY_FINGERPRINTS, "fingerprints", DR_OPEN_NO_FINGERPRINT,
                           flags);
}

static int get_flags(const struct cli *cli, const struct cli_args *args,
                     const struct cli_image_spec *spec, unsigned *flags)
{
    const char *cache = spec->cache_key ? cli_value(args, spec->cache_key) : NULL;

    *flags |= spec->flags;
    if (cli_has(args, 'U') && !(*flags & DR_OPEN_RDWR))
        *flags |= DR_OPEN_FORCE_SHARE;
    if (cache && cli_cache_flags(cache, flags, NULL) < 0) {
        cli_error(cli, "Invalid %s option: %s", spec->cache_key == 'T' ? "source cache" : "cache",
                  cache);
        return 1;
    }
    return cli_shared_flags(cli, args, flags);
}

static int get_allowed(const struct cli_args *args, struct cli_image *image)
{
    size_t n = 0;

    while (cli_nth_value(args, KEY_ALLOW_PATH, n))
        n++;
    image->allow = calloc(n + 1, sizeof(*image->allow));
    if (!image->allow)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        image->allow[i] = cli_nth_value(args, KEY_ALLOW_PATH, i);
    image->open.allow_paths = image->allow;
    return 0;
}

/* ------------------------------------------------------------------ from the command line */

bool cli_format_exists(const char *name)
{
    struct dr_format_info info;

    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, name) == 0)
            return true;
    }
    return false;
}

const char *cli_parent_format(const char *format)
{
    struct dr_format_info info;

    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, format) == 0)
            return info.parent_format;
    }
    return NULL;
}

bool cli_parent_may_be(const char *format, const char *parent)
{
    struct dr_format_info info;

    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, format) == 0)
            return info.can_back &&
                   (!info.parent_format || strcmp(info.parent_format, parent) == 0);
    }
    return false;
}

bool cli_parent_is_known(const char *format)
{
    struct dr_format_info info;

    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, format) == 0)
            return info.parent_format || info.default_parent;
    }
    return false;
}

/* As QEMU's tools, which know their drivers for files under these names, too. */
static char *plain_or_device(const struct cli *cli, const char *name, struct cli_image *image)
{
    static const char *const devices[] = {"host_device", "host_cdrom"};

    for (size_t i = 0; i < 2 && cli->role != CLI_DROVER; i++) {
        size_t n = strlen(devices[i]);
        if (strncmp(name, devices[i], n) == 0 && name[n] == ':') {
            image->device = devices[i];
            return strdup(name + n + 1);
        }
    }
    return NULL;
}

static int get_name(const struct cli *cli, const struct cli_args *args,
                    const struct cli_image_spec *spec, struct cli_image *image)
{
    bool options = cli_has(args, spec->opts_key ? spec->opts_key : KEY_IMAGE_OPTS) &&
                   !spec->no_image_opts;
    const char *name = spec->name;

    image->given = name;
    if (!spec->pipes && cli_refuse_pipe(cli, name))
        return -EINVAL;
    if (options)
        return cli_image_of_options(cli, args, name, image);
    if (strncmp(name, "json:", 5) == 0 && access(name, F_OK) != 0)
        return cli_image_of_json(cli, args, name, image);
    image->path = plain_or_device(cli, name, image);
    if (image->path)
        return 0;
    if (cli_foreign_protocol(cli, name)) {
        cli_error(cli, "Could not open '%s': Unknown protocol '%.*s'", name,
                  (int)cli_foreign_protocol(cli, name), name);
        return -EINVAL;
    }
    image->path = cli_plain_name(cli, name);
    return image->path ? 0 : -ENOMEM;
}

/* -f file and -f host_device: the file's own bytes. */
static int get_format(const struct cli *cli, const char *format, struct cli_image *image)
{
    bool device = strcmp(format, "host_device") == 0 || strcmp(format, "host_cdrom") == 0;

    if (device)
        image->device = strcmp(format, "host_device") == 0 ? "host_device" : "host_cdrom";
    if (cli->role != CLI_DROVER && (device || strcmp(format, "file") == 0))
        format = "raw";
    image->format = strdup(format);
    return image->format ? 0 : -ENOMEM;
}

/* QEMU's tools read a raw disk while it is in use: it has no metadata that a writer could leave
 * half done. */
static bool is_plain(const struct cli_image *image)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = image->open;
    struct dr_format_info info;

    open.flags |= DR_OPEN_FORCE_SHARE | DR_OPEN_NO_BACKING;
    if (dr_open(image->path, &open, &disk, NULL) < 0)
        return false;
    for (size_t i = 0; dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, dr_image_format(disk, 0)) == 0)
            return info.plain;
    }
    return false;
}

static const char *not_opened(const struct cli *cli)
{
    return cli->role == CLI_QEMU_NBD ? "Failed to blk_new_open" : "Could not open";
}

int cli_image_get(const struct cli *cli, const struct cli_args *args,
                  const struct cli_image_spec *spec, struct cli_image *image)
{
    const char *format = spec->format_key ? cli_value(args, spec->format_key) : NULL;

    *image = (struct cli_image){0};
    if (format && cli_has(args, KEY_IMAGE_OPTS) && !spec->no_image_opts) {
        cli_error(cli, "--image-opts and --format are mutually exclusive");
        return 1;
    }
    if (get_flags(cli, args, spec, &image->open.flags) != 0)
        return 1;
    int r = get_name(cli, args, spec, image);
    if (r < 0 && r != -ENOMEM)
        return 1;
    if (r == 0 && format && !image->format)
        r = get_format(cli, format, image);
    if (r < 0 || get_allowed(args, image) < 0) {
        cli_error(cli, "out of memory");
        return 1;
    }
    image->open.format = image->format;
    if (image->format && !cli_format_exists(image->format)) {
        cli_error(cli, "%s '%s': Unknown driver '%s'", not_opened(cli), image->path, image->format);
        return 1;
    }
    if (cli_image_take_rate(cli, spec, image) < 0)
        return 1;
    if (image->read_only && (spec->flags & DR_OPEN_RDWR)) {
        cli_error(cli, "Could not open '%s': Block node is read-only", image->path);
        return 1;
    }
    if (cli->role == CLI_QEMU_IMG && spec->no_data && !(image->open.flags & DR_OPEN_RDWR) &&
        is_plain(image))
        image->open.flags |= DR_OPEN_FORCE_SHARE;
    return 0;
}

void cli_image_free(struct cli_image *image)
{
    free(image->path);
    free(image->format);
    free(image->backing);
    free(image->backing_format);
    free(image->data_file);
    free(image->allow);
    *image = (struct cli_image){0};
}

/* ------------------------------------------------------------------ opening */

/* A disk inside an archive, whose format was left out: "m.ova#disk1.vmdk". Say how it is named. */
static void hint_at_member(const char *path, char *text, size_t size)
{
    static const char *const kinds[] = {"ova", "ovf", "vma"};
    const char *hash = strchr(path, '#');
    CLEANUP_FREE char *archive = hash ? strndup(path, (size_t)(hash - path)) : NULL;
    const char *dot = archive ? strrchr(archive, '.') : NULL;
    struct stat st;

    for (size_t i = 0; dot && i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        size_t used = strlen(text);
        if (strcasecmp(dot + 1, kinds[i]) == 0 && stat(archive, &st) == 0)
            snprintf(text + used, size - used, "; a disk inside that archive is called %s:%s",
                     kinds[i], path);
    }
}

int cli_image_problem(const struct cli_image *image, char *text, size_t size)
{
    CLEANUP_FREE char *file = dr_name_file(image->path);
    struct stat st;

    if (!file || dr_name_is_remote(file)) /* opening it tells what is wrong */
        return 0;
    if (stat(file, &st) < 0) {
        int r = -errno;
        bool below = strncmp(image->path, "json:", 5) == 0; /* the file that is not there */
        snprintf(text, size, "Could not open '%s': %s", below ? file : image->path, strerror(-r));
        hint_at_member(image->path, text, size);
        return r;
    }
    if (image->device && !S_ISBLK(st.st_mode) && !S_ISCHR(st.st_mode)) {
        snprintf(text, size, "'%s' driver requires '%s' to be either a character or block device",
                 image->device, image->path);
        return -ENOTBLK;
    }
    if (S_ISDIR(st.st_mode)) {
        snprintf(text, size, "'file' driver requires '%s' to be a regular file", image->path);
        return -EISDIR;
    }
    return 0;
}

int cli_image_check(const struct cli *cli, const struct cli_image *image)
{
    char text[4300];
    int r = cli_image_problem(image, text, sizeof(text));

    if (r < 0 && cli->role == CLI_DROVER && strncmp(text, "Could", 5) == 0)
        cli_error(cli, "%s", text);
    else if (r < 0)
        cli_error(cli, "%s '%s': %s", not_opened(cli),
                  cli->role == CLI_DROVER || !image->given ? image->path : image->given, text);
    return r;
}

void cli_open_reason(const struct cli *cli, const char *path, const struct dr_error *err,
                     char *text, size_t size)
{
    const char *child, *why = cli->role == CLI_DROVER ? NULL : cli_backing_reason(err, &child);
    size_t n = strlen(path);

    if (why) { /* the form that QEMU's tools have for it */
        snprintf(text, size, "Could not open backing file: %s", why);
        return;
    }
    why = err->text;
    if (cli->role != CLI_DROVER && strncmp(why, path, n) == 0 && strncmp(why + n, ": ", 2) == 0)
        why += n + 2; /* the caller names it */
    snprintf(text, size, "%s", why);
}

void cli_fail_open(const struct cli *cli, const char *path, const struct dr_error *err)
{
    char text[sizeof(err->text)];

    cli_open_reason(cli, path, err, text, sizeof(text));
    /* The library's text begins with the file's name, so it is not printed again. */
    if ((cli->role == CLI_DROVER && strncmp(text, path, strlen(path)) == 0) ||
        strstr(text, "has no snapshot "))
        cli_fail(cli, err);
    else
        cli_error(cli, "%s '%s': %s", not_opened(cli), path, text);
}

int cli_image_open(const struct cli *cli, const struct cli_image *image, struct dr_disk **disk)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = cli_image_check(cli, image);

    if (r < 0)
        return r;
    r = dr_open(image->path, &image->open, disk, &err);
    if (r < 0)
        cli_fail_open(cli, image->path, &err);
    return r;
}

void cli_cleanup_disk(struct dr_disk **disk)
{
    dr_close(*disk, NULL);
}
