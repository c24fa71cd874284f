/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* `drover serve`: the options become sockets, options of nbdkit and parameters of our plugin. This
 * process then only waits: for signals, for nbdkit, and for the command of --run. */
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/serve/relay.h"
#include "cli/serve/serve.h"
#include "exports/exports.h"

static const struct cli_option serve_options[] = {
    {KEY_SOCKET, "socket", "PATH", "listen at this socket in the file system", false},
    {KEY_PORT, "port", "N", "listen at this TCP port; 0: any that is free", false},
    {KEY_BIND, "bind", "ADDRESS", "with --port: at this address (localhost)", false},
    {KEY_TLS, "tls", "off|on|require", "on: TLS for clients that want it; require: only TLS",
     false},
    {KEY_TLS_CERTIFICATES, "tls-certificates", "DIR", "certificates, as nbdkit-tls(1) has them",
     false},
    {KEY_TLS_PSK, "tls-psk", "FILE", "keys instead of certificates", false},
    {KEY_TLS_VERIFY_PEER, "tls-verify-peer", NULL, "ask clients for a certificate", false},
    {0, NULL, NULL, NULL, false},
};

static const struct cli_option disk_options[] = {
    {'r', "read-only", NULL, "clients cannot write; what cannot be written needs no -r", false},
    {KEY_TEMPORARY, "temporary", NULL, "clients can write, and that is thrown away at the end",
     false},
    {KEY_EXPORT, "export", "NAME", "name of the export; repeat it for further disks", false},
    {'f', "format", "FMT", "format of all disks (default: find out)", false},
    {'l', "snapshot", "NAME", "show a snapshot inside, read-only: a name, or an id", false},
    {'t', "cache", "CACHE", "none, writeback or unsafe", false},
    {KEY_ON_ERROR, "on-error", "WHAT",
     "failed writes wait: enospc (no space; default), stop (all), report (none)", false},
    {'U', "force-share", NULL, "with -r: even while somebody writes to them", false},
    {0, NULL, NULL, NULL, false},
};

static const struct cli_option life_options[] = {
    {KEY_RUN, "run", "CMD", "run a shell command with $uri, then end", false},
    {KEY_CONTROL, "control", "SOCKET", "let `drover ctl SOCKET` work on the disks", false},
    {KEY_STATE, "state", "FILE", "go on there with the images and jobs that a server had", false},
    {KEY_PIDFILE, "pidfile", "FILE", "write the process id there when clients are served", false},
    {0, NULL, NULL, NULL, false},
};

struct serving {
    const struct cli *cli;
    const struct cli_args *args;
    const struct serve_manner *manner;
    struct listener listener;
    struct listener inner;   /* nbdkit's, where a relay has the other one */
    struct words options;    /* of nbdkit */
    struct words parameters; /* of the plugin */
    char **uris;             /* one for each disk */
    struct server server;
    pid_t command; /* of --run; 0: there is none, or it has ended */
    int command_code;
};

/* ------------------------------------------------------------------ options */

/* Is it a number from 0 to 65535? */
static bool parse_port(const char *text, unsigned *port)
{
    char *end;

    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    *port = (unsigned)n;
    return *text >= '0' && *text <= '9' && !*end && errno == 0 && n <= 65535;
}

static int get_listener(struct serving *s)
{
    const char *path = cli_value(s->args, KEY_SOCKET), *port = cli_value(s->args, KEY_PORT);
    const char *address = cli_value(s->args, KEY_BIND);
    unsigned number = 0;

    if (s->manner->given > 0)
        return listen_take_given(s->cli, s->manner->given, &s->listener);
    if (path && port)
        return cli_usage(s->cli, "--socket and --port exclude each other");
    if (address && !port)
        return cli_usage(s->cli, "--bind needs --port");
    if (port && !parse_port(port, &number))
        return cli_usage(s->cli, "'%s' is no port: expected 0 to 65535", port);
    if (port)
        return listen_tcp(s->cli, address ? address : "localhost", number, &s->listener);
    return listen_unix(s->cli, path, &s->listener);
}

