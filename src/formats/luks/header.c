/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The header's bytes, and what is refused in them. The words of a refusal name the byte. */
#include "formats/luks/header.h"

#include <string.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/json.h"

#define SECTOR   512u
#define ENABLED  0x00ac71f3u
#define DISABLED 0x0000deadu

enum at {
    AT_VERSION = 6,
    AT_CIPHER = 8,
    AT_MODE = 40,
    AT_HASH = 72,
    AT_PAYLOAD = 104,
    AT_KEY_LEN = 108,
    AT_DIGEST = 112,
    AT_SALT = 132,
    AT_ITERATIONS = 164,
    AT_UUID = 168,
    AT_SLOTS = 208,
    SLOT_LEN = 48,
};

static const uint8_t magic[8] = {'L', 'U', 'K', 'S', 0xba, 0xbe, 0, 1};

bool luks_is_header(const uint8_t *buf, size_t len)
{
    return len >= sizeof(magic) && memcmp(buf, magic, sizeof(magic)) == 0;
}

/* ------------------------------------------------------------------ decode */

static int take_text(const uint8_t *buf, unsigned at, size_t len, const char *path, char *out,
                     struct dr_error *err)
{
    if (!memchr(buf + at, 0, len))
        return dr_fail(err, EINVAL, "%s: a text in its LUKS header, at byte %u, does not end", path,
                       at);
    memcpy(out, buf + at, len);
    out[len] = '\0';
    return 0;
}

static uint64_t slot_len(const struct luks_header *h)
{
    return dr_round_up((uint64_t)h->key_len * LUKS_STRIPES, SECTOR);
}

static int refuse_slot(const char *path, unsigned i, const char *why, struct dr_error *err)
{
    return dr_fail(err, EINVAL, "%s: key slot %u of its LUKS header, at byte %u, %s", path, i,
                   (unsigned)AT_SLOTS + i * SLOT_LEN, why);
}

static int take_slot(const uint8_t *buf, const char *path, unsigned i, struct luks_header *h,
                     struct dr_error *err)
{
    const uint8_t *p = buf + AT_SLOTS + i * SLOT_LEN;
    struct luks_slot *slot = &h->slots[i];
    uint32_t state = get_be32(p);
    slot->active = state == ENABLED;
    slot->iterations = get_be32(p + 4);
    memcpy(slot->salt, p + 8, LUKS_SALT);
    slot->at = (uint64_t)get_be32(p + 40) * SECTOR;
    if (state != ENABLED && state != DISABLED)
        return refuse_slot(path, i, "is neither active nor inactive", err);
    if (slot->active && slot->iterations == 0)
        return refuse_slot(path, i, "has no iterations", err);
    if (get_be32(p + 44) != LUKS_STRIPES)
        return refuse_slot(path, i, "has not 4000 stripes", err);
    if (slot->at < LUKS_FIRST_SLOT)
        return refuse_slot(path, i, "lies in the header itself", err);
    if (slot->at + slot_len(h) > h->payload)
        return refuse_slot(path, i, "reaches into the encrypted disk", err);
    return 0;
}

static int check_overlaps(const char *path, const struct luks_header *h, struct dr_error *err)
{
    uint64_t len = slot_len(h);
    for (unsigned i = 1; i < LUKS_SLOTS; i++)
        for (unsigned j = 0; j < i; j++)
            if (h->slots[i].at < h->slots[j].at + len && h->slots[j].at < h->slots[i].at + len)
                return refuse_slot(path, i, "overlaps another one", err);
    return 0;
}

static int check_iterations(const char *path, const struct luks_header *h, struct dr_error *err)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        if (h->slots[i].active)
            sum += (uint64_t)h->slots[i].iterations + h->iterations;
    if (h->iterations == 0)
        return dr_fail(err, EINVAL, "%s: the digest in its LUKS header has no iterations", path);
    if (sum > LUKS_MAX_ITERATIONS)
        return dr_fail(err, EINVAL,
                       "%s: its LUKS header asks for %llu iterations to try a password, at most "
                       "%llu are made",
                       path, (unsigned long long)sum, (unsigned long long)LUKS_MAX_ITERATIONS);
    return 0;
}

static int check_sizes(const char *path, const struct luks_header *h, struct dr_error *err)
{
    if (h->payload < LUKS_FIRST_SLOT || h->payload > LUKS_MAX_PAYLOAD)
        return dr_fail(err, EINVAL,
                       "%s: its LUKS header says that the disk begins at byte %llu, expected 4096 "
                       "to %llu",
                       path, (unsigned long long)h->payload, (unsigned long long)LUKS_MAX_PAYLOAD);
    if (h->key_len == 0 || h->key_len > DR_CIPHER_KEY_MAX)
        return dr_fail(err, EINVAL,
                       "%s: its LUKS header says that the key has %u bytes, expected 1 to %u", path,
                       h->key_len, DR_CIPHER_KEY_MAX);
    return 0;
}

