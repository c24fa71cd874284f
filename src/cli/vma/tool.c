/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Called as vma: the arguments, lines and exit codes that Proxmox VE's scripts know. */
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

#include "cli/vma/vma.h"

static int usage(void)
{
    printf("usage: vma command [command options]\n"
           "\n"
           "vma list <filename>\n"
           "vma config <filename> [-c <config>]\n"
           "vma create <filename> [-c <config>] [-d format=<format>:<device name>=<path> "
           "[-d ...]]\n"
           "vma extract <filename> [-d <drive-list>] [-r <fifo>] <targetdir>\n"
           "vma verify <filename> [-v]\n");
    return 1;
}

/* Everything that the options of the commands may set. */
struct use {
    const struct cli *cli;
    bool verbose;
    struct cli_args hits; /* -c and -d */
    char **operands;
    int n;
};

static bool add_hit(struct cli_args *args, int key, const char *arg)
{
    struct cli_hit *bigger = reallocarray(args->hits, args->n_hits + 1, sizeof(*bigger));

    if (!bigger)
        return false;
    args->hits = bigger;
    args->hits[args->n_hits++] = (struct cli_hit){key, arg};
    return true;
}

/* False: wrong, or help is wanted. */
static bool get_options(struct use *u, int argc, char **argv, const char *letters)
{
    int c;

    optind = 0;
    opterr = 0;
    while ((c = getopt(argc, argv, letters)) != -1) {
        if (c == 'h' || c == '?' || !add_hit(&u->hits, c, optarg))
            return false;
    }
    u->operands = argv + optind;
    u->n = argc - optind;
    u->verbose = cli_has(&u->hits, 'v');
    return true;
}

/* ------------------------------------------------------------------ list, config, verify */

static int tool_list(struct use *u)
{
    CLEANUP_VMA struct dr_vma *vma = NULL;

    if (u->n != 1)
        return usage();
    if (vma_open(u->cli, u->operands[0], false, &vma) < 0)
        return 1;
    return vma_print_listing(u->cli, u->operands[0], dr_vma_header(vma)) < 0;
}

static int tool_config(struct use *u)
{
    CLEANUP_VMA struct dr_vma *vma = NULL;
    const char *name = cli_has(&u->hits, 'c') ? cli_value(&u->hits, 'c') : "qemu-server.conf";

    if (u->n != 1)
        return usage();
    if (vma_open(u->cli, u->operands[0], false, &vma) < 0)
        return 1;
    if (vma_print_config(dr_vma_header(vma), name) == 0)
        return 0;
    fprintf(stderr, "unable to find configuration data '%s'\n", name);
    return 255;
}

static int tool_verify(struct use *u)
{
    CLEANUP_VMA struct dr_vma *vma = NULL;
    const struct dr_vma_extract_options o = {0};
    struct dr_vma_extract_result result = {0};
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_REPORT struct vma_report report = {0};

    if (u->n != 1)
        return usage();
    if (vma_open(u->cli, u->operands[0], false, &vma) < 0)
        return 1;
    if (u->verbose && vma_print_listing(u->cli, u->operands[0], dr_vma_header(vma)) < 0)
        return 1;
    vma_report_begin(u->cli, &report, u->verbose);
    int r = dr_vma_extract(vma, &o, report.job.job, &result, &err);
    if (r == -ECANCELED && cli_signalled())
        return cli_job_failed(&report.job, r, &err, 1, "nothing was decided");
    if (r < 0) {
        cli_error(u->cli, "verify failed - %s", err.text);
        return 1;
    }
    if (u->verbose)
        vma_report_totals(&result);
    return 0;
}

static int tool_extract(struct use *u)
{
    if (u->n != 2)
        return usage();
    return vma_restore(u->cli, &(struct vma_restore){
                                   .archive = u->operands[0],
                                   .dir = u->operands[1],
                                   .fifo = cli_value(&u->hits, 'r'),
                                   .disks = cli_value(&u->hits, 'd'),
                                   .verbose = u->verbose,
                               });
}

/* ------------------------------------------------------------------ create */

struct child {
    pid_t pid; /* 0 = none */
    pid_t all; /* whom to signal: its process group, or it alone */
    int fd;
};

/* Somebody may sit there, of whom the command wants to know a password: in a group of its own it
 * would be stopped for asking. The terminal's keys reach all of it as they are. */
static bool has_terminal(void)
{
    int fd = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY);

    if (fd < 0)
        return false;
    close(fd);
    return true;
}

static int start_child(const struct cli *cli, const char *command, struct child *child)
{
    bool group = !has_terminal();
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0) {
        cli_error(cli, "no pipe: %s", strerror(errno));
        return -1;
    }
    child->pid = fork();
    if (child->pid == 0) {
        if (group) /* so that a failure ends all that the command is made of */
            setpgid(0, 0);
        signal(SIGPIPE, SIG_DFL);
        signal(SIGXFSZ, SIG_DFL);
        dup2(ends[0], STDIN_FILENO);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(ends[0]);
    child->fd = ends[1];
    if (child->pid > 0) {
        if (group)
            setpgid(child->pid, child->pid);
        child->all = group ? -child->pid : child->pid;
        return 0;
    }
    cli_error(cli, "no process for '%s': %s", command, strerror(errno));
    close(ends[1]);
    return -1;
}

