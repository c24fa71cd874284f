/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A client of the control socket, for tests: sends lines, and gets replies and events in the order
 * in which they come. */
#ifndef DROVER_TESTS_TEST_LIVE_H
#define DROVER_TESTS_TEST_LIVE_H

#include <jansson.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "drover/live.h"
#include "test-ops-crowd.h"

/* Lines are written with ' for quotes to be readable: here they become JSON. It is good until the
 * next call. */
static inline const char *quoted(const char *line)
{
    static char text[8192];
    assert_in_range(snprintf(text, sizeof(text), "%s", line), 0, sizeof(text) - 1);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    return text;
}

/* {'execute': COMMAND, 'arguments': {ARGUMENTS}} */
static inline const char *request(const char *command, const char *arguments)
{
    char line[8192];
    snprintf(line, sizeof(line), "{'execute': '%s', 'arguments': {%s}}", command, arguments);
    return quoted(line);
}

struct talk {
    int fd;
    FILE *in;
    char *events; /* those not looked at yet: "JOB_STATUS_CHANGE:running BLOCK_JOB_READY " */
};

/* A place for the socket of this test program. */
static inline const char *socket_path(void)
{
    static char path[64];
    static char dir[] = "/tmp/drover-live-XXXXXX";
    if (!path[0]) {
        assert_non_null(mkdtemp(dir));
        snprintf(path, sizeof(path), "%s/control", dir);
    }
    return path;
}

static inline void note_event(struct talk *t, json_t *message)
{
    const char *name = json_string_value(json_object_get(message, "event"));
    const char *status =
        json_string_value(json_object_get(json_object_get(message, "data"), "status"));
    char *more;
    json_t *error = json_object_get(json_object_get(message, "data"), "error");
    assert_int_not_equal(asprintf(&more, "%s%s%s%s%s ", t->events ? t->events : "", name,
                                  status ? ":" : "", status ? status : "", error ? "!" : ""),
                         -1);
    free(t->events);
    t->events = more;
}

/* The next message; NULL: the server has hung up. */
static inline json_t *hear_one(struct talk *t)
{
    char *line = NULL;
    size_t room = 0;
    ssize_t len = getline(&line, &room, t->in);
    json_t *message = len < 0 ? NULL : json_loadb(line, (size_t)len, 0, NULL);
    if (len >= 0 && !message)
        fail_msg("not JSON: %s", line);
    free(line);
    return message;
}

static inline void say_line(struct talk *t, const char *line)
{
    assert_int_equal(send(t->fd, line, strlen(line), MSG_NOSIGNAL), strlen(line));
    assert_int_equal(send(t->fd, "\n", 1, MSG_NOSIGNAL), 1);
}

/* The reply to a line; events that come before it are noted. */
static inline json_t *ask(struct talk *t, const char *line)
{
    say_line(t, line);
    for (;;) {
        json_t *message = hear_one(t);
        assert_non_null(message);
        if (!json_object_get(message, "event"))
            return message;
        note_event(t, message);
        json_decref(message);
    }
}

static inline void asked_ok(struct talk *t, const char *line)
{
    json_t *reply = ask(t, line);
    if (!json_object_get(reply, "return"))
        fail_msg("%s: %s", line, json_dumps(reply, JSON_COMPACT));
    json_decref(reply);
}

/* The line is refused with this class, and the text has the word. */
static inline void asked_refused(struct talk *t, const char *line, const char *class,
                                 const char *word)
{
    json_t *reply = ask(t, line), *error = json_object_get(reply, "error");
    const char *desc = json_string_value(json_object_get(error, "desc"));
    if (!error || strcmp(json_string_value(json_object_get(error, "class")), class) != 0 ||
        !strstr(desc, word))
        fail_msg("%s: %s", line, json_dumps(reply, JSON_COMPACT));
    json_decref(reply);
}

/* Wait until the events that are not looked at yet end with this, and compare all of them. */
static inline void events_are(struct talk *t, const char *all)
{
    while (!t->events || strlen(t->events) < strlen(all)) {
        json_t *message = hear_one(t);
        assert_non_null(message);
        assert_non_null(json_object_get(message, "event"));
        note_event(t, message);
        json_decref(message);
    }
    if (strcmp(t->events, all) != 0)
        fail_msg("'%s', not '%s'", t->events, all);
    free(t->events);
    t->events = NULL;
}

static inline struct talk talk_begin(bool negotiate)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct talk t = {.fd = socket(AF_UNIX, SOCK_STREAM, 0)};
    strcpy(address.sun_path, socket_path());
    assert_int_equal(connect(t.fd, (struct sockaddr *)&address, sizeof(address)), 0);
    t.in = fdopen(dup(t.fd), "r");
    json_t *greeting = hear_one(&t);
    assert_non_null(json_object_get(greeting, "QMP"));
    json_decref(greeting);
    if (negotiate)
        asked_ok(&t, "{\"execute\": \"qmp_capabilities\"}");
    return t;
}

static inline void talk_end(struct talk *t)
{
    fclose(t->in);
    close(t->fd);
    free(t->events);
}

#endif
