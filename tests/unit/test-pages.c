/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The page cache and the flush order, through a driver that maps nothing but owns a metadata file.
 * A file system in front of the one in memory writes down what happens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/internal.h"

#define PAGE DR_PAGE_SIZE

static char journal[4096]; /* what reached the file, one word an event */
static struct dr_image *edit_during_flush;
static int fail_flush, fail_write; /* the how manyeth from now fails; 0 = none */

/* ------------------------------------------------------------------ a file that writes a journal
 */

static const struct dr_file_ops *real_ops;

static int noting_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    char word[64];
    uint64_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    snprintf(word, sizeof(word), "w%llu+%llu ", (unsigned long long)off, (unsigned long long)len);
    strcat(journal, word);
    if (fail_write && --fail_write == 0)
        return -ENOSPC;
    return real_ops->pwritev(f, iov, n, off);
}

static void put_byte(struct dr_image *image, uint64_t off, uint8_t byte, unsigned level)
{
    struct dr_page *page;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_hold hold = {0};
    pthread_mutex_lock(&image->lock);
    for (;;) {
        int r = dr_page_get(image, 0, off, &page);
        if (r == 0)
            r = dr_page_pin(image, page, off, 1, level);
        if (r == 0)
            break;
        assert_int_equal(r, -EAGAIN);
        assert_int_equal(dr_image_satisfy(image, &hold, 0, &err), 0);
    }
    dr_hold_end(&hold);
    dr_page_put(image, page, off, &byte, 1);
    dr_page_unpin(image, page, off, 1);
    pthread_mutex_unlock(&image->lock);
}

/* More pages than may be in memory. */
#define MANY 20000u

static struct dr_image *press_during_flush;
static bool clean_went;

static void load_many(struct dr_image *image)
{
    for (uint64_t i = 100; i < MANY; i++) {
        struct dr_page *page;
        pthread_mutex_lock(&image->lock);
        while (dr_page_get(image, 0, i * PAGE, &page) == -EAGAIN)
            assert_int_equal(dr_image_satisfy(image, NULL, 0, NULL), 0);
        pthread_mutex_unlock(&image->lock);
    }
}

static bool in_memory(struct dr_image *image, uint64_t off)
{
    struct dr_page *page;
    pthread_mutex_lock(&image->lock);
    int r = dr_page_get(image, 0, off, &page);
    image->need.kind = DR_NEED_NONE;
    pthread_mutex_unlock(&image->lock);
    return r == 0;
}

/* A driver puts a new file in the place of the one that a call is at work on. */
static struct dr_image *replaced;
static const char *replaced_at; /* the call */
static bool closed;

static void noting_close(struct dr_file *f)
{
    closed = true;
    real_ops->close(f);
}

static void replace_file(const char *call)
{
    struct dr_image *image = replaced;
    if (!image || strcmp(call, replaced_at) != 0)
        return;
    replaced = NULL;
    struct dr_file *old = image->files[0], *fresh;
    assert_int_equal(dr_file_open(image->fs, "/fresh", DR_FILE_CREATE, &fresh, NULL), 0);
    pthread_mutex_lock(&image->lock);
    image->files[0] = fresh;
    pthread_mutex_unlock(&image->lock);
    dr_file_unref(old);
    if (closed) { /* to go on would be to use what was freed */
        fprintf(stderr, "a file was closed while it was in use\n");
        _exit(1);
    }
}

static const struct dr_fs_ops *real_fs_ops;
static int fail_sync_dir; /* an errno; 0 = no */

static int noting_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    replace_file("sync_dir");
    if (fail_sync_dir)
        return dr_fail(err, fail_sync_dir, "%s: cannot be made durable", path);
    return real_fs_ops->sync_dir(fs, path, err);
}

static struct dr_fs_ops noting_fs_ops;

