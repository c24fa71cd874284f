/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Hiding passwords and cookies in texts that are printed. The texts are names of disks as somebody
 * wrote them, right or wrong, with words of a message around them, perhaps cut off: so nothing is
 * parsed. We look for what can begin a secret, in every spelling that a reader of JSON, of image
 * options or of a URL takes for it, and where its end is in doubt we hide more rather than less. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"

#define BACKSLASHES 15u /* before a character that are looked at: JSON four times inside JSON */

static const char *const secret_keys[] = {"password", "cookie"};

#define N_KEYS (sizeof(secret_keys) / sizeof(secret_keys[0]))

/* Three stars in the place of n bytes, or fewer if it had fewer. What is behind them. */
static char *put_stars(char *at, size_t n)
{
    size_t stars = n < 3 ? n : 3;
    memset(at, '*', stars);
    memmove(at + stars, at + n, strlen(at + n) + 1);
    return at + stars;
}

/* ------------------------------------------------------------------ characters */

static int hex(const char *p, size_t digits)
{
    int v = 0;
    for (; digits > 0; digits--, p++) {
        if (!isxdigit((unsigned char)*p))
            return -1;
        v = 16 * v +
            (isdigit((unsigned char)*p) ? *p - '0' : tolower((unsigned char)*p) - 'a' + 10);
    }
    return v;
}

/* Does the text begin with this character of ASCII, as itself, as \u00XX or behind backslashes?
 * JSON inside a text of JSON has several. How many bytes that takes; 0 = no. */
static size_t is_char(const char *text, char c)
{
    size_t n = 0;
    while (n < BACKSLASHES && text[n] == '\\')
        n++;
    if (n > 0 && text[n] == 'u' && hex(text + n + 1, 4) == c)
        return n + 5;
    return text[n] == c ? n + 1 : 0;
}

static size_t is_word(const char *text, const char *word)
{
    size_t n = 0, step = 1;
    for (; *word && step > 0; word++) {
        step = is_char(text + n, *word);
        n += step;
    }
    return step > 0 ? n : 0;
}

static size_t is_quote(const char *text)
{
    size_t n = is_char(text, '"');
    return n > 0 ? n : is_char(text, '\'');
}

/* ------------------------------------------------------------------ values */

/* Up to the closing quote of a text in JSON whose opening quote stands behind so many backslashes:
 * texts inside texts escape theirs again. Without one, up to the end. */
static size_t quoted_len(const char *text, char quote, size_t backslashes)
{
    size_t n = 0;
    for (; text[n]; n++) {
        size_t run = strspn(text + n, "\\");
        n += run;
        if (!text[n])
            break;
        if (text[n] == quote && run % (2 * (backslashes + 1)) == backslashes)
            return n - backslashes; /* run is no less */
    }
    return n;
}

/* A value of JSON that is no text, such as a number or an array. */
static size_t bare_len(const char *text)
{
    size_t n = 0, depth = 0;
    for (; text[n]; n++) {
        if (strchr("[{", text[n]))
            depth++;
        else if (depth == 0 && strchr(",]}", text[n]))
            break;
        else if (strchr("]}", text[n]))
            depth--;
    }
    return n;
}

static char *hide_json_value(char *at)
{
    size_t backslashes = strspn(at, "\\");
    char quote = at[backslashes];
    if (quote != '"' && quote != '\'')
        return put_stars(at, bare_len(at));
    at += backslashes + 1;
    return put_stars(at, quoted_len(at, quote, backslashes));
}

/* In image options a comma that belongs to the value is doubled. In a message the value ends with
 * the quotes that are around it or a space; in a URL with the next '&'. */
static size_t option_len(const char *text)
{
    size_t n = 0;
    if (*text == '"')
        return 1 + quoted_len(text + 1, '"', 0);
    for (; text[n] && !strchr("&' ", text[n]); n++) {
        if (text[n] == ',' && text[n + 1] != ',')
            break;
        n += text[n] == ',';
    }
    return n;
}

