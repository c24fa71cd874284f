/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Handles of libgcrypt have a state (the number of the sector), so each request takes one of its
 * own out of a list, which grows to as many as are at work at once. */
#include "base/cipher.h"

#include <assert.h>
#include <gcrypt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/loaded.h"

#define BLOCK_MAX 16u

enum iv { IV_NONE, IV_PLAIN, IV_PLAIN64, IV_ESSIV };

/* What a cipher and a mode mean in libgcrypt's terms. */
struct kind {
    int algo, mode;
    size_t block;
    enum iv iv;
    const char *hash; /* ESSIV: that makes the key of the numbers; behind a name's colon */
    int iv_algo;      /* ESSIV: the cipher with a key as long as that hash */
};

struct handle {
    gcry_cipher_hd_t data, iv;
    struct handle *next;
};

struct dr_cipher {
    struct kind kind;
    pthread_mutex_t lock; /* of idle */
    struct handle *idle;
    uint8_t *key; /* by dr_key_alloc */
    size_t key_len;
    uint8_t iv_key[DR_HASH_MAX];
    size_t iv_key_len;
};

/* ------------------------------------------------------------------ memory */

void *dr_key_alloc(size_t len)
{
    void *key = NULL;
    if (posix_memalign(&key, 4096, dr_round_up(len, 4096)) != 0)
        return NULL;
    memset(key, 0, len);
    mlock(key, len); /* if it may not be locked, it works all the same */
    return key;
}

void dr_key_free(void *key, size_t len)
{
    if (!key)
        return;
    explicit_bzero(key, len);
    munlock(key, len);
    free(key);
}

int dr_key_random(uint8_t *out, size_t len, struct dr_error *err)
{
    for (size_t n = 0; n < len; n += dr_min(len - n, 256))
        if (getentropy(out + n, dr_min(len - n, 256)) < 0)
            return dr_fail_errno(err, errno, "no random bytes for a key");
    return 0;
}

/* ------------------------------------------------------------------ the library */

/* Once in a process, unless somebody else has done it. */
static void initialise(void)
{
    if (gcry_control(GCRYCTL_INITIALIZATION_FINISHED_P, 0))
        return;
    gcry_check_version(NULL);
    gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
    gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
}

static int need_library(struct dr_error *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int r = dr_load_gcrypt(err);
    if (r == 0)
        pthread_once(&once, initialise);
    return r;
}

static int failed(gcry_error_t code, const char *what, struct dr_error *err)
{
    return dr_fail(err, EIO, "%s: libgcrypt: %s", what, gcry_strerror(code));
}

/* ------------------------------------------------------------------ hashes */

static const struct {
    const char *name;
    int algo;
    size_t len;
} hashes[] = {
    {"md5", GCRY_MD_MD5, 16},          {"sha1", GCRY_MD_SHA1, 20},
    {"sha224", GCRY_MD_SHA224, 28},    {"sha256", GCRY_MD_SHA256, 32},
    {"sha384", GCRY_MD_SHA384, 48},    {"sha512", GCRY_MD_SHA512, 64},
    {"ripemd160", GCRY_MD_RMD160, 20},
};

static int hash_algo(const char *name, size_t *len)
{
    for (size_t i = 0; i < sizeof(hashes) / sizeof(hashes[0]); i++)
        if (strcasecmp(hashes[i].name, name) == 0) {
            *len = hashes[i].len;
            return hashes[i].algo;
        }
    *len = 0;
    return 0;
}

size_t dr_hash_length(const char *hash)
{
    size_t len;
    hash_algo(hash, &len);
    return len;
}

int dr_hash(const char *hash, const void *in, size_t len, uint8_t *out, struct dr_error *err)
{
    size_t out_len;
    int algo = hash_algo(hash, &out_len), r = need_library(err);
    if (r == 0)
        gcry_md_hash_buffer(algo, out, in, len);
    return r;
}

int dr_pbkdf2(const char *hash, const void *password, size_t len, const uint8_t *salt,
              size_t salt_len, uint64_t iterations, uint8_t *out, size_t out_len,
              struct dr_error *err)
{
    size_t hash_len;
    int algo = hash_algo(hash, &hash_len), r = need_library(err);
    if (r < 0)
        return r;
    gcry_error_t code = gcry_kdf_derive(password, len, GCRY_KDF_PBKDF2, algo, salt, salt_len,
                                        (unsigned long)iterations, out_len, out);
    return code ? failed(code, "a password", err) : 0;
}