static int noting_flush(struct dr_file *f)
{
    strcat(journal, "f ");
    replace_file("flush");
    if (press_during_flush) {
        struct dr_image *pressed = press_during_flush;
        press_during_flush = NULL;
        load_many(pressed);
        clean_went = !in_memory(pressed, 7 * PAGE);
        if (!in_memory(pressed, 5 * PAGE)) { /* to go on would be to use what was freed */
            fprintf(stderr, "a page was evicted on its way to the file\n");
            _exit(1);
        }
    }
    if (fail_flush && --fail_flush == 0)
        return -EIO;
    struct dr_image *image = edit_during_flush;
    edit_during_flush = NULL;
    if (image)
        put_byte(image, 0, 0x99, 2);
    return real_ops->flush(f);
}

/* While the bytes of a page are on their way into memory somebody else makes a new table of it,
 * flushes that, and it is evicted. */
static struct dr_image *overtake_load;

/* A second thread misses the page that is on its way into memory. */
static struct dr_image *miss_during_load;
static void start_second_reader(struct dr_image *image, uint64_t off);

static unsigned n_reads, n_extents;
static uint64_t bad_page; /* reads that touch it fail; 0 = none */

static int noting_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                         uint64_t *run)
{
    n_extents++;
    return real_ops->extent(f, off, len, kind, run);
}

static ssize_t noting_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    n_reads++;
    if (bad_page && off <= bad_page && bad_page < off + len)
        return -EIO;
    replace_file("pread");
    struct dr_image *missing = miss_during_load;
    miss_during_load = NULL;
    if (missing)
        start_second_reader(missing, off);
    ssize_t n = real_ops->pread(f, buf, off, len);
    struct dr_image *image = overtake_load;
    overtake_load = NULL;
    if (image) {
        struct dr_page *page;
        uint8_t byte = 0x55;
        pthread_mutex_lock(&image->lock);
        assert_int_equal(dr_page_new(image, 0, off, PAGE, 2, &page), 0);
        dr_page_put(image, page, off, &byte, 1);
        dr_page_unpin(image, page, off, PAGE);
        pthread_mutex_unlock(&image->lock);
        assert_int_equal(dr_image_flush(image, NULL), 0);
        pthread_mutex_lock(&image->lock);
        dr_page_forget(image, 0, off, PAGE);
        pthread_mutex_unlock(&image->lock);
    }
    return n;
}

static struct dr_file_ops noting_ops;

/* ------------------------------------------------------------------ a driver */

static int fake_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)buf, (void)len, (void)path;
    return 0;
}

static int fake_open(struct dr_image *image, struct dr_error *err)
{
    (void)err;
    image->size = 1 << 20;
    return 0;
}

static const struct dr_format fake = {
    .name = "fake", .flags = DR_FORMAT_WRITE, .probe = fake_probe, .open = fake_open};

static void few_pages(uint64_t bytes)
{
    struct dr_cache_limits limits = {.metadata = bytes};
    assert_int_equal(dr_set_cache_limits(&limits, NULL), 0);
}

struct world {
    struct dr_fs *fs;
    struct dr_image *image;
};

static int setup(void **state)
{
    static struct world w;
    struct dr_file *f;
    struct dr_error err = DR_ERROR_INIT;
    w.fs = dr_fs_memory_new();
    assert_int_equal(dr_file_open(w.fs, "/m", DR_FILE_CREATE, &f, &err), 0);
    assert_int_equal(dr_file_truncate(f, 64 * PAGE, &err), 0);
    assert_int_equal(dr_file_pwrite(f, "abc", 20 * PAGE, 3, &err), 0);
    assert_int_equal(dr_file_flush(f, &err), 0);
    dr_file_unref(f);
    dr_format_register(&fake);
    assert_int_equal(dr_image_open(w.fs, "/m", "fake", DR_OPEN_RDWR, &w.image, &err), 0);
    f = w.image->files[0];
    real_ops = f->ops;
    noting_ops = *f->ops;
    noting_ops.pwritev = noting_pwritev;
    noting_ops.flush = noting_flush;
    noting_ops.pread = noting_pread;
    noting_ops.extent = noting_extent;
    noting_ops.close = noting_close;
    f->ops = &noting_ops;
    real_fs_ops = w.fs->ops;
    noting_fs_ops = *w.fs->ops;
    noting_fs_ops.sync_dir = noting_sync_dir;
    w.fs->ops = &noting_fs_ops;
    closed = false;
    fail_sync_dir = 0;
    journal[0] = '\0';
    fail_flush = fail_write = 0;
    n_reads = n_extents = 0;
    few_pages(64 << 20);
    *state = &w;
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;
    dr_image_unref(w->image, NULL);
    dr_format_register(NULL);
    dr_fs_memory_free(w->fs);
    return 0;
}

