/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Parameters become settings of disks: those given after a disk are its own, those before the first
 * disk are where every disk begins. Paths become absolute at once, since a server that goes into
 * the background changes its directory. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/absolute.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "exports/disk-list.h"
#include "exports/exports.h"
#include "exports/shown.h"

/* ------------------------------------------------------------------ texts */

/* A copy that lives as long as the list; NULL = out of memory. Takes text over. */
static const char *own_text(struct disk_list *list, char *text)
{
    char **more = realloc(list->texts, (list->n_texts + 1) * sizeof(*more));
    if (more)
        list->texts = more;
    if (!more || !text) {
        free(text);
        return NULL;
    }
    list->texts[list->n_texts++] = text;
    return text;
}

/* ------------------------------------------------------------------ parameters */

static int parse_bool(const char *key, const char *value, bool *out, struct dr_error *err)
{
    static const char *const words[] = {"false", "true", "off", "on", "no", "yes", "0", "1"};
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (strcmp(value, words[i]) == 0) {
            *out = i % 2;
            return 0;
        }
    }
    return dr_fail(err, EINVAL, "%s=%s: expected true or false", key, value);
}

static int no_memory(struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "out of memory");
}

static int add_disk(struct disk_list *list, const char *value, struct dr_error *err)
{
    struct served *more = realloc(list->served, (list->n + 1) * sizeof(*more));
    if (!more)
        return no_memory(err);
    list->served = more;
    if (!*value)
        return dr_fail(err, EINVAL, "disk=: expected the name of a disk");
    char *path = dr_name_absolute(value);
    if (!path)
        return no_memory(err);
    list->served[list->n++] = (struct served){.list = list, .path = path, .settings = list->before};
    return 0;
}

static int set_export(struct disk_list *list, const char *value, struct dr_error *err)
{
    const size_t longest = 4096; /* the protocol's limit for strings */
    if (!list->served || list->n == 0)
        return dr_fail(err, EINVAL, "export=%s: must follow the disk that it names", value);
    if (strlen(value) > longest)
        return dr_fail(err, EINVAL, "export=: expected at most %zu bytes", longest);
    struct served *last = &list->served[list->n - 1];
    free(last->name);
    last->name = strdup(value);
    return last->name ? 0 : no_memory(err);
}

static int set_cache(struct disk_settings *settings, const char *value, struct dr_error *err)
{
    static const struct {
        const char *name;
        unsigned flags;
    } modes[] = {{"writeback", 0}, {"none", DR_OPEN_DIRECT}, {"unsafe", DR_OPEN_NO_FLUSH}};
    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
        if (strcmp(value, modes[i].name) == 0) {
            settings->open.flags &= ~(unsigned)(DR_OPEN_DIRECT | DR_OPEN_NO_FLUSH);
            settings->open.flags |= modes[i].flags;
            return 0;
        }
    }
    return dr_fail(err, EINVAL, "cache=%s: expected writeback, none or unsafe", value);
}

static int set_on_error(struct disk_settings *settings, const char *value, struct dr_error *err)
{
    static const char *const names[] = {
        [DR_STALL_ENOSPC] = "enospc", [DR_STALL_REPORT] = "report", [DR_STALL_STOP] = "stop"};
    for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcmp(value, names[i]) == 0) {
            settings->on_error = (enum dr_stall_policy)i;
            return 0;
        }
    return dr_fail(err, EINVAL, "on-error=%s: expected enospc, report or stop", value);
}

static int add_allowed(struct disk_list *list, const char *value, struct dr_error *err)
{
    char **more = realloc(list->allowed, (list->n_allowed + 2) * sizeof(*more));
    if (!more)
        return no_memory(err);
    list->allowed = more;
    more[list->n_allowed] = dr_name_absolute(value);
    more[list->n_allowed + 1] = NULL;
    return more[list->n_allowed++] ? 0 : no_memory(err);
}

static int set_path(struct disk_list *list, const char *value, const char **path,
                    struct dr_error *err)
{
    if (!*value)
        return dr_fail(err, EINVAL, "control= and state=: expected a path");
    *path = own_text(list, dr_absolute_path(value));
    return *path ? 0 : no_memory(err);
}

