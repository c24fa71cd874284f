/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Range locks serialise changes to a unit. Epochs keep a host range from being reused while a
 * reader that looked it up is still reading: freeing space waits until all that entered before
 * have left. A reader counts itself into its thread's stripe and takes no lock. */
#include "core/internal.h"

struct dr_ranges {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct dr_range *first, *last; /* in order of arrival */

    unsigned waiting; /* in dr_range_lock */

    _Atomic unsigned epoch;
    _Atomic bool draining;
    struct dr_stripe inside[2][DR_STRIPES]; /* by the parity of the epoch */
};

struct dr_ranges *dr_ranges_new(void)
{
    struct dr_ranges *ranges = calloc(1, sizeof(*ranges));
    if (!ranges)
        return NULL;
    pthread_mutex_init(&ranges->lock, NULL);
    pthread_cond_init(&ranges->changed, NULL);
    return ranges;
}

void dr_ranges_free(struct dr_ranges *ranges)
{
    if (!ranges)
        return;
    pthread_cond_destroy(&ranges->changed);
    pthread_mutex_destroy(&ranges->lock);
    free(ranges);
}

static bool ranges_conflict(const struct dr_range *a, const struct dr_range *b)
{
    if (!a->exclusive && !b->exclusive)
        return false;
    return a->off < b->off + b->len && b->off < a->off + a->len;
}

/* Looking only at earlier arrivals keeps a stream of shared holders from starving an exclusive one.
 */
static bool range_must_wait(const struct dr_range *range)
{
    for (const struct dr_range *r = range->prev; r; r = r->prev)
        if (ranges_conflict(r, range))
            return true;
    return false;
}

void dr_range_lock(struct dr_ranges *ranges, struct dr_range *range, uint64_t off, uint64_t len,
                   bool exclusive)
{
    *range = (struct dr_range){.off = off, .len = len, .exclusive = exclusive};
    DR_LOCK_SCOPE(&ranges->lock);
    range->prev = ranges->last;
    if (ranges->last)
        ranges->last->next = range;
    else
        ranges->first = range;
    ranges->last = range;
    ranges->waiting++;
    while (range_must_wait(range))
        pthread_cond_wait(&ranges->changed, &ranges->lock);
    ranges->waiting--;
}

void dr_range_unlock(struct dr_ranges *ranges, struct dr_range *range)
{
    DR_LOCK_SCOPE(&ranges->lock);
    if (range->prev)
        range->prev->next = range->next;
    else
        ranges->first = range->next;
    if (range->next)
        range->next->prev = range->prev;
    else
        ranges->last = range->prev;
    if (ranges->waiting > 0)
        pthread_cond_broadcast(&ranges->changed);
}

unsigned dr_epoch_enter(struct dr_ranges *ranges)
{
    unsigned stripe = dr_stripe_of_thread();
    for (;;) {
        unsigned parity = atomic_load(&ranges->epoch) & 1;
        atomic_fetch_add(&ranges->inside[parity][stripe].n, 1);
        if ((atomic_load(&ranges->epoch) & 1) == parity)
            return parity * DR_STRIPES + stripe;
        dr_epoch_leave(ranges, parity * DR_STRIPES + stripe);
    }
}

void dr_epoch_leave(struct dr_ranges *ranges, unsigned ticket)
{
    struct dr_stripe *stripe = &ranges->inside[ticket / DR_STRIPES][ticket % DR_STRIPES];
    if (atomic_fetch_sub(&stripe->n, 1) != 1 || !atomic_load(&ranges->draining))
        return;
    DR_LOCK_SCOPE(&ranges->lock);
    pthread_cond_broadcast(&ranges->changed);
}

void dr_epoch_drain(struct dr_ranges *ranges)
{
    DR_LOCK_SCOPE(&ranges->lock);
    atomic_store(&ranges->draining, true);
    unsigned old = atomic_fetch_add(&ranges->epoch, 1) & 1;
    for (unsigned i = 0; i < DR_STRIPES; i++)
        while (atomic_load(&ranges->inside[old][i].n) != 0)
            pthread_cond_wait(&ranges->changed, &ranges->lock);
    atomic_store(&ranges->draining, false);
}
