/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/progress.h"
#include "drover/checksum.h"

static const struct cli_option options[] = {
    {'f', NULL, "FMT", "format of the first image", false},
    {'F', NULL, "FMT", "format of the second image", false},
    {KEY_IMAGE_OPTS, "image-opts", NULL, "FILEs are lists like driver=vmdk,file.filename=PATH",
     false},
    {'T', NULL, "CACHE", "cache mode: none, writeback, unsafe, ...", false},
    {'s', NULL, NULL, "strict: sizes and allocation must be the same too", false},
    {0, NULL, NULL, NULL, false},
};

enum { EXIT_SAME = 0, EXIT_DIFFER = 1, EXIT_NOT_OPENED = 2, EXIT_STATUS = 3, EXIT_READ = 4 };

/* `common` is the size of the shorter disk. A difference behind it is one of size. */
static int tell(const struct dr_compare_result *result, uint64_t common, bool strict, bool quiet)
{
    if (strict && result->size_differs) {
        if (!quiet)
            printf("Strict mode: Image size mismatch!\n");
        return EXIT_DIFFER;
    }
    if (result->size_differs && !quiet && (result->same || result->mismatch_off >= common))
        printf("Warning: Image size mismatch!\n");
    if (!result->same) {
        if (!quiet && result->strict_allocation)
            printf("Strict mode: Offset %" PRIu64 " block status mismatch!\n",
                   result->mismatch_off);
        else if (!quiet)
            printf("Content mismatch at offset %" PRIu64 "!\n", result->mismatch_off);
        return EXIT_DIFFER;
    }
    if (!quiet)
        printf("Images are identical.\n");
    return EXIT_SAME;
}

static int open_one(const struct cli *cli, const struct cli_args *args, int n,
                    struct cli_job_limits *limits, struct dr_disk **disk)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    const struct cli_image_spec spec = {.name = args->operands[n],
                                        .format_key = n == 0 ? 'f' : 'F',
                                        .cache_key = 'T',
                                        .rate = &limits->rate};

    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, disk) < 0)
        return EXIT_NOT_OPENED;
    return 0;
}

/* ------------------------------------------------------------------ against saved checksums */

/* Is this operand what `drover checksum --save` wrote? With a format it is an image. A guest may
 * write the same letters to the beginning of its disk, so all of the file has to be right. 0, or
 * the exit code. */
static int is_saved(const struct cli *cli, const struct cli_args *args, int n, bool *saved)
{
    struct dr_error err = DR_ERROR_INIT;
    struct stat st;

    *saved = false;

    if (cli->role != CLI_DROVER || cli_has(args, n == 0 ? 'f' : 'F') ||
        cli_has(args, KEY_IMAGE_OPTS) || stat(args->operands[n], &st) < 0 || !S_ISREG(st.st_mode))
        return 0;
    if (dr_checksum_is_saved(args->operands[n], saved, &err) == -EINVAL) {
        cli_error(cli, "%s; -%c raw compares it as a disk", err.text, n == 0 ? 'f' : 'F');
        return EXIT_READ;
    }
    return EXIT_SAME; /* opening it tells why it cannot be read */
}

struct first {
    uint64_t off, end; /* end 0: nothing differs */
};

static void range_differs(void *user, uint64_t off, uint64_t len)
{
    struct first *first = user;

    if (first->end == 0)
        *first = (struct first){off, off + len};
}

static int compare_saved(const struct cli *cli, const struct cli_args *args, int saved, bool both)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct first first = {0};
    struct cli_job_limits limits = {0};
    const struct dr_checksum_options o = {
        .against = args->operands[saved], .differs = range_differs, .user = &first};
    struct dr_checksum_result result = {0};
    struct dr_error err = DR_ERROR_INIT;
    struct cli_job job;

    if (cli_has(args, 's') || both) {
        cli_error(cli,
                  cli_has(args, 's') ? "%s: checksums do not tell what is allocated: leave -s out"
                                     : "%s: holds checksums, and so does the other one",
                  o.against);
        return EXIT_NOT_OPENED;
    }
    if (open_one(cli, args, 1 - saved, &limits, &disk) ||
        cli_job_begin(cli, args, &limits, &job) != 0)
        return EXIT_NOT_OPENED;
    int r = dr_disk_checksum(disk, &o, job.job, &result, &err);
    int code = r < 0 ? cli_job_failed(&job, r, &err, EXIT_READ, "nothing was decided") : EXIT_SAME;
    if (r == 0 && result.size != result.against_size && !job.quiet)
        printf("Warning: Image size mismatch!\n");
    if (r == 0 && !result.same && !job.quiet)
        printf("Content mismatch within %" PRIu64 "..%" PRIu64 "!\n", first.off, first.end);
    else if (r == 0 && !job.quiet)
        printf("Images are identical.\n");
    cli_job_end(&job);
    return r == 0 && !result.same ? EXIT_DIFFER : code;
}

/* ------------------------------------------------------------------ two disks */

static int run(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_DISK struct dr_disk *a = NULL;
    CLEANUP_DISK struct dr_disk *b = NULL;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_compare_result result = {0};
    struct cli_job_limits limits = {0};
    struct cli_job job;
    bool strict = cli_has(args, 's'), saved[2];
    int code, r;

    if (args->n_operands != 2)
        return cli_usage(cli, "Expecting two image file names");
    for (int i = 0; i < 2; i++) {
        code = is_saved(cli, args, i, &saved[i]);
        if (code != EXIT_SAME)
            return code;
    }
    if (saved[0] || saved[1])
        return compare_saved(cli, args, saved[0] ? 0 : 1, saved[0] && saved[1]);
    if (open_one(cli, args, 0, &limits, &a) || open_one(cli, args, 1, &limits, &b))
        return EXIT_NOT_OPENED;
    if (cli_job_begin(cli, args, &limits, &job) != 0)
        return EXIT_NOT_OPENED;
    r = dr_compare(a, b, strict, job.job, &result, &err);
    if (r < 0)
        code = cli_job_failed(&job, r, &err, EXIT_READ, "nothing was decided");
    else
        code = tell(&result, dr_min(dr_size(a), dr_size(b)), strict, job.quiet);
    cli_job_end(&job);
    return code;
}

static const struct cli_option *const sets[] = {options,           cli_opts_share,  cli_opts_quiet,
                                                cli_opts_progress, cli_opts_common, NULL};

const struct cli_command cli_cmd_compare = {
    .name = "compare",
    .operands = "FILE1 FILE2",
    .brief = "Compare what two disks hold",
    .about =
        "Ends with 0: the same, 1: they differ, 2: not opened, 3: no status, 4: not readable.\n"
        "A longer disk is the same when its rest reads as zeros. One FILE may be what\n"
        "`drover checksum --save` wrote.",
    .sets = sets,
    .roles = CLI_DROVER | CLI_QEMU_IMG,
    .run = run,
};
