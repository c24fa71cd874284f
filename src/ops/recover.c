/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* recover: find what was interrupted at a disk, say so, and finish or undo it. */
#include <stdarg.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "core/fingerprint.h"
#include "ops/ops-internal.h"

struct recover {
    struct dr_fs *fs;
    const char *path;
    struct dr_open_options options;
    bool dry_run;
    void (*report)(void *user, const char *line);
    void *user;
    unsigned found;
    bool busy;  /* something is being made there */
    char *kept; /* the last leftover that only a person can judge; NULL = none */
};

static void say_v(struct recover *rc, const char *fmt, va_list ap)
{
    char line[2048];
    vsnprintf(line, sizeof(line), fmt, ap);
    if (rc->report)
        rc->report(rc->user, line);
}

/* Report something that was interrupted. */
static void say(struct recover *rc, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(struct recover *rc, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    say_v(rc, fmt, ap);
    va_end(ap);
    rc->found++;
}

/* Report something that goes on. */
static void remark(struct recover *rc, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void remark(struct recover *rc, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    say_v(rc, fmt, ap);
    va_end(ap);
}

/* ------------------------------------------------------------------ leftovers in the directory */

/* Is somebody still at work on it? Where that cannot be told it counts as yes. */
static bool in_use(struct recover *rc, const char *path)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    unsigned flags = rc->options.flags & DR_OPEN_NO_LOCK ? DR_FILE_NO_LOCK : 0;
    int r = dr_file_open(rc->fs, path, DR_FILE_RDWR | flags, &file, NULL);
    return r < 0 && r != -ENOENT;
}

static int temporary_file(struct recover *rc, const char *path, struct dr_error *err)
{
    if (in_use(rc, path))
        return 0;
    say(rc, "%s: left by an interrupted replacement%s", path, rc->dry_run ? "" : ": removed");
    return rc->dry_run ? 0 : rc->fs->ops->unlink(rc->fs, path, err);
}

static bool dir_in_use(struct recover *rc, const char *dir, char *const *names, size_t n)
{
    bool busy = false;
    for (size_t i = 0; i < n && !busy; i++) {
        CLEANUP_FREE char *path = dr_path_join(dir, names[i]);
        busy = path && in_use(rc, path);
    }
    return busy;
}

static int keep_dir(struct recover *rc, const char *dir)
{
    say(rc, "%s: left by an interrupted attempt at a new image, which one cannot be told: kept",
        dir);
    free(rc->kept);
    rc->kept = strdup(dir);
    return 0;
}

static int keep_for_choice(struct recover *rc, const char *dir, const char *final)
{
    say(rc,
        "%s: the image that was to replace %s, which may have been used since: kept; remove the "
        "one "
        "that is not wanted and run this again",
        dir, final);
    free(rc->kept);
    rc->kept = strdup(dir);
    return 0;
}

/* The private directory of a new image, locked where that can be. */
static int claimed_dir(struct recover *rc, const char *dir, const char *of, struct dr_error *err)
{
    CLEANUP_FREE char *final = of ? dr_path_sibling(rc->path, of) : NULL;
    char **names = NULL;
    size_t n = 0;
    int r = final || !of ? dr_ops_list(rc->fs, dir, &names, &n, err)
                         : dr_fail(err, ENOMEM, "%s: out of memory", dir);
    if (r < 0)
        return r;
    bool busy = dir_in_use(rc, dir, names, n);
    dr_ops_free_names(names, n);
    if (busy)
        return 0;
    enum dr_new_state state = final ? dr_new_judge(rc->fs, dir, final) : DR_NEW_UNKNOWN;
    if (state == DR_NEW_UNKNOWN)
        return keep_dir(rc, dir);
    bool finish = state == DR_NEW_HALF_MOVED;
    if (finish && !dr_new_may_finish(rc->fs, final))
        return keep_for_choice(rc, dir, final);
    say(rc, "%s: left by the interrupted making of %s%s", dir, final,
        rc->dry_run ? ""
        : finish    ? ": finished"
                    : ": removed");
    if (rc->dry_run)
        return 0;
    return finish ? dr_new_finish(rc->fs, dir, final, err) : dr_new_remove_all(rc->fs, dir, err);
}

static int private_dir(struct recover *rc, const char *dir, const char *of, struct dr_error *err)
{
    struct dr_dir_lock *lock;
    int r = dr_dir_lock(rc->fs, dir, &lock, NULL);
    if (r == -EBUSY) {
        rc->busy = true;
        remark(rc, "%s: somebody is making %s there: left alone", dir, of ? of : "an image");
        return 0;
    }
    if (r == -ENOENT) /* its maker has finished, or somebody else has recovered it */
        return 0;
    r = claimed_dir(rc, dir, of, err);
    dr_dir_unlock(lock);
    return r;
}

#define DIGITS 6 /* of a snapshot's number */

static bool has_digits(const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i] < '0' || p[i] > '9')
            return false;
    return true;
}

