/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Whole operations on random families of images: chains of two to four layers of any formats and
 * sizes. Whatever happens - nothing, one failing I/O, a power cut - the guest's view at the top is
 * the same byte for byte, who is not concerned has not changed, and a rerun finishes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "model.h"
#include "ops/ops-internal.h"
#include "plant.h"
#include "powerfs.h"

#define KIB        1024u
#define MAX_LAYERS 4

enum verb {
    REBASE,
    REBASE_DROP,
    REBASE_MEMBER,
    FLATTEN,
    STREAM,
    STREAM_BASE,
    COMMIT,
    COMMIT_DEEP,
    COMMIT_KEEP,
    SNAPSHOT,
    CONVERT,
    RETIRE,
    COMPACT,
    COMPACT_MEMBER,
    VERBS,
};
static const char *const verb_names[] = {"rebase",
                                         "rebase, dropping what is equal",
                                         "rebase onto a member",
                                         "flatten",
                                         "stream",
                                         "stream to a base",
                                         "commit",
                                         "commit through several",
                                         "commit, keeping",
                                         "snapshot",
                                         "convert",
                                         "stream and retire",
                                         "compact",
                                         "compact a member"};

struct layer {
    const char *format;
    uint64_t size;
    char path[60];
    const char *name; /* its last part */
    uint8_t *view;    /* before the operation */
};

struct family {
    uint64_t seed;
    enum verb verb;
    unsigned n;                          /* layers; [0] is the base, [n - 1] the top */
    struct layer layers[MAX_LAYERS + 1]; /* [n]: the stranger */
    char result[40];                     /* what convert makes, ready or not there at all */
    char plain[60];                      /* what is left of a retired top; "" = it stays */
    unsigned member;                     /* which layer the verb is about */
    char text[200];
    struct subject subject; /* for messages */
};

#define TOP(f)   (&(f)->layers[(f)->n - 1])
#define OTHER(f) (&(f)->layers[(f)->n])

/* ------------------------------------------------------------------ making a family */

static bool commits(const struct family *f)
{
    return f->verb == COMMIT || f->verb == COMMIT_KEEP || f->verb == COMMIT_DEEP;
}

static void name_layers(struct family *f)
{
    char more[60];
    strcpy(f->text, verb_names[f->verb]);
    for (unsigned i = 0; i <= f->n; i++) {
        struct layer *l = &f->layers[i];
        const char *stem = i == f->n ? "other" : i == 0 ? "base" : i + 1 == f->n ? "top" : "mid";
        snprintf(l->path, sizeof(l->path), "dir/%s%u.%s", stem, i, l->format);
        l->name = l->path + strlen("dir/");
        snprintf(more, sizeof(more), " %s%u.%s %lluK", stem, i, l->format,
                 (unsigned long long)l->size / KIB);
        strncat(f->text, more, sizeof(f->text) - strlen(f->text) - 1);
    }
    f->subject = (struct subject){.name = f->text};
}

static bool only_qcow2; /* for faults that are planted into it */

static void choose(struct family *f, uint64_t seed)
{
    struct rnd rnd = {seed};
    static const char *const below[] = {"toy", "vmdk", "raw", "add-cow", "qcow2"};
    static const char *const above[] = {"toy", "add-cow", "add-cow", "qcow2"};
    uint64_t n_below = sizeof(below) / sizeof(below[0]);
    uint64_t kind = only_qcow2 ? 3 : rnd_below(&rnd, 4);
    *f = (struct family){.seed = seed, .verb = (enum verb)rnd_below(&rnd, VERBS)};
    f->n = 2 + (unsigned)rnd_below(&rnd, MAX_LAYERS - 1);
    for (unsigned i = 0; i <= f->n; i++) {
        struct layer *l = &f->layers[i];
        bool bottom = i == 0 || i == f->n;
        l->format = kind == 0   ? "vmdk"
                    : kind == 3 ? "qcow2"
                    : bottom    ? below[rnd_below(&rnd, n_below)]
                    : kind == 1 ? "toy"
                                : above[rnd_below(&rnd, 4)];
        l->size = (150 + rnd_below(&rnd, 500)) * KIB + rnd_below(&rnd, 8) * 512;
    }
    snprintf(f->result, sizeof(f->result), "dir/result.%s", below[rnd_below(&rnd, n_below)]);
    f->member = (unsigned)rnd_below(&rnd, f->n - 1);
    if (f->verb == COMMIT || f->verb == COMMIT_KEEP)
        f->member = f->n - 2;
    if (commits(f) && rnd_below(&rnd, 3)) /* the others may be refused, where it cannot grow */
        f->layers[f->member].size = dr_max(f->layers[f->member].size, TOP(f)->size);
    name_layers(f);
}

