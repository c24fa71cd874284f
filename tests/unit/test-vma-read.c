/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Extracting good archives: every byte of every disk, from archives that can seek and from those
 * that cannot, and only the I/O that is needed. */
#include <fcntl.h>
#include <unistd.h>

#include "core/core.h"
#include "faultfs.h"
#include "test-vma-archive.h"

static void extract_ok(struct bench *b, struct dr_vma_extract_options o)
{
    ok(extract(b, o, &err));
    assert_string_equal(b->damage, "");
}

/* ------------------------------------------------------------------ bytes */

static void every_byte_arrives(void **state)
{
    struct bench *b = *state;
    odd_archive(&b->a);
    store(b);
    for (int fill = 0; fill < 2; fill++) {
        for (b->workers = 1; b->workers < 6; b->workers += 4) {
            struct dr_vma_target t[2] = {target(b, 1, b->a.disks[0].size, fill),
                                         target(b, 9, 3 * 65536, fill)};
            extract_ok(b, (struct dr_vma_extract_options){.targets = t, .n_targets = 2});
            expect_image(b, &t[0], fill);
            expect_image(b, &t[1], fill);
            end_target(&t[0]);
            end_target(&t[1]);
            assert_string_equal(b->warnings, "");
            assert_int_equal(b->result.bytes_read, 9 * 65536);
            assert_int_equal(b->result.zero_cluster_bytes, 2 * 65536);
            assert_int_equal(b->result.zero_bytes, 9 * 65536 - (16 * 3 + 4 + 2 + 2 + 15) * 4096);
            assert_false(b->result.sums_used);
        }
    }
}

static void what_is_behind_the_disk_in_the_target_stays(void **state)
{
    struct bench *b = *state;
    odd_archive(&b->a);
    store(b);
    struct dr_vma_target t = target(b, 1, 10 * 65536, 0x77);
    extract_ok(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1});
    expect_image(b, &t, 0x77);
    end_target(&t);
}

static void one_disk_of_several(void **state)
{
    struct bench *b = *state;
    odd_archive(&b->a);
    store(b);
    struct dr_vma_target t = target(b, 9, 3 * 65536, 0);
    extract_ok(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1});
    expect_image(b, &t, 0);
    end_target(&t);
    assert_int_equal(b->result.bytes_read, 9 * 65536);
}

static void other_formats_are_targets_too(void **state)
{
    struct bench *b = *state;
    odd_archive(&b->a);
    store(b);
    make(b->fs, "/t.vmdk", "vmdk", 3 * 65536, NULL);
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_vma_target t = {.id = 9, .is_zero = true};
    ok(dr_open_fs(b->fs, "/t.vmdk", &o, &t.disk, &err));
    extract_ok(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1});
    expect_image(b, &t, 0);
    end_target(&t);
}

static void device_255_is_a_disk(void **state)
{
    struct bench *b = *state;
    add_disk(&b->a, 255, "last", 65536);
    end_header(&b->a);
    add_extent(&b->a, &(struct vma_slot){255, 0, 0x0f0f, 0}, 1, true);
    store(b);
    struct dr_vma_target t = target(b, 255, 65536, 1);
    extract_ok(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1});
    expect_image(b, &t, 1);
    end_target(&t);
    assert_non_null(strstr(b->warnings, "device 255 ('last')"));
}

static void archives_without_disks(void **state)
{
    struct bench *b = *state;
    b->a.config = (struct dr_vma_config){"qemu-server.conf", NULL, 0};
    b->a.header.configs = &b->a.config;
    b->a.header.n_configs = 1;
    end_header(&b->a);
    store(b);
    extract_ok(b, (struct dr_vma_extract_options){0});
    add_extent(&b->a, NULL, 0, true);
    store(b);
    extract_ok(b, (struct dr_vma_extract_options){0});
    assert_int_equal(b->result.bytes_read, 0);
}

static void many_disks_and_extents_of_59(void **state)
{
    struct bench *b = *state;
    static char names[254][16];
    struct dr_vma_target t[254];
    for (unsigned id = 1; id <= 254; id++) {
        snprintf(names[id - 1], 16, "d%u", id);
        add_disk(&b->a, id, names[id - 1], 512 * (1 + id % 200));
    }
    end_header(&b->a);
    struct vma_slot slots[59];
    unsigned n = 0;
    for (unsigned i = 0; i < 508; i++) { /* shuffled: 101 and 508 have no common factor */
        unsigned k = i * 101 % 508, id = 1 + k / 2;
        if (k % 2 < vma_clusters(512 * (1 + id % 200)))
            slots[n++] = (struct vma_slot){(uint8_t)id, k % 2, (uint16_t)(k * 2654435u), 0};
        if (n == 59 || i == 507) {
            add_extent(&b->a, slots, n, true);
            n = 0;
        }
    }
    store(b);
    for (unsigned id = 1; id <= 254; id++)
        t[id - 1] = target(b, id, 512 * (1 + id % 200), id % 3 ? 0 : 0xee);
    extract_ok(b, (struct dr_vma_extract_options){.targets = t, .n_targets = 254});
    for (unsigned i = 0; i < 254; i++) {
        expect_image(b, &t[i], 0);
        end_target(&t[i]);
    }
}

