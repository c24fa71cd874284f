/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/commands.h"
#include "cli/common/suggest.h"
#include "cli/ova/ova.h"

static int run(const struct cli *cli, const struct cli_args *args)
{
    if (args->n_operands > 0)
        return cli_usage(cli, "Command not found: ova %s%s", args->operands[0],
                         cli_meant_child(cli->command, args->operands[0]));
    return cli_usage(cli, "Expecting create or list");
}

static const struct cli_command *const children[] = {&ova_cmd_create, &ova_cmd_list, NULL};
static const struct cli_option *const sets[] = {cli_opts_common, NULL};

const struct cli_command cli_cmd_ova = {
    .name = "ova",
    .operands = "COMMAND ARCHIVE",
    .brief = "Write machines as OVA archives, and list them",
    .sets = sets,
    .children = children,
    .roles = CLI_DROVER,
    .run = run,
};
