/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Connections to real servers that are cut at every byte of a small transfer, and requests that
 * fail in turn: each time the copy is right, or an error says why and leaves nothing behind; and it
 * ends in time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "cutting.h"
#include "drover/ops.h"
#include "slower.h"

#define SIZE    1536u /* of the disk */
#define WORKERS 24    /* they wait most of the time */
#define PATIENT 60    /* seconds that no trial may last */

extern char **environ;

static char dir[] = "/dev/shm/drover-cuts-XXXXXX";
static uint8_t disk[SIZE];
static pid_t nbdkit, nginx;

/* ------------------------------------------------------------------ servers */

static char *path_of(const char *name)
{
    char *path = NULL;
    if (asprintf(&path, "%s/%s", dir, name) < 0)
        abort();
    return path;
}

static void write_file(const char *name, const void *bytes, size_t n)
{
    CLEANUP_FREE char *path = path_of(name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0)
        fail_msg("cannot write %s", path);
}

static bool holds_disk(const char *name)
{
    CLEANUP_FREE char *path = path_of(name);
    uint8_t bytes[SIZE + 1];
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(bytes, 1, sizeof(bytes), f) : 0;
    if (f)
        fclose(f);
    return n == SIZE && memcmp(bytes, disk, SIZE) == 0;
}

