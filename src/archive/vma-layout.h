/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where the fields of VMA headers stand; for vma-format.c and vma-build.c alone. */
#ifndef DR_ARCHIVE_VMA_LAYOUT_H
#define DR_ARCHIVE_VMA_LAYOUT_H

#include <openssl/err.h>
#include <openssl/evp.h>
#include <stddef.h>
#include <stdint.h>

struct dr_error;

#define VMA_MAGIC        "VMA\0"
#define VMA_EXTENT_MAGIC "VMAE\0\0" /* with the reserved field behind it */

#define VMA_CONFIGS    256u
#define VMA_DEVICES    256u /* entries; 0 is not used */
#define VMA_DEVICE_LEN 32u
#define VMA_BLOB_MAX   65535u

/* of the header */
#define VMA_AT_VERSION      4u
#define VMA_AT_UUID         8u
#define VMA_AT_CTIME        24u
#define VMA_AT_MD5          32u
#define VMA_AT_BLOB_OFFSET  48u
#define VMA_AT_BLOB_SIZE    52u
#define VMA_AT_HEADER_SIZE  56u
#define VMA_AT_CONFIG_NAMES 2044u
#define VMA_AT_CONFIG_DATA  3068u
#define VMA_AT_DEVICES      4096u /* name u32, 0 u32, size u64, 16 zeros */

/* of an extent */
#define VMA_AT_EXTENT_COUNT 6u
#define VMA_AT_EXTENT_UUID  8u
#define VMA_AT_EXTENT_MD5   24u
#define VMA_AT_SLOTS        40u /* mask u16, 0 u8, device u8, cluster u32 */

/* MD5 of buf with its 16 bytes at field taken as zeros. -ENOTSUP: OpenSSL will not. */
int vma_md5(const uint8_t *buf, size_t len, size_t field, uint8_t sum[16], const char *name,
            struct dr_error *err);

#endif
