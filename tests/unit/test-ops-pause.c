/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What requests of a disk in use wait for while its chain is changed. A snapshot, and a backup
 * whose bitmaps stand beside the disk, lets them wait for no file: what the guest flushed is safe
 * whatever happens between the steps, and a step that fails leaves the disks on one side or the
 * other. */
#include "drover/backup.h"
#include "faultfs.h"
#include "powerfs.h"
#include "test-ops.h"

#include "base/cleanup.h"

#include <stdio.h>

#define SIZE (512 * KiB)

static const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};

static void make_disk(struct dr_fs *fs, const char *path, const char *format)
{
    struct dr_create_options o = {.format = format, .size = SIZE, .has_size = true};
    ok(dr_create_fs(fs, path, &o, &err));
}

static void write_bytes(struct dr_disk *disk, uint64_t off, int byte)
{
    uint8_t bytes[4096];
    memset(bytes, byte, sizeof(bytes));
    ok(dr_pwrite(disk, bytes, off, sizeof(bytes), 0, &err));
}

static void expect_bytes(struct dr_disk *disk, uint64_t off, int byte)
{
    uint8_t bytes[4096], want[4096];
    memset(want, byte, sizeof(want));
    ok(dr_pread(disk, bytes, off, sizeof(bytes), &err));
    assert_memory_equal(bytes, want, sizeof(want));
}

/* ------------------------------------------------------------------ what requests wait for */

struct watch {
    struct dr_disk *disks[2];
    unsigned all, closed; /* calls to files, and those while a gate was closed */
    char first[128];      /* of the latter */
};

static int count_calls(void *user, const struct faultfs_io *io)
{
    struct watch *w = user;
    bool closed = false;
    for (unsigned i = 0; i < 2; i++)
        closed |= w->disks[i] && atomic_load(&w->disks[i]->closed);
    w->all++;
    if (closed && w->closed++ == 0)
        snprintf(w->first, sizeof(w->first), "%s %s", faultfs_kind_name(io->kind), io->path);
    return 0;
}

static int flush_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *e)
{
    (void)user, (void)fresh;
    return dr_chain_flush(present, 0, e);
}

/* format: of the disks; child: of their snapshots, or NULL. */
static void snapshots_are_watched(const char *format, const char *child, bool existing)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    struct watch w = {0};
    struct dr_overlay o[2] = {{.path = "a-child"}, {.path = "b-child"}};
    make_disk(memory, "a", format);
    make_disk(memory, "b", format);
    for (unsigned i = 0; i < 2; i++) {
        ok(dr_open_fs(fs, i ? "b" : "a", &rw, &w.disks[i], &err));
        o[i].disk = w.disks[i];
        o[i].format = child;
        o[i].existing = existing;
        if (existing)
            make_disk(memory, o[i].path, child);
        write_bytes(w.disks[i], 0, 0x11);
        write_bytes(w.disks[i], 256 * KiB, 0x11);
    }
    faultfs_observe(f, count_calls, &w);
    ok(dr_disks_snapshot(o, 2, NULL, &err));
    if (w.closed)
        fail_msg("%s under %s: %u calls while requests wait, first: %s", format, child, w.closed,
                 w.first);
    assert_true(w.all > 10);
    write_bytes(w.disks[0], 0, 0x12);
    ok(dr_disk_quiesce_unflushed(w.disks[0], flush_step, NULL, NULL, &err));
    assert_true(w.closed > 0); /* such calls are seen */
    faultfs_observe(f, NULL, NULL);
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(dr_chain_length(w.disks[i]), 2);
        expect_bytes(w.disks[i], 256 * KiB, 0x11);
        ok(dr_close(w.disks[i], &err));
        free(o[i].active);
    }
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

static void requests_wait_for_no_file(void **state)
{
    (void)state;
    snapshots_are_watched("vmdk", "vmdk", false);
    snapshots_are_watched("qcow2", "qcow2", false);
    snapshots_are_watched("raw", "add-cow", false);
    snapshots_are_watched("vmdk", "qcow2", false);
    snapshots_are_watched("qcow2", "qcow2", true);
    snapshots_are_watched("vmdk", "vmdk", true);
}

