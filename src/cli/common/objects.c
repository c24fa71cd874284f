/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* QEMU's objects, as far as a client of an NBD server and a reader of encrypted images need them:
 * tls-creds=ID of an image's options becomes what the object of that name says of certificates or
 * keys, and the library gets the secrets, to which images refer by their ids. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/common/filters.h"

#define SECRET_MAX 4096

struct use {
    const struct cli *cli;
    struct cli_pairs *list;
    const char *prefix; /* of the key in the list */
    const char *text;   /* of the object */
    struct cli_pairs object;
};

static int replace(const struct use *u, const char *key, const char *value)
{
    char name[128];
    snprintf(name, sizeof(name), "%s%s", u->prefix, key);
    return cli_pairs_set(u->list, name, value);
}

static int is_odd(const struct use *u, const char *why)
{
    /* A secret's text is none for messages. */
    cli_error(u->cli, "--object %.*s: %s", (int)strcspn(u->text, ","), u->text, why);
    return -EINVAL;
}

static bool is_kind(const struct use *u, const char *kind)
{
    size_t n = strlen(kind);
    return strncmp(u->text, kind, n) == 0 && u->text[n] == ',';
}

static int take_credentials(const struct use *u, const char *key)
{
    bool psk = is_kind(u, "tls-creds-psk");
    const char *dir = cli_pairs_find(&u->object, "dir");
    const char *user = cli_pairs_find(&u->object, "username");
    const char *end = cli_pairs_find(&u->object, "endpoint");
    const char *verify = cli_pairs_find(&u->object, "verify-peer");
    CLEANUP_FREE char *keys = NULL;
    (void)key;
    if ((!psk && !is_kind(u, "tls-creds-x509")) || !dir)
        return is_odd(u, "expected tls-creds-x509 or tls-creds-psk with dir=");
    if (!end || strcmp(end, "client") != 0)
        return is_odd(u, "expected endpoint=client");
    if (verify && strcmp(verify, "on") != 0 && strcmp(verify, "yes") != 0)
        return is_odd(u, "the server's certificate is always verified");
    if (!psk)
        return replace(u, "tls-certificates", dir);
    if (asprintf(&keys, "%s/keys.psk", dir) < 0) {
        keys = NULL;
        return -ENOMEM;
    }
    int r = replace(u, "tls-psk-file", keys);
    return r < 0 ? r : replace(u, "tls-username", user ? user : "qemu");
}

/* Secrets as they were given, for the options of servers and for what serves disks in a process of
 * its own: a file that is a pipe is read once. Wiped when the program ends. */
static struct cli_secret *secrets;
static size_t n_secrets;

static void wipe_secrets(void)
{
    for (size_t i = 0; i < n_secrets; i++)
        explicit_bzero(secrets[i].text, secrets[i].len);
}

const struct cli_secret *cli_secrets(size_t *n)
{
    *n = n_secrets;
    return secrets;
}

static int remember(const char *id, const char *text, size_t len)
{
    struct cli_secret *more = realloc(secrets, (n_secrets + 1) * sizeof(*more));

    if (!more)
        return -ENOMEM;
    secrets = more;
    struct cli_secret s = {strdup(id), malloc(len + 1), len};
    if (!s.id || !s.text || (n_secrets == 0 && atexit(wipe_secrets) != 0)) {
        free(s.id);
        free(s.text);
        return -ENOMEM;
    }
    memcpy(s.text, text, len);
    s.text[len] = '\0';
    secrets[n_secrets++] = s;
    return 0;
}

static const struct cli_secret *known(const char *id)
{
    for (size_t i = 0; i < n_secrets; i++)
        if (strcmp(secrets[i].id, id) == 0)
            return &secrets[i];
    return NULL;
}

static int take_secret(const struct use *u, const char *key)
{
    const struct cli_secret *s = known(cli_pairs_find(&u->object, "id"));

    if (!s || !is_kind(u, "secret"))
        return is_odd(u, "expected secret");
    if (s->len > SECRET_MAX || memchr(s->text, 0, s->len))
        return is_odd(u, "the secret is no text of up to 4096 bytes");
    return replace(u, key, s->text);
}

static const struct {
    const char *key;
    int (*take)(const struct use *u, const char *becomes);
    const char *becomes, *what;
} uses[] = {
    {"tls-creds", take_credentials, NULL, "TLS credentials"},
    {"password-secret", take_secret, "password", "secret"},
    {"cookie-secret", take_secret, "cookie", "secret"},
};

static int use_object(const struct cli_args *args, struct use *u, size_t which, const char *id)
{
    for (size_t i = 0; (u->text = cli_nth_value(args, KEY_OBJECT, i)); i++) {
        const char *comma = strchr(u->text, ',');
        cli_pairs_free(&u->object);
        u->object = (struct cli_pairs){0};
        if (comma && cli_pairs_add(&u->object, comma + 1) < 0)
            return -ENOMEM;
        const char *own = cli_pairs_find(&u->object, "id");
        if (own && strcmp(own, id) == 0)
            return uses[which].take(u, uses[which].becomes);
    }
    cli_error(u->cli, "No %s with id '%s'", uses[which].what, id);
    return -EINVAL;
}

/* ------------------------------------------------------------------ passwords of images */

