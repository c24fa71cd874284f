# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that are described by options: layers of drivers, settings of QEMU's drivers."""
import json
import os
import shutil

import pytest
from conftest import once, same


def without_space(text):
    return "\n".join(line for line in text.splitlines() if "disk size" not in line and "file format" not in line)


def chain(t):
    t.ok("create", "-f", "qcow2", "base", "1M")
    t.io("base", "write -P 1 0 64k")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", "base", "child")
    t.ok("create", "-f", "qcow2", "other", "1M")
    t.io("other", "write -P 2 0 64k")
    (t.dir / "disk.img").write_bytes(b"d" * 4096)
    (t.dir / "dir").mkdir()
    (t.dir / "password").write_text("secret")


@pytest.fixture
def c(t):
    once(t, "image-options", lambda: chain(t))
    return t


@pytest.mark.parametrize("args", [
    ["info", "--image-opts", "driver=qcow2,file.driver=file,file.filename=child"],
    ["info", "--image-opts", "driver=qcow2,file.filename=base,l2-cache-size=1M,cache-clean-interval=10,lazy-refcounts=on"],
    ["info", "--image-opts", "driver=qcow2,file.filename=base,overlap-check=none,pass-discard-other=off,file.drop-cache=off"],
    ["compare", "--image-opts", "driver=qcow2,file.filename=child,backing.driver=qcow2,backing.file.filename=other",
     "driver=qcow2,file.filename=other"],
    ["compare", "--image-opts", "driver=qcow2,file.filename=child,backing.driver=raw,backing.file.filename=disk.img",
     "driver=raw,file.filename=disk.img"],
    ["info", "--image-opts", "disk.img"], ["info", "--image-opts", "driver=frob,file.filename=disk.img"],
    ["info", "--image-opts", "driver=raw,file.driver=host_device,file.filename=disk.img"],
    ["info", "--image-opts", "driver=file,filename=dir"], ["info", "--image-opts", "driver=file,filename=disk.img"],
    ["info", "host_device:disk.img"], ["info", "-f", "host_device", "disk.img"], ["info", "-f", "file", "disk.img"],
], ids=lambda args: " ".join(args)[:60])
def test_options_mean_what_they_mean_to_qemu(c, args):
    same(c.ours("qemu-img", *args), c.real("qemu-img", *args), without_space)


@pytest.mark.parametrize("options", ["driver=qcow2,file.filename=base,l2-cache-size=big", "driver=qcow2,file.filename=base,overlap-check=frob",
                                     "driver=qcow2,file.filename=base,frob=1", "driver=qcow2,file.filename=base,offset=512",
                                     "driver=qcow2,file.filename=child,backing.driver=blkdebug,backing.image.filename=base"])
def test_settings_that_mean_nothing_are_refused(c, options):
    r = c.ours("qemu-img", "info", "--image-opts", options)
    assert r.code == 1 and ("does not support the option" in r.err or "is not supported" in r.err), r


@pytest.mark.parametrize("options,words", [
    ("driver=raw,file.filename=disk.img,file.password-secret=s", "file.password=*** is not supported"),
    ("driver=raw,file.filename=disk.img,backing.cookie-secret=s", "backing.cookie=*** is not supported"),
    ("driver=http,url=http://127.0.0.1:9/x,username=u,password-secret=d", "Unable to read dir"),
    ("driver=http,url=http://127.0.0.1:9/x,username=u,password-secret=l", "password=*** is not supported"),
])
def test_a_secret_that_cannot_be_used_is_not_left_out_nor_printed(c, options, words):
    (c.dir / "latin").write_bytes(b"secr\xe9t")
    files = {"s": "password", "d": "dir", "l": "latin"}
    secret = options[options.index("-secret=") + len("-secret=")]
    r = c.drover("info", "--object", f"secret,id={secret},file={files[secret]}", "--image-opts", options)
    assert r.code == 1 and words in r.err.replace("'", "") and "secret" not in r.err.replace("-secret=", ""), r


