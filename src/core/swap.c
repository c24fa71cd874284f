/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The gate of a disk: how requests get its chain, and how the chain is changed under them.
 *
 * A request counts itself into one of a few counters, looks whether the gate is open, and takes the
 * chain: no lock, and no cache line that all threads write. A change of the chain closes the gate,
 * waits until all counters are zero, does what must happen while nobody is inside, and opens the
 * gate again. A request that finds the gate closed takes its count back and waits.
 *
 * The same counters tell how many requests have come (dr_disk_busy): their low halves count those
 * that are inside, their high halves all that have ever come. So it costs a request nothing more.
 *
 * Neither side starves the other: closing keeps new requests out, so that the old ones run dry; and
 * the gate is not closed again before every request that waited has got in (let_through).
 *
 * Flushes take long, and whoever waits for one inside the gate makes all requests wait for the
 * disk. So a flush only takes a reference to the chain inside, and is counted apart while it works.
 * A change that needs flushes to have ended keeps new ones out first, while requests go on, and
 * closes the gate when the last one has ended. A change that does not (dr_disk_exchange) lets them
 * run on with the old chain. */
#include <time.h>

#include "core/internal.h"

#define CAME   (UINT64_C(1) << 32) /* one request in the high half of a counter */
#define INSIDE (CAME - 1)          /* its low half */

/* ------------------------------------------------------------------ requests */

/* It was closed: wait until it opens, and get in before it can close again. count: the thread's own
 * among those of requests, or of flushes; closed: what keeps that kind out. */
static void wait_and_enter(struct dr_disk *disk, struct dr_stripe *count,
                           const _Atomic bool *closed)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    if (atomic_load(closed)) {
        uint64_t opened = disk->opened;
        disk->waiting++;
        while (disk->opened == opened)
            pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
        if (--disk->let_through == 0)
            pthread_cond_broadcast(&disk->gate_cond);
    }
    atomic_fetch_add(&count->n, 1);
}

static void count_out(struct dr_disk *disk, struct dr_stripe *count, const _Atomic bool *closed)
{
    bool last = (atomic_fetch_sub(&count->n, 1) & INSIDE) == 1;
    if (!last || !atomic_load(closed))
        return;
    DR_LOCK_SCOPE(&disk->gate_lock);
    pthread_cond_broadcast(&disk->gate_cond);
}

static void count_in(struct dr_disk *disk, struct dr_stripe *count, const _Atomic bool *closed)
{
    /* Count first, then look: a closer that does not see the count has closed before the look. */
    atomic_fetch_add(&count->n, CAME + 1);
    if (atomic_load(closed)) {
        count_out(disk, count, closed);
        wait_and_enter(disk, count, closed);
    }
}

struct dr_chain *dr_disk_enter(struct dr_disk *disk, struct dr_pass *pass)
{
    pass->stripe = dr_stripe_of_thread();
    count_in(disk, &disk->inside[pass->stripe], &disk->closed);
    pass->chain = atomic_load(&disk->chain);
    return pass->chain;
}

void dr_disk_leave(struct dr_disk *disk, struct dr_pass *pass)
{
    pass->chain = NULL;
    count_out(disk, &disk->inside[pass->stripe], &disk->closed);
}

struct dr_chain *dr_disk_chain(struct dr_disk *disk)
{
    struct dr_pass pass;
    struct dr_chain *chain = dr_chain_ref(dr_disk_enter(disk, &pass));
    dr_disk_leave(disk, &pass);
    return chain;
}

bool dr_disk_busy(const struct dr_disk *disk, uint32_t *seen)
{
    uint64_t inside = 0;
    uint32_t came = 0;
    for (unsigned i = 0; i < DR_STRIPES; i++) {
        uint64_t n = atomic_load_explicit(&disk->inside[i].n, memory_order_relaxed);
        inside += (n & INSIDE) +
                  (atomic_load_explicit(&disk->flushing[i].n, memory_order_relaxed) & INSIDE);
        came += (uint32_t)(n / CAME);
    }
    bool busy = inside > 0 || came != *seen;
    *seen = came;
    return busy;
}

