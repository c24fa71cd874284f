/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backups.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "instant.h"
#include "ops/backup-set.h"
#include "ops/backup-sums.h"
#include "ops/ops-internal.h"

#define SECTOR 512u
#define SET    "dir/backups.json"
#define BITMAP "B"
#define USER   "user" /* a bitmap that no backup looks at */

enum {
    MAX_INSTANTS = 64,
    MAX_SNAPSHOTS = 3,
};

/* What the disk held at the instant of a backup. */
struct instant {
    char name[16];
    uint64_t size;
    uint8_t *bytes;
};

struct inside { /* a snapshot inside the image */
    char name[16];
    uint64_t size;
    uint8_t *bytes;
};

struct backups {
    const struct subject *s;
    struct powerfs *power;
    struct dr_fs *fs;
    struct rnd rnd;
    struct dr_disk *disk;
    uint64_t size, room; /* of the disk; of the buffers */
    uint8_t *now, *buf;
    struct instant instants[MAX_INSTANTS];
    unsigned n, counter;
    struct inside snapshots[MAX_SNAPSHOTS];
    unsigned n_snapshots;
    uint8_t *user; /* what the disk held when the bitmap USER was made or cleared */
    uint64_t user_size;
    uint64_t granularity;
    bool to_vmdk;    /* the backups are VMDK images, which stand only on such */
    char text[4000]; /* what has been done, for messages */
};

#define FAIL(b, fmt, ...) MODEL_FAIL((b)->s, "%s\n" fmt, (b)->text, __VA_ARGS__)

bool backups_after_cut;

static void must(struct backups *b, int r, const char *what, const struct dr_error *err)
{
    if (r < 0)
        FAIL(b, "%s: %s (%d)", what, err->text, r);
}

static void note(struct backups *b, const char *what, uint64_t x, uint64_t y)
{
    size_t n = strlen(b->text);
    if (n > sizeof(b->text) - 60) { /* the beginning can be had again by the seed */
        memmove(b->text, b->text + n / 2, n - n / 2 + 1);
        n = strlen(b->text);
    }
    snprintf(b->text + n, sizeof(b->text) - n, "%s %llu+%llu; ", what, (unsigned long long)x,
             (unsigned long long)y);
}

static uint8_t *copy_of(const uint8_t *bytes, uint64_t n)
{
    uint8_t *copy = malloc(n + 1);
    assert_non_null(copy);
    memcpy(copy, bytes, n);
    return copy;
}

bool backups_takes(const struct subject *s)
{
    return strcmp(s->format, "toy") != 0 && !s->bitmaps && !s->device && !s->snapshot &&
           s->size >= 65536 && s->size < (4u << 20) &&
           !(s->base_format && strcmp(s->base_format, "toy") == 0);
}

/* ------------------------------------------------------------------ the disk */

static void open_disk(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    must(b, model_open(b->fs, b->s, DR_OPEN_RDWR, &b->disk, &err), "open", &err);
}

static void close_disk(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk = b->disk;
    b->disk = NULL;
    must(b, dr_close(disk, &err), "close", &err);
}

static void change_bitmap(struct backups *b, const char *name, enum dr_bitmap_action action)
{
    const struct dr_bitmap_options o = {.granularity = b->granularity};
    struct dr_error err = DR_ERROR_INIT;
    must(b, dr_disk_bitmap_change(b->disk, name, action, &o, &err), "bitmap", &err);
}

static void look_away(struct backups *b)
{
    free(b->user);
    b->user = copy_of(b->now, b->size);
    b->user_size = b->size;
}

static void make_disk(struct backups *b)
{
    struct shadow view;
    subject_make(b->s, b->fs, &b->rnd, &view, NULL);
    b->size = view.size;
    b->room = view.size + (1u << 20);
    b->now = calloc(1, b->room);
    b->buf = calloc(1, b->room);
    assert_non_null(b->now);
    assert_non_null(b->buf);
    memcpy(b->now, view.now, view.size);
    shadow_free(&view);
    open_disk(b);
    change_bitmap(b, BITMAP, DR_BITMAP_ADD); /* says which granularity those of backups get */
    change_bitmap(b, USER, DR_BITMAP_ADD);
    look_away(b);
}

/* ------------------------------------------------------------------ bitmaps */

struct cover {
    struct backups *b;
    uint64_t next, end; /* all is well up to next */
};