/* A full backup, and an incremental one of what was written since. */
static void backups_are_watched(const char *format)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    const struct dr_backup_options o = {.set = "set", .bitmap = "B"};
    struct dr_backup_result result = {0};
    struct watch w = {0};
    make_disk(memory, "a", format);
    ok(dr_open_fs(fs, "a", &rw, &w.disks[0], &err));
    for (unsigned i = 0; i < 2; i++) {
        write_bytes(w.disks[0], i * 256 * KiB, 0x11);
        faultfs_observe(f, count_calls, &w);
        ok(dr_disk_backup(w.disks[0], i ? "second" : "first", &o, NULL, &result, &err));
        faultfs_observe(f, NULL, NULL);
        assert_int_equal(result.incremental, i == 1);
        if (w.closed)
            fail_msg("%s: %u calls while requests wait, first: %s", format, w.closed, w.first);
    }
    assert_int_equal(result.copied, 64 * KiB);
    assert_true(w.all > 10);
    ok(dr_close(w.disks[0], &err));
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

static void the_instant_of_a_backup_waits_for_no_file(void **state)
{
    (void)state;
    backups_are_watched("raw");
    backups_are_watched("vmdk");
    backups_are_watched("add-cow");
}

/* While the file of bitmaps is written, the guest writes; then the file fails. */
static int write_beside(void *user, const struct faultfs_io *io)
{
    struct watch *w = user;
    if (!strstr(io->path, ".drover-bitmaps") || io->kind != FAULTFS_WRITE)
        return 0;
    if (w->all++ == 0)
        write_bytes(w->disks[0], 256 * KiB, 0x12);
    return -ENOSPC;
}

static int add_up(void *user, uint64_t off, uint64_t len)
{
    uint64_t *sum = user;
    assert_true(off == 256 * KiB || off == 0);
    *sum += len;
    return 0;
}

