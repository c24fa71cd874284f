/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The names of remote disks: which names are some, and all spellings turned into one URI. */
#include <curl/curl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/loaded.h"
#include "storage/part.h"
#include "storage/remote.h"

#define TIMEOUT_DEFAULT   60u
#define RECONNECT_DEFAULT 60u
#define SECONDS_MAX       86400u
#define NULL_SIZE         (UINT64_C(1) << 30) /* as in QEMU */
#define NAME_MAX_BYTES    16384u              /* of a whole name: URLs with signatures are long */

static const char *const schemes[] = {"nbd://",       "nbds://", "nbd+unix://",
                                      "nbds+unix://", "http://", "https://"};
static const char *const null_schemes[] = {"null-co://", "null-aio://"};

static bool begins(const char *name, const char *with)
{
    return strncmp(name, with, strlen(with)) == 0;
}

static bool has_scheme(const char *name)
{
    for (size_t i = 0; i < sizeof(schemes) / sizeof(schemes[0]); i++)
        if (begins(name, schemes[i]))
            return true;
    return false;
}

static bool is_null(const char *name)
{
    return begins(name, null_schemes[0]) || begins(name, null_schemes[1]);
}

/* ------------------------------------------------------------------ URIs */

/* What a URI may hold as it is, everywhere. */
static bool is_plain_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           (c && strchr("-._~/", c));
}

static char *encode(const char *text)
{
    char *out = malloc(3 * strlen(text) + 1), *to = out;
    for (; out && *text; text++)
        if (is_plain_char(*text))
            *to++ = *text;
        else
            to += sprintf(to, "%%%02X", (unsigned char)*text);
    if (out)
        *to = '\0';
    return out;
}

static int out_of_memory(const char *name, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", name);
}

/* A name that an image gives is judged by its directory, so nothing may lead up from there, however
 * it is written. */
static int refuse_dots(const char *name, const char *uri, struct dr_error *err)
{
    int len;
    char *plain = curl_easy_unescape(NULL, uri, 0, &len);
    bool up = false;
    size_t n = plain ? strlen(plain) : 0;
    for (const char *at = plain; at && (at = strstr(at, "/..")); at += 3)
        up = up || !at[3] || strchr("/?&#", at[3]);
    bool cut = plain && n != (size_t)len;
    curl_free(plain);
    if (up || cut)
        return dr_fail(err, EINVAL, "%s: a remote name must not have %s in it", name,
                       cut ? "a zero byte" : "\"..\" as a directory");
    return plain ? 0 : out_of_memory(name, err);
}

/* libcurl lowers the case of the scheme and resolves what it can of "..". Where no host is, it
 * would take the first directory for one. */
static int normal_http(const char *name, const char *url, struct dr_remote *remote,
                       struct dr_error *err)
{
    if (strchr("/\\", strstr(url, "://")[3]))
        return dr_fail(err, EINVAL, "%s: is no URL: it has no host", name);
    CURLU *parts = curl_url();
    char *normal = NULL;
    CURLUcode code = parts ? curl_url_set(parts, CURLUPART_URL, url, 0) : CURLUE_OUT_OF_MEMORY;
    if (!code)
        code = curl_url_set(parts, CURLUPART_FRAGMENT, NULL, 0);
    if (!code)
        code = curl_url_get(parts, CURLUPART_URL, &normal, 0);
    if (!code && !(remote->uri = strdup(normal)))
        code = CURLUE_OUT_OF_MEMORY;
    curl_free(normal);
    curl_url_cleanup(parts);
    remote->kind = DR_REMOTE_HTTP;
    return code ? dr_fail(err, EINVAL, "%s: is no URL: %s", name, curl_url_strerror(code)) : 0;
}

static int set_uri(const char *name, const char *uri, struct dr_remote *remote,
                   struct dr_error *err)
{
    int r = dr_load_curl(err);
    if (r < 0)
        return dr_prefix(err, r, "%s", name);
    if (begins(uri, "http"))
        r = normal_http(name, uri, remote, err);
    else if (!(remote->uri = strdup(uri)))
        r = out_of_memory(name, err);
    return r < 0 ? r : refuse_dots(name, remote->uri, err);
}

