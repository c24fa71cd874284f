/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening chains: which names are followed, loops, depth, parents of other sizes. Through a driver
 * whose images are one line of text, "LINK size parent [format]", and which holds nothing itself.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "core/internal.h"

/* ------------------------------------------------------------------ the driver */

static int link_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    return len >= 5 && memcmp(buf, "LINK ", 5) == 0 ? 100 : 0;
}

static int link_open(struct dr_image *image, struct dr_error *err)
{
    char text[512] = "", parent[256] = "", format[32] = "";
    unsigned long long size;
    int r = dr_file_pread_short(image->files[0], text, 0, sizeof(text) - 1, NULL, err);
    if (r < 0)
        return r;
    int n = sscanf(text, "LINK %llu %255s %31s", &size, parent, format);
    if (n < 1)
        return dr_fail(err, EINVAL, "%s: no size", image->path);
    image->size = size;
    if (n >= 2 && strcmp(parent, "-") != 0)
        image->backing_name = strdup(parent);
    if (n >= 3)
        image->backing_format = strdup(format);
    return 0;
}

static uint64_t map_at_most; /* bytes that one call of map tells of; 0 = all */
static unsigned n_maps;

static int link_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                    struct dr_error *err)
{
    (void)image, (void)off, (void)err;
    n_maps++;
    *ext = (struct dr_extent){.kind = DR_HOLE, .len = map_at_most ? dr_min(map_at_most, len) : len};
    return 0;
}

static const struct dr_format link_format = {
    .name = "link",
    .flags = DR_FORMAT_BACKING,
    .probe = link_probe,
    .open = link_open,
    .map = link_map,
};

/* ------------------------------------------------------------------ a directory */

static char top[] = "/tmp/drover-chain-XXXXXX";

static const char *at(const char *name)
{
    static char paths[8][512];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof(paths[0]), "%s/%s", top, name);
    return path;
}

