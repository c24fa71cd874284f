/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The operating system's file systems: names, attributes, space. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/rename.h"
#include "storage/part.h"
#include "storage/posix.h"
#include "storage/remote.h"

struct dr_file_id posix_id(const struct stat *st)
{
    if (S_ISBLK(st->st_mode))
        return (struct dr_file_id){.dev = st->st_rdev, .ino = UINT64_MAX};
    return (struct dr_file_id){.dev = st->st_dev, .ino = st->st_ino};
}

/* ------------------------------------------------------------------ open */

int posix_check_type(const char *path, const struct stat *st, struct dr_error *err)
{
    if (S_ISREG(st->st_mode) || S_ISBLK(st->st_mode))
        return 0;
    if (S_ISDIR(st->st_mode))
        return dr_fail(err, EISDIR, "%s: is a directory, not a file or block device", path);
    const char *what = S_ISFIFO(st->st_mode)   ? "pipe"
                       : S_ISSOCK(st->st_mode) ? "socket"
                       : S_ISCHR(st->st_mode)  ? "character device"
                                               : "special file";
    return dr_fail(err, EINVAL, "%s: is a %s, not a file or block device", path, what);
}

int posix_open_fd(const char *path, int how, mode_t mode, bool *direct)
{
    /* O_NONBLOCK: the open of a pipe with nobody at its other end would wait for ever. */
    how |= O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    int fd;
    do
        fd = open(path, how, mode);
    while (fd < 0 && (errno == EINTR || (errno == EMFILE && posix_window_make_room())));
    if (fd < 0)
        return -errno;
    /* O_NONBLOCK was for the open only. O_DIRECT is set here, where its refusal has made no file.
     */
    if (!*direct || fcntl(fd, F_SETFL, O_DIRECT)) {
        fcntl(fd, F_SETFL, 0);
        *direct = false;
    }
    return fd;
}

static int open_fd(const char *path, unsigned flags, bool *direct)
{
    int how = flags & DR_FILE_RDWR ? O_RDWR : O_RDONLY;
    if (flags & DR_FILE_CREATE)
        how |= O_CREAT | (flags & DR_FILE_TRUNCATE ? 0 : O_EXCL);
    *direct = flags & DR_FILE_DIRECT;
    return posix_open_fd(path, how, flags & DR_FILE_PRIVATE ? 0600 : 0644, direct);
}

/* ------------------------------------------------------------------ O_DIRECT */

void posix_open_cached(struct posix_file *p)
{
    char link[64];
    bool direct = false;
    if (!p->direct || p->base.block_device || p->cached >= 0)
        return;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", p->fd);
    p->cached = posix_open_fd(link, O_RDWR, 0, &direct);
    if (p->cached < 0)
        posix_give_up_direct(p, p->fd);
}

/* Linux 6.1 and later tell; a device tells its blocks; 4096 suits everybody else. */
static void find_alignment(struct posix_file *p, uint32_t sector)
{
    struct dr_file *f = &p->base;
    unsigned offset = f->block_device ? sector : 4096, mem = 4096;
#ifdef STATX_DIOALIGN
    struct statx st;
    if (statx(p->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) == 0 &&
        (st.stx_mask & STATX_DIOALIGN)) {
        if (!st.stx_dio_offset_align) {
            posix_give_up_direct(p, p->fd);
            return;
        }
        offset = (unsigned)dr_max(st.stx_dio_offset_align, 512u);
        mem = (unsigned)dr_max(st.stx_dio_mem_align, 1u);
    }
#endif
    if (offset > 65536 || mem > 4096) {
        posix_give_up_direct(p, p->fd);
        return;
    }
    f->read_align = f->write_align = offset;
    f->mem_align = mem;
}

