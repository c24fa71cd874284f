/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* info and check: what qemu-img prints about an image, as JSON in its order of keys. */
#include "base/cleanup.h"
#include "base/json.h"
#include "ops/ops-internal.h"
#include "storage/rehearsal.h"

static inline void cleanup_json(json_t **j)
{
    json_decref(*j);
}
#define CLEANUP_JSON __attribute__((cleanup(cleanup_json)))

static json_t *number(uint64_t v)
{
    return json_integer((json_int_t)v);
}

/* Without a text there is no key. */
static void put_text(json_t **object, const char *key, const char *text)
{
    if (text)
        dr_json_put(object, key, dr_json_text(text));
}

/* A json: name may have the secrets of an --object in it, and what is printed goes into logs. */
static void put_filename(json_t **object, const char *path)
{
    CLEANUP_FREE char *hidden = strncmp(path, "json:", 5) == 0 ? strdup(path) : NULL;
    if (hidden)
        dr_hide_secrets(hidden);
    put_text(object, "filename", hidden ? hidden : path);
}

/* The text of a value is the caller's. */
static int dump(const json_t *value, char **json, struct dr_error *err)
{
    *json = dr_json_dump(value, JSON_INDENT(4));
    return *json ? 0 : dr_fail(err, ENOMEM, "out of memory for the description");
}

static int no_memory(const struct dr_image *image, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory for its description", image->path);
}

/* ------------------------------------------------------------------ info */

static int put_backing(json_t **object, struct dr_image *image,
                       const struct dr_open_options *options, struct dr_error *err)
{
    if (!image->backing_name)
        return 0;
    CLEANUP_FREE char *full = NULL;
    int r = dr_ops_backing_path(image, options, &full, err);
    if (r < 0 && r != -ENOENT)
        return r;
    if (!full)
        full = dr_ops_resolve(image->path, image->backing_name);
    if (!full)
        return no_memory(image, err);
    put_text(object, "full-backing-filename", full);
    put_text(object, "backing-filename", image->backing_name);
    return 0;
}

static int specific(struct dr_image *image, json_t **out, uint64_t *cluster, struct dr_error *err)
{
    *out = NULL;
    *cluster = 0;
    if (!image->fmt->info)
        return 0;
    CLEANUP_JSON json_t *data = json_object();
    pthread_mutex_lock(&image->begin_lock); /* begin_write edits what info reads */
    int r = image->fmt->info(image, data, cluster, err);
    pthread_mutex_unlock(&image->begin_lock);
    if (r < 0 || json_object_size(data) == 0)
        return r;
    *out = json_object();
    put_text(out, "type", image->fmt->name);
    dr_json_put(out, "data", json_incref(data));
    return *out ? 0 : no_memory(image, err);
}

static int describe_snapshot(void *user, const struct dr_snapshot_info *s)
{
    json_t *o = json_object();
    if (s->has_icount)
        dr_json_put(&o, "icount", number(s->icount));
    dr_json_put(&o, "vm-clock-nsec", number(s->clock_ns % 1000000000));
    put_text(&o, "name", s->name);
    dr_json_put(&o, "date-sec", json_integer(s->seconds));
    dr_json_put(&o, "date-nsec", number(s->nanoseconds));
    dr_json_put(&o, "vm-clock-sec", number(s->clock_ns / 1000000000));
    put_text(&o, "id", s->id);
    dr_json_put(&o, "vm-state-size", number(s->vm_state));
    return json_array_append_new(user, o) == 0 ? 0 : -ENOMEM;
}

static int put_snapshots(json_t **object, struct dr_image *image, struct dr_error *err)
{
    CLEANUP_JSON json_t *all = json_array();
    int r = dr_image_snapshot_list(image, describe_snapshot, all, err);
    if (r == 0 && json_array_size(all) > 0)
        dr_json_put(object, "snapshots", json_incref(all));
    return r;
}

static int describe_bitmap(void *user, const struct dr_bitmap_info *b)
{
    json_t *o = json_object(), *flags = json_array();
    if (b->inconsistent && !b->distrust)
        dr_json_append(&flags, json_string("in-use"));
    if (b->enabled)
        dr_json_append(&flags, json_string("auto"));
    dr_json_put(&o, "flags", flags);
    put_text(&o, "name", b->name);
    dr_json_put(&o, "granularity", number(b->granularity));
    put_text(&o, "untrusted", b->distrust);
    return json_array_append_new(user, o) == 0 ? 0 : -ENOMEM;
}

/* Bitmaps beside the image; the driver tells of those inside. A damaged file of them is no reason
 * to say nothing about the image. */