static int set_ready_fd(struct disk_list *list, const char *value, struct dr_error *err)
{
    char *end;
    errno = 0;
    long fd = strtol(value, &end, 10);
    if (!*value || *end || errno || fd < 3 || fd > INT_MAX ||
        fcntl((int)fd, F_SETFD, FD_CLOEXEC) < 0)
        return dr_fail(err, EINVAL, "ready-fd=%s: expected the number of an open descriptor",
                       value);
    list->ready_fd = (int)fd;
    return 0;
}

/* ID,fd=N: the bytes of the descriptor, which is closed. */
static int set_secret(const char *value, struct dr_error *err)
{
    const char *at = strrchr(value, ',');
    unsigned fd;
    char more;
    if (!at || at == value || sscanf(at, ",fd=%u%c", &fd, &more) != 1 || fd < 3 || fd > INT_MAX)
        return dr_fail(err, EINVAL, "secret=%s: expected ID,fd=N", value);
    CLEANUP_FREE char *id = strndup(value, (size_t)(at - value));
    uint8_t *bytes = malloc(DR_SECRET_MAX + 1);
    size_t len = 0;
    ssize_t got = 1;
    while (id && bytes && got > 0 && len <= DR_SECRET_MAX) {
        got = read((int)fd, bytes + len, DR_SECRET_MAX + 1 - len);
        len += got > 0 ? (size_t)got : 0;
    }
    int r = !id || !bytes ? -ENOMEM : got < 0 ? -errno : dr_secret_set(id, bytes, len);
    if (bytes)
        explicit_bzero(bytes, len);
    free(bytes);
    close((int)fd);
    return r < 0 ? dr_fail_errno(err, -r, "secret=%s", value) : 0;
}

