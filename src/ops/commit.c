/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* commit: write what the upper images hold down into a lower one. C is the top, M the base's direct
 * child, P the base; C and M may be the same.
 *
 * The order (docs/formats/protocols.md): P gets the id that says "M is being committed into me", M
 * learns it, and from then on every byte that changes in P is masked by C..M, so the view at the
 * top stands still. Whatever is interrupted is finished by doing it again. */
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"

struct commit {
    struct dr_fs *fs;
    const struct dr_commit_options *o;
    struct dr_job *job;
    const char *path;
    struct dr_disk *disk;
    struct dr_chain *chain;
    size_t base;   /* index of P */
    uint64_t size; /* bytes that go down */
    bool keep;
};

static struct dr_image *image_c(const struct commit *c)
{
    return c->chain->images[0];
}

static struct dr_image *image_m(const struct commit *c)
{
    return c->chain->images[c->base - 1];
}

static struct dr_image *image_p(const struct commit *c)
{
    return c->chain->images[c->base];
}

static bool has_ids(const struct commit *c)
{
    const struct dr_format *p = image_p(c)->fmt, *m = image_m(c)->fmt;
    return (p->flags & DR_FORMAT_CONTENT_ID) && (m->flags & DR_FORMAT_CONTENT_ID) && m->parent_id &&
           p->id;
}

/* ------------------------------------------------------------------ siblings */

static bool in_part(const struct commit *c, struct dr_file_id id, size_t first, size_t last)
{
    for (size_t i = first; i <= last; i++)
        if (dr_ops_same_id(dr_image_id(c->chain->images[i]), id))
            return true;
    return false;
}

static bool loses_validity(const struct commit *c, const struct dr_scan_entry *e)
{
    return e->backing_path && in_part(c, e->backing_id, 1, c->base) &&
           !in_part(c, e->id, 0, c->base);
}

/* "a, b and c" would be nicer to read and harder to copy. */
static char *list_siblings(const struct commit *c, const struct dr_scan *scan)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    if (!out)
        return NULL;
    for (size_t i = 0; i < scan->n; i++)
        if (loses_validity(c, &scan->all[i]))
            fprintf(out, "%s%s", ftell(out) > 0 ? ", " : "", scan->all[i].path);
    fclose(out);
    return text;
}

static int scan_dirs(const struct commit *c, struct dr_scan *scan, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i <= c->base && r == 0; i++)
        r = dr_scan_beside(scan, c->fs, c->chain->images[i]->path, &c->o->open, err);
    return r;
}

static int check_siblings(const struct commit *c, struct dr_error *err)
{
    struct dr_scan scan = {0};
    int r = scan_dirs(c, &scan, err);
    CLEANUP_FREE char *list = r == 0 ? list_siblings(c, &scan) : NULL;
    dr_scan_free(&scan);
    if (r < 0)
        return r;
    if (!list)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->path);
    if (!*list)
        return 0;
    if (!c->o->force)
        return dr_fail(err, EBUSY,
                       "%s: committing into %s would make these images unusable: %s; rebase or "
                       "remove them first, or force it",
                       c->path, image_p(c)->path, list);
    dr_job_message(c->job, "%s: these images are no longer valid: %s", image_p(c)->path, list);
    return 0;
}

/* ------------------------------------------------------------------ what may be refused */

static int choose_base(struct commit *c, struct dr_error *err)
{
    c->chain = c->disk->chain;
    if (c->chain->n < 2)
        return dr_fail(err, ENOTSUP, "%s: Image does not have a backing file", c->path);
    c->base = c->o->base ? dr_ops_member(c->chain, c->o->base) : 1;
    if (c->base == 0 || c->base >= c->chain->n)
        return dr_fail(err, EINVAL, "Did not find '%s' in the backing chain of '%s'", c->o->base,
                       c->path);
    c->keep = c->o->keep || c->o->base;
    return 0;
}

/* Do the images above P say anything but zeros behind P's end? */
static int holds_data_behind(struct commit *c, uint64_t from, bool *data, struct dr_error *err)
{
    struct dr_walk above;
    dr_walk_init(&above, c->chain, 0, c->base, image_c(c)->size);
    *data = false;
    for (uint64_t off = from; off < above.size && !*data; off = above.run.end) {
        int r = dr_walk_to(&above, off, err);
        if (r < 0)
            return r;
        *data = above.run.kind == DR_RUN_DATA;
    }
    return 0;
}

/* How much goes down, and whether P must grow for it. A P that cannot is no obstacle when there is
 * nothing to put behind its end: zeros show there anyway. */
static int check_growth(struct commit *c, struct dr_error *err)
{
    const struct dr_image *p = image_p(c);
    c->size = image_c(c)->size;
    if (p->size >= c->size)
        return 0;
    bool below_is_longer = c->base + 1 < c->chain->n &&
                           c->chain->images[c->base + 1]->size > p->size;
    if (p->fmt->resize && !below_is_longer)
        return 0;
    bool data;
    int r = holds_data_behind(c, p->size, &data, err);
    if (r == 0 && data && p->fmt->resize)
        return 0; /* what its own parent has behind its end has to be hidden: not without need */
    if (r == 0 && data)
        return dr_fail(err, ENOTSUP,
                       "%s: ends at %llu, %s holds data behind that, and images of its format "
                       "cannot grow",
                       p->path, (unsigned long long)p->size, c->path);
    c->size = p->size;
    return r;
}