static const char kept[] = "keep me!"; /* in the header of each qcow2 image */

static void family_fail(const struct family *f, const char *what, const struct dr_error *err)
{
    MODEL_FAIL(&f->subject, "family %llu (DROVER_FAMILY to run it alone): %s: %s",
               (unsigned long long)f->seed, what, err->text);
}

static void scribble(const struct family *f, struct dr_fs *fs, const struct layer *l,
                     struct rnd *rnd, const uint8_t *like, uint64_t like_size)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_open_options o = {.format = l->format, .flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    CLEANUP_FREE uint8_t *buf = malloc(64 * KIB);
    int r = dr_open_fs(fs, l->path, &o, &disk, &err);
    for (int i = 0; !r && i < 7; i++) {
        uint64_t len = 512 * (1 + rnd_below(rnd, 100));
        uint64_t off = dr_round_down(rnd_below(rnd, l->size - len + 1), 512);
        rnd_fill(rnd, buf, len);
        if (like && off + len <= like_size && rnd_below(rnd, 2))
            memcpy(buf, like + off, len);
        r = rnd_below(rnd, 4) ? dr_pwrite(disk, buf, off, len, 0, &err)
                              : dr_zero(disk, off, len, DR_EXPLICIT, &err);
    }
    if (!r)
        r = dr_close(disk, &err);
    if (r)
        family_fail(f, "scribble", &err);
}

static uint8_t *read_view(const struct family *f, struct dr_fs *fs, const char *path, uint64_t size)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t n = 0;
    uint8_t *buf = model_read_all(fs, path, NULL, &n, &err);
    if (!buf || n != size)
        family_fail(f, path, &err);
    return buf;
}

/* Put an extension that no program knows into the header of a qcow2 image: behind the others, and
 * the parent's name behind it. */
static void add_extension(const struct family *f, struct dr_fs *fs, const struct layer *l)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t head[4096], *name;
    struct dr_file *file;
    int r = dr_file_open(fs, l->path, DR_FILE_RDWR, &file, &err);
    if (r == 0)
        r = dr_file_pread(file, head, 0, sizeof(head), &err);
    size_t at = get_be32(head + 100), name_len = get_be32(head + 16);
    while (r == 0 && get_be32(head + at) != 0)
        at += 8 + dr_round_up(get_be32(head + at + 4), 8);
    if (r == 0 && name_len > 0) {
        name = head + get_be64(head + 8);
        memmove(head + at + 24, name, name_len);
        put_be64(head + 8, at + 24);
    }
    put_be32(head + at, PLANT_EXTENSION);
    put_be32(head + at + 4, sizeof(kept) - 1);
    memcpy(head + at + 8, kept, sizeof(kept) - 1);
    memset(head + at + 16, 0, 8);
    if (r == 0)
        r = dr_file_pwrite(file, head, 0, sizeof(head), &err);
    if (r == 0)
        r = dr_file_flush(file, &err);
    if (r < 0)
        family_fail(f, "add an extension", &err);
    dr_file_unref(file);
}

/* Add-cow images can be retired; of others nothing is asked. */
static void choose_plain(struct family *f, struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_retire_state state = {0};
    if (f->verb != RETIRE || strcmp(TOP(f)->format, "add-cow") != 0)
        return;
    if (dr_retire_look_fs(fs, TOP(f)->path, &(struct dr_retire_options){0}, &state, &err))
        family_fail(f, "look whether it can be retired", &err);
    snprintf(f->plain, sizeof(f->plain), "%s", state.plain);
    free(state.plain);
}

