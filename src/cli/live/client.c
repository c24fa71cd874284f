/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/json.h"
#include "cli/live/client.h"

#define LINE_MAX_BYTES (64u << 20) /* of a reply: names of all images of all chains */

/* ------------------------------------------------------------------ lines */

static int lost(const struct ctl *ctl, const char *why)
{
    cli_error(ctl->cli, "%s: %s", ctl->path, why);
    return 1;
}

static int make_room(struct ctl *ctl)
{
    if (ctl->room - ctl->len >= 4096)
        return 0;
    size_t room = ctl->room ? ctl->room * 2 : 16384;
    char *more = room > LINE_MAX_BYTES ? NULL : realloc(ctl->bytes, room);
    if (!more)
        return lost(ctl, "a reply is too long");
    ctl->bytes = more;
    ctl->room = room;
    return 0;
}

/* The first whole line that has come, as JSON; NULL: there is none, or *code says that it is none.
 */
static json_t *take_line(struct ctl *ctl, int *code)
{
    const char *end = ctl->len ? memchr(ctl->bytes, '\n', ctl->len) : NULL;
    if (!end)
        return NULL;
    size_t len = (size_t)(end - ctl->bytes);
    json_t *message = json_loadb(ctl->bytes, len, 0, NULL);
    if (!message)
        *code = lost(ctl, "what listens there does not speak QMP");
    else if (ctl->show) {
        json_dumpf(message, stdout, JSON_COMPACT);
        printf("\n");
        fflush(stdout);
    }
    ctl->len -= len + 1;
    memmove(ctl->bytes, end + 1, ctl->len);
    return message;
}

/* The next message, within ms (-1 = however long it takes). */
static json_t *hear(struct ctl *ctl, int ms, int *code)
{
    json_t *message;
    *code = 0;
    while (!(message = take_line(ctl, code)) && *code == 0) {
        struct pollfd fd = {.fd = ctl->fd, .events = POLLIN};
        int n = poll(&fd, 1, ms);
        if (n < 0 && errno == EINTR && ms < 0)
            continue;
        if (n <= 0)
            return NULL;
        if ((*code = make_room(ctl)) != 0)
            return NULL;
        ssize_t got = recv(ctl->fd, ctl->bytes + ctl->len, ctl->room - ctl->len, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            *code = lost(ctl, "the server has hung up");
        else
            ctl->len += (size_t)got;
    }
    return message;
}

/* ------------------------------------------------------------------ requests */

static int send_all(const struct ctl *ctl, const char *bytes, size_t len)
{
    while (len > 0) {
        ssize_t n = send(ctl->fd, bytes, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return lost(ctl, strerror(errno));
        bytes += n;
        len -= (size_t)n;
    }
    return 0;
}

/* The reply, whatever it says; events that come before it are kept. */
static json_t *wait_for_reply(struct ctl *ctl, int *code)
{
    json_t *message;
    while ((message = hear(ctl, -1, code)) && json_object_get(message, "event"))
        json_array_append_new(ctl->events, message);
    return message;
}

int ctl_ask(struct ctl *ctl, const char *command, json_t *arguments, json_t **result)
{
    CLEANUP_JSON json_t *request =
        json_pack("{s:s, s:o*}", "execute", command, "arguments", arguments);
    CLEANUP_FREE char *text = request ? dr_json_dump(request, JSON_COMPACT) : NULL;
    int code = text ? send_all(ctl, text, strlen(text)) : lost(ctl, "a name is not UTF-8");
    if (code == 0)
        code = send_all(ctl, "\n", 1);
    if (code != 0)
        return code;
    CLEANUP_JSON json_t *reply = wait_for_reply(ctl, &code);
    if (!reply)
        return code ? code : 1;
    const char *desc = json_string_value(json_object_get(json_object_get(reply, "error"), "desc"));
    if (json_object_get(reply, "error")) {
        cli_error(ctl->cli, "%s", desc ? desc : "the server refuses");
        return 1;
    }
    if (result)
        *result = json_incref(json_object_get(reply, "return"));
    return 0;
}

json_t *ctl_event(struct ctl *ctl, int ms, int *code)
{
    *code = 0;
    if (json_array_size(ctl->events) > 0) {
        json_t *event = json_incref(json_array_get(ctl->events, 0));
        json_array_remove(ctl->events, 0);
        return event;
    }
    json_t *message = hear(ctl, ms, code);
    if (message && !json_object_get(message, "event")) {
        json_decref(message);
        *code = lost(ctl, "a reply came that nobody asked for");
        return NULL;
    }
    return message;
}

/* ------------------------------------------------------------------ begin and end */

static int connect_to(struct ctl *ctl)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(ctl->path) >= sizeof(address.sun_path))
        return lost(ctl, "the path of a socket is shorter than that");
    strcpy(address.sun_path, ctl->path);
    ctl->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (ctl->fd < 0)
        return lost(ctl, strerror(errno));
    if (connect(ctl->fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return 0;
    return lost(ctl, errno == ECONNREFUSED || errno == ENOENT
                         ? "no server listens there: `drover serve --control` begins one"
                         : strerror(errno));
}

int ctl_begin(struct ctl *ctl, const struct cli *cli, const char *path)
{
    int code;
    *ctl = (struct ctl){.cli = cli, .path = path, .fd = -1, .events = json_array()};
    code = connect_to(ctl);
    if (code != 0)
        return code;
    CLEANUP_JSON json_t *greeting = hear(ctl, 10000, &code);
    if (code == 0 && !json_object_get(greeting, "QMP"))
        code = lost(ctl, "what listens there does not speak QMP");
    return code ? code : ctl_ask(ctl, "qmp_capabilities", NULL, NULL);
}

void ctl_end(struct ctl *ctl)
{
    if (ctl->fd >= 0)
        close(ctl->fd);
    free(ctl->bytes);
    json_decref(ctl->events);
}
