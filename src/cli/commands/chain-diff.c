/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* chain diff: in which ranges two disks differ. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/common/image.h"
#include "cli/common/json.h"
#include "cli/common/progress.h"
#include "drover/chain.h"

enum { EXIT_SAME = 0, EXIT_DIFFER = 1, EXIT_NOT_OPENED = 2, EXIT_READ = 4 }; /* as compare's */

struct differences {
    bool json;
    uint64_t ranges, bytes;
    int output; /* errno: why what was found could not be written */
};

static int print_range(void *user, uint64_t off, uint64_t len)
{
    struct differences *d = user;

    if (d->json)
        printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64 "}", d->ranges ? ",\n" : "", off,
               len);
    else
        printf("%s%#-16" PRIx64 "%#-16" PRIx64 "\n", d->ranges ? "" : "Offset          Length\n",
               off, len);
    d->ranges++;
    d->bytes += len;
    /* What follows would be lost, too; a later flush would not tell why. */
    if (ferror(stdout))
        d->output = errno ? errno : EIO;
    return -d->output;
}

static int open_one(const struct cli *cli, const struct cli_args *args, int operand, int format_key,
                    struct dr_disk **disk)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    const struct cli_image_spec spec = {.name = args->operands[operand], .format_key = format_key};

    if (cli_image_get(cli, args, &spec, &image) != 0 || cli_image_open(cli, &image, disk) < 0)
        return EXIT_NOT_OPENED;
    return 0;
}

static void tell_sum(const struct differences *d, uint64_t a, uint64_t b)
{
    char text[CLI_SIZE_TEXT];

    if (d->ranges == 0)
        printf("No difference.\n");
    else
        printf("%" PRIu64 " bytes (%s) in %" PRIu64 " range%s differ.\n", d->bytes,
               cli_human_size(d->bytes, text), d->ranges, d->ranges == 1 ? "" : "s");
    if (a != b)
        printf("The sizes differ: %" PRIu64 " and %" PRIu64 " bytes.\n", a, b);
}

/* What was found must have been written, also where the exit code is no 0 anyway. */
static int finish_output(const struct cli *cli, struct differences *d, int code)
{
    if (!d->output && fflush(stdout) != 0)
        d->output = errno;
    if (!d->output)
        return code;
    if (d->output != EPIPE) /* the reader of a pipe may have enough */
        cli_error(cli, "standard output: %s", strerror(d->output));
    return EXIT_READ;
}

int cli_chain_diff(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_DISK struct dr_disk *a = NULL;
    CLEANUP_DISK struct dr_disk *b = NULL;
    struct dr_error err = DR_ERROR_INIT;
    struct differences d = {0};
    struct cli_job job;
    int code;

    if (args->n_operands != 3)
        return cli_usage(cli, "Expecting diff and two image file names");
    if (cli_output_json(cli, args, &d.json) != 0)
        return EXIT_NOT_OPENED;
    if (open_one(cli, args, 1, 'f', &a) != 0 || open_one(cli, args, 2, 'F', &b) != 0 ||
        cli_job_begin(cli, args, NULL, &job) != 0)
        return EXIT_NOT_OPENED;
    if (d.json)
        printf("[");
    int r = dr_diff(a, b, print_range, &d, job.job, &err);
    if (d.json)
        printf("]\n");
    if (r < 0 && !d.output) {
        code = cli_job_failed(&job, r, &err, EXIT_READ, "not all was compared");
    } else {
        code = d.ranges > 0 ? EXIT_DIFFER : EXIT_SAME;
        if (!d.json && !job.quiet)
            tell_sum(&d, dr_size(a), dr_size(b));
        code = finish_output(cli, &d, code);
    }
    cli_job_end(&job);
    return code;
}