/* ------------------------------------------------------------------ the state of a machine */

static void state_archive(struct bench *b, uint64_t size, uint32_t clusters)
{
    empty_archive(&b->a);
    add_disk(&b->a, 3, "vmstate", size);
    end_header(&b->a);
    for (uint32_t c = 0; c < clusters; c++) {
        static const uint16_t masks[] = {0, 0x0ff0, 0xffff, 0x0001, 0};
        add_extent(&b->a, &(struct vma_slot){3, c, masks[c % 5], 0}, 1, true);
    }
    store(b);
}

static void extract_state(struct bench *b, uint64_t room, int fill)
{
    struct dr_vma_target t = target(b, 3, room, fill);
    extract_ok(b, (struct dr_vma_extract_options){.targets = &t, .n_targets = 1});
    b->a.disks[0].size = room; /* whatever it said */
    expect_image(b, &t, fill);
    end_target(&t);
}

static void zeros_of_a_state_are_zeros(void **state)
{
    struct bench *b = *state;
    state_archive(b, 5 * 65536, 5);
    extract_state(b, 5 * 65536, 0);
    state_archive(b, 5 * 65536, 5);
    extract_state(b, 5 * 65536, 0x55);
}

static void a_state_is_shorter_or_longer_than_it_says(void **state)
{
    struct bench *b = *state;
    state_archive(b, 5 * 65536 + 17, 3);
    extract_state(b, 5 * 65536 + 17, 0);
    state_archive(b, 100, 4);
    extract_state(b, 4 * 65536, 0x55);
    state_archive(b, 100, 4); /* where there is no room it is cut, which is told */
    extract_state(b, 100, 0);
    assert_non_null(strstr(b->warnings, "goes on behind"));
    state_archive(b, 65536 + 100, 2);
    extract_state(b, 65536 + 100, 0);
    assert_string_equal(b->warnings, "");
}

/* ------------------------------------------------------------------ only the I/O that is needed */

struct traced {
    struct bench *b;
    struct dr_fs *memory;
    struct faultfs *faults;
    uint64_t archive_bytes, zero_calls, writes;
};

static int trace(void *user, const struct faultfs_io *io)
{
    struct traced *t = user;
    bool archive = strcmp(io->path, ARCHIVE) == 0;
    if (io->kind == FAULTFS_READ && archive)
        __atomic_fetch_add(&t->archive_bytes, io->len, __ATOMIC_RELAXED);
    if (io->kind == FAULTFS_ZERO)
        __atomic_fetch_add(&t->zero_calls, 1, __ATOMIC_RELAXED);
    if (io->kind == FAULTFS_WRITE)
        __atomic_fetch_add(&t->writes, 1, __ATOMIC_RELAXED);
    return 0;
}

static void begin_trace(struct traced *t, struct bench *b)
{
    *t = (struct traced){.b = b, .memory = b->fs, .faults = faultfs_new(b->fs)};
    b->fs = faultfs_fs(t->faults);
    faultfs_observe(t->faults, trace, t);
}

static void end_trace(struct traced *t)
{
    t->b->fs = t->memory;
    faultfs_free(t->faults);
}

#define LONG 400u /* clusters: [0, 150) zeros, [150, 250) data, [250, 400) zeros */

static void long_runs(struct bench *b)
{
    add_disk(&b->a, 1, "d", LONG * 65536);
    end_header(&b->a);
    struct vma_slot slots[50];
    for (uint32_t c = 0; c < LONG; c++) {
        slots[c % 50] = (struct vma_slot){1, c, c >= 150 && c < 250 ? 0xffff : 0, 0};
        if (c % 50 == 49)
            add_extent(&b->a, slots, 50, true);
    }
    store(b);
}