static int covers(void *user, uint64_t off, uint64_t len)
{
    struct cover *c = user;
    uint64_t to = dr_min(off, c->end);
    if (to > c->next && memcmp(c->b->user + c->next, c->b->now + c->next, to - c->next) != 0)
        FAIL(c->b, "the bitmap misses a change between %llu and %llu", (unsigned long long)c->next,
             (unsigned long long)to);
    c->next = dr_min(dr_max(c->next, off + len), c->end);
    return 0;
}

/* The disk was closed: the bitmap of the user has every difference. */
static void check_user_bitmap(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    struct cover c = {b, 0, dr_min(b->size, b->user_size)};
    must(b, dr_disk_bitmap_read(b->disk, USER, covers, &c, &err), "read the bitmap", &err);
    covers(&c, c.end, 0);
}

/* ------------------------------------------------------------------ looking at backups */

static struct instant *find_instant(struct backups *b, const char *name)
{
    for (unsigned i = 0; i < b->n; i++)
        if (strcmp(b->instants[i].name, name) == 0)
            return &b->instants[i];
    FAIL(b, "nobody made a backup called %s", name);
}

static void same_bytes(struct backups *b, const char *what, const uint8_t *have, uint64_t n,
                       const struct instant *want)
{
    if (n != want->size && n != dr_round_up(want->size, SECTOR)) /* qcow2 counts in sectors */
        FAIL(b, "%s of %s: has %llu bytes, not %llu", what, want->name, (unsigned long long)n,
             (unsigned long long)want->size);
    for (uint64_t i = 0; i < n; i++)
        if (have[i] != (i < want->size ? want->bytes[i] : 0))
            FAIL(b, "%s of %s: byte %llu is %02x, not %02x", what, want->name,
                 (unsigned long long)i, have[i], i < want->size ? want->bytes[i] : 0);
}

static void same_digest(struct backups *b, const char *digest, const struct instant *want)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_sums sums;
    char text[DR_DIGEST_TEXT];
    must(b, dr_sums_begin(&sums, want->size, &err), "digest", &err);
    must(b, dr_sums_put(&sums, 0, want->bytes, want->size, &err), "digest", &err);
    dr_sums_digest(&sums, text);
    dr_sums_end(&sums);
    if (strcmp(text, digest) != 0)
        FAIL(b, "the digest of %s is not that of what the disk held", want->name);
}

static void same_backup(struct backups *b, struct dr_fs *fs, const char *when,
                        const struct dr_backup_entry *e)
{
    struct dr_error err = DR_ERROR_INIT;
    char path[32];
    uint64_t n;
    const struct instant *want = find_instant(b, e->name);
    snprintf(path, sizeof(path), "dir/%s", e->name);
    uint8_t *have = model_read_all(fs, path, e->format, &n, &err);
    if (!have)
        FAIL(b, "%s of %s: %s", when, e->name, err.text);
    same_bytes(b, when, have, n, want);
    same_digest(b, e->digest, want);
    free(have);
    must(b, dr_backup_verify_fs(fs, SET, e->name, NULL, NULL, NULL, &err), when, &err);
}

/* Every backup that the set names and that is not merely announced: one of these may be anything
 * until the next backup has taken it in or away. Returns how many the set names. */
static size_t same_backups(struct backups *b, struct dr_fs *fs, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_backup_entry *list = NULL;
    size_t n = 0;
    int r = dr_backup_list_fs(fs, SET, &list, &n, &err);
    if (r == -ENOENT)
        return 0;
    must(b, r, when, &err);
    for (size_t i = 0; i < n; i++)
        if (!list[i].naming)
            same_backup(b, fs, when, &list[i]);
    dr_backup_list_free(list, n);
    return n;
}

/* ------------------------------------------------------------------ making them */

/* The next backup is to hold what the disk holds now. */
static const struct instant *plan_backup(struct backups *b)
{
    struct instant *i = &b->instants[b->n++];
    assert_true(b->n <= MAX_INSTANTS);
    snprintf(i->name, sizeof(i->name), "b%u", b->counter++);
    i->size = b->size;
    i->bytes = copy_of(b->now, b->size);
    return i;
}

static struct dr_backup_options backup_options(struct backups *b)
{
    static const char *const formats[] = {"qcow2", "add-cow"}; /* over each other */
    return (struct dr_backup_options){
        .set = SET,
        .bitmap = BITMAP,
        .format = b->to_vmdk ? "vmdk" : formats[rnd_below(&b->rnd, 2)],
        .full = rnd_below(&b->rnd, 8) == 0,
    };
}

struct running {
    struct dr_disk *disk;
    char path[32];
    struct dr_backup_options o;
    struct dr_backup_result result;
    struct dr_job *job;
    struct dr_error err;
    int r;
    pthread_t thread;
};

