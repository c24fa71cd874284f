/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"

static const struct cli_option options[] = {
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {'s', "start-offset", "OFFSET", "begin there", false},
    {'l', "max-length", "LENGTH", "tell about so many bytes", false},
    {0, NULL, NULL, NULL, false},
};

struct map {
    const struct cli *cli;
    struct dr_disk *disk;
    bool json;
    bool first;                    /* nothing was printed yet */
    struct dr_extent_status entry; /* len 0 = none yet */
};

static const char *word(bool yes)
{
    return yes ? "true" : "false";
}

static int print_human(struct map *m)
{
    const struct dr_extent_status *e = &m->entry;

    if (!(e->flags & DR_EXTENT_DATA) || (e->flags & DR_EXTENT_ZERO))
        return 0;
    if (!(e->flags & DR_EXTENT_OFFSET)) {
        cli_error(m->cli, "File contains external, encrypted or compressed clusters.");
        return -EINVAL;
    }
    printf("%#-16" PRIx64 "%#-16" PRIx64 "%#-16" PRIx64, e->off, e->len, e->host_off);
    cli_put(e->file);
    printf("\n");
    return 0;
}

static void print_json(struct map *m)
{
    const struct dr_extent_status *e = &m->entry;

    printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64
           ", \"depth\": %u, \"present\": %s, \"zero\": %s, \"data\": %s",
           m->first ? "" : ",\n", e->off, e->len, e->depth, word(e->flags & DR_EXTENT_ALLOCATED),
           word(e->flags & DR_EXTENT_ZERO), word(e->flags & DR_EXTENT_DATA));
    if (e->flags & DR_EXTENT_OFFSET)
        printf(", \"offset\": %" PRIu64, e->host_off);
    printf("}");
    m->first = false;
}

static int print_entry(struct map *m)
{
    if (m->entry.len == 0)
        return 0;
    if (!m->json)
        return print_human(m);
    print_json(m);
    return 0;
}

/* The library may cut an extent in pieces; readers want the whole. */
static bool continues(const struct dr_extent_status *e, const struct dr_extent_status *next)
{
    if (e->len == 0 || e->flags != next->flags || e->depth != next->depth)
        return false;
    if (!(e->flags & DR_EXTENT_OFFSET))
        return true;
    return e->host_off + e->len == next->host_off && strcmp(e->file, next->file) == 0;
}

static int walk(struct map *m, uint64_t off, uint64_t end)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = 0;

    while (r == 0 && off < end && !ferror(stdout)) {
        struct dr_extent_status next;
        r = dr_block_status(m->disk, off, end - off, &next, &err);
        if (r < 0) {
            cli_error(m->cli, "Failed to read image metadata: %s", err.text);
            return r;
        }
        off += next.len;
        if (continues(&m->entry, &next)) {
            m->entry.len += next.len;
            continue;
        }
        r = print_entry(m);
        m->entry = next;
    }
    return r == 0 ? print_entry(m) : r;
}

static int get_range(const struct cli *cli, const struct cli_args *args, uint64_t *start,
                     uint64_t *length)
{
    const char *text = cli_value(args, 's');

    if (text && cli_get_size(cli, "start offset", text, start) < 0)
        return 1;
    text = cli_value(args, 'l');
    if (text && cli_get_size(cli, "max length", text, length) < 0)
        return 1;
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct map m = {.cli = cli, .first = true};
    uint64_t start = 0, length = UINT64_MAX;

    if (cli_output_json(cli, args, &m.json) != 0 || get_range(cli, args, &start, &length) != 0)
        return 1;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    const struct cli_image_spec spec = {
        .name = args->operands[0], .format_key = 'f', .no_data = true};
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, &disk) < 0)
        return 1;
    m.disk = disk;
    uint64_t end = dr_size(disk), asked = start;
    start = dr_min(start, end);
    end = start + dr_min(length, end - start);
    printf("%s", m.json ? "[" : "Offset          Length          Mapped to       File\n");
    int r = walk(&m, start, end);
    if (m.json && r == 0 && start == end) { /* readers expect one entry at least */
        m.entry = (struct dr_extent_status){.off = asked};
        print_json(&m);
    }
    if (m.json)
        printf("]\n");
    return r < 0;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_share,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_map = {
    .name = "map",
    .operands = "FILE",
    .brief = "Show where the bytes of a disk live, through all its parents",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
