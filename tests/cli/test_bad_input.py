# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bad input gets one clear line, a failure, and nothing written or left behind."""
import hashlib
import os
import stat
import subprocess

import pytest

DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicFlat"
{extents}
ddb.adapterType = "ide"
"""


def state(t):
    """Every file below the working directory, with what it holds."""
    found = {}
    for p in sorted(t.dir.rglob("*")):
        if p.is_symlink() or not p.is_file():
            found[str(p.relative_to(t.dir))] = "not a file"
        else:
            found[str(p.relative_to(t.dir))] = hashlib.sha256(p.read_bytes()).hexdigest()
    return found


def refused(t, *args, code=1, **kw):
    """Fails with a message that names the program; changes nothing. Returns the message."""
    before = state(t)
    r = t.drover(*args, timeout=20, **kw)
    assert r.code == code, r
    assert r.err.startswith("drover: ") and 0 < len(r.err) < 2000, r
    assert r.err.strip().count("\n") <= 1 and ".drover." not in r.err, r
    assert state(t) == before
    return r.err


COMMANDS = [["info"], ["map"], ["check"], ["commit"], ["stream"], ["recover"], ["snapshot", "-l"], ["snapshot", "-c"],
            ["chain"], ["chain", "check"], ["rebase", "-b", ""], ["io", "-c", "length"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_missing_file(t, command):
    assert "No such file or directory" in refused(t, *command, "nope.vmdk")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_directory(t, command):
    (t.dir / "dir").mkdir()
    refused(t, *command, "dir")


@pytest.mark.parametrize("command", [["info"], ["map"], ["check"]], ids=" ".join)
def test_a_pipe_does_not_hang(t, command):
    os.mkfifo(t.dir / "fifo")
    refused(t, *command, "fifo")


def test_two_images_for_compare_say_which_cannot_be_opened(t):
    t.ok("create", "-q", "a", "1M")
    assert "'nope'" in refused(t, "compare", "a", "nope", code=2)
    assert "'nope'" in refused(t, "compare", "nope", "a", code=2)


def vmdk(t, name="disk.vmdk", size="10M"):
    t.ok("create", "-q", "-f", "vmdk", name, size)
    t.io(name, "write -P 1 0 1M")
    return t.dir / name


@pytest.mark.parametrize("length", [4, 64, 511, 512, 600, 5000, 20000, 40000])
def test_a_truncated_image(t, length):
    disk = vmdk(t)
    os.truncate(disk, length)
    refused(t, "info", "-f", "vmdk", "disk.vmdk")
    refused(t, "map", "-f", "vmdk", "disk.vmdk")
    refused(t, "convert", "-f", "vmdk", "disk.vmdk", "out.raw")
    refused(t, "rebase", "-f", "vmdk", "-b", "", "disk.vmdk")


def test_an_image_whose_data_is_cut_off_is_not_read_as_zeros(t):
    disk = vmdk(t)
    os.truncate(disk, disk.stat().st_size - 65536)
    before = state(t)
    r = t.drover("convert", "disk.vmdk", "out.raw")
    assert r.code == 1 and "disk.vmdk" in r.err and state(t) == before


def test_random_junk_in_the_header_is_harmless(t):
    disk = vmdk(t)
    good = disk.read_bytes()
    for i in range(4, 80):
        disk.write_bytes(good[:i] + bytes([good[i] ^ 0xff]) + good[i + 1:])
        for command in (["info"], ["map"], ["check"]):
            r = t.drover(*command, "-f", "vmdk", "disk.vmdk", timeout=20)
            assert r.code in (0, 1, 2, 3, 63), (i, r)


def descriptor(t, extents, name="disk.vmdk"):
    (t.dir / name).write_text(DESCRIPTOR.format(extents=extents))


@pytest.mark.parametrize("extent", ["/etc/passwd", "../secret", "sub/../../secret", "link"])
def test_extents_outside_the_directory_are_refused(t, extent):
    (t.dir.parent / "secret").write_bytes(b"s" * 512)
    (t.dir / "sub").mkdir()
    os.symlink("/etc/passwd", t.dir / "link")
    descriptor(t, f'RW 1 FLAT "{extent}" 0')
    for command in (["info"], ["map"], ["convert", "-O", "raw"]):
        message = refused(t, *command, "disk.vmdk", *(["out"] if command[0] == "convert" else []))
        real = os.path.realpath(t.dir / extent)
        assert f"its extent {real}" in message and f"--allow-path {os.path.dirname(real)}" in message, message
    message = refused(t, "map", "--allow-path", t.dir / "sub", "disk.vmdk")
    assert "refuses" in message


def test_extents_in_a_directory_that_was_allowed_are_opened(t):
    (t.dir.parent / "secret").write_bytes(b"s" * 512)
    descriptor(t, 'RW 1 FLAT "../secret" 0')
    t.ok("convert", "--allow-path", t.dir.parent, "-O", "raw", "disk.vmdk", "out.raw")
    assert (t.dir / "out.raw").read_bytes() == b"s" * 512
    t.ok("map", "disk.vmdk", env={"DROVER_ALLOW_PATH": str(t.dir.parent)})


@pytest.mark.parametrize("extents", [
    'RW 99999999999999999999 FLAT "x" 0', 'RW -5 FLAT "x" 0', 'RW 20480 FLAT "x" 18446744073709551615',
    'RW 20480 FLAT x 0', 'RW 20480 NONSENSE "x" 0', 'RW 20480 SPARSE "disk.vmdk"', '', 'RW', "RW 20480 FLAT",
    "\n".join(f'RW 20480 FLAT "x" {i}' for i in range(5000)),
])
def test_hostile_descriptors(t, extents):
    (t.dir / "x").write_bytes(bytes(512))
    descriptor(t, extents)
    refused(t, "info", "-f", "vmdk", "disk.vmdk")


def test_a_huge_descriptor_is_not_swallowed(t):
    with open(t.dir / "disk.vmdk", "wb") as f:
        f.write(DESCRIPTOR.format(extents="").encode())
        f.truncate(10 << 30)
    r = t.drover("info", "-f", "vmdk", "disk.vmdk", timeout=20)
    assert r.code == 1 and r.err


def child(t, name, parent, where=None):
    t.ok("create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", name, cwd=where,
         env={"DROVER_ALLOW_PATH": str(t.dir)})


def test_a_parent_outside_the_directory_is_refused_with_the_way_out(t):
    vmdk(t, "base.vmdk")
    (t.dir / "sub").mkdir()
    child(t, "sub/child.vmdk", "../base.vmdk")
    message = refused(t, "map", "sub/child.vmdk")
    assert "base.vmdk" in message and f"--allow-path {t.dir}" in message
    t.ok("map", "--allow-path", t.dir, "sub/child.vmdk")
    t.ok("map", "sub/child.vmdk", env={"DROVER_ALLOW_PATH": str(t.dir)})
    assert t.ours("qemu-img", "map", "sub/child.vmdk").code == 0  # that tool's habit
    assert t.ours("qemu-io", "-r", "-c", "length", "sub/child.vmdk").code == 0


@pytest.mark.parametrize("value, words", [
    ("12x", "DROVER_CACHE_METADATA=12x: is no size"), ("1000", "too small; give it at least 1M"),
    ("-1", "is no size"), ("99999999999999999999", "is no size"),
])
def test_impossible_cache_limits_in_the_environment_are_refused(t, value, words):
    vmdk(t, "disk.vmdk")
    assert words in refused(t, "map", "disk.vmdk", env={"DROVER_CACHE_METADATA": value})
    t.ok("map", "disk.vmdk", env={"DROVER_CACHE_METADATA": "2M"})


def test_create_refuses_a_parent_that_it_could_not_open_later(t):
    vmdk(t, "base.vmdk")
    (t.dir / "sub").mkdir()
    message = refused(t, "create", "-q", "-f", "vmdk", "-b", "../base.vmdk", "-F", "vmdk", "sub/x.vmdk")
    assert "--allow-path" in message
    t.ok("create", "-q", "--allow-path", t.dir, "-f", "vmdk", "-b", "../base.vmdk", "-F", "vmdk", "sub/x.vmdk")


def test_a_loop_of_parents(t):
    vmdk(t, "a.vmdk")
    child(t, "b.vmdk", "a.vmdk")
    child(t, "c.vmdk", "b.vmdk")
    refused(t, "rebase", "-u", "-b", "c.vmdk", "-F", "vmdk", "b.vmdk")
    refused(t, "rebase", "-u", "-b", "b.vmdk", "-F", "vmdk", "b.vmdk")
    t.ok("rebase", "-u", "--force", "-b", "c.vmdk", "-F", "vmdk", "b.vmdk")
    for command in (["map"], ["compare", "a.vmdk"], ["convert", "-O", "raw"]):
        refused(t, *command, "c.vmdk", *(["out"] if command[0] == "convert" else []),
                code=2 if command[0] == "compare" else 1)
    assert t.drover("chain", "check", "c.vmdk", timeout=20).code == 2
    assert t.drover("snapshot", "-l", "c.vmdk", timeout=20).code == 0
    t.ok("rebase", "-u", "--force", "-b", "a.vmdk", "-F", "vmdk", "b.vmdk")
    t.ok("chain", "check", "c.vmdk")


def test_a_changed_parent_names_both_ids_and_the_way_out(t):
    vmdk(t, "a.vmdk")
    child(t, "b.vmdk", "a.vmdk")
    t.io("a.vmdk", "write -P 9 0 64k")
    message = refused(t, "map", "b.vmdk")
    assert "CID" in message and "a.vmdk" in message and "b.vmdk" in message and "rebase -u" in message


@pytest.mark.parametrize("args", [
    ["convert", "disk.vmdk", "disk.vmdk"], ["convert", "-O", "vmdk", "-o", "nope=1", "disk.vmdk", "out"],
    ["convert", "-O", "vmdk", "-o", "subformat=nope", "disk.vmdk", "out.vmdk"], ["convert", "disk.vmdk", "nodir/out"],
    ["convert", "-O", "vmdk", "disk.vmdk", "/proc/x.vmdk"], ["convert", "disk.vmdk", "disk.vmdk", "."],
    ["convert", "-c", "disk.vmdk", "out"], ["convert", "-l", "x", "disk.vmdk", "out"],
    ["create", "-q", "-f", "vmdk", "nodir/x.vmdk", "1M"], ["create", "-q", ".", "1M"],
    ["create", "-q", "-f", "vmdk", "-b", "disk.vmdk", "-F", "raw", "x.vmdk"], ["create", "-q", "x", "8191P"],
    ["create", "-q", "-f", "vmdk", "-o", "subformat=nope", "x.vmdk", "1M"], ["create", "-q", "-f", "vmdk", "x.vmdk", "7E"],
    ["rebase", "-b", "/etc/passwd", "-F", "raw", "disk.vmdk"], ["rebase", "-b", "junk", "-F", "vmdk", "disk.vmdk"],
    ["rebase", "-u", "-b", "junk", "-F", "vmdk", "disk.vmdk"], ["rebase", "-u", "-b", "nope", "-F", "vmdk", "disk.vmdk"],
    ["rebase", "-c", "-b", "", "disk.vmdk"], ["commit", "disk.vmdk"], ["commit", "-b", "junk", "disk.vmdk"],
    ["snapshot", "-c", "../x.vmdk", "disk.vmdk"], ["snapshot", "-c", "disk.vmdk", "disk.vmdk"],
    ["snapshot", "-c", "raw.img"], ["snapshot", "-a", "x", "disk.vmdk"], ["snapshot", "-c", "-l", "disk.vmdk"],
    ["stream", "--base", "junk", "disk.vmdk"], ["stream", "--base", "disk.vmdk", "disk.vmdk"],
    ["info", "--object", "secret,id=x", "disk.vmdk"], ["info", "--object", "iothread,id=x", "disk.vmdk"],
    ["chain", "show", "--object", "iothread,id=x", "disk.vmdk"], ["map", "--locking=maybe", "disk.vmdk"],
    ["map", "--output=xml", "disk.vmdk"], ["map", "--progress=json", "disk.vmdk"], ["nope", "disk.vmdk"],
    ["stream", "--progress=xml", "disk.vmdk"], ["info", "json:{"], ["info", "json:[1]"], ["info", 'json:{"file":{"nbd":"x"}}'],
    ["info", "--image-opts", "driver=vmdk"], ["info", "--image-opts", "driver=nope,file.filename=disk.vmdk"],
    ["info", "--image-opts", "driver=vmdk,file.driver=nbd,file.filename=disk.vmdk"], ["chain", "nope", "disk.vmdk"], ["chain"],
    ["completion", "tcsh"], ["io", "-c", "length", "--nope"],
], ids=" ".join)
def test_what_cannot_work_is_refused(t, args):
    vmdk(t)
    (t.dir / "junk").write_bytes(os.urandom(4096))
    t.ok("create", "-q", "raw.img", "1M")
    refused(t, *args)


def test_names_do_not_reach_the_terminal_raw(t):
    evil = "\x1b[31m\x07red\x7f"
    (t.dir / evil).write_bytes(b"KDMV")
    assert "\x1b" not in refused(t, "info", "-f", "vmdk", evil)
    assert "?[31m?red?" in refused(t, "map", "-f", "vmdk", evil)
    (t.dir / "x").write_bytes(bytes(512))
    descriptor(t, f'RW 1 FLAT "{evil}x" 0')
    assert "\x1b" not in refused(t, "info", "disk.vmdk")
    (t.dir / (evil + "x")).write_bytes(b"1" * 512)
    for args in (["info"], ["map"], ["chain"], ["chain", "check"], ["snapshot", "-l"], ["check"], ["io", "-c", "info"],
                 ["recover"]):
        r = t.drover(*args, "disk.vmdk")
        assert not set(r.out + r.err) & set(evil[:6]) - set("[31m"), r


def test_a_target_that_is_in_use_is_left_alone(t):
    vmdk(t)
    t.ok("create", "-q", "out", "10M")
    holder = subprocess.Popen([t.bin / "drover", "io", "-f", "raw", "out"], cwd=t.dir, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        holder.stdin.write(b"write -P 5 0 64k\n")
        holder.stdin.flush()
        while b"ops" not in holder.stdout.readline():
            pass
        assert "write" in refused(t, "convert", "disk.vmdk", "out")
        assert "write" in refused(t, "io", "-f", "raw", "-c", "length", "out")
        t.ok("info", "-U", "out")
        t.ok("map", "--locking=off", "out")
    finally:
        holder.communicate(b"quit\n", timeout=20)


def test_a_disk_that_is_full(t, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        t.ok("create", "-q", "-f", "raw", "big", "16M")
        t.io("big", "write -P 1 0 16M", fmt="raw")
        for args in (["-O", "raw"], ["-O", "vmdk"], ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]):
            r = t.drover("convert", "-f", "raw", *args, "big", small / "out.vmdk")
            assert r.code == 1 and r.err.startswith("drover: "), r
            assert os.listdir(small) == [], args
        t.ok("create", "-q", "-f", "vmdk", "base.vmdk", "16M", cwd=small)
        t.ok("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk", cwd=small)
        r = t.drover("io", "-c", "write -P 2 0 8M", "top.vmdk", cwd=small)
        assert r.code == 1 and "No space left on device" in r.out
        assert t.drover("chain", "check", "top.vmdk", cwd=small).code == 0
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_directory_that_may_not_be_written(t):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    vmdk(t)
    os.chmod(t.dir, stat.S_IRUSR | stat.S_IXUSR)
    try:
        refused(t, "convert", "disk.vmdk", "out")
        refused(t, "snapshot", "-c", "disk.vmdk")
        t.ok("map", "disk.vmdk")
    finally:
        os.chmod(t.dir, stat.S_IRWXU)


def test_a_read_only_file_system(t, tmp_path):
    ro = tmp_path / "ro"
    ro.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(ro)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        t.ok("create", "-q", "-f", "vmdk", "disk.vmdk", "1M", cwd=ro)
        subprocess.run(["mount", "-o", "remount,ro", str(ro)], check=True)
        for args in (["snapshot", "-c", "disk.vmdk"], ["create", "-q", "x", "1M"], ["convert", "disk.vmdk", "x"],
                     ["rebase", "-b", "", "disk.vmdk"]):
            r = t.drover(*args, cwd=ro)
            assert (r.code == 1 and "Read-only file system" in r.err) or args[0] == "rebase", (args, r)
        t.ok("map", "disk.vmdk", cwd=ro)
        assert os.listdir(ro) == ["disk.vmdk"]
    finally:
        subprocess.run(["umount", str(ro)], check=False)


def test_a_disk_of_more_files_than_a_shell_allows_opens(t):
    def limited(kind, *args):
        return t.start("sh", "-c", f'ulimit {kind} 64; exec "$@"', "sh", t.bin / "drover", *args)

    t.ok("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "many.vmdk", "200G")
    assert len(t.names()) > 100
    r = limited("-Sn", "io", "-c", "write -P 7 150G 64k", "-c", "read -P 7 150G 64k", "many.vmdk")
    assert r.code == 0 and "failed" not in r.out, r
    r = limited("-n", "map", "many.vmdk")  # files that are only read share descriptors
    assert r.code == 0 and "many-f076.vmdk" in r.out, r
    r = limited("-n", "io", "-c", "write 0 64k", "many.vmdk")  # a writer keeps all of its own
    assert r.code == 1 and "Too many open files" in r.err and r.err.count("\n") == 1, r


def test_output_that_cannot_be_written_is_a_failure(t):
    vmdk(t)
    with open("/dev/full", "w") as full:
        r = subprocess.run([t.bin / "drover", "info", "disk.vmdk"], cwd=t.dir, stdout=full, stderr=subprocess.PIPE)
    assert r.returncode == 1 and b"No space left on device" in r.stderr


def test_a_reader_that_goes_away_is_no_crash(t):
    vmdk(t)
    reader, writer = os.pipe()
    os.close(reader)  # before the program starts: it must not be faster than us
    r = subprocess.run([t.bin / "drover", "map", "--output=json", "disk.vmdk"], cwd=t.dir, stdout=writer, timeout=20,
                       check=False)
    os.close(writer)
    assert r.returncode == 1


@pytest.mark.parametrize("name,at,magic", [
    ("qcow", 0, b"QFI\xfb\0\0\0\1"), ("qed", 0, b"QED\0"), ("vhdx", 0, b"vhdxfile"), ("vpc", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"), ("parallels", 0, b"WithouFreSpacExt")])
def test_an_image_of_another_format_is_not_shown_as_a_disk(t, name, at, magic):
    (t.dir / "disk").write_bytes(b"\1" * at + magic + bytes(100000))
    before = t.names()
    for args in (["info", "disk"], ["convert", "disk", "out.raw"], ["io", "-c", "write 0 512", "disk"], ["map", "disk"]):
        r = t.drover(*args)
        assert r.code == 1 and f"looks like a {name} image" in r.err and "raw" in r.err
    assert t.names() == before
    t.ok("convert", "-f", "raw", "disk", "out.raw")
    assert (t.dir / "out.raw").read_bytes()[:100000] == (t.dir / "disk").read_bytes()[:100000]


def test_the_system_file_allows_directories(t):
    """In a private /etc, where the system lets us have one."""
    vmdk(t, "base.vmdk")
    (t.dir / "sub").mkdir()
    child(t, "sub/child.vmdk", "../base.vmdk")
    script = ('mount -t tmpfs none /etc && mkdir /etc/drover || exit 77; "$1" map sub/child.vmdk && exit 3; '
              'printf "# disks\\nnot/absolute\\n%s\\n" "$2" >/etc/drover/allow-paths; exec "$1" map sub/child.vmdk')
    env = {k: v for k, v in os.environ.items() if k != "DROVER_ALLOW_PATH"}
    try:
        r = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", t.bin / "drover", t.dir], cwd=t.dir, env=env,
                           capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if r.returncode == 77 or "unshare" in r.stderr:
        pytest.skip("nothing may be mounted here")
    assert r.returncode == 0, r.stderr
    assert r.stderr.count("refuses to open") == 1


@pytest.mark.parametrize("name", ["missing.vmdk", "junk", "child.vmdk", "grandchild.vmdk"])
def test_force_records_what_an_unsafe_rebase_refuses(t, name):
    vmdk(t, "base.vmdk")
    (t.dir / "junk").write_bytes(b"no image\n" * 100)
    child(t, "child.vmdk", "base.vmdk")
    child(t, "grandchild.vmdk", "child.vmdk")
    before = (t.dir / "child.vmdk").read_bytes()
    refused(t, "rebase", "-u", "-b", name, "-F", "vmdk", "child.vmdk")
    assert (t.dir / "child.vmdk").read_bytes() == before
    t.ok("rebase", "-u", "--force", "-b", name, "-F", "vmdk", "child.vmdk")
    assert f"backing file: {name}" in t.ok("info", "child.vmdk")
    t.ok("rebase", "-u", "-b", "base.vmdk", "-F", "vmdk", "child.vmdk")  # and there is a way back
    t.ok("chain", "check", "grandchild.vmdk")


@pytest.mark.parametrize("name", ['a"b.vmdk', "it's.vmdk", '"".vmdk'])
def test_names_with_quotes_are_told_as_they_are(t, name):
    r = t.drover("create", "-q", "-f", "vmdk", name, "1M")
    if '"' in name:
        assert r.code == 1 and r.err.startswith(f"drover: {name}: "), r
        assert os.listdir(t.dir) == []
    else:
        assert r.code == 0, r
