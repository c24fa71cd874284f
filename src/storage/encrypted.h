/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The plain bytes of what stands encrypted in a file.
 *
 * A file on a file: each sector of 512 bytes is decrypted when it is read and encrypted when it is
 * written, under its number, which is its offset here / 512. It has no descriptor, no holes and
 * nothing that copies past memory, so no short cut leads around the cipher. Zeros are written as
 * such, encrypted; a hole of the file below reads as noise.
 *
 * It has no end of its own: what lies behind the end of the file below reads as noise, too, and a
 * write there makes that file longer. */
#ifndef DR_STORAGE_ENCRYPTED_H
#define DR_STORAGE_ENCRYPTED_H

#include "base/cipher.h"
#include "storage/storage.h"

/* The bytes of `under` from `at` on, a multiple of 512. `under` stays the caller's, who keeps it
 * open, and for writing where the result is written to. Takes over the cipher, also on failure.
 * Ends with dr_file_unref(). */
int dr_encrypted_open(struct dr_file *under, uint64_t at, struct dr_cipher *cipher,
                      struct dr_file **file, struct dr_error *err);

#endif
