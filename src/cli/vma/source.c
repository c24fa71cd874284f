/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "cli/vma/vma.h"

#define MAX_DISKS   254
#define MAX_CONFIGS 256
#define MAX_CONFIG  65535

static int out_of_memory(const struct cli *cli)
{
    cli_error(cli, "out of memory");
    return 1;
}

static struct dr_vma_create_disk *next_disk(struct vma_source *s)
{
    if (s->n_disks < MAX_DISKS)
        return &s->disks[s->n_disks];
    cli_error(s->cli, "an archive holds no more than %d disks", MAX_DISKS);
    return NULL;
}

static int state_size(const struct vma_source *s, int fd, const char *path, const char *text,
                      uint64_t *size)
{
    struct stat st;

    if (text)
        return cli_get_size(s->cli, "size of the state", text, size) < 0;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        *size = (uint64_t)st.st_size;
        return 0;
    }
    cli_error(s->cli, "%s: is no regular file: its size must be given", path);
    return 1;
}

int vma_source_vmstate(struct vma_source *s, const char *path, const char *size)
{
    struct dr_vma_create_disk *d = next_disk(s);
    bool standard = strcmp(path, "-") == 0;

    if (!d)
        return 1;
    CLEANUP_CLOSE int fd = standard ? dup(STDIN_FILENO) : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        cli_error(s->cli, "Could not open '%s': %s", path, strerror(errno));
        return 1;
    }
    uint64_t bytes;
    if (state_size(s, fd, path, size, &bytes) != 0)
        return 1;
    char *name = strdup("vmstate");
    if (!name)
        return out_of_memory(s->cli);
    *d = (struct dr_vma_create_disk){
        .name = name, .vmstate = true, .state_fd = fd, .state_size = bytes};
    s->n_disks++;
    fd = -1;
    return 0;
}

static int open_disk(const struct vma_source *s, const struct cli_args *args, const char *format,
                     const char *path, struct dr_disk **disk)
{
    CLEANUP_IMAGE struct cli_image image = {0};
    const struct cli_image_spec spec = {.name = path};

    if (cli_image_get(s->cli, args, &spec, &image) != 0)
        return 1;
    if (format && !cli_format_exists(format)) {
        cli_error(s->cli, "Could not open '%s': Unknown driver '%s'", path, format);
        return 1;
    }
    image.format = format ? strdup(format) : NULL;
    if (format && !image.format)
        return out_of_memory(s->cli);
    image.open.format = image.format;
    /* Called vma we follow names anywhere, but not such as a guest may have written. */
    if (!format)
        image.open.flags &= ~(unsigned)DR_OPEN_ANY_PATH;
    return cli_image_open(s->cli, &image, disk) < 0;
}

/* Refuse names that could not be listed or extracted again. */
static int check_name(const struct vma_source *s, const char *name)
{
    if (vma_is_plain(name))
        return 0;
    CLEANUP_FREE char *escaped = vma_escape(name);
    cli_error(s->cli, "'%s' is no name for an archive: it has control characters or is not UTF-8",
              escaped ? escaped : "?");
    return 1;
}

/* Takes the name over. */
static int put_disk(struct vma_source *s, const struct cli_args *args, const char *format,
                    char *name, const char *path)
{
    struct dr_vma_create_disk *d = next_disk(s);

    if (!d) {
        free(name);
        return 1;
    }
    *d = (struct dr_vma_create_disk){.name = name, .state_fd = -1};
    s->n_disks++;
    if (check_name(s, name) != 0)
        return 1;
    return open_disk(s, args, format, path, &d->disk);
}

int vma_source_image(struct vma_source *s, const struct cli_args *args, const char *format,
                     const char *name, const char *path)
{
    char *copy = strdup(name);

    return copy ? put_disk(s, args, format, copy, path) : out_of_memory(s->cli);
}

/* "NAME=PATH"; without a NAME, disks are counted. */
static int add_disk(struct vma_source *s, const struct cli_args *args, const char *format,
                    const char *text)
{
    const char *equals = strchr(text, '='), *path = equals ? equals + 1 : text;
    char *name;

    int r = equals ? asprintf(&name, "%.*s", (int)(equals - text), text)
                   : asprintf(&name, "disk%zu", s->n_disks);
    if (r < 0)
        return out_of_memory(s->cli);
    if (strcmp(name, "vmstate") == 0) {
        free(name);
        return vma_source_vmstate(s, path, NULL);
    }
    return put_disk(s, args, format, name, path);
}

int vma_source_disk(struct vma_source *s, const struct cli_args *args, const char *text)
{
    static const char prefix[] = "format=";
    const char *format = text + strlen(prefix);

    if (strncmp(text, prefix, strlen(prefix)) != 0)
        return add_disk(s, args, NULL, text);
    const char *colon = strchr(format, ':');
    if (!colon) {
        cli_error(s->cli, "'%s': expecting format=FORMAT:NAME=PATH", text);
        return 1;
    }
    CLEANUP_FREE char *name = strndup(format, (size_t)(colon - format));
    return name ? add_disk(s, args, name, colon + 1) : out_of_memory(s->cli);
}

/* One byte more than fits tells that it does not. */
static int read_config(const struct vma_source *s, const char *path, uint8_t **data, size_t *len)
{
    CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : 1;

    *len = 0;
    *data = malloc(MAX_CONFIG + 1);
    if (!*data)
        return out_of_memory(s->cli);
    while (n > 0 && *len <= MAX_CONFIG) {
        n = read(fd, *data + *len, MAX_CONFIG + 1 - *len);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            *len += (size_t)n;
    }
    if (n < 0) {
        cli_error(s->cli, "Could not read '%s': %s", path, strerror(errno));
        return 1;
    }
    if (*len > MAX_CONFIG) {
        cli_error(s->cli, "Unable to append config data: %s is longer than %d bytes", path,
                  MAX_CONFIG);
        return 1;
    }
    return 0;
}

int vma_source_config(struct vma_source *s, const char *path)
{
    const char *slash = strrchr(path, '/');
    CLEANUP_FREE uint8_t *data = NULL;
    size_t len;

    if (s->n_configs == MAX_CONFIGS) {
        cli_error(s->cli, "an archive holds no more than %d configuration files", MAX_CONFIGS);
        return 1;
    }
    if (check_name(s, slash ? slash + 1 : path) != 0 || read_config(s, path, &data, &len) != 0)
        return 1;
    char *name = strdup(slash ? slash + 1 : path);
    if (!name)
        return out_of_memory(s->cli);
    s->configs[s->n_configs++] = (struct dr_vma_config){name, DR_STEAL(data), len};
    return 0;
}

void vma_source_free(struct vma_source *s)
{
    for (size_t i = 0; i < s->n_disks; i++) {
        free((char *)s->disks[i].name);
        dr_close(s->disks[i].disk, NULL);
        if (s->disks[i].state_fd >= 0)
            close(s->disks[i].state_fd);
    }
    for (size_t i = 0; i < s->n_configs; i++) {
        free((char *)s->configs[i].name);
        free((uint8_t *)s->configs[i].data);
    }
    s->n_disks = s->n_configs = 0;
}