/* Keys or certificates without --tls mean that clients must have them. */
static int get_tls(struct serving *s)
{
    const char *tls = cli_value(s->args, KEY_TLS), *psk = cli_value(s->args, KEY_TLS_PSK);
    const char *certificates = cli_value(s->args, KEY_TLS_CERTIFICATES);
    bool verify = cli_has(s->args, KEY_TLS_VERIFY_PEER);

    if (!tls)
        tls = psk || certificates || verify ? "require" : "off";
    if (strcmp(tls, "off") != 0 && strcmp(tls, "on") != 0 && strcmp(tls, "require") != 0)
        return cli_usage(s->cli, "--tls must be off, on or require, not '%s'", tls);
    if (psk && (certificates || verify))
        return cli_usage(s->cli, "--tls-psk excludes certificates");
    if (psk && access(psk, R_OK) < 0) {
        cli_error(s->cli, "%s: cannot read the keys: %s", psk, strerror(errno));
        return 1;
    }
    words_add(&s->options, "--tls=%s", tls);
    if (psk)
        words_add(&s->options, "--tls-psk=%s", psk);
    if (certificates)
        words_add(&s->options, "--tls-certificates=%s", certificates);
    if (verify)
        words_add(&s->options, "--tls-verify-peer");
    return 0;
}

/* The settings that all disks share; they stand before the first disk. */
static int get_settings(struct serving *s)
{
    const struct cli_args *args = s->args;
    const char *format = cli_value(args, 'f'), *snapshot = cli_value(args, 'l');
    const char *cache = cli_value(args, 't'), *allow;
    bool temporary = cli_has(args, KEY_TEMPORARY), read_only = cli_has(args, 'r') || snapshot;
    unsigned flags = 0;

    if (temporary && read_only)
        return cli_usage(s->cli, "--temporary is for writing: leave -r and -l out");
    if (cli_shared_flags(s->cli, args, &flags) != 0)
        return 1;
    if (format && !cli_format_exists(format))
        return cli_usage(s->cli, "Unknown file format '%s'", format);
    if (!temporary)
        words_add(&s->parameters, "read-only=%s", read_only ? "true" : "false");
    else
        words_add(&s->parameters, "temporary=true");
    if (read_only)
        words_add(&s->options, "--readonly");
    if (format)
        words_add(&s->parameters, "format=%s", format);
    if (snapshot)
        words_add(&s->parameters, "snapshot=%s", snapshot);
    if (cache)
        words_add(&s->parameters, "cache=%s", cache);
    if (cli_has(args, KEY_ON_ERROR))
        words_add(&s->parameters, "on-error=%s", cli_value(args, KEY_ON_ERROR));
    if (cli_has(args, KEY_CONTROL))
        words_add(&s->parameters, "control=%s", cli_value(args, KEY_CONTROL));
    if (cli_has(args, KEY_STATE))
        words_add(&s->parameters, "state=%s", cli_value(args, KEY_STATE));
    if (cli_has(args, 'U'))
        words_add(&s->parameters, "share=true");
    if (flags & DR_OPEN_NO_LOCK)
        words_add(&s->parameters, "locking=off");
    if (flags & DR_OPEN_NO_FINGERPRINT)
        words_add(&s->parameters, "fingerprints=off");
    for (size_t i = 0; (allow = cli_nth_value(args, KEY_ALLOW_PATH, i)); i++)
        words_add(&s->parameters, "allow-path=%s", allow);
    return 0;
}

static bool can_be_written(const char *name)
{
    const char *format = dr_name_format(name);
    struct dr_format_info info;

    for (size_t i = 0; format && dr_format_list(i, &info) == 0; i++) {
        if (strcmp(info.name, format) == 0)
            return info.can_write;
    }
    return true;
}

