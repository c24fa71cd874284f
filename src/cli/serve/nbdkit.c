/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Finding nbdkit and our plugin, and running them on sockets that are there already. */
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "cli/common/image.h"
#include "cli/serve/serve.h"

/* ------------------------------------------------------------------ words */

void words_add(struct words *w, const char *fmt, ...)
{
    char **more = realloc(w->words, (w->n + 2) * sizeof(*more)), *word = NULL;
    va_list ap;

    va_start(ap, fmt);
    if (vasprintf(&word, fmt, ap) < 0)
        word = NULL;
    va_end(ap);
    if (more)
        w->words = more;
    if (!more || !word) {
        free(word);
        w->failed = true;
        return;
    }
    more[w->n++] = word;
    more[w->n] = NULL;
}

void words_free(struct words *w)
{
    for (size_t i = 0; i < w->n; i++)
        free(w->words[i]);
    free(w->words);
    *w = (struct words){0};
}

/* ------------------------------------------------------------------ where they are */

static char *in_path(const char *name)
{
    CLEANUP_FREE char *path = strdup(getenv("PATH") ? getenv("PATH") : "/usr/bin:/bin");
    char *rest = NULL;

    for (char *dir = path ? strtok_r(path, ":", &rest) : NULL; dir;
         dir = strtok_r(NULL, ":", &rest)) {
        char *full = NULL;
        if (asprintf(&full, "%s/%s", dir, name) < 0)
            return NULL;
        if (access(full, X_OK) == 0)
            return full;
        free(full);
    }
    return NULL;
}

/* Beside the program, where it is built; then where both are installed, wherever the tree was
 * moved; then where it was to be installed. */
static char *find_plugin(void)
{
    static const char *const places[] = {
        "/nbdkit-drover-plugin.so", "/../" DR_LIBDIR "/nbdkit/plugins/nbdkit-drover-plugin.so"};
    char self[PATH_MAX], *full = NULL;
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    char *slash = n > 0 ? memrchr(self, '/', (size_t)n) : NULL;

    for (size_t i = 0; slash && i < sizeof(places) / sizeof(places[0]); i++) {
        *slash = '\0';
        int r = asprintf(&full, "%s%s", self, places[i]);
        if (r >= 0 && access(full, R_OK) == 0)
            return full;
        if (r >= 0)
            free(full);
    }
    full = strdup(DR_PREFIX "/" DR_LIBDIR "/nbdkit/plugins/nbdkit-drover-plugin.so");
    if (full && access(full, R_OK) == 0)
        return full;
    free(full);
    return NULL;
}

int nbdkit_find(const struct cli *cli, char **program, char **plugin)
{
    const char *said = getenv("NBDKIT"), *said_plugin = getenv("DROVER_NBDKIT_PLUGIN");

    *program = said && *said ? strdup(said) : in_path("nbdkit");
    *plugin = said_plugin && *said_plugin ? strdup(said_plugin) : find_plugin();
    if (!*program || access(*program, X_OK) < 0) {
        cli_error(cli, "%s: not found: install nbdkit, or say in $NBDKIT where it is",
                  *program ? *program : "nbdkit");
        return 1;
    }
    if (!*plugin || access(*plugin, R_OK) < 0) {
        cli_error(cli,
                  "%s: not found: build drover with nbdkit-plugin-dev installed, or say in "
                  "$DROVER_NBDKIT_PLUGIN where it is",
                  *plugin ? *plugin : "nbdkit-drover-plugin.so");
        return 1;
    }
    return 0;
}

/* ------------------------------------------------------------------ running it */

struct handed {
    const struct cli_secret *secrets;
    int *fds;
    size_t n;
};

static void handed_close(struct handed *h)
{
    for (size_t i = 0; i < h->n; i++)
        close(h->fds[i]);
    free(h->fds);
}

/* A copy of it, in memory only. */
static int secret_file(const struct cli_secret *s)
{
    int fd = memfd_create("secret", MFD_CLOEXEC), high = -1;

    if (fd >= 0 && write(fd, s->text, s->len) == (ssize_t)s->len && lseek(fd, 0, SEEK_SET) == 0)
        high = fcntl(fd, F_DUPFD_CLOEXEC, LISTEN_FIRST + LISTEN_MOST + 1);
    if (fd >= 0)
        close(fd);
    return high;
}

static int handed_fill(const struct cli *cli, struct handed *h)
{
    size_t n;

    h->secrets = cli_secrets(&n);
    h->fds = calloc(n + 1, sizeof(*h->fds));
    for (; h->fds && h->n < n; h->n++)
        if ((h->fds[h->n] = secret_file(&h->secrets[h->n])) < 0)
            break;
    if (h->fds && h->n == n)
        return 0;
    cli_error(cli, "cannot hand the secrets to nbdkit: %s", strerror(errno));
    return 1;
}

/* In the child: sockets from LISTEN_FIRST on, nothing else that we have open but told and the
 * secrets. */
