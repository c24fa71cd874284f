/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/common/snapshot-text.h"

#include <inttypes.h>
#include <time.h>

#include "cli/common/json.h"

static const char *text_of(const json_t *snapshot, const char *key)
{
    const char *text = json_string_value(json_object_get(snapshot, key));

    return text ? text : "";
}

static void date_text(const json_t *snapshot, char *text, size_t size)
{
    time_t seconds = (time_t)cli_json_number(snapshot, "date-sec");
    struct tm tm;

    if (!localtime_r(&seconds, &tm) || strftime(text, size, "%Y-%m-%d %H:%M:%S", &tm) == 0)
        text[0] = 0;
}

static void print_one(const json_t *s)
{
    char date[40], clock[60], icount[24] = "", size[CLI_SIZE_TEXT];
    uint64_t seconds = cli_json_number(s, "vm-clock-sec");
    CLEANUP_FREE char *names = NULL;

    date_text(s, date, sizeof(date));
    snprintf(clock, sizeof(clock), "%02" PRIu64 ":%02" PRIu64 ":%02" PRIu64 ".%03" PRIu64,
             seconds / 3600, seconds / 60 % 60, seconds % 60,
             cli_json_number(s, "vm-clock-nsec") / 1000000 % 1000);
    if (json_object_get(s, "icount"))
        snprintf(icount, sizeof(icount), "%" PRId64, (int64_t)cli_json_number(s, "icount"));
    if (asprintf(&names, "%-9s %-16s", text_of(s, "id"), text_of(s, "name")) < 0)
        names = NULL;
    cli_put(names ? names : "");
    printf(" %8s%20s%13s%11s\n", cli_human_size(cli_json_number(s, "vm-state-size"), size), date,
           clock, icount);
}

void cli_print_snapshots(const json_t *info)
{
    const json_t *all = json_object_get(info, "snapshots");
    json_t *one;
    size_t i;

    if (json_array_size(all) == 0)
        return;
    printf("Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE",
           "VM CLOCK", "ICOUNT");
    json_array_foreach((json_t *)all, i, one) print_one(one);
}
