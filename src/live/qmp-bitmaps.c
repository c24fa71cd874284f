/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands about bitmaps of what guests write. A persistent one is kept by the image, inside it or
 * beside it; the others are in memory and end with the server. Both are called by the node that is
 * the image, and no two of an image have the same name. Texts are QEMU's. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/json.h"
#include "live/live.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ which one */

/* An image of a disk, by the name of a node. */
struct spot {
    struct dr_live *live;
    struct live_disk *on;
    char *image; /* its path, malloc'ed */
    bool active; /* it is the disk's active image */
};

/* A disk's name is also that of the node that it began with. It means the active image, as a
 * device's name does in QEMU, but in nodes_first the node. */
static void look_for_spot(struct dr_live *live, const char *node, bool nodes_first,
                          struct spot *spot, struct live_node **closed)
{
    pthread_mutex_lock(&live->lock);
    struct live_disk *on = live_find_device(live, node);
    const char *path = live_node_path(live, node);
    if (on && path && nodes_first && strcmp(path, on->path) != 0)
        on = NULL;
    path = on ? on->path : path;
    spot->image = path ? strdup(path) : NULL;
    *closed = live_find_node(live, node);
    pthread_mutex_unlock(&live->lock);
    spot->active = on;
    for (size_t n = 0; !on && spot->image && (on = live_nth_disk(live, n)); n++)
        on = live_has_image(on, spot->image) ? on : NULL;
    spot->on = on;
    spot->live = live;
}

/* A node that blockdev-add named is opened for that. as_device: what the text
 * calls it. */
static int find_spot_of(struct dr_live *live, const char *node, bool nodes_first, bool as_device,
                        struct spot *spot, struct qmp_error *err)
{
    struct live_node *closed;
    look_for_spot(live, node, nodes_first, spot, &closed);
    if (!spot->on && closed && closed->added && closed->format) {
        spot->on = live_node_disk(live, closed, &err->text);
        if (!spot->on)
            return -EINVAL;
        spot->active = true;
    }
    if (spot->on && spot->image) {
        dr_memory_bitmaps_prune(spot->on->bitmaps);
        return 0;
    }
    if (spot->on)
        qmp_fail(err, NULL, "out of memory");
    else if (as_device)
        qmp_fail(err, NULL, "Cannot find device='%s' nor node-name='%s'", node, node);
    else
        qmp_fail(err, NULL, "Node '%s' not found", node);
    return -ENOENT;
}

static int find_spot(struct dr_live *live, const char *node, bool as_device, struct spot *spot,
                     struct qmp_error *err)
{
    return find_spot_of(live, node, false, as_device, spot, err);
}

static struct dr_image *image_of(const struct spot *spot, const struct dr_chain *chain)
{
    size_t k = dr_ops_member(chain, spot->image);
    return k < chain->n ? chain->images[k] : NULL;
}

struct search {
    const char *name;
    struct live_bitmap *b;
};

static int match_stored(void *user, const struct dr_bitmap_info *info)
{
    const struct search *s = user;
    if (strcmp(info->name, s->name) == 0)
        *s->b = (struct live_bitmap){.found = true,
                                     .stored = true,
                                     .enabled = info->enabled,
                                     .inconsistent = info->inconsistent && !info->noting,
                                     .granularity = info->granularity};
    return 0;
}

static int match_memory(void *user, const struct dr_memory_bitmap_info *info)
{
    const struct search *s = user;
    if (strcmp(info->name, s->name) == 0)
        *s->b = (struct live_bitmap){
            .found = true, .enabled = info->enabled, .granularity = info->granularity};
    return 0;
}

static struct live_planned *find_planned(const struct dr_live *live, const char *image,
                                         const char *name)
{
    struct live_planned *p = live->planned;
    while (p && (strcmp(p->name, name) != 0 || strcmp(p->image, image) != 0))
        p = p->next;
    return p;
}

int live_plan_bitmap(struct dr_live *live, const char *image, const char *name,
                     const struct live_bitmap *b, struct qmp_error *err)
{
    struct live_planned *p = find_planned(live, image, name);
    if (!p) {
        p = calloc(1, sizeof(*p));
        char *its_name = strdup(name), *its_image = strdup(image);
        if (!p || !its_name || !its_image) {
            free(p);
            free(its_name);
            free(its_image);
            return dr_fail(&err->text, ENOMEM, "out of memory for bitmap '%s'", name);
        }
        *p = (struct live_planned){.next = live->planned, .name = its_name, .image = its_image};
        live->planned = p;
    }
    p->b = *b;
    return 0;
}

