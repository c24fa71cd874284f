/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* amend: another version, width of counts, name of the data file, or another of the features that
 * an image may have or not.
 *
 * Everything is checked before anything changes. Then each step leaves an image that is right as it
 * stands, so an amendment that was cut off is simply asked for again:
 *
 *   FIRST   entries of snapshots get what version 3 demands             a switch of the header
 *           version 3, counts, data file, raw data file, lazy counts    one each
 *   core    the size; for version 2 what reads as zeros becomes bytes, or nothing without a parent
 *   LAST    zeros in snapshots and behind the end become nothing,
 *           then version 2                                              one switch of the header */
#include "formats/qcow2/amend.h"

#include "base/cleanup.h"
#include "formats/qcow2/layout.h"

const struct dr_option_help qcow2_amend_options[] = {
    {"backing_file", "str", "File name of a base image", NULL},
    {"backing_fmt", "str", "Image format of the base image", NULL},
    {"compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", NULL},
    {"data_file", "str", "File name of an external data file", NULL},
    {"data_file_raw", "bool (on/off)", "The external data file must stay valid as a raw image",
     NULL},
    {"lazy_refcounts", "bool (on/off)", "Postpone refcount updates", NULL},
    {"refcount_bits", "num", "Width of a reference count entry in bits", NULL},
    {"size", "size", "Virtual disk size", NULL},
    {NULL, NULL, NULL, NULL},
};

static bool is_raw(const struct qcow2 *q)
{
    return q->h.autoclear & QCOW2_DATA_RAW;
}

/* ------------------------------------------------------------------ what is asked for */

static int read_version(struct dr_image *image, const char *value, struct qcow2_amend *a,
                        struct dr_error *err)
{
    if (strcmp(value, "0.10") == 0 || strcmp(value, "v2") == 0)
        a->version = 2;
    else if (strcmp(value, "1.1") == 0 || strcmp(value, "v3") == 0)
        a->version = 3;
    else
        return dr_fail(err, EINVAL, "%s: Unknown compatibility level %s", image->path, value);
    return 0;
}

static int read_flag(struct dr_image *image, const struct dr_option *o, bool *flag,
                     struct dr_error *err)
{
    *flag = strcmp(o->value, "on") == 0;
    if (*flag || strcmp(o->value, "off") == 0)
        return 0;
    return dr_fail(err, EINVAL, "%s: Parameter '%s' expects 'on' or 'off'", image->path, o->name);
}

static int read_option(struct dr_image *image, const struct dr_option *o, struct qcow2_amend *a,
                       struct dr_error *err)
{
    if (strcmp(o->name, "compat") == 0)
        return read_version(image, o->value, a, err);
    if (strcmp(o->name, "lazy_refcounts") == 0)
        return read_flag(image, o, &a->lazy, err);
    if (strcmp(o->name, "data_file_raw") == 0)
        return read_flag(image, o, &a->raw, err);
    if (strcmp(o->name, "data_file") == 0)
        a->data_file = o->value;
    else if (strcmp(o->name, "backing_file") == 0)
        a->backing_file = o->value;
    else if (strcmp(o->name, "backing_fmt") == 0)
        a->backing_format = o->value;
    else if (strcmp(o->name, "refcount_bits") == 0)
        return qcow2_read_width(image->path, o->value, &a->order, err);
    else if (strcmp(o->name, "size") == 0)
        return qcow2_read_size(image->path, o, &a->size, err);
    else if (strncmp(o->name, "encrypt", 7) == 0)
        return qcow2_of(image)->h.crypt
                   ? dr_fail(err, ENOTSUP,
                             "%s: keys of encrypted images are not changed by this version",
                             image->path)
                   : dr_fail(err, EINVAL,
                             "%s: Can't amend encryption options - encryption not present",
                             image->path);
    else
        return dr_fail(err, EINVAL, "%s: Invalid parameter '%s'", image->path, o->name);
    return 0;
}

static int read_options(struct dr_image *image, struct dr_amend *what, struct qcow2_amend *a,
                        struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    int r = 0;
    *a = (struct qcow2_amend){.version = q->h.version,
                              .order = q->h.refcount_order,
                              .lazy = q->h.compatible & QCOW2_LAZY,
                              .raw = is_raw(q),
                              .size = image->size,
                              .what = what};
    for (size_t i = 0; r == 0 && i < what->n_options; i++)
        r = read_option(image, &what->options[i], a, err);
    if (a->size == 0) /* no disk is meant to vanish */
        a->size = image->size;
    return r;
}

