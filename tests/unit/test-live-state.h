/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A server with a state for tests, spoken to without a socket. */
#ifndef DROVER_TESTS_TEST_LIVE_STATE_H
#define DROVER_TESTS_TEST_LIVE_STATE_H

#include <sched.h>

#include "live/live.h"
#include "test-ops.h"

#define SIZE (768 * KiB)

struct server {
    struct dr_fs *fs;
    struct dr_disk *disk;
    struct dr_live *live;
};

/* As a program does it: open what the state says, or else the disk that was asked for. */
static inline int open_recalled(struct dr_fs *fs, struct dr_disk **disk, struct dr_error *err)
{
    char *path, *format;
    int r = live_recall_fs(fs, "state", "disk0", NULL, &path, &format, err);
    const struct dr_open_options o = {.flags = DR_OPEN_RDWR, .format = format};
    if (r == 0)
        r = dr_open_fs(fs, path ? path : "top", &o, disk, err);
    free(path);
    free(format);
    return r;
}

static inline struct server serve(struct dr_fs *fs)
{
    const struct dr_live_options o = {.state = "state"};
    struct server s = {.fs = fs};
    ok(open_recalled(fs, &s.disk, &err));
    ok(dr_live_new(&o, &s.live, &err));
    s.live->fs = fs;
    ok(dr_live_add(s.live, "disk0", s.disk, &err));
    ok(dr_live_start(s.live, &err));
    return s;
}

static inline void stop(struct server *s)
{
    dr_live_free(s->live);
    ok(dr_close(s->disk, &err));
}

/* Quotes are written as ' to be readable. */
static inline json_t *ask(const struct server *s, const char *line)
{
    char text[512];
    bool negotiated = true;
    snprintf(text, sizeof(text), "%s", line);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    json_t *reply = qmp_answer(s->live, text, strlen(text), &negotiated);
    if (!json_object_get(reply, "return"))
        fail_msg("%s: %s", line, json_dumps(reply, JSON_COMPACT));
    return reply;
}

static inline void tell(const struct server *s, const char *line)
{
    json_decref(ask(s, line));
}

/* The status of the only job; "" when there is none. */
static inline void status(const struct server *s, char *text, size_t size)
{
    json_t *reply = ask(s, "{'execute': 'query-jobs'}");
    json_t *job = json_array_get(json_object_get(reply, "return"), 0);
    const char *now = json_string_value(json_object_get(job, "status"));
    snprintf(text, size, "%s", now ? now : "");
    json_decref(reply);
}

static inline void wait_for(const struct server *s, const char *wanted)
{
    char text[32];
    do {
        sched_yield();
        status(s, text, sizeof(text));
        if (strcmp(text, "concluded") == 0 && strcmp(wanted, text) != 0)
            fail_msg("the job has failed");
    } while (strcmp(text, wanted) != 0);
}

/* Well or not. */
static inline void wait_for_end(const struct server *s)
{
    char text[32];
    do {
        sched_yield();
        status(s, text, sizeof(text));
    } while (text[0]);
}

#endif
