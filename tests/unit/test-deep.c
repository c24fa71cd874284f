/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Long chains: no operation makes one that nothing opens. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/core.h"
#include "drover/ops.h"
#include "ops/ops-internal.h"
#include "outcome.h"

#define MIB (UINT64_C(1) << 20)

static int setup(void **state)
{
    *state = dr_fs_memory_new();
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    dr_chain_set_bound(0);
    dr_fs_memory_free(*state);
    return 0;
}

static const char *layer(unsigned i)
{
    static char names[4][32];
    char *name = names[i % 4];
    snprintf(name, sizeof(names[0]), "dir/l%u.vmdk", i);
    return name;
}

static int create(struct dr_fs *fs, const char *path, const char *backing, struct dr_error *err)
{
    struct dr_create_options o = {
        .format = "vmdk", .size = MIB, .has_size = true, .backing = backing};
    return dr_create_fs(fs, path, &o, err);
}

/* l0 is the lowest, l(n-1) the top. */
static void make_layers(struct dr_fs *fs, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        char below[32];
        snprintf(below, sizeof(below), "l%u.vmdk", i - 1);
        ok(create(fs, layer(i), i ? below : NULL, &err));
    }
}

static void assert_too_long(int r, const struct dr_error *err)
{
    assert_int_equal(r, -ELOOP);
    if (!strstr(err->text, "longer than 5 images") || !strstr(err->text, "commit or stream"))
        fail_msg("\"%s\" does not say what is wrong and what to do", err->text);
}

static void assert_opens(struct dr_fs *fs, const char *path)
{
    struct dr_disk *disk;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    ok(dr_close(disk, &err));
}

static void assert_missing(struct dr_fs *fs, const char *path)
{
    struct dr_file_id id;
    assert_int_equal(fs->ops->identify(fs, path, &id, NULL), -ENOENT);
}

/* ------------------------------------------------------------------ at the bound */

static void a_snapshot_of_the_longest_chain_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_error why = DR_ERROR_INIT;
    char *active = NULL;
    make_layers(fs, 4);
    dr_chain_set_bound(5);
    ok(dr_snapshot_create_fs(fs, layer(3), "l4.vmdk", NULL, &active, &err));
    free(active);
    assert_too_long(dr_snapshot_create_fs(fs, layer(4), "l5.vmdk", NULL, NULL, &why), &why);
    assert_missing(fs, layer(5));
    assert_opens(fs, layer(4));
}

static void an_image_on_the_longest_chain_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_error why = DR_ERROR_INIT;
    make_layers(fs, 5);
    dr_chain_set_bound(5);
    assert_too_long(create(fs, layer(5), "l4.vmdk", &why), &why);
    assert_missing(fs, layer(5));
    ok(create(fs, layer(5), "l3.vmdk", &err));
    assert_opens(fs, layer(5));
}

static void a_rebase_onto_the_longest_chain_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    make_layers(fs, 5);
    ok(create(fs, "dir/top.vmdk", "l0.vmdk", &err));
    dr_chain_set_bound(5);
    for (int unsafe = 0; unsafe < 2; unsafe++) {
        struct dr_error why = DR_ERROR_INIT;
        struct dr_rebase_options o = {.backing = "l4.vmdk", .unsafe = unsafe};
        assert_too_long(dr_rebase_fs(fs, "dir/top.vmdk", &o, NULL, &why), &why);
        assert_opens(fs, "dir/top.vmdk");
        o.backing = "l3.vmdk";
        ok(dr_rebase_fs(fs, "dir/top.vmdk", &o, NULL, &err));
        assert_opens(fs, "dir/top.vmdk");
    }
}

static void a_conversion_onto_the_longest_chain_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_error why = DR_ERROR_INIT;
    const char *sources[] = {layer(0), NULL};
    make_layers(fs, 5);
    dr_chain_set_bound(5);
    struct dr_convert_options o = {.out_format = "vmdk", .backing = "l4.vmdk"};
    assert_too_long(dr_convert_fs(fs, sources, 1, "dir/copy.vmdk", &o, NULL, &why), &why);
    assert_missing(fs, "dir/copy.vmdk");
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_snapshot_of_the_longest_chain_is_refused),
        T(an_image_on_the_longest_chain_is_refused),
        T(a_rebase_onto_the_longest_chain_is_refused),
        T(a_conversion_onto_the_longest_chain_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