static uint8_t stored_byte(struct world *w, uint64_t off)
{
    uint8_t byte;
    assert_int_equal(dr_file_pread(w->image->files[0], &byte, off, 1, NULL), 0);
    return byte;
}

static int flush(struct world *w)
{
    return dr_image_flush(w->image, NULL);
}

/* ------------------------------------------------------------------ tests */

static void levels_go_out_in_order_with_a_flush_between(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 0 * PAGE, 1, 2);
    put_byte(w->image, 1 * PAGE, 2, 0);
    put_byte(w->image, 2 * PAGE, 3, 3);
    put_byte(w->image, 3 * PAGE, 4, 1);
    assert_int_equal(dr_file_pwrite(w->image->files[0], "data", 40 * PAGE, 4, NULL), 0);
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w163840+4 w4096+512 f w12288+512 f w0+512 f w8192+512 f ");
}

static void only_dirty_sectors_are_written(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 5 * PAGE + 513, 1, 2);
    put_byte(w->image, 5 * PAGE + 1023, 1, 2);
    put_byte(w->image, 5 * PAGE + 1024, 1, 2);
    put_byte(w->image, 5 * PAGE + 4095, 1, 2);
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w20992+1024 w24064+512 f ");
}

static void nothing_dirty_means_no_io(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 0, 1, 2);
    assert_int_equal(flush(w), 0);
    journal[0] = '\0';
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "");
}

/* The edit comes after the data of this flush was made durable: its own data may not be. */
static void an_edit_during_a_flush_waits_for_the_next_one(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 0, 0x11, 2);
    assert_int_equal(dr_file_pwrite(w->image->files[0], "data", 40 * PAGE, 4, NULL), 0);
    edit_during_flush = w->image; /* at the data flush, before the page goes out */
    assert_int_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 0), 0x11);
    assert_int_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 0), 0x99);
}

static void a_sector_dirty_at_another_level_is_flushed_first(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 0, 1, 2);
    put_byte(w->image, 1, 2, 0); /* satisfied by a flush inside */
    assert_string_equal(journal, "w0+512 f ");
    assert_int_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 0), 1);
    assert_int_equal(stored_byte(w, 1), 2);
}

static void a_failed_data_flush_is_sticky(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 0, 0x77, 2);
    assert_int_equal(dr_file_pwrite(w->image->files[0], "data", 40 * PAGE, 4, NULL), 0);
    fail_flush = 1;
    assert_int_not_equal(flush(w), 0);
    assert_int_not_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 0), 0); /* no level 2 page went out after it */
}

static void a_page_that_could_not_be_written_waits_for_the_next_flush(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 0, 0x77, 2);
    fail_write = 1;
    assert_int_equal(flush(w), -ENOSPC);
    assert_int_equal(stored_byte(w, 0), 0);
    assert_int_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 0), 0x77);
}

/* Old and new edits of the page would have to be written at different times. */
static void a_failed_page_with_edits_of_another_level_ends_the_session(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 1, 0x77, 1);
    assert_int_equal(dr_file_pwrite(w->image->files[0], "data", 40 * PAGE, 4, NULL), 0);
    edit_during_flush = w->image; /* the same page, level 2 */
    fail_write = 1;
    assert_int_equal(flush(w), -ENOSPC);
    assert_int_not_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 0), 0);
}

static uint64_t zero_until(struct world *w, uint64_t off)
{
    struct dr_page *page;
    pthread_mutex_lock(&w->image->lock);
    while (dr_page_get(w->image, 0, off, &page) == -EAGAIN)
        assert_int_equal(dr_image_satisfy(w->image, NULL, 0, NULL), 0);
    uint64_t end = dr_page_zero_until(w->image, page);
    pthread_mutex_unlock(&w->image->lock);
    return end;
}