/* Until it ends; who wants us to stop wants it to stop, too. */
static pid_t wait_for_child(const struct child *child, int *status)
{
    const struct timespec moment = {0, 10 * 1000 * 1000};
    bool told = false;
    pid_t pid;

    while ((pid = waitpid(child->pid, status, WNOHANG)) == 0 || (pid < 0 && errno == EINTR)) {
        if (cli_signalled() && !told)
            told = kill(child->all, SIGTERM) == 0;
        nanosleep(&moment, NULL);
    }
    return pid;
}

/* r: how the archive went. What got no whole archive must not end as if it had. */
static int end_child(const struct cli *cli, const char *command, const struct child *child, int r)
{
    int status = 0;

    if (r < 0 && r != -EPIPE)
        kill(child->all, SIGTERM);
    close(child->fd);
    pid_t pid = wait_for_child(child, &status);
    if (pid < 0)
        cli_error(cli, "'%s' cannot be waited for: %s", command, strerror(errno));
    else if (r < 0 && r != -EPIPE)
        return -1; /* by us */
    else if (WIFSIGNALED(status) && cli_signalled())
        cli_error(cli, "interrupted: '%s' was ended", command);
    else if (WIFSIGNALED(status))
        cli_error(cli, "'%s' was ended by signal %d", command, WTERMSIG(status));
    else if (WEXITSTATUS(status) != 0)
        cli_error(cli, "'%s' failed with exit status %d", command, WEXITSTATUS(status));
    return pid < 0 || status != 0 ? -1 : 0;
}

static void print_images(const struct vma_source *s, const struct dr_vma_create_result *result)
{
    for (size_t i = 0; i < s->n_disks; i++) {
        uint64_t size = result->disks[i].size, zeros = result->disks[i].zero_bytes;
        fprintf(stderr, "image %s: size=%" PRIu64 " zeros=%" PRIu64 " saved=%" PRIu64 "\n",
                s->disks[i].name, size, zeros, size - (zeros < size ? zeros : size));
    }
}

static int create(struct use *u, struct vma_source *s)
{
    static const char prefix[] = "exec:";
    const char *path = u->operands[0];
    const char *command = strncmp(path, prefix, strlen(prefix)) == 0 ? path + strlen(prefix) : NULL;
    uint64_t zeros = 0;
    struct child child = {0};
    CLEANUP_FREE struct dr_vma_create_result *result = calloc(1, sizeof(*result));
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_REPORT struct vma_report report = {0};

    /* First: an end by a signal must not look like an end of the archive to the command. */
    vma_report_begin_create(u->cli, &report, u->verbose ? &zeros : NULL);
    if (!result || (command && start_child(u->cli, command, &child) < 0))
        return 1;
    const struct dr_vma_create_options o = {
        .disks = s->disks,
        .n_disks = s->n_disks,
        .configs = s->configs,
        .n_configs = s->n_configs,
        .use_fd = command,
        .fd = child.fd,
        .no_sums = true,
        .zero_so_far = &zeros,
    };
    int r = dr_vma_create(path, &o, report.job.job, result, &err);
    int ended = command ? end_child(u->cli, command, &child, r) : 0;
    if ((r == 0 || r == -EPIPE) && ended < 0)
        return cli_signalled() ? cli_signalled() : 1; /* why was told */
    if (r < 0)
        return cli_job_failed(&report.job, r, &err, 1, "no archive was made");
    if (u->verbose)
        print_images(s, result);
    return 0;
}

static int tool_create(struct use *u)
{
    CLEANUP_SOURCE struct vma_source s = {.cli = u->cli};
    const struct cli_args none = {0};

    if (u->n < 1)
        return usage();
    if (u->n > 1 && cli_has(&u->hits, 'd')) {
        cli_error(u->cli, "disks are given either with -d or behind the name of the archive");
        return 1;
    }
    if (u->n > 1)
        cli_error(u->cli,
                  "warning: disks without -d are deprecated, and their formats are guessed");
    for (size_t i = 0; i < u->hits.n_hits; i++) {
        const struct cli_hit *hit = &u->hits.hits[i];
        if ((hit->key == 'c' && vma_source_config(&s, hit->arg) != 0) ||
            (hit->key == 'd' && vma_source_disk(&s, &none, hit->arg) != 0))
            return 1;
    }
    for (int i = 1; i < u->n; i++) {
        if (vma_source_disk(&s, &none, u->operands[i]) != 0)
            return 1;
    }
    return create(u, &s);
}

/* ------------------------------------------------------------------ commands */

int vma_tool(const struct cli *cli, int argc, char **argv)
{
    static const struct {
        const char *name, *letters;
        int (*run)(struct use *u);
    } commands[] = {
        {"list", "h", tool_list},          {"config", "hc:", tool_config},
        {"create", "hvc:d:", tool_create}, {"extract", "hvr:d:", tool_extract},
        {"verify", "hv", tool_verify},
    };
    struct use u = {.cli = cli};

    for (size_t i = 0; argc > 1 && i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (strcmp(argv[1], commands[i].name) != 0)
            continue;
        bool good = get_options(&u, argc - 1, argv + 1, commands[i].letters);
        int code = good ? commands[i].run(&u) : usage();
        cli_args_free(&u.hits);
        return code;
    }
    return usage();
}