/* ------------------------------------------------------------------ may it be? */

static bool differs(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) != 0 : a != b;
}

static int check_features(struct dr_image *image, const struct qcow2_amend *a, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    const char *path = image->path;
    if (a->data_file && !qcow2_has_data_file(q))
        return dr_fail(err, EINVAL,
                       "%s: data-file can only be set for images that use an external data file",
                       path);
    if (a->raw && !is_raw(q))
        return dr_fail(err, EINVAL, "%s: data-file-raw cannot be set on existing images", path);
    if (a->order != q->h.refcount_order && a->version < 3 && a->order != 4)
        return dr_fail(err, EINVAL,
                       "%s: Refcount widths other than 16 bits require compatibility level 1.1 or "
                       "above (use compat=1.1 or greater)",
                       path);
    if ((a->backing_file || a->backing_format) &&
        (differs(a->backing_file, image->backing_name) ||
         differs(a->backing_format, image->backing_format)))
        return dr_fail(err, EINVAL, "%s: Cannot amend the backing file", path);
    if (a->lazy && !(q->h.compatible & QCOW2_LAZY) && a->version < 3)
        return dr_fail(err, EINVAL,
                       "%s: Lazy refcounts only supported with compatibility level 1.1 and above "
                       "(use compat=1.1 or greater)",
                       path);
    if (a->size % 512)
        return dr_fail(err, EINVAL, "%s: The new size must be a multiple of 512", path);
    if (a->size != image->size && q->h.n_snapshots && dr_max(a->version, q->h.version) < 3)
        return dr_fail(err, ENOTSUP, "%s: Can't resize a version 2 image which has snapshots",
                       path);
    return 0;
}

/* Refuse where the image has something that version 2 cannot hold. */
static int check_downgrade(struct dr_image *image, const struct qcow2_amend *a,
                           struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t incompatible = q->h.incompatible & ~(uint64_t)QCOW2_DIRTY;
    CLEANUP_SNAPSHOTS struct qcow2_snapshots t = {0};
    if (a->order != 4)
        return dr_fail(err, ENOTSUP, "%s: compat=0.10 requires refcount_bits=16", image->path);
    if (qcow2_has_data_file(q))
        return dr_fail(err, ENOTSUP, "%s: Cannot downgrade an image with a data file", image->path);
    if (q->bitmaps_at)
        return dr_fail(err, ENOTSUP,
                       "%s: has bitmaps, which compat=0.10 cannot hold; remove them first",
                       image->path);
    int r = qcow2_snapshots_load(image, &t, err);
    for (uint32_t i = 0; r == 0 && i < t.n; i++)
        if (t.list[i].info.vm_state > UINT32_MAX || t.list[i].info.size != a->size)
            r = dr_fail(err, ENOTSUP, "%s: Internal snapshots prevent downgrade of image",
                        image->path);
    if (r == 0 && incompatible)
        r = dr_fail(err, ENOTSUP,
                    "%s: Cannot downgrade an image with incompatible features 0x%llx set",
                    image->path, ULL(incompatible));
    return r;
}

/* ------------------------------------------------------------------ zeros in snapshots */

struct table_walk {
    struct dr_image *image;
    uint8_t *table; /* one L2 table */
    bool change;
};

/* Version 2 has no entry for zeros. Without a parent nothing reads as zeros, too. */
static int clear_table(struct table_walk *w, uint64_t at, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(w->image);
    struct dr_file *f = w->image->files[0];
    bool found = false;
    int r = dr_file_pread(f, w->table, at, q->cluster, err);
    for (uint64_t i = 0; r == 0 && i < q->l2_entries; i++) {
        uint64_t v = get_be64(w->table + 8 * i);
        if ((v & QCOW2_CODED) || !(v & QCOW2_ZERO))
            continue;
        if ((v & QCOW2_OFFSET) || w->image->backing_name)
            return dr_fail(err, ENOTSUP,
                           "%s: a snapshot has zeros that version 2 could hold only as data (L2 "
                           "entry at byte %llu)%s; delete the snapshot first",
                           w->image->path, ULL(at + 8 * i),
                           w->image->backing_name ? " and a parent below" : "");
        put_be64(w->table + 8 * i, 0);
        found = true;
    }
    if (r == 0 && found && w->change)
        r = dr_file_pwrite(f, w->table, at, q->cluster, err);
    return r;
}

