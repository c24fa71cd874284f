/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* LUKS version 1, wherever its header stands: in front of a disk, or inside a qcow2 image.
 *
 *   header     4096 bytes, 592 of them used: cipher, hash, where the payload begins, 8 key slots
 *   key slots  each holds the disk's key, spread over 4000 stripes and encrypted by a password
 *   payload    the disk; sector n of it is encrypted under its number
 *
 * A password and the slot's salt make a key, by PBKDF2; that decrypts the stripes, which merge into
 * the disk's key; and a digest in the header tells whether it is the right one. The stripes make
 * each bit of the key depend on all of the 250 KiB, so that a slot which is overwritten is gone
 * even if a disk keeps some of it. */
#ifndef DR_FORMATS_LUKS_HEADER_H
#define DR_FORMATS_LUKS_HEADER_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/cipher.h"
#include "formats/format.h"

#define LUKS_HEADER      592u  /* bytes that mean something */
#define LUKS_FIRST_SLOT  4096u /* no slot begins before that byte */
#define LUKS_SLOTS       8u
#define LUKS_STRIPES     4000u
#define LUKS_DIGEST      20u
#define LUKS_SALT        32u
#define LUKS_MAX_PAYLOAD (UINT64_C(64) << 20) /* bytes in front of it; others take 2 to 4 MiB */
/* Iterations of all slots together: some minutes. A header that asks for more is refused, so that
 * one which was made up does not keep a program busy for days. */
#define LUKS_MAX_ITERATIONS (UINT64_C(1) << 27)

struct luks_slot {
    bool active;
    uint32_t iterations;
    uint64_t at; /* bytes from the header on */
    uint8_t salt[LUKS_SALT];
};

struct luks_header {
    char cipher[33], mode[33], hash[33], uuid[41];
    uint64_t payload; /* bytes from the header on */
    uint32_t key_len;
    uint32_t iterations; /* of the digest */
    uint8_t digest[LUKS_DIGEST], salt[LUKS_SALT];
    struct luks_slot slots[LUKS_SLOTS];
};

bool luks_is_header(const uint8_t *buf, size_t len);
/* Of LUKS_HEADER bytes. -EINVAL: something in it cannot be; path: for messages. */
int luks_decode(const uint8_t *buf, const char *path, struct luks_header *h, struct dr_error *err);
void luks_encode(const struct luks_header *h, uint8_t *buf);
/* Read and decode the one at byte `at` of f, of which len bytes belong to it. */
int luks_read(struct dr_file *f, uint64_t at, uint64_t len, const char *path, struct luks_header *h,
              struct dr_error *err);

/* The payload's cipher, by the password that is the secret called `secret`. -EACCES: it opens no
 * slot. Takes as long as the slots' iterations. */
int luks_unlock(const struct luks_header *h, struct dr_file *f, uint64_t at, const char *secret,
                const char *path, struct dr_cipher **cipher, struct dr_error *err);

/* The keys of qemu-img info. */
int luks_info(const struct luks_header *h, json_t *data);

/* ------------------------------------------------------------------ new headers (make.c) */

struct luks_options {
    const char *secret; /* NULL: not given */
    const char *cipher; /* "aes"; key bits */
    unsigned bits;
    const char *mode, *ivgen, *ivgen_hash, *hash;
    uint64_t iter_time; /* milliseconds */
};

#define LUKS_DEFAULTS                                            \
    {                                                            \
        NULL, "aes", 256, "xts", "plain64", NULL, "sha256", 2000 \
    }

/* prefix: "" or "encrypt.". */
#define LUKS_OPTION_HELP(prefix)                                                                  \
    {prefix "cipher-alg", "str", "Name of encryption cipher algorithm", NULL},                    \
        {prefix "cipher-mode", "str", "Name of encryption cipher mode", NULL},                    \
        {prefix "hash-alg", "str", "Name of encryption hash algorithm", NULL},                    \
        {prefix "iter-time", "num", "Time to spend in PBKDF in milliseconds", NULL},              \
        {prefix "ivgen-alg", "str", "Name of IV generator algorithm", NULL},                      \
        {prefix "ivgen-hash-alg", "str", "Name of IV generator hash algorithm", NULL},            \
    {                                                                                             \
        prefix "key-secret", "str", "ID of the secret that provides the keyslot passphrase", NULL \
    }

/* name without a prefix. 1: it is none of these options. The strings stay the caller's. */
int luks_take_option(struct luks_options *o, const char *path, const char *name, const char *value,
                     struct dr_error *err);
/* Do the options go together? What the header says, without its keys; *len: bytes in front of the
 * payload. prefix: of the options, for messages. */
int luks_plan(const struct luks_options *o, const char *path, const char *prefix,
              struct luks_header *h, struct dr_error *err);
/* A new key for a new disk: bytes (h->payload of them, zeroed) get the header and its first slot.
 * Takes about o->iter_time. */
int luks_make(const struct luks_options *o, const char *path, struct luks_header *h, uint8_t *bytes,
              struct dr_error *err);

/* ------------------------------------------------------------------ keyslot.c, for tests, too */

/* key_len bytes, spread over stripes of as many bytes; random ones come out of `stripes`, but for
 * the last. */
int luks_split(const char *hash, const uint8_t *key, size_t key_len, uint8_t *stripes,
               struct dr_error *err);
int luks_merge(const char *hash, const uint8_t *stripes, size_t key_len, uint8_t *key,
               struct dr_error *err);

#endif
