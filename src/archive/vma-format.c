/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Parsing: the fixed header, its blobs, and extents. vma-build.c is the other direction. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "archive/vma-format.h"
#include "archive/vma-layout.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/core.h"

/* ------------------------------------------------------------------ small things */

const char *vma_show(const char *name, char *buf, size_t size)
{
    size_t n = 0;
    for (const unsigned char *p = (const unsigned char *)name; *p && n + 5 < size; p++) {
        if (*p >= 0x20 && *p < 0x7f && *p != '\\')
            buf[n++] = (char)*p;
        else
            n += (size_t)snprintf(buf + n, size - n, "\\x%02x", *p);
    }
    buf[n] = '\0';
    return buf;
}

bool dr_vma_name_is_safe(const char *name)
{
    size_t n = 0;
    for (; name && name[n]; n++)
        if ((unsigned char)name[n] < 0x20 || name[n] == 0x7f || name[n] == '/')
            return false;
    return n > 0 && n <= 255 && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

const struct dr_vma_disk *vma_header_disk(const struct dr_vma_header *header, unsigned id)
{
    size_t low = 0, high = header->n_disks;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (header->disks[mid].id == id)
            return &header->disks[mid];
        if (header->disks[mid].id < id)
            low = mid + 1;
        else
            high = mid;
    }
    return NULL;
}

/* OpenSSL says in its queue of errors that there is no such method. It says less when memory is
 * short. */
static int fail_md5(const char *name, struct dr_error *err)
{
    bool lacks = false;
    for (unsigned long e; (e = ERR_get_error()) != 0;)
        lacks = lacks || ERR_GET_REASON(e) == ERR_R_UNSUPPORTED;
    return lacks ? dr_fail(err, ENOTSUP, "%s: this system's OpenSSL has no MD5", name)
                 : dr_fail(err, ENOMEM, "%s: out of memory", name);
}

int vma_md5(const uint8_t *buf, size_t len, size_t field, uint8_t sum[16], const char *name,
            struct dr_error *err)
{
    static const uint8_t zeros[16];
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    bool ok = ctx && EVP_DigestInit_ex(ctx, EVP_md5(), NULL) == 1 &&
              EVP_DigestUpdate(ctx, buf, field) == 1 &&
              EVP_DigestUpdate(ctx, zeros, sizeof(zeros)) == 1 &&
              EVP_DigestUpdate(ctx, buf + field + 16, len - field - 16) == 1 &&
              EVP_DigestFinal_ex(ctx, sum, NULL) == 1;
    EVP_MD_CTX_free(ctx);
    return ok ? 0 : fail_md5(name, err);
}

/* ------------------------------------------------------------------ the fixed header */

int vma_check_magic(const uint8_t *begin, size_t len, const char *name, struct dr_error *err)
{
    struct dr_error what = DR_ERROR_INIT;
    if (len >= 4 && memcmp(begin, VMA_MAGIC, 4) == 0)
        return 0;
    if (dr_refuse_foreign(begin, len, name, &what) < 0)
        return dr_fail(err, EINVAL, "no VMA archive: %s", what.text);
    return dr_fail(err, EINVAL, "%s: no VMA archive: offset 0 does not hold \"VMA\\0\"", name);
}

int vma_header_size(const uint8_t *fixed, const char *name, uint32_t *size, struct dr_error *err)
{
    int r = vma_check_magic(fixed, VMA_FIXED_HEADER, name, err);
    if (r < 0)
        return r;
    uint32_t version = get_be32(fixed + VMA_AT_VERSION);
    if (version != 1)
        return dr_fail(err, EINVAL, "%s: VMA version %" PRIu32 " at offset 4, only 1 is known",
                       name, version);
    *size = get_be32(fixed + VMA_AT_HEADER_SIZE);
    if (*size < VMA_FIXED_HEADER || *size > VMA_HEADER_MAX)
        return dr_fail(err, EINVAL,
                       "%s: header of %" PRIu32 " bytes (offset 56), expected %u to %u", name,
                       *size, VMA_FIXED_HEADER, VMA_HEADER_MAX);
    return 0;
}

/* ------------------------------------------------------------------ blobs */

struct blob {
    uint32_t pointer; /* as recorded: from the start of the blobs */
    const uint8_t *data;
    uint32_t len;
    bool found; /* a blob begins there */
};

