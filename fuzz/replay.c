/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Runs a fuzz target over the files of its corpus directories, so that every input that ever
 * mattered is tried in every build, without a fuzzer. */
#include <dirent.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/cleanup.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int run_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) {
        perror(path);
        return -1;
    }
    CLEANUP_FREE uint8_t *buf = NULL;
    size_t cap = 0, len = 0, got;
    do {
        cap = cap ? cap * 2 : 65536;
        uint8_t *more = realloc(buf, cap);
        if (!more)
            break;
        buf = more;
        got = fread(buf + len, 1, cap - len, f);
        len += got;
    } while (len == cap);
    fclose(f);
    LLVMFuzzerTestOneInput(buf, len);
    return 0;
}

static int run_directory(const char *dir)
{
    DIR *d = opendir(dir);
    if (!d) {
        perror(dir);
        return -1;
    }
    int n = 0;
    for (struct dirent *e; (e = readdir(d));) {
        char path[4096];
        if (e->d_name[0] == '.' ||
            snprintf(path, sizeof(path), "%s/%s", dir, e->d_name) >= (int)sizeof(path))
            continue;
        if (run_file(path) < 0)
            n = -1;
        if (n < 0)
            break;
        n++;
    }
    closedir(d);
    return n;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        int n = run_directory(argv[i]);
        if (n <= 0) {
            fprintf(stderr, "%s: no inputs\n", argv[i]);
            return 1;
        }
        printf("%s: %d inputs\n", argv[i], n);
    }
    return 0;
}
