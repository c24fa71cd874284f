/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Options of create, and the layout of a new image. */
#include "formats/qcow2/layout.h"

#include <limits.h>
#include <string.h>

#include "base/bytes.h"
#include "formats/qcow2/qcow2.h"

#define DEFAULT_BITS 16u

const struct dr_option_help qcow2_create_options[] = {
    {"cluster_size", "size", "qcow2 cluster size", "65536"},
    {"compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", NULL},
    {"compression_type", "str",
     "Compression method used for image cluster compression (zlib, zstd)", "zlib"},
    {"data_file", "str", "File name of an external data file", NULL},
    {"data_file_raw", "bool (on/off)", "The external data file must stay valid as a raw image",
     NULL},
    {"encrypt.format", "str", "Encrypt the image, format choices: 'luks'", NULL},
    LUKS_OPTION_HELP("encrypt."),
    {"extended_l2", "bool (on/off)", "Extended L2 tables", "off"},
    {"extent_size_hint", "size", "Taken for qemu-img's sake, has no effect", NULL},
    {"lazy_refcounts", "bool (on/off)", "Postpone refcount updates", "off"},
    {"nocow", "bool (on/off)", "Turn off copy-on-write (valid only on btrfs)", NULL},
    {"preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)",
     NULL},
    {"refcount_bits", "num", "Width of a reference count entry in bits", "16"},
    {NULL, NULL, NULL, NULL},
};

/* ------------------------------------------------------------------ options */

/* A number with an optional suffix: k, M, G. False: it is none. */
static bool parse_size(const char *text, uint64_t *value)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    unsigned shift = 0;
    if (end == text || errno || *text == '-')
        return false;
    switch (*end) {
    case 'k':
    case 'K':
        shift = 10;
        break;
    case 'M':
        shift = 20;
        break;
    case 'G':
        shift = 30;
        break;
    default:
        break;
    }
    if (shift)
        end++;
    *value = v;
    return !*end && !dr_mul_overflow(v, UINT64_C(1) << shift, value);
}

/* value = 2^*bits, which lies in [min, max]. */
static bool parse_power(const char *text, unsigned min, unsigned max, unsigned *bits)
{
    uint64_t v;
    if (!parse_size(text, &v) || v == 0 || (v & (v - 1)))
        return false;
    *bits = (unsigned)__builtin_ctzll(v);
    return *bits >= min && *bits <= max;
}

static int parse_bool(const char *path, const struct dr_option *o, bool *value,
                      struct dr_error *err)
{
    *value = strcmp(o->value, "on") == 0;
    if (*value || strcmp(o->value, "off") == 0)
        return 0;
    return dr_fail(err, EINVAL, "%s: %s=%s is neither on nor off", path, o->name, o->value);
}

/* Which of the words is it? They end with NULL. */
static int parse_word(const char *path, const struct dr_option *o, const char *const *words,
                      unsigned *which, struct dr_error *err)
{
    for (unsigned i = 0; words[i]; i++)
        if (strcmp(o->value, words[i]) == 0) {
            *which = i;
            return 0;
        }
    return dr_fail(err, EINVAL, "%s: invalid value '%s' for %s", path, o->value, o->name);
}

static int take_compat(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                       struct dr_error *err)
{
    static const char *const words[] = {"0.10", "v2", "1.1", "v3", NULL};
    unsigned which = 0;
    int r = parse_word(path, o, words, &which, err);
    if (r == 0)
        lay->h.version = which < 2 ? 2 : 3;
    return r;
}

static int take_flag(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                     struct dr_error *err)
{
    bool on;
    int r = parse_bool(path, o, &on, err);
    if (r < 0 || !on)
        return r;
    if (strcmp(o->name, "nocow") == 0)
        lay->nocow = true;
    else if (strcmp(o->name, "data_file_raw") == 0)
        lay->h.autoclear |= QCOW2_DATA_RAW;
    else if (strcmp(o->name, "extended_l2") == 0)
        lay->h.incompatible |= QCOW2_EXTL2;
    else if (strcmp(o->name, "lazy_refcounts") == 0)
        lay->h.compatible |= QCOW2_LAZY;
    return 0;
}

static int take_word(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                     struct dr_error *err)
{
    static const char *const types[] = {"zlib", "zstd", NULL};
    static const char *const modes[] = {"off", "metadata", "falloc", "full", NULL};
    bool type = strcmp(o->name, "compression_type") == 0;
    unsigned which = 0;
    int r = parse_word(path, o, type ? types : modes, &which, err);
    if (r < 0)
        return r;
    if (type)
        lay->h.compression = which;
    else
        lay->prealloc = which;
    return 0;
}

