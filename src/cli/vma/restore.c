/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* extract, as the tool called vma does it. The order of its steps is what those who drive it rely
 * on: configuration files on disk, then the listing, then the map is read. */
#include <inttypes.h>
#include <string.h>

#include "cli/vma/vma.h"

/* How much larger a target may be than the disk in the archive: storages round up. */
#define TARGET_SLACK (4u << 20)

struct restore {
    const struct cli *cli;
    const struct vma_restore *o;
    struct dr_vma *vma;
    const struct dr_vma_header *header;
    struct vma_map map;
    struct vma_targets targets; /* disks of the map */
    struct dr_vma_new_disk disks[256];
    char *files[256]; /* their names */
    struct dr_vma_files_options to;
    bool told; /* why the call was ended by us */
};

static void restore_free(struct restore *r)
{
    vma_targets_cleanup(&r->targets);
    for (size_t i = 0; i < r->to.n_disks; i++)
        free(r->files[i]);
    vma_map_free(&r->map);
    dr_vma_close(r->vma);
}

/* ------------------------------------------------------------------ which disks */

static bool in_list(const char *list, const char *name)
{
    size_t n = strlen(name);

    while (*list) {
        size_t len = strcspn(list, ",");
        if (len == n && memcmp(list, name, n) == 0)
            return true;
        list += len + (list[len] == ',');
    }
    return false;
}

static bool is_wanted(const struct restore *r, const struct dr_vma_disk *d)
{
    return !r->o->disks || in_list(r->o->disks, d->name);
}

static int refuse_name(const struct restore *r, const char *what, const char *name, const char *why)
{
    CLEANUP_FREE char *escaped = vma_escape(name);

    cli_error(r->cli, "restore failed - %s: the %s name '%s' %s", vma_shown(r->o->archive), what,
              escaped ? escaped : "?", why);
    return -1;
}

static int check_disks(const struct restore *r)
{
    const struct dr_vma_header *h = r->header;

    for (size_t i = 0; i < h->n_disks; i++) {
        for (size_t k = 0; k < i; k++) {
            if (strcmp(h->disks[i].name, h->disks[k].name) == 0)
                return refuse_name(r, "device", h->disks[i].name, "is there twice");
        }
        if (!r->o->fifo && is_wanted(r, &h->disks[i]) && !vma_is_file_name(h->disks[i].name))
            return refuse_name(r, "device", h->disks[i].name, "cannot be part of a file's name");
    }
    for (size_t i = 0; i < h->n_configs; i++) {
        if (!vma_is_file_name(h->configs[i].name))
            return refuse_name(r, "configuration file's", h->configs[i].name,
                               "cannot be a file's name");
    }
    return 0;
}

/* ------------------------------------------------------------------ files */

static size_t name_configs(const struct restore *r, struct dr_vma_new_config *configs)
{
    size_t n = 0;

    for (size_t i = 0; i < r->header->n_configs; i++) {
        const char *name = r->header->configs[i].name;
        if (vma_config_comes_again(r->header, i))
            cli_error(r->cli, "warning: %s: holds '%s' more than once, the last one counts",
                      vma_shown(r->o->archive), name);
        else
            configs[n++] = (struct dr_vma_new_config){.index = i, .file = name};
    }
    return n;
}

/* With a map only the state of the machine becomes a file. */
static int name_disks(struct restore *r)
{
    for (size_t i = 0; i < r->header->n_disks; i++) {
        const struct dr_vma_disk *d = &r->header->disks[i];
        char *file;
        if (!is_wanted(r, d) || (r->o->fifo && !d->vmstate))
            continue;
        int n = d->vmstate ? asprintf(&file, "vmstate.bin")
                           : asprintf(&file, "disk-%s.raw", d->name);
        if (n < 0) {
            cli_error(r->cli, "out of memory");
            return -1;
        }
        r->files[r->to.n_disks] = file;
        r->disks[r->to.n_disks++] = (struct dr_vma_new_disk){.id = d->id, .file = file};
    }
    r->to.disks = r->disks;
    return 0;
}

static void print_files(const struct restore *r)
{
    for (size_t i = 0; i < r->to.n_disks; i++) {
        const struct dr_vma_disk *d = vma_find_id(r->header, r->disks[i].id);
        if (!d->vmstate)
            printf("DEVINFO %s/tmp-%s %" PRIu64 "\n", r->o->dir, r->files[i], d->size);
    }
    fflush(stdout);
}

/* ------------------------------------------------------------------ disks of the map */

