/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The ring of pieces: helper threads read those at its end, while the caller's thread uses the one
 * at its beginning. The caller reads a piece itself where no helper has begun to. */
#include "formats/ahead.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"

#define SLOTS       64u
#define ARENA       (15 * DR_AHEAD_STEP) /* bytes of pieces that wait */
#define MAX_HELPERS 64u
#define LOOK_FAR    (16 * DR_AHEAD_STEP)  /* a long hole is found by few questions */
#define STACK       (UINT64_C(256) << 10) /* the files' own code below pread */

enum state { WAITING, READING, READ };

struct slot {
    struct dr_ahead_range range;
    void *what; /* the caller's */
    enum state state;
    uint8_t *bytes;
    uint64_t taken; /* of the arena: the piece, and what was skipped before it */
    bool hole;
    int result;
    struct dr_error err;
};

struct dr_ahead {
    struct dr_file *f;
    size_t what_size;
    dr_ahead_fn fn;
    void *user;
    uint8_t *arena, *whats;
    uint64_t end, used; /* where the next piece goes; bytes taken */
    unsigned max_helpers, n_helpers;
    pthread_t helpers[MAX_HELPERS];

    pthread_mutex_t lock; /* the rest */
    pthread_cond_t more, done;
    unsigned idle; /* helpers that wait for a piece */
    bool stop;
    uint64_t head, next, tail;  /* [head, tail) are in the ring; from `next` on nobody reads yet */
    uint64_t hole_at, hole_end; /* the hole that was found last */
    struct slot slots[SLOTS];
};

/* ------------------------------------------------------------------ reading */

/* Does all of the piece lie in a hole? A file that cannot tell has none. */
static int ask_for_hole(struct dr_ahead *a, struct slot *s)
{
    enum dr_file_extent kind;
    uint64_t at = s->range.at, len = s->range.len, run;
    pthread_mutex_lock(&a->lock);
    s->hole = at >= a->hole_at && at + len <= a->hole_end;
    pthread_mutex_unlock(&a->lock);
    if (s->hole)
        return 0;
    int r = dr_file_extent(a->f, at, dr_max(len, LOOK_FAR), &kind, &run, &s->err);
    if (r < 0 || kind != DR_FILE_HOLE)
        return r;
    s->hole = run >= len;
    pthread_mutex_lock(&a->lock);
    a->hole_at = at;
    a->hole_end = at + run;
    pthread_mutex_unlock(&a->lock);
    return 0;
}

static void read_slot(struct dr_ahead *a, struct slot *s)
{
    s->hole = s->range.len == 0;
    s->err = (struct dr_error)DR_ERROR_INIT;
    s->result = s->hole || s->range.used ? 0 : ask_for_hole(a, s);
    if (s->result == 0 && !s->hole)
        s->result = dr_file_pread_short(a->f, s->bytes, s->range.at, s->range.len, NULL, &s->err);
}