struct parser {
    const uint8_t *buf;
    uint32_t size;
    const char *name;
    struct dr_vma_header *header;
    bool guess; /* see vma_header_guess */
    void (*warn)(void *user, const char *text);
    void *user;
    struct blob blobs[VMA_CONFIGS * 2 + VMA_DEVICES]; /* that something points to, ascending */
    size_t n_blobs;
};

__attribute__((format(printf, 2, 3))) static void warn(const struct parser *p, const char *fmt, ...)
{
    if (!p->warn)
        return;
    char text[1024], line[1536];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(line, sizeof(line), "%s: %s", p->name, text);
    p->warn(p->user, line);
}

static uint32_t pointer_at(const struct parser *p, uint32_t table, unsigned i, unsigned step)
{
    return get_be32(p->buf + table + i * step);
}

static int by_pointer(const void *a, const void *b)
{
    const struct blob *x = a, *y = b;
    return x->pointer < y->pointer ? -1 : x->pointer > y->pointer;
}

static void want(struct parser *p, uint32_t pointer)
{
    if (pointer != 0)
        p->blobs[p->n_blobs++].pointer = pointer;
}

static void collect_pointers(struct parser *p)
{
    for (unsigned i = 0; i < VMA_CONFIGS; i++) {
        want(p, pointer_at(p, VMA_AT_CONFIG_NAMES, i, 4));
        want(p, pointer_at(p, VMA_AT_CONFIG_DATA, i, 4));
    }
    for (unsigned i = 1; i < VMA_DEVICES; i++)
        want(p, pointer_at(p, VMA_AT_DEVICES, i, VMA_DEVICE_LEN));
    qsort(p->blobs, p->n_blobs, sizeof(p->blobs[0]), by_pointer);
}

/* Visit all blobs once and resolve every pointer on the way, so that the time does not grow with
 * pointers times blobs. */
static void walk_blobs(struct parser *p, const uint8_t *base, uint64_t size)
{
    size_t i = 0;
    for (uint64_t pos = 1, len; pos + 2 <= size && i < p->n_blobs; pos += 2 + len) {
        len = get_le16(base + pos);
        while (i < p->n_blobs && p->blobs[i].pointer < pos)
            i++;
        for (; i < p->n_blobs && p->blobs[i].pointer == pos; i++) {
            p->blobs[i].data = base + pos + 2;
            p->blobs[i].len = (uint32_t)len;
            p->blobs[i].found = pos + 2 + len <= size;
        }
    }
}

static const struct blob *find_blob(const struct parser *p, uint32_t pointer)
{
    struct blob key = {.pointer = pointer};
    const struct blob *b = pointer ? bsearch(&key, p->blobs, p->n_blobs, sizeof(key), by_pointer)
                                   : NULL;
    return b && b->found ? b : NULL;
}

static int find_blobs(struct parser *p, struct dr_error *err)
{
    uint64_t off = get_be32(p->buf + VMA_AT_BLOB_OFFSET);
    uint64_t size = get_be32(p->buf + VMA_AT_BLOB_SIZE);
    collect_pointers(p);
    /* The reference tool makes such a header when there is nothing to store: it lacks even the
     * byte that is never used. */
    if (p->size == VMA_FIXED_HEADER && p->n_blobs == 0)
        return 0;
    if (off < VMA_FIXED_HEADER || !dr_inside(off, size, p->size))
        return dr_fail(
            err, EINVAL,
            "%s: names and configurations at %" PRIu64 ", %" PRIu64
            " bytes (offset 48), expected them between %u and the header's end, %" PRIu32,
            p->name, off, size, VMA_FIXED_HEADER, p->size);
    walk_blobs(p, p->buf + off, size);
    return 0;
}

/* ------------------------------------------------------------------ devices and configurations */

static bool is_text(const struct blob *b)
{
    return b && b->len > 0 && b->data[b->len - 1] == '\0';
}

/* Copy the blob's text. Empty names and names with a NUL inside are refused: readers disagree on
 * what they mean. */
