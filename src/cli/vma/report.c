/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <time.h>

#include "cli/vma/vma.h"

static int64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec;
}

static bool changed(struct vma_report *r, uint64_t done, uint64_t total)
{
    /* In floating point: the sizes of an archive need not be true. */
    int percent = total ? (int)(100.0 * ((double)done / (double)total)) : 100;
    bool other = percent != r->percent;

    r->percent = percent;
    return other;
}

static int on_read(void *user, uint64_t done, uint64_t total)
{
    struct vma_report *r = user;

    if (r->percent < 0)
        r->start = now();
    if (changed(r, done, total)) {
        printf("progress %d%% (read %" PRIu64 " bytes, duration %" PRId64 " sec)\n", r->percent,
               done, now() - r->start);
        fflush(stdout);
    }
    return 0;
}

static int on_write(void *user, uint64_t done, uint64_t total)
{
    struct vma_report *r = user;

    if (changed(r, done, total))
        fprintf(stderr, "progress %d%% %" PRIu64 "/%" PRIu64 " %" PRIu64 "\n", r->percent, done,
                total, *r->zeros);
    return 0;
}

static int on_nothing(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)done;
    (void)total;
    return 0;
}

static void on_message(void *user, const char *text)
{
    struct vma_report *r = user;

    cli_error(r->job.cli, "%s", text);
}

void vma_report_begin(const struct cli *cli, struct vma_report *r, bool verbose)
{
    const struct cli_args none = {0};

    *r = (struct vma_report){.percent = -1};
    cli_job_begin(cli, &none, NULL, &r->job);
    r->job.progress = verbose ? on_read : on_nothing;
    r->job.message = on_message;
    r->job.user = r;
}

void vma_report_begin_create(const struct cli *cli, struct vma_report *r, uint64_t *zeros)
{
    vma_report_begin(cli, r, false);
    r->zeros = zeros;
    if (zeros)
        r->job.progress = on_write;
}

void vma_report_totals(const struct dr_vma_extract_result *result)
{
    uint64_t all = result->bytes_read, holes = result->zero_cluster_bytes;

    if (all == 0) {
        printf("vma archive contains no image data\n");
        return;
    }
    printf("total bytes read %" PRIu64 ", sparse bytes %" PRIu64 " (%.3g%%)\n", all, holes,
           100.0 * (double)holes / (double)all);
    if (all > holes)
        printf("space reduction due to 4K zero blocks %.3g%%\n",
               100.0 * (double)(result->zero_bytes - holes) / (double)(all - holes));
}