static void make_family(struct family *f, struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    struct rnd rnd = {f->seed ^ 0x5555};
    if (fs->ops->mkdir)
        fs->ops->mkdir(fs, "dir", 0700, NULL);
    for (unsigned i = 0; i <= f->n; i++) {
        struct layer *l = &f->layers[i];
        bool child = i > 0 && i < f->n;
        struct dr_create_options o = {.format = l->format, .size = l->size, .has_size = true};
        o.backing = child ? f->layers[i - 1].name : NULL;
        o.backing_format = child ? f->layers[i - 1].format : NULL;
        if (dr_create_fs(fs, l->path, &o, &err))
            family_fail(f, "create", &err);
        if (!strcmp(l->format, "qcow2"))
            add_extension(f, fs, l);
        scribble(f, fs, l, &rnd, i == f->n ? TOP(f)->view : NULL, TOP(f)->size);
        l->view = read_view(f, fs, l->path, l->size);
    }
    choose_plain(f, fs);
}

static void free_family(struct family *f)
{
    for (unsigned i = 0; i <= f->n; i++)
        free(f->layers[i].view);
}

/* ------------------------------------------------------------------ the verbs */

static int rebase(const struct family *f, struct dr_fs *fs, const struct layer *to, bool drop,
                  struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = to ? to->name : "",
                                  .backing_format = to ? to->format : NULL,
                                  .drop_equal = drop};
    return dr_rebase_fs(fs, TOP(f)->path, &o, NULL, err);
}

static int stream(const struct family *f, struct dr_fs *fs, const char *base, struct dr_error *err)
{
    struct dr_stream_options o = {.base = base};
    return dr_stream_fs(fs, TOP(f)->path, &o, NULL, err);
}

static int commit(const struct family *f, struct dr_fs *fs, bool keep, const char *base,
                  struct dr_error *err)
{
    struct dr_commit_options o = {.base = base, .keep = keep};
    return dr_commit_fs(fs, TOP(f)->path, &o, NULL, err);
}

static int convert(const struct family *f, struct dr_fs *fs, struct dr_error *err)
{
    struct dr_convert_options o = {.out_format = strrchr(f->result, '.') + 1,
                                   .sparse_size = DR_CONVERT_SPARSE_DEFAULT};
    const char *from = TOP(f)->path;
    return dr_convert_fs(fs, &from, 1, f->result, &o, NULL, err);
}

static bool exists(struct dr_fs *fs, const char *path)
{
    struct dr_file_id id;
    return fs->ops->identify(fs, path, &id, NULL) == 0;
}

/* The metadata has gone. */
static bool retired(const struct family *f, struct dr_fs *fs)
{
    return f->plain[0] && !exists(fs, TOP(f)->path);
}

static int retire(const struct family *f, struct dr_fs *fs, struct dr_error *err)
{
    int r = retired(f, fs) ? 0 : stream(f, fs, NULL, err);
    return r || !f->plain[0] || retired(f, fs)
               ? r
               : dr_retire_fs(fs, TOP(f)->path, &(struct dr_retire_options){0}, NULL, err);
}

static int compact(struct dr_fs *fs, const struct layer *l, struct dr_error *err)
{
    struct dr_compact_options o = {.open.format = l->format};
    return dr_compact_fs(fs, l->path, &o, NULL, NULL, err);
}

static int run_verb(const struct family *f, struct dr_fs *fs, struct dr_error *err)
{
    const struct layer *member = &f->layers[f->member];
    char *active = NULL;
    int r;
    switch (f->verb) {
    case REBASE:
        return rebase(f, fs, OTHER(f), false, err);
    case REBASE_DROP:
        return rebase(f, fs, OTHER(f), true, err);
    case REBASE_MEMBER:
        return rebase(f, fs, member, false, err);
    case FLATTEN:
        return rebase(f, fs, NULL, false, err);
    case STREAM:
        return stream(f, fs, NULL, err);
    case STREAM_BASE:
        return stream(f, fs, member->name, err);
    case COMMIT:
        return commit(f, fs, false, NULL, err);
    case COMMIT_KEEP:
        return commit(f, fs, true, NULL, err);
    case COMMIT_DEEP:
        return commit(f, fs, false, member->name, err);
    case CONVERT:
        return convert(f, fs, err);
    case RETIRE:
        return retire(f, fs, err);
    case COMPACT:
        return compact(fs, TOP(f), err);
    case COMPACT_MEMBER:
        return compact(fs, member, err);
    default:
        r = dr_snapshot_create_fs(fs, TOP(f)->path, NULL, NULL, &active, err);
        free(active);
        return r;
    }
}