/* ------------------------------------------------------------------ changing the chain */

static uint64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static bool any(const struct dr_stripe *counts)
{
    for (unsigned i = 0; i < DR_STRIPES; i++)
        if ((atomic_load(&counts[i].n) & INSIDE) != 0)
            return true;
    return false;
}

/* Returns with the gate closed and nobody inside; flushes: and no flush at work. *since: when
 * requests began to wait. */
static void close_gate(struct dr_disk *disk, bool flushes, uint64_t *since)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    while (disk->closed || disk->flushes_closed || disk->let_through > 0)
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
    atomic_store(&disk->flushes_closed, flushes);
    while (flushes && any(disk->flushing))
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
    *since = now();
    atomic_store(&disk->closed, true);
    while (any(disk->inside))
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
}

static void open_gate(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    atomic_store(&disk->closed, false);
    atomic_store(&disk->flushes_closed, false);
    disk->opened++;
    disk->let_through = disk->waiting;
    disk->waiting = 0;
    pthread_cond_broadcast(&disk->gate_cond);
}

/* Between close_gate and open_gate. */
static int run_step(struct dr_disk *disk, dr_quiet_step step, void *user, struct dr_chain **old,
                    struct dr_error *err)
{
    struct dr_chain *present = disk->chain, *fresh = NULL;
    int r = step(user, present, &fresh, err);
    if (r < 0 || !fresh)
        return r;
    fresh->hooks = &disk->hooks;
    present->hooks = NULL;
    atomic_store(&disk->chain, fresh);
    *old = present;
    return 0;
}

int dr_disk_flush(struct dr_disk *disk, struct dr_error *err)
{
    struct dr_stripe *count = &disk->flushing[dr_stripe_of_thread()];
    count_in(disk, count, &disk->flushes_closed);
    struct dr_chain *chain = dr_disk_chain(disk);
    int r = dr_chain_flush(chain, 0, err);
    int closed = dr_chain_unref(chain, r == 0 ? err : NULL); /* ours may be the last reference */
    count_out(disk, count, &disk->flushes_closed);
    return r < 0 ? r : closed;
}

static int change(struct dr_disk *disk, bool flushes, dr_quiet_step step, void *user,
                  uint64_t *pause_ns, struct dr_error *err)
{
    struct dr_chain *old = NULL;
    uint64_t since;
    close_gate(disk, flushes, &since);
    int r = run_step(disk, step, user, &old, err);
    open_gate(disk);
    if (pause_ns)
        *pause_ns = now() - since;
    int closed = dr_chain_unref(old, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_disk_quiesce(struct dr_disk *disk, dr_quiet_step step, void *user, uint64_t *pause_ns,
                    struct dr_error *err)
{
    int r = dr_disk_flush(disk, err);
    return r < 0 ? r : dr_disk_quiesce_unflushed(disk, step, user, pause_ns, err);
}

int dr_disk_quiesce_unflushed(struct dr_disk *disk, dr_quiet_step step, void *user,
                              uint64_t *pause_ns, struct dr_error *err)
{
    return change(disk, true, step, user, pause_ns, err);
}

int dr_disk_exchange(struct dr_disk *disk, dr_quiet_step step, void *user, uint64_t *pause_ns,
                     struct dr_error *err)
{
    return change(disk, false, step, user, pause_ns, err);
}

bool dr_disk_is_about_to_change(const struct dr_disk *disk)
{
    return atomic_load(&disk->flushes_closed) || atomic_load(&disk->switching);
}

void dr_disk_announce(struct dr_disk *disk, bool begin)
{
    atomic_store(&disk->switching, begin);
}

static int swap_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    struct dr_chain **wanted = user;
    (void)present;
    (void)err;
    *fresh = DR_STEAL(*wanted);
    return 0;
}

int dr_disk_swap(struct dr_disk *disk, struct dr_chain *fresh, struct dr_error *err)
{
    int r = dr_disk_quiesce(disk, swap_step, &fresh, NULL, err);
    dr_chain_unref(fresh, NULL); /* still ours if it did not come to the swap */
    return r;
}

/* ------------------------------------------------------------------ one change at a time */

/* bitmaps: for a change of them alone. */
static const char *take_claim(struct dr_disk *disk, const char *what, bool bitmaps)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    if (disk->claim && bitmaps && disk->lent && !disk->borrowed) {
        disk->borrowed = true;
        return NULL;
    }
    if (disk->claim)
        return disk->claim;
    disk->claim = what;
    return NULL;
}