int qcow2_read_width(const char *path, const char *value, unsigned *order, struct dr_error *err)
{
    uint64_t number;
    if (parse_power(value, 0, 6, order))
        return 0;
    if (!parse_size(value, &number))
        return dr_fail(err, EINVAL, "%s: Parameter 'refcount_bits' expects a number", path);
    return dr_fail(err, EINVAL,
                   "%s: Refcount width must be a power of two and may not exceed 64 bits", path);
}

int qcow2_read_size(const char *path, const struct dr_option *o, uint64_t *size,
                    struct dr_error *err)
{
    if (parse_size(o->value, size))
        return 0;
    return dr_fail(err, EINVAL, "%s: %s=%s is no number of bytes", path, o->name, o->value);
}

static int take_width(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                      struct dr_error *err)
{
    if (strcmp(o->name, "refcount_bits") == 0)
        return qcow2_read_width(path, o->value, &lay->h.refcount_order, err);
    if (parse_power(o->value, QCOW2_MIN_BITS, QCOW2_MAX_BITS, &lay->h.cluster_bits))
        return 0;
    return dr_fail(err, EINVAL, "%s: Cluster size must be a power of two between 512 and 2048k",
                   path);
}

static int take_data_file(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                          struct dr_error *err)
{
    if (!*o->value)
        return dr_fail(err, EINVAL, "%s: the name of its data file is empty", path);
    lay->data_file = o->value;
    lay->h.incompatible |= QCOW2_DATA_FILE;
    return 0;
}

static int take_encryption(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                           struct dr_error *err)
{
    const char *name = strchr(o->name, '.');
    if (strcmp(o->name, "encryption") == 0 && strcmp(o->value, "off") == 0)
        return 0;
    if (!name || (strcmp(name, ".format") == 0 && strcmp(o->value, "luks") != 0))
        return dr_fail(err, ENOTSUP, "%s: only encryption by LUKS is made (encrypt.format=luks)",
                       path);
    if (strcmp(name, ".format") == 0) {
        lay->h.crypt = QCOW2_LUKS;
        return 0;
    }
    int r = luks_take_option(&lay->encrypt, path, name + 1, o->value, err);
    return r > 0 ? dr_fail(err, EINVAL, "%s: unknown create option '%s'", path, o->name) : r;
}

static int take_nothing(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                        struct dr_error *err)
{
    (void)lay, (void)path, (void)o, (void)err;
    return 0;
}

static int take_option(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                       struct dr_error *err)
{
    static const struct {
        const char *name;
        int (*take)(struct qcow2_layout *lay, const char *path, const struct dr_option *o,
                    struct dr_error *err);
    } table[] = {
        {"cluster_size", take_width},
        {"compat", take_compat},
        {"compression_type", take_word},
        {"data_file", take_data_file},
        {"data_file_raw", take_flag},
        {"extended_l2", take_flag},
        {"extent_size_hint", take_nothing},
        {"lazy_refcounts", take_flag},
        {"nocow", take_flag},
        {"preallocation", take_word},
        {"refcount_bits", take_width},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
        if (strcmp(o->name, table[i].name) == 0)
            return table[i].take(lay, path, o, err);
    if (strcmp(o->name, "encryption") == 0 || strncmp(o->name, "encrypt.", 8) == 0)
        return take_encryption(lay, path, o, err);
    return dr_fail(err, EINVAL, "%s: unknown create option '%s'", path, o->name);
}

/* ------------------------------------------------------------------ what goes together */

static int check_version(const struct qcow2_layout *lay, const char *path, struct dr_error *err)
{
    const char *what = NULL;
    if (lay->h.version >= 3)
        return 0;
    if (lay->h.refcount_order != 4)
        what = "Different refcount widths than 16 bits are";
    else if (lay->h.compatible & QCOW2_LAZY)
        what = "Lazy refcounts are";
    else if (lay->h.incompatible & QCOW2_DATA_FILE)
        what = "External data files are";
    else if (lay->h.compression)
        what = "A compression type other than zlib is";
    else if (lay->h.incompatible & QCOW2_EXTL2)
        what = "Extended L2 entries are";
    if (!what)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: %s only supported with compatibility level 1.1 and above (compat=1.1)",
                   path, what);
}

