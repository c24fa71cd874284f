/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A set of files gets its names: in which order, and what a failure leaves. A letter says which
 * file it is: capital letters are old ones. */
#include "core/publish.h"
#include "faultfs.h"
#include "test-ops.h"

#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

struct rig {
    struct dr_fs *memory, *fs;
    struct faultfs *faults;
    char steps[1024]; /* what dr_publish did */
};

static int rig_up(void **state)
{
    struct rig *g = calloc(1, sizeof(*g));
    g->memory = dr_fs_memory_new();
    g->faults = faultfs_new(g->memory);
    g->fs = faultfs_fs(g->faults);
    *state = g;
    return 0;
}

static int rig_down(void **state)
{
    struct rig *g = *state;
    faultfs_free(g->faults);
    dr_fs_memory_free(g->memory);
    free(g);
    return 0;
}

static void put_letter(struct rig *g, const char *path, char letter)
{
    struct dr_file *f;
    ok(dr_file_open(g->memory, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, &letter, 0, 1, &err));
    dr_file_unref(f);
}

/* '-' = there is no such file. */
static char letter_at(struct rig *g, const char *path)
{
    struct dr_file *f;
    char letter = '?';
    if (dr_file_open(g->memory, path, 0, &f, NULL) < 0)
        return '-';
    ok(dr_file_pread(f, &letter, 0, 1, &err));
    dr_file_unref(f);
    return letter;
}

static void remove_all(struct rig *g)
{
    const char *all[] = {"/d/a", "/d/b", "/d/a-1", "/d/w/a", "/d/w/b", "/d/w/a-1", "/d/w/.a"};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
        g->memory->ops->unlink(g->memory, all[i], NULL);
}

/* The new file of this name, made in w; what has the name now may give way. */
static void add(struct rig *g, struct dr_publish *p, const char *name, bool part)
{
    char from[32], to[32], aside[32];
    struct dr_publish_file f = {.from = from, .to = to, .aside = part ? NULL : aside, .part = part};
    snprintf(from, sizeof(from), "/d/w/%s", name);
    snprintf(to, sizeof(to), "/d/%s", name);
    snprintf(aside, sizeof(aside), "/d/w/.%s", name);
    f.replaces = g->memory->ops->identify(g->memory, to, &f.old, NULL) == 0;
    if (letter_at(g, from) != '-')
        ok(dr_publish_add(p, &f, &err));
}

static struct dr_publish image(struct rig *g)
{
    struct dr_publish p = {.fs = g->fs, .durable = true};
    add(g, &p, "a", false);
    add(g, &p, "a-1", true);
    return p;
}

static void make_new(struct rig *g)
{
    put_letter(g, "/d/w/a", 'm');
    put_letter(g, "/d/w/a-1", 'p');
}

static void make_old(struct rig *g)
{
    put_letter(g, "/d/a", 'M');
    put_letter(g, "/d/a-1", 'P');
}

static int note_step(void *user, const struct faultfs_io *io)
{
    struct rig *g = user;
    size_t n = strlen(g->steps);
    const char *what = faultfs_kind_name(io->kind);
    snprintf(g->steps + n, sizeof(g->steps) - n, "%s %s%s%s\n", what, io->path, io->to ? " " : "",
             io->to ? io->to : "");
    return 0;
}

static void publish(struct rig *g, bool durable)
{
    struct dr_publish p = image(g);
    p.durable = durable;
    faultfs_observe(g->faults, note_step, g);
    ok(dr_publish(&p, &err));
    assert_int_equal(p.state, DR_PUBLISH_DONE);
    assert_int_equal(letter_at(g, "/d/a"), 'm');
    assert_int_equal(letter_at(g, "/d/a-1"), 'p');
    dr_publish_end(&p);
}

static void parts_get_their_names_before_the_file_that_names_them(void **state)
{
    struct rig *g = *state;
    make_new(g);
    publish(g, true);
    assert_string_equal(g->steps, "rename /d/w/a-1 /d/a-1\n"
                                  "sync_dir /d/a-1\n"
                                  "rename /d/w/a /d/a\n"
                                  "sync_dir /d/a\n");
}

