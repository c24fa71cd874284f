/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Operations on a disk that other threads read and write: what they read is what was written, all
 * the time and afterwards, and the operation has done its work. */
#include <fcntl.h>
#include <semaphore.h>
#include <sys/stat.h>
#include <unistd.h>

#include "faultfs.h"
#include "test-ops-crowd.h"

struct names {
    char base[40], mid[40], top[40], other[40];
};

static void make_on(struct dr_fs *fs, const char *path, const char *format, const char *backing)
{
    struct dr_create_options o = {.format = format,
                                  .size = backing ? 0 : CROWD_SIZE,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = backing ? format : NULL};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base <- mid <- top, and other, all with some data of their own. */
static struct names make_disks(struct dr_fs *fs, const char *format)
{
    struct names n;
    snprintf(n.base, sizeof(n.base), "base.%s", format);
    snprintf(n.mid, sizeof(n.mid), "mid.%s", format);
    snprintf(n.top, sizeof(n.top), "top.%s", format);
    snprintf(n.other, sizeof(n.other), "other.%s", format);
    make_on(fs, n.base, format, NULL);
    put(fs, n.base, 0, 2 * MiB, 0x11);
    make_on(fs, n.mid, format, n.base);
    put(fs, n.mid, 500 * KiB, 700 * KiB, 0x22);
    make_on(fs, n.top, format, n.mid);
    put(fs, n.top, 100 * KiB, 300 * KiB, 0x33);
    put(fs, n.top, 1 * MiB, 128 * KiB, 0);
    make_on(fs, n.other, format, NULL);
    put(fs, n.other, 64 * KiB, 2 * MiB, 0x44);
    put(fs, n.other, 700 * KiB, 300 * KiB, 0x11);
    return n;
}

/* The disks of one format, and the crowd that uses one of them. */
struct rig {
    struct dr_fs *fs;
    const char *format;
    struct names n;
    struct crowd c;
};

static int set_up(void **state)
{
    static struct rig g;
    g = (struct rig){.fs = dr_fs_memory_new(), .format = *state};
    g.n = make_disks(g.fs, g.format);
    *state = &g;
    return 0;
}

static int take_down(void **state)
{
    struct rig *g = *state;
    dr_fs_memory_free(g->fs);
    return 0;
}

#define WITH(form, test)                                                      \
    {                                                                         \
        .name = #test " (" form ")", .test_func = test, .setup_func = set_up, \
        .teardown_func = take_down, .initial_state = form                     \
    }
#define FOR_EACH_FORMAT(test) WITH("vmdk", test), WITH("add-cow", test), WITH("qcow2", test)

/* ------------------------------------------------------------------ rebase, stream */

static void a_rebase_keeps_what_is_written_meanwhile(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    crowd_begin(c, g->fs, n->top);
    struct dr_rebase_options to = {.backing = n->other, .backing_format = g->format};
    ok(dr_disk_rebase(c->disk, &to, NULL, &err));
    assert_string_equal(dr_image_path(c->disk, 1), n->other);
    assert_int_equal(dr_chain_length(c->disk), 2);
    crowd_pass(c, 5);
    to.backing = n->mid;
    to.drop_equal = true;
    ok(dr_disk_rebase(c->disk, &to, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 3);
    crowd_end(c, n->top);
}

static void a_stream_keeps_what_is_written_meanwhile(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    crowd_begin(c, g->fs, n->top);
    struct dr_stream_options onto = {.base = n->base};
    ok(dr_disk_stream(c->disk, &onto, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 2);
    assert_string_equal(dr_image_backing_name(c->disk, 0), n->base);
    crowd_pass(c, 5);
    ok(dr_disk_stream(c->disk, NULL, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 1);
    assert_null(dr_image_backing_name(c->disk, 0));
    /* nobody needs the parents any more */
    ok(g->fs->ops->unlink(g->fs, n->base, &err));
    crowd_end(c, n->top);
}

/* What such a disk discards is forgotten, not zero: the new parent must not show there. */
static void a_disk_without_a_parent_gets_one_while_it_is_used(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    crowd_begin(c, g->fs, n->base);
    struct dr_rebase_options to = {.backing = n->other, .backing_format = g->format};
    ok(dr_disk_rebase(c->disk, &to, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 2);
    crowd_end(c, n->base);
}

static int stop_at_once(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)done;
    (void)total;
    return 1;
}

static void a_cancelled_stream_leaves_the_open_disk_on_its_parents(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    struct crowd c;
    struct dr_job job = {.progress = stop_at_once};
    crowd_begin(&c, fs, n.top);
    refused(dr_disk_stream(c.disk, NULL, &job, &err), ECANCELED, "stopped");
    assert_int_equal(dr_chain_length(c.disk), 3);
    crowd_pass(&c, 5);
    ok(dr_disk_stream(c.disk, NULL, NULL, &err)); /* the claim was given back */
    crowd_end(&c, n.top);
}

static void what_cannot_be_done_to_an_open_disk_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    struct dr_open_options o = {0};
    struct dr_disk *disk = NULL;
    struct dr_rebase_options to = {.backing = n.other};
    ok(dr_open_fs(fs, n.top, &o, &disk, &err));
    refused(dr_disk_rebase(disk, &to, NULL, &err), EROFS, "reading only");
    refused(dr_disk_stream(disk, NULL, NULL, &err), EROFS, "reading only");
    ok(dr_close(disk, &err));
    o.flags = DR_OPEN_RDWR | DR_OPEN_NO_BACKING;
    ok(dr_open_fs(fs, n.top, &o, &disk, &err));
    refused(dr_disk_stream(disk, NULL, NULL, &err), EINVAL, "without its backing file");
    ok(dr_disk_claim(disk, "another job", &err));
    refused(dr_disk_rebase(disk, &to, NULL, &err), EBUSY, "another job");
    dr_disk_unclaim(disk);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ shared with writers */

/* A disk that was rebased on a parent which others may write. */
static struct dr_disk *open_on_shared(struct dr_fs *fs, const char *other)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_rebase_options to = {
        .backing = other, .backing_format = "vmdk", .force_share = true};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "top.vmdk", &rw, &disk, &err));
    ok(dr_disk_rebase(disk, &to, NULL, &err));
    return disk;
}

static void nothing_is_committed_into_an_image_that_others_have_written(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "old.vmdk", "vmdk", MiB, NULL);
    make(fs, "other.vmdk", "vmdk", MiB, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "old.vmdk");
    struct dr_disk *disk = open_on_shared(fs, "other.vmdk");
    put(fs, "other.vmdk", 65536, 65536, 0x11);
    refused(dr_disk_commit(disk, NULL, NULL, &err), EBUSY, "another program wrote to other.vmdk");
    refused(dr_disk_commit(disk, NULL, NULL, &err), EBUSY, "another program wrote to other.vmdk");
    ok(dr_close(disk, &err));
}