static int check_encryption(const struct qcow2_layout *lay, const char *path, struct dr_error *err)
{
    if (!lay->h.crypt && lay->encrypt.secret)
        return dr_fail(err, EINVAL, "%s: Parameter 'encrypt.format' is missing", path);
    if (lay->h.crypt && (lay->h.autoclear & QCOW2_DATA_RAW))
        return dr_fail(err, EINVAL,
                       "%s: a raw data file would hold encrypted bytes: data_file_raw and "
                       "encrypt.format exclude each other",
                       path);
    /* Reserved clusters say that they are zeros: what the file has there would decrypt to noise. */
    if (lay->h.crypt && lay->prealloc && lay->h.version < 3)
        return dr_fail(err, EINVAL,
                       "%s: preallocation of an encrypted image takes compatibility level 1.1 or "
                       "above (compat=1.1)",
                       path);
    return 0;
}

static int check_options(const struct qcow2_layout *lay, const char *path, struct dr_error *err)
{
    bool extended = lay->h.incompatible & QCOW2_EXTL2, raw = lay->h.autoclear & QCOW2_DATA_RAW;
    if (extended && lay->h.cluster_bits < QCOW2_EXTL2_BITS)
        return dr_fail(err, EINVAL,
                       "%s: Extended L2 entries are only supported with cluster sizes of at least "
                       "%u bytes",
                       path, 1u << QCOW2_EXTL2_BITS);
    if (raw && !lay->data_file)
        return dr_fail(err, EINVAL, "%s: data_file_raw requires data_file", path);
    if (raw && lay->backing_name)
        return dr_fail(err, EINVAL,
                       "%s: Backing file and data_file_raw cannot be used at the same time", path);
    if (lay->prealloc && lay->backing_name && !extended)
        return dr_fail(err, EINVAL,
                       "%s: Backing file and preallocation can only be used at the same time if "
                       "extended_l2 is enabled",
                       path);
    if (lay->backing_format && strlen(lay->backing_format) > QCOW2_MAX_FORMAT)
        return dr_fail(err, EINVAL, "%s: the backing format's name has more than %u bytes", path,
                       QCOW2_MAX_FORMAT);
    int r = check_encryption(lay, path, err);
    return r < 0 ? r : check_version(lay, path, err);
}

/* ------------------------------------------------------------------ places */

static int count_tables(struct qcow2_layout *lay, const char *path, struct dr_error *err)
{
    uint64_t cluster = qcow2_cluster(&lay->h);
    uint64_t entry = lay->h.incompatible & QCOW2_EXTL2 ? 16 : 8;
    uint64_t span = cluster / entry * cluster;
    uint64_t tables = dr_div_up(lay->h.size, span);
    if (tables > QCOW2_MAX_L1 / 8)
        return dr_fail(err, EFBIG,
                       "%s: The image size is too large: with clusters of %llu bytes a disk has at "
                       "most %llu bytes (try using a larger cluster size)",
                       path, ULL(cluster), ULL(QCOW2_MAX_L1 / 8 * span));
    lay->h.l1_entries = (uint32_t)tables;
    lay->l1 = dr_div_up(tables * 8, cluster);
    if (lay->prealloc) {
        lay->l2 = tables;
        lay->data = lay->data_file ? 0 : dr_div_up(lay->h.size, cluster);
    }
    return 0;
}

/* The counts are for themselves, too. */
int qcow2_layout_counts(struct qcow2_layout *lay, const char *path, struct dr_error *err)
{
    uint64_t cluster = qcow2_cluster(&lay->h), per_block = cluster * 8 >> lay->h.refcount_order;
    uint64_t before;
    lay->reftable = lay->blocks = 1;
    do {
        before = lay->blocks + lay->reftable;
        lay->blocks = dr_max(lay->blocks, dr_div_up(qcow2_layout_clusters(lay), per_block));
        lay->reftable = dr_max(lay->reftable, dr_div_up(lay->blocks * 8, cluster));
    } while (lay->blocks + lay->reftable != before);
    if (lay->reftable * cluster > QCOW2_MAX_REFTABLE)
        return dr_fail(
            err, EFBIG,
            "%s: its refcount table would have %llu bytes, at most %llu are allowed (try "
            "using a larger cluster size)",
            path, ULL(lay->reftable * cluster), ULL(QCOW2_MAX_REFTABLE));
    lay->h.reftable_at = cluster;
    lay->h.reftable_clusters = (uint32_t)lay->reftable;
    lay->h.l1_at = lay->l1 ? qcow2_l1_first(lay) * cluster : 0; /* a disk of no bytes has none */
    return 0;
}

