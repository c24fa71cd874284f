/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images that are described by options, --image-opts or a json: name, instead of a path: which file
 * they lead to, through which drivers, and how it is to be opened. */
#include <jansson.h>
#include <string.h>

#include "cli/common/filters.h"
#include "cli/common/image.h"
#include "cli/common/json.h"

/* ------------------------------------------------------------------ json: names */

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
        else if (json_is_null(value) &&
                 (strcmp(name, "backing") == 0 || strcmp(name, "backing.backing") == 0))
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

/* ------------------------------------------------------------------ settings */

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

/* Behind the prefixes that say which layer is meant. */
static const char *of_layer(const char *name)
{
    static const char *const layers[] = {"file.", "backing.", "data-file."};

    for (size_t i = 0; i < 3; i++) {
        if (strncmp(name, layers[i], strlen(layers[i])) == 0)
            return of_layer(name + strlen(layers[i]));
    }
    return name;
}

static bool is_number(const char *value)
{
    return value[0] >= '0' && value[0] <= '9';
}

/* Settings of the image, or of a file below the format; the drivers that mean "a file here". Most
 * do nothing here, such as the sizes of QEMU's caches, but a value that means nothing is a mistake.
 */
static bool known_setting(const char *name, const char *value)
{
    static const char *const aio[] = {"threads", "native", "io_uring", NULL};
    static const char *const discard[] = {"ignore", "off", "unmap", "on", NULL};
    static const char *const zeroes[] = {"off", "on", "unmap", NULL};
    static const char *const locking[] = {"on", "off", "auto", NULL};
    static const char *const overlap[] = {"none", "constant", "cached", "all", NULL};
    static const char *const either[] = {"on", "off", "yes", "no", "true", "false", "y", "n", NULL};
    static const char *const number[] = {NULL};
    static const struct {
        const char *name;
        const char *const *values; /* NULL = any */
    } settings[] = {{"aio", aio},
                    {"aio-max-batch", number},
                    {"discard", discard},
                    {"detect-zeroes", zeroes},
                    {"drop-cache", either},
                    {"locking", locking},
                    {"node-name", NULL},
                    {"read-only", either},
                    {"force-share", either},
                    {"auto-read-only", either},
                    {"cache.direct", either},
                    {"cache.no-flush", either},
                    {"cache-clean-interval", number},
                    {"cache-size", number},
                    {"l2-cache-size", number},
                    {"l2-cache-entry-size", number},
                    {"refcount-cache-size", number},
                    {"lazy-refcounts", either},
                    {"overlap-check", overlap},
                    {"pass-discard-request", either},
                    {"pass-discard-snapshot", either},
                    {"pass-discard-other", either},
                    {"discard-no-unref", either}};

    name = of_layer(name);
    if (strcmp(name, "driver") == 0)
        return strcmp(value, "file") == 0 || device_driver(value);
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        if (strcmp(name, settings[i].name) == 0)
            return settings[i].values == number
                       ? is_number(value)
                       : !settings[i].values || is_among(value, settings[i].values);
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
    static const char *const drivers[] = {"nbd", "http", "https", "null-co", "null-aio", NULL};

    return driver && is_among(driver, drivers);
}

/* Settings that QEMU has for each image; all others are the server's. */
static bool is_image_setting(const char *key)
{
    return known_setting(key, "on") && strcmp(key, "driver") != 0;
}

/* What is being read, for all of the functions below. */
struct description {
    const struct cli *cli;
    struct cli_pairs *list;
    const char *name;   /* as given */
    const char *device; /* the driver that takes devices only, where there is one */
};

/* The options of a driver for a server become an object that the library understands: those that
 * begin with prefix ("file.", or nothing where the driver is the image's own). What cannot stand in
 * one, since it is not UTF-8, is left for the message about it. */
