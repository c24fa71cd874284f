/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-set.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"
#include "ops/ops-internal.h"

#define VERSION  1
#define LARGEST  (64u << 20) /* bytes of a set */
#define SMALL    1000        /* values that any set may have */
#define ATTEMPTS 200         /* while another backup writes its entry, or a prune removes files */
#define PAUSE_NS 20000000

/* ------------------------------------------------------------------ reading */

static int bad(struct dr_error *err, const char *path, const char *what)
{
    return dr_fail(err, EINVAL, "%s: is no list of backups: %s", path, what);
}

static void free_texts(char **texts)
{
    for (size_t i = 0; texts && texts[i]; i++)
        free(texts[i]);
    free(texts);
}

static void clear_entry(struct dr_backup_entry *e)
{
    free_texts(e->leaving);
    free(e->name);
    free(e->file);
    free(e->format);
    free(e->parent);
    free(e->disk);
    free(e->bitmap);
    free(e->noted);
    free(e->time);
    free(e->naming);
    free(e->verified);
    free(e->damaged);
    *e = (struct dr_backup_entry){0};
}

void dr_set_free(struct dr_backup_set *s)
{
    for (size_t i = 0; i < s->n; i++)
        clear_entry(&s->all[i]);
    free(s->all);
    *s = (struct dr_backup_set){0};
}

/* A text that may be missing. False: it is something else, or there is no memory. */
static bool take_text(const json_t *one, const char *key, bool required, char **text)
{
    const json_t *value = json_object_get(one, key);
    *text = NULL;
    if (!value || json_is_null(value))
        return !required;
    if (!json_is_string(value) || strlen(json_string_value(value)) != json_string_length(value))
        return false;
    *text = strdup(json_string_value(value));
    return *text != NULL;
}

static bool take_number(const json_t *one, const char *key, uint64_t *number)
{
    const json_t *value = json_object_get(one, key);
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return false;
    *number = (uint64_t)json_integer_value(value);
    return true;
}

/* A list of texts that may be missing; the last one is followed by NULL. */
static bool take_texts(const json_t *one, const char *key, char ***texts)
{
    const json_t *list = json_object_get(one, key);
    size_t n = json_array_size(list);
    *texts = NULL;
    if (!list || json_is_null(list))
        return true;
    if (!json_is_array(list) || !(*texts = calloc(n + 1, sizeof(**texts))))
        return false;
    for (size_t i = 0; i < n; i++) {
        const json_t *text = json_array_get(list, i);
        if (!json_is_string(text) || strlen(json_string_value(text)) != json_string_length(text) ||
            !((*texts)[i] = strdup(json_string_value(text))))
            return false;
    }
    return true;
}

static bool is_digest(const char *text)
{
    return strlen(text) == DR_DIGEST_TEXT - 1 &&
           strspn(text, "0123456789abcdef") == DR_DIGEST_TEXT - 1;
}

static bool take_entry(const json_t *one, struct dr_backup_entry *e)
{
    const char *digest = json_string_value(json_object_get(one, "digest"));
    bool good = take_text(one, "name", true, &e->name);
    good &= take_text(one, "file", true, &e->file);
    good &= take_text(one, "format", true, &e->format);
    good &= take_text(one, "parent", false, &e->parent);
    good &= take_text(one, "disk", true, &e->disk);
    good &= take_text(one, "bitmap", false, &e->bitmap);
    good &= take_text(one, "noted", e->bitmap, &e->noted);
    good &= take_text(one, "time", true, &e->time);
    good &= take_text(one, "naming", false, &e->naming);
    good &= take_text(one, "verified", false, &e->verified);
    good &= take_text(one, "damaged", false, &e->damaged);
    good &= take_texts(one, "leaving", &e->leaving);
    good = good && take_number(one, "size", &e->size) && take_number(one, "copied", &e->copied);
    if (!good || !digest || !is_digest(digest))
        return false;
    memcpy(e->digest, digest, DR_DIGEST_TEXT);
    return true;
}

