/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Long commands: progress, signals, how they end. */
#ifndef DR_CLI_PROGRESS_H
#define DR_CLI_PROGRESS_H

#include "cli/cli.h"
#include "drover/ops.h"

enum cli_progress_mode { CLI_PROGRESS_NONE, CLI_PROGRESS_TEXT, CLI_PROGRESS_JSON };

struct cli_job_limits {
    uint64_t rate;     /* bytes a second, 0 = none */
    unsigned workers;  /* 0 = the library chooses */
    bool stdout_taken; /* by the operation's own output: progress goes to standard error */
};

struct cli_job {
    struct dr_job *job; /* hand it to the operation */
    const struct cli *cli;
    enum cli_progress_mode mode;
    double shown;   /* percent printed last, < 0 = none */
    bool quiet;     /* drop messages */
    bool to_stderr; /* where progress as text goes, else to standard output */
    /* Set after cli_job_begin(): where progress and messages go instead. */
    int (*progress)(void *user, uint64_t done, uint64_t total);
    void (*message)(void *user, const char *text);
    void *user;
};

/* Reads -p, --progress and -q and makes the job; from here on SIGINT, SIGTERM and SIGHUP cancel it
 * and SIGUSR1 makes it report how far it is. limits may be NULL. job stays where it is until
 * cli_job_end(). 0, or the exit code after a message. */
int cli_job_begin(const struct cli *cli, const struct cli_args *args,
                  const struct cli_job_limits *limits, struct cli_job *job);
/* Ends the progress line and frees the job. */
void cli_job_end(struct cli_job *job);
/* The operation failed with r: say so and give the exit code. state: what holds after an
 * interruption ("the disk reads as before; run the command again to finish"). */
int cli_job_failed(const struct cli_job *job, int r, const struct dr_error *err, int exit_code,
                   const char *state);

/* One operation that is killed without harm, from begin to end: --rate, progress, signals, what
 * went wrong. The exit code. */
int cli_job_run(const struct cli *cli, const struct cli_args *args,
                int (*operation)(void *user, struct dr_job *job, struct dr_error *err), void *user);

/* For what stands around a job: remember SIGINT, SIGTERM and SIGHUP as cli_job_begin() does. */
void cli_catch_signals(void);
int cli_signalled(void);            /* 0, or 128 + the number of the signal that came */
const volatile int *cli_stop(void); /* what an operation looks at to see whether one came */

/* For commands without a job, which may be killed anywhere: SIGINT, SIGTERM and SIGHUP end the
 * program with a message of this state and with 128 + the signal's number. */
void cli_die_politely(const struct cli *cli, const char *state);

#endif
