/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The program under the name qemu-nbd: its options become those of `drover serve`, and nbdkit's
 * filters do what is left: an end with the last client, a bound of clients, an offset. */
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/paths.h"
#include "cli/serve/relay.h"
#include "cli/serve/serve.h"

#define DEFAULT_PORT "10809" /* IANA's */
#define MOST_TEXT    4096    /* bytes of a name or a description */

static const struct cli_option connection_options[] = {
    {'p', "port", "PORT", "listen at this TCP port (10809)", false},
    {'b', "bind", "ADDRESS", "listen at this address (0.0.0.0)", false},
    {'k', "socket", "PATH", "listen at this socket in the file system", false},
    {'e', "shared", "NUM", "NUM clients at a time (1), 0: any number", false},
    {'t', "persistent", NULL, "do not end with the last client", false},
    {'v', "verbose", NULL, "accepted", false},
    {'x', "export-name", "NAME", "name of the export", false},
    {'D', "description", "TEXT", "what clients are told of the export", false},
    {KEY_HANDSHAKE_LIMIT, "handshake-limit", "N",
     "seconds that a client has to choose an export (10), 0: any number", false},
    {'o', "offset", "OFFSET", "leave out the beginning of the disk", false},
    {'A', "allocation-depth", NULL,
     "with -r: tell clients which image of the chain has what (else accepted)", false},
    {'B', "bitmap", "NAME", "tell clients what this bitmap has marked (repeatable)", false},
    {'L', "list", NULL, "list the exports of another server", false},
    {KEY_OBJECT, "object", "DEF", "TLS credentials, or a secret: for encrypted disks", false},
    {KEY_TLS_CREDS, "tls-creds", "ID", "which of them to use", false},
    {KEY_TLS_AUTHZ, "tls-authz", "ID",
     "who may connect: nbdkit has no such list; with verify-peer=on whoever has a certificate of "
     "your own authority may",
     true},
    {KEY_TLS_HOSTNAME, "tls-hostname", "NAME",
     "with -L: the name in the certificate, which libnbd takes from -b: give it there", true},
    {KEY_FORK, "fork", NULL, "go to the background when clients are served", false},
    {KEY_PIDFILE, "pid-file", "PATH", "write the process id there", false},
    {KEY_SELINUX_LABEL, "selinux-label", "LABEL",
     "label of the socket: give it with chcon(1), or to nbdkit --selinux-label", true},
    {'T', "trace", "WHAT", "accepted", false},
    {'V', "version", NULL, "print the version", false},
    {0, NULL, NULL, NULL, false},
};

static const struct cli_option kernel_options[] = {
    {'c', "connect", "DEV", "connect to a device of the kernel: that is nbd-client(8)", false},
    {'d', "disconnect", NULL, "disconnect FILE, a device: that is nbd-client(8)", false},
    {0, NULL, NULL, NULL, false},
};

static const struct cli_option disk_options[] = {
    {'r', "read-only", NULL, "clients cannot write", false},
    {'s', "snapshot", NULL, "clients can write, and that is thrown away at the end", false},
    {'l', "load-snapshot", "NAME", "show a snapshot inside, read-only", false},
    {'n', "nocache", NULL, "the same as --cache=none", false},
    {KEY_CACHE, "cache", "MODE", "none, writeback, writethrough, directsync or unsafe", false},
    {KEY_AIO, "aio", "MODE", "accepted: native, io_uring or threads", false},
    {KEY_DISCARD, "discard", "MODE", "accepted: ignore or unmap", false},
    {KEY_DETECT_ZEROES, "detect-zeroes", "MODE", "accepted: off, on or unmap", false},
    {0, NULL, NULL, NULL, false},
};

struct nbd {
    const struct cli *cli;
    const struct cli_args *args;
    struct cli_args serve; /* the options of `drover serve` */
    struct cli_image image;
    struct serve_manner manner;
    char *disk;                      /* the only operand */
    char *certificates, *psk, *user; /* of the object that --tls-creds names */
    int ready[2], messages[2];       /* with --fork: to the process that the caller waits for */
};