static int fill_in(struct posix_file *p, struct dr_fs *fs, const char *path, const struct stat *st,
                   struct dr_error *err)
{
    struct dr_file *f = &p->base;
    int sector = 512;
    f->ops = &posix_file_ops;
    f->fs = fs;
    f->id = posix_id(st);
    f->atomic_size = 512;
    f->block_device = S_ISBLK(st->st_mode);
    f->size = (uint64_t)st->st_size;
    f->path = strdup(path);
    if (!f->path)
        return dr_fail_errno(err, ENOMEM, "Could not open '%s'", path);
    if (f->block_device) {
        off_t end = lseek(p->fd, 0, SEEK_END);
        if (end < 0 || ioctl(p->fd, BLKSSZGET, &sector) < 0)
            return dr_fail_errno(err, errno, "%s: cannot get the size of the device", path);
        f->size = (uint64_t)end;
    }
    p->sector = (uint32_t)sector;
    if (p->direct)
        find_alignment(p, p->sector);
    p->block = st->st_blksize >= 512 ? (uint32_t)st->st_blksize : 4096;
    return 0;
}

/* fd is taken over in any case. */
static int file_of(int fd, bool direct, struct dr_fs *fs, const char *path, struct posix_file **out,
                   struct dr_error *err)
{
    CLEANUP_CLOSE int own = fd;
    struct stat st;
    if (fstat(fd, &st))
        return dr_fail_errno(err, errno, "Could not open '%s'", path);
    int r = posix_check_type(path, &st, err);
    if (r)
        return r;
    struct posix_file *p = dr_calloc_lines(sizeof(*p));
    if (!p)
        return dr_fail_errno(err, ENOMEM, "Could not open '%s'", path);
    p->fd = fd;
    p->cached = -1;
    p->direct = direct;
    r = fill_in(p, fs, path, &st, err);
    if (r) {
        free(p->base.path);
        free(p);
        return r;
    }
    *out = p;
    own = -1;
    return 0;
}

/* Only an empty file takes it. Most file systems know nothing of it, and need not. */
static void turn_off_copy_on_write(int fd)
{
    int attributes;
    if (ioctl(fd, FS_IOC_GETFLAGS, &attributes) < 0)
        return;
    attributes |= FS_NOCOW_FL;
    (void)!ioctl(fd, FS_IOC_SETFLAGS, &attributes);
}

static int posix_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                      struct dr_error *err)
{
    if (dr_part_is(path))
        return dr_part_open(fs, path, flags, file, err);
    if (dr_remote_is(path))
        return dr_remote_open(fs, path, flags, file, err);
    struct stat st;
    /* Looked at before: merely opening some devices does something. Looked at again below. */
    int r = stat(path, &st) == 0 && !(flags & DR_FILE_CREATE && !(flags & DR_FILE_TRUNCATE))
                ? posix_check_type(path, &st, err)
                : 0;
    if (r)
        return r;
    bool direct;
    int fd = open_fd(path, flags, &direct);
    if (fd < 0)
        return dr_fail_errno(err, -fd, "Could not %s '%s'",
                             flags & DR_FILE_CREATE ? "create" : "open", path);
    struct posix_file *p;
    r = file_of(fd, direct, fs, path, &p, err);
    if (r)
        return r;
    if ((flags & DR_FILE_CREATE) && (flags & DR_FILE_NOCOW))
        turn_off_copy_on_write(fd);
    if (flags & DR_FILE_RDWR)
        posix_open_cached(p);
    p->inode_dirty = flags & DR_FILE_CREATE;
    p->by_name = true;
    if (!(flags & DR_FILE_RDWR))
        posix_window_enter(p);
    *file = &p->base;
    return 0;
}

/* EISDIR is what kernels and file systems say that do not know of such files. */
static int posix_open_nameless(struct dr_fs *fs, const char *dir, unsigned flags,
                               struct dr_file **file, struct dr_error *err)
{
    bool direct = flags & DR_FILE_DIRECT;
    int fd = posix_open_fd(dir, O_TMPFILE | O_EXCL | O_RDWR, 0600, &direct);
    if (fd == -EOPNOTSUPP || fd == -EISDIR || fd == -ENOENT || fd == -EINVAL)
        return -ENOTSUP;
    if (fd < 0)
        return dr_fail_errno(err, -fd, "Could not create a file in '%s'", dir);
    struct posix_file *p;
    int r = file_of(fd, direct, fs, dir, &p, err);
    if (r < 0)
        return r;
    posix_open_cached(p);
    *file = &p->base;
    return 0;
}

