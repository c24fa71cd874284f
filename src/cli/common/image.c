/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <jansson.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "cli/common/image.h"
#include "cli/common/pipes.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"

/* ------------------------------------------------------------------ descriptions of images */

/* {"file": {"filename": "x"}} → file.filename=x */
static int flatten(struct cli_pairs *list, const char *prefix, json_t *object)
{
    const char *key;
    json_t *value;
    int r = 0;

    json_object_foreach(object, key, value)
    {
        char name[256], number[32];
        snprintf(name, sizeof(name), "%s%s%s", prefix, prefix[0] ? "." : "", key);
        if (json_is_object(value))
            r = flatten(list, name, value);
        else if (json_is_string(value))
            r = cli_pairs_set(list, name, json_string_value(value));
        else if (json_is_null(value) && strcmp(name, "backing") == 0)
            r = cli_pairs_set(list, name, ""); /* no parent */
        else if (json_is_boolean(value))
            r = cli_pairs_set(list, name, json_is_true(value) ? "on" : "off");
        else if (json_is_integer(value)) {
            snprintf(number, sizeof(number), "%" JSON_INTEGER_FORMAT, json_integer_value(value));
            r = cli_pairs_set(list, name, number);
        } else
            r = -EINVAL;
        if (r < 0)
            break;
    }
    return r;
}

static int parse_json_name(const struct cli *cli, const char *text, struct cli_pairs *list)
{
    json_error_t where;
    CLEANUP_FREE char *standard = cli_json_standard(text);
    json_t *root = standard ? json_loads(standard, JSON_REJECT_DUPLICATES, &where) : NULL;

    if (!root || !json_is_object(root)) {
        cli_error(cli, "Could not open 'json:%s': Could not parse the JSON options: %s", text,
                  root       ? "an object is needed"
                  : standard ? where.text
                             : "out of memory");
        json_decref(root);
        return -EINVAL;
    }
    int r = flatten(list, "", root);
    json_decref(root);
    if (r < 0)
        cli_error(cli, "Could not open 'json:%s': lists and nulls are not supported", text);
    return r;
}

static bool is_off(const char *value)
{
    return strcmp(value, "off") == 0 || strcmp(value, "false") == 0 || strcmp(value, "no") == 0 ||
           strcmp(value, "n") == 0;
}

static const char *device_driver(const char *name)
{
    static const char *const names[] = {"host_device", "host_cdrom"};

    for (size_t i = 0; i < 2; i++) {
        if (strcmp(name, names[i]) == 0)
            return names[i];
    }
    return NULL;
}

static bool is_among(const char *value, const char *const *values)
{
    while (*values && strcmp(*values, value) != 0)
        values++;
    return *values;
}

/* Settings of the image, or of the file below the format; the drivers that mean "a file here".
 * Most do nothing here, but a value that means nothing is a mistake. */
static bool known_setting(const char *name, const char *value)
{
    static const char *const aio[] = {"threads", "native", "io_uring", NULL};
    static const char *const discard[] = {"ignore", "off", "unmap", "on", NULL};
    static const char *const zeroes[] = {"off", "on", "unmap", NULL};
    static const char *const locking[] = {"on", "off", "auto", NULL};
    static const char *const either[] = {"on", "off", "yes", "no", "true", "false", "y", "n", NULL};
    static const struct {
        const char *name;
        const char *const *values; /* NULL = any */
    } settings[] = {{"aio", aio},
                    {"discard", discard},
                    {"detect-zeroes", zeroes},
                    {"locking", locking},
                    {"node-name", NULL},
                    {"read-only", either},
                    {"force-share", either},
                    {"auto-read-only", either},
                    {"cache.direct", either},
                    {"cache.no-flush", either}};

    while (strncmp(name, "file.", 5) == 0)
        name += 5;
    if (strcmp(name, "driver") == 0)
        return strcmp(value, "file") == 0 || device_driver(value);
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        if (strcmp(name, settings[i].name) == 0)
            return !settings[i].values || is_among(value, settings[i].values);
    }
    return false;
}

/* Is it said of the image, or of its file? */
static const char *setting(const struct cli_pairs *list, const char *of_file)
{
    const char *value = cli_pairs_find(list, of_file + strlen("file."));

    return value ? value : cli_pairs_find(list, of_file);
}

static void apply_switches(const struct cli_pairs *list, struct cli_image *image)
{
    const char *locking = setting(list, "file.locking");
    const char *share = setting(list, "file.force-share");
    const char *top = cli_pairs_find(list, "read-only");
    const char *file = cli_pairs_find(list, "file.read-only");

    if (locking && is_off(locking))
        image->open.flags |= DR_OPEN_NO_LOCK;
    if (share && !is_off(share))
        image->open.flags |= DR_OPEN_FORCE_SHARE;
    image->read_only = (top && !is_off(top)) || (file && !is_off(file));
}

/* ------------------------------------------------------------------ disks on servers */

static bool is_remote_driver(const char *driver)
{
    return driver && (strcmp(driver, "nbd") == 0 || strcmp(driver, "http") == 0 ||
                      strcmp(driver, "https") == 0);
}

