# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library called from Python, for thousands of archives a second. A child does it, so that a crash is a failed
test and not the end of pytest."""
import ctypes as c
import fcntl
import json
import os
import signal

import pytest
from conftest import DROVER

PATH = os.path.join(os.path.dirname(DROVER), "src", "libdrover.so")


class Error(c.Structure):
    _fields_ = [("errnum", c.c_int), ("text", c.c_char * 2048)]


class OpenOptions(c.Structure):
    _fields_ = [("use_fd", c.c_bool), ("fd", c.c_int), ("message", c.c_void_p), ("user", c.c_void_p),
                ("more", c.c_byte * 64)]  # zeros for whatever comes to it


class ExtractOptions(c.Structure):
    _fields_ = [("targets", c.c_void_p), ("n_targets", c.c_size_t), ("sums", c.c_char_p), ("no_sums", c.c_bool),
                ("salvage", c.c_bool), ("headers_only", c.c_bool), ("damage", c.c_void_p), ("user", c.c_void_p),
                ("more", c.c_byte * 256)]  # zeros for whatever comes to it


class Library:
    def __init__(self):
        self.lib = c.CDLL(PATH)
        self.lib.dr_vma_close.restype = None

    def verify(self, fd, headers_only=False, salvage=False):
        """0, or the message."""
        vma, err = c.c_void_p(), Error()
        options = OpenOptions(True, fd, None, None)
        if self.lib.dr_vma_open(b"mem.vma", c.byref(options), c.byref(vma), c.byref(err)) < 0:
            return err.text.decode(errors="replace") or "no message"
        extract = ExtractOptions(None, 0, None, True, salvage, headers_only, None, None)
        rc = self.lib.dr_vma_extract(vma, c.byref(extract), None, None, c.byref(err))
        self.lib.dr_vma_close(vma)
        return 0 if rc == 0 else err.text.decode(errors="replace") or "no message"

    def verify_bytes(self, data, piped=False, **kw):
        if piped:
            source, sink = os.pipe()
            fcntl.fcntl(sink, 1031, 1 << 20)  # F_SETPIPE_SZ: all of it fits
            assert len(data) <= 1 << 20
            os.write(sink, data)
            os.close(sink)
        else:
            source = os.memfd_create("vma")
            os.write(source, data)
            os.lseek(source, 0, os.SEEK_SET)
        try:
            return self.verify(source, **kw)
        finally:
            os.close(source)


def in_child(work, timeout=100):
    """work(library) -> anything that JSON can hold."""
    if not os.path.exists(PATH):
        pytest.skip(f"{PATH} is not built")
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(timeout)
            result = work(Library())
            with os.fdopen(sink, "w") as f:
                json.dump(result, f)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source) as f:
        text = f.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"
    return json.loads(text)