static int take_all(struct dr_backup_set *s, const json_t *root, const char *path,
                    struct dr_error *err)
{
    const json_t *list = json_object_get(root, "backups");
    if (json_integer_value(json_object_get(root, "drover-backups")) != VERSION)
        return bad(err, path, "it does not begin with \"drover-backups\": 1");
    if (!json_is_array(list))
        return bad(err, path, "\"backups\" is no array");
    size_t n = json_array_size(list);
    s->all = calloc(n + 1, sizeof(*s->all));
    if (!s->all)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    for (; s->n < n; s->n++)
        if (!take_entry(json_array_get(list, s->n), &s->all[s->n])) {
            clear_entry(&s->all[s->n]);
            return dr_fail(err, EINVAL, "%s: its backup number %zu is not well-formed", path, s->n);
        }
    return 0;
}

/* A set has a few values of some bytes each. What is made of many that are tiny would take a
 * hundred times its length in memory. */
static bool is_dense(const char *text, size_t len)
{
    size_t boxes = 0, commas = 0;
    bool quoted = false;
    for (size_t i = 0; i < len; i++) {
        if (quoted && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            quoted = !quoted;
        else if (!quoted) {
            boxes += text[i] == '{' || text[i] == '[';
            commas += text[i] == ',';
        }
    }
    return boxes > len / 64 + SMALL || commas > len / 8 + SMALL;
}

static int read_text(struct dr_file *file, const char *path, json_t **root, struct dr_error *err)
{
    uint64_t len = dr_file_size(file);
    json_error_t why;
    if (len > LARGEST)
        return bad(err, path, "it is longer than 64 MiB");
    CLEANUP_FREE char *text = malloc((size_t)len + 1);
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_file_pread(file, text, 0, (size_t)len, err);
    if (r < 0)
        return r;
    if (is_dense(text, (size_t)len))
        return bad(err, path, "it has more values than one of its length has");
    *root = json_loadb(text, (size_t)len, JSON_REJECT_DUPLICATES, &why);
    return *root ? 0 : bad(err, path, why.text);
}

static int read_set(struct dr_backup_set *s, struct dr_file *file, const char *path,
                    struct dr_error *err)
{
    json_t *root = NULL;
    int r = read_text(file, path, &root, err);
    if (r == 0)
        r = take_all(s, root, path, err);
    json_decref(root);
    if (r < 0)
        dr_set_free(s);
    return r;
}

int dr_set_load(struct dr_backup_set *s, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_file *file = NULL;
    *s = (struct dr_backup_set){0};
    if (!dr_fs_exists(fs, path))
        return 0;
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, err);
    if (r == 0)
        r = read_set(s, file, path, err);
    dr_file_unref(file);
    return r;
}

/* ------------------------------------------------------------------ finding */

const struct dr_backup_entry *dr_set_find(const struct dr_backup_set *s, const char *name)
{
    for (size_t i = 0; i < s->n; i++)
        if (strcmp(s->all[i].name, name) == 0)
            return &s->all[i];
    return NULL;
}

const struct dr_backup_entry *dr_set_last(const struct dr_backup_set *s, const char *disk,
                                          const char *bitmap)
{
    for (size_t i = s->n; i > 0; i--) {
        const struct dr_backup_entry *e = &s->all[i - 1];
        if (e->bitmap && !e->leaving && !e->naming && strcmp(e->bitmap, bitmap) == 0 &&
            strcmp(e->disk, disk) == 0)
            return e;
    }
    return NULL;
}

char *dr_set_path_of(const char *set, const char *name)
{
    return dr_name_beside(set, name);
}

char *dr_set_path(const char *set, const struct dr_backup_entry *e)
{
    return dr_set_path_of(set, e->file);
}

/* ------------------------------------------------------------------ archives */

char *dr_set_main_file(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e)
{
    CLEANUP_FREE char *path = dr_set_path(set, e);
    struct dr_name name;
    if (!path || dr_name_parse(fs, path, &name, NULL) < 0)
        return NULL;
    char *file = DR_STEAL(name.file);
    dr_name_clear(&name);
    return file;
}

bool dr_set_in_archive(const struct dr_backup_entry *e)
{
    return dr_name_format(e->file);
}

