/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/pipes.h"

#include "base/cleanup.h"
#include "base/error.h"

#define SECTOR     512u
#define ZERO_ITEM  (UINT64_C(16) << 20) /* bytes of zeros in one item: a pipe gets them all */
#define CHUNK      (1u << 20)           /* read from a pipe at once */
#define HEAD       4096u                /* bytes by which formats are known */
#define TELL_EVERY (UINT64_C(16) << 20) /* bytes between two reports of progress */

/* ------------------------------------------------------------------ to a pipe */

struct giving {
    struct dr_transfer t;
    struct dr_file *out;
    uint64_t pos;            /* of out: what emit has written */
    uint64_t zero_at, zeros; /* of a run of zeros: what next has not given out yet */
};

/* The transfer's items, with long runs of zeros cut so that progress and cancelling see them. */
static int giving_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct giving *g = user;
    if (g->zeros == 0) {
        int r = dr_transfer_next(&g->t, item, err);
        if (r <= 0 || item->kind == DR_ITEM_COPY)
            return r;
        g->zero_at = item->off;
        g->zeros = item->aux[0];
    }
    uint64_t n = dr_min(g->zeros, ZERO_ITEM);
    *item = (struct dr_copy_item){.off = g->zero_at, .len = n, .kind = DR_ITEM_ZERO};
    g->zero_at += n;
    g->zeros -= n;
    return 1;
}

static int giving_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                       struct dr_error *err)
{
    return dr_transfer_work(&((struct giving *)user)->t, item, buf, err);
}

static int giving_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                       struct dr_error *err)
{
    struct giving *g = user;
    uint64_t at = g->pos;
    g->pos += item->len;
    if (item->kind == DR_ITEM_ZERO)
        return dr_file_zero(g->out, at, item->len, 0, err);
    return dr_file_pwrite(g->out, buf[0], at, (size_t)item->len, err);
}

int dr_pipe_write(struct dr_disk *disk, uint64_t from, uint64_t to, struct dr_file *out,
                  uint64_t total, struct dr_lost *lost, struct dr_sums *sums, struct dr_job *job,
                  struct dr_error *err)
{
    struct giving g = {
        .t = {.hole_is_zero = true,
              .write_zeros = true,
              .lost = lost,
              .sums = sums,
              .job = job,
              .pos = from},
        .out = out,
        .pos = dr_file_size(out),
    };
    struct dr_copy_policy policy = {
        .user = &g,
        .next = giving_next,
        .work = giving_work,
        .emit = giving_emit,
        .ordered = true,
        .buffers = 1,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth(disk->chain),
        .total = to - from,
        .before = g.pos,
        .after = total - dr_min(total, g.pos + (to - from)),
    };
    dr_walk_init(&g.t.walk, disk->chain, 0, disk->chain->n, to);
    int r = dr_copy_run(&policy, job, err);
    if (lost)
        dr_lost_tell(lost, job);
    if (r == 0)
        r = dr_file_zero(out, g.pos, (SECTOR - g.pos % SECTOR) % SECTOR, 0, err);
    return r;
}

/* ------------------------------------------------------------------ from a pipe: what comes */

static int refuse_format(const struct dr_piped *p, const struct dr_format *fmt,
                         struct dr_error *err)
{
    const char *packed = dr_source_compression(p->source);
    if (fmt->flags & DR_FORMAT_NO_PROBE)
        return 0;
    return dr_fail(err, ENOTSUP,
                   "%s: holds a %s image%s%s%s, whose tables must be read at random, so it cannot "
                   "be read from a pipe: save it to a file first",
                   p->name, fmt->name, packed ? " (compressed by " : "", packed ? packed : "",
                   packed ? ")" : "");
}

static int piped_read(struct dr_piped *p, uint8_t *buf, size_t len, size_t *got,
                      struct dr_error *err)
{
    len = (size_t)dr_min(len, p->left);
    size_t n = (size_t)dr_min(len, p->head_len - p->head_at);
    memcpy(buf, p->head + p->head_at, n);
    p->head_at += n;
    *got = 0;
    int r = n < len ? dr_source_read(p->source, buf + n, len - n, got, err) : 0;
    *got += n;
    p->left -= *got;
    return r;
}

