/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup prune: remove all but the newest backups. */
#include <string.h>

#include "cli/commands/backup.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/common/progress.h"

#define MOST 1000000

static const struct cli_option options[] = {
    {KEY_KEEP, "keep", "KEEP", "keep so many of the newest ones of each disk and bitmap", false},
    {KEY_DRY_RUN, "dry-run", NULL, "only tell what would go, and how many bytes", false},
    {KEY_NO_VERIFY, "no-verify", NULL, "do not read what is merged: damage stays unseen", false},
    {'r', "rate", "BYTES", "bytes a second at most", false},
    {0, NULL, NULL, NULL, false},
};

int cli_get_kept(const struct cli *cli, const char *text, unsigned *keep)
{
    char *end = NULL;
    unsigned long n = text[0] >= '0' && text[0] <= '9' ? strtoul(text, &end, 10) : 0;
    if (n == 0 || n > MOST || *end) {
        cli_error(cli, "How many backups to keep must be a number from 1 to %d, not '%s'", MOST,
                  text);
        return 1;
    }
    *keep = (unsigned)n;
    return 0;
}

/* ------------------------------------------------------------------ telling */

struct prune {
    const char *set;
    struct dr_prune_options o;
    bool quiet;
    size_t steps;
};

static void tell(void *user, const struct dr_prune_step *step)
{
    struct prune *p = user;
    char copied[CLI_SIZE_TEXT], freed[CLI_SIZE_TEXT];
    p->steps++;
    if (p->quiet)
        return;
    for (size_t i = step->n; i > 0; i--) {
        cli_put(step->names[i - 1]);
        printf(i > 1 ? ", " : ": ");
    }
    if (step->into) {
        printf(p->o.dry_run ? "would be merged into " : "merged into ");
        cli_put(step->into);
        printf(", %s copied, ", cli_human_size(step->copied, copied));
    } else {
        printf(p->o.dry_run ? "would be removed, " : "removed, ");
    }
    printf("about %s given back%s\n", cli_human_size(step->freed, freed),
           step->verified ? ", verified" : "");
}

static int prune(void *user, struct dr_job *job, struct dr_error *err)
{
    const struct prune *p = user;
    return dr_backup_prune(p->set, &p->o, job, err);
}

int cli_prune(const struct cli *cli, const struct cli_args *args, const char *set,
              const struct dr_prune_options *o)
{
    struct prune p = {.set = set, .o = *o, .quiet = cli_has(args, 'q')};
    p.o.tell = tell;
    p.o.user = &p;
    return cli_job_run(cli, args, prune, &p);
}

/* ------------------------------------------------------------------ the command */

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct dr_prune_options o = {.dry_run = cli_has(args, KEY_DRY_RUN),
                                 .no_verify = cli_has(args, KEY_NO_VERIFY)};
    if (args->n_operands != 1 || !cli_has(args, KEY_KEEP))
        return cli_usage(cli, "Expecting the file that lists the backups, and --keep");
    if (cli_get_kept(cli, cli_value(args, KEY_KEEP), &o.keep) != 0 ||
        cli_shared_flags(cli, args, &o.open.flags) != 0)
        return 1;
    cli_export_allowed(args);
    return cli_prune(cli, args, args->operands[0], &o);
}

static const struct cli_option *const sets[] = {options, cli_opts_quiet, cli_opts_progress,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_backup_prune = {
    .name = "backup prune",
    .operands = "SET",
    .brief = "Remove all but the newest backups, and merge what those need of them",
    .about = "Each kept backup shows what it did at every moment. Interrupted, do it again.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
