# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Drover's qemu-nbd tells of a disk beside where its data is: bitmaps and the depth of the chain, as QEMU's own does."""
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import time

import pytest

from tools import DROVER, run

nbd = pytest.importorskip('nbd', reason='python3-libnbd is missing')
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(name='dirs', scope='module')
def fixture_dirs(tmp_path_factory):
    """base.qcow2 with a bitmap, top.qcow2 over it with two: `on` notes what is written, `off` does not any more."""
    for program in ('nbdkit', 'nbdinfo', 'qemu-img', 'qemu-io', 'qemu-nbd'):
        if not shutil.which(program):
            pytest.skip(program + ' is missing')
    top = tmp_path_factory.mktemp('contexts')
    os.symlink(DROVER, top / 'qemu-nbd')
    run('qemu-img', 'create', '-q', '-f', 'qcow2', 'base.qcow2', '8M', cwd=top)
    run('qemu-img', 'bitmap', '--add', 'base.qcow2', 'below', cwd=top)
    run('qemu-io', '-c', 'write 0 1M', 'base.qcow2', cwd=top)
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'top.qcow2', cwd=top)
    run('qemu-img', 'bitmap', '--add', 'top.qcow2', 'on', cwd=top)
    run('qemu-img', 'bitmap', '--add', '-g', '4k', 'top.qcow2', 'off', cwd=top)
    run('qemu-io', '-c', 'write 2M 64k', '-c', 'write 3M 4k', '-c', 'write 8380416 8k', 'top.qcow2', cwd=top)
    run('qemu-img', 'bitmap', '--disable', 'top.qcow2', 'off', cwd=top)
    return top