static int set_unix(const char *name, const char *path, const char *export,
                    struct dr_remote *remote, struct dr_error *err)
{
    CLEANUP_FREE char *socket = encode(path), *what = encode(export), *uri = NULL;
    if (!socket || !what || asprintf(&uri, "nbd+unix:///%s?socket=%s", what, socket) < 0) {
        uri = NULL;
        return out_of_memory(name, err);
    }
    return set_uri(name, uri, remote, err);
}

static int set_tcp(const char *name, const char *host, const char *port, const char *export,
                   struct dr_remote *remote, struct dr_error *err)
{
    CLEANUP_FREE char *what = encode(export), *uri = NULL;
    bool bare = strchr(host, ':') && host[0] != '['; /* an IPv6 address */
    if (strpbrk(host, "/?#@") || strpbrk(port, "/?#@:"))
        return dr_fail(err, EINVAL, "%s: expected the name or address of a host, and a port", name);
    if (!what || asprintf(&uri, "nbd://%s%s%s:%s/%s", bare ? "[" : "", host, bare ? "]" : "", port,
                          what) < 0) {
        uri = NULL;
        return out_of_memory(name, err);
    }
    return set_uri(name, uri, remote, err);
}

/* ------------------------------------------------------------------ nbd:HOST:PORT, nbd:unix:PATH
 */

#define EXPORT ":exportname="

/* Behind the host of "HOST:PORT...", or NULL. */
static const char *behind_host(const char *text)
{
    const char *at = text[0] == '[' ? strchr(text, ']') : text;
    at = at ? strchr(at, ':') : NULL;
    return at && at > text && at[1] >= '0' && at[1] <= '9' &&
                   !memchr(text, '/', (size_t)(at - text))
               ? at
               : NULL;
}

static bool is_qemu_nbd(const char *name)
{
    return begins(name, "nbd:unix:") || (begins(name, "nbd:") && behind_host(name + 4));
}

static int parse_qemu_nbd(const char *name, struct dr_remote *remote, struct dr_error *err)
{
    const char *rest = name + 4, *export = strstr(rest, EXPORT);
    CLEANUP_FREE char *place = strndup(rest, export ? (size_t)(export - rest) : strlen(rest));
    export = export ? export + strlen(EXPORT) : "";
    if (!place)
        return out_of_memory(name, err);
    if (begins(place, "unix:"))
        return set_unix(name, place + 5, export, remote, err);
    /* Looked for again: the name of the export may have the bracket that ends an address. */
    const char *end = behind_host(place);
    if (!end || strspn(end + 1, "0123456789") != strlen(end + 1))
        return dr_fail(err, EINVAL, "%s: expected nbd:HOST:PORT[:exportname=NAME]", name);
    CLEANUP_FREE char *host = strndup(place, (size_t)(end - place));
    return host ? set_tcp(name, host, end + 1, export, remote, err) : out_of_memory(name, err);
}

/* ------------------------------------------------------------------ json: */

/* A value of the object at a path of keys, flat ("server.path") or nested, or under "file". */
static const json_t *value_at(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    const char *dot = strchr(key, '.');
    if (value || !dot)
        return value;
    CLEANUP_FREE char *first = strndup(key, (size_t)(dot - key));
    const json_t *inner = first ? json_object_get(object, first) : NULL;
    return inner ? value_at(inner, dot + 1) : NULL;
}

struct json_name {
    const char *name;
    json_t *root;
    const char *prefix; /* of the keys of the driver that reads: "" or "file." */
    char number[32];
};

