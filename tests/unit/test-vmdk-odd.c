/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What other programs' VMDKs have and ours never: other geometries, names, ids, lines. */
#include "faultfs.h"
#include "test-vmdk.h"

#define HEAD "# Disk DescriptorFile\nversion=1\nCID=12345678\n"

static void again(const char *path, const char *text)
{
    mem->ops->unlink(mem, path, NULL);
    make_text(path, text);
}

/* ------------------------------------------------------------------ geometry */

#define CAPACITY 3072u /* sectors; the line says 3000 */

static void poke_directory(const char *path, uint64_t sector, const struct vmdk_header *h)
{
    for (uint64_t i = 0; i < h->n_tables; i++)
        poke32(path, sector * 512 + i * 4, (uint32_t)(sector + h->gd_sectors + i * h->gt_sectors));
}

/* The descriptor is not in sector 1 and records the name that the file once had. */
static void make_odd(const char *path, uint64_t grain, uint32_t gtes, bool rgd)
{
    static const char text[] = HEAD
        "createType=\"monolithicSparse\"\nRW 3000 SPARSE \"was.vmdk\"\n";
    uint8_t buf[512];
    struct vmdk_header h = {.version = 1, .capacity = CAPACITY, .grain = grain, .gtes = gtes};
    h.n_tables = dr_div_up(CAPACITY, grain * gtes);
    h.gd_sectors = dr_div_up(h.n_tables * 4, 512);
    h.gt_sectors = dr_div_up(gtes * 4, 512);
    h.flags = VMDK_FLAG_NEWLINES | (rgd ? VMDK_FLAG_RGD : 0);
    h.desc_off = 3;
    h.desc_len = 2;
    h.gd_off = 8;
    h.rgd_off = rgd ? 8 + h.gd_sectors + h.n_tables * h.gt_sectors : 0xbad; /* means nothing then */
    h.overhead = dr_round_up(8 + 2 * (h.gd_sectors + h.n_tables * h.gt_sectors), grain);
    vmdk_header_encode(&h, buf);
    make_zeros(path, h.overhead * 512);
    poke(path, 0, buf, sizeof(buf));
    poke(path, 3 * 512, text, strlen(text));
    poke_directory(path, 8, &h);
    if (rgd)
        poke_directory(path, h.rgd_off, &h);
}

static void other_geometries_are_read_and_written(void **state)
{
    (void)state;
    static const struct {
        uint64_t grain;
        uint32_t gtes;
        bool rgd;
    } odd[] = {{8, 128, true}, {1, 512, true}, {2048, 1, true}, {1, 1, true}, {16, 7, false}};
    for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
        char path[32];
        snprintf(path, sizeof(path), "/d/odd%zu.vmdk", i);
        make_odd(path, odd[i].grain, odd[i].gtes, odd[i].rgd);
        struct dr_disk *disk = opened(path, DR_OPEN_RDWR);
        assert_int_equal(dr_size(disk), 3000 * 512);
        write_at(disk, 1000, 400000, 1);
        write_at(disk, 3000 * 512 - 700, 700, 2);
        ok(dr_close(disk, &err));
        disk = opened(path, 0);
        reads_zero(disk, 0, 1000);
        reads(disk, 1000, 400000, 1);
        reads_zero(disk, 401000, 3000 * 512 - 401700);
        reads(disk, 3000 * 512 - 700, 700, 2);
        ok(dr_close(disk, &err));
        finds(path, 0, 0, "");
        assert_string_equal(lines, "");
    }
}

/* Some programs look in sector 1 whatever the header says. */
static void the_header_says_where_the_text_is(void **state)
{
    (void)state;
    static const char decoy[512] = "# Disk DescriptorFile\nversion=1\nCID=0badf00d\n"
                                   "createType=\"monolithicSparse\"\nRW 8 SPARSE \"b.vmdk\"\n";
    char text[512];
    make_odd("/d/a.vmdk", 8, 128, true);
    poke("/d/a.vmdk", 512, decoy, sizeof(decoy));
    finds("/d/a.vmdk", 0, 0, "");
    assert_int_equal(cid_of("/d/a.vmdk"), 0x12345678);
    write_one("/d/a.vmdk", 0, 1000, 1, 0);
    assert_int_not_equal(cid_of("/d/a.vmdk"), 0x12345678);
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    ok(dr_resize(disk, 4000 * 512, 0, &err));
    ok(dr_close(disk, &err));
    disk = opened("/d/a.vmdk", 0);
    assert_int_equal(dr_size(disk), 4000 * 512);
    reads(disk, 0, 1000, 1);
    reads_zero(disk, 1000, 4000 * 512 - 1000);
    ok(dr_close(disk, &err));
    peek("/d/a.vmdk", 3 * 512, text, sizeof(text));
    text[511] = '\0';
    assert_null(strstr(text, "CID=12345678"));
    assert_non_null(strstr(text, "RW 4000 SPARSE \"was.vmdk\"\n"));
    peek("/d/a.vmdk", 512, text, sizeof(text));
    assert_memory_equal(text, decoy, sizeof(decoy));
    finds("/d/a.vmdk", 0, 0, "");
}