static void the_old_main_file_is_aside_while_parts_change_hands(void **state)
{
    struct rig *g = *state;
    make_new(g);
    make_old(g);
    publish(g, true);
    assert_string_equal(g->steps, "rename /d/a /d/w/.a\n"
                                  "sync_dir /d/w/.a\n"
                                  "sync_dir /d/a\n"
                                  "rename /d/w/a-1 /d/a-1\n"
                                  "sync_dir /d/a-1\n"
                                  "rename /d/w/a /d/a\n"
                                  "sync_dir /d/a\n"
                                  "unlink /d/w/.a\n");
}

static void without_old_parts_the_main_file_is_replaced_at_once(void **state)
{
    struct rig *g = *state;
    make_new(g);
    put_letter(g, "/d/a", 'M');
    publish(g, false);
    assert_string_equal(g->steps, "rename /d/w/a-1 /d/a-1\n"
                                  "rename /d/w/a /d/a\n");
}

/* All is as before, or as wanted, or what is left can be finished and no main file shows. */
static void check_failed(struct rig *g, enum dr_publish_state is)
{
    switch (is) {
    case DR_PUBLISH_UNDONE:
        assert_int_equal(letter_at(g, "/d/a"), 'M');
        assert_int_equal(letter_at(g, "/d/a-1"), 'P');
        assert_int_equal(letter_at(g, "/d/w/a"), 'm');
        assert_int_equal(letter_at(g, "/d/w/a-1"), 'p');
        break;
    case DR_PUBLISH_STUCK:
        assert_int_equal(letter_at(g, "/d/a"), '-');
        assert_int_equal(letter_at(g, "/d/w/.a"), 'M');
        break;
    case DR_PUBLISH_DONE:
        assert_int_equal(letter_at(g, "/d/a"), 'm');
        assert_int_equal(letter_at(g, "/d/a-1"), 'p');
        return;
    }
    struct dr_publish p = image(g);
    ok(dr_publish(&p, &err));
    dr_publish_end(&p);
    check_failed(g, DR_PUBLISH_DONE);
    assert_int_equal(letter_at(g, "/d/w/.a"), '-');
}

static void fail_each_step(struct rig *g, bool for_good, unsigned seen[3])
{
    bool fired = true;
    for (uint64_t i = 0; fired; i++) {
        remove_all(g);
        make_new(g);
        make_old(g);
        struct dr_publish p = image(g);
        faultfs_arm(g->faults, &(struct faultfs_plan){.nth = i, .for_good = for_good});
        int r = dr_publish(&p, NULL);
        fired = faultfs_fired(g->faults);
        faultfs_disarm(g->faults);
        /* The old main file may also stay behind: nobody needs it. */
        assert_true(r < 0 || p.state == DR_PUBLISH_DONE);
        seen[p.state]++;
        if (r < 0)
            check_failed(g, p.state);
        dr_publish_end(&p);
    }
}

static void a_failure_leaves_the_old_files_or_what_can_be_finished(void **state)
{
    unsigned once[3] = {0}, for_good[3] = {0};
    fail_each_step(*state, false, once);
    fail_each_step(*state, true, for_good);
    /* Steps 1 to 4 can be undone, 5 and 6 come after an old part is gone, 7 is the last sync, 8 the
     * removal of the old main file. When nothing works any more 2 to 4 cannot be undone. */
    assert_int_equal(once[DR_PUBLISH_UNDONE], 4);
    assert_int_equal(once[DR_PUBLISH_STUCK], 2);
    assert_int_equal(once[DR_PUBLISH_DONE], 3);
    assert_int_equal(for_good[DR_PUBLISH_UNDONE], 1);
    assert_int_equal(for_good[DR_PUBLISH_STUCK], 5);
}