static void neighbours_are_written_together(void **state)
{
    struct bench *b = *state;
    struct traced t;
    long_runs(b);
    begin_trace(&t, b);
    struct dr_vma_target one = target(b, 1, LONG * 65536, 9);
    t.writes = t.zero_calls = 0;
    extract_ok(b, (struct dr_vma_extract_options){.targets = &one, .n_targets = 1});
    uint64_t writes = t.writes, zeros = t.zero_calls;
    expect_image(b, &one, 0);
    end_target(&one);
    end_trace(&t);
    assert_int_equal(zeros, 2 * 3);  /* runs that no extent's end cuts, in the core's portions */
    assert_int_equal(writes, 2 * 7); /* 50 clusters, 8 at a time */
}

static void zeros_are_not_written_to_zeros(void **state)
{
    struct bench *b = *state;
    struct traced t;
    long_runs(b);
    begin_trace(&t, b);
    struct dr_vma_target one = target(b, 1, LONG * 65536, 0);
    t.zero_calls = 0;
    extract_ok(b, (struct dr_vma_extract_options){.targets = &one, .n_targets = 1});
    uint64_t zeros = t.zero_calls;
    expect_image(b, &one, 0);
    end_target(&one);
    end_trace(&t);
    assert_int_equal(zeros, 0);
}

static void structure_alone_reads_headers_alone(void **state)
{
    struct bench *b = *state;
    struct traced t;
    long_runs(b);
    begin_trace(&t, b);
    extract_ok(b, (struct dr_vma_extract_options){.headers_only = true});
    uint64_t bytes = t.archive_bytes;
    extract_ok(b, (struct dr_vma_extract_options){0}); /* nothing to compare the data with */
    assert_int_equal(t.archive_bytes, 2 * bytes);
    end_trace(&t);
    /* the header twice over, 8 extents, 2 of them with data, and what is read ahead */
    assert_true(bytes < 32768 + 2 * 512 + 3 * (64 << 10));
    assert_int_equal(b->result.bytes_read, LONG * 65536);
}

/* ------------------------------------------------------------------ pipes */

struct feeder {
    const struct archive *a;
    int fd;
};

static void *feed(void *p)
{
    const struct feeder *f = p;
    for (size_t at = 0; at < f->a->len;) { /* odd pieces */
        ssize_t n = write(f->fd, f->a->buf + at, dr_min(f->a->len - at, 7777));
        if (n <= 0)
            break;
        at += (size_t)n;
    }
    close(f->fd);
    return NULL;
}

static void from_a_pipe(void **state)
{
    struct bench *b = *state;
    int ends[2];
    pthread_t thread;
    struct dr_vma *vma;
    odd_archive(&b->a);
    assert_int_equal(pipe(ends), 0);
    struct feeder f = {&b->a, ends[1]};
    assert_int_equal(pthread_create(&thread, NULL, feed, &f), 0);
    struct dr_vma_open_options open = {.use_fd = true, .fd = ends[0]};
    ok(dr_vma_open_fs(b->fs, "-", &open, &vma, &err));
    struct dr_vma_target t[2] = {target(b, 1, b->a.disks[0].size, 3), target(b, 9, 3 * 65536, 0)};
    struct dr_vma_extract_options o = {.targets = t, .n_targets = 2};
    ok(dr_vma_extract(vma, &o, NULL, NULL, &err));
    expect_image(b, &t[0], 3);
    expect_image(b, &t[1], 0);
    end_target(&t[0]);
    end_target(&t[1]);
    refused(dr_vma_extract(vma, &o, NULL, NULL, &err), EINVAL, "open it again");
    dr_vma_close(vma);
    pthread_join(thread, NULL);
    close(ends[0]);
}

/* ------------------------------------------------------------------ refusals */

static void targets_must_fit(void **state)
{
    struct bench *b = *state;
    odd_archive(&b->a);
    store(b);
    struct dr_vma_target t[2] = {target(b, 9, 3 * 65536 - 512, 0)};
    struct dr_vma_extract_options o = {.targets = t, .n_targets = 1};
    refused(extract(b, o, &err), ENOSPC, "holds 196096 bytes, the archived disk has 196608");
    t[0].id = 2;
    refused(extract(b, o, &err), EINVAL, "has no disk 2");
    end_target(&t[0]);
    t[0] = t[1] = target(b, 9, 3 * 65536, 0);
    o.n_targets = 2;
    refused(extract(b, o, &err), EINVAL, "two targets");
    o.n_targets = 1;
    o.headers_only = true;
    refused(extract(b, o, &err), EINVAL, "structure");
    o.headers_only = false;
    end_target(&t[0]);
    struct dr_open_options open = {.format = "raw"};
    ok(dr_open_fs(b->fs, target_path(9), &open, &t[0].disk, &err));
    refused(extract(b, o, &err), EINVAL, "not open for writing");
    end_target(&t[0]);
}