static void hand_over(const struct listener *l, const struct handed *handed, int told)
{
    int fds[LISTEN_MOST], out = fcntl(told, F_DUPFD, LISTEN_FIRST + LISTEN_MOST);
    char number[32];

    for (size_t i = 0; i < l->n; i++)
        fds[i] = fcntl(l->fds[i], F_DUPFD_CLOEXEC, LISTEN_FIRST + LISTEN_MOST + 1);
    for (size_t i = 0; i < l->n; i++)
        dup2(fds[i], LISTEN_FIRST + (int)i);
    if (dup2(out, LISTEN_FIRST + LISTEN_MOST) < 0)
        _exit(127);
    if (out != LISTEN_FIRST + LISTEN_MOST)
        close(out);
    for (size_t i = 0; i < handed->n; i++)
        fcntl(handed->fds[i], F_SETFD, 0);
    snprintf(number, sizeof(number), "%ld", (long)getpid());
    setenv("LISTEN_PID", number, 1);
    snprintf(number, sizeof(number), "%zu", l->n);
    setenv("LISTEN_FDS", number, 1);
    unsetenv("LISTEN_FDNAMES");
}

/* nbdkit and its options, the plugin and its parameters. Secrets stand in files in memory, whose
 * numbers are on the command line. */
static int command_line(const struct cli *cli, const struct words *options,
                        const struct words *parameters, const struct handed *handed,
                        struct words *all)
{
    char *program = NULL, *plugin = NULL;
    int code = nbdkit_find(cli, &program, &plugin);

    if (code == 0) {
        words_add(all, "%s", program);
        words_add(all, "--foreground");
        words_add(all, "--exit-with-parent");
        for (size_t i = 0; i < options->n; i++)
            words_add(all, "%s", options->words[i]);
        words_add(all, "%s", plugin);
        words_add(all, "ready-fd=%d", LISTEN_FIRST + LISTEN_MOST);
        for (size_t i = 0; i < handed->n; i++)
            words_add(all, "secret=%s,fd=%d", handed->secrets[i].id, handed->fds[i]);
        for (size_t i = 0; i < parameters->n; i++)
            words_add(all, "%s", parameters->words[i]);
    }
    free(program);
    free(plugin);
    if (code == 0 && (all->failed || options->failed || parameters->failed)) {
        cli_error(cli, "out of memory");
        return 1;
    }
    return code;
}

static pid_t spawn(const struct words *all, const struct listener *l, const struct handed *handed,
                   int told)
{
    pid_t pid = fork();
    sigset_t none;

    if (pid != 0)
        return pid;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    hand_over(l, handed, told);
    execv(all->words[0], all->words);
    dprintf(STDERR_FILENO, "drover: %s: %s\n", all->words[0], strerror(errno));
    _exit(127);
}

/* A line comes when it serves; nothing, when it ended before. */
static int wait_until_ready(const struct cli *cli, struct server *server)
{
    char line[8];
    int status;

    if (read(server->told, line, sizeof(line)) > 0)
        return 0;
    while (waitpid(server->pid, &status, 0) < 0 && errno == EINTR)
        continue;
    if (WIFSIGNALED(status))
        cli_error(cli, "nbdkit was killed by signal %d", WTERMSIG(status));
    close(server->told);
    return 1;
}

int nbdkit_start(const struct cli *cli, const struct words *options, const struct words *parameters,
                 const struct listener *l, struct server *server)
{
    struct words all = {0};
    struct handed handed = {0};
    int told[2], code = handed_fill(cli, &handed);

    if (code == 0)
        code = command_line(cli, options, parameters, &handed, &all);

    if (code == 0 && pipe2(told, O_CLOEXEC) < 0) {
        cli_error(cli, "cannot make a pipe: %s", strerror(errno));
        code = 1;
    }
    if (code == 0) {
        server->told = told[0];
        server->pid = spawn(&all, l, &handed, told[1]);
        handed_close(&handed);
        handed = (struct handed){0};
        close(told[1]);
        code = server->pid < 0 ? 1 : wait_until_ready(cli, server);
        if (server->pid < 0)
            cli_error(cli, "cannot start nbdkit: %s", strerror(errno));
    }
    handed_close(&handed);
    words_free(&all);
    return code;
}

int nbdkit_ended(const struct cli *cli, struct server *server, int status)
{
    char line[8];
    bool closed_well = read(server->told, line, sizeof(line)) > 0;

    close(server->told);
    if (closed_well && WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    if (WIFSIGNALED(status))
        cli_error(cli, "nbdkit was killed by signal %d: what was not flushed may be lost",
                  WTERMSIG(status));
    else if (!closed_well)
        cli_error(cli, "not all disks were closed well: what was not flushed may be lost");
    else
        cli_error(cli, "nbdkit ended with exit code %d", WEXITSTATUS(status));
    return 1;
}
