/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/rename.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* Does this errno say that the kernel or the file system lacks the call or its flag? */
static bool is_lacking(int e)
{
    return e == EINVAL || e == ENOSYS || e == EOPNOTSUPP || e == EPERM;
}

/* Does the name still lead to the empty file that we made there? */
static bool is_reserved(int dir, const char *name, const struct stat *made)
{
    struct stat st;
    return fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_dev == made->st_dev &&
           st.st_ino == made->st_ino && st.st_size == 0;
}

/* Reserve the name with an empty file of our own, then rename over that. Two things are weaker than
 * in the other ways, and the manual says so: a process that is killed in between leaves the empty
 * file, and a file that somebody else puts there in the instant between the check and the rename is
 * lost. The reserving file is closed first, since some shared folders refuse to rename over an open
 * one. */
static int rename_over_reserved(int from_dir, const char *from, int to_dir, const char *to)
{
    struct stat made;
    int fd = openat(to_dir, to, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    int e = fstat(fd, &made) < 0 ? errno : 0;
    close(fd);
    if (e == 0 && !is_reserved(to_dir, to, &made))
        return -EEXIST;
    if (e == 0 && renameat(from_dir, from, to_dir, to) < 0)
        e = errno;
    if (e != 0 && is_reserved(to_dir, to, &made))
        unlinkat(to_dir, to, 0);
    return -e;
}

/* Both names lead to one file: an earlier attempt made the second link and was killed before it
 * removed the first. */
static bool is_linked_already(int from_dir, const char *from, int to_dir, const char *to)
{
    struct stat a, b;
    return fstatat(from_dir, from, &a, AT_SYMLINK_NOFOLLOW) == 0 &&
           fstatat(to_dir, to, &b, AT_SYMLINK_NOFOLLOW) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

static int name_is_taken(int from_dir, const char *from, int to_dir, const char *to)
{
    if (!is_linked_already(from_dir, from, to_dir, to))
        return -EEXIST;
    return unlinkat(from_dir, from, 0) < 0 ? -errno : 0;
}

/* Three ways, the best first: a rename that never replaces, a second link to the file, a reserved
 * name. FUSE 2, exFAT, s3fs and the shared folders of virtual machines have only the last. */
int dr_rename_new(int from_dir, const char *from, int to_dir, const char *to)
{
    if (renameat2(from_dir, from, to_dir, to, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno == EEXIST)
        return name_is_taken(from_dir, from, to_dir, to);
    if (!is_lacking(errno))
        return -errno;
    if (linkat(from_dir, from, to_dir, to, 0) == 0) {
        unlinkat(from_dir, from, 0);
        return 0;
    }
    if (errno == EEXIST)
        return name_is_taken(from_dir, from, to_dir, to);
    if (!is_lacking(errno) && errno != EMLINK)
        return -errno;
    return rename_over_reserved(from_dir, from, to_dir, to);
}

int dr_fsync_dir(int fd)
{
    return fsync(fd) == 0 || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -errno;
}
