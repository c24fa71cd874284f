# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every place at which a small archive can be cut, every byte of its headers changed: found, each time."""
import random
import struct

import vmagen
from vmalib import in_child


def small():
    """Two disks, stored blocks and zeros, several extents; 23 KiB."""
    rng = random.Random(2)
    a = bytearray(3 * 65536)
    a[4096:8192] = rng.randbytes(4096)
    a[131072:131072 + 512] = rng.randbytes(512)
    b = bytearray(65536 + 1024)
    b[65536:65536 + 1024] = rng.randbytes(1024)
    return vmagen.simple({1: bytes(a), 2: bytes(b)}, per=2, order="interleaved")


def accepted(cases, **kw):
    """The names of the cases that are taken for good archives."""
    def work(library):
        return [name for name, data in cases if library.verify_bytes(data, **kw) == 0]
    return in_child(work)


def test_the_small_archive_itself_is_good():
    data = small().build()
    assert accepted([("seek", data)]) == ["seek"]
    assert accepted([("pipe", data)], piped=True) == ["pipe"]
    assert accepted([("headers", data)], headers_only=True) == ["headers"]
    assert accepted([("headers", data)], headers_only=True, piped=True) == ["headers"]


def cuts(data):
    heads = [(at, at + 512) for at, _, _ in small().places()]
    for n in range(len(data)):
        if n < 64 or n % 512 in (0, 1, 511) or n % 61 == 0 and n < 12800 or n % 4 == 0 and any(a <= n <= b for a, b in heads):
            yield n, data[:n]


def test_every_cut_is_found():
    data = small().build()
    assert accepted(cuts(data)) == []
    assert accepted(cuts(data), piped=True) == []
    assert accepted(cuts(data), headers_only=True) == []
    assert accepted(cuts(data), headers_only=True, piped=True) == []


def header_bytes(archive):
    yield from range(len(archive.head))
    for at, _, _ in archive.places():
        yield from range(at, at + 512)


def test_every_changed_byte_of_a_header_is_found():
    archive = small()
    data = archive.build()

    def changed(xor, step=1):
        for at in list(header_bytes(archive))[::step]:
            yield at, data[:at] + bytes([data[at] ^ xor]) + data[at + 1:]

    assert accepted(changed(0xff)) == []
    assert accepted(changed(0x01, 5)) == []
    assert accepted(changed(0x10, 3), headers_only=True) == []


def test_changed_data_is_not_found_without_checksums():
    """The format has none over data: this is what the side file is for."""
    archive = small()
    data = archive.build()
    at = archive.places()[0][0] + 512 + 100
    assert accepted([("data", data[:at] + b"?" + data[at + 1:])]) == ["data"]


def test_headers_with_right_checksums_and_wild_values_do_no_harm():
    """Each is refused or read; neither a crash nor a hang."""
    archive = small()
    data, rng = archive.build(), random.Random(77)
    interesting = [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fffffff, 0x80000000, 0xffffffff, 12288, 12287, 512]

    def poke(head):
        at = rng.choice((rng.randrange(48, 60), rng.randrange(2044, 2060), rng.randrange(3068, 3084), rng.randrange(4096, 4224),
                         rng.randrange(12288, 12500), rng.randrange(len(head))))
        new = rng.choice((rng.randbytes(1), struct.pack(">I", rng.choice(interesting)), struct.pack("<H", rng.randrange(65536))))
        return vmagen.put(head, at, new)[:len(head)]

    def wild():
        for n in range(700):
            head = poke(poke(archive.head)) if n % 2 else poke(archive.head)
            yield n, vmagen.seal_header(head) + data[len(head):]

    def wild_extents():
        at = archive.places()[1][0]
        for n in range(700):
            x = data[at:at + 512]
            for _ in range(1 + n % 3):
                x = vmagen.put(x, rng.choice((6, 7, *range(40, 60), rng.randrange(512))), rng.randbytes(1))
            x = vmagen.put(x, 24, bytes(16))
            yield n, vmagen.put(data, at, vmagen.put(x, 24, vmagen.md5(x)))

    for cases in (list(wild()), list(wild_extents())):
        seeking = accepted(cases)
        assert len(seeking) < len(cases)
        assert accepted(cases, piped=True) == seeking
        assert set(accepted(cases, headers_only=True)) == set(seeking)