/* In place; the number of bytes, or -1: it is no base64. Line ends are passed over. */
static ssize_t from_base64(char *text, size_t len)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t out = 0, n = 0, padding = 0;
    unsigned bits = 0;

    for (size_t i = 0; i < len; i++) {
        const char *at = text[i] ? strchr(digits, text[i]) : NULL;
        if (text[i] == '\n' || text[i] == '\r')
            continue;
        padding += text[i] == '=';
        if ((!at && text[i] != '=') || (at && padding))
            return -1;
        bits = bits << 6 | (at ? (unsigned)(at - digits) : 0);
        if (++n % 4 == 0) {
            text[out++] = (char)(bits >> 16);
            text[out++] = (char)(bits >> 8);
            text[out++] = (char)bits;
        }
    }
    return n % 4 || padding > 2 ? -1 : (ssize_t)(out - padding);
}

/* Any bytes, at most DR_SECRET_MAX; wiped and freed by the caller. NULL after a message. */
static char *read_all(const struct use *u, const char *path, size_t *len)
{
    FILE *file = fopen(path, "re");
    char *text = file ? malloc(DR_SECRET_MAX + 1) : NULL;

    if (file)
        setvbuf(file, NULL, _IONBF, 0); /* no copy is left in a buffer */
    *len = text ? fread(text, 1, DR_SECRET_MAX + 1, file) : 0;
    bool failed = !text || ferror(file);
    int why = errno;
    if (file)
        fclose(file);
    if (failed)
        cli_error(u->cli, "Unable to read %s: %s", path, strerror(why));
    else if (*len > DR_SECRET_MAX)
        is_odd(u, "the file has more than 65536 bytes");
    if (!failed && *len <= DR_SECRET_MAX)
        return text;
    if (text)
        explicit_bzero(text, *len);
    free(text);
    return NULL;
}

/* The library gets the secret, so that images can name it. */
static int hand_over(const struct use *u)
{
    const char *data = cli_pairs_find(&u->object, "data");
    const char *file = cli_pairs_find(&u->object, "file");
    const char *format = cli_pairs_find(&u->object, "format");
    bool base64 = format && strcmp(format, "base64") == 0;
    size_t len = data ? strlen(data) : 0;

    if (format && !base64 && strcmp(format, "raw") != 0)
        return is_odd(u, "expected format=raw or format=base64");
    if (known(cli_pairs_find(&u->object, "id")))
        return is_odd(u, "its id is that of another secret");
    if (cli_pairs_find(&u->object, "keyid"))
        return is_odd(u, "secrets that are encrypted themselves (keyid) are not supported");
    char *text = data ? strdup(data) : read_all(u, file, &len);
    if (!text)
        return data ? -ENOMEM : -EINVAL;
    ssize_t n = base64 ? from_base64(text, len) : (ssize_t)len;
    int r = n < 0 ? is_odd(u, "the secret is no base64")
                  : dr_secret_set(cli_pairs_find(&u->object, "id"), text, (size_t)n);
    if (r == -EINVAL && n >= 0)
        is_odd(u, "the secret has more than 65536 bytes");
    if (r == 0)
        r = remember(cli_pairs_find(&u->object, "id"), text, (size_t)n);
    explicit_bzero(text, len);
    free(text);
    return r;
}

/* Nothing here obeys objects of other kinds. */
static int check_one(const struct cli *cli, const char *text)
{
    struct use u = {.cli = cli, .text = text};
    const char *comma = strchr(text, ',');
    int r = comma ? cli_pairs_add(&u.object, comma + 1) : 0;
    const char *data = cli_pairs_find(&u.object, "data"), *file = cli_pairs_find(&u.object, "file");
    if (r == 0 && !is_kind(&u, "tls-creds-x509") && !is_kind(&u, "tls-creds-psk") &&
        !is_kind(&u, "secret") && !is_kind(&u, "throttle-group"))
        r = is_odd(&u, "only tls-creds-x509, tls-creds-psk, secret and throttle-group are "
                       "supported");
    else if (r == 0 && !cli_pairs_find(&u.object, "id"))
        r = is_odd(&u, "Parameter 'id' is missing");
    else if (r == 0 && is_kind(&u, "throttle-group"))
        r = cli_throttle_check(cli, &u.object);
    else if (r == 0 && is_kind(&u, "secret") && !data == !file)
        r = is_odd(&u, "expected secret with either data= or file=");
    else if (r == 0 && is_kind(&u, "secret"))
        r = hand_over(&u);
    cli_pairs_free(&u.object);
    return r;
}

int cli_objects_check(const struct cli *cli, const struct cli_args *args)
{
    const char *text;
    int r = 0;
    for (size_t i = 0; r == 0 && (text = cli_nth_value(args, KEY_OBJECT, i)); i++)
        r = check_one(cli, text);
    return r;
}

/* Is this the key, of the image or of what is below it? */
static bool names(const char *name, const char *key)
{
    size_t n = strlen(name), len = strlen(key);
    return n >= len && n < 64 && strcmp(name + n - len, key) == 0 &&
           (n == len || name[n - len - 1] == '.');
}

static int resolve_one(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list,
                       const char *name, size_t which)
{
    char prefix[64];
    struct use u = {.cli = cli, .list = list, .prefix = prefix};
    snprintf(prefix, sizeof(prefix), "%.*s", (int)(strlen(name) - strlen(uses[which].key)), name);
    CLEANUP_FREE char *id = cli_pairs_take(list, name);
    int r = id ? use_object(args, &u, which, id) : -ENOMEM;
    cli_pairs_free(&u.object);
    return r;
}

int cli_objects_resolve(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list)
{
    int r = 0;
    for (size_t which = 0; which < sizeof(uses) / sizeof(uses[0]); which++) {
        for (size_t i = 0; r == 0 && i < list->n;) {
            if (!names(list->pairs[i].name, uses[which].key)) {
                i++;
                continue;
            }
            r = resolve_one(cli, args, list, list->pairs[i].name, which);
            i = 0; /* that changed the list: an image, its parent and its data may all have one */
        }
    }
    return r;
}
