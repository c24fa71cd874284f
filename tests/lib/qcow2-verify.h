/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counts every way to every cluster of a qcow2 file and compares that with what the file says. It
 * reads the file by itself, by nothing that the driver has, so that the driver cannot be wrong in
 * the same manner. For small files without a data file and encryption. */
#ifndef DR_TEST_QCOW2_VERIFY_H
#define DR_TEST_QCOW2_VERIFY_H

#include "storage/storage.h"

struct qcow2_verdict {
    unsigned low;    /* clusters that are counted less often than they are used */
    unsigned leaked; /* ... more often */
    unsigned shared; /* COPIED, and there is another way: written in place, a snapshot changes */
    unsigned stale;  /* COPIED otherwise not as the counts say */
    unsigned broken; /* entries that lead to no cluster of the file */
    char text[160];  /* the first of these */
};

int qcow2_verify(struct dr_fs *fs, const char *path, struct qcow2_verdict *v, struct dr_error *err);

#endif
