/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The file of checksums next to an archive: what is put is found again, what is another archive's
 * is refused, what is damaged is seen. */
#include "test-ops.h"

#include <xxhash.h>

#include "archive/sums.h"

#define PATH "a.vma.sums"

static struct dr_vma_disk disks[] = {
    {.id = 1, .name = "drive-scsi0", .size = 10ull * DR_VMA_CLUSTER + 512},
    {.id = 2, .name = "vmstate", .size = 4096, .vmstate = true},
    {.id = 7, .name = "drive-scsi1", .size = 600ull * DR_VMA_CLUSTER},
};
static struct dr_vma_config configs[] = {
    {.name = "qemu-server.conf", .data = (const uint8_t *)"cores: 2\n", .len = 9}};

static struct dr_vma_header header_of(void)
{
    return (struct dr_vma_header){.uuid = {1, 2, 3},
                                  .ctime = 1234,
                                  .header_size = 12800,
                                  .disks = disks,
                                  .n_disks = 3,
                                  .configs = configs,
                                  .n_configs = 1};
}

static struct vma_sum sum_at(uint64_t i)
{
    return (struct vma_sum){i * 0x9e3779b97f4a7c15ull, ~i};
}

static struct vma_sums *new_sums(struct dr_fs *fs, const struct dr_vma_header *header)
{
    struct vma_sums *s = NULL;
    struct dr_file *file;
    ok(dr_file_open(fs, PATH, DR_FILE_CREATE, &file, &err));
    ok(vma_sums_create(file, header, &s, &err));
    dr_file_unref(file);
    return s;
}

static void write_some(struct dr_fs *fs, const struct dr_vma_header *header)
{
    struct vma_sums *s = new_sums(fs, header);
    struct vma_sum run[100];
    for (uint32_t i = 0; i < 100; i++)
        run[i] = i < 3 || i == 50 || i > 90 ? (struct vma_sum){0, 0} : sum_at(i);
    ok(vma_sums_put_run(s, 7, 500, run, 100, &err));
    ok(vma_sums_put(s, 1, 10, sum_at(1), &err));
    ok(vma_sums_put(s, 2, 70000, sum_at(2), &err));
    ok(vma_sums_put(s, 2, 0, sum_at(3), &err));
    ok(vma_sums_finish(s, &err));
    vma_sums_close(s);
}

static void is_sum(struct vma_sums *s, unsigned id, uint32_t cluster, struct vma_sum want)
{
    struct vma_sum sum;
    bool known;
    ok(vma_sums_get(s, id, cluster, &sum, &known, &err));
    assert_int_equal(known, want.low != 0 || want.high != 0);
    assert_int_equal(sum.low, want.low);
    assert_int_equal(sum.high, want.high);
}

static void what_is_put_is_found(void **state)
{
    struct dr_vma_header header = header_of();
    struct vma_sums *s = NULL;
    struct vma_sum none = {0, 0};
    write_some(*state, &header);
    ok(vma_sums_open(*state, PATH, &header, &s, &err));
    for (uint32_t i = 0; i < 100; i++)
        is_sum(s, 7, 500 + i, i < 3 || i == 50 || i > 90 ? none : sum_at(i));
    is_sum(s, 7, 0, none);
    is_sum(s, 7, 499, none);
    is_sum(s, 1, 10, sum_at(1));
    is_sum(s, 1, 9, none);
    is_sum(s, 2, 70000, sum_at(2));
    is_sum(s, 2, 0, sum_at(3));
    is_sum(s, 2, 70001, none);
    is_sum(s, 2, UINT32_MAX, none);
    is_sum(s, 3, 0, none);
    vma_sums_close(s);
}

static void places_outside_the_disks_are_refused(void **state)
{
    struct dr_vma_header header = header_of();
    struct vma_sums *s = new_sums(*state, &header);
    refused(vma_sums_put(s, 1, 11, sum_at(1), &err), EINVAL, "cluster 11 of disk 1");
    refused(vma_sums_put(s, 3, 0, sum_at(1), &err), EINVAL, "disk 3");
    vma_sums_close(s);
}

static void another_archives_sums_are_stale(void **state)
{
    struct dr_vma_header header = header_of();
    struct vma_sums *s = NULL;
    refused(vma_sums_open(*state, PATH, &header, &s, &err), ENOENT, PATH);
    write_some(*state, &header);
    header.uuid[15] ^= 1;
    refused(vma_sums_open(*state, PATH, &header, &s, &err), ESTALE, "another archive");
    header = header_of();
    header.ctime++;
    refused(vma_sums_open(*state, PATH, &header, &s, &err), ESTALE, "another archive");
    header = header_of();
    struct dr_vma_config other = configs[0];
    other.data = (const uint8_t *)"cores: 4\n";
    header.configs = &other;
    refused(vma_sums_open(*state, PATH, &header, &s, &err), ESTALE, "another archive");
}