static void a_page_on_its_way_to_the_file_is_not_evicted(void **state)
{
    struct world *w = *state;
    assert_int_equal(dr_file_truncate(w->image->files[0], (uint64_t)MANY * PAGE, NULL), 0);
    put_byte(w->image, 7 * PAGE, 0x70, 2);
    assert_int_equal(flush(w), 0); /* clean from now on */
    put_byte(w->image, 5 * PAGE, 0x77, 2);
    few_pages(1 << 20);
    load_many(w->image); /* it waits: not evicted either */
    assert_true(in_memory(w->image, 5 * PAGE));
    put_byte(w->image, 7 * PAGE, 0x70, 2);
    assert_int_equal(flush(w), 0);
    put_byte(w->image, 5 * PAGE, 0x78, 2);
    press_during_flush = w->image;
    assert_int_equal(flush(w), 0);
    assert_null(press_during_flush);
    assert_true(clean_went);
    assert_int_equal(stored_byte(w, 5 * PAGE), 0x78);
    assert_int_equal(stored_byte(w, 7 * PAGE), 0x70);
}

static void a_load_that_a_flush_overtook_is_done_again(void **state)
{
    struct world *w = *state;
    overtake_load = w->image;
    put_byte(w->image, 20 * PAGE + 1, 0x66, 2);
    assert_null(overtake_load);
    assert_int_equal(flush(w), 0);
    assert_int_equal(stored_byte(w, 20 * PAGE), 0x55);
    assert_int_equal(stored_byte(w, 20 * PAGE + 1), 0x66);
    assert_int_equal(stored_byte(w, 20 * PAGE + 2), 0);
}

static void a_hole_of_the_file_is_known_beyond_the_page(void **state)
{
    struct world *w = *state;
    assert_int_equal(zero_until(w, 2 * PAGE), 20 * PAGE);
    assert_int_equal(zero_until(w, 20 * PAGE), 20 * PAGE);
}

static void an_edit_ends_what_is_known_about_holes(void **state)
{
    struct world *w = *state;
    assert_int_equal(zero_until(w, 2 * PAGE), 20 * PAGE);
    put_byte(w->image, 10 * PAGE, 1, 2); /* in memory only: the file still shows the hole */
    assert_int_equal(zero_until(w, 2 * PAGE), 3 * PAGE);
    assert_int_equal(zero_until(w, 3 * PAGE), 4 * PAGE);
    assert_int_equal(zero_until(w, 10 * PAGE), 10 * PAGE);
}

static void neighbouring_whole_pages_are_one_write(void **state)
{
    struct world *w = *state;
    struct dr_page *page;
    pthread_mutex_lock(&w->image->lock);
    for (uint64_t i = 30; i < 34; i++) {
        assert_int_equal(dr_page_new(w->image, 0, i * PAGE, PAGE, 0, &page), 0);
        dr_page_unpin(w->image, page, i * PAGE, PAGE);
    }
    pthread_mutex_unlock(&w->image->lock);
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w122880+16384 f ");
}

static void a_page_that_is_dirty_in_part_joins_no_other(void **state)
{
    struct world *w = *state;
    uint8_t bytes[PAGE] = {1};
    struct dr_page *page;
    put_byte(w->image, 31 * PAGE - 1, 1, 2);
    put_byte(w->image, 32 * PAGE, 1, 2);
    put_byte(w->image, 31 * PAGE, 1, 2);
    pthread_mutex_lock(&w->image->lock);
    assert_int_equal(dr_page_get(w->image, 0, 31 * PAGE, &page), 0);
    assert_int_equal(dr_page_pin(w->image, page, 31 * PAGE, PAGE, 2), 0);
    dr_page_put(w->image, page, 31 * PAGE, bytes, PAGE);
    dr_page_unpin(w->image, page, 31 * PAGE, PAGE);
    pthread_mutex_unlock(&w->image->lock);
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w126464+512 w126976+4096 w131072+512 f ");
}

/* So where there is no space for it, no count of it is on disk. After a flush that got as far as
 * links it is one of those tables that may be in use. */
