/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Headers of new disks: the options of create, and the first key slot. */
#include "formats/luks/header.h"

#include <stdlib.h>
#include <string.h>
#include <uuid/uuid.h>

#include "base/bytes.h"
#include "base/secret.h"

#define SLOT_ALIGN     4096u
#define MIN_ITERATIONS 1000u
#define MAX_ITERATIONS (LUKS_MAX_ITERATIONS / 4) /* of one slot, so that others find room */

/* ------------------------------------------------------------------ options */

static int take_cipher(struct luks_options *o, const char *path, const char *value,
                       struct dr_error *err)
{
    static const struct {
        const char *name, *cipher;
        unsigned bits;
    } known[] = {
        {"aes-128", "aes", 128},         {"aes-192", "aes", 192},
        {"aes-256", "aes", 256},         {"cast5-128", "cast5", 128},
        {"serpent-128", "serpent", 128}, {"serpent-192", "serpent", 192},
        {"serpent-256", "serpent", 256}, {"twofish-128", "twofish", 128},
        {"twofish-256", "twofish", 256},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (strcmp(known[i].name, value) == 0) {
            o->cipher = known[i].cipher;
            o->bits = known[i].bits;
            return 0;
        }
    return dr_fail(err, EINVAL, "%s: invalid value '%s' for cipher-alg", path, value);
}

static int take_word(const char *path, const char *name, const char *value,
                     const char *const *words, const char **out, struct dr_error *err)
{
    for (; *words; words++)
        if (strcmp(*words, value) == 0) {
            *out = *words;
            return 0;
        }
    return dr_fail(err, EINVAL, "%s: invalid value '%s' for %s", path, value, name);
}

static int take_hash(const char *path, const char *name, const char *value, const char **out,
                     struct dr_error *err)
{
    static const char *const hashes[] = {"md5",    "sha1",   "sha224",    "sha256",
                                         "sha384", "sha512", "ripemd160", NULL};
    return take_word(path, name, value, hashes, out, err);
}

static int take_time(struct luks_options *o, const char *path, const char *value,
                     struct dr_error *err)
{
    size_t digits = strspn(value, "0123456789");
    if (digits == 0 || digits > 9 || value[digits] || strtoull(value, NULL, 10) == 0)
        return dr_fail(err, EINVAL, "%s: iter-time=%s is no number of milliseconds above 0", path,
                       value);
    o->iter_time = strtoull(value, NULL, 10);
    return 0;
}

int luks_take_option(struct luks_options *o, const char *path, const char *name, const char *value,
                     struct dr_error *err)
{
    static const char *const modes[] = {"xts", "cbc", "ecb", NULL};
    static const char *const ivgens[] = {"plain", "plain64", "essiv", NULL};
    if (strcmp(name, "key-secret") == 0)
        o->secret = value;
    else if (strcmp(name, "cipher-alg") == 0)
        return take_cipher(o, path, value, err);
    else if (strcmp(name, "cipher-mode") == 0)
        return take_word(path, name, value, modes, &o->mode, err);
    else if (strcmp(name, "ivgen-alg") == 0)
        return take_word(path, name, value, ivgens, &o->ivgen, err);
    else if (strcmp(name, "ivgen-hash-alg") == 0)
        return take_hash(path, name, value, &o->ivgen_hash, err);
    else if (strcmp(name, "hash-alg") == 0)
        return take_hash(path, name, value, &o->hash, err);
    else if (strcmp(name, "iter-time") == 0)
        return take_time(o, path, value, err);
    else
        return 1;
    return 0;
}

/* ------------------------------------------------------------------ layout */

static int check_secret(const struct luks_options *o, const char *path, const char *prefix,
                        struct dr_error *err)
{
    if (o->secret)
        return 0;
    return dr_fail(err, EINVAL, "%s: Parameter '%skey-secret' is required for cipher", path,
                   prefix);
}

int luks_plan(const struct luks_options *o, const char *path, const char *prefix,
              struct luks_header *h, struct dr_error *err)
{
    bool essiv = strcmp(o->ivgen, "essiv") == 0, xts = strcmp(o->mode, "xts") == 0;
    *h = (struct luks_header){.key_len = o->bits / 8 * (xts ? 2 : 1)};
    int r = check_secret(o, path, prefix, err);
    if (r < 0)
        return r;
    snprintf(h->cipher, sizeof(h->cipher), "%s", o->cipher);
    snprintf(h->mode, sizeof(h->mode), "%s-%s%s%s", o->mode, o->ivgen, essiv ? ":" : "",
             !essiv          ? ""
             : o->ivgen_hash ? o->ivgen_hash
                             : "sha256");
    snprintf(h->hash, sizeof(h->hash), "%s", o->hash);
    uint64_t slot = dr_round_up((uint64_t)h->key_len * LUKS_STRIPES, SLOT_ALIGN);
    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        h->slots[i].at = LUKS_FIRST_SLOT + i * slot;
    h->payload = LUKS_FIRST_SLOT + LUKS_SLOTS * slot;
    return dr_cipher_check(h->cipher, h->mode, h->key_len, path, err);
}

/* ------------------------------------------------------------------ keys */

static int choose_iterations(const struct luks_options *o, struct luks_header *h,
                             struct dr_error *err)
{
    uint64_t slot = 0, digest = 0;
    int r = dr_pbkdf2_iterations(h->hash, h->key_len, o->iter_time, &slot, err);
    if (r == 0) /* tried with each slot, so it may take an eighth of the time */
        r = dr_pbkdf2_iterations(h->hash, LUKS_DIGEST, dr_max(o->iter_time / LUKS_SLOTS, 1),
                                 &digest, err);
    if (r < 0)
        return r;
    h->slots[0].iterations = (uint32_t)dr_min(dr_max(slot, MIN_ITERATIONS), MAX_ITERATIONS);
    h->iterations = (uint32_t)dr_min(dr_max(digest, MIN_ITERATIONS), MAX_ITERATIONS);
    return 0;
}

struct new_keys {
    uint8_t disk[DR_CIPHER_KEY_MAX], slot[DR_CIPHER_KEY_MAX];
};

static int fill_slot(const struct luks_options *o, const char *path, struct luks_header *h,
                     struct new_keys *keys, uint8_t *stripes, struct dr_error *err)
{
    struct luks_slot *slot = &h->slots[0];
    size_t whole = dr_round_up((size_t)h->key_len * LUKS_STRIPES, DR_CIPHER_SECTOR);
    struct dr_cipher *cipher = NULL;
    void *password;
    size_t len;
    int r = dr_secret_get(o->secret, path, &password, &len, err);
    if (r < 0)
        return r;
    r = dr_pbkdf2(h->hash, password, len, slot->salt, LUKS_SALT, slot->iterations, keys->slot,
                  h->key_len, err);
    dr_key_free(password, len);
    if (r == 0)
        r = luks_split(h->hash, keys->disk, h->key_len, stripes, err);
    if (r == 0)
        r = dr_cipher_new(h->cipher, h->mode, keys->slot, h->key_len, path, &cipher, err);
    if (r == 0)
        r = dr_cipher_encrypt(cipher, 0, stripes, whole);
    dr_cipher_free(cipher);
    slot->active = r == 0;
    return r;
}

static void new_uuid(char *text)
{
    uuid_t uuid;
    uuid_generate_random(uuid);
    uuid_unparse_lower(uuid, text);
}

int luks_make(const struct luks_options *o, const char *path, struct luks_header *h, uint8_t *bytes,
              struct dr_error *err)
{
    struct new_keys *keys = dr_key_alloc(sizeof(*keys));
    int r = keys ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r == 0)
        r = choose_iterations(o, h, err);
    if (r == 0)
        r = dr_key_random(keys->disk, h->key_len, err);
    if (r == 0)
        r = dr_key_random(h->salt, LUKS_SALT, err);
    if (r == 0)
        r = dr_key_random(h->slots[0].salt, LUKS_SALT, err);
    if (r == 0)
        r = dr_pbkdf2(h->hash, keys->disk, h->key_len, h->salt, LUKS_SALT, h->iterations, h->digest,
                      LUKS_DIGEST, err);
    if (r == 0)
        r = fill_slot(o, path, h, keys, bytes + h->slots[0].at, err);
    dr_key_free(keys, sizeof(*keys));
    if (r < 0) {
        explicit_bzero(bytes, h->payload); /* half of what leads to a key */
        return r;
    }
    new_uuid(h->uuid);
    luks_encode(h, bytes);
    return 0;
}