static void transfer_init(const struct commit *c, struct dr_transfer *t)
{
    *t = (struct dr_transfer){
        .dst = c->chain,
        .dst_at = c->base,
        .write_zeros = true,
        .zero_flags = DR_MAY_UNMAP,
        .to_file = true,
        .block = 4096,
        .job = c->job,
    };
    dr_walk_init(&t->walk, c->chain, 0, c->base, c->size);
}

/* DATA above that P has no place for yet. */
static int check_space(const struct commit *c, struct dr_error *err)
{
    struct dr_walk above, own;
    uint64_t need = 0, room = dr_ops_image_space(image_p(c));
    dr_walk_init(&above, c->chain, 0, c->base, c->size);
    dr_walk_init(&own, c->chain, c->base, c->base + 1, c->size);
    for (uint64_t off = 0, end; off < above.size; off = end) {
        int r = dr_walk_to(&above, off, err);
        if (r == 0)
            r = dr_walk_to(&own, off, err);
        if (r < 0)
            return r;
        end = dr_min(above.run.end, own.run.end);
        if (above.run.kind == DR_RUN_DATA && own.run.kind != DR_RUN_DATA)
            need += end - off;
    }
    if (need <= room)
        return 0;
    return dr_fail(err, ENOSPC, "%s: needs %llu more bytes, its file system has %llu free",
                   image_p(c)->path, (unsigned long long)need, (unsigned long long)room);
}

static int check_child(const struct commit *c, struct dr_error *err)
{
    struct dr_image *m = image_m(c);
    if (!has_ids(c) || !m->fmt->set_backing)
        return 0;
    return dr_image_set_backing(m, image_p(c), m->backing_name, m->backing_format, DR_TRY, err);
}

/* Every file that will be written, locked against others before anything changes. */
static int thaw(const struct commit *c, struct dr_error *err)
{
    /* who has no ids does not mind that P gets a new one, and P's other children must notice */
    int r = dr_image_thaw(image_p(c), has_ids(c), err);
    if (r == 0 && has_ids(c))
        r = dr_image_thaw(image_m(c), true, err);
    /* An earlier commit may have been killed: what it wrote last must not be lost behind what we
     * write first. */
    for (size_t i = 0; r == 0 && i <= c->base; i++)
        r = dr_image_harden(c->chain->images[i], err);
    /* Before the locks somebody could make another child. */
    return r < 0 || c->o->force ? r : check_siblings(c, err);
}

static int prepare(struct commit *c, struct dr_error *err)
{
    struct dr_open_options open = c->o->open;
    open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(c->fs, c->path, &open, &c->disk, err);
    if (r == 0)
        r = choose_base(c, err);
    if (r == 0)
        r = check_growth(c, err);
    if (r == 0)
        r = check_siblings(c, err);
    if (r == 0)
        r = check_child(c, err);
    if (r == 0)
        r = check_space(c, err);
    return r;
}

/* ------------------------------------------------------------------ the steps */

/* An earlier commit was stopped between telling P and telling M: M learns it now. */
static int repair_child(const struct commit *c, struct dr_error *err)
{
    struct dr_image *p = image_p(c), *m = image_m(c);
    uint32_t id = p->fmt->id(p);
    return m->fmt->parent_id(m) == id ? 0 : m->fmt->set_parent_id(m, id, err);
}

static int exchange_ids(const struct commit *c, struct dr_error *err)
{
    struct dr_image *p = image_p(c), *m = image_m(c);
    int r = repair_child(c, err);
    if (r < 0)
        return r;
    uint32_t id = p->fmt->commit_id(p, m);
    r = p->fmt->set_id(p, id, err);
    return r < 0 ? r : m->fmt->set_parent_id(m, id, err);
}

static int grow(const struct commit *c, struct dr_error *err)
{
    return image_p(c)->size >= c->size ? 0 : dr_chain_resize(c->chain, c->base, c->size, err);
}

static int empty_top(const struct commit *c, struct dr_error *err)
{
    struct dr_image *top = image_c(c);
    int r = dr_chain_drop(c->chain, 0, 0, top->size, err);
    if (r == -ENOTSUP) {
        dr_job_message(c->job, "%s: cannot be emptied; it is valid as it is", c->path);
        return 0;
    }
    if (r == 0)
        r = dr_image_flush(top, err);
    if (r == 0 && top->fmt->trim)
        r = top->fmt->trim(top, err);
    return r;
}

static int run(struct commit *c, struct dr_error *err)
{
    struct dr_transfer t;
    int r = thaw(c, err);
    if (r == 0 && has_ids(c))
        r = exchange_ids(c, err);
    if (r == 0)
        r = grow(c, err);
    if (r < 0)
        return r;
    transfer_init(c, &t);
    r = dr_transfer_run(&t, t.walk.size, c->job, err);
    if (r == 0)
        r = dr_image_flush(image_p(c), err);
    if (r == 0)
        r = dr_image_freeze(image_p(c), err);
    if (r == 0 && !c->keep)
        r = empty_top(c, err);
    return r;
}

int dr_commit_fs(struct dr_fs *fs, const char *path, const struct dr_commit_options *options,
                 struct dr_job *job, struct dr_error *err)
{
    struct commit c = {.fs = fs, .o = options, .job = job, .path = path};
    int r = prepare(&c, err);
    if (r == 0)
        r = run(&c, err);
    int closed = dr_ops_close(&c.disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_commit(const char *path, const struct dr_commit_options *options, struct dr_job *job,
              struct dr_error *err)
{
    DR_REQUIRE(path, err);
    static const struct dr_commit_options defaults;
    options = options ? options : &defaults;
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_commit_fs(dr_fs_posix(), path, options, job, err));
}
