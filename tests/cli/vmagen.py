#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMA archives in plain Python, made from the description of the format and from nothing of the C code: a writer
that can build every legal archive and break each of its rules, and a reader that checks all of them.

  vmagen.py make DIR     write every small good and bad archive there
  vmagen.py check FILE   is it one that Proxmox would restore? (may be compressed)
  vmagen.py list FILE    what is in it
"""
import hashlib
import os
import random
import struct
import sys

sys.dont_write_bytecode = True

# pylint: disable=wrong-import-position,unused-import
from vmacheck import (BLOCK, CLUSTER, EXTENT, FIXED, SLOTS, WRITE_SLOTS, Broken, as_bytes, check, md5, parse,  # noqa: E402,F401
                      parse_header, plain_bytes, put)

UUID = bytes(range(0x10, 0x20))
CTIME = 1500000000
CONF = b"boot: order=scsi0\nmemory: 512\n"


# ---------------------------------------------------------------------------------------- writing


class Header:
    """Configs are (name, contents), disks {id: (name, size)}. Names are bytes without their NUL, or Raw."""

    def __init__(self, configs=(), disks=None, uuid=UUID, ctime=CTIME, padding=0, version=1, magic=b"VMA\0"):
        self.configs = [(as_bytes(n), d) for n, d in configs]
        self.disks = {i: (as_bytes(n), s) for i, (n, s) in (disks or {}).items()}
        self.uuid, self.ctime, self.padding, self.version, self.magic = uuid, ctime, padding, version, magic
        self.config_slots = None  # their places in the table; None = from 0 on
        self.extra_blobs = []     # in front of all others
        self.blob_at = {}         # (kind, key) -> pointer, after build()
        self.gap = b""            # between the fixed header and the blob buffer

    def blobs(self):
        buf = bytearray(1)

        def add(key, data):
            self.blob_at[key] = len(buf)
            buf.extend(struct.pack("<H", len(data)) + data)

        for n, data in enumerate(self.extra_blobs):
            add(("extra", n), data)
        for n, (name, data) in enumerate(self.configs):
            add(("cname", n), terminated(name))
            add(("cdata", n), data)
        for i, (name, _) in self.disks.items():
            add(("disk", i), terminated(name))
        return bytes(buf)

    def build(self, fix=None, blob_fix=None, size=None, seal=True, tail=None):
        """fix: {offset: bytes} put in before the checksum; blob_fix: function on the blob buffer; size: of the
        whole header; tail: what stands behind the blobs instead of zeros."""
        blobs = self.blobs()
        end = len(blobs)
        if blob_fix:
            blobs = blob_fix(blobs)
        out = bytearray(FIXED)
        out[0:8] = self.magic + struct.pack(">I", self.version)
        out[8:24] = self.uuid
        if size is None:
            size = FIXED + len(self.gap) + -(-end // 512) * 512 + self.padding
        struct.pack_into(">q", out, 24, self.ctime)
        struct.pack_into(">III", out, 48, FIXED + len(self.gap), end, size)
        slots = self.config_slots or range(len(self.configs))
        for n, slot in enumerate(slots):
            struct.pack_into(">I", out, 2044 + 4 * slot, self.blob_at["cname", n])
            struct.pack_into(">I", out, 3068 + 4 * slot, self.blob_at["cdata", n])
        for i, (_, length) in self.disks.items():
            struct.pack_into(">I4xQ", out, 4096 + 32 * i, self.blob_at["disk", i], length)
        out = bytes(out) + self.gap + blobs
        if size < 1 << 28:
            out = out.ljust(size, b"\0")
        if tail is not None:
            at = FIXED + len(self.gap) + end
            out = put(out, at, tail[:len(out) - at])
        for at, new in (fix or {}).items():
            out = put(out, at, new)
        return seal_header(out, size) if seal else out


class Raw(bytes):
    """A name that is put in as it is, NUL or not."""


def terminated(name):
    return bytes(name) if isinstance(name, Raw) else name + b"\0"


def seal_header(data, size=None):
    data = put(data, 32, bytes(16))
    return put(data, 32, md5(data[:size]))


class Slot:
    """Part of an extent: cluster n of disk id; blocks {0..15: 4096 bytes} are stored."""

    def __init__(self, disk, cluster, blocks=None, reserved=0, mask=None):
        self.disk, self.cluster, self.blocks, self.reserved = disk, cluster, dict(blocks or {}), reserved
        self.forced_mask = mask

    @property
    def mask(self):
        if self.forced_mask is not None:
            return self.forced_mask
        return sum(1 << k for k in self.blocks)

    def info(self):
        return struct.pack(">HBBI", self.mask, self.reserved, self.disk, self.cluster)

    def data(self):
        return b"".join(self.blocks[k] for k in sorted(self.blocks))


EMPTY = Slot(0, 0)


class Extent:
    def __init__(self, slots, uuid=UUID, magic=b"VMAE", reserved=0, count=None, seal=True, extra=b"", fix=None):
        assert len(slots) <= SLOTS
        self.slots, self.uuid, self.magic, self.reserved = slots, uuid, magic, reserved
        self.count, self.seal, self.extra, self.fix = count, seal, extra, fix

    def build(self):
        data = b"".join(s.data() for s in self.slots)
        count = len(data) // BLOCK if self.count is None else self.count
        head = struct.pack(">4sHH", self.magic, self.reserved, count & 0xffff) + self.uuid + bytes(16)
        head = (head + b"".join(s.info() for s in self.slots)).ljust(EXTENT, b"\0")
        for at, new in (self.fix or {}).items():
            head = put(head, at, new)
        if self.seal:
            head = put(head, 24, md5(head))
        return head + data + self.extra


def slots_of(disk, data, size=None, tail="short", store_zeros=False):
    """The clusters of a disk, ascending. tail: what becomes of a size that is no multiple of a cluster:
    "short" leaves blocks wholly behind the end out, "full" stores all 16 blocks of the last cluster,
    "dirty" is short with rubbish behind the end in the last block."""
    size = len(data) if size is None else size
    out = []
    for n in range(-(-size // CLUSTER)):
        piece = data[n * CLUSTER:(n + 1) * CLUSTER]
        blocks = {}
        for k in range(16):
            block = piece[k * BLOCK:(k + 1) * BLOCK]
            inside = n * CLUSTER + k * BLOCK < size
            if len(block) < BLOCK:
                fill = b"\xa5" if tail == "dirty" and inside or tail == "full" else b"\0"
                block = block + fill * (BLOCK - len(block))
            whole = tail == "full" and size % CLUSTER and n == size // CLUSTER
            if whole or inside and (store_zeros or any(block)):
                blocks[k] = block
        out.append(Slot(disk, n, blocks))
    return out


def pack(slots, per=WRITE_SLOTS, uuid=UUID, **kw):
    return [Extent(slots[i:i + per], uuid, **kw) for i in range(0, len(slots), per)]


class Archive:
    """A header and extents, what they mean, and where everything stands."""

    def __init__(self, header, extents, contents=None, note=""):
        self.header, self.extents, self.note = header, extents, note
        self.head = header.build()
        self.contents = contents or {}  # {disk id: bytes}
        self.trailer = b""

    @property
    def configs(self):
        return dict(self.header.configs)

    @property
    def disks(self):
        """{name: bytes}"""
        return {self.header.disks[i][0].decode(errors="surrogateescape"): data for i, data in self.contents.items()}

    def build(self):
        return self.head + b"".join(e.build() for e in self.extents) + self.trailer

    def places(self):
        """(offset, length, extent) of each extent."""
        at, out = len(self.head), []
        for e in self.extents:
            length = len(e.build())
            out.append((at, length, e))
            at += length
        return out

    def write(self, path):
        with open(path, "wb") as f:
            f.write(self.build())
        return path


def random_disk(rng, size, density=0.5):
    """Blocks of random bytes, of one byte, of zeros; the tail too."""
    out = bytearray()
    while len(out) < size:
        kind = rng.random()
        run = rng.choice((1, 1, 2, 5, 16, 40)) * BLOCK
        if kind < density:
            out += rng.randbytes(run)
        elif kind < density + 0.15:
            out += bytes([rng.randrange(1, 256)]) * run
        else:
            out += bytes(run)
    return bytes(out[:size])


def simple(contents, configs=((b"qemu-server.conf", CONF),), order=None, per=WRITE_SLOTS, names=None, seed=1, **kw):
    """An archive of whole disks: contents {id: bytes}; order "shuffled", "descending", "interleaved" or None."""
    names = names or {}
    header = Header(configs, {i: (names.get(i, f"drive-scsi{n}"), len(d))
                              for n, (i, d) in enumerate(sorted(contents.items()))})
    slots = {i: slots_of(i, d, **kw) for i, d in sorted(contents.items())}
    flat = [s for part in slots.values() for s in part]
    if order == "shuffled":
        random.Random(seed).shuffle(flat)
    elif order == "descending":
        flat.reverse()
    elif order == "interleaved":
        flat.sort(key=lambda s: (s.cluster, s.disk))
    return Archive(header, pack(flat, per) or [Extent([])], contents)


# ---------------------------------------------------------------------------------------- good ones


def good():
    """(name, Archive): all must be listed, verified and extracted to exactly what they hold."""
    rng = random.Random(20091211)
    a = random_disk(rng, 5 * CLUSTER)
    b = random_disk(rng, 3 * CLUSTER)
    yield "plain", simple({1: a})
    yield "two-disks", simple({1: a, 2: b}, configs=[(b"qemu-server.conf", CONF), (b"qemu-server.fw", b"[OPTIONS]\n")])
    for order in ("shuffled", "descending", "interleaved"):
        yield order, simple({1: a, 2: b, 3: random_disk(rng, 70 * CLUSTER, 0.05)}, order=order)
    yield "slots-59", simple({1: random_disk(rng, 130 * CLUSTER, 0.02)}, per=59)
    yield "largest-extent", simple({1: rng.randbytes(59 * CLUSTER)}, per=59)
    yield "one-slot-extents", simple({1: a, 2: b}, order="interleaved", per=1)
    yield "ids-apart", simple({7: a, 200: b})
    yield "id-255", simple({1: b, 255: a}, names={255: "drive-last"})
    yield "id-254", simple({254: a})
    for size in (512, 4096, 4608, 65536 - 512, 65536 + 512, 131072 + 4096 + 512, 196608 - 4096):
        data = random_disk(rng, size, 0.7)[:size - 1] + b"!"
        for tail in ("short", "full", "dirty"):
            yield f"tail-{size}-{tail}", simple({1: data}, tail=tail)
    for size in (1, 511, 1000, 66536, 65537):
        yield f"odd-{size}", simple({1: random_disk(rng, size, 0.9)[:size - 1] + b"!"})
    archive = simple({1: rng.randbytes(CLUSTER + 512)})
    last = archive.extents[0].slots[-1]
    last.blocks[2] = b"\xa5" * BLOCK  # wholly behind the end, not the whole cluster: clipped
    yield "tail-stale-blocks", archive
    yield "stored-zeros", simple({1: bytes(2 * CLUSTER) + a}, store_zeros=True)
    yield "all-zeros", simple({1: bytes(200 * CLUSTER)})
    yield "unused-slots", unused_slots(a, b)
    yield "unused-slots-with-clusters", unused_slots(a, b, Slot(0, 77))
    archive = simple({1: a, 2: b}, order="interleaved")
    archive.extents = [Extent([])] + pack(archive.extents[0].slots, 3) + [Extent([])]
    archive.extents[2:2] = [Extent([]), Extent([EMPTY] * 59)]
    yield "empty-extents", archive
    archive = simple({1: a})
    for s in archive.extents[0].slots:
        s.reserved = 0x5a
    yield "reserved-byte", archive
    yield "config-only", Archive(Header([(b"qemu-server.conf", CONF)]), [Extent([])])
    yield "config-only-no-extent", Archive(Header([(b"qemu-server.conf", CONF)]), [])
    yield "disks-only", simple({1: a}, configs=[])
    yield "empty-config", simple({1: b}, configs=[(b"qemu-server.conf", b""), (b"qemu-server.fw", b"x")])
    yield "one-empty-config", Archive(Header([(b"qemu-server.conf", b"")]), [Extent([])])
    yield "nothing", Archive(Header(), [])  # header_size is 12288 + 512
    archive = Archive(Header(), [])
    archive.head = archive.header.build(size=FIXED, blob_fix=lambda _: b"", fix={52: bytes(4)})
    yield "nothing-at-all", archive
    yield "largest-config", simple({1: b}, configs=[(b"qemu-server.conf", CONF), (b"big.conf", rng.randbytes(65535))])
    yield "binary-config", simple({1: b}, configs=[(b"qemu-server.conf", bytes(range(256)) * 3)])
    yield "padded-header", Archive(Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", len(b))}, padding=9 * 512),
                                   pack(slots_of(1, b)), {1: b})
    archive = Archive(Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", len(b))}, padding=1024),
                      pack(slots_of(1, b)), {1: b})
    archive.head = archive.header.build(tail=b"\xee" * 1500)
    yield "rubbish-in-padding", archive
    header = Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", len(b))})
    header.gap = bytes(700)
    yield "blobs-further-on", Archive(header, pack(slots_of(1, b)), {1: b})
    header = Header([(b"qemu-server.conf", CONF), (b"b.conf", b"b")], {1: ("drive-scsi0", len(b))})
    header.config_slots = [5, 255]
    yield "config-slots-apart", Archive(header, pack(slots_of(1, b)), {1: b})
    header = Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", len(b))})
    header.extra_blobs = [b"", b"nobody points here", b"x" * 600]
    yield "unused-blobs", Archive(header, pack(slots_of(1, b)), {1: b})
    yield "ctime-0", Archive(Header([(b"qemu-server.conf", CONF)], ctime=0), [Extent([])])
    yield "ctime-negative", Archive(Header([(b"qemu-server.conf", CONF)], ctime=-86400), [Extent([])])
    yield "ctime-huge", Archive(Header([(b"qemu-server.conf", CONF)], ctime=(1 << 63) - 1), [Extent([])])
    yield "ctime-least", Archive(Header([(b"qemu-server.conf", CONF)], ctime=-1 << 63), [Extent([])])
    yield "long-names", simple({1: b}, names={1: "d" * 240}, configs=[(b"c" * 250, CONF)])
    yield "zero-uuid", with_uuid(simple({1: b}), bytes(16))


def unused_slots(a, b, unused=EMPTY):
    archive = simple({1: a, 2: b}, order="interleaved")
    slots = archive.extents[0].slots
    mixed = [unused, unused] + slots[:3] + [unused] + slots[3:] + [unused]
    archive.extents = [Extent([unused]), Extent(mixed[:6]), Extent([unused] * 50 + mixed[6:])]
    return archive


def with_uuid(archive, uuid):
    archive.header.uuid = uuid
    archive.head = archive.header.build()
    for e in archive.extents:
        e.uuid = uuid
    return archive


def vmstate_archive(state, size=None, disk=None):
    """id 1: a disk, id 2: the stream. size: what the header says of it."""
    header = Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", len(disk or b"")),
                                                    2: ("vmstate", len(state) if size is None else size)})
    if disk is None:
        del header.disks[1]
    slots = (slots_of(1, disk) if disk else []) + slots_of(2, state)
    return Archive(header, pack(slots), {**({1: disk} if disk else {}), 2: state})


def big_good():
    """Larger ones, as (name, function that makes it)."""
    def many_disks():
        rng = random.Random(254)
        return simple({i: random_disk(rng, CLUSTER + 512 * (i % 9)) for i in range(1, 255)}, order="shuffled")

    def many_configs():
        rng = random.Random(256)
        return simple({1: random_disk(rng, CLUSTER)},
                      configs=[(b"qemu-server.conf", CONF)] + [(b"f%d.conf" % n, rng.randbytes(n * 7)) for n in range(255)])

    def large_header():
        rng = random.Random(12)
        return simple({1: random_disk(rng, CLUSTER)}, configs=[(b"f%d" % n, rng.randbytes(65535)) for n in range(13)])

    def largest_header():  # all 256 configs as large as can be
        return simple({1: bytes(CLUSTER)}, configs=[(b"f%d" % n, bytes([n]) * 65535) for n in range(256)])

    return [("254-disks", many_disks), ("256-configs", many_configs), ("header-over-800K", large_header),
            ("largest-configs", largest_header)]


# ---------------------------------------------------------------------------------------- bad ones

OK, REFUSED = True, False


class Bad:
    """An archive with something wrong. listed, verified, extracted: does each still work? at: the offset that the
    message must name, None = any or none; says: words of which one must appear in the message."""

    def __init__(self, name, data, listed=REFUSED, verified=REFUSED, extracted=REFUSED, at=None, says=(), warns=()):
        self.name, self.data, self.at, self.says, self.warns = name, data, at, says, warns
        self.listed, self.verified, self.extracted = listed, verified, extracted


def base(size=6 * CLUSTER, **kw):
    return simple({1: random_disk(random.Random(6), size)}, **kw)


def bad_headers():
    a = base()
    whole, head, body = a.build(), a.head, a.build()[len(a.head):]
    header = a.header

    def of(name, new_head, **kw):
        return Bad("header-" + name, new_head + body, **kw)

    yield Bad("empty-file", b"")
    yield Bad("one-byte", b"V")
    yield Bad("text", b"not an archive\n" * 1000)
    yield of("magic", seal_header(put(head, 0, b"VMB\0")))
    yield of("magic-of-an-extent", seal_header(put(head, 0, b"VMAE")))
    for version in (0, 2, 0x01000000, 0xffffffff):
        yield of(f"version-{version:x}", seal_header(put(head, 4, struct.pack(">I", version))), says=("version",))
    yield of("md5", put(head, 32, bytes(16)), says=("checksum", "MD5", "md5"))
    yield of("bit-in-reserved", put(head, 700, b"\1"), says=("checksum", "MD5", "md5"))
    for size in (0, 1, 512, FIXED - 512, FIXED - 1, FIXED):
        yield of(f"size-{size}", header.build(size=size))
    for size in (1 << 24, (64 << 20) + 512, 1 << 30, 0x7fffffff, 0x80000000, 0x80003000, 0xfffffe00, 0xffffffff):
        yield of(f"size-{size:x}", put(header.build(size=1 << 30), 56, struct.pack(">I", size)))
    for name, at, value in (("offset-small", 48, FIXED - 1), ("offset-0", 48, 0), ("offset-big", 48, 1 << 20),
                            ("offset-wraps", 48, 0xffffff00), ("size-big", 52, 1 << 20), ("size-wraps", 52, 0xffffffff),
                            ("size-wraps-exactly", 52, (1 << 32) - FIXED), ("size-over-by-1", 52, len(head) - FIXED + 1)):
        yield of("blobs-" + name, seal_header(put(head, at, struct.pack(">I", value))))
    both = put(put(head, 48, struct.pack(">I", 0xfffffffe)), 52, struct.pack(">I", 0x3002))
    yield of("blobs-both-wrap", seal_header(both))
    name_at, data_at = header.blob_at["cname", 0], header.blob_at["cdata", 0]
    for what, field in (("name", 2044), ("data", 3068)):
        for how, pointer in (("inside-a-blob", name_at + 1), ("far", 70000), ("highest", 0xffffffff), ("between", name_at + 3),
                             ("at-the-end", len(header.blobs()))):
            yield of(f"config-{what}-{how}", seal_header(put(head, field, struct.pack(">I", pointer))))
    yield of("config-name-without-nul", seal_header(put(head, 2044, struct.pack(">I", data_at))))
    first = FIXED + name_at
    yield of("first-blob-too-long", seal_header(put(head, first, b"\xff\xff")))
    yield of("big-endian-length", seal_header(put(head, first, struct.pack(">H", len("qemu-server.conf") + 1))))
    lonely = Header([(b"qemu-server.conf", CONF), (b"x", b"y")], header.disks)
    yield Bad("config-name-blob-empty", with_name_blob(lonely, b"") + body)
    yield Bad("config-name-with-nul", with_name_blob(lonely, b"a\0b\0") + body)
    yield Bad("config-name-unterminated", with_name_blob(lonely, b"abc") + body)
    for count in (1, 511, 512, FIXED - 1, FIXED, FIXED + 1, len(head) - 1):
        yield Bad(f"cut-at-{count}", whole[:count])


def with_name_blob(header, blob):
    header.configs[1] = (Raw(blob), header.configs[1][1])
    return header.build()


def odd_headers():
    """Odd, but the header as such can be read; what comes of it differs."""
    a = base()
    body = a.build()[len(a.head):]
    disks = a.header.disks
    head = Header([(b"qemu-server.conf", CONF), (b"lost.conf", b"x")], disks)
    data = head.build()
    for field, what in ((2044, "name"), (3068, "data")):
        yield Bad(f"config-only-{'data' if what == 'name' else 'name'}-pointer",
                  seal_header(put(data, field + 4, bytes(4))) + body, OK, OK, OK, warns=True)
    twice = Header([(b"qemu-server.conf", CONF), (b"same", b"1"), (b"same", b"2")], disks)
    yield Bad("config-names-alike", twice.build() + body, OK, OK, OK, warns=True)
    for label, name in (("traversal", b"../evil.conf"), ("absolute", b"/tmp/drover-evil.conf"), ("dotdot", b".."),
                        ("dot", b"."), ("slash", b"sub/evil.conf"), ("newline", b"a\nCTIME: now"), ("escape", b"\x1b[31mred"),
                        ("bell", b"a\x07"), ("delete", b"a\x7f"), ("long", b"n" * 300),
                        ("forged", b"x\nDEV: dev_id=9 size: 512 devname: drive-forged")):
        yield Bad("config-name-" + label, Header([(b"qemu-server.conf", CONF), (name, b"evil")], disks).build() + body,
                  None if is_control(name) else OK, OK, REFUSED)
    empty = Header([(b"qemu-server.conf", CONF), (b"", b"evil")], disks)
    yield Bad("config-name-empty", empty.build() + body, None, None, REFUSED)
    for label, name in (("slash", b"../../evil"), ("absolute", b"/tmp/drover-evil"), ("newline", b"a\nCTIME: now"),
                        ("escape", b"\x1b]0;title\x07"), ("long", b"n" * 300)):
        yield Bad("disk-name-" + label, Header([(b"qemu-server.conf", CONF)], {1: (name, disks[1][1])}).build() + body,
                  None if is_control(name) else OK, OK, REFUSED if label != "long" else None)
    one = random_disk(random.Random(3), 2 * CLUSTER)
    alike = simple({1: one, 2: one[::-1]}, names={1: "drive-scsi0", 2: "drive-scsi0"})
    yield Bad("disk-names-alike", alike.build(), OK, OK, REFUSED)
    states = simple({1: one, 2: one[::-1]}, names={1: "vmstate", 2: "vmstate"})
    yield Bad("two-vmstates", states.build(), None, None, REFUSED)
    for label, size in (("2^48+512", (1 << 48) + 512), ("2^62", 1 << 62), ("2^63", 1 << 63), ("2^64-512", (1 << 64) - 512)):
        yield Bad("disk-size-" + label, Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", size)}).build() + body,
                  None, REFUSED, REFUSED)
    yield Bad("disk-size-2^48", Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", 1 << 48)}).build() + body,
              OK, REFUSED, REFUSED)
    # No disk at all for those who look: its clusters then belong to nobody.
    yield Bad("disk-size-0", Header([(b"qemu-server.conf", CONF)], {1: ("drive-scsi0", 0)}).build() + body,
              OK, REFUSED, REFUSED, at=len(a.head))
    lost = seal_header(put(a.head, 4096 + 32, struct.pack(">I", a.header.blob_at["disk", 1] + 1)))
    yield Bad("disk-name-pointer", lost + body, None, REFUSED, REFUSED)
    for label, blob in (("empty-blob", b""), ("nul", b"a\0b\0"), ("unterminated", b"abc"), ("empty", b"\0")):
        header = Header([(b"qemu-server.conf", CONF)], {1: (Raw(blob), disks[1][1])})
        yield Bad("disk-name-" + label, header.build() + body, None, REFUSED, REFUSED)


def is_control(name):
    return any(c < 32 or c == 127 for c in name)


def bad_extents():
    def of(name, archive, at=None, verified=REFUSED, **kw):
        return Bad("extent-" + name, archive.build(), OK, verified, verified, at=at, **kw)

    def fresh(per=2, **kw):
        a = base(per=per, **kw)
        return a, a.places()

    a, p = fresh()
    a.extents[1].seal = False
    yield of("md5", a, p[1][0], says=("checksum", "MD5", "md5"))
    for name, change in (("uuid", {"uuid": bytes(16)}), ("magic", {"magic": b"VMAX"}), ("magic-of-a-header", {"magic": b"VMA\0"}),
                         ("reserved1", {"reserved": 1}), ("reserved1-high", {"reserved": 0x8000})):
        a, p = fresh()
        for key, value in change.items():
            setattr(a.extents[1], key, value)
        yield of(name, a, p[1][0])
    for name, delta in (("less", -1), ("more", 1), ("much-more", 300)):
        a, p = fresh()
        e = a.extents[1]
        e.count = sum(len(s.blocks) for s in e.slots) + delta
        yield of("count-" + name, a, p[1][0])
    a, p = fresh()
    a.extents[1].count = 0
    yield of("count-0", a, p[1][0])
    a, p = fresh()
    a.extents[-1].count = 945
    a.extents[-1].extra = bytes(945 * BLOCK)
    yield of("count-945", a, p[-1][0])
    a, p = fresh()
    a.extents[-1].count = 65535
    yield of("count-65535", a, p[-1][0])
    a, p = fresh()
    a.extents[1].slots.append(Slot(0, 3, {0: b"x" * BLOCK}))  # counted, stored, nobody's
    yield of("unused-slot-with-mask-and-data", a, p[1][0])
    a, p = fresh()
    a.extents[1].slots.append(Slot(0, 3, mask=0xffff))  # neither counted nor stored
    yield of("unused-slot-with-mask", a, None, None)
    a, p = fresh()
    a.extents[-1].extra = b"x" * BLOCK
    yield of("data-left-over", a)
    for name, slot in (("repeated", Slot(1, 0, {0: b"d" * BLOCK})), ("repeated-zeros", Slot(1, 1))):
        a, p = fresh()
        a.extents[-1].slots.append(slot)
        yield of("cluster-" + name, a, p[-1][0], says=("twice", "second", "duplicate", "already"))
    a, p = fresh(per=58)
    a.extents[0].slots.append(a.extents[0].slots[2])
    yield of("cluster-repeated-in-it", a, p[0][0])
    for name, victim in (("first", 0), ("middle", 3), ("last", -1)):
        a, p = fresh(per=58)
        del a.extents[0].slots[victim]
        yield of("cluster-missing-" + name, a, says=("missing", "lacks", "incomplete", "no extent"))
    a, p = fresh()
    a.extents.pop()
    yield of("last-one-missing", a, says=("missing", "lacks", "incomplete", "no extent"))
    a, p = fresh()
    a.extents = []
    yield of("all-missing", a, says=("missing", "lacks", "incomplete", "no extent"))
    for name, disk in (("in-no-table", 9), ("254", 254), ("255", 255)):
        a, p = fresh()
        a.extents[1].slots.append(Slot(disk, 0))
        yield of("disk-" + name, a, p[1][0])
        a.extents[1].slots[-1] = Slot(disk, 0, {3: b"d" * BLOCK})
        yield of("disk-" + name + "-with-data", a, p[1][0])
    for name, cluster in (("next", 6), ("in-rounding", 63), ("behind-rounding", 64), ("far", 1 << 31), ("highest", 0xffffffff)):
        for data in (False, True):
            a, p = fresh()
            a.extents[1].slots.append(Slot(1, cluster, {0: b"d" * BLOCK} if data else {}))
            yield of(f"cluster-{name}{'-with-data' if data else ''}", a, p[1][0])
    a, p = fresh()
    data = a.build()
    at, length, _ = p[-1]
    for name, cut in (("1-byte", at + 1), ("511", at + 511), ("512", at + 512), ("middle", at + length // 2), ("by-1", at + length - 1),
                      ("by-512", at + length - 512), ("by-a-block", at + length - BLOCK)):
        yield Bad("extent-cut-" + name, data[:cut], OK, REFUSED, REFUSED, at=at)
    for name, junk in (("1-byte", b"x"), ("511", b"x" * 511), ("512", b"x" * 512), ("block", b"x" * BLOCK)):
        yield Bad("junk-behind-" + name, data + junk, OK, REFUSED, REFUSED, at=len(data))
    for count in (1, 511, 512, 4096, 100000):
        yield Bad(f"zeros-behind-{count}", data + bytes(count), OK, OK, OK, warns=True)
    yield Bad("zeros-then-junk", data + bytes(8192) + b"x", OK, REFUSED, REFUSED)
    yield Bad("zeros-then-extent", data + bytes(512) + Extent([]).build(), OK, REFUSED, REFUSED)
    yield Bad("archive-twice", data + data, OK, REFUSED, REFUSED, at=len(data))
    state = vmstate_archive(random_disk(random.Random(8), 4 * CLUSTER))
    slots = state.extents[0].slots
    slots[1], slots[2] = slots[2], slots[1]
    yield Bad("vmstate-out-of-order", state.build(), OK, REFUSED, REFUSED, at=len(state.head))
    state = vmstate_archive(random_disk(random.Random(8), 4 * CLUSTER))
    del state.extents[0].slots[1]
    yield Bad("vmstate-with-a-gap", state.build(), OK, REFUSED, REFUSED, at=len(state.head))
    state = vmstate_archive(random_disk(random.Random(8), 4 * CLUSTER))
    state.extents[0].slots.insert(1, state.extents[0].slots[0])
    yield Bad("vmstate-repeats", state.build(), OK, REFUSED, REFUSED, at=len(state.head))


def bad():
    yield from bad_headers()
    yield from odd_headers()
    yield from bad_extents()


# ---------------------------------------------------------------------------------------- huge ones


def write_huge(path, size, disks=1, zeros=False, name="drive-scsi"):
    """An archive of disks of size bytes each whose data is a hole in a sparse file: only headers are written.
    zeros: all clusters are zeros and nothing is stored; otherwise all blocks are."""
    header = Header([(b"qemu-server.conf", CONF)], {i + 1: (f"{name}{i}", size) for i in range(disks)})
    head = header.build()
    mask = 0 if zeros else 0xffff
    with open(path, "wb") as f:
        f.write(head)
        at = len(head)
        for disk in range(1, disks + 1):
            clusters = -(-size // CLUSTER)
            for first in range(0, clusters, WRITE_SLOTS):
                n = min(WRITE_SLOTS, clusters - first)
                info = b"".join(struct.pack(">HBBI", mask, 0, disk, first + i) for i in range(n))
                count = 0 if zeros else 16 * n
                x = (struct.pack(">4sHH", b"VMAE", 0, count) + UUID + bytes(16) + info).ljust(EXTENT, b"\0")
                x = put(x, 24, md5(x))
                f.seek(at)
                f.write(x)
                at += EXTENT + count * BLOCK
        f.truncate(at)
    return at


# ---------------------------------------------------------------------------------------- by hand


def make(directory):
    os.makedirs(directory, exist_ok=True)
    for name, archive in good():
        archive.write(os.path.join(directory, f"good-{name}.vma"))
    for name, function in big_good():
        function().write(os.path.join(directory, f"good-{name}.vma"))
    for case in bad():
        with open(os.path.join(directory, f"bad-{case.name}.vma"), "wb") as f:
            f.write(case.data)


def main(argv):
    if len(argv) == 3 and argv[1] == "make":
        make(argv[2])
    elif len(argv) == 3 and argv[1] in ("check", "list"):
        try:
            parsed = parse(plain_bytes(argv[2]), strict=argv[1] == "check")
        except Broken as e:
            sys.exit(f"{argv[2]}: {e}")
        for name, data in parsed.configs:
            print(f"config {name!r}: {len(data)} bytes")
        for i, (size, _) in parsed.disks.items():
            print(f"disk {i} {parsed.names[i]!r}: {size} bytes, {hashlib.md5(parsed.content(i)).hexdigest()}")
        print(f"{len(parsed.extents)} extents")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv)
