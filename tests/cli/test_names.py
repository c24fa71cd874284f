# SPDX-License-Identifier: LGPL-2.1-or-later
"""Called as a tool of QEMU, names are read as that tool reads them; under its own name a name is a path."""
import json
import re

import pytest
from conftest import same


def without_space(text):
    """Drop what the host's file system decides."""
    return re.sub(r"disk size: .*", "", text)


def disks(t):
    t.ok("create", "-f", "vmdk", "base.vmdk", "4M")
    t.ok("create", "-f", "vmdk", "-b", "base.vmdk", "child.vmdk")
    t.ok("create", "disk.img", "1M")


@pytest.mark.parametrize("name", ["file:new.img", "file:a:b.img", "file:./a:b.img", "file:file:x.img"])
def test_file_in_front_of_a_name_is_taken_off(t, name):
    (t.dir / "real").mkdir()
    (t.dir / "ours").mkdir()
    for action in (["create", name, "1M"], ["info", name], ["convert", "-O", "vmdk", name, "file:out:.vmdk"]):
        same(t.ours("qemu-img", *action, cwd=t.dir / "ours"), t.real("qemu-img", *action, cwd=t.dir / "real"),
             without_space)
    names = [sorted(p.name for p in (t.dir / who).iterdir()) for who in ("ours", "real")]
    assert names[0] == names[1] and len(names[0]) == 2


@pytest.mark.parametrize("args", [["info", "a:b.img"], ["create", "a:b.img", "1M"], ["info", "ssh://host/x"],
                                  ["convert", "-O", "raw", "disk.img", "nope:x"], ["map", "x+y://z"]], ids=" ".join)
def test_another_protocol_is_refused_and_nothing_made(t, args):
    disks(t)
    before = t.names()
    r = t.ours("qemu-img", *args)
    assert r.code == 1 and "Unknown protocol '" in r.err and r.err.count("\n") == 1, r
    assert t.names() == before


def test_under_its_own_name_a_colon_is_a_letter(t):
    t.ok("create", "a:b.img", "1M")
    t.ok("create", "file:c.img", "1M")
    assert t.names() == ["a:b.img", "file:c.img"]
    t.ok("convert", "a:b.img", "d:e")
    assert t.drover("compare", "a:b.img", "d:e").code == 0


def test_a_parent_named_with_file_is_recorded_as_a_path(t):
    disks(t)
    for args in (["create", "-q", "-f", "vmdk", "-b", "file:base.vmdk", "-F", "vmdk", "x.vmdk"],
                 ["create", "-q", "-f", "vmdk", "-o", "backing_file=file:base.vmdk,backing_fmt=vmdk", "x.vmdk"],
                 ["rebase", "-b", "file:base.vmdk", "-F", "vmdk", "x.vmdk"],
                 ["convert", "-O", "vmdk", "-B", "file:base.vmdk", "-F", "vmdk", "child.vmdk", "x.vmdk"]):
        r = t.ours("qemu-img", *args)
        assert r.code == 0, r
        assert json.loads(t.ok("info", "--output=json", "x.vmdk"))["backing-filename"] == "base.vmdk"


@pytest.mark.parametrize("text", [
    "{'driver':'vmdk','file':{'driver':'file','filename':'child.vmdk'}}",
    "{'driver':\"vmdk\",\"file.filename\":'child.vmdk'}",
    "{ 'file': { 'filename': 'it\\'s \\\"here\\\".img' }, 'driver': 'raw' }",
    "{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"it's \\\"here\\\".img\"}}",
])
def test_json_may_be_quoted_either_way(t, text):
    disks(t)
    (t.dir / "it's \"here\".img").write_bytes(bytes(512))
    ours, real = t.ours("qemu-img", "info", "json:" + text), t.real("qemu-img", "info", "json:" + text)
    same(ours, real, without_space)
    assert ours.code == 0


@pytest.mark.parametrize("text", ["{'driver':'raw", "{'", "'", "{'driver':'raw\\", "['raw']", "{'driver':null}", ""])
def test_json_that_is_cut_off_is_told(t, text):
    r = t.ours("qemu-img", "info", "json:" + text)
    assert r.code == 1 and r.err.startswith("qemu-img: Could not open 'json:"), r


@pytest.mark.parametrize("driver", ["host_device", "host_cdrom"])
def test_a_driver_for_devices_wants_a_device(t, driver):
    disks(t)
    args = ["-c", f"open -r -o driver={driver},filename=disk.img"]
    same(t.ours("qemu-io", *args), t.real("qemu-io", *args))


def test_a_layer_between_that_we_do_not_have_is_named(t):
    disks(t)
    r = t.ours("qemu-io", "-c", "open -o driver=vmdk,file.driver=blkdebug,file.image.filename=child.vmdk")
    assert r.code == 1 and "'file.driver=blkdebug' is not supported" in r.err, r


def test_the_target_may_be_a_list(t):
    disks(t)
    t.io("child.vmdk", "write -P 4 0 64k")
    t.ok("create", "other", "4M")
    r = t.ours("qemu-img", "convert", "-n", "--target-image-opts", "child.vmdk", "driver=raw,file.filename=other")
    assert r.code == 0, r
    assert t.drover("compare", "-f", "vmdk", "-F", "raw", "child.vmdk", "other").code == 0
    # either list says nothing about the other name
    r = t.ours("qemu-img", "convert", "-n", "--image-opts", "-O", "raw", "driver=vmdk,file.filename=child.vmdk", "other")
    assert r.code == 0, r
