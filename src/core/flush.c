/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The one place where metadata becomes durable (invariants 1, 2 and 9), and where freed space waits
 * until it may be used again.
 *
 * A flush seals the dirty pages, writes those of level 0, flushes the files (which makes the
 * guest's data and level 0 durable together), then writes levels 1 to 3, each durable before the
 * next. After that it punches what was freed before the seal and tells the driver that it may be
 * reused.
 *
 * An image has one flusher at a time. A thread that asks for a flush while one runs waits for the
 * next one, since its own writes may have come after the seal.
 */
#include "core/internal.h"
#include "base/bytes.h"

/* Nodes that are kept for later when nothing needs them. */
#define SPARE_NODES 256

/* A freed place. Nodes are allocated before a reservation is made, so that recording what it frees
 * cannot fail. */
struct freed {
    struct freed *next;
    struct dr_freed place;
};

struct freed_list {
    struct freed *first, *last;
};

struct dr_flusher {
    pthread_cond_t done_cond; /* with image->lock */
    bool running;
    uint64_t started, done;
    int last;         /* result of the flush numbered `done` */
    unsigned holders; /* freed places are kept as long as there are some */
    int sticky;       /* nothing is written any more: a data flush failed, say */
    char *last_error; /* its text; NULL = not known */
    struct freed_list freed;
    struct freed *spare;
    size_t n_spare;
    size_t n_reserved; /* reservations that are neither published nor cancelled */
};

struct dr_flusher *dr_flusher_new(void)
{
    struct dr_flusher *flusher = calloc(1, sizeof(*flusher));
    if (flusher)
        pthread_cond_init(&flusher->done_cond, NULL);
    return flusher;
}

static void nodes_free(struct freed *node)
{
    for (struct freed *next; node; node = next) {
        next = node->next;
        free(node);
    }
}

void dr_flusher_free(struct dr_flusher *flusher)
{
    if (!flusher)
        return;
    pthread_cond_destroy(&flusher->done_cond);
    nodes_free(flusher->freed.first);
    nodes_free(flusher->spare);
    free(flusher->last_error);
    free(flusher);
}

/* ------------------------------------------------------------------ what was freed */

static void list_append(struct freed_list *list, struct freed *node)
{
    node->next = NULL;
    if (list->last)
        list->last->next = node;
    else
        list->first = node;
    list->last = node;
}

static int spare_at_least(struct dr_flusher *flusher, size_t n)
{
    while (flusher->n_spare < n) {
        struct freed *node = malloc(sizeof(*node));
        if (!node)
            return -ENOMEM;
        node->next = flusher->spare;
        flusher->spare = node;
        flusher->n_spare++;
    }
    return 0;
}

static void spare_add(struct dr_flusher *flusher, struct freed *node)
{
    if (flusher->n_spare >= SPARE_NODES + flusher->n_reserved * DR_RESERVATION_FREED) {
        free(node);
        return;
    }
    node->next = flusher->spare;
    flusher->spare = node;
    flusher->n_spare++;
}

int dr_free_ahead(struct dr_image *image, size_t n)
{
    struct dr_flusher *flusher = image->flusher;
    return spare_at_least(flusher, flusher->n_reserved * DR_RESERVATION_FREED + n);
}

void dr_free_later(struct dr_image *image, struct dr_freed freed)
{
    struct dr_flusher *flusher = image->flusher;
    if (freed.len == 0)
        return;
    if (spare_at_least(flusher, 1) < 0) { /* the driver frees more than it said */
        flusher->sticky = -ENOMEM;
        return;
    }
    struct freed *node = flusher->spare;
    flusher->spare = node->next;
    flusher->n_spare--;
    node->place = freed;
    list_append(&flusher->freed, node);
}

int dr_image_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                     uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int rc = dr_free_ahead(image, DR_RESERVATION_FREED);
    if (rc == 0)
        rc = image->fmt->reserve(image, off, len, want, host_len, r, err);
    if (rc == 0)
        image->flusher->n_reserved++;
    else
        dr_reserve_unpin(image, r);
    return rc;
}

void dr_image_publish(struct dr_image *image, struct dr_reservation *r)
{
    image->fmt->publish(image, r);
    dr_reserve_unpin(image, r);
    image->flusher->n_reserved--;
}

