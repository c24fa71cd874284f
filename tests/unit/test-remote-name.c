/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The names of remote disks: which are some, what they lead to, and which are refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"
#include "core/internal.h"
#include "storage/remote.h"

struct leads {
    const char *name, *uri; /* uri NULL: refused */
};

static void check(const struct leads *l)
{
    DR_CLEANUP_REMOTE struct dr_remote remote = {0};
    struct dr_error why = DR_ERROR_INIT;
    if (!dr_remote_is(l->name))
        fail_msg("%s: is not taken for remote", l->name);
    int r = dr_remote_parse(l->name, &remote, &why);
    if (l->uri ? r != 0 || strcmp(remote.uri, l->uri) != 0 : r != -EINVAL)
        fail_msg("%s: %d, %s, %s", l->name, r, remote.uri ? remote.uri : "no URI", why.text);
}

static void every_spelling_becomes_one_uri(void **state)
{
    (void)state;
    static const struct leads all[] = {
        {"nbd://host/a", "nbd://host/a"},
        {"nbd:host:10809", "nbd://host:10809/"},
        {"nbd:host:10809:exportname=a b", "nbd://host:10809/a%20b"},
        {"nbd:[::1]:7:exportname=[x]:8", "nbd://[::1]:7/%5Bx%5D%3A8"},
        {"nbd:unix:/run/s:exportname=e", "nbd+unix:///e?socket=/run/s"},
        {"nbd:unix:/run/a&socket=b", "nbd+unix:///?socket=/run/a%26socket%3Db"},
        {"http://host/a/b#part", "http://host/a/b"},
        {"https://host/a/../b", "https://host/b"},
        {"json:{\"driver\":\"nbd\",\"host\":\"::1\",\"port\":\"7\"}", "nbd://[::1]:7/"},
        {"json:{\"file\":{\"driver\":\"http\",\"url\":\"http://h/x\"},\"driver\":\"raw\"}",
         "http://h/x"},
        {"json:{\"driver\":\"nbd\",\"host\":\"h\",\"tls-certificates\":\"/a b\"}",
         "nbds://h:10809/?tls-certificates=/a%20b"},
        {"json:{\"driver\":\"nbd\",\"path\":\"/s\",\"tls-psk-file\":\"/"
         "k\",\"tls-username\":\"u@\"}",
         "nbds+unix://u%40@/?socket=/s&tls-psk-file=/k"},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        check(&all[i]);
}

static void names_that_mean_nothing_are_refused(void **state)
{
    (void)state;
    static const struct leads all[] = {
        {"nbd:[host:exportname=]:1", NULL},
        {"nbd:[:exportname=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]:1",
         NULL},
        {"nbd:host:1x", NULL},
        {"http://", NULL},
        {"http://host:99999/", NULL},
        {"http://host/%00", NULL},
        {"http:///host/x", NULL},
        {"http://\\host/x", NULL},
        {"http://host/a/%2e%2e/b", NULL},
        {"http://host/a/%2e%2e", NULL},
        {"nbd+unix:///?socket=/run/a/../b", NULL},
        {"json:{\"driver\":\"nbd\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"h\",\"colour\":1}", NULL},
        {"http://host/a/%2e%2e?b", NULL},
        {"nbd+unix:///?socket=/run/..&tls-hostname=h", NULL},
        {"json:{\"driver\":\"raw\",\"lazy\":512,"
         "\"file\":{\"driver\":\"nbd\",\"host\":\"h\"}}",
         NULL},
        {"json:{\"driver\":\"nbd\",\"uri\":\"nbdx\",\"host\":\"h\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"uri\":\"http://h/\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"h\",\"tls-username\":\"u\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"h\",\"tls-hostname\":\"u\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"h/x?socket=/y\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"user@h\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"h\",\"port\":\"1/../x\"}", NULL},
        {"json:{\"driver\":\"nbd\",\"host\":\"h\",\"port\":\"1/x\"}", NULL},
        {"json:{\"driver\":\"http\",\"url\":\"http://h/\",\"cookie\":\"a=b\\r\\nX: y\"}", NULL},
        {"json:{\"driver\":\"http\"}", NULL},
        {"json:{\"driver\":\"http\",\"url\":\"file:///etc/passwd\"}", NULL},
        {"json:{\"driver\":\"http\",\"url\":\"http://h/\",\"timeout\":-1}", NULL},
        {"json:{\"driver\":\"http\",\"url\":\"http://h/\",\"timeout\":\"99999999999999999999\"}",
         NULL},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        check(&all[i]);
}

static void other_names_are_files(void **state)
{
    (void)state;
    static const char *const all[] = {"",
                                      "nbd:",
                                      "nbd:host",
                                      "nbd::1",
                                      "nbd:a/b:1",
                                      "./nbd:host:1",
                                      "HTTP://host/",
                                      "http:/",
                                      "nbd:[:",
                                      "json:",
                                      "json:{",
                                      "json:[]",
                                      "file:///a",
                                      "nbd:[]",
                                      "json:{\"driver\":\"file\"}"};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        if (dr_remote_is(all[i]))
            fail_msg("'%s' is taken for remote", all[i]);
}

/* Whatever a name has in it, it is taken or refused, and nothing beside it is touched. */
static void names_of_any_bytes_do_no_harm(void **state)
{
    (void)state;
    static const char *const pieces[] = {
        "nbd:",       "[",        "]",      ":",       ":1",     ":exportname=",
        "unix:",      "a",        "/",      "/../",    "%2e%2e", "%",
        "?",          "&socket=", "json:{", "http://", "nbd://", "\"file\"",
        "\"driver\"", "\"nbd\"",  "{",      "}",       ",",      "\xff\xc0"};
    uint64_t seed = 7;
    for (unsigned n = 0; n < 50000; n++) {
        char name[200] = "";
        strcpy(name, n % 3 == 0 ? "nbd:" : n % 3 == 1 ? "nbd:[" : "json:{\"driver\":\"nbd\",");
        for (unsigned k = 0; k < 8; k++) {
            seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
            strcat(name, pieces[(seed >> 33) % (sizeof(pieces) / sizeof(pieces[0]))]);
        }
        size_t len = strlen(name) + 1;
        char *exact = malloc(len); /* so that a step behind its end is seen */
        memcpy(exact, name, len);
        struct dr_remote remote = {0};
        if (dr_remote_is(exact))
            dr_remote_parse(exact, &remote, NULL);
        dr_remote_clear(&remote);
        free(exact);
    }
}

static void names_have_a_directory_or_none(void **state)
{
    (void)state;
    static const struct {
        const char *path, *name, *sibling; /* sibling NULL: it cannot be told */
    } all[] = {
        {"http://h/a/b", "c", "http://h/a/c"},
        {"http://h/a/b?sign=x/y", "c", "http://h/a/c"},
        {"http://h", "c", NULL},
        {"nbd://h:1/a", "c", "nbd://h:1/c"},
        {"nbd://h:1", "c", NULL},
        {"nbd:///a/b", "c", NULL},
        {"nbds:////a", "c", NULL},
        {"nbd+unix:///a?socket=/run/s", "c", NULL},
        {"nbd+unix:///a?socket=/run/s", "nbd://h/c", "nbd://h/c"},
        {"nbd:unix:/run/s", "/c", "/c"},
        {"nbd:unix:/run/s", "c", NULL},
        {"json:{\"driver\":\"nbd\",\"path\":\"/run/s\"}", "c", NULL},
        {"/a?x/b", "c", "/a?x/c"},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        assert_int_equal(dr_remote_check_beside(all[i].path, all[i].name, NULL),
                         all[i].sibling ? 0 : -EINVAL);
        char *sibling = dr_path_sibling(all[i].path, all[i].name);
        if (all[i].sibling)
            assert_string_equal(sibling, all[i].sibling);
        free(sibling);
    }
}

static void names_end_in_that_of_the_disk(void **state)
{
    (void)state;
    assert_string_equal(dr_path_basename("http://h/a/b"), "b");
    assert_string_equal(dr_path_basename("http://h/a/b?c=/d"), "b?c=/d");
    assert_string_equal(dr_path_basename("nbd+unix:///a?socket=/s"), "nbd+unix:///a?socket=/s");
    assert_string_equal(dr_path_basename("nbd:unix:/s"), "nbd:unix:/s");
    assert_string_equal(dr_path_basename("/a/b?c/d"), "d");
}

static void nothing_is_in_the_directory_of_what_has_none(void **state)
{
    (void)state;
    static const struct {
        const char *path, *directory;
    } all[] = {
        {"http://h/a/b?c=/d", "http://h/a"},
        {"nbd+unix:///a?socket=/run/s", "nbd+unix:///a?socket=/run/s"},
        {"nbd:h:1", "nbd:h:1"},
        {"json:{\"driver\":\"http\",\"url\":\"http://h/a/b\"}",
         "json:{\"driver\":\"http\",\"url\":\"http://h/a/b\"}"},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        char *directory = dr_path_dirname(all[i].path);
        assert_string_equal(directory, all[i].directory);
        free(directory);
    }
}

static bool are_one(const char *a, const char *b)
{
    struct dr_file_id x = {0}, y = {0};
    assert_int_equal(dr_remote_identify(a, &x, NULL), 0);
    assert_int_equal(dr_remote_identify(b, &y, NULL), 0);
    return memcmp(&x, &y, sizeof(x)) == 0;
}

static void disks_without_a_medium_say_how_large_they_are(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint64_t size, latency;
        bool zeroes;
    } all[] = {
        {"null-co://", 1u << 30, 0, false},
        {"json:{\"driver\":\"null-aio\",\"size\":1000,\"read-zeroes\":true}", 1024, 0, true},
        {"json:{\"file.driver\":\"null-co\",\"file.size\":\"1M\",\"file.latency-ns\":\"50\"}",
         1u << 20, 50, false},
    };
    static const struct leads refused[] = {
        {"null-co://x", NULL},
        {"json:{\"driver\":\"null-co\",\"size\":\"8E\"}", NULL},
        {"json:{\"driver\":\"null-co\",\"size\":-1}", NULL},
        {"json:{\"driver\":\"null-co\",\"latency-ns\":\"x\"}", NULL},
        {"json:{\"driver\":\"null-co\",\"url\":\"x\"}", NULL},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        DR_CLEANUP_REMOTE struct dr_remote remote = {0};
        assert_true(dr_remote_is(all[i].name));
        assert_int_equal(dr_remote_parse(all[i].name, &remote, NULL), 0);
        assert_int_equal(remote.kind, DR_REMOTE_NULL);
        assert_int_equal(remote.size, all[i].size);
        assert_int_equal(remote.latency, all[i].latency);
        assert_int_equal(remote.zeroes, all[i].zeroes);
    }
    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
        check(&refused[i]);
}

static void spellings_of_one_disk_are_one_file(void **state)
{
    (void)state;
    static const char *const one[][2] = {
        {"nbd://h/x", "nbd://h:10809/x"},
        {"nbd://H/x", "nbd:h:10809:exportname=x"},
        {"nbd://h", "nbd://h/"},
        {"nbds://me@h/a%62c?tls-verify-peer=false", "nbd://h/abc"},
        {"nbd+unix:///e?socket=/run/s", "nbds+unix://me@/e?tls-psk-file=/f&socket=%2Frun%2Fs"},
        {"json:{\"driver\":\"nbd\",\"path\":\"/run/s\",\"timeout\":5}", "nbd:unix:/run/s"},
        {"http://h:80/a?b", "http://user:pass@H/%61?b"},
        {"json:{\"driver\":\"https\",\"url\":\"https://h/x\",\"sslverify\":false}",
         "https://h:443/x"},
    };
    static const char *const two[][2] = {
        {"nbd://h/x", "nbd://h/y"},
        {"nbd://h/x", "nbd://h/X"},
        {"nbd://h/x", "nbd://h:1/x"},
        {"nbd+unix:///e?socket=/run/s", "nbd+unix:///f?socket=/run/s"},
        {"nbd+unix:///e?socket=/run/s", "nbd+unix:///e?socket=/run/t"},
        {"http://h/a?b", "http://h/a?c"},
        {"http://h/a", "https://h/a"},
        {"http://h/a", "http://h/a%3f"},
    };
    for (size_t i = 0; i < sizeof(one) / sizeof(one[0]); i++)
        if (!are_one(one[i][0], one[i][1]))
            fail_msg("%s and %s are two", one[i][0], one[i][1]);
    for (size_t i = 0; i < sizeof(two) / sizeof(two[0]); i++)
        if (are_one(two[i][0], two[i][1]))
            fail_msg("%s and %s are one", two[i][0], two[i][1]);
}

static void an_archive_on_a_server_has_members(void **state)
{
    (void)state;
    DR_CLEANUP_NAME struct dr_name name = {0};
    assert_int_equal(dr_name_parse(dr_fs_posix(), "vma:http://h/a.vma#drive-x", &name, NULL), 0);
    assert_string_equal(name.file, "http://h/a.vma");
    assert_string_equal(name.member, "drive-x");
}

static void no_message_has_a_password(void **state)
{
    (void)state;
    static const char *const all[] = {
        "http://user:secret@host:99999/",
        "http://user:secret@host/%2e%2e/",
        "json:{\"driver\":\"http\",\"url\":\"http://user:secret@h/\",\"timeout\":-1}",
        "json:{\"driver\":\"http\",\"url\":1,\"password\": \"secret\\\"secret\"}",
        "json:{\"driver\":\"http\",\"url\":1,\"cookie\":\"a=secret,secret\"}",
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        DR_CLEANUP_REMOTE struct dr_remote remote = {0};
        struct dr_error why = DR_ERROR_INIT;
        assert_int_equal(dr_remote_parse(all[i], &remote, &why), -EINVAL);
        if (strstr(why.text, "secret") || !strstr(why.text, "***"))
            fail_msg("%s", why.text);
    }
    struct dr_error why = DR_ERROR_INIT;
    dr_fail(&why, EINVAL, "%s", "a://b:c, http://h:8080/x@y:z and nbd://:@h, http://u:p@h");
    assert_string_equal(why.text, "a://b:c, http://h:8080/x@y:z and nbd://:@h, http://u:*@h");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_spelling_becomes_one_uri),
        cmocka_unit_test(names_that_mean_nothing_are_refused),
        cmocka_unit_test(other_names_are_files),
        cmocka_unit_test(names_have_a_directory_or_none),
        cmocka_unit_test(names_end_in_that_of_the_disk),
        cmocka_unit_test(nothing_is_in_the_directory_of_what_has_none),
        cmocka_unit_test(disks_without_a_medium_say_how_large_they_are),
        cmocka_unit_test(spellings_of_one_disk_are_one_file),
        cmocka_unit_test(an_archive_on_a_server_has_members),
        cmocka_unit_test(no_message_has_a_password),
        cmocka_unit_test(names_of_any_bytes_do_no_harm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
