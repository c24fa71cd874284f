/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Disks by their names, and the beginning and the end of a dr_live. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/json.h"
#include "live/live.h"
#include "storage/storage.h"

/* ------------------------------------------------------------------ names */

struct live_disk *live_find_disk(struct dr_live *live, const char *name)
{
    struct live_disk *d = live->disks;
    while (d && strcmp(d->name, name) != 0)
        d = d->next;
    return d;
}

struct live_node *live_find_node(const struct dr_live *live, const char *name)
{
    struct live_node *n = live->nodes;
    while (n && strcmp(n->name, name) != 0)
        n = n->next;
    return n;
}

static bool is_image(const struct live_node *n)
{
    return !n->added || n->format;
}

const char *live_node_path(const struct dr_live *live, const char *name)
{
    const struct live_node *n = live_find_node(live, name);
    return n && is_image(n) ? n->path : NULL;
}

static const char *node_name(const struct dr_live *live, const char *path)
{
    const struct live_node *n = live->nodes;
    while (n && (strcmp(n->path, path) != 0 || !is_image(n)))
        n = n->next;
    return n ? n->name : NULL;
}

struct live_disk *live_find_device(struct dr_live *live, const char *name)
{
    struct live_disk *d = live_find_disk(live, name);
    const char *path = d ? NULL : live_node_path(live, name);
    if (d || !path)
        return d;
    for (d = live->disks; d && strcmp(d->path, path) != 0;)
        d = d->next;
    return d;
}

bool live_is_name(const char *name)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    static const char all[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
    size_t len = strlen(name);
    return len > 0 && len <= LIVE_NAME_MAX && strspn(name, letters) > 0 && strspn(name, all) == len;
}

struct live_disk *live_nth_disk(struct dr_live *live, size_t n)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_disk *d = live->disks;
    while (d && n-- > 0)
        d = d->next;
    return d;
}

int live_check_name(struct dr_live *live, const char *name, struct dr_error *err)
{
    if (!live_is_name(name))
        return dr_fail(err, EINVAL, "Invalid node-name: '%s'", name);
    if (live_find_disk(live, name) || live_find_node(live, name))
        return dr_fail(err, EEXIST, "Duplicate nodes with node-name='%s'", name);
    return 0;
}

void live_free_node(struct live_node *node)
{
    if (!node)
        return;
    free(node->name);
    free(node->path);
    free(node->format);
    free(node->file_node);
    free(node);
}

static int add_node(struct dr_live *live, const char *name, const char *path, struct dr_error *err)
{
    struct live_node *n = calloc(1, sizeof(*n));
    if (n) {
        n->name = strdup(name);
        n->path = strdup(path);
    }
    if (!n || !n->name || !n->path) {
        live_free_node(n);
        return dr_fail(err, ENOMEM, "out of memory for a node's name");
    }
    n->next = live->nodes;
    live->nodes = n;
    return 0;
}

int live_name_node(struct dr_live *live, const char *name, const char *path, struct dr_error *err)
{
    int r = live_check_name(live, name, err);
    return r < 0 ? r : add_node(live, name, path, err);
}

const char *live_node_of(struct dr_live *live, const char *path)
{
    const char *name = node_name(live, path);
    char own[32];
    if (name)
        return name;
    snprintf(own, sizeof(own), "#block%u", ++live->unnamed);
    return add_node(live, own, path, NULL) < 0 ? "" : node_name(live, path);
}

/* ------------------------------------------------------------------ beginning */

static void free_strings(char **strings)
{
    for (size_t i = 0; strings && strings[i]; i++)
        free(strings[i]);
    free(strings);
}

static char **copy_strings(const char *const *from)
{
    size_t n = 0;
    while (from[n])
        n++;
    char **to = calloc(n + 1, sizeof(*to));
    for (size_t i = 0; to && i < n; i++)
        if (!(to[i] = strdup(from[i]))) {
            free_strings(to);
            return NULL;
        }
    return to;
}

int dr_live_new(const struct dr_live_options *options, struct dr_live **live, struct dr_error *err)
{
    DR_REQUIRE(options, err);
    DR_REQUIRE(live, err);
    *live = NULL;
    struct dr_live *fresh = calloc(1, sizeof(*fresh));
    if (!fresh)
        return dr_fail(err, ENOMEM, "out of memory for the control of disks");
    fresh->listener = fresh->bell = -1;
    fresh->quit = options->quit;
    fresh->resized = options->resized;
    fresh->write_back = options->write_back;
    fresh->failed = options->failed;
    fresh->failed_user = options->failed_user;
    fresh->user = options->user;
    fresh->served = options->exports;
    fresh->fs = dr_fs_posix();
    pthread_mutex_init(&fresh->lock, NULL);
    pthread_mutex_init(&fresh->state_lock, NULL);
    if (options->state)
        fresh->state = strdup(options->state);
    if (options->control)
        fresh->control = strdup(options->control);
    if (options->allow_paths)
        fresh->allow = copy_strings(options->allow_paths);
    if ((options->control && !fresh->control) || (options->state && !fresh->state) ||
        (options->allow_paths && !fresh->allow)) {
        dr_live_free(fresh);
        return dr_fail(err, ENOMEM, "out of memory for the control of disks");
    }
    *live = fresh;
    return 0;
}

