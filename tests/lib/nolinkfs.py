# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FUSE file system that passes a directory through and lacks what shared folders, exFAT and s3fs lack: hard links,
the flags of rename, and the fsync of directories. usage: nolinkfs.py DIRECTORY MOUNTPOINT"""
import errno
import os
import sys

from fusepy import FUSE, FuseOSError, Operations

STAT = ("st_atime", "st_blocks", "st_ctime", "st_gid", "st_ino", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid")
STATVFS = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize", "f_namemax")


class NoLinks(Operations):
    def __init__(self, root):
        self.root = root

    def __call__(self, op, path, *args):
        if not hasattr(self, op):
            raise FuseOSError(errno.EFAULT)
        return getattr(self, op)(self.root + path, *args)

    def getattr(self, path, _handle=None):
        try:
            st = os.lstat(path)
        except OSError as e:
            raise FuseOSError(e.errno) from e
        return {name: getattr(st, name) for name in STAT}

    def statfs(self, path):
        st = os.statvfs(path)
        return {name: getattr(st, name) for name in STATVFS}

    def readdir(self, path, _handle):
        return [".", "..", *os.listdir(path)]

    def access(self, _path, _mode):
        return 0

    def mkdir(self, path, mode):
        os.mkdir(path, mode)

    def rmdir(self, path):
        os.rmdir(path)

    def unlink(self, path):
        os.unlink(path)

    def rename(self, old, new):
        os.rename(old, self.root + new)

    def link(self, _target, _source):
        raise FuseOSError(errno.EPERM)

    def chmod(self, path, mode):
        os.chmod(path, mode)

    def chown(self, path, uid, gid):
        os.chown(path, uid, gid)

    def utimens(self, path, times=None):
        os.utime(path, times)

    def open(self, path, flags):
        return os.open(path, flags)

    def create(self, path, mode, _info=None):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, _path, size, offset, handle):
        return os.pread(handle, size, offset)

    def write(self, _path, data, offset, handle):
        return os.pwrite(handle, data, offset)

    def truncate(self, path, length, _handle=None):
        os.truncate(path, length)

    def fsync(self, _path, _data_only, handle):
        os.fsync(handle)

    def fsyncdir(self, _path, _data_only, _handle):
        raise FuseOSError(errno.EINVAL)

    def release(self, _path, handle):
        os.close(handle)


FUSE(NoLinks(sys.argv[1]), sys.argv[2], foreground=True, nothreads=True, use_ino=True)
