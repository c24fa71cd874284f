# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program under the name qemu-nbd: its options mean what they mean there, for real clients."""
import os
import re
import shutil
import signal
import subprocess

import pytest

from serving import DROVER, MiB, PLUGIN, drover, io

nbd = pytest.importorskip("nbd")
pytestmark = pytest.mark.skipif(not shutil.which("nbdkit") or not os.path.exists(PLUGIN),
                                reason="nbdkit or our plugin is missing")


@pytest.fixture(name="tool")
def fixture_tool(work):
    (work.parent / "bin").mkdir()
    path = work.parent / "bin" / "qemu-nbd"
    path.symlink_to(os.path.abspath(DROVER))
    return str(path)


@pytest.fixture(name="start")
def fixture_start(work, tool):
    """start(OPTION...): a server in the background, at the socket s; returns its process id."""
    pids = []

    def start(*options):
        done = subprocess.run([tool, "--fork", "--pid-file", work / "pid", "-k", work / "s", *map(str, options)],
                              capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pids.append(int((work / "pid").read_text()))
        return pids[-1]

    yield start
    for pid in pids:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
        gone(pid)


def connect(name=""):
    h = nbd.NBD()
    h.set_export_name(name)
    h.connect_unix("s")
    return h


def gone(pid):
    """Wait until the process has ended; it is not a child of ours."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(fd) as f:
        import select
        return bool(select.select([f], [], [], 60)[0])


def disk(work, fmt="qcow2"):
    drover("create", "-q", "-f", fmt, "disk", 4 * MiB)
    io("disk", "write -P 0x11 1M 1M")
    return work / "disk"


def test_what_a_client_writes_is_in_the_image_and_the_server_ends_with_it(work, start):
    pid = start("-f", "qcow2", disk(work))
    h = connect()
    assert h.pread(512, MiB) == b"\x11" * 512
    h.pwrite(b"\x22" * 512, 0)
    h.shutdown()
    assert gone(pid)
    assert not os.path.exists("s") and not os.path.exists("pid")
    io("disk", "read -P 0x22 0 512", "read -P 0x11 1M 1M")


def test_a_persistent_server_serves_the_next_client_too(work, start):
    pid = start("-t", "-f", "qcow2", disk(work))
    for i in range(3):
        h = connect()
        h.pwrite(bytes([i + 1]) * 512, i * 512)
        h.shutdown()
    os.kill(pid, signal.SIGTERM)
    assert gone(pid)
    io("disk", *(f"read -P {i + 1} {i * 512} 512" for i in range(3)))


def test_one_client_at_a_time_unless_more_are_allowed(work, start):
    start("-t", "-f", "qcow2", disk(work))
    first = connect()
    assert not first.can_multi_conn()
    with pytest.raises(nbd.Error):
        connect()
    first.shutdown()


def test_several_clients_share_the_disk(work, start):
    start("-e", 2, "-f", "qcow2", disk(work))
    first, second = connect(), connect()
    assert first.can_multi_conn()
    first.pwrite(b"\x33" * 512, 0)
    first.flush()
    assert second.pread(512, 0) == b"\x33" * 512
    with pytest.raises(nbd.Error):
        connect()
    first.shutdown()
    second.shutdown()


def test_read_only_snapshot_offset_and_name(work, start):
    name = disk(work)
    start("-r", "-x", "hello", "-f", "qcow2", name)
    h = connect("hello")
    assert h.is_read_only()
    h.shutdown()


def test_with_a_snapshot_what_is_written_is_thrown_away(work, start):
    before = disk(work).read_bytes()
    pid = start("-s", "-f", "qcow2", "disk")
    h = connect()
    h.pwrite(b"\x44" * MiB, MiB)
    h.flush()
    assert h.pread(512, MiB) == b"\x44" * 512
    h.shutdown()
    assert gone(pid) and (work / "disk").read_bytes() == before


def test_an_offset_leaves_out_the_beginning(work, start):
    start("-o", "1M", "-f", "qcow2", disk(work))
    h = connect()
    assert h.get_size() == 3 * MiB and h.pread(512, 0) == b"\x11" * 512
    h.shutdown()


def test_a_snapshot_inside_is_shown(work, start):
    name = disk(work)
    os.symlink(os.path.abspath(DROVER), "qemu-img")
    subprocess.run(["./qemu-img", "snapshot", "-c", "inside", name], check=True)
    io("disk", "write -P 0x77 1M 1M")
    start("-l", "snapshot.id=1,snapshot.name=inside", "-f", "qcow2", "disk")
    h = connect()
    assert h.is_read_only() and h.pread(512, MiB) == b"\x11" * 512
    h.shutdown()


@pytest.mark.parametrize("mode", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_every_cache_mode_serves(work, start, mode):
    start(f"--cache={mode}", "-f", "qcow2", disk(work))
    h = connect()
    h.pwrite(b"\x55" * 4096, 0)
    assert h.pread(4096, 0) == b"\x55" * 4096
    h.shutdown()


def test_a_socket_that_a_killed_server_left_is_no_hindrance(work, start):
    pid = start("-t", "-f", "qcow2", disk(work))
    os.kill(pid, signal.SIGKILL)
    assert gone(pid) and os.path.exists("s")
    start("-t", "-f", "qcow2", "disk")
    connect().shutdown()


def test_names_of_images_as_json_and_as_lists(work, start):
    name = disk(work)
    pid = start('json:{"driver":"qcow2","file":{"driver":"file","filename":"%s"}}' % name)
    connect().shutdown()
    assert gone(pid)
    shutil.move("disk", "other")
    start("--image-opts", "driver=qcow2,file.filename=other")
    connect().shutdown()


def test_without_its_parents_an_image_shows_only_what_it_holds(work, start):
    drover("create", "-q", "-f", "qcow2", "base", 4 * MiB)
    io("base", "write -P 0x22 0 1M")
    drover("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "disk")
    io("disk", "write -P 0x11 1M 64k")
    for name, first in (('{"driver":"qcow2","file.filename":"disk","backing":null}', 0),
                        ('{"driver":"qcow2","file.filename":"disk"}', 0x22)):
        pid = start("-r", "-A", "json:" + name)  # -A is ovirt-imageio's habit
        h = connect()
        assert h.pread(3, 0) == bytes([first]) * 3 and h.pread(3, MiB) == b"\x11" * 3
        h.shutdown()
        assert gone(pid)


def test_another_parent_and_an_unlike_one_are_served_where_that_is_asked_for(work, start):
    for name, byte in (("base", 1), ("other", 2)):
        drover("create", "-q", "-f", "qcow2", name, MiB)
        io(name, f"write -P {byte} 0 1M")
    drover("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "--fingerprint", "disk")
    io("base", "write -P 3 0 1M")
    other = "driver=qcow2,file.filename=disk,backing.driver=qcow2,backing.file.filename=other"
    for options, byte in ((["-f", "qcow2", "disk"], 3), (["--image-opts", other], 2)):
        pid = start("-r", "--fingerprints", "off", *options)
        h = connect()
        assert h.pread(3, 0) == bytes([byte]) * 3
        h.shutdown()
        assert gone(pid)


@pytest.mark.parametrize("more", [[], ["--fork"]])
def test_a_socket_that_the_caller_opened_is_taken(work, tool, more):
    h = nbd.NBD()
    h.connect_systemd_socket_activation([tool, "--pid-file", str(work / "pid"), *more, "-f", "qcow2", str(disk(work))])
    assert h.pread(512, MiB) == b"\x11" * 512
    pid = int((work / "pid").read_text())
    h.shutdown()
    assert gone(pid)


def test_a_caller_that_reads_to_the_end_of_the_output_is_not_held(work, tool):
    disk(work)
    done = subprocess.run(f"{tool} --fork -t --pid-file pid -k $PWD/s -f qcow2 disk 2>&1 | cat", shell=True, timeout=60,
                          capture_output=True, check=True)
    assert done.stdout == b""
    pid = int((work / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    assert gone(pid)


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(work, tool):
    (work / "disk").write_bytes(b"QFI\xfb" + b"\xff" * 600)
    done = subprocess.run([tool, "--fork", "--pid-file", "pid", "-k", work / "s", "-f", "qcow2", "disk"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "disk: a QCOW image of version" in done.stderr
    assert os.listdir(work) == ["disk"]


WRONG = [[], ["a", "b"], ["-e", "x", "a"], ["-e", "-1", "a"], ["--cache", "foo", "a"], ["--aio", "foo", "a"],
         ["--discard", "foo", "a"], ["--detect-zeroes", "foo", "a"], ["-k", "rel", "a"], ["-o", "x", "a"],
         ["--tls-creds", "x", "a"], ["-L", "a"]]


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_what_is_wrong_is_told_in_the_known_words(work, tool, args):
    real = shutil.which("qemu-nbd")
    if not real:
        pytest.skip("no qemu-nbd to compare with")
    drover("create", "-q", "-f", "raw", "a", MiB)
    args = ["-f", "raw", *args] if args and "-L" not in args else args
    ours, theirs = (subprocess.run([t, *args], capture_output=True, text=True, timeout=60, check=False) for t in (tool, real))
    assert ours.returncode == theirs.returncode == 1
    assert ours.stderr.splitlines()[0] == theirs.stderr.splitlines()[0]


@pytest.mark.parametrize("option", [["-c", "/dev/nbd0", "a"], ["-d", "/dev/nbd0"]])
def test_for_the_kernel_it_says_which_command_does_that(work, tool, option):
    done = subprocess.run([tool, *option], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "nbd-client" in done.stderr and done.stderr.count("\n") == 1


def test_the_listing_is_that_of_qemu_nbd(work, tool):
    real = shutil.which("qemu-nbd")
    if not real:
        pytest.skip("no qemu-nbd to compare with")
    drover("create", "-q", "-f", "raw", "a", MiB)
    pid_file = work / "pid"
    for server in (tool, real):
        for more in ([], ["-r"], ["-e", "3", "-x", "name \u00e4"]):
            subprocess.run([server, "--fork", "-t", "--pid-file", pid_file, "-k", work / "s", "-f", "raw", *more, "a"],
                           check=True, timeout=60)
            pid = int(pid_file.read_text())
            ours, theirs = (subprocess.run([t, "-L", "-k", work / "s"], capture_output=True, text=True, timeout=60, check=False)
                            for t in (tool, real))
            os.kill(pid, signal.SIGTERM)
            assert gone(pid)
            assert ours.returncode == theirs.returncode == 0
            assert re.search("export: '", ours.stdout) and ours.stdout == theirs.stdout


def test_a_listing_without_a_server_is_a_failure(work, tool):
    done = subprocess.run([tool, "-L", "-k", work / "none"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "No such file" in done.stderr


def test_a_listing_from_a_server_whose_certificate_would_not_be_checked_is_refused(work, tool):
    done = subprocess.run([tool, "-L", "-k", work / "none", "--object", f"tls-creds-x509,id=t,endpoint=client,dir={work}",
                           "--tls-creds", "t"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "ca-cert.pem" in done.stderr, done


def test_a_secret_is_not_printed(work, tool):
    for more in (["-L"], ["disk"]):
        done = subprocess.run([tool, "--object", "secret,id=t,data=hunter2", "--tls-creds", "t", *more],
                              capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and "--object secret: " in done.stderr, done


def test_clients_with_the_key_get_the_disk_and_others_nothing(work, start, tool):
    keys = work / "keys"
    keys.mkdir()
    (keys / "keys.psk").write_text("qemu:" + "ab" * 32 + "\n")
    (keys / "keys.psk").chmod(0o600)
    name = disk(work)
    start("-t", "--object", f"tls-creds-psk,id=t0,endpoint=server,dir={keys}", "--tls-creds", "t0", "-f", "qcow2", name)
    with pytest.raises(nbd.Error):
        connect()
    h = nbd.NBD()
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_psk_file(str(keys / "keys.psk"))
    h.set_tls_username("qemu")
    h.connect_unix("s")
    assert h.pread(512, MiB) == b"\x11" * 512
    h.shutdown()
    done = subprocess.run([tool, "-L", "-k", work / "s", "--object", f"tls-creds-psk,id=t0,username=qemu,endpoint=client,dir={keys}",
                           "--tls-creds", "t0"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "exports available: 1" in done.stdout, done
