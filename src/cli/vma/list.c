/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <string.h>
#include <time.h>

#include "cli/vma/vma.h"
#include "cli/common/json.h"

/* ------------------------------------------------------------------ for programs */

static int check_name(const struct cli *cli, const char *archive, const char *what,
                      const char *name)
{
    if (vma_is_plain(name))
        return 0;
    CLEANUP_FREE char *escaped = vma_escape(name);
    cli_error(cli, "%s: the name of a %s has control characters: '%s'", vma_shown(archive), what,
              escaped ? escaped : "?");
    return -1;
}

static void print_time(int64_t ctime)
{
    time_t t = (time_t)ctime;
    struct tm tm;
    char text[64];

    /* As ctime() prints it, which has no text for years of more than four digits. */
    if (ctime < 0 || !localtime_r(&t, &tm) || tm.tm_year > 9999 - 1900 ||
        strftime(text, sizeof(text), "%a %b %e %H:%M:%S %Y", &tm) == 0)
        printf("CTIME: %" PRId64 "\n", ctime);
    else
        printf("CTIME: %s\n", text);
}

int vma_print_listing(const struct cli *cli, const char *archive,
                      const struct dr_vma_header *header)
{
    for (size_t i = 0; i < header->n_configs; i++) {
        if (check_name(cli, archive, "configuration file", header->configs[i].name) < 0)
            return -1;
    }
    for (size_t i = 0; i < header->n_disks; i++) {
        if (check_name(cli, archive, "device", header->disks[i].name) < 0)
            return -1;
    }
    for (size_t i = 0; i < header->n_configs; i++)
        printf("CFG: size: %zu name: %s\n", header->configs[i].len, header->configs[i].name);
    for (size_t i = 0; i < header->n_disks; i++) {
        const struct dr_vma_disk *d = &header->disks[i];
        if (d->vmstate)
            printf("VMSTATE: dev_id=%u memory: %" PRIu64 "\n", d->id, d->size);
        else
            printf("DEV: dev_id=%u size: %" PRIu64 " devname: %s\n", d->id, d->size, d->name);
    }
    print_time(header->ctime);
    if (fflush(stdout) == 0) /* who drives us waits for this line */
        return 0;
    if (errno != EPIPE) /* whoever went away knows */
        cli_error(cli, "standard output: %s", strerror(errno));
    return -1;
}

/* ------------------------------------------------------------------ for people and JSON */

static void uuid_text(const uint8_t uuid[16], char text[37])
{
    for (unsigned i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10)
            *text++ = '-';
        text += sprintf(text, "%02x", uuid[i]);
    }
}

static json_t *disk_json(const struct dr_vma_disk *d)
{
    return json_pack("{s:i, s:o, s:I, s:b}", "id", (int)d->id, "name", vma_json_name(d->name),
                     "size", (json_int_t)d->size, "vmstate", d->vmstate);
}

static void print_as_json(const char *name, const struct dr_vma_header *h)
{
    char uuid[37];
    json_t *disks = json_array(), *configs = json_array();

    uuid_text(h->uuid, uuid);
    for (size_t i = 0; i < h->n_disks; i++)
        json_array_append_new(disks, disk_json(&h->disks[i]));
    for (size_t i = 0; i < h->n_configs; i++)
        json_array_append_new(configs,
                              json_pack("{s:o, s:I}", "name", vma_json_name(h->configs[i].name),
                                        "size", (json_int_t)h->configs[i].len));
    CLEANUP_JSON json_t *all = json_pack(
        "{s:o, s:s, s:s?, s:s, s:I, s:I, s:o, s:o}", "filename", vma_json_name(name), "format",
        "vma", "compression", h->compression, "uuid", uuid, "ctime", (json_int_t)h->ctime,
        "header-size", (json_int_t)h->header_size, "disks", disks, "configs", configs);
    vma_print_json(all);
}

static void print_name(const char *name, int width)
{
    CLEANUP_FREE char *text = vma_escape(name);

    printf("%-*s", width, text ? text : "?");
}

