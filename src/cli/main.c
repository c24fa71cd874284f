/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <getopt.h>
#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>

#include "base/cleanup.h"
#include "cli/cli.h"
#include "cli/vma/vma.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/suggest.h"

const struct cli_command *cli_find_command(const char *name, enum cli_role role)
{
    for (size_t i = 0; cli_commands[i]; i++) {
        if (strcmp(cli_commands[i]->name, name) == 0 && (cli_commands[i]->roles & role))
            return cli_commands[i];
    }
    return NULL;
}

/* "vma", "list" → the command "vma list"; NULL: there is none. */
static const struct cli_command *find_child(const struct cli_command *command, const char *name)
{
    size_t n = strlen(command->name) + 1;

    for (size_t i = 0; name && command->children && command->children[i]; i++) {
        if (strcmp(command->children[i]->name + n, name) == 0)
            return command->children[i];
    }
    return NULL;
}

void cli_print_version(const struct cli *cli)
{
    if (cli->role == CLI_DROVER)
        printf("drover %s\n", dr_version());
    else /* scripts ask this line what they may expect; ovirt-imageio takes qemu-nbd's second word
          */
        printf("%s %s7.2.0 (drover %s)\n", cli->prog, cli->role == CLI_QEMU_NBD ? "" : "version ",
               dr_version());
}

static void print_formats(void)
{
    struct dr_format_info info;

    printf("Supported formats:");
    for (size_t i = 0; dr_format_list(i, &info) == 0; i++)
        printf(" %s", info.name);
    printf("\n");
}

static void print_overview(const struct cli *cli)
{
    cli_print_version(cli);
    if (cli->role == CLI_QEMU_IMG)
        printf("usage: qemu-img [standard options] command [command options]\n"
               "\nCommand syntax:\n");
    else
        printf("usage: drover COMMAND [OPTION]... [IMAGE]...\n\nCommands:\n");
    for (size_t i = 0; cli_commands[i]; i++) {
        if (!(cli_commands[i]->roles & cli->role))
            continue;
        if (cli->role == CLI_QEMU_IMG)
            cli_print_synopsis(cli, cli_commands[i]);
        else
            printf("  %-12s %s\n", cli_commands[i]->name, cli_commands[i]->brief);
    }
    if (cli->role == CLI_DROVER)
        printf("\n'drover COMMAND --help' tells about each; the manual is drover(1).\n"
               "Called as qemu-img, qemu-io, qemu-nbd or vma, the program is that tool.\n");
    printf("\n");
    print_formats();
}

/* Is standard output a pipe or socket whose reader is gone? */
static bool reader_is_gone(void)
{
    struct pollfd p = {.fd = STDOUT_FILENO, .events = POLLOUT};

    return poll(&p, 1, 0) > 0 && (p.revents & POLLERR);
}

/* If the program was started with descriptor 0, 1 or 2 closed, the first images opened would get
 * these numbers, and messages would be written into a disk. Occupy them with descriptors that
 * can be neither read nor written. */
static void occupy_standard_files(void)
{
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/", O_PATH) != fd)
            _exit(1); /* nobody to tell */
    }
}

/* jansson leaves out of an object, or of a text, what it has no memory for, and many of its callers
 * cannot notice: so its allocator does. */
static atomic_bool json_is_short;

static void *json_allocate(size_t size)
{
    void *memory = malloc(size);

    if (!memory)
        atomic_store(&json_is_short, true);
    return memory;
}

/* QEMU's tools succeed even when there is nowhere to print to. */
static bool nobody_listens(const struct cli *cli)
{
    int flags = fcntl(STDOUT_FILENO, F_GETFL);

    return (cli->role & (CLI_QEMU_IMG | CLI_QEMU_IO)) && flags >= 0 && (flags & O_PATH);
}

/* Output that could not be written is a failure, unless the reader of a pipe went away on
 * purpose. */
static int finish(const struct cli *cli, int code)
{
    int e = fflush(stdout) != 0 ? errno : 0;

    if (code == 0 && atomic_load(&json_is_short)) {
        cli_error(cli, "out of memory: the output is not whole");
        return 1;
    }
    if (code != 0 || (e == 0 && !ferror(stdout)))
        return code;
    if (nobody_listens(cli))
        return 0;
    if (e == EPIPE || reader_is_gone())
        return 1;
    cli_error(cli, "standard output: %s", e ? strerror(e) : "not everything could be written");
    return 1;
}

static int run_command(struct cli *cli, int argc, char **argv)
{
    struct cli_args args;
    int code = 1;

    if (!cli_parse(cli, argc, argv, &args, &code)) {
        cli_args_free(&args);
        return code;
    }
    if (args.help) {
        cli_print_help(cli, cli->command);
        code = 0;
    } else if (cli_objects_check(cli, &args) < 0) {
        code = 1;
    } else {
        code = cli->command->run(cli, &args);
    }
    cli_args_free(&args);
    return finish(cli, code);
}

