/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Range locks serialise changes to a unit. Epochs keep a host range from being reused while a
 * reader that looked it up is still reading: freeing space waits until all that entered before
 * have left. A reader counts itself into its thread's stripe and takes no lock.
 *
 * Held and awaited ranges stand in a list, in order of arrival. While no exclusive range is there,
 * a shared one need not be in the list: its thread writes it into the slot of its stripe. The
 * holder of a slot writes it and then looks for exclusive ranges; who wants an exclusive range
 * counts itself and then looks at the slots. So at least one of them sees the other. */
#include "core/internal.h"

struct dr_range_slot {
    DR_OWN_LINE _Atomic uint64_t range; /* as slot_code; 0 = nobody's */
};

struct dr_ranges {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct dr_range *first, *last;
    unsigned waiting; /* in dr_range_lock */

    _Atomic unsigned exclusive; /* ranges in the list that are; changed under lock */
    struct dr_range_slot slots[DR_STRIPES];

    _Atomic unsigned epoch;
    _Atomic bool draining;
    struct dr_stripe inside[2][DR_STRIPES]; /* by the parity of the epoch */
};

struct dr_ranges *dr_ranges_new(void)
{
    struct dr_ranges *ranges = dr_calloc_lines(sizeof(*ranges));
    if (!ranges)
        return NULL;
    dr_mutex_init_brief(&ranges->lock);
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

/* ------------------------------------------------------------------ slots
 *
 * A range in one word: its first sector, and in the last 12 bits how many it has. */

#define SECTOR      512u
#define LENGTH_BITS 12
#define LENGTH_MAX  ((1u << LENGTH_BITS) - 1)

/* 0: the range cannot be said like that. */
static uint64_t slot_code(uint64_t off, uint64_t len)
{
    if (off % SECTOR || len % SECTOR || len > (uint64_t)LENGTH_MAX * SECTOR || off >> 60)
        return 0;
    return len ? off / SECTOR << LENGTH_BITS | len / SECTOR : 0;
}

static bool slot_overlaps(uint64_t code, const struct dr_range *range)
{
    uint64_t off = (code >> LENGTH_BITS) * SECTOR, len = (code & LENGTH_MAX) * SECTOR;
    return off < range->off + range->len && range->off < off + len;
}

static bool a_slot_overlaps(struct dr_ranges *ranges, const struct dr_range *range)
{
    for (unsigned i = 0; i < DR_STRIPES; i++) {
        uint64_t code = atomic_load(&ranges->slots[i].range);
        if (code && slot_overlaps(code, range))
            return true;
    }
    return false;
}

static void slot_leave(struct dr_ranges *ranges, struct dr_range_slot *slot)
{
    atomic_store(&slot->range, 0);
    if (atomic_load(&ranges->exclusive) == 0)
        return;
    DR_LOCK_SCOPE(&ranges->lock);
    if (ranges->waiting > 0)
        pthread_cond_broadcast(&ranges->changed);
}

/* NULL: the range must go into the list. */
static struct dr_range_slot *slot_take(struct dr_ranges *ranges, uint64_t off, uint64_t len)
{
    struct dr_range_slot *slot = &ranges->slots[dr_stripe_of_thread()];
    uint64_t none = 0, code = slot_code(off, len);
    if (!code || !atomic_compare_exchange_strong(&slot->range, &none, code))
        return NULL;
    if (atomic_load(&ranges->exclusive) == 0)
        return slot;
    slot_leave(ranges, slot);
    return NULL;
}

/* ------------------------------------------------------------------ range locks */

static bool ranges_conflict(const struct dr_range *a, const struct dr_range *b)
{
    if (!a->exclusive && !b->exclusive)
        return false;
    return a->off < b->off + b->len && b->off < a->off + a->len;
}

/* Looking only at earlier arrivals keeps a stream of shared holders from starving an exclusive one.
 */
static bool range_must_wait(struct dr_ranges *ranges, const struct dr_range *range)
{
    if (range->exclusive && a_slot_overlaps(ranges, range))
        return true;
    for (const struct dr_range *r = range->prev; r; r = r->prev)
        if (ranges_conflict(r, range))
            return true;
    return false;
}

void dr_range_lock(struct dr_ranges *ranges, struct dr_range *range, uint64_t off, uint64_t len,
                   bool exclusive)
{
    *range = (struct dr_range){.off = off, .len = len, .exclusive = exclusive};
    if (!exclusive && (range->slot = slot_take(ranges, off, len)))
        return;
    DR_LOCK_SCOPE(&ranges->lock);
    if (exclusive)
        atomic_fetch_add(&ranges->exclusive, 1);
    range->prev = ranges->last;
    if (ranges->last)
        ranges->last->next = range;
    else
        ranges->first = range;
    ranges->last = range;
    ranges->waiting++;
    while (range_must_wait(ranges, range))
        pthread_cond_wait(&ranges->changed, &ranges->lock);
    ranges->waiting--;
}

void dr_range_unlock(struct dr_ranges *ranges, struct dr_range *range)
{
    if (range->slot) {
        slot_leave(ranges, range->slot);
        return;
    }
    DR_LOCK_SCOPE(&ranges->lock);
    if (range->exclusive)
        atomic_fetch_sub(&ranges->exclusive, 1);
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

/* ------------------------------------------------------------------ epochs */

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