static const char *target_format(const struct vma_map_line *l)
{
    size_t n = strlen(l->path);

    if (l->format)
        return l->format;
    /* These have no metadata: a header in one of them was written by a guest. */
    bool raw = strncmp(l->path, "/dev/", 5) == 0 || (n > 4 && strcmp(l->path + n - 4, ".raw") == 0);
    return raw ? "raw" : NULL;
}

static int check_size(const struct restore *r, const struct dr_vma_disk *d)
{
    uint64_t size = dr_size(r->targets.list[r->targets.n - 1].disk);

    if (size >= d->size && size - d->size <= TARGET_SLACK)
        return 0;
    cli_error(r->cli,
              "vma_reader_register_bs for stream %s failed - unexpected size %" PRIu64
              " != %" PRIu64,
              d->name, size, d->size);
    return -1;
}

static int open_mapped(struct restore *r, const struct dr_vma_disk *d, const struct vma_map_line *l)
{
    struct dr_open_options open = {.format = target_format(l), .flags = DR_OPEN_RDWR};
    struct dr_error err = DR_ERROR_INIT;

    /* A format that was found out by content may come from a guest: follow no names in it. */
    if (open.format)
        open.flags |= DR_OPEN_ANY_PATH;

    if (l->cache && cli_cache_flags(l->cache, &open.flags, NULL) < 0) {
        cli_error(r->cli, "invalid cache option: %s", l->cache);
        return -1;
    }
    if (vma_targets_open(&r->targets, d->id, l->path, &open, !l->write_zeros, &err) < 0) {
        char text[sizeof(err.text)];
        cli_open_reason(r->cli, l->path, &err, text, sizeof(text));
        cli_error(r->cli, "can't open file %s - %s", l->path, text);
        return -1;
    }
    struct dr_vma_target *t = &r->targets.list[r->targets.n - 1];
    t->rate = l->bps;
    t->rate_group = l->group;
    return check_size(r, d);
}

static int add_target(struct restore *r, const struct dr_vma_disk *d)
{
    const struct vma_map_line *l = vma_map_find(&r->map, d->name);

    if (!l) {
        cli_error(r->cli, "no device name mapping for %s", d->name);
        return -1;
    }
    return l->skip ? 0 : open_mapped(r, d, l);
}

static int add_targets(struct restore *r)
{
    for (size_t i = 0; i < r->header->n_disks; i++) {
        const struct dr_vma_disk *d = &r->header->disks[i];
        if (is_wanted(r, d) && !d->vmstate && add_target(r, d) < 0)
            return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ the whole */

/* The configuration files are in the directory. */
static int on_ready(void *user)
{
    struct restore *r = user;
    int code = 0;

    if (!r->o->fifo)
        print_files(r);
    else if (vma_print_listing(r->cli, r->o->archive, r->header) < 0 ||
             vma_map_read(r->cli, r->o->fifo, &r->map) < 0 || add_targets(r) < 0)
        code = -1;
    r->to.read.targets = r->targets.list;
    r->to.read.n_targets = r->targets.n;
    r->told = code < 0;
    return code;
}

static int extract(struct restore *r)
{
    struct dr_vma_files_result result;
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_REPORT struct vma_report report = {0};

    vma_report_begin(r->cli, &report, r->o->verbose);
    int e = dr_vma_extract_files(r->vma, &r->to, report.job.job, &result, &err);
    if (r->told)
        return cli_signalled() ? cli_signalled() : 1;
    if (e == -ECANCELED && cli_signalled())
        return cli_job_failed(&report.job, e, &err, 1, "nothing was restored completely");
    if (e < 0) {
        cli_error(r->cli, "restore failed - %s", err.text);
        return 1;
    }
    if (vma_targets_close(&r->targets) < 0)
        return 1;
    if (r->o->verbose)
        vma_report_totals(&result.read);
    return 0;
}

int vma_restore(const struct cli *cli, const struct vma_restore *o)
{
    struct dr_vma_new_config configs[256];
    __attribute__((cleanup(restore_free))) struct restore r = {
        .cli = cli, .o = o, .targets = {.cli = cli}};

    if (vma_open(cli, o->archive, false, &r.vma) < 0)
        return 1;
    r.header = dr_vma_header(r.vma);
    if (check_disks(&r) < 0 || name_disks(&r) < 0)
        return 1;
    r.to.dir = o->dir;
    r.to.in_sight = true;
    r.to.configs = configs;
    r.to.n_configs = name_configs(&r, configs);
    r.to.ready = on_ready;
    r.to.user = &r;
    cli_catch_signals();
    return extract(&r);
}