static int put_bitmaps(json_t **object, struct dr_image *image, struct dr_error *err)
{
    CLEANUP_JSON json_t *all = json_array();
    struct dr_error why = DR_ERROR_INIT;
    if (dr_image_bitmaps_inside(image))
        return 0;
    int r = dr_image_bitmap_list(image, describe_bitmap, all, &why);
    if (r == -EBADMSG)
        put_text(object, "bitmaps-problem", why.text);
    else if (r < 0 && r != -ENOTSUP)
        return dr_fail(err, -r, "%s", why.text);
    if (json_array_size(all) > 0)
        dr_json_put(object, "bitmaps", json_incref(all));
    return 0;
}

static int describe(struct dr_image *image, const struct dr_open_options *options, json_t **out,
                    struct dr_error *err)
{
    CLEANUP_JSON json_t *o = json_object();
    CLEANUP_JSON json_t *data = NULL;
    uint64_t cluster = 0, disk = 0;
    int r = specific(image, &data, &cluster, err);
    if (r == 0)
        r = dr_ops_disk_size(image, &disk, err);
    if (r == 0)
        r = put_snapshots(&o, image, err);
    if (r == 0)
        r = put_bitmaps(&o, image, err);
    if (r < 0)
        return r;
    put_text(&o, "backing-filename-format", image->backing_name ? image->backing_format : NULL);
    dr_json_put(&o, "virtual-size", number(image->size));
    put_filename(&o, image->path);
    if (cluster)
        dr_json_put(&o, "cluster-size", number(cluster));
    put_text(&o, "format", image->fmt->name);
    put_text(&o, "packed-by", image->packer);
    dr_json_put(&o, "actual-size", number(disk));
    if (data)
        dr_json_put(&o, "format-specific", json_incref(data));
    r = put_backing(&o, image, options, err);
    if (r < 0)
        return r;
    if (image->fmt->encrypted && image->fmt->encrypted(image))
        dr_json_put(&o, "encrypted", json_true());
    dr_json_put(&o, "dirty-flag", json_boolean(image->unclean));
    *out = json_incref(o);
    return o ? 0 : no_memory(image, err);
}

/* One image a pass of the gate: while an image is described nobody gives it another parent. 1: the
 * disk has another chain now. */
static int describe_at(struct dr_disk *disk, const struct dr_chain *chain, size_t i,
                       const struct dr_open_options *options, json_t *all, struct dr_error *err)
{
    struct dr_pass pass;
    json_t *one = NULL;
    int r = 1;
    if (dr_disk_enter(disk, &pass) == chain)
        r = describe(pass.chain->images[i], options, &one, err);
    if (r == 0 && json_array_append_new(all, one) < 0)
        r = no_memory(chain->images[i], err);
    dr_disk_leave(disk, &pass);
    return r;
}

/* 1: the disk got another chain meanwhile. */
static int describe_chain(struct dr_disk *disk, const struct dr_open_options *options, bool whole,
                          json_t *all, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(disk);
    int r = 0;
    json_array_clear(all);
    for (size_t i = 0; r == 0 && i < (whole ? chain->n : 1); i++)
        r = describe_at(disk, chain, i, options, all, err);
    dr_chain_unref(chain, NULL);
    return r;
}

static int info(struct dr_disk *disk, const struct dr_open_options *options, bool chain,
                char **json, struct dr_error *err)
{
    CLEANUP_JSON json_t *all = json_array();
    int r;
    do
        r = describe_chain(disk, options, chain, all, err);
    while (r > 0);
    return r < 0 ? r : dump(chain ? all : json_array_get(all, 0), json, err);
}

int dr_disk_info(struct dr_disk *disk, const struct dr_open_options *options, bool chain,
                 char **json, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(json, err);
    return info(disk, options, chain, json, err);
}

int dr_info_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               bool chain, char **json, struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    open.flags |= DR_OPEN_WHOLE;
    if (!chain)
        open.flags |= DR_OPEN_NO_BACKING;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    return r < 0 ? r : info(disk, &open, chain, json, err);
}

int dr_info(const char *path, const struct dr_open_options *options, bool chain, char **json,
            struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(json, err);
    return dr_info_fs(dr_fs_posix(), path, options, chain, json, err);
}

/* ------------------------------------------------------------------ check */

static void put_number(json_t **o, const char *key, uint64_t v)
{
    if (v)
        dr_json_put(o, key, number(v));
}

