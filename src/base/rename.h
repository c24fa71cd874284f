/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Two things about names that some file systems lack, and what does instead. */
#ifndef DR_BASE_RENAME_H
#define DR_BASE_RENAME_H

/* Give the file from the name to, which must be free: 0, -EEXIST, or another negative errno. The
 * names are relative to the directories (AT_FDCWD: the current one). */
int dr_rename_new(int from_dir, const char *from, int to_dir, const char *to);

/* Make the entries of an open directory durable: 0, also where the file system has nothing to do
 * for that, or a negative errno. */
int dr_fsync_dir(int fd);

#endif