int dr_file_open_fd(int fd, const char *name, struct dr_file **file, struct dr_error *err)
{
    char path[32];
    struct stat st;
    *file = NULL;
    if (fstat(fd, &st))
        return dr_fail_errno(err, errno, "Could not open '%s'", name);
    int r = posix_check_type(name, &st, err);
    if (r)
        return r;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    bool direct;
    int own = open_fd(path, 0, &direct);
    if (own < 0)
        return dr_fail_errno(err, -own, "Could not open '%s'", name);
    struct posix_file *p;
    r = file_of(own, direct, dr_fs_posix(), name, &p, err);
    return r ? r : dr_file_adopt(&p->base, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, file, err);
}

/* ------------------------------------------------------------------ names */

static int identify_part(struct dr_fs *fs, const char *name, struct dr_file_id *id,
                         struct dr_error *err)
{
    CLEANUP_FREE char *bottom = NULL;
    uint64_t from, to;
    int r = dr_part_range(name, &bottom, &from, &to, err);
    if (r == 0)
        r = fs->ops->identify(fs, bottom, id, err);
    if (r == 0 && (from > 0 || to < UINT64_MAX)) {
        id->from = from;
        id->to = to;
    }
    return r;
}

static int posix_identify(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                          struct dr_error *err)
{
    if (dr_part_is(path))
        return identify_part(fs, path, id, err);
    if (dr_remote_is(path))
        return dr_remote_identify(path, id, err);
    struct stat st;
    (void)fs;
    if (stat(path, &st))
        return dr_fail_errno(err, errno, "Could not open '%s'", path);
    *id = posix_id(&st);
    return 0;
}

static int rename_failed(int e, const char *from, const char *to, struct dr_error *err)
{
    return dr_fail_errno(err, e, "Could not rename '%s' to '%s'", from, to);
}

/* Names that no directory has; to may be NULL. */
static int refuse_names(const char *from, const char *to, const char *what, struct dr_error *err)
{
    const char *names[] = {from, to};
    for (int i = 0; i < 2 && names[i]; i++) {
        if (dr_part_is(names[i]))
            return dr_part_refuse(names[i], what, err);
        if (dr_remote_is(names[i]))
            return dr_remote_refuse(names[i], what, err);
    }
    return 0;
}

static int posix_rename(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    int r = refuse_names(from, to, "renamed", err);
    if (r < 0)
        return r;
    (void)fs;
    r = posix_window_keep(from, err);
    if (r == 0)
        r = posix_window_keep(to, err);
    if (r < 0)
        return r;
    return rename(from, to) ? rename_failed(errno, from, to, err) : 0;
}

static int posix_rename_new(struct dr_fs *fs, const char *from, const char *to,
                            struct dr_error *err)
{
    int r = refuse_names(from, to, "renamed", err);
    if (r < 0)
        return r;
    (void)fs;
    r = posix_window_keep(from, err);
    if (r < 0)
        return r;
    r = dr_rename_new(AT_FDCWD, from, AT_FDCWD, to);
    return r < 0 ? rename_failed(-r, from, to, err) : 0;
}

static int posix_unlink(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    int r = refuse_names(path, NULL, "removed", err);
    if (r < 0)
        return r;
    (void)fs;
    r = posix_window_keep(path, err);
    if (r < 0)
        return r;
    return unlink(path) ? dr_fail_errno(err, errno, "Could not remove '%s'", path) : 0;
}

static int posix_look(struct dr_fs *fs, const char *path, enum dr_name_kind *kind,
                      struct dr_file_id *id, struct dr_error *err)
{
    *kind = DR_NAME_FILE;
    if (dr_part_is(path) || dr_remote_is(path))
        return fs->ops->identify(fs, path, id, err);
    struct stat st;
    (void)fs;
    if (lstat(path, &st))
        return dr_fail_errno(err, errno, "%s: cannot tell what it is", path);
    *kind = S_ISREG(st.st_mode)   ? DR_NAME_FILE
            : S_ISLNK(st.st_mode) ? DR_NAME_LINK
            : S_ISDIR(st.st_mode) ? DR_NAME_DIR
                                  : DR_NAME_OTHER;
    *id = posix_id(&st);
    return 0;
}

