/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Every allocation made while a disk on a server is opened and read fails once, in libcurl, too.
 * The call fails or does without. */
#include <arpa/inet.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/core.h"
#include "no-memory.h"
#include "storage/storage.h"

#define SIZE 4096u

/* ------------------------------------------------------------------ a server without allocations
 */

static int listener;
static uint16_t port;

/* A request and its answer: a byte range, or only what there is. False: the client has gone. */
static bool answer(int s)
{
    char request[4096], head[300];
    static const char body[SIZE] = {'d'};
    size_t n = 0;
    do {
        ssize_t got = read(s, request + n, sizeof(request) - 1 - n);
        if (got <= 0)
            return false;
        n += (size_t)got;
        request[n] = 0;
    } while (!strstr(request, "\r\n\r\n"));
    unsigned first = 0, last = SIZE - 1;
    const char *range = strcasestr(request, "range: bytes=");
    bool part = range && sscanf(range + strlen("range: bytes="), "%u-%u", &first, &last) >= 1;
    last = last < SIZE ? last : SIZE - 1;
    int len =
        snprintf(head, sizeof(head),
                 "HTTP/1.1 %s\r\nAccept-Ranges: bytes\r\nETag: \"1\"\r\nContent-Length: %u\r\n"
                 "Content-Range: bytes %u-%u/%u\r\n\r\n",
                 part ? "206 Partial Content" : "200 OK", last - first + 1, first, last, SIZE);
    bool ok = send(s, head, (size_t)len, MSG_NOSIGNAL) == len;
    if (ok && strncmp(request, "GET", 3) == 0)
        ok = send(s, body + first, last - first + 1, MSG_NOSIGNAL) == (ssize_t)(last - first + 1);
    return ok;
}

static void *serve_one(void *user)
{
    int s = (int)(intptr_t)user;
    while (answer(s))
        ;
    close(s);
    return NULL;
}

static void *serve(void *user)
{
    (void)user;
    for (;;) {
        pthread_t thread;
        int s = accept(listener, NULL, NULL);
        if (s < 0)
            return NULL;
        if (pthread_create(&thread, NULL, serve_one, (void *)(intptr_t)s) != 0)
            close(s);
        else
            pthread_detach(thread);
    }
}

static void start(pthread_t *thread)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(at);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&at, len), 0);
    assert_int_equal(listen(listener, 64), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)&at, &len), 0);
    port = ntohs(at.sin_port);
    assert_int_equal(pthread_create(thread, NULL, serve, NULL), 0);
}

static void stop(pthread_t thread)
{
    shutdown(listener, SHUT_RDWR);
    pthread_join(thread, NULL);
    close(listener);
}

/* ------------------------------------------------------------------ a client without memory */

static int read_some(const char *name, struct dr_error *err)
{
    struct dr_open_options o = {.format = "raw"};
    struct dr_disk *disk;
    char byte = 0;
    int r = dr_open(name, &o, &disk, err);
    if (r < 0)
        return r;
    assert_non_null(disk->chain->images[0]->files[0]->path);
    r = dr_pread(disk, &byte, 0, 1, err);
    if (r == 0)
        assert_int_equal(byte, 'd');
    dr_close(disk, NULL);
    return r;
}

static void any_allocation_may_fail(void **state)
{
    char name[200];
    pthread_t server;
    long at = 0, failures = 0;
    (void)state;
    if (!CAN_FAIL)
        skip();
    start(&server);
    snprintf(name, sizeof(name), "http://me:secret@127.0.0.1:%u/disk", port);
    for (bool failed = true; failed; at++) {
        struct dr_error why = DR_ERROR_INIT;
        let_fail(at);
        int r = read_some(name, &why);
        failed = has_failed();
        let_fail(-1);
        failures += r < 0;
        if (r < 0 && (!failed || !why.text[0]))
            fail_msg("%ld: %d %s", at, r, why.text);
    }
    assert_true(failures > 20);
    /* libjansson 2.14 writes behind its buffer when it reads a text and has no memory for it. */
    snprintf(name, sizeof(name),
             "json:{\"driver\":\"http\",\"url\":\"http://127.0.0.1:%u/disk\","
             "\"username\":\"me\",\"password\":\"secret\",\"cookie\":\"a=b\"}",
             port);
    assert_int_equal(read_some(name, NULL), 0);
    stop(server);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
