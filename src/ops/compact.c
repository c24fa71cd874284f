/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* compact: give back what an image takes and does not need. Three steps, each of which leaves a
 * right image:
 *
 *   1. zeros: units that hold only zeros give up their place; this reads all data once
 *   2. units: what stands near the file's end moves into free places before it
 *   3. tables: while no request is under way, tables follow, and the file is cut where nothing is
 * left
 *
 * Before all of them the image is checked, and nothing is moved in a damaged one.
 *
 * The driver chooses between 1 and 2 how long the file can become (core/compact.c). A dry run looks
 * for zeros, asks the driver the same, and writes nothing. */
#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/ops-internal.h"
#include "ops/stock.h"

#define FLAT_BLOCK    UINT64_C(4096) /* what file systems give back */
#define CHECKS_BESIDE 2u             /* the second one seldom finds what the first one mistook */
#define MOST_ROUNDS   4u             /* one more is enough, unless others write meanwhile */

struct compact {
    struct dr_disk *disk;
    struct dr_chain *chain;
    struct dr_image *image; /* on top */
    const struct dr_compact_options *o;
    bool shared; /* others write to the disk meanwhile */
    bool again;  /* the driver has moved tables, and where they stood there is room now */
    struct dr_job *job;
    uint64_t size, pos;
    uint64_t zeros, moved; /* by several threads */
};

enum item_kind {
    ITEM_LOOK,  /* read, and vacate what is zeros */
    ITEM_GIVE,  /* zeros that have a place: vacate all */
    ITEM_LOWER, /* move down */
};

/* Where an item of whole units from off on ends: at most at end, and at most one buffer long unless
 * one unit is longer than that. */
static uint64_t item_end(const struct compact *c, uint64_t off, uint64_t end, bool flat)
{
    uint64_t at = off, uoff = off, ulen = FLAT_BLOCK;
    if (flat)
        return dr_min(end, dr_round_down(off, DR_STOCK_BUFFER) + DR_STOCK_BUFFER);
    while (at < end) {
        c->image->fmt->unit(c->image, at, &uoff, &ulen);
        if (at > off && uoff + ulen - off > DR_STOCK_BUFFER)
            break;
        at = uoff + ulen;
    }
    return dr_min(at, c->size);
}

static uint64_t unit_start(const struct compact *c, uint64_t off)
{
    uint64_t uoff, ulen;
    c->image->fmt->unit(c->image, off, &uoff, &ulen);
    return uoff;
}

/* ------------------------------------------------------------------ zeros */

/* Cut what a flat file has at ext to one run of it. *hole: there is nothing to give back. */
static int flat_run(struct dr_extent *ext, bool *hole, struct dr_error *err)
{
    enum dr_file_extent kind;
    uint64_t run;
    int r = dr_file_extent(ext->file, ext->host, ext->len, &kind, &run, err);
    *hole = r == 0 && kind == DR_FILE_HOLE;
    if (r == 0)
        ext->len = dr_min(ext->len, run);
    return r;
}

/* Where the last of the whole units in [off, off+len) ends; off: none begins at off. */
static uint64_t whole_units_end(const struct compact *c, uint64_t off, uint64_t len)
{
    if (unit_start(c, off) != off)
        return off;
    return off + len == c->size ? c->size : unit_start(c, off + len);
}

/* What to do with the bytes from off on, and up to where. Of a unit, a part may be zeros with a
 * place and the rest nothing, where the parent is seen: only reading tells. What snapshots inside
 * share would not come free, and a table that says so would be one more. */
static bool zeros_kind(const struct compact *c, uint64_t off, const struct dr_extent *ext,
                       enum item_kind *kind, uint64_t *end)
{
    bool placed = ext->kind == DR_ZERO && ext->placed;
    if (ext->shared)
        return false;
    *kind = ITEM_GIVE;
    *end = whole_units_end(c, off, ext->len);
    if (placed && *end > off)
        return true;
    *kind = ITEM_LOOK;
    *end = off + ext->len;
    return !c->o->no_zeros && (placed || ext->kind == DR_DATA || ext->kind == DR_CODED);
}

static int zeros_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct compact *c = user;
    while (c->pos < c->size) {
        struct dr_extent ext;
        uint64_t off = c->pos;
        bool hole = false;
        int r = dr_image_map(c->image, off, c->size - off, &ext, err);
        if (r == 0 && ext.kind == DR_DATA && ext.flat)
            r = flat_run(&ext, &hole, err);
        if (r < 0)
            return r;
        enum item_kind kind;
        uint64_t end;
        if (hole || !zeros_kind(c, off, &ext, &kind, &end)) {
            c->pos += ext.len;
            item->passed += ext.len;
            continue;
        }
        item->kind = kind;
        item->aux[0] = ext.flat;
        item->off = ext.flat ? off : unit_start(c, off);
        c->pos = item_end(c, off, end, ext.flat);
        item->len = c->pos - item->off;
        return 1;
    }
    return 0;
}