static const char *text_at(struct json_name *j, const char *key)
{
    char full[80];
    snprintf(full, sizeof(full), "%s%s", j->prefix, key);
    const json_t *value = value_at(j->root, full);
    if (json_is_integer(value)) {
        snprintf(j->number, sizeof(j->number), "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        return j->number;
    }
    if (json_is_boolean(value))
        return json_is_true(value) ? "on" : "off";
    return json_string_value(value);
}

static bool is_driver(const char *driver)
{
    static const char *const drivers[] = {"nbd", "http", "https", "null-co", "null-aio"};
    for (size_t i = 0; driver && i < sizeof(drivers) / sizeof(drivers[0]); i++)
        if (strcmp(driver, drivers[i]) == 0)
            return true;
    return false;
}

static bool json_open(const char *name, struct json_name *j)
{
    *j = (struct json_name){.name = name, .prefix = ""};
    if (!begins(name, "json:") || strlen(name) > NAME_MAX_BYTES)
        return false;
    j->root = json_loads(name + 5, JSON_REJECT_DUPLICATES, NULL);
    if (!is_driver(text_at(j, "driver")))
        j->prefix = "file.";
    bool part = *j->prefix && (json_object_get(j->root, "offset") || /* part.h */
                               json_object_get(j->root, "size"));
    if (!part && is_driver(text_at(j, "driver")))
        return true;
    json_decref(DR_STEAL(j->root));
    return false;
}

static int seconds_at(struct json_name *j, const char *key, unsigned *seconds, struct dr_error *err)
{
    const char *text = text_at(j, key);
    char *end;
    if (!text)
        return 0;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || n > SECONDS_MAX)
        return dr_fail(err, EINVAL, "%s: %s is '%s', expected seconds up to %u", j->name, key, text,
                       SECONDS_MAX);
    *seconds = (unsigned)n;
    return 0;
}

/* A key that means something and is not obeyed would be worse than a refusal. */
static int refuse_unknown(const struct json_name *j, json_t *object, const char *const *known,
                          struct dr_error *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        const char *bare = begins(key, j->prefix) ? key + strlen(j->prefix) : key;
        bool found = false;
        for (size_t i = 0; known[i]; i++)
            found = found || strcmp(known[i], bare) == 0;
        if (!found)
            return dr_fail(err, EINVAL, "%s: the key '%s' is not known here", j->name, key);
    }
    return 0;
}

/* Around the object of the server stands a format, whose settings (of a part of the disk, say)
 * nothing here would obey. */
static int refuse_around(const struct json_name *j, struct dr_error *err)
{
    static const char *const known[] = {"driver", "file", "node-name", "read-only", NULL};
    return *j->prefix && json_is_object(json_object_get(j->root, "file"))
               ? refuse_unknown(j, j->root, known, err)
               : 0;
}

static json_t *object_of(const struct json_name *j)
{
    json_t *inner = *j->prefix ? json_object_get(j->root, "file") : NULL;
    return inner ? inner : j->root;
}

/* The URI that is there gets TLS, as the object's keys say. */
static int add_tls(struct json_name *j, struct dr_remote *remote, struct dr_error *err)
{
    const char *directory = text_at(j, "tls-certificates"), *keys = text_at(j, "tls-psk-file");
    const char *user = text_at(j, "tls-username"), *place = strstr(remote->uri, "://");
    if (!directory && !keys && !user)
        return 0;
    if (!directory == !keys || begins(remote->uri, "nbds"))
        return dr_fail(err, EINVAL, "%s: needs either tls-certificates or tls-psk-file, and no uri",
                       j->name);
    CLEANUP_FREE char *value = encode(directory ? directory : keys), *uri = NULL;
    CLEANUP_FREE char *who = encode(user ? user : "");
    if (!value || !who ||
        asprintf(&uri, "nbds%.*s://%s%s%s%c%s=%s", (int)(place - remote->uri - 3), remote->uri + 3,
                 who, user ? "@" : "", place + 3, strchr(place, '?') ? '&' : '?',
                 directory ? "tls-certificates" : "tls-psk-file", value) < 0) {
        uri = NULL;
        return out_of_memory(j->name, err);
    }
    free(remote->uri);
    remote->uri = NULL;
    return set_uri(j->name, uri, remote, err);
}

