/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbd-kept.h has the rules. */
#include "storage/nbd-kept.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "storage/nbd.h"

#define LARGE_PAGE ((size_t)2 << 20)

static struct nbd_kept_write *write_at(const struct nbd_kept *k, uint64_t i)
{
    return &k->writes[i % NBD_KEPT_WRITES];
}

void nbd_kept_init(struct nbd_kept *k)
{
    dr_mutex_init_brief(&k->lock);
    pthread_cond_init(&k->changed, NULL);
}

void nbd_kept_destroy(struct nbd_kept *k)
{
    pthread_mutex_destroy(&k->lock);
    pthread_cond_destroy(&k->changed);
    free(k->bytes);
    free(k->writes);
}

/* ------------------------------------------------------------------ room; under the lock */

static uint64_t bytes_used(const struct nbd_kept *k)
{
    return k->first == k->next ? 0 : k->head - write_at(k, k->first)->at;
}

/* Give back what the oldest ones took that are over. A ring that is empty begins again at its
 * beginning, which the processor has in its cache. */
static void release(struct nbd_kept *k)
{
    while (!k->replaying && k->first < k->next && write_at(k, k->first)->state == NBD_KEPT_OVER)
        k->first++;
    if (k->first == k->next && !k->replaying)
        k->head = 0;
    pthread_cond_broadcast(&k->changed);
}

/* Where n bytes in a row would go; false: there is no room now. */
static bool find_room(const struct nbd_kept *k, uint64_t n, uint64_t *at)
{
    *at = k->head;
    if (*at % NBD_KEPT_BYTES + n > NBD_KEPT_BYTES)
        *at = dr_round_up(*at, NBD_KEPT_BYTES);
    return k->next - k->first < NBD_KEPT_WRITES &&
           bytes_used(k) + (*at - k->head) + n <= NBD_KEPT_BYTES;
}

static bool is_time_to_flush(const struct nbd_kept *k)
{
    return k->fresh > NBD_KEPT_BYTES / 2 || k->fresh_writes > NBD_KEPT_WRITES / 2;
}

static bool may_flush(const struct nbd_file *f)
{
    return f->export.flush && !(f->base.flags & DR_FILE_NO_FLUSH);
}

/* Large pages, where there are some, save the processor a fault for each 4 KiB that are kept. */
static bool allocate(struct nbd_kept *k)
{
    if (!k->bytes) {
        k->bytes = aligned_alloc(LARGE_PAGE, NBD_KEPT_BYTES);
        if (k->bytes)
            madvise(k->bytes, NBD_KEPT_BYTES, MADV_HUGEPAGE);
    }
    if (!k->writes)
        k->writes = calloc(NBD_KEPT_WRITES, sizeof(*k->writes));
    return k->bytes && k->writes;
}

/* ------------------------------------------------------------------ a write */

/* Must it wait for one that is under way? */
static bool is_blocked(const struct nbd_kept *k, const struct nbd_request *q)
{
    for (uint64_t left = k->busy; left; left &= left - 1) {
        int i = __builtin_ctzll(left);
        if (q->off < k->writing[i].end && k->writing[i].off < q->off + q->len)
            return true;
    }
    return k->busy == UINT64_MAX;
}

static void begin_writing(struct nbd_kept *k, struct nbd_request *q)
{
    q->slot = (unsigned)__builtin_ctzll(~k->busy);
    k->busy |= (uint64_t)1 << q->slot;
    k->writing[q->slot].off = q->off;
    k->writing[q->slot].end = q->off + q->len;
}

/* The server's error is told to those who write or flush next. Without an answer nothing is lost
 * yet. */
static int flush_unasked(struct nbd_file *f)
{
    char text[120];
    int r = nbd_flush_now(f);
    if (r < 0 && r != -ENOTCONN) {
        snprintf(text, sizeof(text), "the server could not flush it: %s", strerrordesc_np(-r));
        nbd_lose(f, text);
    }
    return r;
}

/* Flush for room; the lock is given up meanwhile. What that made durable may stand behind a write
 * that is still under way: then wait for its end. */
static int flush_for_room(struct nbd_file *f)
{
    struct nbd_kept *k = &f->kept;
    k->flushing = true;
    pthread_mutex_unlock(&k->lock);
    int r = flush_unasked(f);
    pthread_mutex_lock(&k->lock);
    k->flushing = false;
    pthread_cond_broadcast(&k->changed);
    if (r == 0 && k->first < k->next && write_at(k, k->first)->state == NBD_KEPT_SENT)
        pthread_cond_wait(&k->changed, &k->lock);
    return r;
}

/* Wait until it has its turn and, if it is to be kept, room. */
static int wait_for_turn(struct nbd_file *f, struct nbd_request *q)
{
    struct nbd_kept *k = &f->kept;
    uint64_t n = q->command == NBD_ZERO ? 0 : q->len, at;
    int r = 0;
    while (r == 0) {
        bool none = k->first == k->next && !k->unkept;
        q->keep = q->not_kept = false;
        if (is_blocked(k, q)) {
            pthread_cond_wait(&k->changed, &k->lock);
        } else if (none && (q->flags & LIBNBD_CMD_FLAG_FUA)) {
            return 0;
        } else if (k->unkept || !allocate(k)) {
            q->not_kept = true;
            return 0;
        } else if (find_room(k, n, &at)) {
            q->keep = true;
            return 0;
        } else if (!may_flush(f)) {
            q->not_kept = true;
            return 0;
        } else if (k->flushing || k->replaying) {
            pthread_cond_wait(&k->changed, &k->lock);
        } else {
            r = flush_for_room(f);
        }
    }
    return r;
}