void dr_image_cancel(struct dr_image *image, struct dr_reservation *r)
{
    image->fmt->cancel(image, r);
    dr_reserve_unpin(image, r);
    image->flusher->n_reserved--;
}

static int freed_order(const void *a, const void *b)
{
    const struct dr_freed *p = a, *q = b;
    if (p->file != q->file)
        return (uintptr_t)p->file < (uintptr_t)q->file ? -1 : 1;
    return p->host < q->host ? -1 : p->host > q->host;
}

/* Give back [run->host, +len) and begin a new run. A container that cannot punch keeps the space.
 */
static void punch_run(struct dr_freed *run, struct dr_freed next)
{
    if (run->len > 0)
        dr_file_zero(run->file, run->host, run->len, DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
    *run = next;
}

static void punch_add(struct dr_freed *run, struct dr_freed next)
{
    uint64_t end = run->host + run->len;
    if (run->len > 0 && next.file == run->file && next.host >= run->host && next.host <= end)
        run->len = dr_max(end, next.host + next.len) - run->host;
    else
        punch_run(run, next);
}

/* Neighbours are punched by one call: each costs a transaction of the host's file system. Without
 * memory for sorting them only those that were freed one after another are joined. */
static void punch_all(const struct freed_list *list)
{
    struct dr_freed run = {0};
    size_t n = 0, i = 0;
    for (const struct freed *node = list->first; node; node = node->next)
        n += node->place.len > 0;
    if (n == 0)
        return;
    CLEANUP_FREE struct dr_freed *places = malloc(n * sizeof(*places));
    for (const struct freed *node = list->first; node; node = node->next)
        if (node->place.len > 0 && places)
            places[i++] = node->place;
        else if (node->place.len > 0)
            punch_add(&run, node->place);
    if (places)
        qsort(places, n, sizeof(*places), freed_order);
    for (i = 0; places && i < n; i++)
        punch_add(&run, places[i]);
    punch_run(&run, (struct dr_freed){0});
}

/* The removals in list are durable. Wait until nobody reads or writes there any more, ask the
 * driver which places have no reference left, punch those, and let the driver use them again. */
static void release_freed(struct dr_image *image, struct freed_list *list)
{
    const struct dr_format *fmt = image->fmt;
    if (!list->first)
        return;
    dr_epoch_drain(image->ranges);
    pthread_mutex_lock(&image->lock);
    for (struct freed *node = list->first; node && fmt->release; node = node->next) {
        struct dr_freed gone = {0};
        fmt->release(image, &node->place, &gone);
        node->place = gone;
    }
    pthread_mutex_unlock(&image->lock);
    if (fmt->flags & DR_FORMAT_PUNCH_FREED)
        punch_all(list);
    DR_LOCK_SCOPE(&image->lock);
    for (struct freed *node = list->first, *next; node; node = next) {
        next = node->next;
        if (fmt->reuse && node->place.len > 0)
            fmt->reuse(image, &node->place);
        spare_add(image->flusher, node);
    }
    *list = (struct freed_list){0};
}

/* The flush failed: its frees wait again, before those that came since. */
static void freed_put_back(struct freed_list *present, const struct freed_list *sealed)
{
    if (!sealed->first)
        return;
    sealed->last->next = present->first;
    present->first = sealed->first;
    if (!present->last)
        present->last = sealed->last;
}

/* ------------------------------------------------------------------ flushing */

struct dr_file *dr_image_file(struct dr_image *image, unsigned i)
{
    DR_LOCK_SCOPE(&image->lock);
    struct dr_file *file = image->files[i];
    dr_file_pin(file);
    return file;
}

static int flush_files(struct dr_image *image, struct dr_error *err)
{
    int result = 0;
    for (unsigned i = 0; i < image->n_files; i++) {
        struct dr_file *file = dr_image_file(image, i);
        int r = dr_file_flush(file, err);
        dr_file_unpin(file);
        if (r < 0 && result == 0)
            result = r;
    }
    return result;
}

/* Level 0 is what nothing durable points to, so it depends on nothing and becomes durable by the
 * same flush as the data. *data_lost: that flush or a later one failed. The kernel may have dropped
 * what was written, so no retry can bring it back. */
static int flush_sealed(struct dr_image *image, bool *data_lost, struct dr_error *err)
{
    for (unsigned level = 0; level < DR_PAGE_LEVELS; level++) {
        bool wrote;
        int r = dr_cache_write_level(image, level, &wrote, err);
        if (r == 0 && (wrote || level == 0)) {
            r = flush_files(image, err);
            *data_lost = r < 0;
        }
        if (r < 0)
            return r;
    }
    return 0;
}

static void remember_error(struct dr_flusher *flusher, const struct dr_error *err)
{
    free(flusher->last_error);
    flusher->last_error = err && err->errnum ? strdup(err->text) : NULL;
}

/* image->lock held on entry and exit, dropped for the I/O. keep: what was freed waits for the next
 * flush. */
static int run_flush(struct dr_image *image, bool keep, struct dr_error *err)
{
    struct dr_flusher *flusher = image->flusher;
    flusher->running = true;
    flusher->started++;
    dr_cache_seal(image->cache);
    struct freed_list freed = flusher->freed;
    flusher->freed = (struct freed_list){0};
    bool data_lost = false;
    keep |= flusher->holders > 0;
    pthread_mutex_unlock(&image->lock);

    int r = flush_sealed(image, &data_lost, err);
    if (r == 0 && !keep)
        release_freed(image, &freed);

    pthread_mutex_lock(&image->lock);
    bool can_retry = dr_cache_unseal(image, r == 0);
    if (r < 0 || keep)
        freed_put_back(&flusher->freed, &freed);
    if (r < 0) {
        if (data_lost || !can_retry) /* no space is what others wait for, and it would not help */
            flusher->sticky = r == -ENOSPC || r == -EDQUOT ? -EIO : r;
        remember_error(flusher, err);
    }
    flusher->last = r;
    flusher->done = flusher->started;
    flusher->running = false;
    pthread_cond_broadcast(&flusher->done_cond);
    return r;
}

static int flush_failed_before(struct dr_image *image, int code, struct dr_error *err)
{
    const char *last = image->flusher->last_error;
    return dr_fail(err, -code,
                   "%s: a flush failed; what was written since the last good one may be lost: %s",
                   image->path, last ? last : strerror(-code));
}

static int flush(struct dr_image *image, bool keep, struct dr_error *err)
{
    struct dr_flusher *flusher = image->flusher;
    if (!image->writable)
        return 0;
    DR_LOCK_SCOPE(&image->lock);
    if (flusher->sticky)
        return flush_failed_before(image, flusher->sticky, err);
    uint64_t wanted = flusher->started + 1;
    while (flusher->running && flusher->done < wanted)
        pthread_cond_wait(&flusher->done_cond, &image->lock);
    if (flusher->done >= wanted)
        return flusher->last == 0 ? 0 : flush_failed_before(image, flusher->last, err);
    if (flusher->sticky)
        return flush_failed_before(image, flusher->sticky, err);
    return run_flush(image, keep, err);
}

int dr_image_flush(struct dr_image *image, struct dr_error *err)
{
    return flush(image, false, err);
}

int dr_image_flush_keep(struct dr_image *image, struct dr_error *err)
{
    return flush(image, true, err);
}

int dr_image_relieve(struct dr_image *image, struct dr_error *err)
{
    pthread_mutex_lock(&image->lock);
    bool crowded = dr_cache_is_crowded(image->cache);
    pthread_mutex_unlock(&image->lock);
    return crowded ? dr_image_flush(image, err) : 0;
}

void dr_keep_freed(struct dr_image *image, bool keep)
{
    DR_LOCK_SCOPE(&image->lock);
    while (keep && image->flusher->running) /* it may be releasing some */
        pthread_cond_wait(&image->flusher->done_cond, &image->lock);
    image->flusher->holders += keep ? 1 : -1u;
}

void dr_flush_hold(struct dr_image *image)
{
    DR_LOCK_SCOPE(&image->lock);
    while (image->flusher->running)
        pthread_cond_wait(&image->flusher->done_cond, &image->lock);
    image->flusher->running = true;
}

void dr_flush_resume(struct dr_image *image)
{
    DR_LOCK_SCOPE(&image->lock);
    image->flusher->running = false;
    pthread_cond_broadcast(&image->flusher->done_cond);
}