/* 0: it is not installed. It has a socket when it returns. */
static pid_t start_server(char *const *args, const char *socket)
{
    CLEANUP_FREE char *path = path_of(socket);
    pid_t pid;
    if (posix_spawnp(&pid, args[0], NULL, NULL, args, environ) != 0)
        return 0;
    for (int tries = 0; access(path, F_OK) != 0; tries++) {
        if (tries == 1000 || waitpid(pid, NULL, WNOHANG) == pid)
            return 0;
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    return pid;
}

static void start_nbdkit(void)
{
    CLEANUP_FREE char *socket = path_of("nbd.sock"), *files = NULL;
    if (asprintf(&files, "dir=%s", dir) < 0)
        abort();
    /* One thread for each connection: with several nbdkit 1.32 fails an assertion when one is cut.
     */
    char *const args[] = {"nbdkit",
                          "--exit-with-parent",
                          "--log=null",
                          "-U",
                          socket,
                          "-t",
                          "1",
                          "--filter=blocksize-policy",
                          "file",
                          files,
                          "blocksize-minimum=1",
                          "blocksize-preferred=512",
                          "blocksize-maximum=512",
                          "blocksize-error-policy=error",
                          NULL};
    nbdkit = start_server(args, "nbd.sock");
}

static void start_nginx(void)
{
    char text[2000];
    CLEANUP_FREE char *config = path_of("nginx.conf"), *log = path_of("error.log");
    int n = snprintf(text, sizeof(text),
                     "%s daemon off; master_process off; pid %s/nginx.pid; error_log %s;\n"
                     "events { worker_connections 256; }\n"
                     "http { access_log off; default_type application/octet-stream;\n"
                     "client_body_temp_path %s/t1; proxy_temp_path %s/t2;\n"
                     "fastcgi_temp_path %s/t3; uwsgi_temp_path %s/t4; scgi_temp_path %s/t5;\n"
                     "server { listen unix:%s/http.sock;\n"
                     "location /files/ { alias %s/; }\n"
                     "location /plain/ { alias %s/; max_ranges 0; } } }\n",
                     geteuid() == 0 ? "user root;" : "", dir, log, dir, dir, dir, dir, dir, dir,
                     dir, dir);
    write_file("nginx.conf", text, (size_t)n);
    char *const args[] = {"nginx", "-c", config, "-e", log, NULL};
    nginx = start_server(args, "http.sock");
}

static void stop_server(pid_t pid)
{
    if (pid > 0 && kill(pid, SIGTERM) == 0)
        waitpid(pid, NULL, 0);
}

/* ------------------------------------------------------------------ trials */

struct trial {
    const char *uri; /* printf() format: the socket's path and number, or the port */
    bool writes;     /* the disk goes to the server */
    struct cutting_plan plan;
    uint64_t number;
    int result; /* of the copy */
    struct dr_error why;
    struct cutting_seen seen;
    time_t seconds;
};

static char *name_of(const struct trial *t, const struct cutting *c)
{
    char *name = NULL;
    int r = t->plan.path
                ? asprintf(&name, "nbd+unix:///%s%.0llu?socket=%s", t->writes ? "target" : "disk",
                           t->writes ? (unsigned long long)t->number + 1 : 0, t->plan.path)
                : asprintf(&name, t->uri, cutting_port(c));
    return r < 0 ? NULL : name;
}

static void copy(struct trial *t, const char *remote, const char *local)
{
    struct dr_open_options raw = {.format = "raw"};
    struct dr_convert_options options = {
        .source = &raw, .out_format = "raw", .no_create = t->writes};
    const char *source = t->writes ? local : remote;
    t->result = dr_convert(&source, 1, t->writes ? remote : local, &options, NULL, &t->why);
}

static void make_target(const struct trial *t)
{
    static const uint8_t other[SIZE] = {1};
    char name[40];
    snprintf(name, sizeof(name), "target%llu", (unsigned long long)t->number + 1);
    if (t->writes)
        write_file(name, other, SIZE);
}

static void run_trial(struct trial *t)
{
    char name[40];
    snprintf(name, sizeof(name), "cut%llu.sock", (unsigned long long)t->number);
    CLEANUP_FREE char *socket = path_of(name);
    snprintf(name, sizeof(name), "copy%llu", (unsigned long long)t->number);
    CLEANUP_FREE char *local = path_of(t->writes ? "disk" : name);
    CLEANUP_FREE char *server = path_of(t->uri ? "http.sock" : "nbd.sock");
    time_t begin = time(NULL);
    t->plan.server = server;
    t->plan.path = t->uri ? NULL : socket;
    make_target(t);
    struct cutting *c = cutting_start(&t->plan);
    CLEANUP_FREE char *remote = c ? name_of(t, c) : NULL;
    if (!remote)
        abort();
    copy(t, remote, local);
    t->seconds = time(NULL) - begin;
    cutting_stop(c, &t->seen);
    t->plan.server = t->plan.path = NULL;
}

/* What is wrong with its outcome; NULL: nothing. */
static const char *judge_trial(struct trial *t)
{
    char name[40];
    snprintf(name, sizeof(name), "%s%llu", t->writes ? "target" : "copy",
             (unsigned long long)t->number + t->writes);
    CLEANUP_FREE char *path = path_of(name);
    const char *wrong = NULL;
    if (t->seconds > PATIENT)
        wrong = "it took too long";
    else if (t->result == 0 && !holds_disk(name))
        wrong = "it succeeded, with wrong bytes";
    else if (t->result < 0 && (!t->why.text[0] || strchr(t->why.text, '\n')))
        wrong = "no line says why";
    else if (t->result < 0 && !t->writes && access(path, F_OK) == 0)
        wrong = "it failed, and left a copy";
    unlink(path);
    return wrong;
}

struct trials {
    struct trial model;
    /* Sets up the trial by its number, and says afterwards what is wrong with it. */
    void (*prepare)(struct trial *t);
    const char *(*judge)(const struct trial *t);
    uint64_t end, stride;
    pthread_mutex_t lock; /* all below */
    uint64_t next;
    unsigned good, failed;
    char wrong[800];
};

static void *work(void *user)
{
    struct trials *all = user;
    for (;;) {
        pthread_mutex_lock(&all->lock);
        struct trial t = all->model;
        t.number = all->next;
        all->next += all->stride;
        bool over = t.number >= all->end || all->wrong[0];
        pthread_mutex_unlock(&all->lock);
        if (over)
            return NULL;
        all->prepare(&t);
        run_trial(&t);
        const char *wrong = judge_trial(&t);
        wrong = wrong || !all->judge ? wrong : all->judge(&t);
        pthread_mutex_lock(&all->lock);
        *(t.result < 0 ? &all->failed : &all->good) += 1;
        if (wrong)
            snprintf(all->wrong, sizeof(all->wrong), "%s %llu: %s: %d: %.400s",
                     t.uri ? t.uri : "nbd", (unsigned long long)t.number, wrong, t.result,
                     t.why.text);
        pthread_mutex_unlock(&all->lock);
    }
}

static void run_all(struct trials *all)
{
    pthread_t threads[WORKERS];
    pthread_mutex_init(&all->lock, NULL);
    for (int i = 0; i < WORKERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, all), 0);
    for (int i = 0; i < WORKERS; i++)
        pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&all->lock);
    if (all->wrong[0])
        fail_msg("%s", all->wrong);
    print_message("%u right, %u refused\n", all->good, all->failed);
    CLEANUP_FREE char *dots = NULL;
    if (asprintf(&dots, "test -z \"$(ls -A %s | grep -E '^[.]|copy|cut')\"", dir) < 0)
        abort();
    assert_int_equal(system(dots), 0);
}

