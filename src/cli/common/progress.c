/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "cli/common/progress.h"

/* Signal handlers can reach nothing but these. */
static volatile sig_atomic_t stop_signal;
static volatile sig_atomic_t tell_progress;
static struct dr_job *_Atomic job_to_cancel;

static void on_stop(int number)
{
    /* The second signal takes the default action, so that a user can always end a program that
     * does not react; every operation survives being killed. */
    __atomic_store_n(&stop_signal, number, __ATOMIC_RELAXED);
    dr_job_cancel(atomic_load(&job_to_cancel));
    signal(number, SIG_DFL);
}

static void on_tell(int number)
{
    (void)number;
    tell_progress = 1;
}

static void handle(int number, void (*handler)(int))
{
    struct sigaction old;

    /* A signal that our caller set to be ignored (nohup, background jobs) stays ignored. */
    if (sigaction(number, NULL, &old) == 0 && old.sa_handler == SIG_IGN && number != SIGUSR1)
        return;
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(number, &action, NULL);
}

static char last_words[256];

static void on_death(int number)
{
    if (write(STDERR_FILENO, last_words, strlen(last_words)) < 0)
        _exit(128 + number); /* nobody listens: the code must do */
    _exit(128 + number);
}

void cli_die_politely(const struct cli *cli, const char *state)
{
    snprintf(last_words, sizeof(last_words), "%s: interrupted: %s\n", cli->prog, state);
    handle(SIGINT, on_death);
    handle(SIGTERM, on_death);
    handle(SIGHUP, on_death);
}

void cli_catch_signals(void)
{
    handle(SIGINT, on_stop);
    handle(SIGTERM, on_stop);
    handle(SIGHUP, on_stop);
    handle(SIGUSR1, on_tell);
}

int cli_signalled(void)
{
    return stop_signal ? 128 + stop_signal : 0;
}

const volatile int *cli_stop(void)
{
    return &stop_signal;
}

static void show_json(double percent, uint64_t done, uint64_t total)
{
    fprintf(stderr, "{\"done\": %" PRIu64 ", \"total\": %" PRIu64 ", \"percent\": %.2f}\n", done,
            total, percent);
}

static int show_progress(struct cli_job *job, uint64_t done, uint64_t total)
{
    FILE *to = job->to_stderr ? stderr : stdout;
    double percent = total ? 100.0 * (double)done / (double)total : done ? 0.0 : 100.0;

    if (percent > 100.0)
        percent = 100.0;
    if (tell_progress) {
        tell_progress = 0;
        if (job->mode == CLI_PROGRESS_NONE)
            fprintf(stderr, "    (%3.2f/100%%)\n", percent);
        else
            job->shown = -1.0;
    }
    if (job->mode == CLI_PROGRESS_JSON) {
        show_json(percent, done, total);
    } else if (job->mode == CLI_PROGRESS_TEXT && (percent < job->shown || percent >= 100.0 ||
                                                  job->shown < 0 || percent - job->shown >= 1.0)) {
        fprintf(to, "    (%3.2f/100%%)\r", percent);
        fflush(to);
        job->shown = percent;
    }
    return 0;
}

static int on_progress(void *user, uint64_t done, uint64_t total)
{
    struct cli_job *job = user;

    return job->progress ? job->progress(job->user, done, total) : show_progress(job, done, total);
}

static void on_message(void *user, const char *text)
{
    const struct cli_job *job = user;

    if (job->message)
        job->message(job->user, text);
    else if (!job->quiet)
        cli_error(job->cli, "%s", text);
}

static int get_mode(const struct cli *cli, const struct cli_args *args, struct cli_job *job)
{
    const char *mode = cli_value(args, KEY_PROGRESS);

    if (cli_has(args, 'p') && !job->quiet)
        job->mode = CLI_PROGRESS_TEXT;
    if (mode && strcmp(mode, "json") == 0)
        job->mode = CLI_PROGRESS_JSON;
    else if (mode && strcmp(mode, "text") == 0)
        job->mode = CLI_PROGRESS_TEXT;
    else if (mode && strcmp(mode, "none") == 0)
        job->mode = CLI_PROGRESS_NONE;
    else if (mode)
        return cli_usage(cli, "--progress must be json, text or none, not '%s'", mode);
    return 0;
}

int cli_job_begin(const struct cli *cli, const struct cli_args *args,
                  const struct cli_job_limits *limits, struct cli_job *job)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_job_options options = {.progress = on_progress, .message = on_message, .user = job};

    *job = (struct cli_job){.cli = cli, .shown = -1.0, .quiet = cli_has(args, 'q')};
    if (get_mode(cli, args, job) != 0)
        return 1;
    if (limits) {
        options.rate = limits->rate;
        options.workers = limits->workers;
        job->to_stderr = limits->stdout_taken;
    }
    if (dr_job_new(NULL, &options, &job->job, &err) < 0) {
        cli_fail(cli, &err);
        return 1;
    }
    atomic_store(&job_to_cancel, job->job);
    cli_catch_signals();
    if (stop_signal) /* it came while there was no job to cancel */
        dr_job_cancel(job->job);
    if (job->mode == CLI_PROGRESS_TEXT)
        show_progress(job, 0, 1);
    return 0;
}

void cli_job_end(struct cli_job *job)
{
    if (job->mode == CLI_PROGRESS_TEXT) {
        fprintf(job->to_stderr ? stderr : stdout, "\n");
        fflush(job->to_stderr ? stderr : stdout);
    }
    job->mode = CLI_PROGRESS_NONE;
    atomic_store(&job_to_cancel, NULL);
    dr_job_free(job->job);
    job->job = NULL;
}

int cli_job_failed(const struct cli_job *job, int r, const struct dr_error *err, int exit_code,
                   const char *state)
{
    if (r == -ECANCELED && stop_signal) {
        cli_error(job->cli, "interrupted: %s", state);
        return cli_signalled();
    }
    cli_fail(job->cli, err);
    return exit_code;
}

int cli_job_run(const struct cli *cli, const struct cli_args *args,
                int (*operation)(void *user, struct dr_job *job, struct dr_error *err), void *user)
{
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;
    const char *rate = cli_value(args, 'r');
    struct cli_job_limits limits = {0};
    int code = 0;

    if (rate && cli_get_size(cli, "rate limit", rate, &limits.rate) < 0)
        return 1;
    if (cli_job_begin(cli, args, &limits, &job) != 0)
        return 1;
    int r = operation(user, job.job, &err);
    if (r < 0)
        code = cli_job_failed(&job, r, &err, 1,
                              "the disk reads as before; the same command finishes the work");
    else if (job.mode == CLI_PROGRESS_TEXT)
        show_progress(&job, 1, 1); /* also where there was nothing to copy */
    cli_job_end(&job);
    return code;
}