/* The relay's threads use them until the process ends. */
static struct contexts contexts; /* of -B and -A */
static struct relay relay;

static bool is_one_of(const char *word, const char *const *words)
{
    while (*words && strcmp(word, *words) != 0)
        words++;
    return *words != NULL;
}

/* ------------------------------------------------------------------ options become serve's */

static int give(struct nbd *n, int key, const char *value)
{
    struct cli_args *to = &n->serve;
    struct cli_hit *bigger = reallocarray(to->hits, to->n_hits + 1, sizeof(*bigger));
    if (!bigger) {
        cli_error(n->cli, "out of memory");
        return 1;
    }
    to->hits = bigger;
    to->hits[to->n_hits++] = (struct cli_hit){key, value};
    return 0;
}

static int check_words(const struct nbd *n)
{
    static const char *const aio[] = {"native", "io_uring", "threads", NULL};
    static const char *const discard[] = {"ignore", "off", "unmap", "on", NULL};
    static const char *const detect[] = {"off", "on", "unmap", NULL};
    const char *word = cli_value(n->args, KEY_AIO);
    if (word && !is_one_of(word, aio)) {
        cli_error(n->cli, "Invalid aio mode '%s'", word);
        return 1;
    }
    word = cli_value(n->args, KEY_DISCARD);
    if (word && !is_one_of(word, discard)) {
        cli_error(n->cli, "Invalid discard mode `%s'", word);
        return 1;
    }
    word = cli_value(n->args, KEY_DETECT_ZEROES);
    if (word && !is_one_of(word, detect)) {
        cli_error(n->cli, "Failed to parse detect_zeroes mode: invalid parameter value: %s", word);
        return 1;
    }
    const char *trim = cli_value(n->args, KEY_DISCARD);
    if (word && strcmp(word, "unmap") == 0 &&
        (!trim || (strcmp(trim, "unmap") != 0 && strcmp(trim, "on") != 0))) {
        cli_error(n->cli, "setting detect-zeroes to unmap is not allowed without setting discard "
                          "operation to unmap");
        return 1;
    }
    return 0;
}

/* What NBD allows. */
static int check_texts(const struct nbd *n)
{
    static const struct {
        int key;
        const char *what;
    } texts[] = {{'x', "export name"}, {'D', "export description"}};
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        const char *text = cli_value(n->args, texts[i].key);
        if (text && strlen(text) > MOST_TEXT) {
            cli_error(n->cli, "%s too long: %zu bytes, expected at most %d", texts[i].what,
                      strlen(text), MOST_TEXT);
            return 1;
        }
    }
    return 0;
}

/* writethrough and directsync: nbdkit makes each write durable before it answers. */
static int give_cache(struct nbd *n)
{
    const char *mode = cli_value(n->args, KEY_CACHE);
    bool through = false;
    unsigned flags = 0;
    if (mode && cli_has(n->args, 'n')) {
        cli_error(n->cli, "-n and --cache can only be specified once");
        return 1;
    }
    if (cli_has(n->args, 'n'))
        mode = "none";
    if (!mode)
        return 0;
    if (cli_cache_flags(mode, &flags, &through) < 0) {
        cli_error(n->cli, "Invalid cache mode `%s'", mode);
        return 1;
    }
    if (through) {
        words_add(&n->manner.options, "--filter=fua");
        words_add(&n->manner.parameters, "fuamode=force");
    }
    if (strcmp(mode, "unsafe") == 0)
        return give(n, 't', "unsafe");
    return give(n, 't', flags & DR_OPEN_DIRECT ? "none" : "writeback");
}

static int give_snapshot(struct nbd *n)
{
    const char *text = cli_value(n->args, 'l');
    return text ? give(n, 'l', text) : 0;
}

static int give_clients(struct nbd *n)
{
    const char *shared = cli_value(n->args, 'e');
    char *end;
    long most = shared ? strtol(shared, &end, 0) : 1;
    if (shared && (end == shared || *end || most < 0 || most > INT32_MAX)) {
        cli_error(n->cli, "Invalid shared device number '%s'", shared);
        return 1;
    }
    if (!cli_has(n->args, 't'))
        words_add(&n->manner.options, "--filter=exitlast");
    if (most > 0) {
        words_add(&n->manner.options, "--filter=limit");
        words_add(&n->manner.parameters, "limit=%ld", most);
    }
    if (most == 1) { /* a client that is offered several connections would be refused the second */
        words_add(&n->manner.options, "--filter=multi-conn");
        words_add(&n->manner.parameters, "multi-conn-mode=disable");
    }
    return 0;
}