static int claim(struct dr_disk *disk, const char *what, bool bitmaps, struct dr_error *err)
{
    const char *other = take_claim(disk, what, bitmaps);
    if (!other)
        return 0;
    struct dr_pass pass;
    const struct dr_image *top = dr_disk_enter(disk, &pass)->images[0];
    int r = dr_fail(err, EBUSY, "%s: %s must wait until %s has ended", top->path, what, other);
    dr_disk_leave(disk, &pass);
    return r;
}

int dr_disk_claim(struct dr_disk *disk, const char *what, struct dr_error *err)
{
    return claim(disk, what, false, err);
}

void dr_disk_unclaim(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    disk->claim = NULL;
}

void dr_disk_lend(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    disk->lent = true;
}

void dr_disk_take_back(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    disk->lent = false;
    while (disk->borrowed)
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
}

int dr_disk_borrow(struct dr_disk *disk, const char *what, struct dr_error *err)
{
    return claim(disk, what, true, err);
}

void dr_disk_unborrow(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    if (disk->borrowed) {
        disk->borrowed = false;
        pthread_cond_broadcast(&disk->gate_cond);
    } else {
        disk->claim = NULL;
    }
}

/* ------------------------------------------------------------------ hooks */

int dr_disk_hook_quiet(struct dr_disk *disk, const struct dr_hook *hook, struct dr_error *err)
{
    struct dr_hooks *hooks = &disk->hooks;
    if (hooks->n == DR_HOOKS_MAX)
        return dr_fail(err, EBUSY, "%s: %d jobs watch its changes already",
                       disk->chain->images[0]->path, DR_HOOKS_MAX);
    hooks->list[hooks->n++] = *hook;
    return 0;
}

struct hooking {
    struct dr_disk *disk;
    const struct dr_hook *hook;
};

static int hook_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    const struct hooking *h = user;
    (void)present, (void)fresh;
    return dr_disk_hook_quiet(h->disk, h->hook, err);
}

int dr_disk_hook(struct dr_disk *disk, const struct dr_hook *hook, struct dr_error *err)
{
    struct hooking h = {.disk = disk, .hook = hook};
    return dr_disk_exchange(disk, hook_step, &h, NULL, err);
}

void dr_disk_unhook(struct dr_disk *disk, const void *user)
{
    struct dr_hooks *hooks = &disk->hooks;
    uint64_t since;
    close_gate(disk, false, &since);
    for (unsigned i = 0; i < hooks->n;)
        if (hooks->list[i].user == user)
            memmove(&hooks->list[i], &hooks->list[i + 1],
                    (--hooks->n - i) * sizeof(hooks->list[0]));
        else
            i++;
    open_gate(disk);
}

bool dr_hooks_any_before(const struct dr_chain *chain)
{
    for (unsigned i = 0; chain->hooks && i < chain->hooks->n; i++)
        if (chain->hooks->list[i].before)
            return true;
    return false;
}

int dr_hooks_before(struct dr_chain *chain, uint64_t off, uint64_t len, struct dr_error *err)
{
    const struct dr_hooks *hooks = chain->hooks;
    int r = 0;
    for (unsigned i = 0; hooks && i < hooks->n && r == 0; i++)
        if (hooks->list[i].before)
            r = hooks->list[i].before(hooks->list[i].user, chain, off, len, err);
    return r;
}

void dr_hooks_after(const struct dr_chain *chain, uint64_t off, uint64_t len)
{
    const struct dr_hooks *hooks = chain->hooks;
    for (unsigned i = 0; hooks && i < hooks->n; i++)
        if (hooks->list[i].after)
            hooks->list[i].after(hooks->list[i].user, off, len);
}
