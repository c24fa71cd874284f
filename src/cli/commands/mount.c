/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* `drover mount` and `drover unmount`. In the background a child serves the disk; the parent waits
 * on a pipe until the child says that the mount works, or has printed why it does not and ended.
 * The child opens the disk itself and makes the control socket, because locks and threads would not
 * survive the fork. Opening, control and state are those of `drover serve`: exports/disk-list.h,
 * with one disk in the list. */
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <syslog.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "exports/disk-list.h"
#include "exports/fuse.h"

static const struct cli_option mount_options[] = {
    {'r', "read-only", NULL, "refuse writes; what cannot be written needs this", false},
    {'l', "snapshot", "NAME", "mount what a snapshot inside shows, read-only: a name, or an id",
     false},
    {'t', "cache", "CACHE", "none, writeback, writethrough, directsync or unsafe", false},
    {KEY_TEMPORARY, "temporary", NULL, "writable, and what is written is thrown away at the end",
     false},
    {KEY_NAME, "name", "NAME", "the name of the file in DIR; otherwise that of the disk", false},
    {KEY_CONTROL, "control", "SOCKET", "let `drover ctl SOCKET` work on the disk", false},
    {KEY_STATE, "state", "FILE", "go on there with the image and job that an earlier mount had",
     false},
    {KEY_ON_ERROR, "on-error", "WHAT",
     "writes that fail: report (default) or wait: enospc (no space), stop (all)", false},
    {KEY_FOREGROUND, "foreground", NULL, "stay until the disk is unmounted or Ctrl-C", false},
    {KEY_ALLOW_OTHER, "allow-other", NULL, "let other users in, as the file's mode says", false},
    {KEY_ALLOW_ROOT, "allow-root", NULL, "let root in besides the user who mounts", false},
    {0, NULL, NULL, NULL, false},
};

struct mount {
    const struct cli *cli;
    struct cli_image image;
    struct disk_list list;
    struct dr_fuse_options fuse;
    char *name, *source;
    bool background;
    int told;           /* background: the parent waits for a byte here */
    atomic_bool silent; /* nobody reads our standard error any more */
    bool lost;          /* closing the disk failed */
};

static void mount_free(struct mount *m)
{
    disk_list_free(&m->list);
    cli_image_free(&m->image);
    free(m->name);
    free(m->source);
}

/* The file is called as the disk's own file is, or as the member of a file that holds several. */
static char *file_name(const char *path)
{
    CLEANUP_FREE char *file = dr_name_file(path);
    const char *member = dr_name_format(path) ? strrchr(path, '#') : NULL;

    if (!file)
        return NULL;
    const char *slash = strrchr(file, '/');
    char *name = strdup(member && member[1] ? member + 1 : slash ? slash + 1 : file);
    for (char *p = name; p && *p; p++) {
        if (*p == '/')
            *p = '_';
    }
    return name;
}

static bool name_is_good(const char *name)
{
    return name[0] && !strchr(name, '/') && strlen(name) < 256 && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0;
}

static int get_names(struct mount *m, const struct cli_args *args)
{
    const char *name = cli_value(args, KEY_NAME);
    CLEANUP_FREE char *file = dr_name_file(m->image.path);

    m->name = name ? strdup(name) : file_name(m->image.path);
    m->source = file ? realpath(file, NULL) : NULL;
    if (!m->source)
        m->source = strdup(m->image.path);
    if (!m->name || !m->source) {
        cli_error(m->cli, "out of memory");
        return 1;
    }
    if (!name_is_good(m->name))
        return cli_usage(m->cli, "'%s' cannot be the name of a file", m->name);
    m->fuse.name = m->name;
    m->fuse.source = m->source;
    return 0;
}

/* 0, or 1 after a message. */
static int set(struct mount *m, const char *key, const char *value)
{
    struct dr_error err = DR_ERROR_INIT;

    if (!value || disk_list_config(&m->list, key, value, &err) == 0)
        return 0;
    cli_fail(m->cli, &err);
    return 1;
}

