/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a json: name says of a part of a file. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "storage/part.h"
#include "storage/remote.h"

#define LEVELS_MAX     8
#define NAME_MAX_BYTES 16384u

static void free_json(json_t **value)
{
    json_decref(*value);
}
#define CLEANUP_JSON __attribute__((cleanup(free_json)))

/* ------------------------------------------------------------------ levels of an object */

/* {"file.driver": "raw"} and {"file": {"driver": "raw"}} are the same. */
static json_t *nested(json_t *object, int depth)
{
    json_t *out = json_object(), *value;
    const char *key;
    json_object_foreach(object, key, value)
    {
        const char *dot = strchr(key, '.');
        json_t *copy = json_is_object(value) && depth < LEVELS_MAX ? nested(value, depth + 1)
                                                                   : json_incref(value);
        if (!dot) {
            json_t *old = json_object_get(out, key);
            if (json_is_object(old) && json_is_object(copy))
                json_object_update(old, copy);
            else
                json_object_set(out, key, copy);
            json_decref(copy);
            continue;
        }
        CLEANUP_FREE char *first = strndup(key, (size_t)(dot - key));
        CLEANUP_JSON json_t *one = json_pack("{s:o}", dot + 1, copy);
        CLEANUP_JSON json_t *inner = one && depth < LEVELS_MAX ? nested(one, depth + 1) : NULL;
        json_t *old = first ? json_object_get(out, first) : NULL;
        if (json_is_object(old) && inner)
            json_object_update_recursive(old, inner);
        else if (first && inner)
            json_object_set(out, first, inner);
    }
    return out;
}

/* NULL: no object at all. */
static json_t *parse(const char *name)
{
    if (strncmp(name, "json:", 5) != 0 || strlen(name) > NAME_MAX_BYTES)
        return NULL;
    CLEANUP_JSON json_t *root = json_loads(name + 5, JSON_REJECT_DUPLICATES, NULL);
    return json_is_object(root) ? nested(root, 0) : NULL;
}

static const char *driver_of(const json_t *level)
{
    return json_string_value(json_object_get(level, "driver"));
}

static bool is_among(const char *word, const char *const *words)
{
    while (*words && strcmp(*words, word) != 0)
        words++;
    return *words;
}

static bool is_file(const json_t *level)
{
    static const char *const drivers[] = {"file", "host_device", "host_cdrom", NULL};
    const char *driver = driver_of(level);
    return driver ? is_among(driver, drivers) : json_is_string(json_object_get(level, "filename"));
}

static bool is_server(const json_t *level)
{
    static const char *const drivers[] = {"nbd", "http", "https", "null-co", "null-aio", NULL};
    const char *driver = driver_of(level);
    return driver && is_among(driver, drivers);
}

static bool is_raw(const json_t *level)
{
    static const char *const drivers[] = {"raw", NULL}; /* QEMU's layer of ranges, not a format */
    const char *driver = driver_of(level);
    return driver && is_among(driver, drivers);
}

static bool is_range(const json_t *level)
{
    return is_raw(level) && (json_object_get(level, "offset") || json_object_get(level, "size"));
}

/* Where a luks image has its key, and where a qcow2 image has it. */
static const json_t *key_secret_of(const json_t *level)
{
    const json_t *own = json_object_get(level, "key-secret");
    return own ? own : json_object_get(json_object_get(level, "encrypt"), "key-secret");
}

bool dr_part_is(const char *name)
{
    CLEANUP_JSON json_t *root = parse(name);
    bool range = key_secret_of(root); /* what has a key is not just the file's name either */
    const json_t *level = root;
    for (int i = 0; i < LEVELS_MAX && json_is_object(level); i++) {
        if (is_file(level) || is_server(level))
            return range || is_file(level);
        range = range || is_range(level);
        level = json_object_get(level, "file");
    }
    return false;
}

/* ------------------------------------------------------------------ one level */

static int out_of_memory(const char *name, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", name);
}

/* Keys that mean nothing for the bytes. One that means something and is not obeyed would be worse
 * than a refusal. */
static int check_keys(const char *name, json_t *level, const char *const *known,
                      struct dr_error *err)
{
    static const char *const general[] = {"driver",         "node-name",     "read-only",
                                          "auto-read-only", "force-share",   "discard",
                                          "cache",          "detect-zeroes", NULL};
    const char *key;
    json_t *value;
    json_object_foreach(level, key, value)
    {
        if (!is_among(key, general) && !is_among(key, known))
            return dr_fail(err, EINVAL, "%s: the key '%s' is not known here", name, key);
    }
    return 0;
}

