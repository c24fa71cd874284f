/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "cli/common/image.h"
#include "cli/common/progress.h"
#include "cli/ova/ova.h"
#include "cli/vma/vma.h"
#include "drover/ova.h"

static const struct cli_option options[] = {
    {'d', "disk", "[format=FMT:]FILE", "a disk of the machine (repeatable)", false},
    {'n', "name", "NAME", "the machine's (that of ARCHIVE)", false},
    {KEY_MEMORY, "memory", "SIZE", "the machine's memory, M if there is no unit (1G)", false},
    {KEY_CPUS, "cpus", "N", "its processors (1)", false},
    {KEY_CONTROLLER, "controller", "lsilogic|ide", "what the disks are connected to (lsilogic)",
     false},
    {'o', "options", "NAME=VALUE,...", "settings of the VMDKs, such as compression_level", false},
    {KEY_CTIME, "ctime", "SECONDS", "the time of the files, since 1970 (now)", false},
    {KEY_NO_SYNC, "no-sync", NULL, "do not wait until all is durable", false},
    {KEY_FORCE, "force", NULL, "replace an existing ARCHIVE", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {'m', "jobs", "N", "how many workers, 1 to 16", false},
    {0, NULL, NULL, NULL, false},
};

struct create {
    const struct cli *cli;
    const char *path;
    struct dr_ova_create_options o;
    struct dr_disk *disks[DR_OVA_DISKS_MAX];
    struct cli_pairs pairs;
    char *name;
    int fd; /* standard output, as it was; -1 = an archive with a name */
};

static void create_free(struct create *c)
{
    for (size_t i = 0; i < c->o.n_disks; i++)
        dr_close(c->disks[i], NULL);
    cli_pairs_free(&c->pairs);
    free(c->name);
    if (c->fd >= 0)
        close(c->fd);
}

/* ------------------------------------------------------------------ options */

/* "format=FMT:FILE" or "FILE" */
static int add_disk(struct create *c, const struct cli_args *args, const char *text)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    CLEANUP_FREE char *format = NULL;
    const char *path = text, *colon = strchr(text, ':');

    if (strncmp(text, "format=", 7) == 0 && colon) {
        format = strndup(text + 7, (size_t)(colon - text - 7));
        path = colon + 1;
        if (!format || !cli_format_exists(format)) {
            cli_error(c->cli, "Could not open '%s': Unknown driver '%s'", path,
                      format ? format : "?");
            return 1;
        }
    }
    if (c->o.n_disks == DR_OVA_DISKS_MAX)
        return cli_usage(c->cli, "A machine has no more than %u disks", DR_OVA_DISKS_MAX);
    const struct cli_image_spec spec = {.name = path};
    if (cli_image_get(c->cli, args, &spec, &image) != 0)
        return 1;
    if (format)
        image.open.format = format;
    if (cli_image_open(c->cli, &image, &c->disks[c->o.n_disks]) < 0)
        return 1;
    c->o.n_disks++;
    return 0;
}

static int get_number(const struct create *c, const char *what, const char *text, uint64_t most,
                      uint64_t *n)
{
    char *end;

    errno = 0;
    *n = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && *end == '\0' && !errno && *n <= most)
        return 0;
    return cli_usage(c->cli, "--%s: '%s' is no number up to %" PRIu64, what, text, most);
}

/* A number alone is MiB, as with qemu -m. */
static int get_memory(struct create *c, const char *text)
{
    if (!text)
        return 0;
    if (text[strspn(text, "0123456789")] != '\0')
        return cli_get_size(c->cli, "memory", text, &c->o.memory) < 0;
    int code = get_number(c, "memory", text, 1u << 30, &c->o.memory);
    c->o.memory <<= 20;
    return code;
}

/* "dir/web.ova" → "web". */
static char *name_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *name = strdup(slash ? slash + 1 : path);
    size_t n = name ? strlen(name) : 0;

    if (n > 4 && strcasecmp(name + n - 4, ".ova") == 0)
        name[n - 4] = '\0';
    return name;
}

static int get_machine(struct create *c, const struct cli_args *args)
{
    const char *cpus = cli_value(args, KEY_CPUS), *ctime = cli_value(args, KEY_CTIME);
    uint64_t n = 0;
    int code = get_memory(c, cli_value(args, KEY_MEMORY));

    if (code == 0 && cpus)
        code = get_number(c, "cpus", cpus, 1024, &n);
    c->o.cpus = (unsigned)n;
    if (code == 0 && ctime)
        code = get_number(c, "ctime", ctime, (UINT64_C(1) << 33) - 1, &n);
    c->o.has_mtime = ctime;
    c->o.mtime = (int64_t)n;
    c->o.controller = cli_value(args, KEY_CONTROLLER);
    c->o.name = cli_value(args, 'n');
    if (!c->o.name && !vma_is_stdout(c->path))
        c->o.name = c->name = name_of(c->path);
    return code;
}

static int get_options(struct create *c, const struct cli_args *args)
{
    c->o.no_sync = cli_has(args, KEY_NO_SYNC);
    c->o.replace = cli_has(args, KEY_FORCE);
    int code = get_machine(c, args);
    if (code == 0)
        code = cli_pairs_from_args(c->cli, args, &c->pairs) < 0;
    if (code == 0 && !cli_has(args, 'd'))
        return cli_usage(c->cli, "Expecting disks, each given with -d");
    if (code == 0 && vma_is_stdout(c->path)) {
        code = vma_take_stdout(c->cli, &c->fd);
        c->path = "standard output";
        c->o.use_fd = true;
        c->o.fd = c->fd;
    }
    for (size_t i = 0; i < args->n_hits && code == 0; i++)
        if (args->hits[i].key == 'd')
            code = add_disk(c, args, args->hits[i].arg);
    c->o.disks = c->disks;
    c->o.pairs = c->pairs.pairs;
    c->o.n_pairs = c->pairs.n;
    return code;
}

/* ------------------------------------------------------------------ the command */

static int create(struct create *c, const struct cli_args *args)
{
    struct dr_ova_create_result result = {0};
    struct dr_error err = DR_ERROR_INIT;
    char state[4300], size[CLI_SIZE_TEXT];
    struct cli_job job;
    int code = vma_job_begin(c->cli, args, &job);

    if (code != 0)
        return code;
    int r = dr_ova_create(c->path, &c->o, job.job, &result, &err);
    cli_job_end(&job);
    if (r < 0) {
        snprintf(state, sizeof(state),
                 c->o.use_fd ? "what went to %s is no whole archive" : "'%s' is as it was before",
                 c->path);
        return cli_job_failed(&job, r, &err, 1, state);
    }
    if (!job.quiet && !c->o.use_fd) {
        cli_put(c->path);
        printf(": %s\n", cli_human_size(result.bytes, size));
    }
    return 0;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(create_free))) struct create c = {.cli = cli, .fd = -1};

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting the name of one archive (disks are given with -d)");
    c.path = args->operands[0];
    int code = get_options(&c, args);
    return code ? code : create(&c, args);
}

static const struct cli_option *const sets[] = {options,           cli_opts_share,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command ova_cmd_create = {
    .name = "ova create",
    .operands = "ARCHIVE",
    .brief = "Write a machine with these disks for ESXi, VirtualBox or Proxmox VE to import",
    .about =
        "ARCHIVE appears under its name when it is complete. - is standard output: then each disk\n"
        "is compressed twice, since its size stands in front of it.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