bool dr_set_same_archive(const struct dr_backup_entry *a, const struct dr_backup_entry *b)
{
    const char *end = strrchr(a->file, '#');
    size_t len = end ? (size_t)(end - a->file) + 1 : 0;
    return dr_set_in_archive(a) && len > 0 && strncmp(a->file, b->file, len) == 0 &&
           !strchr(b->file + len, '#');
}

static int unlink_if_there(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = fs->ops->unlink(fs, path, &why);
    return r < 0 && r != -ENOENT ? dr_fail(err, -r, "%s", why.text) : 0;
}

int dr_set_remove_archive(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    static const char *const beside[] = {".sums", ".idx"};
    CLEANUP_FILE struct dr_file *file = NULL;
    if (dr_fs_exists(fs, path)) {
        int r = dr_file_open(fs, path, DR_FILE_RDWR, &file, err);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < 2; i++) {
        CLEANUP_FREE char *side = NULL;
        if (asprintf(&side, "%s%s", path, beside[i]) < 0) {
            side = NULL;
            return dr_fail(err, ENOMEM, "%s: out of memory", path);
        }
        int r = unlink_if_there(fs, side, err);
        if (r < 0)
            return r;
    }
    int r = unlink_if_there(fs, path, err);
    return r < 0 ? r : fs->ops->sync_dir(fs, path, err);
}

/* ------------------------------------------------------------------ writing */

static json_t *text_or_null(const char *text)
{
    return text ? dr_json_text(text) : json_null();
}

/* NULL: out of memory. */
static json_t *texts_to_json(char *const *texts)
{
    json_t *list = json_array();
    bool all = list != NULL;
    for (size_t i = 0; all && texts[i]; i++)
        all = json_array_append_new(list, dr_json_text(texts[i])) == 0;
    if (all)
        return list;
    json_decref(list);
    return NULL;
}

static json_t *to_json(const struct dr_backup_entry *e)
{
    json_t *one = json_pack(
        "{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:I, s:I, s:s}", "name", dr_json_text(e->name),
        "file", dr_json_text(e->file), "format", dr_json_text(e->format), "parent",
        text_or_null(e->parent), "disk", dr_json_text(e->disk), "bitmap", text_or_null(e->bitmap),
        "noted", text_or_null(e->noted), "time", dr_json_text(e->time), "size", (json_int_t)e->size,
        "copied", (json_int_t)e->copied, "digest", e->digest);
    int r = one ? 0 : -1;
    if (r == 0 && e->leaving)
        r = json_object_set_new(one, "leaving", texts_to_json(e->leaving));
    if (r == 0 && e->naming)
        r = json_object_set_new(one, "naming", dr_json_text(e->naming));
    if (r == 0 && e->verified)
        r = json_object_set_new(one, "verified", dr_json_text(e->verified));
    if (r == 0 && e->damaged)
        r = json_object_set_new(one, "damaged", dr_json_text(e->damaged));
    if (r == 0)
        return one;
    json_decref(one);
    return NULL;
}

static char *to_text(const struct dr_backup_set *s, const struct dr_backup_entry *more, size_t n)
{
    json_t *list = json_array();
    bool all = list != NULL;
    for (size_t i = 0; all && i < s->n + n; i++)
        all = json_array_append_new(list, to_json(i < s->n ? &s->all[i] : &more[i - s->n])) == 0;
    json_t *root = json_pack("{s:i, s:o}", "drover-backups", VERSION, "backups", list);
    char *text = all && root ? dr_json_dump(root, JSON_INDENT(2)) : NULL;
    char *line = NULL;
    json_decref(root);
    if (text && asprintf(&line, "%s\n", text) < 0)
        line = NULL;
    free(text);
    return line;
}

static int fill(void *user, struct dr_file *tmp, struct dr_error *err)
{
    const char *text = user;
    return dr_file_pwrite(tmp, text, 0, strlen(text), err);
}

/* Nobody else writes the set while we have it open for writing: what attempts at writing it have
 * left aside is of no use. */
