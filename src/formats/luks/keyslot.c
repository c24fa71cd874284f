/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Passwords, and the stripes that a key slot keeps the disk's key in.
 *
 * Splitting takes random stripes and chooses the last one so that all of them, folded, give the
 * key: after each stripe but the last the sum so far is diffused, each piece as long as a digest by
 * the digest of its number and itself. */
#include "formats/luks/header.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/secret.h"

/* ------------------------------------------------------------------ stripes */

static int diffuse(const char *hash, uint8_t *key, size_t key_len, struct dr_error *err)
{
    uint8_t in[4 + DR_HASH_MAX], out[DR_HASH_MAX];
    size_t step = dr_hash_length(hash);
    int r = 0;
    for (size_t at = 0, i = 0; r == 0 && at < key_len; at += step, i++) {
        size_t n = dr_min(step, key_len - at);
        put_be32(in, (uint32_t)i);
        memcpy(in + 4, key + at, n);
        r = dr_hash(hash, in, 4 + n, out, err);
        memcpy(key + at, out, n);
    }
    explicit_bzero(in, sizeof(in));
    explicit_bzero(out, sizeof(out));
    return r;
}

/* All stripes but the last, folded. */
static int fold(const char *hash, const uint8_t *stripes, size_t key_len, uint8_t *sum,
                struct dr_error *err)
{
    int r = 0;
    memset(sum, 0, key_len);
    for (size_t i = 0; r == 0 && i + 1 < LUKS_STRIPES; i++) {
        for (size_t j = 0; j < key_len; j++)
            sum[j] ^= stripes[i * key_len + j];
        r = diffuse(hash, sum, key_len, err);
    }
    return r;
}

int luks_merge(const char *hash, const uint8_t *stripes, size_t key_len, uint8_t *key,
               struct dr_error *err)
{
    const uint8_t *last = stripes + (size_t)(LUKS_STRIPES - 1) * key_len;
    int r = fold(hash, stripes, key_len, key, err);
    for (size_t j = 0; j < key_len; j++)
        key[j] ^= last[j];
    return r;
}

int luks_split(const char *hash, const uint8_t *key, size_t key_len, uint8_t *stripes,
               struct dr_error *err)
{
    uint8_t *last = stripes + (size_t)(LUKS_STRIPES - 1) * key_len;
    int r = dr_key_random(stripes, (size_t)(LUKS_STRIPES - 1) * key_len, err);
    if (r == 0)
        r = fold(hash, stripes, key_len, last, err);
    for (size_t j = 0; j < key_len; j++)
        last[j] ^= key[j];
    return r;
}

/* ------------------------------------------------------------------ unlocking */

/* Everything that must not be left in memory, in one piece that is wiped. */
struct keys {
    uint8_t slot[DR_CIPHER_KEY_MAX], disk[DR_CIPHER_KEY_MAX];
    uint8_t digest[LUKS_DIGEST];
};

struct unlocking {
    const struct luks_header *h;
    struct dr_file *f;
    uint64_t at;
    const char *path;
    const void *password;
    size_t password_len;
    struct keys *keys;
    uint8_t *stripes;
    size_t stripes_len; /* whole sectors */
};

/* 1: the password is not this slot's. */
static int try_slot(const struct unlocking *u, const struct luks_slot *slot, struct dr_error *err)
{
    const struct luks_header *h = u->h;
    struct dr_cipher *cipher = NULL;
    int r = dr_file_pread(u->f, u->stripes, u->at + slot->at, u->stripes_len, err);
    if (r == 0)
        r = dr_pbkdf2(h->hash, u->password, u->password_len, slot->salt, LUKS_SALT,
                      slot->iterations, u->keys->slot, h->key_len, err);
    if (r == 0)
        r = dr_cipher_new(h->cipher, h->mode, u->keys->slot, h->key_len, u->path, &cipher, err);
    if (r == 0)
        r = dr_cipher_decrypt(cipher, 0, u->stripes, u->stripes_len);
    dr_cipher_free(cipher);
    if (r == 0)
        r = luks_merge(h->hash, u->stripes, h->key_len, u->keys->disk, err);
    if (r == 0)
        r = dr_pbkdf2(h->hash, u->keys->disk, h->key_len, h->salt, LUKS_SALT, h->iterations,
                      u->keys->digest, LUKS_DIGEST, err);
    return r < 0 ? r : memcmp(u->keys->digest, h->digest, LUKS_DIGEST) != 0;
}

static int try_slots(const struct unlocking *u, struct dr_cipher **cipher, struct dr_error *err)
{
    const struct luks_header *h = u->h;
    int r = 1;
    for (unsigned i = 0; r == 1 && i < LUKS_SLOTS; i++)
        if (h->slots[i].active)
            r = try_slot(u, &h->slots[i], err);
    if (r == 1)
        return dr_fail(err, EACCES, "%s: Invalid password, cannot unlock any keyslot", u->path);
    if (r < 0)
        return r;
    return dr_cipher_new(h->cipher, h->mode, u->keys->disk, h->key_len, u->path, cipher, err);
}

static int check_known(const struct luks_header *h, const char *path, struct dr_error *err)
{
    if (dr_hash_length(h->hash))
        return dr_cipher_check(h->cipher, h->mode, h->key_len, path, err);
    return dr_fail(err, ENOTSUP, "%s: the hash %s of its LUKS header is not known to this version",
                   path, h->hash);
}

int luks_unlock(const struct luks_header *h, struct dr_file *f, uint64_t at, const char *secret,
                const char *path, struct dr_cipher **cipher, struct dr_error *err)
{
    void *password = NULL;
    size_t len = 0;
    int r = check_known(h, path, err);
    if (r == 0)
        r = dr_secret_get(secret, path, &password, &len, err);
    if (r < 0)
        return r;
    struct unlocking u = {
        .h = h, .f = f, .at = at, .path = path, .password = password, .password_len = len};
    u.stripes_len = dr_round_up((size_t)h->key_len * LUKS_STRIPES, DR_CIPHER_SECTOR);
    u.keys = dr_key_alloc(sizeof(*u.keys));
    u.stripes = dr_key_alloc(u.stripes_len);
    r = u.keys && u.stripes ? try_slots(&u, cipher, err)
                            : dr_fail(err, ENOMEM, "%s: out of memory", path);
    dr_key_free(u.keys, sizeof(*u.keys));
    dr_key_free(u.stripes, u.stripes_len);
    dr_key_free(password, len);
    return r;
}