/* The unit is longer than a buffer. */
static int long_unit_is_zero(struct compact *c, const struct dr_copy_item *item, uint8_t *buf,
                             bool *zero, struct dr_error *err)
{
    *zero = true;
    for (uint64_t at = 0, n; *zero && at < item->len; at += n) {
        n = dr_min(item->len - at, DR_STOCK_BUFFER);
        int r = dr_chain_read(c->chain, 0, buf, item->off + at, (size_t)n, err);
        if (r < 0)
            return r;
        *zero = dr_is_zero(buf, (size_t)n);
    }
    return 0;
}

/* aux[1]: all of a long unit is zeros. */
static int zeros_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct compact *c = user;
    bool zero = true;
    int r = 0;
    if (item->kind == ITEM_LOOK && item->len > DR_STOCK_BUFFER)
        r = long_unit_is_zero(c, item, buf[0], &zero, err);
    else if (item->kind == ITEM_LOOK)
        r = dr_chain_read(c->chain, 0, buf[0], item->off, (size_t)item->len, err);
    item->aux[1] = zero;
    return r;
}

/* The guest may have written since: look again, now that the units are locked. */
static bool still_zero(void *user, uint64_t off, uint64_t len)
{
    const struct compact *c = user;
    CLEANUP_FREE uint8_t *buf = malloc(DR_STOCK_BUFFER);
    bool zero = buf != NULL;
    for (uint64_t at = 0, n; zero && at < len; at += n) {
        n = dr_min(len - at, DR_STOCK_BUFFER);
        zero = dr_chain_read(c->chain, 0, buf, off + at, (size_t)n, NULL) == 0 &&
               dr_is_zero(buf, (size_t)n);
    }
    return zero;
}

/* A dry run: the driver shall suppose that [off, off + len) has no place. */
static int suppose_vacant(struct compact *c, uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = 0;
    struct dr_extent ext = {.len = len};
    for (uint64_t at = off; r == 0 && at < off + len; at += ext.len) {
        r = dr_image_map(c->image, at, off + len - at, &ext, err);
        if (r == 0)
            dr_image_compact_spare(c->image, &ext);
    }
    return r;
}

static int vacate(struct compact *c, uint64_t off, uint64_t len, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = c->o->dry_run
                ? suppose_vacant(c, off, len, &why)
                : dr_chain_vacate(c->chain, 0, off, len, c->shared ? still_zero : NULL, c, &why);
    if (r == -ENOTSUP || r == -EROFS) /* it takes bytes to say so, or that extent is read-only */
        return 0;
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    __atomic_add_fetch(&c->zeros, len, __ATOMIC_RELAXED);
    return 0;
}

/* From *at on: the next units, or blocks of a flat file, that are all zeros. False: there is none.
 */
static bool next_zeros(const struct compact *c, const struct dr_copy_item *item, const uint8_t *buf,
                       uint64_t *at, uint64_t *end)
{
    uint64_t uoff, ulen = FLAT_BLOCK;
    bool found = false;
    for (uint64_t next = *end; next < item->len; *end = next) {
        uoff = dr_round_down(item->off + next, FLAT_BLOCK);
        if (!item->aux[0])
            c->image->fmt->unit(c->image, item->off + next, &uoff, &ulen);
        uint64_t from = next;
        next = dr_min(item->len, uoff + ulen - item->off);
        bool zero = dr_is_zero(buf + from, (size_t)(next - from));
        if (!zero && found)
            return true;
        if (zero && !found)
            *at = from;
        found |= zero;
    }
    return found;
}

static int zeros_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct compact *c = user;
    uint64_t at = 0, end = 0;
    int r = 0;
    if (item->kind == ITEM_GIVE || item->len > DR_STOCK_BUFFER)
        return item->aux[1] ? vacate(c, item->off, item->len, err) : 0;
    while (r == 0 && next_zeros(c, item, buf[0], &at, &end))
        r = vacate(c, item->off + at, end - at, err);
    return r;
}

/* ------------------------------------------------------------------ units */