static void a_guest_writes_while_bitmaps_beside_its_disk_change(void **state)
{
    static const enum dr_bitmap_action actions[] = {DR_BITMAP_DISABLE, DR_BITMAP_CLEAR,
                                                    DR_BITMAP_REMOVE};
    (void)state;
    for (unsigned i = 0; i < 3; i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct watch w = {0};
        uint64_t dirty = 0;
        make_disk(memory, "a", "raw");
        ok(dr_open_fs(faultfs_fs(f), "a", &rw, &w.disks[0], &err));
        ok(dr_disk_bitmap_change(w.disks[0], "B", DR_BITMAP_ADD, NULL, &err));
        write_bytes(w.disks[0], 0, 0x11);
        faultfs_observe(f, write_beside, &w);
        int r = dr_disk_bitmap_change(w.disks[0], "B", actions[i], NULL, NULL);
        faultfs_observe(f, NULL, NULL);
        if (actions[i] == DR_BITMAP_REMOVE) /* the file goes, and is not written */
            assert_int_equal(r, 0);
        else
            assert_int_equal(r, -ENOSPC);
        ok(dr_close(w.disks[0], &err));
        ok(dr_open_fs(memory, "a", NULL, &w.disks[0], &err));
        if (r < 0) { /* it is as it was, and has both */
            ok(dr_disk_bitmap_read(w.disks[0], "B", add_up, &dirty, &err));
            assert_int_equal(dirty, 128 * KiB);
        }
        ok(dr_close(w.disks[0], &err));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

static bool is_inside(struct dr_disk *disk)
{
    for (unsigned i = 0; i < DR_STRIPES; i++)
        if ((uint32_t)atomic_load(&disk->inside[i].n) != 0)
            return true;
    return false;
}

struct flushes {
    struct dr_disk *disk;
    unsigned inside, outside;
};

static int count_flushes(void *user, const struct faultfs_io *io)
{
    struct flushes *n = user;
    if (io->kind == FAULTFS_FLUSH)
        *(is_inside(n->disk) ? &n->inside : &n->outside) += 1;
    return 0;
}

/* Else whoever closes the gate would wait for the disk, and all requests with him. */
static void no_request_waits_for_the_disk_inside_the_gate(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct flushes n = {0};
    uint8_t bytes[4096] = {0x22};
    make_disk(*state, "a", "vmdk");
    ok(dr_open_fs(faultfs_fs(f), "a", &rw, &n.disk, &err));
    write_bytes(n.disk, 0, 0x11);
    ok(dr_flush(n.disk, &err));
    faultfs_observe(f, count_flushes, &n);
    write_bytes(n.disk, 0, 0x12);
    ok(dr_flush(n.disk, &err));
    assert_int_equal(n.outside, 1);
    ok(dr_zero(n.disk, 0, sizeof(bytes), DR_FUA, &err));
    ok(dr_pwrite(n.disk, bytes, 128 * KiB, sizeof(bytes), DR_FUA, &err)); /* allocates */
    assert_true(n.outside > 3);
    assert_int_equal(n.inside, 0);
    unsigned before = n.outside;
    dr_disk_announce(n.disk, true);
    ok(dr_pwrite(n.disk, bytes, 128 * KiB, sizeof(bytes), DR_FUA, &err)); /* in place */
    assert_int_equal(n.outside, before + 1);
    assert_int_equal(n.inside, 0);
    dr_disk_announce(n.disk, false);
    ok(dr_pwrite(n.disk, bytes, 128 * KiB, sizeof(bytes), DR_FUA, &err));
    assert_int_equal(n.outside, before + 1); /* one durable write, which a file in memory flushes */
    assert_int_equal(n.inside, 1);
    faultfs_observe(f, NULL, NULL);
    ok(dr_close(n.disk, &err));
    faultfs_free(f);
}

/* ------------------------------------------------------------------ a commit that goes over */

struct pivot {
    struct dr_disk *disk;
    unsigned closed, open; /* punches in the old image while requests wait, and when not */
    unsigned before;       /* of these, before the disk has gone over */
};

static int count_punches(void *user, const struct faultfs_io *io)
{
    struct pivot *p = user;
    if (io->kind != FAULTFS_ZERO || strncmp(io->path, "top", 3) != 0)
        return 0;
    *(atomic_load(&p->disk->closed) ? &p->closed : &p->open) += 1;
    p->before += p->disk->chain->n > 1;
    return 0;
}

/* What the job has copied and then the guest writes again is left for the end. */
static int write_at_the_end(void *user)
{
    struct pivot *p = user;
    for (unsigned i = 0; i < 4; i++)
        write_bytes(p->disk, i * 128 * KiB, 0x22);
    return 0;
}

static void pivot_is_watched(const char *format)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct pivot p = {0};
    const struct dr_job_options how = {.before_switch = write_at_the_end, .user = &p};
    const struct dr_commit_options pivot = {.pivot = true};
    const struct dr_create_options over = {
        .format = format, .backing = "base", .backing_format = format};
    struct dr_job *job;
    struct dr_image *top;
    char *json = NULL;
    make_disk(memory, "base", format);
    ok(dr_create_fs(memory, "top", &over, &err));
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &p.disk, &err));
    for (unsigned i = 0; i < 4; i++)
        write_bytes(p.disk, i * 128 * KiB, 0x11);
    faultfs_observe(f, count_punches, &p);
    ok(dr_job_new(NULL, &how, &job, &err));
    ok(dr_disk_commit(p.disk, &pivot, job, &err));
    dr_job_free(job);
    faultfs_observe(f, NULL, NULL);
    assert_int_equal(p.closed, 0);
    assert_int_equal(p.before, 0);
    assert_true(p.open > 0);
    expect_bytes(p.disk, 3 * 128 * KiB, 0x22);
    ok(dr_close(p.disk, &err));
    ok(dr_image_open(memory, "top", format, 0, &top, &err));
    assert_true(dr_ops_holds_nothing(top));
    if (strcmp(format, "vmdk") == 0) /* it was cut */
        assert_int_equal(dr_file_size(top->files[0]), 64 * KiB);
    ok(dr_image_unref(top, &err));
    ok(dr_check_fs(memory, "top", NULL, DR_REPAIR_NONE, NULL, NULL, &json, &err));
    assert_null(strstr(json, "\"leaks\""));
    free(json);
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

static void a_pivot_gives_space_back_when_requests_go_on(void **state)
{
    (void)state;
    pivot_is_watched("vmdk");
    pivot_is_watched("qcow2");
    pivot_is_watched("add-cow");
}

/* ------------------------------------------------------------------ power cuts */

/* Two disks stop at one moment. The guest writes between the record and the switch; and while the
 * first disk's old image is made durable, it writes to the second one and flushes that, whose old
 * image is durable by this flush only. */
struct guest {
    struct powerfs *power;
    struct dr_overlay o[2];
    size_t recorded, flushed; /* length of the log then */
    bool pass_over;           /* a planted fault: the flush leaves the old image out */
};

#define BEFORE  (0 * KiB)   /* written and flushed before the snapshot */
#define BETWEEN (128 * KiB) /* written between the record and the switch */
#define AFTER   (256 * KiB) /* written after the switch */