/* A write in place, which only the time of the last change tells of. */
static void a_write_in_place_by_others_is_noticed_too(void **state)
{
    struct dr_fs *fs = dr_fs_posix();
    const struct timespec long_ago[2] = {{1000, 0}, {1000, 0}};
    char dir[] = "/tmp/drover-shared-XXXXXX";
    int old = open(".", O_RDONLY | O_DIRECTORY);
    (void)state;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(chdir(dir), 0);
    make(fs, "old.vmdk", "vmdk", MiB, NULL);
    make(fs, "other.vmdk", "vmdk", MiB, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "old.vmdk");
    put(fs, "other.vmdk", 65536, 65536, 0x11);
    assert_int_equal(utimensat(AT_FDCWD, "other.vmdk", long_ago, 0), 0);
    struct dr_disk *disk = open_on_shared(fs, "other.vmdk");
    put(fs, "other.vmdk", 65536, 65536, 0x22);
    refused(dr_disk_commit(disk, NULL, NULL, &err), EBUSY, "another program wrote to other.vmdk");
    ok(dr_close(disk, &err));
    static const char *const files[] = {"old.vmdk", "other.vmdk", "top.vmdk"};
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(unlink(files[i]), 0);
    assert_int_equal(fchdir(old), 0);
    close(old);
    assert_int_equal(rmdir(dir), 0);
}

