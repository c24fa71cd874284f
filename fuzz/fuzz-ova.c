/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A whole OVA, or (the first byte is odd) the text of a descriptor, and of a manifest: headers of
 * tars, names, references. All disks are opened, read at their beginning, and checked. */
#include <stdlib.h>
#include <string.h>

#include "archive/ova-manifest.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "core/core.h"
#include "ops/ops-internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool true_)
{
    if (!true_)
        abort();
}

static void parse(const uint8_t *text, size_t len)
{
    struct dr_error err = DR_ERROR_INIT;
    struct ovf ovf;
    struct ova_manifest m;
    int r = ovf_parse("x.ovf", (const char *)text, len, &ovf, &err);
    must((r < 0) == (err.text[0] != '\0'));
    for (size_t i = 0; r == 0 && i < ovf.n_disks; i++)
        must(ovf.disks[i].id && ovf.disks[i].capacity <= INT64_MAX);
    ovf_free(&ovf);
    ova_manifest_parse("x.mf", (const char *)text, len, &m, NULL);
    ova_manifest_free(&m);
}

static void drop(void *user, const char *line)
{
    (void)user;
    must(line[0] != '\0');
}

static void open_disk(struct dr_fs *fs, const char *name)
{
    struct dr_disk *disk = NULL;
    uint8_t buf[4096];
    if (dr_open_fs(fs, name, NULL, &disk, NULL) == 0) {
        if (dr_size(disk) > 0)
            dr_pread(disk, buf, 0, (size_t)dr_min(sizeof(buf), dr_size(disk)), NULL);
        dr_close(disk, NULL);
    }
}

static void open_all(struct dr_fs *fs)
{
    CLEANUP_FREE char *json = NULL;
    CLEANUP_FREE char *report = NULL;
    dr_info_fs(fs, "ova:/m.ova", NULL, false, &json, NULL);
    dr_check_fs(fs, "ova:/m.ova", NULL, 0, drop, NULL, &report, NULL);
    open_disk(fs, "ova:/m.ova");
    open_disk(fs, "ova:/m.ova#d1");
    open_disk(fs, "ova:/m.ova#m.ovf");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    if (data[0] & 1) {
        parse(data + 1, size - 1);
        return 0;
    }
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f;
    must(dr_file_open(fs, "/m.ova", DR_FILE_CREATE, &f, NULL) == 0);
    must(size == 1 || dr_file_pwrite(f, data + 1, 0, size - 1, NULL) == 0);
    dr_file_unref(f);
    open_all(fs);
    dr_fs_memory_free(fs);
    return 0;
}