int qcow2_lay_out(struct qcow2_layout *lay, const char *path, const struct dr_create_params *params,
                  struct dr_error *err)
{
    int r = 0;
    *lay = (struct qcow2_layout){
        .h = {.version = 3, .cluster_bits = DEFAULT_BITS, .refcount_order = 4},
        .encrypt = LUKS_DEFAULTS};
    lay->backing_name = params->backing_name;
    lay->backing_format = params->backing ? params->backing->fmt->name : params->backing_format;
    for (size_t i = 0; r == 0 && i < params->n_options; i++)
        r = take_option(lay, path, &params->options[i], err);
    if (r == 0)
        r = check_options(lay, path, err);
    if (r < 0)
        return r;
    if (params->size > INT64_MAX - 511)
        return dr_fail(err, EFBIG, "%s: no disk has %llu bytes", path, ULL(params->size));
    lay->h.size = dr_round_up(params->size, 512);
    lay->h.length = lay->h.version < 3 ? QCOW2_HEADER_V2 : QCOW2_HEADER_TYPE;
    if (lay->h.compression)
        lay->h.incompatible |= QCOW2_COMPRESSION;
    if (lay->h.autoclear & QCOW2_DATA_RAW && !lay->prealloc)
        lay->prealloc = QCOW2_PREALLOC_METADATA; /* every byte's place is known from the start */
    if (lay->h.crypt)
        r = luks_plan(&lay->encrypt, path, "encrypt.", &lay->luks, err);
    lay->crypto = dr_div_up(lay->luks.payload, qcow2_cluster(&lay->h));
    if (r == 0)
        r = count_tables(lay, path, err);
    return r < 0 ? r : qcow2_layout_counts(lay, path, err);
}

/* ------------------------------------------------------------------ the first cluster */

struct writer {
    uint8_t *head;
    uint64_t at, end;
};

/* False: no room. */
static bool add_extension(struct writer *w, uint32_t type, const void *data, size_t len)
{
    if (w->at + 8 + dr_round_up(len, 8) > w->end)
        return false;
    put_be32(w->head + w->at, type);
    put_be32(w->head + w->at + 4, (uint32_t)len);
    memcpy(w->head + w->at + 8, data, len);
    w->at += 8 + dr_round_up(len, 8);
    return true;
}

const uint8_t *qcow2_feature_table(size_t *len)
{
    static const struct {
        uint8_t kind, bit;
        char name[46];
    } table[] = {
        {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
        {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
        {2, 0, "bitmaps"},          {2, 1, "raw external data"},
    };
    *len = sizeof(table);
    return (const uint8_t *)table;
}

static bool add_crypto(struct writer *w, const struct qcow2_layout *lay)
{
    uint8_t where[16];
    put_be64(where, qcow2_crypto_first(lay) * qcow2_cluster(&lay->h));
    put_be64(where + 8, lay->luks.payload);
    return !lay->h.crypt || add_extension(w, QCOW2_EXT_CRYPTO, where, sizeof(where));
}

int qcow2_first_cluster(struct qcow2_layout *lay, const char *path, uint8_t *head,
                        struct dr_error *err)
{
    struct qcow2_header *h = &lay->h;
    struct writer w = {.head = head, .at = h->length, .end = qcow2_cluster(h)};
    const char *format = lay->backing_name ? lay->backing_format : NULL;
    bool fits = true;
    size_t features_len;
    const uint8_t *features = qcow2_feature_table(&features_len);
    memset(head, 0, qcow2_cluster(h));
    if (format)
        fits = add_extension(&w, QCOW2_EXT_BACKING_FORMAT, format, strlen(format));
    if (fits && lay->data_file)
        fits = add_extension(&w, QCOW2_EXT_DATA_FILE, lay->data_file, strlen(lay->data_file));
    fits = fits && add_crypto(&w, lay);
    if (fits && h->version >= 3 && qcow2_cluster(h) > 4096)
        fits = add_extension(&w, QCOW2_EXT_FEATURES, features, features_len);
    if (fits)
        fits = add_extension(&w, QCOW2_EXT_END, "", 0);
    if (lay->backing_name) {
        size_t len = strlen(lay->backing_name);
        if (len > QCOW2_MAX_NAME)
            return dr_fail(err, EINVAL, "%s: the backing file's name has %zu bytes, at most %u fit",
                           path, len, QCOW2_MAX_NAME);
        fits = fits && w.at + len <= w.end;
        if (fits)
            memcpy(head + w.at, lay->backing_name, len);
        h->backing_at = w.at;
        h->backing_len = (uint32_t)len;
    }
    if (!fits)
        return dr_fail(err, ENOSPC,
                       "%s: the names of its other files do not fit into a first cluster of %llu "
                       "bytes; choose a larger cluster size or shorter names",
                       path, ULL(qcow2_cluster(h)));
    qcow2_header_encode(h, head);
    return 0;
}
