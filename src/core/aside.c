/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "core/aside.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/cleanup.h"
#include "base/random.h"
#include "storage/storage.h"

#define RANDOM_CHARS 6
#define HASH_CHARS   16

static const char random_chars[] = "abcdefghijklmnopqrstuvwxyz0123456789";
static const char hash_chars[] = "0123456789abcdef";

static char *make_name(const char *base, const char *mark, const char *dash, const char *random)
{
    char *name;
    size_t len = strlen(base), extra = strlen("..~") + strlen(mark) + strlen(random);
    if (len + extra <= NAME_MAX)
        return asprintf(&name, ".%s.%s%s%s", base, mark, dash, random) < 0 ? NULL : name;
    size_t keep = NAME_MAX - extra - HASH_CHARS;
    /* Some file systems refuse names that are no UTF-8: do not cut inside of a character. */
    while (keep > 1 && ((unsigned char)base[keep] & 0xc0) == 0x80)
        keep--;
    uint64_t hash = XXH3_64bits(base, len);
    return asprintf(&name, ".%.*s.%s~%016" PRIx64 "%s", (int)keep, base, mark, hash, random) < 0
               ? NULL
               : name;
}

char *dr_aside_name(const char *base, const char *mark)
{
    char random[RANDOM_CHARS + 1];
    dr_random_text(random, RANDOM_CHARS);
    return make_name(base, mark, "-", random);
}

char *dr_aside_fixed_name(const char *base, const char *mark)
{
    return make_name(base, mark, "", "");
}

char *dr_aside_path(const char *path, const char *mark)
{
    CLEANUP_FREE char *name = dr_aside_name(dr_path_basename(path), mark);
    return name ? dr_path_sibling(path, name) : NULL;
}

/* Parses from behind the mark's dot and fills all of a but the stem. Returns where the name ends,
 * or NULL if there is no mark. */
static const char *parse_tail(const char *at, const char *mark, struct dr_aside *a)
{
    char digits[HASH_CHARS + 1];
    size_t n = strlen(mark);
    if (strncmp(at, mark, n) != 0 || (at[n] != '-' && at[n] != '~'))
        return NULL;
    a->cut = at[n] == '~';
    at += n + 1;
    a->hash = 0;
    if (a->cut) {
        if (strspn(at, hash_chars) < HASH_CHARS)
            return NULL;
        memcpy(digits, at, HASH_CHARS);
        digits[HASH_CHARS] = 0;
        a->hash = strtoull(digits, NULL, 16);
        at += HASH_CHARS;
    }
    n = strnlen(at, RANDOM_CHARS);
    return n == RANDOM_CHARS && strspn(at, random_chars) >= n ? at + n : NULL;
}

bool dr_aside_parse(const char *name, const char *mark, struct dr_aside *a)
{
    if (name[0] != '.' || name[1] == 0)
        return false;
    for (const char *dot = strchr(name + 2, '.'); dot; dot = strchr(dot + 1, '.')) {
        a->end = parse_tail(dot + 1, mark, a);
        if (!a->end || *a->end)
            continue;
        a->stem = name + 1;
        a->stem_len = (size_t)(dot - a->stem);
        return true;
    }
    return false;
}

bool dr_aside_is_of(const struct dr_aside *a, const char *base)
{
    size_t len = strlen(base);
    if (strncmp(base, a->stem, a->stem_len) != 0)
        return false;
    return a->cut ? len > a->stem_len && XXH3_64bits(base, len) == a->hash : len == a->stem_len;
}

/* A path in a message begins at the start of the text, behind a slash, a quote or ": ". */
static bool begins_component(const char *text, const char *at)
{
    return at == text || strchr("/'\"", at[-1]) || (at - text >= 2 && memcmp(at - 2, ": ", 2) == 0);
}

/* Find the beginning of the name whose mark's dot is at mark. The name itself may hold quotes. */
static char *name_start(char *text, char *mark)
{
    char *at = mark - (mark > text);
    while (at > text && !(*at == '.' && begins_component(text, at)))
        at--;
    return at;
}

void dr_aside_hide(char *text, const char *mark, const char *base)
{
    struct dr_aside a;
    char *dot = strchr(text, '.');
    while (dot) {
        const char *end = parse_tail(dot + 1, mark, &a);
        char *start = end ? name_start(text, dot) : NULL;
        if (!start || *start != '.' || start == dot) {
            dot = strchr(dot + 1, '.');
            continue;
        }
        a.stem = start + 1;
        a.stem_len = (size_t)(dot - a.stem);
        size_t keep = a.stem_len;
        if (*end == '/') { /* DIR/FILE */
            keep = 0;
            end++;
        } else if (base && dr_aside_is_of(&a, base)) { /* never longer than what stands there */
            keep = strlen(base);
            memcpy(start, base, keep);
        } else {
            memmove(start, start + 1, keep);
        }
        memmove(start + keep, end, strlen(end) + 1);
        dot = strchr(start, '.');
    }
}