void live_forget_plans(struct dr_live *live)
{
    struct live_planned *p;
    while ((p = live->planned)) {
        live->planned = p->next;
        free(p->name);
        free(p->image);
        free(p);
    }
}

/* Images without a place for bitmaps have none; what a transaction has planned counts. */
static int search(const struct spot *spot, const char *name, struct live_bitmap *b,
                  struct qmp_error *err)
{
    struct search s = {.name = name, .b = b};
    struct dr_error why = DR_ERROR_INIT;
    struct dr_pass pass;
    *b = (struct live_bitmap){0};
    struct dr_image *image = image_of(spot, dr_disk_enter(spot->on->disk, &pass));
    int r = dr_memory_bitmaps_each(spot->on->bitmaps, spot->image, match_memory, &s);
    if (!b->found && image)
        r = dr_image_bitmap_list(image, match_stored, &s, &why);
    dr_disk_leave(spot->on->disk, &pass);
    const struct live_planned *planned = find_planned(spot->live, spot->image, name);
    if (planned)
        *b = planned->b;
    return r < 0 && r != -ENOTSUP ? dr_fail(&err->text, -r, "%s", why.text) : 0;
}

/* Does a job use it? It does until its end. */
static bool is_busy(struct dr_live *live, const struct live_disk *on, const char *image,
                    const char *name)
{
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_job *job = live->jobs; job; job = job->next)
        if (job->status < LIVE_CONCLUDED && dr_point_uses(job->order.point, on->disk, image, name))
            return true;
    return false;
}

static int find_bitmap(const struct spot *spot, const char *name, struct live_bitmap *b,
                       struct qmp_error *err)
{
    int r = search(spot, name, b, err);
    if (r == 0 && !b->found) {
        qmp_fail(err, NULL, "Dirty bitmap '%s' not found", name);
        r = -ENOENT;
    }
    if (r == 0)
        b->busy |= is_busy(spot->live, spot->on, spot->image, name);
    return r;
}

enum { READS = 1, CHANGES = 2, INCONSISTENT_TOO = 4 }; /* what a command does with a bitmap */

static int check_bitmap(const struct spot *spot, const char *name, const struct live_bitmap *b,
                        unsigned use, struct qmp_error *err)
{
    bool writable = spot->active && dr_writable(spot->on->disk);
    if (b->busy)
        qmp_fail(err, NULL,
                 "Bitmap '%s' is currently in use by another operation and cannot be used", name);
    else if (use & CHANGES && b->stored && !writable)
        qmp_fail(err, NULL, "Bitmap '%s' is readonly and cannot be modified", name);
    else if (b->inconsistent && !(use & INCONSISTENT_TOO))
        qmp_fail(err, NULL, "Bitmap '%s' is inconsistent and cannot be used", name);
    else
        return 0;
    return -EINVAL;
}

int live_find_bitmap(struct dr_live *live, struct live_disk *on, const char *name,
                     struct live_bitmap *b, struct qmp_error *err)
{
    pthread_mutex_lock(&live->lock);
    CLEANUP_FREE char *image = strdup(on->path);
    pthread_mutex_unlock(&live->lock);
    const struct spot spot = {.live = live, .on = on, .image = image, .active = true};
    if (!image)
        return dr_fail(&err->text, ENOMEM, "out of memory for bitmap '%s'", name);
    int r = search(&spot, name, b, err);
    if (r == 0 && b->found)
        b->busy |= is_busy(live, on, image, name);
    return r;
}

int live_check_bitmap(const struct live_disk *on, const char *name, const struct live_bitmap *b,
                      bool change, struct qmp_error *err)
{
    const struct spot spot = {.on = (struct live_disk *)(uintptr_t)on, .active = true};
    return check_bitmap(&spot, name, b, change ? CHANGES : READS, err);
}

/* ------------------------------------------------------------------ showing */

static void show(json_t *all, bool first, const char *name, const struct live_bitmap *b,
                 uint64_t count)
{
    json_t *one = json_pack("{s:o, s:I, s:b, s:b, s:b, s:I}", "name", dr_json_text(name), "count",
                            (json_int_t)count, "recording", b->enabled && !b->inconsistent, "busy",
                            0, "persistent", b->stored, "granularity", (json_int_t)b->granularity);
    if (b->inconsistent)
        json_object_set_new(one, "inconsistent", json_true());
    if (first)
        json_array_insert_new(all, 0, one);
    else
        json_array_append_new(all, one);
}