/* nbdkit would find it out only when a client comes. */
static int check_offset(const struct nbd *n, uint64_t offset)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    if (cli_image_open(n->cli, &n->image, &disk) != 0)
        return 1;
    if (offset <= dr_size(disk))
        return 0;
    cli_error(n->cli,
              "Offset (%" PRIu64 ") cannot be greater than size of the containing file (%" PRIu64
              ")",
              offset, dr_size(disk));
    return 1;
}

/* The image is known. */
static int give_offset(struct nbd *n)
{
    const char *text = cli_value(n->args, 'o');
    uint64_t offset = 0;
    if (!text)
        return 0;
    if (cli_parse_size(text, &offset) < 0) {
        cli_error(n->cli, "Invalid offset '%s'", text);
        return 1;
    }
    words_add(&n->manner.options, "--filter=offset");
    words_add(&n->manner.parameters, "offset=%" PRIu64, offset);
    return check_offset(n, offset);
}

static int give_place(struct nbd *n)
{
    const char *path = cli_value(n->args, 'k'), *port = cli_value(n->args, 'p');
    const char *address = cli_value(n->args, 'b');
    n->manner.given = listen_given(); /* not later: a child has another process id */
    if (n->manner.given > 0) {
        if (!path && !port && !address)
            return 0;
        cli_error(n->cli, "%s can't be set when using socket activation",
                  path   ? "Unix socket"
                  : port ? "TCP port number"
                         : "The interface");
        return 1;
    }
    if (path && path[0] != '/') {
        cli_error(n->cli, "socket path must be absolute");
        return 1;
    }
    if (!path)
        return give(n, KEY_PORT, port ? port : DEFAULT_PORT) ||
               give(n, KEY_BIND, address ? address : "0.0.0.0");
    listen_remove_left(path);
    return give(n, KEY_SOCKET, path);
}

/* ------------------------------------------------------------------ what nbdkit has not got */

#define PATIENCE 10 /* seconds; QEMU's */

static bool is_read_only(const struct nbd *n)
{
    return cli_has(n->args, 'r') || cli_has(n->args, 'l') || n->image.read_only;
}

/* Which image has what is looked up while clients are served: the disk must not change. */
static bool wants_depth(const struct nbd *n)
{
    return cli_has(n->args, 'A') && is_read_only(n);
}

static bool wants_contexts(const struct nbd *n)
{
    return cli_has(n->args, 'B') || wants_depth(n);
}

/* A relay stands between clients and nbdkit where something of this is asked for. */
static int give_relay(struct nbd *n)
{
    const char *limit = cli_value(n->args, KEY_HANDSHAKE_LIMIT), *tls = NULL;
    char *end;
    long seconds = limit ? strtol(limit, &end, 0) : PATIENCE;
    if (limit && (end == limit || *end || seconds < 0 || seconds > INT32_MAX / 1000)) {
        cli_error(n->cli, "Invalid handshake limit '%s'", limit);
        return 1;
    }
    if (!wants_contexts(n) && (!limit || seconds == 0))
        return 0;
    if (wants_contexts(n) && cli_has(n->args, 'o')) {
        cli_error(n->cli, "-%c and -o exclude each other: %s of the whole disk",
                  cli_has(n->args, 'B') ? 'B' : 'A',
                  cli_has(n->args, 'B') ? "a bitmap is one" : "it tells the depth");
        return 1;
    }
    if (cli_has(n->args, 'B') && wants_depth(n) && cli_has(n->args, 'l')) {
        cli_error(n->cli, "-A and -B exclude each other with -l: a bitmap is one of the disk, "
                          "not of a snapshot in it");
        return 1;
    }
    tls = cli_value(n->args, KEY_TLS_CREDS);
    if (tls) {
        cli_error(n->cli,
                  "%s cannot go with --tls-creds: it needs a connection that can be read; "
                  "use a socket (-k) and a tunnel",
                  limit ? "--handshake-limit" : "-B, and -A,");
        return 1;
    }
    relay.patience = (unsigned)seconds;
    n->manner.relay = &relay;
    return 0;
}

