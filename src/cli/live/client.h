/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The other end of a control socket: requests and their replies, and events as they come. */
#ifndef DR_CLI_LIVE_CLIENT_H
#define DR_CLI_LIVE_CLIENT_H

#include <jansson.h>

#include "cli/cli.h"
#include "cli/common/json.h"

struct ctl {
    const struct cli *cli;
    const char *path;
    int fd;
    char *bytes; /* what has come and is not a whole line yet */
    size_t len, room;
    json_t *events; /* not looked at yet */
    bool show;      /* print every reply and event as a line of JSON */
};

/* Connect and negotiate. 0, or the exit code after a message. */
int ctl_begin(struct ctl *ctl, const struct cli *cli, const char *path);
void ctl_end(struct ctl *ctl);

/* Ask and wait for the reply. Takes over arguments, which may be NULL. *result, a new reference,
 * may be NULL. 0, or the exit code after a message. */
int ctl_ask(struct ctl *ctl, const char *command, json_t *arguments, json_t **result);
/* The next event, a new reference; NULL with *code 0: none came within ms, or a signal did; with
 * another: the connection ended, and a message was printed. */
json_t *ctl_event(struct ctl *ctl, int ms, int *code);

#endif