static int show_memory(void *user, const struct dr_memory_bitmap_info *info)
{
    const struct live_bitmap b = {.enabled = info->enabled, .granularity = info->granularity};
    show(user, false, info->name, &b, info->dirty);
    return 0;
}

/* The names of stored ones, and what is known of them. */
static int list_stored(void *user, const struct dr_bitmap_info *info)
{
    const struct live_bitmap b = {.stored = true,
                                  .enabled = info->enabled,
                                  .inconsistent = info->inconsistent && !info->noting,
                                  .granularity = info->granularity};
    show(user, true, info->name, &b, 0);
    return 0;
}

static int count_range(void *user, uint64_t off, uint64_t len)
{
    uint64_t *bytes = user;
    (void)off;
    *bytes += len;
    return 0;
}

/* Bytes, in whole granules. */
static uint64_t count_stored(struct dr_image *image, const char *name, uint64_t granularity)
{
    struct dr_marks marks;
    uint64_t bytes = 0;
    dr_marks_init(&marks, (unsigned)__builtin_ctzll(granularity));
    if (dr_marks_cover(&marks, image->size) == 0 &&
        live_read_stored(image, name, &marks, NULL) == 0)
        dr_marks_each(&marks, image->size, count_range, &bytes);
    dr_marks_free(&marks);
    return dr_round_up(bytes, granularity);
}

json_t *live_show_bitmaps(struct dr_live *live, const struct live_disk *on, struct dr_image *image)
{
    json_t *stored = json_array(), *all = json_array(), *one;
    size_t i;
    dr_memory_bitmaps_each(on->bitmaps, image->path, show_memory, all);
    dr_image_bitmap_list(image, list_stored, stored, NULL);
    json_array_foreach(stored, i, one)
    {
        uint64_t granularity = (uint64_t)json_integer_value(json_object_get(one, "granularity"));
        const char *name = json_string_value(json_object_get(one, "name"));
        if (!json_object_get(one, "inconsistent"))
            json_object_set_new(one, "count",
                                json_integer((json_int_t)count_stored(image, name, granularity)));
    }
    json_array_extend(all, stored);
    json_decref(stored);
    json_array_foreach(all, i, one)
    {
        const char *name = json_string_value(json_object_get(one, "name"));
        if (is_busy(live, on, image->path, name))
            json_object_set_new(one, "busy", json_true());
    }
    if (json_array_size(all) > 0)
        return all;
    json_decref(all);
    return NULL;
}

/* ------------------------------------------------------------------ add */

#define DEFAULT_MIN UINT64_C(4096)
#define DEFAULT_MAX UINT64_C(65536)

/* The cluster's size, as QEMU has it; where units are sectors, that of bitmaps beside images. */
static uint64_t default_granularity(const struct spot *spot)
{
    struct dr_chain *chain = dr_disk_chain(spot->on->disk);
    struct dr_image *image = image_of(spot, chain);
    json_t *data = json_object();
    uint64_t cluster = 0;
    if (image && image->fmt->info && image->fmt->info(image, data, &cluster, NULL) < 0)
        cluster = 0;
    json_decref(data);
    dr_chain_unref(chain, NULL);
    return cluster < DEFAULT_MIN ? DEFAULT_MAX : dr_min(cluster, DEFAULT_MAX);
}

/* There, for bitmaps that end with the server. */
static int make_set(struct dr_live *live, struct live_disk *on, const char *name,
                    struct qmp_error *err)
{
    if (on->bitmaps)
        return 0;
    struct dr_memory_bitmaps *fresh = dr_memory_bitmaps_new(on->disk);
    if (!fresh)
        return dr_fail(&err->text, ENOMEM, "out of memory for bitmap '%s'", name);
    DR_LOCK_SCOPE(&live->lock);
    on->bitmaps = fresh;
    return 0;
}