static void *run_backup(void *arg)
{
    struct running *r = arg;
    r->r = dr_disk_backup(r->disk, r->path, &r->o, r->job, &r->result, &r->err);
    return NULL;
}

/* Returns behind the instant; nothing was copied yet. */
static void begin_held(struct backups *b, struct running *r, const struct instant *i)
{
    *r = (struct running){.disk = b->disk, .o = backup_options(b)};
    snprintf(r->path, sizeof(r->path), "dir/%s", i->name);
    must(b, dr_job_new(NULL, NULL, &r->job, &r->err), "job", &r->err);
    dr_job_pause(r->job);
    assert_int_equal(pthread_create(&r->thread, NULL, run_backup, r), 0);
    wait_for_instant(r->job);
}

static void end_held(struct backups *b, struct running *r, const struct instant *i)
{
    dr_job_resume(r->job);
    pthread_join(r->thread, NULL);
    dr_job_free(r->job);
    must(b, r->r, i->name, &r->err);
    same_digest(b, r->result.digest, i);
}

static void back_up(struct backups *b)
{
    struct dr_backup_options o = backup_options(b);
    struct dr_backup_result result;
    struct dr_error err = DR_ERROR_INIT;
    char path[32];
    const struct instant *i = plan_backup(b);
    bool first = b->n == 1;
    snprintf(path, sizeof(path), "dir/%s", i->name);
    note(b, i->name, o.full, i->size);
    must(b, dr_disk_backup(b->disk, path, &o, NULL, &result, &err), "backup", &err);
    if (result.incremental == (first || o.full))
        FAIL(b, "%s is%s incremental", i->name, result.incremental ? "" : " not");
    same_digest(b, result.digest, i);
}

/* ------------------------------------------------------------------ changing the disk */

static void choose_range(struct backups *b, uint64_t *off, uint64_t *len)
{
    static const uint32_t longest[] = {1, 512, 5000, 70000, 200000};
    *len = 1 + rnd_below(&b->rnd, dr_min(longest[rnd_below(&b->rnd, 5)], b->size));
    *off = rnd_below(&b->rnd, b->size - *len + 1);
    if (rnd_below(&b->rnd, 2)) {
        *off = dr_round_down(*off, 4096);
        *len = dr_min(dr_round_up(*len, 4096), b->size - *off);
    }
}

static void change_write(struct backups *b, uint64_t off, uint64_t len)
{
    struct dr_error err = DR_ERROR_INIT;
    unsigned flags = rnd_below(&b->rnd, 8) ? 0 : DR_FUA;
    rnd_fill(&b->rnd, b->now + off, len);
    note(b, "write", off, len);
    must(b, dr_pwrite(b->disk, b->now + off, off, len, flags, &err), "write", &err);
}

static void change_zero(struct backups *b, uint64_t off, uint64_t len)
{
    static const unsigned flags[] = {0, DR_MAY_UNMAP, DR_EXPLICIT};
    struct dr_error err = DR_ERROR_INIT;
    memset(b->now + off, 0, len);
    note(b, "zero", off, len);
    must(b, dr_zero(b->disk, off, len, flags[rnd_below(&b->rnd, 3)], &err), "zero", &err);
}

/* What it leaves, zeros or what was there, is for the disk to say. */
static void change_discard(struct backups *b, uint64_t off, uint64_t len)
{
    struct dr_error err = DR_ERROR_INIT;
    note(b, "discard", off, len);
    must(b, dr_discard(b->disk, off, len, &err), "discard", &err);
    must(b, dr_pread(b->disk, b->buf, off, len, &err), "read", &err);
    for (uint64_t i = 0; i < len; i++)
        if (b->buf[i] && b->buf[i] != b->now[off + i])
            FAIL(b, "byte %llu became %02x", (unsigned long long)(off + i), b->buf[i]);
    memcpy(b->now + off, b->buf, len);
}

static void change_something(struct backups *b)
{
    uint64_t off, len;
    choose_range(b, &off, &len);
    switch (rnd_below(&b->rnd, 6)) {
    case 0:
        change_zero(b, off, len);
        break;
    case 1:
        change_discard(b, off, len);
        break;
    default:
        change_write(b, off, len);
    }
}

static void back_up_while_changing(struct backups *b)
{
    struct running running;
    const struct instant *i = plan_backup(b);
    note(b, i->name, 0, i->size);
    begin_held(b, &running, i);
    for (uint64_t n = rnd_below(&b->rnd, 6); n > 0; n--)
        change_something(b);
    note(b, "copies", 0, 0);
    end_held(b, &running, i);
}

