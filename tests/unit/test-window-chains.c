/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Chains of more layers than the process may have descriptors: everything works on them. */
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/core.h"
#include "drover/ops.h"
#include "place.h"

#define LIMIT  256 /* descriptors that the process may have */
#define DEPTH  1000
#define DEEPER 4096
#define UNIT   65536u
#define SIZE   ((uint64_t)DEEPER * UNIT)

/* A chain of which some layers have bytes: layer i has the number i + 1 at the beginning of unit i.
 */
struct chain {
    const char *format;
    unsigned depth, every; /* each layer whose number this divides */
    char top[160];
    struct place *place;
    struct rlimit limit;
};

static const char *layer(const struct chain *c, unsigned i)
{
    static char paths[4][160];
    char *path = paths[i % 4];
    snprintf(path, sizeof(paths[0]), "%s/l%u.%s", c->place->dir, i, c->format);
    return path;
}

static void make_layer(const struct chain *c, unsigned i)
{
    struct dr_image *below = NULL;
    struct dr_disk *disk;
    uint32_t number = i + 1;
    struct dr_open_options open = {.format = c->format,
                                   .flags = DR_OPEN_RDWR | DR_OPEN_NO_FLUSH | DR_OPEN_NO_BACKING};
    if (i > 0)
        assert_ok(dr_image_open(c->place->fs, layer(c, i - 1), c->format, DR_OPEN_NO_BACKING,
                                &below, &err));
    const struct dr_create_params p = {
        .size = SIZE,
        .backing = below,
        .backing_name = i > 0 ? strrchr(layer(c, i - 1), '/') + 1 : NULL,
        .backing_format = i > 0 ? c->format : NULL,
        .file_flags = DR_FILE_NO_FLUSH,
    };
    assert_ok(dr_format_find(c->format)->create(c->place->fs, layer(c, i), &p, &err));
    dr_image_unref(below, NULL);
    if (i % c->every)
        return;
    assert_ok(dr_open(layer(c, i), &open, &disk, &err));
    assert_ok(dr_pwrite(disk, &number, (uint64_t)i * UNIT, sizeof(number), 0, &err));
    assert_ok(dr_close(disk, &err));
}

/* In memory where that is possible: a thousand flushes of a disk take their time. */
static int make_chain(struct chain *c, const char *format, unsigned depth, unsigned every,
                      void **state)
{
    void *place;
    if (setup_posix_in(&place, "/dev/shm") && setup_posix(&place))
        return -1;
    if (getrlimit(RLIMIT_NOFILE, &c->limit))
        return -1;
    struct rlimit few = {.rlim_cur = LIMIT, .rlim_max = c->limit.rlim_max};
    c->place = place;
    c->format = format;
    c->depth = depth;
    c->every = every;
    *state = c;
    if (setrlimit(RLIMIT_NOFILE, &few))
        return -1;
    for (unsigned i = 0; i < depth; i++)
        make_layer(c, i);
    strcpy(c->top, layer(c, depth - 1));
    return 0;
}

static int setup_vmdk(void **state)
{
    static struct chain c;
    return make_chain(&c, "vmdk", DEPTH, 2, state);
}

static int setup_addcow(void **state)
{
    static struct chain c;
    return make_chain(&c, "add-cow", DEPTH, 2, state);
}

static int setup_deeper(void **state)
{
    static struct chain c;
    return make_chain(&c, "vmdk", DEEPER, 16, state);
}

static int teardown(void **state)
{
    struct chain *c = *state;
    void *place = c->place;
    setrlimit(RLIMIT_NOFILE, &c->limit);
    return teardown_posix(&place);
}

static struct dr_disk *open_chain(const struct chain *c, unsigned flags)
{
    struct dr_open_options open = {.format = c->format, .flags = flags};
    struct dr_disk *disk;
    assert_ok(dr_open(c->top, &open, &disk, &err));
    return disk;
}

/* How many of the numbers, in an order that depends on step, are not there. */
static unsigned wrong_numbers(const struct chain *c, struct dr_disk *disk, unsigned step)
{
    unsigned wrong = 0, all = c->depth / c->every;
    for (unsigned n = 0; n < all; n++) {
        uint32_t number = 0, i = n * step % all * c->every;
        wrong += dr_pread(disk, &number, (uint64_t)i * UNIT, sizeof(number), NULL) < 0 ||
                 number != i + 1;
    }
    return wrong;
}