/* In the process that serves, which has threads of its own. */
static int open_contexts(struct nbd *n)
{
    const char *bitmaps[CONTEXT_MOST];
    struct cli_image image = n->image; /* the snapshot goes in here only */
    size_t count = 0;
    if (!wants_contexts(n))
        return 0;
    while (count < CONTEXT_MOST && (bitmaps[count] = cli_nth_value(n->args, 'B', count)))
        count++;
    image.open.snapshot = count == 0 ? cli_value(n->args, 'l') : NULL;
    relay.contexts = &contexts;
    return contexts_open(n->cli, &image, bitmaps, count, wants_depth(n), !is_read_only(n),
                         &contexts);
}

/* ------------------------------------------------------------------ TLS */

/* "tls-creds-x509,id=ID,dir=DIR,verify-peer=on" or "tls-creds-psk,id=ID,dir=DIR". */
static int take_credentials(struct nbd *n, const char *id, const char *text, bool *found)
{
    CLEANUP_PAIRS struct cli_pairs list = {0};
    const size_t kind = strcspn(text, ",");
    if (cli_pairs_add(&list, text + kind + (text[kind] == ',')) < 0) {
        cli_error(n->cli, "out of memory");
        return 1;
    }
    const char *own = cli_pairs_find(&list, "id"), *dir = cli_pairs_find(&list, "dir");
    const char *verify = cli_pairs_find(&list, "verify-peer");
    if (!own || strcmp(own, id) != 0)
        return 0;
    bool psk = strncmp(text, "tls-creds-psk,", 14) == 0;
    if ((!psk && strncmp(text, "tls-creds-x509,", 15) != 0) || !dir) {
        cli_error(n->cli,
                  "--object %.*s: expected tls-creds-x509 or tls-creds-psk with dir=", (int)kind,
                  text); /* a secret's text is none for messages */
        return 1;
    }
    *found = true;
    if (psk && asprintf(&n->psk, "%s/keys.psk", dir) < 0)
        n->psk = NULL;
    if (!psk)
        n->certificates = strdup(dir);
    const char *user = cli_pairs_find(&list, "username");
    n->user = strdup(user ? user : "qemu");
    if ((!n->psk && !n->certificates) || !n->user) {
        cli_error(n->cli, "out of memory");
        return 1;
    }
    if (psk)
        return give(n, KEY_TLS_PSK, n->psk);
    if (verify && strcmp(verify, "on") == 0 && give(n, KEY_TLS_VERIFY_PEER, NULL) != 0)
        return 1;
    return give(n, KEY_TLS_CERTIFICATES, n->certificates);
}

static int give_tls(struct nbd *n)
{
    const char *id = cli_value(n->args, KEY_TLS_CREDS), *text;
    bool found = false;
    for (size_t i = 0; id && !found && (text = cli_nth_value(n->args, KEY_OBJECT, i)); i++)
        if (take_credentials(n, id, text, &found) != 0)
            return 1;
    if (!id || found)
        return 0;
    cli_error(n->cli, "Failed to get TLS creds: No TLS credentials with id '%s'", id);
    return 1;
}

/* ------------------------------------------------------------------ the disk */

/* How the image is to be opened beside the options that `drover serve` has. */
static int give_opening(struct nbd *n)
{
    const struct dr_open_options *open = &n->image.open;
    struct words *parameters = &n->manner.parameters;

    if (open->flags & DR_OPEN_NO_BACKING)
        words_add(parameters, "backing=");
    if (open->backing)
        words_add(parameters, "backing=%s", open->backing);
    if (open->backing_format)
        words_add(parameters, "backing-format=%s", open->backing_format);
    if (open->data_file)
        words_add(parameters, "data-file=%s", open->data_file);
    if ((open->flags & DR_OPEN_NO_LOCK) && give(n, KEY_LOCKING, "off") != 0)
        return 1;
    if ((open->flags & DR_OPEN_NO_FINGERPRINT) && give(n, KEY_FINGERPRINTS, "off") != 0)
        return 1;
    return open->flags & DR_OPEN_FORCE_SHARE ? give(n, 'U', NULL) : 0;
}

