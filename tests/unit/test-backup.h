/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the tests of sets of backups share: a disk that changes, its backups, and what they have to
 * hold. */
#ifndef DROVER_TESTS_TEST_BACKUP_H
#define DROVER_TESTS_TEST_BACKUP_H

#include "test-ops.h"

#include "instant.h"
#include "ops/backup-set.h"

#ifndef SIZE
#define SIZE (3u * MiB + 3 * 512)
#endif

static const char set[] = "backups.json";
static const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};

/* Of the disk: with bitmaps inside, and those with a file of bitmaps beside. */
static const char *disk_format = "qcow2";
static const char *const beside[] = {"raw", "vmdk", "add-cow"};
#define N_BESIDE (sizeof(beside) / sizeof(beside[0]))

static inline void make_tracked(struct dr_fs *fs, uint64_t granularity)
{
    const struct dr_bitmap_options o = {.granularity = granularity};
    struct dr_disk *disk = NULL;
    make(fs, "disk", disk_format, SIZE, NULL);
    put(fs, "disk", 0, 300 * KiB, 0x11);
    put(fs, "disk", MiB, 200 * KiB, 0x22);
    if (granularity == 0)
        return;
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "B", DR_BITMAP_ADD, &o, &err));
    ok(dr_close(disk, &err));
}

static inline struct dr_backup_result back_up(struct dr_fs *fs, const char *target)
{
    const struct dr_backup_options o = {.set = set, .bitmap = "B"};
    struct dr_backup_result result = {0};
    ok(dr_backup_fs(fs, "disk", NULL, target, &o, NULL, &result, &err));
    return result;
}

static inline void verified(struct dr_fs *fs, const char *name)
{
    ok(dr_backup_verify_fs(fs, set, name, NULL, NULL, NULL, &err));
}

/* The backup holds what the disk holds, and the set says so. */
static inline void holds_the_disk(struct dr_fs *fs, const char *target)
{
    char digest[DR_DIGEST_TEXT];
    struct dr_backup_set s;
    uint64_t size;
    uint8_t *want = view(fs, "disk", &size);
    same_view(fs, target, want, size);
    digest_of(want, size, digest);
    ok(dr_set_load(&s, fs, set, &err));
    const struct dr_backup_entry *e = dr_set_find(&s, target);
    assert_non_null(e);
    assert_string_equal(e->digest, digest);
    dr_set_free(&s);
    verified(fs, target);
    free(want);
}

/* How many bitmaps the disk has that backups began; its name in *name, if there is one. */
static inline size_t begun(struct dr_fs *fs, char *name, size_t room)
{
    struct dr_disk *disk = NULL;
    struct dr_bitmap *list;
    size_t n, found = 0;
    ok(dr_open_fs(fs, "disk", NULL, &disk, &err));
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    for (size_t i = 0; i < n; i++)
        if (strncmp(list[i].name, "B@", 2) == 0) {
            found++;
            if (name)
                snprintf(name, room, "%s", list[i].name);
        }
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
    return found;
}

static inline void change_bitmap(struct dr_fs *fs, const char *name, enum dr_bitmap_action action)
{
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, name, action, NULL, &err));
    ok(dr_close(disk, &err));
}

static inline void change_at_random(struct dr_disk *disk, uint64_t *seed, unsigned n)
{
    uint64_t size = dr_size(disk);
    uint8_t *buf = malloc(100 * KiB);
    while (n-- > 0) {
        uint64_t off = next_random(seed) % size;
        size_t len = (size_t)dr_min(next_random(seed) % (next_random(seed) % 2 ? 3000 : 100 * KiB),
                                    size - off);
        switch (next_random(seed) % 5) {
        case 0:
            ok(dr_zero(disk, off, len, DR_MAY_UNMAP, &err));
            break;
        case 1:
            ok(dr_discard(disk, off, len, &err));
            break;
        default:
            memset(buf, (int)(next_random(seed) % 255 + 1), len);
            ok(dr_pwrite(disk, buf, off, len, 0, &err));
        }
    }
    free(buf);
}

static inline void change_disk(struct dr_fs *fs, uint64_t *seed, unsigned n)
{
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    change_at_random(disk, seed, n);
    ok(dr_close(disk, &err));
}

#endif
