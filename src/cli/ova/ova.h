/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The commands of `drover ova`. */
#ifndef DR_CLI_OVA_H
#define DR_CLI_OVA_H

#include "cli/cli.h"

extern const struct cli_command ova_cmd_create, ova_cmd_list;

#endif