static int units_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct compact *c = user;
    while (c->pos < c->size) {
        struct dr_extent ext;
        uint64_t off = c->pos;
        int r = dr_image_map(c->image, off, c->size - off, &ext, err);
        if (r < 0)
            return r;
        if (!dr_image_compact_moves(c->image, &ext)) {
            c->pos += ext.len;
            item->passed += ext.len;
            continue;
        }
        item->kind = ITEM_LOWER;
        item->off = unit_start(c, off);
        c->pos = item_end(c, off, off + ext.len, false);
        item->len = c->pos - item->off;
        return 1;
    }
    return 0;
}

static int units_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct compact *c = user;
    (void)buf;
    item->writing = true;
    int r = dr_chain_lower(c->chain, 0, item->off, item->len, err);
    if (r == 0)
        __atomic_add_fetch(&c->moved, item->len, __ATOMIC_RELAXED);
    return r;
}

/* ------------------------------------------------------------------ all of it */

/* Both passes go over the whole disk. */
static int run_pass(struct compact *c, bool zeros, struct dr_error *err)
{
    bool two = c->image->fmt->compact_begin && !c->o->dry_run;
    struct dr_copy_policy policy = {
        .user = c,
        .next = zeros ? zeros_next : units_next,
        .work = zeros ? zeros_work : units_work,
        .emit = zeros ? zeros_emit : NULL,
        .buffers = zeros,
        .buffer_size = zeros ? DR_STOCK_BUFFER : 0,
        .depth = dr_stock_depth(c->chain),
        .total = c->size,
        .before = zeros ? 0 : c->size,
        .after = zeros && two ? c->size : 0,
    };
    c->pos = 0;
    return dr_copy_run(&policy, c->job, err);
}

static uint64_t length_of(struct dr_image *image)
{
    uint64_t length = 0;
    DR_LOCK_SCOPE(&image->lock);
    for (unsigned i = 0; i < image->n_files; i++)
        length += dr_file_size(image->files[i]);
    return length;
}

/* ------------------------------------------------------------------ what is damaged */

static void drop_line(void *user, const char *line)
{
    (void)user;
    (void)line;
}

/* Nothing is moved by tables that contradict each other: what one of them calls free, and another
 * one leads to, would be overwritten. */
static int refuse_damaged(struct dr_image *image, unsigned fix, struct dr_error *err)
{
    struct dr_check_result found = {.report = drop_line};
    int r = image->fmt->check ? image->fmt->check(image, fix, &found, err) : 0;
    if (r == 0 && found.corruptions)
        r = dr_fail(err, EIO,
                    "%s: is damaged, %llu errors were found in it; `drover check` names them",
                    image->path, (unsigned long long)found.corruptions);
    return r;
}

/* What a killed attempt has leaked comes back first: it would keep the file from being cut. What
 * that attempt did not flush must be durable before: a place is free only when nothing durable
 * leads there. */
static int check_first(struct dr_image *image, bool repair, struct dr_error *err)
{
    int r = repair ? dr_image_harden(image, err) : 0;
    return r < 0 ? r : refuse_damaged(image, repair ? DR_CHECK_FIX_LEAKS : 0, err);
}

/* Others wait while the tables are looked at. */
static int check_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct dr_image *image = present->images[0];
    (void)user;
    (void)fresh;
    int r = image->writable ? dr_image_flush_all(image, err) : 0;
    return r < 0 ? r : refuse_damaged(image, 0, err);
}

/* ------------------------------------------------------------------ all of it, in steps */

static int run_step(struct compact *c, dr_quiet_step step, struct dr_error *err);

/* Others write to the disk, and go on. What seems to be damage may be what they were about to
 * write: then they wait for the check that tells. */
static int check_beside(struct compact *c, struct dr_error *err)
{
    for (unsigned i = 0; c->image->fmt->check && i < CHECKS_BESIDE; i++) {
        struct dr_check_result found = {.report = drop_line};
        int r = dr_image_check_beside(c->image, &found, err);
        if (r < 0 || found.corruptions == 0)
            return r;
    }
    return run_step(c, check_step, err);
}

/* What the driver does to tables as a whole, it does while no request is under way. */
static int begin_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    (void)user;
    (void)fresh;
    return dr_image_compact_begin(present->images[0], err);
}

static int finish_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct compact *c = user;
    (void)fresh;
    c->again = false;
    return dr_image_compact_finish(present->images[0], &c->again, err);
}

static int run_step(struct compact *c, dr_quiet_step step, struct dr_error *err)
{
    uint64_t pause = 0;
    int r = dr_disk_quiesce(c->disk, step, c, &pause, err);
    dr_job_held(c->job, pause);
    return r;
}

static int begin(struct compact *c, struct dr_error *err)
{
    int r = run_step(c, begin_step, err);
    return r < 0 ? r : dr_image_compact_look(c->image, err);
}