static int posix_mkdir(struct dr_fs *fs, const char *path, unsigned mode, struct dr_error *err)
{
    int r = refuse_names(path, NULL, "created", err);
    if (r < 0)
        return r;
    (void)fs;
    return mkdir(path, mode) ? dr_fail_errno(err, errno, "Could not create '%s'", path) : 0;
}

static int posix_rmdir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    (void)fs;
    return rmdir(path) ? dr_fail_errno(err, errno, "Could not remove '%s'", path) : 0;
}

/* ------------------------------------------------------------------ locked directories */

struct posix_dir_lock {
    struct dr_dir_lock base;
    int fd;
};

/* The process that held the lock may have removed the directory before it released the lock: then
 * we have locked a directory without a name. */
static bool has_name(int fd, const char *path)
{
    struct stat ours, named;
    return fstat(fd, &ours) == 0 && lstat(path, &named) == 0 && ours.st_dev == named.st_dev &&
           ours.st_ino == named.st_ino;
}

static int posix_lock_dir(struct dr_fs *fs, const char *path, struct dr_dir_lock **held,
                          struct dr_error *err)
{
    CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return dr_fail_errno(err, errno, "Could not open directory '%s'", path);
    int r;
    while ((r = flock(fd, LOCK_EX | LOCK_NB)) && errno == EINTR)
        ;
    if (r && errno == EWOULDBLOCK)
        return dr_fail(err, EBUSY, "%s: another process is at work in this directory", path);
    if (r)
        return dr_fail(err, ENOTSUP, "%s: directories cannot be locked there", path);
    if (!has_name(fd, path))
        return dr_fail(err, ENOENT, "%s: was removed by another process", path);
    struct posix_dir_lock *lock = malloc(sizeof(*lock));
    if (!lock)
        return dr_fail_errno(err, ENOMEM, "Could not lock directory '%s'", path);
    *lock = (struct posix_dir_lock){.base.fs = fs, .fd = fd};
    fd = -1;
    *held = &lock->base;
    return 0;
}

static void posix_unlock_dir(struct dr_dir_lock *held)
{
    struct posix_dir_lock *lock = (struct posix_dir_lock *)held;
    close(lock->fd);
    free(lock);
}

/* ------------------------------------------------------------------ lists of names */

static int posix_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    (void)fs;
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    if (!dir)
        return dr_fail_errno(err, ENOMEM, "%s: cannot make the name durable", path);
    if (dr_remote_is(dir))
        return 0;
    bool direct = false;
    CLEANUP_CLOSE int fd = posix_open_fd(dir, O_RDONLY | O_DIRECTORY, 0, &direct);
    if (fd < 0)
        return dr_fail_errno(err, -fd, "Could not open directory '%s'", dir);
    int r = dr_fsync_dir(fd);
    if (r < 0)
        return dr_fail_errno(err, -r, "%s: cannot make the directory durable", dir);
    return 0;
}

static void close_dir(DIR **d)
{
    if (*d)
        closedir(*d);
}

static int posix_list(struct dr_fs *fs, const char *dir, int (*each)(void *user, const char *name),
                      void *user, struct dr_error *err)
{
    if (dr_remote_is(dir))
        return 0; /* a server's other files are nobody's neighbours */
    (void)fs;
    bool direct = false;
    CLEANUP_CLOSE int fd = posix_open_fd(dir, O_RDONLY | O_DIRECTORY, 0, &direct);
    if (fd < 0)
        return dr_fail_errno(err, -fd, "Could not open directory '%s'", dir);
    __attribute__((cleanup(close_dir))) DIR *d = fdopendir(fd);
    if (!d)
        return dr_fail_errno(err, errno, "Could not open directory '%s'", dir);
    fd = -1; /* d closes it */
    int r = 0;
    struct dirent *e;
    while (!r && (errno = 0, e = readdir(d)))
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            r = each(user, e->d_name);
    if (!r && errno)
        return dr_fail_errno(err, errno, "Could not read directory '%s'", dir);
    return r;
}

