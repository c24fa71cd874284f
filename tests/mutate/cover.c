/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Notes which code of the library a process runs. `./dev mutate` builds one tree with
 * -fsanitize-coverage=trace-pc, whose every basic block calls __sanitizer_cov_trace_pc(), and links
 * everything there with this.
 *
 *   DROVER_COVER=FILE   the byte at the offset of a block's code is set when the block runs
 *
 * The file is there and as long as the map, since a test may limit the length of files. It is
 * mapped shared, so processes that are killed count too, and several may use one file.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LIBRARY "libdrover-internal"
#define SIZE    ((size_t)16 << 20) /* more than the library has code */

void __sanitizer_cov_trace_pc(void);

static uint8_t *seen;
static uintptr_t base;

static int find_library(struct dl_phdr_info *info, size_t size, void *unused)
{
    (void)size, (void)unused;
    if (!strstr(info->dlpi_name, LIBRARY))
        return 0;
    base = info->dlpi_addr;
    return 1;
}

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("DROVER_COVER");
    if (!path || !dl_iterate_phdr(find_library, NULL))
        return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *at = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    seen = at == MAP_FAILED ? NULL : at;
    close(fd);
}

__attribute__((visibility("default"))) void __sanitizer_cov_trace_pc(void)
{
    uintptr_t at = (uintptr_t)__builtin_return_address(0) - base;
    if (seen && at < SIZE && !seen[at])
        seen[at] = 1;
}