static void a_new_table_is_written_before_counts_until_it_may_be_linked(void **state)
{
    struct world *w = *state;
    struct dr_page *page;
    put_byte(w->image, 0, 1, 0);
    put_byte(w->image, 4 * PAGE, 2, 3);
    pthread_mutex_lock(&w->image->lock);
    assert_int_equal(dr_page_new(w->image, 0, 31 * PAGE, PAGE, 2, &page), 0);
    dr_page_unpin(w->image, page, 31 * PAGE, PAGE);
    pthread_mutex_unlock(&w->image->lock);
    fail_write = 1;
    assert_int_equal(flush(w), -ENOSPC);
    assert_string_equal(journal, "w126976+4096 ");
    fail_write = 3;
    journal[0] = 0;
    assert_int_equal(flush(w), -ENOSPC);
    assert_string_equal(journal, "w126976+4096 w0+512 f w16384+512 ");
    journal[0] = 0;
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w0+512 f w126976+4096 f w16384+512 f ");
}

/* A count of 512 bytes and a link to it, as formats with small units have them. */
static void sectors_of_one_page_may_have_different_levels(void **state)
{
    struct world *w = *state;
    put_byte(w->image, 512, 1, 0);
    put_byte(w->image, 1024, 2, 2);
    put_byte(w->image, 513, 3, 0);
    assert_string_equal(journal, "");
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w512+512 f w1024+512 f ");
}

static void a_new_table_leaves_the_rest_of_its_page_alone(void **state)
{
    struct world *w = *state;
    struct dr_page *page;
    pthread_mutex_lock(&w->image->lock);
    while (dr_page_new(w->image, 0, 20 * PAGE + 512, 512, 0, &page) == -EAGAIN)
        assert_int_equal(dr_image_satisfy(w->image, NULL, 0, NULL), 0);
    dr_page_unpin(w->image, page, 20 * PAGE + 512, 512);
    assert_memory_equal(dr_page_at(page, 20 * PAGE), "abc", 3);
    pthread_mutex_unlock(&w->image->lock);
    assert_int_equal(flush(w), 0);
    assert_string_equal(journal, "w82432+512 f ");
}

/* Pages full of bytes, so that each costs what it takes. */
static struct dr_image *second_image(struct world *w, unsigned pages)
{
    struct dr_file *f;
    struct dr_image *image;
    size_t len = (size_t)pages * PAGE;
    uint8_t *bytes = malloc(len);
    memset(bytes, 0x11, len);
    assert_int_equal(dr_file_open(w->fs, "/second", DR_FILE_CREATE, &f, NULL), 0);
    assert_int_equal(dr_file_pwrite(f, bytes, 0, len, NULL), 0);
    assert_int_equal(dr_file_pwrite(w->image->files[0], bytes, 0, len, NULL), 0);
    free(bytes);
    dr_file_unref(f);
    assert_int_equal(dr_image_open(w->fs, "/second", "fake", 0, &image, NULL), 0);
    return image;
}

static void load_pages(struct dr_image *image, unsigned first, unsigned n)
{
    for (uint64_t i = first; i < first + n; i++) {
        struct dr_page *page;
        pthread_mutex_lock(&image->lock);
        while (dr_page_get(image, 0, i * PAGE, &page) == -EAGAIN)
            assert_int_equal(dr_image_satisfy(image, NULL, 0, NULL), 0);
        pthread_mutex_unlock(&image->lock);
    }
}

static int needs_all(struct dr_image *image, unsigned n)
{
    struct dr_page *page;
    int r = 0;
    for (uint64_t i = 0; i < n && r == 0; i++)
        r = dr_page_get(image, 0, i * PAGE, &page);
    return r;
}

static void a_callback_that_needs_many_pages_gets_them_while_others_take_the_budget(void **state)
{
    struct world *w = *state;
    struct dr_hold hold = {0};
    struct dr_image *second = second_image(w, 600);
    unsigned rounds = 0;
    few_pages(1 << 20); /* about 250 pages */
    pthread_mutex_lock(&w->image->lock);
    while (needs_all(w->image, 512) == -EAGAIN) {
        assert_true(rounds++ < 512);
        assert_int_equal(dr_image_satisfy(w->image, &hold, 0, NULL), 0);
        pthread_mutex_unlock(&w->image->lock);
        load_pages(second, rounds % 300, 300);
        pthread_mutex_lock(&w->image->lock);
    }
    dr_hold_end(&hold);
    pthread_mutex_unlock(&w->image->lock);
    dr_image_unref(second, NULL);
}