static int get_disks(struct serving *s)
{
    const struct cli_args *args = s->args;

    if (args->n_operands == 0)
        return cli_usage(s->cli, "Expecting the name of a disk");
    if (cli_nth_value(args, KEY_EXPORT, (size_t)args->n_operands))
        return cli_usage(s->cli, "There are more names of exports than disks");
    for (int i = 0; i < args->n_operands; i++) {
        const char *export = cli_nth_value(args, KEY_EXPORT, (size_t)i);
        words_add(&s->parameters, "disk=%s", args->operands[i]);
        if (export)
            words_add(&s->parameters, "export=%s", export);
        if (!cli_has(args, KEY_TEMPORARY) && !can_be_written(args->operands[i]))
            words_add(&s->parameters, "read-only=true");
    }
    return 0;
}

/* ------------------------------------------------------------------ when it serves */

static const char *export_name(const struct cli_args *args, int i)
{
    const char *said = cli_nth_value(args, KEY_EXPORT, (size_t)i);
    return said ? said : export_default_name(args->operands[i]);
}

/* A single disk is the default export, so its name is left out unless somebody chose it. */
static int make_uris(struct serving *s)
{
    const char *tls = cli_value(s->args, KEY_TLS), *psk = cli_value(s->args, KEY_TLS_PSK);
    bool secure = psk || cli_has(s->args, KEY_TLS_CERTIFICATES) ||
                  cli_has(s->args, KEY_TLS_VERIFY_PEER) || (tls && strcmp(tls, "require") == 0);
    CLEANUP_FREE char *keys = psk ? realpath(psk, NULL) : NULL;
    int n = s->args->n_operands;

    s->uris = calloc((size_t)n + 1, sizeof(*s->uris));
    for (int i = 0; s->uris && i < n; i++) {
        bool plain = n == 1 && !cli_has(s->args, KEY_EXPORT);
        s->uris[i] = listener_uri(&s->listener, plain ? "" : export_name(s->args, i),
                                  secure && (!tls || strcmp(tls, "off") != 0), keys);
        if (!s->uris[i])
            break;
    }
    if (s->uris && s->uris[n - 1])
        return 0;
    cli_error(s->cli, "out of memory");
    return 1;
}

static int write_pidfile(struct serving *s)
{
    const char *path = cli_value(s->args, KEY_PIDFILE);
    FILE *f = path ? fopen(path, "we") : NULL;

    if (!path)
        return 0;
    if (f && fprintf(f, "%ld\n", (long)getpid()) > 0 && fclose(f) == 0)
        return 0;
    cli_error(s->cli, "%s: cannot write the process id: %s", path, strerror(errno));
    return 1;
}

/* The command finds what nbdkit's --run gives, too. */
static int start_command(struct serving *s)
{
    const char *command = cli_value(s->args, KEY_RUN);
    char port[16];

    if (!command)
        return 0;
    snprintf(port, sizeof(port), "%u", s->listener.port);
    s->command = fork();
    if (s->command < 0) {
        s->command = 0;
        cli_error(s->cli, "cannot run the command: %s", strerror(errno));
        return 1;
    }
    if (s->command > 0)
        return 0;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    setenv("uri", s->uris[0], 1);
    setenv("unixsocket", s->listener.path ? s->listener.path : "", 1);
    setenv("port", s->listener.path ? "" : port, 1);
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

static int tell_clients(struct serving *s)
{
    int code = make_uris(s);

    if (code == 0)
        code = write_pidfile(s);
    if (code == 0)
        code = start_command(s);
    if (code == 0 && s->manner->ready)
        s->manner->ready(s->manner->user);
    else if (code == 0 && !cli_has(s->args, KEY_RUN))
        for (size_t i = 0; s->uris[i]; i++)
            printf("%s\n", s->uris[i]);
    fflush(stdout);
    return code;
}

/* ------------------------------------------------------------------ until it ends */

static void tell_to_end(struct serving *s)
{
    kill(s->server.pid, SIGTERM);
}

static int code_of(int status)
{
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Some children may have ended. False: nbdkit has, and *code is ours. */
static bool look_at_children(struct serving *s, int *code)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == s->command) {
            s->command = 0;
            s->command_code = code_of(status);
            tell_to_end(s);
        } else if (pid == s->server.pid) {
            *code = nbdkit_ended(s->cli, &s->server, status);
            return false;
        }
    }
    return true;
}

