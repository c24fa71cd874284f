/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdarg.h>
#include <gcrypt.h>

#include "base/loaded.h"

#define VARIADIC(F) F(gcry_error_t, gcry_control, (enum gcry_ctl_cmds cmd, ...), )

#define FUNCTIONS(F)                                                                              \
    F(const char *, gcry_check_version, (const char *least), (least))                             \
    F(void, gcry_cipher_close, (gcry_cipher_hd_t h), (h))                                         \
    F(gcry_error_t, gcry_cipher_decrypt,                                                          \
      (gcry_cipher_hd_t h, void *out, size_t out_len, const void *in, size_t in_len),             \
      (h, out, out_len, in, in_len))                                                              \
    F(gcry_error_t, gcry_cipher_encrypt,                                                          \
      (gcry_cipher_hd_t h, void *out, size_t out_len, const void *in, size_t in_len),             \
      (h, out, out_len, in, in_len))                                                              \
    F(gcry_error_t, gcry_cipher_open, (gcry_cipher_hd_t * h, int algo, int mode, unsigned flags), \
      (h, algo, mode, flags))                                                                     \
    F(gcry_error_t, gcry_cipher_setiv, (gcry_cipher_hd_t h, const void *iv, size_t len),          \
      (h, iv, len))                                                                               \
    F(gcry_error_t, gcry_cipher_setkey, (gcry_cipher_hd_t h, const void *key, size_t len),        \
      (h, key, len))                                                                              \
    F(gcry_error_t, gcry_kdf_derive,                                                              \
      (const void *phrase, size_t phrase_len, int algo, int sub_algo, const void *salt,           \
       size_t salt_len, unsigned long rounds, size_t out_len, void *out),                         \
      (phrase, phrase_len, algo, sub_algo, salt, salt_len, rounds, out_len, out))                 \
    F(void, gcry_md_hash_buffer, (int algo, void *out, const void *in, size_t len),               \
      (algo, out, in, len))                                                                       \
    F(const char *, gcry_strerror, (gcry_error_t code), (code))

DR_LOADED_LIBRARY(gcrypt, DR_SONAME_GCRYPT, FUNCTIONS, VARIADIC)

/* The commands that are used here have one argument or none. */
gcry_error_t gcry_control(enum gcry_ctl_cmds cmd, ...)
{
    va_list rest;
    va_start(rest, cmd);
    int value = va_arg(rest, int);
    va_end(rest);
    return real_gcry_control(cmd, value);
}