static int pretend(struct compact *c, struct dr_compact_result *result, struct dr_error *err)
{
    int r = begin(c, err);
    if (r == 0)
        r = run_pass(c, true, err);
    if (r == 0)
        result->after = dr_min(result->before, dr_image_compact_length(c->image));
    dr_image_compact_end(c->image);
    result->used_after -= dr_min(result->used_after, c->zeros);
    return r;
}

static int move_once(struct compact *c, struct dr_error *err)
{
    int r = begin(c, err);
    if (r == 0 && c->image->fmt->compact_begin)
        r = run_pass(c, false, err);
    if (r == 0)
        r = dr_job_rest(c->job, err);
    if (r == 0)
        r = run_step(c, finish_step, err);
    dr_image_compact_end(c->image);
    return r;
}

static int move(struct compact *c, struct dr_error *err)
{
    int r = move_once(c, err);
    for (unsigned rounds = 1; r == 0 && c->again && rounds < MOST_ROUNDS; rounds++)
        r = move_once(c, err);
    return r;
}

static int change(struct compact *c, struct dr_compact_result *result, struct dr_error *err)
{
    int r = run_pass(c, true, err);
    if (r == 0)
        r = dr_image_flush_all(c->image, err);
    if (r == 0)
        r = move(c, err);
    if (r == 0)
        r = dr_image_flush_all(c->image, err);
    result->after = length_of(c->image);
    int used = dr_ops_disk_size(c->image, &result->used_after, r < 0 ? NULL : err);
    return r < 0 ? r : used;
}

static int compact_chain(struct compact *c, struct dr_compact_result *result, struct dr_error *err)
{
    c->image = c->chain->images[0];
    c->size = c->image->size;
    result->before = result->after = length_of(c->image);
    int r = dr_ops_disk_size(c->image, &result->used_before, err);
    result->used_after = result->used_before;
    if (r == 0 && c->shared)
        r = check_beside(c, err);
    if (r == 0)
        r = c->o->dry_run ? pretend(c, result, err) : change(c, result, err);
    result->zeros = c->zeros;
    result->moved = c->moved;
    return r;
}

static int compact(struct dr_disk *disk, const struct dr_compact_options *o, bool shared,
                   struct dr_job *job, struct dr_compact_result *result, struct dr_error *err)
{
    struct dr_compact_result ignored;
    struct compact c = {.disk = disk, .o = o, .shared = shared, .job = job};
    result = result ? result : &ignored;
    *result = (struct dr_compact_result){0};
    if (!o->dry_run && !dr_writable(disk))
        return dr_fail(err, EROFS, "%s: is open for reading only", dr_image_path(disk, 0));
    if (!(dr_format_find(dr_image_format(disk, 0))->flags & DR_FORMAT_WRITE))
        return dr_fail(err, EROFS, "%s: %s images can only be read", dr_image_path(disk, 0),
                       dr_image_format(disk, 0));
    int r = dr_disk_claim(disk, "compact", err);
    if (r < 0)
        return r;
    c.chain = dr_disk_chain(disk);
    r = compact_chain(&c, result, err);
    dr_chain_unref(c.chain, NULL);
    dr_disk_unclaim(disk);
    return r;
}

int dr_disk_compact(struct dr_disk *disk, const struct dr_compact_options *options,
                    struct dr_job *job, struct dr_compact_result *result, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    static const struct dr_compact_options defaults;
    int r = dr_job_begin_beside(job, disk, err);
    if (r < 0)
        return r;
    return dr_job_end(job, compact(disk, options ? options : &defaults, true, job, result, err));
}

/* ------------------------------------------------------------------ by path */

int dr_compact_fs(struct dr_fs *fs, const char *path, const struct dr_compact_options *o,
                  struct dr_job *job, struct dr_compact_result *result, struct dr_error *err)
{
    struct dr_open_options open = o->open;
    struct dr_disk *disk = NULL;
    if (o->dry_run)
        open.flags &= ~(unsigned)DR_OPEN_RDWR;
    else
        open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    r = check_first(disk->chain->images[0], !o->dry_run, err);
    if (r == 0)
        r = compact(disk, o, false, job, result, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_compact(const char *path, const struct dr_compact_options *options, struct dr_job *job,
               struct dr_compact_result *result, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    static const struct dr_compact_options defaults;
    options = options ? options : &defaults;
    int r = dr_job_begin(job, err);
    return r < 0 ? r
                 : dr_job_end(job, dr_compact_fs(dr_fs_posix(), path, options, job, result, err));
}