static void append(struct nbd_kept *k, struct nbd_request *q)
{
    uint64_t n = q->command == NBD_ZERO ? 0 : q->len, at;
    find_room(k, n, &at);
    q->number = k->next++;
    *write_at(k, q->number) = (struct nbd_kept_write){.off = q->off,
                                                      .len = q->len,
                                                      .at = at,
                                                      .flags = q->flags,
                                                      .zero = q->command == NBD_ZERO,
                                                      .state = NBD_KEPT_SENT};
    k->head = at + n;
}

int nbd_kept_begin(struct nbd_file *f, struct nbd_request *q)
{
    struct nbd_kept *k = &f->kept;
    pthread_mutex_lock(&k->lock);
    int r = wait_for_turn(f, q);
    if (r == 0)
        begin_writing(k, q);
    if (r == 0 && q->keep)
        append(k, q);
    pthread_mutex_unlock(&k->lock);
    if (r == 0 && q->keep && q->command == NBD_WRITE)
        memcpy(k->bytes + write_at(k, q->number)->at % NBD_KEPT_BYTES, q->buf, (size_t)q->len);
    return r;
}

/* Without the lock where it is kept: a flush that begins meanwhile counts as one that began before,
 * and leaves it kept. */
void nbd_kept_answered(struct nbd_file *f, const struct nbd_request *q)
{
    struct nbd_kept *k = &f->kept;
    if (q->keep) {
        struct nbd_kept_write *w = write_at(k, q->number);
        w->answered = k->flushes;
        w->state = NBD_KEPT_ANSWERED;
    } else if (q->not_kept) {
        DR_LOCK_SCOPE(&k->lock);
        k->unkept = k->flushes + 1;
    }
}

bool nbd_kept_end(struct nbd_file *f, struct nbd_request *q, int r)
{
    struct nbd_kept *k = &f->kept;
    DR_LOCK_SCOPE(&k->lock);
    k->busy &= ~((uint64_t)1 << q->slot);
    /* What an error left there is not known, so nothing needs to be there again. */
    if (q->keep && r < 0 && write_at(k, q->number)->state == NBD_KEPT_SENT)
        write_at(k, q->number)->state = NBD_KEPT_OVER;
    if (q->keep && r == 0) {
        k->fresh += q->command == NBD_ZERO ? 0 : q->len;
        k->fresh_writes++;
    }
    release(k);
    bool room = !k->flushing && !k->replaying && may_flush(f) && is_time_to_flush(k);
    k->flushing = k->flushing || room;
    return room;
}

void nbd_kept_make_room(struct nbd_file *f)
{
    flush_unasked(f);
    DR_LOCK_SCOPE(&f->kept.lock);
    f->kept.flushing = false;
    pthread_cond_broadcast(&f->kept.changed);
}

/* ------------------------------------------------------------------ flushes and losses */

uint64_t nbd_kept_flush_begin(struct nbd_file *f)
{
    DR_LOCK_SCOPE(&f->kept.lock);
    f->kept.fresh = f->kept.fresh_writes = 0;
    return ++f->kept.flushes;
}

/* Also those behind a write that is still under way are over: a later one, which is not kept, may
 * have changed the same bytes. */
void nbd_kept_flushed(struct nbd_file *f, uint64_t number)
{
    struct nbd_kept *k = &f->kept;
    DR_LOCK_SCOPE(&k->lock);
    for (uint64_t i = k->first; i < k->next; i++) {
        struct nbd_kept_write *w = write_at(k, i);
        if (w->state == NBD_KEPT_ANSWERED && w->answered < number)
            w->state = NBD_KEPT_OVER;
    }
    if (k->unkept <= number)
        k->unkept = 0;
    release(k);
}

int nbd_kept_any(struct nbd_file *f)
{
    struct nbd_kept *k = &f->kept;
    DR_LOCK_SCOPE(&k->lock);
    if (k->unkept)
        return -1;
    for (uint64_t i = k->first; i < k->next; i++)
        if (write_at(k, i)->state == NBD_KEPT_ANSWERED)
            return 1;
    return 0;
}

bool nbd_kept_idle(struct nbd_file *f)
{
    struct nbd_kept *k = &f->kept;
    DR_LOCK_SCOPE(&k->lock);
    return k->first == k->next && !k->busy && !k->unkept;
}

void nbd_kept_drop(struct nbd_file *f)
{
    struct nbd_kept *k = &f->kept;
    DR_LOCK_SCOPE(&k->lock);
    for (uint64_t i = k->first; i < k->next; i++)
        if (write_at(k, i)->state == NBD_KEPT_ANSWERED)
            write_at(k, i)->state = NBD_KEPT_OVER;
    release(k);
}

/* ------------------------------------------------------------------ once more */

void nbd_kept_hold(struct nbd_file *f, bool hold)
{
    DR_LOCK_SCOPE(&f->kept.lock);
    f->kept.replaying = hold;
    release(&f->kept);
}

bool nbd_kept_next(struct nbd_file *f, uint64_t *i, struct nbd_kept_write *w, uint8_t **bytes)
{
    struct nbd_kept *k = &f->kept;
    DR_LOCK_SCOPE(&k->lock);
    for (*i = dr_max(*i, k->first); *i < k->next; ++*i)
        if (write_at(k, *i)->state == NBD_KEPT_ANSWERED)
            break;
    if (*i == k->next)
        return false;
    *w = *write_at(k, *i);
    *bytes = k->bytes + w->at % NBD_KEPT_BYTES;
    return true;
}