static void an_image_that_nobody_has_written_is_committed_into_twice(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "old.vmdk", "vmdk", MiB, NULL);
    make(fs, "other.vmdk", "vmdk", MiB, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "old.vmdk");
    struct dr_disk *disk = open_on_shared(fs, "other.vmdk");
    for (int i = 0; i < 2; i++) {
        ok(dr_pwrite(disk, "abc", (uint64_t)i * 65536, 3, 0, &err));
        ok(dr_disk_commit(disk, NULL, NULL, &err));
    }
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ snapshot */

static void a_disk_goes_on_with_its_snapshots_while_it_is_used(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    char *active[3] = {NULL};
    crowd_begin(c, g->fs, n->top);
    for (size_t i = 0; i < 3; i++) {
        ok(dr_disk_snapshot(c->disk, NULL, NULL, &active[i], NULL, &err));
        assert_int_equal(dr_chain_length(c->disk), 4 + i);
        assert_string_equal(dr_image_path(c->disk, 0), active[i]);
        crowd_pass(c, 5);
    }
    assert_string_equal(dr_image_path(c->disk, 3), n->top);
    crowd_end(c, active[2]);
    for (size_t i = 0; i < 3; i++)
        free(active[i]);
}

/* What was active can be read by others from then on, holds what the disk held, and stays so. */
static void the_frozen_layer_holds_the_moment_of_the_snapshot(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    char *active = NULL;
    uint8_t then[4096], later[4096];
    memset(then, 0xaa, sizeof(then));
    memset(later, 0xbb, sizeof(later));
    ok(dr_open_fs(fs, n.top, &rw, &disk, &err));
    ok(dr_pwrite(disk, then, 1000, sizeof(then), 0, &err));
    ok(dr_disk_snapshot(disk, "now.vmdk", NULL, &active, NULL, &err));
    assert_string_equal(active, "now.vmdk");
    ok(dr_pwrite(disk, later, 1000, sizeof(later), 0, &err));
    uint64_t size;
    uint8_t *frozen = view(fs, n.top, &size);
    assert_memory_equal(frozen + 1000, then, sizeof(then));
    free(frozen);
    refused(dr_disk_snapshot(disk, "now.vmdk", NULL, NULL, NULL, &err), EEXIST, "now.vmdk");
    ok(dr_close(disk, &err));
    frozen = view(fs, active, &size);
    assert_memory_equal(frozen + 1000, later, sizeof(later));
    free(frozen);
    free(active);
}

struct late_writer {
    struct dr_disk *disk;
    bool wrote;
};

/* The child is complete, and the disk has not gone on with it. */
static int write_once(void *user, const struct faultfs_io *io)
{
    struct late_writer *w = user;
    if (io->kind != FAULTFS_LIST || !strstr(io->path, ".drover.new-") || w->wrote)
        return 0;
    w->wrote = true;
    ok(dr_pwrite(w->disk, "late", 1000, 4, 0, &err));
    return 0;
}

/* The first write of all gives the parent a new id, after the child has noted the old one. */
static void a_snapshot_is_a_child_of_what_its_parent_became(void **state)
{
    struct dr_fs *memory = *state;
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    struct names n = make_disks(fs, "vmdk");
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct late_writer w = {0};
    ok(dr_open_fs(fs, n.top, &rw, &w.disk, &err));
    faultfs_observe(f, write_once, &w);
    ok(dr_disk_snapshot(w.disk, "child.vmdk", NULL, NULL, NULL, &err));
    faultfs_observe(f, NULL, NULL);
    assert_true(w.wrote);
    ok(dr_close(w.disk, &err));
    uint64_t size;
    uint8_t *have = view(fs, "child.vmdk", &size);
    assert_memory_equal(have + 1000, "late", 4);
    free(have);
    faultfs_free(f);
}