static uint64_t thread_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int dr_pbkdf2_iterations(const char *hash, size_t out_len, uint64_t ms, uint64_t *iterations,
                         struct dr_error *err)
{
    static const uint8_t salt[32] = {1};
    uint8_t out[DR_CIPHER_KEY_MAX];
    uint64_t n = 1 << 10, took = 0;
    int r = 0;
    out_len = dr_min(out_len, sizeof(out));
    for (; r == 0 && n < (1u << 30); n *= 2) {
        uint64_t begin = thread_ns();
        r = dr_pbkdf2(hash, "password", 8, salt, sizeof(salt), n, out, out_len, err);
        took = dr_max(thread_ns() - begin, 1);
        if (took > 10000000) /* long enough to be told from the clock's steps */
            break;
    }
    double each = (double)took / (double)n;
    *iterations = (uint64_t)((double)ms * 1e6 / each);
    return r;
}

/* ------------------------------------------------------------------ which cipher */

static const struct {
    const char *name;
    size_t key; /* bytes */
    int algo;
    size_t block;
} ciphers[] = {
    {"aes", 16, GCRY_CIPHER_AES128, 16},         {"aes", 24, GCRY_CIPHER_AES192, 16},
    {"aes", 32, GCRY_CIPHER_AES256, 16},         {"cast5", 16, GCRY_CIPHER_CAST5, 8},
    {"serpent", 16, GCRY_CIPHER_SERPENT128, 16}, {"serpent", 24, GCRY_CIPHER_SERPENT192, 16},
    {"serpent", 32, GCRY_CIPHER_SERPENT256, 16}, {"twofish", 16, GCRY_CIPHER_TWOFISH128, 16},
    {"twofish", 32, GCRY_CIPHER_TWOFISH, 16},
};

/* 0: none. */
static int cipher_algo(const char *name, size_t key, size_t *block)
{
    for (size_t i = 0; i < sizeof(ciphers) / sizeof(ciphers[0]); i++)
        if (strcmp(ciphers[i].name, name) == 0 && ciphers[i].key == key) {
            *block = ciphers[i].block;
            return ciphers[i].algo;
        }
    return 0;
}

/* "xts-plain64", "cbc-essiv:sha256", "ecb". False: not known. */
static bool parse_mode(const char *cipher, const char *mode, struct kind *k)
{
    size_t n = strcspn(mode, "-"), block;
    const char *iv = mode[n] ? mode + n + 1 : "";
    k->mode = n == 3 && strncmp(mode, "xts", n) == 0   ? GCRY_CIPHER_MODE_XTS
              : n == 3 && strncmp(mode, "cbc", n) == 0 ? GCRY_CIPHER_MODE_CBC
              : n == 3 && strncmp(mode, "ecb", n) == 0 ? GCRY_CIPHER_MODE_ECB
                                                       : 0;
    if (k->mode == GCRY_CIPHER_MODE_ECB) {
        k->iv = IV_NONE;
        return true;
    }
    if (strcmp(iv, "plain") == 0)
        k->iv = IV_PLAIN;
    else if (strcmp(iv, "plain64") == 0)
        k->iv = IV_PLAIN64;
    else if (strncmp(iv, "essiv:", 6) == 0)
        k->iv = IV_ESSIV;
    else
        return false;
    if (k->iv == IV_ESSIV) {
        k->hash = iv + 6;
        k->iv_algo = cipher_algo(cipher, dr_hash_length(k->hash), &block);
    }
    return k->mode && (k->iv != IV_ESSIV || k->iv_algo);
}

static int find_kind(const char *cipher, const char *mode, size_t key_len, const char *what,
                     struct kind *k, struct dr_error *err)
{
    *k = (struct kind){0};
    bool known = parse_mode(cipher, mode, k), xts = k->mode == GCRY_CIPHER_MODE_XTS;
    if (known && !(xts && key_len % 2))
        k->algo = cipher_algo(cipher, xts ? key_len / 2 : key_len, &k->block);
    if (k->algo && !(xts && k->block != 16))
        return 0;
    return dr_fail(err, ENOTSUP,
                   "%s: the cipher %s-%s with a key of %zu bytes is not known to this version",
                   what, cipher, mode, key_len);
}

int dr_cipher_check(const char *cipher, const char *mode, size_t key_len, const char *what,
                    struct dr_error *err)
{
    struct kind k;
    return find_kind(cipher, mode, key_len, what, &k, err);
}

/* ------------------------------------------------------------------ handles */

static void handle_free(struct handle *h)
{
    gcry_cipher_close(h->data); /* wipes; NULL allowed */
    gcry_cipher_close(h->iv);
    free(h);
}

static gcry_error_t open_keyed(gcry_cipher_hd_t *h, int algo, int mode, const uint8_t *key,
                               size_t len)
{
    gcry_error_t code = gcry_cipher_open(h, algo, mode, 0);
    return code ? code : gcry_cipher_setkey(*h, key, len);
}