/* A transfer without any cut, which says how long it is. */
static struct cutting_seen measure(const struct trial *model)
{
    struct trial t = *model;
    t.plan.side = CUTTING_NEVER;
    run_trial(&t);
    const char *wrong = judge_trial(&t);
    if (wrong || t.result != 0)
        fail_msg("%s: %s", wrong ? wrong : "uncut", t.why.text);
    return t.seen;
}

/* ------------------------------------------------------------------ cuts */

/* Slow are the many threads of each copy, not the waiting: all bytes are tried by ./dev crash. */
static uint64_t stride(uint64_t n)
{
    return getenv("DROVER_TEST_LONG") ? 1 : n * SLOWER;
}

static void cut_there(struct trial *t)
{
    t->plan.after = t->number;
}

static uint64_t greeted; /* bytes of this side after which the disk is open */

/* What has been opened is read to its end, or written. */
static const char *judge_once(const struct trial *t)
{
    if (t->result == 0)
        return t->uri || t->number >= greeted ? NULL : "it succeeded though it could not begin";
    if (t->number <= greeted)
        return strstr(t->why.text, t->uri ? "cannot be opened" : "cannot connect")
                   ? NULL
                   : "it does not say that it could not begin";
    /* The target is opened twice: to see what it is, and to be written. */
    return t->writes && strstr(t->why.text, "cannot connect") ? NULL : "it was not continued";
}

static void cut_everywhere(struct trial model)
{
    struct cutting_seen seen = measure(&model);
    for (int side = CUTTING_SERVER; side <= CUTTING_CLIENT; side++) {
        struct trials all = {.model = model, .prepare = cut_there, .judge = judge_once};
        all.model.plan.side = (enum cutting_side)side;
        greeted = seen.first[side];
        all.end = seen.bytes[side] + 1;
        all.stride = stride(7);
        run_all(&all);
        assert_true(SLOWER > 1 || (all.good > 0 && all.failed > 0));
    }
}

/* Each connection ends there, so either every one brings something or none does. */
static void cut_every_connection(struct trial model)
{
    struct cutting_seen seen = measure(&model);
    struct trials all = {.model = model, .prepare = cut_there};
    all.model.plan.always = true;
    all.end = seen.bytes[CUTTING_SERVER] + 1;
    all.stride = stride(61);
    setenv("DROVER_NET_RECONNECT", "1", 1);
    run_all(&all);
    setenv("DROVER_NET_RECONNECT", "30", 1);
    assert_true(SLOWER > 1 || (all.good > 0 && all.failed > 0));
}

/* ------------------------------------------------------------------ errors of the server */