static int read_inflow(void *user, void *buf, size_t len, size_t *got, struct dr_error *err)
{
    return piped_read(user, buf, len, got, err);
}

static int begin_image(struct dr_piped *p, const struct dr_format *fmt, struct dr_error *err)
{
    p->ops = fmt->incoming;
    dr_source_read_ahead(p->source); /* markers are small */
    p->inflow = (struct dr_inflow){read_inflow, p};
    return p->ops->begin(p->name, &p->inflow, &p->state, &p->incoming, err);
}

int dr_piped_begin(struct dr_piped *p, struct dr_source *source, const char *format,
                   struct dr_error *err)
{
    const struct dr_format *fmt = format ? dr_format_find(format) : NULL;
    *p = (struct dr_piped){.source = source, .name = dr_source_name(source), .left = UINT64_MAX};
    if (format && !fmt)
        return dr_fail(err, EINVAL, "%s: unknown format \"%s\"", p->name, format);
    p->head = malloc(HEAD);
    if (!p->head)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->name);
    int r = dr_source_read(source, p->head, HEAD, &p->head_len, err);
    if (r == 0 && !fmt)
        r = dr_probe_bytes(p->head, p->head_len, p->name, &fmt, err);
    if (r < 0 || !fmt)
        return r;
    return fmt->incoming ? begin_image(p, fmt, err) : refuse_format(p, fmt, err);
}

void dr_piped_close(struct dr_piped *p)
{
    if (p->ops)
        p->ops->free(p->state);
    dr_source_close(p->source);
    free(p->head);
    *p = (struct dr_piped){0};
}

int dr_piped_range(struct dr_piped *p, uint64_t from, uint64_t to, struct dr_error *err)
{
    size_t n = (size_t)dr_min(from, p->head_len);
    uint64_t skipped;
    p->head_at = n;
    p->left = to > from ? to - from : 0;
    return from > n ? dr_source_skip(p->source, from - n, &skipped, err) : 0;
}

/* ------------------------------------------------------------------ from a pipe: copying
 *
 * next reads, emit writes, so that both go on at the same time. A chunk lies in memory of this file
 * and not in the engine's, whose buffers an item has only after next. */

struct chunk {
    struct chunk *next; /* of all that were ever made, or of the free ones */
    uint8_t *buf;
};

struct taking {
    struct dr_piped *piped;
    struct dr_disk *disk; /* or: */
    struct dr_file *file;
    struct dr_transfer t; /* how chunks go into the disk */
    struct dr_job *job;
    uint64_t read, told;  /* bytes that came; and when progress was last told */
    pthread_mutex_t lock; /* of the chunks */
    struct chunk *free;
    struct chunk *all[2 * DR_COPY_WORKERS + 2]; /* those that can be under way, and one in next */
    size_t n_all;
};

static struct chunk *chunk_take(struct taking *k)
{
    DR_LOCK_SCOPE(&k->lock);
    struct chunk *c = k->free;
    if (c) {
        k->free = c->next;
        return c;
    }
    if (k->n_all == sizeof(k->all) / sizeof(k->all[0]) || !(c = calloc(1, sizeof(*c))))
        return NULL;
    k->all[k->n_all++] = c;
    return (c->buf = malloc(CHUNK)) ? c : NULL;
}

static void chunk_give(struct taking *k, struct chunk *c)
{
    DR_LOCK_SCOPE(&k->lock);
    c->next = k->free;
    k->free = c;
}

static void chunks_free(struct taking *k)
{
    for (size_t i = 0; i < k->n_all; i++) {
        free(k->all[i]->buf);
        free(k->all[i]);
    }
    pthread_mutex_destroy(&k->lock);
}