static void a_snapshot_that_cannot_be_made_leaves_the_disk_in_use(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    struct crowd c;
    crowd_begin(&c, fs, n.top);
    size_t files = count_files(fs);
    refused(dr_disk_snapshot(c.disk, "a/b", NULL, NULL, NULL, &err), EINVAL, "plain file name");
    refused(dr_disk_snapshot(c.disk, n.other, NULL, NULL, NULL, &err), EEXIST, n.other);
    assert_int_equal(dr_chain_length(c.disk), 3);
    assert_int_equal(count_files(fs), files);
    crowd_end(&c, n.top);
}

/* ------------------------------------------------------------------ commit */

static void a_commit_keeps_what_is_written_meanwhile(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    crowd_begin(c, g->fs, n->top);
    for (unsigned i = 0; i < 3; i++) {
        ok(dr_disk_commit(c->disk, NULL, NULL, &err));
        assert_int_equal(dr_chain_length(c->disk), 3);
        crowd_pass(c, 5);
    }
    const struct dr_commit_options deep = {.base = n->base};
    ok(dr_disk_commit(c->disk, &deep, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 3);
    crowd_end(c, n->top);
}

#define FAST_GRAINS 512u /* 32 MiB, which the guest changes whenever some of them are copied */

/* A guest that changes more than is copied, as long as it may. */
struct fast_guest {
    struct dr_disk *disk;
    pthread_t thread;
    sem_t wake;
    _Atomic bool wanted, end;
    _Atomic uint64_t held, most_held; /* bytes written to the base while requests waited */
    _Atomic uint64_t opened;          /* how often they had waited then */
};

static void change_all(struct fast_guest *g)
{
    struct dr_error err = DR_ERROR_INIT;
    for (uint64_t i = 0; i < FAST_GRAINS; i++)
        if (dr_pwrite(g->disk, "guest", i * 64 * KiB, 5, 0, &err) < 0)
            fail_msg("%s", err.text);
}

static void *be_fast(void *user)
{
    struct fast_guest *g = user;
    for (;;) {
        while (sem_wait(&g->wake) < 0)
            continue;
        if (atomic_load(&g->end))
            return NULL;
        atomic_store(&g->wanted, false);
        change_all(g);
    }
}

static int see_base_written(void *user, const struct faultfs_io *io)
{
    struct fast_guest *g = user;
    bool data = io->kind == FAULTFS_WRITE || io->kind == FAULTFS_COPY;
    if (!data || io->len < 4 * KiB || !strstr(io->path, "base.vmdk"))
        return 0;
    if (!atomic_load(&g->disk->closed)) {
        if (!atomic_exchange(&g->wanted, true))
            sem_post(&g->wake);
        return 0;
    }
    pthread_mutex_lock(&g->disk->gate_lock);
    uint64_t opened = g->disk->opened;
    pthread_mutex_unlock(&g->disk->gate_lock);
    if (atomic_exchange(&g->opened, opened) != opened)
        atomic_store(&g->held, 0);
    uint64_t held = atomic_fetch_add(&g->held, io->len) + io->len;
    if (held > atomic_load(&g->most_held))
        atomic_store(&g->most_held, held);
    return 0;
}

static void a_commit_hardly_holds_a_guest_that_is_faster_than_it(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct dr_fs *fs = faultfs_fs(f);
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct fast_guest g = {0};
    uint8_t got[5];
    make(fs, "base.vmdk", "vmdk", 64 * MiB, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "base.vmdk");
    ok(dr_open_fs(fs, "top.vmdk", &rw, &g.disk, &err));
    change_all(&g);
    sem_init(&g.wake, 0, 0);
    assert_int_equal(pthread_create(&g.thread, NULL, be_fast, &g), 0);
    faultfs_observe(f, see_base_written, &g);
    ok(dr_disk_commit(g.disk, NULL, NULL, &err));
    atomic_store(&g.end, true);
    sem_post(&g.wake);
    pthread_join(g.thread, NULL);
    faultfs_observe(f, NULL, NULL);
    sem_destroy(&g.wake);
    assert_in_range(g.most_held, 0, 2 * MiB);
    for (uint64_t i = 0; i < FAST_GRAINS; i++) {
        ok(dr_pread(g.disk, got, i * 64 * KiB, 5, &err));
        assert_memory_equal(got, "guest", 5);
    }
    ok(dr_close(g.disk, &err));
    faultfs_free(f);
}

static void layers_below_the_active_one_go_down_while_it_is_used(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    char *active = NULL;
    uint64_t size;
    uint8_t *mid = view(g->fs, n->mid, &size);
    crowd_begin(c, g->fs, n->top);
    ok(dr_disk_snapshot(c->disk, NULL, NULL, &active, NULL, &err));
    /* mid into base, below a frozen top: active <- top <- base */
    const struct dr_commit_options middle = {.top = n->mid, .base = n->base};
    ok(dr_disk_commit(c->disk, &middle, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 3);
    assert_string_equal(dr_image_path(c->disk, 2), n->base);
    same_view(g->fs, n->base, mid, size);
    crowd_pass(c, 5);
    ok(g->fs->ops->unlink(g->fs, n->mid, &err)); /* nobody needs it any more */
    /* top into base, right below what is written to: active <- base */
    const struct dr_commit_options second = {.top = n->top};
    ok(dr_disk_commit(c->disk, &second, NULL, &err));
    assert_int_equal(dr_chain_length(c->disk), 2);
    ok(g->fs->ops->unlink(g->fs, n->top, &err));
    crowd_end(c, active);
    free(active);
    free(mid);
}

struct late_guest {
    struct dr_disk *disk;
    bool wrote;
};

/* When all is copied: what is written now was copied before. */
static int write_at_the_end(void *user, uint64_t done, uint64_t total)
{
    struct late_guest *g = user;
    if (done < total || g->wrote)
        return 0;
    g->wrote = true;
    ok(dr_pwrite(g->disk, "late", 150 * KiB, 4, 0, &err));
    ok(dr_zero(g->disk, 300 * KiB, 20 * KiB, 0, &err));
    ok(dr_discard(g->disk, 192 * KiB, 64 * KiB, &err));
    return 0;
}

static void change_after_the_copy(const struct rig *g, bool keep)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_commit_options o = {.keep = keep};
    struct late_guest guest = {0};
    struct dr_job job = {.progress = write_at_the_end, .user = &guest};
    uint64_t size = CROWD_SIZE;
    uint8_t *want = malloc(size);
    ok(dr_open_fs(g->fs, g->n.top, &rw, &guest.disk, &err));
    ok(dr_disk_commit(guest.disk, &o, &job, &err));
    assert_true(guest.wrote);
    ok(dr_pread(guest.disk, want, 0, size, &err));
    assert_memory_equal(want + 150 * KiB, "late", 4);
    assert_int_equal(want[300 * KiB], 0);
    assert_int_equal(want[192 * KiB + 100], 0);
    struct dr_extent_status status;
    ok(dr_block_status(guest.disk, 128 * KiB, 64 * KiB, &status, &err));
    assert_int_equal(status.depth, keep ? 0 : 1);
    ok(dr_close(guest.disk, &err));
    same_view(g->fs, g->n.mid, want, size);
    same_view(g->fs, g->n.top, want, size);
    free(want);
}

static void what_changes_after_it_was_copied_is_copied_again(void **state)
{
    change_after_the_copy(*state, false);
}

static void the_base_holds_all_of_a_disk_that_is_kept(void **state)
{
    change_after_the_copy(*state, true);
}

static void a_cancelled_commit_leaves_the_disk_in_use_and_goes_on_later(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    struct dr_job job = {.progress = stop_at_once};
    crowd_begin(c, g->fs, n->top);
    refused(dr_disk_commit(c->disk, NULL, &job, &err), ECANCELED, "stopped");
    crowd_pass(c, 5);
    struct dr_disk *reader = NULL; /* what was thawed is frozen again */
    ok(dr_open_fs(g->fs, n->mid, NULL, &reader, &err));
    ok(dr_close(reader, &err));
    ok(dr_disk_commit(c->disk, NULL, NULL, &err));
    crowd_end(c, n->top);
}

static void a_commit_of_no_member_of_the_chain_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct names n = make_disks(fs, "vmdk");
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_commit_options commit = {.top = n.other};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, n.top, &o, &disk, &err));
    refused(dr_disk_commit(disk, &commit, NULL, &err), EINVAL, n.other);
    commit.top = n.base;
    refused(dr_disk_commit(disk, &commit, NULL, &err), EINVAL, n.base);
    commit = (struct dr_commit_options){.top = n.mid, .base = n.top};
    refused(dr_disk_commit(disk, &commit, NULL, &err), EINVAL, n.top);
    ok(dr_close(disk, &err));
    o.flags = 0;
    ok(dr_open_fs(fs, n.top, &o, &disk, &err));
    refused(dr_disk_commit(disk, NULL, NULL, &err), EROFS, "reading only");
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ info, check, compare */

