/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Options are tables: parsing, usage, help, completion and the check of the man page come from
 * them.
 */
#ifndef DR_CLI_OPTIONS_H
#define DR_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

struct cli;
struct cli_command;

enum cli_key { /* options without a letter */
               KEY_OBJECT = 256,
               KEY_IMAGE_OPTS,
               KEY_TARGET_IMAGE_OPTS,
               KEY_TARGET_IS_ZERO,
               KEY_SALVAGE,
               KEY_VERIFY,
               KEY_ORPHANS,
               KEY_BITMAPS,
               KEY_ADOPT,
               KEY_SKIP_BROKEN_BITMAPS,
               KEY_OUTPUT,
               KEY_BACKING_CHAIN,
               KEY_ALLOW_PATH,
               KEY_LOCKING,
               KEY_FINGERPRINTS,
               KEY_PROGRESS,
               KEY_FORCE,
               KEY_DROP_EQUAL,
               KEY_DRY_RUN,
               KEY_BASE,
               KEY_ASCII,
               KEY_SHRINK,
               KEY_PREALLOCATION,
               KEY_JSON,
               KEY_TO,
               KEY_RESUME,
               KEY_ID_NAMES,
               KEY_SUMS,
               KEY_NO_SUMS,
               KEY_NO_VERIFY,
               KEY_HEADERS_ONLY,
               KEY_AGAINST,
               KEY_SAVE,
               KEY_CHECKSUM,
               KEY_COMPRESS,
               KEY_ZSTD,
               KEY_REPRODUCIBLE,
               KEY_UUID,
               KEY_CTIME,
               KEY_NO_SYNC,
               KEY_NO_ZEROS,
               KEY_VMSTATE,
               KEY_VMSTATE_SIZE,
               KEY_SIZE,
               KEY_KEEP,
               KEY_RETIRE,
               KEY_ADD,
               KEY_DISABLED,
               KEY_REMOVE,
               KEY_CLEAR,
               KEY_ENABLE,
               KEY_DISABLE,
               KEY_MERGE,
               KEY_REBUILD,
               KEY_REFUSE_SNAPSHOTS,
               KEY_FOREGROUND,
               KEY_ALLOW_OTHER,
               KEY_ALLOW_ROOT,
               KEY_MEMORY,
               KEY_CPUS,
               KEY_CONTROLLER,
               KEY_NAME,
               KEY_SOCKET,
               KEY_PORT,
               KEY_BIND,
               KEY_TLS,
               KEY_TLS_CERTIFICATES,
               KEY_TLS_PSK,
               KEY_TLS_VERIFY_PEER,
               KEY_TEMPORARY,
               KEY_EXPORT,
               KEY_RUN,
               KEY_PIDFILE,
               KEY_TOP,
               KEY_TOP_ONLY,
               KEY_HURRY,
               KEY_IMAGE,
               KEY_DOWN,
               KEY_NO_COMPLETE,
               KEY_DETACH,
               KEY_ON_ERROR,
               KEY_CONTROL,
               KEY_STATE,
               KEY_FULL,
               KEY_BITMAP,
               KEY_SINCE,
               KEY_PRUNE,
               KEY_ALL,
               KEY_CONSISTENT,
               KEY_SPILL,
               KEY_SPILL_SIZE,
               KEY_WHEN_FULL,
               KEY_SEARCH,
               KEY_FINGERPRINT,
               KEY_FULL_HASH,
               KEY_EXTERNAL,
               KEY_UP,
               KEY_UPDATE_VMSD,
               KEY_FLUSH_INTERVAL,
               KEY_NO_DRAIN,
               KEY_PATTERN,
               KEY_FORK,
               KEY_CACHE,
               KEY_AIO,
               KEY_DISCARD,
               KEY_DETECT_ZEROES,
               KEY_TLS_CREDS,
               KEY_TLS_AUTHZ,
               KEY_SELINUX_LABEL,
               KEY_LIMITS,
               KEY_TLS_HOSTNAME,
               KEY_HANDSHAKE_LIMIT,
};

struct cli_option {
    int key;          /* the letter, or an enum cli_key; 0 ends a table */
    const char *name; /* long name, or NULL */
    const char *arg;  /* what its argument is called, or NULL: takes none */
    const char *help;
    bool unsupported; /* known, but refused with a clear message */
};

struct cli_hit {
    int key;
    const char *arg;
};

struct cli_args {
    struct cli_hit *hits; /* in the order given */
    size_t n_hits;
    char **operands;
    int n_operands;
    bool help;
};

/* argv[0] is the command's name. False: a message or the help was printed, and the program ends
 * with *exit_code. */
bool cli_parse(const struct cli *cli, int argc, char **argv, struct cli_args *args, int *exit_code);
/* Print why getopt_long() returned ":" or "?". Returns the exit code. */
int cli_refuse_option(const struct cli *cli, int c, char **argv);
void cli_args_free(struct cli_args *args);

bool cli_has(const struct cli_args *args, int key);
const char *cli_value(const struct cli_args *args, int key); /* the last one, or NULL */
/* The n-th (from 0) value given for key, or NULL. */
const char *cli_nth_value(const struct cli_args *args, int key, size_t n);

/* Walk over all options of a command: *i starts at 0. NULL at the end. */
const struct cli_option *cli_next_option(const struct cli_command *command, size_t *i);
/* The next other name of an option, from *i on, that the program has under the name it was called
 * by: a long one, or NULL and a letter. key is the option's. False: there are no more. */
bool cli_next_alias(const struct cli *cli, size_t *i, const char **name, int *letter, int *key);

/* Sets that several commands share. */
extern const struct cli_option cli_opts_common[];   /* --help, --allow-path, --locking, --object */
extern const struct cli_option cli_opts_image[];    /* --image-opts, -f */
extern const struct cli_option cli_opts_share[];    /* -U */
extern const struct cli_option cli_opts_quiet[];    /* -q */
extern const struct cli_option cli_opts_progress[]; /* -p, --progress */

void cli_print_synopsis(const struct cli *cli, const struct cli_command *command);
void cli_print_help(const struct cli *cli, const struct cli_command *command);

#endif