/* VirtualBox goes on at any sector after its metadata grew. */
static void a_grain_may_stand_at_any_sector(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    write_one("/d/a.vmdk", 0, GRAIN, 1, 0);
    CLEANUP_FREE uint8_t *grain = malloc(GRAIN);
    peek("/d/a.vmdk", 128 * 512, grain, GRAIN);
    poke("/d/a.vmdk", (256 + 8) * 512, grain, GRAIN);
    poke32("/d/a.vmdk", GT_AT, 256 + 8);
    poke32("/d/a.vmdk", RGT_AT, 256 + 8);
    finds("/d/a.vmdk", 0, 1, "not aligned");
    write_one("/d/a.vmdk", 3 * GRAIN, GRAIN, 2, 0);
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    reads(disk, 0, GRAIN, 1);
    reads(disk, 3 * GRAIN, GRAIN, 2);
    ok(dr_close(disk, &err));
}

/* It then takes parts of two aligned places, wherever these stand. */
static void check_finds_what_a_grain_at_any_sector_reaches_into(void **state)
{
    (void)state;
    struct dr_file *f;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    write_one("/d/a.vmdk", 0, 2 * GRAIN, 1, 0);
    ok(dr_file_open(mem, "/d/a.vmdk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, 32 * GRAIN, &err));
    dr_file_unref(f);
    for (uint32_t place = 2; place < 20; place++) {
        for (uint32_t beside = place - 1; beside <= place + 2; beside++) {
            poke32("/d/a.vmdk", GT_AT, place * 128 + 8);
            poke32("/d/a.vmdk", RGT_AT, place * 128 + 8);
            poke32("/d/a.vmdk", GT_AT + 4, beside * 128);
            poke32("/d/a.vmdk", RGT_AT + 4, beside * 128);
            bool overlap = beside == place || beside == place + 1;
            struct dr_check_result r = checked("/d/a.vmdk", 0);
            assert_int_equal(r.corruptions, overlap);
            assert_true(!strstr(lines, "belongs to another one too") == !overlap);
        }
    }
}

/* Table entries have 32 bits. */
static void an_extent_file_ends_at_2_tib(void **state)
{
    (void)state;
    struct dr_file *f;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(dr_file_open(mem, "/d/a.vmdk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, 2 * TIB - GRAIN - 512, &err));
    dr_file_unref(f);
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    write_at(disk, 0, 100, 1);
    fails(ENOSPC, "2 TiB", dr_pwrite(disk, "x", 5 * GRAIN, 1, 0, &err));
    reads(disk, 0, 100, 1);
    ok(dr_close(disk, &err));
    assert_int_equal(peek32("/d/a.vmdk", GT_AT), 0xffffff80);
    assert_int_equal(peek32("/d/a.vmdk", GT_AT + 20), 0);
}

static void any_mark_says_that_it_was_not_closed(void **state)
{
    (void)state;
    struct dr_disk *disk;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    poke("/d/a.vmdk", VMDK_UNCLEAN_AT, "\xff", 1);
    fails(EUCLEAN, "not closed",
          open_in(mem, "/d/a.vmdk", DR_OPEN_RDWR | DR_OPEN_NO_RECOVER, &disk));
    ok(dr_close(opened("/d/a.vmdk", DR_OPEN_RDWR), &err));
    uint8_t mark;
    peek("/d/a.vmdk", VMDK_UNCLEAN_AT, &mark, 1);
    assert_int_equal(mark, 0);
}

static void what_may_only_be_read_is_not_recovered(void **state)
{
    (void)state;
    ok(create_in(mem, "/d/s.vmdk", MIB, "twoGbMaxExtentSparse", NULL, NULL));
    write_one("/d/s.vmdk", 0, GRAIN, 1, 0);
    uint32_t gt = peek32("/d/s-s001.vmdk", 512) * 512; /* of the redundant directory */
    poke("/d/s-s001.vmdk", VMDK_UNCLEAN_AT, "\1", 1);
    poke32("/d/s-s001.vmdk", gt, 0);
    again("/d/s.vmdk", HEAD "RDONLY 2048 SPARSE \"s-s001.vmdk\"\nRW 1 ZERO\n");
    struct dr_disk *disk = opened("/d/s.vmdk", DR_OPEN_RDWR);
    reads(disk, 0, GRAIN, 1);
    ok(dr_close(disk, &err));
    uint8_t mark;
    peek("/d/s-s001.vmdk", VMDK_UNCLEAN_AT, &mark, 1);
    assert_int_equal(mark, 1);
    assert_int_equal(peek32("/d/s-s001.vmdk", gt), 0);
}

static void a_copy_that_is_the_table_itself_is_none(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    poke32("/d/a.vmdk", RGD_AT, peek32("/d/a.vmdk", GD_AT));
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    fails(EIO, "check -r", dr_pwrite(disk, "x", 0, 1, 0, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    write_one("/d/a.vmdk", 0, 100, 1, 0);
    finds("/d/a.vmdk", 0, 0, "");
}

static void check_finds_shared_tables_and_entries_behind_the_end(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL)); /* 16 grains */
    write_one("/d/a.vmdk", 0, GRAIN, 1, 0);
    poke32("/d/a.vmdk", GT_AT + 16 * 4, 128);
    poke32("/d/a.vmdk", RGT_AT + 16 * 4, 128);
    finds("/d/a.vmdk", 0, 1, "1 entries of grain table 0 are behind the end");
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_LEAKS).leaks_fixed, 1);
    finds("/d/a.vmdk", 0, 0, "");
    ok(create("/d/b.vmdk", 40 * MIB, NULL));
    struct dr_image *image = image_of("/d/b.vmdk", 0);
    uint64_t gd = vmdk_of(image)->extents[0].h.gd_off * 512;
    ok(dr_image_unref(image, &err));
    poke32("/d/b.vmdk", gd + 4, peek32("/d/b.vmdk", gd) + 1);
    finds("/d/b.vmdk", 1, 0, "other metadata");
}

/* ------------------------------------------------------------------ descriptors */

static void a_noaccess_extent_of_zeros_reads_zero(void **state)
{
    (void)state;
    make_text("/d/z.vmdk", HEAD "NOACCESS 7 ZERO\nRW 3 ZERO\n");
    struct dr_disk *disk = opened("/d/z.vmdk", 0);
    assert_int_equal(dr_size(disk), 10 * 512);
    reads_zero(disk, 0, 10 * 512);
    ok(dr_close(disk, &err));
}

static void an_embedded_descriptor_is_of_a_sparse_extent(void **state)
{
    (void)state;
    char text[1024];
    struct dr_disk *disk;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    peek("/d/a.vmdk", 512, text, sizeof(text));
    const char *type = strstr(text, "SPARSE \"");
    assert_non_null(type);
    poke("/d/a.vmdk", 512 + (uint64_t)(type - text), "FLAT  ", 6);
    fails(EINVAL, "expected SPARSE", open_in(mem, "/d/a.vmdk", 0, &disk));
}

/* No more than a megabyte of text is read. */
static void a_descriptor_of_too_many_pieces_is_not_made(void **state)
{
    (void)state;
    struct dr_file *f;
    fails(ENOSPC, "the descriptor would have",
          create_in(mem, "/d/s.vmdk", 100 * TIB, "twoGbMaxExtentSparse", NULL, NULL));
    assert_int_equal(dr_file_open(mem, "/d/s-s001.vmdk", 0, &f, NULL), -ENOENT);
}

/* VirtualBox's bases have the line, too, but it says nothing there. */
static void only_virtualbox_children_without_a_parent_are_refused(void **state)
{
    (void)state;
#define PARENT_UUID "ddb.uuid.parent=\"0a000000-0000-0000-0000-000000000001\"\n"
    again("/d/v.vmdk", HEAD "parentCID=ffffffff\nRW 1 ZERO\n"
                            "ddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\n");
    ok(dr_close(opened("/d/v.vmdk", 0), &err));
    again("/d/base.vmdk", HEAD "RW 1 ZERO\n");
    again("/d/v.vmdk", "version=1\nCID=1\nparentCID=12345678\n"
                       "parentFileNameHint=\"base.vmdk\"\nRW 1 ZERO\n" PARENT_UUID);
    ok(dr_close(opened("/d/v.vmdk", 0), &err));
    again("/d/v.vmdk", HEAD "parentCID=ffffffff\nRW 1 ZERO\n" PARENT_UUID);
    struct dr_disk *disk;
    fails(ENOENT, "VirtualBox", open_in(mem, "/d/v.vmdk", 0, &disk));
}

static void names_are_recorded_only_in_the_descriptors_charset(void **state)
{
    (void)state;
    ok(create_in(mem, "/d/s.vmdk", MIB, "twoGbMaxExtentSparse", NULL, NULL));
    again("/d/s.vmdk", HEAD "encoding=\"windows-1252\"\nRW 2048 SPARSE \"s-s001.vmdk\"\n");
    struct dr_image *image = image_of("/d/s.vmdk", DR_OPEN_RDWR);
    fails(EILSEQ, "ASCII", vmdk_set_backing(image, NULL, "\xc3\xa9.vmdk", NULL, DR_TRY, &err));
    ok(vmdk_set_backing(image, NULL, "e.vmdk", NULL, DR_TRY, &err));
    ok(dr_image_unref(image, &err));
    again("/d/s.vmdk", HEAD "encoding=\"UTF-8\"\nRW 2048 SPARSE \"s-s001.vmdk\"\n");
    image = image_of("/d/s.vmdk", DR_OPEN_RDWR);
    ok(vmdk_set_backing(image, NULL, "\xc3\xa9.vmdk", NULL, DR_TRY, &err));
    ok(dr_image_unref(image, &err));
}

static void opens_with(const char *path, const char *text, const char *file)
{
    again(path, text);
    struct dr_disk *disk = opened(path, 0);
    const struct dr_image *last = disk->chain->images[disk->chain->n - 1];
    assert_string_equal(last->files[last->n_files - 1]->path, file);
    ok(dr_close(disk, &err));
}

static void names_are_in_the_descriptors_charset(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_zeros("/d/\xc3\xa9.raw", 512);
    make_zeros("/d/\xe8.raw", 512);
    make_zeros("/d/\xe3\x82\xbd.raw", 512); /* its second byte in Shift_JIS is a backslash */
    opens_with("/d/x.vmdk", HEAD "encoding=\"Windows-1252\"\nRW 1 FLAT \"\xe9.raw\" 0\n",
               "/d/\xc3\xa9.raw");
    opens_with("/d/x.vmdk", HEAD "encoding=\"windows-1252\"\nRW 1 FLAT \"\xe8.raw\" 0\n",
               "/d/\xe8.raw");
    opens_with("/d/x.vmdk", HEAD "encoding=\"Shift_JIS\"\nRW 1 FLAT \"\x83\x5c.raw\" 0\n",
               "/d/\xe3\x82\xbd.raw");
    opens_with("/d/x.vmdk", HEAD "RW 1 FLAT \"\xe8.raw\" 0\n", "/d/\xe8.raw");
    again("/d/x.vmdk", HEAD "encoding=\"UTF-7\"\nRW 1 FLAT \"\xe9.raw\" 0\n");
    fails(ENOENT, "\xe9.raw", open_in(mem, "/d/x.vmdk", 0, &disk));
    again("/d/x.vmdk", HEAD "encoding=\"windows-1252\"\nRW 1 FLAT \"\xfc.raw\" 0\n");
    fails(ENOENT, "\xc3\xbc.raw", open_in(mem, "/d/x.vmdk", 0, &disk));
#define CHILD                                                                                 \
    "version=1\nCID=1\nparentCID=12345678\nencoding=\"Shift_JIS\"\nparentFileNameHint=\"C:\\" \
    "\x83\x5c\"\nRW 1 ZERO\n"
    again("/d/\xe3\x82\xbd", HEAD "RW 1 FLAT \"\xe8.raw\" 0\n");
    opens_with("/d/c.vmdk", CHILD, "/d/\xe8.raw");
    ok(mem->ops->unlink(mem, "/d/\xe3\x82\xbd", &err));
    fails(ENOENT, "\xe3\x82\xbd", open_in(mem, "/d/c.vmdk", 0, &disk));
    again("/d/C:\\\x83\x5c", HEAD "RW 1 FLAT \"\xe8.raw\" 0\n");
    opens_with("/d/c.vmdk", CHILD, "/d/\xe8.raw");
}

/* ------------------------------------------------------------------ ids */

/* 3 says that changes are tracked, which ends with the first one. */
static void header_version_3_ends_with_the_first_change(void **state)
{
    (void)state;
    for (uint32_t zeroed = 0; zeroed < 2; zeroed++) {
        const char *path = zeroed ? "/d/z.vmdk" : "/d/a.vmdk";
        ok(create_in(mem, path, 1 * MIB, "monolithicSparse", zeroed ? "on" : "off", NULL));
        poke32(path, VMDK_VERSION_AT, 3);
        write_one(path, 0, 10, 1, DR_OPEN_UNCHANGED);
        assert_int_equal(peek32(path, VMDK_VERSION_AT), 3);
        write_one(path, 0, 10, 1, 0);
        assert_int_equal(peek32(path, VMDK_VERSION_AT), 1 + zeroed);
    }
}

static void a_parents_name_with_a_quote_is_refused(void **state)
{
    (void)state;
    make_text("/d/p\"q.vmdk", HEAD "RW 1 ZERO\n");
    fails(EINVAL, "quote", create("/d/c.vmdk", 512, "p\"q.vmdk"));
}

/* Other readers would take the child for a base full of zeros. */
static void a_parent_whose_cid_means_none_gets_no_children(void **state)
{
    (void)state;
    make_text("/d/p.vmdk", "version=1\nCID=ffffffff\nRW 1 ZERO\n");
    fails(EINVAL, "means that it has no parent", create("/d/c.vmdk", 512, "p.vmdk"));
    ok(create("/d/c.vmdk", 512, NULL));
    struct dr_image *parent = image_of("/d/p.vmdk", 0), *c = image_of("/d/c.vmdk", DR_OPEN_RDWR);
    fails(EINVAL, "means that it has no parent",
          vmdk_set_backing(c, parent, "p.vmdk", "vmdk", DR_TRY, &err));
    ok(dr_image_unref(c, &err));
    ok(dr_image_unref(parent, &err));
    again("/d/p.vmdk", "version=1\nCID=fffffffe\nRW 1 ZERO\n"); /* that is an ordinary one */
    ok(mem->ops->unlink(mem, "/d/c.vmdk", &err));
    ok(create("/d/c.vmdk", 512, "p.vmdk"));
    ok(dr_close(opened("/d/c.vmdk", 0), &err));
}

static void a_long_id_of_another_kind_goes_with_the_cid(void **state)
{
    (void)state;
    make_zeros("/d/x.raw", 512);
    make_text("/d/x.vmdk", HEAD "RW 1 FLAT \"x.raw\" 0\nddb.longContentID = \"12345678\"\n");
    write_one("/d/x.vmdk", 0, 10, 1, 0);
    struct dr_image *image = image_of("/d/x.vmdk", 0);
    assert_null(vmdk_desc_find(&vmdk_of(image)->desc, "ddb.longContentID"));
    ok(dr_image_unref(image, &err));
}

/* Who opens the file meanwhile, or has it open, must see the new one. */
static void a_new_cid_is_written_into_the_same_file(void **state)
{
    (void)state;
    struct dr_file_id before, after;
    ok(create_in(mem, "/d/s.vmdk", MIB, "twoGbMaxExtentSparse", NULL, NULL));
    uint32_t cid = cid_of("/d/s.vmdk");
    ok(mem->ops->identify(mem, "/d/s.vmdk", &before, &err));
    write_one("/d/s.vmdk", 0, 10, 1, 0);
    ok(mem->ops->identify(mem, "/d/s.vmdk", &after, &err));
    assert_int_not_equal(cid_of("/d/s.vmdk"), cid);
    assert_int_equal(before.ino, after.ino);
}

/* An image that an older release left behind must be known by a newer one. */
static void the_id_of_an_interrupted_commit_never_changes(void **state)
{
    (void)state;
    make_text("/d/p.vmdk", HEAD "RW 1 ZERO\n");
    make_text("/d/c.vmdk", "version=1\nCID=0badcafe\nparentCID=12345678\n"
                           "parentFileNameHint=\"p.vmdk\"\nRW 1 ZERO\n");
    struct dr_image *parent = image_of("/d/p.vmdk", 0), *child = image_of("/d/c.vmdk", 0);
    assert_int_equal(vmdk_commit_id(parent, child), 0x4505d5df);
    ok(dr_image_unref(parent, &err));
    ok(dr_image_unref(child, &err));
}

/* ------------------------------------------------------------------ parents */

static void candidates_are(const char *hint, const char *const *want)
{
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_NO_BACKING);
    free(image->backing_name);
    image->backing_name = strdup(hint);
    unsigned n = 0;
    for (;; n++) {
        CLEANUP_FREE char *path = NULL;
        int r = vmdk_backing_candidate(image, n, &path, &err);
        if (r == -ENOENT)
            break;
        ok(r);
        assert_non_null(want[n]);
        assert_string_equal(path, want[n]);
    }
    assert_null(want[n]);
    ok(dr_image_unref(image, &err));
}

static void a_recorded_name_is_a_hint(void **state)
{
    (void)state;
#define C(hint, ...) candidates_are(hint, (const char *const[]){__VA_ARGS__, NULL})
    make_text("/d/c.vmdk", HEAD "RW 1 ZERO\n");
    C("b.vmdk", "/d/b.vmdk");
    C("C:\\VMs\\e\\b.vmdk", "/d/C:\\VMs\\e\\b.vmdk", "/d/b.vmdk", "/d/../e/b.vmdk");
    C("C:\\VMs\\", "/d/C:\\VMs\\");
    C("C:/b.vmdk", "/d/C:/b.vmdk", "/d/b.vmdk");
    C("..\\e\\b.vmdk", "/d/..\\e\\b.vmdk", "/d/../e/b.vmdk", "/d/b.vmdk");
    C("/vmfs/volumes/1/vm/b.vmdk", "/vmfs/volumes/1/vm/b.vmdk", "/d/b.vmdk", "/d/../vm/b.vmdk");
#undef C
}

/* ------------------------------------------------------------------ children */

static char *text_of(const char *path)
{
    struct dr_image *image = image_of(path, DR_OPEN_NO_BACKING);
    char *text = strdup(vmdk_of(image)->desc.text);
    ok(dr_image_unref(image, &err));
    return text;
}

static void says(const char *path, const char *what)
{
    CLEANUP_FREE char *text = text_of(path);
    if (!strstr(text, what))
        fail_msg("no '%s' in %s", what, text);
}

/* After a disk grew its pieces have any sizes, and its spelling may be the old one. */
static void a_child_is_cut_as_its_parent(void **state)
{
    (void)state;
    static const uint64_t sectors[] = {300, 5000, 1};
    for (size_t i = 0; i < 3; i++) {
        char path[16];
        snprintf(path, sizeof(path), "/d/p%zu.vmdk", i);
        ok(create_in(mem, path, sectors[i] * 512, "twoGbMaxExtentSparse", NULL, NULL));
    }
    make_text("/d/p.vmdk",
              HEAD "createType=\"2GbMaxExtentSparse\"\nRW 300 SPARSE \"p0-s001.vmdk\"\n"
                   "RW 5000 SPARSE \"p1-s001.vmdk\"\nRW 1 SPARSE \"p2-s001.vmdk\"\n");
    write_one("/d/p.vmdk", 0, 5301 * 512, 1, 0);
    struct dr_create_params p = {.size = 5301 * 512, .backing_name = "p.vmdk"};
    ok(dr_image_open(mem, "/d/p.vmdk", "vmdk", 0, &p.backing, &err));
    p.like = p.backing;
    ok(dr_format_vmdk.create(mem, "/d/c.vmdk", &p, &err));
    ok(dr_image_unref(p.backing, &err));
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_NO_BACKING);
    assert_int_equal(vmdk_of(image)->n_extents, 3);
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(vmdk_of(image)->extents[i].len, sectors[i] * 512);
    ok(dr_image_unref(image, &err));
    struct dr_disk *disk = opened("/d/c.vmdk", 0);
    reads(disk, 0, 5301 * 512, 1);
    ok(dr_close(disk, &err));
}

