/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>

#include "cli/common/info-text.h"
#include "cli/common/json.h"
#include "cli/common/snapshot-text.h"

static void print_text(const char *label, const json_t *info, const char *key)
{
    const char *text = json_string_value(json_object_get(info, key));

    if (!text)
        return;
    printf("%s: ", label);
    cli_put(text);
    printf("\n");
}

static void print_nested(const json_t *value, int depth);

static void print_entry(const json_t *value, int depth)
{
    if (json_is_object(value) || json_is_array(value)) {
        printf("\n");
        print_nested(value, depth + 1);
    } else if (json_is_string(value)) {
        printf(" ");
        cli_put(json_string_value(value));
        printf("\n");
    } else if (json_is_integer(value)) {
        printf(" %" JSON_INTEGER_FORMAT "\n", json_integer_value(value));
    } else {
        printf(" %s\n", json_is_true(value) ? "true" : "false");
    }
}

static void print_nested(const json_t *value, int depth)
{
    const char *key;
    json_t *entry;
    size_t i;

    json_array_foreach((json_t *)value, i, entry)
    {
        printf("%*s[%zu]:", depth * 4, "", i);
        print_entry(entry, depth);
    }
    json_object_foreach((json_t *)value, key, entry)
    {
        printf("%*s", depth * 4, "");
        for (const char *c = key; *c; c++)
            putchar(*c == '-' ? ' ' : *c);
        putchar(':');
        print_entry(entry, depth);
    }
}

void cli_print_format_specific(const json_t *info)
{
    const json_t *data = json_object_get(json_object_get(info, "format-specific"), "data");

    if (json_object_size(data) == 0)
        return;
    printf("Format specific information:\n");
    print_nested(data, 1);
}

static void print_backing(const json_t *info)
{
    const char *name = json_string_value(json_object_get(info, "backing-filename"));
    const char *full = json_string_value(json_object_get(info, "full-backing-filename"));

    if (!name)
        return;
    printf("backing file: ");
    cli_put(name);
    if (!full) {
        printf(" (cannot determine actual path)");
    } else if (strcmp(name, full) != 0) {
        printf(" (actual path: ");
        cli_put(full);
        printf(")");
    }
    printf("\n");
    print_text("backing file format", info, "backing-filename-format");
}

static void print_one(const json_t *info)
{
    char text[CLI_SIZE_TEXT];
    uint64_t size = cli_json_number(info, "virtual-size");

    print_text("image", info, "filename");
    print_text("file format", info, "format");
    print_text("packed by", info, "packed-by");
    printf("virtual size: %s (%" PRIu64 " bytes)\n", cli_human_size(size, text), size);
    if (json_object_get(info, "actual-size"))
        printf("disk size: %s\n", cli_human_size(cli_json_number(info, "actual-size"), text));
    else
        printf("disk size: unavailable\n");
    if (json_is_true(json_object_get(info, "encrypted")))
        printf("encrypted: yes\n");
    if (json_object_get(info, "cluster-size"))
        printf("cluster_size: %" PRIu64 "\n", cli_json_number(info, "cluster-size"));
    if (json_is_true(json_object_get(info, "dirty-flag")))
        printf("cleanly shut down: no\n");
    print_backing(info);
    cli_print_snapshots(info);
    cli_print_format_specific(info);
    if (json_array_size(json_object_get(info, "bitmaps")) > 0) {
        printf("Bitmaps:\n");
        print_nested(json_object_get(info, "bitmaps"), 1);
    }
    print_text("bitmaps", info, "bitmaps-problem");
}

void cli_print_info(const json_t *info)
{
    json_t *one;
    size_t i;

    if (json_is_object(info))
        print_one(info);
    json_array_foreach((json_t *)info, i, one)
    {
        if (i > 0)
            printf("\n");
        print_one(one);
    }
}
