/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Headers of LUKS: the input is the beginning of the file, which then has zeros up to a sector
 * behind where the header says that the disk begins. Decoded, encoded again, told of, and tried
 * with a password where that takes few iterations. */
#include <stdlib.h>
#include <string.h>

#include "core/core.h"
#include "formats/luks/header.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MOST_BYTES      (UINT64_C(8) << 20)
#define MOST_ITERATIONS 20000u

static struct dr_fs *make_file(const uint8_t *data, size_t size, uint64_t len)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f;
    if (!fs || dr_file_open(fs, "/d/disk", DR_FILE_CREATE, &f, NULL) < 0)
        abort();
    if (dr_file_pwrite(f, data, 0, size, NULL) < 0 || dr_file_truncate(f, len, NULL) < 0)
        abort();
    dr_file_unref(f);
    return fs;
}

static uint64_t iterations(const struct luks_header *h)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        if (h->slots[i].active)
            sum += (uint64_t)h->slots[i].iterations + h->iterations;
    return sum;
}

/* What was taken for a header says the same when it is written. */
static void encode_again(const struct luks_header *h)
{
    uint8_t buf[LUKS_HEADER];
    struct luks_header again;
    luks_encode(h, buf);
    if (luks_decode(buf, "again", &again, NULL) < 0 || again.payload != h->payload ||
        strcmp(again.mode, h->mode) != 0 || iterations(&again) != iterations(h))
        abort();
}

static void open_it(struct dr_fs *fs, const char *secret)
{
    struct dr_open_options o = {.format = "luks", .key_secret = secret};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    uint8_t buf[700];
    if (dr_open_fs(fs, "/d/disk", &o, &disk, &err) < 0) {
        if (!err.text[0])
            abort(); /* every refusal says why */
        return;
    }
    if (dr_size(disk) >= sizeof(buf) &&
        (dr_pread(disk, buf, 0, sizeof(buf), &err) == 0) != !!secret)
        abort(); /* nothing is read without a password */
    dr_close(disk, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct luks_header h;
    struct dr_error err = DR_ERROR_INIT;
    if (size < LUKS_HEADER)
        return 0;
    if (luks_decode(data, "input", &h, &err) < 0) {
        if (!err.text[0])
            abort();
        return 0;
    }
    encode_again(&h);
    uint64_t len = h.payload + 1024;
    if (len > MOST_BYTES || size > len)
        return 0;
    json_t *told = json_object();
    luks_info(&h, told);
    json_decref(told);
    struct dr_fs *fs = make_file(data, size, len);
    open_it(fs, NULL);
    if (dr_secret_set("s", "password", 8) < 0)
        abort();
    if (iterations(&h) <= MOST_ITERATIONS)
        open_it(fs, "s");
    dr_fs_memory_free(fs);
    return 0;
}