/* The length of "disk" in disk.vmdk and in disk-000001.vmdk. */
static size_t family_length(const char *name)
{
    const char *dot = strrchr(name, '.');
    size_t n = dot && dot != name ? (size_t)(dot - name) : strlen(name);
    if (n > DIGITS + 1 && name[n - DIGITS - 1] == '-' && has_digits(name + n - DIGITS, DIGITS))
        n -= DIGITS + 1;
    return n;
}

/* Is b the disk that a belongs to, one of its snapshots, or an extent of either? vm-100-disk-0.vmdk
 * has nothing to do with vm-101-disk-0.vmdk. */
static bool same_family(const char *a, const char *b)
{
    size_t n = family_length(a);
    if (strncmp(a, b, n) != 0)
        return false;
    const char *rest = b + n;
    if (rest[0] == '-' && strlen(rest) > DIGITS && has_digits(rest + 1, DIGITS)) {
        rest += DIGITS + 1;
        if (rest[0] == '-')
            return true;
    }
    if (strncmp(rest, "-flat", 5) == 0)
        rest += 5;
    else if ((strncmp(rest, "-s", 2) == 0 || strncmp(rest, "-f", 2) == 0) && strlen(rest) > 4 &&
             has_digits(rest + 2, 3))
        rest += 5;
    return rest[0] == 0 || (rest[0] == '.' && !strchr(rest + 1, '.'));
}

/* Files that stand beside an image under its name. */
static const char *const sides[] = {DR_BITMAP_FILE_SUFFIX, DR_FINGERPRINT_SUFFIX, ".sums"};
#define N_SIDES (sizeof(sides) / sizeof(sides[0]))

/* The length of the image's name in that of a file beside it. */
static size_t length_without_side(const char *name)
{
    size_t len = strlen(name);
    for (size_t i = 0; i < N_SIDES; i++) {
        size_t tail = strlen(sides[i]);
        if (len > tail && strcmp(name + len - tail, sides[i]) == 0)
            return len - tail;
    }
    return len;
}

/* Is it one of the image, or of a file beside it? *name is malloc'ed; NULL: it is neither. */
static int name_of_ours(const struct dr_aside *aside, const char *base, char **name)
{
    *name = NULL;
    for (size_t i = 0; i <= N_SIDES && !*name; i++) {
        CLEANUP_FREE char *one = NULL;
        if (asprintf(&one, "%s%s", base, i < N_SIDES ? sides[i] : "") < 0) {
            one = NULL;
            return -ENOMEM;
        }
        if (dr_aside_is_of(aside, one))
            *name = DR_STEAL(one);
    }
    return 0;
}

static const char *name_in(const struct dr_aside *aside, char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (dr_aside_is_of(aside, names[i]))
            return names[i];
    return NULL;
}

/* Whose is it? A cut name tells that only of names one has: ours, those beside us (names), and, of
 * a directory, those inside, where the main file has its full name. *of is malloc'ed, NULL = nobody
 * found. */
