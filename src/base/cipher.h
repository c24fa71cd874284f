/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Encryption of disks: sectors of 512 bytes, each by itself and under its own number, and what
 * makes keys out of passwords. libgcrypt does the work; it is loaded when the first function here
 * is called that needs it.
 *
 * Names are those that LUKS headers have: cipher "aes", mode "xts-plain64", hash "sha256".
 * Thread safety: all may be called by many threads at once, also for one cipher. */
#ifndef DR_BASE_CIPHER_H
#define DR_BASE_CIPHER_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define DR_CIPHER_SECTOR  512u
#define DR_CIPHER_KEY_MAX 64u /* bytes of a key */
#define DR_HASH_MAX       64u /* bytes of a digest */

struct dr_cipher;

/* -ENOTSUP: there is no such cipher, mode or length of key (in bytes, with both halves of XTS)
 * here. what: the name of the file, for messages. */
int dr_cipher_check(const char *cipher, const char *mode, size_t key_len, const char *what,
                    struct dr_error *err);
/* The same, and a cipher with this key, of which it keeps a copy in memory that is not swapped out,
 * as far as the system allows that. */
int dr_cipher_new(const char *cipher, const char *mode, const uint8_t *key, size_t key_len,
                  const char *what, struct dr_cipher **out, struct dr_error *err);
/* Wipes the key. NULL allowed. */
void dr_cipher_free(struct dr_cipher *c);
/* In place, whole sectors; `sector` is the number of the first one. 0, -ENOMEM, or -EIO, which does
 * not happen. */
int dr_cipher_encrypt(struct dr_cipher *c, uint64_t sector, uint8_t *buf, size_t len);
int dr_cipher_decrypt(struct dr_cipher *c, uint64_t sector, uint8_t *buf, size_t len);

/* Bytes of a digest; 0: no such hash here. */
size_t dr_hash_length(const char *hash);
/* out has room for a digest. The hash exists. */
int dr_hash(const char *hash, const void *in, size_t len, uint8_t *out, struct dr_error *err);
/* PBKDF2 with HMAC. The hash exists. */
int dr_pbkdf2(const char *hash, const void *password, size_t len, const uint8_t *salt,
              size_t salt_len, uint64_t iterations, uint8_t *out, size_t out_len,
              struct dr_error *err);
/* How many iterations of that for out_len bytes take so many milliseconds of this processor. */
int dr_pbkdf2_iterations(const char *hash, size_t out_len, uint64_t ms, uint64_t *iterations,
                         struct dr_error *err);

/* Random bytes for keys: from the kernel or not at all. */
int dr_key_random(uint8_t *out, size_t len, struct dr_error *err);

/* Memory for keys: zeroed, not swapped out where the system allows that, and wiped when freed. NULL
 * = out of memory. */
void *dr_key_alloc(size_t len);
void dr_key_free(void *key, size_t len); /* NULL allowed */

#endif
