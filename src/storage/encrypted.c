/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "storage/encrypted.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

#define PIECE ((uint64_t)1 << 20) /* of a write, encrypted at once */
/* More than any disk has, so that it has no last sector that could be half of one. */
#define NO_END ((uint64_t)INT64_MAX - 511)

struct encrypted {
    struct dr_file base;
    struct dr_cipher *cipher;
};

static struct encrypted *of(struct dr_file *f)
{
    return (struct encrypted *)f;
}

static void encrypted_close(struct dr_file *f)
{
    dr_cipher_free(of(f)->cipher);
    dr_file_unpin(f->under);
    free(f->path);
    free(f);
}

static ssize_t encrypted_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    int r = dr_file_pread_short(f->under, buf, f->under_at + off, len, NULL, NULL);
    if (r == 0)
        r = dr_cipher_decrypt(of(f)->cipher, off / DR_CIPHER_SECTOR, buf, len);
    return r < 0 ? r : (ssize_t)len;
}

/* The next len bytes of the buffers, which are used up. */
static void gather(struct iovec **iov, uint8_t *to, size_t len)
{
    while (len > 0) {
        size_t n = dr_min((*iov)->iov_len, len);
        memcpy(to, (*iov)->iov_base, n);
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
        (*iov)->iov_len -= n;
        to += n;
        len -= n;
        if ((*iov)->iov_len == 0)
            (*iov)++;
    }
}

/* The caller's bytes stay as they are: they are encrypted in a copy. */
static int write_pieces(struct dr_file *f, struct iovec *iov, int n, uint64_t off, bool durable)
{
    uint64_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    size_t room = (size_t)dr_min(len, PIECE);
    CLEANUP_FREE uint8_t *buf = aligned_alloc(4096, dr_round_up(dr_max(room, 1), 4096));
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t done = 0, part; r == 0 && done < len; done += part) {
        part = dr_min(len - done, room);
        gather(&iov, buf, (size_t)part);
        r = dr_cipher_encrypt(of(f)->cipher, (off + done) / DR_CIPHER_SECTOR, buf, (size_t)part);
        struct iovec one = {.iov_base = buf, .iov_len = (size_t)part};
        uint64_t at = f->under_at + off + done;
        if (r == 0)
            r = durable ? dr_file_pwritev_durable(f->under, &one, 1, at, NULL)
                        : dr_file_pwritev(f->under, &one, 1, at, NULL);
    }
    return r;
}

static int encrypted_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    return write_pieces(f, iov, n, off, false);
}

static int encrypted_pwritev_durable(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    return write_pieces(f, iov, n, off, true);
}

static int encrypted_truncate(struct dr_file *f, uint64_t size)
{
    (void)f;
    (void)size;
    return -ENOTSUP; /* the file below has the end */
}

static int encrypted_flush(struct dr_file *f)
{
    return dr_file_flush(f->under, NULL);
}

static void encrypted_advise(struct dr_file *f, bool random)
{
    dr_file_advise(f->under, random);
}

static uint64_t encrypted_mtime(struct dr_file *f)
{
    return dr_file_mtime(f->under);
}

static int encrypted_usage(struct dr_file *f, uint64_t *bytes)
{
    return dr_file_usage(f->under, bytes, NULL);
}

static const char *encrypted_reason(struct dr_file *f, int r)
{
    return f->under->ops->reason ? f->under->ops->reason(f->under, r) : NULL;
}

static const struct dr_file_ops encrypted_ops = {
    .name = "encrypted",
    .close = encrypted_close,
    .pread = encrypted_pread,
    .pwritev = encrypted_pwritev,
    .pwritev_durable = encrypted_pwritev_durable,
    .truncate = encrypted_truncate,
    .flush = encrypted_flush,
    .advise = encrypted_advise,
    .mtime = encrypted_mtime,
    .usage = encrypted_usage,
    .reason = encrypted_reason,
};

int dr_encrypted_open(struct dr_file *under, uint64_t at, struct dr_cipher *cipher,
                      struct dr_file **file, struct dr_error *err)
{
    struct encrypted *e = calloc(1, sizeof(*e));
    char *path = strdup(under->path);
    if (!e || !path) {
        free(e);
        free(path);
        dr_cipher_free(cipher);
        return dr_fail(err, ENOMEM, "%s: out of memory", under->path);
    }
    e->cipher = cipher;
    dr_file_pin(under);
    e->base = (struct dr_file){
        .ops = &encrypted_ops,
        .id = {.owner = e},
        .path = path,
        .atomic_size = DR_CIPHER_SECTOR,
        .read_align = DR_CIPHER_SECTOR,
        .write_align = DR_CIPHER_SECTOR,
        .depth = under->depth,
        .under = under,
        .under_at = at,
        .block_device = under->block_device,
        .encrypted = true,
        .size = NO_END,
    };
    return dr_file_adopt(&e->base, DR_FILE_RDWR, file, err);
}
