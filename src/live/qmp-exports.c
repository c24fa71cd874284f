/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Exports: which disks NBD clients see, by which names. The program that made the dr_live has the
 * sockets and the clients; here stands which exports there are, and what the clients of the
 * control socket may change about them.
 *
 * An export that is being removed stays in the list until the program says that no request is under
 * way on it any more (dr_live_export_gone()). Until then its disk stays open. */
#include <stdlib.h>
#include <string.h>

#include "live/live.h"

/* ------------------------------------------------------------------ the list; under the lock */

static struct live_export *find(const struct dr_live *live, const char *id)
{
    struct live_export *e = live->exports;
    while (e && strcmp(e->id, id) != 0)
        e = e->next;
    return e;
}

static void free_export(struct live_export *e)
{
    if (!e)
        return;
    free(e->id);
    free(e);
}

void live_free_exports(struct dr_live *live)
{
    for (struct live_export *e = live->exports, *next; e; e = next) {
        next = e->next;
        free_export(e);
    }
    live->exports = NULL;
}

int live_export_add(struct dr_live *live, const char *id, struct live_disk *on,
                    struct dr_error *err)
{
    struct live_export *e = calloc(1, sizeof(*e)), **end = &live->exports;
    if (e)
        e->id = strdup(id);
    if (!e || !e->id) {
        free_export(e);
        return dr_fail(err, ENOMEM, "out of memory for an export");
    }
    e->on = on;
    while (*end)
        end = &(*end)->next;
    *end = e;
    return 0;
}

bool live_is_exported(const struct dr_live *live, const struct live_disk *on)
{
    const struct live_export *e = live->exports;
    while (e && e->on != on)
        e = e->next;
    return e;
}

static void drop(struct dr_live *live, struct live_export *gone)
{
    struct live_export **at = &live->exports;
    while (*at != gone)
        at = &(*at)->next;
    *at = gone->next;
    free_export(gone);
}

void dr_live_export_gone(struct dr_live *live, const char *id)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_export *e = find(live, id);
    if (!e || !e->removed)
        return;
    drop(live, e);
    live_event(live, "BLOCK_EXPORT_DELETED", json_pack("{s:s}", "id", id));
}

/* ------------------------------------------------------------------ asking */

static json_t *query_exports(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *all = json_array();
    (void)args, (void)err;
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_export *e = live->exports; e; e = e->next)
        json_array_append_new(all, json_pack("{s:s, s:s, s:s, s:b}", "id", e->id, "type", "nbd",
                                             "node-name", live_node_of(live, e->on->path),
                                             "shutting-down", e->removed));
    return all;
}

/* ------------------------------------------------------------------ block-export-add */

static int check_served(const struct dr_live *live, struct qmp_error *err)
{
    if (live->served)
        return 0;
    qmp_fail(err, NULL, "The exports of this server cannot be changed");
    return -ENOTSUP;
}

static int check_id(struct dr_live *live, const char *id, struct qmp_error *err)
{
    DR_LOCK_SCOPE(&live->lock);
    if (!live_is_name(id))
        qmp_fail(err, NULL, "Invalid block export id");
    else if (find(live, id))
        qmp_fail(err, NULL, "Block export id '%s' is already in use", id);
    else
        return 0;
    return -EINVAL;
}

static json_t *add(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    enum { NAME_MOST = 4096 }; /* the protocol's limit for strings */
    const char *id = qmp_string(args, "id"), *node = qmp_string(args, "node-name");
    const char *type = qmp_string(args, "type"), *name = qmp_string(args, "name");
    bool writable = qmp_bool(args, "writable", false);
    if (strcmp(type, "nbd") != 0)
        return qmp_fail(err, NULL, "Parameter 'type' does not accept value '%s'", type);
    if (check_served(live, err) < 0 || check_id(live, id, err) < 0)
        return NULL;
    struct live_disk *on = qmp_device(live, args, err);
    if (!on)
        return NULL;
    if (writable && !dr_writable(on->disk))
        return qmp_fail(err, NULL, "Cannot export read-only node as writable");
    if (live->hung_up)
        return qmp_fail(err, NULL, "NBD server not running");
    if (name && !*name)
        return qmp_fail(err, NULL, "Parameter 'name' is empty: an export has a name");
    if (name && strlen(name) > NAME_MOST)
        return qmp_fail(err, NULL, "export name '%.64s...' too long", name);
    pthread_mutex_lock(&live->lock);
    int r = live_export_add(live, id, on, &err->text);
    pthread_mutex_unlock(&live->lock);
    if (r < 0)
        return NULL;
    r = live->served->add(live->user, id, name ? name : node, on->disk, writable, &err->text);
    if (r == 0)
        return json_object();
    DR_LOCK_SCOPE(&live->lock);
    drop(live, find(live, id));
    if (r == -EEXIST)
        qmp_fail(err, NULL, "NBD server already has export named '%s'", name ? name : node);
    return NULL;
}

