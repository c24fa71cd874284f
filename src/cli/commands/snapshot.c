/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"
#include "cli/common/snapshot-text.h"
#include "drover/chain.h"

static const struct cli_option options[] = {
    {'c', "create", NULL, "make a child of FILE; it is the new active disk (named NAME)", false},
    {'l', "list", NULL, "show FILE's family, or those of a directory, as trees", false},
    {KEY_OUTPUT, "output", "human|json", "how to print the tree", false},
    {KEY_ASCII, "ascii", NULL, "draw the tree with plain characters", false},
    {'i', "internal", NULL, "-c, -l: of the snapshots inside FILE, where its format has such",
     false},
    {'a', "apply", "NAME", "go back to a snapshot", false},
    {'d', "delete", "NAME", "delete a snapshot", false},
    {KEY_FINGERPRINT, "fingerprint", NULL, "-c: record what the parent is, beside the child",
     false},
    {KEY_EXTERNAL, "external", NULL, "-a, -d: NAME is an image, not a snapshot inside FILE", false},
    {KEY_UP, "up", NULL, "-d: merge it into the images that stand on it", false},
    {KEY_DOWN, "down", NULL, "-d: merge it into its parent", false},
    {KEY_UPDATE_VMSD, "update-vmsd", NULL, "change the machine's .vmsd, too", false},
    {KEY_DRY_RUN, "dry-run", NULL, "-a, -d of images: only tell what would be done", false},
    {0, NULL, NULL, NULL, false},
};

/* qemu-img knows the snapshots inside an image only. */
static const struct cli_option qemu_options[] = {
    {'l', NULL, NULL, "list the internal snapshots", false},
    {'c', NULL, "NAME", "make an internal snapshot", false},
    {'a', NULL, "NAME", "go back to an internal snapshot", false},
    {'d', NULL, "NAME", "delete an internal snapshot", false},
    {0, NULL, NULL, NULL, false},
};