static void change_size(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    const bool any = !b->to_vmdk &&
                     (!strcmp(b->s->format, "raw") || !strcmp(b->s->format, "add-cow"));
    const uint64_t unit = any ? 1 : SECTOR;
    uint64_t size = unit * (1 + rnd_below(&b->rnd, b->room / unit - 1));
    int r = dr_truncate(b->disk, size, &err);
    if (r == -ENOTSUP)
        return;
    must(b, r, "resize", &err);
    note(b, "resize", 0, size);
    if (size < b->size)
        memset(b->now + size, 0, b->size - size);
    b->size = size;
    b->user_size = dr_min(b->user_size, size); /* what was cut off is forgotten */
}

/* Take a snapshot inside the image, or apply or delete the last one. */
static void change_snapshots(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    struct inside *last = b->n_snapshots ? &b->snapshots[b->n_snapshots - 1] : NULL;
    uint64_t what = last ? rnd_below(&b->rnd, 3) : 0;
    if (what == 0 && b->n_snapshots < MAX_SNAPSHOTS) {
        struct inside *s = &b->snapshots[b->n_snapshots];
        snprintf(s->name, sizeof(s->name), "s%u", b->counter++);
        int r = dr_disk_internal_snapshot_create(b->disk, s->name, NULL, &err);
        if (r == -ENOTSUP || r == -EINVAL)
            return; /* it has none, or no room in its counts */
        must(b, r, "snapshot", &err);
        note(b, "snapshot", 0, 0);
        s->size = b->size;
        s->bytes = copy_of(b->now, b->size);
        b->n_snapshots++;
    } else if (what == 1) {
        must(b, dr_disk_internal_snapshot_apply(b->disk, last->name, NULL, &err), "apply", &err);
        note(b, "apply", 0, 0);
        memset(b->now, 0, b->room);
        memcpy(b->now, last->bytes, last->size);
        b->size = last->size;
        b->user_size = dr_min(b->user_size, b->size);
    } else if (last) {
        must(b, dr_disk_internal_snapshot_delete(b->disk, last->name, NULL, &err), "delete", &err);
        note(b, "delete", 0, 0);
        free(last->bytes);
        b->n_snapshots--;
    }
}

/* An overlay comes, takes changes, and is committed. */
static void change_by_commit(struct backups *b)
{
    const bool vmdk = strcmp(b->s->format, "vmdk") == 0;
    const struct dr_open_options open = {.format = vmdk ? "vmdk" : "qcow2", .flags = DR_OPEN_RDWR};
    const struct dr_commit_options commit = {.open = {.format = open.format}, .keep = true};
    struct dr_create_options create = {
        .format = open.format, .backing = subject_top(b->s), .backing_format = b->s->format};
    struct dr_error err = DR_ERROR_INIT;
    create.backing = dr_path_basename(create.backing);
    close_disk(b);
    must(b, dr_create_fs(b->fs, "dir/over", &create, &err), "create the overlay", &err);
    must(b, dr_open_fs(b->fs, "dir/over", &open, &b->disk, &err), "open the overlay", &err);
    note(b, "overlay", 0, 0);
    for (uint64_t n = 1 + rnd_below(&b->rnd, 3); n > 0; n--)
        change_something(b);
    close_disk(b);
    must(b, dr_commit_fs(b->fs, "dir/over", &commit, NULL, &err), "commit", &err);
    must(b, b->fs->ops->unlink(b->fs, "dir/over", &err), "unlink", &err);
    note(b, "committed", 0, 0);
    open_disk(b);
}

static void reopen(struct backups *b)
{
    close_disk(b);
    note(b, "reopen", 0, 0);
    open_disk(b);
    check_user_bitmap(b);
}

static void clear_user_bitmap(struct backups *b)
{
    note(b, "clear", 0, 0);
    change_bitmap(b, USER, DR_BITMAP_CLEAR);
    look_away(b);
}

static void flush(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    note(b, "flush", 0, 0);
    must(b, dr_flush(b->disk, &err), "flush", &err);
}

static void step(struct backups *b)
{
    static void (*const kinds[])(struct backups *) = {back_up,
                                                      back_up_while_changing,
                                                      back_up_while_changing,
                                                      change_size,
                                                      change_snapshots,
                                                      change_by_commit,
                                                      reopen,
                                                      flush,
                                                      clear_user_bitmap};
    enum { KINDS = sizeof(kinds) / sizeof(kinds[0]) };
    uint64_t which = rnd_below(&b->rnd, 2 * KINDS);
    if (which < KINDS && (b->n < MAX_INSTANTS - 8 || which > 2))
        kinds[which](b);
    else
        change_something(b);
}