static void the_data_base_is_vmwares(void **state)
{
    (void)state;
    struct dr_option scsi[] = {{"adapter_type", "lsilogic"}, {"hwversion", "13"}};
    struct dr_create_params p = {.size = 100 * 1024 * MIB, .options = scsi, .n_options = 2};
    ok(create("/d/ide.vmdk", 100 * 1024 * MIB, NULL));
    says("/d/ide.vmdk", "\n# Extent description\nRW 209715200 SPARSE \"ide.vmdk\"\n");
    says("/d/ide.vmdk", "\n# The Disk Data Base \n#DDB\n\nddb.adapterType = \"ide\"\n");
    says("/d/ide.vmdk", "cylinders = \"16383\"\nddb.geometry.heads = \"16\"\n");
    ok(dr_format_vmdk.create(mem, "/d/scsi.vmdk", &p, &err));
    says("/d/scsi.vmdk", "cylinders = \"13054\"\nddb.geometry.heads = \"255\"\n");
    struct dr_create_params child = {.size = MIB, .backing_name = "scsi.vmdk"};
    ok(dr_image_open(mem, "/d/scsi.vmdk", "vmdk", 0, &child.backing, &err));
    child.like = child.backing;
    ok(dr_format_vmdk.create(mem, "/d/c.vmdk", &child, &err));
    ok(dr_image_unref(child.backing, &err));
    says("/d/c.vmdk", "adapterType = \"lsilogic\"");
    says("/d/c.vmdk", "virtualHWVersion = \"13\"");
}