static json_t *take_remote(struct description *d, const char *prefix, const char *driver)
{
    json_t *object = json_pack("{s:s}", "driver", driver);
    struct cli_pairs *list = d->list;
    size_t kept = 0, n = strlen(prefix);

    for (size_t i = 0; object && i < list->n; i++) {
        struct dr_pair *pair = &list->pairs[i];
        bool taken = strncmp(pair->name, prefix, n) == 0 && !is_image_setting(pair->name);
        if (!taken || json_object_set_new(object, pair->name + n, json_string(pair->value)) < 0) {
            list->pairs[kept++] = *pair;
            continue;
        }
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

/* Any bytes may be in a path. One that is not UTF-8 gets lost only where the object becomes text.
 */
static json_t *file_at(const char *path)
{
    json_t *object = json_pack("{s:s}", "driver", "file");

    json_object_set_new(object, "filename", json_string_nocheck(path));
    return object;
}

/* What the options with this prefix say of the bytes below a format: an object with QEMU's keys.
 * NULL: they name no file. */
static json_t *take_below(struct description *d, const char *prefix)
{
    CLEANUP_FREE char *driver = take_at(d->list, prefix, "driver");
    char deeper[96];

    if (is_remote_driver(driver))
        return take_remote(d, prefix, driver);
    if (driver && strcmp(driver, "raw") == 0 && strlen(prefix) < 5 * LEVELS_MAX) {
        snprintf(deeper, sizeof(deeper), "%sfile.", prefix);
        json_t *raw = json_pack("{s:s}", "driver", "raw");
        bool range = take_range(d->list, prefix, raw);
        json_t *below = take_below(d, deeper);
        if (range && below && json_object_set_new(raw, "file", below) == 0)
            return raw;
        json_decref(raw);
        return range ? NULL : below;
    }
    CLEANUP_FREE char *filename = take_at(d->list, prefix, "filename");
    if (driver && device_driver(driver)) {
        d->device = device_driver(driver);
    } else if (driver && strcmp(driver, "file") != 0) { /* left for the message about it */
        snprintf(deeper, sizeof(deeper), "%sdriver", prefix);
        cli_pairs_set(d->list, deeper, driver);
    }
    return filename ? file_at(filename) : NULL;
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

/* The secret with the image's password, for a luks image or inside of a qcow2; NULL: not said. */
static char *take_key(struct description *d, const char *prefix)
{
    CLEANUP_FREE char *format = take_at(d->list, prefix, "encrypt.format");
    char *key = take_at(d->list, prefix, "encrypt.key-secret");
    char name[96];

    if (format && strcmp(format, "luks") != 0) { /* left for the message about it */
        snprintf(name, sizeof(name), "%sencrypt.format", prefix);
        cli_pairs_set(d->list, name, format);
    }
    return key ? key : take_at(d->list, prefix, "key-secret");
}

/* The image, with its format and its key around what is below. */
static json_t *with_key(json_t *below, const char *driver, const char *key)
{
    json_t *around = json_pack("{s:s}", "driver", driver);
    bool inside = strcmp(driver, "qcow2") == 0;

    json_object_set_new(around, inside ? "encrypt.key-secret" : "key-secret", json_string(key));
    json_object_set_new(around, "file", below);
    return around;
}

/* The name of the image that the options with this prefix ("", or of another layer) lead to; NULL:
 * they name none. *bytes: the outermost driver is for bytes, not for a format. */
static char *take_name(struct description *d, const char *prefix, const char *driver, bool *bytes)
{
    char file[64];

    snprintf(file, sizeof(file), "%sfile.", prefix);
    *bytes = driver &&
             (strcmp(driver, "file") == 0 || device_driver(driver) || is_remote_driver(driver));
    if (is_remote_driver(driver))
        return name_of(take_remote(d, prefix, driver));
    if (*bytes && device_driver(driver))
        d->device = device_driver(driver);
    json_t *range = json_pack("{s:s}", "driver", "raw");
    bool is_range = driver && strcmp(driver, "raw") == 0 && take_range(d->list, prefix, range);
    json_t *below = take_below(d, file);
    CLEANUP_FREE char *path = below ? NULL : take_at(d->list, prefix, "filename");
    path = below || path ? path : take_at(d->list, prefix, "file");
    if (path)
        below = file_at(path);
    CLEANUP_FREE char *key = below && driver && !is_range ? take_key(d, prefix) : NULL;
    if (below && is_range)
        json_object_set_new(range, "file", below);
    else
        json_decref(range);
    if (key)
        return name_of(with_key(below, driver, key));
    return below ? name_of(is_range ? range : with_format(below, driver)) : NULL;
}

static int refuse_driver(const struct description *d, const char *key, const char *driver)
{
    cli_error(d->cli, "Could not open '%s': '%s=%s' is not supported: that driver %s", d->name, key,
              driver, cli_driver_is_for(driver));
    return -EINVAL;
}

/* Another image in the place of the recorded parent, with a format of its own. */
static int take_backing(struct description *d, struct cli_image *image)
{
    CLEANUP_FREE char *none = cli_pairs_take(d->list, "backing");
    CLEANUP_FREE char *driver = cli_pairs_take(d->list, "backing.driver");
    CLEANUP_FREE char *deeper = cli_pairs_take(d->list, "backing.backing");
    bool bytes;

    if (none && !none[0])
        image->open.flags |= DR_OPEN_NO_BACKING;
    if ((none && none[0]) || deeper) {
        cli_error(d->cli, "Could not open '%s': '%s' is not supported here", d->name,
                  deeper ? "backing.backing" : "backing");
        return -EINVAL;
    }
    if (driver && cli_driver_is_for(driver))
        return refuse_driver(d, "backing.driver", driver);
    image->backing = take_name(d, "backing.", driver, &bytes);
    if (!image->backing && driver)
        cli_pairs_set(d->list, "backing.driver", driver); /* left for the message about it */
    image->backing_format = image->backing && driver ? strdup(bytes ? "raw" : driver) : NULL;
    image->open.backing = image->backing;
    image->open.backing_format = image->backing_format;
    return 0;
}

static void take_data_file(struct description *d, struct cli_image *image)
{
    CLEANUP_FREE char *driver = cli_pairs_take(d->list, "data-file.driver");
    bool bytes;

    image->data_file = take_name(d, "data-file.", driver, &bytes);
    image->open.data_file = image->data_file;
}

/* ------------------------------------------------------------------ all options */

/* It may have come from an --object, and messages go into logs. */
static const char *printable(const struct dr_pair *pair)
{
    return dr_is_secret(pair->name) ? "***" : pair->value;
}

/* Settings that nothing here has any use for. */
static int refuse_rest(const struct description *d, const char *driver)
{
    const struct dr_pair *pair = NULL;

    for (size_t i = 0; i < d->list->n; i++) {
        const struct dr_pair *at = &d->list->pairs[i];
        size_t length = strlen(at->name);
        bool driver_itself = length >= 6 && strcmp(at->name + length - 6, "driver") == 0;
        if (!known_setting(at->name, at->value) && (!pair || driver_itself))
            pair = at; /* what a driver would have known is strange without it */
    }
    if (!pair)
        return 0;
    const char *dot = strrchr(pair->name, '.');
    if (strcmp(dot ? dot + 1 : pair->name, "driver") == 0 && cli_driver_is_for(pair->value))
        return refuse_driver(d, pair->name, pair->value);
    bool of_range = strcmp(pair->name, "offset") == 0 || strcmp(pair->name, "size") == 0;
    if (driver && cli_format_exists(driver) && !strchr(pair->name, '.'))
        cli_error(d->cli,
                  "Could not open '%s': Block format '%s' does not support the option '%s'%s",
                  d->name, driver, pair->name,
                  of_range ? ": it is the driver raw's, below the format (file.driver=raw)" : "");
    else
        cli_error(d->cli, "Could not open '%s': '%s=%s' is not supported", d->name, pair->name,
                  printable(pair));
    return -EINVAL;
}

static int apply(struct description *d, struct cli_image *image)
{
    CLEANUP_FREE char *driver = cli_pairs_take(d->list, "driver");
    bool bytes;

    image->path = take_name(d, "", driver, &bytes);
    image->device = d->device;
    take_data_file(d, image);
    if (take_backing(d, image) < 0)
        return -EINVAL;
    if (driver && cli_driver_is_for(driver))
        return refuse_driver(d, "driver", driver);
    if (driver && !bytes && !cli_format_exists(driver)) {
        cli_error(d->cli, "Could not open '%s': Unknown driver '%s'", d->name, driver);
        return -EINVAL;
    }
    /* Check for unknown settings before a missing path: one of them may have been meant as the
     * path. */
    if (refuse_rest(d, driver) < 0)
        return -EINVAL;
    apply_switches(d->list, image);
    if (!image->path) {
        cli_error(d->cli, "A block device must be specified for \"file\"");
        return -EINVAL;
    }
    image->format = bytes ? strdup("raw") : DR_STEAL(driver);
    return bytes && !image->format ? -ENOMEM : 0;
}

int cli_image_of_options(const struct cli *cli, const struct cli_args *args, const char *text,
                         struct cli_image *image)
{
    CLEANUP_PAIRS struct cli_pairs list = {0};
    CLEANUP_FREE char *shown = strdup(text);
    struct description d = {.cli = cli, .list = &list, .name = shown};
    size_t first = strcspn(text, "=,");

    if (!shown)
        return -ENOMEM;
    dr_hide_option_secrets(shown);
    if (text[first] != '=') { /* QEMU takes it for the name of a node */
        cli_error(cli, "Could not open '%s': Cannot find device='%.*s' nor node-name='%.*s'", shown,
                  (int)first, text, (int)first, text);
        return -EINVAL;
    }
    int r = cli_pairs_add(&list, text);
    if (r == 0)
        r = cli_objects_resolve(cli, args, &list);
    if (r == 0)
        r = cli_filters_take(cli, args, &list, image);
    return r < 0 ? r : apply(&d, image);
}

int cli_image_of_json(const struct cli *cli, const struct cli_args *args, const char *name,
                      struct cli_image *image)
{
    CLEANUP_PAIRS struct cli_pairs list = {0};
    struct description d = {.cli = cli, .list = &list, .name = name};

    int r = parse_json_name(cli, name + 5, &list);
    if (r == 0)
        r = cli_objects_resolve(cli, args, &list);
    if (r == 0)
        r = cli_filters_take(cli, args, &list, image);
    return r < 0 ? -EINVAL : apply(&d, image);
}