static int write_after_record(void *user, const struct dr_switch *switches, size_t n,
                              struct dr_error *e)
{
    struct guest *g = user;
    (void)e;
    assert_int_equal(n, 2);
    assert_string_equal(switches[1].path, "b-child");
    g->recorded = powerfs_ops(g->power);
    for (unsigned i = 0; i < 2; i++)
        write_bytes(g->o[i].disk, BETWEEN, 0x22);
    return 0;
}

static int flush_second_disk(void *user, const struct faultfs_io *io)
{
    struct guest *g = user;
    struct dr_disk *second = g->o[1].disk;
    if (io->kind != FAULTFS_FLUSH || !g->recorded || g->flushed)
        return 0;
    assert_string_equal(io->path, "a"); /* the first disk's old image */
    assert_int_equal(dr_chain_length(second), 2);
    g->flushed = SIZE_MAX;
    write_bytes(second, AFTER, 0x33);
    second->chain->images[1]->masked = g->pass_over;
    ok(dr_flush(second, &err));
    second->chain->images[1]->masked = false;
    g->flushed = powerfs_ops(g->power);
    return 0;
}

static bool reads_as(struct dr_disk *disk, uint64_t off, int byte)
{
    uint8_t got[4096], want[4096];
    memset(want, byte, sizeof(want));
    return dr_pread(disk, got, off, sizeof(got), NULL) == 0 && memcmp(got, want, sizeof(got)) == 0;
}

/* The second disk, as who has the record finds it. */
static bool is_safe(struct dr_fs *fs, const struct guest *g, size_t cut)
{
    struct dr_disk *disk = NULL;
    const char *path = cut < g->recorded ? "b" : "b-child";
    if (dr_open_fs(fs, path, NULL, &disk, NULL) < 0)
        return false;
    bool safe =
        reads_as(disk, BEFORE, 0x11) &&
        (cut < g->flushed || (reads_as(disk, BETWEEN, 0x22) && reads_as(disk, AFTER, 0x33)));
    dr_close(disk, NULL);
    return safe;
}

static bool all_cuts_are_safe(const char *format, const char *child, bool pass_over)
{
    struct guest g = {.power = powerfs_new(), .pass_over = pass_over};
    struct faultfs *f = faultfs_new(powerfs_fs(g.power));
    const struct dr_job_options how = {.record = write_after_record, .user = &g};
    struct dr_job *job;
    bool safe = true;
    make_disk(powerfs_fs(g.power), "a", format);
    make_disk(powerfs_fs(g.power), "b", format);
    for (unsigned i = 0; i < 2; i++) {
        g.o[i] = (struct dr_overlay){.path = i ? "b-child" : "a-child", .format = child};
        ok(dr_open_fs(faultfs_fs(f), i ? "b" : "a", &rw, &g.o[i].disk, &err));
        write_bytes(g.o[i].disk, BEFORE, 0x11);
        ok(dr_flush(g.o[i].disk, &err));
    }
    powerfs_settle(g.power);
    faultfs_observe(f, flush_second_disk, &g);
    ok(dr_job_new(NULL, &how, &job, &err));
    ok(dr_disks_snapshot(g.o, 2, job, &err));
    dr_job_free(job);
    faultfs_observe(f, NULL, NULL);
    assert_true(g.recorded > 0 && g.flushed > g.recorded && g.flushed != SIZE_MAX);
    for (unsigned i = 0; i < 2; i++) {
        free(g.o[i].active);
        ok(dr_close(g.o[i].disk, &err));
    }
    for (size_t cut = 0; cut <= powerfs_ops(g.power) && safe; cut++)
        for (int mode = 0; mode < POWERFS_MODES && safe; mode++) {
            struct dr_fs *left = powerfs_cut(g.power, cut, (enum powerfs_mode)mode, cut);
            safe = is_safe(left, &g, cut);
            if (!safe && !pass_over)
                fail_msg("%s under %s: unsafe after %zu of %zu changes (record %zu, flush %zu), "
                         "mode %d",
                         format, child, cut, powerfs_ops(g.power), g.recorded, g.flushed, mode);
            dr_fs_memory_free(left);
        }
    faultfs_free(f);
    powerfs_free(g.power);
    return safe;
}

static const struct {
    const char *format, *child;
} pairs[] = {{"vmdk", "vmdk"}, {"qcow2", "qcow2"}, {"raw", "add-cow"}, {"vmdk", "qcow2"}};