static int take_name(const struct parser *p, const struct blob *b, const char *what, unsigned i,
                     const char **copy, struct dr_error *err)
{
    size_t n = strlen((const char *)b->data);
    if (n == 0 || n + 1 != b->len)
        return dr_fail(err, EINVAL, "%s: %s %u: %s (offset %td)", p->name, what, i,
                       n == 0 ? "its name is empty" : "its name holds a NUL", b->data - p->buf);
    *copy = strdup((const char *)b->data);
    return *copy ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", p->name);
}

static void warn_disk(const struct parser *p, const struct dr_vma_disk *disk)
{
    char shown[VMA_SHOWN];
    vma_show(disk->name, shown, sizeof(shown));
    if (disk->id == 255)
        warn(p, "device 255 ('%s'): other tools cannot restore it", shown);
    for (size_t i = 0; i < p->header->n_disks; i++)
        if (strcmp(p->header->disks[i].name, disk->name) == 0)
            warn(p, "devices %u and %u have the same name, '%s'", p->header->disks[i].id, disk->id,
                 shown);
}

/* Whatever has a size that can be is a disk. */
static int guess_device(struct parser *p, struct dr_vma_disk *disk, const struct blob *b)
{
    char name[VMA_SHOWN] = "";
    if (disk->size == 0)
        return 0;
    if (disk->size > VMA_MAX_SIZE) {
        warn(p, "device %u: its size cannot be %" PRIu64 ", so it is ignored", disk->id,
             disk->size);
        return 0;
    }
    if (is_text(b) && take_name(p, b, "device", disk->id, &disk->name, NULL) == -ENOMEM)
        return -ENOMEM;
    if (!disk->name) {
        snprintf(name, sizeof(name), "disk-%u", disk->id);
        warn(p, "device %u has no good name and is called '%s'", disk->id, name);
        disk->name = strdup(name);
    }
    if (!disk->name)
        return -ENOMEM;
    disk->vmstate = strcmp(disk->name, "vmstate") == 0;
    warn_disk(p, disk);
    p->header->disks[p->header->n_disks++] = *disk;
    return 0;
}

static int parse_device(struct parser *p, unsigned id, struct dr_error *err)
{
    uint32_t at = VMA_AT_DEVICES + id * VMA_DEVICE_LEN;
    uint32_t pointer = get_be32(p->buf + at);
    struct dr_vma_disk disk = {.id = id, .size = get_be64(p->buf + at + 8)};
    const struct blob *b = find_blob(p, pointer);
    if (p->guess)
        return guess_device(p, &disk, b);
    if (disk.size == 0 || !is_text(b)) {
        if (disk.size != 0 || pointer != 0)
            warn(p, "device %u (offset %" PRIu32 ") has no %s and is ignored", id, at,
                 disk.size == 0 ? "size" : "name");
        return 0;
    }
    if (disk.size > VMA_MAX_SIZE)
        return dr_fail(err, EINVAL,
                       "%s: device %u: size %" PRIu64 " (offset %" PRIu32 "), at most %llu can be",
                       p->name, id, disk.size, at + 8, VMA_MAX_SIZE);
    int r = take_name(p, b, "device", id, &disk.name, err);
    if (r < 0)
        return r;
    disk.vmstate = strcmp(disk.name, "vmstate") == 0;
    warn_disk(p, &disk);
    p->header->disks[p->header->n_disks++] = disk;
    return 0;
}

static void warn_config(const struct parser *p, const char *name)
{
    char shown[VMA_SHOWN];
    for (size_t i = 0; i < p->header->n_configs; i++)
        if (strcmp(p->header->configs[i].name, name) == 0)
            warn(p, "two configurations have the name '%s'", vma_show(name, shown, sizeof(shown)));
}

static int parse_config(struct parser *p, unsigned i, struct dr_error *err)
{
    uint32_t name = pointer_at(p, VMA_AT_CONFIG_NAMES, i, 4);
    uint32_t data = pointer_at(p, VMA_AT_CONFIG_DATA, i, 4);
    if (name == 0 || data == 0) {
        if (name != 0 || data != 0)
            warn(p, "configuration %u has no %s and is ignored", i, name ? "contents" : "name");
        return 0;
    }
    const struct blob *n = find_blob(p, name), *d = find_blob(p, data);
    if (!n || !d)
        return dr_fail(err, EINVAL,
                       "%s: configuration %u: its %s should be at %" PRIu32
                       " of the header's strings (offset %u), but none begins there",
                       p->name, i, n ? "contents" : "name", n ? data : name,
                       (n ? VMA_AT_CONFIG_DATA : VMA_AT_CONFIG_NAMES) + i * 4);
    if (!is_text(n))
        return dr_fail(err, EINVAL, "%s: configuration %u: its name does not end in a NUL", p->name,
                       i);
    struct dr_vma_config *c = &p->header->configs[p->header->n_configs];
    int r = take_name(p, n, "configuration", i, &c->name, err);
    if (r < 0)
        return r;
    warn_config(p, c->name);
    p->header->n_configs++; /* from here on the header frees it */
    uint8_t *copy = malloc(d->len ? d->len : 1);
    if (!copy)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->name);
    memcpy(copy, d->data, d->len);
    c->data = copy;
    c->len = d->len;
    return 0;
}