static int find_owner(struct recover *rc, const struct dr_aside *aside, const char *dir,
                      char *const *names, size_t n, char **of, struct dr_error *err)
{
    char **inside = NULL;
    size_t n_inside = 0;
    const char *found = NULL;
    int r = name_of_ours(aside, dr_path_basename(rc->path), of);
    if (r < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", rc->path);
    if (*of)
        return 0;
    r = dir ? dr_ops_list(rc->fs, dir, &inside, &n_inside, err) : 0;
    if (r < 0)
        return r;
    found = name_in(aside, inside, n_inside);
    if (!found)
        found = name_in(aside, names, n);
    *of = found ? strdup(found) : !aside->cut ? strndup(aside->stem, aside->stem_len) : NULL;
    bool lost = !*of && (found || !aside->cut);
    dr_ops_free_names(inside, n_inside);
    return lost ? dr_fail(err, ENOMEM, "%s: out of memory", rc->path) : 0;
}

/* Is the image in this private directory to become a child of ours? A snapshot may have a name that
 * has nothing of its parent's. The name of the parent that it records holds where the image would
 * have gone. */
static bool makes_our_child(struct recover *rc, const char *dir, const char *of)
{
    const unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK | DR_OPEN_RECORDED;
    CLEANUP_IMAGE struct dr_image *image = NULL;
    CLEANUP_FREE char *made = dr_path_join(dir, of), *final = dr_path_sibling(rc->path, of);
    struct dr_file_id ours, parent;
    if (!made || !final || dr_image_open(rc->fs, made, NULL, flags, &image, NULL) < 0 ||
        !image->backing_name)
        return false;
    CLEANUP_FREE char *backing = dr_ops_resolve(final, image->backing_name);
    return backing && dr_name_identify(rc->fs, backing, &parent, NULL) == 0 &&
           dr_name_identify(rc->fs, rc->path, &ours, NULL) == 0 && dr_same_id(ours, parent);
}

/* Also a file beside one of them is. */
static bool is_of_family(const char *ours, const char *name)
{
    CLEANUP_FREE char *image = strndup(name, length_without_side(name));
    return image && (strcmp(ours, image) == 0 || same_family(ours, image));
}

static int leftover(struct recover *rc, const char *name, char *const *names, size_t n,
                    struct dr_error *err)
{
    struct dr_aside aside;
    CLEANUP_FREE char *of = NULL;
    CLEANUP_FREE char *path = dr_path_sibling(rc->path, name);
    if (!path)
        return dr_fail(err, ENOMEM, "%s: out of memory", rc->path);
    bool dir = dr_aside_parse(name, DR_ASIDE_DIR, &aside);
    if (!dir && !dr_aside_parse(name, DR_ASIDE_FILE, &aside))
        return 0;
    CLEANUP_FREE char *stem = strndup(aside.stem, aside.stem_len);
    int r = stem ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rc->path);
    if (r == 0)
        r = find_owner(rc, &aside, dir ? path : NULL, names, n, &of, err);
    if (r < 0)
        return r == -ENOENT ? 0 : r; /* its maker has just finished */
    if (!is_of_family(dr_path_basename(rc->path), of ? of : stem) &&
        !(dir && of && makes_our_child(rc, path, of)))
        return 0;
    if (dir)
        return private_dir(rc, path, of, err);
    return of ? temporary_file(rc, path, err) : 0;
}

static int leftovers(struct recover *rc, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(rc->path);
    char **names = NULL;
    size_t n = 0;
    int r = dir ? dr_ops_list(rc->fs, dir, &names, &n, err)
                : dr_fail(err, ENOMEM, "%s: out of memory", rc->path);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n && r == 0; i++)
        r = leftover(rc, names[i], names, n, err);
    dr_ops_free_names(names, n);
    return r;
}

/* ------------------------------------------------------------------ images that were not closed */

/* Opening for writing mends the metadata. */
static int mend(struct recover *rc, const char *path, const char *format, struct dr_error *err)
{
    struct dr_image *image;
    unsigned flags = (rc->options.flags & (DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH)) | DR_OPEN_RDWR |
                     DR_OPEN_UNCHANGED;
    int r = dr_image_open(rc->fs, path, format, flags, &image, err);
    return r < 0 ? r : dr_image_unref(image, err);
}