static int give_disk(struct nbd *n)
{
    const struct cli_image_spec spec = {.name = n->args->operands[0], .format_key = 'f'};
    const char *name = cli_value(n->args, 'x'), *description = cli_value(n->args, 'D');
    int code = cli_image_get(n->cli, n->args, &spec, &n->image);
    if (code == 0)
        code = cli_image_check(n->cli, &n->image) < 0 ||
               cli_refuse_copy_on_read(n->cli, &n->image) < 0;
    if (code == 0 && n->image.format)
        code = give(n, 'f', n->image.format);
    if (code == 0)
        code = give_opening(n);
    if (code == 0 && (cli_has(n->args, 'r') || n->image.read_only))
        code = give(n, 'r', NULL);
    if (code == 0 && cli_has(n->args, 's') && !is_read_only(n))
        code = give(n, KEY_TEMPORARY, NULL);
    if (code == 0) /* qemu-nbd follows the names inside images anywhere */
        code = give(n, KEY_ALLOW_PATH, "/");
    if (code == 0)
        code = give(n, KEY_EXPORT, name ? name : "");
    if (description)
        words_add(&n->manner.parameters, "description=%s", description);
    n->disk = n->image.path;
    n->serve.operands = &n->disk;
    n->serve.n_operands = 1;
    return code;
}

/* ------------------------------------------------------------------ the background */

/* The server: nobody waits for it any more, and its messages have no reader. */
static void tell_ready(void *user)
{
    struct nbd *n = user;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd < 3 && null >= 0; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    while (write(n->ready[1], "\n", 1) < 0 && errno == EINTR)
        continue;
    close(n->ready[1]);
}

/* Pass on what there is to read, without waiting. */
static void pass_messages(int from)
{
    char text[4096];
    ssize_t got;
    while ((got = read(from, text, sizeof(text))) > 0)
        if (write(STDERR_FILENO, text, (size_t)got) < 0)
            break;
}

/* Until the server is ready, or ends without: then a message says why. */
static int wait_for_server(struct nbd *n, pid_t server)
{
    struct pollfd both[] = {{.fd = n->ready[0], .events = POLLIN},
                            {.fd = n->messages[0], .events = POLLIN}};
    char line;
    int status = 0;
    while (both[0].revents == 0) {
        if (poll(both, 2, -1) < 0 && errno != EINTR)
            break;
        pass_messages(n->messages[0]);
        if (both[1].revents & (POLLHUP | POLLERR))
            both[1].fd = -1;
    }
    pass_messages(n->messages[0]);
    if (read(n->ready[0], &line, 1) == 1)
        return 0;
    waitpid(server, &status, 0);
    pass_messages(n->messages[0]);
    return 1;
}

/* Returns in the process that is to be the server with code -1; in the other one with its exit
 * code. What nbdkit says goes through a pipe, so that it does not keep the caller's own open. */
static int go_to_background(struct nbd *n)
{
    if (pipe2(n->ready, O_CLOEXEC) < 0 || pipe2(n->messages, O_CLOEXEC | O_NONBLOCK) < 0) {
        cli_error(n->cli, "Failed to fork: %s", strerror(errno));
        return 1;
    }
    fflush(stdout);
    pid_t server = fork();
    if (server < 0) {
        cli_error(n->cli, "Failed to fork: %s", strerror(errno));
        return 1;
    }
    if (server > 0) {
        close(n->ready[1]);
        close(n->messages[1]);
        return wait_for_server(n, server);
    }
    setsid();
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(n->messages[1], STDERR_FILENO);
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        dup2(null, STDOUT_FILENO);
        close(null);
    }
    close(n->messages[0]);
    close(n->messages[1]);
    close(n->ready[0]);
    return -1;
}