static void pages_of_an_idle_image_go_before_those_of_a_busy_one(void **state)
{
    struct world *w = *state;
    struct dr_image *second = second_image(w, 600);
    few_pages(1 << 20);
    load_pages(second, 0, 250);
    dr_image_flush(second, NULL);
    for (unsigned i = 0; i < 4; i++)
        load_pages(w->image, 0, 200);
    n_reads = 0;
    load_pages(w->image, 0, 200);
    assert_int_equal(n_reads, 0);
    dr_image_unref(second, NULL);
}

/* The table that finds them grows several times meanwhile. */
static void a_page_is_read_once_however_many_there_are(void **state)
{
    struct world *w = *state;
    assert_int_equal(dr_file_truncate(w->image->files[0], 3000 * PAGE, NULL), 0);
    load_pages(w->image, 0, 3000);
    n_reads = 0;
    load_pages(w->image, 0, 3000);
    assert_int_equal(n_reads, 0);
}

static void pages_of_zeros_cost_less_than_their_size(void **state)
{
    struct world *w = *state;
    few_pages(1 << 20);
    load_pages(w->image, 1000, 1000);
    n_reads = 0;
    load_pages(w->image, 1000, 1000);
    assert_int_equal(n_reads, 0);
}

static void a_range_of_pages_is_read_in_large_pieces(void **state)
{
    struct world *w = *state;
    struct dr_image *second = second_image(w, 512);
    struct dr_hold hold = {0};
    n_reads = 0;
    pthread_mutex_lock(&w->image->lock);
    assert_int_equal(dr_page_get_all(w->image, 0, 0, 512 * PAGE), -EAGAIN);
    assert_int_equal(dr_image_satisfy(w->image, &hold, 0, NULL), 0);
    assert_int_equal(dr_page_get_all(w->image, 0, 0, 512 * PAGE), 0);
    dr_hold_end(&hold);
    pthread_mutex_unlock(&w->image->lock);
    assert_int_equal(n_reads, 8);
    dr_image_unref(second, NULL);
}

static void a_page_of_data_costs_one_read_and_no_question_about_holes(void **state)
{
    struct world *w = *state;
    load_pages(w->image, 20, 1);
    assert_int_equal(n_reads, 1);
    assert_int_equal(n_extents, 0);
}

static uint8_t cached_byte(struct dr_image *image, uint64_t off)
{
    struct dr_page *page;
    DR_LOCK_SCOPE(&image->lock);
    assert_int_equal(dr_page_get(image, 0, off, &page), 0);
    return *dr_page_at(page, off);
}

static void pages_inside_a_known_hole_are_not_read(void **state)
{
    struct world *w = *state;
    load_pages(w->image, 2, 1);
    assert_int_equal(n_reads, 1);
    assert_int_equal(n_extents, 1);
    load_pages(w->image, 10, 10);
    assert_int_equal(n_reads, 1);
    assert_int_equal(n_extents, 1);
    assert_int_equal(zero_until(w, 12 * PAGE), 20 * PAGE);
    load_pages(w->image, 20, 1); /* the hole ends here */
    assert_int_equal(n_reads, 2);
    assert_int_equal(cached_byte(w->image, 20 * PAGE), 'a');
}

static void what_is_known_of_a_hole_ends_with_an_edit(void **state)
{
    struct world *w = *state;
    load_pages(w->image, 2, 1);
    put_byte(w->image, 10 * PAGE, 1, 2);
    assert_int_equal(flush(w), 0);
    pthread_mutex_lock(&w->image->lock);
    dr_page_forget(w->image, 0, 10 * PAGE, PAGE);
    pthread_mutex_unlock(&w->image->lock);
    load_pages(w->image, 10, 1);
    assert_int_equal(cached_byte(w->image, 10 * PAGE), 1);
}

/* One read and one question for a page of data and the hole behind it. */
static void a_page_behind_a_hole_is_read_together_with_the_next(void **state)
{
    struct world *w = *state;
    load_pages(w->image, 2, 1);
    load_pages(w->image, 20, 1);
    n_reads = n_extents = 0;
    assert_int_equal(zero_until(w, 21 * PAGE), 64 * PAGE);
    assert_int_equal(n_reads, 0);
    assert_int_equal(n_extents, 0);
}