/* The nth I/O of freezing fails, then the guest goes on. False: there is none. */
static bool allocate_after_failure(uint64_t nth)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    uint8_t byte = 1;
    ok(create("/d/f.vmdk", 4 * MIB, NULL));
    struct faultfs *faults = faultfs_new(mem);
    ok(dr_open_fs(faultfs_fs(faults), "/d/f.vmdk", &o, &disk, &err));
    ok(dr_pwrite(disk, &byte, 0, 1, 0, &err));
    faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
    if (dr_image_freeze(disk->chain->images[0], NULL) == 0)
        ok(dr_image_thaw(disk->chain->images[0], false, &err));
    bool failed = faultfs_fired(faults);
    faultfs_disarm(faults);
    if (dr_pwrite(disk, &byte, 2 * MIB, 1, 0, NULL) == 0)
        assert_int_equal(peek32("/d/f.vmdk", VMDK_UNCLEAN_AT) & 0xff, 1);
    dr_close(disk, NULL);
    faultfs_free(faults);
    ok(mem->ops->unlink(mem, "/d/f.vmdk", &err));
    return failed;
}

static void what_is_allocated_after_a_freezing_that_failed_is_marked(void **state)
{
    (void)state;
    for (uint64_t nth = 1; allocate_after_failure(nth); nth++)
        ;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(other_geometries_are_read_and_written),
        T(the_header_says_where_the_text_is),
        T(a_grain_may_stand_at_any_sector),
        T(check_finds_what_a_grain_at_any_sector_reaches_into),
        T(an_extent_file_ends_at_2_tib),
        T(any_mark_says_that_it_was_not_closed),
        T(what_may_only_be_read_is_not_recovered),
        T(a_copy_that_is_the_table_itself_is_none),
        T(check_finds_shared_tables_and_entries_behind_the_end),
        T(a_noaccess_extent_of_zeros_reads_zero),
        T(an_embedded_descriptor_is_of_a_sparse_extent),
        T(a_descriptor_of_too_many_pieces_is_not_made),
        T(only_virtualbox_children_without_a_parent_are_refused),
        T(names_are_in_the_descriptors_charset),
        T(names_are_recorded_only_in_the_descriptors_charset),
        T(header_version_3_ends_with_the_first_change),
        T(a_parents_name_with_a_quote_is_refused),
        T(a_parent_whose_cid_means_none_gets_no_children),
        T(a_long_id_of_another_kind_goes_with_the_cid),
        T(a_new_cid_is_written_into_the_same_file),
        T(the_id_of_an_interrupted_commit_never_changes),
        T(a_recorded_name_is_a_hint),
        T(a_child_is_cut_as_its_parent),
        T(the_data_base_is_vmwares),
        T(what_is_allocated_after_a_freezing_that_failed_is_marked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
