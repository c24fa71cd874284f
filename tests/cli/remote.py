# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real NBD servers on unix sockets for the tests of remote disks."""
import http.server
import os
import re
import select
import socket
import struct
import subprocess
import threading
import time


def wait_for_socket(path, process):
    """Returns when somebody listens there."""
    end = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as s:
            try:
                s.connect(str(path))
                return
            except OSError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                select.select([], [], [], 0.01)


class Nbdkit:
    """nbdkit in the foreground, with its log filter on top; tcp: at self.port of 127.0.0.1."""

    def __init__(self, directory, name, *args, filters=(), options=(), tcp=False):
        self.socket = directory / f"{name}.sock"
        self.log = directory / f"{name}.log"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.port = free_port() if tcp else None
        place = ["-i", "127.0.0.1", "-p", str(self.port)] if tcp else ["-U", str(self.socket)]
        self.args = ["nbdkit", "-f", *place, *options, "--filter=log", *(f"--filter={f}" for f in filters),
                     *map(str, args), f"logfile={self.log}"]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.args, stderr=subprocess.PIPE)
        if self.port:
            wait_for_port(self.port, self.process)
        else:
            wait_for_socket(self.socket, self.process)

    def kill(self):
        """Without a word to its clients."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()

    def requests(self, kind):
        """(offset, count) of each, in their order."""
        found = re.findall(rf"\b{kind} id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", self.log.read_text())
        return [(int(o, 16), int(n, 16)) for o, n in found]

    def connections(self):
        return len(set(re.findall(r"connection=(\d+) Read", self.log.read_text())))

    def most_at_once(self, kind):
        """How many of them were under way at one time."""
        now = most = 0
        for line in self.log.read_text().splitlines():
            if f" {kind} id=" in line:
                now += 1
            elif f" ...{kind} id=" in line:
                now -= 1
            most = max(most, now)
        return most


class Cutting:
    """A unix socket in front of a server. Its connections are cut one after another when so many bytes came from the server;
    those after them live, or are refused, or are led to another server. With cut_on_flush the first is cut when a request to
    flush comes, which the server does not get."""

    def __init__(self, path, server, cuts, then_refuse=False, then=None, cut_on_flush=False):
        self.uri, self.server, self.cuts, self.then_refuse, self.then = f"nbd+unix:///?socket={path}", server, list(cuts), then_refuse, then
        self.cut_on_flush, self.was_cut, self.connections, self.path = cut_on_flush, False, 0, path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()

    def accept(self):
        threads = []
        while True:
            client, _ = self.listener.accept()
            if self.stopping():
                client.close()
                break
            self.connections += 1
            limit = self.cuts.pop(0) if self.cuts else None
            if limit is None and self.connections > 1 and self.then_refuse:
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self.then if limit is None and self.then else self.server))
            except OSError:
                client.close()
                continue
            threads.append(threading.Thread(target=self.carry, args=(client, server, limit)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def stopping(self):
        return getattr(self, "stopped", False)

    def carry(self, client, server, limit):
        with client, server:
            while True:
                for s in select.select([client, server], [], [])[0]:
                    try:
                        data = s.recv(65536)
                    except OSError:
                        return
                    flush = s is client and data[:8] == b"\x25\x60\x95\x13\0\0\0\x03"
                    if not data or (flush and self.cut_on_flush and not self.was_cut):
                        self.was_cut = self.was_cut or bool(data)
                        return
                    if s is server and limit is not None:
                        data = data[:limit]
                        limit -= len(data)
                    try:
                        (server if s is client else client).sendall(data)
                    except OSError:
                        return
                    if limit == 0:
                        return

    def stop(self):
        self.stopped = True
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.path))
        self.thread.join()
        self.listener.close()


class OddNbd:
    """An NBD server on a unix socket that a test makes odd: the disk's bytes, the flags and the block sizes that it says, and
    answer(command, offset, length) -> chunks of a structured reply as (type, payload), or None: the right ones."""

    FLUSH, FUA, TRIM, ZEROES, DF, MULTI, READ_ONLY = 4, 8, 32, 64, 128, 256, 2
    READ, WRITE, LEAVE, SYNC, STATUS = 0, 1, 2, 3, 7

    def __init__(self, path, data, flags=0, blocks=None, structured=True, answer=None):
        self.data, self.flags, self.blocks, self.structured, self.answer = bytearray(data), flags | 1, blocks, structured, answer
        self.uri, self.path, self.requests, self.size = f"nbd+unix:///?socket={path}", path, [], len(data)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        try:
            while True:
                client, _ = self.listener.accept()
                self.threads.append(threading.Thread(target=self.serve, args=(client,)))
                self.threads[-1].start()
        except OSError:
            pass

    @staticmethod
    def take(s, n):
        data = s.recv(n, socket.MSG_WAITALL) if n else b""
        if len(data) < n:
            raise OSError("the end")
        return data

    def serve(self, s):
        with s:
            try:
                if self.greet(s):
                    while self.one(s):
                        pass
            except OSError:
                pass

    def greet(self, s):
        s.sendall(b"NBDMAGICIHAVEOPT\0\3")
        self.take(s, 4)
        while True:
            option, length = struct.unpack(">8xII", self.take(s, 16))
            data = self.take(s, length)

            def reply(kind, payload=b""):
                s.sendall(struct.pack(">QIII", 0x3e889045565a9, option, kind, len(payload)) + payload)

            if option == 8 and self.structured or option == 5:
                reply(1)
            elif option == 10 and self.structured:
                reply(4, struct.pack(">I", 1) + b"base:allocation")
                reply(1)
            elif option in (6, 7):
                reply(3, struct.pack(">HQH", 0, self.size, self.flags))
                if self.blocks:
                    reply(3, struct.pack(">HIII", 3, *self.blocks))
                reply(1)
                if option == 7:
                    return True
            elif option == 2:
                reply(1)
                return False
            else:
                reply((1 << 31) + 1)

    def one(self, s):
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.take(s, 28))
        if command == self.LEAVE:
            return False
        payload = self.take(s, length) if command == self.WRITE else b""
        self.requests.append((command, offset, length))
        chunks = self.answer(command, offset, length) if self.answer else None
        if command == self.WRITE:
            self.data[offset:offset + length] = payload
        if chunks is None and command == self.READ:
            chunks = [(1, struct.pack(">Q", offset) + self.data[offset:offset + length])]
        if chunks is None and command == self.STATUS:
            chunks = [(5, struct.pack(">III", 1, length, 0))]
        if chunks and not self.structured:
            s.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + chunks[0][1][8:])
        elif chunks:
            for i, (kind, data) in enumerate(chunks):
                s.sendall(struct.pack(">IHHQI", 0x668e33ef, i == len(chunks) - 1, kind, cookie, len(data)) + data)
        else:
            s.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie))
        return True

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listener.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_port(port, process):
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end
            select.select([], [], [], 0.01)


def make_certificates(directory):
    """ca-cert.pem, and server-cert.pem and server-key.pem of localhost that it signed; another/ has another ca-cert.pem."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    (directory / "another").mkdir()
    for more in (["-subj", "/CN=ca", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"],
                 ["-subj", "/CN=other", "-keyout", "another/ca-key.pem", "-out", "another/ca-cert.pem"],
                 ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE",
                  "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-keyout", "server-key.pem", "-out", "server-cert.pem"]):
        subprocess.run([*new, *more], cwd=directory, check=True, capture_output=True)