/* All signals that matter are blocked. Asleep until one comes. */
static int serve_until_end(struct serving *s, const sigset_t *signals, int code)
{
    int ended = 0;

    if (code != 0)
        tell_to_end(s);
    while (look_at_children(s, &ended)) {
        int number = sigwaitinfo(signals, NULL);
        if (number > 0 && number != SIGCHLD)
            tell_to_end(s);
    }
    return code ? code : ended ? ended : s->command_code;
}

/* nbdkit gets the sockets that clients come to; or a private one, and the relay gets the others. */
static int start_server(struct serving *s)
{
    struct relay *relay = s->manner->relay;

    if (!relay)
        return nbdkit_start(s->cli, &s->options, &s->parameters, &s->listener, &s->server);
    if (listen_unix(s->cli, NULL, &s->inner) != 0 ||
        nbdkit_start(s->cli, &s->options, &s->parameters, &s->inner, &s->server) != 0)
        return 1;
    relay->server.sun_family = AF_UNIX; /* the path was short enough to listen at */
    strncpy(relay->server.sun_path, s->inner.path, sizeof(relay->server.sun_path) - 1);
    memcpy(relay->fds, s->listener.fds, sizeof(relay->fds));
    relay->n = s->listener.n;
    return 0;
}

static int start_and_serve(struct serving *s)
{
    sigset_t signals;

    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    if (start_server(s) != 0)
        return 1;
    int code = tell_clients(s);
    if (code == 0 && s->manner->relay)
        code = relay_start(s->cli, s->manner->relay);
    code = serve_until_end(s, &signals, code);
    if (cli_value(s->args, KEY_PIDFILE))
        unlink(cli_value(s->args, KEY_PIDFILE));
    return code;
}

static void add_all(struct words *to, const struct words *from)
{
    for (size_t i = 0; i < from->n; i++)
        words_add(to, "%s", from->words[i]);
    to->failed |= from->failed;
}

int serve_disks(const struct cli *cli, const struct cli_args *args,
                const struct serve_manner *manner)
{
    struct serving s = {.cli = cli,
                        .args = args,
                        .manner = manner,
                        .listener = LISTENER_INIT,
                        .inner = LISTENER_INIT};
    add_all(&s.options, &manner->options);
    add_all(&s.parameters, &manner->parameters);
    int code = get_tls(&s);

    if (code == 0)
        code = get_settings(&s);
    if (code == 0)
        code = get_disks(&s);
    if (code == 0)
        code = get_listener(&s);
    if (code == 0)
        code = start_and_serve(&s);
    listener_end(&s.listener);
    listener_end(&s.inner);
    for (size_t i = 0; s.uris && s.uris[i]; i++)
        free(s.uris[i]);
    free(s.uris);
    words_free(&s.options);
    words_free(&s.parameters);
    return code;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    const struct serve_manner manner = {.user = NULL};

    return serve_disks(cli, args, &manner);
}

static const struct cli_option *const sets[] = {serve_options, disk_options, life_options,
                                                cli_opts_common, NULL};

const struct cli_command cli_cmd_serve = {
    .name = "serve",
    .operands = "DISK...",
    .brief = "Serve disks over NBD, for guests and other clients",
    .about =
        "Each disk is an export. Clients are told by URIs on standard output where to connect;\n"
        "without --socket or --port that is a socket which only you can reach. The server ends\n"
        "with SIGTERM or Ctrl-C, closes the disks and removes its socket.",
    .sets = sets,
    .roles = CLI_DROVER,
    .run = run,
};