static gcry_error_t handle_new(const struct dr_cipher *c, struct handle **out)
{
    struct handle *h = calloc(1, sizeof(*h));
    if (!h)
        return gcry_error(GPG_ERR_ENOMEM);
    gcry_error_t code = open_keyed(&h->data, c->kind.algo, c->kind.mode, c->key, c->key_len);
    if (!code && c->kind.iv == IV_ESSIV)
        code = open_keyed(&h->iv, c->kind.iv_algo, GCRY_CIPHER_MODE_ECB, c->iv_key, c->iv_key_len);
    if (code)
        handle_free(h);
    else
        *out = h;
    return code;
}

static gcry_error_t take_handle(struct dr_cipher *c, struct handle **h)
{
    pthread_mutex_lock(&c->lock);
    *h = c->idle;
    if (*h)
        c->idle = (*h)->next;
    pthread_mutex_unlock(&c->lock);
    return *h ? 0 : handle_new(c, h);
}

static void give_back(struct dr_cipher *c, struct handle *h)
{
    DR_LOCK_SCOPE(&c->lock);
    h->next = c->idle;
    c->idle = h;
}

void dr_cipher_free(struct dr_cipher *c)
{
    if (!c)
        return;
    for (struct handle *h = c->idle, *next; h; h = next) {
        next = h->next;
        handle_free(h);
    }
    dr_key_free(c->key, c->key_len);
    explicit_bzero(c->iv_key, sizeof(c->iv_key));
    pthread_mutex_destroy(&c->lock);
    free(c);
}

int dr_cipher_new(const char *cipher, const char *mode, const uint8_t *key, size_t key_len,
                  const char *what, struct dr_cipher **out, struct dr_error *err)
{
    struct kind kind;
    struct handle *first = NULL;
    int r = find_kind(cipher, mode, key_len, what, &kind, err);
    if (r == 0)
        r = need_library(err);
    if (r < 0)
        return r;
    struct dr_cipher *c = calloc(1, sizeof(*c));
    if (!c)
        return dr_fail(err, ENOMEM, "%s: out of memory", what);
    pthread_mutex_init(&c->lock, NULL);
    c->kind = kind;
    c->key_len = key_len;
    c->key = dr_key_alloc(key_len);
    r = c->key ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", what);
    if (r == 0)
        memcpy(c->key, key, key_len);
    if (r == 0 && kind.iv == IV_ESSIV) {
        c->iv_key_len = dr_hash_length(kind.hash);
        r = dr_hash(kind.hash, key, key_len, c->iv_key, err);
    }
    c->kind.hash = NULL; /* the caller's */
    gcry_error_t code = r == 0 ? take_handle(c, &first) : 0;
    if (r == 0 && code)
        r = failed(code, what, err);
    if (r < 0) {
        dr_cipher_free(c);
        return r;
    }
    assert(first);
    give_back(c, first);
    *out = c;
    return 0;
}

/* ------------------------------------------------------------------ sectors */

static gcry_error_t set_number(const struct dr_cipher *c, const struct handle *h, uint64_t sector)
{
    uint8_t iv[BLOCK_MAX] = {0};
    gcry_error_t code = 0;
    if (c->kind.iv == IV_NONE)
        return 0;
    put_le64(iv, c->kind.iv == IV_PLAIN ? (uint32_t)sector : sector);
    if (c->kind.iv == IV_ESSIV)
        code = gcry_cipher_encrypt(h->iv, iv, c->kind.block, NULL, 0);
    return code ? code : gcry_cipher_setiv(h->data, iv, c->kind.block);
}

static int convert(struct dr_cipher *c, uint64_t sector, uint8_t *buf, size_t len, bool encrypt)
{
    struct handle *h;
    gcry_error_t code = take_handle(c, &h);
    if (code)
        return -ENOMEM;
    for (size_t at = 0; !code && at < len; at += DR_CIPHER_SECTOR) {
        code = set_number(c, h, sector++);
        if (!code && encrypt)
            code = gcry_cipher_encrypt(h->data, buf + at, DR_CIPHER_SECTOR, NULL, 0);
        else if (!code)
            code = gcry_cipher_decrypt(h->data, buf + at, DR_CIPHER_SECTOR, NULL, 0);
    }
    give_back(c, h);
    return code ? -EIO : 0;
}

int dr_cipher_encrypt(struct dr_cipher *c, uint64_t sector, uint8_t *buf, size_t len)
{
    return convert(c, sector, buf, len, true);
}

int dr_cipher_decrypt(struct dr_cipher *c, uint64_t sector, uint8_t *buf, size_t len)
{
    return convert(c, sector, buf, len, false);
}
