/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opens a disk image, prints its chain and its map, and copies some of its bytes to a file.
 *
 *   cc -o disk-map disk-map.c $(pkg-config --cflags --libs drover)
 *   ./disk-map disk.vmdk
 *   ./disk-map disk.vmdk OFFSET LENGTH OUTPUT
 */
#include <drover/drover.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static void print_chain(const struct dr_disk *disk)
{
    printf("%" PRIu64 " bytes\n", dr_size(disk));
    for (size_t i = 0; i < dr_chain_length(disk); i++)
        printf("%*s%s (%s)\n", (int)(2 * i), "", dr_image_path(disk, i), dr_image_format(disk, i));
}

static int print_map(struct dr_disk *disk, struct dr_error *err)
{
    uint64_t size = dr_size(disk);
    struct dr_extent_status s;
    for (uint64_t off = 0; off < size; off += s.len) {
        int r = dr_block_status(disk, off, size - off, &s, err);
        if (r < 0)
            return r;
        printf("%12" PRIu64 " %12" PRIu64 "  %s", s.off, s.len,
               s.flags & DR_EXTENT_ZERO ? "zero" : "data");
        if (s.flags & DR_EXTENT_OFFSET)
            printf("  %s @ %" PRIu64, s.file, s.host_off);
        putchar('\n');
    }
    return 0;
}

static int copy_out(struct dr_disk *disk, uint64_t off, uint64_t len, FILE *out,
                    struct dr_error *err)
{
    static char buf[65536];
    while (len > 0) {
        size_t n = len < sizeof(buf) ? (size_t)len : sizeof(buf);
        int r = dr_pread(disk, buf, off, n, err);
        if (r < 0)
            return r;
        if (fwrite(buf, 1, n, out) != n) {
            perror("write");
            exit(1);
        }
        off += n;
        len -= n;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    int r;

    if (argc != 2 && argc != 5) {
        fprintf(stderr, "usage: %s DISK [OFFSET LENGTH OUTPUT]\n", argv[0]);
        return 2;
    }
    if (dr_open(argv[1], NULL, &disk, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    print_chain(disk);
    r = print_map(disk, &err);
    if (r == 0 && argc == 5) {
        FILE *out = fopen(argv[4], "wb");
        if (!out) {
            perror(argv[4]);
            return 1;
        }
        r = copy_out(disk, strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0), out, &err);
        if (fclose(out) != 0 && r == 0) {
            perror(argv[4]);
            r = -1;
        }
    }
    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    dr_close(disk, NULL);
    return r < 0;
}