class Nginx:
    """nginx on loopback: /files/ has ranges, /plain/ has none, /moved/ leads to /files/, /round/ to itself, /down/ to /files/
    without TLS; the same by TLS with a certificate that nobody else has signed."""

    def __init__(self, directory, files):
        self.port, self.tls_port = free_port(), free_port()
        self.http, self.https = f"http://127.0.0.1:{self.port}", f"https://localhost:{self.tls_port}"
        self.certificate, self.log = directory / "server.pem", directory / "access.log"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
                        "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", directory / "server.key",
                        "-out", self.certificate], check=True, capture_output=True)
        places = f"""
            location /files/ {{ alias {files}/; }}
            location /plain/ {{ alias {files}/; max_ranges 0; }}
            location /moved/ {{ rewrite ^/moved/(.*)$ /files/$1 redirect; }}
            location /down/ {{ rewrite ^/down/(.*)$ {self.http}/files/$1 redirect; }}
            location /round/ {{ rewrite ^(.*)$ $1 redirect; }}
            location /secret/ {{ if ($http_authorization != "Basic dXNlcjpwYXNz") {{ return 401; }} alias {files}/; }}"""
        config = directory / "nginx.conf"
        config.write_text(f"""
            {"user root;" if os.geteuid() == 0 else ""} daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; worker_processes 1;
            events {{ worker_connections 64; }}
            http {{
                log_format ranges "$server_port $status $http_range $uri";
                access_log {self.log} ranges; default_type application/octet-stream;
                client_body_temp_path {directory}/t1; proxy_temp_path {directory}/t2; fastcgi_temp_path {directory}/t3;
                uwsgi_temp_path {directory}/t4; scgi_temp_path {directory}/t5;
                server {{ listen 127.0.0.1:{self.port}; {places} }}
                server {{ listen 127.0.0.1:{self.tls_port} ssl; ssl_certificate {self.certificate};
                          ssl_certificate_key {directory}/server.key; {places} }}
            }}""")
        self.process = subprocess.Popen(["nginx", "-c", config, "-e", directory / "error.log"], stderr=subprocess.DEVNULL)
        wait_for_port(self.tls_port, self.process)

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Unreliable:
    """A server on loopback whose answers a test decides: answer(request number, path, range or None) returns
    (status, headers, body, bytes to send before the connection is cut, or None)."""

    def __init__(self, answer):
        outer = self
        self.requests, self.secrets = [], []
        self.lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                asked = (int(asked[1]), int(asked[2]) + 1) if asked else None
                with outer.lock:
                    outer.requests.append((self.path, asked))
                    outer.secrets.append((self.headers.get("Authorization"), self.headers.get("Cookie")))
                    number = len(outer.requests)
                status, headers, body, cut = answer(number, self.path, asked)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": headers.get("Content-Length", len(body))}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                try:
                    self.wfile.write(body if cut is None else body[:cut])
                    self.wfile.flush()
                except OSError:
                    cut = 0
                if cut is not None:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def ranged(data, asked, cut=None, **headers):
    """What a server with ranges answers."""
    first, end = asked[0], min(asked[1], len(data))
    return 206, {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}", "ETag": '"1"', **headers}, data[first:end], cut