static int create(const struct cli *cli, const struct cli_args *args, const struct cli_image *image,
                  const char *name)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE char *active = NULL;

    const struct dr_snapshot_options what = {.open = image->open,
                                             .update_vmsd = cli_has(args, KEY_UPDATE_VMSD)};
    if (dr_snapshot_take(image->path, name, &what, &active, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    if (cli_has(args, KEY_FINGERPRINT)) {
        const struct dr_fingerprint_options o = {.open.allow_paths = image->open.allow_paths,
                                                 .open.flags = image->open.flags};
        if (dr_fingerprint(active, &o, NULL, &err) < 0) {
            cli_fail(cli, &err);
            return 1;
        }
    }
    if (!cli_has(args, 'q'))
        printf("%s\n", active);
    return 0;
}

/* ------------------------------------------------------------------ inside an image */

static int list_inside(const struct cli *cli, const struct cli_args *args, struct dr_disk *disk,
                       const struct cli_image *image)
{
    CLEANUP_JSON json_t *info = NULL;
    CLEANUP_FREE char *text = NULL;
    struct dr_error err = DR_ERROR_INIT;
    bool json = false;

    if (cli->role == CLI_DROVER && cli_output_json(cli, args, &json) != 0)
        return 1;
    if (dr_disk_info(disk, &image->open, false, &text, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    info = cli_json_load(cli, text);
    if (!info)
        return 1;
    if (json) {
        CLEANUP_JSON json_t *none = json_array();
        json_t *all = json_object_get(info, "snapshots");
        cli_dump_json(all ? all : none);
    } else {
        cli_print_snapshots(info);
    }
    return 0;
}

static bool exists_by_name(struct dr_disk *disk, const char *name)
{
    struct dr_internal_snapshot *list;
    size_t n;
    bool found = false;

    if (dr_disk_internal_snapshots(disk, &list, &n, NULL) < 0)
        return false;
    for (size_t i = 0; i < n; i++)
        found |= strcmp(list[i].name, name) == 0;
    dr_internal_snapshots_free(list, n);
    return found;
}

/* What went wrong with 'c', 'a' or 'd', in qemu-img's words. */
static void fail_as_qemu(const struct cli *cli, int action, const char *name, int r)
{
    if (action == 'c')
        cli_error(cli, "Could not create snapshot '%s': %d (%s)", name, r, strerror(-r));
    else if (action == 'a' && r == -ENOTSUP)
        cli_error(cli, "Could not apply snapshot '%s': Block driver does not support snapshots",
                  name);
    else if (action == 'a')
        cli_error(cli, "Could not apply snapshot '%s': Failed to load snapshot: %s", name,
                  strerror(-r));
    else if (r == -ENOENT)
        cli_error(cli, "Could not delete snapshot '%s': snapshot not found", name);
    else
        cli_error(cli, "Could not delete snapshot '%s': Failed to remove snapshot: %s", name,
                  strerror(-r));
}

static int change_inside(const struct cli *cli, struct dr_disk *disk, int action, const char *name)
{
    struct dr_error err = DR_ERROR_INIT;
    bool qemu = cli->role == CLI_QEMU_IMG;
    int r;

    if (action == 'c')
        r = dr_disk_internal_snapshot_create(disk, name, NULL, &err);
    else if (action == 'a')
        r = dr_disk_internal_snapshot_apply(disk, name, NULL, &err);
    else if (qemu && !exists_by_name(disk, name)) /* it takes no ids here */
        r = -ENOENT;
    else
        r = dr_disk_internal_snapshot_delete(disk, name, NULL, &err);
    if (r < 0 && qemu)
        fail_as_qemu(cli, action, name, r);
    else if (r < 0)
        cli_fail(cli, &err);
    return r < 0;
}

/* action: 'l', 'c', 'a', 'd'; 0: nothing but to see whether file is an image. */
static int run_inside(const struct cli *cli, const struct cli_args *args, const char *file,
                      int action, const char *name)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_DISK struct dr_disk *disk = NULL;
    bool changes = action && action != 'l';
    const struct cli_image_spec spec = {
        .name = file,
        .format_key = cli->role == CLI_DROVER ? 'f' : 0,
        .no_data = !changes,
        .flags = DR_OPEN_NO_BACKING | (changes ? DR_OPEN_RDWR : 0u),
    };

    if (cli_image_get(cli, args, &spec, &image) != 0)
        return 1;
    if (changes)
        cli_catch_signals(); /* it is finished once it has begun */
    if (cli_image_open(cli, &image, &disk) < 0)
        return 1;
    if (changes)
        return change_inside(cli, disk, action, name);
    return action == 'l' ? list_inside(cli, args, disk, &image) : 0;
}

static int inside_action(const struct cli_args *args)
{
    static const char keys[] = "lcad";

    for (const char *key = keys; *key; key++)
        if (cli_has(args, *key))
            return *key;
    return 0;
}

static int wrong_mix(const struct cli *cli, const struct cli_args *args)
{
    unsigned actions = (unsigned)cli_has(args, 'l') + cli_has(args, 'a') + cli_has(args, 'c') +
                       cli_has(args, 'd');

    return actions > 1 ? cli_usage(cli, "Cannot mix '-l', '-a', '-c', '-d'") : 0;
}

/* -c takes the name as an operand, as for the other kind of snapshot. */
static int run_internal(const struct cli *cli, const struct cli_args *args)
{
    int action = inside_action(args);
    const char *name = action == 'a' || action == 'd' ? cli_value(args, action) : NULL;
    int wanted = action == 'c' ? 2 : 1;

    if (!action)
        return cli_usage(cli, "Expecting one of '-l', '-a', '-c', '-d'");
    if (args->n_operands != wanted)
        return cli_usage(cli, action == 'c' ? "Expecting NAME and one image file name"
                                            : "Expecting one image file name");
    return run_inside(cli, args, args->operands[wanted - 1], action,
                      action == 'c' ? args->operands[0] : name);
}

/* ------------------------------------------------------------------ images of a family */

/* Does a .vmsd beside the image call a snapshot so? One that cannot be read may. */
static bool is_machines(const struct cli_image *image, const char *name)
{
    CLEANUP_FREE char *dir = cli_directory_of(image->path);
    struct dr_machine_note *notes = NULL;
    size_t n = 0;
    bool found = false;

    if (!dir || dr_machine_notes(dir, &notes, &n, NULL) < 0)
        return false;
    for (size_t i = 0; i < n; i++)
        found |= notes[i].snapshot ? strcmp(notes[i].snapshot, name) == 0
                                   : notes[i].text && strstr(notes[i].descriptor, ".vmsd");
    dr_machine_notes_free(notes, n);
    return found;
}

static bool is_file(const struct cli_image *image, const char *name)
{
    CLEANUP_FREE char *beside = cli_path_beside(image->path, name);

    return cli_name_exists(name) || (beside && cli_name_exists(beside)) || strchr(name, '.');
}

/* Is the name one of a snapshot inside the image? A name that nothing has is taken for one, unless
 * it looks like that of a file. */
static bool is_inside(const struct cli_image *image, const char *name)
{
    struct dr_internal_snapshot *list = NULL;
    size_t n = 0;
    bool found = false;

    if (dr_internal_snapshots(image->path, &image->open, &list, &n, NULL) < 0)
        n = 0;
    for (size_t i = 0; i < n; i++)
        found |= strcmp(list[i].name, name) == 0 || strcmp(list[i].id, name) == 0;
    dr_internal_snapshots_free(list, n);
    return found || (!is_file(image, name) && !is_machines(image, name));
}

static void print_line(void *user, const char *line)
{
    (void)user;
    cli_put(line);
    printf("\n");
}

struct tree_change {
    const char *disk, *name;
    bool revert;
    struct dr_snapshot_options o;
};

static int change_tree(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct tree_change *c = user;

    return c->revert ? dr_snapshot_revert(c->disk, c->name, &c->o, err)
                     : dr_snapshot_delete(c->disk, c->name, &c->o, NULL, job, err);
}

static int run_on_family(const struct cli *cli, const struct cli_args *args,
                         const struct cli_image *image)
{
    struct tree_change c = {
        .disk = image->path,
        .revert = cli_has(args, 'a'),
        .name = cli_value(args, cli_has(args, 'a') ? 'a' : 'd'),
        .o = {.open = image->open,
              .merge = cli_has(args, KEY_UP)     ? DR_SNAPSHOT_MERGE_UP
                       : cli_has(args, KEY_DOWN) ? DR_SNAPSHOT_MERGE_DOWN
                                                 : DR_SNAPSHOT_MERGE_BEST,
              .dry_run = cli_has(args, KEY_DRY_RUN),
              .update_vmsd = cli_has(args, KEY_UPDATE_VMSD),
              .report = cli_has(args, 'q') ? NULL : print_line},
    };

    if (cli_has(args, KEY_UP) && cli_has(args, KEY_DOWN))
        return cli_usage(cli, "Cannot mix '--up' and '--down'");
    cli_export_allowed(args);
    return cli_job_run(cli, args, change_tree, &c);
}

/* ------------------------------------------------------------------ the commands */

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    bool making = cli_has(args, 'c'), changing = cli_has(args, 'a') || cli_has(args, 'd');
    int wrong = wrong_mix(cli, args);

    if (wrong)
        return wrong;
    if (cli_has(args, 'i') || (changing && args->n_operands != 1))
        return run_internal(cli, args);
    if (args->n_operands < 1 || args->n_operands > (making ? 2 : 1))
        return cli_usage(cli, making ? "Expecting [NAME] and one image file name"
                                     : "Expecting one image file name");
    const struct cli_image_spec spec = {.name = args->operands[args->n_operands - 1],
                                        .format_key = 'f'};
    if (!making && !changing && cli_is_directory(spec.name))
        return cli_show_forest(cli, args, spec.name, false);
    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_check(cli, &image) < 0)
        return 1;
    if (changing && !cli_has(args, KEY_EXTERNAL) &&
        is_inside(&image, cli_value(args, cli_has(args, 'a') ? 'a' : 'd')))
        return run_internal(cli, args);
    if (changing)
        return run_on_family(cli, args, &image);
    cli_export_allowed(args);
    if (making) {
        cli_catch_signals(); /* it takes no time, and nothing is left half made */
        return create(cli, args, &image, args->n_operands == 2 ? args->operands[0] : NULL);
    }
    cli_die_politely(cli, "nothing was changed");
    return cli_show_tree(cli, args, &image, false);
}