/* Behind a key. Where the text goes on. */
static char *hide_value(char *at)
{
    static const char blank[] = " \t\r\n";
    if (*at == '=')
        return put_stars(at + 1, option_len(at + 1));
    size_t quote = is_quote(at), n = quote + strspn(at + quote, blank);
    if (quote == 0 || at[n] != ':')
        return at;
    n += 1 + strspn(at + n + 1, blank);
    return hide_json_value(at + n);
}

static void hide_values(char *text)
{
    while (*text) {
        size_t n = 0;
        for (size_t i = 0; i < N_KEYS && n == 0; i++)
            n = is_word(text, secret_keys[i]);
        text = n > 0 ? hide_value(text + n) : text + 1;
    }
}

/* ------------------------------------------------------------------ URLs */

/* The '@' behind user and password, or NULL. A password that should have been escaped may hold what
 * ends the part of a URL that has the host; but "host:8080/x@y" has none. */
static char *user_end(char *at)
{
    size_t n = strcspn(at, "/?#'\" "), colon = strcspn(at, ":");
    char *end = memrchr(at, '@', n);
    if (end || colon >= n || *at == '[' || strspn(at + colon + 1, "0123456789") == n - colon - 1)
        return end;
    return memrchr(at + n, '@', strcspn(at + n, " "));
}

static void hide_users(char *text)
{
    for (char *at = text; (at = strchr(at, ':'));) {
        size_t first = is_char(++at, '/'), second = first ? is_char(at + first, '/') : 0;
        if (second == 0)
            continue;
        at += first + second;
        char *end = user_end(at), *colon = end ? memchr(at, ':', (size_t)(end - at)) : NULL;
        if (colon)
            at = put_stars(colon + 1, (size_t)(end - colon) - 1);
    }
}

/* ------------------------------------------------------------------ whole texts */

void dr_hide_secrets(char *text)
{
    hide_users(text);
    hide_values(text);
}

/* Is it the name of an option that holds a secret, n bytes long? */
static bool is_secret(const char *name, size_t n)
{
    const char *dot = memrchr(name, '.', n), *key = dot ? dot + 1 : name;
    size_t len = n - (size_t)(key - name);
    bool is = false;
    for (size_t i = 0; i < N_KEYS; i++)
        is = is || (len == strlen(secret_keys[i]) && memcmp(key, secret_keys[i], len) == 0);
    return is;
}

bool dr_is_secret(const char *name)
{
    return is_secret(name, strlen(name));
}

void dr_hide_option_secrets(char *text)
{
    for (char *at = text; *at; at += *at == ',') {
        size_t name = strcspn(at, "=,"), n = name + (at[name] == '=');
        while (at[n] && (at[n] != ',' || at[n + 1] == ','))
            n += at[n] == ',' ? 2 : 1;
        at = at[name] == '=' && is_secret(at, name) ? put_stars(at + name + 1, n - name - 1)
                                                    : at + n;
    }
    dr_hide_secrets(text);
}

/* ------------------------------------------------------------------ names */

/* True: there were some. */
static bool drop_secrets(json_t *value)
{
    const char *key;
    json_t *item;
    void *next;
    size_t i;
    bool any = false;
    json_object_foreach_safe(value, next, key, item)
    {
        if (dr_is_secret(key) && json_object_del(value, key) == 0)
            any = true;
        else
            any |= drop_secrets(item);
    }
    json_array_foreach(value, i, item) any |= drop_secrets(item);
    return any;
}

char *dr_without_secrets(const char *name)
{
    json_t *root = strncmp(name, "json:", 5) == 0 ? json_loads(name + 5, 0, NULL) : NULL;
    CLEANUP_FREE char *text = NULL;
    char *out = NULL;
    if (!root || !drop_secrets(root)) {
        json_decref(root);
        return strdup(name);
    }
    text = dr_json_dump(root, JSON_COMPACT);
    json_decref(root);
    return text && asprintf(&out, "json:%s", text) >= 0 ? out : NULL;
}