static void print_made(int64_t ctime)
{
    time_t t = (time_t)ctime;
    struct tm tm;
    char text[64];

    if (localtime_r(&t, &tm) && strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", &tm) > 0)
        printf("made: %s\n", text);
    else
        printf("made: %" PRId64 " seconds after 1970\n", ctime);
}

static void print_for_people(const char *name, const struct dr_vma_header *h)
{
    char uuid[37], size[CLI_SIZE_TEXT];

    uuid_text(h->uuid, uuid);
    printf("archive: ");
    print_name(name, 0);
    if (h->compression)
        printf(" (%s)", h->compression);
    printf("\n");
    print_made(h->ctime);
    printf("uuid: %s\n", uuid);
    printf("configuration files:%s\n", h->n_configs ? "" : " none");
    for (size_t i = 0; i < h->n_configs; i++) {
        printf("    ");
        print_name(h->configs[i].name, 24);
        printf(" %zu bytes\n", h->configs[i].len);
    }
    printf("disks:%s\n", h->n_disks ? "" : " none");
    for (size_t i = 0; i < h->n_disks; i++) {
        const struct dr_vma_disk *d = &h->disks[i];
        printf("    ");
        print_name(d->name, 24);
        printf(" %s (%" PRIu64 " bytes)%s\n", cli_human_size(d->size, size), d->size,
               d->vmstate ? ", the state of the running machine" : "");
    }
}

static int run_list(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_VMA struct dr_vma *vma = NULL;
    bool json;

    if (cli_output_json(cli, args, &json) != 0)
        return 1;
    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one archive");
    if (vma_open(cli, args->operands[0], cli_has(args, 'q'), &vma) < 0)
        return 1;
    if (json || vma_wants_json(args))
        print_as_json(args->operands[0], dr_vma_header(vma));
    else
        print_for_people(vma_shown(args->operands[0]), dr_vma_header(vma));
    return 0;
}

/* ------------------------------------------------------------------ configuration files */

static void put_on_terminal(const uint8_t *data, size_t len)
{
    CLEANUP_FREE char *text = malloc(len + 1); /* with an end that is no character */

    if (!text)
        return;
    memcpy(text, data, len);
    text[len] = '\0';
    for (size_t i = 0, n; i < len; i += n) {
        bool lines = text[i] == '\n' || text[i] == '\t';
        n = lines ? 1 : cli_char_length(text + i);
        if (n > 0)
            fwrite(text + i, 1, n, stdout);
        else
            putchar('?');
        n += n == 0;
    }
}

int vma_print_config(const struct dr_vma_header *header, const char *name)
{
    for (size_t i = 0; i < header->n_configs; i++) {
        const struct dr_vma_config *c = &header->configs[i];
        if (strcmp(c->name, name) != 0)
            continue;
        if (isatty(STDOUT_FILENO))
            put_on_terminal(c->data, c->len);
        else
            fwrite(c->data, 1, c->len, stdout);
        return 0;
    }
    return -ENOENT;
}

static int run_config(const struct cli *cli, const struct cli_args *args)
{
    CLEANUP_VMA struct dr_vma *vma = NULL;
    const char *name = cli_has(args, 'c') ? cli_value(args, 'c') : "qemu-server.conf";

    if (args->n_operands != 1)
        return cli_usage(cli, "Expecting one archive");
    if (vma_open(cli, args->operands[0], cli_has(args, 'q'), &vma) < 0)
        return 1;
    if (vma_print_config(dr_vma_header(vma), name) == 0)
        return 0;
    cli_error(cli, "%s: holds no configuration file '%s'", vma_shown(args->operands[0]), name);
    return 255; /* as the tool called vma: scripts tell it from a broken archive */
}

static const struct cli_option list_options[] = {
    {KEY_JSON, "json", NULL, "print JSON", false},
    {KEY_OUTPUT, "output", "human|json", "how to print", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option *const list_sets[] = {list_options, cli_opts_quiet, cli_opts_common,
                                                     NULL};
const struct cli_command vma_cmd_list = {
    .name = "vma list",
    .operands = "ARCHIVE",
    .brief = "Tell what an archive holds, from its header alone",
    .about = "ARCHIVE may be compressed (zstd, gzip, lzop, bzip2, xz, lz4); - is standard input.",
    .sets = list_sets,
    .roles = CLI_DROVER,
    .run = run_list,
};

static const struct cli_option config_options[] = {
    {'c', "config", "NAME", "which (qemu-server.conf)", false},
    {0, NULL, NULL, NULL, false},
};
static const struct cli_option *const config_sets[] = {config_options, cli_opts_quiet,
                                                       cli_opts_common, NULL};
const struct cli_command vma_cmd_config = {
    .name = "vma config",
    .operands = "ARCHIVE",
    .brief = "Print a configuration file that an archive holds",
    .about = "Ends with 255 if the archive holds none of that name. - is standard input.",
    .sets = config_sets,
    .roles = CLI_DROVER,
    .run = run_config,
};
