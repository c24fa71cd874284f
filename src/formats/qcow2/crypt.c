/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Encrypted images. The header of LUKS stands in clusters of its own, to which an extension of the
 * header leads; metadata is plain; each sector of the guest's data is encrypted under the number
 * that it has in the file. So the map is that of any image, and the data is moved through a file
 * that encrypts (storage/encrypted.h) over the one that it stands in, at the same offsets. A
 * cluster that moves is encrypted anew, since it is copied through that file, too.
 *
 * Compressed clusters are never encrypted, and none is written. QEMU's older way to encrypt (AES
 * with the password itself as the key) is only recognised. */
#include "formats/luks/header.h"
#include "formats/qcow2/qcow2.h"

#include "storage/encrypted.h"

static int read_header(struct dr_image *image, struct luks_header *h, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    if (!q->crypto_at || q->crypto_at % q->cluster)
        return dr_fail(err, EINVAL,
                       "%s: is encrypted, and does not say where the header of the encryption is",
                       image->path);
    return luks_read(image->files[0], q->crypto_at, q->crypto_len, image->path, h, err);
}

static int refuse_aes(const struct dr_image *image, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP,
                   "%s: is encrypted (AES), and this version knows LUKS only; qemu-img convert can",
                   image->path);
}

int qcow2_unlock(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct luks_header h;
    struct dr_cipher *cipher = NULL;
    if (!image->key_secret || (image->flags & DR_OPEN_RECORDED))
        return 0;
    if (q->h.crypt == QCOW2_PLAIN)
        return dr_fail(err, EINVAL,
                       "%s: No encryption in image header, but options specified format 'luks'",
                       image->path);
    if (q->h.crypt != QCOW2_LUKS)
        return refuse_aes(image, err);
    int r = read_header(image, &h, err);
    if (r == 0)
        r = luks_unlock(&h, image->files[0], q->crypto_at, image->key_secret, image->path, &cipher,
                        err);
    return r < 0 ? r : dr_encrypted_open(image->files[q->data], 0, cipher, &q->plain, err);
}

int qcow2_refuse_locked(const struct dr_image *image, struct dr_error *err)
{
    if (qcow2_of(image)->h.crypt != QCOW2_LUKS)
        return refuse_aes(image, err);
    return dr_fail(err, EACCES,
                   "%s: Parameter 'encrypt.key-secret' is required for cipher: it is encrypted "
                   "(LUKS); name a secret with its password",
                   image->path);
}

bool qcow2_encrypted(const struct dr_image *image)
{
    return qcow2_of(image)->h.crypt != QCOW2_PLAIN;
}

/* What a damaged header says is left out: everything else about the image is still worth telling.
 */
int qcow2_crypt_info(struct dr_image *image, json_t *data, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct luks_header h;
    json_t *encrypt = json_object();
    int bad = 0;
    if (q->h.crypt == QCOW2_LUKS && read_header(image, &h, NULL) == 0)
        bad = luks_info(&h, encrypt);
    bad |= json_object_set_new(encrypt, "format",
                               json_string(q->h.crypt == QCOW2_LUKS ? "luks" : "aes"));
    bad |= json_object_set_new(data, "encrypt", encrypt);
    return bad ? dr_fail_errno(err, ENOMEM, "%s", image->path) : 0;
}
