/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdlib.h>

#include "archive/vma-append.h"
#include "base/cleanup.h"

void vma_append_begin(struct vma_append *a, struct vma_output *out, struct vma_frames *frames)
{
    *a = (struct vma_append){.out = out, .frames = frames};
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->turn, NULL);
}

static void free_room(struct vma_append_room *room)
{
    free(room->plain);
    free(room->coded);
    free(room);
}

static void free_all(struct vma_append_room *room)
{
    for (struct vma_append_room *next; room; room = next) {
        next = room->next;
        free_room(room);
    }
}

void vma_append_end(struct vma_append *a)
{
    free_all(a->idle);
    free_all(a->stuck);
    pthread_cond_destroy(&a->turn);
    pthread_mutex_destroy(&a->lock);
}

/* ------------------------------------------------------------------ rooms */

static struct vma_append_room *take_idle(struct vma_append *a)
{
    DR_LOCK_SCOPE(&a->lock);
    struct vma_append_room *room = a->idle;
    if (room)
        a->idle = room->next;
    return room;
}

struct vma_append_room *vma_append_take(struct vma_append *a, size_t most)
{
    struct vma_append_room *room = take_idle(a);
    if (room || !(room = calloc(1, sizeof(*room))))
        return room;
    room->plain = malloc(most);
    if (a->frames) /* two of them have no more bytes than one, but two heads */
        room->coded = malloc(vma_frames_bound(most) + vma_frames_bound(0));
    if (room->plain && (room->coded || !a->frames))
        return room;
    free_room(room);
    return NULL;
}

void vma_append_give(struct vma_append *a, struct vma_append_room *room)
{
    DR_LOCK_SCOPE(&a->lock);
    room->next = a->idle;
    a->idle = room;
}

void vma_append_keep(struct vma_append *a, struct vma_append_room *room, const void *whose,
                     uint64_t id)
{
    if (!room->is_stuck) {
        vma_append_give(a, room);
        return;
    }
    DR_LOCK_SCOPE(&a->lock);
    room->whose = whose;
    room->id = id;
    room->next = a->stuck;
    a->stuck = room;
}

struct vma_append_room *vma_append_stuck(struct vma_append *a, const void *whose, uint64_t id)
{
    DR_LOCK_SCOPE(&a->lock);
    struct vma_append_room **at = &a->stuck;
    while (*at && ((*at)->whose != whose || (*at)->id != id))
        at = &(*at)->next;
    struct vma_append_room *room = *at;
    if (room)
        *at = room->next;
    return room;
}

int vma_append_again(struct vma_append *a, struct vma_append_room *room, struct dr_error *err)
{
    int r = dr_file_pwrite(a->out->file, room->bytes, room->place, room->len, err);
    room->is_stuck = r < 0;
    return r;
}

/* ------------------------------------------------------------------ adding */

struct piece {
    const uint8_t *bytes;
    size_t len;
    struct {
        size_t plain, coded;
    } frame[2];
    unsigned n_frames;
};

static int compress(struct vma_append *a, struct vma_append_room *room, size_t len, size_t head,
                    struct piece *piece, struct dr_error *err)
{
    const size_t part[] = {head < len ? head : 0, head < len ? len - head : len};
    size_t done = 0;
    int r = 0;
    *piece = (struct piece){.bytes = room->coded};
    for (unsigned i = 0; r == 0 && i < 2; i++) {
        size_t coded;
        if (part[i] == 0)
            continue;
        r = vma_frames_compress(a->frames, room->plain + done, part[i], room->coded + piece->len,
                                &coded, err);
        if (r < 0)
            break;
        piece->frame[piece->n_frames].plain = part[i];
        piece->frame[piece->n_frames++].coded = coded;
        piece->len += coded;
        done += part[i];
    }
    return r;
}

static int fail_like_the_first(const struct vma_append *a, struct dr_error *err)
{
    return dr_fail(err, -a->failed, "%s: an earlier part of the archive could not be written",
                   a->out->name);
}

/* The piece's place in a file, or its turn; and its frames are the next ones. */
static int take_place(struct vma_append *a, const struct piece *piece, uint64_t *place,
                      struct dr_error *err)
{
    DR_LOCK_SCOPE(&a->lock);
    int r = a->failed ? fail_like_the_first(a, err) : 0;
    for (unsigned i = 0; r == 0 && i < piece->n_frames; i++)
        r = vma_frames_add(a->frames, piece->frame[i].coded, piece->frame[i].plain, err);
    if (r < 0) {
        a->failed = r;
        return r;
    }
    if (a->out->file) {
        *place = a->out->pos;
        a->out->pos += piece->len;
        return 0;
    }
    *place = a->next++;
    while (a->now != *place)
        pthread_cond_wait(&a->turn, &a->lock);
    return 0;
}

/* Has another piece failed while this one waited for its turn? */
static int still_good(struct vma_append *a, struct dr_error *err)
{
    DR_LOCK_SCOPE(&a->lock);
    return a->failed ? fail_like_the_first(a, err) : 0;
}

static void end_turn(struct vma_append *a, int r)
{
    DR_LOCK_SCOPE(&a->lock);
    if (r < 0 && !a->failed)
        a->failed = r;
    a->now++;
    pthread_cond_broadcast(&a->turn);
}

int vma_append(struct vma_append *a, struct vma_append_room *room, size_t len, size_t head,
               struct dr_error *err)
{
    struct piece piece = {.bytes = room->plain, .len = len};
    uint64_t place = 0;
    int r = a->frames ? compress(a, room, len, head, &piece, err) : 0;
    if (r == 0)
        r = take_place(a, &piece, &place, err);
    if (r < 0)
        return r;
    if (a->out->file) {
        room->bytes = piece.bytes;
        room->len = piece.len;
        room->place = place;
        return vma_append_again(a, room, err);
    }
    r = still_good(a, err);
    if (r == 0)
        r = vma_output_write(a->out, piece.bytes, piece.len, err);
    end_turn(a, r);
    return r;
}
