/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A parent's name with its format, in version 1's one field.
 *
 * A plain name is that of a raw parent, which is never looked at to find out what it is. Any other
 * format stands next to the name, so that one write changes both:
 *     json:{"driver":"vmdk","file":{"filename":"base.vmdk"}}
 */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"
#include "formats/addcow/addcow.h"

#define JSON     "json:"
#define JSON_LEN (sizeof(JSON) - 1)

static void json_cleanup(json_t **j)
{
    json_decref(*j);
}
#define CLEANUP_JSON __attribute__((cleanup(json_cleanup)))

static int as_json(const char *path, const char *name, const char *format, char **field,
                   struct dr_error *err)
{
    json_error_t bad;
    CLEANUP_JSON json_t *j =
        json_pack_ex(&bad, 0, "{s:s, s:{s:s}}", "driver", format, "file", "filename", name);
    if (!j && json_error_code(&bad) == json_error_invalid_utf8)
        return dr_fail(err, EILSEQ,
                       "%s: the parent's name must be UTF-8 to be recorded with its format %s",
                       path, format);
    CLEANUP_FREE char *object = dr_json_dump(j, JSON_COMPACT | JSON_PRESERVE_ORDER);
    if (!object || asprintf(field, JSON "%s", object) < 0) {
        *field = NULL;
        return dr_fail_errno(err, ENOMEM, "%s", path);
    }
    return 0;
}

int addcow_name_encode(const char *path, const char *name, const char *format, char **field,
                       struct dr_error *err)
{
    bool plain = !format || strcmp(format, "raw") == 0;
    *field = NULL;
    if (plain && strncmp(name, JSON, JSON_LEN) != 0) {
        *field = strdup(name);
        if (!*field)
            return dr_fail_errno(err, ENOMEM, "%s", path);
    } else {
        int r = as_json(path, name, format ? format : "raw", field, err);
        if (r < 0)
            return r;
    }
    size_t len = strlen(*field);
    if (len < ADDCOW_NAME_FIELD)
        return 0;
    free(DR_STEAL(*field));
    return dr_fail(err, ENAMETOOLONG,
                   "%s: the parent's name%s would take %zu bytes, at most %u fit", path,
                   plain ? "" : " with its format", len, ADDCOW_NAME_FIELD - 1);
}

/* ------------------------------------------------------------------ reading it */

static int refuse(const char *path, const char *why, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP,
                   "%s: cannot use the recorded name of its backing file: %s; only "
                   "json:{\"driver\":FORMAT,\"file\":{\"filename\":NAME}} is understood",
                   path, why);
}

/* {"filename": NAME}, with "driver":"file" or without. */
static const char *file_name(const json_t *file)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)file, key, value)
    {
        if (strcmp(key, "filename") == 0)
            continue;
        const char *text = json_string_value(value);
        if (strcmp(key, "driver") != 0 || !text || strcmp(text, "file") != 0)
            return NULL;
    }
    return json_string_value(json_object_get(file, "filename"));
}

/* One member of the outer object. *what: what it says, if it is one of those we know. */
static const char *take_member(const char *key, const json_t *value, const char **driver,
                               const char **name)
{
    const char *text = json_string_value(value);
    if (strcmp(key, "driver") == 0) {
        *driver = text;
        return text ? NULL : "\"driver\" is no text";
    }
    if (strcmp(key, "file.driver") == 0)
        return text && strcmp(text, "file") == 0 ? NULL : "\"file.driver\" is not \"file\"";
    bool nested = strcmp(key, "file") == 0;
    if (!nested && strcmp(key, "file.filename") != 0)
        return "it has unknown members";
    if (*name)
        return "it has two file names";
    *name = nested ? file_name(value) : text;
    return *name ? NULL : "its \"file\" has no plain \"filename\"";
}

static int from_json(const char *path, const char *text, char **name, char **format,
                     struct dr_error *err)
{
    json_error_t bad;
    CLEANUP_JSON json_t *j = json_loads(text, JSON_REJECT_DUPLICATES, &bad);
    const char *driver = NULL, *file = NULL, *key, *why;
    json_t *value;
    if (!j && (bad.text[0] == '\0' || json_error_code(&bad) == json_error_out_of_memory))
        return dr_fail_errno(err, ENOMEM, "%s", path);
    if (!j)
        return refuse(path, bad.text, err);
    if (!json_is_object(j))
        return refuse(path, "it is no object", err);
    json_object_foreach(j, key, value)
    {
        why = take_member(key, value, &driver, &file);
        if (why)
            return refuse(path, why, err);
    }
    if (!driver || !file || !*file)
        return refuse(path, driver ? "it names no file" : "it names no driver", err);
    *name = strdup(file);
    *format = strdup(driver);
    return *name && *format ? 0 : dr_fail_errno(err, ENOMEM, "%s", path);
}

int addcow_name_decode(const char *path, const char *field, char **name, char **format,
                       struct dr_error *err)
{
    *name = *format = NULL;
    int r = 0;
    if (strncmp(field, JSON, JSON_LEN) == 0) {
        r = from_json(path, field + JSON_LEN, name, format, err);
    } else {
        *name = strdup(field);
        *format = strdup("raw");
        if (!*name || !*format)
            r = dr_fail_errno(err, ENOMEM, "%s", path);
    }
    if (r < 0) {
        free(DR_STEAL(*name));
        free(DR_STEAL(*format));
    }
    return r;
}