static void assert_whole(const struct chain *c)
{
    struct dr_disk *disk = open_chain(c, 0);
    assert_int_equal(wrong_numbers(c, disk, 1), 0);
    assert_ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ threads that read */

#define READERS 3

struct reader {
    const struct chain *c;
    struct dr_disk *disk;
    unsigned step, wrong;
    pthread_t thread;
};

static void *read_all(void *arg)
{
    struct reader *r = arg;
    r->wrong = wrong_numbers(r->c, r->disk, r->step);
    return NULL;
}

static void start_readers(struct reader *r, const struct chain *c, struct dr_disk *disk)
{
    static const unsigned steps[READERS] = {1, 373, 499};
    for (unsigned i = 0; i < READERS; i++) {
        r[i] = (struct reader){.c = c, .disk = disk, .step = steps[i]};
        assert_int_equal(pthread_create(&r[i].thread, NULL, read_all, &r[i]), 0);
    }
}

static void join_readers(struct reader *r)
{
    for (unsigned i = 0; i < READERS; i++) {
        pthread_join(r[i].thread, NULL);
        assert_int_equal(r[i].wrong, 0);
    }
}

static void many_threads_read_it(const struct chain *c)
{
    struct reader readers[READERS];
    struct dr_disk *disk = open_chain(c, 0);
    start_readers(readers, c, disk);
    join_readers(readers);
    assert_ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ operations */

static void writes_flushes_and_a_snapshot_go_on_beside_readers(struct chain *c)
{
    struct reader readers[READERS];
    struct dr_disk *disk = open_chain(c, DR_OPEN_RDWR);
    start_readers(readers, c, disk);
    for (unsigned i = 0; i < 20; i++) {
        /* Between the numbers that are read. */
        assert_ok(dr_pwrite(disk, &i, (2 * i + 1) * UNIT, sizeof(i), 0, &err));
        assert_ok(dr_flush(disk, &err));
        if (i == 10) {
            assert_ok(dr_disk_snapshot(disk, "active", NULL, NULL, NULL, &err));
            snprintf(c->top, sizeof(c->top), "%s/active", c->place->dir);
        }
    }
    join_readers(readers);
    assert_ok(dr_close(disk, &err));
    assert_whole(c);
    disk = open_chain(c, 0);
    for (unsigned i = 0; i < 20; i++) {
        unsigned have = ~i;
        assert_ok(dr_pread(disk, &have, (2 * i + 1) * UNIT, sizeof(have), &err));
        assert_int_equal(have, i);
    }
    assert_ok(dr_close(disk, &err));
}

static void it_is_checked(const struct chain *c)
{
    struct dr_open_options open = {.format = c->format};
    char *json = NULL;
    assert_ok(dr_check(c->top, &open, 0, NULL, NULL, &json, &err));
    free(json);
}

static void it_is_converted(const struct chain *c)
{
    char target[160];
    const char *source = c->top;
    struct dr_open_options open = {.format = "raw"};
    struct dr_convert_options o = {.out_format = "raw", .sparse_size = DR_CONVERT_SPARSE_DEFAULT};
    struct dr_disk *disk;
    snprintf(target, sizeof(target), "%s/copy", c->place->dir);
    assert_ok(dr_convert(&source, 1, target, &o, NULL, &err));
    assert_ok(dr_open(target, &open, &disk, &err));
    assert_int_equal(wrong_numbers(c, disk, 1), 0);
    assert_ok(dr_close(disk, &err));
}

static void its_parent_is_renamed_in_it(const struct chain *c)
{
    struct dr_open_options open = {.format = c->format};
    struct dr_rebase_options o = {.open = open,
                                  .backing = strrchr(layer(c, c->depth - 2), '/') + 1,
                                  .backing_format = c->format,
                                  .unsafe = true};
    assert_ok(dr_rebase(layer(c, c->depth - 1), &o, NULL, &err));
    assert_whole(c);
}

/* First the top into its parent, then the images above that into one far below, with their bytes.
 */
static void it_is_committed(const struct chain *c)
{
    struct dr_commit_options o = {.open = {.format = c->format}};
    assert_ok(dr_commit(c->top, &o, NULL, &err));
    assert_whole(c);
    o.base = layer(c, c->depth - 20);
    assert_ok(dr_commit(c->top, &o, NULL, &err));
    assert_whole(c);
}

static void everything_works_on_a_chain_of_more_layers_than_descriptors(void **state)
{
    struct chain *c = *state;
    many_threads_read_it(c);
    writes_flushes_and_a_snapshot_go_on_beside_readers(c);
    it_is_checked(c);
    it_is_converted(c);
    its_parent_is_renamed_in_it(c);
    it_is_committed(c);
}

static void the_longest_chain_is_read(void **state)
{
    assert_whole(*state);
}

#define T(name, setup) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(everything_works_on_a_chain_of_more_layers_than_descriptors, setup_vmdk),
        T(everything_works_on_a_chain_of_more_layers_than_descriptors, setup_addcow),
        T(the_longest_chain_is_read, setup_deeper),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
