/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Amending a VMDK: cut off or failing anywhere, all of it was done or nothing. */
#include "drover/ops.h"
#include "ops/ops-internal.h"
#include "powerfs.h"
#include "test-vmdk.h"

#define PATH "/d/a.vmdk"

static int amend_in(struct dr_fs *fs, const struct dr_pair *pairs, size_t n)
{
    const struct dr_amend_options o = {.pairs = pairs, .n_pairs = n};
    return dr_amend_fs(fs, PATH, &o, NULL, &err);
}

static const struct dr_pair sparse[] = {
    {"adapter_type", "lsilogic"}, {"hwversion", "13"}, {"toolsversion", "10309"}};
static const struct dr_pair flat[] = {{"subformat", "vmfs"}, {"adapter_type", "buslogic"}};

/* The descriptor's text, malloc'ed, without the zeros behind it. */
static char *text_of(struct dr_fs *fs)
{
    struct dr_image *image = NULL;
    ok(dr_image_open(fs, PATH, "vmdk", 0, &image, &err));
    char *text = strdup(vmdk_of(image)->desc.text);
    ok(dr_image_unref(image, &err));
    return text;
}

static void cut_everywhere(const char *subformat, const struct dr_pair *pairs, size_t n)
{
    struct powerfs *p = powerfs_new();
    ok(create_in(powerfs_fs(p), PATH, 2 * MIB, subformat, NULL, NULL));
    powerfs_settle(p);
    CLEANUP_FREE char *before = text_of(powerfs_fs(p));
    ok(amend_in(powerfs_fs(p), pairs, n));
    CLEANUP_FREE char *after = text_of(powerfs_fs(p));
    assert_string_not_equal(before, after);
    for (size_t k = 0; k <= powerfs_ops(p); k++)
        for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
            struct dr_fs *disk = powerfs_cut(p, k, (enum powerfs_mode)mode, k);
            CLEANUP_FREE char *now = text_of(disk);
            if (strcmp(now, before) != 0 && strcmp(now, after) != 0)
                fail_msg("%s, cut after %zu, mode %u: %s", subformat, k, mode, now);
            if (k == powerfs_ops(p))
                assert_string_equal(now, after);
            ok(amend_in(disk, pairs, n));
            CLEANUP_FREE char *done = text_of(disk);
            assert_string_equal(done, after);
            dr_fs_memory_free(disk);
        }
    powerfs_free(p);
}

static void a_cut_leaves_the_old_text_or_the_new_one(void **state)
{
    (void)state;
    cut_everywhere("monolithicSparse", sparse, 3);
    cut_everywhere("twoGbMaxExtentSparse", sparse, 3);
    cut_everywhere("monolithicFlat", flat, 2);
}

/* A descriptor of one sector, as some programs make it, right in front of the directory. */
static void a_text_that_does_not_fit_is_refused_before_it_changes(void **state)
{
    (void)state;
    uint8_t before[2048], after[2048], one = 1;
    ok(create(PATH, MIB, NULL));
    poke(PATH, 36, &one, 1); /* descriptorSize */
    CLEANUP_FREE char *text = text_of(mem);
    char comment[] =
        "# somebody has written all this into it, which takes much of the space it has\n";
    poke(PATH, 512 + strlen(text), comment, strlen(comment));
    peek(PATH, 0, before, sizeof(before));
    const struct dr_pair pairs[] = {
        {"hwversion", "a value that is so long that the text gets longer than a sector"}};
    const struct dr_pair more[] = {pairs[0], {"toolsversion", pairs[0].value}};
    fails(ENOSPC, "room", amend_in(mem, more, 2));
    peek(PATH, 0, after, sizeof(after));
    assert_memory_equal(before, after, sizeof(before));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_cut_leaves_the_old_text_or_the_new_one),
        T(a_text_that_does_not_fit_is_refused_before_it_changes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