static int run_help(struct cli *cli, const char *name, const char *child)
{
    if (name && !(cli->command = cli_find_command(name, cli->role)))
        return cli_usage(cli, "Command not found: %s%s", name, cli_meant_command(cli->role, name));
    if (name && find_child(cli->command, child))
        cli->command = find_child(cli->command, child);
    if (cli->command)
        cli_print_help(cli, cli->command);
    else
        print_overview(cli);
    return finish(cli, 0);
}

static bool is_one_of(const char *word, const char *a, const char *b)
{
    return strcmp(word, a) == 0 || strcmp(word, b) == 0;
}

static int run_program(struct cli *cli, int argc, char **argv)
{
    if (argc < 2)
        return cli_usage(cli, "Not enough arguments");
    const char *word = argv[1];
    if (is_one_of(word, "-V", "--version") ||
        (cli->role == CLI_DROVER && strcmp(word, "version") == 0)) {
        cli_print_version(cli);
        return finish(cli, 0);
    }
    if (is_one_of(word, "-h", "--help"))
        return run_help(cli, NULL, NULL);
    if (cli->role == CLI_DROVER && strcmp(word, "help") == 0)
        return run_help(cli, argv[2], argc > 2 ? argv[3] : NULL);
    if (word[0] == '-')
        return cli_usage(cli, "unrecognized option '%s'", word);
    cli->command = cli_find_command(word, cli->role);
    if (!cli->command)
        return cli_usage(cli, "Command not found: %s%s", word, cli_meant_command(cli->role, word));
    const struct cli_command *child = find_child(cli->command, argv[2]);
    if (!child)
        return run_command(cli, argc - 1, argv + 1);
    cli->command = child;
    return run_command(cli, argc - 2, argv + 2);
}

/* qemu-img [-T TRACE] command: there is nothing to trace. */
static int run_qemu_img(struct cli *cli, int argc, char **argv)
{
    static const struct option longs[] = {{"help", no_argument, NULL, 'h'},
                                          {"version", no_argument, NULL, 'V'},
                                          {"trace", required_argument, NULL, 'T'},
                                          {0}};
    int c;

    opterr = 0;
    while ((c = getopt_long(argc, argv, "+:hVT:", longs, NULL)) != -1) {
        if (c == 'h')
            return run_help(cli, NULL, NULL);
        if (c == 'V') {
            cli_print_version(cli);
            return finish(cli, 0);
        }
        if (c != 'T')
            return cli_refuse_option(cli, c, argv);
    }
    return run_program(cli, argc - optind + 1, argv + optind - 1);
}

static int run_vma(struct cli *cli, int argc, char **argv)
{
    return finish(cli, vma_tool(cli, argc, argv));
}

static int run_qemu_io(struct cli *cli, int argc, char **argv)
{
    cli->command = &cli_cmd_io;
    return run_command(cli, argc, argv);
}

static int run_qemu_nbd(struct cli *cli, int argc, char **argv)
{
    cli->command = &cli_cmd_qemu_nbd;
    return run_command(cli, argc, argv);
}

/* A split disk has thousands of files, an archive 254 disks. Until a shell is told otherwise it
 * allows 1024, for the sake of programs that use select(). */
static void allow_many_files(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void tell_unpacking(void *user, const char *text)
{
    (void)user;
    fprintf(stderr, "%s\n", text);
}

/* An image may be opened several times in one command: say the same only once. */
static void print_notice(void *user, const char *text)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static char last[256];

    DR_LOCK_SCOPE(&lock);
    if (strncmp(last, text, sizeof(last) - 1) == 0)
        return;
    snprintf(last, sizeof(last), "%s", text);
    cli_error(user, "warning: %s", text);
}

int main(int argc, char **argv)
{
    const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
    const char *name = slash ? slash + 1 : argc > 0 ? argv[0] : "drover";
    struct cli cli = {.prog = "drover", .role = CLI_DROVER};

    occupy_standard_files();
    allow_many_files();
    json_set_alloc_funcs(json_allocate, free);
    /* A reader that goes away must not kill us between two steps of an operation; finish() sees it.
     */
    signal(SIGPIPE, SIG_IGN);
    dr_set_unpacking(&(struct dr_unpacking){.stop = cli_stop(), .message = tell_unpacking});
    signal(SIGXFSZ, SIG_IGN); /* a limit on the size of files is an error like a full disk */
    dr_on_notice(print_notice, &cli);
    static const struct {
        struct cli cli;
        int (*run)(struct cli *cli, int argc, char **argv);
    } tools[] = {
        {{.prog = "qemu-img", .role = CLI_QEMU_IMG}, run_qemu_img},
        {{.prog = "qemu-io", .role = CLI_QEMU_IO}, run_qemu_io},
        {{.prog = "qemu-nbd", .role = CLI_QEMU_NBD}, run_qemu_nbd},
        {{.prog = "vma", .role = CLI_VMA}, run_vma},
    };
    for (size_t i = 0; i < sizeof(tools) / sizeof(tools[0]); i++) {
        if (strcmp(name, tools[i].cli.prog) == 0) {
            cli = tools[i].cli;
            return tools[i].run(&cli, argc, argv);
        }
    }
    return run_program(&cli, argc, argv);
}
