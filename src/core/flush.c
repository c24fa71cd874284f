/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The one place where metadata becomes durable (invariants 1, 2 and 9).
 *
 * One flusher per image; who comes meanwhile waits for a flush that began after it came.
 *   seal the dirty pages -> flush the data -> write the sealed pages level by level, each level
 *   durable before the next -> what was freed before the seal may be used again.
 */
#include "core/internal.h"

struct freed_list {
    struct dr_freed *items;
    size_t n, room;
};

struct dr_flusher {
    pthread_cond_t done_cond; /* with image->lock */
    bool running;
    uint64_t started, done;
    int last;   /* result of the flush numbered `done` */
    int sticky; /* a data flush failed: nothing is written any more */
    struct dr_error last_error;
    struct freed_list freed;
};

struct dr_flusher *dr_flusher_new(void)
{
    struct dr_flusher *flusher = calloc(1, sizeof(*flusher));
    if (flusher)
        pthread_cond_init(&flusher->done_cond, NULL);
    return flusher;
}

void dr_flusher_free(struct dr_flusher *flusher)
{
    if (!flusher)
        return;
    pthread_cond_destroy(&flusher->done_cond);
    free(flusher->freed.items);
    free(flusher);
}

bool dr_free_later(struct dr_image *image, struct dr_freed freed)
{
    struct freed_list *list = &image->flusher->freed;
    if (list->n == list->room) {
        size_t room = list->room ? list->room * 2 : 64;
        struct dr_freed *items = realloc(list->items, room * sizeof(*items));
        if (!items)
            return false;
        list->items = items;
        list->room = room;
    }
    list->items[list->n++] = freed;
    return true;
}

/* begin_write may put a new file in the place of one (a descriptor) meanwhile. */
static struct dr_file *file_at(struct dr_image *image, unsigned i)
{
    DR_LOCK_SCOPE(&image->lock);
    return dr_file_ref(image->files[i]);
}

static int flush_files(struct dr_image *image, struct dr_error *err)
{
    int result = 0;
    for (unsigned i = 0; i < image->n_files; i++) {
        struct dr_file *file = file_at(image, i);
        int r = dr_file_flush(file, err);
        dr_file_unref(file);
        if (r < 0 && result == 0)
            result = r;
    }
    return result;
}

/* *data_lost: the kernel may have dropped what was written; no retry can bring it back. */
static int flush_sealed(struct dr_image *image, bool *data_lost, struct dr_error *err)
{
    int r = flush_files(image, err);
    *data_lost = r < 0;
    for (unsigned level = 0; level < DR_PAGE_LEVELS && r == 0; level++) {
        bool wrote;
        r = dr_cache_write_level(image, level, &wrote, err);
        if (r == 0 && wrote) {
            r = flush_files(image, err);
            *data_lost = r < 0;
        }
    }
    return r;
}

/* The removals in list are durable. Nobody may still read or write there when it is used again. */
static void release_freed(struct dr_image *image, struct freed_list *list)
{
    if (list->n == 0)
        return;
    dr_epoch_drain(image->ranges);
    if (image->fmt->flags & DR_FORMAT_PUNCH_FREED)
        for (size_t i = 0; i < list->n; i++) /* a container that cannot punch keeps the space */
            dr_file_zero(list->items[i].file, list->items[i].host, list->items[i].len,
                         DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
    DR_LOCK_SCOPE(&image->lock);
    if (image->fmt->release)
        for (size_t i = 0; i < list->n; i++)
            image->fmt->release(image, &list->items[i]);
}

/* Those of the failed flush first. False: no memory, and what is not released may be waited for. */
static bool freed_put_back(struct freed_list *present, struct freed_list *sealed)
{
    size_t n = sealed->n + present->n;
    if (n > sealed->room) {
        struct dr_freed *items = realloc(sealed->items, n * sizeof(*items));
        if (!items)
            return false;
        sealed->items = items;
        sealed->room = n;
    }
    if (present->n > 0)
        memcpy(sealed->items + sealed->n, present->items, present->n * sizeof(*present->items));
    sealed->n = n;
    free(present->items);
    *present = *sealed;
    sealed->items = NULL;
    return true;
}

/* image->lock held on entry and exit, dropped for the I/O. */
static int run_flush(struct dr_image *image, struct dr_error *err)
{
    struct dr_flusher *flusher = image->flusher;
    flusher->running = true;
    flusher->started++;
    dr_cache_seal(image->cache);
    struct freed_list freed = flusher->freed;
    flusher->freed = (struct freed_list){0};
    pthread_mutex_unlock(&image->lock);

    bool data_lost = false;
    int r = flush_sealed(image, &data_lost, err);
    if (r == 0)
        release_freed(image, &freed);

    pthread_mutex_lock(&image->lock);
    bool can_retry = dr_cache_unseal(image->cache, r == 0);
    if (r < 0) {
        can_retry &= freed_put_back(&flusher->freed, &freed);
        if (data_lost || !can_retry)
            flusher->sticky = r;
        flusher->last_error = err ? *err : (struct dr_error)DR_ERROR_INIT;
    }
    free(freed.items);
    flusher->last = r;
    flusher->done = flusher->started;
    flusher->running = false;
    pthread_cond_broadcast(&flusher->done_cond);
    return r;
}

static int flush_failed_before(struct dr_image *image, int code, struct dr_error *err)
{
    const struct dr_error *last = &image->flusher->last_error;
    return dr_fail(err, -code,
                   "%s: a flush failed; what was written since the last good one may be lost: %s",
                   image->path, last->errnum ? last->text : "see the first error");
}

int dr_image_flush(struct dr_image *image, struct dr_error *err)
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
    return run_flush(image, err);
}
