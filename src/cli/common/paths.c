/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>
#include <sys/stat.h>

#include "cli/common/image.h"
#include "cli/common/paths.h"

char *cli_path_beside(const char *path, const char *name)
{
    const char *slash = strrchr(path, '/');
    char *joined;

    if (dr_name_format(name))
        return dr_name_beside(path, name);
    if (name[0] == '/' || !slash || strncmp(name, "json:", 5) == 0 || dr_name_is_remote(name))
        return strdup(name);
    if (asprintf(&joined, "%.*s%s", (int)(slash - path + 1), path, name) < 0)
        return NULL;
    return joined;
}

/* QEMU looks for the colon in front of the first slash. */
static size_t protocol_length(const struct cli *cli, const char *name)
{
    size_t n = strcspn(name, ":/");

    if (cli->role == CLI_DROVER || dr_name_format(name) || dr_name_is_remote(name))
        return 0;
    return name[n] == ':' ? n : 0;
}

char *cli_plain_name(const struct cli *cli, const char *name)
{
    char *plain;

    if (protocol_length(cli, name) != 4 || strncmp(name, "file", 4) != 0)
        return strdup(name);
    name += 5;
    /* Put "./" in front where a second pass through here would remove more or see a protocol. */
    if (asprintf(&plain, "%s%s", protocol_length(cli, name) ? "./" : "", name) < 0)
        return NULL;
    return plain;
}

size_t cli_foreign_protocol(const struct cli *cli, const char *name)
{
    size_t n = protocol_length(cli, name);

    return n == 4 && strncmp(name, "file", 4) == 0 ? 0 : n;
}

char *cli_stem(const char *path)
{
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    const char *dot = strrchr(base, '.');
    return dot && dot > base ? strndup(base, (size_t)(dot - base)) : strdup(base);
}

bool cli_is_directory(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool cli_same_file(const char *a, const char *b)
{
    struct stat sa, sb;

    return stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev &&
           sa.st_ino == sb.st_ino;
}

char *cli_directory_of(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash == path ? strdup("/")
           : slash       ? strndup(path, (size_t)(slash - path))
                         : strdup(".");
}

bool cli_name_exists(const char *name)
{
    CLEANUP_FREE char *file = dr_name_file(name);

    return file && (dr_name_is_remote(file) || access(file, F_OK) == 0);
}

void cli_export_allowed(const struct cli_args *args)
{
    const char *dir;

    for (size_t i = 0; (dir = cli_nth_value(args, KEY_ALLOW_PATH, i)); i++) {
        const char *before = getenv("DROVER_ALLOW_PATH");
        char *joined;
        if ((strchr(dir, ':') && !dr_name_is_remote(dir)) ||
            asprintf(&joined, "%s%s%s", before ? before : "", before && *before ? ":" : "", dir) <
                0)
            continue;
        setenv("DROVER_ALLOW_PATH", joined, 1);
        free(joined);
    }
}

/* Every format takes the first of these options, and those whose images may have a backing image
 * the others, although their own tables do not list them. */
static const struct dr_create_option general[] = {
    {"size", "size", "Virtual disk size", NULL},
    {"backing_file", "str", "File name of a base image", NULL},
    {"backing_fmt", "str", "Image format of the base image", NULL},
};

static bool can_back(const char *format)
{
    struct dr_format_info info;
    size_t i = 0;

    while (dr_format_list(i, &info) == 0 && strcmp(info.name, format) != 0)
        i++;
    return dr_format_list(i, &info) == 0 && info.can_back;
}

static size_t collect(const char *format, bool with_parent, struct dr_create_option *list,
                      size_t max)
{
    size_t n = 0,
           n_general = with_parent && can_back(format) ? sizeof(general) / sizeof(general[0]) : 1;

    for (size_t i = 0; n < max && dr_format_option(format, i, &list[n]) == 0; i++)
        n++;
    for (size_t g = 0; g < n_general; g++) {
        bool there = false;
        for (size_t i = 0; i < n; i++)
            there = there || strcmp(list[i].name, general[g].name) == 0;
        if (!there && n < max)
            list[n++] = general[g];
    }
    return n;
}

bool cli_option_exists(const char *format, const char *name)
{
    struct dr_create_option o;

    for (size_t i = 0; dr_format_option(format, i, &o) == 0; i++) {
        if (strcmp(o.name, name) == 0)
            return true;
    }
    return false;
}

bool cli_wants_option_list(const struct cli_args *args)
{
    const char *text;

    for (size_t i = 0; (text = cli_nth_value(args, 'o', i)); i++) {
        CLEANUP_PAIRS struct cli_pairs list = {0};
        if (cli_pairs_add(&list, text) == 0 &&
            (cli_pairs_find(&list, "help") || cli_pairs_find(&list, "?")))
            return true;
    }
    return false;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct dr_create_option *)a)->name,
                  ((const struct dr_create_option *)b)->name);
}

int cli_print_option_list(const struct cli *cli, const char *format, bool with_file,
                          bool with_parent)
{
    struct dr_create_option list[64];

    if (!cli_format_exists(format)) {
        cli_error(cli, "Unknown file format '%s'", format);
        return 1;
    }
    size_t n = collect(format, with_parent, list, sizeof(list) / sizeof(list[0]));
    qsort(list, n, sizeof(list[0]), by_name);
    if (with_file)
        printf("Supported options:\n");
    else
        printf("Supported %s options:\n", format);
    for (size_t i = 0; i < n; i++) {
        char left[80];
        snprintf(left, sizeof(left), "%s=<%s>", list[i].name, list[i].type);
        printf("  %-22s - %s\n", left, list[i].help);
    }
    if (!with_file)
        printf("\nThe protocol level may support further options.\n"
               "Specify the target filename to include those options.\n");
    return 0;
}