int dr_part_size_of_text(const char *text, uint64_t *size)
{
    static const char suffixes[] = "bkmgtpe";
    char *end;
    if (*text < '0' || *text > '9')
        return -EINVAL;
    bool hex = text[0] == '0' && (text[1] | 0x20) == 'x';
    errno = 0;
    *size = strtoull(text, &end, hex ? 16 : 10); /* a 0 in front makes no number octal */
    int shift = 0;
    if (*end) {
        const char *at = strchr(suffixes, *end | 0x20);
        if (!at || !*at || end[1])
            return -EINVAL;
        shift = (int)(at - suffixes) * 10;
    }
    if (errno || *size > (UINT64_MAX >> shift))
        return -ERANGE;
    *size <<= shift;
    return 0;
}

static int size_at(const char *name, const json_t *level, const char *key, uint64_t *size,
                   struct dr_error *err)
{
    const json_t *value = json_object_get(level, key);
    const char *text = json_string_value(value);
    json_int_t number = json_integer_value(value);
    if (json_is_integer(value) && number >= 0) {
        *size = (uint64_t)number;
        return 0;
    }
    if (text && dr_part_size_of_text(text, size) == 0)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: Parameter '%s' expects a non-negative number below 2^64, with an optional "
                   "suffix k, M, G, T, P or E",
                   name, key);
}

static bool is_on(const json_t *value)
{
    const char *text = json_string_value(value);
    return json_is_true(value) || (text && (strcmp(text, "on") == 0 || strcmp(text, "true") == 0 ||
                                            strcmp(text, "yes") == 0 || strcmp(text, "y") == 0));
}

static int read_file(const char *name, json_t *level, char **below, struct dr_error *err)
{
    static const char *const known[] = {"filename",   "aio",           "locking",
                                        "drop-cache", "aio-max-batch", NULL};
    const char *filename = json_string_value(json_object_get(level, "filename"));
    int r = check_keys(name, level, known, err);
    if (r < 0)
        return r;
    if (!filename || !*filename)
        return dr_fail(err, EINVAL, "%s: a file needs filename", name);
    *below = strdup(filename);
    return *below ? 0 : out_of_memory(name, err);
}

static int json_name(const char *name, const json_t *level, char **out, struct dr_error *err)
{
    char *text = json_dumps(level, 0);
    int n = text ? asprintf(out, "json:%s", text) : -1;
    free(text);
    if (n < 0)
        *out = NULL;
    return n < 0 ? out_of_memory(name, err) : 0;
}

/* What level says of the bytes below a format or a part. */
static int read_below(const char *name, json_t *level, char **below, struct dr_error *err)
{
    if (!json_is_object(level))
        return dr_fail(err, EINVAL, "%s: 'file' must say what is below, as an object", name);
    if (is_file(level))
        return read_file(name, level, below, err);
    if (!is_server(level) && !is_raw(level))
        return dr_fail(err, ENOTSUP, "%s: the driver '%s' is not supported below another one", name,
                       driver_of(level) ? driver_of(level) : "");
    return json_name(name, level, below, err);
}

static int read_raw(const char *name, json_t *level, struct dr_part *part, struct dr_error *err)
{
    static const char *const known[] = {"offset", "size", "file", NULL};
    int r = check_keys(name, level, known, err);
    part->has_size = json_object_get(level, "size");
    part->is_range = is_range(level);
    if (r == 0 && json_object_get(level, "offset"))
        r = size_at(name, level, "offset", &part->offset, err);
    if (r == 0 && part->has_size)
        r = size_at(name, level, "size", &part->size, err);
    return r < 0 ? r : read_below(name, json_object_get(level, "file"), &part->below, err);
}

/* The key of a format's level. */
static int read_key(const char *name, json_t *level, struct dr_part *part, struct dr_error *err)
{
    static const char *const known[] = {"format", "key-secret", NULL};
    const char *format =
        json_string_value(json_object_get(json_object_get(level, "encrypt"), "format"));
    const json_t *secret = key_secret_of(level);
    int r = check_keys(name, json_object_get(level, "encrypt"), known, err);
    if (r < 0)
        return r;
    if (format && strcmp(format, "luks") != 0)
        return dr_fail(err, ENOTSUP, "%s: encrypt.format '%s' is not supported", name, format);
    if (secret && !json_is_string(secret))
        return dr_fail(err, EINVAL, "%s: key-secret must be the id of a secret", name);
    part->key_secret = secret ? strdup(json_string_value(secret)) : NULL;
    return secret && !part->key_secret ? out_of_memory(name, err) : 0;
}