static json_t *check_report(const struct dr_image *image, const struct dr_check_result *c)
{
    json_t *o = json_object();
    put_number(&o, "image-end-offset", c->image_end_offset);
    put_number(&o, "compressed-clusters", c->compressed_clusters);
    put_number(&o, "total-clusters", c->total_clusters);
    put_number(&o, "corruptions-fixed", c->corruptions_fixed);
    put_number(&o, "corruptions", c->corruptions);
    dr_json_put(&o, "check-errors", number(c->check_errors));
    put_number(&o, "leaks-fixed", c->leaks_fixed);
    put_number(&o, "leaks", c->leaks);
    put_number(&o, "allocated-clusters", c->allocated_clusters);
    put_filename(&o, image->path);
    put_text(&o, "format", image->fmt->name);
    put_number(&o, "fragmented-clusters", c->fragmented_clusters);
    return o;
}

static void drop_line(void *user, const char *line)
{
    (void)user;
    (void)line;
}

/* After a repair what is left is counted afresh, as qemu-img does. */
/* What a killed writer did not flush is durable before a repair builds on it: places that only the
 * disk itself still leads to are not free. */
static int check_image(struct dr_image *image, unsigned repair, struct dr_check_result *c,
                       struct dr_error *err)
{
    int r = repair ? dr_image_harden(image, err) : 0;
    if (r == 0)
        r = image->fmt->check(image, repair, c, err);
    if (r < 0 || repair == 0 || (c->corruptions_fixed == 0 && c->leaks_fixed == 0))
        return r;
    struct dr_check_result again = {.report = drop_line};
    r = image->fmt->check(image, 0, &again, err);
    again.corruptions_fixed = c->corruptions_fixed;
    again.leaks_fixed = c->leaks_fixed;
    *c = again;
    return r;
}

/* Opening recovers, and refuses damage that a crash does not make: that is for the repair. Where
 * the repair finds what opening would recover, too, it gets the image as it is, and tells of it. */
static int open_checked(struct dr_fs *fs, const char *path, struct dr_open_options open,
                        unsigned repair, struct dr_disk **disk, struct dr_error *err)
{
    struct dr_open_options as_found = open;
    struct dr_error why = DR_ERROR_INIT;
    as_found.flags |= DR_OPEN_AS_FOUND;
    if (repair && dr_open_fs(fs, path, &as_found, disk, NULL) == 0) {
        if ((*disk)->chain->images[0]->fmt->flags & DR_FORMAT_REPAIR_AS_FOUND)
            return 0;
        dr_ops_close(disk, NULL);
    }
    int r = dr_open_fs(fs, path, &open, disk, &why);
    if (r == 0)
        return 0;
    if (r == -EIO && repair && dr_open_fs(fs, path, &as_found, disk, NULL) == 0)
        return 0;
    return dr_fail(err, -r, "%s", why.text);
}

/* What a repair would change. */
#define MAX_PLAN   100000u
#define PLAN_BYTES (UINT64_C(48) << 20)

struct checking {
    unsigned repair; /* enum dr_repair */
    void (*report)(void *user, const char *line);
    void *user;
    char **json;
    json_t *plan; /* of a dry run */
    uint64_t plan_more;
    bool plan_lost;  /* a change is missing in it for want of memory */
    bool says_bytes; /* the driver does not say what it changes */
};

static void report_finding(void *user, const char *line)
{
    const struct checking *c = user;
    c->report(c->user, line);
}

static void plan_change(void *user, uint64_t off, const char *change)
{
    struct checking *c = user;
    if (json_array_size(c->plan) >= MAX_PLAN) {
        c->plan_more++;
        return;
    }
    json_t *o = json_object();
    dr_json_put(&o, "offset", number(off));
    put_text(&o, "change", change);
    c->plan_lost |= json_array_append_new(c->plan, o) < 0;
}

static void plan_write(void *user, const char *path, uint64_t off, uint64_t len)
{
    struct checking *c = user;
    char text[512];
    if (!c->says_bytes)
        return;
    if (len)
        snprintf(text, sizeof(text), "%llu bytes of %s are written", (unsigned long long)len, path);
    else
        snprintf(text, sizeof(text), "%s ends here", path);
    plan_change(c, off, text);
}

static int check_planned(struct checking *c, struct dr_image *image, struct dr_check_result *result,
                         struct dr_error *err)
{
    c->says_bytes = !(image->fmt->flags & DR_FORMAT_PLANS);
    result->plan = plan_change;
    int r = image->fmt->check(image, c->repair, result, err);
    c->says_bytes = false;
    return r;
}

