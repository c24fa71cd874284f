/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* QEMU's drivers that pass requests on to another one: throttle becomes a rate of the command,
 * copy-on-read what `io` does with -C. They are taken out of the options, so that what is below
 * them stands in their place. Drivers that would be something else are refused by name. */
#include <stdlib.h>
#include <string.h>

#include "cli/common/filters.h"

static const char *const kinds[] = {"total", "read", "write"};

/* ------------------------------------------------------------------ throttle groups */

struct limits {
    uint64_t bps[3]; /* in the order of kinds; 0 = none */
    bool iops;
};

/* bps-total, iops-read-max-length, ... behind x- or limits. */
static bool take_limit(struct limits *l, const char *key, uint64_t value)
{
    bool bps = strncmp(key, "bps-", 4) == 0, iops = strncmp(key, "iops-", 5) == 0;

    if (strcmp(key, "iops-size") == 0)
        return true;
    for (size_t i = 0; i < 3 && (bps || iops); i++) {
        const char *rest = key + (bps ? 4 : 5);
        size_t n = strlen(kinds[i]);
        if (strncmp(rest, kinds[i], n) != 0)
            continue;
        rest += n;
        if (!*rest && bps)
            l->bps[i] = value;
        l->iops = l->iops || (iops && !*rest && value);
        /* Without its bursts a rate is still kept. */
        return !*rest || strcmp(rest, "-max") == 0 || strcmp(rest, "-max-length") == 0;
    }
    return false;
}

static int take_pair(const struct cli *cli, const struct dr_pair *pair, struct limits *l)
{
    const char *name = pair->name;
    char *end;

    if (strcmp(name, "id") == 0)
        return 0;
    name += strncmp(name, "x-", 2) == 0 ? 2 : strncmp(name, "limits.", 7) == 0 ? 7 : 0;
    errno = 0;
    uint64_t value = strtoull(pair->value, &end, 10);
    if (name == pair->name || !take_limit(l, name, value)) {
        cli_error(cli, "Parameter '%s' is unexpected", pair->name);
        return -EINVAL;
    }
    if (pair->value[0] < '0' || pair->value[0] > '9' || *end || errno ||
        value > UINT64_C(1000000000000000)) {
        cli_error(cli, "bps/iops/max values must be within [0, 1000000000000000]");
        return -EINVAL;
    }
    return 0;
}

static int read_group(const struct cli *cli, const struct cli_pairs *group, struct limits *l)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < group->n; i++)
        r = take_pair(cli, &group->pairs[i], l);
    if (r == 0 && l->bps[0] && (l->bps[1] || l->bps[2])) {
        cli_error(cli, "bps/iops/max total values and read/write values cannot be used at the same "
                       "time");
        r = -EINVAL;
    }
    return r;
}

int cli_throttle_check(const struct cli *cli, const struct cli_pairs *group)
{
    struct limits l = {0};
    return read_group(cli, group, &l);
}

static void set_rate(uint64_t *rate, uint64_t limit)
{
    *rate = *rate == 0 || (limit && limit < *rate) ? limit : *rate;
}

static int throttle(const struct cli *cli, const struct cli_args *args, const char *id,
                    struct cli_image *image)
{
    const char *text;

    for (size_t i = 0; (text = cli_nth_value(args, KEY_OBJECT, i)); i++) {
        CLEANUP_PAIRS struct cli_pairs group = {0};
        struct limits l = {0};
        if (strncmp(text, "throttle-group,", 15) != 0)
            continue;
        if (cli_pairs_add(&group, text + 15) < 0)
            return -ENOMEM;
        const char *own = cli_pairs_find(&group, "id");
        if (!own || strcmp(own, id) != 0)
            continue;
        if (read_group(cli, &group, &l) < 0)
            return -EINVAL;
        image->limits_requests = image->limits_requests || l.iops;
        set_rate(&image->read_rate, l.bps[0] ? l.bps[0] : l.bps[1]);
        set_rate(&image->write_rate, l.bps[0] ? l.bps[0] : l.bps[2]);
        return 0;
    }
    cli_error(cli, "Throttle group '%s' does not exist", id);
    return -EINVAL;
}

int cli_image_take_rate(const struct cli *cli, const struct cli_image_spec *spec,
                        const struct cli_image *image)
{
    uint64_t limit = spec->flags & DR_OPEN_RDWR ? image->write_rate : image->read_rate;

    if (spec->no_data || (!limit && !image->limits_requests))
        return 0;
    if (image->limits_requests) {
        cli_error(cli,
                  "Could not open '%s': its throttle group limits requests a second; here only "
                  "bytes are (bps-total, bps-read, bps-write)",
                  spec->name);
        return -EINVAL;
    }
    if (!spec->rate) {
        cli_error(cli,
                  "Could not open '%s': this command does not obey a throttle group; convert, "
                  "dd, compare and checksum do",
                  spec->name);
        return -EINVAL;
    }
    set_rate(spec->rate, limit);
    return 0;
}