static int guess_config(struct parser *p, unsigned i)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = parse_config(p, i, &why);
    if (r < 0 && r != -ENOMEM)
        warn(p, "configuration %u is ignored: %s", i, why.text);
    return r == -ENOMEM ? r : 0;
}

/* ------------------------------------------------------------------ the whole header */

static int check_sum(const struct parser *p, struct dr_error *err)
{
    uint8_t sum[16];
    int r = vma_md5(p->buf, p->size, VMA_AT_MD5, sum, p->name, err);
    if (r < 0)
        return r;
    if (memcmp(sum, p->buf + VMA_AT_MD5, sizeof(sum)) != 0)
        return dr_fail(err, EINVAL,
                       "%s: the header's checksum (offset %u) does not fit its %" PRIu32 " bytes",
                       p->name, VMA_AT_MD5, p->size);
    return 0;
}

static int parse_tables(struct parser *p, struct dr_error *err)
{
    struct dr_vma_header *h = p->header;
    h->disks = calloc(VMA_DEVICES, sizeof(h->disks[0]));
    h->configs = calloc(VMA_CONFIGS, sizeof(h->configs[0]));
    if (!h->disks || !h->configs)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->name);
    struct dr_error why = DR_ERROR_INIT;
    int r = find_blobs(p, p->guess ? &why : err);
    if (r < 0 && p->guess) {
        warn(p, "no names can be found in the header");
        r = 0;
    }
    for (unsigned id = 1; id < VMA_DEVICES && r == 0; id++)
        r = parse_device(p, id, err);
    for (unsigned i = 0; i < VMA_CONFIGS && r == 0; i++)
        r = p->guess ? guess_config(p, i) : parse_config(p, i, err);
    return r < 0 && p->guess ? dr_fail(err, -r, "%s: out of memory", p->name) : r;
}

/* All that the header says, its checksum aside. */
static int parse(const uint8_t *buf, uint32_t size, bool guess, struct parser *p,
                 struct dr_error *err)
{
    struct dr_vma_header *header = p->header;
    memcpy(header->uuid, buf + VMA_AT_UUID, sizeof(header->uuid));
    header->ctime = (int64_t)get_be64(buf + VMA_AT_CTIME);
    header->header_size = size;
    p->guess = guess;
    int r = parse_tables(p, err);
    if (r < 0)
        vma_header_free(header);
    return r;
}

int vma_header_guess(const uint8_t *buf, uint32_t size, const char *name,
                     struct dr_vma_header *header, void (*warn_to)(void *user, const char *text),
                     void *user, struct dr_error *err)
{
    CLEANUP_FREE struct parser *p = calloc(1, sizeof(*p));
    *header = (struct dr_vma_header){0};
    if (!p)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    *p = (struct parser){
        .buf = buf, .size = size, .name = name, .header = header, .warn = warn_to, .user = user};
    warn(p,
         "the header's checksum does not fit its %" PRIu32
         " bytes: what it says is used all the same, and may be wrong",
         size);
    header->wrong_sum = true;
    return parse(buf, size, true, p, err);
}

