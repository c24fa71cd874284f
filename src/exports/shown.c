/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An export that is removed leaves the list of exports at once, and its memory goes with its last
 * connection. Each connection counts its own requests: one that begins counts itself and then looks
 * whether its export was removed; the remover says so first and then looks at the counts. So either
 * the request sees it, or the remover sees the request, and the last request that ends tells. */
#include "exports/shown.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"

struct shown {
    struct shown *next;
    char *id, *name;
    struct served *served; /* a disk of the list, which may not be open yet; or NULL */
    struct dr_disk *disk;  /* of others */
    struct dr_stall *stall;
    bool writable;
    _Atomic bool removed;
    bool gone, told; /* nothing is under way any more; the control knows it */
    struct connection *connections;
};

struct connection {
    struct connection *next;
    struct shown *export;
    struct dr_disk *disk;
    _Atomic unsigned under_way;
    int socket; /* or -1 */
};

/* ------------------------------------------------------------------ the list; under its lock */

static void free_export(struct shown *e)
{
    if (!e)
        return;
    free(e->id);
    free(e->name);
    free(e);
}

static struct shown *find_id(const struct disk_list *list, const char *id)
{
    struct shown *e = list->shown;
    while (e && strcmp(e->id, id) != 0)
        e = e->next;
    return e;
}

static struct shown *find_name(const struct disk_list *list, const char *name)
{
    struct shown *e = list->shown;
    while (e && *name && strcmp(e->name, name) != 0)
        e = e->next;
    return e;
}

static int add(struct disk_list *list, const char *id, const char *name, struct shown **made,
               struct dr_error *err)
{
    struct shown **end = &list->shown;
    if (find_name(list, name) && *name)
        return dr_fail(err, EEXIST, "there is an export '%s' already", name);
    struct shown *e = calloc(1, sizeof(*e));
    if (e) {
        e->id = strdup(id);
        e->name = strdup(name);
    }
    if (!e || !e->id || !e->name) {
        free_export(e);
        return dr_fail(err, ENOMEM, "out of memory for an export");
    }
    while (*end)
        end = &(*end)->next;
    *end = *made = e;
    return 0;
}

/* ------------------------------------------------------------------ beginning and end */

int shown_open(struct disk_list *list, struct dr_error *err)
{
    int r = 0;
    DR_LOCK_SCOPE(&list->lock);
    for (size_t i = 0; r == 0 && i < list->n; i++) {
        struct shown *e;
        r = add(list, list->served[i].name, list->served[i].name, &e, err);
        if (r == 0) {
            e->served = &list->served[i];
            e->writable = true;
        }
    }
    return r;
}

void shown_close(struct disk_list *list)
{
    DR_LOCK_SCOPE(&list->lock);
    for (struct shown *e = list->shown, *next; e; e = next) {
        next = e->next;
        e->told = true;
        if (!e->connections) /* else the last one frees it */
            free_export(e);
    }
    list->shown = NULL;
}

int shown_list(struct disk_list *list, int (*each)(void *user, const char *name), void *user)
{
    int r = 0;
    DR_LOCK_SCOPE(&list->lock);
    for (const struct shown *e = list->shown; r == 0 && e; e = e->next)
        r = each(user, e->name);
    return r;
}

/* ------------------------------------------------------------------ removal */

/* Under the list's lock. True: nothing is under way, and the caller is the one to tell. */
static bool take_gone(struct shown *e)
{
    if (e->gone)
        return false;
    for (const struct connection *c = e->connections; c; c = c->next)
        if (atomic_load(&c->under_way) > 0)
            return false;
    e->gone = true;
    return true;
}

/* The caller has taken it: until told is set nobody else frees it. */
static void tell_gone(struct disk_list *list, struct shown *e)
{
    dr_live_export_gone(list->live, e->id);
    pthread_mutex_lock(&list->lock);
    e->told = true;
    bool last = !e->connections;
    pthread_mutex_unlock(&list->lock);
    if (last)
        free_export(e);
}