/* The list gets the one disk, to be opened as the options of an image say. */
static int fill_list(struct mount *m, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;
    const char *policy = cli_value(args, KEY_ON_ERROR), *allow;

    if (set(m, "disk", m->image.path) != 0)
        return 1;
    struct disk_settings *settings = &m->list.served->settings;
    settings->open = m->image.open;
    settings->open.flags &= ~(unsigned)DR_OPEN_RDWR;
    settings->temporary = cli_has(args, KEY_TEMPORARY);
    if (!settings->temporary)
        settings->mode = m->image.open.flags & DR_OPEN_RDWR ? DISK_READ_WRITE : DISK_READ_ONLY;
    if (set(m, "export", m->name) != 0 || set(m, "control", cli_value(args, KEY_CONTROL)) != 0 ||
        set(m, "state", cli_value(args, KEY_STATE)) != 0 ||
        set(m, "on-error", policy ? policy : "report") != 0)
        return 1;
    for (size_t i = 0; (allow = cli_nth_value(args, KEY_ALLOW_PATH, i)); i++) {
        if (set(m, "allow-path", allow) != 0)
            return 1;
    }
    if (disk_list_complete(&m->list, &err) == 0)
        return 0;
    cli_fail(m->cli, &err);
    return 1;
}

static int get_options(struct mount *m, const struct cli_args *args)
{
    const char *cache = cli_value(args, 't');
    bool read_only = cli_has(args, 'r') || cli_has(args, 'l');
    bool temporary = cli_has(args, KEY_TEMPORARY);
    unsigned ignored = 0;

    if (args->n_operands != 2)
        return cli_usage(m->cli, "Expecting an image file name and a directory");
    struct cli_image_spec spec = {.name = args->operands[0], .format_key = 'f', .cache_key = 't'};
    if (temporary && read_only)
        return cli_usage(m->cli, "--temporary is for writing: leave -r and -l out");
    if (!read_only && !temporary)
        spec.flags = DR_OPEN_RDWR;
    if (cli_image_get(m->cli, args, &spec, &m->image) != 0 ||
        cli_refuse_copy_on_read(m->cli, &m->image) < 0)
        return 1;
    m->image.open.snapshot = cli_value(args, 'l');
    if (cache)
        cli_cache_flags(cache, &ignored, &m->fuse.writethrough);
    m->fuse.mountpoint = args->operands[1];
    m->fuse.allow_other = cli_has(args, KEY_ALLOW_OTHER);
    m->fuse.allow_root = cli_has(args, KEY_ALLOW_ROOT);
    if (m->fuse.allow_other && m->fuse.allow_root)
        return cli_usage(m->cli, "--allow-other and --allow-root exclude each other");
    int code = get_names(m, args);
    return code ? code : fill_list(m, args);
}

/* Called when the file can be used. The parent returns, and nobody may wait any longer for what
 * this process has to say on its standard output. */
static void ready(void *user)
{
    struct mount *m = user;

    if (!m->background)
        return;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; null >= 0 && fd < 3; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    atomic_store(&m->silent, true);
    while (write(m->told, "", 1) < 0 && errno == EINTR)
        ;
}

static void message(void *user, const char *text)
{
    struct mount *m = user;

    if (atomic_load(&m->silent))
        syslog(LOG_DAEMON | LOG_ERR, "%s: %s", m->source, text);
    else
        cli_error(m->cli, "%s", text);
}

static void tell_waiting(void *user, const char *name, const char *text)
{
    CLEANUP_FREE char *line = NULL;

    dr_fuse_stalled();
    if (asprintf(&line, "%s: writes wait: %s", name, text) >= 0)
        message(user, line);
}

static void tell_close(void *user, const struct dr_error *err)
{
    struct mount *m = user;

    message(m, err->text);
    m->lost = true;
}

/* What clients of the control socket want. */

static void quit(void *user)
{
    (void)user;
    dr_fuse_end();
}

static void resized(void *user, const char *name)
{
    (void)user;
    (void)name;
    dr_fuse_resized();
}

static void write_back(void *user, const char *name)
{
    (void)user;
    (void)name;
    dr_fuse_write_back();
}

