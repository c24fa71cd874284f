/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The manifest of a machine: the digests of its files, one a line, "SHA256(disk1.vmdk)= 0123...".
 * Whether it was made by whom it seems to be, a certificate would say, which is not looked at. */
#ifndef DR_ARCHIVE_OVA_MANIFEST_H
#define DR_ARCHIVE_OVA_MANIFEST_H

#include "archive/ova.h"

#define OVA_DIGEST_MAX 64u /* bytes: SHA-512 */

enum ova_digest_kind { OVA_SHA1, OVA_SHA256, OVA_SHA512 };

struct ova_digest {
    char *name; /* of the file */
    enum ova_digest_kind kind;
    uint8_t value[OVA_DIGEST_MAX];
};

struct ova_manifest {
    char *name; /* of its file; NULL: there is none */
    struct ova_digest *all;
    size_t n;
    bool has_certificate;
};

/* The lines of a text; name: for messages. End with ova_manifest_free(), also after a failure. */
int ova_manifest_parse(const char *name, const char *text, size_t len, struct ova_manifest *m,
                       struct dr_error *err);
/* The machine's. */
int ova_manifest_read(const struct ova *ova, struct ova_manifest *m, struct dr_error *err);
void ova_manifest_free(struct ova_manifest *m);

const char *ova_digest_name(enum ova_digest_kind kind); /* "SHA256" */
size_t ova_digest_len(enum ova_digest_kind kind);       /* bytes */
/* Two hex digits a byte, and a zero. */
void ova_digest_text(const struct ova_digest *d, char text[2 * OVA_DIGEST_MAX + 1]);

/* The digest that the manifest has for a file or piece of this name, or NULL. */
const struct ova_digest *ova_manifest_find(const struct ova_manifest *m, const char *name);
/* Does the file have the digest? -EBADMSG: it has another one, *d is what it has. stop as in
 * struct dr_create_params. */
int ova_digest_check(const struct ova *ova, const struct ova_digest *want, struct ova_digest *have,
                     struct dr_error *err);

/* Sums what is fed to it. */
struct ova_summing;
struct ova_summing *ova_summing_new(enum ova_digest_kind kind); /* NULL = out of memory */
void ova_summing_add(struct ova_summing *s, const void *buf, size_t len);
/* Frees it; either may be NULL. false: the digest could not be computed, and *d is none. */
bool ova_summing_end(struct ova_summing *s, struct ova_digest *d);

#endif