int cli_refuse_copy_on_read(const struct cli *cli, const struct cli_image *image)
{
    if (!image->copy_on_read)
        return 0;
    cli_error(cli, "Could not open '%s': what is read is copied by `io` only (copy-on-read)",
              image->given);
    return -EINVAL;
}

/* ------------------------------------------------------------------ taking filters out */

static char *take_at(struct cli_pairs *list, const char *prefix, const char *key)
{
    char name[128];

    snprintf(name, sizeof(name), "%s%s", prefix, key);
    return cli_pairs_take(list, name);
}

/* PREFIXfile.KEY becomes PREFIXKEY. What was said of the filter holds where its file says nothing.
 */
static int lift(struct cli_pairs *list, const char *prefix)
{
    size_t n = strlen(prefix);
    int r = 0;

    for (size_t i = 0; r == 0 && i < list->n;) {
        const char *name = list->pairs[i].name;
        if (strncmp(name, prefix, n) != 0 || strncmp(name + n, "file.", 5) != 0) {
            i++;
            continue;
        }
        /* Level by level: what is deeper comes up with it, and is looked at again from there. */
        CLEANUP_FREE char *whole = strdup(name), *lifted = NULL;
        CLEANUP_FREE char *value = whole ? cli_pairs_take(list, whole) : NULL;
        if (!value || asprintf(&lifted, "%s\x01%s", prefix, whole + n + 5) < 0) {
            lifted = NULL;
            return -ENOMEM;
        }
        r = cli_pairs_set(list, lifted, value);
        i = 0;
    }
    return r;
}

/* The marks of lift() go: names have their final form. */
static int settle(struct cli_pairs *list)
{
    for (size_t i = 0; i < list->n;) {
        const char *mark = strchr(list->pairs[i].name, '\x01');
        if (!mark) {
            i++;
            continue;
        }
        CLEANUP_FREE char *whole = strdup(list->pairs[i].name), *name = NULL;
        CLEANUP_FREE char *value = whole ? cli_pairs_take(list, whole) : NULL;
        if (!value || asprintf(&name, "%.*s%s", (int)(strchr(whole, '\x01') - whole), whole,
                               strchr(whole, '\x01') + 1) < 0) {
            name = NULL;
            return -ENOMEM;
        }
        if (cli_pairs_set(list, name, value) < 0)
            return -ENOMEM;
        i = 0;
    }
    return 0;
}

/* 1: there was one. */
static int take_filter(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list,
                       const char *prefix, struct cli_image *image)
{
    char key[128];
    int r = 0;

    snprintf(key, sizeof(key), "%sdriver", prefix);
    const char *driver = cli_pairs_find(list, key);
    bool slow = driver && strcmp(driver, "throttle") == 0;
    if (!slow && (!driver || strcmp(driver, "copy-on-read") != 0))
        return 0;
    free(cli_pairs_take(list, key));
    CLEANUP_FREE char *group = slow ? take_at(list, prefix, "throttle-group") : NULL;
    if (slow && !group) {
        cli_error(cli, "Please specify a throttle group");
        return -EINVAL;
    }
    if (slow)
        r = throttle(cli, args, group, image);
    else
        image->copy_on_read = image->copy_on_read || !*prefix; /* a file has nothing below it */
    if (r == 0)
        r = lift(list, prefix);
    if (r == 0)
        r = settle(list);
    return r < 0 ? r : 1;
}

int cli_filters_take(const struct cli *cli, const struct cli_args *args, struct cli_pairs *list,
                     struct cli_image *image)
{
    static const char *const prefixes[] = {"", "file.", "file.file."};
    int r = 0;

    for (size_t i = 0; r >= 0 && i < sizeof(prefixes) / sizeof(prefixes[0]); i++)
        while ((r = take_filter(cli, args, list, prefixes[i], image)) > 0)
            ;
    return r;
}

/* ------------------------------------------------------------------ drivers that are not here */

const char *cli_driver_is_for(const char *driver)
{
    static const struct {
        const char *name, *is_for;
    } all[] = {
        {"blkdebug", "makes requests fail, to test QEMU itself"},
        {"blklogwrites", "records what is written, to test file systems"},
        {"blkreplay", "replays a machine's requests"},
        {"blkverify", "compares two disks while a machine runs; `compare` does without one"},
        {"compress", "compresses what is written; `convert -c` does"},
        {"copy-before-write", "belongs to QEMU's backups; `serve` and `backup` make them"},
        {"copy-on-read", "copies into the topmost image only, so it stands outermost"},
        {"preallocate", "reserves space behind the end of a file; `preallocation=` does"},
        {"quorum", "lets several disks vote"},
        {"replication", "belongs to two machines that follow each other"},
        {"throttle", "limits the disk or its file, and none of its parents"},
    };

    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        if (strcmp(driver, all[i].name) == 0)
            return all[i].is_for;
    return NULL;
}