static int read_add_at(const struct spot *spot, json_t *args, struct live_change *c,
                       struct qmp_error *err)
{
    bool given = json_object_get(args, "granularity");
    struct live_bitmap b;
    c->disabled = qmp_bool(args, "disabled", false);
    c->granularity = given ? qmp_number(args, "granularity") : default_granularity(spot);
    c->stored = qmp_bool(args, "persistent", false);
    if (c->granularity < 512 || c->granularity & (c->granularity - 1)) {
        qmp_fail(err, NULL, "Granularity must be power of 2 and at least 512");
        return -EINVAL;
    }
    int r = search(spot, c->name, &b, err);
    if (r == 0 && b.found) {
        qmp_fail(err, NULL, "Bitmap already exists: %s", c->name);
        return -EEXIST;
    }
    if (r < 0 || !c->stored)
        return r < 0 ? r : make_set(spot->live, spot->on, c->name, err);
    if (spot->active)
        return 0;
    qmp_fail(err, NULL, "Can't make bitmap '%s' persistent in '%s': it is not the active image",
             c->name, spot->image);
    return -EINVAL;
}

/* spot->image is the change's from now on. */
static void place(struct live_change *c, struct spot *spot)
{
    c->on = spot->on;
    c->image = DR_STEAL(spot->image);
}

static int read_add(struct dr_live *live, json_t *args, struct live_change *c,
                    struct qmp_error *err)
{
    struct spot spot = {0};
    c->name = qmp_string(args, "name");
    if (!*c->name) {
        qmp_fail(err, NULL, "Bitmap name cannot be empty");
        return -EINVAL;
    }
    int r = find_spot(live, qmp_string(args, "node"), true, &spot, err);
    if (r == 0)
        r = read_add_at(&spot, args, c, err);
    place(c, &spot);
    return r;
}

/* ------------------------------------------------------------------ changes */

static int read_simple(struct dr_live *live, json_t *args, struct live_change *c,
                       struct qmp_error *err)
{
    unsigned use = c->action == DR_BITMAP_REMOVE ? CHANGES | INCONSISTENT_TOO : CHANGES;
    struct spot spot = {0};
    struct live_bitmap b;
    c->name = qmp_string(args, "name");
    int r = find_spot(live, qmp_string(args, "node"), false, &spot, err);
    if (r == 0)
        r = find_bitmap(&spot, c->name, &b, err);
    if (r == 0)
        r = check_bitmap(&spot, c->name, &b, use, err);
    place(c, &spot);
    if (r < 0)
        return r;
    c->stored = b.stored;
    c->granularity = b.granularity;
    c->was_enabled = b.enabled;
    return 0;
}

/* ------------------------------------------------------------------ merge */

/* from->image is the change's from now on. */
static int add_source(struct live_change *c, struct spot *from, const char *name,
                      struct qmp_error *err)
{
    struct live_bitmap b;
    uint64_t size = dr_size(c->on->disk), theirs = dr_size(from->on->disk);
    int r = find_bitmap(from, name, &b, err);
    if (r == 0)
        r = check_bitmap(from, name, &b, READS, err);
    if (r < 0)
        return r;
    if (theirs != size) {
        qmp_fail(err, NULL,
                 "Bitmaps are of different sizes (destination size is %llu, source size is %llu) "
                 "and can't be merged",
                 (unsigned long long)size, (unsigned long long)theirs);
        return -EINVAL;
    }
    c->sources[c->n_sources++] = (struct live_source){
        .on = from->on, .image = DR_STEAL(from->image), .name = name, .stored = b.stored};
    return 0;
}

/* A name, or {"node", "name"}. */
static int read_source(struct dr_live *live, json_t *source, struct live_change *c,
                       struct qmp_error *err)
{
    static const struct qmp_arg table[] = {{"node", 's', true}, {"name", 's', true}, {0}};
    struct spot from = {.live = live, .on = c->on};
    int r = 0;
    if (json_is_string(source)) {
        from.image = strdup(c->image);
        r = from.image ? 0 : dr_fail(&err->text, ENOMEM, "out of memory for a bitmap");
        if (r == 0)
            r = add_source(c, &from, json_string_value(source), err);
        free(from.image);
        return r;
    }
    if (!json_is_object(source)) {
        qmp_fail(err, NULL,
                 "Invalid parameter type for 'bitmaps[0]', expected: BlockDirtyBitmapOrStr");
        return -EINVAL;
    }
    r = qmp_check_args(table, "bitmaps[0].", source, err);
    if (r == 0)
        r = find_spot_of(live, qmp_string(source, "node"), true, false, &from, err);
    if (r == 0)
        r = add_source(c, &from, qmp_string(source, "name"), err);
    free(from.image);
    return r;
}