/* The list has one disk. */
static int open_disk(struct mount *m, struct served *served)
{
    const struct dr_live_options control = {
        .quit = quit, .user = m, .resized = resized, .write_back = write_back};
    struct dr_error err = DR_ERROR_INIT;

    /* With a state the disk may have gone on without this image. */
    if (!m->list.state && cli_image_check(m->cli, &m->image) < 0)
        return -EINVAL;
    int r = disk_list_recall(&m->list, &err);
    if (r < 0) {
        cli_fail(m->cli, &err);
        return r;
    }
    r = disk_list_open(&m->list, &control, &err);
    if (r < 0 && !served->disk)
        cli_fail_open(m->cli, served->path, &err);
    else if (r < 0)
        cli_fail(m->cli, &err);
    return r;
}

static int serve(struct mount *m)
{
    struct dr_error err = DR_ERROR_INIT;
    struct served *served = m->list.served;

    if (!served)
        return 1;
    m->list.waits = tell_waiting;
    m->list.user = m;
    m->fuse.ready = ready;
    m->fuse.message = message;
    m->fuse.user = m;
    dr_fuse_block_signals();
    int r = open_disk(m, served);
    if (r == 0) {
        m->fuse.stall = served->stall;
        r = dr_fuse_serve(served->disk, &m->fuse, &err);
        if (r < 0)
            message(m, err.text);
    }
    disk_list_close(&m->list, tell_close, m);
    return r < 0 || m->lost;
}

/* The child's exit code, if it ended before it was ready. */
static int wait_until_ready(struct mount *m, pid_t child, int pipe)
{
    ssize_t n;
    char byte;
    int status;

    do {
        n = read(pipe, &byte, 1);
    } while (n < 0 && errno == EINTR);
    if (n == 1)
        return 0;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR)
            return 1;
    }
    if (WIFEXITED(status))
        return WEXITSTATUS(status) ? WEXITSTATUS(status) : 1;
    cli_error(m->cli, "the process in the background was ended by signal %d", WTERMSIG(status));
    return 1;
}

/* Keep fd and the standard files, and close what our caller had open: a lock of flock(1) or a pipe
 * that somebody reads to its end would otherwise last as long as the mount. */
static int close_others(int fd)
{
    const int kept = STDERR_FILENO + 1;

    if (fd != kept && dup3(fd, kept, O_CLOEXEC) < 0)
        return fd;
    close_range((unsigned)kept + 1, ~0u, 0);
    return kept;
}

static int serve_in_background(struct mount *m)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0) {
        cli_error(m->cli, "pipe: %s", strerror(errno));
        return 1;
    }
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) {
        cli_error(m->cli, "fork: %s", strerror(errno));
        close(ends[0]);
        close(ends[1]);
        return 1;
    }
    if (child > 0) {
        close(ends[1]);
        int code = wait_until_ready(m, child, ends[0]);
        close(ends[0]);
        return code;
    }
    setsid();
    m->told = close_others(ends[1]);
    /* The pipe is closed at the end of the process: a failure was printed before. */
    return serve(m);
}

static int run_mount(const struct cli *cli, const struct cli_args *args)
{
    __attribute__((cleanup(mount_free))) struct mount m = {.cli = cli, .list = DISK_LIST_INIT};

    if (get_options(&m, args) != 0)
        return 1;
    m.background = !cli_has(args, KEY_FOREGROUND);
    return m.background ? serve_in_background(&m) : serve(&m);
}

static int run_unmount(const struct cli *cli, const struct cli_args *args)
{
    struct dr_error err = DR_ERROR_INIT;

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting the directory that a disk is mounted on");
    if (dr_fuse_unmount(args->operands[0], &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    return 0;
}

static const struct cli_option *const mount_sets[] = {mount_options, cli_opts_image, cli_opts_share,
                                                      cli_opts_common, NULL};
static const struct cli_option unmount_options[] = {
    {'h', "help", NULL, "print this help", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option *const unmount_sets[] = {unmount_options, NULL};

const struct cli_command cli_cmd_mount = {
    .name = "mount",
    .operands = "FILE DIR",
    .brief = "Mount a disk as a raw file in an empty directory (FUSE)",
    .about = "Returns when DIR/NAME can be used; 'drover unmount DIR' ends it.",
    .sets = mount_sets,
    .roles = CLI_DROVER,
    .run = run_mount,
};

const struct cli_command cli_cmd_unmount = {
    .name = "unmount",
    .operands = "DIR",
    .brief = "Unmount a disk and wait until it is closed",
    .sets = unmount_sets,
    .roles = CLI_DROVER,
    .run = run_unmount,
};
