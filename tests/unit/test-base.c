/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/notice.h"
#include "base/random.h"
#include "base/sigpipe.h"
#include "storage/storage.h"

static void zero_detection_sees_every_byte(void **state)
{
    (void)state;
    static uint8_t buf[1200];
    for (size_t len = 0; len < 600; len++)
        for (size_t at = 0; at < len; at++) {
            uint8_t *p = buf + len % 7;
            assert_true(dr_is_zero(p, len));
            p[at] = 0x80;
            assert_false(dr_is_zero(p, len));
            p[at] = 0;
        }
    buf[3] = buf[3 + 500] = 1; /* just outside */
    assert_true(dr_is_zero(buf + 4, 499));
    memset(buf, 0, sizeof(buf));
}

static void random_text_differs(void **state)
{
    (void)state;
    char a[9], b[9];
    dr_random_text(a, 8);
    dr_random_text(b, 8);
    assert_int_equal(strlen(a), 8);
    assert_string_not_equal(a, b);
    assert_int_equal(strspn(a, "abcdefghijklmnopqrstuvwxyz0123456789"), 8);
}

static void check_text(char *got, const char *want)
{
    assert_string_equal(got, want);
    free(got);
}

static void paths_are_taken_apart_and_joined(void **state)
{
    (void)state;
    check_text(dr_path_dirname("a"), ".");
    check_text(dr_path_dirname("/a"), "/");
    check_text(dr_path_dirname("//a"), "/");
    check_text(dr_path_dirname("x/a"), "x");
    check_text(dr_path_dirname("x//a"), "x");
    assert_string_equal(dr_path_basename("x/a"), "a");
    assert_string_equal(dr_path_basename("a"), "a");
    check_text(dr_path_join("x", "a"), "x/a");
    check_text(dr_path_join("x/", "a"), "x/a");
    check_text(dr_path_join("/", "a"), "/a");
    check_text(dr_path_join("x", "/a"), "/a");
    check_text(dr_path_sibling("x/y", "a"), "x/a");
    check_text(dr_path_sibling("y", "a"), "a");
    assert_true(dr_path_inside("/a/b", "/a/b/c"));
    assert_true(dr_path_inside("/a/b/", "/a/b/c/d"));
    assert_true(dr_path_inside("/", "/x"));
    assert_false(dr_path_inside("/a/b", "/a/bc"));
    assert_false(dr_path_inside("/a/b", "/a/b"));
    assert_false(dr_path_inside("/a/b", "/a"));
}

static unsigned heard;

static void hear_no_more(void *user, const char *text)
{
    (void)user;
    assert_string_equal(text, "second");
    heard++;
    dr_on_notice(NULL, NULL);
}

static void hear(void *user, const char *text)
{
    assert_ptr_equal(user, &heard);
    assert_string_equal(text, "first");
    heard++;
    dr_on_notice(hear_no_more, NULL);
    dr_notice("%s", "second");
    dr_notice("third");
}

static void whoever_hears_a_notice_may_call_the_library(void **state)
{
    (void)state;
    dr_on_notice(hear, &heard);
    dr_notice("first");
    dr_notice("fourth");
    assert_int_equal(heard, 2);
}

/* The test would end here if the signal came through. */
static void a_broken_pipe_raises_no_signal_that_lasts(void **state)
{
    (void)state;
    struct dr_sigpipe outer, inner;
    int fds[2];
    sigset_t waiting;
    assert_int_equal(pipe(fds), 0);
    close(fds[0]);
    dr_sigpipe_hold(&outer);
    assert_int_equal(write(fds[1], "x", 1), -1);
    dr_sigpipe_hold(&inner); /* the one that waits already is left */
    dr_sigpipe_release(&inner, true);
    sigpending(&waiting);
    assert_true(sigismember(&waiting, SIGPIPE));
    dr_sigpipe_release(&outer, true);
    sigpending(&waiting);
    assert_false(sigismember(&waiting, SIGPIPE));
    close(fds[1]);
}