void live_free_disk(struct live_disk *d)
{
    if (!d)
        return;
    free(d->name);
    free(d->path);
    free(d->format);
    free(d->first);
    dr_memory_bitmaps_free(d->bitmaps);
    free(d);
}

struct live_disk *live_make_disk(const char *name, struct dr_disk *disk)
{
    struct live_disk *d = calloc(1, sizeof(*d));
    const char *path = dr_image_path(disk, 0);
    if (!d)
        return NULL;
    *d = (struct live_disk){.disk = disk,
                            .name = strdup(name),
                            .path = path ? strdup(path) : NULL,
                            .format = strdup(dr_image_format(disk, 0)),
                            .size = dr_size(disk)};
    if (d->name && d->path && d->format)
        return d;
    live_free_disk(d);
    return NULL;
}

int dr_live_add(struct dr_live *live, const char *name, struct dr_disk *disk, struct dr_error *err)
{
    DR_REQUIRE(live, err);
    DR_REQUIRE(name, err);
    DR_REQUIRE(disk, err);
    if (!live_is_name(name))
        return dr_fail(err, EINVAL,
                       "Invalid name of a disk: '%s' (a letter, then letters, digits, '-', '.' and "
                       "'_', %d at most)",
                       name, LIVE_NAME_MAX);
    struct live_disk *d = live_make_disk(name, disk), **end = &live->disks;
    DR_LOCK_SCOPE(&live->lock);
    int r = d ? live_check_name(live, name, err) : dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (r == 0)
        r = add_node(live, name, d->path, err);
    if (r == 0)
        r = live_export_add(live, name, d, err);
    if (r < 0) {
        live_free_disk(d);
        return r;
    }
    while (*end)
        end = &(*end)->next;
    *end = d;
    return 0;
}

void live_tell_size(struct dr_live *live, struct live_disk *d)
{
    uint64_t size = dr_size(d->disk);
    pthread_mutex_lock(&live->lock);
    bool changed = d->size != size;
    d->size = size;
    pthread_mutex_unlock(&live->lock);
    if (changed && live->resized && !d->node)
        live->resized(live->user, d->name);
}

/* A request of the disk's guest has failed. */
static void on_failure(void *user, int error, bool waits, const char *text)
{
    const struct live_disk *d = user;
    DR_LOCK_SCOPE(&d->live->lock);
    live_event(d->live, "BLOCK_IO_ERROR",
               json_pack("{s:s, s:s, s:s, s:s, s:b, s:o}", "device", d->name, "node-name",
                         live_node_of(d->live, d->path), "operation", "write", "action",
                         waits ? "stop" : "report", "nospace",
                         strcmp(live_io_status(error), "nospace") == 0, "reason",
                         dr_json_text(text)));
}

int dr_live_add_stall(struct dr_live *live, const char *name, struct dr_stall *stall,
                      struct dr_error *err)
{
    DR_REQUIRE(live, err);
    DR_REQUIRE(name, err);
    DR_REQUIRE(stall, err);
    DR_LOCK_SCOPE(&live->lock);
    struct live_disk *d = live_find_disk(live, name);
    if (!d)
        return dr_fail(err, ENOENT, "there is no disk called '%s'", name);
    d->live = live;
    d->stall = stall;
    live_stall_listen(stall, on_failure, d);
    return 0;
}

int dr_live_start(struct dr_live *live, struct dr_error *err)
{
    DR_REQUIRE(live, err);
    int r = live_state_begin(live, err);
    return r == 0 && live->control && !live->started ? live_listen(live, err) : r;
}

void live_wake(struct dr_live *live)
{
    uint64_t one = 1;
    if (live->bell >= 0 && write(live->bell, &one, sizeof(one)) < 0)
        return; /* it is full: the thread will wake up anyway */
}

/* ------------------------------------------------------------------ the end */

static void close_disk(const struct dr_live *live, struct dr_disk *disk)
{
    struct dr_error err = DR_ERROR_INIT;
    if (dr_close(disk, &err) < 0 && live->failed)
        live->failed(live->failed_user, &err);
}

static void free_lists(struct dr_live *live)
{
    live_free_exports(live);
    for (struct live_disk *d = live->disks, *next; d; d = next) {
        next = d->next;
        if (d->stall)
            live_stall_listen(d->stall, NULL, NULL);
        dr_memory_bitmaps_free(DR_STEAL(d->bitmaps));
        if (d->node)
            close_disk(live, d->disk);
        live_free_disk(d);
    }
    for (struct live_node *n = live->nodes, *next; n; n = next) {
        next = n->next;
        live_free_node(n);
    }
    free_strings(live->allow);
    live_names_free(&live->emptied);
    live_names_free(&live->making);
    json_decref(live->other_disks);
    json_decref(live->other_jobs);
}

void dr_live_free(struct dr_live *live)
{
    if (!live)
        return;
    live_hang_up(live); /* nobody gives orders any more */
    live_jobs_end(live);
    free_lists(live);
    free(live->control);
    dr_file_unref(live->state_file);
    free(live->state);
    pthread_mutex_destroy(&live->state_lock);
    pthread_mutex_destroy(&live->lock);
    free(live);
}