static void what_is_no_archive_is_refused(void **state)
{
    struct bench *b = *state;
    struct dr_vma *vma;
    odd_archive(&b->a);
    refused(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err), ENOENT, "");
    write_file(b->fs, ARCHIVE, b->a.buf, 12287);
    refused(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err), EINVAL, "ends at offset 12287");
    write_file(b->fs, ARCHIVE, b->a.buf, 12799);
    refused(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err), EINVAL, "ends at offset 12799");
    b->a.buf[12500] ^= 1;
    store(b);
    refused(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err), EINVAL, "checksum");
    assert_null(vma);
}

/* ------------------------------------------------------------------ job, rates, checkpoints */

struct fake {
    uint64_t now, slept;
    pthread_mutex_t lock;
};

static uint64_t fake_now(void *user)
{
    struct fake *f = user;
    DR_LOCK_SCOPE(&f->lock);
    return f->now;
}

static void fake_sleep(void *user, uint64_t ns)
{
    struct fake *f = user;
    DR_LOCK_SCOPE(&f->lock);
    f->now += ns;
    f->slept += ns;
}

/* One thread, so that the time is what all writes together must take. */
static uint64_t time_of(struct bench *b, const struct dr_vma_target *t, size_t n)
{
    struct fake f = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct dr_copy_clock clock = {fake_now, fake_sleep, &f};
    struct dr_job job = {.workers = 1};
    struct dr_vma *vma;
    ok(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err));
    vma->clock = &clock;
    vma->in_order = b->in_order;
    struct dr_vma_extract_options o = {.targets = t, .n_targets = n};
    ok(dr_vma_extract(vma, &o, &job, NULL, &err));
    dr_vma_close(vma);
    return f.slept;
}

static void rates_hold_for_targets_and_groups(void **state)
{
    struct bench *b = *state;
    add_disk(&b->a, 1, "a", 8 * 65536);
    add_disk(&b->a, 2, "b", 8 * 65536);
    end_header(&b->a);
    for (uint32_t c = 0; c < 8; c++) { /* no two writes can be one */
        struct vma_slot s[] = {{1, 7 - c, 0xffff, 0}, {2, 7 - c, 0xffff, 0}};
        add_extent(&b->a, s, 2, true);
    }
    store(b);
    struct dr_vma_target t[2] = {target(b, 1, 8 * 65536, 0), target(b, 2, 8 * 65536, 0)};
    const uint64_t second = 1000000000u;
    assert_int_equal(time_of(b, t, 2), 0);
    t[0].rate = 65536; /* a cluster a second, the first one at once */
    assert_int_equal(time_of(b, t, 2), 7 * second);
    t[1].rate = 65536;
    assert_true(time_of(b, t, 2) <= 8 * second); /* side by side */
    t[0].rate_group = t[1].rate_group = "g";
    t[0].rate = 0; /* the group's */
    assert_int_equal(time_of(b, t, 2), 15 * second);
    t[0].rate = 32768;
    assert_int_equal(time_of(b, t, 2), 30 * second);
    expect_image(b, &t[0], 0);
    expect_image(b, &t[1], 0);
    end_target(&t[0]);
    end_target(&t[1]);
}

struct stopper {
    uint64_t done, total, calls;
    bool stop;
};

static int on_progress(void *user, uint64_t done, uint64_t total)
{
    struct stopper *s = user;
    assert_true(done >= s->done && done <= total);
    s->done = done;
    s->total = total;
    s->calls++;
    return s->stop;
}

static void progress_is_in_bytes_of_disks(void **state)
{
    struct bench *b = *state;
    struct stopper s = {0};
    struct dr_job job = {.progress = on_progress, .user = &s};
    struct dr_vma *vma;
    odd_archive(&b->a);
    store(b);
    struct dr_vma_extract_options o = {0};
    ok(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err));
    ok(dr_vma_extract(vma, &o, &job, NULL, &err));
    assert_int_equal(s.total, 9 * 65536);
    assert_int_equal(s.done, s.total);
    dr_vma_close(vma);
}

static void a_job_can_be_stopped(void **state)
{
    struct bench *b = *state;
    struct dr_job job = {.cancelled = 1};
    struct dr_vma *vma;
    odd_archive(&b->a);
    store(b);
    ok(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err));
    refused(dr_vma_extract(vma, NULL, &job, NULL, &err), ECANCELED, "stopped");
    dr_vma_close(vma);
}

struct checkpoints {
    uint64_t last;
    unsigned n, stop_at;
    const struct dr_vma_target *target;
};

