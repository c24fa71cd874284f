/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A directory of its own for a test of storage, and assertions that tell the text of a failure. */
#ifndef DR_TESTS_PLACE_H
#define DR_TESTS_PLACE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "storage/storage.h"

struct place {
    struct dr_fs *fs;
    char dir[64];
    char path[128], other[128];
};

static inline int setup_posix_in(void **state, const char *dir)
{
    struct place *p = calloc(1, sizeof(*p));
    p->fs = dr_fs_posix();
    snprintf(p->dir, sizeof(p->dir), "%s/drover-test-XXXXXX", dir);
    if (!mkdtemp(p->dir)) {
        free(p);
        return -1;
    }
    snprintf(p->path, sizeof(p->path), "%s/a.img", p->dir);
    snprintf(p->other, sizeof(p->other), "%s/b.img", p->dir);
    *state = p;
    return 0;
}

static inline int setup_posix(void **state)
{
    return setup_posix_in(state, "/tmp");
}

static inline int teardown_posix(void **state)
{
    struct place *p = *state;
    char cmd[128];
    snprintf(cmd, sizeof(cmd), "rm -rf %s", p->dir);
    int r = system(cmd);
    free(p);
    return r;
}

static inline struct dr_file *open_on(struct dr_fs *fs, const char *path, unsigned flags)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f;
    int r = dr_file_open(fs, path, flags, &f, &err);
    if (r)
        fail_msg("open %s: %s", path, err.text);
    return f;
}

static inline struct dr_file *open_ok(struct place *p, const char *path, unsigned flags)
{
    return open_on(p->fs, path, flags);
}

#define assert_ok(expr)                          \
    do {                                         \
        struct dr_error err = DR_ERROR_INIT;     \
        if ((expr) != 0)                         \
            fail_msg("%s: %s", #expr, err.text); \
    } while (0)

#define assert_fails(expr, errnum_, words)                    \
    do {                                                      \
        struct dr_error err = DR_ERROR_INIT;                  \
        assert_int_equal((expr), -(errnum_));                 \
        assert_int_equal(err.errnum, errnum_);                \
        if (!strstr(err.text, words))                         \
            fail_msg("\"%s\" lacks \"%s\"", err.text, words); \
    } while (0)

#endif