static int taking_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct taking *k = user;
    struct chunk *c = chunk_take(k);
    size_t got = 0;
    if (!c)
        return dr_fail(err, ENOMEM, "%s: out of memory", k->piped->name);
    int r = piped_read(k->piped, c->buf, CHUNK, &got, err);
    if (r < 0 || got == 0) {
        chunk_give(k, c);
        return r;
    }
    *item = (struct dr_copy_item){.off = k->read, .len = got, .kind = DR_ITEM_COPY};
    item->aux[0] = dr_source_stored_pos(k->piped->source);
    item->aux[2] = (uintptr_t)c;
    k->read += got;
    return 1;
}

/* How much has come is all that is known of a pipe, and of a file how far it was read. */
static int tell(struct taking *k, uint64_t done, uint64_t stored_done)
{
    struct dr_file *stored = dr_source_stored(k->piped->source);
    if (done - k->told < TELL_EVERY)
        return 0;
    k->told = done;
    if (!stored)
        return dr_job_report(k->job, done, 0);
    uint64_t total = dr_file_size(stored);
    return dr_job_report(k->job, dr_min(total, stored_done), total);
}

static int taking_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                       struct dr_error *err)
{
    struct taking *k = user;
    struct chunk *c = (struct chunk *)(uintptr_t)item->aux[2];
    uint64_t end = dr_round_up(item->off + item->len, SECTOR);
    uint64_t stored_done = item->aux[0];
    int r = 0;
    (void)buf;
    memset(c->buf + item->len, 0, (size_t)(end - item->off - item->len));
    item->aux[1] = 0;
    item->len = end - item->off;
    if (k->file)
        r = dr_file_pwrite(k->file, c->buf, item->off, (size_t)item->len, err);
    else if (dr_size(k->disk) < end)
        r = dr_resize(k->disk, end, DR_PREALLOC_OFF, err);
    if (r == 0 && k->disk)
        r = dr_transfer_emit(&k->t, item, &c->buf, err);
    if (r == 0 && k->piped->sums)
        r = dr_sums_resize(k->piped->sums, end, err);
    if (r == 0 && k->piped->sums)
        r = dr_sums_put(k->piped->sums, item->off, c->buf, item->len, err);
    chunk_give(k, c);
    if (r == 0 && tell(k, end, stored_done))
        r = dr_fail(err, ECANCELED, "stopped on request");
    return r;
}

static int take_all(struct taking *k, uint64_t *size, struct dr_job *job, struct dr_error *err)
{
    struct dr_copy_policy policy = {
        .user = k,
        .next = taking_next,
        .emit = taking_emit,
        .ordered = true,
        .silent = true,
    };
    k->job = job;
    dr_source_stop_by(k->piped->source, job ? dr_job_stop_flag(job) : NULL);
    pthread_mutex_init(&k->lock, NULL);
    int r = dr_copy_run(&policy, job, err);
    chunks_free(k);
    if (r == 0 && dr_job_report(job, k->read, k->read))
        r = dr_fail(err, ECANCELED, "stopped on request");
    if (size)
        *size = k->read;
    return r;
}

struct dr_transfer dr_piped_transfer(struct dr_disk *disk, uint64_t sparse, struct dr_job *job)
{
    struct dr_transfer t = {
        .dst = disk->chain, .sparse = sparse, .block = DR_CONVERT_SPARSE_DEFAULT, .job = job};
    if (sparse)
        t.block = dr_min(dr_max(sparse, SECTOR), DR_CONVERT_SPARSE_DEFAULT);
    return t;
}

int dr_piped_to_disk(struct dr_piped *p, struct dr_disk *disk, uint64_t sparse, uint64_t *size,
                     struct dr_job *job, struct dr_error *err)
{
    struct taking k = {.piped = p, .disk = disk, .t = dr_piped_transfer(disk, sparse, job)};
    return take_all(&k, size, job, err);
}

int dr_piped_to_file(struct dr_piped *p, struct dr_file *out, uint64_t *size, struct dr_job *job,
                     struct dr_error *err)
{
    struct taking k = {.piped = p, .file = out};
    int r = take_all(&k, size, job, err);
    return r < 0 ? r : dr_file_flush(out, err);
}