def test_a_path_need_not_be_utf_8(t):
    path = t.dir / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"d" * 4096)
    for options in ("driver=raw,file.filename=", "driver=raw,file.driver=file,file.filename=", "driver=file,filename="):
        assert t.start(t.bin / "drover", "compare", "--image-opts", options + os.fspath(path), options + os.fspath(path)).code == 0


def test_another_data_file_is_taken(c):
    c.ok("create", "-f", "qcow2", "-o", "data_file=data", "split", "1M")
    c.io("split", "write -P 3 0 64k")
    (c.dir / "data").rename(c.dir / "moved")
    r = c.ours("qemu-io", "-c", "read -P 3 0 64k", "--image-opts",
               "driver=qcow2,file.filename=split,data-file.driver=file,data-file.filename=moved")
    assert r.code == 0 and "failed" not in r.out, r


def test_json_and_lists_say_the_same(c):
    name = {"driver": "qcow2", "file": {"driver": "file", "filename": "child"},
            "backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "other"}, "backing": None}}
    assert c.ours("qemu-img", "compare", "json:" + json.dumps(name), "other").code == 2  # a parent's parent is not to be said
    del name["backing"]["backing"]
    assert c.ours("qemu-img", "compare", "json:" + json.dumps(name), "other").code == 0


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_an_image_without_copy_on_write_is_asked_for_before_anything_is_in_it(t, fmt):
    strace = shutil.which("strace") or pytest.skip("strace is not installed")
    for on in ("on", "off"):
        r = t.start(strace, "-f", "-e", "trace=ioctl,pwrite64,pwritev2,ftruncate", t.bin / "drover", "create", "-f", fmt, "-o", f"nocow={on}",
                    f"{fmt}-{on}", "1M")
        assert r.code == 0 and (on == "on") == ("FS_IOC_GETFLAGS" in r.err), r
        assert on == "off" or r.err.index("FS_IOC_GETFLAGS") < r.err.index("ftruncate" if fmt == "raw" else "pwrite"), r
    assert t.drover("create", "-f", fmt, "-o", "nocow=frob", "x", "1M").code == 1 and "x" not in t.names()


def test_passwords_in_names_are_not_printed(t):
    name = json.dumps({"driver": "raw", "file": {"driver": "https", "url": "https://127.0.0.1:1/x", "username": "u", "password": "hunter2"}})
    t.ok("create", "-q", "-f", "qcow2", "-u", "-b", "json:" + name, "-F", "raw", "top", "1M")
    for command in ("info", "chain show"):
        for more in ([], ["--output=json"]):
            r = t.drover(*command.split(), *more, "top")
            assert "json:" in r.out and "hunter2" not in r.out + r.err, r
    # That the parent is not to be had is a finding, and the rest is examined.
    r = t.drover("chain", "check", "top")
    assert r.code == 2 and "cannot open its backing file" in r.out and "hunter2" not in r.out + r.err, r


def test_each_layer_has_its_own_secret_and_none_is_printed(t):
    t.ok("create", "-q", "-f", "qcow2", "disk", "1M")
    secrets = ["--object", "secret,id=a,data=hunter2", "--object", "secret,id=b,data=hunter3"]
    server = "file.driver=https,{0}file.url=https://127.0.0.1:1/x,{0}file.password-secret={1},{0}file.username=u"
    r = t.drover("info", *secrets, "--image-opts", "driver=raw,backing.driver=raw,backing." + server.format("backing.", "b") + ","
                 + server.format("", "a"))
    assert r.code == 1 and "password-secret" not in r.err and "hunter" not in r.err, r
    for more in (["file.password-secret=a"], ["file.password=hunter2"], ["file.cookie=hunter2", "frob=x"]):
        r = t.drover("info", *secrets, "--image-opts", ",".join(["driver=qcow2", "file.filename=disk", *more]))
        assert r.code == 1 and "hunter" not in r.err, r