/* ------------------------------------------------------------------ looking */

static void check_view(const struct family *f, struct dr_fs *fs, const struct layer *l,
                       const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    CLEANUP_FREE uint8_t *now = read_view(f, fs, l->path, l->size);
    for (uint64_t i = 0; i < l->size; i++)
        if (now[i] != l->view[i]) {
            dr_fail(&err, EILSEQ, "byte %llu of %s is %02x, not %02x", (unsigned long long)i,
                    l->name, now[i], l->view[i]);
            family_fail(f, when, &err);
        }
}

/* Whatever the verb did to its header, the extension is there: it is all that looks like it. */
static void check_extension(const struct family *f, struct dr_fs *fs, const struct layer *l,
                            const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t head[4096], mark[16];
    struct dr_file *file;
    if (strcmp(l->format, "qcow2") != 0 || !exists(fs, l->path))
        return;
    put_be32(mark, PLANT_EXTENSION);
    put_be32(mark + 4, sizeof(kept) - 1);
    memcpy(mark + 8, kept, sizeof(kept) - 1);
    int r = dr_file_open(fs, l->path, 0, &file, &err);
    if (r == 0) {
        r = dr_file_pread(file, head, 0, sizeof(head), &err);
        dr_file_unref(file);
    }
    if (r == 0 && !memmem(head, sizeof(head), mark, sizeof(mark)))
        dr_fail(&err, EILSEQ, "the header of %s has lost an extension", l->name);
    if (err.errnum)
        family_fail(f, when, &err);
}

/* The top and everybody whom the verb does not concern. */
static void check_views(const struct family *f, struct dr_fs *fs, const char *when)
{
    struct layer top = *TOP(f);
    if (retired(f, fs))
        snprintf(top.path, sizeof(top.path), "%s", f->plain);
    check_view(f, fs, &top, when);
    check_view(f, fs, OTHER(f), when);
    for (unsigned i = 0; i <= f->n; i++)
        check_extension(f, fs, &f->layers[i], when);
    for (unsigned i = 0; i + 1 < f->n; i++)
        if (!commits(f) || i < f->member)
            check_view(f, fs, &f->layers[i], when);
    if (f->verb != CONVERT || !exists(fs, f->result))
        return;
    struct layer made = *TOP(f);
    made.name = f->result;
    snprintf(made.path, sizeof(made.path), "%s", f->result);
    check_view(f, fs, &made, when);
}

static void check_image(const struct family *f, struct dr_fs *fs, const struct layer *l,
                        bool leaks_allowed, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result = {.report = model_check_line};
    struct dr_image *image;
    if (l == TOP(f) && retired(f, fs))
        return;
    if (dr_image_open(fs, l->path, l->format, 0, &image, &err))
        family_fail(f, when, &err);
    int r = image->fmt->check ? image->fmt->check(image, 0, &result, &err) : 0;
    dr_image_unref(image, NULL);
    if (r && r != -ENOTSUP)
        family_fail(f, when, &err);
    dr_error_reset(&err);
    if (result.corruptions || result.check_errors || (result.leaks && !leaks_allowed)) {
        dr_fail(&err, EIO, "%s has %llu corruptions, %llu leaks", l->name,
                (unsigned long long)result.corruptions, (unsigned long long)result.leaks);
        family_fail(f, when, &err);
    }
}

