/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* gzip files of many small members that tell their sizes (BGZF, as bgzip makes them): each begins
 * with an extra field of 6 bytes, "BC" and the member's size, and ends with the plain one. */
#include <zlib.h>

#include "storage/source-pieces.h"

#define HEAD      18u /* a member up to its deflate data */
#define TAIL      8u  /* checksum and plain size */
#define PLAIN_MAX 65536u

/* The member's size; 0: no such member begins with these HEAD bytes. */
static uint32_t member_len(const uint8_t *p)
{
    static const uint8_t extra[] = {6, 0, 'B', 'C', 2, 0};
    if (p[0] != 0x1f || p[1] != 0x8b || p[2] != Z_DEFLATED || p[3] != 4 ||
        memcmp(p + 10, extra, sizeof(extra)) != 0)
        return 0;
    uint32_t len = get_le16(p + 16) + 1u;
    return len > HEAD + TAIL ? len : 0;
}

/* From what is no member on to the next one, whose header comes into head. */
static int pass_gap(struct dr_file *f, struct source_pieces *s, uint64_t *at, uint8_t *head,
                    struct dr_error *err)
{
    static const uint8_t magic[] = {0x1f, 0x8b, Z_DEFLATED, 4};
    uint64_t next;
    size_t got;
    int r = source_pieces_gap(s, *at, &next, err);
    if (r == 0)
        r = source_pieces_search(f, magic, sizeof(magic), &next, err);
    if (r == 0)
        r = dr_file_pread_short(f, head, next, HEAD, &got, err);
    if (r == 0)
        *at = next;
    return r == -ENODATA ? -ENOTSUP : r;
}

static int end_or_gap(struct dr_file *f, struct source_pieces *s, uint64_t *at, uint8_t *head,
                      const char *why, struct dr_error *err)
{
    int r = pass_gap(f, s, at, head, err);
    return r == -ENOTSUP ? source_pieces_end(s, *at, why) < 0 ? r : 1 : r;
}

/* Each read brings the plain size of a member and the header of the next one. */
static int find_members(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    uint64_t size = dr_file_size(f), at = 0;
    uint8_t raw[4 + HEAD];
    size_t got;
    int r = dr_file_pread_short(f, raw + 4, 0, HEAD, &got, err);
    while (r == 0 && at < size) {
        uint32_t len = member_len(raw + 4);
        if (len == 0 && raw[4] == 0x1f && raw[5] == 0x8b)
            return -ENOTSUP; /* another kind of member: read from front to back */
        if (len == 0 || at + len > size) {
            const char *why = len ? "the file was cut off"
                                  : "no member that tells its size begins there";
            r = end_or_gap(f, s, &at, raw + 4, why, err);
            continue;
        }
        r = dr_file_pread_short(f, raw, at + len - 4, sizeof(raw), &got, err);
        if (r == 0)
            r = source_pieces_add(s, at, len, dr_min(get_le32(raw), PLAIN_MAX), 0, err);
        at += len;
    }
    return r < 0 ? r : 0;
}

static int decode(const struct source_piece *p, uint32_t common, const uint8_t *coded,
                  uint8_t *plain, size_t plain_len, size_t *good)
{
    z_stream z = {.next_in = (Bytef *)coded, .avail_in = p->coded_len};
    uint8_t none;
    (void)common;
    if (inflateInit2(&z, 15 + 16) != Z_OK)
        return -ENOMEM;
    z.next_out = plain_len ? plain : &none;
    z.avail_out = (uInt)plain_len;
    int code = inflate(&z, Z_FINISH);
    *good = plain_len - z.avail_out;
    bool whole = code == Z_STREAM_END && z.avail_in == 0;
    inflateEnd(&z);
    return whole && *good == plain_len ? 0 : code == Z_MEM_ERROR ? -ENOMEM : -EBADMSG;
}

const struct source_piece_packer source_gzip_blocks = {
    .name = "gzip",
    .find = find_members,
    .decode = decode,
    .unproven = true,
};
