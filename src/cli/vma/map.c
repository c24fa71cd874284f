/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>

#include "cli/vma/vma.h"

/* ------------------------------------------------------------------ one line */

static int refuse(const struct cli *cli, const char *what, const char *line)
{
    cli_error(cli, "read map failed - %s ('%s')", what, line);
    return -1;
}

/* "name=VALUE:" at *at → *value, and *at stands behind it. 1: it was there, 0: it was not, or -1.
 */
static int take_option(const struct cli *cli, char **at, const char *name, char **value)
{
    size_t n = strlen(name);

    if (strncmp(*at, name, n) != 0 || (*at)[n] != '=')
        return 0;
    char *text = *at + n + 1, *colon = strchr(text, ':');
    if (*value) {
        cli_error(cli, "read map failed - duplicate value for option '%s'", name);
        return -1;
    }
    if (!colon) {
        cli_error(cli, "read map failed - option '%s' not terminated", name);
        return -1;
    }
    *value = strndup(text, (size_t)(colon - text));
    *at = colon + 1;
    return *value ? 1 : -1;
}

static int take_options(const struct cli *cli, char **at, struct vma_map_line *l, char **bps)
{
    const struct {
        const char *name;
        char **value;
    } options[] = {{"format", &l->format},
                   {"throttling.bps", bps},
                   {"throttling.group", &l->group},
                   {"cache", &l->cache}};
    int any = 1;

    while (any > 0) {
        any = 0;
        for (size_t i = 0; i < sizeof(options) / sizeof(options[0]) && any == 0; i++)
            any = take_option(cli, at, options[i].name, options[i].value);
    }
    return any;
}

static int get_number(const struct cli *cli, const char *text, uint64_t *number)
{
    char *end;

    if (!text)
        return 0;
    errno = 0;
    *number = strtoull(text, &end, 0);
    if (*text >= '0' && *text <= '9' && *end == '\0' && errno == 0)
        return 0;
    cli_error(cli, "read map failed - not a number: %s", text);
    return -1;
}

static int parse_skip(const struct cli *cli, const char *at, struct vma_map_line *l)
{
    l->skip = true;
    if (*at != '=' || !at[1]) {
        cli_error(cli, "read map failed - option 'skip' has no value");
        return -1;
    }
    l->name = strdup(at + 1);
    return l->name ? 0 : -1;
}

static int parse_map(const struct cli *cli, char *line, struct vma_map_line *l)
{
    CLEANUP_FREE char *bps = NULL;
    char *at = line;

    if (take_options(cli, &at, l, &bps) < 0 || get_number(cli, bps, &l->bps) < 0)
        return -1;
    if ((at[0] != '0' && at[0] != '1') || at[1] != ':')
        return refuse(cli, "parse error", line);
    l->write_zeros = at[0] == '1';
    at += 2;
    char *equals = strchr(at, '=');
    if (!equals || equals == at)
        return refuse(cli, "no dev name specified", line);
    l->name = strndup(at, (size_t)(equals - at));
    l->path = strdup(equals + 1);
    return l->name && l->path ? 0 : -1;
}

static void drop_line(struct vma_map_line *l)
{
    free(l->name);
    free(l->path);
    free(l->format);
    free(l->cache);
    free(l->group);
}

static int add_line(const struct cli *cli, struct vma_map *map, char *line)
{
    struct vma_map_line l = {0};
    struct vma_map_line *bigger = reallocarray(map->lines, map->n + 1, sizeof(*bigger));

    if (!bigger)
        return -1;
    map->lines = bigger;
    bool skip = strncmp(line, "skip", 4) == 0 && (line[4] == '=' || !line[4]);
    int r = skip ? parse_skip(cli, line + 4, &l) : parse_map(cli, line, &l);
    if (r < 0)
        drop_line(&l);
    else
        map->lines[map->n++] = l;
    return r;
}

const struct vma_map_line *vma_map_find(const struct vma_map *map, const char *name)
{
    for (size_t i = map->n; i > 0; i--) { /* the last one counts */
        if (strcmp(map->lines[i - 1].name, name) == 0)
            return &map->lines[i - 1];
    }
    return NULL;
}

void vma_map_free(struct vma_map *map)
{
    for (size_t i = 0; i < map->n; i++)
        drop_line(&map->lines[i]);
    free(map->lines);
    *map = (struct vma_map){0};
}

/* ------------------------------------------------------------------ all lines */

#define LINE_MAX_LENGTH 8191

struct reader {
    const struct cli *cli;
    const char *name;
    int fd;
    size_t n;
    char buf[LINE_MAX_LENGTH + 1];
};

/* Until there is something to read, or a signal says stop. A FIFO that was opened without waiting
 * for its writer is not at its end before one has come and gone. */
static int wait_for_data(const struct reader *r)
{
    struct pollfd p = {.fd = r->fd, .events = POLLIN};
    sigset_t stops, before;

    sigemptyset(&stops);
    sigaddset(&stops, SIGINT);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGHUP);
    sigprocmask(SIG_BLOCK, &stops, &before);
    int n = 0;
    while (n <= 0 && !cli_signalled()) {
        n = ppoll(&p, 1, NULL, &before);
        if (n < 0 && errno != EINTR)
            break;
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (cli_signalled())
        cli_error(r->cli, "interrupted: nothing was restored");
    return n > 0 ? 0 : -1;
}

/* More bytes into buf: their number, 0 = the end, -1 after a message. */
static ssize_t fill(struct reader *r)
{
    while (wait_for_data(r) == 0) {
        ssize_t n = read(r->fd, r->buf + r->n, sizeof(r->buf) - r->n);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n < 0)
            cli_error(r->cli, "read map failed - %s: %s", r->name, strerror(errno));
        return n;
    }
    return -1;
}

/* The next line without its end; NULL: there is none, and *failed if that is not the end. */
static char *next_line(struct reader *r, char *line, bool *failed)
{
    char *end;
    ssize_t n = 1;

    while (!(end = memchr(r->buf, '\n', r->n)) && n > 0 && r->n < sizeof(r->buf)) {
        n = fill(r);
        if (n > 0)
            r->n += (size_t)n;
    }
    *failed = n < 0;
    if (!end && r->n == sizeof(r->buf)) {
        cli_error(r->cli, "read map failed - parse error (a line is longer than %d bytes)",
                  LINE_MAX_LENGTH);
        *failed = true;
    }
    if (*failed || (!end && r->n == 0))
        return NULL;
    size_t len = end ? (size_t)(end - r->buf) : r->n, used = end ? len + 1 : len;
    memcpy(line, r->buf, len);
    line[len] = '\0';
    memmove(r->buf, r->buf + used, r->n - used);
    r->n -= used;
    return line;
}

static int read_lines(struct reader *r, struct vma_map *map)
{
    CLEANUP_FREE char *line = malloc(LINE_MAX_LENGTH + 2);
    bool failed = false;

    if (!line)
        return -1;
    while (next_line(r, line, &failed)) {
        if (!*line || strcmp(line, "done") == 0)
            return 0;
        if (add_line(r->cli, map, line) < 0)
            return -1;
    }
    return failed ? -1 : 0;
}

int vma_map_read(const struct cli *cli, const char *fifo, struct vma_map *map)
{
    CLEANUP_CLOSE int fd = open(fifo, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    CLEANUP_FREE struct reader *r = calloc(1, sizeof(*r));

    if (fd < 0 || !r) {
        cli_error(cli, "unable to open fifo %s: %s", fifo, strerror(errno));
        return -1;
    }
    r->cli = cli;
    r->name = fifo;
    r->fd = fd;
    return read_lines(r, map);
}