/* ------------------------------------------------------------------ power cuts */

/* A backup of the disk as it is in the cut; in full where its bitmap does not tell all. */
static void back_up_again(struct backups *b, struct dr_fs *fs)
{
    struct dr_backup_options o = {.set = SET, .bitmap = BITMAP};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_open_options open = {.format = b->s->format};
    char path[32];
    uint64_t size;
    uint8_t *bytes = model_read_all(fs, subject_top(b->s), b->s->format, &size, &err);
    if (!bytes)
        FAIL(b, "after the cut: %s", err.text);
    struct instant *i = &b->instants[b->n++];
    *i = (struct instant){.size = size, .bytes = bytes};
    snprintf(i->name, sizeof(i->name), "c%u", b->counter++);
    snprintf(path, sizeof(path), "dir/%s", i->name);
    int r = dr_backup_fs(fs, subject_top(b->s), &open, path, &o, NULL, NULL, &err);
    if (r == -EUCLEAN) {
        o.full = true;
        dr_error_reset(&err);
        r = dr_backup_fs(fs, subject_top(b->s), &open, path, &o, NULL, NULL, &err);
    }
    must(b, r, "a backup after the cut", &err);
}

/* Each backup that the set names is whole; so is the next one, and one after that. */
static void look_at_cut(struct backups *b)
{
    struct dr_error err = DR_ERROR_INIT;
    char op[120] = "nothing", when[200];
    size_t all = powerfs_ops(b->power), k = rnd_below(&b->rnd, all + 1);
    enum powerfs_mode mode = (enum powerfs_mode)rnd_below(&b->rnd, POWERFS_MODES);
    uint64_t seed = rnd_next(&b->rnd), off, len;
    struct dr_fs *cut = powerfs_cut(b->power, k, mode, seed);
    assert_non_null(cut);
    unsigned n = b->n;
    if (k > 0)
        powerfs_op_text(b->power, k - 1, op, sizeof(op));
    snprintf(when, sizeof(when), "cut after %zu of %zu (%s), mode %u: a backup", k, all, op, mode);
    note(b, when, k, seed);
    backups_after_cut = true;
    same_backups(b, cut, when);
    back_up_again(b, cut);
    must(b, model_open(cut, b->s, DR_OPEN_RDWR, &b->disk, &err), "open after the cut", &err);
    uint64_t size = b->size;
    b->size = dr_size(b->disk);
    choose_range(b, &off, &len);
    must(b, dr_pwrite(b->disk, b->buf, off, len, 0, &err), "write after the cut", &err);
    close_disk(b);
    back_up_again(b, cut);
    same_backups(b, cut, when);
    backups_after_cut = false;
    b->size = size;
    while (b->n > n)
        free(b->instants[--b->n].bytes);
    dr_fs_memory_free(cut);
}

/* ------------------------------------------------------------------ the whole */

static void end(struct backups *b)
{
    for (unsigned i = 0; i < b->n; i++)
        free(b->instants[i].bytes);
    for (unsigned i = 0; i < b->n_snapshots; i++)
        free(b->snapshots[i].bytes);
    free(b->user);
    free(b->now);
    free(b->buf);
    powerfs_free(b->power);
}

void backups_program(const struct subject *s, uint64_t seed, uint64_t granularity, unsigned steps,
                     unsigned cuts)
{
    struct backups *b = calloc(1, sizeof(*b));
    assert_non_null(b);
    b->s = s;
    b->rnd.state = seed;
    b->granularity = granularity;
    b->to_vmdk = s->size % SECTOR == 0 && rnd_below(&b->rnd, 3) == 0;
    b->power = powerfs_new();
    b->fs = powerfs_fs(b->power);
    snprintf(b->text, sizeof(b->text), "granularity %llu: ", (unsigned long long)granularity);
    make_disk(b);
    powerfs_settle(b->power);
    back_up(b);
    for (unsigned i = 0; i < steps; i++)
        step(b);
    close_disk(b);
    open_disk(b);
    back_up(b);
    close_disk(b);
    if (same_backups(b, b->fs, "at the end") != b->n)
        FAIL(b, "the set does not name %u backups", b->n);
    for (unsigned i = 0; i < cuts; i++)
        look_at_cut(b);
    end(b);
    free(b);
}