int vma_header_parse(const uint8_t *buf, uint32_t size, const char *name,
                     struct dr_vma_header *header, void (*warn_to)(void *user, const char *text),
                     void *user, struct dr_error *err)
{
    uint32_t told;
    *header = (struct dr_vma_header){0};
    if (size < VMA_FIXED_HEADER)
        return dr_fail(err, EINVAL, "%s: ends at %" PRIu32 ", expected a header of %u bytes", name,
                       size, VMA_FIXED_HEADER);
    int r = vma_header_size(buf, name, &told, err);
    if (r < 0)
        return r;
    if (told != size)
        return dr_fail(err, EINVAL,
                       "%s: ends at %" PRIu32 " inside its header of %" PRIu32 " bytes", name, size,
                       told);
    CLEANUP_FREE struct parser *p = calloc(1, sizeof(*p));
    if (!p)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    *p = (struct parser){
        .buf = buf, .size = size, .name = name, .header = header, .warn = warn_to, .user = user};
    r = check_sum(p, err);
    return r < 0 ? r : parse(buf, size, false, p, err);
}

void vma_header_free(struct dr_vma_header *header)
{
    for (size_t i = 0; i < header->n_disks; i++)
        free((char *)header->disks[i].name);
    for (size_t i = 0; i < header->n_configs; i++) {
        free((char *)header->configs[i].name);
        free((uint8_t *)header->configs[i].data);
    }
    free(header->disks);
    free(header->configs);
    *header = (struct dr_vma_header){0};
}

/* ------------------------------------------------------------------ extents */

static int check_extent(const uint8_t *buf, const uint8_t uuid[16], const char *name, uint64_t off,
                        struct dr_error *err)
{
    uint8_t sum[16];
    if (memcmp(buf, VMA_EXTENT_MAGIC, 6) != 0)
        return dr_fail(err, EBADMSG, "%s: no extent at offset %" PRIu64 ", expected \"VMAE\"", name,
                       off);
    int r = vma_md5(buf, VMA_EXTENT_HEADER, VMA_AT_EXTENT_MD5, sum, name, err);
    if (r < 0)
        return r;
    if (memcmp(sum, buf + VMA_AT_EXTENT_MD5, sizeof(sum)) != 0)
        return dr_fail(err, EBADMSG,
                       "%s: extent at offset %" PRIu64 ": its checksum does not fit its header",
                       name, off);
    if (memcmp(uuid, buf + VMA_AT_EXTENT_UUID, 16) != 0)
        return dr_fail(err, EBADMSG,
                       "%s: extent at offset %" PRIu64 ": its uuid is another archive's", name,
                       off);
    return 0;
}

int vma_extent_parse(const uint8_t *buf, const uint8_t uuid[16], const char *name, uint64_t off,
                     struct vma_extent *extent, struct dr_error *err)
{
    unsigned told = get_be16(buf + VMA_AT_EXTENT_COUNT), blocks = 0;
    int r = check_extent(buf, uuid, name, off, err);
    if (r < 0)
        return r;
    extent->n = 0;
    for (unsigned i = 0; i < VMA_SLOTS; i++) {
        uint64_t info = get_be64(buf + VMA_AT_SLOTS + i * 8);
        struct vma_slot s = {(uint8_t)(info >> 32), (uint32_t)info, (uint16_t)(info >> 48),
                             blocks * DR_VMA_BLOCK};
        if (s.id == 0)
            continue;
        blocks += (unsigned)__builtin_popcount(s.mask);
        extent->slot[extent->n++] = s;
    }
    extent->data_len = blocks * DR_VMA_BLOCK;
    if (told > VMA_MAX_BLOCKS || told != blocks)
        return dr_fail(err, EBADMSG,
                       "%s: extent at offset %" PRIu64
                       ": it counts %u blocks, its clusters have %u",
                       name, off, told, blocks);
    return 0;
}

int vma_slot_check(const struct dr_vma_header *header, const struct vma_slot *slot,
                   const char *name, uint64_t off, struct dr_error *err)
{
    const struct dr_vma_disk *disk = vma_header_disk(header, slot->id);
    if (!disk)
        return dr_fail(err, EBADMSG,
                       "%s: extent at offset %" PRIu64 ": device %u is not in the header", name,
                       off, slot->id);
    if (disk->vmstate || slot->cluster < vma_clusters(disk->size))
        return 0;
    char shown[VMA_SHOWN];
    return dr_fail(err, EBADMSG,
                   "%s: extent at offset %" PRIu64 ": cluster %" PRIu32
                   " of device %u ('%s'), which has only %" PRIu64,
                   name, off, slot->cluster, slot->id, vma_show(disk->name, shown, sizeof(shown)),
                   vma_clusters(disk->size));
}