/* What the verb promises once it has succeeded. */
static void check_done(const struct family *f, struct dr_fs *fs, bool leaks_allowed,
                       const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_image *top;
    const char *want = f->verb == REBASE || f->verb == REBASE_DROP ? OTHER(f)->name
                       : f->verb == FLATTEN || f->verb == STREAM || f->verb == RETIRE ? NULL
                       : f->verb == REBASE_MEMBER || f->verb == STREAM_BASE
                           ? f->layers[f->member].name
                           : f->layers[f->n - 2].name;
    check_views(f, fs, when);
    if (f->plain[0] && !retired(f, fs))
        family_fail(f, "it was not retired", &err);
    if (f->plain[0])
        return;
    check_image(f, fs, TOP(f), leaks_allowed, when);
    if (f->verb == COMPACT_MEMBER)
        check_image(f, fs, &f->layers[f->member], leaks_allowed, when);
    if (dr_image_open(fs, TOP(f)->path, NULL, 0, &top, &err))
        family_fail(f, when, &err);
    if (!want != !top->backing_name || (want && strcmp(want, top->backing_name)))
        dr_fail(&err, EINVAL, "the parent is %s", top->backing_name ? top->backing_name : "none");
    dr_image_unref(top, NULL);
    if (err.errnum && f->verb != COMMIT_DEEP)
        family_fail(f, when, &err);
    if (f->verb == CONVERT && !exists(fs, f->result))
        family_fail(f, "there is no result", &err);
    if (!commits(f))
        return;
    const struct layer *target = &f->layers[f->member];
    uint64_t size = 0;
    check_image(f, fs, target, leaks_allowed, when);
    CLEANUP_FREE uint8_t *now = model_read_all(fs, target->path, NULL, &size, &err);
    /* It need not grow for zeros. */
    if (!now || memcmp(now, TOP(f)->view, dr_min(size, TOP(f)->size)) ||
        (size < TOP(f)->size && !dr_is_zero(TOP(f)->view + size, TOP(f)->size - size))) {
        dr_fail(&err, EILSEQ, "the parent does not show what was committed");
        family_fail(f, when, &err);
    }
}

/* A parent that would have to grow over its own parent's bytes is refused, before any change. */
static bool refused(const struct family *f, struct dr_fs *fs, const struct dr_error *err)
{
    if (!commits(f) || (!strstr(err->text, "resize it first") && !strstr(err->text, "cannot grow")))
        return false;
    for (unsigned i = 0; i <= f->n; i++)
        check_view(f, fs, &f->layers[i], "refused");
    return true;
}

/* Done already is no failure. */
static void run_again(const struct family *f, struct dr_fs *fs, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = run_verb(f, fs, &err);
    if (r == -EINVAL && (f->verb == STREAM_BASE || f->verb == COMMIT_DEEP))
        return;
    if (r && refused(f, fs, &err))
        return; /* the failing I/O came before the refusal */
    if (r)
        family_fail(f, when, &err);
}

/* ------------------------------------------------------------------ three ways of running it */

static enum plant op_plant;

static void undisturbed(struct family *f)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *fs = dr_fs_memory_new();
    make_family(f, fs);
    if (op_plant)
        plant(op_plant);
    int r = run_verb(f, fs, &err);
    if (op_plant)
        plant(PLANT_NONE);
    if (r && !refused(f, fs, &err))
        family_fail(f, "the operation", &err);
    if (!r) {
        check_done(f, fs, false, "at the end");
        run_again(f, fs, "doing it again");
        check_views(f, fs, "after doing it again");
    }
    free_family(f);
    dr_fs_memory_free(fs);
}

/* False: there is no such I/O. */
static bool with_fault(struct family *f, uint64_t nth)
{
    char when[100];
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *memory = dr_fs_memory_new();
    make_family(f, memory);
    struct faultfs *fault = faultfs_new(memory);
    struct faultfs_plan plan = {
        .nth = nth, .error = nth % 2 ? ENOSPC : EIO, .partial = nth % 3 == 0};
    plan.for_good = nth % 5 == 4;
    faultfs_arm(fault, &plan);
    int r = run_verb(f, faultfs_fs(fault), &err);
    bool fired = faultfs_fired(fault);
    faultfs_disarm(fault);
    bool no = r && refused(f, memory, &err);
    if (r && !fired && !no)
        family_fail(f, "no I/O has failed", &err);
    snprintf(when, sizeof(when), "I/O %llu failed (%.60s)", (unsigned long long)nth, err.text);
    check_views(f, memory, when);
    if (r && fired && !no)
        run_again(f, memory, when);
    if (fired)
        check_views(f, memory, when);
    check_image(f, memory, TOP(f), true, when);
    free_family(f);
    faultfs_free(fault);
    dr_fs_memory_free(memory);
    return fired;
}

static size_t plant_skip = SIZE_MAX;