static int teach_parent_id(struct recover *rc, const char *path, const char *format, uint32_t id,
                           struct dr_error *err)
{
    struct dr_image *image;
    unsigned flags = (rc->options.flags & (DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH)) | DR_OPEN_RDWR |
                     DR_OPEN_UNCHANGED;
    int r = dr_image_open(rc->fs, path, format, flags, &image, err);
    if (r < 0)
        return r;
    r = dr_image_begin(image, 0, false, err);
    if (r == 0)
        r = image->fmt->set_parent_id(image, id, err);
    int closed = dr_image_unref(image, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* What the writer changed last is not in its bitmaps, and cannot be known. */
static int settle_bitmaps(struct recover *rc, const char *path, const char *format,
                          struct dr_error *err)
{
    struct dr_image *image;
    unsigned flags = (rc->options.flags & DR_OPEN_ANY_PATH) | DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    say(rc, "%s%s: an interrupted writer had its bitmaps in use: they cannot be trusted%s", path,
        DR_BITMAP_FILE_SUFFIX, rc->dry_run ? "" : ", and say so now; rebuild or remove them");
    if (rc->dry_run)
        return 0;
    int r = dr_image_open(rc->fs, path, format, flags, &image, err);
    if (r < 0)
        return r;
    r = dr_bitmaps_settle(image, err);
    int closed = dr_image_unref(image, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

struct finding {
    char *path;
    const char *format;
    bool unclean, stale_id;
    bool in_use; /* a file of bitmaps says so of an image that is not */
    uint32_t id; /* the parent's */
};

static bool parent_moved_on(const struct dr_image *child, const struct dr_image *parent,
                            uint32_t *id)
{
    unsigned flag = DR_FORMAT_CONTENT_ID;
    if (!(child->fmt->flags & flag) || !(parent->fmt->flags & flag) || !parent->fmt->id ||
        !child->fmt->parent_id || !child->fmt->set_parent_id)
        return false;
    *id = parent->fmt->id(parent);
    return child->fmt->parent_id(child) != *id;
}

/* Collect the findings while the chain is open. Mending opens the images for writing, which the
 * locks of the open chain would refuse: it comes after closing. */
static size_t look(const struct recover *rc, const struct dr_chain *chain, struct finding *all)
{
    const bool alone = !(rc->options.flags & (DR_OPEN_NO_LOCK | DR_OPEN_FORCE_SHARE));
    size_t n = 0;
    for (size_t i = 0; i < chain->n; i++) {
        struct dr_image *image = chain->images[i];
        struct finding f = {.format = image->fmt->name, .unclean = image->unclean};
        if (i + 1 < chain->n)
            f.stale_id = parent_moved_on(image, chain->images[i + 1], &f.id);
        f.in_use = alone && dr_bitmaps_left_in_use(image);
        if (!f.unclean && !f.stale_id && !f.in_use)
            continue;
        f.path = strdup(image->path);
        if (f.path)
            all[n++] = f;
    }
    return n;
}

static int settle(struct recover *rc, const struct finding *f, struct dr_error *err)
{
    const char *done = rc->dry_run ? "" : ": mended";
    int r = 0;
    if (f->unclean) {
        say(rc, "%s: was not closed after writing%s", f->path, done);
        if (!rc->dry_run)
            r = mend(rc, f->path, f->format, err);
    }
    if (f->stale_id && r == 0) {
        say(rc, "%s: a commit into its parent was interrupted; the disk reads as before%s", f->path,
            rc->dry_run ? "" : ", its record of the parent is mended, commit again to finish");
        if (!rc->dry_run)
            r = teach_parent_id(rc, f->path, f->format, f->id, err);
    }
    return r == 0 && f->in_use ? settle_bitmaps(rc, f->path, f->format, err) : r;
}

static int images(struct recover *rc, struct dr_error *err)
{
    struct dr_disk *disk;
    struct dr_open_options open = rc->options;
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    int r = dr_open_fs(rc->fs, rc->path, &open, &disk, err);
    if (r < 0)
        return r;
    struct finding *all = calloc(disk->chain->n, sizeof(*all));
    size_t n = all ? look(rc, disk->chain, all) : 0;
    r = dr_close(disk, err);
    if (!all)
        return dr_fail(err, ENOMEM, "%s: out of memory", rc->path);
    for (size_t i = n; i-- > 0;) { /* parents first */
        if (r == 0)
            r = settle(rc, &all[i], err);
        free(all[i].path);
    }
    free(all);
    return r;
}

int dr_recover_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                  bool dry_run, void (*report)(void *user, const char *line), void *user,
                  unsigned *found, struct dr_error *err)
{
    struct recover rc = {
        .fs = fs, .path = path, .dry_run = dry_run, .report = report, .user = user};
    struct dr_file_id id;
    if (options)
        rc.options = *options;
    int r = leftovers(&rc, err);
    /* Of a disk that is not finished only its private directory can be there. */
    bool gone = r == 0 && (rc.found > 0 || rc.busy) &&
                fs->ops->identify(fs, path, &id, NULL) == -ENOENT;
    if (r == 0 && !gone)
        r = images(&rc, err);
    if (r == 0 && rc.kept && !dry_run)
        r = dr_fail(err, ENOTEMPTY,
                    "%s: holds files of an image that was being made or replaced, and may be all "
                    "that is left of it: move what is needed out of it, then remove it",
                    rc.kept);
    free(rc.kept);
    if (found)
        *found = rc.found;
    return r;
}

int dr_recover(const char *path, const struct dr_open_options *options, bool dry_run,
               void (*report)(void *user, const char *line), void *user, unsigned *found,
               struct dr_error *err)
{
    DR_REQUIRE(path, err);
    return dr_recover_fs(dr_fs_posix(), path, options, dry_run, report, user, found, err);
}