static int open_for_writing(struct dr_fs *fs, const char *path, struct dr_file **file,
                            struct dr_error *err)
{
    const struct timespec pause = {.tv_nsec = PAUSE_NS};
    struct dr_error why = DR_ERROR_INIT;
    int r = -EAGAIN;
    for (int i = 0; i < ATTEMPTS && (r == -EAGAIN || r == -EBUSY || r == -ESTALE); i++) {
        if (i > 0)
            nanosleep(&pause, NULL);
        dr_error_reset(&why);
        r = dr_file_open(fs, path, DR_FILE_RDWR, file, &why);
    }
    if (r == 0)
        dr_ops_remove_asides(fs, path, NULL);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

int dr_set_hold(struct dr_set_writer *w, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    *w = (struct dr_set_writer){.fs = fs, .path = path};
    struct dr_error why = DR_ERROR_INIT;
    int r = open_for_writing(fs, path, &w->file, &why);
    return r < 0 && r != -ENOENT ? dr_fail(err, -r, "%s", why.text) : 0;
}

int dr_set_read_held(const struct dr_set_writer *w, struct dr_backup_set *s, struct dr_error *err)
{
    *s = (struct dr_backup_set){0};
    return w->file ? read_set(s, w->file, w->path, err) : 0;
}

int dr_set_write_held(struct dr_set_writer *w, const struct dr_backup_set *s,
                      const struct dr_backup_entry *entries, size_t n, bool *written,
                      struct dr_error *err)
{
    struct dr_file *fresh = NULL;
    CLEANUP_FREE char *text = to_text(s, entries, n);
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", w->path);
    if (strlen(text) > LARGEST)
        return dr_fail(
            err, EFBIG,
            "%s: would be longer than 64 MiB: prune it, or begin another one with --state",
            w->path);
    int r = dr_replace(w->fs, w->path, w->file, fill, text, &fresh, err);
    if (written)
        *written = fresh;
    if (!fresh)
        return r;
    dr_file_unref(w->file);
    w->file = fresh;
    return r;
}

void dr_set_release(struct dr_set_writer *w)
{
    dr_file_unref(w->file);
    *w = (struct dr_set_writer){0};
}

char **dr_set_copy_files(char *const *from)
{
    size_t n = 0;
    while (from[n])
        n++;
    char **to = calloc(n + 1, sizeof(*to));
    for (size_t i = 0; to && i < n; i++)
        if (!(to[i] = strdup(from[i]))) {
            while (i > 0)
                free(to[--i]);
            free(to);
            return NULL;
        }
    return to;
}

void dr_set_drop(struct dr_backup_set *s, struct dr_backup_entry *e)
{
    size_t at = (size_t)(e - s->all);
    clear_entry(e);
    memmove(e, e + 1, (s->n - at - 1) * sizeof(*e));
    s->n--;
}

int dr_set_change(struct dr_fs *fs, const char *path,
                  int (*change)(void *user, struct dr_backup_set *s, struct dr_error *err),
                  void *user, struct dr_error *err)
{
    struct dr_set_writer w;
    struct dr_backup_set s = {0};
    int r = dr_set_hold(&w, fs, path, err);
    if (r == 0)
        r = dr_set_read_held(&w, &s, err);
    if (r == 0)
        r = change(user, &s, err);
    if (r > 0)
        r = dr_set_write_held(&w, &s, NULL, 0, NULL, err);
    dr_set_free(&s);
    dr_set_release(&w);
    return r;
}

/* ------------------------------------------------------------------ what was found */

void dr_set_time_now(char *text)
{
    time_t seconds = time(NULL);
    struct tm tm;
    text[0] = 0;
    if (gmtime_r(&seconds, &tm))
        strftime(text, DR_SET_TIME, "%Y-%m-%dT%H:%M:%SZ", &tm);
}

struct finding {
    const struct dr_backup_entry *of;
    const char *damage;
};

static bool is_doubted(const struct dr_backup_set *s, const bool *doubted, const char *name,
                       size_t end)
{
    for (size_t k = end; k-- > 0;)
        if (doubted[k] && strcmp(s->all[k].name, name) == 0)
            return true;
    return false;
}

/* What stands on a damaged backup is proven no more; it may have been read before the damage. Each
 * entry is looked at once: in a set made by somebody else many may have one name. */
static int doubt_children(struct dr_backup_set *s, size_t at, struct dr_error *err)
{
    CLEANUP_FREE bool *doubted = calloc(s->n, sizeof(*doubted));
    if (!doubted)
        return dr_fail(err, ENOMEM, "out of memory");
    doubted[at] = true;
    free(DR_STEAL(s->all[at].verified));
    for (size_t i = at + 1; i < s->n; i++) {
        struct dr_backup_entry *e = &s->all[i];
        doubted[i] = e->parent && is_doubted(s, doubted, e->parent, i);
        if (doubted[i])
            free(DR_STEAL(e->verified));
    }
    return 0;
}

const struct dr_backup_entry *dr_set_damaged(const struct dr_backup_set *s,
                                             const struct dr_backup_entry *e)
{
    for (unsigned depth = 0; e && depth < DR_CHAIN_MAX; depth++) {
        if (e->damaged)
            return e;
        if (e->verified)
            return NULL;
        e = e->parent ? dr_set_find(s, e->parent) : NULL;
    }
    return NULL;
}

int dr_set_mark_verified(struct dr_backup_entry *e, struct dr_error *err)
{
    char now[DR_SET_TIME];
    dr_set_time_now(now);
    char *text = strdup(now);
    if (!text)
        return dr_fail(err, ENOMEM, "out of memory");
    free(DR_STEAL(e->damaged));
    free(e->verified);
    e->verified = text;
    return 0;
}

/* A backup that was replaced, or is leaving by now, is not the one that was read. */
static int put_finding(void *user, struct dr_backup_set *s, struct dr_error *err)
{
    const struct finding *f = user;
    struct dr_backup_entry *e = NULL;
    for (size_t i = 0; i < s->n; i++)
        if (strcmp(s->all[i].name, f->of->name) == 0 && strcmp(s->all[i].file, f->of->file) == 0 &&
            strcmp(s->all[i].digest, f->of->digest) == 0)
            e = &s->all[i];
    if (!e || e->leaving || e->naming)
        return 0;
    if (!f->damage) {
        int r = dr_set_mark_verified(e, err);
        return r < 0 ? r : 1;
    }
    char *text = strdup(f->damage);
    if (!text)
        return dr_fail(err, ENOMEM, "out of memory");
    free(e->damaged);
    e->damaged = text;
    int r = doubt_children(s, (size_t)(e - s->all), err);
    return r < 0 ? r : 1;
}

void dr_set_record_verified(struct dr_fs *fs, const char *path, const struct dr_backup_entry *e,
                            const char *damage, const struct dr_job *job)
{
    struct finding f = {.of = e, .damage = damage};
    struct dr_error why = DR_ERROR_INIT;
    if (dr_set_change(fs, path, put_finding, &f, &why) < 0)
        dr_job_message(job, "%s: cannot be told whether its backup \"%s\" is good: %s", path,
                       e->name, why.text);
}

/* ------------------------------------------------------------------ for users */

int dr_backup_list_fs(struct dr_fs *fs, const char *set, struct dr_backup_entry **list, size_t *n,
                      struct dr_error *err)
{
    struct dr_backup_set s;
    if (!dr_fs_exists(fs, set))
        return dr_fail(err, ENOENT, "%s: there is no such list of backups", set);
    int r = dr_set_load(&s, fs, set, err);
    if (r < 0)
        return r;
    *list = s.all;
    *n = s.n;
    return 0;
}

int dr_backup_list(const char *set, struct dr_backup_entry **list, size_t *n, struct dr_error *err)
{
    DR_REQUIRE(set, err);
    DR_REQUIRE(list, err);
    DR_REQUIRE(n, err);
    return dr_backup_list_fs(dr_fs_posix(), set, list, n, err);
}

void dr_backup_list_free(struct dr_backup_entry *list, size_t n)
{
    struct dr_backup_set s = {list, n};
    dr_set_free(&s);
}
