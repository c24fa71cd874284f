# SPDX-License-Identifier: LGPL-2.1-or-later
"""`drover serve`: how it begins, what it tells, and what is left when it ends."""
import os
import re
import shutil
import signal
import socket
import subprocess

import pytest

from serving import DROVER, MiB, PLUGIN, drover, io, ok, run

nbd = pytest.importorskip("nbd")
pytestmark = pytest.mark.skipif(not shutil.which("nbdkit") or not os.path.exists(PLUGIN),
                                reason="nbdkit or our plugin is missing")


class Serve:
    """A running `drover serve`; uris are what it has printed."""

    def __init__(self, *args, n=1):
        self.process = subprocess.Popen([DROVER, "serve", *map(str, args)], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.uris = [self.process.stdout.readline().strip() for _ in range(n)]
        assert self.uris[-1], self.process.stderr.read()

    def connect(self, which=0):
        h = nbd.NBD()
        h.connect_uri(self.uris[which])
        return h

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


@pytest.fixture
def disk(work):
    """A chain: 0x11 at the beginning, from the parent."""
    drover("create", "-q", "-f", "qcow2", "base", 4 * MiB)
    io("base", "write -P 0x11 0 1M")
    drover("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "disk")
    return work / "disk"


@pytest.fixture
def serve(work):
    started = []

    def start(*args, **kw):
        started.append(Serve(*args, **kw))
        return started[-1]

    yield start
    for s in started:
        if s.process.poll() is None:
            s.process.kill()
        s.process.communicate()


def socket_of(uri):
    return re.search("socket=([^&]*)", uri).group(1)


# ---------------------------------------------------------------- beginning and end

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_everything_in_the_image_and_no_socket_left(serve, disk, number):
    s = serve("--socket", "s", disk)
    h = s.connect()  # and stays
    h.pwrite(b"\x31" * 4096, 2 * MiB)
    assert s.end(number) == (0, "")
    assert not os.path.exists("s")
    assert "No errors were found" in drover("check", disk)
    io(disk, "read -P 0x31 2M 4k", "read -P 0x11 0 1M")


def test_without_a_socket_it_makes_a_private_one(serve, disk, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    s = serve(disk)
    path = socket_of(s.uris[0])
    assert path.startswith(str(tmp_path / "tmp")) and os.stat(os.path.dirname(path)).st_mode & 0o77 == 0
    assert s.connect().get_size() == 4 * MiB
    assert s.end()[0] == 0 and os.listdir(tmp_path / "tmp") == []


def test_nbdkit_ends_cleanly_when_drover_is_killed(serve, disk):
    s = serve("--socket", "s", disk)
    h = s.connect()
    h.pwrite(b"\x32" * 4096, 0)
    s.process.kill()
    s.process.wait()
    s.process.stderr.read()  # nbdkit has it, too: until that has ended
    assert "No errors were found" in drover("check", disk)
    io(disk, "read -P 0x32 0 4k")


def test_a_client_of_the_control_socket_can_end_it(serve, disk):
    s = serve("--socket", "s", "--control", "control", disk)
    client = s.connect()
    with socket.socket(socket.AF_UNIX) as control:
        control.connect("control")
        control.sendall(b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n')
        out, err = s.process.communicate(timeout=60)
    assert (s.process.returncode, err) == (0, ""), (out, err)
    del client
    assert not os.path.exists("s")


def test_a_death_of_nbdkit_is_a_failure_that_is_told(serve, disk):
    s = serve("--socket", "s", disk)
    children = ok("pgrep", "-P", s.process.pid).split()
    os.kill(int(children[0]), signal.SIGKILL)
    out, err = s.process.communicate(timeout=60)
    assert s.process.returncode == 1 and "may be lost" in err and not os.path.exists("s"), (out, err)


def test_the_process_id_is_there_while_it_serves(serve, disk):
    s = serve("--pidfile", "pid", disk)
    assert int(open("pid", encoding="ascii").read()) == s.process.pid
    s.end()
    assert not os.path.exists("pid")


def test_a_command_gets_the_uri_and_its_exit_code_is_ours(disk):
    r = run(DROVER, "serve", disk, "--run", 'nbdinfo --size "$uri"; test -S "$unixsocket" && exit 7')
    assert r.returncode == 7 and r.stdout == f"{4 * MiB}\n", r.stdout
    r = run(DROVER, "serve", disk, "--run", "kill -9 $$")
    assert r.returncode == 128 + 9, r.stdout


def test_what_a_command_leaves_behind_does_not_keep_the_port(disk):
    r = run(DROVER, "serve", "--port", 0, "--bind", "127.0.0.1", disk, "--run",
            'sleep 1000 >/dev/null 2>&1 & echo "$! $port"')
    left, port = map(int, r.stdout.split())
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    finally:
        os.kill(left, signal.SIGKILL)


# ---------------------------------------------------------------- where clients find it

def test_several_disks_have_a_uri_each(serve, disk):
    drover("create", "-q", "-f", "qcow2", "other disk", 8 * MiB)
    s = serve("--export", "system", disk, "other disk", n=2)
    assert [s.connect(i).get_size() for i in range(2)] == [4 * MiB, 8 * MiB]
    assert "/system?" in s.uris[0] and "/other%20disk?" in s.uris[1]


def test_a_free_port_is_chosen_and_told(serve, disk):
    s = serve("--port", 0, disk)
    assert re.fullmatch(r"nbd://localhost:[1-9]\d*/", s.uris[0])
    h = s.connect()  # and stays
    assert h.get_size() == 4 * MiB
    assert s.end() == (0, "")


# ---------------------------------------------------------------- what may be written

def test_read_only_leaves_the_image_as_it_is(serve, disk):
    before = disk.read_bytes()
    s = serve("-r", disk)
    assert s.connect().is_read_only()
    s.end()
    assert disk.read_bytes() == before


def test_temporary_throws_away_what_was_written(serve, disk, tmp_path):
    before = disk.read_bytes()
    s = serve("--temporary", disk)
    h = s.connect()
    h.pwrite(b"\x41" * MiB, 0)
    h.flush()
    assert h.pread(MiB, 0) == b"\x41" * MiB
    assert s.end()[0] == 0
    assert disk.read_bytes() == before
    assert [n for n in os.listdir(tmp_path / "tmp") if "overlay" in n] == []


def test_an_archive_member_is_served_read_only_by_itself(serve, disk):
    drover("vma", "create", "a.vma", "-d", f"drive-a={disk}")
    assert serve("vma:a.vma#drive-a").connect().is_read_only()


def test_a_snapshot_inside_is_served(serve, disk):
    ok("qemu-img", "snapshot", "-c", "then", disk)
    io(disk, "write -P 0x77 0 64k")
    assert serve("-l", "then", disk).connect().pread(1, 0) == b"\x11"


# ---------------------------------------------------------------- TLS

def can_connect(uri):
    return run("nbdinfo", "--size", uri, timeout=30).returncode == 0


def test_clients_without_the_key_get_nothing(serve, disk):
    for name, key in (("keys", "0123456789abcdef" * 4), ("wrong", "fedcba9876543210" * 4)):
        with open(name, "w", encoding="ascii") as f:
            f.write(f"alice:{key}\n")
        os.chmod(name, 0o600)
    s = serve("--tls-psk", "keys", "--socket", "s", disk)
    good = s.uris[0].replace("nbds+unix://", "nbds+unix://alice@")
    assert good.startswith("nbds") and can_connect(good)
    assert not can_connect(good.replace("keys", "wrong"))
    assert not can_connect("nbd+unix:///?socket=s")
    assert s.end()[0] == 0


def make_certificates():
    """A CA, and a certificate of it for localhost, where nbdkit-tls(1) wants them."""
    os.mkdir("pki")
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    ok(*openssl, "-subj", "/CN=test CA", "-keyout", "pki/ca-key.pem", "-out", "pki/ca-cert.pem")
    ok(*openssl, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-CA", "pki/ca-cert.pem",
       "-CAkey", "pki/ca-key.pem", "-addext", "basicConstraints=CA:FALSE",
       "-keyout", "pki/server-key.pem", "-out", "pki/server-cert.pem")


def test_a_client_knows_the_server_by_its_certificate(serve, disk):
    if "-CA " not in run("openssl", "req", "-help").stdout:
        pytest.skip("this openssl signs no certificate by itself")
    make_certificates()
    s = serve("--tls-certificates", "pki", "--port", 0, disk)
    assert s.uris[0].startswith("nbds://localhost")
    os.mkdir("client")
    shutil.copy("pki/ca-cert.pem", "client")
    assert can_connect(s.uris[0] + "?tls-certificates=client")
    assert not can_connect(s.uris[0].replace("nbds", "nbd"))


# ---------------------------------------------------------------- bad input

def taken_socket():
    s = socket.socket(socket.AF_UNIX)
    s.bind("taken")
    s.listen()
    return s


def test_a_socket_that_is_in_the_way_is_told_with_what_to_do(disk):
    with taken_socket():
        r = run(DROVER, "serve", "--socket", "taken", disk)
        assert r.returncode == 1 and r.stdout == \
            "drover: taken: another server listens there: end it, or choose another name\n"
    r = run(DROVER, "serve", "--socket", "taken", disk)
    assert r.returncode == 1 and r.stdout == "drover: taken: a socket that a server left behind: remove it, and try again\n"
    r = run(DROVER, "serve", "--socket", disk, disk)
    assert r.returncode == 1 and "is no socket" in r.stdout
    r = run(DROVER, "serve", "--socket", "x" * 200, disk)
    assert r.returncode == 1 and "shorter" in r.stdout
    assert os.path.exists("taken") and disk.exists()


def test_a_port_that_is_taken_is_told(disk):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        r = run(DROVER, "serve", "--port", port, disk)
    assert r.returncode == 1 and f"port {port} of localhost is taken" in r.stdout and "--port" in r.stdout


@pytest.mark.parametrize("name", ["NBDKIT", "DROVER_NBDKIT_PLUGIN"])
def test_what_is_not_installed_is_told(disk, name):
    r = run(DROVER, "serve", "--socket", "s", disk, env={**os.environ, name: "/nowhere/it"})
    assert r.returncode == 1 and r.stdout.startswith("drover: /nowhere/it: not found: ") and f"${name}" in r.stdout
    assert len(r.stdout.splitlines()) == 1 and not os.path.exists("s")


@pytest.mark.parametrize("args, says", [
    (["absent"], "absent"),
    (["disk", "base"], "base is used by"),
    (["disk", "--port", "http"], "'http' is no port"),
    (["disk", "--port", "65536"], "'65536' is no port"),
    (["disk", "--port", "1", "--socket", "s"], "exclude"),
    (["disk", "--bind", "localhost"], "--port"),
    (["disk", "--tls", "maybe"], "'maybe'"),
    (["disk", "--tls-psk", "absent"], "absent"),
    (["disk", "-r", "--temporary"], "--temporary"),
    (["disk", "-f", "nope"], "nope"),
    (["disk", "-t", "nope"], "cache=nope"),
    (["disk", "--export", "a", "--export", "b"], "more names"),
    ([], "name of a disk"),
], ids=str)
def test_a_mistake_is_told_and_nothing_is_left(disk, args, says):
    before = sorted(os.listdir("."))
    r = run(DROVER, "serve", *args, timeout=30)
    assert r.returncode == 1 and says in r.stdout.splitlines()[0], r.stdout
    assert sorted(os.listdir(".")) == before


# ---------------------------------------------------------------- a machine

def boot_sector(text):
    """Real-mode code that copies the disk's second sector to its third, sends what stands there to the serial
    port, and ends the machine with exit code 3 (or 5: the disk failed)."""
    begin = bytes.fromhex("31c0 8ed8 8ec0 8ed0 bc007c")  # segments 0, stack below
    read = bytes.fromhex("b80102 bb0080 b90200 b600 cd13")  # int 13h: one sector to 0x8000
    write = bytes.fromhex("b80103 bb0080 b90300 b600 cd13")
    say = bytes.fromhex("be0080 baf803 ac 84c0 7403 ee ebf8 b001 e6f4")  # until a NUL; exit
    fail = bytes.fromhex("b002 e6f4")
    code = begin + read + b"\x72" + bytes([2 + len(write) + len(say)]) + write + b"\x72" + bytes([len(say)]) + say + fail
    return code.ljust(510, b"\0") + b"\x55\xaa" + text.ljust(512, b"\0")


def test_a_machine_boots_from_an_archive_and_the_archive_stays_as_it_is(serve, work):
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("qemu-system-x86_64 is missing")
    with open("disk.raw", "wb") as f:
        f.write(boot_sector(b"hello from the archive\n"))
        f.truncate(MiB)
    drover("vma", "create", "a.vma", "-d", "drive-a=disk.raw")
    before = open("a.vma", "rb").read()
    s = serve("--temporary", "--socket", "s", "vma:a.vma#drive-a")
    r = run("qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "16", "-nodefaults", "-display", "none", "-no-reboot",
            "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4", "-drive", f"file={s.uris[0]},format=raw,if=ide",
            timeout=120, stdin=subprocess.DEVNULL)
    assert r.returncode == 3 and "hello from the archive" in r.stdout, r
    assert s.connect().pread(22, 1024) == b"hello from the archive"  # the guest wrote it
    s.end()
    assert open("a.vma", "rb").read() == before