/* "hunter" is secret in all of these, "kept" is not. */
static const char *const spellings[] = {
    "json:{\"password\":\"hunter2\",\"kept\":1}",
    "json:{\"password\" :\t\"hun\\\"hunter\", \"kept\":1}",
    "json:{\"file.password\"\n:\n\"hunter\\\\\",\"kept\":1}",
    "json:{'driver':'http','password':'hunter','kept':1}",
    "json:{\"p\\u0061ssword\":\"hunter\",\"kept\":1}",
    "json:{\"cookie\":[\"a=hunter\",\"b=hunter\"],\"kept\":1}",
    "json:{\"password\":{\"a\":\"hunter\"},\"kept\":1}",
    "json:{\"kept\":\"json:{\\\"password\\\": \\\"hunter \\\\\\\"hunter\\\"}\", \"kept\":1}",
    "json:{\"backing\":\"json:{\\\"password\\\":\\\"hunter\\\\\\\\\\\",\\\"kept\\\":1}\"}",
    "json:{\"url\":\"http:\\/\\/me:hunter@kept\\/\"}",
    "json:{\"url\":\"http:\\u002f\\u002fme:hunter@kept\\/\"}",
    "Could not open 'driver=https,file.password=hun,,hunter,kept=1': no",
    "password=\"hunter, hunter\" kept",
    "http://me:hun%40hunter@kept/",
    "'https://me:hun/hunter@kept/x' is nothing",
    "https://me:hun#hunter?hunter'hunter@kept/x",
    "nbd://kept/?cookie=hunter&kept",
    "kept https://me:hunter@kept:1/, http://me:hunter@[::1]:80/ kept",
    "cut off: json:{\"kept\":1, \"password\":\"hunter",
};

static void no_spelling_of_a_secret_is_printed(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(spellings) / sizeof(spellings[0]); i++) {
        char *text = strdup(spellings[i]);
        dr_hide_secrets(text);
        if (strstr(text, "hunter") || !strstr(text, "***") || !strstr(text, "kept"))
            fail_msg("%s", text);
        free(text);
    }
}

static void what_is_no_secret_is_printed_as_it_is(void **state)
{
    static const char *const all[] = {
        "json:{\"password-secret\":\"s\",\"url\":\"http://me@h:80/x:y@z\"}",
        "a://b:c, http://h:8080/x@y:z, http://[::1]:80/a@b and nbd://:@h",
        "the password is wrong: \"password\" and cookies, password",
    };
    (void)state;
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        char *text = strdup(all[i]);
        dr_hide_secrets(text);
        assert_string_equal(text, all[i]);
        free(text);
    }
}

static void values_of_image_options_are_hidden_to_their_end(void **state)
{
    (void)state;
    char text[] =
        "driver=https,file.cookie=it's hun,,ter & hunter,password=,url=http://a:hunter@b,x";
    dr_hide_option_secrets(text);
    assert_string_equal(text, "driver=https,file.cookie=***,password=,url=http://a:***@b,x");
}

static void a_name_without_its_secrets_keeps_the_rest(void **state)
{
    static const char *const all[][2] = {
        {"json:{\"a\": 1,\"file\":{\"cookie\":\"c\",\"url\":\"u\",\"b\":[{\"password\":2}]}}",
         "json:{\"a\":1,\"file\":{\"url\":\"u\",\"b\":[{}]}}"},
        {"json:{\"file.password\":\"p\",\"password-secret\":\"s\"}",
         "json:{\"password-secret\":\"s\"}"},
        {"json:{ \"a\": 1 }", "json:{ \"a\": 1 }"},
        {"json:{\"password\":", "json:{\"password\":"},
        {"/dir/password=x", "/dir/password=x"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        char *name = dr_without_secrets(all[i][0]);
        assert_string_equal(name, all[i][1]);
        free(name);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(zero_detection_sees_every_byte),
        cmocka_unit_test(random_text_differs),
        cmocka_unit_test(whoever_hears_a_notice_may_call_the_library),
        cmocka_unit_test(a_broken_pipe_raises_no_signal_that_lasts),
        cmocka_unit_test(paths_are_taken_apart_and_joined),
        cmocka_unit_test(no_spelling_of_a_secret_is_printed),
        cmocka_unit_test(what_is_no_secret_is_printed_as_it_is),
        cmocka_unit_test(a_name_without_its_secrets_keeps_the_rest),
        cmocka_unit_test(values_of_image_options_are_hidden_to_their_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