static void a_file_that_came_meanwhile_is_not_replaced(void **state)
{
    struct rig *g = *state;
    make_new(g);
    struct dr_publish p = image(g);
    put_letter(g, "/d/a", 'X');
    refused(dr_publish(&p, &err), EEXIST, "/d/a: exists by now");
    assert_int_equal(p.state, DR_PUBLISH_UNDONE);
    dr_publish_end(&p);
    p = image(g); /* a may be replaced now, but not by another file than this one */
    ok(g->memory->ops->unlink(g->memory, "/d/a", &err));
    put_letter(g, "/d/a", 'Y');
    refused(dr_publish(&p, &err), ESTALE, "/d/a: was replaced");
    assert_int_equal(p.state, DR_PUBLISH_UNDONE);
    assert_int_equal(letter_at(g, "/d/a"), 'Y');
    assert_int_equal(letter_at(g, "/d/a-1"), '-');
    ok(g->memory->ops->unlink(g->memory, "/d/a", &err)); /* and a file that is gone does no harm */
    ok(dr_publish(&p, &err));
    dr_publish_end(&p);
}

static void what_an_earlier_attempt_put_aside_is_not_lost(void **state)
{
    struct rig *g = *state;
    make_new(g);
    put_letter(g, "/d/w/.a", 'M');
    put_letter(g, "/d/a", 'X');
    struct dr_publish p = image(g);
    refused(dr_publish(&p, &err), EEXIST, "/d/w/.a");
    dr_publish_end(&p);
    assert_int_equal(letter_at(g, "/d/a"), 'X');
    assert_int_equal(letter_at(g, "/d/w/.a"), 'M');
}

/* Two images of one file each: when the first has replaced its predecessor there is no way back. */
static void after_an_old_main_file_is_replaced_the_rest_is_kept(void **state)
{
    struct rig *g = *state;
    struct dr_publish p = {.fs = g->fs, .durable = true};
    put_letter(g, "/d/w/a", 'm');
    put_letter(g, "/d/w/b", 'n');
    put_letter(g, "/d/a", 'M');
    put_letter(g, "/d/b", 'N');
    add(g, &p, "a", false);
    add(g, &p, "b", false);
    faultfs_arm(g->faults, &(struct faultfs_plan){.nth = 1, .kinds = 1u << FAULTFS_RENAME});
    refused(dr_publish(&p, &err), EIO, "/d/w/b");
    assert_int_equal(p.state, DR_PUBLISH_STUCK);
    assert_int_equal(letter_at(g, "/d/a"), 'm');
    assert_int_equal(letter_at(g, "/d/b"), 'N');
    assert_int_equal(letter_at(g, "/d/w/b"), 'n');
    dr_publish_end(&p);
}

/* A relative link leads nowhere while it is aside. */
static void an_old_name_that_is_a_link_is_put_aside_and_removed(void **state)
{
    (void)state;
    char dir[] = "/tmp/drover-publish-XXXXXX";
    const char *made[] = {"real", "a-1", "w/a", "w/a-1"};
    assert_non_null(mkdtemp(dir));
    assert_int_equal(chdir(dir), 0);
    assert_int_equal(mkdir("w", 0700), 0);
    for (size_t i = 0; i < 4; i++)
        put_letter(&(struct rig){.memory = dr_fs_posix()}, made[i], 'x');
    assert_int_equal(symlink("real", "a"), 0);
    struct dr_publish_file files[] = {
        {.from = "w/a", .to = "a", .aside = "w/.a", .replaces = true},
        {.from = "w/a-1", .to = "a-1", .part = true, .replaces = true}};
    struct dr_publish p = {.fs = dr_fs_posix(), .no_follow = true, .files = files, .n = 2};
    for (size_t i = 0; i < 2; i++)
        ok(dr_look(p.fs, files[i].to, NULL, &files[i].old, &err));
    ok(dr_publish(&p, &err));
    assert_int_equal(rmdir("w"), 0); /* nothing is left in it */
    assert_int_equal(unlink("a") + unlink("a-1") + unlink("real"), 0);
    assert_int_equal(chdir("/") + rmdir(dir), 0);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_up, rig_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(parts_get_their_names_before_the_file_that_names_them),
        T(the_old_main_file_is_aside_while_parts_change_hands),
        T(without_old_parts_the_main_file_is_replaced_at_once),
        T(a_failure_leaves_the_old_files_or_what_can_be_finished),
        T(a_file_that_came_meanwhile_is_not_replaced),
        T(what_an_earlier_attempt_put_aside_is_not_lost),
        T(after_an_old_main_file_is_replaced_the_rest_is_kept),
        cmocka_unit_test(an_old_name_that_is_a_link_is_put_aside_and_removed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