static void an_open_disk_is_described_and_checked_while_it_is_used(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    crowd_begin(c, g->fs, n->top);
    for (unsigned i = 0; i < 5; i++) {
        char *json = NULL;
        ok(dr_disk_info(c->disk, NULL, true, &json, &err));
        assert_non_null(strstr(json, n->base));
        free(json);
        ok(dr_disk_check(c->disk, NULL, NULL, &json, NULL, &err));
        assert_null(strstr(json, "corruptions"));
        static const char *const keys[] = {"check-errors", "filename", "format"};
        for (size_t k = 0; k < 3; k++)
            assert_non_null(strstr(json, keys[k]));
        if (strcmp(g->format, "add-cow") == 0)
            assert_non_null(strstr(json, "image-end-offset"));
        free(json);
        crowd_pass(c, 2);
    }
    crowd_end(c, n->top);
}

/* ------------------------------------------------------------------ resize */

static void a_disk_grows_while_it_is_used(void **state)
{
    struct rig *g = *state;
    const struct names *n = &g->n;
    struct crowd *c = &g->c;
    crowd_begin(c, g->fs, n->top);
    for (unsigned i = 1; i <= 3; i++) {
        struct dr_error err = DR_ERROR_INIT;
        int r = dr_truncate(c->disk, CROWD_SIZE + i * 100 * KiB, &err);
        if (r == -ENOTSUP)
            break; /* not every format can */
        if (r < 0)
            fail_msg("%s", err.text);
        assert_int_equal(dr_size(c->disk), CROWD_SIZE + i * 100 * KiB);
        crowd_pass(c, 2);
    }
    crowd_end(c, n->top);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        FOR_EACH_FORMAT(a_rebase_keeps_what_is_written_meanwhile),
        FOR_EACH_FORMAT(a_stream_keeps_what_is_written_meanwhile),
        FOR_EACH_FORMAT(a_disk_without_a_parent_gets_one_while_it_is_used),
        ops_test(a_cancelled_stream_leaves_the_open_disk_on_its_parents),
        FOR_EACH_FORMAT(a_disk_goes_on_with_its_snapshots_while_it_is_used),
        ops_test(a_commit_hardly_holds_a_guest_that_is_faster_than_it),
        ops_test(nothing_is_committed_into_an_image_that_others_have_written),
        ops_test(a_write_in_place_by_others_is_noticed_too),
        ops_test(an_image_that_nobody_has_written_is_committed_into_twice),
        ops_test(the_frozen_layer_holds_the_moment_of_the_snapshot),
        ops_test(a_snapshot_is_a_child_of_what_its_parent_became),
        ops_test(a_snapshot_that_cannot_be_made_leaves_the_disk_in_use),
        FOR_EACH_FORMAT(a_commit_keeps_what_is_written_meanwhile),
        FOR_EACH_FORMAT(layers_below_the_active_one_go_down_while_it_is_used),
        FOR_EACH_FORMAT(what_changes_after_it_was_copied_is_copied_again),
        FOR_EACH_FORMAT(the_base_holds_all_of_a_disk_that_is_kept),
        FOR_EACH_FORMAT(a_cancelled_commit_leaves_the_disk_in_use_and_goes_on_later),
        ops_test(a_commit_of_no_member_of_the_chain_is_refused),
        FOR_EACH_FORMAT(an_open_disk_is_described_and_checked_while_it_is_used),
        FOR_EACH_FORMAT(a_disk_grows_while_it_is_used),
        ops_test(what_cannot_be_done_to_an_open_disk_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