/* Nothing is fixed: what would be counts as found. */
static void put_plan(const struct checking *c, json_t **o, struct dr_check_result *result)
{
    dr_json_put(o, "corruptions-fixable", number(result->corruptions_fixed));
    dr_json_put(o, "leaks-fixable", number(result->leaks_fixed));
    dr_json_put(o, "plan", c->plan_lost ? NULL : json_incref(c->plan));
    put_number(o, "plan-more", c->plan_more);
    result->corruptions += result->corruptions_fixed;
    result->leaks += result->leaks_fixed;
    result->corruptions_fixed = result->leaks_fixed = 0;
}

/* Is the parent the one that the image was made on? Nothing here knows what is right if it is not.
 * One that cannot be opened keeps nobody from checking the child. */
static void check_parent(struct dr_image *image, struct dr_check_result *result)
{
    struct dr_error why = DR_ERROR_INIT;
    const struct dr_open_options share = {.flags = DR_OPEN_FORCE_SHARE};
    CLEANUP_FREE char *path = NULL;
    if (!image->fmt->check_backing || !image->backing_name ||
        dr_backing_locate(image, &share, &path, &why) != -ESTALE)
        return;
    result->report(result->user, why.text);
    result->corruptions++;
}

static int check_chain(struct checking *c, struct dr_chain *chain, struct dr_error *err)
{
    struct dr_image *image = chain->images[0];
    if (!image->fmt->check)
        return dr_fail(err, ENOTSUP, "This image format does not support checks");
    struct dr_check_result result = {.report = c->report ? report_finding : drop_line, .user = c};
    int r = c->plan ? check_planned(c, image, &result, err)
                    : check_image(image, c->repair, &result, err);
    if (r < 0)
        return r;
    check_parent(image, &result);
    CLEANUP_JSON json_t *extra = json_object();
    if (c->plan)
        put_plan(c, &extra, &result);
    CLEANUP_JSON json_t *o = check_report(image, &result);
    int bad = json_object_update(o, extra);
    return dump(bad ? NULL : o, c->json, err);
}

static int check_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    (void)fresh;
    int r = dr_chain_flush(present, 0, err);
    if (r == 0) /* what a flush has freed is counted until the next one */
        r = dr_image_flush_all(present->images[0], err);
    return r < 0 ? r : check_chain(user, present, err);
}

int dr_disk_check(struct dr_disk *disk, void (*report)(void *user, const char *line), void *user,
                  char **json, struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(json, err);
    struct checking c = {.report = report, .user = user, .json = json};
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    if (dr_writable(disk)) {
        uint64_t pause = 0;
        r = dr_disk_quiesce(disk, check_step, &c, &pause, err);
        dr_job_held(job, pause);
    } else {
        struct dr_chain *chain = dr_disk_chain(disk);
        r = check_chain(&c, chain, err);
        dr_chain_unref(chain, NULL);
    }
    return dr_job_end(job, r);
}

static int check_opened(struct checking *c, struct dr_fs *fs, const char *path,
                        struct dr_open_options open, struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    /* A broken parent must not keep the child from being checked. */
    open.flags |= DR_OPEN_NO_BACKING | DR_OPEN_WHOLE;
    if (c->repair)
        open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = open_checked(fs, path, open, c->repair, &disk, err);
    if (r == 0)
        r = check_chain(c, disk->chain, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* The repair itself, on a copy in memory. */
static int check_rehearsed(struct checking *c, struct dr_fs *fs, const char *path,
                           struct dr_open_options open, struct dr_error *err)
{
    struct dr_rehearsal *rehearsal = dr_rehearsal_new(fs, PLAN_BYTES, plan_write, c);
    c->plan = json_array();
    int r = rehearsal && c->plan ? check_opened(c, dr_rehearsal_fs(rehearsal), path, open, err)
                                 : dr_fail(err, ENOMEM, "%s: out of memory", path);
    json_decref(c->plan);
    dr_rehearsal_free(rehearsal);
    return r;
}

int dr_check_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                unsigned repair, void (*report)(void *user, const char *line), void *user,
                char **json, struct dr_error *err)
{
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    bool dry = repair & DR_REPAIR_DRY_RUN;
    struct checking c = {.repair = repair & ~(unsigned)DR_REPAIR_DRY_RUN,
                         .report = report,
                         .user = user,
                         .json = json};
    return dry && c.repair ? check_rehearsed(&c, fs, path, open, err)
                           : check_opened(&c, fs, path, open, err);
}

int dr_check(const char *path, const struct dr_open_options *options, unsigned repair,
             void (*report)(void *user, const char *line), void *user, char **json,
             struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(json, err);
    return dr_check_fs(dr_fs_posix(), path, options, repair, report, user, json, err);
}