/* Every byte counts but the padding in front of tables. */
static void damage_is_seen(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_header header = header_of();
    size_t len;
    write_some(fs, &header);
    uint8_t *bytes = file_bytes(fs, PATH, &len);
    const size_t places[] = {0,      9,      12,      17,  40,         50,
                             64 + 1, 64 + 8, 64 + 32, 255, 4096 + 160, 8192 + 500 * 16 + 100,
                             len - 1};
    for (size_t i = 0; i < sizeof(places) / sizeof(*places); i++) {
        struct dr_file *file = NULL;
        struct vma_sums *s = NULL;
        uint8_t bad = bytes[places[i]] ^ 0x40;
        ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &file, &err));
        ok(dr_file_pwrite(file, &bad, places[i], 1, &err));
        dr_file_unref(file);
        refused(vma_sums_open(fs, PATH, &header, &s, &err), EINVAL, PATH);
        ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &file, &err));
        ok(dr_file_pwrite(file, &bytes[places[i]], places[i], 1, &err));
        dr_file_unref(file);
    }
    free(bytes);
}

static void a_cut_file_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_header header = header_of();
    size_t len;
    write_some(fs, &header);
    free(file_bytes(fs, PATH, &len));
    const size_t cuts[] = {0, 5, 63, 64, 200, 4095, 4096, 9000, len - 16, len - 1};
    for (size_t i = sizeof(cuts) / sizeof(*cuts); i-- > 0;) {
        struct dr_file *file = NULL;
        struct vma_sums *s = NULL;
        ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &file, &err));
        ok(dr_file_truncate(file, cuts[i], &err));
        dr_file_unref(file);
        refused(vma_sums_open(fs, PATH, &header, &s, &err), EINVAL, PATH);
    }
}

static bool is_xxh(const uint8_t *at, const void *data, size_t len)
{
    XXH128_hash_t h = XXH3_128bits(data, len);
    return get_le64(at) == h.low64 && get_le64(at + 8) == h.high64;
}

static uint8_t *add_number(uint8_t *p, uint64_t v)
{
    put_le64(p, v);
    return p + 8;
}

static uint8_t *add_text(uint8_t *p, const void *text, size_t len)
{
    p = add_number(p, len);
    memcpy(p, text, len);
    return p + len;
}

/* docs/formats/vma-sums.md, read with other eyes than the code's. */
static void the_bytes_are_those_of_the_document(void **state)
{
    struct dr_vma_header header = header_of();
    const unsigned order[] = {0, 2, 1}; /* the stream is last */
    size_t len;
    write_some(*state, &header);
    uint8_t *b = file_bytes(*state, PATH, &len), own[16], id[512], *p = id;
    assert_memory_equal(b, "DRVMASUM", 8);
    assert_int_equal(get_le32(b + 8), 1);
    assert_int_equal(get_le32(b + 12), 3);
    memcpy(own, b + 48, 16);
    memset(b + 48, 0, 16);
    assert_true(is_xxh(own, b, 64 + 3 * 64));
    memcpy(p, header.uuid, 16);
    p = add_number(add_number(add_number(p + 16, 1234), 12800), 3);
    for (unsigned i = 0; i < 3; i++)
        p = add_text(add_number(add_number(p, disks[i].id), disks[i].size), disks[i].name,
                     strlen(disks[i].name));
    p = add_text(add_text(add_number(p, 1), "qemu-server.conf", 16), "cores: 2\n", 9);
    assert_true(is_xxh(b + 16, id, (size_t)(p - id)));
    uint64_t table = 4096, clusters = 0;
    for (unsigned i = 0; i < 3; i++) {
        const uint8_t *e = b + 64 + i * 64;
        clusters = i == 2 ? 70001 : vma_clusters(disks[order[i]].size);
        assert_int_equal(get_le32(e), disks[order[i]].id);
        assert_int_equal(get_le64(e + 8), clusters);
        assert_int_equal(get_le64(e + 16), table);
        assert_true(is_xxh(e + 32, b + table, clusters * 16));
        table += dr_round_up(clusters * 16, 4096);
    }
    assert_int_equal(len, table - dr_round_up(clusters * 16, 4096) + clusters * 16);
    assert_int_equal(get_le64(b + 4096 + 10 * 16), sum_at(1).low);
    assert_int_equal(get_le64(b + 4096 + 10 * 16 + 8), sum_at(1).high);
    free(b);
}

static void no_data_sums_to_nothing(void **state)
{
    (void)state;
    uint8_t *cluster = calloc(1, DR_VMA_CLUSTER);
    struct vma_sum a = vma_sum_of(cluster);
    assert_true(a.low != 0 || a.high != 0);
    cluster[DR_VMA_CLUSTER - 1] = 1;
    struct vma_sum b = vma_sum_of(cluster);
    assert_true(a.low != b.low && a.high != b.high);
    free(cluster);
}

static void sums_files_are_recognised(void **state)
{
    struct dr_vma_header header = header_of();
    make(*state, "raw", "raw", 4096, NULL);
    assert_false(vma_sums_is(*state, PATH));
    assert_false(vma_sums_is(*state, "raw"));
    write_some(*state, &header);
    assert_true(vma_sums_is(*state, PATH));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(what_is_put_is_found),
        ops_test(places_outside_the_disks_are_refused),
        ops_test(another_archives_sums_are_stale),
        ops_test(damage_is_seen),
        ops_test(a_cut_file_is_refused),
        ops_test(the_bytes_are_those_of_the_document),
        ops_test(no_data_sums_to_nothing),
        ops_test(sums_files_are_recognised),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