static void pages_wanted_one_after_the_other_are_read_several_at_once(void **state)
{
    struct world *w = *state;
    struct dr_image *second = second_image(w, 512);
    load_pages(w->image, 0, 512);
    assert_true(n_reads <= 4 + 512 / 8);
    dr_image_unref(second, NULL);
}

static void a_page_that_nobody_asked_for_may_be_unreadable(void **state)
{
    struct world *w = *state;
    load_pages(w->image, 2, 1);
    bad_page = 21 * PAGE;
    load_pages(w->image, 20, 1);
    bad_page = 0;
    assert_int_equal(cached_byte(w->image, 20 * PAGE), 'a');
    assert_false(in_memory(w->image, 21 * PAGE));
}

static pthread_t second_reader;
static bool second_misses; /* under the image's lock */

static void *read_second(void *user)
{
    struct dr_image *image = user;
    struct dr_page *page;
    pthread_mutex_lock(&image->lock);
    int r = dr_page_get(image, 0, 20 * PAGE, &page);
    second_misses = true;
    if (r == -EAGAIN)
        r = dr_image_satisfy(image, NULL, 0, NULL);
    pthread_mutex_unlock(&image->lock);
    return r == 0 ? image : NULL;
}

/* Returns when the second thread has given up the lock: it waits, or reads for itself. */
static void start_second_reader(struct dr_image *image, uint64_t off)
{
    bool misses = false;
    assert_int_equal(off, 20 * PAGE);
    assert_int_equal(pthread_create(&second_reader, NULL, read_second, image), 0);
    while (!misses) {
        sched_yield();
        pthread_mutex_lock(&image->lock);
        misses = second_misses;
        pthread_mutex_unlock(&image->lock);
    }
}

static void two_threads_that_miss_a_page_read_it_once(void **state)
{
    struct world *w = *state;
    void *result;
    miss_during_load = w->image;
    load_pages(w->image, 20, 1);
    pthread_join(second_reader, &result);
    assert_non_null(result);
    assert_int_equal(n_reads, 1);
}

static void a_page_forgotten_while_it_is_held_is_read_again(void **state)
{
    struct world *w = *state;
    struct dr_hold hold = {0};
    struct dr_page *page;
    pthread_mutex_lock(&w->image->lock);
    assert_int_equal(dr_page_get(w->image, 0, 20 * PAGE, &page), -EAGAIN);
    assert_int_equal(dr_image_satisfy(w->image, &hold, 0, NULL), 0);
    assert_int_equal(dr_page_get(w->image, 0, 20 * PAGE, &page), 0);
    pthread_mutex_unlock(&w->image->lock);
    assert_int_equal(dr_file_pwrite(w->image->files[0], "xyz", 20 * PAGE, 3, NULL), 0);
    pthread_mutex_lock(&w->image->lock);
    dr_page_forget(w->image, 0, 20 * PAGE, 3);
    assert_int_equal(dr_page_get(w->image, 0, 20 * PAGE, &page), -EAGAIN);
    assert_int_equal(dr_image_satisfy(w->image, &hold, 0, NULL), 0);
    assert_int_equal(dr_page_get(w->image, 0, 20 * PAGE, &page), 0);
    assert_memory_equal(dr_page_at(page, 20 * PAGE), "xyz", 3);
    dr_hold_end(&hold);
    pthread_mutex_unlock(&w->image->lock);
}

/* ------------------------------------------------------------------ files that are replaced */

static void load_a_page(struct world *w)
{
    load_pages(w->image, 20, 1);
}

static void flush_image(struct world *w)
{
    put_byte(w->image, 0, 1, 2);
    assert_int_equal(flush(w), 0);
}

static void harden_image(struct world *w)
{
    assert_int_equal(dr_image_harden(w->image, NULL), 0);
}

static void harden_chain(struct world *w)
{
    struct dr_image *image = dr_image_ref(w->image);
    struct dr_chain *chain = dr_chain_new(&image, 1);
    assert_int_equal(dr_chain_harden(chain, 0, NULL), 0);
    dr_chain_unref(chain, NULL);
}