/* Settings that QEMU has for each image; all others are the server's. */
static bool is_image_setting(const char *key)
{
    return known_setting(key, "on") && strcmp(key, "driver") != 0;
}

/* The options of a driver for a server become an object that the library understands: those that
 * begin with prefix ("file.", or nothing where the driver is the image's own). */
static json_t *take_remote(struct cli_pairs *list, const char *prefix, const char *driver)
{
    json_t *object = json_pack("{s:s}", "driver", driver);
    size_t kept = 0, n = strlen(prefix);

    for (size_t i = 0; object && i < list->n; i++) {
        struct dr_pair *pair = &list->pairs[i];
        if (strncmp(pair->name, prefix, n) != 0 || is_image_setting(pair->name)) {
            list->pairs[kept++] = *pair;
            continue;
        }
        json_object_set_new(object, pair->name + n, json_string(pair->value));
        free((char *)pair->name);
        free((char *)pair->value);
    }
    list->n = object ? kept : list->n;
    return object;
}

/* ------------------------------------------------------------------ drivers on drivers */

#define LEVELS_MAX 8

static char *take_at(struct cli_pairs *list, const char *prefix, const char *key)
{
    char name[128];

    snprintf(name, sizeof(name), "%s%s", prefix, key);
    return cli_pairs_take(list, name);
}

/* offset and size of a driver raw, as numbers where they are nothing but digits. */
static bool take_range(struct cli_pairs *list, const char *prefix, json_t *object)
{
    static const char *const keys[] = {"offset", "size"};
    bool any = false;

    for (size_t i = 0; i < 2; i++) {
        CLEANUP_FREE char *text = take_at(list, prefix, keys[i]);
        if (!text)
            continue;
        bool digits = *text && strspn(text, "0123456789") == strlen(text) && strlen(text) < 19;
        json_object_set_new(object, keys[i],
                            digits ? json_integer(atoll(text)) : json_string(text));
        any = true;
    }
    return any;
}

/* What the options with this prefix say of the bytes below a format: an object with QEMU's keys.
 * NULL: they name no file. *device: the driver that takes devices only, where it is one. */
static json_t *take_below(struct cli_pairs *list, const char *prefix, const char **device)
{
    CLEANUP_FREE char *driver = take_at(list, prefix, "driver");
    char deeper[64];

    if (is_remote_driver(driver))
        return take_remote(list, prefix, driver);
    if (driver && strcmp(driver, "raw") == 0 && strlen(prefix) < 5 * LEVELS_MAX) {
        snprintf(deeper, sizeof(deeper), "%sfile.", prefix);
        json_t *raw = json_pack("{s:s}", "driver", "raw");
        bool range = take_range(list, prefix, raw);
        json_t *below = take_below(list, deeper, device);
        if (range && below && json_object_set_new(raw, "file", below) == 0)
            return raw;
        json_decref(raw);
        return range ? NULL : below;
    }
    CLEANUP_FREE char *filename = take_at(list, prefix, "filename");
    if (driver && device_driver(driver))
        *device = device_driver(driver);
    else if (driver && strcmp(driver, "file") != 0) /* left for the message about it */
        cli_pairs_set(list, prefix[0] ? "file.driver" : "driver", driver);
    return filename ? json_pack("{s:s,s:s}", "driver", "file", "filename", filename) : NULL;
}

/* As a name that the library understands; takes over the reference. */
static char *name_of(json_t *object)
{
    const char *driver = json_string_value(json_object_get(object, "driver"));
    const char *filename = json_string_value(json_object_get(object, "filename"));
    char *name = NULL;

    if (driver && strcmp(driver, "file") == 0 && filename) {
        name = strdup(filename);
    } else {
        char *text = json_dumps(object, 0);
        if (text && asprintf(&name, "json:%s", text) < 0)
            name = NULL;
        free(text);
    }
    json_decref(object);
    return name;
}

/* A part of a file, with the format of the image inside around it. */
static json_t *with_format(json_t *below, const char *driver)
{
    const char *inner = json_string_value(json_object_get(below, "driver"));

    if (!below || !inner || strcmp(inner, "raw") != 0)
        return below;
    json_t *around = json_object();
    if (driver)
        json_object_set_new(around, "driver", json_string(driver));
    json_object_set_new(around, "file", below);
    return around;
}

/* The name of the image that the options lead to; NULL: they name none. *bytes: the outermost
 * driver is for bytes, not for a format. */
static char *take_name(struct cli_pairs *list, const char *driver, const char **device, bool *bytes)
{
    *bytes = driver &&
             (strcmp(driver, "file") == 0 || device_driver(driver) || is_remote_driver(driver));
    if (is_remote_driver(driver))
        return name_of(take_remote(list, "", driver));
    if (*bytes && device_driver(driver))
        *device = device_driver(driver);
    json_t *range = json_pack("{s:s}", "driver", "raw");
    bool is_range = driver && strcmp(driver, "raw") == 0 && take_range(list, "", range);
    json_t *below = take_below(list, "file.", device);
    CLEANUP_FREE char *path = below ? NULL : cli_pairs_take(list, "filename");
    path = below || path ? path : cli_pairs_take(list, "file");
    if (path)
        below = json_pack("{s:s,s:s}", "driver", "file", "filename", path);
    if (below && is_range)
        json_object_set_new(range, "file", below);
    else
        json_decref(range);
    return below ? name_of(is_range ? range : with_format(below, driver)) : NULL;
}