static int read_sources(struct dr_live *live, const json_t *sources, struct live_change *c,
                        struct qmp_error *err)
{
    json_t *source;
    size_t i;
    int r = 0;
    c->sources = calloc(json_array_size(sources) + 1, sizeof(*c->sources));
    if (!c->sources)
        return dr_fail(&err->text, ENOMEM, "out of memory for bitmap '%s'", c->name);
    json_array_foreach(sources, i, source)
    {
        r = r < 0 ? r : read_source(live, source, c, err);
    }
    return r;
}

static int read_merge(struct dr_live *live, json_t *args, struct live_change *c,
                      struct qmp_error *err)
{
    struct spot into = {0};
    struct live_bitmap b;
    c->name = qmp_string(args, "target");
    int r = find_spot(live, qmp_string(args, "node"), false, &into, err);
    if (r == 0)
        r = find_bitmap(&into, c->name, &b, err);
    place(c, &into);
    if (r < 0)
        return r;
    c->stored = b.stored;
    c->granularity = b.granularity;
    c->was_enabled = b.enabled;
    r = read_sources(live, json_object_get(args, "bitmaps"), c, err);
    return r < 0 ? r : check_bitmap(&into, c->name, &b, CHANGES, err);
}

/* ------------------------------------------------------------------ commands, and actions */

/* A later action of the transaction sees what this one does. A bitmap that is about to be removed
 * is in use until then. */
static int plan(struct dr_live *live, const struct live_change *c, struct qmp_error *err)
{
    struct live_bitmap b = {.found = true,
                            .stored = c->stored,
                            .enabled = c->action == DR_BITMAP_ADD     ? !c->disabled
                                       : c->action == DR_BITMAP_MERGE ? c->was_enabled
                                       : c->action == DR_BITMAP_CLEAR
                                           ? c->was_enabled
                                           : c->action == DR_BITMAP_ENABLE,
                            .busy = c->action == DR_BITMAP_REMOVE,
                            .granularity = c->granularity};
    return live_plan_bitmap(live, c->image, c->name, &b, err);
}

int live_read_change(struct dr_live *live, enum dr_bitmap_action action, json_t *args, bool planned,
                     struct live_change *c, struct qmp_error *err)
{
    *c = (struct live_change){.action = action};
    int r = action == DR_BITMAP_ADD     ? read_add(live, args, c, err)
            : action == DR_BITMAP_MERGE ? read_merge(live, args, c, err)
                                        : read_simple(live, args, c, err);
    return r == 0 && planned ? plan(live, c, err) : r;
}

static json_t *change(struct dr_live *live, json_t *args, enum dr_bitmap_action action,
                      struct qmp_error *err)
{
    struct live_change c;
    int r = live_read_change(live, action, args, false, &c, err);
    if (r == 0)
        r = live_change_now(&c, &err->text);
    live_change_free(&c);
    return qmp_done(r);
}

#define CHANGE(verb, action)                                                       \
    static json_t *verb(struct dr_live *live, json_t *args, struct qmp_error *err) \
    {                                                                              \
        return change(live, args, action, err);                                    \
    }
CHANGE(add, DR_BITMAP_ADD)
CHANGE(take_away, DR_BITMAP_REMOVE)
CHANGE(clear, DR_BITMAP_CLEAR)
CHANGE(enable, DR_BITMAP_ENABLE)
CHANGE(disable, DR_BITMAP_DISABLE)
CHANGE(merge, DR_BITMAP_MERGE)

/* ------------------------------------------------------------------ the table */

#define BITMAP_ARGS       \
    {"node", 's', true},  \
    {                     \
        "name", 's', true \
    }

const struct qmp_command qmp_bitmap_commands[] = {
    {"block-dirty-bitmap-add",
     add,
     {BITMAP_ARGS,
      {"granularity", 'u', false},
      {"persistent", 'b', false},
      {"disabled", 'b', false}}},
    {"block-dirty-bitmap-remove", take_away, {BITMAP_ARGS}},
    {"block-dirty-bitmap-clear", clear, {BITMAP_ARGS}},
    {"block-dirty-bitmap-enable", enable, {BITMAP_ARGS}},
    {"block-dirty-bitmap-disable", disable, {BITMAP_ARGS}},
    {"block-dirty-bitmap-merge",
     merge,
     {{"node", 's', true}, {"target", 's', true}, {"bitmaps", 'l', true}}},
    {0},
};