/* ------------------------------------------------------------------ block-export-del */

/* Marked before the program is asked, since it may be gone before the program answers. */
static int mark_removed(struct dr_live *live, const char *id, bool removed)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_export *e = find(live, id);
    if (!e || e->removed == removed)
        return e ? -EALREADY : -ENOENT;
    e->removed = removed;
    return 0;
}

static json_t *del(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const char *id = qmp_string(args, "id"), *mode = qmp_string(args, "mode");
    bool hard = mode && strcmp(mode, "hard") == 0;
    if (mode && !hard && strcmp(mode, "safe") != 0)
        return qmp_fail(err, NULL, "Parameter 'mode' does not accept value '%s'", mode);
    if (check_served(live, err) < 0)
        return NULL;
    int r = mark_removed(live, id, true);
    if (r == -ENOENT)
        return qmp_fail(err, NULL, "Export '%s' is not found", id);
    if (r == -EALREADY)
        return qmp_fail(err, NULL, "Export '%s' is already shutting down", id);
    r = live->served->remove(live->user, id, hard, &err->text);
    if (r == 0)
        return json_object();
    mark_removed(live, id, false);
    if (r == -EBUSY)
        qmp_fail(err, NULL, "export '%s' still in use", id);
    return NULL;
}

/* ------------------------------------------------------------------ the NBD server */

/* The id of an export that is not being removed, malloc'ed; NULL: there is none. */
static char *any_export(struct dr_live *live)
{
    DR_LOCK_SCOPE(&live->lock);
    const struct live_export *e = live->exports;
    while (e && e->removed)
        e = e->next;
    return e ? strdup(e->id) : NULL;
}

static json_t *stop(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    char *id;
    (void)args;
    if (check_served(live, err) < 0)
        return NULL;
    if (live->hung_up)
        return qmp_fail(err, NULL, "NBD server not running");
    live->hung_up = true;
    live->served->stop(live->user); /* from now on no client comes */
    while ((id = any_export(live))) {
        mark_removed(live, id, true);
        live->served->remove(live->user, id, true, NULL);
        free(id);
    }
    return json_object();
}

static int read_address(json_t *address, const char **path, const char **port,
                        struct qmp_error *err)
{
    static const struct qmp_arg level[] = {{"type", 's', true}, {"data", 'o', true}, {0}};
    static const struct qmp_arg local[] = {{"path", 's', true}, {0}};
    static const struct qmp_arg inet[] = {
        {"host", 's', true},        {"port", 's', true},   {"numeric", 'b', false},
        {"to", 'n', false},         {"ipv4", 'b', false},  {"ipv6", 'b', false},
        {"keep-alive", 'b', false}, {"mptcp", 'b', false}, {0}};
    const char *type = qmp_string(address, "type");
    bool is_local = type && strcmp(type, "unix") == 0;
    if (type && !is_local && strcmp(type, "inet") != 0) {
        qmp_fail(err, NULL, "Parameter 'type' does not accept value '%s'", type);
        return -EINVAL;
    }
    json_t *data = json_object_get(address, "data");
    int r = qmp_check_args(level, "addr.", address, err);
    if (r == 0)
        r = qmp_check_args(is_local ? local : inet, "addr.data.", data, err);
    *path = qmp_string(data, "path");
    *port = qmp_string(data, "port");
    return r;
}

static json_t *start(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const char *path, *port;
    if (read_address(json_object_get(args, "addr"), &path, &port, err) < 0 ||
        check_served(live, err) < 0)
        return NULL;
    if (!live->hung_up)
        return qmp_fail(err, NULL, "NBD server already running");
    if (live->served->start(live->user, path, port, &err->text) < 0)
        return NULL;
    live->hung_up = false;
    return json_object();
}

/* ------------------------------------------------------------------ the table */

const struct qmp_command qmp_export_commands[] = {
    {"query-block-exports", query_exports, {{0}}},
    {"block-export-add",
     add,
     {{"type", 's', true},
      {"id", 's', true},
      {"node-name", 's', true},
      {"name", 's', false},
      {"writable", 'b', false}}},
    {"block-export-del", del, {{"id", 's', true}, {"mode", 's', false}}},
    {"nbd-server-start", start, {{"addr", 'o', true}}},
    {"nbd-server-stop", stop, {{0}}},
    {0},
};