static void one_cut(const struct family *f, struct powerfs *p, size_t k, unsigned mode,
                    uint64_t seed, bool again)
{
    char when[200], op[120] = "nothing";
    struct dr_fs *disk = powerfs_cut(p, k, mode, seed);
    if (k)
        powerfs_op_text(p, k - 1, op, sizeof(op));
    snprintf(when, sizeof(when), "cut after %zu of %zu (%s), mode %u, seed %llu", k, powerfs_ops(p),
             op, mode, (unsigned long long)seed);
    check_views(f, disk, when);
    if (again) {
        run_again(f, disk, when);
        check_views(f, disk, when);
        check_image(f, disk, TOP(f), true, when);
    }
    dr_fs_memory_free(disk);
}

static void with_cuts(struct family *f, struct rnd *rnd)
{
    struct dr_error err = DR_ERROR_INIT;
    struct powerfs *p = powerfs_new();
    make_family(f, powerfs_fs(p));
    powerfs_settle(p);
    powerfs_skip_flush(p, plant_skip);
    int r = run_verb(f, powerfs_fs(p), &err);
    if (r && !refused(f, powerfs_fs(p), &err))
        family_fail(f, "the operation", &err);
    powerfs_skip_flush(p, SIZE_MAX);
    size_t n = powerfs_ops(p);
    for (size_t k = 0; !r && k <= n; k++) {
        /* The switches are near the end. */
        if (k + 25 < n && rnd_below(rnd, n) >= model_length(25))
            continue;
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++)
            if (mode == 0 || powerfs_open_ops(p, k))
                one_cut(f, p, k, mode, rnd_next(rnd), rnd_below(rnd, 4) == 0);
    }
    free_family(f);
    powerfs_free(p);
}

/* ------------------------------------------------------------------ tests */

static void each_family(unsigned n, void (*body)(struct family *f))
{
    const char *only = getenv("DROVER_FAMILY");
    struct family f;
    for (unsigned i = 0; i < (only ? 1 : model_length(n)); i++) {
        choose(&f, only ? strtoull(only, NULL, 0) : model_seed() + i);
        if (getenv("DROVER_VERBOSE"))
            print_message("%llu %s\n", (unsigned long long)f.seed, f.text);
        body(&f);
    }
}

static void cut_it(struct family *f)
{
    struct rnd rnd = {f->seed};
    with_cuts(f, &rnd);
}

static void fail_it(struct family *f)
{
    uint64_t seed = f->seed;
    for (uint64_t nth = 0; with_fault(f, nth); nth += SLOWER)
        choose(f, seed);
}

static void operations_keep_the_view(void **state)
{
    (void)state;
    each_family(200, undisturbed);
}

static void power_cuts_keep_the_view(void **state)
{
    (void)state;
    if (SLOWER_THREADS) /* has seen its threads without */
        skip();
    each_family(40, cut_it);
}

static void faults_keep_the_view(void **state)
{
    (void)state;
    each_family(20, fail_it);
}

static void skipped_flush_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    (void)state;
    bool found = false;
    for (plant_skip = 0; plant_skip < 12 && !found; plant_skip++)
        found = model_detects(power_cuts_keep_the_view, NULL);
    plant_skip = SIZE_MAX;
    assert_true(found);
}

static void long_parent_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    (void)state;
    op_plant = PLANT_LONG_PARENT;
    assert_true(model_detects(operations_keep_the_view, NULL));
    op_plant = PLANT_NONE;
}

static void losing_extensions(void **state)
{
    plant_into("qcow2", PLANT_LOST_EXTENSION);
    operations_keep_the_view(state);
}

static void lost_extension_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    (void)state;
    only_qcow2 = true;
    assert_true(model_detects(losing_extensions, NULL));
    only_qcow2 = false;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(operations_keep_the_view), cmocka_unit_test(power_cuts_keep_the_view),
        cmocka_unit_test(faults_keep_the_view),     cmocka_unit_test(skipped_flush_is_found),
        cmocka_unit_test(long_parent_is_found),
    };
    const struct CMUnitTest plants[] = {cmocka_unit_test(lost_extension_is_found)};
    plant(PLANT_NONE); /* the toy itself */
    return MODEL_ONLY_PLANTS ? cmocka_run_group_tests(plants, NULL, NULL)
                             : cmocka_run_group_tests(tests, NULL, NULL);
}
