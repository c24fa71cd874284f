# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks of HTTP servers as sources."""
import base64
import json
import lzma
import os
import random
import re
import shlex
import shutil
import socket
import threading
from pathlib import Path

import pytest

from remote import Nginx, Unreliable, ranged

MIB = 1 << 20
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.fixture
def nginx(t, tmp_path, monkeypatch):
    if not NGINX or not shutil.which("openssl"):
        pytest.skip("nginx or openssl is not installed")
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin")
    server = Nginx(tmp_path, t.dir)
    yield server
    server.stop()


@pytest.fixture
def unreliable():
    servers = []

    def start(answer):
        servers.append(Unreliable(answer))
        return servers[-1]

    yield start
    for s in servers:
        s.stop()


@pytest.fixture
def disk(t):
    data = random.Random(3).randbytes(6 * MIB + 512)
    (t.dir / "disk.raw").write_bytes(data)
    return data


def refused(t, *args, **kw):
    r = t.drover(*args, **kw)
    assert r.code == 1 and len(r.err.splitlines()) == 1, r
    return r.err


def test_images_are_read_by_ranges_and_without(t, nginx, disk):
    t.ok("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    for place in ("files", "plain", "moved"):
        t.ok("convert", "-O", "raw", f"{nginx.http}/{place}/disk.raw", f"{place}.raw")
        assert (t.dir / f"{place}.raw").read_bytes() == disk
        assert "identical" in t.ok("compare", f"{nginx.http}/{place}/disk.qcow2", "disk.raw")
    log = nginx.log.read_text()
    assert " 206 bytes=" in log and " 200 bytes=0-0 /plain/disk.raw" in log
    assert json.loads(t.ok("info", "--output=json", f"{nginx.http}/files/disk.qcow2"))["format"] == "qcow2"
    assert t.ok("checksum", f"{nginx.http}/files/disk.qcow2").split()[0] == t.ok("checksum", "disk.raw").split()[0]


def test_a_child_of_a_remote_image_reads_it_where_that_is_allowed(t, nginx, disk):
    base = f"{nginx.http}/files/disk.raw"
    t.ok("create", "-f", "qcow2", "-F", "raw", "-b", base, "--allow-path", f"{nginx.http}/files", "child.qcow2")
    assert f"--allow-path {base}" in refused(t, "map", "child.qcow2")
    t.io("child.qcow2", "read 0 1M", options=["-r", "--allow-path", base])
    assert "identical" in t.ok("compare", "--allow-path", f"{nginx.http}/files", "child.qcow2", "disk.raw")
    t.ok("create", "-f", "qcow2", "-F", "qcow2", "-b", "child.qcow2", "--allow-path", base, "top.qcow2")
    t.ok("stream", "--allow-path", base, "--base", base, "top.qcow2")
    assert json.loads(t.ok("info", "--output=json", "top.qcow2"))["backing-filename"] == base
    assert "--allow-path" in refused(t, "map", "--allow-path", f"{nginx.http}/fil", "child.qcow2")
    t.drover("create", "-f", "qcow2", "-F", "raw", "-u", "-b", f"{nginx.http}/files/%2e%2e/x/disk.raw", "up.qcow2", "6M")
    assert '".."' in refused(t, "map", "--allow-path", f"{nginx.http}/files", "up.qcow2")
    t.ok("create", "-f", "qcow2", "-F", "raw", "-u", "-b", "/etc/hostname", "local.qcow2", "6M")
    assert "refuses to open" in refused(t, "map", f"{nginx.http}/files/local.qcow2")


def test_a_disk_on_a_server_is_no_directory_and_stands_in_none(t, nginx, disk):
    url = f"{nginx.http}/files/disk.qcow2"
    t.ok("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    for name in (url, "json:" + json.dumps({"driver": "http", "url": url})):
        assert "1 image, no problem" in t.ok("chain", "check", name)
        assert "disk.qcow2" in t.ok("snapshot", "-l", name)


def test_what_an_image_names_stands_beside_it_on_the_server(t, nginx, disk):
    t.ok("create", "-f", "qcow2", "-F", "raw", "-b", "disk.raw", "child.qcow2")
    t.ok("convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "disk.raw", "disk.vmdk")
    for name in ("child.qcow2", "disk.vmdk"):
        assert "identical" in t.ok("compare", f"{nginx.http}/files/{name}", "disk.raw")
    assert "does not open" not in t.ok("snapshot", "-l", f"{nginx.http}/files/child.qcow2")
    t.ok("create", "-f", "qcow2", "-F", "raw", "-u", "-b", "missing.raw", "lost.qcow2", "6M")
    err = refused(t, "map", f"{nginx.http}/files/lost.qcow2")
    assert f"{nginx.http}/files/missing.raw" in err and "404" in err and "link" not in err


def test_a_server_must_have_a_certificate_that_somebody_vouches_for(t, nginx, disk):
    url = f"{nginx.https}/files/disk.raw"
    assert "certificate" in refused(t, "info", url)
    t.ok("info", url, env={"CURL_CA_BUNDLE": str(nginx.certificate)})
    t.ok("info", "json:" + json.dumps({"driver": "https", "url": url, "sslverify": False, "timeout": 5}))
    t.ok("info", "--image-opts", f"driver=raw,file.driver=https,file.url={url},file.sslverify=off")
    assert t.ours("qemu-img", "info", url, env={"CURL_CA_BUNDLE": str(nginx.certificate)}).code == 0


def test_credentials_come_from_netrc(t, nginx, disk):
    url = f"{nginx.http}/secret/disk.raw"
    assert "401" in refused(t, "info", url)
    (t.dir / ".netrc").write_text("machine 127.0.0.1 login user password pass\n")
    t.ok("info", url, env={"HOME": str(t.dir)})


def test_netrc_is_for_the_servers_that_it_names(t, unreliable, disk):
    """Not the one's password for the other, which has an entry without one (libcurl's CVE-2024-11053)."""
    there = unreliable(lambda n, path, asked: ranged(disk, asked))
    here = unreliable(lambda n, path, asked: (302, {"Location": there.url.replace("127.0.0.1", "localhost") + "/d"}, b"", None))
    for entry in ("", "machine localhost\n", "machine localhost login other\n", "default\n"):
        (t.dir / ".netrc").write_text(f"machine 127.0.0.1 login user password pass\n{entry}")
        t.ok("convert", "-f", "raw", "-O", "raw", f"{here.url}/d", "copy.raw", env={"HOME": str(t.dir)})
    assert {s for s, _ in here.secrets} == {"Basic dXNlcjpwYXNz"}
    assert not [s for s, _ in there.secrets if s and "pass" in base64.b64decode(s.split()[1]).decode()]


def test_redirections_do_not_leave_tls(t, nginx, disk):
    env = {"CURL_CA_BUNDLE": str(nginx.certificate)}
    t.ok("info", f"{nginx.http}/down/disk.raw")
    t.ok("info", f"{nginx.https}/moved/disk.raw", env=env)
    assert "redirect" in refused(t, "info", f"{nginx.https}/down/disk.raw", env=env)


def test_a_silent_server_is_given_up(t, unreliable, disk):
    """As it is opened, and in the middle, from where another connection goes on."""
    silent, n_silent = threading.Event(), [0]

    def answer(n, path, asked):
        if path == "/never" or (asked[0] >= 2 * MIB and n_silent[0] < 2):
            n_silent[0] += 1
            silent.wait(20)
        return ranged(disk, asked)

    s = unreliable(answer)
    try:
        assert "too slow" in refused(t, "info", f"{s.url}/never", env={"DROVER_NET_TIMEOUT": "1"})
        n_silent[0] = 0
        t.ok("convert", "-f", "raw", "-O", "raw", f"{s.url}/d", "copy.raw", env={"DROVER_NET_TIMEOUT": "1"})
    finally:
        silent.set()
    assert n_silent[0] == 2 and (t.dir / "copy.raw").read_bytes() == disk


def test_each_request_fails_in_turn(t, unreliable):
    """Once, which is asked again, or for good, which leaves nothing."""
    data, first = random.Random(5).randbytes(3 * MIB), 1
    for status in (500, 403):
        for bad in range(1, 30):
            s = unreliable(lambda n, path, asked, bad=bad, status=status: (status, {}, b"no", None) if n == bad else ranged(data, asked))
            (t.dir / "copy.raw").unlink(missing_ok=True)
            r = t.drover("convert", "-f", "raw", "-O", "raw", f"{s.url}/d", "copy.raw")
            if len(s.requests) < bad:
                break
            assert (r.code == 0) == (status == 500 and bad > first) and (r.code or (t.dir / "copy.raw").read_bytes() == data), r
            assert r.code == 0 or (t.names() == [] and str(status) in r.err)
        assert r.code == 0 and bad > 3


def test_secrets_are_for_the_server_that_was_named(t, unreliable, disk):
    there = unreliable(lambda n, path, asked: ranged(disk, asked))
    here = unreliable(lambda n, path, asked: (302, {"Location": there.url.replace("127.0.0.1", "localhost") + "/d"}, b"", None))
    name = {"driver": "http", "url": f"{here.url}/d", "username": "user", "password": "pass", "cookie": "a=b"}
    t.ok("convert", "-f", "raw", "-O", "raw", "json:" + json.dumps(name), "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == disk and len(there.requests) > 1
    assert set(there.secrets) == {(None, None)} and set(here.secrets) == {("Basic dXNlcjpwYXNz", "a=b")}


def test_secrets_are_objects_of_qemu(t, nginx, disk):
    (t.dir / "secret").write_text("pass")
    options = f"driver=http,url={nginx.http}/secret/disk.raw,username=user,password-secret=s"
    for text in ("data=pass", "file=secret", "file=secret,format=raw"):
        for command in (["info"], ["info", "--output=json"], ["map"], ["checksum"]):
            assert "pass" not in t.ok(*command, "--object", f"secret,id=s,{text}", "--image-opts", options).replace("password", "")
    assert "interrupted" in (text := t.ok("recover", "--object", "secret,id=s,data=pass", "--image-opts", options))
    assert "***" in text and "pass" not in text.replace("password", "")
    for command in (["snapshot", "-l"], ["chain", "tree"], ["chain", "check"]):
        for output in ("human", "json"):
            r = t.drover(*command, f"--output={output}", "--object", "secret,id=s,file=secret", "--image-opts", options)
            assert r.code == 0 and "pass" not in (r.out + r.err).replace("password", ""), r
    for text in ("data=wrong", "data=pass,format=base64", "data=pass,keyid=k", "file=missing", ""):
        assert "wrong" not in refused(t, "info", "--object", f"secret,id=s,{text}", "--image-opts", options)
    assert "No secret with id 's'" in refused(t, "info", "--image-opts", options)
    name = {"driver": "http", "url": f"{nginx.http}/secret/disk.raw", "username": "user", "password-secret": "s"}
    assert t.ours("qemu-img", "info", "--object", "secret,id=s,data=pass", "json:" + json.dumps(name)).code == 0


@pytest.mark.parametrize("jobs, changed", [
    ("mirror --top-only -f qcow2 top new", "new"),
    ("snapshot top one, snapshot top two, stream --base=BASE top", "two"),
    ("snapshot top one, snapshot top two, delete top top", "one"),
])
def test_no_job_records_a_password_that_was_given_to_open_a_disk(t, nginx, disk, jobs, changed):
    name = {"driver": "http", "url": f"{nginx.http}/secret/disk.raw", "username": "user", "password": "pass"}
    base = "json:" + json.dumps(name)
    t.ok("create", "-q", "-f", "qcow2", "-u", "-b", "elsewhere", "-F", "raw", "top", str(len(disk)))
    run = " && ".join(f"{t.bin}/drover ctl ctl {job}" for job in jobs.split(", ")).replace("BASE", shlex.quote(base))
    run = f"until {t.bin}/drover ctl ctl status >status 2>&1; do :; done; {run}"  # nbdkit may run it before there is the socket
    plugin = os.environ.get("DROVER_NBDKIT_PLUGIN") or Path(os.environ["DROVER"]).parent / "nbdkit-drover-plugin.so"
    r = t.start(shutil.which("nbdkit") or pytest.skip("nbdkit is not installed"), "-U", "-", plugin, "disk=top", f"backing={base}",
                "backing-format=raw", f"allow-path={base}", f"control={t.dir}/ctl", "--run", run)
    assert r.code == 0, r
    header = (t.dir / changed).read_bytes()[:65536]
    assert b'"username":"user"' in header and b"pass" not in header.replace(b"password", b"")
    # The image is as good as the one that it was made from: whoever has the password reads the disk.
    options = f"driver=qcow2,file.filename={changed},backing.driver=raw," + ",".join(f"backing.file.{k}={v}" for k, v in name.items())
    t.ok("convert", "-O", "raw", "--image-opts", options, "x")
    assert (t.dir / "x").read_bytes() == disk


def test_what_cannot_be_is_said(t, nginx, disk):
    assert "redirects" in refused(t, "info", f"{nginx.http}/round/disk.raw")
    assert "404" in refused(t, "info", f"{nginx.http}/files/missing.raw")
    for args in (["convert", "disk.raw"], ["convert", "-n", "disk.raw"], ["create", "-f", "qcow2"], ["resize", "-f", "raw"]):
        assert "HTTP" in refused(t, *args, f"{nginx.http}/files/disk.raw", *(["1M"] if args[0] in ("create", "resize") else []))
    t.ok("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    assert "no snapshot can be made" in refused(t, "snapshot", "-c", "x.qcow2", f"{nginx.http}/files/disk.qcow2")
    (t.dir / "page.html").write_text("<!doctype html><html></html>")
    assert "web page" in refused(t, "info", f"{nginx.http}/files/page.html")


def test_a_compressed_download_is_the_image_inside(t, nginx, disk):
    (t.dir / "disk.raw.xz").write_bytes(lzma.compress(disk, preset=0))
    for place in ("files", "plain"):
        assert "identical" in t.ok("compare", f"{nginx.http}/{place}/disk.raw.xz", "disk.raw")


def test_what_keeps_from_the_index_of_a_packed_download_is_said(t, unreliable):
    packed = lzma.compress(bytes(range(256)) * 4096 + os.urandom(MIB), preset=0)
    s = unreliable(lambda n, path, asked: ranged(packed, asked) if asked[0] < MIB // 2 else (403, {}, b"", None))
    for command in (["info"], ["convert", "-O", "raw"], ["convert", "--salvage", "-O", "raw"]):
        assert "403" in refused(t, *command, f"{s.url}/d.xz", *(["out"] if len(command) > 1 else []))


def test_an_answer_may_say_that_it_is_not_encoded(t, unreliable, disk):
    s = unreliable(lambda n, path, asked: ranged(disk, asked, **{"Content-Encoding": "identity"}))
    assert "identical" in t.ok("compare", "-f", "raw", f"{s.url}/d", "disk.raw")


def test_a_cut_connection_is_continued_where_it_was(t, unreliable, disk):
    s = unreliable(lambda n, path, asked: ranged(disk, asked, cut=300_000 if asked[1] - asked[0] > 300_000 else None))
    t.ok("convert", "-O", "raw", f"{s.url}/d", "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == disk
    plain = unreliable(lambda n, path, asked: (200, {"ETag": '"1"'}, disk, n * 1_500_000))
    t.ok("convert", "-O", "raw", f"{plain.url}/d", "copy2.raw")
    assert (t.dir / "copy2.raw").read_bytes() == disk and len(plain.requests) > 3


def test_a_connection_that_is_never_longer_than_nothing_is_an_error_in_time(t, unreliable, disk):
    s = unreliable(lambda n, path, asked: ranged(disk, asked, cut=None if n == 1 else 0))
    err = refused(t, "convert", "-O", "raw", f"{s.url}/d", "copy.raw", env={"DROVER_NET_RECONNECT": "1"})
    assert "cannot read" in err and not (t.dir / "copy.raw").exists()
    assert len(s.requests) < 20  # in a second: it waits before it asks again
    s = unreliable(lambda n, path, asked: ranged(disk, asked) if n % 2 else (503, {}, b"later", None))
    t.ok("convert", "-O", "raw", f"{s.url}/d", "copy.raw")
    assert (t.dir / "copy.raw").read_bytes() == disk


def test_a_file_that_changes_meanwhile_is_an_error(t, unreliable, disk):
    changed = unreliable(lambda n, path, asked: ranged(disk, asked, ETag=f'"{n > 2}"'))
    assert "has changed" in refused(t, "convert", "-O", "raw", f"{changed.url}/d", "copy.raw")
    later = unreliable(lambda n, path, asked: ranged(disk, asked, ETag="", **{"Last-Modified": f"Mon, 30 Nov 2026 12:00:0{n // 3} GMT"}))
    assert "has changed" in refused(t, "convert", "-O", "raw", f"{later.url}/d", "copy.raw")
    longer = unreliable(lambda n, path, asked: ranged(disk + bytes(n // 3), asked))
    assert "has changed" in refused(t, "convert", "-O", "raw", f"{longer.url}/d", "copy.raw")
    weak = unreliable(lambda n, path, asked: ranged(disk, asked, ETag='W/"1"', **{"Last-Modified": f"Mon, 30 Nov 2026 12:00:0{n // 3} GMT"}))
    assert "has changed" in refused(t, "convert", "-O", "raw", f"{weak.url}/d", "copy.raw")
    plain = unreliable(lambda n, path, asked: (200, {"ETag": f'"{n > 2}"'}, disk, 1_000_000))
    assert "has changed" in refused(t, "convert", "-O", "raw", f"{plain.url}/d", "copy.raw")


@pytest.mark.parametrize("what, answer", [
    ("another range", lambda disk, n, asked: ranged(disk, (asked[0] + (n > 1), asked[1] + (n > 1)))),
    ("another range", lambda disk, n, asked: ranged(disk, (asked[0], asked[1] + (n > 1)))),
    ("another encoding", lambda disk, n, asked: ranged(disk, asked, **{"Content-Encoding": "gzip"})),
    ("another range", lambda disk, n, asked: (206, {**ranged(disk, asked)[1], "Content-Length": MIB}, bytes(MIB), None)),
    ("another range", lambda disk, n, asked: (206, {"Content-Range": "bytes 0-0/0"}, b"x", None)),
    ("no disk can have", lambda disk, n, asked: (206, {"Content-Range": f"bytes 0-0/{1 << 63}"}, b"x", None)),
    ("does not say how large", lambda disk, n, asked: (206, {"Content-Range": "bytes 0-0/*"}, b"x", None)),
    ("does not say how large", lambda disk, n, asked: (206, {"Content-Range": "bytes 0-0/99999999999999999999999"}, b"x", None)),
    ("cannot", lambda disk, n, asked: ranged(disk, asked) if n == 1 else (206, {**ranged(disk, asked)[1], "Content-Length": MIB}, b"", 0)),
    ("another range", lambda disk, n, asked: ranged(disk, asked) if n == 1 else (206, ranged(disk, asked)[1], b"", None)),
    ("no ranges any more", lambda disk, n, asked: ranged(disk, asked) if n == 1 else (200, {"ETag": '"1"'}, disk, None)),
])
def test_a_server_that_lies_is_not_believed(t, unreliable, disk, what, answer):
    s = unreliable(lambda n, path, asked: answer(disk, n, asked))
    err = refused(t, "convert", "-f", "raw", "-O", "raw", f"{s.url}/d", "copy.raw", env={"DROVER_NET_RECONNECT": "0"})
    assert what in err and t.names() == ["disk.raw"]


class Raw:
    """A server on loopback that answers each request with these pieces of bytes, as long as the client takes them."""

    def __init__(self, pieces):
        self.pieces, self.sent, self.listener = pieces, 0, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/d"
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            while True:
                client, _ = self.listener.accept()
                with client:
                    try:
                        asked = re.search(rb"bytes=(\d+)-(\d+)", client.recv(65536))
                        for piece in self.pieces(int(asked[1]), int(asked[2])):
                            client.sendall(piece)
                            self.sent += len(piece)
                    except OSError:
                        pass
        except OSError:
            pass

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()


def endless(begin, piece):
    yield begin
    for _ in range(1000):
        yield piece * (65536 // len(piece))


CHUNK = b"4000\r\n" + bytes(16384) + b"\r\n"


@pytest.mark.parametrize("what, pieces", [
    ("headers without end", lambda first, last: endless(b"HTTP/1.1 206 OK\r\n", b"X-Filler: " + b"x" * 1000 + b"\r\n")),
    ("headers without end", lambda first, last: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n")),
    ("page without end", lambda first, last: endless(b"HTTP/1.1 302 Found\r\nLocation: /e\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNK)),
    ("more bytes", lambda first, last: endless(b"HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes %d-%d/9999999"
                                               b"\r\n\r\n" % (first, last), CHUNK)),
], ids=["headers", "interim answers", "a redirection", "a range"])
def test_an_answer_without_end_is_ended(t, what, pieces):
    s = Raw(pieces)
    try:
        assert what in refused(t, "info", "-f", "raw", s.url)
        assert s.sent < 20 * MIB
    finally:
        s.stop()


def test_small_reads_in_order_are_read_ahead(t, unreliable, disk):
    s = unreliable(lambda n, path, asked: ranged(disk, asked))
    t.io(f"{s.url}/d", *(f"read {i}k 64k" for i in range(0, 6144, 64)), fmt="raw", options=["-r"])
    assert len(s.requests) < 20 and max(end - first for _, (first, end) in s.requests) == MIB


def test_what_is_read_ahead_keeps_nobody_from_closing(t, unreliable, disk):
    ahead, closed, kept = threading.Event(), threading.Event(), []

    def answer(n, path, asked):
        if asked[1] - asked[0] == MIB:
            ahead.set()
            kept.extend([] if closed.wait(20) else [asked])
        elif asked[0] == 512 << 10:
            assert ahead.wait(20)
        return ranged(disk, asked)

    s = unreliable(answer)
    t.io(f"{s.url}/d", *(f"read {i}k 64k" for i in (0, 256, 512)), fmt="raw", options=["-r"])
    closed.set()
    assert ahead.is_set() and not kept