/* Settings that are texts. */
static const char **text_setting(struct disk_settings *settings, const char *key)
{
    const struct {
        const char *key;
        const char **text;
    } texts[] = {
        {"format", &settings->open.format},
        {"snapshot", &settings->open.snapshot},
        {"backing", &settings->open.backing},
        {"backing-format", &settings->open.backing_format},
        {"data-file", &settings->open.data_file},
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
        if (strcmp(key, texts[i].key) == 0)
            return texts[i].text;
    return NULL;
}

static int set_text(struct disk_list *list, const char *key, const char *value, const char **text,
                    struct dr_error *err)
{
    bool is_name = strcmp(key, "backing") == 0 || strcmp(key, "data-file") == 0;
    *text = own_text(list, is_name ? dr_name_absolute(value) : strdup(value));
    return *text ? 0 : no_memory(err);
}

static int set_flag(struct disk_settings *settings, const char *key, const char *value,
                    struct dr_error *err)
{
    bool on = false;
    int r = parse_bool(key, value, &on, err);
    if (r < 0)
        return r;
    if (strcmp(key, "read-only") == 0) {
        settings->mode = on ? DISK_READ_ONLY : DISK_READ_WRITE;
        return 0;
    }
    if (strcmp(key, "temporary") == 0) {
        settings->temporary = on;
        return 0;
    }
    bool share = strcmp(key, "share") == 0; /* the others are on unless their flag is set */
    unsigned flag = share                         ? DR_OPEN_FORCE_SHARE
                    : strcmp(key, "locking") == 0 ? DR_OPEN_NO_LOCK
                                                  : DR_OPEN_NO_FINGERPRINT;
    settings->open.flags &= ~flag;
    settings->open.flags |= on == share ? flag : 0;
    return 0;
}

int disk_list_config(struct disk_list *list, const char *key, const char *value,
                     struct dr_error *err)
{
    static const char *const flags[] = {"read-only", "temporary", "locking", "fingerprints",
                                        "share"};
    struct disk_settings *settings = list->served && list->n ? &list->served[list->n - 1].settings
                                                             : &list->before;
    const char **text = text_setting(settings, key);
    if (strcmp(key, "disk") == 0)
        return add_disk(list, value, err);
    if (strcmp(key, "export") == 0)
        return set_export(list, value, err);
    if (strcmp(key, "allow-path") == 0)
        return add_allowed(list, value, err);
    if (strcmp(key, "secret") == 0)
        return set_secret(value, err);
    if (strcmp(key, "ready-fd") == 0)
        return set_ready_fd(list, value, err);
    if (strcmp(key, "control") == 0)
        return set_path(list, value, &list->control, err);
    if (strcmp(key, "state") == 0)
        return set_path(list, value, &list->state, err);
    if (strcmp(key, "cache") == 0)
        return set_cache(settings, value, err);
    if (strcmp(key, "on-error") == 0)
        return set_on_error(settings, value, err);
    if (strcmp(key, "backing") == 0 && !*value) {
        settings->open.flags |= DR_OPEN_NO_BACKING;
        return 0;
    }
    if (strcmp(key, "description") == 0)
        text = &list->description;
    if (text)
        return set_text(list, key, value, text, err);
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        if (strcmp(key, flags[i]) == 0)
            return set_flag(settings, key, value, err);
    return dr_fail(err, EINVAL, "there is no parameter '%s'", key);
}

static int check_settings(const struct served *served, struct dr_error *err)
{
    const struct disk_settings *s = &served->settings;
    bool only_reads = s->mode == DISK_READ_ONLY && !s->temporary;
    if (s->open.backing_format && !s->open.backing)
        return dr_fail(err, EINVAL, "%s: backing-format without backing", served->path);
    if ((s->open.flags & DR_OPEN_FORCE_SHARE) && !only_reads && !s->temporary)
        return dr_fail(err, EINVAL, "%s: share=true needs read-only=true", served->path);
    if (s->mode == DISK_READ_ONLY && s->temporary)
        return dr_fail(err, EINVAL, "%s: what is temporary is written to: leave read-only out",
                       served->path);
    if (s->open.snapshot && s->mode == DISK_READ_WRITE)
        return dr_fail(err, EINVAL, "%s: a snapshot inside an image can only be read",
                       served->path);
    return 0;
}

/* For temporary disks, which are made after the directory has changed. */
static int settle_tmpdir(struct dr_error *err)
{
    const char *dir = getenv("TMPDIR");
    if (!dir || !*dir || *dir == '/')
        return 0;
    CLEANUP_FREE char *full = dr_absolute_path(dir);
    return full && setenv("TMPDIR", full, 1) == 0 ? 0 : no_memory(err);
}

int disk_list_complete(struct disk_list *list, struct dr_error *err)
{
    if (list->n == 0)
        return dr_fail(err, EINVAL, "no disk is given: disk=DISK");
    int settled = settle_tmpdir(err);
    if (settled < 0)
        return settled;
    for (size_t i = 0; i < list->n; i++) {
        struct served *served = &list->served[i];
        if (!served->name)
            served->name = strdup(export_default_name(served->path));
        if (!served->name)
            return no_memory(err);
        int r = check_settings(served, err);
        if (r < 0)
            return r;
        if (served->settings.open.snapshot)
            served->settings.mode = DISK_READ_ONLY;
        served->settings.open.allow_paths = (const char *const *)list->allowed;
        for (size_t k = 0; k < i; k++)
            if (strcmp(list->served[k].name, served->name) == 0)
                return dr_fail(err, EINVAL,
                               "%s and %s would both be the export '%s': give them names with "
                               "export=NAME",
                               list->served[k].path, served->path, served->name);
    }
    return 0;
}

/* ------------------------------------------------------------------ opening */

static int open_for(const struct served *served, bool writing, struct dr_disk **disk,
                    struct dr_error *err)
{
    struct dr_open_options open = served->settings.open;
    if (served->settings.temporary)
        return temporary_open(served->path, &open, disk, err);
    if (writing)
        open.flags |= DR_OPEN_RDWR;
    return dr_open(served->path, &open, disk, err);
}

/* Where the disk cannot be opened for writing it is served read-only, as by other NBD servers. */
static bool only_readable(int r)
{
    return r == -EACCES || r == -EPERM || r == -EROFS || r == -ENOTSUP;
}

static int open_as_asked(const struct served *served, bool readonly, struct dr_disk **disk,
                         struct dr_error *err)
{
    int r = readonly ? -EROFS : open_for(served, true, disk, err);
    if (!only_readable(r))
        return r;
    dr_error_reset(err);
    return open_for(served, false, disk, err);
}

static int open_served(const struct served *served, bool readonly, struct dr_disk **disk,
                       struct dr_error *err)
{
    if (served->settings.mode == DISK_AS_ASKED)
        return open_as_asked(served, readonly, disk, err);
    return open_for(served, served->settings.mode == DISK_READ_WRITE, disk, err);
}

static bool is_file(const char *name, const struct stat *st)
{
    CLEANUP_FREE char *path = name ? dr_name_file(name) : NULL;
    struct stat other;
    return path && stat(path, &other) == 0 && other.st_dev == st->st_dev &&
           other.st_ino == st->st_ino;
}

static bool is_same_file(const char *name, const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && is_file(name, &st);
}

/* A disk that the state knows goes on with the image that it had when the last server ended. */
static int recall(struct disk_list *list, struct served *served, struct dr_error *err)
{
    char *path = NULL, *format = NULL;
    if (!list->state || served->settings.temporary || served->settings.open.snapshot)
        return 0;
    CLEANUP_FREE char *given = dr_name_file(served->path);
    int r = dr_live_recall(list->state, served->name, given ? given : served->path, &path, &format,
                           err);
    if (r < 0 || !path)
        return r;
    /* They are of the image that the disk had first. Under a newer one they would take the place of
     * that image, and what the guest wrote there would be gone from sight. */
    if ((served->settings.open.backing || served->settings.open.data_file) &&
        !is_same_file(served->path, path)) {
        r = dr_fail(err, EINVAL,
                    "%s: by %s '%s' goes on with %s: backing= and data-file= cannot be given any "
                    "more",
                    served->path, list->state, served->name, path);
        free(path);
        free(format);
        return r;
    }
    free(served->path);
    served->path = path;
    served->settings.open.format = own_text(list, format);
    return served->settings.open.format ? 0 : no_memory(err);
}

/* ------------------------------------------------------------------ two disks with one file */

/* Does the disk's chain use the file that the other disk writes to? */
static int refuse_if_uses(const struct served *user, struct dr_disk *disk,
                          const struct served *writer, struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_name_file(writer->path);
    struct stat st;
    if (!path || stat(path, &st) < 0)
        return 0; /* opening it tells what is wrong */
    for (size_t i = 0, n = dr_chain_length(disk); i < n; i++)
        if (is_file(dr_image_path(disk, i), &st))
            return dr_fail(err, EBUSY,
                           "%s is used by %s, which is served, too: it can only be served with "
                           "read-only=true",
                           writer->path, user->path);
    return 0;
}

static bool format_can_write(const char *name)
{
    struct dr_format_info info;
    for (size_t i = 0; dr_format_list(i, &info) == 0; i++)
        if (strcmp(info.name, name) == 0)
            return info.can_write;
    return false;
}

static int refuse_shared(struct disk_list *list, const struct served *writer, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < list->n && r == 0; i++) {
        struct served *user = &list->served[i];
        struct dr_open_options open = user->settings.open;
        struct dr_disk *disk;
        if (user == writer)
            continue;
        open.flags |= DR_OPEN_FORCE_SHARE; /* only its names are asked */
        r = dr_open(user->path, &open, &disk, err);
        if (r < 0)
            return r;
        r = refuse_if_uses(user, disk, writer, err);
        dr_close(disk, NULL);
    }
    return r;
}