int luks_decode(const uint8_t *buf, const char *path, struct luks_header *h, struct dr_error *err)
{
    *h = (struct luks_header){0};
    if (!luks_is_header(buf, LUKS_HEADER))
        return dr_fail(err, EINVAL, "%s: has no LUKS header of version 1", path);
    h->payload = (uint64_t)get_be32(buf + AT_PAYLOAD) * SECTOR;
    h->key_len = get_be32(buf + AT_KEY_LEN);
    h->iterations = get_be32(buf + AT_ITERATIONS);
    memcpy(h->digest, buf + AT_DIGEST, LUKS_DIGEST);
    memcpy(h->salt, buf + AT_SALT, LUKS_SALT);
    int r = take_text(buf, AT_CIPHER, 32, path, h->cipher, err);
    if (r == 0)
        r = take_text(buf, AT_MODE, 32, path, h->mode, err);
    if (r == 0)
        r = take_text(buf, AT_HASH, 32, path, h->hash, err);
    if (r == 0)
        r = take_text(buf, AT_UUID, 40, path, h->uuid, err);
    if (r == 0)
        r = check_sizes(path, h, err);
    for (unsigned i = 0; r == 0 && i < LUKS_SLOTS; i++)
        r = take_slot(buf, path, i, h, err);
    if (r == 0)
        r = check_overlaps(path, h, err);
    return r < 0 ? r : check_iterations(path, h, err);
}

int luks_read(struct dr_file *f, uint64_t at, uint64_t len, const char *path, struct luks_header *h,
              struct dr_error *err)
{
    uint8_t buf[LUKS_HEADER] = {0};
    size_t got = 0;
    int r = dr_file_pread_short(f, buf, at, sizeof(buf), &got, err);
    if (r == 0)
        r = luks_decode(buf, path, h, err);
    if (r == 0 && (h->payload > len || at > dr_file_size(f) || len > dr_file_size(f) - at))
        r = dr_fail(err, EINVAL, "%s: ends in its LUKS header, which takes %llu bytes", path,
                    (unsigned long long)h->payload);
    return r;
}

/* ------------------------------------------------------------------ encode */

static void put_text(uint8_t *buf, unsigned at, const char *text)
{
    memcpy(buf + at, text, strlen(text));
}

void luks_encode(const struct luks_header *h, uint8_t *buf)
{
    memset(buf, 0, LUKS_HEADER);
    memcpy(buf, magic, sizeof(magic));
    put_text(buf, AT_CIPHER, h->cipher);
    put_text(buf, AT_MODE, h->mode);
    put_text(buf, AT_HASH, h->hash);
    put_text(buf, AT_UUID, h->uuid);
    put_be32(buf + AT_PAYLOAD, (uint32_t)(h->payload / SECTOR));
    put_be32(buf + AT_KEY_LEN, h->key_len);
    put_be32(buf + AT_ITERATIONS, h->iterations);
    memcpy(buf + AT_DIGEST, h->digest, LUKS_DIGEST);
    memcpy(buf + AT_SALT, h->salt, LUKS_SALT);
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        uint8_t *p = buf + AT_SLOTS + i * SLOT_LEN;
        put_be32(p, h->slots[i].active ? ENABLED : DISABLED);
        put_be32(p + 4, h->slots[i].iterations);
        memcpy(p + 8, h->slots[i].salt, LUKS_SALT);
        put_be32(p + 40, (uint32_t)(h->slots[i].at / SECTOR));
        put_be32(p + 44, LUKS_STRIPES);
    }
}

/* ------------------------------------------------------------------ info */

/* "aes" with a key of 64 bytes for XTS → "aes-256". */
static json_t *cipher_text(const struct luks_header *h)
{
    bool xts = strncmp(h->mode, "xts", 3) == 0;
    char text[64];
    snprintf(text, sizeof(text), "%s-%u", h->cipher, h->key_len * 8 / (xts ? 2 : 1));
    return dr_json_text(text);
}

static int put_mode(const struct luks_header *h, json_t *data)
{
    char iv[33];
    const char *dash = strchr(h->mode, '-'), *colon = strchr(h->mode, ':');
    snprintf(iv, sizeof(iv), "%s", dash ? dash + 1 : "");
    iv[strcspn(iv, ":")] = '\0';
    int bad = json_object_set_new(data, "ivgen-alg", dr_json_text(iv));
    if (colon)
        bad |= json_object_set_new(data, "ivgen-hash-alg", dr_json_text(colon + 1));
    return bad;
}

static json_t *slot_json(const struct luks_slot *slot)
{
    json_t *one = json_pack("{s:b}", "active", slot->active);
    if (slot->active)
        json_object_set_new(one, "iters", json_integer(slot->iterations));
    json_object_set_new(one, "key-offset", json_integer((json_int_t)slot->at));
    if (slot->active)
        json_object_set_new(one, "stripes", json_integer(LUKS_STRIPES));
    return one;
}

int luks_info(const struct luks_header *h, json_t *data)
{
    char mode[33];
    json_t *slots = json_array();
    snprintf(mode, sizeof(mode), "%.*s", (int)strcspn(h->mode, "-"), h->mode);
    int bad = put_mode(h, data);
    bad |= json_object_set_new(data, "hash-alg", dr_json_text(h->hash));
    bad |= json_object_set_new(data, "cipher-alg", cipher_text(h));
    bad |= json_object_set_new(data, "uuid", dr_json_text(h->uuid));
    bad |= json_object_set_new(data, "cipher-mode", dr_json_text(mode));
    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        bad |= json_array_append_new(slots, slot_json(&h->slots[i]));
    bad |= json_object_set_new(data, "slots", slots);
    bad |= json_object_set_new(data, "payload-offset", json_integer((json_int_t)h->payload));
    bad |= json_object_set_new(data, "master-key-iters", json_integer(h->iterations));
    return bad ? -ENOMEM : 0;
}