static void fail_there(struct trial *t)
{
    t->plan.fail = (unsigned)t->number + 1;
}

static const char *judge_error(const struct trial *t)
{
    return t->result == 0 || strstr(t->why.text, strerror(t->plan.fail_errno))
               ? NULL
               : "the server's error is not told";
}

/* ESHUTDOWN: the server is ending, so each request is sent again. */
static const char *judge_shutdown(const struct trial *t)
{
    return t->result == 0 ? NULL : "it was not sent again";
}

static void fail_in_turn(bool writes, int error, bool on)
{
    struct trial model = {.writes = writes,
                          .plan = {.side = CUTTING_NEVER, .fail_errno = error, .fail_on = on}};
    struct trials all = {.model = model,
                         .prepare = fail_there,
                         .judge = error == ESHUTDOWN ? judge_shutdown : judge_error,
                         .end = measure(&model).requests,
                         .stride = 1};
    assert_true(all.end >= 4);
    run_all(&all);
    assert_true(error == ESHUTDOWN ? all.failed == 0 : all.failed >= 3);
}

/* ------------------------------------------------------------------ the tests */

#define RANGES "http://127.0.0.1:%u/files/disk"
#define PLAIN  "http://127.0.0.1:%u/plain/disk"

static void needs(pid_t server)
{
    if (!server) {
        print_message("nbdkit or nginx is not installed\n");
        skip();
    }
}

static void an_nbd_disk_is_read_whatever_byte_was_the_last(void **state)
{
    (void)state;
    needs(nbdkit);
    cut_everywhere((struct trial){0});
    cut_every_connection((struct trial){0});
}

static void an_nbd_disk_is_written_whatever_byte_was_the_last(void **state)
{
    (void)state;
    needs(nbdkit);
    cut_everywhere((struct trial){.writes = true});
}

static void a_download_by_ranges_goes_on_whatever_byte_was_the_last(void **state)
{
    (void)state;
    needs(nginx);
    cut_everywhere((struct trial){.uri = RANGES});
    cut_every_connection((struct trial){.uri = RANGES});
}

static void a_download_without_ranges_goes_on_whatever_byte_was_the_last(void **state)
{
    (void)state;
    needs(nginx);
    cut_everywhere((struct trial){.uri = PLAIN});
    cut_every_connection((struct trial){.uri = PLAIN});
}

static void an_error_of_any_nbd_request_is_told(void **state)
{
    (void)state;
    needs(nbdkit);
    for (int on = 0; on < 2; on++) {
        fail_in_turn(false, EIO, on);
        fail_in_turn(true, EIO, on);
        fail_in_turn(true, ENOSPC, on);
    }
    fail_in_turn(false, ESHUTDOWN, false);
    fail_in_turn(true, ESHUTDOWN, false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_nbd_disk_is_read_whatever_byte_was_the_last),
        cmocka_unit_test(an_nbd_disk_is_written_whatever_byte_was_the_last),
        cmocka_unit_test(a_download_by_ranges_goes_on_whatever_byte_was_the_last),
        cmocka_unit_test(a_download_without_ranges_goes_on_whatever_byte_was_the_last),
        cmocka_unit_test(an_error_of_any_nbd_request_is_told),
    };
    CLEANUP_FREE char *path = NULL, *clean = NULL;
    for (size_t i = 0; i < SIZE; i++)
        disk[i] = (uint8_t)(i * 7 + i / 251 + 1);
    if (asprintf(&path, "%s:/usr/sbin", getenv("PATH")) < 0 || !mkdtemp(dir))
        return 77;
    setenv("PATH", path, 1);
    setenv("DROVER_NET_RECONNECT", "30", 1);
    write_file("disk", disk, SIZE);
    start_nbdkit();
    start_nginx();
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    stop_server(nbdkit);
    stop_server(nginx);
    return asprintf(&clean, "rm -rf %s", dir) < 0 || system(clean) != 0 ? 1 : r;
}