static bool may_write(const struct served *served)
{
    const struct disk_settings *s = &served->settings;
    const char *format = s->open.format ? s->open.format : dr_name_format(served->path);
    return s->mode != DISK_READ_ONLY && !s->temporary && (!format || format_can_write(format));
}

/* ------------------------------------------------------------------ the list's life */

static void ignore(void *user, const struct dr_error *err)
{
    (void)user;
    (void)err;
}

int disk_list_recall(struct disk_list *list, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < list->n && r == 0; i++)
        r = recall(list, &list->served[i], err);
    return r;
}

int disk_list_try(struct disk_list *list, struct dr_error *err)
{
    int r = disk_list_recall(list, err);
    for (size_t i = 0; i < list->n && list->n > 1 && r == 0; i++)
        if (may_write(&list->served[i]))
            r = refuse_shared(list, &list->served[i], err);
    /* All at once, as they will be. */
    for (size_t i = 0; i < list->n && r == 0; i++)
        r = open_served(&list->served[i], true, &list->served[i].disk, err);
    disk_list_close(list, ignore, NULL);
    return r;
}

static int tell(const struct disk_list *list, const char *line, struct dr_error *err)
{
    if (list->ready_fd < 0 || write(list->ready_fd, line, strlen(line)) == (ssize_t)strlen(line))
        return 0;
    return dr_fail_errno(err, errno, "cannot write to ready-fd");
}

