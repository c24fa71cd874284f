/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* extract, as the tool called vma does it. The order of its steps is what those who drive it rely
 * on: configuration files on disk, then the listing, then the map is read. */
#include <inttypes.h>
#include <string.h>

#include "cli/vma/place.h"

/* How much larger a target may be than the disk in the archive: storages round up. */
#define TARGET_SLACK (4u << 20)

struct restore {
    const struct cli *cli;
    const struct vma_restore *o;
    struct dr_vma *vma;
    const struct dr_vma_header *header;
    struct vma_map map;
    struct vma_place place;
    struct vma_targets targets;
};

static void restore_free(struct restore *r)
{
    vma_targets_cleanup(&r->targets);
    vma_place_end(&r->place);
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

/* ------------------------------------------------------------------ configuration files */

static int write_configs(struct restore *r)
{
    for (size_t i = 0; i < r->header->n_configs; i++) {
        const struct dr_vma_config *c = &r->header->configs[i];
        if (vma_config_comes_again(r->header, i))
            cli_error(r->cli, "warning: %s: holds '%s' more than once, the last one counts",
                      vma_shown(r->o->archive), c->name);
        else if (vma_place_write(&r->place, c->name, c->name, c->data, c->len) < 0)
            return -1;
    }
    return vma_place_sync(&r->place);
}

/* ------------------------------------------------------------------ targets */

static int make_file(struct restore *r, const struct dr_vma_disk *d)
{
    static const struct vma_form raw = {.format = "raw"};
    CLEANUP_FREE char *made = NULL, *name = NULL, *path = NULL;
    struct dr_error err = DR_ERROR_INIT;
    int n = d->vmstate ? asprintf(&made, "tmp-vmstate.bin")
                       : asprintf(&made, "tmp-disk-%s.raw", d->name);

    if (n < 0 || asprintf(&name, "%s", made + strlen("tmp-")) < 0)
        return -1;
    path = vma_place_path(&r->place, made);
    if (!path || vma_place_add(&r->place, made, name) < 0)
        return -1;
    if (!d->vmstate && !r->o->fifo)
        printf("DEVINFO %s %" PRIu64 "\n", path, d->size);
    fflush(stdout);
    if (vma_targets_create(&r->targets, d->id, d->size, path, &raw, &err) == 0)
        return 0;
    cli_error(r->cli, "restore failed - %s", err.text);
    return -1;
}

static const char *target_format(const struct vma_map_line *l)
{
    size_t n = strlen(l->path);

    if (l->format)
        return l->format;
    /* What is known to have no metadata must not be taken for what a guest wrote into it. */
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

    /* What was found out from content may be what a guest wrote: it does not lead anywhere. */
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
    if (!r->o->fifo || d->vmstate)
        return make_file(r, d);
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
        if (is_wanted(r, d) && add_target(r, d) < 0)
            return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ the whole */

static int extract(struct restore *r)
{
    const struct dr_vma_extract_options o = {.targets = r->targets.list, .n_targets = r->targets.n};
    struct dr_vma_extract_result result = {0};
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_REPORT struct vma_report report = {0};

    vma_report_begin(r->cli, &report, r->o->verbose);
    int e = dr_vma_extract(r->vma, &o, report.job.job, &result, &err);
    if (e == -ECANCELED && cli_signalled())
        return cli_job_failed(&report.job, e, &err, 1, "nothing was restored completely");
    if (e < 0) {
        cli_error(r->cli, "restore failed - %s", err.text);
        return 1;
    }
    if (vma_targets_close(&r->targets) < 0 || vma_place_publish(&r->place) < 0)
        return 1;
    if (r->o->verbose)
        vma_report_totals(&result);
    return 0;
}

static int get_map(struct restore *r)
{
    if (vma_print_listing(r->cli, r->o->archive, r->header) < 0)
        return -1;
    return vma_map_read(r->cli, r->o->fifo, &r->map);
}

int vma_restore(const struct cli *cli, const struct vma_restore *o)
{
    __attribute__((cleanup(restore_free))) struct restore r = {
        .cli = cli, .o = o, .place = {.cli = cli}, .targets = {.cli = cli}};

    if (vma_open(cli, o->archive, false, &r.vma) < 0)
        return 1;
    r.header = dr_vma_header(r.vma);
    if (check_disks(&r) < 0)
        return 1;
    cli_catch_signals();
    if (vma_place_begin_new(&r.place, o->dir) < 0 || write_configs(&r) < 0)
        return 1;
    if ((o->fifo && get_map(&r) < 0) || add_targets(&r) < 0)
        return cli_signalled() ? cli_signalled() : 1;
    return extract(&r);
}