static int run_as_qemu(const struct cli *cli, const struct cli_args *args)
{
    int wrong = wrong_mix(cli, args), action = inside_action(args);

    if (wrong)
        return wrong;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one image file name");
    return run_inside(cli, args, args->operands[0], action,
                      action && action != 'l' ? cli_value(args, action) : NULL);
}

static const struct cli_option *const sets[] = {
    options, cli_opts_image, cli_opts_share, cli_opts_quiet, cli_opts_progress, cli_opts_common,
    NULL};
static const struct cli_option *const qemu_sets[] = {
    qemu_options, cli_opts_image, cli_opts_share, cli_opts_quiet, cli_opts_common, NULL};

const struct cli_command cli_cmd_snapshot = {
    .name = "snapshot",
    .operands = "[-i] -c [NAME] FILE | [-i] -l FILE|DIR | [-i] -a|-d NAME FILE",
    .brief = "Freeze a disk and go on in a new child, or show the family",
    .about = "-c prints the name of the new active disk; FILE becomes its frozen parent. Without\n"
             "NAME the child of X.vmdk is called X-000001.vmdk, with the lowest free number.\n"
             "The tree marks FILE with *; what does not open with its parent says why.\n"
             "-d takes the image NAME out of FILE's family, -a makes FILE an empty image on it;\n"
             "where a .vmsd gives it a name, that will do, too. With -i, and where FILE has a\n"
             "snapshot of that name inside, it is that one (qcow2), as qemu-img's.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};

const struct cli_command cli_cmd_qemu_snapshot = {
    .name = "snapshot",
    .operands = "FILE",
    .brief = "Internal snapshots",
    .sets = qemu_sets,
    .roles = CLI_QEMU_IMG,
    .run = run_as_qemu,
};