static int clear_tree(struct table_walk *w, const struct qcow2_snapshot *s, struct dr_error *err)
{
    CLEANUP_FREE uint64_t *l1 = calloc(s->l1_entries + 1, 8);
    if (!l1)
        return dr_fail_errno(err, ENOMEM, "%s", w->image->path);
    int r = qcow2_snapshot_check_l1(w->image, s, err);
    if (r == 0)
        r = dr_file_pread(w->image->files[0], l1, s->l1_at, s->l1_entries * 8, err);
    for (uint64_t i = 0; r == 0 && i < s->l1_entries; i++) {
        uint64_t v = get_be64(&l1[i]);
        r = qcow2_check_l1_entry(w->image, s->l1_at + 8 * i, v, err);
        if (r == 0 && (v & QCOW2_OFFSET))
            r = clear_table(w, v & QCOW2_OFFSET, err);
    }
    return r;
}

/* change: false = only find out whether it can be done. */
static int clear_snapshots(struct dr_image *image, bool change, struct dr_error *err)
{
    CLEANUP_SNAPSHOTS struct qcow2_snapshots t = {0};
    CLEANUP_FREE uint8_t *table = malloc(qcow2_of(image)->cluster);
    struct table_walk w = {.image = image, .table = table, .change = change};
    int r = qcow2_snapshots_load(image, &t, err);
    if (r == 0 && !table)
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint32_t i = 0; r == 0 && i < t.n; i++)
        r = clear_tree(&w, &t.list[i], err);
    if (!change)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, 0, UINT64_MAX);
    return r;
}

/* ------------------------------------------------------------------ the phases */

static int check(struct dr_image *image, const struct qcow2_amend *a, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    int r = check_features(image, a, err);
    if (r == 0 && a->version < q->h.version) {
        r = check_downgrade(image, a, err);
        if (r == 0)
            r = clear_snapshots(image, false, err);
    }
    if (r == 0 && (a->version != q->h.version || a->data_file))
        r = qcow2_set_head(image, a->version, a->data_file, true, err);
    if (r == 0 && a->size != image->size)
        r = qcow2_check_size(image, a->size, err);
    a->what->size = a->size;
    a->what->no_zeros = a->version < q->h.version;
    return r;
}

/* Version 3 wants fields of a snapshot that version 2 may lack, and does not mind. */
static int complete_snapshots(struct dr_image *image, struct dr_error *err)
{
    CLEANUP_SNAPSHOTS struct qcow2_snapshots t = {0};
    bool lacks = false;
    int r = qcow2_snapshots_load(image, &t, err);
    for (uint32_t i = 0; r == 0 && i < t.n; i++)
        lacks |= get_be32(t.bytes + t.list[i].at + 36) < 16;
    return r < 0 || !lacks ? r : qcow2_complete_snapshots(image, err);
}

static int change_first(struct dr_image *image, const struct qcow2_amend *a, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    int r = 0;
    bool upgrade = a->version > q->h.version;
    if (upgrade)
        r = complete_snapshots(image, err);
    if (r == 0 && (upgrade || a->data_file))
        r = qcow2_set_head(image, upgrade ? a->version : q->h.version, a->data_file, false, err);
    if (r == 0 && a->order != q->h.refcount_order)
        r = qcow2_change_order(image, a, a->order, err);
    if (r == 0 && a->raw != is_raw(q)) {
        r = qcow2_switch_bits(image, QCOW2_AT_AUTOCLEAR, 0, QCOW2_DATA_RAW, err);
        image->always_placed = is_raw(q);
    }
    bool lazy = q->h.compatible & QCOW2_LAZY;
    if (r == 0 && a->lazy != lazy && q->h.version >= 3)
        r = qcow2_switch_bits(image, QCOW2_AT_COMPATIBLE, a->lazy ? QCOW2_LAZY : 0,
                              a->lazy ? 0 : QCOW2_LAZY, err);
    return r;
}

static int change_last(struct dr_image *image, const struct qcow2_amend *a, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    if (a->version >= q->h.version)
        return 0;
    int r = qcow2_clear_behind(image, err);
    if (r == 0)
        r = dr_image_flush_all(image, err);
    if (r == 0)
        r = clear_snapshots(image, true, err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    return r < 0 ? r : qcow2_set_head(image, a->version, NULL, false, err);
}

int qcow2_amend(struct dr_image *image, struct dr_amend *what, enum dr_amend_phase phase,
                struct dr_error *err)
{
    struct qcow2_amend a;
    int r = read_options(image, what, &a, err);
    if (r < 0)
        return r;
    if (phase == DR_AMEND_CHECK)
        return check(image, &a, err);
    return phase == DR_AMEND_FIRST ? change_first(image, &a, err) : change_last(image, &a, err);
}