static int parse_json_nbd(struct json_name *j, struct dr_remote *remote, struct dr_error *err)
{
    static const char *const known[] = {"driver",
                                        "server",
                                        "server.type",
                                        "server.host",
                                        "server.port",
                                        "server.path",
                                        "host",
                                        "port",
                                        "path",
                                        "export",
                                        "uri",
                                        "open-timeout",
                                        "timeout",
                                        "reconnect-delay",
                                        "node-name",
                                        "read-only",
                                        "tls-certificates",
                                        "tls-psk-file",
                                        "tls-username",
                                        NULL};
    int r = refuse_unknown(j, object_of(j), known, err);
    if (r == 0)
        r = seconds_at(j, "timeout", &remote->timeout, err);
    if (r == 0)
        r = seconds_at(j, "open-timeout", &remote->timeout, err);
    if (r == 0)
        r = seconds_at(j, "reconnect-delay", &remote->reconnect, err);
    if (r < 0)
        return r;
    const char *export = text_at(j, "export"), *uri = text_at(j, "uri");
    const char *path = text_at(j, "server.path") ? text_at(j, "server.path") : text_at(j, "path");
    const char *host = text_at(j, "server.host") ? text_at(j, "server.host") : text_at(j, "host");
    export = export ? export : "";
    if (uri && has_scheme(uri) && begins(uri, "nbd"))
        return set_uri(j->name, uri, remote, err);
    if (uri)
        return dr_fail(err, EINVAL,
                       "%s: uri is '%s', expected one that begins with nbd://, nbds://, "
                       "nbd+unix:// or nbds+unix://",
                       j->name, uri);
    if (!path && !host)
        return dr_fail(err, EINVAL, "%s: needs server.path, or server.host and server.port",
                       j->name);
    const char *port = text_at(j, "server.port") ? text_at(j, "server.port") : text_at(j, "port");
    r = path ? set_unix(j->name, path, export, remote, err)
             : set_tcp(j->name, host, port ? port : "10809", export, remote, err);
    return r < 0 ? r : add_tls(j, remote, err);
}

static int parse_json_http(struct json_name *j, struct dr_remote *remote, struct dr_error *err)
{
    static const char *const known[] = {"driver",    "url",       "sslverify", "timeout",
                                        "cookie",    "username",  "readahead", "reconnect-delay",
                                        "node-name", "read-only", "password",  NULL};
    int r = refuse_unknown(j, object_of(j), known, err);
    if (r == 0)
        r = seconds_at(j, "timeout", &remote->timeout, err);
    if (r == 0)
        r = seconds_at(j, "reconnect-delay", &remote->reconnect, err);
    if (r < 0)
        return r;
    const char *url = text_at(j, "url"), *verify = text_at(j, "sslverify");
    const char *user = text_at(j, "username"), *password = text_at(j, "password");
    const char *cookie = text_at(j, "cookie");
    remote->insecure = verify && (strcmp(verify, "off") == 0 || strcmp(verify, "false") == 0);
    if (cookie && strpbrk(cookie, "\r\n"))
        return dr_fail(err, EINVAL, "%s: cookie must be one line", j->name);
    if (cookie && !(remote->cookie = strdup(cookie)))
        return out_of_memory(j->name, err);
    if (user && asprintf(&remote->user, "%s:%s", user, password ? password : "") < 0) {
        remote->user = NULL;
        return out_of_memory(j->name, err);
    }
    if (!url || !(begins(url, "http://") || begins(url, "https://")))
        return dr_fail(err, EINVAL, "%s: needs url, which begins with http:// or https://",
                       j->name);
    return set_uri(j->name, url, remote, err);
}

static int set_null(const char *name, const char *driver, struct dr_remote *remote,
                    struct dr_error *err)
{
    remote->kind = DR_REMOTE_NULL;
    if (asprintf(&remote->uri, "%s://", driver) < 0) {
        remote->uri = NULL;
        return out_of_memory(name, err);
    }
    return 0;
}

