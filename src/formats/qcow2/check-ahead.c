/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reads pieces of the file ahead of their use, several at a time.
 *
 * A pass adds the pieces that it wants in the order of the file. They wait in a ring; helper
 * threads read those at its end, while the caller's thread uses the one at its beginning. Each
 * piece is used by the caller's thread, in the order in which it was added. So a check finds the
 * same and says the same however many threads read, and only the reading has to be safe for
 * threads. The caller reads a piece itself where no helper has begun to.
 *
 * There are as many helpers as the file wants requests at once, and none before two pieces wait.
 * Where a pass writes to the file (c->writes), each piece is used before the next one is read: it
 * might be what is written. */
#include "formats/qcow2/check.h"

#include <pthread.h>
#include <unistd.h>

#define SLOTS       64u
#define ARENA       (15 * QCOW2_CHECK_STEP) /* bytes of pieces that wait */
#define MAX_HELPERS 64u
#define LOOK_FAR    (16 * QCOW2_CHECK_STEP) /* a long hole is found by few questions */
#define STACK       (UINT64_C(256) << 10)   /* the files' own code below pread */

enum state { WAITING, READING, READ };

struct slot {
    struct qcow2_piece piece;
    enum state state;
    uint8_t *bytes;
    uint64_t taken; /* of the arena: the piece, and what was skipped before it */
    bool hole;
    int result;
    struct dr_error err;
};

struct qcow2_ahead {
    struct qcow2_check *c;
    qcow2_piece_fn fn;
    void *user;
    uint8_t *arena;
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
static int ask_for_hole(struct qcow2_ahead *a, struct slot *s)
{
    enum dr_file_extent kind;
    uint64_t at = s->piece.at, len = s->piece.len, run;
    pthread_mutex_lock(&a->lock);
    s->hole = at >= a->hole_at && at + len <= a->hole_end;
    pthread_mutex_unlock(&a->lock);
    if (s->hole)
        return 0;
    int r = dr_file_extent(a->c->f, at, dr_max(len, LOOK_FAR), &kind, &run, &s->err);
    if (r < 0 || kind != DR_FILE_HOLE)
        return r;
    s->hole = run >= len;
    pthread_mutex_lock(&a->lock);
    a->hole_at = at;
    a->hole_end = at + run;
    pthread_mutex_unlock(&a->lock);
    return 0;
}

static void read_slot(struct qcow2_ahead *a, struct slot *s)
{
    s->hole = s->piece.len == 0;
    s->err = (struct dr_error)DR_ERROR_INIT;
    s->result = s->hole || s->piece.used ? 0 : ask_for_hole(a, s);
    if (s->result == 0 && !s->hole)
        s->result =
            dr_file_pread_short(a->c->f, s->bytes, s->piece.at, s->piece.len, NULL, &s->err);
}

static void *help(void *user)
{
    struct qcow2_ahead *a = user;
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
static void add_helper(struct qcow2_ahead *a)
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
static struct slot *wait_for_first(struct qcow2_ahead *a)
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

static void drop_first(struct qcow2_ahead *a)
{
    struct slot *s = &a->slots[a->head % SLOTS];
    a->used -= s->taken;
    if (a->used == 0)
        a->end = 0; /* memory that is in the processor's cache */
    pthread_mutex_lock(&a->lock);
    a->head++;
    pthread_mutex_unlock(&a->lock);
}

static int use_first(struct qcow2_ahead *a, struct dr_error *err)
{
    struct slot *s = wait_for_first(a);
    int r = s->result;
    if (r < 0 && err)
        *err = s->err;
    if (r == 0)
        r = a->fn(a->c, &s->piece, s->hole ? NULL : s->bytes, a->user, err);
    drop_first(a);
    return r;
}

/* A piece stands in one: where the rest of the arena is too short it goes to the beginning. */
static uint64_t start_for(const struct qcow2_ahead *a, uint64_t len)
{
    return a->end + len > ARENA ? 0 : a->end;
}

/* Bytes that it takes: its own, and those that are skipped before it. */
static uint64_t taken_for(const struct qcow2_ahead *a, uint64_t len)
{
    return a->end + len > ARENA ? ARENA - a->end + len : len;
}

static bool has_room(const struct qcow2_ahead *a, uint64_t len)
{
    return a->tail - a->head < SLOTS && a->used + taken_for(a, len) <= ARENA;
}

int qcow2_ahead_add(struct qcow2_check *c, const struct qcow2_piece *piece, struct dr_error *err)
{
    struct qcow2_ahead *a = c->ahead;
    int r = 0;
    while (r == 0 && !has_room(a, piece->len))
        r = use_first(a, err);
    if (r < 0)
        return r;
    struct slot *s = &a->slots[a->tail % SLOTS];
    uint64_t start = start_for(a, piece->len);
    s->piece = *piece;
    s->state = WAITING;
    s->bytes = a->arena + start;
    s->taken = taken_for(a, piece->len);
    a->used += s->taken;
    a->end = start + piece->len;
    pthread_mutex_lock(&a->lock);
    a->tail++;
    if (c->writes) {
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

void qcow2_ahead_start(struct qcow2_check *c, qcow2_piece_fn fn, void *user)
{
    struct qcow2_ahead *a = c->ahead;
    a->fn = fn;
    a->user = user;
    a->hole_at = a->hole_end = 0; /* a repair may have written there */
}

int qcow2_ahead_finish(struct qcow2_check *c, int r, struct dr_error *err)
{
    struct qcow2_ahead *a = c->ahead;
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
static unsigned wanted_helpers(const struct dr_file *f)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t n = dr_max(cpus < 1 ? 0 : (uint64_t)cpus - 1, f->depth);
    if (qcow2_check_limits.readers)
        n = qcow2_check_limits.readers - 1;
    return (unsigned)dr_min(n, MAX_HELPERS);
}

int qcow2_ahead_new(struct qcow2_check *c)
{
    struct qcow2_ahead *a = calloc(1, sizeof(*a));
    if (a)
        a->arena = malloc(ARENA);
    if (!a || !a->arena) {
        free(a);
        return -ENOMEM;
    }
    a->c = c;
    a->max_helpers = wanted_helpers(c->f);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->more, NULL);
    pthread_cond_init(&a->done, NULL);
    c->ahead = a;
    return 0;
}

void qcow2_ahead_free(struct qcow2_check *c)
{
    struct qcow2_ahead *a = c->ahead;
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
    free(a);
    c->ahead = NULL;
}
