/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Libraries that are loaded when they are needed: what is missing is named. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/loaded.h"

static void *found;

static struct dr_loaded_library library(const char *file, const struct dr_loaded_function *f)
{
    return (struct dr_loaded_library){file, f, 1, PTHREAD_MUTEX_INITIALIZER, NULL};
}

static void a_library_that_is_not_there_is_named(void **state)
{
    (void)state;
    static const struct dr_loaded_function f = {"cos", &found};
    struct dr_loaded_library l = library("libnowhere.so.1", &f);
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_load_library(&l, &err), -ENOENT);
    assert_non_null(strstr(err.text, "cannot load libnowhere.so.1"));
}

static void a_function_that_is_not_there_is_named(void **state)
{
    (void)state;
    static const struct dr_loaded_function f = {"cosinus", &found};
    struct dr_loaded_library l = library("libm.so.6", &f);
    struct dr_error err = DR_ERROR_INIT;
    for (int i = 0; i < 2; i++) { /* the second time, too: nothing was called loaded */
        dr_error_reset(&err);
        assert_int_equal(dr_load_library(&l, &err), -ENOENT);
        assert_non_null(strstr(err.text, "libm.so.6 has no function cosinus"));
    }
}

static void each_library_has_what_is_called(void **state)
{
    (void)state;
    int (*const load[])(struct dr_error *) = {dr_load_archive, dr_load_xml, dr_load_curl,
                                              dr_load_gcrypt, dr_load_nbd};
    for (size_t i = 0; i < sizeof(load) / sizeof(*load); i++) {
        struct dr_error err = DR_ERROR_INIT;
        if (load[i](&err) != 0)
            fail_msg("%s", err.text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_library_that_is_not_there_is_named),
        cmocka_unit_test(a_function_that_is_not_there_is_named),
        cmocka_unit_test(each_library_has_what_is_called),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