static void make_bytes(const char *name, const void *bytes, size_t len)
{
    FILE *f = fopen(at(name), "we");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

static void make(const char *name, const char *text)
{
    make_bytes(name, text, strlen(text));
}

static void make_raw(const char *name, uint8_t byte, size_t len)
{
    uint8_t *bytes = malloc(len);
    memset(bytes, byte, len);
    make_bytes(name, bytes, len);
    free(bytes);
}

static int setup(void **state)
{
    (void)state;
    strcpy(top + strlen(top) - 6, "XXXXXX");
    unsetenv("DROVER_ALLOW_PATH");
    dr_format_register(&link_format);
    return mkdtemp(top) && mkdir(at("own"), 0755) == 0 && mkdir(at("other"), 0755) == 0 ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    char command[600];
    dr_format_register(NULL);
    map_at_most = 0;
    snprintf(command, sizeof(command), "rm -rf '%s'", top);
    return system(command) == 0 ? 0 : -1;
}

static struct dr_error last;

static int try_open(const char *path, const struct dr_open_options *options)
{
    struct dr_disk *disk;
    dr_error_reset(&last);
    int r = dr_open(path, options, &disk, &last);
    if (r == 0)
        dr_close(disk, NULL);
    return r;
}

static void assert_said(const char *words)
{
    if (!strstr(last.text, words))
        fail_msg("\"%s\" does not say \"%s\"", last.text, words);
}

/* ------------------------------------------------------------------ the gate */

static void a_parent_in_the_same_tree_is_opened(void **state)
{
    (void)state;
    mkdir(at("own/deeper"), 0755);
    make_raw("own/deeper/base", 0x11, 4096);
    make("own/top", "LINK 4096 deeper/base raw");
    assert_int_equal(try_open(at("own/top"), NULL), 0);
}

static void a_parent_elsewhere_is_refused_and_the_text_says_how_to_allow_it(void **state)
{
    (void)state;
    make_raw("other/base", 0x11, 4096);
    make("own/top", "LINK 4096 ../other/base raw");
    assert_int_equal(try_open(at("own/top"), NULL), -EACCES);
    assert_said("--allow-path");
    assert_said("/other/base");
    const char *allow[] = {at("other"), NULL};
    struct dr_open_options options = {.allow_paths = allow};
    assert_int_equal(try_open(at("own/top"), &options), 0);
    options = (struct dr_open_options){.flags = DR_OPEN_ANY_PATH};
    assert_int_equal(try_open(at("own/top"), &options), 0);
}

static void the_environment_allows_directories(void **state)
{
    (void)state;
    char list[1200];
    make_raw("other/base", 0x11, 4096);
    make("own/top", "LINK 4096 ../other/base raw");
    snprintf(list, sizeof(list), "/nonexistent:%s", at("other"));
    setenv("DROVER_ALLOW_PATH", list, 1);
    assert_int_equal(try_open(at("own/top"), NULL), 0);
}

static void a_link_does_not_lead_out(void **state)
{
    (void)state;
    make_raw("other/secret", 0x11, 4096);
    assert_int_equal(symlink(at("other/secret"), at("own/base")), 0);
    make("own/top", "LINK 4096 base raw");
    assert_int_equal(try_open(at("own/top"), NULL), -EACCES);
    assert_said("/other/secret");
}

static void a_name_that_only_begins_like_the_directory_is_outside(void **state)
{
    (void)state;
    mkdir(at("own2"), 0755);
    make_raw("own2/base", 0x11, 4096);
    make("own/top", "LINK 4096 ../own2/base raw");
    assert_int_equal(try_open(at("own/top"), NULL), -EACCES);
}

static void a_linked_image_finds_its_parent_beside_the_real_file(void **state)
{
    (void)state;
    make_raw("own/base", 0x11, 4096);
    char text[600];
    snprintf(text, sizeof(text), "LINK 4096 %s raw", at("own/base"));
    make("own/top", text);
    assert_int_equal(symlink(at("own/top"), at("other/top")), 0);
    assert_int_equal(try_open(at("other/top"), NULL), 0);
}

static void a_raw_parent_is_never_taken_for_something_else(void **state)
{
    (void)state;
    make("own/secret", "LINK 4096");
    make("own/base", "LINK 4096 secret link"); /* written by the guest into its raw disk */
    make("own/top", "LINK 4096 base raw");
    struct dr_disk *disk;
    assert_int_equal(dr_open(at("own/top"), NULL, &disk, NULL), 0);
    assert_int_equal(dr_chain_length(disk), 2);
    assert_string_equal(dr_image_format(disk, 1), "raw");
    dr_close(disk, NULL);
    make("own/top", "LINK 4096 base");
    assert_int_equal(try_open(at("own/top"), NULL), -EINVAL);
    assert_said("format");
}

/* ------------------------------------------------------------------ shape */

static void loops_are_refused(void **state)
{
    (void)state;
    make("own/a", "LINK 4096 b link");
    make("own/b", "LINK 4096 c link");
    make("own/c", "LINK 4096 a link");
    assert_int_equal(try_open(at("own/a"), NULL), -ELOOP);
    assert_said("loop");
    make("own/self", "LINK 4096 self link");
    assert_int_equal(try_open(at("own/self"), NULL), -ELOOP);
}

static void the_depth_is_bounded(void **state)
{
    (void)state;
    char name[32], text[64];
    enum { BOUND = 300 };
    for (int i = 0; i <= BOUND; i++) {
        snprintf(name, sizeof(name), "own/i%d", i);
        snprintf(text, sizeof(text), "LINK 4096 i%d link", i + 1);
        make(name, i == BOUND ? "LINK 4096" : text);
    }
    assert_int_equal(try_open(at("own/i0"), NULL), 0);
    dr_chain_set_bound(BOUND);
    assert_int_equal(try_open(at("own/i0"), NULL), -ELOOP);
    assert_said("longer than 300 images");
    assert_said("commit or stream");
    assert_int_equal(try_open(at("own/i1"), NULL), 0);
    dr_chain_set_bound(0);
}

static void a_missing_parent_is_named(void **state)
{
    (void)state;
    make("own/top", "LINK 4096 gone raw");
    assert_int_equal(try_open(at("own/top"), NULL), -ENOENT);
    assert_said("gone");
    struct dr_open_options options = {.flags = DR_OPEN_NO_BACKING};
    assert_int_equal(try_open(at("own/top"), &options), 0);
}

static void assert_bytes(struct dr_disk *disk, uint64_t off, size_t len, uint8_t byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    assert_int_equal(dr_pread(disk, buf, off, len, &last), 0);
    for (size_t i = 0; i < len; i++)
        if (buf[i] != byte)
            fail_msg("byte %zu is %02x, expected %02x", (size_t)off + i, buf[i], byte);
}

/* A longer grandparent must not shine through behind the end of a shorter parent. */
static void past_a_shorter_parent_there_are_zeros(void **state)
{
    (void)state;
    make_raw("own/base", 0x11, 16384);
    make("own/mid", "LINK 4608 base raw");
    make("own/top", "LINK 20000 mid link");
    struct dr_disk *disk;
    struct dr_extent_status status;
    assert_int_equal(dr_open(at("own/top"), NULL, &disk, NULL), 0);
    assert_bytes(disk, 0, 4608, 0x11);
    assert_bytes(disk, 4608, 20000 - 4608, 0);
    assert_int_equal(dr_block_status(disk, 0, 20000, &status, NULL), 0);
    assert_int_equal(status.len, 4608);
    assert_int_equal(status.depth, 2);
    assert_int_equal(dr_block_status(disk, 4608, 20000 - 4608, &status, NULL), 0);
    assert_int_equal(status.len, 20000 - 4608);
    assert_int_equal(status.flags, DR_EXTENT_ZERO);
    assert_int_equal(status.depth, 0);
    dr_close(disk, NULL);
}

static void ranges_outside_the_disk_are_refused(void **state)
{
    (void)state;
    make_raw("own/base", 0x11, 5000);
    struct dr_disk *disk;
    uint8_t buf[16];
    struct dr_extent_status status;
    assert_int_equal(dr_open(at("own/base"), NULL, &disk, NULL), 0);
    assert_int_equal(dr_pread(disk, buf, 4992, 8, NULL), 0);
    assert_int_equal(dr_pread(disk, buf, 4992, 9, NULL), -EINVAL);
    assert_int_equal(dr_pread(disk, buf, UINT64_MAX - 4, 8, NULL), -EINVAL);
    assert_int_equal(dr_pread(disk, buf, 5000, 0, NULL), 0);
    assert_int_equal(dr_block_status(disk, 5000, 1, &status, NULL), -EINVAL);
    assert_int_equal(dr_pwrite(disk, buf, 0, 1, 0, NULL), -EROFS);
    dr_close(disk, NULL);
}

/* They belong to the disk: asked again the same text comes, and all go with it. */
static void texts_that_are_handed_out_are_kept_once(void **state)
{
    (void)state;
    enum { LAYERS = 300 };
    const char *paths[LAYERS];
    struct dr_disk *disk;
    char name[32], text[64];
    for (int i = 0; i < LAYERS; i++) {
        snprintf(name, sizeof(name), "own/l%d", i);
        snprintf(text, sizeof(text), "LINK 4096 l%d link", i - 1);
        if (i == 0)
            strcpy(text, "LINK 4096");
        make(name, text);
    }
    assert_int_equal(dr_open(at(name), NULL, &disk, NULL), 0);
    assert_int_equal(dr_chain_length(disk), LAYERS);
    for (size_t i = 0; i < LAYERS; i++)
        paths[i] = dr_image_path(disk, i);
    for (size_t i = 0; i < LAYERS; i++) {
        snprintf(name, sizeof(name), "own/l%zu", LAYERS - 1 - i);
        assert_string_equal(paths[i], at(name));
        assert_ptr_equal(dr_image_path(disk, i), paths[i]);
    }
    dr_close(disk, NULL);
}

/* A disk in small pieces would hold up every change of the chain for as long as it takes to join
 * all of them. */
static void the_status_of_a_disk_in_many_pieces_is_told_in_parts(void **state)
{
    (void)state;
    make("own/top", "LINK 1073741824");
    struct dr_disk *disk;
    struct dr_extent_status status;
    uint64_t size = 1 << 30;
    assert_int_equal(dr_open(at("own/top"), NULL, &disk, NULL), 0);
    map_at_most = 512;
    for (uint64_t off = 0; off < size; off += 300 << 20) {
        n_maps = 0;
        assert_int_equal(dr_block_status(disk, off, size - off, &status, NULL), 0);
        assert_int_equal(status.off, off);
        assert_int_equal(status.flags, DR_EXTENT_ZERO);
        assert_int_equal(status.len, n_maps * map_at_most); /* pieces are joined, but not all */
        assert_in_range(n_maps, 2, 10000);
    }
    assert_int_equal(dr_block_status(disk, 1024, 2048, &status, NULL), 0);
    assert_int_equal(status.len, 2048); /* no more than was asked for */
    dr_close(disk, NULL);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_parent_in_the_same_tree_is_opened),
        T(a_parent_elsewhere_is_refused_and_the_text_says_how_to_allow_it),
        T(the_environment_allows_directories),
        T(a_link_does_not_lead_out),
        T(a_name_that_only_begins_like_the_directory_is_outside),
        T(a_linked_image_finds_its_parent_beside_the_real_file),
        T(a_raw_parent_is_never_taken_for_something_else),
        T(loops_are_refused),
        T(the_depth_is_bounded),
        T(a_missing_parent_is_named),
        T(past_a_shorter_parent_there_are_zeros),
        T(ranges_outside_the_disk_are_refused),
        T(texts_that_are_handed_out_are_kept_once),
        T(the_status_of_a_disk_in_many_pieces_is_told_in_parts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