/* ------------------------------------------------------------------ the tool */

static void stay_quiet(void *user)
{
    (void)user;
}

static int serve(struct nbd *n)
{
    n->manner.ready = stay_quiet;
    n->manner.user = n;
    if (cli_has(n->args, KEY_FORK)) {
        int code = go_to_background(n);
        if (code >= 0)
            return code;
        n->manner.ready = tell_ready;
    }
    if (open_contexts(n) != 0)
        return 1;
    return serve_disks(n->cli, &n->serve, &n->manner);
}

static int list(struct nbd *n)
{
    const char *port = cli_value(n->args, 'p'), *host = cli_value(n->args, 'b');
    struct nbd_place place = {.socket = cli_value(n->args, 'k'),
                              .host = host ? host : "localhost",
                              .port = port ? port : DEFAULT_PORT};
    if (n->args->n_operands > 0) {
        cli_error(n->cli, "List mode is incompatible with a file name");
        return 1;
    }
    if (cli_has(n->args, 'x') || cli_has(n->args, 'D') || cli_has(n->args, 'o') ||
        cli_has(n->args, 'A') || cli_has(n->args, 'B') || cli_has(n->args, KEY_HANDSHAKE_LIMIT)) {
        cli_error(n->cli, "List mode is incompatible with per-device settings");
        return 1;
    }
    if (give_tls(n) != 0)
        return 1;
    place.tls_certificates = n->certificates;
    place.tls_psk = n->psk;
    place.tls_user = n->user;
    return list_exports(n->cli, &place);
}

static int refuse_kernel(const struct nbd *n)
{
    const char *device = cli_value(n->args, 'c');
    if (n->args->n_operands != 1)
        return cli_usage(n->cli, "Invalid number of arguments");
    if (device)
        cli_error(n->cli,
                  "-c needs the kernel's NBD client, which nbd-client(8) sets up: "
                  "qemu-nbd -t -k /run/disk.socket FILE, then nbd-client -unix /run/disk.socket %s",
                  device);
    else
        cli_error(n->cli, "-d needs the kernel's NBD client: nbd-client -d %s",
                  n->args->operands[0]);
    return 1;
}

static int prepare(struct nbd *n)
{
    const char *pid_file = cli_value(n->args, KEY_PIDFILE);
    if (n->args->n_operands != 1)
        return cli_usage(n->cli, "Invalid number of arguments");
    int code = check_words(n);
    if (code == 0)
        code = check_texts(n);
    if (code == 0)
        code = give_clients(n);
    if (code == 0)
        code = give_cache(n);
    if (code == 0)
        code = give_snapshot(n);
    if (code == 0)
        code = give_tls(n);
    if (code == 0 && pid_file)
        code = give(n, KEY_PIDFILE, pid_file);
    if (code == 0)
        code = give_disk(n);
    if (code == 0)
        code = give_offset(n);
    if (code == 0)
        code = give_relay(n);
    return code == 0 ? give_place(n) : code;
}

static int run(const struct cli *cli, const struct cli_args *args)
{
    struct nbd n = {.cli = cli, .args = args};
    int code = 0;
    if (cli_has(args, 'V'))
        cli_print_version(cli);
    else if (cli_has(args, 'c') || cli_has(args, 'd'))
        code = refuse_kernel(&n);
    else if (cli_has(args, 'L'))
        code = list(&n);
    else if ((code = prepare(&n)) == 0)
        code = serve(&n);
    cli_image_free(&n.image);
    words_free(&n.manner.options);
    words_free(&n.manner.parameters);
    free(n.serve.hits);
    free(n.certificates);
    free(n.psk);
    free(n.user);
    return code;
}

static const struct cli_option *const sets[] = {connection_options, kernel_options,  disk_options,
                                                cli_opts_image,     cli_opts_common, NULL};

const struct cli_command cli_cmd_qemu_nbd = {
    .name = "qemu-nbd",
    .operands = "FILE",
    .brief = "Serve a disk over NBD, or list what a server has",
    .about = "Ends with the last client, unless -t is given.",
    .sets = sets,
    .roles = CLI_QEMU_NBD,
    .run = run,
};