/* Its requests fail from now on. The one under way on a connection is still answered. */
int shown_remove(struct disk_list *list, const char *id, bool hard, void (*hang_up)(int socket),
                 struct dr_error *err)
{
    pthread_mutex_lock(&list->lock);
    struct shown *e = find_id(list, id), **at = &list->shown;
    bool busy = e && e->connections && !hard, gone = false;
    if (e && !busy) {
        while (*at != e)
            at = &(*at)->next;
        *at = e->next;
        atomic_store(&e->removed, true);
        gone = take_gone(e);
        for (const struct connection *c = e->connections; c; c = c->next)
            hang_up(c->socket);
    }
    pthread_mutex_unlock(&list->lock);
    if (!e)
        return dr_fail(err, ENOENT, "there is no export '%s'", id);
    if (busy)
        return dr_fail(err, EBUSY, "clients have the export '%s'", id);
    if (gone)
        tell_gone(list, e);
    return 0; /* else a request is under way, and the last one tells */
}

/* Changes of one disk stand in one line, whichever export they come through. */
static struct dr_stall *stall_of(const struct disk_list *list, const struct dr_disk *disk)
{
    for (size_t i = 0; i < list->n; i++)
        if (list->served[i].disk == disk)
            return list->served[i].stall;
    return NULL;
}

int shown_add(struct disk_list *list, const char *id, const char *name, struct dr_disk *disk,
              bool writable, struct dr_error *err)
{
    struct shown *e;
    DR_LOCK_SCOPE(&list->lock);
    int r = add(list, id, name, &e, err);
    if (r == 0) {
        e->disk = disk;
        e->stall = stall_of(list, disk);
        e->writable = writable;
    }
    return r;
}

/* ------------------------------------------------------------------ connections */

static struct served *find_served(struct disk_list *list, const char *name)
{
    DR_LOCK_SCOPE(&list->lock);
    const struct shown *e = find_name(list, name);
    return e ? e->served : NULL;
}

static int join(struct disk_list *list, const char *name, struct connection *c,
                struct dr_error *err)
{
    DR_LOCK_SCOPE(&list->lock);
    struct shown *e = find_name(list, name);
    if (!e)
        return dr_fail(err, ENOENT, "there is no export named '%s'", name);
    c->disk = e->served ? e->served->disk : e->disk;
    c->export = e;
    c->next = e->connections;
    e->connections = c;
    return 0;
}

int shown_connect(struct disk_list *list, const char *name, bool readonly, int socket,
                  struct connection **c, struct dr_error *err)
{
    struct served *served = find_served(list, name);
    int r = served ? disk_list_use(list, served, readonly, err) : 0;
    if (r < 0)
        return r;
    *c = calloc(1, sizeof(**c));
    if (!*c)
        return dr_fail(err, ENOMEM, "out of memory for a client");
    (*c)->socket = socket;
    r = join(list, name, *c, err);
    if (r < 0)
        free(*c);
    return r;
}

int shown_disconnect(struct disk_list *list, struct connection *c)
{
    struct shown *e = c->export;
    int socket = c->socket;
    pthread_mutex_lock(&list->lock);
    struct connection **at = &e->connections;
    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    bool last = e->told && !e->connections;
    pthread_mutex_unlock(&list->lock);
    if (last)
        free_export(e);
    free(c);
    return socket;
}

struct dr_disk *shown_begin(struct disk_list *list, struct connection *c)
{
    atomic_fetch_add(&c->under_way, 1);
    if (!atomic_load(&c->export->removed))
        return c->disk;
    shown_end(list, c);
    return NULL;
}

/* The connection is in its export's list, which keeps the export. */
void shown_end(struct disk_list *list, struct connection *c)
{
    if (atomic_fetch_sub(&c->under_way, 1) != 1 || !atomic_load(&c->export->removed))
        return;
    pthread_mutex_lock(&list->lock);
    bool gone = take_gone(c->export);
    pthread_mutex_unlock(&list->lock);
    if (gone)
        tell_gone(list, c->export);
}

struct dr_stall *shown_stall(const struct connection *c)
{
    return c->export->served ? c->export->served->stall : c->export->stall;
}

bool shown_writable(const struct connection *c)
{
    return c->export->writable && dr_writable(c->disk);
}