static void what_was_flushed_is_safe_between_all_steps(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
        assert_true(all_cuts_are_safe(pairs[i].format, pairs[i].child, false));
}

static void a_flush_that_passes_the_old_image_over_is_caught(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
        assert_false(all_cuts_are_safe(pairs[i].format, pairs[i].child, true));
}

/* ------------------------------------------------------------------ steps that fail */

struct recorder {
    struct dr_disk *swapped; /* gets another chain behind the back of the snapshot; or NULL */
    unsigned records;
    bool fail_second;
    char last[64]; /* what the last record says of the first disk */
};

static int note_record(void *user, const struct dr_switch *switches, size_t n, struct dr_error *e)
{
    struct recorder *r = user;
    (void)n;
    if (++r->records == 2 && r->fail_second)
        return dr_fail(e, ENOSPC, "it cannot be noted");
    snprintf(r->last, sizeof(r->last), "%s", switches[0].path);
    if (r->swapped) {
        struct dr_chain *chain = dr_disk_chain(r->swapped);
        struct dr_chain *fresh = dr_chain_tail(chain, 0);
        dr_chain_unref(chain, NULL);
        ok(dr_disk_swap(DR_STEAL(r->swapped), fresh, &err));
    }
    return 0;
}

/* Make snapshots of two disks, the second of which is found changed. */
static void fail_after_record(struct dr_fs *fs, struct recorder *r, const char *why)
{
    struct dr_overlay o[2] = {{.path = "a-child"}, {.path = "b-child"}};
    const struct dr_job_options how = {.record = note_record, .user = r};
    struct dr_job *job;
    ok(dr_open_fs(fs, "a", &rw, &o[0].disk, &err));
    ok(dr_open_fs(fs, "b", &rw, &o[1].disk, &err));
    r->swapped = o[1].disk;
    ok(dr_job_new(NULL, &how, &job, &err));
    refused(dr_disks_snapshot(o, 2, job, &err), EBUSY, why);
    dr_job_free(job);
    assert_int_equal(r->records, 2);
    for (unsigned i = 0; i < 2; i++) {
        assert_null(o[i].active);
        assert_int_equal(dr_chain_length(o[i].disk), 1);
        write_bytes(o[i].disk, 0, 0x11);
        ok(dr_close(o[i].disk, &err));
    }
}

static void a_failure_after_the_record_takes_it_back(void **state)
{
    struct dr_fs *fs = *state;
    struct recorder r = {0};
    make_disk(fs, "a", "vmdk");
    make_disk(fs, "b", "qcow2");
    fail_after_record(fs, &r, "b: was changed while a snapshot of it was prepared");
    assert_string_equal(r.last, "a");
    assert_int_equal(count_files(fs), 2);
}

/* What is recorded must be there. */
static void a_child_stays_while_it_is_recorded(void **state)
{
    struct dr_fs *fs = *state;
    struct recorder r = {.fail_second = true};
    make_disk(fs, "a", "vmdk");
    make_disk(fs, "b", "qcow2");
    fail_after_record(fs, &r, "a goes on without a-child, which was made; that cannot be recorded");
    assert_string_equal(r.last, "a-child");
    assert_int_equal(count_files(fs), 4);
}

static int fail_old_image(void *user, const struct faultfs_io *io)
{
    struct dr_disk *disk = user;
    struct dr_chain *chain = disk->chain;
    return io->kind == FAULTFS_FLUSH && chain->n == 2 && strcmp(io->path, "a") == 0 ? -EIO : 0;
}

static int write_more(void *user, const struct dr_switch *switches, size_t n, struct dr_error *e)
{
    (void)n, (void)e, (void)user;
    write_bytes(switches[0].disk, BETWEEN, 0x22);
    return 0;
}

static void a_guest_whose_old_image_is_lost_is_told_by_its_flush(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct dr_overlay o = {.path = "a-child"};
    const struct dr_job_options how = {.record = write_more};
    struct dr_job *job;
    make_disk(*state, "a", "qcow2");
    ok(dr_open_fs(faultfs_fs(f), "a", &rw, &o.disk, &err));
    write_bytes(o.disk, BEFORE, 0x11);
    faultfs_observe(f, fail_old_image, o.disk);
    ok(dr_job_new(NULL, &how, &job, &err));
    refused(dr_disks_snapshot(&o, 1, job, &err), EIO, "a: the disk goes on with a-child, but");
    dr_job_free(job);
    assert_string_equal(o.active, "a-child");
    assert_int_equal(dr_chain_length(o.disk), 2);
    faultfs_observe(f, NULL, NULL);
    write_bytes(o.disk, AFTER, 0x33);
    expect_bytes(o.disk, BEFORE, 0x11);
    expect_bytes(o.disk, BETWEEN, 0x22);
    refused(dr_flush(o.disk, &err), EIO, "a: a flush failed");
    assert_true(dr_close(o.disk, NULL) < 0);
    free(o.active);
    faultfs_free(f);
}