static int on_checkpoint(void *user, uint64_t off, struct dr_error *err)
{
    struct checkpoints *c = user;
    assert_true(off > c->last);
    assert_false(c->target->disk->chain->images[0]->files[0]->dirty); /* what is told is durable */
    c->last = off;
    return ++c->n == c->stop_at ? dr_fail(err, ENOSPC, "no place for the note") : 0;
}

/* The clock jumps ahead at each look: every tenth extent or so is a checkpoint. */
static uint64_t hasty_now(void *user)
{
    return *(uint64_t *)user += VMA_CHECKPOINT_NS;
}

static void sixty_extents(struct bench *b)
{
    empty_archive(&b->a);
    add_disk(&b->a, 1, "d", 60 * 65536);
    end_header(&b->a);
    for (uint32_t c = 0; c < 60; c++)
        add_extent(&b->a, &(struct vma_slot){1, c, c % 3 ? 0x0107 : 0, 0}, 1, true);
    store(b);
}

/* Extracts until the n-th checkpoint; where that was. */
static uint64_t interrupt(struct bench *b, const struct dr_vma_target *t, unsigned n)
{
    uint64_t now = 0;
    struct dr_copy_clock clock = {hasty_now, fake_sleep, &now};
    struct checkpoints c = {.stop_at = n, .target = t};
    struct dr_vma *vma;
    const struct vma_resume resume = {.checkpoint = on_checkpoint, .user = &c};
    struct dr_vma_extract_options o = {.targets = t, .n_targets = 1};
    ok(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err));
    vma->clock = &clock;
    vma->in_order = b->in_order;
    refused(vma_read_disks(vma, &o, &resume, NULL, NULL, &err), ENOSPC, "no place");
    dr_vma_close(vma);
    assert_int_equal(c.n, n);
    return c.last;
}

/* Nobody looks at this data again. */
static void spoil_before(struct bench *b, uint64_t off)
{
    bool found = false;
    for (unsigned i = 0; i + 1 < b->a.n_extents; i++) {
        if (b->a.extents[i] < off)
            memset(b->a.buf + b->a.extents[i] + 512, 0xdd,
                   b->a.extents[i + 1] - b->a.extents[i] - 512);
        found = found || b->a.extents[i] == off;
    }
    assert_true(found);
    store(b);
}

static void go_on(struct bench *b, const struct dr_vma_target *t, uint64_t off)
{
    const struct vma_resume resume = {.from = off};
    const struct dr_vma_extract_options o = {.targets = t, .n_targets = 1};
    struct dr_vma *vma;
    ok(dr_vma_open_fs(b->fs, ARCHIVE, NULL, &vma, &err));
    vma->in_order = b->in_order;
    ok(vma_read_disks(vma, &o, &resume, NULL, &b->result, &err));
    dr_vma_close(vma);
}

static void an_extraction_goes_on_where_it_was(void **state)
{
    struct bench *b = *state;
    for (unsigned n = 1; n <= 4; n++) {
        sixty_extents(b);
        struct dr_vma_target t = target(b, 1, 60 * 65536, 5);
        uint64_t off = interrupt(b, &t, n);
        assert_true(off >= b->a.extents[n]);
        spoil_before(b, off);
        go_on(b, &t, off);
        assert_int_equal(b->result.bytes_read, 60 * 65536);
        expect_image(b, &t, 5);
        end_target(&t);
    }
}

#define BOTH(f)                                           \
    {#f, f, setup, teardown, NULL},                       \
    {                                                     \
#f " in order", f, setup_in_order, teardown, NULL \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(every_byte_arrives),
        BOTH(what_is_behind_the_disk_in_the_target_stays),
        BOTH(one_disk_of_several),
        BOTH(other_formats_are_targets_too),
        BOTH(device_255_is_a_disk),
        BOTH(archives_without_disks),
        BOTH(many_disks_and_extents_of_59),
        BOTH(zeros_of_a_state_are_zeros),
        BOTH(a_state_is_shorter_or_longer_than_it_says),
        BOTH(neighbours_are_written_together),
        BOTH(zeros_are_not_written_to_zeros),
        BOTH(rates_hold_for_targets_and_groups),
        BOTH(an_extraction_goes_on_where_it_was),
        cmocka_unit_test_setup_teardown(structure_alone_reads_headers_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(from_a_pipe, setup, teardown),
        cmocka_unit_test_setup_teardown(targets_must_fit, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_no_archive_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(progress_is_in_bytes_of_disks, setup, teardown),
        cmocka_unit_test_setup_teardown(a_job_can_be_stopped, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