/* ------------------------------------------------------------------ all options */

/* Settings that nothing here has any use for. */
static int refuse_rest(const struct cli *cli, const struct cli_pairs *list, const char *name,
                       const char *driver)
{
    const struct dr_pair *pair = NULL;

    for (size_t i = 0; i < list->n; i++) {
        const struct dr_pair *at = &list->pairs[i];
        size_t length = strlen(at->name);
        bool driver_itself = length >= 6 && strcmp(at->name + length - 6, "driver") == 0;
        if (!known_setting(at->name, at->value) && (!pair || driver_itself))
            pair = at; /* what a driver would have known is strange without it */
    }
    if (!pair)
        return 0;
    bool of_format = driver && cli_format_exists(driver) && !strchr(pair->name, '.');
    bool is_raw = driver && strcmp(driver, "raw") == 0;
    if (of_format && !is_raw &&
        (strcmp(pair->name, "offset") == 0 || strcmp(pair->name, "size") == 0))
        cli_error(cli,
                  "Could not open '%s': Block format '%s' does not support the option '%s': it is "
                  "the driver raw's, below the format (file.driver=raw,file.%s=...)",
                  name, driver, pair->name, pair->name);
    else
        cli_error(cli, "Could not open '%s': '%s=%s' is not supported", name, pair->name,
                  pair->value);
    return -EINVAL;
}

static int apply_pairs(const struct cli *cli, struct cli_pairs *list, const char *name,
                       struct cli_image *image)
{
    CLEANUP_FREE char *driver = cli_pairs_take(list, "driver");
    bool bytes;
    char *path = image->path = take_name(list, driver, &image->device, &bytes);
    CLEANUP_FREE char *backing = cli_pairs_take(list, "backing");
    if (backing && backing[0]) {
        cli_error(cli, "Could not open '%s': 'backing' is not supported here", path ? path : name);
        return -EINVAL;
    }
    if (backing)
        image->open.flags |= DR_OPEN_NO_BACKING;
    /* Check for unknown settings before a missing path: one of them may have been meant as the
     * path. */
    if (refuse_rest(cli, list, path ? path : name, driver) < 0)
        return -EINVAL;
    apply_switches(list, image);
    if (!path) {
        cli_error(cli, "A block device must be specified for \"file\"");
        return -EINVAL;
    }
    image->format = bytes ? strdup("raw") : DR_STEAL(driver);
    return bytes && !image->format ? -ENOMEM : 0;
}

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

    if (cli_objects_check(cli, args) < 0)
        return 1;
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

static int get_name(const struct cli *cli, const struct cli_args *args,
                    const struct cli_image_spec *spec, struct cli_image *image)
{
    CLEANUP_PAIRS struct cli_pairs list = {0};
    bool options = cli_has(args, spec->opts_key ? spec->opts_key : KEY_IMAGE_OPTS) &&
                   !spec->no_image_opts;
    const char *name = spec->name;

    if (!spec->pipes && cli_refuse_pipe(cli, name))
        return -EINVAL;
    if (options && cli_pairs_add(&list, name) == 0)
        return cli_objects_resolve(cli, args, &list) < 0 ? -EINVAL
                                                         : apply_pairs(cli, &list, name, image);
    if (strncmp(name, "json:", 5) == 0 && access(name, F_OK) != 0) {
        if (parse_json_name(cli, name + 5, &list) < 0 || cli_objects_resolve(cli, args, &list) < 0)
            return -EINVAL;
        return apply_pairs(cli, &list, name, image);
    }
    if (cli_foreign_protocol(cli, name)) {
        cli_error(cli, "Could not open '%s': Unknown protocol '%.*s'", name,
                  (int)cli_foreign_protocol(cli, name), name);
        return -EINVAL;
    }
    image->path = cli_plain_name(cli, name);
    return image->path ? 0 : -ENOMEM;
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
    if (r == 0 && format && !image->format && !(image->format = strdup(format)))
        r = -ENOMEM;
    if (r < 0 || get_allowed(args, image) < 0) {
        cli_error(cli, "out of memory");
        return 1;
    }
    image->open.format = image->format;
    if (image->format && !cli_format_exists(image->format)) {
        cli_error(cli, "Could not open '%s': Unknown driver '%s'", image->path, image->format);
        return 1;
    }
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
        cli_error(cli, "Could not open '%s': %s", image->path, text);
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
    if (cli->role == CLI_DROVER && strncmp(text, path, strlen(path)) == 0)
        cli_fail(cli, err);
    else
        cli_error(cli, "Could not open '%s': %s", path, text);
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
