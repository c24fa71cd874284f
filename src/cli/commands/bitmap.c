/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps of an image: several changes of one bitmap in one call, in the order given. A failure
 * ends it; what was done before stays done. */
#include <errno.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/progress.h"

static const struct cli_option options[] = {
    {KEY_ADD, "add", NULL, "make BITMAP, enabled and with nothing set", false},
    {KEY_REMOVE, "remove", NULL, "remove BITMAP, also an inconsistent one", false},
    {KEY_CLEAR, "clear", NULL, "nothing is set in BITMAP any more", false},
    {KEY_ENABLE, "enable", NULL, "from now on writes are noted in BITMAP", false},
    {KEY_DISABLE, "disable", NULL, "from now on writes are not noted in BITMAP", false},
    {KEY_MERGE, "merge", "SOURCE", "set in BITMAP, too, what is set in SOURCE", false},
    {KEY_REBUILD, "rebuild", NULL, "set in BITMAP what differs from a backup, and trust it again",
     false},
    {KEY_AGAINST, "against", "BACKUP", "--rebuild: the backup that BITMAP begins at", false},
    {'g', "granularity", "SIZE", "--add: bytes that a bit stands for, a power of 2 from 512 to 2G",
     false},
    {'b', "source-file", "FILE", "--merge: SOURCE is a bitmap of this image", false},
    {'F', "source-format", "FMT", "format of that image, or of the backup", false},
    {0, NULL, NULL, NULL, false},
};

static const struct action {
    int key;
    enum dr_bitmap_action action;
    const char *name;
} actions[] = {
    {KEY_ADD, DR_BITMAP_ADD, "add"},
    {KEY_REMOVE, DR_BITMAP_REMOVE, "remove"},
    {KEY_CLEAR, DR_BITMAP_CLEAR, "clear"},
    {KEY_ENABLE, DR_BITMAP_ENABLE, "enable"},
    {KEY_DISABLE, DR_BITMAP_DISABLE, "disable"},
    {KEY_MERGE, DR_BITMAP_MERGE, "merge"},
};
#define N_ACTIONS (sizeof(actions) / sizeof(actions[0]))

static const struct action *find_action(int key)
{
    for (size_t i = 0; i < N_ACTIONS; i++)
        if (actions[i].key == key)
            return &actions[i];
    return NULL;
}

static int check_use(const struct cli *cli, const struct cli_args *args)
{
    const char *wrong = NULL;
    bool any = false;

    for (size_t i = 0; i < args->n_hits; i++)
        any |= find_action(args->hits[i].key) != NULL;
    if (any && cli_has(args, KEY_REBUILD))
        wrong = "--rebuild cannot go with other actions";
    else if (cli_has(args, KEY_REBUILD) != cli_has(args, KEY_AGAINST))
        wrong = "--rebuild needs --against BACKUP, and --against goes with --rebuild only";
    else if (!any && !cli_has(args, KEY_REBUILD))
        wrong = "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge";
    else if (args->n_operands != 2)
        wrong = "Expecting filename and bitmap name";
    else if (cli_has(args, 'g') && !cli_has(args, KEY_ADD))
        wrong = "granularity only supported with --add";
    else if (cli_has(args, 'F') && !cli_has(args, 'b') && !cli_has(args, KEY_AGAINST))
        wrong = "-F only supported with -b";
    else if (cli_has(args, 'b') && !cli_has(args, KEY_MERGE))
        wrong = "Merge bitmap source file only supported with --merge";
    if (wrong)
        cli_error(cli, "%s", wrong);
    return wrong != NULL;
}

/* To qemu-img's words belongs a hint. */
static void fail(const struct cli *cli, const struct action *a, const char *bitmap,
                 const struct dr_error *err)
{
    cli_error(cli, "Operation %s on bitmap %s failed: %s", a->name, bitmap, err->text);
    if (err->errnum == EUCLEAN && cli->role == CLI_QEMU_IMG)
        fprintf(stderr, "Try block-dirty-bitmap-remove to delete this bitmap from disk\n");
    else if (err->errnum == EUCLEAN)
        cli_error(cli, "`drover bitmap --remove` removes an inconsistent one");
}

static int change(const struct cli *cli, const struct cli_args *args, struct dr_disk *disk,
                  struct dr_disk *source, uint64_t granularity)
{
    for (size_t i = 0; i < args->n_hits; i++) {
        const struct action *a = find_action(args->hits[i].key);
        const struct dr_bitmap_options o = {
            .granularity = granularity,
            .inside = cli->role == CLI_QEMU_IMG, /* qemu-img knows no others */
            .source = a && a->key == KEY_MERGE ? args->hits[i].arg : NULL,
            .source_disk = source,
        };
        struct dr_error err = DR_ERROR_INIT;
        if (a && dr_disk_bitmap_change(disk, args->operands[1], a->action, &o, &err) < 0) {
            fail(cli, a, args->operands[1], &err);
            return 1;
        }
    }
    return 0;
}

struct rebuild {
    struct dr_disk *disk, *against;
    const char *bitmap;
};

static int rebuild(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct rebuild *rb = user;

    return dr_disk_bitmap_rebuild(rb->disk, rb->bitmap, rb->against, job, err);
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0}, source_image = {0};
    CLEANUP_DISK struct dr_disk *source = NULL;
    struct dr_disk *disk = NULL;
    struct dr_error err = DR_ERROR_INIT;
    uint64_t granularity = 0;
    int wrong = check_use(cli, args);
    bool rebuilds = cli_has(args, KEY_REBUILD);
    const char *other = cli_value(args, rebuilds ? KEY_AGAINST : 'b');
    unsigned alone = rebuilds ? 0 : DR_OPEN_NO_BACKING; /* what is compared has parents */

    if (wrong)
        return wrong;
    if (cli_has(args, 'g') &&
        cli_get_size(cli, "granularity", cli_value(args, 'g'), &granularity) < 0)
        return 1;
    const struct cli_image_spec spec = {.name = args->operands[0],
                                        .format_key = 'f',
                                        .no_data = true,
                                        .flags = DR_OPEN_RDWR | alone};
    const struct cli_image_spec source_spec = {
        .name = other, .format_key = 'F', .no_image_opts = true, .no_data = true, .flags = alone};
    if (cli_image_get(cli, args, &spec, &image) != 0)
        return 1;
    if (other && cli_image_get(cli, args, &source_spec, &source_image) != 0)
        return 1;
    if (!rebuilds)
        cli_catch_signals(); /* each change is finished once it has begun */
    if (cli_image_open(cli, &image, &disk) < 0)
        return 1;
    int code = other && cli_image_open(cli, &source_image, &source) < 0;
    struct rebuild rb = {disk, source, args->operands[1]};
    if (code == 0 && rebuilds)
        code = cli_job_run(cli, args, rebuild, &rb);
    else if (code == 0)
        code = change(cli, args, disk, source, granularity);
    if (dr_close(disk, &err) < 0 && code == 0) {
        cli_fail(cli, &err);
        return 1;
    }
    return code;
}

static const struct cli_option *const sets[] = {options, cli_opts_image, cli_opts_common, NULL};

const struct cli_command cli_cmd_bitmap = {
    .name = "bitmap",
    .operands = "FILE BITMAP",
    .brief = "Change the bitmaps of an image that note what is written",
    .about =
        "Each of --add, --remove, --clear, --enable, --disable and --merge may be given\n"
        "several times; they are done in this order, each as a whole or not at all. `info`\n"
        "lists the bitmaps. They are for incremental backups. qcow2 images have them inside, for\n"
        "others they are in a file beside the image, FILE.drover-bitmaps.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