static int read_format(const char *name, json_t *level, struct dr_part *part, struct dr_error *err)
{
    static const char *const known[] = {"file", "key-secret", "encrypt", NULL};
    int r = check_keys(name, level, known, err);
    if (r == 0)
        r = read_key(name, level, part, err);
    json_t *file = json_object_get(level, "file");
    if (r == 0 && json_is_object(file) && is_raw(file))
        return read_raw(name, file, part, err);
    return r < 0 ? r : read_below(name, file, &part->below, err);
}

/* ------------------------------------------------------------------ names */

/* The level that has the path, or NULL. */
static json_t *bottom_of(json_t *root)
{
    json_t *level = root;
    for (int i = 0; i < LEVELS_MAX && json_is_object(level); i++) {
        if (is_file(level))
            return level;
        level = is_server(level) ? NULL : json_object_get(level, "file");
    }
    return NULL;
}

static int parse_level(const char *name, json_t *root, struct dr_part *part, struct dr_error *err)
{
    const char *driver = driver_of(root);
    if (is_file(root))
        driver = "raw"; /* its own bytes */
    part->format = driver ? strdup(driver) : NULL;
    if (driver && !part->format)
        return out_of_memory(name, err);
    if (is_file(root))
        return read_file(name, root, &part->below, err);
    return is_raw(root) ? read_raw(name, root, part, err) : read_format(name, root, part, err);
}

int dr_part_parse(const char *name, struct dr_part *part, struct dr_error *err)
{
    CLEANUP_JSON json_t *root = parse(name);
    *part = (struct dr_part){0};
    if (!root)
        return dr_fail(err, EINVAL, "%.200s: is no JSON object of at most %u bytes", name,
                       NAME_MAX_BYTES);
    int r = parse_level(name, root, part, err);
    if (r < 0)
        return r;
    const json_t *bottom = bottom_of(root);
    const char *path = json_string_value(json_object_get(bottom, "filename"));
    for (const json_t *at = root; json_is_object(at); at = json_object_get(at, "file"))
        part->read_only = part->read_only || is_on(json_object_get(at, "read-only"));
    part->filename = path ? strdup(path) : NULL;
    return path && !part->filename ? out_of_memory(name, err) : 0;
}

void dr_part_clear(struct dr_part *part)
{
    free(part->below);
    free(part->format);
    free(part->filename);
    free(part->key_secret);
    *part = (struct dr_part){0};
}

static uint64_t add_up(uint64_t a, uint64_t b)
{
    return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}

int dr_part_range(const char *name, char **bottom, uint64_t *from, uint64_t *to,
                  struct dr_error *err)
{
    CLEANUP_FREE char *at = strdup(name);
    *from = 0;
    *to = UINT64_MAX;
    for (int i = 0; at && i < LEVELS_MAX && dr_part_is(at); i++) {
        DR_CLEANUP_PART struct dr_part part = {0};
        int r = dr_part_parse(at, &part, err);
        if (r < 0)
            return r;
        *from = add_up(*from, part.offset);
        *to = add_up(*to, part.offset);
        uint64_t end = part.has_size ? add_up(part.offset, part.size) : UINT64_MAX;
        *to = *to < end ? *to : end;
        free(at);
        at = DR_STEAL(part.below);
    }
    *bottom = DR_STEAL(at);
    return *bottom ? 0 : out_of_memory(name, err);
}

char *dr_part_bottom(const char *name)
{
    CLEANUP_FREE char *at = strdup(name);
    for (int i = 0; at && i < LEVELS_MAX && dr_part_is(at); i++) {
        DR_CLEANUP_PART struct dr_part part = {0};
        if (dr_part_parse(at, &part, NULL) < 0)
            return NULL;
        free(at);
        at = DR_STEAL(part.below);
    }
    return DR_STEAL(at);
}

int dr_part_rename(const char *name, const char *path, char **out, struct dr_error *err)
{
    CLEANUP_JSON json_t *root = parse(name);
    json_t *bottom = bottom_of(root);
    *out = NULL;
    if (bottom && json_object_set_new(bottom, "filename", json_string(path)) < 0)
        return dr_fail(err, EINVAL, "%s: the path of its file, %s, is not UTF-8", name, path);
    return root ? json_name(name, root, out, err) : out_of_memory(name, err);
}