/* ------------------------------------------------------------------ attributes */

static bool wanted_label(const char *name)
{
    /* The last two describe this inode's content and nobody else's. */
    return strncmp(name, "security.", 9) == 0 && strcmp(name, "security.ima") != 0 &&
           strcmp(name, "security.evm") != 0;
}

static void copy_xattr(int from, int to, const char *name)
{
    char value[4096];
    ssize_t n = fgetxattr(from, name, value, sizeof(value));
    /* A label that we may not set, or that the target does not know, is skipped. */
    if (n >= 0)
        (void)!fsetxattr(to, name, value, (size_t)n, 0);
}

static void copy_labels(int from, int to)
{
    ssize_t n = flistxattr(from, NULL, 0);
    if (n <= 0)
        return;
    size_t room = (size_t)n;
    CLEANUP_FREE char *names = malloc(room);
    if (!names || (n = flistxattr(from, names, room)) <= 0)
        return;
    for (const char *p = names; p < names + n; p += strlen(p) + 1)
        if (wanted_label(p))
            copy_xattr(from, to, p);
}

#define ACL "system.posix_acl_access"

/* Bits that would give rights to another owner or group than they were meant for go. */
static mode_t narrowed_mode(const struct stat *want, const struct stat *have)
{
    mode_t mode = want->st_mode & 07777;
    if (have->st_gid != want->st_gid) {
        mode_t other = mode & 07;
        mode &= ~(mode_t)S_ISGID & ~((~other & 07) << 3);
    }
    if (have->st_uid != want->st_uid)
        mode &= ~(mode_t)S_ISUID;
    return mode;
}

static int posix_copy_attrs(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                            struct dr_error *err)
{
    (void)fs;
    if (from->ops != &posix_file_ops || to->ops != &posix_file_ops)
        return 0; /* a disk on a server has none */
    POSIX_USE(source, posix_file(from));
    POSIX_USE(target, posix_file(to));
    int in = source.fd, out = target.fd;
    struct stat want, have;
    if (in < 0 || out < 0)
        return dr_fail_errno(err, in < 0 ? -in : -out, "%s: cannot get owner and mode",
                             in < 0 ? from->path : to->path);
    if (fstat(in, &want))
        return dr_fail_errno(err, errno, "%s: cannot get owner and mode", from->path);
    /* An owner or group that we may not set stays; narrowed_mode() takes its rights away. */
    if (fchown(out, want.st_uid, want.st_gid))
        (void)!fchown(out, (uid_t)-1, want.st_gid);
    (void)!fremovexattr(out, ACL); /* what the directory gives to new files is not from's */
    if (fstat(out, &have) || fchmod(out, narrowed_mode(&want, &have)))
        return dr_fail_errno(err, errno, "%s: cannot set the mode", to->path);
    if (have.st_gid == want.st_gid)
        copy_xattr(in, out, ACL);
    copy_labels(in, out);
    posix_file(to)->inode_dirty = true;
    to->dirty = true;
    return 0;
}

/* ------------------------------------------------------------------ space, real names */

static int posix_free_space(struct dr_fs *fs, const char *path, uint64_t *bytes,
                            struct dr_error *err)
{
    *bytes = UINT64_MAX;
    if (dr_part_is(path) || dr_remote_is(path))
        return 0;
    (void)fs;
    struct statvfs st;
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    if (!dir)
        return dr_fail_errno(err, ENOMEM, "%s: cannot get the free space", path);
    /* Ask the file first: path may be a link to another file system, or a mount. */
    if (statvfs(path, &st) && statvfs(dir, &st))
        return dr_fail_errno(err, errno, "%s: cannot get the free space", dir);
    /* No blocks at all: a file system that keeps no count of them, such as ramfs. */
    if (st.f_blocks == 0 ||
        __builtin_mul_overflow((uint64_t)st.f_bavail, (uint64_t)st.f_frsize, bytes))
        *bytes = UINT64_MAX;
    return 0;
}