/* The metadata of the old image finds no space. */
static int fill_old_image(void *user, const struct faultfs_io *io)
{
    struct dr_disk *disk = user;
    struct dr_chain *chain = disk->chain;
    return io->kind == FAULTFS_WRITE && chain->n == 2 && strcmp(io->path, "a") == 0 ? -ENOSPC : 0;
}

/* A disk that goes on with a-child over a, which could not be frozen. */
static struct dr_disk *leave_unfrozen(struct faultfs *f, faultfs_observer fault, int code)
{
    struct dr_overlay o = {.path = "a-child"};
    const struct dr_job_options how = {.record = write_more};
    struct dr_job *job;
    make_disk(faultfs_fs(f), "a", "qcow2");
    ok(dr_open_fs(faultfs_fs(f), "a", &rw, &o.disk, &err));
    write_bytes(o.disk, BEFORE, 0x11);
    faultfs_observe(f, fault, o.disk);
    ok(dr_job_new(NULL, &how, &job, &err));
    refused(dr_disks_snapshot(&o, 1, job, &err), code, "a: the disk goes on with a-child, but");
    dr_job_free(job);
    faultfs_observe(f, NULL, NULL);
    free(o.active);
    assert_int_equal(dr_chain_length(o.disk), 2);
    assert_true(o.disk->chain->images[1]->writable);
    return o.disk;
}

/* A commit does not have the guest's flushes reach its base: that must not hide that it is lost. */
static void what_is_lost_with_the_old_image_is_told_whatever_is_tried(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    const struct dr_commit_options pivot = {.pivot = true};
    const struct dr_rebase_options lower = {.backing = "", .image = "a"};
    struct dr_disk *disk = leave_unfrozen(f, fail_old_image, EIO);
    refused(dr_disk_commit(disk, &pivot, NULL, &err), EIO, "a: ");
    refused(dr_flush(disk, &err), EIO, "a: a flush failed");
    refused(dr_disk_rebase(disk, &lower, NULL, &err), EIO, "a: ");
    refused(dr_flush(disk, &err), EIO, "a: a flush failed");
    refused(dr_disk_snapshot(disk, "a-second", NULL, NULL, NULL, &err), EIO, "a: a flush failed");
    refused(dr_flush(disk, &err), EIO, "a: a flush failed");
    assert_int_equal(dr_chain_length(disk), 2);
    assert_int_equal(count_files(*state), 2);
    assert_true(dr_close(disk, NULL) < 0);
    faultfs_free(f);
}

static void an_old_image_that_had_no_space_is_frozen_by_the_next_snapshot(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    char *active;
    struct dr_disk *disk = leave_unfrozen(f, fill_old_image, ENOSPC);
    ok(dr_disk_snapshot(disk, "a-second", NULL, &active, NULL, &err));
    assert_int_equal(dr_chain_length(disk), 3);
    assert_false(disk->chain->images[1]->writable);
    assert_false(disk->chain->images[2]->writable);
    expect_bytes(disk, BETWEEN, 0x22);
    ok(dr_close(disk, &err));
    free(active);
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_wait_for_no_file),
        cmocka_unit_test(the_instant_of_a_backup_waits_for_no_file),
        cmocka_unit_test(a_guest_writes_while_bitmaps_beside_its_disk_change),
        ops_test(no_request_waits_for_the_disk_inside_the_gate),
        cmocka_unit_test(a_pivot_gives_space_back_when_requests_go_on),
        cmocka_unit_test(what_was_flushed_is_safe_between_all_steps),
        cmocka_unit_test(a_flush_that_passes_the_old_image_over_is_caught),
        ops_test(a_failure_after_the_record_takes_it_back),
        ops_test(a_child_stays_while_it_is_recorded),
        ops_test(a_guest_whose_old_image_is_lost_is_told_by_its_flush),
        ops_test(what_is_lost_with_the_old_image_is_told_whatever_is_tried),
        ops_test(an_old_image_that_had_no_space_is_frozen_by_the_next_snapshot),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