class Server:
    """A qemu-nbd of either kind; it is gone at the end."""

    def __init__(self, dirs, program, *words):
        self.socket = str(dirs / ('s' + str(time.monotonic_ns())))
        self.uri = f'nbd+unix:///?socket={self.socket}'
        self.process = subprocess.Popen([program, '-t', '-e', '0', '-k', self.socket, '-f', 'qcow2', *words], cwd=dirs)

    def __enter__(self):
        while not self.greets():
            assert self.process.poll() is None
            time.sleep(0.01)
        return self

    def greets(self):
        """The socket is there before somebody listens."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(self.socket) == 0 and client.recv(8) == b'NBDMAGIC'

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0

    def extents(self, *contexts, off=0, length=8 * MIB, flags=0):
        """{context: [(length, flags)]}, and the connection."""
        handle = nbd.NBD()
        for context in contexts:
            handle.add_meta_context(context)
        handle.connect_uri(self.uri)
        said = {}

        def tell(context, _offset, entries, _error):
            said[context] = list(zip(entries[::2], entries[1::2]))

        handle.block_status(length, off, tell, flags)
        return said, handle


BITMAPS = ['qemu:dirty-bitmap:' + name for name in ('on', 'off', 'below')]
DEPTH = 'qemu:allocation-depth'


def test_clients_are_told_the_same_as_by_qemu(dirs):
    words = ['-r', '-A', '-B', 'on', '-B', 'off', '-B', 'below', '-D', 'a disk', '-x', 'name', 'top.qcow2']
    said = []
    for program in (dirs / 'qemu-nbd', shutil.which('qemu-nbd')):
        with Server(dirs, program, *words) as server:
            uri = server.uri.replace('///?', '///name?')
            listed = run('nbdinfo', uri).stdout
            listed = sorted(line.strip() for line in listed.splitlines() if 'qemu:' in line or 'description' in line)
            maps = [run('nbdinfo', f'--map={context}', uri).stdout for context in BITMAPS + [DEPTH]]
            image = f'driver=nbd,export=name,server.type=unix,server.path={server.socket},x-dirty-bitmap={BITMAPS[0]}'
            said.append((listed, maps, run('qemu-img', 'map', '--output=json', '--image-opts', image).stdout))
    assert said[0] == said[1]
    assert len(said[0][0]) == 5 and '"data": false' in said[0][2] and 'dirty' in said[0][1][2] and 'backing' in said[0][1][3]


def test_contexts_of_ours_and_of_nbdkit_come_in_one_reply(dirs):
    with Server(dirs, dirs / 'qemu-nbd', '-r', '-A', '-B', 'off', 'top.qcow2') as server:
        said, handle = server.extents('base:allocation', BITMAPS[1], DEPTH)
        assert said[BITMAPS[1]] == [(2 * MIB, 0), (64 * KIB, 1), (960 * KIB, 0), (4 * KIB, 1), (5108 * KIB, 0),
                                    (8 * KIB, 1)]
        assert sum(length for length, _ in said['base:allocation']) == sum(length for length, _ in said[DEPTH]) == 8 * MIB
        assert said[DEPTH][0] == (MIB, 2) and len(handle.pread(4 * MIB, MIB)) == 4 * MIB
        said, _ = server.extents('base:allocation', BITMAPS[1], off=2 * MIB + 512, length=4 * MIB, flags=nbd.CMD_FLAG_REQ_ONE)
        assert said[BITMAPS[1]] == [(64 * KIB - 512, 1)] and len(said['base:allocation']) == 1
        said, handle = server.extents(BITMAPS[1])  # nothing of nbdkit's: answered without it
        assert list(said) == [BITMAPS[1]] and len(handle.pread(MIB, 0)) == MIB
        handle.set_strict_mode(0)
        with pytest.raises(nbd.Error, match='Invalid argument'):
            handle.block_status(MIB, 8 * MIB, lambda *_: 0)
        assert len(handle.pread(MIB, 0)) == MIB


def test_what_clients_write_is_marked_where_the_bitmap_notes_it(dirs):
    shutil.copy(dirs / 'top.qcow2', dirs / 'written.qcow2')
    with Server(dirs, dirs / 'qemu-nbd', '-B', 'on', '-B', 'off', 'written.qcow2') as server:
        before, handle = server.extents(*BITMAPS[:2])
        handle.pwrite(b'x', 5 * MIB + 70000)
        handle.pwrite(b'x' * 512, 2 * MIB + 64 * KIB)  # touches what is marked
        handle.trim(64 * KIB, 0)
        handle.zero(64 * KIB, 192 * KIB)
        after, _ = server.extents(*BITMAPS[:2])
        assert after[BITMAPS[1]] == before[BITMAPS[1]]
        handle.shutdown()
    with Server(dirs, shutil.which('qemu-nbd'), '-r', '-B', 'on', 'written.qcow2') as server:
        stored, _ = server.extents(BITMAPS[0])
    assert after[BITMAPS[0]] == stored[BITMAPS[0]] != before[BITMAPS[0]]
    assert after[BITMAPS[0]][:5] == [(64 * KIB, 1), (128 * KIB, 0), (64 * KIB, 1), (1792 * KIB, 0), (128 * KIB, 1)]


def test_a_client_that_does_not_say_what_it_wants_is_sent_away(dirs):
    with Server(dirs, dirs / 'qemu-nbd', '--handshake-limit=1', 'base.qcow2') as server:
        _, quick = server.extents('base:allocation')
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(server.socket)
        slow.settimeout(20)
        began = time.monotonic()
        assert slow.recv(18, socket.MSG_WAITALL).startswith(b'NBDMAGIC')
        assert slow.recv(1) == b'' and 0.5 < time.monotonic() - began < 15
        assert quick.pread(512, 4 * MIB) == bytes(512)


GO = struct.pack('>8sII', b'IHAVEOPT', 7, 6) + struct.pack('>IH', 0, 0)
SET = b'\0\0\0\0' + struct.pack('>II', 1, len(BITMAPS[0])) + BITMAPS[0].encode()
REQUEST = struct.pack('>IHHQQI', 0x25609513, 0, 7, 7, 0, MIB)
TALK = (b'\0\0\0\3' + struct.pack('>8sII', b'IHAVEOPT', 8, 0) + struct.pack('>8sII', b'IHAVEOPT', 10, len(SET)) + SET + GO + REQUEST)


def test_clients_that_say_nonsense_or_vanish_harm_nobody(dirs):
    with Server(dirs, dirs / 'qemu-nbd', '-r', '-B', 'on', 'top.qcow2') as server:
        talks = [TALK[:n] for n in range(0, len(TALK), 3)]
        talks += [TALK[:n] + b'\xff' * 24 for n in range(4, len(TALK), 5)]
        talks += [TALK[:20] + struct.pack('>8sII', b'IHAVEOPT', option, size) + bytes(64) for option in (9, 10, 99)
                  for size in (0, 4, 8, 64, 0xffffffff)]
        # Lengths inside that lead far out.
        talks += [TALK[:20] + struct.pack('>8sII', b'IHAVEOPT', option, 64) + start + b'\xff' * (64 - len(start))
                  for option in (7, 9, 10) for start in (b'', bytes(4), bytes(7) + b'\x01')]
        for number, talk in enumerate(talks):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(server.socket)
                client.settimeout(20)
                client.sendall(talk)
                if number % 2 and TALK.startswith(talk):
                    continue  # it does not wait for any answer
                client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while client.recv(4096):
                        pass
        said, _ = server.extents(BITMAPS[0])
        assert said[BITMAPS[0]][0] == (2 * MIB, 0)


@pytest.mark.parametrize('words, said', [
    (('-B', 'absent', 'top.qcow2'), "Bitmap 'absent' is not found"),
    (('-B', 'on', '-o', '512', 'top.qcow2'), '-B and -o exclude each other'),
    (('-A', '-r', '-o', '512', 'top.qcow2'), '-A and -o exclude each other'),
    (('-A', '-B', 'on', '-r', '-l', 'one', 'top.qcow2'), '-A and -B exclude each other with -l'),
    (('-B', 'on', '--object', 'tls-creds-psk,id=a,dir=.', '--tls-creds=a', 'top.qcow2'), 'cannot go with --tls-creds'),
    (('--handshake-limit=x', 'top.qcow2'), "Invalid handshake limit 'x'"),
    (('--tls-authz=a', 'top.qcow2'), '--tls-authz (who may connect: nbdkit has no such list'),
    (('--tls-hostname=a', '-L'), 'which libnbd takes from -b')])
def test_what_cannot_be_is_refused_with_the_way_out(dirs, words, said):
    done = run(dirs / 'qemu-nbd', '-k', dirs / 'refused', *words, ok=False, cwd=dirs)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count('\n') == 1, done
    assert not os.path.exists(dirs / 'refused')