static int realpath_of_part(struct dr_fs *fs, const char *name, char **out, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    DR_CLEANUP_PART struct dr_part part = {0};
    int r = dr_part_parse(name, &part, err);
    if (r == 0 && part.filename)
        r = fs->ops->realpath(fs, part.filename, &real, err);
    return r < 0 ? r : dr_part_rename(name, real ? real : "", out, err);
}

static int posix_realpath(struct dr_fs *fs, const char *path, char **out, struct dr_error *err)
{
    if (dr_part_is(path))
        return realpath_of_part(fs, path, out, err);
    if (dr_remote_is(path))
        return dr_remote_realpath(path, out, err);
    (void)fs;
    *out = realpath(path, NULL);
    return *out ? 0 : dr_fail_errno(err, errno, "Could not open '%s'", path);
}

bool dr_path_is_mount(const char *path)
{
    struct statx st;
    if (statx(AT_FDCWD, path, 0, STATX_INO, &st) < 0)
        return false;
    return st.stx_attributes_mask & st.stx_attributes & STATX_ATTR_MOUNT_ROOT;
}

/* The text of the link; NULL if path is no link or a stranger's. Owner and text are read from one
 * descriptor, so the link cannot be exchanged in between. */
static char *read_link(const char *path)
{
    char text[PATH_MAX];
    struct stat st;
    CLEANUP_CLOSE int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISLNK(st.st_mode) ||
        (st.st_uid != 0 && st.st_uid != geteuid()))
        return NULL;
    ssize_t n = readlinkat(fd, "", text, sizeof(text));
    return n <= 0 || (size_t)n == sizeof(text) ? NULL : strndup(text, (size_t)n);
}

int dr_path_follow(const char *path, char **to)
{
    *to = NULL;
    for (int i = 0; i < 40; i++) { /* as many as the kernel follows */
        const char *at = *to ? *to : path;
        CLEANUP_FREE char *link = read_link(at);
        if (!link)
            return 0;
        char *next = dr_path_sibling(at, link);
        if (!next)
            return -ENOMEM;
        free(*to);
        *to = next;
    }
    free(*to);
    *to = NULL;
    return -ELOOP;
}

/* Without /proc nobody knows. */
static int posix_where(struct dr_fs *fs, struct dr_file *f, char **out, struct dr_error *err)
{
    char link[64], real[PATH_MAX];
    *out = NULL;
    if (f->fs != fs) /* parts of files, unpacked bytes: not opened here */
        return -ENOTSUP;
    if (dr_remote_is(f->path))
        return dr_remote_realpath(f->path, out, err);
    POSIX_USE(use, posix_file(f));
    if (use.fd < 0)
        return dr_fail_errno(err, -use.fd, "%s: cannot be opened again", f->path);
    snprintf(link, sizeof(link), "/proc/self/fd/%d", use.fd);
    ssize_t n = readlink(link, real, sizeof(real));
    if (n <= 0 || (size_t)n == sizeof(real))
        return -ENOTSUP;
    *out = strndup(real, (size_t)n);
    return *out ? 0 : dr_fail_errno(err, ENOMEM, "%s", f->path);
}

struct dr_fs *dr_fs_posix(void)
{
    static const struct dr_fs_ops ops = {
        .open = posix_open,
        .open_nameless = posix_open_nameless,
        .identify = posix_identify,
        .rename = posix_rename,
        .rename_new = posix_rename_new,
        .unlink = posix_unlink,
        .sync_dir = posix_sync_dir,
        .list = posix_list,
        .copy_attrs = posix_copy_attrs,
        .free_space = posix_free_space,
        .realpath = posix_realpath,
        .where = posix_where,
        .look = posix_look,
        .mkdir = posix_mkdir,
        .rmdir = posix_rmdir,
        .lock_dir = posix_lock_dir,
        .unlock_dir = posix_unlock_dir,
    };
    static struct dr_fs fs = {.ops = &ops};
    return &fs;
}