/* Others go on with the old file until they are done, and then it is closed. */
static void a_file_that_is_replaced_stays_open_for_those_who_use_it(void **state)
{
    static const struct {
        void (*use)(struct world *);
        const char *call;
    } cases[] = {
        {load_a_page, "pread"},     {flush_image, "flush"},  {harden_image, "flush"},
        {harden_image, "sync_dir"}, {harden_chain, "flush"}, {harden_chain, "sync_dir"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct world *w = *state;
        replaced = w->image;
        replaced_at = cases[i].call;
        cases[i].use(w);
        assert_null(replaced);
        assert_true(closed);
        teardown(state);
        setup(state);
    }
}

static void a_name_that_cannot_be_made_durable_is_a_failure(void **state)
{
    struct world *w = *state;
    struct dr_error err = DR_ERROR_INIT;
    fail_sync_dir = EIO;
    assert_int_equal(dr_image_harden(w->image, &err), -EIO);
    assert_non_null(strstr(err.text, "cannot be made durable"));
    fail_sync_dir = EACCES; /* a directory that may not be read: nobody here made the name */
    assert_int_equal(dr_image_harden(w->image, NULL), 0);
}

/* The first test: nothing has been opened yet. */
static void the_limits_are_there_before_anything_is_opened(void **state)
{
    (void)state;
    assert_int_equal(dr_cache_limit(DR_CACHE_INDEX), 32 << 20);
}

static void a_limit_too_small_to_work_with_is_refused(void **state)
{
    (void)state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_cache_limits limits = {.metadata = 1000};
    assert_int_equal(dr_set_cache_limits(&limits, &err), -EINVAL);
    assert_non_null(strstr(err.text, "metadata: a cache of 1000 bytes is too small"));
    assert_int_equal(dr_cache_limit(DR_CACHE_METADATA), 64 << 20);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_limits_are_there_before_anything_is_opened),
        T(levels_go_out_in_order_with_a_flush_between),
        T(only_dirty_sectors_are_written),
        T(nothing_dirty_means_no_io),
        T(an_edit_during_a_flush_waits_for_the_next_one),
        T(a_sector_dirty_at_another_level_is_flushed_first),
        T(sectors_of_one_page_may_have_different_levels),
        T(a_new_table_leaves_the_rest_of_its_page_alone),
        T(a_callback_that_needs_many_pages_gets_them_while_others_take_the_budget),
        T(pages_of_an_idle_image_go_before_those_of_a_busy_one),
        T(a_page_is_read_once_however_many_there_are),
        T(pages_of_zeros_cost_less_than_their_size),
        T(a_range_of_pages_is_read_in_large_pieces),
        T(a_page_of_data_costs_one_read_and_no_question_about_holes),
        T(pages_inside_a_known_hole_are_not_read),
        T(what_is_known_of_a_hole_ends_with_an_edit),
        T(a_page_behind_a_hole_is_read_together_with_the_next),
        T(pages_wanted_one_after_the_other_are_read_several_at_once),
        T(a_page_that_nobody_asked_for_may_be_unreadable),
        T(two_threads_that_miss_a_page_read_it_once),
        T(a_page_forgotten_while_it_is_held_is_read_again),
        T(a_file_that_is_replaced_stays_open_for_those_who_use_it),
        T(a_name_that_cannot_be_made_durable_is_a_failure),
        T(a_limit_too_small_to_work_with_is_refused),
        T(a_failed_data_flush_is_sticky),
        T(a_page_that_could_not_be_written_waits_for_the_next_flush),
        T(a_failed_page_with_edits_of_another_level_ends_the_session),
        T(a_page_on_its_way_to_the_file_is_not_evicted),
        T(a_load_that_a_flush_overtook_is_done_again),
        T(a_hole_of_the_file_is_known_beyond_the_page),
        T(an_edit_ends_what_is_known_about_holes),
        T(neighbouring_whole_pages_are_one_write),
        T(a_page_that_is_dirty_in_part_joins_no_other),
        T(a_new_table_is_written_before_counts_until_it_may_be_linked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