static int parse_json_null(struct json_name *j, struct dr_remote *remote, struct dr_error *err)
{
    static const char *const known[] = {"driver",    "size",      "latency-ns", "read-zeroes",
                                        "node-name", "read-only", NULL};
    int r = refuse_unknown(j, object_of(j), known, err);
    if (r < 0)
        return r;
    const char *size = text_at(j, "size"), *zeroes;
    if (size && (dr_part_size_of_text(size, &remote->size) < 0 || remote->size > INT64_MAX - 511))
        return dr_fail(err, EINVAL, "%s: size is '%s', expected bytes below 2^63", j->name, size);
    remote->size = dr_round_up(remote->size, 512);
    const char *latency = text_at(j, "latency-ns");
    if (latency && (dr_part_size_of_text(latency, &remote->latency) < 0 ||
                    remote->latency > SECONDS_MAX * UINT64_C(1000000000)))
        return dr_fail(err, EINVAL, "%s: latency-ns is '%s', expected nanoseconds of up to a day",
                       j->name, latency);
    zeroes = text_at(j, "read-zeroes");
    remote->zeroes = zeroes && (strcmp(zeroes, "on") == 0 || strcmp(zeroes, "true") == 0 ||
                                strcmp(zeroes, "yes") == 0 || strcmp(zeroes, "y") == 0);
    return set_null(j->name, text_at(j, "driver"), remote, err);
}

static int parse_json(struct json_name *j, struct dr_remote *remote, struct dr_error *err)
{
    int r = refuse_around(j, err);
    if (r < 0)
        return r;
    if (begins(text_at(j, "driver"), "null-"))
        return parse_json_null(j, remote, err);
    return strcmp(text_at(j, "driver"), "nbd") == 0 ? parse_json_nbd(j, remote, err)
                                                    : parse_json_http(j, remote, err);
}

static bool is_json(const char *name)
{
    struct json_name j;
    bool is = json_open(name, &j);
    json_decref(j.root);
    return is;
}

/* ------------------------------------------------------------------ all */

bool dr_remote_is(const char *name)
{
    return has_scheme(name) || is_null(name) || is_qemu_nbd(name) ||
           (begins(name, "json:") && is_json(name));
}

size_t dr_remote_path_length(const char *name)
{
    bool http = begins(name, "http://") || begins(name, "https://");
    if (!http && !begins(name, "nbd://") && !begins(name, "nbds://"))
        return 0;
    size_t length = strcspn(name, "?"), host = (size_t)(strstr(name, "://") - name) + 3;
    if (length <= host || name[host] == '/') /* no host: its directory would be "nbd:" */
        return 0;
    return memchr(name + host, '/', length - host) ? length : 0;
}

DR_API bool dr_name_is_remote(const char *name)
{
    return dr_remote_is(name);
}

static unsigned from_environment(const char *variable, unsigned otherwise)
{
    const char *text = getenv(variable);
    char *end;
    unsigned long n = text && *text >= '0' && *text <= '9' ? strtoul(text, &end, 10) : 0;
    return text && *text >= '0' && *text <= '9' && !*end && n <= SECONDS_MAX ? (unsigned)n
                                                                             : otherwise;
}

int dr_remote_parse(const char *name, struct dr_remote *remote, struct dr_error *err)
{
    struct json_name j;
    *remote = (struct dr_remote){
        .timeout = from_environment("DROVER_NET_TIMEOUT", TIMEOUT_DEFAULT),
        .reconnect = from_environment("DROVER_NET_RECONNECT", RECONNECT_DEFAULT),
        .plain = true,
        .size = NULL_SIZE,
    };
    if (strlen(name) > NAME_MAX_BYTES)
        return dr_fail(err, ENAMETOOLONG, "%.200s...: is longer than a remote name may be", name);
    if (is_qemu_nbd(name))
        return parse_qemu_nbd(name, remote, err);
    if (is_null(name) && strstr(name, "://")[3])
        return dr_fail(err, EINVAL, "%s: has something behind null-co:// or null-aio://", name);
    if (is_null(name))
        return set_null(name, begins(name, "null-co") ? "null-co" : "null-aio", remote, err);
    if (!json_open(name, &j))
        return set_uri(name, name, remote, err);
    remote->plain = false;
    int r = parse_json(&j, remote, err);
    json_decref(j.root);
    return r;
}

void dr_remote_clear(struct dr_remote *remote)
{
    free(remote->uri);
    free(remote->user);
    free(remote->cookie);
    *remote = (struct dr_remote){0};
}