static int add_to_control(struct dr_live *live, const struct served *served, struct dr_error *err)
{
    int r = dr_live_add(live, served->name, served->disk, err);
    return r < 0 ? r : dr_live_add_stall(live, served->name, served->stall, err);
}

/* A disk that a client of the control had opened did not close well. */
static void node_failed(void *user, const struct dr_error *err)
{
    struct disk_list *list = user;
    list->well = false;
    list->failed(list->failed_user, err);
}

static int begin_control(struct disk_list *list, const struct dr_live_options *control,
                         struct dr_error *err)
{
    struct dr_live_options options = *control;
    options.control = list->control;
    options.state = list->state;
    options.allow_paths = (const char *const *)list->allowed;
    options.failed = node_failed;
    options.failed_user = list;
    int r = dr_live_new(&options, &list->live, err);
    for (size_t i = 0; i < list->n && r == 0; i++)
        r = add_to_control(list->live, &list->served[i], err);
    return r < 0 ? dr_prefix(err, r, "control") : dr_live_start(list->live, err);
}

static void tell_waits(void *user, const char *text)
{
    const struct served *served = user;
    served->list->waits(served->list->user, served->name, text);
}

static int make_stalls(struct disk_list *list, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < list->n && r == 0; i++) {
        struct served *served = &list->served[i];
        const struct dr_stall_options options = {.policy = served->settings.on_error,
                                                 .waits = list->waits ? tell_waits : NULL,
                                                 .user = served};
        r = dr_stall_new(&options, &served->stall, err);
    }
    return r;
}

void disk_list_end_waiting(struct disk_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        dr_stall_end(list->served[i].stall);
}

/* A disk on which jobs may be begun is open from the start. */
int disk_list_open(struct disk_list *list, const struct dr_live_options *control,
                   struct dr_error *err)
{
    bool controlled = list->control || list->state;
    int r = make_stalls(list, err);
    for (size_t i = 0; i < list->n && r == 0; i++)
        if (list->served[i].settings.mode != DISK_AS_ASKED || list->served[i].settings.temporary ||
            controlled)
            r = open_served(&list->served[i], false, &list->served[i].disk, err);
    if (r == 0)
        r = shown_open(list, err);
    if (r == 0 && controlled)
        r = begin_control(list, control, err);
    list->opened = r == 0;
    return r < 0 ? r : tell(list, "ready\n", err);
}

int disk_list_use(struct disk_list *list, struct served *served, bool readonly,
                  struct dr_error *err)
{
    DR_LOCK_SCOPE(&list->lock);
    return served->disk ? 0 : open_served(served, readonly, &served->disk, err);
}

void disk_list_close(struct disk_list *list, void (*failed)(void *user, const struct dr_error *err),
                     void *user)
{
    list->well = true;
    list->failed = failed;
    list->failed_user = user;
    dr_live_free(list->live);
    list->live = NULL;
    shown_close(list);
    for (size_t i = 0; i < list->n; i++) {
        struct dr_error err = DR_ERROR_INIT;
        if (dr_close(list->served[i].disk, &err) < 0) {
            failed(user, &err);
            list->well = false;
        }
        list->served[i].disk = NULL;
    }
    if (list->opened && list->well)
        tell(list, "closed\n", NULL);
    list->opened = false;
}

void disk_list_free(struct disk_list *list)
{
    for (size_t i = 0; i < list->n; i++) {
        dr_stall_free(list->served[i].stall);
        free(list->served[i].name);
        free(list->served[i].path);
    }
    for (size_t i = 0; i < list->n_texts; i++)
        free(list->texts[i]);
    for (size_t i = 0; i < list->n_allowed; i++)
        free(list->allowed[i]);
    free(list->served);
    free(list->texts);
    free(list->allowed);
}