static void *help(void *user)
{
    struct dr_ahead *a = user;
    pthread_mutex_lock(&a->lock);
    for (;;) {
        while (!a->stop && a->next == a->tail) {
            a->idle++;
            pthread_cond_wait(&a->more, &a->lock);
            a->idle--;
        }
        if (a->stop)
            break;
        struct slot *s = &a->slots[a->next++ % SLOTS];
        s->state = READING;
        pthread_mutex_unlock(&a->lock);
        read_slot(a, s);
        pthread_mutex_lock(&a->lock);
        s->state = READ;
        pthread_cond_signal(&a->done); /* only the caller waits for it */
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

/* If no thread can be made, the check goes on with those it has. */
static void add_helper(struct dr_ahead *a)
{
    pthread_attr_t attr;
    if (a->n_helpers == a->max_helpers || pthread_attr_init(&attr) != 0)
        return;
    pthread_attr_setstacksize(&attr, STACK);
    if (pthread_create(&a->helpers[a->n_helpers], &attr, help, a) == 0)
        a->n_helpers++;
    else
        a->max_helpers = a->n_helpers;
    pthread_attr_destroy(&attr);
}

/* ------------------------------------------------------------------ the ring */

/* The first piece, read by now. */
static struct slot *wait_for_first(struct dr_ahead *a)
{
    struct slot *s = &a->slots[a->head % SLOTS];
    pthread_mutex_lock(&a->lock);
    if (a->next == a->head) { /* nobody has begun */
        a->next++;
        pthread_mutex_unlock(&a->lock);
        read_slot(a, s);
        return s;
    }
    while (s->state != READ)
        pthread_cond_wait(&a->done, &a->lock);
    pthread_mutex_unlock(&a->lock);
    return s;
}

static void drop_first(struct dr_ahead *a)
{
    struct slot *s = &a->slots[a->head % SLOTS];
    a->used -= s->taken;
    if (a->used == 0)
        a->end = 0; /* memory that is in the processor's cache */
    pthread_mutex_lock(&a->lock);
    a->head++;
    pthread_mutex_unlock(&a->lock);
}

static int use_first(struct dr_ahead *a, struct dr_error *err)
{
    struct slot *s = wait_for_first(a);
    int r = s->result;
    if (r < 0 && err)
        *err = s->err;
    if (r == 0)
        r = a->fn(a->user, s->what, s->hole ? NULL : s->bytes, err);
    drop_first(a);
    return r;
}

/* A piece stands in one: where the rest of the arena is too short it goes to the beginning. */
static uint64_t start_for(const struct dr_ahead *a, uint64_t len)
{
    return a->end + len > ARENA ? 0 : a->end;
}

/* Bytes that it takes: its own, and those that are skipped before it. */
static uint64_t taken_for(const struct dr_ahead *a, uint64_t len)
{
    return a->end + len > ARENA ? ARENA - a->end + len : len;
}

static bool has_room(const struct dr_ahead *a, uint64_t len)
{
    return a->tail - a->head < SLOTS && a->used + taken_for(a, len) <= ARENA;
}

int dr_ahead_add(struct dr_ahead *a, const struct dr_ahead_range *range, const void *what,
                 bool alone, struct dr_error *err)
{
    int r = 0;
    while (r == 0 && !has_room(a, range->len))
        r = use_first(a, err);
    if (r < 0)
        return r;
    struct slot *s = &a->slots[a->tail % SLOTS];
    uint64_t start = start_for(a, range->len);
    s->range = *range;
    memcpy(s->what, what, a->what_size);
    s->state = WAITING;
    s->bytes = a->arena + start;
    s->taken = taken_for(a, range->len);
    a->used += s->taken;
    a->end = start + range->len;
    pthread_mutex_lock(&a->lock);
    a->tail++;
    if (alone) {
        pthread_mutex_unlock(&a->lock);
        return use_first(a, err);
    }
    bool lacking = a->tail - a->next > a->idle && a->tail - a->head > 1;
    pthread_cond_signal(&a->more);
    pthread_mutex_unlock(&a->lock);
    if (lacking)
        add_helper(a);
    return 0;
}

void dr_ahead_start(struct dr_ahead *a, dr_ahead_fn fn, void *user)
{
    a->fn = fn;
    a->user = user;
    a->hole_at = a->hole_end = 0; /* somebody may have written there */
}

int dr_ahead_finish(struct dr_ahead *a, int r, struct dr_error *err)
{
    while (r == 0 && a->head < a->tail)
        r = use_first(a, err);
    if (r == 0)
        return 0;
    pthread_mutex_lock(&a->lock);
    a->tail = a->next; /* the others are not begun any more */
    pthread_mutex_unlock(&a->lock);
    while (a->head < a->tail) {
        wait_for_first(a);
        drop_first(a);
    }
    a->used = a->end = 0;
    return r;
}

/* ------------------------------------------------------------------ beginning and end */

/* The caller uses one processor. Where reading takes long it only waits, so the file decides. */
static unsigned wanted_helpers(const struct dr_file *f, unsigned readers)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t n = dr_max(cpus < 1 ? 0 : (uint64_t)cpus - 1, f->depth);
    if (readers)
        n = readers - 1;
    return (unsigned)dr_min(n, MAX_HELPERS);
}

struct dr_ahead *dr_ahead_new(struct dr_file *f, size_t what_size, unsigned readers)
{
    struct dr_ahead *a = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    a->arena = malloc(ARENA);
    a->whats = malloc(SLOTS * what_size);
    if (!a->arena || !a->whats) {
        free(a->arena);
        free(a->whats);
        free(a);
        return NULL;
    }
    for (size_t i = 0; i < SLOTS; i++)
        a->slots[i].what = a->whats + i * what_size;
    a->f = f;
    a->what_size = what_size;
    a->max_helpers = wanted_helpers(f, readers);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->more, NULL);
    pthread_cond_init(&a->done, NULL);
    return a;
}

void dr_ahead_free(struct dr_ahead *a)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    a->stop = true;
    pthread_cond_broadcast(&a->more);
    pthread_mutex_unlock(&a->lock);
    while (a->n_helpers)
        pthread_join(a->helpers[--a->n_helpers], NULL);
    pthread_cond_destroy(&a->done);
    pthread_cond_destroy(&a->more);
    pthread_mutex_destroy(&a->lock);
    free(a->arena);
    free(a->whats);
    free(a);
}
